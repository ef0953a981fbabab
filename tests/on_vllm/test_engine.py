"""vLLM's engine and transformers on the same tiny weights: the same ids and log-probabilities, nothing kept beside.

`make test-vllm` makes an environment with vLLM, on a CPU. Elsewhere these tests skip and say why.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from raglan.decode import Asked, self_rag
from raglan.errors import CheckpointError, GeneratorError, RecipeError
from raglan.generator import HFGenerator, VLLMGenerator, open_any
from raglan.recipe import GeneratorSettings, PromptSettings, SelfRagDecode
from raglan.records import Answer, Hit, Passage
from raglan.reflection import retrieve_probability
from test_cli import run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: `make test-vllm`")
if importlib.util.find_spec("vllm") is not None:
    for name, value in {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_PLUGINS": "",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "TORCHDYNAMO_DISABLE": "1",  # the engine's sampler would call a compiler, which takes longer than all else
    }.items():  # fmt: skip
        os.environ.setdefault(name, value)
    importlib.import_module("torch._dynamo").config.disable = True  # it may have read its variable already

ENGINE = {"max_model_len": 512, "enforce_eager": True, "max_num_seqs": 32, "block_size": 32}
QUESTIONS = ("who built the tower?", "when was the light lit?", "what is a raglan sleeve?")
PASSAGES = [
    Passage("1", "The tower was built by Odo Marrack, a miller, in 1831.", "Tower"),
    Passage("2", "A lighthouse of the year 1790, lit with oil.", "Light"),
    Passage("3", "A sleeve cut in one piece with the shoulder.", "Raglan"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return judging(tmp_path_factory.mktemp("marked"))


def judging(folder: Path) -> Path:
    """It likes to judge and to stop, so that trees grow. Heads of 32, the smallest that vLLM's attention on a CPU takes."""
    return tiny.sure_self_rag(folder, seed=37, sure=10, likes=("retrieve", "is_sup", "is_use", "eos"), by=1.6, width=64)


@pytest.fixture(scope="module")
def here(folder: Path) -> HFGenerator:
    return open_any(GeneratorSettings(model=str(folder), dtype="float32"), PromptSettings())


@pytest.fixture(scope="module")
def there(folder: Path) -> Iterator[VLLMGenerator]:
    settings = GeneratorSettings(kind="vllm", model=str(folder), dtype="float32", engine=ENGINE)
    generator = open_any(settings, PromptSettings())
    yield generator
    generator.close()


def prompts(generator: Any) -> list[list[int]]:
    return [generator.marked_prompt.question(text) for text in QUESTIONS]


def plain(model: Any, ids: list[int], most: int) -> list[int]:
    for _ in range(most):
        with torch.no_grad():
            ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    return ids


def test_the_engine_writes_what_the_model_would(here: HFGenerator, there: VLLMGenerator) -> None:
    ids = prompts(there)[0]
    contexts = there.contexts([ids], marks=there.schema.marks)
    written = contexts.write(stop_ids=(), max_new_tokens=6)[0]
    assert list(written.ids) == plain(here.model, ids, 6)[len(ids) :][: len(written.ids)]
    with torch.no_grad():
        row = here.model(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
    assert contexts.mark_logprobs[0] == pytest.approx(row[list(there.schema.marks)].numpy(), abs=1e-4)


def test_contexts_are_the_same(here: HFGenerator, there: VLLMGenerator) -> None:
    schema, before = there.schema, there.cost.copy()
    assert schema == here.schema
    assert there.exact_marks
    assert prompts(here) == prompts(there)
    found = []
    for generator in (here, there):
        roots = generator.contexts(prompts(generator), marks=schema.marks)
        places = [place for place in range(len(QUESTIONS)) for _ in PASSAGES]
        branches = roots.branch(places, [generator.marked_prompt.passage(one) for _ in QUESTIONS for one in PASSAGES])
        found.append((roots.mark_logprobs, branches.mark_logprobs, branches.best, branches.only([1, 4, 8])))
    (root, branch, best, some), (root_, branch_, best_, some_) = found
    assert root_ == pytest.approx(root, abs=1e-4)
    assert branch_ == pytest.approx(branch, abs=1e-4)
    assert best_.tolist() == best.tolist()
    stops = {schema.yes, int(best[4])}
    ours, theirs = (contexts.write(stop_ids=stops, max_new_tokens=[12, 12, 5]) for contexts in (some_, some))
    for own, other in zip(ours, theirs, strict=True):
        assert (own.ids, own.finish) == (other.ids, other.finish)
        assert own.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert own.mark_logprobs == pytest.approx(other.mark_logprobs, abs=1e-4)
    assert ours[1].finish == "stop"
    spent = there.cost - before
    marked = len(root) + len(branch) + sum(len(row.ids) - 1 for row in ours)
    assert spent.logprobs <= (len(schema.marks) + 1) * marked
    assert spent.logprobs >= len(schema.marks) * marked
    assert spent.reused > 0  # the prefixes of nine branches


def test_the_end_token_ends_a_row(there: VLLMGenerator) -> None:
    contexts = there.contexts(prompts(there) * 8, marks=there.schema.marks)
    drawn = contexts.write(stop_ids=(), max_new_tokens=64, temperature=1.5, seed=0)
    ended = [row for row in drawn if row.finish == "eos"]
    assert ended
    assert all(row.ids.index(there.eos) == len(row.ids) - 1 for row in ended)
    assert all(there.eos not in row.ids for row in drawn if row.finish == "length")


def test_one_request_where_nobody_read_first(there: VLLMGenerator) -> None:
    contexts = there.contexts(prompts(there), marks=there.schema.marks)
    before = there.cost.copy()
    alone = contexts.write(stop_ids=(), max_new_tokens=4)
    assert (there.cost - before).calls == len(QUESTIONS)
    state = contexts.mark_logprobs
    assert (there.cost - before).calls == len(QUESTIONS)
    assert state.tolist() == [row.mark_logprobs[0].tolist() for row in alone]


def test_given_continuations_are_scored_alike(here: HFGenerator, there: VLLMGenerator) -> None:
    wanted = [[*there.marked_prompt.own("1831"), there.eos], there.marked_prompt.own("no")]
    ours, theirs = (g.contexts(prompts(g), marks=there.schema.marks).score([0, 2], wanted) for g in (there, here))
    for own, other in zip(ours, theirs, strict=True):
        assert own == pytest.approx(other, abs=1e-4)


def test_draws_depend_on_seed_and_place(there: VLLMGenerator) -> None:
    contexts = there.contexts(prompts(there)[:1] * 3, marks=there.schema.marks)
    drawn = [[row.ids for row in contexts.write(stop_ids=(), max_new_tokens=8, temperature=2.0, seed=n)] for n in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) > 1


def test_faults(folder: Path, there: VLLMGenerator, tmp_path: Path) -> None:
    with pytest.raises(GeneratorError, match="the engine has 512"):
        there.contexts([[1] * 510], marks=there.schema.marks).write(stop_ids=(), max_new_tokens=10)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        open_any(GeneratorSettings(kind="vllm", model=str(tmp_path)), PromptSettings())
    with pytest.raises(RecipeError, match="engine holds dtype"):
        open_any(GeneratorSettings(kind="vllm", model=str(folder), engine={"dtype": "half"}), PromptSettings())
    with pytest.raises(RecipeError, match="vLLM refuses this engine"):
        open_any(GeneratorSettings(kind="vllm", model=str(folder), engine={"no_such": 1}), PromptSettings())


def test_probabilities_of_a_group_are_right(there: VLLMGenerator) -> None:
    """All marks are of one distribution: no more than 1 together, each at most the likeliest token's."""
    contexts = there.contexts(prompts(there), marks=there.schema.marks)
    told = np.exp(contexts.mark_logprobs.astype(np.float64))
    assert (told.sum(1) < 1).all()
    assert (told > 0).all()


@pytest.mark.parametrize("settings", [{"retrieve": "adaptive"}, {"retrieve": "always", "prune": {"kind": "bound"}}])
def test_short_form_decides_and_answers_alike(settings: dict[str, Any], here: HFGenerator, there: VLLMGenerator) -> None:
    marks = here.contexts(prompts(here), marks=here.schema.marks).mark_logprobs
    lowest, middle, _ = sorted(float(retrieve_probability(row)) for row in marks)
    decode = SelfRagDecode(kind="self_rag", max_new_tokens=16, threshold=(lowest + middle) / 2, **settings)
    hits = tuple(Hit(passage, row, 1.0, row + 1) for row, passage in enumerate(PASSAGES))
    before = there.cost.copy()
    ours, theirs = (self_rag(generator, Asked(QUESTIONS, [hits] * len(QUESTIONS)), decode) for generator in (there, here))
    for own, other in zip(ours, theirs, strict=True):
        same(own, other)
    assert judged(one for answer in ours for one in answer.trace["candidates"]) == {"sup", "use"}
    retrieved = {answer.trace["retrieved"] for answer in ours}
    assert retrieved == ({True} if settings["retrieve"] == "always" else {True, False})
    spent = there.cost - before
    written = [one["ids"] for answer in ours for one in answer.trace["candidates"] if "ids" in one]
    read = len(ours) + sum(len(answer.trace["candidates"]) for answer in ours)  # a question, then its branches
    assert spent.logprobs <= (len(there.schema.marks) + 1) * (read + sum(len(ids) - 1 for ids in written))


@pytest.mark.parametrize(
    "settings",
    [
        {"retrieve": "always", "passages": "static"},
        {"retrieve": "adaptive", "passages": "static", "keep_passages": "all", "combine": "sum", "stop": "never"},
        {"retrieve": "adaptive", "passages": "dynamic", "keep_passages": 0, "prune": {"kind": "top_m", "m": 2}},
    ],
)
def test_long_form_grows_the_same_tree(settings: dict[str, Any], here: HFGenerator, there: VLLMGenerator) -> None:
    """Levels, boundary decisions, components, what was pruned and why, and every one of the n best."""
    decode = SelfRagDecode(kind="self_rag", form="long", max_new_tokens=12, max_segments=3, n_best=3, **settings)
    hits = [Hit(passage, row, 1.0, row + 1) for row, passage in enumerate(PASSAGES)]
    asked = Asked(QUESTIONS, [hits] * len(QUESTIONS), k=len(PASSAGES))
    found = lambda text, k: hits[len(text) % 2 :][:k]  # noqa: E731  another search for another text
    ours, theirs = (self_rag(generator, asked, decode, retrieve=found) for generator in (there, here))
    for own, other in zip(ours, theirs, strict=True):
        same(own, other)
    grown = [one for answer in ours for level in answer.trace["levels"] for one in level["candidates"]]
    assert max(len(answer.trace["levels"]) for answer in ours) > 1
    assert judged(grown) == {"sup", "use"}
    assert "beam" in {one["pruned"] for one in grown}
    assert any(len(answer.segments) > 1 for answer in ours)
    assert any(answer.alternatives for answer in ours)
    decided = {one["retrieve"] for answer in ours for one in answer.trace["decisions"]}
    assert decided == ({True} if settings["retrieve"] == "always" else {True, False})


def test_by_the_command_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One recipe, answered by transformers here and by vLLM in a process of its own."""
    recipe = tiny.asks(tmp_path, generator=folder, decode="retrieve: always, max_new_tokens: 6")
    question = "who built the mill?"
    assert run("build", str(recipe), capsys=capsys, monkeypatch=monkeypatch)[0] == 0
    code, out, _ = run("answer", str(recipe), question, "--json", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0
    other = ["generator.kind=vllm", "generator.engine.max_model_len=512", "generator.engine.enforce_eager=true"]
    words = [sys.executable, "-m", "raglan", "answer", str(recipe), question, *other, "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, check=True)
    ours, theirs = (json.loads(text)[0] for text in (done.stdout, out))
    assert ours["answer"] == theirs["answer"]
    assert ours["trace"]["decisions"][0]["r"] == pytest.approx(theirs["trace"]["decisions"][0]["r"], abs=1e-4)


def same(own: Answer, other: Answer) -> None:
    """Two answers with the same text, ids, citations, segments and n-best, and the same trace, numbers within 1e-3."""
    for one, two in zip((own, *own.alternatives), (other, *other.alternatives), strict=True):
        assert (one.text, one.ids, one.finished) == (two.text, two.ids, two.finished)
        assert [hit.passage.id for hit in one.citations] == [hit.passage.id for hit in two.citations]
        alike([asdict(segment) for segment in one.segments], [asdict(segment) for segment in two.segments], "segments")
    for first, second in zip(own.trace["decisions"], other.trace["decisions"], strict=True):
        assert first["r"] == pytest.approx(second["r"], abs=1e-4)
    alike(own.trace, other.trace, "trace")


def alike(own: Any, other: Any, at: str) -> None:
    """Two traces with the same keys, words and ids, and numbers within 1e-3; what each cost may differ."""
    if isinstance(own, dict):
        assert own.keys() == other.keys(), at
        for key in own.keys() - {"cost"}:
            alike(own[key], other[key], f"{at}.{key}")
    elif isinstance(own, list | tuple):
        assert len(own) == len(other), at
        for number, (one, two) in enumerate(zip(own, other, strict=True)):
            alike(one, two, f"{at}[{number}]")
    elif isinstance(own, float) and isinstance(other, float):
        assert own == pytest.approx(other, abs=1e-3), at
    else:
        assert own == other, at


def judged(candidates: Iterable[dict[str, Any]]) -> set[str]:
    """Which components were read from a token that the model wrote; the others are 0 = 0."""
    written = [one for one in candidates if one.get("ids")]
    return {name for one in written for name in ("sup", "use") if f"{name}:absent" not in one["flags"]}
