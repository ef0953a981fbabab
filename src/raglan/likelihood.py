"""THE EQUATIONS. Pure functions of tensors: no model, no file, no setting hidden elsewhere.

Everything that raglan trains or decodes reads two quantities:

    doc_logprobs   (B,K)    log p(z_k | x), from the retriever
    token_logprobs (B,K,T)  log p(y_t | x, z_k, y_<t), from the generator, for the answer's own tokens only

All arithmetic is float32 or wider, whatever the models' dtype. −inf in `doc_logprobs` is the only mark of an absent
passage, and what stands in its `token_logprobs` is never read: values are selected with `where`, never multiplied by a
mask, because 0·(−inf) is NaN and so is its gradient.

The two RAG methods differ in one symbol. Both predict the next token by Σ_k w_kt p(v | x, z_k, y_<t); RAG-Token's w_kt is
p(z_k|x) at every token, RAG-Sequence's is the passages' posterior given the tokens so far (`predictive_weights`).

Sources: RAG, Lewis et al. 2020 (arXiv 2005.11401) §2; RAG-Turn, Shuster et al. 2021 (arXiv 2104.07567) §3; RA-DIT, Lin et
al. 2023 (arXiv 2310.01352) equations 2, 4 and 5; REPLUG, Shi et al. 2023 (arXiv 2301.12652) §4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from raglan.errors import RecipeError

__all__ = [
    "admitted_logprob",
    "answer_nll",
    "attribution",
    "choice_scores",
    "chunked_divergence",
    "chunked_token_logprobs",
    "chunked_uniform_logprobs",
    "lsr_divergence",
    "lsr_target",
    "marginal_logprob",
    "normalised_entropy",
    "passage_divergence",
    "passage_logprobs",
    "passage_posterior",
    "predictive_weights",
    "reduced",
    "sequence_logprob",
    "token_logprob",
    "token_posterior",
    "turn_answer_logprobs",
    "turn_bound",
    "turn_evidence",
    "turn_logprobs",
    "turn_marginal",
    "turn_prior",
    "turn_split",
    "unlikelihood",
]

Direction = Literal["student_first", "target_first"]
Over = Literal["sequence", "token"]
Reduction = Literal["token", "example", "sum"]
Scorer = Literal["nll", "nll_char", "nll_token", "nll_compl"]
Target = Literal["prob", "sum_logprob", "mean_logprob", "mean_prob", "given"]


def passage_logprobs(doc_scores: Tensor, *, present: Tensor | None = None, temperature: float | Tensor = 1.0) -> Tensor:
    """log p(z|x) = log_softmax over K of s/τ, −inf where absent. (B,K) → (B,K).

    A row with no passage is −inf throughout and its gradient is zero.
    """
    scores = _wide(doc_scores)
    if present is None:
        return (scores / temperature).log_softmax(-1)
    some = present.any(-1, keepdim=True)
    usable = present | ~some  # a row of nothing but −inf has a NaN gradient, so it is computed on anything finite
    scores = torch.where(present, scores, torch.zeros_like(scores)) / temperature
    logprobs = torch.where(usable, scores, -torch.inf).log_softmax(-1)
    return torch.where(present, logprobs, -torch.inf)


def sequence_logprob(doc_logprobs: Tensor, token_logprobs: Tensor, answer_mask: Tensor) -> Tensor:
    """RAG-Sequence: log Σ_k p(z_k|x) Π_t p(y_t | x, z_k, y_<t). (B,K), (B,K,T), (B,T) → (B,)."""
    return _logsumexp(_joint(doc_logprobs, token_logprobs, answer_mask), dim=-1)


def token_logprob(doc_logprobs: Tensor, token_logprobs: Tensor, answer_mask: Tensor) -> Tensor:
    """RAG-Token: Σ_t log Σ_k p(z_k|x) p(y_t | x, z_k, y_<t). (B,K), (B,K,T), (B,T) → (B,)."""
    mask = answer_mask.bool()
    each = _clean(doc_logprobs, token_logprobs, mask)
    mixed = _logsumexp(_wide(doc_logprobs)[:, :, None] + each, dim=1)  # (B,T)
    return torch.where(mask, mixed, torch.zeros_like(mixed)).sum(-1)


def passage_posterior(doc_logprobs: Tensor, token_logprobs: Tensor, answer_mask: Tensor) -> Tensor:
    """p(z_k | x, y) under RAG-Sequence, rows sum to 1. (B,K), (B,K,T), (B,T) → (B,K)."""
    return _normalised(_joint(doc_logprobs, token_logprobs, answer_mask)).exp()


def marginal_logprob(doc_logprobs: Tensor, token_logprobs: Tensor, answer_mask: Tensor, *, over: Over) -> Tensor:
    """log p(y|x) by either RAG method. (B,K), (B,K,T), (B,T) → (B,)."""
    marginal = sequence_logprob if over == "sequence" else token_logprob
    return marginal(doc_logprobs, token_logprobs, answer_mask)


def token_posterior(doc_logprobs: Tensor, token_logprobs: Tensor, answer_mask: Tensor) -> Tensor:
    """r_kt = p(z_k | x, y_<=t's own token) under RAG-Token; 0 at masked tokens. (B,K), (B,K,T), (B,T) → (B,K,T)."""
    mask = answer_mask.bool()
    joint = _normalised(_wide(doc_logprobs)[:, :, None] + _clean(doc_logprobs, token_logprobs, mask))
    return torch.where(mask[:, None, :], joint.exp(), 0.0)


def attribution(posterior: Tensor, answer_mask: Tensor) -> Tensor:
    """The share each passage has in a RAG-Token answer: `token_posterior` (B,K,T) averaged over answer tokens → (B,K)."""
    return posterior.sum(-1) / answer_mask.sum(-1, keepdim=True).clamp_min(1)


def predictive_weights(doc_logprobs: Tensor, token_logprobs: Tensor, answer_mask: Tensor, *, over: Over) -> Tensor:
    """log w_kt of the next-token distribution q_t(v) = Σ_k w_kt p(v | x, z_k, y_<t). (B,K), (B,K,T), (B,T) → (B,K,T).

    `token`: the prior at every t. `sequence`: the posterior given y_<t, so that Σ_t log q_t(y_t) is exactly
    `sequence_logprob`.
    """
    prior = _wide(doc_logprobs)[:, :, None]
    each = _clean(doc_logprobs, token_logprobs, answer_mask.bool())
    if over == "token":
        return prior.expand_as(each)
    return _normalised(prior + pad(each.cumsum(-1)[..., :-1], (1, 0)))  # the tokens before t; no −inf is taken from −inf


def reduced(nll: Tensor, answer_mask: Tensor, *, reduction: Reduction, items: int | Tensor | None = None) -> Tensor:
    """Rows' negative log-likelihoods (B,) as one number: per answer `token`, per `example`, or their `sum`.

    `items` is the denominator over the whole accumulated batch and all ranks (tokens or examples); default is this batch's.
    """
    if reduction == "sum":
        return nll.sum()
    own = answer_mask.sum() if reduction == "token" else len(nll)
    return nll.sum() / (own if items is None else items)


def turn_prior(ages: Tensor, *, present: Tensor, gamma: float = 1.0) -> Tensor:
    """log of a prior over dialogue turns ∝ γ^age, −inf where absent; γ = 1 is uniform. (B,U), (B,U) → (B,U)."""
    return passage_logprobs(_wide(ages) * torch.tensor(gamma, dtype=torch.float64).log().item(), present=present)


def turn_evidence(logits: Tensor, *, present: Tensor) -> Tensor:
    """log Σ_k e^(s_k/τ), how much a turn found: the logits of a turn prior by retrieval. (…,K), (…,K) → (…)."""
    return _logsumexp(torch.where(present, _wide(logits), -torch.inf), dim=-1)


def turn_logprobs(turn_prior: Tensor, doc_logprobs: Tensor) -> Tensor:
    """The joint prior of turns and their passages, flattened: ρ_u + ℓ_uk. (B,U), (B,U,K) → (B,U·K).

    With it RAG-Turn's doc-then-turn is `token_logprob` over U·K passages: no new equation.
    """
    return (_wide(turn_prior)[:, :, None] + _wide(doc_logprobs)).flatten(1)


def turn_marginal(turn_prior: Tensor, turn_answer_logprobs: Tensor) -> Tensor:
    """RAG-Turn's doc-only: log Σ_u exp(ρ_u + log p_u(y|x)), token inside a turn and sequence across turns. (B,U) ×2 → (B,)."""
    prior = _wide(turn_prior)
    return _logsumexp(prior + torch.where(torch.isneginf(prior), 0.0, _wide(turn_answer_logprobs)), dim=-1)


def turn_split(joint: Tensor) -> tuple[Tensor, Tensor]:
    """`turn_logprobs` undone: ρ_u + ℓ_uk (B,U,K) → ρ (B,U) and ℓ (B,U,K), −inf throughout where a turn is absent."""
    each = _normalised(_wide(joint).flatten(0, 1)).unflatten(0, joint.shape[:2])
    return _logsumexp(_wide(joint), dim=-1), each


def turn_answer_logprobs(doc_logprobs: Tensor, token_logprobs: Tensor, answer_mask: Tensor, *, over: Over) -> Tensor:
    """log p_u(y|x) of each turn by its own passages. (B,U,K), (B,U,K,T), (B,T) → (B,U)."""
    mask = answer_mask[:, None].expand(-1, doc_logprobs.shape[1], -1)
    return marginal_logprob(doc_logprobs.flatten(0, 1), token_logprobs.flatten(0, 1), mask.flatten(0, 1), over=over).unflatten(
        0, doc_logprobs.shape[:2]
    )


def turn_bound(turn_prior: Tensor, turn_answer_logprobs: Tensor) -> Tensor:
    """Σ_u e^ρ_u log p_u(y|x), each turn trained by itself: never above `turn_marginal` (Jensen). (B,U), (B,U) → (B,)."""
    prior = _wide(turn_prior)
    return (prior.exp() * torch.where(torch.isneginf(prior), 0.0, _wide(turn_answer_logprobs))).sum(-1)


def answer_nll(token_logprobs: Tensor, answer_mask: Tensor, *, reduction: Literal["token", "example", "none"]) -> Tensor:
    """Masked answer likelihood, RA-DIT's LM loss (its equation 3 without the sum over passages). (B,T), (B,T) → () or (B,).

    `token` divides by the number of answer tokens, so splitting a batch changes nothing as long as the division is made
    over the whole accumulated batch; `example` averages rows; `none` gives each row's sum.
    """
    mask = answer_mask.bool()
    rows = -torch.where(mask, _wide(token_logprobs), 0.0).sum(-1)
    if reduction == "none":
        return rows
    return rows.sum() / mask.sum() if reduction == "token" else rows.mean()


def admitted_logprob(watched_logprobs: Tensor, admitted: Tensor, words: Tensor) -> Tensor:
    """log P(what a grammar admits), (…): log(1 − Σ p of the ids it does not admit), and where no word may stand, log Σ p of
    those that it does.

    Its negative, beside the likelihood of the one right word, is a loss against all wrong marks at once.

    Args:
        watched_logprobs: log p of the W ids of which a grammar decides, (…,W), of a whole vocabulary's distribution.
        admitted: which of them may stand here, (…,W), bool. words: whether any other id may, (…), bool.
    """
    wrong = torch.where(admitted, -math.inf, watched_logprobs).exp().sum(-1)
    right = torch.where(admitted, watched_logprobs, -math.inf)
    alone = _logsumexp(right, dim=-1)
    return torch.where(words, torch.log1p(-wrong.clamp(max=1 - 1e-6)), alone)


def unlikelihood(word_logprobs: Tensor, present: Tensor) -> Tensor:
    """Σ_w log(1 − p_w) over words that should not stand here, (…,W), (…,W) → (…). Welleck et al. 2020 (arXiv 1908.04319)."""
    return torch.where(present, torch.log1p(-word_logprobs.exp().clamp(max=1 - 1e-6)), 0.0).sum(-1)


def choice_scores(
    doc_logprobs: Tensor, answer_logprobs: Tensor, *, scorer: Scorer, lengths: Tensor,
    completion_logprobs: Tensor | None = None, normalise: Literal["after", "before"] = "after",
) -> Tensor:  # fmt: skip
    """By what C choices of a question are compared; the largest wins. (K,), (C,K) → (C,).

        nll         log p(a|x) = log Σ_k p(z_k|x) p(a|x,z_k)
        nll_char, nll_token    log p(a|x) / n; `before`: log Σ_k p(z_k|x) p(a|x,z_k)^(1/n)
        nll_compl   log p(a|x) − log p(a|"Answer:")

    The names are of what is least. nll_compl cannot differ before and after.

    Args:
        answer_logprobs: Σ_t log p(a_t | x, z_k, a_<t), without the end token.
        lengths: (C,) characters or tokens; read by nll_char and nll_token only.
        completion_logprobs: (C,) log p(a|"Answer:"); nll_compl only.

    RA-DIT uses nll for knowledge tasks, nll_char for most commonsense tasks and nll_compl for OpenBookQA; whether it divides by
    lengths after mixing or before, it does not say.
    """
    by = lengths if scorer in ("nll_char", "nll_token") else torch.ones_like(lengths)
    inner, outer = (by, torch.ones_like(by)) if normalise == "before" else (torch.ones_like(by), by)
    mixture = _logsumexp(_wide(doc_logprobs)[None] + _wide(answer_logprobs) / inner[:, None], dim=-1) / outer
    if scorer != "nll_compl":
        return mixture
    assert completion_logprobs is not None, "nll_compl compares with the choice's own likelihood"
    return mixture - _wide(completion_logprobs)


def lsr_target(
    answer_logprobs: Tensor,
    *,
    target: Target,
    tau: float | None = None,
    answer_lengths: Tensor | None = None,
    passage_mask: Tensor | None = None,
) -> Tensor:
    """log q_k = log_softmax over K of u_k/τ: which passage the language model found useful. (B,K) → (B,K), detached.

    RA-DIT's equation 4 puts the *probability* itself in the exponent (`prob`, u = exp Σ_t log p). For long answers all
    such u are 0 and q is flat; `mean_prob` (u = exp of the mean), `mean_logprob` and `sum_logprob` are the ways out.
    `given` takes values as they are: people's grades, or attention.

    Args:
        answer_logprobs: Σ_t log p(y_t | x, z_k, y_<t), or with `given` u itself.
        target: what u is.
        tau: τ > 0. 0.01 (the paper's) is the default for the two probabilities; the others have none.
        answer_lengths: (B,) answer tokens T, needed by the two means.
        passage_mask: (B,K) bool, False where there is no passage.
    """
    if target not in get_args(Target):
        raise RecipeError(f"objective.target is {target!r}; allowed are {', '.join(get_args(Target))}")
    if tau is None:
        if "logprob" in target or target == "given":
            raise RecipeError(
                f"objective.tau is missing: target {target} has no default temperature",
                hint="usual values are 0.1 for mean_logprob, 1 to 10 for sum_logprob, and 1 for given grades",
            )
        tau = 0.01
    if target.startswith("mean") and answer_lengths is None:
        raise RecipeError(f"target {target} needs the answers' lengths")
    value = _wide(answer_logprobs.detach())
    if target.startswith("mean"):
        value = value / answer_lengths.to(value)[:, None]  # type: ignore[union-attr]
    if target.endswith("prob") and "logprob" not in target:
        value = value.exp()
    return passage_logprobs(value, present=passage_mask, temperature=tau)


def lsr_divergence(
    doc_scores: Tensor,
    answer_logprobs: Tensor,
    *,
    direction: Direction = "student_first",
    target: Target = "prob",
    tau: float | None = None,
    gamma: float = 1.0,
    answer_lengths: Tensor | None = None,
    passage_mask: Tensor | None = None,
) -> Tensor:
    """LM-supervised retrieval, RA-DIT's equation 5: KL(p‖q) per query, p = softmax(s/γ), q = `lsr_target`. → (B,).

    Gradients by hand (the tests use them): ∂KL(p‖q)/∂s_k = p_k (ln p_k − ln q_k − KL)/γ, ∂KL(q‖p)/∂s_k = (p_k − q_k)/γ.
    The target is detached here and nowhere else. The mean over B is the objective's.

    Args:
        doc_scores: (B,K) raw E_q(x)·E_p(z_k), with gradient.
        answer_logprobs: (B,K) the language model's Σ_t log p(y_t | x, z_k, y_<t).
        direction: `student_first` is KL(p‖q), the paper's; `target_first` is KL(q‖p), distillation's.
        target, tau, answer_lengths: see `lsr_target`.
        gamma: γ > 0, the retriever's own temperature.
        passage_mask: (B,K) bool; both softmaxes run over a query's real passages only.
    """
    log_q = lsr_target(answer_logprobs, target=target, tau=tau, answer_lengths=answer_lengths, passage_mask=passage_mask)
    log_p = passage_logprobs(doc_scores, present=passage_mask, temperature=gamma)
    return passage_divergence(log_p, log_q, direction=direction)


def passage_divergence(doc_logprobs: Tensor, target_logprobs: Tensor, *, direction: Direction) -> Tensor:
    """KL(p‖q), `student_first`, or KL(q‖p) over the passages of each query, −inf where absent. (B,K), (B,K) → (B,)."""
    if direction not in get_args(Direction):
        raise RecipeError(f"objective.direction is {direction!r}; allowed are {', '.join(get_args(Direction))}")
    student = direction == "student_first"
    first, second = (doc_logprobs, target_logprobs) if student else (target_logprobs, doc_logprobs)
    present = ~torch.isneginf(first)  # 0 ln 0 = 0; what is absent is so on both sides
    zeros = torch.zeros_like(first)
    bracket = torch.where(present, first, zeros) - torch.where(present, second, zeros)  # zeroed before multiplying:
    weight = torch.where(present, first, zeros).exp()  # a pad's gradient is then 0, not NaN
    return (torch.where(present, weight, zeros) * bracket).sum(-1)


def normalised_entropy(logprobs: Tensor) -> Tensor:
    """H(p)/ln K over the present passages, 1 for flat, 0 for certain. (B,K) → (B,)."""
    present = ~torch.isneginf(logprobs)
    finite = torch.where(present, logprobs, torch.zeros_like(logprobs))
    entropy = -(finite.exp() * finite * present).sum(-1)
    return entropy / present.sum(-1).clamp_min(2).to(entropy).log()


def chunked_token_logprobs(hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, *, chunk: int = 128) -> Tensor:
    """log softmax(head(h)) at the targets, without ever holding more than `chunk` rows of V. (N,D), (N,) or (N,W) → its shape.

    Each chunk's logits are thrown away after the forward pass and made again in the backward pass, so the memory is that
    of `chunk`·V numbers however many answer tokens there are.
    """

    def score(rows: Tensor, wanted: Tensor) -> Tensor:
        values: Tensor = _TargetLogprob.apply(_wide(head(rows)), wanted)
        return values

    return _made_again(score, zip(hidden.split(chunk), targets.split(chunk), strict=True))


def chunked_divergence(
    head: Callable[..., Tensor], read: Sequence[Tensor], start_head: Callable[..., Tensor], start_read: Sequence[Tensor], *,
    chunk: int = 128,
) -> Tensor:  # fmt: skip
    """KL(π_start ‖ π) = Σ_v π_start(v) (log π_start(v) − log π(v)) over the vocabulary at each position. (N,…) → what is left.

    What a model that learns is held by to what it was: learning without forgetting (Li & Hoiem 2016, arXiv 1606.09282), with
    the whole distribution at temperature 1 for the old task's outputs. It is 0, and so is its gradient, where both agree. By
    hand, for the logits s of π: ∂KL/∂s_v = π(v) − π_start(v). As in `chunked_token_logprobs`, the (n,V) live a chunk at a time.

    Args:
        head: `read`'s rows → logits (n,…,V), with gradient. read: tensors of N rows each, as (N,D) states.
        start_head, start_read: the same of π_start; no gradient goes there.
    """

    def score(*rows: Tensor) -> Tensor:
        with torch.no_grad():
            start = _wide(start_head(*rows[len(read) :])).log_softmax(-1)
        return passage_divergence(_wide(head(*rows[: len(read)])).log_softmax(-1), start, direction="target_first")

    return _made_again(score, zip(*(part.split(chunk) for part in (*read, *start_read)), strict=True))


def chunked_uniform_logprobs(hidden: Tensor, head: Callable[[Tensor], Tensor], weights: Tensor, *, chunk: int = 128) -> Tensor:
    """Mean over v of log Σ_k w_k p_k(v), the uniform term of label smoothing on a mixture. (N,K,D), (N,K) log → (N,).

    The mean runs over the words that some present passage allows: whose logit is finite there. As in
    `chunked_token_logprobs`, logits live a chunk at a time; a chunk holds all K rows of its tokens.
    """

    def score(rows: Tensor, log_w: Tensor) -> Tensor:
        logits = _wide(head(rows.flatten(0, 1))).unflatten(0, rows.shape[:2])
        mixed = _logsumexp(log_w[:, :, None] + logits.log_softmax(-1), dim=1)
        possible = ~torch.isneginf(mixed.detach())
        return torch.where(possible, mixed, 0.0).sum(-1) / possible.sum(-1).clamp_min(1)

    step = max(1, chunk // weights.shape[1])
    return _made_again(score, zip(hidden.split(step), _wide(weights).split(step), strict=True))


def _made_again(score: Callable[..., Tensor], parts: Iterable[tuple[Tensor, ...]]) -> Tensor:
    """The scores of all parts in line; where gradients are wanted, each part is computed again on the way back."""
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(score, *part, use_reentrant=False) for part in parts])
    return torch.cat([score(*part) for part in parts])


class _TargetLogprob(torch.autograd.Function):
    """log softmax at one target a row, (n,V), (n,) → (n,), or at W of them, (n,W), with the gradient made in one tensor.

    Autograd's own way back through logsumexp and gather makes three of that size.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        total, wanted = logits.logsumexp(-1, keepdim=True), targets if targets.dim() == 2 else targets[:, None]
        ctx.save_for_backward(logits, wanted, total)
        return (logits.gather(-1, wanted) - total).view_as(targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *pull: Tensor) -> tuple[Tensor, None]:
        logits, wanted, total = ctx.saved_tensors
        given = pull[0].view_as(wanted)
        gradient = (logits - total).exp_().mul_(-given.sum(-1, keepdim=True))
        return gradient.scatter_add_(1, wanted, given), None


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _clean(doc_logprobs: Tensor, token_logprobs: Tensor, mask: Tensor) -> Tensor:
    """`token_logprobs` with everything that must not be read set to 0: masked tokens and absent passages."""
    read = mask[:, None, :] & ~torch.isneginf(doc_logprobs)[:, :, None]
    return torch.where(read, _wide(token_logprobs), 0.0)


def _joint(doc_logprobs: Tensor, token_logprobs: Tensor, answer_mask: Tensor) -> Tensor:
    """log p(z_k|x) + log p(y|x,z_k), (B,K)."""
    return _wide(doc_logprobs) + _clean(doc_logprobs, token_logprobs, answer_mask.bool()).sum(-1)


def _normalised(joint: Tensor) -> Tensor:
    """log_softmax over K, (B,K) or (B,K,T), that stays −inf throughout where no passage is present."""
    total = _logsumexp(joint, dim=1)
    return joint - torch.where(torch.isneginf(total), torch.zeros_like(total), total).unsqueeze(1)


def _logsumexp(values: Tensor, *, dim: int) -> Tensor:
    """logsumexp whose value is −inf, and whose gradient is 0, where there is nothing to sum."""
    nothing = torch.isneginf(values).all(dim, keepdim=True)
    total = torch.where(nothing, torch.zeros_like(values), values).logsumexp(dim)
    return torch.where(nothing.squeeze(dim), -torch.inf, total)
