"""raglan for LangChain: its retriever as their `BaseRetriever`, its two towers as their `Embeddings`.

chain = {"context": as_retriever(base, k=4), "question": RunnablePassthrough()} | prompt | model
"""

from __future__ import annotations

import asyncio
from functools import cache
from typing import Any

from raglan.bridges.serve import Towers, found, metadata, retriever_of
from raglan.encoder import Encoder
from raglan.errors import require
from raglan.knowledge import KnowledgeBase
from raglan.retriever import Retriever

__all__ = ["as_embeddings", "as_retriever"]


def as_retriever(source: Retriever | KnowledgeBase, *, k: int = 5) -> Any:
    """A `langchain_core.retrievers.BaseRetriever`.

    Args:
        source: a retriever, or a knowledge base, of which its hybrid index answers with the encoder it was built with.
        k: documents a query; `invoke(query, k=…)` changes it for one.

    Returns:
        A retriever whose documents have `id`, `page_content`, and as metadata title, document, start, end, score, rank and
        the knowledge base's version.

    Raises:
        MissingExtra: langchain-core is not installed.
    """
    return _retriever_class()(source=retriever_of(source), k=k)


def as_embeddings(source: Retriever | KnowledgeBase | Encoder) -> Any:
    """A `langchain_core.embeddings.Embeddings`: queries by the query tower, documents by the passage tower.

    Raises:
        MissingExtra: langchain-core is not installed.
    """
    return _embeddings_class()(Towers.of(source))


@cache
def _retriever_class() -> Any:
    require("langchain_core", "to serve LangChain")
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever

    class RaglanRetriever(BaseRetriever):
        """A raglan retriever under LangChain's interface."""

        source: Any
        k: int = 5

        def _get_relevant_documents(self, query: str, *, run_manager: Any, k: int | None = None) -> list[Document]:
            hits = found(self.source, query, self.k if k is None else k)
            return [
                Document(id=hit.passage.id, page_content=hit.passage.text, metadata=metadata(hit, self.source)) for hit in hits
            ]

        async def _aget_relevant_documents(self, query: str, *, run_manager: Any, k: int | None = None) -> list[Document]:
            return await asyncio.to_thread(self._get_relevant_documents, query, run_manager=run_manager.get_sync(), k=k)

    return RaglanRetriever


@cache
def _embeddings_class() -> Any:
    require("langchain_core", "to serve LangChain")
    from langchain_core.embeddings import Embeddings

    class RaglanEmbeddings(Embeddings):
        """A raglan encoder under LangChain's interface."""

        def __init__(self, towers: Towers):
            self.towers = towers

        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return self.towers.passages(texts)

        def embed_query(self, text: str) -> list[float]:
            return self.towers.query(text)

    return RaglanEmbeddings
