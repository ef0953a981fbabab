"""Self-RAG, short form."""

from __future__ import annotations

from typing import Any

from raglan.decode.base import Asked
from raglan.recipe import SelfRagDecode
from raglan.records import Answer

__all__ = ["short"]


def short(generator: Any, asked: Asked, settings: SelfRagDecode) -> list[Answer]:
    """One answer a query."""
    raise NotImplementedError
