"""recipes/rag_tuning_tiny.yaml from documents to a report, on the command line alone, in English and Chinese (T45); and what
`make bench-rag-tuning` makes of several seeds."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tiny
from conftest import ROOT
from raglan.cli import app
from raglan.metrics import Interval
from raglan.recipe import load_recipe
from raglan.stages import learning_curves
from test_synthesis import CORPUS

sys.path.insert(0, str(ROOT / "benchmarks"))
import rag_tuning  # the folder of benchmarks is no package
from charts import Panel, chart

RECIPE = ROOT / "recipes" / "rag_tuning_tiny.yaml"
SYSTEMS = ("untuned", "tune")


def asked() -> list[dict[str, Any]]:
    """Three questions of people in each language, about documents of their own."""
    english = [
        (f"In which year did a violent fire destroy the floors of Harbour Mill {n}?", str(1850 + n), f"en{n}#1")
        for n in range(3)
    ]
    chinese = [(f"青浦{n}号大桥是哪一年建成通车的？", f"{1950 + n}年", f"zh{n}#0") for n in range(3)]
    return [
        {"id": f"asked-{at}", "query": query, "answers": [answer], "relevant": [gold]}
        for at, (query, answer, gold) in enumerate(english + chinese)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def changes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The recipe on tiny models and 96 passages; a stage that teaches reading is there, and teaches next to nothing."""
    place = tmp_path_factory.mktemp("rag_tuning")
    passages = CORPUS[:96]
    documents = write(place / "docs.jsonl", [{"id": p.id, "title": p.title, "text": p.text} for p in passages])
    questions = write(place / "asked.jsonl", asked())
    encoder = tiny.bag_of_words(place / "encoder", [f"{p.title} {p.text}" for p in passages])
    model = tiny.llama(place / "model", more=sorted({letter for p in passages for letter in p.title + p.text if letter > "~"}))
    return [
        f"runs={place / 'runs'}", f"knowledge.path={place / 'kb'}", f"knowledge.documents={documents}", "knowledge.chunk=null",
        f"knowledge.encoder={{model: {encoder}, dtype: float32}}", f"synthesis.path={place / 'data'}", "synthesis.n=40",
        "synthesis.languages={en: 1, zh: 1}", "synthesis.passages.k={1: 1, 2: 1}",
        f"synthesis.budget={{tokenizer: {model}, max_length: 1000, answer: 96}}",
        f"generator={{model: {model}, dtype: float32}}", "retriever.k=2", "prompt.max_tokens=900", "decode.max_new_tokens=4",
        "train.bf16=false", "train.save_steps=1000", "stages.teach.data.count=8",
        "stages.teach.train.per_device_train_batch_size=8", f"stages.tune.data.path={place / 'data' / 'train.jsonl'}",
        f"stages.tune.data.dev={place / 'data' / 'dev.jsonl'}", "stages.tune.train.per_device_train_batch_size=4",
        "stages.tune.train.learning_rate=1e-2", "stages.tune.train.num_train_epochs=2",
        f"evaluate.questions={questions}", "evaluate.modes=[retrieved]",
        "evaluate.k=[1]", "evaluate.robustness.ratios=[1]", "evaluate.robustness.orders=2",
    ]  # fmt: skip


def raglan(*words: str, codes: tuple[int, ...] = (0,)) -> str:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code in codes, (done.output, done.exception)
    return done.stdout


def test_from_documents_to_a_report(changes: list[str]) -> None:
    pytest.importorskip("plotly")
    recipe, place = str(RECIPE), load_recipe(RECIPE, changes).runs.parent
    raglan("build", recipe, *changes)
    told = raglan("synthesize", recipe, *changes, codes=(0, 3))  # 3: what came too near to the questions is missing
    rows = [json.loads(line) for line in (place / "data" / "examples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert told.startswith(f"40 requested, {len(rows)} kept")
    languages = [row["synth"]["factors"]["language"] for row in rows]
    assert min(languages.count("en"), languages.count("zh")) >= 12
    shown = {passage["id"] for row in rows for passage in row["synth"]["passages"] if passage["role"] == "gold"}
    assert not shown & {gold for one in asked() for gold in one["relevant"]}

    raglan("train", recipe, *changes)
    losses = [row["eval_loss"] for row in learning_curves(load_recipe(RECIPE, changes))["tune"] if "eval_loss" in row]
    assert losses[-1] < 0.8 * losses[0]

    measured = json.loads(raglan("evaluate", recipe, *changes, "--json"))["robustness"]
    page = place / "report.html"
    raglan("report", recipe, "-o", str(page), *(word for change in changes for word in ("--set", change)))
    text = page.read_text(encoding="utf-8")
    for system in SYSTEMS:
        delta, flip = measured[system]["conditions"]["noise/hard/present/1"]["delta"], measured[system]["orders"]["flip"]
        assert f">{100 * delta['mean']:+.1f} [{100 * delta['low']:+.1f}, {100 * delta['high']:+.1f}]<" in text
        assert f"{system}: orders of the same passages; flip {100 * flip['mean']:.1f} [" in text
    for words in ("against clean", "Distractors beside gold", "Retrievers", "Orders of the same", "Synthetic examples"):
        assert words in text


# the benchmark


def rows_of(right: dict[str, list[float]]) -> rag_tuning.Rows:
    """Condition → whether each question is right."""
    count = len(next(iter(right.values())))

    def figures(value: float) -> dict[str, Any]:
        return {"figures": {"right": value, "f1": value / 2}}

    return {
        str(n): {"group": str(n), "conditions": {name: figures(values[n]) for name, values in right.items()}}
        for n in range(count)
    }


def test_of_several_seeds_each_question_has_its_mean(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["clean", "distractors/0", "distractors/hard/2"]
    first = rows_of({"clean": [1, 0, 0, 0], "distractors/0": [1, 1, 1, 1], "distractors/hard/2": [0, 0, 0, 0]})
    second = rows_of({"clean": [1, 1, 0, 0], "distractors/0": [1, 1, 1, 1], "distractors/hard/2": [1, 1, 1, 0]})
    mean = rag_tuning._mean_rows([first, second])
    assert [rag_tuning._right(row, ["clean"]) for row in mean.values()] == [1, 0.5, 0, 0]
    assert rag_tuning._mean(mean, "distractors/hard/2").mean == 0.375
    bench = rag_tuning.Bench("embedded", [], seeds=range(7, 9), quick=True)
    assert bench.said() == "means over 2 training seeds (7, 8); intervals are over questions"
    bench.verdicts([[first, first], [second, mean]], names)
    told = capsys.readouterr().out
    assert "under noise (right): +56.2" in told
    assert "by seed +75.0, +37.5: OK" in told
    assert "on clean passages (right): +0.0 [+0.0, +0.0]; by seed +0.0, +0.0: OK" in told
    assert "under noise (f1): +28.1" in told
    assert rag_tuning.Bench("embedded", [], seeds=range(7, 8), quick=True).said() == "one training seed"


def test_flips_and_false_values_are_means_over_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    orders = [{"order/0": [1.0, 1, 0, 0], "order/1": [1.0, 0, 0, second]} for second in (0, 1)]
    gold, noise = ([rows_of(one) for one in orders] for _ in range(2))
    for rows, told in ((gold[0], 1.0), (gold[1], 0.0), (noise[0], 0.0), (noise[1], 0.0)):
        for row in list(rows.values())[:2]:  # for the others no false passage could be made
            row["conditions"]["conflict/1"] = {"figures": {"right": 0.0, "f1": 0.0, "follow": told}}
    rag_tuning.Bench("embedded", [], seeds=range(7, 9), quick=True).flips([gold, noise])
    _, flips, *_, conflict = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [cell.split()[0] for cell in flips.split(" | ")[1:]] == ["37.5", "37.5", "+0.0"]  # 1 of 4, and 2 of 4
    assert [cell.split()[0] for cell in conflict.split(" | ")[1:]] == ["50.0", "0.0", "-50.0"]


def test_curves_have_a_panel_a_kind_and_a_line_an_arm() -> None:
    right = {"clean": [1.0, 0], "distractors/0": [1.0, 1], "distractors/hard/2": [1.0, 0], "distractors/other_gold/2": [0, 0],
             "noise/hard/present/0.5": [0, 1.0], "noise/hard/absent/1": [0, 0], "order/0": [1.0, 1]}  # fmt: skip
    arms = {"tuned on gold": rows_of(right), "tuned on <noise>": rows_of(right)}
    drawn = ElementTree.fromstring(rag_tuning._curves(arms, list(right)))
    space = "{http://www.w3.org/2000/svg}"
    words = [text.text for text in drawn.iter(f"{space}text")]
    assert [words.count(name) for name in ("hard", "other gold", "tuned on <noise>")] == [2, 1, 1]
    assert len(list(drawn.iter(f"{space}circle"))) == 2 * 2 * 3  # two arms, two points, three panels


def test_a_chart_without_points_is_refused() -> None:
    point = (0.0, Interval(0.5, 0.4, 0.6, 9))
    assert chart([Panel("a", "x", {"b": [point]})], columns=2, title="t", y="%").count("<circle") == 1
    for wrong in ([], [Panel("a", "x", {"b": []})], [Panel("a", "x", {})]):
        with pytest.raises(ValueError, match="needs panels"):
            chart(wrong, columns=2, title="t", y="%")
