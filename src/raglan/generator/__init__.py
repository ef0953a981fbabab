"""Generators. `hf` runs any transformers model here, the embedded reader among them."""

from raglan.generator.base import Generator
from raglan.generator.hf import HFGenerator, open_generator

__all__ = ["Generator", "HFGenerator", "open_generator"]
