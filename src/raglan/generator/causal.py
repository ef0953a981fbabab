"""The embedded causal model: a small left-to-right language model that grows out of a sentence encoder, without a download.

Claim. Started from the six layers of all-MiniLM-L6-v2, it learns on two CPU cores to answer from passages in its prompt,
because what it has to learn is small: *where to look*. Beside the head tied to the word embeddings stands a copying attention
over the row's own tokens whose values are those tokens' embeddings, so that what it looks at is what it says:

    a_t = softmax_{j ≤ t}( q(h_t)·k(h_j)/√D + β ê_t·ê_{j−1} )       ê: word embeddings, centred, over s
    logits_t = E ( f(h_t) + g(h_t) Σ_j a_tj ê_j / s )                 f: BERT's head transform, 1 at first; s: their mean length

Between the markup of a passage, `<paragraph> … </paragraph>`, the layers look in both directions, as the encoder did that they
come from: a passage is given and never written, so nothing is foretold (prefix language models, Raffel et al. 2020, arXiv
1910.10683). All else is causal. β (learned, starts at 8) says beforehand that what began to be copied goes on;
`generator.reader` has the same. The mixture is one of logits, not of probabilities (as in pointer-generators, See et al. 2017,
arXiv 1704.04368), which leaves the head an ordinary tied one. Keys and values of the copying attention lie in the cache as
those of one more layer, so it is saved, loaded, cached, branched and extended by new words as any causal model of transformers
is. Rows are `[CLS] prompt answer [SEP]`, 512 positions in all, text in lower case. What it knows before training is what words
mean, and nothing of which word comes next.

Deviation from BERT's masked-LM head: the encoder was published without one, so f starts from the identity, at a scale at which
logits spread by about one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

__all__ = ["CopierConfig", "CopierForCausalLM", "causal_from_encoder"]

OPENS = 8.0  # g at first: logits of what is looked at, above the others
GOES_ON = 8.0  # β at first


class CopierConfig(BertConfig):
    """A BERT decoder's settings, the mean length s of its word embeddings, and the ids of `<paragraph>` and `</paragraph>`."""

    model_type = "raglan_copier"

    def __init__(self, word_length: float = 1.0, passage_markup: list[int] | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.word_length, self.passage_markup = word_length, passage_markup


class CopierForCausalLM(BertLMHeadModel):
    """A causal BERT that can copy. Everything that `transformers` does with a causal model applies."""

    config_class = CopierConfig

    def __init__(self, config: CopierConfig):
        super().__init__(config)
        size = config.hidden_size
        self.copy_query, self.copy_key = nn.Linear(size, size), nn.Linear(size, size)
        self.copy_gate = nn.Linear(size, 1)
        self.goes_on = nn.Parameter(torch.tensor(GOES_ON))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:  # weights without it leave it as the memory that it was given
            self.goes_on.fill_(GOES_ON)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithCrossAttentions:
        """Logits (B,n,V) of the last `logits_to_keep` of n ids, or of all; with `labels` (B,n) also their mean loss."""
        packs = _packs(position_ids) if attention_mask is None and past_key_values is None else None
        told = {**kwargs, "return_dict": True}
        outputs = self.bert(
            input_ids, attention_mask=self._seen(input_ids, attention_mask, packs, past_key_values),
            position_ids=position_ids, past_key_values=past_key_values, use_cache=use_cache, **told,
        )  # fmt: skip
        states, past = outputs.last_hidden_state, outputs.past_key_values
        copied = self._copied(states, input_ids, past if use_cache is not False else None, attention_mask, packs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        head = self.cls.predictions
        logits = head.decoder(head.transform(states[:, kept]) + copied[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithCrossAttentions(
            loss=loss, logits=logits, past_key_values=past, hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )  # fmt: skip

    def _seen(self, ids: Tensor, mask: Tensor | None, packs: Tensor | None, past: Cache | None) -> Tensor | None:
        """What each new id looks at, (B,1,n,W) as the attention wants it, where it is not all that came before; else `mask`."""
        passages = _passages(ids, self.config.passage_markup)
        if passages is None and packs is None:
            return mask
        earlier, new = past.get_seq_length() if past is not None else 0, ids.shape[1]
        real = _real(mask, len(ids), earlier + new, ids.device)
        seen = _earlier(real, new)
        if passages is not None:
            within = (passages[:, :, None] == passages[:, None, :]) & (passages > 0)[:, None, :] & real[:, None, earlier:]
            seen[:, :, earlier:] |= within
        if packs is not None:
            seen &= _same(packs)
        if self.config._attn_implementation == "sdpa":
            return seen[:, None]
        return torch.where(seen, 0.0, torch.finfo(self.dtype).min)[:, None].to(self.dtype)

    def _copied(self, states: Tensor, ids: Tensor, past: Cache | None, mask: Tensor | None, packs: Tensor | None) -> Tensor:
        """g Σ_j a_tj ê_j / s, (B,n,D), over the ids in the cache and the n new ones."""
        rows, new, size = states.shape
        words = self._words(ids).to(states.dtype)
        seen = self._layer(past).get_seq_length() if past is not None else 0
        real = _real(mask, rows, seen + new, states.device)
        earlier = self._layer(past).values[:, 0] if seen else words[:, :0]
        before = _before(torch.cat([earlier, words], dim=1), real)[:, seen:]
        before = before if packs is None else before * _goes_on(packs)[:, :, None]
        keys = torch.cat([self.copy_key(states), before], dim=2)[:, None]
        values = words[:, None]
        if past is not None:
            keys, values = self._layer(past).update(keys, values)
        queries = torch.cat([self.copy_query(states) / math.sqrt(size), self.goes_on.to(states.dtype) * words], dim=2)
        allowed = _earlier(real, new) if packs is None else _earlier(real, new) & _same(packs)
        scores = (queries @ keys[:, 0].transpose(1, 2)).float().masked_fill(~allowed, torch.finfo(torch.float32).min)
        looked = scores.softmax(-1).to(values.dtype) @ values[:, 0]
        return nn.functional.softplus(self.copy_gate(states)) * looked / self.config.word_length

    def _words(self, ids: Tensor) -> Tensor:
        """ê of ids, (B,n,D). Not each made of length one: a new word starts from the mean, whose direction is nothing."""
        table = self.get_input_embeddings().weight
        return (nn.functional.embedding(ids, table) - table.mean(0)) / self.config.word_length

    def _layer(self, past: Cache) -> Any:
        """The cache's layer behind those of BERT's."""
        while len(past.layers) <= self.config.num_hidden_layers:
            past.layers.append(DynamicLayer())
        return past.layers[self.config.num_hidden_layers]


def _passages(ids: Tensor, markup: list[int] | None) -> Tensor | None:
    """The number of the whole passage that each id belongs to, its markup included, 0 for none, (B,n); None without any."""
    if markup is None:
        return None
    opens, closes = ids == markup[0], ids == markup[1]
    if not bool(opens.any()):
        return None
    begun, ended = opens.cumsum(1), closes.cumsum(1)
    inside = (begun > ended) | (closes & (begun == ended))
    closed = ended[:, -1:] >= begun  # one that is not closed among these ids is read as it comes
    return torch.where(inside & closed, begun, 0)


def _real(mask: Tensor | None, rows: int, width: int, device: torch.device) -> Tensor:
    """Which columns hold a row's own ids, (B,W)."""
    return torch.ones(rows, width, dtype=torch.bool, device=device) if mask is None else mask[:, -width:].bool()


def _before(words: Tensor, real: Tensor) -> Tensor:
    """The word before each column that is real, 0 before the first. (B,W,D), (B,W) → (B,W,D)."""
    columns = torch.arange(words.shape[1], device=words.device).expand(real.shape)
    latest = torch.where(real, columns, -1).cummax(dim=1).values
    at = nn.functional.pad(latest[:, :-1], (1, 0), value=-1)[:, :, None]
    return words.gather(1, at.clamp_min(0).expand(-1, -1, words.shape[2])) * (at >= 0)


def _earlier(real: Tensor, new: int) -> Tensor:
    """Which columns each of the last `new` ones may look at: real ones, up to itself. (B,W) → (B,new,W)."""
    width = real.shape[1]
    order = torch.arange(width, device=real.device)
    return real[:, None, :] & (order[None, :] <= order[-new:, None])


def _packs(positions: Tensor | None) -> Tensor | None:
    """Which of several packed rows each column belongs to, (B,n); None where there is one. Positions begin anew with each."""
    if positions is None:
        return None
    starts = torch.diff(positions, dim=1, prepend=positions[:, :1] - 1) != 1
    return starts.cumsum(1) if bool(starts.any()) else None


def _goes_on(packs: Tensor) -> Tensor:
    """Whether the column before belongs to the same row, (B,n)."""
    return torch.diff(packs, dim=1, prepend=packs[:, :1] - 1) == 0


def _same(packs: Tensor) -> Tensor:
    return packs[:, :, None] == packs[:, None, :]


def causal_from_encoder(folder: str) -> tuple[CopierForCausalLM, Any]:
    """A causal model whose layers and embeddings start from the BERT weights in `folder`, with its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token, tokenizer.eos_token = tokenizer.cls_token, tokenizer.sep_token
    ends = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    settings = {**BertConfig.from_pretrained(folder).to_diff_dict(), **ends, "pad_token_id": tokenizer.pad_token_id}
    settings |= {"is_decoder": True, "tie_word_embeddings": True, "architectures": ["CopierForCausalLM"]}
    config = CopierConfig(**{name: value for name, value in settings.items() if name != "model_type"})
    with torch.random.fork_rng():  # nothing that is drawn is kept
        model = CopierForCausalLM.from_pretrained(folder, config=config)
    head, words = model.cls.predictions, model.get_input_embeddings().weight
    model.config.word_length = float((words - words.mean(0)).detach().norm(dim=1).mean())
    with torch.no_grad():
        for layer in (head.transform.dense, model.copy_query, model.copy_key):
            layer.weight.copy_(torch.eye(config.hidden_size))
            layer.bias.zero_()
        head.transform.LayerNorm.weight.fill_(1 / model.config.word_length)
        head.transform.LayerNorm.bias.zero_()
        head.bias.zero_()
        model.copy_gate.weight.zero_()
        model.copy_gate.bias.fill_(math.log(math.expm1(OPENS)))
    return model, tokenizer


AutoConfig.register(CopierConfig.model_type, CopierConfig)
AutoModelForCausalLM.register(CopierConfig, CopierForCausalLM)
