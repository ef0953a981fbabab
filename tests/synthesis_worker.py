"""Synthesizes and is killed, again and again: `python synthesis_worker.py URL FOLDER CELLS KILLS SEED CONCURRENCY [CAP]`.

It runs the whole driver: plan, teacher, verification, exact N. It imports everything once and forks a child for each life,
which is a process of its own. A child is killed with signal 9 when the journal has grown by a random number of bytes, so that
it dies between any two writes. A life that its calls stop (key, quota) is followed by another; the cap ends it all.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import aiohttp  # noqa: F401 - imported here, once for all lives
import openai  # noqa: F401

from raglan.calls import CallEngine
from raglan.calls.limits import Clock
from raglan.errors import RaglanError
from raglan.perturb import Slot
from raglan.recipe import EndpointSettings, MoneySettings, Recipe
from raglan.synthesis import factors_of, make_plan
from raglan.synthesis.endpoint import EndpointTeacher
from raglan.synthesis.run import synthesize
from raglan.synthesis.writing import Draft, Sheet

PRICE = {"input": 2.5, "cached": 1.25, "output": 10}
STOPPED, CAPPED = 4, 5  # exit codes of a life
CALL_BYTES = 1000  # of the journal, intent and outcome, about
WEIGHTS = {
    "task": {"factoid": 3, "bridge": 1, "numeric": 1, "temporal": 2, "definition": 1}, "answer_format": {"short_sentence": 1},
    "query_format": "fit", "genre": "fit", "absent_policy": {"abstain": 1},
}  # fmt: skip


def recipe(folder: Path, cells: int) -> Recipe:
    synthesis = {
        "path": folder, "n": cells, "from_scratch": 1, "retrievers": {"bm25": 1}, "decontaminate": "none", "weights": WEIGHTS,
    }  # fmt: skip
    return Recipe.model_validate({"name": "faults", "knowledge": {"path": "kb", "documents": "docs"}, "synthesis": synthesis})


def show(draft: Draft) -> Sheet:
    """Evidence, and what was written beside it; guard and retrieved noise are not what is tried here."""
    gold = () if draft.job.cell.relation == "R5" else draft.gold
    slots = tuple(Slot(one, "gold", "gold", "gold") for one in gold)
    slots += tuple(Slot(one, "noise", "hard", "made") for one in draft.beside)
    listed = "\n".join(f"[{number}] {slot.passage.title}: {slot.passage.text}" for number, slot in enumerate(slots, 1))
    told = "Answer from the passages; if they do not tell, say so."
    return Sheet(draft, slots, "\n".join([told, *draft.history, listed, draft.query]), told)


def live(url: str, folder: Path, cells: int, concurrency: int, cap: str | None) -> int:
    """One life; its exit code."""
    settings = EndpointSettings(base_url=url, model="m", api_key_env="CALLS_KEY", concurrency=concurrency, timeout=1.5)
    asked = recipe(folder / "data", cells)
    plan = make_plan(asked)
    money = MoneySettings.model_validate({"price": PRICE, "cap_usd": cap})
    with CallEngine(settings, folder / "calls", money=money, clock=Clock(4.0)) as engine:
        teacher = EndpointTeacher(engine, plan, factors_of(asked)[0])
        done = synthesize(asked, teacher, show, plan=plan)
    if done.told["stopped"]:
        sys.stderr.write(f"{done.told['stopped']}\n")
        return CAPPED if done.told["stopped"].startswith("cap") else STOPPED
    return done.exit_code


def main() -> None:
    url, where, cells, kills, seed, concurrency, *more = sys.argv[1:]
    folder, cap = Path(where), more[0] if more else None
    draw, journal = random.Random(int(seed)), folder / "calls" / "journal.jsonl"
    told: dict[str, Any] = {"deaths": 0, "stopped": 0, "code": None}
    span = int(cells) * 5 * CALL_BYTES // (int(kills) + 1)  # so that all fit in
    while told["code"] is None:
        began = journal.stat().st_size if journal.exists() else 0
        child = os.fork()
        if not child:
            code = 1
            try:
                code = live(url, folder, int(cells), int(concurrency), cap)
            except (OSError, ValueError, RuntimeError, AssertionError, RaglanError):
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        deadly = began + draw.randrange(1, span) if told["deaths"] < int(kills) else 1 << 60
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            if journal.exists() and journal.stat().st_size > deadly:
                os.kill(child, signal.SIGKILL)
                ended = os.waitpid(child, 0)
                break
            time.sleep(0.001)
        if os.WIFSIGNALED(ended[1]):
            told["deaths"] += 1
        elif os.waitstatus_to_exitcode(ended[1]) == STOPPED:
            told["stopped"] += 1
        else:
            told["code"] = os.waitstatus_to_exitcode(ended[1])
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main()
