"""The first and the thousandth call of every step: the same request, but for what is asked.

Whoever keeps prompts in lists that grow, or carries anything over from call to call, sends another thousandth request. Here a
thousand things of one kind are asked about, which differ in their marks alone, so that whole requests can be compared. The
engine is the real one; only the socket is left out.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fault_server import KEY, FaultServer, Request
from raglan.calls import Ask, CallEngine
from raglan.calls.limits import Clock
from raglan.calls.structured import ask_in_mode
from raglan.corpus import Corpus, write_corpus
from raglan.critique.endpoint import EndpointLabels
from raglan.critique.judgements import LABELS, Judgement, templates
from raglan.judge import _ask as ask_a_reader
from raglan.recipe import ClosedBookSettings, EndpointSettings, MoneySettings, WritingSettings
from raglan.records import Example, Passage
from raglan.synthesis import factors_of, make_plan
from raglan.synthesis.endpoint import EndpointTeacher
from raglan.synthesis.recall import ClosedBook
from raglan.synthesis.writing import Draft, Job, Made
from raglan.verification import PaidJudge, Shown, Verifier, Written
from test_judged import reply
from test_synthesis_endpoint import recipe, show

MANY = 1000
MARK = re.compile(r"[0-9a-f]{10}\d?|(?<=Odo)\d+|(?<=year )\d+|(?<=reader-)\d+")
FREE = MoneySettings(price="free")


def mark(number: int) -> str:
    return f"{number:010x}"


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CallEngine]:
    """Of a server that numbers the jobs it thinks of."""
    monkeypatch.setenv("CALLS_KEY", KEY)
    numbers = itertools.count()
    server = FaultServer()

    def numbered(body: dict[str, Any]) -> str:
        said = reply(body)
        if "jobs" not in said or len(body["messages"]) == 1:
            return said
        told = mark(next(numbers))
        return json.dumps({"jobs": [{"job": f"Reader {told} wants the year of mill {told}.", "material": "A year."}]})

    server.reply = numbered
    monkeypatch.setattr("raglan.calls.running.open_endpoint", server.direct)
    settings = EndpointSettings(
        base_url="http://direct/v1", model="m", api_key_env="CALLS_KEY", concurrency=8, structured="strict"
    )
    with CallEngine(settings, tmp_path / "calls", money=FREE, clock=Clock(1000.0)) as engine:
        engine.server = server  # type: ignore[attr-defined]
        yield engine


def sent(engine: CallEngine) -> dict[str, list[dict[str, Any]]]:
    """Whole requests by step, in the order in which they were sent."""
    steps = {line["idem"]: line["step"] for line in engine.journal.lines() if line["kind"] == "intent"}
    found: dict[str, list[dict[str, Any]]] = {}
    log: list[Request] = engine.server.log  # type: ignore[attr-defined]
    for request in log:
        found.setdefault(steps[request.idem], []).append(request.body)
    return found


def check(found: Mapping[str, Sequence[dict[str, Any]]], steps: set[str], *, equal: Collection[str] = ()) -> None:
    """A thousand of each step, all alike but for their marks, and no two the same but where it is said."""
    assert set(found) == steps
    for step, bodies in found.items():
        assert len(bodies) == MANY, step
        told = [json.dumps(body, ensure_ascii=False) for body in bodies]
        fixed = [MARK.sub("…", one) for one in told]
        assert fixed[0] == fixed[MANY - 1], step
        assert set(fixed) == {fixed[0]}, step
        assert len(set(told)) == (1 if step in equal else MANY), step


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("over", ["nothing", "corpus"])
def test_every_step_of_the_teacher(engine: CallEngine, tmp_path: Path, language: str, over: str) -> None:
    """A thousand attempts at one cell, each with a brainstorm of its own, from the job to the answer."""
    told = {
        "en": "The mill {0} stands by the river and is of grey stone.",
        "zh": "这座磨坊位于河边的小城之中，用灰色石头砌成，编号是{0}。",
    }
    passages = [Passage(f"p{n}", told[language].format(mark(n)), f"Mill {mark(n)}", f"d{n}", 0, 40) for n in range(MANY)]
    write_corpus(tmp_path / "corpus", passages)
    weights = {"task": {"factoid": 1}, "relation": {"R1": 1}, "answer_format": {"short_sentence": 1}}
    weights |= {"query_format": {"wh_question": 1}, "noise": {"hard": 1}}
    scratch = int(over == "nothing")
    asked = recipe(1, from_scratch=scratch, languages={language: 1}, weights=weights, passages={"k": {3: 1}, "gold_absent": 0})
    plan = make_plan(asked)
    teacher = EndpointTeacher(
        engine, plan, factors_of(asked)[0], corpus=Corpus(tmp_path / "corpus"), writing=WritingSettings(jobs=1)
    )
    ends = list(teacher.write((Job(plan.cells[0], n) for n in range(MANY)), show))
    assert sum(isinstance(end, Made) for end in ends) == MANY
    steps = {"brainstorm", "draft", "answer"} | ({"passages", "beside"} if scratch else set())
    check(sent(engine), steps, equal={"brainstorm"} if scratch else ())


WORDS = {
    "en": ("When was the mill {0} opened?", "It was the year 1800.", "The mill {0} was opened in the year 1800."),
    "zh": ("磨坊 {0} 是哪一年开业的？", "是 1800 年。", "磨坊 {0} 于 1800 年开业。"),
}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_step_of_the_judge_and_the_closed_book(engine: CallEngine, language: str) -> None:
    query, target, text = WORDS[language]
    judge = PaidJudge(engine)
    written = [
        Written(f"{n}", query.format(mark(n)), target, (Shown(text.format(mark(n)), mark(n)),), language=language,
                facts=(text.format(mark(n)),))
        for n in range(MANY)
    ]  # fmt: skip
    Verifier(judge=judge).verify_all(written)
    for n in range(MANY):
        example = Example(f"{n}", query.format(mark(n)))
        judge.answers(example, Passage(f"p{n}", text.format(mark(n)), mark(n)))
    judge.settle()
    cell = make_plan(recipe(1, languages={language: 1}, passages={"gold_absent": 0})).cells[0]
    made = []
    for n in range(MANY):
        gold = (Passage(f"g{n}", text.format(mark(n)), mark(n)),)
        made.append(Made(show(Draft(Job(cell, n), query.format(mark(n)), ("1800",), gold)), target))
    ClosedBook.paid(ClosedBookSettings(draws=1), engine).ask(made)
    check(sent(engine), {"judge/support", "judge/guard", "closed_book"})


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_step_of_evaluation_and_critique(engine: CallEngine, tmp_path: Path, language: str) -> None:
    """Built and not sent: what the engine makes of an ask is settled above."""
    query, target, text = WORDS[language]
    labels = EndpointLabels(engine.settings, templates(), tmp_path / "labels", money=FREE)
    found: dict[str, list[Ask]] = {}
    for n in range(MANY):
        passages = [(mark(n), text.format(mark(n)))]
        row = {"id": f"{n}", "query": query.format(mark(n)), "answers": [mark(n)]}
        asks = [
            ask_a_reader("rubric", row, "a", passages, [target]),
            ask_a_reader("pair", row, "a first", passages, [target, mark(n)]),
            *(labels._ask(
                Judgement(f"{n}", kind, row["query"], (), Passage("p", passages[0][1]), passages[0][1], passages[0][1]), 0
            ) for kind in LABELS),
        ]  # fmt: skip
        for ask in asks:
            found.setdefault(ask.step, []).append(ask)
    bodies = {
        step: [{"messages": form[0], **form[1], **one.sampling} for one in some for form in [ask_in_mode(one, "text")]]
        for step, some in found.items()
    }
    check(bodies, {"judge/rubric", "judge/pair", *(f"critique/{kind}" for kind in LABELS)})
