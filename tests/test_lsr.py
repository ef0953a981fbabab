"""The `lsr` objective: worked examples through presets, who moves, where evidence comes from, what is found, when it stops."""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import tiny
from raglan.artifact import read_manifest
from raglan.candidates import lsr_examples, lsr_plan, lsr_rows
from raglan.corpus import Corpus
from raglan.data import answer_rows, learned_answers, load_examples
from raglan.encoder import Encoder
from raglan.errors import CheckpointError, CorpusError, GeneratorError, IndexMismatch, RecipeError
from raglan.generator import HFGenerator, passage_attention
from raglan.generator.reader import reader_from_encoder
from raglan.knowledge import KnowledgeBase, build_knowledge, passage_text
from raglan.likelihood import lsr_divergence, lsr_target, passage_divergence, passage_logprobs
from raglan.objective import AnswerObjective, LsrObjective, MarginalObjective, MarginalRow
from raglan.objective.lsr import CORPUS_HALVES, CandidateRefresh, HeldOut, LsrRow
from raglan.objective.staleness import StaleRetriever, refresh_due
from raglan.preference import judged, preferred
from raglan.rag import RAG
from raglan.recipe import EncoderSettings, LsrMixData, QuestionData, Recipe, load_recipe
from raglan.recipe import LsrObjective as LsrSettings
from raglan.recipe import MarginalObjective as MarginalSettings
from raglan.records import Example
from raglan.scores import Pair, ScoreTable
from raglan.stages import Parts, finished_parts
from raglan.train import train
from test_generator import made, plain_logprobs
from tiny import small_recipe

A = [2.0, 1.0, 0.0]
TOKENS_D = [[0.2, 0.5], [0.75, 0.8], [0.5, 0.6]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lsr")
    recipe = yaml.safe_load(small_recipe(path).read_text())
    recipe["stages"] = {"find": recipe["stages"]["find"]}
    (path / "small.yaml").write_text(yaml.safe_dump(recipe))
    build_knowledge(load_recipe(path / "small.yaml").knowledge)
    return path


@pytest.fixture
def system(folder: Path) -> RAG:
    return RAG.open(load_recipe(folder / "small.yaml"))


def recipe_of(folder: Path, name: str, objective: dict[str, Any], **arguments: Any) -> Recipe:
    """A recipe of one `lsr` stage over the folder's knowledge base."""
    recipe = yaml.safe_load((folder / "small.yaml").read_text())
    stage = recipe["stages"]["find"]
    stage["objective"] = {"kind": "lsr", "candidates": "dense", **objective}
    recipe["name"] = name
    stage["train"] = {"max_steps": 4, "logging_steps": 1, "save_steps": 2, "learning_rate": 1e-3, **arguments}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return load_recipe(folder / f"{name}.yaml")


def aim(system: RAG, **settings: Any) -> LsrObjective:
    return LsrObjective(system.retriever, LsrSettings(**{"kind": "lsr", "k": 5, **settings}))


def examples(system: RAG, count: int = 6) -> list[Example]:
    corpus = system.retriever.base.corpus
    return [Example(f"q{n}", f"who built {corpus[n].title}", ("odo", "a miller"), (corpus[n].id,)) for n in range(count)]


def kept(table: Path) -> int:
    """Rows in a table of scores."""
    return int(read_manifest(table, "scores")["rows"])


def rows_of(system: RAG, objective: LsrObjective, table: Path, asked: Sequence[Example] = ()) -> list[LsrRow]:
    return lsr_rows(list(asked) or examples(system), system, objective.settings, table)


def learned(tower: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in tower.named_parameters()}


def synthetic(values: list[float], lengths: int = 1, tokens: list[list[float]] | None = None) -> dict[str, Tensor]:
    given = {
        "answer_logprobs": torch.tensor([values]), "answer_lengths": torch.tensor([lengths]),
        "passage_mask": torch.ones(1, 3, dtype=torch.bool), "from_corpus": torch.tensor([False]),
    }  # fmt: skip
    return given if tokens is None else {**given, "token_logprobs": torch.tensor([tokens]).log()}


# Worked example D: presets over A's scores, target first, γ = 1.
@pytest.mark.parametrize(
    ("settings", "batch", "q", "loss", "gradient"),
    [
        ({"preset": "emdr2"}, synthetic([math.log(x) for x in (0.1, 0.6, 0.3)]), [0.276757, 0.610879, 0.112365], 1.425574,
         [0.388484, -0.366150, -0.022334]),
        ({"preset": "emdr2", "over": "token"}, synthetic([math.log(x) for x in (0.1, 0.6, 0.3)], 2, TOKENS_D), None, 1.557750,
         [0.391450, -0.354277, -0.037172]),
        ({"preset": "pdist", "tau": 1.0, "divide_by": "one"}, synthetic([math.log(x) for x in (0.1, 0.6, 0.3)], 2),
         [0.192993, 0.472734, 0.334273], 0.510915, [0.472248, -0.228005, -0.244243]),
        ({"preset": "loop"}, synthetic([0.6, 1.9, 0.9]), [0.166136, 0.609603, 0.224260], 0.530546,
         [0.499105, -0.364875, -0.134230]),
        ({"preset": "adist"}, synthetic([0.02, 0.05, 0.03]), [0.042010, 0.843795, 0.114195], 0.955524,
         [0.623231, -0.599066, -0.024165]),
    ],
    ids=["emdr2", "emdr2-token", "pdist", "loop", "adist"],
)  # fmt: skip
def test_example_d(
    settings: dict[str, Any], batch: dict[str, Tensor], q: list[float] | None, loss: float, gradient: list[float], system: RAG
) -> None:
    objective = aim(system, gamma=1.0, **settings)
    scores = torch.tensor([A], requires_grad=True)
    log_p = passage_logprobs(scores, temperature=objective.gamma)
    log_q = objective._preferred(batch, log_p.detach())
    if q is not None:
        assert log_q.exp()[0].tolist() == pytest.approx(q, abs=2e-6)
    value = objective._losses(log_p, log_q, batch)
    value.sum().backward()
    assert value.item() == pytest.approx(loss, abs=2e-6)
    assert scores.grad[0].tolist() == pytest.approx(gradient, abs=2e-6)


# Worked example P: a softmax over the whole batch would give 2.528863.
@pytest.mark.parametrize(
    ("direction", "mean", "second"), [("student_first", 2.239223, 0.393224), ("target_first", 1.147540, None)]
)
def test_example_p_softmax_is_of_each_query(direction: str, mean: float, second: float | None) -> None:
    scores = torch.tensor([A, [1.0, 0.0, 9.0]], dtype=torch.float64, requires_grad=True)
    lm = torch.tensor([[0.1, 0.6, 0.3], [0.2, 0.5, 0.9]], dtype=torch.float64).log()
    mask = torch.tensor([[True] * 3, [True, True, False]])
    value = lsr_divergence(scores, lm, direction=direction, target="prob", tau=0.1, passage_mask=mask).mean()
    value.backward()
    assert value.item() == pytest.approx(mean, abs=1e-6)
    if second is not None:
        assert scores.grad[1].tolist() == pytest.approx([second, -second, 0.0], abs=1e-6)
    flat = mask.flatten()
    kept = passage_logprobs(scores.flatten()[flat][None]), lsr_target(lm.flatten()[flat][None], target="prob", tau=0.1)
    assert passage_divergence(*kept, direction="student_first").item() == pytest.approx(2.528863, abs=1e-6)


# Worked example S: the same divergence with the student's temperature squared in front is 1/400 of it, gradients too.
def test_example_s_scaling_of_distillation_losses() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6]], dtype=torch.float64, requires_grad=True)
    lm = torch.tensor([[0.1, 0.6, 0.3, 0.2]], dtype=torch.float64).log()
    value = lsr_divergence(scores, lm, direction="target_first", target="prob", tau=0.01, gamma=0.05)
    (own,) = torch.autograd.grad(value.sum(), scores)
    assert value.item() == pytest.approx(2.145078, abs=1e-6)
    assert own[0, 0].item() == pytest.approx(17.299098, abs=1e-6)
    theirs = 0.05**2 * torch.nn.functional.kl_div(
        (scores / 0.05).log_softmax(-1), (lm.exp() / 0.01).softmax(-1), reduction="batchmean"
    )
    (scaled,) = torch.autograd.grad(theirs, scores)
    assert theirs.item() == pytest.approx(0.005363, abs=1e-6)
    assert scaled[0, 0].item() == pytest.approx(0.043248, abs=1e-6)


@pytest.mark.parametrize("direction", ["student_first", "target_first"])
def test_gradients_by_hand_by_autograd_and_by_differences(direction: str) -> None:
    torch.manual_seed(3)
    gamma, shared = 0.3, {"direction": direction, "target": "mean_prob", "tau": 0.2, "gamma": 0.3}
    scores = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    sums, lengths = -6 * torch.rand(4, 5, dtype=torch.float64), torch.tensor([1, 3, 2, 7])
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[2, 3:] = False

    def total(values: Tensor) -> Tensor:
        return lsr_divergence(values, sums, answer_lengths=lengths, passage_mask=mask, **shared)

    (auto,) = torch.autograd.grad(total(scores).sum(), scores)
    log_p = passage_logprobs(scores.detach(), present=mask, temperature=gamma)
    log_q = lsr_target(sums, target="mean_prob", tau=0.2, answer_lengths=lengths, passage_mask=mask)
    p, q = log_p.exp(), log_q.exp()
    kl = total(scores.detach())[:, None]
    by_hand = (p * (log_p - log_q - kl) if direction == "student_first" else p - q) / gamma
    assert torch.allclose(auto, torch.where(mask, by_hand, 0.0), atol=1e-10)
    assert auto.sum(-1).abs().max() < 1e-6
    assert torch.autograd.gradcheck(total, (scores,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softmax_then_log_loses_what_log_softmax_keeps(dtype: torch.dtype) -> None:
    values = torch.tensor([[1.0, 0.0]], dtype=dtype)
    naive = (values / 0.01).softmax(-1)
    assert naive.tolist() == [[1.0, 0.0]]
    assert torch.isneginf(naive.log()[0, 1])
    ours = lsr_target(torch.tensor([[0.0, -torch.inf]]).to(dtype), target="prob", tau=0.01)
    assert ours.dtype == torch.float32
    assert ours[0].tolist() == pytest.approx([0.0, -100.0], abs=1e-5)
    even, exact = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.0, -torch.inf]])
    assert passage_divergence(even, exact, direction="student_first").item() == math.inf
    assert passage_divergence(even, exact, direction="target_first").item() == pytest.approx(0.693147, abs=1e-6)
    assert passage_divergence(even, ours, direction="student_first").item() == pytest.approx(49.306853, abs=1e-5)
    with pytest.raises(RecipeError, match=r"objective\.direction is 'sideways'; allowed are student_first, target_first"):
        passage_divergence(even, ours, direction="sideways")  # type: ignore[arg-type]


# Settings: presets are nothing but explicit settings.
@pytest.mark.parametrize("name", ["ra_dit", "replug", "pdist", "emdr2", "loop", "adist"])
def test_a_preset_is_its_explicit_settings(name: str) -> None:
    written = LsrSettings(kind="lsr", preset=name)
    told = written.model_dump(mode="json")
    assert "preset" not in told
    assert LsrSettings(**told).model_dump() == written.model_dump()
    assert LsrSettings(kind="lsr", preset=name, gamma=7.0, k=3).model_dump() == {**told, "gamma": 7.0, "k": 3} | {
        "refresh_index": ()
    }


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("preset: ra_did", "'ra_dit', 'replug', 'pdist', 'emdr2', 'loop' or 'adist'"),
        ("preset: ra_dit, target: mean_logprob", r"target mean_logprob needs tau; usual: 0\.1"),
        ("target: given", "target given needs tau"),
        ("corpus_halves: {target: sum_logprob}", "target sum_logprob needs tau"),
        ("evidence: attention", "attention is no probability: target given"),
        ("preset: adist, scorer: {model: m}", "leave out scorer"),
        ("evidence: left_out", "left_out needs target sum_logprob or mean_logprob"),
        ("preset: emdr2, flat: skip", "a posterior is no target"),
        ("preset: emdr2, over: token, answers: any", "over token reads one answer"),
        ("learn: both", "give over_retrieve or refresh_index"),
        ("over_retrieve: 64", "are for learn both"),
        ("learn: both, over_retrieve: 10", "over_retrieve is 10; it must exceed k, which is 10"),
        ("learn: both, refresh_index: [[500, 100, 50]]", "needed are"),
        ("refresh: sometimes", r"find\.objective: refresh must be never, or a number of steps, but is 'sometimes'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: str, told: str, folder: Path) -> None:
    recipe = yaml.safe_load((folder / "small.yaml").read_text())
    recipe["stages"]["find"]["objective"] = {"kind": "lsr", **yaml.safe_load(f"{{{settings}}}")}
    (folder / "wrong.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match=told):
        load_recipe(folder / "wrong.yaml")


# Who moves.
@pytest.mark.parametrize("towers", ["one", "two"])
def test_one_step_moves_the_query_tower_alone(towers: str, folder: Path, tmp_path: Path) -> None:
    overrides = []
    if towers == "two":
        overrides = [f"knowledge.encoder.query_model={tiny.sentence_encoder(tmp_path / 'query', seed=5)}"]
    system = RAG.open(load_recipe(folder / "small.yaml", overrides))
    encoder, base = system.retriever.encoder, system.retriever.base
    assert (encoder.query_tower is encoder.passage_tower) == (towers == "one")
    files = {path: path.read_bytes() for path in base.folder.rglob("*") if path.is_file()}
    objective = aim(system, target="mean_prob", tau=0.1)
    shared = {p.data_ptr() for p in encoder.query_tower.parameters()} & {
        p.data_ptr() for p in encoder.passage_tower.parameters()
    }
    assert not shared
    rows = rows_of(system, objective, tmp_path / "scores")
    query, passage = learned(encoder.query_tower), learned(encoder.passage_tower)
    loss, figures = objective.loss(objective.collate(rows))
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in objective.parameters()["query_encoder"] if p.grad is not None))
    assert norm > 0
    torch.optim.SGD(objective.parameters()["query_encoder"], lr=0.1).step()
    assert any(not torch.equal(query[name], p) for name, p in encoder.query_tower.named_parameters())
    assert all(torch.equal(passage[name], p) for name, p in encoder.passage_tower.named_parameters())
    assert not encoder.passage_tower_moved(encoder.passage_fingerprint)
    assert {path: path.read_bytes() for path in base.folder.rglob("*") if path.is_file()} == files
    assert set(figures) == {"target_entropy", "entropy", "flat", "agreement"}


def test_emdr2_is_marginal_with_the_query_encoder_alone(system: RAG, tmp_path: Path) -> None:
    asked = examples(system, 3)
    for over in ("sequence", "token"):
        ours = aim(system, preset="emdr2", over=over, k=4)
        rows = rows_of(system, ours, tmp_path / "scores", asked)
        loss, _ = ours.loss(ours.collate(rows))
        parameters = ours.parameters()["query_encoder"]
        gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
        settings = MarginalSettings(kind="marginal", over=over, k=4, learn=("query_encoder",), reduction="example")
        other = MarginalObjective(system.retriever, system.generator, settings)
        given = [MarginalRow(row.query, "odo", row.candidates[None]) for row in rows]
        theirs, _ = other.loss(other.collate(given))
        assert loss.item() == pytest.approx(theirs.item(), abs=1e-5)
        for a, b in zip(gradient, torch.autograd.grad(theirs, parameters, allow_unused=True), strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.allclose(a, b, atol=1e-5)


def test_a_batch_is_the_mean_of_its_rows_whatever_their_order_or_pads(system: RAG, tmp_path: Path) -> None:
    objective = aim(system, target="mean_prob", tau=0.1)
    rows = rows_of(system, objective, tmp_path / "scores")
    whole = objective.loss(objective.collate(rows))[0].item()
    single = [objective.loss(objective.collate([row]))[0].item() for row in rows]
    assert whole == pytest.approx(np.mean(single), abs=1e-5)
    assert objective.loss(objective.collate(rows[::-1]))[0].item() == pytest.approx(whole, abs=1e-5)
    order = np.array([3, 0, 4, 2, 1])
    turned = [LsrRow(r.query, r.candidates[order], r.answer_logprobs[order], r.answer_length) for r in rows]
    assert objective.loss(objective.collate(turned))[0].item() == pytest.approx(whole, abs=1e-5)
    pad = np.pad
    padded = [
        LsrRow(r.query, pad(r.candidates, (0, 2), constant_values=-1), pad(r.answer_logprobs, (0, 2)), r.answer_length)
        for r in rows
    ]
    loss = objective.loss(objective.collate(padded))[0]
    assert loss.item() == pytest.approx(whole, abs=1e-5)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in objective.parameters()["query_encoder"] if p.grad is not None)
    with torch.autocast("cpu", torch.bfloat16):  # as a trainer in bfloat16 runs it
        wide = objective.loss(objective.collate(rows))[0]
    assert wide.dtype == torch.float32


def test_rows_of_the_corpus_may_have_a_target_of_their_own(system: RAG, tmp_path: Path) -> None:
    objective = aim(system, target="prob", tau=0.5, corpus_halves={"target": "mean_logprob", "tau": 0.1})
    plain, other = aim(system, target="prob", tau=0.5), aim(system, target="mean_logprob", tau=0.1)
    rows = rows_of(system, plain, tmp_path / "scores")[:2]
    halves = [LsrRow(r.query, r.candidates, r.answer_logprobs, r.answer_length, r.id, CORPUS_HALVES) for r in rows]
    value = objective.loss(objective.collate([rows[0], halves[1]]))[0].item()
    apart = plain.loss(plain.collate(rows[:1]))[0].item(), other.loss(other.collate(rows[1:]))[0].item()
    assert value == pytest.approx(sum(apart) / 2, abs=1e-5)


# γ and fingerprints.
def test_gamma_prompt_and_towers_come_from_the_tuned_encoder(folder: Path, tmp_path: Path) -> None:
    system = RAG.open(load_recipe(folder / "small.yaml", ["knowledge.encoder.query_prompt='ask: '"]))
    objective = aim(system, gamma=0.3, divide_by="sqrt_d")
    assert objective.gamma == pytest.approx(0.3 * math.sqrt(32))
    system.retriever.encoder.save_query_tower(tmp_path / "tuned", gamma=objective.gamma)
    assert read_manifest(tmp_path / "tuned", "query encoder")["gamma"] == pytest.approx(objective.gamma)
    query = f"retriever.query_encoder={tmp_path / 'tuned'}"
    tuned = RAG.open(load_recipe(folder / "small.yaml", [query, "retriever.index=dense"]))  # another query tower is welcome
    assert tuned.retriever.temperature == pytest.approx(objective.gamma)
    assert tuned.retriever.encoder._prompt("query") == "ask: "
    hits = tuned.retriever.retrieve(["who built the tower"], 3)
    scores = torch.tensor([hit.score for hit in hits[0]])
    prior = tuned.retriever.prior(["who built the tower"], hits)[0]
    assert torch.allclose(prior, (scores / objective.gamma).log_softmax(-1), atol=1e-4)
    said = RAG.open(load_recipe(folder / "small.yaml", [query, "retriever.prior.temperature=0.7"]))
    assert said.retriever.temperature == pytest.approx(0.7)
    assert aim(tuned).gamma == pytest.approx(objective.gamma)  # tuning it again begins where it was
    foreign = tiny.sentence_encoder(tmp_path / "foreign", seed=9)
    with pytest.raises(IndexMismatch, match="was tuned against passage encoder"):
        Encoder.open(EncoderSettings(model=str(foreign)), query_encoder=tmp_path / "tuned")
    with pytest.raises(IndexMismatch, match="was built by encoder"):
        RAG.open(load_recipe(folder / "small.yaml", [f"knowledge.encoder.model={foreign}"]))
    dot = tiny.sentence_encoder(tmp_path / "dot", similarity="dot")  # the same weights, compared otherwise
    with pytest.raises(IndexMismatch, match=r"cosine\), not by .* dot\)"):
        RAG.open(load_recipe(folder / "small.yaml", [f"knowledge.encoder.model={dot}"]))


# Warnings before the first step.
def test_flat_targets_and_useless_priors_are_told(system: RAG, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    objective = aim(system, target="prob", tau=0.01, gamma=0.3)
    sums = np.array([-120.0, -100.0, -130.0, -110.0, -115.0], dtype=np.float32)
    rows = [LsrRow(f"who built {n}", np.arange(5) + n, sums, 50) for n in range(8)]
    with caplog.at_level(logging.WARNING):
        objective.look(rows)
    assert "100 % of 8 lsr targets of objective are flat (target prob, tau 0.01)" in caplog.text
    assert "Lower its tau, or use mean_prob." in caplog.text
    caplog.clear()
    for gamma, word in ((1e3, "flat with gamma 1000: lower objective.gamma"), (1e-6, "certain with gamma 1e-06: raise")):
        with caplog.at_level(logging.WARNING):
            aim(system, target="mean_prob", tau=0.01, gamma=gamma).look(rows)
        assert word in caplog.text
        assert "lsr targets" not in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        aim(system, target="mean_prob", tau=0.01, gamma=float(_middle(system, rows))).look(rows)
    assert not caplog.text


SHORT, LONG = [-2.3, -0.5, -1.2, -2.3, -2.3], [-120.0, -100.0, -130.0, -110.0, -115.0]  # of 3 tokens, and of 50


@pytest.mark.parametrize(
    ("halves", "tasks", "corpus_halves", "told"),
    [
        (LONG, SHORT, {"target": "prob"}, ["6 lsr targets of objective.corpus_halves are flat (target prob, tau 0.01)"]),
        (LONG, SHORT, {"target": "mean_logprob", "tau": 50.0},
         ["6 lsr targets of objective.corpus_halves are flat (target mean_logprob, tau 50.0)"]),
        (SHORT, LONG, {"target": "mean_prob"}, ["10 lsr targets of objective are flat (target prob, tau 0.01)"]),
        (LONG, LONG, {"target": "prob", "tau": 0.02}, ["10 lsr targets of objective are flat (target prob, tau 0.01)",
         "6 lsr targets of objective.corpus_halves are flat (target prob, tau 0.02)"]),
        (LONG, SHORT, {"target": "mean_prob"}, []),
        (LONG, SHORT, None, []),  # one target for all rows, and 6 of 16 are less than half
    ],
)  # fmt: skip
def test_a_flat_target_is_told_by_its_own_name(
    halves: list[float], tasks: list[float], corpus_halves: dict[str, Any] | None, told: list[str], system: RAG,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Six rows made from the corpus among ten questions: each source is judged by its own target and temperature."""
    kinds = [(CORPUS_HALVES, halves)] * 6 + [("tasks", tasks)] * 10
    random.Random(0).shuffle(kinds)
    rows = [
        LsrRow(f"who built {n}", np.arange(5) + n, np.array(sums, np.float32), 50 if sums is LONG else 3, source=source)
        for n, (source, sums) in enumerate(kinds)
    ]
    with caplog.at_level(logging.WARNING):
        aim(system, target="prob", tau=0.01, corpus_halves=corpus_halves).look(rows)
    said = [record.getMessage() for record in caplog.records if "lsr targets" in record.getMessage()]
    assert [line.partition(": they teach nothing")[0] for line in said] == [f"100 % of {line}" for line in told]


def _middle(system: RAG, rows: list[LsrRow]) -> float:
    """A γ at which the retriever is neither flat nor certain."""
    for gamma in np.geomspace(1e-4, 1, 40):
        priors = aim(system, gamma=float(gamma)).entropies(rows)[1]
        if ((priors > 0.02) & (priors < 0.98)).all():
            return float(gamma)
    raise AssertionError("no such gamma")


def test_flat_rows_can_be_skipped(system: RAG) -> None:
    sharp = LsrRow("who built a", np.arange(3), np.array([-0.1, -5.0, -5.0], np.float32), 1)
    flat = LsrRow("who built b", np.arange(3), np.full(3, -100.0, np.float32), 1)
    keep, skip = aim(system, k=3), aim(system, k=3, flat="skip")
    alone = keep.loss(keep.collate([sharp]))[0].item()
    value, figures = skip.loss(skip.collate([sharp, flat]))
    assert value.item() == pytest.approx(alone, abs=1e-6)
    assert figures["flat"].item() == 0.5
    assert keep.loss(keep.collate([sharp, flat]))[0].item() != pytest.approx(alone, abs=1e-3)
    nothing = skip.loss(skip.collate([flat]))[0]
    nothing.backward()
    assert nothing.item() == 0


# Evidence.
def test_any_answer_is_the_sum_of_their_probabilities(system: RAG, tmp_path: Path) -> None:
    asked, table = examples(system, 2), tmp_path / "scores"
    candidates = np.array([[0, 1, 2, 3, 4], [5, 6, 7, 8, -1]])
    for target in ("prob", "mean_prob"):
        settings = aim(system, target=target, answers="any").settings
        rows = preferred(asked, ["", ""], candidates, system, settings, table)
        log_q = lsr_target(
            torch.from_numpy(rows[0].answer_logprobs)[None], target=target, tau=0.01,
            answer_lengths=torch.tensor([rows[0].answer_length]),
        )  # fmt: skip
        each = []
        for row in candidates[0]:
            prompt = system.generator.prompt.render(asked[0].query, [system.retriever.base.corpus[int(row)]])
            own = [plain_logprobs(system.generator, prompt, answer) for answer in asked[0].answers]
            each.append(sum(math.exp(sum(a) / (len(a) if target == "mean_prob" else 1)) for a in own))
        assert log_q.exp()[0].tolist() == pytest.approx((torch.tensor(each) / 0.01).softmax(-1).tolist(), abs=1e-3)


@pytest.mark.parametrize("kind", ["bart", "llama"])
def test_left_out_asks_k_prompts_of_all_the_others(kind: str, system: RAG, tmp_path: Path) -> None:
    system.generator = made(kind, tmp_path)
    asked, corpus = examples(system, 1), system.retriever.base.corpus
    rows = preferred(asked, [""], np.array([[3, 4, 5, -1]]), system, aim(system, preset="loop").settings, tmp_path / "s")
    for place, others in enumerate(([4, 5], [3, 5], [3, 4])):
        prompt = system.generator.prompt.render(asked[0].query, [corpus[row] for row in others])
        wanted = -sum(plain_logprobs(system.generator, prompt, "odo"))
        assert rows[0].answer_logprobs[place] == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("kind", ["bart", "t5", "reader"])
def test_attention_is_that_of_the_models_own_layers(kind: str, system: RAG, tmp_path: Path) -> None:
    """A twin by loops: α computed anew from what goes into each layer's attention across."""
    generator = made(kind, tmp_path)
    passages = [system.retriever.base.corpus[row] for row in (0, 7, 2)]
    prompt = generator.prompt.render("who built the tower", passages)
    paid = passage_attention(generator, prompt, passages, "odo")
    assert paid.shape == (3,)
    assert (paid > 0).all()
    wanted = attention_twin(generator, prompt, "odo")
    spans = spans_twin(generator, prompt, passages)
    assert paid.tolist() == pytest.approx([np.mean([wanted[i] for i in span]) for span in spans], rel=1e-4)
    system.generator = generator
    settings = aim(system, preset="adist", k=3).settings
    rows = preferred(examples(system, 1), [""], np.array([[0, 7, 2]]), system, settings, tmp_path / "s")
    assert not (tmp_path / "s").exists()
    assert rows[0].answer_logprobs.shape == (3,)
    assert generator.model.config._attn_implementation != "eager" or kind == "reader"


def attention_twin(generator: HFGenerator, prompt: Any, answer: str) -> np.ndarray:
    """Mean over layers, heads and answer tokens of softmax(QK/√d)‖V‖, by hooks on the projections."""
    kept: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
    names = {"encoder_attn.q_proj": "q", "encoder_attn.k_proj": "k", "encoder_attn.v_proj": "v", "EncDecAttention.q": "q"}
    names |= {"EncDecAttention.k": "k", "EncDecAttention.v": "v"}
    names |= {f"crossattention.self.{word}": word[0] for word in ("query", "key", "value")}
    handles = []
    for name, module in generator.model.named_modules():
        part = next((part for ending, part in names.items() if name.endswith(ending)), None)
        if part is not None:
            handles.append(module.register_forward_hook(lambda _, __, output, part=part: kept[part].append(output)))
    row = generator.row(prompt, answer)
    with torch.no_grad():
        batch = generator.collate([row])
        if generator.reader is not None:
            generator.model(**batch)
        else:
            decoder = torch.tensor([[*generator.prefix, *row["labels"][:-1]]])
            generator.model(input_ids=batch["input_ids"], decoder_input_ids=decoder)
    for handle in handles:
        handle.remove()
    heads, total = 2, []
    for q, k, v in zip(kept["q"], kept["k"], kept["v"], strict=True):
        for head in range(heads):
            size = q.shape[-1] // heads
            part = slice(head * size, (head + 1) * size)
            scale = 1.0 if "T5" in type(generator.model).__name__ else size**-0.5
            alpha = (q[0, len(generator.prefix) - 1 :, part] @ k[0, :, part].T * scale).softmax(-1)
            total.append((alpha * v[0, :, part].norm(dim=-1)).mean(0).numpy())
    return np.mean(total, axis=0)


def spans_twin(generator: HFGenerator, prompt: Any, passages: Sequence[Any]) -> list[list[int]]:
    """Places of a passage's tokens: its block, or those whose text, decoded one by one, is in its span."""
    if generator.reader is not None:
        opens = [i for i, token in enumerate(prompt.ids) if token == generator.tokenizer.cls_token_id]
        return [list(range(a, b)) for a, b in zip(opens, [*opens[1:], len(prompt.ids)], strict=True)]
    coded = generator.tokenizer(prompt.text, return_offsets_mapping=True)
    found = []
    for passage in passages:
        text = f"{passage.title} / {passage.text}"
        start = prompt.text.index(text)
        offsets = enumerate(coded["offset_mapping"])
        found.append([i for i, (a, b) in offsets if start <= a < b <= start + len(text)])
    return found


def test_attention_is_refused_where_there_is_none(system: RAG, tmp_path: Path) -> None:
    generator = made("llama", tmp_path)
    passages = [system.retriever.base.corpus[0]]
    with pytest.raises(GeneratorError, match=r"returns no cross-attention[\s\S]*sequence-to-sequence generator"):
        passage_attention(generator, generator.prompt.render("who", passages), passages, "odo")


def test_only_what_was_judged_is_compared(system: RAG, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    corpus = system.retriever.base.corpus
    asked = [
        Example("1", "who", grades={corpus[9].id: 3, corpus[1].id: 0}),
        Example("2", "who", ("odo",), relevant=(corpus[2].id,)),
        Example("3", "who", grades={corpus[4].id: 0}),  # one rejected passage says nothing of the others
        Example("4", "who", grades={corpus[4].id: 0, corpus[5].id: 0}),
        Example("6", "who", grades={corpus[4].id: 1, corpus[5].id: 1}),
        Example("5", "who", grades={corpus[n].id: 6 - n for n in range(6)}),  # more than K: the worst stays
    ]
    found = np.array([[0, 1, 2, 3], [0, 1, 2, -1], [4, 1, 2, 3], [4, 1, 2, 3], [4, 1, 2, 3], [9, 8, 7, 6]])
    settings = aim(system, target="given", tau=1.0, k=4).settings
    with caplog.at_level(logging.WARNING):
        rows = preferred(asked, [""] * 6, found, system, settings, tmp_path / "s")
    assert "1 of 6 questions have fewer than two candidates" in caplog.text
    assert "1 questions whose passages all have the same grade" in caplog.text
    assert [row.id for row in rows] == ["1", "2", "6", "5"]
    assert [row.candidates.tolist() for row in rows] == [[9, 1, -1, -1], [2, 0, 1, -1], [4, 5, 1, 2], [0, 1, 2, 5]]
    assert [row.answer_logprobs.tolist() for row in rows] == [[3, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [6, 5, 4, 1]]
    assert not (tmp_path / "s").exists()
    objective = aim(system, target="given", tau=1.0, k=4)
    log_q = objective._preferred(objective.collate(rows[:1]), torch.zeros(1, 4))
    assert log_q.exp()[0].tolist() == pytest.approx([*torch.tensor([3.0, 0.0]).softmax(-1).tolist(), 0, 0])
    with pytest.raises(CorpusError, match="none of 2 questions has two candidates to choose between"):
        preferred(asked[2:4], ["", ""], found[2:4], system, settings, tmp_path / "s")


def test_a_plan_has_the_held_out_favourites_in_it(system: RAG, tmp_path: Path) -> None:
    settings, asked = aim(system).settings, examples(system)
    unsaid = [Example("dev", "who built it", ("nobody in the corpus",))]
    plan = lsr_plan(asked, system, settings, tmp_path / "s", held_out=unsaid)
    assert plan.to_score == lsr_plan(asked, system, settings, tmp_path / "s").to_score + settings.k
    judged(unsaid, system, settings, tmp_path / "s")
    assert lsr_plan(asked, system, settings, tmp_path / "s", held_out=unsaid).on_disk == settings.k


def test_a_second_stage_takes_up_gamma_as_it_was(system: RAG) -> None:
    first = aim(system, target="mean_prob", gamma=0.02, divide_by="sqrt_d")
    system.retriever.encoder.gamma = first.gamma  # what the tuned tower's manifest keeps
    second = aim(system, target="mean_prob", divide_by="sqrt_d")
    assert (second.gamma, second.settings.gamma) == pytest.approx((first.gamma, 0.02))
    assert aim(system, target="mean_prob").gamma == pytest.approx(first.gamma)


def test_tasks_of_the_split_test_need_their_flag(system: RAG, tmp_path: Path) -> None:
    line = {"id": "1", "query": "who", "answers": ["odo"], "split": "test"}
    (tmp_path / "asked.jsonl").write_text(json.dumps(line) + "\n")
    data = LsrMixData(kind="lsr_mix", sources={"tasks": 1}, path=tmp_path / "asked.jsonl")
    with pytest.raises(CorpusError, match="allow_test"):
        lsr_examples(data, system, 0)
    assert len(lsr_examples(data.model_copy(update={"allow_test": True}), system, 0)) == 1


def test_grades_need_no_answer_in_a_questions_file(system: RAG, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    corpus = system.retriever.base.corpus
    lines = [
        {"id": "1", "query": "who", "grades": {corpus[0].id: 1, corpus[1].id: 0}},
        {"id": "2", "query": "when", "answers": ["1790"]},
    ]
    (tmp_path / "graded.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = QuestionData(kind="questions", path=tmp_path / "graded.jsonl")
    with caplog.at_level(logging.WARNING):
        found = lsr_examples(data, system, 0, graded=True)
    assert [example.id for example in found] == ["1"]
    assert "1 questions without a judged passage" in caplog.text
    mixed = LsrMixData(kind="lsr_mix", path=data.path)
    with pytest.raises(RecipeError, match="corpus_halves has none"):
        lsr_examples(mixed, system, 0, graded=True)


# Candidates.
def test_refreshed_candidates_are_the_tuned_encoders_and_only_new_pairs_are_scored(system: RAG, tmp_path: Path) -> None:
    table = tmp_path / "scores"
    objective = aim(system, target="mean_prob", tau=0.1, refresh=3, candidates="dense")
    rows = rows_of(system, objective, table)
    objective.prepare(rows, lambda: rows_of(system, objective, table), tmp_path / "kb")
    research = objective.research
    assert research is not None
    known = {(row.id, int(passage)) for row in rows for passage in row.candidates}
    lines = kept(table)
    before = [row.candidates.copy() for row in rows]
    with torch.no_grad():
        for p in system.retriever.encoder.query_tower.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    research.at(2)
    assert all((row.candidates == old).all() for row, old in zip(rows, before, strict=True))
    research.at(3)
    wanted = system.retriever.by("dense").search([row.query for row in rows], 5)[1]
    assert np.array_equal(np.stack([row.candidates for row in rows]), wanted)
    fresh = {(row.id, int(passage)) for row in rows for passage in row.candidates} - known
    assert fresh
    assert kept(table) == lines + len(fresh)
    research.at(6)  # nothing new is known, so nothing is asked
    assert kept(table) == lines + len(fresh)
    research.save(tmp_path / "candidates.npz")
    other = CandidateRefresh(rows_of(system, objective, table)[::-1][::-1], list, 3)
    other.rows = [LsrRow(row.query, old, row.answer_logprobs, 1, row.id) for row, old in zip(rows, before, strict=True)]
    other.restore(tmp_path / "candidates.npz")
    assert all((a.candidates == b.candidates).all() for a, b in zip(other.rows, rows, strict=True))
    assert [row.answer_length for row in other.rows] == [row.answer_length for row in rows]
    with pytest.raises(CheckpointError, match="candidates of 6 rows, and the stage has 5"):
        CandidateRefresh(rows[:5], list, 3).restore(tmp_path / "candidates.npz")


def test_workers_that_would_keep_old_candidates_are_refused(folder: Path) -> None:
    aimed = {"k": 4, "target": "mean_prob", "tau": 0.1, "refresh": 3}
    with pytest.raises(RecipeError, match=r"workers hold copies[\s\S]*dataloader_num_workers: 0"):
        train(recipe_of(folder, "workers", aimed, dataloader_num_workers=2))


def test_a_broken_off_run_goes_on_with_its_candidates(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aimed = {"k": 4, "target": "mean_prob", "tau": 0.1, "refresh": 3}
    straight = recipe_of(folder, "straight", aimed, max_steps=6, learning_rate=3e-2)
    broken = recipe_of(folder, "broken", aimed, max_steps=6, learning_rate=3e-2)
    train(straight)
    at = CandidateRefresh.at

    def breaks(self: CandidateRefresh, step: int) -> None:
        if step == 5:
            raise OSError("the power went")
        at(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(CandidateRefresh, "at", breaks)
        with pytest.raises(OSError, match="power"):
            train(broken)
    assert next((broken.run / "stages").iterdir()).joinpath("work", "checkpoint-4", "candidates.npz").is_file()
    train(broken)
    one, other = (load_file(result(r) / "query_encoder" / "model.safetensors") for r in (straight, broken))
    assert all(torch.allclose(value, other[name], atol=1e-4) for name, value in one.items())


def result(recipe: Recipe) -> Path:
    return next((recipe.run / "stages").iterdir()) / "result"


# The passage encoder learns, too.
def test_over_retrieval_is_plain_search_until_the_passage_tower_moves(system: RAG, caplog: pytest.LogCaptureFixture) -> None:
    queries = [example.query for example in examples(system)]
    plain = system.retriever.search(queries, 4)
    deep = StaleRetriever.of(system.retriever, over_retrieve=12)
    shallow = StaleRetriever.of(system.retriever, over_retrieve=None)
    objective = LsrObjective(deep, LsrSettings(kind="lsr", learn="both", k=4, over_retrieve=12))
    with caplog.at_level(logging.WARNING):
        for retriever in (deep, shallow):
            assert np.array_equal(retriever.search(queries, 4)[1], plain[1])
        assert not caplog.text  # nothing has moved
        with torch.no_grad():
            for p in system.retriever.encoder.passage_tower.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
        assert np.array_equal(shallow.search(queries, 4)[1], plain[1])
        assert caplog.text.count("the index is behind it") == 1
        shallow.search(queries, 4)
        assert caplog.text.count("the index is behind it") == 1
    pool = system.retriever.search(queries, 12)[1]
    texts = [passage_text(passage) for passage in system.retriever.base.corpus]
    fresh, asked = system.retriever.encoder.embed_passages(texts), system.retriever.encoder.embed_queries(queries)
    for found, own, query in zip(deep.search(queries, 4)[1], pool, asked, strict=True):
        best = own[np.argsort(-(fresh[own] @ query), kind="stable")[:4]]
        assert found.tolist() == best.tolist()
    assert objective.validate([HeldOut(queries[0], relevant=("p0",))])["mrr@10"] >= 0
    with pytest.raises(CheckpointError, match="the passage tower has learned"):
        system.retriever.encoder.save_query_tower(Path("never"))


def test_both_towers_have_gradients_and_the_plan_says_when_to_build(system: RAG, tmp_path: Path) -> None:
    system.retriever = StaleRetriever.of(system.retriever, over_retrieve=20)
    objective = aim(system, learn="both", over_retrieve=20, target="mean_prob", tau=0.1)
    rows = rows_of(system, objective, tmp_path / "s")
    loss, _ = objective.loss(objective.collate(rows))
    same = aim(system, target="mean_prob", tau=0.1)
    assert loss.item() == pytest.approx(same.loss(same.collate(rows))[0].item(), abs=1e-4)
    assert set(objective.parameters()) == {"query_encoder", "passage_encoder"}
    objective = aim(system, learn="both", over_retrieve=20, target="mean_prob", tau=0.1)
    objective.loss(objective.collate(rows))[0].backward()
    for part in objective.parameters().values():
        assert sum(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in part) >= 0.8 * len(part)
    due = refresh_due(((0, 1000, 500), (1000, None, 1000)))
    assert [step for step in range(1, 4001) if due(step)] == [500, 1000, 2000, 3000, 4000]


def test_both_towers_learn_through_train_and_bring_their_own_knowledge_base(folder: Path) -> None:
    aimed = {"k": 4, "target": "mean_prob", "tau": 0.1, "learn": "both", "refresh": 2, "refresh_index": [[0, None, 2]]}
    recipe = recipe_of(folder, "both", aimed)
    parts = train(recipe)
    assert parts.knowledge is not None
    opened = finished_parts(recipe)[-1][1].open(recipe)
    base, start = opened.retriever.base, KnowledgeBase.open(recipe.knowledge.path)
    assert base.version != start.version
    texts = [passage_text(passage) for passage in base.corpus]
    vectors = opened.retriever.encoder.embed_passages(texts)
    assert base.vectors.vectors(np.arange(len(texts))) == pytest.approx(vectors, abs=2e-2)
    assert not np.allclose(vectors, start.vectors.vectors(np.arange(len(texts))), atol=2e-2)
    with pytest.raises(IndexMismatch):
        opened.swap(recipe.knowledge.path)


# Validation.
def test_held_out_questions_are_judged_by_what_is_known_of_them(
    system: RAG, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = system.retriever.base.corpus
    miller = corpus[4].text.split()[6]
    known = Example("1", f"who built {corpus[3].title}", ("x",), (corpus[3].id,))
    said = Example("2", f"who built {corpus[4].title}", (miller,))
    unsaid = Example("3", "who built", ("nobody knows",))
    with caplog.at_level(logging.INFO):
        rows = judged([known, said, unsaid, Example("4", "who?")], system, aim(system).settings, tmp_path / "s")
    assert [row.by for row in rows] == ["passages", "answers", "favourite"]
    assert "judged by favourite: 1" in caplog.text
    candidates = system.retriever.search([unsaid.query], 5)[1][0]
    prompts = [system.generator.prompt.render(unsaid.query, [corpus[int(row)]]) for row in candidates]
    sums = [sum(plain_logprobs(system.generator, prompt, "nobody knows")) for prompt in prompts]
    assert rows[2].relevant == (corpus[int(candidates[int(np.argmax(sums))])].id,)
    objective = aim(system)
    figures = objective.validate(rows)
    assert {name: value for name, value in figures.items() if name.startswith("judged")} == pytest.approx(
        {"judged_by_passages": 1 / 3, "judged_by_answers": 1 / 3, "judged_by_favourite": 1 / 3}
    )
    dense = system.retriever.by("dense")
    ranking = [hit.passage.text for hit in dense.retrieve([said.query], 10)[0]]
    rank = next((place for place, text in enumerate(ranking, 1) if miller in text.split()), None)
    assert objective.validate(rows[1:2])["mrr@10"] == pytest.approx(1 / rank if rank else 0)
    assert objective.validate(rows[1:2])["recall@1"] == float(rank == 1)


def test_mrr_of_worked_ranks(system: RAG) -> None:
    """Ranks 1, 3, none, 2 → .458333, by a real search."""
    queries = [example.query for example in examples(system, 4)]
    found = system.retriever.by("dense").search(queries, 30)[1]
    corpus = system.retriever.base.corpus
    rows = [HeldOut(q, relevant=(corpus[int(own[at])].id,)) for q, own, at in zip(queries, found, (0, 2, 20, 1), strict=True)]
    assert aim(system).validate(rows)["mrr@10"] == pytest.approx(0.458333, abs=1e-6)


def test_the_best_step_is_kept_and_patience_counts_evaluations(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures rise and then fall; training stops two evaluations after the best and gives its weights back."""
    wanted = iter([0.2, 0.5, 0.3, 0.4, 0.9])
    towers: list[dict[str, Tensor]] = []

    def figure(self: LsrObjective, rows: Sequence[Any]) -> dict[str, float]:
        towers.append(learned(self.towers["query_encoder"]))
        return {"mrr@10": next(wanted)}

    monkeypatch.setattr(LsrObjective, "validate", figure)
    aimed = {"k": 4, "target": "mean_prob", "tau": 0.1, "patience": 2}
    recipe = recipe_of(folder, "patient", aimed, max_steps=20, eval_steps=1, save_steps=1)
    parts = train(recipe)
    manifest = read_manifest(result(recipe), "stage")
    assert (manifest["steps"], manifest["best_step"], len(towers)) == (4, 2, 4)
    kept = parts.open(recipe).retriever.encoder.query_tower
    best = dict(kept.named_parameters())
    assert all(torch.allclose(value, best[name], atol=1e-6) for name, value in towers[1].items())
    assert any(not torch.allclose(value, best[name], atol=1e-6) for name, value in towers[3].items())
    told = manifest["settings"]["objective"]
    assert (told["tau"], told["gamma"], told["loss"], told["direction"]) == (0.1, 0.05, "divergence", "student_first")


def test_patience_without_evaluations_is_refused(folder: Path) -> None:
    recipe = recipe_of(folder, "impatient", {"k": 4, "patience": 2})
    data = recipe.stages["find"].data.model_copy(update={"dev": None})  # type: ignore[union-attr]
    stage = recipe.stages["find"].model_copy(update={"data": data})
    with pytest.raises(RecipeError, match="patience waits for a better evaluation"):
        train(recipe.model_copy(update={"stages": {"find": stage}}))


# Counters.
def test_epochs_cost_no_call_and_no_passage_and_other_settings_neither(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, encoded, steps = [], [], []
    scored, embedded, loss = HFGenerator.token_logprobs, Encoder.embed_passages, LsrObjective.loss

    def scores(self: HFGenerator, prompts: Any, *rest: Any, **more: Any) -> Any:
        asked.append((len(prompts), len(steps)))
        return scored(self, prompts, *rest, **more)

    def embeds(self: Encoder, *rest: Any, **more: Any) -> Any:
        encoded.append(len(steps))
        return embedded(self, *rest, **more)

    def losses(self: LsrObjective, *rest: Any, **more: Any) -> Any:
        steps.append(1)
        return loss(self, *rest, **more)

    for owner, name, spy in (
        (HFGenerator, "token_logprobs", scores), (Encoder, "embed_passages", embeds), (LsrObjective, "loss", losses),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, spy)
    shared = {"max_steps": -1, "num_train_epochs": 2, "save_steps": 100}
    train(recipe_of(folder, "counted", {"k": 4, "target": "prob"}, **shared))
    assert len(steps) == 2 * 5
    assert sum(rows for rows, _ in asked) == 40 * 4  # each question with each candidate, once
    assert all(at == 0 for _, at in asked)  # before the first step
    assert not encoded
    table = folder / "runs" / "counted" / "scores"
    asked.clear()
    for n, change in enumerate(
        ({"target": "mean_logprob", "tau": 0.2}, {"gamma": 0.5}, {"direction": "target_first"}, {"k": 3}, {"preset": "emdr2"})
    ):
        recipe = recipe_of(folder, f"counted{n}", {"k": 4, "target": "prob", **change}, max_steps=1, save_steps=100)
        recipe.run.mkdir(parents=True)
        shutil.copytree(table, recipe.run / "scores")
        train(recipe)
    assert not asked
    assert not encoded


def test_losses_figures_and_the_gradients_norm_are_in_the_log(folder: Path) -> None:
    """The first step's line is what a backward pass of its rows gives; each line has all of it."""
    aimed = {"k": 4, "target": "mean_prob", "tau": 0.1}
    recipe = recipe_of(folder, "logged", aimed, max_steps=3, save_steps=100, train_sampling_strategy="sequential")
    train(recipe)
    told = json.loads((result(recipe).parent / "log.json").read_text())
    lines = [line for line in told if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    system = RAG.open(recipe)
    objective = aim(system, candidates="dense", **aimed)
    asked = load_examples(recipe.stages["find"].data.path, system.retriever.base.corpus)  # type: ignore[union-attr, arg-type]
    rows = rows_of(system, objective, recipe.run / "scores", asked)
    loss, figures = objective.loss(objective.collate(rows[:8]))
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in objective.parameters()["query_encoder"] if p.grad is not None))
    wanted = {"loss": loss.item(), "grad_norm": norm, **{name: float(value) for name, value in figures.items()}}
    assert {name: lines[0][name] for name in wanted} == pytest.approx(wanted, abs=1e-3)
    assert set(figures) == {"target_entropy", "entropy", "flat", "agreement"}
    assert all(line["grad_norm"] > 0 and set(wanted) <= set(line) for line in lines)


# It learns.
def test_the_toy_goes_from_two_nats_to_nothing(system: RAG) -> None:
    """Four questions, eight passages each, one of them wanted: a loop whose scores carry a gradient gets there."""
    objective = aim(system, k=8, target="given", tau=0.1, gamma=0.01, direction="target_first")
    chance = np.random.default_rng(0)
    rows = [
        LsrRow(example.query, chance.permutation(30)[:8], np.eye(8, dtype=np.float32)[chance.integers(8)], 1)
        for example in examples(system, 4)
    ]
    optimiser = torch.optim.Adam(objective.parameters()["query_encoder"], lr=3e-3)
    losses = []
    for _ in range(150):
        loss, _ = objective.loss(objective.collate(rows))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert 1.5 < losses[0] < 3
    assert losses[-1] < 0.05


def paragraphs(vessen: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Passages and questions of the example corpus' Markdown and text files: a paragraph a passage."""
    passages = []
    for path in sorted((vessen / "documents").rglob("*.*")):
        if path.suffix in (".md", ".txt"):
            name = str(path.relative_to(vessen / "documents"))
            parts = [" ".join(part.split()) for part in path.read_text(encoding="utf-8").split("\n\n")]
            passages += [{"id": f"{name}#{n}", "title": "", "text": part} for n, part in enumerate(parts) if len(part) > 60]
    questions = []
    for split in ("train", "heldout"):
        for line in (vessen / "questions" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            quotes = ["".join(item["quote"].split()) for item in row["relevant"]]
            holders = [p["id"] for p in passages if any(q and q in "".join(p["text"].split()) for q in quotes)]
            if holders:
                questions.append({"id": row["id"], "query": row["query"], "answers": row["answers"], "relevant": holders})
    return passages, questions


@pytest.fixture(scope="module")
def real_text(folder: Path, tmp_path_factory: pytest.TempPathFactory, vessen: Path) -> Recipe:
    """The example corpus under two untaught models that share a vocabulary: a random bag of words, where every word counts
    alike, searches it; a reader without layers, which can do nothing but copy, is asked for likelihoods.
    """
    path = tmp_path_factory.mktemp("real")
    passages, questions = paragraphs(vessen)
    random.Random(0).shuffle(questions)
    (path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages))
    for split, part in (("train", questions[60:]), ("dev", questions[:60])):
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    words = tiny.bag_of_words(path / "words", [row["text"] for row in passages + [{"text": q["query"]} for q in questions]])
    for part in reader_from_encoder(str(path / "words" / "bert"), decoder_layers=0):
        part.save_pretrained(str(path / "copier"))
    recipe = yaml.safe_load((folder / "small.yaml").read_text().replace("encoder/encoder", str(words)))
    recipe["generator"]["model"], recipe["prompt"]["max_tokens"] = "copier", 250
    recipe["knowledge"]["indexes"] = {"dense": {"kind": "dense"}}
    (path / "real.yaml").write_text(yaml.safe_dump(recipe))
    loaded = load_recipe(path / "real.yaml")
    build_knowledge(loaded.knowledge)
    return loaded


@pytest.mark.parametrize(
    "settings",
    [
        {"target": "mean_prob", "tau": 0.01, "k": 8, "gamma": 0.1},  # the language model's own word, by the paper's loss
        {"target": "given", "tau": 0.1, "k": 30, "gamma": 0.05, "direction": "target_first"},  # people's grades
    ],
    ids=lambda settings: str(settings["target"]),
)
def test_it_lifts_held_out_search_on_real_text_and_shuffled_targets_do_not(settings: dict[str, Any], real_text: Recipe) -> None:
    """Which words of a question matter is learned from what a passage does for its answer, and not from the search itself."""
    objective = json.dumps({"kind": "lsr", **settings})
    arguments = f"num_train_epochs: 4, learning_rate: 3e-2, lr_scheduler_type: constant, weight_decay: 0, {PLAIN}"
    last = "save_strategy: 'no', eval_strategy: 'no'"  # no step is chosen by what is measured
    recipe = over(real_text, f"stages.find.objective={objective}", f"stages.find.train={{{arguments}, {last}}}")
    before, after = (held_out_search(parts, recipe) for parts in (Parts(), train(recipe)))
    shuffled = learned_from_shuffled_targets(recipe, settings)
    assert after["mrr@10"] > before["mrr@10"] + 0.03
    assert after["recall@1"] > before["recall@1"]
    assert shuffled["mrr@10"] < before["mrr@10"] + 0.02


PLAIN = "bf16: false, per_device_train_batch_size: 32, warmup_steps: 0, logging_steps: 1"


def over(recipe: Recipe, *changes: str) -> Recipe:
    """The recipe of real text with changes; stages are told apart by them, and share their scores."""
    return load_recipe(recipe.knowledge.path.parent / "real.yaml", list(changes))


def held_out_search(parts: Parts, recipe: Recipe) -> dict[str, float]:
    """MRR and recall of the held-out questions, by a real search with these parts."""
    system = parts.open(recipe)
    return aim(system).validate(load_examples(recipe.stages["find"].data.dev, system.retriever.base.corpus))  # type: ignore[union-attr, arg-type]


def learned_from_shuffled_targets(recipe: Recipe, settings: dict[str, Any]) -> dict[str, float]:
    """Held-out figures after as much training with each row's targets shuffled over K, which no recipe can ask for."""
    system = RAG.open(recipe)
    corpus: Corpus = system.retriever.base.corpus
    data = recipe.stages["find"].data
    objective = aim(system, **settings)
    rows = rows_of(system, objective, recipe.run / "scores", load_examples(data.path, corpus))  # type: ignore[union-attr, arg-type]
    chance = np.random.default_rng(4)
    rows = [replace(row, answer_logprobs=chance.permutation(row.answer_logprobs)) for row in rows]
    optimiser = torch.optim.Adam(objective.parameters()["query_encoder"], lr=3e-2)
    for _ in range(4):
        order = chance.permutation(len(rows))
        for start in range(0, len(rows), 32):
            loss, _ = objective.loss(objective.collate([rows[at] for at in order[start : start + 32]]))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return objective.validate(load_examples(data.dev, corpus))  # type: ignore[union-attr, arg-type]


def test_a_tuned_generator_finds_held_out_answers_likelier_on_real_text(real_text: Recipe) -> None:
    """LM-ft, a row a passage: the held-out loss ends below that of the untuned one, in the log and when it is opened again."""
    tiny.llama(real_text.knowledge.path.parent / "llama")
    data = "{kind: questions, path: train.jsonl, dev: dev.jsonl, source: retrieved, passages: 3, passages_a_row: 1}"
    arguments = f"max_steps: 12, learning_rate: 1e-2, {PLAIN}, eval_on_start: true, eval_strategy: steps, eval_steps: 12"
    stages = f"stages={{read: {{data: {data}, objective: {{kind: answer}}, train: {{{arguments}}}}}}}"
    recipe = over(real_text, stages, "generator.model=llama", "prompt.max_tokens=120")
    system = train(recipe).open(recipe)
    told = json.loads((result_of(recipe, "read").parent / "log.json").read_text())
    before, after = (line["eval_loss"] for line in told if "eval_loss" in line)
    assert after < 0.9 * before
    settings = recipe.stages["read"].data
    asked = load_examples(settings.dev, system.retriever.base.corpus)  # type: ignore[union-attr, arg-type]
    asked = learned_answers(asked, settings, system.retriever, 1)  # type: ignore[arg-type]
    rows = answer_rows(asked, settings, system.retriever, system.generator, 1)  # type: ignore[arg-type]
    assert AnswerObjective(system.generator).validate(rows)["loss"] == pytest.approx(after, rel=1e-3)


def result_of(recipe: Recipe, stage: str) -> Path:
    return next((recipe.run / "stages").glob(f"{stage}-*")) / "result"


def test_scores_cost_nothing_twice_in_one_table(system: RAG, tmp_path: Path) -> None:
    table = tmp_path / "scores"
    rows_of(system, aim(system, target="mean_prob"), table)
    again = ScoreTable(table, system.generator)
    again.complete([Pair(examples(system)[0].query, (system.retriever.base.corpus[0],), "odo")])
    before = again.calls
    rows_of(system, aim(system, preset="loop", k=3), table)  # prompts of two passages are other prompts
    lines = kept(table)
    assert lines > before
    rows_of(system, aim(system, preset="loop", k=3, tau=2.0, gamma=0.2), table)
    assert kept(table) == lines
