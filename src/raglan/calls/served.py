"""A model on this machine, behind a server that is there for as long as the calls last.

    vllm    vllm serve MODEL --host … --port … ARGUMENTS
    hf      transformers serve MODEL --host … --port … ARGUMENTS

Both answer as any OpenAI-compatible server does, so that calls are journalled, repaired and asked again as everywhere. One
starts with the first call that is asked: what needs no call waits for no model. The address is part of a call's key: it is a
setting, and not drawn, or what a killed run was answered would be asked again. One run at a time has a port.
"""

from __future__ import annotations

import http.client
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

from raglan.artifact import locked
from raglan.errors import GeneratorError
from raglan.recipe import ServedSettings

__all__ = ["ModelServer"]

log = logging.getLogger(__name__)
PROGRAMS = {"vllm": "vllm", "hf": "transformers"}
KEEPER = Path(__file__).with_name("keeper.py")
PAUSE = 0.25  # seconds between looks
FREED = 20.0  # seconds until a port is free again behind a run that was killed
TOLD = 2000  # characters of the server's own words, where it fails


class ModelServer:
    """`with ModelServer(settings, log) as server`: nothing runs before `start`, and nothing behind the block."""

    def __init__(self, settings: ServedSettings, words: Path):
        """
        Args:
            words: the file of what the server says; it is gone on with.
        """
        self.settings, self.words = settings, words
        parts = urlsplit(settings.base_url)
        self.host, self.port = str(parts.hostname), int(parts.port or 80)
        self._keeper: subprocess.Popen[bytes] | None = None
        self._lock: int | None = None

    def __enter__(self) -> ModelServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def ended(self) -> str:
        """That it was started and has ended by itself, with its last words; nothing where it has not."""
        code = None if self._keeper is None else self._keeper.poll()
        return "" if code is None else f"the server of {self.settings.model} has ended (exit {code}): {self._last()}"

    def start(self) -> None:
        """Until it answers; nothing where it runs already.

        Raises:
            GeneratorError: there is no such command, something else answers at the address, or the server ends or does not
                answer in time; with its last words.
        """
        if self._keeper is not None:
            if self.ended:
                raise GeneratorError(self.ended, hint="the same command goes on from here")
            return
        command = self._command()
        self._take_port()
        self.words.parent.mkdir(parents=True, exist_ok=True)
        log.info("starting %s; it tells how it goes in %s", " ".join(command[:3]), self.words)
        kept = (self._lock,) if self._lock is not None and os.name == "posix" else ()
        with self.words.open("ab") as said:
            self._keeper = subprocess.Popen(  # noqa: S603 - by these two names, with the recipe's words
                [sys.executable, "-I", str(KEEPER), *command], stdin=subprocess.PIPE, stdout=said, stderr=said,
                start_new_session=True, pass_fds=kept,
            )  # fmt: skip
        self._wait()

    def close(self) -> None:
        """End it, and what it has started."""
        if self._keeper is not None and self._keeper.stdin is not None:
            self._keeper.stdin.close()
            try:
                self._keeper.wait(60)
            except subprocess.TimeoutExpired:
                log.warning("the server of %s does not end: process %d", self.settings.model, self._keeper.pid)
        if self._lock is not None:
            os.close(self._lock)
        self._keeper, self._lock = None, None

    def _command(self) -> list[str]:
        """Raises GeneratorError: there is no such program."""
        name = PROGRAMS[self.settings.kind]
        variable = f"RAGLAN_{name.upper()}"
        beside = shutil.which(name, path=str(Path(sys.executable).parent))
        program = shutil.which(os.environ[variable]) if variable in os.environ else beside or shutil.which(name)
        if program is None:
            raise GeneratorError(
                f"there is no command {os.environ.get(variable, name)!r}, which teacher.kind={self.settings.kind} needs",
                hint=f"pip install vllm, or 'transformers[serving]'; or its path in another environment: export {variable}=…",
            )
        words = ["serve", self.settings.model, "--host", self.host, "--port", str(self.port)]
        return [program, *words, *self.settings.arguments]

    def _take_port(self) -> None:
        """Raises GeneratorError: another run has it, or something answers there."""
        until = time.monotonic() + FREED
        self._lock = os.open(Path(tempfile.gettempdir()) / f"raglan-port-{self.port}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        while not locked(self._lock):
            if time.monotonic() > until:
                raise GeneratorError(
                    f"another run has port {self.port} for its model", hint="wait for it, or another port: teacher.base_url"
                )
            time.sleep(PAUSE)
        with socket.socket() as tried:
            if tried.connect_ex((self.host, self.port)) == 0:
                raise GeneratorError(
                    f"something answers at {self.settings.base_url} already, where {self.settings.model} is to be served",
                    hint="another port: teacher.base_url; or, where it is that model's server, teacher.kind=endpoint",
                )

    def _wait(self) -> None:
        """Until the server says that it is well."""
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        until = time.monotonic() + self.settings.start_seconds
        while not self.ended:
            try:
                with direct.open(f"http://{self.host}:{self.port}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError, http.client.HTTPException):
                if time.monotonic() > until:
                    raise GeneratorError(
                        f"the server of {self.settings.model} does not answer after {self.settings.start_seconds:g} s: "
                        + self._last(), hint="a large model takes its time: teacher.start_seconds",
                    ) from None  # fmt: skip
            time.sleep(PAUSE)
        raise GeneratorError(self.ended)

    def _last(self) -> str:
        """The server's own last words, and where the rest is."""
        said = self.words.read_text(encoding="utf-8", errors="replace").strip()[-TOLD:]
        return f"{said or 'it said nothing'} ({self.words})"
