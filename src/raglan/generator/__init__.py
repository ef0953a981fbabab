"""Generators. `hf` runs any transformers model here, the embedded reader among them; `encoded` is its work on many prompts.
`endpoint` scores answers on a server, and writes none. Self-RAG's decodings also write on `vllm`, on a server that tells
log-probabilities (`endpoint_marks`), and on one that tells none (`graded`)."""

from typing import Any

from raglan.generator.attention import passage_attention
from raglan.generator.base import Generator, Scorer
from raglan.generator.encoded import EncodedPrompts, Written, encode_prompts
from raglan.generator.endpoint import EndpointScorer
from raglan.generator.endpoint_marks import MarkedEndpoint
from raglan.generator.graded import Graded
from raglan.generator.hf import HFGenerator
from raglan.generator.loading import open_generator, open_merged
from raglan.generator.vllm import VLLMGenerator
from raglan.recipe import GeneratorSettings, PromptSettings

__all__ = [
    "EncodedPrompts",
    "EndpointScorer",
    "Generator",
    "Graded",
    "HFGenerator",
    "MarkedEndpoint",
    "Scorer",
    "VLLMGenerator",
    "Written",
    "encode_prompts",
    "open_any",
    "open_generator",
    "open_merged",
    "passage_attention",
]


def open_any(settings: GeneratorSettings, prompt: PromptSettings) -> Any:
    """The generator of a recipe: an `HFGenerator`, or of another kind a `MarkedGenerator`, which writes for Self-RAG alone.

    Raises:
        CheckpointError: a model or tokenizer that cannot be loaded. RecipeError: settings that the library refuses.
        GeneratorError: a server's key that is not set. MissingExtra: vLLM is not installed.
    """
    if settings.kind == "vllm":
        return VLLMGenerator(settings, prompt)
    if settings.kind == "graded":
        return Graded(settings, prompt)
    return MarkedEndpoint(settings, prompt) if settings.kind == "endpoint" else open_generator(settings, prompt)
