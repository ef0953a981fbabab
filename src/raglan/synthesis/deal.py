"""Dealing a factor: a whole-number table whose two margins are exact, over the allowed pairs only.

Rows are what was dealt before (r_i cells each), columns the factor's values (quotas c_j). The fitted table is

    x_ij = a_i · b_j  over allowed pairs,  Σ_j x_ij = r_i,  Σ_i x_ij = c_j          (iterative proportional fitting)

and the dealt one holds each x_ij's floor or ceiling with the same margins. That one exists whenever x does: a flow over the
fractional parts with whole-number bounds has a whole-number solution. Which of them is taken is settled by handing out the
largest fractions first, ties to the earlier entry, and mending along augmenting paths what that left undone.

Where an allowed pair can be in no table with these margins, plain fitting creeps towards its 0 and never arrives; such pairs
are found first (they connect two strongly connected parts of the residual flow) and left out, so that fitting converges.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from raglan.errors import RecipeError

__all__ = ["deal_table", "fitted"]

Counts = npt.NDArray[np.int64]
Allowed = npt.NDArray[np.bool_]
Fitted = npt.NDArray[np.float64]
ROUNDS, CLOSE = 5000, 1e-10
SLACKS = (-1e-7, 1e-7, 1e-3, 0.5)  # the first takes entries as whole numbers that are nearly that; the others are for slow fits


def deal_table(
    rows: Sequence[int], columns: Sequence[int], allowed: Any, *, row_names: Sequence[str], column_names: Sequence[str]
) -> Counts:
    """(R, C) counts with sums `rows` and `columns`, 0 where not allowed, each the floor or ceiling of the fitted entry.

    Args:
        rows, columns: the margins, with equal sums.
        allowed: (R, C) which pairs may meet.
        row_names, column_names: for messages.

    Raises:
        RecipeError: no such table exists; names the values that block, what they need and what there is.
    """
    r, c, may = np.asarray(rows, np.int64), np.asarray(columns, np.int64), np.asarray(allowed, bool)
    if r.sum() != c.sum():
        raise RecipeError(f"{int(r.sum())} cells cannot take {int(c.sum())} values", hint="the two margins must have one sum")
    if may.all():
        return _rounded_product(r, c)
    most = np.where(may, r.sum(), 0)  # no bound but the margins, or the flow would be blocked by the bound and not by a value
    flow, stuck = _transport(r, c, np.zeros_like(most), most, order=zip(*np.nonzero(may), strict=True))
    if stuck is not None:
        raise RecipeError(
            _blocked(r, c, may, stuck, row_names, column_names), hint="change one of these weights, or allow another pair"
        )
    return _rounded(r, c, fitted(r, c, _possible(may, flow)), most)


def fitted(rows: Counts, columns: Counts, allowed: Allowed) -> Fitted:
    """The table a_i · b_j over allowed pairs with these margins, as near as floats come."""
    x = (allowed & (rows > 0)[:, None] & (columns > 0)[None, :]).astype(np.float64)
    for _ in range(ROUNDS):
        x *= _ratio(rows, x.sum(1))[:, None]
        reached = x.sum(0)
        if np.abs(reached - columns).max(initial=0) < CLOSE * max(1, int(rows.sum())):
            break
        x *= _ratio(columns, reached)[None, :]
    return x


def _ratio(wanted: Counts, reached: Fitted) -> Fitted:
    return np.divide(wanted, reached, out=np.zeros(len(wanted)), where=reached > 0)


def _rounded_product(r: Counts, c: Counts) -> Counts:
    """Every pair allowed: x_ij = r_i c_j / N, floors and remainders in whole numbers."""
    total = max(1, int(r.sum()))
    product = r[:, None] * c[None, :]
    low, rest = product // total, product % total
    table, stuck = _transport(r, c, low, low + (rest > 0), order=_spread(rest, c - low.sum(0), total))
    assert stuck is None, "a table with whole-number bounds has a whole-number solution"
    return table


def _spread(rest: Counts, units: Counts, total: int) -> Iterable[tuple[int, int]]:
    """Column by column, the rows that are furthest behind their share first: thousands of equal remainders stay balanced."""
    behind = np.zeros(len(rest), np.int64)
    for j, some in enumerate(units.tolist()):
        behind += rest[:, j]
        chosen = np.argsort(np.where(rest[:, j] > 0, -behind, total * len(units)), kind="stable")[:some]
        behind[chosen] -= total
        yield from ((i, j) for i in chosen.tolist())


def _rounded(r: Counts, c: Counts, x: Fitted, most: Counts) -> Counts:
    for slack in SLACKS:
        low = np.clip(np.floor(x - slack), 0, most).astype(np.int64)
        high = np.clip(np.ceil(x + slack), low, most).astype(np.int64)
        order = np.argsort(-np.round(x - low, 9), axis=None, kind="stable")
        table, stuck = _transport(r, c, low, high, order=_pairs(order, low.shape))
        if stuck is None:
            return table
    table, _ = _transport(r, c, np.zeros_like(most), most, order=_pairs(np.argsort(-x, axis=None, kind="stable"), x.shape))
    return table


def _pairs(order: npt.NDArray[np.int64], shape: tuple[int, ...]) -> Iterable[tuple[int, int]]:
    rows, columns = np.unravel_index(order, shape)
    return zip(rows.tolist(), columns.tolist(), strict=True)


def _transport(
    r: Counts, c: Counts, low: Counts, high: Counts, *, order: Iterable[tuple[int, int]]
) -> tuple[Counts, tuple[Allowed, Allowed] | None]:
    """A table between `low` and `high` with these margins; else the rows and columns that a stuck row reaches."""
    table = low.copy()
    need, room = (r - low.sum(1)).tolist(), (c - low.sum(0)).tolist()
    if min(need, default=0) < 0 or min(room, default=0) < 0:
        return table, (np.zeros(len(r), bool), np.zeros(len(c), bool))
    for i, j in order:
        if need[i] and room[j] and (more := min(need[i], room[j], int(high[i, j] - table[i, j]))):
            table[i, j] += more
            need[i], room[j] = need[i] - more, room[j] - more
    rooms = np.array(room, np.int64)
    for i in range(len(r)):
        while need[i]:
            pushed, reached = _augment(table, low, high, rooms, i, need[i])
            if not pushed:
                return table, reached
            need[i] -= pushed
    return table, None


def _augment(
    table: Counts, low: Counts, high: Counts, room: Counts, start: int, need: int
) -> tuple[int, tuple[Allowed, Allowed]]:
    """Push what one shortest path takes from row `start` to a column with room; how much, and what was reached."""
    from_row = np.full(table.shape[1], -1)  # the row by which a column was reached
    from_column = np.full(table.shape[0], -1)
    seen_rows, front = np.zeros(table.shape[0], bool), [start]
    seen_rows[start] = True
    while front:
        behind: list[int] = []
        for i in front:
            fresh = np.flatnonzero((table[i] < high[i]) & (from_row < 0))
            from_row[fresh] = i
            if (ends := fresh[room[fresh] > 0]).size:
                pushed = _push(table, low, high, room, (start, int(ends[0]), need), from_row, from_column)
                return pushed, (seen_rows, from_row >= 0)
            for j in fresh.tolist():
                found = np.flatnonzero((table[:, j] > low[:, j]) & ~seen_rows)
                seen_rows[found], from_column[found] = True, j
                behind += found.tolist()
        front = behind
    return 0, (seen_rows, from_row >= 0)


def _push(
    table: Counts, low: Counts, high: Counts, room: Counts, ends: tuple[int, int, int],
    from_row: npt.NDArray[Any], from_column: npt.NDArray[Any],
) -> int:  # fmt: skip
    start, end, most = ends
    most, steps, j = min(most, int(room[end])), [], end
    while True:
        i = int(from_row[j])
        most = min(most, int(high[i, j] - table[i, j]))
        steps.append((i, j, 1))
        if i == start:
            break
        j = int(from_column[i])
        most = min(most, int(table[i, j] - low[i, j]))
        steps.append((i, j, -1))
    for i, j, sign in steps:
        table[i, j] += sign * most
    room[end] -= most
    return most


def _possible(may: Allowed, flow: Counts) -> Allowed:
    """Allowed pairs that are above 0 in some table with the margins of `flow`."""
    used = flow > 0
    reach = np.eye(may.shape[1], dtype=bool) | (used.T.astype(np.int64) @ may.astype(np.int64) > 0)  # column → row → column
    while True:
        further = reach | (reach.astype(np.int64) @ reach.astype(np.int64) > 0)
        if (further == reach).all():
            break
        reach = further
    cycles = used.astype(np.int64) @ reach.T.astype(np.int64) > 0  # (i, j): a path leads from column j back to row i
    return may & (used | cycles)


def _blocked(
    r: Counts, c: Counts, may: Allowed, stuck: tuple[Allowed, Allowed], row_names: Sequence[str], column_names: Sequence[str]
) -> str:
    """Hall's condition that fails, told from the side on which fewer names are needed."""
    rows, columns = stuck
    others, left = np.flatnonzero(may[:, ~columns].any(1) & (r > 0) & ~rows), np.flatnonzero(~columns & (c > 0))
    if not columns.any() or rows.sum() + columns.sum() <= len(others) + len(left):
        told = _names(row_names, rows & (r > 0)), int(r[rows].sum()), _names(column_names, columns), int(c[columns].sum())
        return f"{told[0]} needs {told[1]} {told[2]}, quota {told[3]}"
    takers = _names(row_names, others) or "nothing"
    return f"{_names(column_names, left)} has quota {int(c[left].sum())}, and what takes it is {takers}, {int(r[others].sum())}"


def _names(names: Sequence[str], chosen: Any) -> str:
    picked = np.flatnonzero(chosen) if np.asarray(chosen).dtype == bool else chosen
    told = [names[int(place)] for place in picked[:6]]
    return ", ".join(told) + (f" and {len(picked) - 6} more" if len(picked) > 6 else "")
