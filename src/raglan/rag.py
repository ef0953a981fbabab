"""A RAG system: retriever + prompt + generator + decoding → answers.

What it knows is the knowledge base and not the weights, so `swap` changes it in one assignment, while others are asking:
a question that has begun is answered from the version it began with, and every answer names its version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock

from raglan.artifact import read_manifest
from raglan.decode import KINDS, NEEDS_PRIOR, Asked
from raglan.encoder import Encoder
from raglan.generator import HFGenerator, open_generator
from raglan.knowledge import KnowledgeBase
from raglan.recipe import DecodeSettings, Recipe
from raglan.records import Answer, Hit
from raglan.retriever import Retriever
from raglan.text import check_query

__all__ = ["PRIOR", "RAG"]

PRIOR = "prior"


@dataclass
class RAG:
    """Asks the retriever, then the generator. `k` passages a query unless a call says otherwise.

    Threads may share it: questions wait for each other, since tokenizers and the models' hooks serve one at a time.
    """

    retriever: Retriever
    generator: HFGenerator
    decode: DecodeSettings
    k: int
    _turn: Lock = field(default_factory=Lock, repr=False)

    @classmethod
    def open(
        cls, recipe: Recipe, *, generator: str | None = None, query_encoder: Path | None = None,
        passage_encoder: Path | None = None, knowledge: Path | None = None, prior: Path | None = None,
    ) -> RAG:  # fmt: skip
        """The system of a recipe; the rest are folders of tuned parts to use instead of its own.

        A tuned passage encoder comes with `knowledge`, the same passages encoded by it.
        """
        base = KnowledgeBase.open(knowledge or recipe.knowledge.path)
        named = recipe.knowledge.encoder
        if passage_encoder is not None:
            named = named.model_copy(update={"model": str(passage_encoder)})
        encoder = Encoder.open(named, query_encoder=query_encoder or recipe.retriever.query_encoder)
        weights = recipe.retriever.prior
        if prior is not None:
            weights = weights.model_copy(update=read_manifest(prior, PRIOR)["values"])
        retriever = Retriever(base, encoder, index=recipe.index, prior=weights)
        settings = recipe.generator
        if generator is not None:
            settings = settings.model_copy(update={"model": generator})
        opened = open_generator(settings, recipe.prompt)
        opened.prompt.question_tokenizer = retriever.encoder.query_tower.tokenizer
        return cls(retriever, opened, recipe.decode, recipe.retriever.k)

    def answer(self, queries: Sequence[str], *, k: int | None = None) -> list[Answer]:
        """One answer a query, with the passages it was read from.

        Raises:
            CorpusError: an empty or overlong question. RecipeError: k larger than the corpus.
        """
        for query in queries:
            check_query(query)
        with self._turn:
            retriever = self.retriever  # a swap from here on is for the next question
            return self._read(retriever, queries, retriever.retrieve(queries, self.k if k is None else k))

    def read(self, queries: Sequence[str], hits: Sequence[Sequence[Hit]]) -> list[Answer]:
        """One answer a query from given hits; none means closed book."""
        with self._turn:
            return self._read(self.retriever, queries, hits)

    def swap(self, path: Path | None = None, *, version: str | None = None) -> str:
        """Answer from another knowledge base, or from another version of this one; no weight is loaded again.

        Args:
            path: the other base's folder; default this one's.
            version: one of its finished versions; default its current one.

        Returns:
            The version that answers from now on.

        Raises:
            CheckpointError: no such base or version.
            IndexMismatch: built by another passage encoder. What was known before then stays.
        """
        own = self.retriever.base.folder.parent.parent
        base = KnowledgeBase.open(own if path is None else path, version=version)
        self.retriever = self.retriever.over(base)
        return base.version

    def _read(self, retriever: Retriever, queries: Sequence[str], hits: Sequence[Sequence[Hit]]) -> list[Answer]:
        kind = self.decode.kind
        prior = retriever.prior(queries, hits) if kind in NEEDS_PRIOR else None
        answers = KINDS[kind](self.generator, Asked(queries, hits, prior), self.decode)
        return [replace(answer, knowledge=retriever.base.version) for answer in answers]
