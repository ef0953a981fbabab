"""The call engine against a real server with faults; after every test the server's book and the client's are compared."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import logging
import os
import queue
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from decimal import Decimal
from email.utils import formatdate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from pydantic import BaseModel, ValidationError

from calls_worker import Word
from fault_server import KEY, PRICE, Fault, FaultServer, Request, seeded
from raglan import cli
from raglan.calls import Ask, CallEngine, Outcome, Usage, places
from raglan.calls.asks import canonical
from raglan.calls.classify import Wire, classify
from raglan.calls.endpoint import Aiohttp, Endpoint, OpenAI, open_endpoint
from raglan.calls.estimate import Cell, Step, estimate, extrapolate, share_out
from raglan.calls.journal import NAME, Intent, Journal, read_ledger
from raglan.calls.limits import Breaker, Bucket, Clock, Gate, Server, backoff, retry_after
from raglan.calls.money import Ledger, Price, dollars, prompt_bound
from raglan.calls.structured import parse, strict_schema
from raglan.errors import CallsStopped, CheckpointError, GeneratorError, RecipeError
from raglan.recipe import EndpointSettings, MoneySettings
from raglan.synthesis.endpoint import cost

HERE = Path(__file__).parent
MONEY = MoneySettings(price=PRICE)


class Desk:
    """A server, a journal, and the engines between them."""

    def __init__(self, folder: Path):
        self.folder, self.servers, self.server = folder / "calls", [], FaultServer(delay=0.002)
        self.server.__enter__()

    def engine(self, *, money: MoneySettings = MONEY, speed: float = 100.0, **settings: Any) -> CallEngine:
        shared = {"base_url": self.server.url, "model": "m", "api_key_env": "CALLS_KEY", "concurrency": 8, "timeout": 20}
        return CallEngine(EndpointSettings(**{**shared, **settings}), self.folder, money=money, clock=Clock(speed))

    def run(self, asks: Any, **settings: Any) -> list[Outcome]:
        with self.engine(**settings) as engine:
            return list(engine.run(asks))

    def stopped(self, asks: Any, **settings: Any) -> tuple[list[Outcome], CallsStopped]:
        """What came before it stopped, and why it did."""
        came: list[Outcome] = []
        with self.engine(**settings) as engine:
            try:
                for outcome in engine.run(asks):
                    came.append(outcome)
            except CallsStopped as why:
                return came, why
        raise AssertionError("the run was not stopped")

    def compare(self) -> None:
        """The two books."""
        journal = Journal(self.folder)
        lines, ledger = list(journal.lines()), journal.ledger
        journal.close()
        intents = Counter(line["idem"] for line in lines if line["kind"] == "intent")
        assert Counter(request.idem for request in self.server.log) <= intents, "a request without an intent"
        assert self.server.bill <= ledger.spent, "the server bills more than the ledger knows"
        outcomes = [line for line in lines if line["kind"] == "outcome"]
        told = [line for line in outcomes if line["class"] != "transient" or sum(line["usage"])]
        told = [line for line in told if "misreported" not in line]
        assert all(line["cost"] == Price.of(MONEY).cost(Usage(*line["usage"])) for line in told) or ledger.spent == 0
        if all(line["settled"] for line in outcomes) and not ledger.doubts.calls and not self.unknown:
            assert self.server.bill == ledger.spent
        for path in self.folder.rglob("*"):
            assert KEY.encode() not in path.read_bytes(), f"the key is in {path.name}"

    unknown = False  # whether a reply without usage was charged at its reserve


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.setenv("CALLS_KEY", KEY)
    desk = Desk(tmp_path)
    yield desk
    desk.server.__exit__()
    desk.compare()


def ask(number: int, schema: type[BaseModel] | None = None, **more: Any) -> Ask:
    return Ask("answer", ({"role": "user", "content": f"q{number}"},), schema, {"max_tokens": 80}, ref=str(number), **more)


def asks(count: int, schema: type[BaseModel] | None = None) -> Iterator[Ask]:
    return (ask(number, schema) for number in range(count))


def tries(server: FaultServer) -> Counter[str]:
    return Counter(request.content for request in server.log)


def by_content(fault: Fault, share: float) -> Any:
    """Fails by what is asked and how often it was, so that the order of the requests does not matter."""

    def choose(number: int, request: Request) -> Fault | None:
        name = request.content + request.idem.rpartition("-")[2]
        return fault if hashlib.sha256(name.encode()).digest()[0] < 256 * share else None

    return choose


def first_only(fault: Fault) -> Any:
    return lambda number, request: fault if number == 0 else None


# keys and the plain way


def test_a_call_is_known_by_its_content(desk: Desk) -> None:
    with desk.engine() as engine:
        key = engine.key(ask(1))
        assert len(key) == 64
        assert key == engine.key(Ask("other", ask(1).messages, None, {"max_tokens": 80}, ref="x", depth=3))
        others = [ask(2), ask(1, Word), ask(1, draw=1), Ask("answer", ask(1).messages, None, {"max_tokens": 81})]
        assert len({key, *map(engine.key, others)}) == 5
    with desk.engine(model="n") as engine:
        assert engine.key(ask(1)) != key


def test_what_the_engine_says_itself_is_no_sampling() -> None:
    with pytest.raises(RecipeError, match="says n"):
        Ask("answer", ask(1).messages, None, {"n": 2})
    with pytest.raises(RecipeError, match="no message"):
        Ask("answer", ())


def test_replies_are_kept_and_never_asked_for_again(desk: Desk) -> None:
    first = desk.run(asks(40, Word))
    assert {outcome.cls for outcome in first} == {"ok"}
    assert not any(outcome.reused for outcome in first)
    count = len(desk.server.log)
    assert count == 41  # one of them the probe
    again = desk.run(asks(40, Word))
    assert len(desk.server.log) == count
    assert all(outcome.reused and not outcome.cost_nano for outcome in again)
    assert {o.ask.ref: o.value for o in first} == {o.ask.ref: o.value for o in again}


def test_draws_are_calls_of_their_own_and_equal_asks_are_one(desk: Desk) -> None:
    outcomes = desk.run([ask(1), ask(1, draw=1), ask(1)])
    assert len(outcomes) == 3
    assert len(desk.server.log) == 2
    assert sum(outcome.reused for outcome in outcomes) == 1


def test_fixed_parts_stay_equal(desk: Desk) -> None:
    desk.server.modes = ("text",)
    system = {"role": "system", "content": "You are a careful reader."}
    many = (Ask("s", (system, {"role": "user", "content": f"q{i}"}), Word, {"max_tokens": 80}) for i in range(150))
    assert len(desk.run(many)) == 150
    bodies = [request.body for request in desk.server.log[2:]]
    assert len(bodies) == 150
    assert len({json.dumps([{**body, "messages": body["messages"][:-1]}]) for body in bodies}) == 1
    assert all(len(body["messages"]) == 2 for body in bodies)


def test_an_empty_list_is_done(desk: Desk) -> None:
    class Rows(BaseModel):
        rows: list[str]

    desk.server.reply = lambda body: '{"rows": []}'
    assert [outcome.value for outcome in desk.run([ask(1, Rows)], structured="strict")] == [Rows(rows=[])]
    assert desk.run([ask(1, Rows)], structured="strict")[0].reused
    assert len(desk.server.log) == 1


def test_deeper_asks_go_first(desk: Desk) -> None:
    def follow(outcome: Outcome) -> list[Ask]:
        number = int(outcome.ask.ref)
        return [ask(100 * number + i, depth=1) for i in range(1, 5)] if outcome.ask.depth == 0 else []

    with desk.engine(concurrency=1) as engine:
        outcomes = list(engine.run((ask(number) for number in range(1, 7)), follow=follow))
    order = [json.loads(request.content)[0]["content"] for request in desk.server.log]
    assert len(outcomes) == len(order) == 30
    deep = [int(content[1:]) >= 100 for content in order]
    assert sum(not one for one in deep[:8]) <= 3, "brainstorms ran ahead of what they led to"
    assert order.index("q6") > order.index("q404")


def test_asks_are_read_as_far_as_needed(desk: Desk) -> None:
    read = 0

    def endless() -> Iterator[Ask]:
        nonlocal read
        while True:
            read += 1
            yield ask(read)

    with desk.engine(concurrency=4) as engine:
        run = engine.run(endless())
        for _ in range(10):
            next(run)
        run.close()
    assert read <= 10 + 2 * 4 + 2
    assert len(desk.server.log) <= 10 + 2 * 4


# what comes back


@pytest.mark.parametrize(
    ("fault", "cls", "requests"),
    [
        (Fault(finish="content_filter"), "refused", 1),
        (Fault(400, code="content_filter"), "refused", 1),
        (Fault(400, code="context_length_exceeded"), "permanent", 1),
        (Fault(413), "permanent", 1),
        (Fault(422), "permanent", 1),
        (Fault(finish="tool_calls"), "permanent", 1),
        (Fault(finish="length"), "truncated", 1),
        (Fault(503), "transient", 3),
        (Fault(408), "transient", 3),
        (Fault(409), "transient", 3),
        (Fault(200, body=""), "transient", 3),
        (Fault(200, body="<html>busy</html>"), "transient", 3),
        (Fault(200, text="  "), "transient", 3),
    ],
    ids=lambda value: getattr(value, "body", None) or str(value)[:50],
)
def test_classes(desk: Desk, fault: Fault, cls: str, requests: int) -> None:
    desk.server.faults = lambda number, request: fault
    desk.unknown = fault.body is not None
    (outcome,) = desk.run([ask(1)], attempts=3)
    assert (outcome.cls, outcome.value, len(desk.server.log)) == (cls, None, requests)
    assert outcome.error
    desk.server.faults = lambda number, request: None  # a failure is no cache: it is asked again
    (outcome,) = desk.run([ask(1)])
    assert (outcome.cls, outcome.reused, len(desk.server.log)) == ("ok", False, requests + 1)


@pytest.mark.parametrize("cut", ["short", "reset", "middle"])
def test_a_broken_connection_is_transient(desk: Desk, cut: str) -> None:
    desk.server.faults = first_only(Fault(cut=cut))
    (outcome,) = desk.run([ask(1)])
    assert (outcome.cls, outcome.calls, len(desk.server.log)) == ("ok", 2, 2)
    assert desk.server.log[0].idem == desk.server.log[1].idem, "nobody knows what became of it, so it is the same request"
    assert desk.server.log[1].again
    assert desk.server.bill < outcome.cost_nano  # billed once, charged also at the reserve


def test_a_server_that_is_not_there_costs_nothing(desk: Desk) -> None:
    (outcome,) = desk.run([ask(1)], base_url="http://127.0.0.1:9/v1", attempts=2)
    assert (outcome.cls, outcome.cost_nano, outcome.calls) == ("transient", 0, 2)


def test_a_timeout_is_charged_at_the_reserve(desk: Desk) -> None:
    desk.server.faults = first_only(Fault(delay=0.8))
    engine = desk.engine(timeout=0.4)
    with engine:
        (outcome,) = engine.run([ask(1)])
        reserve = engine.reserve(ask(1))[1]
        rows = {row.cls: row.nano for row in engine.ledger()}
    assert outcome.cls == "ok"
    assert rows["transient"] % reserve == 0 < rows["transient"]
    assert desk.server.bill <= rows["transient"] + rows["ok"]


def test_malformed_is_repaired_once(desk: Desk) -> None:
    desk.server.faults = first_only(Fault(text='Sure: {"word": "x", "coun'))
    (outcome,) = desk.run([ask(1, Word)], structured="json")
    assert (outcome.cls, outcome.calls) == ("ok", 2)
    repair = desk.server.log[1].body
    assert repair["temperature"] == 0
    assert repair["messages"][-2] == {"role": "assistant", "content": 'Sure: {"word": "x", "coun'}
    assert "no JSON object" in repair["messages"][-1]["content"]
    assert desk.run([ask(1, Word)], structured="json")[0].reused, "the repaired reply answers the first ask"
    assert len(desk.server.log) == 2


def test_malformed_twice_is_rejected_with_its_text(desk: Desk) -> None:
    desk.server.faults = lambda number, request: Fault(text='{"word": "x", "count": "many"}')
    (outcome,) = desk.run([ask(1, Word)], structured="strict")
    assert (outcome.cls, outcome.value, outcome.raw) == ("malformed", None, '{"word": "x", "count": "many"}')
    assert "count" in outcome.error
    assert len(desk.server.log) == 2


def test_a_repair_that_was_not_made_is_made_by_the_next_run(desk: Desk) -> None:
    desk.server.faults = lambda number, request: Fault(text="no") if number == 0 else Fault(401)
    came, why = desk.stopped([ask(1, Word)], structured="json")
    assert (came, why.reason) == ([], "fatal")
    desk.server.faults = lambda number, request: None
    (outcome,) = desk.run([ask(1, Word)], structured="json")
    assert (outcome.cls, outcome.calls) == ("ok", 1)
    contents = [request.content for request in desk.server.log]
    assert contents[0] != contents[1] == contents[2], "the malformed reply was paid twice"


def test_engines_that_share_a_journal_share_the_cap(desk: Desk) -> None:
    shared = Journal(desk.folder)
    money = MoneySettings(price=PRICE, cap_usd="0.006")
    settings = {"base_url": desk.server.url, "api_key_env": "CALLS_KEY"}
    teacher, judge = (CallEngine(EndpointSettings(model=name, **settings), shared, money=money) for name in "ab")
    assert len(list(teacher.run(asks(5)))) == 5
    with pytest.raises(CallsStopped, match="may cost"):
        list(judge.run(asks(50)))
    assert desk.server.bill <= 6_000_000
    assert {row.model for row in judge.ledger()} == {"a", "b"}
    shared.close()


def test_truncated_is_asked_once_more_if_the_recipe_allows(desk: Desk) -> None:
    desk.server.faults = lambda number, request: Fault(finish="length") if request.body["max_tokens"] < 200 else None
    (outcome,) = desk.run([ask(1)], larger_limit=200)
    assert (outcome.cls, [request.body["max_tokens"] for request in desk.server.log]) == ("ok", [80, 200])
    assert desk.run([ask(1)], larger_limit=200)[0].reused


@pytest.mark.parametrize(("modes", "probes"), [(("strict", "json", "text"), 1), (("json", "text"), 2), (("text",), 2)])
def test_what_the_endpoint_supports_is_found_out_once(desk: Desk, modes: tuple[str, ...], probes: int) -> None:
    desk.server.modes = modes
    assert {outcome.cls for outcome in desk.run(asks(5, Word))} == {"ok"}
    assert len(desk.server.log) == probes + 5
    form = desk.server.log[-1].body.get("response_format", {}).get("type")
    assert form == {"strict": "json_schema", "json": "json_object", "text": None}[modes[0]]
    desk.run(asks(7, Word))
    assert len(desk.server.log) == probes + 7


@pytest.mark.parametrize(
    "text",
    [
        '{"score": 7.5}',
        '```json\n{"score": 7.5}\n```',
        '```\n{"score": 7.5}\n```',
        'My judgement: {"score": 7.5}. It could be {better}.',
        '{not json} but {"score": "7.5"}',
        "7.5",
        "７.５",
        '{"score": ７．５}',
        '{"score": "７.５"}',
    ],
)
def test_replies_that_hold_a_score(text: str) -> None:
    class Score(BaseModel):
        score: float

    value, errors = parse(text, Score)
    assert (value, errors) == (Score(score=7.5), "")


@pytest.mark.parametrize("text", ["__import__('os').getcwd()", "", "{", "[1, 2]", '{"word": 1}', "{" * 3000])
def test_replies_that_hold_nothing(text: str) -> None:
    value, errors = parse(text, Word)
    assert value is None
    assert errors


def test_a_strict_schema_requires_everything() -> None:
    class Part(BaseModel):
        properties: list[str] = []

    class Whole(BaseModel):
        default: int = 3
        part: Part

    schema = strict_schema(Whole)
    assert schema["required"] == ["default", "part"]
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Part"]["required"] == ["properties"]
    assert schema["properties"]["part"] == {"$ref": "#/$defs/Part"}
    assert "default" not in schema["properties"]["default"]


def test_half_a_pair_is_no_poison(desk: Desk) -> None:
    """A reply that was cut within an emoji can be written down, so that it is not asked for again and again."""
    desk.server.faults = lambda number, request: Fault(text=f"so \ud83d{number}", finish="stop" if number else "length")
    cut, whole = sorted(desk.run(asks(2), concurrency=1), key=lambda outcome: outcome.ask.ref)
    assert (cut.cls, cut.raw, whole.value) == ("truncated", "so \ufffd0", "so \ufffd1")
    assert [outcome.reused for outcome in desk.run([ask(1)])] == [True]


def test_what_is_no_completion_is_charged_at_the_reserve() -> None:
    whole = {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 3}}
    assert classify(Wire(200, json.dumps(whole))).usage is None  # half a bill is none
    assert classify(Wire(201, json.dumps(whole))).cls == "ok"
    for wire in (Wire(204), Wire(200, "[" * 100_000)):
        reply = classify(wire)
        assert (reply.cls, reply.usage, reply.billed) == ("transient", None, True)


@pytest.mark.parametrize(
    "said",
    [
        {"prompt_tokens": -90_000, "completion_tokens": 5},
        {"prompt_tokens": 10, "completion_tokens": -5},
        {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": -1},
        {"prompt_tokens": True, "completion_tokens": 5},
        {"prompt_tokens": 10, "completion_tokens": False},
        {"prompt_tokens": 10.5, "completion_tokens": 5},
        {"prompt_tokens": float("nan"), "completion_tokens": 5},
        {"prompt_tokens": 10, "completion_tokens": float("inf")},
        {"prompt_tokens": "10", "completion_tokens": 5},
        {"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": -4}},
        {"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": "four"}},
        {"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": "none"},
        [10, 5],
    ],
)
def test_usage_that_is_no_count_is_no_usage(said: Any) -> None:
    body = {"choices": [{"message": {"content": "好"}, "finish_reason": "stop"}], "usage": said}
    reply = classify(Wire(200, json.dumps(body)))
    assert (reply.cls, reply.text, reply.usage, reply.billed) == ("ok", "好", None, True)
    assert "no count of tokens" in reply.misreported


def test_usage_that_lacks_what_may_be_lacking_is_usage() -> None:
    body = {
        "choices": [{"message": {"content": "x"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 10, "completion_tokens": None, "total_tokens": 14, "prompt_tokens_details": None},
    }
    reply = classify(Wire(200, json.dumps(body)))
    assert (reply.usage, reply.misreported) == (Usage(10, 0, 4), "")
    assert classify(Wire(200, json.dumps({**body, "usage": None}))).misreported == "", "not reported at all"


def test_negative_usage_does_not_lower_what_was_spent(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """Each such reply costs its reserve, so that the cap holds."""
    desk.unknown = True
    desk.server.faults = lambda number, request: Fault(usage=(-90_000, 5))
    with desk.engine() as engine:
        reserve = engine.reserve(ask(0))[1]
    money = MoneySettings(price=PRICE, cap_usd=Decimal(4 * reserve) / 10**9)
    with caplog.at_level(logging.WARNING, "raglan"):
        came, why = desk.stopped(asks(50), concurrency=1, money=money)
    assert (why.reason, len(came), len(desk.server.log)) == ("cap", 4, 4)
    with desk.engine() as engine:
        ledger = engine.journal.ledger
        assert (ledger.spent, ledger.misreported) == (4 * reserve, 4)
        assert cost(engine.journal)["misreported"] == 4
    told = [record.getMessage() for record in caplog.records if "no count of tokens" in record.getMessage()]
    assert len(told) == 1
    assert "-90000" in told[0]


def test_usage_that_counts_reasoning_apart() -> None:
    body = {
        "choices": [{"message": {"content": "x"}, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 40, "prompt_tokens_details": {"cached_tokens": 4},
        },
    }  # fmt: skip
    assert classify(Wire(200, json.dumps(body))).usage == Usage(10, 4, 30)


# the wire


def _told_by(client: type[Endpoint], server: FaultServer, **settings: Any) -> Wire:
    async def asked() -> Wire:
        said = EndpointSettings(**{"base_url": server.url, "model": "m", "timeout": 5, **settings})
        endpoint = client(said, KEY)
        try:
            return await endpoint.send({"messages": [{"role": "user", "content": "长江 q1"}]}, "idem-0")
        finally:
            await endpoint.close()

    return asyncio.run(asked())


@pytest.mark.parametrize(
    ("fault", "status", "lost"),
    [
        (Fault(), 200, False),
        (Fault(429, headers={"Retry-After": "7"}), 429, False),
        (Fault(body="<html>é</html>"), 200, False),
        (Fault(302, headers={"Location": "/elsewhere"}), 302, False),
        (Fault(201, body='{"choices": []}'), 201, False),
        (Fault(204, body=""), 204, False),
        (Fault(body="长江", charset="gbk", headers={"Content-Type": "application/json; charset=gbk"}), 200, False),
        (Fault(body="长江", headers={"Content-Type": "application/json; charset=latin-1"}), 200, False),
        (Fault(body="长江", headers={"Content-Type": "application/json; charset=nonsense"}), 200, False),
        (Fault(body="长江", charset="utf-8-sig"), 200, False),
        (Fault(cut="short"), 0, True),
        (Fault(cut="reset"), 0, True),
        (Fault(cut="middle"), 0, True),
        (Fault(delay=1.0), 0, True),
    ],
    ids=["whole", "429", "html", "302", "201", "204", "gbk", "lying", "odd", "mark", "short", "reset", "middle", "slow"],
)
def test_both_clients_tell_the_same(fault: Fault, status: int, *, lost: bool) -> None:
    timeout = 0.2 if fault.delay else 5
    with FaultServer() as server:
        server.faults = lambda number, request: fault
        wires = [_told_by(client, server, timeout=timeout) for client in (Aiohttp, OpenAI)]
        first, second = server.log
    assert first.body == second.body
    assert (first.idem, second.idem) == ("idem-0", "idem-0")
    assert {(wire.status, wire.lost) for wire in wires} == {(status, lost)}
    assert len({wire.body for wire in wires}) == 1
    assert fault.body is None or wires[0].body == fault.body
    assert len({wire.headers.get("retry-after") for wire in wires}) == 1
    assert all(bool(wire.fault) == (status == 0) for wire in wires)
    assert not any(KEY in f"{wire.body}{wire.fault}" for wire in wires)


@pytest.mark.parametrize("client", [Aiohttp, OpenAI])
@pytest.mark.parametrize(
    "spelt",
    [r"sk-a\/b\u002Bc\u003d", r"sk-a/b\u002bc=", r"sk-a\\/b\\u002bc\\u003d", "sk-a%2Fb%2bc%3D", "sk-a/b+c="],
    ids=["escaped", "half", "twice", "address", "plain"],
)
def test_the_key_is_cut_out_however_it_is_spelt(client: type[Endpoint], spelt: str) -> None:
    async def asked(url: str) -> Wire:
        endpoint = client(EndpointSettings(base_url=url, model="m"), "sk-a/b+c=")
        try:
            return await endpoint.send({"messages": []}, "idem-0")
        finally:
            await endpoint.close()

    with FaultServer() as server:
        server.faults = lambda number, request: Fault(500, body=f'{{"error": {{"message": "no key {spelt} here"}}}}')
        wire = asyncio.run(asked(server.url))
    assert classify(wire).error == "500: no key … here"


def test_a_key_is_what_a_header_can_carry(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALLS_KEY", f"{KEY}\n")  # as read from a file
    assert [outcome.cls for outcome in desk.run(asks(1))] == ["ok"]
    for wrong in ("sk-one\nsk-two", "sk-–", " "):
        monkeypatch.setenv("CALLS_KEY", wrong)
        with pytest.raises(GeneratorError, match="CALLS_KEY") as why:
            desk.engine()
        assert "sk-" not in str(why.value)


@pytest.mark.parametrize("client", [Aiohttp, OpenAI])
def test_nobody_there_is_not_lost(client: type[Endpoint]) -> None:
    with FaultServer() as server:
        wire = _told_by(client, server, base_url="http://127.0.0.1:9/v1")
    assert wire.fault
    assert not wire.lost


@pytest.mark.parametrize("client", [Aiohttp, OpenAI])
def test_the_engine_over_either_client(desk: Desk, client: type[Endpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "" if client is OpenAI else "127.0.0.1")
    monkeypatch.setenv("HTTP_PROXY", desk.server.url.removesuffix("/v1"))
    desk.server.faults = by_content(Fault(500), 0.3)
    assert Counter(outcome.cls for outcome in desk.run(asks(30, Word))) == {"ok": 30}


def test_what_aiohttp_cannot_reach_is_left_to_the_openai_client(monkeypatch: pytest.MonkeyPatch) -> None:
    async def opened(url: str) -> type[Endpoint]:
        endpoint = open_endpoint(EndpointSettings(base_url=url, model="m"), None)
        await endpoint.close()
        return type(endpoint)

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    assert asyncio.run(opened("https://host.test/v1")) is Aiohttp
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    assert asyncio.run(opened("https://host.test/v1")) is OpenAI
    assert asyncio.run(opened("http://host.test/v1")) is Aiohttp
    monkeypatch.setenv("NO_PROXY", "host.test")
    assert asyncio.run(opened("https://host.test/v1")) is Aiohttp
    monkeypatch.setitem(sys.modules, "aiohttp", None)  # as if it were not installed
    assert asyncio.run(opened("https://host.test/v1")) is OpenAI


# limits


@pytest.mark.parametrize("header", ["2", "date", "undated", "180"])
def test_retry_after_pauses_every_slot(desk: Desk, header: str) -> None:
    seconds, speed = (180, 400) if header == "180" else (2, 5)
    date = 1_700_000_000

    def headers() -> dict[str, str]:
        if header == "date":
            return {"Retry-After": formatdate(date + 2, usegmt=True), "Date": formatdate(date, usegmt=True)}
        return {"Retry-After": formatdate(time.time() + 3.5, usegmt=True) if header == "undated" else header}  # whole seconds

    desk.server.faults = lambda number, request: Fault(429, headers=headers()) if number == 20 else None
    assert len(desk.run(asks(60), speed=speed)) == 60
    times = [request.at for request in desk.server.log]
    gaps = [later - before for before, later in itertools.pairwise(times)]
    longest = int(np.argmax(gaps))
    assert gaps[longest] >= 0.9 * seconds / speed, "somebody did not wait"
    assert 20 <= longest <= 20 + 8, "only what was under way arrived after the refusal"


def test_retry_after_in_words() -> None:
    assert retry_after("180") == 180
    assert retry_after(formatdate(1_700_000_090, usegmt=True), formatdate(1_700_000_000, usegmt=True)) == 90
    assert retry_after("soon") is retry_after(None) is retry_after("inf") is retry_after("nan") is None
    assert retry_after("-3") == 0


def test_a_date_counts_from_the_replys_own_and_else_from_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """As RFC 9110, 6.6.1 has it. The wall clock is asked there and nowhere else, and never where the reply has a Date."""
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.0)
    later = formatdate(1_700_000_090, usegmt=True)
    assert retry_after(later) == retry_after(later, "yesterday") == 90
    assert retry_after(formatdate(1_699_999_990, usegmt=True)) == 0
    monkeypatch.setattr(time, "time", lambda: pytest.fail("the wall clock was asked"))
    assert retry_after(later, formatdate(1_700_000_000, usegmt=True)) == 90
    assert retry_after("90") == 90
    monkeypatch.setenv("TZ", "Asia/Shanghai")
    time.tzset()
    try:  # the old form names no zone, and means UTC
        assert retry_after("Tue Nov 14 22:14:50 2023", "Tue Nov 14 22:13:20 2023") == 90
        assert retry_after("Tue Nov 14 22:14:50 2023", formatdate(1_700_000_000, usegmt=True)) == 90
    finally:
        monkeypatch.undo()
        time.tzset()


def test_backoff_grows_with_jitter() -> None:
    random.seed(3)
    draws = [[backoff(attempt) for _ in range(400)] for attempt in range(1, 7)]
    assert all(0.85 * 0.5 * 2**n < max(drawn) <= 0.5 * 2**n for n, drawn in enumerate(draws, 1))
    assert all(np.std(drawn) > 0.1 * max(drawn) for drawn in draws)


class Noting(Clock):
    """Keeps what it is asked to wait for."""

    def __init__(self, speed: float):
        super().__init__(speed)
        self.waits: list[float] = []

    async def wait(self, event: asyncio.Event, seconds: float | None) -> None:
        self.waits += [] if seconds is None else [seconds]
        await super().wait(event, seconds)


@pytest.mark.parametrize("status", [429, 503])
def test_retries_without_a_header_come_after_growing_jittered_gaps(desk: Desk, status: int) -> None:
    """Eight calls, one after another, each of which fails five times: what the engine waits, and what the server sees of it."""
    random.seed(3)
    speed, calls = 200.0, 8
    desk.server.faults = lambda number, request: Fault(status) if number % 6 < 5 else None
    waited, seen = [], []
    with desk.engine() as engine:
        for number in range(calls):
            engine.clock = clock = Noting(speed)
            (outcome,) = engine.run([ask(number)])
            assert (outcome.cls, outcome.calls) == ("ok", 6)
            waited.append(clock.waits)
            times = [request.at for request in desk.server.log[6 * number :]]
            seen.append([(later - before) * speed for before, later in itertools.pairwise(times)])
    longest = np.max(waited, axis=0)  # of each try; nothing else waits where there is neither pause nor bucket
    assert longest.shape == (5,)
    assert (longest <= 0.5 * 2.0 ** np.arange(1, 6)).all()
    assert (longest[1:] > longest[:-1]).all(), "gaps do not grow"
    assert longest[4] > 4 * longest[0]
    assert (np.std(waited, axis=0) > 0.1 * longest).all(), "all wait alike"
    assert (np.array(seen) >= 0.95 * np.array(waited) - 0.002 * speed).all(), "the server was asked before that"


def test_a_pause_that_the_server_asks_for_holds_the_engines_next_run_too(desk: Desk) -> None:
    desk.server.faults = lambda number, request: Fault(429, headers={"Retry-After": "60"}) if number == 0 else None
    with desk.engine(speed=100.0, attempts=1) as engine:
        assert [outcome.cls for outcome in engine.run([ask(0)])] == ["transient"]
        assert [outcome.cls for outcome in engine.run([ask(1)])] == ["ok"]
    first, second = desk.server.log
    assert (second.at - first.at) * 100 >= 0.95 * 60


def test_engines_that_ask_one_server_share_its_pause_and_its_rates(desk: Desk) -> None:
    """A journal and three engines: two names on one server, and another server, which has said nothing."""
    shared, other = Journal(desk.folder), FaultServer()
    settings: dict[str, Any] = {"api_key_env": "CALLS_KEY", "attempts": 1}
    desk.server.faults = lambda number, request: Fault(429, headers={"Retry-After": "60"}) if number == 0 else None
    with other, closing(shared):
        teacher, judge, elsewhere = (
            CallEngine(EndpointSettings(base_url=url, model=name, **settings), shared, money=MONEY, clock=Clock(100.0))
            for url, name in ((desk.server.url, "a"), (desk.server.url, "b"), (other.url, "b"))
        )
        assert [outcome.cls for outcome in teacher.run([ask(0)])] == ["transient"]
        told = time.monotonic()
        assert [outcome.cls for outcome in elsewhere.run([ask(1)])] == ["ok"]
        assert (other.log[0].at - told) * 100 < 0.9 * 60
        assert [outcome.cls for outcome in judge.run([ask(1)])] == ["ok"]
        refused, second = desk.server.log
        assert (second.body["model"], (second.at - refused.at) * 100 >= 0.95 * 60) == ("b", True), "told to one, heeded by one"
        for number, name in enumerate("ab"):  # sixty tokens a minute: a call leaves the bucket in debt for most of a minute
            settings |= {"base_url": desk.server.url, "model": name, "tpm": 60}
            with CallEngine(EndpointSettings(**settings), shared, money=MONEY, clock=Clock(100.0)) as engine:
                assert [outcome.cls for outcome in engine.run([ask(2 + number)])] == ["ok"]
        third, fourth = desk.server.log[2:]
        assert (fourth.at - third.at) * 100 >= 0.95 * (sum(third.usage) - 1), "they have one bucket"
    desk.unknown = True  # the journal holds the other server's bill, too


def test_a_server_that_refuses_every_call_is_asked_no_longer(desk: Desk) -> None:
    words = "temperature does not support 0.3 with this model; 不支持"
    desk.server.faults = lambda number, request: Fault(400, text=words)
    came, why = desk.stopped(asks(400))
    assert why.reason == "refused"
    assert "refused 20 of the last 20 calls of step 'answer': 400" in str(why)
    assert {outcome.cls for outcome in came} == {"permanent"}
    assert 20 <= len(desk.server.log) <= 20 + 2 * 8
    desk.server.faults = lambda number, request: None
    assert {outcome.cls for outcome in desk.run(asks(400))} == {"ok"}, "it goes on"


def test_some_calls_that_are_refused_stop_nothing(desk: Desk) -> None:
    """Long prompts, many of them; and the same ones again, which are all that a second run asks."""
    desk.server.faults = lambda number, request: Fault(400) if int(re.findall(r"q(\d+)", request.content)[0]) % 5 else None
    for reused in (0, 36):
        outcomes = desk.run(asks(180))
        assert Counter(outcome.cls for outcome in outcomes) == {"permanent": 144, "ok": 36}
        assert sum(outcome.reused for outcome in outcomes) == reused


def test_a_server_that_begins_to_refuse_is_asked_no_longer(desk: Desk) -> None:
    desk.server.faults = lambda number, request: Fault(422) if number > 60 else None
    _, why = desk.stopped(asks(1000))
    assert (why.reason, "of the last 50 calls" in str(why)) == ("refused", True)
    assert len(desk.server.log) <= 60 + 50 + 2 * 8


@pytest.mark.parametrize("fault", [Fault(401), Fault(429, code="insufficient_quota"), Fault(404)], ids=lambda f: str(f.status))
def test_a_fatal_answer_stops_at_once(desk: Desk, fault: Fault) -> None:
    desk.server.faults = lambda number, request: fault if number == 20 else None
    came, why = desk.stopped(asks(100))
    assert why.reason == "fatal"
    assert len(desk.server.log) <= 21 + 7
    assert len(came) == len(desk.server.log) - 1
    before = len(desk.server.log)
    assert len(desk.run(asks(100))) == 100
    assert len(desk.server.log) == before + 100 - len(came)


def test_thirty_per_cent_of_500s(desk: Desk) -> None:
    desk.server.faults = by_content(Fault(500), 0.3)
    outcomes = desk.run(asks(120))
    assert Counter(outcome.cls for outcome in outcomes) == {"ok": 120}
    assert max(tries(desk.server).values()) <= 6
    assert Counter(r.content for r in desk.server.log if r.status == 200) == dict.fromkeys(tries(desk.server), 1)
    assert len(desk.server.log) > 140


def test_only_500s_stop_the_run(desk: Desk) -> None:
    desk.server.faults = lambda number, request: Fault(500)
    came, why = desk.stopped(asks(150), speed=300, concurrency=16)
    assert why.reason == "breaker"
    assert {outcome.cls for outcome in came} <= {"transient"}
    assert 50 < len(desk.server.log) <= 50 + 16 + 5
    desk.server.faults = lambda number, request: None
    assert len(desk.run(asks(150))) == 150


class Hand(Clock):
    """A clock that is set by hand."""

    at = 1000.0

    def now(self) -> float:
        return self.at


def test_buckets_fill_by_the_minute_and_take_back() -> None:
    clock = Hand()
    bucket = Bucket(600, clock)  # ten a second
    assert bucket.wait(1) == 0
    bucket.take(10)
    assert bucket.wait(1) == pytest.approx(0.1)
    bucket.give(3)
    assert bucket.wait(3) == 0
    bucket.take(25)  # larger than the bucket: a debt of 22
    clock.at += 1
    assert bucket.wait(1) == pytest.approx((1 - (3 - 25 + 10)) / 10)
    assert Bucket(None, clock).wait(10**9) == 0


@pytest.mark.parametrize("years", [-30, 30], ids=["back", "forward"])
def test_setting_the_machines_clock_moves_nothing(years: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bucket, pause and breaker run on a real clock when the wall clock jumps: what is left to wait stays what it was."""
    gate = Gate(4, rpm=6, tpm=6, server=Server(Clock()))  # one in ten seconds
    gate.requests.take(1)
    gate.tokens.take(1)
    for _ in range(50):
        gate.bad(probe=False)
    gate.pause(20.0)
    wall = time.time()
    monkeypatch.setattr(time, "time", lambda: wall + years * 3e7)
    assert 5 < gate.requests.wait(1) <= 10
    assert 5 < gate.tokens.wait(1) <= 10
    assert 15 < gate.server.until - gate.clock.now() <= 20
    assert 25 < gate.server.breaker.until - gate.clock.now() <= 30
    assert 25 < gate._silent(1) <= 30


def test_rates_are_held(desk: Desk) -> None:
    began = time.monotonic()
    assert len(desk.run(asks(160), rpm=600, speed=10)) == 160  # ten at once, then a hundred a second of real time
    times = [request.at for request in desk.server.log]
    assert times[-1] - times[0] >= 0.9 * 150 / 10 / 10  # the first ones arrive late: they open their connections
    assert time.monotonic() - began < 20


def test_concurrency_halves_once_a_burst_and_comes_back() -> None:
    clock = Hand()
    gate = Gate(64, rpm=None, tpm=None, server=Server(clock))
    for _ in range(64):
        gate.limited(999.0, 2.0, probe=False)
    assert (gate.limit, gate.server.until, sum(gate.server.breaker.recent)) == (32, 1002.0, 1)
    clock.at += 3
    gate.limited(1002.5, None, probe=False)
    assert gate.limit == 16
    for _ in range(150):
        gate.good(probe=False)
    assert gate.limit == 19


def test_the_breaker_probes_and_gives_up() -> None:
    clock = Hand()
    breaker = Breaker(clock)
    for number in range(50):
        assert not breaker.half_open
        breaker.told(failed=number % 25 != 0, probe=False)
    assert (breaker.half_open, breaker.until) == (True, 1030.0)
    breaker.told(failed=True, probe=False)  # was under way
    assert breaker.openings == 1
    breaker.told(failed=False, probe=True)
    assert not breaker.half_open
    for _ in range(50):
        breaker.told(failed=True, probe=False)
    for opening in range(2, 5):
        assert (breaker.openings, breaker.over) == (opening, False)
        breaker.told(failed=True, probe=True)
    assert breaker.over


def test_storms_hours_apart_do_not_add_up() -> None:
    def stormy(between: int) -> Breaker:
        breaker = Breaker(Hand())
        for _ in range(5):
            for _ in range(50):
                breaker.told(failed=True, probe=False)
            breaker.told(failed=False, probe=True)
            for _ in range(between):
                breaker.told(failed=False, probe=False)
        return breaker

    assert stormy(between=20).over
    assert not stormy(between=60).over


# the journal


def test_kill_again_and_again(desk: Desk, tmp_path: Path) -> None:
    desk.server.delay = 0.01
    desk.server.faults = _seldom
    outs = [tmp_path / "killed.jsonl", tmp_path / "straight.jsonl"]
    told = _work(desk.server.url, desk.folder, outs[0], kills=21)
    assert told == {"deaths": 21, "code": 0}
    with FaultServer(delay=0.002) as other:
        other.faults = _seldom
        assert _work(other.url, tmp_path / "other", outs[1], kills=0) == {"deaths": 0, "code": 0}
        straight = len(other.log)
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert len(outs[0].read_text().splitlines()) == 150
    journal = Journal(desk.folder)
    done: set[str] = set()
    for line in journal.lines():
        if line["kind"] == "intent":
            assert line["key"] not in done, "a call with a journalled reply was sent again"
        elif line.get("class") == "ok":
            done |= {line["key"], line.get("for", line["key"])}
    doubts = journal.ledger.doubts.calls
    journal.close()
    assert 0 < doubts <= 21 * 8
    good = Counter(request.content for request in desk.server.log if request.status == 200)
    assert sum(good.values()) - len(good) <= doubts
    billed = Counter(request.content for request in desk.server.log if request.billed)
    assert set(billed.values()) == {1}, "billed twice"
    assert len(billed) == sum(1 for request in desk.server.log if request.billed) <= straight


def _seldom(number: int, request: Request) -> Fault | None:
    """By content: some replies are malformed, some requests fail the first time."""
    place = hashlib.sha256(request.content.encode()).digest()[0]
    if place < 20 and "response_format" in request.body and "trial" not in request.content:
        return Fault(text="no, I will not")
    return Fault(500) if place > 225 and request.idem.endswith("-0") else None


def _work(url: str, folder: Path, out: Path, *, kills: int) -> dict[str, int]:
    command = [sys.executable, str(HERE / "calls_worker.py"), url, str(folder), str(out), "150", str(kills), "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    told: dict[str, int] = json.loads(done.stdout)
    assert told["code"] == 0, done.stderr
    return told


def test_a_torn_last_line_is_dropped_and_a_damaged_one_told(desk: Desk, tmp_path: Path) -> None:
    desk.run(asks(3))
    whole = (desk.folder / NAME).read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    other = tmp_path / "other"
    other.mkdir()
    for cut in range(last, len(whole)):
        (other / NAME).write_bytes(whole[:cut])
        journal = Journal(other)
        assert journal.ledger.doubts.calls == 1
        journal.close()
        assert (other / NAME).stat().st_size == last
    start = whole.index(b"\n") + 1
    for place in (start, start + 9, start + 40):
        (other / NAME).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=f"damaged at offset {start}"):
            Journal(other)
    (other / NAME).write_bytes(b"something else\n" + whole)
    with pytest.raises(CheckpointError, match="offset 0"):
        Journal(other)


def _journal(folder: Path, *, bodies: tuple[str, ...]) -> bytes:
    """A journal with these replies, a dollar each."""
    journal = Journal(folder)
    for number, body in enumerate(bodies):
        intent = Intent(f"a{number}", 0, "answer", "m", f"i{number}", 2 * 10**9)
        journal.intend(intent)
        outcome = {"class": "ok", "finish": "stop", "usage": [3, 0, 2], "cost": 10**9, "settled": True, "took": 0.1}
        journal.settle(intent, {**outcome, "body": body})
    journal.close()
    return (folder / NAME).read_bytes()


@pytest.mark.parametrize("cut", [0, 1, 30], ids=["whole", "without its newline", "torn"])
def test_no_flip_of_a_byte_is_silent(tmp_path: Path, cut: int) -> None:
    whole = _journal(tmp_path / "calls", bodies=('{"word": "a \\"b\\" {c}"}', "青浦大桥 😀"))
    whole = whole[: len(whole) - cut]
    good = whole.count(b"\n")  # lines that have to be there, or an error
    other = tmp_path / "other"
    other.mkdir()
    begin = whole.rindex(b"\n", 0, whole.rindex(b"\n")) if cut else 0  # what is before was flipped in the whole one
    for place, byte in enumerate(whole[begin:], begin):
        for changed in b" \r}\x0b" if byte == 10 else (10,) if place % 5 == 0 else (byte ^ 1,):
            (other / NAME).write_bytes(whole[:place] + bytes([changed]) + whole[place + 1 :])
            try:
                journal = Journal(other)
            except CheckpointError:
                continue
            there = 1 + len(list(journal.lines()))
            journal.close()
            assert there == good, f"byte {place} as {changed:#x}: {there} of {good} lines, and no error"
            assert place >= whole.rindex(b"\n") + 1, f"byte {place} as {changed:#x} was taken for the one that was written"


def test_a_damaged_journal_is_not_counted(tmp_path: Path) -> None:
    folder = tmp_path / "calls"
    whole = _journal(folder, bodies=("one", "two", "三"))
    assert read_ledger(folder).spent == 3 * 10**9
    ends = [place for place, byte in enumerate(whole) if byte == 10]
    for place in (ends[-2], ends[-1], ends[2] + 20, ends[-2] + 20):
        (folder / NAME).write_bytes(whole[:place] + b"x" + whole[place + 1 :])
        with pytest.raises(CheckpointError, match="is damaged at offset"):
            read_ledger(folder)


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "calls"
    journal = Journal(folder)
    words = "import sys, pathlib, raglan.calls.journal as j; j.Journal(pathlib.Path(sys.argv[1])).close()"
    second = [sys.executable, "-c", words, str(folder)]
    refused = subprocess.run(second, capture_output=True, text=True, timeout=120)
    assert refused.returncode != 0
    assert f"process {os.getpid()} is writing the journal in {folder}" in refused.stderr
    journal.close()
    after = subprocess.run(second, capture_output=True, text=True, timeout=120)
    assert after.returncode == 0, after.stderr


def test_the_end_of_a_torn_journal_is_asked_again(desk: Desk) -> None:
    desk.run(asks(3))
    path = desk.folder / NAME
    os.truncate(path, path.stat().st_size - 5)
    outcomes = desk.run(asks(3))
    assert sum(outcome.reused for outcome in outcomes) == 2
    assert len(desk.server.log) == 4
    assert desk.server.log[-1].again


def test_failures_of_a_repair_are_the_calls_and_what_is_given_up_is_remembered(desk: Desk) -> None:
    desk.server.faults = lambda number, request: Fault(500) if number else Fault(text="none")
    with desk.engine(structured="strict", attempts=3) as engine:
        (outcome,), key = list(engine.run([ask(0, Word)])), engine.key(ask(0, Word))
        assert (outcome.cls, outcome.calls, engine.journal.failures(key)) == ("transient", 4, 3)
        engine.journal.give_up(key, "it never comes")
    desk.server.faults = lambda number, request: None
    with desk.engine(structured="strict") as engine:
        assert (engine.journal.failures(key), engine.journal.given_up(key)) == (3, "it never comes")
        assert [again.cls for again in engine.run([ask(0, Word)])] == ["ok"]
        assert engine.journal.failures(key) == 0


def test_places_are_found_among_many_and_the_last_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "LATELY", 50)
    found, twin = places.Places(), {}
    draw = random.Random(1)
    for offset in range(2000):
        key = f"{draw.randrange(1500):016x}" + "0" * 48
        found.put(key, offset)
        twin[key] = offset
    assert all(next(found.of(key)) == offset for key, offset in twin.items())
    assert list(found.of("f" * 64)) == []
    with pytest.raises(ValueError, match="invalid literal"):
        found.put("no key", 1)


def test_places_are_found_while_others_are_sorted_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "LATELY", 2)
    found, search = places.Places(), np.searchsorted
    keys = [f"{number:016x}" + "0" * 48 for number in range(20)]
    found.put(keys[9], 9)
    found.put(keys[8], 8)
    waiting = iter(keys[:6])

    def meanwhile(*asked: Any) -> Any:
        """The thread that puts gets its turn."""
        at = search(*asked)
        for _ in range(2):
            found.put(key := next(waiting), int(key[:16], 16))
        return at

    monkeypatch.setattr(np, "searchsorted", meanwhile)
    assert list(found.of(keys[9])) == [9]


def test_keys_that_begin_alike_are_told_apart(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    line = {"class": "ok", "finish": "stop", "usage": [1, 0, 1], "cost": 0, "settled": True, "took": 0.1}
    keys = [16 * "a" + 48 * end for end in "012"]
    for key in keys[:2]:
        intent = Intent(key, 1, "answer", "m", key, 0)
        journal.intend(intent)
        journal.settle(intent, {**line, "body": f"of {key}"})
    for _ in range(2):  # as written, and as read again
        assert [(journal.answer(key) or {}).get("body") for key in keys] == [f"of {keys[0]}", f"of {keys[1]}", None]
        journal.close()
        journal = Journal(tmp_path)
    journal.close()


def test_one_writer(desk: Desk) -> None:
    with desk.engine(), pytest.raises(CheckpointError, match=f"process {os.getpid()} is writing"):
        desk.engine()
    desk.engine().close()


def test_a_full_disk_stops_the_requests(desk: Desk) -> None:
    desk.run(asks(2))
    size = (desk.folder / NAME).stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 3000, hard))
        came, why = desk.stopped(asks(100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert why.reason == "journal"
    assert (desk.folder / NAME).stat().st_size <= size + 3000
    sent = len(desk.server.log)
    assert sent - 2 <= 3000 / 150, "requests whose intents could not be written"
    assert len(desk.run(asks(100))) == 100
    assert len(came) >= 2


# money


def test_the_cap_to_the_nano_dollar() -> None:
    price = Price.of(MONEY)
    reserve = price.cost(Usage(1800, 0, 600))
    assert dollars(reserve) == "$0.010500"
    ledger, cap = Ledger(), 10**9
    ledger.spent = 962_000_000
    for attempt in (1, 2, 3):
        ledger.intend(Intent("k", attempt, "answer", "m", "i", reserve))
    assert dollars(ledger.spent + ledger.flying + reserve) == "$1.004000"
    assert not ledger.fits(reserve, cap)
    cost = price.cost(Usage(1720, 0, 210))
    assert dollars(cost) == "$0.006400"
    ledger.settle({"key": "k", "attempt": 2, "class": "ok", "usage": [1720, 0, 210], "cost": cost})
    assert dollars(ledger.spent + ledger.flying + reserve) == "$0.999900"
    assert ledger.fits(reserve, cap)
    assert [price.cost(usage) for usage in (Usage(6_325_200), Usage(output=670_300))] == [15_813_000_000, 6_703_000_000]
    assert price.cost(Usage(6_325_200, 0, 670_300)) == 22_516_000_000


class Watched(Ledger):
    """Tells what it was asked, and what it said: (spent, in flight, whether one more fits)."""

    def __init__(self) -> None:
        super().__init__()
        self.told: queue.SimpleQueue[tuple[str, str, bool]] = queue.SimpleQueue()

    def fits(self, reserve: int, cap: int | None) -> bool:
        found = super().fits(reserve, cap)
        self.told.put((dollars(self.spent), dollars(self.flying), found))
        return found

    def next(self, *, fits: bool) -> tuple[str, str]:
        """What it was asked until it said so; the gate may ask the same several times while somebody waits."""
        while (found := self.told.get(timeout=20))[2] != fits:
            pass
        return found[:2]


def test_a_call_waits_for_money_that_another_may_leave_and_is_sent_to_the_nano_dollar(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cap $1.00, $0.962000 spent, three in flight at $0.010500 each: the fourth waits. One returns at $0.006400: it is sent.

    The fifth waits, too; the four come home at their reserve, nothing is in flight, and $0.0001 are left: the run stops.
    """
    monkeypatch.setattr("raglan.calls.journal.Ledger", Watched)
    text = "q{:03}" + "x" * (1800 - 256 - 16 - len(canonical([{"role": "user", "content": "q000"}])))

    def dear(numbers: range) -> list[Ask]:
        return [Ask("answer", ({"role": "user", "content": text.format(n)},), None, {"max_tokens": 600}) for n in numbers]

    usages = [(1800, 600)] * 91 + [(1800, 200)] + [(1720, 210)] + [(1800, 600)] * 3
    held = [asyncio.Event() for _ in usages]
    arrived = [threading.Event() for _ in usages]

    def bills(number: int, request: Request) -> Fault:
        arrived[number].set()
        return Fault(usage=usages[number], until=held[number] if number >= 92 else None)

    desk.server.faults = bills
    money, ended = MoneySettings(price=PRICE, cap_usd="1.00"), []
    assert {outcome.cls for outcome in desk.run(dear(range(92)), money=money)} == {"ok"}
    with desk.engine(money=money, concurrency=8) as engine:
        ledger = engine.journal.ledger
        assert isinstance(ledger, Watched)
        assert (dollars(engine.reserve(dear(range(1))[0])[1]), dollars(ledger.spent)) == ("$0.010500", "$0.962000")

        def run() -> None:
            try:
                ended.extend(engine.run(dear(range(100, 105))))
            except CallsStopped as why:
                ended.append(why)

        running = threading.Thread(target=run)
        running.start()
        for flying in ("$0.000000", "$0.010500", "$0.021000"):
            assert ledger.next(fits=True) == ("$0.962000", flying)
        assert ledger.next(fits=False) == ("$0.962000", "$0.031500"), "0.962000 + 0.031500 + 0.010500 > 1"
        assert all(one.wait(20) for one in arrived[92:95])
        assert len(desk.server.log) == 95, "the fourth waits"
        desk.server.let(held[92])
        assert ledger.next(fits=True) == ("$0.968400", "$0.021000"), "0.968400 + 0.021000 + 0.010500 = 0.999900"
        assert arrived[95].wait(20), "the fourth is sent"
        assert ledger.next(fits=False) == ("$0.968400", "$0.031500")
        assert (running.is_alive(), len(desk.server.log)) == (True, 96), "the fifth waits for what is in flight"
        for one in held[93:]:
            desk.server.let(one)
        running.join(20)
        assert (dollars(ledger.spent), ledger.in_flight) == ("$0.999900", 0)
    *came, why = ended
    assert ([outcome.cls for outcome in came], why.reason) == (["ok"] * 4, "cap")
    assert "spent $0.999900 of $1.000000; a call of step 'answer' may cost $0.010500" in str(why)
    assert (len(desk.server.log), dollars(desk.server.bill)) == (96, "$0.999900")
    assert _exit_code(why, monkeypatch) == 3


def test_prices_are_whole_numbers() -> None:
    price = Price.of(MoneySettings(price={"input": 0.0375, "cached": 0.01, "output": "0.15"}))
    assert price == Price(37_500, 10_000, 150_000)
    assert price.cost(Usage(1, 0, 0)) == 38  # 37.5 nano-dollars, rounded up
    assert price.cost(Usage(1000, 400, 10)) == 600 * 37.5 + 400 * 10 + 1500
    assert Price.of(MoneySettings(price="free")).cost(Usage(10**9, 0, 10**9)) == 0
    with pytest.raises(RecipeError, match="price is not said"):
        Price.of(MoneySettings())
    with pytest.raises(ValidationError, match="cached"):
        MoneySettings(price={"input": 1, "cached": 2, "output": 1})


def test_prompts_are_bounded_by_bytes() -> None:
    messages = [{"role": "user", "content": "长江的源头在哪个省？"}]
    assert prompt_bound(messages) == len(json.dumps(messages, ensure_ascii=False, separators=(",", ":")).encode()) + 16 + 256
    assert prompt_bound(messages, count=len) < prompt_bound(messages) < prompt_bound(messages, "{}")


def test_an_unknown_price_and_an_unset_key_are_refused(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="price is not said"):
        desk.engine(money=MoneySettings())
    monkeypatch.delenv("CALLS_KEY")
    with pytest.raises(GeneratorError, match="CALLS_KEY holds no key"):
        desk.engine()


def test_the_bill_stays_under_the_cap_whatever_fails(desk: Desk) -> None:
    desk.unknown = True
    mix = [
        (Fault(500), 0.08), (Fault(429, headers={"Retry-After": "1"}), 0.03), (Fault(cut="short"), 0.04),
        (Fault(cut="reset"), 0.04), (Fault(cut="middle"), 0.03), (Fault(body="<html>"), 0.04), (Fault(finish="length"), 0.05),
        (Fault(text="no JSON"), 0.08), (Fault(finish="content_filter"), 0.02), (Fault(text=""), 0.03),
    ]  # fmt: skip
    desk.server.idempotent = False
    desk.server.faults = seeded(mix, 5)
    money = {cap: MoneySettings(price=PRICE, cap_usd=cap) for cap in ("0.03", "0.06", "10")}
    for cap in ("0.03", "0.06"):
        _, why = desk.stopped(asks(150, Word), money=money[cap])
        assert why.reason == "cap"
        assert 0.3 * float(cap) * 1e9 < desk.server.bill <= float(cap) * 1e9
    outcomes = desk.run(asks(150, Word), money=money["10"])
    assert len(outcomes) == 150
    assert Counter(outcome.cls for outcome in outcomes)["ok"] > 100


def test_usage_above_the_reserve_is_fatal(desk: Desk) -> None:
    desk.server.faults = lambda number, request: Fault(usage=(90_000, 5))
    came, why = desk.stopped(asks(50))
    assert (why.reason, came) == ("fatal", [])
    assert "more than its reserve" in str(why)
    assert len(desk.server.log) <= 8


def test_the_ledger_is_the_journals(desk: Desk) -> None:
    desk.server.faults = by_content(Fault(500), 0.3)
    with desk.engine() as engine:
        list(engine.run(asks(20, Word)))
        live, spent = engine.ledger(), engine.journal.ledger.spent
    journal = Journal(desk.folder)
    assert journal.ledger.rows() == live
    assert journal.ledger.spent == spent == desk.server.bill
    assert {(row.step, row.cls) for row in live} >= {("answer", "ok"), ("answer", "transient"), ("probe", "ok")}
    journal.close()


def test_the_command_shows_the_ledger(desk: Desk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with desk.engine() as engine:
        list(engine.run(asks(5)))
        monkeypatch.setattr(sys, "argv", ["raglan", "calls", str(desk.folder)])
        with pytest.raises(SystemExit):
            cli.main()
        spent = engine.journal.ledger.spent
    told = capsys.readouterr().out
    assert f"spent {dollars(spent)}, of which $0.000000 for 0 calls in doubt" in told
    assert re.search(r"^answer +m +ok +5 ", told, re.MULTILINE)
    monkeypatch.setattr(sys, "argv", ["raglan", "calls", str(desk.folder.parent)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2


def test_stopped_calls_are_another_exit_than_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _exit_code(CallsStopped("the cap is reached", reason="cap"), monkeypatch) == 3


def _exit_code(why: Exception, monkeypatch: pytest.MonkeyPatch) -> object:
    """With which code the command line ends."""
    app = typer.Typer()

    @app.command()
    def stops() -> None:
        raise why

    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(sys, "argv", ["raglan"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


def test_the_key_is_in_no_log(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:  # files: after every test
    caplog.set_level(logging.DEBUG)
    desk.server.faults = first_only(Fault(500))
    desk.run(asks(3))
    desk.server.faults = lambda number, request: Fault(401)  # repeats the key
    _, why = desk.stopped(asks(9))
    assert KEY not in caplog.text + str(why)
    assert "Bearer …" in str(why)


# interrupts


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """A shell starts what runs in its background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_ctrl_c_waits_for_what_is_under_way(desk: Desk) -> None:
    desk.server.delay = 0.1
    came = []

    def interrupted(engine: CallEngine) -> None:
        for outcome in engine.run(asks(100)):
            came.append(outcome)
            if len(came) == 3:
                signal.raise_signal(signal.SIGINT)

    with desk.engine() as engine, pytest.raises(CallsStopped) as why:
        interrupted(engine)
    assert why.value.reason == "interrupt"
    assert len(came) == len(desk.server.log) < 40
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(desk.run(asks(40))) == 40


@pytest.mark.usefixtures("_interruptible")
def test_a_second_ctrl_c_does_not_wait(desk: Desk) -> None:
    desk.server.delay = 30.0
    desk.server.faults = first_only(Fault(text="at once", delay=0.01))
    began = time.monotonic()

    def interrupted(engine: CallEngine) -> None:
        for _ in engine.run(asks(100)):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with desk.engine() as engine, pytest.raises(KeyboardInterrupt):
        interrupted(engine)
    assert time.monotonic() - began < 9  # less than the ten seconds that the first one waits
    assert engine.journal.ledger.doubts.calls > 0


# the estimate


def test_an_estimate_runs_a_sample_and_keeps_it(desk: Desk) -> None:
    desk.server.faults = by_content(Fault(500), 0.1)

    def follow(outcome: Outcome) -> list[Ask]:
        return (
            [] if outcome.ask.depth else [Ask("judge", ask(int(outcome.ask.ref)).messages, None, {"max_tokens": 60}, depth=1)]
        )

    with desk.engine() as engine:
        found = estimate(engine, asks(90), follow=follow)
        sent = len(desk.server.log)
        assert (found.sampled, found.cells, found.attempts, found.acceptance) == (24, 90, 90, 1.0)
        assert set(found.steps) == {"answer", "judge"}
        outcomes = list(engine.run(asks(90), follow=follow))
        assert sum(outcome.reused for outcome in outcomes) == 48
        assert found.low <= engine.journal.ledger.spent <= found.high
    assert sent >= 48
    assert found.seconds > 0


def test_the_estimates_interval_holds_the_real_cost() -> None:
    held = 0
    for seed in range(100):
        draw = random.Random(seed)
        cells = [_cell(draw, name) for name in ["short"] * 16 + ["long"] * 8]
        found = extrapolate(cells, {"short": 200, "long": 100}, seed=seed, resamples=500)
        held += found.low <= _real(draw, {"short": 200, "long": 100}) <= found.high
    assert held >= 90


def _cell(draw: random.Random, stratum: str) -> Cell:
    """A cell with retries, now and then a repair, and an acceptance of .8."""
    long = 3 if stratum == "long" else 1
    answer = Step(1, 2000 * long, 200, long * draw.lognormvariate(0, 0.4), 1.0)
    if draw.random() < 0.1:
        answer.add(answer)
    return Cell(stratum, draw.random() < 0.8, {"generate": Step(1, 700, 250, draw.lognormvariate(0, 0.3)), "answer": answer})


def _real(draw: random.Random, planned: dict[str, int]) -> float:
    """What it costs to make them all, those rejected again until they are accepted."""
    total = 0.0
    for stratum, count in planned.items():
        while count:
            cell = _cell(draw, stratum)
            total, count = total + cell.nano, count - cell.accepted
    return total


def test_the_worked_estimate() -> None:  # acceptance .80, 1,000 wanted
    def step(prompt: int, output: int) -> Step:
        return Step(1, prompt, output, Price.of(MONEY).cost(Usage(prompt, 0, output)))

    cells = [Cell("all", number % 5 != 0, {"generate": step(700, 250), "answer": step(2600, 220)}) for number in range(1250)]
    for cell in cells[:63]:
        cell.steps["brainstorm"] = step(400, 600)
    for cell in cells[:750]:
        cell.steps["judge"] = step(2900, 60)
    found = extrapolate(cells, {"all": 1000}, resamples=200)
    steps = [entry for entry, _, _ in found.steps.values()]
    assert found.attempts == 1250
    assert found.acceptance == pytest.approx(0.8)
    assert sum(entry.calls for entry in steps) == pytest.approx(3313)
    assert sum(entry.prompt for entry in steps) == pytest.approx(6_325_200)
    assert sum(entry.output for entry in steps) == pytest.approx(670_300)
    assert dollars(round(found.nano)) == "$22.516000"
    assert found.low < found.nano < found.high


def test_a_sample_touches_every_stratum() -> None:
    assert share_out({"a": 900, "b": 90, "c": 10}, 24) == {"a": 21, "b": 2, "c": 1}
    assert share_out({"a": 3, "b": 2}, 24) == {"a": 3, "b": 2}
    with pytest.raises(GeneratorError, match="none of 1"):
        extrapolate([Cell("a", False)], {"a": 3})
