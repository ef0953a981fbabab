"""Evidence: from a draft to a sheet. Positions, noise, the guard, gold absent, conflicts, budget, renderings, no leak."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer
from typer.testing import CliRunner

import tiny
from raglan.cli import app
from raglan.corpus import Corpus, write_corpus
from raglan.errors import CheckpointError, CorpusError, IndexMismatch, RecipeError
from raglan.knowledge import build_knowledge
from raglan.perturb import content_hash, held
from raglan.perturb.slot import KINDS, PALETTE
from raglan.prompt import Prompt
from raglan.recipe import PromptSettings, Recipe, SynthesisSettings, load_recipe
from raglan.records import Example, Hit, Passage
from raglan.refusals import abstained
from raglan.rendering import Rendering, read_rendering, render
from raglan.synthesis import make_plan, quotas
from raglan.synthesis.evidence import EVERYWHERE, Assembler, instruction, instructions
from raglan.synthesis.plan import Cell, seed_of
from raglan.synthesis.questions import Questions, open_questions
from raglan.synthesis.record import example_of
from raglan.synthesis.start import run
from raglan.synthesis.writing import Draft, Job, Made, Reject, Sheet
from raglan.text import words

MILLERS = [
    "Orla", "Casper", "Hedda", "Rufus", "Nella", "Ansel", "Greta", "Ivo", "Maren", "Tobias", "Edda", "Linus", "Berta", "Nora",
    "Pavel", "Silje", "Tove", "Ulf", "Vera", "Wim",
]  # fmt: skip
TOWNS = [
    "Aldmere", "Brackwell", "Corvin", "Dunsay", "Elmholt", "Farlow", "Garrick", "Hexley", "Isford", "Jarrow", "Keld", "Lorton",
    "Marden", "Nesfield", "Orby", "Penrith", "Quorn", "Ribton", "Selby", "Tarn",
]  # fmt: skip
BUILDERS = [f"{first} {last}son" for first, last in zip(MILLERS, reversed(MILLERS), strict=True)]
SHARES = [kind.weight for kind in PALETTE]
CITIES = ["青浦", "松江", "嘉定", "宝山", "闵行", "奉贤", "金山", "崇明"]


def documents() -> list[dict[str, str]]:
    rows = []
    for n, (town, builder) in enumerate(zip(TOWNS, BUILDERS, strict=True)):
        rows.append({
            "id": f"mill-{n}", "title": f"{town} mill",
            "text": f"The mill of {town} was built by the miller {builder} in {1700 + 7 * n}. It stands beside the river.",
        })  # fmt: skip
        rows.append(
            {"id": f"fair-{n}", "title": f"{town} fair", "text": f"{town} holds a fair each autumn; number {n} of its kind."}
        )
    for n, city in enumerate(CITIES):
        rows.append({"id": f"qiao-{n}", "title": f"{city}大桥", "text": f"{city}大桥于{1990 + n}年建成通车，全长{n + 2}公里。"})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evidence")
    (path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents()), encoding="utf-8")
    questions = [
        {"id": f"q{n}", "query": f"Who built the mill of {town}?", "answers": [builder], "relevant": [f"mill-{n}"]}
        for n, (town, builder) in enumerate(zip(TOWNS, BUILDERS, strict=True))
    ]
    (path / "who.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions), encoding="utf-8")
    tiny.sentence_encoder(path / "encoder")
    tiny.llama(path / "llama")
    build_knowledge(recipe(path).knowledge)
    return path


def recipe(folder: Path, *overrides: str, **synthesis: Any) -> Recipe:
    weights = {"relation": {"R1": 1}, "task": {"factoid": 1}, "answer_format": {"span": 1}, "query_format": {"wh_question": 1}}
    tree = {
        "name": "evidence", "seed": 5,
        "knowledge": {
            "path": "kb", "documents": "corpus.jsonl", "chunk": None,
            "encoder": {"model": "encoder/encoder", "dtype": "float32"},
            "indexes": {"bm25": {"kind": "bm25"}, "dense": {"kind": "dense"}},
        },
        "generator": {"model": str(folder / "llama"), "dtype": "float32"},
        "synthesis": {
            "path": "out", "n": 20, "questions": "who.jsonl", "weights": {**weights, "absent_policy": {"abstain": 1}},
            "retrievers": {"bm25": 1, "dense": 1, "pooled": 1}, "decontaminate": "none", "split": {},
            "passages": {"k": {3: 1, 5: 1}}, **synthesis,
        },
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return load_recipe(path, overrides)


@pytest.fixture(scope="module")
def assembler(folder: Path) -> Assembler:
    asked = recipe(folder)
    corpus = Assembler.open(asked).corpus
    teacher = open_questions(asked, corpus)
    return Assembler.open(asked, evidence=teacher.evidence, answers=teacher.answers)


def cell(**changes: Any) -> Cell:
    """A cell of a plain question with one gold passage among three."""
    plain = {
        "number": 0, "seed": seed_of(5, 0, "cell"), "task": "factoid", "relation": "R1", "answer_format": "span",
        "query_format": "wh_question", "topic": "news", "retriever": "bm25", "k": 3, "evidence": 1, "positions": (2,),
        "noise": ("hard", "random"), "language": "en", "source": "knowledge", "genre": "news", "length": "short",
        "clarity": "clear", "difficulty": "school", "tailness": "common", "persona": "pupil", "template": "question_last",
        "passage_form": "numbered", "passage_head": "title",
    }  # fmt: skip
    return Cell(**{**plain, **changes})


def draft(own: Assembler, one: Cell, *, town: int = 3, **changes: Any) -> Draft:
    gold = own.corpus[own.corpus.row(f"mill-{town}")]  # type: ignore[index]
    query, answers = f"Who built the mill of {TOWNS[town]}?", (BUILDERS[town],)
    return replace(Draft(Job(one), query, answers, (gold,)), **changes)


def shown(result: Sheet | Reject) -> Sheet:
    assert isinstance(result, Sheet), result
    return result


def test_a_corpus_that_is_too_small_is_refused_before_any_call_from_scratch_too(folder: Path) -> None:
    size = len(documents())
    for scratch, largest, written in ((0, size + 1, ""), (1, size + 3, ", beside 2 that are written")):
        asked = recipe(folder, from_scratch=scratch, passages={"k": {3: 1, largest: 1}})
        told = f"an example is to show {largest} passages, and the corpus has {size}{written}"
        with pytest.raises(CorpusError, match=f"^{told}"):
            Assembler.open(asked)
    Assembler.open(recipe(folder, from_scratch=1, passages={"k": {size + 2: 1}}))


def test_the_guard_counts_answers_that_nobody_named_beforehand(folder: Path) -> None:
    guard = Assembler.open(recipe(folder)).guard
    assert [guard.generic(name) for name in ("mill", "建成通车", TOWNS[0], f"{CITIES[0]}大桥")] == [True, True, False, False]


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_gold_stands_where_its_cell_says_and_noise_is_of_its_kinds(assembler: Assembler) -> None:
    one = cell(k=5, positions=(4,), noise=("hard", "random", "other_gold", "boilerplate"))
    sheet = shown(assembler.show(draft(assembler, one)))
    assert [slot.role for slot in sheet.slots].index("gold") == 3
    assert Counter(slot.kind for slot in sheet.slots) == Counter(["gold", *one.noise])
    hard = next(slot for slot in sheet.slots if slot.kind == "hard")
    assert (hard.retriever, hard.origin) == ("bm25", "search")
    assert hard.rank is not None
    assert hard.rank >= 2
    assert hard.score
    gold = sheet.slots[3]
    assert (gold.retriever, gold.rank) == ("bm25", 1), "gold keeps the rank that the retriever gave it"
    texts = [content_hash(slot.passage) for slot in sheet.slots]
    assert len(set(texts)) == 5


def test_equal_jobs_give_equal_sheets_whatever_else_was_asked(assembler: Assembler, folder: Path) -> None:
    drafts = [draft(assembler, cell(number=n, seed=seed_of(5, n, "cell")), town=n) for n in range(6)]
    there = [assembler.show(one) for one in drafts]
    asked = recipe(folder)
    teacher = open_questions(asked, assembler.corpus)
    other = Assembler.open(asked, evidence=teacher.evidence, answers=teacher.answers)
    back = [other.show(one) for one in reversed(drafts)][::-1]
    assert there == back
    again = assembler.show(replace(drafts[0], job=Job(drafts[0].job.cell, 1)))
    assert shown(again).slots != shown(there[0]).slots, "another attempt draws other noise"


def test_each_passage_of_a_pool_keeps_its_own_retriever(assembler: Assembler) -> None:
    one = cell(retriever="pooled", k=9, positions=(1,), noise=("hard",) * 8)
    found = {slot.retriever for slot in shown(assembler.show(draft(assembler, one))).slots if slot.kind == "hard"}
    assert found == {"bm25", "dense"}


def test_a_plan_deals_gold_evenly_and_shows_every_rare_kind(assembler: Assembler, folder: Path) -> None:
    plan = make_plan(recipe(folder, n=100, passages={"k": {5: 1}, "gold_absent": 0.2}))
    teacher = open_questions(recipe(folder, n=100), assembler.corpus)
    teacher.n, teacher.examples = 20, teacher.examples * 5
    sheets = [one.sheet for one in teacher.write([Job(c) for c in plan.cells], assembler.show) if isinstance(one, Made)]
    assert len(sheets) > 90
    places = Counter(n for sheet in sheets for n, slot in enumerate(sheet.slots, 1) if slot.role == "gold")
    planned = plan.margins["position k=5"]
    assert max(planned.values()) - min(planned.values()) <= 1
    assert sum(places.values()) >= sum(planned.values()) - (len(plan.cells) - len(sheets))
    kinds = Counter(slot.kind for sheet in sheets for slot in sheet.slots)
    lacking = {"counterfactual", "neighbour"}  # of one voice nothing is decidable, and no document here has two passages
    assert set(KINDS) - lacking <= set(kinds), "dealt example by example, the rare ones never come"
    assert all(len(sheet.slots) == 5 for sheet in sheets), "K never shrinks"


def test_all_eight_kinds_that_a_plan_deals_are_shown(folder: Path, tmp_path: Path) -> None:
    """Documents of two passages, and questions that two documents answer: no kind lacks what it is made from."""
    texts: dict[str, tuple[str, str, str]] = {}
    for n, (town, builder) in enumerate(zip(TOWNS, BUILDERS, strict=True)):
        built = f"In {1700 + 7 * n} the miller {builder} built {town} a mill."
        fair = f"{town} holds a fair each autumn; number {n} of its kind."
        texts[f"mill-{n}#0"] = f"mill-{n}", f"{town} mill", f"The mill of {town} was built by {builder} of {CITIES[n % 8]}."
        texts[f"mill-{n}#1"] = f"mill-{n}", f"{town} mill", f"Its wheel number {n} turned beside the river until the ice came."
        texts[f"chronicle-{n}#0"] = f"chronicle-{n}", "Chronicle", built
        texts[f"chronicle-{n}#1"] = f"chronicle-{n}", "Chronicle", fair
    write_corpus(tmp_path, [Passage(name, text, title, document) for name, (document, title, text) in texts.items()])
    corpus = Corpus(tmp_path)
    weights = {"relation": {"R1": 1, "R3": 2}, "task": {"factoid": 1}, "answer_format": {"span": 1}}
    weights |= {"query_format": {"wh_question": 1}, "absent_policy": {"abstain": 1}}
    asked = recipe(folder, n=60, weights=weights, retrievers={"bm25": 1}, passages={"k": {5: 1}, "gold_absent": 0.2})
    plan = make_plan(asked)
    questions = [
        Example(f"q{n}", f"Who built the mill of {town}?", (BUILDERS[n],), (f"mill-{n}#0", f"chronicle-{n}#0"))
        for n, town in enumerate(TOWNS)
    ]
    teacher = Questions(questions * 3, corpus, n=60, seed=5)
    assert asked.synthesis is not None
    own = Assembler(
        corpus, {"bm25": ByWords(corpus)}, asked.synthesis, AutoTokenizer.from_pretrained(str(folder / "llama")),
        evidence=teacher.evidence, answers=teacher.answers,
    )  # fmt: skip
    made = [one for one in teacher.write([Job(c) for c in plan.cells], own.show) if isinstance(one, Made)]
    assert len(made) == 60
    dealt = Counter(kind for one in made for kind in one.sheet.draft.job.cell.noise)
    seen = Counter(slot.kind for one in made for slot in one.sheet.slots if slot.kind != "gold")
    assert dealt == Counter(plan.margins["noise"])
    assert set(seen) == set(dealt) == set(KINDS)
    for kind in KINDS:  # what has nothing left gives its slot to one of the common kinds
        assert seen[kind] >= dealt[kind] / 2, (kind, dealt, seen)
    for one in made:
        alone = {kind for kind, some in zip(KINDS, quotas(len(one.sheet.draft.job.cell.noise), SHARES), strict=True) if some}
        assert not {"counterfactual", "garbled", "boilerplate"} & alone, "dealt example by example they never come"


class ByWords:
    """Ranks by how many words a passage shares with the question, the earlier one first."""

    def __init__(self, corpus: Corpus):
        self.corpus = corpus

    def retrieve(self, queries: Sequence[str], k: int) -> list[tuple[Hit, ...]]:
        return [self._hits(set(words(query)), k) for query in queries]

    def _hits(self, asked: set[str], k: int) -> tuple[Hit, ...]:
        shared = [len(asked & set(words(passage.text))) for passage in self.corpus]
        rows = sorted(range(len(shared)), key=lambda row: -shared[row])[:k]
        return tuple(Hit(self.corpus[row], row, float(shared[row]), rank) for rank, row in enumerate(rows, 1))


def test_noise_that_answers_counts_as_support_or_gives_way(assembler: Assembler) -> None:
    twin = Passage("written", f"{BUILDERS[3]} built it, as everyone in {TOWNS[3]} knows.")
    lure = Passage("lure", f"The mill of {TOWNS[3]} was painted red last year by pupils.")
    sheet = shown(assembler.show(draft(assembler, cell(), beside=(twin, lure))))
    assert "written" not in {slot.passage.id for slot in sheet.slots}, "it answers, so it is no noise"
    placed = next(slot for slot in sheet.slots if slot.passage.id == "lure")
    assert (placed.role, placed.kind, placed.operator, placed.guard) == ("noise", "hard", "written", "clean")
    assert len(sheet.slots) == 3


# --- the round trip ---------------------------------------------------------------------------------------------------


class Finds:
    """Every passage of the corpus, `name` at this rank; at rank 0 nothing at all."""

    def __init__(self, corpus: Corpus, name: str, rank: int):
        rows = [row for row, passage in enumerate(corpus) if passage.id != name]
        rows.insert(rank - 1, corpus.row(name))  # type: ignore[arg-type]
        self.hits = tuple(Hit(corpus[row], row, 100.0 - at, at) for at, row in enumerate(rows, 1)) if rank else ()
        self.asked: list[int] = []

    def retrieve(self, queries: Sequence[str], k: int) -> list[tuple[Hit, ...]]:
        self.asked.append(k)
        return [self.hits[:k] for _ in queries]


def tripping(own: Assembler, folder: Path, ranks: dict[str, int], trip: dict[str, Any] | None) -> Assembler:
    """The same evidence by retrievers that find mill-3 at these ranks."""
    settings = recipe(folder, retrievers=dict.fromkeys(ranks, 1), verify={"round_trip": trip}).synthesis
    assert settings is not None
    finders = {name: Finds(own.corpus, "mill-3", rank) for name, rank in ranks.items()}
    return Assembler(own.corpus, finders, settings, own.prompt.tokenizer, evidence=own.evidence, answers=own.answers)


@pytest.mark.parametrize(
    ("ranks", "depth", "lost"),
    [
        ({"bm25": 1, "dense": 0}, 40, False), ({"bm25": 40, "dense": 0}, 40, False), ({"bm25": 41, "dense": 0}, 40, True),
        ({"bm25": 0, "dense": 40}, 40, False), ({"bm25": 0, "dense": 41}, 40, True), ({"bm25": 6, "dense": 9}, 5, True),
    ],
)  # fmt: skip
def test_a_question_has_to_find_its_passages_again(
    assembler: Assembler, folder: Path, ranks: dict[str, int], depth: int, lost: bool
) -> None:
    own = tripping(assembler, folder, ranks, {"depth": depth})
    for one in (cell(), cell(**ABSENT)):  # where gold is withheld a question is as clear as elsewhere
        assert ("unreachable" in shown(own.show(draft(own, one))).seen) is lost
    none = tripping(assembler, folder, ranks, {"depth": depth, "kept": 0}).show(draft(own, cell()))
    assert (getattr(none, "step", ""), getattr(none, "reason", "")) == (("show", "unreachable") if lost else ("", ""))
    never = tripping(assembler, folder, ranks, None)
    assert "unreachable" not in shown(never.show(draft(never, cell()))).seen
    made = replace(draft(own, cell()), gold=(Passage("made", f"The mill was built by {BUILDERS[3]}."),))
    assert "unreachable" not in shown(own.show(made)).seen, "what was written for the question is in no index"


def test_only_what_is_not_at_hand_is_searched_for_deeper(assembler: Assembler, folder: Path) -> None:
    for rank, depths in ((30, [30]), (31, [30, 40])):
        own = tripping(assembler, folder, {"bm25": rank}, {"depth": 40})
        own.show(draft(own, cell()))
        assert own.retrievers["bm25"].asked == depths  # type: ignore[attr-defined]


# --- gold absent ------------------------------------------------------------------------------------------------------

ABSENT = {
    "relation": "R5",
    "evidence": 0,
    "positions": (),
    "noise": ("hard", "neighbour", "random"),
    "absent_policy": "abstain",
}


@pytest.mark.parametrize("form", ["numbered", "titled", "xml", "json", "bare"])
def test_without_gold_no_answer_stands_anywhere_in_what_is_rendered(assembler: Assembler, form: str) -> None:
    for town in range(len(TOWNS)):
        one = draft(assembler, cell(number=town, seed=seed_of(5, town, "cell"), passage_form=form, **ABSENT), town=town)
        sheet = shown(assembler.show(one))
        assert all(slot.role == "noise" for slot in sheet.slots)
        assert not {slot.kind for slot in sheet.slots} & {"counterfactual", "near_duplicate", "garbled", "gold"}
        assert not held(Passage("", sheet.prompt), one.answers)
        assert len(sheet.slots) == 3


@pytest.mark.parametrize("language", ["en", "zh"])
def test_what_a_user_or_teacher_names_is_no_template(assembler: Assembler, language: str) -> None:
    labels = ("{fields}", "{passages}", "{question}", "{history}", "{instruction}", "是{", "%s")
    one = cell(answer_format="json", language=language, task="classification")
    sheet = shown(assembler.show(draft(assembler, one, labels=labels, fields=("{labels}", "名称"), history=("Is it old?",))))
    between = ", " if language == "en" else "、"
    assert between.join(labels) in sheet.instruction
    assert between.join(("{labels}", "名称")) in sheet.instruction
    assert sheet.instruction in sheet.prompt
    assert all(sheet.prompt.count(slot.passage.text) == 1 for slot in sheet.slots)
    assert sheet.prompt.count("Is it old?") == 1


def test_an_answer_that_the_rendering_itself_brings_in_is_caught(assembler: Assembler) -> None:
    one = draft(assembler, cell(**ABSENT), query="How many bells has the mill?", answers=("2",))
    refused = assembler.show(one)
    assert isinstance(refused, Reject)
    assert (refused.step, refused.reason, refused.detail) == ("show", "answer_shown", "2"), "[2] is a passage's number"
    assert isinstance(assembler.show(replace(one, job=Job(cell(**{**ABSENT, "passage_form": "bare"})))), Sheet)


def test_a_part_that_is_there_may_hold_its_answer(assembler: Assembler) -> None:
    gold = tuple(assembler.corpus[assembler.corpus.row(f"mill-{n}")] for n in (3, 4))  # type: ignore[index]
    one = cell(
        **{**ABSENT, "absent_policy": "partial", "evidence": 1, "positions": (1,), "noise": ("hard", "random"), "task": "list"}
    )
    sheet = shown(assembler.show(draft(assembler, one, gold=gold, answers=(BUILDERS[3], BUILDERS[4]))))
    assert [slot.passage.id for slot in sheet.slots if slot.role == "gold"] == ["mill-3"]
    assert BUILDERS[4] not in sheet.prompt


def test_the_policy_is_said_and_says_nothing_of_the_passages(assembler: Assembler) -> None:
    said = {
        policy: {text for language in ("en", "zh") for text in instructions()["absent_policy"][policy][language]}
        for policy in ("abstain", "own_knowledge", "partial")
    }

    def policies(sheet: Sheet) -> set[str]:
        return {name for name, wordings in said.items() if any(words in sheet.prompt for words in wordings)}

    for policy in said:
        one = cell(**{**ABSENT, "absent_policy": policy, "task": "list"})
        assert policies(shown(assembler.show(draft(assembler, one)))) == {policy}
    shares = {"abstain": 0.8, "own_knowledge": 0.1, "partial": 0.1}
    told: Counter[str] = Counter()
    for number in range(400):
        job = Job(cell(number=number, seed=seed_of(5, number, "cell"), task="list"))
        text = instruction(replace(draft(assembler, cell()), job=job), policies=shares)
        told.update(name for name, wordings in said.items() if any(words in text for words in wordings))
    assert {name: count / 400 for name, count in told.items()} == pytest.approx(shares, abs=0.05)


# --- what contradicts -------------------------------------------------------------------------------------------------


def test_a_conflict_of_one_passage_gets_its_twin(assembler: Assembler) -> None:
    one = cell(relation="R6", task="conflict_resolution", evidence=2, positions=(1, 3), noise=("hard",), k=3)
    sheet = shown(assembler.show(draft(assembler, one)))
    true, false = (next(slot for slot in sheet.slots if slot.kind == kind) for kind in ("gold", "counterfactual"))
    assert {sheet.slots.index(true), sheet.slots.index(false)} == {0, 2}
    assert false.value in false.passage.text
    assert not held(false.passage, (BUILDERS[3],)), "no alias of the truth is left"
    assert any(words in sheet.prompt for words in instructions()["conflict"]["en"])


def test_an_outdated_passage_is_older_than_the_one_that_holds(assembler: Assembler) -> None:
    one = cell(relation="R7", task="temporal", evidence=2, positions=(1, 2), noise=("random",), k=3)
    sheet = shown(assembler.show(draft(assembler, one)))
    now, then = (next(slot for slot in sheet.slots if slot.kind == kind) for kind in ("gold", "outdated"))
    years = [int(slot.passage.text.partition("in ")[2][:4]) for slot in (now, then)]
    assert years[0] > years[1]
    assert held(now.passage, (BUILDERS[3],))
    assert not held(then.passage, (BUILDERS[3],))
    example = example_of(Made(sheet, "Ansel"), teacher="none", corpus=assembler.corpus)
    assert example.relevant == ("mill-3",), "dated, it is still the corpus' own passage"
    refused = assembler.show(draft(assembler, one, answers=("whatever it was",)))
    assert isinstance(refused, Reject)
    assert refused.reason == "no_false_value"


def test_two_passages_of_the_teacher_are_taken_as_they_are(assembler: Assembler) -> None:
    pair = (Passage("a", "The mill burnt in 1801.", "", "one"), Passage("b", "The mill burnt in 1807.", "", "two"))
    one = cell(relation="R6", task="conflict_resolution", evidence=2, positions=(1, 2), noise=("random",), k=3)
    sheet = shown(assembler.show(draft(assembler, one, gold=pair, answers=("1801",))))
    assert {slot.passage.id for slot in sheet.slots if slot.role == "gold"} == {"a", "b"}


# --- budget and prompt ------------------------------------------------------------------------------------------------


def small(folder: Path, tokens: int) -> Assembler:
    return Assembler.open(recipe(folder, budget={"max_length": tokens + 16, "answer": 16}))


def test_gold_stays_whole_and_what_does_not_fit_is_left_out_whole(assembler: Assembler, folder: Path) -> None:
    one = cell(k=5, positions=(5,), noise=("hard",) * 4)
    whole = shown(assembler.show(draft(assembler, one)))
    tokens = len(assembler.prompt.tokenizer(whole.prompt)["input_ids"])
    tight = small(folder, tokens - 20)
    sheet = shown(tight.show(draft(tight, one)))
    assert [slot.passage.id for slot in sheet.slots] == [whole.slots[n].passage.id for n in (0, 1, 2, 4)], (
        "from the end, gold stays"
    )
    assert sheet.seen["left_out"] == 1
    assert len(tight.prompt.tokenizer(sheet.prompt)["input_ids"]) <= tokens - 20
    for slot in sheet.slots:
        assert slot.passage.text in sheet.prompt
    assert sheet.prompt.count(one_query := draft(tight, one).query) == 1, one_query


def test_gold_or_question_without_room_is_over_budget(assembler: Assembler, folder: Path) -> None:
    tight = small(folder, 230)
    refused = tight.show(draft(tight, cell(), history=("word " * 80,)))
    assert isinstance(refused, Reject)
    assert refused.reason == "over_budget"
    refused = tight.show(draft(tight, cell(), query="Who? " * 80))
    assert isinstance(refused, Reject)
    assert refused.reason == "over_budget"


def test_where_no_passage_has_room_there_is_no_example(assembler: Assembler, folder: Path) -> None:
    one = cell(**{**ABSENT, "k": 1, "noise": ("hard",)})
    sheet = shown(assembler.show(draft(assembler, one)))
    tokens = len(assembler.prompt.tokenizer(sheet.prompt)["input_ids"])
    tight = small(folder, tokens - 1)
    refused = tight.show(draft(tight, one))
    assert isinstance(refused, Reject)
    assert refused.reason == "over_budget"


def test_evidence_of_equal_words_counts_once(assembler: Assembler) -> None:
    one = cell(k=5, relation="R3", evidence=2, positions=(1, 2), noise=("random",) * 3)
    plain = draft(assembler, one)
    copy = replace(plain.gold[0], id="copy", document="copy")
    refused = assembler.show(replace(plain, gold=(plain.gold[0], copy)))
    assert isinstance(refused, Reject)
    assert refused.reason == "too_little_evidence"


def test_no_byte_of_a_prompt_tells_roles_draft_or_what_is_not_shown(assembler: Assembler) -> None:
    words = [*KINDS, "guard", "also_gold", "answer_string_only", "redundant", "swap", "~", "bm25", "FACT-OF-THE-DRAFT"]
    words.remove("hard")
    words.remove("random")
    for number, (form, head, template) in enumerate(_renderings()):
        one = cell(
            number=number, seed=seed_of(5, number, "cell"), passage_form=form, passage_head=head, template=template, k=5,
            positions=(1 + number % 5,), noise=("hard", "near_duplicate", "garbled", "boilerplate"),
        )  # fmt: skip
        told = draft(assembler, one, facts=("FACT-OF-THE-DRAFT",), about="job-9", seen={"form": "cloze-form"})
        sheet = shown(assembler.show(told))
        assert not [word for word in [*words, "cloze-form", "job-9", " gold", "noise"] if word in sheet.prompt]
        hidden = [row["text"] for row in documents() if row["id"] not in {slot.passage.id for slot in sheet.slots}]
        kept = {slot.parents for slot in sheet.slots}
        assert not [text for text in hidden if text in sheet.prompt], kept


def _renderings() -> list[tuple[str, str, str]]:
    told = yaml.safe_load((Path(render.__code__.co_filename).parent / "renderings.yaml").read_text(encoding="utf-8"))
    forms, heads, templates = (list(told[name]) for name in ("forms", "heads", "templates"))
    assert len(templates) >= 7
    return [(forms[n % len(forms)], heads[n % len(heads)], templates[n % len(templates)]) for n in range(20)]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_prompt_ids_are_a_prefix_of_what_is_learned_for_every_template(folder: Path, language: str) -> None:
    from raglan.generator import open_generator
    from raglan.recipe import GeneratorSettings

    generator = open_generator(GeneratorSettings(model=str(folder / "llama"), dtype="float32"), PromptSettings())
    passages = [Passage("a", "The tower is 12 high.", "Tower", "doc"), Passage("b", "青浦大桥", "桥", "doc2")]
    seen = set()
    for form, head, template in _renderings():
        rendering = Rendering(template, form, head, language)
        asked = render(generator.prompt, rendering, "How high?", passages, instruction="Say it.", history=("before",))
        row = generator.row(asked, "12")
        own = generator.prompt.opened(asked.text)
        assert row["input_ids"] == own
        assert asked.text.index("before") < asked.text.rindex("How high?")
        assert read_rendering(rendering.record(), where="x") == rendering
        seen.add(asked.text)
    assert len(seen) == 20


def test_words_that_changed_since_are_refused_with_both_fingerprints() -> None:
    record = Rendering().record()
    with pytest.raises(CheckpointError, match=rf"0000.*{record['fingerprint']}"):
        read_rendering({**record, "fingerprint": "0000"}, where="example 1")
    with pytest.raises(RecipeError, match="no rendering has template 'sideways'"):
        Rendering("sideways")


def test_json_is_json() -> None:
    prompt = Prompt(PromptSettings(), tiny.tokenizer(), layout="joined")
    passages = [Passage("a", 'He said "no".\nTwice.', "T", "d"), Passage("b", "b")]
    text = render(prompt, Rendering("brief", "json", "title"), "Q?", passages, instruction="I.").text
    assert json.loads(text[text.index("[") : text.rindex("]") + 1]) == [
        {"id": 1, "source": "T", "text": 'He said "no".\nTwice.'},
        {"id": 2, "text": "b"},
    ]


def test_a_date_is_shown_where_all_evidence_has_one(assembler: Assembler) -> None:
    dated = Passage("d", f"The mill of Elmholt was built by {BUILDERS[3]}.", "Elmholt (1)", "log", date="2019-05-01")
    bare = replace(dated, id="b", date="")
    one = cell(passage_head="title_date", k=1, positions=(1,), noise=())
    sheet = shown(assembler.show(draft(assembler, one, gold=(dated,))))
    assert "[1] Elmholt (1) (2019-05-01)\n" in sheet.prompt
    assert "[1] Elmholt (1)\n" in shown(assembler.show(draft(assembler, one, gold=(bare,)))).prompt
    kept = example_of(Made(sheet, BUILDERS[3]), teacher="t").metadata["synth"]
    again = Passage("d", kept["passages"][0]["text"], kept["passages"][0]["title"], date=kept["passages"][0]["date"])
    rendering = read_rendering(kept["rendering"], where="x")
    text = render(assembler.prompt, rendering, "Q?", [again], instruction=kept["instruction"]).text
    assert "Elmholt (1) (2019-05-01)" in text
    mixed = Rendering("brief", "titled", "title_date").set([dated, bare, replace(dated, title="")])
    assert [one.text.splitlines()[0] for one in mixed] == ["Elmholt (1) (2019-05-01)", "Elmholt (1)", "(2019-05-01)"]
    undocumented = Rendering("brief", "titled", "title_url").set([replace(bare, document="", title="print()")])
    assert undocumented[0].text.startswith("print()\n"), "only what is empty is left out"


def test_a_date_stands_neither_for_nothing_nor_against_what_is_dated_here(assembler: Assembler) -> None:
    gold = replace(assembler.corpus[assembler.corpus.row("mill-3")], date="2001-02-03")  # type: ignore[index, type-var]
    one = cell(relation="R7", task="temporal", evidence=2, positions=(1, 2), noise=("random",), passage_head="title_date")
    sheet = shown(assembler.show(draft(assembler, one, gold=(gold,))))
    years = {slot.passage.date for slot in sheet.slots if slot.kind in ("gold", "outdated")}
    assert len(years) == 2
    assert "2001-02-03" not in sheet.prompt
    assert all(f"({year})" in sheet.prompt for year in years)
    conflict = cell(relation="R6", task="conflict_resolution", evidence=2, positions=(1, 3), noise=("hard",))
    twins = shown(assembler.show(draft(assembler, conflict, gold=(gold,)))).slots
    assert {slot.passage.date for slot in twins if slot.kind in ("gold", "counterfactual")} == {"2001-02-03"}


def test_half_a_character_cannot_be_shown(assembler: Assembler) -> None:
    refused = assembler.show(draft(assembler, cell(), facts=("a \ud83d",)))
    assert isinstance(refused, Reject)
    assert (refused.step, refused.reason) == ("show", "half_character")


def test_chinese_cells_are_put_in_chinese(assembler: Assembler) -> None:
    gold = assembler.corpus[assembler.corpus.row("qiao-0")]  # type: ignore[index]
    one = draft(assembler, cell(language="zh", **ABSENT), query="青浦大桥哪一年通车？", answers=("1990年",), gold=(gold,))
    sheet = shown(assembler.show(one))
    assert "问题：青浦大桥哪一年通车？" in sheet.prompt
    assert any(words in sheet.prompt for words in instructions()["absent_policy"]["abstain"]["zh"])
    assert not held(Passage("", sheet.prompt), ("1990年",))


# --- what stops a run -------------------------------------------------------------------------------------------------


class Broken:
    """Finds the same for everything."""

    def __init__(self, corpus: Corpus):
        self.corpus = corpus

    def retrieve(self, queries: Sequence[str], k: int) -> list[tuple[Hit, ...]]:
        return [tuple(Hit(self.corpus[row], row, 1.0, row + 1) for row in range(k)) for _ in queries]


def test_a_retriever_that_finds_the_same_for_everything_stops_the_run(assembler: Assembler) -> None:
    settings = assembler.settings.model_copy(update={"retrievers": None})
    broken = Assembler(assembler.corpus, {"bm25": Broken(assembler.corpus)}, settings, assembler.prompt.tokenizer)
    for town in range(3):
        broken.show(draft(broken, cell(number=town), town=town))
    with pytest.raises(IndexMismatch, match="'bm25' finds the same"):
        broken.show(draft(broken, cell(number=3), town=4))


def test_a_corpus_smaller_than_k_is_told_before_anything_is_shown(tmp_path: Path, assembler: Assembler) -> None:
    write_corpus(tmp_path / "few", [Passage(f"p{n}", f"text {n}") for n in range(4)])
    corpus = Corpus(tmp_path / "few")
    with pytest.raises(CorpusError, match="is to show 5 passages, and the corpus has 4"):
        Assembler(corpus, {}, assembler.settings, assembler.prompt.tokenizer)
    settings = SynthesisSettings.model_validate({"path": tmp_path, "n": 1, "passages": {"k": {4: 1}}})
    few = Assembler(corpus, {"bm25": Broken(corpus)}, settings, assembler.prompt.tokenizer)
    written = Passage("w", "Orla built it.")
    refused = few.show(Draft(Job(cell(k=6, noise=("random",) * 5)), "Who built it?", ("Orla",), (written,)))
    assert isinstance(refused, Reject)
    assert refused.reason == "too_few_passages"


def test_less_gold_than_the_relation_needs_is_refused(assembler: Assembler) -> None:
    refused = assembler.show(draft(assembler, cell(relation="R3", evidence=2, positions=(1, 2), noise=("hard",))))
    assert isinstance(refused, Reject)
    assert refused.reason == "too_little_evidence"


# --- questions that people asked --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    path = run(recipe(folder, n=20, passages={"k": {3: 1}, "gold_absent": 0.25})).folder
    return path, [json.loads(line) for line in (path / "examples.jsonl").read_text(encoding="utf-8").splitlines()]


def test_questions_get_evidence_as_any_example_does(written: tuple[Path, list[dict[str, Any]]], folder: Path) -> None:
    path, rows = written
    told = json.loads((path / "manifest.json").read_text())
    assert told["kept"] == len(rows) == 20
    assert told["teacher"] == "people"
    absent = [row for row in rows if "policy" in row["synth"]]
    assert len(absent) == 5
    assert all("text" not in one for row in absent for one in row["synth"]["withheld"]), "the corpus has it"
    for row in rows:
        synth = row["synth"]
        gold = [one for one in synth["passages"] if one["role"] == "gold"]
        if row in absent:
            assert not gold
            assert not row["relevant"]
            assert synth["withheld"][0]["id"].startswith("mill-")
            assert abstained(synth["target"], row["answers"])
        else:
            assert synth["target"] == row["answers"][0]
            assert [one["id"] for one in gold] == row["relevant"]
    assert len({row["query"] for row in rows}) == 20
    stamp = (path / "manifest.json").stat().st_mtime_ns
    assert run(recipe(folder, n=20, passages={"k": {3: 1}, "gold_absent": 0.25})).folder == path
    assert (path / "manifest.json").stat().st_mtime_ns == stamp
    with pytest.raises(CheckpointError, match="of other settings"):
        run(recipe(folder, n=19, passages={"k": {3: 1}, "gold_absent": 0.25}))


def test_a_second_run_at_once_waits_for_the_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = recipe(folder, n=8, path="at-once", passages={"k": {3: 1}, "gold_absent": 0})
    show, shown, second = Assembler.show, [], []

    def another_meanwhile(self: Assembler, draft: Draft) -> Sheet | Reject:
        if not second:
            second.append(pool.submit(run, asked))
            while "waiting for it" not in caplog.text:
                assert not second[0].done()
                time.sleep(0.01)
        shown.append(draft)
        return show(self, draft)

    monkeypatch.setattr(Assembler, "show", another_meanwhile)
    with ThreadPoolExecutor() as pool:
        done = run(asked)
    assert second[0].result().told["funnel"] == done.told["funnel"], "it finds the dataset made"
    assert done.told["kept"] == len((done.folder / "examples.jsonl").read_text(encoding="utf-8").splitlines()) == 8
    assert len(shown) == done.told["attempts"]
    assert not list(done.folder.glob("*.part"))


def test_the_command_line_shows_questions(folder: Path) -> None:
    recipe(folder, n=3, path="told", passages={"k": {3: 1}, "gold_absent": 0})
    runner = CliRunner()
    done = runner.invoke(app, ["synthesize", str(folder / "recipe.yaml")])
    assert (done.exit_code, done.stdout.partition(",")[0]) == (0, "3 requested")
    recipe(folder, n=25, path="short", passages={"k": {3: 1}, "gold_absent": 0})
    done = runner.invoke(app, ["synthesize", str(folder / "recipe.yaml")])
    assert (done.exit_code, done.stdout.split(",")[:2]) == (3, ["25 requested", " 20 kept"]), "consistent, and short"
    assert len((folder / "short" / "rejects.jsonl").read_text().splitlines()) == 15, "five cells, tried three times"
    told = runner.invoke(app, ["synthesize", str(folder / "recipe.yaml"), "synthesis.questions=null"])
    assert isinstance(told.exception, RecipeError)
    assert "names no teacher" in str(told.exception)


def test_a_plan_of_what_no_question_is_is_refused(folder: Path, assembler: Assembler) -> None:
    asked = recipe(folder, weights={"task": {"summary": 1}, "answer_format": "fit", "query_format": "fit"})
    with pytest.raises(RecipeError, match="task 'summary', which no question of people is"):
        open_questions(asked, assembler.corpus)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_wording_of_an_abstention_is_known_as_one(language: str) -> None:
    wordings = instructions()["abstentions"][language]
    assert len(wordings) >= 8
    for wording in wordings:
        for missing in instructions()["missing"][language].values():
            text = wording.format(missing=missing)
            assert abstained(text), text


def test_questions_left_over_are_for_second_attempts(assembler: Assembler, folder: Path) -> None:
    asked = recipe(folder)
    teacher = open_questions(
        asked.model_copy(update={"synthesis": asked.synthesis.model_copy(update={"n": 12})}), assembler.corpus
    )  # type: ignore[union-attr]
    show: Callable[[Draft], Sheet | Reject] = assembler.show
    first, second = (next(teacher.write([Job(cell(number=0), ordinal)], show)) for ordinal in (0, 1))
    assert isinstance(first, Made)
    assert isinstance(second, Made)
    assert first.sheet.draft.query != second.sheet.draft.query
    last = next(teacher.write([Job(cell(number=9), 1)], show))
    assert isinstance(last, Reject)
    assert last.reason == "no_question_left"
    assert set(Questions.cannot(teacher)["task"]) == {*_tasks()} - {"factoid"}


def _tasks() -> list[str]:
    from raglan.synthesis import load_factors

    return load_factors()["task"].names


def test_a_judge_that_says_yes_to_everything_is_not_paid_on_and_on(folder: Path) -> None:
    asked: list[str] = []

    def judge(says: bool) -> Assembler:
        return Assembler.open(recipe(folder, found="replace"), judge=lambda _, passage: (asked.append(passage.id), says)[1])

    never = judge(says=True)
    draft = Draft(Job(cell()), "What is told of the mills?", (), (never.corpus[0],))
    for _ in range(2):
        asked.clear()
        end = never.show(draft)
        assert isinstance(end, Reject)
        assert (end.reason, len(set(asked))) == ("answered_everywhere", EVERYWHERE)
    assert isinstance(judge(says=False).show(draft), Sheet)


def test_what_answers_and_stays_as_support_is_no_reason_to_give_a_wide_sheet_up(folder: Path) -> None:
    wide = cell(k=20, noise=("hard", "random", *["random"] * 17))
    own = Assembler.open(recipe(folder), judge=lambda *_: True)
    draft = Draft(Job(wide), "What is told of the mills?", (), (own.corpus[0],))
    sheet = shown(own.show(draft))
    roles = [slot.role for slot in sheet.slots]
    assert roles.count("support") > EVERYWHERE, "relabelled, each in its place"
    absent = replace(wide, relation="R5", evidence=0, positions=(), noise=("random",) * 20, absent_policy="abstain")
    end = own.show(replace(draft, job=Job(absent)))
    assert isinstance(end, Reject)
    assert end.reason == "answered_everywhere", "where gold is absent none of them has a place"
