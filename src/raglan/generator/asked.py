"""Contexts of a model that answers requests, one a context: vLLM in this process, or a server.

A context is no more than its ids: what was computed for a prefix stays with the backend, in whose cache a branch finds it.
What stands behind a context is asked as one new token, and only when somebody reads it; then writing goes on behind that token
(two requests on one prefix). Where nobody reads it first, one request writes and tells both.

With q the backend's next-token distribution, position 0 of what is written *is* the state behind the context:

    mark_logprobs[i, m] = log q(mark_m | context_i) = written[i].mark_logprobs[0, m]

so the same question is never asked twice, and a restricted first token needs no backend that can restrict: it is chosen here
from the marks' log-probabilities, which stay raw.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raglan.artifact import fingerprint
from raglan.errors import GeneratorError
from raglan.generator.base import Contexts, Cost, MarkedGenerator, tokenizer_identity
from raglan.marked_prompt import MarkedPrompt, read_schema
from raglan.prompt import Prompt
from raglan.recipe import GeneratorSettings, PromptSettings
from raglan.records import Marked
from raglan.reflection import Schema

__all__ = ["AskedContexts", "AskedGenerator", "Request", "finish_of"]

SEEDS = 1 << 31


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of the backend for one context: continue `ids`, and tell log p of `marks` beside every generated id."""

    ids: tuple[int, ...]
    marks: tuple[int, ...]
    stop_ids: frozenset[int] = frozenset()
    max_new_tokens: int = 1
    temperature: float = 0.0
    seed: int | None = None


class AskedGenerator(MarkedGenerator):
    """A model behind requests, its tokenizer here.

    Attributes:
        tokenizer: the model's. `prompt`: renders questions for decodings that search again.
        rows: of the model's embeddings, where they are known; the reflection ids must be below.
    """

    def __init__(self, tokenizer: Any, settings: GeneratorSettings, prompt: PromptSettings, *, rows: int | None = None):
        if tokenizer.eos_token_id is None:
            raise GeneratorError(f"the tokenizer of {settings.model!r} names no end token", hint="set its eos_token")
        self.tokenizer, self.settings = tokenizer, settings
        self.eos = int(tokenizer.eos_token_id)
        self.prompt = Prompt(prompt, tokenizer, layout="joined", end=self.eos)
        self.cost = Cost()
        self._rows = len(tokenizer) if rows is None else rows
        self._schema: Schema | None = None
        self._marked_prompt: MarkedPrompt | None = None

    @property
    def schema(self) -> Schema:
        if self._schema is None:
            self._schema = read_schema(self.tokenizer, self._rows)
        return self._schema

    @property
    def marked_prompt(self) -> MarkedPrompt:
        if self._marked_prompt is None:
            self._marked_prompt = MarkedPrompt(self.schema, self.tokenizer, self.prompt.settings.self_rag, eos=self.eos)
        return self._marked_prompt

    @property
    def batch_tokens(self) -> int:
        """Tokens of questions that are asked together."""
        return self.settings.batch_tokens

    @property
    @abstractmethod
    def weights(self) -> Any:
        """Names the weights, as far as they can be known."""

    @property
    def fingerprint(self) -> str:
        return fingerprint([self.weights, self.settings.revision, tokenizer_identity(self.tokenizer), self.eos])

    def contexts(self, prompts: Sequence[Sequence[int]], *, marks: Sequence[int]) -> AskedContexts:
        if not all(prompts):
            raise GeneratorError("a prompt has no token", hint="give every prompt one id or more")
        return AskedContexts(self, [_Place(tuple(ids)) for ids in prompts], tuple(marks))

    @abstractmethod
    def ask(self, requests: Sequence[Request]) -> list[Marked]:
        """What each request is answered with, in order; `max_new_tokens` is 1 or more. Counts cost, but `generated`."""

    @abstractmethod
    def ask_scores(self, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[np.ndarray]:
        """log p of each row's second ids behind its first, (T,) float32."""


class _Place:
    """One context, and what is known of the token behind it: ids and marks as if that token alone had been written."""

    __slots__ = ("behind", "ids")

    def __init__(self, ids: tuple[int, ...]):
        self.ids, self.behind = ids, None

    ids: tuple[int, ...]
    behind: Marked | None


class AskedContexts(Contexts):
    """See the module."""

    def __init__(self, owner: AskedGenerator, places: Sequence[_Place], marks: tuple[int, ...]):
        self.owner, self.marks, self._places = owner, marks, list(places)

    @property
    def ids(self) -> list[tuple[int, ...]]:
        return [place.ids for place in self._places]

    @property
    def mark_logprobs(self) -> np.ndarray:
        return np.stack([behind.mark_logprobs[0] for behind in self._behind()])

    @property
    def best(self) -> np.ndarray:
        return np.array([behind.ids[0] for behind in self._behind()], dtype=np.int64)

    def branch(self, places: Sequence[int], suffixes: Sequence[Sequence[int]]) -> AskedContexts:
        pairs = zip(places, suffixes, strict=True)
        grown = [_Place((*self._places[i].ids, *ids)) if ids else self._places[i] for i, ids in pairs]
        return AskedContexts(self.owner, grown, self.marks)

    def only(self, places: Sequence[int]) -> AskedContexts:
        return AskedContexts(self.owner, [self._places[i] for i in places], self.marks)

    def write(
        self, *, stop_ids: Collection[int], max_new_tokens: int | Sequence[int], first: Collection[int] | None = None,
        temperature: float = 0.0, seed: int | None = None,
    ) -> list[Marked]:  # fmt: skip
        stops, count = frozenset(stop_ids), len(self._places)
        limits = [max_new_tokens] * count if isinstance(max_new_tokens, int) else list(max_new_tokens)
        if first is not None:
            begun: list[Marked | None] = list(self._forced(frozenset(first), temperature, seed))
        else:
            begun = [None if temperature else place.behind for place in self._places]
        written = [_empty(len(self.marks)) if not limit else begin for limit, begin in zip(limits, begun, strict=True)]
        going = [i for i, row in enumerate(written) if row is None or self._goes_on(row, stops, limits[i])]
        answers = self.owner.ask([self._request(i, written[i], stops, limits[i], temperature, seed) for i in going])
        for i, answer in zip(going, answers, strict=True):
            begin = written[i]
            if begin is None and not temperature:
                self._places[i].behind = _head(answer)
            written[i] = answer if begin is None else _joined(begin, answer)
        done = [self._finished(row, stops) for row in written if row is not None]
        self.owner.cost.generated += sum(len(row.ids) for row in done)
        return done

    def score(self, places: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[np.ndarray]:
        pairs = zip(places, continuations, strict=True)
        return self.owner.ask_scores([(self._places[i].ids, tuple(ids)) for i, ids in pairs])

    def _behind(self) -> list[Marked]:
        """The token behind each context, asked where nobody did yet, each place once."""
        unknown = list({id(place): place for place in self._places if place.behind is None}.values())
        answers = self.owner.ask([Request(place.ids, self.marks) for place in unknown])
        for place, answer in zip(unknown, answers, strict=True):
            place.behind = _head(answer)
        return [place.behind for place in self._places if place.behind is not None]

    def _request(
        self, i: int, begin: Marked | None, stops: frozenset[int], limit: int, temperature: float, seed: int | None
    ) -> Request:
        ids = self._places[i].ids + (begin.ids if begin is not None else ())
        left = limit - (len(begin.ids) if begin is not None else 0)
        own = None if seed is None else (seed * 1_000_003 + i) % SEEDS  # a draw of its own for every place
        return Request(ids, self.marks, stops, left, temperature, own if temperature else None)

    def _goes_on(self, row: Marked, stops: frozenset[int], limit: int) -> bool:
        return len(row.ids) < limit and row.ids[-1] != self.owner.eos and row.ids[-1] not in stops and row.finish != "eos"

    def _finished(self, row: Marked, stops: frozenset[int]) -> Marked:
        """The row with the reason that it ended for by these stop ids; a state's own knows of none."""
        return Marked(row.ids, row.logprobs, row.mark_logprobs, finish_of(row, stops, self.owner.eos))

    def _forced(self, allowed: frozenset[int], temperature: float, seed: int | None) -> list[Marked]:
        """The first token of each place, chosen here among those allowed by its raw log-probabilities."""
        rows = []
        for i, behind in enumerate(self._behind()):
            known = dict(zip(self.marks, behind.mark_logprobs[0].tolist(), strict=True))
            known[behind.ids[0]] = float(behind.logprobs[0])
            told = {token: known[token] for token in sorted(allowed) if known.get(token, np.nan) == known.get(token, np.nan)}
            token = _choice(told, temperature, seed, i)
            rows.append(Marked((token,), np.array([told[token]], np.float32), behind.mark_logprobs[:1], "length"))
        return rows


def finish_of(row: Marked, stops: Collection[int], eos: int) -> Any:
    """Why a row ended: `eos` or `stop` by its last id, else as the backend said, which knows further end tokens.

    A server says of an end token and of a stop id alike that the row has ended.
    """
    if not row.ids:
        return "length"
    if row.ids[-1] == eos:
        return "eos"
    if row.ids[-1] in stops:
        return "stop"
    return "eos" if row.finish == "eos" else "length"


def _choice(told: dict[int, float], temperature: float, seed: int | None, place: int) -> int:
    if not told:
        raise GeneratorError(
            "none of the ids that a first token may be has a log-probability in the reply",
            hint="decode.force_isrel: false, or a server that knows logprob_token_ids, as vLLM's does",
        )
    if not temperature:
        return max(told, key=lambda token: told[token])
    scaled = np.array(list(told.values()), dtype=np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    drawn = np.random.default_rng(None if seed is None else [seed, place]).choice(len(told), p=weights / weights.sum())
    return list(told)[int(drawn)]


def _empty(marks: int) -> Marked:
    return Marked((), np.zeros(0, np.float32), np.zeros((0, marks), np.float32), "length")


def _head(row: Marked) -> Marked:
    return Marked(row.ids[:1], row.logprobs[:1], row.mark_logprobs[:1], row.finish if len(row.ids) == 1 else "length")


def _joined(begin: Marked, rest: Marked) -> Marked:
    logprobs = np.concatenate([begin.logprobs, rest.logprobs])
    return Marked(begin.ids + rest.ids, logprobs, np.concatenate([begin.mark_logprobs, rest.mark_logprobs]), rest.finish)
