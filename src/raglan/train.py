"""Training: a recipe's stages in order, each on `transformers.Trainer`, each finished, resumed or found done.

    runs/<name>/stages/<stage>-<fingerprint>/
        work/         the trainer's checkpoints; a rerun goes on from the last whole one
        log.json      learning curves
        data/         the rows of an `answer` stage, readable (`raglan.datapoints`), if it does not learn whole files of rows
        misfits.jsonl   rows of an instruction mix that do not fit
        result/       what learned: generator/, query_encoder/, passage_encoder/ with its knowledge/, prior/;
                    and manifest.json, written last
    runs/<name>/scores/   language-model scores (lsr), shared by all settings that do not change them

Which stages there are, what their fingerprints cover and which are finished is in `raglan.stages`.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import set_seed

from raglan.artifact import MANIFEST, read_manifest, write_json, write_manifest
from raglan.candidates import lsr_examples, lsr_plan, lsr_rows
from raglan.data import answer_rows, class_texts, learned_answers, load_examples, stage_examples
from raglan.datapoints import points_figures
from raglan.dialogue import turn_texts
from raglan.documents import read_examples
from raglan.errors import RecipeError
from raglan.feedback.store import without_password
from raglan.generator import HFGenerator
from raglan.knowledge import reencoded
from raglan.learned_prompt import prompt_record
from raglan.marked_rows import asked_in, marked_rows
from raglan.mixture import mix, prompts_of
from raglan.objective import (
    AnswerObjective,
    LsrObjective,
    MarginalObjective,
    MarginalRow,
    Objective,
    TurnObjective,
    learns_to_retrieve,
)
from raglan.objective.staleness import Refresher, StaleRetriever
from raglan.preference import judged
from raglan.prompt import Prompt
from raglan.rag import PRIOR, RAG
from raglan.recipe import AnswerObjective as AnswerSettings
from raglan.recipe import (
    ClassifyDecode,
    FeedbackData,
    InstructionMix,
    LsrMixData,
    QuestionData,
    Recipe,
    SelfRagData,
    ShownData,
)
from raglan.recipe import LsrObjective as LsrSettings
from raglan.recipe import MarginalObjective as MarginalSettings
from raglan.records import Example
from raglan.scores import Plan
from raglan.shown import shown_rows
from raglan.splits import check_leaks
from raglan.stages import (
    KIND,
    Parts,
    Stage,
    held_out_files,
    learned_files,
    learns_classes,
    stages_of,
)
from raglan.trainer import Interrupt, Refreshing, Researching, StageTrainer, last_whole, restore, stage_trainer
from raglan.weights import read_json

__all__ = ["dry_run", "train"]

log = logging.getLogger(__name__)
ROWS = "rows.json"  # what became of the rows of `data.kind: self_rag` and `shown`


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
    wanted = trainings if only is None else [*recipe.behind(only), only]
    parts = Parts()
    for stage, before in stages_of(recipe):
        if stage.name not in wanted:
            continue
        if (stage.result / MANIFEST).is_file():
            read_manifest(stage.result, KIND)
            log.info("stage %s is done: %s", stage.name, stage.result)
        elif only is None or stage.name == only:
            _check_leaks(recipe, stage)
            _train_stage(recipe, stage, before)
        else:
            raise RecipeError(f"stage {stage.name!r} comes before {only!r} and is not done", hint=f"--stage {stage.name}")
        parts = stage.parts(parts)
    return parts


def dry_run(recipe: Recipe) -> dict[str, Plan | str]:
    """What each stage would ask of the language model before its first step; or, in a word, why nothing is known of it.

    Models are loaded, since their weights name the scores; nothing is scored, written or trained.

    Raises:
        RecipeError: the recipe trains nothing.
    """
    if not recipe.trainings():
        raise RecipeError(f"recipe {recipe.name!r} trains nothing", hint="give it `objective` and `data`, or `stages`")
    told: dict[str, Plan | str] = {}
    for stage, before in stages_of(recipe):
        objective = stage.settings.objective
        waits = next((name for name in recipe.behind(stage.name) if told[name] != "done"), None)
        if (stage.result / MANIFEST).is_file():
            told[stage.name] = "done"
        elif not isinstance(objective, LsrSettings):
            told[stage.name] = "scores nothing"
        elif waits:
            told[stage.name] = f"not known before stage {waits} is done"
        else:
            system = before.open(recipe, to="learn")
            examples = _lsr_examples(recipe, stage, system, objective)
            told[stage.name] = lsr_plan(
                examples, system, objective, recipe.run / "scores", held_out=_lsr_held_out(recipe, stage, system)
            )
    return told


def _held_out(recipe: Recipe, stage: Stage) -> list[Example]:
    """What feedback must not bring into training; questions files are checked instead, and refused."""
    if not isinstance(stage.settings.data, FeedbackData):
        return []
    return [example for path in held_out_files(recipe, stage.settings) for example in read_examples(path)]


def _check_leaks(recipe: Recipe, stage: Stage) -> None:
    """Raises CorpusError where the stage would learn questions that are measured."""
    if recipe.leak_check == "none":
        return
    measured = {path: read_examples(path) for path in held_out_files(recipe, stage.settings)}
    for path in learned_files(stage.settings.data) if measured else ():
        learned = asked_in(path) if isinstance(stage.settings.data, SelfRagData) else read_examples(path, split="train")
        for held, examples in measured.items():
            check_leaks(learned, examples, level=recipe.leak_check, names=(str(path), str(held)))


def _train_stage(recipe: Recipe, stage: Stage, before: Parts) -> None:
    began = time.monotonic()
    set_seed(recipe.seed)
    system = before.open(recipe, to="learn")
    objective_settings = stage.settings.objective
    if isinstance(objective_settings, AnswerSettings):
        objective, rows, held_out = _answer(recipe, stage, system, objective_settings)
    elif isinstance(objective_settings, LsrSettings):
        objective, rows, held_out = _lsr(recipe, stage, system, objective_settings)
    else:
        objective, rows, held_out = _marginal(recipe, stage, system, objective_settings)
    _warn_if_tokens_differ(recipe, stage)
    log.info("stage %s: %d rows, %d held out", stage.name, len(rows), len(held_out))
    trainer = stage_trainer(recipe, stage.settings, stage.folder, objective, rows, held_out)
    checkpoint = last_whole(stage.folder / "work")
    if isinstance(objective, MarginalObjective | LsrObjective) and objective.refresher is not None:
        trainer.add_callback(Refreshing(objective.refresher))
    if isinstance(objective, LsrObjective) and objective.research is not None:
        trainer.add_callback(Researching(objective.research))
    if checkpoint is not None:
        restore(objective, checkpoint)
        log.info("stage %s goes on from %s", stage.name, checkpoint.name)
    interrupt = Interrupt()
    trainer.add_callback(interrupt)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if interrupt.asked:
        raise KeyboardInterrupt
    if trainer.is_world_process_zero():
        _finish(stage, recipe, system, objective, trainer, len(rows), began)
    trainer.accelerator.wait_for_everyone()


def _finish(
    stage: Stage, recipe: Recipe, system: RAG, objective: Objective, trainer: StageTrainer, rows: int, began: float
) -> None:
    """Keep what was learned, then say that the stage is done, then drop the checkpoints."""
    _keep(stage, system, objective, {"rows": rows, "steps": trainer.state.global_step})
    bound = {"objective": getattr(objective, "settings", stage.settings.objective)}  # with what was left to defaults
    settings = stage.settings.model_copy(update=bound).model_dump(mode="json")
    if isinstance(stage.settings.data, FeedbackData) and stage.settings.data.store is not None:
        settings["data"]["store"] = without_password(stage.settings.data.store)
    write_manifest(stage.result, KIND, {
        "stage": stage.name, "settings": settings, "recipe": recipe.name,
        "knowledge": system.retriever.base.version, "rows": rows, "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step, "seconds": round(time.monotonic() - began, 1),
        **({"data": points_figures(stage.folder / "data")} if (stage.folder / "data").is_dir() else {}),
        **({"data": read_json(stage.folder / ROWS)} if (stage.folder / ROWS).is_file() else {}),
    })  # fmt: skip
    shutil.rmtree(stage.folder / "work", ignore_errors=True)


def _answer(
    recipe: Recipe, stage: Stage, system: RAG, settings: AnswerSettings
) -> tuple[Objective, Sequence[Any], Sequence[Any]]:
    data, corpus = stage.settings.data, system.retriever.base.corpus
    if isinstance(data, InstructionMix):
        return _mixed(recipe, stage, system, settings, data)
    if isinstance(data, SelfRagData):
        return _marked(recipe, stage, system, settings, data)
    if isinstance(data, ShownData):
        return _shown(recipe, stage, system, settings, data)
    assert not isinstance(data, LsrMixData)
    if recipe.generator.lora is None:
        system.generator.model.float()  # full weights learn in float32, whatever they are served in
    objective = AnswerObjective(
        system.generator, reduction=settings.reduction, tokens=settings.tokens, hold=settings.hold, hold_rows=settings.hold_rows
    )
    examples = _to_learn(recipe, stage, system, stage_examples(data, corpus, recipe.seed, held_out=_held_out(recipe, stage)))
    rows = answer_rows(examples, data, system.retriever, system.generator, recipe.seed, keep=stage.folder / "data")
    held_out: Sequence[Any] = []
    if data.dev is not None:
        answered = [e for e in load_examples(data.dev, corpus, limit=500, seed=recipe.seed) if e.answers]
        held_out = answer_rows(
            _to_learn(recipe, stage, system, answered), data, system.retriever, system.generator, recipe.seed
        )
    return objective, rows, held_out


def _mixed(
    recipe: Recipe, stage: Stage, system: RAG, settings: AnswerSettings, data: InstructionMix
) -> tuple[Objective, Sequence[Any], Sequence[Any]]:
    if recipe.generator.lora is None:
        system.generator.model.float()
    mixture = mix(data, system, seed=recipe.seed, folder=stage.folder)
    objective = AnswerObjective(system.generator, reduction=settings.reduction, measure=mixture.measure, hold=settings.hold)
    return objective, mixture.rows, mixture.held_out


def _marked(
    recipe: Recipe, stage: Stage, system: RAG, settings: AnswerSettings, data: SelfRagData
) -> tuple[Objective, Sequence[Any], Sequence[Any]]:
    if recipe.generator.lora is None:
        system.generator.model.float()
    made = marked_rows(data, system.generator, seed=recipe.seed)
    stage.folder.mkdir(parents=True, exist_ok=True)
    write_json(stage.folder / ROWS, made.figures)
    objective = AnswerObjective(
        system.generator, reduction=settings.reduction, group_weights=settings.group_weights,
        off_grammar=settings.off_grammar, repeats=settings.repeats, hold=settings.hold,
    )  # fmt: skip
    return objective, made.rows, made.held_out


def _shown(
    recipe: Recipe, stage: Stage, system: RAG, settings: AnswerSettings, data: ShownData
) -> tuple[Objective, Sequence[Any], Sequence[Any]]:
    if recipe.generator.lora is None:
        system.generator.model.float()
    made = shown_rows(data, system.generator, seed=recipe.seed)
    stage.folder.mkdir(parents=True, exist_ok=True)
    write_json(stage.folder / ROWS, made.figures)
    return AnswerObjective(system.generator, reduction=settings.reduction, hold=settings.hold), made.rows, made.held_out


def _lsr(recipe: Recipe, stage: Stage, system: RAG, settings: LsrSettings) -> tuple[Objective, Sequence[Any], Sequence[Any]]:
    table = recipe.run / "scores"
    if settings.refresh != "never" and stage.settings.train.get("dataloader_num_workers", 0):
        raise RecipeError(
            f"stages.{stage.name}: objective.refresh changes rows that dataloader workers hold copies of",
            hint="train.dataloader_num_workers: 0, or refresh: never",
        )
    examples = _lsr_examples(recipe, stage, system, settings)
    held_out = judged(_lsr_held_out(recipe, stage, system), system, settings, table)
    if settings.learn == "both":
        system.retriever = StaleRetriever.of(system.retriever, over_retrieve=settings.over_retrieve)
    objective = LsrObjective(system.retriever, settings)
    rows = lsr_rows(examples, system, objective.settings, table)
    objective.look(rows)
    objective.prepare(rows, lambda: lsr_rows(examples, system, objective.settings, table), stage.folder / "work" / "knowledge")
    return objective, rows, held_out


def _lsr_held_out(recipe: Recipe, stage: Stage, system: RAG) -> list[Example]:
    dev = _lsr_data(stage).dev
    return [] if dev is None else load_examples(dev, system.retriever.base.corpus, limit=500, seed=recipe.seed)


def _lsr_examples(recipe: Recipe, stage: Stage, system: RAG, settings: LsrSettings) -> list[Example]:
    data = _lsr_data(stage)
    graded = settings.target == "given" and settings.evidence == "alone"  # people's judgements need no answer beside them
    if not isinstance(data, FeedbackData):
        return lsr_examples(data, system, recipe.seed, every=settings.answers == "any", graded=graded)
    needs, held_out = "passages" if graded else "answers", _held_out(recipe, stage)
    return stage_examples(data, system.retriever.base.corpus, recipe.seed, held_out=held_out, needs=needs)


def _lsr_data(stage: Stage) -> QuestionData | LsrMixData | FeedbackData:
    assert isinstance(stage.settings.data, QuestionData | LsrMixData | FeedbackData)
    return stage.settings.data


def _marginal(
    recipe: Recipe, stage: Stage, system: RAG, settings: MarginalSettings
) -> tuple[Objective, Sequence[Any], Sequence[Any]]:
    data, corpus = stage.settings.data, system.retriever.base.corpus
    assert isinstance(data, QuestionData)
    if recipe.generator.lora is None:
        system.generator.model.float()
    held_out: Sequence[Example] = []
    if data.dev is not None:
        answered = [e for e in load_examples(data.dev, corpus, limit=500, seed=recipe.seed) if e.answers]
        held_out = _to_learn(recipe, stage, system, answered)
    examples = _to_learn(recipe, stage, system, stage_examples(data, corpus, recipe.seed, held_out=_held_out(recipe, stage)))
    rows = marginal_rows(examples, system, settings)
    check_rows(rows, system.generator)
    if settings.on_empty == "skip" and not system.retriever.index.needs_vectors:
        rows = _with_hits(rows, system, stage.name)
    if not learns_to_retrieve(settings, system.retriever):
        if {"query_encoder", "passage_encoder"} & set(settings.learn):
            log.warning("the prior is BM25's, so no encoder learns anything in stage %s", stage.name)
        k = min(settings.k, len(corpus))
        _, found = system.retriever.search([text for row in rows for text in row.searched], k)  # it stays, so search once
        ends = np.cumsum([len(row.searched) for row in rows])[:-1]
        rows = [replace(row, candidates=own) for row, own in zip(rows, np.split(found, ends), strict=True)]
    kind = MarginalObjective if settings.turns is None else TurnObjective
    objective = kind(system.retriever, system.generator, settings)
    if settings.staleness is not None and settings.staleness.kind == "refresh":
        objective.refresher = Refresher(system.retriever, settings.staleness, stage.folder / "work" / "knowledge")
    return objective, rows, marginal_rows(held_out, system, settings)


def check_rows(rows: Sequence[MarginalRow], generator: HFGenerator) -> None:
    """Faults of questions and answers are told before the first step, and not at the step that meets them.

    Raises:
        RecipeError: a question that does not fit into the prompt. GeneratorError: an answer without a token, or too long.
    """
    for row in rows:
        generator.row(generator.prompt.render(row.query, [], history=row.history), row.answer)


def _with_hits(rows: list[MarginalRow], system: RAG, stage: str) -> list[MarginalRow]:
    """The rows whose questions find a passage: what is left out is in no sum and in no denominator."""
    texts = list(dict.fromkeys(text for row in rows for text in row.searched))
    _, rows_found = system.retriever.search(texts, 1)
    found = dict(zip(texts, rows_found[:, 0] >= 0, strict=True))
    kept = [row for row in rows if any(found[text] for text in row.searched)]
    if len(kept) < len(rows):
        log.warning("%d of %d rows find no passage and are left out of stage %s", len(rows) - len(kept), len(rows), stage)
    return kept


def marginal_rows(examples: Sequence[Example], system: RAG, settings: MarginalSettings) -> list[MarginalRow]:
    """A row for each answer of each example, with what its turns search for."""
    queries, history = [example.query for example in examples], [example.history for example in examples]
    count = 1 if settings.turns is None else settings.turns.count
    texts = turn_texts(system.retriever, queries, history, count)
    return [
        MarginalRow(example.query, answer, None, example.history, own)
        for example, own in zip(examples, texts, strict=True)
        for answer in example.answers
    ]


def _to_learn(recipe: Recipe, stage: Stage, system: RAG, examples: Sequence[Example]) -> list[Example]:
    """The examples with the answers the generator is to write: a class's text for its name, where it learns classes."""
    if isinstance(recipe.decode, ClassifyDecode) and learns_classes(stage.settings):
        examples = class_texts(examples, recipe.decode)
    data = stage.settings.data
    assert not isinstance(data, LsrMixData | SelfRagData | ShownData)
    return learned_answers(examples, data, system.retriever, recipe.seed)


def _warn_if_tokens_differ(recipe: Recipe, stage: Stage) -> None:
    """The decoding scores what the stage did not learn, or the other way round."""
    first = getattr(stage.settings.objective, "tokens", None)
    if first == "all" and recipe.decode.kind == "classify" and stage.settings.data.kind == "questions":
        log.warning("decode scores a class's first token, stage %s learns whole answers: objective.tokens: first", stage.name)
    if first == "first" and recipe.decode.kind != "classify":
        log.warning("stage %s learns first tokens, and nothing of how an answer ends: decode.kind: classify", stage.name)


def _keep(stage: Stage, system: RAG, objective: Objective, figures: dict[str, Any]) -> None:
    learned, retriever = stage.learned, system.retriever
    for name in learned:
        shutil.rmtree(stage.result / name, ignore_errors=True)
    encoder = retriever.encoder
    if "passage_encoder" in learned:
        towers = {"model": stage.result / "passage_encoder", "query_model": stage.result / "query_encoder"}
        encoder = encoder.snapshot(**{name: str(folder.absolute()) for name, folder in towers.items()})
        encoder.save_passage_tower(stage.result / "passage_encoder")
        reencoded(retriever.base, encoder, stage.result / "knowledge")
    if "query_encoder" in learned:
        gamma = objective.gamma if isinstance(objective, LsrObjective) else retriever.temperature
        encoder.save_query_tower(stage.result / "query_encoder", gamma=gamma, **figures)
    if "prior" in learned:
        (stage.result / "prior").mkdir(parents=True)
        write_manifest(stage.result / "prior", PRIOR, {"values": retriever.weights.values()})
    if "generator" in learned:
        system.generator.save(stage.result / "generator", **figures, prompt=_prompts(stage, system.generator.prompt))


def _prompts(stage: Stage, own: Prompt) -> dict[str, Any] | None:
    """What the manifest says of the rows' prompts; nothing where they are Self-RAG's."""
    data = stage.settings.data
    if isinstance(data, SelfRagData):
        return None
    if isinstance(data, ShownData) and data.prompt == "own":
        return prompt_record([])
    return prompt_record(list(prompts_of(data, own).values()) if isinstance(data, InstructionMix) else [own])
