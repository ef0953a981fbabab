"""Runs a command for as long as whoever started this lives: standard input closes with it, even by kill -9.

    python -I keeper.py COMMAND WORD …

A file to be run, which imports nothing of raglan. What the command has started, as a server its workers, ends with it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

PATIENCE = 15.0  # seconds from asking to end to ending
LOOK = 0.1  # seconds between looks


def main(words: list[str]) -> int:
    over = threading.Event()
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: over.set())
    command = subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True)  # noqa: S603 - its caller's words
    threading.Thread(target=_watched, args=(over,), daemon=True).start()
    while command.poll() is None and not over.wait(LOOK):
        pass
    if command.poll() is None:
        _send(command, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            command.wait(PATIENCE)
    _send(command, getattr(signal, "SIGKILL", signal.SIGTERM))  # and what of its group is still there
    code = command.wait()
    return code if code >= 0 else 128 - code


def _watched(over: threading.Event) -> None:
    sys.stdin.buffer.read()
    over.set()


def _send(command: subprocess.Popen[bytes], number: int) -> None:
    try:
        if hasattr(os, "killpg"):
            os.killpg(command.pid, number)
        else:
            command.terminate()
    except OSError:
        return  # it has ended


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # the watching thread may wait for ever
