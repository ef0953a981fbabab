"""What passages that contradict each other say, and whether a target names all of it, with passages that tell it.

    readings     of gold: the answers, or numbers of answers, that only some of it holds · of a made twin: its false value ·
                 equal ones are one reading
    one_sided    a reading of which no value stands in what the target concludes
    not cited    marks are there, or the format asks for them, and a reading stands neither before nor behind a mark of its own
    unnamed      sentences without any mark that speak of no source

Where only strings are looked at, a conflict whose answers do not tell its passages apart has no known readings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from raglan.perturb.guard import closed_label
from raglan.text import fold_numbers
from raglan.verification.said import BEGIN, END, cited, concluded, holds, marked, said_phrase
from raglan.verification.written import Shown, Written

__all__ = ["CONFLICT", "Reading", "citable", "one_sided", "readings", "uncited", "unnamed"]

CONFLICT = "R6"
NUMBER = re.compile(r"\d+")
PROSE = ("", "sentence", "paragraph", "cited", "list", "notes", "reasoning", "yes_no")  # formats that can name who says what


@dataclass(frozen=True, slots=True)
class Reading:
    """What some passages say: its values, any of which names it, and the numbers of the passages, from 1."""

    values: tuple[str, ...]
    passages: frozenset[int]


def readings(one: Written) -> list[Reading] | None:
    """What the passages hold against each other; None where strings do not tell of each, or all say the same."""
    answers = _tellings(one)
    told = {number: _values(passage, answers) for number, passage in enumerate(one.passages, 1)}
    needed = [number for number, passage in enumerate(one.passages, 1) if passage.role == "gold" or passage.false]
    if not all(told[number] for number in needed):
        return None
    shared = set.intersection(*(set(told[number]) for number in needed)) if needed else set()
    told = {number: [value for value in own if value not in shared] or own for number, own in told.items()}
    found: list[Reading] = []
    for number in [*needed, *(number for number in told if number not in needed and told[number])]:
        own = Reading(tuple(told[number]), frozenset([number]))
        same = next((known for known in found if set(known.values) & set(own.values)), None)
        if same is None and number not in needed:
            continue  # support that holds what no evidence does is no reading of it
        if same is not None:
            found.remove(same)
            own = Reading(tuple(dict.fromkeys((*same.values, *own.values))), same.passages | own.passages)
        found.append(own)
    return sorted(found, key=lambda said: min(said.passages)) if len(found) > 1 else None


def _tellings(one: Written) -> list[str]:
    """The answers, and the numbers in them that the question does not have: "in 1801" is told by 1801."""
    answers = [answer for answer in one.answers if not closed_label(answer)]
    asked = set(NUMBER.findall(fold_numbers(one.query)))
    numbers = [number for answer in answers for number in NUMBER.findall(fold_numbers(answer)) if number not in asked]
    return list(dict.fromkeys([*answers, *numbers]))


def _values(passage: Shown, answers: Sequence[str]) -> list[str]:
    if passage.false:
        return [*passage.false]
    return holds([passage.title, passage.text], answers) if passage.role != "noise" else []


def one_sided(one: Written, said: Sequence[Reading]) -> str:
    """A value of the first reading that the target does not give; empty if it gives all."""
    return next((reading.values[0] for reading in said if not holds([concluded(one)], reading.values)), "")


def citable(said: Sequence[Reading]) -> frozenset[int]:
    """The passages that tell a reading, noise or not."""
    return frozenset().union(*(reading.passages for reading in said))


def uncited(one: Written, said: Sequence[Reading]) -> str:
    """A value of the first reading that stands by no mark of a passage that tells it; empty if all do, or nothing asks for it.

    Marks stand behind what they are for, or before it, but through one text alike.
    """
    parts = marked(one.target.replace(BEGIN, " ").replace(END, " "))
    if not cited(one) and one.format != "cited":
        return ""
    behind = list(parts)
    before = [(text, numbers) for (text, _), (_, numbers) in zip(parts[1:], parts[:-1], strict=True)]
    lacking = [_uncited(way, said) for way in (behind, before)]
    return "" if "" in lacking else lacking[0]


def _uncited(parts: Sequence[tuple[str, list[int]]], said: Sequence[Reading]) -> str:
    for reading in said:
        if not any(reading.passages.intersection(numbers) and holds([text], reading.values) for text, numbers in parts):
            return reading.values[0]
    return ""


def unnamed(one: Written) -> bool:
    """Whether sentences say who says what in no way at all: no mark, no title of a passage, no word for a source."""
    if one.format not in PROSE or cited(one):
        return False
    titles = [passage.title for passage in one.passages if passage.title]
    return not holds([one.target], titles) and not said_phrase(one.target, "attributes")
