"""Self-RAG's data: what judges are asked, the rules, critic data, the eight steps, and a kill at any moment."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as checks
from hypothesis import strategies as st

import tiny
from fault_server import KEY, Fault, FaultServer
from raglan.artifact import read_manifest
from raglan.calls.structured import parse, strict_schema
from raglan.critique import Critique, kappa, read_audit
from raglan.critique.annotate import annotate
from raglan.critique.critic_data import balanced, candidates
from raglan.critique.judgements import LABELS, TOKENS, Judgement, Reject, Template, Verdict, read_reply, reply_model, templates
from raglan.critique.rules import Rules
from raglan.critique.sources import Row, drawn
from raglan.critique.teacher import PIECE, Book, CriticLabels, Labelled, Teacher
from raglan.critique_tables import critique_tables
from raglan.data import answer_rows
from raglan.documents import read_examples
from raglan.errors import CallsStopped, CheckpointError, CorpusError, RecipeError
from raglan.generator import open_generator
from raglan.knowledge import build_knowledge
from raglan.marked_prompt import GROUPS
from raglan.recipe import CriticDataSettings, QuestionData, load_recipe
from raglan.records import Passage
from raglan.text import sentences
from raglan.train import train
from test_cli import run

TOWNS = ("Arbel", "Corvin", "Dunmore", "Estwick", "Farrow", "Glenholt", "Harwick", "Ilmere", "Jarrow", "Kelder")


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def small(folder: Path, *, annotator: str = "", more: str = "") -> Path:
    """Ten towns with a mill and a bridge each, 20 questions, four of them without an answer."""
    documents, questions = [], []
    for n, town in enumerate(TOWNS):
        mill = f"The mill of {town} was built by Anna {town}sen in {1700 + n}. It has {n + 3} wheels of oak, on the quay."
        bridge = f"The bridge at {town} is {40 + n} metres long. It was closed for trade."
        documents += [
            {"id": f"mill-{n}", "title": f"{town} > Mill", "text": mill},
            {"id": f"bridge-{n}", "title": f"{town} > Bridge", "text": bridge},
        ]  # fmt: skip
        questions.append(
            {
                "id": f"q{n}",
                "query": f"When was the mill of {town} built?",
                "answers": [str(1700 + n)],
                "relevant": [f"mill-{n}"],
            }
        )
        without = {"id": f"u{n}", "query": f"Who painted the bridge at {town}?", "answers": []}
        long = {"id": f"b{n}", "query": f"How long is the bridge at {town}?", "answers": [f"{40 + n} metres"]}
        questions.append({**(without if n < 4 else long), "relevant": [f"bridge-{n}"]})
    write_lines(folder / "corpus.jsonl", documents)
    write_lines(folder / "train.jsonl", questions)
    if not (folder / "encoder").is_dir():
        tiny.sentence_encoder(folder / "encoder")
        tiny.llama(folder / "llama")
    path = folder / "recipe.yaml"
    path.write_text(f"""
name: critique-small
seed: 1
knowledge:
  path: kb
  documents: corpus.jsonl
  chunk: null
  encoder: {{model: encoder/encoder, dtype: float32}}
  indexes: {{dense: {{kind: dense}}, bm25: {{kind: bm25}}}}
retriever: {{index: bm25, k: 2}}
generator: {{model: llama, dtype: float32, vocabulary: self_rag}}
critique:
  path: out
  k: 4
  sources:
    questions: {{kind: questions, path: train.jsonl, irrelevant: 0.5}}
    tell: {{kind: tell, count: 6}}
    closed: {{kind: closed, count: 8}}
  critic: {{audit: 2, second_pass: 0.5, shares: {{train: 0.6, dev: 0.2, test: 0.2}}}}
  {f"annotator: {annotator}" if annotator else ""}
  {more}
""")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("critique")
    build_knowledge(load_recipe(small(made)).knowledge)
    return made


@pytest.fixture(scope="module")
def work(folder: Path) -> Critique:
    """Critic data and annotation by the rules, made once."""
    made = Critique(load_recipe(folder / "recipe.yaml"))
    made.critic_data()
    made.annotate()
    return made


def annotated(work: Critique) -> list[dict[str, Any]]:
    return [row for name in work.settings.shares for row in read_lines(work.settings.path / "annotation" / f"{name}.jsonl")]


class Told(Teacher):
    """Says what it was told, and counts what it was asked."""

    name = "told"

    def __init__(self, say: Any, name: str = "told"):
        self.say, self.asked, self.identity = say, [], name

    @property
    def fingerprint(self) -> str:
        return self.identity

    def label(self, judgements: Sequence[Judgement], *, draw: int = 0) -> Iterator[Labelled]:
        for one in judgements:
            self.asked.append(one)
            yield one.id, self.say(one, draw)


# Judgements


def test_every_template_has_the_papers_demonstrations_and_labels() -> None:
    assert {kind: len(Template(kind).demos) for kind in LABELS} == {
        "retrieve": 7, "retrieve_segment": 1, "is_rel": 2, "is_sup": 1, "is_use": 2,
    }  # fmt: skip
    for kind, labels in LABELS.items():
        template = Template(kind)
        assert set(template.meanings) == set(labels)
        assert all(label in labels for _, label, _ in template.demos)


def test_the_judge_sees_what_the_table_says_and_no_more() -> None:
    asked = Judgement(
        "j", "is_sup", "QUESTION", ("BEFORE one.", "BEFORE two."), Passage("p", "PASSAGE", "TITLE"), "SENTENCE", "OUTPUT",
        {"answers": ["SECRET"], "relevant": ["SECRET"]},
    )  # fmt: skip
    words = {
        "instruction": "QUESTION", "preceding": "BEFORE one. BEFORE two.", "passage": "TITLE\nPASSAGE",
        "sentence": "SENTENCE", "output": "OUTPUT",
    }  # fmt: skip
    seen = {
        "retrieve": ["instruction"], "retrieve_segment": ["instruction", "preceding", "passage", "sentence"],
        "is_rel": ["instruction", "passage"], "is_sup": ["instruction", "preceding", "sentence", "passage"],
        "is_use": ["instruction", "output"],
    }  # fmt: skip
    for kind, fields in seen.items():
        one = replace(asked, kind=kind)
        for text in (Template(kind).prompt(one), Template(kind).messages(one)[-1]["content"]):
            assert {name for name, word in words.items() if word in text} == set(fields)
            assert "SECRET" not in text
    assert "BEFORE" in Template("is_rel", preceding=True).prompt(replace(asked, kind="is_rel"))
    assert "no outside knowledge" in " ".join(Template("is_sup").task.split())


@pytest.mark.parametrize("kind", list(LABELS))
def test_only_a_label_of_the_judgement_with_a_reason_is_a_verdict(kind: Any) -> None:
    for label in LABELS[kind]:
        assert read_reply(kind, json.dumps({"label": label, "reason": "so"})) == Verdict(label, "so")
    for said in (
        '{"label": "maybe", "reason": "so"}', '{"label": "", "reason": "so"}', '{"reason": "so"}', '{"label": "yes"', "",
        '{"label": null, "reason": "so"}', '{"label": "fully ", "reason": "so"}', '{"label": "yes", "reason": "so", "p": 1}',
        '{"label": 6, "reason": "so"}', '{"label": 0, "reason": "so"}', '{"label": true, "reason": "so"}',
    ):  # fmt: skip
        assert isinstance(read_reply(kind, said), Reject)
    assert isinstance(read_reply("is_use", '{"label": 5, "reason": "so"}'), Verdict)
    assert isinstance(read_reply("is_use", '{"label": 4.5, "reason": "so"}'), Reject)


def test_a_label_outside_the_enumeration_is_a_reject_whoever_says_it(tmp_path: Path) -> None:
    asked = [Judgement(str(n), "retrieve", f"i{n}") for n in range(3)]
    labels = Book(tmp_path / "book.jsonl").label(
        Told(lambda one, _: Verdict("perhaps" if one.id == "1" else "yes")), asked, templates()
    )
    assert [type(labels[str(n)]) for n in range(3)] == [Verdict, Reject, Verdict]
    assert "'perhaps' is none of yes, no" in labels["1"].reason  # type: ignore[union-attr]


def test_the_book_asks_once_and_survives_a_torn_line(tmp_path: Path) -> None:
    asked = [Judgement(str(n), "retrieve", f"i{n // 2}") for n in range(6)]  # three instructions
    teacher = Told(lambda one, draw: Verdict("yes", f"\u2028{draw}"))
    first = Book(tmp_path / "book.jsonl").label(teacher, asked[:2], templates())
    assert len(teacher.asked) == 1
    with open(tmp_path / "book.jsonl", "a") as file:
        file.write('{"key": "torn", "lab')
    again = Book(tmp_path / "book.jsonl")
    assert again.label(teacher, asked, templates()) | first == again.label(teacher, asked, templates())
    assert len(teacher.asked) == 3
    Book(tmp_path / "book.jsonl").label(teacher, asked, templates(), draw=1)
    assert len(teacher.asked) == 6
    Book(tmp_path / "book.jsonl").label(Told(lambda *_: Verdict("no"), "another"), asked, templates())
    lines = (tmp_path / "book.jsonl").read_text().split("\n")
    assert len(lines) == 3 + 3 + 3 + 1
    (tmp_path / "book.jsonl").write_text("\n".join([lines[0], "{}", *lines[1:]]))
    with pytest.raises(CheckpointError, match="line 2, is no verdict"):
        Book(tmp_path / "book.jsonl")


def test_what_the_teacher_left_unanswered_is_no_label(tmp_path: Path) -> None:
    class Silent(Told):
        def label(self, judgements: Sequence[Judgement], *, draw: int = 0) -> Iterator[Labelled]:
            yield from list(super().label(judgements, draw=draw))[:1]

    asked = [Judgement(str(n), "retrieve", f"i{n}") for n in range(3)]
    with pytest.raises(CheckpointError, match="no answer for 2 judgements"):
        Book(tmp_path / "book.jsonl").label(Silent(lambda *_: Verdict("yes")), asked, templates())
    teacher = Told(lambda *_: Verdict("yes"))
    Book(tmp_path / "book.jsonl").label(teacher, asked, templates())
    assert [one.id for one in teacher.asked] == ["1", "2"]


# Rules


@pytest.mark.parametrize(
    ("kind", "fields", "label"),
    [
        ("retrieve", {"instruction": "x", "known": {"origin": "closed"}}, "no"),
        ("retrieve", {"instruction": "When was the mill of Arbel built?", "known": {"origin": "answered"}}, "yes"),
        ("retrieve", {"instruction": "Tell me of Arbel"}, "yes"),
        ("retrieve", {"instruction": "Write a rhyme please"}, "no"),
        ("is_rel", {"passage": 0, "known": {"origin": "answered", "answers": ["1700"], "relevant": ["mill-0"]}}, "relevant"),
        ("is_rel", {"passage": 2, "known": {"origin": "answered", "answers": ["1700"], "relevant": ["mill-0"]}}, "irrelevant"),
        ("is_rel", {"passage": 0, "known": {"origin": "unanswerable", "relevant": ["mill-0"]}}, "irrelevant"),
        ("is_rel", {"passage": 0}, "relevant"),
        ("is_rel", {"passage": 7}, "irrelevant"),
        ("is_sup", {"passage": 0, "sentence": "1700", "known": {"answers": ["1700"], "relevant": ["mill-0"]}}, "fully"),
        ("is_sup", {"passage": 2, "sentence": "1700", "known": {"answers": ["1700"], "relevant": ["mill-0"]}}, "no"),
        ("is_sup", {"passage": 0, "sentence": "1801", "known": {"answers": ["1700"], "relevant": ["mill-0"]}}, "no"),
        ("is_sup", {"passage": 0, "sentence": "Anna Arbelsen built the mill of Arbel in 1700."}, "fully"),
        ("is_sup", {"passage": 0, "sentence": "Anna Arbelsen built the mill of Arbel in 1700 with nine brothers"}, "partially"),
        ("is_use", {"output": "1700", "known": {"answers": ["1700"]}}, "5"),
        ("is_use", {"output": "in 1700 it was", "known": {"answers": ["1700"]}}, "4"),
        ("is_use", {"output": "40 miles", "known": {"answers": ["40 metres"]}}, "3"),
        ("is_use", {"output": "red", "known": {"answers": ["1700"]}}, "1"),
        ("is_use", {"output": "I don't know", "known": {"origin": "unanswerable", "abstention": "I don't know"}}, "1"),
        ("retrieve_segment", {"passage": 0, "sentence": "It has 3 wheels of oak.", "preceding": ("a",)}, "continue"),
        ("retrieve_segment", {"passage": 0, "sentence": "The bridge at Arbel is 40 metres long.", "preceding": ("a",)}, "yes"),
        ("retrieve_segment", {"passage": 0, "sentence": "Thank you very much!", "preceding": ("a",)}, "no"),
    ],
)  # fmt: skip
def test_rules(work: Critique, kind: Any, fields: dict[str, Any], label: str) -> None:
    told = {"instruction": "When was the mill of Arbel built?", **fields}
    if "passage" in told:
        told["passage"] = work.base.corpus[told["passage"]]
    found = dict(work.teacher.label([Judgement("j", kind, **told)]))["j"]
    assert isinstance(found, Verdict)
    assert found.label == label
    assert found.reason


# Critic data


def test_critic_data_are_split_by_instruction_and_every_label_is_the_teachers(work: Critique) -> None:
    made, folder = work.critic_data(), work.settings.path / "critic"
    files = {name: read_lines(folder / f"{name}.jsonl") for name in ("train", "dev", "test")}
    seen = {name: {row["instruction"] for row in rows} for name, rows in files.items()}
    assert all(seen.values())
    assert sum(map(len, seen.values())) == len(set.union(*seen.values()))
    for kind, labels in LABELS.items():
        figures = made["judgements"][kind]
        assert sum(figures["rows"].values()) + figures["balanced_out"] + sum(figures["rejected"].values()) == figures["asked"]
        assert len(figures["kept"]) > 1
        assert set(figures["kept"]) <= set(labels)
        assert figures["second_pass"]["agreement"] == 1.0
    every = {one.id: one for one in candidates(work.rows, work.base.corpus, work.search, seed=1, abstention="I don't know")}
    rules = dict(work.teacher.label(list(every.values())))
    for row in (row for rows in files.values() for row in rows):
        assert row["answers"] == [rules[row["id"]].label]  # type: ignore[union-attr]
        assert row["query"] == work.templates[row["kind"]].prompt(every[row["id"]])
    audit = (folder / "audit.csv").read_text(encoding="utf-8")
    assert audit.count("is_sup") >= 2


def test_the_critics_training_prompt_is_its_annotation_prompt(folder: Path, work: Critique) -> None:
    generator = open_generator(
        load_recipe(folder / "recipe.yaml").generator.model_copy(update={"vocabulary": "own"}), work.recipe.prompt
    )
    path = work.settings.path / "critic" / "train.jsonl"
    examples = read_examples(path)
    data = QuestionData(kind="questions", path=path, source="none")
    trained = answer_rows(examples, data, work.retriever, generator, 0)
    every = {one.id: one for one in candidates(work.rows, work.base.corpus, work.search, seed=1, abstention="I don't know")}
    asked: list[list[int]] = []

    class Seen:
        prompt, fingerprint = generator.prompt, "seen"

        def token_logprobs(self, prompts: Sequence[Any], answers: Sequence[str]) -> list[np.ndarray]:
            asked.extend(list(prompt.ids) for prompt in prompts)
            return generator.token_logprobs(prompts, answers)

    some = examples[::9]
    labels = dict(CriticLabels(Seen(), work.templates).label([every[one.id] for one in some]))  # type: ignore[arg-type]
    ids = {one.id: row["input_ids"] for one, row in zip(examples, trained, strict=True)}
    assert {tuple(found) for found in asked} == {tuple(ids[one.id]) for one in some}
    for one in some:
        kind = every[one.id].kind
        verdict = labels[one.id]
        assert isinstance(verdict, Verdict)
        assert verdict.label in LABELS[kind]
        assert verdict.p is not None
        assert 1 / len(LABELS[kind]) <= verdict.p <= 1


@checks(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(["fully", "fully", "fully", "partially", "no"]), min_size=1, max_size=60),
    st.sampled_from([0.4, 0.5, 0.7]),
)
def test_balance_caps_the_commonest_and_takes_no_more_than_it_must(labels: list[str], share: float) -> None:
    pairs = [(Judgement(f"j{n}", "is_sup", "i"), Verdict(label)) for n, label in enumerate(labels)]
    kept = balanced(pairs, CriticDataSettings(balance=share), 3)
    counts, before = Counter(verdict.label for _, verdict in kept), Counter(labels)
    most = max(share, 1 / len(before))
    assert set(counts) == set(before)
    if len(before) > 1:
        assert max(counts.values()) <= max(1, most * len(kept) + 1e-9)
        one_more = {label: min(count, max(counts.values()) + 1) for label, count in before.items()}
        assert one_more == dict(counts) or max(one_more.values()) > most * sum(one_more.values())
    assert kept == balanced(pairs[::-1], CriticDataSettings(balance=share), 3)


@pytest.mark.parametrize("count", [PIECE - 1, PIECE, PIECE + 1])
def test_no_judgement_is_lost_at_the_end_of_a_piece(folder: Path, work: Critique, count: int) -> None:
    class ByWords:
        """Likes the label whose place is that of the prompt's number."""

        prompt, fingerprint = open_generator(work.recipe.generator, work.recipe.prompt).prompt, "words"

        def token_logprobs(self, prompts: Sequence[Any], answers: Sequence[str]) -> list[np.ndarray]:
            numbers = [zlib.crc32(repr(prompt.ids).encode()) % 2 for prompt in prompts]
            return [np.array([-1.0 if ("yes", "no")[n] == said else -3.0]) for n, said in zip(numbers, answers, strict=True)]

    asked = [Judgement(f"j{n}", "retrieve", f"{n} mills?") for n in range(count)]
    found = list(CriticLabels(ByWords(), work.templates).label(asked))  # type: ignore[arg-type]
    assert [name for name, _ in found] == [one.id for one in asked]
    ids = [ByWords.prompt.render(work.templates["retrieve"].prompt(one), []).ids for one in asked]
    assert [verdict.label for _, verdict in found] == [  # type: ignore[union-attr]
        ("yes", "no")[zlib.crc32(repr(one).encode()) % 2] for one in ids
    ]


def test_a_search_that_finds_one_passage_is_enough(work: Critique) -> None:
    """The known passage, the one found and the one drawn may be the same."""
    row = next(row for row in work.rows if row.id == "questions/q5")
    corpus = work.base.corpus
    seed = next(s for s in range(500) if corpus[int(drawn(s, row.id, "passage") * len(corpus))].id == "mill-5")
    asked = list(candidates([row], corpus, lambda queries, k: [() for _ in queries], seed=seed, abstention="none"))
    assert [one.passage.id for one in asked if one.kind == "is_rel" and one.passage is not None] == ["mill-5"]


def test_other_wordings_make_other_critic_data(work: Critique, tmp_path: Path) -> None:
    class Reworded(Template):
        def body(self, judgement: Judgement) -> str:
            return "New words. " + super().body(judgement)

        @property
        def fingerprint(self) -> str:
            return "reworded"

    def made() -> Critique:
        return Critique(work.recipe.model_copy(update={"critique": work.settings.model_copy(update={"path": tmp_path})}))

    made().critic_data()
    other = made()
    other.__dict__["templates"] = {kind: Reworded(kind) for kind in LABELS}
    assert set(other.critic_data()["templates"].values()) == {"reworded"}
    assert all("New words. " in row["query"] for row in read_lines(tmp_path / "critic" / "train.jsonl"))


@pytest.mark.parametrize("labels", ["words", "tokens"])
def test_a_critic_is_trained_from_a_recipe_and_annotates(folder: Path, tmp_path: Path, labels: str) -> None:
    """Critic data → `raglan train` → annotator, on the wordings that it learned and no others; labels as words or as tokens."""
    text = (folder / "recipe.yaml").read_text().replace("critic: {", f"critic: {{labels: {labels}, ")
    text = text.replace("path: out", f"path: {tmp_path}/out").replace("k: 4", "k: 1")
    text = (
        text.replace("irrelevant: 0.5", "irrelevant: 0.0, limit: 8")
        .replace("count: 6", "count: 1")
        .replace("count: 8", "count: 3")
    )
    (folder / "judged.yaml").write_text(text + f"  annotator: {{kind: critic, recipe: {tmp_path}/critic.yaml}}\n")
    shared = text[text.index("knowledge:") : text.index("generator:")].replace("path: kb", f"path: {folder}/kb")
    shared = shared.replace("corpus.jsonl", f"{folder}/corpus.jsonl").replace("encoder/encoder", f"{folder}/encoder/encoder")
    says = {"words": "{}", "tokens": "{self_rag: {answers: tokens}}"}[labels]
    (tmp_path / "critic.yaml").write_text(f"""
name: critic
{shared}
generator: {{model: {folder}/llama, dtype: float32, vocabulary: self_rag}}
prompt: {says}
data: {{kind: questions, path: out/critic/train.jsonl, dev: out/critic/dev.jsonl, source: none}}
objective: {{kind: answer}}
train: {{max_steps: 3, learning_rate: 1.0e-2, per_device_train_batch_size: 4, report_to: none}}
""")
    made = Critique(load_recipe(folder / "judged.yaml"))
    made.critic_data()
    rows = read_lines(tmp_path / "out" / "critic" / "train.jsonl")
    learned = {row["answers"][0] for row in rows}
    known = [TOKENS[kind] if labels == "tokens" else {label: label for label in LABELS[kind]} for kind in LABELS]
    assert learned <= {answer for own in known for answer in own.values()}
    with pytest.raises(CheckpointError, match=r"critic\.yaml gives no critic: its stage .* is not finished"):
        _ = made.annotator
    train(load_recipe(tmp_path / "critic.yaml"))
    assert isinstance(made.annotator, CriticLabels)
    critic = made.annotator.generator
    ids = critic.row(critic.prompt.render(rows[0]["query"], []), rows[0]["answers"][0])["labels"]
    assert (ids[0] in critic.schema.controls) == (labels == "tokens")
    assert critic.schema.controls.isdisjoint(critic.answer_ids("is [Relevant] a word?"))  # what others wrote is never a token
    assert labels == "words" or len(ids) == 2
    figures = made.compare_annotator()
    assert sum(one["rows"] for one in figures.values()) == len(read_lines(tmp_path / "out" / "critic" / "test.jsonl"))
    account = made.annotate()
    assert account["annotator"] == "critic"
    assert account["rows"]["in"] == len(made.rows) == account["rows"]["out"] + sum(account["rows"]["dropped"].values())
    shares = [row["p"] for row in read_lines(tmp_path / "out" / "verdicts" / "annotator.jsonl")]
    assert shares
    assert all(0 < share <= 1 for share in shares)
    manifest = json.loads((tmp_path / "out" / "critic" / "manifest.json").read_text())
    wordings = dict(manifest["templates"])
    manifest["templates"]["is_rel"] = "another"
    (tmp_path / "out" / "critic" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="learned is_rel in the wording another"):
        _ = Critique(made.recipe).annotator
    manifest["templates"], manifest["labels"] = wordings, "tokens" if labels == "words" else "words"
    (tmp_path / "out" / "critic" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=rf"labels that are {manifest['labels']}, .* asks for {labels}"):
        _ = Critique(made.recipe).annotator


def test_kappa_and_the_audit_of_people(work: Critique, tmp_path: Path, capsys, monkeypatch) -> None:
    assert kappa(["a"] * 45 + ["b"] * 15 + ["a"] * 25 + ["b"] * 15, ["a"] * 60 + ["b"] * 40) == pytest.approx(
        0.130435, abs=1e-6
    )
    assert kappa(["a", "b"], ["a", "b"]) == 1
    assert kappa(["a", "a"], ["a", "a"]) is None
    lines = (work.settings.path / "critic" / "audit.csv").read_text(encoding="utf-8")
    assert read_audit(work.settings.path / "critic" / "audit.csv") == {}
    filled = tmp_path / "audit.csv"
    filled.write_text(
        "id,judgement,shown,label,reason,person\n1,retrieve,s,yes,r,no\n2,retrieve,s,yes,r,Yes \n3,is_rel,s,relevant,r,\n"
    )
    assert read_audit(filled)["retrieve"] == {"rows": 2, "agreement": 0.5, "kappa": 0.0}
    code, out, _ = run("critique", "none.yaml", "--audit", str(filled), capsys=capsys, monkeypatch=monkeypatch)
    assert (code, out) == (0, "retrieve          people and teacher: 50.0% of 2, kappa 0.00\n")
    filled.write_text(lines.split("\n")[0] + "\n1,retrieve,s,yes,r,perhaps\n")
    with pytest.raises(CorpusError, match="'perhaps' for 'retrieve'"):
        read_audit(filled)


def test_rejects_are_kept_with_their_reasons_and_never_become_rows(work: Critique, tmp_path: Path) -> None:
    def say(one: Judgement, draw: int) -> Verdict | Reject:
        if one.kind == "is_use":
            return Reject("refused: content filter", "raw words")
        return Verdict({"retrieve": "yes", "retrieve_segment": "yes", "is_rel": "relevant", "is_sup": "excellent"}[one.kind])

    other = Critique(work.recipe.model_copy(update={"critique": work.settings.model_copy(update={"path": tmp_path})}))
    other.__dict__["teacher"] = Told(say)
    made = other.critic_data()["judgements"]
    assert made["is_use"]["rejected"] == {"refused: content filter": made["is_use"]["asked"]}
    assert made["is_sup"]["kept"] == {}
    rejects = read_lines(tmp_path / "critic" / "rejects.jsonl")
    assert {row["judgement"] for row in rejects} == {"is_use", "is_sup"}
    assert {row["raw"] for row in rejects if row["judgement"] == "is_use"} == {"raw words"}
    account = other.annotate()["rows"]
    assert account["out"] == 0
    assert account["dropped"] == {"is_use rejected: refused": account["in"]}
    tables = {table.title.partition(",")[0]: table.rows for table in critique_tables(tmp_path)}
    asked = str(made["is_use"]["asked"])
    assert ["is_use", "refused: content filter", asked, asked] in tables["Judgements without a label"]
    assert ["dropped, is_use rejected: refused", str(account["in"])] in tables["Rows annotated by “told”"]


# Annotation


def test_rows_balance_parse_and_come_in_every_sort(work: Critique) -> None:
    made, rows = work.annotate(), annotated(work)
    account = made["rows"]
    assert made["parsed"]
    assert account["in"] == len(work.rows) == account["out"] + sum(account["dropped"].values())
    assert account["out"] == len(rows) == sum(account["written"].values())
    assert all(work.check(row) is None for row in rows)  # type: ignore[misc]
    sorts: Counter[str] = Counter()
    for source in made["labels"].values():
        sorts.update(source["row"])
    assert set(sorts) == {"evidence", "evidence, several segments", "irrelevant", "no retrieval"}
    decisions = Counter(segment["decision"] for row in rows for segment in row["segments"])
    assert set(decisions) == {"yes", "no", "continue"}


def test_rows_of_questions_say_what_the_passages_hold(work: Critique) -> None:
    by_id = {row["id"]: row for row in annotated(work)}
    answered = by_id["questions/q5"]
    (segment,) = answered["segments"]
    assert (segment["passage"]["id"], segment["is_rel"], segment["is_sup"]) == ("mill-5", "relevant", "fully")
    assert (segment["text"], answered["is_use"]) == ("1705", 5)
    for n in range(4):  # no passage answers; the most likely one stands there
        none = by_id[f"questions/u{n}/irrelevant"]
        (segment,) = none["segments"]
        assert (segment["passage"]["id"], segment["is_rel"], segment["is_sup"]) == (f"bridge-{n}", "irrelevant", None)
        assert (segment["text"], none["is_use"]) == ("I don't know", 1)
    closed = [row for row in by_id.values() if row["metadata"]["source"] == "closed"]
    assert len(closed) == 8
    assert all([s["decision"] for s in row["segments"]] == ["no"] and row["is_use"] == 5 for row in closed)
    second = [row for name, row in by_id.items() if name.startswith("questions/q") and name.endswith("/irrelevant")]
    assert second
    for row in second:  # the drawn passage was labelled irrelevant, and does not hold the answer
        (segment,) = row["segments"]
        assert segment["is_rel"] == "irrelevant"
        assert segment["text"] not in segment["passage"]["text"]


def changed(work: Critique, path: Path, sources: dict[str, Any], **changes: Any) -> Critique:
    told = {**work.settings.model_dump(), "path": path, "sources": sources, **changes}
    made = Critique(work.recipe.model_copy(update={"critique": type(work.settings).model_validate(told)}))
    made.__dict__["check"] = work.check
    return made


def test_wrong_answers_stand_beside_relevant_passages_and_are_only_judged(work: Critique, folder: Path, tmp_path: Path) -> None:
    questions = {"kind": "questions", "path": folder / "train.jsonl", "irrelevant": 0.0, "unsupported": 1.0}
    made = changed(work, tmp_path, {"questions": questions})
    answers = {row["id"]: row["answers"] for row in read_lines(folder / "train.jsonl") if row["answers"]}
    account = made.annotate()
    assert account["rows"]["in"] == 20 + 16 == account["rows"]["out"] + sum(account["rows"]["dropped"].values())
    rows = [row for row in annotated(made) if row["metadata"]["want"] == "unsupported"]
    assert len(rows) == account["labels"]["questions"]["row"]["unsupported"] > 10
    for row in rows:
        (segment,) = row["segments"]
        asked = row["id"].split("/")[1]
        assert segment["is_rel"] == "relevant"
        assert segment["passage"]["id"] == {"q": "mill-", "b": "bridge-"}[asked[0]] + asked[1:]
        assert segment["text"] not in answers[asked]
        assert row["only_judged"]
        assert work.check(row) is None  # type: ignore[misc]
    assert {row["segments"][0]["is_sup"] for row in rows} == {"partially", "no"}
    assert {row["is_use"] for row in rows} >= {1, 3}
    others = [row for row in annotated(made) if row["metadata"]["want"] != "unsupported"]
    assert not any("only_judged" in row for row in others)
    assert made.rows == changed(work, tmp_path, {"questions": questions}).rows
    prompt = open_generator(work.recipe.generator, work.recipe.prompt).marked_prompt
    ids = prompt.row_ids(rows[0])
    learned = {GROUPS[group] for group, ok in zip(ids.groups, ids.learned, strict=True) if ok}
    assert learned == {"retrieve", "markup", "is_rel", "is_sup", "is_use", "eos"}
    whole = prompt.row_ids({**rows[0], "only_judged": False})
    assert (whole.labels, whole.groups) == (ids.labels, ids.groups)
    assert sum(whole.learned) - sum(ids.learned) == sum(GROUPS[group] == "text" for group in ids.groups) > 0


def test_lessons_are_questions_that_the_corpus_asks_itself(work: Critique, tmp_path: Path) -> None:
    source = {"kind": "lessons", "count": 12, "irrelevant": 0.5, "irrelevant_says": "abstention", "instruction": "Say"}
    made = changed(work, tmp_path, {"lessons": source})
    corpus = {passage.id: passage for passage in work.base.corpus}
    best = [row for row in made.rows if row.want == "best"]
    second = [row for row in made.rows if row.want == "irrelevant"]
    assert len(best) == 12
    assert 0 < len(second) < 12
    for row in best:
        (name,) = row.known["relevant"]
        assert row.known["answers"] == [row.output]
        assert row.output in corpus[name].text
        assert row.instruction == f"Say## Input:\n\n{row.question}"
    assert {row.output for row in second} == {made.settings.abstention}
    assert made.rows == changed(work, tmp_path, {"lessons": source}).rows
    assert made.made_of != changed(work, tmp_path, {"lessons": {**source, "count": 11}}).made_of
    account = made.annotate()["rows"]
    assert account["in"] == len(made.rows) == account["out"] + sum(account["dropped"].values())
    told = {row["id"]: row["segments"][0] for row in annotated(made)}
    for row in best:
        if row.id in told and told[row.id]["is_sup"] == "fully":
            assert row.output.casefold() in told[row.id]["passage"]["text"].casefold()
    assert sum(one["is_sup"] == "fully" for one in told.values()) >= 6
    assert all(told[row.id]["is_rel"] == "irrelevant" for row in second if row.id in told)


def test_shards_of_other_settings_are_not_joined(work: Critique, tmp_path: Path) -> None:
    sources = {"closed": {"kind": "closed", "count": 12}}
    for place, k in ((0, 4), (1, 3)):
        assert changed(work, tmp_path, sources, k=k).annotate(shard=(place, 2))["rows"]["in"] > 0
    with pytest.raises(CheckpointError, match=r"with other settings .*annotation-2-of-2") as fault:
        changed(work, tmp_path, sources, k=4).join(2)
    assert "annotation-1-of-2" not in str(fault.value)
    changed(work, tmp_path, sources, k=4).annotate(shard=(1, 2))
    assert changed(work, tmp_path, sources, k=4).join(2)["rows"]["in"] == 12


def test_every_drawn_passage_has_its_own_labels(work: Critique, tmp_path: Path) -> None:
    """Nothing supports anything, so every passage is drawn; what stands in the row is what the teacher said of that passage."""
    said: dict[tuple[str, str], str] = {}

    def say(one: Judgement, draw: int) -> Verdict:
        if one.kind == "is_rel":
            assert one.passage is not None
            said[one.instruction, one.passage.id] = "relevant" if int(drawn(0, one.passage.id, "x") * 2) else "irrelevant"
            return Verdict(said[one.instruction, one.passage.id])
        return Verdict({"retrieve": "yes", "retrieve_segment": "yes", "is_sup": "no", "is_use": "3"}[one.kind])

    other = Critique(work.recipe.model_copy(update={"critique": work.settings.model_copy(update={"path": tmp_path})}))
    other.__dict__["teacher"] = Told(say)
    other.__dict__["check"] = work.check
    other.annotate()
    segments = [(row, segment) for row in annotated(other) for segment in row["segments"]]
    assert {segment["is_rel"] for _, segment in segments} == {"relevant", "irrelevant"}
    for row, segment in segments:
        assert segment["is_rel"] == said[row["instruction"], segment["passage"]["id"]]
        assert segment["is_sup"] == ("no" if segment["is_rel"] == "relevant" else None)
        assert row["metadata"]["want"] == "best" or segment["is_rel"] == "irrelevant"
    ranks = Counter(segment["passage"]["id"] for _, segment in segments)
    assert len(ranks) > 3


def test_short_sentences_stay_untagged_and_preceding_sentences_are_shown(work: Critique, tmp_path: Path) -> None:
    text = "Well. The mill of Arbel was built by Anna Arbelsen in 1700. Yes! The bridge at Arbel is 40 metres long, too. So."
    write_lines(tmp_path / "rows.jsonl", [{"id": "r", "instruction": "Tell me of Arbel.", "output": text, "tag": 7}])
    told = {
        "path": tmp_path,
        "sources": {"rows": {"kind": "rows", "path": tmp_path / "rows.jsonl"}},
        "k": 3,
        "shares": {"train": 1.0},
    }
    other = Critique(work.recipe.model_copy(update={"critique": type(work.settings).model_validate(told)}))
    spy = Told(lambda one, _: dict(work.teacher.label([one]))[one.id])
    other.__dict__["teacher"], other.__dict__["check"] = spy, work.check
    other.annotate()
    (row,) = annotated(other)
    assert row["lead"] == "Well."
    assert [segment["text"] for segment in row["segments"]] == [sentences(text)[1], sentences(text)[3]]
    assert [segment.get("tail") for segment in row["segments"]] == ["Yes!", "So."]
    assert [segment["passage"]["id"] for segment in row["segments"]] == ["mill-0", "bridge-0"]
    assert row["metadata"]["tag"] == 7
    last = [one for one in spy.asked if one.kind == "retrieve_segment"][-1]
    assert last.preceding == tuple(sentences(text)[:3])
    assert "Anna Arbelsen in 1700. Yes!" in Template("retrieve_segment").prompt(last)


def test_released_selection_leaves_out_by_odds_and_says_so(work: Critique, tmp_path: Path) -> None:
    told = work.settings.model_dump() | {"path": tmp_path, "select": "released"}
    told["sources"]["questions"]["released_as"] = "nq"
    told["sources"]["closed"]["count"] = 60
    other = Critique(work.recipe.model_copy(update={"critique": type(work.settings).model_validate(told)}))
    other.__dict__["check"] = work.check
    account = other.annotate()["rows"]
    assert 20 <= account["dropped"]["released odds: initial no"] <= 50  # 60 rows kept with .4
    assert account["dropped"]["released odds: irrelevant"] > 0
    assert account["in"] == account["out"] + sum(account["dropped"].values())


def test_equal_under_shuffling_and_sharding(work: Critique, tmp_path: Path, capsys, monkeypatch) -> None:
    whole = [(work.settings.path / "annotation" / f"{name}.jsonl").read_bytes() for name in ("train", "dev")]
    shuffled = list(work.rows)
    random.Random(5).shuffle(shuffled)
    other = Critique(work.recipe.model_copy(update={"critique": work.settings.model_copy(update={"path": tmp_path})}))
    other.__dict__["check"] = work.check
    annotate(other._annotation(None), shuffled)
    assert [(tmp_path / "annotation" / f"{name}.jsonl").read_bytes() for name in ("train", "dev")] == whole
    counts = [other.annotate(shard=(place, 3))["rows"]["in"] for place in range(3)]
    assert sum(counts) == len(work.rows)
    assert min(counts) > 0
    (tmp_path / "annotation" / "train.jsonl").unlink()
    joined = other.join(3)
    assert joined["rows"] == work.annotate()["rows"]
    assert [(tmp_path / "annotation" / f"{name}.jsonl").read_bytes() for name in ("train", "dev")] == whole
    with pytest.raises(CheckpointError, match="annotation-1-of-4"):
        other.join(4)


def test_finished_steps_are_kept_and_changed_ones_made_again(work: Critique, tmp_path: Path) -> None:
    def at(**changes: Any) -> tuple[Critique, Told]:
        told = work.settings.model_copy(update={"path": tmp_path, **changes})
        made = Critique(work.recipe.model_copy(update={"critique": told}))
        spy = Told(lambda one, _: dict(work.teacher.label([one]))[one.id])
        made.__dict__["teacher"], made.__dict__["check"] = spy, work.check
        return made, spy

    first, spy = at()
    first.annotate()
    assert spy.asked
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "annotation" / "steps").rglob("rows.jsonl")}
    assert len(stamps) == 8
    again, spy = at()
    again.annotate()
    assert not spy.asked
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    fewer, spy = at(short=10)
    fewer.annotate()
    moved = {path.parent.name[0] for path in stamps if path.stat().st_mtime_ns != stamps[path]}
    assert moved == {"5", "6", "7", "8"}


# The encoder's classifier, and the command


def test_the_classifier_agrees_with_its_teacher_better_than_chance(work: Critique, folder: Path, tmp_path: Path) -> None:
    told = work.settings.model_copy(update={"path": tmp_path, "annotator": None})
    settings = type(told).model_validate(told.model_dump() | {"annotator": {"kind": "encoder"}})
    made = Critique(work.recipe.model_copy(update={"critique": settings}))
    made.__dict__["check"] = work.check
    made.critic_data()
    figures = made.compare_annotator()
    assert figures["is_rel"]["kappa"] > 0.2
    assert figures["retrieve"]["agreement"] > 0.8
    account = made.annotate()["rows"]
    assert account["in"] == account["out"] + sum(account["dropped"].values())
    again = Critique(made.recipe)
    assert again.annotator.fingerprint == made.annotator.fingerprint
    (tmp_path / "critic" / "manifest.json").unlink()
    verdict = dict(again.annotator.label([Judgement("j", "retrieve", "What is 3 plus 4?")]))["j"]
    assert isinstance(verdict, Verdict)
    assert verdict.p is not None


def test_the_command(work: Critique, folder: Path, capsys, monkeypatch) -> None:
    code, out, _ = run("critique", str(folder / "recipe.yaml"), capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0
    account = work.annotate()["rows"]
    assert f"{account['in']} rows in, {account['out']} out" in out
    assert out.count("second pass 100.0%") == 5
    code, _, err = run("critique", str(folder / "recipe.yaml"), "--only", "all", capsys=capsys, monkeypatch=monkeypatch)
    assert (code, "--only is 'all'" in err) == (2, True)
    for more in (("--shard", "1/2"), ("--join", "2")):
        said = run("critique", str(folder / "recipe.yaml"), "--only", "critic", *more, capsys=capsys, monkeypatch=monkeypatch)
        assert (said[0], "--only critic makes none" in said[2]) == (2, True)
    code, _, err = run("critique", str(folder / "recipe.yaml"), "--shard", "4/3", capsys=capsys, monkeypatch=monkeypatch)
    assert (code, "--shard is '4/3'" in err) == (2, True)
    with pytest.raises(RecipeError, match="has no `critique`"):
        Critique(work.recipe.model_copy(update={"critique": None}))


def test_questions_of_the_test_split_are_not_annotated(work: Critique, tmp_path: Path) -> None:
    write_lines(tmp_path / "q.jsonl", [{"id": "a", "query": "Who?", "answers": ["x"], "split": "test"}])
    told = {"path": tmp_path, "sources": {"q": {"kind": "questions", "path": tmp_path / "q.jsonl"}}}
    other = Critique(work.recipe.model_copy(update={"critique": type(work.settings).model_validate(told)}))
    with pytest.raises(CorpusError, match="of the split `test`: a"):
        _ = other.rows


# A paid teacher


def judge(body: dict[str, Any]) -> str:
    """Labels that follow from the words: the first that the task names, or another one."""
    told = body["messages"]
    if "As a trial of" in json.dumps(told):
        return json.dumps({"colour": "blue", "ready": True})
    labels = [line.split('"')[1] for line in told[0]["content"].split("\n") if line.startswith('- "')]
    return json.dumps({"label": labels[zlib.crc32(told[-1]["content"].encode()) % len(labels)], "reason": "so it is"})


def paid(folder: Path, url: str, out: Path, *, cap: str = "5") -> Path:
    text = (
        (folder / "recipe.yaml")
        .read_text()
        .replace(
            "path: out",
            f"""path: {out}
  teacher: {{kind: endpoint, base_url: "{url}", model: m, api_key_env: CRITIC_KEY, concurrency: 8}}
  money: {{price: {{input: 2.5, output: 10}}, cap_usd: {cap}}}""",
        )
        .replace("count: 6", "count: 1")
        .replace("count: 8", "count: 2")
    )
    path = folder / f"{out.name}.yaml"
    path.write_text(text.replace("path: train.jsonl", "path: train.jsonl, limit: 8").replace("k: 4", "k: 2"))
    return path


def test_an_endpoint_judges_through_the_call_engine(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CRITIC_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    with FaultServer() as server:
        server.reply = judge
        bad = {"label": "perhaps", "reason": "x"}
        server.faults = lambda number, request: (
            Fault(text=json.dumps(bad)) if "Instruction: When was the mill of" in request.content else
            Fault(422) if zlib.crc32(request.content.encode()) % 8 == 0 and "As a trial of" not in request.content else None
        )  # fmt: skip
        made = Critique(load_recipe(paid(folder, server.url, tmp_path / "paid")))
        figures = made.critic_data()["judgements"]
        count = len(server.log)
        told = made.annotate()
        again = Critique(made.recipe)
        (tmp_path / "paid" / "critic" / "manifest.json").unlink()  # made again, of labels that are there
        seen = len(server.log)
        assert again.critic_data()["judgements"] == figures
        _, out, err = run("critique", str(folder / "paid.yaml"), "--only", "critic", capsys=capsys, monkeypatch=monkeypatch)
        for kind, one in figures.items():  # labels, rejects with their reasons, agreement of the second pass
            assert all(f"  {number} rejected: {reason}" in out for reason, number in one["rejected"].items())
            assert f"{kind:17s} {one['asked']} asked, {sum(one['rejected'].values())} rejected" in out
        assert "rejected: malformed" in out
        assert out.count("kappa") == sum(one["second_pass"]["rows"] > 0 for one in figures.values()) > 0
        assert len(server.log) == seen > count
        assert told["rows"]["in"] == told["rows"]["out"] + sum(told["rows"]["dropped"].values())
        assert told["rows"]["out"] > 0
    rejects = read_lines(tmp_path / "paid" / "critic" / "rejects.jsonl")
    assert {row["reject"].partition(":")[0] for row in rejects} == {"malformed", "permanent"}
    assert "perhaps" not in (tmp_path / "paid" / "critic" / "labels.jsonl").read_text()
    bodies = [request.body for request in server.log if "As a trial of" not in request.content]
    assert {body["temperature"] for body in bodies} == {0}
    assert any("Preceding sentences: The" in body["messages"][-1]["content"] for body in bodies)
    retrieving = next(body for body in bodies if body["messages"][-1]["content"].count("\n") == 0)
    assert len(retrieving["messages"]) == 1 + 2 * 7 + 1
    assert any("Bearer …" in row["reject"] for row in rejects), "the server said the key, and it was cut out"
    assert KEY not in out + err + caplog.text
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert KEY.encode() not in path.read_bytes(), f"the key is in {path}"


@pytest.mark.parametrize("kind", list(LABELS))
def test_the_schema_that_a_server_is_given_admits_the_verdicts_and_no_more(kind: Any) -> None:
    model = reply_model(kind)
    schema = strict_schema(model)
    assert schema["properties"]["label"]["enum"] == list(LABELS[kind])
    assert schema["properties"]["reason"]["type"] == "string"
    assert (schema["required"], schema["additionalProperties"]) == (["label", "reason"], False)
    assert schema == json.loads(json.dumps(schema)) == strict_schema(model)
    for label in LABELS[kind]:
        value, errors = parse(f'```json\n{{"label": "{label}", "reason": "so"}}\n```', model)
        assert (errors, read_reply(kind, value)) == ("", Verdict(label, "so"))  # type: ignore[arg-type]
        assert read_reply(kind, value.model_dump_json()) == Verdict(label, "so")  # type: ignore[union-attr]
    assert parse('{"label": "perhaps", "reason": "so"}', model)[0] is None


def test_a_second_pass_that_differs_is_told_with_its_kappa(work: Critique, tmp_path: Path) -> None:
    """The teacher changes its mind about every other instruction; figures are those of the labels, reckoned here."""
    labels: dict[int, dict[str, str]] = {0: {}, 1: {}}

    def say(one: Judgement, draw: int) -> Verdict | Reject:
        kinds, words = LABELS[one.kind], one.kind + one.instruction + one.output
        turned = draw and drawn(0, words, "turned") < 0.5
        if draw and drawn(0, words, "refused") < 0.1:
            return Reject("refused", "no")
        labels[draw][words] = kinds[(int(drawn(0, words, "first") * len(kinds)) + bool(turned)) % len(kinds)]
        return Verdict(labels[draw][words])

    made = changed(work, tmp_path, {"closed": {"kind": "closed", "count": 40}}, critic={"second_pass": 1.0})
    made.__dict__["teacher"] = Told(say)
    told = made.critic_data()["judgements"]
    asked = read_lines(tmp_path / "critic" / "labels.jsonl")
    for kind in ("retrieve", "is_use"):
        words = [kind + row["instruction"] + row.get("output", "") for row in asked if row["judgement"] == kind]
        pairs = [(labels[0][one], labels[1][one]) for one in words if one in labels[1]]
        second = told[kind]["second_pass"]
        assert second["rows"] == len(pairs) > 20
        assert len(pairs) < len(words)  # a reject is no label
        assert second["agreement"] == sum(a == b for a, b in pairs) / len(pairs)
        assert second["kappa"] == kappa([a for a, _ in pairs], [b for _, b in pairs])
        assert abs(second["kappa"]) < 0.7
        agreed = next(table for table in critique_tables(tmp_path) if table.title.startswith("Agreement"))
        shown = [kind, "second pass", str(len(pairs)), f"{100 * second['agreement']:.1f}", f"{second['kappa']:.2f}"]
        assert shown in agreed.rows


def test_the_report_shows_what_was_labelled(work: Critique, folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    made, done = work.critic_data(), work.annotate()
    page = tmp_path / "report.html"
    pytest.importorskip("plotly")
    code, _, _ = run("report", str(folder / "recipe.yaml"), "-o", str(page), capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0
    text = page.read_text()
    assert "Labels for Self-RAG" in text
    cells = [re.findall(r'<td class="">([^<]*)</td>', row) for row in re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL)]
    for kind, own in made["judgements"].items():
        for label, count in own["labels"].items():
            row = next(row for row in cells if row[:2] == [kind, label])
            assert (row[2], row[4]) == (str(count), str(own["kept"].get(label, 0)))
        assert [kind, "second pass", str(own["second_pass"]["rows"]), "100.0"] in [row[:4] for row in cells]
    assert ["out", str(done["rows"]["out"])] in cells
    for source, what in done["labels"].items():
        assert all(
            [source, "is_use", label, str(count)] in [row[:4] for row in cells] for label, count in what["is_use"].items()
        )
    assert critique_tables(tmp_path) == []


def test_a_priced_teacher_without_a_cap_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRITIC_KEY", KEY)
    path = paid(folder, "http://localhost:1/v1", tmp_path / "open", cap="null")
    with pytest.raises(RecipeError, match="has a price and no cap_usd"):
        _ = Critique(load_recipe(path)).teacher


def test_an_estimate_comes_before_the_bill(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--estimate asks a few, keeps them and tells what all cost; then --yes goes on without a cap, and pays for none twice."""
    monkeypatch.setenv("CRITIC_KEY", KEY)
    with FaultServer() as server:
        server.reply = judge
        recipe = paid(folder, server.url, tmp_path / "open", cap="null")
        code, out, _ = run("critique", str(recipe), "--estimate", "--json", capsys=capsys, monkeypatch=monkeypatch)
        assert code == 0
        told = json.loads(out)
        sampled = server.bill
        assert (told["asked"], 0 < sampled < told["nano"]) == (24, True)
        code, _, err = run("critique", str(recipe), "--only", "critic", capsys=capsys, monkeypatch=monkeypatch)
        assert (code, "--yes goes without a cap" in " ".join(err.split())) == (2, True)
        assert server.bill == sampled
        code, _, _ = run("critique", str(recipe), "--only", "critic", "--yes", capsys=capsys, monkeypatch=monkeypatch)
        assert code == 0
        assert told["low_nano"] <= server.bill <= told["high_nano"]
        judged = [request.content for request in server.log if "As a trial of" not in request.content]
        assert len(judged) == told["judgements"]
        assert "24 were asked" in run("critique", str(recipe), "--estimate", capsys=capsys, monkeypatch=monkeypatch)[1]
    path = folder / "recipe.yaml"
    code, _, err = run("critique", str(path), "--estimate", capsys=capsys, monkeypatch=monkeypatch)
    assert (code, "costs nothing" in err) == (2, True)


def test_spend_never_exceeds_the_cap(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRITIC_KEY", KEY)
    with FaultServer() as server:
        server.reply = judge
        with pytest.raises(CallsStopped, match="cap"):
            Critique(load_recipe(paid(folder, server.url, tmp_path / "capped", cap="0.06"))).critic_data()
        assert 0 < server.bill <= 60_000_000
        assert not (tmp_path / "capped" / "critic" / "manifest.json").exists()
        spent = server.bill
        Critique(load_recipe(paid(folder, server.url, tmp_path / "capped", cap="5"))).critic_data()
        assert server.bill > spent
        assert set(Counter(request.idem for request in server.log if request.billed).values()) == {1}


DRIVER = """
import os, sys
import torch, openai, aiohttp
torch.set_num_threads(1)
from raglan.critique import Critique
from raglan.recipe import load_recipe
works = {}
print("ready", flush=True)
for line in sys.stdin:
    path = line.strip()
    if path not in works:
        work = works[path] = Critique(load_recipe(path))
        work.rows, work.search(["x"], 1), work.base.corpus, getattr(work.teacher, "words", None)
        work.__dict__["check"] = None
    child = os.fork()
    if child == 0:
        try:
            works[path].critic_data()
            works[path].annotate()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    """A process that forks one child after the other, each of which does the work of a recipe and may be killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CRITIC_KEY": KEY},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.stdin.close()  # type: ignore[union-attr]
    process.wait()


def _kill_when_grown(child: int, out: Path, more: int) -> None:
    """Kill a process once it has written so many more bytes of labels, or calls, so that it dies between any two writes."""

    def size() -> int:
        return sum(path.stat().st_size for name in ("verdicts", "calls") for path in (out / name).rglob("*.jsonl"))

    deadly = size() + more
    with suppress(ProcessLookupError):
        while size() <= deadly:
            os.kill(child, 0)
            time.sleep(0.0005)
        os.kill(child, signal.SIGKILL)


def killed(driver: Any, recipe: Path, out: Path, kills: int, most: int) -> int:
    """Do a recipe's work, killing it at random moments; how many kills found labels on disk. None of these is ever lost."""
    chance, kept, half_way, code = random.Random(4), set[str](), 0, 1
    while code != 0 or kills:
        driver.stdin.write(f"{recipe}\n")
        driver.stdin.flush()
        child = int(driver.stdout.readline())
        if kills:
            _kill_when_grown(child, out, chance.randrange(most))
            kills -= 1
        code = int(driver.stdout.readline())
        assert code in (0, -signal.SIGKILL)
        lines = [line for path in (out / "verdicts").glob("*.jsonl") for line in path.read_text().split("\n")[:-1]]
        keys = {json.loads(line)["key"] for line in lines}
        assert kept <= keys
        calls = out / "calls" / "journal.jsonl"
        half_way += code != 0 and (bool(keys) or (calls.is_file() and '"outcome"' in calls.read_text()))
        kept = keys
    for path in (out / "verdicts").glob("*.jsonl"):
        own = [json.loads(line)["key"] for line in path.read_text().split("\n")[:-1]]
        assert len(own) == len(set(own))
    return half_way


def test_killed_rules_give_a_straight_runs_bytes(driver: Any, work: Critique, folder: Path, tmp_path: Path) -> None:
    recipe = folder / "killed.yaml"
    recipe.write_text((folder / "recipe.yaml").read_text().replace("path: out", f"path: {tmp_path}/out"))
    assert killed(driver, recipe, tmp_path / "out", 6, 12_000)
    for name in ("critic/train.jsonl", "critic/labels.jsonl", "annotation/train.jsonl", "annotation/dev.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (work.settings.path / name).read_bytes()


def test_a_killed_run_pays_for_nothing_twice(
    driver: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRITIC_KEY", KEY)
    with FaultServer(delay=0.002) as server:
        server.reply = judge
        recipe = paid(folder, server.url, tmp_path / "died")
        assert killed(driver, recipe, tmp_path / "died", 5, 40_000)
        billed = Counter(request.idem for request in server.log if request.billed)
        assert set(billed.values()) == {1}
        paid_for = Counter(json.dumps(request.body, sort_keys=True) for request in server.log if request.billed)
        straight = Critique(load_recipe(paid(folder, server.url, tmp_path / "straight")))
        straight.__dict__["check"] = None
        before = len(server.log)
        straight.critic_data()
        straight.annotate()
        asked = {json.dumps(request.body, sort_keys=True) for request in server.log[before:]}
    second = sum(count - 1 for count in paid_for.values())
    made = read_manifest(tmp_path / "straight" / "critic", "critic data")["judgements"]
    assert second <= sum(figures["second_pass"]["rows"] for figures in made.values())  # equal words, another draw
    assert set(paid_for) == asked
    for name in ("critic/train.jsonl", "critic/labels.jsonl", "annotation/train.jsonl", "annotation/dev.jsonl"):
        assert (tmp_path / "died" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_rows_come_from_known_answers_alone_where_asked(work: Critique) -> None:
    row, asked = next(row for row in work.rows if row.id == "questions/q5"), "When was the mill of Glenholt built?"
    known = {"origin": "answered", "answers": ["1705"], "relevant": ["mill-5"], "abstention": "I don't know"}
    assert row == Row("questions/q5", "questions", "best", asked, asked, "1705", known)
    assert isinstance(work.teacher, Rules)
