"""DPR's towers (Karpukhin et al. 2020) as sentence-transformers models, and back.

    E(text) = last hidden state of [CLS], projected where the checkpoint has a projection;  similarity = inner product

A passage is the tokenizer's pair title/text, a passage without a title its text alone. Token types are 0 throughout, as
in the code that DPR was trained and its published passage vectors were made with, although BERT's tokenizer numbers the
second half of a pair 1. BERT's pooler, which DPR has no use for, is written as zeros: left out, it would be drawn anew
at each loading, and a tower would never equal itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import BertConfig, BertModel
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from raglan.artifact import write_json
from raglan.errors import CheckpointError
from raglan.vocabulary import save_tokenizer
from raglan.weights import lacking, read_json, read_tensors, weight_files, without, write_tensors

__all__ = [
    "DEFAULTS",
    "as_dpr",
    "copy_tokenizer",
    "dpr_folder",
    "misfits",
    "model_file",
    "open_dpr",
    "save_dpr",
    "vector_size",
    "write_tower",
]

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json",
    "merges.txt", "spiece.model", "chat_template.jinja",
)  # fmt: skip
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model")
SHARED = {  # what a DPR config has in common with a BERT config, and what it takes where it is silent
    "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "max_position_embeddings": 512,
    "type_vocab_size": 2, "initializer_range": 0.02, "layer_norm_eps": 1e-12, "pad_token_id": 0,
}  # fmt: skip
DEFAULTS = {**SHARED, "projection_dim": 0}
KINDS = {"DPRQuestionEncoder": "question_encoder", "DPRContextEncoder": "ctx_encoder"}


def dpr_folder(name: str) -> Path | None:
    """The folder of a DPR encoder, given as a folder or a hub name; None for any other model."""
    config = model_file(name, "config.json")
    if config is None or _kind(config) != "dpr" or model_file(name, "modules.json") is not None:
        return None
    if not Path(name).is_dir():  # from the hub: fetch what will be read
        _ = [model_file(name, file) for file in TOKENIZER]
        _ = model_file(name, "model.safetensors") or model_file(name, "pytorch_model.bin")
    return config.parent


def open_dpr(folder: Path, *, device: str) -> SentenceTransformer:
    """A folder as transformers' DPRQuestionEncoder or DPRContextEncoder writes it, as a tower. Its weights are not copied.

    Raises:
        CheckpointError: a reader instead of an encoder, missing weights, or no tokenizer.
    """
    config = read_json(folder / "config.json")
    named = [KINDS[name] for name in config.get("architectures") or KINDS if name in KINDS]
    tensors = read_tensors(folder)
    kind = next((kind for kind in named if any(key.startswith(f"{kind}.") for key in tensors)), None)
    if kind is None:
        raise CheckpointError(
            f"{folder} holds no DPR encoder; its architectures are {config.get('architectures')}",
            hint=f"give a folder of {' or '.join(KINDS)}",
        )
    with TemporaryDirectory(prefix="raglan-dpr-") as place:
        _write_around(Path(place), config, without(f"{kind}.", tensors), tokenizer=folder, source=folder)
        for file in weight_files(folder):
            (Path(place) / file.name).symlink_to(file.resolve())
        names = {"key_mapping": {rf"^{kind}\.bert_model\.": ""}}
        with _without_reports():
            tower = SentenceTransformer(place, device=device, model_kwargs=names)
    tower.tokenizer.model_input_names = ["input_ids", "attention_mask"]  # token types 0
    bert: Any = next(iter(tower)).auto_model
    bert._weight_conversions = None  # or it would be saved under DPR's names again, which no BERT has
    for parameter in bert.pooler.parameters():
        torch.nn.init.zeros_(parameter)
    return tower


def write_tower(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, tokenizer: Path, source: Path
) -> None:
    """Write a DPR encoder as a sentence-transformers folder.

    Args:
        config: DPR's settings.
        tensors: its weights, named `bert_model.…` and `encode_proj.…`.
        tokenizer: a folder that holds its tokenizer's files.
        source: what to call the checkpoint in messages.
    """
    model = _write_around(folder, config, tensors, tokenizer=tokenizer, source=source)
    own = {name: tensors[f"bert_model.{name}"] for name in model.state_dict()}
    size = model.config.hidden_size
    pooler = own["embeddings.LayerNorm.weight"].new_zeros(size, size)
    write_tensors(folder / "model.safetensors", {**own, "pooler.dense.weight": pooler, "pooler.dense.bias": pooler[0]})


def save_dpr(tower: SentenceTransformer, folder: Path) -> None:
    """Write a tower without `misfits` as transformers' DPRContextEncoder, with its tokenizer."""
    config, tensors = as_dpr(tower)
    write_tensors(folder / "model.safetensors", {f"ctx_encoder.{name}": value for name, value in tensors.items()})
    write_json(folder / "config.json", {**config, "architectures": ["DPRContextEncoder"]})
    save_tokenizer(tower.tokenizer, folder)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer's files. Raises CheckpointError where there are none."""
    if not any((source / name).is_file() for name in VOCABULARIES):
        raise CheckpointError(
            f"{source} holds no tokenizer: none of {', '.join(VOCABULARIES)}", hint="give the whole folder, as it was published"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def vector_size(config: Mapping[str, Any]) -> int:
    """D of a DPR config."""
    return int(config.get("projection_dim") or config.get("hidden_size", 768))


def misfits(tower: SentenceTransformer) -> list[str]:
    """Why a tower is none of DPR's, in words; empty where it is one."""
    modules: list[Any] = list(tower)
    first, others = modules[0], modules[1:]
    names = [type(module).__name__ for module in others]
    found = []
    if getattr(getattr(first, "auto_model", None), "config", None) is None or first.auto_model.config.model_type != "bert":
        found.append("its model is not BERT")
    if names not in (["Pooling"], ["Pooling", "Dense"]):
        found.append(
            f"behind BERT stand {', '.join(names) or 'no modules'}, where DPR has [CLS] pooling and at most a projection"
        )
    for module in others:
        said = module.get_config_dict() if hasattr(module, "get_config_dict") else {}
        if type(module).__name__ == "Pooling" and (mode := _pooling(said)) != "cls":
            found.append(f"it pools by {mode}, DPR takes [CLS]")
        if type(module).__name__ == "Dense" and not (said["activation_function"].endswith(".Identity") and said["bias"]):
            found.append("its projection is not a plain linear layer with a bias")
    if tower.similarity_fn_name != "dot":
        found.append(f"it compares by {tower.similarity_fn_name}, DPR by inner product")
    return found


def as_dpr(tower: SentenceTransformer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A tower without `misfits` → DPR's config, and its weights named `bert_model.…` and `encode_proj.…`."""
    modules: list[Any] = list(tower)
    first, others = modules[0], modules[1:]
    bert = first.auto_model
    tensors = {f"bert_model.{name}": value for name, value in bert.state_dict().items() if not name.startswith("pooler.")}
    config = {"model_type": "dpr", "projection_dim": 0}
    config |= {key: getattr(bert.config, key) for key in SHARED}
    for dense in others[1:]:
        tensors |= {f"encode_proj.{name}": value for name, value in dense.linear.state_dict().items()}
        config["projection_dim"] = dense.out_features
    return config, tensors


def _write_around(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, tokenizer: Path, source: Path
) -> BertModel:
    """All of a tower's folder but BERT's weights, which are seen to be there; returns an empty BERT of their names."""
    settings = {key: value for key, value in config.items() if key not in ("projection_dim", "torch_dtype", "return_dict")}
    settings |= {"model_type": "bert", "architectures": ["BertModel"], "dtype": "float32"}
    with torch.device("meta"):
        model = BertModel(BertConfig(**{key: config[key] for key in SHARED if key in config}), add_pooling_layer=False)
    size, width = model.config.hidden_size, int(config.get("projection_dim") or 0)
    missing = [f"bert_model.{name}" for name in lacking(model, without("bert_model.", tensors))]
    projection = without("encode_proj.", tensors)
    if width and {name: value.shape for name, value in projection.items()} != {"weight": (width, size), "bias": (width,)}:
        missing.append("encode_proj")
    if missing:
        raise CheckpointError(
            f"{source} lacks {len(missing)} weights of its DPR encoder: {', '.join(missing[:3])}…",
            hint="its files are incomplete, or of another shape than its config.json says",
        )
    copy_tokenizer(tokenizer, folder)
    write_json(folder / "config.json", settings)
    _write_modules(folder, size, model.config.max_position_embeddings, projected=bool(width))
    if width:
        write_tensors(folder / "2_Dense" / "model.safetensors", {f"linear.{name}": value for name, value in projection.items()})
        write_json(folder / "2_Dense" / "config.json", {
            "in_features": size, "out_features": width, "bias": True, "activation_function": "torch.nn.modules.linear.Identity",
        })  # fmt: skip
    return model


def _write_modules(folder: Path, size: int, longest: int, *, projected: bool) -> None:
    """The small files of sentence-transformers, in the form that all of its versions read."""
    places = {"Transformer": "", "Pooling": "1_Pooling", **({"Dense": "2_Dense"} if projected else {})}
    write_json(folder / "modules.json", [
        {"idx": number, "name": str(number), "path": place, "type": f"sentence_transformers.models.{name}"}
        for number, (name, place) in enumerate(places.items())
    ])  # fmt: skip
    write_json(folder / "config_sentence_transformers.json", {"similarity_fn_name": "dot", "prompts": {}})
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": longest, "do_lower_case": False})
    (folder / "1_Pooling").mkdir()
    write_json(folder / "1_Pooling" / "config.json", {
        "word_embedding_dimension": size, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False,
    })  # fmt: skip


def _pooling(said: Mapping[str, Any]) -> str:
    """The pooling mode's name, as any version of sentence-transformers writes it."""
    mode = said.get("pooling_mode")
    if mode is None:
        mode = [
            key.removeprefix("pooling_mode_").removesuffix("_token")
            for key, on in said.items()
            if on is True and key.startswith("pooling_mode_")
        ]
        mode = mode[0] if len(mode) == 1 else mode
    return mode if isinstance(mode, str) else " and ".join(mode)


@contextmanager
def _without_reports() -> Iterator[None]:
    """transformers reports names that it has no use for: DPR's projection, and the pooler."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _kind(config: Path) -> str | None:
    try:
        return read_json(config).get("model_type")
    except CheckpointError:  # whoever loads it says what is wrong with it
        return None


def model_file(name: str, file: str) -> Path | None:
    """A file of a model folder or of a hub name; None where it is not there, or the hub cannot be asked."""
    if Path(name).is_dir():
        return Path(name) / file if (Path(name) / file).is_file() else None
    try:
        found = cached_file(
            name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
    except (OSError, ValueError):
        return None
    return Path(found) if found else None
