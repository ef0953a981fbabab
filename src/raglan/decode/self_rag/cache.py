"""Candidates, written once: everything that a Self-RAG decoding read of a model, kept so that it can be decided again.

    candidates/<system>/
        rows.npz         contexts: a hash of the ids → log-probabilities of the marks, likeliest id;
                         continuations: a hash of context and limits → ids, log-probabilities, marks at the positions read
        questions.jsonl  of the short form: what was asked, each passage's candidate and the one without a passage
        found.json       rows and scores of each question's passages, and of what further searches found
        tokenizer/       the model's, so that nothing else of it is opened again
        manifest.json    what it was made with

`Recording` stands in front of a generator and keeps what it says; `Replay` says it again. Live decoding runs on either, so a
rescored answer is the live one to the last bit, for every threshold, weight, aggregation and smaller K, in both forms, and
no model is asked. What was never written is not guessed: the question is `Uncached`, counted as incomplete, or filled in.

Of a continuation's marks only the rows that decisions read are kept: position 0, IsSup, IsUse, the Retrieve tokens, and the
last; the rest is NaN. Nothing is kept of draws (temperature > 0), which are new ones each time.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from raglan.artifact import MANIFEST, read_manifest, write_json, write_manifest
from raglan.decode.base import Asked
from raglan.decode.self_rag import Retrieve, self_rag
from raglan.decode.self_rag.rate import prompts_of, threshold_of
from raglan.errors import CheckpointError, GeneratorError, RecipeError
from raglan.generator.base import Contexts, Cost, MarkedGenerator
from raglan.marked_prompt import MarkedPrompt
from raglan.quiet import quietly
from raglan.recipe import PruneSettings, RequireSettings, SelfRagDecode, SelfRagPromptSettings
from raglan.records import Answer, Marked
from raglan.reflection import Schema
from raglan.vocabulary import save_tokenizer

__all__ = ["FILL", "KIND", "Absent", "CandidateCache", "Recording", "Replay", "Uncached", "record", "replay"]

KIND = "candidates"
FILL = "raglan evaluate --rescore --fill writes it, raglan evaluate --cache with a wider decode.beam finds more"
FINISH: tuple[Literal["eos", "stop", "length"], ...] = ("eos", "stop", "length")


Found = list[tuple[int, float]]  # row and score of each passage, best first


class Uncached(GeneratorError):
    """A context or continuation that no recorded run came to."""


@dataclass
class CandidateCache:
    """What generators said, by what they were asked.

    Attributes:
        identity: what it was made with; another value of any of these refuses it.
        states: of a context: marks (M,) float32 and the likeliest id. `written`: continuations. `scored`: given ones.
        questions: of the short form, one JSON object a question.
        schema, eos, exact: the vocabulary, its end token, and whether every mark came back.
        found: of each question, rows and scores of its `k` passages. `searches`: the same of further searches, by their text.
        tokenizer, positions: of the model that wrote; the tokenizer's folder until it is opened.
        continued: of a context, the continuation that was last written behind it; not kept on disk.
    """

    identity: Mapping[str, Any] = field(default_factory=dict)
    states: dict[bytes, tuple[NDArray[np.float32], int]] = field(default_factory=dict)
    written: dict[bytes, Marked] = field(default_factory=dict)
    scored: dict[bytes, NDArray[np.float32]] = field(default_factory=dict)
    questions: list[dict[str, Any]] = field(default_factory=list)
    schema: Schema | None = None
    eos: int = -1
    exact: bool = True
    found: list[Found] = field(default_factory=list)
    k: int = 0
    searches: dict[str, Found] = field(default_factory=dict)
    tokenizer: Any = field(default=None, repr=False)
    positions: int | None = None
    continued: dict[bytes, bytes] = field(default_factory=dict, repr=False)

    def save(self, folder: Path) -> None:
        """Write the artefact; one that is there stays until the new one is whole."""
        working = folder.with_name(folder.name + ".part")
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir(parents=True)
        np.savez(working / "rows.npz", allow_pickle=False, **self._arrays())
        with open(working / "questions.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self.questions)
        write_json(working / "found.json", {"k": self.k, "questions": self.found, "searches": self.searches})
        if (tokenizer := self.opened_tokenizer()) is not None:
            save_tokenizer(tokenizer, working / "tokenizer")
        counts = {"contexts": len(self.states), "continuations": len(self.written), "questions": len(self.questions)}
        assert self.schema is not None
        about = {
            "identity": dict(self.identity), "schema": self.schema.to_dict(), "eos": self.eos, "exact": self.exact,
            "positions": self.positions,
        }  # fmt: skip
        write_manifest(working, KIND, about | counts)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(working, folder)

    @classmethod
    def open(cls, folder: Path, identity: Mapping[str, Any] | None = None) -> CandidateCache:
        """The candidates of a folder.

        Args:
            identity: what they are wanted for.

        Raises:
            CheckpointError: none there, or made with another model, prompt, vocabulary, knowledge base or limit.
        """
        manifest = read_manifest(folder, KIND)
        own = manifest["identity"]
        wanted = json.loads(json.dumps(own if identity is None else dict(identity), default=str))
        for name in wanted:
            if own.get(name) != wanted[name]:
                raise CheckpointError(
                    f"{folder} was made with another {name}: {own.get(name)!r}, and now it is {wanted[name]!r}",
                    hint="candidates serve what wrote them; raglan evaluate --cache makes them anew",
                )
        with np.load(folder / "rows.npz", allow_pickle=False) as rows:
            cache = cls(own, *_read(dict(rows)))
        cache.schema, cache.eos, cache.exact = Schema.from_dict(manifest["schema"]), manifest["eos"], manifest["exact"]
        with open(folder / "questions.jsonl", encoding="utf-8") as file:
            cache.questions = [json.loads(line) for line in file]
        told = json.loads((folder / "found.json").read_text(encoding="utf-8"))
        cache.found, cache.k, cache.searches, cache.positions = (
            told["questions"], told["k"], told["searches"], manifest["positions"]
        )
        if (folder / "tokenizer").is_dir():
            cache.tokenizer = folder / "tokenizer"
        return cache

    def opened_tokenizer(self) -> Any:
        """The tokenizer of the model that wrote; opened when a prompt is made, which arrays never do."""
        if isinstance(self.tokenizer, Path):
            with quietly():
                self.tokenizer = AutoTokenizer.from_pretrained(str(self.tokenizer))
        return self.tokenizer

    def of(self, generator: MarkedGenerator) -> None:
        """Keep what a replay needs of the generator that writes."""
        self.schema, self.eos, self.exact = generator.schema, generator.eos, generator.exact_marks
        self.tokenizer, self.positions = getattr(generator, "tokenizer", None), getattr(generator, "positions", None)

    def row(self, query: str, every: Answer, none: Answer) -> dict[str, Any]:
        """A question's row: the keys of its candidates, so that a sweep needs neither prompt nor tokenizer."""
        assert every.trace is not None
        assert none.trace is not None
        prompt = none.trace["prompt"]
        candidates = []
        for told in [*(c for c in every.trace["candidates"] if c["passage"] is not None), *none.trace["candidates"]]:
            key = self.continued.get(_key((*prompt, *told["context"])))
            candidates.append({
                "passage": told["passage"], "rank": told["rank"], "text": told.get("text", ""),
                "key": key.hex() if key is not None else None,  # a passage that did not fit
            })  # fmt: skip
        return {"query": query, "state": _key(prompt).hex(), "candidates": candidates}

    def _arrays(self) -> dict[str, NDArray[Any]]:
        states, written, scored = list(self.states.values()), list(self.written.values()), list(self.scored.values())
        rows = [_kept(marked) for marked in written]
        return {
            "state_keys": _keys(self.states), "state_marks": _stack([marks for marks, _ in states]),
            "state_best": np.array([best for _, best in states], np.int64),
            "written_keys": _keys(self.written), "lengths": np.array([len(m.ids) for m in written], np.int64),
            "ids": _joined([np.array(m.ids, np.int64) for m in written], np.int64),
            "logprobs": _joined([m.logprobs for m in written], np.float32),
            "row_counts": np.array([len(row) for row in rows], np.int64), "row_places": _joined(rows, np.int64),
            "row_marks": _stack([m.mark_logprobs[at] for m, row in zip(written, rows, strict=True) for at in row]),
            "finish": np.array([FINISH.index(m.finish) for m in written], np.int8),
            "scored_keys": _keys(self.scored), "scored_lengths": np.array([len(s) for s in scored], np.int64),
            "scored": _joined(scored, np.float32),
        }  # fmt: skip


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
        keys = _write_keys(self.ids, stop_ids, max_new_tokens, first)
        schema = self.generator.schema
        kept = [_thinned(marked, schema) for marked in written]
        self.generator.cache.written.update(zip(keys, kept, strict=True))
        self.generator.cache.continued.update(zip(map(_key, self.ids), keys, strict=True))
        return kept

    def score(self, places: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[np.ndarray]:
        scores = self.inner.score(places, continuations)
        keys = [_key(self.ids[place], ids) for place, ids in zip(places, continuations, strict=True)]
        self.generator.cache.scored.update(zip(keys, scores, strict=True))
        return scores

    def _keep(self) -> None:
        rows = zip(self.ids, self.inner.mark_logprobs, self.inner.best, strict=True)
        self.generator.cache.states.update({_key(ids): (np.array(marks, np.float32), int(best)) for ids, marks, best in rows})


class _Replayed(Contexts):
    def __init__(self, generator: Replay, marks: tuple[int, ...], ids: list[tuple[int, ...]]):
        self.generator, self.marks, self._ids = generator, marks, ids

    @property
    def ids(self) -> list[tuple[int, ...]]:
        return self._ids

    @property
    def mark_logprobs(self) -> np.ndarray:
        return _stack([marks for marks, _ in self._states()])

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
        limits = _limits(max_new_tokens, len(self._ids))
        found = []
        for ids, limit, key in zip(self._ids, limits, _write_keys(self._ids, stop_ids, limits, first), strict=True):
            if key not in self.generator.cache.written:
                self.generator.live(ids, self.marks).write(stop_ids=stop_ids, max_new_tokens=limit, first=first)
            found.append(self.generator.cache.written[key])
        return found

    def score(self, places: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[np.ndarray]:
        found = []
        for place, ids in zip(places, continuations, strict=True):
            if (key := _key(self._ids[place], ids)) not in self.generator.cache.scored:
                self.generator.live(self._ids[place], self.marks).score([0], [ids])
            found.append(self.generator.cache.scored[key])
        return found

    def _states(self) -> list[tuple[NDArray[np.float32], int]]:
        states = self.generator.cache.states
        for ids in self._ids:
            if _key(ids) not in states:
                _ = self.generator.live(ids, self.marks).best
        return [states[_key(ids)] for ids in self._ids]


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
    can be decided later; the long form keeps the tree that it grew, to its last level.

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
        self_rag(keeps, asked, (wide or settings).model_copy(update={"stop": "never"}), retrieve=retrieve)
        return self_rag(Replay(cache, generator, fill=True), asked, settings, retrieve=retrieve)
    thorough = {"retrieve": "always", "prune": PruneSettings(), "all_irrelevant": "best", "target_rate": None,
                "require": RequireSettings()}  # fmt: skip
    every = self_rag(keeps, asked, settings.model_copy(update=thorough))
    none = self_rag(keeps, asked, settings.model_copy(update={**thorough, "retrieve": "never"}))
    cache.questions += [cache.row(*row) for row in zip(asked.queries, every, none, strict=True)]
    return self_rag(Replay(cache, generator, fill=True), asked, settings)


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


def _kept(marked: Marked) -> NDArray[np.int64]:
    """Positions of which any mark is there."""
    return np.flatnonzero(~np.isnan(marked.mark_logprobs).all(-1)) if len(marked.ids) else np.zeros(0, np.int64)


def _greedy(temperature: float) -> None:
    if temperature:
        raise RecipeError(f"decode.temperature is {temperature}, and draws are not kept", hint="decode.temperature: 0")


def _key(*parts: Iterable[int]) -> bytes:
    digest = blake2b(digest_size=16)
    for part in parts:
        ids = np.array(list(part), np.int64)
        digest.update(np.int64(len(ids)).tobytes() + ids.tobytes())
    return digest.digest()


def _limits(given: int | Sequence[int], count: int) -> list[int]:
    return [given] * count if isinstance(given, int) else list(given)


def _write_keys(
    contexts: Sequence[Sequence[int]], stop_ids: Collection[int], limits: int | Sequence[int], first: Collection[int] | None
) -> list[bytes]:
    how = (sorted(stop_ids), [] if first is None else [1, *sorted(first)])
    each = zip(contexts, _limits(limits, len(contexts)), strict=True)
    return [_key(ids, *how, [limit]) for ids, limit in each]


def _keys(table: Mapping[bytes, Any]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(table), np.uint8).reshape(len(table), 16)


def _stack(rows: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.stack(rows).astype(np.float32) if rows else np.zeros((0, 0), np.float32)


def _joined(rows: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate([np.asarray(row, dtype) for row in rows]) if rows else np.zeros(0, dtype)


def _read(rows: Any) -> tuple[dict[Any, Any], dict[Any, Any], dict[Any, Any]]:
    """States, continuations and scores from their arrays."""
    said = zip(rows["state_marks"], rows["state_best"].tolist(), strict=True)
    states = dict(zip(map(bytes, rows["state_keys"]), said, strict=True))
    ends, row_ends = rows["lengths"].cumsum(), rows["row_counts"].cumsum()
    ids, logprobs = np.split(rows["ids"], ends)[:-1], np.split(rows["logprobs"], ends)[:-1]
    places, marks = np.split(rows["row_places"], row_ends)[:-1], np.split(rows["row_marks"], row_ends)[:-1]
    width = max(rows["row_marks"].shape[-1], rows["state_marks"].shape[-1])
    written = {}
    for at, key in enumerate(map(bytes, rows["written_keys"])):
        whole = np.full((len(ids[at]), width), np.nan, np.float32)
        whole[places[at]] = marks[at]
        written[key] = Marked(tuple(ids[at].tolist()), logprobs[at], whole, FINISH[rows["finish"][at]])
    scores = np.split(rows["scored"], rows["scored_lengths"].cumsum())[:-1]
    scored = dict(zip(map(bytes, rows["scored_keys"]), scores, strict=True))
    return states, written, scored


def finished(folder: Path) -> bool:
    """Whether there are candidates."""
    return (folder / MANIFEST).is_file()
