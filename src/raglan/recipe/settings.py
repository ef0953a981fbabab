"""What a recipe may say: one class a group of settings, each field with its type, default, bounds and meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

__all__ = [
    "AnswerObjective",
    "BM25Index",
    "ChunkSettings",
    "ClassifyDecode",
    "ConcatDecode",
    "DecodeSettings",
    "DenseIndex",
    "EncoderSettings",
    "EvaluateSettings",
    "GeneratorSettings",
    "HybridIndex",
    "IndexSettings",
    "KnowledgeSettings",
    "LearnedTurns",
    "LessonData",
    "LsrObjective",
    "MarginalObjective",
    "PriorSettings",
    "PromptSettings",
    "QuestionData",
    "RagSequenceDecode",
    "RagTokenDecode",
    "Recipe",
    "RetrieveAgain",
    "RetrieverSettings",
    "RewriteSettings",
    "SampleSettings",
    "Settings",
    "StageSettings",
    "StalenessSettings",
    "TurnSettings",
    "VectorSettings",
    "number",
]


class Settings(BaseModel):
    """Unknown keys are faults, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ChunkSettings(Settings):
    """How documents are cut into passages."""

    max_tokens: int = Field(128, ge=8, description="Longest passage, in tokens of the encoder's tokenizer.")
    overlap: int = Field(0, ge=0, description="Tokens that neighbouring passages share.")

    @model_validator(mode="after")
    def _overlap_is_smaller(self) -> ChunkSettings:
        if self.overlap >= self.max_tokens:
            raise ValueError(f"overlap ({self.overlap}) must be smaller than max_tokens ({self.max_tokens})")
        return self


class EncoderSettings(Settings):
    """A sentence-transformers model, with one tower or two."""

    model: str = Field("embedded", description="`embedded`, a folder, or a hub name: the passage tower.")
    query_model: str | None = Field(None, description="The query tower, if it is another model.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="`auto`: bfloat16 where it is faster.")
    max_tokens: int | None = Field(None, ge=8, description="Cut texts at this length; default is the model's own.")
    batch_size: int = Field(32, ge=1, description="Texts encoded together.")
    query_prompt: str | None = Field(None, description="Text put before queries; default is the model's own.")
    passage_prompt: str | None = Field(None, description="Text put before passages; default is the model's own.")


class DenseIndex(Settings):
    """Inner product over passage vectors: exact, or approximate by a FAISS factory string."""

    kind: Literal["dense"]
    factory: str | None = Field(None, description='FAISS factory, as "IVF64,Flat" or "HNSW32"; none means exact.')
    nprobe: int = Field(8, ge=1, description="Lists (IVF) or search width (HNSW) that an approximate search visits.")


class BM25Index(Settings):
    """Okapi BM25 over words; over single characters and pairs in Chinese and Japanese."""

    kind: Literal["bm25"]
    k1: float = Field(0.9, ge=0, description="How soon repeated terms stop counting.")
    b: float = Field(0.4, ge=0, le=1, description="How much long passages are marked down.")


class HybridIndex(Settings):
    """Two or more indexes fused, by reciprocal rank or by weighted scores."""

    kind: Literal["hybrid"]
    of: tuple[str, ...] = Field(("dense", "bm25"), min_length=2, description="Names of the indexes to fuse.")
    fusion: Literal["rrf", "weights"] = Field("rrf", description="`rrf`: Σ 1/(c + rank); `weights`: Σ w · scaled score.")
    rrf_c: float = Field(60.0, gt=0, description="The c of reciprocal rank fusion.")
    weights: tuple[float, ...] | None = Field(None, description="One weight an index; default equal.")
    depth: int = Field(100, ge=1, description="Hits taken from each index before fusing.")

    @model_validator(mode="after")
    def _one_weight_each(self) -> HybridIndex:
        if self.weights is not None and len(self.weights) != len(self.of):
            raise ValueError(f"weights has {len(self.weights)} values for {len(self.of)} indexes")
        return self


IndexSettings = Annotated[DenseIndex | BM25Index | HybridIndex, Field(discriminator="kind")]


class ColumnSettings(Settings):
    """Which columns of .jsonl, .csv and .parquet hold what."""

    id: str = "id"
    title: str = "title"
    text: str = "text"


def _default_indexes() -> dict[str, IndexSettings]:
    return {"dense": DenseIndex(kind="dense"), "bm25": BM25Index(kind="bm25"), "hybrid": HybridIndex(kind="hybrid")}


class VectorSettings(Settings):
    """Passage vectors that are there already, made by the passage encoder that `encoder` names."""

    path: Path = Field(description="A .npy file (N,D), or a folder of them, read in the order of their names.")
    ids: Path | None = Field(None, description="Their passage ids, one a line; without it ids are numbers.")
    first: int = Field(1, description="The first vector's id, where ids are numbers; DPR's begin at 1.")


class KnowledgeSettings(Settings):
    """Documents, and the knowledge base that is built from them."""

    path: Path = Field(description="The knowledge base's folder.")
    documents: tuple[Path, ...] = Field(
        description="A file or folder, or several; a folder is read whole, or as BEIR if it is that.",
        json_schema_extra={"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
    )
    columns: ColumnSettings = ColumnSettings()
    encoding: str = Field("utf-8", description="Encoding of text files.")
    on_error: Literal["stop", "skip"] = Field("stop", description="What a file that cannot be read does.")
    chunk: ChunkSettings | None = Field(
        ChunkSettings(), description="null: rows of .jsonl, .csv and .parquet are passages as they stand."
    )
    encoder: EncoderSettings = EncoderSettings()
    vectors: VectorSettings | None = Field(None, description="Take these instead of encoding; needs `chunk: null`.")
    indexes: dict[str, IndexSettings] = Field(default_factory=_default_indexes)

    @model_validator(mode="after")
    def _vectors_belong_to_rows(self) -> KnowledgeSettings:
        if self.vectors is not None and self.chunk is not None:
            raise ValueError("vectors belong to passages as they stand in the files: set chunk: null")
        return self

    @field_validator("documents", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _parts_exist(self) -> KnowledgeSettings:
        for name, index in self.indexes.items():
            if isinstance(index, HybridIndex):
                for part in index.of:
                    if part not in self.indexes or isinstance(self.indexes[part], HybridIndex):
                        plain = [n for n, i in self.indexes.items() if not isinstance(i, HybridIndex)]
                        raise ValueError(f"index {name!r} fuses {part!r}, which is none of {', '.join(plain)}")
        return self


class PriorSettings(Settings):
    """p(z|x) over the K passages of a query, for the RAG decodings and the `marginal` objective."""

    kind: Literal["dense", "bm25", "hybrid"] = Field(
        "dense", description="Softmax of q·d/τ, of BM25/τ, or of q·d/τ + λ·BM25. With bm25 the retriever learns nothing."
    )
    temperature: float | None = Field(None, gt=0, description="τ; default 1, and 0.05 for cosines.")
    sparse_weight: float = Field(0.1, gt=0, description="λ of the hybrid prior.")


class RewriteSettings(Settings):
    """A generator writes a dialogue's last question so that it can be searched for by itself."""

    model: str | None = Field(None, description="A folder or hub name; default is the system's own generator.")
    template: str = Field(
        "{history}\n\nThe last question, so that it can be understood by itself.\nQuestion: {question}\nRewritten: ",
        description="Must hold {question}; not used by `fused`.",
    )
    max_new_tokens: int = Field(32, ge=1)

    @model_validator(mode="after")
    def _question_is_asked(self) -> RewriteSettings:
        if "{question}" not in self.template:
            raise ValueError("template must hold {question}")
        return self


class RetrieveAgain(Settings):
    """Draft an answer, search once more with question and draft, then answer."""

    max_draft_tokens: int = Field(32, ge=1)


class RetrieverSettings(Settings):
    """Which index answers a query, and with how many passages."""

    index: str | None = Field(None, description="An index of the knowledge base; default is hybrid if there is one.")
    prior: PriorSettings = PriorSettings()
    k: int = Field(5, ge=1, description="Passages a query.")
    query_encoder: Path | None = Field(None, description="A query tower that raglan has tuned.")
    history: Literal["last_turn", "history", "rewrite"] = Field(
        "history",
        description="What of a dialogue is searched for: the question alone, the newest turns that the query encoder reads "
        "whole and the question, or a question that a generator writes.",
    )
    rewrite: RewriteSettings = RewriteSettings()
    retrieve_again: RetrieveAgain | None = Field(None, description="Search a second time, with a drafted answer.")


class PromptSettings(Settings):
    """How a question and its passages become the generator's input."""

    layout: Literal["auto", "joined", "chat", "fused"] = Field(
        "auto",
        description="`joined`: one text; `chat`: the model's chat template; `fused`: one block a passage (the embedded "
        "reader's); `auto` asks the model.",
    )
    template: str = Field(
        "{passages}\n\nQuestion: {question}\nAnswer: ",
        description="Must hold {question}; {passages} is the joined passages, {history} a dialogue's earlier turns, which "
        "stand before the question's line where they are not placed.",
    )
    passage: str = Field("{title} / {text}", description="One passage; may hold {title}, {text} and {number}.")
    separator: str = Field("\n\n", description="Between passages.")
    question_form: Literal["as_written", "query_decoded"] = Field(
        "as_written",
        description="`query_decoded`: as transformers feeds its RAG checkpoints, in the query encoder's own spelling (lower "
        "case where it knows no other), without the quotes around titles and with double spaces made single.",
    )
    no_passage: str | None = Field(None, description="Template without passages; default is `template` with none.")
    max_tokens: int = Field(1024, ge=16, description="Prompt budget: all passages together, or one block if fused.")
    min_passage_tokens: int = Field(
        16, ge=1, description="Warn when a passage is left with fewer; history leaves each so many."
    )
    max_history_tokens: int | None = Field(None, ge=0, description="At most so many tokens of history; 0 shows none.")

    @model_validator(mode="after")
    def _question_is_asked(self) -> PromptSettings:
        for name in ("template", "no_passage"):
            text = getattr(self, name)
            if text is not None and "{question}" not in text:
                raise ValueError(f"{name} must hold {{question}}")
        try:
            self.passage.format(title="", text="", number=1)
        except (KeyError, IndexError, ValueError) as fault:
            raise ValueError(f"passage may hold {{title}}, {{text}} and {{number}}, but not {fault}") from None
        return self


class GeneratorSettings(Settings):
    """A transformers seq2seq or causal model, or the embedded reader."""

    model: str = Field("embedded", description="`embedded`, a folder, or a hub name.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="`auto`: bfloat16 where faster.")
    lora: dict[str, Any] | None = Field(None, description="Fields of peft's LoraConfig; none trains full weights.")
    freeze: tuple[str, ...] = Field((), description="Parameters whose name holds one of these do not learn.")
    batch_tokens: int = Field(16384, ge=64, description="Prompt tokens generated or scored together.")
    head_chunk: int = Field(128, ge=1, description="Answer positions whose vocabulary scores are held at once.")


class TurnSettings(Settings):
    """RAG-Turn: several turns of a dialogue retrieve, each its own passages, weighed by a prior over turns."""

    count: int = Field(2, ge=1, description="Turns in all: the last count − 1 by themselves, all earlier ones as one.")
    kind: Literal["doc_then_turn", "doc_only"] = Field(
        "doc_then_turn", description="Mix all turns' passages, or answer from each turn's and mix the answers."
    )
    prior: Literal["uniform", "recency", "retrieval"] = Field(
        "uniform", description="Turns weigh the same, by γ^age, or by how well their passages match."
    )
    gamma: float = Field(0.5, gt=0, le=1, description="γ of the recency prior.")


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


class ConcatDecode(Settings):
    """All passages in one prompt, one generation."""

    kind: Literal["concat"] = "concat"
    beams: int = Field(1, ge=1, description="1 is greedy.")
    max_new_tokens: int = Field(32, ge=1)
    length_penalty: float = 1.0


class RagSequenceDecode(Settings):
    """RAG-Sequence: an answer's probability is its mean over passages, weighted by p(z|x). Beams run passage by passage."""

    kind: Literal["rag_sequence"]
    mode: Literal["thorough", "fast"] = Field(
        "thorough", description="`thorough` scores every candidate with every passage, `fast` only with those that found it."
    )
    beams: int = Field(1, ge=1, description="Candidates a passage; 1 is greedy.")
    max_new_tokens: int = Field(32, ge=1)
    length_penalty: float = Field(1.0, description="Within each passage's beams; candidates are ranked without.")
    merge: Literal["ids", "text"] = Field("ids", description="`text` adds up candidates that read the same.")
    turns: TurnSettings | None = Field(None, description="RAG-Turn, for dialogue.")


class SampleSettings(Settings):
    """How tokens are drawn from the marginal distribution."""

    temperature: float = Field(1.0, gt=0)
    top_k: int = Field(0, ge=0, description="0 keeps all.")
    top_p: float = Field(1.0, gt=0, le=1)


class RagTokenDecode(Settings):
    """RAG-Token: every token comes from the mixture of all passages' next-token distributions."""

    kind: Literal["rag_token"]
    beams: int = Field(1, ge=1, description="1 is greedy.")
    max_new_tokens: int = Field(32, ge=1)
    min_new_tokens: int = Field(0, ge=0)
    no_repeat_ngram_size: int = Field(0, ge=0)
    length_penalty: float = 1.0
    sample: SampleSettings | None = Field(None, description="Draw instead of searching.")
    returns: int = Field(1, ge=1, description="Answers a question, from beams or draws; the best is the answer.")
    turns: TurnSettings | None = Field(None, description="RAG-Turn, for dialogue.")

    @model_validator(mode="after")
    def _one_way(self) -> RagTokenDecode:
        if self.sample is not None and self.beams > 1:
            raise ValueError("give either sample or beams")
        if self.sample is None and self.returns > self.beams:
            raise ValueError(f"returns is {self.returns}, but there are only {self.beams} beams")
        return self


def _named(value: Any) -> Any:
    found = {name: name for name in value} if isinstance(value, list | tuple) else value
    if isinstance(found, dict) and any(isinstance(part, bool) for pair in found.items() for part in pair):
        raise ValueError("labels hold true or false, which is what YAML makes of yes and no: put them in quotes")
    return found


def _or_a_list(schema: dict[str, Any]) -> None:
    mapping = {key: schema.pop(key) for key in ("type", "additionalProperties", "minProperties")}
    schema["anyOf"] = [mapping, {"type": "array", "items": {"type": "string"}, "minItems": 2}]


class ClassifyDecode(Settings):
    """A class by the likelihood of its text's first token, mixed over the passages and normalised over the classes."""

    kind: Literal["classify"]
    labels: Annotated[dict[str, str], BeforeValidator(_named)] = Field(
        min_length=2,
        description="Class → the text the generator has for it; a list where each stands for itself.",
        json_schema_extra=_or_a_list,
    )


def _concat_unless_said(value: Any) -> Any:
    return {"kind": "concat", **value} if isinstance(value, dict) else value


DecodeSettings = Annotated[
    ConcatDecode | RagSequenceDecode | RagTokenDecode | ClassifyDecode,
    Field(discriminator="kind"),
    BeforeValidator(_concat_unless_said),
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


Tokens = Annotated[
    Literal["all", "first"],
    Field(description="What of an answer is learned: all with the end token, or its first token alone, as `classify` reads."),
]


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


Data = Annotated[QuestionData | LessonData, Field(discriminator="kind")]
ObjectiveSettings = Annotated[AnswerObjective | LsrObjective | MarginalObjective, Field(discriminator="kind")]


def number(value: Any) -> Any:
    """YAML 1.1 reads 2e-4 as text; here it is a number, as everywhere else."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _numbers(arguments: Any) -> Any:
    return {k: number(v) for k, v in arguments.items()} if isinstance(arguments, dict) else arguments


Arguments = Annotated[dict[str, Any], BeforeValidator(_numbers)]


class StageSettings(Settings):
    """One training: data → objective → what learned."""

    data: Data
    objective: ObjectiveSettings
    train: Arguments = Field(default_factory=dict, description="transformers.TrainingArguments, verbatim.")

    @model_validator(mode="after")
    def _retrieving_objectives_ask_questions(self) -> StageSettings:
        if self.objective.kind != "answer" and self.data.kind != "questions":
            raise ValueError(f"objective {self.objective.kind} needs data of kind questions")
        return self


Metric = Literal["em", "f1", "kf1", "rare_f1", "accuracy", "rouge_l", "bleu1", "distinct_1", "distinct_2", "distinct_3"]


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
    stages: dict[str, StageSettings] = Field(default_factory=dict, description="Trainings, in this order.")
    evaluate: EvaluateSettings | None = None

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
        self.trainings()
        return self

    @property
    def run(self) -> Path:
        """The folder where this experiment's checkpoints and figures go."""
        return self.runs / self.name

    @property
    def index(self) -> str:
        """The name of the index that answers queries."""
        names = list(self.knowledge.indexes)
        return self.retriever.index or ("hybrid" if "hybrid" in names else names[0])

    def trainings(self) -> dict[str, StageSettings]:
        """All stages in order, the recipe's `train` merged under each stage's own."""
        stages = dict(self.stages)
        if self.objective is not None and self.data is not None:
            stages = {self.objective.kind: StageSettings(data=self.data, objective=self.objective)}
        return {name: stage.model_copy(update={"train": {**self.train, **stage.train}}) for name, stage in stages.items()}
