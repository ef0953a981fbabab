"""The grammar of a Self-RAG row, on ids: text is never searched for a reflection token.

    row      := lead? segment+ IsUse EOS
    segment  := [Retrieval] <paragraph> passage </paragraph> ( [Relevant] text IsSup tail? | [Irrelevant] text )
              | [No Retrieval] text
              | [Continue to Use Evidence] text

`lead`, before the first Retrieve token, and `tail`, behind an IsSup, are untagged text: sentences too short to be judged.
A row that was cut has whole segments, but no IsUse and no EOS. `parse` and `render` are each other's inverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from raglan.errors import CorpusError
from raglan.reflection.schema import Schema

__all__ = ["Decision", "GrammarError", "Row", "Segment", "parse", "render"]

Decision = Literal["yes", "no", "continue"]


class GrammarError(CorpusError):
    """A row off the grammar. `position` is that of the first id which cannot stand where it stands."""

    def __init__(self, message: str, *, position: int, hint: str | None = None):
        super().__init__(f"position {position}: {message}", hint=hint)
        self.position = position


@dataclass(frozen=True)
class Segment:
    """One decision and what was written under it. `passage`, `is_rel` only for "yes"; `is_sup`, `tail` only if relevant."""

    decision: Decision
    text: tuple[int, ...] = ()
    passage: tuple[int, ...] | None = None
    is_rel: int | None = None
    is_sup: int | None = None
    tail: tuple[int, ...] = ()


@dataclass(frozen=True)
class Row:
    """A whole output: `is_use` is its IsUse id, None where the row was cut; `ended` whether EOS stands at its end."""

    segments: tuple[Segment, ...]
    lead: tuple[int, ...] = ()
    is_use: int | None = None
    ended: bool = False


def parse(ids: Sequence[int], schema: Schema, *, eos: int) -> Row:
    """The row that these ids are.

    Raises:
        GrammarError: they are none; it knows the first position at fault.
    """
    return _Reader(tuple(ids), schema, eos).row()


def render(row: Row, schema: Schema, *, eos: int) -> tuple[int, ...]:
    """The ids of a row; `parse` gives it back.

    Raises:
        GrammarError: no output of the grammar has these parts.
    """
    ids = list(row.lead)
    for segment in row.segments:
        ids += _rendered(segment, schema)
    ids += [row.is_use] if row.is_use is not None else []
    ids += [eos] if row.ended else []
    if parse(ids, schema, eos=eos) != row:
        raise GrammarError("these parts are read back as another row", position=0, hint="words must hold no reflection token")
    return tuple(ids)


def _rendered(segment: Segment, schema: Schema) -> list[int]:
    ids = [{"no": schema.no, "yes": schema.yes, "continue": schema.cont}[segment.decision]]
    if segment.passage is not None:
        ids += [schema.opens, *segment.passage, schema.closes]
    ids += [segment.is_rel] if segment.is_rel is not None else []
    ids += segment.text
    ids += [segment.is_sup] if segment.is_sup is not None else []
    return [*ids, *segment.tail]


class _Reader:
    """Goes through the ids once, from left to right."""

    def __init__(self, ids: tuple[int, ...], schema: Schema, eos: int):
        self.ids, self.schema, self.eos, self.at = ids, schema, eos, 0

    def row(self) -> Row:
        lead, segments = self.words(), [self.segment()]
        while self.role() == "retrieve":
            segments.append(self.segment())
        is_use = self.take() if self.role() == "is_use" else None
        ended = is_use is not None and self.next() == self.eos
        self.at += ended
        if self.at < len(self.ids):
            raise self.fault("a Retrieve token, IsUse or the end" if is_use is None else "the end token")
        return Row(tuple(segments), lead, is_use, ended)

    def segment(self) -> Segment:
        if self.role() != "retrieve":
            raise self.fault("a Retrieve token")
        opened = self.take()
        if opened != self.schema.yes:
            return Segment("no" if opened == self.schema.no else "continue", self.words())
        self.expect(self.next() == self.schema.opens, "<paragraph>")
        passage = self.words()
        self.expect(self.next() == self.schema.closes, "</paragraph>")
        if self.role() != "is_rel":
            raise self.fault("an IsRel token")
        is_rel, text = self.take(), self.words()
        if is_rel == self.schema.irrelevant:
            return Segment("yes", text, passage, is_rel)
        if self.role() != "is_sup":
            raise self.fault("an IsSup token")
        return Segment("yes", text, passage, is_rel, self.take(), self.words())

    def words(self) -> tuple[int, ...]:
        began = self.at
        while self.at < len(self.ids) and self.role() is None and self.next() != self.eos:
            self.at += 1
        return self.ids[began : self.at]

    def next(self) -> int | None:
        return self.ids[self.at] if self.at < len(self.ids) else None

    def role(self) -> str | None:
        return None if self.at >= len(self.ids) else self.schema.role_of(self.ids[self.at])

    def take(self) -> int:
        self.at += 1
        return self.ids[self.at - 1]

    def expect(self, holds: bool, wanted: str) -> None:
        if not holds:
            raise self.fault(wanted)
        self.at += 1

    def fault(self, wanted: str) -> GrammarError:
        found = self.next()
        if found is None:
            return GrammarError(f"the row ends where {wanted} should stand", position=self.at)
        named = "the end token" if found == self.eos else f"the word {found}"
        named = self.schema.spelling(found) if self.schema.role_of(found) else named
        return GrammarError(f"{named} stands where {wanted} should", position=self.at)
