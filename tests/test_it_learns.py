"""It learns, through the command line: twelve invented facts, tiny random towers and generators, answers alone.

A first stage teaches the generator to read, with one question for all passages. The second is given questions whose words no
passage holds, and their answers; which passage belongs to which question it has to find out. Held out are other words around
the same names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import tiny
from raglan.cli import app
from raglan.recipe import load_recipe
from raglan.stages import learning_curves

FACTS = [(str(number), letter) for number, letter in zip(range(10, 22), "abcdefghijkl", strict=True)]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def asked(words: str) -> list[dict[str, Any]]:
    return [
        {"id": words.format(number), "query": words.format(number), "answers": [letter], "relevant": [letter]}
        for number, letter in FACTS
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("learns")
    write(path / "corpus.jsonl", [{"id": letter, "title": "", "text": f"{letter} {letter} {letter}"} for _, letter in FACTS])
    write(path / "lessons.jsonl", [{**row, "query": "what?"} for row in asked("lesson {}")])
    write(path / "train.jsonl", asked("who has {}?") + asked("name {}") + asked("is it {}?"))
    write(path / "dev.jsonl", asked("who is {}?"))
    tiny.sentence_encoder(path / "encoder")
    for kind, make in (("bart", tiny.bart), ("llama", tiny.llama)):
        make(path / kind)
        recipe = {
            "name": kind, "seed": 1,
            "knowledge": {"path": "kb", "documents": "corpus.jsonl", "chunk": None, "indexes": {"dense": {"kind": "dense"}},
                          "encoder": {"model": "encoder/encoder", "dtype": "float32"}},
            "retriever": {"k": 3}, "prompt": {"template": "{passages} {question} ", "passage": "{text}"},
            "generator": {"model": kind, "dtype": "float32"},
            "train": {"bf16": False, "save_strategy": "no", "logging_steps": 5, "weight_decay": 0.0},
            "stages": {
                "read": {
                    "data": {"kind": "questions", "path": "lessons.jsonl", "passages": 1, "source": "gold"},
                    "objective": {"kind": "answer"},
                    "train": {"max_steps": 150, "per_device_train_batch_size": 12, "learning_rate": 1e-2},
                },
                "joint": {
                    "data": {"kind": "questions", "path": "train.jsonl", "dev": "dev.jsonl"},
                    "objective": {"kind": "marginal", "over": "sequence", "k": 12, "rates": {"query_encoder": 1e-2}},
                    "train": {"max_steps": 60, "per_device_train_batch_size": 8, "learning_rate": 1e-3,
                              "eval_on_start": True, "eval_strategy": "steps", "eval_steps": 30},
                },
            },
            "evaluate": {"questions": "dev.jsonl", "modes": ["retrieved"], "k": [1]},
        }  # fmt: skip
        (path / f"{kind}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


@pytest.mark.parametrize("over", ["sequence", "token"])
@pytest.mark.parametrize("kind", ["bart", "llama"])
def test_answers_alone_teach_what_to_find_and_what_to_say(kind: str, over: str, folder: Path) -> None:
    recipe = str(folder / f"{kind}.yaml")
    changes = [f"stages.joint.objective.over={over}", f"decode.kind=rag_{over}", "decode.max_new_tokens=3"]
    run("build", recipe)
    run("train", recipe, *changes)
    loaded = load_recipe(recipe, changes)
    found = json.loads(run("evaluate", recipe, *changes, "--every-stage", "--json"))
    recall, right = (
        [found[system][name]["mean"] for system in ("untuned", "read", "joint")] for name in ("recall@1", "retrieved/em")
    )
    losses = [row["eval_loss"] for row in learning_curves(loaded)["joint"] if "eval_loss" in row]
    assert losses[-1] < 0.6 * losses[0]
    assert recall[1] == recall[0] < 0.3
    assert recall[2] > 0.5
    assert max(right[:2]) < 0.3
    assert right[2] > 0.5
