"""The judge's arithmetic: both orders, ties, inconsistency, and failures that are missing and nothing else."""

from __future__ import annotations

import itertools
import math

import pytest

from raglan.judging import family, length_stratum, pair_outcome, pairs, rubric


@pytest.mark.parametrize(
    ("a_first", "b_first", "outcome", "inconsistent"),
    [
        ("first", "second", "a", False), ("second", "first", "b", False), ("tie", "tie", "tie", False),
        ("first", "first", "tie", True), ("second", "second", "tie", True), ("first", "tie", "tie", True),
        ("tie", "first", "tie", True), (None, "first", "missing", False), ("first", None, "missing", False),
        (None, None, "missing", False),
    ],
)  # fmt: skip
def test_a_win_needs_both_orders(a_first: str, b_first: str, outcome: str, inconsistent: bool) -> None:
    assert pair_outcome(a_first, b_first) == (outcome, inconsistent)


def test_names_do_not_matter() -> None:
    other = {"a": "b", "b": "a", "tie": "tie", "missing": "missing"}
    for one, two in itertools.product(["first", "second", "tie", None], repeat=2):
        outcome, inconsistent = pair_outcome(one, two)
        assert pair_outcome(two, one) == (other[outcome], inconsistent)


@pytest.mark.parametrize("always", ["first", "second"])
def test_a_judge_of_places_wins_nothing(always: str) -> None:
    found = pairs([(always, always)] * 12)
    assert (found.wins, found.losses, found.ties, found.inconsistent_share) == (0, 0, 12, 1.0)
    assert (found.rate.mean, found.rate.low, found.rate.high) == (0.5, 0.5, 0.5)


def test_failures_are_missing() -> None:
    good = [("first", "second")] * 3 + [("second", "first")]
    whole, holed = pairs(good), pairs([*good, (None, "first"), ("second", None)])
    assert holed.rate == whole.rate
    assert (holed.missing, holed.missing_share, holed.n) == (2, pytest.approx(1 / 3), 6)
    assert (whole.missing_share, whole.inconsistent_share) == (0, 0)
    assert math.isnan(pairs([(None, None)]).inconsistent_share)
    assert math.isnan(pairs([(None, None)]).rate.mean)
    scored, gaps = rubric([1, 5, 3]), rubric([1, None, 5, 3, None])
    assert gaps.score == scored.score
    assert (gaps.score.mean, gaps.missing_share) == (3, 0.4)
    with pytest.raises(ValueError, match="from 1 to 5, not 0"):
        rubric([3, 0])


@pytest.mark.parametrize(
    ("a", "b", "stratum"), [("xxxx", "yyyy", "alike"), ("x" * 79, "y" * 100, "shorter"), ("x" * 80, "y" * 100, "alike"),
                            ("x" * 125, "y" * 100, "alike"), ("x" * 126, "y" * 100, "longer"), ("", "", "alike")]
)  # fmt: skip
def test_strata_of_length(a: str, b: str, stratum: str) -> None:
    assert length_stratum(a, b) == stratum


@pytest.mark.parametrize(
    ("model", "name"),
    [("org/Qwen2.5-7B-Instruct", "qwen"), ("gpt-4o", "gpt"), ("GPT-4.1-mini", "gpt"), ("7b", "7b"), ("m-1", "m"),
     ("Meta-Llama-3-8B", "llama"), ("meta-llama/Llama-3.1-70B", "llama"), ("meta.llama3-70b-instruct-v1:0", "llama"),
     ("CodeLlama-7b-hf", "llama"), ("chatgpt-4o-latest", "gpt"), ("openai/o3-mini", "gpt"),
     ("Mixtral-8x7B-Instruct-v0.1", "mistral"), ("mistral-large-latest", "mistral"), ("open-mixtral-8x22b", "mistral"),
     ("claude-3-opus", "claude"), ("anthropic.claude-3-5-sonnet-20240620-v1:0", "claude"), ("QwQ-32B", "qwen"),
     ("Qwen/Qwen3-235B-A22B", "qwen"), ("dolphin-2.9", "dolphin"), ("glm-4", "glm"), ("chatglm3-6b", "glm")],
)  # fmt: skip
def test_the_family_is_in_the_name(model: str, name: str) -> None:
    assert family(model) == name
