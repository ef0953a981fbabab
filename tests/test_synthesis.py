"""The offline teacher and the driver: exact numbers, equal bytes in any order, losses that are told, nothing that leaks."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import tiny
from raglan.artifact import fingerprint, read_manifest, write_manifest
from raglan.cli import app
from raglan.documents import read_examples
from raglan.errors import CallsStopped, CheckpointError, CorpusError, RecipeError
from raglan.perturb import Slot, content_hash, garbled, gold_slots, held
from raglan.recipe import Recipe, SynthesisSettings
from raglan.records import Example, Passage
from raglan.splits import read_split
from raglan.synthesis import Plan, make_plan, shown_noise
from raglan.synthesis.checked import written_of
from raglan.synthesis.offline import CANNOT, IGNORES, Offline
from raglan.synthesis.offline.gaps import overlap, window
from raglan.synthesis.offline.spans import language_of, spans
from raglan.synthesis.run import Done, _content, synthesize
from raglan.synthesis.writing import Draft, Job, Made, Reject, Sheet, Show
from raglan.synthesis_tables import synthesis_tables
from raglan.text import content_terms
from raglan.verification import Verified, Verifier, Written

GIVEN, FAMILY = ["Abel", "Ines", "Casimir", "Dorcas", "Hester"], ["Norstrand", "Morrowick", "Thole", "Plimmery", "Vanbrook"]
FIRST, SECOND = ["Port", "Great", "Upper", "Little"], ["Halloran", "Brough", "Marrowby", "Skerrow", "Pellworth"]
NAMES, RIVERS = ["陈望道", "李文清", "周树德", "吴怀远", "郑国安", "孙立人"], "清白黄黑赤蓝金银青紫"


def english(number: int) -> list[Passage]:
    """Two passages of a document; each town stands in those of two or three, so that there is something to link."""
    who, other = (f"{GIVEN[n % 5]} {FAMILY[n // 5 % 5]}" for n in (number, number + 7))
    town = f"{FIRST[number // 2 % 4]} {SECOND[number // 8]}"
    title = f"Harbour Mill {number}"
    first = (
        f"{town} is the parish whose southern quay holds the stone building. The merchant {who} opened the mill in "
        f"{1700 + number} after a long quarrel with the guild of bakers. Its great wheel measured {11 + number} metres across "
        f"and turned day and night. A second wheel was added in {1760 + number} by the impatient heirs of the founder."
    )
    second = (
        f"In {1850 + number} a violent fire destroyed the upper floors and the roof of the mill. The engineer {other} rebuilt "
        f"the walls within {20 + number} months for the council of {town}. Every autumn some {300 + 7 * number} visitors "
        "climb the narrow stairs to watch the herring boats come home."
    )
    texts = (first, second)
    return [
        Passage(f"en{number}#{n}", text, title, f"en{number}", 1000 * n, 1000 * n + len(text)) for n, text in enumerate(texts)
    ]


def chinese(number: int) -> list[Passage]:
    who, paper = NAMES[number % 6], f"《{RIVERS[number // 4]}江日报》"
    title = f"青浦{number}号大桥"
    first = (
        f"{title}是横跨清水河的一座公路桥梁。大桥于{1950 + number}年建成通车，连接了东岸的工厂和西岸的学校。"
        f"全桥共有{20 + number}座桥墩，由工程师{who}主持设计并监督施工。"
    )
    second = (
        f"{1980 + number}年大桥进行了全面维修，工人们更换了全部钢索和路面。"
        + (
            f"{paper}在{1990 + number}年刊登长篇报道，记者采访了{40 + number}名参加维修的老工人。"
            if number % 2
            else f"{2000 + number}年冬天，三位摄影师把{50 + number}张珍贵照片赠送给{paper}的资料室保存。"
        )
        + f"每年秋天大约有{300 + 7 * number}人来到桥头观看龙舟比赛和烟火表演。"
    )
    texts = (first, second)
    return [
        Passage(f"zh{number}#{n}", text, title, f"zh{number}", 1000 * n, 1000 * n + len(text)) for n, text in enumerate(texts)
    ]


CORPUS = [passage for number in range(40) for passage in (*english(number), *chinese(number))]


def recipe(folder: Path, **synthesis: Any) -> Recipe:
    tree: dict[str, Any] = {
        "name": "synthetic", "seed": 5, "knowledge": {"path": "kb", "documents": "docs", "indexes": {"bm25": {"kind": "bm25"}}},
        "synthesis": {
            "path": folder / "data", "n": 60, "passages": {"k": {3: 1, 5: 1}}, "decontaminate": "none", "split": {},
            "languages": {"en": 2, "zh": 1}, **synthesis,
        },
    }  # fmt: skip
    if "sets" in tree["synthesis"]:
        tree["decontaminate"] = {"sets": tree["synthesis"].pop("sets")}
    return Recipe.model_validate(tree)


def show(draft: Draft) -> Sheet | Reject:
    """Gold where the cell has it, and passages that hold no answer; a fixed order for a draft."""
    cell, draw = draft.job.cell, random.Random(draft.job.seed("evidence"))
    slots = [] if cell.relation == "R5" else list(gold_slots(draft.gold))
    texts = {content_hash(passage) for passage in draft.gold}
    for passage in draw.sample(CORPUS, len(CORPUS)):
        if len(slots) == cell.k:
            break
        if content_hash(passage) not in texts and not held(passage, draft.answers):
            slots.append(Slot(passage, "noise", "random", "corpus"))
            texts.add(content_hash(passage))
    draw.shuffle(slots)
    return Sheet(draft, tuple(slots), "prompt", "instruction")


KNOWN: list[tuple[Plan, Offline]] = []


def offline(asked: Recipe) -> tuple[Offline, Plan]:
    """One teacher a plan: what it writes depends on nothing that it wrote before."""
    plan = make_plan(asked, cannot=CANNOT)
    known = next((teacher for other, teacher in KNOWN if other == plan), None)
    if known is None:
        known = Offline(CORPUS, plan)
        KNOWN.append((plan, known))
    return known, plan


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_record_names_the_licences_of_its_sources_and_the_manifest_counts_them(tmp_path: Path) -> None:
    """Half of the documents name one; what an operator makes of a passage keeps its parent's."""

    def licensed(passage: Passage) -> Passage:
        return replace(passage, licence="CC BY-SA 4.0" if passage.document.startswith("zh") else "")

    def shown(draft: Draft) -> Sheet | Reject:
        sheet = show(draft)
        return sheet if isinstance(sheet, Reject) else replace(
            sheet, slots=tuple(replace(slot, passage=licensed(slot.passage)) for slot in sheet.slots)
        )  # fmt: skip

    asked = recipe(tmp_path)
    plan = make_plan(asked, cannot=CANNOT)
    done = synthesize(asked, Offline([licensed(passage) for passage in CORPUS], plan), shown, plan=plan)
    rows = [json.loads(line) for line in (done.folder / "examples.jsonl").read_text(encoding="utf-8").splitlines()]
    passages = [[*row["synth"]["passages"], *row["synth"].get("withheld", ())] for row in rows]
    assert any(row["synth"].get("withheld") for row in rows)
    assert all(("licence" in one) == one["document"].startswith("zh") for own in passages for one in own)
    count = sum(any("licence" in one for one in own) for own in passages)
    assert 0 < count < len(rows)
    assert done.told["licences"] == {"CC BY-SA 4.0": count}
    plain = synthesize(recipe(tmp_path / "plain"), Offline(CORPUS, plan), show, plan=plan)
    assert "licences" not in plain.told
    (gold,) = gold_slots([licensed(CORPUS[2])])
    made = garbled(Example("q", "?", ()), gold, seed="s")
    assert made is not None
    assert made.passage.text != gold.passage.text
    assert made.passage.licence == gold.passage.licence == "CC BY-SA 4.0", "what is made of a passage is under its licence"


def test_a_manifest_leaves_out_what_lies_beside_and_never_the_artefact_itself(tmp_path: Path) -> None:
    """The journal of calls is in the dataset's folder, or is its folder, or one above."""
    for number, beside in enumerate(("data/calls", "data", ".", "elsewhere")):
        folder = tmp_path / f"{number}" / "data"
        (folder / "calls").mkdir(parents=True)
        for name in ("examples.jsonl", "calls/journal.jsonl"):
            (folder / name).write_text("{}\n")
        write_manifest(folder, "k", {}, beside=folder.parent / beside)
        files = {"examples.jsonl", *(() if number == 0 else ("calls/journal.jsonl",))}
        assert set(read_manifest(folder, "k")["files"]) == files


class Reordered:
    """The offline teacher's results in another order, as calls that take their time come back; it may break off."""

    name = "offline"

    def __init__(self, teacher: Offline, seed: int, *, stop_after: int | None = None):
        self.teacher, self.draw, self.left = teacher, random.Random(seed), stop_after

    def cannot(self) -> Mapping[str, tuple[str, ...]]:
        return self.teacher.cannot()

    def write(self, jobs: Iterable[Job], show: Show) -> Iterator[Made | Reject]:
        results = list(self.teacher.write(jobs, show))
        self.draw.shuffle(results)
        for result in results:
            if self.left == 0:
                raise CallsStopped("the cap is reached", reason="cap")
            self.left = None if self.left is None else self.left - 1
            yield result


class Altered:
    """Another teacher's results, some of them changed."""

    def __init__(self, teacher: Any, change: Any):
        self.teacher, self.change, self.name = teacher, change, teacher.name

    def cannot(self) -> Mapping[str, tuple[str, ...]]:
        return self.teacher.cannot()

    def write(self, jobs: Iterable[Job], show: Show) -> Iterator[Made | Reject]:
        return (self.change(made) if isinstance(made, Made) else made for made in self.teacher.write(jobs, show))


class Lenient(Verifier):
    """Only whether a text was cut off: where questions are made up, answers are not theirs."""

    def verify(self, written: Written) -> Verified:
        found = super().verify(written)
        return found if found.reason == "truncated" else replace(found, verdicts=(), reason="")


def run(asked: Recipe, teacher: Any = None, **more: Any) -> Done:
    own, plan = offline(asked)
    return synthesize(asked, teacher(own) if teacher is not None else own, show, plan=plan, ignores=IGNORES, **more)


# --- the offline teacher ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Made | Reject]:
    teacher, plan = offline(recipe(tmp_path_factory.mktemp("made"), n=240))
    return list(teacher.write([Job(cell) for cell in plan.cells], show))


def test_every_form_passes_every_check(made: list[Made | Reject]) -> None:
    written = [result for result in made if isinstance(result, Made)]
    assert len(written) > 0.95 * len(made)
    reasons = Counter(Verifier().verify(written_of(result)).reason for result in written)
    assert reasons[""] >= 0.98 * len(written), reasons
    forms = Counter((result.sheet.draft.seen["form"], result.sheet.draft.job.cell.language) for result in written)
    for form in ("cloze", "bridge", "list", "claim", "options", "definition", "account"):
        assert min(forms[form, "en"], forms[form, "zh"]) > 0, forms


def test_a_question_keeps_at_most_60_percent_of_its_sentence(made: list[Made | Reject]) -> None:
    for result in made:
        if isinstance(result, Made):
            draft = result.sheet.draft
            kept = max(overlap(draft.query, content_terms(sentence)) for sentence in draft.facts)
            assert kept <= 0.6
            assert draft.seen["overlap"] == pytest.approx(kept, abs=1e-4)


def test_where_no_passage_answers_it_is_said_in_many_ways_and_no_answer_is_given(made: list[Made | Reject]) -> None:
    absent = [one for one in made if isinstance(one, Made) and one.sheet.draft.job.cell.relation == "R5"]
    assert len(absent) >= 40
    for one in absent:
        assert not held(Passage("", one.target), one.sheet.draft.answers)
    openings = {one.target[:12] for one in absent if one.sheet.draft.job.cell.language == "en"}
    assert len(openings) >= 8


def test_documents_are_visited_evenly(tmp_path: Path) -> None:
    weights = {"task": {"factoid": 1, "numeric": 1}, "answer_format": {"span": 1, "number_unit": 1}, "relation": {"R1": 1}}
    asked = recipe(tmp_path, n=100, languages={"en": 1}, weights=weights)
    teacher, _ = offline(asked)
    visits = Counter(teacher.visits.values())
    assert sum(visits.values()) == 100
    assert {visits[place] for place in range(40)} == {2, 3}


def test_what_rules_cannot_write_leaves_the_plan_and_is_listed(tmp_path: Path) -> None:
    plan = make_plan(recipe(tmp_path), cannot=CANNOT)
    assert "how_to" in plan.left_out["task"]
    assert not set(CANNOT["task"]) & {cell.task for cell in plan.cells}
    with pytest.raises(RecipeError, match="cannot write task how_to"):
        make_plan(recipe(tmp_path, weights={"task": {"how_to": 1, "factoid": 1}}), cannot=CANNOT)
    with pytest.raises(RecipeError, match="cannot write language cross"):
        make_plan(recipe(tmp_path, languages={"cross": 1}), cannot=CANNOT)


@pytest.mark.parametrize(
    ("sentence", "wanted"),
    [
        ("The merchant Abel Norstrand opened it on 3 May 1873 for 1,200 florrins.",
         [("Abel Norstrand", "name"), ("3 May 1873", "date"), ("1,200 florrins", "number")]),
        ("大桥于一九九八年建成通车，全长3,000米，由《人民日报》报道。",
         [("一九九八年", "year"), ("3,000米", "number"), ("人民日报", "title")]),
        ("In 1806 she moved away.", [("1806", "year")]),
    ],
)  # fmt: skip
def test_spans(sentence: str, wanted: list[tuple[str, str]]) -> None:
    found = spans(sentence, language_of(sentence) or "en")
    assert [(span.text, span.kind) for span in found] == wanted
    assert all(sentence[span.start : span.end] == span.text for span in found)


def test_a_window_grows_as_far_as_the_overlap_allows() -> None:
    sentence = "Captain Everard began the tall grey fort in 1703, fearing the pirates of the northern sea."
    at = sentence.index("1703")
    text = window(sentence, content_terms(sentence), at, at + 4, filler="____", most=0.6)
    assert text is not None
    assert "____" in text
    assert text.startswith("…")
    assert overlap(text, content_terms(sentence)) <= 0.6
    assert window(sentence, content_terms(sentence), at, at + 4, filler="____", most=0.1) is None


# --- the driver -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Done:
    return run(recipe(tmp_path_factory.mktemp("straight"), split={"train": 0.7, "dev": 0.3}))


def test_a_dataset_holds_what_it_says(straight: Done) -> None:
    told = json.loads((straight.folder / "manifest.json").read_text(encoding="utf-8"))
    assert (told["requested"], told["kept"], told["complete"]) == (60, 60, True)
    assert straight.exit_code == 0
    examples = read_examples(straight.folder / "examples.jsonl")
    assert [one.metadata["synth"]["cell"] for one in examples] == list(range(60))
    assert {one.metadata["synth"]["teacher"] for one in examples} == {"offline"}
    parts = {name: read_examples(straight.folder / f"{name}.jsonl") for name in ("train", "dev")}
    assert {one.id for part in parts.values() for one in part} == {one.id for one in examples}
    assert {name: len(part) for name, part in parts.items()} == told["splits"]
    coverage = json.loads((straight.folder / "coverage.json").read_text(encoding="utf-8"))
    assert set(coverage["ignored"]) == set(IGNORES)
    assert "genre" not in coverage["factors"]
    assert not list(straight.folder.glob("*.part"))


def test_coverage_counts_the_noise_that_was_shown(straight: Done) -> None:
    examples = read_examples(straight.folder / "examples.jsonl")
    shown = Counter(one["kind"] for example in examples for one in example.metadata["synth"]["passages"])
    noise = json.loads((straight.folder / "coverage.json").read_text(encoding="utf-8"))["noise"]
    assert noise["random"]["kept"] == shown["random"] > noise["random"]["planned"], "all noise of this `show` is random"
    assert noise["hard"] | {"kept": 0, "deficit": noise["hard"]["planned"]} == noise["hard"]
    before = (straight.folder / "coverage.json").read_bytes()
    assert CliRunner().invoke(app, ["synthesize", "coverage", str(straight.folder)]).exit_code == 0
    assert (straight.folder / "coverage.json").read_bytes() == before, "counted again from the files, it is the same"


def test_noise_that_answers_is_no_noise_and_a_conflicts_twin_is_evidence() -> None:
    def example(relation: str, evidence: int, *slots: tuple[str, str]) -> Example:
        passages = [{"role": role, "kind": kind} for role, kind in slots]
        return Example("x", "?", metadata={"synth": {"factors": {"relation": relation, "evidence": evidence},
                                                      "passages": passages}})  # fmt: skip

    told = shown_noise([
        example("R1", 1, ("gold", "gold"), ("support", "hard"), ("redundant", "neighbour"), ("noise", "hard")),
        example("R3", 2, ("gold", "gold"), ("gold", "gold"), ("redundant", "near_duplicate"), ("noise", "counterfactual")),
        example("R6", 2, ("gold", "gold"), ("noise", "counterfactual"), ("redundant", "garbled")),
        example("R6", 2, ("gold", "gold"), ("gold", "gold"), ("noise", "counterfactual")),
    ])  # fmt: skip
    assert told["hard"] == (1, 1)
    assert told["neighbour"] == (0, 1)
    assert (told["near_duplicate"], told["garbled"]) == ((1, 0), (1, 0)), "these are redundant by what they are"
    assert told["counterfactual"] == (2, 0)


def test_no_gold_document_stands_in_two_splits(straight: Done) -> None:
    owners: dict[str, set[str]] = {}
    for example in read_examples(straight.folder / "examples.jsonl"):
        synth = example.metadata["synth"]
        tied = [one for one in synth["passages"] if one["role"] in ("gold", "support")] + synth.get("withheld", [])
        assert tied
        for one in tied:
            owners.setdefault(one["document"], set()).add(example.metadata["split"])
    assert all(len(names) == 1 for names in owners.values())
    assert {name for names in owners.values() for name in names} == {"train", "dev"}
    assert read_split(straight.folder).shares == {"train": 0.7, "dev": 0.3}


@pytest.mark.parametrize("seed", [1, 2])
def test_order_and_a_stop_half_way_change_no_byte(straight: Done, tmp_path: Path, seed: int) -> None:
    asked = recipe(tmp_path, split={"train": 0.7, "dev": 0.3})
    stopped = run(asked, lambda own: Reordered(own, seed, stop_after=17 * seed))
    assert stopped.exit_code == 3
    assert stopped.told["stopped"].startswith("cap")
    assert stopped.told["kept"] == 17 * seed
    with pytest.raises(CheckpointError, match="of other settings"):
        run(recipe(tmp_path, n=61))
    run(asked, lambda own: Reordered(own, seed + 10))
    assert files(tmp_path / "data") == files(straight.folder)


def test_what_a_judge_costs_names_no_dataset(tmp_path: Path) -> None:
    def named(price: object, model: str = "j") -> object:
        server = {"base_url": "http://localhost:1/v1", "model": model}
        verify = {"support": {"kind": "judge", "endpoint": server, "price": price}}
        asked = recipe(tmp_path, verify=verify | {"closed_book": {"endpoint": server, "price": price}}).synthesis
        assert asked is not None
        return _content(asked)

    assert named("free") == named({"input": 1, "output": 2})
    assert named("free") != named("free", "another")


def test_a_finished_dataset_is_left_alone_and_another_is_not_written_over(straight: Done) -> None:
    before = files(straight.folder)
    asked = recipe(straight.folder.parent, split={"train": 0.7, "dev": 0.3})
    never = lambda own: Altered(own, lambda made: pytest.fail("written again"))  # noqa: E731
    assert run(asked, never).told["kept"] == 60
    with pytest.raises(CheckpointError, match="of other settings"):
        run(recipe(straight.folder.parent, n=61))
    assert files(straight.folder) == before


def test_a_cell_that_fails_stays_a_deficit_of_its_own_values(tmp_path: Path) -> None:
    def spoil(made: Made) -> Made:
        return replace(made, target="") if made.sheet.draft.job.cell.task == "list" else made

    done = run(recipe(tmp_path), lambda own: Altered(own, spoil))
    coverage = json.loads((tmp_path / "data/coverage.json").read_text(encoding="utf-8"))
    lists = coverage["factors"]["task"]["list"]
    assert lists["planned"] == lists["attempted"] == lists["deficit"] > 0
    assert all(row["kept"] <= row["planned"] for values in coverage["factors"].values() for row in values.values())
    assert sum(row["deficit"] for row in coverage["factors"]["task"].values()) == lists["deficit"]
    assert done.exit_code == 3
    assert done.told["kept"] == 60 - lists["deficit"]
    assert done.told["funnel"]["verify: empty"] == 3 * lists["planned"]
    rejects = [json.loads(line) for line in (tmp_path / "data/rejects.jsonl").read_text().splitlines()]
    assert Counter(one["ordinal"] for one in rejects if one["reason"] == "empty") == dict.fromkeys(range(3), lists["planned"])


def test_a_failure_that_passes_is_filled_from_the_same_cell(tmp_path: Path) -> None:
    def late(made: Made) -> Made:
        return replace(made, finish="length") if made.sheet.draft.job.ordinal == 0 else made

    done = run(recipe(tmp_path, n=30), lambda own: Altered(own, late))
    examples = read_examples(tmp_path / "data/examples.jsonl")
    assert {one.metadata["synth"]["ordinal"] for one in examples} <= {1, 2}
    assert done.told["funnel"]["verify: truncated"] == 30
    assert len({one.metadata["synth"]["cell"] for one in examples}) == done.told["kept"] >= 28


def test_fabricated_answers_are_rejected_each_for_its_reason(tmp_path: Path) -> None:
    lies = {
        "cited_long": ("Nothing in here stands there at all in any place [9].", "citation_out_of_range"),
        "paragraph": ("“This quote was never written by anybody in the world.” " * 3, "fabricated_quote"),
        "span": ("Timbuktu", "not_the_answer"),
    }

    def lie(made: Made) -> Made:
        cell = made.sheet.draft.job.cell
        told = lies.get(cell.answer_format)
        return made if told is None or cell.relation == "R5" or cell.language == "zh" else replace(made, target=told[0])

    done = run(recipe(tmp_path, n=120, languages={"en": 1}), lambda own: Altered(own, lie))
    for _, reason in lies.values():
        assert done.told["funnel"][f"verify: {reason}"] > 0


def test_duplicates_leave_before_the_number_is_made_exact(tmp_path: Path) -> None:
    first: list[str] = []

    def repeat(made: Made) -> Made:
        draft = made.sheet.draft
        if draft.job.ordinal or draft.job.cell.language != "en":
            return made
        first.append(draft.query)
        return replace(made, sheet=replace(made.sheet, draft=replace(draft, query=first[0])))

    done = run(recipe(tmp_path, n=30), lambda own: Altered(own, repeat))
    queries = [one.query for one in read_examples(tmp_path / "data/examples.jsonl")]
    assert len(set(queries)) == len(queries) == done.told["kept"]
    assert done.told["funnel"]["dedupe: exact_duplicate"] > 5
    assert done.told["kept"] >= 28


def far(draft: Draft) -> Sheet | Reject:
    """As `show`; half of the first attempts ask for what no retriever finds."""
    sheet = show(draft)
    lost = draft.job.cell.number % 2 and not draft.job.ordinal and isinstance(sheet, Sheet)
    return replace(sheet, seen={"unreachable": True}) if lost and isinstance(sheet, Sheet) else sheet


def test_of_what_no_retriever_finds_the_first_stay_in_any_order(tmp_path: Path) -> None:
    asked = recipe(tmp_path, verify={"round_trip": {"kept": 0.12}})
    own, plan = offline(asked)
    done = synthesize(asked, own, far, plan=plan)
    assert done.told["kept"] == 60, "the others' cells are tried again"
    assert done.told["round_trip"] == {"unreachable": 7, "most": 7}
    tagged = [one.id for one in read_examples(done.folder / "examples.jsonl") if one.metadata["synth"].get("unreachable")]
    assert tagged == [f"synth-{number}-0" for number in range(1, 15, 2)]
    assert done.told["funnel"]["show: unreachable"] == 30 - 7
    coverage = json.loads((done.folder / "coverage.json").read_text(encoding="utf-8"))
    assert coverage["funnel"]["show: unreachable"] == 23
    assert ["found by no retriever", "7"] in synthesis_tables(done.folder)[0].rows
    other = recipe(tmp_path / "other", verify={"round_trip": {"kept": 0.12}})
    assert synthesize(other, Reordered(own, 3, stop_after=20), far, plan=plan).exit_code == 3
    synthesize(other, Reordered(own, 4), far, plan=plan)
    assert files(tmp_path / "other" / "data") == files(done.folder)


def test_a_dataset_from_before_there_were_round_trips_is_still_what_was_asked_for(tmp_path: Path) -> None:
    done = run(recipe(tmp_path, n=20, verify={"round_trip": None}))
    assert done.told["round_trip"] is None
    with pytest.raises(CheckpointError, match="of other settings"):
        run(recipe(tmp_path, n=20))
    manifest = done.folder / "manifest.json"
    told = json.loads(manifest.read_text(encoding="utf-8"))
    del told["round_trip"]
    manifest.write_text(json.dumps(told), encoding="utf-8")
    assert run(recipe(tmp_path, n=20)).told == told
    with pytest.raises(CheckpointError, match="of other settings"):
        run(recipe(tmp_path, n=21))


def test_what_leaks_costs_no_other_cell_its_example(tmp_path: Path) -> None:
    question = "Which bell of the old abbey tower rang for the drowned sailors?"
    rows = [{"id": "q", "query": "Of the old abbey, which bell rang for sailors on that night?", "answers": ["Great Tom"]}]
    held_out = tmp_path / "held.jsonl"
    held_out.write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")

    def alike(made: Made) -> Made:
        draft = made.sheet.draft
        if draft.job.ordinal or draft.job.cell.number not in (0, 1):
            return made
        answers = ("Great Tom",) if draft.job.cell.number == 0 else draft.answers
        return replace(made, sheet=replace(made.sheet, draft=replace(draft, query=question, answers=answers)), target="Tom")

    asked = recipe(tmp_path, n=20, languages={"en": 1}, decontaminate="registered", sets={"held": {"path": held_out}})
    done = run(asked, lambda own: Altered(own, alike), verifier=Lenient())
    attempts = [json.loads(line) for line in (done.folder / "attempts.jsonl").read_text(encoding="utf-8").splitlines()]
    reasons = {(one["cell"], one["ordinal"]): one["reason"] for one in attempts}
    assert reasons[0, 0] == "decontaminate: D3", "same answer, and words enough in common"
    assert reasons[1, 0] is None, "its answer is another, so it does not leak, and what it repeats is no example"


def test_what_is_no_example_any_more_costs_none(tmp_path: Path) -> None:
    """Cell 5's first question goes when cell 1 asks it in round 1; in round 2 cell 6 may ask what only that one was near to."""
    middle = "where does the red fox of the northern woods sleep when the long winter comes over the quiet land"
    near, far = f"{middle} this year", f"and now {middle}"  # each nearly the middle one, and not each other
    asks = {(5, 0): middle, (1, 1): near, (6, 2): far}

    def change(made: Made) -> Made:
        draft = made.sheet.draft
        place = (draft.job.cell.number, draft.job.ordinal)
        late = {1: 1, 6: 2}.get(place[0], 0)
        query = asks.get(place, draft.query)
        sheet = replace(made.sheet, draft=replace(draft, query=query))
        return replace(made, sheet=sheet, finish="length" if place[1] < late else made.finish)

    done = run(recipe(tmp_path, n=20, languages={"en": 1}), lambda own: Altered(own, change), verifier=Lenient())
    attempts = [json.loads(line) for line in (done.folder / "attempts.jsonl").read_text(encoding="utf-8").splitlines()]
    reasons = {(one["cell"], one["ordinal"]): one["reason"] for one in attempts}
    assert reasons[5, 0] == "dedupe: near_duplicate"
    assert reasons[1, 1] is reasons[5, 1] is reasons[6, 2] is None
    assert done.told["kept"] == 20


def test_half_a_character_is_a_reject(tmp_path: Path) -> None:
    def torn(made: Made) -> Made:
        draft = made.sheet.draft
        number = draft.job.cell.number
        if draft.job.ordinal or number > 2:
            return made
        query = draft.query + ("\ud83d" if number == 1 else "")
        facts = ("a fact \ud83d",) if number == 2 else draft.facts
        sheet = replace(made.sheet, draft=replace(draft, query=query, facts=facts))
        return replace(made, sheet=sheet, target=made.target + ("\ud83d" if number == 0 else ""))

    class Refusing(Altered):
        def write(self, jobs: Iterable[Job], show: Show) -> Iterator[Made | Reject]:
            for made in super().write(jobs, show):
                job = made.sheet.draft.job if isinstance(made, Made) else made.job
                yield Reject(job, "draft", "malformed", "d", "raw \ud83d") if job.id == "3-0" else made

    done = run(recipe(tmp_path, n=20), lambda own: Refusing(own, torn))
    rejects = [json.loads(line) for line in (done.folder / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]
    told = {one["cell"]: one for one in rejects if one["ordinal"] == 0 and one["cell"] <= 3}
    assert [told[n]["reason"] for n in range(4)] == ["half_character"] * 3 + ["malformed"]
    assert told[3]["raw"] == r"raw \ud83d"
    assert told[0]["raw"].endswith(r"\ud83d")
    assert done.told["kept"] == 20, "the next attempts are whole"


def test_settings_that_came_later_rename_no_dataset() -> None:
    """Where they are as if they were not there; else every dataset made before, paid ones too, would be refused."""
    asked = SynthesisSettings(path=Path("data"), n=10)
    assert fingerprint(_content(asked)) == "b6ddef521a8f4e8b"
    later = asked.model_copy(update={"passages": asked.passages.model_copy(update={"gold_absent_from": 2})})
    assert fingerprint(_content(later)) != "b6ddef521a8f4e8b"


def test_what_is_measured_is_kept_out_and_a_missing_set_stops_the_run(tmp_path: Path) -> None:
    plain = run(recipe(tmp_path / "plain", n=30))
    told = read_examples(plain.folder / "examples.jsonl")[:4]
    held_out = tmp_path / "held.jsonl"
    rows = [{"id": f"q{n}", "query": one.query, "answers": list(one.answers)} for n, one in enumerate(told)]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = run(recipe(tmp_path / "near", n=30, decontaminate="registered", sets={"held": {"path": held_out}}))
    queries = {one.query for one in read_examples(done.folder / "examples.jsonl")}
    assert not queries & {one.query for one in told}
    leakage = json.loads((done.folder / "leakage.json").read_text(encoding="utf-8"))
    assert leakage["sets"]["held"]["checks"]["D1"]["count"] == 4
    assert leakage["dropped"] >= 4
    moved = held_out.rename(tmp_path / "moved.jsonl")
    again = run(recipe(tmp_path / "near", n=30, decontaminate="registered", sets={"held": {"path": moved}}))
    assert again.told["fingerprint"] == done.told["fingerprint"]
    moved.write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match="of other settings"):  # else it would pass for checked against these
        run(recipe(tmp_path / "near", n=30, decontaminate="registered", sets={"held": {"path": moved}}))
    with pytest.raises(CorpusError, match="missing"):
        run(recipe(tmp_path / "none", decontaminate="registered", sets={"gone": {"path": tmp_path / "gone.jsonl"}}))
    with pytest.raises(RecipeError, match="no evaluation set is registered"):
        run(recipe(tmp_path / "none", decontaminate="registered"))
    assert not (tmp_path / "none").exists()


def test_a_longer_plan_changes_no_seed_and_a_rare_noise_kind_is_kept(tmp_path: Path) -> None:
    short, long = (make_plan(recipe(tmp_path, n=n), cannot=CANNOT) for n in (60, 61))
    assert [cell.seed for cell in short.cells] == [cell.seed for cell in long.cells[:60]]
    assert all(short.margins["noise"][kind] > 0 for kind in ("garbled", "boilerplate", "near_duplicate"))


def test_the_command_line_writes_a_dataset_and_a_report_tells_of_it(tmp_path: Path) -> None:
    tiny.sentence_encoder(tmp_path / "encoder")
    rows = [{"id": passage.id, "title": passage.title, "text": passage.text} for passage in CORPUS]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tree = {
        "name": "cli", "seed": 3,
        "knowledge": {"path": "kb", "documents": "docs.jsonl", "chunk": None, "indexes": {"bm25": {"kind": "bm25"}},
                      "encoder": {"model": "encoder/encoder", "dtype": "float32"}},
        "synthesis": {
            "path": "data", "n": 24, "teacher": {"kind": "offline"}, "decontaminate": "none", "languages": {"en": 2, "zh": 1},
            "passages": {"k": {3: 1}}, "budget": {"tokenizer": "embedded", "max_length": 1024, "answer": 200},
            "weights": {"noise": {"hard": 3, "random": 1}, "relation": {"R1": 1}},
        },
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    recipe = str(tmp_path / "recipe.yaml")
    assert CliRunner().invoke(app, ["build", recipe]).exit_code == 0
    done = CliRunner().invoke(app, ["synthesize", recipe])
    assert done.exit_code in (0, 3), (done.output, done.exception)
    told = json.loads((tmp_path / "data/manifest.json").read_text(encoding="utf-8"))
    assert done.stdout.startswith(f"24 requested, {told['kept']} kept")
    assert done.exit_code == (0 if told["kept"] == 24 else 3)
    assert told["kept"] >= 22
    for example in read_examples(tmp_path / "data/examples.jsonl"):
        assert len(example.metadata["synth"]["passages"]) == 3
    kept, covered = synthesis_tables(tmp_path / "data")
    assert ["kept", str(told["kept"])] in kept.rows
    assert {row[0] for row in covered.rows} >= {"task", "relation", "language"}
    refused = CliRunner().invoke(app, ["synthesize", recipe, "synthesis.from_scratch=0.5", "synthesis.path=other"])
    assert refused.exit_code != 0
    assert "cannot write source from_scratch" in str(refused.exception)
