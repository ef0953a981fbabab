"""The questions of an evaluation again, with worse passages: noise, other orders, other retrievers; deltas against clean.

    runs/<name>/robustness/<system>-<fingerprint>/
        answers.jsonl    one line a question: what was read and answered under every condition
        manifest.json    figures of every condition, and what it differs from clean by, with 95 % intervals

    clean                   the gold passages alone
    noise/KIND/present/n    gold among n passages of noise              ratio r of S slots: n = ⌊r·S + ½⌋
    noise/KIND/absent/n     the n passages of noise alone; with n = 0 no passage
    order/i                 the retrieved passages, as they came (0) and in other permutations
    retriever/INDEX         the best passages of every index in turn

Noise is drawn once, by the first system, and read by all of them; its lower ratios are parts of the higher ones. Every passage
of noise is guarded: no gold, no gold's text, no second copy, no answer in it. A question that lacks gold passages or enough
noise is missing under that condition, and the share of these stands beside every figure. Intervals draw whole documents, since
questions about one passage fail together. Deltas are paired by question.
"""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import Any

from raglan.artifact import MANIFEST, fingerprint, read_manifest, write_manifest
from raglan.corpus import Corpus
from raglan.data import choices_of, load_examples
from raglan.decode import CHOOSES
from raglan.errors import RecipeError
from raglan.evaluate import compared_systems, system_fingerprint
from raglan.metrics import Interval, answer_recall, bootstraps, exact_match, f1, regex_match, regex_recall
from raglan.rag import RAG
from raglan.recipe import EvaluateSettings, NoiseKind, Recipe, RobustnessSettings
from raglan.records import Answer, Example, Hit
from raglan.robustness import abstained, abstention, citation_figures, constant, disagreement, flipped, marks
from raglan.train import Parts

__all__ = [
    "CLEAN",
    "Condition",
    "Robustness",
    "conditions",
    "draw_noise",
    "evaluate_robustness",
    "open_robustness",
    "permutations",
    "robustness_folder",
    "summarise_conditions",
]

log = logging.getLogger(__name__)
KIND = "robustness"
CLEAN = "clean"
FIGURES = ("right", "f1", "declined", "citation_precision", "citation_recall", "truncated", "unfinished")
Noise = Mapping[str, Mapping[NoiseKind, Sequence[str]]]  # question id → kind → passage ids


@dataclass(frozen=True, slots=True)
class Condition:
    """So many passages of a kind of noise, with or without gold."""

    kind: NoiseKind | None
    gold: bool
    count: int

    @property
    def name(self) -> str:
        return (
            CLEAN if self.gold and not self.count else f"noise/{self.kind}/{'present' if self.gold else 'absent'}/{self.count}"
        )


@dataclass(frozen=True)
class Robustness:
    """What a system is worth under every condition.

    Attributes:
        figures: condition → figure → mean; "delta" is that of "right" against clean, or against the recipe's own index.
        missing: condition → share of questions that it could not be made for.
        abstention: kind of noise/n → precision, recall, F1, over-abstention and hallucination of gold present against absent.
        orders: "flip" and "disagreement". retrievers: "own", "worst", "spread", "unseen".
    """

    system: str
    folder: Path
    figures: dict[str, dict[str, Interval]]
    missing: dict[str, float]
    abstention: dict[str, dict[str, float]]
    orders: dict[str, Interval]
    retrievers: dict[str, Any]


def evaluate_robustness(recipe: Recipe) -> list[Robustness]:
    """The untuned system and the tuned one under every condition of `evaluate.robustness`, or found measured already.

    Raises:
        RecipeError: the recipe asks for none, no question has gold passages, or an index that the knowledge base lacks.
    """
    settings = recipe.evaluate
    if settings is None or settings.robustness is None:
        raise RecipeError(f"recipe {recipe.name!r} measures no robustness", hint="give it `evaluate: {robustness: {}}`")
    systems = compared_systems(recipe)
    noise: Noise | None = None
    for name, parts in systems:
        folder = robustness_folder(recipe, settings, name, parts)
        if (folder / MANIFEST).is_file():
            continue
        if noise is None:
            noise = _noise_of(recipe, settings, systems[0][1])
        _measure(recipe, settings, name, parts, noise=noise, folder=folder)
    return [open_robustness(robustness_folder(recipe, settings, *system)) for system in systems]


def robustness_folder(recipe: Recipe, settings: EvaluateSettings, name: str, parts: Parts) -> Path:
    """Where the measurement of these settings, questions and parts is, or will be."""
    asked = None if settings.robustness is None else settings.robustness.model_dump(mode="json")
    first = compared_systems(recipe)[0][1]  # its search gives the noise
    named = [system_fingerprint(recipe, settings, one) for one in (parts, first)]
    return recipe.run / "robustness" / f"{name}-{fingerprint([*named, asked])[:8]}"


def open_robustness(folder: Path) -> Robustness:
    """A measurement from its folder. Raises CheckpointError."""
    told = read_manifest(folder, KIND)
    figures = {name: {key: Interval(**value) for key, value in own.items()} for name, own in told["figures"].items()}
    orders = {name: Interval(**value) for name, value in told["orders"].items()}
    return Robustness(told["system"], folder, figures, told["missing"], told["abstention"], orders, told["retrievers"])


def conditions(settings: RobustnessSettings) -> list[Condition]:
    """All conditions of noise, each once; clean is always the first."""
    found = [Condition(None, True, 0)]
    for kind in settings.noise:
        for gold in settings.gold:
            counts = [math.floor(Fraction(str(ratio)) * settings.slots + Fraction(1, 2)) for ratio in settings.ratios]
            found += [_condition(kind, gold == "present", count) for count in counts]
    found += [_condition("hard", True, count) for count in settings.distractors]
    return list(dict.fromkeys(found))


def _condition(kind: NoiseKind, gold: bool, count: int) -> Condition:
    return Condition(kind if count else None, gold, count)  # no noise is of no kind


def draw_noise(
    examples: Sequence[Example], hits: Sequence[Sequence[Hit]], corpus: Corpus, settings: RobustnessSettings, *, seed: int,
    regex: bool = False,
) -> Noise:  # fmt: skip
    """Guarded passages of every kind for every question, at most as many as a condition wants.

    Args:
        hits: what a search found for each question, best first; `hard` noise comes from there.
        regex: answers are patterns.
    """
    kinds = list(dict.fromkeys((*settings.noise, *(["hard"] if any(settings.distractors) else []))))
    wanted = max(condition.count for condition in conditions(settings))
    gold = [identity for example in examples for identity in example.relevant]
    noise: dict[str, dict[NoiseKind, list[str]]] = {}
    for example, found in zip(examples, hits, strict=True):
        sources = {
            "hard": (hit.row for hit in found[: settings.depth]),
            "random": _drawn(random.Random(f"{seed}/{example.id}/random"), len(corpus)),
            "neighbour": _neighbours(example, corpus),
            "other_gold": _others(random.Random(f"{seed}/{example.id}/other_gold"), gold, corpus),
        }
        noise[example.id] = {kind: list(islice(_guarded(example, sources[kind], corpus, regex), wanted)) for kind in kinds}
    return noise


def _drawn(chance: random.Random, n: int) -> Iterator[int]:
    """Rows in a random order, without holding it; at most as many tries as would show nearly every row of a small corpus."""
    if n <= 10_000:
        return iter(chance.sample(range(n), n))
    return (chance.randrange(n) for _ in range(10_000))


def _neighbours(example: Example, corpus: Corpus) -> Iterator[int]:
    """Rows of the gold passages' documents, the nearest first."""
    for identity in example.relevant:
        row = corpus.row(identity)
        if row is not None:
            yield from sorted(
                corpus.rows_of_document(corpus[row].document), key=lambda other, own=row: (abs(other - own), other)
            )


def _others(chance: random.Random, gold: Sequence[str], corpus: Corpus) -> Iterator[int]:
    for identity in chance.sample(gold, len(gold)):
        row = corpus.row(identity)
        if row is not None:
            yield row


def _guarded(example: Example, rows: Iterable[int], corpus: Corpus, regex: bool) -> Iterator[str]:
    """Ids of rows that are no gold, no copy of what is there already, and hold no answer."""
    gold = [row for identity in example.relevant if (row := corpus.row(identity)) is not None]
    seen = {corpus.text_hashes[row].tobytes() for row in gold}
    occurs = regex_recall if regex else answer_recall
    for row in rows:
        own = corpus.text_hashes[row].tobytes()
        if own in seen:
            continue
        seen.add(own)
        passage = corpus[row]
        if not occurs([f"{passage.title}\n{passage.text}"], example.answers):
            yield passage.id


def permutations(size: int, count: int, *, seed: str) -> list[tuple[int, ...]]:
    """`count` different orders of `size` things, the given one first; fewer where there are fewer."""
    chance, first = random.Random(seed), tuple(range(size))
    found = {first: None}
    while len(found) < min(count, math.factorial(size)):
        found[tuple(chance.sample(first, size))] = None
    return list(found)


def _noise_of(recipe: Recipe, settings: EvaluateSettings, parts: Parts) -> Noise:
    assert settings.robustness is not None
    system = parts.open(recipe)
    corpus = system.retriever.base.corpus
    examples = _examples(recipe, settings, corpus)
    depth = min(settings.robustness.depth, len(corpus))
    _, hits = system.search([e.query for e in examples], depth, history=[e.history for e in examples])
    return draw_noise(examples, hits, corpus, settings.robustness, seed=recipe.seed, regex=settings.answers_are == "regex")


def _examples(recipe: Recipe, settings: EvaluateSettings, corpus: Corpus) -> list[Example]:
    every = load_examples(settings.questions, corpus, limit=settings.limit, seed=recipe.seed)
    examples = [example for example in every if example.answers]
    if not any(example.relevant for example in examples):
        raise RecipeError(
            f"no question of {settings.questions} has both answers and relevant passages",
            hint="evaluate.robustness puts noise beside gold passages; name them under `relevant`",
        )
    return examples


def _measure(
    recipe: Recipe, settings: EvaluateSettings, name: str, parts: Parts, *, noise: Noise, folder: Path
) -> None:  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    system = parts.open(recipe)
    asked = settings.robustness
    assert asked is not None
    examples = _examples(recipe, settings, system.retriever.base.corpus)
    indexes = _indexes(system, asked)
    rows = [
        {"id": e.id, "query": e.query, "answers": list(e.answers), "group": _group(e, system), "conditions": {}}
        for e in examples
    ]
    for condition, given in chain(
        _noisy(system, examples, noise, asked, recipe.seed), _ordered(system, examples, asked, recipe.seed),
        _retrieved(system, examples, indexes),
    ):  # fmt: skip
        if not given:
            log.warning("%s: no question has gold passages and so much noise; the condition is left out", condition)
            continue
        log.info("reading: %s, %d questions", condition, len(given))
        answers = _read(system, [examples[place] for place in given], list(given.values()))
        for (place, hits), answer in zip(given.items(), answers, strict=True):
            rows[place]["conditions"][condition] = _row(examples[place], answer, hits, settings, asked)  # type: ignore[index]
    with open(folder / "answers.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    figures = summarise_conditions(rows, own=f"retriever/{system.retriever.name}", seed=recipe.seed)
    figures["retrievers"] |= {"unseen": list(asked.unseen)} if indexes else {}
    content = {
        "system": name, "recipe": recipe.name, "knowledge": system.retriever.base.version, "questions": len(rows),
        "source": str(settings.questions), "settings": asked.model_dump(mode="json"),
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
    system: RAG, examples: Sequence[Example], noise: Noise, settings: RobustnessSettings, seed: int
) -> Iterator[tuple[str, dict[int, list[Hit]]]]:
    """Condition → question's place → passages, for the questions that it can be made for."""
    for condition in conditions(settings):
        given: dict[int, list[Hit]] = {}
        for place, example in enumerate(examples):
            ids = noise[example.id][condition.kind][: condition.count] if condition.kind is not None else []
            if example.relevant and len(ids) == condition.count:
                gold = list(example.relevant) if condition.gold else []
                chance = random.Random(f"{seed}/{example.id}/{condition.name}")
                given[place] = _hits(_mixed(gold, ids, settings.position, chance), system.retriever.base.corpus)
        yield condition.name, given


def _mixed(gold: Sequence[str], noise: Sequence[str], position: str, chance: random.Random) -> list[str]:
    if position == "shuffled":
        return chance.sample([*gold, *noise], len(gold) + len(noise))
    before = {"first": 0, "middle": len(noise) // 2, "last": len(noise)}[position]
    return [*noise[:before], *gold, *noise[before:]]


def _hits(ids: Sequence[str], corpus: Corpus) -> list[Hit]:
    rows = [row for identity in ids if (row := corpus.row(identity)) is not None]
    return [Hit(corpus[row], row, 0.0, rank) for rank, row in enumerate(rows, 1)]


def _ordered(
    system: RAG, examples: Sequence[Example], settings: RobustnessSettings, seed: int
) -> Iterator[tuple[str, dict[int, list[Hit]]]]:
    if settings.orders < 2 or system.k < 2:
        return
    _, found = system.search([e.query for e in examples], system.k, history=[e.history for e in examples])
    orders = [
        permutations(len(hits), settings.orders, seed=f"{seed}/{example.id}/order")
        for example, hits in zip(examples, found, strict=True)
    ]
    for number in range(settings.orders):
        given = {
            place: [hits[at] for at in own[number]]
            for place, (hits, own) in enumerate(zip(found, orders, strict=True))
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


def _row(
    example: Example, answer: Answer, hits: Sequence[Hit], settings: EvaluateSettings, asked: RobustnessSettings
) -> dict[str, Any]:
    gold = [number for number, hit in enumerate(hits, 1) if hit.passage.id in example.relevant]
    cited = citation_figures(marks(answer.text), len(hits), good=gold, needed=gold)
    figures = {
        "right": _right(answer.text, example, asked.correct, regex=settings.answers_are == "regex"),
        "f1": math.nan if settings.answers_are == "regex" else f1(answer.text, example.answers),
        "declined": float(abstained(answer.text, () if settings.answers_are == "regex" else example.answers)),
        "citation_precision": cited["citation_precision"],
        "citation_recall": cited["citation_recall"] if marks(answer.text) else math.nan,
        "truncated": float(answer.truncated), "unfinished": float(not answer.finished),
    }  # fmt: skip
    return {
        "text": answer.text, "passages": [hit.passage.id for hit in hits],
        "figures": {name: None if math.isnan(value) else value for name, value in figures.items()},
    }  # fmt: skip


def _right(text: str, example: Example, correct: str, *, regex: bool) -> float:
    if correct == "em":
        return regex_match(text, example.answers) if regex else exact_match(text, example.answers)
    return regex_recall([text], example.answers) if regex else answer_recall([text], example.answers)


def summarise_conditions(rows: Sequence[Mapping[str, Any]], *, own: str, seed: int = 0) -> dict[str, Any]:
    """Figures of all rows by condition; `own` is the condition that other retrievers are compared with.

    Returns:
        figures, missing, abstention, orders, retrievers, as `Robustness` has them.
    """
    names = list(dict.fromkeys(name for row in rows for name in row["conditions"]))
    columns = {(name, figure): _column(rows, name, figure) for name in names for figure in FIGURES}
    for name in names:
        base = own if name.startswith("retriever/") else "order/0" if name.startswith("order/") else CLEAN
        if name != base and base in names:
            before = columns[base, "right"]
            columns[name, "delta"] = [b - a for a, b in zip(before, columns[name, "right"], strict=True)]
        if constant(columns[name, "right"]):
            log.warning("%s: every answer is alike right or wrong", name)
    columns |= {("order", figure): column for figure, column in _orders(rows, names).items()}
    there = {"\t".join(key): column for key, column in columns.items() if not all(map(math.isnan, column))}
    figures: dict[str, dict[str, Interval]] = {name: {} for name in (*names, "order")}
    for key, value in bootstraps(there, groups=[row["group"] for row in rows], seed=seed).items():
        name, _, figure = key.partition("\t")
        figures[name][figure] = value
    missing = {name: sum(name not in row["conditions"] for row in rows) / len(rows) for name in names}
    orders = figures.pop("order")
    return {
        "figures": figures,
        "missing": missing,
        "abstention": _abstention(rows, names),
        "orders": orders,
        "retrievers": _spread(figures, own),
    }


def _column(rows: Sequence[Mapping[str, Any]], name: str, figure: str) -> list[float]:
    """A figure question by question; NaN where it does not apply or the condition is missing."""
    values = [row["conditions"].get(name, {}).get("figures", {}).get(figure) for row in rows]
    return [math.nan if value is None else float(value) for value in values]


def _abstention(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of every kind and amount of noise: gold present is answerable, gold absent is not."""
    found: dict[str, dict[str, float]] = {}
    for absent in (name for name in names if "/absent/" in name):
        _, kind, _, count = absent.split("/")
        present = CLEAN if count == "0" else f"noise/{kind}/present/{count}"
        if present not in names:
            continue
        asked = [(value, True) for value in _column(rows, present, "declined")]
        asked += [(value, False) for value in _column(rows, absent, "declined")]
        kept = [(bool(value), can) for value, can in asked if not math.isnan(value)]
        rates = abstention([value for value, _ in kept], [can for _, can in kept])
        told = "no passage" if count == "0" else f"{kind}/{count}"
        found[told] = {name: value for name, value in rates.items() if not math.isnan(value)}
    return found


def _orders(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, list[float]]:
    """Flip and disagreement of every question."""
    orders = [_column(rows, name, "right") for name in names if name.startswith("order/")]
    if not orders:
        return {}
    right = [[bool(value) for value in own if not math.isnan(value)] for own in zip(*orders, strict=True)]
    return {"flip": [flipped(own) for own in right], "disagreement": [disagreement(own) for own in right]}


def _spread(figures: Mapping[str, Mapping[str, Interval]], own: str) -> dict[str, Any]:
    means = {
        name.removeprefix("retriever/"): own["right"].mean for name, own in figures.items() if name.startswith("retriever/")
    }
    if not means:
        return {}
    worst = min(means, key=lambda name: means[name])
    return {"own": own.removeprefix("retriever/"), "worst": worst, "spread": max(means.values()) - means[worst]}
