"""From a file of Self-RAG rows to training rows of ids (Asai et al. 2023, arXiv 2310.11511, §3.2).

A line is {id, instruction, input?, segments: [{decision, passage: {id, title, text} | null, is_rel, text, is_sup, tail?}],
lead?, is_use, only_judged?, metadata}, as `raglan critique` writes it and `raglan rows import` converts it. Learned is
everything behind the prompt but the passages, each between its own markups: of three passages the text behind the first is
learned like the text behind the last. (The authors' code masks from the first markup to the last.) Of a row that says
`only_judged` the text is read and its judgements are learned, so that a wrong answer teaches what a wrong answer is, and not
to give it.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raglan.documents import read_objects
from raglan.errors import CorpusError
from raglan.generator import HFGenerator
from raglan.marked_prompt import GROUPS, MarkedRow, RowTooLong
from raglan.packing import check_packing, pack_rows
from raglan.progress import track
from raglan.recipe import SelfRagData
from raglan.records import Example
from raglan.reflection import stands

__all__ = ["MarkedRows", "asked_in", "marked_rows", "read_marked_rows"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MarkedRows:
    """Rows or packs of them, held-out rows, and what the stage's manifest is to say of them."""

    rows: Sequence[Any]
    held_out: Sequence[Any]
    figures: dict[str, Any]


def read_marked_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, in order.

    Raises:
        CorpusError: a file that cannot be read, an id that occurs twice, or a line without `instruction` or `segments`.
    """
    rows = [_checked(row, path, line) for line, row in read_objects(path)]
    if not rows:
        raise CorpusError(f"{path} holds no row", hint="one JSON object a line, as raglan critique writes them")
    twice = [identity for identity, count in Counter(row["id"] for row in rows).items() if count > 1]
    if twice:
        raise CorpusError(f"{path}: row id {twice[0]!r} occurs twice", hint="give each row its own id")
    return rows


def asked_in(path: Path) -> list[Example]:
    """The rows as questions with answers, which is what is compared with the questions that are measured."""
    return [
        Example(row["id"], row["instruction"], ("".join(segment["text"] or "" for segment in row["segments"]),))
        for row in read_marked_rows(path)
        if "verbatim" not in row
    ]


def marked_rows(data: SelfRagData, generator: HFGenerator, *, seed: int) -> MarkedRows:
    """Rows for the `answer` objective, in the file's order.

    Raises:
        CorpusError: a row off the grammar, or not one row that fits. CheckpointError: a vocabulary without reflection tokens.
        GeneratorError: packs for a model that cannot learn them.
    """
    rows = read_marked_rows(data.path)
    if data.limit is not None and data.limit < len(rows):
        kept = set(random.Random(seed).sample(range(len(rows)), data.limit))
        rows = [row for place, row in enumerate(rows) if place in kept]
    made, figures = _made(rows, data, generator)
    if not made:
        raise CorpusError(f"{data.path}: no row fits into {_room(data, generator)} tokens", hint="raise data.max_length")
    if data.released:
        log.warning("data.released: %s learns what the authors' code learns, for comparison only", ", ".join(data.released))
    held_out = _made(read_marked_rows(data.dev), data, generator)[0] if data.dev is not None else []
    packed: Sequence[Any] = made
    if data.packing == "fit":
        check_packing(generator)
        packed, figures["fill"] = pack_rows(made, _room(data, generator))
    return MarkedRows(packed, held_out, figures)


def _made(rows: Sequence[dict[str, Any]], data: SelfRagData, generator: HFGenerator) -> tuple[list[Any], dict[str, Any]]:
    counts: Counter[str] = Counter(rows=len(rows))
    tokens: Counter[str] = Counter()
    made = []
    for row in _told(rows, data, generator, counts):
        counts["segments_lost"] += row.lost
        counts["rows_cut"] += not row.ended
        counts["passages_cut"] += row.cut
        tokens.update(GROUPS[group] for group, ok in zip(row.groups, row.learned, strict=True) if ok)
        made.append(_fields(row, generator))
    left = {name: counts[name] for name in ("verbatim", "too_long") if counts[name]}
    if left:
        log.warning("%d of %d rows are left out: %s", sum(left.values()), len(rows), left)
    if counts["rows_cut"]:
        room = _room(data, generator)
        log.info("%d rows exceed %d tokens and lose their end, IsUse and end token with it", counts["rows_cut"], room)
    kept = {name: counts[name] for name in ("rows", "verbatim", "too_long", "rows_cut", "segments_lost", "passages_cut")}
    return made, {**kept, "learned": len(made), "tokens": dict(sorted(tokens.items()))}


def _told(
    rows: Sequence[dict[str, Any]], data: SelfRagData, generator: HFGenerator, counts: Counter[str]
) -> Iterator[MarkedRow]:  # fmt: skip
    for row in track(rows, "rendering"):
        if "verbatim" in row:  # off the grammar, as the converter found it
            counts["verbatim"] += 1
            continue
        try:
            yield generator.marked_prompt.row_ids(
                row, limit=_room(data, generator), passage_max=data.passage_max, markups=data.markups, released=data.released
            )
        except RowTooLong:
            counts["too_long"] += 1


def _room(data: SelfRagData, generator: HFGenerator) -> int:
    return min(data.max_length, generator.positions or data.max_length)


def _fields(row: MarkedRow, generator: HFGenerator) -> dict[str, list[int]]:
    return {
        "input_ids": row.input_ids, "labels": row.labels, "learned": [int(ok) for ok in row.learned], "groups": row.groups,
        "stands": stands(row.labels, generator.schema),
    }  # fmt: skip


def _checked(row: dict[str, Any], path: Path, line: int) -> dict[str, Any]:
    whole = isinstance(row.get("instruction"), str) and (isinstance(row.get("segments"), list) or "verbatim" in row)
    if not whole:
        raise CorpusError(
            f"{path}, line {line} is no row of a Self-RAG generator: it needs `instruction` and `segments`",
            hint="raglan critique writes such rows; raglan rows import converts published ones",
        )
    return {**row, "id": str(row.get("id", line))}
