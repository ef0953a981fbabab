"""Training questions that come too near to what is measured, against every registered evaluation set.

    D1  equal normalised questions, after the same turns
    D2  0.70 or more of the evaluation question's runs of three words stand in the training question; from five words on
    D3  the same normalised answer, numerals folded, and a Jaccard index of the questions' words of 0.30 or more
    D4  cosine of the questions' embeddings 0.90 or more, if an encoder is there
    D5  a gold passage equals an evaluation question's, or holds 0.50 or more of its runs of eight words

A wrong find costs one example, a missed one the whole table, so every check counts for itself and any of them drops. The
`leak_check` of `splits.py` asks a narrower question before each training, and stops; this one finds, lists and leaves out.

D2, D3 and D5 look only at pairs that can reach the share: a text that has s of another's m runs has one of the rarest
m − ⌈s·m⌉ + 1 of them. Nothing is estimated; what is found is what a comparison of all pairs would find.

Deviation: runs and answers are 64-bit hashes (`shingles.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from raglan.artifact import pointed, write_json
from raglan.corpus import Corpus
from raglan.dedupe import ROUNDING, Embed
from raglan.documents import read_examples
from raglan.errors import CorpusError
from raglan.recipe import DecontaminateSettings, EvaluationSet, Recipe
from raglan.records import Example
from raglan.shingles import Hashes, Places, Shingles, mixed, shared, shingles, text_hash
from raglan.splits import gold_passages, withheld_passages
from raglan.text import answer_words, fold_numbers, normalise_answer, question_key

__all__ = ["CHECKS", "EvaluationQuestions", "Found", "Leakage", "decontaminate", "open_sets", "registered", "write_leakage"]

log = logging.getLogger(__name__)
CHECKS = ("D1", "D2", "D3", "D4", "D5")
RUN, PASSAGE_RUN = 3, 8  # words
FEWEST = 5  # words of an evaluation question that D2 looks at
BATCH = 20_000
KIND = "leakage"
Pairs = tuple[Places, Places]


@dataclass(frozen=True, slots=True)
class EvaluationQuestions:
    """A registered set that is there. `corpus` resolves the passages that its questions name."""

    name: str
    examples: Sequence[Example]
    corpus: Corpus | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A training example and the evaluation question that it comes too near to. `share` is what is compared, in [0, 1]."""

    set: str
    check: str
    train: str
    held_out: str
    share: float


@dataclass
class Leakage:
    """What was found in `examples` training examples.

    Attributes:
        found: all pairs, set by set.
        rows: places of the examples that are dropped.
        questions: set → its number of questions.
        missing: sets that were named as missing, and are.
        not_run: (set, check) → why a check could not be made.
        unresolved: examples without gold whose evidence is named and nowhere to be read, so that D5 does not compare it.
    """

    examples: int = 0
    found: list[Found] = field(default_factory=list)
    rows: set[int] = field(default_factory=set)
    questions: dict[str, int] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    not_run: dict[tuple[str, str], str] = field(default_factory=dict)
    unresolved: int = 0

    def counts(self) -> dict[str, dict[str, int]]:
        """Set → check → training examples that it drops."""
        dropped: dict[tuple[str, str], set[str]] = {}
        for one in self.found:
            dropped.setdefault((one.set, one.check), set()).add(one.train)
        return {name: {check: len(dropped.get((name, check), ())) for check in CHECKS} for name in self.questions}


def registered(recipe: Recipe) -> DecontaminateSettings:
    """The recipe's evaluation sets, with the questions that it evaluates on as one more.

    Those name passages of the recipe's own knowledge base; one that is not built yet has no passages to compare (D5).
    """
    settings = recipe.decontaminate or DecontaminateSettings()
    measured = recipe.evaluate.questions if recipe.evaluate is not None else None
    if measured is None:
        return settings
    own = recipe.knowledge.path if pointed(recipe.knowledge.path / "current") is not None else None
    sets = {
        name: one.model_copy(update={"knowledge": one.knowledge or own}) if one.path == measured else one
        for name, one in settings.sets.items()
    }
    if measured not in {one.path for one in sets.values()}:
        sets = {"evaluate": EvaluationSet(path=measured, knowledge=own), **sets}
    return settings.model_copy(update={"sets": sets})


def open_sets(
    settings: DecontaminateSettings, *, corpus_at: Callable[[Path], Corpus] | None = None
) -> tuple[list[EvaluationQuestions], tuple[str, ...]]:
    """(all registered sets that are there, the names of those that are missing and may be).

    Args:
        corpus_at: opens a set's knowledge base; without it no passage is resolved.

    Raises:
        CorpusError: no set is registered, or one is missing that `missing` does not name.
    """
    if not settings.sets:
        raise CorpusError("no evaluation set is registered", hint="decontaminate.sets: {name: {path: questions.jsonl}}")
    missing = [name for name, one in settings.sets.items() if not one.path.exists()]
    unsaid = [name for name in missing if name not in settings.missing]
    if unsaid:
        told = "; ".join(f"{name}: {settings.sets[name].path}" for name in unsaid)
        raise CorpusError(
            f"evaluation sets are missing, so nothing can be checked against them: {told}",
            hint="get them, or name them under decontaminate.missing (--missing), and they are listed as not checked",
        )
    opened = []
    for name, one in settings.sets.items():
        if name not in missing:
            corpus = corpus_at(one.knowledge) if one.knowledge is not None and corpus_at is not None else None
            opened.append(EvaluationQuestions(name, read_examples(one.path), corpus))
    return opened, tuple(missing)


def decontaminate(
    examples: Iterable[Example],
    sets: Sequence[EvaluationQuestions],
    *,
    settings: DecontaminateSettings | None = None,
    corpus: Corpus | None = None,
    embed: Embed | None = None,
    missing: tuple[str, ...] = (),
) -> Leakage:
    """Everything that training examples share with evaluation sets; the examples are read once, in batches.

    Args:
        corpus: resolves the passages that the training examples name.
        embed: n texts → (n,D) vectors of length 1, from a multilingual encoder.
        missing: sets that were not opened, to be listed.
    """
    settings = settings or DecontaminateSettings()
    made = Leakage(questions={one.name: len(one.examples) for one in sets}, missing=missing)
    held = [_Held.of(one, settings, embed) for one in sets]
    _tell_what_cannot_run(made, held)
    coming = iter(examples)
    while batch := list(islice(coming, BATCH)):
        own = _Side.of(batch, corpus)
        vectors = embed([_said(example) for example in batch]) if embed is not None else None
        for one in held:
            for check, pairs, share in _checks(own, vectors, one, settings):
                _keep(made, batch, one, check, pairs, share)
        made.examples += len(batch)
        made.unresolved += sum(_unknown(example, corpus) for example in batch)
    if made.unresolved:
        log.warning(
            "%d examples name evidence that they do not show and that no corpus here has: D5 does not compare it; name the "
            "knowledge base that they were written over", made.unresolved,
        )  # fmt: skip
    return made


def _keep(made: Leakage, batch: Sequence[Example], held: _Held, check: str, pairs: Pairs, share: Sequence[float]) -> None:
    for left, right, value in zip(pairs[0].tolist(), pairs[1].tolist(), share, strict=True):
        made.found.append(Found(held.name, check, batch[left].id, held.side.ids[right], float(value)))
        made.rows.add(made.examples + left)


def _tell_what_cannot_run(made: Leakage, held: Sequence[_Held]) -> None:
    for one in held:
        if one.vectors is None:
            made.not_run[one.name, "D4"] = "no encoder"
        if not len(one.side.passage_owners):
            made.not_run[one.name, "D5"] = "the text of no gold passage is known"


@dataclass
class _Side:
    """Questions of one side as arrays."""

    ids: list[str]
    keys: Hashes
    runs: Shingles
    words: Shingles
    answers: Shingles
    lengths: Places
    passage_owners: Places
    passage_keys: Hashes
    passages: Shingles

    @classmethod
    def of(cls, examples: Sequence[Example], corpus: Corpus | None) -> _Side:
        said = [[word for turn in (*e.history, e.query) for word in answer_words(turn)] for e in examples]
        gold = [(row, answer_words(text)) for row, e in enumerate(examples) for text in _gold_texts(e, corpus)]
        return cls(
            ids=[e.id for e in examples],
            keys=np.asarray([text_hash(question_key(e.query, e.history)) for e in examples], dtype=np.uint64),
            runs=shingles(said, RUN),
            words=shingles(said, 1),
            answers=shingles(([form for a in e.answers if (form := normalise_answer(fold_numbers(a)))] for e in examples), 1),
            lengths=np.asarray([len(words) for words in said], dtype=np.int64),
            passage_owners=np.asarray([row for row, _ in gold], dtype=np.int64),
            passage_keys=np.asarray([text_hash(" ".join(words)) for _, words in gold], dtype=np.uint64),
            passages=shingles((words for _, words in gold), PASSAGE_RUN),
        )

    @classmethod
    def in_batches(cls, examples: Sequence[Example], corpus: Corpus | None) -> _Side:
        """As `of`, with the words of few questions at a time in memory."""
        starts = range(0, len(examples), BATCH)
        parts = [cls.of(examples[start : start + BATCH], corpus) for start in starts] or [cls.of([], corpus)]
        owners = [part.passage_owners + start for start, part in zip(starts or [0], parts, strict=True)]
        return cls(
            ids=[identity for part in parts for identity in part.ids],
            keys=np.concatenate([part.keys for part in parts]),
            runs=Shingles.joined([part.runs for part in parts]),
            words=Shingles.joined([part.words for part in parts]),
            answers=Shingles.joined([part.answers for part in parts]),
            lengths=np.concatenate([part.lengths for part in parts]),
            passage_owners=np.concatenate(owners),
            passage_keys=np.concatenate([part.passage_keys for part in parts]),
            passages=Shingles.joined([part.passages for part in parts]),
        )


def _said(example: Example) -> str:
    return "\n".join((*example.history, example.query))


def _gold_texts(example: Example, corpus: Corpus | None) -> Iterator[str]:
    """Passages with the answer, as far as their words are known: from the corpus, from quotes, from the example itself."""
    yield from (text for identity in _named(example) if (text := _text_of(identity, corpus)) is not None)
    for item in example.metadata.get("evidence", ()):
        if len(answer_words(str(item.get("quote", "")))) >= PASSAGE_RUN:
            yield str(item["quote"])
    for passage in (*gold_passages(example), *withheld_passages(example)):
        yield str(passage.get("text", ""))


def _named(example: Example) -> Iterator[str]:
    """Ids of passages with the answer; those, too, that an example without gold had before they were taken out."""
    yield from example.relevant
    yield from (str(one["id"]) for one in withheld_passages(example) if one.get("id") and not one.get("text"))


def _text_of(identity: str, corpus: Corpus | None) -> str | None:
    row = corpus.row(identity) if corpus is not None else None
    return corpus[row].text if corpus is not None and row is not None else None


def _unknown(example: Example, corpus: Corpus | None) -> bool:
    """Whether a passage that was withheld is known by its name alone."""
    names = [str(one["id"]) for one in withheld_passages(example) if one.get("id") and not one.get("text")]
    return any(_text_of(name, corpus) is None for name in names)


@dataclass
class _Held:
    """An evaluation set with what is looked up in it."""

    name: str
    side: _Side
    order: tuple[Hashes, Places]
    keys: tuple[Places, Hashes]
    runs: tuple[Places, Hashes]
    answered: tuple[Places, Hashes]
    passage_keys: tuple[Places, Hashes]
    passages: tuple[Places, Hashes]
    vectors: Any

    @classmethod
    def of(cls, one: EvaluationQuestions, settings: DecontaminateSettings, embed: Embed | None) -> _Held:
        side = _Side.in_batches(one.examples, one.corpus)
        words = np.unique(side.words.values, return_counts=True)
        runs = np.unique(side.runs.values, return_counts=True)
        long = np.unique(side.passages.values, return_counts=True)
        kept = _rarest(side.runs, runs, settings.runs)
        enough = side.lengths[kept[0]] >= FEWEST
        return cls(
            name=one.name, side=side, order=words, keys=_sorted(np.arange(len(side.keys)), side.keys),
            runs=_sorted(kept[0][enough], kept[1][enough]),
            answered=_sorted(*_answered(side, words, settings.words)),
            passage_keys=_sorted(np.arange(len(side.passage_keys)), side.passage_keys),
            passages=_sorted(*_rarest(side.passages, long, settings.passage)),
            vectors=embed([_said(e) for e in one.examples]) if embed is not None else None,
        )  # fmt: skip


def _checks(
    own: _Side, vectors: Any, held: _Held, settings: DecontaminateSettings
) -> Iterator[tuple[str, Pairs, Sequence[float]]]:
    """(check, pairs of rows, what they share) for each check that can be made."""
    equal = _meeting((np.arange(len(own.keys)), own.keys), held.keys)
    yield "D1", equal, np.ones(len(equal[0])).tolist()
    yield "D2", *_runs_shared(own.runs, held.side.runs, held.runs, settings.runs)
    yield "D3", *_same_answer(own, held, settings.words)
    if vectors is not None and held.vectors is not None:
        yield "D4", *_same_meaning(vectors, held.vectors, settings.meaning)
    yield "D5", *_same_passage(own, held, settings.passage)


def _runs_shared(own: Shingles, held: Shingles, rare: tuple[Places, Hashes], least: float) -> tuple[Pairs, Sequence[float]]:
    left, right = _meeting(own.take(np.arange(len(own))), rare)
    common, whole = shared(own, held, left, right), held.counts[right]
    near = common >= _least(whole, least)
    return (left[near], right[near]), (common[near] / whole[near]).tolist()


def _same_answer(own: _Side, held: _Held, least: float) -> tuple[Pairs, Sequence[float]]:
    left, right = _meeting(_answered(own, held.order, least), held.answered)
    common = shared(own.words, held.side.words, left, right)
    whole = own.words.counts[left] + held.side.words.counts[right] - common
    near = common >= _least(whole, least)
    return (left[near], right[near]), (common[near] / whole[near]).tolist()


def _same_meaning(own: Any, held: Any, least: float, step: int = 1024) -> tuple[Pairs, Sequence[float]]:
    lefts, rights, shares = [], [], []
    for a in range(0, len(own), step):
        for b in range(0, len(held), 16 * step):
            cosine = own[a : a + step] @ held[b : b + 16 * step].T
            left, right = np.nonzero(cosine >= least - ROUNDING)
            lefts.append(left + a)
            rights.append(right + b)
            shares += cosine[left, right].tolist()
    return (np.concatenate(lefts), np.concatenate(rights)), shares


def _same_passage(own: _Side, held: _Held, least: float) -> tuple[Pairs, Sequence[float]]:
    """Pairs of questions whose passages are equal or share enough, each pair once with the largest share."""
    equal = _meeting((np.arange(len(own.passage_keys)), own.passage_keys), held.passage_keys)
    (left, right), share = _runs_shared(own.passages, held.side.passages, held.passages, least)
    best: dict[tuple[int, int], float] = {}
    lefts, rights = np.concatenate([equal[0], left]), np.concatenate([equal[1], right])
    values = [1.0] * len(equal[0]) + list(share)
    for a, b, value in zip(own.passage_owners[lefts], held.side.passage_owners[rights], values, strict=True):
        best[int(a), int(b)] = max(value, best.get((int(a), int(b)), 0.0))
    pairs = np.asarray(list(best), dtype=np.int64).reshape(-1, 2)
    return (pairs[:, 0], pairs[:, 1]), list(best.values())


def _least(whole: Places, share: float) -> Places:
    """The fewest that are a share of each whole: ⌈share · whole⌉, of 0.30 · 10 three and not four."""
    return np.ceil(share * whole - 1e-9).astype(np.int64)


def _rarest(sets: Shingles, known: tuple[Hashes, Places], share: float) -> tuple[Places, Hashes]:
    """(text, run) of the rarest m − ⌈share·m⌉ + 1 of each text's m runs; what the known ones do not hold is the rarest."""
    return _one_after_another([_rarest_of(sets, rows, known, share) for rows in _batches(len(sets))])


def _rarest_of(sets: Shingles, rows: Places, known: tuple[Hashes, Places], share: float) -> tuple[Places, Hashes]:
    """As `_rarest`, of some texts: sorting those of all of them at once takes ten times what they take."""
    owner, value = sets.take(rows)
    names, counts = known
    mine = sets.counts[rows]
    often = np.zeros(len(value), dtype=np.int64)
    if len(names):
        at = np.minimum(np.searchsorted(names, value), len(names) - 1)
        often = np.where(names[at] == value, counts[at], 0)
    order = np.lexsort((value, often, owner))
    place = np.arange(len(order)) - (np.cumsum(mine) - mine)[owner[order]]
    keep = place <= (mine - _least(mine, share))[owner[order]]
    return rows[owner[order][keep]], value[order][keep]


def _answered(side: _Side, order: tuple[Hashes, Places], share: float) -> tuple[Places, Hashes]:
    """(question, answer and one of its rarest words), for each answer and such word."""
    parts = []
    for rows in _batches(len(side.words)):
        owner, word = _rarest_of(side.words, rows, order, share)
        which, answer = side.answers.take(owner)
        parts.append((owner[which], mixed(answer ^ mixed(word[which]))))
    return _one_after_another(parts)


def _batches(count: int) -> Iterator[Places]:
    """Places of texts, so many as are worked on at a time; one empty batch where there are none."""
    for start in range(0, max(1, count), BATCH):
        yield np.arange(start, min(start + BATCH, count))


def _one_after_another(parts: Sequence[tuple[Places, Hashes]]) -> tuple[Places, Hashes]:
    return np.concatenate([owner for owner, _ in parts]), np.concatenate([value for _, value in parts])


def _sorted(owner: Places, value: Hashes) -> tuple[Places, Hashes]:
    order = np.argsort(value, kind="stable")
    return owner[order], value[order]


def _meeting(own: tuple[Places, Hashes], held: tuple[Places, Hashes]) -> Pairs:
    """Pairs of owners that have a value in common, each once; `held` is sorted by value."""
    low, high = np.searchsorted(held[1], own[1], "left"), np.searchsorted(held[1], own[1], "right")
    counts = high - low
    inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    left, right = np.repeat(own[0], counts), held[0][np.repeat(low, counts) + inside]
    wide = int(held[0].max(initial=0)) + 1
    pair = np.unique(left * wide + right)
    return pair // wide, pair % wide


def write_leakage(path: Path, made: Leakage) -> dict[str, Any]:
    """`leakage.json`: set × check × count and pairs, what is missing and what could not be checked. Returns what it holds."""
    pairs: dict[tuple[str, str], list[list[Any]]] = {}
    for one in made.found:
        pairs.setdefault((one.set, one.check), []).append([one.train, one.held_out, round(one.share, 4)])
    counts = made.counts()
    content = {
        "kind": KIND, "examples": made.examples, "dropped": len(made.rows), "missing": list(made.missing),
        **({"unresolved": made.unresolved} if made.unresolved else {}),
        "sets": {
            name: {
                "questions": made.questions[name],
                "checks": {check: _told(made, name, check, counts[name][check], pairs) for check in CHECKS},
            }
            for name in made.questions
        },
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
    return content


def _told(made: Leakage, name: str, check: str, count: int, pairs: Mapping[tuple[str, str], list[list[Any]]]) -> dict[str, Any]:
    if (name, check) in made.not_run:
        return {"not_run": made.not_run[name, check]}
    return {"count": count, "pairs": pairs.get((name, check), [])}
