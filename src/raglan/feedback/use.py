"""What is learned from judgements, once people's differences are settled.

    corrected answer     → the answer to learn; and (shown, corrected) as a preference, unless equal after normalisation
    passage relevance    → relevant passages (grade ≥ `positive`), judged irrelevant ones, and grades for softmax(grade/τ)
    rating               → which answers that were shown are learned as well (`filter`), or how much they count (`weight`)
    comment              → the review file, with what is left undecided

Statements on one question belong together by its normalised words and the turns before it, whatever tool they came from. A
person has one vote on each thing; of two statements the later one is meant. `majority` keeps what more than half of those who
judged say, `all` what nobody contradicts, `each` everything (grades then are averaged).
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from raglan.artifact import fingerprint
from raglan.corpus import Corpus
from raglan.documents import read_examples
from raglan.feedback.judgement import Judgement
from raglan.feedback.store import FeedbackStore
from raglan.recipe import FeedbackData
from raglan.records import Example
from raglan.text import normalise_answer, question_key

__all__ = [
    "Settled",
    "feedback_examples",
    "label_rows",
    "place",
    "preference_rows",
    "question_examples",
    "review_rows",
    "settle",
    "sft_rows",
    "without",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settled:
    """What all people together say of one question.

    Attributes:
        answers: corrected answers that are agreed on.
        shown: the answers that were shown, each with its mean rating, or None.
        replaced: (shown, corrected) pairs.
        grades: passage → grade; a passage is (id, text), one of them may be empty.
        comments: as they came.
        undecided: what people disagree about, in words.
    """

    id: str
    query: str
    history: tuple[str, ...]
    answers: tuple[str, ...] = ()
    shown: Mapping[str, float | None] = field(default_factory=dict)
    replaced: tuple[tuple[str, str], ...] = ()
    grades: Mapping[tuple[str, str], float] = field(default_factory=dict)
    comments: tuple[Judgement, ...] = ()
    undecided: tuple[str, ...] = ()


def settle(judgements: Iterable[Judgement], *, agree: str = "majority", positive: float = 0.5) -> list[Settled]:
    """Judgements → one `Settled` a question, in the order in which questions first come.

    Args:
        agree: `majority`, `all` or `each`.
        positive: the grade from which on a passage counts as relevant, where votes are counted.
    """
    groups: dict[Hashable, list[Judgement]] = {}
    for one in judgements:
        if not one.aside and one.query:
            groups.setdefault(question_key(one.query, one.history), []).append(one)
    return [_settled(key, group, agree, positive) for key, group in groups.items()]


def _settled(key: Hashable, group: Sequence[Judgement], agree: str, positive: float) -> Settled:
    named = sorted({one.example for one in group if one.example})
    identity = named[0] if named else f"feedback-{fingerprint(key)}"
    undecided: list[str] = []
    given = [one for one in group if one.kind == "answer" and normalise_answer(str(one.value))]
    answers, doubt = _agreed(given, lambda one: normalise_answer(str(one.value)), agree)
    undecided += [f"answers: {_listed(doubt)}"] * bool(doubt)
    texts = tuple(_spelt(given, answer) for answer in answers)
    grades: dict[tuple[str, str], float] = {}
    for passage, own in _by_passage(group).items():
        grade = _grade(own, agree, positive)
        if grade is None:
            undecided.append(f"passage {passage[0] or passage[1][:60]!r}: {_listed(sorted({float(o.value) for o in own}))}")
        else:
            grades[passage] = grade
    return Settled(
        identity, group[0].query, group[0].history, texts, _shown(group), _replaced(given, answers, texts), grades,
        tuple(one for one in group if one.kind == "comment"), tuple(undecided),
    )  # fmt: skip


def _latest(group: Sequence[Judgement]) -> list[tuple[str, Judgement]]:
    """(voter, statement): of each person what was said last; who has no name is another person each time."""
    votes = [(one.annotator or one.origin, one) for one in group]
    last = {voter: max(one.time for other, one in votes if other == voter) for voter, _ in votes}
    return [(voter, one) for voter, one in votes if one.time == last[voter]]


def _agreed(group: Sequence[Judgement], value: Any, agree: str) -> tuple[list[Any], list[Any]]:
    """(values that are agreed on, values of which none is)."""
    supporters: dict[Any, set[str]] = {}
    for voter, one in _latest(group):
        supporters.setdefault(value(one), set()).add(voter)
    voters = len(set().union(*supporters.values())) if supporters else 0
    enough = {"majority": lambda n: 2 * n > voters, "all": lambda n: n == voters, "each": lambda _: True}[agree]
    kept = [found for found, names in supporters.items() if enough(len(names))]
    return kept, [] if kept else list(supporters)


def _grade(group: Sequence[Judgement], agree: str, positive: float) -> float | None:
    """The mean grade of those on the side that is agreed on; with `each` of all."""
    if agree == "each":
        return statistics.fmean(float(one.value) for _, one in _latest(group))
    sides, _ = _agreed(group, lambda one: float(one.value) >= positive, agree)
    if len(sides) != 1:
        return None
    return statistics.fmean(float(one.value) for _, one in _latest(group) if (float(one.value) >= positive) == sides[0])


def _by_passage(group: Sequence[Judgement]) -> dict[tuple[str, str], list[Judgement]]:
    judged = [one for one in group if one.kind == "relevance" and (one.passage or one.passage_text)]
    texts = {one.passage: one.passage_text for one in judged if one.passage and one.passage_text}
    names = {" ".join(text.split()): name for name, text in texts.items()}
    found: dict[tuple[str, str], list[Judgement]] = {}
    for one in judged:
        name = one.passage or names.get(" ".join(one.passage_text.split()), "")
        found.setdefault((name, texts.get(name, "") if name else one.passage_text), []).append(one)
    return found


def _shown(group: Sequence[Judgement]) -> dict[str, float | None]:
    shown: dict[str, float | None] = {}
    for text in dict.fromkeys(one.old for one in group if one.old):
        ratings = [one for one in group if one.kind == "rating" and one.old == text]
        shown[text] = statistics.fmean(float(one.value) for _, one in _latest(ratings)) if ratings else None
    return shown


def _replaced(given: Sequence[Judgement], answers: Sequence[str], texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Of each agreed answer, the shown ones that it took the place of; an answer that was only confirmed replaces nothing."""
    pairs = {
        (normalise_answer(one.old), answer): (one.old, text)
        for answer, text in zip(answers, texts, strict=True)
        for one in given
        if one.old and normalise_answer(one.old) not in answers
    }
    return tuple(pairs.values())


def _spelt(group: Sequence[Judgement], answer: str) -> str:
    """The commonest spelling of a normalised answer."""
    return statistics.mode([str(one.value) for one in group if normalise_answer(str(one.value)) == answer])


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(repr(value) for value in values)


def question_examples(
    settled: Sequence[Settled], *, positive: float = 0.5, ratings: str = "ignore", min_rating: float | None = None
) -> list[Example]:
    """Examples with the agreed answers, relevant passages and grades; questions of which nothing is agreed are left out.

    Passages known by their text alone stand in `metadata["judged"]`, until `place` finds them in a corpus. `metadata["weight"]`
    is there where ratings are weights.
    """
    best = max((r for one in settled for r in one.shown.values() if r is not None), default=0.0)
    found = []
    for one in settled:
        answers, weight = one.answers, 1.0
        if not answers and ratings != "ignore":
            rated = {text: r for text, r in one.shown.items() if r is not None and _learned(r, ratings, min_rating)}
            answers = tuple(sorted(rated, key=lambda text: -rated[text])[:1])
            weight = rated[answers[0]] / best if answers and ratings == "weight" else 1.0
        if not answers and not one.grades:
            continue
        named = {name: grade for (name, _), grade in one.grades.items() if name}
        judged = [{"passage": name, "text": text, "grade": grade} for (name, text), grade in one.grades.items() if text]
        found.append(Example(
            one.id, one.query, answers, tuple(name for name, grade in named.items() if grade >= positive), named, one.history,
            {**({"judged": judged} if judged else {}), **({"weight": weight} if ratings == "weight" else {})},
        ))  # fmt: skip
    return _told_apart(found)


def _learned(rating: float, ratings: str, min_rating: float | None) -> bool:
    return rating > 0 if ratings == "weight" else min_rating is not None and rating >= min_rating


def _told_apart(examples: Sequence[Example]) -> list[Example]:
    """Two questions that an export gave one id get ids of their own."""
    seen: dict[str, int] = {}
    found = []
    for example in examples:
        count = seen[example.id] = seen.get(example.id, 0) + 1
        found.append(example if count == 1 else replace(example, id=f"{example.id}-{count}"))
    return found


def without(examples: Sequence[Example], held_out: Iterable[Example]) -> tuple[list[Example], list[str]]:
    """(examples that are not among the held-out ones, ids of those that are): by id, or by the question's words."""
    held = list(held_out)
    names, keys = {example.id for example in held}, {question_key(example.query, example.history) for example in held}
    out = [e.id for e in examples if e.id in names or question_key(e.query, e.history) in keys]
    return [example for example in examples if example.id not in set(out)], out


def place(examples: Sequence[Example], corpus: Corpus, *, positive: float = 0.5) -> list[Example]:
    """The examples with passages of this corpus: by id, or else by the text that was judged. What is not found is left out."""
    wanted = {
        " ".join(item["text"].split())
        for example in examples
        for item in example.metadata.get("judged", ())
        if corpus.row(item.get("passage", "")) is None
    }
    by_text = {form: p.id for p in corpus for form in _forms(p.title, p.text) if form in wanted} if wanted else {}
    lost = 0
    placed = []
    for example in examples:
        grades = {name: grade for name, grade in example.grades.items() if corpus.row(name) is not None}
        missing = set(example.grades) - set(grades)
        for item in example.metadata.get("judged", ()):
            name = by_text.get(" ".join(item["text"].split()))
            if corpus.row(item.get("passage", "")) is None and name is not None:
                grades.setdefault(name, float(item["grade"]))
                missing.discard(item.get("passage", ""))
            elif name is None and not item.get("passage"):
                lost += 1
        lost += len(missing)
        named = [name for name in example.relevant if name not in example.grades and corpus.row(name) is not None]
        relevant = sorted((name for name, grade in grades.items() if grade >= positive), key=lambda name: -grades[name])
        placed.append(replace(example, relevant=(*relevant, *named), grades=grades))
    if lost:
        log.warning("%d judged passages are not in the knowledge base, by id or by text, and are left out", lost)
    return placed


def _forms(title: str, text: str) -> Iterator[str]:
    yield " ".join(text.split())
    if title:
        yield " ".join(f"{title}\n{text}".split())


def feedback_examples(data: FeedbackData, corpus: Corpus, *, held_out: Iterable[Example] = ()) -> list[Example]:
    """What a stage may learn from feedback, with passages of this corpus; what is held out is not among it."""
    if data.path is not None:
        examples = read_examples(data.path)
    else:
        assert data.store is not None
        with FeedbackStore(data.store) as store:
            settled = settle(store.judgements(), agree=data.agree, positive=data.positive)
        undecided = sum(bool(one.undecided) for one in settled)
        if undecided:
            log.warning("people disagree about %d of %d questions (agree: %s)", undecided, len(settled), data.agree)
        examples = question_examples(settled, positive=data.positive, ratings=data.ratings, min_rating=data.min_rating)
    kept, out = without(examples, held_out)
    if out:
        log.info("feedback on %d questions that are held out is not learned: %s", len(out), ", ".join(out[:10]))
    return place(kept, corpus, positive=data.positive)


def sft_rows(settled: Sequence[Settled]) -> list[dict[str, Any]]:
    """Chat lines for supervised tuning, one for each agreed answer."""
    return [{"messages": [*_messages(one), _said(answer)]} for one in settled for answer in one.answers]


def preference_rows(settled: Sequence[Settled]) -> list[dict[str, Any]]:
    """Preference lines: the corrected answer over the one that was shown."""
    return [
        {"input": {"messages": _messages(one)}, "preferred_output": [_said(new)], "non_preferred_output": [_said(old)]}
        for one in settled
        for old, new in one.replaced
    ]


def label_rows(settled: Sequence[Settled]) -> list[dict[str, Any]]:
    """A line for each judged passage of each question."""
    return [
        {"id": one.id, "query": one.query, "passage": name, "text": text, "grade": grade}
        for one in settled
        for (name, text), grade in one.grades.items()
    ]


def review_rows(settled: Sequence[Settled]) -> list[dict[str, Any]]:
    """Comments and disagreements, for people to read."""
    return [
        {"id": one.id, "query": one.query, "undecided": list(one.undecided), "comments": list(map(_comment, one.comments))}
        for one in settled
        if one.comments or one.undecided
    ]


def _comment(one: Judgement) -> dict[str, Any]:
    return {"text": one.value, "annotator": one.annotator, "time": one.time, "of": one.passage or one.old}


def _messages(one: Settled) -> list[dict[str, str]]:
    """Earlier turns take turns, the question is the last of them."""
    turns = [*one.history, one.query]
    return [{"role": "user" if (len(turns) - n) % 2 else "assistant", "content": turn} for n, turn in enumerate(turns)]


def _said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
