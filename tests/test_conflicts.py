"""Where passages contradict each other: a target names every reading, with who tells it, whoever wrote them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from raglan.verification import Judge, Shown, Verifier, Written
from raglan.verification.judge import support_messages
from raglan.verification.readings import readings

OLD = Shown("The parish register holds that the mill at Orrin burnt in 1801, in a dry summer.", "Parish register")
NEW = Shown("A later chronicle says that the mill burnt in 1807.", "Chronicle")
NOISE = Shown("The mill pond froze over in the winter of the great flood.", role="noise", kind="hard")
TWIN = replace(NEW, role="noise", kind="counterfactual", false=("1807",))
PAIR = Written(
    "r6", "When did the mill at Orrin burn?", "", (OLD, NOISE, NEW), ("1801", "1807"), format="sentence", language="en",
    evidence="R6",
)  # fmt: skip
MADE = replace(PAIR, passages=(OLD, NOISE, TWIN), answers=("1801",))
ZH_PAIR = Written(
    "zh", "磨坊是哪一年烧毁的？", "",
    (Shown("教区登记册记载，磨坊毁于1801年的大火。"), Shown("池塘在那年冬天结了冰。", role="noise"),
     Shown("后来的编年史说，磨坊于一八〇七年烧毁。")),
    ("1801年", "1807年"), format="sentence", language="zh", evidence="R6",
)  # fmt: skip


def reason(one: Written, target: str, verifier: Verifier | None = None) -> str:
    return (verifier or Verifier()).verify(replace(one, target=target)).reason


@pytest.mark.parametrize("one", [PAIR, MADE], ids=["written by the teacher", "a made twin"])
@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("It burnt in 1801 [1].", "one_sided"), ("It burnt in 1801, says one passage.", "one_sided"),
        ("It was either 1801 or 1807.", "reading_unnamed"), ("It was 1801 or 1807 [1].", "reading_not_cited"),
        ("It was 1801 [1] or perhaps 1807 [2].", "noise_cited"), ("It was 1801 [3] or perhaps 1807 [1].", "reading_not_cited"),
        ("One says 1801 [1], another 1807 [9].", "citation_out_of_range"),
        ("One passage says 1801 [1], another 1807 [3].", ""), ("They disagree: 1801 or 1807 [1, 3].", ""),
        ("[1] says 1801, while [3] says 1807.", ""), ("One passage says 1801, the other 1807.", ""),
        ("By the Parish register it was 1801, by the Chronicle 1807.", ""),
    ],
)  # fmt: skip
def test_both_readings_with_their_passages(one: Written, target: str, why: str) -> None:
    made = reason(one, target)
    assert made == ("counterfactual_followed" if why == "one_sided" and "1801" not in target else why)


def test_the_other_side_alone_is_one_sided_too() -> None:
    assert reason(PAIR, "It burnt in 1807 [3].") == "one_sided"
    assert reason(MADE, "It burnt in 1807 [3].") == "counterfactual_followed"


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("磨坊毁于1801年[1]。", "one_sided"), ("是1801年或1807年。", "reading_unnamed"),
        ("1801年[1]或1807年[2]。", "noise_cited"),
        ("1801年或1807年[1]。", "reading_not_cited"), ("一则材料说是1801年[1]，另一则说是一八〇七年[3]。", ""),
        ("一则材料说是1801年，另一则说是1807年。", ""),
    ],
)  # fmt: skip
def test_both_readings_in_chinese(target: str, why: str) -> None:
    assert reason(ZH_PAIR, target) == why


def test_a_reasoning_ends_with_both_and_short_forms_cite_nothing() -> None:
    quotes = "##begin_quote##burnt in 1801##end_quote## [1] against ##begin_quote##the mill burnt in 1807##end_quote## [3]."
    reasoned = replace(PAIR, format="reasoning")
    assert reason(reasoned, f"{quotes} <ANSWER>: 1801") == "one_sided"
    assert reason(reasoned, f"{quotes} <ANSWER>: 1801 or 1807") == ""
    assert reason(replace(PAIR, format="span"), "1801 or 1807") == ""
    assert reason(replace(PAIR, format="cited"), "One passage says that it was in 1801, and another says 1807.") == "format"


def test_readings_are_what_only_some_passages_hold() -> None:
    both = replace(NEW, text="Contrary to the 1801 of the register, a chronicle has 1807.")
    alias = replace(PAIR, passages=(OLD, both), answers=("1801", "the year 1801", "1807"))
    assert [said.values for said in readings(alias) or ()] == [("1801",), ("1807",)]
    assert [said.passages for said in readings(alias) or ()] == [{1}, {2}]
    worded = replace(PAIR, answers=("in 1801", "about the year 1807"))
    assert [said.passages for said in readings(worded) or ()] == [{1}, {3}]
    twin = replace(MADE, answers=("in 1801",))
    assert {reason(one, "One passage says 1801 [1], another 1807 [3].") for one in (worded, twin)} == {""}
    assert readings(replace(PAIR, answers=("1801",))) is None, "what the other passage says is not known"
    assert readings(replace(PAIR, answers=("yes", "no"))) is None, "labels stand in passages by chance"
    third = replace(PAIR, passages=(OLD, NEW, replace(TWIN, text="It burnt in 1840.", false=("1840",))))
    assert reason(third, "One passage says 1801, another 1807.") == "one_sided"


def test_readings_that_strings_do_not_tell_are_the_paid_judges() -> None:
    open_ = replace(PAIR, answers=("1801",))
    assert reason(open_, "It burnt in 1801 [1], or later [3].") == "support_missing"
    verifier = Verifier(nli=lambda pairs: [1.0] * len(pairs), judge=Judge(lambda _: "yes"))
    assert reason(open_, "It burnt in 1801 [1], or later [3].", verifier) == "support_missing", "neither was asked for sides"
    for one, words in ((open_, "one of them alone"), (replace(ZH_PAIR, answers=("1801年",)), "只说其中一种")):
        system = support_messages(replace(one, target="1801"))[0]["content"]
        assert words in system
        assert words not in support_messages(replace(one, target="1801", evidence="R7"))[0]["content"]
    assert "agrees" in support_messages(replace(open_, answers=(), target="1801"))[0]["content"]
