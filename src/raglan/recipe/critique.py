"""Settings of Self-RAG's data: who judges, what is judged, what is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from raglan.recipe.base import Settings
from raglan.recipe.calls import EndpointSettings, MoneySettings

__all__ = [
    "ClosedSource",
    "CriticDataSettings",
    "CriticTeacher",
    "CritiqueSettings",
    "EncoderTeacher",
    "JudgementKind",
    "LessonSource",
    "QuestionSource",
    "RowSource",
    "RulesTeacher",
    "TellSource",
]

JudgementKind = Literal["retrieve", "retrieve_segment", "is_rel", "is_sup", "is_use"]
JUDGEMENTS: tuple[JudgementKind, ...] = ("retrieve", "retrieve_segment", "is_rel", "is_sup", "is_use")


class RulesTeacher(Settings):
    """Labels without a model: known answers and passages where a row has them, words in common where it has none."""

    kind: Literal["rules"]
    relevant: float = Field(0.5, gt=0, le=1, description="Share of the instruction's weighted words in a relevant passage.")
    fully: float = Field(0.85, gt=0, le=1, description="Share of a sentence's weighted words in a passage that supports it.")
    partially: float = Field(0.4, gt=0, le=1, description="The same for partial support.")
    common: float = Field(
        0.05, gt=0, le=1, description="Words that stand in more than this share of the passages do not ask for retrieval."
    )

    @model_validator(mode="after")
    def _partial_is_less(self) -> RulesTeacher:
        if self.partially >= self.fully:
            raise ValueError(f"partially is {self.partially:g}; it must be less than fully, {self.fully:g}")
        return self


class CriticTeacher(Settings):
    """A generator that another recipe trained on critic data: the likeliest label, with its probability."""

    kind: Literal["critic"]
    recipe: Path = Field(description="That recipe; the parts of its last finished stage are used.")


class EncoderTeacher(Settings):
    """A classifier a judgement, over words in common and the knowledge base's encoder; learned from the critic data."""

    kind: Literal["encoder"]
    c: float = Field(1.0, gt=0, description="Inverse strength of the L2 regularisation.")


Teacher = Annotated[RulesTeacher | EndpointSettings | CriticTeacher, Field(discriminator="kind")]
Annotator = Annotated[RulesTeacher | EndpointSettings | CriticTeacher | EncoderTeacher, Field(discriminator="kind")]


class _Source(Settings):
    released_as: Literal["nq", "fever", "wow", "other"] = Field(
        "other", description="Which of the odds of `select: released` count for this source."
    )


class _AskedSource(_Source):
    instruction: str = Field("", description="Stands before each question, joined by `separator`.")
    separator: str = Field("## Input:\n\n", description="Between instruction and question.")
    irrelevant: float = Field(
        0.5, ge=0, le=1, description="Share of the answered questions that give a second row, with an irrelevant passage."
    )
    irrelevant_says: Literal["answer", "abstention"] = Field(
        "answer", description="What stands behind that passage: the answer, as in the paper's rows, or `abstention`."
    )
    unsupported: float = Field(
        0.0, ge=0, le=1,
        description="Share of the answered questions that give a row with a wrong or half-right answer beside a relevant "
        "passage: its judgements are learned (else all of IsSup is `fully`), its answer is not.",
    )  # fmt: skip


class QuestionSource(_AskedSource):
    """Questions with short answers; those without any answer are answered by `abstention`."""

    kind: Literal["questions"]
    path: Path = Field(description="Questions, as everywhere.")
    limit: int | None = Field(None, ge=1, description="Use so many questions, drawn with the seed.")
    allow_test: bool = Field(False, description="Use even questions that `raglan split` put into the split `test`.")


class LessonSource(_AskedSource):
    """Reading lessons cut from the corpus, as `data.kind: lessons`: for a model that has never read."""

    kind: Literal["lessons"]
    count: int = Field(ge=1)


class RowSource(_Source):
    """Instructions with whole outputs: lines of {instruction, input, output}."""

    kind: Literal["rows"]
    path: Path = Field(description="A .jsonl file; `id` is optional, other fields are kept.")
    limit: int | None = Field(None, ge=1, description="Use so many rows, drawn with the seed.")
    separator: str = Field("## Input:\n\n", description="Between instruction and input.")


class TellSource(_Source):
    """Instructions to tell of a title, answered with sentences of the corpus itself: long rows without any model."""

    kind: Literal["tell"]
    count: int = Field(ge=1)
    sentences: int = Field(3, ge=1, description="At most so many sentences of each passage.")


class ClosedSource(_Source):
    """Small tasks with words and numbers, for which no passage is needed."""

    kind: Literal["closed"]
    count: int = Field(ge=1)


Source = Annotated[QuestionSource | LessonSource | RowSource | TellSource | ClosedSource, Field(discriminator="kind")]


class CriticDataSettings(Settings):
    """What the critic learns from."""

    most: int | None = Field(None, ge=1, description="Judgements of a kind that the teacher is asked for, drawn with the seed.")
    balance: float | None = Field(
        None, gt=0, lt=1, description="No label may have more than this share of a judgement's rows; the rest is drawn out."
    )
    labels: Literal["words", "tokens"] = Field(
        "words",
        description="What the critic answers: the label as a word, which is steadier with few rows, or the reflection token; "
        "the critic's recipe then has generator.vocabulary self_rag and prompt.self_rag.answers tokens.",
    )
    shares: dict[str, float] = Field(
        {"train": 0.8, "dev": 0.1, "test": 0.1}, description="Splits by instruction; `train` and `test` must be there."
    )
    second_pass: float = Field(
        0.1, ge=0, le=1, description="Share of the judgements that the teacher is asked for a second time, for agreement and κ."
    )
    audit: int = Field(50, ge=0, description="Rows of each judgement in audit.csv, for people.")

    @model_validator(mode="after")
    def _splits_are_there(self) -> CriticDataSettings:
        if not {"train", "test"} <= set(self.shares):
            raise ValueError(f"shares has {', '.join(self.shares)}; it must have train and test")
        return self


class CritiqueSettings(Settings):
    """Self-RAG's data: a teacher's labels, the critic's training data, and the generator's annotated rows."""

    path: Path = Field(description="The folder to write: critic/, annotation/, and what was asked for already.")
    teacher: Teacher = RulesTeacher(kind="rules")
    annotator: Annotator | None = Field(None, description="Who labels the generator's rows; default the teacher.")
    money: MoneySettings = Field(MoneySettings(), description="What calls to an endpoint cost, and may cost together.")
    sources: dict[str, Source] = Field(min_length=1, description="Where rows come from, by name.")
    judgements: tuple[JudgementKind, ...] = Field(JUDGEMENTS, min_length=1, description="What critic data holds.")
    critic: CriticDataSettings | None = CriticDataSettings()
    k: int = Field(10, ge=1, description="Passages that are retrieved for a row, and for each of its sentences.")
    short: int = Field(30, ge=1, description="Sentences of fewer characters stay untagged in outputs of more than two.")
    relevance_sees: Literal["instruction", "preceding"] = Field(
        "instruction", description="Whether a passage's relevance is judged beside the sentences before it, too."
    )
    select: Literal["paper", "released"] = Field(
        "paper", description="`paper`: the best-ranked passage that is relevant and supports, else one drawn; `released` also "
        "leaves rows out by the odds of the authors' program.",
    )  # fmt: skip
    abstention: str = Field("I don't know", min_length=1, description="The output of rows without an answer.")
    shares: dict[str, float] = Field({"train": 0.9, "dev": 0.1}, description="Files of annotated rows, by instruction.")

    @model_validator(mode="after")
    def _an_encoder_learns_from_something(self) -> CritiqueSettings:
        if isinstance(self.annotator, EncoderTeacher):
            missing = [kind for kind in JUDGEMENTS if kind not in self.judgements]
            if self.critic is None or missing:
                told = "critic: null" if self.critic is None else f"judgements without {', '.join(missing)}"
                raise ValueError(f"annotator encoder learns from critic data of every judgement, and there is {told}")
        return self
