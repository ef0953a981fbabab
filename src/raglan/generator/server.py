"""What all who ask a server of OpenAI's protocol have in common: its client, its key, and its faults in our words.

Repeated failures are the `openai` client's affair: it waits longer each time, or as long as Retry-After says, and gives up
after `retries`. The key comes from a named variable and is in no message.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from raglan.calls.asks import Usage
from raglan.calls.classify import usage_of
from raglan.errors import CheckpointError, GeneratorError, require
from raglan.quiet import quietly
from raglan.recipe import GeneratorSettings, ScorerSettings
from raglan.vocabulary import open_tokenizer

__all__ = ["Server", "local_tokenizer"]

R = TypeVar("R")
T = TypeVar("T")
First = Callable[[Any], Awaitable[None]]


class Server:
    """One server and one model on it.

    Args:
        field: the recipe's part that names it, for hints. `purpose`: what it is asked for, as in "to score on an endpoint".
        kept: what a hint says of the work that was done before a fault.

    Attributes:
        billed: tokens of all replies so far, as the server counts them. untold: how many replies came without a count.

    Raises:
        GeneratorError: `api_key_env` names a variable that is not set.
    """

    def __init__(self, settings: ScorerSettings | GeneratorSettings, *, field: str, purpose: str, kept: str = ""):
        self.settings, self.field, self.purpose, self.kept = settings, field, purpose, kept
        self._key = _key(settings.api_key_env)
        self.billed, self.untold = Usage(), 0

    @property
    def name(self) -> str:
        return f"{self.settings.endpoint} (model {self.settings.model!r})"

    def count(self, answer: Any) -> None:
        """Take in a reply's `usage`."""
        found, _ = usage_of(answer.usage.model_dump() if answer.usage is not None else None)
        self.untold += found is None
        self.billed += found or Usage()

    def together(self, one: Callable[[Any, T], Awaitable[R]], items: Sequence[T], *, first: First | None = None) -> list[R]:
        """What `one(client, item)` gives for each item, in order; `concurrency` of them run at a time, and `first` before all.

        Raises:
            GeneratorError: a server that cannot be reached, refuses the key, or has no such model.
        """
        with ThreadPoolExecutor(1) as apart:  # notebooks have a loop of their own running in this thread
            return apart.submit(asyncio.run, self._all(one, items, first)).result()

    async def _all(self, one: Callable[[Any, T], Awaitable[R]], items: Sequence[T], first: First | None) -> list[R]:
        openai = require("openai", self.purpose)
        places = asyncio.Semaphore(self.settings.concurrency)

        async def placed(client: Any, item: T) -> R:
            async with places:
                return await one(client, item)

        try:
            async with openai.AsyncOpenAI(
                base_url=self.settings.endpoint, api_key=self._key or "none", max_retries=self.settings.retries,
                timeout=self.settings.timeout,
            ) as client:  # fmt: skip
                if first is not None:
                    await first(client)
                return await _gathered([placed(client, item) for item in items])
        except openai.OpenAIError as fault:
            raise self._told(openai, fault) from None

    def without_key(self, fault: Exception) -> str:
        """What a fault says; servers like to repeat the key."""
        return str(fault).replace(self._key, "…") if self._key else str(fault)

    def _told(self, openai: Any, fault: Exception) -> GeneratorError:
        """The client's fault as ours."""
        said, field = self.without_key(fault), self.field
        if isinstance(fault, openai.AuthenticationError | openai.PermissionDeniedError):
            named = self.settings.api_key_env
            hint = f"check the key in {named}" if named else f"{field}.api_key_env names the variable that holds the key"
            return GeneratorError(f"{self.name} refuses the key: {said}", hint=hint)
        if isinstance(fault, openai.NotFoundError):
            return GeneratorError(
                f"{self.name} has no such model or path: {said}",
                hint=f"{field}.endpoint ends in /v1, and {field}.model is the name that is served",
            )
        if isinstance(fault, openai.BadRequestError | openai.UnprocessableEntityError):
            return GeneratorError(f"{self.name} refuses a prompt: {said}", hint="lower prompt.max_tokens if it is too long")
        return GeneratorError(
            f"{self.name} still fails after {self.settings.retries} more tries: {said}",
            hint=f"{self.kept}run the same command again when the server is there, or lower {field}.concurrency",
        )


async def _gathered(tasks: Sequence[Awaitable[R]]) -> list[R]:
    """All results in order; the first fault calls off the rest."""
    running = [asyncio.ensure_future(task) for task in tasks]
    try:
        return list(await asyncio.gather(*running))
    finally:
        for task in running:
            task.cancel()


def local_tokenizer(name: str, *, field: str) -> Any:
    """The served model's tokenizer. Raises CheckpointError."""
    try:
        with quietly():
            return open_tokenizer(name)
    except (OSError, ImportError, ValueError, KeyError, TypeError) as fault:
        raise CheckpointError(
            f"tokenizer {name!r} cannot be loaded: {str(fault).strip().splitlines()[0]}",
            hint=f"{field}.tokenizer is the served model's: a folder, or a hub name and a network",
        ) from None


def _key(variable: str | None) -> str | None:
    if variable is not None and not os.environ.get(variable):
        raise GeneratorError(f"the environment variable {variable} holds no key", hint=f"export {variable}=…")
    return os.environ.get(variable) if variable else None
