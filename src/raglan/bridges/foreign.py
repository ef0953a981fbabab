"""A retriever of LlamaIndex or LangChain as a raglan retriever: it picks passages and cannot learn.

`retrieve`, `search`, `prior` and with them every decoding and the `answer` objective (LM-ft) work. `score` and whatever else
wants an encoder or vectors are refused, and so are the objectives that train a retriever.

What was found becomes a passage with a row of its own, in the order of being seen, so that rows mean here what they mean in
a corpus. p(z|x) is the softmax of their scores over τ; where they give none it is uniform, and a warning says so. A document
without an id is named by a hash of its text.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NoReturn, cast, overload

import numpy as np
import torch
from torch import Tensor

from raglan.artifact import fingerprint
from raglan.encoder import Encoder
from raglan.errors import RecipeError
from raglan.index import Index
from raglan.knowledge import KnowledgeBase
from raglan.progress import track
from raglan.recipe import PriorSettings
from raglan.records import Hit, Passage
from raglan.retriever import BATCH, Prior, Retriever, Rewrite
from raglan.text import MAX_QUERY_CHARACTERS, check_query

__all__ = ["ForeignRetriever", "from_langchain", "from_llama_index"]

log = logging.getLogger(__name__)
TOP_K = ("similarity_top_k", "_similarity_top_k", "top_k", "k")  # what their retrievers call it
Found = tuple[Passage, float | None]
Ask = Callable[[str, int], Sequence[Found]]


def from_llama_index(
    retriever: Any, *, temperature: float = 1.0, history: Literal["last_turn", "history"] = "history"
) -> ForeignRetriever:
    """A raglan retriever that asks a `BaseRetriever` of LlamaIndex.

    Args:
        retriever: is asked through its `retrieve`; its `similarity_top_k`, if it has one, is set for each search, in a copy.
        temperature: τ of p(z|x) = softmax(score / τ).
        history: what of a dialogue is searched for.
    """

    def ask(query: str, k: int) -> list[Found]:
        found = _with_top_k(retriever, k).retrieve(query)
        return [(_of_node(item.node), None if item.score is None else float(item.score)) for item in found]

    return ForeignRetriever(ask, f"LlamaIndex {type(retriever).__name__}", temperature=temperature, history=history)


def from_langchain(
    retriever: Any, *, score: str = "score", temperature: float = 1.0, history: Literal["last_turn", "history"] = "history"
) -> ForeignRetriever:
    """A raglan retriever that asks a `BaseRetriever` of LangChain.

    Args:
        retriever: is asked through its `invoke`; `search_kwargs["k"]`, `k` or `top_k`, whichever it has, is set in a copy.
        score: the metadata key that holds a document's score, if anything does: the interface itself has none.
        temperature: τ of p(z|x) = softmax(score / τ).
        history: what of a dialogue is searched for.
    """

    def ask(query: str, k: int) -> list[Found]:
        found = _with_top_k(retriever, k).invoke(query)
        return [(_of_document(document), _number(document.metadata.get(score))) for document in found]

    return ForeignRetriever(ask, f"LangChain {type(retriever).__name__}", temperature=temperature, history=history)


class ForeignRetriever(Retriever):
    """Somebody else's retriever, asked one query at a time. See `from_llama_index` and `from_langchain`.

    Args:
        ask: (query, k) → passages with their scores, best first; a score of None is no score.
        kind: what it is, for messages and for `Answer.knowledge`.
        temperature: τ of p(z|x) = softmax(score / τ).
        history, rewrite: as for every retriever.
    """

    needs_vectors = False  # they embed what they are asked themselves

    def __init__(
        self, ask: Ask, kind: str, *, temperature: float = 1.0, history: Literal["last_turn", "history", "rewrite"] = "history",
        rewrite: Rewrite | None = None,
    ):  # fmt: skip
        if temperature <= 0:
            raise RecipeError(f"temperature is {temperature}; it must be above 0")
        self.ask, self.kind, self.name = ask, kind, kind
        self.seen = _Seen()
        self.base = cast(KnowledgeBase, _Elsewhere(self.seen, kind, self._refuse))
        self.prior_settings = PriorSettings(temperature=temperature)
        self.weights = Prior(self.prior_settings, usual_temperature=1.0)
        self.history, self.rewrite = history, rewrite
        self._scoreless: set[str] = set()  # queries
        self._warned: set[str] = set()

    def search(
        self, queries: Sequence[str], k: int, *, batch: int = BATCH, vectors: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores (B,K) float32, 0 where they give none, and rows (B,K) int64; row −1 where fewer than K were found.

        `vectors` are of no use to them.

        Raises:
            RecipeError: k below 1. CorpusError: an empty query.
        """
        self.check_k(k)
        for query in queries:
            check_query(query)
        scores, rows = np.zeros((len(queries), k), np.float32), np.full((len(queries), k), -1, np.int64)
        for place, query in enumerate(track(list(queries), "retrieving")):
            found = self._unique(query, k)
            rows[place, : len(found)] = [row for row, _ in found]
            scores[place, : len(found)] = [score or 0.0 for _, score in found]
        return scores, rows

    def weigh(self, queries: Sequence[str], hits: Sequence[Sequence[Hit]]) -> tuple[Tensor, Tensor]:
        """Their scores over τ, (B,K), and where there is a hit; all equal for a query with a hit that has no score."""
        most = max((len(found) for found in hits), default=0)
        logits, present = torch.zeros((len(hits), most)), torch.zeros((len(hits), most), dtype=torch.bool)
        for place, (query, found) in enumerate(zip(queries, hits, strict=True)):
            present[place, : len(found)] = True
            if query in self._scoreless:
                self._warn("scores", "%s gives no scores: p(z|x) is the same for all passages of a query", self.kind)
            else:
                logits[place, : len(found)] = torch.tensor([hit.score for hit in found]) / self.temperature
        return logits, present

    def check_k(self, k: int) -> None:
        if k < 1:
            raise RecipeError(f"k is {k}; it must be at least 1", hint="-k 5, or retriever.k in the recipe")

    def over(self, base: KnowledgeBase) -> NoReturn:
        self._refuse("be swapped to another knowledge base")

    def adopt(self, base: KnowledgeBase) -> NoReturn:
        self._refuse("adopt an index")

    def score(self, features: dict[str, Tensor], passage_vectors: Tensor) -> NoReturn:
        self._refuse("score with a gradient")

    def prior_logits(self, doc_scores: Tensor, queries: Sequence[str], rows: np.ndarray) -> NoReturn:
        self._refuse("score with a gradient")

    @property
    def encoder(self) -> Encoder:  # type: ignore[override]
        self._refuse("be trained: it has no encoder here")

    @property
    def index(self) -> Index:  # type: ignore[override]
        self._refuse("be trained: it has no index here")

    @property
    def fingerprint(self) -> str:
        """Of its name and its way of asking: what lies behind it cannot be known."""
        return fingerprint([self.kind, self.history])

    def _with_history(self, text: str, turns: Sequence[str]) -> str:
        """The newest turns, each whole, as long as a query may be. What their encoder reads of it is theirs to say."""
        for turn in reversed(turns):
            if len(turn) + 1 + len(text) > MAX_QUERY_CHARACTERS:
                break
            text = f"{turn}\n{text}"
        return text

    def _unique(self, query: str, k: int) -> list[tuple[int, float | None]]:
        """The first k passages found, each once, with their rows."""
        found: dict[int, float | None] = {}
        for passage, score in self.ask(query, k):
            found.setdefault(self.seen.add(passage), score)
        if len(found) < k:
            self._warn("k", "%s found %d passages where %d were asked for", self.kind, len(found), k)
        kept = list(found.items())[:k]
        if any(score is None for _, score in kept):
            self._scoreless.add(query)
        return kept

    def _warn(self, what: str, message: str, *values: Any) -> None:
        """Once, not for each query."""
        if what not in self._warned:
            log.warning(message, *values)
            self._warned.add(what)

    def _refuse(self, what: str) -> NoReturn:
        raise RecipeError(
            f"{self.kind} can retrieve, but it cannot {what}",
            hint="LM-ft and decodings take it as it is; to train a retriever, build a knowledge base: raglan build recipe.yaml",
        )


class _Seen(Sequence[Passage]):
    """The passages found so far, by row and by id, with a corpus' methods."""

    def __init__(self) -> None:
        self._passages: list[Passage] = []
        self._rows: dict[str, int] = {}

    def add(self, passage: Passage) -> int:
        """The passage's row. Another text under an id that is taken gets a name of its own."""
        row = self._rows.get(passage.id)
        if row is not None and self._passages[row].text != passage.text:
            return self.add(replace(passage, id=f"{passage.id}~{_hash(passage.text)}"))
        if row is None:
            row = self._rows[passage.id] = len(self._passages)
            self._passages.append(passage)
        return row

    def __len__(self) -> int:
        return sys.maxsize  # nobody knows how many there are: a depth is never more than this

    @overload
    def __getitem__(self, row: int) -> Passage: ...
    @overload
    def __getitem__(self, row: slice) -> list[Passage]: ...
    def __getitem__(self, row: int | slice) -> Passage | list[Passage]:
        return self._passages[row]

    def __iter__(self) -> Iterator[Passage]:
        return iter(self._passages)

    def row(self, identity: str) -> int | None:
        return self._rows.get(identity)

    def rows_of_document(self, document: str) -> list[int]:
        return [row for row, passage in enumerate(self._passages) if passage.document == document]


class _Elsewhere:
    """What stands in a knowledge base's place: passages as they were found, a name, and no vectors."""

    def __init__(self, corpus: _Seen, version: str, refuse: Callable[[str], NoReturn]):
        self.corpus, self.version, self._refuse = corpus, version, refuse

    @property
    def folder(self) -> Path:
        self._refuse("be swapped: its knowledge lies elsewhere")

    @property
    def vectors(self) -> NoReturn:
        self._refuse("be trained: it has no vectors here")


def _with_top_k(retriever: Any, k: int) -> Any:
    """The retriever, or a shallow copy of it that is told to find k: others may be asking the original."""
    kwargs = getattr(retriever, "search_kwargs", None)
    names = [name for name in TOP_K if isinstance(getattr(retriever, name, None), int)]
    if not isinstance(kwargs, dict) and not names:
        return retriever
    asked = copy.copy(retriever)
    if isinstance(kwargs, dict):
        asked.search_kwargs = {**kwargs, "k": k}
    for name in names[:1]:
        setattr(asked, name, k)
    return asked


def _of_node(node: Any) -> Passage:
    about = dict(node.metadata)
    text = str(node.get_content())
    identity = str(node.node_id or _hash(text))
    return Passage(identity, text, str(about.get("title") or ""), str(getattr(node, "ref_doc_id", None) or identity))


def _of_document(document: Any) -> Passage:
    about, text = document.metadata, str(document.page_content)
    identity = str(document.id or about.get("id") or _hash(text))
    source = about.get("document") or about.get("source") or identity
    return Passage(identity, text, str(about.get("title") or ""), str(source))


def _number(value: Any) -> float | None:
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        return None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
