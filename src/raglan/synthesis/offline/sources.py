"""What the offline teacher writes from: documents by language, their passages cut into facts, and names that passages share.

    fact    a sentence of a passage with one span that can be asked for
    link    two passages of different documents with a name in common that few passages hold
    visit   which document a cell is written from: in the order of the plan, the one visited least so far that has what the
            cell needs. So all are visited once before any is visited twice, as far as they can serve

Passages are analysed when they are first needed; what a job gets depends on the plan and the job alone.
"""

from __future__ import annotations

import hashlib
import heapq
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from raglan.perturb import Frequencies
from raglan.records import Passage
from raglan.synthesis.offline.spans import Span, language_of, names, spans
from raglan.synthesis.writing import Shelf
from raglan.text import content_terms, sentences

__all__ = ["Fact", "Link", "Source", "subject"]

SHORTEST, LONGEST = 6, 60  # content terms of a sentence
RARE = 6  # passages, in which a shared name may stand at most
TRIES = 300  # documents that are looked at for one job
OPEN = re.compile(r"^[\W_]*(?:[A-Z0-9]|[\u3400-\u9fff《「“])")
MARKED = re.compile(r"\[\s*\d|【\s*\d|##|<ANSWER>|\|")


@dataclass(frozen=True, slots=True)
class Sentence:
    """A whole sentence of a passage, with its content terms and spans."""

    text: str
    terms: tuple[str, ...]
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Fact:
    passage: Passage
    sentence: Sentence
    span: Span


@dataclass(frozen=True, slots=True)
class Link:
    """Two passages, each with a sentence that holds the name."""

    name: str
    first: tuple[Passage, Sentence]
    second: tuple[Passage, Sentence]


def subject(passage: Passage) -> str:
    """What a passage is about, as its title says: the first heading."""
    return re.split(r" > |\n", passage.title.strip())[0].strip()


@dataclass
class Source:
    """A corpus, or any sequence of passages.

    Attributes:
        corpus: the passages.
        seed: settles the order of documents.
        shelf: which documents are visited, and linked to.
    """

    corpus: Sequence[Passage]
    seed: int = 0
    shelf: Shelf = field(default_factory=Shelf)
    _sentences: dict[int, list[Sentence]] = field(default_factory=dict)

    @cached_property
    def documents(self) -> dict[str, list[tuple[int, ...]]]:
        """Language → the rows of each of its documents, in a drawn order."""
        rows: dict[str, list[int]] = {}
        told: dict[str, str] = {}
        for row, passage in enumerate(self.corpus):
            name = passage.document or passage.id
            rows.setdefault(name, []).append(row)
            if not told.get(name):
                told[name] = language_of(passage.text)
        found: dict[str, list[tuple[int, ...]]] = {"en": [], "zh": []}
        for name in sorted(rows, key=lambda name: hashlib.sha256(f"{self.seed}:{name}".encode()).digest()):
            if told[name] in found and self.shelf.visits(name):
                found[told[name]].append(tuple(rows[name]))
        return found

    @cached_property
    def frequencies(self) -> Frequencies:
        return Frequencies.of(self.corpus)

    def sentences(self, row: int) -> list[Sentence]:
        """A passage's whole sentences of a usual length, without marks that an answer must not hold."""
        if row not in self._sentences:
            passage = self.corpus[row]
            language = language_of(passage.text)
            self._sentences[row] = list(self._cut(passage, language)) if language else []
        return self._sentences[row]

    def _cut(self, passage: Passage, language: str) -> Iterator[Sentence]:
        for text in sentences(passage.text):
            whole = OPEN.match(text) and text.rstrip('”"’」』）)')[-1:] in (".", "!", "?", "。", "！", "？")
            if not whole or MARKED.search(text) or "\n" in text or text not in passage.text:
                continue
            terms = tuple(content_terms(text))
            if SHORTEST <= len(terms) <= LONGEST:
                yield Sentence(text, terms, tuple(spans(text, language, rarity=self._rarity, within=passage.text)))

    def _rarity(self, term: str) -> float:
        return self.frequencies.idf(term)

    def facts(self, row: int, kinds: Iterable[str]) -> Iterator[Fact]:
        """What can be asked of a passage; a span that its subject tells already is no answer."""
        wanted, passage = set(kinds), self.corpus[row]
        told = passage.title.lower()
        for sentence in self.sentences(row):
            for span in sentence.spans:
                if span.kind in wanted and span.text.lower() not in told:
                    yield Fact(passage, sentence, span)

    @cached_property
    def links(self) -> dict[int, list[Link]]:
        """Row → links to passages of other documents. Reads all passages."""
        held: dict[str, dict[int, Sentence]] = {}
        for row in range(len(self.corpus)):
            passage = self.corpus[row]
            if (passage.document or passage.id) in self.shelf.closed:
                continue
            language = language_of(passage.text)
            for sentence in self.sentences(row):
                for name in names(sentence.text, language):
                    held.setdefault(name, {}).setdefault(row, sentence)
        found: dict[int, list[Link]] = {}
        for name in sorted(held):
            rows = sorted(held[name])
            if not 2 <= len(rows) <= RARE:
                continue
            for row in rows:
                for other in rows:
                    a, b = self.corpus[row], self.corpus[other]
                    if a.document != b.document and a.text != b.text:
                        link = Link(name, (b, held[name][other]), (a, held[name][row]))
                        found.setdefault(row, []).append(link)
        return found

    def values(self, kind: str, language: str, *, seed: int, count: int = 24) -> list[str]:
        """Spans of one kind from passages drawn by the seed: false values and wrong options."""
        generator = random.Random(seed)
        documents = self.documents[language]
        drawn = [generator.choice(documents) for _ in range(count)] if documents else []
        found = (fact.span.text for rows in drawn for fact in self.facts(generator.choice(rows), (kind,)))
        return list(dict.fromkeys(found))

    @cached_property
    def linked(self) -> dict[str, list[int]]:
        """Language → places of the documents that have links."""
        return {
            language: [place for place, rows in enumerate(documents) if any(row in self.links for row in rows)]
            for language, documents in self.documents.items()
        }

    def places(self, language: str, *, linked: bool) -> Sequence[int]:
        """The documents that may serve, by their places in the language's order."""
        return self.linked[language] if linked else range(len(self.documents[language]))

    def visits(self, asked: Iterable[tuple[int, str, bool, Callable[[Sequence[int]], bool]]]) -> dict[int, int]:
        """Cell → place of its document in its language's order, for cells in the order of the plan.

        Args:
            asked: (cell, language, whether it needs a link, whether a document's rows can serve it). Cells that none of
                `TRIES` documents serves are left out.
        """
        dealt: dict[int, int] = {}
        visited = {language: [0] * len(documents) for language, documents in self.documents.items()}
        heaps: dict[tuple[str, bool], list[tuple[int, int]]] = {}
        for cell, language, linked, serves in asked:
            if (language, linked) not in heaps:
                heaps[language, linked] = [(0, place) for place in self.places(language, linked=linked)]
            heap, counts = heaps[language, linked], visited[language]
            aside: list[int] = []
            while heap and len(aside) < TRIES and cell not in dealt:
                count, place = heapq.heappop(heap)
                if count != counts[place]:  # visited meanwhile through the other heap
                    heapq.heappush(heap, (counts[place], place))
                    continue
                if serves(self.documents[language][place]):
                    dealt[cell] = place
                    counts[place] += 1
                aside.append(place)
            for place in aside:
                heapq.heappush(heap, (counts[place], place))
        return dealt
