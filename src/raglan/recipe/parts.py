"""Settings of retriever, prompt and generator."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from raglan.recipe.base import Settings, Verbatim

__all__ = [
    "QA_PROMPTS",
    "AdapterSettings",
    "GeneratorSettings",
    "PriorSettings",
    "PromptSettings",
    "RetrieveAgain",
    "RetrieverSettings",
    "RewriteSettings",
    "ScorerSettings",
    "SelfRagPromptSettings",
    "Shot",
]

QA_PROMPTS = {  # by name, because the two contradict each other
    "context_only": "Answer the question from the context below and from nothing else you may know. If the context does not "
    'hold the answer, say "I don\'t know".\n\nContext:\n{passages}\n\nQuestion: {question}\nAnswer: ',
    "context_first": "Answer the question. Trust the context below where it speaks to it; where it does not, answer from what "
    "you know.\n\nContext:\n{passages}\n\nQuestion: {question}\nAnswer: ",
}


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


class SelfRagPromptSettings(Settings):
    """How a model with reflection tokens is asked (Self-RAG)."""

    template: str = Field("### Instruction:\n{instruction}\n\n### Response:\n", description="Must hold {instruction}.")
    with_input: str = Field(
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        description="Of training rows with an input of their own; must hold {instruction} and {input}.",
    )
    separator: str = Field(
        "## Input:\n\n",
        description="Between a task's instruction and the question; the authors' short form has an empty line before it.",
    )
    passage_max: int | None = Field(None, ge=1, description="Tokens of a passage that are read; default all.")
    answers: Literal["text", "tokens"] = Field(
        "text",
        description="`tokens`: an answer that spells one reflection token is that token, as a critic's labels may be; nothing "
        "else ever becomes one.",
    )

    @model_validator(mode="after")
    def _parts_are_there(self) -> SelfRagPromptSettings:
        for name, parts in (("template", ("instruction",)), ("with_input", ("instruction", "input"))):
            for part in parts:
                if f"{{{part}}}" not in getattr(self, name):
                    raise ValueError(f"{name} must hold {{{part}}}")
        return self


class Shot(Settings):
    """A question with its answer, shown before the question that is asked."""

    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    passages: tuple[str, ...] = Field((), description="What it was answered from, as text.")


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
        "stand before the question's line where they are not placed. Or the name of a prompt: `context_only` (answer from the "
        "passages alone), `context_first` (else from what the model knows).",
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
    self_rag: SelfRagPromptSettings = SelfRagPromptSettings()
    whole_passages: bool = Field(
        False, description="Passages are shown whole or not at all: those that do not fit leave, the last ranked first."
    )
    shots: tuple[Shot, ...] = Field(
        (),
        description="Few-shot examples before the question, in this order; where the prompt gets too long, the last go first, "
        "and all of them before a passage or a turn is touched.",
    )
    shot_separator: str = Field("\n\n", description="Behind each shot.")

    @field_validator("template")
    @classmethod
    def _named(cls, value: str) -> str:
        return QA_PROMPTS.get(value, value)

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


SERVED = ("endpoint", "revision", "api_key_env", "concurrency", "retries", "timeout")
OF_KIND = {  # what belongs to some kinds of generator only
    **dict.fromkeys(SERVED, ("endpoint", "graded")), "tokenizer": ("endpoint",), "rewrites": ("graded",),
    "engine": ("vllm",), "dtype": ("hf", "vllm"), "vocabulary": ("hf", "vllm", "endpoint"),
    **dict.fromkeys(
        ("any_prompt", "attention", "vocabulary_init", "lora", "adapter", "tokens", "overflow", "freeze", "head_chunk"), ("hf",)
    ),
}  # fmt: skip


class AdapterSettings(Settings):
    """A LoRA adapter beside its base, which is `generator.model`; the base that its own config names is advisory."""

    path: str = Field(min_length=1, description="A folder with the adapter, or with subfolders of adapters, or a hub name.")
    subfolder: str | None = Field(None, min_length=1, description="Which of several, as RT-KS.")
    merge: bool = Field(
        False, description="Add it to the base's weights, in float32; else it stays beside them, and learns on with `lora`."
    )


class GeneratorSettings(Settings):
    """A transformers seq2seq or causal model, or the embedded reader; for Self-RAG also one in vLLM or on a server."""

    kind: Literal["hf", "vllm", "endpoint", "graded"] = Field(
        "hf",
        description="transformers; or, for `decode.kind: self_rag`, vLLM in this process, a server of OpenAI's protocol, or "
        "any chat model behind one, which is asked yes or no where a Self-RAG model has reflection tokens (`graded`).",
    )
    model: str = Field(
        "embedded",
        description="`embedded` (the reader), `embedded_causal`, a folder, or a hub name; on a server the name that it knows.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="`auto`: bfloat16 where faster.")
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"] = Field(
        "auto", description="transformers' attention; with a flash kernel packs are read without padding and without a mask."
    )
    vocabulary: Literal["own", "self_rag", "han"] = Field(
        "own",
        description="`self_rag`: the reflection tokens are checked, or added to a causal model that has none; "
        "`han`: a model of English word pieces, as the embedded ones, gets a row for each Han character.",
    )
    vocabulary_init: Literal["mean", "words", "random"] = Field(
        "mean", description="New tokens' rows: the mean of the old ones, the mean of a describing phrase's, or drawn."
    )
    lora: Verbatim | None = Field(None, description="Fields of peft's LoraConfig; none trains full weights.")
    adapter: AdapterSettings | None = Field(None, description="A published adapter of `model`.")
    tokens: dict[Literal["bos", "eos", "pad"], int | str] = Field(
        default_factory=dict, description="What begins, ends and pads a row, by id or spelling; default the tokenizer's own."
    )
    overflow: Literal["error", "cut_left"] = Field(
        "error",
        description="A prompt that leaves its answer no positions is refused; under `cut_left` its passages leave whole, the "
        "last ranked first, and are counted. What opens the prompt, instruction and question stay; only a prompt that came as "
        "bare tokens loses its beginning.",
    )
    any_prompt: bool = Field(
        False, description="Ask a generator that learned with another prompt than the recipe's; else that is refused."
    )
    freeze: tuple[str, ...] = Field((), description="Parameters whose name holds one of these do not learn.")
    batch_tokens: int = Field(16384, ge=64, description="Prompt tokens generated or scored together.")
    head_chunk: int = Field(128, ge=1, description="Answer positions whose vocabulary scores are held at once.")
    engine: Verbatim = Field(default_factory=dict, description="vllm: arguments of vllm.LLM, verbatim.")
    endpoint: str | None = Field(
        None, pattern=r"^https?://[^@\s?#]+$", description="endpoint, graded: the server, as http://localhost:8000/v1."
    )
    tokenizer: str | None = Field(None, description="endpoint: the served model's, a folder or hub name; default `model`.")
    revision: str | None = Field(None, description="endpoint, graded: any name; another one stands for other weights there.")
    api_key_env: str | None = Field(None, description="endpoint, graded: the environment variable that holds the server's key.")
    concurrency: int = Field(16, ge=1, description="endpoint, graded: requests at a time.")
    retries: int = Field(5, ge=0, description="endpoint, graded: further tries of a failed request, each after a longer wait.")
    timeout: float = Field(120.0, gt=0, description="endpoint, graded: seconds a request may take.")

    rewrites: int = Field(
        3, ge=0, description="graded: how often a question that found no relevant passage is reworded and asked again."
    )

    @model_serializer(mode="wrap")
    def _as_before_prompts_were_compared(self, usual: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Told only where it is set, so that stages and figures from before there was such a setting are found."""
        told: dict[str, Any] = usual(self)
        return told if self.any_prompt else {name: value for name, value in told.items() if name != "any_prompt"}

    @model_validator(mode="after")
    def _kind_has_its_settings(self) -> GeneratorSettings:
        fields = type(self).model_fields  # a recipe that was written out holds every default
        defaults = {name: fields[name].get_default(call_default_factory=True) for name in self.model_fields_set}
        said = [name for name, value in defaults.items() if getattr(self, name) != value]
        if wrong := sorted(name for name in said if self.kind not in OF_KIND.get(name, (self.kind,))):
            kinds = " or ".join(OF_KIND[wrong[0]])
            raise ValueError(f"{', '.join(wrong)} belong{'s' * (len(wrong) == 1)} to kind {kinds}, and kind is {self.kind}")
        if self.kind in ("endpoint", "graded") and self.endpoint is None:
            raise ValueError(f"kind {self.kind} needs endpoint, the server's address")
        if self.adapter is not None and self.adapter.merge and self.lora is not None:
            raise ValueError("lora names its base, and a base with adapter.merge is on no disk: merge it there first")
        if self.kind != "hf" and self.model == "embedded":
            raise ValueError(f"the embedded reader does not run on kind {self.kind}: name a causal model")
        return self


class ScorerSettings(Settings):
    """A language model that says how likely answers are, in place of the recipe's generator: run here, or on a server."""

    model: str = Field(description="`embedded`, a folder, or a hub name; with `endpoint` the name that the server knows.")
    endpoint: str | None = Field(
        None, pattern=r"^https?://[^@\s?#]+$",
        description="An OpenAI-compatible server that gives prompt log-probabilities, as http://localhost:8000/v1.",
    )  # fmt: skip
    tokenizer: str | None = Field(None, description="The served model's, a folder or hub name; default `model`.")
    revision: str | None = Field(None, description="Any name; another one makes scores anew, as for other weights there.")
    api_key_env: str | None = Field(None, description="The environment variable that holds the server's key.")
    concurrency: int = Field(16, ge=1, description="Requests at a time.")
    retries: int = Field(5, ge=0, description="Further tries of a request that fails, each after a longer wait.")
    timeout: float = Field(120.0, gt=0, description="Seconds a request may take.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="Of a model run here.")
    batch_tokens: int = Field(16384, ge=64, description="Tokens scored together, and lost at most when interrupted.")
    head_chunk: int = Field(128, ge=1, description="Answer positions whose vocabulary scores are held at once.")

    @model_validator(mode="after")
    def _server_settings_need_a_server(self) -> ScorerSettings:
        of_a_server = {"tokenizer", "revision", "api_key_env", "concurrency", "retries", "timeout"}
        said = sorted(of_a_server & self.model_fields_set)
        if self.endpoint is None and said:
            raise ValueError(f"{', '.join(said)} belong to an endpoint, and none is given")
        if self.endpoint is not None and (found := {"dtype", "head_chunk"} & self.model_fields_set):
            raise ValueError(f"{', '.join(sorted(found))} belong to a model run here, and the endpoint runs this one")
        return self
