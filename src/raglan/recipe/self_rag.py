"""Settings of the Self-RAG decodings, short form and long form."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, model_validator

from raglan.recipe.base import Settings, number

__all__ = [
    "RELEASED",
    "CalibrationSettings",
    "PruneSettings",
    "RequireSettings",
    "Required",
    "SelfRagDecode",
    "WeightSettings",
    "task_prompts",
]

Released = Literal["decision", "use", "path", "siblings", "missing", "stop", "ignore_cont"]
RELEASED = {"short": {"decision", "stop"}, "long": {"decision", "use", "path", "siblings", "missing", "stop", "ignore_cont"}}
Number = Annotated[float, BeforeValidator(number)]
LIMITS = {"short": 100, "closed": 50, "long": 200}  # new tokens, of a segment in the long form
ONLY_SHORT = {"all_irrelevant", "options", "labels", "aggregate", "abstain_margin", "samples"}
ONLY_LONG = {
    "passages", "query", "dedup", "beam", "max_segments", "combine", "keep_passages", "on_length", "slots", "n_best",
    "absent_step", "max_total_tokens", "max_passages", "max_calls", "stop",
}  # fmt: skip


@cache
def task_prompts() -> dict[str, str]:
    """Name (`released/pubhealth`) → what Self-RAG's authors say before a task's questions, with {question} in its place."""
    told = yaml.safe_load(Path(__file__).with_name("self_rag_tasks.yaml").read_text(encoding="utf-8"))
    return {f"{source}/{task}": text for source, tasks in told.items() for task, text in tasks.items()}


def _instruction(value: Any) -> Any:
    if not isinstance(value, str) or not re.fullmatch(r"(released|paper)/\S*", value):
        return value
    if value not in task_prompts():
        raise ValueError(f"{value!r} is none of {', '.join(task_prompts())}")
    return task_prompts()[value]


class WeightSettings(Settings):
    """What a candidate's score is made of: w_seq·seq + w_rel·rel + w_sup·sup + w_use·use."""

    seq: float = Field(1.0, ge=0, description="Of the generated tokens' probability.")
    rel: float = Field(1.0, ge=0, description="Of the passage being relevant.")
    sup: float = Field(1.0, ge=0, description="Of the passage supporting the text.")
    use: float = Field(0.5, ge=0, description="Of the answer being useful, from −1 to 1.")


class PruneSettings(Settings):
    """Which passages are read on after their relevance is known, which costs nothing more than reading them."""

    kind: Literal["none", "top_m", "tau", "bound"] = Field(
        "none",
        description="All; the `m` most relevant; those of at least `tau`, and never none; or all but those whose score "
        "cannot reach the best one any more (`bound`, which changes no open answer).",
    )
    m: int | None = Field(None, ge=1)
    tau: float | None = Field(None, ge=0, le=1)
    wave: int = Field(2, ge=1, description="With `bound`: how many passages of a question are read on at a time.")

    @model_validator(mode="after")
    def _has_its_number(self) -> PruneSettings:
        for kind, name in (("top_m", "m"), ("tau", "tau")):
            given = getattr(self, name) is not None
            if given != (self.kind == kind):
                raise ValueError(f"prune.kind {self.kind} {'has no' if given else 'needs'} {name}")
        if "wave" in self.model_fields_set and self.kind != "bound":
            raise ValueError("prune.wave belongs to kind bound")
        return self


class CalibrationSettings(Settings):
    """r → P(retrieval is needed), fitted on labelled questions."""

    kind: Literal["temperature", "isotonic"]
    temperature: float | None = Field(None, gt=0, description="σ(logit(r) ÷ temperature).")
    x: tuple[float, ...] = Field((), description="isotonic: values of r, rising.")
    y: tuple[float, ...] = Field((), description="isotonic: what each of them means, never falling; straight lines between.")

    @model_validator(mode="after")
    def _is_whole(self) -> CalibrationSettings:
        if self.kind == "temperature" and (self.temperature is None or self.x or self.y):
            raise ValueError("calibration.kind temperature needs temperature, and no x and y")
        if self.kind == "isotonic":
            if self.temperature is not None or len(self.x) < 2 or len(self.x) != len(self.y):
                raise ValueError("calibration.kind isotonic needs x and y of one length, two or more, and no temperature")
            rising = all(a < b for a, b in zip(self.x, self.x[1:], strict=False))
            if not rising or any(a > b for a, b in zip(self.y, self.y[1:], strict=False)):
                raise ValueError("calibration: x must rise and y must not fall")
        return self


class RequireSettings(Settings):
    """What an answer, or a segment during the search, must be. One that breaks it is dropped with all that would follow."""

    relevant: bool = Field(False, description="IsRel is Relevant.")
    supported: bool = Field(False, description="IsSup is fully or partially.")
    fully: bool = Field(False, description="IsSup is fully.")
    min_use: int | None = Field(None, ge=1, le=5, description="IsUse, where it was generated, is at least this.")

    @property
    def any(self) -> bool:
        """Whether anything is required."""
        return self.relevant or self.supported or self.fully or self.min_use is not None


def _required(value: Any) -> Any:
    """A list as in `[relevant, supported, min_use: 3]` is the mapping."""
    if not isinstance(value, list | tuple):
        return value
    found: dict[str, Any] = {}
    for item in value:
        found.update(item if isinstance(item, dict) else {str(item): True})
    return found


Required = Annotated[RequireSettings, BeforeValidator(_required)]


def _texts(value: Any) -> Any:
    value = () if value is None else value
    if isinstance(value, list | tuple) and any(isinstance(item, bool) for item in value):
        raise ValueError("the list holds true or false, which is what YAML makes of yes and no: put them in quotes")
    return [str(item) if isinstance(item, int) else item for item in value] if isinstance(value, list | tuple) else value


Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]


class SelfRagDecode(Settings):
    """Self-RAG: the generator's own probabilities say whether to retrieve, and which passage's answer is the best."""

    kind: Literal["self_rag"]
    form: Literal["short", "long"] = Field("short", description="One answer a passage, or a tree of segments.")
    # to retrieve or not
    retrieve: Literal["adaptive", "always", "never"] = "adaptive"
    rule: Literal["two_way", "three_way"] = Field(
        "two_way", description="r = p_R / (p_R + p_N), or also + p_C. Retrieve where r is above `threshold`."
    )
    threshold: Number | None = Field(
        0.2, ge=0, le=1, description="δ; null retrieves where [Retrieval] is the likeliest token of all."
    )
    target_rate: float | None = Field(
        None, gt=0, le=1,
        description="In place of `threshold`: δ is the (1 − rate) quantile of r over the questions asked together.",
    )  # fmt: skip
    calibration: CalibrationSettings | None = None
    # scores
    weights: WeightSettings = WeightSettings()
    seq: Literal["exp_mean", "mean_logprob", "prob"] = Field("exp_mean", description="How tokens become one number.")
    seq_tokens: Literal["all", "text"] = Field("all", description="`text` leaves reflection tokens and the end token out.")
    absent: Literal["zero", "neutral"] = Field(
        "zero", description="IsSup or IsUse where none was generated: 0, or ½ and 0, which say nothing."
    )
    missing: Literal["error", "floor", "neutral"] | None = Field(
        None, description="Where a group's probabilities did not come back whole; default `error` where they always do, "
        "else `floor`.",
    )  # fmt: skip
    force_isrel: bool = Field(False, description="The first token behind a passage is an IsRel token.")
    absent_step: Literal["inherit", "zero"] | Number = Field(
        "inherit",
        description="The rel and sup of a segment without its own passage: its parent's, 0, or a constant for the step.",
    )
    # generation
    instruction: Annotated[str, BeforeValidator(_instruction)] = Field(
        "",
        description="Stands before the question, with `prompt.self_rag.separator` between them, or holds {question}. Or one of "
        "the authors' own, by name: `released/` or `paper/` and pubhealth, arc, asqa, eli5 (released), bio (paper).",
    )
    max_new_tokens: int | None = Field(
        None,
        ge=1,
        description=f"A passage's answer, or a segment's; default {LIMITS['short']}, {LIMITS['closed']} with `labels`, and "
        f"{LIMITS['long']} in the long form.",
    )
    temperature: float = Field(0.0, ge=0, description="0 is greedy. Scores always read the raw probabilities.")
    seed: int = 0
    prune: PruneSettings = PruneSettings()
    require: Required = Field(RequireSettings(), description="Hard constraints, as in [relevant, supported, min_use: 3].")
    require_by: Literal["token", "probability"] = Field("token", description="Judged by the token written, or the likeliest.")
    on_empty: Literal["relax", "no_retrieval", "drop"] = Field(
        "relax", description="Where no answer, or no child, satisfies `require`: keep the best, go without passages, or none."
    )
    # short form
    samples: int = Field(1, ge=1, description="Answers a passage, drawn.")
    all_irrelevant: Literal["best", "no_retrieval", "abstain"] = Field(
        "best", description="Where every passage is likelier irrelevant than relevant."
    )
    options: Texts = Field(
        (), description="Answers that are scored instead of written, for questions without choices of their own."
    )
    labels: Texts = Field((), description="A closed set: answers that say one of these are one, their scores aggregated.")
    aggregate: Literal["sum", "max", "mean", "logsumexp"] = Field("sum", description="Over passages, of one label.")
    abstain_margin: float | None = Field(None, ge=0, description="Abstain where the best two labels are closer than this.")
    abstention: str = Field("I don't know", description="The answer that is none.")
    # long form
    passages: Literal["static", "dynamic", "hybrid"] = Field(
        "dynamic", description="The given ones at every segment, those found for it, or the given ones first."
    )
    query: Literal["question+last", "question", "last"] = Field(
        "question+last", description="What a further retrieval asks: the question, the last segment, or both."
    )
    dedup: Literal["path", "none"] = Field("path", description="`path` hides passages that were read on the way.")
    beam: int = Field(2, ge=1)
    max_segments: int = Field(6, ge=1)
    combine: Literal["mean", "sum", "product", "by_component"] = Field("mean", description="A path's score from its steps'.")
    keep_passages: Annotated[int, Field(ge=0)] | Literal["all"] = Field(1, description="Earlier passages that stay in sight.")
    on_length: Literal["finish", "drop"] = Field("finish", description="A segment that was cut by the limit.")
    slots: Literal["live", "all"] = Field("live", description="Which hypotheses take a place in the beam.")
    n_best: int = Field(1, ge=1, description="Answers kept, the best first.")
    cite: Literal["supported", "retrieved"] = "supported"
    max_total_tokens: int | None = Field(None, ge=1, description="Generated for a question, all together.")
    max_passages: int | None = Field(None, ge=1, description="Read for a question, all together.")
    max_calls: int | None = Field(None, ge=1, description="Forward passes that a question takes part in.")
    stop: Literal["bound", "never"] = Field(
        "bound", description="Stop when nothing live can overtake the n-best finished, or search on to the last depth."
    )
    released: tuple[Released, ...] = Field((), description="Faults of the authors' code that are repeated, for parity runs.")

    @property
    def limit(self) -> int:
        """New tokens of a candidate or a segment."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return LIMITS["long" if self.form == "long" else "closed" if self.labels else "short"]

    @model_validator(mode="after")
    def _a_step_is_one_thing(self) -> SelfRagDecode:
        if self.combine == "by_component" and not isinstance(self.absent_step, str):
            raise ValueError("absent_step is a number for a whole step, and combine by_component reads a step's figures")
        return self

    @model_validator(mode="after")
    def _constraints_are_on_what_is_written(self) -> SelfRagDecode:
        if self.options and self.require.any:
            raise ValueError("require looks at what was written, and options are scored")
        return self

    @model_validator(mode="after")
    def _one_way(self) -> SelfRagDecode:
        said = self.model_fields_set
        wrong = sorted((ONLY_LONG if self.form == "short" else ONLY_SHORT) & said)
        if wrong:
            raise ValueError(f"{', '.join(wrong)} belong{'s' * (len(wrong) == 1)} to form {_other(self.form)}")
        if strange := sorted(set(self.released) - RELEASED[self.form]):
            known = ", ".join(sorted(RELEASED[self.form]))
            raise ValueError(f"released: {', '.join(strange)} is none of form {self.form}: {known}")
        if self.target_rate is not None and ("threshold" in said or self.retrieve != "adaptive"):
            raise ValueError("target_rate takes the place of threshold, with retrieve adaptive")
        if self.samples > 1 and not self.temperature:
            raise ValueError(f"samples is {self.samples}, and without temperature they would be one")
        if self.form == "long" and self.prune.kind == "bound":
            raise ValueError("prune.kind bound belongs to form short; the long form has a bound of its own")
        for name in ("options", "labels"):
            own = getattr(self, name)
            if own and (len(set(own)) < max(2, len(own)) or not all(map(str.strip, own))):
                raise ValueError(f"{name} must be two or more, all different and none empty")
        if self.options and self.labels:
            raise ValueError("give either options, which are scored, or labels, which are found in what was written")
        if self.prune.kind == "bound" and (self.labels or self.options):
            raise ValueError("prune.kind bound keeps the best answer, and labels and options need all of them")
        return self


def _other(form: str) -> str:
    return "long" if form == "short" else "short"
