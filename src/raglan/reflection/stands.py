"""Where in the grammar an id stands, and what may stand there: the grammar of `rows` as an automaton.

    lead      words, Retrieve              at the beginning
    opening   <paragraph>                  behind [Retrieval]
    passage   words, </paragraph>          behind <paragraph>
    judging   IsRel                        behind </paragraph>
    relevant  words, IsSup                 behind [Relevant]
    free      words, Retrieve, IsUse       behind [Irrelevant], [No Retrieval], [Continue to Use Evidence] and IsSup
    closing   the end token                behind IsUse

A word changes nothing. Every row of the grammar is a way through this table, and every way that ends is a row of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from raglan.reflection.schema import Schema

__all__ = ["STANDS", "admitted", "stands", "watched"]

STANDS = ("lead", "opening", "passage", "judging", "relevant", "free", "closing")
WORDS = {"lead", "passage", "relevant", "free"}


def watched(schema: Schema, eos: int) -> tuple[int, ...]:
    """The 16 ids of which the grammar decides where they may stand: control tokens, in their published order, and the end."""
    return (*(schema.identity(name) for name in schema.spellings), eos)


def admitted(schema: Schema, eos: int) -> tuple[list[list[bool]], list[bool]]:
    """For each of `STANDS`, which of the `watched` ids may stand there, and whether words may."""
    allowed = {
        "lead": schema.ids["retrieve"], "opening": (schema.opens,), "passage": (schema.closes,),
        "judging": schema.ids["is_rel"], "relevant": schema.ids["is_sup"],
        "free": (*schema.ids["retrieve"], *schema.ids["is_use"]), "closing": (eos,),
    }  # fmt: skip
    ids = watched(schema, eos)
    return [[token in allowed[stand] for token in ids] for stand in STANDS], [stand in WORDS for stand in STANDS]


def stands(ids: Sequence[int], schema: Schema) -> list[int]:
    """For each id of a row of the grammar, the place in `STANDS` at which it stands: that of what is before it."""
    behind = {token: "free" for role in ("retrieve", "is_sup") for token in schema.ids[role]}
    behind |= {schema.yes: "opening", schema.opens: "passage", schema.closes: "judging"}
    behind |= {schema.relevant: "relevant", schema.irrelevant: "free"} | dict.fromkeys(schema.ids["is_use"], "closing")
    now, found = "lead", []
    for token in ids:
        found.append(STANDS.index(now))
        now = behind.get(token, now)
    return found
