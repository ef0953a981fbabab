"""The commands of README.md run as they are printed (T52): in a shell, one after another, in a folder of what they name."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from conftest import ROOT
from test_docs import printed
from test_interop import checkpoint
from test_synthesis import english

README = ROOT / "README.md"
WARM = Path(__file__).parent / "warm_raglan.py"
Done = subprocess.CompletedProcess[str]
RECIPE = """
name: small
seed: 1
knowledge:
  path: kb
  documents: documents.jsonl
  chunk: null
  encoder: {model: encoder, dtype: float32}
  indexes: {dense: {kind: dense}, bm25: {kind: bm25}, hybrid: {kind: hybrid, of: [dense, bm25], fusion: rrf}}
retriever: {k: 2}
generator: {model: self-rag, dtype: float32}
decode: {kind: self_rag, max_new_tokens: 6}
synthesis:
  path: data
  n: 12
  teacher: {kind: offline}
  passages: {k: {1: 1, 3: 1}}
  weights: {task: {factoid: 1}, answer_format: fit}
  budget: {tokenizer: self-rag, max_length: 2000, answer: 96}
critique:
  path: critique
  sources:
    questions: {kind: questions, path: questions.jsonl}
train: {bf16: false, max_steps: 2, per_device_train_batch_size: 4}
stages:
  read:
    data: {kind: questions, path: questions.jsonl, passages: 1}
    objective: {kind: answer}
  find:
    data: {kind: questions, path: questions.jsonl}
    objective: {kind: lsr, k: 3, candidates: dense, target: mean_prob, tau: 0.1}
evaluate: {questions: heldout.jsonl, modes: [retrieved], k: [1]}
sweep: {threshold: [0.2, 0.5], k: [1, 2]}
"""


def commands() -> list[str]:
    """The lines under "What it looks like"."""
    (block,) = re.findall(r"## What it looks like\n\n```\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return block.splitlines()


@dataclass(frozen=True)
class Shell:
    """bash in a folder. `raglan` on its path comes out of a process that has imported everything already."""

    folder: Path
    bin: Path

    def run(self, line: str) -> Done:
        return subprocess.run(
            ["bash", "-c", line], cwd=self.folder, env={"PATH": f"{self.bin}:/usr/bin:/bin"}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=240,
        )  # fmt: skip

    def run_well(self, line: str) -> Done:
        done = self.run(line)
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        return done


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    place = Path(tempfile.mkdtemp(prefix="raglan-"))  # pytest's own folders are too deep for the name of a socket
    command = place / "raglan"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{WARM}" call "{place}/door" "$@"\n')
    command.chmod(0o755)
    serving = subprocess.Popen([sys.executable, str(WARM), "serve", str(place / "door")], stdout=subprocess.PIPE, text=True)
    try:
        shell = Shell(tmp_path_factory.mktemp("readme"), place)
        parts(shell.folder)
        assert serving.stdout is not None
        assert serving.stdout.readline() == "open\n"
        before(shell)
        yield shell
    finally:
        serving.kill()
        serving.communicate()
        shutil.rmtree(place)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def mills(numbers: range) -> list[dict[str, Any]]:
    passages = [passage for number in numbers for passage in english(number)]
    return [{"id": passage.id, "title": passage.title, "text": passage.text} for passage in passages]


def fires(numbers: range) -> list[dict[str, Any]]:
    query = "Which year saw a fire at Harbour Mill {}?"
    return [{"query": query.format(n), "answers": [str(1850 + n)], "relevant": [f"en{n}#1"]} for n in numbers]


def parts(folder: Path) -> None:
    """The files that the commands name: a recipe on tiny models, questions, an export, a checkpoint, the Chinese example."""
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    write(folder / "questions.jsonl", fires(range(10)))
    write(folder / "heldout.jsonl", fires(range(10, 13)))
    encoder = tiny.sentence_encoder(folder / "sentences").rename(folder / "encoder")
    tiny.sure_self_rag(folder / "self-rag")
    shutil.copy(Path(__file__).parent / "exports" / "argilla.json", folder / "export.json")
    checkpoint(folder / "rag-token-nq", over="token")
    example = folder / "examples" / "qingshi"
    shutil.copytree(ROOT / "examples" / "qingshi", example)
    tree = yaml.safe_load((example / "qingshi.yaml").read_text(encoding="utf-8"))
    model, words = tiny.reader(folder=folder / "bert")
    model.save_pretrained(folder / "reader")
    words.save_pretrained(folder / "reader")
    tree["generator"] |= {"model": str(folder / "reader"), "dtype": "float32"}
    tree["knowledge"]["encoder"] = {"model": str(encoder), "dtype": "float32"}
    tree["stages"]["read"]["train"] |= {"num_train_epochs": 1, "bf16": False}
    (example / "qingshi.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")


def before(shell: Shell) -> None:
    """What a line takes as done: an earlier version of the knowledge base to go back to; the Chinese example, trained."""
    write(shell.folder / "documents.jsonl", mills(range(14)))
    shell.run_well("raglan build recipe.yaml")
    write(shell.folder / "documents.jsonl", mills(range(16)))
    for act in ("build", "train"):
        shell.run_well(f"raglan {act} examples/qingshi/qingshi.yaml")


@pytest.fixture(scope="module")
def done(shell: Shell) -> dict[str, Done]:
    """Every line's end. `stage` is the folder of the first stage that was trained."""
    pytest.importorskip("plotly")
    found: dict[str, Done] = {}
    for line in commands():
        found[line] = shell.run(line)
        for folder in shell.folder.glob("runs/small/stages/read-*"):
            if not (shell.folder / "stage").exists():
                (shell.folder / "stage").symlink_to(folder)
    return found


@pytest.mark.parametrize("line", commands(), ids=lambda line: line.partition("#")[0].strip())
def test_a_line_runs_as_it_is_printed(line: str, done: dict[str, Done]) -> None:
    told = done[line]
    assert told.returncode == 0, (told.stdout, told.stderr)
    assert "is not used" not in told.stderr  # what one line trained, the next ones use


def test_no_other_line_is_printed_to_be_typed() -> None:
    assert [line for line, whole in printed(README, "raglan") if whole] == commands()


def test_they_leave_what_they_promise(done: dict[str, Done], shell: Shell) -> None:
    def said(start: str) -> str:
        (line,) = [line for line in done if line.startswith(start)]
        return done[line].stdout

    def rows(name: str) -> int:
        return len((shell.folder / name).read_text(encoding="utf-8").splitlines())

    (head,) = re.findall(r"figure .*", said("raglan evaluate recipe.yaml  "))
    assert head.split() == ["figure", "untuned", "find", "difference"]
    assert said("raglan answer examples/").startswith("Q: 柳湾书院是谁设计的？\nA: ")
    assert re.findall(r"(?m)^([* ]) \w+  (\d+) documents", said("raglan swap")) == [("*", "28"), (" ", "32")]
    assert "    retrieve: " in said('raglan answer recipe.yaml "question" --trace')
    assert said("raglan synthesize recipe.yaml").startswith("12 requested, 12 kept")
    assert rows("data/examples.jsonl") == 12
    assert rows("f.jsonl") == rows("f.meta.jsonl") == rows("stage/data/points.jsonl")
    assert sum(rows(f"splits/{name}.jsonl") for name in ("train", "dev", "test")) == rows("questions.jsonl")
    assert json.loads((shell.folder / "recipe.schema.json").read_text())["$defs"]
    kept = ("report.html", "runs/small/sweep.json", "feedback.sqlite", "critique/annotation/train.jsonl", "parts/recipe.yaml")
    assert all((shell.folder / name).stat().st_size for name in kept)


def test_a_line_that_does_not_run_is_found(shell: Shell) -> None:
    codes = {line: shell.run(line).returncode for line in (
        "raglan swap kb --forth", "raglan build none.yaml", "raglan schema && raglan shout", "raglan-shout",
    )}  # fmt: skip
    assert list(codes.values()) == [2, 2, 2, 127], codes
    assert shell.run("raglan --version").stdout.startswith("raglan ")
