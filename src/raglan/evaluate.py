"""Evaluation: the same questions, before and after, closed book, with gold passages and with retrieved ones.

    runs/<name>/evaluations/<system>-<fingerprint>/
        predictions.jsonl   one line a question: hits, answers in every mode, every figure
        manifest.json       means with 95 % intervals

All questions are answered, those without gold answers too (`answerable`). Nothing is averaged over batches. A figure that does
not apply to a question (no gold answer, no relevant passage) is left out of that figure's mean, and n says so.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from raglan.answerable import ABSTENTION_TOGETHER, abstention_measures, abstention_whole, computes_nothing, kinds
from raglan.artifact import MANIFEST, alone, file_fingerprint, fingerprint, read_manifest, write_json, write_manifest
from raglan.calls import Usage
from raglan.calls.money import Price
from raglan.cited import Cited
from raglan.corpus import Corpus
from raglan.data import check_classes, choices_of, load_examples
from raglan.decode import CHOOSES
from raglan.documents import read_examples
from raglan.domains import domain
from raglan.errors import RecipeError
from raglan.knowledge import KnowledgeBase
from raglan.metrics import (
    Interval,
    RareWords,
    Whole,
    accuracy,
    answer_recall,
    bleu1,
    bleu1_counts,
    bootstrap,
    distinct,
    exact_match,
    f1,
    jackknife,
    mrr,
    ndcg,
    paired_bootstrap,
    paired_jackknife,
    q_bleu1,
    rare_f1,
    recall,
    regex_match,
    regex_recall,
    rouge_l,
    substring,
)
from raglan.rag import RAG
from raglan.recipe import (
    ClassifyDecode,
    DecodeSettings,
    EvaluateSettings,
    MoneySettings,
    PriceSettings,
    Recipe,
    SelfRagDecode,
)
from raglan.records import Answer, Example, Hit
from raglan.reflection import normalise_label
from raglan.refusals import abstained
from raglan.robustness import (
    char_3gram_recall,
    constant,
    macro_f1,
    outside_figures,
    quote_figures,
    str_em,
)
from raglan.stages import Parts, finished_parts, folder_stamp
from raglan.text import fold_numbers

__all__ = [
    "Evaluation",
    "compare",
    "compared_systems",
    "evaluate",
    "evaluate_recipe",
    "evaluation_folder",
    "gold",
    "interval_kinds",
    "open_evaluation",
    "spent",
    "system_fingerprint",
]

log = logging.getLogger(__name__)
KIND = "evaluation"
Measures = dict[str, Callable[[str, Example], float]]
OF_A_QUESTION = {
    "em": exact_match, "f1": f1, "accuracy": accuracy, "rouge_l": rouge_l, "q_bleu1": q_bleu1,
    "char_3gram": char_3gram_recall, "substring": substring,
    "match": lambda text, answers: answer_recall([text], answers),
    "declined": lambda text, answers: float(abstained(text, answers)),
}  # fmt: skip
TOGETHER = (  # of all answers, and no mean over questions
    "bleu1", "distinct_1", "distinct_2", "distinct_3", "macro_f1", *ABSTENTION_TOGETHER,
)  # fmt: skip




@dataclass(frozen=True)
class Evaluation:
    """Figures of one system: `rows` one dict a question, in order; `figures` name → mean with interval."""

    system: str
    folder: Path
    rows: list[dict[str, Any]]
    figures: dict[str, Interval]

    def values(self, name: str) -> list[float]:
        """A figure question by question; NaN where it does not apply."""
        return [math.nan if row["figures"].get(name) is None else row["figures"][name] for row in self.rows]


def evaluate_recipe(recipe: Recipe, *, every_stage: bool = False) -> list[Evaluation]:
    """The untuned system and the tuned one (or every stage between), measured or found measured already."""
    settings = recipe.evaluate
    if settings is None:
        raise RecipeError(f"recipe {recipe.name!r} evaluates nothing", hint="give it `evaluate: {questions: …}`")
    wanted = finished_parts(recipe) if every_stage else compared_systems(recipe)
    return [evaluate(recipe, settings, name, parts) for name, parts in wanted]


def compared_systems(recipe: Recipe) -> list[tuple[str, Parts]]:
    """The untuned system, and the tuned one if there is one."""
    systems = finished_parts(recipe)
    return [systems[0], *systems[1:][-1:]]


def evaluation_folder(recipe: Recipe, settings: EvaluateSettings, name: str, parts: Parts) -> Path:
    """Where the measurement of these settings, questions and parts is, or will be."""
    return recipe.run / "evaluations" / f"{name}-{system_fingerprint(recipe, settings, parts)[:8]}"


def evaluate(recipe: Recipe, settings: EvaluateSettings, name: str, parts: Parts) -> Evaluation:
    """Measure one system; a measurement with the same settings, questions and parts is not made twice."""
    folder = evaluation_folder(recipe, settings, name, parts)
    with alone(folder.with_name(f".{folder.name}.lock"), lambda: _is_whole(folder)) as to_do:
        if to_do:
            _write(recipe, settings, name, parts, folder=folder)
    _note_domain(recipe, name, folder)
    return open_evaluation(folder)


def _write(recipe: Recipe, settings: EvaluateSettings, name: str, parts: Parts, *, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.monotonic()
    system = parts.open(recipe)
    examples = load_examples(settings.questions, system.retriever.base.corpus, limit=settings.limit, seed=recipe.seed)
    if isinstance(recipe.decode, ClassifyDecode):
        check_classes(examples, recipe.decode)
    rows = measure(system, examples, settings)
    with open(folder / "predictions.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    figures = summarise(rows, settings)
    if computes_nothing(figures):
        log.warning(
            "nothing can be computed of the answers to %s: no question has answers or relevant passages that the metrics "
            "%s need; read predictions.jsonl, or name a judge (evaluate.judge)",
            settings.questions, ", ".join(settings.metrics),
        )  # fmt: skip
    write_manifest(folder, KIND, {
        "system": name, "recipe": recipe.name, "knowledge": system.retriever.base.version, "questions": len(rows),
        "asked": kinds(rows), "source": str(settings.questions), "k": system.k, "index": recipe.index, "seed": recipe.seed,
        "prompt": fingerprint(system.generator.prompt.words),
        "figures": {key: asdict(value) for key, value in figures.items()}, "spent": spent(rows),
        "seconds": round(time.monotonic() - began, 1),
    })  # fmt: skip


def _note_domain(recipe: Recipe, name: str, folder: Path) -> None:
    """Keep the verdict on `dataset` beside the figures. It is looked up anew: the set's name changes no figure."""
    found = domain(recipe, name)
    told = None if found is None else asdict(found)
    manifest = read_manifest(folder, KIND)
    if manifest.get("domain") != json.loads(json.dumps(told)):
        write_json(folder / MANIFEST, {**manifest, "domain": told})


def _is_whole(folder: Path) -> bool:
    """Whether a finished evaluation is there; older ones, which say nothing of kinds, read only questions with answers."""
    if not (folder / MANIFEST).is_file():
        return False
    return "asked" in read_manifest(folder, KIND) or all(row["answers"] for row in open_evaluation(folder).rows)


def open_evaluation(folder: Path) -> Evaluation:
    """An evaluation from its folder."""
    manifest = read_manifest(folder, KIND)
    with open(folder / "predictions.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    figures = {name: Interval(**value) for name, value in manifest["figures"].items()}
    return Evaluation(manifest["system"], folder, rows, figures)


def measure(system: RAG, examples: Sequence[Example], settings: EvaluateSettings) -> list[dict[str, Any]]:
    """One row a question: its hits, its answers and all its figures."""
    corpus = system.retriever.base.corpus
    system.retriever.check_k(system.k)
    deepest = min(len(corpus), max(*settings.k, system.k, 10))
    texts, hits = system.search([e.query for e in examples], deepest, history=[e.history for e in examples])
    measures = _measures(settings, system)
    answers_of = list(dict.fromkeys(answer for example in examples for answer in example.answers))
    cited = Cited(corpus, answers_of, regex=settings.answers_are == "regex")
    cut = any(hit.passage.document != hit.passage.id for found in hits for hit in found)
    of = (lambda identity: _document(identity, corpus)) if cut else None
    rows = [_retrieval_row(example, found, settings, system.k, of) for example, found in zip(examples, hits, strict=True)]
    if any(example.unanswerable for example in examples):
        measures |= abstention_measures(settings)
    for mode in settings.modes:
        places = [place for place, example in enumerate(examples) if mode != "gold" or example.relevant]
        given = [_given(mode, system, examples[place], hits[place]) for place in places]
        queries, history = [examples[place].query for place in places], [examples[place].history for place in places]
        choices = [choices_of(examples[place]) for place in places] if system.decode.kind in CHOOSES else []
        log.info("reading: %s, %d questions", mode, len(places))
        began, before = time.monotonic(), _billed(system)
        if mode == "retrieved" and system.turns is not None:  # each turn searches for itself
            answers = system.answer(queries, history=history)
            given = [list(answer.hits) for answer in answers]
        else:
            answers = system.read(
                queries, given, history=history, texts=[texts[place] for place in places], choices=choices,
                again=system.k if mode == "retrieved" else 0,
            )  # fmt: skip
        took = round((time.monotonic() - began) / max(1, len(places)), 4)
        bill = _bill(before, _billed(system), len(places))
        for place, answer, found in zip(places, answers, given, strict=True):
            _add_reading(rows[place], mode, examples[place], answer, found, settings, measures, cited)
            rows[place]["predictions"][mode] |= {"seconds": took, **({"tokens": len(answer.ids)} if answer.ids else {}), **bill}
    return rows


def summarise(rows: Sequence[dict[str, Any]], settings: EvaluateSettings) -> dict[str, Interval]:
    """Mean and 95 % interval of every figure that any row has, and the figures that all answers have together."""
    names = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    values = {name: [row["figures"].get(name) for row in rows] for name in names}
    measured = {name: [v for v in column if v is not None] for name, column in values.items()}
    measured = {name: own for name, own in measured.items() if not name.endswith("/dropped") or any(own)}  # some were left out
    figures = {name: bootstrap(column) for name, column in measured.items() if column}
    for name in (name for name in figures if name.rpartition("/")[2] in settings.metrics and constant(measured[name])):
        log.warning("%s is %g for every question; look at predictions.jsonl", name, measured[name][0])
    abstaining = ABSTENTION_TOGETHER if kinds(rows)["unanswerable"] else ()
    for mode in settings.modes:
        together = [f"{mode}/{metric}" for metric in (*settings.metrics, *abstaining) if metric in TOGETHER]
        wholes = {name: _whole(rows, name) for name in together}
        figures |= {name: jackknife(whole) for name, whole in wholes.items() if not math.isnan(whole.value)}
    return figures


def spent(
    rows: Sequence[dict[str, Any]], *, price: PriceSettings | Literal["free"] | None = None
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Of each mode, what one answer took on average: tokens written and seconds, with others beside it in a batch.

    Answers with a trace tell more: calls, tokens and passages, for which their own seconds stand. With a price, and where a
    server has told the tokens of every reply, `usd_per_1000` is what a thousand answers cost.
    """
    costs = _took(rows)
    if price is None:
        return costs
    for mode, own in costs.items():
        bills = [row["predictions"][mode].get("billed") for row in rows if mode in row["predictions"]]
        if None not in bills:
            own["usd_per_1000"] = _dollars([Usage(**bill) for bill in bills], price)
    return costs


def _took(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    costs: dict[str, list[Mapping[str, float]]] = {}
    for row in rows:
        for mode, prediction in row["predictions"].items():
            plain = {name: prediction[name] for name in ("tokens", "seconds") if name in prediction}
            costs.setdefault(mode, []).append(prediction["trace"]["cost"] if "trace" in prediction else plain)
    return {
        mode: {
            name: round(sum(cost.get(name, 0) for cost in own) / len(own), 4)
            for name in dict.fromkeys(name for cost in own for name in cost)
        }
        for mode, own in costs.items()
        if any(own)
    }


def _dollars(bills: Sequence[Usage], price: PriceSettings | Literal["free"]) -> float:
    """Of a thousand answers as these."""
    dear = Price.of(MoneySettings(price=price))
    pico = sum((b.prompt - b.cached) * dear.input + b.cached * dear.cached + b.output * dear.output for b in bills)
    return round(pico / len(bills) / 10**9, 6)


def _billed(system: RAG) -> tuple[Usage, int] | None:
    """What a generator's server has counted so far, and how many replies without a count; None where no server writes."""
    server = getattr(system.generator, "server", None)
    return None if server is None else (server.billed, server.untold)


def _bill(before: tuple[Usage, int] | None, after: tuple[Usage, int] | None, answers: int) -> dict[str, dict[str, float]]:
    """An answer's share of the tokens in between; nothing where some of them are not known."""
    if before is None or after is None or before[1] != after[1] or not answers:
        return {}
    names = ("prompt", "cached", "output")
    return {"billed": {name: (getattr(after[0], name) - getattr(before[0], name)) / answers for name in names}}


def interval_kinds(figures: Iterable[str]) -> str:
    """How the intervals of these figures were made, in words."""
    metrics = [name.rpartition("/")[2] for name in figures]
    together = list(dict.fromkeys(metric for metric in metrics if metric in TOGETHER))
    kinds = ["bootstrap over questions"] if len([m for m in metrics if m not in TOGETHER]) else []
    kinds += [f"jackknife for {', '.join(together)}"] if together else []
    return ", by ".join(kinds)


def _whole(rows: Sequence[dict[str, Any]], name: str) -> Whole:
    """A figure of all answers of a mode together."""
    mode, _, metric = name.partition("/")
    if metric in ABSTENTION_TOGETHER:
        return abstention_whole(rows, mode, metric)
    if metric == "bleu1":
        return bleu1([row["counts"][name] for row in rows if name in row["counts"]])
    if metric == "macro_f1":
        read = [row for row in rows if mode in row["predictions"] and row["answers"]]
        return macro_f1([row["predictions"][mode]["text"] for row in read], [row["answers"][0] for row in read])
    texts = [row["predictions"][mode]["text"] for row in rows if mode in row["predictions"]]
    return distinct(texts, int(metric.removeprefix("distinct_")))


def compare(before: Evaluation, after: Evaluation) -> dict[str, Interval]:
    """after − before for every figure both have, paired by question."""
    if [row["id"] for row in before.rows] != [row["id"] for row in after.rows]:
        raise RecipeError(
            f"{before.folder} and {after.folder} answer different questions",
            hint="measure both with the same evaluate.questions and limit",
        )
    return {name: _difference(before, after, name) for name in before.figures if name in after.figures}


def _difference(before: Evaluation, after: Evaluation, name: str) -> Interval:
    metric = name.rpartition("/")[2]
    if metric in TOGETHER:
        return paired_jackknife(_whole(before.rows, name), _whole(after.rows, name))
    return paired_bootstrap(before.values(name), after.values(name))


def _retrieval_row(
    example: Example, hits: Sequence[Hit], settings: EvaluateSettings, kept: int, documents: Callable[[str], str] | None
) -> dict[str, Any]:
    """`documents` tells the document of a passage id, where that is another thing than the passage."""
    ranking = [hit.passage.id for hit in hits]
    grades = dict(example.grades) or dict.fromkeys(example.relevant, 1)
    texts = [f"{hit.passage.title}\n{hit.passage.text}" for hit in hits]
    figures = {f"recall@{k}": recall(ranking, example.relevant, k) for k in settings.k}
    if documents is not None:
        wanted = [documents(identity) for identity in example.relevant]
        found = [hit.passage.document for hit in hits]
        figures |= {f"document_recall@{k}": recall(found, wanted, k) for k in settings.k}
    figures |= {"mrr@10": mrr(ranking, example.relevant, 10), "ndcg@10": ndcg(ranking, grades, 10)}
    if example.answers:
        occurs = regex_recall if settings.answers_are == "regex" else answer_recall
        figures |= {f"answer_recall@{k}": occurs(texts[:k], example.answers) for k in settings.k}
    return {
        "id": example.id, "query": example.query, "history": list(example.history), "answers": list(example.answers),
        "relevant": list(example.relevant), **({"unanswerable": True} if example.unanswerable else {}),
        "hits": [
            {"id": h.passage.id, "title": h.passage.title, "text": h.passage.text, "score": h.score, "rank": h.rank}
            for h in hits[: max(10, kept)]
        ],
        "predictions": {}, "counts": {},
        "figures": {name: None if math.isnan(value) else value for name, value in figures.items()},
    }  # fmt: skip


def _document(identity: str, corpus: Corpus) -> str:
    row = corpus.row(identity)
    return identity if row is None else corpus[row].document


def _given(mode: str, system: RAG, example: Example, hits: Sequence[Hit]) -> list[Hit]:
    if mode == "closed_book":
        return []
    if mode == "retrieved":
        return list(hits[: system.k])
    corpus = system.retriever.base.corpus
    rows = [row for identity in example.relevant if (row := corpus.row(identity)) is not None][: system.k]
    return [Hit(corpus[row], row, 0.0, rank) for rank, row in enumerate(rows, 1)]


def gold(example: Example, decode: DecodeSettings) -> Sequence[str]:
    """The answers of a question as its decoding spells them: of Self-RAG's closed set A … E "2" is B, and of 1 … 5 "B" is 2."""
    closed: Sequence[str] = ()
    if isinstance(decode, SelfRagDecode):
        closed = decode.labels or (() if choices_of(example) else decode.options)
    return [normalise_label(answer, closed) or answer for answer in example.answers] if closed else example.answers


def _measures(settings: EvaluateSettings, system: RAG) -> Measures:
    """Name → (answer's text, example) → figure, NaN where it does not apply."""
    fold = fold_numbers if settings.fold_numbers else str
    known: Measures = {
        name: lambda text, example, name=name, measure=measure: measure(  # type: ignore[misc]
            fold(text), [*map(fold, gold(example, system.decode))]
        ) if example.answers or name == "declined" else math.nan
        for name, measure in OF_A_QUESTION.items()
    }  # fmt: skip
    if settings.answers_are == "regex":  # words have no overlap with a pattern
        known = {
            "em": lambda text, example: regex_match(text, example.answers) if example.answers else math.nan,
            "match": lambda text, example: regex_recall([text], example.answers) if example.answers else math.nan,
        }
    known |= {
        "str_em": lambda text, example: str_em(text, example.metadata.get("short_answers", ())),
        "kf1": lambda text, example: f1(text, told) if (told := _knowledge(example, system)) else math.nan,
    }
    if "rare_f1" in settings.metrics:
        reference = read_examples(settings.rare_reference or settings.questions)
        rare = RareWords.of(answer for example in reference for answer in example.answers)
        known["rare_f1"] = lambda text, example: rare_f1(text, example.answers, rare=rare)
    return {name: known[name] for name in settings.metrics if name in known}


def _knowledge(example: Example, system: RAG) -> list[str]:
    """What the answer should tell of: the example's own `knowledge`, a sentence or several, or its relevant passages."""
    given = example.metadata.get("knowledge")
    if given:
        return [given] if isinstance(given, str) else [str(sentence) for sentence in given]
    corpus = system.retriever.base.corpus
    return [corpus[row].text for identity in example.relevant if (row := corpus.row(identity)) is not None]


def _add_reading(
    row: dict[str, Any],
    mode: str,
    example: Example,
    answer: Answer,
    given: Sequence[Hit],
    settings: EvaluateSettings,
    measures: Measures,
    cited: Cited,
) -> None:
    shown = answer.read if answer.trace is None else tuple(given)
    row["predictions"][mode] = {
        "text": answer.text, "logprob": answer.logprob, "finished": answer.finished, "truncated": answer.truncated,
        "passages": [hit.passage.id for hit in shown],
    }  # fmt: skip
    row["predictions"][mode] |= {"dropped": [hit.passage.id for hit in answer.dropped]} if answer.dropped else {}
    figures: dict[str, float] = {}
    if "citations" in settings.metrics and shown:
        figures |= cited.figures(answer.text, example, shown)
    if "quotes" in settings.metrics and shown:
        texts = [(hit.passage.text, hit.passage.id in example.relevant) for hit in shown]
        wanted = [text for text, relevant in texts if relevant] if example.relevant else None
        figures |= quote_figures(answer.text, [text for text, _ in texts], wanted)
    if "bleu1" in settings.metrics and settings.answers_are != "regex" and example.answers:
        row["counts"][f"{mode}/bleu1"] = bleu1_counts(answer.text, example.answers)
    figures |= {name: measure(answer.text, example) for name, measure in measures.items()}
    figures |= {"truncated": float(answer.truncated), "unfinished": float(not answer.finished)}
    figures |= {"dropped": len(answer.dropped) / len(found)} if (found := {*answer.hits, *answer.dropped}) else {}
    if answer.trace is not None:  # Self-RAG says itself what it read
        row["predictions"][mode] |= {"passages": [hit.passage.id for hit in answer.hits], "trace": answer.trace}
        read = [f"{hit.passage.title}\n{hit.passage.text}" for hit in answer.hits]
        answers = () if settings.answers_are == "regex" else example.answers
        figures |= outside_figures(answer.text, answers, read) if read else {}
        figures |= {"retrieval_rate": float(answer.trace["retrieved"])} if given else {}
        if given and answer.trace["form"] == "long":
            decided = [float(told["retrieve"]) for told in answer.trace["decisions"]]
            figures["segment_retrieval_rate"] = sum(decided) / len(decided)
    row["figures"] |= {f"{mode}/{name}": None if math.isnan(value) else value for name, value in figures.items()}


def system_fingerprint(recipe: Recipe, settings: EvaluateSettings, parts: Parts) -> str:
    """Names everything that a system's answers to these questions depend on."""
    base = KnowledgeBase.of(recipe.knowledge).searched
    shared = recipe.model_dump(mode="json", include={"prompt", "generator", "retriever", "decode", "seed"})
    files = [settings.questions, *([settings.rare_reference] if settings.rare_reference else [])]
    questions = [file_fingerprint(path) if path.is_file() else str(path) for path in files]
    encoder = recipe.knowledge.encoder.model_dump(mode="json")
    folders = (
        recipe.generator.model,
        recipe.retriever.query_encoder,
        recipe.retriever.rewrite.model,
        recipe.knowledge.encoder.query_model,
        *recipe.knowledge.own_query_models,
    )
    stamps = [folder_stamp(folder) for folder in folders]
    asked = settings.model_dump(mode="json", exclude={"robustness", "judge", "dataset", "price"})  # measured apart
    if not settings.fold_numbers:
        del asked["fold_numbers"]
    return fingerprint([base, shared, encoder, stamps, asked, questions, asdict(parts)])
