"""`raglan synthesize recipe.yaml`: opens what a run needs, by the recipe, and runs it.

    questions    people's questions in cells of the plan (`synthesis.questions`)
    offline      rules over the knowledge base (`synthesis.teacher: {kind: offline}`)
    endpoint     a model behind a server (`{kind: endpoint, …}`): with a cap, or a yes to what `forecast` tells
    vllm, hf     a model on this machine: the same, behind a server that is there while the run lasts

Beside it the checks of `synthesis.verify`: an entailment model, a judge, the closed book (`checks`). All calls share a journal.
The knowledge base must be built; evidence comes from its indexes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from raglan.artifact import MANIFEST, file_fingerprint, fingerprint
from raglan.calls.engine import CallEngine
from raglan.calls.estimate import SAMPLE, Estimate, Told, reckon
from raglan.calls.journal import Journal
from raglan.calls.served import ModelServer
from raglan.calls.terms import host_of
from raglan.dedupe import Embed
from raglan.domains import source_name
from raglan.encoder import Encoder
from raglan.errors import GeneratorError, RecipeError
from raglan.knowledge import KnowledgeBase
from raglan.recipe import EncoderSettings, EndpointSettings, OfflineTeacher, Recipe, ServedSettings, SynthesisSettings
from raglan.records import Passage
from raglan.stages import folder_stamp
from raglan.synthesis.checks import open_checks, open_journal, prices
from raglan.synthesis.desk import Desk
from raglan.synthesis.endpoint import EndpointTeacher, check_consent, cost, open_endpoint
from raglan.synthesis.evidence import Assembler
from raglan.synthesis.offline import CANNOT, Offline
from raglan.synthesis.plan import Plan, make_plan, reserved_of
from raglan.synthesis.questions import open_questions
from raglan.synthesis.reserve import FOLDER, Reserved, own_shelf, reserved_plan, reserved_recipe
from raglan.synthesis.run import Done, synthesize
from raglan.synthesis.writing import Job, Shelf, Teacher

__all__ = ["Opened", "cannot_of", "forecast", "open_teacher", "run"]


@dataclass(frozen=True)
class Opened:
    """A teacher with its plan, and what the evidence is told of it.

    Attributes:
        evidence, answers: of other questions, for noise and false values.
        ignores: factors that it does not heed. ignores_in_corpus: nor in cells over a corpus.
        inputs: names of what else its texts follow from. sources: of its questions.
    """

    teacher: Teacher
    plan: Plan
    evidence: Sequence[Passage] = ()
    answers: Sequence[str] = ()
    ignores: Sequence[str] = ()
    inputs: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    ignores_in_corpus: Sequence[str] = ()


def run(recipe: Recipe, *, yes: bool = False) -> Done:
    """Write the dataset of `recipe.synthesis`; a finished one is left alone.

    Args:
        yes: calls may cost money without a cap.

    Raises:
        RecipeError: no teacher, one that cannot write what is asked for, or calls without a cap. CheckpointError: no
            knowledge base, or another dataset in the folder. CorpusError: a missing evaluation set, or too few passages.
            GeneratorError: a model on this machine does not come up, or ends too early.
    """
    if recipe.synthesis is not None and recipe.synthesis.teacher is None and recipe.synthesis.questions is None:
        raise RecipeError(
            "synthesis names no teacher, so a plan is all that can be made",
            hint="say so: --plan; or synthesis.teacher.kind=offline",
        )
    asked = _asked(recipe)
    check_consent(asked, prices(asked), yes=yes)
    base = KnowledgeBase.of(recipe.knowledge)
    with ExitStack() as stack:
        server = _server(asked, stack)
        begun = [folder for folder in (asked.path, asked.path / FOLDER) if not (folder / MANIFEST).is_file()]
        done = _all_written(recipe, base, server)
        if server is None or not server.ended:
            return done
        for folder in begun:  # what it could not answer is asked again, and is no loss of the dataset's
            (folder / MANIFEST).unlink(missing_ok=True)
        raise GeneratorError(server.ended, hint="the same command goes on from here")


def _all_written(recipe: Recipe, base: KnowledgeBase, server: ModelServer | None) -> Done:
    """The dataset, and before it what is reserved."""
    asked = _asked(recipe)
    if asked.reserve is None:
        return _written(recipe, base, server=server)
    plan, values = reserved_plan(recipe, cannot=cannot_of(asked)), reserved_of(recipe, cannot=cannot_of(asked))
    shelf = own_shelf(recipe, base.corpus)
    first = _written(reserved_recipe(recipe), base, plan=plan, shelf=shelf, values=values, server=server)
    if first.told["stopped"]:  # which documents are left is not known before it is done
        return first
    return _written(recipe, base, reserved=Reserved.of(first.folder, first.told, base.corpus), server=server)


def _written(
    recipe: Recipe, base: KnowledgeBase, *, plan: Plan | None = None, shelf: Shelf | None = None,
    values: Mapping[str, Sequence[str]] | None = None, reserved: Reserved | None = None, server: ModelServer | None = None,
) -> Done:  # fmt: skip
    """The dataset of a recipe; of another plan than its own, with the `values` that are reserved, or beside such a one.

    `server`: the teacher's, which starts with the first call.
    """
    asked, shelf = _asked(recipe), shelf if reserved is None else reserved.shelf
    apart = values or (reserved.fingerprint if reserved is not None else None)
    with ExitStack() as stack:
        journal = _journal(asked, stack, server) if prices(asked) else None
        opened = open_teacher(recipe, base, stack, journal=journal, plan=plan, shelf=shelf)
        checks = open_checks(recipe, journal, stack)
        assembler = Assembler.open(recipe, evidence=opened.evidence, answers=opened.answers, judge=checks.guard)
        near = recipe.decontaminate.encoder if recipe.decontaminate is not None else None
        return synthesize(
            recipe, opened.teacher, assembler.show, plan=opened.plan, verifier=checks.verifier, recall=checks.recall,
            piece=checks.piece, corpus=base.corpus, embed=_embed(asked.dedupe), embed_questions=_embed(near),
            corpus_at=_corpus_at, ignores=opened.ignores, ignores_in_corpus=opened.ignores_in_corpus,
            cost=None if journal is None else lambda: cost(journal),
            inputs={"knowledge": base.searched, **_asking(recipe, assembler), **opened.inputs, **checks.inputs,
                    **({"reserved": apart} if apart is not None else {})},
            sources=opened.sources, reserved=reserved,
        )  # fmt: skip


def forecast(recipe: Recipe, *, sample: int = SAMPLE) -> Estimate:
    """What all calls will cost. A sample of the cells is really run, paid, checked, and kept for `run`.

    Reserved cells are among them. Which documents these take from the others is not known yet, so of the others' some is paid
    again.

    Raises:
        RecipeError: neither teacher nor checks make calls. CallsStopped: a cap, a refused key.
        GeneratorError: nothing of the sample was accepted.
    """
    asked = _asked(recipe)
    if not prices(asked):
        raise RecipeError("synthesis.teacher makes no calls, so there is nothing to estimate", hint="leave out --dry-run")
    base = KnowledgeBase.of(recipe.knowledge)
    with ExitStack() as stack:
        journal = _journal(asked, stack, _server(asked, stack))
        sets = [_Counted.open(recipe, base, journal, stack)]
        if asked.reserve is not None:
            plan, shelf = reserved_plan(recipe, cannot=cannot_of(asked)), own_shelf(recipe, base.corpus)
            sets.insert(0, _Counted.open(reserved_recipe(recipe), base, journal, stack, plan=plan, shelf=shelf))
        jobs = ((place, Job(cell)) for place, one in enumerate(sets) for cell in one.plan.cells)

        def told(drawn: list[tuple[int, Job]]) -> list[Told]:
            found = [iter(one.desk.told([job for of, job in drawn if of == place])) for place, one in enumerate(sets)]
            return [next(found[of]) for of, _ in drawn]

        return reckon(
            sets[-1].engine, jobs, told, stratum=lambda item: f"{item[0]} {sets[item[0]].stratum(item[1])}", sample=sample,
            seed=recipe.seed,
        )  # fmt: skip


@dataclass(frozen=True)
class _Counted:
    """A dataset whose calls are counted before it is written."""

    plan: Plan
    desk: Desk
    engine: CallEngine
    stratum: Callable[[Job], str]

    @classmethod
    def open(
        cls, recipe: Recipe, base: KnowledgeBase, journal: Journal, stack: ExitStack, *, plan: Plan | None = None,
        shelf: Shelf | None = None,
    ) -> _Counted:  # fmt: skip
        """`plan` and `shelf` as in `open_teacher`."""
        opened = open_teacher(recipe, base, stack, journal=journal, plan=plan, shelf=shelf)
        checks = open_checks(recipe, journal, stack)
        assembler = Assembler.open(recipe, evidence=opened.evidence, answers=opened.answers, judge=checks.guard)
        desk = Desk(opened.teacher, assembler.show, checks.verifier, recall=checks.recall, piece=checks.piece)
        paid = opened.teacher if isinstance(opened.teacher, EndpointTeacher) else None
        engine = checks.engine if paid is None else paid.engine
        assert engine is not None, "somebody has a price"
        return cls(opened.plan, desk, engine, _task if paid is None else paid.stratum)


def _server(asked: SynthesisSettings, stack: ExitStack) -> ModelServer | None:
    """The teacher's, where it is a model on this machine; it does not run yet."""
    if not isinstance(asked.teacher, ServedSettings):
        return None
    return stack.enter_context(ModelServer(asked.teacher, Path(asked.calls or asked.path / "calls") / "server.log"))


def _journal(asked: SynthesisSettings, stack: ExitStack, server: ModelServer | None) -> Journal:
    """The journal of all calls; whoever asks the teacher's own server by it has that started."""
    journal = open_journal(asked, stack)
    if server is not None:
        journal.starters[host_of(server.settings)] = server.start
    return journal


def _asking(recipe: Recipe, assembler: Assembler) -> dict[str, str]:
    """Names the query towers of indexes' own encoders, which the knowledge base's version knows by their folders alone.

    And the knowledge base's own, of which its version knows nothing, where the recipe says which, or how it asks.
    """
    stamps = [folder_stamp(model) for model in recipe.knowledge.own_query_models]
    main = recipe.knowledge.encoder
    chosen = any(one is not None for one in (main.query_model, main.query_prompt, recipe.retriever.query_encoder))
    return {
        **({"asking": fingerprint(stamps)} if stamps else {}),
        **({"query_tower": assembler.query_tower} if chosen and assembler.query_tower else {}),
    }


def _task(job: Job) -> str:
    return job.cell.task


def _asked(recipe: Recipe) -> SynthesisSettings:
    if recipe.synthesis is None:
        raise RecipeError("the recipe has no `synthesis`", hint="see docs/concepts/synthesis.md for one")
    return recipe.synthesis


def cannot_of(settings: SynthesisSettings) -> Mapping[str, Sequence[str]] | None:
    """What the recipe's teacher never writes."""
    return CANNOT if isinstance(settings.teacher, OfflineTeacher) else None


def open_teacher(
    recipe: Recipe, base: KnowledgeBase, stack: ExitStack, *, journal: Journal | None = None, plan: Plan | None = None,
    shelf: Shelf | None = None,
) -> Opened:  # fmt: skip
    """Who writes, by the recipe; `stack` closes what has to be. Raises RecipeError: nobody is named, or two are.

    Args:
        plan: default the recipe's.
        shelf: documents that questions may be about; default all.
    """
    asked = _asked(recipe)
    if asked.questions is not None and asked.teacher is not None:
        raise RecipeError("synthesis has both questions and a teacher", hint="make two datasets, and mix them when training")
    if asked.questions is not None:
        people = open_questions(recipe, base.corpus)
        inputs = {"questions": file_fingerprint(asked.questions)} if asked.questions.is_file() else {}
        sources = {source_name(asked.questions): str(asked.questions)}
        return Opened(people, make_plan(recipe), people.evidence, people.answers, people.ignores, inputs, sources)
    if isinstance(asked.teacher, OfflineTeacher):
        plan = plan or make_plan(recipe, cannot=CANNOT)
        rules = Offline(base.corpus, plan, overlap=asked.teacher.overlap, shelf=shelf)
        return Opened(rules, plan, rules.evidence, rules.answers, rules.ignores)
    if isinstance(asked.teacher, EndpointSettings):
        plan = plan or make_plan(recipe)
        model = stack.enter_context(open_endpoint(recipe, plan, base.corpus, journal=journal, shelf=shelf))
        return Opened(
            model, plan, model.evidence, model.answers, inputs={"writing": model.fingerprint},
            ignores_in_corpus=model.ignores_in_corpus,
        )  # fmt: skip
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
