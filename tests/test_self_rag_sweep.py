"""`raglan evaluate --cache`, `--rescore` and `--sweep` on a tiny Llama, and what a sweep may be."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from raglan.decode.self_rag.table import Table
from raglan.errors import RecipeError
from raglan.evaluate import gold
from raglan.recipe import RequireSettings, SelfRagDecode, SweepSettings, load_recipe
from raglan.records import Example
from raglan.reflection import Components
from raglan.sweep import open_sweep
from raglan.sweep_settings import Setting, settings_of
from raglan.sweep_tables import sweep_front, sweep_tables, value_text
from raglan.sweep_trials import Sweep, by_table, sweep
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


def _swept(table: Table, settings: list[Setting]) -> Sweep:
    def tried(settings: Sequence[Setting]) -> list[Setting]:
        return [by_table(table, one, one.decode(SHORT)) for one in settings]

    return sweep(settings, tried, metric="em", questions=len(table.r))


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
    kept = Setting(None, None, None, 2.0, None, 3, seq_mode="prob").decode(SelfRagDecode(kind="self_rag", target_rate=0.5))
    assert (kept.target_rate, kept.weights.rel, kept.weights.sup, kept.seq) == (0.5, 1.0, 2.0, "prob")


def test_only_what_goes_with_the_form_is_tried() -> None:
    tree = SelfRagDecode(kind="self_rag", form="long", absent_step=0.5)
    grid = settings_of(SweepSettings(beam=(1, 2), require=([], ["supported"])), tree, k=3, seed=0)
    assert len(grid) == 4
    assert {(one.threshold, one.seq, one.aggregate) for one in grid} == {(None, None, None)}  # as in decode
    assert {one.require for one in grid} == {RequireSettings(), RequireSettings(supported=True)}
    assert [value_text(one.told()["require"]) for one in grid] == ["none", "none", "supported", "supported"]
    for how, decode, fault in (
        ({"beam": [2]}, SHORT, "beam, and decode.form is short"),
        ({"all_irrelevant": ["abstain"]}, tree, "all_irrelevant, and decode.form is long"),
        ({"combine": ["by_component"]}, tree, "sweep.combine by_component"),
        ({"abstain_margin": [0.1]}, SHORT, "abstain_margin is for a closed set"),
        ({"require": [["fully"]]}, SelfRagDecode(kind="self_rag", options=["A", "B"]), "options are scored"),
    ):
        with pytest.raises(RecipeError, match=fault):
            settings_of(SweepSettings.model_validate(how), decode, k=3, seed=0)
    for said, fault in (
        ({"require": [["fully"], ["fully"]]}, "require has a value twice"),
        ({"prune": [{"kind": "bound"}]}, "nothing to try"),
    ):
        with pytest.raises(ValueError, match=fault):
            SweepSettings.model_validate(said)


def test_nothing_beats_the_front_and_something_beats_the_rest() -> None:
    found = _swept(_table(), settings_of(SweepSettings(draws=60), SHORT, k=3, seed=0))

    def beats(one: Setting, other: Setting) -> bool:
        mine, theirs = (-one.quality, one.rate, one.generated), (-other.quality, other.rate, other.generated)
        return all(a <= b for a, b in zip(mine, theirs, strict=True)) and mine != theirs

    for one in found.settings:
        beaten = any(beats(other, one) for other in found.settings)
        same = [(f.quality, f.rate, f.generated) for f in found.front]
        assert beaten != ((one.quality, one.rate, one.generated) in same)
    assert [one.quality for one in found.settings] == sorted((one.quality for one in found.settings), reverse=True)
    assert 1 < len(found.front) < len(found.settings)
    drawn = sweep_front(found.told())
    assert len(drawn) > 1
    for one in found.settings:  # on the line or below it
        assert one.quality <= max(point["quality"] for point in drawn if point["rate"] <= one.rate)
    assert all(point in [one.told() for one in found.front] for point in drawn)


def test_a_setting_that_cannot_be_answered_has_no_figures_and_no_place() -> None:
    whole, half = Setting(0.5, 1, 1, 1, 0.5, 3), Setting(0.1, 1, 1, 1, 0.5, 3)
    known = Setting(0.5, 1, 1, 1, 0.5, 3, quality=0.25, rate=0.5, generated=7.0)
    lacking = Setting(0.1, 1, 1, 1, 0.5, 3, incomplete=2)
    told_of = {whole: known, half: lacking}
    found = sweep([whole, half], lambda settings: [told_of[one] for one in settings], metric="f1", questions=5)
    assert (found.settings, found.front, found.needs_generation) == ([known], [known], [lacking])
    told = json.loads(json.dumps(found.told(), allow_nan=False))
    assert "quality" not in told["needs_generation"][0]
    front, lacks = sweep_tables(told)
    assert front.rows == [["25.0", "50.0", "7.0", "0.5"]]
    assert "1 settings need generation" in lacks.title
    assert lacks.rows == [["2 of 5", "0.1"]]


def test_the_retrieval_rate_counts_questions() -> None:
    table = _table()
    for delta in (0.0, 0.3, 1.0):
        one = _swept(table, [Setting(delta, 1, 1, 1, 0.5, 3, "sum")]).settings[0]
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
    (folder / "tells.yaml").write_text("""
name: tells
knowledge: {path: kb, documents: corpus.jsonl, chunk: null, encoder: {model: encoder/encoder, dtype: float32}}
retriever: {k: 2}
generator: {model: m, dtype: float32}
decode: {kind: self_rag, form: long, max_new_tokens: 6, max_segments: 2, beam: 1, threshold: 0.5}
evaluate: {questions: dev.jsonl, k: [1], modes: [retrieved], metrics: [f1], limit: 3}
sweep: {metric: f1, threshold: [0.0, 0.5, 1.0], beam: [1, 2], require: [[], [supported]], combine: [mean, sum]}
""")
    return folder


def drawn(page: Path) -> list[dict[str, Any]]:
    """The traces of a page's plots of quality against retrieval rate."""
    figures = [json.loads(html.unescape(one)) for one in re.findall(r'data-figure="([^"]+)"', page.read_text())]
    ours = [one for one in figures if one["layout"]["xaxis"]["title"]["text"].startswith("questions")]
    return [trace for one in ours for trace in one["data"]]


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
    pytest.importorskip("plotly")
    points, best, line = drawn(folder / "runs" / "asks" / "sweep.html")
    assert list(zip(points["x"], points["y"], strict=True)) == [
        (100 * one["rate"], 100 * one["quality"]) for one in swept["settings"]
    ]
    assert (len(best["x"]), line["mode"]) == (len(swept["front"]), "lines+markers")
    page = folder / "report.html"
    assert call("report", recipe, "-o", str(page), "--set", "decode.threshold=0.3")[0] == 0  # threshold is what was tried
    assert drawn(page) == [points, best, line]
    assert open_sweep(load_recipe(folder / "asks.yaml", ["decode.cite=retrieved"])) is None  # a sweep of another decoding

    code, _, err = call("evaluate", recipe, "--rescore", "decode.instruction=Answer.")
    assert code == 2
    assert "another prompt" in err
    for words in (("--cache", "--sweep"), ("--fill",), ("--rescore", "--confirm"), ("--cache", "--fill")):
        code, _, err = call("evaluate", recipe, *words)
        assert code == 2
        assert "--cache by itself" in err


def test_a_grid_over_trees(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = str(folder / "tells.yaml")
    call: Callable[..., tuple[int, str, str]] = lambda *words: run(*words, capsys=capsys, monkeypatch=monkeypatch)  # noqa: E731
    assert call("build", recipe)[0] == call("evaluate", recipe, "--cache")[0] == 0
    first = json.loads(call("evaluate", recipe, "--rescore", "--sweep", "--json")[1])
    assert first["calls"] == 0
    assert len(first["settings"]) + len(first["needs_generation"]) == 3 * 2 * 2 * 2
    assert {one["threshold"] for one in first["needs_generation"]} >= {1.0}  # the other answer to whether to retrieve
    assert all(one["incomplete"] and "quality" not in one for one in first["needs_generation"])
    _, out, err = call("evaluate", recipe, "--sweep")
    assert "settings need generation" in out
    assert "add --fill" in err
    every = (*folder.glob("runs/tells/candidates/*/rows.npz"), *folder.glob("runs/tells/candidates/*/tokenizer/tokenizer.json"))
    assert len(every) == 2
    kept = [rewritten(path, bytes(path.stat().st_size)) for path in every]  # trees are searched as arrays: nothing is replayed
    searched = json.loads(call("evaluate", recipe, "--sweep", "--json")[1])
    for path, content in zip(every, kept, strict=True):
        rewritten(path, content)
    replayed = json.loads(call("evaluate", recipe, "--sweep", "decode.max_calls=1000", "--json")[1])  # no search over arrays
    for told in (searched, replayed):
        assert {**told, "seconds": 0, "made_of": ""} == {**first, "seconds": 0, "made_of": ""}
    planted = json.loads(call("evaluate", recipe, "--sweep", "decode.absent=neutral", "--json")[1])
    again = json.loads(call("evaluate", recipe, "--sweep", "decode.absent=neutral", "decode.max_calls=1000", "--json")[1])
    assert {**planted, "seconds": 0, "made_of": ""} == {**again, "seconds": 0, "made_of": ""}

    filled = json.loads(call("evaluate", recipe, "--sweep", "--fill", "--confirm", "--json")[1])
    assert filled["calls"] > 0
    assert filled["needs_generation"] == []
    assert all(one["confirmed"] == one["quality"] for one in filled["front"])
    same = {json.dumps(one, sort_keys=True) for one in first["settings"]}
    assert same <= {json.dumps(one, sort_keys=True) for one in filled["settings"]}
    again = json.loads(call("evaluate", recipe, "--sweep", "--json")[1])
    assert (again["calls"], again["needs_generation"], again["settings"]) == (0, [], filled["settings"])

    words = ("decode.threshold=1.0", "decode.beam=2", "decode.require=[supported]", "decode.combine=sum")
    one = json.loads(call("evaluate", recipe, "--rescore", *words, "--json")[1])
    mine = next(
        s for s in again["settings"]
        if (s["threshold"], s["beam"], s["require"], s["combine"]) == (1.0, 2, {"supported": True}, "sum")
    )  # fmt: skip
    assert (mine["quality"], mine["rate"], mine["generated"] * 3) == (one["figures"]["f1"], one["rate"], one["generated"])


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
