"""Candidates written once: a rescored answer is the live one bit for bit, a sweep is the live answers' mean, no model asked."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raglan.decode.base import Asked
from raglan.decode.self_rag import self_rag
from raglan.decode.self_rag.cache import CandidateCache
from raglan.decode.self_rag.recording import Replay, record, replay
from raglan.decode.self_rag.rules import weights
from raglan.decode.self_rag.table import Table
from raglan.errors import CheckpointError, RecipeError
from raglan.recipe import SelfRagDecode
from raglan.records import Answer, Hit, Passage
from raglan.reflection import Components, Weights
from tiny import ScriptedGenerator, decides, said

WORDS = ("Paris", "Lyon", "Rome", "true", "false")
QUESTIONS = [f"question {number}?" for number in range(6)]
K = 4
IDENTITY = {"model": "m", "prompt": "p"}


def _p(rng: np.random.Generator, size: int) -> tuple[float, ...]:
    return tuple(rng.dirichlet(np.ones(size)).tolist())


def _script(rng: np.random.Generator) -> dict[Any, Any]:
    lines: dict[Any, Any] = {(): decides(*_p(rng, 3))}
    for k in range(K):
        word = (str(rng.choice(WORDS)), float(-rng.random()))
        relevance = _p(rng, 2)
        lines[(f"T{k}",)] = said(word, rel=relevance, sup=_p(rng, 3) if relevance[0] > 0.5 else None, use=_p(rng, 5))
    lines[("[No Retrieval]",)] = said(str(rng.choice(WORDS)), use=_p(rng, 5))
    return lines


def _generator(**more: Any) -> ScriptedGenerator:
    rng = np.random.default_rng(7)
    return ScriptedGenerator({question: _script(rng) for question in QUESTIONS}, **more)


HITS = tuple(Hit(Passage(f"p{k}", f"text {k}", f"T{k}"), k, 1.0 - 0.1 * k, k + 1) for k in range(K))
ASKED = Asked(QUESTIONS, [HITS] * len(QUESTIONS))


def _asked(k: int) -> Asked:
    return Asked(QUESTIONS, [HITS[:k]] * len(QUESTIONS))


def _same(answer: Answer) -> Answer:
    """Without the seconds, and the counts of what computed it."""
    assert answer.trace is not None
    return replace(answer, trace={**answer.trace, "cost": None})


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("candidates") / "base"
    cache = CandidateCache(IDENTITY)
    record(_generator(), ASKED, SelfRagDecode(kind="self_rag", form="short"), cache=cache)
    cache.save(folder)
    return folder


SETTINGS = [
    {},
    {"threshold": 0.0},
    {"threshold": 1.0},
    {"threshold": 0.6, "weights": {"seq": 0.3, "rel": 2.0, "sup": 0.1, "use": 1.5}},
    {"threshold": None},
    {"retrieve": "always", "prune": {"kind": "bound"}},
    {"retrieve": "always", "prune": {"kind": "top_m", "m": 2}, "absent": "neutral"},
    {"retrieve": "never"},
    {"threshold": 0.1, "seq": "mean_logprob", "seq_tokens": "text"},
    {"threshold": 0.1, "max_new_tokens": 100, "labels": ["true", "false", "Paris"], "aggregate": "logsumexp"},
    {"target_rate": 0.5},
    {"threshold": 0.0, "all_irrelevant": "no_retrieval", "rule": "three_way"},
    {"threshold": 0.0, "require": ["fully", {"min_use": 3}], "on_empty": "no_retrieval"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_rescored_is_live_bit_for_bit(recorded: Path, settings: dict[str, Any]) -> None:
    decode, live, kept = SelfRagDecode(kind="self_rag", form="short", **settings), _generator(), _generator()
    for k in (K, 2):
        expected = self_rag(live, _asked(k), decode)
        found = replay(kept, _asked(k), decode, cache=CandidateCache.open(recorded, IDENTITY))
        assert [_same(answer) for answer in found if answer] == [_same(answer) for answer in expected]
    assert kept.cost.calls == 0
    assert live.cost.calls > 0


def test_recording_itself_answers_as_live_does() -> None:
    decode = SelfRagDecode(kind="self_rag", form="short", threshold=0.4)
    answers = record(_generator(), ASKED, decode, cache=CandidateCache())
    assert [_same(a) for a in answers] == [_same(a) for a in self_rag(_generator(), ASKED, decode)]


@pytest.mark.parametrize("name", list(IDENTITY))
def test_another_prompt_refuses_the_cache(recorded: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"another {name}") as caught:
        CandidateCache.open(recorded, {**IDENTITY, name: "other"})
    assert "--cache" in str(caught.value)


def test_an_unfinished_cache_is_none(recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no finished candidates"):
        CandidateCache.open(tmp_path / "nothing")


def test_what_was_never_written_is_incomplete_and_can_be_filled(recorded: Path) -> None:
    cache, other = CandidateCache.open(recorded, IDENTITY), _generator()
    decode = SelfRagDecode(kind="self_rag", form="short", max_new_tokens=2, threshold=0.0)
    assert replay(other, ASKED, decode, cache=cache) == [None] * len(QUESTIONS)
    assert other.cost.calls == 0
    filled = replay(other, ASKED, decode, cache=cache, fill=True)
    assert [_same(a) for a in filled if a] == [_same(a) for a in self_rag(_generator(), ASKED, decode)]
    spent = other.cost.calls
    assert spent > 0
    assert replay(other, ASKED, decode, cache=cache) is not None
    assert None not in replay(other, ASKED, decode, cache=cache)
    assert other.cost.calls == spent


def test_one_question_that_was_never_written_leaves_the_others_their_rate(recorded: Path) -> None:
    longer = Hit(Passage("new", "never read", "T0"), K, 0.1, K + 1)
    asked = Asked(QUESTIONS, [*[HITS] * (len(QUESTIONS) - 1), (longer,)])
    decode = SelfRagDecode(kind="self_rag", form="short", target_rate=1.0)
    found = replay(_generator(), asked, decode, cache=CandidateCache.open(recorded, IDENTITY))
    expected = self_rag(_generator(), asked, decode)
    assert [answer and _same(answer) for answer in found] == [*map(_same, expected[:-1]), None]
    strange = Asked(["question 0? really?"], [HITS])
    assert replay(_generator(), strange, decode, cache=CandidateCache.open(recorded, IDENTITY)) == [None]


def test_a_cache_that_cannot_be_written_leaves_the_old_one(recorded: Path, tmp_path: Path) -> None:
    cache = CandidateCache.open(recorded)
    cache.save(tmp_path / "kept")
    cache.questions.append({"what": object()})  # no JSON: stops half-way
    with pytest.raises(TypeError):
        cache.save(tmp_path / "kept")
    assert len(CandidateCache.open(tmp_path / "kept").questions) == len(QUESTIONS)
    cache.questions.pop()
    cache.save(tmp_path / "kept")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_draws_are_not_kept() -> None:
    with pytest.raises(RecipeError, match="draws are not kept"):
        record(_generator(), ASKED, SelfRagDecode(kind="self_rag", form="short", temperature=0.7), cache=CandidateCache())


def test_a_replay_asks_no_model(recorded: Path) -> None:
    like = _generator()
    says = Replay(CandidateCache.open(recorded), like)
    self_rag(says, ASKED, SelfRagDecode(kind="self_rag", form="short"))
    assert says.cost.calls == like.cost.calls == len(like.prompts) == 0


# the long form


USE = (0.1, 0.1, 0.1, 0.1, 0.6)
BELOW = {"T0": ((0.6, 0.4), (0.3, 0.3, 0.4)), "T1": ((0.7, 0.3), (0.4, 0.3, 0.3)), "T2": ((0.5, 0.5), (0.1, 0.1, 0.8))}


def grown_tree() -> ScriptedGenerator:
    """T0 ends at level 1, T1 and T2 go on to each of the three."""
    on = (0.05, 0.9, 0.05)
    script: dict[Any, Any] = {
        (): decides(0.05, 0.9),
        ("T0",): said("zero", rel=(0.95, 0.05), sup=(0.9, 0.05, 0.05), use=USE),
        ("T1",): said("one", rel=(0.9, 0.1), sup=(0.6, 0.3, 0.1), then=on),
        ("T2",): said("two", rel=(0.8, 0.2), sup=(0.2, 0.6, 0.2), then=on),
    }
    for parent in ("T1", "T2"):
        for title, (relevance, support) in BELOW.items():
            script[parent, title] = said(f"{parent}{title}", rel=relevance, sup=support, use=USE)
    return ScriptedGenerator(script)


TREE = Asked(["who?"], [HITS[:3]], k=3)


def _long(**changes: Any) -> SelfRagDecode:
    given = {"passages": "static", "max_segments": 2, "weights": {"seq": 0.0}, "beam": 2, **changes}
    return SelfRagDecode(kind="self_rag", form="long", **given)


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"combine": "product"}, {"combine": "sum", "n_best": 5}, {"combine": "by_component"}, {"beam": 1},
        {"max_segments": 1}, {"weights": {"seq": 1.0, "rel": 0.1, "sup": 2.0, "use": 0.0}},
        {"prune": {"kind": "top_m", "m": 2}}, {"absent": "neutral"}, {"require": ["supported"]},
    ],
    ids=str,
)  # fmt: skip
def test_a_rescored_tree_is_the_live_one_bit_for_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    cache = CandidateCache(IDENTITY)
    record(grown_tree(), TREE, _long(), cache=cache)
    cache.save(tmp_path / "tree")
    decode, live, kept = _long(**changes), grown_tree(), grown_tree()
    found = replay(kept, TREE, decode, cache=CandidateCache.open(tmp_path / "tree", IDENTITY))
    assert [_same(answer) for answer in found if answer] == [_same(answer) for answer in self_rag(live, TREE, decode)]
    assert (kept.cost.calls, live.cost.calls > 0) == (0, True)


def test_an_incomplete_tree_says_so_and_grows_on_demand() -> None:
    cache, kept = CandidateCache(), grown_tree()
    record(grown_tree(), TREE, _long(beam=1), cache=cache)
    wider = _long(combine="sum", weights={"seq": 0.0, "rel": 0.0, "sup": 1.0, "use": 0.0})
    assert replay(kept, TREE, wider, cache=cache) == [None]
    assert kept.cost.calls == 0
    filled = replay(kept, TREE, wider, cache=cache, fill=True)
    assert [_same(answer) for answer in filled if answer] == [_same(answer) for answer in self_rag(grown_tree(), TREE, wider)]
    assert kept.cost.calls > 0


# sweeps


def _quality(text: str, place: int) -> float:
    return float(len(text) * (place + 1))


@pytest.mark.parametrize("labels", [(), ("true", "false", "Paris")], ids=["open", "closed"])
def test_a_sweep_is_what_live_decoding_answers(recorded: Path, labels: tuple[str, ...]) -> None:
    base = SelfRagDecode(kind="self_rag", form="short", labels=labels, max_new_tokens=100)
    table = Table.of(CandidateCache.open(recorded), base, _quality)
    rng = np.random.default_rng(0)
    for _ in range(12):
        w, delta, k = rng.uniform(0, 2, 4), float(rng.random()), int(rng.integers(1, K + 1))
        how = str(rng.choice(["sum", "max", "mean", "logsumexp"])) if labels else "sum"
        own = dict(zip(("seq", "rel", "sup", "use"), w.tolist(), strict=True))
        said = {"threshold": delta, "weights": own} | ({"aggregate": how} if labels else {})
        _is_live(table, SelfRagDecode.model_validate({**base.model_dump(exclude_unset=True), **said}), k)


@pytest.mark.parametrize("how", [{}, {"absent": "neutral"}, {"seq_tokens": "text", "seq": "prob"}], ids=str)
def test_the_figures_in_arrays_are_the_live_ones_bit_for_bit(recorded: Path, how: dict[str, Any]) -> None:
    decode = SelfRagDecode(kind="self_rag", threshold=0.0, **how)
    parts = Table.of(CandidateCache.open(recorded), decode, _quality).parts
    for place, answer in enumerate(self_rag(_generator(), ASKED, decode)):
        assert answer.trace is not None
        for one in answer.trace["candidates"]:
            for name in ("seq", "rel", "sup", "use"):
                assert getattr(parts, name)[place, one["rank"] - 1] == one[name]


def _is_live(table: Table, decode: SelfRagDecode, k: int) -> list[Answer]:
    """The answers of live decoding, to which the arrays are equal."""
    assert decode.threshold is not None
    found = table.outcome(
        decode.threshold, weights(decode), k=k, how=decode.aggregate, require=decode.require, on_empty=decode.on_empty,
        all_irrelevant=decode.all_irrelevant, abstain_margin=decode.abstain_margin,
    )  # fmt: skip
    live = self_rag(_generator(), _asked(k), decode)
    traces = [answer.trace or {} for answer in live]
    assert found.retrieved.tolist() == [trace["retrieved"] for trace in traces]
    assert found.quality.tolist() == [_quality(answer.text, place) for place, answer in enumerate(live)]
    assert found.generated.tolist() == [trace["cost"]["generated"] for trace in traces]
    return live


REQUIRED: tuple[list[Any], ...] = (
    [],
    ["relevant"],
    ["supported"],
    ["fully", "relevant"],
    ["fully", {"min_use": 4}],
    [{"min_use": 5}],
)


@pytest.mark.parametrize("by", ["token", "probability"])
@pytest.mark.parametrize("labels", [(), ("true", "false", "Paris")], ids=["open", "closed"])
@pytest.mark.parametrize("on_empty", ["relax", "no_retrieval", "drop"])
def test_hard_constraints_as_arrays_are_those_of_live_decoding(
    recorded: Path, labels: tuple[str, ...], on_empty: str, by: str
) -> None:
    said = {"on_empty": on_empty, "require_by": by, "max_new_tokens": 100, **({"labels": labels} if labels else {})}
    base = SelfRagDecode(kind="self_rag", **said)
    table = Table.of(CandidateCache.open(recorded), base, _quality)
    texts = set()
    irrelevant = (("best", 0.0), ("no_retrieval", 0.3), ("abstain", 0.0)) * 2
    for require, (poor, delta) in zip(REQUIRED, irrelevant, strict=True):
        more = {"threshold": delta, "all_irrelevant": poor} | ({"abstain_margin": 0.4} if labels else {})
        live = _is_live(table, SelfRagDecode(kind="self_rag", **{**said, **more, "require": require}), K)
        texts.add(tuple(answer.text for answer in live))
    assert len(texts) > 2


@pytest.mark.parametrize("settings", [{"retrieve": "always"}, {"prune": {"kind": "tau", "tau": 0.5}}, {"form": "long"}])
def test_a_sweep_refuses_what_is_no_array(recorded: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="--rescore"):
        Table.of(CandidateCache.open(recorded), SelfRagDecode(**{"kind": "self_rag", "form": "short", **settings}), _quality)


def test_a_thousand_settings_take_about_a_second() -> None:
    """1,000 settings × 1,000 questions × 10 candidates; the processor's own seconds, with room for a busy machine."""
    rng = np.random.default_rng(0)
    n, k = 1000, 10
    table = Table(
        r=rng.random(n), parts=Components(*rng.random((4, n, k))), present=np.ones((n, k), bool),
        lengths=rng.integers(1, 30, (n, k)), without=rng.integers(1, 30, n), good=rng.random((n, k)), plain=rng.random(n),
        places=None, labelled=np.zeros((n, 0)),
    )  # fmt: skip
    began = time.process_time()
    kept = [
        table.outcome(float(d), Weights(*w), k=k).quality.mean()
        for d, w in zip(rng.random(250), rng.random((250, 4)), strict=True)
    ]
    assert len(set(kept)) == 250
    assert (time.process_time() - began) * 4 < 2.0
