"""Noise, orders, retrievers and the judge on a tiny system, by the command line; and their arithmetic on plain rows."""

from __future__ import annotations

import itertools
import json
import logging
import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import ValidationError
from typer.testing import CliRunner

from fault_server import KEY, Fault, FaultServer, Request, say
from raglan.cited import Cited
from raglan.cli import app
from raglan.cli_robustness import Further
from raglan.corpus import Corpus, write_corpus
from raglan.errors import CallsStopped, CorpusError, RecipeError
from raglan.evaluate import _add_reading, _measures, evaluate_recipe
from raglan.judge import judge, messages, open_judged
from raglan.metrics import Interval, answer_recall, paired_bootstrap
from raglan.rag import RAG
from raglan.recipe import ConcatDecode, EvaluateSettings, Recipe, RobustnessSettings, load_recipe
from raglan.records import Answer, Example, Hit, Passage
from raglan.report import _robustness_plots
from raglan.robustness import abstention
from raglan.seeds import over_seeds, seed_lines
from raglan.stress import Robustness, _row, conditions, draw_prompts, evaluate_robustness
from raglan.stress_figures import ALONE, CLEAN, compare_conditions, summarise_conditions
from raglan.stress_tables import (
    abstention_shares,
    distractor_points,
    noise_points,
    order_shares,
    retriever_shares,
    robustness_summary,
    robustness_tables,
)
from raglan.train import train
from tiny import gpt2, small_recipe

runner = CliRunner()
BARE = RAG(None, None, ConcatDecode(), 1)  # type: ignore[arg-type]  # nothing of it but the decoding is looked at
ASKED = {"noise": ["hard", "random", "counterfactual"], "ratios": [0, 0.5, 1], "distractors": [0, 2], "orders": 4,
         "unseen": ["bm25"]}  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built knowledge base and a recipe that trains nothing and asks five questions."""
    path = small_recipe(tmp_path_factory.mktemp("stress"))
    settings = yaml.safe_load(path.read_text())
    del settings["stages"]
    settings["retriever"]["k"] = 3
    settings["evaluate"] |= {"modes": ["retrieved"], "k": [1], "limit": 6, "robustness": ASKED, "metrics": ["em", "match"]}
    path.write_text(yaml.safe_dump(settings))
    assert runner.invoke(app, ["build", str(path)]).exit_code == 0
    return path


@pytest.fixture(scope="module")
def measured(recipe: Path) -> Any:
    done = runner.invoke(app, ["evaluate", str(recipe), "--json"])
    assert done.exit_code == 0, done.exception
    return json.loads(done.stdout)


def test_every_condition_is_measured_and_says_what_was_read(recipe: Path, measured: Any) -> None:
    told = measured["robustness"]["untuned"]
    names = ["clean", "noise/hard/present/1", "noise/random/present/0.5", "noise/none/absent/0", "noise/hard/absent/1",
             "noise/random/absent/0.5", "noise/counterfactual/present/0.5", "distractors/0", "distractors/hard/2", "conflict/1",
             "majority/1",
             "distractors/random/2", "distractors/counterfactual/2",
             "order/0", "order/3", "retriever/bm25", "retriever/dense", "retriever/hybrid"]  # fmt: skip
    assert set(names) <= set(told["conditions"])
    assert not any("counterfactual/absent" in name for name in told["conditions"])
    (system,) = evaluate_robustness(load_recipe(recipe))
    rows = [json.loads(line) for line in (system.folder / "answers.jsonl").read_text().splitlines()]
    questions = {row["id"]: row for row in map(json.loads, (recipe.parent / "dev.jsonl").read_text().splitlines())}
    assert len(rows) == 6
    for row in rows:
        own, (gold,) = row["conditions"], questions[row["id"]]["relevant"]
        assert own["distractors/0"]["passages"] == [gold]
        for kind in ("hard", "random", "counterfactual"):
            beside = own[f"distractors/{kind}/2"]
            assert (len(beside["passages"]), gold in beside["passages"]) == (3, True)
            assert [slot["kind"] for slot in beside["slots"]].count(kind) == 2
        for name, answered in own.items():
            form, _, rest = name.partition("/")
            if form in (CLEAN, "noise"):
                assert len(answered["passages"]) == 3, name
                assert (gold in answered["passages"]) == ("absent" not in rest), name
            if form == "noise" and rest.startswith("random/"):
                noise = [slot for slot in answered["slots"] if slot["kind"] == "random"]
                free = 2 if "present" in rest else 3
                assert len(noise) == math.floor(float(rest.split("/")[2]) * free + 0.5), name
        places = {own[name]["passages"].index(gold) for name in own if name.startswith("noise/random/present")}
        assert places == {own[CLEAN]["passages"].index(gold)}, "gold stands where it stood"
        false = own["conflict/1"]
        assert [len(false["passages"]), false["decidable"], len(false["made"])] == [2, False, 1]
        assert [false["sides"]["true"], list(false["sides"]["false"].values())] == [1, [1]]
        outnumbered = own["majority/1"]
        assert len(outnumbered["slots"]) == 3
        assert [outnumbered["sides"]["true"], list(outnumbered["sides"]["false"].values())] == [2, [1]]
        (text,) = [made["text"] for made in false["made"].values()]
        assert not answer_recall([text], row["answers"])
        assert own["order/0"]["passages"] == own["retriever/hybrid"]["passages"]
        assert len({tuple(own[f"order/{number}"]["passages"]) for number in range(4)}) == 4
    assert {"follow", "follow_conflict"} <= set(told["conditions"]["conflict/1"])
    assert "follow_majority" not in told["conditions"]["conflict/1"]
    assert told["conditions"]["majority/1"]["follow_majority"]["n"] == 6
    assert not any("follow_conflict" in own for name, own in told["conditions"].items() if "counterfactual/2" in name)
    assert (told["retrievers"]["own"], told["retrievers"]["unseen"]) == ("hybrid", ["bm25"])
    assert {"mean", "low", "high", "n"} == set(told["retrievers"]["spread"]) == set(told["retrievers"]["worst_right"])
    assert {"mean", "low", "high", "n"} == set(told["conditions"]["noise/hard/present/1"]["delta"])
    assert all(0 < own["tokens"]["mean"] <= 8 and own["seconds"] > 0 for own in told["conditions"].values())
    rate = told["abstention"]["hard/1"]["hallucination"]
    assert 0 <= rate["low"] <= rate["mean"] <= rate["high"] <= 1
    assert set(told["orders"]) == {"flip", "disagreement"}


def test_a_measurement_is_not_made_twice_and_the_report_draws_it(recipe: Path, measured: Any) -> None:
    pytest.importorskip("plotly")
    folders = sorted((recipe.parent / "runs" / "small" / "robustness").iterdir())
    stamps = [(folder / "manifest.json").stat().st_mtime_ns for folder in folders]
    done = runner.invoke(app, ["evaluate", str(recipe), "--report"])
    assert done.exit_code == 0, done.exception
    assert [(folder / "manifest.json").stat().st_mtime_ns for folder in folders] == stamps
    for words in ("gold, 50 % random", "no gold, 100 % hard", "gold alone + 2 hard", "one gold against one false"):
        assert words in done.stdout
    assert "hybrid (own)" in done.stdout
    assert "bm25 (unseen)" in done.stdout
    page = (recipe.parent / "runs" / "small" / "report.html").read_text()
    for words in ("Worse passages", "Noise beside gold", "Noise without gold", "gold alone", "permutation 1",
                  "Distractors beside gold", "Orders of the same passages", "Abstention", "hallucination, %"):  # fmt: skip
        assert words in page
    (system,) = evaluate_robustness(load_recipe(recipe))
    counted = distractor_points(system)
    assert list(counted) == ["hard", "random", "counterfactual"]
    assert all([x for x, _ in points] == [0, 2] for points in counted.values())
    assert set(retriever_shares(system)) == {"hybrid (own)", "bm25 (unseen)", "dense"}
    assert list(order_shares(system)) == ["questions that flip", "pairs of orders that differ"]
    noises = {"hits", "50 % hard", "100 % hard", "50 % random", "100 % random"}
    assert set(abstention_shares(system, "hallucination")) == noises
    assert [x for x, _ in noise_points(system, gold=True)["hard"]] == [0, 0.5, 1]
    assert [x for x, _ in noise_points(system, gold=False)["random"]] == [0, 0.5, 1]
    assert all(len(row) == len(table.head) for table in robustness_tables([system]) for row in table.rows)


def test_what_found_no_room_was_not_read(recipe: Path, measured: Any, tmp_path: Path) -> None:
    """Room for two passages of three: the third is left out of row and figures; without gold the condition is missing."""
    generator = gpt2(tmp_path)
    asks = "{noise: [counterfactual], ratios: [0, 1], gold: [present], distractors: [2], orders: 2, retrievers: []}"
    changes = [f"generator={{model: {generator}, dtype: float32}}", "prompt={whole_passages: true, max_tokens: 140}",
               f"evaluate.robustness={asks}", f"runs={tmp_path / 'runs'}", "evaluate.metrics=[em, citations]"]  # fmt: skip
    told = load_recipe(recipe, changes)
    (system,) = evaluate_robustness(told)
    rows = [json.loads(line) for line in (system.folder / "answers.jsonl").read_text().splitlines()]
    lost = [name for row in rows for name in row["lost"]]
    assert {CLEAN} <= set(lost) <= {CLEAN, "noise/counterfactual/present/1", "distractors/counterfactual/2", "majority/1"}
    for row in rows:
        assert not set(row["lost"]) & set(row["conditions"])
        for own in row["lost"].values():
            assert set(own["dropped"]) == {own["gold"]}
        for name, own in row["conditions"].items():
            assert len(own["passages"]) <= 2
            assert own["figures"]["truncated"] == float(bool(own["figures"]["dropped"]))
            assert [slot["passage"] for slot in own.get("slots", [])] == (own["passages"] if "slots" in own else []), name
            false = [slot for slot in own.get("slots", []) if slot["value"]]
            assert (own["figures"]["follow"] is not None) == bool(false)
    assert system.missing[CLEAN] == lost.count(CLEAN) / len(rows) > 0
    assert system.figures["order/0"]["dropped"].mean == pytest.approx(1 / 3)
    assert "passages left out" in robustness_tables([system])[0].head
    (evaluation,) = evaluate_recipe(told)
    assert evaluation.figures["retrieved/dropped"].mean == pytest.approx(1 / 3)
    assert all(len(row["predictions"]["retrieved"]["passages"]) == 2 for row in evaluation.rows)


def test_a_missing_share_is_printed_beside_every_figure(recipe: Path, measured: Any, tmp_path: Path) -> None:
    """(T48) One question of four names no gold: 25.0 in the command's table and in the report's."""
    pytest.importorskip("plotly")
    rows = [json.loads(line) for line in (recipe.parent / "dev.jsonl").read_text().splitlines()[:4]]
    del rows[0]["relevant"]
    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asks = "{noise: [], distractors: [0], orders: 0, retrievers: []}"
    changes = [f"evaluate.questions={tmp_path / 'some.jsonl'}", f"evaluate.robustness={asks}", f"runs={tmp_path / 'runs'}"]
    done = runner.invoke(app, ["evaluate", str(recipe), *changes, "--report"])
    assert done.exit_code == 0, done.exception
    (line,) = [line for line in done.stdout.splitlines() if line.strip().startswith("gold alone")]
    assert line.split()[-1] == "25.0"
    page = (tmp_path / "runs" / "small" / "report.html").read_text()
    (shown,) = re.findall(r"<t[dh][^>]*>\s*gold alone\s*</t[dh]>.*?</tr>", page, re.DOTALL)
    assert "25.0" in re.sub(r"<[^>]+>", " ", shown).split()[-1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("evaluate.robustness={retrievers: [bm52]}", "bm52"),
        ("evaluate.robustness=null", "measures no robustness"),
        ("evaluate={questions: bare.jsonl, robustness: {orders: 0, retrievers: []}}", "both answers and relevant"),
    ],
)
def test_faults_are_told(recipe: Path, change: str, words: str) -> None:
    (recipe.parent / "bare.jsonl").write_text('{"id": "x", "query": "who built it", "answers": ["bob"]}\n')
    with pytest.raises(RecipeError, match=words):
        evaluate_robustness(load_recipe(recipe, [change.replace("bare", str(recipe.parent / "bare"))]))


def test_orders_and_retrievers_need_no_gold(recipe: Path, measured: Any, tmp_path: Path) -> None:
    """Answers alone: what needs gold is missing for all, and said to be; nothing else is, with noise asked for and without."""
    rows = [json.loads(line) for line in (recipe.parent / "dev.jsonl").read_text().splitlines()[:4]]
    bare = [json.dumps({name: row[name] for name in ("id", "query", "answers")}) for row in rows]
    (tmp_path / "bare.jsonl").write_text("\n".join(bare))
    for noise, counts in (("[]", "[]"), ("[hard]", "[2]")):
        asks = f"{{noise: {noise}, distractors: {counts}, ratios: [0, 1], orders: 2}}"
        changes = [f"evaluate.questions={tmp_path / 'bare.jsonl'}", f"evaluate.robustness={asks}", f"runs={tmp_path / 'runs'}"]
        (system,) = evaluate_robustness(load_recipe(recipe, changes))
        there = {"order/0", "order/1", "retriever/hybrid", "retriever/bm25", "retriever/dense"}
        assert set(system.figures) == there
        assert {name for name, share in system.missing.items() if share == 0} == there
        hard = {ALONE, "distractors/hard/2", "noise/hard/present/1", "noise/hard/absent/1", "noise/none/absent/0"}
        lacking = {CLEAN} if noise == "[]" else {CLEAN} | hard
        assert {name for name, share in system.missing.items() if share == 1} == lacking
        assert set(system.orders) == {"flip", "disagreement"}
        shown = {row[0]: row[-1] for table in robustness_tables([system]) for row in table.rows}
        assert (shown["clean: gold and hits"], shown["as retrieved"]) == ("100.0", "0.0")
        told = robustness_summary([system])["untuned"]["conditions"]
        assert told[CLEAN] == {"missing": 1.0, "seconds": None}
        assert told["order/1"]["right"]["n"] == 4


@pytest.mark.parametrize(
    "wrong", [{"noise": ["hard", "hard"]}, {"noise": ["pink"]}, {"ratios": [1.5]}, {"retrievers": ["a"], "unseen": ["b"]}]
)
def test_settings_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RobustnessSettings(**wrong)


def test_conditions_are_each_there_once() -> None:
    found = conditions(RobustnessSettings(noise=("hard", "random")))
    assert found[0].name == CLEAN
    assert len({condition.name for condition in found}) == len(found) == 1 + 2 * 8 + 1 + 5  # with and without gold; none; 0 2 4
    beside = [condition.name for condition in found if condition.form == "distractors"]
    assert beside == [ALONE, "distractors/hard/2", "distractors/hard/4", "distractors/random/2", "distractors/random/4"]
    one = conditions(RobustnessSettings(noise=("hard", "random"), distractors=(2,), distractor_kinds=("hard",)))
    assert [condition.name for condition in one if condition.form == "distractors"] == [ALONE, "distractors/hard/2"]
    made = conditions(RobustnessSettings(noise=("counterfactual",), ratios=(0.5,), distractors=()))
    names = [CLEAN, "noise/counterfactual/present/0.5", "distractors/0", "conflict/1", "majority/1"]
    assert [condition.name for condition in made] == names
    bare = conditions(RobustnessSettings(noise=(), distractors=()))
    assert [condition.name for condition in bare] == [CLEAN]


def test_noise_is_guarded_and_too_little_of_it_is_missing(tmp_path: Path) -> None:
    texts = {
        "gold": "The mill was built by Ann Moor.", "copy": "The mill was built by Ann Moor.", "also": "Ann Moor was a miller.",
        "far": "Rain fell.", "twin": "Rain fell.", "near": "It has two wheels.", "other": "The bridge is of stone.",
    }  # fmt: skip
    write_corpus(tmp_path, [Passage(name, text, "", "d" if name in ("gold", "near") else name) for name, text in texts.items()])
    corpus = Corpus(tmp_path)
    example = Example("q", "Who built the mill?", ("Ann Moor",), ("gold",))
    second = Example("r", "Of what is the bridge?", ("stone",), ("other",))
    lost = Example("s", "What fell?", ("rain",))
    hits = [Hit(corpus[row], row, 1.0, row + 1) for row in range(len(corpus))]
    settings = RobustnessSettings(noise=("hard", "random", "neighbour", "other_gold"), ratios=(0, 1), distractors=(1, 2, 6))
    drawn = draw_prompts([example, second, lost], [hits] * 3, corpus, settings, k=3, seed=0)
    assert drawn["s"] == {}, "no gold passage, no condition"
    for name, slots in drawn["q"].items():
        ids = [slot.passage.id for slot in slots]
        assert "copy" not in ids
        assert not {"far", "twin"} <= set(ids), "one text twice"
        if "absent" in name:
            assert not {"gold", "also"} & set(ids), name
    assert {slot.passage.id for slot in drawn["q"]["noise/random/absent/1"]} <= {"far", "twin", "near", "other"}
    assert "noise/neighbour/present/1" not in drawn["q"], "one neighbour for two slots"
    assert "distractors/hard/6" not in drawn["q"]
    assert not {"also", "copy"} & {slot.passage.id for slot in drawn["q"]["distractors/hard/2"]}
    assert {slot.kind for slot in drawn["r"]["distractors/other_gold/1"]} == {"gold", "other_gold"}
    assert drawn == draw_prompts([example, second, lost], [hits] * 3, corpus, settings, k=3, seed=0)


def test_the_second_voice_for_the_truth_is_another_document_where_the_search_found_one(tmp_path: Path) -> None:
    texts = {"gold": "The mill was built in 1873. It has two wheels.", "next": "The mill that was built in 1873 burned.",
             "also": "In the year 1873 a mill was built.", "rain": "Rain fell."}  # fmt: skip
    write_corpus(tmp_path, [Passage(n, text, "", "d" if n in ("gold", "next") else n) for n, text in texts.items()])
    corpus = Corpus(tmp_path)
    hits = [Hit(corpus[row], row, 1.0, row + 1) for row in range(len(corpus))]
    settings = RobustnessSettings(noise=("counterfactual",), ratios=(0,), distractors=())
    example = Example("q", "In which year was the mill built?", ("1873",), ("gold",))
    for found, role in ((hits, "support"), (hits[:2], "redundant")):
        slots = draw_prompts([example], [found], corpus, settings, k=2, seed=0)["q"]["majority/1"]
        assert sorted((slot.role, slot.kind) for slot in slots) == sorted(
            [("gold", "gold"), ("noise", "counterfactual"), (role, "retrieved" if role == "support" else "near_duplicate")]
        )
        assert ("also" in {slot.passage.id for slot in slots}) == (role == "support"), "one document is one voice"


def test_answers_that_are_patterns_are_guarded_by_whether_they_fit(tmp_path: Path) -> None:
    texts = {"gold": "Built in 1873.", "fits": "A fire in 1874.", "rain": "Rain fell.", "wind": "Wind blew."}
    write_corpus(tmp_path, [Passage(name, text, "", name) for name, text in texts.items()])
    corpus = Corpus(tmp_path)
    hits = [Hit(corpus[row], row, 1.0, row + 1) for row in range(len(corpus))]
    settings = RobustnessSettings(noise=("random",), ratios=(1,), distractors=())
    drawn = draw_prompts([Example("q", "When?", (r"187\d",), ("gold",))], [hits], corpus, settings, k=2, seed=0, regex=True)
    assert {slot.passage.id for slot in drawn["q"]["noise/random/absent/1"]} == {"rain", "wind"}


def rows_of(right: dict[str, list[float | None]], declined: dict[str, list[float]] | None = None) -> list[dict[str, Any]]:
    """Rows with these values by condition; None where the condition could not be made."""
    n = len(next(iter(right.values())))
    rows: list[dict[str, Any]] = [{"group": str(place), "conditions": {}} for place in range(n)]
    for name, values in right.items():
        for place, value in enumerate(values):
            if value is not None:
                told = (declined or {}).get(name, [0.0] * n)[place]
                rows[place]["conditions"][name] = {"figures": {"right": value, "declined": told}}
    return rows


def test_systems_stand_beside_each_other_in_every_plot() -> None:
    """Two systems, two kinds: a line each with the kind's colour and the system's dashes; a bar each with its interval."""
    share = Interval(0.5, 0.25, 0.75, 4)
    figures = {name: {"right": share} for name in (CLEAN, ALONE, "distractors/hard/2", "distractors/random/2", "retriever/a")}
    told = dict.fromkeys(figures, 0.0)
    rates = {value: Interval(value, value - 0.1, value + 0.2, 4) for value in (1.0, 0.5, 0.25, 0.125)}
    hard = {"abstention_f1": rates[0.5], "hallucination": rates[0.25], "over_abstention": rates[0.125]}
    abstained = {"none": {"hallucination": rates[1.0]}, "hard/1": hard}
    figures["conflict/1"] = {"right": share, "follow": rates[0.5]}
    systems = [
        Robustness(name, Path(), figures, told, told, abstained, {"flip": share}, {"own": "a", "unseen": []})
        for name in ("untuned", "tuned")
    ]
    plots = {plot["title"]: json.loads(plot["figure"])["data"] for plot in _robustness_plots(systems)}
    lines = plots["Distractors beside gold"]
    assert [line["name"] for line in lines] == ["untuned: hard", "untuned: random", "tuned: hard", "tuned: random"]
    assert [line["line"]["dash"] for line in lines] == ["dot", "dot", "solid", "solid"]
    assert lines[0]["line"]["color"] == lines[2]["line"]["color"] != lines[1]["line"]["color"]
    assert (lines[0]["x"], lines[0]["y"]) == ([0, 2], [50, 50])
    bars = plots["Retrievers"]
    assert [(bar["name"], bar["x"], bar["y"]) for bar in bars] == [(name, ["a (own)"], [50]) for name in ("untuned", "tuned")]
    assert (bars[0]["error_y"]["array"], bars[0]["error_y"]["arrayminus"]) == ([25], [25])
    (declined, _), (answered, _) = plots["Abstention, gold present against absent"], plots["Answers where no passage tells"]
    assert (declined["x"], declined["y"]) == (["100 % hard"], [50])
    assert (answered["x"], answered["y"]) == (["hits", "100 % hard"], [100, 25])
    assert answered["error_y"]["array"] == pytest.approx([20, 20])
    (over, _), (followed, _) = plots["Declined although gold is there"], plots["Counterfactuals followed"]
    assert (over["x"], over["y"]) == (["100 % hard"], [12.5])
    assert (followed["x"], followed["y"]) == (["one gold against one false"], [50])
    assert lines[0]["error_y"]["array"] == [25, 25]
    assert "Noise without gold" not in plots


def test_deltas_are_paired_and_what_is_missing_is_in_no_mean() -> None:
    clean, noisy = [1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, None]
    found = summarise_conditions(rows_of({"clean": clean, "noise/hard/present/0.5": noisy}), own="")
    delta = found["figures"]["noise/hard/present/0.5"]["delta"]
    assert (delta.mean, delta.n) == (pytest.approx(-1 / 3), 3)
    assert found["missing"] == {"clean": 0, "noise/hard/present/0.5": 0.25}
    assert "delta" not in found["figures"]["clean"]
    same = summarise_conditions(rows_of({"clean": clean, "noise/hard/present/1": clean}), own="")
    delta = same["figures"]["noise/hard/present/1"]["delta"]
    assert (delta.mean, delta.low, delta.high) == (0, 0, 0)


def test_gold_present_is_answerable_and_gold_absent_is_not() -> None:
    n = 6
    present, absent = "noise/hard/present/0.5", "noise/hard/absent/0.5"
    declined = {present: [1.0, 1.0, 0, 0, 0, 0], absent: [1.0, 1.0, 1.0, 0, 0, 0]}
    right = {present: [1.0] * n, absent: [1.0, 0, 0, 0, None, None]}
    found = summarise_conditions(rows_of(right, declined), own="")["abstention"]["hard/0.5"]
    expected = {"abstention_precision": 0.6, "abstention_recall": 0.75, "abstention_f1": 2 / 3, "over_abstention": 1 / 3,
                "hallucination": 0.25}  # fmt: skip
    assert {name: value.mean for name, value in found.items()} == pytest.approx(expected)
    rows = rows_of(right, declined)
    exhaustive = []
    for draw in itertools.product(range(n), repeat=2):  # of two groups, each of three questions
        picked = [row for group in draw[:2] for row in rows[3 * (group % 2) : 3 * (group % 2) + 3]]
        present_no = [bool(row["conditions"][present]["figures"]["declined"]) for row in picked]
        absent_no = [bool(row["conditions"][absent]["figures"]["declined"]) for row in picked if absent in row["conditions"]]
        exhaustive.append(abstention([*present_no, *absent_no], [True] * len(present_no) + [False] * len(absent_no)))
    for place, row in enumerate(rows):
        row["group"] = str(place // 3)
    grouped = summarise_conditions(rows, own="")["abstention"]["hard/0.5"]
    for name, value in grouped.items():
        drawn = [own[name] for own in exhaustive if not math.isnan(own[name])]
        assert (value.low, value.high) == pytest.approx((min(drawn), max(drawn))), name


def test_orders_and_retrievers_of_plain_rows() -> None:
    orders = {f"order/{number}": [value, 1.0] for number, value in enumerate((1.0, 1.0, 0.0, 1.0))}
    indexes = {"retriever/a": [1.0, 1.0], "retriever/b": [1.0, 0.0], "retriever/c": [0.0, 0.0]}
    found = summarise_conditions(rows_of(orders | indexes), own="retriever/a")
    assert (found["orders"]["flip"].mean, found["orders"]["disagreement"].mean) == (0.5, 0.25)
    told = found["retrievers"]
    assert (told["own"], told["worst"], told["worst_right"].mean) == ("a", "c", 0.0)
    assert (told["spread"].mean, told["spread"].low, told["spread"].high, told["spread"].n) == (1.0, 1.0, 1.0, 2)
    alone = summarise_conditions(rows_of({"retriever/a": [1.0, 0, 0, 0], "retriever/b": [0, 1.0, 1.0, 0]}), own="retriever/a")
    spread = alone["retrievers"]["spread"]
    every = [abs(sum(draw) / 4) for draw in itertools.product([1, -1, -1, 0], repeat=4)]
    low, high = np.quantile(sorted(every), [0.025, 0.975], method="inverted_cdf")
    assert (spread.mean, spread.low, spread.high) == (0.25, low, high)
    assert found["figures"]["retriever/b"]["delta"].mean == -0.5


def test_systems_are_compared_under_each_condition() -> None:
    """Paired by question and drawn in groups; what one of them lacks is in no mean."""
    names = ("clean", "order/0", "order/1", "retriever/a")
    before = rows_of({name: [1.0, 0.0, 0.0, 1.0] for name in names} | {"conflict/1": [0.0, None, 0.0, 0.0]})
    after = rows_of({name: [1.0, 1.0, 0.0, 1.0] for name in names} | {"order/1": [0.0, 1.0, 0.0, 1.0], "conflict/1": [1.0] * 4})
    for row, other in zip(before, after, strict=True):
        row["group"] = other["group"] = "one"
    found = compare_conditions(before, after)
    assert (found["clean"]["right"].mean, found["clean"]["right"].n) == (0.25, 4)
    assert (found["clean"]["right"].low, found["clean"]["right"].high) == (0.25, 0.25), "one group is no sample of several"
    assert (found["conflict/1"]["right"].mean, found["conflict/1"]["right"].n) == (1.0, 3)
    assert (found["order"]["flip"].mean, found["order"]["disagreement"].mean) == (0.25, 0.25)
    assert found["retriever/a"]["right"].mean == 0.25
    assert "follow" not in found["clean"]
    apart = [dict(row, group=str(place)) for place, row in enumerate(before)]
    drawn = compare_conditions(apart, after)["clean"]["right"]
    plain = paired_bootstrap([1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0], groups=range(4))
    assert (drawn.low, drawn.high) == (plain.low, plain.high) == (0, 0.75)


def test_the_difference_of_systems_is_told_in_json_and_tables(recipe: Path, measured: Any) -> None:
    """The same answers twice: every difference is exactly 0."""
    assert "robustness_differences" not in measured, "one system"
    loaded = load_recipe(recipe)
    (system,) = evaluate_robustness(loaded)
    pair = [system, replace(system, system="tuned")]
    told = Further(loaded, evaluate_recipe(loaded), pair).summary()["robustness_differences"]
    assert (told["before"], told["after"]) == ("untuned", "tuned")
    assert {CLEAN, "conflict/1", "majority/1", "order", "retriever/bm25", "noise/hard/absent/1"} <= set(told["conditions"])
    assert {"right", "f1", "follow"} <= set(told["conditions"]["conflict/1"])
    assert {"flip", "disagreement"} <= set(told["conditions"]["order"])
    values = [value for own in told["conditions"].values() for value in own.values()]
    assert all((value["mean"], value["low"], value["high"]) == (0, 0, 0) and value["n"] for value in values)
    (table,) = [table for table in robustness_tables(pair) if "tuned − untuned" in table.title]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["one gold against one false"][0] == "+0.0 [+0.0, +0.0]"
    assert {"orders: flips", "hybrid (own)"} <= set(rows)
    lost = json.loads((system.folder / "answers.jsonl").read_text().splitlines()[0])
    assert lost["id"], "the file is read again"


def test_a_false_value_is_followed_by_those_who_knew_better() -> None:
    rows = rows_of({"distractors/0": [1.0, 1.0, 0.0, 0.0], "conflict/1": [0.0, 1.0, 0.0, 0.0]})
    sides = [(1, {"1874": 1}), (2, {"1874": 1}), (1, {"1874": 1}), (1, {"1874": 2})]
    for row, followed, (true, false) in zip(rows, (1.0, 0.0, 0.0, 1.0), sides, strict=True):
        row["conditions"]["conflict/1"]["figures"]["follow"] = followed
        row["conditions"]["conflict/1"]["sides"] = {"true": true, "false": false}
    own = summarise_conditions(rows, own="")["figures"]["conflict/1"]
    means = {name: own[name].mean for name in ("follow", "follow_of_right", "follow_conflict", "follow_majority", "delta")}
    expected = {"follow": 0.5, "follow_of_right": 0.5, "follow_conflict": 1 / 2, "follow_majority": 0, "delta": -0.25}
    assert means == pytest.approx(expected)


def test_a_constant_condition_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        summarise_conditions(rows_of({"clean": [0.0] * 10}), own="")
    assert "alike right or wrong under clean;" in caplog.text


def test_a_comparison_says_how_many_training_seeds_are_behind_it(recipe: Path) -> None:
    stages = "{read: {data: {kind: questions, path: train.jsonl, passages: 2}, objective: {kind: answer}}}"
    text = recipe.read_text().replace("limit: 6", "limit: 3")
    (recipe.parent / "seeds.yaml").write_text(f"{text}stages: {stages}\n")
    words = [str(recipe.parent / "seeds.yaml"), "name=seeds", "evaluate.robustness=null"]

    def asked(*more: str) -> Recipe:
        return load_recipe(Path(words[0]), [*words[1:], "train.max_steps=1", *more])

    assert over_seeds(asked()) == {}, "nothing was trained"
    train(asked("seed=1"))
    assert over_seeds(asked("seed=1")) == {}, "nothing was measured"
    evaluate_recipe(asked("seed=1"))
    found = over_seeds(asked("seed=1"))
    assert list(found) == [1]
    assert seed_lines(found, "retrieved/em")[0].startswith("one training seed (1): ")
    train(asked("seed=2"))
    before, after = evaluate_recipe(asked("seed=2"))
    found = over_seeds(asked("seed=1"))
    assert list(found) == [1, 2]
    assert found[2]["retrieved/match"] == after.figures["retrieved/match"].mean - before.figures["retrieved/match"].mean
    assert list(over_seeds(asked("seed=1", "retriever.k=2"))) == [], "of other settings nothing was measured"
    done = runner.invoke(app, ["evaluate", *words, "train.max_steps=1", "seed=2"])
    assert "2 training seeds (1, 2); at least 3 are wanted" in done.stdout
    assert "retrieved/em by seed: " in done.stdout


def test_seeds_in_words() -> None:
    figures = {seed: {"em": 0.01 * seed} for seed in (1, 2, 3)}
    assert seed_lines(figures, "em") == ["3 training seeds (1, 2, 3)", "em by seed: +1.0, +2.0, +3.0; mean +2.0"]
    assert seed_lines(figures, "") == ["3 training seeds (1, 2, 3)"]
    assert seed_lines({}, "em") == []


@pytest.mark.parametrize(("fold", "right"), [(False, 0), (True, 1)])
def test_numerals_are_folded_only_if_asked(fold: bool, right: float) -> None:
    settings = EvaluateSettings(questions=Path("q.jsonl"), metrics=("em", "f1"), fold_numbers=fold)
    measures = _measures(settings, BARE)
    example = Example("q", "哪一年？", ("1978年",))
    assert measures["em"]("一九七八年", example) == right
    assert measures["f1"]("一九七八年", example) == pytest.approx(1 if fold else 0.2857, abs=5e-5)


def test_figures_of_citations_and_quotes_are_in_the_evaluation() -> None:
    settings = EvaluateSettings(questions=Path("q.jsonl"), metrics=("em", "match", "declined", "citations", "quotes", "str_em"))
    example = Example("q", "When?", ("1873",), ("p1",), metadata={"short_answers": [["1873"], ["1874"]]})
    hits = [Hit(Passage(f"p{n}", text), n, 1.0, n + 1) for n, text in enumerate(["Other text.", "Built in 1873."])]
    row: dict[str, Any] = {"predictions": {}, "figures": {}, "counts": {}}
    answer = Answer("When?", 'It says "Built in 1873" [2] [3].', 0.0, True, tuple(hits))
    _add_reading(row, "retrieved", example, answer, hits, settings, _measures(settings, BARE), Cited([]))
    told = {name.removeprefix("retrieved/"): value for name, value in row["figures"].items()}
    assert told == {
        "em": 0, "match": 1, "declined": 0, "str_em": 0.5, "citation_validity": 0.5, "citation_precision": 0.5,
        "citation_recall": 1, "quotes_shown": 1, "quotes_gold": 1, "truncated": 0, "unfinished": 0, "dropped": 0,
    }  # fmt: skip


def test_what_is_not_known_of_citations_and_quotes_is_no_zero(tmp_path: Path) -> None:
    """Without `relevant` nobody knows what may be cited; with it, a passage that holds the answer may be, too."""
    texts = {"p0": "Rain fell.", "p1": "Ann Moor built the mill.", "p2": "The mill is the work of Ann Moor."}
    write_corpus(tmp_path, [Passage(name, text, "", name) for name, text in texts.items()])
    corpus = Corpus(tmp_path)
    hits = [Hit(corpus[row], row, 1.0, row + 1) for row in range(3)]
    settings = EvaluateSettings(questions=Path("q.jsonl"), metrics=("citations", "quotes"))
    cited = Cited(corpus)

    def figures(text: str, relevant: tuple[str, ...], answers: tuple[str, ...] = ("Ann Moor",)) -> dict[str, Any]:
        row: dict[str, Any] = {"predictions": {}, "figures": {}, "counts": {}}
        example = Example("q", "Who built the mill?", answers, relevant)
        _add_reading(row, "gold", example, Answer("q", text, 0.0, True, tuple(hits)), hits, settings, {}, cited)
        told = {name.removeprefix("gold/"): value for name, value in row["figures"].items()}
        robust = _row(example, Answer("q", text, 0.0, True, tuple(hits)), hits, (), settings, RobustnessSettings(), cited)
        assert [robust["figures"][name] for name in names] == [told[name] for name in names], "both files say the same"
        return told

    names = ("citation_precision", "citation_recall")
    told = figures('It "says" [1] [2] [3].', ("p1",))
    assert [told[name] for name in names] == [pytest.approx(2 / 3), 1.0]
    assert (told["citation_validity"], told["quotes_gold"]) == (1.0, 0.0)
    told = figures('It "says" [1] [3].', ())
    assert [told[name] for name in (*names, "quotes_gold")] == [None, None, None]
    assert (told["citation_validity"], told["quotes_shown"]) == (1.0, 0.0)
    told = figures("No mark.", ("p1",))
    assert [told[name] for name in names] == [None, 0.0], "what had to be cited was not"
    assert figures("[1] [3]", ("p1",), ("A",))["citation_precision"] == 0, "no string to look for"


# the judge


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with FaultServer(idempotent=False) as server:
        yield server


def asked(server: FaultServer, **more: Any) -> list[str]:
    """The overrides of a recipe with a judge."""
    endpoint = {"base_url": server.url, "model": "m-1", "api_key_env": "JUDGE_KEY", "concurrency": 4, "attempts": 1}
    told = {"endpoint": endpoint, "money": {"price": "free"}, **more}
    return [f"evaluate.judge={json.dumps(told)}", "evaluate.robustness=null"]


def judging(decide: Callable[[str], dict[str, Any]]) -> Callable[[dict[str, Any]], str]:
    """A server's reply: what `decide` makes of the last message, and the usual one to a probe."""

    def reply(body: dict[str, Any]) -> str:
        return say(body) if "As a trial of" in json.dumps(body) else json.dumps(decide(body["messages"][-1]["content"]))

    return reply


def two_systems(recipe: Path, changes: list[str]) -> tuple[Any, list[Any]]:
    """The recipe, its evaluation, and a second system that answers otherwise."""
    loaded = load_recipe(recipe, changes)
    (first,) = evaluate_recipe(loaded)
    rows = json.loads(json.dumps(first.rows))
    for row in rows:
        row["predictions"]["retrieved"]["text"] = f"better {row['answers'][0]}"
    second = type(first)("tuned", first.folder.with_name("tuned-0"), rows, first.figures)
    return loaded, [first, second]


def test_a_judge_of_places_is_inconsistent_and_nobody_wins(recipe: Path, measured: Any, server: FaultServer) -> None:
    server.reply = judging(lambda text: {"reason": "place", "better": "first"})
    found = judge(*two_systems(recipe, asked(server, rubric=False)))
    assert found.pair is not None
    assert (found.pair.wins, found.pair.losses, found.pair.ties) == (0, 0, 6)
    assert (found.pair.inconsistent_share, found.pair.missing) == (1.0, 0)
    assert sum(pair.n for pair in found.strata.values()) == 6


def test_a_fair_judge_finds_the_better_answer_in_both_places(
    recipe: Path, measured: Any, server: FaultServer, caplog: pytest.LogCaptureFixture
) -> None:
    def fair(text: str) -> dict[str, Any]:
        return {"reason": "r", "better": "first" if "better" in text.split("## First answer")[1].split("##")[0] else "second"}

    server.reply = judging(fair)
    loaded, systems = two_systems(recipe, asked(server, rubric=False, teacher="m-2"))
    with caplog.at_level(logging.WARNING):
        found = judge(loaded, systems)
    assert "of the teacher's family" in caplog.text
    assert found.pair is not None
    assert (found.pair.wins, found.pair.inconsistent, found.pair.rate.mean) == (6, 0, 1.0)
    sent = [request.content for request in server.log if "trial of" not in request.content]
    assert len(sent) == 12
    corpus = {row["id"]: row["text"] for row in map(json.loads, (recipe.parent / "corpus.jsonl").read_text().splitlines())}
    for row in systems[0].rows:
        own = [text for text in sent if row["query"] in text]
        assert len(own) == 2
        for identity in row["predictions"]["retrieved"]["passages"]:
            assert all(corpus[identity] in text for text in own), "a judge without the evidence"
    assert not any("tuned" in text for text in sent), "names are hidden"
    before = len(server.log)
    judge(loaded, systems)
    assert len(server.log) == before, "paid twice"


def test_what_fails_is_missing_and_no_mean_moves(recipe: Path, measured: Any, server: FaultServer, tmp_path: Path) -> None:
    """A third of the calls fail for good, or say what no schema allows; the mean is that of the others."""
    loaded, systems = two_systems(recipe, asked(server, pairwise=False))
    queries = [row["query"] for row in systems[0].rows]
    server.reply = judging(lambda text: {"reason": "r", "score": 2 + queries.index(text.split("\n")[1]) % 3})
    whole = judge(loaded, systems)
    for score in whole.scores.values():
        assert (score.score.mean, score.missing, score.n) == (3, 0, 6)

    def fails(number: int, request: Request) -> Fault | None:
        if queries[0] in request.content:
            return Fault(422)
        return Fault(text='{"reason": "r", "score": 9}') if queries[2] in request.content else None

    loaded, systems = two_systems(recipe, [*asked(server, pairwise=False), f"runs={tmp_path}"])
    server.faults = fails
    holed = judge(loaded, systems)
    for score in holed.scores.values():
        assert (score.missing, score.missing_share, score.score.n) == (2, pytest.approx(1 / 3), 4)
        assert score.score.mean == pytest.approx((3 + 2 + 3 + 4) / 4)  # of the others alone: 2 and 4 are gone
    rows = [json.loads(line) for line in (holed.folder / "judgements.jsonl").read_text().splitlines()]
    assert rows[0]["reasons"]["rubric untuned"].startswith("permanent")
    assert rows[2]["scores"] == {"untuned": None, "tuned": None}
    assert open_judged(holed.folder) == holed


def test_the_command_line_judges(recipe: Path, measured: Any, server: FaultServer, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("id,system,score\nx,untuned,3\n")
    server.reply = judging(lambda text: {"reason": "r", "score": 3})
    changes = asked(server, labels=str(tmp_path / "labels.csv"), teacher="M-2-large")
    done = runner.invoke(app, ["evaluate", str(recipe), *changes, "--json"])
    assert done.exit_code == 0, done.exception
    told = json.loads(done.stdout)["judge"]
    assert (told["model"], told["scores"]["untuned"]["mean"], told["scores"]["untuned"]["missing"]) == ("m-1", 3, 0)
    assert told["kappa"]["untuned"]["rows"] == 0  # no label of these questions
    plain = runner.invoke(app, ["evaluate", str(recipe), *changes])
    assert "judge m-1: rubric, 1 to 5" in plain.stdout
    assert "3.00 [3.00, 3.00]" in plain.stdout
    assert "missing" in plain.stdout
    loaded, systems = two_systems(recipe, changes)
    labels = "".join(f"{row['id']},tuned,{3 + at % 2}\n" for at, row in enumerate(systems[0].rows))
    (tmp_path / "labels.csv").write_text("id,system,score\n" + labels)
    found = judge(loaded, systems)
    assert found.kappa == {"tuned": {"rows": 6, "agreement": 0.5, "kappa": 0.0}}  # a judge that says 3 to everything
    (tmp_path / "labels.csv").write_text("id,system,score\nx,untuned,7\n")
    with pytest.raises(CorpusError, match="'7'"):
        judge(*two_systems(recipe, changes))


def test_the_key_is_in_nothing_that_judging_leaves_behind(
    recipe: Path, measured: Any, server: FaultServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The server repeats the key in its refusals; journal, judgements, manifests, report, log and what is printed have none."""
    pytest.importorskip("plotly")
    server.reply = judging(lambda text: {"reason": "r", "score": 3})
    server.faults = lambda number, request: Fault(422) if number % 2 else None
    changes = [*asked(server), f"runs={tmp_path / 'runs'}"]
    with caplog.at_level(logging.DEBUG):
        done = runner.invoke(app, ["evaluate", str(recipe), *changes, "--report"])
        assert done.exit_code == 0, done.exception
        shown = (tmp_path / "runs/small/report.html").read_text()
        told = runner.invoke(app, ["calls", str(tmp_path / "runs/small/calls")])
        server.faults = lambda number, request: Fault(401)
        stopped = runner.invoke(app, ["evaluate", str(recipe), *changes, "evaluate.judge.endpoint.model=m-2", "--report"])
    assert isinstance(stopped.exception, CallsStopped)
    page, *others = (tmp_path / "runs" / "small" / name for name in ("report.html", "judgements", "calls"))
    assert "judge m-1: rubric, 1 to 5" in shown
    assert "judge m-2: no judgements of these answers yet" in page.read_text(), "the second judge said nothing"
    (judgements,) = others[0].glob("*/judgements.jsonl")
    assert "permanent: 422: not now, Bearer …" in judgements.read_text(), "the server said it, and it was cut out"
    said = shown + done.output + told.output + stopped.output + str(stopped.exception) + repr(stopped.exception) + caplog.text
    assert KEY not in said
    files = [path for folder in (tmp_path, recipe.parent) for path in folder.rglob("*") if path.is_file()]
    assert {page, judgements, others[1] / "journal.jsonl"} <= set(files)
    for path in files:
        assert KEY.encode() not in path.read_bytes(), f"the key is in {path}"


def test_a_chinese_question_is_judged_in_chinese() -> None:
    system, user = messages({"query": "长江的源头在哪个省？", "answers": []}, [("长江", "长江发源于青海省。")], ["青海省"])
    assert "请评判" in system["content"]
    assert user["content"] == "## 问题\n长江的源头在哪个省？\n\n## 段落\n[1] 长江\n长江发源于青海省。\n\n## 回答\n青海省"
    system, user = messages({"query": "Who?", "answers": ["Bob"], "history": ["Hi."]}, [], ["Bob", ""])
    assert system["content"].startswith("You compare")
    for part in ("## Earlier turns\nHi.", "## Passages\n(none)", "## Reference answers\nBob", "## Second answer\n(none)"):
        assert part in user["content"]


def test_two_chinese_questions_find_unlike_passages(tmp_path: Path) -> None:
    from raglan.index import BM25Index, Queries
    from raglan.index.bm25 import build_bm25
    from raglan.recipe import BM25Index as BM25Settings

    chance = random.Random(0)
    topics = ["长江发源于青海省", "故宫位于北京市", "熊猫喜欢吃竹子", "黄河流经郑州市"]
    texts = [f"{chance.choice(topics)}，编号{number}。" for number in range(80)]
    build_bm25(texts, BM25Settings(kind="bm25"), tmp_path)
    _, rows = BM25Index(tmp_path).search(Queries(["长江的源头在哪个省？", "熊猫吃什么？"]), 10)
    assert (rows >= 0).all()
    assert not set(rows[0]) & set(rows[1])
    assert all("长江" in texts[row] for row in rows[0])
    assert all("熊猫" in texts[row] for row in rows[1])
