"""Self-RAG's worked figures through each backend: a script, transformers here, and a server; and trees that are one in all.

Behind the second and the third stands one real causal model whose distributions are the script's (`tiny.ScriptedCausalLM`), so
that caches, branches, pads, float32 softmax and the protocol lie between the figures and the answer. Log-probabilities are
float32 there: each is within 6e-8 of its own, and no figure is a sum of more than ten, so the examples' 1e-6 holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import tiny
from raglan.decode import Asked, self_rag
from raglan.generator import HFGenerator, MarkedEndpoint, open_any
from raglan.generator.base import MarkedGenerator
from raglan.recipe import GeneratorSettings, PromptSettings, SelfRagDecode
from raglan.records import Answer, Hit, Passage
from served import KEY, ServedMarks, serving
from test_self_rag_long import USE, WORKED, example, nodes
from test_self_rag_short import CAPITALS, FLUENT, GROUNDED, LETTERS
from tiny import ScriptedCausalLM, ScriptedGenerator, decides, said

Made = Callable[..., MarkedGenerator]
near = lambda value: pytest.approx(value, abs=1e-6)  # noqa: E731


def opened(served: ServedMarks, servers: ExitStack, folder: Path, **settings: Any) -> MarkedEndpoint:
    """A server's model, with its tokenizer here."""
    address = servers.enter_context(serving(served))
    asks = GeneratorSettings(
        kind="endpoint", model="tiny", endpoint=address, tokenizer=str(folder), api_key_env="TINY_KEY", retries=0, **settings
    )
    found = open_any(asks, PromptSettings())
    assert isinstance(found, MarkedEndpoint)
    return found


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    monkeypatch.setenv("TINY_KEY", KEY)
    with ExitStack() as stack:
        yield stack


@pytest.fixture(params=["scripted", "hf", "endpoint"])
def backend(request: pytest.FixtureRequest, servers: ExitStack, tmp_path: Path) -> Made:
    """A script → a generator that says it."""

    def made(script: tiny.Script) -> MarkedGenerator:
        scripted = ScriptedGenerator(script)
        if request.param == "scripted":
            return scripted
        model = ScriptedCausalLM(scripted)
        if request.param == "hf":
            return HFGenerator(model, scripted.tokenizer, GeneratorSettings(model="said", dtype="float32"), PromptSettings())
        scripted.tokenizer.save_pretrained(str(tmp_path))
        return opened(ServedMarks(model, scripted.tokenizer), servers, tmp_path)

    return made


def ask(generator: MarkedGenerator, *titles: str, **given: Any) -> Answer:
    """Passages are of unlike length, so that rows have pads."""
    passages = [Passage(title, f"about {title}{' and so on' * row}", title) for row, title in enumerate(titles)]
    hits = [Hit(passage, row, 0.0, row + 1) for row, passage in enumerate(passages)]
    return self_rag(generator, Asked(["why"], [hits]), SelfRagDecode(kind="self_rag", **given))[0]


def traced(answer: Answer) -> list[dict[str, Any]]:
    assert answer.trace is not None
    return list(answer.trace["candidates"])


def finals(answer: Answer) -> list[float]:
    return [one["final"] for one in traced(answer)]


# ------------------------------------------------------------------------------------------------------ worked examples


def test_example_1_three_passages(backend: Made) -> None:
    generator, titles = backend(CAPITALS), ("p0", "p1", "p2")
    for seq, use, expected in (
        (1.0, 0.5, [3.056636, 2.027207, 0.626518]), (1.0, 1.0, [3.476636, 2.372207, 0.487629]),
        (0.0, 0.5, [2.209474, 1.289444, -0.033626]), (0.0, 1.0, [2.629474, 1.634444, -0.172515]),
    ):  # fmt: skip
        answer = ask(generator, *titles, weights={"seq": seq, "use": use})
        assert finals(answer) == near(expected)
        assert (answer.text, answer.logprob) == ("Paris", near(-0.995179))
    told = [[one[name] for name in ("seq", "rel", "sup", "use")] for one in traced(answer)]
    assert told[0] == near([0.847162, 0.947368, 0.842105, 0.84])
    assert told[1] == near([0.737763, 0.666667, 0.277778, 0.69])
    assert told[2] == near([0.660143, 0.105263, 0.0, -0.277778])
    assert [one["flags"] for one in traced(answer)] == [[], [], ["sup:absent"]]
    bound = ask(generator, *titles, prune={"kind": "bound", "wave": 1})
    assert [one["bound"] for one in traced(bound)] == near([3.447368, 3.166667, 2.605263])
    assert [one["pruned"] for one in traced(bound)] == ["", "", "bound"]
    assert [one["final"] for one in traced(bound)[:2]] == near([3.056636, 2.027207])  # rel was read first, the rest behind it


@pytest.mark.parametrize(
    ("yes", "no", "released", "paper"),
    [
        (0.9, 0.05, 0.033975, 0.947368), (0.5, 0.4, 0.430677, 0.555556), (0.2, 0.75, 0.848359, 0.210526),
        (0.05, 0.9, 0.966025, 0.052632), (0.001, 0.95, 0.992629, 0.001052), (0.95, 0.001, 0.007371, 0.998948),
    ],
)  # fmt: skip
def test_example_2_decisions(backend: Made, yes: float, no: float, released: float, paper: float) -> None:
    generator = backend({**CAPITALS, (): decides(no, yes)})
    for value, given in ((paper, ()), (released, ("decision",))):
        answer = ask(generator, "p0", released=given)
        assert answer.trace is not None
        assert answer.trace["decisions"][0]["r"] == near(value)
        assert answer.trace["retrieved"] == (value > 0.2) == (answer.text == "Paris")


def test_example_3_the_sum_turns_the_answer(backend: Made) -> None:
    generator, titles = backend(LETTERS), ("p0", "p1", "p2", "p3")
    for aggregate, seq, best, expected in (
        ("sum", 1.0, "B", {"A": 3.298601, "B": 4.649763, "C": 0.800019}),
        ("sum", 0.0, "B", {"A": 2.360974, "B": 3.347895, "C": 0.210526}),
        ("max", 1.0, "A", {"A": 3.298601, "B": 2.358258, "C": 0.800019}),
        ("logsumexp", 1.0, "A", {"A": 3.298601, "B": 3.018586, "C": 0.800019}),
    ):
        answer = ask(generator, *titles, labels=["A", "B", "C", "D"], aggregate=aggregate, weights={"seq": seq})
        assert answer.trace is not None
        assert (answer.text, dict(answer.trace["standings"])) == (best, near(expected))
    on, off = (ask(generator, *titles, weights={"seq": seq}) for seq in (1.0, 0.0))
    assert finals(on) == near([3.298601, 2.358258, 2.291505, 0.800019])
    assert finals(off) == near([2.360974, 1.713421, 1.634474, 0.210526])
    assert on.text == off.text == "A"  # open


def test_example_4_weights(backend: Made) -> None:
    generator = backend({(): decides(0.1, 0.9), ("fluent",): FLUENT, ("grounded",): GROUNDED})
    for weight, expected in (
        (0.0, [2.265290, 1.602901]), (0.5, [2.377790, 2.032194]), (1.0, [2.490290, 2.461487]), (2.0, [2.715290, 3.320073])
    ):  # fmt: skip
        answer = ask(generator, "fluent", "grounded", weights={"sup": weight})
        assert (finals(answer), answer.text) == (near(expected), "g" if weight == 2 else "f")


STEPS = {"p0": 1.3, "p1": 1.5, "p2": 0.9}


@pytest.mark.parametrize("combine", [*WORKED, "by_component"])
def test_example_5_a_tree(backend: Made, combine: str) -> None:
    generator = backend(example().scripts[""])
    tree = {"form": "long", "retrieve": "always", "passages": "static", "max_segments": 2, "stop": "never", "n_best": 9}
    answer = ask(generator, *STEPS, **tree, combine=combine, weights={"seq": 0.0})
    told = nodes(answer)
    assert [told[(name,)]["final"] for name in STEPS] == near([2.125, 1.65, 1.3])
    expected = WORKED.get(combine, {("p1", "p1"): 1.7})
    assert {path: told[path]["final"] for path in expected} == near(expected)
    assert {path[1]: one["step"] for path, one in told.items() if len(path) == 2} == near(STEPS)
    assert answer.text == ("one p1p1" if combine in ("sum", "product") else "zero")
    assert "zero" in [answer.text, *(other.text for other in answer.alternatives)]
    shown = [generator.marked_prompt.text(one["context"]) for path, one in told.items() if path[0] == "p1" and len(path) == 2]
    assert len(shown) == 3
    assert all("one" in text and "zero" not in text for text in shown)


def test_example_5_as_released(backend: Made) -> None:
    """Without `siblings`, which changes what is asked and not what it is worth."""
    generator = backend(example().scripts[""])
    tree = {"form": "long", "retrieve": "always", "passages": "static", "max_segments": 2, "combine": "product", "n_best": 9}
    answer = ask(generator, *STEPS, **tree, released=["use", "path"])
    figures = {("p0",): 1.875, ("p1",): 1.65, ("p2",): 1.3} | {("p1", "p0"): 1.7325, ("p1", "p1"): 2.0625, ("p1", "p2"): 1.0725}
    assert {path: one["final"] for path, one in nodes(answer).items()} == near(figures)
    assert "zero" not in [answer.text, *(other.text for other in answer.alternatives)]


@pytest.mark.parametrize(("rule", "r"), [("two_way", 0.25), ("three_way", 0.222222)])
def test_example_6_the_boundary(backend: Made, rule: str, r: float) -> None:
    answer = ask(backend({**CAPITALS, (): decides(0.6, 0.2, 0.1)}), "p0", rule=rule)
    assert answer.trace is not None
    assert answer.trace["decisions"][0]["r"] == near(r)


@pytest.mark.parametrize(("top", "figures"), [(1, [1.0, 1.0]), (20, [0.9 / 0.95, 0.65])])
def test_example_6_what_a_server_cuts_off(servers: ExitStack, tmp_path: Path, top: int, figures: list[float]) -> None:
    """Of Relevant .9 and of .5, .3, .2 only the likeliest; where a word stands in place of IsRel, nothing of the group."""
    scripted = ScriptedGenerator({
        (): decides(0.1, 0.9), ("p0",): said("x", rel=(0.9, 0.05), sup=(0.5, 0.3, 0.2), use=USE), ("p1",): said("y", use=USE),
    })  # fmt: skip
    scripted.tokenizer.save_pretrained(str(tmp_path))
    served = ServedMarks(ScriptedCausalLM(scripted), scripted.tokenizer)
    served.can -= {"marks"}
    served.most = top
    generator = opened(served, servers, tmp_path)
    some, none = traced(ask(generator, "p0", "p1", retrieve="always"))
    assert [some["rel"], some["sup"]] == near(figures)
    assert ({"rel:partial", "sup:partial"} <= set(some["flags"])) == (top == 1)
    assert "off_grammar" in none["flags"]
    if top == 1:
        assert none["rel"] == near(0.5)
        assert "rel:no_evidence" in none["flags"]
        long = ask(generator, "p0", form="long", retrieve="always", passages="static", released=["missing"])
        assert long.segments[0].rel == near(-0.009082)  # −100 as a probability


# ------------------------------------------------------------------------------------------------------ one tree in all


@pytest.mark.parametrize("form", ["short", "long"])
def test_a_server_and_transformers_here_grow_the_same_tree(form: str, servers: ExitStack, tmp_path: Path) -> None:
    """A model that likes to judge and to go on, and the same behind a real server with log-probabilities."""
    folder = tiny.sure_self_rag(tmp_path, sure=10, likes=("retrieve", "is_sup", "is_use"), by=1.7)
    here = open_any(GeneratorSettings(model=str(folder), dtype="float32"), PromptSettings())
    served = ServedMarks(AutoModelForCausalLM.from_pretrained(str(folder)).eval(), here.tokenizer)
    there = opened(served, servers, folder)
    texts = ("the tower of the miller", "a mill in the north")
    hits = [Hit(Passage(f"p{row}", text, f"t{row}"), row, 1.0, row + 1) for row, text in enumerate(texts)]
    more = {"passages": "static", "max_segments": 3, "stop": "never", "n_best": 3} if form == "long" else {}
    settings = SelfRagDecode(kind="self_rag", form=form, retrieve="always", max_new_tokens=6, **more)
    asked = Asked(["who built the tower", "when"], [hits, hits[:1]])
    for ours, theirs in zip(*(self_rag(one, asked, settings) for one in (there, here)), strict=True):
        assert (ours.text, ours.ids, ours.raw) == (theirs.text, theirs.ids, theirs.raw)
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)
        assert [other.text for other in ours.alternatives] == [other.text for other in theirs.alternatives]
        same_tree(ours, theirs, within=1e-3)
    limit = max(request["max_tokens"] for request in served.asked)
    assert limit == 6
    if form == "long":
        assert max(len(path) for path in nodes(theirs)) > 1


def same_tree(ours: Answer, theirs: Answer, *, within: float) -> None:
    """The same decisions and the same nodes in the same order, with the same figures."""
    assert ours.trace is not None
    assert theirs.trace is not None
    for own, other in zip(ours.trace["decisions"], theirs.trace["decisions"], strict=True):
        assert own["retrieve"] == other["retrieve"]
        assert own["r"] == pytest.approx(other["r"], abs=within)
    grown = [nodes(one) if one.trace["form"] == "long" else dict(enumerate(traced(one))) for one in (ours, theirs)]
    assert list(grown[0]) == list(grown[1])
    for own, other in zip(*(tree.values() for tree in grown), strict=True):
        for name in ("passage", "pruned", "ids", "finish", "flags"):
            assert own[name] == other[name], name
        for name in ("seq", "rel", "sup", "use", "final"):
            assert own[name] == pytest.approx(other[name], abs=within), name
            assert own[name] is None or math.isfinite(own[name])
