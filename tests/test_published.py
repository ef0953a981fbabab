"""Published figures as rows: each is what a shipped recipe measures, and an evaluation is held against it."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

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


def test_an_evaluation_is_held_against_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    spec = importlib.util.spec_from_file_location("published", ROOT / "benchmarks" / "published.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def said(folder: Path, row: str) -> tuple[str, Any]:
        monkeypatch.setattr("sys.argv", ["published.py", str(folder), row])
        with pytest.raises(SystemExit) as ended:
            module.main()
        return capsys.readouterr().out.partition(" ")[0], ended.value.code

    for mean, word, code in ((0.436, "OK", 0), (0.455, "OK", 0), (0.434, "FAIL", 1), (0.456, "FAIL", 1)):
        folder = tmp_path / str(mean)
        folder.mkdir()
        (folder / "predictions.jsonl").write_text(json.dumps({"figures": {"retrieved/em": 0.0}}) + "\n")
        figures = {"retrieved/em": asdict(Interval(mean, mean - 0.016, mean + 0.016, 3610))}
        write_manifest(folder, "evaluation", {"system": "tuned", "figures": figures})
        assert said(folder, "nq-sequence") == (word, code)
    assert "has no retrieved/bleu1" in said(folder, "jeopardy-token")[1]
