"""Self-RAG, short form: one answer a passage, and the best of them, or the label that most of their score is for.

    1  one pass over the questions            r, whether to retrieve
    2  every passage behind its question      rel of all of them, in one flattened batch; the question is not computed again
    3  prune, write the rest in lockstep      sup, use and seq from what was written
    4  argmax of w_seq·seq + w_rel·rel + w_sup·sup + w_use·use, or the sum of it over the passages that give one label

Questions share the batches: rows are questions × passages. Each candidate's context is its question and its own passage, so
passages do not see each other, and their order decides ties only. Source: Asai et al. 2023, arXiv 2310.11511, §3.3.

Deviations: `prune.kind: bound` writes the most relevant passages first and leaves out those that cannot win any more, which
gives the same answer; `options` are scored and not written (p over the options by passage, mixed with softmax_K(w_rel·rel));
`require` takes written answers out of the election as the long form takes children out of the search.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raglan.decode.base import Asked
from raglan.decode.self_rag.rate import BATCH_TOKENS, prompts_of, threshold_of
from raglan.decode.self_rag.rules import (
    decide,
    elect,
    open_order,
    refusals,
    relevance_order,
    said_of,
    scoring,
    weights,
    withheld,
)
from raglan.decode.self_rag.trace import raw_text, short_trace
from raglan.decode.self_rag.work import Branch, Question, Written, nothing_fits
from raglan.generator.base import Contexts, MarkedGenerator
from raglan.progress import track
from raglan.recipe import SelfRagDecode
from raglan.records import Answer, AnswerSegment, Candidate, Hit, Marked, Passage
from raglan.reflection import Components, components, first, rel, step, step_bound

__all__ = ["short"]

def short(generator: MarkedGenerator, asked: Asked, settings: SelfRagDecode) -> list[Answer]:
    """One answer a query, with the trace of how it came about; the same type whether it retrieved or not.

    Raises:
        GeneratorError: not one passage of a question fits behind it, or a mark's log-probability is missing and
            `decode.missing` is `error`.
    """
    return _Short(generator, settings).answers(asked)


class _Short:
    """The settings as numbers, and the steps of one batch of questions."""

    def __init__(self, generator: MarkedGenerator, settings: SelfRagDecode):
        self.generator, self.settings = generator, settings
        self.schema, self.prompt = generator.schema, generator.marked_prompt
        self.scoring, self.weights = scoring(settings, exact=generator.exact_marks), weights(settings)
        self.positions: int | None = getattr(generator, "positions", None)
        self.threshold: float | None = None
        # a server that is asked first and then to write is asked twice, so rel is read first only where it decides who writes
        self.judges = settings.prune.kind != "none" or settings.all_irrelevant != "best"
        self.known: dict[Passage, list[int]] = {}  # questions share passages

    def answers(self, asked: Asked) -> list[Answer]:
        prompts = prompts_of(self.generator, asked, self.settings)
        questions = [
            Question(query, hits, list(prompt), () if self.settings.labels else options)
            for query, hits, prompt, options in zip(
                asked.queries, asked.hits, prompts, asked.given(self.settings.options), strict=True
            )
        ]
        self.threshold = threshold_of(self.generator, prompts, self.settings)
        for group in track(list(self._groups(questions)), "reading"):
            self._read(group)
        return [self._answer(question) for question in questions]

    def _groups(self, questions: Sequence[Question]) -> Iterator[list[Question]]:
        """Questions that share batches: as many as the generator's batch of tokens holds, one at the least."""
        most = getattr(self.generator, "batch_tokens", BATCH_TOKENS)
        group: list[Question] = []
        held = 0
        for question in questions:
            passages = sum(len(hit.passage.text) // 3 for hit in question.hits)  # some three letters a token
            size = passages + max(1, len(question.hits)) * (len(question.prompt) + self.settings.limit)
            if group and held + size > most:
                yield group
                group, held = [], 0
            group.append(question)
            held += size
        if group:
            yield group

    def _read(self, group: Sequence[Question]) -> None:
        """Decide, branch, prune, and score or write."""
        began = time.perf_counter()
        roots = self.generator.contexts([question.prompt for question in group], marks=self.schema.marks)
        self._decide(group, roots)
        rows = [(place, branch) for place, question in enumerate(group) for branch in question.rows]
        branches = roots.branch([place for place, _ in rows], [branch.ids for _, branch in rows])
        for number, (_, branch) in enumerate(rows):
            branch.row = number
        if self.judges or any(question.options for question in group):
            self._judge([branch for _, branch in rows], branches.mark_logprobs)
        for question in group:
            question.spent.passed(
                sum(len(branch.ids) for branch in question.rows), reused=len(question.prompt) * len(question.rows)
            )
            self._prune(question)
        self._choose([question for question in group if question.options], branches)
        self._write([question for question in group if not question.options], branches)
        for question in group:
            question.spent.seconds = (time.perf_counter() - began) / len(group)

    def _judge(self, rows: Sequence[Branch], marks: NDArray[np.float32]) -> None:
        """rel of every passage, from what stands behind it already."""
        behind = [branch for branch in rows if branch.hit is not None]
        values = rel(marks[[branch.row for branch in behind]], missing=self.scoring.missing) if behind else ()
        for branch, value in zip(behind, values, strict=True):
            self._weigh(branch, float(value))

    def _weigh(self, branch: Branch, value: float) -> None:
        branch.rel, branch.bound = value, float(step_bound(value, self.weights))

    def _decide(self, group: Sequence[Question], roots: Contexts) -> None:
        likeliest = [None] * len(group) if self.threshold is not None else [int(token) for token in roots.best]
        for question, marks, token in zip(group, roots.mark_logprobs, likeliest, strict=True):
            question.spent.passed(len(question.prompt))
            question.decision = decide(
                marks, self.settings, missing=self.scoring.missing, threshold=self.threshold,
                argmax=None if token is None else token == self.schema.yes, hits=bool(question.hits),
            )  # fmt: skip
            if question.decision.retrieve:
                self._spread(question)
            else:
                question.branches = [self._branch(question, None)]

    def _spread(self, question: Question) -> None:
        """A branch a passage; those that do not fit behind the question are left out."""
        needs = 1 + max((len(self.prompt.foreign(option)) for option in question.options), default=0)  # IsRel, and an option
        question.branches = [self._branch(question, hit, needs=needs) for hit in question.hits]
        dropped = len(question.branches) - len(question.alive)
        if dropped == len(question.branches):
            raise nothing_fits(question.query, dropped, asked=len(question.prompt), positions=self.positions)
        question.flags += [f"too_long:{dropped}"] if dropped else []
        if "no_retrieval" in (self.settings.all_irrelevant, self.settings.require.any and self.settings.on_empty):
            question.spare = self._branch(question, None)

    def _branch(self, question: Question, hit: Hit | None, *, needs: int = 1) -> Branch:
        ids = self.prompt.no_retrieval() if hit is None else self._passage(hit.passage)
        left = sys.maxsize if self.positions is None else self.positions - len(question.prompt) - len(ids)
        return Branch(hit, ids, min(self.settings.limit, left), pruned="too_long" if hit is not None and left < needs else "")

    def _passage(self, passage: Passage) -> list[int]:
        if passage not in self.known:
            self.known[passage] = self.prompt.passage(passage)
        return self.known[passage]

    def _prune(self, question: Question) -> None:
        """Leave out passages by what is known before anything is written. `bound` waits for the first scores."""
        prune, alive = self.settings.prune, question.alive
        if not question.retrieved:
            return
        if self.settings.all_irrelevant != "best" and all(branch.rel < 0.5 for branch in alive):
            self._without(question)
            return
        order = [alive[place] for place in relevance_order([b.rel for b in alive], [b.rank for b in alive])]
        kept = order
        if prune.kind == "top_m":
            kept = order[: prune.m]
        elif prune.tau is not None:
            kept = [branch for branch in order if branch.rel >= prune.tau] or order[:1]
        for branch in order[len(kept) :]:
            branch.pruned = prune.kind

    def _without(self, question: Question) -> None:
        """Every passage is likelier irrelevant than relevant: answer without one, or not at all."""
        question.flags.append("all_irrelevant")
        for branch in question.alive:
            branch.pruned = "all_irrelevant"
        question.abstains = self.settings.all_irrelevant == "abstain"
        question.branches += [question.spare] if question.spare is not None and not question.abstains else []

    def _write(self, group: Sequence[Question], branches: Contexts) -> None:
        """Waves of all questions' next branches, in lockstep, until none is left that could win."""
        while any(waves := [self._wave(question) for question in group]):
            self._extend(group, waves, branches)
        if any(waves := [self._unaided(question) for question in group]):
            self._extend(group, waves, branches)

    def _extend(self, group: Sequence[Question], waves: Sequence[Sequence[Branch]], branches: Contexts) -> None:
        rows = [branch for wave in waves for branch in wave for _ in range(self.settings.samples)]
        for branch, marked in zip(rows, self._continued(rows, branches), strict=True):
            branch.written.append(self._scored(branch, marked))
        for question, wave in zip(group, waves, strict=True):
            question.spent.wrote([len(one.marked.ids) for branch in wave for one in branch.written])

    def _wave(self, question: Question) -> list[Branch]:
        """The branches that are written next: all, or with `bound` the most relevant of those that can still win."""
        waiting = [branch for branch in question.alive if not branch.written]
        if self.settings.prune.kind != "bound":
            return waiting
        best = max((one.final for one in question.written if not one.refused), default=-np.inf)
        for branch in waiting:
            branch.pruned = "bound" if branch.bound < best else ""
        waiting = [branch for branch in waiting if not branch.pruned]
        order = relevance_order([branch.rel for branch in waiting], [branch.rank for branch in waiting])
        return [waiting[place] for place in order[: self.settings.prune.wave]]

    def _unaided(self, question: Question) -> list[Branch]:
        """The branch without a passage, where every answer breaks a hard constraint and it is to stand in for them."""
        spare = question.spare
        if self.settings.on_empty != "no_retrieval" or spare is None or spare in question.branches or not question.written:
            return []
        if any(not one.refused for one in question.written):
            return []
        question.branches.append(spare)
        return [spare]

    def _continued(self, rows: Sequence[Branch], branches: Contexts) -> list[Marked]:
        """What the model writes behind each branch. An IsRel token may be forced behind a passage, and nowhere else."""
        forced = [self.settings.force_isrel and branch.hit is not None for branch in rows]
        found: dict[int, Marked] = {}
        for first_is_rel in dict.fromkeys(forced):
            places = [place for place, own in enumerate(forced) if own == first_is_rel]
            written = branches.only([rows[place].row for place in places]).write(
                stop_ids=() if "stop" in self.settings.released else (self.schema.yes, self.schema.opens),
                max_new_tokens=[rows[place].room for place in places],
                first=self.schema.ids["is_rel"] if first_is_rel else None,
                temperature=self.settings.temperature, seed=self.settings.seed,
            )  # fmt: skip
            found |= dict(zip(places, written, strict=True))
        return [found[place] for place in range(len(rows))]

    def _scored(self, branch: Branch, marked: Marked) -> Written:
        parts = components(
            marked.ids, marked.logprobs, marked.mark_logprobs, self.schema, retrieved=branch.hit is not None,
            settings=self.scoring, eos=self.generator.eos,
        )  # fmt: skip
        if branch.hit is not None:
            self._weigh(branch, parts.rel)  # what it is already, where it was read before
        text = self.prompt.text(marked.ids)
        flags = dict.fromkeys(parts.flags)
        flags |= dict.fromkeys(["length"] if marked.finish == "length" else [])
        flags |= dict.fromkeys(["off_grammar"] if self.schema.opens in marked.ids else [])  # it invents its evidence
        flags |= dict.fromkeys([] if text else ["no_text"])
        refused = self._refused(branch, marked)
        flags |= dict.fromkeys(f"require:{name}" for name in refused)
        final = float(step(parts, self.weights))
        return Written(branch, marked, text, raw_text(self.prompt, marked.ids), parts, final, tuple(flags), refused)

    def _refused(self, branch: Branch, marked: Marked) -> tuple[str, ...]:
        """The hard constraints that it breaks."""
        if not self.settings.require.any:
            return ()
        said = said_of(marked, self.schema, retrieved=branch.hit is not None, by=self.settings.require_by)
        broken = refusals(self.settings.require, said, retrieved=branch.hit is not None)
        return tuple(name for name, on in broken.items() if on)

    def _choose(self, group: Sequence[Question], branches: Contexts) -> None:
        """p of every option: nothing is written, one pass scores all options of all questions behind all passages."""
        if not group:
            return
        marks = branches.mark_logprobs
        rows = [
            (question, branch, [*self._opening(branch, marks), *self.prompt.foreign(option)])
            for question in group for branch in question.alive for option in question.options
        ]  # fmt: skip
        if not rows:
            return
        scores = iter(branches.score([branch.row for _, branch, _ in rows], [ids for _, _, ids in rows]))
        for question in group:
            logprobs = [[_total(next(scores)[branch.hit is not None :]) for _ in question.options] for branch in question.alive]
            steps = [float(step(Components(0.0, branch.rel, 0.0, 0.0), self.weights)) for branch in question.alive]
            own = [(branch, ids) for asked, branch, ids in rows if asked is question]
            if own:
                each = _softmax(np.array(logprobs))
                question.each, question.mixed = each.tolist(), (_softmax(np.array(steps)) @ each).tolist()
                question.spent.passed(
                    sum(len(ids) - 1 for _, ids in own), reused=sum(len(question.prompt) + len(branch.ids) for branch, _ in own)
                )

    def _opening(self, branch: Branch, marks: ArrayLike) -> list[int]:
        """The IsRel token that the model would write behind a passage; it is given, not scored."""
        if branch.hit is None:
            return []
        own = np.nan_to_num(np.asarray(marks)[branch.row, self.schema.place("is_rel")], nan=-np.inf)
        return [self.schema.ids["is_rel"][int(own.argmax())]]

    def _answer(self, question: Question) -> Answer:
        if question.abstains:
            return self._made(question, self.settings.abstention, flags=["abstained"])
        if question.options:
            return self._option(question)
        found, relaxed = self._standing(question)
        if not found:
            return self._made(question, self.settings.abstention, flags=["abstained"])
        texts, finals, ranks = zip(*((one.text, one.final, one.branch.rank) for one in found), strict=True)
        verdict = elect(texts, finals, ranks, self.settings)
        best = found[verdict.place]
        ranked = [best, *(found[place] for place in open_order(finals, ranks) if place != verdict.place)]
        text = best.text if verdict.text is None else verdict.text
        candidates = tuple(Candidate(o.text, o.marked.ids, o.logprob, o.finished, score=o.final) for o in ranked)
        answer = self._made(question, text, best, flags=[*relaxed, *verdict.flags], standings=verdict.standings)
        return replace(answer, candidates=candidates)

    def _standing(self, question: Question) -> tuple[list[Written], list[str]]:
        """What satisfies `require`; where nothing does, the best one with `relax`, and the flags that say so."""
        written = question.written
        found = [one for one in written if not one.refused]
        if found or not written or self.settings.on_empty != "relax":
            return found, []
        best = written[open_order([one.final for one in written], [one.branch.rank for one in written])[0]]
        return [best], [f"relaxed:{name}" for name in best.refused]

    def _option(self, question: Question) -> Answer:
        """The likeliest option; ties keep the options' order."""
        named = sorted(zip(question.options, question.mixed, strict=True), key=lambda pair: -pair[1])
        withdrawn, flags = withheld(named, self.settings)
        with np.errstate(divide="ignore"):
            logs = np.log([p for _, p in named]).tolist()
        candidates = tuple(
            Candidate(option, tuple(self.prompt.foreign(option)), log, True, score=p)
            for (option, p), log in zip(named, logs, strict=True)
        )
        text = named[0][0] if withdrawn is None else withdrawn
        answer = self._made(question, text, flags=flags, standings=named)
        return replace(answer, candidates=candidates, logprob=logs[0], ids=candidates[0].ids)

    def _made(
        self, question: Question, text: str, best: Written | None = None, *, flags: Sequence[str] = (),
        standings: Sequence[tuple[str, float]] = (),
    ) -> Answer:  # fmt: skip
        trace = short_trace(question, best, flags=[*question.flags, *flags], standings=standings)
        answer = Answer(
            query=question.query, text=text, logprob=0.0, finished=True, hits=question.read, trace=trace,
            settings=self.settings.model_dump(mode="json"),
        )  # fmt: skip
        if best is None:
            return answer
        segment = self._segment(question, best)
        return replace(
            answer, logprob=best.logprob, finished=best.finished, ids=best.marked.ids, raw=best.raw, segments=(segment,),
            citations=(segment.hit,) if segment.cited and segment.hit is not None else (),
        )  # fmt: skip

    def _segment(self, question: Question, best: Written) -> AnswerSegment:
        """A short answer is one segment, which cites its passage where that is relevant and supports it."""
        ids, hit, parts = best.marked.ids, best.branch.hit, best.parts
        said = {role: self._said(ids, role) for role in ("is_rel", "is_sup", "is_use")}
        supported = said["is_rel"] == self.schema.strings["is_rel"][1] and said["is_sup"] in self.schema.strings["is_sup"][:2]
        cited = hit is not None and (supported or self.settings.cite == "retrieved")
        return AnswerSegment(
            best.text, "yes" if hit is not None else "no", hit, **said, seq=parts.seq, rel=parts.rel, sup=parts.sup,
            use=parts.use, score=best.final, cited=(1,) if cited else (), flags=best.flags, ids=ids,
        )  # fmt: skip

    def _said(self, ids: Sequence[int], role: str) -> str:
        """The first reflection token of a role that was written; empty where none was. IsRel stands at the beginning."""
        place = first(ids[:1] if role == "is_rel" else ids, self.schema.ids[role])
        return "" if place is None else self.schema.spelling(ids[place])


def _total(logprobs: ArrayLike) -> float:
    return float(np.asarray(logprobs, np.float64).sum())


def _softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the last axis; all −inf is even."""
    top = values.max(-1, keepdims=True)
    shares = np.exp(values - np.where(np.isneginf(top), 0.0, top))
    shares = np.where(np.isneginf(top), 1.0, shares)
    return np.asarray(shares / shares.sum(-1, keepdims=True))
