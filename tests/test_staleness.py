"""A passage encoder that learns: what is searched may be old, what is learned from is not; refreshed, reranked, resumed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from raglan.cli import app
from raglan.errors import CheckpointError, IndexMismatch, RecipeError
from raglan.knowledge import KnowledgeBase, build_knowledge, passage_text, reencoded
from raglan.objective.staleness import Refresher
from raglan.rag import RAG
from raglan.recipe import Recipe, StalenessSettings, load_recipe
from raglan.retriever import Retriever
from raglan.stages import finished_parts
from raglan.train import train
from raglan.trainer import stage_trainer
from test_marginal import ROWS, batch, objective
from tiny import small_recipe

ALL = ("query_encoder", "passage_encoder", "generator")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stale")
    build_knowledge(load_recipe(small_recipe(path)).knowledge)
    return path


@pytest.fixture
def system(folder: Path) -> RAG:
    return RAG.open(load_recipe(folder / "small.yaml", ["knowledge.encoder.dtype=float32", "retriever.index=dense"]))


def nudge(system: RAG) -> None:
    """Move the passage tower, as a large step of training would."""
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in system.retriever.encoder.passage_tower.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=chance)


def fresh_vectors(system: RAG) -> np.ndarray:
    return system.retriever.encoder.embed_passages([passage_text(p) for p in system.retriever.base.corpus])


@pytest.mark.parametrize("learn", [ALL, ("passage_encoder",), ("query_encoder", "prior"), ("prior",), ("prior", "generator")])
@pytest.mark.parametrize("prior", ["dense", "hybrid"])
def test_exactly_what_learns_has_gradients(learn: tuple[str, ...], prior: str, folder: Path) -> None:
    system = RAG.open(load_recipe(folder / "small.yaml", [f"retriever.prior.kind={prior}"]))
    more: dict[str, Any] = {"staleness": {"kind": "accept"}} if "passage_encoder" in learn else {}
    aim = objective(system, learn=learn, **more)
    aim.loss(batch(aim))[0].backward()
    assert set(aim.parameters()) == set(learn)
    wanted = {id(p) for part in aim.parameters().values() for p in part}
    towers = [system.retriever.encoder.passage_tower, aim.module]
    for parameter in {p for tower in towers for p in tower.parameters()}:
        has = parameter.grad is not None and bool((parameter.grad != 0).any())
        assert has == (id(parameter) in wanted)


def test_scores_come_from_fresh_vectors_whatever_the_index_holds(system: RAG) -> None:
    aim = objective(system, learn=ALL, staleness={"kind": "accept"})
    aim.module.eval()
    stored = system.retriever.base.vectors.vectors(np.arange(len(system.retriever.base.corpus)))
    nudge(system)
    doc_scores, rows = aim._picked(batch(aim), torch.device("cpu"))
    queries = system.retriever.encoder.embed_queries([query for query, _ in ROWS])
    fresh = fresh_vectors(system)
    assert doc_scores.detach().numpy() == pytest.approx(np.einsum("bd,bkd->bk", queries, fresh[rows]), abs=1e-4)
    assert np.abs(doc_scores.detach().numpy() - np.einsum("bd,bkd->bk", queries, stored[rows])).max() > 0.01


def test_reranking_keeps_the_best_of_a_deeper_search(system: RAG) -> None:
    plain = objective(system)._picked(batch(objective(system)), torch.device("cpu"))[1]
    size = len(system.retriever.base.corpus)
    aim = objective(system, learn=ALL, staleness={"kind": "rerank", "pool": size})
    aim.module.eval()
    assert (aim._picked(batch(aim), torch.device("cpu"))[1] == plain).all()  # nothing has moved yet
    nudge(system)
    _, rows = aim._picked(batch(aim), torch.device("cpu"))
    queries = system.retriever.encoder.embed_queries([query for query, _ in ROWS])
    assert (rows == np.argsort(-(queries @ fresh_vectors(system).T), axis=1)[:, : aim.k]).all()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_refresh_is_taken_up_at_a_step_and_holds_fresh_vectors(mode: str, system: RAG, tmp_path: Path) -> None:
    objective(system, learn=ALL, staleness={"kind": "refresh"})
    old = system.retriever.base
    refresher = Refresher(system.retriever, StalenessSettings(kind="refresh", every=3, mode=mode), tmp_path / "kb")
    nudge(system)
    assert refresher.at(2) is None
    version = refresher.at(3)
    expected = fresh_vectors(system)
    if mode == "async":
        nudge(system)  # training goes on; the version is that of the snapshot
        refresher._job.result()
        assert version is None
        version = refresher.at(4)
    refresher.take(version)
    vectors = system.retriever.base.vectors.vectors(np.arange(len(old.corpus)))
    assert vectors == pytest.approx(expected, abs=1e-5)
    assert refresher.born == 3
    assert refresher.recall < 1
    assert [p.id for p in system.retriever.base.corpus] == [p.id for p in old.corpus]
    queries = system.retriever.encoder.embed_queries([query for query, _ in ROWS])
    found = system.retriever.search([query for query, _ in ROWS], 3)[1]
    assert (found == np.argsort(-(queries @ expected.T), axis=1)[:, :3]).all()


def test_a_refresh_that_fails_is_a_warning_and_training_goes_on(
    system: RAG, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "kb").write_text("a file where a folder must be")
    refresher = Refresher(system.retriever, StalenessSettings(kind="refresh", every=1, mode="sync"), tmp_path / "kb")
    before = system.retriever.base
    with caplog.at_level(logging.WARNING):
        assert refresher.at(1) is None
    assert "could not be made" in caplog.text
    assert system.retriever.base is before


def test_a_half_made_refresh_does_not_count_and_a_lost_one_is_refused(system: RAG, tmp_path: Path) -> None:
    nudge(system)
    encoder = system.retriever.encoder.snapshot()
    made = reencoded(system.retriever.base, encoder, tmp_path / "kb")
    (made.folder / "manifest.json").unlink()  # as if killed before the last act
    refresher = Refresher(system.retriever, StalenessSettings(kind="refresh"), tmp_path / "kb")
    with pytest.raises(CheckpointError):
        refresher.restore({"version": made.version, "born": 3})
    again = reencoded(system.retriever.base, encoder, tmp_path / "kb")
    refresher.restore({"version": again.version, "born": 3})
    assert system.retriever.base.version == made.version


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"learn": ["passage_encoder"]}, "staleness"),
        ({"staleness": {"kind": "accept"}}, "staleness"),
        ({"learn": ["passage_encoder"], "staleness": {"kind": "rerank", "pool": 3}}, "reranking needs more than k"),
        ({"learn": ["query_encoder", "prior"], "freeze_retriever_steps": 2}, "freezes all that learns"),
    ],
)
def test_what_does_not_belong_together_is_refused(settings: dict[str, Any], told: str, folder: Path) -> None:
    recipe = yaml.safe_load((folder / "small.yaml").read_text())
    recipe["stages"] = {"joint": joint(recipe, **settings)}
    (folder / "wrong.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match=told):
        load_recipe(folder / "wrong.yaml")


def joint(recipe: dict[str, Any], **objective_settings: Any) -> dict[str, Any]:
    return {
        "data": {"kind": "questions", "path": recipe["stages"]["read"]["data"]["path"]},
        "objective": {"kind": "marginal", "over": "sequence", "k": 3, **objective_settings},
        "train": {"learning_rate": 2e-3, "max_steps": 8, "per_device_train_batch_size": 8, "logging_steps": 1, "save_steps": 4},
    }


def test_a_broken_off_run_goes_on_with_the_index_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small_recipe(tmp_path)
    recipe = yaml.safe_load(path.read_text())
    refresh = {"kind": "refresh", "every": 3, "mode": "sync"}
    recipe["stages"] = {"joint": joint(recipe, learn=list(ALL), staleness=refresh)}
    path.write_text(yaml.safe_dump(recipe))
    build_knowledge(load_recipe(path).knowledge)
    straight = load_recipe(path, ["name=straight"])
    train(straight)
    broken = load_recipe(path, ["name=broken"])
    at = Refresher.at

    def breaks(self: Refresher, step: int) -> str | None:
        if step == 6:
            raise OSError("the power went")
        return at(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(Refresher, "at", breaks)
        with pytest.raises(OSError, match="power"):
            train(broken)
    work = next((broken.run / "stages").iterdir()) / "work"
    kept = json.loads((work / "checkpoint-4" / "index.json").read_text())
    assert kept["born"] == 3
    assert KnowledgeBase.versions(work / "knowledge") == [kept["version"]]
    train(broken)
    for part in ("generator", "query_encoder", "passage_encoder"):
        one, other = (load_file(weights(r, part)) for r in (straight, broken))
        for name, value in one.items():
            assert torch.allclose(value, other[name], atol=1e-4), name


def weights(recipe: Recipe, part: str) -> Path:
    return Path(str(getattr(finished_parts(recipe)[-1][1], part))) / "model.safetensors"


def test_trained_through_the_command_line_with_refresh_and_used(tmp_path: Path) -> None:
    path = small_recipe(tmp_path)
    recipe = yaml.safe_load(path.read_text())
    learn = [*ALL, "prior"]
    staleness = {"kind": "refresh", "every": 3, "mode": "sync"}
    recipe["stages"] = {"joint": joint(recipe, learn=learn, staleness=staleness, rates={"prior": 0.05})}
    path.write_text(yaml.safe_dump(recipe))
    runner = CliRunner()
    assert runner.invoke(app, ["build", str(path)]).exit_code == 0
    done = runner.invoke(app, ["train", str(path)])
    assert done.exit_code == 0, done.output
    loaded = load_recipe(path)
    stage = next((loaded.run / "stages").iterdir())
    curve = [row for row in json.loads((stage / "log.json").read_text()) if "index_age" in row]
    assert [row["index_age"] for row in curve] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert {"temperature", "index_recall"} <= set(curve[0])
    name, parts = finished_parts(loaded)[-1]
    assert name == "joint"
    system = parts.open(loaded)
    base, start = system.retriever.base, KnowledgeBase.open(loaded.knowledge.path)
    assert base.version != start.version
    texts = [passage_text(p) for p in base.corpus]
    assert base.vectors.vectors(np.arange(len(texts))) == pytest.approx(
        system.retriever.encoder.embed_passages(texts), abs=2e-2
    )
    assert system.retriever.temperature == pytest.approx(curve[-1]["temperature"], rel=0.2)
    assert system.retriever.temperature != load_recipe(path).retriever.prior.temperature
    with pytest.raises(IndexMismatch):
        system.swap(loaded.knowledge.path)  # vectors of the passage encoder as it was before
    assert runner.invoke(app, ["answer", str(path), ROWS[0][0]]).exit_code == 0
    found = runner.invoke(
        app, ["retrieve", str(stage / "result" / "knowledge"), ROWS[0][0], "--index", "dense", "-k", "3", "--json"]
    )
    assert found.exit_code == 0, found.output
    dense = Retriever(base, system.retriever.encoder, index="dense")
    wanted = [hit.passage.id for hit in dense.retrieve([ROWS[0][0]], 3)[0]]
    assert [hit["id"] for hit in json.loads(found.stdout)] == wanted


def test_documents_that_changed_are_not_answered_from_the_old_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = small_recipe(tmp_path)
    recipe = yaml.safe_load(path.read_text())
    recipe["stages"] = {"joint": joint(recipe, learn=list(ALL), staleness={"kind": "accept"})}
    recipe["stages"]["joint"]["train"]["max_steps"] = 1
    path.write_text(yaml.safe_dump(recipe))
    build_knowledge(load_recipe(path).knowledge)
    train(load_recipe(path))
    assert [name for name, _ in finished_parts(load_recipe(path))] == ["untuned", "joint"]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(corpus.read_text() + json.dumps({"id": "new", "title": "", "text": "a new tower"}) + "\n")
    build_knowledge(load_recipe(path).knowledge)
    with caplog.at_level(logging.WARNING):
        assert [name for name, _ in finished_parts(load_recipe(path))] == ["untuned"]
    assert "it is not used" in caplog.text


def test_temperature_and_weight_do_not_decay(folder: Path) -> None:
    recipe = load_recipe(folder / "small.yaml", ["retriever.prior.kind=hybrid"])
    system = RAG.open(recipe)
    aim = objective(system, learn=("generator", "prior"))
    stage = load_recipe(folder / "small.yaml").trainings()["read"].model_copy(update={"train": {"weight_decay": 0.5}})
    trainer = stage_trainer(recipe, stage.model_copy(update={"objective": aim.settings}), folder / "decay", aim, [0], [])
    groups = trainer.create_optimizer().param_groups
    weights = {id(p) for p in aim.module.prior.parameters()}
    assert [group["weight_decay"] for group in groups if {id(p) for p in group["params"]} & weights] == [0.0]
    assert any(group["weight_decay"] == 0.5 for group in groups)
