"""`raglan synthesize recipe.yaml` (`--plan`), and `raglan synthesize coverage`: training data, its plan, what became of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from raglan.errors import CorpusError
from raglan.progress import console
from raglan.recipe import Recipe, load_recipe

__all__ = ["coverage", "run"]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def run(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a .yaml file with `synthesis`.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change, as in synthesis.n=500.", show_default=False)
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Plan the examples, and write none.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run and pay 24 examples, keep them, and tell what all of them will cost.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Paid calls may cost what they cost, without a cap.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write training data by the recipe's `synthesis`: planned, written, checked, exact in number. Exits with 3 if short."""
    settings = load_recipe(recipe, overrides or [])
    if plan:
        _plan(settings, as_json)
        return
    if dry_run:
        _forecast(settings, as_json)
        return
    from raglan.synthesis.start import run as write

    done = write(settings, yes=yes)
    if as_json:
        typer.echo(json.dumps(done.told, ensure_ascii=False, indent=2))
    else:
        _tell_done(done.told)
    console.print(f"[dim]{done.folder}[/dim]", soft_wrap=True)
    if done.exit_code:
        raise typer.Exit(done.exit_code)


def _forecast(settings: Recipe, as_json: bool) -> None:
    """Calls, tokens, money with an interval, and time."""
    from raglan.calls.money import cap_of
    from raglan.synthesis.endpoint import estimate_lines, estimate_row
    from raglan.synthesis.start import forecast

    found = forecast(settings)
    assert settings.synthesis is not None
    if as_json:
        typer.echo(json.dumps(estimate_row(found), indent=2))
        return
    for line in estimate_lines(found, cap_nano=cap_of(settings.synthesis.money)):
        typer.echo(line)


def _tell_done(told: Mapping[str, Any]) -> None:
    """How many were asked for and came, and where the others were lost."""
    if apart := told.get("reserved"):
        typer.echo(f"reserved: {apart['requested']} requested, {apart['kept']} kept; {_named(apart)}")
    typer.echo(f"{told['requested']} requested, {told['kept']} kept, {told['surplus']} surplus, {told['attempts']} attempts")
    for reason, count in told["funnel"].items():
        if reason != "attempts":
            typer.echo(f"  rejected: {reason}: {count}")
    if told.get("closed_book"):
        typer.echo(f"known without passages: {told['closed_book']['known']} of {told['closed_book']['asked']} kept and asked")
    if (trip := told.get("round_trip")) and trip["unreachable"]:
        typer.echo(f"found again by no retriever: {trip['unreachable']} kept of at most {trip['most']}")
    if told["splits"]:
        sizes = ", ".join(f"{count} {name}" for name, count in told["splits"].items())
        typer.echo(f"split: {sizes}; the largest group is {told['largest_group']:.1%}")
    if told["stopped"]:
        typer.echo(f"stopped, {told['stopped']}; the same command goes on from here")
    for factor, values in told["left_out"].items():
        typer.echo(f"left out of {factor}: {', '.join(values)}")


def _named(apart: Mapping[str, Any]) -> str:
    """What is reserved, factor by factor; of topics their paths."""
    return "; ".join(f"{name} {', '.join(apart[name])}" for name in ("task", "topic") if name in apart)


def _plan(settings: Recipe, as_json: bool) -> None:
    """The plan alone: plan/plan.jsonl has a line an example, and every margin is exact."""
    from raglan.synthesis import make_plan, write_plan
    from raglan.synthesis.reserve import FOLDER, reserved_plan
    from raglan.synthesis.start import cannot_of

    asked = settings.synthesis
    cannot = cannot_of(asked) if asked is not None else None
    made = make_plan(settings, cannot=cannot)
    assert asked is not None
    written = [(made, write_plan(made, asked.path / "plan"))]
    if asked.reserve is not None:
        apart = reserved_plan(settings, cannot=cannot)
        written.append((apart, write_plan(apart, asked.path / FOLDER / "plan")))
    if as_json:
        told, *more = ({"n": len(own.cells), "margins": own.margins, "left_out": own.left_out} for own, _ in written)
        typer.echo(json.dumps({**told, **({FOLDER: more[0]} if more else {})}, ensure_ascii=False, indent=2))
    for own, folder in written:
        if not as_json:
            _tell_margins(own)
        console.print(f"[dim]{len(own.cells)} cells: {folder / 'plan.jsonl'}[/dim]", soft_wrap=True)


def coverage(
    dataset: Annotated[Path, typer.Argument(help="The folder of `synthesis.path`, with attempts.jsonl.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Planned, attempted, kept and missing by factor value; writes coverage.json. Exits with 3 if examples are missing."""
    from raglan.artifact import MANIFEST, write_json
    from raglan.documents import stream_examples
    from raglan.synthesis import complete, read_plan, shown_noise
    from raglan.synthesis import coverage as covered

    kept, manifest = dataset / "examples.jsonl", dataset / MANIFEST
    said = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    told = covered(
        read_plan(dataset / "plan"), _attempts(dataset / "attempts.jsonl"),
        shown=shown_noise(stream_examples(kept)) if kept.is_file() else None,
        ignores=said.get("ignored", ()), ignores_in_corpus=said.get("ignored_in_corpus", ()),
    )  # fmt: skip
    write_json(dataset / "coverage.json", told)
    if as_json:
        typer.echo(json.dumps(told, ensure_ascii=False, indent=2))
    else:
        _tell_coverage(told)
    console.print(f"[dim]{dataset / 'coverage.json'}[/dim]", soft_wrap=True)
    if not complete(told):
        raise typer.Exit(3)


def _attempts(path: Path) -> list[Any]:
    from raglan.synthesis import Attempt

    if not path.is_file():
        raise CorpusError(f"there is no {path}", hint='lines are {"cell": 0, "ordinal": 0, "reason": null, "query": "…"}')
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            found.append(_attempt(Attempt, line, f"{path}:{number}"))
    return found


def _attempt(kind: Any, line: str, place: str) -> Any:
    try:
        row = json.loads(line)
        reason, query = row.get("reason"), row.get("query", "")
        if not (isinstance(reason, str | None) and isinstance(query, str)):
            raise ValueError("reason and query are texts")
        return kind(int(row["cell"]), int(row["ordinal"]), reason, query)
    except (AttributeError, KeyError, TypeError, ValueError) as fault:
        raise CorpusError(f"{place} is no attempt: {fault}", hint="it needs cell and ordinal, two numbers") from None


def _tell_margins(plan: Any) -> None:
    """A line a value; of topics the first level, of positions the least and the most."""
    table = Table("factor", "value", Column("planned", justify="right"), box=None)
    for factor, counts in plan.margins.items():
        for place, (value, count) in enumerate(_shown(factor, counts).items()):
            table.add_row(factor if place == 0 else "", value, str(count))
    Console(width=100, highlight=False).print(table)
    for factor, values in plan.left_out.items():
        typer.echo(f"left out of {factor}, since nothing here takes it: {', '.join(values)}")


def _shown(factor: str, counts: dict[str, int]) -> dict[str, Any]:
    if factor.startswith("position"):
        least, most = min(counts.values()), max(counts.values())
        return {f"each of {len(counts)}": str(least) if least == most else f"{least} to {most}"}
    heads: dict[str, int] = {}
    for value, count in counts.items():
        heads[value.partition("/")[0]] = heads.get(value.partition("/")[0], 0) + count
    return heads


def _tell_coverage(told: dict[str, Any]) -> None:
    typer.echo(f"{told['requested']} requested, {told['kept']} kept, {told['surplus']} surplus, {told['attempts']} attempts")
    columns = (Column(name, justify="right") for name in ("planned", "attempted", "kept", "deficit"))
    table = Table("factor", "value", *columns, box=None)
    for factor, values in told["factors"].items():
        if factor != "topic":
            for place, (value, row) in enumerate(values.items()):
                table.add_row(factor if place == 0 else "", value, *map(str, row.values()))
    for place, (kind, row) in enumerate(told["noise"].items()):  # in slots; what was relabelled is in coverage.json
        cells = (str(row.get(name, "")) for name in ("planned", "attempted", "kept", "deficit"))
        table.add_row("noise" if place == 0 else "", kind, *cells)
    Console(width=100, highlight=False).print(table)
    for name, pairs in told["pairs"].items():
        typer.echo(f"{name}: {pairs['covered']} of {pairs['allowed']} pairs")
    for name in ("topic_entropy", "type_token_ratio", "mean_cosine"):
        typer.echo(f"{name}: {'–' if told[name] is None else format(told[name], '.4f')}")
    if told["ignored_in_corpus"]:
        typer.echo(f"counted without cells over a corpus, which do not heed them: {', '.join(told['ignored_in_corpus'])}")
    for reason, count in told["funnel"].items():
        typer.echo(f"{'' if reason == 'attempts' else '  rejected: '}{reason}: {count}")
