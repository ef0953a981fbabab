"""What the teacher replies with, step by step; pydantic refuses the rest, and one repair is asked for.

The models say little that JSON schemas of strict endpoints do not know (no lengths of texts): what a text must have is checked
here, after it has come.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, field_validator

from raglan.text import half_character

__all__ = ["DraftReply", "JobReply", "JobsReply", "PassageReply", "PassagesReply"]

LONGEST = 20_000  # characters of one text


def _whole(text: str) -> str:
    if (half := half_character(text)) is not None:
        raise ValueError(f"must be text in valid Unicode; {half!r} is half a character")
    return text


def _said(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    if len(text) > LONGEST or "\x00" in text:
        raise ValueError(f"must be text of at most {LONGEST} characters")
    return text.strip()


def _listed(texts: object) -> object:
    """Without empty entries and without repetitions; a server may give null for an empty list."""
    if texts is None:
        return []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return texts
    return list(dict.fromkeys(text.strip() for text in texts if text.strip()))


Whole = Annotated[str, AfterValidator(_whole)]
Said = Annotated[Whole, AfterValidator(_said)]
Listed = Annotated[list[Whole], BeforeValidator(_listed)]


class JobReply(BaseModel):
    """Something that a reader wants done, and what would settle it."""

    job: Said
    material: Whole


class JobsReply(BaseModel):
    """A brainstorm's jobs."""

    jobs: list[JobReply]

    @field_validator("jobs")
    @classmethod
    def _distinct(cls, jobs: list[JobReply]) -> list[JobReply]:
        """Without those that say the same."""
        found = list({" ".join(one.job.casefold().split()): one for one in reversed(jobs)}.values())[::-1]
        if not found:
            raise ValueError("must hold a job")
        return found


class DraftReply(BaseModel):
    """A question, what its answer needs, and the answer."""

    query: Said
    subject: Whole
    facts: Listed
    answers: Listed
    history: Listed
    labels: Listed
    fields: Listed

    @field_validator("facts")
    @classmethod
    def _some(cls, facts: list[str]) -> list[str]:
        if not facts:
            raise ValueError("must hold a fact")
        return facts


class PassageReply(BaseModel):
    title: Whole
    text: Said


class PassagesReply(BaseModel):
    """Passages in the order of what they were asked for."""

    passages: list[PassageReply]
