"""raglan for LlamaIndex: its retriever as their `BaseRetriever`, its two towers as their `BaseEmbedding`.

    engine = RetrieverQueryEngine.from_args(as_retriever(base, similarity_top_k=4), llm=model)

A node's text for embedding is what the knowledge base embedded, title above text, so nodes that are embedded again get the
vectors they had.
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

__all__ = ["as_embedding", "as_retriever"]


def as_retriever(source: Retriever | KnowledgeBase, *, similarity_top_k: int = 5) -> Any:
    """A `llama_index.core.retrievers.BaseRetriever`.

    Args:
        source: a retriever, or a knowledge base, of which its hybrid index answers with the encoder it was built with.
        similarity_top_k: nodes a query; the attribute of that name may be set anew at any time.

    Returns:
        A retriever of `NodeWithScore`: raw scores, passage ids as node ids, the document as source, and as metadata title,
        document, start, end, score, rank and the knowledge base's version.

    Raises:
        MissingExtra: llama-index-core is not installed.
    """
    return _retriever_class()(retriever_of(source), similarity_top_k)


def as_embedding(source: Retriever | KnowledgeBase | Encoder) -> Any:
    """A `BaseEmbedding` of LlamaIndex: queries by the query tower, texts by the passage tower.

    Raises:
        MissingExtra: llama-index-core is not installed.
    """
    towers = Towers.of(source)
    return _embedding_class()(towers=towers, model_name=towers.encoder.settings.model)


@cache
def _retriever_class() -> Any:
    require("llama_index.core", "to serve LlamaIndex")
    from llama_index.core.base.base_retriever import BaseRetriever
    from llama_index.core.schema import NodeRelationship, NodeWithScore, QueryBundle, RelatedNodeInfo, TextNode

    class RaglanRetriever(BaseRetriever):
        """A raglan retriever under LlamaIndex' interface."""

        def __init__(self, source: Retriever, similarity_top_k: int):
            super().__init__()
            self.source, self.similarity_top_k = source, similarity_top_k

        def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
            hits = found(self.source, query_bundle.query_str, self.similarity_top_k)
            return [NodeWithScore(node=self._node(hit), score=hit.score) for hit in hits]

        async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
            return await asyncio.to_thread(self._retrieve, query_bundle)

        def _node(self, hit: Any) -> TextNode:
            about = metadata(hit, self.source)
            hidden = [key for key in about if key != "title" or not about["title"]]
            passage = hit.passage
            return TextNode(
                id_=passage.id, text=passage.text, metadata=about, start_char_idx=passage.start, end_char_idx=passage.end,
                excluded_embed_metadata_keys=hidden, excluded_llm_metadata_keys=hidden,
                metadata_template="{value}", text_template="{metadata_str}\n{content}",
                relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=passage.document)},
            )  # fmt: skip

    return RaglanRetriever


@cache
def _embedding_class() -> Any:
    require("llama_index.core", "to serve LlamaIndex")
    from llama_index.core.base.embeddings.base import BaseEmbedding

    class RaglanEmbedding(BaseEmbedding):
        """A raglan encoder under LlamaIndex' interface."""

        towers: Any

        def _get_query_embedding(self, query: str) -> list[float]:
            return self.towers.query(query)

        async def _aget_query_embedding(self, query: str) -> list[float]:
            return await asyncio.to_thread(self.towers.query, query)

        def _get_text_embedding(self, text: str) -> list[float]:
            return self.towers.passages([text])[0]

        def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
            return self.towers.passages(texts)

        async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
            return await asyncio.to_thread(self.towers.passages, texts)

    return RaglanEmbedding
