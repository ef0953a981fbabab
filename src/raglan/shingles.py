"""Sets of word runs ("shingles") as flat arrays, and how much two of them share, for millions of texts at a time.

    share(a, b) = |a ∩ b| / |a|        jaccard(a, b) = |a ∩ b| / |a ∪ b|

A run is n words in a row, as `answer_words` cuts them: lower case, no punctuation, no articles, a Chinese or Japanese character
a word. A text of fewer words is one run, and a text without words has none and is like no other.

Deviation: a run is held as 64 bits of a hash, so two different runs are taken for one with a chance of 2⁻⁶⁴; among ten million
runs that any two are is less likely than 1 in 300,000. The hash is the same in every process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["Shingles", "mixed", "shared", "shingles", "text_hash", "word_hash"]

Hashes = NDArray[np.uint64]
Places = NDArray[np.int64]
GOLDEN = 0x9E3779B97F4A7C15  # 2⁶⁴ / golden ratio
PAIRS = 20_000  # compared at once: some 30 MB of questions
FULL = 2**64


@dataclass(frozen=True, slots=True)
class Shingles:
    """The runs of N texts.

    Attributes:
        values: hashes of all runs, those of text i at [starts[i], starts[i + 1]), rising, each once.
        starts: (N + 1,) places in `values`.
    """

    values: Hashes
    starts: Places

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def counts(self) -> Places:
        """(N,) runs of each text."""
        return np.diff(self.starts)

    def take(self, rows: Places) -> tuple[Places, Hashes]:
        """(which of `rows`, run) of all runs of these texts, in order."""
        counts = self.counts[rows]
        inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(np.arange(len(rows)), counts), self.values[np.repeat(self.starts[rows], counts) + inside]

    @classmethod
    def joined(cls, parts: Sequence[Shingles]) -> Shingles:
        """Texts of several batches, one after another."""
        counts = [part.counts for part in parts] or [np.zeros(0, dtype=np.int64)]
        values = [part.values for part in parts] or [np.zeros(0, dtype=np.uint64)]
        return cls(np.concatenate(values), np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64))


def shingles(texts: Iterable[Sequence[str]], n: int) -> Shingles:
    """Words of texts → their runs of n words. A batch at a time: 20,000 queries take some 10 MB."""
    words, lengths = [], []
    for text in texts:
        words += [word_hash(word) for word in text]
        lengths.append(len(text))
    flat, length = np.asarray(words, dtype=np.uint64), np.asarray(lengths, dtype=np.int64)
    counts = np.where(length > 0, np.maximum(1, length - n + 1), 0)
    owner = np.repeat(np.arange(len(length)), counts)
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = (np.cumsum(length) - length)[owner] + place
    value = np.zeros(len(owner), dtype=np.uint64)
    for step in range(n):
        there = place + step < length[owner]
        value[there] += flat[begin[there] + step] * np.uint64(pow(GOLDEN, step + 1, FULL))
    return _distinct(owner, mixed(value), len(length))


def _distinct(owner: Places, value: Hashes, texts: int) -> Shingles:
    order = np.lexsort((value, owner))
    owner, value = owner[order], value[order]
    new = np.ones(len(value), dtype=bool)
    new[1:] = (owner[1:] != owner[:-1]) | (value[1:] != value[:-1])
    starts = np.concatenate([[0], np.cumsum(np.bincount(owner[new], minlength=texts))])
    return Shingles(value[new], starts.astype(np.int64))


def shared(a: Shingles, b: Shingles, left: Places, right: Places) -> Places:
    """How many runs text left[i] of `a` has in common with text right[i] of `b`, for each i."""
    found = np.zeros(len(left), dtype=np.int64)
    for start in range(0, len(left), PAIRS):
        part = slice(start, start + PAIRS)
        found[part] = _shared(a.take(left[part]), b.take(right[part]), len(left[part]))
    return found


def _shared(a: tuple[Places, Hashes], b: tuple[Places, Hashes], pairs: int) -> Places:
    pair, value = np.concatenate([a[0], b[0]]), np.concatenate([a[1], b[1]])
    order = np.lexsort((value, pair))
    pair, value = pair[order], value[order]
    both = (pair[1:] == pair[:-1]) & (value[1:] == value[:-1])
    return np.bincount(pair[1:][both], minlength=pairs).astype(np.int64)


def mixed(value: Hashes) -> Hashes:
    """64 bits in which every bit depends on all of `value`'s (the finalizer of SplitMix64, Steele et al. 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@lru_cache(maxsize=1 << 16)
def word_hash(word: str) -> int:
    """64 bits that name a word, in every process the same."""
    return text_hash(word)


def text_hash(text: str) -> int:
    """64 bits that name a text, in every process the same."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
