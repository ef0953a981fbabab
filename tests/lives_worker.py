"""The command `raglan`, killed and begun again: `python lives_worker.py` reads orders, lines of JSON, and tells how each went.

    {"folder", "words", "journal", "kills", "seed", "span", "speed"} → {"deaths", "code", "said"}

It imports everything once and forks a child for each life, which is a process of its own. A child is killed with signal 9 when
the journal has grown by a random number of bytes below `span`; who lives behind the last kill, or ends before it, ends the
order with its exit code. `speed` makes the seconds of pauses shorter.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp  # noqa: F401 - imported here, once for all lives
import torch

from raglan import cli
from raglan.calls.limits import Clock
from raglan.synthesis import start  # noqa: F401
from warm_raglan import run


def lived(order: dict[str, Any]) -> dict[str, Any]:
    draw, journal, said = random.Random(order["seed"]), Path(order["journal"]), Path(order["folder"]) / "said.txt"
    deaths = 0
    while True:
        began = journal.stat().st_size if journal.exists() else 0
        child = os.fork()
        if not child:
            Clock.__init__.__defaults__ = (order["speed"],)  # type: ignore[misc]
            stream = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            run(cli.main, order["folder"], order["words"], [os.open(os.devnull, os.O_RDONLY), stream, stream])
        deadly = began + draw.randrange(1, order["span"]) if deaths < order["kills"] else 1 << 60
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            if journal.exists() and journal.stat().st_size > deadly:
                os.kill(child, signal.SIGKILL)
                ended = os.waitpid(child, 0)
                break
            time.sleep(0.0005)
        if not os.WIFSIGNALED(ended[1]):
            return {"deaths": deaths, "code": os.waitstatus_to_exitcode(ended[1]), "said": said.read_text()}
        deaths += 1


if __name__ == "__main__":
    torch.set_num_threads(1)  # a fork has no threads of its parent's
    for line in sys.stdin:
        sys.stdout.write(json.dumps(lived(json.loads(line))) + "\n")
        sys.stdout.flush()
