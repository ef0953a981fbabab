"""Training files for others: every planted fault is caught with its line, and what is exported has none."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from raglan.corpus import Corpus
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
    holds_pairs,
    holds_points,
    read_pairs,
    shared_questions,
)
from raglan.exports.sentences import raw_label
from raglan.knowledge import KnowledgeBase, build_knowledge, passage_text
from raglan.objective import LsrObjective  # noqa: F401 - models register when it is imported
from raglan.recipe import QA_PROMPTS, PromptSettings, load_recipe
from raglan.records import Context, DataPoint
from raglan.train import finished_parts
from raglan.train import train as train_stages
from test_cli import run
from test_kill import small_recipe

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
    "messages among texts": ({key: [USER, BOT][:n] for key, n in (("prompt", 1), ("chosen", 2), ("rejected", 2))}, "texts where"),
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
        ("openai-chat", SFT_FAULTS), ("openai-dpo", DPO_FAULTS), ("trl", TRL_FAULTS), ("sentence-transformers", SENTENCE_FAULTS),
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
    "not JSON": (b'{"messages": \n', "not JSON"), "no object": (b"[1]\n", "list, not an object"), "blank": (b"\n", "a blank line"),
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
        {"role": "tool", "content": "a mill", "tool_call_id": "c1"}, {**BOT, "weight": 1}, tools=[TOOL], parallel_tool_calls=False,
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
        "answer": f"answer {number}", "contexts": found, "prompt": f"Background: …\n\nQ: question {number}?\nA:", "retriever": "abc",
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
    assert meta[3]["contexts"][1] == {"passage_id": "p3.2", "text": "text 2 of 3", "score": 0.5, "rank": 2}
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
    assert [("text 1 of 0" in row["messages"][2]["content"], "text 2 of 0" in row["messages"][2]["content"]) for row in apart[:2]] == [
        (True, False), (False, True),
    ]  # fmt: skip
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
        export_points(long, tmp_path / "long.jsonl", form="openai-chat", lengths=Lengths.of("gpt-3.5-turbo-0613", tokenizer=words))
    assert not list(tmp_path.glob("*"))


def test_pairs_become_preferences(tmp_path: Path) -> None:
    source = written(tmp_path / "pairs.jsonl", [
        {"query": f"question {n}?", "chosen": "a miller", "rejected": "a baker", "contexts": ["text", {"text": "other", "score": 1}]}
        for n in range(10)
    ] + [{"query": "same?", "preferred": "yes", "rejected": "yes "}, {"query": "and?", "preferred": "b", "rejected": "c", "history": ["a", "b"]}])  # fmt: skip
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
    with pytest.raises(CorpusError, match="line 2: `rejected` is ''"):
        read_pairs(written(tmp_path / "bad.jsonl", [{"query": "a", "chosen": "b", "rejected": "c"}, {"query": "a", "chosen": "b", "rejected": ""}]))


def test_trl_reads_them_by_the_columns_it_knows(tmp_path: Path) -> None:
    """A data set of columns, its conversations in the model's own template: the prompt is the head of the whole."""
    from datasets import load_dataset

    words = tiny.tokenizer()
    words.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
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
    return point(
        draw(st.integers(0, 4)), contexts=0, query=draw(letters), answer=draw(letters), prompt=draw(letters | st.just("")),
        history=tuple(draw(st.lists(letters, max_size=3))),
    ) if not found else point(0, query=draw(letters), answer=draw(letters)).__class__(
        "r", f"e{draw(st.integers(0, 9))}", "s", "", draw(letters), draw(letters), found, draw(letters | st.just("")),
    )  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(any_point(), min_size=10, max_size=14), st.sampled_from([None, *QA_PROMPTS]), st.sampled_from([None, True, False]),
    st.sampled_from(["openai-chat", "trl"]), st.sampled_from(["messages", "prompt_completion"]),
)  # fmt: skip
def test_exports_always_pass(points: list[DataPoint], prompt: Any, separate: Any, form: Any, shape: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.jsonl"
        try:
            done = export_points(points, path, form=form, prompt=prompt, separate_context=separate, shape=shape)
        except CorpusError as fault:  # joined rows may be too few, and nothing else is wrong with any
            assert separate is False and "at least 10 are needed" in fault.message  # noqa: PT018
            return
        assert not failed(check_file(path, form))
        assert len(lines(path)) == len(lines(path.with_name("train.meta.jsonl"))) == done.rows


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(letters, letters, letters, passages), min_size=10, max_size=14), st.sampled_from(["openai-dpo", "trl"]))
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
