"""Self-RAG, long form: worked figures, an exhaustive twin, exact counts, and each thing that others get wrong."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import tiny
from raglan.decode import Asked, self_rag, tree_lines
from raglan.decode.self_rag.long import cited_text, long
from raglan.errors import CorpusError, GeneratorError, RecipeError
from raglan.exports import export_alce
from raglan.recipe import SelfRagDecode
from raglan.records import Answer, Hit, Passage
from raglan.reflection import NAMES
from tiny import ScriptedGenerator, decides, said

found = partial(tiny.hits, text="{} text")
NO, CONT = "[No Retrieval]", "[Continue to Use Evidence]"
USE = (0.1, 0.1, 0.1, 0.1, 0.6)  # use = .5
ON = (0.05, 0.9, 0.05)  # a boundary that retrieves


def settings(**changes: Any) -> SelfRagDecode:
    given = {"retrieve": "always", "passages": "static", "weights": {"seq": 0.0}, "keep_passages": 1, **changes}
    return SelfRagDecode(kind="self_rag", form="long", **given)


def ask(
    generator: Any, hits: Sequence[Hit], decode: SelfRagDecode, *, queries: Sequence[str] = ("who?",),
    retrieve: Callable[[str, int], list[Hit]] | None = None,
) -> list[Answer]:  # fmt: skip
    return long(generator, Asked(list(queries), [list(hits)] * len(queries), k=3), decode, retrieve=retrieve)


def nodes(answer: Answer) -> dict[tuple[str, ...], dict[str, Any]]:
    """Candidates by their path of passages or decisions."""
    assert answer.trace is not None
    names: dict[int, tuple[str, ...]] = {0: ()}
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for level in answer.trace["levels"]:
        for one in level["candidates"]:
            name = one["title"] if one["decision"] == "yes" else {"no": NO, "continue": CONT}[one["decision"]]
            names[one["node"]] = (*names[one["parent"]], name)
            found[names[one["node"]]] = one
    return found


def example() -> ScriptedGenerator:
    """The worked tree: p0 ends at level 1, p1 and p2 go on to q0, q1, q2."""
    below = {"p0": ((0.6, 0.4), (0.3, 0.3, 0.4)), "p1": ((0.7, 0.3), (0.4, 0.3, 0.3)), "p2": ((0.5, 0.5), (0.1, 0.1, 0.8))}
    script: dict[tuple[str, ...], Any] = {
        (): decides(0.05, 0.9),
        ("p0",): said("zero", rel=(0.95, 0.05), sup=(0.9, 0.05, 0.05), use=USE),
        ("p1",): said("one", rel=(0.9, 0.1), sup=(0.6, 0.3, 0.1), then=ON),
        ("p2",): said("two", rel=(0.8, 0.2), sup=(0.2, 0.6, 0.2), then=ON),
    }
    for parent, (title, (rel, sup)) in itertools.product(("p1", "p2"), below.items()):
        script[parent, title] = said(f"{parent}{title}", rel=rel, sup=sup, use=USE)
    return ScriptedGenerator(script)


WORKED = {
    "product": {("p1", "p0"): 2.145, ("p1", "p1"): 2.475, ("p1", "p2"): 1.485, ("p2", "p0"): 1.69, ("p2", "p1"): 1.95,
                ("p2", "p2"): 1.17},
    "sum": {("p1", "p0"): 2.95, ("p1", "p1"): 3.15, ("p1", "p2"): 2.55, ("p2", "p0"): 2.6, ("p2", "p1"): 2.8,
            ("p2", "p2"): 2.2},
    "mean": {("p1", "p0"): 1.475, ("p1", "p1"): 1.575, ("p1", "p2"): 1.275, ("p2", "p0"): 1.3, ("p2", "p1"): 1.4,
             ("p2", "p2"): 1.1},
}  # fmt: skip


@pytest.mark.parametrize("combine", list(WORKED))
def test_the_worked_tree(combine: str) -> None:
    generator = example()
    answer = ask(generator, found("p0", "p1", "p2"), settings(combine=combine, max_segments=2, stop="never", n_best=9))[0]
    told = nodes(answer)
    first = {("p0",): 2.125, ("p1",): 1.65, ("p2",): 1.3}
    assert {path: told[path]["final"] for path in first} == pytest.approx(first, abs=1e-6)
    assert {path: told[path]["final"] for path in WORKED[combine]} == pytest.approx(WORKED[combine], abs=1e-6)
    steps = {"p0": 1.3, "p1": 1.5, "p2": 0.9}
    assert {path[1]: told[path]["step"] for path in WORKED[combine]} == pytest.approx(steps, abs=1e-6)
    assert answer.text == ("zero" if combine == "mean" else "one p1p1")
    assert answer.finished
    assert "zero" in [answer.text, *(other.text for other in answer.alternatives)]
    under_p1 = [generator.spelt(ids) for ids in generator.prompts if "one" in generator.spelt(ids)]
    assert under_p1
    assert not any("zero" in text or "two" in text for text in under_p1)


def test_the_worked_tree_by_component() -> None:
    answer = ask(example(), found("p0", "p1", "p2"), settings(combine="by_component", max_segments=2, stop="never"))[0]
    assert answer.text == "zero"
    assert nodes(answer)["p1", "p1"]["final"] == pytest.approx(1.7, abs=1e-6)  # .8 + .65 + .25


def test_the_worked_tree_as_released() -> None:
    """p0 takes a slot and is lost; scores are products without seq and use; p1's prompts carry p0's text."""

    def carried(tail: str) -> tuple[str, ...]:
        """p1's text behind p0's, and the passage below it."""
        shown = [title for title in ("p0", "p1", "p2") if f"<paragraph>{title}" in tail]
        assert "one" in tail
        return ("p1", *shown)

    generator = ScriptedGenerator(example().scripts[""], otherwise=carried)
    decode = settings(
        combine="product", max_segments=2, keep_passages=0, released=["use", "path", "siblings"], n_best=9, weights={"seq": 1.0}
    )  # fmt: skip
    answer = ask(generator, found("p0", "p1", "p2"), decode)[0]
    told = nodes(answer)
    figures = {("p0",): 1.875, ("p1",): 1.65, ("p2",): 1.3} | {("p1", "p0"): 1.7325, ("p1", "p1"): 2.0625, ("p1", "p2"): 1.0725}
    assert {path: told[path]["final"] for path in figures} == pytest.approx(figures, abs=1e-6)
    assert set(told) == set(figures)
    assert answer.text == "one p1p1"
    assert "zero" not in [answer.text, *(other.text for other in answer.alternatives)]
    assert all("zero" in generator.spelt(ids) for ids in generator.prompts if "one" in generator.spelt(ids))


UNEVEN = {"seq": 0.5, "rel": 1.5, "sup": 0.75, "use": 2.0}


def by_hand(rows: Sequence[dict[str, Any]], combine: str, weights: dict[str, float]) -> float:
    """A path's score from the components of its segments, on plain numbers."""
    steps = [sum(weight * row[name] for name, weight in weights.items()) for row in rows]
    read = [row for row in rows if row["decision"] == "yes"]
    if combine == "product":
        return math.prod(max(step, 0.0) for step, row in zip(steps, rows, strict=True) if row["decision"] == "yes")
    if combine == "by_component":
        mean = {name: sum(row[name] for row in own) / len(own) for name, own in (("seq", rows), ("rel", read), ("sup", read))}
        return sum(weights[name] * value for name, value in mean.items()) + weights["use"] * rows[-1]["use"]
    return sum(steps) if combine == "sum" else sum(steps) / len(steps)


@pytest.mark.parametrize(
    ("combine", "figure"), [("mean", 2.1875), ("sum", 4.375), ("product", 4.70953125), ("by_component", 2.6875)]
)
def test_every_weight_moves_every_path(combine: str, figure: float) -> None:
    """p1 q1 under rel 1.5, sup .75, use 2: steps 1.9125 and 2.4625; by component 1.5·.8 + .75·.65 + 2·.5."""
    hits = found("p0", "p1", "p2")
    grown = lambda script, **given: nodes(ask(  # noqa: E731
        ScriptedGenerator(script), hits, settings(combine=combine, stop="never", n_best=9, beam=9, **given)
    )[0])  # fmt: skip
    told = grown(example().scripts[""], weights={**UNEVEN, "seq": 0.0}, max_segments=2)
    assert told["p1", "p1"]["final"] == pytest.approx(figure, abs=1e-6)
    plain = {
        (): decides(0.05, 0.9), ("p0",): said("one", rel=(0.9, 0.1), sup=(0.5, 0.3, 0.2), use=USE, then=(0.2, 0.1, 0.7)),
        ("p1",): said("two", rel=(0.7, 0.3), sup=(0.6, 0.3, 0.1), then=(0.8, 0.1, 0.1)),
        ("p2",): said("three", rel=(0.4, 0.6), use=(0.2, 0.2, 0.2, 0.1, 0.3)), ("p0", CONT): said("on", use=USE),
        ("p1", NO): said("free", use=(0.1, 0.0, 0.3, 0.5, 0.1)),
    }  # fmt: skip
    for script, mode in ((example().scripts[""], "always"), (plain, "adaptive")):
        seen = set()
        for moved in ("", *UNEVEN):
            own = {name: weight + 0.25 * (name == moved) for name, weight in UNEVEN.items()}
            told = grown(script, weights=own, max_segments=2, retrieve=mode)
            for path, one in told.items():
                rows = [told[path[: length + 1]] for length in range(len(path))]
                assert one["final"] == pytest.approx(by_hand(rows, combine, own), abs=1e-9), (path, moved)
            seen.add(round(told[path]["final"], 9))
        assert len(seen) == 5 - (combine == "product" and mode == "adaptive")
        assert max(map(len, told)) == 2


def test_two_bad_steps_make_no_good_path() -> None:
    """−.425 · −.425 = .18 is more than .3 · .3, and a path of two bad segments is worth nothing."""
    bad = {"rel": (0.05, 0.95), "sup": (0.0, 0.0, 1.0), "use": (0.9, 0.1, 0.0, 0.0, 0.0)}
    poor = {"rel": (0.3, 0.7), "sup": (0.0, 0.0, 1.0)}
    script = {
        (): decides(0.05, 0.9), ("a",): said("worse", **bad, then=ON), ("b",): said("poor", **poor, then=ON),
        **{(one, other): said(one + other, **figures) for one in "ab" for other, figures in (("a", bad), ("b", poor))},
    }  # fmt: skip
    answers = {
        released: ask(
            ScriptedGenerator(script), found("a", "b"),
            settings(combine="product", max_segments=2, n_best=4, released=[released] if released else []),
        )[0] for released in ("", "path")
    }  # fmt: skip
    ours = {path: one["final"] for path, one in nodes(answers[""]).items() if len(path) == 2}
    assert ours == pytest.approx({("a", "a"): 0, ("a", "b"): 0, ("b", "a"): 0, ("b", "b"): 0.09}, abs=1e-6)
    assert answers[""].text == "poor bb"
    assert nodes(answers[""])["a",]["step"] == pytest.approx(-0.425, abs=1e-6)
    assert nodes(answers["path"])["a", "a"]["final"] == pytest.approx(0.180625, abs=1e-6)
    assert answers["path"].text == "worse aa"


# --- the exhaustive twin


def toy(
    seed: int, titles: Sequence[str], depth: int, *, apart: bool = False
) -> tuple[dict[tuple[str, ...], Any], dict[tuple[str, ...], Any]]:  # fmt: skip
    """A script of random figures, and the figures of each path: (rel, sup, use, whether it ends).

    `apart`: what begins with the first title is good and ends at the second level; all else is bad and goes on.
    """
    draw = random.Random(seed)
    script: dict[tuple[str, ...], Any] = {(): decides(0.1, 0.8)}
    figures: dict[tuple[str, ...], Any] = {}

    def grow(path: tuple[str, ...]) -> None:
        for title in titles:
            here = (*path, title)
            rel, sup, use = draw.random(), [draw.random() for _ in range(3)], [draw.random() ** 3 for _ in range(5)]
            ends = len(here) == depth or draw.random() < 0.35
            if apart:
                good, ends = here[0] == titles[0], len(here) == (2 if here[0] == titles[0] else depth)
                rel, best = 0.1 * rel + 0.9 * good, 0 if good else 2
                sup[best], use[4 if good else 1] = sup[best] + 9, use[4 if good else 1] + 9
            sup, use = [p / sum(sup) for p in sup], [p / sum(use) for p in use]
            word = "w" + "".join(here)
            script[here] = said(word, rel=(rel, 1 - rel), sup=sup, use=use, then="</s>" if ends else ON)
            graded = sum(v * p for v, p in zip((-1, -0.5, 0, 0.5, 1), use, strict=True))
            figures[here] = (rel, sup[0] + 0.5 * sup[1], graded, ends)
            if not ends:
                grow(here)

    grow(())
    return script, figures


def enumerated(
    figures: dict[tuple[str, ...], Any], combine: str, weights: dict[str, float]
) -> list[tuple[float, float, tuple[str, ...]]]:  # fmt: skip
    """Every whole path with its score and its steps' mean, the best first, by loops over everything."""
    scored = []
    for path, (*_, ends) in figures.items():
        if not ends:
            continue
        rows = [figures[path[: length + 1]] for length in range(len(path))]
        steps = [weights["rel"] * rel + weights["sup"] * sup + weights["use"] * use for rel, sup, use, _ in rows]
        if combine == "sum":
            score = sum(steps)
        elif combine == "product":
            score = math.prod(max(step, 0.0) for step in steps)
        elif combine == "mean":
            score = sum(steps) / len(steps)
        else:
            both = weights["rel"] * sum(row[0] for row in rows) + weights["sup"] * sum(row[1] for row in rows)
            score = both / len(rows) + weights["use"] * rows[-1][2]
        scored.append((score, sum(steps) / len(steps) if combine == "product" else 0.0, path))
    return sorted(scored, reverse=True)


@pytest.mark.parametrize("stop", ["bound", "never"])
@pytest.mark.parametrize("combine", ["mean", "sum", "product", "by_component"])
def test_a_wide_beam_is_exhaustive_search(combine: str, stop: str) -> None:
    """With the paper's weights and with some under which steps are negative; where paths lie apart the bound stops it."""
    stopped = 0
    for seed in range(8):
        script, figures = toy(seed, ("a", "b", "c"), 3, apart=seed > 5)
        weights = {"seq": 0.0, **({"rel": 1.5, "sup": 0.75, "use": 3.0} if seed % 2 else {"rel": 1.0, "sup": 1.0, "use": 0.5})}
        decode = settings(
            combine=combine, stop=stop, beam=99, max_segments=3, n_best=3, keep_passages="all", weights=weights
        )  # fmt: skip
        answer = ask(ScriptedGenerator(script), found("a", "b", "c"), decode)[0]
        wanted = enumerated(figures, combine, weights)[:3]
        texts = [answer.text, *(other.text for other in answer.alternatives)]
        words = [" ".join("w" + "".join(path[: length + 1]) for length in range(len(path))) for *_, path in wanted]
        assert texts == words, seed
        assert answer.trace is not None
        assert answer.trace["score"] == pytest.approx(wanted[0][0], abs=1e-6)
        assert (answer.trace["stopped"] == "bound") <= (len(answer.trace["levels"]) < 3)
        stopped += answer.trace["stopped"] == "bound"
    assert stopped >= 2 if stop == "bound" else stopped == 0


def test_the_bound_stops_the_search_and_saves_what_cannot_win() -> None:
    script = {
        (): decides(0.1, 0.8), ("a",): said("good", rel=(1, 0), sup=(1, 0, 0), use=(0, 0, 0, 0, 1)),
        ("b",): said("bad", rel=(0.01, 0.99), sup=(0, 0, 1), then=ON), ("b", "a"): said("x", rel=(1, 0)),
        ("b", "b"): said("y", rel=(1, 0)),
    }  # fmt: skip
    costs = {}
    for stop in ("bound", "never"):
        generator = ScriptedGenerator(script)
        answer = ask(generator, found("a", "b"), settings(stop=stop, max_segments=4))[0]
        assert answer.text == "good"
        assert answer.trace is not None
        costs[stop] = generator.cost.generated
    assert costs["bound"] < costs["never"]


@pytest.mark.parametrize("combine", ["mean", "sum", "product", "by_component"])
def test_the_bound_waits_for_what_may_still_overtake(combine: str) -> None:
    """A path that is behind, 1 against 1.25, and whose next segment is worth 2.5."""
    half = {"rel": (0.5, 0.5), "sup": (0.5, 0, 0.5)}
    script = {
        (): decides(0.1, 0.8), ("a",): said("soon", **half, use=USE), ("b",): said("late", **half, then=ON),
        ("b", "a"): said("wins", rel=(1, 0), sup=(1, 0, 0), use=(0, 0, 0, 0, 1)), ("b", "b"): said("loses", rel=(0.1, 0.9)),
    }  # fmt: skip
    answer = ask(ScriptedGenerator(script), found("a", "b"), settings(combine=combine, max_segments=2))[0]
    told = nodes(answer)
    assert (told["a",]["final"], told["b",]["final"]) == pytest.approx((1.25, 1.0), abs=1e-6)
    assert answer.text == "late wins"
    assert answer.trace is not None
    assert answer.trace["stopped"] == ""


# --- cost, exactly


def long_script(titles: Sequence[str], depth: int) -> dict[tuple[str, ...], Any]:
    """Segments of 24 tokens; a and b go on, and their scores make a, b live at every level."""
    script: dict[tuple[str, ...], Any] = {(): decides(0.05, 0.9)}
    for length in range(1, depth + 1):
        for path in itertools.product(titles, repeat=length):
            if any(title not in ("a", "b") for title in path[:-1]):
                continue
            words = ["v" + "".join(path), *["w"] * 20]
            good = {"a": 0.9, "b": 0.8}.get(path[-1], 0.3)
            then: Any = "</s>" if length == depth else ON
            script[path] = said(*words, rel=(good, 1 - good), sup=(good, 1 - good, 0), then=then)
    return script


@pytest.mark.parametrize(("prune", "positions", "logprobs"), [("none", 3967, 8414), ("top_m", 3622, None)])
def test_the_cost_of_a_tree_is_what_it_has_to_be(prune: str, positions: int, logprobs: int | None) -> None:
    """K 5, beam 2, 3 levels; prompt 96, passage 128, segment 24: 1 + 3·24 + 2 calls, 96 + 25·128 + 25·23 + 2·48 positions."""
    titles = "abcde"
    generator = ScriptedGenerator(long_script(titles, 3))
    prompt = generator.marked_prompt
    query = "q" * (96 - len(prompt.question("q")) + 1)
    assert len(prompt.question(query)) == 96
    hits = []
    for row, title in enumerate(titles):
        text = "x" * (128 - len(prompt.passage(Passage(title, "x", title))) + 1)
        hits.append(Hit(Passage(title, text, title), row, 1.0, row + 1))
    assert all(len(prompt.passage(hit.passage)) == 128 for hit in hits)
    rule = {"kind": prune, **({"m": 2} if prune == "top_m" else {})}
    decode = settings(keep_passages=0, beam=2, max_segments=3, max_new_tokens=300, stop="never", prune=rule)
    answer = ask(generator, hits, decode, queries=[query])[0]
    assert generator.cost.calls == 1 + 3 * 24 + 2
    assert generator.cost.positions == positions
    assert logprobs is None or generator.cost.logprobs == logprobs
    assert answer.trace is not None
    cost = answer.trace["cost"]
    assert (cost["calls"], cost["computed"]) == (generator.cost.calls, positions)
    assert cost["generated"] == (25 if prune == "none" else 10) * 24
    assert cost["passages"] == 25


# --- contexts


def prompts_of(generator: ScriptedGenerator) -> list[str]:
    return [generator.spelt(ids).partition("Response:\n")[2].replace("\n", " ") for ids in generator.prompts]


def three_levels() -> dict[tuple[str, ...], Any]:
    return {
        (): decides(0.05, 0.9), ("a",): said("one", rel=(0.9, 0.1), sup=(0.9, 0.1, 0), then=ON),
        ("a", "b"): said("two", rel=(0.9, 0.1), sup=(0.9, 0.1, 0), then=ON),
        ("a", "b", "c"): said("three", rel=(0.9, 0.1), sup=(0.9, 0.1, 0)),
    }  # fmt: skip


@pytest.mark.parametrize(("keep", "seen"), [(0, ["c"]), (1, ["b", "c"]), (2, ["a", "b", "c"]), ("all", ["a", "b", "c"])])
def test_a_childs_context_holds_every_ancestor_once_and_the_passages_that_stay(keep: Any, seen: list[str]) -> None:
    generator = ScriptedGenerator(three_levels())
    order = iter("abc")
    ask(generator, [], settings(keep_passages=keep, passages="dynamic", beam=1), retrieve=lambda _, k: found(next(order)))
    last = prompts_of(generator)[-1]
    assert last.endswith("</paragraph>")
    assert [title for title in "abc" if f"<paragraph>{title} {title} text</paragraph>" in last] == seen
    for word in ("one", "two"):
        assert last.count(word) == 1
    assert last.count("[Relevant]") == 2
    assert last.count("[Fully supported]") == 2
    assert last.count("[Retrieval]") == 3  # a passage that has left leaves its decision


def test_siblings_see_the_same_but_for_their_passage() -> None:
    generator = example()
    ask(generator, found("p0", "p1", "p2"), settings(max_segments=2, stop="never"))
    below = [text for text in prompts_of(generator) if "one" in text and text.endswith("</paragraph>")]
    assert len(below) == 3
    assert len({text[: text.rindex("<paragraph>")] for text in below}) == 1


def test_permuted_passages_permute_and_change_nothing() -> None:
    figures = []
    for order in (("p0", "p1", "p2"), ("p2", "p0", "p1")):
        answer = ask(example(), found(*order), settings(max_segments=2, stop="never", n_best=9))[0]
        told = nodes(answer)
        figures.append({path: [one[name] for name in ("rel", "sup", "use", "final", "text")] for path, one in told.items()})
        assert [path[0] for path in told if len(path) == 1] == list(order)
    assert figures[0] == figures[1]


def test_released_siblings_is_another_prompt() -> None:
    heard = []
    for released in ([], ["siblings"]):
        generator = ScriptedGenerator(
            example().scripts[""],
            otherwise=lambda tail: (
                "p1" if "one" in tail else "p2",
                *[name for name in ("p0", "p1", "p2") if f"<paragraph>{name}" in tail],
            ),
        )
        ask(generator, found("p0", "p1", "p2"), settings(max_segments=2, keep_passages=0, released=released, stop="never"))
        heard.append(any("zero" in text and "one" in text for text in prompts_of(generator)))
    assert heard == [False, True]


# --- constraints, pools, budgets


def judged() -> dict[tuple[str, ...], Any]:
    return {
        (): decides(0.05, 0.9),
        ("bad",): said("wrong", rel=(0.9, 0.1), sup=(0.1, 0.2, 0.7), then=ON),
        ("half",): said("partly", rel=(0.9, 0.1), sup=(0.3, 0.6, 0.1), then=ON),
        ("off",): said("elsewhere", rel=(0.1, 0.9), then=ON),
        (NO,): said("unaided"),
        **{(title, other): said(f"{title}{other}", rel=(0.9, 0.1), sup=(0.9, 0.1, 0), use=(0.7, 0.1, 0.1, 0.1, 0))
           for title in ("bad", "half", "off") for other in ("bad", "half", "off")},
    }  # fmt: skip


def contrary(word: str, role: str, written: str, likely: str) -> tuple[tiny.Step, ...]:
    """A segment as drawing may write it: one judgement is not the likeliest of its group; the others are good, and are."""

    def judgement(own: str, good: str) -> tiny.Step:
        token, best = (written, likely) if own == role else (good, good)
        names = NAMES[own]
        return tiny.group(own, [0.7 if name == best else 0.3 / (len(names) - 1) for name in names], chosen=token)

    sup, use = judgement("is_sup", "[Fully supported]"), judgement("is_use", "[Utility:5]")
    return (judgement("is_rel", "[Relevant]"), tiny.Step(word, -0.1), sup, use, tiny.Step("</s>", -0.01))


@pytest.mark.parametrize("form", ["one level", "below"])
@pytest.mark.parametrize(
    ("require", "role", "good", "bad"),
    [
        ("relevant", "is_rel", "[Relevant]", "[Irrelevant]"),
        ("supported", "is_sup", "[Partially supported]", "[No support / Contradictory]"),
        ("fully", "is_sup", "[Fully supported]", "[Partially supported]"),
        ({"min_use": 4}, "is_use", "[Utility:4]", "[Utility:3]"),
    ],
)
def test_constraints_by_probability_read_the_likeliest_judgement_and_by_token_the_written_one(
    require: Any, role: str, good: str, bad: str, form: str
) -> None:
    lines = {"said": contrary("said", role, good, bad), "meant": contrary("meant", role, bad, good)}
    above = ("said",) if form == "below" else ()
    fine = said("so", rel=(0.9, 0.1), sup=(1, 0, 0), then=ON)  # of the two that say it, one is read on from
    script = {(): decides(0.05, 0.9)} | ({(title,): fine for title in lines} if above else {})
    script |= {(*above, title): line for title, line in lines.items()}
    for by, kept, banned in (("token", "said", "meant"), ("probability", "meant", "said")):
        decode = settings(require=[require], require_by=by, on_empty="drop", max_segments=2)
        answer = ask(ScriptedGenerator(script), found(*lines), decode)[0]
        told = {path[-1]: one["pruned"] for path, one in nodes(answer).items() if len(path) == 1 + len(above)}
        assert told == {kept: "", banned: f"require:{require if isinstance(require, str) else 'min_use'}"}
        assert answer.text == ("so " if above else "") + kept


@pytest.mark.parametrize(
    ("require", "banned"), [(["supported"], {"bad", "off"}), (["relevant"], {"off"}), (["fully"], {"bad", "half", "off"})]
)
@pytest.mark.parametrize("by", ["token", "probability"])
def test_a_banned_childs_descendants_are_never_generated(require: list[str], banned: set[str], by: str) -> None:
    generator = ScriptedGenerator(judged())
    decode = settings(require=require, require_by=by, on_empty="drop", max_segments=2, beam=9, stop="never")
    answer = ask(generator, found("bad", "half", "off"), decode)[0]
    told = nodes(answer)
    assert {path[0] for path in told if told[path]["pruned"].startswith("require")} >= banned
    assert not [path for path in told if len(path) == 2 and path[0] in banned]
    words = {"bad": "wrong", "half": "partly", "off": "elsewhere"}
    assert not any(words[title] in text for text in prompts_of(generator) for title in banned)
    assert (answer.text == "") == (require == ["fully"])


def test_where_no_child_keeps_the_constraints() -> None:
    texts = {}
    for on_empty in ("relax", "no_retrieval", "drop"):
        decode = settings(require=["fully"], on_empty=on_empty, max_segments=1)
        answer = ask(ScriptedGenerator(judged()), found("bad", "half", "off"), decode)[0]
        texts[on_empty] = answer.text
        flags = [flag for one in answer.segments for flag in one.flags]
        assert ("relaxed:fully" in flags) == (on_empty == "relax")
    assert texts == {"relax": "partly", "no_retrieval": "unaided", "drop": ""}


def test_min_use_reads_the_utility_token() -> None:
    script = {
        (): decides(0.05, 0.9), ("a",): said("dull", rel=(0.9, 0.1), sup=(1, 0, 0), use=(0, 0.8, 0.1, 0.1, 0)),
        ("b",): said("fine", rel=(0.6, 0.4), sup=(0.5, 0.5, 0), use=(0, 0, 0, 0.9, 0.1)),
    }  # fmt: skip
    texts = [
        ask(ScriptedGenerator(script), found("a", "b"), settings(require=require))[0].text for require in ([], [{"min_use": 4}])
    ]
    assert texts == ["dull", "fine"]


def test_finished_paths_take_no_slot_and_slots_all_lets_them() -> None:
    kept = {}
    for slots in ("live", "all"):
        decode = settings(beam=1, slots=slots, max_segments=2, stop="never", n_best=9)
        kept[slots] = {path[0] for path in nodes(ask(example(), found("p0", "p1", "p2"), decode)[0]) if len(path) == 2}
    assert kept == {"live": {"p1"}, "all": set()}  # p0 is finished, and holds the only slot


@pytest.mark.parametrize("changes", [{"beam": 1}, {"max_segments": 1}, {"keep_passages": 0}, {"keep_passages": "all"}])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_smallest_searches_are_ordinary(changes: dict[str, Any], count: int) -> None:
    script = {**example().scripts[""], (NO,): said("unaided")}
    answer = ask(ScriptedGenerator(script), found("p0", "p1", "p2")[:count], settings(**changes))[0]
    assert answer.text == ("zero" if count else "unaided")
    assert answer.trace is not None
    fallbacks = [told["fallback"] for told in answer.trace["decisions"]]
    assert fallbacks[0] == ("" if count else "no_hits")
    assert answer.closed_book == (count == 0)


def test_the_modes_answer_with_one_type() -> None:
    script = {**example().scripts[""], (NO,): said("alone", then=(0.9, 0.05, 0.05)), (NO, NO): said("again")}
    script[()] = decides(0.9, 0.05)
    answers = {
        mode: ask(ScriptedGenerator(script), found("p0"), settings(retrieve=mode))[0]
        for mode in ("always", "adaptive", "never")
    }
    assert {mode: answer.text for mode, answer in answers.items()} == {
        "always": "zero", "adaptive": "alone again", "never": "alone again"
    }  # fmt: skip
    for answer in answers.values():
        assert type(answer) is Answer
        assert answer.trace is not None
        assert answer.trace["decisions"][0]["r"] == pytest.approx(0.05 / 0.95, abs=1e-6)
        assert answer.trace["retrieved"] == (answer.text == "zero")


def test_continue_reads_on_costs_no_retrieval_and_cites_the_passage_in_use() -> None:
    script = {
        (): decides(0.05, 0.9), ("a",): said("One.", rel=(0.9, 0.1), sup=(0.9, 0.1, 0), then=(0.1, 0.2, 0.7)),
        ("a", CONT): said("Two", "[", "R", "elevant", "]", "."), ("b",): said("other", rel=(0.2, 0.8)),
    }  # fmt: skip
    asked: list[str] = []
    answer = ask(
        ScriptedGenerator(script), found("a", "b"), settings(retrieve="adaptive"),
        retrieve=lambda text, k: asked.append(text) or [],  # type: ignore[func-returns-value]
    )[0]  # fmt: skip
    assert answer.text == "One. Two[Relevant]."  # words in brackets are words
    assert cited_text(answer) == "One [1]. Two[Relevant] [1]."
    assert [hit.passage.id for hit in answer.citations] == ["a"]
    assert asked == []
    assert [one.decision for one in answer.segments] == ["yes", "continue"]
    assert "[Continue" not in answer.text
    assert "[Continue" in answer.raw
    rel_sup = [(one.rel, one.sup) for one in answer.segments]
    assert rel_sup[0] == rel_sup[1]  # absent_step: inherit


def test_steps_without_a_passage() -> None:
    script = {
        (): decides(0.05, 0.9), ("a",): said("one", rel=(0.9, 0.1), sup=(0.5, 0.3, 0.2), then=(0.8, 0.1, 0.1)),
        ("a", NO): said("two", use=USE),
    }  # fmt: skip
    finals = {}
    for how in ("inherit", "zero", 0.7):
        answer = ask(ScriptedGenerator(script), found("a"), settings(retrieve="adaptive", absent_step=how, combine="sum"))[0]
        finals[how] = answer.segments[1].score
        product = ask(ScriptedGenerator(script), found("a"), settings(retrieve="adaptive", absent_step=how, combine="product"))[
            0
        ]
        assert product.trace is not None
        assert product.trace["score"] == pytest.approx(1.55)
    assert finals == pytest.approx({"inherit": 0.9 + 0.65 + 0.25, "zero": 0.25, 0.7: 0.7})


def test_passages_are_found_for_each_segment_once_and_not_read_twice() -> None:
    calls: list[str] = []

    def retrieve(text: str, k: int) -> list[Hit]:
        calls.append(text)
        assert k == 3
        return found("a", "b", "c")[: 1 if text == "who?" else 3]

    script = {
        (): decides(0.05, 0.9), ("a",): said("one", rel=(0.9, 0.1), sup=(1, 0, 0), then=ON),
        ("a", "b"): said("two", rel=(0.9, 0.1), sup=(1, 0, 0), then=ON), ("a", "c"): said("two", rel=(0.8, 0.2), then=ON),
        ("a", "b", "c"): said("end", rel=(0.9, 0.1), sup=(1, 0, 0)),
        ("a", "a"): said("double", rel=(0.9, 0.1), sup=(1, 0, 0)), ("a", "b", "a"): said("old", rel=(0.9, 0.1)),
        ("a", "b", "b"): said("older", rel=(0.9, 0.1)),
    }  # fmt: skip
    answer = ask(ScriptedGenerator(script), [], settings(passages="dynamic", combine="sum"), retrieve=retrieve)[0]
    assert answer.text == "one two end"
    assert calls == ["who?", "who? one", "who? two"]
    assert answer.trace is not None
    assert answer.trace["cost"]["searches"] == 3
    calls.clear()
    ask(ScriptedGenerator(script), [], settings(passages="dynamic", query="question", dedup="none", combine="sum"),
        retrieve=retrieve)  # fmt: skip
    assert calls == ["who?"]  # cached by query
    calls.clear()
    ask(ScriptedGenerator(script), found("a"), settings(passages="hybrid", query="last"), retrieve=retrieve)
    assert calls[0] == "one"
    calls.clear()
    ask(ScriptedGenerator({**script, ("a", "a", "a"): said("stop")}), found("a"), settings(), retrieve=retrieve)
    assert calls == []  # static


def test_budgets_finish_what_is_live() -> None:
    titles = "abcde"
    budgets = (("max_total_tokens", 100, "generated"), ("max_calls", 30, "calls"), ("max_passages", 7, "passages"))
    for name, most, told in budgets:
        script = long_script(titles, 3)
        script |= {(*path, NO): said("u" + "".join(path)) for path in script if 0 < len(path) < 3}
        generator = ScriptedGenerator(script)
        decode = settings(keep_passages=0, max_segments=3, stop="never", **{name: most})
        answer = ask(generator, found(*titles), decode)[0]
        assert answer.trace is not None
        assert answer.trace["cost"][told] <= most, name
        assert answer.text, name
    cut = ask(ScriptedGenerator(long_script(titles, 3)), found(*titles), settings(max_new_tokens=5))[0]
    assert not cut.finished
    assert cut.trace is not None
    assert cut.trace["finish"] == "length"
    dropped = ask(ScriptedGenerator(long_script(titles, 3)), found(*titles), settings(max_new_tokens=5, on_length="drop"))[0]
    assert dropped.text == ""
    assert dropped.trace is not None
    assert dropped.trace["finish"] == "stuck"


def test_the_same_text_on_two_paths_is_kept_once_and_repeated_text_is_dropped() -> None:
    script = {
        (): decides(0.05, 0.9), ("a",): said("same", rel=(0.9, 0.1), sup=(0.9, 0.1, 0)),
        ("b",): said("same", rel=(0.5, 0.5), sup=(0.9, 0.1, 0)), ("c",): said("loop", rel=(0.4, 0.6), then=ON),
        ("c", "a"): said("loop", rel=(0.9, 0.1), then=ON), ("c", "b"): said("more", rel=(0.9, 0.1), then=ON),
        ("c", "c"): said(rel=(0.9, 0.1), then=ON),
    }  # fmt: skip
    answer = ask(ScriptedGenerator(script), found("a", "b", "c"), settings(stop="never", n_best=9, max_segments=2))[0]
    told = nodes(answer)
    why = {path: one["pruned"] for path, one in told.items() if one["pruned"]}
    assert why == {("b",): "same_text", ("c", "a"): "repeats", ("c", "c"): "empty"}
    assert [answer.text, *(other.text for other in answer.alternatives)] == ["same", "loop more"]


def test_every_weight_moves_the_score_by_its_component() -> None:
    base = {"seq": 1.0, "rel": 1.0, "sup": 1.0, "use": 0.5}
    plain = nodes(ask(example(), found("p0"), settings(weights=base))[0])[("p0",)]
    for name in base:
        moved = nodes(ask(example(), found("p0"), settings(weights={**base, name: base[name] + 0.25}))[0])[("p0",)]
        assert moved["final"] - plain["final"] == pytest.approx(0.25 * plain[name], abs=1e-9) != 0


def test_a_generated_paragraph_ends_the_segment() -> None:
    script = {
        (): decides(0.05, 0.9), ("a", NO): said("two"),
        ("a",): (*said("one", rel=(0.9, 0.1), sup=(1, 0, 0))[:-1], tiny.Step("<paragraph>", -0.1, {"[No Retrieval]": 0.05})),
    }  # fmt: skip
    generator = ScriptedGenerator(script, otherwise=lambda tail: ("a", NO) if tail.endswith(NO) else ("a",))
    answer = ask(generator, found("a"), settings(retrieve="adaptive"))[0]
    assert answer.text == "one two"
    assert "off_grammar" in answer.segments[0].flags
    assert not any(text.count("<paragraph>") > 1 for text in prompts_of(generator))


def test_ignore_cont_takes_unsupported_segments_out_of_the_finished_text_only() -> None:
    script = {
        (): decides(0.05, 0.9), ("a",): said("Claim.", rel=(0.9, 0.1), sup=(0, 0.1, 0.9), then=ON),
        ("a", "a"): said("Fact.", rel=(0.9, 0.1), sup=(0.9, 0.1, 0)),
    }  # fmt: skip
    texts = []
    for released in ([], ["ignore_cont"]):
        generator = ScriptedGenerator(script)
        texts.append(ask(generator, found("a"), settings(released=released, keep_passages="all"))[0].text)
        assert any("Claim." in text for text in prompts_of(generator))
    assert texts == ["Claim. Fact.", "Fact."]


def test_questions_share_batches_and_change_nothing() -> None:
    scripts = {"who?": example().scripts[""], "what?": toy(3, ("p0", "p1", "p2"), 3)[0], "why?": {(): decides(0.9, 0.05),
               (NO,): said("because")}}  # fmt: skip
    decode = settings(retrieve="adaptive", max_segments=3)
    hits = found("p0", "p1", "p2")
    together = ScriptedGenerator(scripts)
    answers = ask(together, hits, decode, queries=list(scripts))
    alone = [ask(ScriptedGenerator(scripts), hits, decode, queries=[query])[0] for query in scripts]
    assert [answer.text for answer in answers] == [answer.text for answer in alone]
    for one, other in zip(answers, alone, strict=True):
        assert one.trace is not None
        assert other.trace is not None
        assert one.trace["levels"] == other.trace["levels"]
        assert one.trace["cost"]["computed"] == other.trace["cost"]["computed"]
    assert together.cost.calls < sum(answer.trace["cost"]["calls"] for answer in alone if answer.trace is not None)


@pytest.mark.parametrize("released", ["decision", "use", "path", "siblings", "missing", "stop", "ignore_cont"])
def test_each_released_fault_warns(released: str, caplog: pytest.LogCaptureFixture) -> None:
    script = {(): decides(0.05, 0.9), ("p0",): said("zero", rel=(0.95, 0.05), sup=(0.9, 0.05, 0.05), use=USE)}
    self_rag(ScriptedGenerator(script), Asked(["who?"], [found("p0")]), settings(released=[released]))
    assert f"decode.released: {released} repeats" in caplog.text


def test_released_decision_missing_and_stop() -> None:
    script = {
        (): decides(0.05, 0.9), (NO,): said("unaided"), ("a",): (*said("one", rel=(0.9, math.nan), sup=(1, 0, 0), then=ON),
        *said("behind")),
    }  # fmt: skip
    plain = settings(retrieve="adaptive", missing="floor", max_segments=1)
    answers = {
        name: ask(ScriptedGenerator(script), found("a"), plain.model_copy(update={"released": (name,) if name else ()}))[0]
        for name in ("", "decision", "missing", "stop")
    }
    assert {name: answer.text for name, answer in answers.items()} == {
        "": "one", "decision": "unaided", "missing": "one", "stop": "one"
    }  # fmt: skip
    assert answers[""].segments[0].rel == pytest.approx(1.0)
    assert "rel:partial" in answers[""].segments[0].flags
    assert answers["missing"].segments[0].rel == pytest.approx(-0.009082, abs=1e-6)
    generated = [answers[name].trace["cost"]["generated"] for name in ("", "stop")]  # type: ignore[index]
    assert generated[1] == generated[0] + 2


def test_a_missing_mark_is_an_error_where_marks_are_exact() -> None:
    script = {(): decides(0.05, 0.9), ("a",): said("one", rel=(0.9, math.nan), sup=(1, 0, 0))}
    with pytest.raises(GeneratorError, match="Irrelevant"):
        ask(ScriptedGenerator(script), found("a"), settings())
    assert ask(ScriptedGenerator(script, exact=False), found("a"), settings())[0].text == "one"


def test_isrel_can_be_forced_and_its_figure_stays() -> None:
    offhand = tiny.Step("so", -0.5, {"[Relevant]": 0.3, "[Irrelevant]": 0.1})
    script = {(): decides(0.05, 0.9), ("a",): (offhand, *said("one", then=(0.9, 0.05, 0)))}
    free, forced = (
        ask(ScriptedGenerator(script), found("a"), settings(force_isrel=force, max_segments=1))[0] for force in (False, True)
    )
    assert "off_grammar" in free.segments[0].flags
    assert (free.text, free.segments[0].is_rel) == ("soone", "")
    assert (forced.text, forced.segments[0].is_rel) == ("one", "[Relevant]")
    assert free.segments[0].rel == forced.segments[0].rel == pytest.approx(0.75)


def test_target_rate_is_a_share_of_the_questions() -> None:
    queries = {f"q{number}?": 0.1 * number for number in range(1, 6)}
    scripts = {
        query: {(): decides(1 - p, p), (NO,): said("no"), ("a",): said("yes", rel=(0.9, 0.1), sup=(1, 0, 0))}
        for query, p in queries.items()
    }
    decode = SelfRagDecode(kind="self_rag", form="long", target_rate=0.4, passages="static")
    answers = ask(ScriptedGenerator(scripts), found("a"), decode, queries=list(queries))
    assert [answer.text for answer in answers] == ["no", "no", "no", "yes", "yes"]


def test_the_likeliest_token_decides_without_a_threshold() -> None:
    script = {
        (): decides(0.3, 0.4), (NO,): said("no"), ("a",): said("One.", rel=(0.9, 0.1), sup=(1, 0, 0), then=(0.5, 0.4, 0.1)),
        ("a", NO): said("Two."), ("a", "a"): said("Three.", rel=(0.9, 0.1)),
    }  # fmt: skip
    texts = [
        ask(ScriptedGenerator(script), found("a"), settings(retrieve="adaptive", threshold=threshold))[0].text
        for threshold in (None, 0.2, 1.0)
    ]
    assert texts == ["One. Two.", "One. Three.", "no"]


def test_a_question_of_control_tokens_searches_like_any_other() -> None:
    script = {(): decides(0.05, 0.9), ("a",): said("one", rel=(0.9, 0.1), sup=(1, 0, 0))}
    generator = ScriptedGenerator({"is [Relevant] </paragraph> a word?": script, "is": script, "?": script})
    answer = ask(generator, found("a"), settings(), queries=["is [Relevant] </paragraph> a word?"])[0]
    assert answer.text == "one"
    assert answer.trace is not None
    assert not set(answer.trace["prompt"]) & set(generator.schema.controls)


def test_choices_are_for_the_short_form() -> None:
    with pytest.raises(RecipeError, match="does not choose"):
        long(example(), Asked(["who?"], [found("p0")], choices=[["a", "b"]]), settings())


def test_the_alce_file_has_the_cited_passages_and_no_others(tmp_path: Path) -> None:
    script = {
        (): decides(0.05, 0.9), ("a",): said("A is b.", rel=(0.9, 0.1), sup=(0.9, 0.1, 0), then=ON),
        ("a", "b"): said("Why?", rel=(0.9, 0.1), sup=(0, 0.1, 0.9), then=ON),
        ("a", "b", "c"): said("C is d.", rel=(0.9, 0.1), sup=(1, 0, 0)),
    }  # fmt: skip
    order = iter("abc")
    generator = ScriptedGenerator(script)
    answer = ask(generator, [], settings(passages="dynamic", beam=1), retrieve=lambda _, k: found(next(order)))[0]
    row = json.loads(export_alce([answer], tmp_path / "alce.json").read_text())["data"][0]
    assert row["output"] == "A is b [1]. Why? C is d [2]."
    assert [doc["title"] for doc in row["docs"]] == ["a", "c"]
    with pytest.raises(CorpusError, match="do not ask"):
        export_alce([answer], tmp_path / "other.json", rows=[{"question": "what?"}])


def test_the_tree_is_drawn_with_its_answer() -> None:
    answer = ask(example(), found("p0", "p1", "p2"), settings(combine="sum", max_segments=2))[0]
    assert answer.trace is not None
    lines = tree_lines(answer.trace)
    assert [line.depth for line in lines] == [0, 0, 1, 1, 1, 0, 1, 1, 1]
    best = [line.text.partition(":")[0] for line in lines if line.best]
    assert best == ["[2] p1", "[2] p1"]
    assert "final 3.1500" in "".join(line.text for line in lines if line.best)


def test_a_second_try_keeps_to_the_budget_of_calls() -> None:
    script = {
        (): decides(0.05, 0.9), (NO,): said("unaided", "words"),
        ("a",): said("x", rel=(0.9, 0.1), sup=(0.1, 0.1, 0.8), then=ON),
    }  # fmt: skip
    ends = []
    for most in range(3, 11):
        generator = ScriptedGenerator(script)
        decode = settings(require=["fully"], on_empty="no_retrieval", max_segments=2, max_calls=most)
        answer = ask(generator, found("a"), decode)[0]
        assert generator.cost.calls <= most
        assert answer.trace is not None
        ends.append(answer.trace["finish"])
    assert {ends[0], ends[-1]} == {"budget", "eos"}


def test_where_no_passage_fits_behind_the_question() -> None:
    generator = ScriptedGenerator({(): decides(0.05, 0.9), ("a",): said("x", rel=(0.9, 0.1))})
    generator.positions = len(generator.marked_prompt.question("who?")) + 5  # type: ignore[attr-defined]
    with pytest.raises(GeneratorError, match="none of its 1 passages fits"):
        ask(generator, found("a"), settings())


def test_passages_that_do_not_fit_are_left_out_of_the_tree_and_told() -> None:
    """As in the short form: what the model was not given is no passage that was read, and takes no place in a budget."""
    script = {(): decides(0.05, 0.9), ("a",): said("one", rel=(0.9, 0.1), sup=(1, 0, 0))}
    generator = ScriptedGenerator(script)
    a, b = found("a")[0], Hit(Passage("b", "x" * 200, "b"), 1, 0.5, 2)
    prompt = generator.marked_prompt
    generator.positions = len(prompt.question("who?")) + len(prompt.passage(a.passage)) + 20  # type: ignore[attr-defined]
    answer = ask(generator, [b, a], settings())[0]
    assert {path: one["pruned"] for path, one in nodes(answer).items()} == {("a",): "", ("b",): "too_long"}
    assert (answer.text, answer.finished) == ("one", True)
    assert not any("xxx" in text for text in prompts_of(generator))
    assert [hit.passage.id for hit in answer.hits] == ["a"]
    assert answer.trace is not None
    assert answer.trace["cost"]["passages"] == 1


def test_what_overflows_further_down_ends_a_path_and_keeps_its_text() -> None:
    """The model has room for b, or for a and a behind it, and for no other two passages; then for no two."""
    above = {"rel": (0.9, 0.1), "sup": (1, 0, 0), "then": ON}
    script = {
        (): decides(0.05, 0.9), ("a",): said("one", **above), ("b",): said("other", **above),
        ("a", "a"): said("two", rel=(0.9, 0.1), sup=(1, 0, 0), use=USE),
    }  # fmt: skip
    generator = ScriptedGenerator(script)
    a, b = found("a")[0], Hit(Passage("b", "x" * 200, "b"), 1, 0.5, 2)
    prompt, body = generator.marked_prompt, 3
    asked, short, long_ = len(prompt.question("who?")), len(prompt.passage(a.passage)), len(prompt.passage(b.passage))
    decode = settings(keep_passages="all", max_segments=2, combine="sum", n_best=2)
    generator.positions = asked + long_ + body + 1  # type: ignore[attr-defined]
    answer = ask(generator, [a, b], decode)[0]
    told = {path: one["pruned"] for path, one in nodes(answer).items()}
    left_out = dict.fromkeys([("a", "b"), ("b", "a"), ("b", "b")], "too_long")
    assert told == {("a",): "", ("b",): "", ("a", "a"): "", **left_out}
    assert [(one.text, one.finished) for one in (answer, *answer.alternatives)] == [("one two", True), ("other", False)]
    assert answer.trace is not None
    assert answer.trace["cost"]["passages"] == 3
    generator.positions = asked + short + body + short  # type: ignore[attr-defined]
    answer = ask(generator, [a], decode)[0]
    assert {path: one["pruned"] for path, one in nodes(answer).items()} == {("a",): "", ("a", "a"): "too_long"}
    assert (answer.text, answer.finished) == ("one", False)
    assert answer.trace is not None
    assert (answer.trace["finish"], answer.trace["cost"]["passages"]) == ("stuck", 1)
