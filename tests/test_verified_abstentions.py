"""Where gold is absent a target says what is missing and guesses nothing; elsewhere "does not contain" may be the answer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from raglan.refusals import abstained
from raglan.verification import Shown, Verifier, Written

POND = Shown("The pond of Orrin froze over in 1799. Grain was weighed at the gate.", role="noise")
ABSENT = Written(
    "a", "Who built the mill at Orrin, and when did it burn?", "", (POND,), ("Odo Hask",), language="en", evidence="R5"
)
ZH = Written(
    "z", "奥林的磨坊由谁建造？", "", (Shown("市集日在门口称粮食。", role="noise"),), ("赫斯克",), language="zh", evidence="R5"
)


def reason(one: Written, target: str) -> str:
    return Verifier(may_be_missing=("support",)).verify(replace(one, target=target)).reason


@pytest.mark.parametrize(
    ("one", "target", "why"),
    [
        (ABSENT, "The passages do not tell. It probably burnt in 1850.", "guesses"),
        (ABSENT, "The passages do not tell who built it. It burnt in 1850.", "guesses"),
        (ABSENT, "The passages do not tell who built the mill. It was Ilse Brandt.", "guesses"),
        (ABSENT, "The passages do not tell who built the mill, but I think it was a miller.", "guesses"),
        (ABSENT, "No answer.", "missing_not_said"), (ABSENT, "I don't know.", "missing_not_said"),
        (ABSENT, "The passages do not tell.", "missing_not_said"), (ABSENT, "Odo built it.", "does_not_abstain"),
        (ABSENT, "There is not enough information in the given passages.", "missing_not_said"),
        (ABSENT, "The passages do not tell who built the mill. They only say that a pond froze in 1799.", ""),
        (ABSENT, "The passages do not indicate who built the mill; the builder is missing.", ""),
        (ABSENT, "The passages do not discuss the mill. Its builder is missing.", ""),
        (ABSENT, "The passages do not tell who built the mill. Passage 1 is about a pond.", ""),
        (ABSENT, "There is no mention of a mill.", ""), (ABSENT, "The text doesn't specify when it burnt.", ""),
        (ABSENT, "The passages do not tell who it is.", ""), (ABSENT, "Not stated: the year.", ""),
        (ABSENT, "The passages do not reveal who built the mill at Orrin. When it burnt is missing, too.", ""),
        (replace(ABSENT, format="label", labels=("not enough information",), answers=("supported",)),
         "not enough information", ""),
        (ZH, "材料没有说明。大概是约翰建造的。", "guesses"), (ZH, "材料没有说明由谁建造。它建于1850年。", "guesses"),
        (ZH, "没有答案。", "missing_not_said"), (ZH, "材料没有说明。", "missing_not_said"),
        (ZH, "不知道。", "missing_not_said"),
        (ZH, "材料中没有这方面的信息，缺少建造者的姓名。", ""), (ZH, "在材料中找不到答案：缺少建造者。", ""),
        (ZH, "材料没有涉及磨坊的建造者。", ""), (ZH, "材料中没有相关内容，未说明磨坊由谁建造。", ""),
        (ZH, "没有材料说明磨坊由谁建造。", ""), (ZH, "材料没有提到是谁。", ""), (ZH, "材料沒有涉及磨坊的建造者。", ""),
    ],
)  # fmt: skip
def test_abstentions(one: Written, target: str, why: str) -> None:
    assert reason(one, target) == why


@pytest.mark.parametrize(
    ("language", "query", "target", "why"),
    [
        ("en", "What does the treaty lack?", "The treaty does not contain a clause on fishing in the northern waters.", ""),
        ("en", "What is unsecured?", "A loan for which security is not provided is unsecured.", ""),
        ("en", "What is unsecured?", "The passages do not mention what is unsecured.", "abstains"),
        ("en", "What is unsecured?", "Not stated.", "abstains"), ("en", "What is unsecured?", "I do not know.", "abstains"),
        ("en", "What is unsecured?", "It does not say.", "abstains"),
        ("zh", "什么是信用贷款？", "未提供担保的贷款属于信用贷款，银行只看借款人的信誉。", ""),
        ("zh", "什么是信用贷款？", "合同没有说明担保方式的贷款。", ""),
        ("zh", "什么是信用贷款？", "材料没有说明什么是信用贷款。", "abstains"),
        ("zh", "什么是信用贷款？", "未提及。", "abstains"),
        ("zh", "什么是信用贷款？", "无法回答什么是信用贷款。", "abstains"),
    ],
)  # fmt: skip
def test_what_is_not_in_a_thing_is_no_abstention(language: str, query: str, target: str, why: str) -> None:
    one = Written("r", query, "", (Shown("About loans and treaties."),), language=language, evidence="R1")
    assert reason(one, target) == why


@pytest.mark.parametrize(
    "text",
    [
        "The passages do not indicate who.", "They do not discuss it.", "There is no mention of it.",
        "It doesn't specify that.", "材料中没有这方面的信息。", "找不到答案。", "没有涉及这一点。", "没有相关内容。",
        "没有材料说明这一点。", "沒有相關內容。",
    ],
)  # fmt: skip
def test_more_ways_to_decline(text: str) -> None:
    assert abstained(text)
