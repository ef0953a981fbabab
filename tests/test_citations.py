"""Citations: before the closing punctuation, dense numbers, nothing removed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raglan.citations import cite, joined, strip_citations


def test_example_8() -> None:
    assert cite([("A is b", ["D1"])]) == ("A is b [1]", ["D1"])
    text, docs = cite([("A is b.", ["D1"]), ("A is b.", ["D2"]), ("C is d.", ["D3"])])
    assert (text, docs) == ("A is b [1][2]. C is d [3].", ["D1", "D2", "D3"])


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("Is it?", "Is it [1]?"),
        ("Is it?!", "Is it [1]?!"),
        ('He said "no."', 'He said "no [1]."'),
        ("He said “no”.", "He said “no” [1]."),
        ('He said "no"', 'He said "no" [1]'),
        ("(It is so.)", "(It is so [1].)"),
        ("是这样。", "是这样 [1]。"),
        ("「そうです。」", "「そうです [1]。」"),
        ("So it goes…", "So it goes [1]…"),
        ("3.5 kg", "3.5 kg [1]"),
        (" A is b. ", "A is b [1]."),
    ],
)
def test_the_mark_stands_before_the_closing_punctuation(sentence: str, expected: str) -> None:
    assert cite([(sentence, ["D"])]) == (expected, ["D"])
    assert strip_citations(expected) == sentence.strip()


def test_numbers_follow_the_text_and_a_passage_keeps_its_own() -> None:
    text, docs = cite([("One.", ["D7"]), ("Two.", []), ("Three.", ["D2", "D7"]), ("One.", ["D9"]), ("", ["D4"])])
    assert text == "One [1][2]. Two. Three [1][3]."
    assert docs == ["D7", "D9", "D2"]
    assert cite([]) == ("", [])


def test_scripts_without_blanks_are_joined_without() -> None:
    assert joined(["是。", "不是。", "Yes.", "No."]) == "是。不是。 Yes. No."


SENTENCES = st.text(alphabet="ab .?!”)。", min_size=1, max_size=12)


@given(st.lists(st.tuples(SENTENCES, st.lists(st.integers(0, 4), max_size=3)), max_size=6))
def test_taking_the_marks_out_gives_the_text_back(segments: list[tuple[str, list[int]]]) -> None:
    text, docs = cite(segments)
    sentences = dict.fromkeys(sentence.strip() for sentence, _ in segments if sentence.strip())
    assert strip_citations(text) == joined(list(sentences))
    assert set(docs) == {passage for sentence, passages in segments if sentence.strip() for passage in passages}
    assert all(f"[{number}]" in text for number in range(1, len(docs) + 1))
    assert f"[{len(docs) + 1}]" not in text
