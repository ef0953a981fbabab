"""One self-contained HTML page: before/after or a grid, with intervals; curves and bars; examples to leaf through."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raglan.answerable import kinds, kinds_text, uncomputed
from raglan.artifact import MANIFEST
from raglan.critique_tables import critique_tables
from raglan.decode import tree_lines
from raglan.domains import domain
from raglan.errors import CheckpointError, require
from raglan.evaluate import Evaluation, compare, compared_systems, evaluation_folder, open_evaluation, spent
from raglan.grid import Grid, open_grid
from raglan.grid_tables import GridTable, grid_tables
from raglan.judge import NO_JUDGE, judgements_folder, lacks_judge, open_judged
from raglan.metrics import Interval, exact_match
from raglan.recipe import Recipe
from raglan.seeds import over_seeds, seed_lines
from raglan.stages import finished_parts, learning_curves
from raglan.stress import Robustness, open_robustness, robustness_folder
from raglan.stress_tables import (
    abstention_shares,
    distractor_points,
    follow_shares,
    judge_tables,
    noise_points,
    order_shares,
    retriever_shares,
    robustness_tables,
)
from raglan.sweep import open_sweep
from raglan.sweep_tables import setting_text, sweep_front, sweep_tables, varied
from raglan.synthesis_tables import synthesis_tables

__all__ = ["write_report", "write_sweep"]

NAMES = {
    "em": "exact match", "f1": "F1", "kf1": "Knowledge-F1", "rare_f1": "Rare-F1", "accuracy": "accuracy", "rouge_l": "ROUGE-L",
    "bleu1": "BLEU-1", "q_bleu1": "Q-BLEU-1",
    "distinct_1": "distinct words", "distinct_2": "distinct pairs", "distinct_3": "distinct trigrams",
    "match": "holds the answer", "str_em": "STR-EM", "char_3gram": "3-grams of letters", "macro_f1": "macro F1",
    "declined": "answers that decline", "abstention_precision": "abstention precision",
    "abstention_recall": "abstention recall", "abstention_f1": "abstention F1", "over_abstention": "over-abstention",
    "hallucination": "hallucination", "citation_validity": "valid citations", "citation_precision": "citation precision",
    "citation_recall": "citation recall", "quotes_shown": "quotes found", "quotes_gold": "quotes found in gold",
    "retrieval_rate": "questions that retrieved", "segment_retrieval_rate": "segments that retrieved",
    "outside": "answers in no passage", "right_outside": "right answers in no passage", "substring": "holds its letters",
    "truncated": "prompts cut", "dropped": "passages left out", "unfinished": "answers cut off",
    "closed_book": "no passages", "gold": "gold passage", "retrieved": "retrieved passages",
}  # fmt: skip
TRACED = 50  # examples whose decisions and candidates are drawn
COLOURS = ("#8a93a3", "#2f6fde", "#d9822b", "#2a9d6f", "#9b51b8", "#c2413b", "#1f9aa8", "#8a6d3b")
DASHES = ("dot", "solid", "dash", "dashdot", "longdash")
HEADLINES = ("em", "accuracy", "rouge_l", "bleu1", "f1")  # the first that was measured stands in the summary
LOWER_IS_BETTER = ("truncated", "dropped", "unfinished", "over_abstention", "hallucination")
Points = Mapping[str, Sequence[tuple[float, Interval]]]  # of a system: name of a line → its points
Shares = Mapping[str, Interval]  # of a system: name of a bar → its share


def write_report(recipes: Sequence[Recipe], output: Path) -> None:
    """Render the evaluations of recipes into one page.

    Raises:
        CheckpointError: a recipe that has not been evaluated. MissingExtra: plotly or jinja2 is not installed.
    """
    _write_page([_section(recipe) for recipe in recipes], output)


def write_sweep(recipe: Recipe, told: Mapping[str, Any], output: Path) -> None:
    """Render one sweep into a page: quality against retrieval rate, and the front.

    Args:
        told: what `sweep.json` says.

    Raises:
        MissingExtra: plotly or jinja2 is not installed.
    """
    summary = f"{len(told['settings'])} settings of Self-RAG on {told['questions']} questions, from what was written once."
    section = {"name": recipe.name, "summary": summary, "sweep": _sweep(told), "settings": {"metric": told["metric"]}}
    _write_page([section], output)


def _write_page(sections: Sequence[dict[str, Any]], output: Path) -> None:
    jinja2 = require("jinja2", "for `raglan report`")
    template = (Path(__file__).parent / "report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    plotly = require("plotly.offline", "for `raglan report`")
    page = environment.from_string(template).render(sections=sections, plotly=plotly.get_plotlyjs())
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")


def _section(recipe: Recipe) -> dict[str, Any]:
    if recipe.grid is not None:
        return _grid_section(recipe, open_grid(recipe))
    judged = critique_tables(recipe.critique.path) if recipe.critique is not None else []
    evaluations = _evaluations(recipe, needed=not judged)
    if not evaluations:
        return {"name": recipe.name, "summary": "Not evaluated yet.", "critique": judged, "settings": {}}
    before, after = evaluations[0], evaluations[-1]
    differences = compare(before, after) if len(evaluations) > 1 else {}
    manifest = json.loads((after.folder / "manifest.json").read_text(encoding="utf-8"))
    return {
        "name": recipe.name,
        "summary": " ".join([_summary(manifest, before, after, differences), *_seeds(recipe, differences)]),
        "systems": [evaluation.system for evaluation in evaluations],
        "tables": _tables(evaluations, differences, _uncomputed(recipe, after)),
        "spent": _spent_table(recipe, evaluations),
        "counted": bool(kinds_text(kinds(after.rows))),
        "curves": _curves(learning_curves(recipe)),
        "further": robustness_tables(_robust(recipe)),
        "robustness": _robustness_plots(_robust(recipe)),
        "judge": _judge(recipe, evaluations),
        "synthesis": synthesis_tables(recipe.synthesis.path) if recipe.synthesis is not None else [],
        "critique": judged,
        "sweep": _sweep(told) if (told := open_sweep(recipe)) is not None else None,
        "recall": _recall(evaluations),
        "examples": _examples(before, after),
        "settings": {k: manifest[k] for k in ("knowledge", "questions", "k", "index", "raglan")} | _domain(recipe),
    }


def _spent_table(recipe: Recipe, evaluations: Sequence[Evaluation]) -> list[GridTable]:
    """What an answer takes, system by system and mode by mode; dollars only where somebody says what tokens cost."""
    price = recipe.evaluate.price if recipe.evaluate is not None else None
    found = {(e.system, mode): own for e in evaluations for mode, own in spent(e.rows, price=price).items()}
    names = list(dict.fromkeys(name for own in found.values() for name in own))
    rows = [
        [system, NAMES.get(mode, mode), *(f"{own[name]:.4g}" if name in own else "–" for name in names)]
        for (system, mode), own in found.items()
    ]
    head = ["", "", *("dollars per 1,000" if name == "usd_per_1000" else name for name in names)]
    return [GridTable("What an answer takes, on average", head, rows, {})] if rows else []


def _seeds(recipe: Recipe, differences: dict[str, Interval]) -> list[str]:
    """Sentences on the training seeds behind the comparison, if there is one."""
    name = next((f"retrieved/{metric}" for metric in HEADLINES if f"retrieved/{metric}" in differences), "")
    return [f"{line[0].upper()}{line[1:]}." for line in seed_lines(over_seeds(recipe), name)] if differences else []


def _uncomputed(recipe: Recipe, evaluation: Evaluation) -> list[str]:
    return uncomputed(evaluation.rows, recipe.evaluate, evaluation.figures) if recipe.evaluate is not None else []


def _domain(recipe: Recipe) -> dict[str, str]:
    found = domain(recipe)
    return {} if found is None else {found.dataset: str(found)}


def _grid_section(recipe: Recipe, grid: Grid) -> dict[str, Any]:
    """A grid has no before and after, and its answers are in its own files; there are tables and learning curves."""
    worse = [f"{kind} than base: {cell} on {task}" for task, cell, kind, _ in grid.regressions()]
    return {
        "name": recipe.name,
        "summary": f"Query encoder {{base, R-ft}} × generator {{base, LM-ft}} on {len(grid.tasks)} tasks. "
        + ("; ".join(worse) + "." if worse else "No tuned cell is below the base on any task."),
        "grid": grid_tables(grid),
        "curves": _curves(learning_curves(recipe)),
        "settings": {
            "passes": grid.passes, "prompts": grid.asked, "read": grid.read, "seed": grid.seed, "training seeds": "one",
        },
    }  # fmt: skip


def _sweep(told: Mapping[str, Any]) -> dict[str, Any]:
    """A sweep's settings as points, quality against retrieval rate, with the front; and its tables."""
    names = varied([*told["settings"], *told["needs_generation"]])
    kinds = (
        ("settings", told["settings"], {"mode": "markers", "marker": {"color": COLOURS[0], "size": 6, "opacity": 0.45}}),
        ("none beats it, ids counted, too", told["front"],
         {"mode": "markers", "marker": {"color": COLOURS[2], "size": 9, "symbol": "diamond"}}),
        ("front of quality and retrieval", sweep_front(told),
         {"mode": "lines+markers", "line": {"color": COLOURS[1], "width": 2, "shape": "hv"}, "marker": {"size": 7}}),
    )  # fmt: skip
    traces = [
        {
            "name": name, "type": "scatter", "x": [100 * one["rate"] for one in points],
            "y": [100 * one["quality"] for one in points], "text": [setting_text(one, names) for one in points],
            "hovertemplate": "%{y:.1f} at %{x:.1f}<br>%{text}<extra></extra>", **look,
        }
        for name, points, look in kinds if points
    ]  # fmt: skip
    quality = NAMES.get(told["metric"], told["metric"])
    figure = _figure(traces, "questions that retrieved, %", f"{quality}, %") if traces else None
    return {"figure": figure, "tables": sweep_tables(told)}


def _robust(recipe: Recipe) -> list[Robustness]:
    """What has been measured of `evaluate.robustness` so far."""
    settings = recipe.evaluate
    if settings is None or settings.robustness is None:
        return []
    folders = [robustness_folder(recipe, settings, *system) for system in compared_systems(recipe)]
    return [open_robustness(folder) for folder in folders if (folder / MANIFEST).is_file()]


def _judge(recipe: Recipe, evaluations: Sequence[Evaluation]) -> dict[str, Any] | None:
    """What the judge said as far as it has, or that there is none where one is missed."""
    if recipe.evaluate is None or recipe.evaluate.judge is None:
        return {"note": f"{NO_JUDGE}.", "tables": []} if lacks_judge(recipe, evaluations) else None
    folder = judgements_folder(recipe, [evaluations[0], *evaluations[1:][-1:]])
    if not (folder / MANIFEST).is_file():
        return {"note": f"judge {recipe.evaluate.judge.endpoint.model}: no judgements of these answers yet.", "tables": []}
    judged = open_judged(folder)
    return {"note": " ".join(f"Warning: {warning}." for warning in judged.warnings), "tables": judge_tables(judged)}


def _robustness_plots(systems: Sequence[Robustness]) -> list[dict[str, str]]:
    """Percent right by distractors and by the share of noise; retrievers, orders and abstention; all systems side by side."""
    lines: Sequence[tuple[str, str, Callable[[Robustness], Points]]] = (
        ("Distractors beside gold", "passages of noise", distractor_points),
        ("Noise beside gold", "share of noise", lambda system: noise_points(system, gold=True)),
        ("Noise without gold", "share of noise", lambda system: noise_points(system, gold=False)),
    )
    bars: Sequence[tuple[str, str, Callable[[Robustness], Shares]]] = (
        ("Retrievers", "right, %", retriever_shares),
        ("Orders of the same passages", "questions or pairs, %", order_shares),
        ("Abstention, gold present against absent", "F1, %", lambda system: abstention_shares(system, "abstention_f1")),
        ("Answers where no passage tells", "hallucination, %", lambda system: abstention_shares(system, "hallucination")),
        ("Declined although gold is there", "over-abstention, %", lambda system: abstention_shares(system, "over_abstention")),
        ("Counterfactuals followed", "answers that say the false value, %", follow_shares),
    )
    plots = []
    for title, x, points in lines:
        if traces := _noise_lines({system.system: points(system) for system in systems}):
            plots.append({"title": title, "figure": _figure(traces, x, "right, %")})
    for title, y, shares in bars:
        told = {system.system: shares(system) for system in systems}
        if traces := [_bars(name, own, COLOURS[at % len(COLOURS)]) for at, (name, own) in enumerate(told.items()) if own]:
            plots.append({"title": title, "figure": _figure(traces, "", y)})
    return plots


def _noise_lines(systems: Mapping[str, Points]) -> list[dict[str, Any]]:
    """A line a system and kind of noise: the kind has the colour, the system the dashes."""
    kinds = list(dict.fromkeys(kind for own in systems.values() for kind in own))
    return [
        _trace(
            f"{system}: {kind.replace('_', ' ')}", [(x, 100 * y.mean) for x, y in points],
            COLOURS[(1 + kinds.index(kind)) % len(COLOURS)], dash=DASHES[at % len(DASHES)] if len(systems) > 1 else "solid",
        ) | {"error_y": _error([y for _, y in points])}
        for at, (system, own) in enumerate(systems.items())
        for kind, points in own.items()
    ]  # fmt: skip


def _bars(name: str, shares: Shares, colour: str) -> dict[str, Any]:
    """Percent by name, with intervals."""
    values = list(shares.values())
    bars = {"name": name, "type": "bar", "x": list(shares), "marker": {"color": colour}}
    return bars | {"y": [100 * value.mean for value in values], "error_y": _error(values)}


def _error(values: Sequence[Interval]) -> dict[str, Any]:
    """Intervals as a plot has them: percent above the mean and below it."""
    above, below = ([100 * (v.high - v.mean) for v in values], [100 * (v.mean - v.low) for v in values])
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1}


def _evaluations(recipe: Recipe, *, needed: bool) -> list[Evaluation]:
    """The evaluations of the recipe as it is now, in the order of training. `needed`: whether none is a fault."""
    settings = recipe.evaluate
    systems = finished_parts(recipe) if settings is not None else []
    folders = [evaluation_folder(recipe, settings, *system) for system in systems if settings is not None]
    found = [open_evaluation(folder) for folder in folders if (folder / MANIFEST).is_file()]
    if not found and needed:
        raise CheckpointError(f"recipe {recipe.name!r} has not been evaluated", hint="raglan evaluate recipe.yaml")
    return found


def _summary(manifest: dict[str, Any], before: Evaluation, after: Evaluation, differences: dict[str, Interval]) -> str:
    of_kinds = kinds_text(kinds(after.rows))
    asked = f"{manifest['questions']} held-out questions{' (' * bool(of_kinds)}{of_kinds}{')' * bool(of_kinds)}"
    told = f"{asked}, {manifest['k']} passages each from index “{manifest['index']}”."
    name = next((f"retrieved/{metric}" for metric in HEADLINES if f"retrieved/{metric}" in differences), None)
    if name is not None:
        change = differences[name]
        told = (
            f"With retrieved passages, {NAMES[name.rpartition('/')[2]]} went from {_percent(before.figures[name])} % to "
            f"{_percent(after.figures[name])} %: {100 * change.mean:+.1f} points "
            f"[{100 * change.low:+.1f}, {100 * change.high:+.1f}]. {told}"
        )
    return told


def _tables(
    evaluations: Sequence[Evaluation], differences: dict[str, Interval], lacking: Sequence[str]
) -> list[dict[str, Any]]:  # fmt: skip
    """`lacking`: figures that were asked for and that no question has."""
    names = [*evaluations[-1].figures, *lacking]
    groups = {"Retrieval": [name for name in names if "/" not in name]}
    for name in names:
        if "/" in name:
            mode = name.partition("/")[0]
            groups.setdefault(f"Reading, {NAMES.get(mode, mode)}", []).append(name)
    tables = []
    for title, members in groups.items():
        rows = []
        for name in members:
            short = name.rpartition("/")[2]
            cells = [_cell(e.figures[name]) if name in e.figures else None for e in evaluations]
            rows.append({"name": NAMES.get(short, short), "cells": cells, "difference": _verdict(name, differences)})
        if rows:
            tables.append({"title": title, "rows": rows})
    return tables


def _cell(value: Interval) -> dict[str, str]:
    return {"mean": _percent(value), "range": f"{100 * value.low:.1f}–{100 * value.high:.1f}", "n": str(value.n)}


def _verdict(name: str, differences: dict[str, Interval]) -> dict[str, str] | None:
    """The paired difference, and whether its interval leaves zero out."""
    if name not in differences:
        return None
    change = differences[name]
    sign = -1 if name.rpartition("/")[2] in LOWER_IS_BETTER else 1
    kind = "same"
    if change.low > 0 or change.high < 0:
        kind = "better" if sign * change.mean > 0 else "worse"
    return {
        "text": f"{100 * change.mean:+.1f}", "range": f"{100 * change.low:+.1f} to {100 * change.high:+.1f}", "kind": kind
    }  # fmt: skip


def _percent(value: Interval) -> str:
    return f"{100 * value.mean:.1f}"


def _curves(logs: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """One plot a stage: training loss, and what was held out."""
    plots = []
    for stage, log in logs.items():
        traces: list[dict[str, Any]] = []
        for key, label in (("loss", "training loss"), ("eval_loss", "held-out loss"), ("eval_mrr@10", "held-out MRR@10"),
                           ("eval_recall@1", "held-out R@1")):  # fmt: skip
            points = [(row["step"], row[key]) for row in log if key in row]
            if points:
                traces.append(_trace(label, points, COLOURS[len(traces) + 1]))
        if traces:
            plots.append({"title": f"stage “{stage}”", "figure": _figure(traces, "step", "")})
    return plots


def _recall(evaluations: Sequence[Evaluation]) -> str | None:
    traces = []
    for number, evaluation in enumerate(evaluations):
        depths = sorted(int(name.partition("@")[2]) for name in evaluation.figures if name.startswith("recall@"))
        points = [(depth, 100 * evaluation.figures[f"recall@{depth}"].mean) for depth in depths]
        if points:
            traces.append(_trace(evaluation.system, points, COLOURS[number % len(COLOURS)]))
    return _figure(traces, "passages retrieved (k)", "recall@k, %") if traces else None


def _trace(name: str, points: Sequence[tuple[float, float]], colour: str, *, dash: str = "solid") -> dict[str, Any]:
    return {
        "name": name, "x": [x for x, _ in points], "y": [y for _, y in points], "type": "scatter",
        "mode": "lines+markers" if len(points) < 30 else "lines", "line": {"color": colour, "width": 2, "dash": dash},
    }  # fmt: skip


def _figure(traces: Sequence[dict[str, Any]], x: str, y: str) -> str:
    axis = {"gridcolor": "#e6e9ee", "zeroline": False, "automargin": True}
    height = 300 + 12 * max(0, len(traces) - 4)  # names of lines take some of it
    layout = {
        "margin": {"l": 48, "r": 12, "t": 44, "b": 44}, "height": height, "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)", "font": {"family": "system-ui, sans-serif", "size": 13},
        "xaxis": {**axis, "title": {"text": x}}, "yaxis": {**axis, "title": {"text": y}, "rangemode": "tozero"},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"}, "showlegend": True,
    }  # fmt: skip
    return json.dumps({"data": list(traces), "layout": layout})


def _examples(before: Evaluation, after: Evaluation) -> list[dict[str, Any]]:
    """Every question that was read: passages, answers before and after, gold; at most 500."""
    mode = "retrieved" if any(name.startswith("retrieved/") for name in after.figures) else "gold"
    found: list[dict[str, Any]] = []
    for old, new in list(zip(before.rows, after.rows, strict=True))[:500]:
        if mode not in new["predictions"]:
            continue
        right, was_right = _right(new, mode), _right(old, mode)
        read = set(new["predictions"][mode]["passages"])
        found.append({
            "query": new["query"], "gold": new["answers"], "right": right,
            "kind": "open" if _is_open(new) else _change(was_right, right),
            "before": old["predictions"].get(mode, {}).get("text", ""), "after": new["predictions"][mode]["text"],
            "passages": [
                {**hit, "relevant": hit["id"] in new["relevant"]} for hit in new["hits"] if hit["id"] in read
            ],
            "trace": (trace := new["predictions"][mode].get("trace") if len(found) < TRACED else None),
            "tree": tree_lines(trace) if trace and trace["form"] == "long" else [],
        })  # fmt: skip
    return found


def _change(was_right: bool, right: bool) -> str:
    return ("right" if was_right else "fixed") if right else ("broken" if was_right else "wrong")


def _is_open(row: dict[str, Any]) -> bool:
    return not row["answers"] and not row.get("unanswerable")


def _right(row: dict[str, Any], mode: str) -> bool:
    """Whether an answer is the gold one: as it was measured, or else by exact match; or declines where it has to."""
    if row.get("unanswerable"):
        return row["figures"].get(f"{mode}/abstention_recall") == 1
    measured = [row["figures"][name] for metric in ("em", "accuracy") if (name := f"{mode}/{metric}") in row["figures"]]
    if measured:
        return measured[0] == 1
    return mode in row["predictions"] and exact_match(row["predictions"][mode]["text"], row["answers"]) == 1
