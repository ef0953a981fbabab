"""The tree of a long answer, as lines: each candidate below its parent, the path of the answer marked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Line", "tree_lines"]

NAMES = {"no": "without passage", "continue": "reads on"}


@dataclass(frozen=True)
class Line:
    """A candidate: how deep it stands, what it says, and whether it went on (`kept`) or is on the answer's path (`best`)."""

    depth: int
    text: str
    kept: bool
    best: bool


def tree_lines(trace: Mapping[str, Any]) -> list[Line]:
    """The candidates of a long form's trace, each level's below their parents, in the order of their passages."""
    every = [one for level in trace["levels"] for one in level["candidates"]]
    parent = {one["node"]: one["parent"] for one in every}
    on_path = set(_upward(trace["best"][0], parent)) if trace["best"] else set()
    below: dict[int, list[Mapping[str, Any]]] = {}
    for one in every:
        below.setdefault(one["parent"], []).append(one)
    return list(_drawn(0, 0, below, on_path))


def _drawn(node: int, depth: int, below: Mapping[int, Sequence[Mapping[str, Any]]], on_path: set[int]) -> Iterator[Line]:
    for one in sorted(below.get(node, ()), key=lambda one: one["node"]):
        yield Line(depth, _said(one), not one["pruned"], one["node"] in on_path)
        yield from _drawn(one["node"], depth + 1, below, on_path)


def _upward(node: int, parent: Mapping[int, int]) -> Iterator[int]:
    while node in parent:
        yield node
        node = parent[node]


def _said(one: Mapping[str, Any]) -> str:
    name = NAMES.get(one["decision"]) or f"[{one['rank']}] {one['title'] or one['passage']}"
    if "final" not in one:
        rel = f": rel {one['rel']:.4f}" if "rel" in one else ""
        return f"{name}{rel}, left out ({one['pruned']})"
    figures = " ".join(f"{key} {_number(one[key])}" for key in ("final", "step", "seq", "rel", "sup", "use"))
    notes = [*one["flags"], *([one["finish"]] if one["finish"] else []), *([one["pruned"]] if one["pruned"] else [])]
    told = f" ({', '.join(notes)})" if notes else ""
    return f"{name}: {figures}{told}: {one['raw']}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
