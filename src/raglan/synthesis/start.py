"""`raglan synthesize recipe.yaml`: opens what a run needs, by the recipe, and runs it.

    questions    people's questions in cells of the plan (`synthesis.questions`)
    offline      rules over the knowledge base (`synthesis.teacher: {kind: offline}`)

The knowledge base must be built; evidence comes from its indexes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from raglan.artifact import file_fingerprint
from raglan.dedupe import Embed
from raglan.encoder import Encoder
from raglan.errors import RecipeError
from raglan.knowledge import KnowledgeBase
from raglan.recipe import EncoderSettings, OfflineTeacher, Recipe
from raglan.records import Passage
from raglan.synthesis.evidence import Assembler
from raglan.synthesis.offline import CANNOT, Offline
from raglan.synthesis.plan import Plan, make_plan
from raglan.synthesis.questions import open_questions
from raglan.synthesis.run import Done, synthesize
from raglan.synthesis.writing import Teacher

__all__ = ["Opened", "open_teacher", "run"]


@dataclass(frozen=True)
class Opened:
    """A teacher with its plan, and what the evidence is told of it.

    Attributes:
        evidence, answers: of other questions, for noise and false values.
        ignores: factors that it does not heed.
        inputs: names of what else its texts follow from. sources: of its questions.
    """

    teacher: Teacher
    plan: Plan
    evidence: Sequence[Passage] = ()
    answers: Sequence[str] = ()
    ignores: Sequence[str] = ()
    inputs: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)


def run(recipe: Recipe) -> Done:
    """Write the dataset of `recipe.synthesis`; a finished one is left alone.

    Raises:
        RecipeError: no teacher, or one that cannot write what is asked for. CheckpointError: no knowledge base, or another
            dataset in the folder. CorpusError: a missing evaluation set, or too few passages.
    """
    if recipe.synthesis is not None and recipe.synthesis.teacher is None and recipe.synthesis.questions is None:
        raise RecipeError(
            "synthesis names no teacher, so a plan is all that can be made",
            hint="say so: --plan; or synthesis.teacher.kind=offline",
        )
    base = KnowledgeBase.open(recipe.knowledge.path)
    opened = open_teacher(recipe, base)
    asked = recipe.synthesis
    assert asked is not None
    assembler = Assembler.open(recipe, evidence=opened.evidence, answers=opened.answers)
    near = recipe.decontaminate.encoder if recipe.decontaminate is not None else None
    return synthesize(
        recipe, opened.teacher, assembler.show, plan=opened.plan, corpus=base.corpus, embed=_embed(asked.dedupe),
        embed_questions=_embed(near), corpus_at=_corpus_at, ignores=opened.ignores,
        inputs={"knowledge": base.version, **opened.inputs}, sources=opened.sources,
    )  # fmt: skip


def open_teacher(recipe: Recipe, base: KnowledgeBase) -> Opened:
    """Who writes, by the recipe. Raises RecipeError: nobody is named, or two are."""
    asked = recipe.synthesis
    if asked is None:
        raise RecipeError("the recipe has no `synthesis`", hint="see docs/concepts/synthesis.md for one")
    if asked.questions is not None and asked.teacher is not None:
        raise RecipeError("synthesis has both questions and a teacher", hint="make two datasets, and mix them when training")
    if asked.questions is not None:
        people = open_questions(recipe, base.corpus)
        inputs = {"questions": file_fingerprint(asked.questions)} if asked.questions.is_file() else {}
        sources = {asked.questions.name.partition(".")[0]: str(asked.questions)}
        return Opened(people, make_plan(recipe), people.evidence, people.answers, people.ignores, inputs, sources)
    if isinstance(asked.teacher, OfflineTeacher):
        plan = make_plan(recipe, cannot=CANNOT)
        rules = Offline(base.corpus, plan, overlap=asked.teacher.overlap)
        return Opened(rules, plan, rules.evidence, rules.answers, rules.ignores)
    raise RecipeError("synthesis names no teacher, so there is only a plan", hint="synthesis.teacher.kind=offline, or --plan")


def _corpus_at(path: Path) -> Any:
    return KnowledgeBase.open(path).corpus


def _embed(settings: EncoderSettings | None) -> Embed | None:
    """Texts → vectors of length 1."""
    if settings is None:
        return None
    encoder = Encoder.open(settings)

    def embed(texts: Sequence[str]) -> Any:
        vectors = encoder.embed_passages(list(texts))  # both sides are questions, so both go through one tower
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    return embed
