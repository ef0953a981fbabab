"""Whether a written example may be learned from: cheap checks first, over what was really shown.

    finish → language → length → format → passage_talk → quotes → citations → counterfactual → gold_absent → support

Support is asked of three, each only where the one before cannot tell:

    string   an alias of the answer stands in the target and in a passage that is no noise
    nli      every sentence of the target is entailed by a passage that is no noise
    judge    a model that is shown the question, the answer and all passages says yes or no; a `PaidJudge` also says whether
             the answer agrees with the facts that the question was made from

A verdict is `pass`, `fail`, `missing` (the verifier failed, or none is there that could tell) or `n/a`. `missing` is never a
pass: it rejects, unless its check is named as one that may be missing, and is counted either way. The first check that fails
gives the reason; verifiers that cost something are not asked of what failed already.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from raglan.errors import CallsStopped, RaglanError, RecipeError
from raglan.text import sentences, words
from raglan.verification.checks import FREE, Verdict
from raglan.verification.judge import UNREACHABLE, PaidJudge, Waits, settled
from raglan.verification.parts import there
from raglan.verification.readings import CONFLICT, readings
from raglan.verification.said import CLOSED, bare_polarity, concluded, fold_counts, holds, lacking, polarity
from raglan.verification.written import FORMATS, ROLES, Shown, Written, read_written

__all__ = [
    "CHECKS",
    "FORMATS",
    "ROLES",
    "Judge",
    "Nli",
    "PaidJudge",
    "Shown",
    "Verdict",
    "Verified",
    "Verifier",
    "Written",
    "answered",
    "funnel",
    "read_written",
]

CHECKS = (*FREE, "support")
ENTAILED = 0.5
PROMPT = """Question: {query}

Passages:
{passages}

Answer: {answer}

Is everything that the answer says supported by the passages? Say yes or no."""
Nli = Callable[[Sequence[tuple[str, str]]], Sequence[float]]


@dataclass(frozen=True)
class Judge:
    """A model that is asked whether passages support an answer, and is shown them.

    Attributes:
        ask: prompt → reply. It raises a RaglanError or an OSError where it cannot answer.
        template: with {query}, {passages} and {answer}.
    """

    ask: Callable[[str], str]
    template: str = PROMPT

    def __post_init__(self) -> None:
        lacking = [name for name in ("{query}", "{passages}", "{answer}") if name not in self.template]
        if lacking:
            raise RecipeError(
                f"the judge's template has no {' and no '.join(lacking)}", hint="who judges evidence must be shown the evidence"
            )

    def verdict(self, one: Written) -> Verdict | None:
        """Support by its yes or no; None for neither."""
        says = self.supports(one)
        if says is None:
            return None
        return Verdict("support", "pass", "judge") if says else Verdict("support", "fail", "judged_unsupported")

    def supports(self, one: Written) -> bool | None:
        """Its yes or no; None for a reply that is neither."""
        shown = "\n".join(
            f"[{n}] {passage.title} {passage.text}".replace("  ", " ") for n, passage in enumerate(one.passages, 1)
        )
        values = {"query": one.query, "passages": shown, "answer": one.target}
        reply = words(self.ask(re.sub(r"\{(query|passages|answer)\}", lambda found: values[found[1]], self.template)))
        return {"yes": True, "no": False, "是": True, "否": False}.get(reply[0]) if reply else None


@dataclass(frozen=True, slots=True)
class Verified:
    """An example's verdicts, in the order of the checks, and the reason for which it is rejected; empty if it is not."""

    written: Written
    verdicts: tuple[Verdict, ...]
    reason: str = ""

    @property
    def accepted(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Verifier:
    """The checks, with the verifiers that are there.

    Attributes:
        nli: (premise, hypothesis) pairs → probabilities that the premise entails it.
        judge: asked last.
        entailed: probability from which on a sentence follows.
        may_be_missing: checks whose `missing` does not reject.
    """

    nli: Nli | None = None
    judge: Judge | PaidJudge | None = None
    may_be_missing: Collection[str] = ()
    entailed: float = ENTAILED

    def __post_init__(self) -> None:
        for name in self.may_be_missing:
            if name not in CHECKS:
                raise RecipeError(f"no check is called {name!r}; checks are {', '.join(CHECKS)}")

    def verify_all(self, ones: Iterable[Written], *, settle: bool = True) -> tuple[list[Verified | None], CallsStopped | None]:
        """All checks of several examples, whose judgements are asked for together.

        Args:
            settle: ask; else only what the journal knows is judged.

        Returns:
            (in order, None where a judgement did not come before the calls stopped; why they did, if so)
        """
        given = list(ones)
        found = [self._unless_waiting(one) for one in given]
        stopped = settled(self.judge) if settle and isinstance(self.judge, PaidJudge) else None
        return [known or self._unless_waiting(one) for one, known in zip(given, found, strict=True)], stopped

    def _unless_waiting(self, one: Written) -> Verified | None:
        try:
            return self.verify(one)
        except Waits:
            return None

    def verify(self, one: Written) -> Verified:
        """All checks of one example; `support` is `n/a` where another failed.

        Raises:
            Waits: a paid judge has to be asked first, as `verify_all` does. CallsStopped: another judge's calls.
        """
        verdicts = []
        for name, check in FREE.items():
            outcome, reason, detail = check(one)
            verdicts.append(Verdict(name, outcome, reason, detail))
        failed = any(verdict.outcome == "fail" for verdict in verdicts)
        verdicts.append(Verdict("support", "n/a", "failed before") if failed else self._support(one))
        return Verified(one, tuple(verdicts), self._reason(verdicts))

    def _reason(self, verdicts: Sequence[Verdict]) -> str:
        for verdict in verdicts:
            if verdict.outcome == "fail":
                return verdict.reason
            if verdict.outcome == "missing" and verdict.check not in self.may_be_missing:
                return UNREACHABLE if verdict.reason == UNREACHABLE else f"{verdict.check}_missing"
        return ""

    def _support(self, one: Written) -> Verdict:
        if one.gold_absent and not one.answers_part:
            return Verdict("support", "n/a")
        if one.evidence == CONFLICT:
            return self._both_sides(one)
        told = _by_string(one)
        if (self.nli is None and self.judge is None) or (told.outcome == "pass" and not one.answers_part):
            return told  # a part's answer can stand there, and the rest be made up
        found = self._asked(one, {"nli": self._by_nli, "judge": self._by_judge})
        if found is not None or self.judge is not None:
            return found or Verdict("support", "missing", "judge_said_neither")
        return told if told.outcome == "fail" else Verdict("support", "fail", "not_entailed")

    def _both_sides(self, one: Written) -> Verdict:
        if readings(one) is not None:  # each is told, and stands in a passage: `counterfactual` has seen to it
            return Verdict("support", "pass", "string")
        if not isinstance(self.judge, PaidJudge):  # whether it takes a side only a judge tells who is asked that
            return Verdict("support", "missing", "readings_unknown")
        return self._asked(one, {"judge": self._by_judge}) or Verdict("support", "missing", "judge_said_neither")

    def _asked(self, one: Written, asks: Mapping[str, Callable[[Written], Verdict | None]]) -> Verdict | None:
        """What the first that can tell says; None where none can."""
        for name, ask in asks.items():
            try:
                found = ask(one)
            except CallsStopped:  # the run ends here, and goes on from here
                raise
            except (RaglanError, OSError) as fault:
                found = Verdict("support", "missing", f"{name}_failed", str(fault).splitlines()[0])
            if found is not None and (found.outcome != "missing" or name == "judge" or self.judge is None):
                return found  # an entailment model that fails cannot tell either
        return None

    def _by_nli(self, one: Written) -> Verdict | None:
        """Passes if every sentence is entailed; else it is the judge's."""
        if self.nli is None:
            return None
        said, shown = [text for text in sentences(one.target) if not (one.answers_part and lacking(text))], _evidence(one)
        scores = list(self.nli([(premise, sentence) for sentence in said for premise in shown])) if said and shown else []
        if len(scores) != len(said) * len(shown):
            return Verdict("support", "missing", "nli_failed", f"{len(scores)} scores for {len(said) * len(shown)} pairs")
        best = [max(scores[n * len(shown) : (n + 1) * len(shown)], default=0.0) for n in range(len(said))]
        return Verdict("support", "pass", "nli") if best and min(best) >= self.entailed else None

    def _by_judge(self, one: Written) -> Verdict | None:
        return self.judge.verdict(one) if self.judge is not None else None


def _evidence(one: Written) -> list[str]:
    return [f"{passage.title} {passage.text}".strip() for passage in one.passages if passage.role != "noise"]


def _by_string(one: Written) -> Verdict:
    """What the known answers tell; `missing` where there is none. Of a part, those that are there."""
    if one.answers_part:
        one = replace(one, answers=tuple(there(one)))
    if not one.answers:
        return Verdict("support", "missing", "no_verifier")
    said = _said(one)
    if not said:
        return Verdict("support", "fail", "not_the_answer")
    if one.format in CLOSED or _labels(one, said) or _stands(one):
        return Verdict("support", "pass", "string")
    return Verdict("support", "fail", "answer_from_memory", said[0])


def _stands(one: Written) -> bool:
    """Whether an answer stands in a passage that is no noise; of a number, in words, too."""
    shown = _evidence(one)
    return bool(holds(shown, one.answers) or (one.format == "number" and _counted(shown, one.answers)))


def _labels(one: Written, said: Sequence[str]) -> bool:
    """Whether all that is known of the answer is a label, which stands in no passage, whatever it is wrapped in."""
    closed = {label.casefold() for label in one.labels}
    return all(answer.casefold() in closed or bare_polarity(answer) for answer in (*said, *one.answers))


def _said(one: Written) -> list[str]:
    """The aliases that the target gives: a label by itself, a yes or no first, others anywhere."""
    if one.format == "yes_no":
        given = words(one.target)[:1]
        says = polarity(one.target)
        return [answer for answer in one.answers if words(answer) == given or (says and polarity(answer) == says)]
    if one.format in CLOSED:
        return [answer for answer in one.answers if words(answer) == words(one.target)]
    if one.format == "number":
        return holds([one.target], one.answers) or _counted([one.target], one.answers)
    says = bare_polarity(concluded(one))
    return holds([concluded(one)], one.answers) or [answer for answer in one.answers if says and bare_polarity(answer) == says]


def _counted(texts: Sequence[str], answers: Sequence[str]) -> list[str]:
    """The answers that stand in the texts once English numerals are digits."""
    counts = {answer: fold_counts(answer) for answer in answers}
    there = set(holds(map(fold_counts, texts), [*counts.values()]))
    return [answer for answer, count in counts.items() if count in there]


def answered(one: Written, text: str) -> bool:
    """Whether another text than its target gives one of its answers, by the same rules."""
    return bool(_said(replace(one, target=text)))


def funnel(found: Iterable[Verified]) -> dict[str, object]:
    """Counts: examples, accepted, rejected by reason, and each check's verdicts."""
    reasons: Counter[str] = Counter()
    checks: dict[str, Counter[str]] = {name: Counter() for name in CHECKS}
    for one in found:
        reasons[one.reason or "accepted"] += 1
        for verdict in one.verdicts:
            checks[verdict.check][verdict.outcome] += 1
    accepted = reasons.pop("accepted", 0)
    return {
        "examples": accepted + reasons.total(), "accepted": accepted, "rejected": dict(reasons.most_common()),
        "checks": {name: dict(counts) for name, counts in checks.items()},
    }  # fmt: skip
