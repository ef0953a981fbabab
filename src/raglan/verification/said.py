"""What a target says, read as strings: the answers that it holds, what it concludes, and the passages that it cites."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from raglan.metrics import found_answers
from raglan.refusals import declined
from raglan.text import FUNCTION_WORDS, answer_words, fold_numbers, words
from raglan.verification.written import Written

__all__ = [
    "BEGIN", "CLOSED", "END", "FINAL", "MARK", "REASONING", "SYNTAX", "bare_polarity", "cited", "concluded",
    "fold_counts", "holds", "lacking", "marked", "plain", "polarity", "said_phrase", "without_empty",
]  # fmt: skip

CLOSED = ("option", "label", "yes_no")  # answers that stand in no passage
SHORT = 3  # words of a mere yes or no
FINAL, BEGIN, END = "<ANSWER>:", "##begin_quote##", "##end_quote##"
SYNTAX = ("json", "code")  # formats in which brackets cite nothing, and marks of quotation quote nobody
_ONE = r"\d+(?:\s*(?:[-–—~～]|至|到)\s*\d+)?"
_NUMBERS = rf"\s*{_ONE}(?:\s*[,;，、；]\s*{_ONE})*\s*"
MARK = re.compile(rf"\[{_NUMBERS}\]|【{_NUMBERS}】|［{_NUMBERS}］")
_RANGE = re.compile(r"(\d+)(?:\s*(?:[-–—~～]|至|到)\s*(\d+))?")
_LONGEST = 100  # passages in a range that are counted up
_CELL = re.compile(r"(?<=\|)\s*[\[【［][^|]*[\]】］]\s*(?=\|)")
_TAGS = r"think|thinking|thought|reasoning"
_CLOSED_REASONING = re.compile(rf"^.*(?:</(?:{_TAGS})>|\[/THINK\]|◁/think▷)", re.DOTALL | re.IGNORECASE)
REASONING = re.compile(rf"</?(?:{_TAGS})>|\[/?THINK\]|◁/?think▷", re.IGNORECASE)
_SAYS = {
    **dict.fromkeys(("yes", "yeah", "yep", "是", "对", "對"), "yes"),
    **dict.fromkeys(("no", "nope", "not", "否", "不", "没", "沒"), "no"),
}
_OF = re.compile(r"\W*[对對](?=\w)(?!的|啊|呀)")
_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen"
)
_SMALL_NUMBERS = {word: value for value, word in enumerate(_SMALL.split())}
_TENS = {
    word: 10 * value
    for value, word in enumerate(["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], 2)
}
_UNITS = {"hundred": 100, "thousand": 1000, "million": 10**6}


def holds(texts: Iterable[str], answers: Sequence[str]) -> list[str]:
    """The answers that stand, as whole words and with numbers folded, in any of the texts."""
    folded = [fold_numbers(text) for text in texts]
    return [answer for answer in answers if found_answers(folded, [fold_numbers(answer)])]


def concluded(one: Written) -> str:
    """What a target says in the end: of a reasoning what stands behind its mark, since before it every reading is quoted."""
    return one.target.rpartition(FINAL)[2] if one.format == "reasoning" else one.target


def cited(one: Written) -> list[int]:
    """The numbers in a target's marks of citation, in their order; none where brackets are syntax."""
    if one.format in SYNTAX:
        return []
    text = _CELL.sub(" ", one.target) if one.format == "table" else one.target
    return [number for _, numbers in marked(text) for number in numbers]


def marked(text: str) -> list[tuple[str, list[int]]]:
    """The text cut at its marks: what stands before each run of them, with the run's numbers; at last what no mark follows."""
    parts: list[tuple[str, list[int]]] = []
    start = 0
    for mark in MARK.finditer(text):
        before = text[start : mark.start()]
        numbers = [number for found in _RANGE.findall(mark.group()) for number in _counted(*found)]
        if parts and not answer_words(before):
            parts[-1][1].extend(numbers)
        else:
            parts.append((before, numbers))
        start = mark.end()
    return [*parts, (text[start:], [])]


def _counted(first: str, last: str) -> list[int]:
    low, high = int(first), int(last or first)
    return [*range(low, high + 1)] if low <= high <= low + _LONGEST else [low, high]


def plain(text: str) -> str:
    """What a writer says, without a reasoning in tags of its own before it. One that never ends stays, and is no target."""
    return _CLOSED_REASONING.sub("", text).strip()


def polarity(text: str) -> str:
    """`yes` or `no` by the first word; empty for neither, as of 对于."""
    if _OF.match(text):
        return ""
    return _SAYS.get((words(text) or [""])[0], "")


def bare_polarity(text: str) -> str:
    """The polarity of what says nothing else: yes, 不是, "Yes, it is"."""
    return polarity(text) if len(words(text)) <= SHORT else ""


def fold_counts(text: str) -> str:
    """A text with English numerals as digits, too: twelve piers → 12 piers, twenty-one → 21, three hundred and five → 305."""
    found: list[str] = []
    total, part, joined = 0, -1, False
    for word in [*words(fold_numbers(text)), ""]:
        value = _SMALL_NUMBERS.get(word, _TENS.get(word, -1))
        fits = part < 0 or part % 100 == 0 or (part % 10 == 0 and part % 100 >= 20 and value < 10)
        if value >= 0 and fits:
            part, joined = max(part, 0) + value, False
        elif word in _UNITS and part >= 0:
            part, total = (part * 100, total) if word == "hundred" else (0, total + part * _UNITS[word])
        elif word == "and" and part >= 0 and not joined and (part % 100 == 0):
            joined = True
        else:
            found += [str(total + part)] if part >= 0 else []
            found += ["and"] if joined else []
            total, part, joined = 0, value, False
            found += [word] if value < 0 and word else []
    return " ".join(found)


def lacking(text: str) -> bool:
    """Whether a text says that something is missing: a refusal, or another word for it."""
    return declined(text) or bool(said_phrase(text, "lacks"))


def said_phrase(text: str, name: str) -> str:
    """The first of the phrases under a name that a text holds as whole words; empty if there is none."""
    said = f" {' '.join(answer_words(text))} "
    return next((phrase.strip() for phrase in _phrases(name) if phrase in said), "")


def without_empty(said: Sequence[str]) -> list[str]:
    """Words without those that say nothing of what is missing; of Chinese the signs that are left."""
    empty, run = _empty()
    signs = re.sub(r"(?<=[^\x00-\u02ff]) (?=[^\x00-\u02ff])", "", " ".join(said))
    return [word for word in answer_words(run.sub(" ", signs)) if word not in empty]


@cache
def _empty() -> tuple[frozenset[str], re.Pattern[str]]:
    told = _told()
    runs = sorted(told["empty_han"], key=len, reverse=True)
    return frozenset([*told["empty"].split(), *FUNCTION_WORDS]), re.compile("|".join(map(re.escape, runs)))


@cache
def _phrases(name: str) -> tuple[str, ...]:
    """The phrases of phrases.yaml under a name, as words between blanks."""
    return tuple(f" {' '.join(answer_words(phrase))} " for phrase in _told()[name])


@cache
def _told() -> dict[str, Any]:
    told: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("phrases.yaml").read_text(encoding="utf-8"))
    return told
