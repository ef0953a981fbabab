"""transformers' own talk, switched off while raglan calls it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

__all__ = ["quietly", "without_bars"]


@contextmanager
def without_bars() -> Iterator[None]:
    """No bars for loading and saving: the library shows progress on terminals only, and its own."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def quietly() -> Iterator[None]:
    """No bars, loading reports and generation hints either; the ones that matter are raised as errors by the caller."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with without_bars():
            yield
    finally:
        transformers_logging.set_verbosity(level)
