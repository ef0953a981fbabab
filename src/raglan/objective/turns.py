"""`marginal` with `turns`: RAG-Turn, several turns of a dialogue retrieve (Shuster et al. 2021, arXiv 2104.07567, §3).

    doc-then-turn   `marginal` as it is, over U·K passages with the joint prior ρ_u + ℓ_uk
    doc-only        loss = −log Σ_u e^ρ_u p_u(y|x)                    loss: joint
                         = −Σ_u e^ρ_u log p_u(y|x), an upper bound    loss: separate

U is the same in every batch; a dialogue with fewer turns has absent ones. With `over: sequence` the first two are one and the
same: Σ_u e^ρ_u Σ_k e^ℓ_uk p(y|z_uk).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from raglan.dialogue import joint_logprobs
from raglan.likelihood import turn_answer_logprobs, turn_bound, turn_marginal, turn_split
from raglan.objective.marginal import MarginalObjective, Scored
from raglan.recipe import LearnedTurns

__all__ = ["TurnObjective"]


class TurnObjective(MarginalObjective):
    """Rows are `MarginalRow`s with a text for each turn that retrieves, oldest first."""

    @property
    def turns(self) -> LearnedTurns:
        assert self.settings.turns is not None
        return self.settings.turns

    def _marginal(self, scored: Scored) -> Tensor:
        return super()._marginal(scored) if self.turns.kind == "doc_then_turn" else turn_marginal(*self._by_turn(scored))

    def _learned(self, scored: Scored) -> Tensor:
        return self._marginal(scored) if self.turns.loss == "joint" else turn_bound(*self._by_turn(scored))

    def _by_turn(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """ρ and log p_u(y|x), (B,U) each."""
        shape = (self.turns.count, -1)
        prior, each = turn_split(scored.doc_logprobs.unflatten(1, shape))
        token_logprobs = scored.token_logprobs.unflatten(1, shape)
        return prior, turn_answer_logprobs(each, token_logprobs, scored.answer_mask, over=self.settings.over)

    def _weighed(self, batch: dict[str, Any], device: torch.device) -> tuple[Tensor, np.ndarray]:
        doc_scores, rows = self._picked(batch, device)  # (N,K), a row a turn
        present = torch.from_numpy(rows >= 0).to(device)
        with self._weighing(doc_scores):
            logits = self.retriever.prior_logits(doc_scores, batch["queries"], rows)
            joint = joint_logprobs(logits, present, batch["sizes"], self.turns)  # (B,U,K)
        placed = np.full(joint.shape, -1, dtype=np.int64)
        places = [(b, u) for b, size in enumerate(batch["sizes"]) for u in range(size)]
        placed[tuple(np.array(places).T)] = rows
        return joint.flatten(1), placed.reshape(len(placed), -1)
