"""`concat`: all passages of a question in one prompt, one generation."""

from __future__ import annotations

from raglan.decode.base import Asked
from raglan.generator import Generator
from raglan.recipe import ConcatDecode
from raglan.records import Answer

__all__ = ["concat"]


def concat(generator: Generator, asked: Asked, settings: ConcatDecode) -> list[Answer]:
    """One answer a query from its hits, in order; a query without hits is asked closed book."""
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
        )  # fmt: skip
        for query, found, prompt, written in zip(asked.queries, asked.hits, prompts, completions, strict=True)
    ]
