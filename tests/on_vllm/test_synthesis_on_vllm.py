"""A small real model behind a real server writes examples: strict schemas hold a random one to JSON, and the books agree.

Evidence, prompt, checks and export are those of any run (`Assembler`, `Verifier`, `raglan synthesize export`). Of random words
the checks accept next to none; what is shown is that all of it parses, is rendered, judged, written and read again.
"""

from __future__ import annotations

import importlib.util
import json
import re
import socket
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from test_server import ENVIRONMENT, serving
from transformers import LlamaConfig, LlamaForCausalLM

import tiny
from raglan.calls import CallEngine
from raglan.calls.journal import Journal
from raglan.documents import example_row
from raglan.knowledge import build_knowledge
from raglan.recipe import EndpointSettings, MoneySettings, Recipe, SynthesisSettings, WritingSettings
from raglan.synthesis import factors_of, make_plan, start
from raglan.synthesis.checked import written_of
from raglan.synthesis.endpoint import EndpointTeacher
from raglan.synthesis.evidence import Assembler
from raglan.synthesis.record import example_of
from raglan.synthesis.writing import Job, Made, Reject
from raglan.verification import Verifier
from test_cli import run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: `make test-vllm`")

CELLS = 32
LIKELY = {'"': 0.40, "{": 0.60, "]": 0.20, "}": 0.42, "</s>": 0.35}  # × √64: logits above others, so that all ends some time
BYTES = -1.0  # of pieces that are a byte: random ones make halves of characters, which are refused
COMMAND = """#!{python}
import os, sys
os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", *sys.argv[2:]])
"""
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
        for number in range(256):
            model.lm_head.weight[words.convert_tokens_to_ids(f"<0x{number:02X}>"), 0] = BYTES
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


@pytest.fixture(scope="module")
def asked(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Over a built knowledge base, from which the noise is."""
    path = tmp_path_factory.mktemp("kb")
    texts = [f"The mill number {n} was built of {stone} stone." for n in range(4) for stone in ("grey", "red", "white", "blue")]
    rows = [{"id": f"p{n}", "title": f"Mill {n}", "text": text} for n, text in enumerate(texts)]
    (path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    encoder = {"model": str(tiny.sentence_encoder(path / "encoder")), "dtype": "float32"}
    weights = {
        "task": {"factoid": 1}, "answer_format": {"short_sentence": 1}, "query_format": {"wh_question": 1},
        "relation": {"R1": 1}, "absent_policy": {"abstain": 1}, "passage_form": {"numbered": 1},
    }  # fmt: skip
    made = Recipe.model_validate({
        "name": "v", "generator": {"model": str(folder)}, "prompt": {"layout": "joined"},
        "knowledge": {
            "path": path / "kb", "documents": path / "corpus.jsonl", "chunk": None, "encoder": encoder,
            "indexes": {"dense": {"kind": "dense"}},
        },
        "retriever": {"index": "dense"},
        "synthesis": {
            "path": path / "out", "n": CELLS, "from_scratch": 1, "retrievers": {"dense": 1}, "weights": weights,
            "passages": {"k": {3: 1}}, "budget": {"max_length": 4096, "answer": 400},
        },
    })  # fmt: skip
    build_knowledge(made.knowledge)
    return made


def test_a_small_model_behind_a_server_writes(
    server: str, asked: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, assembler = make_plan(asked), Assembler.open(asked)
    step = {"temperature": 1.0, "max_tokens": 400}
    writing = WritingSettings.model_validate({
        "jobs": 2, "beside": 0, "brainstorm": step, "draft": step, "passages": step, "answer": step,
    })  # fmt: skip
    settings = EndpointSettings(base_url=server, model="tiny", concurrency=4, attempts=2)
    ends: list[list[Made | Reject]] = []
    for _ in range(2):
        with CallEngine(settings, tmp_path / "calls", money=MoneySettings(price="free")) as engine:
            teacher = EndpointTeacher(engine, plan, factors_of(asked)[0], writing=writing)
            ends.append(list(teacher.write((Job(cell) for cell in plan.cells), assembler.show)))
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
    ends_made = list(made[0].values())
    for end in ends_made:
        assert _folded(end.sheet.draft.query) in _folded(end.sheet.prompt)
        texts = [_folded(slot.passage.text) for slot in end.sheet.slots]
        places = [_folded(end.sheet.prompt).index(text) for text in texts]
        assert (len(places), places) == (3, sorted(places))
        verified = Verifier().verify(written_of(end))
        assert verified.accepted or verified.reason
    data, file = tmp_path / "data", tmp_path / "sft.jsonl"
    data.mkdir()
    rows = [example_row(example_of(end, teacher="endpoint:tiny", corpus=assembler.corpus)) for end in ends_made]
    (data / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for words in (["export", str(data), "-o", str(file)], ["check", str(file)]):
        code, _, err = run("synthesize", *words, "--as", "sft", capsys=capsys, monkeypatch=monkeypatch)
        assert code == 0, err
    exported = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [(row["prompt"].strip(), row["completion"].strip()) for row in exported] == [
        (end.sheet.prompt.strip(), end.target) for end in ends_made
    ]
    told = urllib.request.urlopen(server.removesuffix("/v1") + "/metrics").read().decode()
    counted = [
        sum(float(n) for n in re.findall(rf"(?m)^vllm:{kind}_tokens_total{{.*}} (\S+)$", told))
        for kind in ("prompt", "generation")
    ]
    assert counted == [sum(usage.prompt for usage in used), sum(usage.output for usage in used)]


def _folded(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("kind", ["vllm", "hf"])
def test_a_run_starts_the_server_of_its_teacher_and_ends_it(
    kind: str, folder: Path, asked: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`raglan synthesize` with a model on this machine, and nothing else running. Transformers' server knows no schemas."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    command = tmp_path / "vllm"  # vLLM for CPUs is a distribution of another name, which its own command does not find
    command.write_text(COMMAND.format(python=sys.executable))
    command.chmod(0o755)
    monkeypatch.setenv("RAGLAN_VLLM", str(command))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ("--dtype", "float32", "--max-model-len", "8192", "--enforce-eager", "--block-size", "32", "--max-num-seqs", "16")
    teacher = {
        "kind": kind, "model": str(folder), "base_url": f"http://127.0.0.1:{port}/v1", "concurrency": 4, "attempts": 2,
        "arguments": words if kind == "vllm" else ("--device", "cpu", "--dtype", "float32"),
    }  # fmt: skip
    step = {"temperature": 1.0, "max_tokens": 400 if kind == "vllm" else 60}
    assert asked.synthesis is not None
    told = asked.synthesis.model_dump() | {
        "path": tmp_path / "out", "n": 16 if kind == "vllm" else 4, "teacher": teacher, "decontaminate": "none",
        "writing": {"jobs": 2, "beside": 0, **dict.fromkeys(("brainstorm", "draft", "passages", "answer"), step)},
    }  # fmt: skip
    done = start.run(asked.model_copy(update={"synthesis": SynthesisSettings.model_validate(told)}))
    assert done.told["stopped"] == ""
    assert done.told["kept"] + done.told["surplus"] + sum(
        count for reason, count in done.told["funnel"].items() if reason != "attempts"
    ) == done.told["attempts"] >= done.told["requested"]  # fmt: skip
    with closing(Journal(tmp_path / "out" / "calls")) as journal:
        classes = {row.cls for row in journal.ledger.rows()}
        assert journal.ledger.spent == 0
        assert journal.ledger.doubts.calls == 0
    assert classes <= {"ok", "malformed", "truncated", "permanent"}, "the server was there all the time"
    assert ("ok" in classes) or kind == "hf"
    with socket.socket() as tried:
        assert tried.connect_ex(("127.0.0.1", port)) != 0, "it has ended"
