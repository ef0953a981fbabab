"""Settings of the grid: query encoder {base, tuned} × generator {base, tuned}, on several tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from raglan.recipe.base import Settings
from raglan.recipe.decode import DecodeSettings

__all__ = ["GridFolders", "GridSettings", "GridTask"]


class GridTask(Settings):
    """One task: questions with answers, how they are answered and by what they are measured."""

    questions: Path = Field(description="Held-out questions, .jsonl or .jsonl.gz, or a BEIR folder.")
    metric: Literal["em", "f1", "accuracy", "rouge_l"] = Field("em", description="`accuracy` for multiple choice.")
    limit: int | None = Field(None, ge=1, description="Use so many questions, drawn with the seed; the paper used 2,500.")
    decode: DecodeSettings | None = Field(None, description="Default the recipe's.")


class GridFolders(Settings):
    """Tuned parts that no stage of this recipe made."""

    query_encoder: Path | None = Field(None, description="A query tower that raglan has tuned.")
    generator: Path | None = Field(None, description="A generator's folder, or an adapter's.")


class GridSettings(Settings):
    """Both query encoders with both generators, measured on the same questions."""

    tasks: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")], GridTask] = Field(min_length=1)
    base: tuple[str, ...] = Field((), description="Stages that the base is made by; default none, the recipe's own parts.")
    query_encoder: str | None = Field(
        None, description="The stage whose query encoder is the tuned one; default the last that learns one."
    )
    generator: str | None = Field(None, description="The same of the generator.")
    folders: GridFolders = Field(GridFolders(), description="Tuned parts by folder, before those of stages.")
    closed_book: bool = Field(False, description="Also each generator without passages.")
    concat: bool = Field(False, description="Also each cell with all passages in one prompt.")
    k: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 5, 10), min_length=1, description="Depths of recall@k.")
    resamples: int = Field(10_000, ge=100, description="Of the bootstrap over questions.")
