"""Self-RAG (Asai et al. 2023): the generator's own probabilities of its reflection tokens decide and rank.

`short`: one answer a passage, the best or the best label. `long`: a tree of segments. Both read the same settings, call the
same arithmetic (`reflection`), and answer with the same record, `trace` included.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from raglan.decode.base import Asked
from raglan.decode.self_rag.long import long
from raglan.decode.self_rag.short import short
from raglan.recipe import SelfRagDecode
from raglan.records import Answer, Hit

__all__ = ["Retrieve", "self_rag"]

log = logging.getLogger(__name__)
Retrieve = Callable[[str, int], list[Hit]]


def self_rag(generator: Any, asked: Asked, settings: SelfRagDecode, *, retrieve: Retrieve | None = None) -> list[Answer]:
    """One answer a query, from its hits, and in the long form from what `retrieve(query, asked.k)` finds further.

    Args:
        generator: a `MarkedGenerator`: its vocabulary holds the reflection tokens.
    """
    for name in settings.released:
        log.warning("decode.released: %s repeats a fault of the authors' code; for parity runs only", name)
    if settings.form == "long":
        return long(generator, asked, settings, retrieve=retrieve)
    return short(generator, asked, settings)
