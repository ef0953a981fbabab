"""Decodings, a table of kinds: how hits become an answer."""

from collections.abc import Callable

from raglan.decode.base import Asked
from raglan.decode.classify import classify, first_tokens
from raglan.decode.concat import concat
from raglan.decode.ensemble import ensemble, ensembles, normalised
from raglan.decode.rag_sequence import rag_sequence
from raglan.decode.rag_token import rag_token
from raglan.decode.rag_turn import rag_turn
from raglan.decode.self_rag import self_rag, tree_lines
from raglan.records import Answer

KINDS: dict[str, Callable[..., list[Answer]]] = {
    "classify": classify,
    "concat": concat,
    "ensemble": ensemble,
    "rag_sequence": rag_sequence,
    "rag_token": rag_token,
    "self_rag": self_rag,
}
CHOOSES = {"concat", "ensemble", "self_rag"}  # one of a question's choices, where it has any
NEEDS_PRIOR = {"classify", "ensemble", "rag_sequence", "rag_token"}

__all__ = [
    "CHOOSES",
    "KINDS",
    "NEEDS_PRIOR",
    "Asked",
    "classify",
    "concat",
    "ensemble",
    "ensembles",
    "first_tokens",
    "normalised",
    "rag_sequence",
    "rag_token",
    "rag_turn",
    "self_rag",
    "tree_lines",
]
