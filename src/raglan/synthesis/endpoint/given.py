"""What a draft is given beside its job: a real instruction whose manner it imitates, or an answer that it has to ask for.

    style     `writing.styles`, lines of {"text", "licence", "source"?}; one an attempt, by its seed (as RAG-Instruct does).
              Manner is asked for, not words: of the runs of three words that the shorter of style and question has, fewer
              than half may stand in both, or the draft is rejected as `repeats_style`
    answer    a share of the questions over a corpus that have a short answer in one passage, by quota (as SimRAG does): a
              date, number, name or title of the passage, by the rules of the offline teacher. `no_span`: it has none;
              `another_answer`: the reply's answers lack it

What neither is on for is asked as without them, letter by letter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raglan.artifact import fingerprint
from raglan.errors import RecipeError
from raglan.files import json_lines
from raglan.perturb import held
from raglan.recipe import WritingSettings
from raglan.records import Passage
from raglan.shingles import shared, shingles
from raglan.synthesis.offline.spans import Span, language_of, spans
from raglan.synthesis.plan import PARTIAL, SCRATCH, Cell
from raglan.synthesis.quotas import exact, quotas
from raglan.synthesis.writing import Job
from raglan.text import answer_words, sentences

__all__ = ["Given", "Style", "answered_with", "read_styles", "repeats"]

RUN, REPEATED = 3, 0.5  # words; share of the shorter text's runs
TASKS, RELATIONS = ("factoid", "numeric", "temporal", "slot_filling"), ("R1", "R5")
FORMATS = ("span", "short_sentence", "number_unit", "quoted_reasoning", "notes_then_answer", "json")
KINDS = {"numeric": ("number",), "temporal": ("year", "date")}
ANY = ("year", "date", "number", "name", "title")


@dataclass(frozen=True, slots=True)
class Style:
    """An instruction that somebody really gave. `licence`: under which its text may be used; `source`: where it is from."""

    text: str
    licence: str
    source: str = ""

    @property
    def record(self) -> dict[str, str]:
        told = {"id": fingerprint([self.text]), "licence": self.licence}
        return {**told, **({"source": self.source} if self.source else {})}


class Given:
    """What the attempts at a plan's cells are given.

    Raises:
        RecipeError: `writing.styles` cannot be read, or a line lacks its text or licence.
    """

    def __init__(self, writing: WritingSettings, cells: Iterable[Cell]):
        self.styles = read_styles(writing.styles) if writing.styles is not None else ()
        fit = sorted((cell for cell in cells if _has_short_answer(cell)), key=lambda one: (one.seed_for("answer"), one.number))
        share = exact(writing.answer_first)
        count = quotas(len(fit), [share, 1 - share])[0]
        self.answers = frozenset(cell.number for cell in fit[:count])

    @property
    def names(self) -> tuple[str, ...]:
        """Which of `style` and `answer` are on."""
        return (*(("style",) if self.styles else ()), *(("answer",) if self.answers else ()))

    @property
    def content(self) -> list[Any]:
        """What texts follow from."""
        return [[style.text, style.record] for style in self.styles]

    def style(self, job: Job) -> Style | None:
        return self.styles[job.seed("style") % len(self.styles)] if self.styles else None

    def answer(self, job: Job, passage: Passage) -> Span | None:
        """One of the passage's spans that its title does not tell."""
        kinds = ("number",) if job.cell.answer_format == "number_unit" else KINDS.get(job.cell.task, ANY)
        language, title = language_of(passage.text) or "en", passage.title.lower()
        found = {
            span.text: span
            for sentence in sentences(passage.text)
            for span in spans(sentence, language)
            if span.kind in kinds and span.text.lower() not in title
        }
        return list(found.values())[job.seed("answer") % len(found)] if found else None


def _has_short_answer(cell: Cell) -> bool:
    """Whether the cell asks for a short string of one passage."""
    fits = cell.task in TASKS and cell.relation in RELATIONS and cell.answer_format in FORMATS
    return fits and cell.source != SCRATCH and cell.absent_policy != PARTIAL


def answered_with(answers: Sequence[str], span: Span) -> bool:
    """Whether an answer holds the span as whole words, numerals in any spelling."""
    return any(held(Passage("", answer), [span.text]) for answer in answers)


def repeats(query: str, style: Style) -> bool:
    """Whether a question takes over the wording of what it was to imitate."""
    runs = shingles([answer_words(query), answer_words(style.text)], RUN)
    first, second = np.array([0]), np.array([1])
    return int(shared(runs, runs, first, second)[0]) >= REPEATED * max(1, int(runs.counts.min()))


def read_styles(path: Path) -> tuple[Style, ...]:
    """Raises RecipeError: the file is not there, is empty, or a line lacks its text or licence."""
    if not path.is_file():
        raise RecipeError(f"there is no {path}", hint='synthesis.writing.styles: lines of {"text", "licence", "source"?}')
    found = []
    for number, row in json_lines(path, "utf-8"):
        values = [row.get(name, "") for name in ("text", "licence", "source")]
        if not all(isinstance(value, str) for value in values) or not values[0].strip() or not values[1].strip():
            raise RecipeError(
                f"{path}:{number} is no style: it needs a text and the licence of that text",
                hint='{"text": "Could you …", "licence": "CC BY 4.0", "source": "…"}',
            )
        found.append(Style(values[0].strip(), values[1].strip(), values[2].strip()))
    if not found:
        raise RecipeError(f"{path} holds no style", hint='lines of {"text", "licence", "source"?}')
    return tuple(found)
