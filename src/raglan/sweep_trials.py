"""What the settings of a sweep come to on candidates: as arrays where they are arrays, else answer by answer, replayed.

short form   `decode.self_rag.table`, one setting after the other, all questions at once
long form    `decode.self_rag.forest`, all settings and all questions at once
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from raglan.decode.self_rag.cache import CandidateCache
from raglan.decode.self_rag.forest import Forest, Grid, beyond
from raglan.decode.self_rag.rules import weights
from raglan.decode.self_rag.table import Table, unfit, unwritten
from raglan.decode.self_rag.trees import Trees
from raglan.errors import GeneratorError
from raglan.recipe import SelfRagDecode
from raglan.records import Answer
from raglan.reflection import Weights
from raglan.sweep_settings import WEIGHTS, Setting

__all__ = ["Sweep", "Trials", "by_table", "sweep"]

BAKED = ("rule", "absent", "seq", "seq_tokens")  # of decode, what a table is made with
COMMON = ("prune", "rule", "absent", "seq_mode", "seq_tokens")  # of a setting, what trees that are searched together share


@dataclass(frozen=True)
class Sweep:
    """All settings, the best quality first, and those that none beats.

    Attributes:
        needs_generation: settings without figures, as some question comes to a segment that was never written.
        seconds: of the settings alone. `calls`: model calls, none unless something was filled in.
        made_of: fingerprint of candidates, decoding and grid.
    """

    metric: str
    questions: int
    settings: list[Setting]
    front: list[Setting]
    seconds: float
    needs_generation: list[Setting] = field(default_factory=list)
    calls: int = 0
    made_of: str = ""

    def told(self) -> dict[str, Any]:
        """As plain JSON."""
        lists = {name: [one.told() for one in getattr(self, name)] for name in ("settings", "front", "needs_generation")}
        return {
            "metric": self.metric, "questions": self.questions, "seconds": self.seconds, "calls": self.calls,
            "made_of": self.made_of, **lists,
        }  # fmt: skip


class Trials:
    """What settings come to on candidates.

    Args:
        quality: an answer's text and its question's place → figure.
        replayed: the answers of a decoding and K; None where they need what was never written.
        planted: the trees of a decoding other than that of the candidates; without it, that is replayed.
        fill: whether `replayed` writes what is lacking.
    """

    def __init__(
        self, cache: CandidateCache, decode: SelfRagDecode, quality: Callable[[str, int], float],
        replayed: Callable[[SelfRagDecode, int], list[Answer | None]], *,
        planted: Callable[[SelfRagDecode], Trees | None] | None = None, fill: bool = False,
    ):  # fmt: skip
        self.cache, self.decode, self.quality, self.replayed = cache, decode, quality, replayed
        self.planted, self.fill = planted, fill
        self.arrays = not unwritten(cache)
        self.tables: dict[tuple[Any, ...], Table] = {}

    def __call__(self, settings: Sequence[Setting]) -> list[Setting]:
        """Each of these with its figures, or with the number of questions that it cannot answer."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for place, one in enumerate(settings):
            groups.setdefault(tuple(getattr(one, name) for name in COMMON), []).append(place)
        found: dict[int, Setting] = {}
        for places in groups.values():
            own = [settings[place] for place in places]
            planted = self._forest(own) if self.decode.form == "long" else None
            told = [self._alone(one) for one in own] if planted is None else self._searched(planted, own)
            found.update(zip(places, told, strict=True))
        return [found[place] for place in range(len(settings))]

    def _alone(self, one: Setting) -> Setting:
        own = one.decode(self.decode)
        if not self.arrays or unfit(own):
            return self._answered(one, self.replayed(own, one.k))
        key = tuple(getattr(own, name) for name in BAKED)
        if key not in self.tables:
            self.tables[key] = Table.of(self.cache, own, self.quality)
        return by_table(self.tables[key], one, own)

    def _forest(self, settings: Sequence[Setting]) -> Forest | None:
        """Trees for settings that share what is `COMMON`; None where these are more than a search over arrays."""
        common = {name: getattr(settings[0], name) for name in COMMON}
        k = max(one.k for one in settings)
        own = Setting(None, None, None, None, None, k, **common).decode(self.decode)
        if beyond(own):
            return None
        trees = self.cache.trees
        if trees is None or not trees.of(own, k):
            trees = self.planted(own) if self.planted is not None else None
        try:
            return None if trees is None else Forest(trees, own, exact=self.cache.exact)
        except GeneratorError:  # a mark is lacking, which a replay need not come to
            return None

    def _searched(self, planted: Forest, settings: Sequence[Setting]) -> list[Setting]:
        found = planted.search(_grid(planted, self.decode, settings))
        lacking = found.lacking.sum(1).tolist()
        whole = [place for place, count in enumerate(lacking) if not count]
        quality = planted.qualities(found.text[whole], self.quality).mean(1).tolist()
        rate, generated = found.retrieved[whole].mean(1).tolist(), found.generated[whole].mean(1).tolist()
        told = dict(zip(whole, zip(quality, rate, generated, strict=True), strict=True))
        return [
            replace(one, **dict(zip(("quality", "rate", "generated"), told[place], strict=True))) if place in told
            else self._alone(one) if self.fill else replace(one, incomplete=lacking[place])
            for place, one in enumerate(settings)
        ]  # fmt: skip

    def _answered(self, one: Setting, answers: Sequence[Answer | None]) -> Setting:
        if lacking := sum(answer is None for answer in answers):
            return replace(one, incomplete=lacking)
        told = [(answer.text, answer.trace or {}) for answer in answers if answer is not None]
        return replace(
            one, quality=float(np.mean([self.quality(text, place) for place, (text, _) in enumerate(told)])),
            rate=float(np.mean([bool(trace.get("retrieved")) for _, trace in told])),
            generated=float(np.mean([trace["cost"]["generated"] for _, trace in told])),
        )  # fmt: skip


def _grid(planted: Forest, decode: SelfRagDecode, settings: Sequence[Setting]) -> Grid:
    """These settings side by side; what one has not is as in `decode`."""

    def each(name: str, default: Any) -> list[Any]:
        return [default if (value := getattr(one, name)) is None else value for one in settings]

    names = ("beam", "max_segments", "combine", "require", "on_empty")
    return Grid(
        each("threshold", planted.threshold), Weights(*(each(name, getattr(decode.weights, name)) for name in WEIGHTS)),
        each("k", 0), **{name: each(name, getattr(decode, name)) for name in names},
    )  # fmt: skip


def by_table(table: Table, one: Setting, own: SelfRagDecode) -> Setting:
    """A setting measured by arrays. `own`: the decoding that it is."""
    assert own.threshold is not None
    found = table.outcome(
        own.threshold, weights(own), k=one.k, how=own.aggregate, require=own.require, on_empty=own.on_empty,
        all_irrelevant=own.all_irrelevant, abstain_margin=own.abstain_margin,
    )  # fmt: skip
    figures = (found.quality, found.retrieved, found.generated)
    quality, rate, generated = (float(values.mean()) for values in figures)
    return replace(one, quality=quality, rate=rate, generated=generated)


def sweep(
    settings: Sequence[Setting], trials: Callable[[Sequence[Setting]], Sequence[Setting]], *, metric: str = "",
    questions: int = 0,
) -> Sweep:  # fmt: skip
    """What each setting comes to. `trials` gives them with their figures, or with how many questions they cannot answer."""
    began = time.perf_counter()
    measured = trials(settings)
    seconds = time.perf_counter() - began
    known = [one for one in measured if not one.incomplete]
    ordered = sorted(known, key=lambda one: (-one.quality, one.rate, one.generated))
    return Sweep(metric, questions, ordered, _front(ordered), seconds, [one for one in measured if one.incomplete])


def _front(ordered: Sequence[Setting]) -> list[Setting]:
    """Settings that no other equals or beats in everything and beats in something; of equal ones the first."""
    front: list[Setting] = []
    for one in ordered:  # whatever beats it stands before it
        if not any(other.rate <= one.rate and other.generated <= one.generated for other in front):
            front.append(one)
    return front
