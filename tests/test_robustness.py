"""What holds up and what does not: every worked figure by hand, plain twins, and the small traps of each definition."""

from __future__ import annotations

import itertools
import math
import random
import re
import string
from collections import Counter

import numpy as np
import pytest

from raglan.metrics import bootstrap, bootstraps, exact_match, f1, jackknife, paired_bootstrap
from raglan.refusals import abstained
from raglan.robustness import (
    abstention,
    char_3gram_recall,
    citation_figures,
    constant,
    disagreement,
    flipped,
    follow_rates,
    follows,
    macro_f1,
    marks,
    quote_figures,
    quotes,
    str_em,
)
from raglan.text import answer_words


@pytest.mark.parametrize(
    ("prediction", "gold", "em", "precision", "recall", "overlap"),
    [
        ("The Battle of Hastings, in 1066.", "Battle of Hastings", 0, 0.6, 1, 0.75),
        ("U.S. dollars", "US dollar", 0, 0.5, 0.5, 0.5),
        ("An apple a day", "apple day", 1, 1, 1, 1),
        ("twenty-one", "twenty one", 0, 0, 0, 0),
        ("北京大学。", "北京大学", 1, 1, 1, 1),
        ("位于北京市的北京大学", "北京大学", 0, 0.4, 1, 0.5714),
        ("使用 Transformer 架构", "Transformer架构", 0, 0.6, 1, 0.75),
        ("ＧＰＴ－４", "GPT-4", 1, 1, 1, 1),
        ("一九七八年", "1978年", 0, 0.2, 0.5, 0.2857),
        ("上海市和北京市", "北京市、上海市", 0, 0.8571, 1, 0.9231),
        ("不知道", "知道", 0, 0.6667, 1, 0.8),
    ],
)
def test_em_and_f1_by_hand(prediction: str, gold: str, em: float, precision: float, recall: float, overlap: float) -> None:
    assert exact_match(prediction, [gold]) == em
    assert f1(prediction, [gold]) == pytest.approx(overlap, abs=5e-5)
    common = (Counter(answer_words(prediction)) & Counter(answer_words(gold))).total()
    assert common / len(answer_words(prediction)) == pytest.approx(precision, abs=5e-5)
    assert common / len(answer_words(gold)) == pytest.approx(recall, abs=5e-5)


def squad(text: str) -> list[str]:
    """SQuAD's normalisation as its paper tells it: lower case, no ASCII punctuation, no articles, white space joined."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def test_cut_at_blanks_chinese_words_have_nothing_in_common() -> None:
    said, gold = "位于北京市的北京大学", "北京大学"
    assert not Counter(squad(said)) & Counter(squad(gold))
    assert f1(said, [gold]) == pytest.approx(4 / 7)


def test_normalisation_is_squads_on_ascii() -> None:
    draw = random.Random(0)
    for _ in range(1000):
        pieces = [*string.printable[:95], " a ", " The ", "an", "\n\t"]
        text = "".join(draw.choices(pieces, k=draw.randrange(30)))
        assert answer_words(text) == squad(text), text


@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [
        ("yes it is", "yes", 0),
        ("Yes.", "yes", 1),
        ("不是", "是", 0),
        ("是。", "是", 1),
        ("否", "否", 1),
        ("yes", "yes it is", 0.5),
    ],
)
def test_a_closed_label_is_right_or_wrong(prediction: str, gold: str, expected: float) -> None:
    assert f1(prediction, [gold]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answers", "declined"),
    [
        ("I don’t know.", ["Paris"], True),
        ("I DON'T KNOW", [], True),
        ("The passages do not say who built it.", ["Miller"], True),
        ("I am not sure, but it may be Paris.", ["Paris"], False),
        ("I don't know. Perhaps Paris.", ["Paris"], False),
        ("Paris. I do not know more.", ["Rome"], False),
        ("Paris", ["Paris"], False),
        ("She knows no answers", ["x"], False),
        ("", ["Paris"], False),
        ("不知道", ["知道"], True),
        ("根据这些段落无法回答。", ["北京"], True),
        ("无法确定，可能是北京。", ["北京"], False),
        ("北京。不知道更多。", ["上海"], False),
        ("段落中沒有提到是誰設計的。", ["北京"], True),
        ("資訊不足，可能是一九九八年。", ["1998年"], False),
        ("They do not say more than 3,000.", ["3000"], False),
        ("Not enough information", ["not enough information"], False),
        ("Not enough information", ["supported"], True),
        ("I don't know; not enough information.", ["not enough information"], False),
        ("The passages do not give the date.", ["1873"], True),
        ("The passage doesn't give a name.", ["Bob"], True),
        ("No passage says who built it.", ["Bob"], True),
        ("None of the documents mentions it.", ["Bob"], True),
        ("It is not known from these passages.", ["Bob"], True),
        ("Unknown.", ["Bob"], True),
        ("I could not find the answer.", ["Bob"], True),
        ("I couldn't find any information about him.", ["Bob"], True),
        ("The answer is not in the passages.", ["Bob"], True),
        ("段落没有说。", ["北京"], True),
        ("没有相关内容。", ["北京"], True),
        ("沒有相關內容", ["北京"], True),
        ("无答案", ["北京"], True),
        ("資料中沒有說是誰。", ["北京"], True),
        ("未知。", ["北京"], True),
        ("It is unknown who built it.", ["Bob"], True),
        ("Unknown", ["unknown"], False),
        ("Unknown Pleasures", ["Closer"], False),
        ("The Tomb of the Unknown Soldier", ["x"], False),
        ("No passage of the river freezes.", ["x"], False),
        ("They do not give up.", ["x"], False),
        ("She could not find her way home.", ["x"], False),
        ("It is not known as a town.", ["x"], False),
        ("未知的世界", ["x"], False),
        ("他没有说谎。", ["x"], False),
        ("没有说服力", ["x"], False),
    ],
)
def test_an_abstention_is_a_refusal_without_an_alias(prediction: str, answers: list[str], declined: bool) -> None:
    assert abstained(prediction, answers) is declined


def test_no_alias_reaches_over_the_refusal() -> None:
    assert abstained("old I don't know town", ["old town"])
    assert not abstained("old town: I don't know", ["old town"])


def test_abstention_rates_by_hand() -> None:
    answerable = [True] * 6 + [False] * 4
    declined = [True, True, False, False, False, False, True, True, True, False]
    found = abstention(declined, answerable)
    expected = {
        "abstention_precision": 0.6, "abstention_recall": 0.75, "abstention_f1": 0.6667, "over_abstention": 0.333,
        "hallucination": 0.25,
    }  # fmt: skip
    assert found == pytest.approx(expected, abs=5e-4)


def test_nobody_abstained_is_no_precision() -> None:
    found = abstention([False, False], [True, False])
    assert math.isnan(found["abstention_precision"])
    assert (found["abstention_recall"], found["abstention_f1"], found["hallucination"]) == (0, 0, 1)
    assert math.isnan(abstention([True], [False])["over_abstention"])
    with pytest.raises(ValueError, match=r"argument 2 is longer"):
        abstention([True], [True, False])


def test_citation_rates_by_hand() -> None:
    cited = marks("It stands [2] on the hill [5, 3] since 1873【７】.")
    assert cited == [2, 5, 3, 7]
    assert marks("[3-5] [^4] [1, 3–4] 【２－３】 [^1^]") == [3, 4, 5, 4, 1, 3, 4, 2, 3, 1]
    assert marks("[5-3] [1-99999] [1873-1880] [-2] [a] [^]") == [5, 3, 1, 99999, 1873, 1880]
    found = citation_figures(cited, 5, good={2, 4, 5}, needed={2, 4})
    assert found == {"citation_validity": 0.75, "citation_precision": 0.5, "citation_recall": 0.5}
    none = citation_figures([], 5, good={1}, needed={1})
    assert math.isnan(none["citation_validity"])
    assert math.isnan(none["citation_precision"])
    assert none["citation_recall"] == 0
    assert citation_figures([1, 1, 2], 5, good={1}, needed={1})["citation_precision"] == pytest.approx(2 / 3)
    unknown = citation_figures([1, 9], 5, good=None, needed=())
    assert unknown["citation_validity"] == 0.5
    assert math.isnan(unknown["citation_precision"])
    assert math.isnan(unknown["citation_recall"])
    assert math.isnan(quote_figures('"a"', ["a"], None)["quotes_gold"])
    assert quote_figures('"a"', ["a"], [])["quotes_gold"] == 0


def test_quotes_stand_in_a_passage_or_do_not() -> None:
    text = (
        'It says “built  in\n1873” and "made up", then ##begin_quote##the Ｍill burned##end_quote##; 书上说「建于一八七三年」。'
    )
    assert len(quotes(text)) == 4
    assert quotes("他说『塔建于一八七三年』。") == ["塔建于一八七三年"]
    shown = ["The tower was built in 1873.", "Later the Mill burned.", "该塔建于一八七三年。"]
    assert quote_figures(text, shown, shown[:1]) == {"quotes_shown": 0.75, "quotes_gold": 0.25}
    assert math.isnan(quote_figures("nothing quoted", shown, [])["quotes_shown"])


def test_flips_by_hand() -> None:
    orders = [True, True, False, True]
    assert flipped(orders) == 1
    assert disagreement(orders) == 0.5
    assert flipped([True] * 4) == disagreement([True] * 4) == 0
    assert disagreement([True, False, True, False]) == pytest.approx(4 / 6)
    assert math.isnan(flipped([True]))


def test_a_counterfactual_is_followed_where_the_truth_is_missing() -> None:
    assert follows("It opened in 1874.", ["1874"], ["1873"])
    assert not follows("1873, not 1874", ["1874"], ["1873"])
    assert not follows("It opened in 18745.", ["1874"], ["1873"])
    assert follow_rates([True, False, True, False], [True, True, False, False]) == {"follow": 0.5, "follow_of_right": 0.5}
    assert math.isnan(follow_rates([True], [False])["follow_of_right"])


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Hastings", ["Hastings"], 1),
        ("Hastinks", ["Hastings"], 4 / 6),  # has ast sti tin of six
        ("北京市", ["北京"], 1),
        ("aaa", ["aaaaa"], 1 / 3),  # clipped
        ("x", ["abc", "x"], 1),
        ("", ["abc"], 0),
    ],
)
def test_char_3gram_recall_by_hand(prediction: str, answers: list[str], expected: float) -> None:
    assert char_3gram_recall(prediction, answers) == pytest.approx(expected)


def test_str_em_counts_short_answers() -> None:
    assert str_em("The song is by Ann Lee (1999).", [["Ann Lee", "A. Lee"], ["Bob Ray"]]) == 0.5
    assert math.isnan(str_em("x", []))


def test_macro_f1_is_the_plain_twins() -> None:
    random.seed(3)
    labels = [random.choice(["yes", "no", "maybe"]) for _ in range(60)]
    said = [label if random.random() < 0.6 else random.choice(["Yes ", "no", "what"]) for label in labels]

    def twin(pairs: list[tuple[str, str]]) -> float:
        each = []
        for name in {gold for _, gold in pairs}:
            tp = sum(a.strip().lower() == name == b for a, b in pairs)
            fp = sum(a.strip().lower() == name != b for a, b in pairs)
            fn = sum(a.strip().lower() != name == b for a, b in pairs)
            each.append(2 * tp / (2 * tp + fp + fn))
        return sum(each) / len(each)

    pairs = list(zip(said, labels, strict=True))
    found = macro_f1(said, labels)
    assert found.value == pytest.approx(twin(pairs))
    assert found.without == pytest.approx([twin(pairs[:i] + pairs[i + 1 :]) for i in range(60)])
    assert jackknife(found).low < found.value < jackknife(found).high
    assert macro_f1(["no", "no", "no"], ["no", "no", "yes"]).value == pytest.approx(0.4)  # accuracy says .667


def test_the_bootstrap_of_three_is_the_exhaustive_one() -> None:
    changes = [1.0, 0.0, 0.0]
    every = sorted(np.mean(draw) for draw in itertools.product(changes, repeat=3))
    assert [sum(np.isclose(every, value)) for value in (0, 1 / 3, 2 / 3, 1)] == [8, 12, 6, 1]
    low, high = np.quantile(every, [0.025, 0.975], method="inverted_cdf")
    found = paired_bootstrap([0.0, 1.0, 0.0], [1.0, 1.0, 0.0])
    assert (found.mean, found.low, found.high, found.n) == (1 / 3, low, high, 3)
    assert (low, high) == (0, 1)


def test_identical_systems_differ_by_exactly_nothing() -> None:
    values = [random.Random(1).random() for _ in range(50)]
    for groups in (None, [place // 5 for place in range(50)]):
        same = paired_bootstrap(values, values, groups=groups)
        assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_questions_of_one_group_are_drawn_together() -> None:
    values = [1.0] * 50 + [0.0] * 50
    alone = bootstrap(values)
    pairs = bootstrap(values, groups=[place // 10 for place in range(100)])
    assert pairs.mean == alone.mean == 0.5
    assert pairs.high - pairs.low > 2 * (alone.high - alone.low)  # √10 wider in the limit
    singles = bootstrap(values, groups=range(100))
    assert (singles.mean, singles.low, singles.high) == pytest.approx((alone.mean, alone.low, alone.high), abs=0.011)
    with pytest.raises(ValueError, match="every value needs a group"):
        bootstrap([1.0, 2.0], groups=["a"])


def test_groups_of_unlike_sizes_against_the_exhaustive_twin() -> None:
    values, groups = [1.0, 1.0, 0.0, 0.5], ["a", "a", "b", "c"]
    members = {name: [v for v, g in zip(values, groups, strict=True) if g == name] for name in "abc"}
    every = [np.mean([value for name in draw for value in members[name]]) for draw in itertools.product("abc", repeat=3)]
    low, high = np.quantile(every, [0.025, 0.975], method="inverted_cdf")
    found = bootstrap([*values, math.nan], groups=[*groups, "a"])
    assert (found.mean, found.n) == (0.625, 4)
    assert (found.low, found.high) == pytest.approx((low, high))
    both = bootstraps({"one": [*values, math.nan], "none": [math.nan] * 5}, groups=[*groups, "a"])
    assert both["one"] == found
    assert (both["none"].n, math.isnan(both["none"].low)) == (0, True)


def test_a_constant_figure_is_noticed() -> None:
    assert constant([0.0] * 10)
    assert not constant([0.0] * 9)
    assert not constant([0.0] * 10 + [1.0])
    assert constant([1.0] * 10 + [math.nan])
