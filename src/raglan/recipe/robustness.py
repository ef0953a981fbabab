"""Settings of what is measured beyond clean questions: worse passages, other retrievers, other orders; and of the judge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from raglan.recipe.base import Settings
from raglan.recipe.calls import EndpointSettings, MoneySettings

__all__ = ["JudgeSettings", "NoiseKind", "RobustnessSettings"]

NoiseKind = Literal["hard", "neighbour", "random", "other_gold", "counterfactual", "near_duplicate", "garbled", "boilerplate"]
Share = Annotated[float, Field(ge=0, le=1)]


class RobustnessSettings(Settings):
    """The questions of `evaluate` again: under noise, in other orders, by other retrievers."""

    correct: Literal["match", "em"] = Field(
        "match", description="An answer is right if it holds a gold answer as whole words (`match`), or is one (`em`)."
    )
    noise: tuple[NoiseKind, ...] = Field(
        ("hard", "random"),
        description="Kinds of noise, each by itself. `counterfactual`, `near_duplicate` and `garbled` are made from gold and "
        "stand only beside it; `counterfactual` also tries one gold passage, and two that "
        "answer, against one false one.",
    )
    ratios: tuple[Share, ...] = Field(
        (0.0, 0.25, 0.5, 0.75, 1.0), description="Shares of the retrieved passages that give way to noise."
    )
    gold: tuple[Literal["present", "absent"], ...] = Field(
        ("present", "absent"), min_length=1, description="Whether the gold passages are among the others."
    )
    distractors: tuple[Annotated[int, Field(ge=0, le=100)], ...] = Field(
        (0, 2, 4), description="Numbers of passages of one kind of noise beside the gold ones."
    )
    distractor_kinds: tuple[NoiseKind, ...] | None = Field(
        None, description="Kinds that are counted so; default all of `noise`. Each costs one condition a number."
    )
    position: Literal["uniform", "first", "middle", "last", "rank"] = Field(
        "uniform", description="Of gold; `uniform` deals all positions evenly over the questions."
    )
    orders: int = Field(4, ge=0, le=24, description="Permutations of the retrieved passages; below 2 for none.")
    retrievers: tuple[str, ...] | None = Field(None, description="Indexes that answer in turn; default all, [] none.")
    unseen: tuple[str, ...] = Field((), description="Of these, the ones that no training searched with, and synthesis neither.")
    depth: int = Field(30, ge=2, le=1000, description="Ranks that hard noise is taken from.")

    @model_validator(mode="after")
    def _hangs_together(self) -> RobustnessSettings:
        for name in ("noise", "ratios", "gold", "distractors", "distractor_kinds", "retrievers", "unseen"):
            values = getattr(self, name) or ()
            if len(set(values)) < len(values):
                raise ValueError(f"{name} has a value twice")
        if self.retrievers is not None and (strange := set(self.unseen) - set(self.retrievers)):
            raise ValueError(f"unseen names {sorted(strange)[0]!r}, which is not in retrievers")
        return self


class JudgeSettings(Settings):
    """A chat model that judges answers with their passages. It costs money, and its name stands beside its figures."""

    endpoint: EndpointSettings
    money: MoneySettings = MoneySettings()
    rubric: bool = Field(True, description="Score every system's answers from 1 to 5.")
    pairwise: bool = Field(True, description="Compare first and last system, in both orders.")
    mode: Literal["closed_book", "gold", "retrieved"] = Field("retrieved", description="Whose answers are judged.")
    teacher: str | None = Field(
        None, description="The model that wrote training data: a judge of its family is warned of, as of `synthesis.teacher`'s."
    )
    labels: Path | None = Field(None, description="Hand labels, a .csv with id, system and score (1 to 5), for κ.")
