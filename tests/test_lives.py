"""A paid dataset by the command line, over a knowledge base, with judge and closed book: whatever happens on the way, it is the
same to the byte, and it costs no more than its cap. Processes are killed with signal 9; the server is a real one with a book.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from fault_server import KEY, PRICE, Fault, FaultServer, Request, _draft, audit
from raglan.calls.asks import canonical
from raglan.knowledge import build_knowledge
from raglan.recipe import load_recipe
from raglan.synthesis import start
from test_judged import WEIGHTS, lines, name, reply

HERE = Path(__file__).parent
ENGINES = ("teacher", "verify.support.endpoint", "verify.closed_book.endpoint")
TWIN, LEAK = "0123456789", "abcdef0123"  # mills that many drafts are about
Live = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """Has the command line lived, killed as often as is said."""
    command, pipe = [sys.executable, str(HERE / "lives_worker.py")], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env={**os.environ, "CALLS_KEY": KEY}) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None

        def ordered(
            folder: Path, *words: str, calls: str, kills: int, seed: int, span: int, speed: float = 1.0
        ) -> dict[str, Any]:
            order = {
                "folder": str(folder), "words": words, "journal": str(folder / calls / "journal.jsonl"), "kills": kills,
                "seed": seed, "span": span, "speed": speed,
            }  # fmt: skip
            worker.stdin.write(json.dumps(order) + "\n")  # type: ignore[union-attr]
            worker.stdin.flush()  # type: ignore[union-attr]
            told: dict[str, Any] = json.loads(worker.stdout.readline())  # type: ignore[union-attr]
            return told

        yield ordered
        worker.stdin.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a knowledge base of towers, a student and an evaluation set of one question."""
    home = tmp_path_factory.mktemp("home")
    documents = [
        {"id": f"p{n}", "title": "Of Vessen", "text": f"The tower {n} of Vessen was built of grey stone by miller Odo{n} ."}
        for n in range(40)
    ]
    (home / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    held = {"id": "h", "query": f"When was the mill {LEAK} of Odo{int(LEAK, 16) % 40} opened?", "answers": ["nobody knows"]}
    (home / "held.jsonl").write_text(json.dumps(held) + "\n")
    tiny.llama(home / "student")
    tiny.sentence_encoder(home / "encoder")
    build_knowledge(load_recipe(written(home, "http://127.0.0.1:9/v1")).knowledge)
    return home


def written(home: Path, url: str, **synthesis: Any) -> Path:
    """The recipe, for a server."""
    endpoint = {"kind": "endpoint", "base_url": url, "model": "m", "api_key_env": "CALLS_KEY", "structured": "strict"}
    judge = {"endpoint": {**endpoint, "model": "j"}, "price": PRICE}
    tree = {
        "name": "lives", "seed": 1, "generator": {"model": "student"}, "retriever": {"index": "bm25"},
        "knowledge": {
            "path": "kb", "documents": "corpus.jsonl", "chunk": None, "indexes": {"bm25": {"kind": "bm25"}},
            "encoder": {"model": "encoder/encoder", "dtype": "float32"},
        },
        "decontaminate": {"sets": {"held": {"path": "held.jsonl"}}},
        "synthesis": {
            "path": "data", "n": 24, "from_scratch": 0.8, "passages": {"k": {3: 1, 5: 1}, "gold_absent": 0.1},
            "weights": WEIGHTS, "budget": {"tokenizer": "student", "max_length": 1900, "answer": 100},
            "decontaminate": "registered", "teacher": endpoint, "money": {"price": PRICE},
            "verify": {"support": {"kind": "judge", **judge}, "closed_book": {"what": "tag", **judge}}, **synthesis,
        },
    }  # fmt: skip
    path = home / "lives.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def teller(body: dict[str, Any]) -> str:
    """As `reply`; some drafts ask what others ask, some what is evaluated, and those over towers ask about a tower."""
    if name(body) == "DraftReply":
        asked = body["messages"][1]["content"]
        drawn = zlib.crc32(json.dumps(body["messages"][:2]).encode()) % 6
        if towers := re.findall(r"tower (\d+)", asked):
            fact = f"The tower {towers[0]} was built by miller Odo{towers[0]}."
            told = {"query": f"Who built the tower {towers[0]} of Vessen?", "facts": [fact, "It is of grey stone."]}
            return json.dumps(_draft(TWIN, asked) | told | {"answers": [f"Odo{towers[0]}"]})
        if drawn < 2:
            return json.dumps(_draft((TWIN, LEAK)[drawn], asked))
    towers = [] if name(body) else re.findall(r"Who built the tower (\d+)", body["messages"][-1]["content"])
    return f"Miller Odo{towers[-1]} built it." if towers else reply(body)


def tree(folder: Path) -> dict[str, bytes]:
    """All files of a dataset."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.timeout(600)
def test_one_at_a_time_sixty_four_any_latencies_and_kills_write_the_same_bytes(
    home: Path, live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every published file. Of a run that was killed cost.json also tells what is in doubt, so the manifest its other size."""
    monkeypatch.setenv("CALLS_KEY", KEY)
    monkeypatch.chdir(home)
    orders, found = [], {}
    with FaultServer(delay=0.001) as server:
        server.reply = teller
        path = written(home, server.url)

        def words(folder: str, concurrency: int) -> list[str]:
            own = [f"synthesis.path=data/{folder}", f"synthesis.calls=calls/{folder}"]
            return [*own, *(f"synthesis.{engine}.concurrency={concurrency}" for engine in ENGINES)]

        def noted(folder: str) -> None:
            found[folder] = tree(home / "data" / folder)
            audit(server, home / "calls" / folder)
            orders.append([request.content for request in server.log])
            server.log.clear()
            server._answered.clear()
            server._working.clear()

        for folder, concurrency in (("one", 1), ("many", 64)):
            start.run(load_recipe(path, words(folder, concurrency)), yes=True)
            noted(folder)
        draw = random.Random(4)
        server.faults = lambda number, request: Fault(delay=draw.uniform(0.001, 0.04))
        start.run(load_recipe(path, words("late", 64)), yes=True)
        noted("late")
        told = live(
            home, "synthesize", str(path), "--yes", *words("killed", 8), calls="calls/killed", kills=3, seed=3, span=30_000
        )
        noted("killed")
    assert told["deaths"] == 3, told
    assert len(set(map(tuple, orders))) == 4, "they were asked in one order, so nothing was tried"
    for folder in ("many", "late"):
        assert found[folder] == found["one"], folder
    one, killed = found["one"], found["killed"]
    assert set(one) == set(killed) >= {
        "plan/plan.jsonl", "plan/margins.json", "examples.jsonl", "train.jsonl", "split.json", "surplus.jsonl", "rejects.jsonl",
        "attempts.jsonl", "coverage.json", "leakage.json", "cost.json", "manifest.json",
    }  # fmt: skip
    assert {file for file in one if one[file] != killed[file]} <= {"cost.json", "manifest.json"}
    assert _sure(killed["cost.json"]) == _sure(one["cost.json"])
    manifests = [json.loads(some["manifest.json"]) for some in (one, killed)]
    for manifest in manifests:
        del manifest["files"]["cost.json"]
    assert manifests[0] == manifests[1]
    assert manifests[0]["kept"] > 15
    reasons = {f"{row['step']}: {row['reason']}" for row in lines(home / "data/one/rejects.jsonl")}
    assert reasons >= {"dedupe: exact_duplicate", "decontaminate: D1"}, "what depends on who stands first"
    support = Counter(row["synth"]["support"] for row in lines(home / "data/one/examples.jsonl"))
    assert {"judge", "string"} <= set(support)


def _sure(cost: bytes) -> list[dict[str, Any]]:
    """What a cost.json tells of requests whose end is known."""
    return [row for row in json.loads(cost)["rows"] if row["cls"] != "in_doubt"]


MIX = {
    "429": (Fault(429, headers={"Retry-After": "1"}), 0.02), "429 bare": (Fault(429), 0.02), "500": (Fault(500), 0.03),
    "503": (Fault(503), 0.02), "timeout": (Fault(delay=0.5), 0.02), "truncated": (Fault(finish="length"), 0.02),
    "broken JSON": (Fault(text='{"query": 7'), 0.03), "reset": (Fault(cut="reset"), 0.02),
    "reset in the body": (Fault(cut="middle"), 0.02), "short body": (Fault(cut="short"), 0.02),
    "content filter": (Fault(finish="content_filter"), 0.02), "refused": (Fault(400, code="content_filter"), 0.02),
    "HTML": (Fault(body="<html>busy</html>"), 0.02), "empty": (Fault(text=""), 0.02),
}  # fmt: skip


class Dear:
    """All of `MIX` at once, and every reply billed at all that its request may cost, or nearly: whoever reserves less, or
    charges less for a reply that was lost, is over the cap soon. `kinds` counts what it did."""

    def __init__(self, seed: int):
        self.draw, self.kinds = random.Random(seed), Counter[str]()

    def __call__(self, number: int, request: Request) -> Fault:
        usage = (len(canonical(request.body["messages"])), request.body["max_tokens"])
        point = self.draw.random()
        for kind, (fault, share) in MIX.items():
            point -= share
            if point < 0:
                self.kinds[kind] += 1
                return replace(fault, usage=usage)
        return Fault(usage=usage)


@pytest.mark.timeout(600)
def test_the_bill_stays_under_the_cap_through_all_faults_and_kills_at_once(
    home: Path, live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that bills every attempt, even of what it has replied to. A cap is reached: exit 3; a larger one goes on."""
    monkeypatch.setenv("CALLS_KEY", KEY)
    with FaultServer(delay=0.002, idempotent=False) as server:
        server.reply, server.faults = teller, (mix := Dear(5))
        path = written(home, server.url, n=16)

        def lived(cap: str, kills: int) -> tuple[int, str]:
            told = live(
                home, "synthesize", str(path), f"synthesis.money.cap_usd={cap}", "synthesis.path=data/dear",
                "synthesis.calls=calls/dear", *(f"synthesis.{one}.timeout=0.3" for one in ENGINES),
                *(f"synthesis.{one}.concurrency=8" for one in ENGINES),
                calls="calls/dear", kills=kills, seed=kills, span=12_000, speed=50.0,
            )  # fmt: skip
            assert told["deaths"] == kills, told
            manifest = json.loads((home / "data/dear/manifest.json").read_text())
            until = time.monotonic() + 20
            while any(not request.status for request in server.log) and time.monotonic() < until:
                time.sleep(0.01)  # what nobody waits for any longer is billed, too
            assert server.bill <= float(cap) * 10**9
            return told["code"], manifest["stopped"]

        for cap, kills in (("0.8", 1), ("1.2", 1)):
            code, stopped = lived(cap, kills)
            assert (code, stopped.partition(":")[0]) == (3, "cap")
            assert server.bill > 0.3 * float(cap) * 10**9
        code, stopped = lived("100", 1)
        assert (code in (0, 3), stopped) == (True, "")
        assert set(mix.kinds) == set(MIX), "something never happened"
        server.faults = lambda number, request: Fault(usage=(90_000, 5))
        before = len(server.log)
        words = ["synthesis.money.cap_usd=100", "synthesis.path=data/over", "synthesis.calls=calls/over"]
        told = live(home, "synthesize", str(path), *words, calls="calls/over", kills=0, seed=0, span=1)
        assert told["code"] == 3
        assert "more than its reserve of" in told["said"]
        assert len(server.log) - before <= 16, "what was under way, and nothing more"
