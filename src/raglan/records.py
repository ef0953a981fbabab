"""The nouns that travel: plain, immutable records without behaviour.

A `Document` is a source text, a `Passage` a span of it, a `Hit` a passage with its score and rank, an `Example` a question
with what is known of its answer, and an `Answer` what a RAG system made of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Answer", "Candidate", "Completion", "Document", "Example", "Hit", "Passage"]


@dataclass(frozen=True, slots=True)
class Document:
    """A source text. `whole` says that it is a passage already and is not to be cut."""

    id: str
    text: str
    title: str = ""
    source: str = ""
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Passage:
    """A span [start, end) of a document's text, in characters. `title` is the heading path above it."""

    id: str
    text: str
    title: str = ""
    document: str = ""
    start: int = 0
    end: int = 0


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage that a search found: its row in the corpus, raw score, and rank from 1."""

    passage: Passage
    row: int
    score: float
    rank: int


@dataclass(frozen=True, slots=True)
class Example:
    """A question. `relevant` holds passage ids, `grades` their graded relevance where a collection has it."""

    id: str
    query: str
    answers: tuple[str, ...] = ()
    relevant: tuple[str, ...] = ()
    grades: Mapping[str, int] = field(default_factory=dict)
    history: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Completion:
    """What a generator wrote: text, its token ids up to and with the end token, their log-probability, and whether it ended."""

    text: str
    ids: tuple[int, ...]
    logprob: float
    finished: bool


@dataclass(frozen=True, slots=True)
class Candidate:
    """A possible answer with its marginal log-probability, log Σ_k p(z_k|x) p(y|x,z_k) or RAG-Token's; a class's log p(c|x)."""

    text: str
    ids: tuple[int, ...]
    logprob: float
    finished: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer with the passages it was read from. `truncated` says that a passage had to be cut to fit the prompt.

    The RAG decodings add, in the order of `hits`: `prior` p(z|x); `posterior` p(z|x,y), which for `rag_token` is each
    passage's share in the answer, and for `classify` p(z|x,c) of the class; and for `rag_token` also `token_posterior`, a row
    for each token of `ids`. All candidates are kept, the answer first and the rest by their log-probability.
    """

    query: str
    text: str
    logprob: float
    finished: bool
    hits: tuple[Hit, ...]
    knowledge: str = ""
    truncated: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    ids: tuple[int, ...] = ()
    prior: tuple[float, ...] = ()
    posterior: tuple[float, ...] = ()
    token_posterior: tuple[tuple[float, ...], ...] = ()
    candidates: tuple[Candidate, ...] = ()
