"""The estimate before a run against what the run then costs, over the real engine without its socket."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist

import pytest

from fault_server import KEY, PRICE, Fault, FaultServer, Request, author
from raglan.calls import CallEngine
from raglan.calls.estimate import Estimate
from raglan.calls.limits import Clock
from raglan.recipe import EndpointSettings, MoneySettings, WritingSettings
from raglan.synthesis import Plan, factors_of, make_plan
from raglan.synthesis.coverage import ROUNDS, Attempt, refills
from raglan.synthesis.desk import Desk
from raglan.synthesis.endpoint import EndpointTeacher
from raglan.synthesis.factors import Factors
from raglan.synthesis.writing import Job
from raglan.verification import Verified, Verifier, Written
from test_synthesis_endpoint import recipe, show

CELLS, SERVERS, SAMPLES = 120, 10, 10


def point(*name: object) -> float:
    """Between 0 and 1, by its name."""
    return (int.from_bytes(hashlib.sha256(repr(name).encode()).digest()[:6], "big") + 0.5) / 2**48


@dataclass
class Moods:
    """What a server does by its seed: replies of any length, some to be repaired, some without a passage, 500s, lost ones."""

    seed: int
    times: Counter[str] = field(default_factory=Counter)

    def __call__(self, number: int, request: Request) -> Fault | None:
        told = json.dumps(request.body["messages"][:2])
        self.times[request.content] += 1
        place = point(self.seed, request.content, self.times[request.content])
        if place < 0.04:
            return Fault(500)
        words = 150 * 2.718 ** (0.6 * NormalDist().inv_cdf(point(self.seed, "length", request.content)))
        usage = (len(told) // 4, min(request.body["max_tokens"], round(words)))
        lost = "reset" if place < 0.045 else ""
        if "response_format" not in request.body:
            return Fault(usage=usage, cut=lost)
        if point(self.seed, "fits", told) < 0.1 and len(request.body["messages"]) == 2:
            return Fault(text='{"query": 7}', usage=usage, cut=lost)  # mended by one repair
        none = "PassagesReply" in json.dumps(request.body["response_format"]) and point(self.seed, "none", told) < 0.1
        return Fault(text='{"passages": []}' if none else None, usage=usage, cut=lost)


class Some(Verifier):
    """Rejects fifteen of a hundred examples."""

    def __init__(self, seed: int):
        super().__init__()
        self.__dict__["seed"] = seed  # beside its settings, which are frozen

    def verify(self, one: Written) -> Verified:
        return Verified(one, (), "so it is" if point(self.__dict__["seed"], one.id) < 0.15 else "")


def whole_run(engine: CallEngine, plan: Plan, words: Factors, seed: int) -> tuple[list[Estimate], int, int]:
    """What estimates say, the first before the run, others from other samples; what it cost; how many cells it filled."""
    teacher = EndpointTeacher(engine, plan, words, writing=WritingSettings(beside=0))
    desk, cells = Desk(teacher, show, Some(seed)), [Job(cell) for cell in plan.cells]
    ledger, attempts = engine.journal.ledger, list[Attempt]()

    def estimated(number: int) -> Estimate:
        return desk.estimate(cells, engine, stratum=teacher.stratum, seed=SAMPLES * seed + number)

    first, jobs = estimated(0), cells
    for _ in range(ROUNDS + 1):
        for end in desk.ends(jobs):
            attempts.append(Attempt(end.job.cell.number, end.job.ordinal, None if end.accepted else "rejected"))
        jobs = [Job(*one) for one in refills(plan, attempts)]
    spent = ledger.spent
    found = [first, *(estimated(number) for number in range(1, SAMPLES))]
    assert ledger.spent == spent, "a sample that was there was paid again"
    return found, spent, sum(attempt.reason is None for attempt in attempts)


def test_the_interval_holds_the_real_cost_of_ninety_runs_of_a_hundred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate that `--dry-run` makes, of 24 cells by strata, against a run: repairs, retries, lost replies, refills.

    Ten servers, and of each ten samples: what is sampled behind the run is read from the journal, at what it cost.
    """
    monkeypatch.setenv("CALLS_KEY", KEY)
    weights = {"answer_format": "fit", "query_format": "fit", "topic": {"news": 1}, "genre": {"news": 1}}
    asked = recipe(CELLS, weights=weights, passages={"gold_absent": 0.4})
    plan, words = make_plan(asked), factors_of(asked)[0]
    settings = EndpointSettings(
        base_url="http://direct/v1", model="m", api_key_env="CALLS_KEY", concurrency=8, structured="strict"
    )
    held, ratios, kinds = 0, [], Counter[str]()
    for seed in range(SERVERS):
        server = FaultServer()
        server.reply, server.faults = author, Moods(seed)
        monkeypatch.setattr("raglan.calls.running.open_endpoint", server.direct)
        with CallEngine(settings, tmp_path / f"{seed}", money=MoneySettings(price=PRICE), clock=Clock(10_000.0)) as engine:
            estimates, spent, kept = whole_run(engine, plan, words, seed)
            for row in engine.ledger():
                kinds[row.cls] += row.calls
        assert server.bill <= spent
        assert {one.sampled for one in estimates} == {24}
        assert all(one.acceptance < 1 and one.attempts > CELLS for one in estimates)
        assert 0.9 * CELLS < kept <= CELLS
        held += sum(one.low <= spent <= one.high for one in estimates)
        ratios += [one.nano / spent for one in estimates]
    assert len(ratios) == 100
    assert held >= 90
    assert 0.9 < sum(ratios) / 100 < 1.1
    assert min(kinds[name] for name in ("malformed", "transient")) > 100
