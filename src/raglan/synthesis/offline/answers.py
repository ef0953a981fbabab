"""Answers to a sheet, per answer format, out of the evidence's own sentences.

Marks such as [2] are the places at which evidence really stands, and quotes are its sentences letter by letter. Where no passage
answers, the answer says so in one of ten wordings a language, and what is missing.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from typing import Any

from raglan.perturb import Slot
from raglan.synthesis.offline.ideas import LETTERS, Idea, phrases
from raglan.synthesis.plan import ABSENT
from raglan.synthesis.writing import Sheet

__all__ = ["answer"]

BEGIN, END = "##begin_quote##", "##end_quote##"


def answer(idea: Idea, sheet: Sheet) -> str:
    """What is to be learned from the sheet."""
    cell = idea.draft.job.cell
    told = phrases(cell.language)
    chance = random.Random(idea.draft.job.seed("answer"))
    if cell.relation == ABSENT:
        return _declines(idea, told, chance)
    return _FORMATS[cell.answer_format](idea, sheet, told, chance)


def _declines(idea: Idea, told: Mapping[str, Any], chance: random.Random) -> str:
    """What is missing; of a claim that is to be labelled, the label that says so."""
    unknown = told["labels"][2]
    if idea.form == "claim" and idea.draft.labels:
        letters = idea.draft.labels[0] == LETTERS[0]
        if letters:
            return f"{LETTERS[2]}. {unknown}"
        if idea.draft.job.cell.answer_format == "span":
            return str(unknown)
    name = "missing_claim" if idea.form == "claim" else "missing_topic" if idea.items else "missing"
    kind = told["kinds"].get(idea.kind, "")
    what = told[name].format(kind=kind, about=idea.about) if idea.about else told["here"]
    return str(chance.choice(told["abstain"])).replace("{what}", what)


def _short(idea: Idea, sheet: Sheet, told: Mapping[str, Any], chance: random.Random) -> str:
    return idea.value


def _sentence(idea: Idea, sheet: Sheet, told: Mapping[str, Any], chance: random.Random) -> str:
    if idea.form == "claim":
        return _corrected(idea, sheet, told, chance)
    if idea.items:
        return _joined(idea, told)
    text = str(chance.choice(told["sentence"]))
    return text.replace("{kind}", told["kinds"][idea.kind]).replace("{value}", idea.value)


def _joined(idea: Idea, told: Mapping[str, Any]) -> str:
    return ("" if told["yes"] == "是" else " ").join(text for _, text in idea.quotes)


def _corrected(idea: Idea, sheet: Sheet, told: Mapping[str, Any], chance: random.Random) -> str:
    """The claim as it should be; one that is right is said to be."""
    return idea.true if idea.wrong else str(chance.choice(told["right"])).replace("{c}", idea.true)


def _yes_no(idea: Idea, sheet: Sheet, told: Mapping[str, Any], chance: random.Random) -> str:
    word = told["no"] if idea.wrong else told["yes"]
    stop = "。" if word in ("是", "否") else ". "
    return f"{word.capitalize()}{stop}{_quoted(idea, told)}"


def _quoted(idea: Idea, told: Mapping[str, Any]) -> str:
    return " ".join(told["quoted"].format(text=text) for _, text in idea.quotes)


def _list(idea: Idea, sheet: Sheet, told: Mapping[str, Any], chance: random.Random) -> str:
    return "\n".join(f"{number}. {item}" for number, item in enumerate(idea.items, 1))


def _paragraph(idea: Idea, sheet: Sheet, told: Mapping[str, Any], chance: random.Random) -> str:
    return _joined(idea, told)


def _cited(idea: Idea, sheet: Sheet, told: Mapping[str, Any], chance: random.Random) -> str:
    """Each sentence as a quote, with the number of the passage that it stands in."""
    return " ".join(f"{told['quoted'].format(text=text)} [{_place(passage.id, sheet)}]" for passage, text in idea.quotes)


def _place(identity: str, sheet: Sheet) -> int:
    """Where a passage stands, from 1; of a passage that was changed for the sheet, what was made of it."""
    return next(place for place, slot in enumerate(sheet.slots, 1) if _is(slot, identity))


def _is(slot: Slot, identity: str) -> bool:
    return slot.role == "gold" and (slot.passage.id == identity or identity in slot.parents)


def _reasoned(idea: Idea, sheet: Sheet, told: Mapping[str, Any], chance: random.Random) -> str:
    """Quotes in RAFT's marks, and the answer in the last line."""
    said = (str(chance.choice(told["said"])).replace("{quote}", f"{BEGIN}{text}{END}") for _, text in idea.quotes)
    return f"{' '.join(said)}\n<ANSWER>: {idea.value}"


def _notes(idea: Idea, sheet: Sheet, told: Mapping[str, Any], chance: random.Random) -> str:
    lines = [
        told["note"].format(n=_place(passage.id, sheet), quote=told["quoted"].format(text=text))
        for passage, text in idea.quotes
    ]
    return "\n".join([*lines, told["answer"].format(value=idea.value)])


def _json(idea: Idea, sheet: Sheet, told: Mapping[str, Any], chance: random.Random) -> str:
    value: Any = list(idea.items) if idea.items else idea.value
    return json.dumps({idea.draft.fields[0]: value}, ensure_ascii=False)


_FORMATS: Mapping[str, Callable[[Idea, Sheet, Mapping[str, Any], random.Random], str]] = {
    "span": _short, "short_sentence": _sentence, "yes_no_reason": _yes_no, "option_letter": _short, "list": _list,
    "number_unit": _short, "paragraph": _paragraph, "cited_long": _cited, "quoted_reasoning": _reasoned,
    "notes_then_answer": _notes, "json": _json, "corrected_text": _corrected,
}  # fmt: skip
