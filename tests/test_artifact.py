"""Artefacts are made by one process at a time: others wait, and find them made; who is killed leaves nothing locked."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import tiny
from raglan import evaluate, knowledge, stress
from raglan.artifact import MANIFEST, alone, point, pointed, write_json, write_manifest
from raglan.recipe import load_recipe

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
        with alone(folder.with_name(".lock"), (folder / MANIFEST).is_file) as to_do:
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
    with alone(tmp_path / "nowhere" / "lock", lambda: True) as to_do:
        assert not to_do
    assert not (tmp_path / "nowhere").exists()


def test_a_fault_inside_frees_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inside"), alone(tmp_path / "lock", lambda: False):
        raise ValueError("inside")
    with alone(tmp_path / "lock", lambda: False) as to_do:
        assert to_do


def test_who_is_killed_holds_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lock = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, lock], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with ThreadPoolExecutor(1) as pool:

        def take() -> bool:
            with alone(lock, lambda: False) as to_do:
                return to_do

        waits = pool.submit(take)
        while "waiting for it" not in caplog.text:
            time.sleep(0.01)
        assert not waits.done()
        os.kill(holder.pid, signal.SIGKILL)
        assert waits.result(timeout=30)
    holder.wait()
    holder.stdout.close()
    assert not lock.exists()


def test_the_folder_of_the_lock_may_go_while_somebody_waits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lock = tmp_path / "building" / "lock"

    def take() -> bool:
        with alone(lock, lambda: False) as to_do:
            return to_do

    with ThreadPoolExecutor(1) as pool:
        with alone(lock, lambda: False):
            waits = pool.submit(take)
            while "waiting for it" not in caplog.text:
                time.sleep(0.01)
            shutil.rmtree(lock.parent)
        assert waits.result(timeout=30)


def test_a_folder_that_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "deep")
    for place, fault in (("file", NotADirectoryError), ("link", FileNotFoundError)):
        with pytest.raises(fault, match=place), alone(tmp_path / place / "lock", lambda: False):
            pass


def test_where_nothing_can_be_locked_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuses)
    with alone(tmp_path / "lock", lambda: False) as to_do:
        assert to_do
    assert "nothing can be locked here (No locks available)" in caplog.text


def test_many_writers_of_one_file_leave_a_whole_one(tmp_path: Path) -> None:
    """Of processes that look up the same and write it, none finds another's half."""
    path, pointer = tmp_path / "told.json", tmp_path / "current"

    def write(number: int) -> None:
        for _ in range(20):
            write_json(path, {"told": "x" * 10_000})
            point(pointer, "v1")
            assert len(json.loads(path.read_text(encoding="utf-8"))["told"]) == 10_000
            assert pointed(pointer) == "v1"

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert sorted(one.name for one in tmp_path.iterdir()) == ["current", "told.json"]


def test_a_knowledge_base_an_evaluation_and_robustness_are_made_once_by_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = ["stages={}", "evaluate.dataset=towers", "evaluate.limit=4", "evaluate.robustness={noise: [random], ratios: [1]}"]
    recipe, made, others = load_recipe(tiny.small_recipe(tmp_path), asked), [], []
    works: dict[str, Callable[[], Any]] = {
        "_Build.run": lambda: knowledge.build_knowledge(recipe.knowledge).version,
        "_write": lambda: evaluate.evaluate_recipe(recipe),
        "_measure": lambda: stress.evaluate_robustness(recipe),
    }

    def counted(name: str, make: Callable[..., Any]) -> Callable[..., Any]:
        def beside_another(*given: Any, **named: Any) -> Any:
            made.append(name)
            if name not in made[:-1]:
                caplog.clear()
                others.append(pool.submit(works[name]))
                while "waiting for it" not in caplog.text:  # libraries load one model at a time
                    assert not others[-1].done()
                    time.sleep(0.01)
            return make(*given, **named)

        return beside_another

    monkeypatch.setattr(knowledge._Build, "run", counted("_Build.run", knowledge._Build.run))
    monkeypatch.setattr(evaluate, "_write", counted("_write", evaluate._write))
    monkeypatch.setattr(stress, "_measure", counted("_measure", stress._measure))
    with ThreadPoolExecutor(1) as pool:
        first = [work() for work in works.values()]
        assert made == list(works)
        assert [other.result() for other in others] == first
    (measured,) = first[1]
    assert json.loads((measured.folder / MANIFEST).read_text(encoding="utf-8"))["domain"]["dataset"] == "towers"
    left = [path for folder in (tmp_path / "kb", tmp_path / "runs") for path in folder.rglob("*")]
    assert not [path for path in left if path.name.endswith((".lock", ".part")) or path.name == "building"]
