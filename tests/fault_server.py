"""A small real server: OpenAI's chat protocol with faults, its own log of requests and its own bill.

What it replies follows from the messages alone, so that two runs can be compared byte by byte. It bills what it has worked
out, whether or not anybody is still there to read it; with `idempotent` a request whose Idempotency-Key it has answered with
200 gets the same reply again and no second bill.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from raglan.calls.classify import Wire
from raglan.calls.endpoint import Endpoint
from raglan.calls.journal import Journal
from raglan.recipe import EndpointSettings

KEY = "sk-sentinel-9f8e7d"
PRICE = {"input": 2.5, "cached": 1.25, "output": 10}


@dataclass(frozen=True)
class Fault:
    """Anything but a good reply. `text` and `finish` make a 200 of another content."""

    status: int = 200
    text: str | None = None
    finish: str = "stop"
    body: str | None = None  # the whole body, whatever it is
    charset: str = "utf-8"  # in which it is spelt
    headers: dict[str, str] = field(default_factory=dict)
    code: str | None = None
    delay: float = 0.0
    until: asyncio.Event | None = None  # what holds the reply back; `FaultServer.let` sets it
    cut: str = ""  # "short": fewer bytes than announced; "reset": no reply; "middle": a reset in the body
    usage: tuple[int, int] | None = None


@dataclass
class Request:
    """A row of the server's own book."""

    at: float
    idem: str
    body: dict[str, Any]
    status: int = 0
    billed: int = 0  # nano-dollars
    usage: tuple[int, int] = (0, 0)
    again: bool = False  # an Idempotency-Key that was answered before

    @property
    def content(self) -> str:
        return json.dumps(self.body["messages"], sort_keys=True)


Choose = Callable[[int, Request], Fault | None]


class FaultServer:
    """`with FaultServer() as server`: `server.url`; `server.faults(n, request)` says what goes wrong with the n-th request."""

    def __init__(
        self, *, delay: float = 0.0, idempotent: bool = True, modes: tuple[str, ...] = ("strict", "json", "text"), port: int = 0
    ):  # fmt: skip
        self.delay, self.idempotent, self.modes, self.port = delay, idempotent, modes, port
        self.faults: Choose = lambda number, request: None
        self.reply: Callable[[dict[str, Any]], str] = say
        self.log: list[Request] = []
        self._answered: dict[str, tuple[bytes, tuple[int, int]]] = {}
        self._working: dict[str, asyncio.Event] = {}
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> FaultServer:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    def direct(self, settings: EndpointSettings, key: str | None) -> Direct:
        """A client of this server that needs no socket; the server is not started."""
        return Direct(self, settings, key)

    @property
    def bill(self) -> int:
        return sum(request.billed for request in self.log)

    def let(self, held: asyncio.Event) -> None:
        """Let the replies go that an event holds back."""
        self._loop.call_soon_threadsafe(held.set)

    async def _serve(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        self._loop.set_exception_handler(lambda *_: None)  # clients that are killed
        server = await asyncio.start_server(self._connection, "127.0.0.1", self.port, backlog=512)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        self._ready.set()
        await self._over.wait()
        server.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while await self._exchange(reader, writer):
                pass
        writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:])}
        if head[0].startswith("GET /health "):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            return True
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        request = Request(time.monotonic(), headers.get("idempotency-key", ""), body)
        self.log.append(request)
        fault = self.faults(len(self.log) - 1, request) or self._unable(headers, body) or Fault()
        before = self._working.get(request.idem)
        if self.idempotent and before is not None:  # the same request is being worked on
            await before.wait()
        self._working[request.idem] = over = asyncio.Event()
        await asyncio.sleep(fault.delay or self.delay)
        if fault.until is not None:
            await fault.until.wait()
        status, extra, content = self._answer(request, fault)
        over.set()
        request.status = status
        if fault.cut == "reset":
            writer.transport.abort()
            return False
        lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(content)}", *(f"{k}: {v}" for k, v in extra.items())]
        whole = ("\r\n".join(lines) + "\r\n\r\n").encode() + content
        writer.write(whole[: -len(content) // 2] if fault.cut else whole)
        await writer.drain()
        if fault.cut == "middle":
            await asyncio.sleep(0.01)
            writer.transport.abort()
        return not fault.cut

    def _unable(self, headers: dict[str, str], body: dict[str, Any]) -> Fault | None:
        """What this server does not take: another key, or a way of asking for JSON that it does not know."""
        if headers.get("authorization") != f"Bearer {KEY}":
            return Fault(401, code="invalid_api_key")
        form = body.get("response_format", {}).get("type", "text")
        mode = {"json_schema": "strict", "json_object": "json"}.get(form, "text")
        return None if mode in self.modes else Fault(400, code="unsupported")

    def _answer(self, request: Request, fault: Fault) -> tuple[int, dict[str, str], bytes]:
        if fault.status != 200:
            words = f"not now, Bearer {KEY}"  # servers like to repeat the key
            error = {"error": {"message": words, "type": "x", "code": fault.code}}
            body = json.dumps(error) if fault.body is None else fault.body
            return fault.status, fault.headers, body.encode(fault.charset)
        if self.idempotent and request.idem in self._answered:
            content, request.usage = self._answered[request.idem]
            request.again = True
            return 200, fault.headers, content
        text = self.reply(request.body) if fault.text is None else fault.text
        prompt, output = fault.usage or (len(json.dumps(request.body)) // 5 + 1, len(text) // 4 + 1)
        request.usage, request.billed = (prompt, output), prompt * 2500 + output * 10000
        usage = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
        message = {"role": "assistant", "content": text}
        reply = {"id": "1", "choices": [{"index": 0, "message": message, "finish_reason": fault.finish}], "usage": usage}
        content = (json.dumps(reply) if fault.body is None else fault.body).encode(fault.charset)
        if self.idempotent:
            self._answered[request.idem] = (content, request.usage)
        return 200, fault.headers, content


class Direct(Endpoint):
    """What a server that was not started would reply, without a socket: for trials of tens of thousands of calls.

    `monkeypatch.setattr(running, "open_endpoint", server.direct)`: everything but the wire is the engine's own. Of the cuts it
    knows one: the reply is lost, and billed. Delays are none.
    """

    def __init__(self, server: FaultServer, settings: EndpointSettings, key: str | None):
        super().__init__(settings, key)
        self.server = server

    async def close(self) -> None:
        pass

    async def _asked(self, body: Mapping[str, Any], idem: str) -> Wire:
        request = Request(time.monotonic(), idem, dict(body))
        self.server.log.append(request)
        fault = self.server.faults(len(self.server.log) - 1, request) or Fault()
        request.status, headers, content = self.server._answer(request, fault)
        if fault.cut:
            return Wire(fault="connection: cut", lost=True)
        return Wire(request.status, content.decode(), {name.lower(): value for name, value in headers.items()})


def say(body: dict[str, Any]) -> str:
    """A reply that follows from the last message: JSON where it was asked for."""
    told = json.dumps(body["messages"])
    digest = hashlib.sha256(told.encode()).hexdigest()
    if "As a trial of" in told:
        return json.dumps({"colour": "blue", "ready": True})
    wanted = "response_format" in body or "JSON" in told
    return json.dumps({"word": digest[:8], "count": int(digest[:4], 16)}) if wanted else digest


SCHEMAS = ("JobsReply", "DraftReply", "PassagesReply")
MANY = re.compile(r"(?:Number of jobs|数量|Number of passages|段落数量)[:：] ?(\d+)")


def author(body: dict[str, Any]) -> str:
    """A teacher's replies, step by step; all that is said follows from what is asked, and answers stand in the facts."""
    asked = [message["content"] for message in body["messages"] if message["role"] != "assistant"]
    told = json.dumps(asked[:2], ensure_ascii=False)  # a repair is told the same as what it repairs
    if "As a trial of" in told:
        return json.dumps({"colour": "blue", "ready": True})
    mark = hashlib.sha256(told.encode()).hexdigest()[:10]
    form = body.get("response_format", {})
    name = form.get("json_schema", {}).get("name") or next((name for name in SCHEMAS if name in told), "")
    many = int(found[1]) if (found := MANY.search(asked[1])) else 0
    if name == "JobsReply":
        jobs = [
            {"job": f"Reader {mark}{number} wants the year of mill {mark}{number}.", "material": "A year."}
            for number in range(many)
        ]
        return json.dumps({"jobs": jobs})
    if name == "DraftReply":
        return json.dumps(_draft(mark, asked[1]))
    if name == "PassagesReply":
        lists = re.findall(r"(?m)^\d+\.\n((?:- .*\n?)+)", asked[1])
        texts = [" ".join(line[2:] for line in some.splitlines()) for some in lists] or [
            f"The inn {mark}{number} was painted green, and nobody remembers by whom." for number in range(many)
        ]
        return json.dumps({"passages": [{"title": f"Of {mark}", "text": text} for text in texts]})
    mark = (re.findall(r"mill ([0-9a-f]{10})", asked[1]) or ["0" * 10])[-1]  # the question stands last
    year, other = str(_year(mark)), str(_later(mark))
    if f"year {year}" in asked[1] and f"year {other}" in asked[1]:  # all that is shown is told: where it conflicts, too
        return f"By one passage it was the year {year}, by another the year {other}."
    return f"It was the year {year}." if f"year {year}" in asked[1] else "The passages do not tell the year."


def _year(mark: str) -> int:
    return 1000 + int(mark[:3], 16) % 900


def _later(mark: str) -> int:
    return 2000 + int(mark[3:6], 16)


def _draft(mark: str, asked: str) -> dict[str, Any]:
    miller = f"Odo{int(mark, 16) % 40}"
    years = [_year(mark), _later(mark)]
    options, sides = "`labels`" in asked, 2 if "both readings" in asked or "两种说法" in asked else 1
    return {
        "query": f"When was the mill {mark} of {miller} opened?" + ("\nA) then\nB) now" if options else ""),
        "subject": f"mill {mark}",
        "facts": [f"The mill {mark} of {miller} was opened in the year {year}." for year in years],
        "answers": ["A"] if options else [str(year) for year in years[:sides]],
        "history": ["Hello.", "Good day."] if "earlier turns" in asked or "此前的两轮" in asked else [],
        "labels": ["A", "B"] if options else [],
        "fields": ["year"] if "`fields`" in asked else [],
    }


PASSING = (
    (Fault(429, headers={"Retry-After": "1"}), 0.0015), (Fault(429), 0.0015), (Fault(500), 0.03), (Fault(503), 0.03),
    (Fault(delay=2.5), 0.002), (Fault(cut="reset"), 0.006), (Fault(cut="middle"), 0.006), (Fault(cut="short"), 0.006),
    (Fault(text=""), 0.004), (Fault(body="<html>busy</html>"), 0.004),
)  # fmt: skip
LASTING = (
    (Fault(text='{"half', finish="length"), 0.004), (Fault(text="no, I will not"), 0.02),
    (Fault(text="{}", finish="content_filter"), 0.004), (Fault(400, code="context_length_exceeded"), 0.003),
    (Fault(text='{"query": 7}'), 0.004),
)  # fmt: skip
ONCE = LASTING[1][0]  # only the first time: the repair goes well


class Storm:
    """Everything at once: `PASSING` faults by what is asked and how often it was, `LASTING` ones by what is asked alone, and at
    some requests a key that is refused or a quota that is gone. `kinds` counts what it did."""

    def __init__(self, *, fatal: tuple[int, ...] = (), passing: bool = True):
        self.fatal, self.passing = set(fatal), passing
        self.times: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()

    def __call__(self, number: int, request: Request) -> Fault | None:
        if "As a trial of" in request.content:
            return None
        fault = self._chosen(number, request)
        if fault is not None:
            self.kinds[_kind(fault)] += 1
        return fault

    def _chosen(self, number: int, request: Request) -> Fault | None:
        if self.fatal and number >= min(self.fatal):
            self.fatal.remove(min(self.fatal))
            key = Fault(401, code="invalid_api_key")
            return Fault(429, code="insufficient_quota") if self.kinds[_kind(key)] else key
        self.times[request.content] += 1
        lasting = self._lasting(request)
        passing = _drawn(PASSING, f"{request.content}{self.times[request.content]}") if self.passing else None
        if passing is not None and (passing.cut or passing.delay):  # the reply is what it would have been, and gets lost
            return replace(lasting or Fault(), cut=passing.cut, delay=passing.delay)
        return passing or lasting

    def _lasting(self, request: Request) -> Fault | None:
        fault = _drawn(LASTING, json.dumps(request.body["messages"][:2]))
        repaired = any(message["role"] == "assistant" for message in request.body["messages"])
        if fault is None or (fault is ONCE and repaired):
            return None
        words = fault.status == 200 and fault.finish == "stop" and "response_format" not in request.body
        return None if words else fault  # any words are an answer


def _drawn(mix: tuple[tuple[Fault, float], ...], name: str) -> Fault | None:
    point = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big") / 2**56
    for fault, share in mix:
        point -= share
        if point < 0:
            return fault
    return None


def _kind(fault: Fault) -> str:
    if fault.cut or fault.delay:
        return {"short": "body too short", "middle": "reset in the body", "reset": "reset"}.get(fault.cut, "timeout")
    if fault.status != 200:
        return f"{fault.status}{' Retry-After' if fault.headers else ''}{' ' + fault.code if fault.code else ''}"
    if fault.finish != "stop":
        return f"200, {fault.finish}"
    return "200 with HTML" if fault.body else ("200, empty" if not fault.text else "200, wrong JSON")


def audit(server: FaultServer, folder: Path) -> dict[str, Any]:
    """The server's book against the journal's: raises where they disagree.

    Every request has an intent, no call with a journalled good reply is sent again, no Idempotency-Key is billed twice, tokens
    and money of every reply that came home are the server's to the last one, and the ledger is never below the bill.
    """
    journal = Journal(folder)
    lines, ledger = list(journal.lines()), journal.ledger
    journal.close()
    idems: dict[tuple[str, int], str] = {}
    done: set[str] = set()
    read: dict[str, tuple[int, int]] = {}
    tokens, cost, lost = [0, 0], 0, 0
    for line in lines:
        if line["kind"] == "intent":
            assert line["key"] not in done, "a call with a journalled reply was sent again"
            idems[line["key"], line["attempt"]] = line["idem"]
        elif line["kind"] == "outcome":
            if line["class"] == "ok":
                done |= {line["key"], line.get("for", line["key"])}
            prompt, _, output = line["usage"]
            if prompt:
                read[idems[line["key"], line["attempt"]]] = (prompt, output)
                tokens, cost = [tokens[0] + prompt, tokens[1] + output], cost + line["cost"]
            lost += bool(line["cost"]) and not prompt
    assert Counter(request.idem for request in server.log) <= Counter(idems.values()), "a request without an intent"
    billed = Counter(request.idem for request in server.log if request.billed)
    assert not billed or max(billed.values()) == 1, "billed twice"
    book = {request.idem: request for request in server.log if request.billed}
    assert all(book[idem].usage == usage for idem, usage in read.items()), "tokens differ"
    home = sum(book[idem].billed for idem in read)
    assert (home, server.bill <= ledger.spent) == (cost, True)
    return {
        "requests": len(server.log), "replies": len(read), "calls done": len(done), "prompt tokens": tokens[0],
        "output tokens": tokens[1], "nano-dollars of these": cost, "bill": server.bill, "ledger": ledger.spent,
        "in doubt": ledger.doubts.calls, "lost": lost, "billed and not read": len(book) - len(read),
    }  # fmt: skip


def seeded(mix: list[tuple[Fault, float]], seed: int = 0) -> Choose:
    """Faults at random, by their shares; the same requests in the same order fail alike."""
    draw = random.Random(seed)

    def choose(number: int, request: Request) -> Fault | None:
        point = draw.random()
        for fault, share in mix:
            point -= share
            if point < 0:
                return fault
        return None

    return choose
