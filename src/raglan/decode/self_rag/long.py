"""Self-RAG, long form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raglan.decode.base import Asked
from raglan.errors import RecipeError
from raglan.recipe import SelfRagDecode
from raglan.records import Answer, Hit

__all__ = ["long"]


def long(
    generator: Any, asked: Asked, settings: SelfRagDecode, *, retrieve: Callable[[str, int], list[Hit]] | None = None
) -> list[Answer]:
    """One answer a query."""
    raise RecipeError(f"decode.form {settings.form!r} is not there yet", hint="decode.form: short")
