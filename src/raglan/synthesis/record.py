"""An answered sheet as it is kept: an `Example` with everything that it was made of in `metadata["synth"]`.

    cell, ordinal, teacher      whose it is; its id is synth-<cell>-<ordinal>
    factors, seen               the cell's values; what its writer wants kept
    instruction, rendering      how it is put: see `raglan.rendering`
    policy, withheld            where gold is absent: what the answer does; the passages that would have answered
    passages                    as shown, in order: id, document, title, text, date and licence if any, and the slot's record
    target                      what is learned
    unreachable                 true where no retriever finds its passages again, and it stayed all the same
    support, closed_book        who told that it is supported; how many draws without passages were right
    job                         the job of a reader that a from-scratch example was written for

Splits, duplicates, decontamination, exports and training read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from raglan.corpus import Corpus
from raglan.perturb import Slot
from raglan.records import Example, Passage
from raglan.synthesis.plan import ABSENT, Cell
from raglan.synthesis.writing import Made

__all__ = ["example_of"]

PLACED = ("number", "seed", "positions", "noise")  # of a cell: where and how, not what was asked for


def example_of(made: Made, *, teacher: str, corpus: Corpus | None = None, checked: Mapping[str, Any] | None = None) -> Example:
    """The record of a made example; `relevant` names gold that is shown and is in the corpus, or was changed from what is.

    `checked`: what the checks want kept.
    """
    draft, sheet = made.sheet.draft, made.sheet
    job, cell = draft.job, draft.job.cell
    synth: dict[str, Any] = {
        "cell": cell.number, "ordinal": job.ordinal, "teacher": teacher, "instruction": sheet.instruction,
        "factors": _factors(cell), "passages": [_passage(slot) for slot in sheet.slots], "target": made.target, **sheet.seen,
    }  # fmt: skip
    if cell.relation == ABSENT:
        shown = {slot.passage.id for slot in sheet.slots}
        synth["policy"] = cell.absent_policy or "abstain"
        synth["withheld"] = [_withheld(passage, corpus) for passage in draft.gold if passage.id not in shown]
    more = {
        "job": draft.about, "facts": list(draft.facts), "labels": list(draft.labels), "fields": list(draft.fields),
        "seen": {**draft.seen, **made.seen}, **(checked or {}),
    }  # fmt: skip
    synth |= {name: value for name, value in more.items() if value}
    gold = [name for slot in sheet.slots if slot.role == "gold" for name in (slot.parents or (slot.passage.id,))]
    relevant = tuple(name for name in dict.fromkeys(gold) if corpus is not None and corpus.row(name) is not None)
    identity = f"synth-{cell.number}-{job.ordinal}"
    return Example(identity, draft.query, draft.answers, relevant, history=draft.history, metadata={"synth": synth})


def _factors(cell: Cell) -> dict[str, Any]:
    values = {field.name: getattr(cell, field.name) for field in fields(cell) if field.name not in PLACED}
    return {name: value for name, value in values.items() if value is not None}


def _withheld(passage: Passage, corpus: Corpus | None) -> dict[str, str]:
    """A passage that is not shown: by its name in the corpus; where none has it, with its text."""
    there = corpus is not None and corpus.row(passage.id) is not None
    more = {"text": "" if there else passage.text, "licence": passage.licence}
    return {"id": passage.id, "document": passage.document} | {name: value for name, value in more.items() if value}


def _passage(slot: Slot) -> dict[str, Any]:
    passage = slot.passage
    more = {name: value for name, value in (("date", passage.date), ("licence", passage.licence)) if value}
    told = {"id": passage.id, "document": passage.document, "title": passage.title, "text": passage.text}
    return {**told, **more, **slot.record()}
