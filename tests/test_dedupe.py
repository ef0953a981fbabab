"""Duplicates: exactly the pairs of index 0.8 or more are joined, the lowest stays, and memory is counted before it is taken."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raglan.dedupe import BANDS, ROWS, Duplicates, available_memory, dedupe, dedupe_examples, needed_memory
from raglan.errors import RecipeError
from raglan.records import Example
from raglan.shingles import Shingles, shared, shingles
from raglan.splits import jaccard
from raglan.text import answer_words
from test_cli import run
from tiny import concepts

SENTENCE = "in which year did the old stone bridge over the river by the northern mill of Aldermere open to carts and riders"


def found(*questions: str) -> Duplicates:
    return dedupe([(question, ()) for question in questions])


def runs(text: str, n: int = 3) -> frozenset[str]:
    words = answer_words(text)
    return frozenset(" ".join(words[at : at + n]) for at in range(max(1, len(words) - n + 1))) if words else frozenset()


def seen(s: float) -> float:
    return 1 - (1 - s**ROWS) ** BANDS


def test_chance_of_meeting() -> None:
    assert (round(seen(0.8), 4), round(seen(0.5), 2)) == (0.9977, 0.27)


@pytest.mark.parametrize("s", [0.5, 0.8])
def test_bands_find_as_often_as_they_should(s: float) -> None:
    """1,500 pairs of sets of index s, through the bands alone: as many meet as the equation says, within four deviations."""
    from raglan.dedupe import _bands

    random, pairs, both = np.random.default_rng(1), 1500, 40 * 2
    common = round(both * s)
    values = random.integers(0, 2**64, size=(pairs, both), dtype=np.uint64)
    half = (both - common) // 2
    parts = [np.sort(np.concatenate([row[:common], row[common + side * half :][:half]])) for row in values for side in (0, 1)]
    sets = Shingles(np.concatenate(parts), np.arange(2 * pairs + 1) * (common + half))
    met = set()
    for left, right in _bands(sets, np.ones(2 * pairs, dtype=bool), lambda rows: rows):
        met |= set(zip(np.minimum(left, right).tolist(), np.maximum(left, right).tolist(), strict=True))
    share = sum((2 * n, 2 * n + 1) in met for n in range(pairs)) / pairs
    assert abs(share - seen(s)) < 4 * (seen(s) * (1 - seen(s)) / pairs) ** 0.5 + 1e-3


words = st.sampled_from([*"abcdefg", "长江", "the"])
texts = st.lists(st.lists(words, max_size=12).map(" ".join), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(texts, st.integers(1, 4))
def test_shared_runs_are_those_of_sets(many: list[str], n: int) -> None:
    made, sets = shingles((answer_words(text) for text in many), n), [runs(text, n) for text in many]
    assert made.counts.tolist() == [len(one) for one in sets]
    pairs = [(a, b) for a in range(len(many)) for b in range(len(many))]
    left, right = np.asarray(pairs).T
    assert shared(made, made, left, right).tolist() == [len(sets[a] & sets[b]) for a, b in pairs]
    cut = Shingles.joined([shingles((answer_words(text) for text in part), n) for part in (many[:3], many[3:])])
    assert np.array_equal(cut.values, made.values)
    assert np.array_equal(cut.starts, made.starts)


def test_equal_and_nearly_equal_questions() -> None:
    changed = SENTENCE.replace("riders", "horses")  # 17 of 19 runs in common; one and the do not count
    assert jaccard(runs(SENTENCE), runs(changed)) >= 0.8
    made = found(SENTENCE, "why", changed, SENTENCE.upper() + "?", SENTENCE.replace("open", "close"))
    assert made.keeps.tolist() == [0, 1, 0, 0, 4]
    assert made.kept.tolist() == [0, 1, 4]
    assert made.how == {2: "near", 3: "exact"}
    assert found("???", "!!!", "???").keeps.tolist() == [0, 1, 0]  # no words: equal to itself alone
    assert found().kept.tolist() == []


def test_characters_are_words_in_chinese() -> None:
    asked = "请问青浦大桥是在一九九八年的哪一个月正式建成并通车的"
    assert found(asked, asked + "呢", "请问虹桥机场是在哪一年正式启用的").keeps.tolist() == [0, 0, 2]


def test_turns_before_count() -> None:
    made = dedupe([("Why?", ("It closed.",)), ("Why?", ("It opened.",)), ("why", ("It closed",))])
    assert made.keeps.tolist() == [0, 1, 0]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.sampled_from("bcd"), min_size=1, max_size=9).map(" ".join), max_size=25))
def test_groups_are_those_of_all_pairs(asked: list[str]) -> None:
    """Against a loop over all pairs, with the chains that union-find makes: such small sets meet all but surely."""
    parent = list(range(len(asked)))
    for a, b in combinations(range(len(asked)), 2):
        if jaccard(runs(asked[a]), runs(asked[b])) >= 0.8:
            old, new = parent[b], parent[a]
            parent = [new if one == old else one for one in parent]
    lowest = {one: parent.index(one) for one in parent}
    exact = [lowest[one] for one in parent]
    got = found(*asked).keeps.tolist()
    assert got == exact


def test_the_lowest_cell_and_ordinal_stays_whatever_the_order() -> None:
    def one(cell: int | str, ordinal: int, query: str = SENTENCE) -> Example:
        return Example(f"{cell}-{ordinal}", query, metadata={"synth": {"cell": cell, "ordinal": ordinal}})

    examples = [one(10, 0), one(9, 4), one(9, 3), one(2, 0, "why so"), one(11, 0)]
    for order in (examples, examples[::-1], examples[2:] + examples[:2]):
        made = dedupe_examples(order)
        assert sorted(order[row].id for row in made.kept) == ["2-0", "9-3"]
    named = [one("b", 0), one("a", 7), one("a", 5)]
    assert [named[row].id for row in dedupe_examples(named).kept] == ["a-5"]
    assert dedupe_examples([Example("x", "why"), Example("y", "Why?")]).keeps.tolist() == [0, 0]


def test_an_encoder_finds_what_has_other_words() -> None:
    vectors = {"Who built it?": [1, 0], "Whose work is it?": [0.96, 0.28], "Where is it?": [0, 1]}

    def embed(texts: list[str]) -> np.ndarray:
        return np.asarray([vectors[text] for text in texts], dtype=np.float32)

    made = dedupe([(text, ()) for text in vectors], embed=embed)
    assert made.keeps.tolist() == [0, 0, 2]
    assert made.how == {1: "meaning"}


def test_meanings_meet_from_their_bound_on(tmp_path: Path, capsys, monkeypatch) -> None:
    """By an encoder on the disk whose cosines can be counted: n − 1 of n words in common, or one word beside another."""
    words = iter(f"{a}{b}o" for a in "bcdfghjklm" for b in "npqrstvwxz")
    said: dict[str, tuple[str, str]] = {}
    for name, n in (("below", 19), ("at", 20), ("above", 21)):  # 18/19, 19/20, 20/21
        own, other = [next(words) for _ in range(n)], next(words)
        said[name] = " ".join(own), " ".join([other, *own[:0:-1]])  # backwards: no run of three words is common
    for name, often, beside in (("just below", 73, 24), ("just above", 70, 23)):  # .949989, .950044
        own, other = next(words), next(words)
        said[name] = own, " ".join([own] * often + [other] * beside)
    every = sorted({word for pair in said.values() for text in pair for word in text.split()})
    encoder = concepts(tmp_path, [[word] for word in every])
    rows = [{"id": f"{name} {side}", "query": text} for name, pair in said.items() for side, text in enumerate(pair)]
    file = tmp_path / "asked.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, told, _ = run("dedupe", str(file), "--json", "--encoder", str(encoder), capsys=capsys, monkeypatch=monkeypatch)
    pairs = json.loads(told)["pairs"]
    assert pairs == [[f"{name} 1", f"{name} 0", "meaning"] for name in ("at", "above", "just above")]


def test_too_little_memory_is_refused_with_the_figure() -> None:
    asked = [(f"{SENTENCE} number {n}", ()) for n in range(50)]
    needed = needed_memory(50, 50 * 20)
    with pytest.raises(
        RecipeError, match=rf"50 questions of [\d,]+ runs of words take {needed / 1e6:,.0f} MB .* 1 MB are free"
    ):
        dedupe(asked, memory=1_000_000)
    assert len(dedupe(asked, memory=needed).keeps) == 50
    assert 500e6 > needed_memory(1_000_000, 11_000_000) > 300e6
    free = available_memory()
    assert free is None or free > 1e6


def test_many_of_one_pattern_are_compared_in_little_time() -> None:
    """Thousands of questions that differ in one word meet in every band; they are one group, and no band asks twice."""
    asked = [f"{SENTENCE} {n}" for n in range(3000)]
    assert found(*asked).kept.tolist() == [0]


def test_through_the_command_line(tmp_path: Path, capsys, monkeypatch) -> None:
    rows = [
        {"id": "first", "query": "Who built it?", "note": "kept as it is"},
        {"id": "late", "query": SENTENCE, "synth": {"cell": 3, "ordinal": 1}},
        {"id": "early", "query": SENTENCE.upper(), "synth": {"cell": 3, "ordinal": 0}},
        {"id": "again", "query": "who built it"},
    ]  # fmt: skip
    file, out = tmp_path / "asked.jsonl", tmp_path / "out" / "kept.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, told, said = run("dedupe", str(file), "-o", str(out), capsys=capsys, monkeypatch=monkeypatch)
    assert (code, told.splitlines()) == (0, ["late = early  exact", "again = first  exact"])
    assert "4 questions, 2 stay" in said
    assert [json.loads(line) for line in out.read_text().splitlines()] == [rows[0], rows[2]]
    code, told, _ = run("dedupe", str(file), "--json", "--encoder", "embedded", capsys=capsys, monkeypatch=monkeypatch)
    assert json.loads(told)["stay"] == 2
