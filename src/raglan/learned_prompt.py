"""Which prompts a generator learned with, and whether it is asked with one of them.

    recipe    the recipe's prompt: its words are in the generator's manifest under a hash; asked with others it is refused
    several   markers drawn for each row of an instruction mix: all hashes; asked with none of them there is a warning
    own       each row the prompt that its example was written with: there is always a warning

Words are what shapes the text: layout, templates, what stands between passages, shots. Budgets are none, and neither is a chat
template, which lies in the generator's own folder. Rows of Self-RAG's data have the published models' template, in which the
instruction is the task's: they are not compared, and neither is a generator whose manifest says nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from raglan.artifact import MANIFEST, fingerprint
from raglan.errors import RecipeError
from raglan.prompt import Prompt
from raglan.recipe import PromptSettings
from raglan.weights import read_json

__all__ = ["check_prompt", "other_prompt", "prompt_record", "read_record"]

log = logging.getLogger(__name__)
ROWS = {"own": "a prompt of each row's own", "several": "several prompts, drawn for each row,"}


def prompt_record(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """For the manifest of what learned with these; with none, where each row has its own."""
    hashes = [fingerprint(prompt.words) for prompt in prompts]
    if len(prompts) == 1:
        return {"rows": "recipe", "hash": hashes[0], "words": prompts[0].words}
    return {"rows": "several", "hashes": hashes} if prompts else {"rows": "own"}


def read_record(folder: str | Path) -> Mapping[str, Any] | None:
    """What a generator's folder says of its prompts; None where it says nothing, and for hub names."""
    path = Path(folder) / MANIFEST
    told = read_json(path).get("prompt") if path.is_file() else None
    return told if isinstance(told, dict) else None


def check_prompt(learned: Mapping[str, Any] | None, prompt: Prompt, *, model: str) -> None:
    """Compare what a generator learned with to what it is asked with.

    Raises:
        RecipeError: other words; both hashes and the words that differ are told.
    """
    if learned is None:
        return
    mine = fingerprint(prompt.words)
    if mine in (learned.get("hash"), *learned.get("hashes", ())):
        return
    if learned["rows"] != "recipe":
        _warn(model, ROWS[learned["rows"]], mine)
        return
    theirs, own = learned["words"], prompt.words
    others = [name for name in dict.fromkeys((*theirs, *own)) if theirs.get(name) != own.get(name)]
    raise RecipeError(
        f"generator {model!r} learned with the prompt {learned['hash']}, and the recipe's is {mine}",
        hint=f"it learned with {', '.join(f'prompt.{name}: {theirs.get(name)!r}' for name in others)}; "
        "say so, or generator.any_prompt: true to ask it otherwise on purpose",
    )


def other_prompt(folder: str | Path, settings: PromptSettings) -> str:
    """In words, that a generator learned with another prompt than these settings'; empty where it did not."""
    learned = read_record(folder)
    if learned is None or "hash" not in learned:
        return ""
    words = learned["words"] | settings.model_dump(mode="json", include=set(learned["words"]) - {"layout"})
    mine = fingerprint(words)
    return "" if mine == learned["hash"] else f" (the prompt was {learned['hash']} and is {mine})"


@cache
def _warn(model: str, rows: str, mine: str) -> None:
    """Once for a generator and a prompt."""
    log.warning("generator %s learned with %s and is asked with the recipe's prompt, %s", model, rows, mine)
