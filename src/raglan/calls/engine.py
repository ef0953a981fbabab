"""Asks in, outcomes out: every request reserved, journalled, sent, classified, journalled again, and only then used.

    ask → journal knows it? → gate (stop, money, concurrency, pause, breaker, buckets) → intent → request → outcome → use
                                                     ↑ transient: back-off, at most `attempts` times ┘
    truncated → once more with `larger_limit`;  malformed → one repair;  fatal → nothing more is sent

One event loop in a thread of its own, `concurrency` workers, one connection pool. The caller's thread reads `asks`, as far as
there is room, and hands outcomes out, so memory is O(concurrency) and there is never a task per record. Deeper asks go first.
Equal asks in one run are one call. Ctrl-C stops sending and waits ≤ 10 s for what is under way; a second one does not wait.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from pydantic import BaseModel

from raglan.calls.asks import Ask, Outcome, Usage, call_key
from raglan.calls.classify import Reply, Wire, classify
from raglan.calls.endpoint import open_endpoint, read_key
from raglan.calls.journal import Intent, Journal
from raglan.calls.limits import Clock, Gate, backoff, retry_after
from raglan.calls.money import Entry, Price, cap_of, dollars, prompt_bound
from raglan.calls.structured import MODES, Mode, ask_in_mode, longest_form, parse, probe, repair
from raglan.errors import CallsStopped, GeneratorError, require
from raglan.recipe import EndpointSettings, MoneySettings

__all__ = ["CallEngine"]

DRAIN_SECONDS, SYNC_SECONDS = 10.0, 0.2


class CallEngine:
    """One endpoint, one journal. `with CallEngine(settings, folder, money=…) as engine`, or call `close`."""

    def __init__(self, settings: EndpointSettings, folder: Path | Journal, *, money: MoneySettings, clock: Clock | None = None):
        """
        Args:
            folder: where the journal is, or will be; or an open journal that several engines share, in turns.
            clock: another one makes pauses shorter, for trials.

        Raises:
            RecipeError: no price. GeneratorError: `api_key_env` names a variable that is not set.
            CheckpointError: a damaged journal, or one that another process is writing.
        """
        self.settings, self.clock = settings, clock or Clock()
        self.price, self.cap = Price.of(money), cap_of(money)
        self._key = read_key(settings.api_key_env)
        self._count = _counter(settings.tokenizer)
        self.host = urlsplit(settings.base_url).netloc + urlsplit(settings.base_url).path
        self._owned = not isinstance(folder, Journal)
        self.journal = folder if isinstance(folder, Journal) else Journal(folder)
        self._current: _Run | None = None

    def __enter__(self) -> CallEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write everything to the disk and let the journal go, if it is this engine's own. A run that is left ends at once."""
        if self._current is not None:
            self._current.end(wait=False)
        if self._owned:
            self.journal.close()

    def run(self, asks: Iterable[Ask], *, follow: Callable[[Outcome], Iterable[Ask]] | None = None) -> Iterator[Outcome]:
        """Outcomes in order of completion; memory O(concurrency), `asks` is read as far as needed.

        Args:
            follow: what an outcome leads to, asked in the same run, deeper ones before shallower.

        Raises:
            CallsStopped: cap, fatal answer, breaker, Ctrl-C or a full disk, after what was in flight has been handed out.
        """
        if self._current is not None:
            raise GeneratorError("this engine is running already", hint="use `follow` for calls that depend on others")
        self._current = _Run(self)
        try:
            yield from self._current.outcomes(asks, follow)
        finally:
            self._current = None

    def ledger(self) -> list[Entry]:
        """Rows of step × model × outcome: calls, tokens, money; `in_doubt` are requests of which no outcome is known."""
        return self.journal.ledger.rows()

    def key(self, ask: Ask) -> str:
        """The name by which the journal knows a call."""
        return call_key(ask, host=self.host, model=self.settings.model, max_tokens=self.settings.max_tokens)

    def known(self, ask: Ask) -> Outcome | None:
        """What the journal holds for an ask, without a request."""
        return self._known(ask, self.key(ask))

    def _known(self, ask: Ask, key: str) -> Outcome | None:
        found = self.journal.answer(key)
        if found is None:
            return None
        value, errors = _value(ask, found["body"])
        if errors:  # it was ok by a schema of the same content, so only a validator in Python can have changed
            return None
        return Outcome(ask, "ok", value, found["body"], reused=True)

    def reserve(self, ask: Ask) -> tuple[int, int]:
        """Tokens and nano-dollars that a request of this ask takes at most."""
        schema = "" if ask.schema is None else longest_form(ask.schema)
        bound = prompt_bound(ask.messages, schema, count=self._count)
        limit = self.limit(ask)
        return bound + limit, self.price.cost(Usage(bound, 0, limit))

    def limit(self, ask: Ask) -> int:
        return int(ask.sampling.get("max_tokens", self.settings.max_tokens))


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


@dataclass(order=True)
class _Waiting:
    """A source of asks with the next one of them; the deepest stands first, then the oldest."""

    rank: tuple[int, int]
    ask: Ask = field(compare=False)
    rest: Iterator[Ask] = field(compare=False)


class _Run:
    """One pass over some asks: the caller's thread here, the loop's in `_serve` and below."""

    def __init__(self, engine: CallEngine):
        self.engine, self.settings, self.journal = engine, engine.settings, engine.journal
        self.stopped: CallsStopped | None = None
        self.fault: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._done: queue.SimpleQueue[list[tuple[str, Outcome]] | None] = queue.SimpleQueue()
        self._heap: list[tuple[int, int, str, Ask]] = []  # handed to the loop: a worker takes from it without being woken
        self._idle = 0  # workers that found it empty
        self._turn = threading.Lock()  # of these two
        self._ended: list[tuple[str, Outcome]] = []  # by the loop; all of a turn at once
        self._sources: list[_Waiting] = []
        self._numbers = itertools.count()
        self._out: dict[str, list[Ask]] = {}  # handed to the loop, by key, with equal asks that wait for the same reply
        self._asked = 0
        self._quit = self._hurry = False
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="raglan-calls", daemon=True)

    # in the caller's thread

    def outcomes(self, asks: Iterable[Ask], follow: Callable[[Outcome], Iterable[Ask]] | None) -> Iterator[Outcome]:
        self._source(asks)
        self._thread.start()
        self._started.wait()
        try:
            with self._interrupts():
                for outcome in self._all():
                    yield outcome
                    if follow is not None and self.stopped is None:
                        self._source(follow(outcome))
        finally:
            self.end(wait=not self._hurry)
        if self.fault is not None:
            raise self.fault
        if self.stopped is not None:
            raise self.stopped

    def _all(self) -> Iterator[Outcome]:
        while True:
            while (ask := self._next()) is not None:
                found = self._known_or_sent(ask)
                if found is not None:
                    yield found
            if not self._out:
                return
            told = self._done.get()
            if told is None:  # the loop has ended
                return
            for key, outcome in told:
                equal = self._out.pop(key)
                self._asked -= len(equal)
                yield outcome
                for ask in equal[1:]:
                    yield replace(outcome, ask=ask, usage=Usage(), cost_nano=0, calls=0, reused=True)

    def _source(self, asks: Iterable[Ask]) -> None:
        rest = iter(asks)
        if (ask := next(rest, None)) is not None:
            heapq.heappush(self._sources, _Waiting((-ask.depth, next(self._numbers)), ask, rest))

    def _next(self) -> Ask | None:
        """The deepest ask that waits, while there is room and nothing has stopped."""
        if self.stopped is not None or not self._sources or self._asked >= 2 * self.settings.concurrency:
            return None
        first = self._sources[0]
        ask, following = first.ask, next(first.rest, None)
        if following is None:
            heapq.heappop(self._sources)
        else:
            heapq.heapreplace(self._sources, _Waiting((-following.depth, first.rank[1]), following, first.rest))
        return ask

    def _known_or_sent(self, ask: Ask) -> Outcome | None:
        key = self.engine.key(ask)
        if key not in self._out and (found := self.engine._known(ask, key)) is not None:
            return found
        self._asked += 1
        if key in self._out:
            self._out[key].append(ask)
            return None
        self._out[key] = [ask]
        self._hand((-ask.depth, next(self._numbers), key, ask))
        return None

    def _hand(self, ask: tuple[int, int, str, Ask]) -> None:
        """To the loop, which is woken only where a worker has nothing to do."""
        with self._turn:
            heapq.heappush(self._heap, ask)
            idle = self._idle > 0
            self._idle -= idle
        if idle:
            self._tell(self._there.release)

    @contextmanager
    def _interrupts(self) -> Iterator[None]:
        """Ctrl-C once: stop sending. Twice: KeyboardInterrupt, here and now."""
        own = threading.current_thread() is threading.main_thread()
        if not own or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return

        def first(*_: object) -> None:
            signal.signal(signal.SIGINT, second)
            self._tell(self._interrupted)

        def second(*_: object) -> None:
            self._hurry = True
            raise KeyboardInterrupt

        signal.signal(signal.SIGINT, first)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def end(self, *, wait: bool) -> None:
        """Nothing more is handed in: let what is under way come home, or not, and end the loop."""
        try:
            self._tell(self._finish)
            self._thread.join(DRAIN_SECONDS + 1 if wait else 0)
        finally:
            self._tell(self._abandon)
            self._thread.join()
            self.journal.ledger.close_doubts()

    def _tell(self, act: Callable[..., None], *what: Any) -> None:
        if self._loop is not None and not self._loop.is_closed():
            try:
                self._loop.call_soon_threadsafe(act, *what)
            except RuntimeError:  # it has just closed
                return

    # in the loop's thread

    def _serve(self) -> None:
        try:
            asyncio.run(self._work())
        except BaseException as fault:  # noqa: BLE001 - raised again in the caller's thread
            self.fault = fault
        finally:
            self._started.set()
            self._flush()
            self._done.put(None)

    async def _work(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._endpoint = open_endpoint(self.settings, self.engine._key)
        self._gate = Gate(self.settings.concurrency, rpm=self.settings.rpm, tpm=self.settings.tpm, clock=self.engine.clock)
        self._there = asyncio.Semaphore(0)
        self._probing = asyncio.Lock()
        self._halt = asyncio.Event()
        with ThreadPoolExecutor(1) as disk:
            syncing = asyncio.create_task(self._sync(disk))
            self._workers = [asyncio.create_task(self._worker()) for _ in range(self.settings.concurrency)]
            self._started.set()
            try:
                await asyncio.gather(*self._workers)
            except asyncio.CancelledError:  # a second Ctrl-C, or nobody waits any longer
                pass
            finally:
                for task in (*self._workers, syncing):
                    task.cancel()
                await asyncio.gather(*self._workers, syncing, return_exceptions=True)
                await self._endpoint.close()
        try:
            self.journal.sync()
        except CallsStopped as fault:
            self._stop(fault)

    async def _sync(self, disk: ThreadPoolExecutor) -> None:
        """Bring what is written to the disk, in groups."""
        while True:
            await asyncio.sleep(SYNC_SECONDS)
            try:
                await asyncio.get_running_loop().run_in_executor(disk, self.journal.sync)
            except CallsStopped as fault:
                self._stop(fault)

    def _deliver(self, key: str, outcome: Outcome) -> None:
        """Hand an outcome out, together with all that end in this turn of the loop."""
        self._ended.append((key, outcome))
        if len(self._ended) == 1:
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        if self._ended:
            self._done.put(self._ended)
            self._ended = []

    def _finish(self) -> None:
        """Workers end when they have nothing under way."""
        self._quit = True
        self._halt.set()
        self._gate.changed()
        for _ in self._workers:
            self._there.release()

    def _stop(self, why: CallsStopped) -> None:
        self.stopped = self.stopped or why
        self._finish()

    def _interrupted(self) -> None:
        self._stop(CallsStopped("interrupted", reason="interrupt", hint="run the same command again and it goes on"))
        assert self._loop is not None
        self._loop.call_later(DRAIN_SECONDS, self._abandon)

    def _abandon(self) -> None:
        for worker in self._workers:
            worker.cancel()

    async def _worker(self) -> None:
        while True:
            while (taken := self._taken()) is None and not self._quit:
                await self._there.acquire()
            if taken is None or self._quit:
                return
            _, _, key, ask = taken
            try:
                outcome = await self._answer(ask, key)
            except CallsStopped as fault:
                self._stop(fault)
                return
            self._deliver(key, outcome)

    def _taken(self) -> tuple[int, int, str, Ask] | None:
        """The deepest ask that was handed in; without one, the worker counts as idle until it is woken."""
        with self._turn:
            if self._heap:
                return heapq.heappop(self._heap)
            self._idle += 1
            return None

    async def _answer(self, ask: Ask, key: str) -> Outcome:
        """An ask's outcome, after one repetition or one repair."""
        spent = _Spent()
        mode = "text" if ask.schema is None else await self._mode(spent)
        half = self._half(key)
        reply, value = (half, None) if half else await self._tried(ask, key, mode, spent)
        again: Ask | None = None
        if reply.cls == "truncated" and (self.settings.larger_limit or 0) > self.engine.limit(ask):
            again = replace(ask, sampling={**ask.sampling, "max_tokens": self.settings.larger_limit})
        elif reply.cls == "malformed":
            again = repair(ask, reply.text, reply.error)
        if again is not None:
            self._raise_if_stopped()
            reply, value = await self._tried(again, self.engine.key(again), mode, spent, instead_of=key)
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
        name = (self.engine.host, self.settings.model)
        async with self._probing:
            if name not in self.journal.modes:
                self.journal.probed(*name, await self._probed(spent))
        return cast(Mode, self.journal.modes[name])

    async def _probed(self, spent: _Spent) -> Mode:
        for mode in MODES[:-1]:
            self._raise_if_stopped()
            trial = probe(mode)
            if self.engine.known(trial) is not None:
                return mode
            reply, _ = await self._tried(trial, self.engine.key(trial), mode, spent)
            if reply.cls == "ok":
                return mode
            if reply.cls == "transient":
                raise CallsStopped(f"{self.engine.host} does not answer: {reply.error}", reason="breaker", hint="try later")
        return "text"

    async def _tried(
        self, ask: Ask, key: str, mode: Mode, spent: _Spent, *, instead_of: str | None = None
    ) -> tuple[Reply, BaseModel | str | None]:
        """One call, tried again while it fails for passing reasons."""
        if instead_of is not None and (known := self.engine._known(ask, key)) is not None:
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
            await self.engine.clock.wait(self._halt, wait)
            self._raise_if_stopped()
        raise AssertionError  # itertools.count does not end

    async def _once(
        self, ask: Ask, key: str, form: tuple[list[Any], dict[str, Any]], spent: _Spent, instead_of: str | None
    ) -> tuple[Reply, BaseModel | str | None]:
        """One request: leave, intent, send, outcome."""
        tokens, reserve = self.engine.reserve(ask)
        is_probe = await self._gate.enter(tokens, lambda: self._affordable(ask, reserve))
        used = tokens
        try:
            tries, settled = self.journal.tries(key)
            intent = Intent(key, tries + 1, ask.step, self.settings.model, f"{key[:32]}-{settled}", reserve)
            self.journal.intend(intent)
            sent = self.engine.clock.now()
            wire = await self._endpoint.send(self._body(ask, form), intent.idem)
            took = self.engine.clock.now() - sent
            reply, value = _judged(classify(wire), ask)
            cost = self._cost(reply, reserve)
            reply = self._within(reply, cost, reserve)
            spent.add(reply.usage or Usage(), cost, took)
            self.journal.settle(intent, _line(reply, cost, took, instead_of))
            used = tokens if reply.usage is None else reply.usage.prompt + reply.usage.output
            self._learn(wire, reply, sent, probe=is_probe)
        finally:
            self._gate.leave(unused=tokens - used)
        if reply.cls == "fatal":
            raise CallsStopped(f"{self.engine.host}: {reply.error}", reason="fatal", hint=self._fatal_hint(wire))
        return reply, value

    def _affordable(self, ask: Ask, reserve: int) -> bool:
        """Whether a request may be reserved now. Raises if it never may."""
        self._raise_if_stopped()
        if self._gate.breaker.over:
            raise CallsStopped(
                f"{self.engine.host} keeps failing", reason="breaker", hint="run the same command again when it is well"
            )
        ledger, cap = self.journal.ledger, self.engine.cap
        if ledger.fits(reserve, cap):
            return True
        if ledger.in_flight:
            return False
        assert cap is not None
        raise CallsStopped(
            f"spent {dollars(ledger.spent)} of {dollars(cap)}; a call of step {ask.step!r} may cost {dollars(reserve)}",
            reason="cap", hint="a larger money.cap_usd goes on from here",
        )  # fmt: skip

    def _raise_if_stopped(self) -> None:
        if self.stopped is not None:
            raise self.stopped
        if self._quit:
            raise CallsStopped("nobody waits for the replies any more", reason="interrupt")

    def _body(self, ask: Ask, form: tuple[list[Any], dict[str, Any]]) -> dict[str, Any]:
        messages, response = form
        sampling = {name: value for name, value in ask.sampling.items() if name != "max_tokens"}
        limit: dict[str, Any] = {self.settings.limit_name: self.engine.limit(ask)}
        return {"model": self.settings.model, "messages": messages, **sampling, **limit, **response}

    def _cost(self, reply: Reply, reserve: int) -> int:
        if reply.usage is not None:
            return self.engine.price.cost(reply.usage)
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
            self._gate.limited(sent, pause, probe=probe)
        elif reply.cls == "transient":
            if "retry-after" in wire.headers:
                self._gate.pause(retry_after(wire.headers["retry-after"], wire.headers.get("date")))
            self._gate.bad(probe=probe)
        else:
            self._gate.good(probe=probe)

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
    value, errors = _value(ask, reply.text)
    return (replace(reply, cls="malformed", error=errors), None) if errors else (reply, value)


def _value(ask: Ask, text: str) -> tuple[BaseModel | str | None, str]:
    return (text, "") if ask.schema is None else parse(text, ask.schema)


def _line(reply: Reply, cost: int, took: float, instead_of: str | None) -> dict[str, Any]:
    usage = reply.usage or Usage()
    line: dict[str, Any] = {
        "class": reply.cls, "finish": reply.finish, "usage": [usage.prompt, usage.cached, usage.output], "cost": cost,
        "settled": reply.settled, "took": round(took, 3),
    }  # fmt: skip
    line |= {"body": reply.text} if reply.text else {}
    line |= {"error": reply.error} if reply.error else {}
    return line | ({"for": instead_of} if instead_of else {})


def _counter(tokenizer: str | None) -> Callable[[str], int] | None:
    """How many tokens a text has, where the model's tokenizer is at hand."""
    if tokenizer is None:
        return None
    transformers = require("transformers", "to count tokens")
    try:
        loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as fault:
        raise GeneratorError(
            f"tokenizer {tokenizer!r} cannot be loaded: {str(fault).splitlines()[0]}", hint="leave it out to reckon by bytes"
        ) from None
    return lambda text: len(loaded(text, add_special_tokens=False)["input_ids"])
