"""Argilla 2: records as `to_json` writes them, nested, and the flattened columns of `to_list(flatten=True)` and datasets.

    nested     {id, status, fields, metadata, suggestions, responses: {question: [{value, user_id}]}}
    flattened  fields and metadata by their names, {question}.responses, .responses.users, .responses.status

Each user's response is a statement of its own. Only submitted ones count: the flattened form says it for each response; the
nested one does not, so there a record whose own status is not `completed` waits. Suggestions are a model's, and no answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from raglan.feedback.judgement import Fields, Judgement, judged, own_name

__all__ = ["judgements"]

RESPONSES, SUGGESTION = ".responses", ".suggestion"
UNKNOWN = "the record is not completed, and this form does not say which responses are submitted; export it flattened"


def judgements(rows: list[dict[str, Any]], fields: Fields) -> Iterator[Judgement]:
    for row in rows:
        yield from (_nested if isinstance(row.get("responses"), Mapping) else _flat)(row, fields)


def _nested(row: dict[str, Any], fields: Fields) -> Iterator[Judgement]:
    data = {**(row.get("metadata") or {}), **(row.get("fields") or {})}
    for question, responses in row["responses"].items():
        for place, response in enumerate(responses or []):
            status = response.get("status") or {"completed": "submitted", None: "submitted"}.get(row.get("status"), "")
            yield from _response(row, data, fields, question, place, response.get("value"), response.get("user_id"), status)
    for question, suggestion in (row.get("suggestions") or {}).items():
        value = suggestion.get("value") if isinstance(suggestion, Mapping) else suggestion
        yield from _suggested(row, data, fields, question, value)


def _flat(row: dict[str, Any], fields: Fields) -> Iterator[Judgement]:
    data = {key: value for key, value in row.items() if RESPONSES not in key and SUGGESTION not in key}
    for key, values in row.items():
        question = key.removesuffix(RESPONSES)
        if question != key and isinstance(values, list):
            users, statuses = (row.get(f"{key}.{part}") or [None] * len(values) for part in ("users", "status"))
            for place, (value, user, status) in enumerate(zip(values, users, statuses, strict=True)):
                yield from _response(row, data, fields, question, place, value, user, status or "submitted")
        question = key.removesuffix(SUGGESTION)
        if question != key:
            yield from _suggested(row, data, fields, question, values)


def _response(
    row: dict[str, Any], data: dict[str, Any], fields: Fields, question: str, place: int, value: Any, user: Any, status: Any
) -> Iterator[Judgement]:
    name = "" if user in (None, "None") else str(user)
    aside = "" if status == "submitted" else f"the response is {status}, not submitted" if status else UNKNOWN
    yield from judged(
        fields, question, value, data=data, origin=f"argilla:{own_name(row)}:{question}:{name or place}", annotator=name,
        time="", aside=aside, raw=row,
    )  # fmt: skip


def _suggested(row: dict[str, Any], data: dict[str, Any], fields: Fields, question: str, value: Any) -> Iterator[Judgement]:
    yield from judged(
        fields, question, value, data=data, origin=f"argilla:{own_name(row)}:{question}:suggestion",
        aside="a suggestion is no person's answer", raw=row,
    )  # fmt: skip
