"""Noise: the palette, the guard, false values, what is refused, and where gold stands. Figures by hand, properties drawn."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import log
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from raglan.corpus import Corpus, write_corpus
from raglan.encoder import Encoder
from raglan.errors import CorpusError, IndexMismatch, RecipeError
from raglan.knowledge import build_knowledge
from raglan.perturb import (
    KINDS,
    PALETTE,
    Cell,
    Frequencies,
    Guard,
    Slot,
    Sources,
    arrange,
    boilerplate,
    content_hash,
    counterfactual,
    deal_kinds,
    deal_positions,
    decidable,
    fill,
    garbled,
    gold_slots,
    held,
    near_duplicate,
    neighbours,
    orders,
    shown_answers,
    swap,
    sweep,
    value_type,
)
from raglan.perturb.guard import numeric
from raglan.perturb.occurrences import Occurrences
from raglan.perturb.spellings import respelled
from raglan.perturb.values import replaced
from raglan.pooled import check_varied, pool, retrieve_each, retrieve_pooled
from raglan.prompt import fit
from raglan.recipe import KnowledgeSettings
from raglan.records import Example, Hit, Passage
from raglan.retriever import Retriever
from raglan.text import content_terms, placed_words
from raglan.text import words as plain_words

ALDERMERE = Example("q1", "In which year was the Aldermere observatory opened?", ("1873",), ("gold",))
QINGPU = Example("q2", "青浦大桥哪一年通车？", ("1998年",))
GOLD = Passage("gold", "The Aldermere observatory opened its doors in 1873. It stands on a hill.", "", "almanac", 100, 172)
SECOND = Passage("second", "Since 1873 the Aldermere observatory has been opened to guests. Many come.", "", "guide", 0, 70)
COUNTS = Frequencies(1000, {"aldermere": 4, "observatory": 20, "opened": 100, "year": 250})
GUARD = Guard(COUNTS)


def passage(text: str, identity: str = "p", **more: object) -> Passage:
    return Passage(identity, text, **more)  # type: ignore[arg-type]


# The guard, by hand


def test_terms_weigh_what_the_worked_example_says() -> None:
    assert content_terms(ALDERMERE.query) == ["year", "aldermere", "observatory", "opened"]
    weights = {term: COUNTS.idf(term) for term in content_terms(ALDERMERE.query)}
    assert weights == pytest.approx({"aldermere": 5.5215, "observatory": 3.9120, "opened": 2.3026, "year": 1.3863}, abs=5e-5)
    assert sum(weights.values()) == pytest.approx(13.1224, abs=5e-5)


@pytest.mark.parametrize(
    ("text", "coverage", "verdict"),
    [
        ("The Aldermere observatory admitted its first visitors in 1873", 0.7189, "also_gold"),
        ("In the year 1873 a fire destroyed the Harwick mill", 0.1056, "answer_string_only"),
        ("In the year 1874 a fire destroyed the Harwick mill", 0.1056, "clean"),
        ("The Aldermere observatory opened in 1874", log(250) + log(50) + log(10), "clean"),
    ],
)
def test_a_number_counts_only_if_the_question_agrees(text: str, coverage: float, verdict: str) -> None:
    whole = log(250) + log(50) + log(10) + log(4)
    wanted = coverage / whole if coverage > 1 else coverage
    assert COUNTS.coverage(ALDERMERE.query, passage(text)) == pytest.approx(wanted, abs=5e-5)
    assert GUARD.verdict(ALDERMERE, passage(text), [GOLD]) == verdict


@pytest.mark.parametrize(
    ("other", "verdict"),
    [
        (Passage("gold", "something else"), "same"),
        (Passage("copy", GOLD.text.replace(" ", "\n")), "same"),
        (Passage("chunk", "It stands on a hill, near the mill.", "", "almanac", 150, 190), "overlap"),
        (Passage("chunk", "It stands on a hill, near the mill.", "", "almanac", 172, 190), "clean"),
        (Passage("chunk", "The Aldermere observatory opened its doors in 1873. It", "", "almanac", 90, 150), "also_gold"),
    ],
)
def test_what_the_evidence_itself_is_no_noise(other: Passage, verdict: str) -> None:
    assert GUARD.verdict(ALDERMERE, other, [GOLD]) == verdict


def test_evidence_that_was_not_given_is_known_by_its_id() -> None:
    assert GUARD.verdict(ALDERMERE, Passage("gold", "Stars."), [SECOND]) == "also_gold"


def test_a_chinese_year_is_found_in_numerals() -> None:
    text = passage("青浦大桥于一九九八年建成通车")
    counts = Frequencies(1000, dict.fromkeys(content_terms(QINGPU.query), 10))
    assert counts.coverage(QINGPU.query, text) >= 0.5
    assert Guard(counts).verdict(QINGPU, text) == "also_gold"
    assert "1998年" not in text.text, "only folding finds it"


def unfolded(text: str) -> str:
    """A slow twin of how the guard looks at a text, which leaves every numeral as it is written."""
    return f" {' '.join(plain_words(text))} "


def test_without_folding_a_chinese_year_would_have_become_a_hard_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same hit of the same search: support as it is, and a clean negative if numerals were not folded."""
    gold = passage("青浦大桥1998年通车。", "evidence")
    found = [Hit(gold, 0, 9.0, 1), Hit(passage("青浦大桥于一九九八年建成通车", "other"), 1, 8.0, 2)]
    guard, sources = Guard(Frequencies(1000, dict.fromkeys(content_terms(QINGPU.query), 10))), Sources(hits=found)

    def second() -> Slot:
        return fill(QINGPU, gold_slots([gold]), kinds=["hard"], gold=[gold], sources=sources, guard=guard, seed=1)[1]

    assert (second().passage.id, second().role, second().guard) == ("other", "support", "also_gold")
    absent = {"kinds": ["hard"], "gold": [gold], "sources": sources, "guard": guard, "seed": 1, "gold_absent": True}
    with pytest.raises(CorpusError, match="no more of kind hard"):
        fill(QINGPU, (), **absent)  # type: ignore[arg-type]
    for name in ("_squad_line", "_gap_line"):
        monkeypatch.setattr(f"raglan.perturb.guard.{name}", unfolded)
    assert (second().passage.id, second().role, second().kind, second().guard) == ("other", "noise", "hard", "clean")
    assert fill(QINGPU, (), **absent)[0].role == "noise"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answer", "text", "found"),
    [
        ("1873", "from 1873–1880", True),
        ("1873", "the 18730th", False),
        ("Eiffel Tower", "the Eiffel-Tower", True),
        ("EiffelTower", "the Eiffel-Tower", True),
        ("no", "not now", False),
        ("3,000", "三千人", True),
        ("U.S.", "in the US navy", True),
        ("The", "the", False),
        ("北京", "北京大学", True),
        ("1998年", "大桥于一九九八年建成", True),
        ("一九九八年", "大桥于1998年建成", True),
        ("10年", "一〇年通车", True),
        ("10年", "2010年通车", False),
        ("10年", "二〇一〇年通车", False),
        ("2010年", "历时10年", False),
        ("二〇一〇年", "历时十年", False),
        ("98年", "1998年", False),
        ("3公里", "全长13公里", False),
    ],
)
def test_an_answers_words_stand_side_by_side(answer: str, text: str, found: bool) -> None:
    assert held(passage(text), [answer]) is found
    assert held(passage("", title=text), [answer]) is found, "a title is shown too"


@pytest.mark.parametrize(
    "answer",
    [
        *("yes", "No.", "是", "B", "1873", "12 March 1873", "1998年", "三千", "twenty-one", "the 1870s", "221 BC", "1990s"),
        *("公元前221年", "西元前二二一年", "20世纪90年代", "二十世纪九十年代初", "民国八十七年", "19th century", "19世纪末"),
        *("Friday", "星期五", "周日", "禮拜天"),
    ],
)
def test_generic_answers_by_form(answer: str) -> None:
    assert GUARD.generic(answer)


@pytest.mark.parametrize("answer", ["Aldermere", "青浦大桥", "3 km", "May Harwick", "公元前", "星期", "前进", "Friday Harbour"])
def test_answers_that_are_not_generic(answer: str) -> None:
    assert not GUARD.generic(answer)
    assert not numeric(answer)


def test_an_answer_is_generic_where_it_stands_everywhere() -> None:
    texts = ["in London"] * 5 + ["in Harwick town"] * 3 + ["elsewhere"] * 1000
    counts = Frequencies.of([passage(text, str(n)) for n, text in enumerate(texts)], ["London", "Harwick Town", "Rome"])
    assert counts.answers == {"london": 5, "harwick town": 3}
    guard = Guard(counts)
    assert [guard.generic(name) for name in ("London", "Harwick Town", "Rome", "not counted")] == [True, False, False, False]
    assert guard.verdict(Example("q", "Where is it?", ("London",)), passage("in London")) == "answer_string_only"


@pytest.mark.parametrize(("often", "seldom", "text"), [
    ("London", "Harwick town", "London is large."), ("南浔", "望溪镇", "南浔是一座古镇。"),
    ("New London", "London New", "In New London."),
])  # fmt: skip
def test_an_answer_that_nobody_named_before_is_counted_when_it_is_asked_for(often: str, seldom: str, text: str) -> None:
    texts = [text] * 5 + [f"{seldom}。"] * 3 + ["elsewhere 别处"] * 1000
    passages = [passage(own, str(n)) for n, own in enumerate(texts)]
    guard = Guard(replace(Frequencies.of(passages), occurrences=Occurrences(passages)))
    assert [guard.generic(name) for name in (often, seldom, "Rome", "罗马")] == [True, False, False, False]
    assert guard.verdict(Example("q", "Where? 在哪里？", (often,)), passage(text)) == "answer_string_only"


@given(st.lists(st.lists(st.sampled_from(["a", "b", "c", "三", "千", "3,000"]), max_size=8), max_size=9), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_occurrences_are_those_of_counting_one_by_one(texts: list[list[str]], size: int) -> None:
    passages = [passage(" ".join(words), str(n), title="b c") for n, words in enumerate(texts)]
    counts = Occurrences(passages)
    told = [[[placed.word for placed in placed_words(text)] for text in (one.title, one.text)] for one in passages]
    for wanted in itertools.product(["a", "b", "c", "三", "3000", "x"], repeat=size):
        runs = [{tuple(words[at : at + size]) for words in own for at in range(len(words) - size + 1)} for own in told]
        holding = sum(wanted in own for own in runs)
        assert not holding or counts.more_than(holding - 1, wanted)
        assert not counts.more_than(holding, wanted)


@pytest.mark.parametrize(("opinion", "verdict"), [(None, "unchecked"), (True, "also_gold"), (False, "clean")])
def test_answers_that_are_no_strings_go_to_the_judge(opinion: bool | None, verdict: str) -> None:
    example = Example("q", "Why?", ("?",))
    assert Guard(COUNTS).verdict(example, GOLD) == "unchecked"
    assert Guard(COUNTS, judge=lambda example, passage: opinion).verdict(example, GOLD) == verdict


def test_frequencies_are_those_of_counting_one_by_one() -> None:
    texts = ["the observatory of Aldermere", "Aldermere, Aldermere", "青浦大桥", "大桥 in 1998"]
    counts = Frequencies.of(passage(text, str(n)) for n, text in enumerate(texts))
    for term in {term for text in texts for term in content_terms(text)}:
        assert counts.terms[term] == sum(term in content_terms(text) for text in texts)
    assert counts.passages == 4
    assert counts.idf("aldermere") == log(2)
    assert counts.idf("never") == log(4)
    assert Frequencies(0, {}).coverage("Aldermere?", GOLD) == 0


# False values


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        (["1998年", "一九九八年"], "year"),
        (["1873"], "year"),
        (["12 March 1873", "March 12, 1873"], "date"),
        (["3月12日"], "date"),
        (["March"], "date"),
        (["3,000"], "number"),
        (["三千"], "number"),
        (["3 km"], "number"),
        (["twenty-one"], "number"),
        (["北京大学"], "name"),
        (["张伟"], "name"),
        (["Barack Obama", "Obama"], "name"),
        (["Vistula River"], "name"),
        (["Lake Geneva"], "name"),
    ],
)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=12, deadline=None)
def test_a_false_value_is_of_the_same_type_and_another(answers: list[str], kind: str, seed: int) -> None:
    values = swap(answers, seed=str(seed))
    assert value_type(answers[0]) == kind
    assert set(answers) <= set(values)
    assert value_type(values[answers[0]]) == kind
    assert not held(passage("\n".join(values.values())), answers)
    assert values == swap(answers, seed=str(seed))
    assert bool(values) == (values[answers[0]] != answers[0])


def test_what_has_no_false_value_has_none() -> None:
    assert swap(["yes"], seed="1") == swap(["?"], seed="1") == swap(["a red barn"], seed="1") == swap([], seed="1") == {}
    assert swap(["red barn"], seed="1", pool=["grey mill", "Harwick", "red barn"]) == {"red barn": "grey mill"}
    assert swap(["Paris"], seed="1", pool=["Rome"]) == {"Paris": "Rome"}
    assert swap(["Paris"], seed="1", pool=["Rome"], avoid="Is it Rome?") == {}


def test_a_false_value_is_written_as_the_true_one_was() -> None:
    values = {"1998年": "2003年", "3,000": "4,700", "Paris": "Rome"}
    text = "一九九八年, 1998年; 3000 三千 3,000 in PARIS and Paris"
    assert replaced(text, values) == "二〇〇三年, 2003年; 4700 四千七百 4,700 in ROME and Rome"


ANSWERED = st.sampled_from([
    (("1873",), "The mill of 1873 burnt. In 1873, people say, it was old.", "Year 1873"),
    (("1998年", "一九九八年"), "大桥于一九九八年建成，1998年通车。", "1998年的桥"),
    (("Barack Obama", "Obama"), "Obama spoke. BARACK OBAMA left. Obama's car came.", "Barack Obama"),
    (("3,000",), "三千人来了。Of 3000 guests 3,000 stayed.", ""),
    (("北京大学",), "北京大学位于海淀。", "北京大学"),
    (("12 March 1873", "March 12, 1873"), "On 12 March 1873, that is March 12, 1873, it rained.", ""),
])  # fmt: skip


@given(ANSWERED, st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_a_counterfactual_keeps_no_alias_of_the_truth(case: tuple[tuple[str, ...], str, str], seed: int) -> None:
    answers, text, title = case
    example = Example("q", "What?", answers)
    source = gold_slots([passage(text, title=title)])[0]
    made = counterfactual(example, source, seed=str(seed))
    assert made is not None
    assert not held(made.passage, answers)
    assert held(made.passage, [made.value])
    assert (made.role, made.kind, made.origin, made.parents, made.guard) == ("noise", "counterfactual", "made", ("p",), "clean")
    assert made.operator.startswith("swap_")


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        ("$3.5 million", "It cost $3.5 million to build.", r"It cost \$\d\.5 million to build\."),
        ("$3.5 million", "It cost US$ 3.5 million.", r"It cost US\$ \d\.5 million\."),
        ("50%", "Of all votes 50% were valid, fifty in a hundred.", r"Of all votes \d\d% were valid, fifty in a hundred\."),
        ("50%", "It was 50 per cent.", r"It was \d\d per cent\."),
        ("€20", "A ticket is €20.", r"A ticket is €\d\d\."),
        ("-5 °C", "It fell to -5 °C at night.", r"It fell to -\d °C at night\."),
        ("-5 °C", "It fell to \u22125 °C at night.", "It fell to \u2212\\d °C at night\\."),
        ("12%", "占总数的百分之十二。", "占总数的百分之[一二三四五六七八九十]+。"),
        ("12%", "占12%，即百分之十二。", r"占\d\d%，即百分之[一二三四五六七八九十]+。"),
        ("3,000米。", "山高3,000米。", r"山高\d,000米。"),
        ("3,000米。", "山高3,000米，山脚三千米。", r"山高\d,000米，山脚[一二四五六七八九]千米。"),
        ("《春江》", "他写了《春江》。", "他写了《[^《》]+》。"),
    ],
)
def test_no_sign_about_a_value_stands_twice(answer: str, text: str, expected: str) -> None:
    example = Example("q", "How much?", (answer,))
    for seed in range(8):
        made = counterfactual(example, gold_slots([passage(text)])[0], seed=str(seed))
        assert made is not None
        assert re.fullmatch(expected, made.passage.text), made.passage.text
        assert made.passage.text != text


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        (
            "12 March 1873",
            "On March 12, 1873 it opened; 12 March 1873 was dry.",
            r"On March 12, (\d{4}) it opened; 12 March \1 was dry\.",
        ),
        ("12 March 1873", "Since 12 March 1873 (1873-03-12, 3/12/1873).", r"Since 12 March (\d{4}) \(\1-03-12, 3/12/\1\)\."),
        ("12 March 1873", "12 March 1873, the 12th of March, 1873.", r"12 March (\d{4}), the 12th of March, \1\."),
        ("March 1873", "March 1873, or rather Mar. 12, 1873.", r"March (\d{4}), or rather Mar\. 12, \1\."),
        (
            "1873年3月12日",
            "1873年3月12日，即一八七三年三月十二日，12 March 1873。",
            r"(\d{4})年3月12日，即[一二〇三四五六七八九]{4}年三月十二日，12 March \1。",
        ),
        ("1998年", "1998年建成（1998-07-12通车）。", r"(\d{4})年建成（\1-07-12通车）。"),
    ],
)
def test_other_spellings_of_a_date_change_with_it(answer: str, text: str, expected: str) -> None:
    made = counterfactual(Example("q", "When?", (answer,)), gold_slots([passage(text)])[0], seed="4")
    assert made is not None
    assert re.fullmatch(expected, made.passage.text), made.passage.text
    assert "1873" not in made.passage.text
    assert held(made.passage, [made.value])


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("1998年", "大桥于1998年建成，民国八十七年通车。"),
        ("1998年", "大桥于1998年建成，98年通车。"),
        ("1998年", "大桥于1998年建成，九八年通车。"),
        ("1912年", "1912年，即民國元年。"),
        ("1998", "Built in 1998, it was the talk of '98."),
        ("3 March", "It was 3 March, 1873-03-03."),
        ("$3.5 million", "It cost $3.5 million, or 3,500,000 dollars."),
        ("3.5 million", "共3.5 million，即350万。"),
    ],
)
def test_a_passage_in_which_the_truth_stays_is_no_counterfactual(answer: str, text: str) -> None:
    slot = gold_slots([passage(text)])[0]
    assert counterfactual(Example("q", "When?", (answer,)), slot, seed="4") is None
    first = text.split("，")[0].split(",")[0]
    assert counterfactual(Example("q", "When?", (answer,)), gold_slots([passage(first)])[0], seed="4") is not None


def test_another_date_is_no_other_spelling() -> None:
    text = "On 12 March 1873 it rained, on March 13, 1873 and 12 April 1873 it did not; 民国八十六年, '97 and 5 million."
    assert respelled(text, ["12 March 1873"]) == respelled(text, ["1998年"]) == respelled(text, ["$5 thousand"]) == []
    assert respelled(text, ["March 13, 1873", "yes", ""]) == []


def test_the_worked_counterfactual() -> None:
    made = counterfactual(ALDERMERE, gold_slots([GOLD])[0], seed="1")
    assert made is not None
    assert made.value != "1873"
    assert GUARD.verdict(ALDERMERE, made.passage) == "clean"
    with pytest.raises(RecipeError, match="counterfactual is made from gold and may not stand where gold is absent"):
        fill_with(["counterfactual"], absent=True)


def test_the_worked_counterfactual_of_1874() -> None:
    """The operator's 1874 beside two that say 1873: clean, whoever looks at it. Where gold is absent it has no place."""
    source = gold_slots([GOLD])[0]
    drawn = (counterfactual(ALDERMERE, source, seed=str(seed)) for seed in range(2000))
    made = next(slot for slot in drawn if slot is not None and slot.value == "1874")
    assert made.passage.text == "The Aldermere observatory opened its doors in 1874. It stands on a hill."
    assert (made.role, made.kind, made.guard) == ("noise", "counterfactual", "clean")
    assert GUARD.verdict(ALDERMERE, made.passage) == "clean"
    for kind in (kind.name for kind in PALETTE if not kind.without_gold):
        with pytest.raises(RecipeError, match=f"{kind} is made from gold and may not stand where gold is absent"):
            fill_with(["hard", kind], absent=True)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("2020年", "大桥于2020年建成，历时二十年。"),
        ("2018年", "大桥于2018年建成，已使用十八年。"),
        ("1915年", "大桥于1915年建成，后停用十五年。"),
        ("一九九八年", "大桥于一九九八年建成，历时十年，二十年后重修。"),
    ],
)
def test_a_count_of_years_is_no_year_cut_short(answer: str, text: str) -> None:
    """98年 and 九八年 may be 1998; 十八年 and 二十年 are counts and never a year's last two digits."""
    count = text.partition("，")[2]
    assert respelled(count, [answer]) == []
    made = counterfactual(Example("q", "When?", (answer,)), gold_slots([passage(text)])[0], seed="4")
    assert made is not None
    assert count in made.passage.text


def test_a_counterfactual_of_what_cannot_be_swapped_is_none() -> None:
    assert counterfactual(Example("q", "Is it?", ("yes",)), gold_slots([passage("yes it is")])[0], seed="1") is None
    assert counterfactual(ALDERMERE, gold_slots([passage("no year here")])[0], seed="1") is None


# Other operators


@pytest.mark.parametrize(
    ("text", "operator"),
    [
        ("It opened in 1873. It is old. It is on a hill.", "reorder"),
        ("It became known in 1873 because of its dome", "reword"),
        ("大桥于1873年建成。全长很长。", "reorder"),
        ("大桥位于河上，1873年建成", "reword"),
    ],
)
def test_a_near_duplicate_says_the_same_otherwise(text: str, operator: str) -> None:
    source = gold_slots([passage(text)])[0]
    made = [near_duplicate(ALDERMERE, source, seed=str(seed)) for seed in range(8)]
    kept = [slot for slot in made if slot is not None and slot.operator == operator]
    assert kept
    for slot in kept:
        assert held(slot.passage, ["1873"])
        assert content_hash(slot.passage) != content_hash(source.passage)
        assert (slot.role, slot.parents) == ("redundant", ("p",))
        if operator == "reorder":
            assert Counter(slot.passage.text.replace(" ", "")) == Counter(text.replace(" ", ""))


def test_nothing_to_reword_makes_no_near_duplicate() -> None:
    assert near_duplicate(ALDERMERE, gold_slots([passage("1873 it was")])[0], seed="1") is None


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_garbled_gold_is_labelled_by_what_is_left(seed: int) -> None:
    made = garbled(ALDERMERE, gold_slots([GOLD])[0], seed=str(seed))
    assert made is not None
    left = held(made.passage, ["1873"])
    assert (made.role, made.guard) == (("redundant", "also_gold") if left else ("noise", "clean"))
    assert made.operator in ("truncate", "scan")
    if made.operator == "truncate":
        assert GOLD.text.startswith(made.passage.text)


def test_garbled_gold_is_of_both_kinds_and_both_roles() -> None:
    made = [garbled(ALDERMERE, gold_slots([GOLD])[0], seed=str(seed)) for seed in range(60)]
    assert {(slot.operator, slot.role) for slot in made if slot} == {
        (operator, role) for operator in ("truncate", "scan") for role in ("redundant", "noise")
    }


def test_boilerplate_speaks_the_questions_language() -> None:
    english = [boilerplate("Who is it?", seed=str(seed)).passage.text for seed in range(40)]
    chinese = [boilerplate("他是谁？", seed=str(seed)).passage.text for seed in range(40)]
    assert len({*english}) > 10
    assert all(text.isascii() for text in english)
    assert not any(text.isascii() for text in chinese)
    assert not any("{" in text for text in [*english, *chinese])


# Dealing kinds and positions

PALETTE_OF_37 = dict(zip(KINDS, (15, 4, 7, 4, 3, 2, 1, 1), strict=True))


def test_the_palette_is_whole() -> None:
    assert sum(float(kind.weight) for kind in PALETTE) == pytest.approx(1)
    assert [kind.name for kind in PALETTE if not kind.without_gold] == ["counterfactual", "near_duplicate", "garbled"]


def test_rare_kinds_occur_because_all_slots_are_dealt_together() -> None:
    cells = [Cell(4, gold_absent=number % 5 == 0, decidable=number % 2 == 0) for number in range(9)] + [Cell(1)]
    dealt = deal_kinds(cells, PALETTE_OF_37, seed=13)
    assert [len(kinds) for kinds in dealt] == [4] * 9 + [1]
    assert Counter(kind for kinds in dealt for kind in kinds) == PALETTE_OF_37
    assert all(cell.takes(kind) for cell, kinds in zip(cells, dealt, strict=True) for kind in kinds)
    assert dealt == deal_kinds(cells, PALETTE_OF_37, seed=13) != deal_kinds(cells, PALETTE_OF_37, seed=14)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"garbled": 3, "hard": 3}, "3 slots are to be garbled, and only 2 may be"),
        ({"hard": 5}, "5 kinds for 6 slots"),
        ({"loud": 6}, "'loud' is no kind of noise"),
    ],
)
def test_kinds_that_do_not_fit_are_refused(counts: dict[str, int], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        deal_kinds([Cell(4, gold_absent=True), Cell(2)], counts, seed=1)


def test_gold_positions_of_23_examples() -> None:
    dealt = deal_positions([(5, 1)] * 23, seed=13)
    assert [sum(place in places for places in dealt) for place in range(1, 6)] == [5, 5, 5, 4, 4]


@given(st.lists(st.integers(1, 6).flatmap(lambda k: st.tuples(st.just(k), st.integers(0, k))), max_size=40), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_positions_of_each_k_differ_by_at_most_one(prompts: list[tuple[int, int]], seed: int) -> None:
    dealt = deal_positions(prompts, seed=seed)
    used: dict[int, Counter[int]] = {}
    for (k, gold), places in zip(prompts, dealt, strict=True):
        assert len(places) == len(set(places)) == gold
        assert set(places) <= set(range(1, k + 1))
        used.setdefault(k, Counter(dict.fromkeys(range(1, k + 1), 0))).update(places)
    for counts in used.values():
        assert max(counts.values()) - min(counts.values()) <= 1


def test_too_much_gold_is_refused() -> None:
    with pytest.raises(RecipeError, match="3 gold passages do not fit into 2 slots"):
        deal_positions([(2, 3)], seed=1)


def slots_of(roles: str) -> list[Slot]:
    """g for gold, n for noise; ranks descend, so that `rank` has something to do."""
    names: dict[str, Slot] = {}
    for place, letter in enumerate(roles):
        role = "gold" if letter == "g" else "noise"
        names[f"{letter}{place}"] = Slot(passage("", f"{letter}{place}"), role, role, "search", rank=len(roles) - place)
    return list(names.values())


def names(slots: Sequence[Slot]) -> list[str]:
    return [slot.passage.id for slot in slots]


@pytest.mark.parametrize(
    ("order", "wanted"),
    [
        ("first", ["g0", "n1", "n2", "n3", "n4"]),
        ("middle", ["n1", "n2", "g0", "n3", "n4"]),
        ("last", ["n1", "n2", "n3", "n4", "g0"]),
        ("rank", ["n4", "n3", "n2", "n1", "g0"]),
    ],
)
def test_controlled_orders(order: str, wanted: list[str]) -> None:
    assert names(arrange(slots_of("gnnnn"), seed="1", order=order)) == wanted  # type: ignore[arg-type]


@given(st.integers(0, 99), st.permutations(range(1, 7)))
@settings(deadline=None)
def test_gold_stands_where_it_was_dealt(seed: int, places: list[int]) -> None:
    slots = slots_of("ggnnnn")
    arranged = arrange(slots, seed=str(seed), positions=places[:2])
    assert sorted(names(arranged)) == sorted(names(slots))
    assert [place for place, slot in enumerate(arranged, 1) if slot.role == "gold"] == sorted(places[:2])


def test_positions_that_do_not_fit_are_refused() -> None:
    for positions in ([1], [1, 1], [1, 7]):
        with pytest.raises(RecipeError, match="do not fit 2 gold passages of 6"):
            arrange(slots_of("ggnnnn"), seed="1", positions=positions)


@pytest.mark.parametrize(("k", "count"), [(5, 4), (3, 6), (2, 2), (1, 1)])
def test_four_different_orders_or_all_there_are(k: int, count: int) -> None:
    found = orders(k, max(4, count), seed="1")
    assert len(found) == len(set(found)) == count
    assert found[0] == tuple(range(k))
    assert all(sorted(order) == list(range(k)) for order in found)


# Filling

FILLER = [passage(f"Page {n} tells of barley, tides and the weaver number {n}.", f"c{n}") for n in range(40)]
BURNT = passage("In the year 1873 a fire destroyed the Harwick mill", "burnt")
ALSO = passage("The Aldermere observatory admitted its first visitors in 1873", "also")
POOL = [*FILLER, BURNT, ALSO, GOLD, SECOND, passage(GOLD.text, "copy")]


def hits(passages: Sequence[Passage]) -> list[Hit]:
    return [Hit(found, row, 9.0 - row / 10, row + 1) for row, found in enumerate(passages)]


SOURCES = Sources(
    hits=hits([GOLD, BURNT, ALSO, *FILLER[:8]]), retriever="bm25", corpus=POOL,
    neighbours=[
        Passage("next", "The hill is steep.", "", "almanac", 200, 220), Passage("lap", "It stands", "", "almanac", 160, 180),
    ],
    other_gold=[passage("The mill of Harwick turned slowly.", "other"), *FILLER[8:12]],
)  # fmt: skip


def fill_with(kinds: Sequence[str], *, seed: int = 1, absent: bool = False, gold: Sequence[Passage] = (GOLD,), **more: object):  # type: ignore[no-untyped-def]
    placed = () if absent else gold_slots(gold)
    settings = {"sources": SOURCES, "guard": GUARD} | more
    return fill(ALDERMERE, placed, kinds=kinds, gold=gold, seed=seed, gold_absent=absent, **settings)  # type: ignore[arg-type]


WITHOUT_GOLD = [kind.name for kind in PALETTE if kind.without_gold]


@given(st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=9), st.integers(0, 999), st.booleans())
@settings(max_examples=80, deadline=None)
def test_k_never_shrinks_and_no_text_stands_twice(kinds: list[str], seed: int, two: bool) -> None:
    gold = [GOLD, SECOND] if two else [GOLD]
    slots = fill_with(kinds, seed=seed, gold=gold)
    assert len(slots) == len(gold) + len(kinds)
    assert slots == fill_with(kinds, seed=seed, gold=gold)
    assert len({content_hash(slot.passage) for slot in slots}) == len({slot.passage.id for slot in slots}) == len(slots)
    assert decidable(slots)
    for slot in slots[len(gold) :]:
        answers = held(slot.passage, ["1873"])
        if slot.kind == "counterfactual":
            assert not answers
        elif answers:
            assert slot.role in ("support", "redundant") or slot.guard == "answer_string_only"
        assert slot.record()["kind"] in KINDS


@given(st.lists(st.sampled_from(WITHOUT_GOLD), min_size=1, max_size=9), st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_without_gold_nothing_answers_even_when_rendered(kinds: list[str], seed: int) -> None:
    slots = fill_with(kinds, seed=seed, absent=True)
    assert len(slots) == len(kinds)
    assert all(slot.role == "noise" and KINDS[slot.kind].without_gold for slot in slots)
    assert not shown_answers(ALDERMERE, "\n\n".join(f"[{slot.passage.title}] {slot.passage.text}" for slot in slots))
    assert not {"lap", "also", "burnt", "second", "copy", "gold"} & set(names(slots))


def test_an_answer_in_the_rendered_passages_is_seen() -> None:
    assert shown_answers(ALDERMERE, "title: since 1873\ntext: none") == ["1873"]


def test_a_neighbour_that_answers_is_relabelled_or_replaced() -> None:
    sources = Sources(neighbours=[Passage("near", ALSO.text, "", "almanac", 300, 360)], corpus=FILLER)
    (_, found) = fill_with(["neighbour"], sources=sources)
    assert (found.passage.id, found.role, found.guard, found.kind) == ("near", "support", "also_gold", "neighbour")
    (_, found) = fill_with(["neighbour"], sources=sources, found="replace")
    assert (found.role, found.guard, found.kind) == ("noise", "clean", "random")
    (found,) = fill_with(["neighbour"], sources=sources, absent=True)
    assert (found.role, found.kind) == ("noise", "random")


def test_hard_noise_is_of_rank_2_to_30_and_says_so() -> None:
    found = fill_with(["hard"] * 10, gold=[GOLD], sources=Sources(hits=hits([*POOL]), retriever="dense", corpus=FILLER))[1:]
    assert all(2 <= slot.rank <= 30 and slot.retriever == "dense" for slot in found)
    assert all(slot.score == 9.0 - (slot.rank - 1) / 10 for slot in found)
    assert found[0].record() == {
        "passage": found[0].passage.id, "parents": [], "role": "noise", "kind": "hard", "origin": "search", "operator": "",
        "guard": "clean", "retriever": "dense", "rank": found[0].rank, "score": found[0].score, "value": "",
    }  # fmt: skip


def test_too_small_a_corpus_is_an_error_and_no_endless_search() -> None:
    with pytest.raises(CorpusError, match="'q1': 3 different passages were found for 6 slots, and no more of kind random"):
        fill_with(["random"] * 5, sources=Sources(corpus=[*FILLER[:2], GOLD, FILLER[0]]))


def test_random_noise_is_found_at_the_end_of_a_large_corpus() -> None:
    same = [passage("the same", f"s{n}") for n in range(500)]
    (_, *found) = fill_with(["random"] * 2, sources=Sources(corpus=[*same, passage("another", "last")]))
    assert {slot.passage.text for slot in found} == {"the same", "another"}


def test_neighbours_are_the_rest_of_the_document(tmp_path: Path) -> None:
    write_corpus(tmp_path, [GOLD, Passage("next", "b", "", "almanac", 200, 201), SECOND])
    assert [found.id for found in neighbours(Corpus(tmp_path), [GOLD])] == ["next"]


# What has no right answer


def test_one_against_one_is_not_written() -> None:
    (_, found) = fill_with(["counterfactual"])
    assert found.kind != "counterfactual"
    with pytest.raises(CorpusError, match="no more of kind counterfactual"):
        fill_with(["counterfactual"], fallback=())


def test_two_voices_for_the_truth_settle_it() -> None:
    slots = fill_with(["counterfactual"], gold=[GOLD, SECOND])
    assert slots[-1].kind == "counterfactual"
    assert decidable(slots)


def test_one_documents_passages_and_near_duplicates_are_one_voice() -> None:
    again = Passage("again", "In 1873, as told above, the Aldermere observatory opened.", "", "almanac", 400, 450)
    found = fill_with(["near_duplicate", "counterfactual"], gold=[GOLD, again])[-1]
    assert found.kind != "counterfactual"


def test_found_support_is_a_voice() -> None:
    sources = Sources(neighbours=[ALSO], corpus=FILLER)
    slots = fill_with(["counterfactual", "neighbour"], sources=sources)
    assert [slot.kind for slot in slots] == ["gold", "counterfactual", "neighbour"]
    assert decidable(slots)


def test_a_conflict_is_filled_though_nothing_settles_it() -> None:
    slots = fill_with(["counterfactual"], conflict=True)
    assert slots[-1].value
    assert not decidable(slots)



# Sweeps


@pytest.mark.parametrize("ratio", [0, 0.25, 0.5, 0.75, 1])
@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("kind", ["random", "hard"])
def test_a_sweep_exchanges_a_share_of_the_slots_without_gold(ratio: float, absent: bool, kind: str) -> None:
    found = hits([GOLD, BURNT, ALSO, *FILLER[:17]])
    sources = Sources(hits=found, corpus=POOL)
    slots = sweep(
        ALDERMERE, found[:9], gold=[GOLD], kind=kind, ratio=ratio, gold_absent=absent, sources=sources, guard=GUARD, seed=3
    )
    free = 9 if absent else 8
    assert len(slots) == 9
    assert [slot.role for slot in slots].count("gold") == (0 if absent else 1)
    exchanged = sum(slot.kind == kind for slot in slots)
    assert exchanged >= int(ratio * free + 0.5)
    if kind == "random" and not absent:
        assert exchanged == int(ratio * free + 0.5)
    if absent:
        assert not any(held(slot.passage, ["1873"]) for slot in slots)


def test_a_sweep_may_set_one_against_one_but_not_without_gold() -> None:
    settings = {"gold": [GOLD], "kind": "counterfactual", "ratio": "1/2", "sources": SOURCES, "guard": GUARD, "seed": 1}
    slots = sweep(ALDERMERE, hits([GOLD, *FILLER[:2]]), gold_absent=False, **settings)  # type: ignore[arg-type]
    assert [slot.kind for slot in slots] == ["gold", "retrieved", "counterfactual"]
    with pytest.raises(RecipeError, match="may not stand where gold is absent"):
        sweep(ALDERMERE, hits([GOLD, *FILLER[:2]]), gold_absent=True, **settings)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="a noise ratio of 2 is not possible"):
        sweep(ALDERMERE, hits([GOLD]), gold_absent=True, **settings | {"ratio": 2})  # type: ignore[arg-type]


# Several retrievers


def found_by(*ids: str) -> list[Hit]:
    return hits([passage("text of a" if name == "a2" else f"text of {name}", name) for name in ids])


def test_hits_are_taken_in_turn_and_each_once() -> None:
    pooled = pool({"bm25": found_by("a", "b", "c"), "dense": found_by("b", "a2", "d", "e")}, 4)
    assert [(found.hit.passage.id, found.retriever, found.hit.rank) for found in pooled] == [
        ("a", "bm25", 1), ("b", "dense", 1), ("c", "bm25", 3), ("d", "dense", 3),
    ]  # fmt: skip


@given(st.lists(st.lists(st.integers(0, 9), unique=True, max_size=6), min_size=1, max_size=4), st.integers(1, 8))
@settings(deadline=None)
def test_a_pool_is_the_unions_prefix(lists: list[list[int]], k: int) -> None:
    by_name = {str(n): hits([FILLER[row] for row in rows]) for n, rows in enumerate(lists)}
    whole = [found.hit.passage.id for found in pool(by_name, 99)]
    assert sorted(whole) == sorted({FILLER[row].id for rows in lists for row in rows})
    assert [found.hit.passage.id for found in pool(by_name, k)] == whole[:k]
    twin = [rows[turn] for turn in range(6) for rows in lists if turn < len(rows)]
    assert whole == [FILLER[row].id for row in dict.fromkeys(twin)]


def test_a_score_of_nothing_is_no_hit() -> None:
    assert pool({"bm25": [Hit(GOLD, 0, 0.0, 1), Hit(SECOND, 1, -0.2, 2)]}, 5)[0].hit.passage.id == "second"


def test_a_retriever_that_always_finds_the_same_is_refused() -> None:
    queries = [f"question {n}?" for n in range(4)]
    with pytest.raises(IndexMismatch, match="'stuck' finds the same 2 passages, 'a' first, for all of 4 different questions"):
        check_varied(queries, [found_by("a", "b")] * 4, name="stuck")
    check_varied(queries, [[], [], [], hits([GOLD])], name="fine")
    many = [f"第{n}个问题？" for n in range(20)]
    check_varied(many[:19], [[]] * 19, name="too few to tell")
    with pytest.raises(IndexMismatch, match="'stuck' finds nothing for all of 20 different questions"):
        check_varied(many, [[]] * 20, name="stuck")
    check_varied(queries, [*[found_by("a", "b")] * 3, found_by("b", "a")], name="fine")
    check_varied(queries[:3], [found_by("a")] * 3, name="too few to tell")
    check_varied(["Same?"] * 9, [hits([GOLD])] * 9, name="asked the same")


@pytest.fixture(scope="module")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    """30 towers, each with its miller and year."""
    folder = tmp_path_factory.mktemp("towers")
    tiny.sentence_encoder(folder)
    texts = [f"the tower {n}x was built in {1700 + n} by miller {n}y. it is old." for n in range(30)]
    rows = [{"id": f"t{n}", "title": "", "text": text} for n, text in enumerate(texts)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "path": folder / "kb", "documents": [folder / "rows.jsonl"], "chunk": None,
        "encoder": {"model": str(folder / "encoder"), "dtype": "float32"},
        "indexes": {"dense": {"kind": "dense"}, "bm25": {"kind": "bm25"}, "hybrid": {"kind": "hybrid"}},
    }  # fmt: skip
    base = build_knowledge(KnowledgeSettings.model_validate(settings))
    return Retriever(base, Encoder.open(base.settings.encoder), index="dense")


def test_noise_among_hits_of_real_retrievers(retriever: Retriever) -> None:
    queries = [f"when was tower {n}x built" for n in range(5)]
    pooled = retrieve_pooled({"dense": retriever, "bm25": retriever.by("bm25")}, queries, 8)
    assert {found.retriever for found in pooled[0]} == {"dense", "bm25"}
    assert all(len({found.hit.passage.id for found in own}) == len(own) == 8 for own in pooled)
    corpus = retriever.base.corpus
    guard = Guard(Frequencies.of(corpus, [str(1700 + n) for n in range(5)]))
    for n, own in enumerate(retriever.by("bm25").retrieve(queries, 8)):
        example, gold = Example(f"q{n}", queries[n], (str(1700 + n),), (f"t{n}",)), [corpus[n]]
        assert guard.verdict(example, corpus[n], []) == "also_gold"
        kinds = ["hard", "hard", "random", "garbled", "near_duplicate", "counterfactual"]
        sources = Sources(hits=own, retriever="bm25", corpus=corpus)
        slots = fill(example, gold_slots(gold), kinds=kinds, gold=gold, sources=sources, guard=guard, seed=7, conflict=True)
        assert [slot.kind for slot in slots] == ["gold", *kinds]
        assert len({slot.passage.text for slot in slots}) == 7
        (places,) = deal_positions([(7, 1)], seed=n)
        arranged = arrange(slots, seed=str(n), positions=places)
        assert arranged[places[0] - 1].role == "gold"


def test_indexes_of_one_encoder_embed_a_query_once_and_find_the_same(
    retriever: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = {"dense": retriever, "bm25": retriever.by("bm25"), "hybrid": retriever.by("hybrid")}
    queries = [f"when was tower {n}x built" for n in range(3)]
    alone = {name: one.retrieve(queries, 8) for name, one in each.items()}
    embed, asked = retriever.encoder.embed_queries, []
    monkeypatch.setattr(retriever.encoder, "embed_queries", lambda texts, **more: asked.append(texts) or embed(texts, **more))
    assert retrieve_each(each, queries, 8) == alone
    assert asked == [queries]


def test_a_retriever_of_another_language_finds_nothing_and_is_refused(retriever: Retriever) -> None:
    many = [f"{asked}{number}座" for asked in ("桥在第", "谁建的塔是第") for number in "一二三四五六七八九十"]
    with pytest.raises(IndexMismatch, match="'bm25' finds nothing for all of 20 different questions"):
        retrieve_pooled({"bm25": retriever.by("bm25")}, many, 3)
    assert retrieve_pooled({"bm25": retriever.by("bm25")}, ["桥在哪里", "谁建的塔", "河有多长", "山有多高"], 3) == [()] * 4
    with pytest.raises(RecipeError, match="k is 31, but the knowledge base holds 30 passages"):
        retrieve_pooled({"bm25": retriever.by("bm25")}, ["tower"], 31)
    with pytest.raises(RecipeError, match="a pool of no retrievers"):
        retrieve_pooled({}, ["tower"], 2)


# The whole-passage budget

LENGTHS = [410, 390, 520, 300, 280]


@pytest.mark.parametrize(
    ("room", "gold", "kept"),
    [
        (1568, [], (0, 1, 2)),  # 1,320 tokens; 300 more would be 1,620
        (1568, [4], (0, 1, 4)),  # 1,080 tokens; 520 more would be 1,600
        (1600, [4], (0, 1, 2, 4)),
        (1568, [2, 4], (0, 2, 4)),
        (279, [4], None),
        (280, [4], (4,)),
        (100, [], ()),
        (1900, [0], (0, 1, 2, 3, 4)),
    ],
)
def test_whole_passages_that_fit(room: int, gold: list[int], kept: tuple[int, ...] | None) -> None:
    assert fit(LENGTHS, room, gold=gold) == kept
