"""The embedded reader: a small copying encoder-decoder that grows out of a sentence encoder and needs no download.

Claim. Started from the six layers of all-MiniLM-L6-v2, it learns to answer questions from passages on two CPU cores in
minutes, because what it has to learn is small: *where to look*, not how to spell.

The next-token distribution is a mixture of three acts (pointer-generator, See et al. 2017, arXiv 1704.04368, with the
stop act split off):

    m = softmax(W h_t)                                             copy, generate, stop
    p(v | x, z, y_<t) = m_copy Σ_{i: x_i = v} a_ti + m_generate p_V(v) + m_stop 1[v = EOS]
    h_t ← h_t + W Σ_i ρ_ti e_i,  ρ_t an attention over the places i with x_i = y_{t-1}: where the copying stands
    a_t = softmax_i( q(h_t)·k(e_i)/√d + β 1[x_{i-1} = y_{t-1}] )    over the prompt's own tokens

Deviations from the paper: the copy distribution is a head of its own instead of a decoder attention, and β (learned,
starts at 4) says beforehand that a copied span goes on, which is what a pointer has to learn otherwise.

Several passages are read as in Fusion-in-Decoder (Izacard & Grave 2021, arXiv 2007.01282): each `[CLS]` in the prompt
begins a block which is encoded by itself with positions from zero, and the decoder attends over all blocks at once. So the
cost is linear in the number of passages, and the pointer is normalised over all of them. The model is an ordinary
`transformers` seq2seq model in every other respect: `generate`, beams, `Trainer`, `peft` and `from_pretrained` apply.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.models.bert.modeling_bert import BertEmbeddings, BertOutput, BertSelfOutput
from transformers.utils.generic import ModelOutput

__all__ = ["ReaderConfig", "ReaderForConditionalGeneration", "reader_from_encoder"]

TINY = torch.finfo(torch.float32).tiny
GROUP = 12  # blocks encoded together where lengths differ
LOWEST = -1e30  # stands for −inf: its differences and gradients stay finite


class ReaderConfig(PreTrainedConfig):
    """Settings of a reader: those of its BERT layers, and how many of them decode."""

    model_type = "raglan_reader"
    is_encoder_decoder = True

    def __init__(
        self, encoder: dict[str, Any] | None = None, decoder_layers: int = 2, dropout: float = 0.1, **kwargs: Any
    ):  # fmt: skip
        self.encoder = dict(encoder or {})
        self.decoder_layers, self.dropout = decoder_layers, dropout
        bert = BertConfig(**self.encoder)
        self.hidden_size, self.vocab_size = bert.hidden_size, bert.vocab_size
        self.num_hidden_layers = decoder_layers
        self.num_attention_heads = bert.num_attention_heads
        kwargs = {"pad_token_id": 0, "eos_token_id": 102, "decoder_start_token_id": 101, **kwargs}
        kwargs.setdefault("is_encoder_decoder", True)
        kwargs.setdefault("tie_word_embeddings", True)
        super().__init__(**kwargs)

    def bert(self, **changes: Any) -> BertConfig:
        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # `LockedDropout` stands in for them
        return BertConfig(**{**self.encoder, **off, **changes})


@dataclass
class ReaderEncoding(ModelOutput):
    """What the decoder reads: states (B,L,D), the prompt's ids (B,L), which may be copied and which are no padding (B,L)."""

    last_hidden_state: Tensor | None = None
    source_ids: Tensor | None = None
    copyable: Tensor | None = None
    visible: Tensor | None = None


@dataclass
class ReaderOutput(Seq2SeqLMOutput):
    """As usual, and with labels log p of each label, (B,T), and the decoder's states, (B,T,D), instead of logits."""

    target_logprobs: Tensor | None = None
    states: Tensor | None = None


class LockedDropout(nn.Module):
    """Dropout with one mask for all positions of a row (Gal & Ghahramani 2016, arXiv 1512.05287): (…,L,D) → (…,L,D).

    On a CPU drawing a mask for every position costs more than the layer it follows: it made a step 2.6 × longer.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, states: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return states
        kept = torch.rand(*states.shape[:-2], 1, states.shape[-1], device=states.device) >= self.p
        return states * (kept.to(states.dtype) / (1 - self.p))


class BlockEncoder(nn.Module):
    """Encode each `[CLS]`-opened block of a flat prompt by itself, then lay the states back in place."""

    main_input_name = "input_ids"

    def __init__(self, bert: BertModel, block_start: int, block_end: int):
        super().__init__()
        self.bert = bert
        self.block_start, self.block_end = block_start, block_end

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> ReaderEncoding:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows, columns, present = _blocks(input_ids, mask, self.block_start)
        places, found = [], []
        for group in _like_sizes(present.sum(1)):
            longest = int(present[group[-1]].sum())
            row, column, real = rows[group], columns[group, :longest], present[group, :longest]
            encoded = self.bert(input_ids=input_ids[row, column] * real, attention_mask=real).last_hidden_state
            keep = real.bool()
            places.append((row.expand_as(column)[keep], column[keep]))
            found.append(encoded[keep])
        at = tuple(torch.cat(parts) for parts in zip(*places, strict=True))
        values = torch.cat(found)
        states = values.new_zeros(*input_ids.shape, values.shape[-1]).index_put(at, values)
        return self.encoding(states, input_ids, mask)

    def encoding(self, states: Tensor, input_ids: Tensor, mask: Tensor) -> ReaderEncoding:
        copyable = mask.bool() & (input_ids != self.block_start) & (input_ids != self.block_end)
        return ReaderEncoding(last_hidden_state=states, source_ids=input_ids, copyable=copyable, visible=mask.bool())


def _like_sizes(sizes: Tensor) -> tuple[Tensor, ...]:
    """Blocks of like size together, shortest first: passages of one batch differ in length, and padding is work too."""
    order = sizes.argsort(stable=True)
    padded = len(sizes) * int(sizes.max())
    return order.split(GROUP) if padded > 1.1 * int(sizes.sum()) else (order,)


def _blocks(input_ids: Tensor, mask: Tensor, block_start: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (N,1), columns (N,longest) and presence (N,longest) of the N blocks of a batch of flat prompts (B,L)."""
    starts = (input_ids == block_start) & mask.bool()
    first = mask.long().argmax(dim=1)
    starts[torch.arange(len(starts), device=starts.device), first] = True  # a prompt without [CLS] is one block
    rows, begin = starts.nonzero(as_tuple=True)
    length = mask.shape[1]
    last = length - mask.long().flip(1).argmax(dim=1)  # one past the last real token
    after = torch.cat([begin[1:], begin.new_zeros(1)])
    same = torch.cat([rows[1:] == rows[:-1], rows.new_zeros(1, dtype=torch.bool)])
    sizes = torch.where(same, after, last[rows]) - begin
    offsets = torch.arange(int(sizes.max()), device=input_ids.device)
    present = offsets[None] < sizes[:, None]
    columns = torch.where(present, begin[:, None] + offsets[None], 0)
    return rows[:, None], columns, present.long()


class ReaderForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A copying seq2seq reader. `logits` (B,T,V) are log-probabilities; they need no further softmax, and bear one."""

    config_class = ReaderConfig
    base_model_prefix = "reader"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_cache_class = True
    _tied_weights_keys = {"decoder.embeddings.word_embeddings.weight": "encoder.bert.embeddings.word_embeddings.weight"}

    def __init__(self, config: ReaderConfig):
        super().__init__(config)
        size = config.hidden_size
        self.encoder = BlockEncoder(
            BertModel(config.bert(), add_pooling_layer=False), config.decoder_start_token_id, config.eos_token_id
        )
        decoder = config.bert(num_hidden_layers=config.decoder_layers, is_decoder=True, add_cross_attention=True)
        self.decoder = BertModel(decoder, add_pooling_layer=False)
        self.copy_query = nn.Linear(size, size)
        self.copy_key = nn.Linear(size, size)
        self.word_query = nn.Linear(size, size)
        self.place_query = nn.Linear(size, size)
        self.place_key = nn.Linear(size, size)
        self.place_value = nn.Linear(size, size)
        self.acts = nn.Linear(size, 3)
        self.continues = nn.Parameter(torch.tensor(4.0))
        for module in [m for m in self.modules() if isinstance(m, BertEmbeddings | BertSelfOutput | BertOutput)]:
            module.dropout = LockedDropout(config.dropout)  # type: ignore[assignment]
        self.post_init()

    def get_encoder(self, *_: Any, **__: Any) -> nn.Module:
        return self.encoder

    def get_decoder(self) -> nn.Module:
        return self.decoder

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.bert.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.bert.set_input_embeddings(value)
        self.decoder.set_input_embeddings(value)

    def use_plain_attention(self) -> None:
        """Attention by two matrix products: on a CPU its bfloat16 backward is 3-4 × faster than the fused one's."""
        self.encoder.bert.set_attn_implementation("eager")
        self.decoder.set_attn_implementation("eager")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: ReaderEncoding | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> ReaderOutput:
        """Next-token log-probabilities (B,T,V); with `labels` (B,T; −100 = unscored), their mean loss instead."""
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        if decoder_input_ids is None and labels is not None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        hidden, past = self.decode(encoder_outputs, attention_mask, decoder_input_ids, past_key_values, use_cache)
        previous = decoder_input_ids[:, -hidden.shape[1] :]
        if labels is None:
            logits = self.next_token_logprobs(hidden, previous, encoder_outputs)
            return ReaderOutput(
                logits=logits, past_key_values=past, encoder_last_hidden_state=encoder_outputs.last_hidden_state
            )
        answer = self.target_logprobs(hidden, previous, encoder_outputs, labels)
        return ReaderOutput(
            loss=-answer.sum() / (labels >= 0).sum(), target_logprobs=answer, states=hidden,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
        )  # fmt: skip

    def decode(
        self,
        encoding: ReaderEncoding,
        attention_mask: Tensor | None,
        decoder_input_ids: Tensor,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
    ) -> tuple[Tensor, EncoderDecoderCache | None]:
        """Decoder states (B,T,D) of the tokens that are not in the cache yet."""
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        output = self.decoder(
            input_ids=decoder_input_ids[:, seen:],
            encoder_hidden_states=encoding.last_hidden_state,
            encoder_attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        previous = decoder_input_ids[:, seen:]
        return self.placed(output.last_hidden_state, previous, encoding), output.past_key_values

    def placed(self, hidden: Tensor, previous: Tensor, encoding: ReaderEncoding) -> Tensor:
        """h_t + Σ_i ρ_ti W e_i, where ρ attends to the places that hold y_{t-1} only: where the copying stands."""
        states = encoding.last_hidden_state
        scores = (self.place_query(hidden) @ self.place_key(states).transpose(1, 2)).float() / states.shape[-1] ** 0.5
        holds = (encoding.source_ids[:, None, :] == previous[:, :, None]) & encoding.visible[:, None, :]
        weights = scores.masked_fill(~holds, LOWEST).softmax(-1) * holds
        return hidden + self.place_value(weights.to(states.dtype) @ states)

    def copy_logprobs(self, hidden: Tensor, decoder_input_ids: Tensor, encoding: ReaderEncoding) -> Tensor:
        """log a_t over the prompt's tokens, (B,T,L) float32; the smallest float where a token may not be copied."""
        states, ids = encoding.last_hidden_state, encoding.source_ids
        scores = self.copy_query(hidden) @ self.copy_key(states).transpose(1, 2)
        before = torch.cat([ids.new_full((len(ids), 1), -1), ids[:, :-1]], dim=1)
        goes_on = before[:, None, :] == decoder_input_ids[:, :, None]
        scores = scores.float() / states.shape[-1] ** 0.5 + self.continues.float() * goes_on
        return scores.masked_fill(~encoding.copyable[:, None, :], LOWEST).log_softmax(-1)

    def word_scores(self, hidden: Tensor) -> Tensor:
        """Unnormalised log p_V (…,V), float32."""
        return nn.functional.linear(self.word_query(hidden), self.get_input_embeddings().weight).float()

    def next_token_logprobs(self, hidden: Tensor, decoder_input_ids: Tensor, encoding: ReaderEncoding) -> Tensor:
        """log p(v | x, z, y_<t) for every word v, (B,T,V): what `generate` reads."""
        copy = self.copy_logprobs(hidden, decoder_input_ids, encoding).exp() * encoding.copyable[:, None, :]
        acts = self.acts(hidden).float().softmax(-1)
        probs = acts[..., 1:2] * self.word_scores(hidden).softmax(-1)
        probs.scatter_add_(2, encoding.source_ids[:, None, :].expand_as(copy), acts[..., :1] * copy)
        probs[..., self.config.eos_token_id] += acts[..., 2]
        return probs.clamp_min(TINY).log()

    def word_logprobs(self, hidden: Tensor, encoded: Tensor, input_ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """`next_token_logprobs` (B,T,V) at labels (B,T), from the states that `forward` gave for them."""
        kind = self.get_input_embeddings().weight.dtype  # a trainer's wrapper gives float32, whatever the weights are
        hidden, encoded = hidden.to(kind), encoded.to(kind)
        previous = self.prepare_decoder_input_ids_from_labels(labels)
        return self.next_token_logprobs(hidden, previous, self.encoder.encoding(encoded, input_ids, mask))

    def target_logprobs(self, hidden: Tensor, decoder_input_ids: Tensor, encoding: ReaderEncoding, targets: Tensor) -> Tensor:
        """log p(y_t | x, z, y_<t) of the targets only, (B,T), 0 where a target is −100: what training reads.

        The same numbers as `next_token_logprobs` at the targets, without a (B,T,V) tensor: the words are scored at real
        targets alone, and the copies are summed where the prompt holds the target.
        """
        copy = self.copy_logprobs(hidden, decoder_input_ids, encoding)
        holds = (encoding.source_ids[:, None, :] == targets[:, :, None]) & encoding.copyable[:, None, :]
        copied = copy.masked_fill(~holds, LOWEST).logsumexp(-1).clamp_min(LOWEST)
        real = targets >= 0
        scores = self.word_scores(hidden[real])
        word = scores.gather(-1, targets[real][:, None])[:, 0] - scores.logsumexp(-1)
        acts = self.acts(hidden).float().log_softmax(-1)[real]
        stop = acts[:, 2].masked_fill(targets[real] != self.config.eos_token_id, LOWEST)
        ways = torch.stack([acts[:, 0] + copied[real], acts[:, 1] + word, stop], dim=-1)
        return torch.zeros_like(copied).masked_scatter(real, ways.clamp_min(LOWEST).logsumexp(-1))

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        encoder_outputs: ReaderEncoding | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        return {
            "input_ids": None,
            "decoder_input_ids": input_ids,
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "encoder_outputs": encoder_outputs,
            "use_cache": use_cache,
        }

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        start = labels.new_full((len(labels), 1), self.config.decoder_start_token_id)
        return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] < 0, self.config.pad_token_id)], dim=1)


def reader_from_encoder(folder: str, *, decoder_layers: int = 2) -> tuple[ReaderForConditionalGeneration, Any]:
    """A reader whose encoder, decoder layers and embeddings start from the BERT weights in `folder`, with its tokenizer.

    The decoder copies the last `decoder_layers` encoder layers; its cross-attention starts as a copy of their
    self-attention, which already knows how to compare states of this encoder.
    """
    bert = BertModel.from_pretrained(folder, add_pooling_layer=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = ReaderConfig(
        encoder=bert.config.to_diff_dict(),
        decoder_layers=decoder_layers,
        dropout=bert.config.hidden_dropout_prob,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.sep_token_id,
        decoder_start_token_id=tokenizer.cls_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the untaught parts are the same in every process, so "untuned" is one system
        model = ReaderForConditionalGeneration(config)
    model.encoder.bert.load_state_dict(bert.state_dict())
    model.decoder.embeddings.load_state_dict(bert.embeddings.state_dict())
    for new, old in zip(model.decoder.encoder.layer, bert.encoder.layer[-decoder_layers:], strict=True):
        new.load_state_dict(old.state_dict(), strict=False)
        new.crossattention.load_state_dict(old.attention.state_dict())
    model.tie_weights()
    return model, tokenizer


AutoConfig.register("raglan_reader", ReaderConfig)
AutoModelForSeq2SeqLM.register(ReaderConfig, ReaderForConditionalGeneration)
