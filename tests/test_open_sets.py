"""Open questions and unanswerable ones: all are answered, and each figure is over the questions that it applies to."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from raglan.answerable import abstention_measures, kinds
from raglan.cited import Cited
from raglan.cli import app
from raglan.documents import example_row, read_examples, write_examples
from raglan.evaluate import Evaluation, _add_reading, _measures, compare, evaluate_recipe, summarise
from raglan.metrics import Interval
from raglan.rag import RAG
from raglan.recipe import ConcatDecode, EvaluateSettings, load_recipe
from raglan.records import Answer, Example
from raglan.robustness import abstention
from tiny import small_recipe

runner = CliRunner()
BARE = RAG(None, None, ConcatDecode(), 1)  # type: ignore[arg-type]  # nothing of it but the decoding is looked at
ROWS = [
    {"id": "a", "query": "who built the tower", "answers": ["bob"], "relevant": ["p1"]},
    {"id": "b", "query": "what year was it built", "answers": ["1704"], "relevant": ["p4"]},
    {"id": "u", "query": "who painted the tower", "answers": [], "relevant": ["p1"]},
    {"id": "o", "query": "why do people build towers"},
    {"id": "s", "query": "which years were built", "short_answers": [["1704"], ["1705"]]},
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built knowledge base and a recipe that trains nothing."""
    path = small_recipe(tmp_path_factory.mktemp("open"))
    settings = yaml.safe_load(path.read_text())
    del settings["stages"]
    settings["evaluate"] |= {"modes": ["gold", "retrieved"], "k": [1]}
    path.write_text(yaml.safe_dump(settings))
    assert runner.invoke(app, ["build", str(path)]).exit_code == 0
    return path


def asked(recipe: Path, name: str, rows: list[dict[str, Any]], *more: str) -> list[str]:
    """The command line of an evaluation of these questions."""
    path = recipe.parent / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["evaluate", str(recipe), f"evaluate.questions={path}", *more]


def told(command: list[str]) -> Any:
    done = runner.invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.exception
    return json.loads(done.stdout)


def test_no_answer_and_no_answers_are_two_things(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    examples = read_examples(path)
    assert [example.unanswerable for example in examples] == [False, False, True, False, False]
    assert [example.answers for example in examples][2:] == [(), (), ()]
    write_examples(tmp_path / "again.jsonl", examples)
    assert read_examples(tmp_path / "again.jsonl") == examples
    assert "answers" not in example_row(examples[3])
    assert example_row(examples[2])["answers"] == []


@pytest.mark.skipif("RAGLAN_DATA" not in os.environ, reason="RAGLAN_DATA names no folder")
def test_squads_questions_without_an_answer_are_unanswerable() -> None:
    folder = Path(os.environ["RAGLAN_DATA"])
    assert all(example.unanswerable for example in read_examples(folder / "squad" / "dev_unanswerable.jsonl.gz"))
    assert not any(example.unanswerable for example in read_examples(folder / "squad" / "dev.jsonl.gz"))
    assert not any(example.unanswerable for example in read_examples(folder / "cranfield" / "test.jsonl.gz"))


def test_a_collection_without_answers_is_open(tmp_path: Path) -> None:
    (tmp_path / "graded.jsonl").write_text('{"query": "why", "answers": [], "relevant": ["p1"], "grades": {"p1": 3}}\n')
    (graded,) = read_examples(tmp_path / "graded.jsonl")
    assert not graded.unanswerable, "whoever graded passages did not look for answers"
    (tmp_path / "qrels").mkdir()
    (tmp_path / "queries.jsonl").write_text('{"_id": "1", "text": "why towers"}\n')
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n1\tp1\t1\n")
    (example,) = read_examples(tmp_path)
    assert (example.answers, example.unanswerable, example.relevant) == ((), False, ("p1",))


def test_an_open_set_is_answered_and_says_what_cannot_be_computed(recipe: Path, caplog: pytest.LogCaptureFixture) -> None:
    command = asked(recipe, "open", [{"id": row["id"], "query": row["query"]} for row in ROWS])
    with caplog.at_level(logging.WARNING):
        (measured,) = evaluate_recipe(load_recipe(recipe, command[2:]))
    assert "nothing can be computed" in caplog.text
    found = told(command)
    assert found["untuned"]["retrieved/em"] == {"mean": None, "low": None, "high": None, "n": 0}
    assert found["untuned"]["retrieved/unfinished"]["n"] == 5
    assert found["questions"] == {"answered": 0, "unanswerable": 0, "open": 5}
    assert all(row["predictions"]["retrieved"].keys() >= {"text", "seconds", "passages"} for row in measured.rows)
    assert all("gold" not in row["predictions"] for row in measured.rows), "nobody named a relevant passage"
    assert set(measured.figures) == {"retrieved/truncated", "retrieved/unfinished"}
    said = runner.invoke(app, command)
    assert "5 questions: 0 with answers, 0 unanswerable, 5 open" in said.output
    assert any(line.split() == ["retrieved/em", "–", "0"] for line in said.stdout.splitlines())
    assert "untuned, retrieved, an answer: tokens" in said.output


def test_figures_are_over_the_questions_they_apply_to(recipe: Path) -> None:
    more = ["evaluate.metrics=[em, f1, str_em, declined, citations, macro_f1]"]
    mixed = told(asked(recipe, "mixed", ROWS, *more))
    alone = told(asked(recipe, "alone", ROWS[:2], *more))
    own, bare = mixed["untuned"], alone["untuned"]
    for name in ("retrieved/em", "retrieved/f1", "gold/em", "answer_recall@1", "retrieved/macro_f1"):
        assert own[name] == bare[name], "what has no answer moves no figure of answers"
    assert own["retrieved/em"]["n"] == 2
    assert (own["recall@1"]["n"], own["mrr@10"]["n"], own["gold/unfinished"]["n"]) == (3, 3, 3)
    assert own["retrieved/str_em"]["n"] == 1
    assert own["retrieved/declined"]["n"] == own["retrieved/truncated"]["n"] == 5
    assert mixed["questions"] == {"answered": 2, "unanswerable": 1, "open": 2}
    assert "questions" not in alone
    assert not any("abstention" in name or "hallucination" in name for name in bare)
    assert (own["retrieved/hallucination"]["n"], own["retrieved/over_abstention"]["n"]) == (1, 2)
    assert own["retrieved/hallucination"]["mean"] + own["retrieved/abstention_recall"]["mean"] == 1
    assert own["retrieved/abstention_f1"]["n"] == 3


def test_the_report_says_how_many_questions_are_behind_a_figure(recipe: Path) -> None:
    pytest.importorskip("plotly")
    command = asked(recipe, "mixed", ROWS)
    done = runner.invoke(app, [*command, "--report"])
    assert done.exit_code == 0, done.exception
    page = (recipe.parent / "runs" / "small" / "report.html").read_text()
    for words in ("2 with answers, 1 unanswerable, 2 open", "hallucination", "over-abstention", "abstention F1", ", n 2<",
                  "open (2)", "still wrong (3)"):  # fmt: skip
        assert words in page, words
    done = runner.invoke(app, [*asked(recipe, "open", [ROWS[3]]), "--report"])
    assert done.exit_code == 0, done.exception
    page = (recipe.parent / "runs" / "small" / "report.html").read_text()
    assert "<td>exact match</td>" in page
    assert "<td>–</td>" in page


def test_short_answers_alone_can_be_measured(recipe: Path, caplog: pytest.LogCaptureFixture) -> None:
    command = asked(recipe, "short", [ROWS[4]], "evaluate.metrics=[str_em]")
    (measured,) = evaluate_recipe(load_recipe(recipe, command[2:]))
    assert measured.figures["retrieved/str_em"].n == 1
    assert "nothing can be computed" not in caplog.text


SAID = {  # before, after
    "a1": ("bob", "bob"), "a2": ("I don't know.", "bob"), "a3": ("The passages do not say.", "I do not know."),
    "u1": ("bob", "I don't know."), "u2": ("I don't know.", "I don't know."), "u3": ("bob", "bob"),
    "o1": ("bob", "I don't know."),
}  # fmt: skip


def rows_of(texts: list[str]) -> list[dict[str, Any]]:
    """Rows of an evaluation in which this was answered."""
    settings, rows = EvaluateSettings(questions=Path("q.jsonl")), []
    measures = _measures(settings, BARE) | abstention_measures(settings)
    for name, text in zip(SAID, texts, strict=True):
        example = Example(name, "who", ("bob",) if name[0] == "a" else (), unanswerable=name[0] == "u")
        row: dict[str, Any] = {"id": name, "answers": list(example.answers), "predictions": {}, "figures": {}, "counts": {}}
        rows.append(row | ({"unanswerable": True} if example.unanswerable else {}))
        _add_reading(rows[-1], "retrieved", example, Answer("who", text, 0.0, True, ()), (), settings, measures, Cited(()))
    return rows


def test_abstention_in_the_evaluation_is_the_arithmetic_of_robustness(tmp_path: Path) -> None:
    settings = EvaluateSettings(questions=Path("q.jsonl"), modes=("retrieved",))
    before, after = (rows_of([pair[at] for pair in SAID.values()]) for at in (0, 1))
    assert kinds(before) == {"answered": 3, "unanswerable": 3, "open": 1}
    figures = summarise(before, settings)
    expected = abstention([False, True, True, False, True, False], [True, True, True, False, False, False])
    assert {name: figures[f"retrieved/{name}"].mean for name in expected} == pytest.approx(expected)
    assert figures["retrieved/em"].n == 3
    systems = [Evaluation(name, tmp_path, rows, summarise(rows, settings)) for name, rows in (("x", before), ("y", after))]
    changes = compare(*systems)
    later = abstention([False, False, True, True, True, False], [True, True, True, False, False, False])
    assert {name: changes[f"retrieved/{name}"].mean for name in expected} == pytest.approx(
        {name: later[name] - expected[name] for name in expected}
    )
    assert changes["retrieved/abstention_f1"].low < changes["retrieved/abstention_f1"].mean
    same = compare(systems[0], systems[0])["retrieved/abstention_precision"]
    assert same == Interval(0, 0, 0, 6)


def test_where_one_question_is_declined_its_precision_has_an_interval() -> None:
    rows = rows_of(["bob", "bob", "bob", "I don't know.", "bob", "bob", "bob"])
    found = summarise(rows, EvaluateSettings(questions=Path("q.jsonl"), modes=("retrieved",)))["retrieved/abstention_precision"]
    assert (found.mean, found.n) == (1, 6)
    assert not math.isnan(found.low)
    nobody = summarise(rows_of(["bob"] * 7), EvaluateSettings(questions=Path("q.jsonl"), modes=("retrieved",)))
    assert "retrieved/abstention_precision" not in nobody
    assert nobody["retrieved/abstention_f1"].mean == 0


def test_an_evaluation_that_read_no_open_question_is_made_again(recipe: Path) -> None:
    """As it was left by versions that read only questions with answers."""
    command = asked(recipe, "old", ROWS)
    loaded = load_recipe(recipe, command[2:])
    (made,) = evaluate_recipe(loaded)
    manifest = json.loads((made.folder / "manifest.json").read_text())
    del manifest["asked"]
    rows = [row | ({} if row["answers"] else {"predictions": {}}) for row in made.rows]
    (made.folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest["files"]["predictions.jsonl"] = (made.folder / "predictions.jsonl").stat().st_size
    (made.folder / "manifest.json").write_text(json.dumps(manifest))
    (again,) = evaluate_recipe(loaded)
    assert [row["predictions"]["retrieved"]["text"] for row in again.rows] == [
        row["predictions"]["retrieved"]["text"] for row in made.rows
    ]
