"""Splits: groups stay whole, nobody moves, ties are set aside; and a planted leak stops the training."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raglan.data import answer_rows, stage_examples
from raglan.datapoints import read_points
from raglan.documents import read_examples, write_examples
from raglan.errors import CorpusError, RecipeError
from raglan.knowledge import build_knowledge
from raglan.rag import RAG
from raglan.recipe import QuestionData, load_recipe
from raglan.records import DataPoint, Example
from raglan.splits import Split, check_leaks, find_leaks, jaccard, read_split, split_examples, write_split
from raglan.text import question_key
from raglan.train import train
from test_cli import run
from tiny import small_recipe

HALVES = {"train": 0.5, "test": 0.5}


def about(identity: str, *documents: str, query: str = "") -> Example:
    return Example(identity, query or f"what of {identity}", ("x",), tuple(documents))


def four() -> list[Example]:
    return [about("Q1", "A"), about("Q2", "A", "B"), about("Q3", "B"), about("Q4", "C")]


def test_groups_by_question_and_by_document() -> None:
    assert split_examples(four()).groups == 4
    made = split_examples(four(), by="document")
    assert made.groups == 2
    assert len({made.places[name] for name in ("Q1", "Q2", "Q3")}) == 1
    seeds = [split_examples(four(), by="document", shares=HALVES, seed=seed).places for seed in range(40)]
    assert any(places["Q1"] != places["Q4"] for places in seeds)
    assert all(places["Q1"] == places["Q2"] == places["Q3"] for places in seeds)
    same = [about("a", query="Who built the tower?"), about("b", query="who built tower"), about("c")]
    assert split_examples(same).groups == 2
    with pytest.raises(CorpusError, match="question 'c' names no document"):
        split_examples([about("c")], by="document")
    with pytest.raises(RecipeError, match="must sum to 1"):
        split_examples(four(), shares={"train": 0.5})


def test_shares_are_met_and_the_seed_counts() -> None:
    many = [about(f"q{n}") for n in range(4000)]
    made = split_examples(many, seed=3)
    parts = made.of(many)
    assert {name: round(len(part) / 4000, 1) for name, part in parts.items()} == {"train": 0.8, "dev": 0.1, "test": 0.1}
    assert made.places == split_examples(list(reversed(many)), seed=3).places
    assert made.places != split_examples(many, seed=4).places


graphs = st.lists(st.lists(st.sampled_from("ABCDEFGH"), min_size=1, max_size=3, unique=True), min_size=1, max_size=14)


@settings(max_examples=60, deadline=None)
@given(graphs, graphs, st.integers(0, 5))
def test_adding_questions_moves_nobody_and_no_group_is_on_two_sides(
    old: list[list[str]], new: list[list[str]], seed: int
) -> None:
    before = [about(f"m{n}", *documents) for n, documents in enumerate(old)]
    after = before + [about(f"{'ax'[n % 2]}{n}", *documents) for n, documents in enumerate(new)]
    first = split_examples(before, by="document", shares=HALVES, seed=seed)
    second = split_examples(after, by="document", shares=HALVES, seed=seed, earlier=first)
    assert {name: second.places[name] for name in first.places} == first.places
    placed = [example for example in after if example.id in second.places]
    for a, b in combinations(placed, 2):
        if set(a.relevant) & set(b.relevant):
            assert second.places[a.id] == second.places[b.id]
    aside = dict(second.aside)
    assert {example.id for example in after} == set(second.places) | set(aside)
    for name in aside:  # it does tie two splits together
        documents = set(next(e for e in after if e.id == name).relevant)
        assert len({second.places[e.id] for e in placed if documents & set(e.relevant)}) == 2


def test_the_file_of_an_earlier_split_is_honoured(tmp_path: Path) -> None:
    seed = next(
        s for s in range(99) if len(set(split_examples(four(), by="document", shares=HALVES, seed=s).places.values())) == 2
    )
    first = split_examples(four(), by="document", shares=HALVES, seed=seed)
    counts = write_split(tmp_path, first, four())
    assert sum(counts.values()) == 4
    assert all(read_examples(tmp_path / f"{name}.jsonl")[0].metadata["split"] == name for name in HALVES)
    more = [*four(), about("Q0", "C", "D"), about("Q5", "D"), about("Q6", "A", "C")]
    second = split_examples(more, by="document", shares=HALVES, seed=seed + 1, earlier=read_split(tmp_path))
    assert second.places["Q0"] == second.places["Q5"] == first.places["Q4"]
    assert second.aside == [("Q6", "it would tie test and train together")]
    gone = split_examples(more[4:], by="document", shares=HALVES, earlier=read_split(tmp_path))
    assert gone.places["Q5"] == first.places["Q4"]  # the old questions are out of the file, and still hold their documents
    with pytest.raises(CorpusError, match="groups on two sides: 'document A'"):
        split_examples(four(), by="document", earlier=_torn(read_split(tmp_path)))
    (tmp_path / "split.json").write_text("{}")
    with pytest.raises(CorpusError, match="is no split"):
        read_split(tmp_path)


def _torn(split: Split) -> Split:
    """Q1 and Q2 share document A and are on two sides; Q3 has nothing to do with either."""
    places = {**split.places, "Q1": "train", "Q2": "test", "Q3": "test"}
    return replace(split, places=places, keys={**split.keys, "Q2": ["question 2", "document A"]})


def test_new_questions_alone_join_the_files_that_are_there(tmp_path: Path, capsys, monkeypatch) -> None:
    out, old = tmp_path / "grown", [about(f"q{n}", query=f"who built number {n}") for n in range(20)]
    write_examples(tmp_path / "old.jsonl", old)
    write_examples(tmp_path / "new.jsonl", [about("n1", query="who built number 100"), about("n2", query="number 3 who built")])
    tied = Split("question", 0, HALVES, {}, {}, [("tied", "it would tie test and train together")])
    known = split_examples(old, seed=1)
    write_split(out, replace(known, aside=tied.aside), [*old, about("tied")])
    places = read_split(out).places
    code, said, _ = run("split", str(tmp_path / "new.jsonl"), "-o", str(out), capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0
    there = {name: {e.id for e in read_examples(out / f"{name}.jsonl")} for name in ("train", "dev", "test")}
    for example in old:
        assert example.id in there[places[example.id]]
    assert set().union(*there.values()) == {e.id for e in old} | {"n1", "n2"}
    assert sum(int(line.split()[1]) for line in said.splitlines()) == 22
    assert [e.id for e in read_examples(out / "aside.jsonl")] == ["tied"]
    with pytest.raises(CorpusError, match="placed otherwise"):
        write_split(out, split_examples([about("else")]), [about("else")])
    assert set().union(*({e.id for e in read_examples(out / f"{name}.jsonl")} for name in there)) >= {e.id for e in old}


def test_leaks_are_found_on_each_level() -> None:
    train = [
        Example("t1", "Who built the Tower of Lorn in the year 1904?", ("Stroud",), ("p1",)),
        Example("t2", "Why?", ("rain",), history=("It closed.",)),
    ]
    held = [
        Example("same", "who built tower of Lorn in the year 1904", ("x",)),
        Example("answer", "Which man had it built?", ("the Stroud",), ("p1",)),
        Example("near", "Who built the tall Tower of Lorn?", ()),
        Example("turn", "Why?", ("rain",), history=("It opened.",)),
        Example("free", "Where is the sea?", ("Stroud",), ("p2",)),
    ]
    found = {
        level: {(leak.train, leak.held_out) for leak in find_leaks(train, held, level=level)}
        for level in ("none", "questions", "passages", "near")
    }
    assert found["none"] == set()
    assert found["questions"] == {("t1", "same")}
    assert found["passages"] == {("t1", "same"), ("t1", "answer")}
    assert found["near"] == found["passages"]
    close = Example("close", "Who built the Tower of Lorn in the year 1904 please?")
    assert {leak.held_out for leak in find_leaks(train, [close], level="near")} == {"close"}
    with pytest.raises(CorpusError, match=r"train and dev share 1 questions, so what is measured was learned: t1 = same"):
        check_leaks(train, held, level="questions", names=("train", "dev"))
    check_leaks(train, held[1:], level="questions", names=("train", "dev"))


def test_questions_without_words_are_no_near_duplicates() -> None:
    assert find_leaks([about("a", query="???")], [about("b", query="!!!")], level="near") == []
    assert [leak.what for leak in find_leaks([about("a", query="???")], [about("b", query="???")], level="near")] == [
        "questions"
    ]


words = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=9).map(" ".join)


@settings(max_examples=80, deadline=None)
@given(st.lists(words, min_size=1, max_size=12), words)
def test_near_duplicates_are_those_of_a_plain_loop(asked: list[str], held: str) -> None:
    def shingles(text: str) -> frozenset:
        parts = [w for w in text.split() if w != "a"] or [text, ""]  # without words it is like itself alone
        return frozenset(tuple(parts[n : n + 3]) for n in range(max(1, len(parts) - 2)))

    train = [Example(f"t{n}", text) for n, text in enumerate(asked)]
    found = find_leaks(train, [Example("h", held)], level="near")
    assert bool(found) == any(jaccard(shingles(held), shingles(text)) >= 0.8 for text in asked)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("split")
    build_knowledge(load_recipe(small_recipe(path)).knowledge)
    return path


def test_rows_inherit_their_questions_split_however_many_passages_they_have(folder: Path) -> None:
    """Of the expanded rows: no question is on both sides, however it is written, and each has all its rows on its own."""
    recipe = load_recipe(folder / "small.yaml")
    system = RAG.open(recipe)
    corpus = system.retriever.base.corpus
    examples = read_examples(folder / "train.jsonl")
    examples += [replace(e, id=f"{e.id}-again", query=f"{e.query.capitalize()}?") for e in examples[::3]]
    write_split(folder / "parts", split_examples(examples, shares=HALVES, seed=2), examples)
    for passages in (1, 3, 5):
        sides = []
        for name in HALVES:
            data = QuestionData(
                kind="questions", path=folder / "parts" / f"{name}.jsonl", passages=passages, passages_a_row=1, allow_test=True
            )
            part = stage_examples(data, corpus, 0)
            rows = answer_rows(part, data, system.retriever, system.generator, 0, keep=folder / "rows")
            points = read_points(folder / "rows")
            assert len(rows) == len(points) == passages * len(part)
            assert set(Counter(point.example_id for point in points).values()) == {passages}
            sides.append(points)
        ids, questions = ([{key(point) for point in side} for side in sides] for key in (_id_of, _words_of))
        assert not ids[0] & ids[1]
        assert not questions[0] & questions[1]
        assert ids[0] | ids[1] == {example.id for example in examples}
        assert min(map(len, questions)) > 10
    with pytest.raises(CorpusError, match="questions of the split `test`"):
        stage_examples(QuestionData(kind="questions", path=folder / "parts" / "test.jsonl"), corpus, 0)


def _id_of(point: DataPoint) -> str:
    return point.example_id


def _words_of(point: DataPoint) -> str:
    return question_key(point.query)


def test_a_planted_duplicate_stops_the_training(folder: Path) -> None:
    examples = read_examples(folder / "dev.jsonl")
    planted = Example("planted", examples[0].query.upper() + "?", ("x",))
    write_examples(folder / "planted.jsonl", [*read_examples(folder / "train.jsonl"), planted])
    changes = ["stages.read.data.path=planted.jsonl", "stages.read.train.max_steps=1", "stages.find.train.max_steps=1"]
    with pytest.raises(CorpusError, match=f"share 1 questions.*planted = {examples[0].id}"):
        train(load_recipe(folder / "small.yaml", changes))
    assert train(load_recipe(folder / "small.yaml", [*changes, "leak_check=none"])).generator


def test_split_through_the_command_line(folder: Path, capsys, monkeypatch) -> None:
    def call(*words: str) -> tuple[int, str, str]:
        return run(*words, capsys=capsys, monkeypatch=monkeypatch)

    out = str(folder / "cli")
    code, told, _ = call("split", str(folder / "train.jsonl"), "-o", out, "--shares", "train=.5,test=.5", "--by", "document")
    assert code == 0
    assert told.count("questions") == 2
    before = json.loads((folder / "cli" / "split.json").read_text())["questions"]
    code, _, said = call(
        "split", str(folder / "train.jsonl"), "-o", out, "--shares", "train=.5,test=.5", "--by", "document", "--seed", "9"
    )
    assert (code, json.loads((folder / "cli" / "split.json").read_text())["questions"]) == (0, before)
    assert "honoured" in said
    for words, message in (
        (("--by", "word"), "question or document"),
        (("--shares", "train"), "name=share"),
        (("--shares", "train=.2"), "sum to 1"),
    ):
        code, _, said = call("split", str(folder / "train.jsonl"), "-o", str(folder / "other"), *words)
        assert code == 2
        assert message in said


@pytest.mark.parametrize("name", ["squad", "vessen"])
def test_shipped_questions_do_not_leak(name: str, request: pytest.FixtureRequest) -> None:
    if name == "vessen":
        root = request.getfixturevalue("vessen") / "questions"
        sides = [read_examples(root / f"{part}.jsonl") for part in ("train", "heldout")]
        assert find_leaks(*sides, level="near") == []
    else:
        root = request.getfixturevalue("data") / "squad"
        sides = [read_examples(root / f"{part}.jsonl.gz") for part in ("train", "dev")]
        assert find_leaks(*sides, level="questions") == []


def test_synthetic_examples_are_tied_by_gold_and_support_and_not_by_noise(caplog: pytest.LogCaptureFixture) -> None:
    def made(identity: str, **roles: str) -> Example:
        passages = [{"role": role, "document": document} for role, document in roles.items()]
        return Example(identity, f"what of {identity}", metadata={"synth": {"passages": passages}})

    examples = [
        made("a", gold="A", noise="C"), made("b", gold="B", support="A"), made("c", gold="C", noise="B"),
        *(Example(name, f"what of {name}", metadata={"synth": {"job": job}}) for name, job in zip("xyz", "112", strict=True)),
    ]  # fmt: skip
    sides = [split_examples(examples, by="document", shares=HALVES, seed=seed) for seed in range(40)]
    assert {(one.groups, one.largest) for one in sides} == {(4, 2 / 6)}
    assert all(one.places["a"] == one.places["b"] and one.places["x"] == one.places["y"] for one in sides)
    assert any(one.places["a"] != one.places["c"] for one in sides)
    assert any(one.places["x"] != one.places["z"] for one in sides)
    assert "33 % of the questions are one group" in caplog.text
    alone = [made(f"q{n}", gold=str(n), noise="0") for n in range(10)]
    caplog.clear()
    assert split_examples(alone, by="document").largest == 0.1
    assert not caplog.text
