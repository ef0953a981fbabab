"""A question whose passages are all irrelevant, in other words: searched again, a bounded number of times.

    for each of `rewrites` rounds:  ask for other words, retrieve, read;  stop at the first round with rel ≥ ½ somewhere

Only questions that were to retrieve are reworded, and what is answered is the question as it was asked. Where no wording finds
anything, the first passages stay, and `all_irrelevant` or `require` says what then. A loop of this kind that is not counted
runs until something else stops it (LangGraph's "Self-RAG" ends in recursion-limit errors).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from raglan.decode.base import Asked
from raglan.decode.self_rag.rate import prompts_of, threshold_of
from raglan.decode.self_rag.rules import decide, scoring
from raglan.recipe import SelfRagDecode
from raglan.records import Hit
from raglan.reflection import rel

__all__ = ["Rewords", "reworded"]

log = logging.getLogger(__name__)
Retrieve = Callable[[str, int], list[Hit]]
Ids = tuple[int, ...]


@runtime_checkable
class Rewords(Protocol):
    """A marked generator that can word a question anew."""

    rewrites: int

    def reword(self, question: str, tried: Sequence[str]) -> str:
        """The question in other words than those that were tried."""


def reworded(generator: Any, asked: Asked, settings: SelfRagDecode, retrieve: Retrieve | None) -> tuple[Asked, list[list[str]]]:
    """The questions with the passages that they, or another wording of them, found; and each one's wordings, in order.

    Nothing changes where the generator cannot reword, or where nobody can be asked for passages.
    """
    tried: list[list[str]] = [[] for _ in asked.queries]
    rewrites = generator.rewrites if isinstance(generator, Rewords) else 0
    if not rewrites or retrieve is None:
        return asked, tried
    hits = [list(own) for own in asked.hits]
    prompts = prompts_of(generator, asked, settings)
    poor = _irrelevant(generator, prompts, hits, _retrieving(generator, prompts, hits, settings), settings)
    for _ in range(rewrites):
        found: dict[int, list[Hit]] = {}
        for place in poor:
            tried[place].append(generator.reword(asked.queries[place], [asked.queries[place], *tried[place]]))
            found[place] = list(retrieve(tried[place][-1], asked.k or len(hits[place])))
        lacking = _irrelevant(generator, prompts, found, [place for place in poor if found[place]], settings)
        hits = [found[place] if place in found and place not in lacking and found[place] else own
                for place, own in enumerate(hits)]  # fmt: skip
        poor = [place for place in poor if place in lacking or not found[place]]
    for place in poor:
        log.info("%r: no passage is relevant, in %d wordings", asked.queries[place], 1 + len(tried[place]))
    return replace(asked, hits=hits), tried


def _retrieving(generator: Any, prompts: Sequence[Ids], hits: Sequence[Sequence[Hit]], settings: SelfRagDecode) -> list[int]:
    """Places of the questions that retrieve."""
    threshold, missing = threshold_of(generator, prompts, settings), scoring(settings, exact=generator.exact_marks).missing
    roots = generator.contexts(prompts, marks=generator.schema.marks)
    told = zip(roots.mark_logprobs, roots.best, hits, strict=True)
    return [
        place for place, (marks, best, own) in enumerate(told)
        if decide(marks, settings, missing=missing, threshold=threshold, argmax=int(best) == generator.schema.yes,
                  hits=bool(own)).retrieve
    ]  # fmt: skip


def _irrelevant(generator: Any, prompts: Sequence[Ids], hits: Any, places: Sequence[int], settings: SelfRagDecode) -> list[int]:
    """Of these questions those all of whose passages are likelier irrelevant than relevant."""
    pairs = [(place, hit) for place in places for hit in hits[place]]
    if not pairs:
        return []
    own = {place: number for number, place in enumerate(places)}
    roots = generator.contexts([prompts[place] for place in places], marks=generator.schema.marks)
    read = roots.branch([own[place] for place, _ in pairs], [generator.marked_prompt.passage(hit.passage) for _, hit in pairs])
    values = rel(read.mark_logprobs, missing=scoring(settings, exact=generator.exact_marks).missing)
    good = {place for (place, _), value in zip(pairs, values, strict=True) if value >= 0.5}
    return [place for place in places if place not in good]
