"""Hybrid search: two or more indexes fused.

rrf      s(z) = Σ_i w_i / (c + rank_i(z))                       Cormack et al. 2009, c = 60; absent hits add nothing
weights  s(z) = Σ_i w_i (s_i(z) − min_i) / (max_i − min_i)      over the hits of index i; absent hits add nothing
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raglan.artifact import fingerprint
from raglan.index.base import Index, Queries
from raglan.recipe import HybridIndex as HybridSettings

__all__ = ["HybridIndex"]


class HybridIndex(Index):
    """Takes `depth` hits from each part and ranks their union."""

    def __init__(self, parts: Sequence[Index], settings: HybridSettings):
        self.parts, self.settings = list(parts), settings
        self.needs_vectors = any(part.needs_vectors for part in parts)
        self.asks = tuple(name for part in parts for name in part.asks)
        self.weights = settings.weights or (1.0,) * len(parts)

    def search(self, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        depth = max(self.settings.depth, k)
        found = [part.search(queries, depth) for part in self.parts]
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        for number in range(len(queries)):
            fused: dict[int, float] = {}
            for weight, (part_scores, part_rows) in zip(self.weights, found, strict=True):
                real = part_rows[number] >= 0
                gains = self._gains(part_scores[number][real])
                for row, gain in zip(part_rows[number][real].tolist(), gains.tolist(), strict=True):
                    fused[row] = fused.get(row, 0.0) + weight * gain
            best = sorted(fused.items(), key=lambda item: (-item[1], item[0]))[:k]
            for place, (row, score) in enumerate(best):
                scores[number, place], rows[number, place] = score, row
        return scores, rows

    def _gains(self, scores: np.ndarray) -> np.ndarray:
        """What each hit of one index, best first, adds to the fused score before its weight."""
        if self.settings.fusion == "rrf":
            return 1.0 / (self.settings.rrf_c + np.arange(1, len(scores) + 1))
        if not len(scores):
            return scores
        spread = scores.max() - scores.min()
        return (scores - scores.min()) / spread if spread > 0 else np.ones_like(scores)

    @property
    def fingerprint(self) -> str:
        return fingerprint([[part.fingerprint for part in self.parts], self.settings.model_dump()])
