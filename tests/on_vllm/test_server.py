"""vLLM's own server: R-ft's scores and Self-RAG's marks come over HTTP as they come from the model run here."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import test_engine
from test_engine import judged, judging, same

from raglan.decode import Asked, self_rag
from raglan.generator import EndpointScorer, HFGenerator, open_any
from raglan.recipe import GeneratorSettings, PromptSettings, ScorerSettings, SelfRagDecode
from raglan.records import Hit, Passage

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: `make test-vllm`")

PROMPT = PromptSettings(max_tokens=300)
TOWER = Passage("1", "The tower was built by Odo Marrack, a miller, in 1831.", "Tower")
PASSAGES = [TOWER, Passage("2", "Lit with oil.", "Light")]
QUESTIONS = (("who built it?", "Odo Marrack"), ("when?", "1831"))
ASKED = [(query, passage, answer) for query, answer in QUESTIONS for passage in PASSAGES]
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_PLUGINS": "", "TORCHDYNAMO_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return judging(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def local(folder: Path) -> HFGenerator:
    return open_any(GeneratorSettings(model=str(folder), dtype="float32"), PROMPT)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(folder, tmp_path_factory.mktemp("log") / "server.log") as url:
        yield url


@contextmanager
def serving(folder: Path, log: Path, *, length: int = 512) -> Iterator[str]:
    """vLLM's server over a model, as "tiny"; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "tiny",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", str(length), "--enforce-eager",
        "--block-size", "32", "--max-num-seqs", "16",
    ]  # fmt: skip
    with log.open("wb") as out, subprocess.Popen(words, stdout=out, stderr=out, env={**os.environ, **ENVIRONMENT}) as process:
        try:
            _wait(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def _wait(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(2400):
        assert process.poll() is None, log.read_text(encoding="utf-8", errors="replace")[-3000:]
        try:
            with urllib.request.urlopen(address, timeout=1):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text(encoding="utf-8", errors="replace")[-3000:])


def test_scores_of_answers(folder: Path, local: HFGenerator, server: str) -> None:
    scorer = EndpointScorer(ScorerSettings(model="tiny", endpoint=server, tokenizer=str(folder)), PROMPT)
    here, there = (
        generator.token_logprobs(
            [generator.prompt.render(query, [passage]) for query, passage, _ in ASKED], [answer for *_, answer in ASKED]
        )
        for generator in (local, scorer)
    )
    for ours, theirs in zip(here, there, strict=True):
        np.testing.assert_allclose(theirs, ours, atol=1e-3)


def test_marks(folder: Path, local: HFGenerator, server: str) -> None:
    settings = GeneratorSettings(kind="endpoint", model="tiny", endpoint=server, tokenizer=str(folder))
    remote = open_any(settings, PROMPT)
    assert remote.exact_marks
    marks = local.schema.marks
    found = []
    for generator in (local, remote):
        roots = generator.contexts([generator.marked_prompt.question(query) for query, *_ in ASKED], marks=marks)
        behind = roots.branch(range(len(ASKED)), [generator.marked_prompt.passage(passage) for _, passage, _ in ASKED])
        found.append((behind.mark_logprobs, [row.ids for row in behind.write(stop_ids=(), max_new_tokens=6)]))
    np.testing.assert_allclose(found[1][0], found[0][0], atol=1e-3)
    assert found[1][1] == found[0][1]


@pytest.mark.parametrize("form", ["short", "long"])
def test_answers(form: str, folder: Path, local: HFGenerator, server: str) -> None:
    """Decisions, trees, components and answers of both forms, over HTTP."""
    settings = GeneratorSettings(kind="endpoint", model="tiny", endpoint=server, tokenizer=str(folder))
    more = {"passages": "static", "max_segments": 2, "n_best": 2} if form == "long" else {}
    decode = SelfRagDecode(kind="self_rag", form=form, retrieve="always", max_new_tokens=12, **more)
    hits = [Hit(passage, row, 1.0, row + 1) for row, passage in enumerate(test_engine.PASSAGES)]
    asked = Asked(test_engine.QUESTIONS, [hits] * len(test_engine.QUESTIONS))
    ours, theirs = (self_rag(generator, asked, decode) for generator in (open_any(settings, PROMPT), local))
    for own, other in zip(ours, theirs, strict=True):
        same(own, other)
    levels = [level for answer in ours for level in (answer.trace["levels"] if form == "long" else [answer.trace])]
    assert judged(one for level in levels for one in level["candidates"]) == {"sup", "use"}
    assert len(levels) > len(ours) or form == "short"
