"""Training files for others: every planted fault is caught with its line, and what is exported has none."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from raglan.artifact import directory_fingerprint
from raglan.candidates import lsr_rows
from raglan.data import load_examples
from raglan.datapoints import write_points
from raglan.documents import read_documents, read_examples
from raglan.errors import CorpusError, RaglanError, RecipeError
from raglan.exports import (
    Lengths,
    Preference,
    check_file,
    cut,
    export_pairs,
    export_points,
    export_sentences,
    failed,
    found_points,
    holds_pairs,
    holds_points,
    read_pairs,
    shared_questions,
)
from raglan.exports.sentences import raw_label
from raglan.knowledge import build_knowledge, passage_text
from raglan.recipe import QA_PROMPTS, KnowledgeSettings, PromptSettings, ScorerSettings, load_recipe
from raglan.records import Context, DataPoint
from raglan.scores import open_scorer
from raglan.stages import Parts
from test_cli import run
from tiny import small_recipe

CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


def chat(question: str = "who built the tower?", answer: str = "a miller", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def dpo(question: str = "who?", better: str = "a miller", worse: str = "a baker") -> dict[str, Any]:
    sides = {"preferred_output": better, "non_preferred_output": worse}
    asked = {"input": {"messages": [{"role": "user", "content": question}]}}
    return {**asked, **{name: [{"role": "assistant", "content": text}] for name, text in sides.items()}}


def trl(question: str = "who?", better: str = "a miller", worse: str = "a baker") -> dict[str, Any]:
    return {"prompt": question, "chosen": better, "rejected": worse}


def sentences(question: str = "who?") -> dict[str, Any]:
    return {"query": question, "passage_1": "a tower", "passage_2": "a mill", "label": [0.25, 1e-9]}


CLEAN: dict[str, Callable[[str], dict[str, Any]]] = {
    "openai-chat": chat, "openai-dpo": dpo, "trl": trl, "sentence-transformers": sentences,
}  # fmt: skip


def changed(row: dict[str, Any], *path: Any, to: Any = None, away: bool = False) -> dict[str, Any]:
    """A copy with the value at a path changed, or taken away."""
    copy = json.loads(json.dumps(row))
    place = copy
    for key in path[:-1]:
        place = place[key]
    if away:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return copy


def turns(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


USER, BOT = {"role": "user", "content": "who?"}, {"role": "assistant", "content": "a miller"}
SFT_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": (chat(score=1), "unknown key 'score'"),
    "no messages": ({"tools": [TOOL]}, "`messages` must be a list"),
    "empty messages": (turns(), "`messages` must be a list"),
    "message no object": ({"messages": ["hello"]}, "message 1 is str"),
    "unknown role": (changed(chat(), "messages", 0, "role", to="human"), "message 1: role is 'human'"),
    "no assistant": (turns(USER), "no assistant message is to be learned"),
    "all weights 0": (turns(USER, {**BOT, "weight": 0}), "no assistant message is to be learned"),
    "assistant not last": (turns(USER, BOT, USER), "the last message must be an assistant's"),
    "last has weight 0": (turns(USER, BOT, USER, {**BOT, "weight": 0}), "the last message must be an assistant's"),
    "weight 2": (turns(USER, {**BOT, "weight": 2}), "message 2: weight is 2"),
    "weight a bool": (turns(USER, {**BOT, "weight": True}), "message 2: weight is True"),
    "weight a fraction": (turns(USER, {**BOT, "weight": 0.5}), "message 2: weight is 0.5"),
    "weight of a user": (turns({**USER, "weight": 1}, BOT), "message 1: weight belongs to assistant messages"),
    "empty content": (turns(USER, {**BOT, "content": " "}), "message 2: content is empty"),
    "no content": (turns({"role": "user"}, BOT), "message 1: content is empty"),
    "content null without calls": (turns(USER, {**BOT, "content": None}), "message 2: content is empty"),
    "empty text part": (turns({**USER, "content": [{"type": "text", "text": ""}]}, BOT), "message 1: content is empty"),
    "tool answers nothing": (turns(USER, {"role": "tool", "content": "x", "tool_call_id": "c9"}, BOT), "'c9' answers no call"),
    "tool before its call": (
        turns({"role": "tool", "content": "x", "tool_call_id": "c1"}, {"role": "assistant", "tool_calls": [CALL]}),
        "'c1' answers no call",
    ),
    "function not called": (turns(USER, {"role": "function", "name": "look", "content": "x"}, BOT), "'look' was not called"),
    "call without arguments": (
        turns(USER, {"role": "assistant", "tool_calls": [changed(CALL, "function", "arguments", away=True)]}), "`tool_calls`",
    ),
    "call by a user": (turns({**USER, "tool_calls": [CALL]}, BOT), "`tool_calls` belongs to assistant"),
    "no functions": (chat(functions=[]), "`functions` holds 0"),
    "129 functions": (chat(functions=[{"name": f"f{n}"} for n in range(129)]), "`functions` holds 129"),
    "functions beside tools": (chat(functions=[{"name": "f"}], tools=[TOOL]), "`functions` beside `tools`"),
    "empty tools": (chat(tools=[]), "`tools` must be a list"),
    "tool without a name": (chat(tools=[{"type": "function"}]), "tool 1 must be"),
    "parallel no bool": (chat(parallel_tool_calls="yes"), "`parallel_tool_calls` must be true or false"),
}  # fmt: skip
DPO_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({**dpo(), "score": 1}, "unknown key 'score'"),
    "older name": (
        {**{k: v for k, v in dpo().items() if k != "preferred_output"}, "preferred_completion": dpo()["preferred_output"]},
        "`preferred_completion` is an older name: write `preferred_output`",
    ),
    "no input": (changed(dpo(), "input", away=True), "`input` must be an object"),
    "unknown key in input": (changed(dpo(), "input", "functions", to=[]), "input: unknown key 'functions'"),
    "input ends in an answer": (changed(dpo(), "input", "messages", to=[USER, BOT]), "input ends in an assistant turn"),
    "no output": (changed(dpo(), "non_preferred_output", away=True), "`non_preferred_output` must be a list of exactly one"),
    "two outputs": (changed(dpo(), "preferred_output", to=[BOT, BOT]), "`preferred_output` must be a list of exactly one"),
    "output of a user": (changed(dpo(), "preferred_output", to=[USER]), "role is 'user'; it must be assistant"),
    "empty output": (changed(dpo(), "preferred_output", 0, "content", to=""), "`preferred_output`: content is empty"),
    "the same twice": (dpo(better="a miller", worse=" a miller "), "are the same"),
    "bad role in input": (changed(dpo(), "input", "messages", 0, "role", to="human"), "role is 'human'"),
}
TRL_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "another form": ({"prompt": "who?", "completion": "a miller"}, "not those of the first line"),
    "unknown keys": ({"question": "who?"}, "they must be one of"),
    "messages among texts": (
        {key: [USER, BOT][:n] for key, n in (("prompt", 1), ("chosen", 2), ("rejected", 2))},
        "texts where",
    ),
    "empty text": (trl(better=" "), "`chosen` is empty"),
    "the same twice": (trl(worse="a miller"), "chosen and rejected are the same"),
}
SENTENCE_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "label first": ({"label": [1, 2], "query": "q", "passage_1": "a", "passage_2": "b"}, "in this order"),
    "one passage": ({"query": "q", "passage_1": "a", "label": [1]}, "in this order"),
    "another K": ({"query": "q", "passage_1": "a", "passage_2": "b", "passage_3": "c", "label": [1, 2, 3]}, "3 passages where"),
    "labels too few": (changed(sentences(), "label", to=[1.0]), "a list of 2 numbers"),
    "label a text": (changed(sentences(), "label", to=[1.0, "0.5"]), "a list of 2 numbers"),
    "empty passage": (changed(sentences(), "passage_2", to=""), "`passage_2` must be a text"),
}
PLANTED = [
    (form, name, *fault)
    for form, faults in (
        ("openai-chat", SFT_FAULTS), ("openai-dpo", DPO_FAULTS), ("trl", TRL_FAULTS),
        ("sentence-transformers", SENTENCE_FAULTS),
    )
    for name, fault in faults.items()
]  # fmt: skip


def written(path: Path, rows: list[Any]) -> Path:
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    return path


def errors(path: Path, form: Any, **more: Any) -> list[tuple[int, str]]:
    return [(fault.line, fault.text) for fault in check_file(path, form, **more) if fault.level == "error"]


@pytest.mark.parametrize(("form", "name", "row", "told"), PLANTED, ids=lambda value: value if isinstance(value, str) else "")
def test_a_planted_fault_is_caught_with_its_line(tmp_path: Path, form: str, name: str, row: Any, told: str) -> None:
    rows = [CLEAN[form](f"question {n}?") for n in range(12)]
    assert not errors(written(tmp_path / "clean.jsonl", rows), form)
    found = errors(written(tmp_path / "planted.jsonl", [*rows[:7], row, *rows[7:]]), form)
    assert {line for line, _ in found} == {8}
    assert any(told in text for _, text in found), found


BROKEN = {
    "not JSON": (b'{"messages": \n', "not JSON"), "no object": (b"[1]\n", "list, not an object"),
    "blank": (b"\n", "a blank line"),
    "not UTF-8": (b'{"messages": "caf\xe9"}\n', "not UTF-8: byte 0xe9"), "NaN": (b'{"weight": NaN}\n', "NaN is no JSON number"),
    "half a character": (b'{"messages": "\\ud800"}\n', "half a character"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_line_is_caught_with_its_number(tmp_path: Path, name: str) -> None:
    line, told = BROKEN[name]
    rows: list[Any] = [chat(f"question {n}?") for n in range(12)]
    found = errors(written(tmp_path / "broken.jsonl", [*rows, line]), "openai-chat")
    assert [line for line, _ in found] == [13]
    assert told in found[0][1]


def test_faults_of_the_file_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [chat(f"question {n}?") for n in range(60)]
    assert errors(written(tmp_path / "few.jsonl", rows[:9]), "openai-chat") == [(0, "9 rows; at least 10 are needed")]
    faults = check_file(written(tmp_path / "less.jsonl", rows[:49]), "openai-chat")
    assert [(fault.level, fault.text) for fault in faults if fault.level == "warning"] == [
        ("warning", "49 rows; fewer than 50 teach little")
    ]
    assert [fault.level for fault in check_file(written(tmp_path / "enough.jsonl", rows), "openai-chat")] == ["unchecked"]
    assert errors(written(tmp_path / "none.jsonl", []), "trl") == [(0, "the file holds no row")]
    marked = written(tmp_path / "marked.jsonl", [b"\xef\xbb\xbf", *rows])
    assert errors(marked, "openai-chat") == [(1, "the file begins with a byte order mark")]
    monkeypatch.setattr("raglan.exports.check.MAX_BYTES", 1000)
    assert "at most 1,000" in errors(tmp_path / "enough.jsonl", "openai-chat")[0][1]


def test_what_is_allowed_is_not_told(tmp_path: Path) -> None:
    developer = turns({"role": "developer", "content": "be brief"}, USER, BOT)
    called = turns(
        USER, {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 0},
        {"role": "tool", "content": "a mill", "tool_call_id": "c1"}, {**BOT, "weight": 1},
        tools=[TOOL], parallel_tool_calls=False,
    )  # fmt: skip
    old = turns(
        USER, {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "x"}, BOT, functions=[{"name": "f"}] * 128,
    )  # fmt: skip
    seen = turns({**USER, "content": [{"type": "text", "text": "who?"}]}, {**BOT, "name": "raglan"})
    path = written(tmp_path / "rich.jsonl", [developer, called, old, seen, *[chat(f"question {n}?") for n in range(50)]])
    told = [(fault.line, fault.level) for fault in check_file(path, "openai-chat")]
    assert told == [(1, "warning"), (3, "warning"), (0, "unchecked")]


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    rows: list[Any] = [row for row, _ in SFT_FAULTS.values()]
    found = errors(written(tmp_path / "all.jsonl", rows), "openai-chat")
    assert {line for line, _ in found} == set(range(1, len(rows) + 1))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    tiny.tokenizer().save_pretrained(str(folder))
    return folder


def test_a_row_that_is_too_long_is_a_fault(tmp_path: Path, words: Path) -> None:
    rows = [chat(f"question {n}?") for n in range(12)]
    path = written(tmp_path / "long.jsonl", [*rows, chat("q" * 5000), chat("w" * 3000)])
    lengths = Lengths.of("gpt-3.5-turbo-0613", tokenizer=words)
    assert lengths is not None
    assert lengths.limit == 4096
    found = errors(path, "openai-chat", lengths=lengths)
    assert [line for line, _ in found] == [13]
    assert "the model takes 4,096" in found[0][1]
    later = Lengths.of("gpt-3.5-turbo-0125", tokenizer=words)
    assert later is not None
    assert not errors(path, "openai-chat", lengths=later)
    assert not any(fault.level == "unchecked" for fault in check_file(path, "openai-chat", lengths=later))
    for name in ("gpt-4o", "gpt-4o-mini-2024-07-18"):
        largest = Lengths.of(name, tokenizer=words)
        assert largest is not None
        assert largest.limit == 65_536
        room = 65_536 - largest.count(chat("")["messages"])
        whole = written(tmp_path / "largest.jsonl", [*rows, chat("q" * room), chat("q" * (room + 1))])
        (fault,) = errors(whole, "openai-chat", lengths=largest)
        assert fault[0] == 14
        assert "65,537 tokens; the model takes 65,536" in fault[1]
    pairs = written(tmp_path / "pairs.jsonl", [*[dpo(f"q{n}?") for n in range(10)], dpo("q?", worse="w" * 5000)])
    assert [line for line, _ in errors(pairs, "openai-dpo", lengths=lengths)] == [11]


def test_lengths_come_of_a_model_folder_and_its_chat_template(tmp_path: Path) -> None:
    template = "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"
    folder = tiny.llama(tmp_path / "llama", template=template)
    lengths = Lengths.of(str(folder))
    assert lengths is not None
    assert lengths.limit == 1024
    one, two = lengths.count([USER]), lengths.count([USER, BOT])
    wanted = lengths.tokenizer("<s>user who?</s>", add_special_tokens=False)["input_ids"]
    assert one == len(wanted) < two
    strict = "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('users only') }}{% endif %}{% endfor %}"
    lengths.tokenizer.chat_template = strict
    assert lengths.count([USER, BOT]) > 8  # where the template refuses, the texts and 4 a message
    assert Lengths.of("gpt-4o") is None
    with pytest.raises(RecipeError, match="neither a folder nor a model"):
        Lengths.of("gpt-99")
    with pytest.raises(RaglanError, match="no tokenizer"):
        Lengths.of("gpt-4o", tokenizer=tmp_path)


def test_no_question_in_both_files(tmp_path: Path) -> None:
    train = written(tmp_path / "train.jsonl", [chat(f"question {n}?") for n in range(12)])
    validation = written(tmp_path / "validation.jsonl", [chat("another?"), chat("  The Question 3 "), chat("question 30?")])
    shared = shared_questions(train, validation, "openai-chat")
    assert [(fault.line, fault.text) for fault in shared] == [(2, "the question also stands in train.jsonl, line 4")]
    turned = turns(USER, BOT, {"role": "user", "content": "question 3?"}, BOT)
    assert not shared_questions(train, written(tmp_path / "dialogue.jsonl", [turned]), "openai-chat")


# ---- what is exported


def point(number: int, *, contexts: int = 2, **more: Any) -> DataPoint:
    found = tuple(Context(f"p{number}.{n}", f"text {n} of {number}", 1.0 / n, n) for n in range(1, contexts + 1))
    given: dict[str, Any] = {
        "id": f"r{number}", "example_id": f"e{number}", "source": "task", "split": "train", "query": f"question {number}?",
        "answer": f"answer {number}", "contexts": found,
        "prompt": f"Background: …\n\nQ: question {number}?\nA:", "retriever": "abc",
    }  # fmt: skip
    return DataPoint(**{**given, **more})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_points_become_conversations_with_what_belongs_to_them(tmp_path: Path) -> None:
    points = [point(n) for n in range(12)] + [point(99, query="", prompt="", answer="raw text")]
    done = export_points(points, tmp_path / "train.jsonl", form="openai-chat")
    assert (done.rows, done.left_out) == (12, 1)
    rows, meta = lines(tmp_path / "train.jsonl"), lines(tmp_path / "train.meta.jsonl")
    assert len(rows) == len(meta) == 12
    assert rows[3] == chat("Background: …\n\nQ: question 3?\nA:", "answer 3")
    assert meta[3]["query"] == "question 3?"
    assert meta[3]["retriever"] == "abc"
    assert meta[3]["contexts"][1] == {"passage_id": "p3.2", "text": "text 2 of 3", "score": 0.5, "rank": 2, "title": ""}
    assert meta[3]["prompt"] == rows[3]["messages"][0]["content"]


def test_prompts_by_name_and_passages_apart_or_together(tmp_path: Path) -> None:
    points = [point(n, history=("who?", "a miller")) for n in range(10)]
    out = tmp_path / "train.jsonl"
    for name, says in (("context_only", "from nothing else"), ("context_first", "from what you know")):
        export_points(points, out, form="openai-chat", prompt=name)
        first = lines(out)[0]["messages"]
        assert [turn["role"] for turn in first] == ["user", "assistant", "user", "assistant"]
        assert says in first[2]["content"]
        assert "text 1 of 0\n\ntext 2 of 0\n\nQuestion: question 0?\nAnswer:" in first[2]["content"]
    assert export_points(points, out, form="openai-chat", separate_context=True).rows == 20
    apart = lines(out)
    asked = [row["messages"][2]["content"] for row in apart[:2]]
    assert [("text 1 of 0" in text, "text 2 of 0" in text) for text in asked] == [(True, False), (False, True)]
    assert [len(row["contexts"]) for row in lines(tmp_path / "train.meta.jsonl")] == [1] * 20
    single = [part for p in points for part in cut([p], separate=True)]
    assert cut(single, separate=False) == [point(n, history=("who?", "a miller"), id=f"r{n}#1") for n in range(10)]
    with pytest.raises(RecipeError, match="no prompt 'context_last'"):
        export_points(points, out, form="openai-chat", prompt="context_last")
    assert PromptSettings(template="context_only").template == QA_PROMPTS["context_only"]


def test_what_would_break_the_rules_does_not_appear(tmp_path: Path, words: Path) -> None:
    with pytest.raises(CorpusError, match="9 rows; at least 10"):
        export_points([point(n) for n in range(9)], tmp_path / "few.jsonl", form="openai-chat")
    long = [point(n) for n in range(10)] + [point(10, prompt="w" * 5000)]
    with pytest.raises(CorpusError, match=r"line 11: 5,\d+ tokens; the model takes 4,096"):
        export_points(
            long, tmp_path / "long.jsonl", form="openai-chat", lengths=Lengths.of("gpt-3.5-turbo-0613", tokenizer=words)
        )
    assert not list(tmp_path.glob("*"))


def test_pairs_become_preferences(tmp_path: Path) -> None:
    contexts = ["text", {"text": "other", "score": 1}]
    rows: list[Any] = [
        {"query": f"question {n}?", "chosen": "a miller", "rejected": "a baker", "contexts": contexts} for n in range(10)
    ]
    rows.append({"query": "same?", "preferred": "yes", "rejected": "yes "})
    rows.append({"query": "and?", "preferred": "b", "rejected": "c", "history": ["a", "b"]})
    source = written(tmp_path / "pairs.jsonl", rows)
    assert holds_pairs(source)
    pairs = read_pairs(source)
    assert pairs[10] == Preference("same?", "yes", "yes ")
    done = export_pairs(pairs, tmp_path / "dpo.jsonl", form="openai-dpo", prompt="context_only")
    assert (done.rows, done.left_out) == (11, 1)
    first, last = lines(done.path)[0], lines(done.path)[-1]
    assert "text\n\nother" in first["input"]["messages"][0]["content"]
    assert first["preferred_output"] == [BOT]
    assert first["non_preferred_output"] == [{"role": "assistant", "content": "a baker"}]
    assert [turn["content"] for turn in last["input"]["messages"]] == ["a", "b", "and?"]
    export_pairs(pairs, tmp_path / "trl.jsonl", form="trl", separate_context=True)
    rows = lines(tmp_path / "trl.jsonl")
    assert len(rows) == 21
    assert set(rows[0]) == {"prompt", "chosen", "rejected"}
    again = read_pairs(done.path)  # lines of that form are pairs themselves
    assert [pair.chosen for pair in again] == ["a miller"] * 10 + ["b"]
    assert again[-1].history == ("a", "b")
    with pytest.raises(CorpusError, match="line 2: `rejected` is ''"):
        read_pairs(
            written(
                tmp_path / "bad.jsonl",
                [{"query": "a", "chosen": "b", "rejected": "c"}, {"query": "a", "chosen": "b", "rejected": ""}],
            )
        )


def test_trl_reads_them_by_the_columns_it_knows(tmp_path: Path) -> None:
    """A data set of columns, its conversations in the model's own template: the prompt is the head of the whole."""
    load_dataset = pytest.importorskip("datasets").load_dataset
    words = tiny.tokenizer()
    words.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    export_points([point(n) for n in range(3)], tmp_path / "sft.jsonl", form="trl")
    export_points([point(n) for n in range(3)], tmp_path / "talk.jsonl", form="trl", shape="messages")
    table = load_dataset("json", data_files=str(tmp_path / "sft.jsonl"), split="train", cache_dir=str(tmp_path / "cache"))
    assert table.column_names == ["prompt", "completion"]
    row = table[0]
    asked = words.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    whole = words.apply_chat_template([*row["prompt"], *row["completion"]], tokenize=False)
    assert whole == f"{asked}answer 0"
    assert [turn["role"] for turn in lines(tmp_path / "talk.jsonl")[0]["messages"]] == ["user", "assistant"]


letters = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30).filter(lambda text: text.strip())
passages = st.lists(letters, max_size=3, unique=True)


@st.composite
def any_point(draw: st.DrawFn) -> DataPoint:
    found = tuple(Context(f"p{n}", text, draw(st.none() | st.floats(-1, 1)), n) for n, text in enumerate(draw(passages), 1))
    example, prompt, history = draw(st.integers(0, 9)), draw(letters | st.just("")), tuple(draw(st.lists(letters, max_size=3)))
    return DataPoint("r", f"e{example}", "task", "", draw(letters), draw(letters), found, prompt, history=history)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(any_point(), min_size=10, max_size=14), st.sampled_from([None, *QA_PROMPTS]), st.sampled_from([None, True, False]),
    st.sampled_from(["openai-chat", "trl"]), st.sampled_from(["messages", "prompt_completion"]),
)  # fmt: skip
def test_exports_always_pass(points: list[DataPoint], prompt: Any, separate: Any, form: Any, shape: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.jsonl"
        if separate is False and form == "openai-chat" and len(cut(points, separate=False)) < 10:
            return  # joined, there are too few of them, and that is told
        done = export_points(points, path, form=form, prompt=prompt, separate_context=separate, shape=shape)
        assert not failed(check_file(path, form))
        assert len(lines(path)) == len(lines(path.with_name("train.meta.jsonl"))) == done.rows


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(letters, letters, letters, passages), min_size=10, max_size=14), st.sampled_from(["openai-dpo", "trl"])
)
def test_exported_pairs_always_pass(rows: list[tuple[str, str, str, list[str]]], form: Any) -> None:
    pairs = [
        Preference(query, better, worse, tuple(Context(str(n), text, None, n) for n, text in enumerate(found, 1)))
        for query, better, worse, found in rows
    ]
    kept = [pair for pair in pairs if pair.chosen.strip() != pair.rejected.strip()]
    with tempfile.TemporaryDirectory() as folder:
        if len(kept) < 10:
            return
        done = export_pairs(pairs, Path(folder) / "pairs.jsonl", form=form)
        assert not failed(check_file(done.path, form))
        assert done.rows == len(kept)


# ---- what sentence-transformers distils


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("exports")
    path = small_recipe(where)
    build_knowledge(load_recipe(path).knowledge)
    return where


def test_labels_are_the_score_tables_own(folder: Path) -> None:
    recipe = load_recipe(folder / "small.yaml")
    system, objective = Parts().open(recipe), recipe.trainings()["find"].objective
    examples = read_examples(folder / "train.jsonl")[:6]
    scores = folder / "table"
    rows = lsr_rows(examples, system, objective, scores)
    known = directory_fingerprint(scores, ("*.bin",))
    dense = type(system.retriever)(system.retriever.base, system.retriever.encoder, index="dense")
    points = found_points(examples, dense, k=5)
    done = export_sentences(points, folder / "st.jsonl", system, scores=scores, target="sum_logprob")
    assert directory_fingerprint(scores, ("*.bin",)) == known, "a score that was in the table was computed again"
    assert not errors(done.path, "sentence-transformers")
    for line, row, example in zip(lines(done.path), rows, examples, strict=True):
        own = [system.retriever.base.corpus[int(number)] for number in row.candidates]
        assert line["query"] == example.query
        assert [line[f"passage_{n}"] for n in range(1, 6)] == [passage_text(passage) for passage in own]
        assert np.allclose(line["label"], row.answer_logprobs, rtol=1e-5)
    about = lines(folder / "st.meta.jsonl")[0]
    assert about["target"] == "sum_logprob"
    assert np.isclose(about["contexts"][0]["sum_logprob"], rows[0].answer_logprobs[0], rtol=1e-5)
    assert about["contexts"][0]["tokens"] == rows[0].answer_length
    single = [part for p in points for part in cut([p], separate=True)]
    again = export_sentences(single, folder / "single.jsonl", system, scores=scores, target="sum_logprob")
    assert again.path.read_bytes() == done.path.read_bytes()


@pytest.mark.parametrize(
    ("target", "value"), [("prob", 0.36), ("sum_logprob", -1.0216512), ("mean_logprob", -0.5108256), ("mean_prob", 0.6)]
)
def test_raw_labels(target: Any, value: float) -> None:
    assert np.isclose(raw_label(np.log(np.array([0.9, 0.4], np.float32)), target), value)


def test_the_distillation_loss_is_ours_times_its_temperature_squared() -> None:
    """s = [.9,.8,.7,.6], p_LM = [.1,.6,.3,.2], T_s = .05, T_t = .01: KL(q‖p) 2.145078, theirs 0.005363, gradients likewise."""
    from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss

    from raglan.likelihood import lsr_divergence

    s = torch.tensor([[0.9, 0.8, 0.7, 0.6]], requires_grad=True)
    p_lm = torch.tensor([[0.1, 0.6, 0.3, 0.2]])
    ours = lsr_divergence(s, p_lm.log(), direction="target_first", target="prob", tau=0.01, gamma=0.05)
    (gradient,) = torch.autograd.grad(ours.sum(), s)
    assert np.isclose(ours.item(), 2.145078, atol=1e-5)
    assert np.isclose(gradient[0, 0].item(), 17.299098, atol=1e-4)
    loss = DistillKLDivLoss(None, student_temperature=0.05, teacher_temperature=0.01)
    theirs = loss.compute_loss_from_embeddings([torch.ones(1, 1), *s.split(1, dim=1)], p_lm)
    (scaled,) = torch.autograd.grad(theirs, s)
    assert np.isclose(theirs.item(), 0.005363, atol=1e-6)
    assert np.isclose(scaled[0, 0].item(), 0.043248, atol=1e-5)


def test_sentence_transformers_learns_from_the_file_as_it_is(folder: Path) -> None:
    load_dataset = pytest.importorskip("datasets").load_dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss

    table = load_dataset("json", data_files=str(folder / "st.jsonl"), split="train", cache_dir=str(folder / "cache"))
    model = SentenceTransformer(str(folder / "encoder" / "encoder"), device="cpu")
    before = model.encode(["who built the tower"])
    given = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "st"), max_steps=1, per_device_train_batch_size=6, learning_rate=1e-3, report_to="none",
        save_strategy="no", disable_tqdm=True, bf16=False,
    )  # fmt: skip
    loss = DistillKLDivLoss(model, temperature=1.0)
    state = SentenceTransformerTrainer(model=model, args=given, train_dataset=table, loss=loss).train()
    assert np.isfinite(state.training_loss)
    assert state.training_loss > 0
    assert not np.allclose(before, model.encode(["who built the tower"]))


# ---- the command line


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    return lambda *words: run(*words, capsys=capsys, monkeypatch=monkeypatch)


def test_questions_and_a_knowledge_base_become_a_checked_file(call: Any, folder: Path, words: Path) -> None:
    out = folder / "chat.jsonl"
    for by in ("kb", "small.yaml"):
        ask = [
            "synthesize",
            "export",
            str(folder / "train.jsonl"),
            "-o",
            str(out),
            "--as",
            "openai-chat",
            "--from",
            str(folder / by),
        ]
        code, told, _ = call(*ask, "-k", "2", "--prompt", "context_only", "--separate-context")
        assert code == 0
        assert f"{2 * len(read_examples(folder / 'train.jsonl'))} rows, 0 left out" in told
        meta = lines(folder / "chat.meta.jsonl")[0]
        assert len(meta["retriever"]) == 16
        assert set(meta["contexts"][0]) == {"passage_id", "title", "text", "score", "rank"}
    assert call("synthesize", "check", str(out), "--as", "openai-chat")[0] == 0
    code, told, _ = call("synthesize", "check", str(out), "--as", "openai-chat", "--strict")
    assert code == 2
    assert "length not checked" in told
    sized = ["--model", "gpt-4o", "--tokenizer", str(words), "--strict"]
    assert call("synthesize", "check", str(out), "--as", "openai-chat", *sized)[0] == 0
    code, told, _ = call("synthesize", "check", str(out), "--as", "openai-chat", "--validation", str(out), "--json")
    assert code == 2
    shared = [fault for fault in json.loads(told) if "also stands in" in fault["text"]]
    assert len(shared) == len(lines(out))
    assert shared[0]["line"] == 1


def test_points_of_a_stage_and_pairs_go_out_and_a_faulty_file_exits_with_2(call: Any, folder: Path, tmp_path: Path) -> None:
    write_points(tmp_path / "points" / "data", [point(n) for n in range(12)])  # as in a stage's folder
    assert holds_points(tmp_path / "points")
    out = str(tmp_path / "trl.jsonl")
    assert call("synthesize", "export", str(tmp_path / "points"), "-o", out, "--as", "trl", "--shape", "messages")[0] == 0
    assert call("synthesize", "check", out, "--as", "trl")[0] == 0
    pairs = written(tmp_path / "pairs.jsonl", [{"query": f"q{n}?", "chosen": "a", "rejected": "b"} for n in range(10)])
    assert call("synthesize", "export", str(pairs), "-o", str(tmp_path / "dpo.jsonl"), "--as", "openai-dpo")[0] == 0
    assert call("synthesize", "check", str(tmp_path / "dpo.jsonl"), "--as", "openai-dpo")[0] == 0
    by = ["--as", "openai-dpo", "--from", str(folder / "kb"), "-k", "2"]
    assert call("synthesize", "export", str(pairs), "-o", str(tmp_path / "found.jsonl"), *by)[0] == 0
    assert all(len(row["contexts"]) == 2 for row in lines(tmp_path / "found.meta.jsonl"))
    rows = [chat(f"question {n}?") for n in range(12)]
    bad = written(tmp_path / "bad.jsonl", [rows[0], chat(score=1), *rows[1:], turns(USER)])
    code, told, _ = call("synthesize", "check", str(bad), "--as", "openai-chat")
    assert code == 2
    assert f"{bad}:2: error: unknown key 'score'" in told
    assert f"{bad}:14: error: no assistant message" in told


def test_wrong_words_are_told_with_their_cure(call: Any, folder: Path, tmp_path: Path) -> None:
    pairs = written(tmp_path / "pairs.jsonl", [{"query": "q?", "chosen": "a", "rejected": "b"}])
    questions, out = str(folder / "train.jsonl"), str(tmp_path / "out.jsonl")
    for words, told in (
        ([questions, "-o", out, "--as", "parquet"], "--as is 'parquet'"),
        ([questions, "-o", out, "--as", "openai-chat"], "say where they are found"),
        ([questions, "-o", out, "--as", "openai-dpo"], "holds no pairs"),
        ([questions, "-o", out, "--as", "sentence-transformers", "--from", str(folder / "kb")], "no recipe says which"),
        ([str(pairs), "-o", out, "--as", "openai-chat"], "holds pairs of answers"),
        ([str(pairs), "-o", out, "--as", "openai-dpo"], "1 rows; at least 10"),
        ([str(pairs), "-o", out, "--as", "trl", "--shape", "text"], "--shape is 'text'"),
        ([str(pairs), "-o", out, "--as", "trl", "--shape", "messages"], "--shape does not apply here"),
        ([str(pairs), "-o", out, "--as", "trl", "-k", "2"], "-k does not apply here"),
        ([str(pairs), "-o", out, "--as", "trl", "--untuned"], "--untuned does not apply here"),
        ([questions, "-o", out, "--as", "openai-chat", "--target", "prob"], "--target does not apply here"),
        ([questions, "-o", out, "--as", "sentence-transformers", "--prompt", "context_only"], "--prompt does not apply here"),
        ([str(pairs), "-o", str(tmp_path / "out.json"), "--as", "trl"], "is to be a .jsonl file"),
    ):
        code, _, err = call("synthesize", "export", *words)
        assert code == 2
        assert told in " ".join(err.split()), err
        assert "hint: " in err
        assert "Traceback" not in err
    assert not (tmp_path / "out.jsonl").exists()


def test_labels_by_the_command_line(call: Any, folder: Path) -> None:
    words = [str(folder / "train.jsonl"), "-o", str(folder / "labels.jsonl"), "--as", "sentence-transformers"]
    code, told, err = call("synthesize", "export", *words, "--from", str(folder / "small.yaml"), "--limit", "4", "-k", "3")
    assert code == 0
    assert "4 rows" in told
    assert "1/400" in " ".join(err.split())
    assert all(
        0 < value < 1 for row in lines(folder / "labels.jsonl") for value in row["label"]
    )  # mean_prob, as in the lsr stage
    assert call("synthesize", "check", str(folder / "labels.jsonl"), "--as", "sentence-transformers", "--strict")[0] == 0


def test_people_are_no_generator_and_another_scorer_is_asked(call: Any, folder: Path) -> None:
    text = yaml.safe_load((folder / "small.yaml").read_text())
    text["stages"]["find"]["objective"] |= {"target": "given"}
    (folder / "given.yaml").write_text(yaml.safe_dump(text))
    words = [str(folder / "train.jsonl"), "-o", str(folder / "g.jsonl"), "--as", "sentence-transformers", "--limit", "2"]
    code, _, err = call("synthesize", "export", *words, "--from", str(folder / "given.yaml"))
    assert code == 2
    assert "grades from people" in " ".join(err.split())
    system = Parts().open(load_recipe(folder / "small.yaml"))
    points = found_points(read_examples(folder / "train.jsonl")[:2], system.retriever, k=2)
    other = open_scorer(ScorerSettings(model=str(tiny.bart(folder / "judge", seed=9))), system.generator)
    own, judged = (
        export_sentences(points, folder / f"{name}.jsonl", system, scores=folder / "judged", scorer=scorer)
        for name, scorer in (("own", None), ("other", other))
    )
    for mine, theirs in zip(lines(own.path), lines(judged.path), strict=True):
        assert mine["query"] == theirs["query"]
        assert mine["label"] != theirs["label"]


def test_titles_survive_another_rendering(tmp_path: Path) -> None:
    point = DataPoint("a", "a", "s", "", "who?", "Ada", (Context("p", "The mill.", title="Hask"),))
    points = [replace(point, query=f"who is {n}?") for n in range(10)]
    export_points(points, tmp_path / "t.jsonl", form="trl", prompt="context_only")
    assert all("Hask / The mill." in row["prompt"][0]["content"] for row in lines(tmp_path / "t.jsonl"))


# ---- LlamaIndex' question-passage pairs


def test_every_relevant_passage_of_a_pair_file_is_read(folder: Path, tmp_path: Path) -> None:
    pairs = {
        "queries": {"q1": "who built it?", "q2": "when?"}, "corpus": {"n1": "a miller", "n2": "in 1790", "n3": "by a miller"},
        "relevant_docs": {"q1": ["n1", "n3"], "q2": ["n2"]}, "mode": "text",
    }  # fmt: skip
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(pairs))
    assert [(e.id, e.query, e.relevant) for e in read_examples(path)] == [
        ("q1", "who built it?", ("n1", "n3")), ("q2", "when?", ("n2",)),
    ]  # fmt: skip
    found = read_documents([path], whole=True)
    assert [(d.id, d.text, d.whole) for d in found.documents] == [
        ("n1", "a miller", True),
        ("n2", "in 1790", True),
        ("n3", "by a miller", True),
    ]
    encoder = {"model": str(folder / "encoder" / "encoder"), "dtype": "float32"}
    made = {"path": tmp_path / "kb", "documents": [path], "chunk": None, "encoder": encoder}
    corpus = build_knowledge(KnowledgeSettings.model_validate(made)).corpus
    assert [e.relevant for e in load_examples(path, corpus)] == [("n1", "n3"), ("n2",)]
    (tmp_path / "other.json").write_text("{}")
    named = [path, tmp_path / "other.json"]
    assert [reason for _, reason in read_documents(named).skipped] == ["is no JSON of queries, corpus and relevant_docs"]
    path.write_text(json.dumps({**pairs, "relevant_docs": {"q1": ["n9"]}}))
    with pytest.raises(CorpusError, match="names 'n9', which is not in corpus"):
        read_examples(path)
    with pytest.raises(CorpusError, match="is no JSON of queries"):
        read_examples(tmp_path / "other.json")
