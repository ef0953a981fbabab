"""What is exported: data points that training kept, questions with passages found for them now, and pairs of answers."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raglan.artifact import fingerprint
from raglan.datapoints import POINTS
from raglan.errors import CorpusError
from raglan.exports.check import read_lines
from raglan.records import Context, DataPoint, Example, Hit
from raglan.retriever import Retriever
from raglan.text import check_query

__all__ = ["Preference", "cut", "found_points", "holds_pairs", "holds_points", "points_at", "read_pairs", "with_passages"]

log = logging.getLogger(__name__)
DPO = {"input", "preferred_output", "non_preferred_output"}
PAIR = 'each line is {"query": "…", "chosen": "…", "rejected": "…"}, with contexts and history where there are any'


@dataclass(frozen=True, slots=True)
class Preference:
    """A question with two answers, of which people, or a model, liked one better."""

    query: str
    chosen: str
    rejected: str
    contexts: tuple[Context, ...] = ()
    history: tuple[str, ...] = ()
    prompt: str = ""
    retriever: str = ""


def holds_points(path: Path) -> bool:
    """Whether data points are there: in a stage's folder or its data/, or in a file whose first line is one."""
    return (points_at(path) / POINTS).is_file() or _first_keys(path) >= {"query", "answer", "contexts"}


def points_at(path: Path) -> Path:
    """Where a stage keeps its data points, if it is a stage's folder; else the path itself."""
    return path / "data" if (path / "data" / POINTS).is_file() else path


def holds_pairs(path: Path) -> bool:
    """Whether a file's first line is a pair of answers."""
    keys = _first_keys(path)
    return keys >= DPO or ("rejected" in keys and bool(keys & {"chosen", "preferred"}))


def read_pairs(path: Path) -> list[Preference]:
    """Pairs from a .jsonl file of {query, chosen (or preferred), rejected, contexts?, history?}, or of `openai-dpo` lines.

    Contexts are texts, or objects {text, passage_id?, score?, rank?}.

    Raises:
        CorpusError: no such file, or a line that is no pair; it is named.
    """
    pairs = []
    for number, row, broken in read_lines(path):
        if row is None:
            raise CorpusError(f"{path}, line {number}: {broken}", hint=PAIR)
        try:
            pairs.append(_pair(_plain(row) if set(row) >= DPO else row))
        except CorpusError as fault:
            raise CorpusError(f"{path}, line {number}: {fault.message}", hint=fault.hint or PAIR) from None
    if not pairs:
        raise CorpusError(f"{path} holds no pair", hint=PAIR)
    return pairs


def found_points(examples: Sequence[Example], retriever: Retriever, *, k: int, name: str = "questions") -> list[DataPoint]:
    """A data point a question with its first answer and the best k passages. They have no prompt yet.

    Questions without an answer are left out, and that is logged.

    Raises:
        CorpusError: no question has an answer. RecipeError: k larger than the corpus.
    """
    answered = [example for example in examples if example.answers]
    if not answered:
        raise CorpusError("no question has an answer to be learned", hint="give questions with `answers`")
    if len(answered) < len(examples):
        log.warning("%d of %d questions have no answer and are left out", len(examples) - len(answered), len(examples))
    texts = retriever.search_texts([e.query for e in answered], [e.history for e in answered])
    hits = retriever.retrieve(texts, k)
    who = retriever.fingerprint
    return [
        DataPoint(
            id=example.id, example_id=example.id, source=name, split="", query=example.query, answer=example.answers[0],
            contexts=tuple(_context(hit) for hit in found), retriever=who, history=example.history,
        )
        for example, found in zip(answered, hits, strict=True)
    ]  # fmt: skip


def with_passages(pairs: Sequence[Preference], retriever: Retriever, *, k: int) -> list[Preference]:
    """The pairs, those without passages with the best k of their questions. Raises RecipeError for a k above the corpus."""
    bare = [pair for pair in pairs if not pair.contexts]
    hits = iter(retriever.retrieve(retriever.search_texts([p.query for p in bare], [p.history for p in bare]), k))
    name = retriever.fingerprint
    return [
        pair if pair.contexts else replace(pair, contexts=tuple(map(_context, next(hits))), retriever=name) for pair in pairs
    ]


def cut(points: Sequence[DataPoint], *, separate: bool) -> list[DataPoint]:
    """The points with one passage a row, or with all passages of a question in one row; their prompts are to be made anew.

    Joined rows are those of one example with one answer; they stand where its first stood, passages in the order of rank.
    """
    if separate:
        return [part for point in points for part in _separate(point)]
    together: dict[tuple[str, str, str], DataPoint] = {}
    for point in points:
        key = (point.source, point.example_id, point.answer)
        first = together.setdefault(key, point)
        known = {context.passage_id for context in first.contexts}
        new = tuple(context for context in point.contexts if context.passage_id not in known)
        contexts = tuple(sorted(first.contexts + new, key=lambda context: context.rank))
        together[key] = replace(first, contexts=contexts)
    return list(together.values())


def _separate(point: DataPoint) -> list[DataPoint]:
    if len(point.contexts) < 2:
        return [point]
    return [replace(point, id=f"{point.id}#{number}", contexts=(context,)) for number, context in enumerate(point.contexts, 1)]


def _context(hit: Hit) -> Context:
    passage = hit.passage
    return Context(passage.id, passage.text, hit.score, hit.rank, passage.title)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """An `openai-dpo` line as a pair: the last message asks, those before it are the dialogue."""
    try:
        said = [message["content"] for message in row["input"]["messages"] if message["role"] in ("user", "assistant")]
        chosen, rejected = (row[name][0]["content"] for name in ("preferred_output", "non_preferred_output"))
    except (KeyError, IndexError, TypeError):
        raise CorpusError("it is no preference of two answers") from None
    return {"query": said[-1] if said else None, "history": said[:-1], "chosen": chosen, "rejected": rejected}


def _pair(row: dict[str, Any]) -> Preference:
    chosen = row.get("chosen", row.get("preferred"))
    texts = {"query": row.get("query"), "chosen": chosen, "rejected": row.get("rejected")}
    for name, value in texts.items():
        if not isinstance(value, str) or not value.strip():
            raise CorpusError(f"`{name}` is {value!r}; it must be a text that is not empty")
    check_query(str(row["query"]))
    contexts, history = row.get("contexts") or [], row.get("history") or []
    if not isinstance(contexts, list) or not all(_is_context(item) for item in contexts):
        raise CorpusError(f"`contexts` is {json.dumps(contexts)[:80]}; it must be a list of texts or of objects with `text`")
    if not isinstance(history, list) or not all(isinstance(turn, str) and turn.strip() for turn in history):
        raise CorpusError("`history` must be a list of texts")
    return Preference(
        **{name: str(value) for name, value in texts.items()},
        contexts=tuple(_given(item, number) for number, item in enumerate(contexts, 1)), history=tuple(history),
        prompt=str(row.get("prompt") or ""), retriever=str(row.get("retriever") or ""),
    )  # fmt: skip


def _is_context(item: Any) -> bool:
    text = item.get("text") if isinstance(item, dict) else item
    return isinstance(text, str) and bool(text.strip())


def _given(item: Any, number: int) -> Context:
    if isinstance(item, str):
        return Context(fingerprint(item), item, None, number)
    score = item.get("score")
    return Context(
        str(item.get("passage_id") or item.get("id") or fingerprint(item["text"])), item["text"],
        None if score is None else float(score), int(item.get("rank") or number), str(item.get("title") or ""),
    )  # fmt: skip


def _first_keys(path: Path) -> set[str]:
    if not path.is_file() or path.suffix != ".jsonl":
        return set()
    row = next((row for _, row, _ in read_lines(path)), None)
    return set(row or ())
