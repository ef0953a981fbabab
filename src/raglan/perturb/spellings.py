"""Where a text says a date, a year or an amount in another spelling than an answer does: 12 March 1873 is March 12, 1873.

    dates    12 March 1873 · March 12th, 1873 · 12 Mar. 1873 · 1873-03-12 · 12/3/1873, read both ways · 1873年3月12日
    years    1998 · 1998年 · 98年 · '98 · 民国八十七年, and what else counts years from its beginning (words.yaml, `eras`)
    amounts  $3.5 million · 3,500,000 · 350万

A place says the same where all that the answer tells of day, month and year is told there, too, and agrees. What only may mean
the same (98年 are ninety-eight years, too) is taken for it: a passage that may hold the truth is no false one. 十八年 and
二十年, said with 十, are counts of years alone: of a year its digits are told, as in 一八年.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache

from raglan.perturb.guard import numeric
from raglan.perturb.words import WORDS
from raglan.text import fold_numbers, placed_words

__all__ = ["respelled"]

_MONTHS = {month[:3].lower(): number for number, month in enumerate(WORDS["months"], 1)}
_ERAS: dict[str, int] = WORDS["eras"]
_MONTH = rf"(?P<month>(?:{'|'.join(WORDS['months'])}|{'|'.join(month[:3] for month in WORDS['months'])}|Sept)\b\.?)"
_DAY = r"(?<!\d)(?P<day>\d{1,2})(?:st|nd|rd|th)?(?!\d)"
_YEAR = r"(?P<year>\d{4})(?!\d)"
_SIGNS = "〇零一二两兩三四五六七八九十百"
_NUMBER = rf"(?:[0-9０-９]{{1,4}}|[{_SIGNS}]{{1,4}})"
_ERA = rf"(?P<era>{'|'.join(_ERAS)})\s*(?P<count>{_NUMBER}|元)年"
_YEAR_SIGNS = "|".join(f"{signs}{{{count}}}" for count in (4, 2) for signs in ("[0-9０-９]", "[〇零一二三四五六七八九]"))
_HAN_YEAR = rf"(?:{_ERA}|(?<![0-9０-９{_SIGNS}])(?P<year>{_YEAR_SIGNS})年(?!代))"
_HAN_DAY = rf"(?P<month>{_NUMBER})月(?P<day>{_NUMBER})[日号號]"
_DATES = [
    re.compile(words, re.IGNORECASE)
    for words in (
        rf"{_DAY}(?:\s+of)?\s+{_MONTH}(?:,?\s+{_YEAR})?",
        rf"\b{_MONTH}\s+(?:the\s+)?{_DAY}(?:,?\s+{_YEAR})?",
        rf"\b{_MONTH},?\s+(?:of\s+)?{_YEAR}",
        r"(?<!\d)(?P<year>\d{4})(?P<mark>[-/.])(?P<month>\d{1,2})(?P=mark)(?P<day>\d{1,2})(?!\d)",
        r"(?<!\d)(?P<day>\d{1,2})(?P<mark>[-/.])(?P<month>\d{1,2})(?P=mark)(?P<year>\d{4}|\d\d)(?!\d)",
        r"(?<!\d)(?P<month>\d{1,2})(?P<mark>[-/.])(?P<day>\d{1,2})(?P=mark)(?P<year>\d{4}|\d\d)(?!\d)",
        rf"{_HAN_YEAR}(?:{_HAN_DAY})?",
        rf"{_HAN_YEAR}(?P<month>{_NUMBER})月",
        _HAN_DAY,
        r"(?<![\w.,])['’](?P<year>\d\d)(?![\d\w])",
        r"(?<![\d.,])(?P<year>1\d{3}|20\d\d)(?![\d,]\d|\.\d|\d)",
    )
]
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_AMOUNT = re.compile(rf"(?<![\d.,])(\d[\d,]*(?:\.\d+)?)(?:\s*({'|'.join(_SCALES)})\b)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Date:
    """What a place tells; a year of two digits is below 100."""

    year: int | None
    month: int | None
    day: int | None

    def tells(self, wanted: _Date) -> bool:
        """Whether all that is wanted is told, and agrees."""
        pairs = ((self.month, wanted.month), (self.day, wanted.day))
        return all(theirs is None or own == theirs for own, theirs in pairs) and self._in_year(wanted.year)

    def _in_year(self, year: int | None) -> bool:
        return year is None or (self.year is not None and self.year in (year, year % 100))


def respelled(text: str, answers: Sequence[str]) -> list[str]:
    """The places of a text that say what an answer says, in other words than any answer has; each spelling once."""
    told = [answer for answer in answers if any(letter.isdigit() for letter in fold_numbers(answer))]
    dates = [date for answer in told if (date := _whole_date(answer)) is not None]
    amounts = {amount for answer in told if (amount := _whole_amount(answer)) is not None}
    found = [place for place, date in _dated(text) if any(date.tells(wanted) for wanted in dates)] if dates else []
    found += [place for place, amount in _amounts(text) if amount in amounts] if amounts else []
    known = {_words(answer) for answer in answers}
    return [place for place in dict.fromkeys(found) if _words(place) not in known]


@lru_cache(maxsize=1 << 12)
def _whole_date(answer: str) -> _Date | None:
    """What an answer tells that is a date or a year and nothing else."""
    dates = [(len(place), date) for place, date in _dated(answer)]
    return max(dates, key=lambda one: one[0])[1] if dates and numeric(answer) else None


@lru_cache(maxsize=1 << 12)
def _whole_amount(answer: str) -> Decimal | None:
    """What an answer with a scale, or of four digits and more that are no year, amounts to."""
    amounts = list(_amounts(answer))
    if len(amounts) != 1 or _whole_date(answer) is not None:
        return None
    return amounts[0][1] if amounts[0][1] >= 1000 else None


def _dated(text: str) -> Iterator[tuple[str, _Date]]:
    for pattern in _DATES:
        for mark in pattern.finditer(text):
            told = mark.groupdict()
            year = _number(told["year"]) if told.get("year") else None
            if told.get("era"):
                year = _ERAS[told["era"]] + (1 if told["count"] == "元" else _number(told["count"]) or 0)
            yield mark.group(), _Date(year, _month(told.get("month")), _number(told.get("day")))


def _amounts(text: str) -> Iterator[tuple[str, Decimal]]:
    """Amounts in a text, numerals of other scripts folded first; such a place is told as it is folded."""
    for mark in _AMOUNT.finditer(fold_numbers(text)):
        scale = _SCALES[mark[2].lower()] if mark[2] else 0
        yield mark.group(), Decimal(mark[1].replace(",", "")).scaleb(scale)


def _month(said: str | None) -> int | None:
    if not said:
        return None
    return _MONTHS.get(said[:3].lower()) or _number(said)


def _number(said: str | None) -> int | None:
    """A numeral of either script, before 年 as it stands in dates."""
    folded = fold_numbers(f"{said}年")[:-1] if said else ""
    return int(folded) if folded.isdecimal() else None


def _words(text: str) -> tuple[str, ...]:
    return tuple(placed.word for placed in placed_words(text))
