"""`raglan evaluate --cache`, `--rescore` and `--sweep`: what they print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from raglan.errors import MissingExtra
from raglan.progress import console
from raglan.recipe import Recipe
from raglan.sweep_tables import value_text, varied

__all__ = ["cached", "rescored", "swept"]

SHOWN = 20


def cached(recipe: Recipe, *, as_json: bool) -> None:
    """Write candidates."""
    from raglan.sweep import write_candidates

    folder, cache = write_candidates(recipe)
    told = {"folder": str(folder), "contexts": len(cache.states), "continuations": len(cache.written)}
    if as_json:
        typer.echo(json.dumps(told, indent=2))
        return
    console.print(f"{told['continuations']} continuations behind {told['contexts']} contexts: {folder}", soft_wrap=True)


def rescored(recipe: Recipe, *, fill: bool, as_json: bool) -> None:
    """Measure from candidates."""
    from raglan.sweep import rescore

    found = rescore(recipe, fill=fill)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    table = Table("figure", "rescored", box=None)
    for name, value in found.figures.items():
        table.add_row(name, f"{100 * value:.1f}")
    table.add_row("retrieval rate", f"{100 * found.rate:.1f}")
    table.add_row("ids written", str(found.generated))
    Console(highlight=False).print(table)
    console.print(
        f"{found.questions} questions, incomplete: {found.incomplete}; {found.calls} model calls, {found.seconds:.2f} s"
    )


def swept(recipe: Recipe, *, fill: bool, confirm: bool, as_json: bool) -> None:
    """Try settings on candidates, and draw what they come to."""
    from raglan.report import write_sweep
    from raglan.sweep import swept as sweep

    found = sweep(recipe, fill=fill, confirm=confirm)
    page = recipe.run / "sweep.html"
    try:
        write_sweep(recipe, found.told(), page)
    except MissingExtra as fault:
        console.print(f"[dim]not drawn: {fault.message}; {fault.hint}[/dim]")
    if as_json:
        typer.echo(json.dumps(found.told(), indent=2))
        return
    names = varied([*found.settings, *found.needs_generation])
    wide = Console(width=110, highlight=False)
    wide.print(_table(f"the best of {len(found.settings)} settings", found.settings[:SHOWN], found.metric, names))
    wide.print(_table("no setting beats these in quality, retrieval rate and ids at once", found.front, found.metric, names))
    if found.needs_generation:
        wide.print(_lacking(found.needs_generation, found.questions, names))
        console.print("add --fill, which writes what these lack and keeps it; --cache with a wider sweep.beam records more")
    console.print(
        f"{len(found.settings)} settings × {found.questions} questions in {found.seconds:.2f} s, {found.calls} model calls: "
        f"{recipe.run / 'sweep.json'}, {page.name}", soft_wrap=True,
    )  # fmt: skip


def _table(title: str, settings: list[Any], metric: str, names: Sequence[str]) -> Table:
    live = any(one.confirmed is not None for one in settings)
    head = [metric, *(["live"] if live else []), "retrieval", "ids", *names]
    table = Table(*head, box=None, title=title, title_justify="left")
    for one in settings:
        confirmed = [f"{100 * one.confirmed:.1f}" if one.confirmed is not None else ""] if live else []
        figures = [f"{100 * one.quality:.1f}", *confirmed, f"{100 * one.rate:.1f}", f"{one.generated:.1f}"]
        table.add_row(*figures, *_values(one, names))
    return table


def _lacking(settings: list[Any], questions: int, names: Sequence[str]) -> Table:
    title = f"{len(settings)} settings need generation: they come to segments that were never written"
    table = Table("lacking", *names, box=None, title=title, title_justify="left")
    for one in settings[:SHOWN]:
        table.add_row(f"{one.incomplete} of {questions}", *_values(one, names))
    return table


def _values(one: Any, names: Sequence[str]) -> list[str]:
    told = one.told()
    return [value_text(told.get(name)) for name in names]
