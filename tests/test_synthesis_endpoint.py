"""The teacher behind an endpoint, against a real server with faults; after every test the two books are compared."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fault_server import KEY, PRICE, Fault, FaultServer, Request, author
from raglan.calls import CallEngine
from raglan.calls.journal import Journal
from raglan.calls.limits import Clock
from raglan.corpus import Corpus, write_corpus
from raglan.errors import CallsStopped, RecipeError
from raglan.perturb import Slot
from raglan.recipe import EndpointSettings, MoneySettings, Recipe, WritingSettings
from raglan.records import Passage
from raglan.synthesis import Cell, Plan, factors_of, make_plan
from raglan.synthesis.endpoint import EndpointTeacher, load_prompts
from raglan.synthesis.endpoint.places import Library, Places
from raglan.synthesis.writing import Draft, Job, Made, Reject, Sheet

HERE = Path(__file__).parent
MONEY = MoneySettings(price=PRICE)


def recipe(n: int, **settings: Any) -> Recipe:
    synthesis = {"path": "out", "n": n, "from_scratch": 1, **settings}
    return Recipe.model_validate({
        "name": "t", "knowledge": {"path": "kb", "documents": "docs"}, "synthesis": synthesis,
    })  # fmt: skip


def show(draft: Draft) -> Sheet:
    """Evidence, and what was written beside it; the guard and the corpus's noise are another's."""
    cell = draft.job.cell
    gold = () if cell.relation == "R5" and cell.absent_policy != "partial" else draft.gold
    slots = tuple(Slot(one, "gold", "gold", "gold") for one in gold)
    slots += tuple(Slot(one, "noise", "hard", "made") for one in draft.beside)
    listed = "\n".join(f"[{number}] {slot.passage.title}: {slot.passage.text}" for number, slot in enumerate(slots, 1))
    prompt = "\n".join(["Answer from the passages.", *draft.history, listed, draft.query])
    return Sheet(draft, slots, prompt, "Answer from the passages.")


class Desk:
    """A server, a journal, a plan, and the teachers between them."""

    def __init__(self, folder: Path):
        self.folder = folder / "calls"
        self.past: list[Path] = []
        self.server = FaultServer(delay=0.002)
        self.server.reply = author
        self.server.__enter__()

    def engine(self, *, money: MoneySettings = MONEY, **settings: Any) -> CallEngine:
        shared = {"base_url": self.server.url, "model": "m", "api_key_env": "CALLS_KEY", "concurrency": 8, "timeout": 20}
        return CallEngine(EndpointSettings(**{**shared, **settings}), self.folder, money=money, clock=Clock(100.0))

    def write(self, plan: Plan, asked: Recipe, *, corpus: Corpus | None = None, jobs: list[Job] | None = None,
              **settings: Any) -> tuple[list[Made | Reject], CallsStopped | None]:  # fmt: skip
        """What came, and why it stopped, if it did."""
        came: list[Made | Reject] = []
        with self.engine(**settings) as engine:
            teacher = EndpointTeacher(engine, plan, factors_of(asked)[0], corpus=corpus)
            try:
                for end in teacher.write(jobs or [Job(cell) for cell in plan.cells], show):
                    came.append(end)
            except CallsStopped as why:
                return came, why
        return came, None

    def other(self, name: str) -> None:
        """Begin a journal of its own, and forget on the server's side what was answered."""
        self.past.append(self.folder)
        self.folder = self.folder.with_name(name)
        self.server._answered.clear()
        self.server._working.clear()

    def compare(self) -> None:
        """The two books: every request has its intent, the ledger is not below the bill, the key is nowhere."""
        intents: Counter[str] = Counter()
        spent, sure = 0, True
        for folder in [*self.past, self.folder]:
            journal = Journal(folder)
            lines = list(journal.lines())
            spent += journal.ledger.spent
            sure &= not journal.ledger.doubts.calls
            journal.close()
            intents.update(line["idem"] for line in lines if line["kind"] == "intent")
            sure &= all(line["settled"] for line in lines if line["kind"] == "outcome")
            for path in folder.rglob("*"):
                assert KEY.encode() not in path.read_bytes(), f"the key is in {path.name}"
        assert Counter(request.idem for request in self.server.log) <= intents
        assert self.server.bill <= spent
        if sure:
            assert self.server.bill == spent


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.setenv("CALLS_KEY", KEY)
    desk = Desk(tmp_path)
    yield desk
    desk.server.__exit__()
    desk.compare()


@pytest.fixture(scope="module")
def asked() -> Recipe:
    return recipe(30, weights={"answer_format": "fit", "query_format": "fit"})


@pytest.fixture(scope="module")
def plan(asked: Recipe) -> Plan:
    return make_plan(asked)


def row(end: Made | Reject) -> dict[str, Any]:
    """An end as one line, whole."""
    if isinstance(end, Reject):
        return {"job": end.job.id, "step": end.step, "reason": end.reason, "detail": end.detail, "raw": end.raw}
    draft = end.sheet.draft
    return {
        "job": draft.job.id, "query": draft.query, "answers": draft.answers, "facts": draft.facts, "about": draft.about,
        "slots": [[slot.passage.id, slot.passage.text, slot.role] for slot in end.sheet.slots], "target": end.target,
        "seen": end.seen,
    }  # fmt: skip


def rows(ends: list[Made | Reject]) -> str:
    return "\n".join(sorted(json.dumps(row(end), sort_keys=False) for end in ends))


# prompts


def test_prompts_are_data_with_a_hash() -> None:
    prompts = load_prompts()
    assert set(prompts) == {"en", "zh"}
    hashes = [digest for one in prompts.values() for digest in one.hashes.values()]
    assert len(set(hashes)) == len(hashes) == 14
    with pytest.raises(TypeError):
        prompts["en"].steps["draft"] = ("", "")  # type: ignore[index]
    assert set(prompts["en"].notes) == set(prompts["zh"].notes)


def test_ones_own_prompts_have_another_hash(tmp_path: Path) -> None:
    text = (Path(load_prompts.__code__.co_filename).parent / "prompts.en.yaml").read_text(encoding="utf-8")
    (tmp_path / "prompts.en.yaml").write_text(text.replace("You plan reading tasks.", "Plan reading tasks.", 1), encoding="utf-8")
    ours, theirs = load_prompts(), load_prompts(tmp_path)
    changed = [step for step, digest in ours["en"].hashes.items() if theirs["en"].hashes[step] != digest]
    assert changed == ["brainstorm"]
    assert theirs["zh"].hashes == ours["zh"].hashes
    (tmp_path / "prompts.zh.yaml").write_text("draft: {system: a}", encoding="utf-8")
    with pytest.raises(RecipeError, match="prompts.zh.yaml lacks"):
        load_prompts(tmp_path)


def test_what_is_filled_in_is_no_template() -> None:
    messages = load_prompts()["en"].messages("answer", prompt="say {count} and {notes}  ")
    assert messages[1]["content"] == "say {count} and {notes}  "


# the pipeline


def test_every_cell_ends_once(desk: Desk, plan: Plan, asked: Recipe) -> None:
    came, why = desk.write(plan, asked)
    assert why is None
    assert sorted(end.sheet.draft.job.cell.number if isinstance(end, Made) else end.job.cell.number for end in came) == list(range(30))
    made = [end for end in came if isinstance(end, Made)]
    assert len(made) == 30, [row(end) for end in came if isinstance(end, Reject)]
    for end in made:
        draft, cell = end.sheet.draft, end.sheet.draft.job.cell
        assert len(draft.gold) == cell.evidence
        assert len(draft.beside) == min(2, cell.noise.count("hard"))
        assert end.finish == "stop"
        steps = {"brainstorm", "draft", "answer"} | ({"passages"} if cell.evidence else set()) | ({"beside"} if draft.beside else set())
        assert set(end.seen["calls"]) == set(end.seen["prompts"]) == steps
        assert all(len(call["key"]) == 64 and call["nano_usd"] > 0 for call in end.seen["calls"].values())


def test_results_do_not_depend_on_concurrency_or_resuming(desk: Desk, plan: Plan, asked: Recipe) -> None:  # T4
    desk.server.faults = _by_content
    told = [rows(desk.write(plan, asked, concurrency=64)[0])]
    sent = len(desk.server.log)
    told.append(rows(desk.write(plan, asked, concurrency=3)[0]))
    again = [request for request in desk.server.log[sent:]]
    assert all("no, I will not" in _text(request) for request in again), "a call with a journalled reply was sent again"
    desk.other("again")
    told.append(rows(desk.write(plan, asked, concurrency=1)[0]))
    assert told[0] == told[1] == told[2]
    assert 0 < told[0].count('"reason": "malformed"') < 30


def _by_content(number: int, request: Request) -> Fault | None:
    """Some requests fail the first time, some replies never fit; by what is asked alone."""
    place = hashlib.sha256(json.dumps(request.body["messages"][:2]).encode()).digest()[0]
    if place < 12 and "response_format" in request.body and "trial" not in request.content:
        return Fault(text="no, I will not")
    return Fault(500) if place > 200 and request.idem.endswith("-0") else None


def _text(request: Request) -> str:
    return "no, I will not" if _by_content(0, request) == Fault(text="no, I will not") else ""


def test_who_answers_sees_what_the_student_sees_and_no_more(desk: Desk, plan: Plan, asked: Recipe) -> None:  # T12
    came, _ = desk.write(plan, asked)
    sheets = {end.sheet.prompt: end.sheet for end in came if isinstance(end, Made)}
    answers = [request for request in desk.server.log if request.body["messages"][1]["content"] in sheets]
    assert len(answers) == len(came) == 30
    system = load_prompts()["en"].steps["answer"][0]
    for request in answers:
        assert [message["content"] for message in request.body["messages"]] == [system, request.body["messages"][1]["content"]]
        sheet = sheets[request.body["messages"][1]["content"]]
        shown = " ".join(slot.passage.text for slot in sheet.slots) + sheet.draft.query
        assert all(fact in shown for fact in sheet.draft.facts if fact in request.content)
        for word in ("role", "gold", "noise", "hard", sheet.draft.about, "facts", "subject"):
            assert word not in request.content


def test_who_writes_passages_does_not_see_the_query(desk: Desk, plan: Plan, asked: Recipe) -> None:
    came, _ = desk.write(plan, asked)
    queries = [end.sheet.draft.query for end in came if isinstance(end, Made)]
    writing = [request for request in desk.server.log if "PassagesReply" in json.dumps(request.body)]
    assert len(writing) > 30
    for request in writing:
        assert not any(query in request.body["messages"][1]["content"] for query in queries)
        assert "When was" not in request.content


def test_fixed_parts_stay_equal(desk: Desk, plan: Plan, asked: Recipe) -> None:  # T34
    desk.write(plan, asked)
    systems = {request.body["messages"][0]["content"] for request in desk.server.log if request.body["messages"][0]["role"] == "system"}
    assert len(systems) == 5  # brainstorm, draft, passages, beside, answer


def test_a_cell_that_is_tried_again_gets_another_job(desk: Desk, plan: Plan, asked: Recipe) -> None:
    cell = plan.cells[7]
    came, _ = desk.write(plan, asked, jobs=[Job(cell), Job(cell, 1), Job(cell, 2)])
    assert len({end.sheet.draft.about for end in came if isinstance(end, Made)}) == 3
    brainstorms = [request for request in desk.server.log if "JobsReply" in json.dumps(request.body)]
    assert len(brainstorms) == 1


def test_two_replies_that_fail_give_one_reason(desk: Desk, plan: Plan, asked: Recipe) -> None:
    cell = next(cell for cell in plan.cells if cell.evidence and "hard" in cell.noise)
    for late in ("passages", "beside"):
        desk.server.faults = lambda n, request, late=late: (
            Fault(400, delay=0.05 if ("Not to be told" in request.content) == (late == "beside") else 0.0)
            if "PassagesReply" in json.dumps(request.body)
            else None
        )
        desk.other(late)
        came, _ = desk.write(plan, asked, jobs=[Job(cell)])
        assert [(end.step, end.reason) for end in came if isinstance(end, Reject)] == [("passages", "permanent")]
        assert isinstance(came[0], Reject)
        assert came[0].detail.startswith("400")
