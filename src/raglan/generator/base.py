"""What every generator can do: write completions, and say how likely an answer is. A scorer does only the latter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from raglan.artifact import fingerprint
from raglan.errors import GeneratorError
from raglan.prompt import MARK, Prompt, Rendered
from raglan.records import Completion

__all__ = ["Generator", "Scorer", "answer_ids", "end_of_turn", "tokenizer_identity"]


class Scorer(ABC):
    """A language model behind a prompt, asked how likely answers are.

    Attributes:
        prompt: renders questions and passages for this model.
    """

    prompt: Prompt

    @property
    @abstractmethod
    def batch_tokens(self) -> int:
        """Padded tokens of prompts and answers that are scored together."""

    @abstractmethod
    def row(self, prompt: Rendered, answer: str) -> dict[str, list[int]]:
        """`input_ids` of the prompt and `labels`, the answer's own ids with the end token. Raises GeneratorError."""

    @abstractmethod
    def token_logprobs(
        self, prompts: Sequence[Rendered], answers: Sequence[str], *, score_eos: bool = True
    ) -> list[np.ndarray]:
        """log p(y_t | prompt, y_<t) of each answer's own tokens, (T,) float32 each, the end token last. No gradient."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Names everything that scores depend on: weights, adapter, tokenizer, prompt, precision."""


class Generator(Scorer):
    """A language model behind a prompt, that also writes."""

    @abstractmethod
    def generate(
        self, prompts: Sequence[Rendered], *, max_new_tokens: int, beams: int = 1, length_penalty: float = 1.0
    ) -> list[Completion]:
        """The best completion of each prompt, in order; greedy with one beam."""


def answer_ids(tokenizer: Any, answer: str, space: str = "") -> list[int]:
    """An answer's own ids, tokenised apart from any prompt, behind the white space that the prompt left, without an end token.

    Raises:
        GeneratorError: the answer has no token.
    """
    ids = tokenizer(space + answer, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    if not ids or not answer.strip():  # white space that the prompt left is no answer yet
        raise GeneratorError(
            f"answer {answer!r} has no token in this model's vocabulary", hint="correct or remove it in the question file"
        )
    return list(ids)


def end_of_turn(tokenizer: Any, ends: Collection[int]) -> int | None:
    """The control token that the chat template writes behind what an assistant says, if it writes one: one of the tokenizer's
    special tokens, or of the end tokens that are known.
    """
    chat = [{"role": "user", "content": MARK}, {"role": "assistant", "content": MARK}]
    _, _, after = tokenizer.apply_chat_template(chat, tokenize=False).rpartition(MARK)
    first = tokenizer(after, add_special_tokens=False, verbose=False)["input_ids"][:1]
    return int(first[0]) if first and first[0] in {*tokenizer.all_special_ids, *ends} else None


def tokenizer_identity(tokenizer: Any) -> str:
    """Names what a tokenizer makes of text: its vocabulary, what it puts around a text, and its chat template."""
    around = tokenizer("a b")["input_ids"]
    return fingerprint([sorted(tokenizer.get_vocab().items()), around, getattr(tokenizer, "chat_template", None)])
