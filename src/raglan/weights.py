"""Model weights of any age, as tensors by name: safetensors, or an old pytorch_model.bin, read without unpickling.

A `.bin` is a pickle, and a pickle can run any code. It is read with torch's restricted reader, which builds tensors and
nothing else; whatever more it holds is refused. What raglan writes is safetensors.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raglan.errors import CheckpointError

__all__ = [
    "lacking",
    "read_json",
    "read_tensor_file",
    "read_tensors",
    "weight_files",
    "without",
    "without_copies",
    "write_tensors",
]

SAFE, OLD = "model.safetensors", "pytorch_model.bin"


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All weights of a model folder by name, on the CPU; from one file or from the shards that its index names.

    Raises:
        CheckpointError: no weights, a damaged file, or a .bin that holds more than tensors.
    """
    files = [file for file in weight_files(folder) if not file.name.endswith(".json")]
    return {name: tensor for file in files for name, tensor in read_tensor_file(file).items()}


def read_tensor_file(file: Path) -> dict[str, Tensor]:
    """The tensors of one file by name, on the CPU. Raises CheckpointError: damaged, or a .bin that holds more than tensors."""
    return (_old if file.suffix == ".bin" else _safe)(file)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights: one, or shards with their index; safetensors before an old .bin.

    Raises:
        CheckpointError: none, or a shard too few.
    """
    for name in (SAFE, OLD):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}.index.json").is_file():
            return [*_shards(folder / f"{name}.index.json"), folder / f"{name}.index.json"]
    raise CheckpointError(
        f"{folder} holds no weights: neither {SAFE} nor {OLD}", hint="give the whole folder of the model, as it was published"
    )


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write weights as safetensors that transformers opens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError for a file that is not there or is none."""
    if not path.is_file():
        raise CheckpointError(f"there is no {path}", hint="give the folder of a model, with its config.json")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as fault:
        raise CheckpointError(f"{path} is not JSON: {fault}", hint="the folder is damaged: fetch it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is {type(found).__name__}, not an object", hint="the folder is damaged: fetch it again")
    return found


def without(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, with the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def lacking(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Weights of a model (on any device, also "meta") that are not there or of another shape. One of a tied group will do."""
    names = _tied(model)
    return [
        name
        for name, wanted in model.state_dict().items()
        if not any(other in tensors and tensors[other].shape == wanted.shape for other in names.get(name, [name]))
    ]


def without_copies(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's own weights, a tied one under one name only, as safetensors holds it."""
    tied = _tied(model)
    kept: dict[str, Tensor] = {}
    for name in model.state_dict():
        if name in tensors and not any(
            other in kept and torch.equal(kept[other], tensors[name]) for other in tied.get(name, [])
        ):
            kept[name] = tensors[name]
    return kept


def _tied(model: nn.Module) -> dict[str, Sequence[str]]:
    """Each parameter's name → all names of that parameter."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: group for group in groups.values() for name in group}


def _shards(index: Path) -> list[Path]:
    files = sorted({index.parent / Path(str(shard)).name for shard in read_json(index).get("weight_map", {}).values()})
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"there is no {file}, which {index.name} names", hint="fetch the folder again, whole")
    return files


def _safe(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as fault:
        raise CheckpointError(f"{file} cannot be read: {fault}", hint="it is damaged or incomplete: fetch it again") from None


def _old(file: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except UnpicklingError as fault:
        raise CheckpointError(
            f"{file} holds more than tensors, so it is not opened: {str(fault).strip().splitlines()[0]}",
            hint="a pickle can run any code; get the checkpoint as safetensors from a source you trust",
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as fault:
        reason = (str(fault).strip().splitlines() or [type(fault).__name__])[0]
        raise CheckpointError(f"{file} cannot be read: {reason}", hint="it is damaged or incomplete: fetch it again") from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(f"{file} holds no table of tensors", hint="give a model's weights, not a trainer's state")
    return dict(found)
