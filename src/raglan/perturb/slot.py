"""A place in a prompt: the passage that fills it, and everything that is known of how it came there.

    role      gold (the evidence), support (also holds the answer), redundant (the evidence again), noise
    kind      what it was chosen as: gold, retrieved, or a noise kind of `PALETTE`
    origin    gold, search (hits of a retriever), corpus (drawn from it), made (by an operator)
    operator  what an operator did: swap_year, reorder, truncate, …; empty where none was at work
    parents   ids of the passages that it was made from
    guard     the false-negative guard's verdict, see `raglan.perturb.guard`

The weights of `PALETTE` are ours; each is a row to ablate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raglan.errors import RecipeError
from raglan.records import Hit, Passage

__all__ = ["KINDS", "PALETTE", "Kind", "Role", "Slot", "Verdict", "content_hash", "gold_slots", "kind_named", "retrieved_slot"]

Role = Literal["gold", "support", "redundant", "noise"]
Verdict = Literal["clean", "answer_string_only", "unchecked", "also_gold", "overlap", "same", "exempt"]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of noise: its share of the slots, whether the guard sees it, and whether it may stand where gold is absent."""

    name: str
    weight: str
    guarded: bool = True
    without_gold: bool = True


PALETTE = (
    Kind("hard", "0.40"),
    Kind("neighbour", "0.10"),
    Kind("random", "0.20"),
    Kind("other_gold", "0.10"),
    Kind("counterfactual", "0.07", without_gold=False),
    Kind("near_duplicate", "0.05", guarded=False, without_gold=False),
    Kind("garbled", "0.04", guarded=False, without_gold=False),
    Kind("boilerplate", "0.04"),
)
KINDS = {kind.name: kind for kind in PALETTE}


@dataclass(frozen=True, slots=True)
class Slot:
    """A passage with its record; `retriever`, `rank` and `score` (raw) where a search found it.

    `value` is what a counterfactual says instead of the answer.
    """

    passage: Passage
    role: Role
    kind: str
    origin: Literal["gold", "search", "corpus", "made"]
    operator: str = ""
    parents: tuple[str, ...] = ()
    guard: Verdict = "exempt"
    retriever: str = ""
    rank: int | None = None
    score: float | None = None
    value: str = ""

    def record(self) -> dict[str, Any]:
        """All but the passage's text, as JSON values."""
        names = ("role", "kind", "origin", "operator", "guard", "retriever", "rank", "score", "value")
        return {"passage": self.passage.id, "parents": list(self.parents)} | {name: getattr(self, name) for name in names}


def kind_named(name: str) -> Kind:
    """Raises RecipeError: no such kind."""
    if name not in KINDS:
        raise RecipeError(f"{name!r} is no kind of noise", hint=f"one of {', '.join(KINDS)}")
    return KINDS[name]


def content_hash(passage: Passage) -> str:
    """Equal where two passages say the same, whatever their titles and ids; white space does not count."""
    return hashlib.blake2b(" ".join(passage.text.split()).encode(), digest_size=16).hexdigest()


def gold_slots(passages: Sequence[Passage]) -> tuple[Slot, ...]:
    """The evidence, as it stands in the corpus."""
    return tuple(Slot(passage, "gold", "gold", "gold") for passage in passages)


def retrieved_slot(hit: Hit, *, role: Role, guard: Verdict, kind: str = "retrieved", retriever: str = "") -> Slot:
    return Slot(hit.passage, role, kind, "search", guard=guard, retriever=retriever, rank=hit.rank, score=hit.score)
