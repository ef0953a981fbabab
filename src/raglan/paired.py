"""Several systems on the same questions of several tasks: means, differences and interaction, with paired intervals.

A resample draws n of a task's n questions with replacement, for all systems the same ones, so a difference is between systems
and not between questions. All means of a task are one matrix product,

    (R,n) counts × (n,C) values / n → (R,C),    R resamples, n questions, C systems

and a macro average is the mean over tasks of these, each task resampled within itself. The interval is the middle 95 %. The
draws of a task follow from the seed and the task's name, so another task beside it changes nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from raglan.metrics import Interval

__all__ = ["Paired", "macro", "paired", "resampled_means", "verdict"]

CHUNK = 500  # resamples whose counts are held at once
NOTHING = 1e-12  # sums of the same numbers in another order


@dataclass(frozen=True)
class Paired:
    """C systems on n questions: their means (C,), and the means of every resample (R,C)."""

    names: tuple[str, ...]
    means: np.ndarray
    resampled: np.ndarray
    n: int

    def interval(self, name: str) -> Interval:
        """One system's mean."""
        return self.contrast({name: 1})

    def difference(self, before: str, after: str) -> Interval:
        """after − before."""
        return self.contrast({before: -1, after: 1})

    def interaction(self, base: str, one: str, other: str, both: str) -> Interval:
        """both − one − other + base: what the two bring together beyond what each brings alone."""
        return self.contrast({both: 1, one: -1, other: -1, base: 1})

    def contrast(self, weights: Mapping[str, float]) -> Interval:
        """A weighted sum of systems with its interval."""
        at = np.array([self.names.index(name) for name in weights])
        by = np.array(list(weights.values()), dtype=np.float64)
        low, high = np.quantile(self.resampled[:, at] @ by, [0.025, 0.975])
        return Interval(float(self.means[at] @ by), float(low), float(high), self.n)


def paired(values: Mapping[str, Sequence[float]], *, task: str, seed: int, resamples: int) -> Paired:
    """One task. `values`: system → a figure of every question, all in one order.

    Raises:
        ValueError: systems with unlike numbers of questions, or none at all.
    """
    lengths = {name: len(column) for name, column in values.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"every system needs a figure of the same questions, one at least, not {lengths}")
    table = np.array(list(values.values()), dtype=np.float64).T  # (n,C)
    draws = [resampled_means(table, counts) for counts in _counts(len(table), task, seed, resamples)]
    return Paired(tuple(values), table.mean(0), np.concatenate(draws), len(table))


def macro(tasks: Sequence[Paired]) -> Paired:
    """The unweighted mean over tasks of the same systems."""
    means = np.mean([task.means for task in tasks], axis=0)
    return Paired(tasks[0].names, means, np.mean([task.resampled for task in tasks], axis=0), sum(task.n for task in tasks))


def resampled_means(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(n,C) values, (R,n) how often each question is drawn → (R,C) means."""
    return counts.astype(np.float64) @ values / len(values)


def verdict(difference: Interval) -> str:
    """`worse` where the whole interval is below 0, `lower` where the mean is and the interval is not; so `better`, `higher`."""
    if difference.high < -NOTHING:
        return "worse"
    if difference.low > NOTHING:
        return "better"
    if abs(difference.mean) <= NOTHING:
        return "same"
    return "lower" if difference.mean < 0 else "higher"


def _counts(n: int, task: str, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """Counts of resamples, (at most CHUNK, n) at a time; n draws counted cost a fifth of a multinomial over n."""
    generator = np.random.default_rng([seed % 2**32, zlib.crc32(task.encode())])
    for start in range(0, resamples, CHUNK):
        rows = min(CHUNK, resamples - start)
        drawn = generator.integers(n, size=(rows, n)) + np.arange(rows)[:, None] * n
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
