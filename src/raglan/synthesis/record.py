"""An answered sheet as it is checked, and as it is kept.

A synthetic `Example` holds everything that it was made of in `metadata["synth"]`:

    cell, ordinal      the cell that it fills, and which attempt it was; its id is synth-<cell>-<ordinal>
    teacher, seen      who wrote it, and what the teacher wants kept of how
    factors            the cell's values
    instruction        what was asked of the answer; `policy` where no passage answers
    passages           in the order in which they were shown: id, document, title, text and the slot's record
    target             what is to be learned
    job                the job of a reader that a from-scratch example was written for
    withheld           where gold is absent: the passages that would have answered, by id and document

`relevant` names the gold passages that are in the corpus. Withheld evidence ties an example in a split as shown evidence does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from raglan.corpus import Corpus
from raglan.perturb import Slot
from raglan.records import Example
from raglan.synthesis.plan import ABSENT, Cell
from raglan.synthesis.writing import Made, Reject
from raglan.verification import Shown, Written

__all__ = ["FORMS", "example_of", "reject_row", "written_of"]

# A cell's answer format → what verification calls it
FORMS: Mapping[str, str] = {
    "span": "span", "short_sentence": "sentence", "yes_no_reason": "yes_no", "option_letter": "option", "list": "list",
    "number_unit": "number", "paragraph": "paragraph", "cited_long": "cited", "quoted_reasoning": "reasoning",
    "notes_then_answer": "notes", "json": "json", "table": "table", "corrected_text": "corrected", "code": "code",
}  # fmt: skip
PLACED = ("number", "seed", "positions", "noise")  # of a cell: where and how, not what was asked for


def written_of(made: Made) -> Written:
    """What verification looks at: passages as shown, with their roles."""
    draft, cell = made.sheet.draft, made.sheet.draft.job.cell
    form = FORMS.get(cell.answer_format, "")
    return Written(
        id=draft.job.id, query=draft.query, target=made.target, answers=draft.answers, history=draft.history,
        passages=tuple(_shown(slot) for slot in made.sheet.slots), finish=made.finish, labels=draft.labels, fields=draft.fields,
        format="label" if form == "span" and draft.labels else form, language=cell.language, evidence=cell.relation,
        policy=cell.absent_policy or "abstain",
    )  # fmt: skip


def _shown(slot: Slot) -> Shown:
    false = (slot.value,) if slot.value else ()
    return Shown(slot.passage.text, slot.passage.title, slot.role, slot.kind, false)


def example_of(made: Made, *, teacher: str, corpus: Corpus | None = None) -> Example:
    """The record of a made example; `relevant` is empty without a corpus to find the passages in."""
    draft, sheet = made.sheet.draft, made.sheet
    job, cell = draft.job, draft.job.cell
    synth: dict[str, Any] = {
        "cell": cell.number, "ordinal": job.ordinal, "teacher": teacher, "instruction": sheet.instruction,
        "factors": _factors(cell), "passages": [_passage(slot) for slot in sheet.slots], "target": made.target,
    }  # fmt: skip
    if cell.relation == ABSENT:
        shown = {slot.passage.id for slot in sheet.slots}
        synth["policy"] = cell.absent_policy or "abstain"
        synth["withheld"] = [
            {"id": passage.id, "document": passage.document} for passage in draft.gold if passage.id not in shown
        ]
    more = {"job": draft.about, "facts": list(draft.facts), "labels": list(draft.labels), "fields": list(draft.fields)}
    synth |= {name: value for name, value in more.items() if value}
    if seen := {**draft.seen, **made.seen}:
        synth["seen"] = seen
    return Example(
        id=f"synth-{cell.number}-{job.ordinal}", query=draft.query, answers=draft.answers, history=draft.history,
        relevant=_relevant(sheet.slots, corpus), metadata={"synth": synth},
    )  # fmt: skip


def _factors(cell: Cell) -> dict[str, Any]:
    values = {field.name: getattr(cell, field.name) for field in fields(cell) if field.name not in PLACED}
    return {name: value for name, value in values.items() if value is not None}


def _passage(slot: Slot) -> dict[str, Any]:
    passage = slot.passage
    return {"id": passage.id, "document": passage.document, "title": passage.title, "text": passage.text, **slot.record()}


def _relevant(slots: Sequence[Slot], corpus: Corpus | None) -> tuple[str, ...]:
    if corpus is None:
        return ()
    gold = (slot.passage.id for slot in slots if slot.role == "gold")
    return tuple(identity for identity in gold if corpus.row(identity) is not None)


def reject_row(reject: Reject, query: str = "") -> dict[str, Any]:
    """A line of rejects.jsonl."""
    told = {"step": reject.step, "reason": reject.reason, "detail": reject.detail, "query": query, "raw": reject.raw}
    return {"cell": reject.job.cell.number, "ordinal": reject.job.ordinal} | told
