"""Self-RAG's long form on a tiny Llama: every node is what loops give, batches change nothing, and the command line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from raglan.citations import strip_citations
from raglan.decode import Asked, self_rag
from raglan.decode.self_rag import cited_text
from raglan.exports import export_alce
from raglan.generator import HFGenerator, open_generator
from raglan.recipe import GeneratorSettings, PromptSettings, SelfRagDecode
from raglan.records import Answer, Hit, Passage
from test_cli import run
from test_self_rag_backends import same_tree
from test_self_rag_long import NO, nodes

LIMIT = 9
QUESTIONS = ["who built the tower", "when", "what is in the inn, then?"]
TEXTS = ["the tower of the miller", "a mill in the north", "the lighthouse was built in 1807"]
HITS = [Hit(Passage(f"p{row}", text, f"t{row}"), row, 1.0, row + 1) for row, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Likes to judge and to stop at boundaries, so that its trees grow."""
    return tiny.sure_self_rag(tmp_path_factory.mktemp("self_rag"), sure=10, likes=("retrieve", "is_sup", "is_use"), by=1.7)


@pytest.fixture(scope="module")
def generator(checkpoint: Path) -> HFGenerator:
    return open_generator(GeneratorSettings(model=str(checkpoint), dtype="float32"), PromptSettings())


def settings(**given: Any) -> SelfRagDecode:
    base = {"max_new_tokens": LIMIT, "retrieve": "always", "passages": "static", "max_segments": 3, "stop": "never"}
    return SelfRagDecode(kind="self_rag", form="long", **{**base, **given})


def candidates(answer: Answer) -> list[dict[str, Any]]:
    assert answer.trace is not None
    return [one for level in answer.trace["levels"] for one in level["candidates"]]


@torch.no_grad()
def greedy(
    generator: HFGenerator, ids: Sequence[int], *, ends: Collection[int] = ()
) -> tuple[list[int], float, list[torch.Tensor]]:  # fmt: skip
    """A segment by whole forward passes, a token at a time: ids, Σ log p and every step's probabilities."""
    schema = generator.schema
    ends = {*(ends or schema.ids["retrieve"]), schema.opens, generator.eos}
    written: list[int] = []
    total, steps = 0.0, []
    while len(written) < LIMIT and not (written and written[-1] in ends):
        logprobs = generator.model(torch.tensor([[*ids, *written]])).logits[0, -1].double().log_softmax(-1)
        written.append(int(logprobs.argmax()))
        total += float(logprobs[written[-1]])
        steps.append(logprobs.exp())
    return written, total, steps


@pytest.mark.parametrize("keep", [0, 1, "all"])
def test_every_node_is_what_loops_give(generator: HFGenerator, keep: Any) -> None:
    answers = self_rag(generator, Asked(QUESTIONS, [HITS] * len(QUESTIONS)), settings(keep_passages=keep, retrieve="adaptive"))
    schema, depths = generator.schema, set()
    for answer in answers:
        assert answer.trace is not None
        for one in candidates(answer):
            written, total, steps = greedy(generator, [*answer.trace["prompt"], *one["context"]])
            body = written[:-1] if written[-1] in {*schema.ids["retrieve"], schema.opens, generator.eos} else written
            assert one["ids"] == body
            assert one["seq"] == pytest.approx(float(torch.tensor(total / len(written)).exp()), abs=1e-5)
            if one["decision"] == "yes":
                irrelevant, relevant = (float(steps[0][token]) for token in schema.ids["is_rel"])
                assert one["rel"] == pytest.approx(relevant / (relevant + irrelevant), abs=1e-5)
        depths.add(len(answer.trace["levels"]))
    assert max(depths) > 1


@pytest.mark.parametrize(("form", "keep"), [("short", 1), ("long", "all"), ("long", 1)])
def test_a_script_of_the_models_own_numbers_gives_the_same_tree(generator: HFGenerator, form: str, keep: Any) -> None:
    """What loops read off the model at every node is put into a script; the same decoding then decides and ranks the same."""
    schema, names = generator.schema, generator.tokenizer.convert_ids_to_tokens
    tree = settings(keep_passages=keep, n_best=3, retrieve="adaptive")
    asks = tree if form == "long" else SelfRagDecode(kind="self_rag", max_new_tokens=LIMIT)
    asked = Asked(QUESTIONS, [HITS] * len(QUESTIONS))

    def line(ids: Sequence[int]) -> tuple[tiny.Step, ...]:
        written, _, steps = greedy(generator, ids, ends=schema.ids["retrieve"] if form == "long" else (schema.yes,))
        return tuple(
            tiny.Step(names(token), math.log(p[token]), {schema.spelling(mark): float(p[mark]) for mark in schema.marks})
            for token, p in zip(written, steps, strict=True)
        )

    theirs, scripts = self_rag(generator, asked, asks), {}
    for question, answer in zip(QUESTIONS, theirs, strict=True):
        assert answer.trace is not None
        grown = nodes(answer) if form == "long" else {(one["title"] or NO,): one for one in answer.trace["candidates"]}
        prompt = answer.trace["prompt"]
        scripts[question] = {(): line(prompt)[:1]} | {path: line([*prompt, *one["context"]]) for path, one in grown.items()}
    ours = self_rag(tiny.ScriptedGenerator(scripts, tokenizer=generator.tokenizer), asked, asks)
    for own, other in zip(ours, theirs, strict=True):
        assert (own.text, own.raw, own.ids) == (other.text, other.raw, other.ids)
        assert [one.text for one in own.alternatives] == [one.text for one in other.alternatives]
        same_tree(own, other, within=1e-4)
    if form == "long":
        assert max(len(path) for answer in theirs for path in nodes(answer)) > 1


def test_a_tree_that_outgrows_the_model_ends_there(generator: HFGenerator) -> None:
    """Two passages of some 400 tokens fit into 1,024 positions, three do not: no fault, and what was said stays."""
    texts = ("a mill in the north ", "the tower of the inns ")
    hits = [Hit(Passage(f"p{row}", text * 25, f"t{row}"), row, 1.0, row + 1) for row, text in enumerate(texts)]
    answer = self_rag(generator, Asked(QUESTIONS[:1], [hits]), settings(keep_passages="all", beam=9, n_best=9))[0]
    assert answer.trace is not None
    told = [{one["pruned"] for one in level["candidates"]} for level in answer.trace["levels"]]
    assert len(told) == 3
    assert "too_long" not in told[0] | told[1]
    assert told[2] == {"too_long"}
    assert answer.text
    assert all(math.isfinite(one["final"]) for one in candidates(answer) if one["pruned"] != "too_long")
    assert any(not one.finished and len(one.segments) == 2 for one in (answer, *answer.alternatives))


def test_questions_together_and_alone_are_one(generator: HFGenerator) -> None:
    asked = Asked(QUESTIONS, [HITS, HITS[:2], []])
    together = self_rag(generator, asked, settings())
    for place, answer in enumerate(together):
        before = generator.cost.copy()
        alone = self_rag(generator, asked.only([place]), settings())[0]
        spent = generator.cost - before
        for each in (alone, answer):  # told as if it had been alone
            assert each.trace is not None
            told = each.trace["cost"]
            assert (told["calls"], told["computed"], told["generated"]) == (spent.calls, spent.positions, spent.generated)
        assert (alone.text, alone.ids) == (answer.text, answer.ids)
        figures = [[one["ids"] for one in candidates(each)] for each in (alone, answer)]
        assert figures[0] == figures[1]
        finals = [[one["final"] for one in candidates(each)] for each in (alone, answer)]
        assert finals[0] == pytest.approx(finals[1], abs=1e-5)


def test_the_alce_file_numbers_its_docs(generator: HFGenerator, tmp_path: Path) -> None:
    answers = self_rag(generator, Asked(QUESTIONS, [HITS] * len(QUESTIONS)), settings(cite="retrieved"))
    rows = [{"question": query, "qa_pairs": [], "docs": ["old"]} for query in QUESTIONS]
    written = json.loads(export_alce(answers, tmp_path / "alce.json", rows=rows).read_text())["data"]
    assert any(row["docs"] for row in written)
    for row, answer in zip(written, answers, strict=True):
        numbers = {int(number) for number in re.findall(r"\[(\d+)\]", " ".join(re.findall(r" (?:\[\d+\])+", row["output"])))}
        assert numbers == set(range(1, len(row["docs"]) + 1))
        assert [doc["id"] for doc in row["docs"]] == [hit.passage.id for hit in answer.citations]
        assert strip_citations(cited_text(answer)) == answer.text
        assert row["qa_pairs"] == []


def test_by_the_command_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.asks(
        tmp_path,
        generator=checkpoint,
        decode="form: long, retrieve: always, max_new_tokens: 6, max_segments: 2, cite: retrieved, n_best: 2",
        evaluate="modes: [retrieved], limit: 3",
    )
    call = lambda *words: run(*words, capsys=capsys, monkeypatch=monkeypatch)  # noqa: E731
    assert call("build", str(recipe))[0] == 0
    code, out, _ = call("answer", str(recipe), "who built the mill?", "--trace", "--alce", str(tmp_path / "alce.json"))
    assert code == 0
    assert "[1]" in out.splitlines()[1]
    assert "  cites [1] " in out
    assert out.splitlines()[2].startswith("or: ")  # n_best: 2
    assert "retrieve: r " in out
    assert re.search(r"\n    \* (  )?\[\d\] .*: final ", out)  # the answer's own path
    assert re.search(r"\n    [ *]   \[\d\] .*: final ", out)  # the second level below its parent
    assert json.loads((tmp_path / "alce.json").read_text())["data"][0]["docs"]
    code, out, _ = call("answer", str(recipe), "who?", "--json")
    told = json.loads(out)[0]
    assert told["trace"]["form"] == "long"
    assert strip_citations(told["cited"]) == told["answer"]
    assert len(told["citations"]) >= 1
    code, out, _ = call("evaluate", str(recipe), "--json")
    assert code == 0
    figures = json.loads(out)["untuned"]
    assert figures["retrieved/segment_retrieval_rate"]["mean"] == figures["retrieved/retrieval_rate"]["mean"] == 1.0  # always
    pytest.importorskip("plotly")
    assert call("report", str(recipe), "-o", str(tmp_path / "report.html"))[0] == 0
    page = (tmp_path / "report.html").read_text()
    assert "a tree of " in page
    assert 'class="node best"' in page
