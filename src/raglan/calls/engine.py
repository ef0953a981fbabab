"""Asks in, outcomes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from raglan.calls.asks import Ask, Outcome
from raglan.recipe import EndpointSettings, MoneySettings

__all__ = ["CallEngine"]


class CallEngine:
    """One endpoint, one journal. `with CallEngine(settings, folder, money=…) as engine`, or call `close`."""

    def __init__(self, settings: EndpointSettings, folder: Path, *, money: MoneySettings):
        """
        Args:
            folder: where the journal is, or will be.

        Raises:
            RecipeError: no price. GeneratorError: `api_key_env` names a variable that is not set.
            CheckpointError: a damaged journal, or one that another process is writing.
        """
        raise NotImplementedError

    def __enter__(self) -> CallEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write everything to the disk and let the journal go."""

    def run(self, asks: Iterable[Ask], *, follow: Callable[[Outcome], Iterable[Ask]] | None = None) -> Iterator[Outcome]:
        """Outcomes in order of completion; memory O(concurrency), `asks` is read as far as needed.

        Args:
            follow: what an outcome leads to, asked in the same run, deeper ones before shallower.

        Raises:
            CallsStopped: cap, fatal answer, breaker, Ctrl-C or a full disk, after what was in flight has been handed out.
        """
        raise NotImplementedError

    def ledger(self) -> list[Any]:
        """Rows of step × model × outcome: calls, tokens, money."""
        raise NotImplementedError
