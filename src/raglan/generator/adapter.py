"""An adapter beside its base: found, compared with the base, put on it, and merged into it.

    W' = W + s·BA        s = α/r, with rslora α/√r (Hu et al. 2021, Eq. 3; Kalajdzievski 2023)

It lies in a folder of its own or in a subfolder, as several adapters of one base are published. Which base its config names is
advisory: `generator.model` says it, and layer count, sizes and vocabulary must agree with what the adapter was made for.

A merge adds in float32, whatever the weights are kept in, and rounds once. peft adds in the weights' own precision.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from raglan.errors import CheckpointError, require
from raglan.quiet import quietly
from raglan.recipe import AdapterSettings
from raglan.weights import read_tensor_file

__all__ = ["adapter_base", "check_base", "find_adapter", "is_adapter", "merged", "put_on"]

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
WHOLE = "an adapter is adapter_config.json and adapter_model.safetensors, as peft or raglan saved them: fetch it again"
LAYER = re.compile(r"\.(?:layers|layer|h|block|blocks)\.(\d+)\.")
FACTOR = re.compile(r"^base_model\.model\.(.+)\.lora_([AB])\.weight$")
TABLES = re.compile(r"(?:embed_tokens|lm_head|wte|shared)\.(?:weight|lora_embedding_A)$")
UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, UnpicklingError, SafetensorError)


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / CONFIG).is_file()


def find_adapter(settings: AdapterSettings) -> Path:
    """The folder that an adapter lies in: the named one, one of its subfolders, or what a hub has under that name.

    Raises:
        CheckpointError: there is none; what lies in subfolders is told.
    """
    root = Path(settings.path)
    if not root.is_dir():
        root = _fetched(settings)
    folder = root / settings.subfolder if settings.subfolder else root
    if is_adapter(folder):
        return folder
    known = sorted(str(file.parent.relative_to(root)) for file in root.glob(f"*/{CONFIG}"))
    where = f"its subfolders {', '.join(known)} do" if known else "no subfolder does either"
    hint = f"generator.adapter.subfolder: {known[0]}" if known else WHOLE
    raise CheckpointError(f"{folder} holds no {CONFIG}; {where}", hint=hint)


def _fetched(settings: AdapterSettings) -> Path:
    """An adapter of a hub, in the local cache."""
    from huggingface_hub import snapshot_download

    wanted = f"{settings.subfolder}/*" if settings.subfolder else "*"
    try:
        return Path(snapshot_download(settings.path, allow_patterns=[wanted]))
    except (OSError, ValueError) as fault:
        raise CheckpointError(
            f"adapter {settings.path!r} cannot be loaded: {_first_line(fault)}",
            hint="give a folder with an adapter in it or below it, or a hub name and a network",
        ) from None


def adapter_base(folder: str | Path) -> str:
    """The base that an adapter's config names.

    Raises:
        CheckpointError: a config that cannot be read, or names none.
    """
    base = _config(folder).base_model_name_or_path
    if not base:
        raise CheckpointError(
            f"adapter {str(folder)!r} names no base model",
            hint=f"set base_model_name_or_path in its {CONFIG}; or name the base as generator.model, and this as .adapter",
        )
    return str(base)


def check_base(base: str, adapter: AdapterSettings) -> None:
    """Refuse, before anything is loaded, to merge into weights that are kept in few bits.

    Raises:
        CheckpointError: a quantised base.
    """
    try:
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError, KeyError, TypeError):
        return  # what is wrong with it is told when it is loaded
    if adapter.merge and getattr(config, "quantization_config", None) is not None:
        raise _quantised(base)


def put_on(model: Any, tokenizer: Any, folder: str | Path, *, base: str, trainable: bool) -> Any:
    """The base with the adapter beside its weights.

    Args:
        model, tokenizer: the base's. base: what it is called in messages and in what is saved of the adapter.
        trainable: the adapter goes on learning.

    Raises:
        CheckpointError: a damaged adapter, one of another base, or weights in a file that holds more than tensors.
    """
    folder = str(folder)
    peft, config = _peft(folder), _config(folder)
    place = next((Path(folder) / name for name in WEIGHTS if (Path(folder) / name).is_file()), None)
    if place is None:
        raise CheckpointError(f"adapter {folder!r} has no weights: neither {' nor '.join(WEIGHTS)}", hint=WHOLE)
    try:
        tensors = read_tensor_file(place)
    except CheckpointError as fault:
        raise CheckpointError(
            f"adapter {folder!r} cannot be put on {base!r}: {fault.message}", hint=fault.hint or WHOLE
        ) from None
    _check_fit(model, tokenizer, folder, config, tensors, base)
    try:
        with quietly():
            adapted = peft.PeftModel.from_pretrained(model, folder, is_trainable=trainable)
            wanted = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    except UNREADABLE as fault:
        raise CheckpointError(
            f"adapter {folder!r} cannot be put on {base!r}: {_first_line(fault)}",
            hint=f"it belongs to another base model, or is damaged; {WHOLE}",
        ) from None
    if missing := sorted(wanted - set(tensors)):  # peft leaves them as they were drawn
        raise CheckpointError(
            f"adapter {folder!r} lacks {len(missing)} of its weights: {', '.join(missing[:3])}…",
            hint=f"its files are incomplete, or {CONFIG} tells of another adapter",
        )
    adapted.peft_config["default"].base_model_name_or_path = base
    return adapted


def merged(model: Any, *, base: str) -> Any:
    """The plain model that computes what the base with its adapter does: each weight W + s·BA in float32, then cast back.

    Raises:
        CheckpointError: a quantised base, whose weights cannot hold the sum; weights that are no numbers.
    """
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if getattr(model.get_base_model(), "is_quantized", False) or not all(map(_is_plain, layers)):
        raise _quantised(base)
    try:
        for layer in layers:
            _merge_layer(layer)
    except ValueError as fault:
        raise CheckpointError(f"the adapter cannot be merged into {base!r}: {_first_line(fault)}", hint=WHOLE) from None
    with quietly(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, that these layers are merged already
        return model.merge_and_unload()


def _merge_layer(layer: Any) -> None:
    weight = layer.get_base_layer().weight
    kind = weight.dtype
    for factors in (layer.lora_A, layer.lora_B):
        factors.float()
    for name in ("lora_embedding_A", "lora_embedding_B"):
        for parameter in getattr(layer, name).values():
            parameter.data = parameter.data.float()
    weight.data = weight.data.float()
    layer.merge(safe_merge=True)
    base = layer.get_base_layer()
    base.weight.data = base.weight.data.to(kind)


def _is_plain(layer: Any) -> bool:
    weight = getattr(layer.get_base_layer(), "weight", None)
    return weight is not None and type(weight.data) is Tensor and weight.is_floating_point() and weight.element_size() > 1


def _quantised(base: str) -> CheckpointError:
    return CheckpointError(
        f"{base!r} is quantised, and an adapter cannot be merged into weights of so few bits",
        hint="generator.adapter.merge: false, or name the base in its full precision",
    )


def _check_fit(model: Any, tokenizer: Any, folder: str, config: Any, tensors: Mapping[str, Tensor], base: str) -> None:
    """Layer count, sizes and vocabulary of adapter and base; what differs is told with both."""
    told = [*_layers(model, config, tensors), *_sizes(model, tensors), *_words(model, tokenizer, folder, tensors)]
    if told:
        raise CheckpointError(
            f"adapter {folder!r} cannot be put on {base!r}: {'; '.join(told)}",
            hint="it was made for another base: name that one as generator.model",
        )


def _layers(model: Any, config: Any, tensors: Mapping[str, Tensor]) -> list[str]:
    numbers = [int(found.group(1)) for name in tensors if (found := LAYER.search(name))]
    has = getattr(model.config, "num_hidden_layers", None)
    if not numbers or has is None or model.config.is_encoder_decoder:
        return []
    made, some = max(numbers) + 1, getattr(config, "layers_to_transform", None) is not None
    return [f"it has {made} layers, the base {has}"] if made > has or (made < has and not some) else []


def _sizes(model: Any, tensors: Mapping[str, Tensor]) -> list[str]:
    """A layer with other numbers of inputs or outputs than the base's; one that reads the hidden states if there is any."""
    modules, hidden = dict(model.named_modules()), getattr(model.config, "hidden_size", None)
    unlike: list[tuple[str, str, int, int]] = []
    for name, tensor in tensors.items():
        found = FACTOR.match(name)
        module = modules.get(found.group(1)) if found else None
        if found is None or tensor.ndim != 2 or not isinstance(module, torch.nn.Linear):
            continue
        reads = found.group(2) == "A"
        own, has = (tensor.shape[1], module.in_features) if reads else (tensor.shape[0], module.out_features)
        if own != has:
            unlike.append((found.group(1), "inputs" if reads else "outputs", own, has))
    for name, side, own, has in sorted(unlike, key=lambda one: one[1] != "inputs" or one[3] != hidden)[:1]:
        size = f"hidden size {own}, the base {has}: " if side == "inputs" and has == hidden else ""
        return [f"it has {size}its {name} takes {own} {side}, the base's {has}"]
    return []


def _words(model: Any, tokenizer: Any, folder: str, tensors: Mapping[str, Tensor]) -> list[str]:
    """Rows that the adapter holds, and the tokenizer that it may bring, against the base's."""
    rows = len(model.get_input_embeddings().weight)
    for name, tensor in tensors.items():
        if found := TABLES.search(name):
            own = tensor.shape[1] if found.group().endswith("A") else tensor.shape[0]
            if own != rows:
                return [f"it has {own} words in its vocabulary, the base {rows}"]
    if not any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return []
    try:
        with quietly():
            own_words = AutoTokenizer.from_pretrained(folder).get_vocab()
    except UNREADABLE as fault:
        return [f"its tokenizer cannot be read: {_first_line(fault)}"]
    words = tokenizer.get_vocab()
    return [f"its tokenizer has {len(own_words)} words, the base's {len(words)}"] if own_words != words else []


def _config(folder: str | Path) -> Any:
    peft = _peft(folder)
    try:
        return peft.PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise CheckpointError(f"adapter {str(folder)!r} cannot be loaded: {_first_line(fault)}", hint=WHOLE) from None


def _peft(folder: str | Path) -> Any:
    return require("peft", f"to open the adapter {folder}")


def _first_line(fault: BaseException) -> str:
    return (str(fault).strip().splitlines() or [type(fault).__name__])[0]
