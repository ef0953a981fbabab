"""A plan on disk: `plan/` with plan.jsonl, a line a cell, margins.json, and a manifest written last.

A plan is a pure function of recipe and seed, so one that is there is kept if it is the same, and refused if it is another:
what was written to fill the old cells would be counted for the new ones.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

from raglan.artifact import MANIFEST, file_fingerprint, publish, read_manifest, write_json, write_manifest
from raglan.errors import CheckpointError
from raglan.synthesis.plan import Cell, Plan

__all__ = ["KIND", "read_plan", "write_plan"]

KIND = "plan"


def write_plan(plan: Plan, folder: Path) -> Path:
    """Write the plan to this folder.

    Raises:
        CheckpointError: another plan is there.
    """
    folder = Path(folder)
    working = folder.with_name(folder.name + ".part")
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)
    with open(working / "plan.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(_row(cell), ensure_ascii=False) + "\n" for cell in plan.cells)
    write_json(
        working / "margins.json",
        {"n": len(plan.cells), "seed": plan.seed, "margins": plan.margins, "allowed": plan.allowed, "left_out": plan.left_out},
    )
    name = [file_fingerprint(working / file) for file in ("plan.jsonl", "margins.json")]
    if (folder / MANIFEST).is_file() and (there := read_manifest(folder, KIND)["fingerprint"]) != name:
        shutil.rmtree(working)
        raise CheckpointError(
            f"{folder} holds the plan {there[0]} of other settings; the recipe now gives {name[0]}",
            hint="give synthesis.path another folder, or remove this one with what was written for it",
        )
    write_manifest(working, KIND, {"cells": len(plan.cells), "seed": plan.seed, "fingerprint": name})
    return publish(working, folder)


def read_plan(folder: Path) -> Plan:
    """The plan of this folder.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    folder = Path(folder)
    manifest = read_manifest(folder, KIND)
    if [file_fingerprint(folder / file) for file in ("plan.jsonl", "margins.json")] != manifest["fingerprint"]:
        raise CheckpointError(f"{folder} is not the plan that its {MANIFEST} names", hint="remove the folder and plan again")
    told = json.loads((folder / "margins.json").read_text(encoding="utf-8"))
    with open(folder / "plan.jsonl", encoding="utf-8") as file:
        cells = tuple(_cell(json.loads(line)) for line in file)
    allowed = {name: tuple((first, second) for first, second in pairs) for name, pairs in told["allowed"].items()}
    left_out = {name: tuple(values) for name, values in told["left_out"].items()}
    return Plan(told["seed"], cells, told["margins"], allowed, left_out)


NAMES = tuple(field.name for field in fields(Cell))


def _row(cell: Cell) -> dict[str, Any]:
    return {name: getattr(cell, name) for name in NAMES}


def _cell(row: dict[str, Any]) -> Cell:
    places = row["positions"]
    return Cell(**{**row, "positions": None if places is None else tuple(places), "noise": tuple(row["noise"])})
