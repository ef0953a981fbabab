"""Generators. `hf` runs any transformers model here, the embedded reader among them; `encoded` is its work on many prompts.
`endpoint` scores answers on a server, and writes none."""

from raglan.generator.attention import passage_attention
from raglan.generator.base import Generator, Scorer
from raglan.generator.encoded import EncodedPrompts, Written, encode_prompts
from raglan.generator.endpoint import EndpointScorer
from raglan.generator.hf import HFGenerator, open_generator

__all__ = [
    "EncodedPrompts",
    "EndpointScorer",
    "Generator",
    "HFGenerator",
    "Scorer",
    "Written",
    "encode_prompts",
    "open_generator",
    "passage_attention",
]
