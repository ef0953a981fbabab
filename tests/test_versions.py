"""Documents added, changed and removed: only what is new is encoded, and rows, ids and vectors agree in every version."""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from transformers import BertModel

import tiny
from raglan import knowledge, vectors
from raglan.artifact import fingerprint, streamed_fingerprint
from raglan.corpus import Corpus, write_corpus
from raglan.documents import DocumentStream, read_documents
from raglan.encoder import Encoder
from raglan.errors import CorpusError
from raglan.knowledge import KnowledgeBase, build_knowledge, encoder_text, reencoded
from raglan.recipe import KnowledgeSettings
from raglan.records import Passage
from raglan.retriever import Retriever

WORDS = ("tower miller founded lighthouse year water old by the of who built stone river " * 3).split()


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sentence_encoder(tmp_path_factory.mktemp("encoder"))


def row(number: int, told: str = "") -> dict[str, str]:
    text = " ".join(WORDS[(number * 5 + i * (1 + number % 7)) % len(WORDS)] for i in range(9))
    return {"id": str(number), "title": f"T{number}", "text": f"{text} {number} {told}".strip()}


def written(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def built(folder: Path, encoder: Path, rows: list[dict[str, str]], **changes: Any) -> KnowledgeBase:
    values = {
        "path": folder / "kb", "documents": [written(folder / "rows.jsonl", rows)], "chunk": None,
        "encoder": {"model": str(encoder), "dtype": "float32"},
    }  # fmt: skip
    return build_knowledge(KnowledgeSettings.model_validate({**values, **changes}))


@contextmanager
def encoded_rows() -> Iterator[list[int]]:
    """How many texts go through any BERT, pass by pass."""
    seen: list[int] = []
    own = BertModel.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(kwargs["input_ids"]))
        return own(self, *args, **kwargs)

    BertModel.forward = forward  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        BertModel.forward = own  # type: ignore[method-assign]


def check(base: KnowledgeBase, rows: list[dict[str, str]]) -> None:
    """Row, id, text and vector belong together, and a search for a passage's own words finds its id."""
    assert [p.id for p in base.corpus] == [one["id"] for one in rows]
    assert [base.corpus.row(one["id"]) for one in rows] == list(range(len(rows)))
    encoder = Encoder.open(base.settings.encoder)
    fresh = encoder.embed_passages([encoder_text(passage, encoder) for passage in base.corpus])
    assert base.vectors.vectors(np.arange(len(rows))) == pytest.approx(fresh, abs=1e-5)
    for index in ("dense", "bm25"):
        hits = Retriever(base, encoder, index=index).retrieve([passage_words(p) for p in base.corpus], 1)
        assert [found[0].passage.id for found in hits] == [one["id"] for one in rows]
        assert [found[0].row for found in hits] == list(range(len(rows)))


def passage_words(passage: Passage) -> str:
    return f"{passage.title}\n{passage.text}"


@pytest.mark.parametrize("shard", [7, 4096])
def test_only_new_passages_are_encoded(shard: int, tmp_path: Path, encoder_folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(vectors, "SHARD", shard)
    first = [row(n) for n in range(30)]
    changed = [*first[:10], row(10, "anew"), *first[11:]]
    steps = [
        (first, 30),
        ([*first, row(30)], 1),  # added behind
        ([row(31), *first], 1),  # added in front: every row moves
        (changed, 1),
        (first[:4] + first[5:], 0),  # removed
        (list(reversed(first)), 0),
        ([{**one, "id": f"x{one['id']}"} for one in first], 0),  # other ids, the same words
        ([row(n, "wholly") for n in range(30)], 30),
    ]
    versions = []
    for rows, new in steps:
        with encoded_rows() as seen:
            base = built(tmp_path, encoder_folder, rows)
        assert (base.manifest["encoded"], sum(seen)) == (new, new)
        assert base.manifest["documents"] == base.manifest["passages"] == len(rows)
        check(base, rows)
        versions.append((base.version, rows))
    assert len({version for version, _ in versions}) == len(steps)
    for version, rows in (versions[0], versions[4]):  # what was built before stays as it was
        check(KnowledgeBase.open(tmp_path / "kb", version=version), rows)


def test_a_changed_page_costs_its_changed_passages(tmp_path: Path, encoder_folder: Path) -> None:
    """Cut documents: ids behind the change move by one, and vectors move with their words."""
    (tmp_path / "docs").mkdir()
    parts = [f"## Part {n}\n\n{row(n)['text']}." for n in range(6)]
    changes = {"documents": [tmp_path / "docs"], "chunk": {"max_tokens": 64}}
    (tmp_path / "docs" / "page.md").write_text("\n\n".join(parts))
    (tmp_path / "docs" / "other.md").write_text(f"# Other\n\n{row(9)['text']}.")
    before = built(tmp_path, encoder_folder, [], **changes)
    (tmp_path / "docs" / "page.md").write_text("\n\n".join([parts[0], "## New\n\nThe old mill by the water.", *parts[1:]]))
    after = built(tmp_path, encoder_folder, [], **changes)
    assert (len(before.corpus), len(after.corpus), after.manifest["encoded"]) == (7, 8, 1)
    check(after, [{"id": p.id} for p in after.corpus])
    (tmp_path / "docs" / "other.md").unlink()
    shorter = built(tmp_path, encoder_folder, [], **changes)
    assert (shorter.manifest["encoded"], shorter.corpus.row("other.md#0")) == (0, None)
    check(shorter, [{"id": p.id} for p in shorter.corpus])


def test_versions_of_another_encoder_give_nothing(tmp_path: Path, encoder_folder: Path) -> None:
    rows = [row(n) for n in range(8)]
    built(tmp_path, encoder_folder, rows)
    other = tiny.sentence_encoder(tmp_path / "other", seed=3)
    base = built(tmp_path, other, rows)
    assert base.manifest["encoded"] == 8
    check(base, rows)


def test_a_version_from_before_there_were_text_hashes_gives_its_vectors(tmp_path: Path, encoder_folder: Path) -> None:
    rows = [row(n) for n in range(8)]
    first = built(tmp_path, encoder_folder, rows)
    hashes = np.array(first.corpus.text_hashes)
    (first.folder / "corpus" / "text_hashes.npy").unlink()
    unlisted(first.folder, "corpus/text_hashes.npy")
    assert (Corpus(first.folder / "corpus").text_hashes == hashes).all()
    assert built(tmp_path, encoder_folder, [row(8), *rows]).manifest["encoded"] == 1


def unlisted(version: Path, name: str) -> None:
    """A manifest that never told of a file."""
    manifest = json.loads((version / "manifest.json").read_text())
    del manifest["files"][name]
    (version / "manifest.json").write_text(json.dumps(manifest))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def lost_and_unlisted(version: Path) -> None:
    (version / SECOND).unlink()
    unlisted(version, SECOND)


def torn_and_unlisted(version: Path) -> None:
    cut(version / SECOND)
    unlisted(version, SECOND)


SECOND = "vectors/000000007.npy"
DAMAGES: dict[str, Callable[[Path], None]] = {
    "lost": lambda version: (version / SECOND).unlink(),
    "torn": lambda version: cut(version / SECOND),
    "lost, not in the manifest": lost_and_unlisted,
    "torn, not in the manifest": torn_and_unlisted,
    "half a manifest": lambda version: cut(version / "manifest.json"),
    "no manifest of ours": lambda version: (version / "manifest.json").write_text("[]"),
    "no text at all": lambda version: (version / "manifest.json").write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_version_gives_no_vectors_and_stops_no_build(
    damage: Callable[[Path], None], tmp_path: Path, encoder_folder: Path, monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setattr(vectors, "SHARD", 7)
    rows = [row(n) for n in range(30)]
    first = built(tmp_path, encoder_folder, rows)
    damage(first.folder)
    with caplog.at_level(logging.WARNING):
        base = built(tmp_path, encoder_folder, [*rows, row(30)])
    assert base.manifest["encoded"] == 31
    check(base, [*rows, row(30)])
    assert f"version {first.version} gives no vectors: " in caplog.text
    assert built(tmp_path, encoder_folder, [row(31), *rows]).manifest["encoded"] == 1  # the whole one is used


def no_links(*_: Any, **__: Any) -> None:
    raise OSError("this file system has no hard links")


def test_a_copy_that_is_broken_off_is_no_shard(tmp_path: Path, encoder_folder: Path, monkeypatch: Any) -> None:
    """Where shards cannot be linked; as if killed in the middle of the second copy."""
    monkeypatch.setattr(vectors, "SHARD", 7)
    monkeypatch.setattr(os, "link", no_links)
    rows = [row(n) for n in range(30)]
    built(tmp_path, encoder_folder, rows)
    copies, own = [], shutil.copyfile

    def broken_off(old: Path, new: Path) -> None:
        copies.append(own(old, new))
        if len(copies) == 2:
            cut(Path(new))
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", broken_off)
        with pytest.raises(KeyboardInterrupt):
            built(tmp_path, encoder_folder, [*rows, row(30)])
    half = next((tmp_path / "kb" / "building").iterdir())
    assert [path.name for path in (half / "vectors").glob("*.npy")] == ["000000000.npy"]
    base = built(tmp_path, encoder_folder, [*rows, row(30)])
    assert base.manifest["encoded"] == 1
    assert not list(base.folder.rglob("*.part"))
    check(base, [*rows, row(30)])


@pytest.mark.parametrize("left", [0.5, 0.0])
def test_a_torn_shard_is_encoded_anew(left: float, tmp_path: Path, encoder_folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(vectors, "SHARD", 7)
    rows = [row(n) for n in range(30)]
    base = built(tmp_path, encoder_folder, rows)
    building = tmp_path / "kb" / "building" / base.version
    shutil.copytree(base.folder, building)
    shutil.rmtree(base.folder)
    (building / "manifest.json").unlink()
    torn = building / SECOND
    os.truncate(torn, int(left * torn.stat().st_size))
    base = built(tmp_path, encoder_folder, rows)
    assert base.manifest["encoded"] == 7
    check(base, rows)


def test_imported_vectors_with_ids_from_one_and_a_document_added(tmp_path: Path, encoder_folder: Path) -> None:
    rows = [row(n) for n in range(1, 21)]
    made = built(tmp_path, encoder_folder, rows)
    np.save(tmp_path / "given.npy", made.vectors.vectors(np.arange(20)))
    shutil.rmtree(tmp_path / "kb")
    with encoded_rows() as seen:
        taken = built(tmp_path, encoder_folder, rows, vectors={"path": tmp_path / "given.npy"})
    assert sum(seen) == knowledge.PROBE
    assert taken.corpus.row("1") == 0
    check(taken, rows)
    more = [row(21), *rows[:5], *rows[6:]]
    with pytest.raises(CorpusError, match="passage '21' has no vector"):
        built(tmp_path, encoder_folder, more, vectors={"path": tmp_path / "given.npy"})
    base = built(tmp_path, encoder_folder, more)  # without them: what was imported stays, and one is encoded
    assert base.manifest["encoded"] == 1
    check(base, more)


def test_a_refresh_keeps_rows_and_ids(tmp_path: Path, encoder_folder: Path) -> None:
    rows = [row(n) for n in range(12)]
    base = built(tmp_path, encoder_folder, rows)
    encoder = Encoder.open(base.settings.encoder)
    with torch.no_grad():
        next(encoder.passage_tower.parameters()).mul_(1.5)
    encoder._passage_fingerprint = None
    fresh = reencoded(base, encoder.snapshot(), tmp_path / "fresh")
    assert fresh.manifest["encoded"] == 12
    assert [p.id for p in fresh.corpus] == [p.id for p in base.corpus]
    assert (fresh.corpus.text_hashes == base.corpus.text_hashes).all()
    vectors = encoder.embed_passages([encoder_text(passage, encoder) for passage in fresh.corpus])
    assert fresh.vectors.vectors(np.arange(12)) == pytest.approx(vectors, abs=1e-5)
    assert not np.allclose(vectors, base.vectors.vectors(np.arange(12)), atol=1e-3)


# documents as a stream


def test_a_streamed_fingerprint_is_the_fingerprint() -> None:
    items = [["a", "T", "é\n"], ["b", "", "中"]]
    for found in ([], items[:1], items):
        wanted = fingerprint([{"b": 1, "a": None}, "x", found, [["f", "why"]], [1]])
        assert streamed_fingerprint([{"b": 1, "a": None}, "x"], iter(found), lambda: [[["f", "why"]], [1]]) == wanted


def test_rows_are_read_as_they_are_asked_for_and_as_often(tmp_path: Path) -> None:
    rows = [row(n) for n in range(9000)]
    written(tmp_path / "a.jsonl", rows[:3000])
    with open(tmp_path / "b.csv", "w", newline="") as file:
        csv.DictWriter(file, ["id", "title", "text"]).writeheader()
        csv.DictWriter(file, ["id", "title", "text"]).writerows(rows[3000:4000])
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows[4000:]), tmp_path / "c.parquet")
    stream = DocumentStream([tmp_path])
    taken = iter(stream)
    assert [next(taken).id for _ in range(2)] == ["0", "1"]
    assert stream.count == 2
    passes = [[(d.id, d.title, d.text) for d in stream] for _ in range(2)]
    assert passes[0] == passes[1] == [(one["id"], one["title"], one["text"]) for one in rows]
    assert (stream.count, stream.files, stream.skipped) == (9000, 3, [])
    digest = stream.digest
    written(tmp_path / "a.jsonl", [row(0, "anew"), *rows[1:3000]])
    assert sum(1 for _ in stream) == 9000
    assert stream.digest != digest


def test_a_table_with_a_bad_row_is_skipped_whole(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", [row(0), row(1)])
    with open(tmp_path / "b.jsonl", "w") as file:
        file.write(json.dumps(row(2)) + "\n{torn\n")
    (tmp_path / "c.csv").write_bytes(b"id,text\n3,ok\n4,caf\xe9\n")
    reading = read_documents([tmp_path], on_error="skip")
    assert [document.id for document in reading.documents] == ["0", "1"]
    assert [Path(name).name for name, _ in reading.skipped] == ["b.jsonl", "c.csv"]
    with pytest.raises(CorpusError, match=r"c\.csv is not utf-8: byte 0xe9 after row"):
        read_documents([tmp_path / "c.csv"])


def test_ids_that_occur_twice_are_named_wherever_they_are(tmp_path: Path, encoder_folder: Path) -> None:
    written(tmp_path / "a.jsonl", [row(n) for n in range(50)])
    written(tmp_path / "b.jsonl", [row(n) for n in (60, 7)])
    with pytest.raises(CorpusError, match=r"document id '7' occurs twice: in .*a\.jsonl and .*b\.jsonl"):
        built(tmp_path, encoder_folder, [], documents=[tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    twice = [Passage("p", "x", document="d1"), Passage("q", "y", document="d1"), Passage("p", "z", document="d2")]
    with pytest.raises(CorpusError, match="passage id 'p' occurs twice: in documents 'd1' and 'd2'"):
        write_corpus(tmp_path / "corpus", twice)


def test_documents_that_change_meanwhile_are_not_built(tmp_path: Path, encoder_folder: Path, monkeypatch: Any) -> None:
    own = knowledge._version

    def meanwhile(*given: Any) -> str:
        version = own(*given)
        written(tmp_path / "rows.jsonl", [row(n, "anew") for n in range(5)])
        return version

    monkeypatch.setattr(knowledge, "_version", meanwhile)
    with pytest.raises(CorpusError, match="have changed while they were read"):
        built(tmp_path, encoder_folder, [row(n) for n in range(5)])
    assert KnowledgeBase.versions(tmp_path / "kb") == []
