"""Settings of what is learned from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from raglan.recipe.base import Settings

__all__ = [
    "AnswersAre",
    "Data",
    "LessonData",
    "QuestionData",
]


AnswersAre = Annotated[
    Literal["text", "regex"],
    Field(
        description="With `regex` each answer is a pattern: learned is its commonest match, and measured is whether it fits."
    ),
]


class QuestionData(Settings):
    """Rows from questions with answers."""

    kind: Literal["questions"]
    path: Path = Field(description="Questions with answers, .jsonl or .jsonl.gz.")
    dev: Path | None = Field(None, description="Held-out questions for the validation loss or the validation search.")
    source: Literal["gold", "mixed", "retrieved"] = Field(
        "mixed", description="Which passages a row holds: relevant ones, relevant plus retrieved, or only retrieved."
    )
    passages: int = Field(3, ge=1, description="Passages a question.")
    passages_a_row: int | None = Field(None, ge=1, description="Default all in one row; 1 is RA-DIT's one row a passage.")
    answers: Literal["first", "each", "random"] = Field(
        "first", description="Train on the first answer, on one drawn with the seed, or on a row for each."
    )
    answers_found_in: int | None = Field(
        None, ge=1, description="Train only on answers that occur in so many passages of the search, as TriviaQA is."
    )
    answers_are: AnswersAre = "text"
    limit: int | None = Field(None, ge=1, description="Use so many questions, drawn with the seed.")


class LessonData(Settings):
    """Self-supervised reading lessons cut from the corpus: a span is hidden in a sentence and asked for."""

    kind: Literal["lessons"]
    count: int = Field(4000, ge=1, description="Lessons.")
    passages: int = Field(1, ge=1, description="Passages a lesson: its own and distractors of the same corpus.")
    dev: Path | None = Field(None, description="Questions for the validation loss.")


Data = Annotated[QuestionData | LessonData, Field(discriminator="kind")]
