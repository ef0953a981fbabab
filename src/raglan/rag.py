"""A RAG system: retriever + prompt + generator + decoding → answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from raglan.decode import KINDS, NEEDS_PRIOR, Asked
from raglan.encoder import Encoder
from raglan.generator import HFGenerator, open_generator
from raglan.knowledge import KnowledgeBase
from raglan.recipe import DecodeSettings, Recipe
from raglan.records import Answer, Hit
from raglan.retriever import Retriever
from raglan.text import check_query

__all__ = ["RAG"]


@dataclass
class RAG:
    """Asks the retriever, then the generator. `k` passages a query unless a call says otherwise."""

    retriever: Retriever
    generator: HFGenerator
    decode: DecodeSettings
    k: int

    @classmethod
    def open(cls, recipe: Recipe, *, generator: str | None = None, query_encoder: Path | None = None) -> RAG:
        """The system of a recipe; `generator` and `query_encoder` are folders of tuned parts to use instead of its own."""
        base = KnowledgeBase.open(recipe.knowledge.path)
        tower = query_encoder or recipe.retriever.query_encoder
        retriever = Retriever(
            base, Encoder.open(recipe.knowledge.encoder, query_encoder=tower), index=recipe.index, prior=recipe.retriever.prior
        )
        settings = recipe.generator
        if generator is not None:
            settings = settings.model_copy(update={"model": generator})
        return cls(retriever, open_generator(settings, recipe.prompt), recipe.decode, recipe.retriever.k)

    def answer(self, queries: Sequence[str], *, k: int | None = None) -> list[Answer]:
        """One answer a query, with the passages it was read from.

        Raises:
            CorpusError: an empty or overlong question. RecipeError: k larger than the corpus.
        """
        for query in queries:
            check_query(query)
        return self.read(queries, self.retriever.retrieve(queries, self.k if k is None else k))

    def read(self, queries: Sequence[str], hits: Sequence[Sequence[Hit]]) -> list[Answer]:
        """One answer a query from given hits; none means closed book."""
        kind = self.decode.kind
        prior = self.retriever.prior(queries, hits) if kind in NEEDS_PRIOR else None
        answers = KINDS[kind](self.generator, Asked(queries, hits, prior), self.decode)
        return [replace(answer, knowledge=self.retriever.base.version) for answer in answers]
