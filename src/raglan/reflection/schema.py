"""The vocabulary of Self-RAG: which strings are reflection tokens, which ids they have, what they are worth.

Source: Self-RAG, Asai et al. 2023 (arXiv 2310.11511) table 1; the strings are those of the published checkpoints, where
they have the ids 32000 … 32014 and <pad> 32015. Ids are read from a tokenizer and never assumed; strings may be renamed or
translated, the roles stay. Of the 15, 13 are read as log-probabilities (`marks`): the markup around a passage is not.

The order of `marks` is fixed, so that the score functions need no schema:

    0 [No Retrieval]  1 [Retrieval]  2 [Continue to Use Evidence]    retrieve
    3 [Irrelevant]    4 [Relevant]                                   is_rel
    5 [Fully supported]  6 [Partially supported]  7 [No support …]   is_sup
    8 … 12 [Utility:1] … [Utility:5]                                 is_use
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from raglan.errors import CheckpointError

__all__ = ["NAMES", "ORDER", "PAD", "PLACES", "READ", "SIZES", "VALUES", "Role", "Schema"]

Role = Literal["retrieve", "is_rel", "is_sup", "is_use", "markup"]
READ: tuple[Role, ...] = ("retrieve", "is_rel", "is_sup", "is_use")  # the order of the marks

NAMES: Mapping[str, tuple[str, ...]] = {
    "retrieve": ("[No Retrieval]", "[Retrieval]", "[Continue to Use Evidence]"),
    "is_rel": ("[Irrelevant]", "[Relevant]"),
    "is_sup": ("[Fully supported]", "[Partially supported]", "[No support / Contradictory]"),
    "is_use": ("[Utility:1]", "[Utility:2]", "[Utility:3]", "[Utility:4]", "[Utility:5]"),
    "markup": ("<paragraph>", "</paragraph>"),
}  # fmt: skip
PAD = "<pad>"
ORDER: tuple[Role, ...] = ("retrieve", "is_rel", "markup", "is_use", "is_sup")  # of new rows, as published
VALUES: Mapping[str, tuple[float, ...]] = {
    "is_rel": (0.0, 1.0), "is_sup": (1.0, 0.5, 0.0), "is_use": (-1.0, -0.5, 0.0, 0.5, 1.0),
}  # fmt: skip
SIZES = {role: len(NAMES[role]) for role in get_args(Role)}
PLACES: Mapping[str, slice] = {
    role: slice(start := sum(SIZES[other] for other in READ[:number]), start + SIZES[role]) for number, role in enumerate(READ)
}  # fmt: skip


@dataclass(frozen=True)
class Schema:
    """The reflection tokens of one vocabulary.

    Attributes:
        ids: role → ids, in the order of `strings`.
        strings: role → strings, as `NAMES` unless they were renamed.
        values: role → what each token of it is worth; is_rel, is_sup, is_use.

    Raises:
        CheckpointError: a role is missing or has another number of tokens, or an id stands for two of them.
    """

    ids: Mapping[str, tuple[int, ...]]
    strings: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: NAMES)
    values: Mapping[str, tuple[float, ...]] = field(default_factory=lambda: VALUES)

    def __post_init__(self) -> None:
        for what, given in (("ids", self.ids), ("strings", self.strings)):
            sizes = {role: len(tokens) for role, tokens in given.items()}
            if sizes != SIZES:
                raise CheckpointError(f"a schema's {what} are {sizes} a role; allowed: {SIZES}")
        every = [identity for role in ORDER for identity in self.ids[role]]
        if len(set(every)) != len(every):
            raise CheckpointError(f"a schema's ids are {every}, and one stands for two tokens")

    @classmethod
    def numbered(cls, first: int, *, strings: Mapping[str, tuple[str, ...]] = NAMES) -> Schema:
        """The schema whose 15 tokens follow each other from `first`, in the published order. `numbered(32000)` is published."""
        names = [(role, name) for role in ORDER for name in strings[role]]
        ids: dict[str, tuple[int, ...]] = {
            role: tuple(first + at for at, (own, _) in enumerate(names) if own == role) for role in ORDER
        }
        return cls(ids, strings)

    @classmethod
    def ordered(cls, ids: Sequence[int], *, strings: Mapping[str, tuple[str, ...]] = NAMES) -> Schema:
        """The schema of 15 ids that are given in the published order, that of `spellings`."""
        given = iter(ids)
        return cls({role: tuple(next(given) for _ in strings[role]) for role in ORDER}, strings)

    @property
    def no(self) -> int:
        """[No Retrieval]."""
        return self.ids["retrieve"][0]

    @property
    def yes(self) -> int:
        """[Retrieval]."""
        return self.ids["retrieve"][1]

    @property
    def cont(self) -> int:
        """[Continue to Use Evidence]."""
        return self.ids["retrieve"][2]

    @property
    def irrelevant(self) -> int:
        """[Irrelevant]."""
        return self.ids["is_rel"][0]

    @property
    def relevant(self) -> int:
        """[Relevant]."""
        return self.ids["is_rel"][1]

    @property
    def opens(self) -> int:
        """<paragraph>."""
        return self.ids["markup"][0]

    @property
    def closes(self) -> int:
        """</paragraph>."""
        return self.ids["markup"][1]

    @property
    def marks(self) -> tuple[int, ...]:
        """The M = 13 ids whose log-probabilities are read: retrieve, is_rel, is_sup, is_use."""
        return tuple(identity for role in READ for identity in self.ids[role])

    @property
    def controls(self) -> frozenset[int]:
        """All 15 ids; none of them is visible text."""
        return frozenset(identity for role in ORDER for identity in self.ids[role])

    @property
    def spellings(self) -> tuple[str, ...]:
        """All 15 strings, in the order in which a vocabulary is extended."""
        return tuple(name for role in ORDER for name in self.strings[role])

    def place(self, role: str) -> slice:
        """Where a role's tokens stand in `marks`."""
        return PLACES[role]

    def role_of(self, identity: int) -> str | None:
        """The role of an id, or None for a word."""
        return next((role for role in ORDER if identity in self.ids[role]), None)

    def spelling(self, identity: int) -> str:
        """The string of one of the 15 ids."""
        role = self.role_of(identity)
        if role is None:
            raise CheckpointError(f"{identity} is no reflection token; allowed: {sorted(self.controls)}")
        return self.strings[role][self.ids[role].index(identity)]

    def identity(self, spelling: str) -> int:
        """The id of one of the 15 strings."""
        for role in ORDER:
            if spelling in self.strings[role]:
                return self.ids[role][self.strings[role].index(spelling)]
        raise CheckpointError(f"{spelling!r} is no reflection token; allowed: {', '.join(self.spellings)}")

    def to_dict(self) -> dict[str, Any]:
        """JSON for a manifest."""
        tables = {"ids": self.ids, "strings": self.strings, "values": self.values}
        return {name: {role: list(row) for role, row in table.items()} for name, table in tables.items()}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Schema:
        """The schema of a manifest's JSON."""
        tables = [{role: tuple(row) for role, row in given[name].items()} for name in ("ids", "strings", "values")]
        return cls(*tables)
