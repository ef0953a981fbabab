"""What both libraries' bridges share: a retriever from whatever is given, one question at a time, in plain records."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from threading import Lock
from typing import Any

from raglan.encoder import Encoder
from raglan.knowledge import KnowledgeBase
from raglan.records import Hit
from raglan.retriever import Retriever

__all__ = ["TURN", "Towers", "found", "metadata", "retriever_of"]

log = logging.getLogger(__name__)
TURN = Lock()  # tokenizers serve one thread at a time, and both libraries ask from several


def retriever_of(source: Retriever | KnowledgeBase) -> Retriever:
    """The retriever itself; of a knowledge base its hybrid index, else its first, and the encoder it was built with."""
    if not isinstance(source, KnowledgeBase):
        return source
    names = list(source.settings.indexes)
    return Retriever(source, Encoder.open(source.settings.encoder), index="hybrid" if "hybrid" in names else names[0])


def found(retriever: Retriever, query: str, k: int) -> tuple[Hit, ...]:
    """The best k passages of one query, fewer where the knowledge base holds fewer. Raises CorpusError for an empty query."""
    with TURN:
        return retriever.retrieve([query], min(k, len(retriever.base.corpus)))[0]


def metadata(hit: Hit, retriever: Retriever) -> dict[str, Any]:
    """What their documents keep of a hit, all of it plain JSON."""
    passage = hit.passage
    return {
        "title": passage.title, "document": passage.document, "start": passage.start, "end": passage.end,
        "score": hit.score, "rank": hit.rank, "knowledge": retriever.base.version,
    }  # fmt: skip


@dataclass(frozen=True)
class Towers:
    """An encoder's two towers, for libraries that know texts and lists of numbers."""

    encoder: Encoder

    @classmethod
    def of(cls, source: Retriever | KnowledgeBase | Encoder) -> Towers:
        """The towers of an encoder, of a retriever, or those that a knowledge base was built with."""
        encoder = source if isinstance(source, Encoder) else retriever_of(source).encoder
        if encoder.similarity == "dot":
            log.warning(
                "%s compares by inner product: give its vectors to a store that does so too, and not by cosine",
                encoder.settings.model,
            )
        return cls(encoder)

    def query(self, text: str) -> list[float]:
        """(D,) of a question, by the query tower."""
        with TURN:
            return [float(value) for value in self.encoder.embed_queries([text])[0]]

    def passages(self, texts: list[str]) -> list[list[float]]:
        """(n,D) of passages, by the passage tower. DPR's pairs of title and text come as one text from these libraries."""
        with TURN:
            return [[float(value) for value in row] for row in self.encoder.embed_passages(texts)]
