"""Dense indexes with encoders of their own: built, updated, fused, dealt, pooled, and left for evaluation alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

import tiny
from raglan.cli import app, main
from raglan.encoder import Encoder
from raglan.errors import CheckpointError, IndexMismatch, RecipeError
from raglan.evaluate import evaluation_folder
from raglan.knowledge import KnowledgeBase, build_knowledge, reencoded
from raglan.pooled import retrieve_each
from raglan.recipe import DenseIndex, EncoderSettings, KnowledgeSettings, load_recipe
from raglan.retriever import Retriever
from raglan.stages import Parts, stages_of
from raglan.synthesis.evidence import Assembler
from raglan.synthesis.start import run as synthesize
from test_kill import small_recipe
from test_knowledge import documents

runner = CliRunner()
ASKED = ["who built the tower", "old river water", "the miller founded it", "stone by the lighthouse"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three that find different passages; the last compares by inner product."""
    path = tmp_path_factory.mktemp("encoders")
    return [
        tiny.sentence_encoder(path / str(seed), seed=seed, similarity="dot" if seed == 2 else "cosine") for seed in range(3)
    ]


def by(folder: Path, **more: Any) -> dict[str, Any]:
    return {"model": str(folder), "dtype": "float32", **more}


def settings(tmp_path: Path, encoders: list[Path], **changes: Any) -> KnowledgeSettings:
    """Indexes a (the knowledge base's encoder), b and c (their own), and fused, of a and b."""
    indexes = {
        "bm25": {"kind": "bm25"}, "a": {"kind": "dense"}, "b": {"kind": "dense", "encoder": by(encoders[1])},
        "c": {"kind": "dense", "encoder": by(encoders[2])}, "fused": {"kind": "hybrid", "of": ["a", "b"], "depth": 10},
    }  # fmt: skip
    values = {
        "path": tmp_path / "kb", "documents": [tmp_path / "docs"], "chunk": None, "encoder": by(encoders[0]),
        "indexes": indexes,
    }  # fmt: skip
    if not (tmp_path / "docs").exists():
        documents(tmp_path / "docs")
    return KnowledgeSettings.model_validate({**values, **changes})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, encoders: list[Path]) -> KnowledgeBase:
    return build_knowledge(settings(tmp_path_factory.mktemp("base"), encoders))


def retriever(base: KnowledgeBase, index: str) -> Retriever:
    return Retriever(base, Encoder.open(base.settings.encoder), index=index)


def found_by(base: KnowledgeBase, folder: Path, k: int) -> list[list[int]]:
    encoder = Encoder.open(EncoderSettings(**by(folder)))
    vectors = encoder.embed_passages([f"{passage.title}\n{passage.text}" for passage in base.corpus])
    return np.argsort(-(encoder.embed_queries(ASKED) @ vectors.T), axis=1, kind="stable")[:, :k].tolist()


def test_each_index_finds_what_its_own_encoder_finds(base: KnowledgeBase, encoders: list[Path]) -> None:
    first, each = retriever(base, "a"), {}
    for name, folder in zip("abc", encoders, strict=True):
        hits = first.by(name).retrieve(ASKED, 5)
        each[name] = [[hit.row for hit in own] for own in hits]
        assert each[name] == found_by(base, folder, 5)
    assert each["a"] != each["b"] != each["c"] != each["a"]
    assert [first.by(name).index.needs_vectors for name in base.settings.indexes] == [False, True, False, False, True]
    together = retrieve_each({name: first.by(name) for name in base.settings.indexes}, ASKED, 5)
    assert {name: [[hit.row for hit in own] for own in together[name]] for name in "abc"} == each
    ranks = zip(first.by("fused").retrieve(ASKED, 5), *(found_by(base, folder, 10) for folder in encoders[:2]), strict=True)
    for fused, *lists in ranks:
        gains = {row: sum(1 / (61 + hits.index(row)) for hits in lists if row in hits) for row in {*lists[0], *lists[1]}}
        assert [hit.row for hit in fused] == sorted(gains, key=lambda row: (-gains[row], row))[:5]


def test_what_is_found_is_named_by_the_query_towers_that_ask(base: KnowledgeBase) -> None:
    first = retriever(base, "a")
    names = {name: first.by(name).fingerprint for name in base.settings.indexes}
    assert len(set(names.values())) == len(names)
    encoder = Encoder.open(base.settings.encoder)
    query = encoder.split()
    for parameter in query.parameters():
        parameter.data += 0.1
    learned = Retriever(base, encoder, index="a")
    assert learned.fingerprint != names["a"]
    assert learned.by("fused").fingerprint != names["fused"]
    assert learned.by("b").fingerprint == names["b"], "its own encoder did not learn"


def test_a_knowledge_base_without_own_encoders_is_what_it_was(tmp_path: Path, encoders: list[Path]) -> None:
    assert DenseIndex(kind="dense").model_dump() == {"kind": "dense", "factory": None, "nprobe": 8}
    plain = build_knowledge(settings(tmp_path, encoders, indexes={"a": {"kind": "dense"}}))
    assert "encoders" not in plain.manifest
    assert plain.manifest["settings"]["indexes"] == {"a": {"kind": "dense", "factory": None, "nprobe": 8}}
    assert sorted(path.name for path in plain.folder.iterdir()) == ["corpus", "indexes", "manifest.json", "vectors"]


def test_only_new_passages_are_encoded_by_any_encoder(tmp_path: Path, encoders: list[Path]) -> None:
    first = build_knowledge(settings(tmp_path, encoders))
    assert {name: own["encoded"] for name, own in first.manifest["encoders"].items()} == {"b": 40, "c": 40}
    assert build_knowledge(settings(tmp_path, encoders)).version == first.version
    rows = (tmp_path / "docs" / "corpus.jsonl").read_text().splitlines()[1:]
    rows.append(json.dumps({"id": "new", "title": "", "text": "who built the tower"}))
    (tmp_path / "docs" / "corpus.jsonl").write_text("\n".join(rows) + "\n")
    second = build_knowledge(settings(tmp_path, encoders))
    assert second.manifest["encoded"] == 1
    assert {name: own["encoded"] for name, own in second.manifest["encoders"].items()} == {"b": 1, "c": 1}
    for name, folder in zip("abc", encoders, strict=True):
        found = [[hit.row for hit in own] for own in retriever(second, name).retrieve(ASKED, 3)]
        assert found == found_by(second, folder, 3)
    other = settings(tmp_path, encoders, encoder=by(encoders[1]))  # b's encoder is now the knowledge base's, too
    third = build_knowledge(other)
    assert (third.manifest["encoded"], third.manifest["encoders"]["b"]["encoded"]) == (0, 0)
    assert third.manifest["encoders"]["b"]["vectors"] == "vectors"
    asks = other.indexes["b"].model_copy(update={"encoder": EncoderSettings(**by(encoders[1], query_prompt="who "))})
    fourth = build_knowledge(other.model_copy(update={"indexes": {**other.indexes, "b": asks}}))
    assert fourth.version != third.version, "another way of asking is another version"
    assert fourth.manifest["encoders"]["b"]["encoded"] == 0


def test_an_encoder_that_learns_leaves_the_others_their_vectors(base: KnowledgeBase, tmp_path: Path) -> None:
    encoder = Encoder.open(base.settings.encoder)
    for parameter in encoder.passage_tower.parameters():
        parameter.data += 0.05
    learned = reencoded(base, encoder.snapshot(), tmp_path / "learned")
    assert learned.manifest["encoded"] == 40
    assert {name: own["encoded"] for name, own in learned.manifest["encoders"].items()} == {"b": 0, "c": 0}
    again = Retriever(learned, encoder.snapshot(), index="b").retrieve(ASKED, 3)
    assert [[hit.row for hit in own] for own in again] == [
        [hit.row for hit in own] for own in retriever(base, "b").retrieve(ASKED, 3)
    ]


def test_a_refresh_opens_no_other_encoder(tmp_path: Path, encoders: list[Path]) -> None:
    own = tmp_path / "own"
    shutil.copytree(encoders[1], own)
    indexes = {"a": {"kind": "dense"}, "b": {"kind": "dense", "encoder": by(own)}, "b2": {"kind": "dense", "encoder": by(own)}}
    built = build_knowledge(settings(tmp_path, encoders, indexes=indexes))
    encoder = Encoder.open(built.settings.encoder)
    for parameter in encoder.passage_tower.parameters():
        parameter.data += 0.05
    own.rename(tmp_path / "gone")
    learned = reencoded(built, encoder.snapshot(), tmp_path / "learned")
    again = reencoded(learned, encoder.snapshot(), tmp_path / "again")
    (tmp_path / "gone").rename(own)
    for name in ("b", "b2"):
        kept = built.manifest["encoders"][name]
        assert again.manifest["encoders"][name] == {**kept, "encoded": 0}
        before, after = (base.folder / kept["vectors"] / "000000000.npy" for base in (built, again))
        assert before.samefile(after)
        found = [retriever(built, name), Retriever(again, encoder.snapshot(), index=name)]
        rows = [[[hit.row for hit in hits] for hits in one.retrieve(ASKED, 3)] for one in found]
        assert rows[0] == rows[1]


def test_an_encoder_that_is_gone_or_another_is_told_of_when_the_index_is_opened(tmp_path: Path, encoders: list[Path]) -> None:
    own = tiny.sentence_encoder(tmp_path / "own", seed=7)
    indexes = {"a": {"kind": "dense"}, "b": {"kind": "dense", "encoder": by(own)}}
    built = build_knowledge(settings(tmp_path, encoders, indexes=indexes))
    tiny.sentence_encoder(tmp_path / "own", seed=8)
    with pytest.raises(IndexMismatch, match=r"index 'b' of .* was built by encoder") as fault:
        KnowledgeBase.open(tmp_path / "kb").index("b")
    assert "raglan build" in str(fault.value.hint)
    (own / "modules.json").rename(tmp_path / "modules.json")
    (own / "config.json").unlink(missing_ok=True)
    again = KnowledgeBase.open(tmp_path / "kb")
    with pytest.raises(CheckpointError, match=r"encoder .*own.* cannot be loaded"):
        again.index("b")
    assert Retriever(again, Encoder.open(built.settings.encoder), index="a").retrieve(ASKED, 2), "the others still answer"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, encoders: list[Path]) -> Path:
    """Three encoders; c is left for evaluation."""
    path = small_recipe(tmp_path_factory.mktemp("dealt"))
    tree = yaml.safe_load(path.read_text())
    del tree["stages"]
    tree["knowledge"]["indexes"] = {
        "bm25": {"kind": "bm25"}, "a": {"kind": "dense"}, "b": {"kind": "dense", "encoder": by(encoders[1])},
        "c": {"kind": "dense", "encoder": by(encoders[2])},
    }  # fmt: skip
    tree["retriever"] = {"k": 3, "index": "a"}
    few = {"noise": [], "distractors": [], "orders": 0, "gold": ["present"], "ratios": [0.0], "unseen": ["c"]}
    tree["evaluate"] |= {"modes": ["retrieved"], "k": [1], "limit": 5, "robustness": few, "metrics": ["match"]}
    weights = {"relation": {"R1": 1}, "task": {"factoid": 1}, "answer_format": {"span": 1}, "query_format": {"wh_question": 1}}
    tree["synthesis"] = {
        "path": "out", "n": 12, "questions": "dev.jsonl", "weights": weights, "decontaminate": "none", "split": {},
        "retrievers": {"bm25": 1, "a": 1, "b": 1, "c": 0, "pooled": 1}, "passages": {"k": {3: 1}, "gold_absent": 0},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(tree))
    built = runner.invoke(app, ["build", str(path)])
    assert built.exit_code == 0, built.exception
    assert f"index b has its own encoder {encoders[1]}" in built.stdout
    return path


def test_synthesis_deals_and_pools_several_encoders(recipe: Path) -> None:
    done = runner.invoke(app, ["synthesize", str(recipe)])
    assert done.exit_code in (0, 3), done.output
    rows = [json.loads(line) for line in (recipe.parent / "out" / "examples.jsonl").read_text().splitlines()]
    synths = [row["synth"] for row in rows]
    dealt = {synth["factors"]["retriever"] for synth in synths}
    assert dealt == {"bm25", "a", "b", "pooled"}
    by_cell: dict[str, set[str]] = {name: set() for name in dealt}
    for synth in synths:
        by_cell[synth["factors"]["retriever"]] |= {one["retriever"] for one in synth["passages"] if one["origin"] == "search"}
    assert by_cell["b"] <= {"b"}
    assert by_cell["b"]
    assert "c" not in set().union(*by_cell.values()), "weight 0 is in no pool either"


def test_pooled_takes_from_all_that_are_not_left_out(recipe: Path) -> None:
    def pool(*overrides: str) -> set[str]:
        return set(Assembler.open(load_recipe(recipe, overrides)).retrievers)

    assert pool() == {"bm25", "a", "b"}
    none = "evaluate.robustness.unseen=[]"
    assert pool("synthesis.retrievers={b: 1}", none) == {"b"}
    assert pool("synthesis.retrievers={pooled: 1}", none) == {"bm25", "a", "b", "c"}


def test_evaluation_swaps_encoders_and_marks_the_one_never_searched(recipe: Path) -> None:
    done = runner.invoke(app, ["evaluate", str(recipe)])
    assert done.exit_code == 0, done.exception
    assert "c (unseen)" in done.stdout
    assert "b (unseen)" not in done.stdout
    told = json.loads(runner.invoke(app, ["evaluate", str(recipe), "--json"]).stdout)["robustness"]["untuned"]
    assert {"retriever/bm25", "retriever/a", "retriever/b", "retriever/c"} <= set(told["conditions"])
    assert (told["retrievers"]["own"], told["retrievers"]["unseen"]) == ("a", ["c"])
    assert {"worst", "spread"} <= set(told["retrievers"])
    (file,) = (recipe.parent / "runs").rglob("answers.jsonl")
    shown = [json.loads(line)["conditions"] for line in file.read_text().splitlines()]
    assert any(row["retriever/a"]["passages"] != row["retriever/c"]["passages"] for row in shown)


@pytest.mark.parametrize(("change", "words"), [
    ("evaluate.robustness.unseen=[b]", "unseen names 'b', which synthesis searches"),
    ("synthesis.retrievers={pooled: 1, bm25: 0, a: 0, b: 0, c: 0}", "leaves no index for pooled"),
    ("knowledge.indexes.b.encoder.modle=x", "did you mean 'model'"),
])  # fmt: skip
def test_recipes_that_cannot_be(recipe: Path, change: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(recipe, [change])


@pytest.fixture(scope="module")
def evaluated(recipe: Path) -> Path:
    """The recipe, once it has an evaluation that would be taken again."""
    assert runner.invoke(app, ["evaluate", str(recipe)]).exit_code == 0
    return recipe


@pytest.mark.parametrize("command", ["evaluate", "synthesize", "answer"])
def test_another_encoder_in_the_recipe_is_refused_until_it_is_built(
    evaluated: Path, encoders: list[Path], command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["who built the tower"] if command == "answer" else []
    other = f"knowledge.indexes.b.encoder.model={encoders[0]}"
    monkeypatch.setattr("sys.argv", ["raglan", command, str(evaluated), *asked, other])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert f"was built by encoder '{encoders[1]}'" in said
    assert f"not by '{encoders[0]}'" in said
    assert "raglan build" in said


@pytest.mark.parametrize(("own", "words"), [
    ({"query_prompt": "who "}, "the recipe names model .*, query_prompt 'who '"),
    ({"query_model": "elsewhere"}, "the recipe names model .*, query_model 'elsewhere'"),
    (None, "was built with model .*, and the recipe names no encoder of its own"),
])  # fmt: skip
def test_another_way_of_asking_in_the_recipe_is_refused(
    base: KnowledgeBase, encoders: list[Path], own: dict[str, Any] | None, words: str
) -> None:
    one = {"kind": "dense"} if own is None else {"kind": "dense", "encoder": by(encoders[1], **own)}
    changed = {**base.settings.indexes, "b": DenseIndex.model_validate(one)}
    with pytest.raises(IndexMismatch, match=rf"index 'b' of .*{words}"):
        KnowledgeBase.of(base.settings.model_copy(update={"indexes": changed}))
    added = {**base.settings.indexes, "a": base.settings.indexes["b"]}
    with pytest.raises(IndexMismatch, match=r"index 'a' of .* was built with no encoder of its own"):
        KnowledgeBase.of(base.settings.model_copy(update={"indexes": added}))


def test_an_encoder_that_was_moved_searches_as_before(tmp_path: Path, encoders: list[Path]) -> None:
    old = tmp_path / "old"
    shutil.copytree(encoders[1], old)
    indexes: dict[str, Any] = {"a": {"kind": "dense"}, "b": {"kind": "dense", "encoder": by(old)}}
    found = retriever(build_knowledge(settings(tmp_path, encoders, indexes=indexes)), "b").retrieve(ASKED, 3)
    old.rename(tmp_path / "new")
    indexes["b"] = {"kind": "dense", "encoder": by(tmp_path / "new", batch_size=2)}
    moved = KnowledgeBase.of(settings(tmp_path, encoders, indexes=indexes))
    assert [[hit.row for hit in own] for own in retriever(moved, "b").retrieve(ASKED, 3)] == [
        [hit.row for hit in own] for own in found
    ]


def test_a_query_tower_that_changes_in_place_makes_its_results_anew(recipe: Path, tmp_path: Path) -> None:
    tower = tiny.sentence_encoder(tmp_path / "tower", seed=5)
    changes = [
        f"knowledge.path={tmp_path / 'kb'}", f"runs={tmp_path / 'runs'}", f"synthesis.path={tmp_path / 'out'}",
        f"knowledge.indexes.b.encoder.query_model={tower}", "objective={kind: answer}",
        f"data={{kind: questions, path: {recipe.parent / 'dev.jsonl'}}}",
    ]  # fmt: skip
    loaded = load_recipe(recipe, changes)
    assert loaded.evaluate is not None
    build_knowledge(loaded.knowledge)
    dataset = synthesize(loaded)

    def folders() -> list[Path]:
        return [evaluation_folder(loaded, loaded.evaluate, "untuned", Parts()), *(one.folder for one, _ in stages_of(loaded))]

    before = folders()
    assert folders() == before
    assert synthesize(loaded).folder == dataset.folder, "it is left alone"
    tiny.sentence_encoder(tmp_path / "tower", seed=6)
    assert len({*before, *folders()}) == 4
    with pytest.raises(CheckpointError, match="dataset"):
        synthesize(loaded)


@pytest.mark.parametrize("searched", ["fused", "b"])
def test_a_finished_dataset_notices_another_main_query_tower(
    recipe: Path, tmp_path: Path, encoders: list[Path], searched: str
) -> None:
    """Where its evidence was found with it: a dense index without an encoder of its own, or a fusion of one."""
    changes = [
        f"knowledge.path={tmp_path / 'kb'}", f"synthesis.path={tmp_path / 'out'}", f"synthesis.retrievers={{{searched}: 1}}",
        "knowledge.indexes.fused={kind: hybrid, of: [a, bm25]}", "evaluate.robustness.unseen=[]",
    ]  # fmt: skip
    build_knowledge(load_recipe(recipe, changes).knowledge)
    before = synthesize(load_recipe(recipe, changes)).told
    tower, tuned = tiny.sentence_encoder(tmp_path / "tower", seed=5), tmp_path / "tuned"
    Encoder.open(EncoderSettings(**by(encoders[0], query_model=str(tower)))).save_query_tower(tuned)
    main = "knowledge.encoder"
    named = [f"{main}.query_model={tower}", f"{main}.query_prompt=who ", f"retriever.query_encoder={tuned}"]
    for other in named:
        if searched == "fused":
            with pytest.raises(CheckpointError, match=r"holds the dataset .* of other settings"):
                synthesize(load_recipe(recipe, [*changes, other]))
        else:
            assert synthesize(load_recipe(recipe, [*changes, other])).told["fingerprint"] == before["fingerprint"]
    assert ("query_tower" in before["inputs"]) is False, "what named no tower is named as it always was"


def test_a_dataset_notices_a_query_tower_that_changes_in_place_and_none_that_moves(recipe: Path, tmp_path: Path) -> None:
    tower = tiny.sentence_encoder(tmp_path / "tower", seed=5)
    changes = [f"synthesis.path={tmp_path / 'out'}", "synthesis.retrievers={a: 1}", "evaluate.robustness.unseen=[]"]

    def made() -> str:
        return str(synthesize(load_recipe(recipe, [*changes, f"knowledge.encoder.query_model={tower}"])).told["fingerprint"])

    first = made()
    (tmp_path / "tower").rename(tmp_path / "moved")
    tower = tmp_path / "moved" / tower.name
    assert made() == first
    tiny.sentence_encoder(tmp_path / "moved", seed=6)
    with pytest.raises(CheckpointError, match="of other settings"):
        made()


@pytest.mark.parametrize(("dealt", "unseen", "more", "words"), [
    ("fused", "b", [], "names 'b', which synthesis, as a part of 'fused', searches"),
    ("b", "b2", [], "names 'b2', which finds as 'b' does, and synthesis searches that"),
    ("a", "a2", [], "names 'a2', which finds as 'a' does, and synthesis searches that"),
    ("a: 1, b", "fused", [], "names 'fused', which finds as 'a' and 'b' do, and synthesis searches these"),
    ("c", "a", ["objective={kind: marginal, over: sequence}"], "names 'a', which stage marginal searches"),
    ("c", "a", ["retriever.index=bm25", "objective={kind: lsr}"], "names 'a', which stage lsr searches"),
    ("c", "a", ["objective={kind: answer}"], "names 'a', which stage answer searches"),
])  # fmt: skip
def test_unseen_is_what_nothing_of_the_recipe_searched(
    recipe: Path, encoders: list[Path], dealt: str, unseen: str, more: list[str], words: str
) -> None:
    overrides = [
        "knowledge.indexes.a2={kind: dense, nprobe: 4}", "knowledge.indexes.fused={kind: hybrid, of: [a, b]}",
        f"knowledge.indexes.b2={{kind: dense, encoder: {{model: {encoders[1]}, batch_size: 2}}}}",
        f"synthesis.retrievers={{{dealt}: 1}}", f"evaluate.robustness.unseen=[{unseen}]",
        *(["data={kind: questions, path: dev.jsonl}", *more] if more else []),
    ]  # fmt: skip
    with pytest.raises(RecipeError, match=f"evaluate.robustness.unseen {words}"):
        load_recipe(recipe, overrides)
    strange = "b" if dealt == "c" else "c"
    assert load_recipe(recipe, [*overrides, f"evaluate.robustness.unseen=[{strange}]"])
