"""One request over the `openai` client: no retries of its own, no redirects, its aiohttp transport where that is installed.

Every attempt is the engine's to count and to pay, so `max_retries` is 0. The reply is taken as text and read here: the client's
typed objects cost time and are not used. `Idempotency-Key` names the call and how many of its tries the server has settled, so
that a request sent again because nobody knows what became of it is known again. The key is read from the named environment
variable and cut out of whatever the server says.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from raglan.calls.classify import Wire
from raglan.errors import GeneratorError, require
from raglan.recipe import EndpointSettings

__all__ = ["Endpoint", "read_key"]

NOT_SENT = ("ConnectError", "ClientConnectorError", "ClientConnectorDNSError", "UnsupportedProtocol", "PoolTimeout")


class Endpoint:
    """A client for one endpoint, to be used and closed in one event loop."""

    def __init__(self, settings: EndpointSettings, key: str | None):
        self.openai = require("openai", "to call an endpoint")
        self.settings, self._key = settings, key
        self.client = self.openai.AsyncOpenAI(
            base_url=settings.base_url, api_key=key or "none", max_retries=0, timeout=settings.timeout,
            http_client=_transport(self.openai, settings),
        )  # fmt: skip

    async def close(self) -> None:
        await self.client.close()

    async def send(self, body: Mapping[str, Any], idem: str) -> Wire:
        """Ask once; whatever happens is told, not raised."""
        openai = self.openai
        try:
            async with asyncio.timeout(self.settings.timeout):
                text = await self.client.post(
                    "/chat/completions", body=body, cast_to=str, options={"headers": {"Idempotency-Key": idem}}
                )
            return Wire(200, self._clean(text))
        except openai.APIStatusError as fault:
            return Wire(fault.status_code, self._clean(fault.response.text), dict(fault.response.headers))
        except (TimeoutError, openai.APITimeoutError) as fault:
            if _never_sent(fault):  # some transports call a refused connection a timeout
                return Wire(fault=self._clean(f"connection: {fault.__cause__ or fault}"))
            return Wire(fault=f"no answer within {self.settings.timeout:g} s", lost=True)
        except openai.APIConnectionError as fault:
            return Wire(fault=self._clean(f"connection: {fault.__cause__ or fault}"), lost=not _never_sent(fault))

    def _clean(self, text: str) -> str:
        """Without the key: servers like to repeat it."""
        return text.replace(self._key, "…") if self._key else text


def read_key(variable: str | None) -> str | None:
    """The key that an environment variable holds.

    Raises:
        GeneratorError: it holds none.
    """
    if variable is not None and not os.environ.get(variable):
        raise GeneratorError(f"the environment variable {variable} holds no key", hint=f"export {variable}=…")
    return os.environ.get(variable) if variable else None


def _transport(openai: Any, settings: EndpointSettings) -> Any:
    """As many connections as requests; aiohttp's take two thirds of the time of the default ones."""
    options: dict[str, Any] = {"follow_redirects": False, "timeout": settings.timeout}
    if importlib.util.find_spec("aiohttp") and hasattr(openai, "DefaultAioHttpClient"):
        try:
            return openai.DefaultAioHttpClient(**options)
        except RuntimeError:  # older clients want a further package beside aiohttp
            pass
    return openai.DefaultAsyncHttpxClient(**options)


def _never_sent(fault: BaseException | None) -> bool:
    """Whether no byte of the request can have reached the server."""
    while fault is not None:
        if type(fault).__name__ in NOT_SENT:
            return True
        fault = fault.__cause__ or fault.__context__
    return False
