"""The stages of a recipe: which files each reads, where it is kept, and which are finished with the settings as they are now.

    runs/<name>/stages/<stage>-<fingerprint>/

A stage's fingerprint covers its settings and everything that goes into it (knowledge base, questions, the parts as they
come out of the stages before), so a changed setting trains anew and an unchanged one is not trained twice.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from raglan.artifact import MANIFEST, file_fingerprint, fingerprint, read_manifest
from raglan.errors import CheckpointError
from raglan.feedback import FeedbackStore
from raglan.knowledge import KnowledgeBase
from raglan.learned_prompt import other_prompt
from raglan.rag import RAG
from raglan.recipe import ClassifyDecode, FeedbackData, InstructionMix, Recipe, SelfRagData, ShownData, StageSettings
from raglan.recipe import LsrObjective as LsrSettings
from raglan.recipe import MarginalObjective as MarginalSettings

__all__ = [
    "KIND",
    "Parts",
    "Stage",
    "files_of",
    "finished_parts",
    "folder_stamp",
    "held_out_files",
    "learned_by",
    "learned_files",
    "learned_from",
    "learning_curves",
    "learns_classes",
    "stage_parts",
    "stages_of",
]

log = logging.getLogger(__name__)
KIND = "stage"
LEARNED = {"answer": "generator", "lsr": "query_encoder"}
# How a scorer is reached and how fast it goes changes no score; where a stage starts is told by the stages behind it.
NOT_LEARNED: Any = {"starts_from": True, "data": {"allow_test"}, "objective": {"scorer": {
    "endpoint", "api_key_env", "concurrency", "retries", "timeout", "batch_tokens", "head_chunk",
}}}  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """The tuned parts so far: folders, or None for the recipe's own."""

    generator: str | None = None
    query_encoder: Path | None = None
    passage_encoder: Path | None = None
    knowledge: Path | None = None
    prior: Path | None = None

    def open(self, recipe: Recipe, *, to: Literal["ask", "learn"] = "ask") -> RAG:
        return RAG.open(recipe, to=to, **{field.name: getattr(self, field.name) for field in fields(self)})


@dataclass(frozen=True)
class Stage:
    name: str
    settings: StageSettings
    folder: Path

    @property
    def result(self) -> Path:
        return self.folder / "result"

    @property
    def learned(self) -> set[str]:
        """What the result holds."""
        objective = self.settings.objective
        if isinstance(objective, LsrSettings) and objective.learn == "both":
            return {"query_encoder", "passage_encoder", "knowledge"}
        if not isinstance(objective, MarginalSettings):
            return {LEARNED[objective.kind]}
        tower = {"query_encoder", "knowledge"} if "passage_encoder" in objective.learn else set()
        return {*objective.learn, *tower}  # a query tower belongs to one passage tower, and so does an index

    def parts(self, before: Parts) -> Parts:
        new: dict[str, Any] = {name: self.result / name for name in self.learned}
        if "generator" in new:
            new["generator"] = str(new["generator"])
        return replace(before, **new)


def finished_parts(recipe: Recipe, *, warn: bool = True) -> list[tuple[str, Parts]]:
    """("untuned", …), then each finished stage's name with the parts as they stand after it and all that come before.

    `warn`: tell of a stage that was trained with other settings.
    """
    version = _trained_on(recipe)
    found = _finished(recipe, version)
    if version is not None:
        log.info("the parts were trained on version %s of the knowledge base", version)
        return found
    missing = [name for name in recipe.trainings() if name not in dict(found)]
    others = list((recipe.run / "stages").glob(f"{missing[0]}-*/result/{MANIFEST}")) if warn and missing else []
    if others:
        prompts = [other_prompt(path.parent / "generator", recipe.prompt) for path in others]
        log.warning(
            "stage %s is trained, but with other settings, documents or questions than the recipe's now%s; it is not used",
            missing[0], prompts[0] if all(prompts) else "",
        )  # fmt: skip
    return found


def stage_parts(recipe: Recipe, names: Sequence[str]) -> Parts:
    """What these stages learned, the later before the earlier where two learned the same, and nothing else.

    Raises:
        CheckpointError: one that is not finished with the recipe's settings, documents and questions as they are now.
    """
    parts = Parts()
    for stage, _ in stages_of(recipe):
        if stage.name not in names:
            continue
        if not (stage.result / MANIFEST).is_file():
            raise CheckpointError(
                f"stage {stage.name!r} is not trained with the recipe's settings, documents and questions as they are now: "
                f"{stage.result} holds no finished stage",
                hint="`raglan train` with the same recipe and overrides trains it, or goes on where it stopped",
            )
        read_manifest(stage.result, KIND)
        parts = stage.parts(parts)
    return parts


def learned_by(settings: StageSettings) -> set[str]:
    """The parts that a stage's result holds, by their names in `Parts`."""
    return Stage("", settings, Path()).learned


def learned_from(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The data settings that every finished stage was trained with, as its manifest says."""
    found = {}
    for stage, _ in stages_of(recipe, _trained_on(recipe)):
        if (stage.result / MANIFEST).is_file():
            found[stage.name] = read_manifest(stage.result, KIND)["settings"]["data"]
    return found


def learning_curves(recipe: Recipe) -> dict[str, list[dict[str, float]]]:
    """The trainer's log of every stage that has one, of the stages whose parts `finished_parts` gives."""
    curves = {}
    for stage, _ in stages_of(recipe, _trained_on(recipe)):
        if (stage.folder / "log.json").is_file():
            curves[stage.name] = json.loads((stage.folder / "log.json").read_text(encoding="utf-8"))
    return curves


def _trained_on(recipe: Recipe) -> str | None:
    """The version of the knowledge base that the stages were trained on; None: the current one, or none was finished.

    What a system knows may be changed without training it again.
    """
    if len(_finished(recipe)) > 1:
        return None
    for version in reversed(KnowledgeBase.versions(recipe.knowledge.path)):
        other = _finished(recipe, version)
        if any(parts.knowledge is not None for _, parts in other):
            return None  # its own knowledge base holds the documents of that version, and not those there are now
        if len(other) > 1:
            return version
    return None


def _finished(recipe: Recipe, version: str | None = None) -> list[tuple[str, Parts]]:
    found, parts = [("untuned", Parts())], Parts()
    done: set[str] = set()
    for stage, _ in stages_of(recipe, version):
        if (stage.result / MANIFEST).is_file() and done.issuperset(recipe.behind(stage.name)):
            done.add(stage.name)
            parts = stage.parts(parts)
            found.append((stage.name, parts))
    return found


def stages_of(recipe: Recipe, version: str | None = None) -> list[tuple[Stage, Parts]]:
    """Each stage with the parts that go into it; names of folders follow from everything that does.

    `version` of the knowledge base is the current one unless it is named.
    """
    ground: list[Any] = [version or KnowledgeBase.of(recipe.knowledge).searched, recipe.seed]
    shared = [
        recipe.prompt.model_dump(mode="json"),
        recipe.generator.model_dump(mode="json", exclude={"any_prompt", "attention", "batch_tokens", "head_chunk"}),
        recipe.retriever.model_dump(mode="json", exclude={"k"}), recipe.knowledge.encoder.model_dump(mode="json"),
        [folder_stamp(name) for name in (
            recipe.generator.model, recipe.retriever.query_encoder, recipe.retriever.rewrite.model,
            recipe.knowledge.encoder.query_model, *_adapter_folder(recipe), *recipe.knowledge.own_query_models,
        )],
    ]  # fmt: skip
    own: dict[str, list[Any]] = {}
    stages: dict[str, tuple[Stage, Parts]] = {}
    for name, settings in recipe.trainings().items():
        behind, parts = recipe.behind(name), Parts()
        for other in behind:
            parts = stages[other][0].parts(parts)
        files = files_of(settings.data)
        contents = [_content(path) for path in files]
        own[name] = [settings.model_dump(mode="json", exclude=NOT_LEARNED), shared, contents]
        scorer = getattr(settings.objective, "scorer", None)
        if scorer is not None:
            own[name].append(folder_stamp(scorer.model))
        if isinstance(settings.data, FeedbackData):
            own[name] += [_store_content(settings.data), [_content(path) for path in held_out_files(recipe, settings)]]
        if isinstance(recipe.decode, ClassifyDecode) and learns_classes(settings):
            own[name].append(recipe.decode.labels)
        if isinstance(settings.data, InstructionMix) and len(settings.data.dev) > 1:
            own[name].append([recipe.decode.model_dump(mode="json"), recipe.retriever.k])  # by which the best step is chosen
        made_of = [*ground, *(item for other in (*behind, name) for item in own[other])]
        stages[name] = Stage(name, settings, recipe.run / "stages" / f"{name}-{fingerprint(made_of)[:8]}"), parts
    return list(stages.values())


def _adapter_folder(recipe: Recipe) -> list[Path]:
    adapter = recipe.generator.adapter
    return [] if adapter is None else [Path(adapter.path) / (adapter.subfolder or "")]


def _content(path: Path) -> str:
    return file_fingerprint(path) if path.is_file() else str(path)


def _store_content(data: FeedbackData) -> str | None:
    if data.store is None:
        return None
    with FeedbackStore(data.store) as store:
        return store.fingerprint


def folder_stamp(name: str | Path | None) -> list[list[Any]]:
    """What a local model folder holds, by name, size and time; nothing for hub names and the embedded models."""
    folder = Path(name) if name is not None else Path()
    if name is None or not folder.is_dir():
        return []
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(folder.iterdir()) if p.is_file()]


def files_of(data: Any) -> list[Path]:
    """The files that a stage's data are read from."""
    if isinstance(data, InstructionMix):
        paths = [*(source.path for source in data.sources.values()), *(task.path for task in data.dev.values())]
        return [path for path in paths if path is not None]
    keys = ("path", "kiqa", "synthetic", "dev", "replay")
    named = [path for key in keys if (path := getattr(data, key, None)) is not None]
    return [*named, *getattr(data, "exclude_documents_of", ())]


def held_out_files(recipe: Recipe, stage: StageSettings) -> list[Path]:
    """Files of questions that are measured, or named by the stage as not to be learned; those that are there yet."""
    measured = [recipe.evaluate.questions] if recipe.evaluate is not None else []
    measured += [task.questions for task in recipe.grid.tasks.values()] if recipe.grid is not None else []
    data = stage.data
    written = isinstance(data, SelfRagData | ShownData)  # held-out rows, and no file of questions that are measured
    asked = data.dev is not None and not written
    dev = [task.path for task in data.dev.values()] if isinstance(data, InstructionMix) else [data.dev] if asked else []
    files = [*measured, *dev, *(data.exclude if isinstance(data, FeedbackData) else ())]
    return [path for path in dict.fromkeys(files) if path.exists()]


def learned_files(data: Any) -> list[Path]:
    """Files of questions that a stage learns from, beside feedback, which is checked as it is read."""
    if isinstance(data, InstructionMix):
        return [source.path for source in data.sources.values() if source.path is not None and source.context != "none"]
    if isinstance(data, ShownData):
        return [data.files[name] for name in data.sources]
    path = data.replay if isinstance(data, FeedbackData) else getattr(data, "path", None)
    return [path] if path is not None else []


def learns_classes(settings: StageSettings) -> bool:
    return settings.data.kind != "lessons" and getattr(settings.objective, "tokens", "all") == "first"
