"""The equations: worked examples by hand, plain-Python twins, closed-form gradients, masks, extreme numbers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from raglan.errors import RecipeError
from raglan.likelihood import (
    admitted_logprob,
    answer_nll,
    chunked_token_logprobs,
    lsr_divergence,
    lsr_target,
    normalised_entropy,
    passage_logprobs,
    passage_posterior,
    sequence_logprob,
    token_logprob,
)

SCORES_A = [2.0, 1.0, 0.0]
LM_A = [0.1, 0.6, 0.3]
SCORES_B = [0.9, 0.8, 0.7, 0.6]
SUMS_B = [-120.0, -100.0, -130.0, -110.0]


def double(values: list[float] | list[list[float]], *, grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


# Worked example A: both directions, three targets. RA-DIT equation 5.
@pytest.mark.parametrize(
    ("target", "tau", "direction", "loss", "gradient"),
    [
        ("prob", 0.1, "student_first", 2.818886, [1.216389, -1.020887, -0.195502]),
        ("prob", 0.1, "target_first", 1.220109, [0.658863, -0.701771, 0.042907]),
        ("prob", 1.0, "student_first", 0.380521, [0.375968, -0.228782, -0.147186]),
        ("prob", 1.0, "target_first", 0.387653, [0.406851, -0.181284, -0.225567]),
        ("sum_logprob", 1.0, "student_first", 0.932786, [0.640090, -0.447747, -0.192343]),
        ("sum_logprob", 1.0, "target_first", 0.709660, [0.565241, -0.355272, -0.209969]),
    ],
)
def test_lsr_example_a(target: str, tau: float, direction: str, loss: float, gradient: list[float]) -> None:
    scores = double([SCORES_A], grad=True)
    value = lsr_divergence(scores, double([LM_A]).log(), direction=direction, target=target, tau=tau)
    value.sum().backward()
    assert value.item() == pytest.approx(loss, abs=1e-6)
    assert scores.grad[0].tolist() == pytest.approx(gradient, abs=1e-6)
    assert scores.grad.sum().item() == pytest.approx(0, abs=1e-9)


# Worked example B: a long answer. The literal equation 4 is flat, the three ways out are not.
@pytest.mark.parametrize(
    ("target", "tau", "q", "student", "teacher"),
    [
        ("prob", 0.01, [0.25] * 4, (0.930866, [5.368787, -3.955770, -1.169043, -0.243973]),
         (1.758784, [12.299098, -2.658822, -4.683156, -4.957120])),
        ("sum_logprob", 10, [0.087144, 0.643914, 0.032059, 0.236883],
         (1.764341, [9.181847, -8.122085, -0.782361, -0.277402]), (2.034901, [15.556211, -10.537107, -0.324328, -4.694776])),
        ("mean_logprob", 0.1, [0.015842, 0.864955, 0.002144, 0.117059],
         (3.248810, [12.994908, -12.288400, -0.395678, -0.310830]), (2.130489, [16.982254, -14.957919, 0.273964, -2.298298])),
        ("mean_prob", 0.01, [0.010495, 0.909266, 0.002027, 0.078212],
         (3.600882, [14.027684, -13.229628, -0.489420, -0.308636]), (2.094799, [17.089196, -15.844141, 0.276308, -1.521363])),
    ],
)  # fmt: skip
def test_lsr_example_b(target: str, tau: float, q: list[float], student: tuple, teacher: tuple) -> None:
    lengths = torch.tensor([50])
    log_q = lsr_target(double([SUMS_B]), target=target, tau=tau, answer_lengths=lengths)
    assert log_q.exp()[0].tolist() == pytest.approx(q, abs=1e-6)
    for direction, (loss, gradient) in (("student_first", student), ("target_first", teacher)):
        scores = double([SCORES_B], grad=True)
        value = lsr_divergence(
            scores, double([SUMS_B]), direction=direction, target=target, tau=tau, gamma=0.05, answer_lengths=lengths
        )
        value.sum().backward()
        assert value.item() == pytest.approx(loss, abs=1e-6)
        assert scores.grad[0].tolist() == pytest.approx(gradient, abs=1e-6)


def test_lsr_example_b_first_row_is_flat_and_mean_prob_is_not() -> None:
    lengths = torch.tensor([50])
    flat = lsr_target(double([SUMS_B]), target="prob", tau=0.01, answer_lengths=lengths)
    sharp = lsr_target(double([SUMS_B]), target="mean_prob", tau=0.01, answer_lengths=lengths)
    assert normalised_entropy(flat).item() > 0.99
    assert normalised_entropy(sharp).item() < 0.5


def test_entropy_is_a_share_of_what_the_present_passages_allow() -> None:
    """H/ln K by hand; a pad is no passage, and one passage alone is certain."""
    p = double([[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    assert normalised_entropy(p.log()).tolist() == pytest.approx([1.5 * math.log(2) / math.log(3), 1, 1, 0], abs=1e-12)


@pytest.mark.parametrize("direction", ["student_first", "target_first"])
def test_lsr_example_c_fixed_point(direction: str) -> None:
    values = double([[0.5, 0.3, 0.2]]).log()
    scores = values.clone().requires_grad_(True)
    loss = lsr_divergence(scores, values, direction=direction, target="sum_logprob", tau=1.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert scores.grad.abs().max().item() == pytest.approx(0, abs=1e-12)


# Worked example P: a padded passage takes no part, in value or gradient, whatever stands there.
@pytest.mark.parametrize("pad", [0.0, -math.inf, math.nan, 1e6])
@pytest.mark.parametrize(
    ("direction", "each", "gradient"),
    [("student_first", (2.818886, 1.659560), 0.393224), ("target_first", (1.220109, 1.074971), None)],
)
def test_lsr_example_p_pads(pad: float, direction: str, each: tuple[float, float], gradient: float | None) -> None:
    scores = double([SCORES_A, [1.0, 0.0, pad]], grad=True)
    lm = double([[math.log(p) for p in LM_A], [math.log(0.2), math.log(0.5), pad]])
    mask = torch.tensor([[True] * 3, [True, True, False]])
    value = lsr_divergence(scores, lm, direction=direction, target="prob", tau=0.1, passage_mask=mask)
    assert value.tolist() == pytest.approx(each, abs=1e-6)
    value.mean().backward()
    assert torch.isfinite(scores.grad).all()
    assert scores.grad[1, 2].item() == 0
    if gradient is not None:
        assert scores.grad[1, :2].tolist() == pytest.approx([gradient, -gradient], abs=1e-6)


def test_lsr_does_not_care_about_order_padding_batch_or_a_constant() -> None:
    torch.manual_seed(0)
    scores, sums = torch.randn(5, 4, dtype=torch.float64), -5 * torch.rand(5, 4, dtype=torch.float64)
    settings = {"target": "prob", "tau": 0.05, "gamma": 0.3}
    plain = lsr_divergence(scores, sums, **settings)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(plain, lsr_divergence(scores[:, order], sums[:, order], **settings))
    assert torch.allclose(plain, lsr_divergence(scores + 7, sums, **settings))
    assert torch.allclose(plain[2:3], lsr_divergence(scores[2:3], sums[2:3], **settings))
    mask = torch.ones(5, 6, dtype=torch.bool)
    mask[:, 4:] = False
    padded = [torch.nn.functional.pad(x, (0, 2), value=-math.inf) for x in (scores, sums)]
    assert torch.allclose(plain, lsr_divergence(*padded, passage_mask=mask, **settings))


def test_lsr_target_carries_no_gradient_and_half_precision_does_not_overflow() -> None:
    sums = torch.tensor([[0.0, math.log(1e-30)]], requires_grad=True)
    scores = torch.zeros(1, 2, requires_grad=True)
    lsr_divergence(scores, sums, target="prob", tau=0.01).sum().backward()
    assert sums.grad is None
    assert scores.grad.abs().sum() > 0
    for dtype in (torch.bfloat16, torch.float16):  # softmax().log() of these is −inf; the true value is finite
        value = lsr_divergence(torch.zeros(1, 2, dtype=dtype), torch.tensor([[0.0, -60.0]], dtype=dtype), tau=0.01)
        assert value.item() == pytest.approx(49.306853, abs=1e-3)


def test_lsr_names_what_is_missing() -> None:
    with pytest.raises(RecipeError, match=r"tau is missing.*\n.*0\.1 for mean_logprob"):
        lsr_target(double([[0.0]]), target="mean_logprob", answer_lengths=torch.tensor([1]))
    with pytest.raises(RecipeError, match="mean_prob"):
        lsr_target(double([[0.0]]), target="best")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="lengths"):
        lsr_target(double([[0.0]]), target="mean_prob")


# RAG's marginals: worked example A of the RAG paper's equations, and a loop over everything.
TABLE = [[0.50, 0.40, 0.90], [0.20, 0.70, 0.60], [0.10, 0.10, 0.30]]
SCORES = [1.0, 0.5, -0.5]


@pytest.mark.parametrize(
    ("mask", "sequence", "token", "posterior"),
    [
        ([1, 1, 1], -2.066797, -2.133407, [0.777142, 0.219968, 0.002890]),
        ([1, 1, 0], -1.851897, -1.815100, [0.696511, 0.295719, 0.007771]),
        ([1, 0, 0], -1.044779, -1.044779, [0.776857, 0.188475, 0.034668]),
    ],
)
@pytest.mark.parametrize("junk", [0.0, -7.0, -math.inf, math.nan])
def test_marginals_worked(mask: list[int], sequence: float, token: float, posterior: list[float], junk: float) -> None:
    masked = torch.tensor([mask])
    each = double([TABLE]).log()
    each = torch.where(masked[:, None, :].bool(), each, junk)
    scores = double([SCORES], grad=True)
    logprobs = passage_logprobs(scores)
    assert sequence_logprob(logprobs, each, masked).item() == pytest.approx(sequence, abs=1e-6)
    assert token_logprob(logprobs, each, masked).item() == pytest.approx(token, abs=1e-6)
    assert passage_posterior(logprobs, each, masked)[0].tolist() == pytest.approx(posterior, abs=1e-6)
    (sequence_logprob(logprobs, each, masked) + token_logprob(logprobs, each, masked)).sum().backward()
    assert torch.isfinite(scores.grad).all()


def test_absent_passages_have_probability_zero_and_no_passage_has_zero_gradient() -> None:
    present = torch.tensor([[True, True, False], [False, False, False]])
    scores = double([SCORES, SCORES], grad=True)
    logprobs = passage_logprobs(scores, present=present)
    assert logprobs[0, :2].tolist() == pytest.approx([-0.474077, -0.974077], abs=1e-6)
    assert torch.isneginf(logprobs[1]).all()
    each = double([TABLE, TABLE]).log()
    value = sequence_logprob(logprobs, each, torch.ones(2, 3))
    assert value[0].item() == pytest.approx(-1.939637, abs=1e-6)
    assert torch.isneginf(value[1])
    value[0].backward()
    assert torch.isfinite(scores.grad).all()
    assert scores.grad[0, 2].item() == 0


def test_marginals_sum_to_one_over_all_answers() -> None:
    torch.manual_seed(1)
    prior = torch.tensor([[0.3, 0.7]], dtype=torch.float64).log()
    first = torch.rand(2, 3, dtype=torch.float64).softmax(-1).log()
    second = torch.rand(2, 3, 3, dtype=torch.float64).softmax(-1).log()
    totals = {sequence_logprob: 0.0, token_logprob: 0.0}
    for a, b in itertools.product(range(3), repeat=2):
        each = torch.stack([torch.stack([first[k, a], second[k, a, b]]) for k in range(2)])[None]
        for function in totals:
            totals[function] += function(prior, each, torch.ones(1, 2)).exp().item()
    assert list(totals.values()) == pytest.approx([1.0, 1.0])


def test_answer_nll_reductions() -> None:
    values = torch.tensor([[-1.0, -2.0, math.nan], [-4.0, math.nan, math.nan]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert answer_nll(values, mask, reduction="token").item() == pytest.approx(7 / 3)
    assert answer_nll(values, mask, reduction="example").item() == pytest.approx(3.5)
    assert answer_nll(values, mask, reduction="none").tolist() == [3.0, 4.0]


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("shape", [(7,), (7, 3)])
def test_chunked_head_equals_full_logits_in_value_and_every_gradient(chunk: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(5, 11).double()
    targets = torch.randint(11, shape)  # of three targets a row, some are the same
    full = head(hidden).log_softmax(-1).gather(-1, targets.view(7, -1)).view(shape)
    wanted = torch.autograd.grad(full.sin().sum(), [hidden, head.weight, head.bias])
    ours = chunked_token_logprobs(hidden, head, targets, chunk=chunk)
    assert torch.allclose(ours, full, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours.sin().sum(), [hidden, head.weight, head.bias]), wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("words", [True, False])
def test_admitted_logprob_is_the_sum_of_what_may_stand_here(words: bool) -> None:
    """Of a vocabulary of six a grammar watches four; it admits two of them, and the two others only where words may stand."""
    torch.manual_seed(0)
    logits = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    logprobs = logits.log_softmax(-1)
    admitted = torch.tensor([True, False, False, True]).expand(5, -1)
    ours = admitted_logprob(logprobs[:, :4], admitted, torch.full((5,), words))
    by_hand = logprobs.exp()[:, [0, 3, 4, 5] if words else [0, 3]].sum(-1).log()
    assert torch.allclose(ours, by_hand, atol=1e-12)
    gradients = [torch.autograd.grad(values.sum(), logits, retain_graph=True)[0] for values in (ours, by_hand)]
    assert torch.allclose(*gradients, atol=1e-12)
    certain = torch.tensor([[-40.0, 0.0, -40.0, -40.0]], requires_grad=True)  # all of it where it may not be
    value = admitted_logprob(certain, admitted[:1], torch.tensor([words]))
    value.sum().backward()
    assert value.isfinite().all()
    assert certain.grad is not None
    assert certain.grad.isfinite().all()


def test_chunked_head_never_holds_more_rows_than_a_chunk() -> None:
    widest = []

    class Head(torch.nn.Linear):
        def forward(self, rows: Tensor) -> Tensor:
            widest.append(len(rows))
            return super().forward(rows)

    chunked_token_logprobs(torch.randn(50, 4, requires_grad=True), Head(4, 9), torch.zeros(50).long(), chunk=8).sum().backward()
    assert max(widest) == 8
    assert len(widest) == 14  # seven chunks, each again in the backward pass
