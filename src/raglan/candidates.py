"""What a query encoder learns from: questions, the passages that come into question, and the language model's word on each.

Candidates come from the starting retriever, once; scores from a table that is completed before the first step. Two kinds of
questions: given ones with answers, and `corpus_halves`, which need no label: x is the beginning of a passage, y its end, and
useful is what helps to go on from x to y (Lin et al. 2023, arXiv 2310.01352, §2.3; 50 tokens each).

Deviations. The passage that x and y come from, and neighbours of the same document whose span overlaps y, hold the answer
itself, so they are no candidates; the paper does not say what it does with them. A half's end is no end of text, so the end
token does not count. The paper's target, p(y|x,z), is 0 for 50 tokens with every passage: `objective.corpus_halves` names
another one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np

from raglan.corpus import Corpus
from raglan.data import learned_answers, load_examples, stage_examples
from raglan.encoder import Encoder
from raglan.errors import CorpusError, RecipeError
from raglan.objective.lsr import CORPUS_HALVES, LsrRow
from raglan.preference import HALF, asked_pairs, favourite_pairs, preferred
from raglan.progress import track
from raglan.rag import RAG
from raglan.recipe import LsrMixData, LsrObjective, QuestionData
from raglan.records import Example, Passage
from raglan.scores import Plan, ScoreTable, open_scorer

__all__ = ["corpus_halves", "lsr_candidates", "lsr_examples", "lsr_plan", "lsr_rows"]

log = logging.getLogger(__name__)


def lsr_rows(examples: Sequence[Example], system: RAG, settings: LsrObjective, table: Path) -> list[LsrRow]:
    """Candidates by the retriever as it is, and the language model's word on them, out of a table that is completed first."""
    texts, candidates = lsr_candidates(examples, system, settings)
    sources = [str(example.metadata.get("source", "")) for example in examples]
    return preferred(examples, texts, candidates, system, settings, table, sources=sources)


def lsr_plan(
    examples: Sequence[Example], system: RAG, settings: LsrObjective, table: Path, *, held_out: Sequence[Example] = ()
) -> Plan:
    """What `lsr_rows`, and `judged` of held-out questions, would ask of the language model, which is not asked."""
    asked = []
    if settings.target != "given":  # grades and attention are no scores
        _, candidates = lsr_candidates(examples, system, settings)
        asked.append(asked_pairs(examples, candidates, system, settings))
    favourites = favourite_pairs(held_out, system, settings)
    asked += [favourites] if len(favourites) else []
    if not asked:
        return Plan(0, 0, 0, 0)
    scores = ScoreTable(table, open_scorer(settings.scorer, system.generator))
    plans = [scores.plan(pairs) for pairs in asked]  # the same pair in both is rare, and would count twice
    return Plan(*(sum(numbers) for numbers in zip(*map(astuple, plans), strict=True)))


def lsr_candidates(examples: Sequence[Example], system: RAG, settings: LsrObjective) -> tuple[list[str], np.ndarray]:
    """What is searched for, and the K best rows of each that may be candidates, (n,K) int64; −1 where there are no more.

    So many more are searched as any example excludes; those are dropped, and K are kept.
    """
    retriever, base = system.retriever, system.retriever.base
    k = min(settings.k, len(base.corpus))
    searcher = retriever if settings.candidates is None else retriever.by(settings.candidates)
    texts = retriever.search_texts([example.query for example in examples], [example.history for example in examples])
    excluded = [_not_candidates(example, base.corpus) for example in examples]
    depth = min(len(base.corpus), k + max(map(len, excluded), default=0))
    _, found = searcher.search(texts, depth)
    candidates = found[:, :k].copy()
    for n, rows in enumerate(excluded):
        if rows:
            kept = [row for row in found[n].tolist() if row not in rows][:k]
            candidates[n] = kept + [-1] * (k - len(kept))
    return texts, candidates


def lsr_examples(
    data: QuestionData | LsrMixData, system: RAG, seed: int, *, every: bool = False, graded: bool = False
) -> list[Example]:
    """The examples an lsr stage learns from, in their shares, in an order that follows from the seed.

    Args:
        every: keep all answers of a question, whatever `data.answers` says.
        graded: people's judgements of passages are learned: a question needs those, and no answer.

    Raises:
        CorpusError: no question with an answer or judged passages, or no passage that is long enough.
        RecipeError: judgements are asked of halves, which nobody judged.
    """
    if graded and isinstance(data, LsrMixData) and CORPUS_HALVES in data.sources:
        raise RecipeError(
            "target: given needs people's grades, and data.sources.corpus_halves has none", hint="data.sources: {tasks: 1}"
        )
    tasks = data if isinstance(data, QuestionData) else data.tasks
    corpus = system.retriever.base.corpus
    asked: list[Example] = []
    if tasks is not None:
        tasks = tasks.model_copy(update={"answers": "each"}) if every else tasks
        asked = stage_examples(tasks, corpus, seed, needs="passages" if graded else "answers")
        asked = asked if graded else learned_answers(asked, tasks, system.retriever, seed)
    return asked if isinstance(data, QuestionData) else _mixed(asked, data, system, seed)


def corpus_halves(
    corpus: Corpus, encoder: Encoder, *, count: int | None, tokens: int = 50, seed: int = 0, without: Iterable[str] = ()
) -> list[Example]:
    """At most `count` passages as questions: x = the first `tokens` tokens, y = the last; passages of fewer than twice as
    many are not used.

    Args:
        count: how many; None is all.
        without: documents whose passages are left out.
    """
    order, left_out = np.random.default_rng(seed).permutation(len(corpus)), set(without)
    made: list[Example] = []
    for start in track(range(0, len(order), 1024), "cutting halves"):
        if count is not None and len(made) >= count:
            break
        passages = [corpus[int(row)] for row in order[start : start + 1024]]
        passages = [passage for passage in passages if passage.document not in left_out]
        for passage, spans in zip(passages, encoder.spans([passage.text for passage in passages]), strict=True):
            if len(spans) >= 2 * tokens:
                made.append(_halved(passage, spans[tokens - 1][1], spans[-tokens][0]))
    return made[:count]


def _halved(passage: Passage, end: int, begin: int) -> Example:
    x, y = passage.text[:end].strip(), passage.text[begin:].strip()
    return Example(passage.id, x, (y,), metadata={HALF: {"passage": passage.id, "begin": passage.start + begin}})


def _not_candidates(example: Example, corpus: Corpus) -> set[int]:
    """Rows that hold what a half asks for: its own passage, and those of the same document whose span overlaps y.

    A document's passages are neighbours in the corpus, in order.
    """
    half = example.metadata.get(HALF)
    if half is None:
        return set()
    row = corpus.row(half["passage"])
    assert row is not None
    own, found = corpus[row], {row}
    for step in (-1, 1):
        other = row + step
        while 0 <= other < len(corpus) and _overlaps(corpus[other], own, half["begin"]):
            found.add(other)
            other += step
    return found


def _overlaps(passage: Passage, own: Passage, begin: int) -> bool:
    return passage.document == own.document and passage.start < own.end and begin < passage.end


def _mixed(asked: Sequence[Example], data: LsrMixData, system: RAG, seed: int) -> list[Example]:
    """Shares of both sources, each drawn without repetition, as many in all as the scarcer one allows."""
    whole = sum(data.sources.values())
    shares = {source: share / whole for source, share in data.sources.items()}
    most = [] if data.count is None else [float(data.count)]
    most += [len(asked) / shares["tasks"]] if "tasks" in shares else []
    halves: list[Example] = []
    if CORPUS_HALVES in shares:
        wanted = round(min(most) * shares[CORPUS_HALVES]) if most else None
        halves = _cut(data, system, wanted, seed)
        most += [len(halves) / shares[CORPUS_HALVES]] if wanted is None or len(halves) < wanted else []
    total = min(most)
    if data.count is not None and round(total) < data.count:
        log.warning("data.count is %d, but the sources have %d rows in these shares", data.count, total)
    chance = np.random.default_rng([seed, 1])
    parts = {CORPUS_HALVES: halves, "tasks": list(asked)}
    rows = [
        _marked(parts[source][place], source)
        for source, share in sorted(shares.items())
        for place in chance.permutation(len(parts[source]))[: round(total * share)]
    ]
    log.info("lsr_mix: %s", ", ".join(f"{round(total * share)} {source}" for source, share in sorted(shares.items())))
    return [rows[place] for place in chance.permutation(len(rows))]


def _cut(data: LsrMixData, system: RAG, wanted: int | None, seed: int) -> list[Example]:
    corpus = system.retriever.base.corpus
    halves = corpus_halves(
        corpus, system.retriever.encoder, count=wanted, tokens=data.half_tokens, seed=seed, without=_documents_of(data, corpus)
    )
    if not halves and wanted != 0:
        raise CorpusError(
            f"no passage that may be used has {2 * data.half_tokens} tokens, so corpus_halves are none",
            hint="raise knowledge.chunk.max_tokens and build again, or lower data.half_tokens",
        )
    return halves


def _documents_of(data: LsrMixData, corpus: Corpus) -> set[str]:
    """Documents of the passages that are relevant to these questions."""
    found = set()
    for path in data.exclude_documents_of:
        rows = [corpus.row(name) for example in load_examples(path, corpus) for name in example.relevant]
        own = {corpus[row].document for row in rows if row is not None}
        if not own:
            log.warning("exclude_documents_of: %s names no relevant passage, so no document is kept out", path)
        found |= own
    return found


def _marked(example: Example, source: str) -> Example:
    return replace(example, metadata={**example.metadata, "source": source})
