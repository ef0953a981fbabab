"""Phoenix: spans, retrieved documents, span annotations and document annotations, in one file or several.

    span                 {context.span_id, attributes.input.value, attributes.output.value, attributes.retrieval.documents}
    retrieved document   {context.span_id, document_position, input, reference, document_score}
    span annotation      {span_id, name, annotator_kind, result: {label, score, explanation}}
    document annotation  the same with document_position, counted from 0

Names are read with dots or nested, as the client's dataframes and the REST answers have them. Only annotator_kind HUMAN is a
person. An annotation of a document means the one at its position among what its span retrieved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

from raglan.feedback.judgement import Fields, Judgement, judged, standard_time

__all__ = ["judgements"]

Documents = dict[tuple[str, int], dict[str, Any]]


def judgements(rows: list[dict[str, Any]], fields: Fields) -> Iterator[Judgement]:
    spans: dict[str, dict[str, Any]] = {}
    documents: Documents = {}
    annotations = []
    for row in rows:
        if _get(row, "annotator_kind") is not None:
            annotations.append(row)
        elif _get(row, "document_position") is not None:
            _retrieved(row, spans, documents)
        else:
            _span(row, spans, documents)
    for row in annotations:
        yield from _annotation(row, fields, spans, documents)


def _retrieved(row: dict[str, Any], spans: dict[str, dict[str, Any]], documents: Documents) -> None:
    span = _span_id(row)
    document = {"id": _get(row, "document.id", "document_id") or "", "text": _get(row, "reference", "document.content") or ""}
    documents[span, _place(_get(row, "document_position"))] = document
    spans.setdefault(span, {"query": _get(row, "input") or "", "old": ""})


def _span(row: dict[str, Any], spans: dict[str, dict[str, Any]], documents: Documents) -> None:
    span = _span_id(row)
    query, old = (_get(row, f"attributes.{side}.value", f"{side}.value", side) or "" for side in ("input", "output"))
    spans[span] = {"query": query, "old": old}
    listed = _get(row, "attributes.retrieval.documents", "retrieval.documents") or list(_numbered(row))
    for place, item in enumerate(listed):
        found = {"id": _get(item, "document.id", "id") or "", "text": _get(item, "document.content", "content") or ""}
        documents.setdefault((span, place), found)


def _numbered(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Documents whose attributes stand one by one: retrieval.documents.0.document.id, …"""
    for place in count():
        front = f"attributes.retrieval.documents.{place}.document."
        found = {name: _get(row, f"{front}{name}") for name in ("id", "content")}
        if not any(found.values()):
            return
        yield found


def _annotation(
    row: dict[str, Any], fields: Fields, spans: dict[str, dict[str, Any]], documents: Documents
) -> Iterator[Judgement]:
    span, name, kind = _span_id(row), str(_get(row, "name", "annotation_name") or ""), str(_get(row, "annotator_kind")).upper()
    position = _get(row, "document_position")
    label, score, told = (_get(row, f"result.{part}", part) for part in ("label", "score", "explanation"))
    about: dict[str, Any] = {
        "annotator": str(_get(row, "user_id", "identifier", "metadata.user") or ""),
        "time": standard_time(_get(row, "updated_at", "created_at")),
        "aside": "" if kind == "HUMAN" else f"the annotator is {kind}, no person",
        "raw": row,
    }
    data: dict[str, Any] = dict(spans.get(span, {}))
    if position is not None:
        place = _place(position)
        document = documents.get((span, place))
        data |= {"passage_id": document["id"], "passage_text": document["text"]} if document else {}
        if document is None and not about["aside"]:
            about["aside"] = f"span {span} has no document at position {place} in the files read"
    who = _get(row, "identifier", "id") or about["annotator"]
    origin = f"phoenix:{span}:{'' if position is None else _place(position)}:{name}:{who}"
    known = fields.kind(name) or ("relevance" if position is not None else None)
    data = {**{fields.names[key][0]: data[key] for key in ("query", "old") if key in data}, **_passages(data, fields)}
    if known in ("answer", "comment"):
        yield from judged(fields, name, told or label, data=data, origin=origin, kind=known, **about)
        return
    yield from judged(fields, name, label if score is None else score, data=data, origin=origin, kind=known, **about)
    yield from judged(fields, name, told, data=data, origin=f"{origin}:explanation", kind="comment", **about)


def _passages(data: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    keys = {"passage_id": "passage", "passage_text": "passage_text"}
    return {fields.names[field][0]: data[key] for key, field in keys.items() if data.get(key)}


def _span_id(row: Mapping[str, Any]) -> str:
    return str(_get(row, "span_id", "context.span_id") or "")


def _place(position: Any) -> int:
    """A table with empty cells writes 1 as 1.0."""
    return int(float(position))


def _get(row: Any, *names: str) -> Any:
    """The first of the names that there is, spelt with dots, nested, or some of both; an empty cell is not there."""
    return next((value for name in names if (value := _one(row, name)) is not None), None)


def _one(row: Any, name: str) -> Any:
    if not isinstance(row, Mapping):
        return None
    if row.get(name) not in (None, ""):
        return row[name]
    steps = name.split(".")
    heads = (".".join(steps[:n]) for n in range(1, len(steps)))
    inner = (_one(row.get(head), name[len(head) + 1 :]) for head in heads)
    return next((value for value in inner if value is not None), None)
