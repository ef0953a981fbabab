"""Cached candidates of the short form as arrays, so that a thousand settings are arithmetic.

    retrieves(r, δ)                                (N,)
    step(components, weights)                      (N,K)
    argmax_k, or argmax_label of label_scores      (N,)

The functions are `reflection`'s, the same that decode live; only loops over questions and passages have become axes.
Axes: N questions, K passages a question in the order of their ranks, Lb labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raglan.decode.self_rag.cache import CandidateCache
from raglan.decode.self_rag.rules import elect, figure, scoring
from raglan.errors import CheckpointError, RecipeError
from raglan.recipe import SelfRagDecode
from raglan.reflection import (
    Aggregate,
    Components,
    Weights,
    components,
    label_scores,
    normalise_label,
    retrieves,
    step,
)

__all__ = ["Outcome", "Table"]

Quality = Callable[[str, int], float]  # an answer's text and its question's place → figure


@dataclass(frozen=True)
class Outcome:
    """What one setting comes to. (N,) each: whether it retrieved, the place chosen, or the label; how good; ids written."""

    retrieved: NDArray[np.bool_]
    chosen: NDArray[np.int64]
    quality: NDArray[np.float64]
    generated: NDArray[np.int64]


@dataclass(frozen=True)
class Table:
    """Candidates as arrays.

    Attributes:
        r: (N,) probability of [Retrieval].
        parts: (N,K) components; 0 where a question has fewer passages. `present`: (N,K) where it has one.
        lengths: (N,K) ids generated; `without`: (N,) the same of the answer without a passage.
        good: (N,K) quality of each candidate as the answer; `plain`: (N,) of the answer without a passage.
        places: (N,K) which of the question's labels each gives, −1 for none; None for open answers.
        labelled: (N,Lb) quality of each label, in the order in which the ranks first say it.
    """

    r: NDArray[np.float64]
    parts: Components
    present: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    without: NDArray[np.int64]
    good: NDArray[np.float64]
    plain: NDArray[np.float64]
    places: NDArray[np.int64] | None
    labelled: NDArray[np.float64]

    @classmethod
    def of(cls, cache: CandidateCache, settings: SelfRagDecode, quality: Quality) -> Table:
        """The arrays of a cache under settings whose thresholds, weights, K and aggregation are still open.

        Raises:
            RecipeError: settings that are more than that arithmetic; `replay` takes those, one at a time.
        """
        _check(settings)
        if not cache.questions or cache.schema is None:
            raise CheckpointError(
                "the candidates are of the long form", hint="sweep it with evaluate --rescore, a setting at a time"
            )
        if any(one["key"] is None for row in cache.questions for one in row["candidates"] if one["passage"] is None):
            raise RecipeError(
                "some questions have choices, which are scored and not written", hint="raglan evaluate --rescore takes them"
            )
        how = scoring(settings, exact=cache.exact)
        n = len(cache.questions)
        told = [[c for c in row["candidates"] if c["passage"] is not None] for row in cache.questions]
        none = [next(c for c in row["candidates"] if c["passage"] is None) for row in cache.questions]
        k = max(1, *map(len, told))
        figures = np.zeros((4, n, k))
        present, lengths = np.zeros((n, k), bool), np.zeros((n, k), np.int64)
        good, texts = np.zeros((n, k)), [[""] * k for _ in range(n)]
        for place, row in enumerate(told):
            for at, candidate in enumerate(sorted(row, key=lambda c: c["rank"])):
                if candidate["key"] is None:
                    continue
                marked = cache.written[bytes.fromhex(candidate["key"])]
                parts = components(
                    marked.ids, marked.logprobs, marked.mark_logprobs, cache.schema, retrieved=True, settings=how, eos=cache.eos
                )
                figures[:, place, at] = parts.seq, parts.rel, parts.sup, parts.use
                present[place, at], lengths[place, at] = True, len(marked.ids)
                texts[place][at], good[place, at] = candidate["text"], quality(candidate["text"], place)
        marks = np.stack([cache.states[bytes.fromhex(row["state"])][0] for row in cache.questions])
        places, labelled = _labels(texts, present, settings.labels, quality)
        verdicts = [elect([c["text"]], [0.0], [0], settings).text for c in none]
        said = [c["text"] if text is None else text for c, text in zip(none, verdicts, strict=True)]
        return cls(
            r=np.asarray(figure(marks, settings, missing=how.missing), np.float64), parts=Components(*figures),
            present=present, lengths=lengths, places=places, labelled=labelled, good=good,
            without=np.array([len(cache.written[bytes.fromhex(c["key"])].ids) for c in none], np.int64),
            plain=np.array([quality(text, place) for place, text in enumerate(said)]),
        )  # fmt: skip

    @property
    def k(self) -> int:
        """Passages that were written to."""
        return self.present.shape[1]

    def outcome(self, threshold: float, weights: Weights, *, k: int, how: Aggregate = "sum") -> Outcome:
        """What a threshold, weights, the first `k` passages and an aggregation come to."""
        k = min(k, self.k)
        here = self.present[:, :k]
        retrieved = retrieves(self.r, threshold) & here.any(-1)
        parts = self.parts if k == self.k else _first(self.parts, k)
        scores = np.where(here, step(parts, weights), -np.inf)
        chosen = scores.argmax(-1)
        rows = np.arange(len(chosen))
        quality = self.good[rows, chosen]
        if self.places is not None:
            given = np.where(here, self.places[:, :k], -1)
            sums = label_scores(given, np.where(here, scores, 0.0), how, labels=self.labelled.shape[1])
            label = sums.argmax(-1)
            some = (given >= 0).any(-1)
            quality = np.where(some, self.labelled[rows, label], quality)
        generated = np.where(retrieved, self.lengths[:, :k].sum(-1), self.without)
        return Outcome(retrieved, np.where(retrieved, chosen, -1), np.where(retrieved, quality, self.plain), generated)


def _first(parts: Components, k: int) -> Components:
    return Components(*(figures[:, :k] for figures in (parts.seq, parts.rel, parts.sup, parts.use)))


def _labels(
    texts: Sequence[Sequence[str]], present: NDArray[np.bool_], labels: Sequence[str], quality: Quality
) -> tuple[NDArray[np.int64] | None, NDArray[np.float64]]:
    """Places (N,K) of labels in the order of first sight, and each label's quality (N,Lb)."""
    if not labels:
        return None, np.zeros((len(texts), 0))
    places, good = np.full(present.shape, -1), np.zeros((len(texts), len(labels)))
    for place, row in enumerate(texts):
        given = [normalise_label(text, labels) if on else None for text, on in zip(row, present[place], strict=True)]
        seen = list(dict.fromkeys(label for label in given if label is not None))
        places[place] = [-1 if label is None else seen.index(label) for label in given]
        good[place, : len(seen)] = [quality(label, place) for label in seen]
    return places, good


def _check(settings: SelfRagDecode) -> None:
    """A sweep is over what arrays can do."""
    wrong = [
        name
        for name, on in (
            ("form long", settings.form == "long"), ("options", bool(settings.options)),
            (f"prune.kind {settings.prune.kind}", settings.prune.kind in ("top_m", "tau")),
            (f"all_irrelevant {settings.all_irrelevant}", settings.all_irrelevant != "best"),
            ("abstain_margin", settings.abstain_margin is not None), ("released", bool(settings.released)),
            (f"retrieve {settings.retrieve}", settings.retrieve != "adaptive"), ("samples", settings.samples > 1),
        )
        if on
    ]  # fmt: skip
    if wrong:
        raise RecipeError(
            f"a sweep is over thresholds, weights, K and aggregation of the short form; decode has {', '.join(wrong)}",
            hint="set that with -o decode.…, or use raglan evaluate --rescore, which takes every setting, one at a time",
        )
