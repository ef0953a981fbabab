"""The paper's kinds of task: every shipped recipe loads, and builds, trains and evaluates on tiny models; data rules."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tiny
from raglan.cli import app
from raglan.data import learned_answers, load_examples
from raglan.errors import CorpusError
from raglan.knowledge import build_knowledge
from raglan.metrics import found_answers, regex_match, regex_recall
from raglan.rag import RAG
from raglan.recipe import QuestionData, Recipe, load_recipe
from raglan.records import Example
from raglan.text import words
from raglan.wordings import wordings
from tiny import small_recipe

FOLDER = Path(__file__).parent.parent / "recipes"
THEMSELVES = ("self_rag", "rag_tuning")  # they say what is to be changed
RECIPES = sorted(path for path in FOLDER.glob("*.yaml") if not path.stem.startswith(THEMSELVES))
FIGURES = {
    "rag_open_qa": {"em", "f1"},
    "rag_nq": {"em", "f1"},
    "rag_abstractive_qa": {"rouge_l", "bleu1", "distinct_3"},
    "rag_question_generation": {"bleu1", "q_bleu1", "distinct_3"},
    "rag_fact_verification": {"accuracy"},
}
TASKS = [path for path in RECIPES if path.stem in FIGURES]  # the others have tests of their own


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 towers, and questions of every kind about them, each kind in a folder of its own."""
    path = tmp_path_factory.mktemp("tasks")
    small_recipe(path)
    tiny.bart(path / "bart")
    towers = [json.loads(line) for line in (path / "corpus.jsonl").read_text().splitlines()]
    rows: dict[str, list[tuple[str, list[str]]]] = {name: [] for name in FIGURES}
    for n, tower in enumerate(towers):
        _, _, name, _, _, _, _, miller, _, year = tower["text"].split()
        rows["rag_open_qa"] += [(f"who built {name}", [miller]), (f"what year was {name} built", [year, f"the year {year}"])]
        rows["rag_abstractive_qa"].append((f"who built {name} and when", [f"{miller} built it in {year}", f"{miller} did"]))
        rows["rag_question_generation"].append((name, [f"this tower of {year} was built by {miller}"]))
        claim = f"the tower {name} was built by miller {miller if n % 3 == 0 else 'zzz'}"
        label = ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO")[n % 3]
        rows["rag_fact_verification"].append((claim, [label]))
    rows["rag_nq"] = rows["rag_open_qa"]
    for kind, pairs in rows.items():
        (path / kind).mkdir()
        for split, part in (("train", pairs[:18]), ("dev", pairs[18:24]), ("test", pairs[24:])):
            lines = [json.dumps({"id": str(n), "query": x, "answers": y}) for n, (x, y) in enumerate(part)]
            (path / kind / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return path


def tiny_overrides(folder: Path, recipe: Path) -> list[str]:
    """The recipe as it is shipped, on tiny models, in another place, and for a few steps."""
    reads = "reader" if "generator: {model: embedded" in recipe.read_text() else "bart"
    dpr = "query_model" in recipe.read_text()
    encoder = {"model": str(folder / "encoder" / "encoder"), "dtype": "float32"}
    own = "stages.rag.train" if "teach:" in recipe.read_text() else "train"
    return [
        f"runs={folder / 'runs'}", f"knowledge.path={folder / 'kb'}", f"knowledge.encoder={json.dumps(encoder)}",
        f"generator.model={folder / reads}", "generator.dtype=float32", "knowledge.chunk=null", "train.max_steps=3",
        "train.logging_steps=1", "train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=1",
        f"{own}.eval_strategy=steps", f"{own}.eval_steps=3", "train.bf16=false", "decode.max_new_tokens=6",
        *(["stages.teach.data.count=8"] if "teach:" in recipe.read_text() else []),
        *(["retriever.k=20"] if dpr else []),
    ]  # fmt: skip


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_every_kind_builds_trains_and_evaluates(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCUMENTS", str(folder / "corpus.jsonl"))
    monkeypatch.setenv("QUESTIONS", str(folder / path.stem))
    changes = [c for c in tiny_overrides(folder, path) if path.stem != "rag_fact_verification" or "decode." not in c]
    runner = CliRunner()
    for command in ("build", "train"):
        done = runner.invoke(app, [command, str(path), *changes])
        assert done.exit_code == 0, done.output
    recipe = load_recipe(path, changes)
    last = list(recipe.trainings())[-1]
    stage = next(found for found in (recipe.run / "stages").iterdir() if found.name.startswith(last))
    curve = json.loads((stage / "log.json").read_text())
    assert [row["step"] for row in curve if "loss" in row] == [1, 2, 3]
    assert any("eval_loss" in row for row in curve)
    assert {found.name for found in (stage / "result").iterdir()} == {"generator", "query_encoder", "manifest.json"}
    done = runner.invoke(app, ["evaluate", str(path), *changes, "--json"])
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert figures.pop("judge", "no judge") == "no judge"  # told of tasks whose answers are long
    assert list(figures) == ["untuned", last]
    for name, system in figures.items():
        rows = (next((recipe.run / "evaluations").glob(f"{name}-*")) / "predictions.jsonl").read_text().splitlines()
        texts = [words(json.loads(row)["predictions"]["retrieved"]["text"]) for row in rows]
        grams = [tuple(text[start : start + 3]) for text in texts for start in range(len(text) - 2)]
        for metric in FIGURES[path.stem] - (set() if grams else {"distinct_3"}):  # an untaught model writes hardly a word
            value = system[f"retrieved/{metric}"]
            assert value["n"] == len(rows)
            assert value["low"] <= value["mean"] <= value["high"]
            assert (
                value["mean"] == pytest.approx(len(set(grams)) / len(grams)) if metric == "distinct_3" else value["mean"] <= 1
            )
    table = runner.invoke(app, ["evaluate", str(path), *changes])
    assert table.exit_code == 0, table.output
    page = runner.invoke(app, ["report", str(path), "-o", str(folder / f"{path.stem}.html"), *(f"--set={c}" for c in changes)])
    assert page.exit_code == 0, page.output


def test_the_search_alone_can_be_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = next(path for path in RECIPES if path.stem == "rag_nq")
    monkeypatch.setenv("DOCUMENTS", str(folder / "corpus.jsonl"))
    monkeypatch.setenv("QUESTIONS", str(folder / path.stem))
    changes = [*tiny_overrides(folder, path), "evaluate.modes=[]", "name=search"]
    assert CliRunner().invoke(app, ["build", str(path), *changes]).exit_code == 0
    done = CliRunner().invoke(app, ["evaluate", str(path), *changes, "--json"])
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)["untuned"]
    assert "answer_recall@20" in figures
    assert not any("/" in name for name in figures)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_two_paths_are_all_that_is_to_be_changed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(re.findall(r"\$\{(\w+)\}", path.read_text())) == {"DOCUMENTS", "QUESTIONS"}
    monkeypatch.setenv("DOCUMENTS", "/d")
    monkeypatch.setenv("QUESTIONS", "/q")
    recipe = load_recipe(path)
    assert recipe.name == path.stem.replace("_", "-")
    assert recipe.knowledge.documents == (Path("/d"),)
    assert recipe.evaluate is not None or recipe.grid is not None
    assert path not in TASKS or set(recipe.evaluate.metrics) == FIGURES[path.stem]


def test_the_nq_recipe_is_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCUMENTS", "/d")
    monkeypatch.setenv("QUESTIONS", "/q")
    recipe: Any = load_recipe(next(path for path in RECIPES if path.stem == "rag_nq"))
    aim = recipe.objective
    assert (aim.over, aim.k, aim.reduction, aim.label_smoothing) == ("sequence", 5, "sum", 0.1)
    assert (recipe.retriever.k, recipe.retriever.prior.temperature) == (50, 1.0)
    assert (recipe.decode.kind, recipe.decode.mode, recipe.decode.beams) == ("rag_sequence", "thorough", 1)
    assert recipe.knowledge.chunk is None
    assert recipe.data.answers == "each"


@pytest.fixture(scope="module")
def system(folder: Path) -> RAG:
    recipe: Recipe = load_recipe(folder / "small.yaml")
    build_knowledge(recipe.knowledge)
    return RAG.open(recipe)


def learned(system: RAG, examples: list[Example], **settings: Any) -> list[tuple[str, ...]]:
    data = QuestionData(kind="questions", path=Path("q.jsonl"), **settings)
    return [example.answers for example in learned_answers(examples, data, system.retriever, 0)]


def test_first_each_and_random_answers(system: RAG) -> None:
    examples = [Example(str(n), "who?", ("a", "b", "c")) for n in range(60)]
    assert learned(system, examples) == [("a",)] * 60
    assert learned(system, examples, answers="each") == [("a", "b", "c")] * 60
    drawn = learned(system, examples, answers="random")
    assert {answers[0] for answers in drawn} == {"a", "b", "c"}
    assert all(len(answers) == 1 for answers in drawn)
    assert learned(system, examples, answers="random") == drawn


def test_answers_that_no_passage_holds_are_not_learned(system: RAG, caplog: pytest.LogCaptureFixture) -> None:
    corpus = system.retriever.base.corpus
    passage = corpus[4]
    miller = passage.text.split()[7]
    examples = [
        Example("1", passage.text, ("nobody", miller, "in 1704")),
        Example("2", passage.text, ("nowhere",)),
    ]
    with caplog.at_level(logging.WARNING):
        assert learned(system, examples, answers="each", answers_found_in=1) == [(miller, "in 1704")]
    assert "1 of 2 questions have no answer in 1 passages" in caplog.text
    assert learned(system, examples, answers_found_in=1) == [(miller,)]
    other = next(corpus[row].text.split()[7] for row in range(30) if corpus[row].text.split()[7] not in passage.text)
    far = [Example("3", passage.text, (other,))]
    assert learned(system, far, answers_found_in=30) == [(other,)]
    with pytest.raises(CorpusError, match="no answer occurs in the best 1 passages"):
        learned(system, far, answers_found_in=1)


def test_a_regular_expression_is_learned_as_its_commonest_match(system: RAG) -> None:
    corpus = system.retriever.base.corpus
    passage = corpus[4]
    examples = [Example("1", passage.text, (r"17\d\d", r"MILLER\s+\w+")), Example("2", "who?", (r"18\d\d",))]
    millers = [corpus[row].text.split()[7] for row in range(30)]
    found = learned(system, examples, answers="each", answers_are="regex", answers_found_in=1)
    assert found == [("1704", f"miller {millers[4]}")]
    everywhere = learned(system, [Example("3", "who?", (r"\bb\w+ by",))], answers_are="regex")  # of all 30 passages
    assert everywhere == [("built by",)]
    with pytest.raises(CorpusError, match="is no regular expression"):
        learned(system, [Example("4", "who?", ("x(",))], answers_are="regex")


def test_a_regular_expression_that_matches_nowhere_is_learned_as_its_wordings(system: RAG, caplog: Any) -> None:
    examples = [Example("1", "who?", (r"(Zoe|Zed) Quill?", "Xi")), Example("2", "who?", (r"17\d\d",))]
    with caplog.at_level(logging.INFO):
        found = learned(system, examples, answers="each", answers_are="regex")
    assert found[0] == ("Zoe Quil", "Zoe Quill", "Zed Quil", "Zed Quill", "Xi")
    assert len(found[1]) == 1
    assert re.fullmatch(r"17\d\d", found[1][0])
    assert "1 of 2 regular expressions match no passage" in caplog.text
    with pytest.raises(CorpusError, match="no answer occurs"):
        learned(system, examples[:1], answers_are="regex", answers_found_in=30)


OPTIONAL = f"({'|'.join(f'wa{n}' for n in range(18))})"


@pytest.mark.parametrize(
    ("expression", "texts"),
    [
        ("Long\\s+Island", ["Long Island"]),
        ("Nov(ember|\\.)? 1942", ["Nov 1942", "November 1942", "Nov. 1942"]),
        ("\\bOhio\\b", ["Ohio"]),
        ("^a(?:b|c)*$", ["a", "ab", "ac"]),
        ("19[67]5", ["1965", "1975"]),
        ("(\\d+|three) feet", ["feet", "three feet"]),
        ("x{2,3}", ["xx"]),
        ("a.b[^c]", ["a b"]),
        (".*", []),
        ("(ab){0} x", ["x"]),
        (OPTIONAL + "? x", ["x", *(f"wa{n} x" for n in range(15))]),
        (OPTIONAL + "*", [f"wa{n}" for n in range(15)]),
        ("(?i)Bo", ["Bo"]),
    ],
)
def test_wordings_by_hand(expression: str, texts: list[str]) -> None:
    assert wordings(expression) == texts


def test_wordings_are_bounded_and_fit_their_expression() -> None:
    many = wordings(" ".join(f"(w{n})?" for n in range(40)))
    assert len(many) == len(set(many)) == 16
    told = r"(Mr\.? |Mister )?(John|Jack) (F\. )?Kennedy(,? Jr)?"
    assert len(wordings(told)) == 16
    assert len(wordings(told, most=100)) > 16
    assert all(regex_match(text, [told]) for text in wordings(told, most=100))
    with pytest.raises(CorpusError, match="is no regular expression"):
        wordings("x(")


def test_figures_of_regular_expressions() -> None:
    assert regex_match("Nov. 1942", [r"nov(\.|ember)? 1942"]) == 1
    assert regex_match(" november 1942, they say", [r"nov(\.|ember)? 1942"]) == 1  # from its start
    assert regex_match("in nov 1942", [r"nov(\.|ember)? 1942"]) == 0
    assert regex_match("", ["x"]) == 0
    assert regex_match("b", ["a", "b"]) == 1
    assert regex_recall(["it was in\nNovember 1942"], [r"nov(ember)? 1942"]) == 1
    assert regex_recall([], ["x"]) == 0
    assert found_answers(["the Old Mill"], ["old mill", "an old mill", "ill"]) == ["old mill", "an old mill"]


def test_answers_that_are_patterns_are_measured_as_patterns(folder: Path, system: RAG, tmp_path: Path) -> None:
    from raglan.evaluate import measure, summarise
    from raglan.recipe import EvaluateSettings

    corpus = system.retriever.base.corpus
    lines = [json.dumps({"id": str(n), "query": corpus[n].text, "answers": [".*"] if n else ["xx+"]}) for n in range(3)]
    (tmp_path / "q.jsonl").write_text("\n".join(lines) + "\n")
    settings = EvaluateSettings(
        questions=tmp_path / "q.jsonl",
        answers_are="regex",
        modes=("retrieved",),
        metrics=("em", "f1", "rouge_l", "bleu1", "q_bleu1"),
        k=(1,),
    )
    rows = measure(system, load_examples(settings.questions, corpus), settings)
    figures = summarise(rows, settings)
    assert [row["figures"]["retrieved/em"] for row in rows] == [0, 1, 1]
    assert figures["retrieved/em"].mean == pytest.approx(2 / 3)
    assert figures["answer_recall@1"].mean == pytest.approx(2 / 3)
    assert not {"retrieved/f1", "retrieved/rouge_l", "retrieved/bleu1", "retrieved/q_bleu1"} & set(figures)


def test_documents_are_found_by_any_of_their_passages(folder: Path, tmp_path: Path) -> None:
    from raglan.evaluate import interval_kinds, measure, summarise
    from raglan.recipe import EvaluateSettings

    (tmp_path / "docs").mkdir()
    for name in ("north", "south"):
        parts = [f"## {name} {n}\n\nThe {name} tower number {n} was built by the water in {1700 + n}." for n in range(3)]
        (tmp_path / "docs" / f"{name}.md").write_text("\n\n".join(parts))
    changes = [
        f"knowledge.documents={tmp_path / 'docs'}",
        f"knowledge.path={tmp_path / 'kb'}",
        "knowledge.chunk={max_tokens: 64}",
    ]
    recipe: Recipe = load_recipe(folder / "small.yaml", changes)
    base = build_knowledge(recipe.knowledge)
    assert [p.document for p in base.corpus] == ["north.md"] * 3 + ["south.md"] * 3
    lines = [
        {"id": "1", "query": base.corpus[1].text, "relevant": ["north.md#0"]},  # another passage of the right document
        {"id": "2", "query": base.corpus[4].text, "relevant": ["south.md#1"]},
        {"id": "3", "query": base.corpus[0].text, "relevant": ["north.md#0", "south.md#2"]},
        {"id": "4", "query": base.corpus[0].text, "relevant": []},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = EvaluateSettings(questions=tmp_path / "q.jsonl", modes=(), k=(1, 6))
    system = RAG.open(recipe)
    rows = measure(system, load_examples(settings.questions, base.corpus), settings)
    found = [row["hits"] for row in rows]
    wanted = [{"north.md"}, {"south.md"}, {"north.md", "south.md"}]
    for row, hits, documents in zip(rows, found, wanted, strict=False):
        for k in (1, 6):
            seen = {base.corpus[base.corpus.row(hit["id"]) or 0].document for hit in hits[:k]}
            assert row["figures"][f"document_recall@{k}"] == len(seen & documents) / len(documents)
    assert rows[3]["figures"]["document_recall@1"] is None
    figures = summarise(rows, settings)
    assert figures["document_recall@6"].mean == figures["recall@6"].mean == 1
    assert figures["document_recall@1"].mean >= figures["recall@1"].mean
    assert figures["document_recall@1"].n == 3
    assert interval_kinds(figures) == "bootstrap over questions"
    assert interval_kinds(["recall@1", "gold/bleu1", "retrieved/bleu1", "gold/distinct_3"]) == (
        "bootstrap over questions, by jackknife for bleu1, distinct_3"
    )
    assert interval_kinds(["gold/bleu1"]) == "jackknife for bleu1"


def test_rows_that_are_passages_have_no_recall_by_document(system: RAG, tmp_path: Path) -> None:
    from raglan.evaluate import measure
    from raglan.recipe import EvaluateSettings

    (tmp_path / "q.jsonl").write_text(json.dumps({"id": "1", "query": "who built it", "relevant": ["p3"]}) + "\n")
    settings = EvaluateSettings(questions=tmp_path / "q.jsonl", modes=(), k=(1,))
    rows = measure(system, load_examples(settings.questions, system.retriever.base.corpus), settings)
    assert not any(name.startswith("document_recall") for name in rows[0]["figures"])
