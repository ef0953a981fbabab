"""Several retrievers as one: the union of their hits, in turn, so that none of them is the only one a generator learns to read.

    rank 1 of the first, rank 1 of the second, …, rank 2 of the first, …      what was there already, by id or text, left out

Scores of different retrievers are not comparable and stay as they are, with the retriever's name and own rank beside them. A
score of exactly 0 is no hit. A retriever that finds the same passages for every question is broken, and said to be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from raglan.errors import IndexMismatch, RecipeError
from raglan.perturb import content_hash
from raglan.records import Hit
from raglan.retriever import Retriever
from raglan.text import question_key

__all__ = ["Found", "Retrieves", "check_varied", "pool", "retrieve_each", "retrieve_pooled"]

FEWEST, FEWEST_WITHOUT = 4, 20  # different questions, below which equal hits prove nothing


class Retrieves(Protocol):
    """What `raglan.retriever.Retriever` does, and all that is wanted of one here."""

    def retrieve(self, queries: Sequence[str], k: int) -> list[tuple[Hit, ...]]: ...


@dataclass(frozen=True, slots=True)
class Found:
    """A hit with its retriever's name; its score and rank are that retriever's."""

    hit: Hit
    retriever: str


def retrieve_pooled(retrievers: Mapping[str, Retrieves], queries: Sequence[str], k: int) -> list[tuple[Found, ...]]:
    """The pooled best k of each query; fewer where the retrievers find fewer.

    Raises:
        RecipeError: no retriever, or a k that one of them refuses.
        IndexMismatch: a retriever finds the same for every question.
    """
    if not retrievers:
        raise RecipeError("a pool of no retrievers", hint="name at least one")
    lists = retrieve_each(retrievers, queries, k)
    for name, hits in lists.items():
        check_varied(queries, hits, name=name)
    return [pool({name: hits[number] for name, hits in lists.items()}, k) for number in range(len(queries))]


def retrieve_each(retrievers: Mapping[str, Retrieves], queries: Sequence[str], k: int) -> dict[str, list[tuple[Hit, ...]]]:
    """Each retriever's best k of each query. An encoder that several of them have embeds the queries once."""
    vectors: dict[int, np.ndarray] = {}
    found = {}
    for name, retriever in retrievers.items():
        if isinstance(retriever, Retriever) and retriever.needs_vectors:
            encoder = id(retriever.encoder)
            if encoder not in vectors:
                vectors[encoder] = retriever.embed(queries)
            found[name] = retriever.retrieve(queries, k, vectors=vectors[encoder])
        else:
            found[name] = retriever.retrieve(queries, k)
    return found


def pool(hits: Mapping[str, Sequence[Hit]], k: int) -> tuple[Found, ...]:
    """One question's hits by retriever, taken in turn; ids and texts each once."""
    found: list[Found] = []
    ids: set[str] = set()
    texts: set[str] = set()
    real = {name: [hit for hit in own if hit.score != 0] for name, own in hits.items()}
    for place in range(max(map(len, real.values()), default=0)):
        for name, own in real.items():
            if len(found) == k or place >= len(own):
                continue
            passage = own[place].passage
            text = content_hash(passage)
            if passage.id not in ids and text not in texts:
                found.append(Found(own[place], name))
                ids.add(passage.id)
                texts.add(text)
    return tuple(found)


def check_varied(queries: Sequence[str], hits: Sequence[Sequence[Hit]], *, name: str) -> None:
    """Refuse a retriever whose hits, in their order, are the same for all of at least four different questions.

    Of nothing, twenty: some questions share no word with the corpus, as those in another language do.

    Raises:
        IndexMismatch: it is so.
    """
    asked = {question_key(query): tuple(hit.passage.id for hit in own) for query, own in zip(queries, hits, strict=True)}
    if len(asked) < FEWEST or len(set(asked.values())) > 1:
        return
    same = next(iter(asked.values()))
    if not same and len(asked) < FEWEST_WITHOUT:
        return
    what = f"the same {len(same)} passages, {same[0]!r} first," if same else "nothing"
    raise IndexMismatch(
        f"the retriever {name!r} finds {what} for all of {len(asked)} different questions",
        hint="its index was built for another language or tokenizer, or its encoder is untrained: build it again",
    )
