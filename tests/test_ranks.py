"""Two ranks on one machine (gloo): the gradients, and so the weights, of one process with the whole batch.

Both ranks are started once, by torchrun, and go through all cases; the one-process runs are made here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from raglan.generator import open_generator
from raglan.knowledge import build_knowledge
from raglan.objective import MarginalRow, Objective
from raglan.recipe import GeneratorSettings, PromptSettings, load_recipe
from raglan.stages import finished_parts
from raglan.train import train
from test_marginal import objective
from test_marginal_training import ALL, EIGHT, make_answer, make_lsr, opened, trainer_of
from test_staleness import joint
from tiny import small_recipe

OTHERS: dict[str, tuple[Callable[..., tuple[Objective, Sequence[Any]]], dict[str, Any]]] = {
    "lsr": (make_lsr, {}),
    "lsr, flat left out": (make_lsr, {"flat": "skip", "alike": (0, 2, 3)}),  # of the first rank's pair one, of the second's two
    "answer by tokens": (make_answer, {"reduction": "token"}),
    "answer by rows": (make_answer, {"reduction": "example"}),
}  # fmt: skip
STEPS, BOTH = 2, {"learn": ("query_encoder", "generator")}
CASES: dict[str, dict[str, Any]] = {
    "token": {"over": "token", "reduction": "token"},
    "example": {"over": "sequence", "reduction": "example"},
    "sum": {"over": "sequence", "reduction": "sum"},
    "waits": {"over": "sequence", "freeze_retriever_steps": 1},  # a step without any gradient for one tower
    "all": {"over": "token", "learn": ALL, "staleness": {"kind": "accept"}},
    "one finds nothing": {"over": "sequence", "on_empty": "skip", "lost": (6, 7)},  # the second rank, at the second step
    "none finds anything": {"over": "token", "on_empty": "skip", "lost": (4, 5, 6, 7)},
}  # fmt: skip

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch was built without gloo"
)


def aimed(folder: Path, name: str) -> tuple[Objective, Sequence[Any], float]:
    """A case's objective and rows, and how fast it learns."""
    if name in OTHERS:
        make, given = OTHERS[name]
        if make is make_answer:  # of two ranks one saves a model, so it is there before they begin
            settings = GeneratorSettings(model=str(folder / "answer" / "bart"), dtype="float32")
            given = {**given, "generator": open_generator(settings, PromptSettings(max_tokens=300))}
        return *make(folder, folder, **given), 0.05
    settings = dict(CASES[name])
    lost = settings.pop("lost", None)
    system = opened(folder)
    rows = [MarginalRow(query, answer) for query, answer in EIGHT]
    if lost is not None:
        found = system.retriever.search([row.query for row in rows], 3)[1]
        rows = [
            MarginalRow(row.query, row.answer, np.full(3, -1) if place in lost else found[place])
            for place, row in enumerate(rows)
        ]
    aim = objective(system, **{**BOTH, **settings})
    rate = 0.005 if settings.get("reduction") == "sum" else 0.05
    return aim, rows, rate


def steps(folder: Path, name: str, work: Path, *, size: int) -> dict[str, Tensor]:
    """Two steps of one case in this process, whatever rank it is; what there is afterwards, by name."""
    aim, rows, rate = aimed(folder, name)
    trainer_of(aim, rows, folder, work / name, max_steps=STEPS, per_device_train_batch_size=size, learning_rate=rate).train()
    return {name: value.detach().clone().contiguous() for name, value in aim.module.named_parameters()}


def recipe_of(folder: Path, name: str, *, size: int) -> Any:
    return load_recipe(
        folder / "joint.yaml", [f"name={name}", f"stages.joint.train.per_device_train_batch_size={size}"]
    )  # fmt: skip


def rank(folder: Path) -> None:
    """What each rank does: every case, then a recipe."""
    torch.set_num_threads(1)
    own = int(os.environ["RANK"])
    for name in (*CASES, *OTHERS):
        save_file(steps(folder, name, folder / "two", size=2), folder / f"{name}-{own}.safetensors")
    train(recipe_of(folder, "two", size=4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what both ranks ended with."""
    path = tmp_path_factory.mktemp("ranks")
    recipe = yaml.safe_load(small_recipe(path).read_text())
    build_knowledge(load_recipe(path / "small.yaml").knowledge)
    recipe["stages"] = {"joint": joint(recipe)}
    recipe["stages"]["joint"]["train"] |= {"max_steps": 4, "save_steps": 2, "weight_decay": 0.0}
    (path / "joint.yaml").write_text(yaml.safe_dump(recipe))
    tiny.bart(path / "answer" / "bart")
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nimport conftest\nfrom pathlib import Path\n"
    (path / "rank.py").write_text(f"{program}import test_ranks\ntest_ranks.rank(Path({str(path)!r}))\n")
    told = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(path / "rank.py")],
        capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr[-20000:]
    return path


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [*CASES, *OTHERS])
def test_two_ranks_are_one_process(name: str, folder: Path) -> None:
    start = {name: value.detach().clone() for name, value in aimed(folder, name)[0].module.named_parameters()}
    wanted = steps(folder, name, folder / "one", size=4)
    first, second = (load_file(folder / f"{name}-{own}.safetensors") for own in (0, 1))
    assert {*first} == {*wanted}
    assert all(torch.equal(first[key], second[key]) for key in first)  # ranks do not drift apart

    def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        return float(torch.cat([(one[key] - other[key]).flatten() for key in one]).norm())

    assert apart(start, wanted) > 1e-4
    assert all(torch.isfinite(value).all() for value in first.values())
    assert apart(first, wanted) < 2e-3 * apart(start, wanted)


def test_a_recipe_trained_by_two_ranks_is_that_trained_by_one(folder: Path) -> None:
    """torchrun … -m raglan train: one rank writes the result, once, and it opens."""
    train(recipe_of(folder, "one", size=8))
    one, two = (finished_parts(recipe_of(folder, name, size=size))[-1][1] for name, size in (("one", 8), ("two", 4)))
    for part in ("generator", "query_encoder"):
        ours, theirs = (load_file(Path(str(getattr(parts, part))) / "model.safetensors") for parts in (two, one))
        for key, value in theirs.items():
            assert torch.allclose(ours[key], value, atol=2e-4), key
    recipe = recipe_of(folder, "two", size=4)
    assert two.open(recipe).answer(["who built bcd"])
