"""Which settings of a Self-RAG decoding a sweep tries, and what each comes to.

every combination of the axes that `sweep` names, or `draws` of them
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from pydantic import ValidationError

from raglan.errors import RecipeError
from raglan.recipe import PruneSettings, RequireSettings, SelfRagDecode, SweepSettings
from raglan.recipe.base import Settings
from raglan.recipe.sweep import ONLY_LONG, ONLY_SHORT, TRIED

__all__ = ["NAMES", "WEIGHTS", "Setting", "axes", "settings_of", "widest"]

WEIGHTS = ("seq", "rel", "sup", "use")
NAMES = {"seq_mode": "seq"}  # of the sweep → of decode


@dataclass(frozen=True)
class Setting:
    """A combination and what it comes to; None is as in the recipe's decode.

    Attributes:
        seq, rel, sup, use: weights. `k`: passages. `seq_mode`: what decode calls `seq`.
        quality, rate, generated: quality, retrieval rate, mean ids written a question; NaN until it was measured.
        confirmed: quality of live answers. `incomplete`: questions that need a segment that was never written.
    """

    threshold: float | None
    seq: float | None
    rel: float | None
    sup: float | None
    use: float | None
    k: int
    aggregate: str | None = None
    require: RequireSettings | None = None
    on_empty: str | None = None
    prune: PruneSettings | None = None
    rule: str | None = None
    absent: str | None = None
    seq_mode: str | None = None
    seq_tokens: str | None = None
    all_irrelevant: str | None = None
    abstain_margin: float | None = None
    beam: int | None = None
    max_segments: int | None = None
    combine: str | None = None
    quality: float = math.nan
    rate: float = math.nan
    generated: float = math.nan
    confirmed: float | None = None
    incomplete: int = 0

    def decode(self, settings: SelfRagDecode) -> SelfRagDecode:
        """The decoding that this is; `k` is the retriever's, and δ takes the place of a rate."""
        given = {name: value for name in TRIED if (value := getattr(self, name)) is not None}
        own = {name: given.pop(name) for name in WEIGHTS if name in given}
        changes = {NAMES.get(name, name): value for name, value in given.items() if name != "k"}
        if "threshold" in changes:
            changes["target_rate"] = None
        if own:
            changes["weights"] = settings.weights.model_copy(update=own)
        return settings.model_copy(update=changes)

    def told(self) -> dict[str, Any]:
        """As plain JSON, without what is as in decode and what is not known."""
        unknown = {"quality", "rate", "generated"} if math.isnan(self.quality) else {"incomplete"}
        every = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in unknown}
        return {name: _plain(value) for name, value in every.items() if value is not None}


def settings_of(how: SweepSettings, decode: SelfRagDecode, *, k: int, seed: int) -> list[Setting]:
    """Every combination, or `draws` of them.

    Raises:
        RecipeError: more passages than were written to, or an axis that does not go with `decode`.
    """
    if too_many := [one for one in how.k if one > k]:
        raise RecipeError(
            f"sweep.k holds {too_many[0]}, and candidates were written for {k} passages",
            hint="set retriever.k, and raglan evaluate --cache again",
        )
    if (how.aggregate or how.abstain_margin) and not decode.labels:
        name = "aggregate" if how.aggregate else "abstain_margin"
        raise RecipeError(f"sweep.{name} is for a closed set, and decode.labels is empty", hint="give decode.labels")
    grid = axes(how, decode) | {"k": how.k or (k,)}
    size = math.prod(map(len, grid.values()))
    if how.draws is None or how.draws >= size:
        rows: Sequence[Sequence[Any]] = list(itertools.product(*grid.values()))
    else:
        places = sorted(random.Random(seed).sample(range(size), how.draws))
        each = np.unravel_index(places, [len(values) for values in grid.values()])
        rows = [[values[i] for values, i in zip(grid.values(), row, strict=True)] for row in zip(*each, strict=True)]
    return [Setting(**dict(zip(grid, row, strict=True))) for row in rows]


def axes(how: SweepSettings, decode: SelfRagDecode) -> dict[str, tuple[Any, ...]]:
    """Name → values to try; (None,) is as in decode. In the long form only what the recipe says is tried."""
    said, other = how.model_fields_set, ONLY_LONG if decode.form == "short" else ONLY_SHORT
    if wrong := sorted(name for name in other if getattr(how, name)):
        raise RecipeError(f"sweep has {', '.join(wrong)}, and decode.form is {decode.form}", hint="leave out what it has not")
    grid = {name: getattr(how, name) or (None,) for name in TRIED}
    if decode.form == "long":
        grid |= {name: (None,) for name in TRIED if name not in said}
    for name in ("require", "prune", "combine"):
        for value in grid[name]:
            _check(decode, name, value)
    return _deciding(grid, how, decode)


def _deciding(grid: dict[str, tuple[Any, ...]], how: SweepSettings, decode: SelfRagDecode) -> dict[str, tuple[Any, ...]]:
    """The grid without what decides nothing. Raises RecipeError where that was asked for."""
    if decode.retrieve != "adaptive":
        for name in ("threshold", "rule"):
            if name in how.model_fields_set and grid[name] != (None,):
                raise RecipeError(f"sweep.{name} decides nothing with decode.retrieve {decode.retrieve}", hint="leave it out")
        grid = {**grid, "threshold": (None,)}
    if grid["on_empty"] != (None,) and not (decode.require.any or any(one.any for one in how.require)):
        raise RecipeError("sweep.on_empty decides nothing without a hard constraint", hint="sweep.require or decode.require")
    return grid


def _check(decode: SelfRagDecode, name: str, value: Any) -> None:
    """Raises RecipeError if a value does not go with the rest of decode."""
    if value is None:
        return
    try:
        SelfRagDecode.model_validate(decode.model_copy(update={name: value}).model_dump(exclude_defaults=True))
    except ValidationError as fault:
        raise RecipeError(f"sweep.{name} {_plain(value)}: {fault.errors()[0]['msg']}", hint="see decode") from None


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json", exclude_defaults=True) if isinstance(value, Settings) else value


def widest(decode: SelfRagDecode, how: SweepSettings | None) -> SelfRagDecode:
    """With the widest beam and the most segments that the sweep tries."""
    if how is None or decode.form == "short":
        return decode
    most = {name: max(getattr(how, name), default=0) for name in ("beam", "max_segments")}
    return decode.model_copy(update={name: max(getattr(decode, name), value) for name, value in most.items()})
