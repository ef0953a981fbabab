"""The plan: exact margins where floats fail, refusals that name what blocks, rare noise, seeds that stay, coverage."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from raglan import cli
from raglan.errors import CheckpointError, RecipeError
from raglan.recipe import Recipe, load_recipe
from raglan.synthesis import (
    Attempt,
    Plan,
    complete,
    coverage,
    factors_of,
    kept,
    load_factors,
    make_plan,
    quotas,
    read_plan,
    refills,
    seed_of,
    write_plan,
)
from raglan.synthesis.deal import deal_table, fitted
from raglan.synthesis.factors import Factor, Factors, Rule, Value
from raglan.synthesis.plan import _spread_places, deal_plan

RELATIONS = [0.28, 0.13, 0.18, 0.09, 0.20, 0.07, 0.05]
PALETTE = [0.40, 0.10, 0.20, 0.10, 0.07, 0.05, 0.04, 0.04]


def recipe(folder: Path, *overrides: str, n: int = 400, **synthesis: object) -> Recipe:
    tree = {
        "name": "planned", "seed": 13,
        "knowledge": {"path": "kb", "documents": "docs", "indexes": {"bm25": {"kind": "bm25"}, "dense": {"kind": "dense"}}},
        "synthesis": {"path": "out", "n": n, **synthesis},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return load_recipe(path, overrides)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plan")


@pytest.fixture(scope="module")
def plan(folder: Path) -> Plan:
    return make_plan(recipe(folder, n=999, languages={"en": 0.6, "zh": 0.3, "cross": 0.1}, from_scratch=0.3))


# --- quotas -----------------------------------------------------------------------------------------------------------


def rounded(n: int, weights: list[float]) -> list[int]:
    return [round(n * weight / sum(weights)) for weight in weights]


def in_floats(n: int, weights: list[float]) -> list[int]:
    wanted = [n * weight / sum(weights) for weight in weights]
    dealt = [math.floor(quota) for quota in wanted]
    order = sorted(range(len(wanted)), key=lambda i: (dealt[i] - wanted[i], i))
    for i in order[: n - sum(dealt)]:
        dealt[i] += 1
    return dealt


def test_the_relations_of_999() -> None:
    assert quotas(999, RELATIONS) == [279, 130, 180, 90, 200, 70, 50]
    assert sum(rounded(999, RELATIONS)) == 1000


def test_the_gold_absent_200() -> None:
    assert quotas(200, [0.8, 0.1, 0.1]) == [160, 20, 20]


def test_the_palette_over_all_slots_and_over_four() -> None:
    assert quotas(37, PALETTE) == [15, 4, 7, 4, 3, 2, 1, 1]
    assert quotas(4, PALETTE) == [2, 1, 1, 0, 0, 0, 0, 0]


def test_a_tie_that_floats_lose() -> None:
    assert quotas(12, [0.15, 0.05, 0.80]) == [2, 1, 9]
    assert in_floats(12, [0.15, 0.05, 0.80]) == [2, 0, 10]


def test_gold_positions_of_23() -> None:
    assert quotas(23, [1] * 5) == [5, 5, 5, 4, 4]


def test_evidence_of_23_examples_over_five_places() -> None:
    found = _spread_places(5, [1] * 23, 7)
    assert [sum(places == (place,) for places in found) for place in range(1, 6)] == [5, 5, 5, 4, 4]
    mixed = _spread_places(5, [2, 1, 0, 5, 3] * 9, 7)
    counted = Counter(place for places in mixed for place in places)
    assert [counted[place] for place in range(1, 6)] == quotas(99, [1] * 5)
    assert [len(set(places)) for places in mixed] == [2, 1, 0, 5, 3] * 9


@given(n=st.integers(0, 10_000), weights=st.lists(st.integers(0, 50), min_size=1, max_size=9).filter(any))
@settings(max_examples=200, deadline=None)
def test_quotas_keep_sum_and_quota_rule(n: int, weights: list[int]) -> None:
    dealt = quotas(n, weights)
    assert sum(dealt) == n
    assert all(abs(got - Fraction(n * weight, sum(weights))) < 1 for got, weight in zip(dealt, weights, strict=True))
    over = [Fraction(n * weight, sum(weights)) % 1 for weight in weights]
    raised = [got > n * weight // sum(weights) for got, weight in zip(dealt, weights, strict=True)]
    order = sorted(range(len(weights)), key=lambda i: (-over[i], i))
    assert [raised[i] for i in order] == sorted(raised, reverse=True), "a smaller remainder was raised before a larger one"


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), "many"])
def test_weights_are_numbers(weight: float) -> None:
    with pytest.raises(RecipeError, match="weight"):
        quotas(3, [1, weight])
    with pytest.raises(RecipeError, match="all 2 weights are 0"):
        quotas(3, [0, 0])


# --- dealing ----------------------------------------------------------------------------------------------------------

TASKS, FORMATS = ["factoid", "multiple_choice", "summary", "verification"], ["span", "option_letter", "paragraph", "label"]
MAY = np.array([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], bool)


def test_two_factors() -> None:
    table = deal_table([8, 4, 4, 4], [6, 4, 6, 4], MAY, row_names=TASKS, column_names=FORMATS)
    assert table.tolist() == [[6, 0, 2, 0], [0, 4, 0, 0], [0, 0, 4, 0], [0, 0, 0, 4]]


def test_two_factors_that_cannot_meet() -> None:
    with pytest.raises(RecipeError, match=r"^multiple_choice needs 4 option_letter, quota 3"):
        deal_table([8, 4, 4, 4], [7, 3, 6, 4], MAY, row_names=TASKS, column_names=FORMATS)


def test_the_refusal_is_told_from_the_shorter_side() -> None:
    may = np.ones((4, 3), bool)
    may[1:, 2] = False
    with pytest.raises(RecipeError, match=r"^c has quota 5, and what takes it is w, 4"):
        deal_table([4, 4, 4, 4], [5, 6, 5], may, row_names="wxyz", column_names="abc")


@st.composite
def feasible(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Margins that some table over these pairs has, since they are the sums of one."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    chance = np.random.default_rng(draw(st.integers(0, 2**32)))
    may = chance.random((rows, columns)) < draw(st.sampled_from([0.4, 0.7, 1.0]))
    return chance.integers(0, draw(st.sampled_from([2, 8, 400])), (rows, columns)) * may, may


@given(case=feasible())
@settings(max_examples=1000, deadline=None)
def test_margins_are_exact_over_allowed_pairs(case: tuple[np.ndarray, np.ndarray]) -> None:
    some, may = case
    names = [str(i) for i in range(5)]
    table = deal_table(some.sum(1), some.sum(0), may, row_names=names, column_names=names)
    assert (table.sum(1) == some.sum(1)).all()
    assert (table.sum(0) == some.sum(0)).all()
    assert (table[~may] == 0).all()
    assert (table >= 0).all()


@given(n=st.integers(1, 300), seed=st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_a_plan_of_weights_is_dealt_exactly_or_refused_by_halls_condition(n: int, seed: int) -> None:
    chance = np.random.default_rng(seed)
    rows, columns = quotas(n, chance.integers(1, 9, 4).tolist()), quotas(n, chance.integers(1, 9, 5).tolist())
    may = chance.random((4, 5)) < 0.7
    subsets = [[i for i in range(4) if mask >> i & 1] for mask in range(16)]
    blocked = [some for some in subsets if sum(rows[i] for i in some) > sum(columns[j] for j in range(5) if may[some, j].any())]
    try:
        table = deal_table(rows, columns, may, row_names="abcd", column_names="vwxyz")
    except RecipeError:
        assert blocked
    else:
        assert not blocked
        assert (table.sum(1).tolist(), table.sum(0).tolist(), int(table[~may].sum())) == (rows, columns, 0)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_each_entry_is_the_fitted_ones_floor_or_ceiling(seed: int) -> None:
    chance = np.random.default_rng(seed)
    may = chance.random((4, 5)) < 0.8
    some = chance.integers(1, 60, (4, 5)) * may  # above 0 wherever allowed: plain fitting converges
    names = [str(i) for i in range(5)]
    table = deal_table(some.sum(1), some.sum(0), may, row_names=names, column_names=names)
    x = may.astype(float)
    for _ in range(400):
        x *= (some.sum(1) / np.maximum(x.sum(1), 1e-9))[:, None]
        x *= (some.sum(0) / np.maximum(x.sum(0), 1e-9))[None, :]
    assert (table >= np.floor(x - 1e-6)).all()
    assert (table <= np.ceil(x + 1e-6)).all()


def largest_remainders(n: int, weights: list[Fraction]) -> list[int]:
    """One by one to whoever is furthest below its share."""
    wanted = [n * weight / sum(weights) for weight in weights]
    dealt = [math.floor(quota) for quota in wanted]
    for _ in range(n - sum(dealt)):
        left = [quota - some if some == math.floor(quota) else Fraction(-1) for quota, some in zip(wanted, dealt, strict=True)]
        dealt[left.index(max(left))] += 1
    return dealt


def drawn_factors(chance: np.random.Generator) -> Factors:
    """Four ruled factors with weights and rules at random, kinds of noise with weights at random, all else of one value."""

    def drawn(name: str, evidence: bool = False) -> Factor:
        values = [f"{name}{place}" for place in range(chance.integers(2, 6))]
        weights = [Fraction(int(chance.integers(1, 60)), int(chance.choice([1, 7, 100]))) for _ in values]
        needs = [int(chance.integers(1, 3)) if evidence else 0 for _ in values]
        return Factor(name, tuple(Value(v, w, v, v, need) for v, w, need in zip(values, weights, needs, strict=True)))

    def ruled(name: str, given: str) -> Rule:
        """Each value of `given` leaves out one value, or none."""
        takes = {}
        for value in factors[given].names:
            if chance.random() < 0.15:
                takes[value] = frozenset(factors[name].names) - {str(chance.choice(factors[name].names))}
        return Rule(name, given, takes, {})

    factors = Factors({name: Factor(name, one.values[:1]) for name, one in SHIPPED.factors.items()}, ())
    single = {"retriever": "bm25", "language": "en", "source": "knowledge", "absent_policy": "abstain"}
    factors = factors.having(*(Factor(name, (Value(one, Fraction(1), one, one),)) for name, one in single.items()))
    ks = Factor("k", tuple(Value(str(k), Fraction(int(chance.integers(1, 9))), str(k), str(k)) for k in (3, 4)))
    noise = [replace(kind, weight=Fraction(int(chance.integers(1, 40)))) for kind in SHIPPED["noise"].values]
    absent = Value("R5", Fraction(int(chance.integers(1, 60)), 10), "R5", "R5")
    relation = drawn("relation", evidence=True)
    factors = factors.having(ks, Factor("noise", tuple(noise)), Factor("relation", (*relation.values, absent)))
    factors = factors.having(*(drawn(name) for name in ("task", "answer_format", "query_format")))
    pairs = [("relation", "task"), ("answer_format", "task"), ("query_format", "task"), ("query_format", "answer_format")]
    return replace(factors, rules=tuple(ruled(name, given) for name, given in pairs))


SHIPPED = load_factors()


@pytest.mark.parametrize("seed", range(4))
def test_a_thousand_plans_have_exactly_their_margins(seed: int) -> None:  # 250 each
    """Weights, numbers and rules at random, through quotas, tables and cells; those that cannot be met are refused."""
    chance, made, refused = np.random.default_rng(seed), 0, []
    while made < 250:
        factors, n = drawn_factors(chance), int(chance.integers(1, 60))
        try:
            plan = deal_plan(factors, n, seed=made)
        except RecipeError as why:
            refused.append(str(why))
            continue
        made += 1
        for name in ("task", "relation", "answer_format", "query_format", "k"):
            wanted = largest_remainders(n, [value.weight for value in factors[name].values])
            counted = Counter(str(getattr(cell, name)) for cell in plan.cells)
            assert [counted[value] for value in factors[name].names] == list(plan.margins[name].values()) == wanted, name
        kinds = Counter(kind for cell in plan.cells for kind in cell.noise)
        wanted = largest_remainders(kinds.total(), [kind.weight for kind in factors["noise"].values])
        assert [kinds[kind] for kind in factors["noise"].names] == list(plan.margins["noise"].values()) == wanted
        for rule in factors.rules:
            assert all(rule.allows(getattr(cell, rule.given), getattr(cell, rule.factor)) for cell in plan.cells), rule
        assert all(len(cell.noise) == cell.k - cell.evidence for cell in plan.cells)
    assert all("cannot be dealt" in why for why in refused)
    assert len(refused) < made, "hardly any of these rules leaves anything out"


def test_rounding_each_entry_alone_breaks_the_margins() -> None:
    rows, columns = quotas(100, [1] * 7), quotas(100, [1] * 9)
    x = fitted(np.array(rows), np.array(columns), np.ones((7, 9), bool))
    table = deal_table(rows, columns, np.ones((7, 9)), row_names=["r"] * 7, column_names=["c"] * 9)
    assert table.sum(1).tolist() == rows
    assert table.sum(0).tolist() == columns
    assert np.round(x).sum(1).tolist() != rows


def test_a_pair_that_can_never_be_is_not_waited_for() -> None:
    """Fitting alone creeps to this 0 as 1/n, and would still give it a share."""
    table = deal_table([500, 500], [500, 500], [[1, 1], [0, 1]], row_names="ab", column_names="xy")
    assert table.tolist() == [[500, 0], [0, 500]]


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_gold_is_absent_among_several_passages_only(folder: Path) -> None:
    passages = {"k": {1: 4, 2: 1, 3: 2, 5: 1}, "gold_absent": 0.05, "gold_absent_from": 2}
    alone = {"task": {"factoid": 1}, "relation": {"R1": 1}, "answer_format": "fit"}
    plan = make_plan(recipe(folder, n=400, passages=passages, weights=alone))
    absent = Counter(cell.k for cell in plan.cells if cell.relation == "R5")
    assert absent.total() == 20
    assert set(absent) == {2, 3, 5}
    assert Counter(cell.k for cell in plan.cells) == {1: 200, 2: 50, 3: 100, 5: 50}, "K keeps its shares"
    anywhere = make_plan(recipe(folder, n=400, passages={**passages, "gold_absent_from": 1}, weights=alone))
    assert Counter(cell.k for cell in anywhere.cells if cell.relation == "R5")[1]


def test_gold_absent_from_more_passages_than_there_are_is_refused(folder: Path) -> None:
    passages = {"k": {1: 4, 3: 2}, "gold_absent": 0.05, "gold_absent_from": 4}
    alone = {"task": {"factoid": 1}, "relation": {"R1": 1}, "answer_format": "fit"}
    for weights in ({}, alone):
        with pytest.raises(RecipeError, match="gold_absent_from is 4, and no K is so large"):
            make_plan(recipe(folder, n=400, passages=passages, weights=weights))
    passages |= {"gold_absent": 0.5, "gold_absent_from": 3}
    with pytest.raises(RecipeError, match="k cannot be dealt to 400 cells") as refused:
        make_plan(recipe(folder, n=400, passages=passages, weights=alone))
    assert "synthesis.passages (k, gold_absent, gold_absent_from)" in str(refused.value.hint)
    none = {**passages, "gold_absent": 0}
    assert {cell.k for cell in make_plan(recipe(folder, n=400, passages=none, weights=alone)).cells} == {1, 3}


def test_topics_tasks_and_formats_have_their_numbers() -> None:
    factors = load_factors()
    levels = [{"/".join(leaf.split("/")[:level]) for leaf in factors["topic"].names} for level in (1, 2, 3)]
    assert [len(level) for level in levels] == [16, 16 * 12, 16 * 12 * 6]
    counts = {"task": 24, "query_format": 12, "answer_format": 14, "relation": 7, "genre": 13, "noise": 8, "template": 7}
    assert {name: len(factors[name].values) for name in counts} == counts
    assert all(value.en and value.zh for factor in factors.factors.values() for value in factor.values)
    chinese = [value.zh for factor in factors.factors.values() for value in factor.values]
    assert all(any("\u4e00" <= letter <= "\u9fff" for letter in words) for words in chinese)


def test_direct_short_answers_keep_thirty_percent() -> None:
    formats = load_factors()["answer_format"]
    short = sum(formats[name].weight for name in ("span", "short_sentence", "option_letter", "number_unit"))
    assert short / sum(value.weight for value in formats.values) >= Fraction(3, 10)


def test_every_margin_of_a_plan_is_its_largest_remainder(plan: Plan, folder: Path) -> None:
    factors, _ = factors_of(recipe(folder, n=999, languages={"en": 0.6, "zh": 0.3, "cross": 0.1}, from_scratch=0.3))
    assert list(plan.margins["relation"].values()) == [279, 130, 180, 90, 200, 70, 50]
    assert plan.margins["absent_policy"] == {"abstain": 160, "own_knowledge": 20, "partial": 20}
    assert plan.margins["source"] == {"knowledge": 699, "from_scratch": 300}
    for name in set(plan.margins) & set(factors.factors) - {"noise", "absent_policy", "verdict", "topic"}:
        wanted = quotas(999, [value.weight for value in factors[name].values])
        assert list(plan.margins[name].values()) == wanted
        counted = Counter(str(getattr(cell, name)) for cell in plan.cells)
        assert [counted[value] for value in factors[name].names] == wanted, name
    first = Counter(cell.topic.partition("/")[0] for cell in plan.cells)
    assert list(first.values()) and sorted(first.values(), reverse=True) == quotas(999, [1] * 16)  # noqa: PT018


def test_every_cell_keeps_every_rule(plan: Plan, folder: Path) -> None:
    factors, _ = factors_of(recipe(folder))
    for cell in plan.cells:
        for rule in factors.rules:
            if rule.factor != "noise" and getattr(cell, rule.factor) is not None:
                assert rule.allows(getattr(cell, rule.given), str(getattr(cell, rule.factor))), (cell, rule)
        assert (cell.absent_policy is None) == (cell.relation != "R5")
        assert cell.evidence == {"R1": 1, "R2": 1, "R5": int(cell.absent_policy == "partial")}.get(cell.relation, 2)
        assert len(cell.noise) == cell.k - cell.evidence
        assert cell.positions is not None
        assert len(set(cell.positions)) == cell.evidence
        assert all(1 <= place <= cell.k for place in cell.positions)
        assert [place for place, slot in enumerate(cell.slots, 1) if slot == "evidence"] == list(cell.positions)
        assert (cell.verdict is not None) == (cell.task in ("fact_verification", "claim_correction"))
        assert (cell.verdict == "not_enough_information") == (cell.verdict is not None and cell.relation == "R5")


def test_noise_is_dealt_over_all_slots_and_rare_kinds_appear(folder: Path, plan: Plan) -> None:
    slots = [kind for cell in plan.cells for kind in cell.noise]
    counted = Counter(slots)
    assert [counted[kind] for kind in plan.margins["noise"]] == quotas(len(slots), PALETTE)
    small = make_plan(recipe(folder, n=40, passages={"k": {5: 1}}))
    alone = Counter(kind for cell in small.cells for kind, some in zip(small.margins["noise"],
                    quotas(len(cell.noise), PALETTE), strict=True) for _ in range(some))  # fmt: skip
    assert all(small.margins["noise"].values())
    assert {"counterfactual", "near_duplicate", "garbled", "boilerplate"}.isdisjoint(alone), "dealt alone, they never come"


def test_where_no_passage_answers_no_noise_tells_the_answer(plan: Plan) -> None:
    absent = Counter(kind for cell in plan.cells if cell.relation == "R5" for kind in cell.noise)
    assert absent["hard"] > 0
    assert not {"counterfactual", "near_duplicate", "garbled"} & set(absent)
    assert {cell.relation for cell in plan.cells if "counterfactual" in cell.noise} == {"R3"}


def test_evidence_stands_everywhere_as_often(plan: Plan) -> None:
    for k in {cell.k for cell in plan.cells}:
        held = Counter(place for cell in plan.cells if cell.k == k for place in cell.positions or ())
        counts = [held[place] for place in range(1, k + 1)]
        assert counts == quotas(sum(counts), [1] * k)
        assert plan.margins[f"position k={k}"] == {str(place): held[place] for place in range(1, k + 1)}


@pytest.mark.parametrize(
    ("order", "places"), [("first", (1, 2)), ("middle", (2, 3)), ("last", (4, 5)), ("rank", None)], ids=lambda value: str(value)
)
def test_controlled_positions(folder: Path, order: str, places: tuple[int, ...] | None) -> None:
    made = make_plan(recipe(folder, n=60, passages={"k": {5: 1}, "order": order}))
    assert {cell.positions for cell in made.cells if cell.evidence == 2} == {places}
    assert all(len(cell.slots) == 5 for cell in made.cells)


def test_equal_recipes_plan_equally_and_seeds_do_not(folder: Path) -> None:
    asked = recipe(folder, n=100)
    once, other = make_plan(asked), make_plan(recipe(folder, "seed=14", n=100))
    assert make_plan(asked) == once
    same = [name for name in once.margins if not name.startswith("position")]
    assert [other.margins[name] for name in same] == [once.margins[name] for name in same]
    assert other.cells != once.cells


def test_adding_a_cell_changes_no_other_cells_seed(folder: Path) -> None:
    small, large = make_plan(recipe(folder, n=100)), make_plan(recipe(folder, n=101))
    assert [cell.seed for cell in small.cells] == [cell.seed for cell in large.cells[:100]]
    seeds = {cell.seed_for(purpose, ordinal=k) for cell in large.cells for purpose in ("query", "answer") for k in range(3)}
    assert len(seeds) == 101 * 6
    assert large.cells[7].seed_for("answer", ordinal=2) == seed_of(13, 7, "answer", ordinal=2)
    cell = int.from_bytes(hashlib.sha256(b"13\x1fcell\x1f7").digest()[:8], "big") // 2
    again = int.from_bytes(hashlib.sha256(f"{cell}\x1fanswer\x1f2".encode()).digest()[:8], "big") // 2
    assert seed_of(13, 7, "answer", ordinal=2) == again, "a plan made before must find its seeds again"


@pytest.mark.parametrize("n", [1, 4, 22, 30, 57, 123, 250, 777])
def test_the_weights_that_come_with_raglan_can_be_dealt(folder: Path, n: int) -> None:
    assert len(make_plan(recipe(folder, n=n)).cells) == n


def test_gold_absent_is_one_knob(folder: Path) -> None:
    none, half, all_of = (make_plan(recipe(folder, n=200, passages={"gold_absent": share})) for share in (0, 0.5, 1))
    assert none.margins["relation"]["R5"] == 0
    assert half.margins["relation"]["R5"] == 100
    assert list(half.margins["relation"].values()) == quotas(200, [28, 13, 18, 9, 80, 7, 5])
    assert all_of.margins["relation"]["R5"] == 200
    assert all_of.left_out["noise"] == ("counterfactual", "near_duplicate", "garbled")


def test_few_tasks_leave_out_what_they_do_not_take(folder: Path) -> None:
    made = make_plan(recipe(folder, n=100, weights={"task": {"factoid": 3, "list": 1}, "answer_format": "fit"}))
    assert made.margins["task"] == {"factoid": 75, "list": 25}
    assert "R6" in made.left_out["relation"]
    assert "option_letter" in made.left_out["answer_format"]
    assert made.margins["relation"]["R5"] == 20, "what leaves does not move the knob"
    assert sum(made.margins["answer_format"].values()) == 100
    lists = Counter(cell.answer_format for cell in made.cells if cell.task == "list")
    assert set(lists) <= {"list", "table", "json", "cited_long"}


def test_fit_lets_few_cells_be_planned(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"option_letter has quota 1.*\n.*weights.answer_format=fit"):
        make_plan(recipe(folder, n=6))
    made = make_plan(recipe(folder, n=6, weights={"answer_format": "fit", "query_format": "fit"}))
    assert len(made.cells) == 6


def test_weights_that_block_each_other_are_named(folder: Path) -> None:
    weights = {"task": {"factoid": 1, "multiple_choice": 1}, "answer_format": {"span": 7, "option_letter": 3}}
    with pytest.raises(
        RecipeError, match="answer_format cannot be dealt to 20 cells: multiple_choice needs 10 option_letter, quota 6"
    ):
        make_plan(recipe(folder, n=20, weights=weights))


@pytest.mark.parametrize(
    ("synthesis", "message"),
    [
        ({"weights": {"task": {"riddle": 1}}}, "task has no value 'riddle'"),
        ({"weights": {"topic": {"alchemy": 1}}}, "no first-level topic 'alchemy'"),
        ({"weights": {"relation": {"R5": 1}}}, "gold_absent"),
        ({"weights": {"relation": "fit"}}, "gold_absent"),
        ({"weights": {"colour": {"red": 1}}}, "colour"),
        ({"retrievers": {"bm52": 1}}, "knowledge.indexes has bm25, dense"),
        ({"passages": {"k": {0: 1}}}, "greater than or equal to 1"),
        ({"languages": {}}, "at least 1 item"),
        ({"retrievers": {"bm25": 0}}, "all 1 weights are 0"),
        ({"weights": {"noise": {"garbled": 1}}}, "gold_absent is 0.2, and no task or kind of noise takes R5"),
        ({"weights": {"noise": {"garbled": 1}}, "passages": {"gold_absent": 1}}, "takes R5"),
    ],
)
def test_settings_that_cannot_be(folder: Path, synthesis: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_plan(recipe(folder, **synthesis))


def test_topics_and_rules_of_ones_own(folder: Path) -> None:
    own = folder / "own"
    own.mkdir(exist_ok=True)
    (own / "topics.yaml").write_text(
        "sea | 海:\n  ships | 船: [rigs | 帆装, hulls | 船体]\n  fish | 鱼: [cod | 鳕鱼]\n", encoding="utf-8"
    )
    made = make_plan(recipe(folder, n=40, factors=str(own)))
    assert made.margins["topic"] == {"sea/ships/rigs": 14, "sea/ships/hulls": 13, "sea/fish/cod": 13}
    (own / "compatibility.yaml").write_text("- {factor: genre, given: task, takes: {riddle: [news]}}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="names riddle"):
        load_factors(own)
    (own / "compatibility.yaml").write_text("[]", encoding="utf-8")
    (own / "topics.yaml").write_text("sea | 海: [ships]\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="three levels"):
        load_factors(own)


def test_a_plan_is_written_and_read_and_never_replaced_by_another(folder: Path, plan: Plan, tmp_path: Path) -> None:
    written = write_plan(plan, tmp_path / "plan")
    assert read_plan(written) == plan
    assert write_plan(plan, tmp_path / "plan") == written
    with pytest.raises(CheckpointError, match="of other settings"):
        write_plan(make_plan(recipe(folder, n=30)), tmp_path / "plan")
    lines = (written / "plan.jsonl").read_text(encoding="utf-8")
    (written / "plan.jsonl").write_text(lines.replace("R1", "R2", 1), encoding="utf-8")
    with pytest.raises(CheckpointError, match="not the plan that"):
        read_plan(written)


# --- coverage ---------------------------------------------------------------------------------------------------------


def test_a_failing_cell_is_a_deficit_and_nothing_else_gains(plan: Plan) -> None:
    failing = plan.cells[17]
    tried = [Attempt(cell.number, 0, None, f"what of {cell.topic}") for cell in plan.cells if cell is not failing]
    tried += [Attempt(17, ordinal, "quotes") for ordinal in range(3)]
    told = coverage(plan, tried)
    assert (told["requested"], told["kept"], told["deficit"], told["attempts"]) == (999, 998, 1, 1001)
    assert not complete(told)
    for name in ("task", "relation", "k", "topic", "verdict", "absent_policy"):
        own = str(getattr(failing, name))
        short = {value: row["deficit"] for value, row in told["factors"][name].items() if row["deficit"]}
        assert short == ({} if own == "None" else {own: 1})
        assert all(row["kept"] + row["deficit"] == row["planned"] for row in told["factors"][name].values())
    assert told["funnel"] == {"attempts": 1001, "quotes": 3}
    assert list(refills(plan, tried)) == []


def test_what_cells_over_a_corpus_do_not_heed_is_counted_from_scratch_alone(plan: Plan) -> None:
    tried = [Attempt(cell.number, 0) for cell in plan.cells if cell.number % 2]
    told = coverage(plan, tried, ignores=("persona",), ignores_in_corpus=("topic", "genre"))
    assert (told["ignored"], told["ignored_in_corpus"]) == (["persona"], ["topic", "genre"])
    assert "persona" not in told["factors"]
    scratch = [cell for cell in plan.cells if cell.source == "from_scratch"]
    for name in ("topic", "genre"):
        planned = Counter(getattr(cell, name) for cell in scratch)
        held = Counter(getattr(cell, name) for cell in scratch if cell.number % 2)
        found = {value: (row["planned"], row["kept"]) for value, row in told["factors"][name].items()}
        assert found == {value: (count, held[value]) for value, count in planned.items()}
    assert sum(row["planned"] for row in told["factors"]["task"].values()) == 999, "the others are counted everywhere"
    assert told["pairs"]["task × relation"]["covered"] > 0
    assert told["topic_entropy"] is not None
    cells = tuple(replace(cell, source="knowledge") for cell in plan.cells)
    alone = coverage(replace(plan, cells=cells), tried, ignores_in_corpus=("topic", "genre"))
    assert (alone["ignored"], alone["ignored_in_corpus"], alone["topic_entropy"]) == (["topic", "genre"], [], None)
    assert not {"topic", "genre"} & {*alone["factors"], *(name for pair in alone["pairs"] for name in pair.split(" × "))}


def test_kept_are_the_lowest_ordinals_whatever_the_order_of_arrival(plan: Plan) -> None:
    tried = [Attempt(3, 2), Attempt(3, 1), Attempt(3, 0, "language"), Attempt(5, 0)]
    for order in (tried, tried[::-1]):
        assert kept(plan, order) == ([Attempt(3, 1), Attempt(5, 0)], [Attempt(3, 2)])
    everything = [Attempt(cell.number, ordinal) for cell in plan.cells for ordinal in (1, 0)]
    told = coverage(plan, everything)
    assert (told["kept"], told["surplus"], complete(told)) == (999, 999, True)


def test_refills_are_new_ordinals_of_the_same_cell_for_two_rounds(plan: Plan) -> None:
    tried = [Attempt(cell.number, 0, "support" if cell.number in (4, 9) else None) for cell in plan.cells]
    for ordinal in (1, 2):
        asked = list(refills(plan, tried))
        assert [(cell.number, again) for cell, again in asked] == [(4, ordinal), (9, ordinal)]
        tried += [Attempt(cell.number, again, "support") for cell, again in asked]
    assert list(refills(plan, tried)) == []


def test_attempts_belong_to_the_plan(plan: Plan) -> None:
    with pytest.raises(RecipeError, match="no cell 999"):
        coverage(plan, [Attempt(999, 0)])
    with pytest.raises(RecipeError, match="two attempts 0"):
        coverage(plan, [Attempt(1, 0), Attempt(1, 0, "late")])


def test_variety_as_a_twin_counts_it(plan: Plan) -> None:
    queries = ["red fox", "red hen", "长江 red red"]
    told = coverage(plan, [Attempt(number, 0, None, query) for number, query in enumerate(queries)])
    vectors = [{"red": 1, "fox": 1}, {"red": 1, "hen": 1}, {"长": 1, "江": 1, "red": 2}]
    pairs = [(a, b) for i, a in enumerate(vectors) for b in vectors[i + 1 :]]
    cosines = [sum(a[w] * b.get(w, 0) for w in a) / math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
               for a, b in pairs]  # fmt: skip
    assert told["mean_cosine"] == pytest.approx(sum(cosines) / 3)
    assert told["type_token_ratio"] == pytest.approx(5 / 8)
    assert told["topic_entropy"] == pytest.approx(math.log(3) / math.log(999))
    one = coverage(plan, [])
    assert (one["mean_cosine"], one["type_token_ratio"], one["topic_entropy"], one["kept"]) == (None, None, None, 0)


def test_pairs_covered(plan: Plan) -> None:
    everything = coverage(plan, [Attempt(cell.number, 0) for cell in plan.cells])["pairs"]["task × relation"]
    assert everything["allowed"] == len(plan.allowed["task × relation"])
    assert 0.9 < everything["share"] <= 1
    one = coverage(replace(plan), [Attempt(0, 0)])["pairs"]
    assert all(pairs["covered"] <= 1 for pairs in one.values())


# --- the command ------------------------------------------------------------------------------------------------------


def command(*words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["raglan", *words])
    with pytest.raises(SystemExit) as done:
        cli.main()
    streams = capsys.readouterr()
    return int(done.value.code or 0), streams.out, streams.err


def test_plan_and_coverage_by_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe(tmp_path, n=60)
    asked = str(tmp_path / "recipe.yaml")

    def call(*words: str) -> tuple[int, str, str]:
        return command("synthesize", *words, capsys=capsys, monkeypatch=monkeypatch)

    code, out, _ = call(asked, "--plan")
    assert code == 0
    assert "R5" in out
    assert " 12" in out
    lines = (tmp_path / "out" / "plan" / "plan.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 60
    assert json.loads(call(asked, "--plan", "--json")[1])["margins"]["relation"]["R5"] == 12
    assert call(asked, "synthesis.n=61", "--plan")[0] == 2
    assert "say so: --plan" in call(asked)[2]
    assert call("coverage", str(tmp_path / "out"))[0] == 2
    attempts = [{"cell": number, "ordinal": 0, "reason": None, "query": "who?"} for number in range(60)]
    (tmp_path / "out" / "attempts.jsonl").write_text("\n".join(map(json.dumps, attempts[1:])) + "\n", encoding="utf-8")
    code, out, _ = call("coverage", str(tmp_path / "out"))
    assert (code, out.splitlines()[0]) == (3, "60 requested, 59 kept, 0 surplus, 59 attempts")
    (tmp_path / "out" / "attempts.jsonl").write_text("\n".join(map(json.dumps, attempts)) + "\n", encoding="utf-8")
    assert call("coverage", str(tmp_path / "out"), "--json")[0] == 0
    assert json.loads((tmp_path / "out" / "coverage.json").read_text(encoding="utf-8"))["deficit"] == 0
    (tmp_path / "out" / "attempts.jsonl").write_text('{"cell": 0}\n', encoding="utf-8")
    assert "attempts.jsonl:1 is no attempt" in call("coverage", str(tmp_path / "out"))[2]


def test_a_recipe_without_synthesis(folder: Path) -> None:
    with pytest.raises(RecipeError, match="has no `synthesis`"):
        make_plan(recipe(folder).model_copy(update={"synthesis": None}))


def test_factors_name_their_values() -> None:
    assert isinstance(load_factors()["task"], Factor)
    assert load_factors()["relation"]["R3"].evidence == 2
