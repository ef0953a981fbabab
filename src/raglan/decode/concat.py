"""`concat`: all passages of a question in one prompt, one generation.

A question with choices gets the likeliest of them behind that prompt, compared as `ensemble` compares them.
"""

from __future__ import annotations

from dataclasses import replace

from raglan.decode.base import Asked
from raglan.decode.ensemble import ensemble
from raglan.generator import Generator, HFGenerator
from raglan.recipe import ConcatDecode, EnsembleDecode
from raglan.records import Answer

__all__ = ["concat"]


def concat(generator: Generator, asked: Asked, settings: ConcatDecode) -> list[Answer]:
    """One answer a query from its hits, in order; a query without hits is asked closed book."""
    written = [place for place, choices in enumerate(asked.given(())) if not choices]
    chosen = [place for place, choices in enumerate(asked.given(())) if choices]
    answers = dict(zip(written, _written(generator, asked.only(written), settings), strict=True)) if written else {}
    if chosen:
        assert isinstance(generator, HFGenerator)
        together = replace(asked.only(chosen), together=True)
        by = EnsembleDecode(kind="ensemble", scorer=settings.scorer)
        found = [replace(answer, settings=settings.model_dump()) for answer in ensemble(generator, together, by)]
        answers |= dict(zip(chosen, found, strict=True))
    return [answers[place] for place in range(len(asked.queries))]


def _written(generator: Generator, asked: Asked, settings: ConcatDecode) -> list[Answer]:
    prompts = [
        generator.prompt.render(query, [hit.passage for hit in found], history=said)
        for query, found, said in zip(asked.queries, asked.hits, asked.said(), strict=True)
    ]
    completions = generator.generate(
        prompts, max_new_tokens=settings.max_new_tokens, beams=settings.beams, length_penalty=settings.length_penalty
    )
    return [
        Answer(
            query=query,
            text=written.text,
            logprob=written.logprob,
            finished=written.finished,
            hits=tuple(found),
            truncated=prompt.truncated,
            settings=settings.model_dump(),
            ids=written.ids,
        )  # fmt: skip
        for query, found, prompt, written in zip(asked.queries, asked.hits, prompts, completions, strict=True)
    ]
