"""One file as text or as rows, and what is wrong with it where it is neither: .txt, .md; .html, .pdf, .docx; .jsonl(.gz), .csv,
.parquet. What the rows mean, `raglan.documents` knows.
"""

from __future__ import annotations

import csv
import gzip
import json
import logging
import re
import warnings
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet

from raglan.errors import CorpusError, require
from raglan.text import SPACELESS, half_character

__all__ = ["CONVERTED", "TABLES", "TEXTS", "converted_text", "ending_of", "file_text", "json_lines", "table_rows"]

TABLES = (".jsonl", ".jsonl.gz", ".csv", ".parquet")
TEXTS = (".md", ".markdown", ".txt")
CONVERTED = (".html", ".htm", ".pdf", ".docx")
ENCODINGS = "set knowledge.encoding (as latin-1 or gb18030), convert the file, or set on_error: skip"
UNREADABLE = "check the file and its permissions, or set on_error: skip"
LINES = 'each line is one JSON object, as in {"id": "a", "text": "…"}'


def ending_of(path: Path) -> str:
    return ".jsonl.gz" if path.name.lower().endswith(".jsonl.gz") else path.suffix.lower()


def file_text(path: Path, encoding: str) -> str:
    try:
        return path.read_text(encoding=_marked(encoding))
    except UnicodeDecodeError as fault:
        raise _undecodable(path, encoding, fault, f"at position {fault.start}") from None
    except LookupError:
        raise _unknown(encoding) from None
    except OSError as fault:
        raise CorpusError(f"{path} cannot be read: {fault.strerror}", hint=UNREADABLE) from None


def table_rows(path: Path, ending: str, encoding: str) -> Iterator[tuple[int, dict[str, Any]]]:
    if ending in (".jsonl", ".jsonl.gz"):
        yield from json_lines(path, encoding)
    elif ending == ".csv":
        yield from _csv_rows(path, encoding)
    else:
        yield from _parquet_rows(path)


def json_lines(path: Path, encoding: str, *, cure: str = ENCODINGS) -> Iterator[tuple[int, dict[str, Any]]]:
    opened = gzip.open if path.name.endswith(".gz") else open
    number = 0
    try:
        with opened(path, "rt", encoding=_marked(encoding)) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _json_object(line, path, number)
    except UnicodeDecodeError as fault:
        raise _undecodable(path, encoding, fault, f"after line {number} ({fault.reason})", cure=cure) from None
    except LookupError:
        raise _unknown(encoding) from None
    except (OSError, EOFError, zlib.error) as fault:
        raise CorpusError(f"{path} cannot be read: {fault}", hint=UNREADABLE) from None


def _csv_rows(path: Path, encoding: str) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(2**30)
    number = 0
    try:
        with open(path, encoding=_marked(encoding), newline="") as file:
            for number, row in enumerate(csv.DictReader(file), 1):
                yield number, row
    except UnicodeDecodeError as fault:
        raise _undecodable(path, encoding, fault, f"after row {number} ({fault.reason})") from None
    except LookupError:
        raise _unknown(encoding) from None
    except (OSError, csv.Error) as fault:
        raise CorpusError(f"{path} cannot be read after row {number}: {fault}", hint=UNREADABLE) from None


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    begin = 1
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                yield from enumerate(batch.to_pylist(), begin)
                begin += batch.num_rows
    except (OSError, pyarrow.ArrowException) as fault:
        raise CorpusError(f"{path} cannot be read as .parquet: {fault}", hint=UNREADABLE) from None


def _json_object(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as fault:
        raise CorpusError(f"{path}, line {number} is not JSON: {fault}", hint=LINES) from None
    if not isinstance(value, dict):
        raise CorpusError(f"{path}, line {number} is {type(value).__name__}, not an object", hint=LINES)
    if "\\u" in line and (half := half_character(json.dumps(value, ensure_ascii=False))) is not None:
        raise CorpusError(f"{path}, line {number} holds {half!r}, half a character", hint="mend its \\u escape")
    return value


def _undecodable(path: Path, encoding: str, fault: UnicodeDecodeError, where: str, *, cure: str = ENCODINGS) -> CorpusError:
    return CorpusError(f"{path} is not {encoding}: byte {fault.object[fault.start]:#04x} {where}", hint=cure)


def _unknown(encoding: str) -> CorpusError:
    return CorpusError(f"knowledge.encoding {encoding!r} is unknown to Python", hint=ENCODINGS)


def _marked(encoding: str) -> str:
    """UTF-8 with or without the byte order mark that some programs put in front."""
    return "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding


def converted_text(path: Path) -> str:
    converter = _converter()
    logging.getLogger("pdfminer").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            text = str(converter.convert(str(path)).text_content)
    except Exception as fault:  # noqa: BLE001 - any of a dozen parsers may fail in its own way; all mean "unreadable"
        lines = str(fault).strip().splitlines() or [type(fault).__name__]
        reason = lines[-1].strip(" -")
        raise CorpusError(
            f"{path} cannot be read as {path.suffix}: {reason}", hint="repair or remove it, or set on_error: skip"
        ) from None
    return _unwrapped(text) if path.suffix.lower() == ".pdf" else text


def _unwrapped(text: str) -> str:
    """A PDF breaks lines where its page ends; paragraphs are what blank lines part."""
    joined = re.sub(rf"(?<=[{SPACELESS}])[ \t]*\n[ \t]*(?=[{SPACELESS}])", "", text)
    return re.sub(r"(?<=\S)[ \t]*\n[ \t]*(?=\S)", " ", joined)


@cache
def _converter() -> Any:
    """Just these three formats: with all of its converters markitdown reads a broken PDF as plain text."""
    markitdown = require("markitdown", "to read .html, .pdf and .docx files")
    converters = require("markitdown.converters", "to read .html, .pdf and .docx files")
    converter = markitdown.MarkItDown(enable_builtins=False, enable_plugins=False)
    for kind in (converters.HtmlConverter, converters.PdfConverter, converters.DocxConverter):
        converter.register_converter(kind())
    return converter
