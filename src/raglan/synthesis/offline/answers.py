"""Answers to a sheet, per answer format, out of the evidence's own sentences.

Marks such as [2] are the places at which evidence really stands, and quotes are its sentences letter by letter. Where no
passage answers, the answer says so in one of ten wordings a language, and what is missing.
"""

from __future__ import annotations

import json
import random
from typing import Any

from raglan.perturb import Slot
from raglan.synthesis.offline.ideas import LETTERS, Idea, phrases
from raglan.synthesis.plan import ABSENT
from raglan.synthesis.writing import Sheet

__all__ = ["answer"]

BEGIN, END = "##begin_quote##", "##end_quote##"


def answer(idea: Idea, sheet: Sheet) -> str:
    """What is to be learned from the sheet."""
    made, cell = _Answer(idea, sheet), idea.draft.job.cell
    return made.declines() if cell.relation == ABSENT else str(getattr(made, cell.answer_format)())


class _Answer:
    """One method an answer format, by its name."""

    def __init__(self, idea: Idea, sheet: Sheet):
        self.idea, self.sheet, self.language = idea, sheet, idea.draft.job.cell.language
        self.told = phrases(self.language)
        self.chance = random.Random(idea.draft.job.seed("answer"))

    def declines(self) -> str:
        """What is missing; of a claim that is to be labelled, the label that says so."""
        idea, unknown = self.idea, str(self.told["labels"][2])
        if idea.form == "claim" and idea.draft.labels[:1] == (LETTERS[0],):
            return f"{LETTERS[2]}. {unknown}"
        if idea.form == "claim" and idea.draft.labels and idea.draft.job.cell.answer_format == "span":
            return unknown
        name = "missing_claim" if idea.form == "claim" else "missing_topic" if idea.items else "missing"
        what = self.told[name].format(kind=self.told["kinds"].get(idea.kind, ""), about=idea.about)
        return self.said("abstain", what=what if idea.about else self.told["here"])

    def said(self, name: str, **values: str) -> str:
        """One of the wordings, filled in."""
        text = str(self.chance.choice(self.told[name]))
        for key, value in values.items():
            text = text.replace(f"{{{key}}}", value)
        return text

    def quoted(self, text: str) -> str:
        return str(self.told["quoted"].format(text=text))

    def place(self, identity: str) -> int:
        """Where a passage stands, from 1; of a passage that was changed for the sheet, what was made of it."""
        return next(place for place, slot in enumerate(self.sheet.slots, 1) if _is(slot, identity))

    def span(self) -> str:
        return self.idea.value

    option_letter = number_unit = span

    def short_sentence(self) -> str:
        if self.idea.form == "claim":
            return self.corrected_text()
        if self.idea.items:
            return self.paragraph()
        return self.said("sentence", kind=self.told["kinds"][self.idea.kind], value=self.idea.value)

    def paragraph(self) -> str:
        return ("" if self.language == "zh" else " ").join(text for _, text in self.idea.quotes)

    def corrected_text(self) -> str:
        """The claim as it should be; one that is right is said to be."""
        return self.idea.true if self.idea.wrong else self.said("right", c=self.idea.true)

    def yes_no_reason(self) -> str:
        word = str(self.told["no"] if self.idea.wrong else self.told["yes"]).capitalize()
        stop = "。" if self.language == "zh" else ". "
        return f"{word}{stop}{' '.join(self.quoted(text) for _, text in self.idea.quotes)}"

    def list(self) -> str:
        return "\n".join(f"{number}. {item}" for number, item in enumerate(self.idea.items, 1))

    def cited_long(self) -> str:
        """Each sentence as a quote, with the number of the passage that it stands in."""
        return " ".join(f"{self.quoted(text)} [{self.place(passage.id)}]" for passage, text in self.idea.quotes)

    def quoted_reasoning(self) -> str:
        """Quotes in RAFT's marks, and the answer in the last line."""
        said = (self.said("said", quote=f"{BEGIN}{text}{END}") for _, text in self.idea.quotes)
        return f"{' '.join(said)}\n<ANSWER>: {self.idea.value}"

    def notes_then_answer(self) -> str:
        quotes = ((self.place(passage.id), self.quoted(text)) for passage, text in self.idea.quotes)
        lines = [str(self.told["note"].format(n=place, quote=quote)) for place, quote in quotes]
        return "\n".join([*lines, str(self.told["answer"].format(value=self.idea.value))])

    def json(self) -> str:
        value: Any = [*self.idea.items] if self.idea.items else self.idea.value
        return json.dumps({self.idea.draft.fields[0]: value}, ensure_ascii=False)


def _is(slot: Slot, identity: str) -> bool:
    return slot.role == "gold" and (slot.passage.id == identity or identity in slot.parents)
