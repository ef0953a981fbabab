"""Passage vectors on disk: one folder an encoder, written shard by shard, so that a kill costs at most one shard.

A passage that a finished version holds already, by the same encoder and with the same title and text, is not encoded again:
shards whose passages are all the same are linked, of others the vectors are copied.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from raglan.corpus import Corpus
from raglan.encoder import Encoder, Text
from raglan.errors import CheckpointError
from raglan.index.dense import DenseIndex
from raglan.progress import counting
from raglan.ready import ReadyVectors
from raglan.recipe import DenseIndex as DenseSettings
from raglan.records import Passage

__all__ = ["KnownVectors", "check_vectors", "encode", "encoder_text", "open_vectors", "overlong", "passage_text", "same_file"]

SHARD = 4096


class KnownVectors:
    """Passage vectors of finished versions, found by what their passages say. The first version that has one gives it.

    Args:
        versions: a version's folder, and in it the folder of the encoder's vectors.
    """

    def __init__(self, versions: Sequence[tuple[Path, Path]]):
        self._sources = [(Corpus(folder / "corpus").text_hashes, vectors) for folder, vectors in versions]
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
                self._sorted[number] = known[order, 0], order, open_vectors(folder)
            keys, order, index = self._sorted[number]
            wanted = hashes[new]
            rows = order[np.searchsorted(keys, wanted[:, 0]).clip(max=len(order) - 1)]
            found = (known[rows] == wanted).all(1)
            vectors[new[found]] = index.vectors(rows[found])
            new = new[~found]
        return vectors, new


def encode(
    passages: Corpus, encoder: Encoder, folder: Path, *, known: KnownVectors, ready: ReadyVectors | None = None
) -> tuple[int, float]:
    """Write the passages' vectors by this encoder, as far as they are not there.

    Args:
        known: whose vectors are taken over. ready: vectors that are taken instead of encoding.

    Returns:
        How many passages were encoded or taken from ready vectors, and the seconds it took.
    """
    folder.mkdir(exist_ok=True)
    began = time.monotonic()
    encoded, done = 0, sum(map(_length, folder.glob("*.npy")))
    with counting(len(passages), "encoding", done=done) as seen:
        for start in range(0, len(passages), SHARD):
            path = folder / f"{start:09d}.npy"
            hashes = passages.text_hashes[start : start + SHARD]
            if _length(path) == len(hashes):
                continue
            if (same := known.shard(path.name, start, hashes)) is not None:
                same_file(same, path)
                seen(len(hashes))
                continue
            vectors, new = known.of(hashes, encoder.dimension)
            part = passages[start : start + SHARD]
            if ready is not None:
                vectors = encoder.normalised(ready.of(part))
            elif len(new):
                vectors[new] = encoder.embed_passages(_texts([part[place] for place in new], encoder), seen=seen)
            seen(len(part) - (len(new) if ready is None else 0))
            _write_shard(path, vectors)
            encoded += len(new)
    return encoded, max(time.monotonic() - began, 1e-9)


def overlong(passages: Corpus, encoder: Encoder) -> int:
    """How many passages have more tokens than the encoder reads."""
    starts = range(0, len(passages), SHARD)
    return sum(encoder.overlong(_texts(passages[start : start + SHARD], encoder)) for start in starts)


def open_vectors(folder: Path) -> DenseIndex:
    """All vectors of a folder, in the order of their shards."""
    return DenseIndex(sorted(folder.glob("*.npy")), DenseSettings(kind="dense"), folder)


def check_vectors(version: Path, vectors: Path) -> None:
    """Raises CheckpointError where a version has not one vector a passage: rows are counted through the shards there are."""
    passages, there = len(Corpus(version / "corpus")), sum(map(_length, vectors.glob("*.npy")))
    if passages != there:
        raise CheckpointError(
            f"{version} holds {passages} passages and {there} vectors that can be read", hint="remove it and build it again"
        )


def passage_text(passage: Passage) -> str:
    """What BM25 sees of a passage, and encoders other than DPR's: its title and its text."""
    return f"{passage.title}\n{passage.text}" if passage.title else passage.text


def encoder_text(passage: Passage, encoder: Encoder) -> Text:
    """What an encoder sees of a passage: one text, or DPR's pair where there is a title."""
    return (passage.title, passage.text) if encoder.pairs and passage.title else passage_text(passage)


def same_file(old: Path | str, new: Path | str) -> None:
    """A hard link, or a copy where the file system has none. `new` is there once all of it is on the disk."""
    try:
        os.link(old, new)
    except OSError:
        half = f"{new}.part"
        shutil.copyfile(old, half)
        with open(half, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(half, new)


def _texts(passages: Sequence[Passage], encoder: Encoder) -> list[Text]:
    return [encoder_text(passage, encoder) for passage in passages]


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
