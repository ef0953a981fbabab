"""An answered sheet as verification sees it, and the line of one that came to nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raglan.perturb import Slot
from raglan.synthesis.writing import Made, Reject
from raglan.verification import Shown, Written

__all__ = ["FORMS", "reject_row", "written_of"]

# A cell's answer format → what verification calls it
FORMS: Mapping[str, str] = {
    "span": "span", "short_sentence": "sentence", "yes_no_reason": "yes_no", "option_letter": "option", "list": "list",
    "number_unit": "number", "paragraph": "paragraph", "cited_long": "cited", "quoted_reasoning": "reasoning",
    "notes_then_answer": "notes", "json": "json", "table": "table", "corrected_text": "corrected", "code": "code",
}  # fmt: skip


def written_of(made: Made) -> Written:
    """Passages as shown, with their roles; a span among given labels is a label."""
    draft, cell = made.sheet.draft, made.sheet.draft.job.cell
    form = FORMS.get(cell.answer_format, "")
    return Written(
        id=draft.job.id, query=draft.query, target=made.target, answers=draft.answers, history=draft.history,
        passages=tuple(_shown(slot) for slot in made.sheet.slots), finish=made.finish, labels=draft.labels, fields=draft.fields,
        format="label" if form == "span" and draft.labels else form, language=cell.language, evidence=cell.relation,
        policy=cell.absent_policy or "abstain", facts=draft.facts, query_format=cell.query_format,
    )  # fmt: skip


def _shown(slot: Slot) -> Shown:
    false = (slot.value,) if slot.value else ()
    return Shown(slot.passage.text, slot.passage.title, slot.role, slot.kind, false)


def reject_row(reject: Reject, query: str = "") -> dict[str, Any]:
    """A line of rejects.jsonl."""
    told = {"step": reject.step, "reason": reject.reason, "detail": reject.detail, "query": query, "raw": reject.raw}
    return {"cell": reject.job.cell.number, "ordinal": reject.job.ordinal} | told
