"""A target that answers a part: what is shown bears it out, the rest is not told, and it says what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from raglan.verification import Judge, Shown, Verifier, Written
from raglan.verification.judge import support_messages

GOLD = Shown("The mill at Orrin was built by Odo Hask, who had come from the coast.")
NOISE = Shown("Grain was weighed at the gate on market days.", role="noise")
PART = Written(
    "p", "Who built the mill at Orrin, and when did it burn?", "", (NOISE, GOLD), ("Odo Hask", "1807"), format="sentence",
    language="en", evidence="R5", policy="partial",
    facts=("Odo Hask built the mill at Orrin.", "The mill burnt in 1807, and 14 people fled."),
)  # fmt: skip
ZH = Written(
    "z", "磨坊由谁建造，何时烧毁？", "",
    (Shown("市集日在门口称粮食。", role="noise"), Shown("奥林的磨坊由赫斯克建造。")), ("赫斯克", "1807年"),
    format="sentence", language="zh", evidence="R5", policy="partial", facts=("赫斯克建造了磨坊。", "磨坊于一八〇七年烧毁。"),
)  # fmt: skip
OPEN = "Odo Hask built it; the passages do not say when it burnt."


def reason(one: Written, target: str, verifier: Verifier | None = None) -> str:
    return (verifier or Verifier()).verify(replace(one, target=target)).reason


@pytest.mark.parametrize(
    ("one", "target", "why"),
    [
        (PART, OPEN, ""), (PART, "Odo Hask built it. When it burnt is missing.", ""),
        (PART, "The passages do not say when it burnt. Odo Hask built it.", ""),
        (PART, "Odo Hask built it, and it burnt in 1807.", "withheld_told"),
        (PART, "Odo Hask built it. When it burnt is not said, but it was 1807.", "withheld_told"),
        (PART, "Odo Hask built it. When it burnt is not said; 14 people fled.", "withheld_told"),
        (PART, "Odo Hask built it, as one can read.", "missing_not_said"),
        (PART, "It was built of stone, and when it burnt is not said.", "not_the_answer"),
        (PART, "The passages do not tell.", "abstains"),
        (replace(PART, answers=("Odo Hask",)), OPEN, "gold_answers_all"),
        (replace(PART, answers=("Odo Hask", "Odo Hask in 1807")), "Odo Hask in 1807; the rest is not said.", "withheld_told"),
        (replace(PART, answers=("Odo Hask", "a man called Odo Hask", "1807")), "A man called Odo Hask; when is not said.", ""),
        (replace(PART, answers=("Odo Hask", "in the year 1807")), "Odo Hask; when is missing, though 1807.", "withheld_told"),
        (replace(PART, answers=()), OPEN, "support_missing"),
        (replace(PART, passages=(replace(NOISE, text="It burnt in 1807."), GOLD)), OPEN, "answer_shown"),
        (ZH, "磨坊由赫斯克建造，材料没有说明何时烧毁。", ""), (ZH, "由赫斯克建造，缺少烧毁的年份。", ""),
        (ZH, "由赫斯克建造，一八〇七年烧毁。", "withheld_told"), (ZH, "磨坊由赫斯克建造。", "missing_not_said"),
        (replace(ZH, answers=("赫斯克",)), "由赫斯克建造，没有提到何时烧毁。", "gold_answers_all"),
    ],
)  # fmt: skip
def test_what_part_is_told(one: Written, target: str, why: str) -> None:
    assert reason(one, target) == why


def test_every_sentence_is_asked_about_but_those_that_say_what_is_missing() -> None:
    asked: list[str] = []

    def entails(pairs: Sequence[tuple[str, str]]) -> list[float]:
        asked.extend(sentence for _, sentence in pairs)
        return [float("pink granite" not in sentence) for _, sentence in pairs]

    lacking = "The passages do not say when it burnt."
    assert reason(PART, f"Odo Hask built it. {lacking}", Verifier(nli=entails)) == ""
    assert set(asked) == {"Odo Hask built it."}
    made_up = f"Odo Hask built it. It is of pink granite. {lacking}"
    assert reason(PART, made_up, Verifier(nli=entails)) == "not_entailed"
    assert reason(PART, made_up, Verifier(judge=Judge(lambda _: "no"))) == "judged_unsupported"
    for one, words in ((PART, "what no passage tells"), (ZH, "段落中没有的部分")):
        assert words in support_messages(replace(one, target="x"))[0]["content"]
        assert words not in support_messages(replace(one, target="x", evidence="R1"))[0]["content"]
