"""Bridges to LlamaIndex and LangChain, both ways.

| | LlamaIndex | LangChain |
|---|---|---|
| raglan's retriever as theirs | `llama_index.as_retriever` | `langchain.as_retriever` |
| raglan's encoder as theirs | `llama_index.as_embedding` | `langchain.as_embeddings` |
| their retriever as raglan's | `from_llama_index` | `from_langchain` |

Two towers stay two: what they call a query goes through the query tower, what they call a document or a text through the
passage tower. Their retrievers pick passages here and are never learned: they have no scores with a gradient.
"""

from raglan.bridges.foreign import ForeignRetriever, from_langchain, from_llama_index

__all__ = ["ForeignRetriever", "from_langchain", "from_llama_index"]
