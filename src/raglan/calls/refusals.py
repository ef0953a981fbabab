"""When a server that answers, and refuses what it is asked for good, is asked no longer.

A refusal costs nothing and each may be its own call's fault, a prompt that is too long; but where nearly all calls of a step
are refused, it is what they have in common, as a temperature that the model does not take, and so will be all that follow.

    nothing of the step ever came       20 of the first 20
    something came in this run          more than 95 % of the last 50
    something came in an earlier run    more than 95 % of 200: what is asked again first may be all that was refused then
"""

from __future__ import annotations

from collections import deque

from raglan.calls.asks import Ask, Outcome
from raglan.calls.money import Ledger
from raglan.errors import CallsStopped

__all__ = ["Refusals"]

NEVER, NOW, BEFORE = 20, 50, 200
SHARE = 0.95


class Refusals:
    """Counts them in one run."""

    def __init__(self, host: str, model: str, ledger: Ledger):
        self._host, self._model, self._ledger = host, model, ledger
        self._last: dict[str, deque[bool]] = {}  # step → whether each of the last calls was refused
        self._came: set[str] = set()  # steps of which something came in this run

    def heed(self, ask: Ask, outcome: Outcome) -> CallsStopped | None:
        """Why nothing more is to be sent, if so."""
        last = self._last.setdefault(ask.step, deque(maxlen=BEFORE))
        last.append(outcome.cls == "permanent")
        if outcome.cls == "ok":
            self._came.add(ask.step)
        if not last[-1] or len(last) < NEVER:
            return None
        enough = self._enough(ask.step)
        refused = sum(list(last)[-enough:])
        if len(last) < enough or refused <= SHARE * enough:
            return None
        return CallsStopped(
            f"{self._host} refused {refused} of the last {enough} calls of step {ask.step!r}: {outcome.error}",
            reason="refused", hint="change what it does not take; the same command goes on from here",
        )  # fmt: skip

    def _enough(self, step: str) -> int:
        if step in self._came:
            return NOW
        rows = self._ledger.rows()
        return BEFORE if any((row.step, row.model, row.cls) == (step, self._model, "ok") for row in rows) else NEVER
