"""Runs a command for as long as whoever started this lives: standard input closes with it, even by kill -9.

    python keeper.py COMMAND WORD …

A file to be run, which imports nothing of raglan. What the command started, as a server its workers, ends with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

PATIENCE = 15.0  # seconds from asking to end to ending


def main(words: list[str]) -> None:
    command = subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True)  # noqa: S603 - its caller's words
    threading.Thread(target=lambda: os._exit(command.wait() & 0x7F), daemon=True).start()
    sys.stdin.buffer.read()
    _send(command, signal.SIGTERM)
    try:
        command.wait(PATIENCE)
    finally:
        _send(command, getattr(signal, "SIGKILL", signal.SIGTERM))  # and what of its group is still there


def _send(command: subprocess.Popen[bytes], number: int) -> None:
    try:
        if hasattr(os, "killpg"):
            os.killpg(command.pid, number)
        else:
            command.terminate()
    except OSError:
        return  # it has ended


if __name__ == "__main__":
    main(sys.argv[1:])
