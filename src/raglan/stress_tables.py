"""Robustness and judgements in words: tables that the command line and the report both show, and curves over noise.

Figures are in points of 100 with 95 % intervals; a difference is in points too. The share of questions that a condition could
not be made for stands beside it; tokens and seconds are means of one answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

from raglan.grid_tables import GridTable
from raglan.judge import Judged
from raglan.judging import Pairs
from raglan.metrics import Interval
from raglan.stress import Robustness, compare_robustness
from raglan.stress_figures import ALONE, CLEAN, PAIRED

__all__ = [
    "abstention_shares",
    "difference_summary",
    "distractor_points",
    "follow_shares",
    "judge_summary",
    "judge_tables",
    "noise_points",
    "order_shares",
    "retriever_shares",
    "robustness_summary",
    "robustness_tables",
]

SHOWN = (
    "right",
    "delta",
    "f1",
    "declined",
    "follow",
    "follow_of_right",
    "follow_majority",
    "follow_conflict",
    "citation_precision",
    "citation_recall",
    "truncated",
    "dropped",
    "unfinished",
    "tokens",
)
HEADS = {
    "right": "right", "delta": "against clean", "f1": "F1", "declined": "declined", "follow": "followed",
    "follow_of_right": "followed, of right", "follow_majority": "followed, truth in majority",
    "follow_conflict": "followed, one against one", "citation_precision": "citation precision",
    "citation_recall": "citation recall", "truncated": "prompts cut", "dropped": "passages left out",
    "unfinished": "answers cut off", "tokens": "tokens",
}  # fmt: skip
RATES = ("abstention_precision", "abstention_recall", "abstention_f1", "over_abstention", "hallucination")


def robustness_tables(measured: Sequence[Robustness]) -> list[GridTable]:
    """All that the measurements say, in tables; the last system against the first in one of its own."""
    compared = [_differences(measured[0], measured[-1])] if len(measured) > 1 else []
    return [table for system in measured for table in _tables(system) if table.rows] + compared


def difference_summary(measured: Sequence[Robustness]) -> dict[str, Any]:
    """The last system against the first, paired, as plain numbers: condition → figure → after − before; none of one."""
    if len(measured) < 2:
        return {}
    before, after = measured[0], measured[-1]
    found = compare_robustness(before, after)
    told = {name: {figure: _numbers(value) for figure, value in own.items()} for name, own in found.items()}
    return {"before": before.system, "after": after.system, "conditions": told}


def _differences(before: Robustness, after: Robustness) -> GridTable:
    found = compare_robustness(before, after)
    orders = found.pop("order", {})
    shown = [figure for figure in PAIRED if any(figure in own for own in found.values())]
    rows, marked = [], {}
    for at, (name, own) in enumerate(found.items()):
        rows.append([_label(name, after), *(_cell(own.get(figure), sign=True) for figure in shown)])
        change = own["right"]
        if change.low > 0 or change.high < 0:
            marked[at, 1] = "better" if change.mean > 0 else "worse"
    heads = {"flip": "orders: flips", "disagreement": "orders: pairs that differ"}
    rows += [[heads[name], _cell(value, sign=True), *[""] * (len(shown) - 1)] for name, value in orders.items()]
    title = f"{after.system} − {before.system}: points, paired by question"
    return GridTable(title, ["", *(HEADS[figure] for figure in shown)], rows, marked)


def robustness_summary(measured: Sequence[Robustness]) -> dict[str, Any]:
    """The same as plain numbers, shares of 1."""
    return {
        system.system: {
            "conditions": {
                name: {key: _numbers(value) for key, value in system.figures.get(name, {}).items()}
                | {"missing": share, "seconds": system.seconds.get(name)}
                for name, share in system.missing.items()
            },
            "abstention": {
                noise: {name: _numbers(value) for name, value in rates.items()} for noise, rates in system.abstention.items()
            },
            "orders": {name: _numbers(value) for name, value in system.orders.items()},
            "retrievers": {
                name: _numbers(value) if isinstance(value, Interval) else value for name, value in system.retrievers.items()
            },
        }
        for system in measured
    }  # fmt: skip


def noise_points(system: Robustness, *, gold: bool) -> dict[str, list[tuple[float, Interval]]]:
    """Kind of noise → (share of noise, share right)."""
    found: dict[str, list[tuple[float, Interval]]] = {}
    start = CLEAN if gold else "noise/none/absent/0"
    middle = "present" if gold else "absent"
    for name in system.figures:
        part = name.split("/")
        if part[0] == "noise" and part[2] == middle and part[1] != "none":
            found.setdefault(part[1], []).append((float(part[3]), system.figures[name]["right"]))
    if start in system.figures:
        first = (0.0, system.figures[start]["right"])
        found = {kind: [first, *points] for kind, points in found.items()}
    return {kind: sorted(points, key=itemgetter(0)) for kind, points in found.items()}


def distractor_points(system: Robustness) -> dict[str, list[tuple[float, Interval]]]:
    """Kind of noise → (how many of it stand beside gold, share right)."""
    found: dict[str, list[tuple[float, Interval]]] = {}
    for name, own in system.figures.items():
        part = name.split("/")
        if part[0] == "distractors" and name != ALONE:
            found.setdefault(part[1], []).append((float(part[2]), own["right"]))
    first = [(0.0, system.figures[ALONE]["right"])] if ALONE in system.figures else []
    return {kind: sorted([*first, *points], key=itemgetter(0)) for kind, points in found.items()}


def retriever_shares(system: Robustness) -> dict[str, Interval]:
    """Index, with what is to be known of it, → share of right answers."""
    own = {name: figures for name, figures in system.figures.items() if name.startswith("retriever/")}
    return {_label(name, system): figures["right"] for name, figures in own.items()}


def order_shares(system: Robustness) -> dict[str, Interval]:
    """What the order of the passages changes."""
    heads = {"flip": "questions that flip", "disagreement": "pairs of orders that differ"}
    return {heads[name]: value for name, value in system.orders.items()}


def follow_shares(system: Robustness) -> dict[str, Interval]:
    """A condition with a false passage in words → share of answers that follow it."""
    return {_label(name, system): own["follow"] for name, own in system.figures.items() if "follow" in own}


def abstention_shares(system: Robustness, rate: str) -> dict[str, Interval]:
    """Noise in words → one of the rates of abstention, where it is defined."""
    rates = {noise: own[rate] for noise, own in system.abstention.items() if rate in own}
    return {_noise_label(noise): value for noise, value in rates.items()}


def _noise_label(noise: str) -> str:
    kind, _, share = noise.partition("/")
    return f"{100 * float(share):g} % {kind.replace('_', ' ')}" if share else "hits"


def _tables(system: Robustness) -> list[GridTable]:
    noise = [name for name in system.missing if name.split("/")[0] in (CLEAN, "noise", "distractors", "conflict", "majority")]
    orders = [name for name in system.figures if name.startswith("order/")]
    indexes = [name for name in system.figures if name.startswith("retriever/")]
    flips = "; ".join(f"{name} {_cell(value)}" for name, value in system.orders.items())
    spread = system.retrievers.get("spread")
    told = "" if spread is None else (
        f"; worst {system.retrievers['worst']} {_cell(system.retrievers['worst_right'])}, spread {_cell(spread)}"
    )
    return [
        _conditions(system, f"{system.system}: noise, {len(noise)} conditions", noise),
        _declining(system),
        _conditions(system, f"{system.system}: orders of the same passages{'; ' if flips else ''}{flips}", orders),
        _conditions(system, f"{system.system}: retrievers{told}", indexes),
    ]


def _conditions(system: Robustness, title: str, names: Sequence[str]) -> GridTable:
    shown = [figure for figure in SHOWN if any(figure in system.figures.get(name, {}) for name in names)]
    if "citation_precision" not in shown:  # nobody cited anything
        shown = [figure for figure in shown if figure != "citation_recall"]
    rows, marked = [], {}
    for at, name in enumerate(names):
        own, seconds = system.figures.get(name, {}), system.seconds.get(name)
        cells = [_count(own.get(figure)) if figure == "tokens" else _cell(own.get(figure), sign=figure == "delta")
                 for figure in shown]  # fmt: skip
        took = "" if seconds is None else f"{seconds:.3g}"
        rows.append([_label(name, system), *cells, took, f"{100 * system.missing[name]:.1f}"])
        delta = own.get("delta")
        if delta is not None and (delta.low > 0 or delta.high < 0):
            marked[at, 1 + shown.index("delta")] = "better" if delta.mean > 0 else "worse"
    return GridTable(title, ["", *(HEADS[figure] for figure in shown), "seconds", "missing"], rows, marked)


def _declining(system: Robustness) -> GridTable:
    rows = [[kind, *(_cell(rates.get(name)) for name in RATES)] for kind, rates in system.abstention.items()]
    head = ["noise", *(name.replace("_", " ") for name in RATES)]
    return GridTable(f"{system.system}: declining, gold present against absent", head, rows, {})


def _label(name: str, system: Robustness) -> str:
    """A condition in words."""
    part = name.split("/")
    if part[0] == "retriever":
        return part[1] + (" (own)" if part[1] == system.retrievers["own"] else "") + (
            " (unseen)" if part[1] in system.retrievers.get("unseen", ()) else ""
        )  # fmt: skip
    if part[0] == "order":
        return "as retrieved" if part[1] == "0" else f"permutation {part[1]}"
    if name == CLEAN:
        return "clean: gold and hits"
    if part[0] == "distractors":
        return "gold alone" if name == ALONE else f"gold alone + {part[2]} {part[1].replace('_', ' ')}"
    if part[0] == "conflict":
        return "one gold against one false"
    if part[0] == "majority":
        return "two that answer against one false"
    share = "hits" if part[1] == "none" else _noise_label(f"{part[1]}/{part[3]}")
    return f"gold, {share}" if part[2] == "present" else f"no gold, {share}"


def _cell(value: Interval | None, *, sign: bool = False) -> str:
    if value is None or math.isnan(value.mean):
        return ""
    form = "{:+.1f}" if sign else "{:.1f}"
    return f"{form.format(100 * value.mean)} [{form.format(100 * value.low)}, {form.format(100 * value.high)}]"


def _count(value: Interval | None) -> str:
    return "" if value is None or math.isnan(value.mean) else f"{value.mean:.1f}"


def _share(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def _numbers(value: Interval) -> dict[str, float]:
    return {"mean": value.mean, "low": value.low, "high": value.high, "n": value.n}


def judge_tables(judged: Judged) -> list[GridTable]:
    """What a judge said, with the missing share beside every figure."""
    rows = [
        [name, f"{own.score.mean:.2f} [{own.score.low:.2f}, {own.score.high:.2f}]", f"{100 * own.missing_share:.1f}"]
        for name, own in judged.scores.items()
    ]
    tables = [GridTable(f"judge {judged.model}: rubric, 1 to 5", ["", "score", "missing"], rows, {})]
    if judged.pair is not None:
        every = {"all": judged.pair, **{f"after is {name}": own for name, own in judged.strata.items()}}
        compared = [
            [name, str(own.wins), str(own.losses), str(own.ties), _cell(own.rate), _share(_number(own.inconsistent_share)),
             _share(own.missing_share)]
            for name, own in every.items()
        ]  # fmt: skip
        head = ["", "wins", "losses", "ties", "win rate", "order inconsistency", "missing"]
        tables.append(GridTable(f"judge {judged.model}: after against before, both orders", head, compared, {}))
    agreed = [
        [name, str(own["rows"]), _share(own["agreement"]), "" if own["kappa"] is None else f"{own['kappa']:.2f}"]
        for name, own in judged.kappa.items()
    ]
    tables.append(GridTable("agreement with hand labels", ["", "answers", "same", "κ"], agreed, {}))
    return [table for table in tables if table.rows]


def judge_summary(judged: Judged) -> dict[str, Any]:
    """The same as plain numbers."""
    return {
        "model": judged.model,
        "scores": {name: _rated(own.score) | {"missing": own.missing_share} for name, own in judged.scores.items()},
        "pair": None if judged.pair is None else _pair_numbers(judged.pair),
        "strata": {name: _pair_numbers(own) for name, own in judged.strata.items()}, "kappa": judged.kappa,
    }  # fmt: skip


def _pair_numbers(own: Pairs) -> dict[str, Any]:
    return {
        "wins": own.wins, "losses": own.losses, "ties": own.ties,
        "rate": _rated(own.rate),
        "inconsistent": _number(own.inconsistent_share), "missing": own.missing_share,
    }  # fmt: skip


def _rated(value: Interval) -> dict[str, float | None]:
    """All judgements may be missing."""
    return {name: _number(own) for name, own in _numbers(value).items()}


def _number(value: float) -> float | None:
    """JSON knows no NaN."""
    return None if math.isnan(value) else value
