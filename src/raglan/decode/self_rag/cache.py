"""Candidates, written once: everything that a Self-RAG decoding read of a model, kept so that it can be decided again.

    candidates/<system>/
        rows.npz         contexts: a hash of the ids → log-probabilities of the marks, likeliest id;
                         continuations: a hash of context and limits → ids, log-probabilities, marks at the positions read
        questions.jsonl  of the short form: what was asked, each passage's candidate and the one without a passage
        trees.npz, .json of the long form: the same as trees (`trees`), for sweeps
        found.json       rows and scores of each question's passages, and of what further searches found
        tokenizer/       the model's, so that nothing else of it is opened again
        manifest.json    what it was made with

`recording` writes and replays it: live decoding itself, for every threshold, weight, aggregation and smaller K, in both forms,
and no model is asked. What was never written is not guessed: the question is `Uncached`, counted as incomplete, or filled in.
Opened is what is asked for: a sweep over trees reads neither rows nor tokenizer.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from raglan.artifact import read_manifest, write_json, write_manifest
from raglan.decode.self_rag.trees import Trees
from raglan.errors import CheckpointError, GeneratorError
from raglan.generator.base import MarkedGenerator
from raglan.quiet import quietly
from raglan.records import Answer, Marked
from raglan.reflection import Schema
from raglan.vocabulary import save_tokenizer

__all__ = ["KIND", "CandidateCache", "Replies", "Uncached", "key_of", "limits_of", "stacked", "write_keys"]

KIND = "candidates"
FINISH: tuple[Literal["eos", "stop", "length"], ...] = ("eos", "stop", "length")


Found = list[tuple[int, float]]  # row and score of each passage, best first


class Uncached(GeneratorError):
    """A context or continuation that no recorded run came to."""


@dataclass
class Replies:
    """What generators said, by hashes of what they were asked.

    Attributes:
        states: of a context: marks (M,) float32 and the likeliest id. `written`: continuations. `scored`: given ones.
    """

    states: dict[bytes, tuple[NDArray[np.float32], int]] = field(default_factory=dict)
    written: dict[bytes, Marked] = field(default_factory=dict)
    scored: dict[bytes, NDArray[np.float32]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write them as arrays."""
        states, written, scored = list(self.states.values()), list(self.written.values()), list(self.scored.values())
        rows = [_kept(marked) for marked in written]
        arrays: dict[str, Any] = {
            "state_keys": _keys(self.states), "state_marks": stacked([marks for marks, _ in states]),
            "state_best": np.array([best for _, best in states], np.int64),
            "written_keys": _keys(self.written), "lengths": np.array([len(m.ids) for m in written], np.int64),
            "ids": _joined([np.array(m.ids, np.int64) for m in written], np.int64),
            "logprobs": _joined([m.logprobs for m in written], np.float32),
            "row_counts": np.array([len(row) for row in rows], np.int64), "row_places": _joined(rows, np.int64),
            "row_marks": stacked([m.mark_logprobs[at] for m, row in zip(written, rows, strict=True) for at in row]),
            "finish": np.array([FINISH.index(m.finish) for m in written], np.int8),
            "scored_keys": _keys(self.scored), "scored_lengths": np.array([len(s) for s in scored], np.int64),
            "scored": _joined(scored, np.float32),
        }  # fmt: skip
        np.savez(path, **arrays)

    @classmethod
    def open(cls, path: Path) -> Replies:
        """Those of a file."""
        with np.load(path, allow_pickle=False) as arrays:
            rows = dict(arrays)
        said = zip(rows["state_marks"], rows["state_best"].tolist(), strict=True)
        states = dict(zip(map(bytes, rows["state_keys"]), said, strict=True))
        ends, row_ends = rows["lengths"].cumsum(), rows["row_counts"].cumsum()
        ids, logprobs = np.split(rows["ids"], ends)[:-1], np.split(rows["logprobs"], ends)[:-1]
        places, marks = np.split(rows["row_places"], row_ends)[:-1], np.split(rows["row_marks"], row_ends)[:-1]
        width = max(rows["row_marks"].shape[-1], rows["state_marks"].shape[-1])
        written = {}
        for at, key in enumerate(map(bytes, rows["written_keys"])):
            whole = np.full((len(ids[at]), width), np.nan, np.float32)
            whole[places[at]] = marks[at]
            written[key] = Marked(tuple(ids[at].tolist()), logprobs[at], whole, FINISH[rows["finish"][at]])
        scores = np.split(rows["scored"], rows["scored_lengths"].cumsum())[:-1]
        return cls(states, written, dict(zip(map(bytes, rows["scored_keys"]), scores, strict=True)))


@dataclass
class CandidateCache:
    """Candidates, and what a replay needs besides.

    Attributes:
        identity: what it was made with; another value of any of these refuses it.
        replies: what generators said; their file until they are asked for.
        questions: of the short form, one JSON object a question.
        schema, eos, exact: the vocabulary, its end token, and whether every mark came back.
        found: of each question, rows and scores of its `k` passages. `searches`: the same of further searches, by their text.
        tokenizer, positions: of the model that wrote; the tokenizer's folder until it is opened.
        trees: of the long form, what was written of each question; None where that is no arrays.
        continued: of a context, the continuation that was last written behind it; not kept on disk.
    """

    identity: Mapping[str, Any] = field(default_factory=dict)
    replies: Replies | Path = field(default_factory=Replies, repr=False)
    questions: list[dict[str, Any]] = field(default_factory=list)
    schema: Schema | None = None
    eos: int = -1
    exact: bool = True
    found: list[Found] = field(default_factory=list)
    k: int = 0
    searches: dict[str, Found] = field(default_factory=dict)
    tokenizer: Any = field(default=None, repr=False)
    positions: int | None = None
    trees: Trees | None = field(default=None, repr=False)
    continued: dict[bytes, bytes] = field(default_factory=dict, repr=False)

    @property
    def states(self) -> dict[bytes, tuple[NDArray[np.float32], int]]:
        """Of contexts; see `Replies`."""
        return self._opened().states

    @property
    def written(self) -> dict[bytes, Marked]:
        """Continuations."""
        return self._opened().written

    @property
    def scored(self) -> dict[bytes, NDArray[np.float32]]:
        """Log-probabilities of given continuations."""
        return self._opened().scored

    def _opened(self) -> Replies:
        if isinstance(self.replies, Path):
            self.replies = Replies.open(self.replies)
        return self.replies

    def save(self, folder: Path) -> None:
        """Write the artefact; one that is there stays until the new one is whole."""
        working = folder.with_name(folder.name + ".part")
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir(parents=True)
        self._opened().save(working / "rows.npz")
        with open(working / "questions.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self.questions)
        write_json(working / "found.json", {"k": self.k, "questions": self.found, "searches": self.searches})
        if self.trees is not None:
            self.trees.save(working)
        if (tokenizer := self.opened_tokenizer()) is not None:
            save_tokenizer(tokenizer, working / "tokenizer")
        counts = {"contexts": len(self.states), "continuations": len(self.written), "questions": len(self.questions)}
        assert self.schema is not None
        about = {
            "identity": dict(self.identity), "schema": self.schema.to_dict(), "eos": self.eos, "exact": self.exact,
            "positions": self.positions,
        }  # fmt: skip
        write_manifest(working, KIND, about | counts)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(working, folder)

    @classmethod
    def open(cls, folder: Path, identity: Mapping[str, Any] | None = None) -> CandidateCache:
        """The candidates of a folder.

        Args:
            identity: what they are wanted for.

        Raises:
            CheckpointError: none there, or made with another model, prompt, vocabulary, knowledge base or limit.
        """
        manifest = read_manifest(folder, KIND)
        own = manifest["identity"]
        wanted = json.loads(json.dumps(own if identity is None else dict(identity), default=str))
        for name in wanted:
            if own.get(name) != wanted[name]:
                raise CheckpointError(
                    f"{folder} was made with another {name}: {own.get(name)!r}, and now it is {wanted[name]!r}",
                    hint="candidates serve what wrote them; raglan evaluate --cache makes them anew",
                )
        cache = cls(own, folder / "rows.npz", trees=Trees.open(folder))
        cache.schema, cache.eos, cache.exact = Schema.from_dict(manifest["schema"]), manifest["eos"], manifest["exact"]
        with open(folder / "questions.jsonl", encoding="utf-8") as file:
            cache.questions = [json.loads(line) for line in file]
        told = json.loads((folder / "found.json").read_text(encoding="utf-8"))
        cache.found, cache.k, cache.searches, cache.positions = (
            told["questions"], told["k"], told["searches"], manifest["positions"]
        )
        if (folder / "tokenizer").is_dir():
            cache.tokenizer = folder / "tokenizer"
        return cache

    def opened_tokenizer(self) -> Any:
        """The tokenizer of the model that wrote; opened when a prompt is made, which arrays never do."""
        if isinstance(self.tokenizer, Path):
            with quietly():
                self.tokenizer = AutoTokenizer.from_pretrained(str(self.tokenizer))
        return self.tokenizer

    def of(self, generator: MarkedGenerator) -> None:
        """Keep what a replay needs of the generator that writes."""
        self.schema, self.eos, self.exact = generator.schema, generator.eos, generator.exact_marks
        self.tokenizer, self.positions = getattr(generator, "tokenizer", None), getattr(generator, "positions", None)

    def row(self, query: str, every: Answer, none: Answer) -> dict[str, Any]:
        """A question's row: the keys of its candidates, so that a sweep needs neither prompt nor tokenizer."""
        assert every.trace is not None
        assert none.trace is not None
        prompt = none.trace["prompt"]
        candidates = []
        for told in [*(c for c in every.trace["candidates"] if c["passage"] is not None), *none.trace["candidates"]]:
            key = self.continued.get(key_of((*prompt, *told["context"])))
            candidates.append({
                "passage": told["passage"], "rank": told["rank"], "text": told.get("text", ""),
                "key": key.hex() if key is not None else None,  # a passage that did not fit
            })  # fmt: skip
        return {"query": query, "state": key_of(prompt).hex(), "candidates": candidates}


def _kept(marked: Marked) -> NDArray[np.int64]:
    """Positions of which any mark is there."""
    return np.flatnonzero(~np.isnan(marked.mark_logprobs).all(-1)) if len(marked.ids) else np.zeros(0, np.int64)


def key_of(*parts: Iterable[int]) -> bytes:
    """A hash that names ids, in so many parts."""
    digest = blake2b(digest_size=16)
    for part in parts:
        ids = np.array(list(part), np.int64)
        digest.update(np.int64(len(ids)).tobytes() + ids.tobytes())
    return digest.digest()


def _keys(table: Mapping[bytes, Any]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(table), np.uint8).reshape(len(table), 16)


def stacked(rows: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Rows of marks (n,M), also where there are none."""
    return np.stack(rows).astype(np.float32) if rows else np.zeros((0, 0), np.float32)


def _joined(rows: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate([np.asarray(row, dtype) for row in rows]) if rows else np.zeros(0, dtype)


def limits_of(given: int | Sequence[int], count: int) -> list[int]:
    """One limit a context."""
    return [given] * count if isinstance(given, int) else list(given)


def write_keys(
    contexts: Sequence[Sequence[int]], stop_ids: Collection[int], limits: int | Sequence[int], first: Collection[int] | None
) -> list[bytes]:
    """Names of what is written behind each context."""
    how = (sorted(stop_ids), [] if first is None else [1, *sorted(first)])
    each = zip(contexts, limits_of(limits, len(contexts)), strict=True)
    return [key_of(ids, *how, [limit]) for ids, limit in each]
