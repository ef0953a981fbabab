"""Cached candidates of the short form as arrays, so that a thousand settings are arithmetic.

    retrieves(r, δ)                                (N,)
    step(components, weights)                      (N,K)
    refusals(require, said)                        (N,K)     hard constraints: what breaks one has no vote
    argmax_k, or argmax_label of label_scores      (N,)

The functions are `reflection`'s, the same that decode live; only loops over questions and passages have become axes.
Axes: N questions, K passages a question in the order of their ranks, Lb labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raglan.decode.self_rag.cache import CandidateCache
from raglan.decode.self_rag.rules import Said, elect, figure, refusals, said_of, scoring
from raglan.errors import RecipeError
from raglan.recipe import RequireSettings, SelfRagDecode
from raglan.records import Marked
from raglan.reflection import (
    Aggregate,
    Components,
    Weights,
    components_of,
    label_scores,
    normalise_label,
    retrieves,
    step,
)

__all__ = ["Outcome", "Table", "unfit", "unwritten"]

SILENT = Said(-1, -1, -1)
NOTHING = RequireSettings()
Quality = Callable[[str, int], float]  # an answer's text and its question's place → figure


@dataclass(frozen=True)
class Outcome:
    """What one setting comes to. (N,) each: whether it retrieved, the place chosen (−1: none), how good it is, ids written."""

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
        said: (N,K) what candidates say of themselves, for hard constraints. `unaided`: (N,) the answers without a passage.
        abstention: (N,) quality of no answer.
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
    said: Said = SILENT
    unaided: Said = SILENT
    abstention: NDArray[np.float64] | float = 0.0

    @classmethod
    def of(cls, cache: CandidateCache, settings: SelfRagDecode, quality: Quality) -> Table:
        """The arrays of a cache under settings whose thresholds, weights, K, aggregation and constraints are still open.

        Raises:
            RecipeError: settings that are more than that arithmetic; `replay` takes those, one at a time.
        """
        if wrong := [*unfit(settings), *unwritten(cache)]:
            raise RecipeError(
                f"arrays are of what short answers were written to; here is {', '.join(wrong)}",
                hint="raglan evaluate --rescore takes every setting, one at a time",
            )
        assert cache.schema is not None
        how = scoring(settings, exact=cache.exact)
        n = len(cache.questions)
        told = [[c for c in row["candidates"] if c["passage"] is not None] for row in cache.questions]
        none = [next(c for c in row["candidates"] if c["passage"] is None) for row in cache.questions]
        k = max(1, *map(len, told))
        figures, said = np.zeros((4, n, k)), np.full((3, n, k), -1)
        present, lengths = np.zeros((n, k), bool), np.zeros((n, k), np.int64)
        good, texts = np.zeros((n, k)), [[""] * k for _ in range(n)]
        cells: list[tuple[int, int]] = []
        every: list[Marked] = []
        for place, row in enumerate(told):
            for at, candidate in enumerate(sorted(row, key=lambda c: c["rank"])):
                if candidate["key"] is None:
                    continue
                marked = cache.written[bytes.fromhex(candidate["key"])]
                cells.append((place, at))
                every.append(marked)
                said[:, place, at] = _said(marked, cache, settings, retrieved=True)
                present[place, at], lengths[place, at] = True, len(marked.ids)
                texts[place][at], good[place, at] = candidate["text"], quality(candidate["text"], place)
        if cells:
            parts = components_of(
                [m.ids for m in every], [m.logprobs for m in every], [m.mark_logprobs for m in every], cache.schema,
                settings=how, eos=cache.eos,
            )  # fmt: skip
            figures[(slice(None), *np.array(cells).T)] = parts.seq, parts.rel, parts.sup, parts.use
        marks = np.stack([cache.states[bytes.fromhex(row["state"])][0] for row in cache.questions])
        places, labelled = _labels(texts, present, settings.labels, quality)
        verdicts = [elect([c["text"]], [0.0], [0], settings).text for c in none]
        plain = [c["text"] if text is None else text for c, text in zip(none, verdicts, strict=True)]
        alone = [cache.written[bytes.fromhex(c["key"])] for c in none]
        return cls(
            r=np.asarray(figure(marks, settings, missing=how.missing), np.float64), parts=Components(*figures),
            present=present, lengths=lengths, places=places, labelled=labelled, good=good,
            without=np.array([len(one.ids) for one in alone], np.int64),
            plain=np.array([quality(text, place) for place, text in enumerate(plain)]),
            said=Said(*said), unaided=Said(*np.array([_said(one, cache, settings, retrieved=False) for one in alone]).T),
            abstention=np.array([quality(settings.abstention, place) for place in range(n)]),
        )  # fmt: skip

    @property
    def k(self) -> int:
        """Passages that were written to."""
        return self.present.shape[1]

    def outcome(
        self, threshold: float, weights: Weights, *, k: int, how: Aggregate = "sum",
        require: RequireSettings = NOTHING,
        on_empty: str = "relax", all_irrelevant: str = "best", abstain_margin: float | None = None,
    ) -> Outcome:  # fmt: skip
        """What a threshold, weights, the first `k` passages, an aggregation and hard constraints come to.

        The other arguments are `SelfRagDecode`'s.
        """
        k = min(k, self.k)
        here = self.present[:, :k]
        retrieved = retrieves(self.r, threshold) & here.any(-1)
        parts = self.parts if k == self.k else _first(self.parts, k)
        scores = np.where(here, step(parts, weights), -np.inf)
        standing = here
        if require.any:
            standing = self._standing(here, scores, require, on_empty)
            scores = np.where(standing, scores, -np.inf)
        chosen = scores.argmax(-1)
        quality = self.good[np.arange(len(chosen)), chosen]
        if self.places is not None:
            quality = self._elected(standing, scores, how, quality, abstain_margin)
        wrote = self.lengths[:, :k].sum(-1)
        plain = self.plain
        if require.any:
            refused = _broken(require, self.unaided, retrieved=False)
            plain = np.where(refused, plain if on_empty == "relax" else self.abstention, plain)
            stuck = ~standing.any(-1)
            quality = np.where(stuck, plain if on_empty == "no_retrieval" else self.abstention, quality)
            wrote = wrote + np.where(stuck & (on_empty == "no_retrieval"), self.without, 0)
            chosen = np.where(stuck, -1, chosen)
        if all_irrelevant != "best":
            spoiled = ~(here & (parts.rel >= 0.5)).any(-1)  # type: ignore[operator]
            unaided = all_irrelevant == "no_retrieval"
            quality = np.where(spoiled, plain if unaided else self.abstention, quality)
            wrote = np.where(spoiled, self.without if unaided else 0, wrote)
            chosen = np.where(spoiled, -1, chosen)
        generated = np.where(retrieved, wrote, self.without)
        return Outcome(retrieved, np.where(retrieved, chosen, -1), np.where(retrieved, quality, plain), generated)

    def _standing(
        self, here: NDArray[np.bool_], scores: NDArray[np.float64], require: RequireSettings, on_empty: str
    ) -> NDArray[np.bool_]:
        """(N,K) which candidates satisfy the constraints; where none does, the best one with `relax`."""
        k = here.shape[-1]
        own = Said(*(np.asarray(one)[..., :k] for one in (self.said.is_rel, self.said.is_sup, self.said.is_use)))
        standing = here & ~_broken(require, own, retrieved=True)
        if on_empty != "relax":
            return standing
        best = (np.arange(k) == scores.argmax(-1)[:, None]) & here
        return np.where(standing.any(-1)[:, None], standing, best)

    def _elected(
        self, standing: NDArray[np.bool_], scores: NDArray[np.float64], how: Aggregate, quality: NDArray[np.float64],
        margin: float | None,
    ) -> NDArray[np.float64]:  # fmt: skip
        """(N,) quality of the label that most of the score is for; of `quality`, the best text's, where none gives one."""
        assert self.places is not None
        given = np.where(standing, self.places[:, : standing.shape[-1]], -1)
        sums = label_scores(given, np.where(standing, scores, 0.0), how, labels=self.labelled.shape[1])
        label = _first_best(given, sums)
        found = np.where((given >= 0).any(-1), self.labelled[np.arange(len(sums)), label], quality)
        if margin is None:
            return found
        second, first = np.sort(sums, axis=-1)[:, -2:].T
        with np.errstate(invalid="ignore"):
            return np.where(np.isfinite(second) & (first - second < margin), self.abstention, found)


def _first_best(given: NDArray[Any], sums: NDArray[np.float64]) -> NDArray[np.intp]:
    """(N,) the label with the largest sum, of equals the one that stands first: (N,K) labels or −1, (N,L) sums."""
    k, labels = given.shape[-1], np.arange(sums.shape[-1])
    places = np.where(given[:, None, :] == labels[:, None], np.arange(k), k).min(-1)
    best: NDArray[np.intp] = np.where(sums == sums.max(-1, keepdims=True), places, k + 1).argmin(-1)
    return best


def _said(marked: Marked, cache: CandidateCache, settings: SelfRagDecode, *, retrieved: bool) -> tuple[int, int, int]:
    assert cache.schema is not None
    said = said_of(marked, cache.schema, retrieved=retrieved, by=settings.require_by)
    return said.is_rel, said.is_sup, said.is_use


def _broken(require: RequireSettings, said: Said, *, retrieved: bool) -> Any:
    """Whether any constraint is broken, in the shape of `said`."""
    return np.logical_or.reduce(list(refusals(require, said, retrieved=retrieved).values()))


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


def unfit(settings: SelfRagDecode) -> list[str]:
    """What of these settings is more than arrays can do."""
    return [
        name
        for name, on in (
            ("form long", settings.form == "long"), ("options", bool(settings.options)),
            (f"prune.kind {settings.prune.kind}", settings.prune.kind != "none"),  # `bound` changes what is written
            ("released", bool(settings.released)), (f"retrieve {settings.retrieve}", settings.retrieve != "adaptive"),
            ("samples", settings.samples > 1),
            ("no threshold", settings.threshold is None or settings.target_rate is not None),
        )
        if on
    ]  # fmt: skip


def unwritten(cache: CandidateCache) -> list[str]:
    """Why candidates are no arrays: a tree, or choices that were scored."""
    if not cache.questions:
        return ["candidates of the long form"]
    scored = any(c["key"] is None for row in cache.questions for c in row["candidates"] if c["passage"] is None)
    return ["questions with choices, which are scored and not written"] if scored else []
