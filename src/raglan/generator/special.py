"""What begins, ends and pads a causal model's rows: the recipe's, else the tokenizer's own; each has to be a word of the model.

Published adapters name bos 1, eos 2 and pad = eos. Padding by the end token is no harm here: what is masked is told by lengths,
never by ids, so the end of an answer stays a label.
"""

from __future__ import annotations

from typing import Any

from raglan.errors import CheckpointError
from raglan.recipe import GeneratorSettings

__all__ = ["name_tokens"]


def name_tokens(model: Any, tokenizer: Any, settings: GeneratorSettings) -> None:
    """Give tokenizer and configuration the tokens that the recipe names; those it does not name are left, and checked.

    Raises:
        CheckpointError: a token that is no word of the model, or a row that the tokenizer would begin with another.
    """
    rows = len(model.get_input_embeddings().weight)
    for role in ("bos", "eos", "pad"):
        wanted = settings.tokens.get(role)  # type: ignore[call-overload]
        if wanted is None:
            _check(getattr(tokenizer, f"{role}_token_id"), rows, role, settings.model)
            continue
        token = _spelt(tokenizer, wanted, rows, role, settings.model)
        setattr(tokenizer, f"{role}_token", token)
        for config in (model.config, model.generation_config):
            setattr(config, f"{role}_token_id", getattr(tokenizer, f"{role}_token_id"))
    if "bos" in settings.tokens:
        _begin(tokenizer, settings.model)


def _spelt(tokenizer: Any, wanted: int | str, rows: int, role: str, model: str) -> str:
    words = tokenizer.get_vocab()
    place = wanted if isinstance(wanted, int) else words.get(wanted)
    token = next((word for word, own in words.items() if own == place), None)
    if token is None or place is None or not 0 <= place < rows:
        raise CheckpointError(
            f"generator.tokens.{role} is {wanted!r}, which is no token of {model!r}; it has {rows} words",
            hint="give an id or a spelling of its vocabulary",
        )
    return token


def _check(place: int | None, rows: int, role: str, model: str) -> None:
    if place is not None and not 0 <= place < rows:
        raise CheckpointError(
            f"the tokenizer of {model!r} has {role} at {place}, and the model {rows} words",
            hint=f"name generator.tokens.{role}",
        )


def _begin(tokenizer: Any, model: str) -> None:
    """Rows begin with the named token."""
    if _first(tokenizer) != tokenizer.bos_token_id and hasattr(tokenizer, "add_bos_token"):
        tokenizer.add_bos_token = True
    if (first := _first(tokenizer)) != tokenizer.bos_token_id:
        raise CheckpointError(
            f"generator.tokens.bos is {tokenizer.bos_token!r}, and the tokenizer of {model!r} begins rows with "
            f"{tokenizer.convert_ids_to_tokens(first)!r}",
            hint="leave generator.tokens.bos out, or mend the tokenizer",
        )


def _first(tokenizer: Any) -> int:
    return int(tokenizer("x", verbose=False)["input_ids"][0])
