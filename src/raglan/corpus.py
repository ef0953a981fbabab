"""Passages on disk: immutable, memory-mapped, with a fingerprint.

One Arrow file holds the text; two arrays find a row by passage id without loading the ids, and a third tells which passages
say the same as others, so that their vectors need not be made again. Opening costs the same for a thousand passages as for
ten million, and writing keeps 24 bytes of each.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from raglan.artifact import file_fingerprint
from raglan.errors import CorpusError
from raglan.records import Passage

__all__ = ["Corpus", "id_hash", "write_corpus"]

SCHEMA = pa.schema([
    ("id", pa.string()), ("title", pa.string()), ("text", pa.large_string()),
    ("document", pa.string()), ("start", pa.int64()), ("end", pa.int64()), ("date", pa.string()),
    ("licence", pa.string()),
])  # fmt: skip


class Corpus(Sequence[Passage]):
    """N passages, addressed by row or by id."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._table = pa.ipc.open_file(pa.memory_map(str(self.folder / "passages.arrow"))).read_all()
        self._hashes = np.load(self.folder / "id_hashes.npy", mmap_mode="r")
        self._rows = np.load(self.folder / "id_rows.npy", mmap_mode="r")

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, row: int) -> Passage: ...
    @overload
    def __getitem__(self, row: slice) -> list[Passage]: ...
    def __getitem__(self, row: int | slice) -> Passage | list[Passage]:
        if isinstance(row, slice):
            return [Passage(**fields) for fields in self._table.slice(*_span(row, len(self))).to_pylist()]
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a corpus of {len(self)} passages")
        fields: dict[str, Any] = self._table.slice(row, 1).to_pylist()[0]
        return Passage(**fields)

    def __iter__(self) -> Iterator[Passage]:
        for start in range(0, len(self), 1024):
            yield from self[start : start + 1024]

    def row(self, identity: str) -> int | None:
        """The row of a passage id, or None."""
        wanted = np.uint64(id_hash(identity))
        at = int(np.searchsorted(self._hashes, wanted))
        while at < len(self) and self._hashes[at] == wanted:
            row = int(self._rows[at])
            if self._table["id"][row].as_py() == identity:
                return row
            at += 1
        return None

    def rows_of_document(self, document: str) -> list[int]:
        """The rows of a document's passages, in order."""
        return self._documents.get(document, [])

    @cached_property
    def _documents(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for row, document in enumerate(self._table["document"].to_pylist()):
            found.setdefault(document, []).append(row)
        return found

    @cached_property
    def text_hashes(self) -> np.ndarray:
        """(N,2) uint64: equal where title and text are equal."""
        path = self.folder / "text_hashes.npy"
        if path.is_file():
            return np.asarray(np.load(path, mmap_mode="r"))
        hashes = b"".join(map(_text_hash, self))  # a corpus that was written before there were any
        return np.frombuffer(hashes, dtype=np.uint64).reshape(-1, 2)

    @cached_property
    def fingerprint(self) -> str:
        return file_fingerprint(self.folder / "passages.arrow")


def write_corpus(folder: Path, passages: Iterable[Passage]) -> int:
    """Write passages to a folder; returns how many. Raises CorpusError for an id that occurs twice."""
    folder.mkdir(parents=True, exist_ok=True)
    ids, texts = array("Q"), bytearray()
    with pa.OSFile(str(folder / "passages.arrow"), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        for batch in _batches(passages, 4096):
            ids.extend(id_hash(passage.id) for passage in batch)
            texts += b"".join(map(_text_hash, batch))
            columns = [[getattr(passage, name) for passage in batch] for name in SCHEMA.names]
            writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
    hashes = np.frombuffer(ids, dtype=np.uint64)
    order = np.argsort(hashes, kind="stable")
    np.save(folder / "id_hashes.npy", hashes[order])
    np.save(folder / "id_rows.npy", order.astype(np.int64))
    np.save(folder / "text_hashes.npy", np.frombuffer(texts, dtype=np.uint64).reshape(-1, 2))
    _check_ids(Corpus(folder), hashes[order], order)
    return len(ids)


def id_hash(identity: str) -> int:
    """64 bits of an id."""
    return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest(), "big")


def _check_ids(corpus: Corpus, hashes: np.ndarray, rows: np.ndarray) -> None:
    """No id occurs twice. Ids whose hashes are equal stand side by side."""
    seen: dict[str, str] = {}
    alike = np.flatnonzero(hashes[1:] == hashes[:-1])
    for row in sorted({*rows[alike].tolist(), *rows[alike + 1].tolist()}):
        passage = corpus[row]
        if passage.id in seen:
            raise CorpusError(
                f"passage id {passage.id!r} occurs twice: in documents {seen[passage.id]!r} and {passage.document!r}",
                hint="give each passage its own id",
            )
        seen[passage.id] = passage.document


def _text_hash(passage: Passage) -> bytes:
    return hashlib.blake2b(f"{passage.title}\0{passage.text}".encode(), digest_size=16).digest()


def _span(part: slice, length: int) -> tuple[int, int]:
    start, stop, step = part.indices(length)
    if step != 1:
        raise IndexError("a corpus is sliced in steps of 1")
    return start, max(0, stop - start)


def _batches(items: Iterable[Passage], size: int) -> Iterator[list[Passage]]:
    batch: list[Passage] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
