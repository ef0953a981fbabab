"""What a Self-RAG decoding decides with, given its settings: numbers in, decisions out, no model.

Live decoding and the rescoring of cached candidates both call these, so they cannot disagree. The arithmetic itself is
`reflection`'s; here it meets a recipe's settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from raglan.recipe import CalibrationSettings, RequireSettings, SelfRagDecode
from raglan.records import Marked
from raglan.reflection import (
    Missing,
    Role,
    Schema,
    Scoring,
    Weights,
    aggregate,
    first,
    missing_flags,
    normalise_label,
    released_decision,
    retrieve_probability,
    retrieves,
    segment_end,
)

__all__ = ["Decision", "Said", "Verdict", "calibrated", "decide", "elect", "figure", "open_order", "refusals",
    "relevance_order", "said_of", "scoring", "weights", "withheld"]  # fmt: skip


@dataclass(frozen=True)
class Decision:
    """Whether a question, or a segment, retrieves.

    Attributes:
        no, yes, cont: probabilities of the three Retrieve tokens; NaN where the reply lacks one.
        r: what was compared with `threshold`, calibrated if asked for. `threshold`: δ, None for the likeliest token.
        retrieve: the outcome. `fallback`: why it is not what r says: `no_hits`, or empty.
    """

    no: float
    yes: float
    cont: float
    r: float
    threshold: float | None
    retrieve: bool
    fallback: str = ""
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """The winner among candidates: a place, and the text that is the answer where it is not the candidate's own.

    `standings` are the labels with their scores, best first; none for open answers.
    """

    place: int
    text: str | None = None
    standings: tuple[tuple[str, float], ...] = ()
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Said:
    """Which token of its role a segment says of itself, as its place in the schema, −1 for none; numbers or arrays."""

    is_rel: Any
    is_sup: Any
    is_use: Any


def said_of(one: Marked, schema: Schema, *, retrieved: bool, by: str = "token") -> Said:
    """What a continuation says of itself: IsRel right behind its passage, the first IsSup of its segment, the first IsUse.

    Args:
        by: `probability` gives the likeliest token of a role in place of the one that stands there; IsRel need not stand.
    """
    roles: tuple[Role, ...] = ("is_rel", "is_sup", "is_use")
    places = {role: first(one.ids, schema.ids[role]) for role in roles}
    if places["is_sup"] is not None and places["is_sup"] >= segment_end(one.ids, schema):
        places["is_sup"] = None
    if by == "probability":
        places["is_rel"] = 0 if len(one.ids) else None
        return Said(*(_likeliest(one, schema, role, at) for role, at in places.items()))
    if places["is_rel"] != 0 or not retrieved:
        places["is_rel"] = None
    return Said(*(-1 if at is None else schema.ids[role].index(one.ids[at]) for role, at in places.items()))


def _likeliest(one: Marked, schema: Schema, role: Role, at: int | None) -> int:
    if at is None:
        return -1
    row = np.asarray(one.mark_logprobs[at], np.float64)[schema.place(role)]
    return -1 if np.isnan(row).all() else int(np.nanargmax(row))


def refusals(asks: RequireSettings, said: Said, *, retrieved: Any = True) -> dict[str, Any]:
    """Hard constraint → whether it is broken. Those on passages hold for what retrieved one, IsUse where it was written.

    Numbers or arrays of one shape; what is not asked for is not named.
    """
    found: dict[str, Any] = {}
    if asks.relevant:
        found["relevant"] = retrieved & (said.is_rel != 1)
    if asks.supported:
        found["supported"] = retrieved & ((said.is_sup < 0) | (said.is_sup > 1))
    if asks.fully:
        found["fully"] = retrieved & (said.is_sup != 0)
    if asks.min_use is not None:
        found["min_use"] = (said.is_use >= 0) & (said.is_use + 1 < asks.min_use)
    return found


def scoring(settings: SelfRagDecode, *, exact: bool) -> Scoring:
    """How numbers become components. `exact`: the generator gives every mark, so a missing one is an error by default."""
    missing: Missing = settings.missing or ("error" if exact else "floor")
    return Scoring(seq=settings.seq, seq_tokens=settings.seq_tokens, missing=missing, absent=settings.absent)


def weights(settings: SelfRagDecode) -> Weights:
    """The weights of a recipe; every path reads these."""
    own = settings.weights
    return Weights(seq=own.seq, rel=own.rel, sup=own.sup, use=own.use)


def decide(
    marks: ArrayLike, settings: SelfRagDecode, *, missing: Missing, threshold: float | None, argmax: bool | None = None,
    hits: bool = True,
) -> Decision:  # fmt: skip
    """Whether to retrieve, from the marks (M,) behind the question.

    Args:
        threshold: δ; None asks for `argmax` instead: whether [Retrieval] is the likeliest token of the whole vocabulary.
        hits: whether there is any passage; none means no.
    """
    row = np.asarray(marks, np.float64)
    no, yes, cont = (float(value) for value in np.exp(row[:3]))
    r = float(released_decision(row) if "decision" in settings.released else figure(row, settings, missing=missing))
    lacks = missing_flags(row, "retrieve", rule=settings.rule)
    if settings.retrieve != "adaptive":
        wanted = settings.retrieve == "always"
    elif threshold is None:
        wanted = bool(argmax)
    else:
        wanted = retrieves(r, threshold)
    fallback = "no_hits" if wanted and not hits else ""
    flags = (f"retrieve:{lacks}",) if lacks else ()
    return Decision(no, yes, cont, r, threshold, wanted and hits, fallback, flags)


def figure(marks: ArrayLike, settings: SelfRagDecode, *, missing: Missing) -> Any:
    """r of the marks (…,M), calibrated if asked for. (…)."""
    return calibrated(retrieve_probability(marks, rule=settings.rule, missing=missing), settings.calibration)


def calibrated(r: ArrayLike, calibration: CalibrationSettings | None) -> Any:
    """r (…) → P(retrieval is needed) (…): σ(logit(r) ÷ temperature), or straight lines between an isotonic fit's points."""
    values = np.asarray(r, np.float64)
    if calibration is None:
        return values[()]
    if calibration.kind == "isotonic":
        return np.interp(values, calibration.x, calibration.y)[()]
    with np.errstate(divide="ignore", over="ignore"):
        odds = (np.log(values) - np.log1p(-values)) / calibration.temperature
        return (1 / (1 + np.exp(-odds)))[()]


def relevance_order(rel: Sequence[float], ranks: Sequence[int]) -> list[int]:
    """Places, the most relevant first; ties by rank."""
    return sorted(range(len(rel)), key=lambda place: (-rel[place], ranks[place]))


def open_order(finals: Sequence[float], ranks: Sequence[int]) -> list[int]:
    """Places, the best score first; ties by retrieval rank."""
    return sorted(range(len(finals)), key=lambda place: (-finals[place], ranks[place]))


def elect(texts: Sequence[str], finals: Sequence[float], ranks: Sequence[int], settings: SelfRagDecode) -> Verdict:
    """The answer of candidates with these texts and scores: the best one, or with `labels` the label of the best sum.

    A text that is no label has no vote; where none is one, the best text is the answer, flagged `no_label`.
    """
    order = open_order(finals, ranks)
    if not settings.labels:
        return Verdict(order[0])
    labels = [normalise_label(text, settings.labels) for text in texts]
    seen = sorted(range(len(texts)), key=ranks.__getitem__)
    standings = aggregate([labels[place] for place in seen], [finals[place] for place in seen], settings.aggregate)
    if not standings:
        return Verdict(order[0], flags=("no_label",))
    best = standings[0][0]
    place = next(place for place in order if labels[place] == best)
    text, flags = withheld(standings, settings)
    return Verdict(place, best if text is None else text, tuple(standings), flags)


def withheld(standings: Sequence[tuple[str, float]], settings: SelfRagDecode) -> tuple[str | None, tuple[str, ...]]:
    """The abstention, where the best two are closer than `abstain_margin`; else None."""
    margin = settings.abstain_margin
    if margin is None or len(standings) < 2 or standings[0][1] - standings[1][1] >= margin:
        return None, ()
    return settings.abstention, ("abstained",)
