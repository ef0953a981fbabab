"""parse(render(row)) = row, on ids: a row that a model could not be taught to write is not written down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raglan.critique.annotate import Check
from raglan.errors import CorpusError, GeneratorError
from raglan.marked_prompt import LABELS, MarkedPrompt
from raglan.records import Passage
from raglan.reflection import GrammarError, parse, render

__all__ = ["row_check"]


def row_check(prompt: MarkedPrompt) -> Check:
    """A check of finished rows by this prompt's tokens: None, or what is wrong."""

    def check(row: Mapping[str, Any]) -> str | None:
        try:
            ids = prompt.row_ids(row).labels
            found = parse(ids, prompt.schema, eos=prompt.eos)
        except GrammarError as fault:
            return str(fault)
        except (CorpusError, GeneratorError) as fault:
            return fault.message
        if list(render(found, prompt.schema, eos=prompt.eos)) != list(ids):
            return "it does not come back from its ids"
        return None if _said(found, prompt) == _wanted(row, prompt) else "it parses as another row"

    return check


def _said(found: Any, prompt: MarkedPrompt) -> list[Any]:
    """What the ids say, as the row's own words."""

    def label(role: str, token: int | None) -> Any:
        return None if token is None else LABELS[role][prompt.schema.ids[role].index(token)]

    segments = [
        (s.decision, None if s.passage is None else tuple(s.passage), label("is_rel", s.is_rel), tuple(s.text),
         label("is_sup", s.is_sup), tuple(s.tail))
        for s in found.segments
    ]  # fmt: skip
    return [tuple(found.lead), segments, label("is_use", found.is_use), found.ended]


def _wanted(row: Mapping[str, Any], prompt: MarkedPrompt) -> list[Any]:
    segments = []
    for segment in row["segments"]:
        passage = segment["passage"]
        evidence = (
            None if passage is None else tuple(prompt.passage(Passage(passage["id"], passage["text"], passage["title"]))[2:-1])
        )
        segments.append((
            segment["decision"], evidence, segment["is_rel"], tuple(prompt.foreign(segment["text"])), segment["is_sup"],
            tuple(prompt.foreign(segment.get("tail") or "")),
        ))  # fmt: skip
    return [tuple(prompt.foreign(row.get("lead") or "")), segments, row["is_use"], True]
