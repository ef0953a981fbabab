"""A chat model as the judge of evidence, over the call engine.

    verdict(written)            do the passages say all that the answer says; does it agree with the facts it was made from
    answers(example, passage)   the guard's question: does a passage that is to be noise answer, where no answer is a string

Both look into the journal and send nothing. What is not there is noted, and whoever asked waits (`Waits`); `settle` asks for
all that was noted together, at the endpoint's full concurrency, when no other engine writes the journal. Then they are asked
again. So the judge shares ledger and cap with whoever writes, a run that is begun again pays for no judgement twice, and what
is decided does not depend on the order of replies.

A reply that fails, or says that it cannot tell, is missing and never a pass. Where something fails for passing reasons, the
server must answer a control question of the same form before that counts, else the run stops: an outage is no verdict. Where
the breaker stops and the server answers such a question, the others are asked all the same. Then the run stops, as where
all fails so. But what has failed so in `give_up` runs, and once more right after the control question, is given up for good
(`judge_unreachable`; the journal remembers). The run that does this gives up whatever else never comes, after as many tries, so
what never comes stops `give_up` - 1 runs, however much of it there is.
Prompts are data, judge.yaml.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import yaml
from pydantic import BaseModel, ConfigDict, field_validator

from raglan.artifact import fingerprint
from raglan.calls import Ask, CallEngine
from raglan.errors import CallsStopped, GeneratorError
from raglan.records import Example, Passage
from raglan.text import SPACELESS, half_character
from raglan.verification.checks import Verdict
from raglan.verification.readings import CONFLICT
from raglan.verification.written import Written

__all__ = [
    "UNREACHABLE",
    "Compared",
    "Holds",
    "PaidJudge",
    "Supported",
    "Waits",
    "guard_messages",
    "pieces",
    "settled",
    "support_messages",
]

AWAY, UNREACHABLE = "transient", "judge_unreachable"
CONTROL = ({"role": "user", "content": "This is a trial: reply with anything that may be replied."},)
HAN = re.compile(f"[{SPACELESS}]")
T = TypeVar("T")
R = TypeVar("R", bound="_Reply")


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    reason: str  # first, so that it is not an excuse

    @field_validator("reason")
    @classmethod
    def _whole(cls, reason: str) -> str:
        if (half := half_character(reason)) is not None:
            raise ValueError(f"must be text in valid Unicode; {half!r} is half a character")
        return reason


class Supported(_Reply):
    """Whether passages support an answer."""

    verdict: Literal["supported", "unsupported", "unclear"]


class Compared(Supported):
    """The same, and whether the answer agrees with what is known of it."""

    agrees: Literal["yes", "no", "unclear"]


class Holds(_Reply):
    """Whether a passage answers a question."""

    verdict: Literal["yes", "no", "unclear"]


class Waits(Exception):
    """The judgement has to be asked for first."""


class _Unreachable(GeneratorError):
    """The judgement never comes, and the server answers other questions."""


class PaidJudge:
    """One endpoint's judgements.

    Args:
        engine: its journal may be another engine's too, in turns.
        give_up: the run that gives up a judgement all of whose tries, `attempts` for each run, have failed for passing reasons.

    Attributes:
        book: while somebody reckons with them, the calls that each example needs: its id → key → step.
        history, facts: of the question whose noise is being chosen, beside what the guard says of it.
        noted: how often somebody has had to wait.
    """

    def __init__(self, engine: CallEngine, *, max_tokens: int = 300, give_up: int = 2):
        self.engine, self.max_tokens, self.give_up = engine, max_tokens, give_up
        self.book: dict[str, dict[str, str]] | None = None
        self.history: Sequence[str] = ()
        self.facts: Sequence[str] = ()
        self.noted = 0
        self._wanted: dict[str, Ask] = {}
        self._failed: dict[str, str] = {}
        self._gives_up = False  # whether this is the run that does

    @property
    def fingerprint(self) -> str:
        """Names what verdicts follow from: server, model and wordings."""
        return fingerprint([self.engine.host, self.engine.settings.model, self.max_tokens, _prompts()])

    @property
    def waiting(self) -> int:
        """How many judgements are noted and not asked for."""
        return len(self._wanted)

    def forget(self) -> None:
        """Nobody waits any longer for what is noted."""
        self._wanted.clear()

    def verdict(self, one: Written) -> Verdict | None:
        """Support, as the judge sees it; None where it cannot tell, missing where it has been given up.

        Raises:
            Waits: it has to be asked first. GeneratorError: it was, and gave no reply that counts.
        """
        compares = bool(_compared(one))
        try:
            said = self._said("judge/support", one.id, support_messages(one), Compared if compares else Supported)
        except _Unreachable as why:
            return Verdict("support", "missing", UNREACHABLE, why.message)
        if said.verdict == "unclear":
            return None
        if said.verdict == "unsupported":
            return Verdict("support", "fail", "judged_unsupported", said.reason)
        agrees = said.agrees if isinstance(said, Compared) else "yes"
        if agrees == "no":
            return Verdict("support", "fail", "contradicts_facts", said.reason)
        return Verdict("support", "pass", "judge") if agrees == "yes" else None

    def answers(self, example: Example, passage: Passage) -> bool | None:
        """Whether a passage answers; None where the judge failed, cannot tell, or has to be asked first (`noted` grows)."""
        try:
            messages = guard_messages(example, passage, self.history, self.facts)
            said = self._said("judge/guard", example.id, messages, Holds)
        except (Waits, GeneratorError):
            return None
        return {"yes": True, "no": False}.get(said.verdict)

    def settle(self) -> None:
        """Ask for all that is noted.

        Raises:
            CallsStopped: cap, fatal answer, interrupt, or failures for passing reasons; what has come is kept.
        """
        wanted, self._wanted = self._wanted, {}
        rest: Mapping[str, Ask] = wanted
        before = {key: self.engine.journal.failures(key) for key in wanted}
        try:
            while rest:
                rest = self._asked(rest, before)
        except CallsStopped:  # an outage is no verdict: others would be paid for in place of what nobody has judged
            for key in self._left(wanted):
                self._failed.pop(key, None)
            raise

    def _asked(self, wanted: Mapping[str, Ask], before: Mapping[str, int]) -> dict[str, Ask]:
        """Ask; what is left over, where some of it was given up.

        Args:
            before: failures of earlier runs.

        Raises:
            CallsStopped: the server is away, or what has failed is not given up yet.
        """
        stopped, left = self._tried(wanted, before)
        if stopped is None and len(left) < len(wanted):
            self._control(left)
            return {}
        tries, failures = self.engine.settings.attempts, self.engine.journal.failures
        due = {key for key in left if self._gives_up or before[key] >= (self.give_up - 1) * tries}
        if tried := {key: left[key] for key in due if failures(key) >= self.give_up * tries}:
            self._control(left)
            self._give_up(tried)
            self._gives_up = True
        rest = self._left(left)
        if rest and not tried:
            raise stopped or self._away(rest)
        return rest

    def _tried(
        self, wanted: Mapping[str, Ask], before: Mapping[str, int]
    ) -> tuple[CallsStopped | None, dict[str, Ask]]:  # fmt: skip
        """Ask each as often as a run does, though the breaker stops in between, while the server answers control questions.

        Returns:
            The breaker's first stop, if there was one, and what has no reply.
        """
        tries, failures = self.engine.settings.attempts, self.engine.journal.failures
        last = {key: max(before[key] + tries, self.give_up * tries if self._gives_up else 0) for key in wanted}
        rest: Mapping[str, Ask] = wanted
        stopped: CallsStopped | None = None
        while True:
            why = self._run(rest)
            stopped, left = stopped or why, self._left(wanted)
            if stopped is None and len(left) < len(wanted):
                return None, left
            open_ = (key for key in left if failures(key) < last[key])
            rest = {key: left[key] for key in open_ if self._gives_up or key not in self._failed}
            if not rest:
                return stopped, left
            self._control(left)

    def _run(self, asks: Mapping[str, Ask]) -> CallsStopped | None:
        """Send these; the breaker's stop, if it stopped them. What failed is noted."""
        try:
            for outcome in self.engine.run(asks.values()):
                key = self.engine.key(outcome.ask)
                self._failed.pop(key, None)
                if outcome.cls != "ok":
                    self._failed[key] = f"{outcome.cls}: {outcome.error}"
        except CallsStopped as why:
            if why.reason != "breaker":
                raise
            return why
        return None

    def _left(self, asks: Mapping[str, Ask]) -> dict[str, Ask]:
        """Which of these have no reply, for passing reasons, and are not given up."""
        return {
            key: ask for key, ask in asks.items()
            if self._failed.get(key, AWAY).startswith(AWAY) and self.engine.journal.given_up(key) is None
            and self.engine.known(ask) is None
        }  # fmt: skip

    def _give_up(self, tried: Mapping[str, Ask]) -> None:
        """Ask once more, and give up what fails again; the server has just answered something else."""
        journal = self.engine.journal
        before = {key: journal.failures(key) for key in tried}
        rest = tried
        while rest:
            stopped = self._run(rest)
            for key in (key for key in self._left(rest) if journal.failures(key) > before[key]):
                journal.give_up(key, self._failed.get(key) or f"{AWAY}: {stopped}")
            if rest := self._left(rest):  # the breaker has stopped before all were asked
                self._control(rest)

    def _control(self, left: Mapping[str, Ask]) -> None:
        """Ask a control question of each form that failed, one that has had no reply yet.

        Raises:
            CallsStopped: the server does not answer it either.
        """
        for schema in dict.fromkeys(ask.schema for ask in left.values()):
            draws = (Ask("judge/control", CONTROL, schema, {"max_tokens": self.max_tokens}, draw) for draw in itertools.count())
            control = next(ask for ask in draws if self.engine.known(ask) is None)
            if any(outcome.cls == AWAY for outcome in self.engine.run([control])):
                raise self._away(left)

    def _away(self, left: Mapping[str, Ask]) -> CallsStopped:
        why = next((self._failed[key] for key in left if key in self._failed), AWAY)
        return CallsStopped(
            f"the judge at {self.engine.host} answers nothing: {why.removeprefix(f'{AWAY}: ')}",
            reason="breaker", hint="run the same command again when it is well",
        )  # fmt: skip

    def _said(self, step: str, ref: str, messages: tuple[dict[str, str], ...], schema: type[R]) -> R:
        ask = Ask(step, messages, schema, {"temperature": 0.0, "max_tokens": self.max_tokens}, ref=ref)
        key = self.engine.key(ask)
        if self.book is not None:
            self.book.setdefault(ref, {})[key] = step
        if (found := self.engine.known(ask)) is not None:
            return cast(R, found.value)
        if (why := self.engine.journal.given_up(key)) is not None:
            raise _Unreachable(f"the judge gave no verdict: {why}")
        if key in self._failed:
            raise GeneratorError(f"the judge gave no verdict: {self._failed[key]}")
        self._wanted[key] = ask
        self.noted += 1
        raise Waits


def support_messages(one: Written) -> tuple[dict[str, str], ...]:
    """What is read to judge an answer: question, all passages as shown without their roles, the answer, what is known."""
    told = _prompts()["zh" if one.language == "zh" or (one.language != "en" and HAN.search(one.query)) else "en"]
    heads, compared = told["heads"], _compared(one)
    shown = [f"[{number}] {passage.title}".strip() + f"\n{passage.text}" for number, passage in enumerate(one.passages, 1)]
    parts = [
        *([(heads["history"], "\n".join(one.history))] if one.history else []),
        (heads["question"], one.query), (heads["passages"], "\n\n".join(shown)), (heads["answer"], one.target),
        *([(heads["facts"], _listed(one.facts))] if one.facts else []),
        *([(heads["known"], " | ".join(one.answers))] if one.answers else []),
    ]  # fmt: skip
    return _messages(f"{told['support']} {told[compared]}" if compared else told["support"], parts, heads["none"])


def _compared(one: Written) -> str:
    """What an answer is held against beside the passages: all their sides, the part they tell, what is known, or nothing."""
    if one.answers_part:
        return "part"
    return "sides" if one.evidence == CONFLICT else "compare" if one.facts or one.answers else ""


def guard_messages(
    example: Example, passage: Passage, history: Sequence[str], facts: Sequence[str]
) -> tuple[dict[str, str], ...]:
    """What is read to judge whether a passage answers."""
    told = _prompts()["zh" if HAN.search(example.query) else "en"]
    heads = told["heads"]
    parts = [
        *([(heads["history"], "\n".join(history))] if history else []),
        (heads["question"], example.query),
        *([(heads["facts"], _listed(facts))] if facts else []),
        (heads["passage"], f"{passage.title}\n{passage.text}".strip()),
    ]
    return _messages(told["guard"], parts, heads["none"])


def _messages(task: str, parts: Iterable[tuple[str, str]], nothing: str) -> tuple[dict[str, str], ...]:
    """The task, which is the same from call to call, and the parts under their heads."""
    body = "\n\n".join(f"## {head}\n{text.strip() or nothing}" for head, text in parts)
    return {"role": "system", "content": task}, {"role": "user", "content": body}


def pieces(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """So many at a time."""
    rest = iter(items)
    while piece := list(islice(rest, size)):
        yield piece


def settled(judge: PaidJudge | None) -> CallsStopped | None:
    """Have a judge asked, if there is one; why its calls stopped, if they did, after what came is there to be used."""
    if judge is None or not judge.waiting:
        return None
    try:
        judge.settle()
    except CallsStopped as why:
        return why
    return None


@cache
def _prompts() -> dict[str, Any]:
    """judge.yaml."""
    return cast(dict[str, Any], yaml.safe_load(Path(__file__).with_name("judge.yaml").read_text(encoding="utf-8")))


def _listed(texts: Sequence[str]) -> str:
    return "\n".join(f"- {text}" for text in texts)
