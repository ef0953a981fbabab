"""Settings of what keeps evaluation questions out of training data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from raglan.recipe.base import Settings
from raglan.recipe.knowledge import EncoderSettings

__all__ = ["DecontaminateSettings", "EvaluationSet"]


class EvaluationSet(Settings):
    """Questions that are measured somewhere, so that nothing may be trained on them."""

    path: Path = Field(description="The questions, as everywhere; BEIR folders with their split `test`.")
    knowledge: Path | None = Field(None, description="The knowledge base whose passages their `relevant` names, for D5.")


def _named(value: Any) -> Any:
    """`nq: nq.jsonl` is short for `nq: {path: nq.jsonl}`."""
    return {"path": value} if isinstance(value, str | Path) else value


Registered = Annotated[EvaluationSet, BeforeValidator(_named, json_schema_input_type=str | EvaluationSet)]


class DecontaminateSettings(Settings):
    """Evaluation sets, and how near training questions may come to them: `raglan check-leaks`."""

    sets: dict[str, Registered] = Field(default_factory=dict, description="All that are registered, by name.")
    missing: tuple[str, ...] = Field((), description="Sets whose files may be missing; any other one that is stops the check.")
    runs: float = Field(0.70, gt=0, le=1, description="D2: share of an evaluation question's runs of three words.")
    words: float = Field(0.30, gt=0, le=1, description="D3: Jaccard index of the words of questions of one answer.")
    meaning: float = Field(0.90, gt=0, le=1, description="D4: cosine of the questions' embeddings.")
    passage: float = Field(0.50, gt=0, le=1, description="D5: share of an evaluation passage's runs of eight words.")
    encoder: EncoderSettings | None = Field(None, description="A multilingual encoder for D4; null leaves D4 out.")

    @model_validator(mode="after")
    def _missing_sets_are_registered(self) -> DecontaminateSettings:
        for name in self.missing:
            if name not in self.sets:
                raise ValueError(f"missing names {name!r}; registered are {', '.join(self.sets) or 'none'}")
        return self
