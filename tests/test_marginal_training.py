"""The `marginal` objective inside the real trainer: who gets gradients, what accumulation may not change, what a resumed run
must remember, when dropout begins, and refreshing in the background.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback

from raglan.artifact import directory_fingerprint
from raglan.errors import CheckpointError
from raglan.generator import HFGenerator
from raglan.knowledge import KnowledgeBase, build_knowledge, reencoded
from raglan.objective import AnswerObjective, LsrObjective, MarginalRow, Objective
from raglan.objective.collapse import CollapseMonitor
from raglan.objective.lsr import LsrRow
from raglan.objective.staleness import Refresher
from raglan.rag import RAG
from raglan.recipe import LsrObjective as LsrSettings
from raglan.recipe import StalenessSettings, load_recipe
from raglan.train import train
from raglan.trainer import Refreshing, StageTrainer, last_whole, restore, stage_trainer
from test_generator import PASSAGES, made
from test_marginal import ROWS, batch, objective
from test_staleness import ALL, joint, weights
from tiny import small_recipe

ACCEPT = {"staleness": {"kind": "accept"}}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}
EIGHT = [
    ("who built the tower?", "odo"), ("when was it built?", "1790"), ("who was the miller?", "a miller by the water"),
    ("what?", "a"), ("where was the lighthouse?", "by the sea"), ("when?", "1"), ("by whom?", "odo the miller"),
    ("who?", "a b c"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained")
    build_knowledge(load_recipe(small_recipe(path)).knowledge)
    return path


def opened(folder: Path, *more: str) -> RAG:
    return RAG.open(load_recipe(folder / "small.yaml", ["retriever.index=dense", *more]))


def questions(rows: Sequence[tuple[str, str]] = EIGHT) -> list[MarginalRow]:
    return [MarginalRow(query, answer) for query, answer in rows]


def trainer_of(aim: Objective, rows: Sequence[Any], folder: Path, work: Path, **given: Any) -> StageTrainer:
    """The stage's own trainer: plain gradient descent, whose steps are as long as the gradients are."""
    recipe = load_recipe(folder / "small.yaml")
    stage = recipe.trainings()["read"]
    settings = {
        "optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0,
        "weight_decay": 0.0, "per_device_train_batch_size": 8, "train_sampling_strategy": "sequential", "logging_steps": 1,
        "bf16": False, "save_strategy": "no", **given,
    }  # fmt: skip
    objective_settings = getattr(aim, "settings", stage.objective)
    return stage_trainer(
        recipe, stage.model_copy(update={"train": settings, "objective": objective_settings}), work, aim, rows, []
    )


def learned(aim: Objective) -> list[Tensor]:
    return [p.detach().clone() for part in aim.parameters().values() for p in part]


def equal(one: list[Tensor], other: list[Tensor], *, start: list[Tensor]) -> None:
    """The same way from the same start, which is to be a way at all."""
    moved = [a - b for a, b in zip(one, start, strict=True)]
    differ = [a - b for a, b in zip(one, other, strict=True)]
    assert norm(moved) > 1e-4
    assert norm(differ) < 2e-3 * norm(moved)


def norm(values: list[Tensor]) -> float:
    return float(torch.cat([value.flatten() for value in values]).norm())


# Who learns.


@pytest.mark.parametrize("lora", [None, LORA], ids=["weights", "adapters"])
@pytest.mark.parametrize(
    "learn", [("query_encoder", "generator"), ("generator",), ("query_encoder",), ALL], ids=lambda learn: "+".join(learn)
)
@pytest.mark.parametrize("kind", ["bart", "llama"])
def test_one_backward_pass_reaches_what_learns_and_nothing_else(
    kind: str, learn: tuple[str, ...], lora: dict[str, Any] | None, folder: Path, tmp_path: Path
) -> None:
    system, generator = opened(folder), made(kind, tmp_path, lora=lora)
    with torch.no_grad():
        for name, parameter in generator.model.named_parameters():
            if "lora_B" in name:  # 0 at first, so that nothing would reach lora_A
                parameter.normal_(std=0.1)
    aim = objective(system, generator=generator, learn=learn, **(ACCEPT if learn == ALL else {}))
    trainer_of(aim, questions(), folder, tmp_path / "work")
    assert set(aim.parameters()) == set(learn)
    if lora and "generator" in learn:
        names = {id(p): name for name, p in generator.model.named_parameters()}
        assert all("lora_" in names[id(p)] for p in aim.parameters()["generator"])
    aim.module.train()
    aim.loss(batch(aim))[0].backward()
    wanted = {id(p) for part in aim.parameters().values() for p in part}
    passage_tower: nn.Module = system.retriever.encoder.passage_tower
    every = {id(p): (name, p) for part in (passage_tower, aim.module) for name, p in part.named_parameters()}
    for key, (name, parameter) in every.items():
        reached = parameter.grad is not None and bool((parameter.grad != 0).any())
        assert parameter.requires_grad == (key in wanted), name
        assert reached == (key in wanted) or name.endswith("k_proj.bias"), name  # softmax cancels what all keys share


@pytest.mark.parametrize("learn", [("query_encoder", "generator"), ("generator",), ALL], ids=lambda learn: "+".join(learn))
def test_the_search_carries_no_gradient_and_the_scores_do(learn: tuple[str, ...], folder: Path) -> None:
    aim = objective(opened(folder), learn=learn, **(ACCEPT if learn == ALL else {}))
    doc_scores, rows = aim._picked(batch(aim), torch.device("cpu"))
    assert isinstance(rows, np.ndarray)
    assert doc_scores.requires_grad == ("query_encoder" in learn)
    vectors = aim._passages(rows, torch.device("cpu"))
    assert vectors.requires_grad == ("passage_encoder" in learn)


def test_a_tower_that_is_copied_leaves_the_index_as_it_was(tmp_path: Path) -> None:
    """One tower for both sides: its query side learns through `train`, and not a byte of passage tower or index moves."""
    path = small_recipe(tmp_path)
    recipe = yaml.safe_load(path.read_text())
    recipe["stages"] = {"joint": joint(recipe)}
    recipe["stages"]["joint"]["train"] |= {"max_steps": 3, "save_strategy": "no"}
    path.write_text(yaml.safe_dump(recipe))
    loaded = load_recipe(path)
    build_knowledge(loaded.knowledge)
    index, tower = tmp_path / "kb", tmp_path / "encoder" / "encoder"
    before = [directory_fingerprint(folder) for folder in (index, tower)]
    started = RAG.open(loaded).retriever
    vectors = started.base.vectors.vectors(np.arange(30))
    first = {name: value.clone() for name, value in started.encoder.passage_tower.state_dict().items()}
    parts = train(loaded)
    assert [directory_fingerprint(folder) for folder in (index, tower)] == before
    system = parts.open(loaded)  # checks the index against the saved query tower's passage tower
    encoder = system.retriever.encoder
    last = encoder.passage_tower.state_dict()
    assert set(last) == set(first)
    assert all(torch.equal(value, first[name]) for name, value in last.items())
    moved = encoder.query_tower.state_dict()
    assert any(not torch.equal(value, first[name]) for name, value in moved.items())
    assert (system.retriever.base.vectors.vectors(np.arange(30)) == vectors).all()
    fresh = encoder.embed_passages([f"{p.title}\n{p.text}" for p in system.retriever.base.corpus])
    assert fresh == pytest.approx(vectors, abs=1e-5)
    assert len(system.answer([ROWS[0][0]])[0].hits) == 2


# What batches and their parts may not change.


@pytest.mark.parametrize("over", ["sequence", "token"])
@pytest.mark.parametrize("reduction", ["token", "example"])
def test_a_batch_twice_is_the_batch(reduction: str, over: str, folder: Path) -> None:
    found = []
    for rows in (questions(), questions() * 2):
        aim = objective(opened(folder), over=over, reduction=reduction)
        loss = aim.loss(aim.collate(rows))[0]
        loss.backward()
        found.append((loss.item(), [p.grad for part in aim.parameters().values() for p in part]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert norm([a - b for a, b in zip(found[0][1], found[1][1], strict=True)]) < 1e-3 * norm(found[0][1])


def make_marginal(folder: Path, tmp: Path, **settings: Any) -> tuple[Objective, Sequence[Any]]:
    return objective(opened(folder), **settings), questions()


def make_answer(
    folder: Path, tmp: Path, *, generator: HFGenerator | None = None, **settings: Any
) -> tuple[Objective, Sequence[Any]]:
    generator = generator or made("bart", tmp)
    prompts = [generator.prompt.render(query, PASSAGES[:1]) for query, _ in EIGHT]
    rows = [generator.row(prompt, answer) for prompt, (_, answer) in zip(prompts, EIGHT, strict=True)]
    return AnswerObjective(generator, **settings), rows


def make_lsr(folder: Path, tmp: Path, *, alike: Sequence[int] = (), **settings: Any) -> tuple[Objective, Sequence[Any]]:
    """`alike` are rows that tell nothing: the answer is as likely with each passage."""
    chance = np.random.default_rng(0)
    rows = [
        LsrRow(query, chance.choice(30, 4, replace=False), -5 * chance.random(4, dtype=np.float32), len(answer))
        for query, answer in EIGHT
    ]
    rows = [replace(row, answer_logprobs=np.full(4, -3.0, np.float32)) if at in alike else row for at, row in enumerate(rows)]
    return LsrObjective(opened(folder).retriever, LsrSettings(kind="lsr", target="sum_logprob", tau=1.0, **settings)), rows


MAKERS = [
    pytest.param(make_marginal, {"over": "sequence", "reduction": "token"}, id="marginal-token"),
    pytest.param(make_marginal, {"over": "token", "reduction": "example"}, id="marginal-example"),
    pytest.param(make_marginal, {"over": "sequence", "reduction": "sum"}, id="marginal-sum"),
    pytest.param(make_answer, {"reduction": "token"}, id="answer-token"),
    pytest.param(make_answer, {"reduction": "example"}, id="answer-example"),
    pytest.param(make_lsr, {}, id="lsr"),
    pytest.param(make_lsr, {"flat": "skip", "alike": (0, 2, 3)}, id="lsr-flat-left-out"),
]


@pytest.mark.parametrize(("make", "settings"), MAKERS)
def test_however_a_batch_is_accumulated_the_step_is_the_same(
    make: Callable[..., tuple[Objective, Sequence[Any]]], settings: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    """Eight at once, in pairs, and in threes of which the last is a pair: rows count alike, wherever they are."""
    found = []
    for size, parts in ((8, 1), (2, 4), (3, 3)):
        aim, rows = make(folder, tmp_path / str(size), **settings)
        start = learned(aim)
        rate = 0.005 if settings.get("reduction") == "sum" else 0.05
        trainer = trainer_of(
            aim, rows, folder, tmp_path / str(size), max_steps=1, per_device_train_batch_size=size, learning_rate=rate,
            gradient_accumulation_steps=parts,
        )  # fmt: skip
        trainer.train()
        found.append((start, learned(aim), [row["loss"] for row in trainer.state.log_history if "loss" in row]))
    for start, end, losses in found[1:]:
        assert norm([a - b for a, b in zip(start, found[0][0], strict=True)]) == 0
        equal(found[0][1], end, start=start)
        assert losses == pytest.approx(found[0][2], rel=1e-3)


def test_questions_that_are_left_out_are_in_no_denominator(folder: Path, tmp_path: Path) -> None:
    """Three rows that find nothing, beside five that do: the step of the five alone, for both means."""
    here = opened(folder)
    found = here.retriever.search([query for query, _ in EIGHT], 3)[1]
    rows = [MarginalRow(query, answer, found[n]) for n, (query, answer) in enumerate(EIGHT)]
    lost = [MarginalRow(row.query, row.answer, np.full(3, -1)) for row in rows[:3]]
    for reduction in ("token", "example"):
        ends = []
        for given, size in ((rows[3:], 5), ([*lost, *rows[3:]], 2), ([lost[0], *rows[3:], *lost[1:]], 3)):
            aim = objective(opened(folder), reduction=reduction, on_empty="skip")
            start = learned(aim)
            parts = -(-len(given) // size)
            trainer_of(
                aim, given, folder, tmp_path / f"{reduction}{size}", max_steps=1, per_device_train_batch_size=size,
                gradient_accumulation_steps=parts,
            ).train()  # fmt: skip
            ends.append(learned(aim))
        equal(ends[0], ends[1], start=start)
        equal(ends[0], ends[2], start=start)


# When dropout begins.


@pytest.mark.parametrize("parts", [1, 2])
def test_what_begins_to_learn_has_dropout_from_its_first_part_on(parts: int, folder: Path, tmp_path: Path) -> None:
    aim = objective(opened(folder), freeze_retriever_steps=2)
    modes: list[bool] = []
    aim.module.query_encoder.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    trainer_of(
        aim, questions(), folder, tmp_path, max_steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=parts
    ).train()
    assert modes == [False] * 2 * parts + [True] * 2 * parts


def test_a_passage_encoder_that_waits_has_gradient_checkpointing_when_it_learns(folder: Path, tmp_path: Path) -> None:
    aim = objective(
        opened(folder), generator=made("bart", tmp_path), learn=ALL, staleness={"kind": "accept"}, freeze_retriever_steps=2
    )
    aim.module.gradient_checkpointing_enable()
    assert aim.module.passage_encoder[0].model.is_gradient_checkpointing
    assert aim.module.generator.is_gradient_checkpointing


# What a resumed run remembers.


def test_the_monitor_goes_on_where_a_run_was_broken_off(folder: Path, tmp_path: Path) -> None:
    """Straight through, and resumed from step 3: the same windows, the same rest, the same first window to compare with."""
    ends = []
    for resumed in (False, True):
        aim = objective(opened(folder))
        aim.monitor = CollapseMonitor(window=12)
        trainer = trainer_of(
            aim, questions() * 2, folder, tmp_path, max_steps=6, save_strategy="steps", save_steps=3,
            save_total_limit=None, per_device_train_batch_size=4,
        )  # fmt: skip
        checkpoint = tmp_path / "work" / "checkpoint-3" if resumed else None
        if checkpoint is not None:
            restore(aim, checkpoint)
            assert len(aim.monitor.figures) == 1
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        ends.append((aim.monitor.state(), learned(aim)))
    assert len(ends[0][0]["figures"]) == 2
    assert ends[0][0] == ends[1][0]
    assert norm([a - b for a, b in zip(ends[0][1], ends[1][1], strict=True)]) < 1e-5
    assert json.loads(json.dumps(ends[0][0])) == json.loads(
        (last_whole(tmp_path / "work") / "monitor.json").read_text()  # type: ignore[operator]
    )


def test_a_checkpoint_without_a_monitor_begins_a_fresh_window_and_one_without_its_index_is_refused(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = tmp_path / "work" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    aim = objective(opened(folder))
    with caplog.at_level(logging.INFO):
        restore(aim, checkpoint)
    assert aim.monitor.state() == CollapseMonitor().state()
    assert "checkpoint-3 has no monitor.json" in caplog.text
    aim.refresher = Refresher(aim.retriever, StalenessSettings(kind="refresh", every=1), tmp_path / "kb")
    with pytest.raises(CheckpointError, match=r"checkpoint-3 has no index\.json") as told:
        restore(aim, checkpoint)
    assert told.value.hint == f"remove {tmp_path / 'work'} and train the stage from its start"


def test_a_collapse_that_began_before_the_interruption_is_told_of_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Through `train`: two of three bad windows lie before the checkpoint, and the healthy first one long before."""
    path = small_recipe(tmp_path)
    recipe = yaml.safe_load(path.read_text())
    recipe["stages"] = {"joint": joint(recipe)}
    path.write_text(yaml.safe_dump(recipe))
    build_knowledge(load_recipe(path).knowledge)
    see, seen = CollapseMonitor.see, []

    def breaks(self: CollapseMonitor, rows: np.ndarray) -> None:
        seen.append(len(rows))
        if len(seen) == 6:
            raise OSError("the power went")
        see(self, rows)

    with monkeypatch.context() as patched:
        patched.setattr(CollapseMonitor, "see", breaks)
        with pytest.raises(OSError, match="power"):
            train(load_recipe(path))
    state = next((tmp_path / "runs").rglob("checkpoint-4/monitor.json"))
    kept = json.loads(state.read_text())
    assert len(kept["seen"]) == 4 * 8
    assert kept["figures"] == []
    state.write_text(json.dumps({**kept, "figures": [[0.05, 0.9]], "bad": 2, "seen": [[1, 2, 3]] * 250}))
    with caplog.at_level(logging.WARNING):
        train(load_recipe(path))
    assert "retrieval is collapsing" in caplog.text
    assert "(5 % at first)" in caplog.text


# Refreshing in the background.


class Schedule(TrainerCallback):
    """Notes when indexes are begun and taken up. Behind `Refreshing`; it waits for a job, as fast machines need not."""

    def __init__(self, refresher: Refresher):
        self.refresher, self.begun, self.taken = refresher, [], {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.refresher._job is not None:
            self.begun.append(self.refresher._job_step)
            self.refresher._job.result()
        self.taken[state.global_step] = self.refresher.born


class Replayed(TrainerCallback):
    """The same schedule without a background: encodes when the other began, takes up when the other did."""

    def __init__(self, retriever: Any, schedule: Schedule, folder: Path):
        self.retriever, self.schedule, self.folder, self.made = retriever, schedule, folder, {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step, encoder = state.global_step, self.retriever.encoder
        if step in self.schedule.begun:
            self.made[step] = reencoded(self.retriever.base, encoder.snapshot(), self.folder)
        born = self.schedule.taken[step]
        if born != self.schedule.taken.get(step - 1, 0):
            self.retriever.adopt(KnowledgeBase.open(self.folder, version=self.made[born].version))


def test_refreshed_in_the_background_is_refreshed_in_line_on_the_same_schedule(folder: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"max_steps": 7, "per_device_train_batch_size": 4, "learning_rate": 0.5}
    refresh = {"kind": "refresh", "every": 2, "mode": "async"}

    def prepared(name: str) -> tuple[Any, StageTrainer]:
        aim = objective(opened(folder), learn=ALL, staleness=refresh)
        return aim, trainer_of(aim, questions(), folder, tmp_path / name, **more)

    aim, trainer = prepared("async")
    aim.refresher = Refresher(aim.retriever, StalenessSettings(**refresh), tmp_path / "async" / "kb")
    schedule = Schedule(aim.refresher)
    trainer.add_callback(Refreshing(aim.refresher))
    trainer.add_callback(schedule)
    start = learned(aim)
    trainer.train()
    assert schedule.begun == [2, 4, 6]
    assert schedule.taken == {1: 0, 2: 0, 3: 2, 4: 2, 5: 4, 6: 4, 7: 6}  # a step after it was begun
    ages = [row["index_age"] for row in trainer.state.log_history if "index_age" in row]
    assert ages == [0, 1, 2, 1, 2, 1, 2]
    twin, other = prepared("in line")
    other.add_callback(Replayed(twin.retriever, schedule, tmp_path / "in line" / "kb"))
    other.train()
    assert aim.retriever.base.version == twin.retriever.base.version
    rows = np.arange(len(aim.retriever.base.corpus))
    assert aim.retriever.base.vectors.vectors(rows) == pytest.approx(twin.retriever.base.vectors.vectors(rows), abs=1e-6)
    equal(learned(aim), learned(twin), start=start)
    never, plain = prepared("never")
    plain.train()
    first = KnowledgeBase.open(load_recipe(folder / "small.yaml").knowledge.path)
    assert never.retriever.base.version == first.version != aim.retriever.base.version


@pytest.mark.parametrize("change", ["gone", "another"])
def test_a_run_whose_index_is_not_there_any_more_is_refused(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_recipe(tmp_path)
    recipe = yaml.safe_load(path.read_text())
    recipe["stages"] = {
        "joint": joint(recipe, learn=list(ALL), staleness={"kind": "refresh", "every": 3, "mode": "sync"})
    }  # fmt: skip
    path.write_text(yaml.safe_dump(recipe))
    build_knowledge(load_recipe(path).knowledge)
    at = Refresher.at

    def breaks(self: Refresher, step: int) -> str | None:
        if step == 5:
            raise OSError("the power went")
        return at(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(Refresher, "at", breaks)
        with pytest.raises(OSError, match="power"):
            train(load_recipe(path))
    work = next((load_recipe(path).run / "stages").iterdir()) / "work"
    state = work / "checkpoint-4" / "index.json"
    kept = json.loads(state.read_text())
    if change == "gone":
        (work / "knowledge" / "versions" / kept["version"] / "manifest.json").unlink()
    else:
        state.write_text(json.dumps({**kept, "version": "0123456789abcdef"}))
    with pytest.raises(CheckpointError, match=r"made with index .* which is gone(.|\n)*train the stage from its start"):
        train(load_recipe(path))
    assert not (work.parent / "result").exists()


def test_reranking_by_an_encoder_that_stands_still_is_plain_search(folder: Path, tmp_path: Path) -> None:
    """Three steps of the real trainer with the retriever still frozen: the same passages, the same weights."""
    ends = []
    for name, more in (("plain", {"learn": ("query_encoder", "generator")}),
                       ("rerank", {"learn": ALL, "staleness": {"kind": "rerank", "pool": 12}})):  # fmt: skip
        aim = objective(opened(folder), freeze_retriever_steps=10, **more)
        start = [p.detach().clone() for p in aim.parameters()["generator"]]
        trainer_of(aim, questions(), folder, tmp_path / name, max_steps=3, per_device_train_batch_size=4).train()
        ends.append([p.detach().clone() for p in aim.parameters()["generator"]])
    equal(ends[0], ends[1], start=start)


def test_both_refreshes_leave_parts_that_fit_together(tmp_path: Path) -> None:
    """`mode: async` through `train`: whatever moment a version is taken up at, the result opens and holds its own vectors."""
    path = small_recipe(tmp_path)
    recipe = yaml.safe_load(path.read_text())
    recipe["stages"] = {
        "joint": joint(recipe, learn=list(ALL), staleness={"kind": "refresh", "every": 2, "mode": "async"})
    }  # fmt: skip
    path.write_text(yaml.safe_dump(recipe))
    loaded = load_recipe(path)
    build_knowledge(loaded.knowledge)
    parts = train(loaded)
    system = parts.open(loaded)
    base = system.retriever.base
    passages = [f"{p.title}\n{p.text}" for p in base.corpus]
    fresh = system.retriever.encoder.embed_passages(passages)
    assert base.vectors.vectors(np.arange(len(passages))) == pytest.approx(fresh, abs=1e-5)
    assert load_file(weights(loaded, "passage_encoder"))
    assert ROWS[0][0] == system.answer([ROWS[0][0]])[0].query
