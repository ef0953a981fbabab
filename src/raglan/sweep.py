"""Self-RAG's settings tried on candidates that were written once: rescoring and sweeps, without a model call.

    runs/<name>/candidates/<system>/      written by `raglan evaluate --cache`
    runs/<name>/sweep.json                written by `raglan evaluate --sweep`

Written is once what a model says to every question with every passage, and without one; in the long form, a tree of segments.
From then on thresholds, weights, hard constraints, K and aggregation are arithmetic, and so are beam, depth and the combination
of a path's steps as far as the tree goes. A sweep tries them on development questions and gives the front on which no setting
is better in quality, retrieval rate and ids written at once (`sweep_settings` has the settings, `sweep_trials` their figures).
Short answers are weighed and trees are searched as arrays, all else is answered by the live decoding itself on what was
written, setting by setting. A setting that comes to a segment that was never written has no figures: it needs generation, which
`fill` gives it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from raglan.artifact import file_fingerprint, fingerprint, write_json
from raglan.data import choices_of, load_examples
from raglan.decode import Asked
from raglan.decode.self_rag.cache import CandidateCache, Uncached
from raglan.decode.self_rag.planting import plant
from raglan.decode.self_rag.recording import FILL, Absent, record, replay
from raglan.errors import CheckpointError, RecipeError
from raglan.evaluate import OF_A_QUESTION, gold
from raglan.knowledge import KnowledgeBase
from raglan.metrics import regex_match
from raglan.rag import RAG
from raglan.recipe import EvaluateSettings, Recipe, SelfRagDecode, SweepSettings
from raglan.records import Answer, Example, Hit
from raglan.stages import Parts, finished_parts, folder_stamp
from raglan.sweep_settings import NAMES, WEIGHTS, Setting, axes, settings_of, widest
from raglan.sweep_trials import Sweep, Trials, sweep
from raglan.text import shortened
from raglan.weights import read_json

__all__ = ["Rescored", "candidates_folder", "open_sweep", "rescore", "swept", "write_candidates"]

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
    wide = widest(decode, recipe.sweep)
    record(_generator(system), asked, decode, cache=cache, retrieve=_find(system, cache), wide=wide)
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
        cache.trees = plant(cache, generator, asked, decode, retrieve=_found_before(cache, system.retriever.base))
        cache.save(candidates_folder(recipe, name))
    else:
        base = KnowledgeBase.of(recipe.knowledge, path=parts.knowledge)
        examples = _examples(recipe, base, questions)
        absent, asked = Absent(cache, recipe.prompt.self_rag), _asked_before(cache, base, examples, recipe.retriever.k)
        answers = replay(absent, asked, decode, cache=cache, retrieve=_found_before(cache, base))
    assert recipe.evaluate is not None
    return _rescored(recipe.evaluate, decode, examples, answers, calls, time.monotonic() - began)


def swept(recipe: Recipe, *, fill: bool = False, confirm: bool = False) -> Sweep:
    """The recipe's sweep, from the candidates alone; written to `sweep.json`.

    Args:
        fill: whether segments that were never written are written now, and kept.
        confirm: whether the settings of the front answer once more, live.
    """
    decode, questions, how = _decode(recipe), _questions(recipe), recipe.sweep or SweepSettings()
    name, parts = finished_parts(recipe)[-1]
    cache = _open(recipe, name, parts, decode, questions)
    base = KnowledgeBase.of(recipe.knowledge, path=parts.knowledge)
    examples = _examples(recipe, base, questions)
    known: Callable[..., float] = regex_match if _patterns(recipe) else OF_A_QUESTION[how.metric]

    def measure(text: str, example: Example) -> float:
        return float(known(text, example.answers if known is regex_match else gold(example, decode)))

    settings = settings_of(how, decode, k=min(recipe.retriever.k, cache.k), seed=recipe.seed)
    system = parts.open(recipe) if fill or confirm else None
    says = _generator(system) if system is not None and fill else Absent(cache, recipe.prompt.self_rag)
    find = _find(system, cache) if system is not None and fill else _found_before(cache, base)
    asked = {k: _asked_before(cache, base, examples, k) for k in {one.k for one in settings}}

    def replayed(own: SelfRagDecode, k: int) -> list[Answer | None]:
        return replay(says, asked[k], own, cache=cache, fill=fill, retrieve=find)

    before = says.cost.copy()
    planted = partial(plant, cache, says, asked[max(asked)], retrieve=_found_before(cache, base))
    trials = Trials(cache, decode, lambda text, place: measure(text, examples[place]), replayed, planted=planted, fill=fill)
    found = sweep(settings, trials, metric=how.metric, questions=len(examples))
    found = replace(found, calls=(says.cost - before).calls, made_of=_made_of(recipe))
    if fill:
        cache.trees = planted(decode)
        cache.save(candidates_folder(recipe, name))
    if confirm:
        assert system is not None
        found = replace(found, front=[_confirmed(system, decode, one, examples, measure) for one in found.front])
    write_json(recipe.run / "sweep.json", found.told())
    return found


def open_sweep(recipe: Recipe) -> dict[str, Any] | None:
    """What `sweep.json` says, if it is there and was made of the recipe as it is now."""
    path = recipe.run / "sweep.json"
    if not path.is_file() or not isinstance(recipe.decode, SelfRagDecode):
        return None
    told = read_json(path)
    try:
        return told if told.get("made_of") == _made_of(recipe) else None
    except RecipeError:  # a grid that does not go with the decoding as it is now
        return None


def _confirmed(
    system: RAG, decode: SelfRagDecode, one: Setting, examples: Sequence[Example], measure: Callable[[str, Example], float]
) -> Setting:
    """With the quality of live answers."""
    system.decode = one.decode(decode)
    _, hits = system.search([e.query for e in examples], one.k, history=[e.history for e in examples])
    answers = system.read(
        [e.query for e in examples], hits, history=[e.history for e in examples], choices=[choices_of(e) for e in examples],
        again=one.k if decode.form == "long" else 0,
    )  # fmt: skip
    live = [measure(answer.text, example) for answer, example in zip(answers, examples, strict=True)]
    return replace(one, confirmed=float(np.mean(live)))


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


def _made_of(recipe: Recipe) -> str:
    """Names candidates, grid, and what of the decoding is not in the grid."""
    decode, how, (_, parts) = _decode(recipe), recipe.sweep or SweepSettings(), finished_parts(recipe)[-1]
    tried = [name for name, values in axes(how, decode).items() if values != (None,)]
    fixed = decode.model_dump(mode="json", exclude={NAMES.get(name, name) for name in tried if name not in WEIGHTS})
    fixed["weights"] = {name: value for name, value in fixed["weights"].items() if name not in tried}
    if "threshold" in tried:
        del fixed["target_rate"]
    own = _identity(recipe, parts, decode, _questions(recipe))
    return fingerprint([own, _patterns(recipe), how.k or recipe.retriever.k, fixed, how.model_dump(mode="json")])


def _identity(recipe: Recipe, parts: Parts, decode: SelfRagDecode, questions: Path) -> dict[str, Any]:
    """What candidates depend on. Thresholds, weights, aggregation and a smaller K are not in it."""
    retriever = recipe.retriever.model_dump(mode="json", exclude={"k"})
    towers = [str(parts.query_encoder), str(parts.passage_encoder)]
    own = [folder_stamp(model) for model in recipe.knowledge.own_query_models]
    encoder = [recipe.knowledge.encoder.model_dump(mode="json"), *towers, *own]
    text = {"instruction", "force_isrel"}
    source = file_fingerprint(questions) if questions.is_file() else str(questions)
    return {
        "model": fingerprint([
            recipe.generator.model_dump(mode="json"), str(parts.generator),
            folder_stamp(recipe.generator.model), folder_stamp(parts.generator),
        ]),
        "prompt": fingerprint([recipe.prompt.model_dump(mode="json"), decode.model_dump(mode="json", include=text)]),
        "knowledge base": KnowledgeBase.of(recipe.knowledge, path=parts.knowledge).searched,
        "retriever": fingerprint([retriever, encoder]),
        "questions": fingerprint([source, _limit(recipe), recipe.seed]),
        "form": decode.form, "limit": decode.limit, "format": FORMAT,
    }  # fmt: skip
