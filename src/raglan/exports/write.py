"""Training files for others' trainers: `openai-chat`, `openai-dpo` and `trl`. (`sentences` writes the fourth form.)

Beside train.jsonl stands train.meta.jsonl, line for line what the strict forms have no place for: ids, contexts with score and
rank, the rendered prompt, the retriever's fingerprint. A file is checked before it appears; one with faults does not.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from raglan.errors import CorpusError, RecipeError
from raglan.exports.check import Fault, Form, Lengths, check_file, meta_path
from raglan.exports.source import Preference, cut
from raglan.recipe import QA_PROMPTS
from raglan.records import DataPoint
from raglan.text import half_character

__all__ = ["Written", "dialogue", "export_pairs", "export_points", "turn", "write_rows"]

log = logging.getLogger(__name__)
PLACES = re.compile(r"(\{question\}|\{passages\})")
Turns = list[dict[str, str]]


@dataclass(frozen=True)
class Written:
    """What was written: rows, those left out, and the warnings of the check."""

    path: Path
    rows: int
    left_out: int
    warnings: tuple[Fault, ...]


def export_points(
    points: Sequence[DataPoint], path: Path, *, form: Literal["openai-chat", "trl"], prompt: str | None = None,
    separate_context: bool | None = None, shape: Literal["messages", "prompt_completion"] = "prompt_completion",
    lengths: Lengths | None = None,
) -> Written:  # fmt: skip
    """Data points as conversations that end with the answer.

    Args:
        points: rows with an answer; raw text, which asks nothing, is left out.
        path: a .jsonl file to write.
        form: `openai-chat` lines are {messages}; `trl` ones as `shape` says.
        prompt: `context_only` or `context_first`; default each point's own, and `context_first` where it has none.
        separate_context: true: a row a passage, false: all passages of a question in one row; default as the points are.
        shape: of `trl` lines: {messages}, trained on as a whole, or {prompt, completion}, trained on the completion.
        lengths: refuse rows that are longer.

    Raises:
        RecipeError: a prompt that does not exist. CorpusError: nothing to export, or a file that would have faults.
    """
    chosen = _named(prompt)
    asking = [point for point in points if point.query.strip() and point.answer.strip()]
    if separate_context is not None:
        before = asking
        asking = cut(asking, separate=separate_context)
        chosen = chosen or (None if asking == before else "context_first")
    rows, meta = [], []
    for point in asking:
        own = point.prompt.strip() if chosen is None else ""
        turns, text = ([turn("user", own)], own) if own else _asked(point, chosen or "context_first")
        answer = [turn("assistant", point.answer)]
        whole = form == "openai-chat" or shape == "messages"
        rows.append({"messages": [*turns, *answer]} if whole else {"prompt": turns, "completion": answer})
        meta.append({"id": point.id, "example_id": point.example_id, "source": point.source, **_about(point), "prompt": text})
    return write_rows(rows, meta, path, form, lengths=lengths, left_out=len(points) - sum(map(_asks, points)))


def export_pairs(
    pairs: Sequence[Preference], path: Path, *, form: Literal["openai-dpo", "trl"], prompt: str | None = None,
    separate_context: bool | None = None, lengths: Lengths | None = None,
) -> Written:  # fmt: skip
    """Pairs of answers, the better one named. Pairs of answers that are the same are left out.

    Args:
        prompt: `context_only` or `context_first`; default each pair's own, and `context_first` where it has none.
        separate_context: true: a row a passage.

    Raises:
        RecipeError: a prompt that does not exist. CorpusError: nothing to export, or a file that would have faults.
    """
    chosen = _named(prompt)
    rows, meta, left_out = [], [], 0
    for pair in pairs:
        if pair.chosen.strip() == pair.rejected.strip():
            left_out += 1
            continue
        apart = separate_context and len(pair.contexts) > 1
        for part in [replace(pair, contexts=(c,), prompt="") for c in pair.contexts] if apart else [pair]:
            own = part.prompt.strip() if chosen is None else ""
            turns, text = ([turn("user", own)], own) if own else _asked(part, chosen or "context_first")
            better, worse = [turn("assistant", part.chosen)], [turn("assistant", part.rejected)]
            if form == "openai-dpo":
                rows.append({"input": {"messages": turns}, "preferred_output": better, "non_preferred_output": worse})
            else:
                rows.append({"prompt": turns, "chosen": better, "rejected": worse})
            meta.append({**_about(part), "prompt": text})
    return write_rows(rows, meta, path, form, lengths=lengths, left_out=left_out)


def write_rows(
    rows: Sequence[dict[str, Any]], meta: Sequence[dict[str, Any]], path: Path, form: Form, *, lengths: Lengths | None = None,
    left_out: int = 0, why: str = "raw text, or two answers that are the same", hint: str = "mend these rows first",
) -> Written:  # fmt: skip
    """Write rows and what belongs to them, if the rows keep the rules of their form; else nothing appears.

    Args:
        meta: line for line; none at all, and no file beside.
        hint: what to do about faults.

    Raises:
        CorpusError: no rows, or faults; all of them are told.
    """
    path = Path(path)
    if path.suffix != ".jsonl":
        raise RecipeError(f"{path} is to be a .jsonl file", hint=f"name it {path.stem}.jsonl")
    if not rows:
        raise CorpusError("there is nothing to export", hint="rows need a question and an answer, pairs two different answers")
    if left_out:
        log.warning("%d rows are left out: %s", left_out, why)
    texts = [[_line(line, number) for number, line in enumerate(lines, 1)] for lines in (rows, meta)]
    path.parent.mkdir(parents=True, exist_ok=True)
    places = (path, meta_path(path)) if meta else (path,)
    half = [place.with_name(place.name + ".part") for place in places]
    for place, lines in zip(half, texts, strict=False):
        with open(place, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(lines)
    faults = check_file(half[0], form, lengths=lengths)
    errors = [fault for fault in faults if fault.level == "error"]
    if errors:
        for place in half:
            place.unlink()
        told = "\n".join(f"line {fault.line}: {fault.text}" if fault.line else fault.text for fault in errors)
        raise CorpusError(f"{path} is not written, for it would break the rules of {form}:\n{told}", hint=hint)
    for place, whole in reversed(list(zip(half, places, strict=True))):  # the file itself last
        os.replace(place, whole)
    if not meta:
        meta_path(path).unlink(missing_ok=True)  # that of an earlier export, line for line of other rows
    return Written(path, len(rows), left_out, tuple(fault for fault in faults if fault.level == "warning"))


def _line(value: dict[str, Any], number: int) -> str:
    text = json.dumps(value, ensure_ascii=False)
    if (half := half_character(text)) is not None:
        raise CorpusError(f"row {number} holds {half!r}, half a character", hint="give its source as valid UTF-8")
    return text + "\n"


def _asks(point: DataPoint) -> bool:
    return bool(point.query.strip() and point.answer.strip())


def _named(prompt: str | None) -> str | None:
    if prompt is not None and prompt not in QA_PROMPTS:
        raise RecipeError(f"there is no prompt {prompt!r}", hint=f"one of {', '.join(QA_PROMPTS)}")
    return prompt


def _asked(row: DataPoint | Preference, name: str) -> tuple[Turns, str]:
    """The turns up to and with the question, and the question's own text. Without passages that is the question itself."""
    texts = [f"{context.title} / {context.text}" if context.title else context.text for context in row.contexts]
    parts = {"{question}": row.query, "{passages}": "\n\n".join(texts)}
    text = "".join(parts.get(piece, piece) for piece in PLACES.split(QA_PROMPTS[name])).strip() if texts else row.query
    return [*dialogue(row.history), turn("user", text)], text


def dialogue(history: Sequence[str]) -> Turns:
    """Earlier turns with the roles they must have had: the newest was an answer, and they took turns."""
    return [turn(("assistant", "user")[(len(history) - place) % 2 == 0], text) for place, text in enumerate(history)]


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _about(row: DataPoint | Preference) -> dict[str, Any]:
    contexts: list[dict[str, Any]] = [asdict(context) for context in row.contexts]
    return {"query": row.query, "history": list(row.history), "contexts": contexts, "retriever": row.retriever}
