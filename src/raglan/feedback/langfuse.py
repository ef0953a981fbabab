"""Langfuse: scores, traces, observations, dataset items and annotation queue items, in one file or several.

    score         {id, traceId, observationId, name, source, dataType, value, stringValue, comment, authorUserId}
    dataset item  {id, input, expectedOutput, sourceTraceId, status}
    trace         {id, input, output}; an observation the same with traceId
    queue item    {id, queueId, objectId, objectType}

A score of dataType CORRECTION is the corrected output, whatever its name. Scores name their trace or observation only; that
brings the question and the answer shown. A queue item holds nothing but ids. Scores of source EVAL are a model's, and those of
source API a program's, unless they are corrections or name the user who gave them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from raglan.feedback.judgement import Fields, Judgement, judged, own_name, standard_time

__all__ = ["judgements"]

Known = dict[str, Mapping[str, Any]]


def judgements(rows: list[dict[str, Any]], fields: Fields) -> Iterator[Judgement]:
    known: Known = {str(row["id"]): row for row in rows if _is_shown(row)}
    for row in rows:
        if "objectId" in row:
            yield Judgement(f"langfuse:{own_name(row)}", "", aside="a queue item holds only ids; export the scores", raw=row)
        elif _is_score(row):
            yield from _score(row, fields, known)
        elif not _is_shown(row):
            yield from _item(row, fields, known)


def _is_score(row: Mapping[str, Any]) -> bool:
    return "dataType" in row or ("value" in row and "name" in row)


def _is_shown(row: Mapping[str, Any]) -> bool:
    """Whether it is a trace or an observation."""
    return {"id", "input"} <= set(row) and not {"expectedOutput", "datasetId", "objectId"} & set(row) and not _is_score(row)


def _score(row: dict[str, Any], fields: Fields, known: Known) -> Iterator[Judgement]:
    name, correction = str(row.get("name", "")), row.get("dataType") == "CORRECTION"
    about: dict[str, Any] = {
        "annotator": str(row.get("authorUserId") or ""),
        "time": standard_time(row.get("updatedAt") or row.get("timestamp") or row.get("createdAt")),
        "aside": _no_person(row, correction=correction),
        "raw": row,
    }
    data = _shown(row.get("observationId"), row.get("traceId"), known, fields)
    text = row.get("stringValue")
    value = text if text not in (None, "") and row.get("dataType") != "BOOLEAN" else row.get("value")
    kind = "answer" if correction else None
    origin = f"langfuse:{own_name(row)}"
    yield from judged(fields, name, value, data=data, origin=origin, kind=kind, **about)
    yield from judged(fields, name, row.get("comment"), data=data, origin=f"{origin}:comment", kind="comment", **about)


def _no_person(row: Mapping[str, Any], *, correction: bool) -> str:
    source = row.get("source") or "ANNOTATION"
    if source == "ANNOTATION" or (source == "API" and (correction or row.get("authorUserId"))):
        return ""
    return f"the score's source is {source}, no person"


def _item(row: dict[str, Any], fields: Fields, known: Known) -> Iterator[Judgement]:
    source = _shown(row.get("sourceObservationId"), row.get("sourceTraceId"), known, fields)
    query = {fields.names["query"][0]: row["input"]} if row.get("input") not in (None, "") else {}
    aside = "the dataset item is archived" if row.get("status") == "ARCHIVED" else ""
    about: dict[str, Any] = {"aside": aside, "time": standard_time(row.get("updatedAt") or row.get("createdAt")), "raw": row}
    origin = f"langfuse:{own_name(row)}"
    if row.get("expectedOutput") in (None, ""):
        yield Judgement(origin, "answer", aside=aside or "the dataset item has no expected output", raw=row)
        return
    yield from judged(
        fields, "expectedOutput", row["expectedOutput"], data={**source, **query}, origin=origin, kind="answer", **about
    )


def _shown(observation: Any, trace: Any, known: Known, fields: Fields) -> dict[str, Any]:
    """What was asked and answered: the observation's, and for what it lacks the trace's."""
    found: dict[str, Any] = {}
    for name, key in (("query", "input"), ("old", "output")):
        values = [known[str(place)].get(key) for place in (observation, trace) if place is not None and str(place) in known]
        found[fields.names[name][0]] = next((value for value in values if value not in (None, "")), "")
    return found
