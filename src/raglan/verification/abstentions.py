"""What an abstention must do and must not: name what is missing, and guess nothing; and what only sounds like one.

    missing_not_said   beside the refusal nothing stands but words for passages: "No answer."
    guesses            a word of somebody who guesses, or, in a sentence that declines nothing, a number or a name that neither
                       the question nor a passage has

"does not contain" may be said of a treaty: a refusal that can be said of anything declines only if it speaks of passages, or if
nothing else is said.
"""

from __future__ import annotations

import re

from raglan.refusals import abstained, beside, refusals_in
from raglan.text import FUNCTION_WORDS, cased_words, fold_numbers, sentences, words
from raglan.verification.said import lacking, said_phrase, without_empty
from raglan.verification.written import Written

__all__ = ["declines", "lacks"]

# of refusals: what may be said of anything
_OF_ANYTHING = re.compile(
    "(?:do|does|dont|doesnt|not) (?!enough|answerable)|no mention|"
    "(?:未|[没沒] 有) (?!答 案|足|相|信|資 訊)|不 (?:清|知|[确確] 定)"
)
_NUMBER = re.compile(r"\d+")


def declines(one: Written) -> bool:
    """Whether a target declines to answer, where it is not meant to."""
    if not abstained(one.target, one.answers):
        return False
    first = sentences(one.target)[0]
    if any(not _OF_ANYTHING.match(f"{phrase} ") for phrase in refusals_in(first)):
        return True
    return bool(said_phrase(first, "passages")) or not _left(one.target)


def lacks(one: Written) -> tuple[str, str]:
    """What an abstention does that it must not, with the detail; empty if nothing."""
    if not _left(one.target):
        return "missing_not_said", ""
    guess = said_phrase(one.target, "guesses")
    if guess and not said_phrase(one.query, "guesses"):
        return "guesses", guess
    told = " ".join([one.query, *one.history, *(f"{passage.title} {passage.text}" for passage in one.passages), ""])
    told += " ".join(map(str, range(len(one.passages) + 1)))  # which passages, and how many, may be said
    new = next((word for text in sentences(one.target) if not lacking(text) for word in _new(text, told)), "")
    return ("guesses", new) if new else ("", "")


def _left(text: str) -> list[str]:
    """What is said beside refusals and words for passages; a question word says what is missing."""
    return without_empty(beside(text)) or [phrase for phrase in [said_phrase(text, "asked")] if phrase]


def _new(text: str, told: str) -> list[str]:
    """Numbers and names of a sentence that stand nowhere before."""
    known, folded = {*words(fold_numbers(told)), *FUNCTION_WORDS}, fold_numbers(text)
    names = [word for word in cased_words(folded)[1:] if word[0].isupper() and len(word) > 2]
    return [
        word for word in (*_NUMBER.findall(folded), *names) if word.lower() not in known and word.lower() not in FUNCTION_WORDS
    ]
