"""What training questions share with evaluation sets: the worked figures, planted rewrites, and all that a loop finds."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import raglan.decontaminate
from raglan.corpus import Corpus, write_corpus
from raglan.decontaminate import EvaluationQuestions, decontaminate, open_sets, registered, write_leakage
from raglan.documents import write_examples
from raglan.errors import CorpusError, RecipeError
from raglan.knowledge import build_knowledge
from raglan.recipe import DecontaminateSettings, EvaluationSet, load_recipe
from raglan.records import Example, Passage
from raglan.splits import find_leaks, jaccard
from raglan.text import answer_words, fold_numbers
from test_cli import run
from tiny import concepts, small_recipe

KRAKOW = Example("krakow", "Which river flows through the Polish city of Kraków?", ("Vistula",))
SOURCE = Example("source", "长江的源头在哪个省？", ("青海省",))


def found(train: Sequence[Example], *held: Example, **more: object) -> dict[tuple[str, str], dict[str, float]]:
    """(training question, evaluation question) → check → share."""
    made = decontaminate(train, [EvaluationQuestions("set", held)], **more)  # type: ignore[arg-type]
    pairs: dict[tuple[str, str], dict[str, float]] = {}
    for one in made.found:
        pairs.setdefault((one.train, one.held_out), {})[one.check] = round(one.share, 3)
    return pairs


def test_worked_figures() -> None:
    train = [
        Example("a", "which river flows through the polish city of Krakow", ("the vistula",)),
        Example("b", "In Poland, which river flows through the city of Kraków?", ("Vistula",)),
        Example("c", "What river runs through Kraków?", ("Vistula",)),
        Example("d", "Which river flows through the German city of Dresden?", ("Elbe",)),
        Example("e", "长江的源头位于哪个省份？", ("青海省",)),
        Example("f", "黄河的源头在哪个省？", ("青海省",)),
    ]
    got = found(train, KRAKOW, SOURCE)
    assert got["a", "krakow"]["D2"] == 0.833  # 5/6
    assert got["b", "krakow"] == {"D3": 0.7}  # 7/10; D2 is 3/6
    assert got["c", "krakow"] == {"D3": 0.3}  # 3/10: not more than .30, and enough
    assert "d" not in {train for train, _ in got}  # D2 is 2/6, and the answer is another
    assert got["e", "source"] == {"D3": 0.667}  # 8/12; D2 is 4/7
    assert got["f", "source"]["D2"] == 0.714  # 5/7, another river: dropped, and listed
    lower = DecontaminateSettings(runs=0.3)
    shares = {
        train: checks["D2"] for (train, _), checks in found(train, KRAKOW, SOURCE, settings=lower).items() if "D2" in checks
    }
    assert shares == {"a": 0.833, "b": 0.5, "d": 0.333, "e": 0.571, "f": 0.714}


def test_equal_questions_and_short_ones() -> None:
    held = [Example("h", "Who built it?", ("x",)), Example("turn", "Why?", history=("It closed.",)), replace(KRAKOW, id="k")]
    train = [
        Example("same", "who built IT", ("y",)),
        Example("longer", "Tell me who built it now", ("y",)),
        Example("turned", "why", history=("It closed",)),
        Example("other", "why", history=("It opened",)),
    ]
    got = found(train, *held)
    assert got == {("same", "h"): {"D1": 1.0}, ("turned", "turn"): {"D1": 1.0}}  # three words are too few for D2
    assert {leak.held_out for leak in find_leaks(train, held)} == {held for _, held in got}  # the leak check of training


def test_answers_are_compared_with_their_numbers_folded() -> None:
    held = Example("h", "When was the Qingpu bridge opened?", ("1998年",))
    assert found([Example("t", "Which year opened the Qingpu bridge?", ("一九九八年",))], held)["t", "h"] == {"D3": 0.429}
    assert not found([Example("t", "Which year opened the Qingpu bridge?", ("一九九七年",))], held)


LEXICON = [
    {"who", "谁"}, {"designed", "设计"}, {"lighthouse", "灯塔"}, {"hask", "哈斯克"}, {"when", "何时"}, {"library", "图书馆"},
    {"opened", "开放"},
]  # fmt: skip


def bilingual(texts: Sequence[str]) -> np.ndarray:
    """A small multilingual encoder: a dimension a concept."""
    found = np.asarray([[any(word in text.lower() for word in words) for words in LEXICON] for text in texts], dtype=np.float32)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)


def test_translations_are_found_with_an_encoder_and_told_as_unchecked_without() -> None:
    held = Example("h", "Who designed Hask lighthouse?", ("Ilse Brandt",))
    train = [Example("t", "哈斯克灯塔是谁设计的？", ("伊尔莎",)), Example("free", "图书馆何时开放？", ("1904",))]
    assert found(train, held, embed=bilingual) == {("t", "h"): {"D4": 1.0}}
    made = decontaminate(train, [EvaluationQuestions("set", [held])])
    assert made.found == []
    assert made.not_run[("set", "D4")] == "no encoder"


SPOKEN = [
    ("who", "谁"), ("lit", "点"), ("lamp", "灯"), ("sea", "海"), ("rock", "石"), ("first", "初"), ("night", "夜"),
    ("oil", "油"), ("keeper", "守"), ("tower", "塔"), ("storm", "风"), ("winter", "冬"),
]  # fmt: skip


def test_meanings_meet_across_languages_from_their_bound_on(tmp_path: Path, capsys, monkeypatch) -> None:
    """By a bilingual encoder on the disk whose cosines can be counted: n − 1 of n words in common, or one beside another."""
    encoder = concepts(tmp_path, [*SPOKEN, ("moon", "月"), ("sun", "日")])

    def rows(side: int) -> list[Example]:
        """0: evaluation questions in English; 1: training questions in Chinese, or longer ones."""
        made = []
        for name, n in (("below", 9), ("at", 10), ("above", 11)):  # 8/9, 9/10, 10/11
            own = [pair[side] for pair in SPOKEN[:n]]
            text = " ".join(own) if side == 0 else "".join([*own[:0:-1], "月"])
            made.append(Example(f"{name} {side}", text, (f"{name} {side}",)))
        for name, often, beside in (("just below", 64, 31), ("just above", 95, 46)):  # .899981, .900039
            own, other = {"just below": ("moon", "月", "冬"), "just above": ("sun", "日", "冬")}[name][side], "冬"
            made.append(Example(f"{name} {side}", own if side == 0 else own * often + other * beside, (f"{name} {side}",)))
        return made

    write_examples(tmp_path / "held.jsonl", rows(0))
    write_examples(tmp_path / "own.jsonl", rows(1))
    code, told, _ = run(
        "check-leaks", str(tmp_path / "own.jsonl"), "--against", f"set={tmp_path / 'held.jsonl'}", "--encoder", str(encoder),
        capsys=capsys, monkeypatch=monkeypatch,
    )  # fmt: skip
    pairs = re.findall(r"(?m)^(.+) 1 = set:(.+) 0  D4 (\S+)$", told)
    assert len(pairs) == len(told.splitlines()), "no other check finds any"
    assert [(train, share) for train, held, share in pairs if train == held] == [
        ("at", "0.900"), ("above", "0.909"), ("just above", "0.900")
    ]  # fmt: skip
    assert code == 1


PASSAGE = (
    "The lighthouse at Hask Point was designed by Ilse Brandt and lit for the first time in the autumn of 1904, after nine "
    "years of work on a rock that the sea covers twice a day."
)


@pytest.mark.parametrize("batch", [1, 20_000])
def test_gold_passages_are_found_in_quotes_and_in_synthetic_examples(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raglan.decontaminate, "BATCH", batch)

    def quoted(identity: str, quote: str) -> Example:
        return Example(identity, f"what of {identity}", metadata={"evidence": [{"document": "d", "quote": quote}]})

    def synthetic(identity: str, role: str, text: str) -> Example:
        return Example(identity, f"what of {identity}", metadata={"synth": {"passages": [{"role": role, "text": text}]}})

    half, less = PASSAGE.split(" on a rock")[0], PASSAGE.split(" for the first")[0]
    train = [
        quoted("equal", PASSAGE.upper()), synthetic("half", "gold", half), synthetic("support", "support", PASSAGE),
        synthetic("noise", "noise", PASSAGE), quoted("less", less), quoted("few", "Ilse Brandt"),
    ]  # fmt: skip
    got = found(train, quoted("few words", "Ilse Brandt"), quoted("h", PASSAGE))
    runs = [frozenset(zip(*(answer_words(text)[n:] for n in range(8)), strict=False)) for text in (PASSAGE, half)]
    share = round(len(runs[0] & runs[1]) / len(runs[0]), 3)
    assert 0.5 <= share < 1
    assert got == {("equal", "h"): {"D5": 1.0}, ("half", "h"): {"D5": share}, ("support", "h"): {"D5": 1.0}}
    made = decontaminate(train, [EvaluationQuestions("set", [KRAKOW])])
    assert made.not_run[("set", "D5")] == "the text of no gold passage is known"


BRIDGE = "青浦大桥位于青浦区，一九九五年动工，一九九八年建成通车，全长三公里，是当时区内最长的桥。"


@pytest.mark.parametrize("text", [PASSAGE, BRIDGE])
def test_evidence_that_was_withheld_is_found(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where gold is absent the passage that would have answered is no less the evaluation set's."""
    write_corpus(tmp_path, [Passage("own", text, "", "d", 0, len(text)), Passage("other", "Nothing.", "", "e", 0, 8)])
    corpus = Corpus(tmp_path)

    def absent(identity: str, *withheld: dict[str, str]) -> Example:
        return Example(identity, f"what of {identity}", metadata={"synth": {"passages": [], "withheld": list(withheld)}})

    train = [
        absent("named", {"id": "own", "document": "d"}), absent("kept", {"id": "synth-1", "document": "", "text": text}),
        absent("another", {"id": "other", "document": "e"}), absent("gone", {"id": "nowhere", "document": "d"}),
    ]  # fmt: skip
    held = Example("h", "what of h", metadata={"evidence": [{"document": "d", "quote": text}]})
    assert found(train, held, corpus=corpus) == {("named", "h"): {"D5": 1.0}, ("kept", "h"): {"D5": 1.0}}
    made = decontaminate(train, [EvaluationQuestions("set", [held])])
    assert {one.train for one in made.found} == {"kept"}
    assert made.unresolved == 3
    assert write_leakage(tmp_path / "leakage.json", made)["unresolved"] == 3
    assert "3 examples name evidence" in caplog.text
    assert decontaminate(train[:3], [EvaluationQuestions("set", [held])], corpus=corpus).unresolved == 0


word = st.sampled_from([*"bcdefg", "河", "江"])  # "a" is an article, so a question of nothing else has no words
questions = st.lists(
    st.tuples(st.lists(word, min_size=1, max_size=9).map(" ".join), st.sampled_from(["x", "y", "1,000", "1000"])), max_size=10
)


@settings(max_examples=40, deadline=None)
@given(questions, questions, st.sampled_from([0.3, 0.5, 0.7, 1.0]), st.sampled_from([2, 20_000]))
def test_what_is_found_is_what_a_loop_over_all_pairs_finds(own: list, other: list, share: float, batch: int) -> None:
    train = [Example(f"t{n}", query, (answer,)) for n, (query, answer) in enumerate(own)]
    held = [Example(f"h{n}", query, (answer,)) for n, (query, answer) in enumerate(other)]

    def runs(text: str, n: int) -> frozenset[tuple[str, ...]]:
        parts = answer_words(text)
        return frozenset(tuple(parts[at : at + n]) for at in range(max(1, len(parts) - n + 1))) if parts else frozenset()

    expected: dict[tuple[str, str], dict[str, float]] = {}
    for a in train:
        for b in held:
            checks: dict[str, float] = {}
            wanted = runs(b.query, 3)
            if answer_words(a.query) == answer_words(b.query):
                checks["D1"] = 1.0
            if len(answer_words(b.query)) >= 5 and len(wanted & runs(a.query, 3)) >= share * len(wanted) - 1e-9:
                checks["D2"] = round(len(wanted & runs(a.query, 3)) / len(wanted), 3)
            same = fold_numbers(a.answers[0]) == fold_numbers(b.answers[0])
            if same and (index := jaccard(runs(a.query, 1), runs(b.query, 1))) >= share - 1e-9:
                checks["D3"] = round(index, 3)
            if checks:
                expected[a.id, b.id] = checks
    with pytest.MonkeyPatch.context() as small:
        small.setattr(raglan.decontaminate, "BATCH", batch)
        assert found(train, *held, settings=DecontaminateSettings(runs=share, words=share)) == expected


def test_questions_without_words_are_equal_as_they_stand() -> None:
    train = [Example(name, query, ("x",)) for name, query in (("one", "a"), ("two", "a a"), ("mark", "?"))]
    assert found(train, Example("h", " a a ", ("x",))) == {("two", "h"): {"D1": 1.0}}


def test_a_missing_set_stops_unless_it_is_named(tmp_path: Path) -> None:
    write_examples(tmp_path / "there.jsonl", [KRAKOW])
    sets = {name: EvaluationSet(path=tmp_path / f"{name}.jsonl") for name in ("there", "gone")}
    with pytest.raises(CorpusError, match=r"missing.*gone: .*gone\.jsonl"):
        open_sets(DecontaminateSettings(sets=sets))
    opened, missing = open_sets(DecontaminateSettings(sets=sets, missing=("gone",)))
    assert ([one.name for one in opened], missing) == (["there"], ("gone",))
    with pytest.raises(CorpusError, match="no evaluation set is registered"):
        open_sets(DecontaminateSettings())


def test_the_file_lists_sets_checks_counts_and_pairs(tmp_path: Path) -> None:
    train = [Example("t1", KRAKOW.query, ("Vistula",)), Example("t2", "Who painted it in the year of the flood?", ("Brandt",))]
    made = decontaminate(train, [EvaluationQuestions("rivers", [KRAKOW, SOURCE])], missing=("gone",))
    write_leakage(tmp_path / "leakage.json", made)
    told = json.loads((tmp_path / "leakage.json").read_text())
    assert (told["examples"], told["dropped"], told["missing"]) == (2, 1, ["gone"])
    assert told["sets"] == {
        "rivers": {
            "questions": 2,
            "checks": {
                "D1": {"count": 1, "pairs": [["t1", "krakow", 1.0]]}, "D2": {"count": 1, "pairs": [["t1", "krakow", 1.0]]},
                "D3": {"count": 1, "pairs": [["t1", "krakow", 1.0]]}, "D4": {"not_run": "no encoder"},
                "D5": {"not_run": "the text of no gold passage is known"},
            },
        }
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("leaks")
    build_knowledge(load_recipe(small_recipe(path)).knowledge)
    return path


def test_through_the_command_line(folder: Path, capsys, monkeypatch) -> None:
    """A recipe's sets and those of the command line; planted rewrites are left out, and the rest stays as it was."""

    def call(*words: str) -> tuple[int, str, str]:
        return run("check-leaks", *words, capsys=capsys, monkeypatch=monkeypatch)

    write_examples(folder / "rivers.jsonl", [KRAKOW])
    planted = [
        Example("planted", "What river runs through Kraków?", ("Vistula",)),
        Example("clean", "Is the moon made of cheese or of stone?", ("stone",), metadata={"note": "stays"}),
    ]
    write_examples(folder / "own.jsonl", planted)
    files = [str(folder / "own.jsonl"), "--against", f"rivers={folder / 'rivers.jsonl'}"]
    code, told, said = call(*files)
    assert (code, told.splitlines()) == (1, ["planted = rivers:krakow  D3 0.300"])
    assert "D4 not made, no encoder" in said
    code, _, _ = call(*files, "-o", str(folder / "kept.jsonl"), "--leakage", str(folder / "leakage.json"))
    assert code == 0
    assert (folder / "kept.jsonl").read_text() == (folder / "own.jsonl").read_text().splitlines(keepends=True)[1]
    assert json.loads((folder / "leakage.json").read_text())["dropped"] == 1
    code, _, said = call(*files, "--against", f"gone={folder / 'gone.jsonl'}")
    assert code == 2
    assert "evaluation sets are missing" in said
    code, _, said = call(*files, "--against", f"gone={folder / 'gone.jsonl'}", "--missing", "gone", "--encoder", "embedded")
    assert code == 1
    assert "gone: missing, as was said" in said
    assert "D4 not made" not in said


def test_a_recipe_registers_sets_with_their_passages(folder: Path, capsys, monkeypatch) -> None:
    """The questions that a recipe evaluates on are registered too; a set's knowledge base gives the words of its passages."""
    recipe = load_recipe(folder / "small.yaml")
    assert recipe.evaluate is not None
    text = (
        folder / "small.yaml"
    ).read_text() + "\ndecontaminate:\n  sets: {rivers: rivers.jsonl, own: {path: dev.jsonl, knowledge: KB}}\n"
    (folder / "more.yaml").write_text(text.replace("KB", str(recipe.knowledge.path)))
    loaded = load_recipe(folder / "more.yaml").decontaminate
    assert loaded is not None
    assert loaded.sets["rivers"] == EvaluationSet(path=folder / "rivers.jsonl")
    write_examples(folder / "rivers.jsonl", [KRAKOW])
    code, told, _ = run(
        "check-leaks", str(folder / "dev.jsonl"), "--recipe", str(folder / "more.yaml"), "--kb",
        str(recipe.knowledge.path), "--json", capsys=capsys, monkeypatch=monkeypatch,
    )  # fmt: skip
    counts, examples = json.loads(told)["counts"], len((folder / "dev.jsonl").read_text().splitlines())
    assert code == 1
    assert counts["own"]["D1"] == counts["own"]["D5"] == examples
    assert counts["rivers"] == dict.fromkeys(("D1", "D2", "D3", "D4", "D5"), 0)
    with pytest.raises(RecipeError, match="missing names 'x'"):
        load_recipe(folder / "more.yaml", ["decontaminate.missing=[x]"])


def test_questions_that_are_evaluated_on_name_passages_of_the_recipes_own_base(tmp_path: Path) -> None:
    """Registered by the recipe or by name; before the base is there, there is nothing to look them up in."""
    recipe = load_recipe(small_recipe(tmp_path))
    assert recipe.evaluate is not None
    asked, own = recipe.evaluate.questions, recipe.knowledge.path

    def sets(**named: EvaluationSet) -> dict[str, EvaluationSet]:
        settings = DecontaminateSettings(sets=named)
        return registered(recipe.model_copy(update={"decontaminate": settings})).sets

    assert sets() == {"evaluate": EvaluationSet(path=asked)}
    (own / "versions" / "1").mkdir(parents=True)
    assert sets() == {"evaluate": EvaluationSet(path=asked)}, "a build that was killed before it was the current one"
    (own / "current").write_text("1")
    other = EvaluationSet(path=tmp_path / "other.jsonl")
    assert sets(other=other) == {"evaluate": EvaluationSet(path=asked, knowledge=own), "other": other}
    assert sets(dev=EvaluationSet(path=asked)) == {"dev": EvaluationSet(path=asked, knowledge=own)}
    named = EvaluationSet(path=asked, knowledge=tmp_path / "kb")
    assert sets(dev=named) == {"dev": named}
