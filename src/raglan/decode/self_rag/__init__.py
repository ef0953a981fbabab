"""Self-RAG (Asai et al. 2023): the generator's own probabilities of its reflection tokens decide and rank.

`short`: one answer a passage, the best or the best label. `long`: a tree of segments. Both read the same settings, call the
same arithmetic (`reflection`), and answer with the same record, `trace` included.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from raglan.decode.base import Asked
from raglan.decode.self_rag.drawing import tree_lines
from raglan.decode.self_rag.long import cited_text, long
from raglan.decode.self_rag.rewording import reworded
from raglan.decode.self_rag.short import short
from raglan.errors import RecipeError
from raglan.generator.base import MarkedGenerator
from raglan.recipe import SelfRagDecode
from raglan.records import Answer, Hit

__all__ = ["Query", "Retrieve", "check_marked", "cited_text", "self_rag", "tree_lines"]

log = logging.getLogger(__name__)
Retrieve = Callable[[str, int], list[Hit]]
Query = Callable[[str, str], str]


def self_rag(
    generator: Any, asked: Asked, settings: SelfRagDecode, *, retrieve: Retrieve | None = None, query: Query | None = None
) -> list[Answer]:  # fmt: skip
    """One answer a query, from its hits, and in the long form from what `retrieve(query, asked.k)` finds further.

    Args:
        generator: a `MarkedGenerator`: its vocabulary holds the reflection tokens.
        query: question and last segment → what a further retrieval asks, in place of `settings.query`; not called
            without `retrieve`.

    Raises:
        RecipeError: it is none; a `query` where nothing further is retrieved. CheckpointError: its vocabulary lacks them.
    """
    check_marked(generator)
    if query is not None and (settings.form == "short" or settings.passages == "static"):
        raise RecipeError(
            "a callable makes what further retrievals ask, and this decoding reads the given passages alone",
            hint="decode.form: long with decode.passages: dynamic or hybrid",
        )
    for name in settings.released:
        log.warning("decode.released: %s repeats a fault of the authors' code; for parity runs only", name)
    asked, wordings = reworded(generator, asked, settings, retrieve)
    if settings.form == "long":
        answers = long(generator, asked, settings, retrieve=retrieve, query=query)
    else:
        answers = short(generator, asked, settings)
    return [_disarmed(generator, _worded(answer, tried)) for answer, tried in zip(answers, wordings, strict=True)]


def _worded(answer: Answer, tried: list[str]) -> Answer:
    """The answer, whose trace says in which other words its question was searched for."""
    return replace(answer, trace={**(answer.trace or {}), "reworded": tried}) if tried else answer


def _disarmed(generator: Any, answer: Answer) -> Answer:
    """The answer, whose trace says how many control tokens were spelt by question and passages, where these were changed."""
    trace, prompt = answer.trace or {}, generator.marked_prompt
    shown = [trace.get("prompt") or [], *(prompt.passage(hit.passage) for hit in answer.hits)]
    changed = sum(generator.neutralised(ids) for ids in shown if ids)
    return replace(answer, trace={**trace, "neutralised": changed}) if changed else answer


def check_marked(generator: Any) -> None:
    """Raises RecipeError if a generator gives no reflection tokens, CheckpointError if its vocabulary lacks them."""
    if not isinstance(generator, MarkedGenerator) or getattr(generator, "is_seq2seq", False):
        raise RecipeError(
            f"decode.kind self_rag reads the reflection tokens of a causal model, and {type(generator).__name__} gives none",
            hint="generator.model: a causal checkpoint with reflection tokens, or any causal model with "
            "generator.vocabulary: self_rag, trained for them",
        )
    assert generator.schema is not None  # reads the vocabulary, and raises where it lacks them
