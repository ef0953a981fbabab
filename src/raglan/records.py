"""The nouns that travel: plain, immutable records without behaviour.

A `Document` is a source text, a `Passage` a span of it, a `Hit` a passage with its score and rank, an `Example` a question
with what is known of its answer, and an `Answer` what a RAG system made of it. A `DataPoint` is a row that was trained on,
with the `Context`s it held. `Marked` is what a generator wrote with the log-probabilities of its reflection tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Answer",
    "AnswerSegment",
    "Candidate",
    "Completion",
    "Context",
    "DataPoint",
    "Document",
    "Example",
    "Hit",
    "Marked",
    "Passage",
]


@dataclass(frozen=True, slots=True)
class Document:
    """A source text. `whole`: it is a passage already and is not to be cut; `date`, `licence`: as its source has them."""

    id: str
    text: str
    title: str = ""
    source: str = ""
    whole: bool = False
    date: str = ""
    licence: str = ""


@dataclass(frozen=True, slots=True)
class Passage:
    """A span [start, end) of a document's text, in characters; its title is the headings above it, the rest its document's."""

    id: str
    text: str
    title: str = ""
    document: str = ""
    start: int = 0
    end: int = 0
    date: str = ""
    licence: str = ""


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage that a search found: its row in the corpus, raw score, and rank from 1."""

    passage: Passage
    row: int
    score: float
    rank: int


@dataclass(frozen=True, slots=True)
class Example:
    """A question. `relevant` holds passage ids, `grades` their graded relevance where a collection has it.

    Without `answers` it is open, unless it is said to be `unanswerable`: that no passage tells.
    """

    id: str
    query: str
    answers: tuple[str, ...] = ()
    relevant: tuple[str, ...] = ()
    grades: Mapping[str, float] = field(default_factory=dict)
    history: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    unanswerable: bool = False


@dataclass(frozen=True, slots=True)
class Completion:
    """What a generator wrote: text, its token ids up to and with the end token, their log-probability, and whether it ended."""

    text: str
    ids: tuple[int, ...]
    logprob: float
    finished: bool


@dataclass(frozen=True, slots=True, eq=False)
class Marked:
    """A generated continuation with the log-probabilities of the M reflection tokens ("marks") along it.

    Attributes:
        ids: (T,) generated ids, the stop or end token included.
        logprobs: (T,) float32 log p of the ids, raw: as they were before any restriction of the choice.
        mark_logprobs: (T,M) float32 log p of the marks at the position where ids[t] was chosen, raw; NaN where the reply
            does not hold one. Row 0 is the next-token distribution behind the prompt.
        finish: it ended ("eos"), met a token it had to stop at ("stop"), or the limit ("length").
    """

    ids: tuple[int, ...]
    logprobs: NDArray[np.float32]
    mark_logprobs: NDArray[np.float32]
    finish: Literal["eos", "stop", "length"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A possible answer with its marginal log-probability, log Σ_k p(z_k|x) p(y|x,z_k) or RAG-Token's; a class's log p(c|x).

    `ensemble` adds log p(y|x,z_k) under each passage, what a choice was compared by, and all spellings of a group of answers,
    the likeliest first.
    """

    text: str
    ids: tuple[int, ...]
    logprob: float
    finished: bool
    passage_logprobs: tuple[float, ...] = ()
    score: float | None = None
    surfaces: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AnswerSegment:
    """A sentence of a Self-RAG answer and what the generator thought of it.

    Attributes:
        text: visible, without reflection tokens. `ids`: with them.
        decision: whether a passage was retrieved for it, or the one in use read on.
        hit: the passage that stood before it, retrieved or read on.
        is_rel, is_sup, is_use: the reflection tokens that were generated; empty where none was.
        seq, rel, sup, use: the four figures; `score` what they come to.
        cited: numbers of its citations, from 1, in the answer's `citations`.
        flags: what was missing or off the grammar.
    """

    text: str
    decision: Literal["yes", "no", "continue"]
    hit: Hit | None = None
    is_rel: str = ""
    is_sup: str = ""
    is_use: str = ""
    seq: float = 0.0
    rel: float = 0.0
    sup: float = 0.0
    use: float = 0.0
    score: float = 0.0
    cited: tuple[int, ...] = ()
    flags: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer with the passages it was read from. `truncated` says that a passage had to be cut to fit the prompt, or to be
    left out of it: with `prompt.whole_passages` these are `dropped`.

    The RAG decodings add, in the order of `hits`: `prior` p(z|x); `posterior` p(z|x,y), which for `rag_token` is each
    passage's share in the answer, and for `classify` p(z|x,c) of the class; and for `rag_token` also `token_posterior`, a row
    for each token of `ids`. All candidates are kept, the answer first and the rest by their log-probability, or by what choices
    are compared by. `ensemble` adds `passage_logprobs`, log p(y|x,z_k).

    `self_rag` adds its `segments`, the passages cited as [1], [2], … (`citations`), the next best answers (`alternatives`), the
    text with its reflection tokens (`raw`), and a `trace` of JSON values: every decision, candidate and cost.
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
    passage_logprobs: tuple[float, ...] = ()
    segments: tuple[AnswerSegment, ...] = ()
    citations: tuple[Hit, ...] = ()
    alternatives: tuple[Answer, ...] = ()
    raw: str = ""
    trace: Mapping[str, Any] | None = None
    dropped: tuple[Hit, ...] = ()

    @property
    def read(self) -> tuple[Hit, ...]:
        """The hits that were in a prompt: all, but for those that found no room in a prompt of their own."""
        return tuple(hit for hit in self.hits if hit not in self.dropped)

    @property
    def closed_book(self) -> bool:
        """Whether no passage was there to read."""
        return not self.read


@dataclass(frozen=True, slots=True)
class Context:
    """A passage as a data point holds it: its own text, uncut, and its title, which is read before it. `score` is the search's;
    a gold passage that it did not find has none."""

    passage_id: str
    text: str
    score: float | None = None
    rank: int = 1
    title: str = ""


@dataclass(frozen=True, slots=True)
class DataPoint:
    """A row that a generator learns from, so that people and other programs can read it.

    Attributes:
        id: of the row; several rows may come from one example.
        example_id: the question's id in its source, or the passage's or text's where it has no question.
        source: which of the data's sources it is from. `split`: the example's.
        query: the question, without markers; empty for raw text. `history`: a dialogue's earlier turns, oldest first.
        answer: what is learned; for raw text, all of it.
        contexts: the passages in the prompt, in their order; none for raw text and closed book.
        prompt: the rendered prompt, passages cut as they were learned from.
        retriever: fingerprint of what found the contexts; empty where nothing was searched.
        markers: what stood before the question and before the answer.
        seed: the rows' seed.
    """

    id: str
    example_id: str
    source: str
    split: str
    query: str
    answer: str
    contexts: tuple[Context, ...] = ()
    prompt: str = ""
    retriever: str = ""
    markers: tuple[str, str] = ("", "")
    history: tuple[str, ...] = ()
    seed: int = 0
