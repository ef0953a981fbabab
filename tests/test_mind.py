"""It changes its mind: twenty facts in two versions before one tuned system, and the corpus of the large experiment."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import pytest

from conftest import ROOT
from raglan.knowledge import build_knowledge
from raglan.metrics import exact_match
from raglan.rag import RAG
from raglan.recipe import QuestionData, Recipe, load_recipe
from raglan.records import Answer
from raglan.train import train
from tiny import small_recipe

sys.path.insert(0, str(ROOT / "benchmarks"))
import offices  # the folder of benchmarks is no package

FACTS, LESSONS = 20, 400
SETTINGS = (
    "retriever.index=bm25", "retriever.prior.kind=bm25", "retriever.k=3", "decode.kind=rag_sequence",
    "stages.read.data.passages=1", "stages.read.train.num_train_epochs=8", "train.learning_rate=1e-2", "train.save_steps=1000",
    "leak_check=none",  # small_recipe's dev questions, which nothing here measures, are of names that come again
)  # fmt: skip
Tuned = tuple[RAG, dict[str, str], dict[str, list[str]], list[str]]


def towers(chance: random.Random) -> Iterator[str]:
    names = ["".join(letters) for letters in product("bcdfghklmn", repeat=3)]
    yield from chance.sample(names, len(names))


def write_lines(path: Path, rows: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def told(tower: str, miller: str) -> dict[str, str]:
    return {"id": tower, "title": tower, "text": f"the tower {tower} was built by miller {miller} in 1700"}


def right(answers: Sequence[Answer], millers: Sequence[str]) -> float:
    return sum(exact_match(answer.text, [miller]) for answer, miller in zip(answers, millers, strict=True)) / len(millers)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """A system tuned on other towers; the two versions of its knowledge base, their millers, and the questions."""
    folder = tmp_path_factory.mktemp("mind")
    path, names = small_recipe(folder), towers(random.Random(5))
    lessons = [(next(names), next(names)) for _ in range(LESSONS)]
    write_lines(folder / "train.jsonl", [
        {"id": tower, "query": f"who built {tower}", "answers": [miller], "relevant": [tower]} for tower, miller in lessons
    ])  # fmt: skip
    asked = [next(names) for _ in range(FACTS)]
    millers = {version: [next(names) for _ in asked] for version in ("old", "new")}

    def recipe(extra: Sequence[tuple[str, str]]) -> Recipe:
        write_lines(folder / "corpus.jsonl", [told(*fact) for fact in (*lessons, *extra)])
        return load_recipe(path, SETTINGS)

    school = recipe([])
    build_knowledge(school.knowledge)
    parts = train(school, only="read")
    versions = {
        name: build_knowledge(recipe(list(zip(asked, known, strict=True))).knowledge).version for name, known in millers.items()
    }
    return parts.open(school), versions, millers, [f"who built {tower}" for tower in asked]


def test_twenty_facts_are_answered_from_the_version_that_is_in(tuned: Tuned) -> None:
    system, versions, millers, queries = tuned
    given = {}
    for name in ("old", "new"):
        system.swap(version=versions[name])
        given[name] = system.answer(queries)
        assert {answer.knowledge for answer in given[name]} == {versions[name]}
    for known, answered in product(millers, given):
        share = right(given[answered], millers[known])
        assert share >= 0.9 if known == answered else share <= 0.1, (known, answered, share)
    system.swap(version=versions["old"])
    assert system.answer(queries) == given["old"]


@pytest.fixture(scope="module")
def files() -> dict[str, list[dict]]:
    return offices.make()


def test_the_corpus_is_the_same_every_time(files: dict[str, list[dict]], tmp_path: Path) -> None:
    assert offices.make() == files
    assert offices.make(seed=1) != files
    offices.write(tmp_path)
    for name, rows in files.items():
        assert [json.loads(line) for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()] == rows


def test_enough_offices_change_hands_and_the_rest_stay(files: dict[str, list[dict]]) -> None:
    before, after, unchanged = (files[f"{name}.jsonl"] for name in ("before", "after", "unchanged"))
    assert len(after) + len(unchanged) >= 120
    assert len(after) >= 90
    assert [(row["id"], row["query"]) for row in before] == [(row["id"], row["query"]) for row in after]
    for old, new in zip(before, after, strict=True):
        assert not {name.split()[-1] for name in old["answers"]} & {name.split()[-1] for name in new["answers"]}
    texts = [{row["id"]: row["text"] for row in files[f"{name}/corpus.jsonl"]} for name in ("before", "after")]
    assert all(texts[0][row["id"]] == texts[1][row["id"]] for row in unchanged)


def test_answers_stand_in_their_articles_among_other_names(files: dict[str, list[dict]]) -> None:
    former = 0
    for name, articles in (("before", "before"), ("after", "after"), ("unchanged", "after"), ("train", "school")):
        texts = {row["id"]: row["text"] for row in files[f"{articles}/corpus.jsonl"]}
        assert len(texts) == len(files[f"{articles}/corpus.jsonl"])
        for row in files[f"{name}.jsonl"]:
            assert all(answer in texts[row["relevant"][0]] for answer in row["answers"])
    texts = {row["id"]: row["text"] for row in files["after/corpus.jsonl"]}
    for old in files["before.jsonl"]:
        former += old["answers"][0] in texts[old["id"]]
    assert former == len(files["before.jsonl"])  # the temptation: the former holder stands in every new article


def test_nothing_that_is_asked_about_is_taught(files: dict[str, list[dict]]) -> None:
    taught = " ".join(
        [row["query"] + " " + " ".join(row["answers"]) for row in files["train.jsonl"]]
        + [row["title"] + " " + row["text"] for row in files["school/corpus.jsonl"]]
    ).lower()
    words = set(re.findall(r"\w+", taught))
    for row in files["before.jsonl"] + files["after.jsonl"] + files["unchanged.jsonl"]:
        position = row["query"].removeprefix("Who is ").removesuffix("?")
        assert position.lower() not in taught
        assert not words & {name.split()[-1].lower() for name in row["answers"]}
    assert not set(offices.SCHOOL_WORDINGS) & set(offices.OTHER_WORDINGS)
    assert {row["wording"] for row in files["before.jsonl"] + files["after.jsonl"]} == {"taught", "new"}


def test_the_recipe_trains_on_school_alone() -> None:
    recipe = load_recipe(ROOT / "benchmarks" / "offices.yaml")
    assert [path.name for path in recipe.knowledge.documents] == ["school"]
    asked = {stage.data.path.name for stage in recipe.trainings().values() if isinstance(stage.data, QuestionData)}
    assert asked == {"train.jsonl"}
