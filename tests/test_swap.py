"""Swapping the knowledge base: another answer without training, back again exactly, and never a mixture."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tiny
from raglan.cli import app
from raglan.errors import CheckpointError, IndexMismatch
from raglan.index import HybridIndex
from raglan.knowledge import KnowledgeBase, build_knowledge
from raglan.rag import RAG
from raglan.recipe import load_recipe
from raglan.stages import finished_parts, learning_curves
from raglan.train import train
from tiny import small_recipe


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, str, str]:
    """A recipe and two versions of its base: the same towers with other years."""
    path = small_recipe(tmp_path)
    first = build_knowledge(load_recipe(path).knowledge).version
    corpus = tmp_path / "corpus.jsonl"
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    for row in rows:
        row["text"] = row["text"].replace(" in 17", " in 18")
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, first, build_knowledge(load_recipe(path).knowledge).version


def test_swapping_changes_the_answer_and_swapping_back_restores_it_exactly(two: tuple[Path, str, str]) -> None:
    path, first, second = two
    system = RAG.open(load_recipe(path))
    weights = [parameter.data_ptr() for parameter in system.generator.model.parameters()]
    queries = ["what year was the tower built", "who built the tower"]
    after = system.answer(queries)
    assert {answer.knowledge for answer in after} == {second}
    assert system.swap(version=first) == first
    before = system.answer(queries)
    assert {answer.knowledge for answer in before} == {first}
    assert all(" in 17" in hit.passage.text for answer in before for hit in answer.hits)
    assert system.swap() == second
    assert system.answer(queries) == after
    assert weights == [parameter.data_ptr() for parameter in system.generator.model.parameters()]


def test_a_swap_goes_on_searching_as_the_recipe_says(two: tuple[Path, str, str]) -> None:
    path, first, _ = two
    plain = "dense: {kind: dense}, bm25: {kind: bm25}"
    system = RAG.open(load_recipe(path, [f"knowledge.indexes={{{plain}, hybrid: {{kind: hybrid, depth: 3}}}}"]))
    for version in (first, None):
        system.swap(version=version)
        index = system.retriever.base.index("hybrid")
        assert isinstance(index, HybridIndex)
        assert index.settings.depth == 3


def test_a_base_of_another_encoder_is_refused_and_nothing_changes(two: tuple[Path, str, str], tmp_path: Path) -> None:
    path, _, second = two
    system = RAG.open(load_recipe(path))
    other = tiny.sentence_encoder(tmp_path / "other", seed=9)
    foreign = build_knowledge(
        load_recipe(path, [f"knowledge.path={tmp_path / 'foreign'}", f"knowledge.encoder.model={other}"]).knowledge
    )
    with pytest.raises(IndexMismatch, match="was built by encoder"):
        system.swap(foreign.folder.parent.parent)
    with pytest.raises(CheckpointError):
        system.swap(version="nothing")
    assert system.answer(["who built the tower"])[0].knowledge == second


def test_eight_threads_lose_no_question_and_mix_no_versions(two: tuple[Path, str, str]) -> None:
    path, first, second = two
    system = RAG.open(load_recipe(path, ["decode.kind=rag_token", "decode.max_new_tokens=2"]))
    answers, faults, answered = [], [], threading.Semaphore(0)
    asking = threading.Event()
    asking.set()

    def ask() -> None:
        while asking.is_set():
            try:
                answers.extend(system.answer(["what year was the tower built"]))
            except Exception as fault:  # noqa: BLE001 - any fault at all is what is looked for
                faults.append(fault)
            answered.release()

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(30):
            system.swap(version=(first, second)[turn % 2])
            for _ in range(3):
                assert answered.acquire(timeout=60), "nobody was answered for a minute"
    finally:
        asking.clear()
        for thread in threads:
            thread.join(timeout=60)
    assert not faults
    assert {answer.knowledge for answer in answers} == {first, second}
    for answer in answers:
        century = " in 17" if answer.knowledge == first else " in 18"
        assert all(century in hit.passage.text for hit in answer.hits)


def test_the_command_line_lists_swaps_and_goes_back(two: tuple[Path, str, str], tmp_path: Path) -> None:
    path, first, second = two
    runner = CliRunner()

    def marked(*words: str) -> str:
        done = runner.invoke(app, ["swap", *words])
        assert done.exit_code == 0, done.output
        return next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("*"))

    assert marked(str(path)) == second
    assert marked(str(path), "--back") == first
    assert KnowledgeBase.open(tmp_path / "kb").version == first
    assert marked(str(tmp_path / "kb"), second) == second
    assert isinstance(runner.invoke(app, ["swap", str(path), "nothing"]).exception, CheckpointError)


def test_tuned_parts_stay_in_use_when_what_they_know_is_swapped(two: tuple[Path, str, str]) -> None:
    path, first, _ = two
    path.write_text(
        path.read_text().replace("num_train_epochs: 6", "num_train_epochs: 1").replace("num_train_epochs: 3", "max_steps: 2")
    )

    train(load_recipe(path))
    tuned = finished_parts(load_recipe(path))
    assert [name for name, _ in tuned] == ["untuned", "read", "find"]
    KnowledgeBase.publish(load_recipe(path).knowledge.path, first)
    assert finished_parts(load_recipe(path)) == tuned
    curves = learning_curves(load_recipe(path))  # the report shows them as before
    assert list(curves) == ["read", "find"]
    assert all(any("loss" in row for row in curve) for curve in curves.values())
