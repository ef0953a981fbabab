"""Time and memory of RAG training and decoding, raglan against transformers' own RAG models, in one run.

    make bench-rag                                              (about 10 minutes of CPU on one core; needs no data)
    python benchmarks/rag.py --rows 'RAG-Token' --repeats 3     (some rows)

Both sides get the same random weights (BART, saved once to a temporary folder) and the same tensors; each side runs in a
process of its own with one thread, and the two take turns. Time is CPU time, best of the repeats after one that is not
counted. Memory is the peak above what was resident before the call, in processes whose allocator returns everything above
64 kB to the system at once. A row counts only if both sides give the same: losses and gradient norms, or the answers' ids.

What is measured:
- loss: from decoder states to their gradient and the head's, behind the decoder. Answers have T tokens; transformers
  computes T + 1 positions for them, the last one for nothing.
- train step: prompts to the gradient of every weight. The optimiser, the same on both sides, is left out.
- decoding: prompts as ids to answers, with given priors. Contexts have no padding, because transformers drops the mask when it
  makes RAG-Sequence's candidates. raglan's time has all of its `Answer` in it: posteriors, candidates, texts.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DPRConfig,
    DPRQuestionEncoder,
    PreTrainedTokenizerFast,
    RagConfig,
    RagSequenceForGeneration,
    RagTokenForGeneration,
)
from transformers.utils import logging as transformers_logging

from raglan.decode import KINDS, Asked
from raglan.generator import HFGenerator
from raglan.likelihood import chunked_token_logprobs, marginal_logprob
from raglan.prompt import Rendered
from raglan.quiet import quietly
from raglan.recipe import GeneratorSettings, PromptSettings, RagSequenceDecode, RagTokenDecode
from raglan.records import Hit, Passage

PAD, BOS, EOS, UNK = range(4)
QUERIES, PASSAGES = 4, 5
SIDES = ("transformers", "raglan")
MMAP_THRESHOLD = 65536


@dataclass(frozen=True)
class Shape:
    """A BART of width 128, its prompts of L tokens and its answers of T."""

    layers: int
    words: int
    prompt: int
    answer: int


SHAPES = {"head-heavy": Shape(2, 50265, 128, 20), "encoder-heavy": Shape(4, 8192, 256, 16)}


@dataclass(frozen=True)
class Row:
    """One line of the table. `must` and `goal` are of raglan / transformers, or of raglan alone (`rows`)."""

    quantity: str
    work: str
    must: float
    goal: float
    unit: str = "s"
    over: str = "sequence"
    shape: str = "head-heavy"
    settings: dict[str, Any] = field(default_factory=dict)


def table() -> list[Row]:
    rows = []
    peaks = {
        (24, "sequence"): (0.15, 0.08), (24, "token"): (0.12, 0.06), (96, "sequence"): (0.04, 0.02), (96, "token"): (0.04, 0.02)
    }  # fmt: skip
    for (tokens, over), (must, goal) in peaks.items():
        rows.append(Row(f"loss, extra peak, T={tokens}, {over}", "loss", must, goal, "MB", over, settings={"tokens": tokens}))
    for tokens in (24, 96):
        for over in ("sequence", "token"):
            name = f"loss, forward + backward, T={tokens}, {over}"
            rows.append(Row(name, "loss", 0.85, 0.6, "s", over, settings={"tokens": tokens}))
    padded = {"longest": 150, "constant": 300}
    for over in ("sequence", "token"):
        rows.append(Row(f"train step, extra peak, head-heavy, {over}", "step", 0.35, 0.2, "MB", over))
    for over in ("sequence", "token"):
        rows.append(Row(f"train step, same tensors, head-heavy, {over}", "step", 0.95, 0.8, "s", over))
    for over in ("sequence", "token"):
        rows.append(Row(f"train step, their 300-pad vs our longest, {over}", "step", 0.8, 0.6, "s", over, settings=padded))
    limits = {
        ("sequence", 1, "encoder-heavy"): (0.6, 0.45), ("sequence", 1, "head-heavy"): (0.6, 0.45),
        ("sequence", 4, "encoder-heavy"): (0.45, 0.3), ("sequence", 4, "head-heavy"): (0.8, 0.55),
        ("fast", 4, "encoder-heavy"): (0.3, 0.18),
        ("token", 1, "encoder-heavy"): (1.1, 0.95), ("token", 1, "head-heavy"): (1.1, 0.95),
        ("token", 4, "encoder-heavy"): (0.8, 0.6), ("token", 4, "head-heavy"): (1.0, 0.8),
    }  # fmt: skip
    names = {"sequence": "RAG-Sequence thorough", "fast": "RAG-Sequence fast vs their thorough", "token": "RAG-Token"}
    for (kind, beams, shape), (must, goal) in limits.items():
        width = "greedy" if beams == 1 else f"{beams} beams"
        over = "token" if kind == "token" else "sequence"
        settings = {"beams": beams, "mode": "fast" if kind == "fast" else "thorough"}
        if kind == "fast":
            settings["seed"] = 21  # prompts on which fast and thorough agree, which they need not, or nothing could be compared
        rows.append(Row(f"{names[kind]}, {width}, {shape}", "decoding", must, goal, "s", over, shape, settings))
    rows.append(
        Row("encoder rows, thorough, 4 beams", "decoding", 20, 20, "rows", "sequence", "encoder-heavy",
            {"beams": 4, "mode": "thorough"})
    )  # fmt: skip
    return rows


# The models: one BART a shape, scaled so that what it writes differs from prompt to prompt and from token to token


def make_weights(folder: Path) -> None:
    for name, shape in SHAPES.items():
        torch.manual_seed(7)
        config = BartConfig(
            vocab_size=shape.words, d_model=128, encoder_layers=shape.layers, decoder_layers=shape.layers,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=512, decoder_ffn_dim=512,
            max_position_embeddings=512, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, decoder_start_token_id=EOS,
            forced_eos_token_id=None, dropout=0.0, init_std=0.05, tie_word_embeddings=False,
        )  # fmt: skip
        model = BartForConditionalGeneration(config)
        head = torch.randn(shape.words, 128) * 4 / math.sqrt(128)
        head[[PAD, BOS]] = 0  # transformers takes these two in an answer for padding and for the start
        model.lm_head.weight = torch.nn.Parameter(head)
        with quietly():
            model.save_pretrained(str(folder / name))


@cache
def bart(folder: Path, shape: str) -> BartForConditionalGeneration:
    with quietly():
        return BartForConditionalGeneration.from_pretrained(str(folder / shape)).eval()


def raglan_generator(model: Any, start: int) -> HFGenerator:
    """transformers decodes from </s> alone and trains from <s> alone; so does raglan here."""
    words = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": UNK}
    words |= {f"w{number}": number for number in range(len(words), model.config.vocab_size)}
    inner = Tokenizer(models.WordLevel(words, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )  # fmt: skip
    generator = HFGenerator(model, tokenizer, GeneratorSettings(model="random", dtype="float32"), PromptSettings())
    generator.prefix = [start]
    return generator


def rag_model(model: Any, over: str) -> Any:
    questions = DPRConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config = RagConfig.from_question_encoder_generator_configs(
        questions, model.config, n_docs=PASSAGES, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
        decoder_start_token_id=EOS, label_smoothing=0.0, vocab_size=model.config.vocab_size, title_sep=" / ", doc_sep=" // ",
        max_combined_length=300, retrieval_vector_size=16,
    )  # fmt: skip
    kind = RagSequenceForGeneration if over == "sequence" else RagTokenForGeneration
    return kind(config=config, question_encoder=DPRQuestionEncoder(questions), generator=model).eval()


# The work: each gives what is measured, and what of its result both sides must agree on

Work = tuple[Callable[[], Any], Callable[[Any], Any]]


def loss(side: str, row: Row, folder: Path) -> Work:
    """B 8, K 5: states (B·K,T+1,128) behind the decoder → the marginal → gradients of states, head and scores."""
    queries, tokens = 8, row.settings["tokens"]
    model = bart(folder, row.shape)
    torch.manual_seed(1)
    states = torch.randn(queries * PASSAGES, tokens + 1, 128, requires_grad=True)
    scores = torch.randn(queries, PASSAGES, requires_grad=True)
    answers = torch.randint(10, model.config.vocab_size, (queries, tokens))
    rag, generator = rag_model(model, row.over), raglan_generator(model, BOS)

    def theirs() -> Tensor:
        labels = torch.cat([torch.full((queries, 1), BOS), answers], dim=1)
        logits = model.lm_head(states) + model.final_logits_bias
        return rag.get_nll(logits, scores, labels, reduce_loss=True, n_docs=PASSAGES)

    def ours() -> Tensor:
        wanted = answers.repeat_interleave(PASSAGES, 0).flatten()
        hidden = states[:, :-1].flatten(0, 1)
        each = chunked_token_logprobs(hidden, generator.head_logits, wanted, chunk=generator.settings.head_chunk)
        mask = torch.ones_like(answers, dtype=torch.bool)
        return -marginal_logprob(scores.log_softmax(-1), each.view(queries, PASSAGES, tokens), mask, over=row.over).sum()

    return _learning(ours if side == "raglan" else theirs, [states, scores, *model.parameters()], answers.numel())


def step(side: str, row: Row, folder: Path) -> Work:
    """B 4, K 5, T 24: prompts → loss → the gradient of every weight. Padded to `constant` on their side where that is set."""
    tokens = 24
    model = bart(folder, row.shape).train()
    torch.manual_seed(2)
    longest = row.settings.get("longest", SHAPES[row.shape].prompt)
    lengths = [longest - (number % PASSAGES) * 5 if row.settings else longest for number in range(QUERIES * PASSAGES)]
    width = row.settings.get("constant", longest) if side == "transformers" else longest
    ids = torch.randint(10, model.config.vocab_size, (len(lengths), longest))
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    ids = torch.nn.functional.pad(ids, (0, width - longest)).masked_fill(~mask, PAD)
    scores = torch.randn(QUERIES, PASSAGES, requires_grad=True)
    answers = torch.cat([torch.randint(10, model.config.vocab_size, (QUERIES, tokens - 1)), torch.full((QUERIES, 1), EOS)], 1)
    rag, generator = rag_model(model, row.over).train(), raglan_generator(model, BOS)

    def theirs() -> Tensor:
        return rag(
            context_input_ids=ids, context_attention_mask=mask.long(), doc_scores=scores, n_docs=PASSAGES, reduce_loss=True,
            labels=torch.cat([torch.full((QUERIES, 1), BOS), answers], dim=1),
        ).loss  # fmt: skip

    def ours() -> Tensor:
        batch = {"input_ids": ids, "attention_mask": mask.long(), "labels": answers.repeat_interleave(PASSAGES, 0)}
        each = generator.forward(batch).view(QUERIES, PASSAGES, tokens)
        return -marginal_logprob(scores.log_softmax(-1), each, answers >= 0, over=row.over).sum()

    return _learning(ours if side == "raglan" else theirs, [scores, *model.parameters()], answers.numel())


def _learning(forward: Callable[[], Tensor], leaves: list[Tensor], tokens: int) -> Work:
    """A step, and the loss per token with the norms of all gradients."""

    def run() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        total = forward()
        total.backward()
        return total.detach()

    def result(total: Tensor) -> list[float]:
        return [float(total) / tokens, *(float(leaf.grad.norm()) / tokens for leaf in leaves if leaf.grad is not None)]

    return run, result


class Given(Asked):
    """Questions whose prompts are given, so that neither side's time has tokenisation in it."""

    rows: list[list[Rendered]]

    def prompts(self, prompt: Any) -> list[list[Rendered]]:
        return self.rows


def decoding(side: str, row: Row, folder: Path) -> Work:
    """B 4, K 5 prompts of one length → the best answer's ids."""
    model, shape = bart(folder, row.shape).eval(), SHAPES[row.shape]
    beams = row.settings["beams"]
    torch.manual_seed(row.settings.get("seed", 3))
    ids = torch.randint(10, shape.words, (QUERIES * PASSAGES, shape.prompt))
    scores = torch.randn(QUERIES, PASSAGES)
    rag, generator = rag_model(model, row.over), raglan_generator(model, EOS)
    prompts = [Rendered(tuple(each), "") for each in ids.tolist()]
    hits = [Hit(Passage(str(rank), ""), rank, 0.0, rank + 1) for rank in range(PASSAGES)]
    asked = Given([""] * QUERIES, [hits] * QUERIES, list(scores.log_softmax(-1)))
    object.__setattr__(asked, "rows", [prompts[b * PASSAGES : (b + 1) * PASSAGES] for b in range(QUERIES)])
    kind = f"rag_{row.over}"
    settings: Any = (
        RagTokenDecode(kind="rag_token", beams=beams, max_new_tokens=shape.answer)
        if row.over == "token"
        else RagSequenceDecode(kind="rag_sequence", beams=beams, mode=row.settings["mode"], max_new_tokens=shape.answer)
    )

    @torch.no_grad()
    def theirs() -> Any:
        return rag.generate(
            context_input_ids=ids, context_attention_mask=torch.ones_like(ids), doc_scores=scores, n_docs=PASSAGES,
            num_beams=beams, max_length=shape.answer + 1, min_length=0, do_sample=False,
        )  # fmt: skip

    def ours() -> Any:
        return KINDS[kind](generator, asked, settings)

    def result(found: Any) -> list[list[int]]:
        if side == "raglan":
            return [list(answer.ids) for answer in found]
        return [written[1 : written.index(EOS, 1) + 1 if EOS in written[1:] else None] for written in found.tolist()]

    return (ours if side == "raglan" else theirs), result


WORKS: dict[str, Callable[[str, Row, Path], Work]] = {"loss": loss, "step": step, "decoding": decoding}


# One side: a process that is told rows on stdin and answers with one JSON object each


def serve(side: str, folder: Path) -> None:
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    rows = {_key(row): row for row in table()}
    ready: tuple[str, Work] | None = None
    for line in sys.stdin:
        name = line.strip()
        if ready is None or ready[0] != name:
            ready = None
            run, result = WORKS[rows[name].work](side, rows[name], folder)
            ready = (name, (run, result))
            run()
        run, result = ready[1]
        gc.collect()
        print(json.dumps(_measured(rows[name].unit, run, result, bart(folder, rows[name].shape))), flush=True)


def _measured(unit: str, run: Callable[[], Any], result: Callable[[Any], Any], model: Any) -> dict[str, Any]:
    if unit == "rows":
        with counted(model.get_encoder()) as rows:
            found = run()
        return {"value": sum(rows), "result": result(found)}
    if unit == "MB":
        before = peak_memory(reset=True)
        found = run()
        return {"value": (peak_memory() - before) / 2**20, "result": result(found)}
    began = time.process_time()
    found = run()
    return {"value": time.process_time() - began, "result": result(found)}


@contextmanager
def counted(encoder: torch.nn.Module) -> Iterator[list[int]]:
    rows: list[int] = []
    handle = encoder.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"] if "input_ids" in kwargs else args[0])), with_kwargs=True
    )
    yield rows
    handle.remove()


def peak_memory(*, reset: bool = False) -> int:
    """The highest resident size in bytes since the last reset, by the kernel's own count."""
    if reset:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


# Both sides: they take turns


class Side:
    """A process of one side."""

    def __init__(self, side: str, folder: Path, unit: str):
        command = [sys.executable, __file__, "--side", side, "--weights", str(folder)]
        own = {"MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD)} if unit == "MB" else {}
        environment = {**os.environ, **own, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def measure(self, row: Row) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(_key(row) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process that measured {row.quantity!r} ended")
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compared(row: Row, sides: dict[str, Side], repeats: int) -> str:
    """The row's line of the table."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    times = 1 if row.unit != "s" else min(repeats, 2) if row.settings.get("tokens") == 96 else repeats
    for _ in range(times):
        for side in SIDES:
            found[side].append(sides[side].measure(row))
    theirs, ours = (min(each["value"] for each in found[side]) for side in SIDES)
    ratio = ours / theirs
    if not same(found["transformers"][0]["result"], found["raglan"][0]["result"]):
        return _line(row, theirs, ours, "DIFFERS", "does not count")
    reached = ours if row.unit == "rows" else ratio
    verdict = "meets goal" if reached <= row.goal else "meets must" if reached <= row.must else "FAILS"
    return _line(row, theirs, ours, f"{ratio:.3f}", verdict)


def same(theirs: list[Any], ours: list[Any]) -> bool:
    """Answers to the id; losses and gradient norms per answer token to 1e-4."""
    if isinstance(theirs[0], list):
        return theirs == ours
    return len(theirs) == len(ours) and all(
        math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-4 if place == 0 else 1e-7)
        for place, (a, b) in enumerate(zip(theirs, ours, strict=True))
    )


def _line(row: Row, theirs: float, ours: float, ratio: str, verdict: str) -> str:
    a, b = (
        f"{value:.3f} s" if row.unit == "s" else f"{value:.0f} {row.unit}".removesuffix(" rows") for value in (theirs, ours)
    )
    return f"| {row.quantity} | {a} | {b} | {ratio} | ≤ {row.must:g} | ≤ {row.goal:g} | {verdict} |"


def _key(row: Row) -> str:
    return f"{row.quantity} [{row.unit}]"


def machine() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    used = ", ".join(f"{name} {version(name)}" for name in ("raglan", "transformers", "torch"))
    cores = len(os.sched_getaffinity(0))
    name = found[1] if found else platform.processor()
    return f"{name}, {cores} cores, one thread used; Python {platform.python_version()}, {used}; {date.today()}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of RAG, raglan against transformers.")
    parser.add_argument("--rows", default="", help="regular expression: only rows whose quantity has it")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs a row and side, the best of which counts")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.side:
        serve(chosen.side, chosen.weights)
    else:
        compare([row for row in table() if re.search(chosen.rows, row.quantity)], chosen.repeats)


def compare(rows: list[Row], repeats: int) -> None:
    print(machine(), end="\n\n")
    print("| quantity | transformers | raglan | ratio | must | goal | verdict |\n|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        make_weights(Path(folder))
        for memory in (True, False):
            part = [row for row in rows if (row.unit == "MB") == memory]
            if not part:
                continue
            sides = {side: Side(side, Path(folder), part[0].unit) for side in SIDES}
            for row in part:
                print(compared(row, sides, repeats), flush=True)
            for side in sides.values():
                side.end()


if __name__ == "__main__":
    main()
