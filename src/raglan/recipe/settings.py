"""What a whole recipe may say; each field has its type, default, bounds and meaning."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from raglan.recipe.base import Arguments, Settings
from raglan.recipe.calls import PriceSettings
from raglan.recipe.clean import DecontaminateSettings
from raglan.recipe.critique import CritiqueSettings
from raglan.recipe.data import AnswersAre, Data, searches
from raglan.recipe.decode import ConcatDecode, DecodeSettings
from raglan.recipe.grid import GridSettings
from raglan.recipe.knowledge import BM25Index, DenseIndex, HybridIndex, KnowledgeSettings
from raglan.recipe.objective import ObjectiveSettings
from raglan.recipe.parts import GeneratorSettings, PromptSettings, RetrieverSettings
from raglan.recipe.robustness import JudgeSettings, RobustnessSettings
from raglan.recipe.sweep import SweepSettings
from raglan.recipe.synthesis import SynthesisSettings

__all__ = [
    "EvaluateSettings",
    "Recipe",
    "StageSettings",
]


class StageSettings(Settings):
    """One training: data → objective → what learned."""

    data: Data
    objective: ObjectiveSettings
    train: Arguments = Field(default_factory=dict, description="transformers.TrainingArguments, verbatim.")
    starts_from: tuple[str, ...] | None = Field(
        None, description="Earlier stages whose parts this one starts from; default all of them, [] the recipe's own parts."
    )

    @model_validator(mode="after")
    def _retrieving_objectives_ask_questions(self) -> StageSettings:
        if self.data.kind == "lsr_mix" and self.objective.kind != "lsr":
            raise ValueError("data of kind lsr_mix are for objective lsr")
        asked = ("questions", "lsr_mix", "feedback") if self.objective.kind == "lsr" else ("questions",)
        if self.objective.kind != "answer" and self.data.kind not in asked:
            raise ValueError(f"objective {self.objective.kind} needs data of kind {' or '.join(asked)}")
        return self

    @model_validator(mode="after")
    def _replayed_rows_are_there_to_be_held(self) -> StageSettings:
        if getattr(self.objective, "hold_rows", "all") == "replayed" and getattr(self.data, "replay", None) is None:
            raise ValueError("objective.hold_rows replayed needs data of kind feedback with replay: no other rows are replayed")
        return self

    @model_validator(mode="after")
    def _mixed_rows_hold_whole_answers(self) -> StageSettings:
        if self.data.kind in ("instruction_mix", "self_rag", "shown") and getattr(self.objective, "tokens", "all") == "first":
            raise ValueError("objective.tokens first needs data of kind questions")
        own = {"group_weights": "groups of tokens", "off_grammar": "grammar", "repeats": "segments"}
        for name, what in own.items():
            if self.data.kind != "self_rag" and getattr(self.objective, name, None):
                raise ValueError(f"objective.{name} needs data of kind self_rag: other rows have no {what}")
        return self


Metric = Literal[
    "em", "f1", "kf1", "rare_f1", "accuracy", "rouge_l", "bleu1", "q_bleu1", "distinct_1", "distinct_2", "distinct_3",
    "match", "substring", "str_em", "char_3gram", "macro_f1", "declined", "citations", "quotes",
]  # fmt: skip


class EvaluateSettings(Settings):
    """What is measured, on which questions."""

    questions: Path = Field(description="Held-out questions, .jsonl or .jsonl.gz, or a BEIR folder.")
    modes: tuple[Literal["closed_book", "gold", "retrieved"], ...] = ("closed_book", "gold", "retrieved")
    answers_are: AnswersAre = "text"
    metrics: tuple[Metric, ...] = Field(("em", "f1"), min_length=1, description="Of the answers, in every mode.")
    k: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 5, 10, 20), min_length=1, description="Depths of recall@k; nDCG and MRR use 10."
    )
    limit: int | None = Field(None, ge=1, description="Use so many questions, drawn with the seed.")
    rare_reference: Path | None = Field(
        None, description="Questions in whose answers `rare_f1` counts how rare words are; default those evaluated."
    )
    dataset: str | None = Field(
        None, min_length=1, description="Which data set the questions are of, as nq: in-domain where a stage learned from it."
    )
    fold_numbers: bool = Field(
        False, description="Compare numerals in one spelling (一九七八 = 1978, 3,000 = 3000); published figures do not."
    )
    price: PriceSettings | Literal["free"] | None = Field(
        None, description="Of a generator on a server, US dollars per million tokens: tells what 1,000 answers cost."
    )
    robustness: RobustnessSettings | None = Field(None, description="Measure also under noise, orders and other retrievers.")
    judge: JudgeSettings | None = Field(None, description="Have the answers judged, too; without it there is no judge.")


class Recipe(Settings):
    """A whole experiment."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    seed: int = 0
    runs: Path = Field(Path("runs"), description="Folder of runs; this recipe's is runs/name.")
    knowledge: KnowledgeSettings
    retriever: RetrieverSettings = RetrieverSettings()
    prompt: PromptSettings = PromptSettings()
    generator: GeneratorSettings = GeneratorSettings()
    decode: DecodeSettings = ConcatDecode()
    data: Data | None = Field(None, description="With `objective`: short for a recipe of one stage.")
    objective: ObjectiveSettings | None = None
    train: Arguments = Field(default_factory=dict, description="TrainingArguments of all stages.")
    leak_check: Literal["none", "questions", "passages", "near"] = Field(
        "questions", description="What training questions may not share with those measured: the question; also an answer from "
        "the same passage; or also nearly the same words.",
    )  # fmt: skip
    decontaminate: DecontaminateSettings | None = Field(None, description="What `raglan check-leaks` compares with.")
    stages: dict[str, StageSettings] = Field(default_factory=dict, description="Trainings, in this order.")
    evaluate: EvaluateSettings | None = None
    critique: CritiqueSettings | None = Field(None, description="What `raglan critique` makes: Self-RAG's training data.")
    synthesis: SynthesisSettings | None = Field(
        None, description="What `raglan synthesize` plans: training data over many topics, tasks and formats."
    )
    grid: GridSettings | None = Field(None, description="What `raglan evaluate` measures instead, where it is given.")
    sweep: SweepSettings | None = Field(None, description="What `raglan evaluate --sweep` tries.")

    @model_validator(mode="after")
    def _hangs_together(self) -> Recipe:
        if (self.data is None) != (self.objective is None):
            raise ValueError("data and objective belong together")
        if self.objective is not None and self.stages:
            raise ValueError("give either stages or one objective with its data, not both")
        if self.retriever.index is not None and self.retriever.index not in self.knowledge.indexes:
            known = ", ".join(self.knowledge.indexes)
            raise ValueError(f"retriever.index is {self.retriever.index!r}; knowledge.indexes has {known}")
        if self.retriever.retrieve_again is not None and getattr(self.decode, "turns", None) is not None:
            raise ValueError("give either retriever.retrieve_again or decode.turns")
        if self.generator.kind != "hf" and self.decode.kind != "self_rag":
            raise ValueError(f"generator.kind {self.generator.kind} is for decode.kind self_rag, not {self.decode.kind}")
        if self.generator.kind != "hf" and self.retriever.history == "rewrite" and self.retriever.rewrite.model is None:
            raise ValueError(f"generator.kind {self.generator.kind} rewrites no questions: name retriever.rewrite.model")
        self._stages_are_named()
        self.trainings()
        return self

    @model_validator(mode="after")
    def _grades_are_no_likelihoods(self) -> Recipe:
        if self.generator.kind == "graded" and self.decode.kind == "self_rag":
            if self.decode.weights.seq:
                raise ValueError("generator.kind graded knows no probability of words: decode.weights.seq must be 0")
            if self.decode.options:
                raise ValueError("generator.kind graded scores no given options: decode.labels are found in what is written")
        return self

    @model_validator(mode="after")
    def _retrievers_are_indexes(self) -> Recipe:
        if self.synthesis is None:
            return self
        for name in self.synthesis.retrievers or ():
            if name not in (*self.knowledge.indexes, "pooled"):
                known = ", ".join(self.knowledge.indexes)
                raise ValueError(f"synthesis.retrievers names {name!r}; knowledge.indexes has {known}, and there is pooled")
        if not self.dealt:
            raise ValueError("synthesis.retrievers leaves no index for pooled: give one a weight, or do not name it")
        return self

    @model_validator(mode="after")
    def _unseen_is_searched_by_nobody(self) -> Recipe:
        robustness = self.evaluate.robustness if self.evaluate is not None else None
        unseen = [] if robustness is None else [name for name in robustness.unseen if name in self.knowledge.indexes]
        searched = self._searched() if unseen else {}
        alike = {self._finds_by(name): name for name in reversed(searched)}
        for name in unseen:
            told = f"evaluate.robustness.unseen names {name!r}, which"
            if (who := searched.get(name)) is not None:
                raise ValueError(f"{told} {who} searches" + (": give it weight 0 there" if who == "synthesis" else ""))
            others = [alike.get(self._finds_by(part)) for part in self._parts(name) or (name,)]
            if all(other is not None for other in others):
                verb, them = ("do", "these") if len(others) > 1 else ("does", "that")
                who = searched[str(others[0])]
                raise ValueError(f"{told} finds as {' and '.join(map(repr, others))} {verb}, and {who} searches {them}")
        return self

    def _searched(self) -> dict[str, str]:
        """Indexes that are searched before anything is measured, and by whom; with a fused one its parts are."""
        found = dict.fromkeys(self.dealt if self.synthesis is not None else (), "synthesis")
        for name, stage in self.trainings().items():
            found = {**dict.fromkeys(self._searched_by(stage), f"stage {name}"), **found}
        for name, who in list(found.items()):
            for part in self._parts(name):
                found.setdefault(part, f"{who}, as a part of {name!r},")
        return found

    def _searched_by(self, stage: StageSettings) -> list[str]:
        """The indexes that a stage's rows are made with; `lsr` also searches the vectors of the knowledge base's encoder."""
        if stage.objective.kind == "lsr":
            own = self.knowledge.own_encoders
            learns = [n for n, index in self.knowledge.indexes.items() if index.kind == "dense" and n not in own]
            return [stage.objective.candidates or self.index, *learns]
        return [self.index] if stage.objective.kind == "marginal" or searches(stage.data) else []

    def _parts(self, name: str) -> tuple[str, ...]:
        index = self.knowledge.indexes.get(name)
        return index.of if isinstance(index, HybridIndex) else ()

    def _finds_by(self, name: str) -> Hashable:
        """What tells an index's hits from another's, as far as a recipe knows: its kind and models, however they are set."""
        index = self.knowledge.indexes.get(name)
        if isinstance(index, DenseIndex):
            encoder = index.encoder or self.knowledge.encoder
            return index.kind, encoder.model, encoder.query_model
        return index.kind if isinstance(index, BM25Index) else name

    def _stages_are_named(self) -> None:
        """Names of stages in `starts_from` and `grid` are those of stages, in `starts_from` of earlier ones."""
        known = list(self.trainings())
        for place, (name, stage) in enumerate(self.stages.items()):
            for other in stage.starts_from or ():
                if other not in known[:place]:
                    raise ValueError(f"stages.{name}.starts_from names {other!r}; before it are {known[:place]}")
        if self.grid is not None:
            named = [*self.grid.base, *filter(None, (self.grid.query_encoder, self.grid.generator))]
            for other in named:
                if other not in known:
                    raise ValueError(f"grid names the stage {other!r}; there are {known}")

    @property
    def run(self) -> Path:
        """The folder where this experiment's checkpoints and figures go."""
        return self.runs / self.name

    @property
    def index(self) -> str:
        """The name of the index that answers queries."""
        names = list(self.knowledge.indexes)
        return self.retriever.index or ("hybrid" if "hybrid" in names else names[0])

    @property
    def dealt(self) -> tuple[str, ...]:
        """The indexes that synthesis searches: those with a weight, and with `pooled` all but those of weight 0."""
        weights = (self.synthesis.retrievers if self.synthesis is not None else None) or {}
        named = tuple(name for name, weight in weights.items() if weight and name != "pooled")
        if named and not weights.get("pooled"):
            return named
        return tuple(name for name in self.knowledge.indexes if weights.get(name, 1))

    def behind(self, name: str) -> list[str]:
        """The stages that a stage starts from, and those that they start from, in order."""
        names = list(self.trainings())
        before = names[: names.index(name)]
        said = self.trainings()[name].starts_from
        if said is None:
            return before
        wanted = {other for start in said for other in (*self.behind(start), start)}
        return [other for other in before if other in wanted]

    def trainings(self) -> dict[str, StageSettings]:
        """All stages in order, the recipe's `train` merged under each stage's own."""
        stages = dict(self.stages)
        if self.objective is not None and self.data is not None:
            stages = {self.objective.kind: StageSettings(data=self.data, objective=self.objective)}
        return {name: stage.model_copy(update={"train": {**self.train, **stage.train}}) for name, stage in stages.items()}
