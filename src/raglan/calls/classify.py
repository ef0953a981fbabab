"""What came back, in seven classes, and what it costs.

    ok         2xx, stop, not empty                     use it
    truncated  200, length                              paid; asked once more with a larger limit if the recipe allows; no label
    malformed  200, not what the schema says            one repair, then rejected
    refused    content filter, as 200 or 400            rejected
    transient  408 409 429 5xx, reset, timeout, short body, empty or HTML 200     tried again
    permanent  other 4xx, a finish that nobody knows    rejected, with the server's words
    fatal      401 403, 404, quota gone, usage above the reserve                  nothing more is sent

Costs are those of the reported usage. A 200 without usage, a timeout and a reset cost the reserve: nobody knows the bill. Usage
that is no count (negative, a fraction, true) is none, and is told. A refused connection and an error status cost nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from raglan.calls.asks import CallClass, Usage

__all__ = ["Reply", "Wire", "classify", "usage_of"]

QUOTA = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
FILTER = ("content_filter", "content_policy_violation", "ResponsibleAIPolicyViolation")
PASSING = (408, 409, 425, 429)
WORDS = 500


@dataclass(frozen=True)
class Wire:
    """What the wire brought: a status with a body, or a fault (`lost`: the request may have arrived all the same)."""

    status: int = 0
    body: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    fault: str = ""
    lost: bool = False


@dataclass(frozen=True)
class Reply:
    """A classified answer. `usage` None: not reported, or `misreported`, which says how. `settled`: the server has said what
    became of the request."""

    cls: CallClass
    text: str = ""
    error: str = ""
    finish: str = ""
    usage: Usage | None = None
    billed: bool = False
    settled: bool = True
    misreported: str = ""


def classify(wire: Wire) -> Reply:
    """The class of an answer, before its text is read."""
    if wire.fault:
        return Reply("transient", error=_sound(wire.fault), billed=wire.lost, settled=False)
    if not 200 <= wire.status < 300:
        return _refusal(wire)
    return _completion(wire)


def _completion(wire: Wire) -> Reply:
    try:
        body = json.loads(wire.body)
        choice = body["choices"][0]
        message, finish = choice["message"], _sound(str(choice.get("finish_reason") or ""))
        text = message.get("content") or ""
        text = _sound(text) if isinstance(text, str) else ""
        usage, strange = usage_of(body.get("usage"))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return Reply("transient", error=f"{wire.status} without a completion: {wire.body[:WORDS]!r}", billed=True)
    reply = Reply("ok", text, "", finish, usage, billed=True, misreported=strange)
    if finish == "content_filter" or message.get("refusal"):
        return _as(reply, "refused", _sound(str(message.get("refusal") or "content filter")))
    if finish == "length":
        return _as(reply, "truncated", "the reply was cut off at its limit")
    if finish != "stop":
        return _as(reply, "permanent", f"the reply ended with finish_reason {finish!r}")
    if not text.strip():
        return replace(reply, cls="transient", text="", error=f"{wire.status} with an empty reply")
    return reply


def _refusal(wire: Wire) -> Reply:
    code, words = _said(wire)
    told = f"{wire.status}: {words}"
    if wire.status in (401, 403, 404) or (wire.status == 429 and code in QUOTA) or wire.status == 402:
        return Reply("fatal", error=told)
    if wire.status in PASSING or wire.status >= 500:
        return Reply("transient", error=told)
    if code in FILTER:
        return Reply("refused", error=told)
    return Reply("permanent", error=told)


def _said(wire: Wire) -> tuple[str, str]:
    """Code and words of an error body, in OpenAI's form or any."""
    try:
        error = json.loads(wire.body)["error"]
        inner = error.get("innererror") or {}
        codes = [error.get("code"), error.get("type"), inner.get("code")]
        known = [str(code) for code in codes if str(code) in (*QUOTA, *FILTER)]
        return (known or [str(codes[0])])[0], _sound(str(error.get("message") or wire.body)[:WORDS])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "", wire.body[:WORDS]


def usage_of(said: Any) -> tuple[Usage | None, str]:
    """A reply's tokens as its `usage` tells them, None where it does not or not all of them; and what is strange about it."""
    if said is None:
        return None, ""
    details = (said.get("prompt_tokens_details") or {}) if isinstance(said, dict) else None
    if not isinstance(said, dict) or not isinstance(details, dict):
        return None, _strange(said)
    told = [said.get(name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")] + [details.get("cached_tokens")]
    if any(count is not None and (type(count) is not int or count < 0) for count in told):
        return None, _strange(said)
    prompt, output, total, cached = told
    if prompt is None or (output is None and total is None):
        return None, ""  # half a bill would count the reply as free
    return Usage(prompt, min(cached or 0, prompt), max(output or 0, (total or 0) - prompt)), ""


def _strange(said: Any) -> str:
    return f"usage that is no count of tokens: {_sound(repr(said)[:WORDS])}"


def _sound(text: str) -> str:
    """Text that can be written down: half a surrogate pair, as a reply that was cut within an emoji has, becomes U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _as(reply: Reply, cls: CallClass, error: str) -> Reply:
    return replace(reply, cls=cls, error=error)
