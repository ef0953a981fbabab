"""Decodings, a table of kinds: how hits become an answer."""

from raglan.decode.concat import concat

KINDS = {"concat": concat}

__all__ = ["KINDS", "concat"]
