"""What calls cost, in whole nano-dollars (10⁻⁹ $), and the cap that they never exceed.

    cost    = ⌈(prompt − cached)·input + cached·cached_price + output·output_price⌉
    reserve = ⌈prompt bound · input + max_tokens · output_price⌉
    sent if   spent + Σ reserves in flight + reserve ≤ cap

The prompt bound is the number of tokens where the tokenizer is known, else of UTF-8 bytes (no token is shorter than a byte), 16
more for each message and 256 for hidden templates. The ledger is counted from the journal's lines, never kept apart from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from raglan.calls.asks import Usage, canonical
from raglan.errors import RecipeError
from raglan.recipe import MoneySettings

if TYPE_CHECKING:
    from raglan.calls.journal import Intent

__all__ = ["Entry", "Ledger", "Price", "cap_of", "dollars", "lacks_cap", "prompt_bound"]

PER_MESSAGE, HIDDEN = 16, 256


@dataclass(frozen=True)
class Price:
    """Pico-dollars (10⁻¹² $) a token: a millionth of the dollars per million tokens, and whole."""

    input: int
    cached: int
    output: int

    @classmethod
    def of(cls, money: MoneySettings) -> Price:
        """
        Raises:
            RecipeError: the price is not known.
        """
        if money.price is None:
            raise RecipeError("money.price is not said, and a call of unknown price is not sent", hint="or `price: free`")
        if money.price == "free":
            return cls(0, 0, 0)
        said = money.price
        cached = said.input if said.cached is None else said.cached
        return cls(*(int(value * 10**6) for value in (said.input, cached, said.output)))

    def cost(self, usage: Usage) -> int:
        """Nano-dollars, rounded up."""
        pico = (usage.prompt - usage.cached) * self.input + usage.cached * self.cached + usage.output * self.output
        return -(-pico // 1000)


def cap_of(money: MoneySettings) -> int | None:
    """The cap in nano-dollars, rounded down."""
    return None if money.cap_usd is None else int(money.cap_usd * 10**9)


def lacks_cap(money: MoneySettings, prices: Sequence[object] | None = None) -> bool:
    """Whether calls cost money, and nothing says how much they may. `prices`: of all servers, where these have their own."""
    asked = [money.price] if prices is None else prices
    return money.cap_usd is None and any(price not in (None, "free") for price in asked)


def dollars(nano: int) -> str:
    """As in "$0.010500"."""
    return f"${Decimal(nano) / 10**9:.6f}"


def prompt_bound(messages: Sequence[Mapping[str, Any]], schema: str = "", *, count: Callable[[str], int] | None = None) -> int:
    """Tokens that a prompt has at most."""
    length = count or (lambda text: len(text.encode()))
    return length(canonical(messages).decode()) + length(schema) + PER_MESSAGE * len(messages) + HIDDEN


@dataclass
class Entry:
    """A row of the ledger: requests of one step and model that ended one way."""

    step: str
    model: str
    cls: str
    calls: int = 0
    usage: Usage = field(default_factory=Usage)
    nano: int = 0


class Ledger:
    """Money by step × model × outcome, from intents and outcomes as the journal has them.

    `spent` is what ended, with those in doubt at their reserve; `flying` what is reserved for requests under way; `misreported`
    how many replies named a usage that is none, and count at their reserve.
    """

    def __init__(self) -> None:
        self.spent = self.flying = self.misreported = 0
        self._open: dict[tuple[str, int], Intent] = {}
        self._rows: dict[tuple[str, str, str], Entry] = {}

    @property
    def in_flight(self) -> int:
        return len(self._open)

    @property
    def doubts(self) -> Entry:
        """All requests without an outcome, whose process died."""
        found = [row for row in self._rows.values() if row.cls == "in_doubt"]
        return Entry("", "", "in_doubt", sum(row.calls for row in found), Usage(), sum(row.nano for row in found))

    def fits(self, reserve: int, cap: int | None) -> bool:
        return cap is None or self.spent + self.flying + reserve <= cap

    def intend(self, intent: Intent) -> None:
        self._open[intent.key, intent.attempt] = intent
        self.flying += intent.reserve

    def settle(self, outcome: Mapping[str, Any]) -> None:
        intent = self._open.pop((outcome["key"], outcome["attempt"]))
        self.flying -= intent.reserve
        self.misreported += "misreported" in outcome
        self._count(intent, outcome["class"], Usage(*outcome["usage"]), outcome["cost"])

    def close_doubts(self) -> None:
        """What is under way will not return: its process is gone. Charged at the reserve."""
        for intent in self._open.values():
            self.flying -= intent.reserve
            self._count(intent, "in_doubt", Usage(), intent.reserve)
        self._open.clear()

    def rows(self) -> list[Entry]:
        """By step, model and outcome."""
        return [self._rows[name] for name in sorted(self._rows)]

    def _count(self, intent: Intent, cls: str, usage: Usage, nano: int) -> None:
        row = self._rows.setdefault((intent.step, intent.model, cls), Entry(intent.step, intent.model, cls))
        row.calls, row.usage, row.nano = row.calls + 1, row.usage + usage, row.nano + nano
        self.spent += nano
