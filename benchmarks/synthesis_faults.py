"""A whole synthesis while everything fails: 2,000 cells, 20 × kill -9, a key refused, a quota gone, a cap reached.

    make bench-synthesis-faults        (some minutes; `-n`, `--kills`, `--latency` for others)

A real server on this machine speaks OpenAI's protocol, writes what it is asked for, fails as `tests/fault_server.py` says, and
keeps a book of its own. `tests/synthesis_worker.py` runs the driver against it in a process that is killed at random moments:

    stormy, to a cap    half of the kills, until the cap stops it: bill ≤ ledger ≤ cap
    stormy, to the end  a larger cap, the other kills, one 401 and one quota that is gone
    straight            another server with the lasting faults alone (what a reply is, not whether it comes), no kill

Then the books are compared, to the token, and the two datasets, byte by byte (calls' names apart: the port is in them).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))

from fault_server import KEY, FaultServer, Storm, audit, author  # noqa: E402
from raglan.calls.money import dollars  # noqa: E402

FILES = ("examples.jsonl", "surplus.jsonl", "rejects.jsonl", "attempts.jsonl", "coverage.json", "train.jsonl", "dev.jsonl")
CAPPED = 5
HOSTED = re.compile(rb'"key": "[0-9a-f]{64}"')


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("-n", type=int, default=2000, help="cells")
    words.add_argument("--kills", type=int, default=20)
    words.add_argument("--latency", type=float, default=0.1, help="seconds that a reply takes")
    words.add_argument("--concurrency", type=int, default=32)
    asked = words.parse_args()
    os.environ["CALLS_KEY"] = KEY
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), asked)


def compare(folder: Path, asked: argparse.Namespace) -> None:
    cap = round(0.005 * asked.n, 2)
    storm = Storm(fatal=(3 * asked.n, 4 * asked.n))
    began = time.perf_counter()
    with FaultServer(delay=asked.latency) as server:
        server.reply, server.faults = author, storm
        first = work(server, folder / "stormy", asked, kills=asked.kills // 2, cap=str(cap))
        stopped = audit(server, folder / "stormy/calls")
        ok("the cap stopped it, and was not exceeded", first["code"] == CAPPED and stopped["ledger"] <= cap * 1e9)
        print(f"    cap ${cap:.6f}, ledger {dollars(stopped['ledger'])}, bill {dollars(stopped['bill'])}")
        second = work(server, folder / "stormy", asked, kills=asked.kills - first["deaths"], cap="1000")
        found = audit(server, folder / "stormy/calls")
    deaths = first["deaths"] + second["deaths"]
    print(
        f"stormy: {time.perf_counter() - began:.0f} s, {deaths} × kill -9, stopped {second['stopped']} times for key or quota"
    )
    for kind, count in sorted(storm.kinds.items()):
        print(f"    {kind:28} {count:6}")
    began = time.perf_counter()
    with FaultServer(delay=asked.latency) as server:
        server.reply, server.faults = author, Storm(passing=False)
        straight = work(server, folder / "straight", asked, kills=0)
        calm = audit(server, folder / "straight/calls")
    print(f"straight: {time.perf_counter() - began:.0f} s")
    print(f"{'':24} {'stormy':>14} {'straight':>14}")
    for name, value in found.items():
        print(f"{name:24} {value:14} {calm[name]:14}")
    bound = deaths * asked.concurrency
    ok("every cell has an attempt", attempts(folder / "stormy") == set(range(asked.n)))
    ok(f"in doubt at most deaths × concurrency = {bound}", found["in doubt"] <= bound)
    ok(
        "nothing was billed and not read but what was in doubt or lost",
        found["billed and not read"] <= found["in doubt"] + found["lost"],
    )
    ok("the calls with a good reply are the same", found["calls done"] == calm["calls done"])
    if calm["lost"]:  # a starved machine times out by itself
        print(f"n/a  ledger and bill of the straight run: {calm['lost']} of its replies timed out")
    else:
        ok("without kills and lost replies, ledger and bill are equal", calm["ledger"] == calm["bill"])
    ok(f"{len(FILES)} files are equal", all(equal(folder, file) for file in FILES) and second["code"] == straight["code"])
    ok("the key is in no file", not any(KEY.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file()))
    told = json.loads((folder / "stormy/data/coverage.json").read_text(encoding="utf-8"))
    print(f"{told['requested']} requested, {told['kept']} kept, {told['attempts']} attempts; exit {second['code']}")
    for reason, count in told["funnel"].items():
        print(f"    {reason:32} {count:6}")


def work(server: FaultServer, folder: Path, asked: argparse.Namespace, *, kills: int, cap: str | None = None) -> dict[str, Any]:
    numbers = [asked.n, kills, 11, asked.concurrency, *([cap] if cap else [])]
    command = [sys.executable, str(TESTS / "synthesis_worker.py"), server.url, str(folder), *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True)
    told: dict[str, Any] = json.loads(done.stdout or "{}")
    if told.get("code") not in (0, 3, CAPPED):
        raise SystemExit(done.stderr)
    return told


def attempts(folder: Path) -> set[int]:
    return {json.loads(line)["cell"] for line in (folder / "data/attempts.jsonl").read_text(encoding="utf-8").splitlines()}


def equal(folder: Path, file: str) -> bool:
    killed, straight = (HOSTED.sub(b"", (folder / name / "data" / file).read_bytes()) for name in ("stormy", "straight"))
    return killed == straight


FAULTS: Counter[str] = Counter()


def ok(what: str, holds: bool) -> None:
    FAULTS["FAIL"] += not holds
    print(f"{'OK' if holds else 'FAIL':4} {what}")


if __name__ == "__main__":
    main()
    sys.exit(1 if FAULTS["FAIL"] else 0)
