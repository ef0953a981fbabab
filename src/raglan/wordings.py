"""What a regular expression may stand for, written out: the wordings of CuratedTrec's answers that no passage matches.

Every choice is taken both ways, x? and x* are nothing or x, x+ is x, and what is no fixed letter (. \\d [^a]) is a blank, as
Lewis et al. 2020 (appendix on CuratedTrec) describe it; runs of white space are one blank. The paper writes all of them; here
there is a limit, since a pattern of ten optional words has a thousand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice, product
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

from raglan.text import pattern

__all__ = ["wordings"]

MOST = 16
REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT)
NOTHING = (_constants.AT, _constants.ASSERT, _constants.ASSERT_NOT)
CLASS = 4  # a class of so many letters is a choice, a larger one a blank


def wordings(expression: str, *, most: int = MOST) -> list[str]:
    """At most `most` different texts, the first choices first. Raises CorpusError: no regular expression."""
    pattern(expression)
    texts = (" ".join(text.split()) for text in _sequence(_parser.parse(expression, re.IGNORECASE | re.MULTILINE)))
    return list(islice(dict.fromkeys(text for text in islice(texts, most * most) if text), most))


def _sequence(items: Any) -> Iterator[str]:
    """All texts of a sequence of parts; `product` would hold each part's texts, of which there are few."""
    parts = [list(islice(_part(kind, value), MOST)) for kind, value in items]
    yield from map("".join, product(*parts))


def _part(kind: Any, value: Any) -> Iterator[str]:
    if kind is _constants.LITERAL:
        yield chr(value)
    elif kind is _constants.BRANCH:
        for choice in value[1]:
            yield from _sequence(choice)
    elif kind in (_constants.SUBPATTERN, _constants.ATOMIC_GROUP):
        yield from _sequence(value[-1] if kind is _constants.SUBPATTERN else value)
    elif kind in REPEATS:
        yield from _repeated(*value)
    elif kind is _constants.IN:
        yield from _choice(value)
    else:
        yield "" if kind in NOTHING else " "


def _repeated(least: int, most: Any, items: Any) -> Iterator[str]:
    if least == 0:
        yield ""  # once: only so many texts of a part are taken
    if most:
        yield from (text * max(1, int(least)) for text in _sequence(items))


def _choice(members: Any) -> Iterator[str]:
    letters = [chr(value) for kind, value in members if kind is _constants.LITERAL]
    yield from letters if len(letters) == len(members) <= CLASS else [" "]
