"""Rows of the published Self-RAG training set, one string each, as rows of parts, and back byte for byte (Asai et al. 2023).

    {"instruction": …, "input": "", "output": "[Retrieval]<paragraph>Title\\nText</paragraph>[Relevant]…[Utility:5]", …}
    ↕
    {"id", "instruction", "input", "segments": [{decision, passage: {id, title, text}, is_rel, text, is_sup, tail?}], "lead"?,
     "is_use", "metadata": {"published": {fields, order, …}}}

Here a spelling is the token, because the authors wrote it so. The output is cut at the 15 spellings and read by the one grammar
there is (`raglan.reflection.parse`). A passage's title is its first line; without a line break, or where that line is empty, it
has none (null). A row off the grammar is kept as it is, under `verbatim`, and told; training counts it and leaves it out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from raglan.artifact import fingerprint
from raglan.errors import CorpusError
from raglan.marked_prompt import LABELS
from raglan.reflection import GrammarError, Schema, Segment, parse
from raglan.text import half_character

__all__ = ["export_rows", "import_rows", "published", "unpublished"]

SCHEMA = Schema.numbered(0)
WORDS = len(SCHEMA.spellings)  # from here on an id is a piece of text
END = -1
FORMS = [(ascii_, separators) for ascii_, separators in product((True, False), ((", ", ": "), (",", ":")))]
SPELLED = re.compile("|".join(re.escape(name) for name in SCHEMA.spellings))
OURS = ("instruction", "input", "output")


def import_rows(source: Path, output: Path) -> list[tuple[int, str]]:
    """Convert a published .jsonl file. Returns the lines that are off the grammar, with what is wrong; they are kept verbatim.

    Raises:
        CorpusError: a line that is no JSON object with texts `instruction` and `output`.
    """
    seen: set[str] = set()
    off: list[tuple[int, str]] = []

    def convert(line: str, number: int) -> str:
        row, fault = unpublished(line, number, where=str(source))
        off.extend([(number, fault)] if fault else [])
        row["id"] = row["id"] if row["id"] not in seen else f"{row['id']}#{number}"
        seen.add(row["id"])
        return json.dumps(row, ensure_ascii=False) + "\n"

    _rewritten(source, output, convert)
    return off


def export_rows(source: Path, output: Path) -> None:
    """Write rows in the published form: those that were imported byte for byte as they were, others in the same way."""
    _rewritten(source, output, lambda line, number: published(_object(line, str(source), number)))


def unpublished(line: str, number: int = 1, *, where: str = "") -> tuple[dict[str, Any], str]:
    """A line of the published set as our row, and why it is off the grammar; "" where it is not.

    Raises:
        CorpusError: no JSON object with texts `instruction` and `output`.
    """
    given = _object(line, where, number)
    if not all(isinstance(given.get(name), str) for name in ("instruction", "output")):
        raise CorpusError(f"{where}, line {number} has no texts `instruction` and `output`", hint="give the published .jsonl")
    fields = {name: value for name, value in given.items() if name not in OURS}
    if not isinstance(given.get("input", ""), str):
        fields["input"] = given["input"]
    row: dict[str, Any] = {
        "id": str(given.get("id", number)), "instruction": given["instruction"],
        "input": given["input"] if isinstance(given.get("input"), str) else "",
    }  # fmt: skip
    told = {"fields": fields, "order": list(given)}
    fault = ""
    try:
        row |= _parts(given["output"])
    except GrammarError as found:
        row["verbatim"], fault = given["output"], str(found.message)
    row["metadata"] = {"published": {**told, **_form(line, given)}}
    if published(row) != line:  # numbers, escapes or keys that no writer of JSON gives back
        row["metadata"]["published"]["line"] = line
    return row, fault


def published(row: Mapping[str, Any]) -> str:
    """The line of the published form, its end included."""
    told = row.get("metadata", {}).get("published", {})
    if "line" in told:
        return str(told["line"])
    own = {"instruction": row["instruction"], "input": row.get("input") or "", "output": _output(row)}
    fields = told.get("fields") or ({} if told else {"id": row["id"]})
    made = {**own, **fields}
    order = told.get("order") or list(made)
    ascii_, separators = FORMS[told.get("form", 2)]
    text = json.dumps({name: made[name] for name in order}, ensure_ascii=ascii_, separators=separators)
    return text + str(told.get("end", "\n"))


def _parts(output: str) -> dict[str, Any]:
    """Lead, segments and IsUse of an output. Raises GrammarError."""
    ids, texts = _ids(output)
    row = parse(ids, SCHEMA, eos=END)
    if row.is_use is None:
        raise GrammarError("the row ends where an IsUse token should stand", position=len(ids))

    def text(part: tuple[int, ...]) -> str:
        return "".join(texts[word - WORDS] for word in part)

    made: dict[str, Any] = {"segments": [_segment(segment, text) for segment in row.segments], "is_use": _said(row.is_use)}
    return {**({"lead": text(row.lead)} if row.lead else {}), **made}


def _segment(segment: Segment, text: Callable[[tuple[int, ...]], str]) -> dict[str, Any]:
    passage = None
    if segment.passage is not None:
        whole = text(segment.passage)
        title, broken, rest = whole.partition("\n")
        passage = {"title": title, "text": rest} if broken and title else {"title": None, "text": whole}
        passage = {"id": fingerprint(passage), **passage}
    made = {
        "decision": segment.decision, "passage": passage, "is_rel": None if segment.is_rel is None else _said(segment.is_rel),
        "text": text(segment.text), "is_sup": None if segment.is_sup is None else _said(segment.is_sup),
    }  # fmt: skip
    return {**made, "tail": text(segment.tail)} if segment.tail else made


def _output(row: Mapping[str, Any]) -> str:
    if "verbatim" in row:
        return str(row["verbatim"])
    pieces = [row.get("lead") or ""]
    for segment in row["segments"]:
        pieces.append(_spelled("retrieve", segment["decision"]))
        passage = segment.get("passage")
        if passage is not None:
            title = "" if passage.get("title") is None else f"{passage['title']}\n"
            pieces += ["<paragraph>", title, passage["text"], "</paragraph>"]
        for role in ("is_rel", "text", "is_sup", "tail"):
            said = segment.get(role)
            pieces.append(_spelled(role, said) if said is not None and role in LABELS else said or "")
    return "".join([*pieces, "" if row.get("is_use") is None else _spelled("is_use", row["is_use"])])


def _ids(output: str) -> tuple[list[int], list[str]]:
    """An output as ids of an invented vocabulary: the 15 tokens, and behind them one for each piece of text."""
    ids: list[int] = []
    texts: list[str] = []
    at = 0
    for found in [*SPELLED.finditer(output), None]:
        piece = output[at : found.start() if found else None]
        if piece:
            ids.append(WORDS + len(texts))
            texts.append(piece)
        if found:
            ids.append(SCHEMA.identity(found.group()))
            at = found.end()
    return ids, texts


def _said(token: int) -> str | int:
    role = str(SCHEMA.role_of(token))
    return LABELS[role][SCHEMA.ids[role].index(token)]


def _spelled(role: str, said: str | int) -> str:
    return SCHEMA.strings[role][LABELS[role].index(said)]


def _form(line: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """How a line was written, as far as it is not as we would write it."""
    body = line.rstrip("\r\n")
    end = line[len(body) :]
    form = next(
        (n for n, (ascii_, marks) in enumerate(FORMS) if json.dumps(given, ensure_ascii=ascii_, separators=marks) == body), 2
    )
    return {**({"form": form} if form != 2 else {}), **({"end": end} if end != "\n" else {})}


def _object(line: str, where: str, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as fault:
        raise CorpusError(f"{where}, line {number} is not JSON: {fault}", hint="give a .jsonl file") from None
    if not isinstance(value, dict):
        raise CorpusError(f"{where}, line {number} is {type(value).__name__}, not an object", hint="give a .jsonl file")
    if (half := half_character(json.dumps(value, ensure_ascii=False))) is not None:
        raise CorpusError(f"{where}, line {number} holds {half!r}, half a character", hint="give it as valid UTF-8")
    return value


def _rewritten(source: Path, output: Path, convert: Callable[[str, int], str]) -> None:
    """A file converted line by line, whole or not at all."""
    if not source.is_file():
        raise CorpusError(f"there is no file {source}", hint="give a .jsonl file")
    output.parent.mkdir(parents=True, exist_ok=True)
    half = output.with_name(output.name + ".part")
    try:
        with open(half, "w", encoding="utf-8", newline="") as file:
            for number, line in _lines(source):
                file.write(convert(line, number))
        os.replace(half, output)
    finally:
        half.unlink(missing_ok=True)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            yield from enumerate(file, 1)
    except UnicodeDecodeError as fault:
        raise CorpusError(f"{path} is not UTF-8: {fault.reason}", hint="save it as UTF-8") from None
