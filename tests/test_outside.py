"""Answers that stand in no passage that was read, and gold answers letter by letter."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import tiny
from raglan.metrics import answer_recall, substring
from raglan.robustness import outside_figures
from test_cli import run

READ = ["Tower\nBuilt by Odo Marrack in 1831.", "Light\nLit with oil."]


@pytest.mark.parametrize(
    ("text", "gold", "outside", "right_outside"),
    [
        ("odo marrack", ["Odo Marrack"], 0, 0),
        ("Odo", ["Odo Marrack"], 0, None),  # in a passage, and not right
        ("Odo Marrack, the miller", ["Odo Marrack"], 1, 0),  # what makes it right is there, the whole is not
        ("Ines", ["Ines"], 1, 1),
        ("183", ["1831"], 1, None),  # whole words
        ("", ["x"], None, None),
        ("I don't know", ["x"], None, None),
        ("Tower", ["tower", "Ines"], 0, 0),  # titles are read
    ],
)
def test_an_answer_stands_in_a_passage_or_not(
    text: str, gold: list[str], outside: int | None, right_outside: int | None
) -> None:
    found = outside_figures(text, gold, READ)
    wanted = {"outside": outside, "right_outside": right_outside}
    assert {name: None if math.isnan(value) else value for name, value in found.items()} == wanted


@pytest.mark.parametrize(
    ("text", "gold", "letters", "words"),
    [
        ("in the north", ["no"], 1, 0),
        ("NORTH", ["north"], 0, 1),
        ("the  north", ["the north"], 0, 1),
        ("the north", ["north", "south"], 1, 1),
        ("x", [""], 0, 0),
    ],
)
def test_letters_and_words(text: str, gold: list[str], letters: int, words: int) -> None:
    assert substring(text, gold) == letters
    assert answer_recall([text], gold) == words


def test_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both figures beside quality, of the questions that read passages; without any there is nothing to stand outside of."""
    tiny.sure_self_rag(tmp_path / "model")
    recipe = tiny.asks(
        tmp_path,
        generator="model",
        decode="target_rate: 0.5, max_new_tokens: 3",
        evaluate="modes: [closed_book, retrieved], metrics: [match, substring], limit: 8",
    )
    assert run("build", str(recipe), capsys=capsys, monkeypatch=monkeypatch)[0] == 0
    code, out, _ = run("evaluate", str(recipe), "--json", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0
    figures = json.loads(out)["untuned"]
    rows = next((tmp_path / "runs" / "asks" / "evaluations").glob("*/predictions.jsonl")).read_text().splitlines()
    told = [row["figures"] for row in map(json.loads, rows)]
    read = [row for row in told if row["retrieved/retrieval_rate"]]
    assert 0 < len(read) < len(told)
    assert all("retrieved/outside" not in row for row in told if row not in read)
    said = [row["retrieved/outside"] for row in read if row["retrieved/outside"] is not None]
    assert figures["retrieved/outside"]["mean"] == pytest.approx(sum(said) / len(said))
    assert set(said) <= {0.0, 1.0}
    assert "closed_book/outside" not in figures
    assert 0 <= figures["retrieved/substring"]["mean"] <= 1
