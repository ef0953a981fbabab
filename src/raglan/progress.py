"""Progress bars on stderr with time left, and silence where stderr is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["console", "counting", "track"]

T = TypeVar("T")
_shown_now = [0]  # bars within a bar are not shown: the outer one has the time left
console = Console(stderr=True, highlight=False)


@contextmanager
def counting(total: int, label: str, *, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar that is told how many more are done; for work that goes on in pieces of unlike size."""
    if not _wanted():
        yield lambda _: None
        return
    with _bar() as bar:
        task = bar.add_task(label, total=total, completed=done)
        yield lambda more: bar.advance(task, more)


def track(items: Sequence[T], label: str, *, done: int = 0) -> Iterable[T]:
    """Iterate with a bar; `done` items of the whole were finished by an earlier run."""
    return _shown(items, label, done) if _wanted() else items


def _shown(items: Sequence[T], label: str, done: int) -> Iterator[T]:
    with _bar() as bar:
        task = bar.add_task(label, total=done + len(items), completed=done)
        for item in items:
            yield item
            bar.advance(task)


def _wanted() -> bool:
    return sys.stderr.isatty() and not _shown_now[0]


@contextmanager
def _bar() -> Iterator[Progress]:
    _shown_now[0] += 1
    try:
        with Progress(*_columns(), console=console, transient=True) as bar:
            yield bar
    finally:
        _shown_now[0] -= 1


def _columns() -> tuple[ProgressColumn, ...]:
    return (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
