"""`concat`: all passages of a question in one prompt, one generation.

A question with choices gets the likeliest of them behind that prompt, compared as `ensemble` compares them.
"""

from __future__ import annotations

from dataclasses import replace

from raglan.decode.base import Asked, read_hits
from raglan.decode.ensemble import ensemble
from raglan.generator import Generator, HFGenerator
from raglan.recipe import ConcatDecode, EnsembleDecode
from raglan.records import Answer

__all__ = ["concat"]


def concat(generator: Generator, asked: Asked, settings: ConcatDecode) -> list[Answer]:
    """One answer a query from its hits, in order, as many as its prompt has room for; without hits it is asked closed book."""
    asked = replace(asked, together=True)
    written = [place for place, choices in enumerate(asked.given(())) if not choices]
    chosen = [place for place, choices in enumerate(asked.given(())) if choices]
    answers = dict(zip(written, _written(generator, asked.only(written), settings), strict=True)) if written else {}
    if chosen:
        assert isinstance(generator, HFGenerator)
        by = EnsembleDecode(kind="ensemble", scorer=settings.scorer)
        found = [replace(answer, settings=settings.model_dump()) for answer in ensemble(generator, asked.only(chosen), by)]
        answers |= dict(zip(chosen, found, strict=True))
    return [answers[place] for place in range(len(asked.queries))]


def _written(generator: Generator, asked: Asked, settings: ConcatDecode) -> list[Answer]:
    prompts = generator.fitted([prompt for (prompt,) in asked.prompts(generator.prompt)], settings.max_new_tokens)
    completions = generator.generate(
        prompts, max_new_tokens=settings.max_new_tokens, beams=settings.beams, length_penalty=settings.length_penalty
    )
    return [
        Answer(
            query=query,
            text=written.text,
            logprob=written.logprob,
            finished=written.finished,
            settings=settings.model_dump(),
            ids=written.ids,
            **read_hits(asked, place, [prompt]),
        )  # fmt: skip
        for place, (query, prompt, written) in enumerate(zip(asked.queries, prompts, completions, strict=True))
    ]
