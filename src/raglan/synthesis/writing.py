"""What passes between a plan, a teacher and the evidence, on the way from a cell to an example.

    Job       one attempt at a cell
    Draft     what a teacher asks about it: question, answers, the passages that hold them; nothing is shown yet
    Sheet     what the answer may rest on: the passages in their order, after noise, guard and budget, and the prompt
    Made      a sheet with its answer
    Reject    a job that came to nothing: at which step, why, and the raw text
    Shelf     which documents a plan's questions may rest on, where another plan has some of them

A teacher writes; whoever drives it chooses passages (`show`), verifies, counts and keeps. So a teacher sees a sheet and never a
role of its passages, and the same checks hold for all teachers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from raglan.perturb import Slot
from raglan.records import Passage
from raglan.synthesis.plan import Cell

__all__ = ["Draft", "Job", "Made", "Reject", "Sheet", "Shelf", "Show", "Teacher"]


@dataclass(frozen=True, slots=True)
class Job:
    """One attempt at a cell; ordinals count from 0."""

    cell: Cell
    ordinal: int = 0

    @property
    def id(self) -> str:
        return f"{self.cell.number}-{self.ordinal}"

    def seed(self, purpose: str) -> int:
        return self.cell.seed_for(purpose, ordinal=self.ordinal)


@dataclass(frozen=True, slots=True)
class Draft:
    """A question with what answers it.

    Attributes:
        answers: aliases of the truth; none where a task has no short one.
        gold: the evidence, as many passages as `cell.evidence`; none of it is shown in a gold-absent cell.
        facts: the statements that an answer needs.
        beside: passages written to look like evidence and hold none of the facts; they pass the guard as all noise does.
        labels, fields: allowed labels or option letters; keys of a JSON answer.
        about: the job of a reader that a from-scratch example was written for, which ties it in a split.
        seen: what the teacher wants kept of how it was made: calls, tokens, prompt hashes, form, overlap.
    """

    job: Job
    query: str
    answers: tuple[str, ...] = ()
    gold: tuple[Passage, ...] = ()
    history: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()
    beside: tuple[Passage, ...] = ()
    labels: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    about: str = ""
    seen: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sheet:
    """A draft's passages in the order in which they stand, and the text that is answered.

    Attributes:
        slots: all that is shown, each with its record. Passages that the budget left out are not among them.
        prompt: question, turns, instruction and passages as rendered for the student.
        instruction: what is asked of the answer: its format, and what to do where the passages do not tell.
        seen: how it was put: the rendering with its fingerprint, and how many passages the budget left out.
    """

    draft: Draft
    slots: tuple[Slot, ...]
    prompt: str
    instruction: str = ""
    seen: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Made:
    """An answered sheet. `finish`: why the writer stopped; empty where it cannot have been cut."""

    sheet: Sheet
    target: str
    finish: str = ""
    seen: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reject:
    """`step`: brainstorm, draft, passages, show, answer, verify, split, decontaminate or dedupe."""

    job: Job
    step: str
    reason: str
    detail: str = ""
    raw: str = ""


@dataclass(frozen=True, slots=True)
class Shelf:
    """What is open to a plan's questions.

    Attributes:
        closed: documents that none of them may rest on.
        only: documents that are visited, by their names (a passage's id where it has none), and linked to others; None: all.
        first: number of the first brainstorm of each kind, so that no job of another plan's brainstorms comes again.
    """

    closed: frozenset[str] = frozenset()
    only: frozenset[str] | None = None
    first: int = 0

    def visits(self, document: str) -> bool:
        return document not in self.closed and (self.only is None or document in self.only)


Show = Callable[[Draft], Sheet | Reject]


class Teacher(Protocol):
    """Whoever writes: rules (`offline`), or a model behind an endpoint."""

    name: str

    def cannot(self) -> Mapping[str, tuple[str, ...]]:
        """Factor → values that it never writes; they leave the plan beforehand and are listed."""
        ...

    def write(self, jobs: Iterable[Job], show: Show) -> Iterator[Made | Reject]:
        """Each job once, in whatever order they come to an end. Equal jobs give equal results, whatever else is asked.

        `show` is called once for each draft, from the thread that iterates.

        Raises:
            CallsStopped: paid calls cannot go on (cap, key, broken endpoint, interrupt); the journal keeps what is finished.
        """
        ...
