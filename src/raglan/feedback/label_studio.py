"""Label Studio: JSON, and the flat forms JSON_MIN, CSV and TSV.

    JSON  [{id, data, annotations: [{id, result: [{from_name, to_name, type, value}], was_cancelled, ground_truth,
          completed_by, updated_at}], drafts, predictions}]
    flat  a row an annotation: the task's data, id, a column for each from_name, annotator, annotation_id, lead_time, …

In a flat form a column of the task's data looks like one of a person's. Annotated are the columns that `--map` names, those
that stand between `id` and `annotator` (where columns are not sorted by name), those that differ within a task, and those that
hold what an annotation tool writes, as {"text": […]}. Of others that might be either, the statements are set aside.

Cancelled annotations, drafts and predictions are set aside. A text area's value is a list of texts, each of them an answer.
Where an annotation of a task is ground truth, it stands for what it answers, and the others are set aside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from raglan.feedback.judgement import Fields, Judgement, judged, own_name, standard_time

__all__ = ["judgements"]

ABOUT = ("annotator", "annotation_id", "created_at", "updated_at", "lead_time", "agreement", "history")
VALUES = ("text", "choices", "rating", "number", "taxonomy", "labels", "ranker", "datetime")
CANCELLED = "the annotation was cancelled"
SHAPES = set(VALUES) - {"labels"}
UNTOLD = "column {0!r} may be the task's data or a person's word; if it is a person's, --map {1}={0}"
OTHER_TRUTH = "another annotation of the task is ground truth"


def judgements(rows: list[dict[str, Any]], fields: Fields) -> Iterator[Judgement]:
    flat = [row for row in rows if not isinstance(row.get("annotations"), list)]
    annotated = _annotated(flat, fields)
    for row in rows:
        yield from _task(row, fields) if isinstance(row.get("annotations"), list) else _flat(row, fields, annotated)


def _annotated(rows: Sequence[Mapping[str, Any]], fields: Fields) -> Callable[[Mapping[str, Any], str], bool | None]:
    """Of a row and one of its columns: whether a person filled it in, or None where that cannot be told."""
    tasks: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        tasks.setdefault(own_name(row), []).append(row)
    shaped = {name for row in rows for name, value in row.items() if _shaped(value)}
    differ = {name for own in tasks.values() for row in own[1:] for name, value in row.items() if value != own[0].get(name)}

    def told(row: Mapping[str, Any], name: str) -> bool | None:
        if fields.mapped(name) or name in shaped or name in differ:
            return True
        order = list(row)
        if order == sorted(order) or not {"id", "annotator"} <= set(order):
            return None
        return order.index("id") < order.index(name) < order.index("annotator")

    return told


def _shaped(value: Any) -> bool:
    """Whether it is what an annotation tool writes: {"rating": 1}, or a list of such."""
    parts = value if isinstance(value, list) else [value]
    objects = [part for part in parts if isinstance(part, Mapping) and part]
    return any(SHAPES.issuperset(part) and not isinstance(part.get("text"), str) for part in objects)


def _task(task: dict[str, Any], fields: Fields) -> Iterator[Judgement]:
    cancelled = task.get("cancelled_annotations")  # how many, or which
    every = [*task["annotations"], *(cancelled if isinstance(cancelled, list) else [])]
    true = {name for a in every if a.get("ground_truth") and not a.get("was_cancelled") for name in _names(a)}
    for annotation in every:
        aside = CANCELLED if annotation.get("was_cancelled") else ""
        others = set() if annotation.get("ground_truth") else true
        yield from _annotation(task, annotation, fields, own_name(annotation), aside, others)
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
        origin = _origin(_task_name(task), name, question, seen[question])
        seen[question] += 1
        yield from judged(fields, question, _value(result.get("value")), data=data, origin=origin, **about)


def _flat(
    row: dict[str, Any], fields: Fields, annotated: Callable[[Mapping[str, Any], str], bool | None]
) -> Iterator[Judgement]:
    named = {name: annotated(row, name) for name in row if name not in (*ABOUT, "id") and fields.kind(name) is not None}
    said = {name: row[name] for name, own in named.items() if own is not False}
    data = {name: value for name, value in row.items() if name not in said and name not in ABOUT[:-1]}
    about: dict[str, Any] = {
        "annotator": _person(row.get("annotator")),
        "time": standard_time(row.get("updated_at") or row.get("created_at")),
        "raw": row,
    }
    task, annotation = own_name(row), own_name(row, "annotation_id")
    for question, value in said.items():
        values = value if isinstance(value, list) and any(isinstance(item, Mapping) for item in value) else [value]
        for place, one in enumerate(values):
            origin = _origin(task, annotation, question, place)
            aside = "" if named[question] else UNTOLD.format(question, fields.kind(question))
            yield from judged(fields, question, _value(one), data=data, origin=origin, aside=aside, **about)
    if not said:
        yield Judgement(
            _origin(task, annotation, "", 0), "", raw=row,
            aside=f"no column of {', '.join(row)} is mapped",
        )  # fmt: skip


def _origin(task: str, annotation: str, question: str, place: int) -> str:
    return f"label-studio:{task}:{annotation}:{question}" + (f":result{place}" if place else "")


def _task_name(task: Mapping[str, Any]) -> str:
    """A task without an id is known by its data, whatever is said of it later."""
    return own_name({"id": task.get("id"), "data": task.get("data")})


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
