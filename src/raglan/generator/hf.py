"""Any transformers seq2seq or causal model as a generator, with LoRA as a setting.

One layout for training, scoring and decoding: `[forced prefix] | w1 … wT EOS`. Left of the bar nothing is scored, right of
it everything, the end token included. The answer is tokenised by itself, never together with the prompt. Causal prompts
are padded right for scoring and left for generation, with the same numbers.

`forward` applies the LM head to answer positions only and in chunks (`likelihood.chunked_token_logprobs`); what reaches the
head is caught by a hook, so any architecture will do, and the first batch is compared with the model's own logits.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from raglan.artifact import MANIFEST, fingerprint, write_manifest
from raglan.characters import add_characters
from raglan.embedded import embedded_model
from raglan.encoder import bfloat16_is_faster, compute_device
from raglan.errors import CheckpointError, GeneratorError, RecipeError, require
from raglan.generator.adapter import adapter_base, check_base, find_adapter, is_adapter, merged, put_on
from raglan.generator.base import Cost, Generator, MarkedGenerator, answer_ids, end_of_turn, tokenizer_identity
from raglan.generator.causal import CopierForCausalLM, causal_from_encoder
from raglan.generator.contexts import HFContexts, prompt_contexts
from raglan.generator.reader import ReaderForConditionalGeneration, reader_from_encoder
from raglan.generator.special import name_tokens
from raglan.generator.trees import Tree, grown, reads_trees, room, tree_batch, tree_length
from raglan.likelihood import chunked_divergence, chunked_token_logprobs
from raglan.marked_prompt import MarkedPrompt, read_schema
from raglan.memory import give_back, keep_freed
from raglan.progress import track
from raglan.prompt import Prompt, Rendered
from raglan.quiet import quietly, without_bars
from raglan.recipe import AdapterSettings, GeneratorSettings, PromptSettings
from raglan.records import Completion
from raglan.reflection import Schema
from raglan.text import restore_surface, shortened
from raglan.vocabulary import new_rows, open_tokenizer, prepare_vocabulary, rows_of, save_tokenizer
from raglan.weights import read_json

__all__ = ["HFGenerator", "learned", "open_generator", "open_merged", "padded", "scored"]

log = logging.getLogger(__name__)
EMBEDDED = {"embedded": reader_from_encoder, "embedded_causal": causal_from_encoder}
UNSCORED = -100
UNREADABLE = (ImportError, OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, UnpicklingError)
MOST = 1 << 40  # no limit
ANSWER_ROOM = 64  # positions a causal model keeps free behind its longest prompt
MAX_ROWS = 64  # generation keeps every step's logits of a batch, (rows, V) each
CPU_TOKENS = 2048  # scored in one pass on a CPU: more keeps its cores no busier, and leaves the cache


class HFGenerator(Generator, MarkedGenerator):
    """A transformers model, its tokenizer and its prompt.

    Attributes:
        model: the (peft-wrapped) model. `is_seq2seq`: whether it encodes the prompt apart.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: GeneratorSettings, prompt: PromptSettings):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        config = model.config
        self.is_seq2seq = bool(config.is_encoder_decoder)
        self.reader = _reader_of(model)
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
        self.left_cut = 0  # prompts that lost their beginning, under `overflow: cut_left`; 0 says that budgets held
        self._head_is_checked = False
        if self.reader is not None and self.device.type == "cpu":
            self.reader.use_plain_attention()

    def generate(
        self, prompts: Sequence[Rendered], *, max_new_tokens: int, beams: int = 1, length_penalty: float = 1.0
    ) -> list[Completion]:
        prompts = [self._guarded(prompt, max_new_tokens) for prompt in prompts]
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

    def forward(self, batch: dict[str, Tensor], model: nn.Module | None = None) -> Tensor:
        """token_logprobs (B,T) of a collated batch, with gradient; 0 where labels are −100, or only read.

        Labels may be read and not scored, as evidence inside an answer is: `learned` (B,T) is False there, and the head is not
        applied. `model` is the model as the trainer wrapped it (DDP, FSDP); default is the bare one.
        """
        moved = {name: value.to(self.device) for name, value in batch.items()}
        if self.reader is None:
            return self.forward_beside(moved, None, model)[..., 0]
        given, batch = scored(moved), _aligned(moved)
        labels, real = batch["labels"], scored(batch)
        batch.pop("learned", None)
        values = self._reader_logprobs(batch, model or self.model)[real]
        return values.new_zeros(labels.shape).masked_scatter(given, values)

    def forward_beside(self, batch: dict[str, Tensor], ids: Tensor | None, model: nn.Module | None = None) -> Tensor:
        """log p of each label and, beside it, of W `ids` (B,T,W) in its place, (B,T,1+W), with gradient; 0 as `forward` has 0.

        Raises:
            GeneratorError: the embedded reader, whose distribution is a mixture without a head.
        """
        moved = {name: value.to(self.device) for name, value in batch.items()}
        labels, states = self._label_states(moved, model or self.model)
        return self._beside(labels, states, scored(moved), ids)

    def forward_held(
        self, batch: dict[str, Tensor], ids: Tensor | None, start: HFGenerator, rows: Tensor, model: nn.Module | None = None, *,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`forward_beside`, and at the labels of `rows` (B,) KL(start ‖ self) over the vocabulary, (B,T), 0 at all others.

        Args:
            start: what `frozen` gave. It reads those rows alone, without gradient and without dropout.
            autocast: the precision in which the model as the trainer wrapped it computes.

        Raises:
            GeneratorError: the embedded reader with ids.
        """
        moved, rows = {name: value.to(self.device) for name, value in batch.items()}, rows.to(self.device)
        given = scored(moved)
        held = given & rows[:, None]
        if self.reader is not None and ids is None:
            return self._reader_held(moved, start, rows, model or self.model, autocast)
        labels, states = self._label_states(moved, model or self.model)
        values = self._beside(labels, states, given, ids)
        nothing = values.new_zeros(given.shape)
        if not held.any():
            return values, nothing
        with torch.no_grad(), autocast():
            _, before = start._label_states(moved if "at" in moved else _only(moved, rows), start.model)
        before = before[held[given]] if "at" in moved else before
        found = chunked_divergence(
            self.head_logits, [states[held[given]]], start.head_logits, [before], chunk=self.settings.head_chunk
        )
        return values, nothing.masked_scatter(held, found)

    def frozen(self) -> HFGenerator:
        """This generator as it is now, while this one goes on to learn: a copy of what learns, which shares all that does not.

        With LoRA that is a copy of the adapter, and of nothing else.
        """
        start = copy.copy(self)
        shared: dict[int, Any] = {id(p): p for p in self.model.parameters() if not p.requires_grad}
        start.model = copy.deepcopy(self.model, shared).requires_grad_(False).eval()
        start.reader = _reader_of(start.model)
        return start

    @torch.no_grad()
    def judged(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """token_logprobs (B,T) as `forward` gives them, and whether each label is the likeliest of all words, (B,T)."""
        moved = {name: value.to(self.device) for name, value in batch.items()}
        given, aligned = scored(moved), _aligned(moved)
        labels, real = aligned["labels"], scored(aligned)
        states = self.answer_states({name: value for name, value in aligned.items() if name != "learned"})[real]
        logprobs, right = [], []
        for rows, wanted in zip(*(part.split(self.settings.head_chunk) for part in (states, labels[real])), strict=True):
            logits = self.head_logits(rows).float()
            logprobs.append(logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0])
            right.append(logits.argmax(-1) == wanted)
        none = torch.zeros(labels.shape, device=labels.device)
        return none.masked_scatter(given, torch.cat(logprobs)), none.bool().masked_scatter(given, torch.cat(right))

    def answer_states(self, batch: dict[str, Tensor], model: nn.Module | None = None) -> Tensor:
        """What the LM head reads to predict the answer's tokens, (B,T,D), with gradient.

        Raises:
            GeneratorError: the embedded reader, whose distribution is a mixture without a head.
        """
        if self.reader is not None:
            raise GeneratorError(
                "the embedded reader has no LM head, so its vocabulary cannot be smoothed", hint="objective.label_smoothing: 0"
            )
        model = model or self.model
        batch = {name: value.to(self.device) for name, value in batch.items()}
        return self._seq2seq_states(batch, model) if self.is_seq2seq else self._causal_states(batch, model)

    @cached_property
    def schema(self) -> Schema:
        """The reflection tokens of this model's vocabulary. Raises CheckpointError where they are not there."""
        return read_schema(self.tokenizer, rows_of(self.model))

    @cached_property
    def marked_prompt(self) -> MarkedPrompt:
        """Prompts with reflection tokens. Raises CheckpointError where the vocabulary has none."""
        return MarkedPrompt(self.schema, self.tokenizer, self.prompt.settings.self_rag, eos=self.eos)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32 or next(self.model.parameters()).dtype == self.dtype:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    @property
    def batch_tokens(self) -> int:
        return self.settings.batch_tokens

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

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
        if self.settings.vocabulary == "self_rag":
            told |= {"vocabulary_init": self.settings.vocabulary_init, "schema": self.schema.to_dict()}
        if self.settings.overflow == "cut_left":
            told["left_cut"] = self.left_cut
        write_manifest(folder, "generator", {**told, **figures})

    def _guarded(self, prompt: Rendered, answer: int) -> Rendered:
        """The prompt; under `overflow: cut_left` without its beginning, all but what opens it, where the answer has no room."""
        over = len(prompt.ids) + answer - (self._positions or MOST)
        if self.settings.overflow != "cut_left" or self.is_seq2seq or over <= 0:
            return prompt
        opens = int(prompt.ids[0] == self.tokenizer.bos_token_id)
        if over > len(prompt.ids) - opens - 1:
            return prompt  # nothing of it would be left: `check_positions` tells
        self.left_cut += 1
        log.warning("a prompt of %d tokens lost its first %d: lower prompt.max_tokens", len(prompt.ids), over)
        return replace(prompt, ids=(*prompt.ids[:opens], *prompt.ids[opens + over :]), cut_tokens=prompt.cut_tokens + over)

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

    def _label_states(self, batch: dict[str, Tensor], model: nn.Module) -> tuple[Tensor, Tensor]:
        """The N labels that are scored, (N,), and what the head reads for them, (N,D), of rows apart or packed."""
        return (self._packed_states if "at" in batch else self._scored_states)(batch, model)

    def _beside(self, labels: Tensor, states: Tensor, given: Tensor, ids: Tensor | None) -> Tensor:
        wanted = labels[:, None] if ids is None else torch.cat([labels[:, None], ids.to(labels.device)[given]], dim=1)
        values = chunked_token_logprobs(states, self.head_logits, wanted, chunk=self.settings.head_chunk)
        return values.new_zeros(*given.shape, wanted.shape[1]).masked_scatter(given[..., None], values)

    def _reader_held(
        self, batch: dict[str, Tensor], start: HFGenerator, rows: Tensor, model: nn.Module,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`forward_held` of the embedded reader, whose words' probabilities need more than its decoder's states."""
        assert self.reader is not None
        assert start.reader is not None
        given, batch = scored(batch), _aligned(batch)
        real = scored(batch)
        batch.pop("learned", None)
        output = model(**batch)
        values = output.target_logprobs.new_zeros(given.shape).masked_scatter(given, output.target_logprobs[real])
        nothing = torch.zeros_like(values)
        if not rows.any():
            return values[..., None], nothing
        own = _only(batch, rows)
        with torch.no_grad(), autocast():
            before = start.model(**own)
        about = own["input_ids"], own["attention_mask"], own["labels"]
        found = chunked_divergence(
            self.reader.word_logprobs, [output.states[rows], output.encoder_last_hidden_state[rows], *about],
            start.reader.word_logprobs, [before.states, before.encoder_last_hidden_state, *about],
            chunk=max(1, self.settings.head_chunk // given.shape[1]),
        )  # fmt: skip
        return values[..., None], nothing.masked_scatter(given & rows[:, None], found[real[rows]])

    def _reader_logprobs(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
        output = model(**batch)
        return output.target_logprobs  # type: ignore[no-any-return]

    def decoder_inputs(self, labels: Tensor) -> Tensor:
        prefix = torch.tensor(self.prefix, device=labels.device).expand(len(labels), -1)
        return torch.cat([prefix, labels[:, :-1].masked_fill(labels[:, :-1] < 0, self.pad)], dim=1)

    def _seq2seq_states(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        inputs["decoder_input_ids"] = self.decoder_inputs(batch["labels"])
        return self.states_before_head(model, inputs)[:, len(self.prefix) - 1 :]

    def _causal_states(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
        """States that predict the answer's tokens, (B,T,D): prompt and answer in one row, padded right."""
        labels, mask = batch["labels"], batch["attention_mask"].bool()
        rows = [torch.cat([ids[m], y[y >= 0]]) for ids, m, y in zip(batch["input_ids"], mask, labels, strict=True)]
        length = max(len(row) for row in rows)
        ids = torch.stack([nn.functional.pad(row, (0, length - len(row)), value=self.pad) for row in rows])
        whole = torch.stack([torch.arange(length, device=ids.device) < len(row) for row in rows]).long()
        hidden = self.states_before_head(model, {"input_ids": ids, "attention_mask": whole})
        at = mask.sum(1)[:, None] - 1 + torch.arange(labels.shape[1], device=ids.device)[None]
        at = at.clamp_max(length - 1)[:, :, None].expand(-1, -1, hidden.shape[-1])
        return hidden.gather(1, at)

    def _scored_states(self, batch: dict[str, Tensor], model: nn.Module) -> tuple[Tensor, Tensor]:
        """The N labels that are scored, (N,), in the order of the batch, and what the head reads for them, (N,D)."""
        batch = _aligned(batch)
        labels, real = batch["labels"], scored(batch)
        hidden = self.answer_states({name: value for name, value in batch.items() if name != "learned"}, model)
        return labels[real], hidden[real]

    def _packed_states(self, batch: dict[str, Tensor], model: nn.Module) -> tuple[Tensor, Tensor]:
        """`_scored_states` of rows side by side: see `raglan.packing` and `raglan.generator.trees`."""
        names = ("input_ids", "position_ids", "attention_mask")
        hidden = self.states_before_head(model, {name: batch[name] for name in names if name in batch})
        real = scored(batch)
        return batch["labels"][real], hidden.flatten(0, 1)[batch["at"][real]]

    def states_before_head(self, model: nn.Module, inputs: dict[str, Any], *, use_cache: bool = False) -> Tensor:
        """What the LM head is given in a forward pass, while the head itself is given nothing to do."""
        head = self.model.get_output_embeddings()
        if head is None:
            raise GeneratorError(f"{type(self.model).__name__} has no LM head")
        caught: list[Tensor] = []

        def catch(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            caught.append(given[0])
            return (given[0][:, :0], *given[1:])

        handle = head.register_forward_pre_hook(catch)
        try:
            model(**inputs, use_cache=use_cache)
        finally:
            handle.remove()
        if len(caught) != 1:
            raise GeneratorError(f"{type(self.model).__name__} used its LM head {len(caught)} times in one pass")
        if not self._head_is_checked and not use_cache:
            self._check_head(inputs)
        return caught[0]

    def head_logits(self, rows: Tensor) -> Tensor:
        """The model's logits from the head's input, (n,D) → (n,V)."""
        head = self.model.get_output_embeddings()
        kind = head.weight.dtype  # a trainer's autocast ends with the model's forward pass, and states may be bfloat16
        return self._finished(head(rows.to(kind) if kind.is_floating_point else rows))

    def _finished(self, logits: Tensor) -> Tensor:
        """What architectures do to their logits behind the head: BART adds a bias, Cohere scales, Gemma caps."""
        config = self.model.config
        bias = getattr(self.model, "final_logits_bias", None)
        if bias is not None:
            logits = logits + bias.to(logits)
        cap, scale = getattr(config, "final_logit_softcapping", None), getattr(config, "logit_scale", None)
        logits = logits * scale if isinstance(scale, float) else logits
        return torch.tanh(logits / cap) * cap if cap else logits

    @torch.no_grad()
    def _check_head(self, inputs: dict[str, Tensor]) -> None:
        """Compare, once, the model's own logits with what `_finished` makes of its head's output: `head_chunk` of them."""
        self._head_is_checked = True
        raw: list[Tensor] = []
        handle = self.model.get_output_embeddings().register_forward_hook(lambda _, __, output: raw.append(output))
        was_training = self.model.training
        self.model.eval()
        try:
            theirs = self.model(**self._one_chunk(inputs), use_cache=False).logits
        finally:
            handle.remove()
            self.model.train(was_training)
        ours = self._finished(raw[-1])
        spread = float(theirs.float().std())
        if not torch.allclose(ours.float(), theirs.float(), atol=2e-2 * max(spread, 1e-3), rtol=2e-2):
            raise GeneratorError(
                f"{type(self.model).__name__} changes its logits after the LM head in a way that raglan does not know",
                hint="report the architecture; its head cannot be applied in chunks yet",
            )

    def _one_chunk(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The first row, as much of it as gives logits at no more than `head_chunk` positions."""
        whole = {"input_ids", "attention_mask"} if self.is_seq2seq else set()
        most = self.settings.head_chunk
        return {name: value[:1] if name in whole else value[:1, :most] for name, value in inputs.items()}


def open_generator(settings: GeneratorSettings, prompt: PromptSettings) -> HFGenerator:
    """Load a model folder or hub name (with a peft adapter if it is one), or make the embedded reader.

    Raises:
        CheckpointError: a folder without config or weights.
        RecipeError: LoRA settings that peft refuses; another kind than hf.
    """
    if settings.kind != "hf":
        raise RecipeError(
            f"generator.kind is {settings.kind!r}, and only hf learns, scores, and answers for decodings other than self_rag",
            hint="generator.kind=hf here; the other kinds are for answer, evaluate and serve",
        )
    keep_freed()
    adapter = settings.adapter
    model, tokenizer = _load(settings.model, settings) if adapter is None else _load_with(adapter, settings)
    if not model.config.is_encoder_decoder:
        name_tokens(model, tokenizer, settings)
    elif settings.tokens:
        raise RecipeError(f"generator.tokens are a causal model's, and {settings.model!r} is none", hint="leave them out")
    if not hasattr(model, "peft_config"):
        _extend(model, tokenizer, settings)
    if settings.lora is not None and not hasattr(model, "peft_config"):
        model = _with_lora(model, tokenizer, settings)
    for name, parameter in model.named_parameters():
        if any(part in name for part in settings.freeze):
            parameter.requires_grad_(False)
    return HFGenerator(model.to(compute_device()).eval(), tokenizer, settings, prompt)


def open_merged(settings: GeneratorSettings, prompt: PromptSettings) -> HFGenerator:
    """The generator as plain weights, its adapter merged if it has one; nothing of it learns any more.

    Raises:
        CheckpointError: as `open_generator`; a quantised base.
    """
    adapter = settings.adapter
    whole = {"lora": None, "freeze": (), "adapter": adapter and adapter.model_copy(update={"merge": True})}
    generator = open_generator(settings.model_copy(update=whole), prompt)
    if hasattr(generator.model, "peft_config"):
        generator.model = merged(generator.model, base=settings.model)
    return generator


def _load(name: str, settings: GeneratorSettings) -> tuple[Any, Any]:
    if name in EMBEDDED:
        with quietly():
            return EMBEDDED[name](str(embedded_model()))
    if is_adapter(name):
        return _load_adapter(name, settings)
    try:
        config = AutoConfig.from_pretrained(name)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        with quietly():
            tokenizer = open_tokenizer(name)
            attention = {} if settings.attention == "auto" else {"attn_implementation": settings.attention}
            loaded: Any = kind.from_pretrained(name, dtype=_weights_dtype(settings), output_loading_info=True, **attention)
            model, found = loaded
    except UNREADABLE as fault:
        raise CheckpointError(
            f"generator {name!r} cannot be loaded: {str(fault).strip().splitlines()[0]}",
            hint="give `embedded`, `embedded_causal`, a folder of config, weights and tokenizer, or a hub name and a network",
        ) from None
    missing = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if missing:
        raise CheckpointError(
            f"generator {name!r} lacks {len(missing)} of its weights: {', '.join(missing[:3])}…",
            hint="its files are incomplete, or of another architecture than its config.json says",
        )
    words = model.get_input_embeddings().num_embeddings
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= words:
        raise CheckpointError(
            f"generator {name!r} has {words} word embeddings, but its tokenizer has ids up to {highest}",
            hint="the tokenizer is another model's, or tokens were added without resizing the embeddings",
        )
    return model, tokenizer


def _extend(model: Any, tokenizer: Any, settings: GeneratorSettings) -> None:
    """Give a model the tokens that `vocabulary` names, where it lacks them."""
    if settings.vocabulary == "self_rag":
        prepare_vocabulary(model, tokenizer, settings)
    elif settings.vocabulary == "han":
        add_characters(model, tokenizer)


def _load_adapter(folder: str, settings: GeneratorSettings, *, base: str | None = None) -> tuple[Any, Any]:
    """The adapter on `base`; default the one that it names itself."""
    base = adapter_base(folder) if base is None else base
    model, tokenizer = _load(base, settings)
    extended = _extended(folder, settings)
    if extended is not None:
        _extend(model, tokenizer, extended)
    return put_on(model, tokenizer, folder, base=base, trainable=settings.lora is not None), tokenizer


def _load_with(adapter: AdapterSettings, settings: GeneratorSettings) -> tuple[Any, Any]:
    """`generator.model` with `generator.adapter` on it, or in it."""
    base = settings.model
    if is_adapter(base):
        raise CheckpointError(
            f"generator.model {base!r} is an adapter, and a second one is to be put on it",
            hint="name the base as generator.model, or merge the first: raglan checkpoint merge",
        )
    check_base(base, adapter)
    model, tokenizer = _load_adapter(str(find_adapter(adapter)), settings, base=base)
    return (merged(model, base=base) if adapter.merge else model), tokenizer


def _extended(folder: str, settings: GeneratorSettings) -> GeneratorSettings | None:
    """How the base model of an adapter has to be given more tokens before the adapter fits; None: not at all."""
    path = Path(folder) / MANIFEST
    told = read_json(path) if path.is_file() else {}
    if told.get("vocabulary") == "han":
        return settings.model_copy(update={"vocabulary": "han"})
    if told.get("vocabulary") == "self_rag":
        return settings.model_copy(update={"vocabulary": "self_rag", "vocabulary_init": told["vocabulary_init"]})
    return settings if settings.vocabulary != "own" else None


def _with_new_rows(model: PreTrainedModel, tokenizer: Any, settings: GeneratorSettings) -> dict[str, Any]:
    """LoRA's fields; an extended vocabulary's rows learn too, unless it is said which embeddings do."""
    given = dict(settings.lora or {})
    if settings.vocabulary != "self_rag" or {"trainable_token_indices", "modules_to_save"} & set(given):
        return given
    return {**given, "trainable_token_indices": new_rows(model, read_schema(tokenizer, rows_of(model)))}


def _with_lora(model: PreTrainedModel, tokenizer: Any, settings: GeneratorSettings) -> Any:
    peft = require("peft", "for generator.lora")
    kind = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    try:
        config = peft.LoraConfig(**{"task_type": kind, **_with_new_rows(model, tokenizer, settings)})
        config.base_model_name_or_path = settings.model
        wrapped = peft.get_peft_model(model, config)
    except (TypeError, ValueError) as fault:
        raise RecipeError(f"generator.lora: {fault}", hint="fields are those of peft.LoraConfig") from None
    wrapped.peft_config["default"].base_model_name_or_path = settings.model
    return wrapped


def _weights_dtype(settings: GeneratorSettings) -> torch.dtype:
    """Full training keeps float32 weights and computes in autocast; LoRA and plain use may keep the weights small."""
    if settings.dtype in ("bfloat16", "float16"):
        return getattr(torch, settings.dtype)  # type: ignore[no-any-return]
    small = settings.dtype == "auto" and settings.lora is not None and torch.cuda.is_available() and bfloat16_is_faster()
    return torch.bfloat16 if small else torch.float32


def _aligned(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same rows with their own tokens first, on whichever side they were padded: models count positions from there."""
    real, labels = batch["attention_mask"].bool(), batch["labels"]
    return {
        "input_ids": _moved(batch["input_ids"], real), "attention_mask": _moved(batch["attention_mask"], real),
        "labels": _moved(labels, labels >= 0),
        **({"learned": _moved(batch["learned"], labels >= 0)} if "learned" in batch else {}),
    }  # fmt: skip


def scored(batch: dict[str, Tensor]) -> Tensor:
    """Which labels of a batch have a log-probability that counts, (B,T): those that are there, and are not only read."""
    there = batch["labels"] >= 0
    return there & batch["learned"].bool() if "learned" in batch else there


def _only(batch: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Those rows of a batch, (B,)."""
    return {name: value[rows] for name, value in batch.items()}


def _reader_of(model: Any) -> ReaderForConditionalGeneration | None:
    """The embedded reader, if a model or what its adapter is on is one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base if isinstance(base, ReaderForConditionalGeneration) else None


def _moved(values: Tensor, first: Tensor) -> Tensor:
    """Each row's values that are to come first, then its others, in their order. (B,L), (B,L) → (B,L)."""
    return values.gather(1, (~first).int().argsort(dim=1, stable=True))


def learned(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """`learned` (B,T) of rows, where one of them has labels that are only read; else nothing."""
    if not any("learned" in row for row in rows):
        return {}
    return {"learned": padded([row.get("learned", [1] * len(row["labels"])) for row in rows], 0)[0].bool()}


def padded(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of unlike length as ids (n,longest) and their mask, which comes from lengths and never from ids."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), value, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for place, row in enumerate(rows):
        where = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[place, where], mask[place, where] = torch.tensor(row, dtype=torch.long), 1
    return ids, mask
