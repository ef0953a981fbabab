"""The teacher behind an endpoint, against a real server with faults; after every test the two books are compared."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import synthesis_worker
import tiny
from fault_server import KEY, PRICE, Fault, FaultServer, Request, Storm, audit, author
from raglan.calls import CallEngine
from raglan.calls.journal import Journal
from raglan.calls.limits import Clock
from raglan.corpus import Corpus, write_corpus
from raglan.errors import CallsStopped, RecipeError
from raglan.perturb import Slot
from raglan.recipe import EndpointSettings, MoneySettings, Recipe, WritingSettings
from raglan.records import Passage
from raglan.splits import split_examples
from raglan.synthesis import Plan, factors_of, make_plan, quotas
from raglan.synthesis.desk import Desk as Checking
from raglan.synthesis.endpoint import EndpointTeacher, load_prompts
from raglan.synthesis.endpoint.asking import sources
from raglan.synthesis.endpoint.given import Style, read_styles, repeats
from raglan.synthesis.endpoint.places import Library, Places
from raglan.synthesis.record import example_of
from raglan.synthesis.writing import Draft, Job, Made, Reject, Sheet
from raglan.verification import Verified, Verifier, Written
from test_cli import run

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
    gold = draft.gold[: cell.evidence]
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

    @property
    def asked(self) -> list[Request]:
        """All requests but those that try how the server takes schemas."""
        return [request for request in self.server.log if "As a trial of" not in request.content]

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


Whole = tuple[Desk, list[Made | Reject]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, plan: Plan, asked: Recipe) -> Iterator[Whole]:
    """The plan written without faults: the desk, with what was asked at it, and what came."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CALLS_KEY", KEY)
        desk = Desk(tmp_path_factory.mktemp("whole"))
        came, why = desk.write(plan, asked)
        assert why is None
        yield desk, came
        desk.server.__exit__()
        desk.compare()


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
    (tmp_path / "prompts.en.yaml").write_text(
        text.replace("You plan reading tasks.", "Plan reading tasks.", 1), encoding="utf-8"
    )
    ours, theirs = load_prompts(), load_prompts(tmp_path)
    changed = [step for step, digest in ours["en"].hashes.items() if theirs["en"].hashes[step] != digest]
    assert changed == ["brainstorm"]
    assert theirs["zh"].hashes == ours["zh"].hashes
    (tmp_path / "prompts.zh.yaml").write_text("draft: {system: a}", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"prompts\.zh\.yaml lacks"):
        load_prompts(tmp_path)


def test_what_is_filled_in_is_no_template() -> None:
    messages = load_prompts()["en"].messages("answer", prompt="say {count} and {notes}  ")
    assert messages[1]["content"] == "say {count} and {notes}  "


# the pipeline


def test_every_cell_ends_once(whole: Whole) -> None:
    _, came = whole
    assert sorted(end.sheet.draft.job.cell.number if isinstance(end, Made) else end.job.cell.number for end in came) == list(
        range(30)
    )
    made = [end for end in came if isinstance(end, Made)]
    assert len(made) == 30, [row(end) for end in came if isinstance(end, Reject)]
    for end in made:
        draft, cell = end.sheet.draft, end.sheet.draft.job.cell
        assert len(draft.gold) == cell.evidence
        assert len(draft.beside) == min(2, cell.noise.count("hard"))
        assert end.finish == "stop"
        steps = (
            {"brainstorm", "draft", "answer"}
            | ({"passages"} if cell.evidence else set())
            | ({"beside"} if draft.beside else set())
        )
        assert set(end.seen["calls"]) == set(end.seen["prompts"]) == steps
        assert all(len(call["key"]) == 64 and call["nano_usd"] > 0 for call in end.seen["calls"].values())


def test_results_do_not_depend_on_concurrency_or_resuming(desk: Desk, plan: Plan, asked: Recipe) -> None:
    desk.server.faults = _by_content
    told = [rows(desk.write(plan, asked, concurrency=64)[0])]
    sent = len(desk.server.log)
    told.append(rows(desk.write(plan, asked, concurrency=3)[0]))
    again = desk.server.log[sent:]
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


def test_who_answers_sees_what_the_student_sees_and_no_more(whole: Whole) -> None:
    desk, came = whole
    sheets = {end.sheet.prompt: end.sheet for end in came if isinstance(end, Made)}
    answers = [request for request in desk.asked if request.body["messages"][1]["content"] in sheets]
    assert len(answers) == len(came) == 30
    system = load_prompts()["en"].steps["answer"][0]
    for request in answers:
        assert [message["content"] for message in request.body["messages"]] == [system, request.body["messages"][1]["content"]]
        sheet = sheets[request.body["messages"][1]["content"]]
        shown = " ".join(slot.passage.text for slot in sheet.slots) + sheet.draft.query
        assert all(fact in shown for fact in sheet.draft.facts if fact in request.content)
        for word in ("gold", "noise", "hard", "support", sheet.draft.about, "facts", "subject"):
            assert word not in f"{request.body['messages'][0]['content']} {request.body['messages'][1]['content']}"


def test_who_writes_passages_does_not_see_the_query(whole: Whole) -> None:
    desk, came = whole
    queries = [end.sheet.draft.query for end in came if isinstance(end, Made)]
    writing = [request for request in desk.server.log if "PassagesReply" in json.dumps(request.body)]
    assert len(writing) > 30
    for request in writing:
        assert not any(query in request.body["messages"][1]["content"] for query in queries)
        assert "When was" not in request.content


def test_every_call_is_its_steps_wording_with_its_places_filled_in(whole: Whole) -> None:
    """A prompt that carries anything of earlier calls fits no wording; nor does one whose fixed parts were changed."""
    desk, _ = whole
    prompts = load_prompts()["en"]
    found: Counter[str] = Counter()
    for request in desk.asked:
        contents = [message["content"] for message in request.body["messages"]]
        assert len(contents) == 2
        steps = [step for step, wording in prompts.steps.items() if _fits(contents, wording, prompts.notes)]
        assert len(steps) == 1, contents
        found[steps[0]] += 1
    assert set(found) == {"brainstorm", "draft", "passages", "beside", "answer"}
    systems = {request.body["messages"][0]["content"] for request in desk.asked}
    assert len(systems) == 5


def _fits(contents: list[str], wording: tuple[str, str], notes: Mapping[str, str]) -> bool:
    """Whether two messages are a wording: a line for a place that takes one; notes, lists and prompts take several."""
    several = rf"(?:\n(?:{'|'.join(map(re.escape, notes.values()))}))*"

    def filled(place: str) -> str:
        if place == "\n{notes}":
            return several
        return place[: place.index("{")] + (r"[\s\S]+" if place.strip("\n{}") in ("facts", "prompt") else r"[^\n]+")

    for part, content in zip(wording, contents, strict=True):
        pieces = re.split(r"(\n?\{[a-z_]+\})", part)
        pattern = "".join(filled(piece) if number % 2 else re.escape(piece) for number, piece in enumerate(pieces))
        if not re.fullmatch(pattern, content):
            return False
    return True


def test_call_1_and_call_1000_of_a_step_are_alike_but_for_the_job(desk: Desk, asked: Recipe) -> None:
    """A thousand attempts at one cell: their drafts differ in the job and nothing else, the brainstorms in nothing at all."""
    weights = {"answer_format": "fit", "query_format": "fit", "absent_policy": {"abstain": 1}}
    plan = make_plan(recipe(1, weights=weights, passages={"gold_absent": 1}))  # no evidence, so no call for passages
    with desk.engine(concurrency=32) as engine:
        teacher = EndpointTeacher(engine, plan, factors_of(asked)[0], writing=WritingSettings(beside=0))
        attempts = (Job(plan.cells[0], n) for n in range(1000))
        ends = list(teacher.write(attempts, lambda draft: Reject(draft.job, "show", "unwanted")))
    assert Counter(end.step for end in ends if isinstance(end, Reject)) == {"show": 1000}
    bodies: dict[str, list[str]] = {"JobsReply": [], "DraftReply": []}
    for request in desk.asked:
        bodies[request.body["response_format"]["json_schema"]["name"]].append(json.dumps(request.body))
    jobs, drafts = bodies["JobsReply"], bodies["DraftReply"]
    assert (len(jobs), len(drafts)) == (50, 1000)
    assert set(jobs) == {jobs[0]}
    assert len(set(drafts)) == 20, "the jobs of a brainstorm"
    assert {re.sub(r"[0-9a-f]{10}\d+", "…", draft) for draft in drafts} == {re.sub(r"[0-9a-f]{10}\d+", "…", drafts[0])}


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


def test_other_languages(desk: Desk) -> None:
    asked = recipe(24, languages={"zh": 1, "cross": 1}, weights={"answer_format": "fit", "query_format": "fit"})
    plan = make_plan(asked)
    came, _ = desk.write(plan, asked)
    made = {end.sheet.draft.job.cell.number: end for end in came if isinstance(end, Made)}
    assert len(made) == 24
    prompts = load_prompts()
    for number, end in made.items():
        cell, hashes = plan.cells[number], end.seen["prompts"]
        written = prompts["zh" if cell.language == "zh" or cell.seed % 2 else "en"]
        assert hashes["draft"] == prompts["zh" if cell.language == "zh" or written.language == "en" else "en"].hashes["draft"]
        assert hashes.get("beside", written.hashes["beside"]) == written.hashes["beside"]


# one's own corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    texts = [
        [
            f"The lighthouse of Marrow{number // 2} stands at pier {number}.",
            f"Its keeper Odo{number} lit it with rape oil.",
            "It rains.",
        ]
        for number in range(10)
    ]
    write_corpus(
        folder,
        [
            Passage(f"d{d}:{p}", text, f"Harbour {d}", f"d{d}", 0, len(text))
            for d, some in enumerate(texts)
            for p, text in enumerate(some)
        ],
    )
    return Corpus(folder)


def test_documents_are_visited_evenly(corpus: Corpus) -> None:
    library = Library(corpus, seed=3)
    found = [library.visited(visit, "en") for visit in range(30)]
    assert [len({passage.document for passage in found[start : start + 10]}) for start in (0, 10, 20)] == [10, 10, 10]
    assert len({passage.id for passage in found}) == 30
    assert library.visited(30, "en").id == found[0].id
    with pytest.raises(RecipeError, match="25 examples need more than 2 visits"):
        library.check({"en": 25}, most=2)


def bilingual(folder: Path, *, english: int, chinese: int) -> Corpus:
    """Documents of two passages that share a rare word with all others, a Latin name among Chinese characters."""
    told = [("en", f"The lighthouse {n} of Marrow stands at pier {n}.", f"Odo {n} was its keeper.") for n in range(english)]
    told += [("zh", f"第{n}座灯塔位于Marrow码头。", f"守塔人是奥多{n}号。") for n in range(chinese)]
    passages = [
        Passage(f"{language}{number}:{place}", text, "", f"{language}{number}", 0, len(text))
        for number, (language, *texts) in enumerate(told)
        for place, text in enumerate(texts)
    ]
    write_corpus(folder, passages)
    return Corpus(folder)


def test_a_cell_reads_documents_of_its_language(desk: Desk, tmp_path: Path) -> None:
    corpus = bilingual(tmp_path / "corpus", english=10, chinese=10)
    fit = {"answer_format": "fit", "query_format": "fit"}
    asked = recipe(60, from_scratch=0, languages={"en": 2, "zh": 2, "cross": 2}, weights=fit)
    plan = make_plan(asked)
    came, _ = desk.write(plan, asked, corpus=corpus, jobs=[Job(cell, ordinal) for cell in plan.cells for ordinal in (0, 1)])
    read: dict[str, Counter[str]] = {"en": Counter(), "zh": Counter(), "cross": Counter()}
    for end in came:
        assert isinstance(end, Made)
        own = [passage for passage in end.sheet.draft.gold if corpus.row(passage.id) is not None]
        languages = {passage.document[:2] for passage in own}
        assert len(languages) == 1, "passages that are linked are of one language"
        read[end.sheet.draft.job.cell.language].update(languages)
    assert set(read["en"]) == {"en"}
    assert set(read["zh"]) == {"zh"}
    assert set(read["cross"]) == {"en", "zh"}
    hashes = load_prompts()
    for end in came:
        assert isinstance(end, Made)
        cell, own = end.sheet.draft.job.cell, end.sheet.draft.gold[0].document[:2]
        asks = cell.language if cell.language != "cross" else {"en": "zh", "zh": "en"}[own]
        assert end.seen["prompts"]["draft"] == hashes[asks].hashes["draft_corpus"]


@pytest.mark.parametrize(("missing", "there"), [("zh", "en"), ("en", "zh")])
def test_a_language_without_documents_is_refused_before_any_call(desk: Desk, tmp_path: Path, missing: str, there: str) -> None:
    counts = {"english": 10, "chinese": 0} if there == "en" else {"english": 0, "chinese": 10}
    corpus = bilingual(tmp_path / "corpus", **counts)
    fit = {"answer_format": "fit", "query_format": "fit"}
    asked = recipe(20, from_scratch=0, languages={"en": 0.5, "zh": 0.5}, weights=fit)
    name = {"en": "English", "zh": "Chinese"}[missing]
    with pytest.raises(RecipeError, match=f"10 examples are to rest on {name} documents, and none of the 10 is {name}"):
        desk.write(make_plan(asked), asked, corpus=corpus)
    assert not desk.server.log
    alone = recipe(20, from_scratch=0, languages={there: 1, "cross": 1}, weights=fit)
    came, _ = desk.write(make_plan(alone), alone, corpus=corpus)
    assert {end.sheet.draft.gold[0].document[:2] for end in came if isinstance(end, Made)} == {there}


def test_linked_passages_share_a_rare_word(corpus: Corpus) -> None:
    library = Library(corpus, seed=3)
    passage = corpus[corpus.row("d4:0") or 0]
    linked = library.linked(passage)
    assert linked is not None
    assert linked.id == "d5:0"  # of the same harbour, in another document


def test_attempts_share_brainstorms(plan: Plan) -> None:
    cells = tuple(replace(cell, source="knowledge" if cell.number % 3 else "from_scratch") for cell in plan.cells)
    family = load_prompts()["en"].family
    places = Places(cells, family, jobs=4)
    read = [cell for cell in cells if cell.number % 3]
    visits = [places.of(Job(cell, ordinal)).visit for ordinal in range(3) for cell in read]
    assert sorted(visits) == list(range(60))
    assert all(1 <= places.shared(Job(cell)) <= 4 for cell in cells)
    calls = {(places.of(Job(cell)).family, places.of(Job(cell)).draw) for cell in read}
    assert places.calls() == len(calls) + 10


def test_passages_of_the_corpus_are_drafted_over(desk: Desk, corpus: Corpus) -> None:
    asked = recipe(24, from_scratch=0, weights={"answer_format": "fit", "query_format": "fit"})
    plan = make_plan(asked)
    came, _ = desk.write(plan, asked, corpus=corpus)
    made = [end for end in came if isinstance(end, Made)]
    assert len(made) == 24
    told = "\n".join(request.content for request in desk.asked)
    assert "The first fact is what the passage says" in told
    assert "as two sources do that disagree" not in told  # the words for those who write from scratch
    for end in made:
        draft, cell = end.sheet.draft, end.sheet.draft.job.cell
        own = [passage for passage in draft.gold if corpus.row(passage.id) is not None]
        assert len(own) == (1 if cell.relation in ("R6", "R7") else max(1, cell.evidence))
        assert len(draft.gold) == max(1, cell.evidence) + (cell.absent_policy == "partial")
        assert draft.about == ""  # tied by its documents
    drafts = [request for request in desk.asked if "DraftReply" in json.dumps(request.body)]
    assert all(
        "lighthouse" in request.content or "keeper" in request.content or "rains" in request.content for request in drafts
    )
    with pytest.raises(RecipeError, match="24 cells have their passages from a corpus"):
        desk.write(plan, asked)


def test_of_a_part_the_other_passage_is_withheld_and_tied(desk: Desk, corpus: Corpus) -> None:
    weights = {"task": {"bridge": 1}, "answer_format": {"short_sentence": 1}, "query_format": "fit", "genre": "fit"}
    weights |= {"relation": {"R3": 1}, "absent_policy": {"partial": 1}}
    asked = recipe(12, from_scratch=0, passages={"k": {3: 1}, "gold_absent": 0.5}, weights=weights)
    plan = make_plan(asked)
    came, _ = desk.write(plan, asked, corpus=corpus)
    parts = [end for end in came if isinstance(end, Made) and end.sheet.draft.job.cell.absent_policy == "partial"]
    assert len(parts) == 6
    for end in parts:
        one, two = end.sheet.draft.gold
        assert [slot.passage.id for slot in end.sheet.slots if slot.role == "gold"] == [one.id]
        example = example_of(end, teacher="m", corpus=corpus)
        assert example.metadata["synth"]["withheld"] == [{"id": two.id, "document": two.document}]
        keys = split_examples([example], by="document", shares={"train": 1}, seed=0, corpus=corpus).keys[example.id]
        assert {f"document {one.document}", f"document {two.document}"} <= set(keys)


def test_what_is_noise_for_others_follows_from_plan_and_corpus(desk: Desk, corpus: Corpus) -> None:
    asked = recipe(24, from_scratch=0.5, weights={"answer_format": "fit", "query_format": "fit"})
    plan = make_plan(asked)
    with desk.engine() as engine:
        teacher = EndpointTeacher(engine, plan, factors_of(asked)[0], corpus=corpus)
        places = [teacher._places.of(Job(cell)) for cell in plan.cells if cell.source == "knowledge"]
        read = {teacher._library.visited(place.visit, place.read).id for place in places}
        told = [passage.id for passage in teacher.evidence], list(teacher.answers)
        assert set(told[0]) == read
        assert len(told[0]) == len(read) > 5
        titles = {passage.title for passage in teacher.evidence}
        assert titles <= set(told[1])
        assert any(value.startswith("Marrow") for value in told[1]), "a name that stands in a text"
        list(teacher.write([Job(cell) for cell in plan.cells], show))
        assert ([passage.id for passage in teacher.evidence], list(teacher.answers)) == told
        fresh = EndpointTeacher(engine, plan, factors_of(asked)[0], corpus=corpus)
        assert ([passage.id for passage in fresh.evidence], list(fresh.answers)) == told, "before any reply it is the same"
    bare = recipe(24, weights={"answer_format": "fit", "query_format": "fit"})
    with desk.engine() as engine:
        scratch = EndpointTeacher(engine, make_plan(bare), factors_of(bare)[0], corpus=corpus)
        assert (list(scratch.evidence), list(scratch.answers)) == ([], []), "all from scratch: nothing is known beforehand"


def test_what_speaks_against_a_corpus_is_about_what_the_corpus_is_about(desk: Desk, corpus: Corpus) -> None:
    asked = recipe(24, from_scratch=0, weights={"answer_format": "fit", "query_format": "fit"})
    plan = make_plan(asked)
    cells = tuple(cell for cell in plan.cells if cell.relation in ("R6", "R7"))
    assert cells
    desk.write(plan, asked, corpus=corpus, jobs=[Job(cell) for cell in cells])
    written = [request.content for request in desk.asked if "PassagesReply" in json.dumps(request.body)]
    assert written
    lost = [text for text in written if not re.search(r"Kind of document: \(none\)\\nTopic: Harbour \d", text)]
    assert not lost


# faults and money

TORN = {"query": "Who \ud83d?", "subject": "", "facts": ["a"], "answers": ["A"], "history": [], "labels": [], "fields": []}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(text='{"query": "What', finish="length"), "truncated"),
        (Fault(text='{"query": 5}'), "malformed"),
        (Fault(text=json.dumps(TORN)), "malformed"),
        (Fault(text="{}", finish="content_filter"), "refused"),
        (Fault(413), "permanent"),
        (Fault(503), "transient"),
    ],
    ids=["truncated", "malformed", "half a character", "refused", "permanent", "transient"],
)
def test_a_reply_that_is_none_is_a_reject_with_its_text(
    desk: Desk, plan: Plan, asked: Recipe, fault: Fault, reason: str
) -> None:
    desk.server.faults = lambda number, request: fault if "DraftReply" in json.dumps(request.body) else None
    came, why = desk.write(plan, asked, jobs=[Job(plan.cells[0])])
    assert why is None
    assert [(end.step, end.reason, end.raw) for end in came if isinstance(end, Reject)] == [("draft", reason, fault.text or "")]
    sent = [request for request in desk.asked if "DraftReply" in json.dumps(request.body)]
    assert len(sent) == {"malformed": 2, "transient": 6}.get(reason, 1)


@pytest.mark.parametrize("step", ["draft", "answer"])
def test_half_a_character_on_the_wire_is_a_reject(desk: Desk, plan: Plan, asked: Recipe, step: str) -> None:
    def torn(body: dict[str, Any]) -> str:
        said, schema = author(body), "response_format" in body
        if len(body["messages"]) == 1 or not ("DraftReply" in json.dumps(body) if step == "draft" else not schema):
            return said
        return said.replace("mill", "mill \ud83d") if schema else f"{said} \ud83d"

    desk.server.reply = torn
    came, why = desk.write(plan, asked, jobs=[Job(plan.cells[0])])
    assert why is None
    assert [(end.step, end.reason) for end in came if isinstance(end, Reject)] == [(step, "half_character")]


def test_what_a_draft_lacks_is_a_reject(desk: Desk, plan: Plan, asked: Recipe) -> None:
    cell = replace(plan.cells[0], task="multiple_choice", answer_format="option_letter", query_format="keywords")
    poor = {"query": "Which?", "subject": "", "facts": ["a", "b"], "answers": ["A"], "history": [], "labels": [], "fields": []}
    desk.server.faults = lambda number, request: (
        Fault(text=json.dumps(poor)) if "DraftReply" in json.dumps(request.body) else None
    )
    came, _ = desk.write(replace(plan, cells=(cell,)), asked)
    assert [(end.step, end.reason) for end in came if isinstance(end, Reject)] == [("draft", "no_options")]


def test_a_cap_stops_and_a_larger_one_goes_on(desk: Desk, plan: Plan, asked: Recipe) -> None:
    came, why = desk.write(plan, asked, money=MoneySettings(price=PRICE, cap_usd="0.25"))
    assert why is not None
    assert why.reason == "cap"
    assert len(came) < 30
    assert desk.server.bill <= 250_000_000
    whole, why = desk.write(plan, asked, money=MoneySettings(price=PRICE, cap_usd=9))
    assert why is None
    assert len(whole) == 30
    assert len({request.idem for request in desk.server.log}) == len(desk.server.log), "paid twice"


def test_a_key_that_is_refused_stops_at_once(desk: Desk, plan: Plan, asked: Recipe) -> None:
    desk.server.faults = lambda number, request: Fault(401, code="invalid_api_key") if number >= 10 else None
    came, why = desk.write(plan, asked)
    assert why is not None
    assert (why.reason, len(came) < 30) == ("fatal", True)
    assert len(desk.server.log) <= 10 + 8


def test_an_estimate_keeps_its_sample_and_holds_the_cost(desk: Desk, plan: Plan, asked: Recipe) -> None:
    with desk.engine() as engine:
        teacher = EndpointTeacher(engine, plan, factors_of(asked)[0])
        jobs = [Job(cell) for cell in plan.cells]
        found = Checking(teacher, show).estimate(jobs, engine, stratum=teacher.stratum, sample=12)
        assert (found.cells, found.sampled, found.acceptance) == (30, 12, 1.0)
        assert set(found.steps) == {"brainstorm", "draft", "passages", "beside", "answer"}
        sent = len(desk.asked)
        ends = list(teacher.write(jobs, show))
        assert len(ends) == 30
        assert len({request.idem for request in desk.server.log}) == len(desk.server.log), "the sample was paid twice"
        assert sent < len(desk.asked)
        assert found.low <= engine.journal.ledger.spent <= found.high


class Even(Verifier):
    """Accepts the examples of cells with even numbers."""

    def verify(self, one: Written) -> Verified:
        return Verified(one, (), "odd" if int(one.id.partition("-")[0]) % 2 else "")


def test_an_estimate_heeds_what_would_be_kept(desk: Desk, plan: Plan, asked: Recipe) -> None:
    with desk.engine() as engine:
        teacher = EndpointTeacher(engine, plan, factors_of(asked)[0])
        jobs = (Job(cell) for cell in plan.cells)
        found = Checking(teacher, show, Even()).estimate(jobs, engine, stratum=teacher.stratum, sample=12)
    assert 0 < found.acceptance < 1
    assert found.attempts > 30


def test_an_estimate_counts_what_fails_before_any_call(desk: Desk, tmp_path: Path) -> None:
    texts = ["Anchovy brine.", "Walnut husk.", "Copper kettle."]  # no two share a word
    write_corpus(tmp_path, [Passage(f"d{d}:0", text, "", f"d{d}", 0, len(text)) for d, text in enumerate(texts)])
    asked = recipe(24, from_scratch=0, weights={"answer_format": "fit", "query_format": "fit"})
    plan = make_plan(asked)
    alone = sum(sources(cell) == 2 for cell in plan.cells)
    with desk.engine() as engine:
        teacher = EndpointTeacher(engine, plan, factors_of(asked)[0], corpus=Corpus(tmp_path))
        jobs = [Job(cell) for cell in plan.cells]
        found = Checking(teacher, show).estimate(jobs, engine, stratum=teacher.stratum, sample=24)
    assert alone > 1
    assert (found.sampled, round(24 * found.acceptance)) == (24, 24 - alone)


# what a draft is given: a manner, or an answer


STYLES = ("Be so kind and walk me through it, one step at a time.", "gimme the gist, no fluff", "Kindly advise me on this.")


def styled(path: Path, *texts: str) -> Path:
    rows = [{"text": text, "licence": "CC BY 4.0", "source": f"forum {n}"} for n, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def given(desk: Desk, plan: Plan, asked: Recipe, writing: WritingSettings, **more: Any) -> list[Made | Reject]:
    with desk.engine() as engine:
        teacher = EndpointTeacher(engine, plan, factors_of(asked)[0], writing=writing, **more)
        return list(teacher.write([Job(cell) for cell in plan.cells], show))


def drafts(desk: Desk) -> list[Request]:
    return [one for one in desk.asked if "DraftReply" in json.dumps(one.body) and len(one.body["messages"]) == 2]


def test_each_draft_imitates_a_manner_and_no_other_step_sees_it(desk: Desk, tmp_path: Path, plan: Plan, asked: Recipe) -> None:
    writing = WritingSettings(styles=styled(tmp_path / "styles.jsonl", *STYLES))
    made = [end for end in given(desk, plan, asked, writing) if isinstance(end, Made)]
    seen = [sum(style in request.content for style in STYLES) for request in drafts(desk)]
    assert len(seen) >= 25
    assert set(seen) == {1}
    drafted = {id(request) for request in drafts(desk)}
    assert not any(style in one.content for one in desk.asked if id(one) not in drafted for style in STYLES)
    told = [end.sheet.draft.seen for end in made]
    assert {one["style"]["source"] for one in told} == {f"forum {n}" for n in range(3)}
    assert {one["style"]["licence"] for one in told} == {"CC BY 4.0"}
    assert len({one["style"]["id"] for one in told}) == 3
    assert {one["prompts"]["draft"] for one in told}.isdisjoint(load_prompts()["en"].hashes.values()), "other words"


def test_a_question_that_repeats_a_style_is_rejected(desk: Desk, tmp_path: Path, plan: Plan, asked: Recipe) -> None:
    style = "Which towns along the old northern railway still keep a station master?"

    def parrot(body: dict[str, Any]) -> str:
        told = author(body)
        if "DraftReply" not in json.dumps(body) or zlib.crc32(told.encode()) % 3:
            return told
        return json.dumps(json.loads(told) | {"query": f"Pray: {style}"})

    desk.server.reply = parrot
    ends = given(desk, plan, asked, WritingSettings(styles=styled(tmp_path / "styles.jsonl", style)))
    refused = [end for end in ends if isinstance(end, Reject) and end.reason == "repeats_style"]
    assert 3 < len(refused) < 25
    assert {(end.step, end.detail) for end in refused} == {("draft", style)}
    assert not any(style in end.sheet.draft.query for end in ends if isinstance(end, Made))


@pytest.mark.parametrize(
    ("query", "style", "same"),
    [
        ("Could you tell me who built the mill of Tarn?", "Could you tell me how photosynthesis works in winter?", False),
        ("Could you tell me how photosynthesis works?", "Could you tell me how photosynthesis works in winter?", True),
        ("请问青浦大桥是哪一年通车的？", "请问这道菜怎么做才好吃？", False),
        ("请问这道菜怎么做才不咸？", "请问这道菜怎么做才好吃？", True), ("Why?", "Who?", False), ("", "Who?", False),
    ],
)  # fmt: skip
def test_manner_is_no_wording(query: str, style: str, same: bool) -> None:
    assert repeats(query, Style(style, "CC0")) is same


def test_a_style_needs_its_licence(tmp_path: Path) -> None:
    for line, why in (('{"text": "Who?"}', "licence"), ('{"text": " ", "licence": "CC0"}', "needs a text"), ("", "no style")):
        (tmp_path / "styles.jsonl").write_text(line + "\n", encoding="utf-8")
        with pytest.raises(RecipeError, match=why):
            read_styles(tmp_path / "styles.jsonl")
    with pytest.raises(RecipeError, match="there is no"):
        read_styles(tmp_path / "none.jsonl")


def test_an_answer_that_was_picked_is_asked_for(desk: Desk, tmp_path: Path) -> None:
    opened = "The council of Vessen opened its mill in {} after a fire."
    texts = [opened.format(1700 + n) if n % 3 else "It is grey." for n in range(80)]
    write_corpus(tmp_path, [Passage(f"d{n}:0", text, "Mill", f"d{n}", 0, len(text)) for n, text in enumerate(texts)])
    weights = {"task": {"temporal": 3, "definition": 1}, "relation": {"R1": 1}, "answer_format": "fit", "query_format": "fit"}
    asked = recipe(60, from_scratch=0, passages={"k": {3: 1}, "gold_absent": 0.2}, weights={**weights, "genre": "fit"})
    plan = make_plan(asked)

    def obedient(body: dict[str, Any]) -> str:
        told = author(body)
        picked = re.search(r"stands first in `answers` as it is written here: (.+)", body["messages"][-1]["content"])
        if picked is None:
            return told
        wrong = zlib.crc32(told.encode()) % 4 == 0
        return json.dumps(json.loads(told) | {"answers": ["another" if wrong else f"in {picked[1]}"]})

    desk.server.reply = obedient
    ends = given(desk, plan, asked, WritingSettings(answer_first=0.5), corpus=Corpus(tmp_path))
    asking = [cell for cell in plan.cells if cell.task == "temporal" and cell.absent_policy != "partial"]
    fit = sum(cell.answer_format in ("span", "short_sentence", "notes_then_answer") for cell in asking)
    assert fit > 10
    first = [end for end in ends if isinstance(end, Made) and "answer_first" in end.seen]
    refused = Counter(end.reason for end in ends if isinstance(end, Reject))
    assert len(first) + refused["another_answer"] + refused["no_span"] == quotas(fit, [1, 1])[0]
    assert min(len(first), refused["another_answer"], refused["no_span"]) > 0
    for end in first:
        span = end.seen["answer_first"]
        assert span["kind"] == "year"
        assert span["span"] in end.sheet.draft.gold[0].text
        assert end.sheet.draft.answers == (f"in {span['span']}",)
    assert sum("as it is written here" in one.content for one in drafts(desk)) == len(first) + refused["another_answer"]


def test_ones_own_prompts_may_lack_what_is_not_asked_for(desk: Desk, tmp_path: Path, plan: Plan, asked: Recipe) -> None:
    ours = Path(load_prompts.__code__.co_filename).parent
    for language in ("en", "zh"):
        text = (ours / f"prompts.{language}.yaml").read_text(encoding="utf-8")
        (tmp_path / f"prompts.{language}.yaml").write_text(text.partition("\ngiven:")[0], encoding="utf-8")
    assert load_prompts(tmp_path)["en"].hashes == load_prompts()["en"].hashes
    styles = styled(tmp_path / "styles.jsonl", *STYLES)
    with desk.engine() as engine, pytest.raises(RecipeError, match=r"lack given\.style"):
        EndpointTeacher(engine, plan, factors_of(asked)[0], writing=WritingSettings(prompts=tmp_path, styles=styles))


# faults, kills and the whole driver


HOSTED = re.compile(rb'"key": "[0-9a-f]{64}"')  # a call's name has the server's port in it
FILES = ("examples.jsonl", "surplus.jsonl", "rejects.jsonl", "attempts.jsonl", "coverage.json", "train.jsonl", "dev.jsonl")


def test_a_storm_and_kills_leave_the_same_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALLS_KEY", KEY)
    with FaultServer(delay=0.003) as server:
        server.reply, server.faults = author, Storm(fatal=(40,))
        told = _synthesized(server.url, tmp_path / "killed", cells=24, kills=4)
        stormy, server_log = audit(server, tmp_path / "killed/calls"), server.log
    with FaultServer(delay=0.003) as server:
        server.reply, server.faults = author, Storm(passing=False)
        code = synthesis_worker.live(server.url, tmp_path / "straight", 24, 16, None)
        calm = audit(server, tmp_path / "straight/calls")
    assert (told["deaths"], told["code"]) == (4, code)
    assert any(request.status == 401 for request in server_log)
    for file in FILES:
        killed, straight = (HOSTED.sub(b"", (tmp_path / name / "data" / file).read_bytes()) for name in ("killed", "straight"))
        assert killed == straight, file
    cells = [json.loads(line)["cell"] for line in (tmp_path / "killed/data/attempts.jsonl").read_text().splitlines()]
    assert set(cells) == set(range(24))
    assert stormy["in doubt"] <= 4 * 8
    assert calm["in doubt"] == calm["lost"] == 0
    assert calm["bill"] == calm["ledger"]
    assert stormy["calls done"] == calm["calls done"]
    assert KEY.encode() not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def _synthesized(url: str, folder: Path, *, cells: int, kills: int) -> dict[str, int]:
    command = [sys.executable, str(HERE / "synthesis_worker.py"), url, str(folder), str(cells), str(kills), "5", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    told: dict[str, int] = json.loads(done.stdout)
    assert told["code"] in (0, 3), done.stderr
    return told


# the command line, with a knowledge base, retrievers, guard, budget and verification


@pytest.fixture
def paid(tmp_path: Path, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe over a built knowledge base, whose teacher is the desk's server."""
    documents = [
        {"id": f"p{n}", "title": f"Tower {n}", "text": f"The tower {n} of Vessen was built of grey stone by miller Odo{n} ."}
        for n in range(40)
    ]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    tiny.llama(tmp_path / "student")
    tiny.sentence_encoder(tmp_path / "encoder")
    weights = {"task": {"factoid": 1}, "answer_format": {"short_sentence": 1}, "query_format": {"wh_question": 1}}
    weights |= {"relation": {"R1": 2, "R3": 1}, "genre": "fit", "absent_policy": {"abstain": 1}}
    encoder = {"model": "encoder/encoder", "dtype": "float32"}
    tree = {
        "name": "paid", "seed": 1, "generator": {"model": "student"}, "retriever": {"index": "bm25"},
        "knowledge": {
            "path": "kb", "documents": "corpus.jsonl", "chunk": None, "encoder": encoder, "indexes": {"bm25": {"kind": "bm25"}},
        },
        "synthesis": {
            "path": "data", "n": 30, "from_scratch": 1, "passages": {"k": {3: 1, 5: 1}, "gold_absent": 0.1}, "weights": weights,
            "budget": {"tokenizer": "student", "max_length": 1900, "answer": 100}, "decontaminate": "none",
            "teacher": {
                "kind": "endpoint", "base_url": desk.server.url, "model": "m", "api_key_env": "CALLS_KEY", "concurrency": 8,
            },
            "money": {"price": PRICE},
        },
    }  # fmt: skip
    (tmp_path / "paid.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "paid.yaml"


def test_from_estimate_to_dataset_on_the_command_line(
    desk: Desk,
    paid: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def call(*words: str) -> tuple[int, str, str]:
        return run(*words, capsys=capsys, monkeypatch=monkeypatch)

    caplog.set_level(logging.DEBUG)
    desk.folder = paid.parent / "data/calls"
    desk.server.faults = lambda number, request: (  # some answers are refused, in words that repeat the key
        Fault(422) if "response_format" not in request.body and zlib.crc32(request.content.encode()) % 8 == 0 else None
    )
    assert call("build", str(paid))[0] == 0
    code, _, err = call("synthesize", str(paid))
    assert (code, len(desk.server.log)) == (2, 0)
    assert "cap_usd" in err
    assert "--yes" in err
    code, out, err = call("synthesize", str(paid), "--dry-run")
    assert code == 0, err
    assert re.search(r"(?m)^answer +\d+ .*\$0\.\d+   \$0\.\d+ to \$0\.\d+$", out), out
    assert "24 cells were run and are kept" in out
    sent = len(desk.server.log)
    code, out, err = call("synthesize", str(paid), "synthesis.money.cap_usd=0.000001")
    assert code == 3, err
    assert len(desk.server.log) == sent
    assert "stopped, cap" in out
    code, out, err = call("synthesize", str(paid), "--yes")
    assert code == 0, out + err
    assert "30 requested, 30 kept" in out
    assert len({request.idem for request in desk.server.log}) == len(desk.server.log), "paid twice"
    rows = [json.loads(line) for line in (paid.parent / "data/examples.jsonl").read_text().splitlines()]
    prompts = load_prompts()["en"]
    for one in rows:
        synth = one["synth"] if "synth" in one else one["metadata"]["synth"]
        assert synth["teacher"] == "endpoint:m"
        assert synth["seen"]["prompts"]["draft"] == prompts.hashes["draft"]
        assert synth["seen"]["calls"]["answer"]["tokens"]["output"] > 0
    cost = json.loads((paid.parent / "data/cost.json").read_text())
    assert cost["nano_usd"] == desk.server.bill
    for words in (["export", str(paid.parent / "data"), "-o", "sft.jsonl"], ["check", "sft.jsonl"]):
        assert call("synthesize", *words, "--as", "sft")[0] == 0
    assert len((paid.parent / "sft.jsonl").read_text().splitlines()) == 30
    assert "Synthetic examples, written by “endpoint:m”" in _report(paid, call)
    said = [out, err, caplog.text, *call("calls", str(desk.folder))[1:]]
    files = [path.read_text(errors="replace") for path in paid.parent.rglob("*") if path.is_file()]
    assert "422: not now, Bearer …" in (paid.parent / "data/rejects.jsonl").read_text(), "it was said, and it was cut out"
    assert KEY not in "".join([*said, *files])


def _report(recipe: Path, call: Any) -> str:
    """The page of a recipe whose dataset was paid for, after an evaluation of the student."""
    question = {"id": "q", "query": "Who built the tower 3 ?", "answers": ["Odo3"], "relevant": ["p3"]}
    (recipe.parent / "asked.jsonl").write_text(json.dumps(question) + "\n")
    measured = "evaluate={questions: asked.jsonl, modes: [retrieved], k: [1]}"
    code, _, err = call("evaluate", str(recipe), measured, "decode.max_new_tokens=4", "prompt.max_tokens=400", "--report")
    assert code == 0, err
    return (recipe.parent / "runs/paid/report.html").read_text()


def tower_author(body: dict[str, Any]) -> str:
    """The author's replies, but drafts and answers are of what `paid`'s documents tell."""
    if len(body["messages"]) < 2:  # a trial of how schemas are taken
        return author(body)
    asked, told = body["messages"][1]["content"], author(body)
    name = body.get("response_format", {}).get("json_schema", {}).get("name", "")
    if name == "DraftReply":
        number, mark = re.findall(r"(?m)^\[1\] Tower (\d+)", asked)[0], hashlib.sha256(asked.encode()).hexdigest()[:6]
        facts = [f"The tower {number} was built by miller Odo{number}.", "It is of grey stone."]
        query = f"Who built tower {number} of Vessen, as asked in letter {mark}?"
        return json.dumps(json.loads(told) | {"query": query, "facts": facts, "answers": [f"Odo{number}"]})
    if found := re.findall(r"Who built tower (\d+)", asked) if not name else []:
        number = found[-1]
        return f"Miller Odo{number} built it." if f"miller Odo{number} ." in asked else "The passages do not tell the miller."
    return told


def test_over_a_corpus_other_questions_evidence_is_noise_and_no_topic_is_claimed(
    desk: Desk, paid: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.folder, desk.server.reply = paid.parent / "data/calls", tower_author
    assert run("build", str(paid), capsys=capsys, monkeypatch=monkeypatch)[0] == 0
    words = ["synthesis.from_scratch=0", "synthesis.weights.noise={other_gold: 1, random: 1}"]
    code, out, err = run("synthesize", str(paid), *words, "--dry-run", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0, out + err
    code, out, err = run("synthesize", str(paid), *words, "--yes", capsys=capsys, monkeypatch=monkeypatch)
    assert code in (0, 3), out + err
    answered = Counter(found[-1] for request in desk.asked if "response_format" not in request.body
                       for found in [re.findall(r"in letter (\w+)", request.content)])  # fmt: skip
    assert set(answered.values()) == {1}, "the sample's sheets are the run's: no question is answered anew"
    told = json.loads((paid.parent / "data/coverage.json").read_text(encoding="utf-8"))
    assert told["ignored"] == ["topic", "genre", "tailness"]
    assert not {"topic", "genre", "tailness"} & set(told["factors"])
    assert told["kept"] > 20
    assert told["noise"]["other_gold"]["kept"] > told["noise"]["other_gold"]["planned"] / 2
    rows = [json.loads(line) for line in (paid.parent / "data/examples.jsonl").read_text(encoding="utf-8").splitlines()]
    shown = Counter(one["kind"] for row in rows for one in row["synth"]["passages"] if one["role"] == "noise")
    assert shown["other_gold"] == told["noise"]["other_gold"]["kept"]


def test_reserved_topics_and_tasks_share_no_job_and_no_call(
    desk: Desk, paid: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.folder = paid.parent / "data/calls"
    assert run("build", str(paid), capsys=capsys, monkeypatch=monkeypatch)[0] == 0
    words = ["synthesis.weights.task={factoid: 3, temporal: 1}", "synthesis.weights.topic={news: 1, games: 1, sports: 1}"]
    words += ["synthesis.reserve={task: [temporal], topic: [sports], n: 10}", "synthesis.n=20"]
    code, out, err = run("synthesize", str(paid), *words, "--dry-run", "--json", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0, out + err
    told = json.loads(out)
    assert (told["cells"], told["sampled"]) == (30, 24), "the reserved ones are among them"
    sampled = len(desk.server.log)
    code, out, err = run("synthesize", str(paid), *words, "--yes", capsys=capsys, monkeypatch=monkeypatch)
    assert code in (0, 3), out + err
    rows = [
        [json.loads(line)["synth"] for line in (paid.parent / folder / "examples.jsonl").read_text().splitlines()]
        for folder in ("data", "data/reserved")
    ]
    assert [len(some) >= 9 for some in rows] == [True, True]
    jobs = [{one["job"] for one in some} for some in rows]
    calls = [{one["seen"]["calls"]["brainstorm"]["key"] for one in some} for some in rows]
    assert not jobs[0] & jobs[1]
    assert not calls[0] & calls[1]
    learned, apart = ([(one["factors"]["task"], one["factors"]["topic"].partition("/")[0]) for one in some] for some in rows)
    assert {task for task, _ in learned} == {"factoid"}
    assert {topic for _, topic in learned} == {"news", "games"}
    assert {(task == "temporal", topic == "sports") for task, topic in apart} == {(True, False), (False, True)}
    assert told["low"] <= desk.server.bill <= told["high"], "of both"
    assert len(desk.server.log) <= sampled + (told["attempts"] - 24) * sampled / 24 + 10, "the sample is kept"
    assert len({request.idem for request in desk.server.log}) == len(desk.server.log), "paid twice"


def test_an_estimate_of_rules_is_refused(
    paid: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, desk: Desk
) -> None:
    desk.engine().close()
    code, _, err = run(
        "synthesize", str(paid), "--dry-run", "synthesis.teacher={kind: offline}", capsys=capsys, monkeypatch=monkeypatch
    )
    assert (code, "makes no calls" in err) == (2, True), err


def test_the_printed_prompts_are_the_files() -> None:
    root = HERE.parent
    spec = importlib.util.spec_from_file_location("make_prompts", root / "docs" / "make_prompts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (root / "docs/concepts/synthesis-prompts.md").read_text(encoding="utf-8") == module.page(), "run `make docs`"
