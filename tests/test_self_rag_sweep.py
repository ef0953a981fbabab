"""`raglan evaluate --cache`, `--rescore` and `--sweep` on a tiny Llama, and what a sweep may be."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import tiny
from raglan.decode.self_rag.table import Table
from raglan.errors import RecipeError
from raglan.evaluate import gold
from raglan.recipe import SelfRagDecode, SweepSettings
from raglan.records import Example
from raglan.reflection import Components
from raglan.sweep import Setting, settings_of, sweep
from test_cli import run
from test_kill import small_recipe

SHORT = SelfRagDecode(kind="self_rag")


def _table(n: int = 40, k: int = 3) -> Table:
    rng = np.random.default_rng(1)
    return Table(
        r=rng.random(n), parts=Components(*rng.random((4, n, k))), present=np.ones((n, k), bool),
        lengths=rng.integers(1, 30, (n, k)), without=rng.integers(1, 30, n), good=rng.random((n, k)), plain=rng.random(n),
        places=None, labelled=np.zeros((n, 0)),
    )  # fmt: skip


def test_the_grid_is_every_combination_and_draws_are_some_of_them() -> None:
    how = SweepSettings(threshold=(0.1, 0.9), seq=(1.0,), rel=(1.0, 2.0), sup=(1.0,), use=(0.5,), k=(1, 2, 3))
    every = settings_of(how, SHORT, k=3, seed=0)
    assert len(every) == len(set(every)) == 12
    some = settings_of(how.model_copy(update={"draws": 5}), SHORT, k=3, seed=0)
    assert len(set(some)) == 5
    assert set(some) < set(every)
    assert some == settings_of(how.model_copy(update={"draws": 5}), SHORT, k=3, seed=0)
    assert some != settings_of(how.model_copy(update={"draws": 5}), SHORT, k=3, seed=1)
    with pytest.raises(RecipeError, match="written for 2 passages"):
        settings_of(how, SHORT, k=2, seed=0)
    with pytest.raises(RecipeError, match="labels is empty"):
        settings_of(SweepSettings(aggregate=("max",)), SHORT, k=3, seed=0)


def test_a_setting_confirmed_live_has_its_own_threshold_and_no_rate() -> None:
    live = Setting(0.3, 1, 2, 1, 0.5, 3, "sum").decode(SelfRagDecode(kind="self_rag", target_rate=0.5))
    assert (live.threshold, live.target_rate, live.weights.rel) == (0.3, None, 2)


def test_nothing_beats_the_front_and_something_beats_the_rest() -> None:
    found = sweep(_table(), settings_of(SweepSettings(draws=60), SHORT, k=3, seed=0), metric="em")

    def beats(one: Setting, other: Setting) -> bool:
        mine, theirs = (-one.quality, one.rate, one.generated), (-other.quality, other.rate, other.generated)
        return all(a <= b for a, b in zip(mine, theirs, strict=True)) and mine != theirs

    for one in found.settings:
        beaten = any(beats(other, one) for other in found.settings)
        same = [(f.quality, f.rate, f.generated) for f in found.front]
        assert beaten != ((one.quality, one.rate, one.generated) in same)
    assert [one.quality for one in found.settings] == sorted((one.quality for one in found.settings), reverse=True)
    assert 1 < len(found.front) < len(found.settings)


def test_the_retrieval_rate_counts_questions() -> None:
    table = _table()
    for delta in (0.0, 0.3, 1.0):
        one = sweep(table, [Setting(delta, 1, 1, 1, 0.5, 3, "sum")]).settings[0]
        assert one.rate == float((table.r > delta).mean())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with 8 questions and a tiny checkpoint that is sure of itself."""
    folder = tmp_path_factory.mktemp("sweep")
    small_recipe(folder)
    tiny.sure_self_rag(folder / "m", likes=())
    (folder / "asks.yaml").write_text("""
name: asks
knowledge: {path: kb, documents: corpus.jsonl, chunk: null, encoder: {model: encoder/encoder, dtype: float32}}
retriever: {k: 3}
generator: {model: m, dtype: float32}
decode: {kind: self_rag, max_new_tokens: 6, threshold: 0.5}
evaluate: {questions: dev.jsonl, k: [1], modes: [retrieved], metrics: [f1], limit: 8}
sweep: {metric: f1, threshold: [0.0, 0.3, 0.5, 0.7, 1.0], k: [1, 3], rel: [1.0], sup: [1.0], use: [0.5]}
""")
    return folder


def rewritten(path: Path, content: bytes) -> bytes:
    """What a file held until now. Its size and time stay, by which candidates know their model."""
    before, stamp = path.read_bytes(), path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    return before


def test_by_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = str(folder / "asks.yaml")
    call: Callable[..., tuple[int, str, str]] = lambda *words: run(*words, capsys=capsys, monkeypatch=monkeypatch)  # noqa: E731
    assert call("build", recipe)[0] == 0
    code, _, err = call("evaluate", recipe, "--sweep")
    assert code == 2
    assert "--cache writes them" in err
    code, out, _ = call("evaluate", recipe, "--cache", "--json")
    assert code == 0
    assert json.loads(out)["continuations"] == 8 * (3 + 1)

    live = json.loads(call("evaluate", recipe, "decode.threshold=0.3", "--json")[1])["untuned"]
    told = json.loads(call("evaluate", recipe, "--rescore", "decode.threshold=0.3", "--json")[1])
    assert told["figures"]["f1"] == live["retrieved/f1"]["mean"]
    assert (told["calls"], told["incomplete"], told["questions"]) == (0, 0, 8)
    weights = [*folder.glob("m/*.safetensors"), *folder.glob("encoder/encoder/**/*.safetensors")]
    assert len(weights) == 2
    kept = [rewritten(path, bytes(path.stat().st_size)) for path in weights]  # neither model nor encoder can be opened
    again = json.loads(call("evaluate", recipe, "--rescore", "decode.threshold=0.3", "--json")[1])
    assert again["figures"] == told["figures"]
    for path, content in zip(weights, kept, strict=True):
        rewritten(path, content)
    code, _, err = call("evaluate", recipe, "--rescore", "retriever.k=4")
    assert code == 2
    assert "written for 3 passages" in err
    filled = json.loads(call("evaluate", recipe, "--rescore", "retriever.k=4", "--fill", "--json")[1])
    assert filled["calls"] > 0
    assert json.loads(call("evaluate", recipe, "--rescore", "retriever.k=4", "--json")[1])["figures"] == filled["figures"]

    code, out, err = call("evaluate", recipe, "--sweep", "--confirm")
    assert code == 0
    assert "0 model calls" in err
    assert "live" in out
    swept = json.loads((folder / "runs" / "asks" / "sweep.json").read_text())
    assert len(swept["settings"]) == 5 * 2 * 2
    assert all(one["quality"] == one["confirmed"] for one in swept["front"])
    mine = next(one for one in swept["settings"] if (one["threshold"], one["k"], one["seq"]) == (0.3, 3, 1.0))
    assert (mine["quality"], mine["rate"]) == (told["figures"]["f1"], told["rate"])

    code, _, err = call("evaluate", recipe, "--rescore", "decode.instruction=Answer.")
    assert code == 2
    assert "another prompt" in err
    code, _, err = call("evaluate", recipe, "--rescore", "--sweep")
    assert code == 2
    assert "one at a time" in err


@pytest.mark.parametrize("size", [3, 4, 5])
def test_gold_is_spelt_as_the_closed_set_is(size: int) -> None:
    letters, digits = tuple("ABCDE"[:size]), tuple("12345"[:size])
    for letter, digit in zip(letters, digits, strict=True):
        for given in (letter, digit, f" {letter.lower()}.", f"{letter}: a text"):
            example = Example("1", "q", (given,))
            for name in ("labels", "options"):
                assert gold(example, SelfRagDecode(kind="self_rag", **{name: letters})) == [letter]
                assert gold(example, SelfRagDecode(kind="self_rag", **{name: digits})) == [digit]
    named = Example("1", "q", ("SUPPORTS", "tin"))
    assert gold(named, SelfRagDecode(kind="self_rag", labels=("true", "false"))) == ["true", "tin"]
    own = Example("1", "q", ("2",), metadata={"choices": ["1", "2"]})
    assert gold(own, SelfRagDecode(kind="self_rag", options=letters)) == gold(own, SHORT) == ("2",)
