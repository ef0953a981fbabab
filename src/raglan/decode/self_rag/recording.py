"""What stands in front of a generator to write candidates (`cache`), and what stands for one afterwards.

`Recording` keeps what its generator says; `Replay` says it again, and `Absent` is what it needs of the generator where no model
is open. Live decoding runs on either, so a rescored answer is the live one to the last bit. Of a continuation's marks only the
rows that decisions read are kept: position 0, IsSup, IsUse, the Retrieve tokens, and the last; the rest is NaN. Nothing is kept
of draws (temperature > 0), which are new ones each time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raglan.decode.base import Asked
from raglan.decode.self_rag import Retrieve, self_rag
from raglan.decode.self_rag.cache import CandidateCache, Uncached, key_of, limits_of, stacked, write_keys
from raglan.decode.self_rag.planting import plant
from raglan.decode.self_rag.rate import prompts_of, threshold_of
from raglan.errors import RecipeError
from raglan.generator.base import Contexts, Cost, MarkedGenerator
from raglan.marked_prompt import MarkedPrompt
from raglan.recipe import PruneSettings, RequireSettings, SelfRagDecode, SelfRagPromptSettings
from raglan.records import Answer, Hit, Marked
from raglan.reflection import Schema
from raglan.text import shortened

__all__ = ["FILL", "Absent", "Recording", "Replay", "record", "replay"]

FILL = "raglan evaluate --rescore --fill writes it, raglan evaluate --cache with a wider decode.beam finds more"


class Absent(MarkedGenerator):
    """What a replay needs of the model that wrote the candidates, and no model: it computes nothing."""

    def __init__(self, cache: CandidateCache, settings: SelfRagPromptSettings):
        assert cache.schema is not None
        self._cache, self._settings = cache, settings
        self.eos, self.exact_marks, self.positions, self.cost = cache.eos, cache.exact, cache.positions, Cost()

    @property
    def schema(self) -> Schema:
        assert self._cache.schema is not None
        return self._cache.schema

    @cached_property
    def marked_prompt(self) -> MarkedPrompt:
        return MarkedPrompt(self.schema, self._cache.opened_tokenizer(), self._settings, eos=self.eos)

    def contexts(self, prompts: Sequence[Sequence[int]], *, marks: Sequence[int]) -> Contexts:
        raise Uncached(f"{len(prompts)} contexts were never recorded, and no model is open", hint=FILL)


class Recording(MarkedGenerator):
    """A generator that says what `inner` says, and keeps it in `cache`."""

    def __init__(self, inner: MarkedGenerator, cache: CandidateCache):
        self.inner, self.cache = inner, cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    @property
    def schema(self) -> Schema:
        return self.inner.schema

    @property
    def marked_prompt(self) -> MarkedPrompt:
        return self.inner.marked_prompt

    def contexts(self, prompts: Sequence[Sequence[int]], *, marks: Sequence[int]) -> Contexts:
        return _Recorded(self, self.inner.contexts(prompts, marks=marks))


class Replay(MarkedGenerator):
    """A generator that says what was recorded, and asks no model.

    Args:
        like: the generator that wrote it, for its prompt and vocabulary.
        fill: whether `like` may write what is not there; it is kept.

    Attributes:
        cost: stays at zero, unless something was filled in.
    """

    def __init__(self, cache: CandidateCache, like: MarkedGenerator, *, fill: bool = False):
        self.cache, self.like, self.fill = cache, like, fill
        self.eos, self.exact_marks = like.eos, like.exact_marks
        self.cost = like.cost if fill else Cost()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["like"], name)

    @property
    def schema(self) -> Schema:
        return self.like.schema

    @property
    def marked_prompt(self) -> MarkedPrompt:
        return self.like.marked_prompt

    def contexts(self, prompts: Sequence[Sequence[int]], *, marks: Sequence[int]) -> Contexts:
        return _Replayed(self, tuple(marks), [tuple(ids) for ids in prompts])

    def live(self, ids: Sequence[int], marks: Sequence[int]) -> Contexts:
        """One context that is computed after all. Raises Uncached where that is not wanted."""
        if not self.fill:
            raise Uncached(
                f"no recorded run came to a context of {len(ids)} tokens",
                hint=FILL,
            )
        return Recording(self.like, self.cache).contexts([ids], marks=marks)


class _Recorded(Contexts):
    def __init__(self, generator: Recording, inner: Contexts):
        self.generator, self.inner, self.marks = generator, inner, inner.marks

    @property
    def ids(self) -> list[tuple[int, ...]]:
        return self.inner.ids

    @property
    def mark_logprobs(self) -> np.ndarray:
        self._keep()
        return self.inner.mark_logprobs

    @property
    def best(self) -> np.ndarray:
        self._keep()
        return self.inner.best

    def branch(self, places: Sequence[int], suffixes: Sequence[Sequence[int]]) -> Contexts:
        return _Recorded(self.generator, self.inner.branch(places, suffixes))

    def only(self, places: Sequence[int]) -> Contexts:
        return _Recorded(self.generator, self.inner.only(places))

    def write(
        self, *, stop_ids: Collection[int], max_new_tokens: int | Sequence[int], first: Collection[int] | None = None,
        temperature: float = 0.0, seed: int | None = None,
    ) -> list[Marked]:  # fmt: skip
        _greedy(temperature)
        self._keep()  # pruning may want to know what this run did not ask
        written = self.inner.write(stop_ids=stop_ids, max_new_tokens=max_new_tokens, first=first, seed=seed)
        keys = write_keys(self.ids, stop_ids, max_new_tokens, first)
        schema = self.generator.schema
        kept = [_thinned(marked, schema) for marked in written]
        self.generator.cache.written.update(zip(keys, kept, strict=True))
        self.generator.cache.continued.update(zip(map(key_of, self.ids), keys, strict=True))
        return kept

    def score(self, places: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[np.ndarray]:
        scores = self.inner.score(places, continuations)
        keys = [key_of(self.ids[place], ids) for place, ids in zip(places, continuations, strict=True)]
        self.generator.cache.scored.update(zip(keys, scores, strict=True))
        return scores

    def _keep(self) -> None:
        rows = zip(self.ids, self.inner.mark_logprobs, self.inner.best, strict=True)
        self.generator.cache.states.update({key_of(ids): (np.array(marks, np.float32), int(best)) for ids, marks, best in rows})


class _Replayed(Contexts):
    def __init__(self, generator: Replay, marks: tuple[int, ...], ids: list[tuple[int, ...]]):
        self.generator, self.marks, self._ids = generator, marks, ids

    @property
    def ids(self) -> list[tuple[int, ...]]:
        return self._ids

    @property
    def mark_logprobs(self) -> np.ndarray:
        return stacked([marks for marks, _ in self._states()])

    @property
    def best(self) -> np.ndarray:
        return np.array([best for _, best in self._states()], np.int64)

    def branch(self, places: Sequence[int], suffixes: Sequence[Sequence[int]]) -> Contexts:
        ids = [(*self._ids[place], *suffix) for place, suffix in zip(places, suffixes, strict=True)]
        return _Replayed(self.generator, self.marks, ids)

    def only(self, places: Sequence[int]) -> Contexts:
        return _Replayed(self.generator, self.marks, [self._ids[place] for place in places])

    def write(
        self, *, stop_ids: Collection[int], max_new_tokens: int | Sequence[int], first: Collection[int] | None = None,
        temperature: float = 0.0, seed: int | None = None,
    ) -> list[Marked]:  # fmt: skip
        _greedy(temperature)
        limits = limits_of(max_new_tokens, len(self._ids))
        found = []
        for ids, limit, key in zip(self._ids, limits, write_keys(self._ids, stop_ids, limits, first), strict=True):
            if key not in self.generator.cache.written:
                self.generator.live(ids, self.marks).write(stop_ids=stop_ids, max_new_tokens=limit, first=first)
            found.append(self.generator.cache.written[key])
        return found

    def score(self, places: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[np.ndarray]:
        found = []
        for place, ids in zip(places, continuations, strict=True):
            if (key := key_of(self._ids[place], ids)) not in self.generator.cache.scored:
                self.generator.live(self._ids[place], self.marks).score([0], [ids])
            found.append(self.generator.cache.scored[key])
        return found

    def _states(self) -> list[tuple[NDArray[np.float32], int]]:
        states = self.generator.cache.states
        for ids in self._ids:
            if key_of(ids) not in states:
                _ = self.generator.live(ids, self.marks).best
        return [states[key_of(ids)] for ids in self._ids]


def record(
    generator: MarkedGenerator,
    asked: Asked,
    settings: SelfRagDecode,
    *,
    cache: CandidateCache,
    retrieve: Retrieve | None = None,
    wide: SelfRagDecode | None = None,
) -> list[Answer]:
    """Decode live, and keep in `cache` what later settings may need.

    The short form reads every passage to its end and also answers without any, so that every threshold and every smaller K
    can be decided later; the long form keeps the tree that it grew, to its last level, and plants it for `forest`.

    Args:
        wide: how the long form's tree is grown, in place of `settings`, whose own tree is kept, too.

    Returns:
        The answers of `settings` themselves, read from what was kept.
    """
    _greedy(settings.temperature)
    if rewrites := getattr(generator, "rewrites", 0):
        raise RecipeError(
            f"generator.rewrites is {rewrites}, and what reworded questions find is not kept",
            hint="generator.rewrites=0 for --cache, --rescore and --sweep",
        )
    cache.of(generator)
    keeps = Recording(generator, cache)
    if settings.form == "long":
        searches = None if retrieve is None else _Searches(retrieve)
        self_rag(keeps, asked, (wide or settings).model_copy(update={"stop": "never"}), retrieve=searches)
        answers = self_rag(Replay(cache, generator, fill=True), asked, settings, retrieve=searches)
        cache.trees = plant(cache, generator, asked, settings, retrieve=searches and searches.again)
        return answers
    thorough = {"retrieve": "always", "prune": PruneSettings(), "all_irrelevant": "best", "target_rate": None,
                "require": RequireSettings()}  # fmt: skip
    every = self_rag(keeps, asked, settings.model_copy(update=thorough))
    none = self_rag(keeps, asked, settings.model_copy(update={**thorough, "retrieve": "never"}))
    cache.questions += [cache.row(*row) for row in zip(asked.queries, every, none, strict=True)]
    return self_rag(Replay(cache, generator, fill=True), asked, settings)


class _Searches:
    """A retrieval that remembers what it found."""

    def __init__(self, retrieve: Retrieve):
        self.retrieve, self.found = retrieve, dict[tuple[str, int], list[Hit]]()

    def __call__(self, query: str, k: int) -> list[Hit]:
        if (query, k) not in self.found:
            self.found[query, k] = list(self.retrieve(query, k))
        return self.found[query, k]

    def again(self, query: str, k: int) -> list[Hit]:
        """What was found. Raises Uncached where nobody searched."""
        if (query, k) not in self.found:
            raise Uncached(f"no recorded run searched for {shortened(query)!r}", hint=FILL)
        return self.found[query, k]


def replay(
    generator: MarkedGenerator, asked: Asked, settings: SelfRagDecode, *, cache: CandidateCache, fill: bool = False,
    retrieve: Retrieve | None = None,
) -> list[Answer | None]:  # fmt: skip
    """The answers that `settings` would have given live; None where they need what was never written.

    Args:
        generator: for its prompt; it is asked only with `fill`, which keeps what it says.
    """
    says = Replay(cache, generator, fill=fill)
    if fill:
        cache.of(generator)
    try:
        threshold = threshold_of(says, prompts_of(says, asked, settings), settings)  # drawn from all questions, if it is
    except Uncached:
        return [None] * len(asked.queries)
    own = settings.model_copy(update={"target_rate": None, "threshold": threshold})
    answers: list[Answer | None] = []
    for place in range(len(asked.queries)):
        try:
            answers += self_rag(says, asked.only([place]), own, retrieve=retrieve)
        except Uncached:
            answers.append(None)
    told = settings.model_dump(mode="json")
    return [answer and replace(answer, settings=told) for answer in answers]


def _thinned(marked: Marked, schema: Schema) -> Marked:
    """With the marks at the positions that are read, NaN elsewhere."""
    read = {token for role in ("retrieve", "is_sup", "is_use") for token in schema.ids[role]}
    last = len(marked.ids) - 1
    keep = np.array([at in (0, last) or token in read for at, token in enumerate(marked.ids)], bool)
    rows = np.where(keep[:, None], marked.mark_logprobs, np.float32(np.nan)) if len(keep) else marked.mark_logprobs
    return Marked(tuple(marked.ids), np.array(marked.logprobs, np.float32), np.array(rows, np.float32), marked.finish)


def _greedy(temperature: float) -> None:
    if temperature:
        raise RecipeError(f"decode.temperature is {temperature}, and draws are not kept", hint="decode.temperature: 0")
