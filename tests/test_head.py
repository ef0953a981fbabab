"""From logits to the loss: large vocabularies, half precision, impossible words, every chunk size, memory, and smoothing as
the formula, torch and transformers have it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import RagTokenForGeneration

from raglan.generator import HFGenerator
from raglan.knowledge import build_knowledge
from raglan.likelihood import (
    chunked_token_logprobs,
    chunked_uniform_logprobs,
    marginal_logprob,
    passage_logprobs,
    passage_posterior,
    predictive_weights,
    reduced,
    token_posterior,
)
from raglan.objective.marginal import Scored
from raglan.rag import RAG
from raglan.recipe import load_recipe
from test_generator import made
from test_marginal import ROWS, batch, objective
from test_rag_decode import QUERIES, asked, contexts, theirs
from tiny import small_recipe

OVER = ["sequence", "token"]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> RAG:
    path = tmp_path_factory.mktemp("head")
    recipe = load_recipe(small_recipe(path), ["retriever.index=dense"])
    build_knowledge(recipe.knowledge)
    return RAG.open(recipe)


# A vocabulary of 150,000, scores near 75, half precision, impossible words.

WORDS, K, T = 150_000, 3, 2
NEAR_75 = [[75.0286, 74.4998, 74.0804]]


@pytest.fixture(scope="module")
def wide_logits() -> Tensor:
    torch.manual_seed(0)
    logits = 6 * torch.randn(K * T, WORDS)
    logits[:, ::7] = -torch.inf
    return logits


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_large_vocabulary_in_any_precision_is_near_float64(dtype: torch.dtype, over: str, wide_logits: Tensor) -> None:
    """The logits are rounded as the model rounds them; nothing is lost after that."""
    logits = wide_logits.to(dtype)
    targets, mask = torch.tensor([5, 149_999] * K), torch.ones(1, T, dtype=torch.bool)
    scores = torch.tensor(NEAR_75, requires_grad=True)
    prior = passage_logprobs(scores)
    each = chunked_token_logprobs(logits, lambda rows: rows, targets, chunk=4).view(1, K, T)
    weights = predictive_weights(prior, each, mask, over=over)
    uniform = chunked_uniform_logprobs(
        logits.view(K, T, WORDS).transpose(0, 1), lambda rows: rows, weights[0].T, chunk=4
    )  # fmt: skip
    loss = -(0.9 * marginal_logprob(prior, each, mask, over=over) + 0.1 * uniform.sum())
    loss.backward()

    exact = torch.tensor(NEAR_75, dtype=torch.float64, requires_grad=True)
    allowed = torch.isfinite(logits[0])
    words = logits.double().log_softmax(-1).view(K, T, WORDS)
    true_prior = exact[0].log_softmax(0)
    chosen = words.gather(-1, targets.view(K, T, 1))[..., 0]
    running = torch.stack([true_prior, (true_prior + chosen[:, 0]).log_softmax(0)], dim=1)
    w = running if over == "sequence" else true_prior[:, None].expand(K, T)
    own = (w + chosen).logsumexp(0).sum()
    spread = (w[:, :, None] + words[:, :, allowed]).logsumexp(0).mean(-1)
    true = -(0.9 * own + 0.1 * spread.sum())
    true.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(true.item(), rel=1e-5)
    assert scores.grad.double().tolist()[0] == pytest.approx(exact.grad.tolist()[0], abs=2e-5)


def test_scores_near_75_keep_their_ranks_whatever_runs_around_them(system: RAG) -> None:
    """bfloat16 knows 75.0 and 74.5 and nothing between: its prior merges what float32 keeps apart."""
    gaps = [75.0286, 74.9998, 74.9700, 74.9400]
    kept = passage_logprobs(torch.tensor([gaps])).exp()[0]
    true = torch.tensor(gaps, dtype=torch.float64).softmax(0)
    assert kept.double().tolist() == pytest.approx(true.tolist(), abs=1e-5)
    assert len(set(torch.tensor(gaps).bfloat16().tolist())) == 1
    aim = objective(system)
    aim.module.eval()
    plain, _ = aim._picked(batch(aim), torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = aim._picked(batch(aim), torch.device("cpu"))
    assert inside.dtype == torch.float32
    assert torch.allclose(inside, plain, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("over", OVER)
def test_answers_of_probability_e_to_the_minus_2000(over: str, dtype: torch.dtype) -> None:
    """Nothing underflows: value, posterior and gradient are those of the differences."""
    scores = torch.zeros(1, 2, dtype=dtype, requires_grad=True)
    each = torch.tensor([[[-1200.0, -800.0], [-1201.0, -800.0]]], dtype=dtype)
    mask, prior = torch.ones(1, 2, dtype=torch.bool), passage_logprobs(scores)
    value = marginal_logprob(prior, each, mask, over=over)
    (-value).sum().backward()
    near = 1 / (1 + math.exp(-1))  # of the nearer passage
    assert value.item() == pytest.approx(-2000.379885, abs=1e-6 if dtype == torch.float64 else 2e-4)
    posterior = passage_posterior(prior, each, mask) if over == "sequence" else token_posterior(prior, each, mask)[:, :, 0]
    exactly = 1e-9 if dtype == torch.float64 else 1e-4  # float32 has steps of 1.2e-4 at 2000
    assert posterior[0].tolist() == pytest.approx([near, 1 - near], abs=exactly)
    assert scores.grad[0].tolist() == pytest.approx([0.5 - near, near - 0.5], abs=exactly)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("over", OVER)
def test_an_answer_that_is_impossible_with_some_passages(over: str, epsilon: float) -> None:
    """−inf in token_logprobs of a present passage is a probability of 0, with a finite gradient: that of the probabilities."""
    chances = [
        [[0.4, 0.5, 0.1], [0.0, 0.7, 0.3], [0.2, 0.2, 0.6]],  # (K,T,V); the answer is word 0 three times
        [[0.1, 0.8, 0.1], [0.6, 0.1, 0.3], [0.3, 0.3, 0.4]],
        [[0.2, 0.2, 0.6], [0.3, 0.3, 0.4], [0.0, 0.9, 0.1]],
    ]
    each_word = torch.tensor(chances, dtype=torch.float64)
    logits = each_word.log().requires_grad_()
    scores = torch.tensor([[0.3, -0.1, 0.2]], dtype=torch.float64, requires_grad=True)
    prior, mask = passage_logprobs(scores), torch.ones(1, 3, dtype=torch.bool)
    targets = torch.zeros(9, dtype=torch.long)
    each = chunked_token_logprobs(logits.flatten(0, 1), lambda rows: rows, targets, chunk=4).view(1, 3, 3)
    weights = predictive_weights(prior, each, mask, over=over)
    uniform = chunked_uniform_logprobs(logits.transpose(0, 1), lambda rows: rows, weights[0].T, chunk=4)
    value = (1 - epsilon) * marginal_logprob(prior, each, mask, over=over).sum() + epsilon * uniform.sum()
    value.backward()

    exact = torch.tensor([0.3, -0.1, 0.2], dtype=torch.float64, requires_grad=True)
    first = share = exact.softmax(0)
    true = torch.zeros((), dtype=torch.float64)
    for t in range(3):
        mixture = share @ each_word[:, t]
        true = true + (1 - epsilon) * mixture[0].log() + epsilon * mixture.log().mean()
        share = share * each_word[:, t, 0] / mixture[0] if over == "sequence" else first
    true.backward()
    assert value.item() == pytest.approx(true.item(), abs=1e-12)
    assert scores.grad[0].tolist() == pytest.approx(exact.grad.tolist(), abs=1e-12)
    assert torch.isfinite(logits.grad).all()


# The head in chunks.


def mixed(hidden: Tensor, head: Callable[[Tensor], Tensor], log_w: Tensor) -> Tensor:
    """The uniform term by full logits: (N,K,D), (N,K) → (N,)."""
    return (log_w[:, :, None] + head(hidden).log_softmax(-1)).logsumexp(1).mean(-1)


@pytest.mark.parametrize("chunk", [*range(1, 17), 40])
def test_every_chunk_size_gives_the_full_logits_value_and_gradients(chunk: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(5, 3, 6, dtype=torch.float64, requires_grad=True)
    log_w = torch.randn(5, 3, dtype=torch.float64).log_softmax(-1).requires_grad_()
    head, targets = nn.Linear(6, 13).double(), torch.randint(13, (15,))
    wanted = [hidden, log_w, head.weight, head.bias]

    def total(each: Tensor, uniform: Tensor) -> Tensor:
        return each.sin().sum() + uniform.cos().sum()

    full = head(hidden).log_softmax(-1).flatten(0, 1).gather(-1, targets[:, None])[:, 0]
    true = total(full, mixed(hidden, head, log_w))
    ours = total(
        chunked_token_logprobs(hidden.flatten(0, 1), head, targets, chunk=chunk),
        chunked_uniform_logprobs(hidden, head, log_w, chunk=chunk),
    )
    assert ours.item() == pytest.approx(true.item(), abs=1e-12)
    pulls = zip(torch.autograd.grad(ours, wanted), torch.autograd.grad(true, wanted), strict=True)
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in pulls)


def by_full_logits(generator: HFGenerator, states: dict[str, Tensor], passages: int) -> Tensor:
    """token_logprobs (B,K,T) of collated rows by the model's own logits."""
    labels = states["labels"]
    if generator.is_seq2seq:
        before = torch.cat([torch.tensor(generator.prefix).expand(len(labels), -1), labels[:, :-1].clamp_min(0)], dim=1)
        inputs = {name: states[name] for name in ("input_ids", "attention_mask")}
        logits = generator.model(**inputs, decoder_input_ids=before).logits[:, len(generator.prefix) - 1 :]
    else:
        lengths = states["attention_mask"].sum(1)
        rows = [
            generator.model(input_ids=torch.cat([ids[:n], own.clamp_min(0)])[None]).logits[0, n - 1 : -1]
            for ids, n, own in zip(states["input_ids"], lengths.tolist(), labels, strict=True)
        ]
        logits = torch.stack(rows)
    each = logits.log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    return each.unflatten(0, (-1, passages))


@pytest.mark.parametrize("kind", ["bart", "t5", "llama"])
def test_every_parameters_gradient_is_that_of_full_logits(kind: str, tmp_path: Path) -> None:
    generator = made(kind, tmp_path)
    question = asked(QUERIES[:2], [[0, 1], [2, 3]])
    prompts = [prompt for row in question.prompts(generator.prompt) for prompt in row]
    answers = [answer for answer in ("odo marrack", "1790") for _ in range(2)]
    states = generator.collate([generator.row(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)])
    prior, mask = torch.tensor([[0.2, -0.1], [0.0, 1.0]]).log_softmax(-1), (states["labels"] >= 0)[::2]

    def pulls(each: Tensor) -> tuple[float, list[Tensor]]:
        generator.model.zero_grad()
        loss = -sum(marginal_logprob(prior, each, mask, over=over).sum() for over in ("sequence", "token"))
        loss.backward()
        return loss.item(), [p.grad.clone() for p in generator.model.parameters()]

    value, wanted = pulls(by_full_logits(generator, states, 2))
    rows = int((states["labels"] >= 0).sum())
    for chunk in (1, 3, rows - 1, rows, rows + 1):
        generator.settings = generator.settings.model_copy(update={"head_chunk": chunk})
        ours, found = pulls(generator.forward(states).unflatten(0, (-1, 2)))
        assert ours == pytest.approx(value, rel=1e-5)
        for one, other in zip(found, wanted, strict=True):
            assert float((one - other).norm()) <= 1e-4 * float(other.norm()) + 1e-6


def peak(step: Callable[[], Any]) -> int:
    """The most bytes of tensors that were alive at once during a step, beyond what was alive before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        step()
    taken = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    most = total = 0
    for event in sorted(taken, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


@pytest.mark.parametrize("smoothing", [False, True])
def test_peak_memory_is_one_chunk_however_many_tokens(smoothing: bool) -> None:
    words, width, chunk = 8000, 16, 24
    head = nn.Linear(width, words)

    def step(tokens: int) -> Callable[[], None]:
        hidden, targets = torch.randn(tokens, K, width, requires_grad=True), torch.zeros(tokens * K).long()

        def run() -> None:
            each = chunked_token_logprobs(hidden.flatten(0, 1), head, targets, chunk=chunk)
            loss = each.sum()
            if smoothing:
                loss = loss + chunked_uniform_logprobs(hidden, head, torch.zeros(tokens, K).log_softmax(-1), chunk=chunk).sum()
            loss.backward()
            head.zero_grad()

        return run

    def full() -> None:
        hidden = torch.randn(200, K, width, requires_grad=True)
        head(hidden).log_softmax(-1)[..., 0].sum().backward()
        head.zero_grad()

    few, many = peak(step(50)), peak(step(200))
    whole = 4 * 200 * K * words  # one tensor of all answer tokens and all words
    assert peak(full) > whole  # the measure sees what it is to see
    assert many < few + 40 * 200 * K * width  # the states and their like
    assert many < whole / 2


# Label smoothing.


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("kind", ["bart", "llama"])
def test_no_smoothing_is_the_plain_path_to_the_bit(kind: str, over: str, system: RAG, tmp_path: Path) -> None:
    generator = made(kind, tmp_path)
    none = objective(system, generator=generator, over=over, label_smoothing=0.0)
    some = objective(system, generator=generator, over=over, label_smoothing=0.1)
    plain, smooth = (aim.module.eval()(batch(aim)) for aim in (none, some))
    assert plain.uniform is None  # Σ over the words is never formed
    assert smooth.uniform is not None
    assert torch.equal(plain.token_logprobs, smooth.token_logprobs)
    by_hand = reduced(
        -marginal_logprob(plain.doc_logprobs, plain.token_logprobs, plain.answer_mask, over=over), plain.answer_mask,
        reduction="token",
    )  # fmt: skip
    assert torch.equal(none.loss(batch(none))[0], by_hand)


def test_smoothing_of_one_passage_is_torchs_in_value_and_gradient(system: RAG, tmp_path: Path) -> None:
    generator = made("bart", tmp_path)
    aim = objective(system, generator=generator, learn=("generator",), k=1, label_smoothing=0.1, reduction="token")
    aim.module.eval()
    hits = system.retriever.retrieve([query for query, _ in ROWS], 1)
    rows = [
        generator.row(generator.prompt.render(query, [found[0].passage]), answer)
        for (query, answer), found in zip(ROWS, hits, strict=True)
    ]
    states = generator.collate(rows)
    labels = states["labels"]
    before = torch.cat([torch.tensor(generator.prefix).expand(len(labels), -1), labels[:, :-1].clamp_min(0)], dim=1)
    inputs = {name: states[name] for name in ("input_ids", "attention_mask")}
    logits = generator.model(**inputs, decoder_input_ids=before).logits[:, len(generator.prefix) - 1 :]
    found = []
    for loss in (
        nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1),
        aim.loss(batch(aim))[0],
    ):
        generator.model.zero_grad()
        loss.backward()
        found.append((loss.item(), [p.grad.clone() for p in generator.model.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert float((one - other).norm()) <= 1e-4 * float(one.norm()) + 1e-6


@pytest.mark.parametrize("documents", [1, 3])
@pytest.mark.parametrize("epsilon", [0.1, 0.4])
def test_smoothing_over_tokens_is_transformers(epsilon: float, documents: int, system: RAG, tmp_path: Path) -> None:
    generator = made("bart", tmp_path)
    generator.prefix = [1]  # theirs trains from <s> alone
    hits = [list(range(documents)), [(k + 1) % 4 for k in range(documents)]]
    ids, mask, _ = contexts(generator, asked(QUERIES[:2], hits), same_length=False)
    labels = torch.tensor([[20, 31, 42, 2], [50, 61, 9, 2]])
    model = theirs(RagTokenForGeneration, generator, documents)
    model.config.label_smoothing = epsilon
    aim = objective(system, generator=generator, over="token", label_smoothing=epsilon, reduction="sum")
    aim.module.eval()
    found = []
    for ours in (False, True):
        model.zero_grad()
        scores = torch.linspace(-1, 1, 2 * documents).reshape(2, documents).requires_grad_()
        if ours:
            states = {"input_ids": ids, "attention_mask": mask, "labels": labels.repeat_interleave(documents, 0)}
            every = torch.ones(2, documents, dtype=torch.bool)
            scored: Scored = aim._smoothed(scores.log_softmax(-1), states, every, labels, np.zeros((2, documents), int))
            loss = -((1 - epsilon) * aim._marginal(scored) + epsilon * scored.uniform.sum(-1)).sum()
        else:
            loss = model(
                context_input_ids=ids, context_attention_mask=mask, doc_scores=scores, n_docs=documents, reduce_loss=True,
                labels=torch.cat([torch.ones(2, 1, dtype=torch.long), labels], dim=1),
            ).loss  # fmt: skip
        loss.backward()
        gradients = [p.grad.clone() for p in generator.model.parameters() if p.grad is not None]
        found.append((loss.item(), scores.grad, gradients))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert torch.allclose(found[1][1], found[0][1], atol=1e-4)
    for one, other in zip(found[0][2], found[1][2], strict=True):
        assert float((one - other).norm()) <= 1e-4 * float(one.norm()) + 1e-5
