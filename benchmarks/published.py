"""A finished evaluation beside a published figure: OK where the mean is within the tolerance, else FAIL and code 1.

    python benchmarks/published.py runs/rag-nq/evaluations/<folder> nq-sequence
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

from raglan.evaluate import open_evaluation

ROWS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("evaluation", type=Path, help="the folder of one")
    words.add_argument("row", choices=ROWS)
    asked = words.parse_args()
    said, agrees = compared(asked.evaluation, asked.row)
    print(said)
    raise SystemExit(not agrees)


def compared(folder: Path, name: str) -> tuple[str, bool]:
    """What is to be said of an evaluation by one row, and whether they agree. SystemExit where the figure was not measured."""
    row, found = ROWS[name], open_evaluation(folder)
    if row["figure"] not in found.figures:
        raise SystemExit(f"{folder} has no {row['figure']}; it has {', '.join(found.figures)}")
    own = found.figures[row["figure"]]
    mean, low, high = (100 * value for value in (own.mean, own.low, own.high))
    agrees = abs(mean - row["expected"]) <= row["tolerance"] + 1e-9
    ours = f"{row['task']} {row['method']} {row['figure']}: {mean:.1f} [{low:.1f}, {high:.1f}], n {own.n}"
    theirs = f"published {row['expected']} ± {row['tolerance']} ({row['source']})"
    return f"{'OK' if agrees else 'FAIL'}  {ours}; {theirs}", agrees


if __name__ == "__main__":
    main()
