"""The embedded causal model: a small left-to-right language model that grows out of a sentence encoder, without a download.

The six layers of all-MiniLM-L6-v2 with a causal mask and a head tied to the word embeddings: transformers' BertLMHeadModel,
so it is saved, loaded, cached and extended as any causal model is. What it knows before training is what words mean, and
nothing of which word comes next. Rows are `[CLS] prompt answer [SEP]`, 512 positions in all, text in lower case.

    h = LayerNorm(gelu(W h_L)),  W = 1 at first        logits = s·E h + b,  s folded into LayerNorm's weight

Deviation from BERT's masked-LM head: the encoder was published without one, so it starts from the identity, and from a scale
at which the logits spread by about one.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoTokenizer, BertConfig, BertLMHeadModel

__all__ = ["causal_from_encoder"]


def causal_from_encoder(folder: str) -> tuple[BertLMHeadModel, Any]:
    """A causal model whose layers and embeddings start from the BERT weights in `folder`, with its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token, tokenizer.eos_token = tokenizer.cls_token, tokenizer.sep_token
    ends = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    config = BertConfig(**{
        **BertConfig.from_pretrained(folder).to_diff_dict(), **ends, "pad_token_id": tokenizer.pad_token_id, "is_decoder": True,
        "tie_word_embeddings": True, "architectures": ["BertLMHeadModel"],
    })  # fmt: skip
    with torch.random.fork_rng():  # nothing that is drawn is kept
        model = BertLMHeadModel.from_pretrained(folder, config=config)
    transform = model.cls.predictions.transform
    with torch.no_grad():
        transform.dense.weight.copy_(torch.eye(config.hidden_size))
        transform.dense.bias.zero_()
        words = model.get_input_embeddings().weight
        transform.LayerNorm.weight.fill_(1 / float((words - words.mean(0)).norm(dim=1).mean()))
        transform.LayerNorm.bias.zero_()
        model.cls.predictions.bias.zero_()
    return model, tokenizer
