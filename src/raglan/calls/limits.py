"""When the next request may go: buckets, pause, concurrency, breaker.

    bucket      refills at rate/60 a second, holds a second's worth; what is taken in advance and not used comes back
    pause       Retry-After holds the whole endpoint, every slot, as long as it says
    concurrency halves on a 429, once for all requests that were under way together; +1 after 50 successes
    breaker     more than half of the last 50 requests failed for passing reasons: 30 s of silence, one probe; the 5th stops
                the run, unless 50 successes lie behind the last one: then it counts from nought again
    back-off    a retry waits uniform(0, min(60 s, 0.5 s · 2^attempt))

All on the monotonic clock, so that setting the machine's clock moves nothing. One place asks the wall clock: a Retry-After that
is a date, of a reply without a Date of its own (RFC 9110, 6.6.1: it counts from when it came). It is asked once, for a number
of seconds. One request at a time stands at the gate, in order, so that nobody overtakes and nothing polls.
A burst of 429s, of requests that were under way together, counts once in the breaker: pause and halving answer it.

All four are the server's, not the engine's: engines that ask one server, as teacher and judge, share a `Server`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC
from email.utils import parsedate_to_datetime

__all__ = ["Breaker", "Bucket", "Clock", "Gate", "Server", "backoff", "retry_after"]

WINDOW, OPEN_SECONDS, OPENINGS = 50, 30.0, 5
RAISE_AFTER = HEALED_AFTER = 50
TOLD = 30.0

log = logging.getLogger(__name__)


class Clock:
    """The monotonic clock. `speed` makes its seconds shorter, for trials of what takes minutes."""

    def __init__(self, speed: float = 1.0):
        self.speed = speed

    def now(self) -> float:
        return time.monotonic() * self.speed

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / self.speed)

    async def wait(self, event: asyncio.Event, seconds: float | None) -> None:
        """Until something has changed, or so long."""
        try:
            await asyncio.wait_for(event.wait(), None if seconds is None else seconds / self.speed)
        except TimeoutError:
            return


class Bucket:
    """`rate` a minute. A need that is larger than the bucket empties it into debt, which the next one waits for."""

    def __init__(self, rate: int | None, clock: Clock):
        self.rate = None if rate is None else rate / 60
        self.clock = clock
        self.size = max(1.0, self.rate or 0.0)
        self.level, self.filled = self.size, clock.now()

    def wait(self, need: float) -> float:
        """Seconds until `need` may be taken; 0 now."""
        if self.rate is None:
            return 0.0
        now = self.clock.now()
        self.level = min(self.size, self.level + (now - self.filled) * self.rate)
        self.filled = now
        return max(0.0, (min(need, self.size) - self.level) / self.rate)

    def take(self, need: float) -> None:
        self.level -= need

    def give(self, back: float) -> None:
        self.level = min(self.size, self.level + back)


class Breaker:
    """Whether the endpoint is in such a state that asking on is of no use."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.recent: deque[bool] = deque(maxlen=WINDOW)
        self.openings, self.until = 0, 0.0
        self._good = 0  # successes behind the last opening
        self.half_open = self.probing = False

    @property
    def over(self) -> bool:
        return self.openings >= OPENINGS

    def told(self, *, failed: bool, probe: bool) -> None:
        """Take in how a request went; those that were under way when it opened say nothing new."""
        if self.half_open and not probe:
            return
        self._good += not failed
        if self._good >= HEALED_AFTER:  # storms hours apart are not one
            self.openings = 0
        if probe:
            self.probing = False
            if failed:
                self._open()
            else:
                self.half_open = False
            return
        self.recent.append(failed)
        if len(self.recent) == WINDOW and sum(self.recent) > WINDOW / 2:
            self._open()

    def _open(self) -> None:
        self.openings += 1
        self._good = 0
        self.until = self.clock.now() + OPEN_SECONDS
        self.half_open = True
        self.recent.clear()


class Server:
    """What a server has said, and how much it has been asked: for all engines that ask it, one after another.

    Attributes:
        until: the end of the pause. breaker: of all requests.
        allowed: requests at a time since a 429; None before the first one.
        halved: when that was; what was under way then says nothing new. good: successes since it last changed.
    """

    def __init__(self, clock: Clock):
        self.clock, self.breaker = clock, Breaker(clock)
        self.until, self.halved = 0.0, float("-inf")
        self.allowed: int | None = None
        self.good = 0
        self._buckets: dict[tuple[str, int | None], Bucket] = {}

    def bucket(self, what: str, rate: int | None) -> Bucket:
        """Of requests or tokens; engines that name the same rate fill from the same one."""
        return self._buckets.setdefault((what, rate), Bucket(rate, self.clock))


class Gate:
    """Lets an engine's requests through to a server, `limit` at a time."""

    def __init__(self, most: int, *, rpm: int | None, tpm: int | None, server: Server):
        self.server, self.clock, self.most = server, server.clock, most
        self.requests, self.tokens = server.bucket("requests", rpm), server.bucket("tokens", tpm)
        self.active = 0
        self._turn, self._changed = asyncio.Lock(), asyncio.Event()

    @property
    def limit(self) -> int:
        return self.most if self.server.allowed is None else min(self.most, self.server.allowed)

    def begin(self) -> None:
        """Before a run, in its loop: nobody is under way. Pause, limit, buckets and breaker go on from the run before.

        A breaker that has stopped a run is new: who asks again says that the endpoint is well.
        """
        self._turn, self._changed = asyncio.Lock(), asyncio.Event()
        self.active, self.server.breaker.probing = 0, False
        if self.server.breaker.over:
            self.server.breaker = Breaker(self.clock)

    async def enter(self, tokens: float, ready: Callable[[], bool]) -> bool:
        """Wait for leave to send. Whether this request is the breaker's probe.

        Args:
            tokens: of prompt and reply, at most.
            ready: whether there is money; it raises if the run has stopped or there never will be.
        """
        async with self._turn:
            while True:
                self._changed.clear()
                if not ready() or self.server.breaker.probing or self.active >= self.limit:
                    await self._changed.wait()
                elif wait := self._silent(tokens):
                    await self.clock.wait(self._changed, wait)
                else:
                    break
            self.requests.take(1)
            self.tokens.take(tokens)
            self.active += 1
            self.server.breaker.probing = probe = self.server.breaker.half_open
            return probe

    def leave(self, *, unused: float = 0.0) -> None:
        """A request is over, and so many of its tokens were not used."""
        self.active -= 1
        self.tokens.give(unused)
        self.changed()

    def changed(self) -> None:
        self._changed.set()

    def good(self, *, probe: bool) -> None:
        self.server.breaker.told(failed=False, probe=probe)
        self.server.good += 1
        if self.server.good >= RAISE_AFTER and self.limit < self.most:
            self.server.allowed, self.server.good = self.limit + 1, 0

    def bad(self, *, probe: bool) -> None:
        self.server.breaker.told(failed=True, probe=probe)

    def pause(self, seconds: float | None) -> None:
        """Nobody sends for so long."""
        now = self.clock.now()
        if seconds is not None and now + seconds > self.server.until:
            self.server.until = now + seconds
            if seconds >= TOLD:
                log.warning("the endpoint wants no request for %.0f s; Ctrl-C stops, and what came is kept", seconds)

    def limited(self, sent: float, pause: float | None, *, probe: bool) -> None:
        """A 429 for a request sent at `sent`, with its Retry-After in seconds."""
        now = self.clock.now()
        self.pause(pause)
        if sent >= self.server.halved:
            self.server.halved, self.server.good = now, 0
            self.server.allowed = max(1, self.limit // 2)
            self.server.breaker.told(failed=True, probe=probe)
        elif probe:
            self.server.breaker.told(failed=True, probe=True)

    def _silent(self, tokens: float) -> float:
        """Seconds to wait for pause, breaker and buckets."""
        now = self.clock.now()
        silence = max(self.server.until, self.server.breaker.until) - now
        return max(silence, self.requests.wait(1), self.tokens.wait(tokens), 0.0)


def backoff(attempt: int) -> float:
    """Seconds before the try behind the `attempt`-th: full jitter."""
    return random.uniform(0.0, min(60.0, 0.5 * 2.0**attempt))


def retry_after(value: str | None, date: str | None = None) -> float | None:
    """Seconds that a Retry-After header asks for, a number or an HTTP date.

    Args:
        date: the reply's own Date, from which such a date counts; where there is none, or one that is no date, the wall clock.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    except ValueError:
        pass
    until, now = _moment(value), _moment(date or "")
    if until is None:
        return None
    return max(0.0, until - (time.time() if now is None else now))


def _moment(date: str) -> float | None:
    """An HTTP date in seconds since 1970; all of them are UTC, whether they say so or not."""
    try:
        read = parsedate_to_datetime(date)
    except (TypeError, ValueError):
        return None
    return read.replace(tzinfo=read.tzinfo or UTC).timestamp()
