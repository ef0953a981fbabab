"""From a recipe's generator settings to an `HFGenerator`: weights, tokenizer, further tokens, adapters."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from raglan.artifact import MANIFEST
from raglan.characters import add_characters
from raglan.embedded import embedded_model
from raglan.encoder import bfloat16_is_faster, compute_device
from raglan.errors import CheckpointError, RecipeError, require
from raglan.generator.adapter import adapter_base, check_base, find_adapter, is_adapter, merged, put_on
from raglan.generator.causal import causal_from_encoder
from raglan.generator.hf import HFGenerator
from raglan.generator.reader import reader_from_encoder
from raglan.generator.special import name_tokens
from raglan.learned_prompt import read_record
from raglan.marked_prompt import read_schema
from raglan.memory import keep_freed
from raglan.quiet import quietly
from raglan.recipe import AdapterSettings, GeneratorSettings, PromptSettings
from raglan.vocabulary import new_rows, open_tokenizer, prepare_vocabulary, rows_of
from raglan.weights import read_json

__all__ = ["open_generator", "open_merged"]

EMBEDDED = {"embedded": reader_from_encoder, "embedded_causal": causal_from_encoder}
UNREADABLE = (ImportError, OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, UnpicklingError)


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
    generator = HFGenerator(model.to(compute_device()).eval(), tokenizer, settings, prompt)
    generator.learned_prompt = read_record(settings.model if adapter is None else find_adapter(adapter))
    return generator


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
