"""The grid in words: tables that the command line and the report both show, and a summary as JSON.

Figures are in points of 100 with 95 % intervals; a difference is in points too, and never a percentage of a percentage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raglan.grid import CELLS, Grid
from raglan.metrics import Interval
from raglan.paired import Paired, verdict

__all__ = ["GridTable", "grid_summary", "grid_tables"]

BASE, R_FT, LM_FT, BOTH = CELLS
TUNED = (R_FT, LM_FT, BOTH)


@dataclass(frozen=True)
class GridTable:
    """A table of texts; `marks` says of a cell (row, column) that it is better or worse."""

    title: str
    head: list[str]
    rows: list[list[str]]
    marks: dict[tuple[int, int], str]


def grid_tables(grid: Grid) -> list[GridTable]:
    """All that a grid says, in tables."""
    return [_metrics(grid), _differences(grid), _found(grid), _shares(grid), _split(grid)]


def grid_summary(grid: Grid) -> dict[str, Any]:
    """The same as plain numbers, shares of 1; with the seed that the resamples were drawn with."""
    tasks = {name: {"metric": grid.metrics[name], **_contrasts(figures, grid)} for name, figures in grid.tasks.items()}
    for name, own in tasks.items():
        own["abstained"] = {cell.name: _plain(grid.abstained[name].interval(cell.name)) for cell in grid.cells}
        own["retrieval"] = {f"{encoder} {figure}": _plain(value) for (encoder, figure), value in grid.found[name].items()}
        own["split"] = {cell: {"hit": _part(hit), "miss": _part(miss)} for cell, (hit, miss) in grid.split[name].items()}
    return {
        "seed": grid.seed, "retrieval_passes": grid.passes, "prompts": grid.asked, "prompts_read": grid.read, "tasks": tasks,
        "average": None if grid.average is None else _contrasts(grid.average, grid),
        "regressions": [
            {"task": task, "cell": cell, "verdict": kind, "difference": _plain(value)}
            for task, cell, kind, value in grid.regressions()
        ],
    }  # fmt: skip


def _every(grid: Grid) -> Mapping[str, Paired]:
    return {**grid.tasks, **({"average": grid.average} if grid.average is not None else {})}


def _metrics(grid: Grid) -> GridTable:
    rows = [
        [f"{name} ({grid.metrics[name]})" if name in grid.metrics else name, *(_told(own.interval(c.name)) for c in grid.cells)]
        for name, own in _every(grid).items()
    ]
    return GridTable("Metric, and its 95 % interval", ["task", *(cell.name for cell in grid.cells)], rows, {})


def _differences(grid: Grid) -> GridTable:
    rows: list[list[str]] = []
    marks: dict[tuple[int, int], str] = {}
    for at, (name, own) in enumerate(_every(grid).items()):
        told = [name]
        for column, cell in enumerate(TUNED, 1):
            difference = own.difference(BASE, cell)
            kind = verdict(difference)
            told.append(_told(difference, sign=True) + (f" {kind}" if kind in ("worse", "lower") else ""))
            marks |= {(at, column): kind} if kind in ("worse", "better") else {}
        rows.append([*told, _told(own.interaction(BASE, R_FT, LM_FT, BOTH), sign=True)])
    return GridTable("Difference to base, in points, paired by question", ["task", *TUNED, "interaction"], rows, marks)


def _found(grid: Grid) -> GridTable:
    rows = []
    for name, own in grid.found.items():
        for figure in dict.fromkeys(figure for _, figure in own):
            rows.append([name, figure, *(_told(own[encoder, figure]) for encoder in (BASE, R_FT))])
    return GridTable("Retrieval, by query encoder", ["task", "figure", BASE, R_FT], rows, {})


def _shares(grid: Grid) -> GridTable:
    rows = [[name, *(_told(own.interval(cell.name)) for cell in grid.cells)] for name, own in grid.abstained.items()]
    return GridTable("No answer given, %", ["task", *(cell.name for cell in grid.cells)], rows, {})


def _split(grid: Grid) -> GridTable:
    names = [cell.name for cell in grid.cells if cell.query_encoder is not None]
    rows = []
    for task, own in grid.split.items():
        for number, kind in enumerate(("hit", "miss")):
            rows.append([task, kind, *(_of(own[name][number]) for name in names)])
    return GridTable("Where a passage holds a gold alias (hit), and where none does", ["task", "", *names], rows, {})


def _contrasts(own: Paired, grid: Grid) -> dict[str, Any]:
    return {
        "cells": {cell.name: _plain(own.interval(cell.name)) for cell in grid.cells},
        "differences": {cell: _plain(own.difference(BASE, cell)) for cell in TUNED},
        "interaction": _plain(own.interaction(BASE, R_FT, LM_FT, BOTH)),
    }


def _plain(value: Interval) -> dict[str, float]:
    return {"mean": value.mean, "low": value.low, "high": value.high, "n": value.n}


def _part(value: tuple[float, int]) -> dict[str, float | None]:
    return {"mean": None if math.isnan(value[0]) else value[0], "n": value[1]}


def _told(value: Interval, *, sign: bool = False) -> str:
    form = "{:+.1f}" if sign else "{:.1f}"
    low, high = (form.format(100 * bound + 0.0) for bound in (value.low, value.high))
    return f"{form.format(100 * value.mean + 0.0)} [{low}, {high}]"


def _of(value: tuple[float, int]) -> str:
    mean, n = value
    return f"{100 * mean:.1f} of {n}" if n else "– of 0"
