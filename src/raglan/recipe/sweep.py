"""Settings of a sweep over cached Self-RAG candidates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from raglan.recipe.base import Settings

__all__ = ["SweepSettings"]

Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]


class SweepSettings(Settings):
    """What `raglan evaluate --sweep` tries, and what it is good at: every combination, or `draws` of them."""

    questions: Path | None = Field(None, description="Development questions; default evaluate.questions.")
    limit: int | None = Field(None, ge=1, description="Use so many questions, drawn with the seed.")
    metric: Literal["em", "f1", "accuracy", "rouge_l"] = Field("em", description="The quality that is looked at.")
    threshold: tuple[Share, ...] = Field((0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), min_length=1)
    seq: tuple[Weight, ...] = Field((0.0, 1.0), min_length=1, description="Weights to try; rel, sup and use likewise.")
    rel: tuple[Weight, ...] = Field((0.5, 1.0, 2.0), min_length=1)
    sup: tuple[Weight, ...] = Field((0.5, 1.0, 2.0), min_length=1)
    use: tuple[Weight, ...] = Field((0.0, 0.5, 1.0), min_length=1)
    k: tuple[Annotated[int, Field(ge=1)], ...] = Field((), description="Passages; default retriever.k, which none may exceed.")
    aggregate: tuple[Literal["sum", "max", "mean", "logsumexp"], ...] = Field(
        (), description="With decode.labels; default decode.aggregate."
    )
    draws: int | None = Field(None, ge=1, description="Try so many combinations, drawn with the seed; default all of them.")

    @model_validator(mode="after")
    def _no_twice(self) -> SweepSettings:
        for name in ("threshold", "seq", "rel", "sup", "use", "k", "aggregate"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} has a value twice")
        return self
