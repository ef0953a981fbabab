"""Training: what learns and what must not, rows, lessons, cached scores, and that it learns, through the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raglan.candidates import lsr_rows
from raglan.data import answer_rows, choose_passages, load_examples, resolve, stage_examples
from raglan.datapoints import points_figures, read_points
from raglan.errors import CorpusError, RecipeError
from raglan.evaluate import compare, evaluate_recipe
from raglan.knowledge import KnowledgeBase, build_knowledge
from raglan.lessons import lessons
from raglan.objective import LsrObjective
from raglan.rag import RAG
from raglan.recipe import LessonData, QuestionData, Recipe, load_recipe
from raglan.records import Example, Passage
from raglan.retriever import Retriever
from raglan.scores import Pair, ScoreTable
from raglan.stages import finished_parts
from raglan.train import train
from tiny import small_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small")
    build_knowledge(load_recipe(small_recipe(path)).knowledge)
    return path


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Recipe:
    return load_recipe(folder / "small.yaml")


@pytest.fixture
def system(recipe: Recipe) -> RAG:
    return RAG.open(recipe)


def questions(recipe: Recipe, system: RAG) -> list[Example]:
    return load_examples(recipe.stages["read"].data.path, system.retriever.base.corpus)  # type: ignore[union-attr]


def test_lsr_moves_the_query_tower_and_nothing_else(recipe: Recipe, system: RAG, folder: Path) -> None:
    """One backward pass: gradients in the whole query tower, none elsewhere; passage tower and index byte-identical."""
    settings = recipe.stages["find"].objective
    rows = lsr_rows(questions(recipe, system), system, settings, folder / "scores-a")  # type: ignore[arg-type]
    encoder = system.retriever.encoder
    fingerprint = encoder.passage_fingerprint
    files = {path: path.read_bytes() for path in system.retriever.base.folder.rglob("*") if path.is_file()}
    objective = LsrObjective(system.retriever, settings)  # type: ignore[arg-type]
    assert encoder.query_tower is not encoder.passage_tower
    before = {name: p.detach().clone() for name, p in encoder.query_tower.named_parameters()}
    passages = {name: p.detach().clone() for name, p in encoder.passage_tower.named_parameters()}
    loss, figures = objective.loss(objective.collate(rows[:8]))
    loss.backward()
    norm = sum(float(p.grad.norm()) for p in objective.parameters()["query_encoder"] if p.grad is not None)
    assert norm > 0
    used = [name for name, p in encoder.query_tower.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert any("word_embeddings" in name for name in used)
    assert any("layer.0" in name for name in used)
    assert all(p.grad is None for p in encoder.passage_tower.parameters())
    assert all(p.grad is None for p in system.generator.model.parameters())
    torch.optim.SGD(objective.parameters()["query_encoder"], lr=0.1).step()
    assert any(not torch.equal(before[name], p) for name, p in encoder.query_tower.named_parameters())
    assert all(torch.equal(passages[name], p) for name, p in encoder.passage_tower.named_parameters())
    encoder._passage_fingerprint = None
    assert encoder.passage_fingerprint == fingerprint
    assert all(path.read_bytes() == content for path, content in files.items())
    assert set(figures) == {"target_entropy", "entropy", "flat", "agreement"}


def test_lsr_on_a_toy_reaches_its_fixed_point(recipe: Recipe, system: RAG) -> None:
    """A target that names one passage per query: the divergence goes from nats to nearly nothing."""
    from raglan.objective.lsr import LsrRow

    settings = recipe.stages["find"].objective.model_copy(update={"target": "prob", "tau": 1.0, "gamma": 0.05})  # type: ignore[union-attr]
    objective = LsrObjective(system.retriever, settings)  # type: ignore[arg-type]
    chance = np.random.default_rng(0)
    rows = []
    for example in questions(recipe, system)[:2]:
        sums = np.full(5, -9.0, np.float32)
        sums[chance.integers(5)] = 0.0
        rows.append(LsrRow(example.query, chance.choice(30, 5, replace=False), sums * 5, 3))
    settings = settings.model_copy(update={"target": "sum_logprob", "tau": 10.0})
    objective.settings = settings
    optimiser = torch.optim.Adam(objective.parameters()["query_encoder"], lr=2e-3)
    losses = []
    for _ in range(300):
        loss, _ = objective.loss(objective.collate(rows))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    assert losses[0] > 0.5
    assert losses[-1] < 0.05


def test_scores_are_computed_once_whatever_the_objective_settings(recipe: Recipe, system: RAG, tmp_path: Path) -> None:
    examples, table = questions(recipe, system)[:6], tmp_path / "scores"
    settings = recipe.stages["find"].objective
    first = lsr_rows(examples, system, settings, table)  # type: ignore[arg-type]
    files = {path: path.stat().st_mtime_ns for path in table.iterdir()}
    changes = (
        {"tau": 3.0, "target": "sum_logprob"},
        {"gamma": 0.5, "direction": "target_first"},
        {"k": 3},
        {"score_eos": False},
    )
    for change in changes:
        lsr_rows(examples, system, settings.model_copy(update=change), table)  # type: ignore[union-attr, arg-type]
        assert {path: path.stat().st_mtime_ns for path in table.iterdir()} == files
    generator = system.generator
    for row, example in zip(first, examples, strict=True):
        for place, passage in enumerate(row.candidates):
            prompt = generator.prompt.render(example.query, [system.retriever.base.corpus[int(passage)]])
            alone = generator.token_logprobs([prompt], [example.answers[0]])[0]
            assert row.answer_logprobs[place] == pytest.approx(alone.sum(), abs=1e-4)
            assert row.answer_length == len(alone)
    passage = system.retriever.base.corpus[int(first[0].candidates[0])]
    again = ScoreTable(table, generator)
    again.complete([Pair(examples[0].query, (passage,), examples[0].answers[0])])
    assert again.calls == 0
    again.complete([Pair(examples[0].query, (passage,), "another answer")])
    assert again.calls == 1


def test_rows_hold_the_passages_that_were_asked_for(recipe: Recipe, system: RAG) -> None:
    examples = questions(recipe, system)
    for source, k in (("gold", 1), ("mixed", 3), ("retrieved", 3)):
        chosen = choose_passages(examples, source, k, system.retriever, seed=5)
        assert chosen == choose_passages(examples, source, k, system.retriever, seed=5)
        for example, passages in zip(examples, chosen, strict=True):
            ids = [one.passage.id for one in passages]
            assert len(ids) == len(set(ids)) == k
            assert source == "retrieved" or example.relevant[0] in ids
    mixed = choose_passages(examples, "mixed", 3, system.retriever, 5)
    places = [[one.passage.id for one in own].index(e.relevant[0]) for e, own in zip(examples, mixed, strict=True)]
    assert len(set(places)) == 3  # the place of the gold passage tells nothing
    data = QuestionData(kind="questions", path=Path("x"), passages=3)
    whole = answer_rows(examples, data, system.retriever, system.generator, 0)
    single = answer_rows(examples, data.model_copy(update={"passages_a_row": 1}), system.retriever, system.generator, 0)
    assert (len(whole), len(single)) == (len(examples), 3 * len(examples))
    assert all(row["input_ids"].count(2) == 3 for row in whole)
    assert all(row["input_ids"].count(2) == 1 for row in single)


@pytest.mark.parametrize(
    ("source", "a_row", "searches"),
    [("retrieved", 1, 1), ("mixed", None, 1), ("mixed", 1, 1), ("gold", 1, 0), ("none", None, 0)],
)
def test_what_a_row_was_made_of_is_kept(
    source: Any, a_row: int | None, searches: int, recipe: Recipe, system: RAG, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Line for line: from a data point alone its row can be made again; scores and ranks are the one search's."""
    asked = questions(recipe, system)[:10]
    asked[0] = replace(asked[0], answers=("odo", "a miller"))
    asked[1] = replace(asked[1], history=("what stands there", "a tower"))
    data = QuestionData(kind="questions", path=Path("x"), source=source, passages=3, passages_a_row=a_row)
    calls, search = [], Retriever.search
    monkeypatch.setattr(Retriever, "search", lambda *given, **more: calls.append(1) or search(*given, **more))
    rows = answer_rows(asked, data, system.retriever, system.generator, 0, keep=tmp_path / "data")
    assert len(calls) == searches
    assert rows == answer_rows(asked, data, system.retriever, system.generator, 0)
    points = read_points(tmp_path / "data")
    assert [point.id for point in points] == [f"questions-{n}" for n in range(len(rows))]
    assert points_figures(tmp_path / "data") == {"seed": 0, "points": len(rows)}
    known = {example.id: example for example in asked}
    texts = system.retriever.search_texts([e.query for e in asked], [e.history for e in asked])
    hits = dict(zip(known, system.retriever.retrieve(texts, 4), strict=True))  # three, and as many as one may have of its own
    for row, point in zip(rows, points, strict=True):
        example = known[point.example_id]
        passages = [Passage(context.passage_id, context.text, context.title) for context in point.contexts]
        prompt = system.generator.prompt.render(point.query, passages, history=point.history)
        assert system.generator.row(prompt, point.answer) == row
        assert point.prompt == prompt.text
        assert (point.query, point.history, point.split, point.seed) == (example.query, example.history, "train", 0)
        assert point.answer in example.answers
        assert point.retriever == (system.retriever.fingerprint if searches else "")
        found = {hit.passage.id: (pytest.approx(hit.score), hit.rank) for hit in hits[example.id]} if searches else {}
        for context in point.contexts:
            assert (context.score, context.rank) == found.get(context.passage_id, (None, len(found) + 1))
            assert context.passage_id in found or context.passage_id in example.relevant
    monkeypatch.setenv("RANK", "1")  # of several ranks one keeps them
    assert answer_rows(asked, data, system.retriever, system.generator, 0, keep=tmp_path / "other") == rows
    assert not (tmp_path / "other").exists()


def test_relevant_ids_are_resolved_or_refused(system: RAG) -> None:
    corpus = system.retriever.base.corpus
    assert resolve(Example("1", "q", relevant=("p3",)), corpus, "f").relevant == ("p3",)
    quoted = Example("1", "q", metadata={"evidence": [{"document": "p3", "quote": corpus[3].text[4:19]}]})
    assert resolve(quoted, corpus, "f").relevant == ("p3",)
    with pytest.raises(CorpusError, match="names 'nobody' as relevant, which is not in the corpus"):
        resolve(Example("1", "q", relevant=("nobody",)), corpus, "f")
    with pytest.raises(CorpusError, match="quotes words that are not in 'p3'"):
        resolve(Example("1", "q", metadata={"evidence": [{"document": "p3", "quote": "no such"}]}), corpus, "f")


def test_lessons_ask_for_words_of_their_passage(vessen: Path, tmp_path: Path) -> None:
    from raglan.corpus import Corpus, write_corpus
    from raglan.documents import read_documents
    from raglan.records import Passage

    documents = read_documents([vessen / "documents" / "places"]).documents
    passages = [Passage(d.id, " ".join(d.text.split()), d.id, d.id) for d in documents]
    passages.append(Passage("zh", "陸特在1786年開創了梵語的學術研究，影響深遠。", "梵語", "zh"))
    write_corpus(tmp_path, passages)
    corpus = Corpus(tmp_path)
    made = lessons(corpus, 300, seed=2)
    assert len(made) == len({e.id for e in made}) == 300
    assert made == lessons(corpus, 300, seed=2)
    assert made != lessons(corpus, 300, seed=3)
    for example in made:
        text = corpus[corpus.row(example.relevant[0]) or 0].text
        assert example.answers[0] in text
        assert example.query.endswith(("?", "？"))
    assert {e.relevant[0] for e in made} >= {p.id for p in passages}
    write_corpus(tmp_path / "none", [Passage("x", "nothing here")])
    with pytest.raises(CorpusError, match="no lesson can be cut"):
        lessons(Corpus(tmp_path / "none"), 5)


def test_unanswered_questions_do_not_train(recipe: Recipe, system: RAG, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"id": "1", "query": "q", "relevant": ["p1"]}\n')
    with pytest.raises(CorpusError, match="holds no question with an answer"):
        stage_examples(QuestionData(kind="questions", path=tmp_path / "q.jsonl"), system.retriever.base.corpus, 0)
    assert len(stage_examples(LessonData(kind="lessons", count=7), system.retriever.base.corpus, 0)) == 7


def test_it_learns_and_a_finished_stage_is_not_trained_twice(folder: Path) -> None:
    """Through `train` and `evaluate`: held-out loss falls, training questions are answered, the second run does nothing."""
    path = small_recipe(folder, name="learns")
    recipe = load_recipe(path, ["stages.read.train.num_train_epochs=40", "evaluate.questions=train.jsonl", "leak_check=none"])
    parts = train(recipe)
    (stage,) = (folder / "runs" / "learns" / "stages").glob("read-*")
    log = json.loads((stage / "log.json").read_text())
    points = read_points(stage / "data")
    assert [len(point.contexts) for point in points] == [2] * 40
    assert json.loads((stage / "result" / "manifest.json").read_text())["data"] == {"seed": 1, "points": 40}
    losses = [row["loss"] for row in log if "loss" in row]
    assert losses[-1] < 0.6 * losses[0]
    made = Path(parts.generator or "").parent.joinpath("manifest.json").stat().st_mtime_ns
    assert train(recipe) == parts
    assert Path(parts.generator or "").parent.joinpath("manifest.json").stat().st_mtime_ns == made
    before, after = evaluate_recipe(recipe)
    assert [before.system, after.system] == ["untuned", "find"]
    difference = compare(before, after)
    assert difference["gold/f1"].low > 0
    assert after.figures["gold/em"].mean > before.figures["gold/em"].mean
    assert len(after.rows) == 40
    assert all(0 <= value <= 1 for row in after.rows for value in row["figures"].values() if value is not None)
    assert {"recall@1", "mrr@10", "closed_book/em", "retrieved/truncated"} <= set(after.figures)
    again = evaluate_recipe(recipe)
    assert [e.folder for e in again] == [before.folder, after.folder]
    assert finished_parts(recipe)[-1][1] == parts
    assert KnowledgeBase.open(folder / "kb").version in (after.folder / "manifest.json").read_text()


def test_stages_are_found_by_what_went_into_them(folder: Path) -> None:
    path = small_recipe(folder, name="changed")
    train(load_recipe(path, ["stages.read.train.max_steps=2", "stages.find.train.max_steps=2"]))
    with pytest.raises(RecipeError, match="stage 'read' comes before 'find' and is not done"):
        train(load_recipe(path, ["stages.read.train.max_steps=3"]), only="find")
    with pytest.raises(RecipeError, match="there is no stage 'reed'; the recipe has read, find"):
        train(load_recipe(path), only="reed")
    with pytest.raises(RecipeError, match=r"stages\.read\.train"):
        train(load_recipe(path, ["stages.read.train.lr_scheduler_type=crooked"]))


def test_accumulation_changes_nothing(folder: Path) -> None:
    """1×8 ≡ 4×2: the loss is divided by the answer tokens of the whole accumulated batch."""
    shared = ["stages.find.train.max_steps=1", "stages.read.train.max_steps=4", "train.lr_scheduler_type=constant"]
    shared += ["train.train_sampling_strategy=sequential", "train.max_grad_norm=0", "train.learning_rate=1e-3"]
    weights = []
    for size, times in ((8, 1), (2, 4)):
        extra = [f"train.per_device_train_batch_size={size}", f"train.gradient_accumulation_steps={times}"]
        recipe = load_recipe(small_recipe(folder, name=f"accumulate{size}"), [*shared, *extra])
        parts = train(recipe, only="read")
        weights.append([p.detach().clone() for p in parts.open(recipe).generator.model.parameters()])
    assert all(torch.allclose(a, b, atol=2e-4) for a, b in zip(*weights, strict=True))
