"""Indexes, a table of kinds: `dense` (vectors), `bm25` (terms), `hybrid` (two or more of them fused)."""

from raglan.index.base import Index, Queries
from raglan.index.bm25 import BM25Index
from raglan.index.dense import DenseIndex
from raglan.index.hybrid import HybridIndex

KINDS: dict[str, type[Index]] = {"bm25": BM25Index, "dense": DenseIndex, "hybrid": HybridIndex}

__all__ = ["KINDS", "BM25Index", "DenseIndex", "HybridIndex", "Index", "Queries"]
