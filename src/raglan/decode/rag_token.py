"""`rag_token`: every token from the mixture of the passages' next-token distributions (Lewis et al. 2020, §2.5).

    q(v | x, y_<t) = Σ_k p(z_k|x) p(v | x, z_k, y_<t)

A logits processor over B·K rows in lockstep: each row is normalised, weighted by its passage, summed over K, and the sum is
given back to all K rows. So greedy search, beams and sampling are transformers' own, for seq2seq and causal models alike.
Everything else that acts on scores (a least length, n-gram blocking, temperature) acts behind it, on the mixture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from raglan.decode.base import Asked, pad_prior, read_hits
from raglan.decode.rag_sequence import by_tokens
from raglan.generator import EncodedPrompts, HFGenerator, encode_prompts
from raglan.likelihood import attribution, token_logprob, token_posterior
from raglan.progress import track
from raglan.prompt import Rendered
from raglan.recipe import RagTokenDecode
from raglan.records import Answer, Candidate

__all__ = ["Marginalise", "decoded", "rag_token"]


def rag_token(generator: HFGenerator, asked: Asked, settings: RagTokenDecode) -> list[Answer]:
    """One answer a query, `returns` of them among its candidates, or as many as there are.

    Log-probabilities are those of the mixture, unaltered.
    """
    prompts, priors = asked.prompts(generator.prompt), asked.priors()
    answers: dict[int, Answer] = {}
    for group in track(
        list(by_tokens(prompts, generator.settings.batch_tokens // max(settings.beams, settings.returns))), "reading"
    ):
        doc_logprobs = pad_prior([priors[place] for place in group])  # (B,K)
        most = doc_logprobs.shape[1]
        rows = [(prompts[place] + [prompts[place][0]] * most)[:most] for place in group]  # absent ones stand in, weight 0
        encoded = encode_prompts(generator, [prompt for row in rows for prompt in row])
        found, scores = decoded(encoded, doc_logprobs, settings)
        for number, place in enumerate(group):
            answers[place] = _answer(
                generator, asked, place, prompts[place], doc_logprobs[number], found[number], scores[number], settings
            )
    return [answers[place] for place in range(len(prompts))]


class Marginalise(LogitsProcessor):
    """Rows (b·K + k)·n + j of B queries, K passages and n beams or draws → the mixture over k, the same in all K rows.

    Args:
        doc_logprobs: (B,K) log p(z|x), −inf where absent.
        normalised: rows already are log-probabilities (transformers' beam search normalises, its sampling does not).

    Attributes:
        chosen: of each step before the last, log p of the token that was written, under each passage (rows,). Beams change
            places between steps, so it means something without beams only.
    """

    def __init__(self, doc_logprobs: Tensor, *, normalised: bool):
        self.doc_logprobs, self.normalised = doc_logprobs.float(), normalised
        self.chosen: list[Tensor] = []
        self._last: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        logprobs = scores if self.normalised else scores.float().log_softmax(-1)
        self._remember(input_ids[:, -1])
        self._last = None if self.normalised else logprobs
        prior = self.doc_logprobs.to(scores.device)[:, :, None, None]
        each = logprobs.unflatten(0, (*self.doc_logprobs.shape, -1))  # (B,K,n,V)
        weighted = each + prior
        best = weighted.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)  # a token that no passage allows
        mixed = weighted.sub_(best).exp_().sum(1, keepdim=True).log_().add_(best)  # logsumexp, in one tensor of (B,K,n,V)
        return weighted.copy_(mixed).flatten(0, 2)

    def token_logprobs(self, written: Tensor) -> Tensor:
        """log p(y_t | x, z_k, y_<t) of what was written, (B,n,K,T), from its last token in every row (B·K·n,)."""
        self._remember(written)
        return torch.stack(self.chosen, -1).unflatten(0, (*self.doc_logprobs.shape, -1)).transpose(1, 2)

    def _remember(self, tokens: Tensor) -> None:
        if self._last is not None:
            self.chosen.append(self._last.gather(-1, tokens[:, None])[:, 0])
        self._last = None


class _OnAnswer(LogitsProcessor):
    """A processor that looks back sees the answer only: causal prompts differ from passage to passage."""

    def __init__(self, inner: LogitsProcessor, start: int):
        self.inner, self.start = inner, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        return self.inner(input_ids[:, self.start :], scores)  # type: ignore[no-any-return]


class _Draw(LogitsProcessor):
    """One token for each (query, draw) from the scores of its first passage's row, given to all K rows."""

    def __init__(self, queries: int, passages: int):
        self.queries, self.passages = queries, passages

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        each = scores.unflatten(0, (self.queries, self.passages, -1))
        drawn = torch.multinomial(each[:, 0].softmax(-1).flatten(0, 1), 1)  # (B·n,1)
        only = torch.full_like(each[:, 0].flatten(0, 1), -torch.inf).scatter(1, drawn, 0.0)
        return only.unflatten(0, (self.queries, -1))[:, None].expand_as(each).flatten(0, 2)


def decoded(
    encoded: EncodedPrompts, doc_logprobs: Tensor, settings: RagTokenDecode
) -> tuple[list[list[list[int]]], Sequence[Tensor]]:
    """Of each query its `returns` id lists, or as many as there are, and their (returns,K,T) log p(y_t | x, z_k, y_<t)."""
    passages, sample = doc_logprobs.shape[1], settings.sample
    marginalise = Marginalise(doc_logprobs, normalised=settings.beams > 1)
    ids, output = encoded.sequences(
        max_new_tokens=settings.max_new_tokens, beams=settings.beams, returns=settings.returns,
        length_penalty=settings.length_penalty, processors=[marginalise, *_processors(encoded, doc_logprobs, settings)],
        draw=sample is not None,
    )  # fmt: skip
    blocks = [ids[start : start + settings.returns] for start in range(0, len(ids), settings.returns)]
    rows = [blocks[start : start + passages] for start in range(0, len(blocks), passages)]
    for lists in rows:
        assert all(other == lists[0] for other in lists), "the passages of a query left the lockstep"
    found = [lists[0] for lists in rows]
    if settings.beams > 1:
        found = [_real(lists, settings, encoded.generator.ends) for lists in found]
        return found, _scored(encoded, found, passages)
    longest = max(len(own) for lists in found for own in lists)
    return found, list(marginalise.token_logprobs(output.sequences[:, -1])[..., :longest].cpu())


def _real(found: list[list[int]], settings: RagTokenDecode, ends: Sequence[int]) -> list[list[int]]:
    """The beams that are answers, at least one. Where there are fewer than beams, transformers fills up: with copies of others,
    and with what a rule forbids."""
    size = settings.no_repeat_ngram_size
    kept = []
    for ids in dict.fromkeys(map(tuple, found)):
        grams = list(zip(*(ids[place:] for place in range(size)), strict=False)) if size else []
        short = len(ids) <= settings.min_new_tokens and ids[-1] in ends
        if not short and len(set(grams)) == len(grams):
            kept.append(list(ids))
    return kept or found[:1]


def _processors(encoded: EncodedPrompts, doc_logprobs: Tensor, settings: RagTokenDecode) -> list[LogitsProcessor]:
    """What acts on the mixture."""
    looking_back: list[LogitsProcessor] = []
    if settings.min_new_tokens:
        looking_back.append(
            MinNewTokensLengthLogitsProcessor(
                0, settings.min_new_tokens, encoded.generator.ends, device=str(encoded.generator.device)
            )
        )
    if settings.no_repeat_ngram_size:
        looking_back.append(NoRepeatNGramLogitsProcessor(settings.no_repeat_ngram_size))
    chain: list[LogitsProcessor] = [_OnAnswer(inner, encoded.start) for inner in looking_back]
    if settings.sample is not None:
        chain.append(TemperatureLogitsWarper(settings.sample.temperature))
        chain += [TopKLogitsWarper(settings.sample.top_k)] if settings.sample.top_k else []
        chain += [TopPLogitsWarper(settings.sample.top_p)] if settings.sample.top_p < 1 else []
        chain.append(_Draw(*doc_logprobs.shape))
    return chain


def _scored(encoded: EncodedPrompts, found: Sequence[Sequence[Sequence[int]]], passages: int) -> list[Tensor]:
    """Of each query, (answers,K,T) log p(y_t | x, z_k, y_<t) of its answers under every passage."""
    pairs = [
        (query * passages + k, tuple(ids)) for query, answers in enumerate(found) for ids in answers for k in range(passages)
    ]
    distinct = list(dict.fromkeys(pairs))  # draws repeat
    place = {pair: number for number, pair in enumerate(distinct)}
    scores = encoded.score([row for row, _ in distinct], [ids for _, ids in distinct])
    each = scores[[place[pair] for pair in pairs]].unflatten(0, (-1, passages))
    return list(each.split([len(answers) for answers in found]))


def _answer(
    generator: HFGenerator, asked: Asked, place: int, prompts: Sequence[Rendered], doc_logprobs: Tensor,
    found: Sequence[Sequence[int]], scores: Tensor, settings: RagTokenDecode,
) -> Answer:  # fmt: skip
    sources = list(dict.fromkeys(source for prompt in prompts for source in prompt.sources))
    mask = torch.arange(scores.shape[-1])[None] < torch.tensor([len(ids) for ids in found])[:, None]
    prior = doc_logprobs.expand(len(found), -1)
    marginals = token_logprob(prior, scores, mask).tolist()
    candidates = [
        Candidate(generator.text(ids, sources), tuple(ids), marginal, bool(ids) and ids[-1] in generator.ends)
        for ids, marginal in zip(found, marginals, strict=True)
    ]
    # beams come ordered by their own rule (length penalty); of draws the likeliest is the answer
    best = 0 if settings.sample is None else max(range(len(found)), key=marginals.__getitem__)
    real = len(asked.hits[place])
    by_token = token_posterior(prior, scores, mask)[best : best + 1]  # (1,K,T)
    share = attribution(by_token, mask[best : best + 1])[0, :real].tolist()
    chosen = candidates[best]
    return Answer(
        query=asked.queries[place], text=chosen.text, logprob=chosen.logprob, finished=chosen.finished,
        settings=settings.model_dump(), ids=chosen.ids, prior=tuple(doc_logprobs.exp()[:real].tolist()), posterior=tuple(share),
        token_posterior=tuple(map(tuple, by_token[0, :real, : len(chosen.ids)].T.tolist())) if real else (),
        candidates=(chosen, *sorted((c for c in candidates if c is not chosen), key=lambda c: -c.logprob)),
        **read_hits(asked, place, prompts),
    )  # fmt: skip
