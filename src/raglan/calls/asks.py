"""What is asked, by which name it is known, and what came of it.

key = SHA-256 of the canonical JSON of {host, model, messages, sampling, schema, draw}

The key is the call's content, so a journal can be shared by runs. `draw` keeps two equal prompts at a temperature above 0
apart; step, depth and ref are the caller's and not in the key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from pydantic import BaseModel

from raglan.errors import RecipeError

__all__ = ["Ask", "CallClass", "Outcome", "Usage", "call_key", "canonical"]

CallClass = Literal["ok", "truncated", "malformed", "refused", "transient", "permanent", "fatal"]
ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
OURS = ("model", "messages", "n", "stream", "stream_options", "response_format", "max_completion_tokens", "tools", "functions")


@dataclass(frozen=True)
class Ask:
    """One question for the model.

    Attributes:
        step: what it is for, as "answer": the ledger counts by it.
        messages: chat messages, {"role", "content"}.
        schema: what the reply must be; None takes the text as it is.
        sampling: fields of the request, as {"temperature": 1.0, "max_tokens": 300}.
        draw: another number is another call.
        ref: the caller's own id, handed back.
        depth: how far along the work it stands; deeper ones are sent first, so that an interruption leaves finished work.
    """

    step: str
    messages: tuple[Mapping[str, Any], ...]
    schema: type[BaseModel] | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    draw: int = 0
    ref: str = ""
    depth: int = 0

    def __post_init__(self) -> None:
        if not self.messages:
            raise RecipeError(f"the call {self.ref or self.step!r} has no message")
        if found := sorted(set(OURS) & set(self.sampling)):
            raise RecipeError(
                f"the sampling of step {self.step!r} says {', '.join(found)}",
                hint="that is the engine's to say; use max_tokens",
            )


@dataclass(frozen=True)
class Usage:
    """Tokens of a call, or of several together. `cached` are among `prompt`."""

    prompt: int = 0
    cached: int = 0
    output: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.prompt + other.prompt, self.cached + other.cached, self.output + other.output)


@dataclass(frozen=True)
class Outcome:
    """What came of an ask, its repair and its repetitions.

    Attributes:
        cls: "ok", or why there is no value. Only "ok" may become data.
        value: the parsed reply (`ask.schema`), the text (no schema), or None unless ok.
        raw: the last reply's text.
        error: what was wrong, in the server's or the parser's words.
        usage, cost_nano: of all requests that this ask has made now, in tokens and 10⁻⁹ dollars; nothing if reused.
        calls: how many these were.
        reused: the journal knew the reply.
    """

    ask: Ask
    cls: CallClass
    value: BaseModel | str | None
    raw: str = ""
    error: str = ""
    usage: Usage = Usage()
    cost_nano: int = 0
    calls: int = 0
    reused: bool = False


def call_key(ask: Ask, *, host: str, model: str, max_tokens: int) -> str:
    """64 hex digits that name a call by its content. `max_tokens` is the limit where the ask names none."""
    sampling = {"max_tokens": max_tokens, **ask.sampling}
    schema = None if ask.schema is None else _json_schema(ask.schema)
    content = {
        "host": host, "model": model, "messages": ask.messages, "sampling": sampling, "schema": schema, "draw": ask.draw,
    }  # fmt: skip
    return hashlib.sha256(canonical(content)).hexdigest()


@lru_cache(256)
def _json_schema(schema: type[BaseModel]) -> dict[str, Any]:
    return schema.model_json_schema()


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces.

    Raises:
        RecipeError: something that is no JSON, which would have no lasting name.
    """
    try:
        return ENCODER.encode(value).encode()
    except (TypeError, ValueError) as fault:
        raise RecipeError(f"a call must be plain JSON: {fault}") from None
