"""Self-RAG, long form: worked figures, an exhaustive twin, exact counts, and each thing that others get wrong."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

import tiny
from raglan.decode import Asked
from raglan.decode.self_rag.long import cited_text, long
from raglan.errors import GeneratorError
from raglan.recipe import SelfRagDecode
from raglan.records import Answer, Hit, Passage
from tiny import ScriptedGenerator, decides, said

NO, CONT = "[No Retrieval]", "[Continue to Use Evidence]"
USE = (0.1, 0.1, 0.1, 0.1, 0.6)  # use = .5
ON = (0.05, 0.9, 0.05)  # a boundary that retrieves


def found(*titles: str) -> list[Hit]:
    return [Hit(Passage(title, f"{title} text", title), row, 1.0, row + 1) for row, title in enumerate(titles)]


def settings(**changes: Any) -> SelfRagDecode:
    given = {"retrieve": "always", "passages": "static", "weights": {"seq": 0.0}, "keep_passages": 1, **changes}
    return SelfRagDecode(kind="self_rag", form="long", **given)


def ask(
    generator: Any, hits: Sequence[Hit], decode: SelfRagDecode, *, queries: Sequence[str] = ("who?",),
    retrieve: Callable[[str, int], list[Hit]] | None = None,
) -> list[Answer]:  # fmt: skip
    return long(generator, Asked(list(queries), [list(hits)] * len(queries), k=3), decode, retrieve=retrieve)


def nodes(answer: Answer) -> dict[tuple[str, ...], dict[str, Any]]:
    """Candidates by their path of passages or decisions."""
    assert answer.trace is not None
    names: dict[int, tuple[str, ...]] = {0: ()}
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for level in answer.trace["levels"]:
        for one in level["candidates"]:
            name = one["title"] if one["decision"] == "yes" else {"no": NO, "continue": CONT}[one["decision"]]
            names[one["node"]] = (*names[one["parent"]], name)
            found[names[one["node"]]] = one
    return found


def example() -> ScriptedGenerator:
    """The worked tree: p0 ends at level 1, p1 and p2 go on to q0, q1, q2."""
    below = {"p0": ((0.6, 0.4), (0.3, 0.3, 0.4)), "p1": ((0.7, 0.3), (0.4, 0.3, 0.3)), "p2": ((0.5, 0.5), (0.1, 0.1, 0.8))}
    script: dict[tuple[str, ...], Any] = {
        (): decides(0.05, 0.9),
        ("p0",): said("zero", rel=(0.95, 0.05), sup=(0.9, 0.05, 0.05), use=USE),
        ("p1",): said("one", rel=(0.9, 0.1), sup=(0.6, 0.3, 0.1), then=ON),
        ("p2",): said("two", rel=(0.8, 0.2), sup=(0.2, 0.6, 0.2), then=ON),
    }
    for parent, (title, (rel, sup)) in itertools.product(("p1", "p2"), below.items()):
        script[parent, title] = said(f"{parent}{title}", rel=rel, sup=sup, use=USE)
    return ScriptedGenerator(script)


WORKED = {
    "product": {("p1", "p0"): 2.145, ("p1", "p1"): 2.475, ("p1", "p2"): 1.485, ("p2", "p0"): 1.69, ("p2", "p1"): 1.95,
                ("p2", "p2"): 1.17},
    "sum": {("p1", "p0"): 2.95, ("p1", "p1"): 3.15, ("p1", "p2"): 2.55, ("p2", "p0"): 2.6, ("p2", "p1"): 2.8, ("p2", "p2"): 2.2},
    "mean": {("p1", "p0"): 1.475, ("p1", "p1"): 1.575, ("p1", "p2"): 1.275, ("p2", "p0"): 1.3, ("p2", "p1"): 1.4,
             ("p2", "p2"): 1.1},
}  # fmt: skip


@pytest.mark.parametrize("combine", list(WORKED))
def test_the_worked_tree(combine: str) -> None:
    generator = example()
    answer = ask(generator, found("p0", "p1", "p2"), settings(combine=combine, max_segments=2, stop="never", n_best=9))[0]
    told = nodes(answer)
    first = {("p0",): 2.125, ("p1",): 1.65, ("p2",): 1.3}
    assert {path: told[path]["final"] for path in first} == pytest.approx(first, abs=1e-6)
    assert {path: told[path]["final"] for path in WORKED[combine]} == pytest.approx(WORKED[combine], abs=1e-6)
    steps = {"p0": 1.3, "p1": 1.5, "p2": 0.9}
    assert {path[1]: told[path]["step"] for path in WORKED[combine]} == pytest.approx(steps, abs=1e-6)
    assert answer.text == ("zero" if combine == "mean" else "one p1p1")
    assert answer.finished and "zero" in [answer.text, *(other.text for other in answer.alternatives)]
    under_p1 = [generator.spelt(ids) for ids in generator.prompts if "one" in generator.spelt(ids)]
    assert under_p1 and not any("zero" in text or "two" in text for text in under_p1)
