"""The command `raglan` without its start: one process imports everything once and forks a child for every call.

`python warm_raglan.py serve DOOR` opens the Unix socket DOOR, says so, and serves until it is killed. `python -S warm_raglan.py
call DOOR …` is `raglan …` in the caller's folder, with the caller's input, output, errors and exit code.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from collections.abc import Callable


def call(door: str, words: list[str]) -> int:
    """The exit code of `raglan words…`."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(door)
        socket.send_fds(line, [json.dumps([os.getcwd(), words]).encode()], [0, 1, 2])
        return int(line.recv(16) or b"1")


def serve(door: str) -> None:
    import torch

    torch.set_num_threads(1)  # a fork has no threads of its parent's
    from raglan import cli, data, encoder, evaluate, report, stress, train  # noqa: F401  # all that takes long to import

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(door)
        listening.listen()
        os.write(1, b"open\n")
        while True:
            line, _ = listening.accept()
            said, streams, *_ = socket.recv_fds(line, 1 << 16, 3)
            child = os.fork()
            if not child:
                run(cli.main, *json.loads(said), streams)
            for stream in streams:
                os.close(stream)
            line.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
            line.close()


def run(main: Callable[[], None], folder: str, words: list[str], streams: list[int]) -> None:
    """In the child: never returns."""
    code = 1
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.chdir(folder)
        sys.argv = ["raglan", *words]
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:  # noqa: BLE001 - a child tells its fault and ends
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    act, at, *typed = sys.argv[1:]
    sys.exit(call(at, typed) if act == "call" else serve(at))
