"""What all settings have in common."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

__all__ = [
    "Arguments",
    "Settings",
    "number",
]


class Settings(BaseModel):
    """Unknown keys are faults, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def number(value: Any) -> Any:
    """YAML 1.1 reads 2e-4 as text; here it is a number, as everywhere else."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _numbers(arguments: Any) -> Any:
    return {k: number(v) for k, v in arguments.items()} if isinstance(arguments, dict) else arguments


Arguments = Annotated[dict[str, Any], BeforeValidator(_numbers)]
