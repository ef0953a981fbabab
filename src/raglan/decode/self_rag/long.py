"""Self-RAG, long form: a tree of segments for every question, all questions' branches in one batch (`tree` has the search).

    a level = one pass for the histories that are new + one for all branches, questions × hypotheses × passages + a pass a token

What stands before a segment's end was read already: the boundary's marks decide the next step, and a question, a history and a
passage pass through the model once. Citations come from the path itself; text is never searched for them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from raglan.citations import cite
from raglan.decode.base import Asked
from raglan.decode.self_rag.hypothesis import Branch, Hypothesis, Ids, Step, chunks, whole
from raglan.decode.self_rag.pool import Pool
from raglan.decode.self_rag.rate import prompts_of, threshold_of
from raglan.decode.self_rag.trace import finite, raw_text
from raglan.decode.self_rag.tree import Passages, Tree
from raglan.decode.self_rag.work import nothing_fits
from raglan.errors import RecipeError
from raglan.generator.base import MarkedGenerator
from raglan.marked_prompt import MarkedPrompt
from raglan.recipe import SelfRagDecode
from raglan.records import Answer, AnswerSegment, Hit, Marked
from raglan.reflection import Schema

__all__ = ["cited_text", "long"]

Retrieve = Callable[[str, int], list[Hit]]


def long(
    generator: MarkedGenerator, asked: Asked, settings: SelfRagDecode, *, retrieve: Retrieve | None = None,
    query: Callable[[str, str], str] | None = None,
) -> list[Answer]:  # fmt: skip
    """One answer a query, its segments with their citations, the `n_best` others and the trace.

    Args:
        retrieve: finds passages for a text; without it the given hits are all there are.
        query: makes that text of the question and the last segment, in place of `settings.query`.

    Raises:
        CheckpointError: a model without reflection tokens. GeneratorError: a prompt with more positions than it has, or not
            one passage of a question fits behind it.
        RecipeError: questions with choices, which are for the short form.
    """
    if any(asked.choices):
        raise RecipeError("decode.form is 'long', which does not choose among given answers", hint="decode.form: short")
    questions = prompts_of(generator, asked, settings)
    threshold = threshold_of(generator, questions, settings)
    answers: dict[int, Answer] = {}
    for group in _groups(generator, questions, asked, settings):
        search = Search(generator, [questions[place] for place in group], asked.only(group), settings, threshold)
        answers.update(zip(group, search.run(retrieve, query), strict=True))
    return [answers[place] for place in range(len(questions))]


class Search:
    """The trees of a group of questions, which share every pass."""

    def __init__(
        self, generator: MarkedGenerator, questions: Sequence[Ids], asked: Asked, settings: SelfRagDecode,
        threshold: float | None,
    ):  # fmt: skip
        self.generator, self.questions, self.asked, self.settings = generator, questions, asked, settings
        self.threshold = threshold
        schema = generator.schema
        self.ends = frozenset() if "stop" in settings.released else frozenset((*schema.ids["retrieve"], schema.opens))
        self.positions: int | None = getattr(generator, "positions", None)
        self.trees: list[Tree] = []

    def run(self, retrieve: Retrieve | None, query: Callable[[str, str], str] | None) -> list[Answer]:
        """The answers, in order."""
        began, generator, settings = time.monotonic(), self.generator, self.settings
        root = generator.contexts(self.questions, marks=generator.schema.marks)
        for place, (question, text, hits) in enumerate(zip(self.questions, self.asked.queries, self.asked.hits, strict=True)):
            passages = Passages(text, hits, settings, retrieve, self.asked.k, query)
            self.trees.append(Tree(
                question, passages, settings, prompt=generator.marked_prompt, exact=generator.exact_marks,
                threshold=self.threshold, marks=root.mark_logprobs[place], likeliest=int(root.best[place]),
            ))  # fmt: skip
            self.trees[-1].spent.passed(len(question))
        self.bare = self.own = Pool(root)  # histories whose passages have left, and contexts up to the last passage
        for depth in range(1, settings.max_segments + 1):
            self._level(depth)
            if not any(tree.live for tree in self.trees):
                break
        for tree in self.trees:
            tree.end("depth")
        seconds = time.monotonic() - began
        return [self._answer(tree, seconds) for tree in self.trees]

    # --- one level

    def _level(self, depth: int) -> None:
        growing = [tree for tree in self.trees if tree.live]
        planned = [(tree, branch) for tree in growing for branch in tree.plan()]
        if not planned:
            return
        history = self._histories(planned)
        again = self._extend(history, planned, depth)
        if again:
            self._extend(history, again, depth)
        for tree in growing:
            tree.close()

    def _histories(self, planned: Sequence[tuple[Tree, Branch]]) -> Pool:
        """What stands before the branches of every hypothesis: new segments pass through the model once for all their children.

        Where the oldest passage leaves, what follows it is computed anew, once, behind the histories without passages.
        """
        parents = list(dict.fromkeys((tree, branch.parent) for tree, branch in planned))
        gone = [(tree, [tree.question, *chunks(parent.past, tree.keep)[0]]) for tree, parent in parents]
        if "siblings" in self.settings.released:
            gone += [(tree, [tree.question]) for tree, _ in parents]  # a sibling's text stands behind no context that is there
        self.bare = _reach(self.bare, gone)
        every = [(tree, self._pieces(tree, parent)) for tree, parent in parents]
        goes_on = all(whole(pieces[:-1]) in self.own.place for _, pieces in every)
        return _reach(self.own if goes_on else self.bare, every)

    def _extend(self, history: Pool, planned: Sequence[tuple[Tree, Branch]], depth: int) -> list[tuple[Tree, Branch]]:
        """Write the planned branches to the ends of their segments, in one batch. Gives those that are to be tried instead."""
        fitting = [(tree, branch) for tree, branch in planned if self._fits(tree, branch)]
        for tree in dict.fromkeys(tree for tree, _ in planned) if depth == 1 else ():
            passages = sum(branch.hit is not None for owner, branch in planned if owner is tree)
            if passages and not any(owner is tree for owner, _ in fitting):
                raise nothing_fits(tree.passages.query, passages, asked=len(tree.question), positions=self.positions)
        wanted = [(tree, self._context(tree, branch)) for tree, branch in fitting]
        if not wanted:
            return []
        own = self.own = _reach(history, wanted)
        rows: list[tuple[Tree, Branch, int, int]] = []  # place in the pool, limit
        for tree in dict.fromkeys(tree for tree, _ in fitting):
            mine = [(branch, own.place[whole(self._context(tree, branch))]) for owner, branch in fitting if owner is tree]
            if self.settings.prune.kind in ("top_m", "tau"):
                marks = own.contexts.mark_logprobs[[place for _, place in mine]]
                mine = [mine[kept] for kept in tree.prune([branch for branch, _ in mine], marks)]
            limit = tree.room([branch for branch, _ in mine])
            rows += [(tree, branch, place, limit) for branch, place in mine if limit]
        written = self._write(own, rows, depth) if rows else []
        again = []
        for tree in dict.fromkeys(row[0] for row in rows):
            grown = [(row[1], row[3], one) for row, one in zip(rows, written, strict=True) if row[0] is tree]
            tree.spent.wrote([len(one.ids) for _, _, one in grown])
            cut = "length" if grown[0][1] == self.settings.limit else "budget"
            refused = tree.grow([branch for branch, _, _ in grown], [one for _, _, one in grown], cut=cut)
            again += [(tree, branch) for branch in refused]
        return again

    def _fits(self, tree: Tree, branch: Branch) -> bool:
        """Whether the model has a position left behind a branch; its tree is told."""
        fits = self._left(self._context(tree, branch)) > 0
        if fits:
            tree.take(branch)
        else:
            tree.refuse(branch, "too_long")
        return fits

    def _left(self, pieces: Sequence[Ids]) -> int:
        return sys.maxsize if self.positions is None else self.positions - sum(map(len, pieces))

    def _write(self, own: Pool, rows: Sequence[tuple[Tree, Branch, int, int]], depth: int) -> list[Marked]:
        """One continuation a branch; with `force_isrel` those behind a passage begin with an IsRel token, by themselves."""
        settings, schema = self.settings, self.generator.schema
        forced = [settings.force_isrel and branch.decision == "yes" for _, branch, _, _ in rows]
        written: dict[int, Marked] = {}
        for which in dict.fromkeys(forced):
            numbers = [number for number, one in enumerate(forced) if one is which]
            picked = [rows[number] for number in numbers]
            found = own.contexts.only([place for _, _, place, _ in picked]).write(
                stop_ids=self.ends,
                max_new_tokens=[min(limit, self._left(self._context(tree, branch))) for tree, branch, _, limit in picked],
                first=schema.ids["is_rel"] if which else None,
                temperature=settings.temperature, seed=settings.seed + depth,
            )  # fmt: skip
            written.update(zip(numbers, found, strict=True))
        return [written[number] for number in range(len(rows))]

    def _pieces(self, tree: Tree, hypothesis: Hypothesis) -> list[Ids]:
        gone, kept = chunks(hypothesis.past, tree.keep)
        return [tree.question, *gone, *kept]

    def _context(self, tree: Tree, branch: Branch) -> list[Ids]:
        return [*self._pieces(tree, branch.parent), branch.forced]

    # --- answers

    def _answer(self, tree: Tree, seconds: float) -> Answer:
        settings = self.settings
        best = tree.best[: settings.n_best] or [tree.lost()]
        first, *others = [self._told(tree, one) for one in best]
        spent = tree.spent
        trace = {
            "form": "long", "retrieved": tree.retrievals > 0, "prompt": list(tree.question),
            "decisions": [told for level in tree.levels for told in level["decisions"]],
            "levels": [{"depth": level["depth"], "candidates": level["candidates"]} for level in tree.levels],
            "best": [one.number for one in best], "finish": best[0].finish, "stopped": tree.stopped,
            "score": finite(best[0].key[0]),
            "cost": {
                "calls": spent.calls, "computed": spent.computed, "reused": spent.reused, "generated": spent.generated,
                "retrievals": tree.retrievals, "searches": tree.passages.searches, "passages": tree.read,
                "seconds": round(seconds / len(self.trees), 6),
            },
        }  # fmt: skip
        return replace(first, alternatives=tuple(others), trace=trace)

    def _told(self, tree: Tree, one: Hypothesis) -> Answer:
        """An answer of one path."""
        schema, prompt, settings = self.generator.schema, self.generator.marked_prompt, self.settings
        shown = [step for step in one.steps if not _left_out(step, schema, settings)]
        hits = {hit.passage.id: hit for step in shown for hit in _cites(step, schema, settings)}
        order = cite([(step.text, [hit.passage.id for hit in _cites(step, schema, settings)]) for step in shown])[1]
        number = {identity: place for place, identity in enumerate(order, 1)}
        return Answer(
            query=tree.passages.query, text=cite([(step.text, ()) for step in shown])[0],
            logprob=sum(step.logprob for step in one.steps), finished=one.finish == "eos", hits=tuple(tree.offered.values()),
            settings=settings.model_dump(mode="json"), ids=tuple(token for step in one.steps for token in step.ids),
            segments=tuple(
                _segment(step, schema, [number[hit.passage.id] for hit in _cites(step, schema, settings)]) for step in shown
            ),
            citations=tuple(hits[identity] for identity in order),
            raw="".join(_raw(step, prompt) for step in one.steps),
        )  # fmt: skip


def cited_text(answer: Answer) -> str:
    """An answer's text with its citations; [n] is the n-th of `answer.citations`."""
    passages = [hit.passage.id for hit in answer.citations]
    return cite([(made.text, [passages[number - 1] for number in made.cited]) for made in answer.segments])[0]


def _cites(step: Step, schema: Schema, settings: SelfRagDecode) -> list[Hit]:
    """The passage that a segment rests on: its own where it is relevant and supports it, or the one it reads on in.

    A segment without words rests on none: it is not in the text.
    """
    if step.hit is None or step.decision == "no" or not step.text.strip():
        return []
    if step.decision == "continue" or settings.cite == "retrieved":
        return [step.hit]
    fine = step.is_rel == schema.ids["is_rel"][1] and step.is_sup in schema.ids["is_sup"][:2]
    return [step.hit] if fine else []


def _left_out(step: Step, schema: Schema, settings: SelfRagDecode) -> bool:
    """Released: what no passage supports is taken out of the finished text, when it has long been read on from."""
    return "ignore_cont" in settings.released and step.is_sup == schema.ids["is_sup"][2]


def _segment(step: Step, schema: Schema, cited: Sequence[int]) -> AnswerSegment:
    said = {
        role: "" if one is None else schema.spelling(one)
        for role, one in (("is_rel", step.is_rel), ("is_sup", step.is_sup), ("is_use", step.is_use))
    }
    parts = step.parts
    return AnswerSegment(
        step.text, step.decision, step.hit, said["is_rel"], said["is_sup"], said["is_use"], seq=float(parts.seq),
        rel=float(parts.rel), sup=float(parts.sup), use=float(parts.use), score=step.score, cited=tuple(cited),
        flags=step.flags, ids=step.ids,
    )  # fmt: skip


def _raw(step: Step, prompt: MarkedPrompt) -> str:
    """A segment with its reflection tokens spelled, without its passage."""
    return raw_text(prompt, (*step.forced[:1], *step.ids))


def _reach(pool: Pool, wanted: Sequence[tuple[Tree, Sequence[Ids]]]) -> Pool:
    """Contexts of several trees in one pass, and what that took each of them."""
    for tree in dict.fromkeys(tree for tree, _ in wanted):
        own = {whole(pieces): len(pool.longest(pieces)) for owner, pieces in wanted if owner is tree}
        new = {ids: reused for ids, reused in own.items() if len(ids) > reused}
        if new:
            tree.spent.passed(sum(len(ids) - reused for ids, reused in new.items()), reused=sum(new.values()))
    return pool.reach([pieces for _, pieces in wanted])


def _groups(
    generator: Any, questions: Sequence[Ids], asked: Asked, settings: SelfRagDecode
) -> Iterator[list[int]]:  # fmt: skip
    """Questions that are searched together: as many as the generator's `batch_tokens` hold branches of."""
    most = getattr(generator, "batch_tokens", None)
    group: list[int] = []
    used = 0
    for place, question in enumerate(questions):
        hits = asked.hits[place]
        longest = max((len(hit.passage.text) // 3 for hit in hits), default=0)
        rows = settings.beam * max(1, len(hits), asked.k)
        need = rows * (len(question) + (longest + settings.limit) * 2)
        if group and most is not None and used + need > most:
            yield group
            group, used = [], 0
        group.append(place)
        used += need
    if group:
        yield group
