"""On what terms an endpoint is asked: its settings, price and cap, the journal, and what follows from these for one ask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel

from raglan.calls.asks import Ask, Outcome, Usage, call_key
from raglan.calls.journal import Journal
from raglan.calls.limits import Clock
from raglan.calls.money import Price, cap_of, prompt_bound
from raglan.calls.structured import longest_form, parse
from raglan.errors import GeneratorError, require
from raglan.recipe import EndpointSettings, MoneySettings

__all__ = ["Terms", "host_of", "value_of"]


class Terms:
    """One endpoint, one journal."""

    def __init__(self, settings: EndpointSettings, folder: Path | Journal, *, money: MoneySettings, clock: Clock | None = None):
        """As `CallEngine`."""
        self.settings, self.clock = settings, clock or Clock()
        self.price, self.cap = Price.of(money), cap_of(money)
        self._count = _counter(settings.tokenizer)
        self.host = host_of(settings)
        self._owned = not isinstance(folder, Journal)
        self.journal = folder if isinstance(folder, Journal) else Journal(folder)

    def key(self, ask: Ask) -> str:
        """The name by which the journal knows a call."""
        return call_key(ask, host=self.host, model=self.settings.model, max_tokens=self.settings.max_tokens)

    def known(self, ask: Ask) -> Outcome | None:
        """What the journal holds for an ask, without a request."""
        return self.known_as(ask, self.key(ask))

    def known_as(self, ask: Ask, key: str) -> Outcome | None:
        """The same, for whom the key is at hand."""
        found = self.journal.answer(key)
        if found is None:
            return None
        value, errors = value_of(ask, found["body"])
        if errors:  # it was ok by a schema of the same content, so only a validator in Python can have changed
            return None
        return Outcome(ask, "ok", value, found["body"], reused=True)

    def reserve(self, ask: Ask) -> tuple[int, int]:
        """Tokens and nano-dollars that a request of this ask takes at most."""
        schema = "" if ask.schema is None else longest_form(ask.schema)
        bound = prompt_bound(ask.messages, schema, count=self._count)
        limit = self.limit(ask)
        return bound + limit, self.price.cost(Usage(bound, 0, limit))

    def limit(self, ask: Ask) -> int:
        return int(ask.sampling.get("max_tokens", self.settings.max_tokens))


def value_of(ask: Ask, text: str) -> tuple[BaseModel | str | None, str]:
    """A whole reply's value, or what is wrong with it."""
    return (text, "") if ask.schema is None else parse(text, ask.schema)


def _counter(tokenizer: str | None) -> Callable[[str], int] | None:
    """How many tokens a text has, where the model's tokenizer is at hand."""
    if tokenizer is None:
        return None
    transformers = require("transformers", "to count tokens")
    try:
        loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as fault:
        raise GeneratorError(
            f"tokenizer {tokenizer!r} cannot be loaded: {str(fault).splitlines()[0]}", hint="leave it out to reckon by bytes"
        ) from None
    return lambda text: len(loaded(text, add_special_tokens=False)["input_ids"])


def host_of(settings: EndpointSettings) -> str:
    """The server's part of a call's key: who is asked."""
    parts = urlsplit(settings.base_url)
    return parts.netloc + parts.path
