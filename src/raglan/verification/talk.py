"""Whether a question speaks of passages that its asker would not know of. The patterns are data, talk.yaml."""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import yaml

__all__ = ["passage_talk"]


def passage_talk(query: str) -> str:
    """The words in which it does; empty if it does not."""
    signs, patterns = _told()
    asked = " ".join(unicodedata.normalize("NFKC", query).lower().translate(signs).split())
    return next((found.group().strip() for pattern in patterns if (found := pattern.search(asked))), "")


@cache
def _told() -> tuple[dict[int, str], tuple[re.Pattern[str], ...]]:
    """(character → simplified, the patterns)."""
    told: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("talk.yaml").read_text(encoding="utf-8"))

    def filled(pattern: str) -> str:
        for name, part in told["parts"].items():
            pattern = pattern.replace(f"{{{name}}}", part)
        return pattern

    return str.maketrans(told["simplified"]), tuple(re.compile(filled(pattern)) for pattern in told["patterns"])
