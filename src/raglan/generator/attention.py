"""How much attention a sequence-to-sequence generator pays each passage while it is given an answer (Atlas, §2.2).

    u_k = mean over layers, heads, answer tokens t and the passage's own tokens i of α_ti ‖v_i‖₂

α is the decoder's attention across to the prompt, v what it takes from there; both are what the model computes, its values
read from the cache it fills. Causal models have no attention across, and are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from raglan.errors import GeneratorError
from raglan.generator.hf import HFGenerator
from raglan.prompt import Rendered
from raglan.records import Passage

__all__ = ["passage_attention"]


@torch.no_grad()
def passage_attention(
    generator: HFGenerator, prompt: Rendered, passages: Sequence[Passage], answer: str, *, score_eos: bool = True
) -> np.ndarray:
    """What each of K passages in one prompt is paid, (K,) float32. No gradient.

    Raises:
        GeneratorError: a model without cross-attention, or a prompt in which the passages are not found.
    """
    if not generator.is_seq2seq:
        raise GeneratorError(
            f"{generator.settings.model!r} returns no cross-attention, which evidence attention reads",
            hint="use a sequence-to-sequence generator or the embedded reader, or evidence: alone or left_out",
        )
    row = generator.row(prompt, answer)
    batch = {name: value.to(generator.device) for name, value in generator.collate([row]).items()}
    generator.model.eval()
    with _eager(generator), generator.autocast():
        weights, cache = _across(generator, batch)
    first = len(generator.prefix) - 1  # the position that predicts the answer's first token
    last = first + len(row["labels"]) - (not score_eos)
    paid = torch.stack([
        (alpha[0, :, first:last].float().mean(1) * layer.values[0].float().norm(dim=-1)).mean(0)
        for alpha, layer in zip(weights, cache.layers, strict=True)
    ]).mean(0)  # (L,)  # fmt: skip
    places = _places(generator, prompt, passages)
    return np.array([float(paid[torch.from_numpy(own)].mean()) if own.any() else 0.0 for own in places], dtype=np.float32)


def _across(generator: HFGenerator, batch: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], Any]:
    """Attention across, (1,H,T,L) a layer, and the cache of keys and values it was computed with."""
    ids = generator.decoder_inputs(batch["labels"])
    shared: dict[str, Any] = {
        "past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache()), "use_cache": True, "output_attentions": True,
    }  # fmt: skip
    inputs, mask = batch["input_ids"], batch["attention_mask"]
    if generator.reader is not None:
        encoding = generator.reader.encoder(input_ids=inputs, attention_mask=mask)
        states = encoding.last_hidden_state
        output = generator.reader.decoder(input_ids=ids, encoder_hidden_states=states, encoder_attention_mask=mask, **shared)
    else:
        output = generator.model(input_ids=inputs, attention_mask=mask, decoder_input_ids=ids, **shared)
    found = output.cross_attentions
    if not found or found[0] is None:
        raise GeneratorError(f"{type(generator.model).__name__} returns no cross-attention", hint="evidence: alone or left_out")
    return found, output.past_key_values.cross_attention_cache


@contextmanager
def _eager(generator: HFGenerator) -> Iterator[None]:
    """Attention by matrix products, which alone gives its weights; the reader is as it is."""
    model = generator.model
    usual = model.config._attn_implementation
    if generator.reader is not None:
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


def _places(generator: HFGenerator, prompt: Rendered, passages: Sequence[Passage]) -> list[np.ndarray]:
    """Which of the prompt's tokens are of each passage, (L,) bool each: its block, or its span of the one text."""
    ids = np.array(prompt.ids)
    if generator.prompt.layout == "fused":
        blocks = np.cumsum(ids == generator.tokenizer.cls_token_id) - 1
        return [blocks == k for k in range(len(passages))]
    coded = generator.tokenizer(
        prompt.text, add_special_tokens=True, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    if coded["input_ids"] != list(prompt.ids):
        raise GeneratorError("the prompt's tokens cannot be traced to its passages", hint="evidence: alone or left_out")
    begins, ends = np.array(coded["offset_mapping"]).T
    found = []
    cursor = 0
    for number, passage in enumerate(passages, 1):
        start, cursor = _span(prompt.text, generator.prompt.passage_text(passage, number), cursor)
        found.append((begins >= start) & (ends <= cursor) & (ends > begins))
    return found


def _span(text: str, passage: str, cursor: int) -> tuple[int, int]:
    """Where a passage, perhaps cut at its end, stands in the prompt behind `cursor`."""
    start = next((at for size in (len(passage), 40, 8, 1) if (at := text.find(passage[:size], cursor)) >= 0), cursor)
    length = next((n for n, (a, b) in enumerate(zip(text[start:], passage, strict=False)) if a != b), len(passage))
    return start, min(len(text), start + length)
