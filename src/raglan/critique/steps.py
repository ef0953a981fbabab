"""Work in steps, each an artefact: a finished one is kept, an unfinished one begins anew, and nothing is lost in between.

A step is a folder with `rows.jsonl` and a manifest, written last. Its manifest names what it was made of, itself and all
steps before it; a step made of something else is made again. A row that leaves says why, and is in no later step.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from raglan.artifact import fingerprint, publish, read_manifest, write_manifest
from raglan.errors import CheckpointError

__all__ = ["Dropped", "Steps"]

log = logging.getLogger(__name__)
KIND = "annotation step"
Lines = list[dict[str, Any]]


class Dropped(Exception):
    """A row leaves; `str()` is the reason, by which it is counted."""


class Steps:
    """Runs steps in order, or finds them done."""

    def __init__(self, folder: Path, made_of: Any):
        self.folder, self.chain = folder, [fingerprint(made_of)]
        self.dropped: Counter[str] = Counter()
        self.count = 0

    def run(self, name: str, made_of: Any, make: Callable[[], Iterable[dict[str, Any]]]) -> Lines:
        """The step's rows that stay. `make` gives a dict a row, with "id", and with "dropped" where it leaves."""
        self.count += 1
        self.chain.append(fingerprint([name, made_of]))
        final, identity = self.folder / f"{self.count}-{name}", fingerprint(self.chain)
        rows = _kept(final, identity)
        if rows is None:
            rows = self._made(final, identity, make)
        else:
            log.info("step %d, %s, is done", self.count, name)
        self.dropped.update(row["dropped"] for row in rows if "dropped" in row)
        return [row for row in rows if "dropped" not in row]

    def _made(self, final: Path, identity: str, make: Callable[[], Iterable[dict[str, Any]]]) -> Lines:
        rows = list(make())
        working = final.with_name(final.name + ".part")
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir(parents=True)
        (working / "rows.jsonl").write_text("".join(_line(row) for row in rows), encoding="utf-8")
        dropped = Counter(row["dropped"] for row in rows if "dropped" in row)
        write_manifest(working, KIND, {"made_of": identity, "rows": len(rows) - dropped.total(), "dropped": dict(dropped)})
        shutil.rmtree(final, ignore_errors=True)
        publish(working, final)
        return [json.loads(_line(row)) for row in rows]  # as a later run reads them


def _kept(folder: Path, identity: str) -> Lines | None:
    try:
        if read_manifest(folder, KIND)["made_of"] != identity:
            return None
    except CheckpointError:
        return None
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").split("\n") if line]


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
