"""The grid: paired intervals against counting and the paper's rows; stages apart from one another; the command line."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

import tiny
from raglan.cli import app
from raglan.errors import CheckpointError, RecipeError
from raglan.evaluate import evaluate_recipe
from raglan.generator import EncodedPrompts
from raglan.grid import Cell, Grid, _plan, _row, _Task, evaluate_grid, open_grid
from raglan.knowledge import build_knowledge
from raglan.metrics import Interval
from raglan.paired import Paired, macro, paired, resampled_means, verdict
from raglan.recipe import ConcatDecode, EnsembleDecode, GridTask, load_recipe
from raglan.records import Answer, Example
from raglan.stages import Parts, finished_parts, stage_parts, stages_of
from raglan.train import train
from test_recipe import GOOD, recipe
from tiny import small_recipe

RECIPE = Path(__file__).parent.parent / "recipes" / "ra_dit_grid.yaml"
CELLS = ("base", "R-ft", "LM-ft", "both")
TASKS = ("MMLU", "NQ", "TQA", "ELI5", "HoPo", "FEV", "AIDA", "zsRE", "T-REx", "WoW")
DEV = {  # RA-DIT, Table 6, 5-shot development sets
    "base": (61.7, 41.7, 73.0, 22.1, 41.6, 90.8, 54.0, 63.7, 71.9, 17.2),
    "R-ft": (63.0, 42.2, 74.9, 22.2, 41.4, 91.6, 54.9, 65.2, 71.4, 17.4),
    "LM-ft": (64.8, 42.8, 73.1, 23.6, 41.2, 91.4, 53.6, 62.9, 69.0, 16.6),
    "both": (64.3, 43.8, 75.0, 23.4, 42.0, 92.3, 52.8, 65.2, 70.1, 17.3),
}


# --- the statistics -----------------------------------------------------------------------------------------------------


def test_resamples_of_three_questions_are_all_27() -> None:
    draws = np.array([np.bincount(draw, minlength=3) for draw in itertools.product(range(3), repeat=3)])
    means = resampled_means(np.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]), draws)
    thirds = Counter(np.rint(3 * (means[:, 1] - means[:, 0])).astype(int).tolist())
    assert thirds == {0: 8, 1: 12, 2: 6, 3: 1}
    drawn = paired({"base": [1, 0, 0], "tuned": [1, 1, 0]}, task="t", seed=1, resamples=20_000)
    shares = Counter(np.rint(3 * (drawn.resampled[:, 1] - drawn.resampled[:, 0])).astype(int).tolist())
    for third, count in thirds.items():
        assert shares[third] / 20_000 == pytest.approx(count / 27, abs=0.015)
    assert drawn.difference("base", "tuned").mean == pytest.approx(1 / 3)


def test_intervals_equal_a_loop_over_the_same_draws() -> None:
    chance = np.random.default_rng(3)
    values = {name: chance.integers(2, size=40).astype(float).tolist() for name in CELLS}
    found = paired(values, task="t", seed=4, resamples=700)
    generator = np.random.default_rng([4, zlib.crc32(b"t")])
    draws = np.concatenate([generator.integers(40, size=(500, 40)), generator.integers(40, size=(200, 40))])
    means = {name: [sum(own[i] for i in draw) / 40 for draw in draws] for name, own in values.items()}
    together = [b - r - g + z for b, r, g, z in zip(*(means[n] for n in ("both", "R-ft", "LM-ft", "base")), strict=True)]
    interaction = found.interaction(*CELLS)
    assert [interaction.low, interaction.high] == pytest.approx(np.quantile(together, [0.025, 0.975]).tolist(), abs=1e-12)
    assert found.interval("base").mean == pytest.approx(np.mean(values["base"]))
    other = paired({**values, "more": values["both"]}, task="t", seed=4, resamples=700)
    assert other.difference("base", "both") == found.difference("base", "both")  # a cell more changes nothing
    assert not np.array_equal(paired(values, task="t", seed=5, resamples=700).resampled, found.resampled)


def test_an_average_resamples_each_task_within_itself() -> None:
    """A loop over the same draws: unlike tasks count alike, and no question is drawn in place of another task's."""
    sizes, chance = {"few": 7, "many": 40}, np.random.default_rng(6)
    values = {task: {c: chance.integers(2, size=n).tolist() for c in ("base", "both")} for task, n in sizes.items()}
    whole = macro([paired(own, task=task, seed=4, resamples=200) for task, own in values.items()])
    averages: dict[str, list[float]] = {"base": [], "both": []}
    drawn = {task: np.random.default_rng([4, zlib.crc32(task.encode())]) for task in sizes}
    draws = {task: drawn[task].integers(n, size=(200, n)) for task, n in sizes.items()}
    for resample in range(200):
        for cell, found in averages.items():
            means = [sum(own[cell][i] for i in draws[task][resample]) / sizes[task] for task, own in values.items()]
            found.append(sum(means) / 2)
    wanted = np.quantile(np.subtract(averages["both"], averages["base"]), [0.025, 0.975])
    difference = whole.difference("base", "both")
    assert [difference.low, difference.high] == pytest.approx(wanted.tolist(), abs=1e-12)
    own = [np.mean(values[task]["both"]) - np.mean(values[task]["base"]) for task in sizes]
    assert difference.mean == pytest.approx(np.mean(own))
    assert whole.n == 47


def test_identical_systems_differ_by_nothing() -> None:
    values = np.random.default_rng(0).random(50).tolist()
    tasks = [paired(dict.fromkeys(CELLS, values), task=name, seed=0, resamples=500) for name in "ab"]
    for figures in (*tasks, macro(tasks)):
        for difference in (figures.difference("base", "both"), figures.interaction(*CELLS)):
            assert (difference.mean, difference.low, difference.high) == (0, 0, 0)
            assert verdict(difference) == "same"


def test_verdicts() -> None:
    for low, mean, high, kind in ((-3, -2, -1, "worse"), (-3, -1, 1, "lower"), (-1, 1, 3, "higher"), (1, 2, 3, "better")):
        assert verdict(Interval(mean, low, high, 9)) == kind
    assert verdict(Interval(-1, -2, 0, 9)) == "lower"  # wholly below, and not up to 0


def paper() -> dict[str, Paired]:
    """1,000 questions a task whose means are the printed ones; which of them are right is drawn for each cell apart."""
    chance = np.random.default_rng(0)
    found = {}
    for at, name in enumerate(TASKS):
        ones = {cell: [1.0] * round(10 * own[at]) + [0.0] * (1000 - round(10 * own[at])) for cell, own in DEV.items()}
        found[name] = paired({c: chance.permutation(o).tolist() for c, o in ones.items()}, task=name, seed=0, resamples=1000)
    return found


def test_the_papers_rows_list_the_lower_tasks() -> None:
    tasks = paper()
    cells = tuple(Cell(name, None, "base") for name in CELLS)
    grid = Grid(cells, dict.fromkeys(TASKS, "em"), tasks, macro(list(tasks.values())), {}, {}, {}, 2, 0, 0, 0)
    lower: dict[str, dict[str, float]] = {}
    for task, cell, _, difference in grid.regressions():
        lower.setdefault(cell, {})[task] = round(100 * difference.mean, 1)
    assert lower == {
        "R-ft": {"HoPo": -0.2, "T-REx": -0.5},
        "LM-ft": {"HoPo": -0.4, "AIDA": -0.4, "zsRE": -0.8, "T-REx": -2.9, "WoW": -0.6},
        "both": {"AIDA": -1.2, "T-REx": -1.8},
    }
    assert grid.average is not None
    printed = {cell: round(100 * grid.average.interval(cell).mean, 1) for cell in CELLS}
    assert printed == {"base": 53.8, "R-ft": 54.4, "LM-ft": 53.9, "both": 54.6}
    assert printed["both"] - printed["R-ft"] - printed["LM-ft"] + printed["base"] == pytest.approx(0.1)


def test_the_bootstrap_is_quick() -> None:
    """A tenth of 4 cells × 10 tasks × 2,500 questions × 10,000 resamples; the whole may take 10 s, and this a generous 3."""
    values = {name: np.random.default_rng(n).random(2500).tolist() for n, name in enumerate(CELLS)}
    began = time.process_time()
    paired(values, task="t", seed=0, resamples=10_000)
    assert time.process_time() - began < 3


def test_systems_must_answer_the_same_questions() -> None:
    with pytest.raises(ValueError, match="the same questions"):
        paired({"base": [1.0], "both": [1.0, 0.0]}, task="t", seed=0, resamples=10)
    with pytest.raises(ValueError, match="one at least"):
        paired({"base": []}, task="t", seed=0, resamples=10)


# --- stages that do not build on one another ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 towers; a recipe whose two stages both start from the base, and a grid of two tasks, words and choices."""
    path = tmp_path_factory.mktemp("grid")
    small = yaml.safe_load(small_recipe(path).read_text())
    dev = [json.loads(line) for line in (path / "dev.jsonl").read_text().splitlines()]
    millers = sorted({row["answers"][0] for row in dev if not row["answers"][0].isdigit()})
    rows = []
    for n, row in enumerate(row for row in dev if not row["answers"][0].isdigit()):
        others = [miller for miller in millers if miller != row["answers"][0]]
        rows.append({**row, "choices": [*others[n % 5 : n % 5 + 2], row["answers"][0]]})
    ((nobody, _),) = Counter(choice for row in rows for choice in row["choices"]).most_common(1)
    small["stages"] = {
        "find": {**small["stages"]["find"], "starts_from": []},
        "read": {**small["stages"]["read"], "starts_from": []},
    }
    small["stages"]["find"]["train"] |= {"learning_rate": 3e-4, "max_steps": 8}
    small["stages"]["find"]["objective"]["gamma"] = 0.2
    small["decode"] = {"kind": "ensemble", "max_new_tokens": 6}
    small["grid"] = {
        "tasks": {
            "words": {"questions": "dev.jsonl", "metric": "f1"},
            "choices": {
                "questions": "choices.jsonl", "metric": "accuracy",
                "decode": {"kind": "ensemble", "scorer": "nll", "abstention": nobody},
            },
        },
        "closed_book": True, "concat": True, "k": [1, 2], "resamples": 300,
    }  # fmt: skip
    del small["evaluate"]
    (path / "grid.yaml").write_text(yaml.safe_dump(small))
    build_knowledge(load_recipe(path / "grid.yaml").knowledge)
    _, hits = Parts().open(load_recipe(path / "grid.yaml")).search([row["query"] for row in rows], 5)
    for n, (row, found) in enumerate(zip(rows, hits, strict=True)):  # not all that is relevant is found first, or at all
        second, fifth = found[1].passage.id, found[4].passage.id
        row["relevant"] = [row["relevant"], [second], [*row["relevant"], fifth], [f"p{n}"]][n % 4]
    (path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    train(load_recipe(folder / "grid.yaml"))
    return folder / "grid.yaml"


def names(path: Path, *changes: str) -> dict[str, str]:
    return {stage.name: stage.folder.name for stage, _ in stages_of(load_recipe(path, list(changes)))}


def test_a_stage_that_starts_from_the_base_does_not_depend_on_the_others(folder: Path) -> None:
    path = folder / "grid.yaml"
    before, after = names(path), names(path, "stages.find.train.learning_rate=0.02")
    assert before["find"] != after["find"]
    assert before["read"] == after["read"]
    chained = ["stages.read.starts_from=null"]
    assert names(path, *chained)["read"] != before["read"]
    assert names(path, *chained)["read"] == names(path, "stages.read.starts_from=[find]")["read"]
    assert names(path, *chained, "stages.find.train.learning_rate=0.02")["read"] != names(path, *chained)["read"]
    for stage, parts in stages_of(load_recipe(path)):
        assert parts == Parts(), stage.name


def test_the_first_stage_and_chains_keep_their_names(folder: Path) -> None:
    """`starts_from` says nothing of what is learned: a recipe that does not use it has the stages it always had."""
    assert names(folder / "grid.yaml")["find"] == names(folder / "grid.yaml", "stages.find.starts_from=null")["find"]


def test_what_a_recipe_may_start_from(tmp_path: Path) -> None:
    stage = "data: {kind: lessons}, objective: {kind: answer}"
    stages = f"stages: {{a: {{{stage}}}, b: {{starts_from: [%s], {stage}}}}}"
    good = GOOD.replace("data: {kind: questions, path: q.jsonl}\nobjective: {kind: answer}\n", "")
    assert load_recipe(recipe(tmp_path, good + stages % "a")).behind("b") == ["a"]
    assert load_recipe(recipe(tmp_path, good + stages % "")).behind("b") == []
    for other in ("b", "c"):
        with pytest.raises(RecipeError, match=rf"stages.b.starts_from names '{other}'; before it are \['a'\]"):
            load_recipe(recipe(tmp_path, good + stages % other))
    tasks = "grid: {base: [x], tasks: {t: {questions: q.jsonl}}}"
    with pytest.raises(RecipeError, match=r"grid names the stage 'x'; there are \['a', 'b'\]"):
        load_recipe(recipe(tmp_path, good + stages % "a" + "\n" + tasks))


def test_each_part_comes_from_its_own_stage(trained: Path) -> None:
    loaded = load_recipe(trained)
    finished = dict(finished_parts(loaded))
    assert list(finished) == ["untuned", "find", "read"]
    assert finished["find"].generator is None
    assert finished["read"].generator is not None
    assert finished["read"].query_encoder == finished["find"].query_encoder  # the tuned system is both
    assert stage_parts(loaded, ["read"]).query_encoder is None
    assert stage_parts(loaded, []) == Parts()
    assert train(loaded, only="read").query_encoder is None  # what it starts from is nothing of `find`
    assert train(loaded) == finished["read"]
    with pytest.raises(CheckpointError, match=r"stage 'read' is not trained with .* now"):
        stage_parts(load_recipe(trained, ["seed=9"]), ["read"])


def test_the_ensemble_reads_the_temperature_that_the_query_encoder_was_tuned_with(trained: Path) -> None:
    """γ is in the manifest of the tuned query encoder; a temperature in the recipe goes before it."""
    loaded = load_recipe(trained)
    tuned = stage_parts(loaded, ["find"]).open(loaded)
    assert tuned.retriever.temperature == pytest.approx(0.2)
    assert Parts().open(loaded).retriever.temperature == pytest.approx(0.05)
    said = load_recipe(trained, ["retriever.prior.temperature=0.5"])
    assert Parts(query_encoder=stage_parts(loaded, ["find"]).query_encoder).open(said).retriever.temperature == pytest.approx(
        0.5
    )
    answer = tuned.answer(["who built bcd?"])[0]
    assert load_recipe(trained).index == "hybrid"  # whose scores are fused ranks: the prior is from q·d and γ
    dense = (
        tuned.retriever.encoder.embed_queries(["who built bcd?"])
        @ tuned.retriever.base.vectors.vectors(np.array([[hit.row for hit in answer.hits]]))[0].T
    )
    weights = np.exp(dense[0] / 0.2)
    assert answer.prior == pytest.approx((weights / weights.sum()).tolist(), abs=1e-5)


# --- the grid -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(trained: Path) -> tuple[Path, Grid, list[int]]:
    """The grid, with how many prompts each generator encoded."""
    encoded: list[int] = []
    begin = EncodedPrompts.__init__

    def counted(self: EncodedPrompts, generator: Any, prompts: Any) -> None:
        encoded.append(len(prompts))
        begin(self, generator, prompts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EncodedPrompts, "__init__", counted)
        grid = evaluate_grid(load_recipe(trained))
    return trained, grid, encoded


def rows_of(path: Path, cell: str, task: str) -> list[dict[str, Any]]:
    (found,) = (load_recipe(path).run / "grid" / cell).glob(f"{task}-*/predictions.jsonl")
    return [json.loads(line) for line in found.read_text().splitlines()]


def test_cells_are_what_each_pair_of_parts_answers(measured: tuple[Path, Grid, list[int]]) -> None:
    path, grid, _ = measured
    loaded = load_recipe(path)
    assert [cell.name for cell in grid.cells] == [
        *CELLS, *(f"{cell} concat" for cell in CELLS), "closed book", "closed book LM-ft",
    ]  # fmt: skip
    find, read = stage_parts(loaded, ["find"]).query_encoder, stage_parts(loaded, ["read"]).generator
    wanted = {"base": Parts(), "R-ft": Parts(None, find), "LM-ft": Parts(read), "both": Parts(read, find)}
    for cell, parts in wanted.items():
        rows = rows_of(path, cell, "words")
        system = parts.open(loaded)
        for row, answer in zip(rows, system.answer([row["query"] for row in rows]), strict=True):
            assert row["passages"] == [hit.passage.id for hit in answer.hits]
            assert row["text"] == answer.text
            assert row["logprob"] == pytest.approx(answer.logprob, abs=1e-3)
        figures = [row["figures"]["f1"] for row in rows]
        assert grid.tasks["words"].interval(cell).mean == pytest.approx(np.mean(figures))
        for row in rows_of(path, cell, "choices"):
            assert {text for text, _ in row["groups"]} >= set(row["answers"])
            assert len(row["groups"]) == 3
    assert all(row["closed_book"] and row["figures"]["hit"] is None for row in rows_of(path, "closed-book", "words"))
    assert any(
        a["passages"] != b["passages"]
        for a, b in zip(rows_of(path, "base", "words"), rows_of(path, "R-ft", "words"), strict=True)
    )


def test_two_retrievals_and_no_prompt_read_twice(measured: tuple[Path, Grid, list[int]]) -> None:
    path, grid, encoded = measured
    assert grid.passes == 2
    assert sorted(p.name for p in (load_recipe(path).run / "grid" / "retrieval").iterdir()) == ["R-ft", "base"]
    each = {c: rows_of(path, c, "words") + rows_of(path, c, "choices") for c in ("base", "R-ft")}
    pairs = [(set(a["passages"]), set(b["passages"])) for a, b in zip(each["base"], each["R-ft"], strict=True)]
    ensemble = 2 * sum(len(a | b) for a, b in pairs)  # both generators
    shared = sum(len(a & b) for a, b in pairs)
    assert shared > 0
    closed = 2 * len(pairs)
    joined = [(tuple(a["passages"]), tuple(b["passages"])) for a, b in zip(each["base"], each["R-ft"], strict=True)]
    together = 2 * sum(len({a, b}) for a, b in joined)
    assert grid.read == ensemble + together + closed
    assert grid.asked == 2 * len(pairs) * (2 * 2 + 2) + closed
    written_whole = 2 * sum(len({a, b}) for a, b in joined[: len(rows_of(path, "base", "words"))])
    assert sum(encoded) == grid.read - written_whole  # `concat` writes by generate, and chooses behind an encoding


def test_evaluate_measures_multiple_choice_alike(measured: tuple[Path, Grid, list[int]]) -> None:
    path, grid, _ = measured
    asks = f"evaluate={{questions: {path.parent}/choices.jsonl, metrics: [accuracy], modes: [retrieved], k: [1]}}"
    before, after = evaluate_recipe(load_recipe(path, ["grid=null", asks]))
    for evaluation, cell in ((before, "base"), (after, "both")):
        assert evaluation.values("retrieved/accuracy") == [row["figures"]["accuracy"] for row in rows_of(path, cell, "choices")]
        assert evaluation.figures["retrieved/accuracy"].mean == grid.tasks["choices"].interval(cell).mean


def test_figures_of_the_grid(measured: tuple[Path, Grid, list[int]]) -> None:
    path, grid, _ = measured
    assert grid.average is not None
    assert grid.average.interval("both").mean == pytest.approx(
        np.mean([own.interval("both").mean for own in grid.tasks.values()])
    )
    assert {figure for _, figure in grid.found["words"]} == {
        "recall@1", "recall@2", "mrr@10", "answer_recall@1", "answer_recall@2",
    }  # fmt: skip
    for cell in CELLS:
        rows = rows_of(path, cell, "words")
        (hit, hits), (miss, misses) = grid.split["words"][cell]
        assert hits + misses == len(rows)
        share = grid.found["words"]["base" if cell in ("base", "LM-ft") else "R-ft", "answer_recall@2"].mean
        assert hits == pytest.approx(share * len(rows))
        total = sum(value * n for value, n in ((hit, hits), (miss, misses)) if n)
        assert total / len(rows) == pytest.approx(grid.tasks["words"].interval(cell).mean)


def test_what_is_found_is_where_the_relevant_passage_stands(measured: tuple[Path, Grid, list[int]]) -> None:
    """Recall and MRR of both query encoders, from a search of one's own and a count of its ranks."""
    path, grid, _ = measured
    loaded = load_recipe(path)
    systems = {"base": Parts(), "R-ft": Parts(query_encoder=stage_parts(loaded, ["find"]).query_encoder)}
    for task, file in (("words", "dev.jsonl"), ("choices", "choices.jsonl")):
        asked = [json.loads(line) for line in (path.parent / file).read_text().splitlines()]
        for name, parts in systems.items():
            _, hits = parts.open(loaded).search([row["query"] for row in asked], 10)
            each = []
            for row, found in zip(asked, hits, strict=True):
                ranks = [rank for rank, hit in enumerate(found, 1) if hit.passage.id in row["relevant"]]
                recalls = [sum(rank <= k for rank in ranks) / len(row["relevant"]) for k in (1, 2)]
                each.append([*recalls, 1 / min(ranks, default=math.inf)])
            wanted = dict(zip(("recall@1", "recall@2", "mrr@10"), np.mean(each, axis=0), strict=True))
            assert {figure: grid.found[task][name, figure].mean for figure in wanted} == pytest.approx(wanted)
            assert task == "words" or len({*wanted.values(), 0, 1}) == 5, wanted  # no two alike, none of them 0 or 1


def test_how_often_no_answer_was_given(measured: tuple[Path, Grid, list[int]]) -> None:
    """By the words that a task says are none, which here one of the choices is; and by those that count elsewhere."""
    path, grid, _ = measured
    loaded = load_recipe(path)
    assert loaded.grid is not None
    nobody = loaded.grid.tasks["choices"].decode.abstention  # type: ignore[union-attr]
    shares = {}
    for cell in grid.cells:
        texts = [row["text"] for row in rows_of(path, cell.folder, "choices")]
        shares[cell.name] = texts.count(nobody) / len(texts)
        assert grid.abstained["choices"].interval(cell.name).mean == pytest.approx(shares[cell.name])
    assert any(0 < share < 1 for share in shares.values())
    cell, example = grid.cells[0], Example("1", "who?", ("Rusk",))
    told = {"": 1.0, "I don't know.": 1.0, "i DON'T know": 1.0, "I don't know Rusk": 0.0, "Rusk": 0.0}
    for decode in (EnsembleDecode(kind="ensemble"), ConcatDecode()):
        task = _Task("t", GridTask(questions=path), decode, [example])
        rows = [_row(task, cell, example, Answer("who?", text, 0.0, True, ())) for text in told]
        assert [row["figures"]["abstained"] for row in rows] == list(told.values())


def test_a_grid_is_not_measured_twice_and_goes_on_where_it_stopped(
    measured: tuple[Path, Grid, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, grid, _ = measured
    run = load_recipe(path).run / "grid"
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*.jsonl")}
    (lost,) = (run / "both").glob("choices-*")
    (lost / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="holds no finished grid cell"):
        open_grid(load_recipe(path))
    again = evaluate_grid(load_recipe(path))
    assert again.tasks["choices"].interval("both") == grid.tasks["choices"].interval("both")
    changed = {p for p, then in before.items() if p.stat().st_mtime_ns != then}
    assert changed == {lost / "predictions.jsonl"}
    module = importlib.import_module("raglan.stages")
    monkeypatch.setattr(module.Parts, "open", lambda *_: pytest.fail("a finished grid opens no model"))
    assert evaluate_grid(load_recipe(path)).asked == grid.asked


def test_what_cannot_be_a_grid(trained: Path) -> None:
    for change, message in (
        ("grid=null", "has no grid"),
        ("retriever.retrieve_again={max_draft_tokens: 4}", "does not depend on the generator"),
        ("retriever.history=rewrite", "does not depend on the generator"),
        ("grid.generator=find", "stage 'find' does not learn a generator"),
        ("grid.tasks.words.decode={kind: classify, labels: [a, b]}", "concat would answer in words"),
        ("grid.tasks.words.decode={kind: ensemble, scorer: nll_compl, completion: So}", "concat knows 'Answer:' alone"),
        ("grid.base=[find]", "no stage learns a query_encoder"),
    ):
        with pytest.raises(RecipeError, match=message):
            evaluate_grid(load_recipe(trained, [change]))


def test_choices_that_are_not_there_are_told(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A task measured by accuracy whose questions have none is answered in words, and says so; one measured by F1 is silent."""
    plain = _plan(load_recipe(trained, ["grid.tasks.choices.questions=dev.jsonl"]))
    assert not any(next(task for task in plain.tasks if task.name == "choices").choices)
    told = [record.getMessage() for record in caplog.records]
    assert told == ["task choices: 20 of 20 questions have no choices and are answered in words"]


def test_tuned_parts_may_be_folders(measured: tuple[Path, Grid, list[int]]) -> None:
    path, grid, _ = measured
    loaded = load_recipe(path)
    find, read = stage_parts(loaded, ["find"]).query_encoder, stage_parts(loaded, ["read"]).generator
    text = yaml.safe_load(path.read_text())
    text |= {"name": "folders", "stages": {}}
    text["grid"] |= {"folders": {"query_encoder": str(find), "generator": read}, "closed_book": False, "concat": False}
    del text["grid"]["tasks"]["words"]
    other = path.with_name("folders.yaml")
    other.write_text(yaml.safe_dump(text))
    again = evaluate_grid(load_recipe(other))
    assert again.average is None
    for cell in CELLS:
        assert again.tasks["choices"].interval(cell) == grid.tasks["choices"].interval(cell)


def test_the_command_prints_judges_and_reports(measured: tuple[Path, Grid, list[int]]) -> None:
    path, grid, _ = measured
    runner = CliRunner()
    done = runner.invoke(app, ["evaluate", str(path), "--report"])
    assert done.exit_code == 0, done.output
    for text in ("Difference to base", "interaction", "mrr@10", "No answer given", "miss", "both concat", "closed book LM-ft"):
        assert text in done.stdout
    assert "2 retrieval passes" in done.output
    page = (load_recipe(path).run / "report.html").read_text()
    assert "<h2>The grid</h2>" in page
    assert "<h2>Examples</h2>" not in page
    assert page.count("<thead>") == 5
    told = json.loads(runner.invoke(app, ["evaluate", str(path), "--json"]).stdout)
    assert told == json.loads((load_recipe(path).run / "grid" / "summary.json").read_text())
    assert told["seed"] == 1
    assert told["tasks"]["choices"]["metric"] == "accuracy"
    assert told["average"]["interaction"]["mean"] == pytest.approx(grid.average.interaction(*CELLS).mean)
    assert set(told["tasks"]["words"]["split"]["base"]) == {"hit", "miss"}


def test_one_of_the_choices_given_on_the_command_line(trained: Path) -> None:
    runner = CliRunner()
    words = ["answer", str(trained), "who built bcd?", "--choice", "nobody at all", "--choice", "miller", "--json"]
    done = runner.invoke(app, words)
    assert done.exit_code == 0, done.output
    (told,) = json.loads(done.stdout)
    assert {candidate["answer"] for candidate in told["candidates"]} == {"nobody at all", "miller"}
    assert told["answer"] == max(told["candidates"], key=lambda c: c["logprob"])["answer"]
    assert told["closed_book"] is False
    other = runner.invoke(app, [*words, "decode.kind=rag_token"])
    assert isinstance(other.exception, RecipeError)
    assert "does not choose among given answers" in str(other.exception)


def test_a_worse_cell_fails_where_that_is_asked_for(measured: tuple[Path, Grid, list[int]]) -> None:
    """By hand the base is made right on every question of a task, and R-ft wrong."""
    path, _, _ = measured
    kept: dict[Path, str] = {}
    for cell, value in (("base", 1.0), ("R-ft", 0.0)):
        (folder,) = (load_recipe(path).run / "grid" / cell).glob("choices-*")
        kept |= {file: file.read_text() for file in (folder / "predictions.jsonl", folder / "manifest.json")}
        rows = rows_of(path, cell, "choices")
        made = "".join(json.dumps({**row, "figures": {**row["figures"], "accuracy": value}}) + "\n" for row in rows)
        (folder / "predictions.jsonl").write_text(made)
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, "files": {"predictions.jsonl": len(made)}}))
    runner = CliRunner()
    try:
        done = runner.invoke(app, ["evaluate", str(path), "--fail-on", "worse"])
        assert done.exit_code == 1, done.output
        assert "worse than base: R-ft on choices, -100.0 [-100.0, -100.0] points" in done.output
        assert runner.invoke(app, ["evaluate", str(path)]).exit_code == 0
    finally:
        for file, text in kept.items():
            file.write_text(text)
    assert isinstance(runner.invoke(app, ["evaluate", str(path), "--fail-on", "lower"]).exception, RecipeError)


def test_the_recipe_as_it_is_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Build, train and evaluate by the command line, on tiny models."""
    small_recipe(tmp_path)
    tiny.bart(tmp_path / "bart")
    rows = [json.loads(line) for line in (tmp_path / "dev.jsonl").read_text().splitlines()]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:6]))
    chosen = [{**row, "choices": ["nobody", *row["answers"]]} for row in rows[6:12]]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    monkeypatch.setenv("DOCUMENTS", str(tmp_path / "corpus.jsonl"))
    monkeypatch.setenv("QUESTIONS", str(tmp_path))
    changes = [
        f"runs={tmp_path}/runs", f"knowledge.path={tmp_path}/base", "knowledge.chunk=null",
        f"knowledge.encoder.model={tmp_path}/encoder/encoder", f"generator.model={tmp_path}/bart", "train.bf16=false",
        "stages.teach.data.count=8", "train.max_steps=1", "retriever.k=2", "grid.resamples=200", "stages.r_ft.objective.k=3",
    ]  # fmt: skip
    runner = CliRunner()
    for words in (["build"], ["train"], ["evaluate", "--json"]):
        done = runner.invoke(app, [words[0], str(RECIPE), *changes, *words[1:]])
        assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert set(told["tasks"]) == {"qa", "choices"}
    assert len(told["average"]["cells"]) == 10
    stages = {stage.name: before for stage, before in stages_of(load_recipe(RECIPE, changes))}
    assert stages["lm_ft"] == stages["r_ft"]  # both from the taught reader, and neither from the other
    assert stages["lm_ft"].query_encoder is None
