"""Which brainstorm an attempt draws its job from, and which documents it reads: settled by the plan, not by who comes first.

    from scratch    one call a (topic, family of tasks, genre, language):  rank + ordinal · cells there = draw · jobs + place
    from a corpus   attempts visit documents in a shuffled order, all once before any twice:  visit = rank + ordinal · cells;
                    one call for the titles of `jobs` visits that follow each other, and a family of tasks

So no job of a brainstorm is used twice while it has others, a cell that is tried again gets another job and other documents,
and an attempt's calls depend on the plan and its own number alone.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from raglan.corpus import Corpus
from raglan.errors import RecipeError
from raglan.records import Passage
from raglan.synthesis.plan import SCRATCH, Cell
from raglan.synthesis.writing import Job, Shelf
from raglan.text import content_terms

__all__ = ["Library", "Place", "Places"]

RARE = 12  # passages that a linking word may stand in, at most


@dataclass(frozen=True, slots=True)
class Place:
    """An attempt's place: the brainstorm's family and draw (from scratch) or block of visits (from a corpus), and which job."""

    family: str
    draw: int
    job: int
    visit: int = -1  # none from scratch


class Places:
    """The places of all attempts at a plan's cells. Memory: a number a cell. `first`: see `Shelf`."""

    def __init__(self, cells: Sequence[Cell], family: Callable[[str], str], *, jobs: int, first: int = 0):
        self.jobs, self.first, self._family = jobs, first, family
        self._ranks: dict[int, int] = {}
        self._sizes: Counter[tuple[str, ...]] = Counter()
        self._shared: Counter[tuple[object, ...]] = Counter()
        read = [cell for cell in cells if cell.source != SCRATCH]
        self.visits = len(read)
        for cell in cells:
            if cell.source == SCRATCH:
                group = self._group(cell)
                self._ranks[cell.number] = self._sizes[group]
                self._sizes[group] += 1
        for rank, cell in enumerate(sorted(read, key=lambda cell: (family(cell.task), cell.number))):
            self._ranks[cell.number] = rank
        for cell in cells:
            self._shared[self._call(Job(cell))] += 1

    def of(self, job: Job) -> Place:
        """Raises RecipeError: a cell that is not of the plan."""
        cell = job.cell
        if cell.number not in self._ranks:
            raise RecipeError(f"cell {cell.number} is not of the plan that the teacher was given")
        family, rank = self._family(cell.task), self._ranks[cell.number]
        if cell.source != SCRATCH:
            visit = rank + job.ordinal * self.visits
            return Place(family, visit // self.jobs, visit % self.jobs, visit)
        draw, place = divmod(rank + job.ordinal * self._sizes[self._group(cell)], self.jobs)
        return Place(family, self.first + draw, place)

    def shared(self, job: Job) -> int:
        """How many of the plan's cells draw from the same brainstorm, in their first attempts."""
        return max(1, self._shared[self._call(job)])

    def calls(self) -> int:
        """Brainstorms that the plan's first attempts take."""
        return len(self._shared)

    def _group(self, cell: Cell) -> tuple[str, ...]:
        return cell.topic, self._family(cell.task), cell.genre, cell.language

    def _call(self, job: Job) -> tuple[object, ...]:
        place, cell = self.of(job), job.cell
        if cell.source != SCRATCH:
            return place.family, place.draw, cell.language
        return (*self._group(cell), place.draw)


class Library:
    """The documents of a corpus in the order in which they are visited, and passages that belong together.

    Args:
        most: visits that one document may have.
        visits: how many the plan makes in its first round.
        shelf: which documents are visited, and linked to.

    Raises:
        RecipeError: the plan needs more visits than `most` allows, or no document is open to it.
    """

    def __init__(self, corpus: Corpus, *, seed: int, visits: int, most: int | None = None, shelf: Shelf | None = None):
        self.corpus, self.shelf = corpus, shelf or Shelf()
        documents: dict[str, None] = {}
        for passage in corpus:
            if self.shelf.visits(passage.document or passage.id):
                documents.setdefault(passage.document)
        self.order = list(documents)
        if not self.order:
            raise RecipeError("no document is left to ask about", hint="lower synthesis.reserve.n, or add documents")
        random.Random(seed).shuffle(self.order)
        if most is not None and visits > most * len(self.order):
            raise RecipeError(
                f"{visits} examples need more than {most} visits to each of {len(self.order)} documents",
                hint="raise synthesis.writing.per_document, write more from scratch, or plan fewer examples",
            )

    def visited(self, visit: int) -> Passage:
        """The passage of a visit: the document's first at the first, its next at the next."""
        rows = self.corpus.rows_of_document(self.order[visit % len(self.order)])
        return self.corpus[rows[visit // len(self.order) % len(rows)]]

    def titles(self, block: int, jobs: int) -> list[str]:
        """What the visits of a block read, a line each."""
        found = (self.visited(visit) for visit in range(block * jobs, (block + 1) * jobs))
        return list(dict.fromkeys(_title(passage) for passage in found))

    def linked(self, passage: Passage) -> Passage | None:
        """The passage of another document that shares most rare words with it, weighted by rarity; else one beside it."""
        row, closed = self.corpus.row(passage.id), self.shelf.closed
        scores: dict[int, float] = defaultdict(float)
        for term in set(_terms(passage)):
            rows = self._rare.get(term, ())
            for other in rows:
                scores[other] += 1 / math.log2(1 + len(rows))
        others = [
            (-score, other) for other, score in scores.items()
            if (document := self.corpus[other].document) != passage.document and document not in closed
        ]  # fmt: skip
        if others:
            return self.corpus[min(others)[1]]
        beside = [other for other in self.corpus.rows_of_document(passage.document) if other != row]
        return self.corpus[min(beside, key=lambda other: abs(other - (row or 0)))] if beside else None

    @cached_property
    def _rare(self) -> dict[str, list[int]]:
        """Words that stand in two to `RARE` passages, with these; those that turn out common are let go on the way."""
        found: dict[str, list[int]] = {}
        common: set[str] = set()
        for row, passage in enumerate(self.corpus):
            for term in set(_terms(passage)) - common:
                rows = found.setdefault(term, [])
                rows.append(row)
                if len(rows) > RARE:
                    common.add(term)
                    del found[term]
        return {term: rows for term, rows in found.items() if len(rows) > 1}


def _terms(passage: Passage) -> Iterable[str]:
    return (term for term in content_terms(f"{passage.title}\n{passage.text}") if len(term) > 1)


def _title(passage: Passage) -> str:
    return passage.title.strip() or " ".join(passage.text.split())[:80]
