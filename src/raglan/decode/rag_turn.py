"""RAG-Turn's doc-only: `rag_token` from each turn's passages, then candidates ranked over turns (Shuster et al. 2021, §3).

    score(y) = log Σ_u e^ρ_u p_u(y|x)      p_u token by token over turn u's own passages

Every turn's search (greedy, beams or draws) gives its candidates, and each is scored under every turn: thorough, as in
`rag_sequence`, with turns in the place of passages. Doc-then-turn needs nothing of its own: it is `rag_token` over all turns'
passages with the joint prior.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from raglan.decode.base import Asked, pad_prior, read_hits
from raglan.decode.rag_sequence import by_tokens
from raglan.decode.rag_token import decoded
from raglan.generator import HFGenerator, encode_prompts
from raglan.likelihood import attribution, token_posterior, turn_answer_logprobs, turn_marginal, turn_split
from raglan.progress import track
from raglan.prompt import Rendered
from raglan.recipe import RagTokenDecode
from raglan.records import Answer, Candidate

__all__ = ["rag_turn"]

Ids = tuple[int, ...]


def rag_turn(generator: HFGenerator, asked: Asked, settings: RagTokenDecode) -> list[Answer]:
    """One answer a query; `asked.turns` says which hits are whose. A question without hits has one turn, closed book."""
    prompts, priors = asked.prompts(generator.prompt), asked.priors()
    sizes = [tuple(own) or (1,) for own in asked.turns]
    width = max(settings.beams, settings.returns)
    every = settings.model_copy(update={"returns": width})  # all beams are candidates
    answers: dict[int, Answer] = {}
    for group in track(list(by_tokens(prompts, generator.settings.batch_tokens // width)), "reading"):
        turns = [turn for place in group for turn in _turns(prompts[place], priors[place], sizes[place])]
        joint = pad_prior([prior for _, prior in turns])  # (N,K), N turns of all questions
        most = joint.shape[1]
        rows = [(own + [own[0]] * most)[:most] for own, _ in turns]  # absent ones stand in, weight 0
        encoded = encode_prompts(generator, [prompt for row in rows for prompt in row])
        found, _ = decoded(encoded, turn_split(joint[None])[1][0], every)
        begin = 0
        for place in group:
            end = begin + len(sizes[place])
            candidates = list(dict.fromkeys(tuple(ids) for lists in found[begin:end] for ids in lists))
            pairs = [(row, ids) for ids in candidates for row in range(begin * most, end * most)]
            scores = encoded.score([row for row, _ in pairs], [ids for _, ids in pairs])
            each = scores.unflatten(0, (len(candidates), end - begin, most))  # (candidates,U,K,T)
            answers[place] = _answer(generator, asked, place, prompts[place], joint[begin:end], candidates, each, settings)
            begin = end
    return [answers[place] for place in range(len(prompts))]


def _turns(prompts: list[Rendered], prior: Tensor, sizes: Sequence[int]) -> Iterator[tuple[list[Rendered], Tensor]]:
    """The prompts and the joint prior of each turn."""
    begin = 0
    for size in sizes:
        yield prompts[begin : begin + size], prior[begin : begin + size]
        begin += size


def _answer(
    generator: HFGenerator, asked: Asked, place: int, prompts: Sequence[Rendered], joint: Tensor, found: Sequence[Ids],
    scores: Tensor, settings: RagTokenDecode,
) -> Answer:  # fmt: skip
    sources = list(dict.fromkeys(source for prompt in prompts for source in prompt.sources))
    mask = torch.arange(scores.shape[-1])[None] < torch.tensor([len(ids) for ids in found])[:, None]
    prior, each = turn_split(joint.expand(len(found), -1, -1))
    by_turn = turn_answer_logprobs(each, scores, mask, over="token")  # (candidates,U)
    marginals = turn_marginal(prior, by_turn).tolist()
    candidates = [
        Candidate(generator.text(ids, sources), ids, marginal, bool(ids) and ids[-1] in generator.ends)
        for ids, marginal in zip(found, marginals, strict=True)
    ]
    best = max(range(len(found)), key=marginals.__getitem__)
    chosen, own = candidates[best], mask[best].expand(len(joint), -1)
    turn_posterior = (prior + by_turn)[best].softmax(0)
    real = ~torch.isneginf(joint)
    by_token = (turn_posterior[:, None, None] * token_posterior(each[best], scores[best], own))[real][None]  # (1,U·K,T)
    hits = tuple(asked.hits[place])
    return Answer(
        query=asked.queries[place], text=chosen.text, logprob=chosen.logprob, finished=chosen.finished,
        settings=settings.model_dump(), ids=chosen.ids,
        prior=tuple(joint[real].exp().tolist()) if hits else (),
        posterior=tuple(attribution(by_token, own[:1])[0].tolist()) if hits else (),
        token_posterior=tuple(map(tuple, by_token[0, :, : len(chosen.ids)].T.tolist())) if hits else (),
        candidates=(chosen, *sorted((c for c in candidates if c is not chosen), key=lambda c: -c.logprob)),
        **read_hits(asked, place, prompts),
    )  # fmt: skip
