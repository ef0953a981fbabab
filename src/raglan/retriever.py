"""The retriever: picks passages (`retrieve`, no gradient) and scores them (`score`, with gradient into the query tower)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from raglan.artifact import fingerprint
from raglan.encoder import Encoder
from raglan.errors import RecipeError
from raglan.index import BM25Index, Index, Queries
from raglan.knowledge import KnowledgeBase
from raglan.likelihood import passage_logprobs
from raglan.progress import track
from raglan.recipe import BM25Index as BM25Settings
from raglan.recipe import PriorSettings
from raglan.records import Hit
from raglan.text import MAX_QUERY_CHARACTERS, check_query

__all__ = ["BATCH", "Prior", "Retriever", "Rewrite"]

BATCH = 512  # queries embedded and searched together
Rewrite = Callable[[Sequence[str], Sequence[Sequence[str]]], list[str]]  # (questions, their histories) → questions


class Prior(nn.Module):
    """What the softmax of p(z|x) is taken of: q·d/τ, BM25/τ, or q·d/τ + λ·BM25.

    log τ and log λ are constants unless the `marginal` objective learns them, so τ and λ stay positive.
    """

    def __init__(self, settings: PriorSettings, *, usual_temperature: float):
        super().__init__()
        self.kind = settings.kind
        self.log_temperature = _constant(settings.temperature or usual_temperature)
        self.log_sparse_weight = _constant(settings.sparse_weight) if self.kind == "hybrid" else None

    def logits(self, dense: Tensor, sparse: Tensor | None) -> Tensor:
        """q·d (B,K) and BM25 scores (B,K), which a dense prior has none of, → (B,K)."""
        tau = self.log_temperature.to(dense.device).exp()
        if sparse is None:
            return dense / tau
        if self.log_sparse_weight is None:
            return sparse / tau
        return dense / tau + self.log_sparse_weight.to(dense.device).exp() * sparse

    def values(self) -> dict[str, float]:
        """τ, and λ of a hybrid prior, by the names a recipe gives them."""
        logs = {"temperature": self.log_temperature, "sparse_weight": self.log_sparse_weight}
        return {name: float(value.detach().exp()) for name, value in logs.items() if value is not None}


def _constant(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value, dtype=torch.float32).log(), requires_grad=False)


class Retriever:
    """An index of a knowledge base, and the encoder whose query tower asks it.

    `history` says what of a dialogue is searched for; `rewrite` is who writes the question where it is to be rewritten.
    """

    def __init__(
        self, base: KnowledgeBase, encoder: Encoder, *, index: str, prior: PriorSettings | None = None,
        history: Literal["last_turn", "history", "rewrite"] = "history", rewrite: Rewrite | None = None,
    ):  # fmt: skip
        base.check(encoder)
        self.base, self.encoder, self.name = base, encoder, index
        self.index: Index = base.index(index)
        self.prior_settings = prior or PriorSettings()
        self.weights = Prior(self.prior_settings, usual_temperature=self._usual_temperature())
        self.history, self.rewrite = history, rewrite
        self._asked: tuple[tuple[str, ...], np.ndarray] | None = None

    def over(self, base: KnowledgeBase) -> Retriever:
        """The same encoder, index name, prior and ways with history over another knowledge base. Raises IndexMismatch."""
        other = Retriever(
            base, self.encoder, index=self.name, prior=self.prior_settings, history=self.history, rewrite=self.rewrite
        )
        other.weights = self.weights
        return other

    def by(self, index: str) -> Retriever:
        """The same retriever, asking another index of its knowledge base. Raises CheckpointError where there is none."""
        other = copy.copy(self)
        other.name, other.index = index, self.base.index(index)
        return other

    def adopt(self, base: KnowledgeBase) -> None:
        """Search another version from now on, unchecked: while the passage tower learns, it is ahead of any index."""
        self.base, self.index = base, base.index(self.name)

    def search_texts(
        self, queries: Sequence[str], history: Sequence[Sequence[str]] = (), *, drafts: Sequence[str] = ()
    ) -> list[str]:
        """What is searched for: questions, each with its dialogue's earlier turns (oldest first), as one text each.

        Args:
            history: of each question; none at all where it is empty.
            drafts: of each question, an answer to search with.

        Raises:
            RecipeError: questions are to be rewritten, and nobody does it.
        """
        said = history or [()] * len(queries)
        texts = list(queries)
        if self.history == "rewrite" and any(said):
            texts = self._rewriter(queries, said)
        if drafts:
            texts = [f"{text}\n{draft}".rstrip() for text, draft in zip(texts, drafts, strict=True)]
        if self.history == "history":
            texts = [self._with_history(text, turns) for text, turns in zip(texts, said, strict=True)]
        return texts

    def _with_history(self, text: str, turns: Sequence[str]) -> str:
        """The newest turns, each whole, that the query encoder reads together with the text, before it."""
        for turn in reversed(turns):
            longer = f"{turn}\n{text}"
            if len(longer) > MAX_QUERY_CHARACTERS or not self.encoder.reads(longer):
                break
            text = longer
        return text

    def retrieve(self, queries: Sequence[str], k: int, *, vectors: np.ndarray | None = None) -> list[tuple[Hit, ...]]:
        """The best k unique passages of each query, best first; fewer where fewer match.

        Args:
            vectors: (B,D) of the queries, where `embed` made them already; default they are made here.

        Raises:
            RecipeError: k larger than the corpus.
            CorpusError: an empty query, or one of more than 100,000 characters.
        """
        scores, rows = self.search(queries, k, vectors=vectors)
        return [
            tuple(
                Hit(self.base.corpus[row], row, score, rank)
                for rank, (row, score) in enumerate(zip(row_list, score_list, strict=True), 1)
                if row >= 0
            )
            for row_list, score_list in zip(rows.tolist(), scores.tolist(), strict=True)
        ]

    def search(
        self, queries: Sequence[str], k: int, *, batch: int = BATCH, vectors: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores (B,K) float32 and rows (B,K) int64; row −1 where fewer than K passages match."""
        self.check_k(k)
        for query in queries:
            check_query(query)
        found, embedded = [], []
        for start in track(range(0, len(queries), batch), "retrieving"):
            part, known = list(queries[start : start + batch]), None
            if self.index.needs_vectors:
                known = self.encoder.embed_queries(part) if vectors is None else vectors[start : start + batch]
                embedded.append(known)
            found.append(self.index.search(Queries(part, known), k))
        self._asked = (tuple(queries), np.concatenate(embedded)) if embedded else None
        if not found:
            return np.zeros((0, k), np.float32), np.zeros((0, k), np.int64)
        return np.concatenate([scores for scores, _ in found]), np.concatenate([rows for _, rows in found])

    @property
    def needs_vectors(self) -> bool:
        """Whether queries are embedded before the index is asked: then `retrieve` can be given what `embed` made of them."""
        return self.index.needs_vectors

    def embed(self, queries: Sequence[str]) -> np.ndarray:
        """(B,) queries → (B,D), bit for bit as `search` makes them."""
        parts = [self.encoder.embed_queries(list(queries[start : start + BATCH])) for start in range(0, len(queries), BATCH)]
        return np.concatenate(parts) if parts else np.zeros((0, self.encoder.dimension), np.float32)

    def prior(self, queries: Sequence[str], hits: Sequence[Sequence[Hit]]) -> list[Tensor]:
        """log p(z|x) over each query's own hits, in their order, float32 each. No gradient.

        It does not depend on how the hits were found: fused ranks are no logits, so q·d, BM25 or both are computed here.
        """
        logits, present = self.weigh(queries, hits)
        logprobs = passage_logprobs(logits, present=present)
        return [row[: len(found)] for row, found in zip(logprobs, hits, strict=True)]

    def weigh(self, queries: Sequence[str], hits: Sequence[Sequence[Hit]]) -> tuple[Tensor, Tensor]:
        """The prior's logits over each query's own hits, (B,K), and where there is a hit, (B,K). No gradient."""
        most = max((len(found) for found in hits), default=0)
        rows = np.array([[hit.row for hit in found] + [-1] * (most - len(found)) for found in hits], dtype=np.int64)
        scores = torch.zeros((len(hits), most))
        if most and self.prior_settings.kind != "bm25":
            vectors = self.base.vectors.vectors(rows)
            scores = torch.from_numpy(np.einsum("bd,bkd->bk", self._vectors_of(queries), vectors))
        if not most:
            return scores, scores.bool()
        return self.prior_logits(scores, queries, rows).detach(), torch.from_numpy(rows >= 0)

    def _vectors_of(self, queries: Sequence[str]) -> np.ndarray:
        """Query vectors (B,D): those of the search just made, if it was for these queries. Used once, as encoders learn."""
        asked, self._asked = self._asked, None
        if asked is not None and asked[0] == tuple(queries):
            return asked[1]
        return self.encoder.embed_queries(list(queries))

    def prior_logprobs(self, doc_scores: Tensor, queries: Sequence[str], rows: np.ndarray) -> Tensor:
        """q·d (B,K), with or without gradient, → log p(z|x) (B,K) by the recipe's prior; −inf where row is −1."""
        present = torch.from_numpy(rows >= 0).to(doc_scores.device)
        return passage_logprobs(self.prior_logits(doc_scores, queries, rows), present=present)

    def prior_logits(self, doc_scores: Tensor, queries: Sequence[str], rows: np.ndarray) -> Tensor:
        """q·d (B,K), with or without gradient, → the logits of the recipe's prior (B,K); any number where row is −1."""
        sparse = None
        if self.prior_settings.kind != "dense":
            sparse = torch.from_numpy(self._bm25.score(queries, rows)).to(doc_scores.device)
        return self.weights.logits(doc_scores.float(), sparse)

    @property
    def temperature(self) -> float:
        """τ of the prior, as it is now."""
        return self.weights.values()["temperature"]

    @property
    def _rewriter(self) -> Rewrite:
        if self.rewrite is None:
            raise RecipeError("retriever.history is 'rewrite', but no generator rewrites", hint="open the system with RAG.open")
        return self.rewrite

    @property
    def _bm25(self) -> BM25Index:
        for name, settings in self.base.settings.indexes.items():
            if isinstance(settings, BM25Settings):
                return cast(BM25Index, self.base.index(name))
        raise RecipeError(
            f"retriever.prior.kind is {self.prior_settings.kind!r}, but the knowledge base has no bm25 index",
            hint="add one under knowledge.indexes and build again, or use the dense prior",
        )

    def _usual_temperature(self) -> float:
        """The one a tuned query encoder was tuned at. Else: cosines lie so close together that τ = 1 is nearly flat."""
        if self.prior_settings.kind == "bm25":
            return 1.0
        return self.encoder.gamma or (0.05 if self.encoder.similarity == "cosine" else 1.0)

    def score(self, features: dict[str, Tensor], passage_vectors: Tensor) -> Tensor:
        """Inner products with gradient into the query tower only. Features of B queries, (B,K,D) → doc_scores (B,K)."""
        queries = self.encoder.forward(features)
        return (queries[:, None, :] * passage_vectors.detach()).sum(-1)

    @property
    def fingerprint(self) -> str:
        """Names what is found: the knowledge base as it is searched, index, query tower as it is now, and its way of asking."""
        asks = self.encoder.query_fingerprint if self.index.needs_vectors else ""
        return fingerprint([self.base.searched, self.name, asks, self.history, *self.index.asks])

    def check_k(self, k: int) -> None:
        if k > len(self.base.corpus):
            raise RecipeError(f"k is {k}, but the knowledge base holds {len(self.base.corpus)} passages", hint="ask for fewer")
        if k < 1:
            raise RecipeError(f"k is {k}; it must be at least 1", hint="-k 5, or retriever.k in the recipe")
