"""A question on its way to its answer: its branches, what was written to them, and what that took."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from raglan.decode.self_rag.rules import Decision
from raglan.errors import GeneratorError
from raglan.records import Hit, Marked
from raglan.reflection import Components
from raglan.text import shortened

__all__ = ["Branch", "Question", "Spent", "Written", "nothing_fits"]


@dataclass
class Spent:
    """What one question took, as if it had been alone; `seconds` is its share of its batch's.

    Attributes:
        calls: forward passes it took part in. `computed`: positions through the model.
        reused: positions of prefixes that branches found computed. `generated`: ids written.
    """

    calls: int = 0
    computed: int = 0
    reused: int = 0
    generated: int = 0
    seconds: float = 0.0

    def passed(self, computed: int, *, reused: int = 0) -> None:
        """One forward pass."""
        self.calls += 1
        self.computed += computed
        self.reused += reused

    def wrote(self, lengths: Sequence[int]) -> None:
        """Rows written in lockstep. The first id needs no pass, and the last one is never read."""
        self.calls += max(lengths, default=1) - 1
        self.computed += sum(length - 1 for length in lengths)
        self.generated += sum(lengths)


@dataclass
class Branch:
    """A question with one passage, or with none, and what was written to it.

    Attributes:
        ids: behind the question. `room`: new tokens that fit. `row`: its place among the batch's branches.
        rel: its relevance. `bound`: what its score can come to at most.
        pruned: why nothing was written: `too_long`, `all_irrelevant`, `top_m`, `tau` or `bound`; empty where it was.
    """

    hit: Hit | None
    ids: list[int]
    room: int
    row: int = -1
    rel: float = 0.0
    bound: float = math.inf
    pruned: str = ""
    written: list[Written] = field(default_factory=list)

    @property
    def rank(self) -> int:
        """Of its passage; a branch without one is the first."""
        return self.hit.rank if self.hit is not None else 0


@dataclass(frozen=True)
class Written:
    """One continuation with what it comes to. `raw`: its text with the reflection tokens. `refused`: constraints it breaks."""

    branch: Branch
    marked: Marked
    text: str
    raw: str
    parts: Components
    final: float
    flags: tuple[str, ...]
    refused: tuple[str, ...] = ()

    @property
    def logprob(self) -> float:
        """Σ log p of its ids."""
        return math.fsum(self.marked.logprobs.tolist())

    @property
    def finished(self) -> bool:
        """Whether it came to its end before the limit."""
        return self.marked.finish != "length"


@dataclass
class Question:
    """A question.

    Attributes:
        prompt: its ids. `options`: of which one is scored the likeliest; none where the answer is written.
        spare: the branch without a passage, kept for the case that all passages are irrelevant.
        mixed: p of each option. `each`: the same under each passage that was not pruned.
    """

    query: str
    hits: Sequence[Hit]
    prompt: list[int]
    options: Sequence[str] = ()
    decision: Decision | None = None
    branches: list[Branch] = field(default_factory=list)
    spare: Branch | None = None
    abstains: bool = False
    flags: list[str] = field(default_factory=list)
    mixed: list[float] = field(default_factory=list)
    each: list[list[float]] = field(default_factory=list)
    spent: Spent = field(default_factory=Spent)

    @property
    def retrieved(self) -> bool:
        """Whether it was decided to retrieve."""
        return self.decision is not None and self.decision.retrieve

    @property
    def alive(self) -> list[Branch]:
        """Branches that are not pruned."""
        return [branch for branch in self.branches if not branch.pruned]

    @property
    def rows(self) -> list[Branch]:
        """What is computed behind the question."""
        return [*self.alive, *([self.spare] if self.spare is not None else [])]

    @property
    def written(self) -> list[Written]:
        """All continuations, by branch."""
        return [one for branch in self.branches for one in branch.written]

    @property
    def read(self) -> tuple[Hit, ...]:
        """The passages whose text the model was given."""
        return tuple(branch.hit for branch in self.branches if branch.hit is not None and branch.pruned != "too_long")


def nothing_fits(query: str, passages: int, *, asked: int, positions: int | None) -> GeneratorError:
    """The fault of a question of `asked` tokens behind which none of its passages has room."""
    return GeneratorError(
        f"question {shortened(query)!r}: none of its {passages} passages fits into the model's {positions} positions "
        f"behind {asked} tokens of question",
        hint="prompt.self_rag.passage_max cuts passages; or build the knowledge base with shorter ones",
    )
