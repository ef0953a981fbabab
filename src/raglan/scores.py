"""The table of language-model scores: each pair scored once, in batches of like length, kept on disk, resumable.

    scores/
        00000.bin …     append-only shards, a block for each batch that was scored
        pass.json       while a pass runs: what was asked for, and how many rows there were before
        manifest.json   written last: everything that was asked for is there

    block   RGS1 | n | total | crc32 of the body | crc32 of these four        little-endian uint32
    body    n keys of 16 bytes | n lengths T, uint32 | total values, float32

A row is (key, log p(y_t | prompt, y_<t) for t = 1 … T with the end token last). The key names everything that these numbers
depend on (weights with adapter, precision, tokenizer, prompt with its limit, passages, question, turns, answer) and nothing
else: target, τ, γ, direction, K, rank and whether the end token counts are the readers' business and cost no call.

Blocks are written whole and synced, so a kill costs at most the batch in hand; a torn tail is ignored. A pass that goes on
makes the batches that it would have made, so the table is the same to the bit. In memory there is an index of 40 bytes a row;
values stay on disk, mapped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from raglan.artifact import MANIFEST, fingerprint, locked, write_json, write_manifest
from raglan.errors import CheckpointError
from raglan.generator import EndpointScorer, HFGenerator, Scorer, open_generator
from raglan.generator.trees import begins_alike
from raglan.progress import counting
from raglan.prompt import Rendered
from raglan.recipe import GeneratorSettings, ScorerSettings
from raglan.records import Passage

__all__ = ["Pair", "Plan", "ScoreTable", "open_scorer"]

log = logging.getLogger(__name__)
KIND = "scores"
MAGIC = b"RGS1"
HEADER = struct.Struct("<4sIIII")
KEY = np.dtype("S16")
SHARD = 1 << 28  # bytes after which the next shard begins
WINDOW = 4096  # prompts that are rendered, and so held, at once
GATHERED = 1 << 16  # rows whose values are held at once


@dataclass(frozen=True, slots=True)
class Pair:
    """A question with its passages and turns, and the answer whose likelihood is asked."""

    query: str
    passages: tuple[Passage, ...]
    answer: str
    history: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What a pass would do: rows asked for (each once), those known, those to score, and the latter's prompt and answer
    tokens."""

    wanted: int
    on_disk: int
    to_score: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.wanted:,} rows wanted, {self.on_disk:,} on disk, {self.to_score:,} to score ({self.tokens:,} tokens)"


class ScoreTable:
    """Token log-probabilities of pairs under one scorer. `calls` counts the rows that the language model was asked for.

    Raises:
        CheckpointError: `folder` is a file.
    """

    def __init__(self, folder: Path, scorer: Scorer):
        self.folder, self.scorer = Path(folder), scorer
        if self.folder.is_file():
            raise CheckpointError(f"{self.folder} is a file, and a table of scores is a folder", hint="remove or rename it")
        self.calls = 0
        self._name = _identity(scorer)
        self._index = _Index.read(self.folder)

    def complete(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Score what is not in the table yet; returns the pairs' keys (n,), with which they are read.

        Processes that want to fill the same table wait for one another, and find what the first one scored.

        Raises:
            GeneratorError: an answer without a token, or too long. RecipeError: a question that does not fit.
        """
        keys, sizes = self._named(pairs)
        wanted, first = np.unique(keys, return_index=True)
        if self._index.has(wanted).all() and (self.folder / MANIFEST).is_file():
            return keys
        with _alone(self.folder):
            self._index = _Index.read(self.folder)  # another process may have filled it meanwhile
            if self._index.has(wanted).all() and (self.folder / MANIFEST).is_file():
                return keys
            places = self._left(wanted, first, self._begin(wanted))
            log.info("language-model scores: %d wanted, %d to compute", len(wanted), self._missing(keys[places]))
            self._score(pairs, keys, self._ordered(pairs, keys, sizes, places))
            self._end(len(wanted))
        return keys

    def plan(self, pairs: Sequence[Pair]) -> Plan:
        """What `complete` would do. Prompts are rendered, the language model is not asked."""
        keys, _ = self._named(pairs)
        wanted, first = np.unique(keys, return_index=True)
        places = self._left(wanted, first, len(self._index))
        windows = [places[start : start + WINDOW] for start in range(0, len(places), WINDOW)]
        tokens = sum(sum(self._rendered(pairs, window)[1]) for window in windows)
        return Plan(len(wanted), len(wanted) - len(places), len(places), tokens)

    def sums(self, keys: np.ndarray, *, score_eos: bool | np.ndarray = True) -> tuple[np.ndarray, np.ndarray]:
        """Σ_t log p(y_t | ·) and T of rows in the table, (n,) float32 and (n,) int64.

        Args:
            score_eos: whether the end token counts, in Σ and in T; one for all or (n,) of them.
        """
        counted = np.broadcast_to(np.asarray(score_eos, dtype=bool), keys.shape)
        sums, lengths = np.zeros(len(keys), np.float32), np.zeros(len(keys), np.int64)
        for start in range(0, len(keys), GATHERED):
            part = slice(start, start + GATHERED)
            values, own = self._index.values(keys[part])
            begins = np.cumsum(own) - own
            total = np.add.reduceat(values.astype(np.float64), begins)
            ends = values[begins + own - 1]
            sums[part] = np.where(counted[part], total, total - ends)
            lengths[part] = own - ~counted[part]
        return sums, lengths

    def token_logprobs(self, keys: np.ndarray, *, score_eos: bool | np.ndarray = True) -> list[np.ndarray]:
        """log p(y_t | prompt, y_<t) of rows in the table, (T,) float32 each, the end token last where it counts."""
        if not len(keys):
            return []
        values, lengths = self._index.values(keys)
        counted = np.broadcast_to(np.asarray(score_eos, dtype=bool), keys.shape)
        each = np.split(values, np.cumsum(lengths)[:-1])
        return [own if ends else own[:-1] for own, ends in zip(each, counted, strict=True)]

    def _named(self, pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
        """Keys (n,), and how many characters there are to read (n,)."""
        keys, sizes = np.zeros(len(pairs), KEY), np.zeros(len(pairs), np.int64)
        for place, pair in enumerate(pairs):
            texts = [[passage.title, passage.text] for passage in pair.passages]
            made_of = json.dumps([self._name, texts, pair.query, pair.history, pair.answer], ensure_ascii=False)
            keys[place] = hashlib.blake2b(made_of.encode(), digest_size=16).digest()
            sizes[place] = len(made_of)
        return keys, sizes

    def _missing(self, keys: np.ndarray) -> int:
        return int((~self._index.has(keys)).sum())

    def _left(self, wanted: np.ndarray, first: np.ndarray, before: int) -> np.ndarray:
        """Places of what this pass is for: what was not among the first `before` rows."""
        return first[~self._index.has(wanted, before)]

    def _ordered(self, pairs: Sequence[Pair], keys: np.ndarray, sizes: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Longest first. Where a scorer computes once what rows begin with, pairs with the same passages stand together, those
        with the longest first."""
        once = len({pairs[int(place)].passages for place in places}) == len(places)
        if once or not self.scorer.shares_beginnings:
            return places[np.lexsort((keys[places], -sizes[places]))]
        best: dict[tuple[Passage, ...], tuple[int, bytes]] = {}  # of each group its first pair's place in the order
        rank = [(-int(sizes[place]), bytes(keys[place])) for place in places]
        for place, own in zip(places, rank, strict=True):
            passages = pairs[int(place)].passages
            best[passages] = min(best.get(passages, own), own)
        return places[sorted(range(len(places)), key=lambda at: (best[pairs[int(places[at])].passages], rank[at]))]

    def _begin(self, wanted: np.ndarray) -> int:
        """How many rows there were when the pass for these keys began: now, unless it was interrupted."""
        name = fingerprint([hashlib.sha256(wanted.tobytes()).hexdigest(), self.scorer.batch_tokens])
        path = self.folder / "pass.json"
        begun = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if begun.get("wanted") == name:
            return int(begun["rows"])
        (self.folder / MANIFEST).unlink(missing_ok=True)
        write_json(path, {"wanted": name, "rows": len(self._index)})
        return len(self._index)

    def _score(self, pairs: Sequence[Pair], keys: np.ndarray, places: np.ndarray) -> None:
        """Score pairs in the order given, skipping the batches of an interrupted pass."""
        with counting(len(places), "scoring") as done, _Writer(self.folder) as writer:
            for start in range(0, len(places), WINDOW):
                window = places[start : start + WINDOW]
                if self._missing(keys[window]):
                    for batch, prompts in self._batches(pairs, window):
                        self._score_batch(pairs, keys, batch, prompts, writer)
                        done(len(batch))
                else:
                    done(len(window))
        self._index = _Index.read(self.folder)

    def _score_batch(
        self, pairs: Sequence[Pair], keys: np.ndarray, places: np.ndarray, prompts: Sequence[Rendered], writer: _Writer
    ) -> None:
        if not self._missing(keys[places]):
            return
        values = self.scorer.token_logprobs(prompts, [pairs[int(place)].answer for place in places])
        self.calls += len(places)
        writer.append(keys[places], values)

    def _batches(self, pairs: Sequence[Pair], places: np.ndarray) -> Iterator[tuple[np.ndarray, list[Rendered]]]:
        """Places with their prompts, each batch of at most `batch_tokens` tokens: padded to the longest, or, where a scorer
        computes once what rows begin with, without what a row shares with the one before it."""
        prompts, lengths = self._rendered(pairs, places)
        shared = self.scorer.shares_beginnings
        order = list(range(len(places))) if shared else sorted(range(len(places)), key=lambda at: -lengths[at])
        while order:
            most = self._most(prompts, lengths, order) if shared else self.scorer.batch_tokens // lengths[order[0]]
            batch, order = order[: max(1, most)], order[max(1, most) :]
            yield places[batch], [prompts[at] for at in batch]

    def _most(self, prompts: Sequence[Rendered], lengths: Sequence[int], order: Sequence[int]) -> int:
        """How many of the first rows cost no more than `batch_tokens`."""
        room = self.scorer.batch_tokens
        for count, at in enumerate(order):
            before = prompts[order[count - 1]].ids if count else ()
            room -= lengths[at] - begins_alike(prompts[at].ids, before)
            if room < 0:
                return count
        return len(order)

    def _rendered(self, pairs: Sequence[Pair], places: np.ndarray) -> tuple[list[Rendered], list[int]]:
        """Prompts, and how many tokens each has with its answer."""
        prompts, lengths = [], []
        for pair in (pairs[int(place)] for place in places):
            prompt = self.scorer.prompt.render(pair.query, pair.passages, history=pair.history)
            row = self.scorer.row(prompt, pair.answer)
            prompts.append(prompt)
            lengths.append(len(row["input_ids"]) + len(row["labels"]))
        return prompts, lengths

    def _end(self, wanted: int) -> None:
        (self.folder / "pass.json").unlink(missing_ok=True)
        write_manifest(self.folder, KIND, {"scorer": self._name, "wanted": wanted, "rows": len(self._index)})


def open_scorer(settings: ScorerSettings | None, generator: HFGenerator) -> Scorer:
    """Who says how likely answers are: the system's own generator, another model run here, or one on a server.

    Raises:
        CheckpointError: a model or tokenizer that cannot be loaded. GeneratorError: a server's key that is not set.
    """
    if settings is None:
        return generator
    prompt = generator.prompt.settings
    scorer: Scorer
    if settings.endpoint is not None:
        scorer = EndpointScorer(settings, prompt)
    else:
        shared = settings.model_dump(include={"model", "dtype", "batch_tokens", "head_chunk"})
        scorer = open_generator(GeneratorSettings(**shared), prompt)
    scorer.prompt.question_tokenizer = generator.prompt.question_tokenizer
    return scorer


def _identity(scorer: Scorer) -> str:
    """Names all that scores depend on beside the pair: the scorer, its prompt's limit, and how it is shown questions."""
    prompt = scorer.prompt
    spelling = prompt.question_tokenizer if prompt.settings.question_form == "query_decoded" else None
    words = None if spelling is None else sorted(spelling.get_vocab().items())
    return fingerprint([scorer.fingerprint, prompt.budget, words])


class _Index:
    """Where each key's values are: sorted keys with number, shard, first value and length of their rows."""

    def __init__(self, files: list[Path], blocks: list[tuple[int, int, np.ndarray, np.ndarray]]):
        self.maps = [np.memmap(path, "<f4", mode="r", shape=(path.stat().st_size // 4,)) for path in files]
        keys = np.concatenate([np.zeros(0, KEY), *(keys for _, _, keys, _ in blocks)])
        shards = [np.full(len(keys), shard, np.int32) for shard, _, keys, _ in blocks]
        lengths = [lengths.astype(np.int32) for *_, lengths in blocks]
        starts = [at + np.cumsum(own, dtype=np.int64) - own for (_, at, _, _), own in zip(blocks, lengths, strict=True)]
        self.order = np.argsort(keys, kind="stable")  # of rows with one key the first counts
        self.keys = keys[self.order]
        self.shard = np.concatenate([np.zeros(0, np.int32), *shards])[self.order]
        self.start = np.concatenate([np.zeros(0, np.int64), *starts])[self.order]
        self.length = np.concatenate([np.zeros(0, np.int32), *lengths])[self.order]

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def read(cls, folder: Path) -> _Index:
        files = sorted(path for path in folder.glob("*.bin") if path.stat().st_size >= HEADER.size)
        return cls(files, [(number, *block) for number, path in enumerate(files) for block in _blocks(path)])

    def has(self, keys: np.ndarray, before: int | None = None) -> np.ndarray:
        """(n,) bool: which keys have a row, among the first `before` ones if that is said."""
        at, found = self._at(keys)
        return found if before is None or not len(self) else found & (self.order[at] < before)

    def values(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All values of the keys' rows, one after the other, (Σ T,) float32, and T (n,)."""
        at, found = self._at(keys)
        if not found.all():
            raise KeyError(f"{int((~found).sum())} of {len(keys)} rows are not in the table")
        own = self.length[at].astype(np.int64) if len(keys) else np.zeros(0, np.int64)
        begins = np.cumsum(own) - own
        gathered = np.empty(int(own.sum()), np.float32)
        for shard in np.unique(self.shard[at]) if len(keys) else ():
            mine = self.shard[at] == shard
            within = np.arange(int(own[mine].sum())) - np.repeat(np.cumsum(own[mine]) - own[mine], own[mine])
            gathered[np.repeat(begins[mine], own[mine]) + within] = self.maps[shard][
                np.repeat(self.start[at][mine], own[mine]) + within
            ]
        return gathered, own

    def _at(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not len(self):
            return np.zeros(len(keys), np.int64), np.zeros(len(keys), bool)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self) - 1)
        return at, self.keys[at] == keys


def _blocks(path: Path) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Of every whole block where its values begin, counted in float32, its keys and its lengths."""
    with open(path, "rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    at = 0
    while at + HEADER.size <= len(data):
        magic, rows, total, body_sum, own_sum = HEADER.unpack(data[at : at + HEADER.size])
        begin = at + HEADER.size
        at = begin + 20 * rows + 4 * total
        if magic != MAGIC or own_sum != zlib.crc32(data[begin - HEADER.size : begin - 4]):
            log.warning("%s is damaged at byte %d; the rows behind it are scored again", path, begin - HEADER.size)
            return
        if at > len(data):
            break
        body = data[begin:at]
        if zlib.crc32(body) != body_sum:
            log.warning("%s is damaged at byte %d; %d rows are scored again", path, begin, rows)
            continue
        lengths = np.frombuffer(body[16 * rows : 20 * rows], "<u4").copy()
        yield (begin + 20 * rows) // 4, np.frombuffer(body[: 16 * rows], KEY).copy(), lengths
    if at != len(data):
        log.info("%s: its last block was interrupted and is ignored", path)


class _Writer:
    """Appends blocks to shards of its own; files of earlier processes are never touched."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.file: IO[bytes] | None = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.file is not None:
            self.file.close()

    def append(self, keys: np.ndarray, values: Sequence[np.ndarray]) -> None:
        """Write one block and wait until the disk has it."""
        lengths = np.array([len(own) for own in values], "<u4")
        body = keys.tobytes() + lengths.tobytes() + np.concatenate(values).astype("<f4").tobytes()
        begin = HEADER.pack(MAGIC, len(keys), int(lengths.sum()), zlib.crc32(body), 0)[:-4]
        file = self._open()
        file.write(begin + struct.pack("<I", zlib.crc32(begin)) + body)
        file.flush()
        os.fsync(file.fileno())

    def _open(self) -> IO[bytes]:
        if self.file is not None and self.file.tell() >= SHARD:
            self.file.close()
            self.file = None
        if self.file is None:
            last = max((int(path.stem) for path in self.folder.glob("*.bin")), default=-1)
            self.file = open(self.folder / f"{last + 1:05d}.bin", "xb")  # noqa: SIM115 - closed by __exit__
        return self.file


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as file:
        if not locked(file.fileno()):
            log.info("another process fills %s: waiting for it", folder)
            locked(file.fileno(), wait=True)
        yield
