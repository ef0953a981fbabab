"""What a run will cost, from some of its cells that are really run and kept.

    total = N · Σ_c w_c·cost_c / Σ_c w_c·accepted_c        w_c = planned cells of c's stratum / sampled ones

A cell is one ask with all that follows from it: retries, repairs, rejects. What is rejected is made again, hence the division.
The interval is a bootstrap over cells, all in one urn: the gain of the strata is not claimed, so it is wide rather than narrow.
Its percentiles are stretched as Student's t is against the normal, since 24 cells are few. Costs are read from the journal, so
cells that an earlier run has paid count at what they cost then.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from raglan.calls.asks import Ask, Outcome, Usage
from raglan.calls.engine import CallEngine
from raglan.errors import GeneratorError

__all__ = ["Cell", "Estimate", "Step", "draw_sample", "estimate", "extrapolate", "reckon", "share_out"]

SAMPLE, RESAMPLES, Z = 24, 10_000, 1.96
T = TypeVar("T")
Told = tuple[bool, Mapping[str, tuple[str, int]]]  # whether a cell was accepted; its calls: key → (step, cells it serves)


@dataclass
class Step:
    """Requests of one step: how many, with which tokens, for how many nano-dollars, in how many seconds."""

    calls: float = 0.0
    prompt: float = 0.0
    output: float = 0.0
    nano: float = 0.0
    seconds: float = 0.0

    def add(self, other: Step, weight: float = 1.0) -> None:
        for name in ("calls", "prompt", "output", "nano", "seconds"):
            setattr(self, name, getattr(self, name) + weight * getattr(other, name))


@dataclass
class Cell:
    """A cell that was run: what each step took, and whether the cell was accepted."""

    stratum: str
    accepted: bool = True
    steps: dict[str, Step] = field(default_factory=dict)

    @property
    def nano(self) -> float:
        return sum(step.nano for step in self.steps.values())


@dataclass(frozen=True)
class Estimate:
    """What `cells` accepted cells take.

    Attributes:
        acceptance: share of the sample that was accepted.
        attempts: cells that have to be run for that.
        steps: what each step takes in all, and its interval in nano-dollars.
        nano, low, high: money in all, and its 95 % interval.
        seconds: at the endpoint's concurrency and rates.
    """

    cells: int
    sampled: int
    acceptance: float
    attempts: int
    steps: Mapping[str, tuple[Step, float, float]]
    nano: float
    low: float
    high: float
    seconds: float


def estimate(
    engine: CallEngine, asks: Iterable[Ask], *, stratum: Callable[[Ask], str] = lambda ask: ask.step,
    follow: Callable[[Outcome], Iterable[Ask]] | None = None,
    accepted: Callable[[Outcome], bool] = lambda outcome: outcome.cls == "ok", sample: int = SAMPLE, seed: int = 0,
) -> Estimate:  # fmt: skip
    """Run a stratified sample of cells, and say what all of them will cost. The sample's replies are kept.

    Args:
        asks: the first ask of every cell; read once, of which `sample` are held for each stratum.
        stratum: what kind of cell an ask begins.
        follow: as in `CallEngine.run`.
        accepted: whether an outcome lets its cell be accepted.

    Raises:
        CallsStopped: as `CallEngine.run`. GeneratorError: no cell was accepted, so there is nothing to reckon with.
    """

    def run(drawn: Sequence[Ask]) -> list[Told]:
        good, keys = [True] * len(drawn), [{engine.key(ask): (ask.step, 1)} for ask in drawn]
        held = list(drawn)  # ids stay their own as long as the asks are held
        of = {id(ask): number for number, ask in enumerate(drawn)}

        def next_asks(outcome: Outcome) -> list[Ask]:
            number = of[id(outcome.ask)]
            good[number] &= accepted(outcome)
            further = list(follow(outcome)) if follow is not None else []
            held.extend(further)
            of.update({id(ask): number for ask in further})
            keys[number].update({engine.key(ask): (ask.step, 1) for ask in further})
            return further

        for _ in engine.run(list(drawn), follow=next_asks):
            pass
        return list(zip(good, keys, strict=True))

    return reckon(engine, asks, run, stratum=stratum, sample=sample, seed=seed)


def reckon(
    engine: CallEngine, items: Iterable[T], run: Callable[[list[T]], Sequence[Told]], *, stratum: Callable[[T], str],
    sample: int = SAMPLE, seed: int = 0,
) -> Estimate:  # fmt: skip
    """What all items will cost, from some that are really run; their calls may be of several engines over one journal.

    Args:
        run: items → of each whether it was accepted, and its calls: key → (step, how many of all items the call serves).

    Raises:
        CallsStopped: as `run`. GeneratorError: nothing was accepted.
    """
    planned, drawn = draw_sample(items, stratum, sample, seed=seed)
    told = run([item for _, item in drawn])
    cells = [Cell(name, accepted) for (name, _), (accepted, _) in zip(drawn, told, strict=True)]
    _price(engine, cells, [keys for _, keys in told])
    return _timed(extrapolate(cells, planned, seed=seed), engine)


def extrapolate(cells: Sequence[Cell], planned: Mapping[str, int], *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """From cells that were run to `planned` accepted ones by stratum.

    Raises:
        GeneratorError: none was accepted.
    """
    if not any(cell.accepted for cell in cells):
        raise GeneratorError(
            f"none of {len(cells)} sampled cells was accepted", hint="read the rejects; the model or the prompts do not fit"
        )
    total, counts = sum(planned.values()), Counter(cell.stratum for cell in cells)
    weights = np.array([planned[cell.stratum] / counts[cell.stratum] for cell in cells])
    kept = weights * np.array([cell.accepted for cell in cells], dtype=float)
    names = sorted({name for cell in cells for name in cell.steps})
    costs = np.array([[cell.steps[name].nano if name in cell.steps else 0.0 for name in names] for cell in cells])
    factor = total / kept.sum()
    steps = {name: Step() for name in names}
    for weight, cell in zip(weights, cells, strict=True):
        for name, step in cell.steps.items():
            steps[name].add(step, weight * factor)
    by_step = factor * weights @ costs  # (steps,)
    low, high = _interval(weights[:, None] * costs, kept, total, seed, resamples)
    return Estimate(
        total, len(cells), float(kept.sum() / weights.sum()), math.ceil(factor * weights.sum() - 1e-9),
        {name: (steps[name], low[i], high[i]) for i, name in enumerate(names)},
        float(by_step.sum()), low[-1], high[-1], sum(step.seconds for step in steps.values()),
    )  # fmt: skip


def share_out(planned: Mapping[str, int], sample: int) -> dict[str, int]:
    """How many cells of each stratum are run: by largest remainders, one at least of each while there is room."""
    total = sum(planned.values())
    sample = min(sample, total)
    shares = {name: min(count, max(1, sample * count // total)) for name, count in planned.items()}
    rest = sorted(planned, key=lambda name: (-(sample * planned[name] % total), name))
    while sum(shares.values()) < sample:
        for name in rest:
            if sum(shares.values()) < sample and shares[name] < planned[name]:
                shares[name] += 1
    return shares


def draw_sample(
    items: Iterable[T], stratum: Callable[[T], str], sample: int = SAMPLE, *, seed: int = 0
) -> tuple[Counter[str], list[tuple[str, T]]]:
    """How many items each stratum has, and some of each, drawn evenly in one pass. Raises GeneratorError: there is none."""
    planned: Counter[str] = Counter()
    held: dict[str, list[T]] = defaultdict(list)
    draw = random.Random(seed)
    for item in items:
        name = stratum(item)
        planned[name] += 1
        place = len(held[name]) if len(held[name]) < sample else draw.randrange(planned[name])
        if place < sample:
            held[name][place : place + 1] = [item]
    if not planned:
        raise GeneratorError("there is nothing to ask", hint="check the plan")
    shares = share_out(planned, sample)
    return planned, [(name, item) for name in sorted(held) for item in draw.sample(held[name], shares[name])]


def _price(engine: CallEngine, cells: Sequence[Cell], keys: Sequence[Mapping[str, tuple[str, int]]]) -> None:
    """What the cells' requests cost, read from the journal: tries, repairs and repetitions with them."""
    of: dict[str, list[tuple[int, str, int]]] = defaultdict(list)
    for number, known in enumerate(keys):
        for key, (step, serves) in known.items():
            of[key].append((number, step, serves))
    for line in engine.journal.lines():
        bearers = of.get(line.get("for") or line.get("key", ""))
        if line["kind"] != "outcome" or bearers is None:
            continue
        usage = Usage(*line["usage"])
        for number, step, serves in bearers:
            part = 1 / max(serves, len(bearers))
            entry = cells[number].steps.setdefault(step, Step())
            entry.add(Step(1, usage.prompt, usage.output, line["cost"], line["took"]), part)


def _interval(costs: np.ndarray, kept: np.ndarray, total: int, seed: int, resamples: int) -> tuple[list[float], list[float]]:
    """95 % of each step's money and of all of it: cells drawn with replacement, whatever their stratum."""
    count = len(kept)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)  # (R, n)
    accepted = draws @ kept
    columns = np.column_stack([costs, costs.sum(1)])
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(accepted[:, None] > 0, total * (draws @ columns) / accepted[:, None], np.inf)
    middle = total * columns.sum(0) / kept.sum()
    ends = np.quantile(found, [0.025, 0.975], axis=0, method="nearest")
    stretched = middle + (ends - middle) * _stretch(count)
    return [float(max(0.0, value)) for value in stretched[0]], [float(value) for value in stretched[1]]


def _stretch(count: int) -> float:
    """How much wider Student's t is than the normal, and the sample's deviation than the resamples'."""
    if count < 3:
        return 3.0
    freedom = count - 1
    student = Z + (Z**3 + Z) / (4 * freedom) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * freedom**2)
    return student / Z * math.sqrt(count / freedom)


def _timed(found: Estimate, engine: CallEngine) -> Estimate:
    """Seconds at the endpoint's concurrency, or longer where its rates are lower."""
    settings, steps = engine.settings, [step for step, _, _ in found.steps.values()]
    ways = [found.seconds / settings.concurrency]
    if settings.rpm is not None:
        ways.append(60 * sum(step.calls for step in steps) / settings.rpm)
    if settings.tpm is not None:
        ways.append(60 * sum(step.prompt + step.output for step in steps) / settings.tpm)
    return replace(found, seconds=max(ways))
