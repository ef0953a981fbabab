"""Classification by label likelihood: against brute force, without an end token, and trained through the command line."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import tiny
from raglan.cli import app
from raglan.decode import Asked, classify
from raglan.errors import CorpusError, RecipeError
from raglan.generator import HFGenerator
from raglan.knowledge import build_knowledge
from raglan.likelihood import sequence_logprob, token_logprob
from raglan.objective import AnswerObjective, MarginalObjective, MarginalRow
from raglan.rag import RAG
from raglan.recipe import ClassifyDecode, load_recipe
from raglan.recipe import MarginalObjective as MarginalSettings
from test_generator import made
from test_rag_decode import asked, next_logprobs, sharpened
from tiny import small_recipe

LABELS = {"SUPPORTS": "yes", "REFUTES": "no", "NOT ENOUGH INFO": "maybe"}


@pytest.fixture(scope="module", params=["bart", "t5", "llama", "reader"])
def generator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HFGenerator:
    return sharpened(made(request.param, tmp_path_factory.mktemp("models")))


def decode(labels: Any = LABELS) -> ClassifyDecode:
    return ClassifyDecode(kind="classify", labels=labels)


def by_brute_force(generator: HFGenerator, question: Asked, place: int) -> tuple[dict[str, float], dict[str, list[float]]]:
    """p(c|x), and of each class p(z|x,c), from whole next-word distributions of one prompt at a time."""
    prompts = question.prompts(generator.prompt)[place]
    prior = question.doc_logprobs[place].double().exp().tolist() if question.doc_logprobs and question.hits[place] else [1.0]
    words = [next_logprobs(generator, prompt, ()).exp() for prompt in prompts]
    joint = {
        name: [p * float(each[generator.answer_ids(text)[0]]) for p, each in zip(prior, words, strict=True)]
        for name, text in LABELS.items()
    }
    every = sum(sum(shares) for shares in joint.values())
    return (
        {name: sum(shares) / every for name, shares in joint.items()},
        {name: [share / sum(shares) for share in shares] for name, shares in joint.items()},
    )


def test_classes_equal_their_twin(generator: HFGenerator) -> None:
    question = asked()
    for place, answer in enumerate(classify(generator, question, decode())):
        classes, passages = by_brute_force(generator, question, place)
        assert {c.text: math.exp(c.logprob) for c in answer.candidates} == pytest.approx(classes, abs=2e-4)
        assert sum(math.exp(c.logprob) for c in answer.candidates) == pytest.approx(1, abs=1e-9)
        assert answer.text == max(classes, key=classes.__getitem__) == answer.candidates[0].text
        assert answer.logprob == answer.candidates[0].logprob
        assert list(answer.posterior) == pytest.approx(passages[answer.text], abs=2e-4)
        assert sum(answer.prior) == pytest.approx(1, abs=1e-6)
        assert len(answer.posterior) == len(answer.hits)
        assert answer.finished
        assert len(answer.ids) == 1
        assert answer.ids[0] not in generator.ends


def test_a_question_without_hits_is_classified_closed_book(generator: HFGenerator) -> None:
    question = asked(hits=[[0, 1], [], [3]])
    answer = classify(generator, question, decode())[1]
    classes, _ = by_brute_force(generator, question, 1)
    assert {c.text: math.exp(c.logprob) for c in answer.candidates} == pytest.approx(classes, abs=2e-4)
    assert answer.posterior == ()


def test_batches_and_the_order_of_passages_do_not_matter(generator: HFGenerator) -> None:
    question = asked()
    together = classify(generator, question, decode())
    assert question.doc_logprobs is not None
    for place, answer in enumerate(together):
        alone = Asked([question.queries[place]], [question.hits[place][::-1]], [question.doc_logprobs[place].flip(0)])
        turned = classify(generator, alone, decode())[0]
        assert turned.text == answer.text
        assert list(turned.posterior[::-1]) == pytest.approx(list(answer.posterior), abs=1e-4)
        assert {c.text: c.logprob for c in turned.candidates} == pytest.approx(
            {c.text: c.logprob for c in answer.candidates}, abs=1e-3
        )


def test_classes_that_begin_alike_or_not_at_all_are_named(generator: HFGenerator) -> None:
    with pytest.raises(RecipeError, match="'never' and 'not' begin with the same token"):
        classify(generator, asked(), decode({"a": "never", "b": "yes", "c": "not"}))
    with pytest.raises(RecipeError, match=r"'ж' \(class 'b'\) has no first token"):
        classify(generator, asked(), decode({"a": "yes", "b": "ж"}))


def test_a_list_of_labels_stands_for_itself() -> None:
    assert decode(["yes", "no"]).labels == {"yes": "yes", "no": "no"}
    with pytest.raises(ValueError, match="at least 2"):
        decode(["yes"])
    with pytest.raises(ValueError, match="put them in quotes"):
        decode({"SUPPORTS": True, "REFUTES": False})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("classes")
    build_knowledge(load_recipe(small_recipe(path)).knowledge)
    return path


@pytest.mark.parametrize("kind", ["bart", "t5", "llama", "reader"])
def test_what_is_trained_is_what_is_decoded(kind: str, folder: Path, tmp_path: Path) -> None:
    """The loss is minus the log of the unnormalised class probability, and over sequence and over token are one."""
    system = RAG.open(load_recipe(folder / "small.yaml"))
    generator = made(kind, tmp_path)
    losses = {}
    for over in ("sequence", "token"):
        aim = MarginalObjective(
            system.retriever, generator, MarginalSettings(kind="marginal", over=over, k=3, tokens="first", reduction="sum")
        )
        batch = aim.collate([MarginalRow("who built the tower?", "maybe so")])
        assert batch["labels"].tolist() == [[generator.answer_ids("maybe")[0]]]
        losses[over] = aim.loss(batch)[0].item()
    assert losses["sequence"] == pytest.approx(losses["token"], rel=1e-6)
    hits = system.retriever.retrieve(["who built the tower?"], 3)
    prior = system.retriever.prior(["who built the tower?"], hits)
    question = Asked(["who built the tower?"], hits, prior)
    each = torch.stack([next_logprobs(generator, prompt, ()) for prompt in question.prompts(generator.prompt)[0]])
    first = generator.answer_ids("maybe")[0]
    assert losses["token"] == pytest.approx(-float((prior[0].double() + each[:, first]).logsumexp(0)), rel=2e-3)


def test_with_the_end_token_the_two_methods_would_part(tmp_path: Path) -> None:
    generator = sharpened(made("bart", tmp_path))
    question = asked()
    assert question.doc_logprobs is not None
    prior = question.doc_logprobs[0].double()[None]
    ids = (generator.answer_ids("yes")[0], generator.eos)
    prompts = question.prompts(generator.prompt)[0]
    each = torch.tensor([[next_logprobs(generator, p, ids[:t])[ids[t]] for t in range(2)] for p in prompts]).double()[None]
    one, two = torch.tensor([[True, False]]), torch.tensor([[True, True]])
    assert float(sequence_logprob(prior, each, one)) == pytest.approx(float(token_logprob(prior, each, one)), abs=1e-9)
    assert abs(float(sequence_logprob(prior, each, two) - token_logprob(prior, each, two))) > 1e-6


def test_the_answer_objective_can_learn_first_tokens_only(tmp_path: Path) -> None:
    generator = made("bart", tmp_path)
    prompt = generator.prompt.render("who?", [])
    rows = [generator.row(prompt, answer) for answer in ("maybe so", "no")]
    aim = AnswerObjective(generator, tokens="first")
    batch = aim.collate(rows)
    assert batch["labels"].tolist() == [row["labels"][:1] for row in rows]
    expected = -sum(float(next_logprobs(generator, prompt, ())[row["labels"][0]]) for row in rows) / 2
    assert aim.loss(batch)[0].item() == pytest.approx(expected, rel=1e-4)


def claims(folder: Path, path: Path, **changes: Any) -> Path:
    """A recipe over the towers: that they are lighthouses is true (SUPPORTS), that they are millers is not."""
    rows = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    questions = []
    for n in range(120):
        claim = f"the tower {rows[n % 30]['title']} was a {'lighthouse' if n % 2 else 'miller'}"
        questions.append({"id": str(n), "query": claim, "answers": ["SUPPORTS" if n % 2 else "REFUTES"]})
    for split, part in (("claims", questions[:100]), ("claims-dev", questions[100:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    recipe = yaml.safe_load(path.read_text())
    recipe["stages"] = {"judge": {
        "data": {"kind": "questions", "path": "claims.jsonl", "dev": "claims-dev.jsonl"},
        "objective": {"kind": "marginal", "over": "token", "k": 2, "tokens": "first"},
        "train": {"max_steps": 70, "per_device_train_batch_size": 16, "learning_rate": 1e-2, "eval_strategy": "steps",
                  "eval_steps": 20},
    }}  # fmt: skip
    recipe["decode"] = {"kind": "classify", "labels": {"SUPPORTS": "yes", "REFUTES": "no"}}
    recipe["generator"] = {"model": "bart", "dtype": "float32"}
    if not (folder / "bart").is_dir():
        tiny.bart(folder / "bart")
    recipe["leak_check"] = "none"  # claims come round again: what is measured is whether two words are told apart
    recipe["evaluate"] = {"questions": "claims-dev.jsonl", "modes": ["retrieved"], "metrics": ["accuracy"], "k": [1]}
    recipe |= changes
    path = folder / "claims.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_building_training_and_evaluating_a_classifier(tmp_path: Path) -> None:
    path = claims(tmp_path, small_recipe(tmp_path))
    runner = CliRunner()
    assert runner.invoke(app, ["build", str(path)]).exit_code == 0
    done = runner.invoke(app, ["train", str(path)])
    assert done.exit_code == 0, done.output
    stage = next((load_recipe(path).run / "stages").iterdir())
    curve = json.loads((stage / "log.json").read_text())
    losses = [row["loss"] for row in curve if "loss" in row]
    assert losses[-1] < 0.3 < math.log(2) < losses[0]  # ln 2 would be to know the two words, and not which
    assert any("eval_loss" in row for row in curve)
    measured = runner.invoke(app, ["evaluate", str(path), "--json"])
    assert measured.exit_code == 0, measured.output
    figures = json.loads(measured.stdout)
    assert figures["untuned"]["retrieved/accuracy"]["mean"] <= 0.7
    assert figures["judge"]["retrieved/accuracy"]["mean"] >= 0.9
    assert figures["judge"]["retrieved/accuracy"]["n"] == 20
    assert "retrieved/em" not in figures["judge"]
    told = runner.invoke(app, ["answer", str(path), "the tower bcd was a miller", "--json"])
    assert told.exit_code == 0, told.output
    candidates = json.loads(told.stdout)[0]["candidates"]
    assert {c["answer"] for c in candidates} == {"SUPPORTS", "REFUTES"}
    assert sum(math.exp(c["logprob"]) for c in candidates) == pytest.approx(1, abs=1e-6)


def test_answers_that_are_no_class_and_labels_that_begin_alike_are_told_before_training(folder: Path, tmp_path: Path) -> None:
    path = claims(folder, folder / "small.yaml")
    system = load_recipe(path, ["decode={kind: classify, labels: [SUPPORTS, 'NO']}"])
    from raglan.train import train

    with pytest.raises(CorpusError, match=r"'REFUTES', which is none of decode\.labels: SUPPORTS, NO"):
        train(system)
    with pytest.raises(RecipeError, match="begin with the same token"):
        train(load_recipe(path, ["decode={kind: classify, labels: {SUPPORTS: 'yes', REFUTES: yeah}}"]))


def test_a_stage_that_learned_other_texts_is_another_stage(folder: Path) -> None:
    from raglan.stages import stages_of

    path = claims(folder, folder / "small.yaml")
    folders = {}
    for texts in ("right", "truth"):
        decode = f"decode={{kind: classify, labels: {{SUPPORTS: {texts}, REFUTES: false-hood}}}}"
        folders[texts] = stages_of(load_recipe(path, [decode]))[0][0].folder
    assert folders["right"] != folders["truth"]
    whole = []
    for names in ("a, b", "c, d"):
        changes = ["stages.judge.objective.tokens=all", f"decode={{kind: classify, labels: [{names}]}}"]
        whole.append(stages_of(load_recipe(path, changes))[0][0].folder)
    assert whole[0] == whole[1]  # what is learned there does not depend on the decoding


def test_training_that_does_not_suit_the_decoding_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    from raglan.train import train

    path = claims(folder, folder / "small.yaml")
    short = ["stages.judge.train.max_steps=1"]
    with caplog.at_level(logging.WARNING):
        train(load_recipe(path, [*short, "stages.judge.objective.tokens=all"]))
        assert "learns whole answers: objective.tokens: first" in caplog.text
        caplog.clear()
        train(load_recipe(path, [*short, "decode={kind: concat}"]))
        assert "nothing of how an answer ends" in caplog.text
