"""What every generator can do: write completions, and say how likely an answer is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from raglan.prompt import Prompt, Rendered
from raglan.records import Completion

__all__ = ["Generator"]


class Generator(ABC):
    """A language model behind a prompt.

    Attributes:
        prompt: renders questions and passages for this model.
    """

    prompt: Prompt

    @abstractmethod
    def generate(
        self, prompts: Sequence[Rendered], *, max_new_tokens: int, beams: int = 1, length_penalty: float = 1.0
    ) -> list[Completion]:
        """The best completion of each prompt, in order; greedy with one beam."""

    @abstractmethod
    def token_logprobs(
        self, prompts: Sequence[Rendered], answers: Sequence[str], *, score_eos: bool = True
    ) -> list[np.ndarray]:
        """log p(y_t | prompt, y_<t) of each answer's own tokens, (T,) float32 each, the end token last. No gradient."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Names everything that scores depend on: weights, adapter, tokenizer, prompt, precision."""
