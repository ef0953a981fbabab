"""One pass over some asks: the caller's thread reads and hands out, a loop in a thread of its own sends."""

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
from typing import Any

from raglan.calls.asks import Ask, Outcome, Usage
from raglan.calls.endpoint import open_endpoint
from raglan.calls.limits import Gate
from raglan.calls.refusals import Refusals
from raglan.calls.sending import Sender
from raglan.calls.terms import Terms
from raglan.errors import CallsStopped

__all__ = ["Run"]

DRAIN_SECONDS, SYNC_SECONDS = 10.0, 0.2


@dataclass(order=True)
class _Waiting:
    """A source of asks with the next one of them; the deepest stands first, then the oldest."""

    rank: tuple[int, int]
    ask: Ask = field(compare=False)
    rest: Iterator[Ask] = field(compare=False)


class Run:
    """One pass over some asks: the caller's thread here, the loop's in `_serve` and below."""

    def __init__(self, terms: Terms, gate: Gate, *, key: str | None):
        """`key`: the server's, which is not written down."""
        self.terms, self.settings, self.journal, self._key = terms, terms.settings, terms.journal, key
        self._gate = gate
        self._refusals = Refusals(terms.host, terms.settings.model, terms.journal.ledger)
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
        key = self.terms.key(ask)
        if key not in self._out and (found := self.terms.known_as(ask, key)) is not None:
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
        self._gate.begin()
        self._there, self._halt = asyncio.Semaphore(0), asyncio.Event()
        endpoint = open_endpoint(self.settings, self._key)
        self._sender = Sender(self.terms, self._gate, endpoint, halt=self._halt, go_on=self._raise_if_stopped)
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
                await endpoint.close()
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
                outcome = await self._sender.answer(ask, key)
            except CallsStopped as fault:
                self._stop(fault)
                return
            self._deliver(key, outcome)
            if (why := self._refusals.heed(ask, outcome)) is not None:
                self._stop(why)

    def _taken(self) -> tuple[int, int, str, Ask] | None:
        """The deepest ask that was handed in; without one, the worker counts as idle until it is woken."""
        with self._turn:
            if self._heap:
                return heapq.heappop(self._heap)
            self._idle += 1
            return None

    def _raise_if_stopped(self) -> None:
        if self.stopped is not None:
            raise self.stopped
        if self._quit:
            raise CallsStopped("nobody waits for the replies any more", reason="interrupt")
