"""Prompts encoded once, then written from and scored against as often as wanted.

What a prompt costs is its encoding (seq2seq: encoder states and the decoder's cross-attention keys and values; causal: the
prompt's keys and values). RAG decodings need it many times: once for every beam, and once for every candidate whose
likelihood is asked. Here it is computed once a prompt, copied for beams, and never reordered with them, since all beams of a
prompt read the same.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from raglan.generator.batches import UNSCORED, padded
from raglan.generator.hf import HFGenerator
from raglan.generator.reader import ReaderEncoding
from raglan.likelihood import chunked_token_logprobs
from raglan.prompt import Rendered
from raglan.quiet import quietly

__all__ = ["EncodedPrompts", "Written", "encode_prompts"]

FILLED = -1e8  # transformers fills beams up with copies at −1e9 where there are fewer answers: what scores less is none

# What a model's own generation settings may ask for, switched off: it would act before our processors, on each passage apart.
NEUTRAL: dict[str, Any] = {
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0, "min_p": None, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
    "min_length": 0, "min_new_tokens": None, "forced_bos_token_id": None, "forced_eos_token_id": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "bad_words_ids": None, "sequence_bias": None, "exponential_decay_length_penalty": None,
    "guidance_scale": None, "renormalize_logits": False, "remove_invalid_values": False, "early_stopping": False,
    "use_cache": True, "cache_implementation": None, "stop_strings": None, "watermarking_config": None, "max_time": None,
    "prompt_lookup_num_tokens": None,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Written:
    """One answer of one prompt: its ids up to and with the end token, their raw log-probability, and whether it ended."""

    ids: tuple[int, ...]
    logprob: float
    finished: bool


class EncodedPrompts(ABC):
    """R encoded prompts of one generator. Not for training: nothing here carries a gradient."""

    def __init__(self, generator: HFGenerator, prompts: Sequence[Rendered]):
        self.generator, self.model = generator, generator.model
        ids, mask = padded([list(prompt.ids) for prompt in prompts], generator.pad, left=not generator.is_seq2seq)
        self.ids, self.mask = ids.to(generator.device), mask.to(generator.device)

    def __len__(self) -> int:
        return len(self.ids)

    @torch.no_grad()
    def sequences(
        self, *, max_new_tokens: int, beams: int = 1, returns: int = 1, length_penalty: float = 1.0,
        processors: Sequence[LogitsProcessor] = (), draw: bool = False, scores: bool = False,
    ) -> tuple[list[list[int]], Any]:  # fmt: skip
        """R·returns id lists without prompt and forced prefix, cut behind the end token, and transformers' output."""
        self.generator.check_positions(self.ids.shape[1], max_new_tokens)
        width = max(beams, returns)
        with self.generator.autocast(), quietly():
            output = self.model.generate(
                **self._inputs(width), **NEUTRAL, max_new_tokens=max_new_tokens, num_beams=beams, num_return_sequences=returns,
                length_penalty=length_penalty, do_sample=draw, pad_token_id=self.generator.pad,
                eos_token_id=self.generator.ends, logits_processor=LogitsProcessorList(processors),
                return_dict_in_generate=True, output_scores=scores,
            )  # fmt: skip
        return [self._cut(row) for row in output.sequences[:, self.start :].tolist()], output

    def write(self, *, max_new_tokens: int, beams: int = 1, length_penalty: float = 1.0) -> list[list[Written]]:
        """The best `beams` answers of each prompt (one, greedy, with `beams` 1), best first; fewer where there are no more."""
        greedy = _Greedy()
        ids, output = self.sequences(
            max_new_tokens=max_new_tokens, beams=beams, returns=beams, length_penalty=length_penalty,
            processors=[greedy] if beams == 1 else [], scores=beams > 1,
        )  # fmt: skip
        if beams == 1:
            logprobs = greedy.totals([len(row) for row in ids])
        else:  # transformers divides by length ** penalty, the end token counted
            scores = output.sequences_scores.tolist()
            logprobs = [score * len(row) ** length_penalty for score, row in zip(scores, ids, strict=True)]
        written = [Written(tuple(row), value, self.ended(row)) for row, value in zip(ids, logprobs, strict=True)]
        real = [
            [one for one in written[start : start + beams] if one.logprob > FILLED] for start in range(0, len(written), beams)
        ]
        return [kept or written[number * beams : number * beams + 1] for number, kept in enumerate(real)]

    @torch.no_grad()
    def score(self, rows: Sequence[int], answers: Sequence[Sequence[int]]) -> Tensor:
        """log p(y_t | prompt of that row, y_<t) of answers given as ids, (P,T) float32; 0 behind an answer's end."""
        longest = max((len(answer) for answer in answers), default=0)
        found = torch.zeros((len(rows), longest))
        for places in self._batches(rows, answers):
            labels, _ = padded([list(answers[place]) for place in places], UNSCORED)
            chosen = torch.tensor([rows[place] for place in places], device=self.generator.device)
            with self.generator.autocast():
                values = self._logprobs(chosen, labels.to(self.generator.device))
            found[places, : labels.shape[1]] = values.float().cpu()
        return found

    def _batches(self, rows: Sequence[int], answers: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Pairs of like answer length together, as many as `batch_tokens` keys are held for."""
        most = max(1, self.generator.settings.batch_tokens // self.ids.shape[1])
        order = sorted(range(len(rows)), key=lambda place: (len(answers[place]), rows[place]))
        yield from (order[start : start + most] for start in range(0, len(order), most))

    def _cut(self, ids: list[int]) -> list[int]:
        end = next((place for place, token in enumerate(ids) if token in self.generator.ends), len(ids) - 1)
        return ids[: end + 1]

    def ended(self, ids: Sequence[int]) -> bool:
        return bool(ids) and ids[-1] in self.generator.ends

    @property
    @abstractmethod
    def start(self) -> int:
        """Where the answer begins in what `generate` returns."""

    @abstractmethod
    def _inputs(self, width: int) -> dict[str, Any]:
        """What `generate` needs to go on from the encoding, `width` rows a prompt."""

    @abstractmethod
    def _logprobs(self, rows: Tensor, labels: Tensor) -> Tensor:
        """(P,), (P,T) → (P,T)."""


class _ByHead(EncodedPrompts):
    """Models with an LM head: states of the answer's tokens behind cached keys and values."""

    last: Tensor  # (R,D) what the head reads to predict the answer's first token

    def _logprobs(self, rows: Tensor, labels: Tensor) -> Tensor:
        first = self.last[rows][:, None]
        hidden = first if labels.shape[1] == 1 else torch.cat([first, self._states(rows, labels[:, :-1])], dim=1)
        real = labels >= 0
        chunk = self.generator.settings.head_chunk
        values = chunked_token_logprobs(hidden[real], self.generator.head_logits, labels[real], chunk=chunk)
        return torch.zeros(labels.shape, device=values.device).masked_scatter(real, values)

    @abstractmethod
    def _states(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """States (P,T,D) of answer tokens (P,T; −100 = none) after the prompts of these rows."""


class _Seq2Seq(_ByHead):
    @torch.no_grad()
    def __init__(self, generator: HFGenerator, prompts: Sequence[Rendered]):
        super().__init__(generator, prompts)
        self.prefix = torch.tensor([generator.prefix] * len(prompts), device=generator.device)
        self.cross = DynamicCache()  # filled by the first pass of the decoder, whichever that is
        with generator.autocast():
            self.encoding = self.model.get_encoder()(input_ids=self.ids, attention_mask=self.mask, return_dict=True)

    @property
    def start(self) -> int:
        return self.prefix.shape[1]

    def _inputs(self, width: int) -> dict[str, Any]:
        return {
            "encoder_outputs": type(self.encoding)(**self.encoding), "attention_mask": self.mask,
            "decoder_input_ids": self.prefix, "past_key_values": _SharedCross(DynamicCache(), self._cross_of(width)),
        }  # fmt: skip

    def _cross_of(self, width: int) -> DynamicCache:
        if width == 1:
            return self.cross
        return _picked(
            self._prefilled[1].cross_attention_cache, torch.arange(len(self), device=self.ids.device).repeat_interleave(width)
        )

    @property
    def last(self) -> Tensor:  # type: ignore[override]
        return self._prefilled[0]

    @cached_property
    def _prefilled(self) -> tuple[Tensor, EncoderDecoderCache]:
        """What the head reads behind the forced prefix, (R,D), and the decoder's keys and values so far."""
        cache = EncoderDecoderCache(DynamicCache(), self.cross)
        return self._decoded(self.encoding, self.mask, self.prefix, cache)[:, -1], cache

    def _states(self, rows: Tensor, tokens: Tensor) -> Tensor:
        known = self._prefilled[1]
        cache = EncoderDecoderCache(_picked(known.self_attention_cache, rows), _picked(known.cross_attention_cache, rows))
        chosen = type(self.encoding)(last_hidden_state=self.encoding.last_hidden_state[rows])
        return self._decoded(chosen, self.mask[rows], tokens.clamp_min(0), cache)

    def _decoded(self, encoding: Any, mask: Tensor, tokens: Tensor, cache: EncoderDecoderCache) -> Tensor:
        inputs = {"encoder_outputs": encoding, "attention_mask": mask, "decoder_input_ids": tokens, "past_key_values": cache}
        return self.generator.states_before_head(self.model, inputs, use_cache=True)


class _Causal(_ByHead):
    @torch.no_grad()
    def __init__(self, generator: HFGenerator, prompts: Sequence[Rendered]):
        super().__init__(generator, prompts)
        self.places = "position_ids" in inspect.signature(self.model.forward).parameters or hasattr(self.model, "peft_config")
        self.lengths = self.mask.sum(1)
        self.cache = DynamicCache()
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)
        with generator.autocast():
            self.last = self._decoded(self.ids, self.mask, positions, self.cache)[:, -1]

    @property
    def start(self) -> int:
        return self.ids.shape[1]

    def _inputs(self, width: int) -> dict[str, Any]:
        rows = torch.arange(len(self), device=self.ids.device).repeat_interleave(width)
        cache = _picked(self.cache, rows, without_last=True)  # generate reads the last token itself
        return {"input_ids": self.ids, "attention_mask": self.mask, "past_key_values": cache}

    def _states(self, rows: Tensor, tokens: Tensor) -> Tensor:
        positions = self.lengths[rows][:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        mask = torch.cat([self.mask[rows], (tokens >= 0).long()], dim=1)
        return self._decoded(tokens.clamp_min(0), mask, positions, _picked(self.cache, rows))

    def _decoded(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
        inputs |= {"position_ids": positions} if self.places else {}
        return self.generator.states_before_head(self.model, inputs, use_cache=True)


class _Reader(EncodedPrompts):
    """The embedded reader: its mixture needs the encoder's states, not a head."""

    @torch.no_grad()
    def __init__(self, generator: HFGenerator, prompts: Sequence[Rendered]):
        super().__init__(generator, prompts)
        with generator.autocast():
            self.encoding: ReaderEncoding = self.model.encoder(input_ids=self.ids, attention_mask=self.mask)

    @property
    def start(self) -> int:
        return len(self.generator.prefix)

    def _inputs(self, width: int) -> dict[str, Any]:
        prefix = torch.tensor([self.generator.prefix] * len(self), device=self.ids.device)
        encoding = ReaderEncoding(**self.encoding)
        return {"encoder_outputs": encoding, "attention_mask": self.mask, "decoder_input_ids": prefix}

    def _logprobs(self, rows: Tensor, labels: Tensor) -> Tensor:
        chosen = ReaderEncoding(**{name: value[rows] for name, value in self.encoding.items()})
        output = self.model(encoder_outputs=chosen, attention_mask=self.mask[rows], labels=labels)
        return output.target_logprobs  # type: ignore[no-any-return]


def encode_prompts(generator: HFGenerator, prompts: Sequence[Rendered]) -> EncodedPrompts:
    """Encode R ≥ 1 prompts, in the model's evaluation mode."""
    generator.model.eval()
    if generator.reader is not None:
        return _Reader(generator, prompts)
    return _Seq2Seq(generator, prompts) if generator.is_seq2seq else _Causal(generator, prompts)


class _Greedy(LogitsProcessor):
    """Changes nothing and remembers the log-probability of every step's best token, without keeping (R,V) numbers."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        wide = scores.float()
        self.steps.append(wide.max(-1).values - wide.logsumexp(-1))
        return scores

    def totals(self, lengths: Sequence[int]) -> list[float]:
        steps = torch.stack(self.steps, dim=1).double().cumsum(1)
        return [float(row[length - 1]) for row, length in zip(steps, lengths, strict=True)]


class _SharedCross(EncoderDecoderCache):
    """Cross-attention keys and values are the same for all beams of a prompt: only the decoder's own are reordered."""

    def reorder_cache(self, beam_idx: Tensor) -> None:  # type: ignore[override]
        self.self_attention_cache.reorder_cache(beam_idx)


def _picked(cache: Cache, rows: Tensor, *, without_last: bool = False) -> DynamicCache:
    """A copy with these rows of a cache, so that what is decoded behind it does not grow the original."""
    chosen = DynamicCache()
    for number, layer in enumerate(cache.layers):
        end = layer.keys.shape[2] - without_last  # type: ignore[union-attr]
        chosen.update(layer.keys[rows, :, :end], layer.values[rows, :, :end], number)  # type: ignore[index]
    return chosen
