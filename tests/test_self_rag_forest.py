"""Trees searched as arrays: text, retrieval, ids written and what is lacking are those of a replay, whatever the settings."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raglan.decode.base import Asked
from raglan.decode.self_rag.cache import CandidateCache, Uncached
from raglan.decode.self_rag.forest import Forest, Found, Grid, beyond
from raglan.decode.self_rag.planting import plant
from raglan.decode.self_rag.recording import record, replay
from raglan.decode.self_rag.trees import Trees
from raglan.errors import GeneratorError
from raglan.recipe import SelfRagDecode, SweepSettings
from raglan.records import Answer, Hit, Passage
from raglan.sweep_settings import Setting, settings_of
from raglan.sweep_trials import Trials, sweep
from test_self_rag_cache import TREE, grown_tree
from tiny import ScriptedGenerator, decides, said

QUESTIONS = ["question one?", "question two?", "question three?"]
K, DEPTH = 3, 3
TITLES = ("T0", "T1", "T2", "T3")
HITS = tuple(Hit(Passage(f"p{k}", f"text {k}", f"T{k}"), k, 1.0 - 0.1 * k, k + 1) for k in range(len(TITLES)))


def _p(rng: np.random.Generator, size: int) -> tuple[float, ...]:
    return tuple(rng.dirichlet(np.ones(size)).tolist())


def _script(rng: np.random.Generator, *, alike: bool) -> dict[Any, Any]:
    """Every path of up to three segments. `alike`: paths that say the same, or nothing, are among them."""
    lines: dict[Any, Any] = {(): decides(*_p(rng, 3))}
    number = itertools.count()
    for depth in range(1, DEPTH + 1):
        for path in itertools.product((*TITLES, "[No Retrieval]", "[Continue to Use Evidence]"), repeat=depth):
            if path[:-1] not in lines or _ended(lines[path[:-1]]) or (path[0].startswith("[Cont")):
                continue
            read = path[-1] in TITLES
            words = [f"w{rng.integers(5)}"] * int(rng.integers(0, 3)) if alike else [f"u{next(number)}x{rng.integers(10**6)}"]
            relevance = _p(rng, 2)
            lines[path] = said(
                *[(word, float(-rng.random())) for word in words], rel=relevance if read else None,
                sup=_p(rng, 3) if read and rng.random() < 0.8 else None, use=_p(rng, 5) if rng.random() < 0.6 else None,
                then="</s>" if rng.random() < 0.15 else _p(rng, 3),
            )  # fmt: skip
    return lines


def _ended(line: Any) -> bool:
    return bool(line[-1].token == "</s>")


class Finds:
    """Passages of a text, drawn by its characters; `again` only what was asked for before."""

    def __init__(self) -> None:
        self.found: dict[str, list[Hit]] = {}

    def __call__(self, query: str, k: int) -> list[Hit]:
        rng = np.random.default_rng(sum(map(ord, query)))
        some = rng.permutation(len(HITS))[: int(rng.integers(1, K + 1))]
        self.found[query] = [replace(HITS[place], rank=rank) for rank, place in enumerate(some.tolist(), 1)]
        return self.found[query][:k]

    def again(self, query: str, k: int) -> list[Hit]:
        if query not in self.found:
            raise Uncached(f"no recorded run searched for {query!r}", hint="")
        return self.found[query][:k]


def _asked(k: int) -> Asked:
    """Each question with its own passages, of which some have the same names."""
    return Asked(QUESTIONS, [[_worded(hit, one) for hit in HITS[:k]] for one in QUESTIONS], k=k)


def _worded(hit: Hit, question: str) -> Hit:
    return replace(hit, passage=replace(hit.passage, text=f"{hit.passage.text} of {question}"))


def _decode(**settings: Any) -> SelfRagDecode:
    return SelfRagDecode.model_validate({"kind": "self_rag", "form": "long", **settings})


def _drawn(rng: np.random.Generator, **axes: Any) -> dict[str, Any]:
    return {name: values[int(rng.integers(len(values)))] for name, values in axes.items()}


def _soil(rng: np.random.Generator) -> dict[str, Any]:
    """What nodes are made with."""
    return _drawn(
        rng, passages=("static", "dynamic", "hybrid"), query=("question+last", "question", "last"), dedup=("path", "none"),
        on_length=("finish", "drop"), absent_step=("inherit", "zero", 0.7), absent=("zero", "neutral"),
        require_by=("token", "probability"), seq=("exp_mean", "prob"), max_new_tokens=(4, 50, 50),
    )  # fmt: skip


def _weather(rng: np.random.Generator) -> dict[str, Any]:
    """What settings that are searched together share."""
    shared = _drawn(rng, retrieve=("adaptive", "adaptive", "always", "never"), stop=("bound", "never"))
    shared |= _drawn(rng, rule=("two_way", "three_way"), calibration=(None, {"kind": "temperature", "temperature": 2.0}))
    if shared["retrieve"] == "adaptive":
        shared |= _drawn(rng, target_rate=(None, None, 0.5))
    return shared


REQUIRED: tuple[Any, ...] = ([], [], ["relevant"], ["supported"], ["fully"], ["fully", {"min_use": 3}], [{"min_use": 4}])


def _own(rng: np.random.Generator, soil: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    combine = ("mean", "sum", "product") if isinstance(soil["absent_step"], float) else ("product", "by_component", "mean")
    weights = dict(zip(("seq", "rel", "sup", "use"), rng.uniform(0, 1.5, 4).round(1).tolist(), strict=True))
    own = _drawn(
        rng, threshold=(0.0, 0.3, 0.6, 1.0, None), beam=(1, 2, 3), max_segments=(1, 2, 3, 3), combine=combine,
        require=REQUIRED, on_empty=("relax", "no_retrieval", "drop"),
    )  # fmt: skip
    if shared.get("target_rate") is not None:
        del own["threshold"]
    return {**own, "weights": weights}


def _recorded(seed: int, soil: dict[str, Any]) -> tuple[CandidateCache, Finds, ScriptedGenerator]:
    """Candidates of two runs, one that retrieves when it likes and one that always does and falls back."""
    rng, finds, cache = np.random.default_rng(seed), Finds(), CandidateCache()
    script = {question: _script(rng, alike=soil["keep_passages"] == "all") for question in QUESTIONS}
    for how in ({"threshold": 0.4, "beam": 3}, {"retrieve": "always", "require": ["fully"], "on_empty": "no_retrieval"}):
        decode = _decode(**soil, **how, max_segments=DEPTH, combine="mean")
        record(ScriptedGenerator(script), _asked(K), decode, cache=cache, retrieve=finds)
    return cache, finds, ScriptedGenerator(script)


def _is_the_replay(found: Found, trees: Trees, place: int, answers: list[Answer | None]) -> None:
    assert found.lacking[place].tolist() == [answer is None for answer in answers]
    for column, answer in enumerate(answers):
        if answer is not None:
            assert answer.trace is not None
            assert trees.texts[found.text[place, column]] == answer.text
            assert found.retrieved[place, column] == answer.trace["retrieved"]
            assert found.generated[place, column] == answer.trace["cost"]["generated"]


@pytest.mark.parametrize("seed", range(12))
def test_the_search_over_arrays_is_the_replay(seed: int) -> None:
    rng = np.random.default_rng(seed)
    soil = _soil(rng) | {"keep_passages": ("all", 1, 0)[seed % 3]}
    cache, finds, generator = _recorded(seed, soil)
    trees = plant(cache, generator, _asked(K), _decode(**soil), retrieve=finds.again)
    assert trees is not None
    answered = lacking = 0
    for _ in range(3):
        shared = _weather(rng)
        own = [_decode(**soil, **shared, **_own(rng, soil, shared)) for _ in range(8)]
        ks = rng.integers(1, K + 1, len(own)).tolist()
        planted = Forest(trees, _decode(**soil, **shared), exact=True)
        thresholds = [planted.threshold if one.target_rate is not None else one.threshold for one in own]
        found = planted.search(replace(Grid.of(own, ks), threshold=thresholds))
        apart = planted.search(replace(Grid.of(own, ks), threshold=thresholds), at_once=1)
        assert all(np.array_equal(value, getattr(apart, name)) for name, value in vars(found).items())
        for place, (one, k) in enumerate(zip(own, ks, strict=True)):
            answers = replay(generator, _asked(k), one, cache=cache, retrieve=finds.again)
            _is_the_replay(found, trees, place, answers)
            lacking += answers.count(None)
            answered += len(answers) - answers.count(None)
    assert answered > 5
    assert generator.cost.calls == 0


# the worked example


def _long(**changes: Any) -> SelfRagDecode:
    return _decode(**{"passages": "static", "max_segments": 2, "weights": {"seq": 0.0}, "beam": 2, **changes})


@pytest.fixture(scope="module")
def example() -> CandidateCache:
    cache = CandidateCache()
    record(grown_tree(), TREE, _long(), cache=cache)
    return cache


def _texts(cache: CandidateCache, settings: list[SelfRagDecode]) -> list[str]:
    assert cache.trees is not None
    found = Forest(cache.trees, settings[0], exact=True).search(Grid.of(settings, [3] * len(settings)))
    assert not found.lacking.any()
    return [cache.trees.texts[place] for place in found.text[:, 0].tolist()]


def test_the_worked_example(example: CandidateCache) -> None:
    combines = ["mean", "sum", "product", "by_component"]
    assert _texts(example, [_long(combine=name) for name in combines]) == ["zero", "one T1T1", "one T1T1", "zero"]
    assert _texts(example, [_long(combine="sum", max_segments=depth) for depth in (1, 2)]) == ["zero", "one T1T1"]


def _searched(cache: CandidateCache, generator: ScriptedGenerator, settings: list[SelfRagDecode]) -> Found:
    """What settings with one way to stop come to, equal to their replays."""
    assert cache.trees is not None
    found = Forest(cache.trees, settings[0], exact=True).search(Grid.of(settings, [3] * len(settings)))
    for place, own in enumerate(settings):
        _is_the_replay(found, cache.trees, place, replay(generator, TREE, own, cache=cache))
    return found


def test_the_bound_stops_where_live_decoding_does(example: CandidateCache) -> None:
    combines = ("mean", "sum", "product", "by_component")
    found = {
        how: _searched(example, grown_tree(), [_long(combine=name, stop=how) for name in combines])
        for how in ("bound", "never")
    }
    assert (found["bound"].text == found["never"].text).all()
    sooner = found["bound"].generated < found["never"].generated
    assert sooner[:, 0].tolist() == [True, False, False, False]  # (1.65 + 2.5) ÷ 2 < 2.125


def test_of_equal_texts_the_better_path_lives_on() -> None:
    """T0 and T1 say the same, so T2 has the second place in the beam, and the best answer is below it."""
    on, script = (0.05, 0.9, 0.05), dict[Any, Any]()
    script[()] = decides(0.05, 0.9)
    for title, (word, relevance) in {"T0": ("same", 0.9), "T1": ("same", 0.8), "T2": ("other", 0.7)}.items():
        script[(title,)] = said(word, rel=(relevance, 1 - relevance), sup=(0.6, 0.3, 0.1), then=on)
        for below in ("T0", "T1", "T2"):
            best = (title, below) == ("T2", "T2")
            script[title, below] = said(f"{title}{below}", rel=(0.9, 0.1) if best else (0.5, 0.5), sup=(0.6, 0.3, 0.1))
    cache, generator = CandidateCache(), ScriptedGenerator(script)
    record(generator, TREE, _long(keep_passages="all"), cache=cache)
    found = _searched(cache, generator, [_long(keep_passages="all", beam=beam) for beam in (1, 2)])
    assert cache.trees is not None
    assert [cache.trees.texts[place] for place in found.text[:, 0].tolist()] == ["same T0T0", "other T2T2"]


def test_products_that_tie_are_told_apart_by_their_means() -> None:
    """Both products are 0, as a factor is negative; the one that ends later is less bad. T1 says what T0 does, and lives on."""
    poor, fair, on = (0.9, 0.1, 0.0, 0.0, 0.0), (0.0, 0.3, 0.7, 0.0, 0.0), (0.05, 0.9, 0.05)
    script: dict[Any, Any] = {
        (): decides(0.05, 0.9), ("T0",): said("word", rel=(0.9, 0.1), use=poor),
        ("T1",): said("word", rel=(0.9, 0.1), use=fair, then=on), ("T2",): said("next", rel=(0.9, 0.1), use=poor),
    }  # fmt: skip
    script |= {("T1", below): said(f"more{below}", rel=(0.9, 0.1), use=fair) for below in ("T0", "T1", "T2")}
    cache, generator = CandidateCache(), ScriptedGenerator(script)
    only_use = {"seq": 0.0, "rel": 0.0, "sup": 0.0, "use": 1.0}
    record(generator, TREE, _long(weights=only_use, keep_passages="all"), cache=cache)
    found = _searched(cache, generator, [_long(weights=only_use, combine="product", keep_passages="all")])
    assert cache.trees is not None
    assert cache.trees.texts[found.text[0, 0]] == "word moreT0"


def test_a_path_whose_last_way_out_breaks_a_constraint_is_lost() -> None:
    script: dict[Any, Any] = {
        (): decides(0.05, 0.9), ("T0",): said("zero", rel=(0.9, 0.1), sup=(0.1, 0.8, 0.1)),
        ("T1",): said("one", rel=(0.9, 0.1), sup=(0.8, 0.1, 0.1), then=(0.05, 0.9, 0.05)),
        ("T2",): said("two", rel=(0.9, 0.1), sup=(0.1, 0.8, 0.1)),
        ("T1", "[No Retrieval]"): said("unaided", use=(0.9, 0.1, 0.0, 0.0, 0.0)),
    }  # fmt: skip
    script |= {("T1", below): said(f"more{below}", rel=(0.9, 0.1), sup=(0.1, 0.8, 0.1)) for below in ("T0", "T1", "T2")}
    asks = [["fully", {"min_use": 3}], ["fully"]]
    cache, generator = CandidateCache(), ScriptedGenerator(script)
    own = [_long(require=one, on_empty="no_retrieval") for one in asks]
    record(generator, TREE, own[0], cache=cache)
    found = _searched(cache, generator, own)
    assert cache.trees is not None
    assert [cache.trees.texts[place] for place in found.text[:, 0].tolist()] == ["", "one unaided"]


def test_trees_are_kept(example: CandidateCache, tmp_path: Path) -> None:
    example.save(tmp_path / "tree")
    kept = CandidateCache.open(tmp_path / "tree")
    assert isinstance(kept.replies, Path)
    assert kept.trees is not None
    assert example.trees is not None
    for name, value in vars(example.trees).items():
        same = getattr(kept.trees, name)
        assert np.array_equal(value, same) if isinstance(value, np.ndarray) else value == same
    assert _texts(kept, [_long()]) == ["zero"]
    assert isinstance(kept.replies, Path)  # nothing but the trees was opened
    assert len(kept.written) == len(example.written)


# what is no search over arrays


@pytest.mark.parametrize(
    "changes",
    [
        {"prune": {"kind": "top_m", "m": 2}}, {"released": ["path"]}, {"slots": "all"}, {"n_best": 2}, {"max_calls": 99},
        {"max_passages": 9}, {"max_total_tokens": 99}, {"temperature": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_more_than_arrays_is_said(changes: dict[str, Any]) -> None:
    assert len(beyond(_long(**changes))) == 1
    assert not beyond(_long(stop="never", n_best=2))


def _replays(cache: CandidateCache, asked: list[str]) -> Any:
    def replayed(own: SelfRagDecode, k: int) -> list[Answer | None]:
        asked.append(own.combine)
        return replay(grown_tree(), replace(TREE, hits=[HITS[:k]]), own, cache=cache)

    return replayed


def _quality(text: str, place: int) -> float:
    return len(text) / 10


GRID = SweepSettings.model_validate({"beam": [1, 2], "combine": ["mean", "sum"], "require": [[], ["fully"]], "k": [2, 3]})


def test_trials_search_what_they_can_and_replay_the_rest(example: CandidateCache) -> None:
    told: dict[str, Any] = {}
    for name, changes in (("arrays", {}), ("replayed", {"max_calls": 999})):
        decode, asked = _long(**changes), list[str]()
        trials = Trials(example, decode, _quality, _replays(example, asked))
        found = sweep(settings_of(GRID, decode, k=3, seed=0), trials, questions=1)
        assert len(found.settings) + len(found.needs_generation) == 16
        assert len(asked) == (0 if name == "arrays" else 16)
        told[name] = {key: value for key, value in found.told().items() if key != "seconds"}
    assert told["arrays"] == told["replayed"]
    assert len({one["quality"] for one in told["arrays"]["settings"]}) > 1


def test_trees_of_other_settings_are_planted_or_replayed(example: CandidateCache) -> None:
    decode, asked, planted = _long(absent="neutral"), list[str](), list[SelfRagDecode]()

    def grows(own: SelfRagDecode) -> Trees | None:
        planted.append(own)
        return plant(example, grown_tree(), TREE, own)

    settings = [Setting(None, None, None, None, None, 3, absent=name) for name in ("zero", "neutral")]
    found = Trials(example, decode, _quality, _replays(example, asked), planted=grows)(settings)
    assert ([own.absent for own in planted], asked) == (["neutral"], [])  # the other is there
    assert Trials(example, decode, _quality, _replays(example, asked))(settings) == found
    assert asked == ["mean"]


def test_what_is_lacking_is_filled_in() -> None:
    cache, generator = CandidateCache(), grown_tree()
    record(generator, TREE, _long(beam=1), cache=cache)
    wide = Setting(None, 0.0, 0.0, 1.0, 0.0, 3, combine="sum", beam=2)
    once = Trials(cache, _long(), _quality, lambda own, _: replay(generator, TREE, own, cache=cache))([wide])
    assert once[0].incomplete == 1
    filled = Trials(
        cache, _long(), _quality, lambda own, _: replay(generator, TREE, own, cache=cache, fill=True), fill=True
    )([wide])  # fmt: skip
    assert (filled[0].incomplete, filled[0].quality > 0) == (0, True)
    again = Trials(cache, _long(), _quality, lambda own, _: [], planted=lambda own: plant(cache, generator, TREE, own))
    cache.trees = None
    assert again([wide]) == filled


def test_what_live_decoding_would_refuse_is_not_planted(example: CandidateCache) -> None:
    assert plant(example, grown_tree(), TREE, _long(), most=3) is None  # too large
    assert plant(example, grown_tree(), replace(TREE, queries=["why?"]), _long()) is None  # never asked
    assert plant(example, grown_tree(), replace(TREE, choices=[["a", "b"]]), _long()) is None
    assert plant(example, grown_tree(), TREE, _decode(form="short")) is None
    narrow = grown_tree()
    narrow.positions = 20  # type: ignore[attr-defined]
    assert plant(example, narrow, TREE, _long()) is None
    with pytest.raises(GeneratorError):
        replay(narrow, TREE, _long(), cache=example)


def test_the_means_are_those_of_a_replay_to_the_last_bit() -> None:
    """A sweep's file is the same whichever way it was made."""
    values = np.random.default_rng(0).random((7, 301))
    assert values.mean(1).tolist() == [float(np.mean(row)) for row in values.tolist()]
