"""LoRA on a causal model of Mistral's shape: tokens a second, memory, and what scoring answer positions alone is worth.

    make bench-lora                                       (some minutes of one core)
    python benchmarks/lora.py --model FOLDER --device cuda --batch 8 --steps 20

r 16 on all linear layers, rows of `data.kind: shown` (three passages; answers of unequal length). Two trainers learn from the
same rows in the same order and from the same weights, by turns, each in a process of its own:

    raglan   raglan's stage trainer: the LM head is applied to answer positions only
    plain    transformers.Trainer on the same peft model, with labels of -100 before the answer: logits of all positions

Printed: seconds a step without the first, and of the processor; tokens a second without padding; peak memory, and what is
beyond what was held before training (on a GPU what torch allocated); bytes of adapter and optimizer; what LoRA has to compute
(4 operations for a weight and token, forward and back to the inputs; the head's for answers only) as a share of what a matrix
product reaches in the same process; the time of an epoch. First losses are compared: OK, or FAIL and exit status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast, Trainer, TrainerCallback

from raglan.generator import HFGenerator, open_generator
from raglan.objective import AnswerObjective
from raglan.recipe import Recipe, ShownData, load_recipe
from raglan.rendering import Rendering
from raglan.shown import shown_rows
from raglan.trainer import stage_trainer

ARMS = ("raglan", "plain")
MATRIX, ALIKE = 2048, 1e-3  # side of the matrices; relative difference of the first losses


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--model", type=Path, help="a folder; default one is made, with random weights, of these three sizes:")
    words.add_argument("--hidden", type=int, default=1024)
    words.add_argument("--layers", type=int, default=4)
    words.add_argument("--words", type=int, default=32_000, help="its vocabulary")
    words.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    words.add_argument("--batch", type=int, default=4)
    words.add_argument("--steps", type=int, default=3, help="timed steps a turn")
    words.add_argument("--turns", type=int, default=2)
    words.add_argument("--passage", type=int, default=70, help="words of a passage")
    words.add_argument("--epoch", type=int, default=20_000, help="rows of the epoch whose time is told")
    words.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    words.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = words.parse_args()
    if asked.arm:
        print(json.dumps(trained(asked.arm, asked.folder, asked)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_all(folder, asked)
        found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
        for _ in range(asked.turns):
            for arm in ARMS:
                found[arm].append(in_a_process(arm, folder))
    sys.exit(told(found, asked))


def in_a_process(arm: str, folder: Path) -> dict[str, Any]:
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if "cuda" not in sys.argv else {}
    command = [sys.executable, __file__, *sys.argv[1:], "--arm", arm, "--folder", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **hidden})
    return dict(json.loads(done.stdout.splitlines()[-1]))


def write_all(folder: Path, asked: argparse.Namespace) -> None:
    """The model, the rows and the recipe."""
    model = asked.model or made(folder / "model", asked)
    draw = random.Random(0)
    with open(folder / "made.jsonl", "w", encoding="utf-8") as file:
        for n in range(asked.batch * (asked.steps + 1)):
            shown = [{"id": f"p{n}-{i}", "title": "", "text": some(draw, asked.passage, asked.words)} for i in range(3)]
            target = some(draw, draw.randint(2, 24), asked.words)
            synth = {"passages": shown, "target": target, "instruction": "w1 w2", "rendering": Rendering().record()}
            query = some(draw, 8, asked.words)
            file.write(json.dumps({"id": f"s{n}", "query": query, "answers": [target], "synth": synth}) + "\n")
    kind = "bfloat16" if asked.device == "cuda" else "float32"
    lora = "{r: 16, lora_alpha: 16, target_modules: all-linear, use_rslora: true}"
    (folder / "recipe.yaml").write_text(f"""
name: lora
knowledge: {{path: kb, documents: docs}}
prompt: {{max_tokens: 4096}}
generator: {{model: "{model.resolve()}", dtype: {kind}, lora: {lora}}}
data: {{kind: shown, path: made.jsonl}}
objective: {{kind: answer}}
train: {{max_steps: {asked.steps + 1}, per_device_train_batch_size: {asked.batch}, learning_rate: 1e-4, logging_steps: 1,
  train_sampling_strategy: sequential, save_strategy: "no"}}
""")


def made(folder: Path, asked: argparse.Namespace) -> Path:
    pieces = ["<unk>", "<s>", "</s>", *(f"w{n}" for n in range(asked.words - 3))]
    inner = Tokenizer(models.WordLevel({piece: n for n, piece in enumerate(pieces)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)
    torch.manual_seed(0)
    heads = max(1, asked.hidden // 128)
    config = MistralConfig(
        vocab_size=asked.words, hidden_size=asked.hidden, intermediate_size=asked.hidden * 7 // 2,
        num_hidden_layers=asked.layers, num_attention_heads=heads, num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=4096, sliding_window=None,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(folder)
    return folder


def some(draw: random.Random, count: int, words: int) -> str:
    return " ".join(f"w{draw.randrange(words - 3)}" for _ in range(count))


def trained(arm: str, folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """One turn of one trainer, measured."""
    recipe: Recipe = load_recipe(folder / "recipe.yaml")
    stage = recipe.trainings()["answer"]
    assert isinstance(stage.data, ShownData)
    torch.manual_seed(1)
    generator = open_generator(recipe.generator, recipe.prompt)
    rows = shown_rows(stage.data, generator, seed=1).rows
    trainer: Trainer = stage_trainer(recipe, stage, folder / arm, AnswerObjective(generator), rows, [])
    if arm == "plain":
        trainer = Trainer(model=generator.model, args=trainer.args, train_dataset=rows, data_collator=collated(generator))
    clock, before = Clock(), memory(asked.device)[0]
    trainer.add_callback(clock)
    forget_peak(asked.device)
    trainer.train()
    learned = [p for p in generator.model.parameters() if p.requires_grad]
    state = [t for kept in trainer.optimizer.state.values() for t in kept.values() if isinstance(t, torch.Tensor)]
    sizes = [p.numel() for name, p in generator.model.named_parameters() if p.dim() == 2 and "embed_tokens" not in name]
    head = generator.model.get_output_embeddings().weight.numel()
    losses = [step["loss"] for step in trainer.state.log_history if "loss" in step]
    timed = rows[asked.batch :]
    return {
        "step": statistics.median(clock.steps[1:]), "cpu": statistics.median(clock.cpu[1:]), "loss": losses[0],
        "peak": memory(asked.device)[1], "before": before,
        "tokens": sum(len(row["input_ids"]) + len(row["labels"]) for row in timed) / asked.steps,
        "answers": sum(len(row["labels"]) for row in timed) / asked.steps, "layers": sum(sizes) - head, "head": head,
        "parameters": sum(p.numel() for p in generator.model.parameters()), "learned": sum(p.numel() for p in learned),
        "adapter": sum(p.numel() * p.element_size() for p in learned),
        "optimizer": sum(t.numel() * t.element_size() for t in state), "matrix": matrix_rate(generator),
    }  # fmt: skip


class Clock(TrainerCallback):
    """Seconds of each step, and of the processor, which count on a busy machine as well."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.cpu: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began, self.used = now(), time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(now() - self.began)
        self.cpu.append(time.process_time() - self.used)


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def collated(generator: HFGenerator) -> Any:
    """Prompt and answer in one, padded behind; nothing but the answer is learned."""

    def batch(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) + len(row["labels"]) for row in rows)
        whole = [row["input_ids"] + row["labels"] for row in rows]
        labels = [[-100] * len(row["input_ids"]) + row["labels"] for row in rows]
        return {
            "input_ids": torch.tensor([ids + [generator.pad] * (width - len(ids)) for ids in whole]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in whole]),
            "labels": torch.tensor([ids + [-100] * (width - len(ids)) for ids in labels]),
        }

    return batch


def memory(device: str) -> tuple[int, int]:
    """Bytes now, and at most since `forget_peak`."""
    if device == "cuda":
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, most = (int(lines[name].split()[0]) << 10 for name in ("VmRSS", "VmHWM"))
    return now, most


def forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def matrix_rate(generator: HFGenerator) -> float:
    """Floating-point operations a second of a matrix product, the best of five; on a CPU a second of the processor."""
    a = torch.randn(MATRIX, MATRIX, device=generator.device).to(generator.dtype)
    clock = now if a.is_cuda else time.process_time
    seconds = []
    for _ in range(5):
        began = clock()
        a @ a
        seconds.append(clock() - began)
    return 2 * MATRIX**3 / min(seconds)


def told(found: dict[str, list[dict[str, Any]]], asked: argparse.Namespace) -> int:
    one, mb = found["raglan"][0], 1e6
    print(f"{one['parameters'] / mb:.0f} M parameters; a step has {one['tokens']:.0f} tokens, {one['answers']:.0f} of answers")
    print(f"learned: {one['learned'] / mb:.2f} M in {one['adapter'] / mb:.1f} MB; optimizer {one['optimizer'] / mb:.1f} MB")
    print("| trainer | s a step | CPU s | tokens/s | peak, MB | beyond before, MB | share of a matrix product |")
    print("|---|---|---|---|---|---|---|")
    needs = 4 * (one["layers"] * one["tokens"] + one["head"] * one["answers"])
    seconds, cpu, beyond = {}, {}, {}
    for arm, turns in found.items():
        seconds[arm] = statistics.median(turn["step"] for turn in turns)
        cpu[arm] = statistics.median(turn["cpu"] for turn in turns)
        beyond[arm] = statistics.median(turn["peak"] - turn["before"] for turn in turns)
        peak, rate = (statistics.median(turn[name] for turn in turns) for name in ("peak", "matrix"))
        share = needs / (seconds if asked.device == "cuda" else cpu)[arm] / rate
        speed = f"{seconds[arm]:.2f} | {cpu[arm]:.2f} | {one['tokens'] / seconds[arm]:.0f}"
        print(f"| {arm} | {speed} | {peak / mb:.0f} | {beyond[arm] / mb:.0f} | {share:.0%} of {rate / 1e9:.0f} GFLOP/s |")
    hours = asked.epoch / asked.batch * seconds["raglan"] / 3600
    wall, used, more = (figure["plain"] / figure["raglan"] for figure in (seconds, cpu, beyond))
    print(f"plain / raglan: time {wall:.2f}, CPU {used:.2f}, memory beyond what was held before {more:.2f}")
    print(f"an epoch of {asked.epoch} such rows: {hours:.1f} hours")
    apart = abs(one["loss"] / found["plain"][0]["loss"] - 1)
    print(f"first loss {one['loss']:.4f} and {found['plain'][0]['loss']:.4f}: {'OK' if apart < ALIKE else 'FAIL'}")
    return int(apart >= ALIKE)


if __name__ == "__main__":
    main()
