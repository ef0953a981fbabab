"""What every generator can do: write completions, and say how likely an answer is. A scorer does only the latter.

A `MarkedGenerator` writes with reflection tokens (Self-RAG, Asai et al. 2023, arXiv 2310.11511): from contexts of token ids,
computed once and branched as often as wanted, with the log-probabilities of the M marks beside every id, and no others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from raglan.artifact import fingerprint
from raglan.errors import GeneratorError
from raglan.prompt import MARK, Prompt, Rendered
from raglan.records import Completion

if TYPE_CHECKING:
    from raglan.marked_prompt import MarkedPrompt
    from raglan.records import Marked
    from raglan.reflection import Schema

__all__ = ["Contexts", "Cost", "Generator", "MarkedGenerator", "Scorer", "answer_ids", "end_of_turn", "tokenizer_identity"]


class Scorer(ABC):
    """A language model behind a prompt, asked how likely answers are.

    Attributes:
        prompt: renders questions and passages for this model.
    """

    prompt: Prompt

    @property
    def shares_beginnings(self) -> bool:
        """Whether rows of one batch that begin alike are cheaper than others."""
        return False

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

    def fitted(self, prompts: Sequence[Rendered], answer: int) -> list[Rendered]:
        """The prompts as they are read where the answer may take so many tokens. Raises GeneratorError."""
        return list(prompts)

    @abstractmethod
    def generate(
        self, prompts: Sequence[Rendered], *, max_new_tokens: int, beams: int = 1, length_penalty: float = 1.0
    ) -> list[Completion]:
        """The best completion of each prompt, in order; greedy with one beam."""


@dataclass(slots=True)
class Cost:
    """What was spent so far. Counters only grow; what a piece of work took is `cost - before`, `before` being a `copy`.

    Attributes:
        calls: forward passes of the model, or requests.
        positions: token positions computed in them, padding left out.
        reused: positions of prefixes that were taken from the cache, once for every branch that needed them.
        logprobs: log-probabilities kept: M + 1 for every context that was read and every further generated id.
        generated: ids written.
    """

    calls: int = 0
    positions: int = 0
    reused: int = 0
    logprobs: int = 0
    generated: int = 0

    def copy(self) -> Cost:
        return replace(self)

    def __sub__(self, before: Cost) -> Cost:
        names = ("calls", "positions", "reused", "logprobs", "generated")
        return Cost(**{name: getattr(self, name) - getattr(before, name) for name in names})


class Contexts(ABC):
    """n token contexts, computed up to their last position, that can be branched and written on.

    Immutable: what is branched or written leaves them as they were, so one context may be branched many times. What they hold
    (keys and values, where the model runs here) lives as long as they do.
    """

    marks: tuple[int, ...]  # the M ids that are read

    @property
    @abstractmethod
    def ids(self) -> list[tuple[int, ...]]:
        """The ids of each context, all of them."""

    @property
    @abstractmethod
    def mark_logprobs(self) -> np.ndarray:
        """(n,M) float32: next-token log-probabilities of the marks behind each context; NaN where the backend gave none.

        Computed when first asked for: contexts that are only branched again (history) never see the head.
        """

    @property
    @abstractmethod
    def best(self) -> np.ndarray:
        """(n,) int: the likeliest next id of the whole vocabulary behind each context."""

    @abstractmethod
    def branch(self, places: Sequence[int], suffixes: Sequence[Sequence[int]]) -> Contexts:
        """Context places[i] with suffixes[i] behind it, for each i, in ONE forward pass (as far as memory goes).

        The prefix is not computed again. An empty suffix gives the context itself.

        Raises:
            GeneratorError: more positions than the model has.
        """

    @abstractmethod
    def only(self, places: Sequence[int]) -> Contexts:
        """These contexts, in this order; one may come twice. Nothing is computed."""

    @abstractmethod
    def write(
        self, *, stop_ids: Collection[int], max_new_tokens: int | Sequence[int], first: Collection[int] | None = None,
        temperature: float = 0.0, seed: int | None = None,
    ) -> list[Marked]:  # fmt: skip
        """One continuation of each context, in lockstep; the first id comes from what is known already, without a pass.

        A stop id, or an end token, is kept with its marks and ends the row. Log-probabilities are raw whatever is restricted.

        Args:
            stop_ids: ids that end a row. The model's own end tokens always do.
            max_new_tokens: the limit, one for all or one for each context.
            first: the only ids that the first may be.
            temperature: 0 takes the likeliest id; above, ids are drawn from p^(1/temperature).
            seed: draws depend on the seed, the context's place and the step, and on nothing else.

        Raises:
            GeneratorError: more positions than the model has.
        """

    def score(self, places: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """log p(y_t | context places[i], y_<t) of given continuations, (T,) float32 each, in ONE forward pass.

        Raises:
            GeneratorError: a backend that cannot score what it did not write.
        """
        raise GeneratorError(f"{type(self).__name__} cannot score given continuations", hint="use generator.backend: hf")

    def __len__(self) -> int:
        return len(self.ids)


class MarkedGenerator(ABC):
    """A causal language model whose vocabulary holds the reflection tokens, asked with ids and answering with ids.

    Attributes:
        eos: the id that ends an output.
        exact_marks: whether every mark's log-probability comes back at every position; servers may return the top few only.
        cost: counts what all its contexts have computed.
    """

    eos: int
    exact_marks: bool
    cost: Cost

    @property
    @abstractmethod
    def schema(self) -> Schema:
        """The reflection tokens' ids in this model's vocabulary. Raises CheckpointError where it lacks them."""

    @property
    @abstractmethod
    def marked_prompt(self) -> MarkedPrompt:
        """Joins own text, foreign text and control ids for this model. Raises CheckpointError as `schema` does."""

    @abstractmethod
    def contexts(self, prompts: Sequence[Sequence[int]], *, marks: Sequence[int]) -> Contexts:
        """Compute n ≥ 1 prompts of one id or more each, without special tokens added.

        Args:
            prompts: ids as the model reads them, BOS included where it wants one.
            marks: the M ids whose log-probabilities are wanted everywhere.

        Raises:
            GeneratorError: a prompt without an id, or with more positions than the model has.
        """

    def neutralised(self, ids: Sequence[int]) -> int:
        """How many control tokens others' text spells that the model is shown changed, for want of prompts as ids."""
        return 0


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
