"""Reserved topics and tasks: out of the plan, and a set of their own that shares nothing with what is learned."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from typer.testing import CliRunner

import tiny
from raglan.cli import app
from raglan.corpus import Corpus, write_corpus
from raglan.decontaminate import EvaluationQuestions
from raglan.documents import read_examples
from raglan.errors import RecipeError
from raglan.recipe import Recipe
from raglan.records import Example
from raglan.synthesis import load_factors, make_plan, quotas, seed_of
from raglan.synthesis.endpoint.places import Library, Places
from raglan.synthesis.offline import CANNOT, Offline
from raglan.synthesis.plan import SCRATCH, reserved_of
from raglan.synthesis.reserve import FIRST, Reserved, own_shelf, reserved_plan, ties
from raglan.synthesis.run import synthesize
from raglan.synthesis.writing import Job, Shelf
from test_synthesis import CORPUS, files, recipe, show


def reserving(folder: Path, *, offline: bool = False, **settings: Any) -> Recipe:
    reserve = {name: settings.pop(name) for name in ("task", "topic") if name in settings} | {"n": settings.pop("some", 40)}
    languages = {"en": 2, "zh": 1} if offline else {"en": 1}
    return recipe(folder, reserve=reserve, **{"n": 300, "languages": languages, **settings})


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_what_is_reserved_is_in_no_training_cell_and_nothing_else_is_new(tmp_path: Path) -> None:
    asked = reserving(tmp_path, from_scratch=0.5, task=["how_to", "yes_no"], topic=["sports", "games/board_games"], some=41)
    learned, apart = make_plan(asked), reserved_plan(asked)
    values = reserved_of(asked)
    assert set(values["task"]) == {"how_to", "yes_no"}
    assert {value.partition("/")[0] for value in values["topic"]} == {"sports", "games"}
    assert all(value.startswith(("sports/", "games/board_games/")) for value in values["topic"])
    assert len(learned.cells) == 300
    assert not {cell.task for cell in learned.cells} & {*values["task"]}
    assert not {cell.topic for cell in learned.cells} & {*values["topic"]}
    tasks, topics = apart.cells[:21], apart.cells[21:]
    assert (len(tasks), len(topics)) == (21, 20)
    weights = [load_factors()["task"][name].weight for name in ("yes_no", "how_to")]
    assert Counter(cell.task for cell in tasks) == dict(zip(("yes_no", "how_to"), quotas(21, weights), strict=True))
    assert not {cell.topic for cell in tasks} & {*values["topic"]}
    assert {cell.topic for cell in topics} <= {*values["topic"]}
    assert not {cell.task for cell in topics} & {*values["task"]}
    assert {cell.source for cell in topics} == {SCRATCH}, "over a corpus no topic is heeded"
    assert {cell.source for cell in tasks} == {SCRATCH, "knowledge"}
    for factor in ("task", "topic", "retriever", "language", "relation", "k"):
        told = Counter(str(getattr(cell, factor)) for cell in apart.cells)
        assert told == {value: count for value, count in apart.margins[factor].items() if count}
    assert [cell.number for cell in apart.cells] == list(range(41))
    assert apart.cells[30].seed_for("x") == seed_of(apart.seed, 30, "x")
    assert not {cell.seed for cell in apart.cells} & {cell.seed for cell in learned.cells}


def test_a_number_is_drawn_by_the_seed_and_any_set_of_tasks_can_be_planned(tmp_path: Path) -> None:
    drawn = []
    for seed, count in enumerate([1, 2, 6, 6]):
        asked = reserving(tmp_path, task=count, some=17).model_copy(update={"seed": seed})
        plan = reserved_plan(asked)
        drawn.append({value for value, count in plan.margins["task"].items() if count})
        assert len(plan.cells) == 17
        assert len(reserved_of(asked)["task"]) == count
        assert drawn[-1] <= {*reserved_of(asked)["task"]}
    assert drawn[2] != drawn[3]


def test_what_cannot_be_reserved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="names 'juggling', which the plan would not have had"):
        make_plan(reserving(tmp_path, task=["juggling"]))
    with pytest.raises(RecipeError, match="names 'how_to'"):  # rules do not write it, so they cannot keep it out
        make_plan(reserving(tmp_path, task=["how_to"]), cannot=CANNOT)
    with pytest.raises(RecipeError, match="leaves no task"):
        make_plan(reserving(tmp_path, task=1, weights={"task": {"factoid": 1}}))
    for settings, why in (
        ({"topic": 1}, "needs from_scratch"), ({}, "neither"), ({"task": 0}, "neither"),
        ({"task": 1, "questions": "q.jsonl"}, "people asked"),
    ):  # fmt: skip
        with pytest.raises(ValidationError, match=why):
            reserving(tmp_path, **settings)


def test_without_it_a_plan_is_as_it_was(tmp_path: Path) -> None:
    plain, apart = recipe(tmp_path, n=300), reserving(tmp_path, task=1, offline=True)
    assert make_plan(plain).cells != make_plan(apart).cells
    assert apart.synthesis is not None
    none = apart.model_copy(update={"synthesis": apart.synthesis.model_copy(update={"reserve": None})})
    assert make_plan(none) == make_plan(plain)


# --- documents and jobs -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, CORPUS)
    return Corpus(folder)


def test_a_shelf_holds_for_rules_and_models(tmp_path: Path, corpus: Corpus) -> None:
    asked = reserving(tmp_path, task=["bridge"], offline=True, n=60, some=20)
    shelf = own_shelf(asked, corpus)
    assert shelf.only is not None
    assert len(shelf.only) == 20, "80 documents, 20 examples of 80"
    closed = Shelf(closed=shelf.only)
    plan = make_plan(asked, cannot=CANNOT)
    for one in (shelf, closed):
        rules = Offline(corpus, plan, shelf=one)
        read = {corpus[rows[0]].document for found in rules.source.documents.values() for rows in found}
        assert read == {name for name in {passage.document for passage in corpus} if one.visits(name)}
        library = Library(corpus, seed=1, shelf=one)
        assert {name for own in library.order.values() for name in own} == read
        linked = {link.first[0].document for links in rules.source.links.values() for link in links}
        asking = [passage for passage in corpus if passage.document not in one.closed]
        beside = {found.document for found in map(library.linked, asking) if found is not None}
        assert bool(linked & shelf.only) is (one is shelf), "documents that are closed are no second halves either"
        assert bool(beside & shelf.only) is (one is shelf)
    with pytest.raises(RecipeError, match="no document is left"):
        Library(corpus, seed=1, shelf=Shelf(only=frozenset()))


def test_its_brainstorms_are_others(tmp_path: Path) -> None:
    asked = reserving(tmp_path, from_scratch=1, task=["how_to"], some=300)
    plans = make_plan(asked), reserved_plan(asked)
    calls = [
        {(cell.topic, place.draw) for cell in plan.cells if (place := places.of(Job(cell)))}
        for plan, first in zip(plans, (0, FIRST), strict=True)
        for places in [Places(plan.cells, lambda task: "all", jobs=20, first=first)]
    ]
    assert {topic for topic, _ in calls[0]} & {topic for topic, _ in calls[1]}
    assert not calls[0] & calls[1]


def test_an_example_that_rests_on_a_reserved_document_is_rejected(tmp_path: Path, corpus: Corpus) -> None:
    asked = recipe(tmp_path, n=40)
    teacher = Offline(CORPUS, make_plan(asked, cannot=CANNOT))
    taken = {f"{language}{number}" for language in ("en", "zh") for number in range(0, 40, 4)}
    apart = Reserved(EvaluationQuestions("reserved", []), frozenset(("document", name) for name in taken), {"complete": True})
    done = synthesize(asked, teacher, show, corpus=corpus, reserved=apart)
    assert done.told["funnel"]["split: reserved"] > 5
    examples = read_examples(done.folder / "examples.jsonl")
    assert not {name for example in examples for _, name in ties(example, corpus)} & taken
    rejects = [json.loads(line) for line in (done.folder / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {one["detail"].partition(" ")[0] for one in rejects if one["reason"] == "reserved"} == {"document"}


def test_documents_and_jobs_tie_and_what_was_written_does_not(corpus: Corpus) -> None:
    passages = [
        {"id": "en1#0", "document": "en1", "role": "gold"}, {"id": "en2#1", "document": "en2", "role": "support"},
        {"id": "en3#0", "document": "en3", "role": "noise"}, {"id": "synth-1-0-passages-1", "document": "", "role": "gold"},
    ]  # fmt: skip
    synth = {"passages": passages, "withheld": [{"id": "en4#0", "document": "en4"}], "job": "A reader wants it."}
    example = Example("x", "?", (), ("en5#1",), metadata={"synth": synth})
    documents = {("document", f"en{number}") for number in (1, 2, 4, 5)}
    assert ties(example, corpus) == documents | {("job", "A reader wants it.")}


# --- from documents to figures ----------------------------------------------------------------------------------------


def raglan(*words: str, codes: tuple[int, ...] = (0,)) -> str:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code in codes, (done.output, done.exception)
    return done.stdout


def test_the_reserved_set_is_what_a_recipe_measures_with_a_retriever_unseen(tmp_path: Path) -> None:
    tiny.sentence_encoder(tmp_path / "encoder")
    letters = sorted({letter for passage in CORPUS for letter in passage.title + passage.text if letter > "~"})
    tiny.llama(tmp_path / "model", more=letters)
    rows = [{"id": passage.id, "title": passage.title, "text": passage.text} for passage in CORPUS]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tree = {
        "name": "apart", "seed": 3, "runs": "runs",
        "knowledge": {"path": "kb", "documents": "docs.jsonl", "chunk": None,
                      "indexes": {"bm25": {"kind": "bm25"}, "dense": {"kind": "dense"}},
                      "encoder": {"model": "encoder/encoder", "dtype": "float32"}},
        "generator": {"model": "model", "dtype": "float32"}, "retriever": {"index": "bm25", "k": 2},
        "prompt": {"max_tokens": 900}, "decode": {"kind": "concat", "max_new_tokens": 2},
        "synthesis": {
            "path": "data", "n": 24, "teacher": {"kind": "offline"}, "languages": {"en": 2, "zh": 1},
            "retrievers": {"bm25": 1, "dense": 0}, "passages": {"k": {3: 1}}, "reserve": {"task": ["numeric", "list"], "n": 8},
            "budget": {"tokenizer": "embedded", "max_length": 1024, "answer": 200},
        },
        "evaluate": {"questions": "data/reserved/test.jsonl", "modes": ["retrieved"], "k": [1], "metrics": ["em"],
                     "robustness": {"unseen": ["dense"], "noise": [], "ratios": [], "distractors": [], "orders": 0}},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    path, data = str(tmp_path / "recipe.yaml"), tmp_path / "data"
    raglan("build", path)
    planned = json.loads(raglan("synthesize", path, "--plan", "--json"))
    assert (planned["n"], planned["reserved"]["n"]) == (24, 8)
    assert sum(planned["reserved"]["margins"]["task"].values()) == 8
    told = raglan("synthesize", path, codes=(0, 3))
    manifests = [json.loads((folder / "manifest.json").read_text(encoding="utf-8")) for folder in (data, data / "reserved")]
    learned, apart = (read_examples(folder / "examples.jsonl") for folder in (data, data / "reserved"))
    assert told.startswith(f"reserved: 8 requested, {len(apart)} kept; task list, numeric\n24 requested, {len(learned)} kept")
    assert manifests[0]["reserved"]["kept"] == manifests[1]["kept"] == len(apart) >= 6
    assert {one.metadata["synth"]["factors"]["task"] for one in apart} == {"numeric", "list"}
    assert not {one.metadata["synth"]["factors"]["task"] for one in learned} & {"numeric", "list"}
    assert {one.metadata["split"] for one in apart} == {"test"}
    base = Corpus(next((tmp_path / "kb").rglob("passages.arrow")).parent)
    documents = [{name for one in some for _, name in ties(one, base)} for some in (learned, apart)]
    assert documents[0]
    assert documents[1]
    assert not documents[0] & documents[1]
    assert set(json.loads((data / "leakage.json").read_text(encoding="utf-8"))["sets"]) == {"reserved"}
    before = files(data)
    raglan("synthesize", path, codes=(0, 3))
    assert files(data) == before, "what is finished is left alone"
    measured = json.loads(raglan("evaluate", path, "evaluate.limit=2", "--json"))
    assert "dense" in json.dumps(measured["robustness"])
