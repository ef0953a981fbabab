"""Label Studio: JSON, and the flat forms JSON_MIN, CSV and TSV.

    JSON  [{id, data, annotations: [{id, result: [{from_name, to_name, type, value}], was_cancelled, ground_truth,
          completed_by, updated_at}], drafts, predictions}]
    flat  a row an annotation: the task's data, id, a column for each from_name, annotator, annotation_id, lead_time, …

Cancelled annotations, drafts and predictions are set aside. A text area's value is a list of texts, each of them an answer.
Where an annotation of a task is ground truth, it stands for what it answers, and the others are set aside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from raglan.feedback.judgement import Fields, Judgement, judged, standard_time

__all__ = ["judgements"]

ABOUT = ("annotator", "annotation_id", "created_at", "updated_at", "lead_time", "agreement", "history")
VALUES = ("text", "choices", "rating", "number", "taxonomy", "labels", "ranker", "datetime")
CANCELLED = "the annotation was cancelled"
OTHER_TRUTH = "another annotation of the task is ground truth"


def judgements(rows: list[dict[str, Any]], fields: Fields) -> Iterator[Judgement]:
    for row in rows:
        yield from (_task if isinstance(row.get("annotations"), list) else _flat)(row, fields)


def _task(task: dict[str, Any], fields: Fields) -> Iterator[Judgement]:
    cancelled = task.get("cancelled_annotations")  # how many, or which
    every = [*task["annotations"], *(cancelled if isinstance(cancelled, list) else [])]
    true = {name for a in every if a.get("ground_truth") and not a.get("was_cancelled") for name in _names(a)}
    for annotation in every:
        aside = CANCELLED if annotation.get("was_cancelled") else ""
        others = set() if annotation.get("ground_truth") else true
        yield from _annotation(task, annotation, fields, f"{annotation.get('id')}", aside, others)
    for kind in ("drafts", "predictions"):
        for place, machine in enumerate(task.get(kind) or []):
            if isinstance(machine, Mapping):
                aside = {"drafts": "a draft was not submitted", "predictions": "a prediction is no person's answer"}[kind]
                yield from _annotation(task, machine, fields, f"{kind}{machine.get('id', place)}", aside, set())


def _annotation(
    task: Mapping[str, Any], annotation: Mapping[str, Any], fields: Fields, name: str, aside: str, true: set[str]
) -> Iterator[Judgement]:
    data = task.get("data") or {}
    seen: Counter[str] = Counter()
    for result in annotation.get("result") or []:
        question = result.get("from_name", "")
        about: dict[str, Any] = {
            "annotator": _person(annotation.get("completed_by")),
            "time": standard_time(annotation.get("updated_at") or annotation.get("created_at")),
            "aside": aside or (OTHER_TRUTH if question in true else ""),
            "raw": {"task": task.get("id"), "data": data, "annotation": {**annotation, "result": [result]}},
        }
        origin = _origin(task.get("id"), name, question, seen[question])
        seen[question] += 1
        yield from judged(fields, question, _value(result.get("value")), data=data, origin=origin, **about)


def _flat(row: dict[str, Any], fields: Fields) -> Iterator[Judgement]:
    said = {name: value for name, value in row.items() if name not in (*ABOUT, "id") and fields.kind(name) is not None}
    data = {name: value for name, value in row.items() if name not in said and name not in ABOUT[:-1]}
    about: dict[str, Any] = {
        "annotator": _person(row.get("annotator")),
        "time": standard_time(row.get("updated_at") or row.get("created_at")),
        "raw": row,
    }
    for question, value in said.items():
        values = value if isinstance(value, list) and any(isinstance(item, Mapping) for item in value) else [value]
        for place, one in enumerate(values):
            origin = _origin(row.get("id"), str(row.get("annotation_id")), question, place)
            yield from judged(fields, question, _value(one), data=data, origin=origin, **about)
    if not said:
        yield Judgement(
            _origin(row.get("id"), str(row.get("annotation_id")), "", 0), "", raw=row,
            aside=f"no column of {', '.join(row)} is mapped",
        )  # fmt: skip


def _origin(task: Any, annotation: str, question: str, place: int) -> str:
    return f"label-studio:{task}:{annotation}:{question}" + (f":result{place}" if place else "")


def _names(annotation: Mapping[str, Any]) -> set[str]:
    return {result.get("from_name", "") for result in annotation.get("result") or []}


def _value(value: Any) -> Any:
    """{"text": ["a"]} → ["a"], {"rating": 4} → 4, {"choices": ["x"]} → "x"; several choices stay a list."""
    if not isinstance(value, Mapping):
        return value
    inner = next((value[key] for key in VALUES if key in value), None)
    return inner[0] if isinstance(inner, list) and len(inner) == 1 else inner


def _person(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value.get("email") or value.get("id") or "")
    return "" if value is None else str(value)
