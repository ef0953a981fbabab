"""A transformers model up to its LM head, and the head where it is wanted: log-probabilities of a batch's labels.

The head is applied to answer positions only and in chunks (`likelihood.chunked_token_logprobs`); what reaches it is caught by
a hook, so any architecture will do, and the first batch is compared with the model's own logits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn

from raglan.errors import GeneratorError
from raglan.generator.batches import left_aligned, only_rows, scored
from raglan.generator.reader import ReaderForConditionalGeneration
from raglan.likelihood import chunked_divergence, chunked_token_logprobs
from raglan.recipe import GeneratorSettings

__all__ = ["HeadedModel", "reader_of"]


class HeadedModel:
    """What a model computes of collated rows; `HFGenerator` makes the rows.

    Attributes:
        model: the (peft-wrapped) model. `is_seq2seq`: whether it encodes the prompt apart.
        reader: the model, where it is the embedded reader, whose distribution is a mixture without a head.
        prefix: what the decoder is given before the answer. `pad`: the id that fills rows up.
        dtype: what is computed in.
    """

    model: Any
    settings: GeneratorSettings
    is_seq2seq: bool
    reader: ReaderForConditionalGeneration | None
    prefix: list[int]
    pad: int
    dtype: torch.dtype
    _head_is_checked: bool

    def forward(self, batch: dict[str, Tensor], model: nn.Module | None = None) -> Tensor:
        """token_logprobs (B,T) of a collated batch, with gradient; 0 where labels are −100, or only read.

        Labels may be read and not scored, as evidence inside an answer is: `learned` (B,T) is False there, and the head is not
        applied. `model` is the model as the trainer wrapped it (DDP, FSDP); default is the bare one.
        """
        moved = {name: value.to(self.device) for name, value in batch.items()}
        if self.reader is None:
            return self.forward_beside(moved, None, model)[..., 0]
        given, batch = scored(moved), left_aligned(moved)
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
        self, batch: dict[str, Tensor], ids: Tensor | None, start: HeadedModel, rows: Tensor, model: nn.Module | None = None, *,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`forward_beside`, and at the labels of `rows` (B,) KL(start ‖ self) over the vocabulary, (B,T), 0 at all others.

        Args:
            start: what `frozen` gave. It reads those rows alone (of packed rows, all), without gradient and without dropout.
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
            _, before = start._label_states(moved if "at" in moved else only_rows(moved, rows), start.model)
        before = before[held[given]] if "at" in moved else before
        found = chunked_divergence(
            self.head_logits, [states[held[given]]], start.head_logits, [before], chunk=self.settings.head_chunk
        )
        return values, nothing.masked_scatter(held, found)

    def frozen(self) -> Self:
        """This generator as it is now, while this one goes on to learn: a copy of what learns, which shares all that does not.

        With LoRA that is a copy of the adapter, and of nothing else.
        """
        start = copy.copy(self)
        shared: dict[int, Any] = {id(p): p for p in self.model.parameters() if not p.requires_grad}
        start.model = copy.deepcopy(self.model, shared).requires_grad_(False).eval()
        start.reader = reader_of(start.model)
        return start

    @torch.no_grad()
    def judged(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """token_logprobs (B,T) as `forward` gives them, and whether each label is the likeliest of all words, (B,T)."""
        moved = {name: value.to(self.device) for name, value in batch.items()}
        given, aligned = scored(moved), left_aligned(moved)
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

    def autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32 or next(self.model.parameters()).dtype == self.dtype:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    def _label_states(self, batch: dict[str, Tensor], model: nn.Module) -> tuple[Tensor, Tensor]:
        """The N labels that are scored, (N,), and what the head reads for them, (N,D), of rows apart or packed."""
        return (self._packed_states if "at" in batch else self._scored_states)(batch, model)

    def _beside(self, labels: Tensor, states: Tensor, given: Tensor, ids: Tensor | None) -> Tensor:
        wanted = labels[:, None] if ids is None else torch.cat([labels[:, None], ids.to(labels.device)[given]], dim=1)
        values = chunked_token_logprobs(states, self.head_logits, wanted, chunk=self.settings.head_chunk)
        return values.new_zeros(*given.shape, wanted.shape[1]).masked_scatter(given[..., None], values)

    def _reader_held(
        self, batch: dict[str, Tensor], start: HeadedModel, rows: Tensor, model: nn.Module,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`forward_held` of the embedded reader, whose words' probabilities need more than its decoder's states."""
        assert self.reader is not None
        assert start.reader is not None
        given, batch = scored(batch), left_aligned(batch)
        real = scored(batch)
        batch.pop("learned", None)
        output = model(**batch)
        values = output.target_logprobs.new_zeros(given.shape).masked_scatter(given, output.target_logprobs[real])
        nothing = torch.zeros_like(values)
        if not rows.any():
            return values[..., None], nothing
        own = only_rows(batch, rows)
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
        batch = left_aligned(batch)
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


def reader_of(model: Any) -> ReaderForConditionalGeneration | None:
    """The embedded reader, if a model or what its adapter is on is one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base if isinstance(base, ReaderForConditionalGeneration) else None
