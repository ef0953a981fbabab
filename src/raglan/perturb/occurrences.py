"""In how many passages some words stand side by side, counted when it is asked.

Which answers a run will look for is not known beforehand: an endpoint has not yet been asked for them. So the words of the
passages are kept as numbers, four bytes a word. An answer whose rarest word is rare enough needs no search; for others it takes
about a millisecond for every million words, once.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from raglan.records import Passage
from raglan.text import placed_words, words

__all__ = ["Occurrences"]

GAP = -1  # stands between two texts
_GROUPED = re.compile(r"\d,\d")


class Occurrences:
    """Of words in these passages, titles included, numerals folded.

    Attributes:
        passages: how many there are.
    """

    def __init__(self, passages: Iterable[Passage]):
        self._numbers: dict[str, int] = {}
        told, starts, holding = array("i"), array("q"), array("i")
        for passage in passages:
            starts.append(len(told))
            for text in (passage.title, passage.text):
                told.extend(self._numbers.setdefault(word, len(self._numbers)) for word in _words(text))
                told.append(GAP)
            holding.extend([0] * (len(self._numbers) - len(holding)))
            for number in set(told[starts[-1] :]) - {GAP}:
                holding[number] += 1
        self.passages = len(starts)
        self._words = np.frombuffer(told, np.int32) if told else np.empty(0, np.int32)
        self._starts = np.frombuffer(starts, np.int64) if starts else np.empty(0, np.int64)
        self._holding = holding  # of each word
        self._counted: dict[tuple[int, ...], int] = {}

    def more_than(self, most: float, wanted: Sequence[str]) -> bool:
        """Whether more than `most` passages hold these words in this order, with nothing between them."""
        numbers = tuple(self._numbers.get(word, GAP) for word in wanted)
        if not numbers or GAP in numbers or min(self._holding[number] for number in numbers) <= most:
            return False
        if numbers not in self._counted:
            self._counted[numbers] = self._count(numbers)
        return self._counted[numbers] > most

    def _count(self, numbers: tuple[int, ...]) -> int:
        if len(numbers) == 1:
            return self._holding[numbers[0]]
        rarest = min(range(len(numbers)), key=lambda place: self._holding[numbers[place]])
        begins: npt.NDArray[np.int64] = np.flatnonzero(self._words == numbers[rarest]) - rarest
        begins = begins[(begins >= 0) & (begins + len(numbers) <= len(self._words))]
        for place, number in enumerate(numbers):
            begins = begins[self._words[begins + place] == number]
        return len(np.unique(np.searchsorted(self._starts, begins, "right")))


def _words(text: str) -> list[str]:
    """As `placed_words` cuts; where no numeral has to be folded, in a fifth of the time."""
    plain = text.isascii() and not _GROUPED.search(text)
    return words(text) if plain else [placed.word for placed in placed_words(text)]
