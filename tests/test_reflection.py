"""Self-RAG's arithmetic: the worked examples, slow twins in plain Python, arrays equal to single numbers bit for bit."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from raglan.errors import CheckpointError, GeneratorError
from raglan.reflection import (
    NAMES,
    PLACES,
    STANDS,
    Components,
    GrammarError,
    Row,
    Schema,
    Scoring,
    Segment,
    Weights,
    admitted,
    aggregate,
    components,
    continues,
    label_scores,
    largest_step,
    missing_flags,
    normalise_label,
    parse,
    path_bound,
    path_key,
    path_score,
    rel,
    released_boundary,
    released_decision,
    released_path,
    released_rel,
    released_step,
    render,
    retrieve_probability,
    retrieves,
    seq,
    stands,
    step,
    step_bound,
    sup,
    target_threshold,
    use,
    watched,
)

S = Schema.numbered(32000)
EOS, NAN = 2, math.nan
REL, SUP, USE = S.ids["is_rel"], S.ids["is_sup"], S.ids["is_use"]
PUBLISHED = Weights()
NO_SEQ = Weights(seq=0.0)
EVEN = (0.01, 0.02, 0.05, 0.12, 0.80)


def marks(**groups: Any) -> np.ndarray:
    """One row of log-probabilities (M,) from probabilities a role; NaN where none is given."""
    row = np.full(13, NAN)
    for role, p in groups.items():
        with np.errstate(divide="ignore"):
            row[PLACES[role]] = np.log(np.array([NAN if one is None else one for one in p], float))
    return row


def candidate(relevance: Any, words: Any, support: Any = None, utility: Any = EVEN) -> tuple[list[int], np.ndarray, np.ndarray]:
    """IsRel, words, IsSup, IsUse, EOS with their log-probabilities; (Relevant, Irrelevant) as the examples give it."""
    ids, logs, rows = [], [], []

    def write(role: str, p: Any) -> None:
        best = max(range(len(p)), key=lambda at: p[at])
        ids.append(S.ids[role][best])
        logs.append(math.log(p[best]))
        rows.append(marks(**{role: p}))

    write("is_rel", relevance[::-1])
    for place, log in enumerate(words):
        ids.append(100 + place)
        logs.append(log)
        rows.append(marks())
    if support:
        write("is_sup", support)
    write("is_use", utility)
    return [*ids, EOS], np.array([*logs, -0.01]), np.array([*rows, marks()])


def scored(*made: Any, how: Scoring | None = None, retrieved: bool = True) -> Components:
    ids, logs, rows = candidate(*made)
    return components(ids, logs, rows, S, retrieved=retrieved, settings=how or Scoring(), eos=EOS)


SHORT = [
    ((0.90, 0.05), (-0.10, -0.20), (0.70, 0.20, 0.05), (0.01, 0.02, 0.05, 0.12, 0.80)),
    ((0.60, 0.30), (-0.05, -0.05), (0.10, 0.30, 0.50), (0.02, 0.03, 0.10, 0.25, 0.60)),
    ((0.10, 0.85), (-0.30, -0.40), None, (0.30, 0.20, 0.20, 0.10, 0.10)),
]
CLOSED = [
    ((0.95, 0.04), (-0.05,), (0.90, 0.05, 0.03), (0.01, 0.01, 0.02, 0.06, 0.90)),
    ((0.70, 0.25), (-0.40,), (0.40, 0.40, 0.15), (0.02, 0.03, 0.10, 0.25, 0.60)),
    ((0.65, 0.30), (-0.35,), (0.35, 0.45, 0.15), (0.02, 0.03, 0.10, 0.25, 0.60)),
    ((0.20, 0.75), (-0.90,), None, (0.10, 0.20, 0.40, 0.20, 0.10)),
]


def near(expected: Any) -> Any:
    return pytest.approx(expected, abs=1.01e-6)


# the vocabulary


def test_the_published_schema_has_the_published_ids() -> None:
    assert (S.no, S.yes, S.cont, S.irrelevant, S.relevant, S.opens, S.closes) == tuple(range(32000, 32007))
    assert tuple(range(32007, 32012)) == USE
    assert SUP == (32012, 32013, 32014)
    assert S.controls == frozenset(range(32000, 32015))
    assert len(S.marks) == 13
    assert not {S.opens, S.closes} & set(S.marks)
    assert [S.spelling(i) for i in sorted(S.controls)] == list(S.spellings)
    assert all(S.marks[S.place(role)] == S.ids[role] for role in ("retrieve", "is_rel", "is_sup", "is_use"))
    assert all(S.role_of(S.identity(name)) == role for role, names in NAMES.items() for name in names)
    assert Schema.ordered(range(32000, 32015)) == S


def test_a_schema_survives_a_manifest_and_a_pickle() -> None:
    assert Schema.from_dict(json.loads(json.dumps(S.to_dict()))) == S
    assert pickle.loads(pickle.dumps(S)) == S


def test_a_schema_that_cannot_be_is_refused() -> None:
    with pytest.raises(CheckpointError, match="stands for two tokens"):
        Schema({**S.ids, "is_rel": (S.no, S.relevant)})
    with pytest.raises(CheckpointError, match="allowed"):
        Schema({**S.ids, "is_rel": (S.relevant,)})
    with pytest.raises(CheckpointError, match="no reflection token"):
        S.spelling(17)
    with pytest.raises(CheckpointError, match="no reflection token"):
        S.identity("[Utility:6]")


# the worked examples


def test_example_1_short_form() -> None:
    found = [scored(*row) for row in SHORT]
    assert [p.seq for p in found] == near([0.847162, 0.737763, 0.660143])
    assert [p.rel for p in found] == near([0.947368, 0.666667, 0.105263])
    assert [p.sup for p in found] == near([0.842105, 0.277778, 0.0])
    assert [p.use for p in found] == near([0.84, 0.69, -0.277778])
    assert [p.flags for p in found] == [(), (), ("sup:absent",)]
    for weights, expected in [
        (Weights(), [3.056636, 2.027207, 0.626518]),
        (Weights(use=1.0), [3.476636, 2.372207, 0.487629]),
        (Weights(seq=0.0), [2.209474, 1.289444, -0.033626]),
        (Weights(seq=0.0, use=1.0), [2.629474, 1.634444, -0.172515]),
    ]:
        assert [step(p, weights) for p in found] == near(expected)
    bounds = [step_bound(p.rel, PUBLISHED) for p in found]
    assert bounds == near([3.447368, 3.166667, 2.605263])
    assert [bound < step(found[0], PUBLISHED) for bound in bounds] == [False, False, True]


@pytest.mark.parametrize(
    ("yes", "no", "released", "paper"),
    [
        (0.9, 0.05, 0.033975, 0.947368),
        (0.5, 0.4, 0.430677, 0.555556),
        (0.2, 0.75, 0.848359, 0.210526),
        (0.05, 0.9, 0.966025, 0.052632),
        (0.001, 0.95, 0.992629, 0.001052),
        (0.95, 0.001, 0.007371, 0.998948),
    ],
)
def test_example_2_decision(yes: float, no: float, released: float, paper: float) -> None:
    row = marks(retrieve=(no, yes, 0.01))
    assert released_decision(row) == near(released)
    assert retrieve_probability(row) == near(paper)
    assert retrieves(retrieve_probability(row), 0.2) is (paper > 0.2)
    assert retrieves(released_decision(row), 0.2) is (released > 0.2)


def test_example_3_the_sum_turns_the_answer() -> None:
    found = [scored(*row) for row in CLOSED]
    on, off = [step(p, PUBLISHED) for p in found], [step(p, NO_SEQ) for p in found]
    assert [p.seq for p in found] == near([0.937627, 0.644837, 0.657032, 0.589493])
    assert on == near([3.298601, 2.358258, 2.291505, 0.800019])
    assert off == near([2.360974, 1.713421, 1.634474, 0.210526])
    assert on[0] == max(on)
    labels = ["A", "B", "B", "C"]
    for scores, expected in ((on, [4.649763, 3.298601, 0.800019]), (off, [3.347895, 2.360974, 0.210526])):
        summed = aggregate(labels, scores, "sum")
        assert [label for label, _ in summed] == ["B", "A", "C"]
        assert [score for _, score in summed] == near(expected)
        assert aggregate(labels, scores, "max")[0][0] == aggregate(labels, scores, "mean")[0][0] == "A"
    smooth = dict(aggregate(labels, on, "logsumexp"))
    assert (smooth["A"], smooth["B"]) == near((3.298601, 3.018586))


def test_example_4_weights() -> None:
    fluent = scored((0.97, 0.02), (-0.02,), (0.05, 0.35, 0.60), (0.001, 0.002, 0.05, 0.15, 0.79))
    grounded = scored((0.80, 0.18), (-0.60,), (0.75, 0.20, 0.04), (0.05, 0.10, 0.30, 0.40, 0.14))
    assert (fluent.seq, fluent.rel, fluent.sup, fluent.use) == near((0.850950, 0.979798, 0.225, 0.869084))
    assert (grounded.seq, grounded.rel, grounded.sup, grounded.use) == near((0.665363, 0.816327, 0.858586, 0.242424))
    pairs = [(step(fluent, Weights(sup=w)), step(grounded, Weights(sup=w))) for w in (0.0, 0.5, 1.0, 2.0)]
    assert pairs == [
        near((2.265290, 1.602901)), near((2.377790, 2.032194)), near((2.490290, 2.461487)), near((2.715290, 3.320073)),
    ]  # fmt: skip


def _parts(relevance: float, support: tuple[float, float, float], utility: float = 0.5) -> Components:
    return Components(0.0, relevance, support[0] + 0.5 * support[1], utility)


TREE = {
    "p0": _parts(0.95, (0.90, 0.05, 0.05)), "p1": _parts(0.90, (0.60, 0.30, 0.10), 0.0),
    "p2": _parts(0.80, (0.20, 0.60, 0.20), 0.0), "q0": _parts(0.6, (0.3, 0.3, 0.4)),
    "q1": _parts(0.7, (0.4, 0.3, 0.3)), "q2": _parts(0.5, (0.1, 0.1, 0.8)),
}  # fmt: skip


def test_example_5_a_tree() -> None:
    own = {name: step(parts, NO_SEQ) for name, parts in TREE.items()}
    assert list(own.values()) == near([2.125, 1.65, 1.3, 1.3, 1.5, 0.9])
    expected = {
        "p1": {"product": [2.145, 2.475, 1.485], "sum": [2.95, 3.15, 2.55], "mean": [1.475, 1.575, 1.275]},
        "p2": {"product": [1.69, 1.95, 1.17], "sum": [2.6, 2.8, 2.2], "mean": [1.3, 1.4, 1.1]},
    }
    for parent, table in expected.items():
        for combine, scores in table.items():
            assert [path_score([own[parent], own[q]], combine) for q in ("q0", "q1", "q2")] == near(scores)  # type: ignore[arg-type]
    assert path_score([0, 0], "by_component", [TREE["p1"], TREE["q1"]], weights=NO_SEQ) == near(1.7)
    released = {name: released_step(parts) for name, parts in TREE.items()}
    assert list(released.values())[:3] == near([1.875, 1.65, 1.3])
    assert [released[q] for q in ("q0", "q1", "q2")] == near([1.05, 1.25, 0.65])
    assert [released_path([released["p1"], released[q]]) for q in ("q0", "q1", "q2")] == near([1.7325, 2.0625, 1.0725])


def test_example_6_missing() -> None:
    only = marks(is_rel=(None, 0.9))
    assert rel(only, missing="floor") == near(1.0)
    assert rel(marks(), missing="floor") == near(0.5)
    assert sup(marks(is_sup=(0.5, None, None)), missing="floor") == near(1.0)
    assert sup(marks(is_sup=(0.5, 0.3, 0.2))) == near(0.65)
    assert released_rel(only) == near(-0.009082)
    assert released_rel(marks()) == near(0.5)
    boundary = marks(retrieve=(0.6, 0.2, 0.1))
    assert released_boundary(boundary) == near(0.375)
    assert retrieve_probability(boundary, rule="bounded") == near(0.333333)
    assert retrieve_probability(boundary) == near(0.25)
    assert retrieve_probability(boundary, rule="three_way") == near(0.222222)


# decisions


def test_decisions_at_their_borders() -> None:
    half = marks(retrieve=(0.3, 0.3, 0.1))
    assert retrieve_probability(half) == 0.5
    assert retrieves(0.5, 0.5) is False
    assert retrieves(1e-9, 0.0) is True
    assert retrieves(1.0, 1.0) is False
    never = marks(retrieve=(0.9, 0.0, 0.0))
    assert retrieve_probability(never) == 0.0
    assert retrieves(retrieve_probability(never), 0.0) is False
    assert retrieve_probability(marks(retrieve=(0.0, 0.0, 0.0))) == 0.0
    assert retrieve_probability(marks(retrieve=(0.0, 1e-30, 0.0))) == 1.0
    assert bool(retrieves(np.array([0.3]), np.array(0.2))[0]) is retrieves(np.float64(0.3), np.float64(0.2)) is True


def test_continue_only_when_it_is_likeliest() -> None:
    assert continues(marks(retrieve=(0.2, 0.3, 0.4))) is True
    assert continues(marks(retrieve=(0.2, 0.4, 0.4))) is False
    assert continues(marks(retrieve=(0.2, 0.3, None))) is False
    assert continues(np.stack([marks(retrieve=(0.2, 0.3, 0.4)), marks(retrieve=(0.5, 0.3, 0.1))])).tolist() == [True, False]


@settings(max_examples=40)
@given(st.floats(-60, 0), st.floats(-60, 0), st.floats(0.01, 20))
def test_r_rises_with_the_probability_of_retrieval(yes: float, no: float, more: float) -> None:
    row, higher = np.full((2, 13), NAN)
    row[:2], higher[:2] = (no, yes), (no, yes + more)
    before, after = retrieve_probability(row), retrieve_probability(higher)
    assert 0 <= before <= after <= 1
    assert before == pytest.approx(1 / (1 + math.exp(no - yes)), rel=1e-12)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40, unique=True), st.integers(0, 40))
def test_a_target_rate_is_met(values: list[float], wanted: int) -> None:
    wanted = min(wanted, len(values))
    delta = target_threshold(values, wanted / len(values))
    positive = sum(value > 0 for value in values)
    assert sum(retrieves(value, delta) for value in values) == min(wanted, positive)


# the grammar as an automaton


@settings(max_examples=60)
@given(st.data())
def test_the_automaton_admits_what_the_parser_takes_and_nothing_else(data: st.DataObject) -> None:
    """A way drawn from the table, and at each of its stations every id: the parser faults exactly what the table leaves out."""
    ids = watched(S, EOS)
    marks, words = admitted(S, EOS)
    row: list[int] = []
    for _ in range(data.draw(st.integers(0, 14))):
        at = stands([*row, 0], S)[-1]
        options = [token for token, ok in zip(ids, marks[at], strict=True) if ok] + [7] * words[at]
        row.append(data.draw(st.sampled_from(options)))
        if row[-1] == EOS:
            break
    if row[-1:] == [EOS]:
        assert parse(row, S, eos=EOS).ended
        return
    at = stands([*row, 0], S)[-1]
    for token, ok in (*zip(ids, marks[at], strict=True), (7, words[at])):
        assert taken([*row, token]) == ok, (STANDS[at], token)


def taken(row: list[int]) -> bool:
    """Whether the parser finds no fault with the last id of a row."""
    try:
        parse(row, S, eos=EOS)
    except GrammarError as fault:
        return fault.position >= len(row)
    return True


# what is missing


@pytest.mark.parametrize(("role", "score", "even"), [("is_rel", rel, 0.5), ("is_sup", sup, 0.5), ("is_use", use, 0.0)])
def test_each_policy_for_each_group(role: str, score: Any, even: float) -> None:
    size = len(NAMES[role])
    nothing, part = marks(), marks(**{role: [0.5, *[None] * (size - 1)]})
    for row, flag in ((nothing, "no_evidence"), (part, "partial"), (marks(**{role: [1 / size] * size}), "")):
        assert missing_flags(row, role) == flag
    for row in (nothing, part):
        with pytest.raises(GeneratorError, match="holds no log-probability") as caught:
            score(row)
        assert NAMES[role][-1] in str(caught.value)
        assert score(row, missing="neutral") == even
    assert score(nothing, missing="floor") == even
    assert score(part, missing="floor") == pytest.approx({"is_rel": 0.0, "is_sup": 1.0, "is_use": -1.0}[role], abs=1e-12)
    assert score(marks(**{role: [0.0] * size})) == even
    assert score(marks(**{role: [1 / size] * size}), missing="neutral") == pytest.approx(even)


ROWS = arrays(np.float32, (5, 13), elements=st.one_of(st.floats(-120, 0, width=32), st.sampled_from([-math.inf, NAN])))


@settings(max_examples=40)
@given(ROWS)
def test_scores_stay_in_their_ranges_whatever_is_missing(rows: np.ndarray) -> None:
    for missing in ("floor", "neutral"):
        for rule in ("two_way", "three_way", "bounded"):
            r = retrieve_probability(rows, rule=rule, missing=missing)  # type: ignore[arg-type]
            assert ((r >= 0) & (r <= 1)).all()
        assert ((rel(rows, missing=missing) >= 0) & (rel(rows, missing=missing) <= 1)).all()  # type: ignore[arg-type]
        assert ((sup(rows, missing=missing) >= 0) & (sup(rows, missing=missing) <= 1)).all()  # type: ignore[arg-type]
        assert (np.abs(use(rows, missing=missing)) <= 1).all()  # type: ignore[arg-type]


def slow_group(row: np.ndarray, role: str, values: list[float]) -> float:
    p = [math.exp(-100 if math.isnan(log) else log) for log in row[PLACES[role]].astype(float)]
    return sum(v * one for v, one in zip(values, p, strict=True)) / sum(p) if sum(p) else sum(values) / len(values)


@settings(max_examples=40)
@given(ROWS)
def test_scores_equal_their_slow_twins_and_arrays_equal_single_numbers(rows: np.ndarray) -> None:
    twins = {rel: ("is_rel", [0, 1]), sup: ("is_sup", [1, 0.5, 0]), use: ("is_use", [-1, -0.5, 0, 0.5, 1])}
    for score, (role, values) in twins.items():
        together = score(rows, missing="floor")
        assert together.tolist() == [float(score(row, missing="floor")) for row in rows]
        tall = score(np.asfortranarray(np.broadcast_to(rows, (3, 5, 13))), missing="floor")
        assert (tall == together).all()
        for row, found in zip(rows, together, strict=True):
            assert found == pytest.approx(slow_group(row, role, values), abs=1e-9)  # type: ignore[arg-type]
    alone = [float(retrieve_probability(row, missing="floor")) for row in rows]
    assert retrieve_probability(rows, missing="floor").tolist() == alone


# components


def test_an_absent_token_is_not_a_cut_off_one() -> None:
    ids, logs, rows = candidate(*SHORT[2])
    none = components(ids, logs, rows, S, retrieved=True, settings=Scoring())
    assert (none.sup, none.flags) == (0.0, ("sup:absent",))
    neutral = components(ids, logs, rows, S, retrieved=True, settings=Scoring(absent="neutral"))
    assert (neutral.sup, neutral.flags) == (0.5, ("sup:absent",))
    ids, logs, rows = candidate(*SHORT[0])
    rows[3, PLACES["is_sup"]] = NAN
    with pytest.raises(GeneratorError, match="Fully supported"):
        components(ids, logs, rows, S, retrieved=True, settings=Scoring())
    floored = components(ids, logs, rows, S, retrieved=True, settings=Scoring(missing="floor"))
    assert (floored.sup, floored.flags) == (0.5, ("sup:no_evidence",))
    rows[0, PLACES["is_rel"].start] = NAN
    partial = components(ids, logs, rows, S, retrieved=True, settings=Scoring(missing="floor"))
    assert partial.rel == 1.0
    assert partial.flags == ("rel:partial", "sup:no_evidence")


def test_is_use_reads_the_first_is_use_and_is_sup_its_own_segment() -> None:
    ids, logs, rows = candidate(*SHORT[0])
    second = np.array([marks(is_use=(0.9, 0.05, 0.03, 0.01, 0.01)), marks(is_sup=(0.01, 0.01, 0.98))])
    longer = components(
        [*ids[:-1], USE[0], SUP[2]], [*logs[:-1], -1.0, -1.0], np.vstack([rows[:-1], second]), S,
        retrieved=True, settings=Scoring(),
    )  # fmt: skip
    assert longer.use == near(0.84)
    assert longer.sup == near(0.842105)
    swapped = [SUP[0] if identity in USE else identity for identity in ids]
    assert components(swapped, logs, rows, S, retrieved=True, settings=Scoring()).use != pytest.approx(0.84)
    behind = [REL[1], 100, S.no, SUP[0], USE[4]]
    table = np.tile(marks(retrieve=(0.3, 0.3, 0.3), is_rel=(0.5, 0.5), is_sup=(1, 0, 0), is_use=EVEN), (5, 1))
    cut = components(behind, [-1.0] * 5, table, S, retrieved=True, settings=Scoring())
    assert (cut.sup, cut.flags) == (0.0, ("sup:absent",))
    assert cut.use == near(0.84)


def test_off_grammar_is_flagged_and_costs_nothing() -> None:
    ids, logs, rows = candidate(*SHORT[0])
    other = components([100, *ids[1:]], logs, rows, S, retrieved=True, settings=Scoring())
    assert other.flags == ("off_grammar",)
    assert other.rel == near(0.947368)
    without = scored(*SHORT[0], retrieved=False)
    assert (without.rel, without.sup, without.flags) == (0.0, 0.0, ())
    assert without.use == near(0.84)


def test_seq_is_the_mean_in_the_exponent() -> None:
    logs = [-0.5, -1.5, -1.0]
    assert seq(logs) == pytest.approx(math.exp(-1.0))
    assert seq(logs) != pytest.approx(math.exp(-3.0) / 3)
    assert seq(logs, mode="mean_logprob") == -1.0
    assert seq(logs, mode="prob") == pytest.approx(math.exp(-3.0))
    assert [float(seq([], mode=mode)) for mode in ("exp_mean", "mean_logprob", "prob")] == [0.0, 0.0, 0.0]  # type: ignore[arg-type]
    words = scored(*SHORT[0], how=Scoring(seq_tokens="text"))
    assert words.seq == pytest.approx(math.exp(-0.15))
    nothing = components([], [], np.zeros((0, 13)), S, retrieved=True, settings=Scoring())
    assert (nothing.seq, nothing.flags) == (0.0, ("empty", "rel:absent", "sup:absent", "use:absent"))
    silent = scored((0.9, 0.1), (), None, how=Scoring(seq_tokens="text"))
    assert (silent.seq, silent.flags) == (0.0, ("empty", "sup:absent"))


@settings(max_examples=40)
@given(arrays(np.float32, (4, 9), elements=st.floats(-30, 0, width=32)), arrays(bool, (4, 9)))
def test_padding_leaves_seq_alone_to_the_last_bit(logs: np.ndarray, present: np.ndarray) -> None:
    for mode in ("exp_mean", "mean_logprob", "prob"):
        together = seq(logs, mode=mode, present=present)  # type: ignore[arg-type]
        assert together.tolist() == [float(seq(row[on], mode=mode)) for row, on in zip(logs, present, strict=True)]  # type: ignore[arg-type]
    first, kept = logs[0].tolist(), present[0].tolist()
    slow = [log for log, on in zip(first, kept, strict=True) if on]
    assert seq(logs[0], present=present[0]) == pytest.approx(math.exp(sum(slow) / len(slow)) if slow else 0.0, rel=1e-12)


UNIT = st.floats(0, 1)
PARTS = st.builds(Components, UNIT, UNIT, UNIT, st.floats(-1, 1))
WEIGHTS = st.builds(Weights, *[st.floats(0, 3)] * 4)


@given(PARTS, WEIGHTS, st.sampled_from(["seq", "rel", "sup", "use"]), st.floats(0, 2))
def test_a_weight_moves_the_step_by_its_component(parts: Components, weights: Weights, name: str, more: float) -> None:
    moved = Weights(**{**weights.__dict__, name: getattr(weights, name) + more})
    assert step(parts, moved) - step(parts, weights) == pytest.approx(more * getattr(parts, name), abs=1e-9)
    assert -weights.use - 1e-9 <= step(parts, weights) <= step_bound(parts.rel, weights) + 1e-9
    assert step_bound(parts.rel, weights) <= largest_step(weights) + 1e-9


# paths


STEPS = st.lists(PARTS, min_size=1, max_size=4)


@settings(max_examples=40)
@given(STEPS, WEIGHTS, st.integers(0, 3), st.data())
def test_a_bound_is_never_overtaken(path: list[Components], weights: Weights, left: int, data: st.DataObject) -> None:
    further = data.draw(st.lists(PARTS, max_size=left))
    plain = data.draw(st.lists(st.booleans(), min_size=len(path) + len(further), max_size=len(path) + len(further)))
    steps = [step(parts, weights) for parts in [*path, *further]]
    n = len(path)
    for combine in ("mean", "sum", "product", "by_component"):
        bound = path_bound(steps[:n], combine, left, weights=weights, components=path, plain=plain[:n])  # type: ignore[arg-type]
        score = path_score(steps, combine, [*path, *further], plain=plain, weights=weights)  # type: ignore[arg-type]
        assert score <= bound + 1e-9, combine


@given(st.lists(st.floats(-2, 3), min_size=1, max_size=5), st.integers(0, 4), st.floats(0, 2))
def test_a_better_step_never_makes_a_worse_path(steps: list[float], place: int, more: float) -> None:
    better = [one + more * (at == place % len(steps)) for at, one in enumerate(steps)]
    for combine in ("mean", "sum", "product"):
        assert path_score(better, combine) >= path_score(steps, combine) - 1e-9  # type: ignore[arg-type]
    assert path_key(better, "product") >= path_key(steps, "product") or path_key(better, "product")[1] == pytest.approx(
        path_key(steps, "product")[1]
    )


def test_negative_steps_never_reverse_an_order_in_a_product() -> None:
    assert released_path([-0.5, -0.5]) > released_path([0.4, 0.4])
    assert path_key([-0.5, -0.5], "product") < path_key([-0.5, 0.4], "product") < path_key([0.4, 0.4], "product")


def test_a_step_without_passage_is_no_factor() -> None:
    assert path_score([2.0, 0.3, 1.5], "product", plain=[False, True, False]) == 3.0
    parts = [Components(0.5, 0.8, 0.6, 0.0), Components(0.7, 0.0, 0.0, 0.9)]
    weights = Weights()
    assert path_score([0, 0], "by_component", parts, plain=[False, True], weights=weights) == pytest.approx(
        0.6 + 0.8 + 0.6 + 0.45
    )


def test_paths_of_arrays_are_the_paths_of_their_numbers() -> None:
    rng = np.random.default_rng(0)
    steps = rng.normal(size=(3, 50))
    for combine in ("mean", "sum", "product"):
        together = path_score(list(steps), combine)  # type: ignore[arg-type]
        assert together.tolist() == [float(path_score(list(column), combine)) for column in steps.T]  # type: ignore[arg-type]
        bounds = path_bound(list(steps), combine, 2, weights=Weights())  # type: ignore[arg-type]
        assert bounds.tolist() == [float(path_bound(list(column), combine, 2, weights=Weights())) for column in steps.T]  # type: ignore[arg-type]


# the closed set


@given(
    st.lists(st.tuples(st.integers(-1, 2), st.floats(-3, 3)), min_size=1, max_size=8),
    st.sampled_from(["sum", "max", "mean", "logsumexp"]),
)
def test_label_scores_equal_their_slow_twin(rows: list[tuple[int, float]], how: Any) -> None:
    places, scores = zip(*rows, strict=True)
    found = label_scores(places, scores, how, labels=3)
    batched = label_scores(np.tile(places, (2, 4, 1)), np.tile(scores, (2, 4, 1)), how, labels=3)
    assert (batched == found).all()
    for label in range(3):
        own = [score for place, score in rows if place == label]
        if not own:
            assert found[label] == -math.inf
            continue
        slow = {
            "sum": sum(own), "max": max(own), "mean": sum(own) / len(own), "logsumexp": math.log(sum(map(math.exp, own))),
        }[how]  # fmt: skip
        assert found[label] == pytest.approx(slow, abs=1e-9)


def test_ties_negative_sums_and_no_label() -> None:
    assert aggregate(["b", "a"], [1.0, 1.0]) == [("b", 1.0), ("a", 1.0)]
    assert aggregate(["a", "b", "a"], [-1.0, -1.5, -1.0]) == [("b", -1.5), ("a", -2.0)]
    assert aggregate([None, "a"], [9.0, -1.0]) == [("a", -1.0)]
    assert aggregate([None], [1.0]) == []


@pytest.mark.parametrize("size", [3, 4, 5])
def test_labels_are_one_however_they_are_written(size: int) -> None:
    letters, digits = "ABCDE"[:size], "12345"[:size]
    for letter, digit in zip(letters, digits, strict=True):
        for said in (
            letter,
            f" {letter}",
            f"{letter}.",
            letter.lower(),
            f"{letter}: a text",
            f"({letter}) a text",
            f"{letter})",
            digit,
        ):
            assert normalise_label(said, letters) == letter
            assert normalise_label(said, digits) == digit
    assert normalise_label("", letters) is normalise_label(" . ", letters) is None
    assert normalise_label("F", letters) is None
    assert normalise_label("a dog", letters) is None
    assert normalise_label("SUPPORTS", ["true", "false"]) == normalise_label("True.", ["true", "false"]) == "true"
    assert normalise_label("false", ["SUPPORTS", "REFUTES"]) == "REFUTES"
    assert normalise_label(" Paris. ") == "paris"


# the grammar


def ids_of(written: str) -> list[int]:
    """`R`, `N`, `C`, `<`, `>`, `+` relevant, `-` irrelevant, `F` `P` `X` IsSup, `5` IsUse, `$` EOS, a … z words."""
    table = {
        "R": S.yes, "N": S.no, "C": S.cont, "<": S.opens, ">": S.closes, "+": S.relevant, "-": S.irrelevant,
        "F": SUP[0], "P": SUP[1], "X": SUP[2], "5": USE[4], "$": EOS,
    }  # fmt: skip
    return [table.get(letter, ord(letter)) for letter in written]


@pytest.mark.parametrize(
    ("written", "lead", "decisions"),
    [
        ("R<ab>+cdFR<ef>+ghP5$", 0, ["yes", "yes"]),
        ("Nab5$", 0, ["no"]),
        ("abR<c>-dCefNgh5$", 2, ["yes", "continue", "no"]),
        ("R<>+abXtail5$", 0, ["yes"]),
        ("R<ab>+cdFNab", 0, ["yes", "no"]),
        ("Nab5", 0, ["no"]),
    ],
)
def test_rows_of_the_grammar_are_read_and_written_back(written: str, lead: int, decisions: list[str]) -> None:
    row = parse(ids_of(written), S, eos=EOS)
    assert render(row, S, eos=EOS) == tuple(ids_of(written))
    assert len(row.lead) == lead
    assert [segment.decision for segment in row.segments] == decisions
    assert (row.is_use == USE[4], row.ended) == ("5" in written, "$" in written)


@pytest.mark.parametrize(
    ("written", "position", "message"),
    [
        ("ab", 2, "ends where a Retrieve token"),
        ("", 0, "ends"),
        ("R+ab", 1, r"\[Relevant\] stands where <paragraph>"),
        ("R<ab+", 4, "</paragraph>"),
        ("R<ab>cd", 5, "the word 99 stands where an IsRel"),
        ("R<ab>+cd5$", 8, r"\[Utility:5\] stands where an IsSup"),
        ("R<ab>+cd", 8, "ends where an IsSup"),
        ("R<ab>-cdF5$", 8, r"\[Fully supported\] stands"),
        ("N+ab5$", 1, r"\[Relevant\] stands"),
        ("NabF5$", 3, r"\[Fully supported\] stands"),
        ("Nab5$x", 5, "the word 120 stands where the end"),
        ("Nab5N", 4, r"\[No Retrieval\] stands where the end token"),
        ("Nab$", 3, "the end token stands"),
        ("5$", 0, "where a Retrieve token"),
        ("Cab<cd>", 3, "<paragraph> stands"),
    ],
)
def test_rows_off_the_grammar_name_the_position(written: str, position: int, message: str) -> None:
    with pytest.raises(GrammarError, match=message) as caught:
        parse(ids_of(written), S, eos=EOS)
    assert caught.value.position == position


WORDS = st.lists(st.integers(5, 60), max_size=3).map(tuple)
SEGMENTS = st.one_of(
    st.builds(Segment, st.sampled_from(["no", "continue"]), WORDS),
    st.builds(Segment, st.just("yes"), WORDS, WORDS, st.just(S.irrelevant)),
    st.builds(Segment, st.just("yes"), WORDS, WORDS, st.just(S.relevant), st.sampled_from(SUP), WORDS),
)


@given(
    st.lists(SEGMENTS, min_size=1, max_size=4).map(tuple),
    WORDS,
    st.sampled_from([(None, False), (USE[1], False), (USE[4], True)]),
)
def test_parse_undoes_render(segments: tuple[Segment, ...], lead: tuple[int, ...], end: tuple[int | None, bool]) -> None:
    row = Row(segments, lead, *end)
    assert parse(render(row, S, eos=EOS), S, eos=EOS) == row


@pytest.mark.parametrize(
    "row",
    [
        Row((Segment("no", (S.yes,)),)),
        Row((Segment("yes", (5,), (6,), S.irrelevant, SUP[0]),)),
        Row((Segment("no", (5,), (6,)),)),
        Row((Segment("no", (5,)),), ended=True),
        Row((Segment("no", (5,), tail=(6,)),)),
    ],
)
def test_parts_that_make_no_row_are_not_written(row: Row) -> None:
    with pytest.raises(GrammarError):
        render(row, S, eos=EOS)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_bound_pruning_is_lossless(seed: int) -> None:
    """Dropping what `step_bound` rules out, best rel first, leaves the argmax, and never decodes more."""
    rng = np.random.default_rng(seed)
    for size in rng.integers(1, 11, 40):
        figures = Components(rng.random(size), rng.random(size), rng.random(size), rng.uniform(-1, 1, size))
        weights = Weights(*rng.uniform(0, 2, 4))
        scores = step(figures, weights)
        order = np.argsort(-figures.rel, kind="stable")
        decoded, best = [], -math.inf
        for at in order:
            if step_bound(figures.rel[at], weights) >= best:
                decoded.append(at)
                best = max(best, scores[at])
        assert int(np.argmax(scores)) in decoded
        assert best == scores.max()
