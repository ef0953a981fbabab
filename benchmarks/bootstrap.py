"""The grid's paired bootstrap at the paper's size: 4 cells × 10 tasks × 2,500 questions × 10,000 resamples, on one thread.

    python benchmarks/bootstrap.py      (some seconds; the target is 10)

The same resamples by a loop that gathers the drawn values stand beside it for one task, and both must give the same interval.
"""

from __future__ import annotations

import os
import sys
import time
import zlib

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np

from raglan.paired import CHUNK, macro, paired

CELLS, TASKS, QUESTIONS, RESAMPLES = ("base", "R-ft", "LM-ft", "both"), 10, 2500, 10_000


def gathered(values: dict[str, list[float]], task: str) -> tuple[float, float]:
    """The interval of both − base with no matrix product, from the same draws."""
    chance, difference = np.random.default_rng([0, zlib.crc32(task.encode())]), np.subtract(values["both"], values["base"])
    means = [
        float(difference[row].mean())
        for _ in range(0, RESAMPLES, CHUNK)
        for row in chance.integers(QUESTIONS, size=(CHUNK, QUESTIONS))
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    chance = np.random.default_rng(0)
    values = {
        f"task{n}": {cell: chance.integers(2, size=QUESTIONS).astype(float).tolist() for cell in CELLS} for n in range(TASKS)
    }
    began, clock = time.process_time(), time.perf_counter()
    tasks = [paired(own, task=name, seed=0, resamples=RESAMPLES) for name, own in values.items()]
    for figures in (*tasks, macro(tasks)):
        for cell in CELLS[1:]:
            figures.difference("base", cell)
        figures.interaction(*CELLS)
    took, clock = time.process_time() - began, time.perf_counter() - clock
    print(f"{len(CELLS)} cells × {TASKS} tasks × {QUESTIONS} questions × {RESAMPLES} resamples")
    print(f"{took:.1f} s of CPU, {clock:.1f} s all in all (at most 10 in all: {'OK' if clock <= 10 else 'FAIL'})")
    ours = tasks[0].difference("base", "both")
    began = time.perf_counter()
    theirs = gathered(values["task0"], "task0")
    print(f"one difference of one task by gathering: {time.perf_counter() - began:.1f} s")
    assert np.allclose(theirs, (ours.low, ours.high), atol=1e-12)
    sys.exit(took > 10)


if __name__ == "__main__":
    main()
