"""What the generator found useful: examples with their candidates → rows for the `lsr` objective.

    evidence: alone       Σ_t log p(y_t | x, z_k)                    one passage a prompt
    evidence: left_out    −Σ_t log p(y_t | x, all z but z_k)         K prompts of K − 1 passages (Atlas' leave-one-out)
    evidence: attention   mean of α·‖v‖ over the passage             one prompt of K passages (Atlas' attention distillation)
    target: given         the grades that people gave                no prompt

Probabilities come out of the table of scores, so nothing is asked of the generator twice. Attention is computed at every
start, one pass a question.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from raglan.corpus import Corpus
from raglan.errors import CorpusError
from raglan.generator import passage_attention
from raglan.metrics import answer_recall
from raglan.objective.lsr import CORPUS_HALVES, HeldOut, LsrRow
from raglan.progress import track
from raglan.prompt import Rendered
from raglan.rag import RAG
from raglan.recipe import LsrObjective as LsrSettings
from raglan.records import Example, Passage
from raglan.scores import Pair, ScoreTable, open_scorer

__all__ = ["HALF", "Pairs", "asked_pairs", "favourite_pairs", "judged", "preferred"]

log = logging.getLogger(__name__)
HALF = "half"  # in Example.metadata: made from a passage, whose end is no end of text
DEPTH = 100  # passages in which a held-out question's answers are looked for


class Evidence(NamedTuple):
    """Values (N,K) of candidates, answer lengths (N,), and token log-probabilities by (n, k) where each answer is one."""

    values: np.ndarray
    lengths: np.ndarray
    tokens: dict[tuple[int, int], np.ndarray]


def preferred(
    examples: Sequence[Example], texts: Sequence[str], candidates: np.ndarray, system: RAG, settings: LsrSettings, table: Path,
    *, sources: Sequence[str] = (),
) -> list[LsrRow]:  # fmt: skip
    """A row for each example that has two candidates or more and tells them apart.

    Args:
        texts: what is searched for, of each example.
        candidates: rows (N,K), −1 where there is none. With grades, the passages that were judged take their place.
        table: the folder of language-model scores.
        sources: which data made each example; default none in particular.

    Raises:
        GeneratorError: attention is asked of a generator that has none across.
        CorpusError: no example has two candidates, or no graded one two grades.
    """
    sources = sources or [""] * len(examples)
    if settings.target == "given" and settings.evidence == "alone":
        candidates, found = _graded(examples, candidates, system.retriever.base.corpus)
    elif settings.evidence == "attention":
        found = _attended(examples, candidates, system, settings)
    else:
        found = _scored(examples, candidates, system, settings, table, sources)
    rows = [
        LsrRow(
            texts[n], candidates[n], found.values[n], int(found.lengths[n]), example.id, sources[n], _tokens(found, n, settings)
        )
        for n, example in enumerate(examples)
    ]
    return _telling(rows, settings)


def judged(examples: Sequence[Example], system: RAG, settings: LsrSettings, table: Path) -> list[HeldOut]:
    """Held-out questions with what counts as found: relevant passages; else those that hold an answer, if any of the best 100
    does; else the candidate under which the generator finds the answer likeliest. Questions with neither are left out.
    """
    if not examples:
        return []
    known, unheld = _searched(examples, system, settings)
    known += _favourites(unheld, system, settings, table) if unheld else []
    for by in ("passages", "answers", "favourite"):
        log.info("held-out questions judged by %s: %d", by, sum(row.by == by for row in known))
    return known


def favourite_pairs(examples: Sequence[Example], system: RAG, settings: LsrSettings) -> Pairs:
    """What `judged` would ask of the language model."""
    _, unheld = _searched(examples, system, settings)
    candidates = np.stack([rows for _, rows in unheld]) if unheld else np.zeros((0, 1), np.int64)
    return asked_pairs([example for example, _ in unheld], candidates, system, _alone(settings))


def _searched(
    examples: Sequence[Example], system: RAG, settings: LsrSettings
) -> tuple[list[HeldOut], list[tuple[Example, np.ndarray]]]:
    """Held-out questions of which is known what counts as found, and those with candidates (K,) of which it is not."""
    corpus = system.retriever.base.corpus
    known = [HeldOut(e.query, e.history, e.relevant) for e in examples if e.relevant]
    rest = [e for e in examples if e.answers and not e.relevant]
    if not rest:
        return known, []
    texts = system.retriever.search_texts([e.query for e in rest], [e.history for e in rest])
    found = system.retriever.search(texts, min(DEPTH, len(corpus)))[1]
    unheld = []
    for example, rows in zip(rest, found, strict=True):
        if answer_recall([f"{p.title}\n{p.text}" for p in _passages(rows, corpus)], example.answers):
            known.append(HeldOut(example.query, example.history, (), example.answers, "answers"))
        else:
            unheld.append((example, rows[: settings.k]))
    return known, unheld


def _alone(settings: LsrSettings) -> LsrSettings:
    return settings.model_copy(update={"evidence": "alone", "target": "prob", "answers": "first", "loss": "divergence"})


def _favourites(asked: Sequence[tuple[Example, np.ndarray]], system: RAG, settings: LsrSettings, table: Path) -> list[HeldOut]:
    """Examples with their candidates, each judged by the candidate under which its first answer is likeliest."""
    alone = _alone(settings)
    examples, candidates = [example for example, _ in asked], np.stack([rows for _, rows in asked])
    found = _scored(examples, candidates, system, alone, table, [""] * len(examples))
    best = np.where(candidates < 0, -np.inf, found.values).argmax(1)
    return [
        HeldOut(example.query, example.history, (system.retriever.base.corpus[int(rows[at])].id,), by="favourite")
        for example, rows, at in zip(examples, candidates, best, strict=True)
        if rows[at] >= 0
    ]


def asked_pairs(examples: Sequence[Example], candidates: np.ndarray, system: RAG, settings: LsrSettings) -> Pairs:
    """All pairs whose likelihood is asked of the language model."""
    every, alone = settings.answers == "any", settings.evidence == "alone"
    return Pairs(examples, candidates, system.retriever.base.corpus, every=every, alone=alone)


class Pairs(Sequence[Pair]):
    """Every (example, candidate, answer), made when it is looked at: there may be millions.

    Attributes:
        example, place, answer: (n,) each, of every pair.
    """

    def __init__(self, examples: Sequence[Example], candidates: np.ndarray, corpus: Corpus, *, every: bool, alone: bool):
        self.examples, self.candidates, self.corpus, self.alone = examples, candidates, corpus, alone
        n, k = np.nonzero(candidates >= 0)
        times = np.array([len(example.answers) if every else 1 for example in examples], np.int64)[n]
        self.example, self.place = np.repeat(n, times), np.repeat(k, times)
        self.answer = np.arange(len(self.example)) - np.repeat(np.cumsum(times) - times, times)

    def __len__(self) -> int:
        return len(self.example)

    def __getitem__(self, number: Any) -> Any:
        n, k = self.example[number], self.place[number]
        example, rows = self.examples[n], self.candidates[n]
        passages = _passages(rows[k : k + 1] if self.alone else np.delete(rows, k), self.corpus)
        return Pair(example.query, tuple(passages), example.answers[self.answer[number]], example.history)


def _scored(
    examples: Sequence[Example], candidates: np.ndarray, system: RAG, settings: LsrSettings, table: Path, sources: Sequence[str]
) -> Evidence:
    """Log-probabilities of answers with each candidate alone, or, turned round, with all the others.

    Of several answers log Σ_a p_a, or of their means, which are then done: T is 1.
    """
    pairs = asked_pairs(examples, candidates, system, settings)
    scores = ScoreTable(table, open_scorer(settings.scorer, system.generator))
    keys = scores.complete(pairs)
    ends = np.array([settings.score_eos and HALF not in example.metadata for example in examples], bool)[pairs.example]
    values, tokens = scores.sums(keys, score_eos=ends)
    many = np.array([settings.answers == "any" and len(example.answers) > 1 for example in examples], bool)
    means = np.array([_target_of(source, settings).startswith("mean") for source in sources], bool)
    own = np.where((many & means)[pairs.example], values / tokens, values)
    totals, lengths = np.full(candidates.shape, -np.inf, np.float32), np.ones(len(examples), np.int64)
    np.logaddexp.at(totals, (pairs.example, pairs.place), own.astype(np.float32))
    lengths[pairs.example] = np.where(many[pairs.example], 1, tokens)
    sign = 1 if settings.evidence == "alone" else -1
    each: dict[tuple[int, int], np.ndarray] = {}
    if settings.loss == "marginal" and settings.over == "token":
        found = scores.token_logprobs(keys, score_eos=ends)
        each = dict(zip(zip(pairs.example.tolist(), pairs.place.tolist(), strict=True), found, strict=True))
    return Evidence(np.where(candidates >= 0, sign * totals, 0).astype(np.float32), lengths, each)


def _target_of(source: str, settings: LsrSettings) -> str:
    own = settings.corpus_halves if source == CORPUS_HALVES else None
    return settings.target if own is None else own.target


def _attended(examples: Sequence[Example], candidates: np.ndarray, system: RAG, settings: LsrSettings) -> Evidence:
    """The attention that each candidate is paid, all of a question's candidates in one prompt."""
    values = np.zeros(candidates.shape, dtype=np.float32)
    for n, example in enumerate(track(list(examples), "attending")):
        passages = _passages(candidates[n], system.retriever.base.corpus)
        if passages:
            prompt, answer = _prompt(example, passages, system), example.answers[0]
            paid = passage_attention(system.generator, prompt, passages, answer, score_eos=settings.score_eos)
            values[n, candidates[n] >= 0] = paid
    return Evidence(values, np.ones(len(examples), np.int64), {})


def _telling(rows: Sequence[LsrRow], settings: LsrSettings) -> list[LsrRow]:
    """Rows with two candidates or more and, where people graded them, with two grades or more; how many are not is told.

    One grade for all would be a flat target, which pulls the retriever up to passages that were rejected.
    """
    several = [row for row in rows if (row.candidates >= 0).sum() > 1]
    if len(several) < len(rows):
        log.warning("%d of %d questions have fewer than two candidates and are left out", len(rows) - len(several), len(rows))
    kept = several
    if settings.target == "given" and settings.evidence == "alone":
        kept = [row for row in several if len(set(row.answer_logprobs[row.candidates >= 0].tolist())) > 1]
    if len(kept) < len(several):
        log.warning("%d questions whose passages all have the same grade are left out", len(several) - len(kept))
    if rows and not kept:
        raise CorpusError(
            f"none of {len(rows)} questions has two candidates to choose between",
            hint="each needs two passages or more; with target: given, two that people judged differently",
        )
    return kept


def _graded(examples: Sequence[Example], candidates: np.ndarray, corpus: Corpus) -> tuple[np.ndarray, Evidence]:
    """Grades of candidates, the best first: only those that somebody judged, whether the search found them or not.

    Nobody's judgement is not the grade 0, which says "irrelevant". Only where all that was judged, or is said to be relevant,
    has one grade above 0, what else the search found stands beside it with 0, and the last found give way.
    """
    chosen = np.full_like(candidates, -1)
    values = np.zeros(candidates.shape, dtype=np.float32)
    for n, example in enumerate(examples):
        grades = example.grades or dict.fromkeys(example.relevant, 1)
        known = {row: grade for name, grade in grades.items() if (row := corpus.row(name)) is not None}
        praised = len(set(known.values())) == 1 and min(known.values()) > 0
        others = [row for row in candidates[n].tolist() if row not in known] if praised else []
        kept = _spanning(sorted(known, key=lambda row: -known[row]), candidates.shape[1]) + others
        kept = kept[: candidates.shape[1]]
        chosen[n, : len(kept)] = kept
        values[n, : len(kept)] = [known.get(row, 0) for row in kept]
    return chosen, Evidence(values, np.ones(len(examples), np.int64), {})


def _spanning(order: list[int], most: int) -> list[int]:
    """At most so many of an order: its head, and its last, so that the worst stays beside the best."""
    return order if len(order) <= most else [*order[: most - 1], order[-1]]


def _tokens(found: Evidence, n: int, settings: LsrSettings) -> np.ndarray | None:
    """(K,T) where the loss is a marginal over tokens."""
    if settings.loss != "marginal" or settings.over != "token":
        return None
    each = np.zeros((found.values.shape[1], int(found.lengths[n])), dtype=np.float32)
    for k in range(len(each)):
        if (n, k) in found.tokens:
            each[k] = found.tokens[n, k]
    return each


def _prompt(example: Example, passages: Sequence[Passage], system: RAG) -> Rendered:
    return system.generator.prompt.render(example.query, passages, history=example.history)


def _passages(rows: np.ndarray, corpus: Corpus) -> list[Passage]:
    return [corpus[int(row)] for row in rows if row >= 0]
