"""Settings of the objectives: what is minimised, and which parts learn."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raglan.recipe.base import Settings
from raglan.recipe.decode import TurnSettings

__all__ = [
    "AnswerObjective",
    "LearnedTurns",
    "LsrObjective",
    "MarginalObjective",
    "ObjectiveSettings",
    "StalenessSettings",
]


Tokens = Annotated[
    Literal["all", "first"],
    Field(description="What of an answer is learned: all with the end token, or its first token alone, as `classify` reads."),
]


class LearnedTurns(TurnSettings):
    """RAG-Turn in training."""

    loss: Literal["joint", "separate"] = Field(
        "joint", description="`separate`, for doc_only: each turn's own loss, weighted; an upper bound of the joint one."
    )

    @model_validator(mode="after")
    def _turns_part_only_in_doc_only(self) -> LearnedTurns:
        if self.loss == "separate" and self.kind != "doc_only":
            raise ValueError("loss separate needs kind doc_only")
        return self


class AnswerObjective(Settings):
    """Masked answer likelihood: the generator learns to use (and to ignore) passages."""

    kind: Literal["answer"]
    reduction: Literal["token", "example"] = Field("token", description="Divide by answer tokens, or average rows.")
    tokens: Tokens = "all"


class LsrObjective(Settings):
    """LM-supervised retrieval: the query encoder learns what the generator found useful."""

    kind: Literal["lsr"]
    k: int = Field(10, ge=2, description="Candidates a query, from the starting retriever, once.")
    direction: Literal["student_first", "target_first"] = "student_first"
    target: Literal["prob", "sum_logprob", "mean_logprob", "mean_prob"] = "prob"
    tau: float | None = Field(None, gt=0, description="Target temperature; 0.01 for prob and mean_prob, none for logs.")
    gamma: float | None = Field(None, gt=0, description="Retriever temperature; default 1 with dot, 0.05 with cosine.")
    candidates: str | None = Field(None, description="Index the candidates come from; default the retriever's.")
    score_eos: bool = Field(True, description="Whether the end token counts in the LM score.")

    @model_validator(mode="after")
    def _log_targets_name_tau(self) -> LsrObjective:
        if self.tau is None and "logprob" in self.target:
            raise ValueError(f"target {self.target} needs tau; usual: 0.1 for mean_logprob, 1 to 10 for sum_logprob")
        return self


class StalenessSettings(Settings):
    """What happens to the index while the passage encoder learns."""

    kind: Literal["accept", "rerank", "refresh"] = Field(
        description="`accept`: search the old vectors; `rerank`: search `pool` passages, encode them anew, keep the best k; "
        "`refresh`: encode the corpus anew every so many steps. Scores always come from fresh vectors."
    )
    pool: int = Field(32, ge=2, description="Passages searched for `rerank`.")
    every: int = Field(500, ge=1, description="Steps between two refreshes.")
    mode: Literal["async", "sync"] = Field("async", description="Refresh in the background, or stop training for it.")


Part = Literal["query_encoder", "passage_encoder", "prior", "generator"]


class MarginalObjective(Settings):
    """RAG, trained end to end: −log Σ_k p(z_k|x) p(y|x,z_k), over whole answers or token by token."""

    kind: Literal["marginal"]
    over: Literal["sequence", "token"]
    k: int = Field(5, ge=1, description="Passages a query, picked by the retriever as it is at that step.")
    reduction: Literal["token", "example", "sum"] = Field("token", description="transformers and the paper sum.")
    tokens: Tokens = "all"
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="ε, on the predictive mixture.")
    learn: tuple[Part, ...] = Field(
        ("query_encoder", "generator"), min_length=1,
        description="What learns. `prior` is the temperature and, where it is hybrid, the weight of BM25; with "
        "`passage_encoder` the index ages, and `staleness` says what is done about it.",
    )  # fmt: skip
    rates: dict[Part, float] = Field(
        default_factory=dict, description="Learning rates that differ from train.learning_rate, by part."
    )
    staleness: StalenessSettings | None = None
    freeze_retriever_steps: int = Field(0, ge=0, description="Encoders and prior start to learn after so many steps.")
    on_empty: Literal["closed_book", "skip"] = Field("closed_book", description="What a query without hits does.")
    turns: LearnedTurns | None = Field(None, description="RAG-Turn, for dialogue.")

    @model_validator(mode="after")
    def _rates_of_what_learns(self) -> MarginalObjective:
        for part in self.rates:
            if part not in self.learn:
                raise ValueError(f"rates names {part}, which is not in learn")
        if ("passage_encoder" in self.learn) != (self.staleness is not None):
            raise ValueError("staleness belongs to learn: [passage_encoder, …]: the index ages only if that learns")
        if self.freeze_retriever_steps and "generator" not in self.learn:
            raise ValueError("freeze_retriever_steps freezes all that learns: add generator to learn, or leave it out")
        if self.staleness is not None and self.staleness.kind == "rerank" and self.staleness.pool <= self.k:
            raise ValueError(f"staleness.pool is {self.staleness.pool}; reranking needs more than k, which is {self.k}")
        return self

    @model_validator(mode="after")
    def _one_mixture_is_smoothed(self) -> MarginalObjective:
        if self.label_smoothing and self.turns is not None and self.turns.kind == "doc_only":
            raise ValueError("label_smoothing smooths one mixture; doc_only has one a turn: use doc_then_turn, or 0")
        return self


ObjectiveSettings = Annotated[AnswerObjective | LsrObjective | MarginalObjective, Field(discriminator="kind")]
