"""`raglan calls`: what the calls in a journal cost."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["calls"]


def calls(
    folder: Annotated[Path, typer.Argument(help="The folder of a journal of calls.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Show what paid calls cost, counted from their journal. A run that is writing it is not disturbed."""
    from raglan.calls.journal import read_ledger
    from raglan.calls.money import dollars

    ledger = read_ledger(folder)
    if as_json:
        typer.echo(json.dumps({"spent_nano": ledger.spent, "rows": [asdict(row) for row in ledger.rows()]}))
        return
    typer.echo(f"{'step':16} {'model':24} {'outcome':10} {'calls':>8} {'in':>12} {'cached':>12} {'out':>12} {'dollars':>14}")
    for row in ledger.rows():
        used = f"{row.usage.prompt:12} {row.usage.cached:12} {row.usage.output:12}"
        typer.echo(f"{row.step:16} {row.model:24} {row.cls:10} {row.calls:8} {used} {dollars(row.nano):>14}")
    typer.echo(
        f"spent {dollars(ledger.spent)}, of which {dollars(ledger.doubts.nano)} for {ledger.doubts.calls} calls in doubt"
    )
