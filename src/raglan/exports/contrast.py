"""Pairs of answers to one prompt, of which the first is better, for preference training.

    supported/unsupported     a value that no passage shown holds, in place of the true one
    gold/counterfactual       the false value that a passage shown holds
    abstain/hallucinate       where no passage answers: an answer as if one did
    answer/over-abstain       where passages answer: a refusal
    right/wrong_citation      the same words, marked with passages that are noise

Neither side is more than twice as long as the other, so that length teaches nothing. Equal examples give equal pairs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

from raglan.exports.rules import alike
from raglan.exports.synthetic import Synthetic, wordings
from raglan.perturb import swap
from raglan.perturb.values import replaced
from raglan.refusals import abstained
from raglan.text import words
from raglan.verification.said import holds

__all__ = ["pairs_of"]

MARK = re.compile(r"\[(\d+)\]")
Pair = tuple[str, str, str]  # chosen, rejected, which of rules.PAIRS


def pairs_of(one: Synthetic) -> Iterator[Pair]:
    """All pairs that an example gives, each of another kind."""
    if one.relation == "R5":
        found = [_hallucinated(one)] if one.policy in ("", "abstain") else []
    else:
        found = [_unsupported(one), _counterfactual(one), _over_abstained(one), _wrongly_cited(one)]
    for name, rejected in filter(None, found):
        if rejected.strip() != one.target.strip() and alike(one.target, rejected):
            yield one.target, rejected, name


def _unsupported(one: Synthetic) -> tuple[str, str] | None:
    if one.target in one.labels:
        others = [label for label in one.labels if label != one.target]
        return ("supported/unsupported", others[_number(one, "label") % len(others)]) if others else None
    answers = one.example.answers
    if not holds([one.target], answers):
        return None
    shown = "\n".join([one.example.query, *(passage.text for passage in one.passages)])
    made = swap(answers, seed=f"{one.example.id} unsupported", avoid=shown)
    rejected = replaced(one.target, made)
    return None if not made or holds([rejected], answers) else ("supported/unsupported", rejected)


def _counterfactual(one: Synthetic) -> tuple[str, str] | None:
    """What the answer would be if the passage with the false value were believed."""
    answers = one.example.answers
    for slot in one.slots:
        if slot.get("kind") == "counterfactual" and (value := str(slot.get("value") or "")) and holds([one.target], answers):
            rejected = replaced(one.target, dict.fromkeys(answers, value))
            if not holds([rejected], answers) and holds([rejected], [value]):
                return "gold/counterfactual", rejected
    return None


def _hallucinated(one: Synthetic) -> tuple[str, str] | None:
    """A false value of the known answer's type, said as if it had been read; without one, a sentence of what was shown."""
    if not abstained(one.target):
        return None
    shown = "\n".join([one.example.query, *(passage.text for passage in one.passages)])
    made = swap(one.example.answers, seed=f"{one.example.id} hallucinated", avoid=shown)
    if not made:
        return None
    value = next(iter(made.values()))
    return "abstain/hallucinate", _nearest(one, [text.format(value=value) for text in wordings("hallucinates", one.language)])


def _over_abstained(one: Synthetic) -> tuple[str, str] | None:
    if abstained(one.target, one.example.answers):
        return None
    return "answer/over-abstain", _nearest(one, wordings("over_abstains", one.language))


def _wrongly_cited(one: Synthetic) -> tuple[str, str] | None:
    noise = [number for number, slot in enumerate(one.slots, 1) if slot.get("role") == "noise"]
    cited = list(dict.fromkeys(int(number) for number in MARK.findall(one.target)))
    if not cited or len(noise) < len(cited) or any(number in noise or number > len(one.slots) for number in cited):
        return None
    start = _number(one, "citation") % len(noise)
    wrong = dict(zip(cited, [*noise[start:], *noise[:start]], strict=False))
    return "right/wrong_citation", MARK.sub(lambda mark: f"[{wrong[int(mark.group(1))]}]", one.target)


def _nearest(one: Synthetic, texts: list[str]) -> str:
    """The text whose length is nearest to the target's."""
    wanted = len(words(one.target))
    return min(texts, key=lambda text: abs(len(words(text)) - wanted))


def _number(one: Synthetic, purpose: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{one.example.id} {purpose}".encode(), digest_size=8).digest(), "big")
