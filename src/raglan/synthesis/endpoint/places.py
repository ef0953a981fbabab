"""Which brainstorm an attempt draws its job from, and which documents it reads: settled by the plan, not by who comes first.

    from scratch    one call a (topic, family of tasks, genre, language):  rank + ordinal · cells there = draw · jobs + place
    from a corpus   attempts visit the documents of their language in a shuffled order, all once before any twice:
                    visit = rank + ordinal · cells there;
                    one call for the titles of `jobs` visits that follow each other, and a family of tasks

A cell reads documents of its own language; a cross-lingual one, which asks in the other, reads by its seed, or in the one
language that the corpus has. Deviation: a document is Chinese if Chinese letters are more than a third of the first of its
passages that has letters, else it counts as English, so that corpora of other languages can be asked about.

So no job of a brainstorm is used twice while it has others, a cell that is tried again gets another job and other documents,
and an attempt's calls depend on the plan and its own number alone.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from raglan.corpus import Corpus
from raglan.errors import RecipeError
from raglan.records import Passage
from raglan.synthesis.plan import SCRATCH, Cell
from raglan.synthesis.writing import Job, Shelf
from raglan.text import SPACELESS, content_terms

__all__ = ["Library", "Place", "Places", "written_in"]

RARE = 12  # passages that a linking word may stand in, at most
LANGUAGES = {"en": "English", "zh": "Chinese"}
HAN = re.compile(f"[{SPACELESS}]")


@dataclass(frozen=True, slots=True)
class Place:
    """An attempt's place: the brainstorm's family and draw (from scratch) or block of visits (from a corpus), and which job."""

    family: str
    draw: int
    job: int
    visit: int = -1  # none from scratch
    read: str = ""  # the language of the documents that are visited


class Places:
    """The places of all attempts at a plan's cells. Memory: a number a cell.

    Args:
        read: in which language a cell's documents are.
        first: see `Shelf`.
    """

    def __init__(
        self, cells: Sequence[Cell], family: Callable[[str], str], *, jobs: int, read: Callable[[Cell], str] | None = None,
        first: int = 0,
    ):  # fmt: skip
        self.jobs, self.first, self._family = jobs, first, family
        self._read = read or (lambda cell: cell.language)
        self._ranks: dict[int, int] = {}
        self._sizes: Counter[tuple[str, ...]] = Counter()
        self._shared: Counter[tuple[object, ...]] = Counter()
        self.visits: Counter[str] = Counter()  # of each language's documents, in the first round
        for cell in cells:
            if cell.source == SCRATCH:
                group = self._group(cell)
                self._ranks[cell.number] = self._sizes[group]
                self._sizes[group] += 1
        own = (cell for cell in cells if cell.source != SCRATCH)
        for cell in sorted(own, key=lambda cell: (family(cell.task), cell.number)):
            language = self._read(cell)
            self._ranks[cell.number] = self.visits[language]
            self.visits[language] += 1
        for cell in cells:
            self._shared[self._call(Job(cell))] += 1

    def of(self, job: Job) -> Place:
        """Raises RecipeError: a cell that is not of the plan."""
        cell = job.cell
        if cell.number not in self._ranks:
            raise RecipeError(f"cell {cell.number} is not of the plan that the teacher was given")
        family, rank = self._family(cell.task), self._ranks[cell.number]
        if cell.source != SCRATCH:
            read = self._read(cell)
            visit = rank + job.ordinal * self.visits[read]
            return Place(family, visit // self.jobs, visit % self.jobs, visit, read)
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
            return place.family, place.draw, place.read, cell.language
        return (*self._group(cell), place.draw)


class Library:
    """The documents of a corpus by language, in the order in which they are visited, and passages that belong together."""

    def __init__(self, corpus: Corpus, *, seed: int, shelf: Shelf | None = None):
        self.corpus, self.shelf = corpus, shelf or Shelf()
        self._languages: dict[str, str] = {}
        open_to: dict[str, None] = {}
        for passage in corpus:
            if not self._languages.get(passage.document):
                self._languages[passage.document] = written_in(passage.text)
            if self.shelf.visits(passage.document or passage.id):
                open_to.setdefault(passage.document)
        if not open_to:
            raise RecipeError("no document is left to ask about", hint="lower synthesis.reserve.n, or add documents")
        documents = list(open_to)
        random.Random(seed).shuffle(documents)
        self.order = {one: [name for name in documents if self._language(name) == one] for one in LANGUAGES}

    def read(self, cell: Cell) -> str:
        """The language of the documents that a cell is written over."""
        if cell.language in LANGUAGES:
            return cell.language
        both = [language for language in LANGUAGES if self.order[language]]
        return both[cell.seed % len(both)] if both else "en"

    def check(self, visits: Mapping[str, int], *, most: int | None = None) -> None:
        """Refuse visits that cannot be made.

        Args:
            visits: how many the plan makes in its first round, by language.
            most: visits that one document may have.

        Raises:
            RecipeError: no document in a language, or more visits than `most` allows.
        """
        for language, count in visits.items():
            there, name = len(self.order[language]), LANGUAGES[language]
            if count and not there:
                raise RecipeError(
                    f"{count} examples are to rest on {name} documents, and none of the {len(self._languages)} is {name}",
                    hint=f"leave {language} out of synthesis.languages, write more from scratch, or add {name} documents",
                )
            if most is not None and count > most * there:
                raise RecipeError(
                    f"{count} examples need more than {most} visits to each of {there} {name} documents",
                    hint="raise synthesis.writing.per_document, write more from scratch, or plan fewer examples",
                )

    def visited(self, visit: int, language: str) -> Passage:
        """The passage of a visit to a language's documents: the document's first at the first, its next at the next."""
        order = self.order[language]
        rows = self.corpus.rows_of_document(order[visit % len(order)])
        return self.corpus[rows[visit // len(order) % len(rows)]]

    def titles(self, block: int, jobs: int, language: str) -> list[str]:
        """What the visits of a block read, a line each."""
        found = (self.visited(visit, language) for visit in range(block * jobs, (block + 1) * jobs))
        return list(dict.fromkeys(_title(passage) for passage in found))

    def _language(self, document: str) -> str:
        return self._languages[document] or "en"

    def linked(self, passage: Passage) -> Passage | None:
        """The passage of another document that shares most rare words with it, weighted by rarity; else one beside it.

        Both are of one language, as far as documents are.
        """
        row, closed, language = self.corpus.row(passage.id), self.shelf.closed, self._language(passage.document)
        scores: dict[int, float] = defaultdict(float)
        for term in set(_terms(passage)):
            rows = self._rare.get(term, ())
            for other in rows:
                scores[other] += 1 / math.log2(1 + len(rows))
        found = ((-score, other, self.corpus[other].document) for other, score in scores.items())
        others = [
            (score, other) for score, other, name in found
            if name != passage.document and name not in closed and self._language(name) == language
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


def written_in(text: str) -> str:
    """zh or en; nothing where there is no letter."""
    letters = [letter for letter in text if letter.isalpha()]
    if not letters:
        return ""
    return "zh" if sum(bool(HAN.match(letter)) for letter in letters) > len(letters) / 3 else "en"


def _terms(passage: Passage) -> Iterable[str]:
    return (term for term in content_terms(f"{passage.title}\n{passage.text}") if len(term) > 1)


def _title(passage: Passage) -> str:
    return passage.title.strip() or " ".join(passage.text.split())[:80]
