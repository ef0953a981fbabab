"""A process that calls a server and is killed, again and again: `python calls_worker.py URL FOLDER OUT ASKS KILLS SEED`.

It imports everything once and forks a child for each life, which is a process of its own. The child is killed with signal 9
when the journal has grown by a random number of bytes, so that it dies between any two writes; the last one lives to its end.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import aiohttp  # noqa: F401 - imported here, once for all lives
import openai  # noqa: F401
from pydantic import BaseModel

from raglan.calls import Ask, CallEngine
from raglan.errors import RaglanError
from raglan.recipe import EndpointSettings, MoneySettings

PRICE = {"input": 2.5, "cached": 1.25, "output": 10}


class Word(BaseModel):
    word: str
    count: int


def asks(count: int) -> Iterator[Ask]:
    for number in range(count):
        schema = Word if number % 2 else None
        yield Ask("answer", ({"role": "user", "content": f"q{number}"},), schema, {"max_tokens": 80}, ref=str(number))


def live(url: str, folder: Path, out: Path, count: int) -> None:
    settings = EndpointSettings(base_url=url, model="m", api_key_env="CALLS_KEY", concurrency=8)
    rows = {}
    with CallEngine(settings, folder, money=MoneySettings(price=PRICE)) as engine:
        for outcome in engine.run(asks(count)):
            value = outcome.value.model_dump() if isinstance(outcome.value, BaseModel) else outcome.value
            rows[int(outcome.ask.ref)] = [outcome.cls, value]
    out.write_text("".join(json.dumps([number, *rows[number]]) + "\n" for number in sorted(rows)))


def main() -> None:
    url, folder, out, count, kills, seed = sys.argv[1:]
    draw, journal = random.Random(int(seed)), Path(folder) / "journal.jsonl"
    deaths = 0
    while True:
        began = journal.stat().st_size if journal.exists() else 0
        child = os.fork()
        if not child:
            code = 1
            try:
                live(url, Path(folder), Path(out), int(count))
                code = 0
            except (OSError, ValueError, RuntimeError, AssertionError, RaglanError):
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        deadly = began + draw.randrange(2800) if deaths < int(kills) else 1 << 60
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            if journal.exists() and journal.stat().st_size > deadly:
                os.kill(child, signal.SIGKILL)
                ended = os.waitpid(child, 0)
                break
            time.sleep(0.0005)
        if not os.WIFSIGNALED(ended[1]):
            sys.stdout.write(json.dumps({"deaths": deaths, "code": os.waitstatus_to_exitcode(ended[1])}))
            return
        deaths += 1


if __name__ == "__main__":
    main()
