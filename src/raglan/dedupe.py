"""One question of many that ask the same: exact, nearly the same words, and (with an encoder) nearly the same meaning.

    exact      equal normalised words, after the same turns
    MinHash    Jaccard index of runs of three words ≥ 0.8 (Broder 1997), found by banding and confirmed by the true index
    meaning    cosine of the embeddings ≥ 0.95, only if an encoder is given

120 permutations in 20 bands of 6 rows: two questions of index s meet in some band with 1 − (1 − s⁶)²⁰, .9977 at .8, .27 at .5.
What is confirmed is joined by union-find, so groups do not depend on the order of the file, and of a group the lowest
(cell, ordinal) stays, or the first where questions have none.

Signatures are never held whole: the six rows of one band are made from the runs, sorted, and forgotten. So a million questions
take some 350 MB. What would not fit into the machine's memory is refused with the figure before the bands begin.

Deviation: a permutation is x → a·x + b mod 2⁶⁴ with odd a, over runs that are hashed already; it is a bijection, but not drawn
from all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raglan.errors import RecipeError
from raglan.records import Example
from raglan.shingles import Hashes, Places, Shingles, mixed, shared, shingles, text_hash
from raglan.text import answer_words, question_key

__all__ = [
    "BANDS",
    "NEAR",
    "ROUNDING",
    "ROWS",
    "Duplicates",
    "Embed",
    "available_memory",
    "dedupe",
    "dedupe_examples",
    "needed_memory",
    "place",
]

Embed = Callable[[Sequence[str]], NDArray[np.float32]]
BANDS, ROWS, RUN = 20, 6, 3
NEAR = 0.8
SAME_MEANING = 0.95
ROUNDING = 1e-6  # of a cosine of float32 vectors: 19 words of 20 in common are 0.95, and come out as less or as more
SEED = 20
BATCH = 20_000  # questions cut into runs together
BLOCK = 1 << 17  # runs permuted together: a megabyte, which a core's cache holds
BASE = 150_000_000  # the interpreter and its libraries
PER_QUESTION, PER_RUN = 100, 17  # bytes: keys, order, groups; runs while their batches are joined


@dataclass(frozen=True)
class Duplicates:
    """What was found among N questions.

    Attributes:
        keeps: (N,) the question that stays for each; itself for those that stay.
        how: question that goes → `exact`, `near` or `meaning`: what tied it, directly or through others, to its group first.
    """

    keeps: Places
    how: dict[int, str]

    @property
    def kept(self) -> Places:
        """Rows that stay, rising."""
        return np.flatnonzero(self.keeps == np.arange(len(self.keeps)))


def dedupe_examples(examples: Sequence[Example], *, embed: Embed | None = None, memory: int | None = None) -> Duplicates:
    """Duplicates among examples; of a group the lowest `metadata["synth"]` (cell, ordinal) stays.

    Args:
        embed: n texts → (n,D) vectors of length 1; without it meaning is not compared.
        memory: bytes that may be used; default what the machine has free.

    Raises:
        RecipeError: it would take more memory than that.
    """
    places = [place(example, row) for row, example in enumerate(examples)]
    ranks = np.empty(len(examples), dtype=np.int64)
    ranks[sorted(range(len(examples)), key=places.__getitem__)] = np.arange(len(examples))
    asked = ((example.query, example.history) for example in examples)
    return dedupe(asked, ranks=ranks, embed=embed, memory=memory)


def place(example: Example, row: int) -> tuple[int, str, int, int]:
    """Sorts by cell, then ordinal, then place in the file; cells that are numbers as numbers."""
    synth = example.metadata.get("synth") or {}
    cell = synth.get("cell", "") if isinstance(synth, dict) else ""
    ordinal = synth.get("ordinal", 0) if isinstance(synth, dict) else 0
    return (cell, "", ordinal, row) if isinstance(cell, int) else (0, str(cell), ordinal, row)


def dedupe(
    questions: Iterable[tuple[str, Sequence[str]]],
    *,
    ranks: Places | Callable[[], Places | None] | None = None,
    embed: Embed | None = None,
    memory: int | None = None,
) -> Duplicates:
    """(query, history) of each question → what stays. The texts are not held, unless an encoder is given.

    Args:
        ranks: (N,) the lowest of a group stays; default the order given. A function is asked when all questions were read.
        embed, memory: as in `dedupe_examples`.

    Raises:
        RecipeError: it would take more memory than there is.
    """
    allowed = available_memory() if memory is None else memory
    texts: list[str] | None = [] if embed is not None else None
    keys, runs = _read(questions, allowed, texts)
    groups = _Groups(len(keys))
    first = _exact(keys, groups)
    for left, right in _bands(runs, first, groups.roots):
        groups.join(left, right, "near", lambda a, b: _alike(runs, a, b))
    if embed is not None and texts is not None:
        vectors = embed(texts)
        for left, right in _same_meaning(vectors):
            groups.join(left, right, "meaning", _surely)
    told = ranks() if callable(ranks) else ranks
    return groups.settled(np.arange(len(keys)) if told is None else told)


def _read(
    questions: Iterable[tuple[str, Sequence[str]]], allowed: int | None, texts: list[str] | None
) -> tuple[Hashes, Shingles]:
    """(a hash of each question's normalised words and turns, its runs)."""
    keys: list[Hashes] = []
    parts: list[Shingles] = []
    coming = iter(questions)
    while batch := list(islice(coming, BATCH)):
        keys.append(np.asarray([text_hash(question_key(query, history)) for query, history in batch], dtype=np.uint64))
        parts.append(shingles(_words(batch), RUN))
        if texts is not None:
            texts += ["\n".join((*history, query)) for query, history in batch]
        _check_memory(sum(map(len, keys)), sum(len(part.values) for part in parts), allowed)
    return np.concatenate(keys) if keys else np.zeros(0, dtype=np.uint64), Shingles.joined(parts)


def _words(batch: Sequence[tuple[str, Sequence[str]]]) -> Iterator[list[str]]:
    for query, history in batch:
        yield [word for turn in (*history, query) for word in answer_words(turn)]


def needed_memory(questions: int, runs: int) -> int:
    """Bytes at the peak, from counts of questions and of their runs; an encoder and its vectors come on top."""
    return BASE + PER_QUESTION * questions + PER_RUN * runs


def _check_memory(questions: int, runs: int, allowed: int | None) -> None:
    needed = needed_memory(questions, runs)
    if allowed is not None and needed > allowed:
        raise RecipeError(
            f"{questions:,} questions of {runs:,} runs of words take {needed / 1e6:,.0f} MB to compare; "
            f"{allowed / 1e6:,.0f} MB are free",
            hint="use a machine with more memory, or compare parts of the questions",
        )


def available_memory() -> int | None:
    """Bytes that a process may still take: the machine's, or its container's if that is less; None where nobody tells."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        most = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if most.isdigit():
            found.append(int(most) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError, IndexError):
        pass
    return min(found, default=None)


def _exact(keys: Hashes, groups: _Groups) -> NDArray[np.bool_]:
    """Joins equal questions; which one of each stands for all."""
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    groups.join(first[which], np.arange(len(keys)), "exact", _surely)
    stands = np.zeros(len(keys), dtype=bool)
    stands[first] = True
    return stands


def _bands(runs: Shingles, among: NDArray[np.bool_], roots: Callable[[Places], Places]) -> Iterator[tuple[Places, Places]]:
    """Pairs that agree in all rows of a band, a band after another, but for those that `roots` tells to be in one group."""
    rows = np.flatnonzero(among & (runs.counts > 0))
    if not len(rows):
        return
    numbers = np.random.default_rng(SEED).integers(0, 2**63, size=(BANDS, ROWS, 2), dtype=np.uint64)
    for band in numbers:
        key = np.zeros(len(rows), dtype=np.uint64)
        for scale, shift in band:
            key = mixed(key + _smallest(runs, scale * np.uint64(2) + np.uint64(1), shift)[rows])
        yield from _equal_pairs(key, rows, roots)


def _smallest(runs: Shingles, scale: np.uint64, shift: np.uint64) -> Hashes:
    """(N,) the smallest permuted run of each text; 0 of one without runs."""
    found = np.zeros(len(runs), dtype=np.uint64)
    filled = np.flatnonzero(runs.counts > 0)
    starts = runs.starts[filled]
    at = 0
    while at < len(filled):
        until = max(at + 1, int(np.searchsorted(starts, starts[at] + BLOCK)))
        end = runs.starts[filled[until - 1] + 1]
        values = runs.values[starts[at] : end] * scale + shift
        found[filled[at:until]] = np.minimum.reduceat(values, starts[at:until] - starts[at])
        at = until
    return found


def _equal_pairs(key: Hashes, rows: Places, roots: Callable[[Places], Places]) -> Iterator[tuple[Places, Places]]:
    """Pairs of rows of one key: neighbours first, which joins most of a group; then all that are still in different ones."""
    order = np.argsort(key, kind="stable")
    key, rows = key[order], rows[order]
    at = np.flatnonzero(key[1:] == key[:-1])
    yield rows[at], rows[at + 1]
    root = roots(rows)
    order = np.lexsort((root, key))
    key, rows, root = key[order], rows[order], root[order]
    last = np.append(key[1:] != key[:-1], True)
    beyond = _ends(last)
    at, other = np.arange(len(key)), _ends(last | np.append(root[1:] != root[:-1], True))
    while len(at := at[left := other < beyond]):
        other, beyond = other[left], beyond[left]
        yield rows[at], rows[other]
        other = other + 1


def _ends(last: NDArray[np.bool_]) -> Places:
    """For each place the one behind its block, where blocks end with `last`."""
    ends = np.flatnonzero(last) + 1
    return np.repeat(ends, np.diff(ends, prepend=0))


def _alike(runs: Shingles, left: Places, right: Places) -> NDArray[np.bool_]:
    common = shared(runs, runs, left, right)
    return np.asarray(common * 5 >= 4 * (runs.counts[left] + runs.counts[right] - common))  # NEAR without a rounding


def _surely(left: Places, _: Places) -> NDArray[np.bool_]:
    return np.ones(len(left), dtype=bool)


def _same_meaning(vectors: NDArray[np.float32], step: int = 1024) -> Iterator[tuple[Places, Places]]:
    for start in range(0, len(vectors), step):
        near = vectors[start : start + step] @ vectors[start:].T >= SAME_MEANING - ROUNDING
        left, right = np.nonzero(np.triu(near, 1))
        yield left + start, right + start


class _Groups:
    """Union-find over rows, the joining done in batches."""

    def __init__(self, count: int):
        self.parent = np.arange(count)
        self.how: dict[int, str] = {}

    def roots(self, rows: Places) -> Places:
        found = self.parent[rows]
        while not np.array_equal(upper := self.parent[found], found):
            found = upper
        return found

    def join(self, left: Places, right: Places, how: str, confirm: Callable[[Places, Places], NDArray[np.bool_]]) -> None:
        """Pairs that are not in one group yet and that are confirmed."""
        apart = self.roots(left) != self.roots(right)
        left, right = left[apart], right[apart]
        sure = confirm(left, right)
        for a, b in zip(left[sure].tolist(), right[sure].tolist(), strict=True):
            self._unite(a, b)
            self.how.setdefault(a, how)
            self.how.setdefault(b, how)

    def _unite(self, a: int, b: int) -> None:
        a, b = self._root(a), self._root(b)
        self.parent[max(a, b)] = min(a, b)

    def _root(self, row: int) -> int:
        while (upper := int(self.parent[row])) != row:
            self.parent[row] = row = int(self.parent[upper])
        return row

    def settled(self, ranks: Places) -> Duplicates:
        roots = self.roots(np.arange(len(self.parent)))
        order = np.lexsort((ranks, roots))
        starts = np.flatnonzero(np.diff(roots[order], prepend=-1))
        lowest = order[starts]
        keeps = np.empty(len(roots), dtype=np.int64)
        keeps[order] = np.repeat(lowest, np.diff(np.append(starts, len(roots))))
        gone = np.flatnonzero(keeps != np.arange(len(keeps)))
        return Duplicates(keeps, {row: self.how[row] for row in gone.tolist()})
