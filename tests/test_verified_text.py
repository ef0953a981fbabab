"""What is read in a target and a question: marks, quotes, numbers, yes and no, reasoning; both ways, English and Chinese."""

from __future__ import annotations

from dataclasses import replace

import pytest

from raglan.verification import Shown, Verifier, Written
from raglan.verification.said import cited, plain

GOLD = Shown("The bridge at Orrin was built by Odo Hask in 1801. It stands on twelve piers, and nobody has counted its stones.")
NOISE = Shown("Grain was weighed at the gate on market days.", role="noise", kind="hard")
THEN = Shown("The bridge is kept by the guild.", role="noise", kind="outdated", false=("the guild",))
NOW = Shown("The bridge is kept by the town.")
ONE = Written("a", "When was the bridge at Orrin built?", "", (GOLD, NOISE), ("1801",), format="sentence", language="en")
ZH = Written(
    "z", "奥林大桥是哪一年建成的？", "",
    (Shown("奥林大桥建成于1801年，有十二个桥墩。"), Shown("市集日在门口称粮食。", role="noise")),
    ("1801年",), format="sentence", language="zh",
)  # fmt: skip


def reason(one: Written, target: str) -> str:
    return Verifier().verify(replace(one, target=target)).reason


@pytest.mark.parametrize(
    ("one", "target", "why"),
    [
        # brackets that are syntax cite nothing
        (replace(ONE, format="json"), '{"years": [1801]}', ""),
        (replace(ONE, format="code"), "print(items[9]); year = 1801", ""),
        (replace(ZH, format="json"), '{"年份": [1801]}', "not_the_answer"),
        (replace(ZH, format="json"), '{"年份": "1801年[9]"}', ""),
        (replace(ONE, format="table"), "| year | all |\n| 1801 | [9] |", ""),
        (replace(ONE, format="table"), "| year | of |\n| 1801 [9] | x |", "citation_out_of_range"),
        # marks of all kinds
        (ONE, "It was built in 1801 ［9］.", "citation_out_of_range"),
        (ONE, "It was built in 1801 [1-9].", "citation_out_of_range"),
        (ONE, "It was built in 1801 ［２］.", "noise_cited"), (ONE, "It was built in 1801 [1–2].", "noise_cited"),
        (ZH, "建成于1801年［9］。", "citation_out_of_range"), (ZH, "建成于1801年【1至2】。", "noise_cited"),
        (ZH, "建成于1801年［１］。", ""),
        (ONE, "It was built in 1801 [1].", ""), (ONE, "It was built in 1801 [1-1].", ""),
        # quotes of all kinds
        (ONE, "It was built in 1801, by ‘a man of the coast’.", "fabricated_quote"),
        (ONE, "It was ‘built by Odo Hask’ in 1801.", ""),
        (ONE, "In 1801, ‘nobody hasn’t counted its stones’.", "fabricated_quote"),
        (ONE, "The miller’s men and the town’s, in 1801.", ""),
        (ZH, "1801年建成，人称『天下第一桥』。", "fabricated_quote"), (ZH, "1801年，『有十二个桥墩』。", ""),
        (ZH, "1801年建成，人称‘天下第一桥’。", "fabricated_quote"),
        # a reasoning that was left in
        (ONE, "<think>Odo built it in 1801.</think> It was built in 1801.", "reasoning_markup"),
        (ONE, "<think> It was built in 1801, so I say that.", "reasoning_markup"),
        (ZH, "</think>建成于1801年。", "reasoning_markup"),
        (replace(ONE, format="code"), "x = '<think>'  # 1801", ""),
    ],
)  # fmt: skip
def test_marks_quotes_and_reasoning(one: Written, target: str, why: str) -> None:
    assert reason(one, target) == why


def test_numbers_of_marks() -> None:
    assert cited(replace(ONE, target="a [1, 3] b【2】c ［4］ d [5-7] e [8至9] f [0]")) == [1, 3, 2, 4, 5, 6, 7, 8, 9, 0]
    assert cited(replace(ONE, target="[1-4000000]")) == [1, 4000000], "what nobody shows is not counted up"
    assert cited(replace(ONE, target="list[] of x[i] (1) {2}")) == []


@pytest.mark.parametrize(
    ("said", "left"),
    [
        ("<think>a [9]\nb</think> Odo built it.", "Odo built it."), ("hm, it was Odo\n</think>\n\nOdo.", "Odo."),
        ("<thinking>甲</thinking>乙", "乙"), ("[THINK]a[/THINK]Odo.", "Odo."), ("◁think▷a◁/think▷Odo.", "Odo."),
        ("<think>never closed", "<think>never closed"), ("Odo built it.", "Odo built it."), ("<think></think>", ""),
    ],
)  # fmt: skip
def test_a_closed_reasoning_is_taken_off(said: str, left: str) -> None:
    assert plain(said) == left


@pytest.mark.parametrize(
    ("form", "answers", "target", "why"),
    [
        ("yes_no", ("不是",), "不，它建成于1801年。", ""), ("yes_no", ("不是",), "否。它建成于1801年。", ""),
        ("yes_no", ("是的",), "是，建成于1801年。", ""),
        ("yes_no", ("是的",), "不是，建成于1801年。", "not_the_answer"), ("yes_no", ("否",), "不是，建成于1801年。", ""),
        ("yes_no", ("Yes, it is",), "Yes. It was built in 1801.", ""),
        ("yes_no", ("Yes, it is",), "No. It was not.", "not_the_answer"),
        ("yes_no", ("是",), "对，建成于1801年。", ""), ("yes_no", ("是",), "对于此桥，1801年建成。", "format"),
        ("yes_no", ("yes",), "Yes: it is so.", ""), ("yes_no", ("No, it is not",), "no, it was built in 1801", ""),
        ("reasoning", ("Yes, it is",), "##begin_quote##built by Odo Hask in 1801##end_quote## settles it: <ANSWER>: yes", ""),
        ("number", ("12",), "twelve piers", ""), ("number", ("12",), "12 piers", ""), ("number", ("twelve",), "12", ""),
        ("number", ("12",), "twenty-one piers", "not_the_answer"), ("number", ("12",), "several piers", "format"),
        ("number", ("12",), "eleven", "not_the_answer"), ("number", ("12个",), "十二个", ""),
    ],
)  # fmt: skip
def test_yes_and_no_and_numbers_in_other_words(form: str, answers: tuple[str, ...], target: str, why: str) -> None:
    zh = any("一" <= letter <= "龥" for letter in f"{target}{answers}")
    assert reason(replace(ZH if zh else ONE, format=form, answers=answers), target) == why


@pytest.mark.parametrize(
    ("passages", "target", "why"),
    [
        ((THEN, NOW), "It was kept by the guild [1], and is now kept by the town [2].", ""),
        ((THEN, NOW), "It is kept by the town [1][2].", "noise_cited"),
        ((THEN, NOW), "It is kept by the town [2].", ""), ((THEN, NOW), "It is kept by the guild [1].", "gold_not_cited"),
        ((replace(THEN, role="gold", false=()), NOW), "It is kept by the town [2].", ""),
        ((replace(THEN, role="gold", false=()), NOW), "It is kept by the town [1].", "gold_not_cited"),
        ((replace(THEN, kind="counterfactual"), NOW), "By the guild once [1], by the town now [2].", "noise_cited"),
    ],
)  # fmt: skip
def test_what_is_outdated_may_be_cited_for_what_was(passages: tuple[Shown, ...], target: str, why: str) -> None:
    one = replace(ONE, query="Who keeps the bridge?", evidence="R7", answers=("the town",), passages=passages)
    assert reason(one, target) == why
