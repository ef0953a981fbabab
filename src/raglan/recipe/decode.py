"""Settings of the decodings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from raglan.recipe.base import Settings
from raglan.recipe.self_rag import SelfRagDecode

__all__ = [
    "ABSTENTION",
    "ClassifyDecode",
    "ConcatDecode",
    "DecodeSettings",
    "EnsembleDecode",
    "RagSequenceDecode",
    "RagTokenDecode",
    "SampleSettings",
    "TurnSettings",
]


ABSTENTION = "I don't know"

Scorer = Annotated[
    Literal["nll", "nll_char", "nll_token", "nll_compl"],
    Field(
        description="How a question's choices are compared: by log p, by log p for each character or token, or by log p less "
        'that of the choice after "Answer:" alone.'
    ),
]


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


class ConcatDecode(Settings):
    """All passages in one prompt, one generation."""

    kind: Literal["concat"] = "concat"
    beams: int = Field(1, ge=1, description="1 is greedy.")
    max_new_tokens: int = Field(32, ge=1)
    length_penalty: float = 1.0
    scorer: Scorer = "nll"


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


def _no_truth_values(value: Any) -> Any:
    if isinstance(value, list | tuple) and any(isinstance(choice, bool) for choice in value):
        raise ValueError("choices hold true or false, which is what YAML makes of yes and no: put them in quotes")
    return value


class EnsembleDecode(Settings):
    """RA-DIT's ensemble: one prompt a passage, whole answers scored under all of them and mixed with p(z|x).

    A question that comes with `choices` gets one of them; any other is answered in words.
    """

    kind: Literal["ensemble"]
    max_new_tokens: int = Field(32, ge=1)
    samples: int | None = Field(None, ge=1, description="Draw so many answers a prompt; default is one, greedily.")
    sample: SampleSettings = Field(SampleSettings(), description="How they are drawn.")
    dedupe: Literal["normalised", "exact"] = Field(
        "normalised", description="Which answers are one group: those that exact match takes for one, or that read the same."
    )
    abstain: Literal["keep", "last"] = Field(
        "keep", description="With `last`, `abstention` is the answer only where nothing else was written."
    )
    abstention: str = Field(ABSTENTION, description="The answer that is none.")
    choices: Annotated[tuple[str, ...], BeforeValidator(_no_truth_values)] = Field(
        (), description="Of the questions that come without any; none means that those are answered in words."
    )
    scorer: Scorer = "nll"
    normalise: Literal["after", "before"] = Field(
        "after", description="Divide by characters or tokens after mixing the passages, or before."
    )
    completion: str = Field("Answer:", description="The prompt of nll_compl, without question and passage.")

    @model_validator(mode="after")
    def _choices_differ(self) -> EnsembleDecode:
        if self.choices and (len(set(self.choices)) < max(2, len(self.choices)) or not all(map(str.strip, self.choices))):
            raise ValueError("choices must be two or more, all different and none empty")
        return self


def _concat_unless_said(value: Any) -> Any:
    return {"kind": "concat", **value} if isinstance(value, dict) else value


DecodeSettings = Annotated[
    ConcatDecode | RagSequenceDecode | RagTokenDecode | ClassifyDecode | EnsembleDecode | SelfRagDecode,
    Field(discriminator="kind"),
    BeforeValidator(_concat_unless_said),
]
