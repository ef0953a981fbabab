"""The call engine against a bare client: calls a second, CPU a call, memory.

    make bench-calls        (a minute on 2 cores; `-n`, `--concurrency`, `--latency` for others)

A server in a process of its own answers every request after 200 ms. Two clients ask it by turns, 64 requests at a time:

    bare     asyncio over 64 sockets that stay open: writes a request, reads the reply, keeps nothing
    engine   raglan's: keys, journal with intents and outcomes, money, gate, the `openai` client

Ideal are concurrency / latency calls a second. Printed are calls a second, the share of the ideal and of the bare client's, CPU
a call (of the whole client process), and how much more memory the second half of the engine's run held than the first.
`--journal N` also times the opening of a journal of N calls of 3 kB.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raglan.calls import Ask, CallEngine
from raglan.calls.journal import Intent, Journal
from raglan.recipe import EndpointSettings, MoneySettings

TEXT = "A reply of some length. " * 20
PROMPT = "A question with passages. " * 40


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("-n", type=int, default=6400, help="calls a run")
    words.add_argument("--times", type=int, default=2, help="runs of each client")
    words.add_argument("--concurrency", type=int, default=64)
    words.add_argument("--latency", type=float, default=0.2, help="seconds")
    words.add_argument("--journal", type=int, default=0, help="open a journal of so many calls")
    asked = words.parse_args()
    ports: Any = multiprocessing.Queue()
    server = multiprocessing.Process(target=lambda: asyncio.run(serve(asked.latency, ports)), daemon=True)
    server.start()
    try:
        compare(ports.get(), asked)
    finally:
        server.terminate()
    if asked.journal:
        with tempfile.TemporaryDirectory() as folder:
            opening(Path(folder), asked.journal)


def compare(port: int, asked: argparse.Namespace) -> None:
    ideal = asked.concurrency / asked.latency
    clients: dict[str, Callable[[int], float]] = {
        "bare": lambda count: bare(port, count, asked.concurrency),
        "engine": lambda count: engine(port, count, asked.concurrency),
    }
    for client in clients.values():
        client(2 * asked.concurrency)  # imports, connections
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in clients}
    for _ in range(asked.times):
        for name, client in clients.items():
            cpu, began = time.process_time(), time.perf_counter()
            grown = client(asked.n)
            seconds = time.perf_counter() - began
            found[name].append((asked.n / seconds, 1000 * (time.process_time() - cpu) / asked.n, grown))
    print(f"{asked.n} calls, {asked.concurrency} at a time, {asked.latency:g} s each; ideal {ideal:.0f} calls/s")
    rates = {name: statistics.median(rate for rate, _, _ in runs) for name, runs in found.items()}
    for name, runs in found.items():
        cpu, grown = (statistics.median(run[place] for run in runs) for place in (1, 2))
        shares = f"{rates[name] / ideal:6.1%} of ideal  {rates[name] / rates['bare']:6.1%} of bare"
        print(f"{name:8} {rates[name]:7.1f} calls/s  {shares}  {cpu:5.2f} ms CPU a call  {grown:+.1f} MB in the second half")


def engine(port: int, count: int, concurrency: int) -> float:
    """Megabytes that the second half of the run added."""
    settings = EndpointSettings(base_url=f"http://127.0.0.1:{port}/v1", model="m", concurrency=concurrency, max_tokens=200)
    with (
        tempfile.TemporaryDirectory() as folder,
        CallEngine(settings, Path(folder), money=MoneySettings(price="free")) as calls,
    ):
        middle = 0.0
        for number, outcome in enumerate(calls.run(asks(count)), 1):
            assert outcome.cls == "ok", outcome.error
            middle = megabytes() if number == count // 2 else middle
        return megabytes() - middle


def asks(count: int) -> Iterator[Ask]:
    return (Ask("answer", ({"role": "user", "content": f"{PROMPT} {number}"},)) for number in range(count))


def bare(port: int, count: int, concurrency: int) -> float:
    asyncio.run(_bare(port, count, concurrency))
    return 0.0


async def _bare(port: int, count: int, concurrency: int) -> None:
    numbers = iter(range(count))

    async def worker() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in numbers:
            body = json.dumps({"model": "m", "messages": [{"role": "user", "content": f"{PROMPT} {number}"}]}).encode()
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0]))
        writer.close()

    await asyncio.gather(*(worker() for _ in range(concurrency)))


async def serve(latency: float, ports: Any) -> None:
    """Answer everything with the same reply."""
    reply = {
        "id": "1",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": TEXT}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 250, "completion_tokens": 120, "total_tokens": 370},
    }
    content = json.dumps(reply).encode()
    whole = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content) + content

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
                await asyncio.sleep(latency)
                writer.write(whole)
        except (ConnectionError, asyncio.IncompleteReadError):
            writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0, backlog=1024)
    ports.put(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def opening(folder: Path, count: int) -> None:
    journal, text = Journal(folder), "x" * 2500
    for number in range(count):
        intent = Intent(f"{number:064x}", 1, "answer", "m", f"{number}", 10)
        journal.intend(intent)
        line = {"class": "ok", "finish": "stop", "usage": [9, 0, 9], "cost": 5, "settled": True, "took": 0.2, "body": text}
        journal.settle(intent, line)
    journal.close()
    fresh = multiprocessing.get_context("spawn")
    told: Any = fresh.Queue()
    opener = fresh.Process(target=opened, args=(folder, told))
    opener.start()
    seconds, grown = told.get()
    opener.join()
    print(f"a journal of {count} calls, {journal.path.stat().st_size / 1e9:.2f} GB: opened in {seconds:.1f} s, {grown:.0f} MB")


def opened(folder: Path, told: Any) -> None:
    before, began = megabytes(), time.perf_counter()
    journal = Journal(folder)
    told.put((time.perf_counter() - began, megabytes() - before))
    journal.close()


def megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    main()
