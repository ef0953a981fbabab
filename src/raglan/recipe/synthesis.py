"""Settings of training data that is planned, written and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from raglan.recipe.base import Settings
from raglan.recipe.calls import EndpointSettings, MoneySettings, PriceSettings, ServedSettings
from raglan.recipe.knowledge import EncoderSettings

__all__ = [
    "BudgetSettings",
    "ClosedBookSettings",
    "JudgeSupport",
    "NliSupport",
    "OfflineTeacher",
    "PassageSettings",
    "ReserveSettings",
    "RoundTripSettings",
    "RulesSupport",
    "StepSettings",
    "SynthesisSettings",
    "VerifySettings",
    "WritingSettings",
]

Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
LanguageName = Literal["en", "zh", "cross"]
FactorName = Literal[
    "task", "relation", "answer_format", "query_format", "topic", "genre", "length", "clarity", "difficulty", "tailness",
    "persona", "template", "passage_form", "passage_head", "verdict", "absent_policy", "noise",
]  # fmt: skip


class PassageSettings(Settings):
    """Which passages stand in an example."""

    k: dict[Annotated[int, Field(ge=1)], Share] = Field(
        {1: 1, 3: 2, 5: 4, 8: 2, 10: 2, 20: 1}, min_length=1, description="How many passages → weight."
    )
    gold_absent: float = Field(0.2, ge=0, le=1, description="Share of examples in which no passage answers: relation R5.")
    gold_absent_from: int = Field(
        1, ge=1, description="Fewest planned passages among which gold is absent. With 2, one that is planned alone answers."
    )
    order: Literal["uniform", "first", "middle", "last", "rank"] = Field(
        "uniform", description="Where evidence stands: everywhere as often; at one place; or where its rank puts it."
    )


class OfflineTeacher(Settings):
    """Rules that write questions and answers out of the knowledge base's own sentences: no model, no network, no money."""

    kind: Literal["offline"]
    overlap: float = Field(0.6, gt=0, le=1, description="Most of a sentence's content words that its question may keep.")


class StepSettings(Settings):
    """How one step of writing is sampled."""

    temperature: float = Field(ge=0, le=2)
    max_tokens: int = Field(ge=1, description="Longest reply; it is in the reserve of every call.")


class WritingSettings(Settings):
    """How a model behind an endpoint writes. Temperatures are ours but for the brainstorm's and the draft's (E5-mistral: 1)."""

    jobs: int = Field(20, ge=1, le=100, description="Jobs of readers that one brainstorm asks for; so many attempts share it.")
    brainstorm: StepSettings = StepSettings(temperature=1.0, max_tokens=2400)
    draft: StepSettings = StepSettings(temperature=1.0, max_tokens=900)
    passages: StepSettings = StepSettings(temperature=1.0, max_tokens=1600)
    answer: StepSettings = StepSettings(temperature=0.3, max_tokens=700)
    beside: int = Field(2, ge=0, description="Hard negatives that are written for an example from scratch, at most.")
    per_document: int | None = Field(None, ge=1, description="Examples of one document, at most, in the plan's first round.")
    prompts: Path | None = Field(
        None, description="A folder with a prompts.en.yaml, prompts.zh.yaml or families.yaml to be read instead of raglan's."
    )
    styles: Path | None = Field(
        None, description="Lines of {text, licence, source?}: real instructions; each draft imitates the manner of one."
    )
    answer_first: float = Field(
        0, ge=0, le=1, description="Of the questions over the corpus that have a short answer in one passage, the share whose "
        "answer is picked first, by rules; the model asks for it.",
    )  # fmt: skip

    @property
    def off(self) -> set[str]:
        """Settings that came later than others and are not used: nothing that is written, or named, follows from them."""
        return {name for name in ("styles", "answer_first") if not getattr(self, name)}


class RulesSupport(Settings):
    """Support by strings alone: an alias of the answer stands in the answer and in a passage that is no noise."""

    kind: Literal["rules"] = "rules"


class NliSupport(Settings):
    """An entailment model on this machine for what strings do not tell: each sentence must follow from one passage."""

    kind: Literal["nli"]
    model: Path = Field(description="The folder of a transformers model that classifies pairs; a label of it says entailment.")
    entailed: float = Field(0.5, gt=0, lt=1, description="Probability of entailment from which on a sentence is supported.")
    batch_size: int = Field(16, ge=1, description="Pairs at a time.")


class JudgeSupport(Settings):
    """A chat model that is shown the passages, for what strings do not tell. Its calls share journal and cap."""

    kind: Literal["judge"]
    endpoint: EndpointSettings | None = Field(None, description="Who is asked; default the teacher's server.")
    price: PriceSettings | Literal["free"] | None = Field(
        None, description="What it costs; needed unless server and model are the teacher's, which cost synthesis.money.price."
    )
    max_tokens: int = Field(300, ge=1, description="Longest reply: a reason and a verdict.")
    give_up: int = Field(
        2, ge=1, description="A run stops where all judgements asked for fail for passing reasons; in the run of this number "
        "they are rejected for good, as `judge_unreachable`, if the server answers a control question and they fail once more.",
    )  # fmt: skip
    nli: NliSupport | None = Field(None, description="An entailment model that is asked first: what it passes costs nothing.")
    guard: bool = Field(True, description="Where no answer is a string, ask it, too, whether a noise passage answers.")


class ClosedBookSettings(Settings):
    """Which examples are answered right without passages: an example that needs none teaches nobody to read them."""

    what: Literal["tag", "drop"] = Field("tag", description="What becomes of one that every draw answers right.")
    endpoint: EndpointSettings | None = Field(None, description="Who is asked; default the recipe's generator, here.")
    price: PriceSettings | Literal["free"] | None = Field(
        None, description="What it costs; needed unless server and model are the teacher's, which cost synthesis.money.price."
    )
    draws: int = Field(2, ge=1, le=2, description="Answers a question: in two wordings here, drawn at temperature 1 there.")
    max_tokens: int = Field(48, ge=1, description="Longest answer.")


class RoundTripSettings(Settings):
    """A question is searched for: what it was written from must be found again, by some retriever that has a weight."""

    depth: int = Field(100, ge=1, description="Ranks among which one of its passages has to be, in at least one retriever.")
    kept: float = Field(
        0.05, ge=0, le=1, description="Share of the examples that may stay all the same, tagged `unreachable`: the first ones."
    )


class VerifySettings(Settings):
    """What must hold of a written example. The checks that need no model always run."""

    support: Annotated[RulesSupport | NliSupport | JudgeSupport, Field(discriminator="kind")] = Field(
        RulesSupport(), description="Who tells whether passages support an answer where no alias of it does."
    )
    closed_book: ClosedBookSettings | None = Field(None, description="Ask what was accepted without its passages, too.")
    round_trip: RoundTripSettings | None = Field(
        RoundTripSettings(), description="Whether questions over the corpus find their own passages again; null: not asked."
    )
    may_be_missing: tuple[Literal["support"], ...] = Field(
        (), description="Checks that do not reject where nothing is there that could tell, as where no short answer is known."
    )


class BudgetSettings(Settings):
    """How long an example may be, in tokens of the model that is to learn it. Passages that do not fit are left out whole."""

    tokenizer: str | None = Field(None, description="Whose tokens: `embedded`, a folder or hub name; default generator.model.")
    max_length: int = Field(4096, ge=64, description="Tokens of prompt and answer.")
    answer: int = Field(512, ge=1, description="Of these, kept free for the answer.")

    @model_validator(mode="after")
    def _prompt_has_room(self) -> BudgetSettings:
        if self.answer >= self.max_length:
            raise ValueError(f"answer takes {self.answer} of max_length {self.max_length} and leaves nothing to the prompt")
        return self


class ReserveSettings(Settings):
    """Topics and tasks that no training example has, and examples that have them: a set of its own, to be measured on."""

    topic: Annotated[int, Field(ge=0)] | tuple[str, ...] = Field(
        (), description="First levels, as `sports`, or paths below; or how many first levels are drawn. Only examples from "
        "scratch have topics.",
    )  # fmt: skip
    task: Annotated[int, Field(ge=0)] | tuple[str, ...] = Field((), description="Tasks, or how many are drawn.")
    n: int = Field(ge=1, description="Examples in reserved/: shared evenly between unseen tasks and unseen topics.")

    @model_validator(mode="after")
    def _something_is_reserved(self) -> ReserveSettings:
        if not self.topic and not self.task:
            raise ValueError("neither a topic nor a task is reserved")
        return self


class SynthesisSettings(Settings):
    """Training data over many topics, tasks and formats, planned to exact numbers before anything is written."""

    path: Path = Field(description="The folder of the dataset; the plan goes to plan/ in it.")
    n: int = Field(ge=1, description="Examples.")
    questions: Path | None = Field(
        None, description="Questions that people asked, with answers and relevant passages: they get evidence as any example "
        "does, and nothing is written.",
    )  # fmt: skip
    from_scratch: float = Field(0, ge=0, le=1, description="Share of examples whose passages are written, not found.")
    retrievers: dict[str, Share] | None = Field(
        None,
        description="Index → weight; `pooled` takes from all in turn that have not weight 0. Default: each as often.",
    )
    passages: PassageSettings = PassageSettings()
    languages: dict[LanguageName, Share] = Field(
        {"en": 1}, min_length=1, description="Language → weight; `cross` asks in one language over passages in the other."
    )
    weights: dict[FactorName, dict[str, Share] | Literal["fit"]] = Field(
        default_factory=dict, description="Factor → value → weight, in place of raglan's own; values not named are left out. "
        "Or `fit`: a factor's shares follow from what was dealt before it.",
    )  # fmt: skip
    found: Literal["relabel", "replace"] = Field(
        "relabel", description="What becomes of noise that turns out to answer: it counts as support, or other noise comes."
    )
    budget: BudgetSettings = BudgetSettings()
    factors: Path | None = Field(
        None, description="A folder with a factors.yaml, topics.yaml or compatibility.yaml to be read instead of raglan's."
    )
    teacher: Annotated[OfflineTeacher | EndpointSettings | ServedSettings, Field(discriminator="kind")] | None = Field(
        None, description="Who writes: rules, or a model behind a server or on this machine; without one there is only a plan."
    )
    writing: WritingSettings = Field(WritingSettings(), description="How a model writes; rules do not heed it.")
    money: MoneySettings = Field(MoneySettings(), description="What calls to an endpoint cost, and may cost together.")
    calls: Path | None = Field(None, description="The folder of the calls' journal; runs may share it. Default calls/ in path.")
    verify: VerifySettings = VerifySettings()
    dedupe: EncoderSettings | None = Field(
        None, description="An encoder: questions of nearly one meaning are duplicates, too; words are always compared."
    )
    decontaminate: Literal["registered", "none"] = Field(
        "registered", description="Leave out what comes too near to `decontaminate.sets` or the questions evaluated on."
    )
    split: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(
        {"train": 0.9, "dev": 0.1}, description="Split → share of the groups, which are tied by document; {} makes no split."
    )

    reserve: ReserveSettings | None = Field(
        None, description="Topics and tasks that are kept out of the plan, and examples of them alone, in reserved/ in path."
    )

    @property
    def priced(self) -> MoneySettings:
        """`money`; a model on this machine is free where no price is named."""
        free = isinstance(self.teacher, ServedSettings) and self.money.price is None
        return self.money.model_copy(update={"price": "free"}) if free else self.money

    @model_validator(mode="after")
    def _what_is_reserved_is_heeded(self) -> SynthesisSettings:
        if self.reserve is not None and self.questions is not None:
            raise ValueError("reserve does not apply to questions that people asked: their topics and tasks are their own")
        if self.reserve is not None and self.reserve.topic and not self.from_scratch:
            raise ValueError("reserve.topic needs from_scratch: questions over a corpus have its topics")
        return self

    @model_validator(mode="after")
    def _somebody_judges(self) -> SynthesisSettings:
        support = self.verify.support
        if isinstance(support, JudgeSupport) and support.endpoint is None and not isinstance(self.teacher, EndpointSettings):
            raise ValueError("verify.support is a judge without an endpoint, and the teacher has none that it could share")
        return self

    @field_validator("weights")
    @classmethod
    def _r5_has_one_knob(cls, weights: dict[str, dict[str, float] | str]) -> dict[str, dict[str, float] | str]:
        relation = weights.get("relation", {})
        if relation == "fit":
            raise ValueError("relation cannot be `fit`: the share of R5 is passages.gold_absent")
        if "R5" in relation:
            raise ValueError("relation names R5, whose share is passages.gold_absent")
        return weights
