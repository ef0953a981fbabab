"""Dealing kinds of noise over all slots of a data set.

Example by example, four slots by the weights of `PALETTE` are 2 1 1 0 0 0 0 0 each time, and half of the kinds never occur. So
the counts are of the whole data set, and what may stand in fewest places is placed first: a counterfactual only where the
question stays decidable, what is made of gold only where gold is shown, the rest anywhere.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raglan.errors import RecipeError
from raglan.perturb.slot import kind_named

__all__ = ["Cell", "deal_kinds"]


@dataclass(frozen=True, slots=True)
class Cell:
    """A prompt's noise slots. `decidable`: the truth outnumbers a counterfactual, or it is meant to be a conflict."""

    slots: int
    gold_absent: bool = False
    decidable: bool = True

    def takes(self, kind: str) -> bool:
        if self.gold_absent and not kind_named(kind).without_gold:
            return False
        return self.decidable or kind != "counterfactual"


def deal_kinds(cells: Sequence[Cell], counts: Mapping[str, int], *, seed: int) -> list[tuple[str, ...]]:
    """The kinds of each cell's slots; each kind occurs exactly as often as `counts` says.

    Raises:
        RecipeError: counts that do not sum to the slots, or a kind that may stand in fewer slots than it is to fill.
    """
    total = sum(cell.slots for cell in cells)
    if sum(counts.values()) != total:
        raise RecipeError(f"{sum(counts.values())} kinds for {total} slots", hint="counts are of all slots of the data set")
    generator = random.Random(f"{seed}:kinds")
    free = [number for number, cell in enumerate(cells) for _ in range(cell.slots)]
    generator.shuffle(free)
    dealt: list[list[str]] = [[] for _ in cells]
    for kind in sorted(counts, key=lambda kind: sum(cell.slots for cell in cells if cell.takes(kind))):
        takers = [place for place, number in enumerate(free) if cells[number].takes(kind)]
        if len(takers) < counts[kind]:
            raise RecipeError(
                f"{counts[kind]} slots are to be {kind}, and only {len(takers)} may be",
                hint="lower its weight, or the share of prompts without gold",
            )
        taken = set(takers[: counts[kind]])
        for place in sorted(taken):
            dealt[free[place]].append(kind)
        free = [number for place, number in enumerate(free) if place not in taken]
    for kinds in dealt:
        generator.shuffle(kinds)
    return [tuple(kinds) for kinds in dealt]
