"""`lsr`: the query encoder learns which passages the generator found useful (RA-DIT's R-ft, REPLUG's LSR).

Only the query tower learns. Passage vectors are gathered from the index and detached, the language model's scores come out
of a table that was made once; so a step costs one query encoding, and the index is byte-identical afterwards. Scores are
computed by `Retriever.score` from vectors that carry a gradient: a float that came out of `encode` would carry none, and
the best-known public trainer of this method therefore trains nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raglan.index import Queries
from raglan.likelihood import lsr_divergence, lsr_target, normalised_entropy, passage_logprobs
from raglan.metrics import mrr, recall
from raglan.objective.base import Objective
from raglan.recipe import LsrObjective as LsrSettings
from raglan.records import Example
from raglan.retriever import Retriever

__all__ = ["LsrObjective", "LsrRow", "default_gamma"]


@dataclass(frozen=True)
class LsrRow:
    """What is searched for, its candidates (K,) rows (−1 = none), the LM's Σ_t log p of its answer under each (K,), and T."""

    query: str
    candidates: np.ndarray
    answer_logprobs: np.ndarray
    answer_length: int


def default_gamma(similarity: str) -> float:
    """1 for inner products; 0.05 for cosines, which lie so close together that γ = 1 is nearly flat."""
    return 1.0 if similarity == "dot" else 0.05


class LsrObjective(Objective):
    """KL between the retriever's distribution over K candidates and the generator's preference."""

    def __init__(self, retriever: Retriever, settings: LsrSettings):
        self.retriever, self.settings = retriever, settings
        self.module = retriever.encoder.split()
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_("pooler" not in name)  # BERT's pooler takes no part in the vector
        self.gamma = settings.gamma or default_gamma(retriever.encoder.similarity)
        self.vectors = retriever.base.vectors

    def loss(
        self, batch: dict[str, Any], *, module: nn.Module | None = None, items: int | Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        device = next(self.module.parameters()).device
        moved = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
        features = {name.removeprefix("query_"): value for name, value in moved.items() if name.startswith("query_")}
        doc_scores = self.retriever.score(features, moved["passage_vectors"])
        settings: dict[str, Any] = {"target": self.settings.target, "tau": self.settings.tau}
        shared: dict[str, Any] = {"answer_lengths": moved["answer_lengths"], "passage_mask": moved["passage_mask"]}
        losses = lsr_divergence(
            doc_scores, moved["answer_logprobs"], direction=self.settings.direction, gamma=self.gamma, **settings, **shared
        )
        with torch.no_grad():
            log_q = lsr_target(moved["answer_logprobs"], **settings, **shared)
            log_p = passage_logprobs(doc_scores, present=moved["passage_mask"], temperature=self.gamma)
            figures = {
                "target_entropy": normalised_entropy(log_q).mean(), "entropy": normalised_entropy(log_p).mean(),
                "flat": (normalised_entropy(log_q) > 0.99).float().mean(),
                "agreement": (log_q.argmax(-1) == log_p.argmax(-1)).float().mean(),
            }  # fmt: skip
        return losses.mean(), figures

    def collate(self, rows: Sequence[LsrRow]) -> dict[str, Any]:
        candidates = np.stack([row.candidates for row in rows])
        features = self.retriever.encoder.features([row.query for row in rows])
        return {
            **{f"query_{name}": value for name, value in features.items()},
            "passage_vectors": torch.from_numpy(self.vectors.vectors(candidates)),
            "passage_mask": torch.from_numpy(candidates >= 0),
            "answer_logprobs": torch.from_numpy(np.stack([row.answer_logprobs for row in rows])),
            "answer_lengths": torch.tensor([row.answer_length for row in rows]),
        }

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        return {"query_encoder": [p for p in self.module.parameters() if p.requires_grad]}

    @torch.no_grad()
    def validate(self, rows: Sequence[Example]) -> dict[str, float]:
        """MRR@10 and R@1 by a real search of the vectors with the current query tower. Rows are examples."""
        was_training = self.module.training
        self.module.eval()
        dense = DenseOnly(self.retriever)
        k = min(10, len(self.retriever.base.corpus))
        texts = self.retriever.search_texts([example.query for example in rows], [example.history for example in rows])
        found = dense.search(texts, k)
        rankings = [[self.retriever.base.corpus[row].id for row in ranking] for ranking in found.tolist()]
        pairs = list(zip(rankings, [example.relevant for example in rows], strict=True))
        self.module.train(was_training)
        return {
            "mrr@10": float(np.mean([mrr(ranking, relevant, 10) for ranking, relevant in pairs])),
            "recall@1": float(np.mean([recall(ranking, relevant, 1) for ranking, relevant in pairs])),
        }


class DenseOnly:
    """Exact search over the stored vectors with the retriever's query tower, whatever index answers users."""

    def __init__(self, retriever: Retriever):
        self.retriever = retriever

    def search(self, queries: Sequence[str], k: int) -> np.ndarray:
        vectors = self.retriever.encoder.embed_queries(list(queries))
        return self.retriever.base.vectors.search(Queries(list(queries), vectors), k)[1]
