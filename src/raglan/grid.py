"""The grid: query encoder {base, tuned} × generator {base, tuned}, on the same questions of several tasks.

    runs/<name>/grid/retrieval/<query encoder>/<task>-<fingerprint>/   hits.jsonl: rows, scores and log p(z|x)
    runs/<name>/grid/<cell>/<task>-<fingerprint>/                      predictions.jsonl: answer, groups, figures

Each folder's manifest is written last, so a run that was stopped goes on with the cell and task it had not finished. There are
two retrieval passes and not four; and cells of one generator are read together, so that a prompt which both query encoders
ask for is decoded once.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from raglan.artifact import MANIFEST, file_fingerprint, fingerprint, read_manifest, write_manifest
from raglan.corpus import Corpus
from raglan.data import check_classes, choices_of, load_examples
from raglan.decode import CHOOSES, KINDS, NEEDS_PRIOR, Asked, ensembles, normalised
from raglan.errors import CorpusError, RecipeError
from raglan.generator import HFGenerator
from raglan.knowledge import KnowledgeBase
from raglan.metrics import Interval, accuracy, answer_recall, exact_match, f1, mrr, recall, rouge_l
from raglan.paired import Paired, macro, paired, verdict
from raglan.recipe import (
    ABSTENTION,
    ClassifyDecode,
    ConcatDecode,
    DecodeSettings,
    EnsembleDecode,
    GridSettings,
    GridTask,
    Recipe,
)
from raglan.records import Answer, Example, Hit
from raglan.stages import Parts, folder_stamp, learned_by, stage_parts

__all__ = ["CELLS", "Cell", "Grid", "evaluate_grid", "open_grid"]

log = logging.getLogger(__name__)
KIND, SEARCH_KIND = "grid cell", "grid retrieval"
BASE, R_FT, LM_FT, BOTH = CELLS = ("base", "R-ft", "LM-ft", "both")
METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "em": exact_match, "f1": f1, "accuracy": accuracy, "rouge_l": rouge_l,
}  # fmt: skip
ASKING = ("query_encoder", "passage_encoder", "knowledge", "prior")  # what a retrieval is made by
SHOWN = 10  # groups of an answer that are kept


@dataclass(frozen=True)
class Cell:
    """One column of the grid. Without a query encoder no passage is read."""

    name: str
    query_encoder: str | None
    generator: str
    together: bool = False

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "-")


@dataclass(frozen=True)
class Grid:
    """What was measured.

    Attributes:
        tasks: task → its metric in every cell. `average`: the macro average, where there are several tasks.
        abstained: task → how often each cell gave no answer.
        found: task → (query encoder, figure) → its mean.
        split: task → cell → (mean and number of questions with a gold alias among the passages, the same of those without).
        asked, read: prompts that the cells have, and how many were decoded, as those of one generator that are the same
            are decoded once. `passes`: retrievals of all questions.
    """

    cells: tuple[Cell, ...]
    metrics: Mapping[str, str]
    tasks: Mapping[str, Paired]
    average: Paired | None
    abstained: Mapping[str, Paired]
    found: Mapping[str, Mapping[tuple[str, str], Interval]]
    split: Mapping[str, Mapping[str, tuple[tuple[float, int], tuple[float, int]]]]
    passes: int
    asked: int
    read: int
    seed: int

    def regressions(self) -> list[tuple[str, str, str, Interval]]:
        """(task, cell, "worse" or "lower", difference to base) wherever a tuned cell is below the base."""
        found = []
        for task, figures in self.tasks.items():
            for cell in (R_FT, LM_FT, BOTH):
                difference = figures.difference(BASE, cell)
                if verdict(difference) in ("worse", "lower"):
                    found.append((task, cell, verdict(difference), difference))
        return found


@dataclass(frozen=True)
class _Task:
    name: str
    settings: GridTask
    decode: DecodeSettings
    examples: Sequence[Example]

    @property
    def choices(self) -> list[tuple[str, ...]]:
        if self.decode.kind not in CHOOSES:
            return []
        default = getattr(self.decode, "choices", ())
        return [choices_of(example) or default for example in self.examples]


@dataclass(frozen=True)
class _Plan:
    """What is to be measured: query encoders and generators by name, each as the parts that it brings."""

    recipe: Recipe
    settings: GridSettings
    version: str
    encoders: Mapping[str, Parts]
    generators: Mapping[str, Parts]
    tasks: Sequence[_Task]
    cells: tuple[Cell, ...]

    def search_folder(self, task: _Task, encoder: str) -> Path:
        made_of = self._search_made_of(task, encoder)
        return self.recipe.run / "grid" / "retrieval" / encoder / f"{task.name}-{fingerprint(made_of)[:8]}"

    def cell_folder(self, task: _Task, cell: Cell) -> Path:
        recipe, generator = self.recipe, self.generators[cell.generator].generator
        made_of = [
            asdict(cell), None if cell.query_encoder is None else self._search_made_of(task, cell.query_encoder),
            generator, folder_stamp(generator), folder_stamp(recipe.generator.model), _questions(task),
            task.decode.model_dump(mode="json"), task.settings.metric, recipe.seed, recipe.prompt.model_dump(mode="json"),
            recipe.generator.model_dump(mode="json", exclude={"any_prompt", "attention", "batch_tokens", "head_chunk"}),
        ]  # fmt: skip
        return recipe.run / "grid" / cell.folder / f"{task.name}-{fingerprint(made_of)[:8]}"

    def searched(self, task: _Task, encoder: str) -> list[dict[str, Any]]:
        return _rows(self.search_folder(task, encoder), SEARCH_KIND, "hits.jsonl")

    def _search_made_of(self, task: _Task, encoder: str) -> list[Any]:
        recipe, parts = self.recipe, asdict(self.encoders[encoder])
        asks = {name: parts[name] for name in ASKING}
        named = recipe.knowledge.encoder
        stamps = [folder_stamp(name) for name in (*asks.values(), recipe.retriever.query_encoder, named.query_model)]
        return [
            self.version, recipe.index, recipe.retriever.model_dump(mode="json"), named.model_dump(mode="json"), asks, stamps,
            self.settings.k, _questions(task), task.decode.kind in NEEDS_PRIOR,
        ]  # fmt: skip


def evaluate_grid(recipe: Recipe) -> Grid:
    """Measure whatever is not measured yet; a finished cell of a task is not measured twice.

    Raises:
        RecipeError: no `grid`, nothing that is tuned, or a retrieval that depends on the generator.
        CheckpointError: a tuned part that is not there. CorpusError: a task without an answer.
    """
    plan = _plan(recipe)
    for encoder in plan.encoders:
        _retrieve(plan, encoder)
    for name, parts in plan.generators.items():
        own = [(task, cell) for task in plan.tasks for cell in plan.cells if cell.generator == name]
        missing = [(task, cell) for task, cell in own if not (plan.cell_folder(task, cell) / MANIFEST).is_file()]
        if not missing:
            continue
        log.info("grid: reading with the generator %s", name)
        system = replace(plan.encoders[BASE], generator=parts.generator).open(recipe)
        for task in plan.tasks:
            _read(plan, task, [cell for other, cell in missing if other is task], system.generator)
    return _opened(plan)


def open_grid(recipe: Recipe) -> Grid:
    """The grid as it was measured; only the bootstrap is computed.

    Raises:
        CheckpointError: a cell that is not finished.
    """
    return _opened(_plan(recipe))


def _opened(plan: _Plan) -> Grid:
    metrics, abstained, found, split, asked, read = {}, {}, {}, {}, 0, 0
    for task in plan.tasks:
        metric = task.settings.metric
        rows = {cell.name: _rows(plan.cell_folder(task, cell), KIND) for cell in plan.cells}
        columns = {name: [row["figures"] for row in own] for name, own in rows.items()}
        draws: dict[str, Any] = {"task": task.name, "seed": plan.recipe.seed, "resamples": plan.settings.resamples}
        metrics[task.name] = paired({name: [row[metric] for row in own] for name, own in columns.items()}, **draws)
        abstained[task.name] = paired({name: [row["abstained"] for row in own] for name, own in columns.items()}, **draws)
        split[task.name] = {
            cell.name: _split(columns[cell.name], metric) for cell in plan.cells if cell.query_encoder is not None
        }
        searches = {encoder: plan.searched(task, encoder) for encoder in plan.encoders}
        found[task.name] = _found(searches, draws)
        for generator in plan.generators:
            counted = _prompts(task, searches, [c for c in plan.cells if c.generator == generator], plan.recipe.retriever.k)
            asked, read = asked + counted[0], read + counted[1]
    average = macro(list(metrics.values())) if len(plan.tasks) > 1 else None
    return Grid(
        plan.cells, {task.name: task.settings.metric for task in plan.tasks}, metrics, average, abstained, found, split,
        len(plan.encoders), asked, read, plan.recipe.seed,
    )  # fmt: skip


def _plan(recipe: Recipe) -> _Plan:
    settings = recipe.grid
    if settings is None:
        raise RecipeError(f"recipe {recipe.name!r} has no grid", hint="give it `grid: {tasks: {name: {questions: …}}}`")
    turns = any(getattr(own, "turns", None) for own in (recipe.decode, *(task.decode for task in settings.tasks.values())))
    rewrites = recipe.retriever.history == "rewrite" and recipe.retriever.rewrite.model is None
    if turns or rewrites or recipe.retriever.retrieve_again is not None:
        raise RecipeError(
            "a grid needs a retrieval that does not depend on the generator",
            hint="leave out retrieve_again and turns, and give retriever.rewrite a model of its own",
        )
    _joins(recipe, settings)
    base, folders = stage_parts(recipe, settings.base), settings.folders
    asks, writes = Parts(query_encoder=folders.query_encoder), str(folders.generator)
    if folders.query_encoder is None:
        asks = stage_parts(recipe, [_learner(recipe, settings, "query_encoder")])
    if folders.generator is None:
        writes = str(stage_parts(recipe, [_learner(recipe, settings, "generator")]).generator)
    tuned = replace(base, **{name: value for name in ASKING if (value := getattr(asks, name)) is not None})
    base_knowledge = KnowledgeBase.of(recipe.knowledge)
    return _Plan(
        recipe, settings, base_knowledge.searched, {BASE: base, R_FT: tuned},
        {BASE: base, LM_FT: replace(base, generator=writes)}, _tasks(recipe, settings, base_knowledge.corpus),
        _cells(settings),
    )  # fmt: skip


def _joins(recipe: Recipe, settings: GridSettings) -> None:
    """Refuse `concat` beside a decoding that cannot be said with all passages in one prompt."""
    for name, task in settings.tasks.items() if settings.concat else ():
        decode = task.decode or recipe.decode
        if isinstance(decode, ClassifyDecode):
            raise RecipeError(
                f"grid.concat: task {name!r} is decoded by classify, which concat would answer in words",
                hint="set grid.concat: false, or give such tasks a grid of their own",
            )
        plain = EnsembleDecode(kind="ensemble").completion
        if isinstance(decode, EnsembleDecode) and decode.scorer == "nll_compl" and decode.completion != plain:
            raise RecipeError(
                f"grid.concat: task {name!r} has completion {decode.completion!r}; concat knows {plain!r} alone",
                hint="leave completion out, or set grid.concat: false",
            )


def _learner(recipe: Recipe, settings: GridSettings, part: str) -> str:
    """The stage that tuned a part: the one the recipe names, or the last that does and is not in the base."""
    trainings = recipe.trainings()
    named = getattr(settings, part)
    able = [name for name, stage in trainings.items() if part in learned_by(stage) and name not in settings.base]
    if named is None and able:
        return able[-1]
    if named is None or part not in learned_by(trainings[named]):
        raise RecipeError(
            f"grid.{part}: " + (f"stage {named!r} does not learn a {part}" if named else f"no stage learns a {part}"),
            hint=f"stages that do: {', '.join(able) or 'none'}; or give a folder as grid.folders.{part}",
        )
    return str(named)


def _cells(settings: GridSettings) -> tuple[Cell, ...]:
    cells = [Cell(BASE, BASE, BASE), Cell(R_FT, R_FT, BASE), Cell(LM_FT, BASE, LM_FT), Cell(BOTH, R_FT, LM_FT)]
    if settings.concat:
        cells += [replace(cell, name=f"{cell.name} concat", together=True) for cell in cells]
    if settings.closed_book:
        cells += [Cell("closed book", None, BASE), Cell("closed book LM-ft", None, LM_FT)]
    return tuple(cells)


def _tasks(recipe: Recipe, settings: GridSettings, corpus: Corpus) -> list[_Task]:
    tasks = []
    for name, own in settings.tasks.items():
        examples = [e for e in load_examples(own.questions, corpus, limit=own.limit, seed=recipe.seed) if e.answers]
        if not examples:
            raise CorpusError(f"{own.questions} holds no question with an answer", hint=f"grid.tasks.{name} measures answers")
        task = _Task(name, own, own.decode or recipe.decode, examples)
        if isinstance(task.decode, ClassifyDecode):
            check_classes(examples, task.decode)
        bare = sum(not choices for choices in task.choices)
        if bare and own.metric == "accuracy":
            log.warning("task %s: %d of %d questions have no choices and are answered in words", name, bare, len(examples))
        tasks.append(task)
    return tasks


def _retrieve(plan: _Plan, name: str) -> None:
    """One retrieval pass over all tasks with one query encoder."""
    missing = [task for task in plan.tasks if not (plan.search_folder(task, name) / MANIFEST).is_file()]
    if not missing:
        return
    log.info("grid: retrieving with the query encoder %s", name)
    settings = plan.settings
    system = plan.encoders[name].open(plan.recipe)
    system.retriever.check_k(system.k)
    corpus = system.retriever.base.corpus
    depth = min(len(corpus), max(*settings.k, system.k, 10))
    for task in missing:
        texts, hits = system.search([e.query for e in task.examples], depth, history=[e.history for e in task.examples])
        priors: Sequence[torch.Tensor] = [torch.zeros(0)] * len(hits)
        if task.decode.kind in NEEDS_PRIOR:
            priors = system.retriever.prior(texts, [found[: system.k] for found in hits])
        rows = [
            {
                "id": example.id, "rows": [hit.row for hit in found], "scores": [hit.score for hit in found],
                "logprobs": prior.tolist(), "figures": _searched(example, found, settings),
            }
            for example, found, prior in zip(task.examples, hits, priors, strict=True)
        ]  # fmt: skip
        _write(plan.search_folder(task, name), SEARCH_KIND, rows, {"task": task.name, "query_encoder": name}, "hits.jsonl")


def _searched(example: Example, hits: Sequence[Hit], settings: GridSettings) -> dict[str, float | None]:
    ranking = [hit.passage.id for hit in hits]
    texts = [f"{hit.passage.title}\n{hit.passage.text}" for hit in hits]
    figures = {f"recall@{k}": recall(ranking, example.relevant, k) for k in settings.k}
    figures |= {"mrr@10": mrr(ranking, example.relevant, 10)}
    figures |= {f"answer_recall@{k}": answer_recall(texts[:k], example.answers) for k in settings.k}
    return {name: None if math.isnan(value) else value for name, value in figures.items()}


def _read(plan: _Plan, task: _Task, cells: Sequence[Cell], generator: HFGenerator) -> None:
    """Answers of cells that share a generator, each cell's into its own folder."""
    for together in (False, True):
        own = [cell for cell in cells if cell.together == together]
        decode = _joined(task.decode) if together else task.decode
        retrievals = [_asked(plan, task, cell) for cell in own]
        torch.manual_seed(plan.recipe.seed)  # where answers are drawn
        for cell, answers in zip(own, _answers(generator, retrievals, decode), strict=True):
            rows = [_row(task, cell, example, answer) for example, answer in zip(task.examples, answers, strict=True)]
            about = {"task": task.name, "cell": cell.name, "metric": task.settings.metric, "questions": len(rows)}
            _write(plan.cell_folder(task, cell), KIND, rows, about)


def _asked(plan: _Plan, task: _Task, cell: Cell) -> Asked:
    """A task's questions with what the cell's query encoder found."""
    queries, history = [e.query for e in task.examples], [e.history for e in task.examples]
    if cell.query_encoder is None:
        nothing = [torch.zeros(0) for _ in queries]
        return Asked(queries, [() for _ in queries], nothing, history, choices=task.choices)
    corpus, found = KnowledgeBase.open(plan.recipe.knowledge.path).corpus, plan.searched(task, cell.query_encoder)
    hits = [
        tuple(
            Hit(corpus[row], row, score, rank)
            for rank, (row, score) in enumerate(zip(line["rows"], line["scores"], strict=True), 1)
        )[: plan.recipe.retriever.k]
        for line in found
    ]
    return Asked(queries, hits, [torch.tensor(line["logprobs"]) for line in found], history, choices=task.choices)


def _joined(decode: DecodeSettings) -> ConcatDecode:
    """`concat` as a task is decoded otherwise."""
    said = {name: own for name in ("max_new_tokens", "scorer") if (own := getattr(decode, name, None)) is not None}
    return ConcatDecode(**said)


def _answers(generator: HFGenerator, retrievals: Sequence[Asked], decode: DecodeSettings) -> list[list[Answer]]:
    """The answers of each retrieval of the same questions; what is asked twice in the same words is read once."""
    if not retrievals:
        return []
    if isinstance(decode, EnsembleDecode):
        return ensembles(generator, retrievals, decode)
    first: dict[Any, tuple[int, int]] = {}
    names = [[_same(asked, place, decode) for place in range(len(asked.queries))] for asked in retrievals]
    for number, own in enumerate(names):
        for place, name in enumerate(own):
            first.setdefault(name, (number, place))
    answers: dict[tuple[int, int], Answer] = {}
    for number, asked in enumerate(retrievals):
        places = [place for other, place in first.values() if other == number]
        if places:
            found = KINDS[decode.kind](generator, asked.only(places), decode)
            answers |= {(number, place): answer for place, answer in zip(places, found, strict=True)}
    return [
        [replace(answers[first[name]], hits=tuple(asked.hits[place])) for place, name in enumerate(own)]
        for asked, own in zip(retrievals, names, strict=True)
    ]


def _same(asked: Asked, place: int, decode: DecodeSettings) -> tuple[Any, ...]:
    """What makes two questions' readings the same: the passages in their order and, where it is read, their prior."""
    prior = tuple(asked.doc_logprobs[place].tolist()) if decode.kind in NEEDS_PRIOR and asked.doc_logprobs else ()
    return place, tuple(hit.row for hit in asked.hits[place]), prior


def _row(task: _Task, cell: Cell, example: Example, answer: Answer) -> dict[str, Any]:
    """An answer with its figures. `hit`: whether a passage that was read holds a gold alias."""
    texts = [f"{hit.passage.title}\n{hit.passage.text}" for hit in answer.hits]
    metric = task.settings.metric
    silent = normalised(getattr(task.decode, "abstention", ABSTENTION))
    return {
        "id": example.id, "query": example.query, "answers": list(example.answers), "text": answer.text,
        "logprob": answer.logprob, "finished": answer.finished, "truncated": answer.truncated,
        "closed_book": answer.closed_book, "passages": [hit.passage.id for hit in answer.hits],
        "posterior": list(answer.posterior), "passage_logprobs": list(answer.passage_logprobs),
        "groups": [[candidate.text, candidate.logprob] for candidate in answer.candidates[:SHOWN]],
        "figures": {
            metric: METRICS[metric](answer.text, example.answers),
            "abstained": float(not answer.text or normalised(answer.text) == silent),
            "hit": None if cell.query_encoder is None else answer_recall(texts, example.answers),
        },
    }  # fmt: skip


def _split(figures: Sequence[Mapping[str, float]], metric: str) -> tuple[tuple[float, int], tuple[float, int]]:
    hit, missed = ([own[metric] for own in figures if bool(own["hit"]) is kind] for kind in (True, False))
    return _mean(hit), _mean(missed)


def _mean(values: Sequence[float]) -> tuple[float, int]:
    return (sum(values) / len(values) if values else math.nan), len(values)


def _found(searches: Mapping[str, Sequence[Mapping[str, Any]]], draws: Mapping[str, Any]) -> dict[tuple[str, str], Interval]:
    """(query encoder, figure) → its interval; questions without relevant passages are in no recall and no MRR."""
    found: dict[tuple[str, str], Interval] = {}
    for figure in next(iter(searches.values()))[0]["figures"]:
        columns = {name: [row["figures"][figure] for row in rows] for name, rows in searches.items()}
        kept = {name: [value for value in column if value is not None] for name, column in columns.items()}
        if all(kept.values()):
            both = paired(kept, **draws)
            found |= {(name, figure): both.interval(name) for name in kept}
    return found


def _prompts(
    task: _Task, searches: Mapping[str, Sequence[Mapping[str, Any]]], cells: Sequence[Cell], k: int
) -> tuple[int, int]:  # fmt: skip
    """Prompts of cells that share a generator, and how many of them differ."""
    asked, different = 0, 0
    for place in range(len(task.examples)):
        seen: set[tuple[int, ...]] = set()
        for cell in cells:
            rows = [] if cell.query_encoder is None else searches[cell.query_encoder][place]["rows"][:k]
            joined = cell.together or task.decode.kind == "concat" or not rows
            own = [tuple(rows)] if joined else [(row,) for row in rows]
            asked += len(own)
            seen.update(own)
        different += len(seen)
    return asked, different


def _questions(task: _Task) -> list[Any]:
    path = task.settings.questions
    content = [file_fingerprint(path)] if path.is_file() else [str(path), *_beir(path)]
    return [*content, task.settings.limit, [e.id for e in task.examples]]


def _beir(folder: Path) -> list[str]:
    """What a folder of questions asks, and what it says is relevant."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name.split(".")[0] != "corpus"]
    return [f"{path.relative_to(folder)} {file_fingerprint(path)}" for path in files]


def _write(
    folder: Path, kind: str, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any], name: str = "predictions.jsonl"
) -> None:  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with open(folder / name, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_manifest(folder, kind, about)


def _rows(folder: Path, kind: str, name: str = "predictions.jsonl") -> list[dict[str, Any]]:
    read_manifest(folder, kind)
    with open(folder / name, encoding="utf-8") as file:
        return [json.loads(line) for line in file]
