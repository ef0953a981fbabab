"""A target that answers the part that is shown: what is there is known, what is withheld is not told, and it says what lacks.

Of the answers those that stand in the gold that is shown are there, all others are withheld. An alias that only words another
("a man called Odo" of Odo) is none of these; a number of the withheld answers and of the facts behind the first, which stands
nowhere that is shown, is.
"""

from __future__ import annotations

from collections.abc import Sequence

from raglan.perturb.guard import closed_label
from raglan.text import cased_words, content_terms, fold_numbers, placed_words
from raglan.verification.said import holds, lacking
from raglan.verification.written import Written

__all__ = ["misses", "there"]


def there(one: Written) -> list[str]:
    """The answers that the gold shown holds."""
    return holds(_gold(one), _known(one))


def misses(one: Written) -> tuple[str, str]:
    """What a partial target does that it must not, with the detail; empty if nothing."""
    known, held = _known(one), there(one)
    if known and len(held) == len(known):
        return "gold_answers_all", held[0]
    if told := _told(one, [answer for answer in known if answer not in held], held):
        return "withheld_told", told
    return ("", "") if lacking(one.target) else ("missing_not_said", "")


def _told(one: Written, withheld: Sequence[str], held: Sequence[str]) -> str:
    """What the target says of the part that is not shown."""
    shown = "\n".join([one.query, *_gold(one)])
    for answer in holds([one.target], withheld):
        if not holds([answer], held) or _adds(answer, shown):
            return answer
    known = _numbers(shown) | _numbers(" ".join(one.facts[:1]))
    hidden = _numbers(" ".join([*one.facts[1:], *withheld])) - known
    return min(hidden & _numbers(one.target), default="")


def _adds(alias: str, shown: str) -> bool:
    """Whether an alias that holds what is there says more than in other words: a number, a name, or anything in Chinese."""
    names = {word.lower() for word in cased_words(alias) if not word.islower()}
    return any(term in names or term[0].isdigit() for term in {*content_terms(alias)} - {*content_terms(shown)})


def _gold(one: Written) -> list[str]:
    return [f"{passage.title}\n{passage.text}" for passage in one.passages if passage.role == "gold"]


def _known(one: Written) -> list[str]:
    return [answer for answer in one.answers if not closed_label(answer)]


def _numbers(text: str) -> set[str]:
    return {placed.word for placed in placed_words(fold_numbers(text)) if placed.word[0].isdigit()}
