"""Asks in, outcomes out: every request reserved, journalled, sent, classified, journalled again, and only then used.

    ask → journal knows it? → gate (stop, money, concurrency, pause, breaker, buckets) → intent → request → outcome → use
                                                     ↑ transient: back-off, at most `attempts` times ┘
    truncated → once more with `larger_limit`;  malformed → one repair;  fatal → nothing more is sent

One event loop in a thread of its own, `concurrency` workers, one connection pool. The caller's thread reads `asks`, as far as
there is room, and hands outcomes out, so memory is O(concurrency) and there is never a task per record. Deeper asks go first.
Equal asks in one run are one call. What a server has said holds for all engines of a journal that ask it: a Retry-After to the
teacher pauses the judge. Ctrl-C stops sending and waits ≤ 10 s for what is under way; a second one does not wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from raglan.calls.asks import Ask, Outcome
from raglan.calls.endpoint import read_key
from raglan.calls.journal import Journal
from raglan.calls.limits import Clock, Gate, Server
from raglan.calls.money import Entry
from raglan.calls.running import Run
from raglan.calls.terms import Terms
from raglan.errors import GeneratorError
from raglan.recipe import EndpointSettings, MoneySettings

__all__ = ["CallEngine"]


class CallEngine(Terms):
    """One endpoint, one journal. `with CallEngine(settings, folder, money=…) as engine`, or call `close`."""

    def __init__(self, settings: EndpointSettings, folder: Path | Journal, *, money: MoneySettings, clock: Clock | None = None):
        """
        Args:
            folder: where the journal is, or will be; or an open journal that several engines share, in turns.
            clock: another one makes pauses shorter, for trials.

        Raises:
            RecipeError: no price. GeneratorError: `api_key_env` names a variable that is not set.
            CheckpointError: a damaged journal, or one that another process is writing.
        """
        self._key = read_key(settings.api_key_env)  # first, so that no journal is left open
        super().__init__(settings, folder, money=money, clock=clock)
        server = self.journal.servers.setdefault(self.host, Server(self.clock))
        self._gate = Gate(settings.concurrency, rpm=settings.rpm, tpm=settings.tpm, server=server)
        self._current: Run | None = None

    def __enter__(self) -> CallEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write everything to the disk and let the journal go, if it is this engine's own. A run that is left ends at once."""
        if self._current is not None:
            self._current.end(wait=False)
        if self._owned:
            self.journal.close()

    def run(self, asks: Iterable[Ask], *, follow: Callable[[Outcome], Iterable[Ask]] | None = None) -> Iterator[Outcome]:
        """Outcomes in order of completion; memory O(concurrency), `asks` is read as far as needed.

        Args:
            follow: what an outcome leads to, asked in the same run, deeper ones before shallower.

        Raises:
            CallsStopped: cap, fatal answer, breaker, Ctrl-C or a full disk, after what was in flight has been handed out.
            GeneratorError: a model on this machine does not come up.
        """
        if self._current is not None:
            raise GeneratorError("this engine is running already", hint="use `follow` for calls that depend on others")
        if (start := self.journal.starters.get(self.host)) is not None:
            start()
        self._current = Run(self, self._gate, key=self._key)
        try:
            yield from self._current.outcomes(asks, follow)
        finally:
            self._current = None

    def ledger(self) -> list[Entry]:
        """Rows of step × model × outcome: calls, tokens, money; `in_doubt` are requests of which no outcome is known."""
        return self.journal.ledger.rows()
