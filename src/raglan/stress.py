"""The questions of an evaluation again, with worse passages: noise, other orders, other retrievers; deltas against clean.

    runs/<name>/robustness/<system>-<fingerprint>/
        answers.jsonl    one line a question: what was read and answered under every condition
        manifest.json    figures of every condition, and what it differs from clean by, with 95 % intervals

    clean                    K passages: gold, and the best hits behind it
    noise/KIND/present/r     the share r of the hits exchanged for one kind of noise, gold left where it was
    noise/KIND/absent/r      K passages without gold, of which the share r is noise; with r = 0 of no kind
    distractors/0            gold alone
    distractors/KIND/n       gold, and n passages of one kind of noise beside it
    conflict/1               one gold passage against one that says something else instead
    majority/1               gold and a second passage that answers, against one that says something else
    order/i                  the retrieved passages, as they came (0) and in other permutations
    retriever/INDEX          the best passages of every index in turn

Passages are made by `perturb`, behind its guard, once, from the first system's search; all systems read the same ones, and gold
stands at the same place whatever the kind. A question without gold passages, for which there is too little noise of a kind, or
whose gold found no room in the prompt, is missing under that condition, and the share of these stands beside every figure.
Intervals draw whole documents, since questions about one passage fail together. Deltas are paired by question: noise against
clean, distractors and conflicts against gold alone, orders against the search's, retrievers against the recipe's own.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from raglan.artifact import MANIFEST, alone, fingerprint, read_manifest, write_manifest
from raglan.cited import Cited, counted
from raglan.corpus import Corpus
from raglan.data import choices_of, load_examples
from raglan.decode import CHOOSES, NEEDS_PRIOR
from raglan.errors import CorpusError, RecipeError
from raglan.evaluate import compared_systems, system_fingerprint
from raglan.metrics import Interval, answer_recall, exact_match, f1, regex_match, regex_recall
from raglan.perturb import (
    Guard,
    Slot,
    Sources,
    arrange,
    deal_positions,
    decidable,
    fill,
    gold_slots,
    neighbours,
    orders,
    second_voice,
    sides,
    sweep,
)
from raglan.rag import RAG
from raglan.recipe import EvaluateSettings, NoiseKind, Recipe, RobustnessSettings
from raglan.records import Answer, Example, Hit, Passage
from raglan.refusals import abstained
from raglan.robustness import follows
from raglan.stages import Parts
from raglan.stress_figures import ALONE, CLEAN, compare_conditions, summarise_conditions

__all__ = [
    "Condition",
    "Robustness",
    "compare_robustness",
    "conditions",
    "draw_prompts",
    "evaluate_robustness",
    "open_robustness",
    "robustness_folder",
]

log = logging.getLogger(__name__)
KIND = "robustness"
FORM = 2  # of what is measured: what another form measured is measured again
MADE = ("counterfactual", "near_duplicate", "garbled", "boilerplate")  # in no corpus
WITHOUT_GOLD = ("hard", "neighbour", "random", "other_gold", "boilerplate")
Prompts = dict[str, dict[str, tuple[Slot, ...]]]  # question id → condition → slots


@dataclass(frozen=True, slots=True)
class Condition:
    """What noise a prompt holds: a share of its hits (`noise`), so many passages (`distractors`), or a contradiction."""

    form: Literal["noise", "distractors", "conflict", "majority"]
    kind: NoiseKind | None = None
    gold: bool = True
    amount: Fraction = Fraction(0)

    @property
    def name(self) -> str:
        amount = f"{float(self.amount):g}"
        if self.form == "distractors":
            return f"distractors/{self.kind}/{amount}" if self.kind else ALONE
        if self.form in ("conflict", "majority"):
            return f"{self.form}/{amount}"
        return (
            CLEAN
            if self.gold and not self.amount
            else f"noise/{self.kind or 'none'}/{'present' if self.gold else 'absent'}/{amount}"
        )


@dataclass(frozen=True)
class Robustness:
    """What a system is worth under every condition.

    Attributes:
        figures: condition → figure → mean; "delta" is that of "right" against clean, or against the recipe's own index.
        missing: condition → share of questions that it could not be made for; where that is all of them, it has no figures.
        seconds: condition → what one answer took on average, with others beside it in a batch.
        abstention: kind of noise/ratio → precision, recall, F1, over-abstention and hallucination; gold present is answerable.
        orders: "flip" and "disagreement". retrievers: names, "own", "worst" and "unseen"; "worst_right", the share of right
            answers of the worst one, and "spread", the best one's lead on it.
    """

    system: str
    folder: Path
    figures: dict[str, dict[str, Interval]]
    missing: dict[str, float]
    seconds: dict[str, float]
    abstention: dict[str, dict[str, Interval]]
    orders: dict[str, Interval]
    retrievers: dict[str, Any]


def evaluate_robustness(recipe: Recipe) -> list[Robustness]:
    """The untuned system and the tuned one under every condition of `evaluate.robustness`, or found measured already.

    Raises:
        RecipeError: the recipe asks for none, no question has what any condition needs, or an index that the knowledge base
            lacks.
    """
    settings = recipe.evaluate
    if settings is None or settings.robustness is None:
        raise RecipeError(f"recipe {recipe.name!r} measures no robustness", hint="give it `evaluate: {robustness: {}}`")
    systems = compared_systems(recipe)
    prompts: Prompts | None = None
    for name, parts in systems:
        folder = robustness_folder(recipe, settings, name, parts)
        with alone(folder.with_name(f".{folder.name}.lock"), (folder / MANIFEST).is_file) as to_do:
            if to_do:
                if prompts is None:
                    prompts = _prompts_of(recipe, settings, systems[0][1])
                _measure(recipe, settings, name, parts, prompts=prompts, folder=folder)
    return [open_robustness(robustness_folder(recipe, settings, *system)) for system in systems]


def robustness_folder(recipe: Recipe, settings: EvaluateSettings, name: str, parts: Parts) -> Path:
    """Where the measurement of these settings, questions and parts is, or will be."""
    asked = None if settings.robustness is None else settings.robustness.model_dump(mode="json")
    first = compared_systems(recipe)[0][1]  # its search gives the noise
    named = [system_fingerprint(recipe, settings, one) for one in (parts, first)]
    return recipe.run / "robustness" / f"{name}-{fingerprint([*named, asked, FORM])[:8]}"


def open_robustness(folder: Path) -> Robustness:
    """A measurement from its folder. Raises CheckpointError."""
    told = read_manifest(folder, KIND)
    figures, rates, orders, indexes = (_read_back(told[name]) for name in ("figures", "abstention", "orders", "retrievers"))
    return Robustness(told["system"], folder, figures, told["missing"], told["seconds"], rates, orders, indexes)


def compare_robustness(before: Robustness, after: Robustness) -> dict[str, dict[str, Interval]]:
    """after − before under each condition, paired by question, from the answers of both; see `compare_conditions`.

    Raises:
        RecipeError: they answered different questions.
    """
    rows = []
    for system in (before, after):
        with open(system.folder / "answers.jsonl", encoding="utf-8") as file:
            rows.append([json.loads(line) for line in file])
    if [row["id"] for row in rows[0]] != [row["id"] for row in rows[1]]:
        raise RecipeError(
            f"{before.folder} and {after.folder} answer different questions",
            hint="measure both with the same evaluate.questions and limit",
        )
    return compare_conditions(*rows, seed=read_manifest(before.folder, KIND)["seed"])


def conditions(settings: RobustnessSettings) -> list[Condition]:
    """All conditions of noise, each once; clean is always among them, and gold alone where something is compared with it."""
    found = [Condition("noise")]
    for kind in settings.noise:
        for gold in settings.gold:
            if gold == "absent" and kind not in WITHOUT_GOLD:
                continue
            ratios = [Fraction(str(ratio)) for ratio in settings.ratios]
            found += [Condition("noise", kind if ratio else None, gold == "present", ratio) for ratio in ratios]
    forms: tuple[Literal["conflict", "majority"], ...] = ("conflict", "majority") if "counterfactual" in settings.noise else ()
    conflict = [Condition(form, "counterfactual", amount=Fraction(1)) for form in forms]
    found += [Condition("distractors")] if settings.distractors or conflict else []
    beside = settings.noise if settings.distractor_kinds is None else settings.distractor_kinds
    counts = [Fraction(count) for count in settings.distractors if count]
    found += [Condition("distractors", kind, amount=count) for kind in beside for count in counts]
    return list(dict.fromkeys(found + conflict))


def draw_prompts(
    examples: Sequence[Example],
    hits: Sequence[Sequence[Hit]],
    corpus: Corpus,
    settings: RobustnessSettings,
    *,
    k: int,
    seed: int,
    regex: bool = False,
) -> Prompts:
    """The passages of every question under every condition of noise that can be made for it.

    Args:
        hits: what a search found for each question, best first: the first k are clean, `hard` noise is from all of them.
        regex: answers are patterns: the guard asks whether one fits, and no false value is made.
    """
    gold = {example.id: _passages(example.relevant, corpus) for example in examples}
    guard = _guard(examples, corpus, regex=regex)
    shown = [replace(example, answers=()) for example in examples] if regex else examples
    every = [passage for own in gold.values() for passage in own]  # the guard knows a question's own
    values = list(dict.fromkeys(answer for example in shown for answer in example.answers))
    sources = {
        example.id: Sources(found[: settings.depth], "", corpus, neighbours(corpus, gold[example.id]), every, values)
        for example, found in zip(examples, hits, strict=True)
    }
    drawn: Prompts = {example.id: {} for example in examples}
    for condition in conditions(settings):
        made: dict[str, tuple[Slot, ...]] = {}
        for example, found in zip(shown, hits, strict=True):
            if gold[example.id]:
                slots = _slots(condition, example, found[:k], gold[example.id], sources[example.id], guard, seed)
                made |= {example.id: slots} if slots is not None else {}
        for identity, slots in _arranged(made, settings, seed).items():
            drawn[identity][condition.name] = slots
    return drawn


def _slots(
    condition: Condition, example: Example, hits: Sequence[Hit], gold: Sequence[Passage], sources: Sources, guard: Guard,
    seed: int,
) -> tuple[Slot, ...] | None:  # fmt: skip
    """One prompt; None where there is too little noise of the kind."""
    try:
        if condition.form == "noise":
            return sweep(
                example, hits, gold=gold, kind=condition.kind or "hard", ratio=condition.amount,
                gold_absent=not condition.gold, sources=sources, guard=guard, seed=seed,
            )  # fmt: skip
        placed = gold_slots(gold if condition.form == "distractors" else gold[:1])
        if condition.form == "majority":
            second = second_voice(example, gold, sources=sources, guard=guard, seed=seed)
            if second is None:
                return None
            placed = (*placed, second)
        return fill(
            example, placed, kinds=[str(condition.kind)] * int(condition.amount), gold=gold, sources=sources, guard=guard,
            seed=seed, conflict=condition.kind == "counterfactual", found="replace", fallback=(),
        )  # fmt: skip
    except CorpusError as why:
        log.debug("%s, %s: %s", condition.name, example.id, why.message)
        return None


def _arranged(made: Mapping[str, tuple[Slot, ...]], settings: RobustnessSettings, seed: int) -> dict[str, tuple[Slot, ...]]:
    """Gold at its place: positions dealt evenly, the same ones under every kind of noise."""
    sizes = [(len(slots), sum(slot.role == "gold" for slot in slots)) for slots in made.values()]
    places = deal_positions(sizes, seed=seed)
    return {
        name: arrange(slots, seed=f"{seed}:{name}", order=settings.position, positions=own)
        for (name, slots), own in zip(made.items(), places, strict=True)
    }


def _guard(examples: Sequence[Example], corpus: Corpus, *, regex: bool) -> Guard:
    answers = () if regex else [answer for example in examples for answer in example.answers]
    known = counted(corpus, answers)
    patterns = {example.id: example.answers for example in examples}

    def fits(example: Example, passage: Passage) -> bool:
        return bool(regex_recall([f"{passage.title}\n{passage.text}"], patterns[example.id]))

    return Guard(known, judge=fits if regex else None)


def _passages(ids: Sequence[str], corpus: Corpus) -> list[Passage]:
    return [corpus[row] for identity in ids if (row := corpus.row(identity)) is not None]


def _prompts_of(recipe: Recipe, settings: EvaluateSettings, parts: Parts) -> Prompts:
    asked = settings.robustness
    assert asked is not None
    system = parts.open(recipe)
    made = [kind for kind in dict.fromkeys((*asked.noise, *(asked.distractor_kinds or ()))) if kind in MADE]
    if made and system.decode.kind in NEEDS_PRIOR:
        raise RecipeError(
            f"decode.kind {system.decode.kind} weighs passages by their vectors, and {made[0]} passages are in no index",
            hint=f"leave {', '.join(made)} out of evaluate.robustness, or decode with concat",
        )
    corpus = system.retriever.base.corpus
    examples = _examples(recipe, settings, corpus)
    depth = min(max(asked.depth, system.k), len(corpus))
    _, hits = system.search([e.query for e in examples], depth, history=[e.history for e in examples])
    return draw_prompts(examples, hits, corpus, asked, k=system.k, seed=recipe.seed, regex=settings.answers_are == "regex")


def _examples(recipe: Recipe, settings: EvaluateSettings, corpus: Corpus) -> list[Example]:
    every = load_examples(settings.questions, corpus, limit=settings.limit, seed=recipe.seed)
    examples = [example for example in every if example.answers]
    asked = settings.robustness
    without = asked is not None and (asked.orders > 1 or asked.retrievers != ())  # orders and retrievers need no gold
    if not examples or not (without or any(example.relevant for example in examples)):
        raise RecipeError(
            f"no question of {settings.questions} has both answers and relevant passages",
            hint="noise stands beside gold passages: name them under `relevant`, or ask for orders and retrievers",
        )
    return examples


def _measure(
    recipe: Recipe, settings: EvaluateSettings, name: str, parts: Parts, *, prompts: Prompts, folder: Path
) -> None:  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    system = parts.open(recipe)
    asked = settings.robustness
    assert asked is not None
    examples = _examples(recipe, settings, system.retriever.base.corpus)
    indexes = _indexes(system, asked)
    answers_of = list(dict.fromkeys(answer for example in examples for answer in example.answers))
    cited = Cited(system.retriever.base.corpus, answers_of, regex=settings.answers_are == "regex")
    seconds: dict[str, float] = {}
    tried: list[str] = []
    rows: list[dict[str, Any]] = [
        {"id": e.id, "query": e.query, "answers": list(e.answers), "group": _group(e, system), "conditions": {}, "lost": {}}
        for e in examples
    ]
    for condition, given in chain(
        _noisy(system, examples, prompts, asked), _ordered(system, examples, asked, recipe.seed),
        _retrieved(system, examples, indexes),
    ):  # fmt: skip
        tried.append(condition)
        if not given:
            log.warning("%s: no question has gold passages and enough such noise; it is missing for all", condition)
            continue
        log.info("reading: %s, %d questions", condition, len(given))
        began = time.monotonic()
        answers = _read(system, [examples[place] for place in given], list(given.values()))
        seconds[condition] = round((time.monotonic() - began) / len(given), 4)
        for (place, hits), answer in zip(given.items(), answers, strict=True):
            slots = prompts[examples[place].id].get(condition, ())
            if gold := _lost(slots, answer):
                rows[place]["lost"][condition] = {"gold": gold, "dropped": [hit.passage.id for hit in answer.dropped]}
            else:
                rows[place]["conditions"][condition] = _row(examples[place], answer, hits, slots, settings, asked, cited)
    with open(folder / "answers.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    figures = summarise_conditions(rows, own=f"retriever/{system.retriever.name}", seed=recipe.seed)
    figures["missing"] = {condition: figures["missing"].get(condition, 1.0) for condition in tried}
    figures["retrievers"] |= {"unseen": list(asked.unseen)} if indexes else {}
    content = {
        "system": name, "recipe": recipe.name, "knowledge": system.retriever.base.version, "questions": len(rows),
        "source": str(settings.questions), "settings": asked.model_dump(mode="json"), "seconds": seconds,
        "seed": recipe.seed,
    }  # fmt: skip
    write_manifest(folder, KIND, content | _plain(figures))


def _read(system: RAG, examples: Sequence[Example], hits: Sequence[Sequence[Hit]]) -> list[Answer]:
    choices = [choices_of(example) for example in examples] if system.decode.kind in CHOOSES else []
    return system.read([e.query for e in examples], hits, history=[e.history for e in examples], choices=choices)


def _plain(value: Any) -> Any:
    """Intervals as JSON objects, wherever they stand."""
    if isinstance(value, Interval):
        return asdict(value)
    return {key: _plain(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _read_back(value: Any) -> Any:
    """JSON objects that were intervals as intervals, wherever they stand."""
    if isinstance(value, dict) and set(value) == {"mean", "low", "high", "n"}:
        return Interval(**value)
    return {key: _read_back(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _indexes(system: RAG, settings: RobustnessSettings) -> list[str]:
    known = list(system.retriever.base.settings.indexes)
    wanted = known if settings.retrievers is None else list(settings.retrievers)
    for name in (*wanted, *settings.unseen):
        if name not in known:
            raise RecipeError(
                f"evaluate.robustness names the index {name!r}; the knowledge base has {', '.join(known)}",
                hint="add it under knowledge.indexes and build again",
            )
    own = system.retriever.name
    return list(dict.fromkeys([own, *wanted])) if wanted else []


def _group(example: Example, system: RAG) -> str:
    """The document of the first gold passage: questions about it are drawn together."""
    corpus = system.retriever.base.corpus
    rows = [row for identity in example.relevant[:1] if (row := corpus.row(identity)) is not None]
    return f"document {corpus[rows[0]].document or corpus[rows[0]].id}" if rows else f"question {example.id}"


def _noisy(
    system: RAG, examples: Sequence[Example], prompts: Prompts, settings: RobustnessSettings
) -> Iterator[tuple[str, dict[int, list[Hit]]]]:
    """Condition → question's place → passages, for the questions that it can be made for."""
    corpus = system.retriever.base.corpus
    for name in (condition.name for condition in conditions(settings)):
        there = {place: slots for place, e in enumerate(examples) if (slots := prompts[e.id].get(name)) is not None}
        yield name, {place: _hits(slots, corpus) for place, slots in there.items()}


def _hits(slots: Sequence[Slot], corpus: Corpus) -> list[Hit]:
    """Row −1 is in no corpus: made by an operator."""
    rows = [-1 if slot.origin == "made" else corpus.row(slot.passage.id) for slot in slots]
    return [
        Hit(slot.passage, -1 if row is None else row, slot.score or 0.0, rank)
        for rank, (slot, row) in enumerate(zip(slots, rows, strict=True), 1)
    ]


def _ordered(
    system: RAG, examples: Sequence[Example], settings: RobustnessSettings, seed: int
) -> Iterator[tuple[str, dict[int, list[Hit]]]]:
    if settings.orders < 2 or system.k < 2:
        return
    _, found = system.search([e.query for e in examples], system.k, history=[e.history for e in examples])
    dealt = [
        orders(len(hits), settings.orders, seed=f"{seed}:{example.id}:order")
        for example, hits in zip(examples, found, strict=True)
    ]
    for number in range(settings.orders):
        given = {
            place: [hits[at] for at in own[number]]
            for place, (hits, own) in enumerate(zip(found, dealt, strict=True))
            if len(own) > max(1, number)
        }
        if given:
            yield f"order/{number}", given


def _retrieved(
    system: RAG, examples: Sequence[Example], indexes: Sequence[str]
) -> Iterator[tuple[str, dict[int, list[Hit]]]]:  # fmt: skip
    own = system.retriever
    for index in indexes:
        other = replace(system, retriever=own.by(index))
        _, found = other.search([e.query for e in examples], system.k, history=[e.history for e in examples])
        if len(examples) > 1 and len({tuple(hit.row for hit in hits) for hits in found}) == 1 and found[0]:
            log.warning("index %s finds the same passages for all %d questions", index, len(examples))
        yield f"retriever/{index}", dict(enumerate(map(list, found)))


def _lost(slots: Sequence[Slot], answer: Answer) -> str:
    """A gold passage of the prompt that found no room in it, so that it is another condition."""
    dropped = {hit.passage.id for hit in answer.dropped}
    return next((slot.passage.id for slot in slots if slot.role == "gold" and slot.passage.id in dropped), "")


def _row(
    example: Example, answer: Answer, given: Sequence[Hit], slots: Sequence[Slot], settings: EvaluateSettings,
    asked: RobustnessSettings, cited: Cited,
) -> dict[str, Any]:  # fmt: skip
    """One answer, with what it was read from. `slots`: the records of the passages, where `perturb` put them there."""
    regex = settings.answers_are == "regex"
    hits = answer.read if answer.trace is None else given
    found = {*answer.hits, *answer.dropped}
    slots = [slot for slot in slots if slot.passage.id in {hit.passage.id for hit in hits}]
    good = [number for number, slot in enumerate(slots, 1) if slot.role != "noise"]
    told_cited = cited.figures(answer.text, example, hits, good=good)
    false = [slot.value for slot in slots if slot.value]
    figures = {
        "right": _right(answer.text, example, asked.correct, regex=regex),
        "f1": math.nan if regex else f1(answer.text, example.answers),
        "declined": float(abstained(answer.text, () if regex else example.answers)),
        "follow": float(follows(answer.text, false, example.answers)) if false else math.nan,
        "citation_precision": told_cited["citation_precision"],
        "citation_recall": told_cited["citation_recall"],
        "truncated": float(answer.truncated), "unfinished": float(not answer.finished),
        "dropped": len(answer.dropped) / len(found) if found else math.nan,
        "tokens": float(len(answer.ids)) if answer.ids else math.nan,  # some decodings do not say
    }  # fmt: skip
    told: dict[str, Any] = {"text": answer.text, "passages": [hit.passage.id for hit in hits]}
    if slots:
        made = [slot for slot in slots if slot.origin == "made"]
        told |= {
            "slots": [slot.record() for slot in slots], "decidable": decidable(slots),
            "sides": dict(zip(("true", "false"), sides(slots), strict=True)),
            "made": {slot.passage.id: {"title": slot.passage.title, "text": slot.passage.text} for slot in made},
        }  # fmt: skip
    return told | {"figures": {name: None if math.isnan(value) else value for name, value in figures.items()}}


def _right(text: str, example: Example, correct: str, *, regex: bool) -> float:
    if correct == "em":
        return regex_match(text, example.answers) if regex else exact_match(text, example.answers)
    return regex_recall([text], example.answers) if regex else answer_recall([text], example.answers)
