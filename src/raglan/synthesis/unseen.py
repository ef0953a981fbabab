"""Which values of topic and task are reserved: no training example has them, and those that are measured have nothing else new.

    named     a task; a topic by its path, with all that is below it
    a number  so many tasks, or first levels of topics, by a hash of the seed: a longer list of values moves none that was drawn
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from raglan.errors import RecipeError
from raglan.recipe import ReserveSettings
from raglan.synthesis.factors import Factor, Factors

__all__ = ["parted", "reserved_values"]

RESERVABLE = ("task", "topic")


def reserved_values(settings: ReserveSettings | None, factors: Factors, seed: int) -> dict[str, tuple[str, ...]]:
    """Factor → its reserved values, of those that have a weight; factors without any are not there.

    Raises:
        RecipeError: a value that the plan would not have had, or none that is left.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name in RESERVABLE if settings is not None else ():
        there = [value.name for value in factors[name].values if value.weight]
        asked = getattr(settings, name)
        chosen = _drawn(name, there, asked, seed) if isinstance(asked, int) else asked
        if own := tuple(value for value in there if any(_is_of(value, one) for one in chosen)):
            found[name] = own
        if strange := next((one for one in chosen if not any(_is_of(value, one) for value in there)), None):
            raise RecipeError(
                f"synthesis.reserve.{name} names {strange!r}, which the plan would not have had",
                hint=f"it would have had {', '.join(_heads(there)[:30])}",
            )
        if len(own) == len(there):
            raise RecipeError(f"synthesis.reserve leaves no {name} to be planned", hint="reserve fewer")
    return found


def parted(factors: Factors, reserved: Mapping[str, Sequence[str]], part: str) -> Factors:
    """Without what is reserved; of the factor `part` with nothing else."""
    for name, values in reserved.items():
        own = tuple(value for value in factors[name].values if (value.name in values) == (name == part))
        factors = factors.having(Factor(name, own))
    return factors


def _is_of(value: str, path: str) -> bool:
    return value == path or value.startswith(f"{path}/")


def _heads(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(value.partition("/")[0] for value in values))


def _drawn(name: str, values: Sequence[str], count: int, seed: int) -> list[str]:
    def place(value: str) -> bytes:
        return hashlib.sha256(f"{seed}:reserve:{name}:{value}".encode()).digest()

    return sorted(_heads(values), key=place)[:count]
