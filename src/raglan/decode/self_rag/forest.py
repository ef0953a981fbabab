"""Recorded trees searched as arrays: all settings on all questions at once, one depth after the other.

    rows R = settings × questions:   live (R,B) → decisions (R,B) → children (R,B·W) → constraints, ties, beam → live (R,B)

Each step is `tree`'s with paths as columns, in the same order, and the arithmetic is that of live decoding: `step`, `figure`,
`retrieves`, `refusals`, and `path_score`'s sums, products and means term by term. So the answer, whether a question retrieved
and how many ids were written are those of a replay, to the last bit. A row that comes to what was never written is `lacking`.

Deviation: the best answer alone is known, without the n-best and the trace; what needs more is replayed (`beyond`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raglan.decode.self_rag.rules import Said, figure, refusals, scoring
from raglan.decode.self_rag.tree import SLACK
from raglan.decode.self_rag.trees import FAR, FIGURES, NO, NUMBERS, ON, YES, Trees
from raglan.recipe import RequireSettings, SelfRagDecode
from raglan.reflection import Components, Weights, largest_step, retrieves, step, target_threshold

__all__ = ["Forest", "Found", "Grid", "beyond"]

AT_ONCE = 1 << 22
SUMS = {"product": ("product",), "by_component": ("seq", "rel", "sup", "read")}  # beside the total
Quality = Callable[[str, int], float]  # an answer's text and its question's place → figure
Numbers = NDArray[np.int64]
Figures = NDArray[np.float64]
Flags = NDArray[np.bool_]


def beyond(settings: SelfRagDecode) -> list[str]:
    """What of these settings is more than a search over arrays."""
    budgets = ("max_total_tokens", "max_passages", "max_calls")
    return [
        name
        for name, on in (
            ("form short", settings.form == "short"), ("released", bool(settings.released)),
            (f"prune.kind {settings.prune.kind}", settings.prune.kind != "none"), ("slots all", settings.slots == "all"),
            *((name, getattr(settings, name) is not None) for name in budgets),
            ("n_best with a bound", settings.n_best > 1 and settings.stop == "bound"), ("draws", settings.temperature > 0),
        )
        if on
    ]  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """What each of S settings is, beside what they have in common; (S,) each. `threshold`: None for the likeliest token."""

    threshold: Sequence[float | None]
    weights: Weights
    k: Sequence[int]
    beam: Sequence[int]
    max_segments: Sequence[int]
    combine: Sequence[str]
    require: Sequence[RequireSettings]
    on_empty: Sequence[str]

    @classmethod
    def of(cls, settings: Sequence[SelfRagDecode], ks: Sequence[int]) -> Grid:
        """Whole decodings with their K."""
        own = [[getattr(one.weights, name) for one in settings] for name in ("seq", "rel", "sup", "use")]
        names = ("beam", "max_segments", "combine", "require", "on_empty")
        each: dict[str, Any] = {name: [getattr(one, name) for one in settings] for name in names}
        return cls([one.threshold for one in settings], Weights(*own), ks, **each)

    def part(self, begin: int, end: int) -> Grid:
        """Some of them."""
        cut = {name: value[begin:end] for name, value in vars(self).items() if name != "weights"}
        return Grid(weights=Weights(*(value[begin:end] for value in vars(self.weights).values())), **cut)


@dataclass(frozen=True)
class Found:
    """What S settings come to on N questions, (S,N) each; where `lacking`, the others mean nothing.

    `text`: places in the trees' texts. `retrieved`: whether any segment did. `generated`: ids that live decoding writes.
    """

    text: Numbers
    retrieved: Flags
    generated: Numbers
    lacking: Flags


class Forest:
    """Planted trees under what settings have in common: how passages are asked for and r is read.

    Args:
        settings: those that the trees were planted with; thresholds, weights, beam, depth, combination and constraints are
            the grid's.
        exact: whether every mark came back.

    Raises:
        GeneratorError: a mark that is read did not come back, and `missing` is `error`.
    """

    def __init__(self, trees: Trees, settings: SelfRagDecode, *, exact: bool):
        self.trees, self.settings = trees, settings
        numbers = dict(zip(NUMBERS, trees.numbers.astype(np.int64), strict=True))
        figures = dict(zip(FIGURES, trees.figures, strict=True))
        self.none = trees.numbers.shape[1] - 1
        self.rank, self.length, self.text = numbers["rank"], numbers["length"], numbers["text"]
        self.first_hit = numbers["first_hit"]
        self.plain, self.useless, self.done = (numbers[name].astype(bool) for name in ("plain", "useless", "done"))
        self.likeliest, self.reads_on = (numbers[name].astype(bool) for name in ("likeliest", "reads_on"))
        self.said = Said(numbers["is_rel"], numbers["is_sup"], numbers["is_use"])
        self.lacks = np.concatenate([numbers[name] for name in ("lacks_no", "lacks_on", "lacks_yes")])
        self.parts = Components(*(figures[name] for name in ("seq", "rel", "sup", "use")))
        marks = np.stack([figures[name] for name in ("no", "yes", "cont")], -1)
        self.r = np.asarray(figure(marks, settings, missing=scoring(settings, exact=exact).missing), np.float64)
        self.alone = np.concatenate([trees.children[:, NO], trees.children[:, ON]]).astype(np.int64)
        self.readers = np.ascontiguousarray(trees.children[:, YES:], np.int64)
        self.most = int(self.rank.max(initial=0))
        self.constant = None if isinstance(settings.absent_step, str) else float(settings.absent_step)

    @property
    def threshold(self) -> float | None:
        """δ where the grid has none of its own."""
        rate = self.settings.target_rate
        return self.settings.threshold if rate is None else target_threshold(self.r[self.trees.roots], rate)

    def search(self, grid: Grid, *, at_once: int = AT_ONCE) -> Found:
        """What each setting comes to on each question. `at_once`: pairs of children that are in memory together."""
        questions, wide = len(self.trees.roots), max(grid.beam, default=1) * (self.readers.shape[1] + 1)
        each = max(1, at_once // (max(1, questions) * wide * wide))
        parts = [self._searched(grid.part(at, at + each)) for at in range(0, len(grid.k), each)]
        return Found(*(np.concatenate([getattr(one, name) for one in parts]) for name in vars(parts[0])))

    def qualities(self, text: Numbers, quality: Quality) -> Figures:
        """(S,N) how good the answers with these texts (S,N) are; each text of a question is judged once."""
        count = len(self.trees.texts)
        asked, back = np.unique(text + count * np.arange(text.shape[1]), return_inverse=True)
        known = [quality(self.trees.texts[one % count], one // count) for one in asked.tolist()]
        return np.asarray(known, np.float64)[back].reshape(text.shape)

    def _searched(self, grid: Grid) -> Found:
        search = _Search(self, grid)
        for depth in range(1, max(grid.max_segments) + 1):
            search.level(depth)
            if (search.live == self.none).all():
                break
        shape = (len(grid.k), len(self.trees.roots))
        return Found(
            self.text.take(search.best).reshape(shape), search.retrieved.reshape(shape), search.generated.reshape(shape),
            search.lacking.reshape(shape),
        )  # fmt: skip


class _Search:
    """All rows, at one depth after the other.

    Attributes:
        live: (R,B) nodes, the best first, `none` behind them; `key`, `tie` and `sums` are theirs.
        best: (R,) the best finished node. `best_key`, `best_tie`: its own.
    """

    def __init__(self, forest: Forest, grid: Grid):
        self.forest, self.none = forest, forest.none
        self.questions = len(forest.trees.roots)
        self.rows = rows = len(grid.k) * self.questions
        each = self._each
        self.weights = Weights(*map(each, vars(grid.weights).values()))
        self.k, self.beam, self.most = each(grid.k), each(grid.beam), each(grid.max_segments)
        self.by_argmax = each([one is None for one in grid.threshold])
        self.threshold = each([np.inf if one is None else one for one in grid.threshold])
        self.combine = {name: each([one == name for one in grid.combine]) for name in sorted(set(grid.combine) - {"mean"})}
        self.relaxes, self.unaids = (each([one == name for one in grid.on_empty]) for name in ("relax", "no_retrieval"))
        asks: dict[RequireSettings, int] = {}
        self.asks = each([asks.setdefault(one, len(asks)) for one in grid.require]) * (forest.none + 1)
        self.broken = self._breaking(list(asks)) if any(one.any for one in asks) else None
        self.live = np.tile(forest.trees.roots.astype(np.int64), len(grid.k))[:, None]
        self.key = self.tie = np.zeros((rows, 1))
        self.sums = {"total": self.key} | {name: self.key for combine in self.combine for name in SUMS.get(combine, ())}
        if "product" in self.sums:
            self.sums["product"] = np.ones((rows, 1))
        self.best = np.full(rows, self.none)
        self.best_key = self.best_tie = np.full(rows, -np.inf)
        self.retrieved, self.lacking = np.zeros(rows, bool), np.zeros(rows, bool)
        self.generated = np.zeros(rows, np.int64)

    def _each(self, values: Sequence[Any]) -> NDArray[Any]:
        """(R,1) a setting's value for each of its questions."""
        return np.repeat(np.asarray(values), self.questions)[:, None]

    def _breaking(self, asks: Sequence[RequireSettings]) -> Flags:
        """Whether each node breaks each of these constraints, one after the other."""
        nothing = np.zeros(self.none + 1, bool)
        told = [refusals(one, self.forest.said, retrieved=~self.forest.plain) for one in asks]
        return np.concatenate([np.logical_or.reduce([nothing, *own.values()]) for own in told])

    def level(self, depth: int) -> None:
        """Grow what is live, drop what breaks constraints, keep the best."""
        forest, live = self.forest, self.live
        on, kind = live != self.none, self._decided(live)
        self._lack(on, live, kind)
        self.retrieved |= (on & (kind == YES)).any(1)
        nodes = self._children(live, kind)
        grown = self._grown(nodes.reshape(self.rows, -1), nodes.shape[2], depth)
        banned = np.zeros(on.shape, bool)
        if self.broken is not None:
            grown, banned = self._constrained(grown, live, kind, depth)
        useful, own = ~forest.useless.take(grown.node), nodes.shape[1] * nodes.shape[2]
        going = useful[:, :own].reshape(nodes.shape).any(2)
        if useful.shape[1] > own:  # behind all others, those that go on unaided
            going |= useful[:, own:]
        self._finish(live, self.key, self.tie, on & ~going & ~banned)  # stuck: nothing new is said below these
        self._select(grown, useful)
        self._stop(depth)

    def _decided(self, live: Numbers) -> Numbers:
        """(R,B) the kind of branch that each path takes."""
        forest, how = self.forest, self.forest.settings.retrieve
        if how == "never":
            return np.full(live.shape, NO)
        hits = forest.first_hit.take(live) <= self.k
        if how == "always":
            return np.where(hits, YES, NO)
        wanted = np.where(self.by_argmax, forest.likeliest.take(live), retrieves(forest.r.take(live), self.threshold))
        return np.where(forest.reads_on.take(live), ON, np.where(wanted & hits, YES, NO))

    def _lack(self, on: Flags, live: Numbers, kind: Numbers) -> None:
        """Rows that need what was never written."""
        lacks = self.forest.lacks.take(live + kind * (self.none + 1))
        self.lacking |= (on & (lacks <= np.where(kind == YES, self.k, FAR - 1))).any(1)

    def _children(self, live: Numbers, kind: Numbers) -> Numbers:
        """(R,B,W)"""
        forest, reads = self.forest, (kind == YES)[..., None]
        found = forest.readers.take(live, axis=0)
        if (self.k < forest.most).any():
            found = np.where(forest.rank.take(found) <= self.k[..., None], found, self.none)
        if reads.all():
            return found
        found = np.where(reads, found, self.none)
        alone = forest.alone.take(live + np.where(kind == ON, self.none + 1, 0))
        found[..., 0] = np.where(reads[..., 0], found[..., 0], alone)
        return found

    def _grown(self, node: Numbers, each: int, depth: int) -> _Grown:
        """Children (R,B·each), parent by parent, with the sums and keys of their paths."""
        forest, weights = self.forest, self.weights
        self.generated += forest.length.take(node).sum(1)
        old = {name: values.repeat(each, 1) for name, values in self.sums.items()}
        plain = forest.plain.take(node)
        parts = Components(*(vars(forest.parts)[name].take(node) for name in ("seq", "rel", "sup", "use")))
        score = step(parts, weights)
        if forest.constant is not None:
            score = np.where(plain, forest.constant, score)
        sums = {"total": old["total"] + score}
        key = tie = sums["total"] / depth
        if "sum" in self.combine:
            key = tie = np.where(self.combine["sum"], sums["total"], key)
        if "product" in self.combine:
            sums["product"] = np.where(plain, old["product"], old["product"] * np.maximum(score, 0.0))
            key = np.where(self.combine["product"], sums["product"], key)
        if "by_component" in self.combine:
            sums["seq"] = old["seq"] + parts.seq
            sums["rel"], sums["sup"] = (
                np.where(plain, old[name], old[name] + vars(parts)[name]) for name in ("rel", "sup")
            )  # fmt: skip
            sums["read"] = old["read"] + ~plain
            own = self._by_component(sums, depth, 0, parts.use)
            key, tie = (np.where(self.combine["by_component"], own, values) for values in (key, tie))
        return _Grown(node, key, tie, sums)

    def _by_component(self, sums: dict[str, Figures], depth: int, left: Any, use: Any) -> Any:
        """Each figure averaged over the steps that have it and `left` more of 1."""
        read = sums["read"] + left
        rel, sup = (np.where(read > 0, (sums[name] + left) / np.maximum(read, 1), 0.0) for name in ("rel", "sup"))
        return step(Components((sums["seq"] + left) / (depth + left), rel, sup, use), self.weights)

    def _constrained(self, grown: _Grown, live: Numbers, kind: Numbers, depth: int) -> tuple[_Grown, Flags]:
        """Without the children that break a hard constraint; and (R,B) the parents that are lost with theirs."""
        shape = (*live.shape, -1)
        there = (grown.node != self.none).reshape(shape)
        good = there & ~self._breaks(grown.node).reshape(shape)
        lost = there.any(2) & ~good.any(2)
        if (relaxed := lost & self.relaxes).any():
            key = np.where(there, grown.key.reshape(shape), -np.inf)
            first = key == key.max(2, keepdims=True)
            best = np.where(first & there, grown.tie.reshape(shape), -np.inf).argmax(2)
            good |= relaxed[..., None] & (np.arange(good.shape[2]) == best[..., None])
        grown.node = np.where(good.reshape(self.rows, -1), grown.node, self.none)
        again = lost & self.unaids & (kind != NO)
        banned = lost & ~self.relaxes & ~again
        if not again.any():
            return grown, banned
        self._lack(again, live, np.full(live.shape, NO))
        more = self._grown(np.where(again, self.forest.alone.take(live), self.none), 1, depth)
        refused = self._breaks(more.node)
        more.node = np.where(refused, self.none, more.node)
        return grown.joined(more), banned | refused

    def _breaks(self, node: Numbers) -> Flags:
        assert self.broken is not None
        return self.broken.take(node + self.asks) & (node != self.none)

    def _select(self, grown: _Grown, useful: Flags) -> None:
        """Ended paths are finished, of the others the best `beam` live on; of equal texts the better path."""
        forest, most = self.forest, max(1, int(useful.sum(1).max(initial=0)))
        ranked = np.where(useful, -grown.key, np.inf)
        if "product" in self.combine:  # elsewhere the key is its own tie
            order = np.lexsort((np.where(useful, -grown.tie, np.inf), ranked), axis=-1)
        else:
            order = ranked.argsort(axis=1, kind="stable")
        grown, useful = grown.at(order[:, :most]), np.take_along_axis(useful, order[:, :most], 1)
        done = forest.done.take(grown.node)
        told = np.where(useful, forest.text.take(grown.node) * 2 + done, -1 - np.arange(most))
        first = useful
        if most > 1:
            earlier = np.tril(np.ones((most, most), bool), -1)
            first = useful & ~((told[:, :, None] == told[:, None, :]) & earlier).any(2)
        self._finish(grown.node, grown.key, grown.tie, first & done)
        going = first & ~done
        going &= going.cumsum(1) <= self.beam
        width = max(1, int(going.sum(1).max(initial=0)))
        columns = (~going).argsort(axis=1, kind="stable")[:, :width]
        kept = grown.at(columns)
        self.live = np.where(np.take_along_axis(going, columns, 1), kept.node, self.none)
        self.key, self.tie, self.sums = kept.key, kept.tie, kept.sums

    def _finish(self, node: Numbers, key: Figures, tie: Figures, which: Flags) -> None:
        """Of these paths, the best first, the first one is the best that is finished if it is better than that."""
        if not which.any():
            return
        flat = which.argmax(1) + np.arange(self.rows) * which.shape[1]
        key, tie = key.take(flat), tie.take(flat)
        better = (key > self.best_key) | ((key == self.best_key) & (tie > self.best_tie)) | (self.best == self.none)
        better &= which.any(1)
        self.best = np.where(better, node.take(flat), self.best)
        self.best_key, self.best_tie = np.where(better, key, self.best_key), np.where(better, tie, self.best_tie)

    def _stop(self, depth: int) -> None:
        """Rows that lack something, are at their last depth, or in which nothing live can overtake the best finished, end."""
        on = self.live != self.none
        last = self.most <= depth
        self._finish(self.live, self.key, self.tie, on & last)
        ended = last | self.lacking[:, None]
        if self.forest.settings.stop == "bound" and (self.best != self.none).any():
            hopeless = self._bound(depth) + SLACK < self.best_key[:, None]
            ended = ended | ((self.best != self.none)[:, None] & (hopeless | ~on).all(1, keepdims=True))
        self.live = np.where(ended, self.none, self.live)

    def _bound(self, depth: int) -> Figures:
        """(R,B) the most that each path can come to with the steps that are left to it."""
        left = np.maximum(self.most - depth, 0)
        constant = self.forest.constant
        largest = largest_step(self.weights, constant=0.0 if constant is None else constant)
        total = self.sums["total"] + left * largest
        found = total / (depth + left)
        if "sum" in self.combine:
            found = np.where(self.combine["sum"], total, found)
        if "product" in self.combine:
            found = np.where(self.combine["product"], self.sums["product"] * _power(np.maximum(1.0, largest), left), found)
        if "by_component" in self.combine:
            found = np.where(self.combine["by_component"], self._by_component(self.sums, depth, left, 1.0), found)
        return np.asarray(found, np.float64)


@dataclass
class _Grown:
    """Children (R,M) of one depth, and what the paths to them come to."""

    node: Numbers
    key: Figures
    tie: Figures
    sums: dict[str, Figures]

    def at(self, columns: NDArray[np.intp]) -> _Grown:
        """These columns (R,C) of each row."""
        flat = columns + np.arange(len(columns))[:, None] * self.node.shape[1]
        sums = {name: values.take(flat) for name, values in self.sums.items()}
        return _Grown(self.node.take(flat), self.key.take(flat), self.tie.take(flat), sums)

    def joined(self, more: _Grown) -> _Grown:
        """With others behind them."""
        sums = {name: np.concatenate([values, more.sums[name]], 1) for name, values in self.sums.items()}
        node, key = np.concatenate([self.node, more.node], 1), np.concatenate([self.key, more.key], 1)
        return _Grown(node, key, np.concatenate([self.tie, more.tie], 1), sums)


def _power(base: Figures, exponent: Numbers) -> Figures:
    """One number after the other: numpy's loops over arrays may round the last bit otherwise."""
    pairs = zip(base.ravel(), exponent.ravel().tolist(), strict=True)
    return np.array([one**times for one, times in pairs], np.float64).reshape(base.shape)
