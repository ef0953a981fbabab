"""The arithmetic of Self-RAG's critique, once: for one number, for a cache of them, for live decoding and for a sweep.

Every function takes log-probabilities of the 13 marks on the last axis, (…, M), and gives float64 (…). NaN says that an id
was not in the reply (a server's top-k cut it off); −inf is a probability of zero.

    r    = p_R / (p_R + p_N)                                      paper, appendix A.3; or over all three
    rel  = p(Relevant) / (p(Relevant) + p(Irrelevant))            at generated position 0, behind </paragraph>
    sup  = (p(Fully) + ½ p(Partially)) / Σ_3 p                    at the first IsSup token
    use  = Σ_i v_i p(Utility:i) / Σ_5 p,  v = −1, −½, 0, ½, 1     at the first IsUse token
    seq  = exp(Σ_t log p(y_t) / n)                                over all n generated tokens
    step = w_seq·seq + w_rel·rel + w_sup·sup + w_use·use          equations 3 and 4, seq a geometric mean a token

Sums run column by column and exponentials over contiguous memory, so that an array's element and the same number alone
are equal to the last bit: a rescored answer is the live one.

Deviation from the paper: its p(y|·) is a product, which falls with length; seq is that product's mean a token. What the
authors' code computes in other places stands in `released_*`, for parity runs only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raglan.errors import GeneratorError
from raglan.reflection.schema import NAMES, PLACES, VALUES, Schema

__all__ = [
    "FLOOR",
    "Absent",
    "Components",
    "Figures",
    "Missing",
    "Rule",
    "Scoring",
    "SeqMode",
    "Weights",
    "components",
    "components_of",
    "continues",
    "first",
    "largest_step",
    "missing_flags",
    "rel",
    "released_boundary",
    "released_decision",
    "released_rel",
    "released_step",
    "retrieve_probability",
    "retrieves",
    "segment_end",
    "seq",
    "step",
    "step_bound",
    "sup",
    "target_threshold",
    "use",
]

Rule = Literal["two_way", "three_way", "bounded"]
Missing = Literal["error", "floor", "neutral"]
Absent = Literal["zero", "neutral"]
SeqMode = Literal["exp_mean", "mean_logprob", "prob"]
SeqTokens = Literal["all", "text"]
Figures = NDArray[np.float64]
FLOOR = -100.0  # a LOG-probability
NEUTRAL = {"retrieve": 0.5, "is_rel": 0.5, "is_sup": 0.5, "is_use": 0.0}
COMPONENT = {"is_rel": "rel", "is_sup": "sup", "is_use": "use"}


class ScoreSettings(Protocol):
    """What `components` reads of a decoding's settings."""

    @property
    def seq(self) -> SeqMode: ...
    @property
    def seq_tokens(self) -> SeqTokens: ...
    @property
    def missing(self) -> Missing: ...
    @property
    def absent(self) -> Absent: ...


@dataclass(frozen=True)
class Scoring:
    """How a candidate's numbers become components. The defaults are those of exact marks.

    Attributes:
        seq: geometric mean a token, mean log-probability, or the product itself.
        seq_tokens: which generated tokens count: all, end token included, or words only.
        missing: what stands for an id that the reply lacks: an error, log p = −100, or a whole component of ½, ½, 0.
        absent: what stands for a component whose token was never generated: 0, or ½, ½, 0.
    """

    seq: SeqMode = "exp_mean"
    seq_tokens: SeqTokens = "all"
    missing: Missing = "error"
    absent: Absent = "zero"


@dataclass(frozen=True)
class Weights:
    """Weights ≥ 0 of the four components; floats, or arrays that broadcast against the components."""

    seq: Any = 1.0
    rel: Any = 1.0
    sup: Any = 1.0
    use: Any = 0.5


@dataclass(frozen=True)
class Components:
    """The four figures of a segment: floats, or arrays of one shape. `flags` say what was not as it should be:

    `empty` (nothing was generated), `off_grammar` (position 0 is no IsRel token), and `rel:`, `sup:` or `use:` before
    `absent`, `partial`, `no_evidence`.
    """

    seq: Any
    rel: Any
    sup: Any
    use: Any
    flags: tuple[str, ...] = field(default=())


def retrieve_probability(marks: ArrayLike, *, rule: Rule = "two_way", missing: Missing = "error") -> Figures:
    """r, the probability of [Retrieval] among the Retrieve tokens. (…,M) → (…).

    `two_way`: p_R / (p_R + p_N), appendix A.3. `three_way`: over all three, the paper's main text. `bounded`:
    (p_R + p_C) / Σ_3, what the released long form means to compute. Where p_R is zero, r of the first two is zero.
    """
    names = slice(0, 2) if rule == "two_way" else PLACES["retrieve"]
    no, yes, *cont = _masses(marks, names, "retrieve", missing)
    wanted = yes + cont[0] if rule == "bounded" else yes
    total = no + yes if rule == "two_way" else no + yes + cont[0]
    with np.errstate(invalid="ignore"):
        r = np.where(wanted > 0, wanted / total, 0.0)
    return _neutral(r, marks, names, "retrieve", missing)


def retrieves(r: ArrayLike, threshold: ArrayLike) -> Any:
    """Whether r > δ, strictly: δ = 0 retrieves unless p_R is zero, δ ≥ 1 never does. `bool` for one number."""
    decided = np.asarray(r, np.float64) > np.asarray(threshold, np.float64)
    return bool(decided) if decided.ndim == 0 else decided


def continues(marks: ArrayLike) -> Any:
    """Whether [Continue to Use Evidence] is the likeliest Retrieve token, strictly. `bool` for one row; NaN is no winner."""
    no, yes, cont = np.moveaxis(_floored(marks, PLACES["retrieve"]), -1, 0)
    decided = (cont > no) & (cont > yes)
    return bool(decided) if decided.ndim == 0 else decided


def target_threshold(r: ArrayLike, rate: float) -> float:
    """δ with which a share `rate` of these questions retrieves: the (1 − rate) quantile of r (N,), taken among them."""
    ordered = np.sort(np.asarray(r, np.float64).ravel())
    wanted = round(rate * len(ordered))
    return 0.0 if wanted >= len(ordered) else float(ordered[len(ordered) - wanted - 1])


def rel(marks: ArrayLike, *, missing: Missing = "error") -> Figures:
    """p(Relevant) / (p(Relevant) + p(Irrelevant)), in [0,1]. (…,M) → (…)."""
    return _valued(marks, "is_rel", missing)


def sup(marks: ArrayLike, *, missing: Missing = "error") -> Figures:
    """(p(Fully) + ½ p(Partially)) / Σ_3 p, in [0,1]. (…,M) → (…)."""
    return _valued(marks, "is_sup", missing)


def use(marks: ArrayLike, *, missing: Missing = "error") -> Figures:
    """Σ v_i p(Utility:i) / Σ_5 p with v = −1, −½, 0, ½, 1, in [−1,1]. (…,M) → (…)."""
    return _valued(marks, "is_use", missing)


def missing_flags(marks: ArrayLike, role: str, *, rule: Rule = "two_way") -> str:
    """What one row of marks (M,) lacks of a role: "", "partial", or "no_evidence" where nothing of it is there.

    Of `retrieve`, only [No Retrieval] and [Retrieval] are looked at where `rule` is `two_way`.
    """
    place = slice(0, 2) if role == "retrieve" and rule == "two_way" else PLACES[role]
    gone = np.isnan(np.asarray(marks, np.float64)[..., place])
    if gone.all():
        return "no_evidence"
    return "partial" if gone.any() else ""


def seq(logprobs: ArrayLike, *, mode: SeqMode = "exp_mean", present: ArrayLike | None = None) -> Figures:
    """The sequence score of n tokens' log-probabilities, summed left to right in float64. (…,T) → (…); n = 0 gives 0.

    Args:
        mode: exp(Σ/n), in (0,1]; Σ/n; or exp(Σ).
        present: (…,T) which tokens count; the rest is padding.
    """
    logs = np.asarray(logprobs, np.float64)
    counts = np.ones(logs.shape, bool) if present is None else np.broadcast_to(np.asarray(present, bool), logs.shape)
    n = counts.sum(-1)
    total = np.where(counts, logs, 0.0).cumsum(-1)[..., -1] if logs.shape[-1] else np.zeros(logs.shape[:-1])
    figure = total if mode == "prob" else total / np.maximum(n, 1)
    figure = figure if mode == "mean_logprob" else exponential(figure)
    return _figures(np.where(n > 0, figure, 0.0))


def components(
    ids: Sequence[int],
    logprobs: ArrayLike,
    mark_logprobs: ArrayLike,
    schema: Schema,
    *,
    retrieved: bool,
    settings: ScoreSettings,
    eos: int | None = None,
) -> Components:
    """The four figures of one generated continuation.

    rel is read at position 0, sup at the first IsSup token before the next Retrieve token or <paragraph>, use at the first
    IsUse token. Without a passage (`retrieved` false) there is neither rel nor sup, and both are 0 without a flag.

    Args:
        ids: (T,) generated ids. `logprobs` (T,) theirs. `mark_logprobs` (T,M) of the marks at the same positions.
        eos: the end token, which is no word (`seq_tokens: text`).

    Raises:
        GeneratorError: an id of a group is not in the reply, and `missing` is `error`.
    """
    marks = np.asarray(mark_logprobs, np.float64)
    flags: list[str] = []
    hidden = schema.controls | ({eos} if eos is not None else set())
    present = [settings.seq_tokens == "all" or identity not in hidden for identity in ids]
    if not any(present):
        flags.append("empty")
    figures = {"rel": 0.0, "sup": 0.0}
    if retrieved:
        if len(ids) and ids[0] not in schema.ids["is_rel"]:
            flags.append("off_grammar")
        end = segment_end(ids, schema)
        figures["rel"] = _read(marks, 0 if len(ids) else None, "is_rel", settings, flags)
        figures["sup"] = _read(marks, first(ids[:end], schema.ids["is_sup"]), "is_sup", settings, flags)
    figures["use"] = _read(marks, first(ids, schema.ids["is_use"]), "is_use", settings, flags)
    return Components(float(seq(logprobs, mode=settings.seq, present=present)), **figures, flags=tuple(flags))


def components_of(
    ids: Sequence[Sequence[int]],
    logprobs: Sequence[ArrayLike],
    mark_logprobs: Sequence[NDArray[Any]],
    schema: Schema,
    *,
    settings: ScoreSettings,
    eos: int | None = None,
) -> Components:
    """`components` of many continuations behind passages, (n,) each and equal to the last bit; without flags."""
    hidden = schema.controls | ({eos} if eos is not None else set())
    shape = (len(ids), max(map(len, ids), default=0))
    logs, present = np.zeros(shape), np.zeros(shape, bool)
    for row, (own, values) in enumerate(zip(ids, logprobs, strict=True)):
        logs[row, : len(own)] = values
        present[row, : len(own)] = settings.seq_tokens == "all" or [identity not in hidden for identity in own]
    places = {
        "is_rel": [0 if len(own) else None for own in ids],
        "is_sup": [first(own[: segment_end(own, schema)], schema.ids["is_sup"]) for own in ids],
        "is_use": [first(own, schema.ids["is_use"]) for own in ids],
    }
    figures = {}
    for role, own_places in places.items():
        found = np.full(len(ids), NEUTRAL[role] if settings.absent == "neutral" else 0.0)
        there = [row for row, at in enumerate(own_places) if at is not None]
        if there:
            rows = np.stack([np.asarray(mark_logprobs[row][own_places[row]], np.float64) for row in there])
            found[there] = _valued(rows, role, settings.missing)
        figures[COMPONENT[role]] = found
    total = np.asarray(seq(logs, mode=settings.seq, present=present))
    return Components(total, figures["rel"], figures["sup"], figures["use"])


def step(parts: Components, weights: Weights) -> Any:
    """w_seq·seq + w_rel·rel + w_sup·sup + w_use·use, in [−w_use, w_seq + w_rel + w_sup + w_use]."""
    return weights.seq * parts.seq + weights.rel * parts.rel + weights.sup * parts.sup + weights.use * parts.use


def step_bound(relevance: Any, weights: Weights) -> Any:
    """The most that a candidate can come to whose rel is known: the other three figures are at most 1."""
    return weights.seq + weights.rel * relevance + weights.sup + weights.use


def largest_step(weights: Weights, *, constant: float = 0.0) -> Any:
    """The most that any step can be worth. `constant`: what a step without passage counts, where that is given."""
    return np.maximum(weights.seq + weights.rel + weights.sup + weights.use, constant)


def first(ids: Sequence[int], wanted: Collection[int]) -> int | None:
    """The first position of any of these ids."""
    return next((at for at, identity in enumerate(ids) if identity in wanted), None)


def segment_end(ids: Sequence[int], schema: Schema) -> int:
    """Where a segment's own tokens end: at the next Retrieve token or <paragraph>, or behind the last."""
    at = first(ids, (*schema.ids["retrieve"], schema.opens))
    return len(ids) if at is None else at


def released_decision(marks: ArrayLike) -> Figures:
    """l_R / (l_R + l_N): the released short form divides LOG-probabilities, so it falls as p_R rises. (…,M) → (…)."""
    no, yes = np.moveaxis(np.asarray(marks, np.float64)[..., :2], -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return _figures(np.where(yes == 0.0, 0.0, yes / (yes + no)))


def released_boundary(marks: ArrayLike) -> Figures:
    """(p_R + p_C) / (p_R + p_N): the released long form's decision, which may exceed 1. (…,M) → (…)."""
    no, yes, cont = np.moveaxis(_released_probabilities(marks)[..., PLACES["retrieve"]], -1, 0)
    return _figures((yes + cont) / (yes + no))


def released_rel(marks: ArrayLike) -> Figures:
    """rel of the released long form, where an id that the reply lacks has the PROBABILITY −100. (…,M) → (…)."""
    irrelevant, relevant = np.moveaxis(_released_probabilities(marks)[..., PLACES["is_rel"]], -1, 0)
    return _figures(relevant / (relevant + irrelevant))


def released_step(parts: Components) -> Any:
    """rel + sup: the released long form reads IsSup's tokens for IsUse, which is thus 0, and no seq and no weight."""
    return parts.rel + parts.sup


def exponential(value: Any) -> Figures:
    """exp over contiguous memory: numpy's loops over strided memory may round the last bit otherwise."""
    return np.exp(np.array(value, np.float64, order="C"))  # type: ignore[no-any-return]


def _read(marks: NDArray[np.float64], at: int | None, role: str, settings: ScoreSettings, flags: list[str]) -> float:
    """One component at a position; adds to `flags` what is wrong with it."""
    name = COMPONENT[role]
    if at is None:
        flags.append(f"{name}:absent")
        return NEUTRAL[role] if settings.absent == "neutral" else 0.0
    if lacks := missing_flags(marks[at], role):
        flags.append(f"{name}:{lacks}")
    return float(_valued(marks[at], role, settings.missing))


def _valued(marks: ArrayLike, role: str, missing: Missing) -> Figures:
    """Σ_i v_i p_i / Σ_i p_i over a role's tokens."""
    masses = _masses(marks, PLACES[role], role, missing)
    worth = [value * mass for value, mass in zip(VALUES[role], masses, strict=True)]
    with np.errstate(invalid="ignore"):
        figure = _running(worth) / _running(masses)
    even = sum(VALUES[role]) / len(masses)  # all of zero probability: no token is preferred
    return _neutral(np.where(np.isnan(figure), even, figure), marks, PLACES[role], role, missing)


def _masses(marks: ArrayLike, place: slice, role: str, missing: Missing) -> list[Figures]:
    """Probabilities of a group's tokens divided by its largest, one (…) array a token; all 0 where the largest is 0."""
    if missing == "error" and (gone := np.isnan(np.asarray(marks, np.float64)[..., place])).any():
        rows = gone.reshape(-1, gone.shape[-1])
        names = ", ".join(NAMES[role][at] for at in range(rows.shape[-1]) if rows[:, at].any())
        raise GeneratorError(
            f"the reply holds no log-probability of {names}",
            hint="decode.missing: floor, or neutral, if the server gives only its top-k; ask it for more of them",
        )
    logs = _floored(marks, place)
    top = logs.max(-1, keepdims=True)
    shifted = exponential(logs - np.where(np.isneginf(top), 0.0, top))
    return [shifted[..., at] for at in range(shifted.shape[-1])]


def _floored(marks: ArrayLike, place: slice) -> Figures:
    logs = np.asarray(marks, np.float64)[..., place]
    return np.where(np.isnan(logs), FLOOR, logs)


def _neutral(figure: Figures, marks: ArrayLike, place: slice, role: str, missing: Missing) -> Figures:
    if missing != "neutral":
        return _figures(figure)
    gone = np.isnan(np.asarray(marks, np.float64)[..., place]).any(-1)
    return _figures(np.where(gone, NEUTRAL[role], figure))


def _running(terms: Sequence[Figures]) -> Figures:
    """Left to right, whatever the shape: a reduction's order would depend on it."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _released_probabilities(marks: ArrayLike) -> Figures:
    logs = np.asarray(marks, np.float64)
    return np.where(np.isnan(logs), FLOOR, np.exp(logs))


def _figures(value: Any) -> Figures:
    return np.asarray(value, np.float64)[()]  # type: ignore[no-any-return]
