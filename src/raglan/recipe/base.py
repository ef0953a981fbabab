"""What all settings have in common."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

__all__ = [
    "Arguments",
    "Settings",
    "Verbatim",
    "number",
]

SECRET = re.compile(
    r"(?i)token|(.*_)?((hub|hf|huggingface|api|auth|access|bearer|refresh|session|secret)_?token|(api|access|secret|private)_?key"
    r"|password|passwd|secret|credentials?)"
)

class Settings(BaseModel):
    """Unknown keys are faults, values do not change after loading; what pydantic says of a fault does not show its value."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


def number(value: Any) -> Any:
    """YAML 1.1 reads 2e-4 as text; here it is a number, as everywhere else."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _numbers(arguments: Any) -> Any:
    return {k: number(v) for k, v in arguments.items()} if isinstance(arguments, dict) else arguments


def _no_secrets(arguments: dict[str, Any]) -> dict[str, Any]:
    """Settings are copied into manifests and reports, so a secret does not even become one."""
    for name in _secrets(arguments):
        raise ValueError(
            f"{name} is a secret, and settings are written into manifests: leave it out, and export it instead "
            "(HF_TOKEN for the Hugging Face hub)"
        )
    return arguments


def _secrets(arguments: Any) -> Iterator[str]:
    if isinstance(arguments, dict):
        for name, value in arguments.items():
            if isinstance(value, str | int | float | list) and not isinstance(value, bool) and SECRET.fullmatch(str(name)):
                yield str(name)
            yield from _secrets(value)
    elif isinstance(arguments, list | tuple):
        for value in arguments:
            yield from _secrets(value)


Verbatim = Annotated[dict[str, Any], AfterValidator(_no_secrets)]
Arguments = Annotated[dict[str, Any], BeforeValidator(_numbers), AfterValidator(_no_secrets)]
