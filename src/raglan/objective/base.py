"""What every objective is: a batch becomes a loss, and only what is named learns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from raglan.generator.batches import scored

__all__ = ["Objective"]


class Objective(ABC):
    """Batch → loss and figures.

    Attributes:
        module: what the trainer wraps, moves and saves.
        division: how losses of accumulated parts of a batch, and of ranks, come together: each is divided by the `items` of
            all (`items`), or is a mean that weighs as much as its share of them (`mean`), or is added as it is (`none`).
        step: the optimizer's steps so far, kept by the trainer.
        autocast: the precision of the module as the trainer wrapped it, for what is computed beside it.
    """

    module: nn.Module
    division: str = "mean"
    step: int = 0
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    @abstractmethod
    def loss(
        self, batch: dict[str, Any], *, module: nn.Module | None = None, items: int | Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss () and figures to log.

        Args:
            batch: what `collate` made.
            module: `self.module` as the trainer wrapped it.
            items: how many `items` the whole accumulated batch has, over all its parts and ranks.
        """

    def items(self, batch: dict[str, Any]) -> int:
        """How much of what the loss is divided by a batch has: its answer tokens where `division` is `items`, else its rows."""
        if self.division == "items":
            return int(scored(batch).sum())
        return len(batch.get("labels", next(iter(batch.values()))))  # packed rows are several in one input

    @abstractmethod
    def collate(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Dataset rows → a batch."""

    @abstractmethod
    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """What learns, by part; after one backward pass exactly these have gradients."""

    @abstractmethod
    def validate(self, rows: Sequence[Any]) -> dict[str, float]:
        """Held-out figures, computed without gradient."""
