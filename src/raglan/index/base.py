"""What every index can do: find the best rows for queries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Index", "Queries"]


@dataclass(frozen=True)
class Queries:
    """B queries as an index wants them: their words, and their vectors (B,D) if a dense index is asked."""

    texts: Sequence[str]
    vectors: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.texts)


class Index(ABC):
    """Vectors or terms → (scores, rows).

    Attributes:
        needs_vectors: whether queries must come with vectors by the knowledge base's encoder.
        asks: names the query towers that the index embeds queries with itself.
    """

    needs_vectors: bool = False
    asks: tuple[str, ...] = ()

    @abstractmethod
    def search(self, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The best k rows of each query, best first.

        Returns:
            scores (B,K) float32 and rows (B,K) int64. Where fewer than k rows match, row is −1 and score −inf.
        """

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Names the content of the index."""
