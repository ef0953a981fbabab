"""Settings of documents, passages, vectors and indexes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from raglan.recipe.base import Settings

__all__ = [
    "BM25Index",
    "ChunkSettings",
    "ColumnSettings",
    "DenseIndex",
    "EncoderSettings",
    "HybridIndex",
    "IndexSettings",
    "KnowledgeSettings",
    "VectorSettings",
]


class ChunkSettings(Settings):
    """How documents are cut into passages."""

    max_tokens: int = Field(128, ge=8, description="Longest passage, in tokens of the encoder's tokenizer.")
    overlap: int = Field(0, ge=0, description="Tokens that neighbouring passages share.")

    @model_validator(mode="after")
    def _overlap_is_smaller(self) -> ChunkSettings:
        if self.overlap >= self.max_tokens:
            raise ValueError(f"overlap ({self.overlap}) must be smaller than max_tokens ({self.max_tokens})")
        return self


class EncoderSettings(Settings):
    """A sentence-transformers model, with one tower or two."""

    model: str = Field("embedded", description="`embedded`, a folder, or a hub name: the passage tower.")
    query_model: str | None = Field(None, description="The query tower, if it is another model.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="`auto`: bfloat16 where it is faster.")
    max_tokens: int | None = Field(None, ge=8, description="Cut texts at this length; default is the model's own.")
    batch_size: int = Field(32, ge=1, description="Texts encoded together.")
    query_prompt: str | None = Field(None, description="Text put before queries; default is the model's own.")
    passage_prompt: str | None = Field(None, description="Text put before passages; default is the model's own.")


class DenseIndex(Settings):
    """Inner product over passage vectors: exact, or approximate by a FAISS factory string."""

    kind: Literal["dense"]
    encoder: EncoderSettings | None = Field(
        None, description="Another encoder for this index alone; default the knowledge base's. It searches and does not learn."
    )
    factory: str | None = Field(None, description='FAISS factory, as "IVF64,Flat" or "HNSW32"; none means exact.')
    nprobe: int = Field(8, ge=1, description="Lists (IVF) or search width (HNSW) that an approximate search visits.")

    @model_serializer(mode="wrap")
    def _unsaid(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without an encoder of its own an index is named, and its version with it, as it was before it could have one."""
        told: dict[str, Any] = whole(self)
        return {name: value for name, value in told.items() if name != "encoder" or value is not None}


class BM25Index(Settings):
    """Okapi BM25 over words; in Chinese and Japanese over characters."""

    kind: Literal["bm25"]
    han: Literal["both", "pairs"] = Field(
        "both", description="Terms of Chinese and Japanese: single characters and adjacent ones; or the pairs alone."
    )
    k1: float = Field(0.9, ge=0, description="How soon repeated terms stop counting.")
    b: float = Field(0.4, ge=0, le=1, description="How much long passages are marked down.")


class HybridIndex(Settings):
    """Two or more indexes fused, by reciprocal rank or by weighted scores."""

    kind: Literal["hybrid"]
    of: tuple[str, ...] = Field(("dense", "bm25"), min_length=2, description="Names of the indexes to fuse.")
    fusion: Literal["rrf", "weights"] = Field("rrf", description="`rrf`: Σ 1/(c + rank); `weights`: Σ w · scaled score.")
    rrf_c: float = Field(60.0, gt=0, description="The c of reciprocal rank fusion.")
    weights: tuple[float, ...] | None = Field(None, description="One weight an index; default equal.")
    depth: int = Field(100, ge=1, description="Hits taken from each index before fusing.")

    @model_validator(mode="after")
    def _one_weight_each(self) -> HybridIndex:
        if self.weights is not None and len(self.weights) != len(self.of):
            raise ValueError(f"weights has {len(self.weights)} values for {len(self.of)} indexes")
        return self


IndexSettings = Annotated[DenseIndex | BM25Index | HybridIndex, Field(discriminator="kind")]


class ColumnSettings(Settings):
    """Which columns of .jsonl, .csv and .parquet hold what."""

    id: str = "id"
    title: str = "title"
    text: str = "text"
    date: str = "date"
    licence: str = "licence"


def _default_indexes() -> dict[str, IndexSettings]:
    return {"dense": DenseIndex(kind="dense"), "bm25": BM25Index(kind="bm25"), "hybrid": HybridIndex(kind="hybrid")}


class VectorSettings(Settings):
    """Passage vectors that are there already, made by the passage encoder that `encoder` names."""

    path: Path = Field(description="A .npy file (N,D), or a folder of them, read in the order of their names.")
    ids: Path | None = Field(None, description="Their passage ids, one a line; without it ids are numbers.")
    first: int = Field(1, description="The first vector's id, where ids are numbers; DPR's begin at 1.")


class KnowledgeSettings(Settings):
    """Documents, and the knowledge base that is built from them."""

    path: Path = Field(description="The knowledge base's folder.")
    documents: tuple[Path, ...] = Field(
        description="A file or folder, or several; a folder is read whole, or as BEIR if it is that.",
        json_schema_extra={"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
    )
    columns: ColumnSettings = ColumnSettings()
    encoding: str = Field("utf-8", description="Encoding of text files.")
    on_error: Literal["stop", "skip"] = Field("stop", description="What a file that cannot be read does.")
    chunk: ChunkSettings | None = Field(
        ChunkSettings(), description="null: rows of .jsonl, .csv and .parquet are passages as they stand."
    )
    encoder: EncoderSettings = EncoderSettings()
    vectors: VectorSettings | None = Field(None, description="Take these instead of encoding; needs `chunk: null`.")
    indexes: dict[str, IndexSettings] = Field(default_factory=_default_indexes)

    @model_validator(mode="after")
    def _vectors_belong_to_rows(self) -> KnowledgeSettings:
        if self.vectors is not None and self.chunk is not None:
            raise ValueError("vectors belong to passages as they stand in the files: set chunk: null")
        return self

    @field_validator("documents", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _parts_exist(self) -> KnowledgeSettings:
        for name, index in self.indexes.items():
            if isinstance(index, HybridIndex):
                for part in index.of:
                    if part not in self.indexes or isinstance(self.indexes[part], HybridIndex):
                        plain = [n for n, i in self.indexes.items() if not isinstance(i, HybridIndex)]
                        raise ValueError(f"index {name!r} fuses {part!r}, which is none of {', '.join(plain)}")
        return self

    @property
    def own_encoders(self) -> dict[str, EncoderSettings]:
        """Of the dense indexes that have one of their own."""
        dense = {name: index for name, index in self.indexes.items() if isinstance(index, DenseIndex)}
        return {name: index.encoder for name, index in dense.items() if index.encoder is not None}

    @property
    def own_query_models(self) -> tuple[str, ...]:
        """Query towers of own encoders that are other models."""
        return tuple(own.query_model for own in self.own_encoders.values() if own.query_model is not None)
