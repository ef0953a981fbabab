"""Self-RAG's settings tried on candidates that were written once: rescoring and sweeps, without a model call.

    runs/<name>/candidates/<system>/      written by `raglan evaluate --cache`
    runs/<name>/sweep.json                written by `raglan evaluate --sweep`

Written is once what a model says to every question with every passage, and without one. From then on thresholds, weights, K
and aggregation are arithmetic, done by the functions that decode live. A sweep tries them on development questions and gives
the front on which no setting is better in quality, retrieval rate and ids written at once.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raglan.artifact import file_fingerprint, fingerprint, write_json
from raglan.data import choices_of, load_examples
from raglan.decode import Asked
from raglan.decode.self_rag.cache import FILL, Absent, CandidateCache, Uncached, record, replay
from raglan.decode.self_rag.table import Table
from raglan.errors import CheckpointError, RecipeError
from raglan.evaluate import OF_A_QUESTION, gold
from raglan.knowledge import KnowledgeBase
from raglan.metrics import regex_match
from raglan.rag import RAG
from raglan.recipe import EvaluateSettings, Recipe, SelfRagDecode, SweepSettings
from raglan.records import Answer, Example, Hit
from raglan.reflection import Weights
from raglan.text import shortened
from raglan.train import Parts, finished_parts, folder_stamp

__all__ = ["Rescored", "Setting", "Sweep", "candidates_folder", "rescore", "settings_of", "sweep", "swept", "write_candidates"]

log = logging.getLogger(__name__)
FORMAT = 2  # of what candidates keep


@dataclass(frozen=True)
class Rescored:
    """Figures of answers that no model was asked for.

    Attributes:
        figures: metric → mean over the questions that could be answered, in [0,1].
        rate: questions with a retrieval ÷ questions. `generated`: ids that live decoding would have written.
        incomplete: questions that need what was never written; they are in no figure.
        calls: model calls: none, unless something was filled in.
    """

    figures: dict[str, float]
    rate: float
    generated: int
    questions: int
    incomplete: int
    calls: int
    seconds: float


@dataclass(frozen=True)
class Setting:
    """A combination and what it comes to: quality, retrieval rate, mean ids written a question."""

    threshold: float
    seq: float
    rel: float
    sup: float
    use: float
    k: int
    aggregate: str
    quality: float = 0.0
    rate: float = 0.0
    generated: float = 0.0
    confirmed: float | None = None

    def decode(self, settings: SelfRagDecode) -> SelfRagDecode:
        """The decoding that this is; `k` is the retriever's, and δ takes the place of a rate."""
        weights = settings.weights.model_copy(update={name: getattr(self, name) for name in ("seq", "rel", "sup", "use")})
        own = {"threshold": self.threshold, "target_rate": None, "weights": weights, "aggregate": self.aggregate}
        return settings.model_copy(update=own)


@dataclass(frozen=True)
class Sweep:
    """All settings, the best quality first, and those that none beats. `seconds`: of the settings' arithmetic alone."""

    metric: str
    questions: int
    settings: list[Setting]
    front: list[Setting]
    seconds: float


def candidates_folder(recipe: Recipe, name: str) -> Path:
    """Where a system's candidates are, or will be."""
    return recipe.run / "candidates" / name


def write_candidates(recipe: Recipe) -> tuple[Path, CandidateCache]:
    """Ask the model everything that later settings may need, of the trained system if there is one. The artefact is replaced.

    Raises:
        RecipeError: the recipe's decoding is not Self-RAG, or has no questions.
    """
    decode, questions = _decode(recipe), _questions(recipe)
    name, parts = finished_parts(recipe)[-1]
    system = parts.open(recipe)
    cache = CandidateCache(_identity(recipe, parts, decode, questions))
    asked = _asked(system, _examples(recipe, system.retriever.base, questions), cache)
    record(_generator(system), asked, decode, cache=cache, retrieve=_find(system, cache))
    folder = candidates_folder(recipe, name)
    cache.save(folder)
    return folder, cache


def rescore(recipe: Recipe, *, fill: bool = False) -> Rescored:
    """The figures of the recipe's decoding as it is now, from the candidates. Only with `fill` is the system opened.

    Raises:
        CheckpointError: no candidates, or made with another model, prompt, knowledge base, limit or other questions.
        RecipeError: more passages than they were written for.
    """
    decode, questions = _decode(recipe), _questions(recipe)
    name, parts = finished_parts(recipe)[-1]
    cache = _open(recipe, name, parts, decode, questions)
    calls, began = 0, time.monotonic()
    if fill:
        system = parts.open(recipe)
        examples = _examples(recipe, system.retriever.base, questions)
        generator = _generator(system)
        asked, before = _asked(system, examples, cache), generator.cost.copy()
        answers = replay(generator, asked, decode, cache=cache, fill=True, retrieve=_find(system, cache))
        calls = (generator.cost - before).calls
        cache.save(candidates_folder(recipe, name))
    else:
        base = KnowledgeBase.open(parts.knowledge or recipe.knowledge.path)
        examples = _examples(recipe, base, questions)
        absent, asked = Absent(cache, recipe.prompt.self_rag), _asked_before(cache, base, examples, recipe.retriever.k)
        answers = replay(absent, asked, decode, cache=cache, retrieve=_found_before(cache, base))
    assert recipe.evaluate is not None
    return _rescored(recipe.evaluate, decode, examples, answers, calls, time.monotonic() - began)


def swept(recipe: Recipe, *, confirm: bool = False) -> Sweep:
    """The recipe's sweep, from the candidates alone; written to `sweep.json`.

    Args:
        confirm: whether the settings of the front answer once more, live.
    """
    decode, questions, how = _decode(recipe), _questions(recipe), recipe.sweep or SweepSettings()
    name, parts = finished_parts(recipe)[-1]
    cache = _open(recipe, name, parts, decode, questions)
    base = KnowledgeBase.open(parts.knowledge or recipe.knowledge.path)
    examples = load_examples(questions, base.corpus, limit=_limit(recipe), seed=recipe.seed)
    examples = [example for example in examples if example.answers]
    known: Callable[..., float] = regex_match if _patterns(recipe) else OF_A_QUESTION[how.metric]

    def measure(text: str, example: Example) -> float:
        return float(known(text, example.answers if known is regex_match else gold(example, decode)))

    table = Table.of(cache, decode, lambda text, place: measure(text, examples[place]))
    settings = settings_of(how, decode, k=min(recipe.retriever.k, table.k), seed=recipe.seed)
    found = sweep(table, settings, metric=how.metric)
    if confirm:
        system = parts.open(recipe)
        found = Sweep(**{**vars(found), "front": [_confirmed(system, decode, one, examples, measure) for one in found.front]})
    write_json(recipe.run / "sweep.json", asdict(found))
    return found


def settings_of(how: SweepSettings, decode: SelfRagDecode, *, k: int, seed: int) -> list[Setting]:
    """Every combination, or `draws` of them.

    Raises:
        RecipeError: more passages than were written to.
    """
    if too_many := [one for one in how.k if one > k]:
        raise RecipeError(
            f"sweep.k holds {too_many[0]}, and candidates were written for {k} passages",
            hint="set retriever.k, and raglan evaluate --cache again",
        )
    if how.aggregate and not decode.labels:
        raise RecipeError("sweep.aggregate is for a closed set, and decode.labels is empty", hint="give decode.labels")
    grid: list[Sequence[Any]] = [how.threshold, how.seq, how.rel, how.sup, how.use, how.k or (k,)]
    grid.append(how.aggregate or (decode.aggregate,))
    size = math.prod(map(len, grid))
    if how.draws is None or how.draws >= size:
        return [Setting(*values) for values in itertools.product(*grid)]
    places = sorted(random.Random(seed).sample(range(size), how.draws))
    each = np.unravel_index(places, [len(values) for values in grid])
    return [Setting(*(values[i] for values, i in zip(grid, row, strict=True))) for row in zip(*each, strict=True)]


def sweep(table: Table, settings: Sequence[Setting], *, metric: str = "") -> Sweep:
    """What each setting comes to, by arithmetic alone."""
    began = time.perf_counter()
    measured = [_measured(table, one) for one in settings]
    seconds = time.perf_counter() - began
    ordered = sorted(measured, key=lambda one: (-one.quality, one.rate, one.generated))
    return Sweep(metric, len(table.r), ordered, _front(ordered), seconds)


def _measured(table: Table, one: Setting) -> Setting:
    weights = Weights(one.seq, one.rel, one.sup, one.use)
    found = table.outcome(one.threshold, weights, k=one.k, how=one.aggregate)  # type: ignore[arg-type]
    return Setting(
        one.threshold, one.seq, one.rel, one.sup, one.use, one.k, one.aggregate,
        float(found.quality.mean()), float(found.retrieved.mean()), float(found.generated.mean()),
    )  # fmt: skip


def _front(ordered: Sequence[Setting]) -> list[Setting]:
    """Settings that no other equals or beats in everything and beats in something; of equal ones the first."""
    front: list[Setting] = []
    for one in ordered:  # whatever beats it stands before it
        if not any(other.rate <= one.rate and other.generated <= one.generated for other in front):
            front.append(one)
    return front


def _confirmed(
    system: RAG, decode: SelfRagDecode, one: Setting, examples: Sequence[Example], measure: Callable[[str, Example], float]
) -> Setting:
    """With the quality of live answers."""
    system.decode = one.decode(decode)
    _, hits = system.search([e.query for e in examples], one.k, history=[e.history for e in examples])
    answers = system.read([e.query for e in examples], hits, history=[e.history for e in examples])
    live = [measure(answer.text, example) for answer, example in zip(answers, examples, strict=True)]
    return Setting(**{**vars(one), "confirmed": float(np.mean(live))})


def _rescored(
    settings: EvaluateSettings, decode: SelfRagDecode, examples: Sequence[Example], answers: Sequence[Answer | None],
    calls: int, seconds: float,
) -> Rescored:  # fmt: skip
    known = [(answer, example) for answer, example in zip(answers, examples, strict=True) if answer is not None]
    figures: dict[str, float] = {}
    for name in (name for name in settings.metrics if name in OF_A_QUESTION):
        if settings.answers_are == "regex":
            values = [regex_match(answer.text, example.answers) for answer, example in known]
        else:
            values = [OF_A_QUESTION[name](answer.text, gold(example, decode)) for answer, example in known]
        figures[name] = float(np.nanmean(values)) if values else float("nan")
    traces = [answer.trace or {} for answer, _ in known]
    retrieved = sum(bool(trace.get("retrieved")) for trace in traces)
    generated = sum(int(trace.get("cost", {}).get("generated", 0)) for trace in traces)
    rate = retrieved / len(known) if known else float("nan")
    return Rescored(figures, rate, generated, len(answers), len(answers) - len(known), calls, seconds)


def _decode(recipe: Recipe) -> SelfRagDecode:
    if not isinstance(recipe.decode, SelfRagDecode):
        raise RecipeError(f"decode.kind is {recipe.decode.kind!r}, which writes no candidates", hint="decode.kind: self_rag")
    return recipe.decode


def _questions(recipe: Recipe) -> Path:
    if recipe.sweep is not None and recipe.sweep.questions is not None:
        return recipe.sweep.questions
    if recipe.evaluate is None:
        raise RecipeError(f"recipe {recipe.name!r} evaluates nothing", hint="give it `evaluate: {questions: …}`")
    return recipe.evaluate.questions


def _patterns(recipe: Recipe) -> bool:
    return recipe.evaluate is not None and recipe.evaluate.answers_are == "regex"


def _limit(recipe: Recipe) -> int | None:
    if recipe.sweep is not None and recipe.sweep.limit is not None:
        return recipe.sweep.limit
    return recipe.evaluate.limit if recipe.evaluate is not None else None


def _examples(recipe: Recipe, base: KnowledgeBase, questions: Path) -> list[Example]:
    """Only questions with answers count."""
    examples = load_examples(questions, base.corpus, limit=_limit(recipe), seed=recipe.seed)
    return [example for example in examples if example.answers]


def _asked(system: RAG, examples: Sequence[Example], cache: CandidateCache) -> Asked:
    """The questions with what is found for them, which the candidates keep."""
    queries, history = [e.query for e in examples], [e.history for e in examples]
    _, hits = system.search(queries, max(system.k, cache.k), history=history)
    cache.found, cache.k = [_rows(found) for found in hits], max(system.k, cache.k)
    return _put(examples, [found[: system.k] for found in hits], system.k)


def _asked_before(cache: CandidateCache, base: KnowledgeBase, examples: Sequence[Example], k: int) -> Asked:
    """The questions with what was found for them when the candidates were written."""
    if k > cache.k:
        raise RecipeError(
            f"retriever.k is {k}, and candidates were written for {cache.k} passages",
            hint="raglan evaluate --rescore --fill writes the others",
        )
    return _put(examples, [_hits(found[:k], base) for found in cache.found], k)


def _put(examples: Sequence[Example], hits: Sequence[Sequence[Hit]], k: int) -> Asked:
    queries, history = [e.query for e in examples], [e.history for e in examples]
    return Asked(queries, hits, None, history, choices=[choices_of(example) for example in examples], k=k)


def _rows(hits: Sequence[Hit]) -> list[tuple[int, float]]:
    return [(hit.row, hit.score) for hit in hits]


def _hits(rows: Sequence[tuple[int, float]], base: KnowledgeBase) -> list[Hit]:
    return [Hit(base.corpus[row], row, score, rank) for rank, (row, score) in enumerate(rows, 1)]


def _generator(system: RAG) -> Any:
    return system.generator


def _find(system: RAG, cache: CandidateCache) -> Callable[[str, int], list[Hit]]:
    """Further searches, which the candidates keep."""

    def find(query: str, k: int) -> list[Hit]:
        hits = list(system.retriever.retrieve([query], max(k, cache.k))[0])
        cache.searches[query] = _rows(hits)
        return hits[:k]

    return find


def _found_before(cache: CandidateCache, base: KnowledgeBase) -> Callable[[str, int], list[Hit]]:
    def find(query: str, k: int) -> list[Hit]:
        if query not in cache.searches:
            raise Uncached(f"no recorded run searched for {shortened(query)!r}", hint=FILL)
        return _hits(cache.searches[query][:k], base)

    return find


def _open(recipe: Recipe, name: str, parts: Parts, decode: SelfRagDecode, questions: Path) -> CandidateCache:
    folder = candidates_folder(recipe, name)
    try:
        return CandidateCache.open(folder, _identity(recipe, parts, decode, questions))
    except CheckpointError as fault:
        fault.hint = "raglan evaluate RECIPE --cache writes them"
        raise


def _identity(recipe: Recipe, parts: Parts, decode: SelfRagDecode, questions: Path) -> dict[str, Any]:
    """What candidates depend on. Thresholds, weights, aggregation and a smaller K are not in it."""
    retriever = recipe.retriever.model_dump(mode="json", exclude={"k"})
    encoder = [recipe.knowledge.encoder.model_dump(mode="json"), str(parts.query_encoder), str(parts.passage_encoder)]
    text = {"instruction", "force_isrel"}
    source = file_fingerprint(questions) if questions.is_file() else str(questions)
    return {
        "model": fingerprint([
            recipe.generator.model_dump(mode="json"), str(parts.generator),
            folder_stamp(recipe.generator.model), folder_stamp(parts.generator),
        ]),
        "prompt": fingerprint([recipe.prompt.model_dump(mode="json"), decode.model_dump(mode="json", include=text)]),
        "knowledge base": KnowledgeBase.open(parts.knowledge or recipe.knowledge.path).version,
        "retriever": fingerprint([retriever, encoder]),
        "questions": fingerprint([source, _limit(recipe), recipe.seed]),
        "form": decode.form, "limit": decode.limit, "format": FORMAT,
    }  # fmt: skip
