"""The retriever: picks passages (`retrieve`, no gradient) and scores them (`score`, with gradient into the query tower)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from raglan.encoder import Encoder
from raglan.errors import CorpusError, RecipeError
from raglan.index import Index, Queries
from raglan.knowledge import KnowledgeBase
from raglan.progress import track
from raglan.records import Hit

__all__ = ["MAX_QUERY_CHARACTERS", "Retriever", "check_query"]

MAX_QUERY_CHARACTERS = 100_000


class Retriever:
    """An index of a knowledge base, and the encoder whose query tower asks it."""

    def __init__(self, base: KnowledgeBase, encoder: Encoder, *, index: str):
        base.check(encoder)
        self.base, self.encoder, self.name = base, encoder, index
        self.index: Index = base.index(index)

    def retrieve(self, queries: Sequence[str], k: int) -> list[tuple[Hit, ...]]:
        """The best k unique passages of each query, best first; fewer where fewer match.

        Raises:
            RecipeError: k larger than the corpus.
            CorpusError: an empty query, or one of more than 100,000 characters.
        """
        scores, rows = self.search(queries, k)
        return [
            tuple(
                Hit(self.base.corpus[row], row, score, rank)
                for rank, (row, score) in enumerate(zip(row_list, score_list, strict=True), 1)
                if row >= 0
            )
            for row_list, score_list in zip(rows.tolist(), scores.tolist(), strict=True)
        ]

    def search(self, queries: Sequence[str], k: int, *, batch: int = 512) -> tuple[np.ndarray, np.ndarray]:
        """Scores (B,K) float32 and rows (B,K) int64; row −1 where fewer than K passages match."""
        self.check_k(k)
        for query in queries:
            check_query(query)
        found = []
        for start in track(range(0, len(queries), batch), "retrieving"):
            part = list(queries[start : start + batch])
            vectors = self.encoder.embed_queries(part) if self.index.needs_vectors else None
            found.append(self.index.search(Queries(part, vectors), k))
        if not found:
            return np.zeros((0, k), np.float32), np.zeros((0, k), np.int64)
        return np.concatenate([scores for scores, _ in found]), np.concatenate([rows for _, rows in found])

    def score(self, features: dict[str, Tensor], passage_vectors: Tensor) -> Tensor:
        """Inner products with gradient into the query tower only. Features of B queries, (B,K,D) → doc_scores (B,K)."""
        queries = self.encoder.forward(features)
        return (queries[:, None, :] * passage_vectors.detach()).sum(-1)

    def check_k(self, k: int) -> None:
        if k > len(self.base.corpus):
            raise RecipeError(f"k is {k}, but the knowledge base holds {len(self.base.corpus)} passages", hint="ask for fewer")
        if k < 1:
            raise RecipeError(f"k is {k}; it must be at least 1")


def check_query(query: str) -> None:
    """Refuse what cannot be a question."""
    if not query.strip():
        raise CorpusError("the question is empty", hint="ask something, as in: raglan answer recipe.yaml 'Who …?'")
    if len(query) > MAX_QUERY_CHARACTERS:
        raise CorpusError(
            f"the question has {len(query):,} characters; at most {MAX_QUERY_CHARACTERS:,} are allowed",
            hint="put long texts among the documents, and ask about them",
        )
