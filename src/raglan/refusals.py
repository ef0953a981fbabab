"""Whether an answer declines: one list of refusals, English and Chinese in both scripts, for training data and for evaluation.

    abstained   a listed refusal in the first sentence, and no alias of an answer beside it
    declined    a listed refusal anywhere, whatever stands beside it

Some words decline only where nothing else is said ("Unknown") or at the sentence's end (没有说), since they begin other things.

An alias counts only outside the refusal: 不知道 ("I don't know") holds 知道 and is an abstention all the same. An alias that
is a refusal itself, as the label "not enough information", is an answer where it stands. Numerals are folded: 一九九八年 is
1998年.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import yaml

from raglan.text import answer_words, fold_numbers, sentences

__all__ = ["abstained", "beside", "declined", "refusals_in"]

_CUT = "\0"  # stands where the refusal stood: no alias reaches over it


def abstained(prediction: str, answers: Sequence[str] = ()) -> bool:
    """Whether an answer declines. An empty answer is no abstention: nobody declined."""
    said = sentences(prediction)
    if not said:
        return False
    first, declined = _without_refusals(_words(said[0]))
    if not declined:
        return False
    others = _words(" ".join(said[1:]))
    beside, whole = _padded([*first, _CUT, *others]), _padded([*_words(said[0]), _CUT, *others])
    aliases = [own for answer in answers if (own := _words(answer))]
    return not any(_padded(own) in (whole if _without_refusals(own)[1] else beside) for own in aliases)


def declined(text: str) -> bool:
    """Whether a text says of anything that it is not told."""
    return any(refusals_in(sentence) for sentence in sentences(text))


def refusals_in(text: str) -> list[str]:
    """The listed refusals that a text holds, as words between blanks."""
    return _without_refusals(_words(text))[1]


def beside(text: str) -> list[str]:
    """A text's words without its refusals."""
    return [word for word in _without_refusals(_words(text))[0] if word != _CUT]


def _without_refusals(words: list[str]) -> tuple[list[str], list[str]]:
    """(the words, cut where a refusal stood; the refusals)."""
    if words in _refusals("alone"):
        return [_CUT], [" ".join(words)]
    ends = next((p for p in _refusals("ends") if words[-len(p) :] == p), None)
    if ends is not None:
        before, told = _without_refusals(words[: -len(ends)])
        return [*before, _CUT], [*told, " ".join(ends)]
    kept: list[str] = []
    found: list[str] = []
    place = 0
    while place < len(words):
        phrase = next((p for p in _refusals("en", "zh") if words[place : place + len(p)] == p), None)
        kept.append(words[place] if phrase is None else _CUT)
        found += [] if phrase is None else [" ".join(phrase)]
        place += 1 if phrase is None else len(phrase)
    return kept, found


@cache
def _refusals(*lists: str) -> list[list[str]]:
    """The phrases of these lists as words, the longest first."""
    told = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    phrases = [answer_words(phrase) for phrase in (one for name in lists for one in told[name])]
    return sorted(phrases, key=len, reverse=True)


def _words(text: str) -> list[str]:
    return answer_words(fold_numbers(text))


def _padded(words: Sequence[str]) -> str:
    return f" {' '.join(words)} "
