"""A chat model without log-probabilities as a Self-RAG backend: graders' yes and no, and a bound on rewording."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fault_server import KEY, Fault, FaultServer
from raglan.decode import Asked, self_rag
from raglan.decode.self_rag.cache import CandidateCache
from raglan.decode.self_rag.recording import record
from raglan.errors import GeneratorError, RecipeError
from raglan.evaluate import spent as spent_on
from raglan.generator import Graded, open_any
from raglan.recipe import GeneratorSettings, PriceSettings, PromptSettings, Recipe, SelfRagDecode
from raglan.records import Answer, Hit, Passage
from test_cli import run
from tiny import small_recipe

PASSAGES = {
    "mill": "The mill was built in 1831 by Anna Roth.",
    "light": "The light was lit in 1902. It shows red.",
    "river": "Trout live in the river.",
}
QUESTION = "when was the mill built?"


def found(*names: str) -> list[Hit]:
    return [Hit(Passage(name, PASSAGES[name], name), 1 / rank, rank, rank) for rank, name in enumerate(names, 1)]


class Chat:
    """What the chat model says; it reads nothing but the text that it is sent.

    Attributes:
        relevant: passages that help. `needs`: whether anything has to be looked up. `lines`: what it writes, by its passage.
        words: what rewording gives. `complete`: how many sentences an answer has.
    """

    def __init__(self) -> None:
        self.relevant, self.needs, self.complete = {"mill"}, True, 1
        self.lines = {"mill": ["In 1831.", "Anna Roth built it."], "light": ["In 1902."], "": ["I say 中文.", "No more."]}
        self.words: list[str] = []
        self.grades: dict[str, str] = {}

    def __call__(self, body: dict[str, Any]) -> str:
        task, text = (message["content"] for message in body["messages"])
        fields = dict(line.split(": ", 1) for line in text.split("\n") if ": " in line)
        passage = next((name for name, words in PASSAGES.items() if words in text), "")
        if task.startswith("You word questions"):
            return self.words.pop(0)
        if not task.startswith("You judge"):
            said = fields.get("Answer so far", "")
            lines = self.lines[passage]
            return " ".join(lines) if "as short" in task else next((line for line in lines if line not in said), "")
        asked = text.split("\n\n")[-1]
        for start, grade in self.grades.items():
            if asked.startswith(start):
                return grade
        return "Yes." if self._grade(asked, fields, passage) else "no, not at all"

    def _grade(self, asked: str, fields: dict[str, str], passage: str) -> bool:
        said = fields.get("Answer so far", "")
        if asked.startswith("Would documents"):
            return self.needs
        if asked.startswith("Does the passage hold information"):
            return passage in self.relevant
        if asked.startswith("Does all that"):
            return fields["Sentence"].split()[1].strip(".") in PASSAGES[passage]
        if asked.startswith("Does the answer say all"):
            return said.count(".") >= self.complete
        if asked.startswith("Does the passage hold what"):
            return any(line not in said for line in self.lines[passage])
        assert asked.startswith("Is the answer what")
        return bool(said)


@pytest.fixture
def chat() -> Chat:
    return Chat()


@pytest.fixture
def server(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    monkeypatch.setenv("GRADED_KEY", KEY)
    with FaultServer(idempotent=False) as server:
        server.reply = chat
        yield server


def opened(server: FaultServer, **more: Any) -> Graded:
    given = {"model": "m", "endpoint": server.url, "api_key_env": "GRADED_KEY", "retries": 0, **more}
    generator = open_any(GeneratorSettings(kind="graded", **given), PromptSettings())
    assert isinstance(generator, Graded)
    return generator


def settings(**given: Any) -> SelfRagDecode:
    return SelfRagDecode(kind="self_rag", weights={"seq": 0.0}, **given)


def ask(generator: Graded, *names: str, retrieve: Any = None, question: str = QUESTION, **given: Any) -> Answer:
    return self_rag(generator, Asked([question], [found(*names)], k=2), settings(**given), retrieve=retrieve)[0]


def asked_of(server: FaultServer, start: str) -> int:
    return sum(start in request.content for request in server.log)


def test_short_form_ranks_by_yes_and_no(server: FaultServer, chat: Chat) -> None:
    answer = ask(opened(server), "light", "mill")
    assert answer.text == "In 1831. Anna Roth built it."
    assert [hit.passage.id for hit in answer.citations] == ["mill"]
    light, mill = answer.trace["candidates"]
    assert [(one["rel"], one["sup"], one["use"]) for one in (light, mill)] == [(0.0, 0.0, 1.0), (1.0, 1.0, 1.0)]
    assert mill["final"] == pytest.approx(2.5)
    assert answer.raw.startswith("[Relevant]In 1831.")
    chat.needs = False
    assert ask(opened(server), "mill").text == "I say 中文. No more."  # words come back as they were


def test_long_form_is_the_same_tree(server: FaultServer, chat: Chat) -> None:
    chat.complete = 2
    answer = ask(opened(server), "mill", "river", form="long", passages="static", beam=2)
    assert answer.text == "In 1831. Anna Roth built it."
    told = [
        (one.decision, one.hit.passage.id if one.hit else None, one.is_rel, one.is_sup, one.cited) for one in answer.segments
    ]
    assert told == [("yes", "mill", "[Relevant]", "[Fully supported]", (1,)), ("continue", "mill", "", "", (1,))]
    assert answer.segments[1].is_use == "[Utility:5]"
    assert answer.finished


def test_hard_constraints_hold(server: FaultServer, chat: Chat) -> None:
    chat.lines["mill"] = ["In 1999."]
    answer = ask(opened(server), "mill", "river", form="long", passages="static", require=["fully"], on_empty="no_retrieval")
    assert [one.decision for one in answer.segments] == ["no"]
    assert [one["pruned"] for one in answer.trace["levels"][0]["candidates"]].count("require:fully") == 2


def test_equal_questions_are_asked_once(server: FaultServer, chat: Chat) -> None:
    generator = opened(server)
    first = ask(generator, "mill", "light", prune={"kind": "bound"})
    count = len(server.log)
    assert ask(generator, "mill", "light", prune={"kind": "bound"}).text == first.text
    assert len(server.log) == count == generator.cost.calls
    contents = [request.content for request in server.log]
    assert len(set(contents)) == len(contents)


@pytest.mark.parametrize("form", ["short", "long"])
@pytest.mark.parametrize(("rewrites", "words"), [(3, 3), (1, 1), (0, 0)])
def test_rewording_stops_at_its_bound(server: FaultServer, chat: Chat, form: Any, rewrites: int, words: int) -> None:
    chat.relevant, chat.words = set(), ["a", "b", "c", "d", "e"]
    chat.lines["river"] = chat.lines["light"]
    searched: list[str] = []

    def retrieve(query: str, k: int) -> list[Hit]:
        searched.append(query)
        return found("light")

    given = {"passages": "static"} if form == "long" else {}
    answer = ask(opened(server, rewrites=rewrites), "river", retrieve=retrieve, form=form, **given)
    assert searched == ["a", "b", "c"][:words]
    assert answer.trace.get("reworded", []) == searched
    assert [hit.passage.id for hit in answer.hits] == ["river"]  # what the question itself found
    assert asked_of(server, "You word questions") == words


def test_rewording_ends_when_something_is_relevant(server: FaultServer, chat: Chat) -> None:
    chat.words = ["the  mill's\nyear", "never asked"]
    answer = ask(opened(server), "river", retrieve=lambda query, k: found("light", "mill") if "year" in query else [])
    assert answer.trace["reworded"] == ["the mill's year"]
    assert answer.text == "In 1831. Anna Roth built it."
    assert chat.words == ["never asked"]
    chat.needs = False  # what is not looked up is not reworded
    assert "reworded" not in ask(opened(server), "river", retrieve=lambda query, k: []).trace


def test_an_answer_that_is_neither_is_no_grade(server: FaultServer, chat: Chat) -> None:
    chat.grades = {"Does all that": "Nothing can be said.", "Is the answer what": "YES, it is"}
    answer = ask(opened(server), "mill")
    (mill,) = answer.trace["candidates"]
    assert mill["sup"] == 0.0
    assert "sup:absent" in mill["flags"]
    assert mill["use"] == 1.0
    assert asked_of(server, "Answer yes or no.") == 1  # asked again, once
    chat.grades = {"Does the passage hold information": "nobody knows", "Would documents": "notably"}
    answer = ask(opened(server), "mill")
    (mill,) = answer.trace["candidates"]
    assert mill["rel"] == 0.5
    assert {"rel:no_evidence", "off_grammar"} <= set(mill["flags"])
    assert answer.trace["decisions"][0]["r"] == 0.5


def test_what_a_chat_model_spells_is_text(server: FaultServer, chat: Chat) -> None:
    chat.lines["mill"] = ["It says [Relevant] and </paragraph>."]
    answer = ask(opened(server), "mill", question="what does [Fully supported] </s> mean?")
    assert answer.text == "It says [Relevant] and </paragraph>."
    assert asked_of(server, "what does [Fully supported] </s> mean?") == len(server.log)


def test_a_reply_cut_off_by_the_limit_is_told(server: FaultServer, chat: Chat) -> None:
    server.faults = lambda number, request: Fault(text="In 18", finish="length") if "You answer" in request.content else None
    answer = ask(opened(server), "mill", max_new_tokens=3)
    assert (answer.text, answer.finished) == ("In 18", False)
    assert all(request.body["max_tokens"] == 3 for request in server.log if "You answer" in request.content)


def test_what_has_no_likelihood_is_refused(server: FaultServer) -> None:
    generator = opened(server)
    with pytest.raises(GeneratorError, match="no log-probabilities"):
        ask(generator, "mill", options=["a", "b"])
    with pytest.raises(RecipeError, match="rewrites is 3"):
        record(generator, Asked([QUESTION], [found("mill")]), settings(), cache=CandidateCache())
    shared = {"knowledge": {"path": "x", "documents": "x"}, "name": "x"}
    graded = {"kind": "graded", "model": "m", "endpoint": "http://localhost/v1"}
    with pytest.raises(ValidationError, match="seq must be 0"):
        Recipe(**shared, generator=graded, decode={"kind": "self_rag"})
    with pytest.raises(ValidationError, match="needs endpoint"):
        GeneratorSettings(kind="graded", model="m")
    with pytest.raises(ValidationError, match="rewrites belongs to kind graded"):
        GeneratorSettings(rewrites=1)


def graded_recipe(server: FaultServer, place: Path, more: str = "") -> Path:
    """A recipe whose generator is the server, which says yes to whoever lets it judge."""
    server.reply = lambda body: "yes" if body["messages"][0]["content"].startswith("You judge") else "in 1700"
    recipe = small_recipe(place)
    recipe.write_text(f"""
name: graded
knowledge: {{path: kb, documents: corpus.jsonl, chunk: null, encoder: {{model: encoder/encoder, dtype: float32}}}}
retriever: {{k: 2}}
generator: {{kind: graded, model: m, endpoint: "{server.url}", api_key_env: GRADED_KEY}}
decode: {{kind: self_rag, weights: {{seq: 0}}}}
{more}
""")
    return recipe


def test_by_the_command_line(
    server: FaultServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe whose one difference is its generator, and a server that tells nothing but text."""

    recipe = graded_recipe(server, tmp_path)
    assert run("build", str(recipe), capsys=capsys, monkeypatch=monkeypatch)[0] == 0
    code, out, _ = run("answer", str(recipe), "what year?", "--json", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0
    [told] = json.loads(out)
    assert told["answer"] == "in 1700"
    assert {one["rel"] for one in told["trace"]["candidates"]} == {1.0}
    code, out, _ = run("answer", str(recipe), "what year?", "decode.form=long", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0
    assert "in 1700 [1]" in out


def test_an_evaluation_tells_what_a_thousand_answers_cost(
    server: FaultServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the tokens that the server counts, so that its bill and ours are one; and nothing where nobody says what they cost."""
    measured = "evaluate: {questions: dev.jsonl, modes: [closed_book, retrieved], limit: 4, price: {input: 2.5, output: 10}}"
    recipe = graded_recipe(server, tmp_path, measured)
    assert run("build", str(recipe), capsys=capsys, monkeypatch=monkeypatch)[0] == 0

    def evaluate(*more: str) -> tuple[str, str]:
        code, out, err = run("evaluate", str(recipe), *more, capsys=capsys, monkeypatch=monkeypatch)
        assert code == 0, err
        return out, err

    spent = json.loads(evaluate("--json")[0])["spent"]["untuned"]
    assert set(spent) == {"closed_book", "retrieved"}
    assert all({"generated", "seconds", "usd_per_1000"} <= set(own) for own in spent.values()), "beside tokens and time"
    bill = sum(own["usd_per_1000"] for own in spent.values()) * 4 / 1000 * 10**9
    assert bill == pytest.approx(server.bill, rel=1e-3)
    sent = len(server.log)
    dearer = json.loads(evaluate("evaluate.price.output=20", "--json")[0])["spent"]["untuned"]
    assert dearer["retrieved"]["usd_per_1000"] > spent["retrieved"]["usd_per_1000"]
    assert len(server.log) == sent, "another price measures nothing again"
    assert f"usd_per_1000 {spent['retrieved']['usd_per_1000']:.4g}" in evaluate("--report")[1].replace("\n", " ")
    page = (tmp_path / "runs/graded/report.html").read_text()
    assert "dollars per 1,000" in page
    assert f"{spent['retrieved']['usd_per_1000']:.4g}" in page
    assert "spent" not in json.loads(evaluate("evaluate.price=null", "--json")[0])
    assert "usd" not in evaluate("evaluate.price=null")[1]


def test_a_server_that_counts_no_tokens_gets_no_price(server: FaultServer) -> None:
    message = {"role": "assistant", "content": "yes"}
    body = json.dumps({"id": "1", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
    server.reply, server.faults = lambda body: "yes", lambda number, request: Fault(body=body)
    generator = opened(server)
    ask(generator, "mill")
    assert (generator.server.billed.prompt, generator.server.untold > 0) == (0, True)
    rows = [{"predictions": {"retrieved": {"seconds": 0.1}}}]
    assert spent_on(rows, price=PriceSettings(input=Decimal(1), output=Decimal(1))) == {"retrieved": {"seconds": 0.1}}
