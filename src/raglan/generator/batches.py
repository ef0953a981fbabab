"""Rows of ids as the tensors of a batch, and which of a batch's labels are scored.

    input_ids (B,L), attention_mask (B,L)   from lengths, never from ids
    labels (B,T)                            −100 is no answer
    learned (B,T)                           False where a label is only read, as evidence inside an answer is

`HFGenerator.collate` puts them together, and so does `raglan.packing` for rows side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["UNSCORED", "learned", "left_aligned", "only_rows", "padded", "scored"]

UNSCORED = -100


def padded(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of unlike length as ids (n,longest) and their mask, which comes from lengths and never from ids."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), value, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for place, row in enumerate(rows):
        where = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[place, where], mask[place, where] = torch.tensor(row, dtype=torch.long), 1
    return ids, mask


def learned(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """`learned` (B,T) of rows, where one of them has labels that are only read; else nothing."""
    if not any("learned" in row for row in rows):
        return {}
    return {"learned": padded([row.get("learned", [1] * len(row["labels"])) for row in rows], 0)[0].bool()}


def scored(batch: dict[str, Tensor]) -> Tensor:
    """Which labels of a batch have a log-probability that counts, (B,T): those that are there, and are not only read."""
    there = batch["labels"] >= 0
    return there & batch["learned"].bool() if "learned" in batch else there


def left_aligned(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same rows with their own tokens first, on whichever side they were padded: models count positions from there."""
    real, labels = batch["attention_mask"].bool(), batch["labels"]
    return {
        "input_ids": _moved(batch["input_ids"], real), "attention_mask": _moved(batch["attention_mask"], real),
        "labels": _moved(labels, labels >= 0),
        **({"learned": _moved(batch["learned"], labels >= 0)} if "learned" in batch else {}),
    }  # fmt: skip


def only_rows(batch: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Those rows of a batch, (B,)."""
    return {name: value[rows] for name, value in batch.items()}


def _moved(values: Tensor, first: Tensor) -> Tensor:
    """Each row's values that are to come first, then its others, in their order. (B,L), (B,L) → (B,L)."""
    return values.gather(1, (~first).int().argsort(dim=1, stable=True))
