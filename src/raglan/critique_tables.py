"""What `raglan critique` made, as tables for the report: labels, agreement and κ, rejects with reasons, annotated rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raglan.artifact import MANIFEST, read_manifest
from raglan.critique.annotate import KIND as ANNOTATION
from raglan.critique.critic_data import KIND as CRITIC
from raglan.grid_tables import GridTable

__all__ = ["critique_tables"]


def critique_tables(folder: Path) -> list[GridTable]:
    """Tables of what is finished in the folder of a recipe's `critique`; none where nothing is.

    Raises:
        CheckpointError: what is there is damaged.
    """
    tables: list[GridTable] = []
    if (folder / "critic" / MANIFEST).is_file():
        tables += _critic(read_manifest(folder / "critic", CRITIC), folder / "annotator.json")
    if (folder / "annotation" / MANIFEST).is_file():
        tables += _annotation(read_manifest(folder / "annotation", ANNOTATION))
    return tables


def _critic(told: Mapping[str, Any], compared: Path) -> list[GridTable]:
    judgements = told["judgements"]
    labels = [
        [kind, label, str(count), _share(label, own["labels"]), str(own["kept"].get(label, 0)), _share(label, own["kept"])]
        for kind, own in judgements.items() for label, count in own["labels"].items()
    ]  # fmt: skip
    agreed = [[kind, "second pass", *_agreed(own["second_pass"])] for kind, own in judgements.items()]
    if compared.is_file():
        other = json.loads(compared.read_text(encoding="utf-8"))
        agreed += [[kind, f"annotator {other['annotator']}", *_agreed(own)] for kind, own in other["judgements"].items()]
    rejects = [
        [kind, reason, str(count), str(own["asked"])]
        for kind, own in judgements.items() for reason, count in own["rejected"].items()
    ] or [["none", "", "0", str(sum(own["asked"] for own in judgements.values()))]]  # fmt: skip
    return [
        GridTable(
            f"Labels by “{told['teacher']}”, and what the critic learns from",
            ["judgement", "label", "labelled", "share", "kept", "share"], labels, {},
        ),
        GridTable("Agreement with the teacher's labels", ["judgement", "who", "rows", "equal, %", "κ"], agreed, {}),
        GridTable("Judgements without a label", ["judgement", "reason", "rejected", "of"], rejects, {}),
    ]  # fmt: skip


def _annotation(told: Mapping[str, Any]) -> list[GridTable]:
    rows = told["rows"]
    account = [["in", str(rows["in"])], *([f"dropped, {why}", str(n)] for why, n in rows["dropped"].items())]
    account += [["out", str(rows["out"])], *([f"in {name}", str(n)] for name, n in rows["written"].items())]
    labels = [
        [source, what, label, str(count), _share(label, counts)]
        for source, own in told["labels"].items() for what, counts in own.items() for label, count in counts.items()
    ]  # fmt: skip
    return [
        GridTable(f"Rows annotated by “{told['annotator']}”", ["", "rows"], account, {}),
        GridTable("What the annotated rows say", ["source", "what", "label", "count", "share"], labels, {}),
    ]


def _agreed(told: Mapping[str, Any]) -> list[str]:
    """Rows, percent of equal labels, κ; – where there is none."""
    same, kappa = told["agreement"], told["kappa"]
    return [str(told["rows"]), "–" if same is None else f"{100 * same:.1f}", "–" if kappa is None else f"{kappa:.2f}"]


def _share(label: str, counts: Mapping[str, int]) -> str:
    return f"{100 * counts.get(label, 0) / max(1, sum(counts.values())):.1f} %"
