"""What `raglan evaluate` prints of its measurements: the table, differences, training seeds, and what an answer took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from raglan.answerable import kinds, kinds_text, uncomputed
from raglan.domains import domain
from raglan.evaluate import Evaluation, compare, interval_kinds, spent
from raglan.metrics import Interval
from raglan.progress import console
from raglan.recipe import Recipe
from raglan.seeds import over_seeds, seed_lines

__all__ = ["evaluation_summary", "percent", "tell_evaluations"]

HEADS = ("retrieved/em", "retrieved/accuracy", "retrieved/rouge_l", "recall@1")
NONE = {"mean": None, "low": None, "high": None, "n": 0}


def evaluation_summary(recipe: Recipe, evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """The figures as JSON, by system; the kinds of questions, where not all have answers; the verdict on `dataset`."""
    assert recipe.evaluate is not None
    told: dict[str, Any] = {}
    for one in evaluations:
        lacking = uncomputed(one.rows, recipe.evaluate, one.figures)
        told[one.system] = {n: _numbers(i) for n, i in one.figures.items()} | {name: dict(NONE) for name in lacking}
    found, where = kinds(evaluations[0].rows), domain(recipe)
    told |= {"questions": found} if kinds_text(found) else {}
    if (price := recipe.evaluate.price) is not None:
        told["spent"] = {one.system: spent(one.rows, price=price) for one in evaluations}
    return told | ({} if where is None else {"domain": asdict(where)})


def tell_evaluations(recipe: Recipe, evaluations: Sequence[Evaluation]) -> None:
    """The table to stdout, with verdicts on differences; the rest to stderr."""
    assert recipe.evaluate is not None
    differences = compare(evaluations[0], evaluations[-1]) if len(evaluations) > 1 else {}
    of_kinds = kinds_text(kinds(evaluations[0].rows))
    table = _table(recipe, evaluations, differences, counted=bool(of_kinds))
    Console(width=max(100, 34 + 24 * (len(evaluations) + 1)), highlight=False).print(table)
    console.print(
        f"{len(evaluations[0].rows)} questions{': ' * bool(of_kinds)}{of_kinds}; percent, 95 % intervals by "
        f"{interval_kinds(evaluations[-1].figures)}",
        soft_wrap=True,
    )
    heads = [name for name in HEADS if name in differences]
    for name in heads:
        typer.echo(_verdict(name, evaluations[0].figures[name], evaluations[-1].figures[name], differences[name]))
    for line in seed_lines(over_seeds(recipe), next(iter(heads), "")):
        typer.echo(line)
    for evaluation in evaluations:
        _tell_spent(evaluation.system, spent(evaluation.rows, price=recipe.evaluate.price))
        console.print(f"{evaluation.system}: {evaluation.folder / 'predictions.jsonl'}", soft_wrap=True)


def _table(
    recipe: Recipe, evaluations: Sequence[Evaluation], differences: Mapping[str, Interval], *, counted: bool
) -> Table:  # fmt: skip
    """`counted`: with the number of questions behind each figure."""
    assert recipe.evaluate is not None
    last = evaluations[-1]
    more = [*(["difference"] if differences else []), *(["n"] if counted else [])]
    table = Table("figure", *(e.system for e in evaluations), *more, box=None)
    for name in [*last.figures, *uncomputed(last.rows, recipe.evaluate, last.figures)]:
        cells = [percent(e.figures[name]) if name in e.figures else "–" if counted else "" for e in evaluations]
        changed = percent(differences[name], sign=True) if name in differences else ""
        n = last.figures[name].n if name in last.figures else 0
        table.add_row(name, *cells, *([changed] if differences else []), *([str(n)] if counted else []))
    return table


def _tell_spent(system: str, costs: Mapping[str, Mapping[str, float]]) -> None:
    """What an answer took in each mode."""
    for mode, cost in costs.items():
        told = ", ".join(f"{name} {value:.4g}" for name, value in cost.items())
        console.print(f"{system}, {mode}, an answer: {told}", soft_wrap=True)


def _numbers(value: Interval) -> dict[str, float]:
    return {"mean": value.mean, "low": value.low, "high": value.high, "n": value.n}


def _verdict(name: str, before: Interval, after: Interval, difference: Interval) -> str:
    """In words, whether a figure has changed."""
    change = "better" if difference.low > 0 else "worse" if difference.high < 0 else "not clearly changed"
    change = "unchanged" if difference.low == difference.high == 0 else change
    apart = "" if before.overlaps(after) else "; the two intervals do not overlap"
    return f"{name} is {change}: {percent(difference, sign=True)} points{apart}"


def percent(value: Interval, *, sign: bool = False) -> str:
    """A figure in points of 100, with its interval."""
    form = "{:+.1f}" if sign else "{:.1f}"
    return f"{form.format(100 * value.mean)} [{form.format(100 * value.low)}, {form.format(100 * value.high)}]"
