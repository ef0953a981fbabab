"""Support by a judge and by an entailment model, closed book: paid once, missing never a pass, the same in any pieces."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

import tiny
from fault_server import KEY, PRICE, Fault, FaultServer, Request, audit, author
from raglan.calls import CallEngine
from raglan.calls.journal import Journal
from raglan.calls.limits import WINDOW, Clock
from raglan.errors import CallsStopped, CheckpointError, GeneratorError, RecipeError
from raglan.generator import open_generator
from raglan.recipe import ClosedBookSettings, EndpointSettings, GeneratorSettings, MoneySettings, PromptSettings, Recipe
from raglan.records import Example, Passage
from raglan.synthesis import Plan, factors_of, make_plan
from raglan.synthesis.checks import _piece, prices
from raglan.synthesis.desk import Desk
from raglan.synthesis.endpoint import EndpointTeacher
from raglan.synthesis.recall import ClosedBook, _words
from raglan.synthesis.run import Done, synthesize
from raglan.synthesis.writing import Draft, Job, Made
from raglan.verification import PaidJudge, Shown, Verdict, Verified, Verifier, Written
from raglan.verification.entailment import Entailment, entailment_label
from raglan.verification.judge import CONTROL
from test_cli import run
from test_synthesis import Altered, offline
from test_synthesis import recipe as rules
from test_synthesis import show as shown
from test_synthesis_endpoint import recipe, show

WEIGHTS = {
    "task": {"factoid": 1}, "answer_format": {"short_sentence": 1}, "query_format": {"wh_question": 1},
    "relation": {"R1": 2, "R3": 1}, "genre": "fit", "absent_policy": {"abstain": 1},
}  # fmt: skip
OPEN = Written("a", "Who led the observatory?", "Ilse Brandt led it.", (Shown("Ilse Brandt led it for years."),), language="en")


def part(asked: str, head: str) -> str:
    """What stands under a head of a judge's prompt."""
    return asked.partition(f"## {head}\n")[2].partition("\n\n## ")[0]


def name(body: dict[str, Any]) -> str:
    return str(body.get("response_format", {}).get("json_schema", {}).get("name", ""))


def is_control(request: Request) -> bool:
    return request.body["messages"] == [*CONTROL]


def reply(body: dict[str, Any]) -> str:
    """An author's; of every second question no short answer is known. And a judge's, by what it is shown."""
    if body["messages"] == [*CONTROL]:
        agrees = {"agrees": "unclear"} if name(body) == "Compared" else {}
        return json.dumps({"reason": "A trial.", "verdict": "unclear"} | agrees)
    if len(body["messages"]) == 1:  # how the server takes schemas
        return author(body)
    system, asked = (message["content"] for message in body["messages"][:2])
    if name(body) in ("Supported", "Compared"):
        years = re.findall(r"year (\d+)", part(asked, "Answer"))
        held = bool(years) and all(f"year {year}" in part(asked, "Passages") for year in years)
        told = {"reason": "It stands there." if held else "No year.", "verdict": "supported" if held else "unsupported"}
        known = part(asked, "Facts") + part(asked, "Short answers")
        return json.dumps(
            told | ({"agrees": "yes" if years and years[0] in known else "no"} if name(body) == "Compared" else {})
        )
    if name(body) == "Holds":  # towers of even numbers answer everything
        tower = re.search(r"tower (\d+)", part(asked, "Passage"))
        return json.dumps({"reason": "So it is.", "verdict": "yes" if tower and int(tower[1]) % 2 == 0 else "no"})
    if system in _words()["wordings"]["en"]:  # the closed book knows half of the mills
        mark = re.findall(r"mill ([0-9a-f]{10})", asked)[-1]
        return f"In {1000 + int(mark[:3], 16) % 900}." if int(mark[-1], 16) % 2 else "I do not know."
    if name(body) == "DraftReply":
        drafted = json.loads(author(body))
        return json.dumps({**drafted, "answers": drafted["answers"] if int(drafted["subject"][-1], 16) % 4 < 2 else []})
    return author(body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    monkeypatch.setenv("CALLS_KEY", KEY)
    with FaultServer(delay=0.002) as server:
        server.reply = reply
        yield server


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(asked(Path("x")))


def asked(folder: Path) -> Recipe:
    passages = {"k": {3: 1, 5: 1}, "gold_absent": 0.1}
    return recipe(24, path=folder / "data", split={}, decontaminate="none", weights=WEIGHTS, passages=passages)


def judged(
    server: FaultServer, folder: Path, plan: Plan, *, piece: int = 128, closed: ClosedBookSettings | None = None,
    cap: str | None = None, **settings: Any,
) -> Done:  # fmt: skip
    """A dataset with a teacher and a judge on one server, of two names."""
    wanted, money = asked(folder), MoneySettings.model_validate({"price": PRICE, "cap_usd": cap})
    with closing(Journal(folder / "calls")) as journal:
        writes, judges = (
            CallEngine(
                EndpointSettings(base_url=server.url, model=model, api_key_env="CALLS_KEY", concurrency=8, **settings),
                journal, money=money, clock=Clock(100.0),
            )
            for model in ("m", "j")
        )  # fmt: skip
        return synthesize(
            wanted, EndpointTeacher(writes, plan, factors_of(wanted)[0]), show, plan=plan,
            verifier=Verifier(judge=PaidJudge(judges)), piece=piece,
            recall=None if closed is None else ClosedBook.paid(closed, judges),
        )  # fmt: skip


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# --- a judge in a run -------------------------------------------------------------------------------------------------


def test_a_run_that_stops_among_judgements_pays_none_twice_and_ends_the_same(
    server: FaultServer, tmp_path: Path, plan: Plan
) -> None:
    judging = [0]

    def refused(number: int, request: Request) -> Fault | None:
        judging[0] += name(request.body) == "Compared"
        return Fault(401, code="invalid_api_key") if judging[0] == 6 and name(request.body) == "Compared" else None

    server.faults = refused
    first = judged(server, tmp_path / "stopped", plan, piece=9)
    assert first.told["stopped"].startswith("fatal")
    assert 0 < first.told["kept"] < 24, "a stop leaves finished examples"
    done = judged(server, tmp_path / "stopped", plan, piece=5)
    assert (done.exit_code, done.told["stopped"]) == (0, "")
    audit(server, tmp_path / "stopped/calls")  # no call with a reply is sent again, the ledger is not below the bill
    assert set(done.told["support"]) == {"string", "judge", "n/a"}
    straight = judged(server, tmp_path / "straight", plan)
    for file in ("examples.jsonl", "rejects.jsonl", "attempts.jsonl"):
        assert (done.folder / file).read_bytes() == (straight.folder / file).read_bytes(), file
    models = {(request.body["model"], name(request.body)) for request in server.log}
    assert {("j", "Compared")} == {pair for pair in models if pair[1] in ("Compared", "Supported")}


def test_no_request_of_either_arrives_in_a_pause_that_one_was_told(server: FaultServer, tmp_path: Path, plan: Plan) -> None:
    """Few jobs at a time and no second try, so that whoever is told has often nothing left to send, and the other has.

    Who is next is chance: there are runs until each has been next behind the other.
    """

    def busy(number: int, request: Request) -> Fault | None:
        last = name(request.body) in ("", "Compared") and len(request.body["messages"]) > 1  # answers and judgements
        return Fault(429, headers={"Retry-After": "10"}) if last and number % 4 == 0 else None

    server.faults = busy
    switched: set[tuple[str, str]] = set()
    both = {("m", "j"), ("j", "m")}
    for number in range(8):
        switched |= _next_behind_pauses(server, tmp_path / f"{number}", plan)
        if both <= switched:
            break
    assert both <= switched, "each was told, and the other was next"


def _next_behind_pauses(server: FaultServer, folder: Path, plan: Plan) -> set[tuple[str, str]]:
    """(who was told to wait, who sent first behind it) of one run; nobody sends within a pause."""
    assert judged(server, folder, plan, piece=3, attempts=1).told["kept"] > 0
    with closing(Journal(folder / "calls")) as journal:
        book = list(journal.lines())
    sent = {request.idem: request for request in server.log}
    intents = {(line["key"], line["attempt"]): line for line in book if line["kind"] == "intent"}
    until, told, switched = 0.0, "", set()
    for line in book:  # in the order in which the client wrote them
        if line["kind"] == "outcome" and "429" in line.get("error", ""):
            asked = intents[line["key"], line["attempt"]]
            until, told = sent[asked["idem"]].at + 0.95 * 10 / 100, asked["model"]
        elif line["kind"] == "intent" and until:
            assert sent[line["idem"]].at >= until, f"{line['model']} did not wait for what {told} was told"
            switched.add((told, line["model"]))
    return switched


def test_a_judge_is_shown_the_passages_and_what_is_known_and_no_role(server: FaultServer, tmp_path: Path, plan: Plan) -> None:
    done = judged(server, tmp_path, plan)
    examples = lines(done.folder / "examples.jsonl")
    asked_of = [request.body["messages"][1]["content"] for request in server.log if name(request.body) == "Compared"]
    own = [one for one in examples if one["synth"]["support"] == "judge"]
    assert own
    for one in own:
        (text,) = (text for text in asked_of if one["query"] in text)
        assert all(passage["text"] in part(text, "Passages") for passage in one["synth"]["passages"])
        assert one["synth"]["target"] == part(text, "Answer")
        assert all(fact in part(text, "Facts") for fact in one["synth"]["facts"])
        assert not re.search("gold|noise|hard|support", text)
        assert "Short answers" not in text, "with one, strings tell"


def test_a_judge_that_fails_is_missing_and_asked_again_later(server: FaultServer, tmp_path: Path, plan: Plan) -> None:
    server.faults = lambda n, request: Fault(400, code="context_length_exceeded") if name(request.body) == "Compared" else None
    done = judged(server, tmp_path, plan)
    missing = done.told["funnel"]["verify: support_missing"]
    assert missing > 0
    row = next(row for row in lines(done.folder / "rejects.jsonl") if row["reason"] == "support_missing")
    assert "the judge gave no verdict: permanent" in row["detail"]
    assert "judge" not in done.told["support"]
    with closing(Journal(tmp_path / "calls")) as journal:
        assert {row.cls for row in journal.ledger.rows() if row.step == "judge/support"} == {"permanent"}
        judge = PaidJudge(
            CallEngine(EndpointSettings(base_url=server.url, model="j"), journal, money=MoneySettings(price="free"))
        )
        one = replace(OPEN, facts=("Ilse Brandt led it.",))
        assert Verifier(judge=judge).verify_all([one], settle=False) == ([None], None), "not asked is no verdict"


@pytest.mark.parametrize("attempts", [1, 6], ids=["each fails", "the breaker stops"])
def test_a_judges_outage_stops_the_run_and_is_no_verdict(
    server: FaultServer, tmp_path: Path, plan: Plan, attempts: int
) -> None:
    server.faults = lambda n, request: Fault(503) if name(request.body) == "Compared" else None
    stopped = judged(server, tmp_path, plan, attempts=attempts)
    assert stopped.told["stopped"].startswith("breaker")
    assert not any(row["reason"] == "support_missing" for row in lines(stopped.folder / "rejects.jsonl"))
    assert not any(row["ordinal"] for row in lines(stopped.folder / "attempts.jsonl")), "nothing is written in their place"
    server.faults = lambda n, request: None
    assert judged(server, tmp_path, plan).exit_code == 0


@pytest.mark.parametrize(
    "first", [Fault(500), Fault(text="Yes."), Fault(text="{", finish="length")], ids=["judgement", "repair", "larger limit"]
)
def test_a_judgement_that_never_comes_stops_one_run_and_is_a_reject_of_the_next(
    server: FaultServer, tmp_path: Path, plan: Plan, first: Fault
) -> None:
    never: set[str] = set()

    def bad(number: int, request: Request) -> Fault | None:
        if name(request.body) != "Compared" or is_control(request):
            return None
        query = part(request.body["messages"][1]["content"], "Question")
        if not never:
            never.add(query)
            return first
        return Fault(500) if query in never else None

    server.faults = bad
    limits: dict[str, Any] = {"piece": 1, "attempts": 2, "larger_limit": 500}  # so that nothing else is asked beside it
    stopped = judged(server, tmp_path, plan, **limits)
    assert (stopped.exit_code, stopped.told["stopped"].split(":")[0]) == (3, "breaker")
    assert not any(row["reason"] == "judge_unreachable" for row in lines(stopped.folder / "rejects.jsonl"))
    done = judged(server, tmp_path, plan, **limits)
    assert (done.exit_code, done.told["stopped"], done.told["kept"]) == (0, "", 24)
    (row,) = (row for row in lines(done.folder / "rejects.jsonl") if row["reason"] == "judge_unreachable")
    assert (row["query"] in never, "500" in row["detail"]) == (True, True)
    assert done.told["funnel"]["verify: judge_unreachable"] == 1
    told = done.told
    assert told["attempts"] == told["kept"] + told["surplus"] + len(lines(done.folder / "rejects.jsonl")), "all accounted for"
    assert [(request.body["model"], name(request.body)) for request in server.log if is_control(request)] == [("j", "Compared")]
    audit(server, tmp_path / "calls")


@pytest.mark.parametrize("recovers", ["at the control question", "later"])
def test_an_outage_rejects_nothing_however_often_the_run_is_begun_again(
    server: FaultServer, tmp_path: Path, plan: Plan, recovers: str
) -> None:
    well = [False]

    def away(number: int, request: Request) -> Fault | None:
        well[0] |= is_control(request) and recovers == "at the control question"
        return Fault(503) if request.body["model"] == "j" and not well[0] else None

    server.faults = lambda n, request: Fault(401) if name(request.body) == "Compared" else None
    assert judged(server, tmp_path, plan).told["stopped"].startswith("fatal")  # how the judge takes schemas is known by now
    server.faults = away
    runs = [judged(server, tmp_path, plan, attempts=1) for _ in range(4)]
    if recovers == "later":
        assert {run.told["stopped"].split(":")[0] for run in runs} == {"breaker"}
        assert len({len(lines(run.folder / "attempts.jsonl")) for run in runs}) == 1
        well[0] = True
        runs.append(judged(server, tmp_path, plan, attempts=1))
    assert runs[-1].told["stopped"] == ""
    assert runs[-1].exit_code == 0
    rejects = lines(runs[-1].folder / "rejects.jsonl")
    assert not any(row["reason"] in ("judge_unreachable", "support_missing") for row in rejects)


def observatories(count: int) -> list[Written]:
    told = "It was the year 1800."
    return [Written(f"{n}", f"When did the observatory {n} open?", told, (Shown(told),), language="en") for n in range(count)]


def verified(
    server: FaultServer, folder: Path, ones: list[Written], *, cap: str | None = None, give_up: int = 2, **settings: Any
) -> tuple[list[Verified | None], CallsStopped | None]:
    """One run's verdicts."""
    shared = {"base_url": server.url, "model": "j", "api_key_env": "CALLS_KEY", "concurrency": 8, "structured": "strict"}
    money, clock = MoneySettings.model_validate({"price": PRICE, "cap_usd": cap}), Clock(1000.0)
    with CallEngine(EndpointSettings.model_validate(shared | settings), folder, money=money, clock=clock) as engine:
        return Verifier(judge=PaidJudge(engine, give_up=give_up)).verify_all(ones)


@pytest.mark.parametrize("concurrency", [8, 32])
def test_many_that_never_come_end_too_though_the_breaker_stops_each_run(
    server: FaultServer, tmp_path: Path, concurrency: int
) -> None:
    server.faults = lambda n, request: None if is_control(request) else Fault(500)
    found, stopped = verified(server, tmp_path, observatories(20), concurrency=concurrency)
    assert (set(found), stopped is not None and stopped.reason) == ({None}, "breaker")
    ended = [0]
    while stopped is not None and len(ended) < 12:
        found, stopped = verified(server, tmp_path, observatories(20), concurrency=concurrency)
        ended.append(sum(one is not None for one in found))
    assert ended == sorted(ended)
    assert stopped is None
    assert {one and one.reason for one in found} == {"judge_unreachable"}
    audit(server, tmp_path)


@pytest.mark.parametrize("give_up", [1, 2])
def test_however_many_never_come_the_run_of_that_number_gives_them_all_up(
    server: FaultServer, tmp_path: Path, give_up: int
) -> None:
    server.faults = lambda n, request: None if is_control(request) else Fault(500)
    between: list[int] = []  # requests from one control question to the next, run by run
    for run_number in range(1, give_up + 1):
        before = len(server.log)
        found, stopped = verified(server, tmp_path, observatories(200), concurrency=16, attempts=2, give_up=give_up)
        assert (stopped is None) == (run_number == give_up), "an earlier run gives nothing up"
        controls = [place for place in range(before, len(server.log)) if is_control(server.log[place])]
        between += [b - a for a, b in itertools.pairwise([before, *controls, len(server.log)])]
    assert {one and one.reason for one in found} == {"judge_unreachable"}
    assert max(between) <= WINDOW + 2 * 16, "fifty failures, and what was under way at their start and at their end"
    audit(server, tmp_path)


def test_in_pieces_and_rounds_the_second_run_gives_up_what_never_comes(
    server: FaultServer, tmp_path: Path, plan: Plan
) -> None:
    """Other judgements are asked for in later pieces, and in place of what is given up; all of them fail, too."""
    server.faults = lambda n, request: Fault(500) if name(request.body) == "Compared" and not is_control(request) else None
    assert judged(server, tmp_path, plan, piece=5, attempts=2).told["stopped"].startswith("breaker")
    done = judged(server, tmp_path, plan, piece=5, attempts=2)
    assert done.told["stopped"] == ""
    rejects = [row for row in lines(done.folder / "rejects.jsonl") if row["reason"] == "judge_unreachable"]
    assert {0, 1} <= {row["ordinal"] for row in rejects}, "of a later round, too"
    assert done.told["funnel"]["verify: judge_unreachable"] == len(rejects)
    audit(server, tmp_path / "calls")


def test_an_outage_of_many_gives_nothing_up_however_often_it_is_begun_again(server: FaultServer, tmp_path: Path) -> None:
    server.faults = lambda n, request: Fault(503)
    for _ in range(4):
        found, stopped = verified(server, tmp_path, observatories(200), concurrency=16)
        assert (set(found), stopped is not None and stopped.reason) == ({None}, "breaker")
    server.faults = lambda n, request: None
    found, stopped = verified(server, tmp_path, observatories(200), concurrency=16)
    assert (stopped, {one and one.reason for one in found}) == (None, {""})


def test_an_outage_late_among_judgements_is_no_verdict_either(server: FaultServer, tmp_path: Path) -> None:
    ones, came = observatories(20), [0]

    def goes(number: int, request: Request) -> Fault | None:
        came[0] += 1
        return Fault(503) if came[0] > 17 else None

    server.faults = goes
    for _ in range(3):
        found, stopped = verified(server, tmp_path, ones)
        assert stopped is not None
        assert [one and one.reason for one in found if one is not None] == [""] * 17, "nothing is rejected"
    server.faults = lambda n, request: None
    found, stopped = verified(server, tmp_path, ones)
    assert (stopped, {one and one.reason for one in found}) == (None, {""})
    audit(server, tmp_path)


def test_one_that_fails_beside_others_is_missing_if_the_server_is_well(server: FaultServer, tmp_path: Path) -> None:
    server.faults = lambda n, request: Fault(500) if "observatory 3 " in request.content else None
    found, stopped = verified(server, tmp_path, observatories(6))
    assert stopped is None
    assert [one and one.reason for one in found] == ["", "", "", "support_missing", "", ""]
    assert sum(map(is_control, server.log)) == 1


def test_where_only_schemas_are_away_nothing_is_rejected(server: FaultServer, tmp_path: Path) -> None:
    server.faults = lambda n, request: Fault(503) if "response_format" in request.body else None
    for _ in range(4):
        found, stopped = verified(server, tmp_path, observatories(3), attempts=2)
        assert (found, stopped is not None and stopped.reason) == ([None] * 3, "breaker")
    assert any(map(is_control, server.log))


def test_what_is_given_up_is_remembered_and_paid_for_no_more(server: FaultServer, tmp_path: Path) -> None:
    server.faults = lambda n, request: None if is_control(request) else Fault(500)
    assert verified(server, tmp_path, observatories(1), attempts=2)[1] is not None
    found, stopped = verified(server, tmp_path, observatories(1), attempts=2)
    sent = len(server.log)
    assert sent == 3 * 2 + 1
    server.faults = lambda n, request: None
    assert verified(server, tmp_path, observatories(1), attempts=2) == (found, stopped)
    assert (stopped, found[0] and found[0].reason, len(server.log)) == (None, "judge_unreachable", sent)


def test_what_never_comes_and_may_have_cost_stays_under_the_cap(server: FaultServer, tmp_path: Path) -> None:
    server.faults = lambda n, request: None if is_control(request) else Fault(cut="reset")
    reasons = []
    for cap in ("0.02", "0.02", "0.04", "0.06", "0.20", "0.20"):
        found, stopped = verified(server, tmp_path, observatories(2), cap=cap, attempts=2)
        reasons.append("" if stopped is None else stopped.reason)
        with closing(Journal(tmp_path)) as journal:
            assert server.bill <= journal.ledger.spent <= float(cap) * 10**9
    assert (reasons[:2], reasons[-1]) == (["cap", "cap"], "")
    assert {one and one.reason for one in found} == {"judge_unreachable"}
    audit(server, tmp_path)


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        ({"verdict": "supported", "agrees": "yes"}, Verdict("support", "pass", "judge")),
        ({"verdict": "supported", "agrees": "no"}, Verdict("support", "fail", "contradicts_facts", "so")),
        ({"verdict": "unsupported", "agrees": "yes"}, Verdict("support", "fail", "judged_unsupported", "so")),
        ({"verdict": "supported", "agrees": "unclear"}, Verdict("support", "missing", "judge_said_neither")),
        ({"verdict": "unclear", "agrees": "yes"}, Verdict("support", "missing", "judge_said_neither")),
    ],
)
def test_an_answer_is_compared_with_the_facts(
    server: FaultServer, tmp_path: Path, said: dict[str, str], outcome: Verdict
) -> None:
    server.reply = lambda body: json.dumps({"reason": "so", **said}) if name(body) == "Compared" else reply(body)
    settings = EndpointSettings(base_url=server.url, model="j", api_key_env="CALLS_KEY")
    with CallEngine(settings, tmp_path, money=MoneySettings(price="free")) as engine:
        verifier = Verifier(judge=PaidJudge(engine))
        (found,), stopped = verifier.verify_all([replace(OPEN, facts=("It was led by Ilse Brandt.",))])
    assert (stopped, found is not None and found.verdicts[-1]) == (None, outcome)


def test_half_a_character_in_a_reason_is_repaired_as_what_a_teacher_replies(server: FaultServer, tmp_path: Path) -> None:
    torn = json.dumps({"reason": "so \ud83d", "verdict": "supported"})
    server.reply = lambda body: torn if name(body) == "Supported" else reply(body)
    settings = EndpointSettings(base_url=server.url, model="j", api_key_env="CALLS_KEY")
    with CallEngine(settings, tmp_path, money=MoneySettings(price="free")) as engine:
        (found,), _ = Verifier(judge=PaidJudge(engine)).verify_all([OPEN])
    assert found is not None
    assert (found.reason, found.verdicts[-1].reason) == ("support_missing", "judge_failed")
    assert "malformed" in found.verdicts[-1].detail
    assert sum(name(request.body) == "Supported" for request in server.log) == 2, "one repair"


# --- the command line: estimate, guard, verify ------------------------------------------------------------------------


@pytest.fixture
def paid(tmp_path: Path, server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with a built knowledge base of towers, a teacher and a judge."""
    documents = [
        {"id": f"p{n}", "title": "Of Vessen", "text": f"The tower {n} of Vessen was built of grey stone by miller Odo{n} ."}
        for n in range(40)
    ]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    tiny.llama(tmp_path / "student")
    tiny.sentence_encoder(tmp_path / "encoder")
    endpoint = {"kind": "endpoint", "base_url": server.url, "model": "m", "api_key_env": "CALLS_KEY", "concurrency": 8}
    tree = {
        "name": "paid", "seed": 1, "generator": {"model": "student"}, "retriever": {"index": "bm25"},
        "knowledge": {
            "path": "kb", "documents": "corpus.jsonl", "chunk": None, "indexes": {"bm25": {"kind": "bm25"}},
            "encoder": {"model": "encoder/encoder", "dtype": "float32"},
        },
        "synthesis": {
            "path": "data", "n": 30, "from_scratch": 1, "passages": {"k": {3: 1, 5: 1}, "gold_absent": 0.2}, "weights": WEIGHTS,
            "budget": {"tokenizer": "student", "max_length": 1900, "answer": 100}, "decontaminate": "none",
            "teacher": endpoint, "money": {"price": PRICE},
            "verify": {
                "support": {"kind": "judge", "endpoint": {**endpoint, "model": "j"}, "price": {"input": 1, "output": 2}},
            },
        },
    }  # fmt: skip
    (tmp_path / "paid.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "paid.yaml"


def test_estimate_and_run_ask_the_judge_of_answers_and_of_noise(
    server: FaultServer, paid: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(*words: str) -> tuple[int, str, str]:
        return run(*words, capsys=capsys, monkeypatch=monkeypatch)

    server.faults = lambda n, request: (  # a judge is not paid the teacher's price
        Fault(usage=(1000, 100)) if name(request.body) in ("Compared", "Holds") else None
    )
    assert call("build", str(paid))[0] == 0
    code, out, err = call("synthesize", str(paid), "--dry-run")
    assert code == 0, err
    for step in ("judge/guard", "judge/support", "answer"):
        assert re.search(rf"(?m)^{step} +[\d,]+ .*\$\d+\.\d+   \$\d+\.\d+ to \$\d+\.\d+$", out), out
    assert call("synthesize", str(paid))[0] == 2, "no cap and no consent"
    code, out, err = call("synthesize", str(paid), "--yes")
    assert code == 0, out + err
    sent = [request.idem for request in server.log]
    assert len(set(sent)) == len(sent), "paid twice"
    cost = json.loads((paid.parent / "data/cost.json").read_text())
    steps = {row["step"]: row for row in cost["rows"]}
    assert steps["judge/guard"]["nano"] == 1_200_000 * steps["judge/guard"]["calls"]
    kinds = set()
    for one in lines(paid.parent / "data/examples.jsonl"):
        towers = [passage for passage in one["synth"]["passages"] if "tower" in passage["text"]]
        for passage in towers:
            even = int(re.findall(r"tower (\d+)", passage["text"])[0]) % 2 == 0
            kinds.add(
                (bool(one["answers"]), one["synth"]["factors"]["relation"] == "R5", even, passage["role"], passage["guard"])
            )
    known, absent = {kind for kind in kinds if kind[0]}, {kind for kind in kinds if kind[1] and not kind[0]}
    assert {kind[3:] for kind in known} == {("noise", "clean")}, "strings tell, whatever the judge would say"
    assert {kind[2:] for kind in kinds - known - absent} == {(True, "support", "also_gold"), (False, "noise", "clean")}
    assert {kind[2:] for kind in absent} == {(False, "noise", "clean")}


def test_rules_with_a_judge_have_an_estimate_too(server: FaultServer, tmp_path: Path) -> None:
    teacher, plan = offline(rules(tmp_path))
    without = Altered(
        teacher, lambda made: replace(made, sheet=replace(made.sheet, draft=replace(made.sheet.draft, answers=())))
    )
    said = json.dumps({"reason": "so", "verdict": "supported", "agrees": "yes"})
    server.reply = lambda body: said if name(body) == "Compared" else reply(body)
    settings = EndpointSettings(base_url=server.url, model="j", api_key_env="CALLS_KEY")

    def judgements() -> int:
        return sum(name(request.body) == "Compared" for request in server.log)

    with CallEngine(settings, tmp_path / "calls", money=MoneySettings.model_validate({"price": PRICE})) as engine:
        jobs, judge = [Job(cell) for cell in plan.cells], Verifier(judge=PaidJudge(engine))
        plain = Desk(teacher, shown, judge).estimate(jobs, engine, stratum=lambda job: job.cell.task, sample=20)
        assert (plain.steps, plain.nano) == ({}, 0.0), "strings tell of all that rules write"
        desk = Desk(without, shown, judge)
        found = desk.estimate(jobs, engine, stratum=lambda job: job.cell.task, sample=20)
        assert 0 < judgements() < 20, "where no passage answers nothing is judged"
        judged = [end for end in desk.ends(jobs) if end.told()["support"] == "judge"]
        assert judgements() == len(judged), "the sample was not paid twice"
    step, low, high = found.steps["judge/support"]
    assert len(judged) / 2 < step.calls < 2 * len(judged)
    assert low <= engine.journal.ledger.spent <= high * 1.1  # how the server takes schemas was asked, too


def test_somebody_has_to_judge(paid: Path) -> None:
    tree = yaml.safe_load(paid.read_text())["synthesis"]
    with pytest.raises(ValueError, match="a judge without an endpoint"):
        Recipe.model_validate({
            "name": "t", "knowledge": {"path": "kb", "documents": "docs"},
            "synthesis": {**tree, "teacher": {"kind": "offline"}, "verify": {"support": {"kind": "judge"}}},
        })  # fmt: skip


def test_another_model_than_the_teachers_has_a_price_of_its_own(paid: Path) -> None:
    tree = yaml.safe_load(paid.read_text())
    money, verify = tree["synthesis"]["money"], tree["synthesis"]["verify"]
    own = verify["support"].pop("price")
    money["price"] = "free"

    def costs() -> list[Any]:
        found = Recipe.model_validate(tree).synthesis
        assert found is not None
        return prices(found)

    with pytest.raises(RecipeError, match=r"verify\.support\.price is not said"):
        costs()
    verify["support"]["endpoint"]["model"] = "m"
    assert costs() == ["free", "free"], "the teacher's server and model"
    verify["closed_book"] = {"endpoint": {**verify["support"]["endpoint"], "base_url": "http://localhost:1/v1"}}
    with pytest.raises(RecipeError, match=r"verify\.closed_book\.price is not said"):
        costs()
    verify["closed_book"]["price"] = own
    assert costs()[-1] != "free"


def test_a_generator_here_reads_pieces_of_one_size(paid: Path) -> None:
    tree = yaml.safe_load(paid.read_text())

    def piece(concurrency: int) -> int:
        tree["synthesis"]["teacher"]["concurrency"] = concurrency
        found = Recipe.model_validate(tree).synthesis
        assert found is not None
        return _piece(found)

    assert piece(64) > piece(8), "who is called has work"
    tree["synthesis"]["verify"]["closed_book"] = {"what": "tag"}
    assert piece(64) == piece(8)


def test_verify_asks_a_recipes_judge_and_goes_on_where_it_stopped(
    server: FaultServer, paid: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"id": f"r{n}", "query": f"When was the mill {n} opened?", "target": f"It was the year {1800 + n % 3}.",
         "passages": [{"text": f"The mill {n} was opened in the year 1800.", "role": "gold"}], "language": "en"}
        for n in range(12)
    ]  # fmt: skip
    tree = yaml.safe_load(paid.read_text())
    tree["synthesis"]["verify"]["support"]["price"] = PRICE  # as the server bills
    paid.write_text(yaml.safe_dump(tree))
    file = paid.parent / "written.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def verify(*more: str) -> tuple[int, str, str]:
        return run("verify", str(file), "--recipe", str(paid), "--json", *more, capsys=capsys, monkeypatch=monkeypatch)

    assert verify()[0] == 2, "no cap and no consent"
    seen = [0]

    def away(number: int, request: Request) -> Fault | None:
        seen[0] += name(request.body) == "Supported"
        return Fault(401, code="invalid_api_key") if seen[0] == 4 else None

    server.faults = away
    assert verify("--yes")[0] == 3
    code, out, err = verify("--yes", "-o", "kept.jsonl")
    assert code == 0, err
    told = json.loads(out)
    assert (told["accepted"], told["rejected"]) == (4, {"judged_unsupported": 8})
    assert [row["id"] for row in lines(paid.parent / "kept.jsonl")] == ["r0", "r3", "r6", "r9"]
    audit(server, paid.parent / "data/calls")
    sent = len(server.log)
    assert verify("--yes")[0] == 1
    assert len(server.log) == sent


# --- an entailment model ----------------------------------------------------------------------------------------------


def classifier(folder: Path, *, labels: tuple[str, ...] = ("contradiction", "ENTAILMENT", "neutral"), towards: int = 1) -> Path:
    """A tiny model of pairs that is inclined to one label."""
    torch.manual_seed(0)
    words = tiny.bert_tokenizer()
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=96, initializer_range=0.4, id2label=dict(enumerate(labels)), num_labels=len(labels),
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.bias[towards] += 3
    model.save_pretrained(str(folder))
    words.save_pretrained(str(folder))
    return folder


def test_entailment_is_the_models_own_and_no_premise_is_cut(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "nli", towards=2)
    found, words = Entailment(folder, batch_size=2), AutoTokenizer.from_pretrained(str(folder))
    pairs = [
        ("The tower was built in the year", "the tower was built"),
        ("a miller", "who built it"),
        ("x", "founded in the year"),
    ]

    def alone(premise: str, hypothesis: str) -> float:
        with torch.no_grad():
            logits = found.model(**words(premise, hypothesis, return_tensors="pt")).logits
        return float(logits.softmax(-1)[0, 1])

    assert found(pairs) == pytest.approx([alone(*pair) for pair in pairs], abs=1e-5)
    assert found(pairs[::-1]) == found(pairs)[::-1]
    long = " ".join(["the tower was built by a miller"] * 30)
    windows = words(
        long, "the tower", truncation="only_first", max_length=96, stride=16, return_overflowing_tokens=True
    )["input_ids"]  # fmt: skip
    assert len(windows) > 2
    with torch.no_grad():
        best = max(float(found.model(torch.tensor([ids])).logits.softmax(-1)[0, 1]) for ids in windows)
    assert found([(long, "the tower")]) == pytest.approx([best], abs=1e-5)
    with pytest.raises(GeneratorError, match="leaves no room for a passage"):
        found([("a tower", "the tower of the miller " * 20)])


def test_a_model_that_tells_no_entailment_is_refused(tmp_path: Path) -> None:
    assert entailment_label({0: "not_entailment", 1: "entailment"}, where="here") == 1
    with pytest.raises(CheckpointError, match="LABEL_0, LABEL_1, and none of these says entailment"):
        Entailment(classifier(tmp_path / "two", labels=("LABEL_0", "LABEL_1")))
    with pytest.raises(CheckpointError, match="more than one"):
        entailment_label({0: "entailment", 1: "Entails"}, where="here")
    with pytest.raises(CheckpointError, match="holds no model"):
        Entailment(tmp_path / "nowhere")


@pytest.mark.parametrize(("towards", "told"), [(1, {"accepted": 1}), (0, {"rejected": {"not_entailed": 1}})])
def test_verify_asks_a_recipes_entailment_model(
    tmp_path: Path, towards: int, told: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier(tmp_path / "nli", towards=towards)
    tree = {
        "name": "t", "knowledge": {"path": "kb", "documents": "docs.jsonl"},
        "synthesis": {"path": "data", "n": 1, "verify": {"support": {"kind": "nli", "model": "nli"}}},
    }  # fmt: skip
    (tmp_path / "docs.jsonl").write_text("")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    row = {"query": OPEN.query, "target": OPEN.target, "passages": [{"text": OPEN.passages[0].text}], "language": "en"}
    (tmp_path / "written.jsonl").write_text(json.dumps(row) + "\n")
    words = ("verify", str(tmp_path / "written.jsonl"), "--recipe", str(tmp_path / "r.yaml"), "--json")
    _, out, err = run(*words, capsys=capsys, monkeypatch=monkeypatch)
    found = json.loads(out)
    assert {key: found[key] for key in told} == told, err
    assert not (tmp_path / "data").exists(), "nothing is paid"


# --- closed book ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["tag", "drop"])
def test_what_needs_no_passage_is_tagged_or_leaves(server: FaultServer, tmp_path: Path, plan: Plan, what: Any) -> None:
    done = judged(server, tmp_path, plan, piece=7, closed=ClosedBookSettings(what=what))
    asked_of = [one["synth"]["closed_book"] for one in lines(done.folder / "examples.jsonl") if "closed_book" in one["synth"]]
    counts = done.told["closed_book"]
    assert counts == {"asked": len(asked_of), "known": sum(own["right"] == 2 for own in asked_of)}
    assert all(own["draws"] == 2 for own in asked_of)
    if what == "tag":
        assert 0 < counts["known"] < counts["asked"]
        assert done.told["kept"] == 24
        assert "verify: closed_book" not in done.told["funnel"]
    else:
        assert counts["known"] == 0
        assert done.told["funnel"]["verify: closed_book"] > 0
    audit(server, tmp_path / "calls")
    questions = [request for request in server.log if request.body["messages"][0]["content"] in _words()["wordings"]["en"]]
    assert questions
    assert not any("opened in the year" in request.content for request in questions), "no passage is shown"


def test_the_generator_here_answers_in_two_wordings(tmp_path: Path, plan: Plan) -> None:
    generator = open_generator(GeneratorSettings(model=str(tiny.llama(tmp_path / "student"))), PromptSettings())
    prompt, query = generator.prompt, "When was the mill opened?"
    wordings = _words()["wordings"]["en"]
    rendered = [prompt.render(f"{wording}\n{query}", []) for wording in wordings]
    said = [one.text for one in generator.generate(rendered, max_new_tokens=8)]
    cell = next(cell for cell in plan.cells if cell.relation == "R1")
    gold = (Passage("g", f"It was opened {said[0]}"),)

    def told(answer: str, draws: int) -> Any:
        made = Made(show(Draft(Job(cell), query, (answer,) if answer else (), gold)), answer or "It was opened.")
        settings = ClosedBookSettings(what="drop", draws=draws, max_tokens=8)
        found, stopped = ClosedBook.local(settings, generator, prompt).ask([made])
        assert stopped is None
        return found[Job(cell).id]

    one = told(said[0], 1)
    assert (one.right, one.draws, one.drops) == (1, 1, True)
    other = told("an answer that nobody gives", 2)
    assert (other.right, other.draws, other.drops) == (0, 2, False)
    assert told("", 2) is None, "without an answer nothing can be right"


def test_a_guard_is_told_turns_and_facts_and_fails_without_a_word(server: FaultServer, tmp_path: Path) -> None:
    settings = EndpointSettings(base_url=server.url, model="j", api_key_env="CALLS_KEY", attempts=1)
    example, passage = Example("1-0", "And who built it?"), Passage("p", "The tower 4 was built by Odo.")
    with CallEngine(settings, tmp_path, money=MoneySettings(price="free"), clock=Clock(100.0)) as engine:
        judge = PaidJudge(engine)
        judge.history, judge.facts = ("Tell me of the tower 4.",), ("Odo built it.",)
        assert (judge.answers(example, passage), judge.waiting) == (None, 1)
        judge.settle()
        assert (judge.answers(example, passage), judge.waiting) == (True, 0)
        (text,) = (request.body["messages"][1]["content"] for request in server.log if name(request.body) == "Holds")
        assert (part(text, "Earlier turns"), part(text, "Facts")) == ("Tell me of the tower 4.", "- Odo built it.")
        server.faults = lambda n, request: Fault(400, code="context_length_exceeded")
        other = replace(passage, text="The tower 6 was built by Odo.")
        assert judge.answers(example, other) is None
        judge.settle()
        assert (judge.answers(example, other), judge.waiting) == (None, 0), "it is unchecked, and not asked again in this run"


def test_a_threshold_and_a_price_of_ones_own(tmp_path: Path) -> None:
    entails = Verifier(nli=lambda pairs: [0.7] * len(pairs))
    assert entails.verify(OPEN).accepted
    assert replace(entails, entailed=0.8).verify(OPEN).reason == "not_entailed"
    with pytest.raises(RecipeError, match="no check is called"):
        replace(entails, may_be_missing=("sense",))
