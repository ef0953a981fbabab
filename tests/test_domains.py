"""In-domain is what manifests say: names in any spelling, made by real runs, and followed to where a generator came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from raglan.cli import app
from raglan.domains import Domain, data_sets, domain, is_of, source_name
from raglan.evaluate import evaluate_recipe
from raglan.recipe import load_recipe
from raglan.report import _domain
from raglan.train import train
from tiny import small_recipe

runner = CliRunner()


@pytest.mark.parametrize(
    ("name", "dataset", "yes"),
    [("nq-train", "nq", True), ("NQ", "nq", True), ("train", "nq", False), ("natural_questions", "nq", True),
     ("nq.train", "natural-questions", True), ("hotpotqa", "hotpot_qa", True), ("hotpot_qa-train", "HotpotQA", True),
     ("cmrc2018.train", "cmrc_2018", True), ("cmrc_2018", "cmrc2018", True), ("cmrc", "CMRC 2018", True),
     ("trivia", "trivia_qa", True), ("kilt-nq", "nq", True), ("nq", "kilt_nq", True), ("squad", "squad_v2", True),
     ("nq_open", "nq", True), ("popqa", "nq", False), ("med_mcqa", "med_qa", False), ("2wikimultihopqa", "2wiki", True),
     ("snq", "nq", False), ("train", "Train", True), ("hotpot/qa", "hotpotqa", True), ("webq", "popqa", False)],
)  # fmt: skip
def test_names_are_compared_by_what_they_say(name: str, dataset: str, yes: bool) -> None:
    assert is_of(name, dataset) is yes


@pytest.mark.parametrize(
    ("path", "name"),
    [("x/nq-train.jsonl.gz", "nq-train"), ("nq/train.jsonl", "nq-train"), ("nq/questions/train.jsonl", "nq-questions-train"),
     ("nq/popqa.jsonl", "popqa"), ("hotpot.train.jsonl", "hotpot.train"), ("train.jsonl", "train")],
)  # fmt: skip
def test_a_file_that_is_only_called_train_is_named_by_its_folder(path: str, name: str) -> None:
    assert source_name(Path(path)) == name


def test_manifests_name_sets_by_sources_and_files(tmp_path: Path) -> None:
    assert data_sets({"path": "x/NQ-train.jsonl.gz"}) == {"NQ-train"}
    mixed = {"sources": {"trivia": {"path": "x/hotpot.train.jsonl"}, "text": {"path": None}}}
    assert data_sets(mixed) == {"trivia", "text", "hotpot.train"}
    (tmp_path / "manifest.json").write_text('{"sources": {"DuReader": 3, "train": "data/nq/train.jsonl"}}')
    assert data_sets({"path": str(tmp_path / "mix.jsonl")}) == {"mix", "DuReader", "train", "nq-train"}
    shares = {"sources": {"corpus_halves": 0.9, "tasks": 0.1}, "path": "x/nq/train.jsonl"}
    assert "nq-train" in data_sets(shares)
    assert data_sets({"path": "a.jsonl", "replay": "nq/dev.jsonl"}) == {"a", "nq-dev"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A knowledge base, and questions of NQ in a folder of that name, from which a dataset was really made."""
    path = tmp_path_factory.mktemp("domains")
    small_recipe(path)
    (path / "nq").mkdir()
    rows = [json.loads(line) for line in (path / "train.jsonl").read_text().splitlines()]
    (path / "nq" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    synthesis = {
        "path": "made", "questions": "nq/train.jsonl", "n": 6, "decontaminate": "none", "split": {},
        "passages": {"k": {2: 1}, "gold_absent": 0}, "weights": {
            "task": {"factoid": 1}, "relation": {"R1": 1}, "answer_format": {"span": 1}, "query_format": {"wh_question": 1},
        },
    }  # fmt: skip
    recipe(path, "maker", synthesis=synthesis)
    assert runner.invoke(app, ["build", str(path / "maker.yaml")]).exit_code == 0
    done = runner.invoke(app, ["synthesize", str(path / "maker.yaml")])
    assert done.exit_code == 0, (done.output, done.exception)
    return path


def recipe(folder: Path, name: str, generator: dict[str, Any] | None = None, **more: Any) -> Path:
    """A recipe of that name that asks a question of NQ; by default of the embedded reader's kind, of known origin."""
    settings = yaml.safe_load((folder / "small.yaml").read_text())
    del settings["stages"]
    settings |= {"name": name, "evaluate": {"questions": "dev.jsonl", "limit": 2, "modes": ["retrieved"], "dataset": "nq"}}
    if generator is not None:
        settings["generator"] = generator
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings | more))
    return path


def stage(**data: Any) -> dict[str, Any]:
    return {"stages": {"read": {"data": data, "objective": {"kind": "answer"}, "train": {"max_steps": 1}}}}


def verdict(path: Path, *changes: str, system: str | None = None) -> str:
    found = domain(load_recipe(path, changes), system)
    assert found is not None
    return found.verdict


def test_a_real_synthetic_dataset_of_nq_is_in_domain(folder: Path) -> None:
    assert json.loads((folder / "made" / "manifest.json").read_text())["sources"] == {
        "nq-train": str(folder / "nq" / "train.jsonl")
    }
    path = recipe(folder, "shown", **stage(kind="shown", path="made/examples.jsonl", prompt="recipe"))
    assert verdict(path) == "unknown", "the reader is a folder that says nothing of itself, and nothing was trained yet"
    train(load_recipe(path))
    assert verdict(path) == "in-domain"
    assert verdict(path, "evaluate.dataset=natural_questions") == "in-domain"
    assert verdict(path, "evaluate.dataset=popqa") == "unknown"
    assert verdict(path, system="untuned") == "unknown"
    told = json.loads(runner.invoke(app, ["evaluate", str(path), "--json"]).stdout)
    assert told["domain"] == {"dataset": "nq", "verdict": "in-domain", "silent": []}
    measured = {one.system: one.folder for one in evaluate_recipe(load_recipe(path))}
    manifests = {system: json.loads((own / "manifest.json").read_text()) for system, own in measured.items()}
    assert manifests["untuned"]["domain"]["verdict"] == "unknown"
    assert manifests["read"]["domain"] == told["domain"]
    stamp = {one.system: one.folder for one in evaluate_recipe(load_recipe(path, ["evaluate.dataset=popqa"]))}
    other = json.loads((stamp["read"] / "manifest.json").read_text())
    assert (other["domain"]["dataset"], other["domain"]["verdict"]) == ("popqa", "unknown")
    assert other["seconds"] == manifests["read"]["seconds"], "a name does not measure anew"
    assert "nq: in-domain" in runner.invoke(app, ["evaluate", str(path)]).output
    assert _domain(load_recipe(path)) == {"nq": "in-domain"}


def test_a_generator_is_followed_to_what_it_was_trained_on(folder: Path) -> None:
    first = recipe(folder, "first", **stage(kind="questions", path="nq/train.jsonl", passages=2))
    tuned = train(load_recipe(first)).generator
    assert tuned is not None
    second = recipe(folder, "second", {"model": tuned, "dtype": "float32"})
    assert verdict(second) == "in-domain"
    assert verdict(second, "evaluate.dataset=popqa") == "unknown", "what the first recipe began with does not tell"
    third = recipe(
        folder, "third", {"model": tuned, "dtype": "float32"}, **stage(kind="questions", path="train.jsonl", passages=2)
    )
    again = train(load_recipe(third)).generator
    fourth = recipe(folder, "fourth", {"model": str(again), "dtype": "float32"})
    assert verdict(fourth) == "in-domain", "two recipes back"


def test_who_does_not_tell_is_never_out_of_domain(folder: Path) -> None:
    embedded = recipe(folder, "embedded", {"model": "embedded"})
    assert verdict(embedded) == "out of domain"
    assert str(domain(load_recipe(embedded))) == "out of domain"
    hub = recipe(folder, "hub", {"model": "google/flan-t5-base"})
    assert domain(load_recipe(hub)) == Domain("nq", "unknown", ("google/flan-t5-base",))
    assert str(domain(load_recipe(hub))) == "unknown (what google/flan-t5-base learned from is not told)"
    adapter = recipe(folder, "adapter", {"model": "embedded", "adapter": {"path": "someone/adapters", "subfolder": "RT-KS"}})
    assert domain(load_recipe(adapter)) == Domain("nq", "unknown", ("someone/adapters/RT-KS",))
    assert domain(load_recipe(embedded, ["evaluate.dataset=null"])) is None


def test_a_dataset_called_train_is_still_one(folder: Path) -> None:
    path = recipe(folder, "plain", **stage(kind="questions", path="train.jsonl", passages=2))
    train(load_recipe(path))
    assert verdict(path, "evaluate.dataset=Train") == "in-domain"
