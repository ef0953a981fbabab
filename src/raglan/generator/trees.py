"""Rows that begin alike, read as one: what they share is computed once.

    trunk | branch 1 | branch 2 | …         one line of ids
    0 … n−1 | n, n+1, … | n, n+1, … | …     positions
    a branch's token sees the trunk, and of its own branch what is not behind it; of other branches nothing

So a row's log-probabilities are those that it has alone. Where a template begins with the passage, all questions that found it
begin alike, and so do the choices of one question: with a trunk of n tokens, m rows of length L cost n + m·(L − n) positions
in place of m·L.

A line's attention is dense, masked: a line of length S costs S² where rows apart cost m·L². `room` keeps S where that is a
quarter of the other work, S ≤ 1.5·D, and inside a sliding window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raglan.generator.batches import UNSCORED

__all__ = ["Tree", "begins_alike", "grown", "reads_trees", "room", "tree_batch", "tree_length"]

Row = dict[str, list[int]]  # input_ids, labels
LEAST = 16  # tokens that rows have to share
SHORTEST, LONGEST = 512, 2048  # of lines


@dataclass(frozen=True, slots=True)
class Tree:
    """Rows that share their first `trunk` tokens; `places` are theirs among all rows."""

    trunk: int
    places: tuple[int, ...]


def room(model: Any) -> int:
    """The longest line of a model, in tokens; 0 where its attention takes no mask of its own."""
    config = model.config
    if getattr(config, "_attn_implementation", None) not in ("sdpa", "eager"):
        return 0
    width = int(getattr(config, "hidden_size", 0) or getattr(config, "n_embd", 0) or SHORTEST)
    window = getattr(config, "sliding_window", None) or LONGEST
    return int(min(max(3 * width // 2, SHORTEST), LONGEST, window))


def read(row: Row) -> list[int]:
    """The ids that predict a row's labels: all but its last label."""
    return [*row["input_ids"], *row["labels"][:-1]]


def begins_alike(one: Sequence[int], other: Sequence[int], most: int | None = None) -> int:
    """How many first ids two rows share, of at most `most`."""
    end = min(len(one), len(other), len(one) if most is None else most)
    return next((at for at in range(end) if one[at] != other[at]), end)


def grown(rows: Sequence[Row], most: int) -> tuple[list[Tree], list[int]]:
    """Trees of two rows or more, each of at most `most` tokens, and the places of the rows that stand alone.

    Rows are taken in the order of their ids, in which those that begin alike are neighbours. A row joins the tree before it if
    more is saved with it than without, (m − 1)·trunk tokens being what m rows save.
    """
    ids = [read(row) for row in rows]
    trees: list[Tree] = []
    places: list[int] = []
    trunk = tokens = 0  # of the tree in hand; tokens of its rows apart
    for place in sorted(range(len(rows)), key=lambda at: ids[at]):
        shared = begins_alike(ids[place], ids[places[-1]], trunk) if places else 0
        together = tokens + len(ids[place])
        saved = len(places) * shared
        if shared >= LEAST and saved > (len(places) - 1) * trunk and together - saved <= most:
            places, trunk, tokens = [*places, place], shared, together
            continue
        trees += [Tree(trunk, tuple(places))] if places else []
        places, trunk, tokens = [place], len(ids[place]), len(ids[place])
    trees += [Tree(trunk, tuple(places))] if places else []
    return [tree for tree in trees if len(tree.places) > 1], [tree.places[0] for tree in trees if len(tree.places) == 1]


def tree_length(tree: Tree, rows: Sequence[Row]) -> int:
    """Tokens of its line."""
    return tree.trunk + sum(len(read(rows[place])) - tree.trunk for place in tree.places)


def tree_batch(
    trees: Sequence[Tree], rows: Sequence[Row], pad: int, *, attention: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """{labels (R,T), at (R,T), input_ids (B,L), position_ids (B,L), attention_mask (B,1,L,L)} of the R rows, tree by tree.

    `at` is where, in the B·L states in line, the state stands that predicts each label.
    """
    width = max(tree_length(tree, rows) for tree in trees)
    ids = torch.full((len(trees), width), pad)
    positions = torch.zeros((len(trees), width), dtype=torch.long)
    branch = torch.full((len(trees), width), -1)  # 0 is the trunk, −1 fills up
    order, at = [], []
    for line, tree in enumerate(trees):
        first = rows[tree.places[0]]
        ids[line, : tree.trunk] = torch.tensor(read(first)[: tree.trunk])
        positions[line, : tree.trunk] = torch.arange(tree.trunk)
        branch[line, : tree.trunk] = 0
        end = tree.trunk
        for number, place in enumerate(tree.places, 1):
            own, row = read(rows[place]), rows[place]
            where = slice(end, end + len(own) - tree.trunk)
            ids[line, where] = torch.tensor(own[tree.trunk :], dtype=torch.long)
            positions[line, where] = torch.arange(tree.trunk, len(own))
            branch[line, where] = number
            places = range(len(row["input_ids"]) - 1, len(own))
            at.append([line * width + (p if p < tree.trunk else end + p - tree.trunk) for p in places])
            order.append(row["labels"])
            end = where.stop
    seen = (branch[:, None, :] == branch[:, :, None]) | (branch[:, None, :] == 0)
    seen &= torch.ones(width, width, dtype=torch.bool).tril()
    seen |= torch.eye(width, dtype=torch.bool)
    mask = seen[:, None]
    if attention == "eager":
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    most = max(map(len, order))
    return {
        "labels": torch.tensor([[*own, *[UNSCORED] * (most - len(own))] for own in order]),
        "at": torch.tensor([[*own, *[0] * (most - len(own))] for own in at]),
        "input_ids": ids, "position_ids": positions, "attention_mask": mask,
    }  # fmt: skip


@torch.no_grad()
def reads_trees(generator: Any) -> bool:
    """Whether three rows of random tokens, as a tree, have the log-probabilities that they have apart."""
    words = generator.model.get_input_embeddings().num_embeddings
    chance = torch.Generator().manual_seed(0)
    drawn = [torch.randint(words, (n,), generator=chance).tolist() for n in (LEAST + 4, 7, 3, 5)]
    rows = [{"input_ids": [*drawn[0], *own[:1]], "labels": own[1:]} for own in drawn[1:]]
    trees, alone = grown(rows, SHORTEST)
    assert (len(trees), alone) == (1, [])
    try:
        apart = generator.forward(generator.collate([rows[place] for place in trees[0].places])).float().cpu()
        together = generator.forward(generator.tree_batch(trees, rows)).float().cpu()
    except (IndexError, RuntimeError, TypeError, ValueError):  # an architecture without positions, or with masks of its own
        return False
    exact = generator.dtype == torch.float32 and next(generator.model.parameters()).dtype == torch.float32
    near = 1e-4 if exact else 5e-2
    return bool(torch.allclose(together, apart, atol=near, rtol=near))
