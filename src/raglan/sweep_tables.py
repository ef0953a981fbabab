"""A sweep in words and points: what the command line and the report show of `sweep.json`.

quality against retrieval rate, a point a setting; the front is the line on which more quality costs more retrieval
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raglan.grid_tables import GridTable
from raglan.recipe.sweep import TRIED

__all__ = ["setting_text", "sweep_front", "sweep_tables", "value_text", "varied"]

SHOWN = 20


def varied(settings: Sequence[Any]) -> list[str]:
    """The names of which these settings have more than one value; their objects have a `told()`, or are what it gives."""
    told = [one if isinstance(one, Mapping) else one.told() for one in settings]
    return [name for name in TRIED if len({value_text(one.get(name)) for one in told}) > 1]


def value_text(value: Any) -> str:
    """A value as it is read: numbers short, constraints as in a recipe, nothing where it is as in decode."""
    if isinstance(value, Mapping):
        parts = [name if on is True else f"{name}: {on}" for name, on in value.items()]
        return ", ".join(parts) or "none"
    if isinstance(value, int | float):
        return f"{value:g}"
    return "" if value is None else str(value)


def setting_text(one: Mapping[str, Any], names: Sequence[str]) -> str:
    """A setting in a line."""
    return ", ".join(f"{name} {value_text(one.get(name))}" for name in names if name in one) or "as in decode"


def sweep_front(told: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The settings of the front by quality and rate alone, the lowest rate first: no other is as good and retrieves less."""
    best: list[Mapping[str, Any]] = []
    for one in sorted(told["settings"], key=lambda one: (one["rate"], -one["quality"], one["generated"])):
        if not best or one["quality"] > best[-1]["quality"]:
            best.append(one)
    return best


def sweep_tables(told: Mapping[str, Any]) -> list[GridTable]:
    """The front of quality, retrieval rate and ids, and the settings that need generation."""
    names = varied([*told["settings"], *told["needs_generation"]])
    live = any("confirmed" in one for one in told["front"])
    head = [told["metric"], *(["live"] if live else []), "retrieval", "ids", *names]
    rows = []
    for one in told["front"]:
        confirmed = [f"{100 * one['confirmed']:.1f}" if "confirmed" in one else ""] if live else []
        figures = [f"{100 * one['quality']:.1f}", *confirmed, f"{100 * one['rate']:.1f}", f"{one['generated']:.1f}"]
        rows.append([*figures, *(value_text(one.get(name)) for name in names)])
    title = f"No setting of {len(told['settings'])} beats these in quality, retrieval rate and ids at once"
    tables = [GridTable(title, head, rows, {})] if rows else []
    if lacking := told["needs_generation"]:
        shown = [
            [f"{one['incomplete']} of {told['questions']}", *(value_text(one.get(n)) for n in names)] for one in lacking[:SHOWN]
        ]
        title = f"{len(lacking)} settings need generation: they come to segments that were never written"
        tables.append(GridTable(title, ["questions lacking", *names], shown, {}))
    return tables
