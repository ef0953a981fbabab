"""Where the evidence stands among the passages, and in which orders a prompt is tried.

Gold slots are dealt over 1…K for each K in blocks: every block is a fresh order of all positions, so that no position is ahead
by more than one; what is left over of a last block goes to the earlier positions. Of 23 examples with K = 5: 5 5 5 4 4.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from raglan.errors import RecipeError
from raglan.perturb.slot import Slot

__all__ = ["arrange", "deal_positions", "orders"]

Order = Literal["uniform", "first", "middle", "last", "rank"]


def deal_positions(prompts: Sequence[tuple[int, int]], *, seed: int) -> list[tuple[int, ...]]:
    """The positions of each prompt's gold slots, from 1, ascending; per K no position is used twice more than another.

    Args:
        prompts: (K, gold slots) of each.

    Raises:
        RecipeError: more gold slots than slots.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for number, (k, gold) in enumerate(prompts):
        if not 0 <= gold <= k:
            raise RecipeError(f"{gold} gold passages do not fit into {k} slots", hint="raise K, or show fewer of them")
        groups[k].append(number)
    dealt: list[tuple[int, ...]] = [()] * len(prompts)
    for k, members in sorted(groups.items()):
        generator = random.Random(f"{seed}:positions:{k}")
        generator.shuffle(members)
        shares = _dealt(k, [prompts[number][1] for number in members], generator)
        for number, positions in zip(members, shares, strict=True):
            dealt[number] = positions
    return dealt


def arrange(
    slots: Sequence[Slot], *, seed: str, order: Order = "uniform", positions: Sequence[int] = ()
) -> tuple[Slot, ...]:  # fmt: skip
    """The slots of a prompt in their order.

    Args:
        order: `uniform` puts gold at `positions` and shuffles the rest; `first`, `middle` and `last` put gold there and
            leave the rest as it is; `rank` is by the search's rank, what no search found last.
        positions: of the gold slots, from 1, as `deal_positions` deals them.

    Raises:
        RecipeError: positions that are not as many as gold slots, or lie outside the prompt.
    """
    gold = [slot for slot in slots if slot.role == "gold"]
    rest = [slot for slot in slots if slot.role != "gold"]
    if order == "rank":
        return tuple(sorted(slots, key=lambda slot: math.inf if slot.rank is None else slot.rank))
    if order == "uniform":
        random.Random(seed).shuffle(rest)
    else:
        start = {"first": 0, "middle": len(rest) // 2, "last": len(rest)}[order]
        positions = range(start + 1, start + 1 + len(gold))
    if len(set(positions)) != len(gold) or any(not 1 <= place <= len(slots) for place in positions):
        raise RecipeError(
            f"positions {list(positions)} do not fit {len(gold)} gold passages of {len(slots)}",
            hint="deal_positions deals them",
        )
    others, evidence = iter(rest), iter(gold)
    return tuple(next(evidence) if place in positions else next(others) for place in range(1, len(slots) + 1))


def orders(k: int, count: int = 4, *, seed: str) -> list[tuple[int, ...]]:
    """`count` different orders of 0…K−1, the given one first; all of them where there are fewer."""
    most = min(count, math.factorial(k))
    generator = random.Random(seed)
    found = dict.fromkeys([tuple(range(k))])
    while len(found) < most:
        found[tuple(generator.sample(range(k), k))] = None
    return list(found)


def _dealt(k: int, wanted: Sequence[int], generator: random.Random) -> list[tuple[int, ...]]:
    """So many positions for each, all different, from blocks in turn. The short block comes first: what it lacks can then
    always be made up by the head of the next."""
    block = generator.sample(range(1, sum(wanted) % k + 1), sum(wanted) % k) if k else []
    shares = []
    for count in wanted:
        mine, block = block[:count], block[count:]
        if len(mine) < count:
            whole = generator.sample(range(1, k + 1), k)
            head = [place for place in whole if place not in mine][: count - len(mine)]
            block = [place for place in whole if place not in head]
            mine = mine + head
        shares.append(tuple(sorted(mine)))
    return shares
