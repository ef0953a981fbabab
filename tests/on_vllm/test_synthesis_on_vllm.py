"""A small real model behind a real server writes examples: strict schemas hold a random one to JSON, and the books agree."""

from __future__ import annotations

import importlib.util
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_server import serving
from transformers import LlamaConfig, LlamaForCausalLM

import tiny
from raglan.calls import CallEngine
from raglan.perturb import Slot
from raglan.recipe import EndpointSettings, MoneySettings, Recipe, WritingSettings
from raglan.synthesis import factors_of, make_plan
from raglan.synthesis.endpoint import EndpointTeacher
from raglan.synthesis.writing import Draft, Job, Made, Reject, Sheet

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: `make test-vllm`")

CELLS = 16
LIKELY = {'"': 0.40, "{": 0.60, "]": 0.20, "}": 0.42, "</s>": 0.35}  # × √64: logits above others, so that all ends some time
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama that is likely to close what it has opened: the first feature is the same everywhere, and a bias."""
    torch.manual_seed(0)
    words = tiny.llama_tokenizer()
    words.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1
        model.lm_head.weight[:, 0] = 0
        for piece, weight in LIKELY.items():
            model.lm_head.weight[words.convert_tokens_to_ids(piece), 0] = weight
    path = tmp_path_factory.mktemp("writer")
    model.save_pretrained(path)
    words.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(folder, tmp_path_factory.mktemp("log") / "server.log", length=8192) as url:
        yield url


def recipe() -> Recipe:
    weights = {
        "task": {"factoid": 1}, "answer_format": {"short_sentence": 1}, "query_format": {"wh_question": 1},
        "relation": {"R1": 1}, "absent_policy": {"abstain": 1},
    }  # fmt: skip
    synthesis = {"path": "out", "n": CELLS, "from_scratch": 1, "retrievers": {"bm25": 1}, "weights": weights}
    return Recipe.model_validate({"name": "v", "knowledge": {"path": "kb", "documents": "docs"}, "synthesis": synthesis})


def show(draft: Draft) -> Sheet:
    slots = tuple(Slot(one, "gold", "gold", "gold") for one in draft.gold)
    return Sheet(draft, slots, "\n".join([*(one.text for one in draft.gold), draft.query]))


def test_a_small_model_behind_a_server_writes(server: str, tmp_path: Path) -> None:
    asked = recipe()
    plan = make_plan(asked)
    step = {"temperature": 1.0, "max_tokens": 400}
    writing = WritingSettings.model_validate({
        "jobs": 2, "beside": 0, "brainstorm": step, "draft": step, "passages": step, "answer": step,
    })  # fmt: skip
    settings = EndpointSettings(base_url=server, model="tiny", concurrency=4, attempts=2)
    ends: list[list[Made | Reject]] = []
    for _ in range(2):
        with CallEngine(settings, tmp_path / "calls", money=MoneySettings(price="free")) as engine:
            teacher = EndpointTeacher(engine, plan, factors_of(asked)[0], writing=writing)
            ends.append(list(teacher.write((Job(cell) for cell in plan.cells), show)))
            used = [row.usage for row in engine.ledger()]
            assert engine.journal.modes == {(engine.host, "tiny"): "strict"}
    made = [{end.sheet.draft.job.id: end for end in some if isinstance(end, Made)} for some in ends]
    assert [len(some) for some in ends] == [CELLS, CELLS]
    assert len(made[0]) >= 2, ends[0]  # what random words fill in is refused often, and says why
    for name, end in made[0].items():
        assert end.sheet.draft.query
        assert end.sheet.draft.facts
        assert end.target
        assert made[1][name] == end, "what was paid is asked again"
    told = urllib.request.urlopen(server.removesuffix("/v1") + "/metrics").read().decode()
    counted = [
        sum(float(n) for n in re.findall(rf"(?m)^vllm:{kind}_tokens_total{{.*}} (\S+)$", told))
        for kind in ("prompt", "generation")
    ]
    assert counted == [sum(usage.prompt for usage in used), sum(usage.output for usage in used)]
