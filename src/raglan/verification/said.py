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
from raglan.text import answer_words, fold_numbers
from raglan.verification.written import Written

__all__ = [
    "BEGIN",
    "CLOSED",
    "END",
    "FINAL",
    "MARK",
    "YES_NO",
    "cited",
    "concluded",
    "holds",
    "lacking",
    "marked",
    "said_phrase",
]

CLOSED = ("option", "label", "yes_no")  # answers that stand in no passage
YES_NO = ("yes", "no", "是", "否", "不")
FINAL, BEGIN, END = "<ANSWER>:", "##begin_quote##", "##end_quote##"
_NUMBERS = r"\s*\d+(?:\s*[,;，、]\s*\d+)*\s*"
MARK = re.compile(rf"\[{_NUMBERS}\]|【{_NUMBERS}】")


def holds(texts: Iterable[str], answers: Sequence[str]) -> list[str]:
    """The answers that stand, as whole words and with numbers folded, in any of the texts."""
    folded = [fold_numbers(text) for text in texts]
    return [answer for answer in answers if found_answers(folded, [fold_numbers(answer)])]


def concluded(one: Written) -> str:
    """What a target says in the end: of a reasoning what stands behind its mark, since before it every reading is quoted."""
    return one.target.rpartition(FINAL)[2] if one.format == "reasoning" else one.target


def cited(text: str) -> list[int]:
    """The numbers in its marks of citation, in their order."""
    return [number for _, numbers in marked(text) for number in numbers]


def marked(text: str) -> list[tuple[str, list[int]]]:
    """The text cut at its marks: what stands before each run of them, with the run's numbers; at last what no mark follows."""
    parts: list[tuple[str, list[int]]] = []
    start = 0
    for mark in MARK.finditer(text):
        before = text[start : mark.start()]
        numbers = [int(number) for number in re.findall(r"\d+", mark.group())]
        if parts and not answer_words(before):
            parts[-1][1].extend(numbers)
        else:
            parts.append((before, numbers))
        start = mark.end()
    return [*parts, (text[start:], [])]


def lacking(text: str) -> bool:
    """Whether a text says that something is missing: a refusal, or another word for it."""
    return declined(text) or bool(said_phrase(text, "lacks"))


def said_phrase(text: str, name: str) -> str:
    """The first of the phrases under a name that a text holds as whole words; empty if there is none."""
    said = f" {' '.join(answer_words(text))} "
    return next((phrase.strip() for phrase in _phrases(name) if phrase in said), "")


@cache
def _phrases(name: str) -> tuple[str, ...]:
    """The phrases of phrases.yaml under a name, as words between blanks."""
    return tuple(f" {' '.join(answer_words(phrase))} " for phrase in _told()[name])


@cache
def _told() -> dict[str, Any]:
    told: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("phrases.yaml").read_text(encoding="utf-8"))
    return told
