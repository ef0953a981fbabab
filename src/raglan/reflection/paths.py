"""Several steps make a path, several passages an answer: the combination of a path's steps with its bounds, and the sums of
a closed set of labels.

    mean        Σ_i s_i / n
    sum         Σ_i s_i
    product     Π_i max(s_i, 0), where a step without passage is a factor of 1; ties by the mean
    by_component  w_seq·mean(seq) + w_rel·mean(rel) + w_sup·mean(sup) + w_use·(use of the last step)

The paper gives no rule for a path. The authors' code multiplies signed scores, so that two bad steps make a good path;
here no factor is negative.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from raglan.reflection.scores import Components, Figures, Weights, exponential, largest_step

__all__ = [
    "Aggregate",
    "Combine",
    "aggregate",
    "label_scores",
    "normalise_label",
    "path_bound",
    "path_key",
    "path_score",
    "released_path",
]

Combine = Literal["mean", "sum", "product", "by_component"]
Aggregate = Literal["sum", "max", "mean", "logsumexp"]
SYNONYMS = {"supports": "true", "refutes": "false"}


def path_score(
    steps: Sequence[Any],
    combine: Combine,
    components: Sequence[Components] = (),
    *,
    plain: Sequence[bool] = (),
    weights: Weights | None = None,
) -> Any:
    """The score of a path of n ≥ 1 steps, floats or arrays of one shape.

    Args:
        steps: (n,) step scores, the root's first.
        components: (n,) what they were made of; `by_component` reads nothing else.
        plain: (n,) which steps have no passage ([No Retrieval], [Continue …]): no factor, no rel and no sup; default none.
        weights: of `by_component`.
    """
    without = plain or [False] * len(steps)
    if combine == "by_component":
        return _by_component(components, without, weights or Weights())
    if combine == "product":
        return _product(steps, without)
    return _total(steps) if combine == "sum" else _total(steps) / len(steps)


def path_key(
    steps: Sequence[float],
    combine: Combine,
    components: Sequence[Components] = (),
    *,
    plain: Sequence[bool] = (),
    weights: Weights | None = None,
) -> tuple[float, float]:
    """What paths are ordered by: the score, and the mean where products tie."""
    score = path_score(steps, combine, components, plain=plain, weights=weights)
    return float(score), float(_total(steps) / len(steps)) if combine == "product" else float(score)


def path_bound(
    steps: Sequence[Any],
    combine: Combine,
    left: int,
    *,
    weights: Weights,
    components: Sequence[Components] = (),
    plain: Sequence[bool] = (),
    constant: float = 0.0,
) -> Any:
    """The most that a path can come to with at most `left` steps more; with none, its score.

    sum + m·c, (sum + m·c)/(n + m), product · max(1,c)^m, where c is the largest step; `by_component` likewise, a figure at a
    time. `constant`: what a step without passage counts, where settings say so.
    """
    if not left:
        return path_score(steps, combine, components, plain=plain, weights=weights)
    c = largest_step(weights, constant=constant)
    without = plain or [False] * len(steps)
    if combine == "by_component":
        return _by_component(components, without, weights, left=left)
    if combine == "product":
        return _product(steps, without) * np.maximum(1.0, c) ** left
    total = _total(steps) + left * c
    return total if combine == "sum" else total / (len(steps) + left)


def released_path(steps: Sequence[Any]) -> Any:
    """The signed product of the released long form: two negative steps make a positive path."""
    product = steps[0]
    for one in steps[1:]:
        product = product * one
    return product


def label_scores(places: ArrayLike, scores: ArrayLike, how: Aggregate, *, labels: int) -> Figures:
    """What each label of a closed set comes to over its passages. (…,K), (…,K) → (…,labels), −inf where it has none.

    Args:
        places: which label each passage's candidate gave, −1 for none.
        scores: the candidates' step scores; negative ones are allowed.
        how: sum (released), max, mean, or log Σ exp.
    """
    given = np.asarray(places)
    score = np.broadcast_to(np.asarray(scores, np.float64), given.shape)
    mine = given[..., None, :] == np.arange(labels)[:, None]
    best = np.where(mine, score[..., None, :], -np.inf).max(-1, initial=-np.inf)
    if how == "max":
        return best
    some = np.isfinite(best)
    shift = np.where(some, best, 0.0)
    total = np.zeros(best.shape)
    for k in range(given.shape[-1]):  # one passage after the other: a reduction's order depends on the shape
        one = score[..., k, None]
        term = exponential(one - shift) if how == "logsumexp" else one
        total = np.where(mine[..., k], total + term, total)
    if how == "logsumexp":
        with np.errstate(divide="ignore"):
            total = shift + np.log(np.array(total, order="C"))
    if how == "mean":
        total = total / np.maximum(mine.sum(-1), 1)
    return np.where(some, total, -np.inf)


def aggregate(labels: Sequence[str | None], scores: Sequence[float], how: Aggregate = "sum") -> list[tuple[str, float]]:
    """Each label with what its passages add up to, the best first; ties keep the order of first sight. None is no label."""
    seen = list(dict.fromkeys(label for label in labels if label is not None))
    places = [-1 if label is None else seen.index(label) for label in labels]
    sums = label_scores(places, scores, how, labels=len(seen))
    return [(seen[at], float(sums[at])) for at in sorted(range(len(seen)), key=lambda at: -sums[at])]


def normalise_label(text: str, labels: Sequence[str] = ()) -> str | None:
    """The label that a text gives, as it is spelled in `labels`; None where it gives none.

    "A", " a", "A.", "(A)" and "A: text" are one; SUPPORTS is true and REFUTES false; among letters "2" is B, among digits "B"
    is 2. Without `labels` the folded text itself is the label.
    """
    folded = _folded(text)
    if not folded:
        return None
    if not labels:
        return folded
    spelled = {_folded(label): label for label in reversed(labels)}
    head = re.split(r"[:.)]\s|[:.)]$|\n", folded, maxsplit=1)[0].strip(" (")
    for said in (folded, head):
        if said in spelled:
            return spelled[said]
        if (other := _other_alphabet(said)) in spelled:
            return spelled[other]
    return None


def _folded(text: str) -> str:
    folded = text.strip().casefold().removesuffix(".").strip()
    return SYNONYMS.get(folded, folded)


def _other_alphabet(label: str) -> str | None:
    """1 ↔ a, 2 ↔ b, …"""
    if re.fullmatch(r"[1-9]", label):
        return chr(ord("a") + int(label) - 1)
    return str(ord(label) - ord("a") + 1) if re.fullmatch(r"[a-i]", label) else None


def _total(steps: Sequence[Any]) -> Any:
    total = steps[0]
    for one in steps[1:]:
        total = total + one
    return total


def _product(steps: Sequence[Any], plain: Sequence[bool]) -> Any:
    product: Any = 1.0
    for one, without in zip(steps, plain, strict=True):
        product = product if without else product * np.maximum(one, 0.0)
    return product


def _by_component(components: Sequence[Components], plain: Sequence[bool], weights: Weights, *, left: int = 0) -> Any:
    """Each figure averaged over the steps that have it and `left` more of 1, the last use once."""
    read = [parts for parts, without in zip(components, plain, strict=True) if not without]
    seq = _mean([parts.seq for parts in components], left)
    rel, sup = _mean([parts.rel for parts in read], left), _mean([parts.sup for parts in read], left)
    last = 1.0 if left else components[-1].use
    return weights.seq * seq + weights.rel * rel + weights.sup * sup + weights.use * last


def _mean(figures: Sequence[Any], left: int) -> Any:
    count = len(figures) + left
    return (_total([*figures, float(left)]) if left else _total(figures)) / count if count else 0.0
