"""Settings of a sweep over cached Self-RAG candidates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from raglan.recipe.base import Settings
from raglan.recipe.self_rag import PruneSettings, Required

__all__ = ["ONLY_LONG", "ONLY_SHORT", "TRIED", "SweepSettings"]

Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
AS_DECODE = "Default as in decode"
BOTH = (
    "threshold", "seq", "rel", "sup", "use", "k", "require", "on_empty", "prune", "rule", "absent", "seq_mode", "seq_tokens",
)  # fmt: skip
ONLY_SHORT = ("aggregate", "all_irrelevant", "abstain_margin")
ONLY_LONG = ("beam", "max_segments", "combine")
TRIED = (*BOTH, *ONLY_SHORT, *ONLY_LONG)  # the axes of the grid


class SweepSettings(Settings):
    """What `raglan evaluate --sweep` tries, and what it is good at: every combination, or `draws` of them.

    In the long form only what is given here is tried, and the rest is as in decode.
    """

    questions: Path | None = Field(None, description="Development questions; default evaluate.questions.")
    limit: int | None = Field(None, ge=1, description="Use so many questions, drawn with the seed.")
    metric: Literal["em", "f1", "accuracy", "rouge_l"] = Field("em", description="The quality that is looked at.")
    threshold: tuple[Share, ...] = Field((0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), min_length=1)
    seq: tuple[Weight, ...] = Field((0.0, 1.0), min_length=1, description="Weights to try; rel, sup and use likewise.")
    rel: tuple[Weight, ...] = Field((0.5, 1.0, 2.0), min_length=1)
    sup: tuple[Weight, ...] = Field((0.5, 1.0, 2.0), min_length=1)
    use: tuple[Weight, ...] = Field((0.0, 0.5, 1.0), min_length=1)
    k: tuple[Count, ...] = Field((), description="Passages; default retriever.k, which none may exceed.")
    require: tuple[Required, ...] = Field(
        (), description=f"Hard constraints, as in [[], [supported], [relevant, min_use: 3]]. {AS_DECODE}, as all below."
    )
    on_empty: tuple[Literal["relax", "no_retrieval", "drop"], ...] = ()
    prune: tuple[PruneSettings, ...] = Field((), description="`bound` changes no answer, and is nothing to try.")
    rule: tuple[Literal["two_way", "three_way"], ...] = ()
    absent: tuple[Literal["zero", "neutral"], ...] = ()
    seq_mode: tuple[Literal["exp_mean", "mean_logprob", "prob"], ...] = Field((), description="What decode calls `seq`.")
    seq_tokens: tuple[Literal["all", "text"], ...] = ()
    aggregate: tuple[Literal["sum", "max", "mean", "logsumexp"], ...] = Field((), description="Short form, with decode.labels.")
    all_irrelevant: tuple[Literal["best", "no_retrieval", "abstain"], ...] = Field((), description="Short form.")
    abstain_margin: tuple[Weight, ...] = Field((), description="Short form, with decode.labels.")
    beam: tuple[Count, ...] = Field((), description="Long form; `--cache` searches with the widest.")
    max_segments: tuple[Count, ...] = Field((), description="Long form; `--cache` searches to the deepest.")
    combine: tuple[Literal["mean", "sum", "product", "by_component"], ...] = Field((), description="Long form.")
    draws: int | None = Field(None, ge=1, description="Try so many combinations, drawn with the seed; default all of them.")

    @model_validator(mode="after")
    def _no_twice(self) -> SweepSettings:
        for name in TRIED:
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} has a value twice")
        if any(one.kind == "bound" for one in self.prune):
            raise ValueError("prune: bound changes no answer, so there is nothing to try")
        return self
