"""From r to the probability that retrieval is needed: a table or a temperature, fitted on a finished evaluation.

    needed_i = 1 where the answer with passages is better than the one without, else 0
    temperature   T that minimises −Σ log p(needed_i),  p = σ(logit(r_i) ÷ T)
    isotonic      the rising steps nearest to needed_i in squares (pool adjacent violators), straight lines between their ends

The evaluation must have measured both modes with `retrieve: always`: of a question that did not retrieve nobody knows whether
it had to. What is printed is the setting `decode.calibration`, under which `threshold` is a probability of being needed.
Source of the idea: Guo et al. 2017 (arXiv 1706.04599) for temperatures, Zadrozny & Elkan 2002 for isotonic tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from raglan.errors import RecipeError
from raglan.evaluate import Evaluation
from raglan.recipe import CalibrationSettings

__all__ = ["Kind", "calibration_data", "fitted"]

Kind = Literal["temperature", "isotonic"]
SURE = 1e-6  # r is kept so far from 0 and 1: their odds have no end


def calibration_data(evaluation: Evaluation, metric: str) -> tuple[list[float], list[bool]]:
    """r and whether retrieval was needed, one a question that both modes answered.

    Raises:
        RecipeError: the evaluation does not tell, or one of the two is the same for all.
    """
    r, needed = [], []
    for row in evaluation.rows:
        without, read = (row["figures"].get(f"{mode}/{metric}") for mode in ("closed_book", "retrieved"))
        trace = row["predictions"].get("retrieved", {}).get("trace")
        if None in (without, read, trace):
            continue
        if not trace["retrieved"] or trace["decisions"][0]["r"] is None:
            raise RecipeError(
                f"question {row['id']!r} was answered without retrieving, so nobody knows whether it had to",
                hint="measure with decode.retrieve=always; r is recorded all the same",
            )
        r.append(float(trace["decisions"][0]["r"]))
        needed.append(bool(read > without))
    if len(set(needed)) < 2 or len(set(r)) < 2:
        raise RecipeError(
            f"{len(r)} questions tell nothing of when retrieval is needed: all are alike by {metric}",
            hint="evaluate.modes: [closed_book, retrieved], on questions of which some need passages and some do not",
        )
    return r, needed


def fitted(r: Sequence[float], needed: Sequence[bool], kind: Kind) -> CalibrationSettings:
    """The calibration that fits (N,) values of r best."""
    values, wanted = np.asarray(r, np.float64), np.asarray(needed, np.float64)
    if kind == "temperature":
        return CalibrationSettings(kind=kind, temperature=_temperature(values, wanted))
    x, y = _steps(values, wanted)
    return CalibrationSettings(kind=kind, x=tuple(x), y=tuple(y))


def _temperature(r: NDArray[np.float64], needed: NDArray[np.float64]) -> float:
    """The loss is convex in 1/T, so its slope is bisected. Between 1/100 and 100."""
    kept = r.clip(SURE, 1 - SURE)
    odds = np.log(kept) - np.log1p(-kept)
    low, high = 0.01, 100.0
    for _ in range(60):
        middle = (low * high) ** 0.5
        slope = ((1 / (1 + np.exp(-middle * odds)) - needed) * odds).sum()
        low, high = (low, middle) if slope > 0 else (middle, high)
    return float(1 / (low * high) ** 0.5)


def _steps(r: NDArray[np.float64], needed: NDArray[np.float64]) -> tuple[list[float], list[float]]:
    """Both ends of every step, with its height; equal values of r are one."""
    blocks: list[list[float]] = []  # first r, last r, sum, count
    for value in np.unique(r):
        same = needed[r == value]
        blocks.append([float(value), float(value), float(same.sum()), float(len(same))])
        while len(blocks) > 1 and blocks[-2][2] * blocks[-1][3] >= blocks[-1][2] * blocks[-2][3]:
            _, last, total, count = blocks.pop()
            blocks[-1] = [blocks[-1][0], last, blocks[-1][2] + total, blocks[-1][3] + count]
    ends = dict(end for first, last, total, count in blocks for end in ((first, total / count), (last, total / count)))
    return list(ends), list(ends.values())
