"""A server of OpenAI's completions protocol as a Self-RAG backend: exact where it can name ids, else its top k, and flagged.

What the server can do is found out by requests of one token, before anything else is asked:

    ids      prompts as ids. Where it takes text only, no id can protect a prompt: a passage that spells "[Relevant]" is shown
             with look-alike brackets, ［Relevant］, and `neutralised` counts it.
    exact    `logprob_token_ids` (vLLM's): asked for the likeliest and for the M marks, it names M or it does not; older servers
             leave the field out silently. The names must spell the marks, which another tokenizer's would not.
    top k    else the largest k that it allows. Marks that it leaves out are NaN: `missing` and `partial` say what that means.

Log-probabilities of −9999 stand for −∞ in the protocol. A server that cannot be told ids to stop at is cut here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from raglan.errors import GeneratorError, require
from raglan.generator.asked import AskedGenerator, Request
from raglan.generator.endpoint import ASKS, HINT
from raglan.generator.server import Server, local_tokenizer
from raglan.recipe import GeneratorSettings, PromptSettings
from raglan.records import Marked

__all__ = ["MarkedEndpoint"]

log = logging.getLogger(__name__)
PROBE = "The tower was built in"
TOPS = (100, 50, 20, 10, 5, 1)
MINUS_INFINITY = -9999.0
ALIKE = str.maketrans("[]<>|", "［］＜＞｜")
NAMED = "token_id:"
OURS = {  # what makes ids come back as ids, and the distribution raw
    "skip_special_tokens": False, "spaces_between_special_tokens": False, "add_special_tokens": False, "return_token_ids": True,
    "repetition_penalty": 1.0,
}  # fmt: skip
MARKS_HINT = (
    "Self-RAG reads log-probabilities of what is written: `vllm serve MODEL` gives them, most hosted services do not; "
    "generator.kind: graded asks any chat model yes or no instead"
)


@dataclass(frozen=True, slots=True)
class _Way:
    """What a server can do: prompts as ids, fields beyond OpenAI's own, the marks by id, and else how many of the likeliest."""

    ids: bool
    extended: bool
    exact: bool
    top: int


@dataclass(frozen=True, slots=True)
class _Position:
    """One generated token: its id (None if its piece is no one token), its log p, and the log p of others that were told."""

    token: int | None
    piece: str
    logprob: float
    told: Mapping[int, float]


class MarkedEndpoint(AskedGenerator):
    """A causal model behind a server, its tokenizer here.

    Raises:
        CheckpointError: a tokenizer that cannot be loaded.
        GeneratorError: `api_key_env` names a variable that is not set; a tokenizer without an end token.
    """

    def __init__(self, settings: GeneratorSettings, prompt: PromptSettings):
        tokenizer = local_tokenizer(settings.tokenizer or settings.model, field="generator")
        super().__init__(tokenizer, settings, prompt)
        self.server = Server(settings, field="generator", purpose="for generator.kind endpoint")
        self._way: _Way | None = None

    @property
    def exact_marks(self) -> bool:
        """As every marked generator's. The first reading asks the server."""
        if self._way is None:
            self.server.together(self._one, [], first=self._find_way)
        assert self._way is not None
        return self._way.exact

    @property
    def weights(self) -> Any:
        return [self.settings.endpoint, self.settings.model]

    def ask(self, requests: Sequence[Request]) -> list[Marked]:
        """As every asked generator's.

        Raises:
            GeneratorError: a server that cannot be reached, refuses key, model or prompt, or tells no log-probabilities.
        """
        return self.server.together(self._one, requests, first=self._find_way) if requests else []

    def ask_scores(self, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[np.ndarray]:
        return self.server.together(self._score, rows, first=self._find_way)

    async def _one(self, client: Any, request: Request) -> Marked:
        assert self._way is not None
        answer = await self._asked(client, request, self._way)
        choice = answer.choices[0]
        positions = _cut(self._positions(choice), request.stop_ids | {self.eos})
        self._count(answer, len(request.ids), len(positions), sum(len({*p.told, p.token}) for p in positions))
        ids = [self._known(position) for position in positions]
        marks = np.full((len(ids), len(request.marks)), np.nan, np.float32)
        for row, position in zip(marks, positions, strict=True):
            told = dict(position.told)
            if position.token is not None:
                told[position.token] = position.logprob
            row[:] = [told.get(mark, np.nan) for mark in request.marks]
        logprobs = np.array([position.logprob for position in positions], np.float32)
        return Marked(tuple(ids), logprobs, marks, "length" if choice.finish_reason == "length" else "eos")

    async def _score(self, client: Any, row: tuple[tuple[int, ...], tuple[int, ...]]) -> np.ndarray:
        """By the scorer's ways of reading prompt log-probabilities, the first that answers."""
        openai = require("openai", "for generator.kind endpoint")
        before, wanted = row
        ids = [*before, *wanted]
        if self._way is not None and self._way.ids:
            for read, fields in ASKS.items():
                try:
                    asked = {"prompt": ids, "max_tokens": 1, "temperature": 0.0, **fields}
                    answer = await client.completions.create(model=self.settings.model, **asked)
                except (openai.BadRequestError, openai.UnprocessableEntityError):
                    continue
                found = read(answer.choices[0], ids, len(before))
                if found is not None:
                    self._count(answer, len(ids), 1, len(found))
                    return np.array([logprob for logprob, _ in found], np.float32)
        raise GeneratorError(f"{self.server.name} scores no given answers", hint=HINT)

    async def _find_way(self, client: Any) -> None:
        """Find out what the server can do. Raises GeneratorError where it tells no log-probabilities."""
        if self._way is not None:
            return
        takes_ids = await self._takes(client, _Way(True, False, False, 1))
        if not takes_ids and not await self._takes(client, _Way(False, False, False, 1)):
            raise GeneratorError(f"{self.server.name} completes neither ids nor text with log-probabilities", hint=MARKS_HINT)
        extended = await self._takes(client, _Way(takes_ids, True, False, 1)) is not None
        if extended and await self._names_marks(client, _Way(takes_ids, True, True, 1)):
            self._way = _Way(takes_ids, True, True, 1)
        else:
            self._way = await self._largest(client, _Way(takes_ids, extended, False, 0))
        if not takes_ids:
            log.warning(
                "%s takes prompts as text only: reflection tokens that a text spells are shown with look-alike brackets",
                self.server.name,
            )

    async def _takes(self, client: Any, way: _Way) -> Any:
        """The answer to a request of one token asked this way; None if it is refused."""
        openai = require("openai", "for generator.kind endpoint")
        try:
            return await self._asked(client, Request(self._probe(), self._marks()), way)
        except (openai.BadRequestError, openai.UnprocessableEntityError):
            return None

    async def _names_marks(self, client: Any, way: _Way) -> bool:
        """Whether log p of each mark comes back, though they are not among the likeliest.

        Raises:
            GeneratorError: as many come back, and they are spelt otherwise than here.
        """
        answer = await self._takes(client, way)
        found = self._positions(answer.choices[0]) if answer is not None else []
        if not found:
            return False
        marks, told = set(self._marks()), found[0].told
        if marks <= set(told):
            return True
        pieces = _pieces(answer.choices[0])
        if len(pieces) >= len(marks):  # one of the likeliest was asked for: it did read the list
            raise GeneratorError(
                f"{self.server.name} reads the ids of {self.schema.spelling(min(marks))!r} and others as {sorted(pieces)}",
                hint="generator.tokenizer must be the served model's own, a folder or hub name",
            )
        return False

    async def _largest(self, client: Any, way: _Way) -> _Way:
        """The way with the largest top k that is allowed, warned of once."""
        for top in TOPS:
            asked = _Way(way.ids, way.extended, False, top)
            answer = await self._takes(client, asked)
            if answer is not None and _tells(answer.choices[0]):
                log.warning(
                    "%s tells the %d likeliest tokens and not those it is asked for: reflection scores are partial where "
                    "others are missing; vLLM's server with logprob_token_ids tells all",
                    self.server.name,
                    max(1, len(_pieces(answer.choices[0]))),
                )
                return asked
        raise GeneratorError(f"{self.server.name} tells no log-probabilities of what it writes", hint=MARKS_HINT)

    async def _asked(self, client: Any, request: Request, way: _Way) -> Any:
        extra: dict[str, Any] = {}
        if way.extended:
            named = not (way.exact and self._way is None)  # the probe for the marks reads their spelling
            extra = {**OURS, "return_tokens_as_token_ids": named, "stop_token_ids": sorted({*request.stop_ids, self.eos})}
            extra |= {"add_special_tokens": True} if not way.ids else {}
            extra |= {"top_k": -1} if request.temperature else {}
            extra |= {"logprob_token_ids": list(request.marks)} if way.exact else {}
        drawn = {"seed": request.seed} if request.seed is not None else {}
        return await client.completions.create(
            model=self.settings.model, prompt=list(request.ids) if way.ids else self._spelt(request.ids)[0],
            max_tokens=request.max_new_tokens, temperature=request.temperature, top_p=1.0, logprobs=way.top, extra_body=extra,
            **drawn,
        )  # fmt: skip

    def neutralised(self, ids: Sequence[int]) -> int:
        return 0 if self._way is None or self._way.ids else self._spelt(ids)[1]

    def _spelt(self, ids: Sequence[int]) -> tuple[str, int]:
        """A prompt as text for a server that takes no ids, and how many control tokens that a text spells were disarmed in it.

        Its own control tokens are spelt as they are.
        """
        ids = ids[1:] if ids[0] == self.tokenizer.bos_token_id else ids  # the server puts its own there
        controls, parts, count = self.schema.controls, list[str](), 0
        for control, run in groupby(ids, key=lambda token: token if token in controls else None):
            if control is None:
                text = str(self.tokenizer.decode(list(run), clean_up_tokenization_spaces=False))
                text, found = self._disarmed(text)
                parts.append(text)
                count += found
            else:
                parts += [self.schema.spelling(control) for _ in run]
        return "".join(parts), count

    def _disarmed(self, text: str) -> tuple[str, int]:
        spellings, count = {*map(self.schema.spelling, self.schema.controls), *self.tokenizer.all_special_tokens}, 0
        for spelling in sorted(spellings, key=len, reverse=True):
            count += text.count(spelling)
            text = text.replace(spelling, spelling.translate(ALIKE))
        return text, count

    def _positions(self, choice: Any) -> list[_Position]:
        """What a reply tells of each generated token. Raises GeneratorError where it tells nothing."""
        logprobs = choice.logprobs
        if not _tells(choice):
            raise GeneratorError(f"{self.server.name} tells no log-probabilities of what it writes", hint=MARKS_HINT)
        if content := _content(logprobs):
            return [self._of_content(entry) for entry in content]
        ids = (choice.model_extra or {}).get("token_ids") or [None] * len(logprobs.tokens)
        tops = logprobs.top_logprobs or [None] * len(logprobs.tokens)
        found = []
        for own, piece, logprob, top in zip(ids, logprobs.tokens, logprobs.token_logprobs, tops, strict=False):
            named = {self._id(name): _infinite(value) for name, value in (top or {}).items()}
            told = {token: value for token, value in named.items() if token is not None}
            found.append(_Position(self._id(piece) if own is None else int(own), piece, _infinite(logprob), told))
        return found

    def _of_content(self, entry: Mapping[str, Any]) -> _Position:
        named = {self._of_entry(other): _infinite(other["logprob"]) for other in entry.get("top_logprobs") or ()}
        told = {token: value for token, value in named.items() if token is not None}
        return _Position(self._of_entry(entry), str(entry.get("token")), _infinite(entry["logprob"]), told)

    def _of_entry(self, entry: Mapping[str, Any]) -> int | None:
        return int(entry["id"]) if entry.get("id") is not None else self._id(str(entry.get("token")))

    def _id(self, piece: str) -> int | None:
        """The id that a piece of text stands for; None if it is not one token."""
        if piece.startswith(NAMED):
            return int(piece.removeprefix(NAMED))
        for spelling in (piece, piece.replace(" ", "▁"), piece.replace(" ", "Ġ").replace("\n", "Ċ"), piece.strip()):
            token = self.tokenizer.convert_tokens_to_ids(spelling)
            if token is not None and token != self.tokenizer.unk_token_id:
                return int(token)
        ids = self.tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        return int(ids[0]) if len(ids) == 1 else None

    def _known(self, position: _Position) -> int:
        if position.token is None:
            raise GeneratorError(
                f"{self.server.name} wrote {position.piece!r}, which is not one token of {self.settings.tokenizer!r}",
                hint="generator.tokenizer must be the served model's own; servers that return token ids (vLLM's) need no guess",
            )
        return position.token

    def _count(self, answer: Any, prompt: int, written: int, logprobs: int) -> None:
        details = getattr(answer.usage, "prompt_tokens_details", None)
        reused = int(getattr(details, "cached_tokens", None) or 0)
        self.server.count(answer)
        self.cost.calls += 1
        self.cost.reused += reused
        self.cost.positions += prompt - reused + max(0, written - 1)
        self.cost.logprobs += logprobs

    def _probe(self) -> tuple[int, ...]:
        return tuple(self.marked_prompt.question(PROBE))

    def _marks(self) -> tuple[int, ...]:
        return self.schema.marks


def _cut(positions: list[_Position], ends: frozenset[int] | set[int]) -> list[_Position]:
    """Up to and with the first token that ends a row, which a server that knows no stop ids has written past."""
    last = next((place for place, position in enumerate(positions) if position.token in ends), len(positions))
    return positions[: last + 1]


def _content(logprobs: Any) -> list[dict[str, Any]]:
    """llama.cpp's server tells log-probabilities as for chats."""
    return (logprobs.model_extra or {}).get("content") or []


def _tells(choice: Any) -> bool:
    """Whether a reply has log-probabilities; one that ended at once has none to tell."""
    logprobs = choice.logprobs
    return logprobs is not None and bool(_content(logprobs) or logprobs.token_logprobs or logprobs.tokens == [])


def _pieces(choice: Any) -> list[str]:
    """What the first position's log-probabilities are of, as the server calls it."""
    if content := _content(choice.logprobs):
        return [str(entry.get("token")) for entry in content[0].get("top_logprobs") or ()]
    return list((choice.logprobs.top_logprobs or [None])[0] or {})


def _infinite(value: Any) -> float:
    """−9999 is the protocol's −∞."""
    return math.nan if value is None else -math.inf if value <= MINUS_INFINITY else float(value)
