"""Training: a recipe's stages in order, each on `transformers.Trainer`, each finished, resumed or found done.

    runs/<name>/stages/<stage>-<fingerprint>/
        work/         the trainer's checkpoints; a rerun goes on from the last whole one
        log.json      learning curves
        result/       generator/, query_encoder/ or both, and manifest.json, written last
    runs/<name>/scores.jsonl   language-model scores (lsr), shared by all settings that do not change them

A stage's fingerprint covers its settings and everything that goes into it (knowledge base, questions, the parts as they
come out of the stages before), so a changed setting trains anew and an unchanged one is not trained twice.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

from raglan.artifact import MANIFEST, file_fingerprint, fingerprint, read_manifest, write_json, write_manifest
from raglan.data import answer_rows, load_examples, stage_examples
from raglan.encoder import bfloat16_is_faster
from raglan.errors import RecipeError
from raglan.knowledge import KnowledgeBase
from raglan.likelihood import lsr_target, normalised_entropy
from raglan.objective import (
    AnswerObjective,
    LsrObjective,
    MarginalObjective,
    MarginalRow,
    Objective,
    learns_to_retrieve,
)
from raglan.objective.lsr import LsrRow
from raglan.rag import RAG
from raglan.recipe import AnswerObjective as AnswerSettings
from raglan.recipe import LsrObjective as LsrSettings
from raglan.recipe import MarginalObjective as MarginalSettings
from raglan.recipe import QuestionData, Recipe, StageSettings
from raglan.records import Example
from raglan.scores import ScoreTable

__all__ = ["Parts", "finished_parts", "train"]

log = logging.getLogger(__name__)
KIND = "stage"
LEARNED = {"answer": "generator", "lsr": "query_encoder"}
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h


@dataclass(frozen=True)
class Parts:
    """The tuned parts so far: folders, or None for the recipe's own."""

    generator: str | None = None
    query_encoder: Path | None = None

    def open(self, recipe: Recipe) -> RAG:
        return RAG.open(recipe, generator=self.generator, query_encoder=self.query_encoder)


@dataclass(frozen=True)
class _Stage:
    name: str
    settings: StageSettings
    folder: Path

    @property
    def result(self) -> Path:
        return self.folder / "result"

    def parts(self, before: Parts) -> Parts:
        objective = self.settings.objective
        learned = objective.learn if objective.kind == "marginal" else (LEARNED[objective.kind],)
        generator = str(self.result / "generator") if "generator" in learned else before.generator
        return Parts(generator, self.result / "query_encoder" if "query_encoder" in learned else before.query_encoder)


def train(recipe: Recipe, *, only: str | None = None) -> Parts:
    """Train all stages that are not done yet, or just one; returns the tuned parts.

    Raises:
        RecipeError: no stage, or a stage named that is not there.
    """
    trainings = recipe.trainings()
    if not trainings:
        raise RecipeError(f"recipe {recipe.name!r} trains nothing", hint="give it `objective` and `data`, or `stages`")
    if only is not None and only not in trainings:
        raise RecipeError(f"there is no stage {only!r}; the recipe has {', '.join(trainings)}")
    parts = Parts()
    for stage, before in _stages(recipe):
        if (stage.result / MANIFEST).is_file():
            read_manifest(stage.result, KIND)
            log.info("stage %s is done: %s", stage.name, stage.result)
        elif only is None or stage.name == only:
            _train_stage(recipe, stage, before)
        else:
            raise RecipeError(f"stage {stage.name!r} comes before {only!r} and is not done", hint=f"--stage {stage.name}")
        parts = stage.parts(before)
        if stage.name == only:
            break
    return parts


def finished_parts(recipe: Recipe) -> list[tuple[str, Parts]]:
    """("untuned", …), then each finished stage's name with the parts as they stand after it."""
    found = [("untuned", Parts())]
    for stage, before in _stages(recipe):
        if not (stage.result / MANIFEST).is_file():
            break
        found.append((stage.name, stage.parts(before)))
    missing = [name for name in recipe.trainings() if name not in dict(found)]
    if missing and any((recipe.run / "stages").glob(f"{missing[0]}-*/result/{MANIFEST}")):
        log.warning(
            "stage %s is trained, but with other settings, documents or questions than the recipe's now; it is not used",
            missing[0],
        )
    return found


def learning_curves(recipe: Recipe) -> dict[str, list[dict[str, float]]]:
    """The trainer's log of every finished stage."""
    curves = {}
    for stage, _ in _stages(recipe):
        if (stage.folder / "log.json").is_file():
            curves[stage.name] = json.loads((stage.folder / "log.json").read_text(encoding="utf-8"))
    return curves


def _stages(recipe: Recipe) -> list[tuple[_Stage, Parts]]:
    """Each stage with the parts that go into it; names of folders follow from everything that does."""
    made_of: list[Any] = [KnowledgeBase.open(recipe.knowledge.path).version, recipe.seed]
    shared = [
        recipe.prompt.model_dump(mode="json"), recipe.generator.model_dump(mode="json", exclude={"batch_tokens", "head_chunk"}),
        recipe.retriever.model_dump(mode="json", exclude={"k"}), recipe.knowledge.encoder.model_dump(mode="json"),
        [folder_stamp(name) for name in (recipe.generator.model, recipe.retriever.query_encoder)],
    ]  # fmt: skip
    parts, stages = Parts(), []
    for name, settings in recipe.trainings().items():
        files = [path for key in ("path", "dev") if (path := getattr(settings.data, key, None)) is not None]
        contents = [file_fingerprint(path) if path.is_file() else str(path) for path in files]
        made_of = [*made_of, settings.model_dump(mode="json"), shared, contents]
        stage = _Stage(name, settings, recipe.run / "stages" / f"{name}-{fingerprint(made_of)[:8]}")
        stages.append((stage, parts))
        parts = stage.parts(parts)
    return stages


class _KeepMemory(TrainerCallback):
    """Let glibc keep freed blocks: a training step on a CPU frees and takes the same gigabyte over and over.

    Measured with the embedded reader: a fifth off the step, a quarter of the page faults (docs/log.md). Rows of many lengths
    leave holes, so unused pages go back whenever the process holds half of the machine's memory. Elsewhere than on Linux
    nothing happens.
    """

    def __init__(self) -> None:
        self.libc: Any = ctypes.CDLL(None) if sys.platform == "linux" and not torch.cuda.is_available() else object()
        if hasattr(self.libc, "mallopt"):
            for parameter, value in ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 1 << 28)):
                self.libc.mallopt(parameter, value)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if hasattr(self.libc, "malloc_trim") and 2 * _resident_pages() > os.sysconf("SC_PHYS_PAGES"):
            self.libc.malloc_trim(0)


def _resident_pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


def folder_stamp(name: str | Path | None) -> list[list[Any]]:
    """What a local model folder holds, by name, size and time; nothing for hub names and the embedded models."""
    folder = Path(name) if name is not None else Path()
    if name is None or not folder.is_dir():
        return []
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(folder.iterdir()) if p.is_file()]


def _train_stage(recipe: Recipe, stage: _Stage, before: Parts) -> None:
    began = time.monotonic()
    set_seed(recipe.seed)
    system = before.open(recipe)
    objective_settings = stage.settings.objective
    if isinstance(objective_settings, AnswerSettings):
        objective, rows, held_out = _answer(recipe, stage, system, objective_settings)
    elif isinstance(objective_settings, LsrSettings):
        objective, rows, held_out = _lsr(recipe, stage, system, objective_settings)
    else:
        objective, rows, held_out = _marginal(recipe, stage, system, objective_settings)
    log.info("stage %s: %d rows, %d held out", stage.name, len(rows), len(held_out))
    trainer = _trainer(recipe, stage, objective, rows, held_out)
    checkpoint = _last_whole(stage.folder / "work")
    if checkpoint is not None:
        log.info("stage %s goes on from %s", stage.name, checkpoint.name)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    _keep(stage, system, objective, {"rows": len(rows), "steps": trainer.state.global_step})
    write_manifest(stage.result, KIND, {
        "stage": stage.name, "settings": stage.settings.model_dump(mode="json"), "recipe": recipe.name,
        "knowledge": system.retriever.base.version, "rows": len(rows), "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step, "seconds": round(time.monotonic() - began, 1),
    })  # fmt: skip
    shutil.rmtree(stage.folder / "work", ignore_errors=True)


def _answer(
    recipe: Recipe, stage: _Stage, system: RAG, settings: AnswerSettings
) -> tuple[Objective, Sequence[Any], Sequence[Any]]:
    data, corpus = stage.settings.data, system.retriever.base.corpus
    objective = AnswerObjective(system.generator, reduction=settings.reduction)
    examples = stage_examples(data, corpus, recipe.seed)
    if recipe.generator.lora is None:
        system.generator.model.float()  # full weights learn in float32, whatever they are served in
    rows = answer_rows(examples, data, system.retriever, system.generator, recipe.seed)
    held_out: Sequence[Any] = []
    if data.dev is not None:
        answered = [e for e in load_examples(data.dev, corpus, limit=500, seed=recipe.seed) if e.answers]
        held_out = answer_rows(answered, data, system.retriever, system.generator, recipe.seed)
    return objective, rows, held_out


def _lsr(recipe: Recipe, stage: _Stage, system: RAG, settings: LsrSettings) -> tuple[Objective, Sequence[Any], Sequence[Any]]:
    data = stage.settings.data
    assert isinstance(data, QuestionData)
    corpus = system.retriever.base.corpus
    examples = stage_examples(data, corpus, recipe.seed)
    rows = lsr_rows(examples, system, settings, recipe.run / "scores.jsonl")
    held_out: list[Example] = []
    if data.dev is not None:
        held_out = [e for e in load_examples(data.dev, corpus, limit=500, seed=recipe.seed) if e.relevant]
    return LsrObjective(system.retriever, settings), rows, held_out


def _marginal(
    recipe: Recipe, stage: _Stage, system: RAG, settings: MarginalSettings
) -> tuple[Objective, Sequence[Any], Sequence[Any]]:
    data, corpus = stage.settings.data, system.retriever.base.corpus
    assert isinstance(data, QuestionData)
    if recipe.generator.lora is None:
        system.generator.model.float()
    held_out: list[Example] = []
    if data.dev is not None:
        held_out = [e for e in load_examples(data.dev, corpus, limit=500, seed=recipe.seed) if e.answers]
    examples = stage_examples(data, corpus, recipe.seed)
    rows = [
        MarginalRow(example.query, answer)
        for example in examples
        for answer in (example.answers if data.answers == "each" else example.answers[:1])
    ]
    if not learns_to_retrieve(settings, system.retriever):
        if "query_encoder" in settings.learn:
            log.warning("the prior is BM25's, so the query encoder learns nothing in stage %s", stage.name)
        k = min(settings.k, len(corpus))
        _, found = system.retriever.search([row.query for row in rows], k)  # it stays as it is, so search once
        rows = [MarginalRow(row.query, row.answer, found[place]) for place, row in enumerate(rows)]
    objective = MarginalObjective(system.retriever, system.generator, settings)
    return objective, rows, [MarginalRow(example.query, example.answers[0]) for example in held_out]


def lsr_rows(examples: Sequence[Example], system: RAG, settings: LsrSettings, table: Path) -> list[LsrRow]:
    """Candidates by the starting retriever and their language-model scores, both made once, before the first step."""
    retriever, generator = system.retriever, system.generator
    base = retriever.base
    k = min(settings.k, len(base.corpus))
    searcher = retriever if settings.candidates is None else type(retriever)(
        base, retriever.encoder, index=settings.candidates
    )  # fmt: skip
    _, candidates = searcher.search([example.query for example in examples], k)
    scores = ScoreTable(table, generator, score_eos=settings.score_eos)
    pairs = [(n, c) for n in range(len(examples)) for c in range(k) if candidates[n, c] >= 0]
    prompts = [generator.prompt.render(examples[n].query, [base.corpus[int(candidates[n, c])]]) for n, c in pairs]
    values = scores.token_logprobs(prompts, [examples[n].answers[0] for n, _ in pairs])
    sums = np.zeros((len(examples), k), dtype=np.float32)
    lengths = np.ones(len(examples), dtype=np.int64)
    for (n, c), value in zip(pairs, values, strict=True):
        sums[n, c], lengths[n] = value.sum(), len(value)
    _warn_if_flat(sums, candidates, lengths, settings)
    return [
        LsrRow(example.query, candidates[n], sums[n], int(lengths[n]))
        for n, example in enumerate(examples)
        if (candidates[n] >= 0).sum() > 1
    ]


def _warn_if_flat(sums: np.ndarray, candidates: np.ndarray, lengths: np.ndarray, settings: LsrSettings) -> None:
    """A target that prefers no passage teaches only to flatten the retriever."""
    first = slice(0, 256)
    log_q = lsr_target(
        torch.from_numpy(sums[first]), target=settings.target, tau=settings.tau,
        answer_lengths=torch.from_numpy(lengths[first]), passage_mask=torch.from_numpy(candidates[first] >= 0),
    )  # fmt: skip
    flat = float((normalised_entropy(log_q) > 0.99).float().mean())
    if flat > 0.5:
        log.warning(
            "%.0f %% of the lsr targets are flat (target %s, tau %s): they teach nothing. Lower tau, or use mean_prob.",
            100 * flat, settings.target, settings.tau if settings.tau is not None else 0.01,
        )  # fmt: skip


def _keep(stage: _Stage, system: RAG, objective: Objective, figures: dict[str, Any]) -> None:
    settings = stage.settings.objective
    learned = settings.learn if settings.kind == "marginal" else (LEARNED[settings.kind],)
    if "query_encoder" in learned:
        folder = stage.result / "query_encoder"
        shutil.rmtree(folder, ignore_errors=True)
        gamma = objective.gamma if isinstance(objective, LsrObjective) else system.retriever.temperature
        system.retriever.encoder.save_query_tower(folder, gamma=gamma, **figures)
    if "generator" in learned:
        folder = stage.result / "generator"
        shutil.rmtree(folder, ignore_errors=True)
        system.generator.save(folder, **figures)


class _Rows(Dataset[Any]):
    def __init__(self, rows: Sequence[Any]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Any:
        return self.rows[place]


class _StageTrainer(Trainer):
    """The loss and the validation are the objective's; everything else is transformers'."""

    objective: Objective

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:  # fmt: skip
        self.objective.step = self.state.global_step
        loss, figures = self.objective.loss(inputs, module=model, items=num_items_in_batch)
        self._figures = {name: float(value) for name, value in figures.items()}
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # ranks are averaged, the division was by all their tokens
        elif self.args.gradient_accumulation_steps > 1 and self.objective.division == "mean":
            loss = loss / self.current_gradient_accumulation_steps
        return loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        metrics = {
            f"eval_{name}": value for name, value in self.objective.validate(cast(_Rows, self.eval_dataset).rows).items()
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The library's, its groups split by part where parts learn at rates of their own."""
        optimizer = super().create_optimizer(model)
        rates = getattr(getattr(self.objective, "settings", None), "rates", {})
        parts = {id(p): name for name, found in self.objective.parameters().items() for p in found if name in rates}
        groups = []
        for group in optimizer.param_groups:
            for name in (None, *rates):
                params = [p for p in group["params"] if parts.get(id(p)) == name]
                if params:
                    groups.append({**group, "params": params, "lr": rates.get(name, group["lr"])})
        optimizer.param_groups[:] = groups
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Tied weights once: safetensors refuses names that share their storage, and loading ties them again."""
        if state_dict is None and isinstance(self.objective, MarginalObjective):
            names: dict[int, str] = {}
            whole = cast(nn.Module, self.model).state_dict()
            for name, tensor in whole.items():
                names.setdefault(tensor.data_ptr(), name)
            state_dict = {name: whole[name] for name in names.values()}
        super()._save(output_dir, state_dict)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs = {**logs, **getattr(self, "_figures", {})}
        super().log(logs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        lengths = [len(row["input_ids"]) for row in cast(_Rows, self.train_dataset).rows]
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return _ByLength(lengths, batch, self.args.seed)


class _ByLength(Sampler[int]):
    """Rows of like length together, in an order that follows from seed and epoch alone.

    transformers' own sampler draws its order from the global generator, which a resumed run restores only afterwards: it
    then skips batches of another order, so that some rows are learned from twice and others not at all.
    """

    def __init__(self, lengths: list[int], batch: int, seed: int):
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch, generator=generator))


class _Curves(TrainerCallback):
    """Keeps the learning curves on disk while training runs."""

    def __init__(self, path: Path):
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            write_json(self.path, state.log_history)


def _trainer(
    recipe: Recipe, stage: _Stage, objective: Objective, rows: Sequence[Any], held_out: Sequence[Any]
) -> _StageTrainer:
    work = stage.folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    _learning(objective)
    trainer = _StageTrainer(
        model=objective.module, args=_arguments(recipe, stage, work, bool(held_out)), data_collator=objective.collate,
        train_dataset=_Rows(rows), eval_dataset=_Rows(held_out) if held_out else None,
    )  # fmt: skip
    trainer.objective = objective
    trainer.model_accepts_loss_kwargs = objective.division == "items"
    trainer.loss_is_scaled_for_ga = True
    trainer._loss_shifts_labels = False  # labels are the answer's own tokens, for causal models too: count them all
    trainer.add_callback(_Curves(stage.folder / "log.json"))
    trainer.add_callback(_KeepMemory())
    if not sys.stderr.isatty():
        trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _learning(objective: Objective) -> None:
    """Exactly the objective's parameters require a gradient."""
    wanted = [parameter for part in objective.parameters().values() for parameter in part]
    if not wanted:
        raise RecipeError("nothing learns: every parameter is frozen", hint="shorten generator.freeze")
    kept = {id(parameter) for parameter in wanted}
    for parameter in objective.module.parameters():
        parameter.requires_grad_(id(parameter) in kept)


def _arguments(recipe: Recipe, stage: _Stage, work: Path, validates: bool) -> TrainingArguments:
    given = stage.settings.train
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 32, "num_train_epochs": 3, "learning_rate": 2e-4, "warmup_steps": 0.05,
        "lr_scheduler_type": "linear", "weight_decay": 0.01, "logging_steps": 10, "save_steps": 100, "save_total_limit": 1,
        "bf16": bfloat16_is_faster() and recipe.generator.dtype in ("auto", "bfloat16"),
        "use_cpu": not torch.cuda.is_available(), "report_to": [], "seed": recipe.seed, "remove_unused_columns": False,
        "disable_tqdm": not sys.stderr.isatty(), "dataloader_pin_memory": torch.cuda.is_available(),
    }  # fmt: skip
    if stage.settings.objective.kind == "answer":
        defaults["train_sampling_strategy"] = "group_by_length"
    if validates and "eval_strategy" not in given:
        defaults |= {"eval_strategy": "steps", "eval_steps": given.get("save_steps", 100)}
    if given.get("load_best_model_at_end") and stage.settings.objective.kind == "lsr":
        defaults |= {"metric_for_best_model": "mrr@10", "greater_is_better": True}
    if not validates and given.get("eval_strategy", "no") != "no":
        raise RecipeError(f"stage {stage.name!r} wants evaluations but has no held-out questions", hint="give data.dev")
    try:
        return TrainingArguments(**{**defaults, **given, "output_dir": str(work)})
    except (TypeError, ValueError) as fault:
        raise RecipeError(f"stages.{stage.name}.train: {fault}", hint="fields are transformers.TrainingArguments'") from None


def _last_whole(work: Path) -> Path | None:
    """The newest checkpoint that was written to its end; half-written ones are removed.

    The trainer writes its state after weights, optimizer and generators, and removes the checkpoint before only then.
    """
    found = []
    for folder in work.glob("checkpoint-*"):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            found.append(folder)
        except (OSError, ValueError):
            shutil.rmtree(folder)
    return max(found, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)
