"""What is known of a question's answer decides what is measured on it; and abstention, where some have none.

    answered       `answers` holds some            EM, F1 and their like, answer recall; to decline is over-abstention
    unanswerable   `answers` is there and empty    the passages do not tell: declining is right, anything else hallucination
    open           there is no `answers`           what needs no gold answer, and a judge

All are answered by the system, and what an answer takes, cites, quotes and whether it declines is over all of them. Figures of
abstention are those of `robustness.abstention`. Precision and F1 are of all answers together; where leaving a question out
leaves nobody who abstains, precision is taken as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from raglan.metrics import Interval, Whole
from raglan.recipe import EvaluateSettings
from raglan.records import Example
from raglan.refusals import abstained

__all__ = [
    "ABSTENTION_TOGETHER",
    "abstention_measures",
    "abstention_whole",
    "computes_nothing",
    "kinds",
    "kinds_text",
    "uncomputed",
]

ABSTENTION_TOGETHER = ("abstention_precision", "abstention_f1")
NO_GOLD = ("citations", "quotes", "distinct_1", "distinct_2", "distinct_3", "declined")  # metrics that need no answer
READ = ("truncated", "unfinished")  # measured of every answer
Measures = dict[str, Callable[[str, Example], float]]
Rows = Sequence[Mapping[str, Any]]


def kinds(rows: Rows) -> dict[str, int]:
    """How many questions of an evaluation are answered, unanswerable and open."""
    answered = sum(bool(row["answers"]) for row in rows)
    unanswerable = sum(bool(row.get("unanswerable")) for row in rows)
    return {"answered": answered, "unanswerable": unanswerable, "open": len(rows) - answered - unanswerable}


def kinds_text(found: Mapping[str, int]) -> str:
    """The same in words; empty where all have answers, and there is nothing to tell."""
    if not found["unanswerable"] and not found["open"]:
        return ""
    return f"{found['answered']} with answers, {found['unanswerable']} unanswerable, {found['open']} open"


def abstention_measures(settings: EvaluateSettings) -> Measures:
    """What is measured question by question where some are unanswerable; NaN where it does not apply."""

    def declined(text: str, example: Example) -> float:
        return float(abstained(text, () if settings.answers_are == "regex" else example.answers))

    return {
        "abstention_recall": lambda text, example: declined(text, example) if example.unanswerable else math.nan,
        "over_abstention": lambda text, example: declined(text, example) if example.answers else math.nan,
        "hallucination": lambda text, example: 1 - declined(text, example) if example.unanswerable else math.nan,
    }


def abstention_whole(rows: Rows, mode: str, metric: str) -> Whole:
    """Abstention's precision or F1 of all answered and unanswerable questions that were read in a mode."""
    due = np.array([row["figures"].get(f"{mode}/abstention_recall") for row in rows], dtype=np.float64)
    over = np.array([row["figures"].get(f"{mode}/over_abstention") for row in rows], dtype=np.float64)
    known = ~(np.isnan(due) & np.isnan(over))
    cannot, due, over = ~np.isnan(due[known]), np.nan_to_num(due[known]), np.nan_to_num(over[known])
    halves = (1, due + over) if metric == "abstention_precision" else (2, due + over + cannot)
    return _ratio(halves[0] * due, halves[1].astype(np.float64))


def _ratio(parts: np.ndarray, wholes: np.ndarray) -> Whole:
    """Σ parts / Σ wholes, and the same without each question."""
    part, whole = parts.sum(), wholes.sum()
    if not whole:
        return Whole(math.nan, np.full(len(parts), math.nan))
    rest = whole - wholes
    without = np.where(rest > 0, (part - parts) / np.where(rest > 0, rest, 1), part / whole)
    return Whole(float(part / whole), without)


def uncomputed(rows: Rows, settings: EvaluateSettings, figures: Mapping[str, Interval]) -> list[str]:
    """Figures that were asked for and that no question of the set has, where none has an answer."""
    if kinds(rows)["answered"]:
        return []
    read = [mode for mode in settings.modes if any(mode in row["predictions"] for row in rows)]
    wanted = [f"{mode}/{metric}" for mode in read for metric in settings.metrics if metric not in NO_GOLD]
    return [name for name in wanted if name not in figures]


def computes_nothing(figures: Mapping[str, Interval]) -> bool:
    """Whether all that is known of the answers is whether they were cut."""
    return all(name.rpartition("/")[2] in READ for name in figures)
