"""Closed book: what was accepted is asked once more without passages.

    right    of the draws, how many give an answer, as verification finds it in a target
    tag      synth.closed_book = {right, draws} (and {missing}, of draws that failed)
    drop     every draw is right: the example leaves

The recipe's generator on this machine answers greedily, in as many wordings as there are draws; a model behind an endpoint is
drawn at temperature 1, through the journal of all other calls. Examples without a short answer and those in which no passage
answers are not asked. Deviation: by the specification the student's base answers; an endpoint is another model, and says less
of what the student knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from raglan.artifact import fingerprint
from raglan.calls import Ask, CallEngine
from raglan.errors import CallsStopped
from raglan.generator import Generator
from raglan.prompt import Prompt
from raglan.recipe import ClosedBookSettings
from raglan.synthesis.checked import written_of
from raglan.synthesis.evidence import language_of
from raglan.synthesis.writing import Draft, Made
from raglan.verification import answered

__all__ = ["ClosedBook", "Recalled"]

Replies = dict[str, list[str]]  # an example's id → a reply a draw


@dataclass(frozen=True, slots=True)
class Recalled:
    """How many draws were right without passages, of how many that answered; `missing` failed."""

    right: int
    draws: int
    missing: int = 0
    drops: bool = False

    @property
    def known(self) -> bool:
        """Whether no draw was wrong or failed."""
        return self.right == self.draws > 0 == self.missing

    def record(self) -> dict[str, int]:
        return {"right": self.right, "draws": self.draws, **({"missing": self.missing} if self.missing else {})}


class ClosedBook:
    """Asks without passages: `local` or `paid`.

    Attributes:
        book: while somebody reckons with them, the calls that each example needs: its id → key → step.
        engine: makes the calls, if there are any.
    """

    def __init__(self, settings: ClosedBookSettings, replies: Callable[[Sequence[Draft], bool], Any], name: str):
        self.settings, self.fingerprint = settings, name
        self.engine: CallEngine | None = None
        self.book: dict[str, dict[str, str]] | None = None
        self._replies = replies

    @classmethod
    def local(cls, settings: ClosedBookSettings, generator: Generator, prompt: Prompt) -> ClosedBook:
        """By a generator on this machine."""

        def replies(drafts: Sequence[Draft], _: bool) -> tuple[Replies, None]:
            asked = [(draft, wording) for draft in drafts for wording in _wordings(draft)[: settings.draws]]
            rendered = [prompt.render(f"{wording}\n{one.query}", [], history=one.history) for one, wording in asked]
            found: Replies = {draft.job.id: [] for draft in drafts}
            said = generator.generate(rendered, max_new_tokens=settings.max_tokens) if rendered else []
            for (draft, _wording), completion in zip(asked, said, strict=True):
                found[draft.job.id].append(completion.text)
            return found, None

        return cls(settings, replies, fingerprint([generator.fingerprint, settings.draws, settings.max_tokens, _words()]))

    @classmethod
    def paid(cls, settings: ClosedBookSettings, engine: CallEngine) -> ClosedBook:
        """By a model behind an endpoint; the engine's journal may be another's too, in turns."""
        asking = _Paid(settings, engine)
        named = [engine.host, engine.settings.model, settings.draws, settings.max_tokens, _words()]
        made = cls(settings, asking.replies, fingerprint(named))
        asking.owner, made.engine = made, engine
        return made

    def ask(self, made: Sequence[Made], *, settle: bool = True) -> tuple[Mapping[str, Recalled | None], CallsStopped | None]:
        """Of each example's id how it went, None where it is not asked; none of those whose calls were stopped; and why."""
        written = {one.sheet.draft.job.id: written_of(one) for one in made}
        told: dict[str, Recalled | None] = {name: None for name, one in written.items() if one.gold_absent or not one.answers}
        drafts = [one.sheet.draft for one in made if one.sheet.draft.job.id not in told]
        found, stopped = self._replies(drafts, settle)
        for name, texts in found.items():
            right = sum(answered(written[name], text) for text in texts)
            missing = self.settings.draws - len(texts)
            recalled = Recalled(right, len(texts), missing)
            drops = self.settings.what == "drop" and recalled.known
            told[name] = Recalled(right, len(texts), missing, drops)
        return told, stopped


class _Paid:
    """Replies through the call engine; those that failed are not asked again in this run."""

    def __init__(self, settings: ClosedBookSettings, engine: CallEngine):
        self.settings, self.engine = settings, engine
        self.owner: ClosedBook | None = None
        self._failed: set[str] = set()

    def replies(self, drafts: Sequence[Draft], settle: bool) -> tuple[Replies, CallsStopped | None]:
        asks = {draft.job.id: [self._ask(draft, draw) for draw in range(self.settings.draws)] for draft in drafts}
        if self.owner is not None and self.owner.book is not None:
            for name, own in asks.items():
                self.owner.book.setdefault(name, {}).update({self.engine.key(ask): ask.step for ask in own})
        stopped = self._settle([ask for own in asks.values() for ask in own if self._open(ask)]) if settle else None
        done = {name: own for name, own in asks.items() if not any(self._open(ask) for ask in own)}
        known = {name: [self.engine.known(ask) for ask in own] for name, own in done.items()}
        return {name: [str(one.value) for one in own if one is not None] for name, own in known.items()}, stopped

    def _open(self, ask: Ask) -> bool:
        return self.engine.key(ask) not in self._failed and self.engine.known(ask) is None

    def _settle(self, asks: Sequence[Ask]) -> CallsStopped | None:
        try:
            for outcome in self.engine.run(asks):
                if outcome.cls != "ok":
                    self._failed.add(self.engine.key(outcome.ask))
        except CallsStopped as why:
            return why
        return None

    def _ask(self, draft: Draft, draw: int) -> Ask:
        body = "\n".join([*draft.history, draft.query])
        messages = ({"role": "system", "content": _wordings(draft)[0]}, {"role": "user", "content": body})
        sampling = {"temperature": 1.0, "max_tokens": self.settings.max_tokens}
        return Ask("closed_book", messages, None, sampling, draw, draft.job.id)


def _wordings(draft: Draft) -> list[str]:
    told, language = _words(), language_of(draft)
    named = f" {told['labels'][language].format(labels=' | '.join(draft.labels))}" if draft.labels else ""
    return [f"{wording}{named}" for wording in told["wordings"][language]]


@cache
def _words() -> dict[str, Any]:
    """data/closed_book.yaml."""
    path = Path(__file__).parent / "data" / "closed_book.yaml"
    told: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return told
