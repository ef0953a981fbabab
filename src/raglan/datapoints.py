"""Data points on disk: one JSON object a row, with the passages, the prompt and the retriever that it was made with.

    <folder>/points.jsonl    {"id", "example_id", "source", "split", "query", "answer", "contexts": [{"passage_id", "text",
                             "score", "rank"}], "prompt", "retriever", "markers", "history", "seed"} a line
    <folder>/manifest.json   how many there are and what they were made from, written last

Training writes them into its stage's folder, so that the rows it learned from can be looked at and exported: those of an
instruction mix, of questions, of feedback and of lessons.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raglan.artifact import MANIFEST, read_manifest, write_manifest
from raglan.errors import CorpusError
from raglan.records import Context, DataPoint

__all__ = ["POINTS", "is_first_rank", "points_figures", "read_points", "write_points"]

KIND = "data points"
POINTS = "points.jsonl"


def write_points(folder: Path, points: Iterable[DataPoint], **figures: Any) -> Path:
    """Write the points, then the manifest with their number and `figures`. Returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    count = 0
    with open(folder / POINTS, "w", encoding="utf-8") as file:
        for point in points:
            file.write(json.dumps(asdict(point), ensure_ascii=False) + "\n")
            count += 1
    write_manifest(folder, KIND, {**figures, "points": count})
    return folder


def is_first_rank() -> bool:
    """Of torchrun's ranks all make the same rows, and one keeps them."""
    return os.environ.get("RANK", "0") == "0"


def read_points(path: Path) -> list[DataPoint]:
    """The points of a folder that `write_points` made, or of a .jsonl file of such lines.

    Raises:
        CheckpointError: a folder without a manifest. CorpusError: no such file, or a line that is no data point.
    """
    path = Path(path)
    if path.is_dir():
        read_manifest(path, KIND)
        path = path / POINTS
    if not path.is_file():
        raise CorpusError(f"there are no data points at {path}", hint="give a folder that training wrote, or its points.jsonl")
    with open(path, encoding="utf-8") as file:
        return [_point(line, path, number) for number, line in enumerate(file, 1)]


def points_figures(folder: Path) -> dict[str, Any]:
    """How many points a folder holds and the figures kept with them. Raises CheckpointError."""
    own = {"kind", "raglan", "files"}
    return {name: value for name, value in read_manifest(folder, KIND).items() if name not in own}


def _point(line: str, path: Path, number: int) -> DataPoint:
    try:
        row = json.loads(line)
        contexts = tuple(Context(**context) for context in row.pop("contexts", ()))
        opens, closes = row.pop("markers", ("", ""))
        history = tuple(row.pop("history", ()))
        return DataPoint(**row, contexts=contexts, markers=(opens, closes), history=history)
    except (ValueError, TypeError, AttributeError) as fault:
        raise CorpusError(
            f"{path}:{number} is no data point: {fault}", hint="lines are those that training writes: see raglan.datapoints"
        ) from None
