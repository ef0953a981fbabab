"""The knowledge base: corpus + vectors + indexes + the encoder's identity, versioned; the thing that is swapped.

    kb/
      current                    one line: the version that answers
      versions/<id>/             whole, immutable: corpus/ vectors/ indexes/<name>/ manifest.json
      building/<fingerprint>/    half made; a rerun with the same settings and documents goes on here

The fingerprint of what goes in (documents' text, chunking, encoder, index settings) names the version, so building twice
does nothing the second time. Vectors are written shard by shard: a kill costs at most one shard.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from raglan.artifact import fingerprint, point, pointed, publish, read_manifest, write_manifest
from raglan.chunk import Chunker
from raglan.corpus import Corpus, write_corpus
from raglan.documents import Reading, read_documents
from raglan.encoder import Encoder, Text
from raglan.errors import CheckpointError, CorpusError, IndexMismatch
from raglan.index import BM25Index, HybridIndex, Index
from raglan.index.bm25 import build_bm25
from raglan.index.dense import DenseIndex, build_dense, open_dense
from raglan.progress import counting, track
from raglan.ready import ReadyVectors
from raglan.recipe import BM25Index as BM25Settings
from raglan.recipe import DenseIndex as DenseSettings
from raglan.recipe import HybridIndex as HybridSettings
from raglan.recipe import KnowledgeSettings
from raglan.records import Passage

__all__ = ["KnowledgeBase", "build_knowledge", "encoder_text", "passage_text", "reencoded"]

log = logging.getLogger(__name__)
KIND = "knowledge base"
SHARD = 4096
PROBE = 16  # passages encoded to see whose vectors ready-made ones are


class KnowledgeBase:
    """One finished version, opened. Cheap to open: everything large is memory-mapped.

    Attributes:
        version: its id. manifest: what was written at the end of building.
        corpus: its passages. indexes: by name.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest
        self.version: str = folder.name
        self.settings = KnowledgeSettings.model_validate(manifest["settings"])
        self.corpus = Corpus(folder / "corpus")

    @classmethod
    def open(cls, path: Path, *, version: str | None = None) -> KnowledgeBase:
        """Open the current version, or the one named.

        Raises:
            CheckpointError: nothing has been built there, or the version is damaged.
        """
        path = Path(path)
        name = version or pointed(path / "current")
        if name is None:
            raise CheckpointError(f"{path} holds no knowledge base", hint="make it: raglan build recipe.yaml")
        return cls(path / "versions" / name, read_manifest(path / "versions" / name, KIND))

    @staticmethod
    def publish(path: Path, version: str) -> None:
        """Make a finished version the current one, atomically. Raises CheckpointError where it is not there."""
        known = KnowledgeBase.versions(path)
        if version not in known:
            told = ", ".join(known) or "none"
            raise CheckpointError(f"{path} has no version {version!r}; finished are {told}", hint="raglan swap lists them")
        point(Path(path) / "current", version)

    @staticmethod
    def versions(path: Path) -> list[str]:
        """All finished versions, oldest first."""
        found = [f for f in (Path(path) / "versions").glob("*") if (f / "manifest.json").is_file()]
        return [folder.name for folder in sorted(found, key=lambda folder: folder.stat().st_mtime)]

    @cached_property
    def indexes(self) -> dict[str, Index]:
        return {name: self._index(name) for name in self.settings.indexes}

    def index(self, name: str) -> Index:
        """The index of that name. Raises CheckpointError with the names there are."""
        if name not in self.settings.indexes:
            raise CheckpointError(
                f"{self.folder} has no index {name!r}; it has {', '.join(self.settings.indexes)}",
                hint="name one of these, or add it under knowledge.indexes and build again",
            )
        return self.indexes[name]

    @cached_property
    def vectors(self) -> DenseIndex:
        """The stored passage vectors, by whatever dense index holds them."""
        return open_dense_vectors(self)

    def check(self, encoder: Encoder) -> None:
        """Refuse an encoder whose passage tower did not make these vectors."""
        built = self.manifest["encoder"]
        same = ("passage_fingerprint", "similarity", "dimension")
        if any(built[key] != encoder.identity[key] for key in same):
            raise IndexMismatch(
                f"{self.folder.parent.parent} was built by encoder {built['model']!r} ({built['passage_fingerprint']}, "
                f"{built['similarity']}), not by {encoder.settings.model!r} ({encoder.passage_fingerprint}, "
                f"{encoder.similarity})",
                hint="build it again with this encoder: raglan build recipe.yaml, or name the other one in the recipe",
            )

    def _index(self, name: str) -> Index:
        settings = self.settings.indexes[name]
        if isinstance(settings, HybridSettings):
            return HybridIndex([self.indexes_part(part) for part in settings.of], settings)
        return self.indexes_part(name)

    def indexes_part(self, name: str) -> Index:
        settings = self.settings.indexes[name]
        folder = self.folder / "indexes" / name
        if isinstance(settings, DenseSettings):
            return open_dense(folder, self.folder / "vectors", settings)
        return BM25Index(folder)


def open_dense_vectors(base: KnowledgeBase) -> DenseIndex:
    shards = sorted((base.folder / "vectors").glob("*.npy"))
    return DenseIndex(shards, DenseSettings(kind="dense"), base.folder)


@dataclass
class _Build:
    """One building in progress."""

    settings: KnowledgeSettings
    encoder: Encoder
    reading: Reading
    folder: Path
    source: dict[str, Any]  # what the manifest says of the documents

    def run(self) -> dict[str, Any]:
        began = time.monotonic()
        passages = self._corpus()
        encoded, seconds = self._vectors(passages)
        overlong = sum(
            self.encoder.overlong(self._texts(passages[start : start + SHARD])) for start in range(0, len(passages), SHARD)
        )
        if overlong:
            log.warning(
                "%d of %d passages are longer than the encoder reads (%d tokens): their ends are in the BM25 index only",
                overlong, len(passages), self.encoder.passage_tower.max_seq_length,
            )  # fmt: skip
        figures = {name: self._index(name, passages) for name in self.settings.indexes}
        write_manifest(self.folder, KIND, {
            "settings": self.settings.model_dump(mode="json"), "encoder": self.encoder.identity, **self.source,
            "passages": len(passages), "dimension": self.encoder.dimension,
            "overlong": overlong, "index_figures": figures,
            "corpus": Corpus(self.folder / "corpus").fingerprint, "seconds": round(time.monotonic() - began, 2),
            "passages_per_second": round(encoded / seconds, 1) if encoded else None,
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        })  # fmt: skip
        return read_manifest(self.folder, KIND)

    def _corpus(self) -> Sequence[Passage]:
        done = self.folder / "corpus" / "done"
        if not done.is_file():
            shutil.rmtree(self.folder / "corpus", ignore_errors=True)
            if not write_corpus(self.folder / "corpus", self._passages()):
                raise CorpusError("the documents hold no text to make passages of")
            done.write_text("")
        return Corpus(self.folder / "corpus")

    def _passages(self) -> Iterator[Passage]:
        chunk = self.settings.chunk
        whole = chunk is None
        tokenizer = self.encoder.passage_tower.tokenizer.backend_tokenizer
        chunker = Chunker(tokenizer, chunk.max_tokens, chunk.overlap) if chunk else Chunker(tokenizer)
        for document in track(self.reading.documents, "cutting"):
            if whole and not document.whole:
                yield Passage(document.id, document.text, document.title, document.id, 0, len(document.text))
            else:
                yield from chunker.passages(document)

    def _vectors(self, passages: Sequence[Passage]) -> tuple[int, float]:
        folder = self.folder / "vectors"
        folder.mkdir(exist_ok=True)
        ready = None if self.settings.vectors is None else ReadyVectors(self.settings.vectors, self.encoder.dimension)
        if ready is None:
            self._reuse(folder)
        else:
            self._check(ready, passages)
        starts = list(range(0, len(passages), SHARD))
        missing = [start for start in starts if not (folder / f"{start:09d}.npy").is_file()]
        began = time.monotonic()
        encoded = 0
        done = len(passages) - sum(min(SHARD, len(passages) - start) for start in missing)
        with counting(len(passages), "encoding", done=done) as seen:
            for start in missing:
                part = passages[start : start + SHARD]
                half = folder / f"{start:09d}.part"
                with open(half, "wb") as file:
                    if ready is None:
                        np.save(file, self.encoder.embed_passages(self._texts(part), seen=seen))
                    else:
                        np.save(file, self.encoder.normalised(ready.of(part)))
                        seen(len(part))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(half, folder / f"{start:09d}.npy")
                encoded += len(part)
        return encoded, max(time.monotonic() - began, 1e-9)

    def _check(self, ready: ReadyVectors, passages: Sequence[Passage]) -> None:
        """A few passages, spread over the corpus, are encoded here and compared."""
        places = sorted({round(at) for at in np.linspace(0, len(passages) - 1, PROBE)})
        probe = [passages[place] for place in places]
        ready.check(ready.of(probe), self.encoder.embed_passages(self._texts(probe)))

    def _texts(self, passages: Sequence[Passage]) -> list[Text]:
        return [encoder_text(passage, self.encoder) for passage in passages]

    def _reuse(self, folder: Path) -> None:
        """Take over the vectors of a finished version with the same passages and encoder: only indexes differ."""
        corpus = Corpus(self.folder / "corpus").fingerprint
        for manifest in (self.settings.path / "versions").glob("*/manifest.json"):
            other = json.loads(manifest.read_text(encoding="utf-8"))
            if other.get("corpus") == corpus and other.get("encoder") == self.encoder.identity:
                for shard in (manifest.parent / "vectors").glob("*.npy"):
                    if not (folder / shard.name).exists():
                        _same_file(shard, folder / shard.name)
                return

    def _index(self, name: str, passages: Sequence[Passage]) -> dict[str, float]:
        settings = self.settings.indexes[name]
        folder = self.folder / "indexes" / name
        if isinstance(settings, HybridSettings):
            return {}
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(settings, BM25Settings):
            return build_bm25([passage_text(passage) for passage in passages], settings, folder)
        return build_dense(sorted((self.folder / "vectors").glob("*.npy")), settings, folder)


def _same_file(old: Path | str, new: Path | str) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(old, new)
    except OSError:
        shutil.copyfile(old, new)


def passage_text(passage: Passage) -> str:
    """What BM25 sees of a passage, and encoders other than DPR's: its title and its text."""
    return f"{passage.title}\n{passage.text}" if passage.title else passage.text


def encoder_text(passage: Passage, encoder: Encoder) -> Text:
    """What an encoder sees of a passage: one text, or DPR's pair where there is a title."""
    return (passage.title, passage.text) if encoder.pairs and passage.title else passage_text(passage)


def build_knowledge(settings: KnowledgeSettings) -> KnowledgeBase:
    """Read, cut, encode and index documents; publish the result as the current version.

    Building what is built already only moves the pointer. After an interruption it goes on where it stopped.

    Raises:
        CorpusError: documents that cannot be read (see `documents`).
    """
    reading = read_documents(
        settings.documents, columns=settings.columns.model_dump(), encoding=settings.encoding,
        on_error=settings.on_error, whole=settings.chunk is None,
    )  # fmt: skip
    encoder = Encoder.open(settings.encoder)
    version = _version(settings, encoder, reading)
    final = settings.path / "versions" / version
    if not (final / "manifest.json").is_file():
        working = settings.path / "building" / version
        working.mkdir(parents=True, exist_ok=True)
        source = {"input_files": reading.files, "documents": len(reading.documents), "skipped": reading.skipped}
        _Build(settings, encoder, reading, working, source).run()
        publish(working, final)
    point(settings.path / "current", version)
    with suppress(OSError):
        (settings.path / "building").rmdir()  # unless another build goes on there
    return KnowledgeBase.open(settings.path)


def reencoded(base: KnowledgeBase, encoder: Encoder, path: Path) -> KnowledgeBase:
    """The passages of `base` with the vectors of another passage tower, as a version of the knowledge base in `path`.

    It becomes that knowledge base's current version. What others have opened stays as it is; a version that was made
    before is not made again.
    """
    indexes = base.manifest["settings"]["indexes"]
    version = fingerprint([base.manifest["corpus"], encoder.identity, indexes])
    final = path / "versions" / version
    if not (final / "manifest.json").is_file():
        working = path / "building" / version
        shutil.rmtree(working, ignore_errors=True)
        shutil.copytree(base.folder / "corpus", working / "corpus", copy_function=_same_file)
        settings = base.settings.model_copy(update={"path": path.absolute(), "encoder": encoder.settings, "vectors": None})
        source = {key: base.manifest[key] for key in ("input_files", "documents", "skipped")}
        _Build(settings, encoder, Reading(), working, source).run()
        publish(working, final)
    point(path / "current", version)
    return KnowledgeBase.open(path)


def _version(settings: KnowledgeSettings, encoder: Encoder, reading: Reading) -> str:
    made_of = settings.model_dump(mode="json", include={"chunk", "indexes"})
    documents = [[d.id, d.title, d.text] for d in reading.documents]
    given = settings.vectors
    ready = [] if given is None else [[given.first, *map(_stamp, [given.path, *([given.ids] if given.ids else [])])]]
    return fingerprint([made_of, encoder.identity, documents, reading.skipped, *ready])


def _stamp(path: Path) -> list[list[Any]]:
    """Names, sizes and times: reading 60 GB to name a version would take as long as copying them."""
    files = sorted(path.glob("*.npy")) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
