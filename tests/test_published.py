"""Published figures as rows: each is what a shipped recipe measures, and an evaluation is held against it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from raglan.artifact import write_manifest
from raglan.metrics import Interval
from raglan.recipe import load_recipe

ROOT = Path(__file__).parent.parent
ROWS = yaml.safe_load((ROOT / "benchmarks" / "published.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_what_its_recipe_measures(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCUMENTS", str(tmp_path))
    monkeypatch.setenv("QUESTIONS", str(tmp_path))
    row = ROWS[name]
    recipe = load_recipe(ROOT / "recipes" / f"{row['recipe']}.yaml", row["changes"])
    mode, metric = row["figure"].split("/")
    assert recipe.decode.kind == row["method"]
    assert recipe.generator.model == "facebook/bart-large"
    assert mode in recipe.evaluate.modes
    assert metric in recipe.evaluate.metrics
    if row["method"].startswith("rag_"):
        assert next(iter(recipe.trainings().values())).objective.over == row["method"].removeprefix("rag_")
    assert 0 < row["tolerance"] < row["expected"] < 100
    assert row["source"].startswith("Table ")


def test_an_evaluation_is_held_against_a_row(tmp_path: Path) -> None:
    for mean, word, code in ((0.436, "OK", 0), (0.455, "OK", 0), (0.434, "FAIL", 1), (0.456, "FAIL", 1)):
        folder = tmp_path / str(mean)
        folder.mkdir()
        (folder / "predictions.jsonl").write_text(json.dumps({"figures": {"retrieved/em": 0.0}}) + "\n")
        figures = {"retrieved/em": asdict(Interval(mean, mean - 0.016, mean + 0.016, 3610))}
        write_manifest(folder, "evaluation", {"system": "tuned", "figures": figures})
        assert said(folder, "nq-sequence") == (word, code)
    assert said(folder, "jeopardy-token")[1] == 1  # not measured


def said(folder: Path, row: str) -> tuple[str, int]:
    command = [sys.executable, str(ROOT / "benchmarks" / "published.py"), str(folder), row]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return done.stdout.partition(" ")[0], done.returncode
