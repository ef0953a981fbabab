"""The `marginal` objective: its loss by loops, who gets gradients, missing passages, smoothing, memory, and that it learns."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import tiny
from raglan.cli import app
from raglan.errors import GeneratorError, RecipeError
from raglan.generator import HFGenerator
from raglan.knowledge import build_knowledge
from raglan.objective import MarginalObjective, MarginalRow
from raglan.objective.collapse import CollapseMonitor
from raglan.rag import RAG
from raglan.recipe import MarginalObjective as MarginalSettings
from raglan.recipe import PriorSettings, load_recipe
from raglan.retriever import Retriever
from raglan.train import _with_hits, check_rows, train
from test_generator import made, plain_logprobs
from test_rag_decode import next_logprobs
from tiny import small_recipe

ROWS = [("who built the tower?", "odo"), ("when was the lighthouse built?", "1790"), ("who was the miller?", "a miller")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("marginal")
    build_knowledge(load_recipe(small_recipe(path)).knowledge)
    return path


@pytest.fixture
def system(folder: Path) -> RAG:
    return RAG.open(load_recipe(folder / "small.yaml"))


def objective(system: RAG, *, generator: HFGenerator | None = None, **settings: Any) -> MarginalObjective:
    chosen = MarginalSettings(**{"kind": "marginal", "over": "sequence", "k": 3, **settings})
    return MarginalObjective(system.retriever, generator or system.generator, chosen)


def batch(made_for: MarginalObjective, rows: list[tuple[str, str]] = ROWS) -> dict[str, Any]:
    return made_for.collate([MarginalRow(query, answer) for query, answer in rows])


@pytest.mark.parametrize("over", ["sequence", "token"])
@pytest.mark.parametrize("kind", ["bart", "llama", "reader"])
def test_loss_equals_its_twin(kind: str, over: str, system: RAG, tmp_path: Path) -> None:
    generator = made(kind, tmp_path)
    aim = objective(system, generator=generator, over=over, reduction="sum")
    loss, figures = aim.loss(batch(aim))
    total = 0.0
    retriever = system.retriever
    for query, answer in ROWS:
        hits = retriever.retrieve([query], 3)[0]
        vector = retriever.encoder.embed_queries([query])[0].astype(np.float64)
        stored = retriever.base.vectors.vectors(np.array([hit.row for hit in hits])).astype(np.float64)
        weights = np.exp((stored @ vector) / retriever.temperature)
        prior = weights / weights.sum()
        each = np.exp([plain_logprobs(generator, generator.prompt.render(query, [hit.passage]), answer) for hit in hits])
        total -= math.log(prior @ each.prod(1)) if over == "sequence" else np.log(prior @ each).sum()
    assert loss.item() == pytest.approx(total, rel=2e-3)
    assert figures["absent"].item() == 0


@pytest.mark.parametrize(
    "learn", [("query_encoder", "generator"), ("generator",), ("query_encoder",)], ids=["both", "generator", "query_encoder"]
)
def test_exactly_what_learns_has_gradients(learn: tuple[str, ...], system: RAG) -> None:
    aim = objective(system, learn=learn)
    passage = {name: p.detach().clone() for name, p in system.retriever.encoder.passage_tower.named_parameters()}
    assert set(aim.parameters()) == set(learn)
    loss, _ = aim.loss(batch(aim))
    loss.backward()
    for name, part in (("query_encoder", aim.module.query_encoder), ("generator", aim.module.generator)):
        moved = [p for p in part.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
        assert bool(moved) == (name in learn)
        assert len(moved) >= 0.8 * len(aim.parameters().get(name, []))
        wanted = {id(p) for p in aim.parameters().get(name, [])}
        assert all(id(p) in wanted for p in moved)
    assert all(torch.equal(passage[name], p) for name, p in system.retriever.encoder.passage_tower.named_parameters())
    assert all(p.grad is None for p in system.retriever.encoder.passage_tower.parameters())


def test_the_retriever_waits_as_long_as_it_is_told(system: RAG) -> None:
    aim = objective(system, freeze_retriever_steps=5)
    for step, learns in ((4, False), (5, True)):
        aim.step = step
        aim.module.zero_grad()
        aim.loss(batch(aim))[0].backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in aim.module.query_encoder.parameters()) == learns


def test_one_passage_teaches_the_retriever_nothing(system: RAG) -> None:
    aim = objective(system, k=1)
    aim.loss(batch(aim))[0].backward()
    gradients = [p.grad for p in aim.parameters()["query_encoder"] if p.grad is not None]
    assert gradients
    assert all(float(g.abs().max()) < 1e-7 for g in gradients)


@pytest.mark.parametrize("over", ["sequence", "token"])
def test_no_hits_is_a_closed_book_row_or_is_left_out(over: str, system: RAG, folder: Path) -> None:
    recipe = load_recipe(folder / "small.yaml", ["retriever.index=bm25"])
    asks = RAG.open(recipe)
    lost = ("zzz qqq", "odo")  # no word of it is in the corpus
    closed = objective(asks, over=over, reduction="sum")
    alone = closed.loss(batch(closed, [lost]))[0]
    prompt = asks.generator.prompt.render(lost[0], [])
    assert alone.item() == pytest.approx(-sum(plain_logprobs(asks.generator, prompt, lost[1])), rel=2e-3)
    alone.backward()
    skip = objective(asks, over=over, reduction="token", on_empty="skip")
    both = skip.loss(batch(skip, [ROWS[0], lost]))[0]
    assert both.item() == pytest.approx(skip.loss(batch(skip, [ROWS[0]]))[0].item(), rel=1e-4)
    nothing = skip.loss(batch(skip, [lost]))[0]
    nothing.backward()
    assert nothing.item() == 0


def test_fewer_hits_than_k_are_absent_and_not_the_last_passage(folder: Path) -> None:
    asks = RAG.open(load_recipe(folder / "small.yaml", ["retriever.index=bm25"]))
    size = len(asks.retriever.base.corpus)
    aim = objective(asks, k=size)
    loss, figures = aim.loss(batch(aim, [(asks.retriever.base.corpus[0].title, "odo")]))  # a word of one passage
    assert 0 < figures["absent"].item() < 1
    assert torch.isfinite(loss)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for part in aim.parameters().values() for p in part if p.grad is not None)


@pytest.mark.parametrize("prior", ["dense", "bm25", "hybrid"])
def test_priors(prior: str, folder: Path) -> None:
    asks = RAG.open(load_recipe(folder / "small.yaml", ["retriever.index=bm25", f"retriever.prior={{kind: {prior}}}"]))
    queries = [query for query, _ in ROWS]
    hits = asks.retriever.retrieve(queries, 4)
    found = asks.retriever.prior(queries, hits)
    for query, own, logprobs in zip(queries, hits, found, strict=True):
        assert float(logprobs.exp().sum()) == pytest.approx(1, abs=1e-5)
        sparse = np.array([hit.score for hit in own])
        stored = asks.retriever.base.vectors.vectors(np.array([hit.row for hit in own]))
        dense = stored @ asks.retriever.encoder.embed_queries([query])[0]
        logits = {"dense": dense / 0.05, "bm25": sparse, "hybrid": dense / 0.05 + 0.1 * sparse}[prior]
        expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        assert logprobs.exp().tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    aim = objective(asks)
    assert ("query_encoder" in aim.parameters()) == (prior != "bm25")


def test_a_bm25_prior_without_such_an_index_is_named(folder: Path) -> None:
    from raglan.errors import RecipeError

    system = RAG.open(load_recipe(folder / "small.yaml"))
    base = system.retriever.base
    base.settings = base.settings.model_copy(update={"indexes": {"dense": base.settings.indexes["dense"]}})
    retriever = Retriever(base, system.retriever.encoder, index="dense", prior=PriorSettings(kind="bm25"))
    with pytest.raises(RecipeError, match="no bm25 index"):
        retriever.prior(["who?"], retriever.retrieve(["who?"], 2))


@pytest.mark.parametrize("over", ["sequence", "token"])
@pytest.mark.parametrize("kind", ["bart", "llama"])
def test_label_smoothing_is_that_of_the_full_distribution(kind: str, over: str, system: RAG, tmp_path: Path) -> None:
    generator = made(kind, tmp_path)
    plain = objective(system, generator=generator, over=over, reduction="sum")
    exact = plain.loss(batch(plain))[0].item()
    nearly = objective(system, generator=generator, over=over, reduction="sum", label_smoothing=1e-9)
    assert nearly.loss(batch(nearly))[0].item() == pytest.approx(exact, rel=1e-6)
    aim = objective(system, generator=generator, over=over, reduction="sum", label_smoothing=0.1)
    loss = aim.loss(batch(aim))[0]
    loss.backward()
    total = 0.0
    for query, answer in ROWS:
        hits = system.retriever.retrieve([query], 3)[0]
        prior = system.retriever.prior([query], [hits])[0].double()
        ids = generator.answer_ids(answer)
        prompts = [generator.prompt.render(query, [hit.passage]) for hit in hits]
        weights = prior.clone()
        for t, token in enumerate(ids):
            each = torch.stack([next_logprobs(generator, prompt, tuple(ids[:t])) for prompt in prompts])
            mixed = (weights[:, None] + each).logsumexp(0)
            total -= 0.9 * float(mixed[token]) + 0.1 * float(mixed.mean())
            weights = (weights + each[:, token]).log_softmax(0) if over == "sequence" else weights
    assert loss.item() == pytest.approx(total, rel=2e-3)


class Largest(TorchDispatchMode):
    """The most rows of vocabulary size that any operation of a step gives."""

    def __init__(self, words: int):
        super().__init__()
        self.words, self.rows = words, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] == self.words:
                self.rows = max(self.rows, tensor.numel() // self.words)
        return output


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_no_tensor_of_all_answer_tokens_and_all_words(epsilon: float, system: RAG, tmp_path: Path) -> None:
    generator = made("bart", tmp_path, head_chunk=8)
    aim = objective(system, generator=generator, label_smoothing=epsilon)
    aim.loss(batch(aim))  # the one-time check of the head
    words = generator.model.config.vocab_size
    long = [(query, "the old miller built a tower by the sea") for query, _ in ROWS]
    with Largest(words) as largest:
        aim.loss(batch(aim, long))[0].backward()
    rows = len(long) * 3 * len(generator.answer_ids(long[0][1]))
    assert rows > 200
    assert 0 < largest.rows <= 32  # one chunk (BART's tied head gives (D,V) gradients of 32 rows)


def test_splitting_a_batch_changes_nothing(system: RAG) -> None:
    aim = objective(system)
    whole = batch(aim)
    items = (whole["labels"] >= 0).sum()
    together = aim.loss(whole, items=items)[0]
    parts = sum(aim.loss(batch(aim, [row]), items=items)[0] for row in ROWS)
    assert together.item() == pytest.approx(float(parts), rel=1e-4)


def test_the_monitor_warns_of_collapse_and_not_of_health(caplog: pytest.LogCaptureFixture) -> None:
    chance = np.random.default_rng(0)
    healthy, sick = CollapseMonitor(window=64), CollapseMonitor(window=64)
    with caplog.at_level(logging.WARNING):
        for _ in range(8):
            healthy.see(chance.integers(0, 500, (64, 5)))
        assert not healthy.warned
        assert not caplog.records
        sick.see(chance.integers(0, 500, (64, 5)))
        for _ in range(3):
            sick.see(np.tile(np.arange(5), (64, 1)))
    assert sick.warned
    assert "collapsing" in caplog.text


def test_what_does_not_learn_runs_without_dropout(system: RAG) -> None:
    aim = objective(system, learn=("generator",))
    aim.module.train()
    assert aim.module.generator.training
    assert not aim.module.query_encoder.training
    waits = objective(system, freeze_retriever_steps=3)
    for step, training in ((2, False), (3, True)):
        waits.step = step
        assert waits.module.train().query_encoder.training == training


def test_a_batch_of_nothing_but_questions_without_hits_can_be_skipped(folder: Path) -> None:
    asks = RAG.open(load_recipe(folder / "small.yaml", ["retriever.index=bm25", "retriever.prior.kind=bm25"]))
    aim = objective(asks, on_empty="skip")
    loss, figures = aim.loss(batch(aim, [("zzz qqq", "odo")]))
    loss.backward()
    assert loss.item() == 0
    assert figures["without_hits"].item() == 1


def test_faults_of_rows_are_told_before_the_first_step(system: RAG, tmp_path: Path) -> None:
    generator = made("bart", tmp_path)
    check_rows([MarginalRow(query, answer) for query, answer in ROWS], generator)
    long = "odo " * 600
    with pytest.raises(GeneratorError, match=r"positions, the model has 512, answer 'odo odo"):
        check_rows([MarginalRow("who?", long)], generator)
    with pytest.raises(RecipeError, match="does not fit into a prompt"):
        check_rows([MarginalRow("who " * 3000, "odo")], generator)


def test_rows_without_hits_leave_before_anything_is_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    asks = RAG.open(load_recipe(folder / "small.yaml", ["retriever.index=bm25", "retriever.prior.kind=bm25"]))
    rows = [MarginalRow("zzz qqq", "odo"), MarginalRow(*ROWS[0])]
    with caplog.at_level(logging.WARNING):
        assert _with_hits(rows, asks, "joint") == rows[1:]
    assert "1 of 2 rows find no passage" in caplog.text


@pytest.mark.parametrize("decode", ["rag_sequence", "rag_token"])
def test_a_question_is_embedded_once(decode: str, folder: Path) -> None:
    system = RAG.open(
        load_recipe(folder / "small.yaml", [f"decode.kind={decode}", "decode.max_new_tokens=2", "retriever.index=dense"])
    )
    seen: list[int] = []
    system.retriever.encoder.query_tower[0].register_forward_hook(lambda _, args, output: seen.append(len(output["input_ids"])))
    answers = system.answer([query for query, _ in ROWS])
    assert seen == [len(ROWS)]
    hits = [answer.hits for answer in answers]
    again = system.retriever.prior([query for query, _ in ROWS], hits)  # not from a search: embedded anew, the same
    assert [list(answer.prior) for answer in answers] == [pytest.approx(row.exp().tolist(), abs=1e-5) for row in again]


def test_training_through_the_command_line_saves_both_parts(tmp_path: Path) -> None:
    path = small_recipe(tmp_path)
    recipe = yaml.safe_load(path.read_text())
    data = {"kind": "questions", "path": recipe["stages"]["read"]["data"]["path"]}
    recipe["stages"] = {
        "joint": {
            "data": data,
            "objective": {"kind": "marginal", "over": "token", "k": 3, "rates": {"query_encoder": 1e-3}},
            "train": {"learning_rate": 5e-3, "max_steps": 12, "per_device_train_batch_size": 8, "logging_steps": 2},
        }
    }  # fmt: skip
    path.write_text(yaml.safe_dump(recipe))
    runner = CliRunner()
    assert runner.invoke(app, ["build", str(path)]).exit_code == 0
    done = runner.invoke(app, ["train", str(path)])
    assert done.exit_code == 0, done.output
    stage = next((load_recipe(path).run / "stages").iterdir())
    curve = [row for row in json.loads((stage / "log.json").read_text()) if "loss" in row]
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert {"prior_entropy", "posterior_gain", "distinct_top1"} <= set(curve[0])
    tuned = load_file(stage / "result" / "query_encoder" / "model.safetensors")
    start = load_file(tmp_path / recipe["knowledge"]["encoder"]["model"] / "model.safetensors")
    moved = [name for name, value in tuned.items() if name in start and not torch.equal(value, start[name])]
    assert moved
    tuned = load_file(stage / "result" / "generator" / "model.safetensors")
    start = load_file(tmp_path / recipe["generator"]["model"] / "model.safetensors")
    assert any(not torch.equal(value, start[name]) for name, value in tuned.items())
    answered = runner.invoke(app, ["answer", str(path), ROWS[0][0], "decode.kind=rag_token", "--json"])
    assert answered.exit_code == 0, answered.output
    found = json.loads(answered.stdout)[0]
    assert sum(hit["prior"] for hit in found["passages"]) == pytest.approx(1, abs=1e-4)
    assert sum(hit["posterior"] for hit in found["passages"]) == pytest.approx(1, abs=1e-4)


def test_gaps_without_passages_and_with_others(system: RAG) -> None:
    aim = objective(system)
    rows = [MarginalRow(query, answer) for query, answer in ROWS]
    found = aim.validate(rows)
    aim.module.eval()
    plain = aim.collate(rows)
    with torch.no_grad():
        own = aim._forward(plain).rows
    tokens = int((plain["labels"] >= 0).sum())

    def nll(candidates: np.ndarray) -> float:
        given = [MarginalRow(row.query, row.answer, own) for row, own in zip(rows, candidates, strict=True)]
        return aim.loss(aim.collate(given), items=1)[0].item() / tokens

    assert found["loss"] == pytest.approx(nll(own), rel=1e-3)
    assert found["shuffle_gap"] == pytest.approx(nll(own[[2, 0, 1]]) - nll(own), abs=2e-3)
    assert found["closed_book_gap"] == pytest.approx(nll(np.full_like(own, -1)) - nll(own), abs=2e-3)


def test_gaps_are_of_questions_that_have_passages_on_both_sides(folder: Path) -> None:
    """Where questions without hits are left out, they and those that would get their passages count for nothing."""
    asks = RAG.open(load_recipe(folder / "small.yaml", ["retriever.index=bm25", "retriever.prior.kind=bm25"]))
    aim = objective(asks, on_empty="skip")
    titles = [asks.retriever.base.corpus[row].title for row in (3, 11, 20, 27)]
    known = [MarginalRow(f"who built {title}", "odo marrack" if n else "1790") for n, title in enumerate(titles)]
    rows = [*known[:2], MarginalRow("zzz qqq", "a miller of the old tower"), *known[2:]]
    found = aim.validate(rows)
    aim.module.eval()
    with torch.no_grad():
        own = aim._forward(aim.collate(rows)).rows
    assert (own[2] == -1).all()
    assert (own[[0, 1, 3, 4]] >= 0).any(1).all()
    counted = [0, 1, 4]  # the third has nothing, the fourth would get it

    def nll(candidates: np.ndarray) -> float:
        given = [MarginalRow(rows[at].query, rows[at].answer, mine) for at, mine in zip(counted, candidates, strict=True)]
        labels = aim.collate(given)
        return aim.loss(labels, items=1)[0].item() / int((labels["labels"] >= 0).sum())

    true = nll(own[[4, 0, 3]]) - nll(own[counted])
    assert abs(true) > 1e-3
    assert found["shuffle_gap"] == pytest.approx(true, abs=1e-5)
    assert "closed_book_gap" not in found
    assert not any(name.endswith("gap") for name in aim.validate([rows[2], known[0]]))  # nothing can be exchanged


def test_a_generator_that_ignores_its_passages_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    monitor = CollapseMonitor()
    with caplog.at_level(logging.WARNING):
        for gap in (0.001, 0.002, 0.5, 0.001, 0.001):
            monitor.hear({"shuffle_gap": gap})
        assert not caplog.records
        monitor.hear({"shuffle_gap": 0.003})
    assert "ignores its passages" in caplog.text


@pytest.mark.parametrize("sick", [True, False], ids=["collapsing", "healthy"])
def test_a_run_made_to_collapse_warns_and_a_healthy_one_does_not(
    sick: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A frozen generator of random weights, asked for noise, likes the same few passages for every question."""
    path = small_recipe(tmp_path)
    recipe = yaml.safe_load(path.read_text())
    questions = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    noise = [{**question, "answers": ["zq" if sick else question["answers"][0]]} for question in questions]
    (tmp_path / "noise.jsonl").write_text("".join(json.dumps(question) + "\n" for question in noise))
    tiny.bart(tmp_path / "bart")
    recipe["generator"] = {"model": "bart", "dtype": "float32"}
    recipe["retriever"] = {"index": "dense", "k": 2}
    recipe["stages"] = {
        "alone": {
            "data": {"kind": "questions", "path": "noise.jsonl"},
            "objective": {"kind": "marginal", "over": "sequence", "k": 4, "learn": ["query_encoder"]},
            "train": {"learning_rate": 1e-2 if sick else 1e-5, "max_steps": 60, "per_device_train_batch_size": 32},
        }
    }  # fmt: skip
    path.write_text(yaml.safe_dump(recipe))
    build_knowledge(load_recipe(path).knowledge)
    with caplog.at_level(logging.WARNING):
        train(load_recipe(path))
    assert ("retrieval is collapsing" in caplog.text) == sick


def test_gradient_checkpointing_changes_no_gradient_and_is_refused_where_there_is_none(system: RAG, tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        aim = objective(system, generator=made("bart", tmp_path / str(checkpointing)), learn=("generator",))
        aim.module.train()
        if checkpointing:
            aim.module.gradient_checkpointing_enable()
        aim.loss(batch(aim))[0].backward()
        found.append([p.grad for p in aim.parameters()["generator"]])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*found, strict=True))
    with pytest.raises(RecipeError, match="no gradient checkpointing"):
        objective(system).module.gradient_checkpointing_enable()
