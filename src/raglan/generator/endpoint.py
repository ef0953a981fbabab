"""Answers scored on a server that speaks OpenAI's completions protocol: vLLM, and others that give prompt log-probabilities.

A pair goes out as token ids, [prompt | w1 … wT EOS], made here as for a model run here: prompt and answer tokenised apart, one
BOS, white space at the head of the answer. The server's text is never asked for, so its own template and tokenisation cannot
get in between. Back come log-probabilities of the prompt's tokens, in one of two ways: `prompt_logprobs` (vLLM's) or `echo`
with `logprobs` (OpenAI's, which vLLM has too). Which of them a server has, one pair tells, before anything else is asked; on
the same pair the pieces of the answer must spell the answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raglan.artifact import directory_fingerprint, fingerprint
from raglan.errors import GeneratorError, require
from raglan.generator.base import Scorer, answer_ids, end_of_turn, tokenizer_identity
from raglan.generator.server import Server, local_tokenizer
from raglan.prompt import Prompt, Rendered
from raglan.recipe import PromptSettings, ScorerSettings

__all__ = ["EndpointScorer"]

WEIGHTS = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")
PROBE = ("The tower was built in", "1831, by a miller")
HINT = "it must return prompt log-probabilities, as `vllm serve MODEL` does; most hosted services do not"


class EndpointScorer(Scorer):
    """A causal model behind a server, its tokenizer here.

    Raises:
        CheckpointError: a tokenizer that cannot be loaded.
        GeneratorError: `api_key_env` names a variable that is not set; a tokenizer without an end token.
    """

    def __init__(self, settings: ScorerSettings, prompt: PromptSettings):
        assert settings.endpoint is not None
        self.settings, self.tokenizer = settings, local_tokenizer(settings.tokenizer or settings.model, field="scorer")
        if self.tokenizer.eos_token_id is None:
            raise GeneratorError(f"the tokenizer of {settings.model!r} names no end token", hint="set its eos_token")
        own = int(self.tokenizer.eos_token_id)
        chat = bool(getattr(self.tokenizer, "chat_template", None))
        layout = prompt.layout if prompt.layout != "auto" else "chat" if chat else "joined"
        closes = end_of_turn(self.tokenizer, [own]) if layout == "chat" else None
        self.eos = own if closes is None else closes
        self.prompt = Prompt(prompt, self.tokenizer, layout=layout, end=own)
        kept = "what is scored is kept; "
        self.server = Server(settings, field="scorer", purpose="to score on an endpoint", kept=kept)
        self._read: _Reading | None = None

    @property
    def batch_tokens(self) -> int:
        return self.settings.batch_tokens

    @property
    def fingerprint(self) -> str:
        prompt = [self.prompt.settings.model_dump(mode="json"), self.prompt.layout, self.eos]
        folder = Path(self.settings.model)  # a server may serve a folder of this machine, whose weights may change
        weights = directory_fingerprint(folder, WEIGHTS) if folder.is_dir() else self.settings.model
        named = [weights, self.settings.revision]
        return fingerprint([named, tokenizer_identity(self.tokenizer), prompt])

    def row(self, prompt: Rendered, answer: str) -> dict[str, list[int]]:
        return {"input_ids": list(prompt.ids), "labels": [*answer_ids(self.tokenizer, answer, prompt.answer_space), self.eos]}

    def token_logprobs(
        self, prompts: Sequence[Rendered], answers: Sequence[str], *, score_eos: bool = True
    ) -> list[np.ndarray]:
        """As every scorer's.

        Raises:
            GeneratorError: a server that cannot be reached, refuses the key or the model, or cannot score prompts.
        """
        rows = [self.row(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        values = self.server.together(self._one, rows, first=self._find_way)
        return [own if score_eos else own[:-1] for own in values]

    async def _find_way(self, client: Any) -> None:
        self._read = self._read or await self._way(client)

    async def _one(self, client: Any, row: dict[str, list[int]]) -> np.ndarray:
        read, ids, first = self._read, [*row["input_ids"], *row["labels"]], len(row["input_ids"])
        assert read is not None
        found = read(await self._asked(client, ids, read), ids, first)
        if found is None:
            raise GeneratorError(f"{self.server.name} left out log-probabilities of an answer's tokens", hint=HINT)
        return np.array([logprob for logprob, _ in found], dtype=np.float32)

    async def _asked(self, client: Any, ids: list[int], read: _Reading) -> Any:
        answer = await client.completions.create(
            model=self.settings.model, prompt=ids, max_tokens=1, temperature=0.0, **ASKS[read]
        )
        return answer.choices[0]

    async def _way(self, client: Any) -> _Reading:
        """The first way of reading prompt log-probabilities that this server answers, tried on one pair."""
        openai = require("openai", "to score on an endpoint")
        question, answer = PROBE
        labels = answer_ids(self.tokenizer, answer, " ")
        ids = [*self.prompt.opened(question), *labels]
        why = ""
        for read in ASKS:
            try:
                found = read(await self._asked(client, ids, read), ids, len(ids) - len(labels))
            except (openai.BadRequestError, openai.UnprocessableEntityError) as fault:
                why = f": {self.server.without_key(fault)}"
                continue  # a server that knows this way would not refuse so short a prompt
            if found is not None:
                self._check_spelling([piece for _, piece in found], labels, answer)
                return read
        raise GeneratorError(f"{self.server.name} gives no log-probabilities of a prompt's tokens{why}", hint=HINT)

    def _check_spelling(self, pieces: Sequence[str], labels: Sequence[int], answer: str) -> None:
        """What the server holds for the answer's ids must be the answer: its tokenizer has to be the one used here."""
        ours = [f"token_id:{number}" for number in labels]
        told = "".join(pieces).translate({ord(mark): None for mark in "▁Ġ \n"})
        if list(pieces) != ours and told != answer.replace(" ", ""):
            raise GeneratorError(
                f"{self.server.name} reads the tokens of {answer!r} as {''.join(pieces)!r}",
                hint="scorer.tokenizer must be the served model's own, a folder or hub name",
            )


_Found = list[tuple[float, str]] | None  # log-probability and piece of each answer token, or nothing
_Reading = Callable[[Any, Sequence[int], int], _Found]


def _of_prompt(choice: Any, ids: Sequence[int], first: int) -> _Found:
    """`prompt_logprobs`: for each position a mapping of token ids, the prompt's own among them."""
    positions = (choice.model_extra or {}).get("prompt_logprobs")
    if not positions or len(positions) < len(ids):
        return None
    own = [(position or {}).get(str(number)) for position, number in zip(positions[first:], ids[first:], strict=False)]
    found = [(entry.get("logprob"), str(entry.get("decoded_token") or "")) for entry in own if entry]
    return _all_told(found, len(ids) - first)


def _of_echo(choice: Any, ids: Sequence[int], first: int) -> _Found:
    """`echo` with `logprobs`: prompt tokens first, then what was written."""
    told = choice.logprobs
    if told is None or not told.token_logprobs or not told.tokens or len(told.tokens) < len(ids):
        return None
    last = len(ids)
    return _all_told(list(zip(told.token_logprobs[first:last], told.tokens[first:last], strict=False)), last - first)


ASKS: dict[_Reading, dict[str, Any]] = {
    _of_prompt: {"extra_body": {"prompt_logprobs": 1}},
    _of_echo: {"echo": True, "logprobs": 1},
}


def _all_told(found: list[tuple[Any, str]], wanted: int) -> _Found:
    numbers = len(found) == wanted and all(isinstance(value, float | int) and not math.isnan(value) for value, _ in found)
    return found if numbers else None
