"""A segment of nothing but judgements: it is in no text, so it cites nothing."""

from __future__ import annotations

import pytest

import tiny
from raglan.decode import Asked, self_rag
from raglan.decode.self_rag import cited_text
from raglan.recipe import SelfRagDecode
from tiny import ScriptedGenerator, decides, said


@pytest.mark.parametrize("cite", ["supported", "retrieved"])
def test_a_path_may_end_without_words(cite: str) -> None:
    script = {
        (): decides(0.05, 0.9),
        ("a",): said("one", rel=(0.9, 0.1), sup=(1, 0, 0), then=(0.05, 0.9, 0.05)),
        ("a", "b"): said(rel=(0.9, 0.1), sup=(1, 0, 0), use=(0, 0, 0, 0, 1)),
        ("b",): said(rel=(0.4, 0.6), sup=(1, 0, 0)),
    }
    told = {"form": "long", "retrieve": "always", "passages": "hybrid", "stop": "never", "n_best": 2, "cite": cite}
    decode = SelfRagDecode(kind="self_rag", **told)
    found = lambda text, k: tiny.hits("b")  # noqa: E731
    answer = self_rag(ScriptedGenerator(script), Asked(["who?"], [tiny.hits("a")], k=1), decode, retrieve=found)[0]
    texts = {one.text: [hit.passage.id for hit in one.citations] for one in (answer, *answer.alternatives)}
    assert texts == {"one": ["a"]}
    last = answer.segments[-1]
    assert (last.text, last.cited, last.hit and last.hit.passage.id) == ("", (), "b")
    assert cited_text(answer) == "one [1]"
