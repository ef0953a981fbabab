"""RAG-Sequence and RAG-Token: worked examples, plain-Python twins, closed-form gradients, label smoothing, turns."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import Tensor

from raglan.likelihood import (
    attribution,
    chunked_token_logprobs,
    chunked_uniform_logprobs,
    marginal_logprob,
    passage_logprobs,
    passage_posterior,
    predictive_weights,
    reduced,
    sequence_logprob,
    token_logprob,
    token_posterior,
    turn_logprobs,
    turn_marginal,
    turn_prior,
)

SCORES = [1.0, 0.5, -0.5]
TABLE = [[0.50, 0.40, 0.90], [0.20, 0.70, 0.60], [0.10, 0.10, 0.30]]
OVER = ("sequence", "token")


def double(values: object, *, grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def twin(prior: list[float], table: list[list[float]], mask: list[int], over: str) -> float:
    """−log p(y|x) by loops over plain numbers; a passage with prior 0 is never looked at."""
    tokens = [t for t, kept in enumerate(mask) if kept]
    passages = [k for k, p in enumerate(prior) if p > 0]
    if over == "sequence":
        return -math.log(sum(prior[k] * math.prod(table[k][t] for t in tokens) for k in passages))
    return -sum(math.log(sum(prior[k] * table[k][t] for k in passages)) for t in tokens)


# Worked examples A, B, C, D: NLL by either method and its gradient on the scores.
@pytest.mark.parametrize(
    ("scores", "table", "over", "nll", "gradient"),
    [
        (SCORES, TABLE, "sequence", 2.066797, [-0.230592, 0.111531, 0.119062]),
        (SCORES, TABLE, "token", 2.133407, [-0.285784, 0.031242, 0.254542]),
        (SCORES, [row[:2] for row in TABLE], "sequence", 1.851897, [-0.149961, 0.035780, 0.114181]),
        (SCORES, [row[:2] for row in TABLE], "token", 1.815100, [-0.156078, -0.026810, 0.182888]),
        (SCORES, [row[:1] for row in TABLE], "sequence", 1.044779, [-0.230308, 0.143024, 0.087284]),
        (SCORES, [row[:1] for row in TABLE], "token", 1.044779, [-0.230308, 0.143024, 0.087284]),
        ([3.7], TABLE[1:2], "sequence", 2.476938, [0.0]),
        ([3.7], TABLE[1:2], "token", 2.476938, [0.0]),
    ],
)
def test_worked_values_and_gradients(scores: list, table: list, over: str, nll: float, gradient: list) -> None:
    leaf = double([scores], grad=True)
    value = -marginal_logprob(passage_logprobs(leaf), double([table]).log(), ones(1, len(table[0])), over=over)
    value.sum().backward()
    assert value.item() == pytest.approx(nll, abs=1e-6)
    assert leaf.grad[0].tolist() == pytest.approx(gradient, abs=1e-6)


def test_worked_posteriors() -> None:
    prior, table = passage_logprobs(double([SCORES])), double([TABLE]).log()
    assert prior.exp()[0].tolist() == pytest.approx([0.546549, 0.331499, 0.121952], abs=1e-6)
    assert passage_posterior(prior, table, ones(1, 3))[0].tolist() == pytest.approx([0.777142, 0.219968, 0.002890], abs=1e-6)
    by_token = token_posterior(prior, table, ones(1, 3))
    assert by_token[0].flatten().tolist() == pytest.approx(
        [0.776857, 0.472319, 0.676256, 0.188475, 0.501333, 0.273447, 0.034668, 0.026347, 0.050298], abs=1e-6
    )
    assert attribution(by_token, ones(1, 3)).sum().item() == pytest.approx(1)
    weights = predictive_weights(prior, table, ones(1, 3), over="sequence").exp()
    assert weights[0].flatten().tolist() == pytest.approx(
        [0.546549, 0.776857, 0.696511, 0.331499, 0.188475, 0.295719, 0.121952, 0.034668, 0.007771], abs=1e-6
    )
    steps = (weights * table.exp()).sum(1).log()
    assert steps[0].tolist() == pytest.approx([-1.044779, -0.807118, -0.214900], abs=1e-6)
    assert steps.sum().item() == pytest.approx(sequence_logprob(prior, table, ones(1, 3)).item(), abs=1e-12)


def test_worked_gradient_on_token_logprobs_is_the_posterior() -> None:
    table = double([TABLE]).log().requires_grad_()
    prior = passage_logprobs(double([SCORES]))
    (-sequence_logprob(prior, table, ones(1, 3))).sum().backward()
    for k, expected in enumerate([-0.777142, -0.219968, -0.002890]):
        assert table.grad[0, k].tolist() == pytest.approx([expected] * 3, abs=1e-6)


# Example E: a passage that is not there.
@pytest.mark.parametrize(("over", "nll", "pull"), [("sequence", 1.939637, 0.156935), ("token", 1.856837, 0.134550)])
@pytest.mark.parametrize("junk", [0.0, -7.0, -math.inf, math.nan])
def test_an_absent_passage_is_never_read(over: str, nll: float, pull: float, junk: float) -> None:
    scores = double([[1.0, 0.5, 9.0]], grad=True)
    table = double([TABLE]).log()
    table[0, 2] = junk
    prior = passage_logprobs(scores, present=torch.tensor([[True, True, False]]))
    assert prior[0].tolist() == pytest.approx([-0.474077, -0.974077, -math.inf], abs=1e-6)
    value = -marginal_logprob(prior, table, ones(1, 3), over=over)
    value.sum().backward()
    assert value.item() == pytest.approx(nll, abs=1e-6)
    assert scores.grad[0].tolist() == pytest.approx([-pull, pull, 0.0], abs=1e-6)
    assert token_posterior(prior, table, ones(1, 3))[0, 2].tolist() == [0.0, 0.0, 0.0]
    assert passage_posterior(prior, table, ones(1, 3))[0, 2].item() == 0.0


def test_missing_hits_do_not_take_the_prior() -> None:
    scores = double([[-8.0, -16.0, -24.0, 0.0, 0.0]])
    prior = passage_logprobs(scores, present=torch.tensor([[True, True, True, False, False]])).exp()
    assert prior[0].tolist() == pytest.approx([0.999665, 0.000335, 0.0, 0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("passages", [1, 2, 5])
def test_marginals_equal_their_twins(over: str, tokens: int, passages: int) -> None:
    draw = random.Random(tokens * 10 + passages)
    for _ in range(20):
        table = [[draw.uniform(0.01, 1) for _ in range(tokens)] for _ in range(passages)]
        mask = [1, *(draw.randint(0, 1) for _ in range(tokens - 1))]
        present = [True, *(draw.random() < 0.7 for _ in range(passages - 1))]
        scores = double([[draw.uniform(-3, 3) for _ in range(passages)]])
        prior = passage_logprobs(scores, present=torch.tensor([present]))
        value = -marginal_logprob(prior, double([table]).log(), torch.tensor([mask]), over=over)
        assert value.item() == pytest.approx(twin(prior.exp()[0].tolist(), table, mask, over), abs=1e-10)


@pytest.mark.parametrize("over", OVER)
def test_gradients_equal_the_closed_forms(over: str) -> None:
    torch.manual_seed(0)
    tau = 0.7
    scores, table = torch.randn(2, 4, dtype=torch.float64), torch.rand(2, 4, 3, dtype=torch.float64).log()
    mask = torch.tensor([[1, 1, 1], [1, 0, 1]]).bool()
    scores.requires_grad_(), table.requires_grad_()
    prior = passage_logprobs(scores, temperature=tau)
    (-marginal_logprob(prior, table, mask, over=over)).sum().backward()
    if over == "sequence":
        posterior = passage_posterior(prior, table, mask)
        expected_s, expected_g = (prior.exp() - posterior) / tau, -1.0 * mask[:, None] * posterior[:, :, None]
    else:
        each = token_posterior(prior, table, mask)
        expected_s, expected_g = ((prior.exp()[:, :, None] - each) * mask[:, None]).sum(-1) / tau, -each
    assert torch.allclose(scores.grad, expected_s, atol=1e-12)
    assert torch.allclose(table.grad, expected_g.to(table.grad), atol=1e-12)
    assert torch.autograd.gradcheck(lambda s, g: marginal_logprob(passage_logprobs(s), g, mask, over=over), (scores, table))


@pytest.mark.parametrize("over", OVER)
def test_extreme_numbers_stay_finite(over: str) -> None:
    totals = double([[[-2000.0], [-2001.0]]])
    flat = passage_logprobs(double([[0.0, 0.0]]))
    assert marginal_logprob(flat, totals, ones(1, 1), over=over).item() == pytest.approx(-2000.379885, abs=1e-6)
    scores = torch.tensor([[75.0286, 74.9998, 74.0804]], dtype=torch.bfloat16)
    value = marginal_logprob(passage_logprobs(scores), torch.rand(1, 3, 4).log().half(), ones(1, 4), over=over)
    assert torch.isfinite(value).all()
    assert value.dtype == torch.float32


def test_duplicates_and_order() -> None:
    prior = passage_logprobs(double([[1.0, 1.0, -0.5]]))
    table = double([[TABLE[0], TABLE[0], TABLE[2]]]).log()
    assert -sequence_logprob(prior, table, ones(1, 3)).item() == pytest.approx(1.818710, abs=1e-6)
    posterior = passage_posterior(prior, table, ones(1, 3))[0]
    assert (posterior[:2].sum().item(), posterior[2].item()) == pytest.approx((0.998144, 0.001856), abs=1e-6)
    scores, rows = double([SCORES]), double([TABLE]).log()
    for order in itertools.permutations(range(3)):
        for over in OVER:
            moved = marginal_logprob(passage_logprobs(scores[:, order]), rows[:, order], ones(1, 3), over=over)
            assert moved.item() == pytest.approx(marginal_logprob(passage_logprobs(scores), rows, ones(1, 3), over=over).item())


# Example G: reductions, and what duplicating or splitting a batch does to them.
@pytest.mark.parametrize(
    ("over", "reduction", "value"),
    [
        ("sequence", "token", 0.689986), ("token", "token", 0.706639), ("sequence", "example", 1.379972),
        ("token", "example", 1.413277), ("sequence", "sum", 2.759944), ("token", "sum", 2.826555),
    ],
)  # fmt: skip
def test_reductions_worked(over: str, reduction: str, value: float) -> None:
    scores = double([SCORES, [0.0, 0.0, 0.0]], grad=True)
    table = double([TABLE, [[0.8, 1, 1], [0.5, 1, 1], [0.2, 1, 1]]]).log()
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    nll = -marginal_logprob(passage_logprobs(scores), table, mask, over=over)
    total = reduced(nll, mask, reduction=reduction)
    assert total.item() == pytest.approx(value, abs=1e-6)
    if reduction == "token":
        total.backward()
        assert scores.grad[1].tolist() == pytest.approx([-0.05, 0.0, 0.05], abs=1e-6)
        halves = sum(reduced(nll[b : b + 1], mask[b : b + 1], reduction="token", items=mask.sum()) for b in range(2))
        assert halves.item() == pytest.approx(value, abs=1e-6)
        assert reduced(nll.repeat(2), mask.repeat(2, 1), reduction="token").item() == pytest.approx(value, abs=1e-6)


# Example F: label smoothing of the predictive distribution, over a vocabulary of three.
F_SCORES, F_TARGETS = [0.4, -0.2], (0, 1)
F_TABLE = [[[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]], [[0.3, 0.3, 0.4], [0.25, 0.5, 0.25]]]


def smoothed(scores: Tensor, table: Tensor, over: str, epsilon: float, head=lambda rows: rows, chunk: int = 128) -> Tensor:
    """(1,K) scores and (1,K,T,V) logits → the smoothed NLL, from the same pieces as the objective."""
    tokens = table.shape[2]
    targets = torch.tensor(F_TARGETS).expand(table.shape[1], tokens)
    each = chunked_token_logprobs(table.flatten(0, 2), head, targets.flatten(), chunk=chunk).view(1, -1, tokens)
    prior = passage_logprobs(scores)
    nll = -marginal_logprob(prior, each, ones(1, tokens), over=over)
    weights = predictive_weights(prior, each, ones(1, tokens), over=over)
    rows = table.transpose(1, 2).flatten(0, 1)
    uniform = -chunked_uniform_logprobs(rows, head, weights.transpose(1, 2).flatten(0, 1), chunk=chunk).sum()
    return (1 - epsilon) * nll.sum() + epsilon * uniform


@pytest.mark.parametrize(
    ("over", "value", "pull"), [("token", 1.111316, 0.216075), ("sequence", 1.059057, 0.184782)]
)  # fmt: skip
@pytest.mark.parametrize("chunk", [1, 3, 128])
def test_label_smoothing_worked(over: str, value: float, pull: float, chunk: int) -> None:
    scores, table = double([F_SCORES], grad=True), double([F_TABLE]).log()
    total = smoothed(scores, table, over, 0.1, chunk=chunk)
    total.backward()
    assert total.item() == pytest.approx(value, abs=1e-6)
    assert scores.grad[0].tolist() == pytest.approx([-pull, pull], abs=1e-6)


@pytest.mark.parametrize("over", OVER)
def test_label_smoothing_of_one_passage_is_torchs(over: str) -> None:
    table = double([F_TABLE[:1]]).log()
    value = smoothed(double([[3.0]]), table, over, 0.1).item()
    theirs = torch.nn.functional.cross_entropy(table[0, 0], torch.tensor(F_TARGETS), label_smoothing=0.1, reduction="sum")
    assert value == pytest.approx(0.825070, abs=1e-6)
    assert value == pytest.approx(theirs.item(), abs=1e-10)


def test_label_smoothing_leaves_impossible_words_out() -> None:
    table = torch.cat([double([F_TABLE]).log(), torch.full((1, 2, 2, 1), -math.inf, dtype=torch.float64)], dim=-1)
    scores = double([F_SCORES], grad=True)
    total = smoothed(scores, table.requires_grad_(), "token", 0.1)
    total.backward()
    assert total.item() == pytest.approx(1.111316, abs=1e-6)
    assert torch.isfinite(scores.grad).all()
    assert torch.isfinite(table.grad).all()


# Example H: RAG-Turn.
H_DOCS = [[[0.2, -0.2], [0.8, 0.0]]]
H_TABLE = [[[[0.30, 0.20], [0.10, 0.40]], [[0.60, 0.50], [0.20, 0.90]]]]


@pytest.mark.parametrize(
    ("gamma", "joint", "then_turn", "only", "separate"),
    [
        (1.0, [0.299344, 0.200656, 0.344987, 0.155013], 1.849716, 1.718676, 2.000649),
        (0.5, [0.199563, 0.133771, 0.459983, 0.206684], 1.614609, 1.520772, 1.738415),
    ],
)
def test_rag_turn_worked(gamma: float, joint: list[float], then_turn: float, only: float, separate: float) -> None:
    prior = turn_prior(torch.tensor([[1, 0]]), present=ones(1, 2), gamma=gamma)
    docs, table = passage_logprobs(double(H_DOCS)), double(H_TABLE).log()
    flat = turn_logprobs(prior, docs)
    assert flat.exp()[0].tolist() == pytest.approx(joint, abs=1e-6)
    assert -token_logprob(flat, table.flatten(1, 2), ones(1, 2)).item() == pytest.approx(then_turn, abs=1e-6)
    turns = token_logprob(docs[0], table[0], ones(2, 2))[None]
    assert turns[0].neg().tolist() == pytest.approx([2.787350, 1.213947], abs=1e-6)
    assert -turn_marginal(prior, turns).item() == pytest.approx(only, abs=1e-6)
    assert (prior.exp() * -turns).sum().item() == pytest.approx(separate, abs=1e-6)


def test_rag_turn_of_one_turn_is_plain_and_absent_turns_are_not_read() -> None:
    docs, table = passage_logprobs(double(H_DOCS)), double(H_TABLE).log()
    prior = turn_prior(torch.tensor([[0, 5]]), present=torch.tensor([[True, False]]), gamma=0.5)
    broken = table.clone()
    broken[:, 1] = math.nan
    plain = token_logprob(docs[:, 0], table[:, 0], ones(1, 2))
    assert torch.allclose(token_logprob(turn_logprobs(prior, docs), broken.flatten(1, 2), ones(1, 2)), plain)
    assert torch.allclose(turn_marginal(prior, torch.tensor([[plain.item(), math.nan]])), plain.float())


def test_both_marginals_are_distributions_over_all_answers() -> None:
    """Three words, length two: the probabilities of all nine answers sum to one, by either method, with an absent passage."""
    torch.manual_seed(3)
    first = torch.rand(3, 3, dtype=torch.float64).softmax(-1)  # p(y1 | z)
    second = torch.rand(3, 3, 3, dtype=torch.float64).softmax(-1)  # p(y2 | z, y1)
    prior = passage_logprobs(double([[0.3, -1.0, 2.0]]), present=torch.tensor([[True, True, False]]))
    for over in OVER:
        total = 0.0
        for a, b in itertools.product(range(3), repeat=2):
            table = torch.stack([first[:, a], second[:, a, b]], dim=-1)[None].log()
            total += marginal_logprob(prior, table, ones(1, 2), over=over).exp().item()
        assert total == pytest.approx(1, abs=1e-12)
