"""How far two passes of labels agree.

    κ = (p_o − p_e) / (1 − p_e)      p_o share of equal labels, p_e = Σ_c p_1(c) p_2(c)          Cohen 1960

κ is 0 where labels agree as often as chance has it, and undefined (None) where both passes know one label only.
"""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from raglan.critique.judgements import LABELS
from raglan.errors import CorpusError

__all__ = ["agreement", "kappa", "read_audit", "write_audit"]

COLUMNS = ("id", "judgement", "shown", "label", "reason", "person")


def kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Cohen's κ of two passes over the same things, in [−1, 1]; None where it is undefined."""
    if not first:
        return None
    n = len(first)
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    one, two = Counter(first), Counter(second)
    chance = sum(one[label] * two[label] for label in one) / n**2
    return None if chance == 1 else (observed - chance) / (1 - chance)


def agreement(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """How many pairs of labels there are, the share of equal ones, and κ."""
    found = list(pairs)
    same = sum(a == b for a, b in found) / len(found) if found else None
    return {"rows": len(found), "agreement": same, "kappa": kappa([a for a, _ in found], [b for _, b in found])}


def write_audit(path: Path, rows: Iterable[tuple[str, str, str, str, str]]) -> None:
    """(id, judgement, what was shown, label, reason) with a column `person` to fill in."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([*row, ""] for row in rows)


def read_audit(path: Path) -> dict[str, dict[str, Any]]:
    """Agreement of the teacher with a person, by judgement, over the rows that were filled in.

    Raises:
        CorpusError: no such file, other columns, or a person's label that is none of the judgement's.
    """
    if not path.is_file():
        raise CorpusError(f"there is no file {path}", hint="`raglan critique` writes audit.csv into its folder critic/")
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if not {"judgement", "label", "person"} <= set(reader.fieldnames or ()):
            raise CorpusError(f"{path} has the columns {reader.fieldnames}", hint=f"they must be {', '.join(COLUMNS)}")
        rows = [row for row in reader if (row["person"] or "").strip()]
    pairs: dict[str, list[tuple[str, str]]] = defaultdict(list)
    names: dict[str, tuple[str, ...]] = {str(kind): labels for kind, labels in LABELS.items()}
    for row in rows:
        allowed, said = names.get(row["judgement"], ()), row["person"].strip().casefold()
        if said not in allowed:
            raise CorpusError(
                f"{path}: {row.get('id')!r} has the person's label {row['person']!r} for {row['judgement']!r}",
                hint=f"one of {', '.join(allowed)}, or nothing",
            )
        pairs[row["judgement"]].append((row["label"], said))
    return {kind: agreement(found) for kind, found in pairs.items()}
