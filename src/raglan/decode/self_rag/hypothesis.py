"""A path of the long form's tree: immutable segments, what they came to, and the ids that stand before its next segment.

    context of a child = question + every ancestor's segment once, with its reflection ids + the child's own passage

Of the ancestors' passages the last `keep` stay; where one has left, its decision token still stands before its segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from raglan.citations import cite
from raglan.records import Hit
from raglan.reflection import Components, Decision, Schema

__all__ = ["Branch", "Hypothesis", "Ids", "Step", "chunks", "kept_from", "role_token", "whole"]

Ids = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Step:
    """A segment that was written.

    Attributes:
        forced: the ids that were put before it: its decision, and the passage it retrieved.
        ids: what was generated, without the boundary's token and the end.
        hit: the passage it retrieved, or that was in use.
        parts: its four figures, those that it inherited included. `score`: what they come to.
        logprob: Σ log p of all generated ids. `flags`: what was missing, relaxed or off the grammar.
    """

    decision: Decision
    forced: Ids
    ids: Ids
    hit: Hit | None
    text: str
    parts: Components
    score: float
    logprob: float
    is_rel: int | None = None
    is_sup: int | None = None
    is_use: int | None = None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """A path from the root. `number` names it in the trace.

    Attributes:
        past: what its children's prompts hold: its steps (or, released, a sibling's among them).
        marks: (M,) log-probabilities behind it, which decide the next step. `likeliest`: the likeliest id there.
        key: its score, and what ties are decided by.
        finish: why it went no further: eos, length, depth, budget, stuck; empty while it is live.
    """

    number: int
    marks: np.ndarray
    likeliest: int
    steps: tuple[Step, ...] = ()
    past: tuple[Step, ...] = ()
    key: tuple[float, float] = (0.0, 0.0)
    finish: str = ""

    @cached_property
    def text(self) -> str:
        """What a reader sees, without citations; an exactly repeated sentence stands once."""
        return cite([(step.text, ()) for step in self.steps])[0]

    @property
    def in_use(self) -> Hit | None:
        """The passage that was retrieved last."""
        return next((step.hit for step in reversed(self.steps) if step.decision == "yes"), None)

    @property
    def read(self) -> set[str]:
        """Ids of the passages on the way."""
        return {step.hit.passage.id for step in self.steps if step.hit is not None}


@dataclass(frozen=True, eq=False)
class Branch:
    """A child that is to be written: `forced` ids go behind its parent's context."""

    parent: Hypothesis
    decision: Decision
    forced: Ids
    hit: Hit | None = None
    flags: tuple[str, ...] = field(default=())


def kept_from(past: Sequence[Step], keep: int | None) -> int:
    """The first step with its passage before it, as all after it have, when the last `keep` passages stay (None: all)."""
    retrieved = [place for place, step in enumerate(past) if step.decision == "yes"]
    if keep is None or len(retrieved) < keep:
        return 0
    return retrieved[-keep] if keep else len(past)


def chunks(past: Sequence[Step], keep: int | None) -> tuple[list[Ids], list[Ids]]:
    """The ids behind the question: of steps whose passage has left, and of the others, in pieces a context may end with."""
    begin = kept_from(past, keep)
    gone = [(*step.forced[:1], *step.ids) for step in past[:begin]]
    return gone, [piece for step in past[begin:] for piece in (step.forced, step.ids)]


def role_token(ids: Sequence[int], schema: Schema, role: Any) -> int | None:
    """The first id of a role among these."""
    return next((one for one in ids if one in schema.ids[role]), None)


def whole(pieces: Sequence[Ids]) -> Ids:
    """Pieces as one."""
    return tuple(one for piece in pieces for one in piece)
