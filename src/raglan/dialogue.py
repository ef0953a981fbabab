"""Dialogue: a question that is understood from earlier turns only, and several turns that retrieve (RAG-Turn).

    doc-then-turn   token by token  Σ_u Σ_k e^(ρ_u + ℓ_uk) p(y_t | x, z_uk, y_<t): one mixture of U·K passages
    doc-only        Σ_u e^ρ_u p_u(y|x), p_u token by token over turn u's own K passages

ρ = log p(turn) is a prior that sums to one, ℓ_u = log p(z | turn u). Of U turns the last U − 1 retrieve by themselves, all
earlier ones together; the prompt holds the whole history whichever turn found the passage (Shuster et al. 2021, arXiv
2104.07567, §3).

Deviation: the published doc-then-turn has no prior over turns, and its discount multiplies log-probabilities, so that a
smaller γ raises old turns. Here turns have probabilities, and γ < 1 lowers old ones. A turn that finds nothing is absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from raglan.generator import Generator, HFGenerator
from raglan.likelihood import passage_logprobs, turn_evidence, turn_logprobs, turn_prior
from raglan.prompt import Prompt
from raglan.recipe import PromptSettings, RewriteSettings, TurnSettings
from raglan.records import Hit
from raglan.retriever import Retriever

__all__ = ["Rewriter", "TurnHits", "joint_logprobs", "retrieve_turns", "turn_texts"]


class Rewriter:
    """Writes a dialogue's last question so that it can be searched for by itself."""

    def __init__(self, generator: HFGenerator, settings: RewriteSettings):
        self.generator: Generator = generator
        self.settings = settings
        own = PromptSettings(template=settings.template, no_passage=settings.template)
        layout, limit = generator.prompt.layout, generator.prompt.budget
        self.prompt = Prompt(own, generator.tokenizer, layout=layout, limit=limit, end=generator.prompt.end)

    def __call__(self, queries: Sequence[str], history: Sequence[Sequence[str]]) -> list[str]:
        """One text a question; a question without history stays as it is, and so does one for which nothing is written."""
        texts = list(queries)
        places = [place for place, turns in enumerate(history) if turns]
        prompts = [self.prompt.render(queries[place], [], history=history[place]) for place in places]
        written = self.generator.generate(prompts, max_new_tokens=self.settings.max_new_tokens) if prompts else []
        for place, found in zip(places, written, strict=True):
            texts[place] = found.text.strip() or texts[place]
        return texts


@dataclass(frozen=True)
class TurnHits:
    """The hits of one question, turn after turn, oldest first, ranked in that order.

    Attributes:
        doc_logprobs: ρ_u + ℓ_uk of each hit, (U·K,).
        sizes: how many hits each turn that found any has.
    """

    hits: tuple[Hit, ...]
    doc_logprobs: Tensor
    sizes: tuple[int, ...]


def turn_texts(
    retriever: Retriever, queries: Sequence[str], history: Sequence[Sequence[str]], count: int
) -> list[tuple[str, ...]]:
    """What each question's turns search for, oldest first: at most `count` texts, fewer where a dialogue is younger."""
    turns = [(*said, query) for query, said in zip(queries, history, strict=True)]
    splits = [max(1, len(own) - count + 1) for own in turns]
    first = retriever.search_texts(
        [own[split - 1] for own, split in zip(turns, splits, strict=True)],
        [own[: split - 1] for own, split in zip(turns, splits, strict=True)],
    )
    return [(text, *own[split:]) for text, own, split in zip(first, turns, splits, strict=True)]


def retrieve_turns(
    retriever: Retriever, queries: Sequence[str], history: Sequence[Sequence[str]], k: int, settings: TurnSettings
) -> list[TurnHits]:
    """The best k passages of each turn of each question, with the joint prior of turns and passages."""
    texts = turn_texts(retriever, queries, history, settings.count)
    asked = [text for own in texts for text in own]
    found = retriever.retrieve(asked, k)
    logits, present = retriever.weigh(asked, found)
    sizes = [len(own) for own in texts]
    joint = joint_logprobs(logits, present, sizes, settings)
    answers, begin = [], 0
    for place, size in enumerate(sizes):
        own = found[begin : begin + size]
        hits = tuple(hit for hits in own for hit in hits)
        ranked = tuple(replace(hit, rank=rank) for rank, hit in enumerate(hits, 1))
        kept = joint[place, :size][present[begin : begin + size]]
        answers.append(TurnHits(ranked, kept, tuple(len(hits) for hits in own if hits)))
        begin += size
    return answers


def joint_logprobs(logits: Tensor, present: Tensor, sizes: Sequence[int], settings: TurnSettings) -> Tensor:
    """ρ_u + ℓ_uk, with gradient where the logits have one. (N,K), (N,K), N = Σ sizes → (B,U,K), −inf where absent.

    Args:
        logits: of the prior over passages, a row a turn, question after question, oldest turn first.
        present: where there is a passage.
        sizes: turns of each question, at most U = `settings.count`.
    """
    found = present.any(-1)
    evidence = turn_evidence(logits, present=present)
    each = passage_logprobs(logits, present=present)
    ages = [torch.arange(size - 1, -1, -1, device=logits.device) for size in sizes]
    there = _by_question(found, sizes, settings.count, False)
    if settings.prior == "retrieval":
        prior = passage_logprobs(_by_question(evidence, sizes, settings.count, 0.0), present=there)
    else:
        gamma = settings.gamma if settings.prior == "recency" else 1.0
        prior = turn_prior(_by_question(torch.cat(ages), sizes, settings.count, 0), present=there, gamma=gamma)
    return turn_logprobs(prior, _by_question(each, sizes, settings.count, -torch.inf)).unflatten(1, (settings.count, -1))


def _by_question(rows: Tensor, sizes: Sequence[int], count: int, value: float) -> Tensor:
    """(N,…) → (B,U,…), `value` where a question has fewer than U turns."""
    parts = list(rows.split(list(sizes)))
    longest = parts[0].new_full((count, *rows.shape[1:]), value)  # so that U is the same in every batch
    return pad_sequence([longest, *parts], batch_first=True, padding_value=value)[1:]
