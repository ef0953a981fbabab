"""A row for every Han character, in a model whose word pieces know next to none: what it cannot spell it cannot copy either.

The embedded encoder's vocabulary was made of English: of 20,992 Han characters it has 244, and all others are one word, [UNK].
A reader of [UNK]s sees no difference between them, and could not write one. With a row of its own a character is itself, and
copying needs no more: rows are drawn with the mean and the spread of the old ones, the same in every process, so that equal
characters are equal and unlike ones are not. They mean nothing at first; questions and passages teach the rest.

The tokenizer needs no other rule: BERT's puts blanks around Han characters, so each is a word, and only has to be found.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from tokenizers import Tokenizer

from raglan.errors import GeneratorError
from raglan.quiet import quietly

__all__ = ["HAN", "add_characters"]

HAN = range(0x4E00, 0xA000)  # CJK Unified Ideographs; rarer ones lie outside


def add_characters(model: Any, tokenizer: Any, *, seed: int = 0) -> int:
    """Give model and tokenizer the Han characters that they lack; both are changed. How many those were.

    Raises:
        GeneratorError: a tokenizer of another kind than BERT's; most others spell any character in bytes.
    """
    told = json.loads(tokenizer.backend_tokenizer.to_str()) if getattr(tokenizer, "is_fast", False) else {}
    if (told.get("model") or {}).get("type") != "WordPiece" or not (told.get("normalizer") or {}).get("handle_chinese_chars"):
        raise GeneratorError(
            "generator.vocabulary is han, and this model's tokenizer is none of word pieces that sets Han characters apart",
            hint="leave vocabulary out: tokenizers of other kinds spell any character; or generator.model: embedded",
        )
    known = told["model"]["vocab"]
    lacking = [letter for letter in map(chr, HAN) if letter not in known]
    if not lacking:
        return 0
    first = max(max(known.values()), *(len(matrix) - 1 for matrix in _matrices(model))) + 1
    known |= {letter: first + place for place, letter in enumerate(lacking)}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(told))  # `add_tokens` would search 20,000 words in every text
    with quietly():
        model.resize_token_embeddings(first + len(lacking), mean_resizing=False)
    if hasattr(model.config, "encoder"):  # the embedded reader's, of which its layers are made
        model.config.encoder["vocab_size"] = first + len(lacking)
    _fill(model, first, seed)
    return len(lacking)


@torch.no_grad()
def _fill(model: Any, first: int, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    for matrix in _matrices(model):
        old = matrix[:first].float()
        drawn = torch.randn(len(matrix) - first, matrix.shape[1], generator=chance)
        matrix[first:] = (old.mean(0) + drawn * old.std(0)).to(matrix)


def _matrices(model: Any) -> list[torch.Tensor]:
    """The embeddings, and the head where it is not tied to them."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    return list({id(module.weight): module.weight for module in ends if module is not None}.values())
