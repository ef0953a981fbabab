"""What raglan changes of `transformers.Trainer`: whose loss it is, in which order rows come, what is kept, and when it stops.

Everything else (precision, schedules, accumulation, clipping, resumption, keeping the best step) is the library's, under its
own names.
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

from raglan.artifact import write_json
from raglan.encoder import bfloat16_is_faster
from raglan.errors import CheckpointError, RecipeError
from raglan.memory import give_back, keep_freed
from raglan.mixture import DEV_MEAN
from raglan.objective import MarginalObjective, Objective
from raglan.objective.collapse import CollapseMonitor
from raglan.objective.lsr import CandidateRefresh, LsrObjective
from raglan.objective.staleness import Refresher
from raglan.quiet import without_bars
from raglan.recipe import InstructionMix, Recipe, StageSettings

__all__ = ["Interrupt", "Refreshing", "Researching", "StageTrainer", "last_whole", "restore", "stage_trainer"]

log = logging.getLogger(__name__)
INDEX_STATE = "index.json"  # in a checkpoint: which index it was made with
CANDIDATES = "candidates.npz"  # and which candidates, where they are searched for anew
MONITOR_STATE = "monitor.json"  # and what retrieval was like when the run began


def stage_trainer(
    recipe: Recipe, settings: StageSettings, folder: Path, objective: Objective, rows: Sequence[Any], held_out: Sequence[Any],
) -> StageTrainer:  # fmt: skip
    """transformers' trainer for one stage, which works in `folder`.

    Raises:
        RecipeError: nothing learns, or training arguments that transformers refuses.
    """
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    _learning(objective)
    trainer = StageTrainer(
        model=objective.module, args=_arguments(recipe, settings, work, bool(held_out)), data_collator=objective.collate,
        train_dataset=_Rows(rows), eval_dataset=_Rows(held_out) if held_out else None,
    )  # fmt: skip
    if trainer.args.n_gpu > 1:
        raise RecipeError(
            f"one process cannot train on {trainer.args.n_gpu} GPUs",
            hint="torchrun --nproc-per-node N -m raglan train recipe.yaml, or CUDA_VISIBLE_DEVICES=0",
        )
    trainer.objective = objective
    objective.autocast = trainer.accelerator.autocast
    trainer.model_accepts_loss_kwargs = False  # the objective counts what it is divided by
    trainer.loss_is_scaled_for_ga = True
    patience = getattr(settings.objective, "patience", None)
    if patience is not None:
        if not trainer.args.load_best_model_at_end:
            raise RecipeError(
                "objective.patience waits for a better evaluation, and none is kept",
                hint="give data.dev, and save_steps a multiple of eval_steps",
            )
        trainer.add_callback(EarlyStoppingCallback(patience))
    trainer.add_callback(_Curves(folder / "log.json"))
    trainer.add_callback(_KeepMemory())
    if not sys.stderr.isatty():
        trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def last_whole(work: Path) -> Path | None:
    """The newest checkpoint that was written to its end; half-written ones are removed.

    The trainer writes its state after weights, optimizer and generators, and removes the checkpoint before only then.
    """
    found = []
    for folder in work.glob("checkpoint-*"):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            found.append(folder)
        except (OSError, ValueError):
            shutil.rmtree(folder, ignore_errors=True)  # another rank may be at it
    return max(found, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def restore(objective: Objective, checkpoint: Path) -> None:
    """Bring back what an objective remembers beside its weights: the index it searched, the candidates it found, and the
    monitor's first window. A checkpoint without the last is gone on from all the same.

    Raises:
        CheckpointError: that index is gone, or the checkpoint does not tell which index or candidates it was made with.
    """
    for name, part in _memory(objective).items():
        path = checkpoint / name
        if isinstance(part, CollapseMonitor) and not path.is_file():
            log.info("%s has no %s: retrieval is compared with a first window of its own", checkpoint.name, name)
        elif not path.is_file():
            raise CheckpointError(
                f"{checkpoint} has no {name}", hint=f"remove {checkpoint.parent} and train the stage from its start"
            )
        elif isinstance(part, CandidateRefresh):
            part.restore(path)
        else:
            part.restore(json.loads(path.read_text(encoding="utf-8")))


def _memory(objective: Objective) -> dict[str, Refresher | CollapseMonitor | CandidateRefresh]:
    """What goes into a checkpoint beside the library's own files. Of several ranks the first writes, and all go on with it."""
    kept: dict[str, Refresher | CollapseMonitor | CandidateRefresh] = {}
    if isinstance(objective, MarginalObjective):
        kept[MONITOR_STATE] = objective.monitor
    if isinstance(objective, MarginalObjective | LsrObjective) and objective.refresher is not None:
        kept[INDEX_STATE] = objective.refresher
    if isinstance(objective, LsrObjective) and objective.research is not None:
        kept[CANDIDATES] = objective.research
    return kept


class StageTrainer(Trainer):
    """The loss and the validation are the objective's; everything else is transformers'."""

    objective: Objective

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:  # fmt: skip
        items = num_items_in_batch if self.objective.division == "items" else None
        loss, figures = self.objective.loss(inputs, module=model, items=items)
        self._figures = {name: float(value) for name, value in figures.items()}
        if self.objective.division == "mean" and num_items_in_batch is not None:
            loss = loss * (self.objective.items(inputs) / max(int(num_items_in_batch), 1))
        return loss * self.accelerator.num_processes  # ranks are averaged, and their shares are of the sum over all

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The parts of an accumulated batch, and how many items the objective counts in them, on all ranks together."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        items = torch.tensor(sum(self.objective.items(batch) for batch in batches), device=device)
        return batches, self.accelerator.gather(items).sum()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Told the step before the library puts the module into training: what begins to learn has dropout from then on."""
        self.objective.step = self.state.global_step
        return super().training_step(model, inputs, num_items_in_batch)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        metrics = {
            f"eval_{name}": value for name, value in self.objective.validate(cast(_Rows, self.eval_dataset).rows).items()
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The library's, its groups split by part where parts learn at rates of their own.

        The prior's τ and λ are logarithms: weight decay would pull them to 1, so they have none.
        """
        optimizer = super().create_optimizer(model)
        rates = getattr(getattr(self.objective, "settings", None), "rates", {})
        apart = {*rates, "prior"}
        parts = {id(p): name for name, found in self.objective.parameters().items() for p in found if name in apart}
        groups = []
        for group in optimizer.param_groups:
            for name in (None, *sorted(apart)):
                params = [p for p in group["params"] if parts.get(id(p)) == name]
                own = {"lr": rates.get(name, group["lr"])} | ({"weight_decay": 0.0} if name == "prior" else {})
                if params:
                    groups.append({**group, "params": params, **own})
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
        with without_bars():
            super()._save(output_dir, state_dict)
        kept = _memory(self.objective) if self.args.should_save else {}  # ranks share the folder
        for name, part in kept.items():
            path = Path(str(output_dir or self.args.output_dir)) / name
            if isinstance(part, CandidateRefresh):
                part.save(path)
            else:
                write_json(path, part.state())

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


class Interrupt(TrainerCallback):
    """Ctrl-C finishes the step, saves it and then stops; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._usual: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            self._usual = signal.signal(signal.SIGINT, self._ask)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._usual is not None:
            signal.signal(signal.SIGINT, self._usual)

    def _ask(self, *_: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self._usual)
        log.warning("interrupted: this step is finished and saved first; press Ctrl-C again to stop at once")


class Refreshing(TrainerCallback):
    """Takes up new indexes at a step's end, on all ranks at the same step."""

    def __init__(self, refresher: Refresher):
        self.refresher = refresher

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        ready = [self.refresher.at(state.global_step) if state.is_world_process_zero else None]
        (version,) = broadcast_object_list(ready)
        if version is not None:
            self.refresher.take(version)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.refresher.prune()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.refresher.close()


class Researching(TrainerCallback):
    """Searches for candidates anew at a step's end."""

    def __init__(self, research: CandidateRefresh):
        self.research = research

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.research.at(state.global_step)


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


class _KeepMemory(TrainerCallback):
    """See `raglan.memory`."""

    def __init__(self) -> None:
        keep_freed()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        give_back()


class _Rows(Dataset[Any]):
    def __init__(self, rows: Sequence[Any]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Any:
        return self.rows[place]


def _learning(objective: Objective) -> None:
    """Exactly the objective's parameters require a gradient."""
    wanted = [parameter for part in objective.parameters().values() for parameter in part]
    if not wanted:
        raise RecipeError("nothing learns: every parameter is frozen", hint="shorten generator.freeze")
    kept = {id(parameter) for parameter in wanted}
    for parameter in objective.module.parameters():
        parameter.requires_grad_(id(parameter) in kept)


def _arguments(recipe: Recipe, settings: StageSettings, work: Path, validates: bool) -> TrainingArguments:
    given = settings.train
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 32, "num_train_epochs": 3, "learning_rate": 2e-4, "warmup_steps": 0.05,
        "lr_scheduler_type": "linear", "weight_decay": 0.01, "logging_steps": 10, "save_steps": 100, "save_total_limit": 1,
        "bf16": bfloat16_is_faster() and recipe.generator.dtype in ("auto", "bfloat16"),
        "use_cpu": not torch.cuda.is_available(), "report_to": [], "seed": recipe.seed, "remove_unused_columns": False,
        "disable_tqdm": not sys.stderr.isatty(), "dataloader_pin_memory": torch.cuda.is_available(),
    }  # fmt: skip
    if settings.objective.kind == "answer":
        defaults["train_sampling_strategy"] = "group_by_length"
    if validates and "eval_strategy" not in given:
        defaults |= {"eval_strategy": "steps", "eval_steps": given.get("save_steps", 100)}
    if settings.objective.kind == "lsr" and validates:
        defaults |= _keeps_best(given)
    if settings.data.kind == "instruction_mix" and validates and given.get("eval_strategy") != "no":
        defaults |= _best_step(settings.data, given)
    if not validates and given.get("eval_strategy", "no") != "no":
        raise RecipeError(f"stage {_name(work)!r} wants evaluations but has no held-out questions", hint="give data.dev")
    try:
        return TrainingArguments(**{**defaults, **given, "output_dir": str(work)})
    except (TypeError, ValueError) as fault:
        raise RecipeError(f"stages.{_name(work)}.train: {fault}", hint="fields are transformers.TrainingArguments'") from None


def _keeps_best(given: Mapping[str, Any]) -> dict[str, Any]:
    """The step with the best validation search is kept, unless it is said otherwise or steps are not saved then."""
    every = given.get("eval_steps", given.get("save_steps", 100))
    keeps = given.get("eval_strategy", "steps") == given.get("save_strategy", "steps") != "no"
    keeps = keeps and given.get("save_steps", every) % every == 0
    if not given.get("load_best_model_at_end", keeps):
        return {}
    return {
        "eval_steps": every, "save_steps": every, "load_best_model_at_end": True,
        "metric_for_best_model": "mrr@10", "greater_is_better": True,
    }  # fmt: skip


def _best_step(data: InstructionMix, given: dict[str, Any]) -> dict[str, Any]:
    """The best step is kept: by the mean of the dev tasks' metrics, or by the loss of the one task there is."""
    every = given.get("save_steps", given.get("eval_steps", 100))
    best = {"metric_for_best_model": DEV_MEAN, "greater_is_better": True} if len(data.dev) > 1 else {}
    best |= {"save_strategy": given["eval_strategy"]} if "eval_strategy" in given else {}
    return {"load_best_model_at_end": True, "save_steps": every, "eval_steps": every, **best}


def _name(work: Path) -> str:
    """The stage's name, from its folder <name>-<fingerprint>/work."""
    return work.parent.name.rpartition("-")[0]
