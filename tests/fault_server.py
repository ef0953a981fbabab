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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

KEY = "sk-sentinel-9f8e7d"
PRICE = {"input": 2.5, "cached": 1.25, "output": 10}


@dataclass(frozen=True)
class Fault:
    """Anything but a good reply. `text` and `finish` make a 200 of another content."""

    status: int = 200
    text: str | None = None
    finish: str = "stop"
    body: str | None = None  # the whole body, whatever it is
    headers: dict[str, str] = field(default_factory=dict)
    code: str | None = None
    delay: float = 0.0
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

    def __init__(self, *, delay: float = 0.0, idempotent: bool = True, modes: tuple[str, ...] = ("strict", "json", "text")):
        self.delay, self.idempotent, self.modes = delay, idempotent, modes
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

    @property
    def bill(self) -> int:
        return sum(request.billed for request in self.log)

    async def _serve(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        self._loop.set_exception_handler(lambda *_: None)  # clients that are killed
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=512)
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
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        request = Request(time.monotonic(), headers.get("idempotency-key", ""), body)
        self.log.append(request)
        fault = self.faults(len(self.log) - 1, request) or self._unable(headers, body) or Fault()
        before = self._working.get(request.idem)
        if self.idempotent and before is not None:  # the same request is being worked on
            await before.wait()
        self._working[request.idem] = over = asyncio.Event()
        await asyncio.sleep(fault.delay or self.delay)
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
            return fault.status, fault.headers, body.encode()
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
        content = (json.dumps(reply) if fault.body is None else fault.body).encode()
        if self.idempotent:
            self._answered[request.idem] = (content, request.usage)
        return 200, fault.headers, content


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
        jobs = [{"job": f"Reader {mark}{number} wants the year of mill {mark}{number}.", "material": "A year."} for number in range(many)]
        return json.dumps({"jobs": jobs})
    if name == "DraftReply":
        return json.dumps(_draft(mark, asked[1]))
    if name == "PassagesReply":
        lists = re.findall(r"(?m)^\d+\.\n((?:- .*\n?)+)", asked[1])
        texts = [" ".join(line[2:] for line in some.splitlines()) for some in lists] or [
            f"The inn {mark}{number} was painted green, and nobody remembers by whom." for number in range(many)
        ]
        return json.dumps({"passages": [{"title": f"Of {mark}", "text": text} for text in texts]})
    years = re.findall(r"year (\d+)", asked[1])
    return f"It was the year {years[0]}." if years else "The passages do not tell the year."


def _draft(mark: str, asked: str) -> dict[str, Any]:
    years = [1000 + int(mark[:3], 16) % 900, 2000 + int(mark[3:6], 16)]
    options = "A to D" in asked or "options" in asked or "classes" in asked
    return {
        "query": f"When was the mill {mark} opened?" + ("\nA) then\nB) now" if options else ""), "subject": f"mill {mark}",
        "facts": [f"The mill {mark} was opened in the year {year}." for year in years],
        "answers": ["A"] if options else [str(years[0])], "history": ["Hello.", "Good day."] if "earlier turns" in asked else [],
        "labels": ["A", "B"] if options else [], "fields": ["year"] if "keys of the JSON" in asked else [],
    }


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
