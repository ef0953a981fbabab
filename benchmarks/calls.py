"""The call engine against a bare client: calls a second, CPU a call, memory.

    python benchmarks/calls.py                      (two minutes on 2 cores; `-n`, `--times`, `--concurrency`, `--latency`)
    python benchmarks/calls.py --many 100000        (a minute: the memory of so many calls, the server answering at once)
    python benchmarks/calls.py --journal 1000000    (three minutes and 3 GB of disk: a journal of so many calls is opened)
    make bench-calls                                (all three)

A server in a process of its own answers every request after 200 ms. Two clients ask it by turns, 64 requests at a time:

    bare     asyncio over 64 sockets that stay open: writes a request, reads the reply, keeps nothing
    engine   raglan's: keys, journal with intents and outcomes, money, gate, aiohttp

Ideal are concurrency / latency calls a second. Printed are calls a second, the share of the ideal and of the bare client's, and
CPU a call (of the whole client process, so it counts on a busy machine as well). Wanted are 95 % of the ideal or, where the
bare client misses that by itself because the machine is busy, 95 % of the bare client's; at most 1.5 ms of CPU a call; at most
50 MB more held after 100,000 calls than after the first thousand; a journal of a million calls of 3 kB open in 60 s and 500 MB.
Each verdict is a line with OK or FAIL; the exit status is 1 after any FAIL. Seconds in which a process could run and had no
core, because others had it, are told where the system counts them (Linux); the opening of a journal is judged without them.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raglan.calls import Ask, CallEngine, Outcome
from raglan.calls.journal import Intent, Journal
from raglan.recipe import EndpointSettings, MoneySettings

TEXT = "A reply of some length. " * 20
PROMPT = "A question with passages. " * 40
SHARE, CPU_MS, GROWN_MB, OPEN_SECONDS, OPEN_MB = 0.95, 1.5, 50, 60, 500
WARM = 1000


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("-n", type=int, default=6400, help="calls a run")
    words.add_argument("--times", type=int, default=2, help="runs of each client")
    words.add_argument("--concurrency", type=int, default=64)
    words.add_argument("--latency", type=float, default=0.2, help="seconds")
    words.add_argument("--many", type=int, default=0, help="instead: the memory of so many calls, without latency")
    words.add_argument("--journal", type=int, default=0, help="instead: open a journal of so many calls")
    asked = words.parse_args()
    if asked.journal:
        with tempfile.TemporaryDirectory() as folder:
            good = opening(Path(folder), asked.journal)
    else:
        good = with_server(
            0.0 if asked.many else asked.latency, lambda port: many(port, asked) if asked.many else compare(port, asked)
        )
    sys.exit(not good)


def with_server(latency: float, act: Callable[[int], bool]) -> bool:
    fresh = multiprocessing.get_context("spawn")
    ports: Any = fresh.Queue()
    server = fresh.Process(target=serve, args=(latency, ports), daemon=True)
    server.start()
    try:
        return act(ports.get())
    finally:
        server.terminate()


def compare(port: int, asked: argparse.Namespace) -> bool:
    ideal = asked.concurrency / asked.latency
    clients: dict[str, Callable[[int], float]] = {
        "bare": lambda count: asyncio.run(bare(port, count, asked.concurrency)),
        "engine": lambda count: engine(port, count, asked.concurrency),
    }
    for client in clients.values():
        client(2 * asked.concurrency)  # imports
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in clients}
    for _ in range(asked.times):
        for name, client in clients.items():
            cpu, began = time.process_time(), time.perf_counter()
            without = client(asked.n)
            seconds = time.perf_counter() - began
            found[name].append((asked.n / seconds, 1000 * (time.process_time() - cpu) / asked.n, without / seconds))
    print(f"{asked.n} calls, {asked.concurrency} at a time, {asked.latency:g} s each; ideal {ideal:.0f} calls/s")
    rates, cpus, starved = (
        {name: statistics.median(run[place] for run in runs) for name, runs in found.items()} for place in range(3)
    )
    for name, rate in rates.items():
        shares = f"{rate / ideal:6.1%} of ideal  {rate / rates['bare']:6.1%} of bare"
        told = f"without a core {starved[name]:.0%} of the time"
        print(f"{name:8} {rate:7.1f} calls/s  {shares}  {cpus[name]:5.2f} ms CPU a call, {told}")
    return all(
        [
            throughput(rates["engine"] / ideal, rates["bare"] / ideal),
            verdict("CPU", f"{cpus['engine']:.2f} ms a call", f"at most {CPU_MS:g}", good=cpus["engine"] <= CPU_MS),
        ]
    )


def throughput(engine: float, bare: float) -> bool:
    """Shares of the ideal. A machine on which the bare client misses it is busy."""
    if bare < SHARE:
        told = f"{engine / bare:.1%} of the bare client's"
        return verdict("throughput", told, f"at least {SHARE:.0%}, the machine is busy", good=engine >= SHARE * bare)
    return verdict("throughput", f"{engine:.1%} of the ideal", f"at least {SHARE:.0%}", good=engine >= SHARE)


def many(port: int, asked: argparse.Namespace) -> bool:
    """What a long run holds more than a short one: the peak, from the first thousand calls on."""
    early = 0.0
    cpu, began = time.process_time(), time.perf_counter()
    for number, outcome in enumerate(outcomes(port, asked.many + WARM, asked.concurrency), 1):
        assert outcome.cls == "ok", outcome.error
        early = peak() if number == WARM else early
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    grown = peak() - early
    took = f"{asked.many:,} calls in {seconds:.0f} s, {1000 * cpu / asked.many:.2f} ms CPU a call"
    told = f"{took}; peak {peak():.0f} MB, {grown:.1f} MB more than after {WARM:,}"
    allowed = GROWN_MB * max(1.0, asked.many / 100_000)
    return verdict("memory", told, f"at most {allowed:.0f}", good=grown <= allowed)


def verdict(what: str, told: str, wanted: str, *, good: bool) -> bool:
    print(f"{what}: {told} ({wanted}: {'OK' if good else 'FAIL'})")
    return good


def engine(port: int, count: int, concurrency: int) -> float:
    """Seconds in which its threads had no core."""
    before = last = without_core()
    for number, outcome in enumerate(outcomes(port, count, concurrency), 1):
        assert outcome.cls == "ok", outcome.error
        last = without_core() if number == count else last  # afterwards its thread is gone
    return last - before


def outcomes(port: int, count: int, concurrency: int) -> Iterator[Outcome]:
    settings = EndpointSettings(base_url=f"http://127.0.0.1:{port}/v1", model="m", concurrency=concurrency, max_tokens=200)
    with (
        tempfile.TemporaryDirectory() as folder,
        CallEngine(settings, Path(folder), money=MoneySettings(price="free")) as calls,
    ):
        yield from calls.run(asks(count))


def asks(count: int) -> Iterator[Ask]:
    return (Ask("answer", ({"role": "user", "content": f"{PROMPT} {number}"},)) for number in range(count))


async def bare(port: int, count: int, concurrency: int) -> float:
    """Seconds in which it had no core."""
    numbers, before = iter(range(count)), without_core()

    async def worker() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in numbers:
            body = json.dumps({"model": "m", "messages": [{"role": "user", "content": f"{PROMPT} {number}"}]}).encode()
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0]))
        writer.close()

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return without_core() - before


class Server(asyncio.Protocol):
    """A connection: every request gets the same reply, `latency` after its last byte."""

    latency = 0.0
    reply = b""

    def connection_made(self, transport: Any) -> None:
        self.transport, self.come, self.loop = transport, bytearray(), asyncio.get_running_loop()

    def data_received(self, data: bytes) -> None:
        self.come += data
        head = self.come.find(b"\r\n\r\n")
        if head < 0 or len(self.come) < head + 4 + int(
            self.come[:head].lower().split(b"content-length: ")[1].split(b"\r\n")[0]
        ):
            return
        self.come.clear()
        self.loop.call_later(self.latency, self.answer)

    def answer(self) -> None:
        self.transport.write(self.reply)


def serve(latency: float, ports: Any) -> None:
    usage = {"prompt_tokens": 250, "completion_tokens": 120, "total_tokens": 370}
    message = {"role": "assistant", "content": TEXT}
    reply = {"id": "1", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage}
    content = json.dumps(reply).encode()
    Server.latency = latency
    Server.reply = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content) + content

    async def listen() -> None:
        server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0, backlog=1024)
        ports.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(listen())


def opening(folder: Path, count: int) -> bool:
    fresh = multiprocessing.get_context("spawn")
    told: Any = fresh.Queue()
    for act in (written, opened):  # each in a process of its own
        process = fresh.Process(target=act, args=(folder, count, told))
        process.start()
        seconds, cpu, without, grown = told.get()
        process.join()
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e9
    took = f"{seconds:.1f} s ({cpu:.1f} s CPU, {without:.1f} s without a core)"
    found = f"of {count:,} calls, {size:.2f} GB, opened in {took}, peak {grown:.0f} MB more"
    wanted = f"at most {OPEN_SECONDS} s with a core and {OPEN_MB} MB"
    return verdict("journal", found, wanted, good=seconds - without <= OPEN_SECONDS and grown <= OPEN_MB)


def written(folder: Path, count: int, told: Any) -> None:
    journal, text = Journal(folder), "x" * 2500
    for number in range(count):
        intent = Intent(name(number), 1, "answer", "m", f"{number}", 10)
        journal.intend(intent)
        line = {"class": "ok", "finish": "stop", "usage": [9, 0, 9], "cost": 5, "settled": True, "took": 0.2, "body": text}
        journal.settle(intent, line)
    journal.close()
    told.put((0.0, 0.0, 0.0, 0.0))


def opened(folder: Path, count: int, told: Any) -> None:
    before, without, cpu, began = peak(), without_core(), time.process_time(), time.perf_counter()
    journal = Journal(folder)
    seconds, cpu, without = time.perf_counter() - began, time.process_time() - cpu, without_core() - without
    grown = peak() - before
    assert all(journal.answer(name(number)) for number in range(0, count, count // 100))
    journal.close()
    told.put((seconds, cpu, without, grown))


def name(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def without_core() -> float:
    """Seconds in which the process's threads could run and had no core; 0 where the system does not count them."""
    counted = [path.read_text().split() for path in Path("/proc/self/task").glob("*/schedstat")]
    return sum(int(fields[1]) for fields in counted) / 1e9


def peak() -> float:
    """MB, the most that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
