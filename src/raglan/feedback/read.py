"""Exports read into judgements: `SOURCES` is the table of tools, one module each.

A file is JSON (a list, an object of lists, or {"data": […]} as paged answers are), JSON lines, CSV, TSV or Parquet.
"""

from __future__ import annotations

import ast
import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from raglan.artifact import fingerprint
from raglan.errors import CorpusError, RecipeError
from raglan.feedback import argilla, label_studio, langfuse, phoenix
from raglan.feedback.judgement import KINDS, Fields, Judgement
from raglan.text import half_character

__all__ = ["SOURCES", "read_feedback"]

Rows = list[dict[str, Any]]


def read_feedback(
    path: Path, source: str, *, fields: Fields | None = None, beside: Sequence[Path] = (), project: str = ""
) -> list[Judgement]:
    """All statements of an export, used or set aside.

    Args:
        source: the tool, a key of `SOURCES`.
        fields: what the export's names mean; default the usual names.
        beside: files that hold what the export only points to (Langfuse traces, Phoenix spans and retrieved documents).
        project: goes in front of each origin, where two projects of a tool count from 1 both.

    Raises:
        CorpusError: a file that is missing or not of a shape that the tool writes. RecipeError: no such tool.
    """
    if source not in SOURCES:
        raise RecipeError(f"--from {source!r} is unknown; known are {', '.join(SOURCES)}")
    rows = [{key: _there(value) for key, value in row.items()} for file in (path, *beside) for row in load(file)]
    try:
        found = list(SOURCES[source](rows, fields or Fields.of()))
    except (AttributeError, KeyError, TypeError, ValueError) as fault:
        raise CorpusError(
            f"{path} is not what {source} exports: {type(fault).__name__} {fault}", hint="check --from, and see docs/concepts"
        ) from fault
    front = f"{project}:" if project else ""
    return [replace(one, origin=f"{front}{one.origin}") for one in found]


def _there(value: Any) -> Any:
    """Tables of numbers have NaN where a cell is empty, at any depth."""
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, dict):
        return {key: _there(inner) for key, inner in value.items()}
    return [_there(inner) for inner in value] if isinstance(value, list) else value


def _own(rows: Rows, _: Fields) -> Iterator[Judgement]:
    """Raglan's own: `Judgement.row` a line."""
    known = Judgement.__dataclass_fields__
    for row in rows:
        if row.get("kind") not in (*KINDS, "") or "value" not in row:
            raise ValueError(f"a line needs `kind` ({', '.join(KINDS)}) and `value`, and holds {', '.join(row)}")
        given = {key: value for key, value in row.items() if key in known}
        given["history"] = tuple(given.get("history") or ())
        if given["kind"] in ("relevance", "rating") and not given.get("aside"):
            given["value"] = float(given["value"])
        yield Judgement(**{"origin": f"raglan:{fingerprint(row)}", **given})


SOURCES: dict[str, Callable[[Rows, Fields], Iterator[Judgement]]] = {
    "argilla": argilla.judgements,
    "label-studio": label_studio.judgements,
    "phoenix": phoenix.judgements,
    "langfuse": langfuse.judgements,
    "raglan": _own,
}


def load(path: Path) -> Rows:
    """The rows of a file. Raises CorpusError."""
    if not path.is_file():
        raise CorpusError(f"there is no file {path}", hint="give the file that the tool exported")
    if path.suffix.lower() == ".parquet":
        try:
            return list(pyarrow.parquet.read_table(path).to_pylist())
        except (OSError, pyarrow.ArrowException) as fault:
            raise CorpusError(f"{path} cannot be read as .parquet: {fault}") from None
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as fault:
        raise CorpusError(f"{path} is not UTF-8: byte {fault.start}", hint="export it once more, or convert it") from None
    if path.suffix.lower() in (".csv", ".tsv"):
        return _table(text, "\t" if path.suffix.lower() == ".tsv" else ",")
    return _json(text, path)


def _table(text: str, separator: str) -> Rows:
    csv.field_size_limit(2**30)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
    return [{key: _cell(value) for key, value in row.items() if key is not None} for row in rows]


def _cell(text: Any) -> Any:
    """A list or an object that was written into a cell, as JSON or as Python spells it; anything else stays text."""
    if not isinstance(text, str) or text[:1] not in ("[", "{"):
        return text
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return text


def _json(text: str, path: Path) -> Rows:
    try:
        value = json.loads(text)
    except ValueError:
        value = [_line(line, path, number) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    except RecursionError:
        raise CorpusError(f"{path} is nested too deep to be an export") from None
    rows = list(_rows(value))
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise CorpusError(f"{path} holds no records", hint="an export is a list of objects, or one object a line")
    if (half := half_character(json.dumps(rows, ensure_ascii=False))) is not None:
        raise CorpusError(f"{path} holds {half!r}, half a character", hint="mend its \\u escape")
    return rows


def _line(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as fault:
        raise CorpusError(f"{path}, line {number} is not JSON: {fault}", hint="is it the whole file?") from None


def _rows(value: Any) -> Iterator[Any]:
    """A list's items; of an object its lists of objects, its columns, its records by id, or itself."""
    if isinstance(value, list):
        yield from value
        return
    if not isinstance(value, Mapping):
        return
    lists = {key: items for key, items in value.items() if isinstance(items, list)}
    if isinstance(value.get("data"), list):
        yield from value["data"]
    elif lists and all(isinstance(item, Mapping) for items in lists.values() for item in items) and not _is_record(value):
        yield from (item for items in lists.values() for item in items)
    elif lists and len(lists) == len(value) and len({len(items) for items in lists.values()}) == 1:
        yield from (dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True))
    elif value and all(isinstance(item, Mapping) and "id" in item for item in value.values()):
        yield from value.values()
    else:
        yield dict(value)


def _is_record(value: Mapping[str, Any]) -> bool:
    return any(key in value for key in ("id", "span_id", "context", "annotations", "fields"))
