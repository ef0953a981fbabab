"""What a paid teacher needs around it: an engine for its calls, consent to their price, and the estimate in words.

    consent    a cap, or `yes`; without either a run makes no call
    estimate   24 cells, spread over sources and families of tasks, really run, paid and kept → calls, tokens, money, time;
               who asks for it consents to these cells, and no cap or `yes` is needed
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raglan.calls import CallEngine
from raglan.calls.estimate import Estimate
from raglan.calls.journal import Journal
from raglan.calls.money import dollars, lacks_cap
from raglan.corpus import Corpus
from raglan.errors import RecipeError
from raglan.recipe import EndpointSettings, Recipe, SynthesisSettings
from raglan.synthesis.endpoint.teacher import EndpointTeacher
from raglan.synthesis.plan import Plan, factors_of
from raglan.synthesis.writing import Shelf

__all__ = ["check_consent", "cost", "estimate_lines", "estimate_row", "open_endpoint"]


@contextmanager
def open_endpoint(
    recipe: Recipe, plan: Plan, corpus: Corpus | None, *, journal: Journal | None = None, shelf: Shelf | None = None
) -> Iterator[EndpointTeacher]:
    """The recipe's teacher, with its journal open, or with one that is open already.

    Raises:
        RecipeError: `synthesis.teacher` is no endpoint, or there is no price. GeneratorError: the key's variable is not set.
        CheckpointError: another process writes the journal.
    """
    asked = recipe.synthesis
    if asked is None or not isinstance(asked.teacher, EndpointSettings):
        raise RecipeError("synthesis.teacher is no endpoint", hint="teacher: {kind: endpoint, base_url: …, model: …}")
    folder = Path(asked.calls or asked.path / "calls")
    with CallEngine(asked.teacher, journal or folder, money=asked.priced) as engine:
        yield EndpointTeacher(engine, plan, factors_of(recipe)[0], corpus=corpus, writing=asked.writing, shelf=shelf)


def check_consent(settings: SynthesisSettings, prices: Sequence[object], *, yes: bool) -> None:
    """Raises RecipeError where calls cost money, one of `prices`, and nobody said how much they may."""
    if lacks_cap(settings.money, prices) and not yes:
        raise RecipeError(
            "calls have a price, and synthesis.money has no cap_usd",
            hint="--dry-run runs and pays 24 cells and tells what all will cost; then set a cap, or say --yes",
        )


def estimate_row(found: Estimate) -> dict[str, Any]:
    """An estimate as JSON values; money in nano-dollars."""
    steps = {name: {**asdict(step), "low": low, "high": high} for name, (step, low, high) in found.steps.items()}
    return {**asdict(found), "steps": steps}


def estimate_lines(found: Estimate, *, cap_nano: int | None = None) -> list[str]:
    """An estimate as a table: a row a step, the sum, and whether a cap will hold it."""
    lines = [f"{'step':12} {'calls':>9} {'tokens in':>12} {'out':>12} {'dollars':>14}   95 %"]
    total = [0.0, 0.0, 0.0]
    for name, (step, low, high) in found.steps.items():
        total = [a + b for a, b in zip(total, (step.calls, step.prompt, step.output), strict=True)]
        lines.append(_line(name, step.calls, step.prompt, step.output, step.nano, low, high))
    lines.append(_line("all", total[0], total[1], total[2], found.nano, found.low, found.high))
    lines.append(
        f"{found.cells} examples, {found.attempts} attempts at an acceptance of {found.acceptance:.0%} "
        f"({found.sampled} cells were run and are kept); about {_time(found.seconds)}"
    )
    if cap_nano is not None and found.high > cap_nano:
        lines.append(f"money.cap_usd is {dollars(cap_nano)}: the run may stop there, and a larger cap goes on")
    return lines


def _line(name: str, calls: float, prompt: float, output: float, nano: float, low: float, high: float) -> str:
    interval = f"{dollars(round(low))} to {'no end' if math.isinf(high) else dollars(round(high))}"
    return f"{name:12} {calls:9,.0f} {prompt:12,.0f} {output:12,.0f} {dollars(round(nano)):>14}   {interval}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def cost(journal: Journal) -> dict[str, Any]:
    """The ledger, counted from the journal: of all runs that share it."""
    ledger = journal.ledger
    rows = [asdict(row) for row in ledger.rows()]
    doubts = {"calls": ledger.doubts.calls, "nano_usd": ledger.doubts.nano}
    strange = {"misreported": ledger.misreported} if ledger.misreported else {}
    return {"calls": sum(row["calls"] for row in rows), "nano_usd": ledger.spent, "in_doubt": doubts, **strange, "rows": rows}
