"""The word lists of `words.yaml`, which lies beside this module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

__all__ = ["WORDS"]

WORDS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))
