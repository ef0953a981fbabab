"""Settings of the objectives: what is minimised, and which parts learn."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from raglan.recipe.base import Settings
from raglan.recipe.decode import TurnSettings
from raglan.recipe.parts import ScorerSettings

__all__ = [
    "AnswerObjective",
    "LearnedTurns",
    "LsrObjective",
    "MarginalObjective",
    "ObjectiveSettings",
    "StalenessSettings",
    "TargetSettings",
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


Group = Literal["retrieve", "is_rel", "is_sup", "is_use", "text", "markup", "eos"]


class AnswerObjective(Settings):
    """Masked answer likelihood: the generator learns to use (and to ignore) passages."""

    kind: Literal["answer"]
    reduction: Literal["token", "example"] = Field("token", description="Divide by answer tokens, or average rows.")
    tokens: Tokens = "all"
    group_weights: dict[Group, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, description="Of `self_rag` rows: what the losses of a token group are multiplied by; default 1."
    )
    off_grammar: float = Field(
        0.0, ge=0, description="Of `self_rag` rows: weight of a loss against all that their grammar does not admit."
    )
    repeats: float = Field(
        0.0, ge=0, description="Of `self_rag` rows: weight of a loss against what a segment's text has said already."
    )
    hold: float = Field(
        0.0, ge=0, description="λ of λ·KL(generator as the stage begins ‖ generator), over the vocabulary at each answer token."
    )
    hold_rows: Literal["all", "replayed"] = Field(
        "all", description="The rows that `hold` counts on; `replayed` are those of `data.replay`."
    )

    @model_serializer(mode="wrap")
    def _as_before_there_was_hold(self, usual: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without it nothing is told of it, so that stages which were trained before there was such a setting are found."""
        told: dict[str, Any] = usual(self)
        return told if self.hold else {name: value for name, value in told.items() if name not in ("hold", "hold_rows")}


Target = Literal["prob", "sum_logprob", "mean_logprob", "mean_prob", "given"]
USUAL_TAU = "usual: 0.1 for mean_logprob, 1 to 10 for sum_logprob, 1 for given grades"


def _check_tau(target: str, tau: float | None) -> None:
    if tau is None and ("logprob" in target or target == "given"):
        raise ValueError(f"target {target} needs tau; {USUAL_TAU}")


def _never_or_steps(value: Any) -> Any:
    if value != "never" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError("refresh must be never, or a number of steps")
    return value


class TargetSettings(Settings):
    """Another target for the rows of one source of data."""

    target: Target
    tau: float | None = Field(None, gt=0, description="As in `lsr`.")

    @model_validator(mode="after")
    def _named_tau(self) -> TargetSettings:
        _check_tau(self.target, self.tau)
        return self


# What published methods chose, in the words of the settings below. Explicit keys beside a preset win.
PRESETS: dict[str, dict[str, Any]] = {
    "ra_dit": {"k": 10, "direction": "student_first", "target": "prob", "tau": 0.01, "gamma": 1.0},
    "replug": {"k": 20, "direction": "student_first", "target": "prob", "tau": 0.1, "gamma": 0.1},
    "pdist": {"direction": "target_first", "target": "mean_logprob", "tau": 0.01, "gamma": 0.01, "divide_by": "sqrt_d"},
    "emdr2": {"loss": "marginal", "over": "sequence"},
    "loop": {"evidence": "left_out", "direction": "target_first", "target": "sum_logprob", "tau": 1.0},
    "adist": {"evidence": "attention", "direction": "target_first", "target": "given", "tau": 0.01},
}


class LsrObjective(Settings):
    """LM-supervised retrieval: the query encoder learns what the generator found useful."""

    kind: Literal["lsr"]
    preset: Literal["ra_dit", "replug", "pdist", "emdr2", "loop", "adist"] | None = Field(
        None, exclude=True, description="Settings of a published method, written out before anything else; explicit keys win."
    )
    k: int = Field(10, ge=2, description="Candidates a query, from the starting retriever, once.")
    loss: Literal["divergence", "marginal"] = Field(
        "divergence", description="KL between retriever and target, or `marginal`'s −log p(y|x) with the generator held still."
    )
    direction: Literal["student_first", "target_first"] = "student_first"
    evidence: Literal["alone", "left_out", "attention"] = Field(
        "alone",
        description="What tells a passage's use: the answer's probability with it alone; with all the others but it, turned "
        "round; or the attention that a sequence-to-sequence generator pays it, all K in one prompt.",
    )
    target: Target = Field("prob", description="`given`: the grades that people gave passages, or the attention.")
    tau: float | None = Field(None, gt=0, description="Target temperature; 0.01 for prob and mean_prob, none for others.")
    gamma: float | None = Field(None, gt=0, description="Retriever temperature; default 1 with dot, 0.05 with cosine.")
    divide_by: Literal["one", "sqrt_d"] = Field("one", description="`sqrt_d`: γ is multiplied by √D, as Atlas has it.")
    over: Literal["sequence", "token"] = Field("sequence", description="For loss marginal.")
    flat: Literal["keep", "skip"] = Field("keep", description="`skip`: targets without a preference take no part.")
    answers: Literal["first", "any"] = Field("first", description="`any`: the sum over all gold answers' probabilities.")
    corpus_halves: TargetSettings | None = Field(None, description="The target of rows made from the corpus itself.")
    candidates: str | None = Field(None, description="Index the candidates come from; default the retriever's.")
    refresh: Annotated[Literal["never"] | int, BeforeValidator(_never_or_steps)] = Field(
        "never", description="Search for candidates anew every so many steps; only unseen pairs are scored."
    )
    learn: Literal["query_encoder", "both"] = "query_encoder"
    over_retrieve: int | None = Field(
        None, ge=2, description="For learn both: passages taken from the index as it is, encoded anew and ranked again."
    )
    refresh_index: tuple[tuple[int, int | None, int], ...] = Field(
        (), description="For learn both: [from, to, every], steps between which the index is built anew every so many."
    )
    score_eos: bool = Field(True, description="Whether the end token counts in the LM score.")
    scorer: ScorerSettings | None = Field(None, description="Who scores; default the generator.")
    patience: int | None = Field(None, ge=1, description="Stop after so many evaluations in a row without a better figure.")

    @model_validator(mode="before")
    @classmethod
    def _written_out(cls, given: Any) -> Any:
        """A preset's settings under the explicit ones; its tau belongs to its own target."""
        if not isinstance(given, dict) or given.get("preset") not in PRESETS:
            return given
        preset = dict(PRESETS[given["preset"]])
        if given.get("target", preset.get("target")) != preset.get("target"):
            preset.pop("tau", None)
        return {**preset, **given}

    @model_validator(mode="after")
    def _target_fits(self) -> LsrObjective:
        if self.loss == "divergence":
            _check_tau(self.target, self.tau)
        if self.evidence == "left_out" and "logprob" not in self.target:
            raise ValueError("evidence left_out needs target sum_logprob or mean_logprob: it is a negative log-probability")
        if self.evidence == "attention" and self.target != "given":
            raise ValueError("evidence attention is no probability: target given")
        if self.evidence == "attention" and self.scorer is not None:
            raise ValueError("evidence attention is the generator's own: leave out scorer")
        if self.loss == "marginal" and (self.evidence != "alone" or self.target == "given"):
            raise ValueError(
                "loss marginal needs the answer's probabilities with each passage: evidence alone, no given target"
            )
        if self.loss == "marginal" and self.flat == "skip":
            raise ValueError("flat skip is for loss divergence: a posterior is no target that could be flat")
        if self.loss == "marginal" and self.over == "token" and self.answers == "any":
            raise ValueError("over token reads one answer's tokens: answers first")
        return self

    @model_validator(mode="after")
    def _index_ages_only_with_passages(self) -> LsrObjective:
        stale = self.over_retrieve is not None or bool(self.refresh_index)
        if self.learn == "query_encoder" and stale:
            raise ValueError("over_retrieve and refresh_index are for learn both: otherwise the index does not age")
        if self.learn == "both" and not stale:
            raise ValueError("learn both makes the index old: give over_retrieve or refresh_index")
        if self.over_retrieve is not None and self.over_retrieve <= self.k:
            raise ValueError(f"over_retrieve is {self.over_retrieve}; it must exceed k, which is {self.k}")
        for first, last, every in self.refresh_index:
            if first < 0 or every < 1 or (last is not None and last <= first):
                raise ValueError(f"refresh_index holds {[first, last, every]}; needed are [from, to, every], 0 ≤ from < to")
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
