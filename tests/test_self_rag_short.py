"""Self-RAG's short form: worked examples in distributions, twins by loops, and what must not change an answer."""

from __future__ import annotations

import itertools
import json
import logging
import math
import random
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

import tiny
from raglan.calibration import fitted
from raglan.decode import Asked, self_rag
from raglan.decode.self_rag.rate import prompts_of, threshold_of
from raglan.decode.self_rag.rules import calibrated, decide
from raglan.decode.self_rag.trace import told
from raglan.errors import GeneratorError
from raglan.recipe import CalibrationSettings, SelfRagDecode
from raglan.records import Answer, Hit, Passage
from tiny import ScriptedGenerator, decides, said
from tiny import hits as found

USE = (0.01, 0.02, 0.05, 0.12, 0.80)


def settings(**given: Any) -> SelfRagDecode:
    return SelfRagDecode(kind="self_rag", **given)


def ask(generator: Any, hits: Sequence[Hit], question: str = "why", **given: Any) -> Answer:
    return self_rag(generator, Asked([question], [hits]), settings(**given))[0]


def finals(answer: Answer) -> dict[str, float]:
    assert answer.trace is not None
    return {one["passage"]: one["final"] for one in answer.trace["candidates"] if "final" in one}


CAPITALS = {
    (): decides(0.05, 0.9),
    ("p0",): said(("Par", -0.10), ("is", -0.20), rel=(0.90, 0.05), sup=(0.70, 0.20, 0.05), use=USE),
    ("p1",): said(("Ly", -0.05), ("on", -0.05), rel=(0.60, 0.30), sup=(0.10, 0.30, 0.50), use=(0.02, 0.03, 0.10, 0.25, 0.60)),
    ("p2",): said(("Par", -0.30), ("is", -0.40), rel=(0.10, 0.85), use=(0.30, 0.20, 0.20, 0.10, 0.10)),
    ("[No Retrieval]",): said(("Ro", -0.5), ("me", -0.5), use=USE),
}  # fmt: skip
LETTERS = {
    (): decides(0.05, 0.9),
    ("p0",): said(("A", -0.05), rel=(0.95, 0.04), sup=(0.90, 0.05, 0.03), use=(0.01, 0.01, 0.02, 0.06, 0.90)),
    ("p1",): said(("B", -0.40), rel=(0.70, 0.25), sup=(0.40, 0.40, 0.15), use=(0.02, 0.03, 0.10, 0.25, 0.60)),
    ("p2",): said(("B", -0.35), rel=(0.65, 0.30), sup=(0.35, 0.45, 0.15), use=(0.02, 0.03, 0.10, 0.25, 0.60)),
    ("p3",): said(("C", -0.90), rel=(0.20, 0.75), use=(0.10, 0.20, 0.40, 0.20, 0.10)),
}  # fmt: skip


@pytest.fixture(scope="module")
def capitals() -> ScriptedGenerator:
    return ScriptedGenerator(CAPITALS)


@pytest.fixture(scope="module")
def letters() -> ScriptedGenerator:
    return ScriptedGenerator(LETTERS)


@pytest.mark.parametrize(
    ("seq", "use", "expected"),
    [
        (1.0, 0.5, (3.056636, 2.027207, 0.626518)),
        (1.0, 1.0, (3.476636, 2.372207, 0.487629)),
        (0.0, 0.5, (2.209474, 1.289444, -0.033626)),
        (0.0, 1.0, (2.629474, 1.634444, -0.172515)),
    ],
)
def test_three_passages(capitals: ScriptedGenerator, seq: float, use: float, expected: tuple[float, ...]) -> None:
    answer = ask(capitals, found("p0", "p1", "p2"), weights={"seq": seq, "use": use})
    assert list(finals(answer).values()) == pytest.approx(expected, abs=1e-6)
    assert answer.text == "Paris"
    assert answer.trace is not None
    assert answer.raw == "[Relevant]Paris[Fully supported][Utility:5]"
    assert answer.trace["decisions"][0]["r"] == pytest.approx(0.947368, abs=1e-6)
    one = answer.trace["candidates"][2]
    assert [one[name] for name in ("seq", "rel", "sup", "use")] == pytest.approx((0.660143, 0.105263, 0, -0.277778), abs=1e-6)
    assert one["flags"] == ["sup:absent"]
    assert answer.logprob == pytest.approx(-0.995179, abs=1e-6)
    assert [hit.passage.id for hit in answer.citations] == ["p0"]
    assert answer.segments[0].cited == (1,)


def test_bound_leaves_out_what_cannot_win(capitals: ScriptedGenerator) -> None:
    before = capitals.cost.copy()
    answer = ask(capitals, found("p0", "p1", "p2"), prune={"kind": "bound", "wave": 1})
    spent = capitals.cost - before
    assert answer.trace is not None
    rows = answer.trace["candidates"]
    assert [row["bound"] for row in rows] == pytest.approx((3.447368, 3.166667, 2.605263), abs=1e-6)
    assert [row["pruned"] for row in rows] == ["", "", "bound"]
    assert spent.generated == 12 == answer.trace["cost"]["generated"]
    assert answer.text == "Paris"


@pytest.mark.parametrize(
    ("yes", "no", "released", "paper"),
    [
        (0.9, 0.05, 0.033975, 0.947368),
        (0.5, 0.4, 0.430677, 0.555556),
        (0.2, 0.75, 0.848359, 0.210526),
        (0.05, 0.9, 0.966025, 0.052632),
        (0.001, 0.95, 0.992629, 0.001052),
        (0.95, 0.001, 0.007371, 0.998948),
    ],
)
def test_decisions(yes: float, no: float, released: float, paper: float, caplog: pytest.LogCaptureFixture) -> None:
    generator = ScriptedGenerator({**CAPITALS, (): decides(no, yes)})
    for value, given in ((paper, ()), (released, ("decision",))):
        caplog.clear()
        answer = ask(generator, found("p0"), released=given)
        assert answer.trace is not None
        decision = answer.trace["decisions"][0]
        assert decision["r"] == pytest.approx(value, abs=1e-6)
        assert answer.trace["retrieved"] == decision["retrieve"] == (value > 0.2) == (answer.text == "Paris")
        assert [record.levelno for record in caplog.records] == [logging.WARNING] * len(given)


def test_the_threshold_is_strict_and_its_ends_are_always_and_never() -> None:
    marks = np.log([0.5, 0.5, *[1e-3] * 11])
    chosen = settings()
    assert [decide(marks, chosen, missing="error", threshold=at).retrieve for at in (0.0, 0.499, 0.5, 1.0)] == [
        True,
        True,
        False,
        False,
    ]
    impossible = np.array([0.0, -np.inf, *[-9.0] * 11])
    assert decide(impossible, chosen, missing="error", threshold=0.0).retrieve is False
    assert decide(marks, chosen, missing="error", threshold=None, argmax=np.bool_(True)).retrieve is True
    rising = [decide(np.log([0.4, p, 0.1, *[0.1] * 10]), chosen, missing="error", threshold=0.2).r for p in (0.01, 0.1, 0.5)]
    assert rising == sorted(rising)
    assert len(set(rising)) == 3
    three = decide(np.log([0.6, 0.2, 0.1, *[0.1] * 10]), settings(rule="three_way"), missing="error", threshold=0.2)
    assert three.r == pytest.approx(0.222222, abs=1e-6)


def test_no_threshold_asks_whether_retrieval_is_the_likeliest_token() -> None:
    for no, yes in ((0.3, 0.4), (0.4, 0.3)):
        generator = ScriptedGenerator({**CAPITALS, (): decides(no, yes)})
        answer = ask(generator, found("p0"), threshold=None)
        assert answer.trace is not None
        assert answer.trace["retrieved"] == (yes > no)


def test_target_rate_sets_the_threshold_over_the_questions() -> None:
    script = {f"q{n}": {**CAPITALS, (): decides(1 - r, r)} for n, r in enumerate((0.9, 0.1, 0.5, 0.3))}
    asked = Asked([f"q{n}" for n in range(4)], [found("p0")] * 4)
    answers = self_rag(ScriptedGenerator(script), asked, settings(target_rate=0.5))
    assert [answer.trace is not None and answer.trace["retrieved"] for answer in answers] == [True, False, True, False]


def test_calibration_moves_r() -> None:
    r = np.array([0.0, 0.2, 0.5, 1.0])
    softer = calibrated(r, CalibrationSettings(kind="temperature", temperature=2.0))
    assert softer == pytest.approx([0.0, 1 / (1 + math.sqrt(0.8 / 0.2)), 0.5, 1.0])
    steps = calibrated(r, CalibrationSettings(kind="isotonic", x=(0.1, 0.3), y=(0.0, 0.8)))
    assert steps == pytest.approx([0.0, 0.4, 0.8, 0.8])
    generator = ScriptedGenerator({**CAPITALS, (): decides(0.75, 0.2)})
    low = {"kind": "isotonic", "x": (0.0, 1.0), "y": (0.0, 0.5)}
    assert ask(generator, found("p0")).text == "Paris"  # r = .2105
    assert ask(generator, found("p0"), calibration=low).text == "Rome"


def test_fits_find_what_they_minimise() -> None:
    draw = np.random.default_rng(0)
    r = draw.uniform(0.02, 0.98, 400)
    true = 1 / (1 + np.exp(-np.log(r / (1 - r)) / 2.5))
    needed = draw.uniform(size=400) < true

    def loss(found: CalibrationSettings) -> float:
        p = np.clip(calibrated(r, found), 1e-9, 1 - 1e-9)
        return float(-np.where(needed, np.log(p), np.log(1 - p)).sum())

    heat = fitted(list(r), list(needed), "temperature")
    grid = [CalibrationSettings(kind="temperature", temperature=t) for t in np.geomspace(0.1, 20, 200)]
    assert loss(heat) <= min(map(loss, grid)) + 1e-9
    assert heat.temperature == pytest.approx(2.5, rel=0.3)

    few, judged = [0.1, 0.2, 0.3, 0.4, 0.5], [False, True, False, True, True]
    steps = fitted(few, judged, "isotonic")
    assert calibrated(few, steps) == pytest.approx([0.0, 0.5, 0.5, 1.0, 1.0])
    heights = np.array(list(itertools.combinations_with_replacement(np.linspace(0, 1, 9), 5)))  # all rising tables, coarsely
    squares = ((heights - np.array(judged)) ** 2).sum(1).min()
    assert ((calibrated(few, steps) - np.array(judged)) ** 2).sum() <= squares + 1e-12


@pytest.mark.parametrize(
    ("aggregate", "seq", "best", "expected"),
    [
        ("sum", 1.0, "B", {"A": 3.298601, "B": 4.649763, "C": 0.800019}),
        ("sum", 0.0, "B", {"A": 2.360974, "B": 3.347895, "C": 0.210526}),
        ("max", 1.0, "A", {"A": 3.298601, "B": 2.358258, "C": 0.800019}),
        ("mean", 1.0, "A", {"A": 3.298601, "B": 2.324881, "C": 0.800019}),
        ("logsumexp", 1.0, "A", {"A": 3.298601, "B": 3.018586, "C": 0.800019}),
    ],
)
def test_a_sum_over_passages_turns_the_answer(
    letters: ScriptedGenerator, aggregate: str, seq: float, best: str, expected: dict[str, float]
) -> None:
    hits = found("p0", "p1", "p2", "p3")
    answer = ask(letters, hits, labels=["A", "B", "C", "D"], aggregate=aggregate, weights={"seq": seq})
    assert answer.text == best
    assert answer.trace is not None
    assert dict(answer.trace["standings"]) == pytest.approx(expected, abs=1e-6)
    assert ask(letters, hits, weights={"seq": seq}).text == "A"  # open


def test_an_abstention_where_two_labels_are_close(letters: ScriptedGenerator) -> None:
    hits = found("p0", "p1", "p2", "p3")
    for margin, text in ((1.35, "B"), (1.36, "I don't know")):
        assert ask(letters, hits, labels=["A", "B", "C"], abstain_margin=margin).text == text


@pytest.mark.parametrize(
    ("on_empty", "text", "flags"),
    [("relax", "good", ["relaxed:fully"]), ("no_retrieval", "plain", []), ("drop", "I don't know", ["abstained"])],
)
def test_answers_that_break_a_hard_constraint_are_not_elected(on_empty: str, text: str, flags: list[str]) -> None:
    half = {
        (): decides(0.05, 0.9),
        ("p0",): said("good", rel=(0.9, 0.1), sup=(0.4, 0.5, 0.1)),
        ("p1",): said("poor", rel=(0.8, 0.2), sup=(0.5, 0.3, 0.2)),
        ("[No Retrieval]",): said("plain"),
    }
    hits, asked = found("p0", "p1"), {"require": ["fully"], "weights": {"sup": 0.0}, "on_empty": on_empty}
    assert ask(ScriptedGenerator(half), hits, weights={"sup": 0.0}).text == "good"
    answer = ask(ScriptedGenerator(half), hits, **asked)
    assert answer.trace is not None
    assert answer.text == "poor"
    assert ["require:fully" in one["flags"] for one in answer.trace["candidates"]] == [True, False]
    neither = {**half, ("p1",): said("poor", rel=(0.8, 0.2), sup=(0.2, 0.6, 0.2))}
    answer = ask(ScriptedGenerator(neither), hits, **asked)
    assert answer.trace is not None
    assert (answer.text, answer.trace["flags"]) == (text, flags)
    bound = ask(ScriptedGenerator(half), hits, **asked, prune={"kind": "bound", "wave": 1})
    assert bound.text == "poor"  # what is refused bounds nothing


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"options": ["A", "B"], "require": ["fully"]}, "options are scored"),
        ({"beam": 3}, "beam belongs to form long"),
        ({"form": "long", "options": ["A", "B"]}, "options belongs to form short"),
        ({"released": ["use"]}, "released: use is none of form short"),
        ({"threshold": 0.3, "target_rate": 0.5}, "takes the place of threshold"),
        ({"retrieve": "always", "target_rate": 0.5}, "takes the place of threshold"),
        ({"samples": 2}, "without temperature they would be one"),
        ({"prune": {"kind": "tau"}}, "needs tau"),
        ({"prune": {"kind": "none", "m": 2}}, "has no m"),
        ({"prune": {"kind": "bound"}, "labels": ["A", "B"]}, "need all of them"),
        ({"form": "long", "prune": {"kind": "bound"}}, "belongs to form short"),
        ({"labels": ["A", "B"], "options": ["A", "B"]}, "give either options"),
        ({"options": ["A", "A"]}, "all different"),
        ({"form": "long", "combine": "by_component", "absent_step": 0.5}, "a number for a whole step"),
        ({"labels": [True, False]}, "put them in quotes"),
        ({"weights": {"sup": -1}}, "greater than or equal to 0"),
        ({"calibration": {"kind": "isotonic", "x": [0.5, 0.1], "y": [0, 1]}}, "x must rise"),
        ({"calibration": {"kind": "temperature"}}, "needs temperature"),
        ({"thresold": 0.1}, "Extra inputs"),
    ],
)
def test_faults_of_settings_say_what_belongs_where(given: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        settings(**given)


def test_settings_as_they_are_written_in_a_recipe() -> None:
    assert settings().limit == 100
    assert settings(labels=[1, 2]).limit == 50
    assert settings(form="long").limit == 200
    required = settings(form="long", require=["relevant", {"min_use": 3}]).require
    assert (required.relevant, required.supported, required.min_use, required.any) == (True, False, 3, True)
    assert settings(options=None).options == ()
    assert settings(labels=[1, 2]).labels == ("1", "2")


def spoken(*words: str) -> dict[Any, Any]:
    lines = {(f"p{n}",): said(*([word] if word else []), rel=(0.5, 0.5), use=(0.2,) * 5) for n, word in enumerate(words)}
    return {(): decides(0.1, 0.9), **lines}


@pytest.mark.parametrize(
    ("words", "labels", "text"),
    [
        ((" A", "A.", "B"), "ABC", "A"),
        (("2", "A", "b"), "ABCD", "B"),  # among letters 2 is B
        (("E", "5", "A"), "12345", "5"),
        (("B", "A"), "ABCDE", "B"),  # a tie: first seen
        (("SUPPORTS", "REFUTES", "true"), ("true", "false"), "true"),
        (("", "", "C"), "ABC", "C"),  # no text is no label
    ],
)
def test_labels_are_one_however_they_are_written(words: tuple[str, ...], labels: Sequence[str], text: str) -> None:
    hits = found(*(f"p{n}" for n in range(len(words))))
    assert ask(ScriptedGenerator(spoken(*words)), hits, labels=list(labels)).text == text


def test_negative_sums_and_answers_that_are_no_label() -> None:
    worst = (0.99, 0.01, 0.0, 0.0, 0.0)
    script = {(): decides(0.1, 0.9)} | {
        (f"p{n}",): said((word, -9.0), rel=(0.001, 0.999), use=worst) for n, word in enumerate(("A", "A", "B"))
    }
    answer = ask(ScriptedGenerator(script), found("p0", "p1", "p2"), labels=["A", "B"], weights={"seq": 0.0})
    assert answer.text == "B"
    assert answer.trace is not None
    assert all(score < 0 for _, score in answer.trace["standings"])
    lost = ask(ScriptedGenerator(spoken("x", "y")), found("p0", "p1"), labels=["A", "B"])
    assert lost.text == "x"
    assert lost.trace is not None
    assert lost.trace["flags"] == ["no_label"]


FLUENT = said(("f", -0.02), rel=(0.97, 0.02), sup=(0.05, 0.35, 0.60), use=(0.001, 0.002, 0.05, 0.15, 0.79))
GROUNDED = said(("g", -0.60), rel=(0.80, 0.18), sup=(0.75, 0.20, 0.04), use=(0.05, 0.10, 0.30, 0.40, 0.14))


def test_weights_move_scores_by_their_component() -> None:
    generator = ScriptedGenerator({(): decides(0.1, 0.9), ("fluent",): FLUENT, ("grounded",): GROUNDED})
    hits = found("fluent", "grounded")
    expected = {0.0: (2.265290, 1.602901), 0.5: (2.377790, 2.032194), 1.0: (2.490290, 2.461487), 2.0: (2.715290, 3.320073)}
    for sup, scores in expected.items():
        answer = ask(generator, hits, weights={"sup": sup})
        assert tuple(finals(answer).values()) == pytest.approx(scores, abs=1e-6)
        assert answer.text == ("g" if sup == 2 else "f")
    base = ask(generator, hits).trace
    assert base is not None
    for name in ("seq", "rel", "sup", "use"):
        before = getattr(settings().weights, name)
        moved = ask(generator, hits, weights={name: before + 0.25}).trace
        assert moved is not None
        for old, new in zip(base["candidates"], moved["candidates"], strict=True):
            assert new["final"] - old["final"] == pytest.approx(0.25 * old[name], abs=1e-9)


NAN = math.nan


def test_missing_marks_follow_the_policy_and_are_flagged() -> None:
    script = {
        (): decides(0.1, 0.9),
        ("half",): said("x", rel=(0.9, NAN), sup=(0.5, NAN, NAN), use=USE),
        ("none",): said("y", rel=(NAN, NAN), sup=(0.5, 0.3, 0.2), use=USE),
    }  # fmt: skip
    hits = found("half", "none")
    answer = ask(ScriptedGenerator(script, exact=False), hits)
    assert answer.trace is not None
    half, none = answer.trace["candidates"]
    assert (half["rel"], half["sup"]) == pytest.approx((1.0, 1.0))
    assert half["flags"] == ["rel:partial", "sup:partial"]
    assert (none["rel"], none["sup"]) == pytest.approx((0.5, 0.65))
    assert "rel:no_evidence" in none["flags"]
    neutral = ask(ScriptedGenerator(script, exact=False), hits, missing="neutral").trace
    assert neutral is not None
    assert neutral["candidates"][0]["rel"] == neutral["candidates"][0]["sup"] == 0.5
    with pytest.raises(GeneratorError, match="no log-probability of"):
        ask(ScriptedGenerator(script), hits)


def test_passages_do_not_see_each_other(capitals: ScriptedGenerator) -> None:
    hits = found("p0", "p1", "p2")
    capitals.prompts.clear()
    first = ask(capitals, hits)
    root, *siblings = capitals.prompts[:4]
    assert all(ids[: len(root)] == root for ids in siblings)
    prompt = capitals.marked_prompt
    assert [list(ids[len(root) :]) for ids in siblings] == [prompt.passage(hit.passage) for hit in hits]
    for order in itertools.permutations(hits):
        other = ask(capitals, order)
        assert (other.text, other.logprob, finals(other)) == (first.text, first.logprob, pytest.approx(finals(first)))
        assert other.trace is not None
        assert [row["passage"] for row in other.trace["candidates"]] == [h.passage.id for h in order]


def test_ties_go_to_the_better_rank() -> None:
    same = said("x", rel=(0.5, 0.5), use=USE)
    generator = ScriptedGenerator({(): decides(0.1, 0.9), ("p0",): same, ("p1",): same})
    hits = found("p0", "p1")
    for order in (hits, hits[::-1]):
        assert ask(generator, order).citations == ()
        assert ask(generator, order).segments[0].hit == hits[0]


def test_three_modes_give_one_type(capitals: ScriptedGenerator) -> None:
    hits = found("p0", "p1", "p2")
    answers = {mode: ask(capitals, hits, retrieve=mode) for mode in ("adaptive", "always", "never")}
    answers["no_hits"] = ask(capitals, [], retrieve="always")
    answers["one"] = ask(capitals, hits[:1])
    assert {name: answer.text for name, answer in answers.items()} == {
        "adaptive": "Paris", "always": "Paris", "never": "Rome", "no_hits": "Rome", "one": "Paris"
    }  # fmt: skip
    shapes = set()
    for answer in answers.values():
        assert answer.trace is not None
        decision = answer.trace["decisions"][0]
        shapes.add((tuple(answer.trace), tuple(decision), tuple(answer.trace["candidates"][0])))
        assert decision["r"] == pytest.approx(0.947368, abs=1e-6)  # recorded whatever was decided
        assert json.loads(json.dumps(answer.trace, allow_nan=False)) == answer.trace
        assert answer.closed_book == (not answer.trace["retrieved"])
    lines = {mode: told(answer.trace or {})[0] for mode, answer in answers.items()}
    assert lines["adaptive"].startswith("retrieve: r 0.9474 against δ 0.2; ")
    assert lines["never"].startswith("do not retrieve: r 0.9474 against δ 0.2, as decode.retrieve says whatever r is; ")
    assert len(shapes) == 1
    assert answers["no_hits"].trace is not None
    assert answers["no_hits"].trace["decisions"][0]["fallback"] == "no_hits"
    assert answers["never"].trace is not None
    assert answers["never"].trace["decisions"][0]["fallback"] == ""


def test_what_it_costs_is_counted(capitals: ScriptedGenerator) -> None:
    before = capitals.cost.copy()
    answer = ask(capitals, found("p0", "p1", "p2"))
    spent, told = capitals.cost - before, answer.trace["cost"] if answer.trace else {}
    assert (told["calls"], told["computed"], told["generated"]) == (spent.calls, spent.positions, spent.generated)
    assert told["calls"] == 1 + 1 + 5
    assert told["reused"] == spent.reused
    assert told["passages"] == 3


def test_pruning_by_relevance(capitals: ScriptedGenerator) -> None:
    hits = found("p0", "p1", "p2")
    written = lambda **prune: list(finals(ask(capitals, hits, prune=prune)))  # noqa: E731
    assert written(kind="none") == ["p0", "p1", "p2"]
    assert written(kind="top_m", m=2) == ["p0", "p1"]
    assert written(kind="tau", tau=0.5) == ["p0", "p1"]
    assert written(kind="tau", tau=0.99) == ["p0"]  # never none


@pytest.mark.parametrize(("way", "text", "flags"), [("best", "x", []), ("no_retrieval", "Rome", ["all_irrelevant"]),
                                                   ("abstain", "I don't know", ["all_irrelevant", "abstained"])])  # fmt: skip
def test_all_passages_irrelevant(way: str, text: str, flags: list[str]) -> None:
    lines = {(f"p{n}",): said("x", rel=(0.2, 0.8), use=USE) for n in range(2)}
    generator = ScriptedGenerator({**CAPITALS, **lines})
    answer = ask(generator, found("p0", "p1"), all_irrelevant=way)
    assert answer.text == text
    assert answer.trace is not None
    assert answer.trace["flags"] == flags
    assert answer.trace["retrieved"]
    kept = ask(generator, found("p0", "p1"), all_irrelevant=way, retrieve="never")
    assert kept.text == "Rome"


SETS = 1000  # by the arithmetic alone 1,200 more are tried in test_reflection


def test_bound_gives_what_none_gives_on_random_candidates() -> None:
    draw = random.Random(0)
    pieces = ["a", "b", "c"]

    def masses(count: int, best: int, share: float) -> list[float]:
        return [share if place == best else (1 - share) / (count - 1) for place in range(count)]

    def line(name: str) -> Sequence[tiny.Step]:
        good = draw.random() < 0.4
        share = draw.uniform(0.6, 1.0)
        judged = masses(3, draw.randrange(3) if draw.random() < 0.3 else 0, share) if good else None
        useful = masses(5, 4 if good else draw.randrange(5), share)
        return said(name, rel=masses(2, int(not good), share), sup=judged, use=useful)

    scripts = {f"q{n:04d}": {(): decides(0.1, 0.9), **{(name,): line(name) for name in pieces}} for n in range(SETS)}
    generator = ScriptedGenerator(scripts)
    asked = Asked(list(scripts), [found(*pieces)] * SETS)
    runs = []
    for prune in ({"kind": "none"}, {"kind": "bound", "wave": 1}):
        before = generator.cost.copy()
        answers = self_rag(generator, asked, settings(prune=prune))
        runs.append(
            ([(answer.text, answer.logprob, answer.candidates[0].score) for answer in answers], generator.cost - before)
        )
    (every, full), (chosen, less) = runs
    assert chosen == every
    assert less.generated < 0.8 * full.generated
    assert less.logprobs < full.logprobs


def test_a_quoted_token_is_text_and_a_generated_one_is_not() -> None:
    literal = [f"{letter}" for letter in "[Relevant]"]
    script = {
        (): decides(0.1, 0.9),
        ("p0",): said("say", *literal, rel=(0.9, 0.1), sup=(0.8, 0.1, 0.1), use=USE),
        ("p1",): said("a", "[Continue to Use Evidence]", " b", "[No Retrieval]", " c", rel=(0.6, 0.4), use=USE),
    }  # fmt: skip
    generator = ScriptedGenerator(script)
    answer = ask(generator, found("p0"))
    assert answer.text == "say[Relevant]"
    assert answer.trace is not None
    assert answer.trace["candidates"][0]["flags"] == []
    assert ask(generator, found("p1")).text == "a b c"


def test_a_segment_ends_where_new_evidence_would_begin(caplog: pytest.LogCaptureFixture) -> None:
    more = said("a", "[Retrieval]", "b", rel=(0.9, 0.1), use=USE)
    invented = said("a", "<paragraph>", "b", rel=(0.9, 0.1), use=USE)
    generator = ScriptedGenerator({(): decides(0.1, 0.9), ("p0",): more, ("p1",): invented})
    for title, flags in (("p0", ["sup:absent", "use:absent"]), ("p1", ["sup:absent", "use:absent", "off_grammar"])):
        answer = ask(generator, found(title))
        assert answer.text == "a"
        assert answer.finished
        assert answer.trace is not None
        assert answer.trace["candidates"][0]["flags"] == flags
        assert answer.trace["candidates"][0]["finish"] == "stop"
    assert ask(generator, found("p0"), released=["stop"]).text.replace(" ", "") == "ab"
    assert "stop repeats a fault" in caplog.text


def test_limits_and_empty_answers_are_flagged() -> None:
    generator = ScriptedGenerator(
        {(): decides(0.1, 0.9), ("p0",): said("a", "b", "c", rel=(0.9, 0.1)), ("p1",): said(rel=(0.9, 0.1))}
    )
    cut = ask(generator, found("p0"), max_new_tokens=3)
    assert cut.text == "ab"
    assert not cut.finished
    assert cut.trace is not None
    assert "length" in cut.trace["candidates"][0]["flags"]
    empty = ask(generator, found("p1"), seq_tokens="text")
    assert empty.text == ""
    assert empty.trace is not None
    assert empty.trace["candidates"][0]["seq"] == 0.0
    assert {"empty", "no_text"} <= set(empty.trace["candidates"][0]["flags"])


def test_is_rel_may_be_forced_and_the_score_stays() -> None:
    generator = ScriptedGenerator({
        (): decides(0.1, 0.9),
        ("p0",): (tiny.Step("x", -0.1, {"[Relevant]": 0.06, "[Irrelevant]": 0.02}), *said(use=USE)),
        ("[No Retrieval]",): said("y", use=USE),
    })  # fmt: skip
    free, forced = (ask(generator, found("p0"), force_isrel=force).trace for force in (False, True))
    assert free is not None
    assert forced is not None
    assert "off_grammar" in free["candidates"][0]["flags"]
    assert "off_grammar" not in forced["candidates"][0]["flags"]
    assert free["candidates"][0]["rel"] == forced["candidates"][0]["rel"] == pytest.approx(0.75)
    assert ask(generator, found("p0"), force_isrel=True, retrieve="never").text == "y"


def test_passages_that_do_not_fit_are_left_out_and_told() -> None:
    generator = ScriptedGenerator(CAPITALS)
    hits = found("p0", "p1")
    long = Hit(Passage("p1", "x" * 200, "p1"), 1, 0.5, 2)
    prompt = generator.marked_prompt
    generator.positions = len(prompt.question("why")) + len(prompt.passage(hits[0].passage)) + 20  # type: ignore[attr-defined]
    answer = ask(generator, [hits[0], long])
    assert answer.trace is not None
    assert answer.trace["flags"] == ["too_long:1"]
    assert [row["pruned"] for row in answer.trace["candidates"]] == ["", "too_long"]
    assert [hit.passage.id for hit in answer.hits] == ["p0"]
    with pytest.raises(GeneratorError, match="none of its 1 passages fits"):
        ask(generator, [long])


@pytest.mark.parametrize(("count", "weight"), [(3, 1.0), (4, 2.5), (5, 0.0), (3, 4.0)])
def test_options_are_scored_and_not_written(count: int, weight: float) -> None:
    """Mixed by softmax_K(w_rel·rel), whatever the other weights are."""
    options = ["A", "B", "C", "D", "E"][:count]
    draw = np.random.default_rng(count)
    logs = {name: np.log(draw.dirichlet(np.ones(count))) for name in ("p0", "p1")}
    scored = {(name, option): (-0.1, float(log)) for name in logs for option, log in zip(options, logs[name], strict=True)}
    rel = {"p0": (0.9, 0.1), "p1": (0.3, 0.7)}
    script = {(): decides(0.1, 0.9)} | {(name,): said("x", rel=rel[name]) for name in rel}
    generator = ScriptedGenerator(script, scored=scored)
    before = generator.cost.copy()
    own_weights = {"seq": 3.0, "rel": weight, "sup": 2.0, "use": 4.0}
    answer = ask(generator, found("p0", "p1"), options=options, weights=own_weights)
    weights = np.exp([0.9 * weight, 0.3 * weight]) / np.exp([0.9 * weight, 0.3 * weight]).sum()
    expected = sum(weight * np.exp(logs[name]) for weight, name in zip(weights, logs, strict=True))
    assert answer.trace is not None
    assert answer.candidates[0].score is not None
    assert dict(answer.trace["standings"]) == pytest.approx(dict(zip(options, expected, strict=True)), abs=1e-6)
    assert answer.text == options[int(np.argmax(expected))]
    assert (generator.cost - before).generated == 0
    assert (generator.cost - before).calls == 3
    own = self_rag(generator, Asked(["why"], [found("p0", "p1")], choices=[options]), settings(weights=own_weights))[0]
    assert own.text == answer.text


def test_samples_are_drawn_and_the_best_is_taken() -> None:
    lines = [said("bad", rel=(0.9, 0.1), use=(0.6, 0.1, 0.1, 0.1, 0.1)), said("good", rel=(0.9, 0.1), use=USE)]
    generator = ScriptedGenerator({(): decides(0.1, 0.9), ("p0",): lines})
    answer = ask(generator, found("p0"), samples=2, temperature=0.7)
    assert answer.text == "good"
    assert answer.trace is not None
    assert {row["text"] for row in answer.trace["candidates"]} == {"bad", "good"}
    assert [row["chosen"] for row in answer.trace["candidates"]].count(True) == 1


def test_questions_share_batches_and_do_not_change_each_other() -> None:
    scripts = {
        "one": CAPITALS,
        "two": {**LETTERS, (): decides(0.9, 0.05), ("[No Retrieval]",): said("N", use=USE)},
        "three": LETTERS,
    }
    generator = ScriptedGenerator(scripts)
    asked = Asked(list(scripts), [found("p0", "p1"), found("p0"), found("p0", "p1", "p2", "p3")])
    before = generator.cost.copy()
    together = self_rag(generator, asked, settings())
    calls = (generator.cost - before).calls
    alone = [self_rag(generator, asked.only([place]), settings())[0] for place in range(3)]
    assert calls == 1 + 1 + 5  # as many as the longest question alone
    assert [(a.text, a.logprob, finals(a)) for a in together] == [(a.text, a.logprob, finals(a)) for a in alone]
    assert [a.text for a in together] == ["Paris", "N", "A"]


def test_what_ten_passages_cost_exactly() -> None:
    """A question of 96 ids, ten passages of 128 and answers of 24: forward passes, positions and log-probabilities kept."""
    titles = [f"p{n}" for n in range(10)]
    words = said(*"abcdefghijklmnopqrst", rel=(0.9, 0.05), sup=(0.7, 0.2, 0.05), use=USE)
    generator = ScriptedGenerator({"why": {(): decides(0.05, 0.9), **{(title,): words for title in titles}}})
    prompt = generator.marked_prompt
    question = "why" + "?" * (96 - len(prompt.question("why")))
    passages = [Passage(title, "z" * (128 - len(prompt.passage(Passage(title, "", title)))), title) for title in titles]
    assert {len(prompt.passage(passage)) for passage in passages} == {128}
    assert len(prompt.question(question)) == 96
    answer = ask(generator, [Hit(passage, n, 0.0, n + 1) for n, passage in enumerate(passages)], question)
    assert answer.trace is not None
    told, spent = answer.trace["cost"], generator.cost
    assert spent.calls == told["calls"] == 25
    assert spent.positions == told["computed"] == 96 + 10 * 128 + 10 * 23
    assert spent.logprobs == 14 * 241
    assert spent.generated == told["generated"] == 240


def test_bound_leaves_most_of_ten_passages_unwritten() -> None:
    rels = [(0.95, 0.05), (0.92, 0.08), *[(0.02 * n + 0.1, 0.9 - 0.02 * n) for n in range(8)]]
    lines = {
        (f"p{n}",): said((f"w{n}", -0.01), rel=rel, sup=(0.97, 0.02, 0.01) if n < 2 else None, use=(0.0, 0.0, 0.0, 0.02, 0.98))
        for n, rel in enumerate(rels)
    }  # fmt: skip
    generator = ScriptedGenerator({(): decides(0.1, 0.9), **lines})
    hits = found(*(f"p{n}" for n in range(10)))
    bound, every = (ask(generator, hits, prune={"kind": kind}) for kind in ("bound", "none"))
    assert max(finals(every).values()) >= 3
    assert len(finals(bound)) <= 4
    assert (bound.text, bound.logprob) == (every.text, every.logprob)


def test_a_cut_off_continue_is_flagged_where_the_rule_reads_it() -> None:
    row = np.log([0.5, 0.3, NAN, *[0.1] * 10])
    flags = {rule: decide(row, settings(rule=rule), missing="floor", threshold=0.2).flags for rule in ("two_way", "three_way")}
    assert flags == {"two_way": (), "three_way": ("retrieve:partial",)}


def test_a_steep_calibration_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = calibrated([0.0, 1e-300, 0.5, 1.0], CalibrationSettings(kind="temperature", temperature=0.05))
    assert found.tolist() == [0.0, 0.0, 0.5, 1.0]


def test_a_passage_behind_which_no_option_fits_is_left_out() -> None:
    scored = {(name, option): (-0.1, -0.1, -0.1) for name in ("p0", "p1") for option in ("ab", "cd")}
    script = {(): decides(0.1, 0.9), ("p0",): said("x", rel=(0.9, 0.1)), ("p1",): said("x", rel=(0.8, 0.2))}
    generator = ScriptedGenerator(script, scored=scored)
    prompt, hits = generator.marked_prompt, found("p0", "p1")
    assert len(prompt.foreign("ab")) == 2
    longer = Hit(Passage("p1", "about p1 too", "p1"), 1, 0.5, 2)
    behind = len(prompt.question("why")) + len(prompt.passage(longer.passage))
    for left, flags in ((3, []), (2, ["too_long:1"])):  # IsRel and two tokens
        generator.positions = behind + left  # type: ignore[attr-defined]
        answer = ask(generator, [hits[0], longer], options=["ab", "cd"])
        assert answer.trace is not None
        assert answer.trace["flags"] == flags


def test_the_questions_of_a_rate_are_read_in_batches() -> None:
    scripts = {f"q{n}": {(): decides(1 - r, r)} for n, r in enumerate((0.9, 0.1, 0.5, 0.3))}
    generator = ScriptedGenerator(scripts)
    asked = Asked(list(scripts), [[]] * 4)
    chosen = settings(target_rate=0.5)
    prompts = prompts_of(generator, asked, chosen)
    for size, calls in ((10_000, 1), (1, 4)):
        generator.batch_tokens = size  # type: ignore[attr-defined]
        before = generator.cost.copy()
        assert threshold_of(generator, prompts, chosen) == pytest.approx(0.3)
        assert (generator.cost - before).calls == calls
    for form in ("short", "long"):
        assert self_rag(generator, Asked([], []), settings(form=form, target_rate=0.5)) == []
