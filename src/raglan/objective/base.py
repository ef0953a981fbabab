"""What every objective is: a batch becomes a loss, and only what is named learns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["Objective"]


class Objective(ABC):
    """Batch → loss and figures.

    Attributes:
        module: what the trainer wraps, moves and saves.
    """

    module: nn.Module

    @abstractmethod
    def loss(
        self, batch: dict[str, Any], *, module: nn.Module | None = None, items: int | Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss () and figures to log.

        Args:
            batch: what `collate` made.
            module: `self.module` as the trainer wrapped it.
            items: how many answer tokens the whole accumulated batch has, over all its parts and ranks.
        """

    @abstractmethod
    def collate(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Dataset rows → a batch."""

    @abstractmethod
    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """What learns, by part; after one backward pass exactly these have gradients."""

    @abstractmethod
    def validate(self, rows: Sequence[Any]) -> dict[str, float]:
        """Held-out figures, computed without gradient."""
