"""Feedback: every tool's shape with its traps, one store (SQLite and a real PostgreSQL), and what is learned from it.

The files in `exports` have the shapes that the tools write; each holds the traps of its tool.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

from raglan.data import answer_rows, stage_examples
from raglan.datapoints import read_points
from raglan.documents import read_examples, write_examples
from raglan.errors import CheckpointError, CorpusError, RecipeError
from raglan.exports import check_file
from raglan.feedback import (
    FeedbackStore,
    Fields,
    Judgement,
    Settled,
    label_rows,
    place,
    preference_rows,
    question_examples,
    read_feedback,
    review_rows,
    settle,
    sft_rows,
)
from raglan.feedback.judgement import standard_time
from raglan.feedback.store import without_password
from raglan.knowledge import KnowledgeBase, build_knowledge
from raglan.objective import AnswerObjective
from raglan.rag import RAG
from raglan.recipe import FeedbackData, load_recipe
from raglan.records import Example
from raglan.stages import finished_parts
from test_cli import run
from test_kill import small_recipe

EXPORTS = Path(__file__).parent / "exports"
HASK = "Who built Hask Point Lighthouse?"


def read(name: str, source: str, **extra: object) -> list[Judgement]:
    return read_feedback(EXPORTS / name, source, **extra)  # type: ignore[arg-type]


def used(found: Sequence[Judgement]) -> list[Judgement]:
    return [one for one in found if not one.aside]


def asides(found: Sequence[Judgement]) -> Counter[str]:
    return Counter(one.aside for one in found if one.aside)


def said(text: str, *, who: str = "", kind: str = "answer", query: str = "who?", **about: object) -> Judgement:
    value = text if kind in ("answer", "comment") else float(text)
    return Judgement(f"{who}/{kind}/{text}/{query}/{len(about)}", kind, value, query, annotator=who, **about)  # type: ignore[arg-type]


def test_argilla_records() -> None:
    found = read("argilla.json", "argilla")
    assert [(one.value, one.annotator) for one in used(found) if one.kind == "answer"] == [
        ("Ines Carrow", "u1"),
        ("ines carrow.", "u2"),
        ("Tobias Marl", "u3"),
    ]
    assert {(one.query, one.example, one.old) for one in used(found)} == {(HASK, "hask-1", "Tobias Marl")}
    assert asides(found) == {
        "a suggestion is no person's answer": 1,
        "the record is not completed, and this form does not say which responses are submitted; export it flattened": 1,
    }
    by_columns = {
        key: [row[key] for row in json.loads((EXPORTS / "argilla.json").read_text())] for key in ("id", "fields", "responses")
    }
    path = Path(tempfile.mkdtemp()) / "columns.json"
    path.write_text(json.dumps(by_columns))
    assert len(used(read_feedback(path, "argilla"))) == 5  # without a status all responses count
    path.write_text(json.dumps({row["id"]: row for row in json.loads((EXPORTS / "argilla.json").read_text())}))
    assert read_feedback(path, "argilla") == found  # by record ids


def test_argilla_flattened_columns() -> None:
    found = read("argilla_flat.json", "argilla")
    assert [(one.kind, one.value, one.passage, one.annotator) for one in used(found)] == [
        ("answer", "14 terraces", "", "u1"), ("relevance", 1.0, "quarry#0", "u1"), ("relevance", 2.0, "quarry#0", "u4"),
        ("relevance", 0.0, "quarry#4", "u1"),
    ]  # fmt: skip
    assert asides(found) == {
        "the response is draft, not submitted": 1, "the response is discarded, not submitted": 1,
        "a suggestion is no person's answer": 1, "'tone' is not mapped to any of answer, relevance, rating, comment": 1,
    }  # fmt: skip
    mapped = read("argilla_flat.json", "argilla", fields=Fields.of(["comment=tone"]))
    assert [one.value for one in used(mapped) if one.kind == "comment"] == ["calm"]


def test_label_studio_json() -> None:
    found = read("label_studio.json", "label-studio")
    assert [(one.kind, one.value, one.annotator) for one in used(found)] == [
        ("relevance", 1.0, "1"), ("answer", "Edmund Rusk", "two@example.org"), ("answer", "E. Rusk", "two@example.org"),
        ("rating", 1.0, "two@example.org"),
    ]  # fmt: skip
    assert asides(found) == {
        "another annotation of the task is ground truth": 1,
        "the annotation was cancelled": 1,
        "a prediction is no person's answer": 1,
    }
    assert used(found)[0].passage == "quarry#0"
    assert used(found)[0].time == "2026-03-01T10:00:00.000000+00:00"


@pytest.mark.parametrize("name", ["label_studio_min.json", "label_studio.csv", "label_studio.tsv"])
def test_label_studio_flat_forms(name: str) -> None:
    found = read(name, "label-studio")
    assert Counter((one.kind, one.value) for one in used(found)) == Counter(
        [("answer", "Rusk"), ("answer", "Edmund Rusk"), ("answer", "E. Rusk"), ("rating", 1.0), ("relevance", 1.0)]
    )
    assert {one.example for one in found} == {"quarry-1"}  # two rows, one task
    nested = {one.origin for one in read("label_studio.json", "label-studio")}
    assert {one.origin for one in found} <= nested  # one statement has one origin, whatever form it is exported in


def test_label_studio_data_columns_are_no_persons_word(tmp_path: Path) -> None:
    """In JSON_MIN the order tells, in a sorted table nothing does; --map tells always."""
    data = {"question": "who?", "score": 0.93, "explanation": "the retriever liked it"}
    row = {**data, "id": 1, "relevance": "relevant", "annotator": 1, "annotation_id": 5, "lead_time": 2.0}
    (tmp_path / "min.json").write_text(json.dumps([row | {"passage_id": "p"}, {**row, "id": 2}]))
    found = read_feedback(tmp_path / "min.json", "label-studio")
    assert [(one.kind, one.value) for one in used(found)] == [("relevance", 1.0)]
    assert not [one for one in found if one.kind in ("rating", "comment")]
    names = sorted(row)
    (tmp_path / "sorted.csv").write_text("\n".join([",".join(names), ",".join(str(row[name]) for name in names)]))
    found = read_feedback(tmp_path / "sorted.csv", "label-studio")
    assert not used(found)
    assert all("may be the task's data or a person's word" in reason for reason in asides(found))
    rated = read_feedback(tmp_path / "sorted.csv", "label-studio", fields=Fields.of(["rating=score"]))
    assert [(one.kind, one.value) for one in used(rated)] == [("rating", 0.93)]


def test_statements_without_an_id_stay_apart(tmp_path: Path) -> None:
    langfuse = [{"input": "who?", "expectedOutput": "Ada"}, {"input": "when?", "expectedOutput": "1842"}]
    argilla = [
        {"fields": {"question": query}, "status": "completed", "responses": {"correction": [{"value": answer, "user_id": "u"}]}}
        for query, answer in (("who?", "Ada"), ("when?", "1842"))
    ]
    flat = [
        {"question": query, "annotator": "u", "correction": answer, "score": 1}
        for query, answer in (("who?", "Ada"), ("when?", "1842"))
    ]
    label_studio = [
        {"data": {"question": query}, "annotations": [{"result": [
            {"from_name": "correction", "value": {"text": [answer]}}]}]}
        for query, answer in (("who?", "Ada"), ("when?", "1842"))
    ]  # fmt: skip
    (tmp_path / "x.json").write_text("")
    for source, rows, maps in (
        ("langfuse", langfuse, []), ("argilla", argilla, []), ("label-studio", label_studio, []),
        ("label-studio", flat, ["answer=correction", "rating=grade"]),
    ):  # fmt: skip
        (tmp_path / "x.json").write_text(json.dumps(rows))
        found = [one for one in read_feedback(tmp_path / "x.json", source, fields=Fields.of(maps)) if one.kind == "answer"]
        with FeedbackStore(tmp_path / f"{source}{len(maps)}.sqlite", create=True) as store:
            assert store.add(found) == {"new": 2}
            assert store.add(found) == {"unchanged": 2}
            assert [one.value for one in store.judgements() if not one.aside] == ["Ada", "1842"]


def test_what_came_back_is_current_in_another_store_too(tmp_path: Path) -> None:
    first, second = Judgement("o", "answer", "A", "who?"), Judgement("o", "answer", "B", "who?")
    other = Judgement("p", "answer", "C", "when?")
    with FeedbackStore(tmp_path / "a.sqlite", create=True) as store:
        for one in (first, second, other, first):
            store.add([one])
        everything_there = store.judgements(former=True)
        assert [one.value for one in everything_there] == ["B", "A", "C"]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(one.row()) + "\n" for one in everything_there))
    with FeedbackStore(tmp_path / "b.sqlite", create=True) as store:
        store.add(read_feedback(tmp_path / "own.jsonl", "raglan"))
        assert [one.value for one in store.judgements()] == ["A", "C"]


def test_phoenix(tmp_path: Path) -> None:
    found = read("phoenix.json", "phoenix")
    assert [(one.kind, one.value, one.passage) for one in used(found)] == [
        ("answer", "In Corran chapel", ""), ("rating", 0.0, ""), ("comment", "the harbour has none", ""),
        ("relevance", 1.0, "bell#0"), ("relevance", 0.0, "bell#1"),
    ]  # fmt: skip
    assert {(one.query, one.old) for one in used(found)} == {
        ("Where is the bell kept?", "In the harbour"),
        ("Where is the bell kept?", ""),
    }
    assert asides(found) == {
        "the annotator is LLM, no person": 1, "the annotator is CODE, no person": 1,
        "its question is not in the files read": 1, "span s1 has no document at position 2 in the files read": 1,
    }  # fmt: skip
    spelt = {"context.span_id": "s3", "attributes.input.value": "Is it wool?"}
    spelt |= {f"attributes.retrieval.documents.{n}.document.{key}": f"{key}{n}" for n in range(2) for key in ("id", "content")}
    named = {"span_id": "s3", "document_position": 1, "name": "relevance", "annotator_kind": "HUMAN", "result": {"score": 1}}
    (tmp_path / "spelt.jsonl").write_text(f"{json.dumps(spelt)}\n{json.dumps(named)}\n")
    (one,) = read_feedback(tmp_path / "spelt.jsonl", "phoenix")
    assert (one.query, one.passage, one.passage_text) == ("Is it wool?", "id1", "content1")
    apart = read("phoenix_annotations.csv", "phoenix", beside=[EXPORTS / "phoenix_documents.csv"])
    assert [(one.passage_text, one.value) for one in used(apart)] == [
        ("The ferry Aldine crosses twice a day.", 1.0), ("The pier burned down.", 0.0),
    ]  # fmt: skip


def test_phoenix_empty_cells(tmp_path: Path) -> None:
    """A label without a score counts, in CSV (an empty cell) and in Parquet (NaN); positions may be 1.0, or missing."""
    rows = [
        {"span_id": "s9", "document_position": 0.0, "name": "relevance", "result.label": "relevant"},
        {"span_id": "s9", "document_position": 1.0, "name": "relevance", "result.label": "irrelevant"},
        {"span_id": "s9", "document_position": None, "name": "correctness", "result.label": "correct"},
    ]
    rows = [{**row, "result.score": None, "annotator_kind": "HUMAN", "identifier": "u"} for row in rows]
    names = list(rows[0])
    lines = [names, *([("" if row[name] is None else str(row[name])) for name in names] for row in rows)]
    (tmp_path / "a.csv").write_text("\n".join(map(",".join, lines)))
    nan = [{name: float("nan") if value is None else value for name, value in row.items()} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(nan), tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        found = read_feedback(tmp_path / name, "phoenix", beside=[EXPORTS / "phoenix_documents.csv"])
        assert [(one.kind, one.value, bool(one.passage_text)) for one in used(found)] == [
            ("relevance", 1.0, True), ("relevance", 0.0, True), ("rating", 1.0, False),
        ]  # fmt: skip


@pytest.mark.parametrize("time", [1e30, -1e30, float("nan"), float("inf"), "0001-01-01T00:00:00+14:00", "soon", None])
def test_what_is_no_time_is_empty(time: object) -> None:
    assert standard_time(time) == ""
    assert standard_time(1_700_000_000_000) == standard_time(1_700_000_000) == "2023-11-14T22:13:20.000000+00:00"


def test_langfuse() -> None:
    found = read("langfuse.json", "langfuse")
    answers = [(one.query, one.value, one.old, one.history) for one in used(found) if one.kind == "answer"]
    assert answers == [
        ("Who runs the mill?", "Anna Dale", "Mr Dale", ()),
        ("Since when?", "Since 1780", "1800", ("Is there a mill?", "Yes.")),
        ("What does the mill grind?", "oats", "", ()),
    ]
    assert [(one.kind, one.value, one.annotator) for one in used(found) if one.kind != "answer"] == [
        ("comment", "see the stone", ""), ("rating", 0.2, "bob"),
    ]  # fmt: skip
    assert asides(found) == {
        "the score's source is EVAL, no person": 2, "its question is not in the files read": 1,
        "a queue item holds only ids; export the scores": 1, "the dataset item has no expected output": 1,
        "the dataset item is archived": 1,
    }  # fmt: skip


def test_what_is_no_export_is_told(tmp_path: Path) -> None:
    for name, text, message in (
        ("a.json", "[1, 2]", "holds no records"), ("b.json", "{", "line 1 is not JSON"), ("c.json", "[]", "holds no records"),
        ("d.json", '[{"annotations": [3]}]', "is not what label-studio exports"),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
        with pytest.raises(CorpusError, match=message):
            read_feedback(tmp_path / name, "label-studio")
    with pytest.raises(RecipeError, match="known are argilla, label-studio, phoenix, langfuse, raglan"):
        read_feedback(tmp_path / "a.json", "prodigy")
    with pytest.raises(RecipeError, match="--map 'quest=x' is not field=name"):
        Fields.of(["quest=x"])
    assert Fields.of(["rating=how good"], ["so so=0.3"]).grade("So so") == 0.3


ALL = (
    ("argilla.json", "argilla"),
    ("argilla_flat.json", "argilla"),
    ("label_studio.json", "label-studio"),
    ("phoenix.json", "phoenix"),
    ("langfuse.json", "langfuse"),
)


def everything() -> list[Judgement]:
    return [one for name, source in ALL for one in read(name, source)]


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The address of a PostgreSQL server that lives as long as these tests."""
    if not all(shutil.which(name) for name in ("initdb", "pg_ctl", "postgres")):
        pytest.skip("initdb, pg_ctl and postgres are not on the PATH")
    if os.getuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("PostgreSQL refuses to run as root, and there is no setpriv to run it as another user")
    folder = Path(tempfile.mkdtemp(prefix="raglan-pg-", dir="/tmp"))  # a socket's path must be short
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.getuid() == 0 else []
    if user:
        os.chown(folder, 65534, 65534)

    def call(*words: str) -> None:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": "/"}
        subprocess.run([*user, *words], check=True, timeout=60, env={**os.environ, "HOME": str(folder), "LC_ALL": "C"}, **quiet)  # type: ignore[call-overload]

    base = str(folder / "base")
    call("initdb", "-D", base, "-U", "people", "-A", "trust", "--no-sync", "-E", "UTF8")
    call(
        "pg_ctl", "-D", base, "-w", "-l", str(folder / "log"), "-o", f"-c listen_addresses='' -c fsync=off -k {folder}", "start"
    )
    try:
        yield f"postgresql://people:secret@/postgres?host={folder}"
    finally:
        call("pg_ctl", "-D", base, "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield str(tmp_path / "new" / "feedback.sqlite")
        return
    url = request.getfixturevalue("postgres")
    yield url
    import sqlalchemy

    engine = sqlalchemy.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("DROP TABLE IF EXISTS raglan_feedback, raglan_feedback_schema"))
    engine.dispose()


def test_the_store_keeps_all_once(address: str) -> None:
    found = [*everything(), said("half \ud83d and nul \0", who="x")]
    with FeedbackStore(address, create=True) as store:
        assert store.add(found) == {"new": len(found)}
        assert store.judgements() == found
        stamp = store.fingerprint
        assert store.add(found) == {"unchanged": len(found)}
        assert store.fingerprint == stamp
    with FeedbackStore(address) as store:
        assert store.judgements() == found
        answer = next(one for one in found if one.kind == "answer" and one.time)
        later, earlier = (
            replace(answer, value=text, time=time) for text, time in (("new", "2027-01-01"), ("old", "2020-01-01"))
        )
        assert store.add([later]) == {"changed": 1}
        assert store.add([earlier]) == {"older": 1}
        assert store.add([earlier, later]) == {"unchanged": 2}
        assert next(one for one in store.judgements() if one.origin == answer.origin) == later
        assert len(store.judgements()) == len(found)
        assert {one.value for one in store.judgements(former=True) if one.origin == answer.origin} == {
            answer.value,
            "new",
            "old",
        }
        assert store.fingerprint != stamp


def test_a_store_of_another_version_or_none_is_refused(address: str) -> None:
    with pytest.raises(CheckpointError, match="no feedback"):
        FeedbackStore(address)
    with FeedbackStore(address, create=True) as store, store._engine.begin() as connection:
        connection.execute(store._schema.update().values(version=99))
    with pytest.raises(CheckpointError, match="version 99 of the feedback tables") as fault:
        FeedbackStore(address)
    assert "secret" not in str(fault.value)


def test_addresses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="mysql://… is not known"):
        FeedbackStore("mysql://x")
    with pytest.raises(RecipeError, match="variable NOWHERE_SET"):
        FeedbackStore("postgresql://me:${NOWHERE_SET}@host/x")
    with pytest.raises(CheckpointError, match="cannot be used") as fault:
        FeedbackStore("postgresql://me:secret@127.0.0.1:1/x", create=True)
    assert "secret" not in str(fault.value)
    monkeypatch.setenv("PLACE", str(tmp_path))
    FeedbackStore("${PLACE}/f.sqlite", create=True).close()
    assert (tmp_path / "f.sqlite").is_file()
    (tmp_path / "text.sqlite").write_text("no database" * 100)
    with pytest.raises(CheckpointError, match="not a database"):
        FeedbackStore(tmp_path / "text.sqlite")


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("postgresql://:pa55@host/x", "postgresql://:…@host/x"),
        ("postgresql://me:p@55@host/x", "postgresql://me:…@host/x"),
        ("postgresql://host/x?user=me&password=pa55&sslmode=off", "postgresql://host/x?user=me&password=…&sslmode=off"),
        ("postgresql://me:${PW}@host/x", "postgresql://me:${PW}@host/x"),
        ("feedback.sqlite", "feedback.sqlite"),
    ],
)
def test_no_password_is_told(address: str, told: str) -> None:
    assert without_password(address) == told


def test_a_broken_port_is_told() -> None:
    with pytest.raises(RecipeError, match="is no address of a database") as fault:
        FeedbackStore("postgresql://me:pa55@host:port/x", create=True)
    assert "pa55" not in str(fault.value)


def one(judgements: Sequence[Judgement], **how: object) -> Settled:
    (found,) = settle(judgements, **how)  # type: ignore[arg-type]
    return found


def test_disagreement() -> None:
    three = [said("Rusk", who="a"), said("the rusk!", who="b"), said("Dale", who="c")]
    assert [one(three, agree=agree).answers for agree in ("majority", "all", "each")] == [("Rusk",), (), ("Rusk", "Dale")]
    assert one(three, agree="all").undecided == ("answers: 'rusk', 'dale'",)
    two = [said("Rusk", who="a"), said("Dale", who="b")]
    assert one(two).answers == ()  # half is no majority
    changed = [*two, said("Rusk", who="b", time="2026-01-01")]
    assert one(changed, agree="all").answers == ("Rusk",)  # who changed their mind has one vote
    nameless = [*(replace(said("Rusk"), origin=f"o{n}") for n in range(2)), said("Dale")]
    assert one(nameless).answers == ("Rusk",)
    alternatives = [said("Rusk", who="a"), said("Edmund Rusk", who="a")]
    assert one(alternatives, agree="all").answers == ("Rusk", "Edmund Rusk")  # both are what this person says


def test_grades() -> None:
    votes = [said(str(grade), kind="relevance", who=who, passage="p") for who, grade in (("a", 3), ("b", 2), ("c", 0))]
    grades = [dict(one(votes, agree=agree).grades) for agree in ("majority", "all", "each")]
    assert grades == [{("p", ""): 2.5}, {}, {("p", ""): pytest.approx(5 / 3)}]
    assert one(votes[1:]).undecided == ("passage 'p': 0.0, 2.0",)
    (example,) = question_examples(settle([*votes, said("0", kind="relevance", who="a", passage="q")]))
    assert (example.relevant, example.grades) == (("p",), {"p": 2.5, "q": 0.0})
    stars = [said("2", kind="relevance", who="a", passage="p"), said("5", kind="relevance", who="a", passage="q")]
    assert question_examples(settle(stars, positive=4), positive=4)[0].relevant == ("q",)


def test_pairs_only_where_the_answer_changed() -> None:
    told = [
        said("The Rusk.", who="a", old="rusk"),
        said("1912", who="a", old="1911", query="when?"),
        said("1912", who="b", old="in 1911", query="when?"),
    ]
    settled = settle(told)
    assert [s.answers for s in settled] == [("The Rusk.",), ("1912",)]
    assert [s.replaced for s in settled] == [(), (("1911", "1912"), ("in 1911", "1912"))]
    assert len(sft_rows(settled)) == 2
    assert preference_rows(settled)[0] == {
        "input": {"messages": [{"role": "user", "content": "when?"}]},
        "preferred_output": [{"role": "assistant", "content": "1912"}],
        "non_preferred_output": [{"role": "assistant", "content": "1911"}],
    }
    spoken = settle([said("1780", query="Since when?", history=("Is there a mill?", "Yes."))])
    assert [m["role"] for m in sft_rows(spoken)[0]["messages"]] == ["user", "assistant", "user", "assistant"]


def test_ratings_filter_or_weigh_answers_that_were_not_corrected() -> None:
    told = [
        said("4", kind="rating", who="a", old="good"),
        said("1", kind="rating", who="a", old="bad", query="when?"),
        said("1", kind="rating", who="a", old="wrong", query="what?"),
        said("right", who="a", old="wrong", query="what?"),
    ]
    settled = settle(told)
    assert [e.answers for e in question_examples(settled)] == [("right",)]
    assert [e.answers for e in question_examples(settled, ratings="filter", min_rating=3)] == [("good",), ("right",)]
    weighed = question_examples(settled, ratings="weight")
    assert [(e.answers, e.metadata["weight"]) for e in weighed] == [(("good",), 1.0), (("bad",), 0.25), (("right",), 1.0)]


def test_round_trip_counts(tmp_path: Path) -> None:
    """Everything → store → SFT, preference pairs, labels, review; and out of the store and into another one."""
    found = everything()
    with FeedbackStore(tmp_path / "a.sqlite", create=True) as store:
        store.add(found)
        settled = settle(store.judgements())
        rows = [one.row() for one in store.judgements(former=True)]
    assert Counter(one.kind for one in used(found)) == {"answer": 10, "relevance": 6, "rating": 4, "comment": 2}
    assert len(settled) == 7
    assert len(sft_rows(settled)) == 8  # 2 of label-studio's and one of each other question
    assert [pair["preferred_output"][0]["content"] for pair in preference_rows(settled)] == [
        "Ines Carrow", "14 terraces", "Edmund Rusk", "E. Rusk", "In Corran chapel", "Anna Dale", "Since 1780",
    ]  # fmt: skip
    assert {(row["passage"], row["grade"]) for row in label_rows(settled)} == {
        ("quarry#0", 1.5), ("quarry#4", 0.0), ("quarry#0", 1.0), ("bell#0", 1.0), ("bell#1", 0.0),
    }  # fmt: skip
    assert [[c["text"] for c in row["comments"]] for row in review_rows(settled)] == [
        ["the harbour has none"],
        ["see the stone"],
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_feedback(tmp_path / "own.jsonl", "raglan") == found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("feedback")
    build_knowledge(load_recipe(small_recipe(path)).knowledge)
    return path


@pytest.fixture(scope="module")
def system(folder: Path) -> RAG:
    return RAG.open(load_recipe(folder / "small.yaml"))


def test_judged_passages_are_found_by_id_or_text(system: RAG) -> None:
    corpus = system.retriever.base.corpus
    judged = [
        said("1", kind="relevance", passage="p3"),
        said("1", kind="relevance", passage="gone", passage_text=corpus[5].text),
        said("0", kind="relevance", passage_text=f"{corpus[6].title}  {corpus[6].text}"),
        said("1", kind="relevance", passage="lost"),
    ]
    (example,) = place(question_examples(settle(judged)), corpus)
    assert (set(example.relevant), dict(example.grades)) == ({"p3", "p5"}, {"p3": 1, "p5": 1, "p6": 0})


def corrected(folder: Path, *, count: int) -> list[Example]:
    """A Label Studio export of corrections and judgements on training questions, and on one that is measured."""
    examples = read_examples(folder / "train.jsonl")[:count]
    tasks = []
    for number, example in enumerate([*examples, read_examples(folder / "dev.jsonl")[0]]):
        results = [
            {"type": "textarea", "from_name": "correction", "to_name": "a", "value": {"text": [example.answers[0]]}},
            {"type": "choices", "from_name": "relevance", "to_name": "p", "value": {"choices": ["relevant"]}},
        ]
        data = {"question": example.query, "answer": "nobody", "passage_id": example.relevant[0]}
        tasks.append({"id": number, "data": data, "annotations": [{"id": number, "completed_by": 1, "result": results}]})
    (folder / "tasks.json").write_text(json.dumps(tasks))
    return examples


def test_one_command_trains_on_the_store(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(*words: str) -> tuple[int, str, str]:
        return run(*words, capsys=capsys, monkeypatch=monkeypatch)

    examples = corrected(folder, count=12)
    store = str(folder / "people.sqlite")
    code, out, said = call("feedback", "import", str(folder / "tasks.json"), "--from", "label-studio", "--store", store)
    assert (code, out) == (0, "26 new\n")
    assert "26 used: 13 answer, 13 relevance" in said
    assert (
        call("feedback", "import", str(folder / "tasks.json"), "--from", "label-studio", "--store", store)[1]
        == "0 new, 26 unchanged\n"
    )
    text = (folder / "small.yaml").read_text()
    stages = text[text.index("stages:") : text.index("evaluate:")]
    (folder / "tuned.yaml").write_text(text.replace("name: small", "name: tuned").replace(stages, """stages:
  read:
    data: {kind: feedback, store: people.sqlite, passages: 2, replay: train.jsonl, replay_times: 0.5}
    objective: {kind: answer}
    train: {max_steps: 2}
  find:
    data: {kind: feedback, store: people.sqlite, dev: dev.jsonl}
    objective: {kind: lsr, k: 4, candidates: dense, target: mean_prob, tau: 0.1}
    train: {max_steps: 2}
  rank:
    data: {kind: feedback, store: judged.sqlite}
    objective: {kind: lsr, k: 4, candidates: dense, target: given, tau: 0.5}
    train: {max_steps: 2}
"""))  # fmt: skip
    with FeedbackStore(folder / "judged.sqlite", create=True) as kept:  # of passages alone: no answer anywhere
        kept.add([one for one in read_feedback(folder / "tasks.json", "label-studio") if one.kind == "relevance"])
    assert call("train", str(folder / "tuned.yaml"))[0] == 0
    manifests = {
        path.parent.parent.name.split("-")[0]: json.loads(path.read_text())
        for path in folder.glob("runs/tuned/stages/*/result/manifest.json")
    }
    assert [manifests[name]["rows"] for name in ("read", "find", "rank")] == [
        12 + 6,
        12,
        12,
    ]  # and not the question that is measured
    (stage,) = folder.glob("runs/tuned/stages/read-*")
    kept_points = read_points(stage / "data")
    assert len(kept_points) == manifests["read"]["data"]["points"] == 12 + 6
    assert [(p.source, p.query, p.answer) for p in kept_points[:12]] == [("feedback", e.query, e.answers[0]) for e in examples]
    assert all(len(point.contexts) == 2 and point.prompt and point.retriever for point in kept_points)
    assert [name for name, _ in finished_parts(load_recipe(folder / "tuned.yaml"))] == ["untuned", "read", "find", "rank"]
    with FeedbackStore(store) as kept:
        kept.add([Judgement("late", "answer", "somebody", examples[0].query + " really", annotator="x")])
    assert [name for name, _ in finished_parts(load_recipe(folder / "tuned.yaml"))] == ["untuned"]  # something is new to learn

    exported = str(folder / "questions.jsonl")
    code, out, _ = call("feedback", "export", "-o", exported, "--store", store, "--exclude", str(folder / "dev.jsonl"))
    assert out == f"{exported}  13 rows; 1 held-out questions left out\n"
    corpus = load_recipe(folder / "small.yaml").knowledge
    data = FeedbackData(kind="feedback", path=Path(exported))
    again = stage_examples(data, KnowledgeBase.open(corpus.path).corpus, 0)
    assert [(e.query, e.answers, e.relevant) for e in again[:12]] == [(e.query, e.answers[:1], e.relevant) for e in examples]
    for form, count in (("sft", 14), ("dpo", 13), ("labels", 13), ("review", 0), ("raglan", 27)):
        assert call("feedback", "export", "-o", str(folder / "x.jsonl"), "--as", form, "--store", store)[1].endswith(
            f"  {count} rows\n"
        )
    listed = json.loads(call("feedback", "list", "--store", store, "--json")[1])
    assert (listed["statements"], listed["questions"], listed["people"]) == (27, 14, 2)
    shown = json.loads(call("feedback", "show", examples[0].query, "--store", store)[1])
    assert shown["settled"]["replaced"] == [["nobody", examples[0].answers[0]]]
    for words, message in (
        (("show", "nothing like it"), "holds nothing on"),
        (("list", "--store", "none.sqlite"), "there is no feedback store"),
        (("export", "-o", "x", "--as", "xml"), "known are questions"),
        (("export", "-o", "x", "--agree", "some"), "majority, all or each"),
        (("export", "-o", "x", "--ratings", "filter"), "--min-rating"),
    ):
        code, _, said = call("feedback", *words, *([] if "--store" in words else ["--store", store]))
        assert code == 2
        assert message in said


def test_names_that_mean_nothing_are_told_with_their_cure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A form with names of its own: nothing is used at first, and the same file imported with --map is."""
    result = {"from_name": "better", "to_name": "a", "type": "textarea", "value": {"text": ["Rusk"]}}
    annotation = {"id": 1, "completed_by": {"id": 3, "email": "ann@example.org"}, "result": [result]}
    task = {"id": 1, "data": {"question": "who?"}, "annotations": [annotation]}
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps([task]))
    words = ["feedback", "import", str(path), "--from", "label-studio", "--store", str(tmp_path / "f.sqlite")]
    code, out, told = run(*words, capsys=capsys, monkeypatch=monkeypatch)
    assert (code, out) == (0, "1 new\n")
    assert "0 used: none" in told
    assert "'better' is not mapped to any of answer, relevance, rating, comment" in told
    assert "hint: say what a name means and import again, as in --map" in told
    wrong = ["argilla" if word == "label-studio" else word for word in words]
    assert "another tool's: check --from" in run(*wrong, capsys=capsys, monkeypatch=monkeypatch)[2]
    code, out, told = run(*words, "--map", "answer=better", capsys=capsys, monkeypatch=monkeypatch)
    assert (code, out) == (0, "0 new, 1 changed\n")
    assert "1 used: 1 answer" in told
    assert "hint" not in told
    path.write_text(path.read_text().replace("better", "rating").replace("Rusk", "[/very]"))  # no markup, but a label
    assert "'[/very]' is no number and no known label" in run(*words, capsys=capsys, monkeypatch=monkeypatch)[2]


@pytest.mark.parametrize(("form", "name", "few"), [("sft", "openai-chat", 8), ("dpo", "openai-dpo", 7)])
def test_what_a_service_would_refuse_is_not_written(
    form: str, name: Any, few: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too few lines, or none: told, exit 2, and what stood there before still stands. With enough of them the check passes."""
    path, place = tmp_path / f"{form}.jsonl", str(tmp_path / "f.sqlite")
    path.write_text("before")
    words = ["feedback", "export", "-o", str(path), "--as", form, "--store", place]
    FeedbackStore(place, create=True).close()
    code, out, told = run(*words, capsys=capsys, monkeypatch=monkeypatch)
    assert (code, out) == (2, "")
    assert "there is nothing to export" in told
    with FeedbackStore(place) as store:
        store.add(everything())
    code, out, told = run(*words, capsys=capsys, monkeypatch=monkeypatch)
    assert (code, out) == (2, "")
    assert f"{few} rows; at least 10 are needed" in told
    assert "is not written" in told
    assert "hint: --as questions" in told
    assert path.read_text() == "before"
    with FeedbackStore(place) as store:
        store.add([said(f"mill {n}", old="a barn", query=f"what stood at {n}?") for n in range(10)])
    code, out, told = run(*words, capsys=capsys, monkeypatch=monkeypatch)
    assert (code, out) == (0, f"{path}  {few + 10} rows\n")
    assert f"warning: {few + 10} rows; fewer than 50 teach little" in told
    assert [fault.level for fault in check_file(path, name)] == ["warning", "unchecked"]
    assert len(path.read_text().splitlines()) == few + 10
    assert {one.name for one in tmp_path.iterdir()} == {path.name, "f.sqlite"}  # no half of a file, and nothing beside it


def test_feedback_on_measured_questions_is_never_learned(folder: Path, system: RAG) -> None:
    """By words or by id, from a store or from a file, for each question of the measured file."""
    corpus = system.retriever.base.corpus
    held = read_examples(folder / "dev.jsonl")
    free = Judgement("free", "answer", "yes", "is this free")
    told = [Judgement(f"w{n}", "answer", "x", e.query.upper() + "?") for n, e in enumerate(held)]
    told += [Judgement(f"i{n}", "answer", "x", f"reworded {n}", example=e.id) for n, e in enumerate(held)]
    with FeedbackStore(folder / "held.sqlite", create=True) as store:
        store.add([free, *told])
    write_examples(folder / "held.jsonl", question_examples(settle([free, *told])))
    for data in ({"store": folder / "held.sqlite"}, {"path": folder / "held.jsonl"}):
        settings = FeedbackData(kind="feedback", **data)  # type: ignore[arg-type]
        assert len(stage_examples(settings, corpus, 0)) == 1 + 2 * len(held)
        assert [e.query for e in stage_examples(settings, corpus, 0, held_out=held)] == ["is this free"]


def test_a_rows_weight_multiplies_its_loss(system: RAG) -> None:
    examples = [Example("a", "who built bcd", ("fgh",), metadata={"weight": 0.25}), Example("b", "who built cdf", ("bbb",))]
    data = FeedbackData(kind="feedback", path=Path("x"), passages=1)
    rows = answer_rows(examples, data, system.retriever, system.generator, 0)
    assert [row.get("weight") for row in rows] == [0.25, None]
    objective = AnswerObjective(system.generator, reduction="example")
    plain = [{key: value for key, value in row.items() if key != "weight"} for row in rows]
    with torch.no_grad():
        alone = [float(objective.loss(objective.collate([row]))[0]) for row in plain]
        both = float(objective.loss(objective.collate(rows))[0])
        assert both == pytest.approx((0.25 * alone[0] + alone[1]) / 2, rel=1e-4)
        assert objective.validate(rows) == pytest.approx(objective.validate(plain))


def test_recipes_name_one_source(tmp_path: Path) -> None:
    text = "name: x\nknowledge: {{path: k, documents: d}}\ndata: {{kind: feedback, {0}}}\nobjective: {{kind: {1}}}\n"
    for given, objective, message in (
        ("agree: all", "answer", "give either store or path"),
        ("store: f, ratings: filter", "answer", "belong together"),
        ("store: f", "marginal, over: token", "needs data of kind questions"),
        ("store: f, agre: all", "answer", "did you mean 'agree'"),
    ):
        (tmp_path / "r.yaml").write_text(text.format(given, objective))
        with pytest.raises(RecipeError, match=message):
            load_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text(text.format("store: f.sqlite", "lsr"))
    assert load_recipe(tmp_path / "r.yaml").data.store == tmp_path / "f.sqlite"  # type: ignore[union-attr]
    (tmp_path / "r.yaml").write_text(text.format("store: 'postgresql://me:${PW}@h/x'", "answer"))
    assert load_recipe(tmp_path / "r.yaml").data.store == "postgresql://me:${PW}@h/x"  # type: ignore[union-attr]


def test_an_empty_store_trains_nothing(system: RAG, tmp_path: Path) -> None:
    FeedbackStore(tmp_path / "f.sqlite", create=True).close()
    with pytest.raises(CorpusError, match="feedback store holds no question with an answer"):
        stage_examples(FeedbackData(kind="feedback", store=tmp_path / "f.sqlite"), system.retriever.base.corpus, 0)
