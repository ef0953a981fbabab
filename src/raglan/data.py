"""From questions to training rows: relevant ids resolved, passages chosen, prompts rendered.

Passages are retrieved once, before training, never inside a collator. The same seed gives the same rows in the same order.
What a row was made of, its passages, its prompt and who found them, can be kept beside it (`raglan.datapoints`).
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from raglan.corpus import Corpus
from raglan.datapoints import is_first_rank, write_points
from raglan.documents import read_examples
from raglan.errors import CorpusError
from raglan.feedback import feedback_examples, without
from raglan.generator import HFGenerator
from raglan.lessons import lessons
from raglan.metrics import answer_recall, found_answers
from raglan.progress import track
from raglan.prompt import Rendered
from raglan.recipe import ClassifyDecode, FeedbackData, InstructionMix, LessonData, QuestionData
from raglan.records import Context, DataPoint, Example, Passage
from raglan.retriever import Retriever
from raglan.text import pattern
from raglan.wordings import wordings

__all__ = [
    "answer_rows",
    "check_classes",
    "choices_of",
    "class_texts",
    "learned_answers",
    "load_examples",
    "resolve",
    "stage_examples",
]

log = logging.getLogger(__name__)
REGEX_DEPTH = 1000  # the paper's
Data = QuestionData | LessonData | FeedbackData


class Chosen(NamedTuple):
    """A passage of a row. `score` and `rank` are the search's; a relevant one that it did not find has no score, and the rank
    behind all that it did."""

    passage: Passage
    score: float | None
    rank: int


@dataclass(frozen=True)
class _Made:
    """A row and what it was made of. `searched`: whether its passages were searched for."""

    row: dict[str, Any]
    example: Example
    answer: str
    given: Sequence[Chosen]
    prompt: Rendered
    searched: bool


def load_examples(path: Path, corpus: Corpus, *, limit: int | None = None, seed: int = 0, split: str = "test") -> list[Example]:
    """Questions whose relevant passages are ids of this corpus.

    Args:
        limit: keep so many, drawn with `seed`, in file order.
        split: which qrels of a BEIR folder.

    Raises:
        CorpusError: a relevant id that is not in the corpus, evidence that is not in its document.
    """
    examples = read_examples(path, split=split)
    if limit is not None and limit < len(examples):
        kept = set(random.Random(seed).sample(range(len(examples)), limit))
        examples = [example for place, example in enumerate(examples) if place in kept]
    return [resolve(example, corpus, str(path)) for example in examples]


def resolve(example: Example, corpus: Corpus, source: str) -> Example:
    """The example with passage ids as `relevant`.

    A passage id stands for itself; a document id for those of its passages that hold a gold answer (all, if none does);
    evidence {document, quote} for the passages that overlap the quote.
    """
    found: list[str] = []
    for identity in example.relevant:
        found += _passages_of(identity, example, corpus, source)
    for item in example.metadata.get("evidence", ()):
        found += _passages_with(item, example, corpus, source)
    grades = {name: grade for name, grade in example.grades.items() if corpus.row(name) is not None}
    return replace(example, relevant=tuple(dict.fromkeys(found)), grades=grades)


def _passages_of(identity: str, example: Example, corpus: Corpus, source: str) -> list[str]:
    if corpus.row(identity) is not None:
        return [identity]
    passages = [corpus[row] for row in corpus.rows_of_document(identity)]
    if not passages:
        raise CorpusError(
            f"{source}: question {example.id!r} names {identity!r} as relevant, which is not in the corpus",
            hint="ids are those of knowledge.documents; check that questions and documents belong together",
        )
    return [p.id for p in passages if answer_recall([p.text], example.answers)] or [p.id for p in passages]


def _passages_with(item: dict[str, Any], example: Example, corpus: Corpus, source: str) -> list[str]:
    quote = "".join(str(item.get("quote", "")).split())
    passages = [corpus[row] for row in corpus.rows_of_document(str(item["document"]))]
    if not passages:
        raise CorpusError(
            f"{source}: question {example.id!r} names document {item['document']!r}, which is not in the corpus",
            hint="names are those that `raglan build` gave: the file's path below knowledge.documents",
        )
    if not quote:
        return [passage.id for passage in passages]
    letters = _letters(passages)
    begin = "".join(letter for _, letter in letters).find(quote)
    if begin < 0:
        raise CorpusError(
            f"{source}: question {example.id!r} quotes words that are not in {item['document']!r}: {item['quote']!r}",
            hint="quotes are compared without white space, everything else must agree",
        )
    start, end = letters[begin][0], letters[begin + len(quote) - 1][0] + 1
    found = [passage for passage in passages if passage.start < end and start < passage.end]
    return [p.id for p in found if answer_recall([p.text], example.answers)] or [p.id for p in found]


def _letters(passages: Sequence[Passage]) -> list[tuple[int, str]]:
    """(offset in the document, letter) of a document's passages without white space; what neighbours share counts once."""
    letters, at = [], 0
    for passage in passages:
        for offset, letter in enumerate(passage.text, passage.start):
            if offset >= at and not letter.isspace():
                letters.append((offset, letter))
        at = max(at, passage.end)
    return letters


def stage_examples(
    data: Data, corpus: Corpus, seed: int, *, held_out: Sequence[Example] = (), needs: str = "answers"
) -> list[Example]:
    """The examples a stage learns from.

    Args:
        held_out: questions that are measured; feedback on them is not learned.
        needs: `answers`, or `passages` where people's judgements of passages are what is learned.

    Raises:
        CorpusError: none has what is needed, or one is of the split `test`.
    """
    if isinstance(data, LessonData):
        return lessons(corpus, data.count, seed=seed)
    if isinstance(data, FeedbackData):
        examples, name = feedback_examples(data, corpus, held_out=held_out), str(data.path or "the feedback store")
    else:
        examples, name = load_examples(data.path, corpus, limit=data.limit, seed=seed, split="train"), str(data.path)
    tested = [example.id for example in examples if example.metadata.get("split") == "test"]
    if tested and not data.allow_test:
        raise CorpusError(
            f"{name} holds {len(tested)} questions of the split `test`: {', '.join(tested[:10])}",
            hint="train on another split's file, or set data.allow_test: true",
        )
    useful = [e for e in examples if (e.answers if needs == "answers" else e.grades or e.relevant)]
    if len(useful) < len(examples):
        told = "an answer" if needs == "answers" else "a judged passage"
        log.warning("%s: %d questions without %s are left out of training", name, len(examples) - len(useful), told)
    if not useful:
        told = "an answer" if needs == "answers" else "judged passages"
        raise CorpusError(
            f"{name} holds no question with {told}", hint="training needs `answers`, or `grades` for target: given"
        )
    return [*useful, *(_replayed(data, corpus, seed, useful) if isinstance(data, FeedbackData) else [])]


def _replayed(data: FeedbackData, corpus: Corpus, seed: int, learned: Sequence[Example]) -> list[Example]:
    """Questions that were learned before, drawn with the seed, so that learning from feedback does not forget them."""
    if data.replay is None:
        return []
    examples, _ = without(load_examples(data.replay, corpus, split="train"), learned)
    answered = [
        replace(example, answers=example.answers[:1], metadata={**example.metadata, "replayed": True})
        for example in examples
        if example.answers
    ]
    return random.Random(seed).sample(answered, min(len(answered), round(len(learned) * data.replay_times)))


def check_classes(examples: Sequence[Example], decode: ClassifyDecode) -> None:
    """Raises CorpusError at the first answer that is none of the classes."""
    for example in examples:
        for answer in example.answers:
            if answer not in decode.labels:
                raise CorpusError(
                    f"question {example.id!r} has the answer {answer!r}, which is none of decode.labels: "
                    f"{', '.join(decode.labels)}",
                    hint="answers are the classes' names, spelt as in the recipe",
                )


def choices_of(example: Example) -> tuple[str, ...]:
    """The `choices` that a question comes with, none where it has none.

    Raises:
        CorpusError: fewer than two, one that is empty or occurs twice, or an answer that is none of them.
    """
    given = example.metadata.get("choices")
    if given is None:
        return ()
    if not isinstance(given, list) or not all(isinstance(choice, str) and choice.strip() for choice in given):
        raise CorpusError(f"question {example.id!r}: choices is {given!r}", hint='two texts or more, as in ["tin", "zinc"]')
    if len(given) < 2 or len(set(given)) < len(given):
        raise CorpusError(f"question {example.id!r} must have two choices or more, all different, not {given}")
    for answer in example.answers:
        if answer not in given:
            raise CorpusError(
                f"question {example.id!r} has the answer {answer!r}, which is none of its choices: {', '.join(given)}",
                hint="answers are choices in full, spelt as there, and no letters or numbers",
            )
    return tuple(given)


def class_texts(examples: Sequence[Example], decode: ClassifyDecode) -> list[Example]:
    """The examples with classes' texts, which the generator is to learn, in place of their names. Raises CorpusError."""
    check_classes(examples, decode)
    return [replace(example, answers=tuple(decode.labels[name] for name in example.answers)) for example in examples]


def learned_answers(examples: Sequence[Example], data: Data | InstructionMix, retriever: Retriever, seed: int) -> list[Example]:
    """The examples with those answers that are trained on, each of them; questions that have none left are left out.

    A regular expression stands for its commonest match in the best 1000 passages; where no expression of a question matches,
    each stands for its wordings. Where `answers_found_in` is said, all that is learned occurs in so many passages. Then all,
    the first, or one drawn with the seed.

    Raises:
        CorpusError: no answer is left, or one is no regular expression.
    """
    if not isinstance(data, QuestionData):
        return list(examples)
    regex = data.answers_are == "regex"
    depth = data.answers_found_in or (REGEX_DEPTH if regex else 0)
    spelt = regex and data.answers_found_in is None
    kept = _found_in_passages(examples, depth, retriever, regex=regex, spelt=spelt) if depth else list(examples)
    if len(kept) < len(examples):
        log.warning(
            "%d of %d questions have no answer in %d passages and are left out", len(examples) - len(kept), len(examples), depth
        )
    if examples and not kept:
        raise CorpusError(
            f"{data.path}: no answer occurs in the best {depth} passages of its question",
            hint="raise data.answers_found_in, or look whether documents and questions belong together",
        )
    chance = random.Random(seed)
    rule = {"each": lambda found: found, "first": lambda found: found[:1], "random": lambda found: (chance.choice(found),)}
    return [replace(example, answers=rule[data.answers](example.answers)) for example in kept]


def _found_in_passages(
    examples: Sequence[Example], depth: int, retriever: Retriever, *, regex: bool, spelt: bool
) -> list[Example]:
    """`spelt`: expressions that match nowhere are learned as their wordings."""
    corpus = retriever.base.corpus
    kept = []
    unmatched = 0
    for start in range(0, len(examples), 512):
        part = examples[start : start + 512]
        _, rows = retriever.search([example.query for example in part], min(depth, len(corpus)))
        for example, found in zip(part, rows.tolist(), strict=True):
            passages = [corpus[row] for row in found if row >= 0]
            texts = [f"{passage.title}\n{passage.text}" for passage in passages]
            answers = _commonest(texts, example.answers) if regex else found_answers(texts, example.answers)
            if spelt and not answers:
                unmatched += 1
                answers = list(dict.fromkeys(text for form in example.answers for text in wordings(form)))
            kept += [replace(example, answers=tuple(answers))] if answers else []
    if unmatched:
        log.info("%d of %d regular expressions match no passage: their wordings are learned", unmatched, len(examples))
    return kept


def _commonest(texts: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The commonest match of each pattern; of equally common ones the one in the better passage."""
    counts = [
        Counter(match for text in texts for found in pattern(form).finditer(text) if (match := found.group().strip()))
        for form in patterns
    ]
    return [count.most_common(1)[0][0] for count in counts if count]


def answer_rows(
    examples: Sequence[Example], data: Data, retriever: Retriever, generator: HFGenerator, seed: int, *,
    keep: Path | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows for the `answer` objective: each question with its passages, or one row a passage; a row for each answer.

    A row of an example with `metadata["weight"]` has that weight; one of a question that is replayed is marked `replayed`.

    Args:
        keep: a folder for the rows' data points, line for line (`raglan.datapoints`).
    """
    made = _made_rows(examples, data, retriever, generator, seed)
    if keep is None or not is_first_rank():
        return [one.row for one in made]
    rows: list[dict[str, Any]] = []
    found_by = retriever.fingerprint

    def points() -> Iterator[DataPoint]:
        for number, one in enumerate(made):
            rows.append(one.row)
            yield _point(one, f"{data.kind}-{number}", data.kind, found_by, seed)

    write_points(keep, points(), seed=seed)
    return rows


def _made_rows(
    examples: Sequence[Example], data: Data, retriever: Retriever, generator: HFGenerator, seed: int
) -> Iterator[_Made]:
    """One row after the other; how many prompts were cut or left out is logged behind the last."""
    source = "mixed" if isinstance(data, LessonData) else data.source
    chosen = choose_passages(examples, source, data.passages, retriever, seed)
    a_row = (None if isinstance(data, LessonData) else data.passages_a_row) or data.passages
    count = cut = starved = without = 0
    for example, passages in track(list(zip(examples, chosen, strict=True)), "rendering"):
        searched = source != "none" and (not passages or any(one.score is not None for one in passages))
        for start in range(0, max(len(passages), 1), a_row):
            given = passages[start : start + a_row]
            prompt = generator.prompt.render(example.query, [one.passage for one in given], history=example.history)
            longest = max((len(generator.answer_ids(answer, prompt.answer_space)) for answer in example.answers), default=0)
            (prompt,) = generator.fitted([prompt], longest)
            if _lost_its_evidence(example, given, prompt.dropped_passages):
                without += 1
                continue
            cut += prompt.truncated
            starved += prompt.starved
            about = {name: example.metadata[name] for name in ("weight", "replayed") if name in example.metadata}
            shown = given[: len(given) - prompt.dropped_passages]
            for answer in example.answers:
                count += 1
                yield _Made({**generator.row(prompt, answer), **about}, example, answer, shown, prompt, searched)
    if starved:
        least = generator.prompt.settings.min_passage_tokens
        log.warning("%d of %d prompts leave a passage fewer than %d tokens: raise prompt.max_tokens", starved, count, least)
    if without:
        log.warning("%d rows are left out: what answers them does not fit into %d tokens", without, generator.prompt.budget)
    if cut:
        log.info("%d of %d prompts had a passage cut to fit %d tokens", cut, count, generator.prompt.budget)


def _point(one: _Made, identity: str, source: str, found_by: str, seed: int) -> DataPoint:
    example = one.example
    contexts = tuple(Context(z.id, z.text, score, rank, z.title) for z, score, rank in one.given)
    return DataPoint(
        identity, example.id, source, str(example.metadata.get("split", "train")), example.query, one.answer, contexts,
        one.prompt.text, found_by if one.searched else "", history=example.history, seed=seed,
    )  # fmt: skip


def _lost_its_evidence(example: Example, given: Sequence[Chosen], dropped: int) -> bool:
    """Whether a relevant passage was to be shown, and none is among those that fit whole."""
    relevant = [one.passage.id in example.relevant for one in given]
    return any(relevant) and not any(relevant[: len(relevant) - dropped])


def choose_passages(examples: Sequence[Example], source: str, k: int, retriever: Retriever, seed: int) -> list[list[Chosen]]:
    """K passages for each example: `gold` its relevant ones, `retrieved` the search's, `mixed` one gold among the search's,
    `none` none.

    `gold` and `mixed` are shuffled with the seed, so that place tells nothing; an example without relevant passages falls
    back to retrieved ones.
    """
    if source == "none":
        return [[] for _ in examples]
    corpus, generator = retriever.base.corpus, random.Random(seed)
    relevant = [[row for identity in example.relevant if (row := corpus.row(identity)) is not None] for example in examples]
    searched: list[dict[int, float]] = [{} for _ in examples]
    if any(_searches(source, k, gold) for gold in relevant):
        depth = min(len(corpus), k + max(map(len, relevant), default=0))
        texts = retriever.search_texts([e.query for e in examples], [e.history for e in examples])
        scores, rows = retriever.search(texts, depth)
        searched = [
            {row: score for row, score in zip(*own, strict=True) if row >= 0}
            for own in zip(rows.tolist(), scores.tolist(), strict=True)
        ]
    chosen = []
    for gold, ranking in zip(relevant, searched, strict=True):
        found = ranking if _searches(source, k, gold) else {}
        if source == "retrieved" or not gold:
            picked = list(found)[:k]
        else:
            picked = generator.sample(gold, min(len(gold), k if source == "gold" else 1))
            picked += [row for row in found if row not in gold][: k - len(picked)] if source == "mixed" else []
            generator.shuffle(picked)
        chosen.append(_ranked(picked, found, corpus))
    return chosen


def _searches(source: str, k: int, gold: Sequence[int]) -> bool:
    """Whether an example with these relevant passages is searched for."""
    return source == "retrieved" or (source == "mixed" and k > 1) or not gold


def _ranked(picked: Sequence[int], found: dict[int, float], corpus: Corpus) -> list[Chosen]:
    """Rows of the corpus with what the search said of them; what it did not find has the ranks behind."""
    ranks = {row: rank for rank, row in enumerate([*found, *(row for row in picked if row not in found)], 1)}
    return [Chosen(corpus[row], found.get(row), ranks[row]) for row in picked]
