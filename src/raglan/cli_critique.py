"""`raglan critique`: labels, the critic's data, and the generator's annotated rows, for Self-RAG."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from raglan.errors import RecipeError
from raglan.progress import console
from raglan.recipe import load_recipe

__all__ = ["critique"]


def critique(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a .yaml file with `critique`.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change, as in critique.k=5.", show_default=False)
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(help="critic: what a critic learns from; annotation: the generator's rows.", show_default=False),
    ] = None,
    shard: Annotated[
        str | None, typer.Option(help="Annotate a part, as 2/3; several may run at once.", show_default=False)
    ] = None,
    join: Annotated[int | None, typer.Option(min=1, help="Put so many finished shards together.", show_default=False)] = None,
    audit: Annotated[
        Path | None, typer.Option(help="A filled-in audit.csv: tell how far people agree with the teacher.", show_default=False)
    ] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Ask a few judgements of each kind, keep them, and tell what all will cost.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Let a teacher that costs money go on without a cap.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Label, make critic data, annotate. What is done is kept; an interrupted run goes on, and asks no teacher twice."""
    from raglan.critique import Critique, read_audit, shard_of

    if only not in (None, "critic", "annotation"):
        raise RecipeError(f"--only is {only!r}", hint="critic or annotation")
    if shard is not None and join is not None:
        raise RecipeError("--shard and --join exclude each other", hint="run all shards first, then --join")
    if only == "critic" and (shard is not None or join is not None):
        raise RecipeError("--shard and --join are of the annotation, and --only critic makes none", hint="leave out --only")
    if audit is not None:
        _tell({"audit": read_audit(audit)}, as_json)
        return
    work = Critique(load_recipe(recipe, overrides or []), uncapped=yes)
    if estimate:
        _tell_estimate(work.estimate(), as_json)
        return
    told: dict[str, Any] = {}
    if only != "annotation" and work.settings.critic is not None and shard is None and join is None:
        told["critic"] = work.critic_data()["judgements"]
        if work.settings.annotator is not None and only is None:
            told["annotator"] = work.compare_annotator()
    if only != "critic":
        part = None if shard is None else shard_of(shard)
        told["annotation"] = work.join(join) if join is not None else work.annotate(shard=part)
    _tell(told, as_json)
    console.print(f"[dim]{work.settings.path}[/dim]")


def _tell(told: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(told, ensure_ascii=False, indent=2))
        return
    for kind, figures in told.get("critic", {}).items():
        rejected = sum(figures["rejected"].values())
        typer.echo(
            f"{kind:17s} {figures['asked']} asked, {rejected} rejected, {figures['balanced_out']} balanced out; "
            f"{_counts(figures['kept'])}; {_counts(figures['rows'])}; second pass {_agrees(figures['second_pass'])}"
        )
        for reason, count in figures["rejected"].items():
            typer.echo(f"  {count} rejected: {reason}")
    for name in ("annotator", "audit"):
        for kind, figures in told.get(name, {}).items():
            typer.echo(
                f"{kind:17s} {'annotator and teacher' if name == 'annotator' else 'people and teacher'}: {_agrees(figures)}"
            )
    if "annotation" in told:
        rows = told["annotation"]["rows"]
        typer.echo(f"{rows['in']} rows in, {rows['out']} out ({_counts(rows['written'])})")
        for reason, count in rows["dropped"].items():
            typer.echo(f"  {count} dropped: {reason}")
        for source, counts in told["annotation"]["labels"].items():
            for name, labels in counts.items():
                typer.echo(f"  {source:12s} {name:9s} {_counts(labels)}")


def _tell_estimate(found: Any, as_json: bool) -> None:
    from raglan.calls.money import dollars

    if as_json:
        ends = {"low_nano": round(found.low), "high_nano": round(found.high)}
        told = {"judgements": found.cells, "asked": found.sampled, "nano": round(found.nano), **ends, "seconds": found.seconds}
        typer.echo(json.dumps(told, indent=2))
        return
    for step, (usage, low, high) in found.steps.items():
        typer.echo(
            f"{step:26s} {usage.calls:8.0f} calls {usage.prompt:12.0f} tokens in {usage.output:10.0f} out  "
            f"{dollars(round(usage.nano))} ({dollars(round(low))} to {dollars(round(high))})"
        )
    typer.echo(
        f"{found.cells} judgements, of which {found.sampled} were asked and are kept: {dollars(round(found.nano))} in all, "
        f"with 95 % between {dollars(round(found.low))} and {dollars(round(found.high))}, {found.seconds / 60:.0f} minutes; "
        "the annotation comes on top"
    )


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def _agrees(figures: dict[str, Any]) -> str:
    if not figures["rows"]:
        return "none"
    told = "undefined" if figures["kappa"] is None else f"{figures['kappa']:.2f}"
    return f"{figures['agreement']:.1%} of {figures['rows']}, kappa {told}"
