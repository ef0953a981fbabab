"""Settings of what is learned from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from raglan.recipe.base import Settings

__all__ = [
    "AnswersAre",
    "Data",
    "DevTask",
    "FeedbackData",
    "InstructionMix",
    "LessonData",
    "LsrMixData",
    "MixSource",
    "QuestionData",
    "SelfRagData",
    "ShownData",
    "Unanswerable",
    "searches",
]


AnswersAre = Annotated[
    Literal["text", "regex"],
    Field(
        description="With `regex` each answer is a pattern: learned is its commonest match, and measured is whether it fits."
    ),
]


AllowTest = Annotated[bool, Field(description="Train even on questions that `raglan split` put into the split `test`.")]


class QuestionData(Settings):
    """Rows from questions with answers."""

    kind: Literal["questions"]
    path: Path = Field(description="Questions with answers, .jsonl or .jsonl.gz.")
    dev: Path | None = Field(None, description="Held-out questions for the validation loss or the validation search.")
    source: Literal["gold", "mixed", "retrieved", "none"] = Field(
        "mixed", description="Which passages a row holds: relevant ones, relevant plus retrieved, only retrieved, or none."
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
    allow_test: AllowTest = False


class LessonData(Settings):
    """Self-supervised reading lessons cut from the corpus: a span is hidden in a sentence and asked for."""

    kind: Literal["lessons"]
    count: int = Field(4000, ge=1, description="Lessons.")
    passages: int = Field(1, ge=1, description="Passages a lesson: its own and distractors of the same corpus.")
    dev: Path | None = Field(None, description="Questions for the validation loss.")


class MixSource(Settings):
    """One file of an instruction mix, and what its rows hold of passages."""

    path: Path | None = Field(
        None,
        description="Questions, as for `questions`; for context `none`, paragraphs of a .txt file or `text` of a .jsonl(.gz) "
        "file, and the corpus itself if there is none.",
    )
    context: Literal["retrieved", "gold", "none"] = Field(
        "retrieved",
        description="`retrieved`: the search's passages; `gold`: the row's own `context`, or its relevant passages; "
        "`none`: raw text, with loss on all its tokens.",
    )
    dialogue: bool = Field(False, description="Counts towards the share `dialogue`; its rows have a `history`.")
    query: str = Field("{question}", description="What is searched for; retriever.history adds a dialogue's turns.")
    answers: Literal["first", "random"] = Field("first", description="Which of several answers a row learns.")

    @model_validator(mode="after")
    def _hangs_together(self) -> MixSource:
        if self.context != "none" and self.path is None:
            raise ValueError("path is missing; only raw text (context: none) may come from the corpus")
        if self.context == "none" and self.dialogue:
            raise ValueError("raw text (context: none) is no dialogue")
        if "{question}" not in self.query:
            raise ValueError("query must hold {question}")
        return self


class Unanswerable(Settings):
    """Rows with a wrong passage, from which the generator learns to say that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    share: float = Field(gt=0, lt=1, description="Of all rows.")
    answer: str = Field("I don't know", min_length=1)
    origin: Literal["gold", "mined"] = Field(
        "mined",
        alias="from",
        description="`gold`: questions of the `gold` sources that have no answer, with their own context; `mined`: questions "
        "of the `retrieved` sources, with a retrieved passage that holds none of their answers.",
    )


class DevTask(Settings):
    """Held-out questions of one task, with the task's own metric."""

    path: Path
    metric: Literal["em", "f1", "accuracy", "rouge_l"] = "em"
    limit: int = Field(2500, ge=1, description="Use so many questions, drawn with the seed.")


class InstructionMix(Settings):
    """RA-DIT's LM-ft rows: tasks, dialogue and raw text in fixed shares, with one passage a row."""

    kind: Literal["instruction_mix"]
    sources: dict[str, MixSource] = Field(min_length=1, description="Files by name; at least one of questions.")
    dev: dict[str, DevTask] = Field(
        default_factory=dict,
        description="Held-out tasks. One is validated by its loss, several by the unweighted mean of their metrics.",
    )
    rows: int | None = Field(
        None, ge=1, description="Rows of an epoch; default so many that no task shows fewer than min(n, cap) examples."
    )
    passages: int = Field(3, ge=1, description="k̃: passages of an example whose context is retrieved.")
    passages_a_row: int = Field(1, ge=1, description="1 is RA-DIT's; more are RAG-Tuning's rows.")
    unsupervised: float = Field(0.0, ge=0, lt=1, description="Share of rows that are raw text.")
    dialogue: float = Field(0.0, ge=0, lt=1, description="Share of rows from sources of dialogue.")
    cap: int = Field(7500, ge=1, description="The other sources share the rest in proportion to min(examples, cap).")
    unanswerable: Unanswerable | None = Field(None, description="Rows with a wrong passage and an answer that says so.")
    markers: Literal["random", "fixed"] = Field(
        "random",
        description="`random`: `template`, with markers drawn for each row; `fixed`: `prompt`'s template, as in evaluation. "
        "A chat model's template and the embedded reader's blocks are always fixed.",
    )
    template: str = Field(
        "Background: {passages}\n\n{instruction}{question}\n{answer}", description="Of random markers; holds all four."
    )
    no_passage: str = Field("{instruction}{question}\n{answer}", description="Of random markers, without a passage.")
    instruction_markers: tuple[str, ...] = Field(("Q: ", "Question: ", ""), min_length=1, description="{instruction}.")
    answer_markers: tuple[str, ...] = Field(("A: ", "Answer: "), min_length=1, description="{answer}.")
    max_length: int = Field(2048, ge=8, description="Tokens of a row, answer and end token included, and of a pack.")
    packing: Literal["none", "fit"] = Field(
        "none", description="`fit`: rows are packed to max_length, first-fit decreasing, and attend to themselves alone."
    )
    misfits: Literal["error", "skip"] = Field(
        "error", description="What is done about rows that leave their passages fewer than prompt.min_passage_tokens."
    )
    allow_test: bool = Field(False, description="Learn from files or rows of the split `test` all the same.")

    @property
    def tasks(self) -> dict[str, MixSource]:
        """The sources that share what the fixed shares leave."""
        return {name: source for name, source in self.sources.items() if source.context != "none" and not source.dialogue}

    @model_validator(mode="after")
    def _shares_have_sources(self) -> InstructionMix:
        raw = any(source.context == "none" for source in self.sources.values())
        talk = any(source.dialogue for source in self.sources.values())
        for name, share, there, rule in (
            ("unsupervised", self.unsupervised, raw, "context: none"), ("dialogue", self.dialogue, talk, "dialogue: true"),
        ):  # fmt: skip
            if (share > 0) != there:
                raise ValueError(f"{name} is {share}: a share above 0 and sources with {rule} belong together")
        if "unanswerable" in self.sources:
            raise ValueError("sources has unanswerable, which is what the rows without an answer are called")
        if not self.tasks:
            raise ValueError("sources must hold questions that are no dialogue")
        reserved = self.unsupervised + self.dialogue + (self.unanswerable.share if self.unanswerable else 0)
        if reserved >= 1:
            raise ValueError(f"unsupervised, dialogue and unanswerable take {reserved:g} of the rows and leave none")
        return self

    @model_validator(mode="after")
    def _unanswerable_rows_have_sources(self) -> InstructionMix:
        context = {"gold": "gold", "mined": "retrieved"}.get(self.unanswerable.origin) if self.unanswerable else None
        if context and all(source.context != context for source in self.tasks.values()):
            raise ValueError(f"unanswerable rows need a source with context: {context}")
        return self

    @model_validator(mode="after")
    def _templates_hold_their_parts(self) -> InstructionMix:
        for name, parts in (("template", ("passages", "instruction", "question", "answer")), ("no_passage", ("question",))):
            for part in parts:
                if f"{{{part}}}" not in getattr(self, name):
                    raise ValueError(f"{name} must hold {{{part}}}")
        return self


LsrSource = Literal["corpus_halves", "tasks"]


class LsrMixData(Settings):
    """What a query encoder learns from without labels: halves of the corpus' own passages, and questions with answers."""

    kind: Literal["lsr_mix"]
    sources: dict[LsrSource, Annotated[float, Field(gt=0)]] = Field(
        {"corpus_halves": 0.95, "tasks": 0.05}, min_length=1,
        description="Shares of the rows: `corpus_halves` asks for a passage's end by its beginning, `tasks` are questions.",
    )  # fmt: skip
    path: Path | None = Field(None, description="The questions of `tasks`, with answers.")
    dev: Path | None = Field(None, description="Held-out questions for the validation search.")
    count: int | None = Field(None, ge=1, description="Rows in all; default and most: as many as the scarcer source allows.")
    half_tokens: int = Field(
        50, ge=1, description="Tokens (the encoder's) of beginning and end; a passage needs twice as many."
    )
    exclude_documents_of: tuple[Path, ...] = Field(
        (), description="Questions whose relevant passages' documents give no halves: those that are evaluated on."
    )
    allow_test: AllowTest = False

    @model_validator(mode="after")
    def _tasks_have_questions(self) -> LsrMixData:
        if ("tasks" in self.sources) != (self.path is not None):
            raise ValueError("sources.tasks and path belong together: the questions that tasks takes")
        if self.exclude_documents_of and "corpus_halves" not in self.sources:
            raise ValueError("exclude_documents_of keeps documents out of corpus_halves, which is not in sources")
        return self

    @property
    def tasks(self) -> QuestionData | None:
        """The source of questions, as data of its own."""
        return None if self.path is None else QuestionData(
            kind="questions", path=self.path, dev=self.dev, allow_test=self.allow_test
        )  # fmt: skip


def _url_or_path(value: Any) -> Any:
    """An address has a scheme, and a database's file has none."""
    return Path(value) if isinstance(value, str) and "://" not in value else value


Store = Annotated[str | Path, BeforeValidator(_url_or_path)]


class FeedbackData(Settings):
    """Rows from what people said of questions, answers and passages. What is measured in this recipe is never learned."""

    kind: Literal["feedback"]
    store: Store | None = Field(
        None, description="The store: an SQLite file, or an address as in postgresql://user:${PASSWORD}@host/name."
    )
    path: Path | None = Field(None, description="Instead of a store, what `raglan feedback export --as questions` wrote.")
    agree: Literal["majority", "all", "each"] = Field(
        "majority", description="Where people disagree: what more than half say, what all say, or what each says."
    )
    positive: float = Field(0.5, description="A passage is relevant from this grade on.")
    ratings: Literal["ignore", "filter", "weight"] = Field(
        "ignore", description="Learn also answers that were rated and not corrected: those rated `min_rating` or better, or "
        "all, each weighted by its rating over the largest one.",
    )  # fmt: skip
    min_rating: float | None = Field(None, description="For `ratings: filter`.")
    exclude: tuple[Path, ...] = Field((), description="More questions not to be learned, beside `dev` and those measured.")
    replay: Path | None = Field(None, description="Questions with answers to learn beside, so that what was known is kept.")
    replay_times: float = Field(1.0, gt=0, description="So many of them for each question with feedback, drawn with the seed.")
    dev: Path | None = Field(None, description="Held-out questions for the validation loss or the validation search.")
    source: Literal["gold", "mixed", "retrieved"] = Field(
        "mixed", description="Which passages a row holds: those judged relevant, these plus retrieved, or only retrieved."
    )
    passages: int = Field(3, ge=1, description="Passages a question.")
    passages_a_row: int | None = Field(None, ge=1, description="Default all in one row; 1 is RA-DIT's one row a passage.")
    allow_test: AllowTest = False

    @model_validator(mode="after")
    def _one_source(self) -> FeedbackData:
        if (self.store is None) == (self.path is None):
            raise ValueError("give either store or path")
        if (self.ratings == "filter") != (self.min_rating is not None):
            raise ValueError("ratings: filter and min_rating belong together")
        return self


class SelfRagData(Settings):
    """Rows of a Self-RAG generator, as `critique` writes them: segments with passages between, and judgements of both."""

    kind: Literal["self_rag"]
    path: Path = Field(description="Rows, .jsonl or .jsonl.gz.")
    dev: Path | None = Field(None, description="Held-out rows for the validation loss, and for loss and accuracy by group.")
    passage_max: int | None = Field(None, ge=1, description="Tokens of a passage; what exceeds them is cut.")
    max_length: int = Field(2048, ge=8, description="Tokens of a row; longer ones lose segments at their end, and so IsUse.")
    markups: Literal["train", "mask"] = Field("train", description="Whether <paragraph> and </paragraph> are learned.")
    released: tuple[Literal["mask"], ...] = Field(
        (), description="`mask` learns what the authors' code learns: of several passages only the text behind the last, and "
        "the prompt's last token. For comparison only.",
    )  # fmt: skip
    packing: Literal["none", "fit"] = Field("none", description="`fit`: rows are packed to max_length.")
    limit: int | None = Field(None, ge=1, description="Use so many rows, drawn with the seed.")


class ShownData(Settings):
    """Rows of examples that hold their own passages, as `raglan synthesize` writes them; one file, or a mixture of two."""

    kind: Literal["shown"]
    path: Path | None = Field(None, description="Examples, .jsonl; or, for a mixture, both of the next two.")
    kiqa: Path | None = Field(None, description="Examples from questions that people asked (`synthesis.questions`).")
    synthetic: Path | None = Field(None, description="Synthetic examples.")
    mix: Literal["kiqa", "synthetic", "kiqa+synthetic"] | None = Field(
        None, description="Of the two files, which are learned from. All three forms have the same size."
    )
    match: Literal["examples", "answer_tokens"] = Field("examples", description="What the three forms have equally many of.")
    size: int | None = Field(
        None, ge=1, description="So many of these; default what the smaller file has. What a file lacks is shown again."
    )
    prompt: Literal["own", "recipe"] = Field(
        "own", description="`own`: as each example was rendered, with its instruction; `recipe`: by the recipe's prompt, as in "
        "evaluation, without instructions. The embedded reader has no template; there `own` puts the instruction first.",
    )  # fmt: skip
    dev: Path | None = Field(None, description="Held-out examples for the validation loss.")
    allow_test: AllowTest = False

    @property
    def files(self) -> dict[str, Path]:
        """All files by name, those that only set the size too."""
        named = {"path": self.path, "kiqa": self.kiqa, "synthetic": self.synthetic}
        return {name: path for name, path in named.items() if path is not None}

    @property
    def sources(self) -> list[str]:
        """The names of the files that are learned from."""
        return ["path"] if self.mix is None else self.mix.split("+")

    @model_validator(mode="after")
    def _one_file_or_a_mixture(self) -> ShownData:
        if (self.mix is None) != (self.path is not None):
            raise ValueError("give either path, or mix with its files")
        if self.path is not None and (self.kiqa or self.synthetic):
            raise ValueError("kiqa and synthetic belong to a mixture: say mix instead of path")
        for name in self.sources:
            if name not in self.files:
                raise ValueError(f"mix is {self.mix}, and {name} names no file")
        return self


Data = Annotated[
    QuestionData | LessonData | InstructionMix | LsrMixData | FeedbackData | SelfRagData | ShownData,
    Field(discriminator="kind"),
]


def searches(data: Any) -> bool:
    """Whether rows are made of what the retriever finds; not for questions without relevant passages alone."""
    if isinstance(data, InstructionMix):
        return any(source.context == "retrieved" for source in data.sources.values())
    asked = isinstance(data, QuestionData) and (data.answers_found_in is not None or data.answers_are == "regex")
    return asked or (isinstance(data, QuestionData | FeedbackData) and data.source in ("mixed", "retrieved"))
