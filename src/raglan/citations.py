"""Citations: " [n]" before a sentence's closing punctuation, numbered densely in the order of first citation.

Which passage a sentence rests on is known from where it was generated; text is never searched for it. No character is ever
removed, so taking the marks out gives the text back.

Deviation from the authors' code, which replaces the last character of a sentence whatever it is, and leaves numbers beyond
the list of passages when a repeated sentence is skipped.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import TypeVar

__all__ = ["cite", "joined", "strip_citations"]

P = TypeVar("P", bound=Hashable)
CLOSING = re.compile(r"""(?:[.!?…。！？]+["'”’»›)\]）」』】]*)+\s*$""")
MARKS = re.compile(r" (?:\[\d+\])+")
NO_BLANK = re.compile("[぀-ヿ㐀-䶿一-鿿！-｠、-〿]")  # kana, han, full-width


def cite(segments: Sequence[tuple[str, Sequence[P]]]) -> tuple[str, list[P]]:
    """A text with its citations, and the passages in the order of their numbers: [n] is the n-th.

    Args:
        segments: sentences in order, each with the passages it cites, possibly none. An exactly repeated sentence is written
            once and cites what all its repetitions do; one without words is left out.
    """
    cited: dict[str, list[P]] = {}
    for text, passages in segments:
        if text.strip():
            cited.setdefault(text.strip(), []).extend(passages)
    order = list(dict.fromkeys(passage for passages in cited.values() for passage in passages))
    number = {passage: place for place, passage in enumerate(order, 1)}
    marked = [_marked(text, sorted({number[passage] for passage in passages})) for text, passages in cited.items()]
    return "".join(blank + text for blank, text in zip(_blanks(list(cited)), marked, strict=True)), order


def joined(sentences: Sequence[str]) -> str:
    """Sentences as one text, a blank between two unless the next opens in a script that has none."""
    return "".join(blank + sentence for blank, sentence in zip(_blanks(sentences), sentences, strict=True))


def _blanks(sentences: Sequence[str]) -> list[str]:
    """What stands before each sentence."""
    return ["" if not place or NO_BLANK.match(sentence) else " " for place, sentence in enumerate(sentences)]


def strip_citations(text: str) -> str:
    """A text without the marks that `cite` put there."""
    return MARKS.sub("", text)


def _marked(text: str, numbers: Sequence[int]) -> str:
    if not numbers:
        return text
    closing = CLOSING.search(text)
    end = closing.start() if closing else len(text)
    return text[:end] + " " + "".join(f"[{number}]" for number in numbers) + text[end:]
