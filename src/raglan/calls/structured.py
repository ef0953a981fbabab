"""JSON out of a chat model: asked for as strictly as the endpoint can, read leniently, judged by pydantic, repaired once.

    strict  response_format json_schema, strict      json  JSON mode, the schema in words      text  the schema in words alone

What an endpoint supports, `probe` tells once; the journal remembers it. Replies are read as JSON, without a fence, or as the
first balanced object in the text; a bare value stands for the only field of a schema; full-width digits count as digits where
the reply does not fit otherwise. Nothing is ever evaluated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from raglan.calls.asks import Ask

__all__ = ["MODES", "Mode", "ask_in_mode", "longest_form", "parse", "probe", "repair", "strict_schema"]

Mode = Literal["strict", "json", "text"]
MODES: tuple[Mode, ...] = ("strict", "json", "text")
FENCE = re.compile(r"^\s*```[\w-]*\s*\n(.*?)\n?\s*```\s*$", re.DOTALL)
WIDE = str.maketrans("０１２３４５６７８９．－：，", "0123456789.-:,")
DECODER = json.JSONDecoder()


class _Probe(BaseModel):
    colour: Literal["red", "blue"]
    ready: bool


def probe(mode: Mode) -> Ask:
    """A small call that tells whether an endpoint honours a mode."""
    words = f"Choose a colour and say that you are ready. (As a trial of {mode} replies.)"
    return Ask("probe", ({"role": "user", "content": words},), _Probe, {"max_tokens": 200, "temperature": 0.0})


def ask_in_mode(ask: Ask, mode: Mode) -> tuple[list[Mapping[str, Any]], dict[str, Any]]:
    """Messages as they are sent, and the field of the request that asks for JSON."""
    if ask.schema is None:
        return list(ask.messages), {}
    words, strict = _said(ask.schema)
    if mode == "strict":
        form = {"name": re.sub(r"\W", "", ask.schema.__name__) or "reply", "strict": True, "schema": strict}
        return list(ask.messages), {"response_format": {"type": "json_schema", "json_schema": form}}
    return _told(ask.messages, words), {"response_format": {"type": "json_object"}} if mode == "json" else {}


def longest_form(schema: type[BaseModel]) -> str:
    """What a schema adds to a prompt at most, in whatever mode."""
    words, strict = _said(schema)
    return max(words + "\n\n", json.dumps(strict, ensure_ascii=False), key=lambda text: len(text.encode()))


def parse(text: str, schema: type[BaseModel]) -> tuple[BaseModel | None, str]:
    """The value that a reply holds, or None and what is wrong with it."""
    faults: list[str] = []
    for value in _values(text):
        for tried in _wrapped(value, schema):
            try:
                return schema.model_validate(tried), ""
            except ValidationError as fault:
                faults.append(_listed(fault))
    return None, faults[0] if faults else "there is no JSON object in it"


def repair(ask: Ask, raw: str, errors: str) -> Ask:
    """The one call that is asked when a reply does not fit: the reply, what is wrong, temperature 0."""
    words = f"That reply cannot be used: {errors}\nReply again with the corrected JSON object and nothing else."
    said = ({"role": "assistant", "content": raw}, {"role": "user", "content": words})
    sampling = {**ask.sampling, "temperature": 0.0}
    return Ask(ask.step, (*ask.messages, *said), ask.schema, sampling, ask.draw, ask.ref, ask.depth)


def strict_schema(schema: type[BaseModel]) -> dict[str, Any]:
    """A model's JSON schema as strict mode wants it: every property required, no others, no defaults."""
    strict: dict[str, Any] = _strict(schema.model_json_schema())
    return strict


@lru_cache(256)
def _said(schema: type[BaseModel]) -> tuple[str, dict[str, Any]]:
    """A schema in words, and as strict mode wants it."""
    plain = json.dumps(schema.model_json_schema(), ensure_ascii=False)
    words = f"Reply with one JSON object and nothing else. It must fit this JSON schema: {plain}"
    return words, strict_schema(schema)


def _strict(node: Any) -> Any:
    if isinstance(node, list):
        return [_strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return {"$ref": node["$ref"]}  # strict mode allows nothing beside it
    found = {name: _strict(value) for name, value in node.items() if name != "default"}
    if isinstance(node.get("properties"), dict):
        found["properties"] = {name: _strict(value) for name, value in node["properties"].items()}
        found |= {"additionalProperties": False, "required": list(node["properties"])}
    return found


def _told(messages: tuple[Mapping[str, Any], ...], words: str) -> list[Mapping[str, Any]]:
    """The words behind the system message, which stays in front and equal from call to call."""
    first = messages[0]
    if first["role"] == "system" and isinstance(first["content"], str):
        return [{**first, "content": f"{first['content']}\n\n{words}"}, *messages[1:]]
    return [{"role": "system", "content": words}, *messages]


def _values(text: str) -> Iterator[Any]:
    """JSON values that a text may mean, likeliest first."""
    fenced = FENCE.match(text)
    inner = fenced.group(1) if fenced else text
    for spelling in dict.fromkeys((inner, inner.translate(WIDE))):
        try:
            yield json.loads(spelling)
            continue
        except (ValueError, RecursionError):
            pass
        found = _first_object(spelling)
        if found is not None:
            yield found


def _first_object(text: str) -> dict[str, Any] | None:
    start = text.find("{")
    while start >= 0:
        try:
            value = DECODER.raw_decode(text, start)[0]
        except (ValueError, RecursionError):
            start = text.find("{", start + 1)
            continue
        return value if isinstance(value, dict) else None
    return None


def _wrapped(value: Any, schema: type[BaseModel]) -> list[Any]:
    if isinstance(value, dict) or len(schema.model_fields) != 1:
        return [value]
    return [{next(iter(schema.model_fields)): value}]


def _listed(fault: ValidationError) -> str:
    errors = fault.errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(f"{'.'.join(map(str, error['loc'])) or 'reply'}: {error['msg']}" for error in errors[:8])
