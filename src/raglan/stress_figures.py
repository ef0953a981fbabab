"""What rows of answers under conditions come to: means and deltas with intervals, abstention, orders, retrievers.

A row is a question: `group`, which is drawn as one, and `conditions`, name → an answer with its figures. What is missing there
is in no mean.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raglan.metrics import Interval, bootstraps, interval, resampled
from raglan.robustness import constant, disagreement, flipped

__all__ = ["ALONE", "CLEAN", "FIGURES", "PAIRED", "compare_conditions", "summarise_conditions"]

log = logging.getLogger(__name__)
CLEAN, ALONE = "clean", "distractors/0"
PAIRED = ("right", "f1", "declined", "follow")  # what systems are compared by under each condition
FIGURES = (
    "right", "f1", "declined", "follow", "follow_of_right", "follow_majority", "follow_conflict", "citation_precision",
    "citation_recall", "truncated", "dropped", "unfinished", "tokens",
)  # fmt: skip


def summarise_conditions(rows: Sequence[Mapping[str, Any]], *, own: str, seed: int = 0) -> dict[str, Any]:
    """Figures of all rows by condition; `own` is the condition that other retrievers are compared with.

    Returns:
        figures, missing, abstention, orders, retrievers, as `Robustness` has them.
    """
    names = _names(rows)
    columns = {(name, figure): _column(rows, name, figure) for name in names for figure in FIGURES}
    for name in names:
        base = _base(name, own)
        follow = columns[name, "follow"]
        columns[name, "follow_of_right"] = _where(follow, [value == 1 for value in columns.get((base, "right"), ())])
        told = [_sides(row["conditions"].get(name, {})) for row in rows]
        columns[name, "follow_majority"] = _where(follow, [true > max(false, default=0) for true, false in told])
        columns[name, "follow_conflict"] = _where(follow, [(true, false) == (1, [1]) for true, false in told])
        if name != base and base in names:
            columns[name, "delta"] = _changes(columns[base, "right"], columns[name, "right"])
    if alike := [name for name in names if constant(columns[name, "right"])]:
        log.warning("every answer is alike right or wrong under %s; look at answers.jsonl", ", ".join(alike))
    columns |= {("order", figure): column for figure, column in _orders(rows, names).items()}
    if not any(value > 0 for (_, figure), column in columns.items() if figure == "dropped" for value in column):
        columns = {key: column for key, column in columns.items() if key[1] != "dropped"}  # every prompt had room
    there = {"\t".join(key): column for key, column in columns.items() if not all(map(math.isnan, column))}
    figures: dict[str, dict[str, Interval]] = {name: {} for name in (*names, "order")}
    for key, value in bootstraps(there, groups=[row["group"] for row in rows], seed=seed).items():
        name, _, figure = key.partition("\t")
        figures[name][figure] = value
    missing = {name: sum(name not in row["conditions"] for row in rows) / len(rows) for name in names}
    orders = figures.pop("order")
    return {
        "figures": figures,
        "missing": missing,
        "abstention": _abstention(rows, names, seed),
        "orders": orders,
        "retrievers": _spread(rows, names, own, seed),
    }


def compare_conditions(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], *, seed: int = 0
) -> dict[str, dict[str, Interval]]:
    """after − before of two systems under each condition that both have, and of "order": flip and disagreement.

    Paired by question, which both must list in one order; the groups of `before` are drawn.

    Raises:
        ValueError: rows of unlike numbers.
    """
    names = [name for name in _names(before) if name in _names(after)]
    columns: dict[tuple[str, str], list[float]] = {}
    for name in names:
        for figure in PAIRED:
            columns[name, figure] = _changes(_column(before, name, figure), _column(after, name, figure))
    theirs = _orders(after, names)
    columns |= {("order", figure): _changes(own, theirs[figure]) for figure, own in _orders(before, names).items()}
    there = {"\t".join(key): column for key, column in columns.items() if not all(map(math.isnan, column))}
    found: dict[str, dict[str, Interval]] = {}
    for key, value in bootstraps(there, groups=[row["group"] for row in before], seed=seed).items():
        name, _, figure = key.partition("\t")
        found.setdefault(name, {})[figure] = value
    return found


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["conditions"]))


def _changes(before: Sequence[float], after: Sequence[float]) -> list[float]:
    return [b - a for a, b in zip(before, after, strict=True)]


def _base(name: str, own: str) -> str:
    """What a condition is compared with."""
    form = name.partition("/")[0]
    return {"retriever": own, "order": "order/0", "distractors": ALONE, "conflict": ALONE, "majority": ALONE}.get(form, CLEAN)


def _sides(answered: Mapping[str, Any]) -> tuple[int, list[int]]:
    """Passages that say the truth, and those behind each false value."""
    sides = answered.get("sides", {"true": 0, "false": {}})
    return sides["true"], list(sides["false"].values())


def _where(values: Sequence[float], kept: Sequence[bool]) -> list[float]:
    return [value if keep else math.nan for value, keep in zip(values, kept or [False] * len(values), strict=True)]


def _column(rows: Sequence[Mapping[str, Any]], name: str, figure: str) -> list[float]:
    """A figure question by question; NaN where it does not apply or the condition is missing."""
    values = [row["conditions"].get(name, {}).get("figures", {}).get(figure) for row in rows]
    return [math.nan if value is None else float(value) for value in values]


def _abstention(rows: Sequence[Mapping[str, Any]], names: Sequence[str], seed: int) -> dict[str, dict[str, Interval]]:
    """Of every kind and amount of noise: gold present is answerable, gold absent is not.

    Every rate is a mean over answers of some kind (precision: over abstentions, whether they were due), F1 one over abstentions
    and unanswerable questions together: so groups are drawn as for any other figure.
    """
    found: dict[str, dict[str, Interval]] = {}
    groups = [row["group"] for row in rows] * 3
    for absent in (name for name in names if "/absent/" in name):
        _, kind, _, count = absent.split("/")
        present = CLEAN if count == "0" else f"noise/{kind}/present/{count}"  # the amount is a ratio
        if present not in names:
            continue
        can, cannot = _column(rows, present, "declined"), _column(rows, absent, "declined")
        none = [math.nan] * len(rows)
        over, due = _where([0.0] * len(rows), [no == 1 for no in can]), _where([1.0] * len(rows), [no == 1 for no in cannot])
        rates = {
            "abstention_precision": [*over, *due, *none], "abstention_recall": [*cannot, *none, *none],
            "abstention_f1": [*over, *due, *cannot], "over_abstention": [*can, *none, *none],
            "hallucination": [*(1 - no for no in cannot), *none, *none],
        }  # fmt: skip
        told = "none" if count == "0" else f"{kind}/{count}"
        kept = {name: column for name, column in rates.items() if not all(map(math.isnan, column))}
        found[told] = bootstraps(kept, groups=groups, seed=seed)
    return found


def _orders(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, list[float]]:
    """Flip and disagreement of every question."""
    orders = [_column(rows, name, "right") for name in names if name.startswith("order/")]
    if not orders:
        return {}
    right = [[bool(value) for value in own if not math.isnan(value)] for own in zip(*orders, strict=True)]
    return {"flip": [flipped(own) for own in right], "disagreement": [disagreement(own) for own in right]}


def _spread(rows: Sequence[Mapping[str, Any]], names: Sequence[str], own: str, seed: int) -> dict[str, Any]:
    """The worst retriever, its share of right answers, and how far the best is ahead of the worst of each resample."""
    columns = {name: _column(rows, name, "right") for name in names if name.startswith("retriever/")}
    if not columns:
        return {}
    means, there, drawn = resampled(columns, groups=[row["group"] for row in rows], seed=seed)
    worst = min(means, key=lambda name: means[name])
    every = np.stack([drawn[name] for name in columns])
    return {
        "own": own.removeprefix("retriever/"),
        "worst": worst.removeprefix("retriever/"),
        "worst_right": interval(means[worst], every.min(0), there[worst]),
        "spread": interval(max(means.values()) - means[worst], every.max(0) - every.min(0), there[worst]),
    }
