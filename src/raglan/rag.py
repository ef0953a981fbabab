"""A RAG system: retriever + prompt + generator + decoding → answers.

What it knows is the knowledge base and not the weights, so `swap` changes it in one assignment, while others are asking:
a question that has begun is answered from the version it began with, and every answer names its version.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Literal

from raglan.artifact import read_manifest
from raglan.decode import CHOOSES, KINDS, NEEDS_PRIOR, Asked, first_tokens, rag_turn, self_rag
from raglan.decode.self_rag import check_marked
from raglan.dialogue import Rewriter, retrieve_turns
from raglan.encoder import Encoder
from raglan.errors import RecipeError
from raglan.generator import HFGenerator, open_any, open_generator
from raglan.knowledge import KnowledgeBase
from raglan.learned_prompt import check_prompt
from raglan.recipe import (
    ClassifyDecode,
    DecodeSettings,
    GeneratorSettings,
    RagTokenDecode,
    Recipe,
    RetrieveAgain,
    SelfRagDecode,
    TurnSettings,
)
from raglan.records import Answer, Hit
from raglan.retriever import Retriever
from raglan.text import check_history, check_query

__all__ = ["PRIOR", "RAG"]

PRIOR = "prior"


@dataclass
class RAG:
    """Asks the retriever, then the generator. `k` passages a query unless a call says otherwise.

    A call's `history` is, of each question, the dialogue's earlier turns, oldest first. `query`, of a program, makes what
    Self-RAG's long form asks further of the question and the last segment, in place of `decode.query`.

    Threads may share it: questions wait for each other, since tokenizers and the models' hooks serve one at a time.
    """

    retriever: Retriever
    generator: HFGenerator
    decode: DecodeSettings
    k: int
    again: RetrieveAgain | None = None
    query: Callable[[str, str], str] | None = None
    _turn: Lock = field(default_factory=Lock, repr=False)

    @classmethod
    def open(
        cls, recipe: Recipe, *, generator: str | None = None, query_encoder: Path | None = None,
        passage_encoder: Path | None = None, knowledge: Path | None = None, prior: Path | None = None,
        to: Literal["ask", "learn"] = "ask",
    ) -> RAG:  # fmt: skip
        """The system of a recipe; the rest are folders of tuned parts to use instead of its own.

        A tuned passage encoder comes with `knowledge`, the same passages encoded by it.

        Raises:
            RecipeError: a generator that learned with another prompt is to be asked with the recipe's.
        """
        asks = recipe.retriever
        base = KnowledgeBase.of(recipe.knowledge, path=knowledge)
        named = recipe.knowledge.encoder
        if passage_encoder is not None:
            named = named.model_copy(update={"model": str(passage_encoder)})
        encoder = Encoder.open(named, query_encoder=query_encoder or asks.query_encoder)
        weights = asks.prior
        if prior is not None:
            weights = weights.model_copy(update=read_manifest(prior, PRIOR)["values"])
        settings = recipe.generator
        if generator is not None:
            settings = settings.model_copy(update={"model": generator, "adapter": None})  # it is in what learned
        reads = open_any(settings, recipe.prompt)
        if to == "ask" and not (settings.any_prompt or isinstance(recipe.decode, SelfRagDecode)):
            check_prompt(getattr(reads, "learned_prompt", None), reads.prompt, model=settings.model)
        if isinstance(recipe.decode, ClassifyDecode):
            first_tokens(reads, recipe.decode)  # a fault is told before anything is trained
        if isinstance(recipe.decode, SelfRagDecode):
            check_marked(reads)
        retriever = Retriever(base, encoder, index=recipe.index, prior=weights, history=asks.history)
        if asks.history == "rewrite":
            own = asks.rewrite.model
            writes = reads if own is None else open_generator(GeneratorSettings(model=own), recipe.prompt)
            retriever.rewrite = Rewriter(writes, asks.rewrite)
        reads.prompt.question_tokenizer = encoder.query_tower.tokenizer
        return cls(retriever, reads, recipe.decode, asks.k, asks.retrieve_again)

    @property
    def turns(self) -> TurnSettings | None:
        """RAG-Turn's settings, if several turns of a dialogue retrieve."""
        return getattr(self.decode, "turns", None)

    def answer(
        self, queries: Sequence[str], *, k: int | None = None, history: Sequence[Sequence[str]] = (),
        choices: Sequence[Sequence[str]] = (),
    ) -> list[Answer]:  # fmt: skip
        """One answer a query, with the passages it was read from; of its `choices` (`ensemble`), where it has any.

        Raises:
            CorpusError: an empty or overlong question or turn. RecipeError: k larger than the corpus.
        """
        _check(queries, history)
        with self._turn:
            retriever = self.retriever  # a swap from here on is for the next question
            k = self.k if k is None else k
            if self.turns is not None:
                said = history or [()] * len(queries)
                found = retrieve_turns(retriever, queries, said, k, self.turns)
                priors, sizes = [f.doc_logprobs for f in found], [f.sizes for f in found]
                return self._decoded(retriever, Asked(queries, [f.hits for f in found], priors, said, sizes), self.decode)
            texts, hits = self._search(retriever, queries, k, history)
            return self._read(retriever, queries, texts, hits, history, choices=choices, again=k)

    def search(
        self, queries: Sequence[str], k: int, *, history: Sequence[Sequence[str]] = ()
    ) -> tuple[list[str], list[tuple[Hit, ...]]]:
        """What is searched for, and the best k passages of each query."""
        _check(queries, history)
        with self._turn:
            return self._search(self.retriever, queries, k, history)

    def read(
        self, queries: Sequence[str], hits: Sequence[Sequence[Hit]], *, history: Sequence[Sequence[str]] = (),
        texts: Sequence[str] = (), choices: Sequence[Sequence[str]] = (), again: int = 0,
    ) -> list[Answer]:  # fmt: skip
        """One answer a query from given hits; none means closed book. `texts`: what `search` said it searched for.

        `again`: so many passages may be retrieved where the decoding asks for more (`self_rag`'s long form); 0 for none but
        the given ones.
        """
        with self._turn:
            return self._read(self.retriever, queries, texts, hits, history, choices=choices, again=again)

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
        base = KnowledgeBase.open(own if path is None else path, version=version).searching(self.retriever.base.changed)
        self.retriever = self.retriever.over(base)
        return base.version

    def _search(
        self, retriever: Retriever, queries: Sequence[str], k: int, history: Sequence[Sequence[str]]
    ) -> tuple[list[str], list[tuple[Hit, ...]]]:
        texts = retriever.search_texts(queries, history)
        if self.again is None:
            return texts, retriever.retrieve(texts, k)
        drafting = self.decode.model_copy(update={"max_new_tokens": self.again.max_draft_tokens})
        drafts = self._read(retriever, queries, texts, retriever.retrieve(texts, self.k), history, drafting)
        texts = retriever.search_texts(queries, history, drafts=[draft.text for draft in drafts])
        return texts, retriever.retrieve(texts, k)

    def _read(
        self, retriever: Retriever, queries: Sequence[str], texts: Sequence[str], hits: Sequence[Sequence[Hit]],
        history: Sequence[Sequence[str]], decode: DecodeSettings | None = None, choices: Sequence[Sequence[str]] = (),
        again: int = 0,
    ) -> list[Answer]:  # fmt: skip
        decode = decode or self.decode
        if any(choices) and decode.kind not in CHOOSES:
            raise RecipeError(
                f"decode.kind is {decode.kind!r}, which does not choose among given answers",
                hint="decode.kind: ensemble, concat or self_rag",
            )
        prior = None
        if decode.kind in NEEDS_PRIOR:
            prior = retriever.prior(texts or retriever.search_texts(queries, history), hits)
        return self._decoded(retriever, Asked(queries, hits, prior, history, choices=choices, k=again), decode)

    def _decoded(self, retriever: Retriever, asked: Asked, decode: DecodeSettings) -> list[Answer]:
        turns = self.turns if asked.turns else None
        if isinstance(decode, RagTokenDecode) and turns is not None and turns.kind == "doc_only":
            answers = rag_turn(self.generator, asked, decode)
        elif isinstance(decode, SelfRagDecode):
            finder = _finder(retriever) if asked.k else None
            answers = self_rag(self.generator, asked, decode, retrieve=finder, query=self.query)
        else:  # doc-then-turn is a mixture like any other; over whole answers doc-only is the same
            answers = KINDS[decode.kind](self.generator, asked, decode)
        return [replace(answer, knowledge=retriever.base.version) for answer in answers]


def _finder(retriever: Retriever) -> Callable[[str, int], list[Hit]]:
    """The best k passages of one text."""
    return lambda query, k: list(retriever.retrieve([query], k)[0])


def _check(queries: Sequence[str], history: Sequence[Sequence[str]]) -> None:
    for query in queries:
        check_query(query)
    for turns in history:
        check_history(turns)
