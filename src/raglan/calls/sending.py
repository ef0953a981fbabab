"""One ask's way: leave, intent, request, class, outcome; again while it fails for passing reasons, and one repair."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

from pydantic import BaseModel

from raglan.calls.asks import Ask, Outcome, Usage
from raglan.calls.classify import Reply, Wire, classify
from raglan.calls.endpoint import Endpoint
from raglan.calls.journal import Intent
from raglan.calls.limits import Gate, backoff, retry_after
from raglan.calls.money import dollars
from raglan.calls.structured import MODES, Mode, ask_in_mode, probe, repair
from raglan.calls.terms import Terms, value_of
from raglan.errors import CallsStopped

__all__ = ["Sender"]

log = logging.getLogger(__name__)


@dataclass
class _Spent:
    """What one ask has used up so far."""

    usage: Usage = field(default_factory=Usage)
    nano: int = 0
    calls: int = 0
    seconds: float = 0.0  # of requests and back-off; not of pauses, nor of waiting for leave

    def add(self, usage: Usage, nano: int, seconds: float) -> None:
        self.usage, self.nano, self.calls = self.usage + usage, self.nano + nano, self.calls + 1
        self.seconds += seconds


class Sender:
    """Sends what a run asks, in the run's loop.

    Args:
        wire: carries requests. halt: is set where nobody waits any longer.
        go_on: raises CallsStopped where the run has stopped.
    """

    def __init__(self, terms: Terms, gate: Gate, wire: Endpoint, *, halt: asyncio.Event, go_on: Callable[[], None]):
        self.terms, self.settings, self.journal, self.gate = terms, terms.settings, terms.journal, gate
        self._wire, self._halt, self._go_on = wire, halt, go_on
        self._probing = asyncio.Lock()
        self._told = False  # of usage that is none, once a run

    async def answer(self, ask: Ask, key: str) -> Outcome:
        """An ask's outcome, after one repetition or one repair."""
        spent = _Spent()
        mode = "text" if ask.schema is None else await self._mode(spent)
        half = self._half(key)
        reply, value = (half, None) if half else await self._tried(ask, key, mode, spent)
        again: Ask | None = None
        if reply.cls == "truncated" and (self.settings.larger_limit or 0) > self.terms.limit(ask):
            again = replace(ask, sampling={**ask.sampling, "max_tokens": self.settings.larger_limit})
        elif reply.cls == "malformed":
            again = repair(ask, reply.text, reply.error)
        if again is not None:
            self._go_on()
            reply, value = await self._tried(again, self.terms.key(again), mode, spent, instead_of=key)
        return Outcome(ask, reply.cls, value, reply.text, reply.error, spent.usage, spent.nano, spent.calls)

    def _half(self, key: str) -> Reply | None:
        """A reply that an earlier run has paid and could not mend any more."""
        line = self.journal.half(key)
        if line is None or (line["class"] == "truncated" and self.settings.larger_limit is None):
            return None
        return Reply(line["class"], line.get("body", ""), line["error"], line["finish"])

    async def _mode(self, spent: _Spent) -> Mode:
        """How this endpoint takes schemas, found out once."""
        if self.settings.structured != "auto":
            return self.settings.structured
        name = (self.terms.host, self.settings.model)
        async with self._probing:
            if name not in self.journal.modes:
                self.journal.probed(*name, await self._probed(spent))
        return cast(Mode, self.journal.modes[name])

    async def _probed(self, spent: _Spent) -> Mode:
        for mode in MODES[:-1]:
            self._go_on()
            trial = probe(mode)
            if self.terms.known(trial) is not None:
                return mode
            reply, _ = await self._tried(trial, self.terms.key(trial), mode, spent)
            if reply.cls == "ok":
                return mode
            if reply.cls == "transient":
                raise CallsStopped(
                    f"{self.terms.host} does not answer: {reply.error}", reason="breaker",
                    hint="try later; if it answers anything but schemas, say how it takes them: structured",
                )  # fmt: skip
        return "text"

    async def _tried(
        self, ask: Ask, key: str, mode: Mode, spent: _Spent, *, instead_of: str | None = None
    ) -> tuple[Reply, BaseModel | str | None]:
        """One call, tried again while it fails for passing reasons."""
        if instead_of is not None and (known := self.terms.known_as(ask, key)) is not None:
            return Reply("ok", known.raw), known.value
        form, began = ask_in_mode(ask, mode), spent.seconds
        for attempt in itertools.count(1):
            reply, value = await self._once(ask, key, form, spent, instead_of)
            if reply.cls != "transient" or attempt >= self.settings.attempts:
                return reply, value
            wait = backoff(attempt)
            spent.seconds += wait
            if spent.seconds - began > self.settings.max_wait:
                return reply, value
            await self.terms.clock.wait(self._halt, wait)
            self._go_on()
        raise AssertionError  # itertools.count does not end

    async def _once(
        self, ask: Ask, key: str, form: tuple[list[Any], dict[str, Any]], spent: _Spent, instead_of: str | None
    ) -> tuple[Reply, BaseModel | str | None]:
        """One request: leave, intent, send, outcome."""
        tokens, reserve = self.terms.reserve(ask)
        is_probe = await self.gate.enter(tokens, lambda: self._affordable(ask, reserve))
        used = tokens
        try:
            tries, settled = self.journal.tries(key)
            intent = Intent(key, tries + 1, ask.step, self.settings.model, f"{key[:32]}-{settled}", reserve)
            self.journal.intend(intent)
            sent = self.terms.clock.now()
            wire = await self._wire.send(self._body(ask, form), intent.idem)
            took = self.terms.clock.now() - sent
            reply, value = _judged(classify(wire), ask)
            cost = self._cost(reply, reserve)
            reply = self._within(reply, cost, reserve)
            spent.add(reply.usage or Usage(), cost, took)
            self.journal.settle(intent, _line(reply, cost, took, instead_of))
            used = tokens if reply.usage is None else reply.usage.prompt + reply.usage.output
            self._learn(wire, reply, sent, probe=is_probe)
        finally:
            self.gate.leave(unused=tokens - used)
        if reply.cls == "fatal":
            raise CallsStopped(f"{self.terms.host}: {reply.error}", reason="fatal", hint=self._fatal_hint(wire))
        return reply, value

    def _affordable(self, ask: Ask, reserve: int) -> bool:
        """Whether a request may be reserved now. Raises if it never may."""
        self._go_on()
        if self.gate.server.breaker.over:
            raise CallsStopped(
                f"{self.terms.host} keeps failing", reason="breaker", hint="run the same command again when it is well"
            )
        ledger, cap = self.journal.ledger, self.terms.cap
        if ledger.fits(reserve, cap):
            return True
        if ledger.in_flight:
            return False
        assert cap is not None
        raise CallsStopped(
            f"spent {dollars(ledger.spent)} of {dollars(cap)}; a call of step {ask.step!r} may cost {dollars(reserve)}",
            reason="cap", hint="a larger money.cap_usd goes on from here",
        )  # fmt: skip

    def _body(self, ask: Ask, form: tuple[list[Any], dict[str, Any]]) -> dict[str, Any]:
        messages, response = form
        sampling = {name: value for name, value in ask.sampling.items() if name != "max_tokens"}
        limit: dict[str, Any] = {self.settings.limit_name: self.terms.limit(ask)}
        return {"model": self.settings.model, "messages": messages, **sampling, **limit, **response}

    def _cost(self, reply: Reply, reserve: int) -> int:
        if reply.usage is not None:
            return self.terms.price.cost(reply.usage)
        if reply.misreported and not self._told:
            self._told = True
            log.warning("%s reports %s; such replies are charged at their reserve", self.terms.host, reply.misreported)
        return reserve if reply.billed else 0

    def _within(self, reply: Reply, cost: int, reserve: int) -> Reply:
        """A reply that cost more than was reserved means that the bound is wrong, and with it the cap."""
        if cost <= reserve:
            return reply
        told = f"a reply cost {dollars(cost)}, more than its reserve of {dollars(reserve)} ({reply.usage})"
        return replace(reply, cls="fatal", error=told)

    def _learn(self, wire: Wire, reply: Reply, sent: float, *, probe: bool) -> None:
        """Tell the gate how it went."""
        if wire.status == 429:
            pause = retry_after(wire.headers.get("retry-after"), wire.headers.get("date"))
            self.gate.limited(sent, pause, probe=probe)
        elif reply.cls == "transient":
            if "retry-after" in wire.headers:
                self.gate.pause(retry_after(wire.headers["retry-after"], wire.headers.get("date")))
            self.gate.bad(probe=probe)
        else:
            self.gate.good(probe=probe)

    def _fatal_hint(self, wire: Wire) -> str:
        named = self.settings.api_key_env
        if wire.status in (401, 403):
            return f"check the key in {named}" if named else "api_key_env names the variable that holds the key"
        if wire.status == 404:
            return "base_url ends in /v1, and model is the name that the server knows"
        if wire.status in (402, 429):
            return "the account's quota is used up; what came is kept"
        return "the price, the tokenizer or the limit's name does not fit this server; what came is kept"


def _judged(reply: Reply, ask: Ask) -> tuple[Reply, BaseModel | str | None]:
    """A whole reply's value; malformed where there is none."""
    if reply.cls != "ok":
        return reply, None
    value, errors = value_of(ask, reply.text)
    return (replace(reply, cls="malformed", error=errors), None) if errors else (reply, value)


def _line(reply: Reply, cost: int, took: float, instead_of: str | None) -> dict[str, Any]:
    usage = reply.usage or Usage()
    line: dict[str, Any] = {
        "class": reply.cls, "finish": reply.finish, "usage": [usage.prompt, usage.cached, usage.output], "cost": cost,
        "settled": reply.settled, "took": round(took, 3),
    }  # fmt: skip
    line |= {"body": reply.text} if reply.text else {}
    line |= {"error": reply.error} if reply.error else {}
    line |= {"misreported": reply.misreported} if reply.misreported else {}
    return line | ({"for": instead_of} if instead_of else {})
