"""The knowledge base: corpus + vectors + indexes + the encoder's identity, versioned; the thing that is swapped.

    kb/
      current                    one line: the version that answers
      versions/<id>/             whole, immutable: corpus/ vectors/ vectors-<encoder>/ indexes/<name>/ manifest.json
      building/<fingerprint>/    half made; a rerun with the same settings and documents goes on here

The fingerprint of what goes in (documents' text, chunking, encoders, index settings) names the version, so building twice
does nothing the second time. Vectors are written shard by shard: a kill costs at most one shard. Documents added, changed or
removed make a new version, in which only passages that no finished version holds are encoded; a version that is not whole
gives no vectors. Documents are read twice, once to name the version and once to cut them, so that rows of tables need not be
kept in memory.

The knowledge base's encoder is the one that learns and that weighs passages; its vectors are in `vectors/`. A dense index may
have an encoder of its own, which only searches: the index embeds what it is asked by itself.
"""

from __future__ import annotations

import logging
import resource
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from raglan.artifact import (
    MANIFEST,
    alone,
    fingerprint,
    point,
    pointed,
    publish,
    read_manifest,
    streamed_fingerprint,
    write_manifest,
)
from raglan.chunk import Chunker
from raglan.corpus import Corpus, write_corpus
from raglan.documents import DocumentStream
from raglan.encoder import Encoder
from raglan.errors import CheckpointError, CorpusError, IndexMismatch
from raglan.index import BM25Index, HybridIndex, Index
from raglan.index.bm25 import build_bm25
from raglan.index.dense import DenseIndex, build_dense, open_dense
from raglan.ready import ReadyVectors
from raglan.recipe import BM25Index as BM25Settings
from raglan.recipe import DenseIndex as DenseSettings
from raglan.recipe import EncoderSettings, IndexSettings, KnowledgeSettings
from raglan.recipe import HybridIndex as HybridSettings
from raglan.records import Passage
from raglan.text import terms_identity
from raglan.vectors import (
    KnownVectors,
    check_vectors,
    encode,
    encoder_text,
    open_vectors,
    overlong,
    passage_text,
    same_file,
)

__all__ = ["KnowledgeBase", "build_knowledge", "encoder_text", "passage_text", "reencoded"]

log = logging.getLogger(__name__)
KIND = "knowledge base"
VECTORS = "vectors"  # the folder of those by the knowledge base's encoder
MADE = ("model", "passage_prompt", "max_tokens")  # of an encoder's settings: what passage vectors depend on
ASKS = ("query_model", "query_prompt")  # and what only queries do
# Of an index' settings, by its kind: of what it is built, so that another value is another index; and how it is searched
BUILT: Mapping[str, tuple[str, ...]] = {"dense": ("factory",), "bm25": ("han", "k1", "b"), "hybrid": ()}
SEARCHED: Mapping[str, tuple[str, ...]] = {
    "dense": ("nprobe",), "bm25": (), "hybrid": ("of", "fusion", "rrf_c", "weights", "depth"),
}  # fmt: skip
PROBE = 16  # passages encoded to see whose vectors ready-made ones are


class KnowledgeBase:
    """One finished version, opened. Cheap to open: everything large is memory-mapped.

    Attributes:
        version: its id. manifest: what was written at the end of building.
        corpus: its passages. indexes: by name.
        changed: settings of indexes that are searched otherwise than when they were built.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest
        self.version: str = folder.name
        self.settings = KnowledgeSettings.model_validate(manifest["settings"])
        self.corpus = Corpus(folder / "corpus")
        self.changed: dict[str, IndexSettings] = {}
        self._indexes: dict[str, Index] = {}
        self._encoders: dict[EncoderSettings, Encoder] = {}

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

    @classmethod
    def of(cls, settings: KnowledgeSettings, *, path: Path | None = None) -> KnowledgeBase:
        """The current version of a recipe's knowledge base, or of the one in `path`, if its indexes were built as it says.

        What a recipe says of searching alone (a hybrid's fusion, `nprobe`) needs no building, and is as the recipe says.

        Raises:
            CheckpointError: nothing has been built there, or the recipe's encoder of an index cannot be loaded.
            IndexMismatch: an index was built with other settings, with another encoder of its own, or with none.
        """
        base = cls.open(settings.path if path is None else path)
        for name in (name for name in settings.indexes if name in base.settings.indexes):
            base._check_built(name, settings.indexes[name])
            base._check_own(name, settings.own_encoders.get(name))
        return base.searching(settings.indexes)

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
        found = [f for f in (Path(path) / "versions").glob("*") if (f / MANIFEST).is_file()]
        return [folder.name for folder in sorted(found, key=lambda folder: folder.stat().st_mtime)]

    @property
    def indexes(self) -> dict[str, Index]:
        return {name: self.index(name) for name in self.settings.indexes}

    def index(self, name: str) -> Index:
        """The index of that name, with its encoder if it has one of its own.

        Raises:
            CheckpointError: there is none, with the names there are; or its encoder cannot be loaded.
            IndexMismatch: its encoder is another by now than the one that made its vectors.
        """
        if name not in self.settings.indexes:
            raise CheckpointError(
                f"{self.folder} has no index {name!r}; it has {', '.join(self.settings.indexes)}",
                hint="name one of these, or add it under knowledge.indexes and build again",
            )
        if name not in self._indexes:
            self._indexes[name] = self._index(name)
        return self._indexes[name]

    def searching(self, asked: Mapping[str, IndexSettings]) -> KnowledgeBase:
        """Itself, its indexes searched from now on as these settings say; what they say of building is not looked at."""
        for name, built in self.settings.indexes.items():
            wanted = asked.get(name, built)
            if wanted.kind != built.kind or (isinstance(built, DenseSettings) and built.factory is None):
                continue  # an exact search has no settings
            now = built.model_copy(update={field: getattr(wanted, field) for field in SEARCHED[built.kind]})
            if now != built:
                self.changed[name] = now
                self._indexes.clear()
        if self.changed:
            self.settings = self.settings.model_copy(update={"indexes": {**self.settings.indexes, **self.changed}})
        return self

    @property
    def searched(self) -> str:
        """Names what is found: the version, with how it is searched where that is not as it was built."""
        return fingerprint([self.version, _dumped(self.changed)]) if self.changed else self.version

    @cached_property
    def vectors(self) -> DenseIndex:
        """The stored passage vectors of the knowledge base's encoder."""
        return open_vectors(self.folder / VECTORS)

    def check(self, encoder: Encoder) -> None:
        """Refuse an encoder whose passage tower did not make these vectors."""
        self._check(self.manifest["encoder"], encoder)

    def _check_built(self, name: str, asked: IndexSettings) -> None:
        """Refuse settings in a recipe that would have made another index of that name."""
        built = self.settings.indexes[name]
        fields = BUILT[built.kind] if asked.kind == built.kind else ("kind",)
        if other := [field for field in fields if getattr(built, field) != getattr(asked, field)]:
            raise IndexMismatch(
                f"index {name!r} of {self.folder.parent.parent} was built with {_values(built, other)}, and the recipe names "
                f"{_values(asked, other)}",
                hint="build it again with the recipe's: raglan build recipe.yaml (passages are not encoded again), or name the "
                "other one in the recipe",
            )

    def _check_own(self, name: str, asked: EncoderSettings | None) -> None:
        """Refuse an index's own encoder in a recipe that is not the one it was built with: the index searches by its own."""
        built = self.settings.own_encoders.get(name)
        if built is None and asked is None:
            return
        if built is None or asked is None or any(getattr(built, field) != getattr(asked, field) for field in ASKS):
            raise IndexMismatch(
                f"index {name!r} of {self.folder.parent.parent} was built with {_spelt(built)}, and the recipe names "
                f"{_spelt(asked)}",
                hint="build it again with the recipe's: raglan build recipe.yaml, or name the other one in the recipe",
            )
        if any(getattr(built, field) != getattr(asked, field) for field in MADE):
            encoder = Encoder.open(asked)
            self._check(self.manifest["encoders"][name], encoder, index=name)
            self._encoders[built] = encoder  # the same one at another place, and the old place may be empty

    def _check(self, built: Mapping[str, Any], encoder: Encoder, *, index: str = "") -> None:
        same = ("passage_fingerprint", "similarity", "dimension")
        if all(built[key] == encoder.identity[key] for key in same):
            return
        what = f"index {index!r} of {self.folder.parent.parent}" if index else f"{self.folder.parent.parent}"
        raise IndexMismatch(
            f"{what} was built by encoder {built['model']!r} ({built['passage_fingerprint']}, "
            f"{built['similarity']}), not by {encoder.settings.model!r} ({encoder.passage_fingerprint}, "
            f"{encoder.similarity})",
            hint="build it again with this encoder: raglan build recipe.yaml, or name the other one in the recipe",
        )

    def _index(self, name: str) -> Index:
        settings = self.settings.indexes[name]
        folder = self.folder / "indexes" / name
        if isinstance(settings, HybridSettings):
            return HybridIndex([self.index(part) for part in settings.of], settings)
        if isinstance(settings, BM25Settings):
            return BM25Index(folder)
        if settings.encoder is None:
            return open_dense(folder, self.folder / VECTORS, settings)
        built = self.manifest["encoders"][name]
        return open_dense(folder, self.folder / built["vectors"], settings, encoder=self._encoder(name, settings.encoder))

    def _encoder(self, name: str, settings: EncoderSettings) -> Encoder:
        """An index's own encoder; two indexes of equal settings have one."""
        if settings not in self._encoders:
            encoder = Encoder.open(settings)
            self._check(self.manifest["encoders"][name], encoder, index=name)
            self._encoders[settings] = encoder
        return self._encoders[settings]


@dataclass
class _Build:
    """One building in progress."""

    settings: KnowledgeSettings
    encoder: Encoder
    others: Mapping[str, Encoder]  # of the indexes that have one of their own
    documents: DocumentStream | None  # None: the corpus is there already
    folder: Path
    source: dict[str, Any]  # what the manifest says of the documents
    digest: str = ""  # of the documents when the version was named
    kept: KnowledgeBase | None = None  # a version of these passages; of it what has an encoder of its own stays as it is

    def run(self) -> dict[str, Any]:
        began = time.monotonic()
        passages = self._corpus()
        ready = None if self.settings.vectors is None else ReadyVectors(self.settings.vectors, self.encoder.dimension)
        if ready is not None:
            self._check(ready, passages)
        encoded, seconds = self._encode(passages, self.encoder, ready)
        long = self._overlong(passages, self.encoder)
        others = {name: self._other(passages, encoder) for name, encoder in self.others.items()}
        if self.kept is not None:
            others = {name: self._keep(self.kept, name) for name in self.settings.own_encoders}
        figures = {name: self._index(name, passages) for name in self.settings.indexes}
        write_manifest(self.folder, KIND, {
            "settings": self.settings.model_dump(mode="json"), "encoder": self.encoder.identity,
            **({"encoders": others} if others else {}), **self.source,
            "passages": len(passages), "encoded": encoded, "dimension": self.encoder.dimension,
            "overlong": long, "index_figures": figures,
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
                text, told = document.text, (document.date, document.licence)
                yield Passage(document.id, text, document.title, document.id, 0, len(text), *told)
            else:
                yield from chunker.passages(document)

    def _check_unchanged(self) -> None:
        """What was cut is what the version was named by."""
        if self.documents is not None and self.documents.digest != self.digest:
            raise CorpusError("the documents have changed while they were read", hint="build again when nobody writes to them")

    def _encode(self, passages: Corpus, encoder: Encoder, ready: ReadyVectors | None = None) -> tuple[int, float]:
        """How many passages were encoded or taken from ready vectors, and the seconds it took."""
        known = KnownVectors([] if ready is not None else self._versions(encoder.identity))
        return encode(passages, encoder, self._vectors(encoder), known=known, ready=ready)

    def _other(self, passages: Corpus, encoder: Encoder) -> dict[str, Any]:
        """Vectors by an index's own encoder, and what the manifest says of them."""
        encoded, _ = self._encode(passages, encoder)
        long = self._overlong(passages, encoder)
        return {**encoder.identity, "vectors": self._vectors(encoder).name, "encoded": encoded, "overlong": long}

    def _keep(self, base: KnowledgeBase, name: str) -> dict[str, Any]:
        """Vectors and index of an own encoder, linked, and what the manifest says of them."""
        built = base.manifest["encoders"][name]
        vectors = self.folder / _vectors_name(_identity(built), self.encoder.identity)
        if not vectors.is_dir():
            check_vectors(base.folder, base.folder / built["vectors"])
            shutil.copytree(base.folder / built["vectors"], vectors, copy_function=same_file)
        shutil.copytree(base.folder / "indexes" / name, self.folder / "indexes" / name, copy_function=same_file)
        return {**built, "vectors": vectors.name, "encoded": 0}

    def _vectors(self, encoder: Encoder) -> Path:
        """Encoders of one identity share their vectors."""
        return self.folder / _vectors_name(encoder.identity, self.encoder.identity)

    def _overlong(self, passages: Corpus, encoder: Encoder) -> int:
        if long := overlong(passages, encoder):
            log.warning(
                "%d of %d passages are longer than encoder %s reads (%d tokens): their ends are in the BM25 index only",
                long, len(passages), encoder.settings.model, encoder.passage_tower.max_seq_length,
            )  # fmt: skip
        return long

    def _versions(self, identity: Mapping[str, Any]) -> list[tuple[Path, Path]]:
        """Finished versions that hold vectors of this encoder, and these, the newest first. Damaged ones are passed over."""
        own = [self.settings.path / "versions" / name for name in reversed(KnowledgeBase.versions(self.settings.path))]
        found = []
        for folder in own:
            try:
                vectors = folder / _vectors_name(identity, read_manifest(folder, KIND).get("encoder"))
                if vectors.is_dir() or vectors.name == VECTORS:
                    check_vectors(folder, vectors)
                    found.append((folder, vectors))
            except CheckpointError as fault:
                log.warning("version %s gives no vectors: %s", folder.name, fault)
        return found

    def _check(self, ready: ReadyVectors, passages: Sequence[Passage]) -> None:
        """A few passages, spread over the corpus, are encoded here and compared."""
        places = sorted({round(at) for at in np.linspace(0, len(passages) - 1, PROBE)})
        probe = [passages[place] for place in places]
        ready.check(ready.of(probe), self.encoder.embed_passages([encoder_text(passage, self.encoder) for passage in probe]))

    def _index(self, name: str, passages: Sequence[Passage]) -> dict[str, float]:
        settings = self.settings.indexes[name]
        folder = self.folder / "indexes" / name
        if isinstance(settings, HybridSettings):
            return {}
        if self.kept is not None and name in self.settings.own_encoders:
            return dict(self.kept.manifest["index_figures"][name])
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(settings, BM25Settings):
            return build_bm25(map(passage_text, passages), settings, folder, total=len(passages))
        vectors = self._vectors(self.others.get(name, self.encoder))
        return build_dense(sorted(vectors.glob("*.npy")), settings, folder)


def _vectors_name(identity: Mapping[str, Any], of_base: Mapping[str, Any] | None) -> str:
    """The folder of an encoder's vectors in a version whose knowledge base has the encoder `of_base`."""
    return VECTORS if identity == of_base else f"{VECTORS}-{fingerprint(identity)}"


def peak_memory_mb() -> int:
    """The most memory that this process has held at once, in MiB; of the process alone where the system tells that."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


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
    others = _own_encoders(settings)
    version = _version(settings, encoder, documents, others)
    final = settings.path / "versions" / version
    working = settings.path / "building" / version
    with alone(settings.path / f".{version}.lock", (final / MANIFEST).is_file) as to_do:
        if to_do:
            working.mkdir(parents=True, exist_ok=True)
            source = {"input_files": documents.files, "documents": documents.count, "skipped": documents.skipped}
            _Build(settings, encoder, others, documents, working, source, documents.digest).run()
            publish(working, final)
    point(settings.path / "current", version)
    with suppress(OSError):
        (settings.path / "building").rmdir()  # unless another build goes on there
    return KnowledgeBase.open(settings.path)


def reencoded(base: KnowledgeBase, encoder: Encoder, path: Path) -> KnowledgeBase:
    """The passages of `base` with the vectors of another passage tower, as a version of the knowledge base in `path`.

    Indexes with encoders of their own stay as they are, and those encoders are not opened.

    It becomes that knowledge base's current version. What others have opened stays as it is; a version that was made
    before is not made again.
    """
    indexes = base.manifest["settings"]["indexes"] | _dumped(base.changed)
    others = {name: _identity(base.manifest["encoders"][name]) for name in base.settings.own_encoders}
    version = fingerprint([base.manifest["corpus"], encoder.identity, indexes, *_terms(base.settings), *_own(others)])
    final = path / "versions" / version
    working = path / "building" / version
    with alone(path / f".{version}.lock", (final / MANIFEST).is_file) as to_do:
        if to_do:
            shutil.rmtree(working, ignore_errors=True)
            shutil.copytree(base.folder / "corpus", working / "corpus", copy_function=same_file)
            settings = base.settings.model_copy(update={"path": path.absolute(), "encoder": encoder.settings, "vectors": None})
            source = {key: base.manifest[key] for key in ("input_files", "documents", "skipped")}
            _Build(settings, encoder, {}, None, working, source, kept=base).run()
            publish(working, final)
    point(path / "current", version)
    return KnowledgeBase.open(path)


def _version(
    settings: KnowledgeSettings, encoder: Encoder, documents: DocumentStream, others: Mapping[str, Encoder]
) -> str:  # fmt: skip
    made_of = settings.model_dump(mode="json", include={"chunk", "indexes"})
    for name, other in others.items():
        made_of["indexes"][name]["encoder"] = other.settings.model_dump(include={"query_model", "query_prompt"})
    given = settings.vectors
    ready = [] if given is None else [[given.first, *map(_stamp, [given.path, *([given.ids] if given.ids else [])])]]
    texts = ([document.id, document.title, document.text] for document in documents)
    before = [made_of, encoder.identity, *_terms(settings), *_own({name: other.identity for name, other in others.items()})]
    return streamed_fingerprint(before, texts, lambda: [documents.skipped, *ready])


def _dumped(indexes: Mapping[str, IndexSettings]) -> dict[str, Any]:
    return {name: index.model_dump(mode="json") for name, index in indexes.items()}


def _values(index: IndexSettings, fields: Sequence[str]) -> str:
    told = {field: getattr(index, field) for field in fields}
    return ", ".join(f"no {field}" if value is None else f"{field} {value!r}" for field, value in told.items())


def _spelt(encoder: EncoderSettings | None) -> str:
    if encoder is None:
        return "no encoder of its own"
    told = {field: getattr(encoder, field) for field in ("model", *ASKS)}
    return ", ".join(f"{field} {value!r}" for field, value in told.items() if value is not None)


def _own_encoders(settings: KnowledgeSettings) -> dict[str, Encoder]:
    """Of the indexes that have one of their own: index → encoder, each opened once."""
    wanted = settings.own_encoders
    opened = {asked: Encoder.open(asked) for asked in dict.fromkeys(wanted.values())}
    return {name: opened[asked] for name, asked in wanted.items()}


def _own(others: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What names a version further, by identities: nothing where no index has an encoder of its own."""
    return [dict(others)] if others else []


def _identity(built: Mapping[str, Any]) -> dict[str, Any]:
    """Of what the manifest says of an own encoder, the encoder's identity."""
    return {key: value for key, value in built.items() if key not in ("vectors", "encoded", "overlong")}


def _terms(settings: KnowledgeSettings) -> list[str]:
    """How BM25's terms are cut: another way makes another version."""
    return [terms_identity(index.han) for index in settings.indexes.values() if isinstance(index, BM25Settings)]


def _stamp(path: Path) -> list[list[Any]]:
    """Names, sizes and times: reading 60 GB to name a version would take as long as copying them."""
    files = sorted(path.glob("*.npy")) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
