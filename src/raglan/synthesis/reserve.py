"""The reserved set: examples of topics and tasks that no training example has, made before the others and kept apart from them.

    part "task"     reserved tasks, the training's topics       one thing is new at a time, so that what is lost can be named;
    part "topic"    reserved topics, the training's tasks       `reserve.n` is shared evenly between the parts that there are

It is a dataset of its own in <path>/reserved, with plan, coverage, funnel and manifest, all in the split `test`, which training
refuses; `evaluate.questions` may be its test.jsonl. What is matched to tasks, as relations, formats and K, follows from them.

    documents    it visits its share n' / (n + n') of them, by a hash. Those that its gold, support or withheld passages are of
                 are closed to the training's questions, and an example that rests on one all the same is rejected; so is one
                 for the same job of a reader
    questions    training is decontaminated against it as against any registered set
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from raglan.artifact import fingerprint
from raglan.corpus import Corpus
from raglan.decontaminate import EvaluationQuestions, registered
from raglan.documents import example_row, read_examples
from raglan.recipe import DecontaminateSettings, Recipe, SynthesisSettings
from raglan.records import Example
from raglan.splits import gold_passages
from raglan.synthesis.plan import DEALT, Plan, cell_seed, deal_plan, factors_of, reserved_of, seed_of
from raglan.synthesis.quotas import quotas
from raglan.synthesis.writing import Shelf

__all__ = ["FOLDER", "Reserved", "others", "own_shelf", "reserved_plan", "reserved_recipe", "ties"]

FOLDER, SPLIT = "reserved", "test"
FIRST = 1 << 20  # brainstorm of its own; no plan has so many of one kind
Tie = tuple[str, str]  # document or job, its name


@dataclass(frozen=True)
class Reserved:
    """A reserved set that is there.

    Attributes:
        questions: to be kept out of training.
        ties: what no training example may have.
        told: for the manifest: its values, and how many examples were requested and kept.
    """

    questions: EvaluationQuestions
    ties: frozenset[Tie]
    told: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path, told: Mapping[str, Any], corpus: Corpus) -> Reserved:
        """The set of this folder, by its manifest."""
        examples = read_examples(folder / "examples.jsonl")
        tied = frozenset(tie for example in examples for tie in ties(example, corpus))
        values = told["inputs"]["reserved"]
        named = {**values, "requested": told["requested"], "kept": told["kept"], "complete": told["complete"]}
        return cls(EvaluationQuestions(FOLDER, examples), tied, named)

    @property
    def shelf(self) -> Shelf:
        """What is left to the training's questions."""
        return Shelf(closed=frozenset(name for kind, name in self.ties if kind == "document"))

    @property
    def fingerprint(self) -> str:
        return fingerprint([example_row(example) for example in self.questions.examples])


def ties(example: Example, corpus: Corpus | None) -> set[Tie]:
    """The documents of the corpus that a synthetic example rests on, or would have, and its job."""
    synth = example.metadata["synth"]
    names = [*example.relevant, *(one["id"] for one in (*gold_passages(example), *synth.get("withheld", ())))]
    rows = [row for name in names if corpus is not None and (row := corpus.row(name)) is not None]
    passages = [corpus[row] for row in rows] if corpus is not None else []
    found = {("document", passage.document or passage.id) for passage in passages}
    return found | ({("job", synth["job"])} if synth.get("job") else set())


def reserved_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the reserved set: its folder, number and seed, and the calls and registered sets of all."""
    asked = _asked(recipe)
    assert asked.reserve is not None
    own, near = asked.path / FOLDER, others(recipe)
    synthesis = asked.model_copy(update={
        "path": own, "n": asked.reserve.n, "calls": asked.calls or asked.path / "calls", "reserve": None, "split": {SPLIT: 1.0},
        "decontaminate": asked.decontaminate if near.sets else "none",
    })  # fmt: skip
    seed = seed_of(recipe.seed, 0, FOLDER)
    return recipe.model_copy(update={"seed": seed, "synthesis": synthesis, "decontaminate": near, "evaluate": None})


def others(recipe: Recipe) -> DecontaminateSettings:
    """The registered sets, without the reserved one, which need not be there yet."""
    near, own = registered(recipe), (_asked(recipe).path / FOLDER).resolve()
    return near.model_copy(update={"sets": {n: one for n, one in near.sets.items() if own not in one.path.resolve().parents}})


def reserved_plan(recipe: Recipe, *, cannot: Mapping[str, Sequence[str]] | None = None) -> Plan:
    """The reserved set's plan, by the recipe of the whole.

    Raises:
        RecipeError: as `make_plan`.
    """
    asked = _asked(recipe)
    assert asked.reserve is not None
    values, seed = reserved_of(recipe, cannot=cannot), seed_of(recipe.seed, 0, FOLDER)
    plans = []
    for part, n in zip(values, quotas(asked.reserve.n, [1] * len(values)), strict=True):
        settings = asked.model_copy(update={"from_scratch": 1.0}) if part == "topic" else asked
        own = recipe.model_copy(update={"synthesis": settings})
        factors, left_out = factors_of(own, cannot=cannot, part=part)
        fit = frozenset(rule.factor for rule in factors.rules if rule.factor in DEALT)
        dealt = deal_plan(factors, n, seed=seed_of(seed, 0, part), fit=fit, order=asked.passages.order, left_out=left_out)
        plans.append(dealt)
    return _joined(plans, seed)


def _joined(plans: Sequence[Plan], seed: int) -> Plan:
    """One plan of all their cells, with numbers and seeds of its own."""
    cells = [cell for plan in plans for cell in plan.cells]
    margins: dict[str, Counter[str]] = {}
    allowed: dict[str, dict[tuple[str, str], None]] = {}
    for plan in plans:
        for name, counts in plan.margins.items():
            margins.setdefault(name, Counter()).update(counts)
        for name, pairs in plan.allowed.items():
            allowed.setdefault(name, {}).update(dict.fromkeys(pairs))
    left_out = {
        name: tuple(value for value in values if all(value in plan.left_out.get(name, ()) for plan in plans))
        for name, values in plans[0].left_out.items()
    }
    numbered = (replace(cell, number=n, seed=cell_seed(seed, n)) for n, cell in enumerate(cells))
    return Plan(
        seed, tuple(numbered), {name: dict(counts) for name, counts in margins.items()},
        {name: tuple(pairs) for name, pairs in allowed.items()}, {name: values for name, values in left_out.items() if values},
    )  # fmt: skip


def own_shelf(recipe: Recipe, corpus: Corpus) -> Shelf:
    """The documents that the reserved set visits: its share of all, those of the lowest hashes."""
    asked = _asked(recipe)
    assert asked.reserve is not None
    names = {passage.document or passage.id for passage in corpus}
    share = Fraction(asked.reserve.n, asked.n + asked.reserve.n)
    ordered = sorted(names, key=lambda name: hashlib.sha256(f"{recipe.seed}:{FOLDER}:{name}".encode()).digest())
    return Shelf(only=frozenset(ordered[: -int(-share * len(names) // 1)]), first=FIRST)


def _asked(recipe: Recipe) -> SynthesisSettings:
    assert recipe.synthesis is not None
    return recipe.synthesis
