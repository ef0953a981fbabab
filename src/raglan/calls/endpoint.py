r"""One request on the wire: by aiohttp where that is installed, else by the `openai` client; no retries, no redirects.

A call is one POST of JSON, and its reply is taken as text and read here. The `openai` client makes address, headers and typed
options anew for each call, which takes four times as long as all that aiohttp does, so it is asked only where aiohttp is not
there, or where the environment names a proxy. Both tell the same of the same fault. Every attempt is the engine's to count and
to pay: neither tries anything twice. `Idempotency-Key` names the call and how many of its tries the server has settled, so that
a request sent again because nobody knows what became of it is known again. The key is read from the named environment variable
and cut out of whatever the server says, however that spells it (`\\/`, `\\u002b`, `%2B`).
"""

from __future__ import annotations

import asyncio
import codecs
import importlib.util
import json
import os
import re
import ssl
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from raglan import __version__
from raglan.calls.classify import Wire
from raglan.errors import GeneratorError, require
from raglan.recipe import EndpointSettings, ServedSettings

__all__ = ["Endpoint", "open_endpoint", "read_key"]

NOT_SENT = {"ConnectError", "ClientConnectorError", "UnsupportedProtocol", "PoolTimeout"}
KEPT_SECONDS = 4.0  # of an idle connection: many servers close theirs after 5, and the request that meets that is lost


class Endpoint(ABC):
    """A client for one endpoint, to be used and closed in one event loop."""

    def __init__(self, settings: EndpointSettings, key: str | None):
        self.settings = settings
        self._key = None if key is None else _spellings(key)

    async def send(self, body: Mapping[str, Any], idem: str) -> Wire:
        """Ask once; whatever happens is told, not raised."""
        try:
            async with asyncio.timeout(self.settings.timeout):
                wire = await self._asked(body, idem)
        except TimeoutError as fault:
            return Wire(fault=f"no answer within {self.settings.timeout:g} s", lost=not _never_sent(fault))
        return wire if self._key is None else _without(wire, self._key)

    @abstractmethod
    async def _asked(self, body: Mapping[str, Any], idem: str) -> Wire:
        """What came back, the key still in it where the server repeats it. Raises: TimeoutError."""

    @abstractmethod
    async def close(self) -> None:
        """Let the connections go."""


class Aiohttp(Endpoint):
    """As many connections as requests, and nothing kept between them: no cookie, no header."""

    def __init__(self, settings: EndpointSettings, key: str | None):
        super().__init__(settings, key)
        self._aiohttp = aiohttp = require("aiohttp", "to call an endpoint")
        self._url = f"{settings.base_url}/chat/completions"
        headers = {"Content-Type": "application/json", "User-Agent": f"raglan/{__version__}"}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_SECONDS, ssl=_trusted(settings.base_url)),
            headers=headers | ({"Authorization": f"Bearer {key}"} if key else {}),
            timeout=aiohttp.ClientTimeout(), cookie_jar=aiohttp.DummyCookieJar(),
        )  # fmt: skip

    async def close(self) -> None:
        await self._session.close()

    async def _asked(self, body: Mapping[str, Any], idem: str) -> Wire:
        content, headers = json.dumps(body).encode(), {"Idempotency-Key": idem}
        try:
            async with self._session.post(self._url, data=content, headers=headers, allow_redirects=False) as reply:
                return _came(reply.status, await reply.read(), reply.charset, reply.headers)
        except self._aiohttp.ClientError as fault:
            return _broken(fault, fault)


class OpenAI(Endpoint):
    """The `openai` client with its default transport."""

    def __init__(self, settings: EndpointSettings, key: str | None):
        super().__init__(settings, key)
        self._openai = openai = require("openai", "to call an endpoint")
        self._whole = require("httpx", "to call an endpoint").Response
        self._client = openai.AsyncOpenAI(
            base_url=settings.base_url, api_key=key or "none", max_retries=0, timeout=settings.timeout,
            http_client=openai.DefaultAsyncHttpxClient(
                follow_redirects=False, timeout=settings.timeout, trust_env=not isinstance(settings, ServedSettings)
            ),
        )  # fmt: skip

    async def close(self) -> None:
        await self._client.close()

    async def _asked(self, body: Mapping[str, Any], idem: str) -> Wire:
        openai, options = self._openai, {"headers": {"Idempotency-Key": idem}}
        try:
            reply = await self._client.post("/chat/completions", body=body, cast_to=self._whole, options=options)
        except openai.APIStatusError as fault:
            reply = fault.response
        except openai.APITimeoutError as fault:
            if _never_sent(fault):  # some transports call a refused connection a timeout
                return _broken(fault, fault.__cause__ or fault)
            raise TimeoutError from fault
        except openai.APIConnectionError as fault:
            return _broken(fault, fault.__cause__ or fault)
        return _came(reply.status_code, reply.content, reply.charset_encoding, reply.headers)


def open_endpoint(settings: EndpointSettings, key: str | None) -> Endpoint:
    """The cheapest client that can reach an endpoint; to be opened in the event loop that uses it."""
    here = isinstance(settings, ServedSettings)  # which no proxy reaches
    direct = importlib.util.find_spec("aiohttp") is not None and (here or not _proxied(settings.base_url))
    return (Aiohttp if direct else OpenAI)(settings, key)


def read_key(variable: str | None) -> str | None:
    """The key that an environment variable holds.

    Raises:
        GeneratorError: it holds none, or what no header can carry: clients repeat such a header in their errors.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()  # files that keys are read from end in a newline
    if not key:
        raise GeneratorError(f"the environment variable {variable} holds no key", hint=f"export {variable}=…")
    if not (key.isascii() and key.isprintable()):
        raise GeneratorError(
            f"the environment variable {variable} holds more than a key", hint="letters, digits and signs of ASCII"
        )
    return key


def _proxied(url: str) -> bool:
    """Whether the environment wants a proxy between."""
    parts, proxies = urlsplit(url), getproxies()
    return (parts.scheme in proxies or "all" in proxies) and not proxy_bypass(parts.hostname or "")


def _trusted(url: str) -> ssl.SSLContext | bool:
    """Whom to trust: those that SSL_CERT_FILE names, else the system's roots and, where it is installed, certifi's."""
    if not url.startswith("https"):
        return True
    context = ssl.create_default_context()
    if "SSL_CERT_FILE" not in os.environ and importlib.util.find_spec("certifi"):  # some Pythons know none of the system's
        context.load_verify_locations(require("certifi", "to know whom to trust").where())
    return context


def _broken(fault: BaseException, told: BaseException) -> Wire:
    return Wire(fault=f"connection: {str(told) or type(told).__name__}", lost=not _never_sent(fault))


def _came(status: int, body: bytes, charset: str | None, headers: Mapping[str, str]) -> Wire:
    """A reply as text: JSON is UTF-8 whatever is declared; what is not UTF-8 is what is declared."""
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = body.decode(_known(charset), errors="replace")
    return Wire(status, text, {} if status == 200 else {name.lower(): value for name, value in headers.items()})


def _known(charset: str | None) -> str:
    try:
        return codecs.lookup(charset or "utf-8").name
    except LookupError:
        return "utf-8"


def _without(wire: Wire, key: re.Pattern[str]) -> Wire:
    """Without the key: servers like to repeat it."""
    if not key.search(wire.body) and not key.search(wire.fault):
        return wire
    return replace(wire, body=key.sub("…", wire.body), fault=key.sub("…", wire.fault))


def _spellings(key: str) -> re.Pattern[str]:
    """The key as it is, as JSON, even JSON within JSON, may write it, and as an address does."""
    signs = (rf"(?:\\*{re.escape(sign)}|\\+u00{ord(sign):02x}|%{ord(sign):02x})" for sign in key)
    return re.compile("".join(signs), re.IGNORECASE)


def _never_sent(fault: BaseException | None) -> bool:
    """Whether no byte of the request can have reached the server."""
    while fault is not None:
        if NOT_SENT & {kind.__name__ for kind in type(fault).__mro__}:
            return True
        fault = fault.__cause__ or fault.__context__
    return False
