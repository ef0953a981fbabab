"""Planning 100,000 cells, and writing and reading the plan, on one thread.

    python benchmarks/plan.py [cells]      (some seconds; the target is 10 for the plan)

Time of the process, which another job on the machine does not lengthen; the clock's is beside it.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

from raglan.recipe import Recipe
from raglan.synthesis import make_plan, read_plan, write_plan

RETRIEVERS = {"bm25": 0.5, "dense": 0.4, "pooled": 0.1}
LANGUAGES = {"en": 0.6, "zh": 0.3, "cross": 0.1}


def timed(what: str, work: Callable[[], Any]) -> tuple[Any, float]:
    began, clock = time.process_time(), time.perf_counter()
    made = work()
    took = time.process_time() - began
    print(f"{what:6s} {took:6.2f} s  (clock {time.perf_counter() - clock:.2f} s)")
    return made, took


def main(cells: int) -> None:
    synthesis = {"path": "out", "n": cells, "retrievers": RETRIEVERS, "languages": LANGUAGES, "from_scratch": 0.3}
    recipe = Recipe.model_validate({"name": "plan", "knowledge": {"path": "kb", "documents": "docs"}, "synthesis": synthesis})
    plan, took = timed("plan", lambda: make_plan(recipe))
    with tempfile.TemporaryDirectory() as folder:
        written, _ = timed("write", lambda: write_plan(plan, Path(folder) / "plan"))
        again, _ = timed("read", lambda: read_plan(written))
    assert again == plan
    print(f"{cells} cells: {took:.1f} s (at most 10: {'OK' if took <= 10 else 'FAIL'})")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
