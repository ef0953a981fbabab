"""Figures on the way to the losses of `test_rag_equations.py`: masks, missing passages, smoothing, turns; and what the usual
mistakes would give instead, so that a mistake cannot pass for the right value.
"""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from raglan.likelihood import (
    chunked_uniform_logprobs,
    marginal_logprob,
    passage_logprobs,
    passage_posterior,
    predictive_weights,
    reduced,
    sequence_logprob,
    token_logprob,
    token_posterior,
    turn_answer_logprobs,
    turn_bound,
    turn_logprobs,
    turn_marginal,
    turn_prior,
)
from test_rag_equations import F_SCORES, F_TABLE, F_TARGETS, H_DOCS, H_TABLE, SCORES, TABLE, double, ones, smoothed

JUNK = [0.0, -7.0, -math.inf]


def close(found: Tensor, expected: list[float]) -> None:
    assert found.flatten().tolist() == pytest.approx(expected, abs=1e-6)


# B and C: what stands in masked columns is in no value, no posterior and no gradient.


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize(
    ("over", "nll", "gradient"),
    [("sequence", 1.851897, [-0.149961, 0.035780, 0.114181]), ("token", 1.815100, [-0.156078, -0.026810, 0.182888])],
)
def test_a_masked_token(over: str, nll: float, gradient: list[float], junk: float) -> None:
    scores, table = double([SCORES], grad=True), double([TABLE]).log()
    table[:, :, 2] = junk
    table.requires_grad_()
    mask, prior = torch.tensor([[1, 1, 0]]), passage_logprobs(scores)
    value = -marginal_logprob(prior, table, mask, over=over)
    value.sum().backward()
    close(value, [nll])
    close(scores.grad, gradient)
    close(table.grad[:, :, 2], [0, 0, 0])
    close(passage_posterior(prior, table, mask), [0.696511, 0.295719, 0.007771])
    close(token_posterior(prior, table, mask)[:, :, 2], [0, 0, 0])


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("over", ["sequence", "token"])
def test_one_token(over: str, junk: float) -> None:
    scores, table = double([SCORES], grad=True), double([TABLE]).log()
    table[:, :, 1:] = junk
    mask, prior = torch.tensor([[1, 0, 0]]), passage_logprobs(scores)
    value = -marginal_logprob(prior, table, mask, over=over)
    value.sum().backward()
    close(value, [1.044779])
    close(scores.grad, [-0.230308, 0.143024, 0.087284])
    close(passage_posterior(prior, table, mask), [0.776857, 0.188475, 0.034668])
    close(token_posterior(prior, table, mask)[:, :, 0], [0.776857, 0.188475, 0.034668])
    forgotten = -math.log(sum(row[0] for row in TABLE))  # a prior that waits for a second token
    assert forgotten == pytest.approx(0.223144, abs=1e-6)


# E: a passage that is not there.


@pytest.mark.parametrize(
    ("over", "nll", "gradient"),
    [("sequence", 1.939637, [-0.156935, 0.156935, 0.0]), ("token", 1.856837, [-0.134550, 0.134550, 0.0])],
)
def test_a_missing_passage(over: str, nll: float, gradient: list[float]) -> None:
    scores, table = double([[1.0, 0.5, 0.0]], grad=True), double([TABLE]).log()
    prior = passage_logprobs(scores, present=torch.tensor([[True, True, False]]))
    value = -marginal_logprob(prior, table, ones(1, 3), over=over)
    value.sum().backward()
    close(prior, [-0.474077, -0.974077, -math.inf])
    close(value, [nll])
    close(scores.grad, gradient)
    close(passage_posterior(prior, table, ones(1, 3)), [0.779394, 0.220606, 0])


def test_a_missing_passage_that_is_made_up_is_another_value() -> None:
    made_up = passage_logprobs(double([[1.0, 0.5, 0.0]]))  # score 0, and the row of a passage that nobody found
    close(-sequence_logprob(made_up, double([TABLE]).log(), ones(1, 3)), [2.141063])


def test_low_scores_and_two_missing_passages() -> None:
    scores = double([[-8.0, -16.0, -24.0, 0.0, 0.0]], grad=True)
    prior = passage_logprobs(scores, present=torch.tensor([[True, True, True, False, False]]))
    close(prior.exp(), [0.999665, 0.000335, 0, 0, 0])
    assert prior.exp()[0, 3:].tolist() == [0.0, 0.0]
    prior[0, 0].backward()
    assert scores.grad[0, 3:].tolist() == [0.0, 0.0]
    close(passage_logprobs(scores).exp(), [0.000168, 0, 0, 0.499916, 0.499916])  # made-up zeros take it all


# F: label smoothing, on the distribution that predicts.


def mixture(over: str, scores: Tensor) -> Tensor:
    """q_t(v), (T,V)."""
    table = double([F_TABLE])
    each = table.log().gather(-1, torch.tensor(F_TARGETS).expand(1, 2, 2)[..., None])[..., 0]
    weights = predictive_weights(passage_logprobs(scores), each, ones(1, 2), over=over).exp()
    return (weights[..., None] * table).sum(1)[0]


@pytest.mark.parametrize(
    ("over", "second", "nll", "uniform", "smooth", "pull"),
    [
        ("token", [0.153152, 0.693697, 0.153152], 0.948646, 2.575344, 1.111316, 0.216075),
        ("sequence", [0.128563, 0.742875, 0.128563], 0.880154, 2.669188, 1.059057, 0.184782),
    ],
)
def test_smoothing_step_by_step(over: str, second: list[float], nll: float, uniform: float, smooth: float, pull: float) -> None:
    scores, table = double([F_SCORES], grad=True), double([F_TABLE]).log()
    close(passage_logprobs(scores).exp(), [0.645656, 0.354344])
    q = mixture(over, scores)
    close(q[0], [0.558263, 0.235434, 0.206303])
    close(q[1], second)
    close(q.sum(-1), [1, 1])
    close(-(q[0, 0].log() + q[1, 1].log()), [nll])
    close(-q.log().mean(-1).sum(), [uniform])
    by_hand = 0.9 * -(q[0, 0].log() + q[1, 1].log()) + 0.1 * -q.log().mean(-1).sum()
    close(by_hand, [smooth])
    close(torch.autograd.grad(by_hand, scores)[0], [-pull, pull])
    ours = smoothed(scores, table, over, 0.1)
    ours.backward()
    close(ours, [smooth])
    close(scores.grad, [-pull, pull])


def test_smoothing_of_a_sequence_as_transformers_writes_it_is_another_value() -> None:
    """Its term adds log p over V, and V times the prior, inside a logsumexp over passages."""
    table, prior = double([F_TABLE]).log(), passage_logprobs(double([F_SCORES]))
    over_words = (table[0].sum((-1, -2)) + 3 * prior[0]).logsumexp(0)
    close(0.9 * torch.tensor(0.880154) + 0.1 / 3 * -over_words, [1.106506])


def test_smoothing_of_one_passage_and_of_nothing() -> None:
    table = double([F_TABLE[:1]]).log()
    for over in ("sequence", "token"):
        close(smoothed(double([[0.4]]), table, over, 0.1), [0.825070])
        plain = -marginal_logprob(passage_logprobs(double([[0.4]])), double([[[0.7, 0.8]]]).log(), ones(1, 2), over=over)
        close(smoothed(double([[0.4]]), table, over, 0.0), plain.tolist())


def test_words_that_only_some_passages_allow_count_once_and_in_any_order() -> None:
    """Possible is what any present passage allows; an absent one, whatever its logits, allows nothing."""
    logits = double([[[0.7, 0.2, 0.1, 0.0], [0.3, 0.0, 0.3, 0.4], [0.1, 0.1, 0.1, 0.7]]]).log().requires_grad_()
    weights = double([[0.6, 0.4, 0.0]]).log()
    q = [0.6 * 0.7 + 0.4 * 0.3, 0.6 * 0.2, 0.6 * 0.1 + 0.4 * 0.3, 0.4 * 0.4]
    expected = sum(math.log(value) for value in q) / 4
    for order in ([0, 1, 2], [1, 0, 2], [2, 1, 0]):
        found = chunked_uniform_logprobs(logits[:, order], lambda rows: rows, weights[:, order])
        close(found, [expected])
        (pull,) = torch.autograd.grad(found.sum(), logits)
        assert torch.isfinite(pull).all()
        close(pull[0, 2], [0, 0, 0, 0])
    without = double([[0.6, 0.0, 0.4]]).log()  # now it is the last passage's word
    found = chunked_uniform_logprobs(logits, lambda rows: rows, without)
    close(found, [sum(math.log(value) for value in (0.46, 0.16, 0.10, 0.28)) / 4])


# H: turns of a dialogue.


@pytest.mark.parametrize(
    ("gamma", "prior", "joint", "then_turn", "only", "separate", "posterior"),
    [
        (1.0, [0.5, 0.5], [0.299344, 0.200656, 0.344987, 0.155013], 1.849716, 1.718676, 2.000649, None),
        (0.5, [1 / 3, 2 / 3], [0.199563, 0.133771, 0.459983, 0.206684], 1.614609, 1.520772, 1.738415, [0.093931, 0.906069]),
    ],
)
def test_turns_step_by_step(
    gamma: float, prior: list[float], joint: list[float], then_turn: float, only: float, separate: float, posterior: Any
) -> None:
    rho = turn_prior(torch.tensor([[1, 0]]), present=ones(1, 2), gamma=gamma)
    docs, table = passage_logprobs(double(H_DOCS)), double(H_TABLE).log()
    close(rho.exp(), prior)
    flat = turn_logprobs(rho, docs)
    close(flat.exp(), joint)
    each = turn_answer_logprobs(docs, table, ones(1, 2), over="token")
    close(-each, [2.787350, 1.213947])
    close(-token_logprob(flat, table.flatten(1, 2), ones(1, 2)), [then_turn])
    close(-turn_marginal(rho, each), [only])
    close(-turn_bound(rho, each), [separate])
    if posterior is not None:
        close((rho + each).softmax(-1), posterior)


def test_turns_without_a_prior_are_no_probabilities() -> None:
    docs, table = passage_logprobs(double(H_DOCS)), double(H_TABLE).log()
    sums = docs.flatten(1).exp()[0] @ table.flatten(1, 2).exp()[0]
    close(sums, [0.695727, 0.904273])
    close(-sums.log().sum(), [0.463422])


# A and G: the prior's own digits, and each question's value before it is reduced.


def test_the_prior_of_the_first_example() -> None:
    prior = passage_logprobs(double([SCORES]))
    close(prior, [-0.604131, -1.104131, -2.104131])
    close(prior.exp(), [0.546549, 0.331499, 0.121952])


@pytest.mark.parametrize(
    ("over", "rows", "pulls"),
    [
        ("sequence", [2.066797, 0.693147], [[-0.230592, 0.111531, 0.119062], [-0.2, 0.0, 0.2]]),
        ("token", [2.133407, 0.693147], [[-0.285784, 0.031242, 0.254542], [-0.2, 0.0, 0.2]]),
    ],
)
def test_rows_of_a_batch_and_their_pulls(over: str, rows: list[float], pulls: list[list[float]]) -> None:
    scores = double([SCORES, [0.0, 0.0, 0.0]], grad=True)
    table = torch.cat([double([TABLE]), double([[[0.8], [0.5], [0.2]]]).expand(1, 3, 3)]).log()
    table[1, :, 1:] = math.nan
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    nll = -marginal_logprob(passage_logprobs(scores), table, mask, over=over)
    close(nll, rows)
    (each,) = torch.autograd.grad(nll.sum(), scores, retain_graph=True)
    close(each, [value for row in pulls for value in row])
    (mean,) = torch.autograd.grad(reduced(nll, mask, reduction="token"), scores)
    close(mean[1], [-0.05, 0.0, 0.05])


# Posteriors against loops over plain numbers.


def looped(
    prior: list[float], table: list[list[float]], mask: list[int]
) -> tuple[list[float], list[list[float]], list[list[float]]]:
    """p(z|x,y), p(z|x,y_t) and p(z|x,y_<t): products and quotients of numbers, absent passages never looked at."""
    present = [k for k, p in enumerate(prior) if p > 0]

    def shares(weights: dict[int, float]) -> list[float]:
        return [weights.get(k, 0.0) / sum(weights.values()) for k in range(len(prior))]

    so_far, by_token, running = {k: prior[k] for k in present}, [], []
    for t, kept in enumerate(mask):
        running.append(shares(so_far))
        by_token.append(shares({k: prior[k] * table[k][t] for k in present}) if kept else [0.0] * len(prior))
        so_far = {k: p * (table[k][t] if kept else 1.0) for k, p in so_far.items()}
    return shares(so_far), by_token, running


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("passages", [1, 2, 5])
def test_posteriors_equal_their_twins(passages: int, tokens: int) -> None:
    draw = random.Random(100 + tokens * 10 + passages)
    for trial in range(12):
        table = [[draw.uniform(0.01, 1) for _ in range(tokens)] for _ in range(passages)]
        mask = [1, *(draw.randint(0, 1) for _ in range(tokens - 1))]
        present = [draw.random() < 0.7 for _ in range(passages)]
        present[draw.randrange(passages)] = True
        scores = double([[draw.uniform(-3, 3) for _ in range(passages)]])
        prior = passage_logprobs(scores, present=torch.tensor([present]), temperature=draw.uniform(0.3, 2))
        given = double([table]).log()
        junk = [0.0, -math.inf, math.nan][trial % 3]
        read = torch.tensor(present)[:, None] & torch.tensor(mask).bool()
        given = torch.where(read, given, junk)
        whole, by_token, running = looped(prior.exp()[0].tolist(), table, mask)
        answer = torch.tensor([mask])
        exact = {"rel": 0, "abs": 1e-10}
        assert passage_posterior(prior, given, answer)[0].tolist() == pytest.approx(whole, **exact)
        assert token_posterior(prior, given, answer)[0].T.numpy() == pytest.approx(np.array(by_token), **exact)
        found = predictive_weights(prior, given, answer, over="sequence").exp()[0].T
        assert found.numpy() == pytest.approx(np.array(running), **exact)
        flat = predictive_weights(prior, given, answer, over="token").exp()[0].T
        assert flat.numpy() == pytest.approx(np.array([prior.exp()[0].tolist()] * tokens), **exact)


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_the_prior_sums_to_one_with_duplicates_in_any_order(temperature: float) -> None:
    scores = [0.9, 0.7, 0.7, 0.9, -0.5]  # two passages twice
    for absent in (None, 2, 4):
        present = [k != absent for k in range(5)]
        plain = passage_logprobs(double([scores]), present=torch.tensor([present]), temperature=temperature)[0].exp()
        by_hand = [math.exp(s / temperature) * kept for s, kept in zip(scores, present, strict=True)]
        assert plain.tolist() == pytest.approx([value / sum(by_hand) for value in by_hand], abs=1e-12)
        for order in itertools.permutations(range(5)):
            moved = passage_logprobs(
                double([[scores[k] for k in order]]),
                present=torch.tensor([[present[k] for k in order]]),
                temperature=temperature,
            )[0].exp()
            assert moved.sum().item() == pytest.approx(1, abs=1e-12)
            assert moved.tolist() == pytest.approx(plain[list(order)].tolist(), abs=1e-12)
