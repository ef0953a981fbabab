"""What a run has made, in a file while it lasts; in memory is where each row stands."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from raglan.documents import example_of_row, example_row
from raglan.records import Example

__all__ = ["MadeFile", "Place"]

Place = tuple[int, int]  # cell, ordinal


class MadeFile:
    """Examples and rejects in a file, found by cell and ordinal."""

    def __init__(self, path: Path):
        self.path = path
        self.made: dict[Place, int] = {}
        self.refused: dict[Place, int] = {}

    def __enter__(self) -> MadeFile:
        self.file: IO[bytes] = open(self.path, "w+b")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.file.close()
        if kind is None:
            self.path.unlink(missing_ok=True)

    def add(self, place: Place, example: Example) -> None:
        self.made[place] = self._append(example_row(example))

    def reject(self, place: Place, row: Mapping[str, Any]) -> None:
        self.refused[place] = self._append(row)

    def read(self, places: Iterable[Place]) -> Iterator[Example]:
        """Examples one after another, never all held."""
        return (example_of_row(self._at(self.made[place])) for place in places)

    def rejected(self, place: Place) -> dict[str, Any]:
        return self._at(self.refused[place])

    def _append(self, row: Mapping[str, Any]) -> int:
        self.file.seek(0, 2)
        at = self.file.tell()
        self.file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        return at

    def _at(self, at: int) -> dict[str, Any]:
        self.file.seek(at)
        row: dict[str, Any] = json.loads(self.file.readline())
        return row
