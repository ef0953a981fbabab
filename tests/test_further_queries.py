"""A program's own words for what Self-RAG's long form retrieves further."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny
from raglan.decode import Asked, self_rag
from raglan.errors import RecipeError
from raglan.rag import RAG
from raglan.recipe import SelfRagDecode, load_recipe
from raglan.records import Hit
from test_cli import run
from tiny import ScriptedGenerator, decides, said

ON = (0.05, 0.9, 0.05)  # a boundary that retrieves
SCRIPT: dict[tuple[str, ...], Any] = {
    (): decides(0.05, 0.9),
    ("a",): said("one", rel=(0.9, 0.1), sup=(1, 0, 0), then=ON),
    ("a", "b"): said("two", rel=(0.9, 0.1), sup=(1, 0, 0)),
}


def settings(**given: Any) -> SelfRagDecode:
    return SelfRagDecode(**{"kind": "self_rag", "form": "long", "retrieve": "always", **given})


def test_a_callable_makes_the_queries() -> None:
    asked: list[str] = []

    def retrieve(text: str, k: int) -> list[Hit]:
        asked.append(text)
        return tiny.hits("a", "b")[len(asked) - 1 :][:1]

    words = lambda question, last: f"{last or 'nothing'} of {question}"  # noqa: E731
    answer = self_rag(
        ScriptedGenerator(SCRIPT), Asked(["who?"], [[]], k=1), settings(passages="dynamic", query="question"),
        retrieve=retrieve, query=words,
    )[0]  # fmt: skip
    assert answer.text == "one two"
    assert asked == ["nothing of who?", "one of who?"]


@pytest.mark.parametrize("given", [{"form": "short"}, {"passages": "static"}])
def test_where_nothing_further_is_retrieved_it_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="reads the given passages alone"):
        self_rag(ScriptedGenerator(SCRIPT), Asked(["who?"], [[]]), settings(**given), query=lambda question, last: last)


def test_a_system_has_one(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.sure_self_rag(tmp_path / "model", sure=10, likes=("retrieve", "is_sup", "is_use"), by=1.7)
    recipe = tiny.asks(
        tmp_path,
        generator="model",
        decode="form: long, retrieve: always, max_new_tokens: 6, max_segments: 3, stop: never",
    )
    assert run("build", str(recipe), capsys=capsys, monkeypatch=monkeypatch)[0] == 0
    system = RAG.open(load_recipe(recipe))
    told: list[tuple[str, str]] = []
    system.query = lambda question, last: told.append((question, last)) or f"{last} {question}"
    answer = system.answer(["who built it?"])[0]
    assert answer.trace is not None
    assert {question for question, _ in told} == {"who built it?"}
    assert any(last for _, last in told), "no second segment retrieved"
    assert answer.trace["cost"]["searches"] >= 1
