"""Dense search: memory-mapped float32 vectors, inner product, exact unless a FAISS factory string says otherwise.

The exact search is a bfloat16 pass over everything, in chunks, and a float32 rescoring of the best 4·k (at least 64), where
bfloat16 is faster; plain float32 elsewhere. Approximate hits are rescored exactly from the vectors as well, so scores are
true inner products in every case.

An index may have an encoder of its own; then it embeds the words of what it is asked, whatever vectors come with them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raglan.artifact import file_fingerprint, fingerprint, write_json
from raglan.encoder import Encoder, bfloat16_is_faster
from raglan.errors import RecipeError, require
from raglan.index.base import Index, Queries
from raglan.recipe import DenseIndex as DenseSettings

__all__ = ["DenseIndex", "build_dense", "exact_search"]

CHUNK = 65_536


class DenseIndex(Index):
    """N vectors of D numbers. `vectors(rows)` gathers them for training.

    Args:
        encoder: the one that made the vectors, if queries do not come with vectors of that encoder.
    """

    def __init__(self, shards: Sequence[Path], settings: DenseSettings, folder: Path, *, encoder: Encoder | None = None):
        self.settings, self.folder, self.encoder, self._shards = settings, folder, encoder, list(shards)
        self.needs_vectors = encoder is None
        self.asks = () if encoder is None else (encoder.query_fingerprint,)
        self._arrays = [np.load(path, mmap_mode="r") for path in shards]
        self._faiss: Any = None
        self._asked: tuple[tuple[str, ...], np.ndarray] | None = None

    def __len__(self) -> int:
        return sum(len(array) for array in self._arrays)

    def search(self, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        vectors = self._vectors_of(queries)
        if self.settings.factory is None:
            return exact_search(vectors, self._arrays, k)
        candidates = self._approximate(vectors, max(4 * k, 64))
        return _rescore(vectors, candidates, self.vectors, k)

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Rows of any shape → their vectors, (…,D) float32. Row −1 gives zeros."""
        return _gather(self._arrays, rows)

    @property
    def fingerprint(self) -> str:
        return fingerprint([[file_fingerprint(path) for path in self._shards], self.settings.model_dump()])

    def _vectors_of(self, queries: Queries) -> np.ndarray:
        """(B,D). Those of the own encoder are kept until others are asked for: an index and a hybrid of it ask alike."""
        if self.encoder is None:
            if queries.vectors is None:
                raise ValueError("a dense index is searched with vectors")
            return np.ascontiguousarray(queries.vectors, dtype=np.float32)
        asked = self._asked
        if asked is None or asked[0] != tuple(queries.texts):
            asked = tuple(queries.texts), self.encoder.embed_queries(queries.texts)
            self._asked = asked
        return asked[1]

    def _approximate(self, vectors: np.ndarray, k: int) -> np.ndarray:
        if self._faiss is None:
            faiss = require("faiss", "for knowledge.indexes.*.factory")
            self._faiss = faiss.read_index(str(self.folder / "index.faiss"), faiss.IO_FLAG_MMAP)
            for family, knob in (("IVF", "nprobe"), ("HNSW", "efSearch")):
                if family in (self.settings.factory or ""):
                    faiss.ParameterSpace().set_index_parameter(self._faiss, knob, self.settings.nprobe)
        return np.asarray(self._faiss.search(vectors, min(k, len(self)))[1])


def exact_search(
    queries: np.ndarray, arrays: Sequence[np.ndarray], k: int, *, coarse: bool | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The true best k inner products of (B,D) queries over (N,D) vectors given in shards, best first.

    `coarse` makes the first pass in bfloat16 and rescores its best max(4·k, 64) in float32; default: where that is faster.
    """
    total = sum(len(array) for array in arrays)
    coarse = bfloat16_is_faster() if coarse is None else coarse
    wanted = min(total, max(4 * k, 64) if coarse else k)
    wide = torch.from_numpy(queries)
    left = wide.bfloat16() if coarse else wide
    scores = torch.empty((len(queries), 0))
    rows = torch.empty((len(queries), 0), dtype=torch.int64)
    begin, longest = 0, 0.0
    for array in arrays:
        for start in range(0, len(array), CHUNK):
            part = torch.from_numpy(np.array(array[start : start + CHUNK]))
            longest = max(longest, float(part.norm(dim=1).max())) if coarse else 0.0
            products = (left @ (part.bfloat16() if coarse else part).T).float()
            best, at = products.topk(min(wanted, len(part)), dim=1)
            scores, rows = torch.cat([scores, best], 1), torch.cat([rows, at + begin + start], 1)
            scores, order = scores.topk(min(wanted, scores.shape[1]), dim=1)
            rows = rows.gather(1, order)
        begin += len(array)
    if not coarse:
        return _padded(scores.numpy(), rows.numpy(), k)

    exact, found = _rescore(queries, rows.numpy(), lambda wanted: _gather(arrays, wanted), k)
    slack = 2.0**-7 * longest * np.linalg.norm(queries, axis=1)
    doubtful = (scores[:, -1].numpy() + slack >= exact[:, min(k, total) - 1]) & (wanted < total)
    if doubtful.any():  # so close together that bfloat16 may have dropped one: these queries are searched in float32
        exact[doubtful], found[doubtful] = exact_search(queries[doubtful], arrays, k, coarse=False)
    return exact, found


def _gather(arrays: Sequence[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Rows (any shape) of the vectors given in shards, (…,D); zeros for row −1."""
    flat = np.asarray(rows).reshape(-1)
    out = np.zeros((len(flat), arrays[0].shape[1]), dtype=np.float32)
    begin = 0
    for array in arrays:
        here = (flat >= begin) & (flat < begin + len(array))
        out[here] = array[flat[here] - begin]
        begin += len(array)
    return out.reshape(*np.asarray(rows).shape, out.shape[1])


def _rescore(
    queries: np.ndarray, rows: np.ndarray, gather: Callable[[np.ndarray], np.ndarray], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Exact scores of candidate rows (B,M), sorted, cut to k; ties keep the lower row first."""
    rows = np.sort(rows, axis=1)
    scores = np.einsum("bd,bmd->bm", queries, gather(rows))
    scores = np.where(rows < 0, -np.inf, scores).astype(np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return _padded(np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1), k)


def _padded(scores: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    missing = k - rows.shape[1]
    if missing > 0:
        scores = np.pad(scores, ((0, 0), (0, missing)), constant_values=-np.inf)
        rows = np.pad(rows, ((0, 0), (0, missing)), constant_values=-1)
    return scores.astype(np.float32), rows.astype(np.int64)


def build_dense(shards: Iterable[Path], settings: DenseSettings, folder: Path) -> dict[str, float]:
    """Make what the index needs besides the vectors; returns figures for the manifest (recall of an approximate index)."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = list(shards)
    write_json(folder / "shards.json", [path.name for path in paths])
    if settings.factory is None:
        return {}
    faiss = require("faiss", "for knowledge.indexes.*.factory")
    arrays = [np.load(path, mmap_mode="r") for path in paths]
    sample = np.concatenate([np.array(array[:200_000]) for array in arrays])[:400_000]
    try:
        index = faiss.index_factory(sample.shape[1], settings.factory, faiss.METRIC_INNER_PRODUCT)
        index.train(sample)
    except RuntimeError as fault:
        raise RecipeError(
            f"FAISS cannot make {settings.factory!r} over {sum(map(len, arrays))} vectors: {str(fault).splitlines()[-1]}",
            hint="use fewer lists (IVF) for few vectors, or leave `factory` out for exact search",
        ) from None
    for array in arrays:
        for start in range(0, len(array), CHUNK):
            index.add(np.array(array[start : start + CHUNK]))
    faiss.write_index(index, str(folder / "index.faiss"))
    return {"recall@10": _recall_at_10(DenseIndex(paths, settings, folder), arrays)}


def _recall_at_10(index: DenseIndex, arrays: Sequence[np.ndarray]) -> float:
    """Share of the true ten nearest of 200 stored vectors that the approximate index finds."""
    rows = np.random.default_rng(0).choice(len(index), size=min(200, len(index)), replace=False)
    probes = index.vectors(rows)
    k = min(10, len(index))
    found = index.search(Queries([""] * len(probes), probes), k)[1]
    true = exact_search(probes, arrays, k)[1]
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(found.tolist(), true.tolist(), strict=True)]))


def open_dense(folder: Path, vectors: Path, settings: DenseSettings, *, encoder: Encoder | None = None) -> DenseIndex:
    """Open what `build_dense` made. Nothing is read before the first search."""
    names = json.loads((folder / "shards.json").read_text(encoding="utf-8"))
    return DenseIndex([vectors / name for name in names], settings, folder, encoder=encoder)
