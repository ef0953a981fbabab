"""kill -9 at random moments, of `build` and of `train`: what was published still opens, and a rerun finishes the work.

One driver process imports everything once and forks a child for each attempt, so that ten kills cost one start.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import tiny
from raglan.knowledge import KnowledgeBase, build_knowledge
from raglan.recipe import load_recipe
from raglan.stages import finished_parts
from test_knowledge import documents, settings
from tiny import small_recipe

DRIVER = """
import json, os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from raglan.recipe import KnowledgeSettings, load_recipe
import raglan.knowledge as knowledge, raglan.train as training, raglan.vectors as vectors
vectors.SHARD = 16
what, path, longest = sys.argv[1], sys.argv[2], float(sys.argv[3])
kills, chance = int(sys.argv[4]), random.Random(1)
while True:
    child = os.fork()
    if child == 0:
        try:
            if what == "build":
                knowledge.build_knowledge(KnowledgeSettings.model_validate_json(open(path).read()))
            else:
                training.train(load_recipe(path))
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    began, limit = time.monotonic(), chance.uniform(0.02, longest) if kills < 10 else 240
    while time.monotonic() - began < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.005)
    if done and kills < 10 and os.waitstatus_to_exitcode(status) == 0:  # done before ten kills: once more, afresh
        print(json.dumps({"early": kills}), flush=True)
        sys.stdin.readline()
        continue
    if done:
        print(json.dumps({"done": os.waitstatus_to_exitcode(status), "kills": kills}), flush=True)
        break
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
    print(json.dumps({"kill": kills}), flush=True)
    sys.stdin.readline()
"""


def attempts(
    what: str, path: Path, longest: float, look: Callable[[], None], *, start: int = 0, afresh: Callable[[], None] | None = None
) -> int:
    """Run the driver; after every kill call `look`. Returns how many kills there were: ten.

    Work that is done before the tenth begins again after `afresh` has taken its result away. From the tenth kill on nothing
    is killed; `start=10` is a straight run.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, what, str(path), str(longest), str(start)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if "done" in event:
            process.wait()
            assert event["done"] == 0
            return int(event["kills"])
        if "early" in event:
            assert afresh is not None
            afresh()
        else:
            look()
        process.stdin.write("on\n")
        process.stdin.flush()
    raise AssertionError("the driver died")


def test_build_survives_ten_kills(tmp_path: Path) -> None:
    encoder = tiny.sentence_encoder(tmp_path / "encoder")
    first = build_knowledge(settings(tmp_path, encoder))
    documents(tmp_path / "docs", 12000)
    wanted = settings(tmp_path, encoder, documents=[tmp_path / "docs" / "corpus.jsonl"])
    documents(tmp_path / "docs", 12000)
    (tmp_path / "settings.json").write_text(wanted.model_dump_json())
    times: dict[str, int] = {}
    survivors: set[str] = set()

    def look() -> None:
        assert KnowledgeBase.open(tmp_path / "kb").version == first.version
        for shard in (tmp_path / "kb" / "building").rglob("vectors/*.npy"):  # none is encoded twice
            assert times.setdefault(shard.name, shard.stat().st_mtime_ns) == shard.stat().st_mtime_ns
            survivors.add(shard.name)

    def afresh() -> None:
        KnowledgeBase.publish(tmp_path / "kb", first.version)  # the pointer goes back, and the finished version goes
        times.clear()
        for folder in (tmp_path / "kb" / "versions").iterdir():
            if folder.name != first.version:
                shutil.rmtree(folder)

    assert attempts("build", tmp_path / "settings.json", 1.5, look, afresh=afresh) == 10
    assert len(survivors) > 10, "hardly a shard survived a kill"
    last = KnowledgeBase.open(tmp_path / "kb")
    assert last.version != first.version
    straight = build_knowledge(wanted.model_copy(update={"path": tmp_path / "straight"}))
    rows = np.arange(12000)
    assert np.allclose(last.vectors.vectors(rows), straight.vectors.vectors(rows), atol=1e-5)


@pytest.mark.timeout(600)
def test_train_survives_ten_kills_and_ends_where_a_straight_run_ends(tmp_path: Path) -> None:
    path = small_recipe(tmp_path)
    build_knowledge(load_recipe(path).knowledge)

    def look() -> None:
        for name, parts in finished_parts(load_recipe(path)):  # whatever counts as finished opens and answers
            assert name == "untuned" or parts.open(load_recipe(path)).answer(["who built bcd"])

    def afresh() -> None:
        shutil.rmtree(load_recipe(path).run / "stages")

    assert attempts("train", path, 1.0, look, afresh=afresh) == 10
    straight = small_recipe(tmp_path, name="straight")
    assert attempts("train", straight, 0, look, start=10) == 10
    ours, theirs = (finished_parts(load_recipe(p))[-1][1].open(load_recipe(p)) for p in (path, straight))
    for a, b in ((ours.generator.model, theirs.generator.model),
                 (ours.retriever.encoder.query_tower, theirs.retriever.encoder.query_tower)):  # fmt: skip
        for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
            assert np.allclose(p.detach().numpy(), q.detach().numpy(), atol=1e-4), name


@pytest.mark.timeout(300)
def test_ctrl_c_saves_the_step_and_the_next_run_goes_on_from_it(tmp_path: Path) -> None:
    """A `marginal` stage, two models in one module with tied weights; no checkpoint but the one that Ctrl-C asks for."""
    path = small_recipe(tmp_path)
    text = path.read_text()
    stages = text[text.index("stages:") : text.index("evaluate:")]
    joint = """stages:
  joint:
    data: {kind: questions, path: train.jsonl}
    objective: {kind: marginal, over: sequence, k: 2}
    train: {num_train_epochs: 16, save_steps: 100000, learning_rate: 1e-4}
"""
    path.write_text(text.replace(stages, joint))
    build_knowledge(load_recipe(path).knowledge)
    command = [sys.executable, "-m", "raglan", "train", str(path)]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=quiet)
    run = load_recipe(path).run / "stages"
    deadline = time.monotonic() + 120
    while not list(run.glob("joint-*/log.json")):  # written after the second step
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "goes on where it stopped" in told
    saved = [int(folder.name.rpartition("-")[2]) for folder in run.glob("joint-*/work/checkpoint-*")]
    assert len(saved) == 1
    assert 2 <= saved[0] < 80
    again = subprocess.run(command, capture_output=True, text=True, env=quiet, check=True)
    assert f"goes on from checkpoint-{saved[0]}" in again.stderr
    straight = small_recipe(tmp_path, name="straight")
    straight.write_text(path.read_text().replace("name: small", "name: straight"))
    subprocess.run([*command[:-1], str(straight)], capture_output=True, env=quiet, check=True)
    ours, theirs = (finished_parts(load_recipe(p))[-1][1].open(load_recipe(p)) for p in (path, straight))
    for a, b in ((ours.generator.model, theirs.generator.model),
                 (ours.retriever.encoder.query_tower, theirs.retriever.encoder.query_tower)):  # fmt: skip
        for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
            assert np.allclose(p.detach().numpy(), q.detach().numpy(), atol=1e-4), name
