"""Does a training file keep the rules of those who read it? All faults are told, each with its line.

| form | a line |
|---|---|
| `openai-chat` | {messages, tools?, parallel_tool_calls?, functions?}: a conversation that ends with what is learned |
| `openai-dpo` | {input: {messages, …}, preferred_output: [one message], non_preferred_output: [one message]} |
| `trl` | {messages}, {prompt, completion} or {prompt, chosen, rejected}, as texts or as lists of messages |
| `sentence-transformers` | {query, passage_1 … passage_K, label: [K numbers]} |
| `sft`, `chat`, `raft`, `dpo`, `retriever` | of a synthesized dataset: see `raglan.exports.rules` |

A service that meets a row longer than its model's context cuts it at its end, and that is the answer; so lengths are part of
the check, where a tokenizer is given. What no published rule demands and we do is marked `ours`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from raglan.errors import CheckpointError, CorpusError, RecipeError
from raglan.exports import rules
from raglan.exports.messages import Found, conversation, line_keys, message, tool_lists
from raglan.text import half_character, question_key

__all__ = ["FORMS", "Fault", "Form", "Lengths", "check_file", "failed", "meta_path", "shared_questions"]

Form = Literal["openai-chat", "openai-dpo", "trl", "sentence-transformers", "sft", "chat", "raft", "dpo", "retriever"]
FORMS: tuple[Form, ...] = (
    "openai-chat", "openai-dpo", "trl", "sentence-transformers", "sft", "chat", "raft", "dpo", "retriever",
)  # fmt: skip
UNMEASURED = ("sentence-transformers", "raft", "retriever")  # forms without one text that a model reads as it stands
Level = Literal["error", "warning", "unchecked"]
MAX_BYTES = 512_000_000
FEWEST, FEW = 10, 50  # rows: fewer are refused by the service; fewer teach little
LIMITS = {"gpt-3.5-turbo-0613": 4_096, "gpt-3.5": 16_385, "gpt-4o": 65_536}  # tokens of a row, by the longest name that fits
OLDER = {"preferred_completion": "preferred_output", "non_preferred_completion": "non_preferred_output"}
OUTPUTS = ("preferred_output", "non_preferred_output")
A_MESSAGE = 4  # tokens that part messages: about what chat models spend, where there is no template to ask


@dataclass(frozen=True, order=True)
class Fault:
    """What is wrong: the line, from 1 (0: the file as a whole), and whether it must be mended."""

    line: int
    level: Level
    text: str


@dataclass(frozen=True)
class Lengths:
    """A tokenizer, and how many tokens a row may have."""

    tokenizer: Any
    limit: int

    @classmethod
    def of(cls, model: str | None = None, *, tokenizer: Path | None = None) -> Lengths | None:
        """What can be known of lengths; None where it is not enough to check them.

        Args:
            model: the name of a hosted model, or a folder, which may bring the tokenizer.
            tokenizer: a folder with a tokenizer.

        Raises:
            RecipeError: a model that is neither. CheckpointError: a folder without a tokenizer.
        """
        folder = Path(model) if model is not None and Path(model).is_dir() else None
        limit = None if model is None or folder is not None else _hosted_limit(model)
        words = tokenizer or folder
        if words is None:
            return None
        opened = _open_tokenizer(words)
        if limit is None:
            limit = _own_limit(folder or words, opened)
        return None if limit is None else cls(opened, limit)

    def count(self, messages: list[Any], tools: Any = None) -> int:
        """Tokens of a conversation: by the tokenizer's chat template, else of its texts, with some for each message."""
        extra = 0 if tools is None else len(self._ids(json.dumps(tools, ensure_ascii=False)))
        if (whole := self._templated(messages)) is not None:
            return extra + len(self._ids(whole))
        texts = [text for m in messages for key, value in m.items() if key not in ("weight", "role") for text in _texts(value)]
        return extra + A_MESSAGE * len(messages) + sum(len(self._ids(text)) for text in texts)

    def _templated(self, messages: list[Any]) -> str | None:
        """The conversation as the tokenizer's own template writes it; None without one, or where it refuses these turns."""
        if not getattr(self.tokenizer, "chat_template", None) or not all(isinstance(m.get("content"), str) for m in messages):
            return None
        from jinja2 import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except TemplateError:
            return None

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])


def check_file(path: Path, form: Form, *, lengths: Lengths | None = None) -> list[Fault]:
    """All faults of a file, in the order of its lines, those of the file as a whole last.

    Raises:
        RecipeError: an unknown form. CorpusError: no such file.
    """
    if form not in FORMS:
        raise RecipeError(f"there is no form {form!r}", hint=f"one of {', '.join(FORMS)}")
    check_line = _line_check(form)
    faults: list[Fault] = []
    rows = 0
    for number, row, broken in read_lines(path):
        rows += 1
        found: list[Found] = [("error", broken)] if row is None else list(check_line(row))
        if row is not None and lengths is not None and not any(level == "error" for level, _ in found):
            found += _too_long(row, form, lengths)
        faults += [Fault(number, level, text) for level, text in found]
    if form == "retriever":
        faults = sorted([*faults, *_meta_faults(path)])
    faults += [Fault(0, level, text) for level, text in _file_faults(path, form, rows)]
    if lengths is None and form not in UNMEASURED:
        faults.append(Fault(0, "unchecked", "length not checked: name a model and give a tokenizer"))
    return faults


def failed(faults: list[Fault], *, strict: bool = False) -> bool:
    """Whether a file is refused: for any error, and under `strict` also where lengths were not checked."""
    return any(fault.level == "error" or (strict and fault.level == "unchecked") for fault in faults)


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | None, str]]:
    """(line, object, "") of each line, or (line, None, what is wrong with it). Only a line feed ends a line.

    Raises:
        CorpusError: no such file.
    """
    if not Path(path).is_file():
        raise CorpusError(f"there is no file {path}", hint="give a .jsonl file")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            row, broken = _object(line, number)
            yield number, row, broken


def meta_path(path: Path) -> Path:
    """train.jsonl → train.meta.jsonl: what the strict form has no place for, line for line."""
    return path.with_name(f"{path.name.removesuffix('.jsonl')}.meta.jsonl")


def shared_questions(train: Path, validation: Path, form: Form) -> list[Fault]:
    """A fault of `validation` for each of its questions that `train` holds too, however it is written.

    The question of a line is its `.meta.jsonl`'s, where there is one: a rendered prompt holds passages besides. A question
    that continues a dialogue is the same only after the same turns.
    """
    first: dict[str, int] = {}
    for number, question in _questions(train, form):
        first.setdefault(question, number)
    return [
        Fault(number, "error", f"the question also stands in {train.name}, line {first[question]}")
        for number, question in _questions(validation, form)
        if question in first
    ]


def _object(line: bytes, number: int) -> tuple[dict[str, Any] | None, str]:
    if number == 1 and line.startswith(b"\xef\xbb\xbf"):
        return None, "the file begins with a byte order mark"
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as fault:
        return None, f"not UTF-8: byte {fault.object[fault.start]:#04x} at byte {fault.start + 1} of the line"
    if not text.strip():
        return None, "a blank line"
    try:
        value = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as fault:
        return None, f"not JSON: {fault}"
    if not isinstance(value, dict):
        return None, f"{type(value).__name__}, not an object"
    if "\\u" in text and (half := half_character(json.dumps(value, ensure_ascii=False))) is not None:
        return None, f"holds {half!r}, half a character"
    return value, ""


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _file_faults(path: Path, form: Form, rows: int) -> Iterator[Found]:
    if not rows:
        yield "error", "the file holds no row"
    if not form.startswith("openai"):
        return
    if (size := Path(path).stat().st_size) > MAX_BYTES:
        yield "error", f"{size:,} bytes; at most {MAX_BYTES:,} are taken"
    if 0 < rows < FEWEST:
        yield "error", f"{rows} rows; at least {FEWEST} are needed"
    elif FEWEST <= rows < FEW:
        yield "warning", f"{rows} rows; fewer than {FEW} teach little"


def _meta_faults(path: Path) -> Iterator[Fault]:
    """What the lines beside a file say of its negatives, where there are any."""
    if meta_path(path).is_file():
        for number, row, _ in read_lines(meta_path(path)):
            yield from (Fault(number, level, text) for level, text in rules.meta_rules(row or {}))


def _line_check(form: Form) -> Callable[[dict[str, Any]], Iterator[Found]]:
    """The check of one line. Two forms have to look alike on all lines, so theirs remembers the first."""
    seen: dict[str, Any] = {}
    checks: dict[Form, Callable[[dict[str, Any]], Iterator[Found]]] = {
        "openai-chat": _chat, "openai-dpo": _dpo,
        "trl": partial(_trl, seen), "sentence-transformers": partial(_sentences, seen),
        "sft": rules.sft, "chat": _plain_chat, "raft": rules.raft, "dpo": rules.preference, "retriever": rules.retriever,
    }  # fmt: skip
    return checks[form]


def _chat(row: dict[str, Any]) -> Iterator[Found]:
    yield from line_keys(row, {"messages", "tools", "parallel_tool_calls", "functions"})
    yield from tool_lists(row)
    yield from conversation(row.get("messages"))
    yield from _learned(row.get("messages"))


def _plain_chat(row: dict[str, Any]) -> Iterator[Found]:
    """A conversation and nothing else."""
    yield from line_keys(row, {"messages"})
    yield from conversation(row.get("messages"))
    yield from _learned(row.get("messages"))


def _learned(messages: Any) -> Iterator[Found]:
    """Something is to be learned, and the conversation ends with it (ours: what follows it would be waste)."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return
    learned = [m.get("role") == "assistant" and not _is_zero(m.get("weight")) for m in messages]
    if not any(learned):
        yield "error", "no assistant message is to be learned: none is there, or all have weight 0"
    elif not learned[-1]:
        yield "error", "the last message must be an assistant's with a weight other than 0"


def _is_zero(weight: Any) -> bool:
    return isinstance(weight, int | float) and not isinstance(weight, bool) and weight == 0


def _dpo(row: dict[str, Any]) -> Iterator[Found]:
    for old, new in OLDER.items():
        if old in row:
            yield "error", f"`{old}` is an older name: write `{new}`"
    yield from line_keys({key: value for key, value in row.items() if key not in OLDER}, {"input", *OUTPUTS})
    asked = row.get("input")
    if not isinstance(asked, dict):
        yield "error", "`input` must be an object with `messages`"
    else:
        yield from line_keys(asked, {"messages", "tools", "parallel_tool_calls"}, where="input: ")
        yield from tool_lists(asked)
        yield from conversation(asked.get("messages"))
        yield from _ends_asked(asked.get("messages"))
    for name in OUTPUTS:
        if not any(new == name and old in row for old, new in OLDER.items()):
            yield from _one_answer(row.get(name), name)
    if row.get(OUTPUTS[0]) is not None and _said(row.get(OUTPUTS[0])) == _said(row.get(OUTPUTS[1])):
        yield "error", "the preferred and the other output are the same"


def _ends_asked(messages: Any) -> Iterator[Found]:
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
        yield "error", "input ends in an assistant turn: the two outputs are to answer it"


def _one_answer(value: Any, name: str) -> Iterator[Found]:
    if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], dict):
        yield "error", f"`{name}` must be a list of exactly one message"
        return
    if value[0].get("role") != "assistant":
        yield "error", f"`{name}`: role is {value[0].get('role')!r}; it must be assistant"
        return
    yield from message(value[0], f"`{name}`")


def _said(value: Any) -> Any:
    """What two outputs are compared by."""
    message = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else value
    if not isinstance(message, dict):
        return message.strip() if isinstance(message, str) else message
    content = message.get("content")
    return [content.strip() if isinstance(content, str) else content, message.get("tool_calls")]


TRL_SHAPES = ({"messages"}, {"prompt", "completion"}, {"prompt", "chosen", "rejected"})


def _trl(seen: dict[str, Any], row: dict[str, Any]) -> Iterator[Found]:
    shape = next((shape for shape in TRL_SHAPES if shape == set(row)), None)
    if shape is None:
        told = "; ".join(", ".join(sorted(shape)) for shape in TRL_SHAPES)
        yield "error", f"the keys are {', '.join(sorted(row)) or 'none'}; they must be one of: {told}"
        return
    if seen.setdefault("shape", shape) != shape:
        yield "error", "the keys are not those of the first line: one file, one form"
    if seen.setdefault("kinds", {key: type(row[key]) for key in shape}) != {key: type(row[key]) for key in shape}:
        yield "error", "texts where the first line has messages, or the other way round"
    for key in sorted(shape):
        yield from _turns_or_text(row[key], key)
    if "messages" in shape:
        yield from _learned(row["messages"])
    if "chosen" in shape and _said(row["chosen"]) == _said(row["rejected"]):
        yield "error", "chosen and rejected are the same"


def _turns_or_text(value: Any, key: str) -> Iterator[Found]:
    if isinstance(value, str) and key != "messages":
        if not value.strip():
            yield "error", f"`{key}` is empty"
        return
    yield from conversation(value, name=key)
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        return
    if key == "prompt" and value[-1].get("role") == "assistant":
        yield "error", "prompt ends in an assistant turn"
    if key in ("completion", "chosen", "rejected") and value[-1].get("role") != "assistant":
        yield "error", f"`{key}` must end in an assistant turn"


def _sentences(seen: dict[str, Any], row: dict[str, Any]) -> Iterator[Found]:
    passages = [key for key in row if key.startswith("passage_")]
    wanted = ["query", *(f"passage_{number}" for number in range(1, len(passages) + 1)), "label"]
    if list(row) != wanted or len(passages) < 2:
        told = ", ".join(row) or "none"
        yield "error", f"the keys are {told}; they must be query, passage_1, passage_2, …, label, in this order"
        return
    if seen.setdefault("k", len(passages)) != len(passages):
        yield "error", f"{len(passages)} passages where the first line has {seen['k']}: columns are the same on all lines"
    for key in ("query", *passages):
        if not isinstance(row[key], str) or not row[key].strip():
            yield "error", f"`{key}` must be a text that is not empty"
    label = row["label"]
    if not isinstance(label, list) or len(label) != len(passages) or not all(map(_is_number, label)):
        yield "error", f"`label` must be a list of {len(passages)} numbers, one a passage"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _too_long(row: dict[str, Any], form: Form, lengths: Lengths) -> list[Found]:
    """Tokens of the longest way through a line, against the limit."""
    longest = max((lengths.count(turns, tools) for turns, tools in _ways(row, form)), default=0)
    if longest <= lengths.limit:
        return []
    return [("error", f"{longest:,} tokens; the model takes {lengths.limit:,} and the end, which is the answer, would be cut")]


def _ways(row: Mapping[str, Any], form: Form) -> Iterator[tuple[list[Any], Any]]:
    if form in ("openai-chat", "chat"):
        yield row["messages"], row.get("tools") or row.get("functions")
    elif form == "openai-dpo":
        for name in OUTPUTS:
            yield [*row["input"]["messages"], *row[name]], row["input"].get("tools")
    elif form in ("trl", "sft", "dpo"):
        ends = [key for key in ("completion", "chosen", "rejected") if key in row]
        for key in ends or ["messages"]:
            yield [*(_as_turns(row["prompt"], "user") if ends else []), *_as_turns(row[key], "assistant")], None


def _as_turns(value: Any, role: str) -> list[Any]:
    return [{"role": role, "content": value}] if isinstance(value, str) else list(value)


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [] if value is None else [json.dumps(value, ensure_ascii=False)]


def _questions(path: Path, form: Form) -> Iterator[tuple[int, str]]:
    """(line, key) of each line that asks something."""
    beside = meta_path(path)
    source = beside if beside.is_file() else path
    for number, row, _ in read_lines(source):
        if row is None:
            continue
        said = _from_meta(row) if source is beside else _from_line(row, form)
        if said:
            yield number, question_key(said[-1], said[:-1])


def _from_meta(row: Mapping[str, Any]) -> list[str]:
    return [str(turn) for turn in (*(row.get("history") or ()), row.get("query")) if turn]


def _from_line(row: Mapping[str, Any], form: Form) -> list[str]:
    """The turns up to and with the question; what is learned, and the system's words, left out."""
    if form in UNMEASURED:
        return [str(row.get("question" if form == "raft" else "query", ""))]
    turns = row.get("messages", row.get("prompt"))
    if form == "openai-dpo" and isinstance(row.get("input"), dict):
        turns = row["input"].get("messages")
    if isinstance(turns, str):
        return [turns]
    said = [m for m in turns or () if isinstance(m, dict) and m.get("role") in ("user", "assistant")]
    while said and said[-1].get("role") == "assistant":
        said = said[:-1]
    return [m["content"] for m in said if isinstance(m.get("content"), str)]


def _hosted_limit(model: str) -> int:
    known = [name for name in LIMITS if model.startswith(name)]
    if not known:
        raise RecipeError(
            f"{model!r} is neither a folder nor a model whose context is known: {', '.join(LIMITS)}",
            hint="give a model's folder, which says its own limit",
        )
    return LIMITS[max(known, key=len)]


def _open_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise CheckpointError(
            f"{folder} holds no tokenizer: {str(fault).splitlines()[0]}", hint="give a folder with tokenizer.json"
        ) from None


def _own_limit(folder: Path, tokenizer: Any) -> int | None:
    """What a folder's configuration, else its tokenizer, says is the longest input."""
    config = folder / "config.json"
    if config.is_file():
        said = json.loads(config.read_text(encoding="utf-8")).get("max_position_embeddings")
        if isinstance(said, int) and said > 0:
            return said
    own = getattr(tokenizer, "model_max_length", None)
    return int(own) if own and own < 10**9 else None
