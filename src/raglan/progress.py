"""Progress bars on stderr with time left, and silence where stderr is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["console", "track"]

T = TypeVar("T")
console = Console(stderr=True, highlight=False)


def track(items: Sequence[T], label: str, *, done: int = 0) -> Iterable[T]:
    """Iterate with a bar; `done` items of the whole were finished by an earlier run."""
    return _shown(items, label, done) if sys.stderr.isatty() else items


def _shown(items: Sequence[T], label: str, done: int) -> Iterator[T]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=done + len(items), completed=done)
        for item in items:
            yield item
            bar.advance(task)
