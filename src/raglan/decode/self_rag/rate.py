"""The questions as ids, and δ where a share of them is to retrieve.

    δ = the (1 − rate) quantile of r over the questions that are asked together

Both forms and the rescoring of cached candidates take it from here. It costs one more reading of the questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from raglan.decode.base import Asked
from raglan.decode.self_rag.rules import figure, scoring
from raglan.generator.base import MarkedGenerator
from raglan.recipe import SelfRagDecode
from raglan.reflection import target_threshold

__all__ = ["BATCH_TOKENS", "prompts_of", "threshold_of"]

BATCH_TOKENS = 16384  # of generators that do not say
Ids = tuple[int, ...]


def prompts_of(generator: MarkedGenerator, asked: Asked, settings: SelfRagDecode) -> list[Ids]:
    """Each question's ids, up to where its answer begins."""
    prompt = generator.marked_prompt
    return [
        tuple(prompt.question(query, instruction=settings.instruction, history=list(said)))
        for query, said in zip(asked.queries, asked.said(), strict=True)
    ]


def threshold_of(generator: MarkedGenerator, prompts: Sequence[Ids], settings: SelfRagDecode) -> float | None:
    """`threshold`, or with `target_rate` the δ above which that share of these questions lies."""
    if settings.target_rate is None:
        return settings.threshold
    missing = scoring(settings, exact=generator.exact_marks).missing
    r: list[float] = []
    for group in _groups(generator, prompts):
        marks = generator.contexts(group, marks=generator.schema.marks).mark_logprobs
        r += figure(marks, settings, missing=missing).tolist()
    return target_threshold(r, settings.target_rate)


def _groups(generator: Any, prompts: Sequence[Ids]) -> Iterator[list[Ids]]:
    """Prompts that are computed together: what was computed for them is kept until they are read."""
    most = getattr(generator, "batch_tokens", BATCH_TOKENS)
    group: list[Ids] = []
    for prompt in prompts:
        if group and sum(map(len, group)) + len(prompt) > most:
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group
