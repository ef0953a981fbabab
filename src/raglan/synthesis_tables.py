"""What became of a recipe's synthetic dataset, as tables for the report: the loss funnel, the coverage, the splits."""

from __future__ import annotations

import json
from pathlib import Path

from raglan.artifact import MANIFEST, read_manifest
from raglan.grid_tables import GridTable
from raglan.synthesis.run import KIND

__all__ = ["synthesis_tables"]

TOLD = ("task", "relation", "answer_format", "query_format", "retriever", "k", "language", "verdict")


def synthesis_tables(folder: Path) -> list[GridTable]:
    """Tables of a finished dataset; none where there is none yet.

    Raises:
        CheckpointError: the dataset is damaged.
    """
    if not (folder / MANIFEST).is_file():
        return []
    told = read_manifest(folder, KIND)
    coverage = json.loads((folder / "coverage.json").read_text(encoding="utf-8"))
    funnel = [["requested", str(told["requested"])], ["attempts", str(told["funnel"]["attempts"])]]
    funnel += [[f"rejected, {reason}", str(count)] for reason, count in told["funnel"].items() if reason != "attempts"]
    funnel += [["kept", str(told["kept"])]]
    funnel += [[f"supported, by {who}", str(count)] for who, count in told.get("support", {}).items() if who != "n/a"]
    funnel += [["known without passages", str(told["closed_book"]["known"])]] if told.get("closed_book") else []
    funnel += [["found by no retriever", str(told["round_trip"]["unreachable"])]] if told.get("round_trip") else []
    funnel += [[f"in {name}", str(count)] for name, count in told.get("splits", {}).items()]
    kept = GridTable(f"Synthetic examples, written by “{told['teacher']}”", ["", "examples"], funnel, {})
    rows: list[list[str]] = []
    marks: dict[tuple[int, int], str] = {}
    for factor in (name for name in TOLD if name in coverage["factors"]):
        for value, row in coverage["factors"][factor].items():
            if row["deficit"]:
                marks[len(rows), 5] = "worse"
            rows.append([factor, value, *(str(row[name]) for name in ("planned", "attempted", "kept", "deficit"))])
    for kind, row in coverage["noise"].items():  # in slots; those that turned out to answer are not among the kept
        if row.get("kept") is not None:
            rows.append(["noise", kind, str(row["planned"]), "", str(row["kept"]), str(row["deficit"])])
    covered = GridTable("Coverage", ["factor", "value", "planned", "attempted", "kept", "deficit"], rows, marks)
    return [kept, covered]
