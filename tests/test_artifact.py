"""Artefacts are made by one process at a time: others wait, and find them made; who is killed leaves nothing locked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from raglan.artifact import MANIFEST, alone, write_manifest

HOLDS = """
import sys, time
from pathlib import Path
from raglan.artifact import alone
with alone(Path(sys.argv[1]), lambda: False):
    print("held", flush=True)
    time.sleep(60)
"""


def test_eight_at_once_make_it_once(tmp_path: Path) -> None:
    folder, inside, made = tmp_path / "deep" / "result", [], []

    def make(number: int) -> None:
        with alone(folder, (folder / MANIFEST).is_file) as to_do:
            inside.append(number)
            assert len(inside) == 1, "two at a time"
            if to_do:
                folder.mkdir()  # fails where it is there
                time.sleep(0.05)
                made.append(number)
                write_manifest(folder, "test", {})
            inside.remove(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(make, range(8)))
    assert len(made) == 1
    assert [path.name for path in folder.parent.iterdir()] == ["result"], "a lock was left behind"


def test_what_is_done_needs_no_lock(tmp_path: Path) -> None:
    folder = tmp_path / "nowhere" / "result"
    with alone(folder, lambda: True) as to_do:
        assert not to_do
    assert not folder.parent.exists()


def test_a_fault_inside_frees_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inside"), alone(tmp_path / "result", lambda: False):
        raise ValueError("inside")
    with alone(tmp_path / "result", lambda: False) as to_do:
        assert to_do


def test_who_is_killed_holds_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "result"
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, folder], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with ThreadPoolExecutor(1) as pool:

        def take() -> bool:
            with alone(folder, lambda: False) as to_do:
                return to_do

        waits = pool.submit(take)
        while "waiting for it" not in caplog.text:
            time.sleep(0.01)
        assert not waits.done()
        os.kill(holder.pid, signal.SIGKILL)
        assert waits.result(timeout=30)
    holder.wait()
    holder.stdout.close()
    assert not (tmp_path / "result.lock").exists()
