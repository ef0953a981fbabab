"""A model on this machine, behind a server that is there for as long as the calls last.

    vllm    vllm serve MODEL --host … --port … ARGUMENTS
    hf      transformers serve MODEL --host … --port … ARGUMENTS

Both answer as any OpenAI-compatible server does, so that calls are journalled, repaired and asked again as everywhere. The
address is part of a call's key: it is a setting, and not drawn, or what a killed run was answered would be asked again.
"""

from __future__ import annotations

import logging
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from raglan.errors import GeneratorError
from raglan.recipe import ServedSettings

__all__ = ["model_server"]

log = logging.getLogger(__name__)
PROGRAMS = {"vllm": "vllm", "hf": "transformers"}
KEEPER = Path(__file__).with_name("keeper.py")
PAUSE = 0.25  # seconds between looks
TOLD = 2000  # characters of the server's own words, where it fails


@contextmanager
def model_server(settings: ServedSettings, words: Path) -> Iterator[None]:
    """The server, from when it answers until the block is left; it ends too where this process is killed.

    Args:
        words: the file of what the server says.

    Raises:
        GeneratorError: there is no such command, something else answers at the address, or the server ends or does not
            answer in time; with its last words.
    """
    command = _command(settings)
    host, port = _address(settings)
    with socket.socket() as tried:
        if tried.connect_ex((host, port)) == 0:
            raise GeneratorError(
                f"something answers at {settings.base_url} already, where the server of {settings.model} is to listen",
                hint="another port: teacher.base_url; or, where it is that model's server, teacher.kind=endpoint",
            )
    words.parent.mkdir(parents=True, exist_ok=True)
    log.info("starting %s; it tells how it goes in %s", " ".join(command[:3]), words)
    with words.open("wb") as said:
        keeper = subprocess.Popen(  # noqa: S603 - what the recipe names, and only by these two names
            [sys.executable, str(KEEPER), *command], stdin=subprocess.PIPE, stdout=said, stderr=said, start_new_session=True
        )
    assert keeper.stdin is not None
    try:
        _wait(settings, keeper, words)
        yield
    finally:
        keeper.stdin.close()
        keeper.wait()


def _command(settings: ServedSettings) -> list[str]:
    """Raises GeneratorError: there is no such program."""
    name = str(settings.program or PROGRAMS[settings.kind])
    beside = shutil.which(name, path=str(Path(sys.executable).parent)) if settings.program is None else None
    program = beside or shutil.which(name)
    if program is None:
        raise GeneratorError(
            f"there is no command {name!r}, which teacher.kind={settings.kind} needs",
            hint="pip install vllm, or 'transformers[serving]'; or its path in another environment: teacher.program",
        )
    host, port = _address(settings)
    return [program, "serve", settings.model, "--host", host, "--port", str(port), *settings.arguments]


def _address(settings: ServedSettings) -> tuple[str, int]:
    parts = urlsplit(settings.base_url)
    return str(parts.hostname), parts.port or 80


def _wait(settings: ServedSettings, keeper: subprocess.Popen[bytes], words: Path) -> None:
    """Until the server says that it is well."""
    host, port = _address(settings)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    until = time.monotonic() + settings.start_seconds
    while True:
        code = keeper.poll()
        if code is not None:
            raise GeneratorError(f"the server of {settings.model} ended as it began (exit {code}): {_last(words)}")
        try:
            with direct.open(f"http://{host}:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > until:
                raise GeneratorError(
                    f"the server of {settings.model} does not answer after {settings.start_seconds:g} s: {_last(words)}",
                    hint="a large model takes its time: teacher.start_seconds",
                ) from None
        time.sleep(PAUSE)


def _last(words: Path) -> str:
    """The server's own last words, and where the rest is."""
    said = words.read_text(encoding="utf-8", errors="replace").strip()[-TOLD:]
    return f"{said or 'it said nothing'} ({words})"
