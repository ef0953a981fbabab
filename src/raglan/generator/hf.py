"""Any transformers seq2seq or causal model as a generator, with LoRA as a setting.

One layout for training, scoring and decoding: `[forced prefix] | w1 … wT EOS`. Left of the bar nothing is scored, right of
it everything, the end token included. The answer is tokenised by itself, never together with the prompt. Causal prompts
are padded right for scoring and left for generation, with the same numbers.

What the model computes of such rows is in `raglan.generator.headed`, how a recipe's model is loaded in
`raglan.generator.loading`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raglan.artifact import fingerprint, write_manifest
from raglan.encoder import bfloat16_is_faster
from raglan.errors import GeneratorError, RecipeError
from raglan.generator.base import Cost, Generator, MarkedGenerator, answer_ids, end_of_turn, tokenizer_identity
from raglan.generator.batches import UNSCORED, learned, padded
from raglan.generator.causal import CopierForCausalLM
from raglan.generator.contexts import HFContexts, prompt_contexts
from raglan.generator.headed import HeadedModel, reader_of
from raglan.generator.trees import Tree, grown, reads_trees, room, tree_batch, tree_length
from raglan.marked_prompt import MarkedPrompt, read_schema
from raglan.memory import give_back
from raglan.progress import track
from raglan.prompt import Prompt, Rendered
from raglan.quiet import quietly, without_bars
from raglan.recipe import GeneratorSettings, PromptSettings
from raglan.records import Completion
from raglan.reflection import Schema
from raglan.text import restore_surface, shortened
from raglan.vocabulary import rows_of, save_tokenizer

__all__ = ["HFGenerator"]

log = logging.getLogger(__name__)
MOST = 1 << 40  # no limit
ANSWER_ROOM = 64  # positions a causal model keeps free behind its longest prompt
MAX_ROWS = 64  # generation keeps every step's logits of a batch, (rows, V) each
CPU_TOKENS = 2048  # scored in one pass on a CPU: more keeps its cores no busier, and leaves the cache


class HFGenerator(HeadedModel, Generator, MarkedGenerator):
    """A transformers model, its tokenizer and its prompt.

    Attributes:
        model: the (peft-wrapped) model. `is_seq2seq`: whether it encodes the prompt apart.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: GeneratorSettings, prompt: PromptSettings):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        config = model.config
        self.is_seq2seq = bool(config.is_encoder_decoder)
        self.reader = reader_of(model)
        named = [c.eos_token_id for c in (config, model.generation_config) if getattr(c, "eos_token_id", None) is not None]
        listed = [end for ends in named for end in (ends if isinstance(ends, list) else [ends])]
        own = tokenizer.eos_token_id
        self.ends = [int(end) for end in dict.fromkeys([*listed, own]) if end is not None]
        if not self.ends:
            raise GeneratorError(f"{settings.model!r} names no end token", hint="set eos_token_id in its config.json")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(self.ends[0])
        self.pad = int(tokenizer.pad_token_id)
        self.eos = int(own) if own in self.ends else self.ends[0]  # a chat model's own end of turn, where it has several
        self.prefix = self._prefix()
        sized = self.reader.encoder.bert.config if self.reader is not None else config
        longest = getattr(sized, "max_position_embeddings", None)
        self._positions = int(longest) if longest else None
        layout = prompt.layout if prompt.layout != "auto" else self._layout()
        closes = end_of_turn(tokenizer, self.ends) if layout == "chat" else None
        if closes is not None:
            self.eos, self.ends = closes, list(dict.fromkeys([*self.ends, closes]))
        end = None if self.is_seq2seq else own
        self.prompt = Prompt(prompt, tokenizer, layout=layout, limit=self._limit(), end=end)
        fast = settings.dtype == "bfloat16" or (settings.dtype == "auto" and bfloat16_is_faster())
        self.dtype = torch.bfloat16 if fast else torch.float16 if settings.dtype == "float16" else torch.float32
        self.cost, self.exact_marks = Cost(), True
        self.overflowed = 0  # prompts that lost passages to their answer, under `overflow: cut_left`
        self.left_cut = 0  # and prompts that lost their beginning, since nobody knew of what they were made
        self.learned_prompt: Mapping[str, Any] | None = None  # see `raglan.learned_prompt`
        self._head_is_checked = False
        if self.reader is not None and self.device.type == "cpu":
            self.reader.use_plain_attention()

    def generate(
        self, prompts: Sequence[Rendered], *, max_new_tokens: int, beams: int = 1, length_penalty: float = 1.0
    ) -> list[Completion]:
        prompts = self.fitted(prompts, max_new_tokens)
        for prompt in prompts:
            self.check_positions(len(prompt.ids), max_new_tokens)
        completions: dict[int, Completion] = {}
        was_training = self.model.training
        self.model.eval()
        for places in track(list(self._by_length([len(prompt.ids) for prompt in prompts], self.batch_tokens)), "reading"):
            part = [prompts[place] for place in places]
            completions.update(zip(places, self._generate(part, max_new_tokens, beams, length_penalty), strict=True))
            give_back()
        self.model.train(was_training)
        return [completions[place] for place in range(len(prompts))]

    def token_logprobs(
        self, prompts: Sequence[Rendered], answers: Sequence[str], *, score_eos: bool = True
    ) -> list[np.ndarray]:
        rows = [self.row(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        found: dict[int, np.ndarray] = {}
        was_training = self.model.training
        self.model.eval()
        trees, alone = grown(rows, room(self.model))
        if trees and not self.shares_beginnings:
            trees, alone = [], list(range(len(rows)))
        most = min(self.batch_tokens, CPU_TOKENS) if self.device.type == "cpu" else self.batch_tokens
        lengths = [len(rows[place]["input_ids"]) + len(rows[place]["labels"]) for place in alone]
        passes: list[tuple[list[int], list[Tree]]] = [([alone[n] for n in own], []) for own in self._by_length(lengths, most)]
        for own in self._by_length([tree_length(tree, rows) for tree in trees], most):
            passes.append(([place for n in own for place in trees[n].places], [trees[n] for n in own]))
        for places, grouped in track(passes, "scoring"):
            batch = self.tree_batch(grouped, rows) if grouped else self.collate([rows[place] for place in places])
            with torch.no_grad(), self.autocast():
                logprobs = self.forward(batch).float().cpu().numpy()
            for place, values in zip(places, logprobs, strict=True):
                found[place] = values[: len(rows[place]["labels"]) - (not score_eos)]
            give_back()
        self.model.train(was_training)
        return [found[place] for place in range(len(prompts))]

    @cached_property
    def shares_beginnings(self) -> bool:
        """Whether what rows begin with is computed once for all of them: see `raglan.generator.trees`."""
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if self.is_seq2seq or isinstance(base, CopierForCausalLM) or not room(self.model):
            return False
        was_training = self.model.training
        self.model.eval()
        try:
            with self.autocast():
                return reads_trees(self)
        finally:
            self.model.train(was_training)

    def tree_batch(self, trees: Sequence[Tree], rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        return tree_batch(trees, rows, self.pad, attention=self.model.config._attn_implementation, dtype=self.model.dtype)

    def contexts(self, prompts: Sequence[Sequence[int]], *, marks: Sequence[int]) -> HFContexts:
        if self.is_seq2seq:
            raise GeneratorError(
                f"{self.settings.model!r} reads a prompt apart from its answer: its prompts cannot be branched",
                hint="decode.kind: self_rag takes a causal model",
            )
        made = prompt_contexts(self, prompts, marks)
        if not self._head_is_checked and prompts:
            ids = torch.tensor([list(prompts[0])], device=self.device)
            with self.autocast():
                self._check_head({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        return made

    def row(self, prompt: Rendered, answer: str) -> dict[str, list[int]]:
        """One training row: prompt ids, and the answer's own ids with the end token, tokenised apart.

        Raises:
            GeneratorError: the answer has no token.
        """
        labels = self.answer_ids(answer, prompt.answer_space)
        prompt = self._guarded(prompt, len(labels))
        self.check_positions(len(prompt.ids), len(labels), f", answer {shortened(answer)!r}")
        return {"input_ids": list(prompt.ids), "labels": labels}

    def text_row(self, text: str, *, limit: int | None = None) -> dict[str, list[int]]:
        """A row of raw text with the end token: all but its first token is learned. What exceeds `limit` tokens is cut.

        Raises:
            GeneratorError: a model that is not causal, or a text without a token.
        """
        if self.is_seq2seq:
            raise GeneratorError(
                f"{self.settings.model!r} reads a prompt apart from its answer: it cannot learn raw text",
                hint="leave out sources with context: none, or take a causal model",
            )
        most = min(limit or MOST, self._positions or MOST) - 1
        ids = [*self.prompt.opened(text)[:most], self.eos]
        if not text.strip() or len(ids) < 2:
            raise GeneratorError(f"text {shortened(text)!r} has no token in this model's vocabulary", hint="remove it")
        return {"input_ids": ids[:1], "labels": ids[1:]}

    def answer_ids(self, answer: str, space: str | None = None) -> list[int]:
        """An answer's own ids with the end token. `space` is what the prompt's template leaves to it; default, this prompt's.

        Raises:
            GeneratorError: the answer has no token.
        """
        space = self.prompt.answer_space if space is None else space
        if self.prompt.settings.self_rag.answers == "tokens" and answer in self.schema.spellings:
            return [self.schema.identity(answer), self.eos]
        return [*answer_ids(self.tokenizer, answer, "" if self.is_seq2seq else space), self.eos]

    def collate(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Rows → {input_ids (B,L), attention_mask (B,L), labels (B,T)}; masks come from lengths, −100 is no answer.

        Where a row has `learned`, the batch has it too, (B,T): False where a label is only read.
        """
        inputs, mask = padded([row["input_ids"] for row in rows], self.pad)
        labels, _ = padded([row["labels"] for row in rows], UNSCORED)
        return {"input_ids": inputs, "attention_mask": mask, "labels": labels, **learned(rows)}

    @cached_property
    def schema(self) -> Schema:
        """The reflection tokens of this model's vocabulary. Raises CheckpointError where they are not there."""
        return read_schema(self.tokenizer, rows_of(self.model))

    @cached_property
    def marked_prompt(self) -> MarkedPrompt:
        """Prompts with reflection tokens. Raises CheckpointError where the vocabulary has none."""
        return MarkedPrompt(self.schema, self.tokenizer, self.prompt.settings.self_rag, eos=self.eos)

    @property
    def batch_tokens(self) -> int:
        return self.settings.batch_tokens

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        prompt = [self.prompt.settings.model_dump(mode="json"), self.prompt.layout, self.prefix, self.eos]
        return fingerprint([digest.hexdigest(), tokenizer_identity(self.tokenizer), prompt, str(self.dtype)])

    def save(self, folder: Path, **figures: Any) -> None:
        """Write weights (or the adapter) and tokenizer in the transformers (peft) layout, then the manifest."""
        # An adapter holds the rows that it learned; peft would add both matrices whole, because they have grown.
        own = {"save_embedding_layers": False} if hasattr(self.model, "peft_config") else {}
        with without_bars():
            self.model.save_pretrained(str(folder), **own)
        save_tokenizer(self.tokenizer, folder)
        told: dict[str, Any] = {
            "model": self.settings.model, "lora": self.settings.lora, "vocabulary": self.settings.vocabulary,
        }  # fmt: skip
        if self.settings.adapter is not None:
            told["adapter"] = self.settings.adapter.model_dump(mode="json")
        if self.settings.vocabulary == "self_rag":
            told |= {"vocabulary_init": self.settings.vocabulary_init, "schema": self.schema.to_dict()}
        if self.settings.overflow == "cut_left":
            told |= {"overflowed": self.overflowed, "left_cut": self.left_cut}
        if self.learned_prompt is not None:
            told["prompt"] = self.learned_prompt
        write_manifest(folder, "generator", {**told, **figures})

    def fitted(self, prompts: Sequence[Rendered], answer: int) -> list[Rendered]:
        return [self._guarded(prompt, answer) for prompt in prompts]

    def _guarded(self, prompt: Rendered, answer: int) -> Rendered:
        """The prompt; under `overflow: cut_left` without the passages, the last first, that leave the answer no room.

        Raises:
            GeneratorError: the question and what stands around it leave none either.
        """
        over = len(prompt.ids) + answer - (self._positions or MOST)
        if self.settings.overflow != "cut_left" or self.is_seq2seq or over <= 0:
            return prompt
        if prompt.whole_within is not None:
            return self._refitted(prompt, answer)
        opens = int(prompt.ids[0] == self.tokenizer.bos_token_id)
        if over > len(prompt.ids) - opens - 1:
            return prompt  # nothing of it would be left: `check_positions` tells
        self.left_cut += 1
        log.warning("a prompt of %d tokens lost its first %d: lower prompt.max_tokens", len(prompt.ids), over)
        return replace(prompt, ids=(*prompt.ids[:opens], *prompt.ids[opens + over :]), cut_tokens=prompt.cut_tokens + over)

    def _refitted(self, prompt: Rendered, answer: int) -> Rendered:
        assert prompt.whole_within is not None
        assert self._positions is not None
        try:
            found = prompt.whole_within(self._positions - answer)
        except RecipeError as why:
            raise GeneratorError(
                f"the question with what stands around it and an answer of {answer} do not fit into the model's "
                f"{self._positions} positions",
                hint="questions are never cut: shorten question or answer, or lower decode.max_new_tokens",
            ) from why
        self.overflowed += 1
        log.warning("%d passages left a prompt of %d tokens: lower prompt.max_tokens", found.dropped_passages, len(prompt.ids))
        return found

    def check_positions(self, prompt: int, answer: int, which: str = "") -> None:
        """Learned positions end somewhere; behind them lies an IndexError."""
        used = answer + len(self.prefix) if self.is_seq2seq else prompt + answer
        if self._positions is not None and used > self._positions:
            raise GeneratorError(
                f"prompt and answer need {used} positions, the model has {self._positions}{which}",
                hint="lower prompt.max_tokens or decode.max_new_tokens, or shorten the answer",
            )

    def _layout(self) -> str:
        if self.reader is not None:
            return "fused"
        return "chat" if not self.is_seq2seq and getattr(self.tokenizer, "chat_template", None) else "joined"

    @property
    def positions(self) -> int | None:
        """How many positions the model has; None where it has no end."""
        return self._positions

    def _limit(self) -> int | None:
        if self._positions is None or self.is_seq2seq:
            return self._positions
        return max(1, self._positions - ANSWER_ROOM)

    def _prefix(self) -> list[int]:
        """What the decoder is given before the answer: T5 <pad>, BART </s> <s>, the reader [CLS]; nothing for causal."""
        if not self.is_seq2seq:
            return []
        start = self.model.config.decoder_start_token_id
        start = self.model.generation_config.decoder_start_token_id if start is None else start
        begins = self.tokenizer("x")["input_ids"][0]
        bos = self.tokenizer.bos_token_id
        return [int(start), *([bos] if bos is not None and begins == bos and bos != start else [])]

    def _by_length(self, lengths: Sequence[int], most: int) -> Iterator[list[int]]:
        """Batches of places, longest first, each of at most so many padded tokens."""
        batch: list[int] = []
        for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            full = len(batch) == MAX_ROWS or (len(batch) + 1) * lengths[batch[0] if batch else place] > most
            if batch and full:
                yield batch
                batch = []
            batch.append(place)
        if batch:
            yield batch

    @torch.no_grad()
    def _generate(
        self, prompts: Sequence[Rendered], max_new_tokens: int, beams: int, length_penalty: float
    ) -> list[Completion]:
        ids, mask = padded([list(prompt.ids) for prompt in prompts], self.pad, left=not self.is_seq2seq)
        inputs: dict[str, Any] = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        if self.is_seq2seq:
            inputs["decoder_input_ids"] = torch.tensor([self.prefix] * len(prompts), device=self.device)
        with self.autocast(), quietly():
            output = self.model.generate(
                **inputs, max_new_tokens=max_new_tokens, num_beams=beams, length_penalty=length_penalty, do_sample=False,
                pad_token_id=self.pad, eos_token_id=self.ends, return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        start = len(self.prefix) if self.is_seq2seq else ids.shape[1]
        logprobs = self._generated_logprobs(output, start)
        return [
            self._completion(prompt, written.tolist(), values)
            for prompt, written, values in zip(prompts, output.sequences[:, start:], logprobs, strict=True)
        ]

    def _generated_logprobs(self, output: Any, start: int) -> list[list[float]]:
        """Raw log-probability of every written token, (B,T)."""
        beams = getattr(output, "beam_indices", None)
        written = output.sequences[:, start:]
        columns = []
        for step, logits in enumerate(output.logits[: written.shape[1]]):
            rows = torch.arange(len(written), device=logits.device) if beams is None else beams[:, step].clamp_min(0)
            columns.append(logits.float().log_softmax(-1)[rows, written[:, step]])
        values: list[list[float]] = torch.stack(columns, dim=1).tolist() if columns else [[] for _ in written]
        return values

    def _completion(self, prompt: Rendered, ids: list[int], logprobs: list[float]) -> Completion:
        end = next((place for place, token in enumerate(ids) if token in self.ends), None)
        finished, length = end is not None, len(ids) if end is None else end + 1
        return Completion(self.text(ids[:length], prompt.sources), tuple(ids[:length]), float(sum(logprobs[:length])), finished)

    def text(self, ids: Sequence[int], sources: Sequence[str]) -> str:
        """An answer's ids as text, without its end token; the reader's in the spelling of the passages it copied from."""
        kept = list(ids[:-1]) if ids and ids[-1] in self.ends else list(ids)
        text = str(self.tokenizer.decode(kept, skip_special_tokens=True)).strip()
        return restore_surface(text, list(sources)) if self.reader is not None else text
