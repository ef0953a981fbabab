"""`answer`: masked answer likelihood. The generator learns to use, and to ignore, passages (RA-DIT's LM-ft, equation 3).

Loss on answer + end token only. With one passage a row it is RA-DIT's, with several it is RAG-Tuning's; the objective does
not know. Full weights or LoRA is a setting of the generator; the objective does not know that either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raglan.generator import HFGenerator
from raglan.likelihood import answer_nll
from raglan.objective.base import Objective
from raglan.packing import packed_batch, reads_flat

__all__ = ["AnswerObjective"]


class AnswerObjective(Objective):
    """Rows are `HFGenerator.row`'s and batches its `collate`'s, or rows are packs of such rows.

    With `tokens` "first" an answer's first token alone is scored, without the end token. A row's `weight`, 1 if it has none,
    multiplies its loss; the division by tokens or rows stays as it is. `measure` adds figures of its own to the held-out loss.
    """

    def __init__(
        self,
        generator: HFGenerator,
        *,
        reduction: Literal["token", "example"] = "token",
        tokens: Literal["all", "first"] = "all",
        measure: Callable[[], dict[str, float]] | None = None,
    ):
        self.measure = measure
        self.generator, self.reduction, self.tokens = generator, reduction, tokens
        self.module = generator.model
        self.division = "items" if reduction == "token" else "mean"

    def loss(
        self, batch: dict[str, Any], *, module: nn.Module | None = None, items: int | Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        batch = dict(batch)
        weights = batch.pop("weights", None)
        mask = batch["labels"] >= 0
        token_logprobs = self.generator.forward(batch, module)
        if weights is not None:
            token_logprobs = token_logprobs * weights[:, None].to(token_logprobs.device)
        mask = mask.to(token_logprobs.device)
        if self.reduction == "token" and items is not None:
            loss = answer_nll(token_logprobs, mask, reduction="none").sum() / items
        else:
            loss = answer_nll(token_logprobs, mask, reduction=self.reduction)
        return loss, {}

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if "rows" in rows[0]:
            return dict(packed_batch(rows, self.generator.pad, flat=reads_flat(self.generator)))
        if self.tokens == "first":
            rows = [{**row, "labels": row["labels"][:1]} for row in rows]
        batch: dict[str, Any] = dict(self.generator.collate(rows))
        if any("weight" in row for row in rows):
            batch["weights"] = torch.tensor([float(row.get("weight", 1.0)) for row in rows])
        return batch

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        return {"generator": [p for p in self.module.parameters() if p.requires_grad]}

    @torch.no_grad()
    def validate(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, float]:
        """Loss per answer token over all rows, whatever their batches."""
        was_training = self.module.training
        self.module.eval()
        total, count = 0.0, 0
        ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
        for start in range(0, len(ordered), 32):
            batch = self.collate(ordered[start : start + 32])
            batch.pop("weights", None)
            with self.generator.autocast():
                logprobs = self.generator.forward(batch)
            mask = (batch["labels"] >= 0).to(logprobs.device)
            total += float(answer_nll(logprobs, mask, reduction="none").sum())
            count += int(mask.sum())
        self.module.train(was_training)
        own = {} if self.measure is None else self.measure()
        return {"loss": total / max(count, 1), **own}
