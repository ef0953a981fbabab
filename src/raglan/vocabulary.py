"""The reflection tokens in a model's vocabulary: checked where they are, added where they are not (Self-RAG, Asai et al. 2023).

The 15 tokens are appended in the published order as special tokens, then <pad> where the tokenizer has no padding of its own;
both embedding matrices end with the tokenizer's last id, so no row is left that no token has and that could win. Tied
matrices stay tied. New rows start from

    mean     the mean of the old rows, of input and output matrix apart
    words    the mean of the rows of a phrase that says what the token means
    random   draws, as in the authors' code

With LoRA exactly the new rows of both matrices learn beside the adapter; the authors' LoRA leaves them as they were drawn.

Published checkpoints of 2023 come with `tokenizer.model` and `added_tokens.json` and were trained with a blank behind every
control token, which transformers 5 leaves out unless the folder says `legacy`. `open_tokenizer` puts it back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaTokenizer
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from raglan.errors import GeneratorError, require
from raglan.marked_prompt import marked, read_schema
from raglan.quiet import quietly
from raglan.recipe import GeneratorSettings
from raglan.reflection import PAD, Schema

__all__ = ["extend_vocabulary", "new_rows", "open_tokenizer", "prepare_vocabulary", "save_tokenizer"]

SENTENCES = "tokenizer.model"  # SentencePiece's own file
Init = Literal["mean", "words", "random"]
PHRASES = {  # in the order of a schema's ids
    "retrieve": ("answer without a search", "search for evidence", "go on with the same evidence"),
    "is_rel": ("this passage is irrelevant", "this passage is relevant"),
    "is_sup": ("fully supported by the passage", "partially supported by the passage", "contradicted by the passage"),
    "is_use": ("not useful at all", "hardly useful", "somewhat useful", "useful", "very useful"),
    "markup": ("the passage begins", "the passage ends"),
}  # fmt: skip


def prepare_vocabulary(model: Any, tokenizer: Any, settings: GeneratorSettings) -> Schema:
    """The schema of a model that has the reflection tokens, or now gets them.

    Raises:
        GeneratorError: a model that is not causal, or without an LM head.
        CheckpointError: some of the tokens are there, and not all of them as they should be.
    """
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise GeneratorError(
            f"{settings.model!r} is no causal language model, and reflection tokens are written between an answer's sentences",
            hint="generator.model: embedded_causal, or another causal model; or generator.vocabulary: own",
        )
    if not marked(tokenizer):
        return extend_vocabulary(model, tokenizer, init=settings.vocabulary_init)
    schema = read_schema(tokenizer, rows_of(model))
    _resize(model, tokenizer)
    return schema


def extend_vocabulary(model: Any, tokenizer: Any, *, init: Init = "mean", seed: int = 0) -> Schema:
    """Give model and tokenizer the 15 reflection tokens; both are changed.

    Args:
        init: what the new rows start from. `random` draws with the seed.
    """
    old = min(rows_of(model), _size(tokenizer))
    names = list(Schema.numbered(0).spellings)
    tokenizer.add_special_tokens({"extra_special_tokens": names}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
        model.config.pad_token_id = tokenizer.pad_token_id
    _resize(model, tokenizer)
    schema = read_schema(tokenizer, rows_of(model))
    _fill(model, tokenizer, schema, old, init, seed)
    if hasattr(model.config, "passage_markup"):  # the embedded causal model reads what stands between in both directions
        model.config.passage_markup = [schema.opens, schema.closes]
    return schema


def new_rows(model: Any, schema: Schema) -> dict[str, list[int]]:
    """Module → rows that LoRA trains beside its adapter, as peft's `trainable_token_indices` takes them.

    A bare list of rows would reach the input side alone. Of tied matrices one is named, and peft ties the other.
    """
    ends = [model.get_input_embeddings()]
    head = model.get_output_embeddings()
    ends += [] if head.weight is ends[0].weight else [head]
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(module)]: sorted(schema.controls) for module in ends}


def rows_of(model: Any) -> int:
    """Rows of the smaller of the two embedding matrices."""
    return min(len(model.get_input_embeddings().weight), len(model.get_output_embeddings().weight))


def _size(tokenizer: Any) -> int:
    """Rows that a tokenizer needs."""
    return int(max(tokenizer.get_vocab().values())) + 1


def _resize(model: Any, tokenizer: Any) -> None:
    """As many rows as the tokenizer has ids: what lies behind them belongs to no token, and must not be written."""
    if {len(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings())} != {_size(tokenizer)}:
        with quietly():
            model.resize_token_embeddings(_size(tokenizer), mean_resizing=False)


@torch.no_grad()
def _fill(model: Any, tokenizer: Any, schema: Schema, old: int, init: Init, seed: int) -> None:
    """Write the rows from `old` on, of both matrices and of the head's bias."""
    head = model.get_output_embeddings()
    matrices = [model.get_input_embeddings().weight]
    matrices += [] if head.weight is matrices[0] else [head.weight]
    matrices += [head.bias[:, None]] if getattr(head, "bias", None) is not None else []
    phrases = {schema.ids[role][at]: text for role, texts in PHRASES.items() for at, text in enumerate(texts)}
    spread = float(getattr(model.config, "initializer_range", 0.02))
    for number, matrix in enumerate(matrices):
        mean = matrix[:old].float().mean(0)
        for row in range(old, len(matrix)):
            if init == "words" and row in phrases:
                ids = tokenizer(phrases[row], add_special_tokens=False, verbose=False)["input_ids"]
                matrix[row] = matrix[ids].float().mean(0).to(matrix)
            elif init == "random" and matrix.shape[1] > 1:
                matrix[row] = _drawn(matrix, spread, (seed, number, row))
            else:
                matrix[row] = mean.to(matrix)


def _drawn(matrix: Tensor, spread: float, which: tuple[int, int, int]) -> Tensor:
    seed, number, row = which
    chance = torch.Generator().manual_seed(seed * 1_000_003 + number * 500_009 + row)
    return (torch.randn(matrix.shape[1], generator=chance) * spread).to(matrix)


def open_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or hub name, with the blanks that the model was trained with.

    A Llama's `tokenizer.model` was written by a tokenizer that put a blank behind control tokens unless its config said
    otherwise (`legacy`). Where nothing is said, transformers 4 kept to that and transformers 5 does not: ids would differ.

    Raises:
        MissingExtra: there is a `tokenizer.model` alone, and the libraries that read it are not installed.
        OSError, ValueError, KeyError, TypeError: of transformers, for what is no tokenizer.
    """
    _check_readable(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (ImportError, ValueError) as fault:
        if SENTENCES in str(fault) or "tiktoken" in str(fault):  # of a hub name; transformers tries another reader
            _require_sentencepiece(name)
        raise
    of_sentencepiece = str(tokenizer.init_kwargs.get("vocab_file")).endswith(".model")
    if isinstance(tokenizer, LlamaTokenizer) and of_sentencepiece and get_tokenizer_config(name).get("legacy") is None:
        tokenizer = AutoTokenizer.from_pretrained(name, legacy=True)
    return tokenizer


def _check_readable(name: str) -> None:
    """Told before weights are read, which may take minutes."""
    if (Path(name) / SENTENCES).is_file() and not (Path(name) / "tokenizer.json").is_file():
        _require_sentencepiece(name)


def _require_sentencepiece(name: str) -> None:
    for library in ("sentencepiece", "google.protobuf"):
        require(library, f"to read the {SENTENCES} of {name!r}")


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer so that it is read back as it is, the blank behind control tokens included.

    transformers 5 leaves a Llama tokenizer's `legacy` out of what it saves, and opens it as a fast one, without that blank.
    """
    if hasattr(tokenizer, "legacy"):
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    tokenizer.save_pretrained(str(folder))
