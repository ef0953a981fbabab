"""Recorded trees of the long form as they are kept: one array a column. `planting` makes them, `forest` searches them.

    candidates/<system>/trees.npz    numbers and figures of each node, its children, where each question begins
                        trees.json   the settings that they were made with, K, the texts

A node is a path of segments. What is in it depends on what was written and on a few settings (`BAKED`), and on no threshold,
weight, beam, depth, constraint or combination; these are decided in the search. The last node is none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raglan.recipe import SelfRagDecode

__all__ = ["BAKED", "FAR", "FIGURES", "NO", "NUMBERS", "ON", "YES", "Trees", "baked"]

NO, ON, YES = range(3)  # kinds of branches
FAR = 2**31 - 1  # a rank that no passage has
NUMBERS = (
    "plain", "rank", "length", "useless", "done", "likeliest", "reads_on", "text", "is_rel", "is_sup", "is_use", "first_hit",
    "lacks_no", "lacks_on", "lacks_yes",
)  # fmt: skip
FIGURES = ("seq", "rel", "sup", "use", "no", "yes", "cont")
BAKED = (
    "form", "instruction", "force_isrel", "max_new_tokens", "passages", "query", "dedup", "keep_passages", "on_length",
    "absent_step", "seq", "seq_tokens", "missing", "absent", "require_by",
)  # fmt: skip


@dataclass(frozen=True)
class Trees:
    """Nodes, n of them, and the trees of N questions.

    Attributes:
        planted: the settings of `BAKED` that they were made with. `k`: passages of a question, of which any first ones may
            be asked for.
        texts: what a reader sees of nodes, each once.
        numbers: (len(NUMBERS),n). `plain`: no passage of its own; `rank`: of its passage; `length`: ids written; `useless`:
            cut, empty or repeating; `likeliest`: [Retrieval] is the likeliest token behind it; `reads_on`: [Continue …] is the
            likeliest Retrieve token, and a passage is in use; `text`: a place in `texts`; `is_…`: what it says of itself;
            `first_hit`: the best rank that its children could read; `lacks_…`: by kind of branch, the best rank that was
            never written; FAR for none.
        figures: (len(FIGURES),n) float64: components, and log-probabilities of the Retrieve tokens behind it.
        children: (n,2+W): without a passage, reading on, and with each passage, ordered by rank; n − 1 for none.
        roots: (N,) nodes.
    """

    planted: dict[str, Any]
    k: int
    texts: Sequence[str]
    numbers: NDArray[np.int32]
    figures: NDArray[np.float64]
    children: NDArray[np.int32]
    roots: NDArray[np.int32]

    def save(self, folder: Path) -> None:
        """Write both files."""
        np.savez(
            folder / "trees.npz", numbers=self.numbers, figures=self.figures, children=self.children, roots=self.roots
        )  # fmt: skip
        told = {"planted": self.planted, "k": self.k, "texts": list(self.texts), "columns": [NUMBERS, FIGURES]}
        (folder / "trees.json").write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def open(cls, folder: Path) -> Trees | None:
        """The trees of candidates; None where none were planted, or others than are planted now."""
        if not (folder / "trees.npz").is_file():
            return None
        told = json.loads((folder / "trees.json").read_text(encoding="utf-8"))
        if told.get("columns") != [list(NUMBERS), list(FIGURES)]:
            return None
        with np.load(folder / "trees.npz", allow_pickle=False) as rows:
            arrays = (rows[name] for name in ("numbers", "figures", "children", "roots"))
            return cls(told["planted"], told["k"], told["texts"], *arrays)

    def of(self, settings: SelfRagDecode, k: int) -> bool:
        """Whether they are those of these settings and K."""
        return k <= self.k and self.planted == baked(settings)


def baked(settings: SelfRagDecode) -> dict[str, Any]:
    """What of settings the nodes are made with, as plain JSON."""
    return settings.model_dump(mode="json", include=set(BAKED))
