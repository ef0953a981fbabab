"""A sentence with its span taken out, cut down so far that words alone no longer find it.

    overlap = |content terms of the question that the sentence has| / |content terms of the sentence|    at most 0.6

The window grows from the gap to both sides, a word at a time (in Chinese a character or numeral), as long as the overlap
allows; what is left out is marked. A question with all words of its sentence would be answered by BM25 and teach a retriever
nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from itertools import pairwise

from raglan.text import Placed, content_terms, placed_words

__all__ = ["keywords", "overlap", "window"]

FEWEST = 2  # content terms beside the gap
LOOSE = " ,;:，；、：—–-"
ENDS = " .。!?！？…"
CLOSE = "”\"'」』)）"


def overlap(query: str, terms: Sequence[str]) -> float:
    """The share of a sentence's content terms that stand in the question."""
    return len(set(content_terms(query)) & set(terms)) / len(terms) if terms else 0.0


def window(
    sentence: str, terms: Sequence[str], start: int, end: int, *, filler: str, most: float, beside: Collection[str] = (),
    cut: str = "…",
) -> str | None:  # fmt: skip
    """The sentence around [start, end), with `filler` there; None where too little can stay.

    Args:
        terms: the sentence's content terms.
        most: share of them that may stay.
        beside: content terms that the question has anyway.
        cut: what stands for words left out.
    """
    wanted, allowed = set(terms), int(most * len(terms))
    used = (set(beside) | set(content_terms(filler))) & wanted
    placed = _placed(sentence)
    told = _occurrences(placed, wanted)
    before = sorted({word.start for word in placed if word.end <= start})
    after = sorted({word.end for word in placed if word.start >= end}, reverse=True)
    left, right = start, end

    def kept(left: int, right: int) -> set[str]:
        return {term for a, b, term in told if (left <= a and b <= start) or (end <= a and b <= right)}

    while before or after:
        if after:
            if len(used | kept(left, after[-1])) > allowed:
                after = []
            else:
                right = after.pop()
        if before:
            if len(used | kept(before[-1], right)) > allowed:
                before = []
            else:
                left = before.pop()
    left, right = _trimmed(placed, told, (left, start, end, right))
    if len(kept(left, right)) < FEWEST:
        return None
    return _said(sentence, (left, start, end, right), filler, cut)


@lru_cache(maxsize=8192)
def _placed(sentence: str) -> tuple[Placed, ...]:
    return tuple(placed_words(sentence))


def _occurrences(placed: Sequence[Placed], wanted: Collection[str]) -> list[tuple[int, int, str]]:
    """(start, end, term) of each content term in the sentence: words, and pairs of adjacent characters."""
    found = [(word.start, word.end, word.word) for word in placed if word.word in wanted]
    pairs = ((a.start, b.end, a.word + b.word) for a, b in pairwise(placed) if a.end == b.start)
    return found + [pair for pair in pairs if pair[2] in wanted]


def _trimmed(placed: Sequence[Placed], told: Sequence[tuple[int, int, str]], at: tuple[int, int, int, int]) -> tuple[int, int]:
    """Without function words next to a cut; a side that was not cut stays as it is."""
    left, start, end, right = at
    if any(word.start < left for word in placed):
        left = min([a for a, b, _ in told if left <= a and b <= start], default=start)
    if any(word.end > right for word in placed):
        right = max([b for a, b, _ in told if end <= a and b <= right], default=end)
    return left, right


def _said(sentence: str, at: tuple[int, int, int, int], filler: str, cut: str) -> str:
    left, start, end, right = at
    whole = not sentence[:left].strip(LOOSE), not sentence[right:].strip(LOOSE + ENDS + CLOSE)
    gap = " " if " " in sentence else ""
    text = f"{sentence[left:start]}{filler}{sentence[end:right]}"
    return f"{'' if whole[0] else cut + gap}{text.strip()}{'' if whole[1] else gap + cut}"


def keywords(text: str, *, least: int = 0) -> list[str]:
    """The words of a text that are no function words, in their order; in Chinese runs between such words."""
    found: list[str] = []
    last = -1
    terms = set(content_terms(text))
    for word in placed_words(text):
        if word.word not in terms and not any(word.word in term for term in terms if len(term) == 2 and len(word.word) == 1):
            continue
        piece = text[word.start : word.end]
        if word.start == last and len(word.word) == 1:
            found[-1] += piece
        else:
            found.append(piece)
        last = word.end
    return [word for word in found if len(word) >= least]
