"""Largest remainders: how many of N each value gets, exactly.

    quota_i = N · w_i / Σw        floors first; what is left goes to the largest remainders, ties to the earlier value.

All in fractions. Floats break ties by their own noise: of 12 by .15, .05, .80 the quotas are 1.8, .6 and 9.6, a tie that the
earlier value wins (2 1 9), and floats give 2 0 10. `round` does not even keep the sum. A weight that is a float means the
decimal that it is written as: 0.15 is 3/20.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from raglan.errors import RecipeError

__all__ = ["Weight", "exact", "quotas"]

Weight = int | float | str | Fraction


def exact(weight: Weight) -> Fraction:
    """A weight as the fraction that its decimal says.

    Raises:
        RecipeError: it is negative or no finite number.
    """
    try:
        value = Fraction(repr(weight) if isinstance(weight, float) else weight)
    except (ValueError, ZeroDivisionError):
        raise RecipeError(f"weight {weight!r} is no finite number", hint="give a number of at least 0") from None
    if value < 0:
        raise RecipeError(f"weight {weight!r} is negative", hint="give a number of at least 0")
    return value


def quotas(n: int, weights: Sequence[Weight]) -> list[int]:
    """Share `n` by weights, with largest remainders; the sum is `n`.

    Raises:
        RecipeError: no weight is above 0 and there is something to share.
    """
    shares = [exact(weight) for weight in weights]
    total = sum(shares, Fraction(0))
    if total == 0:
        if n == 0:
            return [0] * len(shares)
        raise RecipeError(f"{n} cannot be shared: all {len(shares)} weights are 0", hint="give some value a weight above 0")
    wanted = [n * share / total for share in shares]
    dealt = [int(quota) for quota in wanted]
    by_remainder = sorted(range(len(wanted)), key=lambda place: (dealt[place] - wanted[place], place))
    for place in by_remainder[: n - sum(dealt)]:
        dealt[place] += 1
    return dealt
