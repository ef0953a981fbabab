"""The knowledge base: corpus + vectors + indexes + the encoder's identity, versioned; the thing that is swapped.

    kb/
      current                    one line: the version that answers
      versions/<id>/             whole, immutable: corpus/ vectors/ indexes/<name>/ manifest.json
      building/<fingerprint>/    half made; a rerun with the same settings and documents goes on here

The fingerprint of what goes in (documents' text, chunking, encoder, index settings) names the version, so building twice
does nothing the second time. Vectors are written shard by shard: a kill costs at most one shard. Documents added, changed or
removed make a new version, in which only passages that no finished version holds are encoded; a version that is not whole
gives no vectors. Documents are read twice, once
to name the version and once to cut them, so that rows of tables need not be kept in memory.
"""

from __future__ import annotations

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

from raglan.artifact import fingerprint, point, pointed, publish, read_manifest, streamed_fingerprint, write_manifest
from raglan.chunk import Chunker
from raglan.corpus import Corpus, write_corpus
from raglan.documents import DocumentStream
from raglan.encoder import Encoder, Text
from raglan.errors import CheckpointError, CorpusError, IndexMismatch
from raglan.index import BM25Index, HybridIndex, Index
from raglan.index.bm25 import build_bm25
from raglan.index.dense import DenseIndex, build_dense, open_dense
from raglan.progress import counting
from raglan.ready import ReadyVectors
from raglan.recipe import BM25Index as BM25Settings
from raglan.recipe import DenseIndex as DenseSettings
from raglan.recipe import HybridIndex as HybridSettings
from raglan.recipe import KnowledgeSettings
from raglan.records import Passage
from raglan.text import terms_identity

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
        return _dense(self.folder / "vectors")

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


def _dense(vectors: Path) -> DenseIndex:
    return DenseIndex(sorted(vectors.glob("*.npy")), DenseSettings(kind="dense"), vectors)


@dataclass
class _Build:
    """One building in progress."""

    settings: KnowledgeSettings
    encoder: Encoder
    documents: DocumentStream | None  # None: the corpus is there already
    folder: Path
    source: dict[str, Any]  # what the manifest says of the documents
    digest: str = ""  # of the documents when the version was named

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
            "passages": len(passages), "encoded": encoded, "dimension": self.encoder.dimension,
            "overlong": overlong, "index_figures": figures,
            "corpus": Corpus(self.folder / "corpus").fingerprint, "seconds": round(time.monotonic() - began, 2),
            "passages_per_second": round(encoded / seconds, 1) if encoded else None,
            "peak_memory_mb": peak_memory_mb(),
        })  # fmt: skip
        return read_manifest(self.folder, KIND)

    def _corpus(self) -> Corpus:
        done = self.folder / "corpus" / "done"
        if not done.is_file():
            shutil.rmtree(self.folder / "corpus", ignore_errors=True)
            if not write_corpus(self.folder / "corpus", self._passages()):
                raise CorpusError("the documents hold no text to make passages of")
            self._check_unchanged()
            done.write_text("")
        return Corpus(self.folder / "corpus")

    def _passages(self) -> Iterator[Passage]:
        assert self.documents is not None
        chunk = self.settings.chunk
        whole = chunk is None
        tokenizer = self.encoder.passage_tower.tokenizer.backend_tokenizer
        chunker = Chunker(tokenizer, chunk.max_tokens, chunk.overlap) if chunk else Chunker(tokenizer)
        for document in self.documents:
            if whole and not document.whole:
                text = document.text
                yield Passage(document.id, text, document.title, document.id, 0, len(text), document.date)
            else:
                yield from chunker.passages(document)

    def _check_unchanged(self) -> None:
        """What was cut is what the version was named by."""
        if self.documents is not None and self.documents.digest != self.digest:
            raise CorpusError("the documents have changed while they were read", hint="build again when nobody writes to them")

    def _vectors(self, passages: Corpus) -> tuple[int, float]:
        """How many passages were encoded or taken from ready vectors, and the seconds it took."""
        folder = self.folder / "vectors"
        folder.mkdir(exist_ok=True)
        ready = None if self.settings.vectors is None else ReadyVectors(self.settings.vectors, self.encoder.dimension)
        if ready is not None:
            self._check(ready, passages)
        known = KnownVectors([] if ready is not None else self._versions())
        began = time.monotonic()
        encoded, done = 0, sum(map(_length, folder.glob("*.npy")))
        with counting(len(passages), "encoding", done=done) as seen:
            for start in range(0, len(passages), SHARD):
                path = folder / f"{start:09d}.npy"
                hashes = passages.text_hashes[start : start + SHARD]
                if _length(path) == len(hashes):
                    continue
                if (same := known.shard(path.name, start, hashes)) is not None:
                    _same_file(same, path)
                    seen(len(hashes))
                    continue
                vectors, new = known.of(hashes, self.encoder.dimension)
                part = passages[start : start + SHARD]
                if ready is not None:
                    vectors = self.encoder.normalised(ready.of(part))
                elif len(new):
                    vectors[new] = self.encoder.embed_passages(self._texts([part[place] for place in new]), seen=seen)
                seen(len(part) - (len(new) if ready is None else 0))
                _write_shard(path, vectors)
                encoded += len(new)
        return encoded, max(time.monotonic() - began, 1e-9)

    def _versions(self) -> list[Path]:
        """Finished versions whose vectors this encoder made, the newest first. Damaged ones are passed over."""
        found = []
        for name in reversed(KnowledgeBase.versions(self.settings.path)):
            folder = self.settings.path / "versions" / name
            try:
                if read_manifest(folder, KIND).get("encoder") == self.encoder.identity:
                    _check_vectors(folder)
                    found.append(folder)
            except CheckpointError as fault:
                log.warning("version %s gives no vectors: %s", name, fault)
        return found

    def _check(self, ready: ReadyVectors, passages: Sequence[Passage]) -> None:
        """A few passages, spread over the corpus, are encoded here and compared."""
        places = sorted({round(at) for at in np.linspace(0, len(passages) - 1, PROBE)})
        probe = [passages[place] for place in places]
        ready.check(ready.of(probe), self.encoder.embed_passages(self._texts(probe)))

    def _texts(self, passages: Sequence[Passage]) -> list[Text]:
        return [encoder_text(passage, self.encoder) for passage in passages]

    def _index(self, name: str, passages: Sequence[Passage]) -> dict[str, float]:
        settings = self.settings.indexes[name]
        folder = self.folder / "indexes" / name
        if isinstance(settings, HybridSettings):
            return {}
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(settings, BM25Settings):
            return build_bm25(map(passage_text, passages), settings, folder, total=len(passages))
        return build_dense(sorted((self.folder / "vectors").glob("*.npy")), settings, folder)


class KnownVectors:
    """Passage vectors of finished versions, found by what their passages say. The first version that has one gives it."""

    def __init__(self, versions: Sequence[Path]):
        self._sources = [(Corpus(folder / "corpus").text_hashes, folder / "vectors") for folder in versions]
        self._sorted: dict[int, tuple[np.ndarray, np.ndarray, DenseIndex]] = {}

    def shard(self, name: str, start: int, hashes: np.ndarray) -> Path | None:
        """A file that holds the vectors of just these passages, in this order."""
        for known, folder in self._sources:
            path = folder / name
            same = np.array_equal(known[start : start + len(hashes)], hashes) and path.is_file()
            if same and _length(path) == len(hashes):
                return path
        return None

    def of(self, hashes: np.ndarray, dimension: int) -> tuple[np.ndarray, np.ndarray]:
        """(n,2) → their vectors (n,D), and the places of those that no version holds, which are left at zero."""
        vectors = np.zeros((len(hashes), dimension), dtype=np.float32)
        new = np.arange(len(hashes))
        for number, (known, folder) in enumerate(self._sources):
            if not len(new):
                break
            if number not in self._sorted:
                order = np.argsort(known[:, 0], kind="stable")
                self._sorted[number] = known[order, 0], order, _dense(folder)
            keys, order, index = self._sorted[number]
            wanted = hashes[new]
            rows = order[np.searchsorted(keys, wanted[:, 0]).clip(max=len(order) - 1)]
            found = (known[rows] == wanted).all(1)
            vectors[new[found]] = index.vectors(rows[found])
            new = new[~found]
        return vectors, new


def _check_vectors(version: Path) -> None:
    """Raises CheckpointError where a version has not one vector a passage: rows are counted through the shards there are."""
    passages, vectors = len(Corpus(version / "corpus")), sum(map(_length, (version / "vectors").glob("*.npy")))
    if passages != vectors:
        raise CheckpointError(
            f"{version} holds {passages} passages and {vectors} vectors that can be read", hint="remove it and build it again"
        )


def _length(shard: Path) -> int:
    """How many vectors a shard holds; 0 where it is not there or cannot be read."""
    try:
        return len(np.load(shard, mmap_mode="r"))
    except (OSError, EOFError, ValueError):
        return 0


def _write_shard(path: Path, vectors: np.ndarray) -> None:
    half = path.with_name(path.name + ".part")
    with open(half, "wb") as file:
        np.save(file, vectors)
        file.flush()
        os.fsync(file.fileno())
    os.replace(half, path)


def peak_memory_mb() -> int:
    """The most memory that this process has held at once, in MiB; of the process alone where the system tells that."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _same_file(old: Path | str, new: Path | str) -> None:
    """A hard link, or a copy where the file system has none. `new` is there once all of it is on the disk."""
    try:
        os.link(old, new)
    except OSError:
        half = f"{new}.part"
        shutil.copyfile(old, half)
        with open(half, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(half, new)


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
    documents = DocumentStream(
        settings.documents, columns=settings.columns.model_dump(), encoding=settings.encoding,
        on_error=settings.on_error, whole=settings.chunk is None,
    )  # fmt: skip
    encoder = Encoder.open(settings.encoder)
    version = _version(settings, encoder, documents)
    final = settings.path / "versions" / version
    if not (final / "manifest.json").is_file():
        working = settings.path / "building" / version
        working.mkdir(parents=True, exist_ok=True)
        source = {"input_files": documents.files, "documents": documents.count, "skipped": documents.skipped}
        _Build(settings, encoder, documents, working, source, documents.digest).run()
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
    version = fingerprint([base.manifest["corpus"], encoder.identity, indexes, *_terms(base.settings)])
    final = path / "versions" / version
    if not (final / "manifest.json").is_file():
        working = path / "building" / version
        shutil.rmtree(working, ignore_errors=True)
        shutil.copytree(base.folder / "corpus", working / "corpus", copy_function=_same_file)
        settings = base.settings.model_copy(update={"path": path.absolute(), "encoder": encoder.settings, "vectors": None})
        source = {key: base.manifest[key] for key in ("input_files", "documents", "skipped")}
        _Build(settings, encoder, None, working, source).run()
        publish(working, final)
    point(path / "current", version)
    return KnowledgeBase.open(path)


def _version(settings: KnowledgeSettings, encoder: Encoder, documents: DocumentStream) -> str:
    made_of = settings.model_dump(mode="json", include={"chunk", "indexes"})
    given = settings.vectors
    ready = [] if given is None else [[given.first, *map(_stamp, [given.path, *([given.ids] if given.ids else [])])]]
    texts = ([document.id, document.title, document.text] for document in documents)
    return streamed_fingerprint([made_of, encoder.identity, *_terms(settings)], texts, lambda: [documents.skipped, *ready])


def _terms(settings: KnowledgeSettings) -> list[str]:
    """How BM25's terms are cut: another way makes another version."""
    return [terms_identity(index.han) for index in settings.indexes.values() if isinstance(index, BM25Settings)]


def _stamp(path: Path) -> list[list[Any]]:
    """Names, sizes and times: reading 60 GB to name a version would take as long as copying them."""
    files = sorted(path.glob("*.npy")) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
