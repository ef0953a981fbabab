"""The search of one question over segments: what to branch into, what to keep, when to stop.

    live = [root]; finished = []
    for depth in 1 … max_segments:
        each live hypothesis branches: [No Retrieval], [Continue …] with the passage in use, or [Retrieval] with each passage
        children at their end, or cut by a limit, are finished and take no place in the beam; the best `beam` of the others live
        stop when nothing is live, or nothing live can come to more than the n-th best that is finished
    what is live at the last depth is finished too; the n best of the finished are the answers

Source: Self-RAG, Asai et al. 2023 (arXiv 2310.11511), algorithm 1 and §3.3. Deviations: finished hypotheses are a pool of their
own, so that a short good answer is not lost; a path's score is its steps' mean unless settings say otherwise; a bound ends the
search early without changing what it returns. What the authors' code does otherwise stands under `released`.

Nothing here touches a model: `long` asks it for all questions together and hands each tree its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from raglan.decode.self_rag import rules
from raglan.decode.self_rag.hypothesis import Branch, Hypothesis, Ids, Step, chunks, role_token, whole
from raglan.decode.self_rag.trace import decision_trace, finite, raw_text
from raglan.decode.self_rag.work import Spent
from raglan.marked_prompt import MarkedPrompt
from raglan.recipe import SelfRagDecode
from raglan.records import Hit, Marked
from raglan.reflection import (
    Components,
    Missing,
    Schema,
    components,
    continues,
    first,
    path_bound,
    path_key,
    rel,
    released_path,
    released_rel,
    released_step,
    step,
)

__all__ = ["Passages", "Tree", "cut_at_retrieval"]

Retrieve = Callable[[str, int], Sequence[Hit]]
SLACK = 1e-9  # of the bound, for sums that round


@dataclass
class Passages:
    """Which passages a segment may read: the given ones, or those that its own text finds, each search made once.

    Attributes:
        given: the question's own hits. `k`: passages of a further search, None where there is none to ask.
        searches: how many were made.
    """

    query: str
    given: Sequence[Hit]
    settings: SelfRagDecode
    retrieve: Retrieve | None = None
    k: int = 0
    asks: Callable[[str, str], str] | None = None
    searches: int = 0
    _found: dict[str, Sequence[Hit]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.given:
            self._found[self.query] = self.given  # it is what the question found

    def of(self, hypothesis: Hypothesis) -> tuple[str, list[Hit]]:
        """What is searched for, empty where the given ones are read, and the passages."""
        kind = "static" if self.retrieve is None else self.settings.passages
        if kind == "static" or (kind == "hybrid" and self.given and not hypothesis.read):
            return "", list(self.given)
        text = self.text(hypothesis)
        if text not in self._found:
            assert self.retrieve is not None
            self._found[text] = self.retrieve(text, self.k or len(self.given) or 1)
            self.searches += 1
        hidden = hypothesis.read if self.settings.dedup == "path" else set()
        return text, [hit for hit in self._found[text] if hit.passage.id not in hidden]

    def text(self, hypothesis: Hypothesis) -> str:
        """The query of a hypothesis: by default the question and its last segment, x + y_{t−1}."""
        last = hypothesis.steps[-1].text if hypothesis.steps else ""
        if self.asks is not None:
            return self.asks(self.query, last)
        if not last or self.settings.query == "question":
            return self.query
        return last if self.settings.query == "last" else f"{self.query} {last}"


class Tree:
    """The search of one question.

    Attributes:
        question: the prompt's ids. `live`: hypotheses that may go on, best first. `finished`: the pool, in order of finishing.
        spent: what it took so far. `read`, `retrievals`: passages read and segments that retrieved. `offered`: those passages.
        levels: the trace. `stopped`: "bound" where the search ended early.
    """

    def __init__(
        self, question: Ids, passages: Passages, settings: SelfRagDecode, *, prompt: MarkedPrompt, exact: bool,
        threshold: float | None, marks: np.ndarray, likeliest: int,
    ):  # fmt: skip
        self.keep = None if settings.keep_passages == "all" else settings.keep_passages
        self.question, self.passages, self.settings, self.prompt = question, passages, settings, prompt
        self.schema: Schema = prompt.schema
        self.scoring, self.weights = rules.scoring(settings, exact=exact), rules.weights(settings)
        self.missing: Missing = self.scoring.missing
        self.threshold = threshold
        self.root = Hypothesis(0, marks, likeliest)
        self.live: list[Hypothesis] = [self.root]
        self.finished: list[Hypothesis] = []
        self.spent = Spent()
        self.depth = self.read = self.made = 0
        self.levels: list[dict[str, Any]] = []
        self.stopped = ""
        self.retrievals = 0
        self.offered: dict[str, Hit] = {}
        self._children: list[Hypothesis] = []
        self._parents: dict[int, Hypothesis] = {}
        self._banned: set[int] = set()

    # --- branching

    def plan(self) -> list[Branch]:
        """The children to write at the next depth, parent by parent. Hypotheses without a budget are finished."""
        self.depth += 1
        self.levels.append({"depth": self.depth, "decisions": [], "candidates": []})
        if self.calls_left < 3:  # histories take up to two passes, branches one
            self.end("budget")
        return [branch for hypothesis in self.live for branch in self._branches(hypothesis)]

    def _branches(self, parent: Hypothesis) -> list[Branch]:
        settings, prompt = self.settings, self.prompt
        told = rules.decide(
            parent.marks, settings, missing=self.missing, threshold=self.threshold, argmax=parent.likeliest == self.schema.yes
        )
        in_use = parent.in_use if settings.keep_passages != 0 else None
        query, fallback = "", ""
        hits: list[Hit] = []
        kind = "yes" if told.retrieve else "no"
        if settings.retrieve == "adaptive" and in_use is not None and continues(parent.marks):
            kind = "continue"
        elif told.retrieve:
            query, hits = self.passages.of(parent)
            room = len(hits) if settings.max_passages is None else settings.max_passages - self.read
            kind, fallback = ("yes", "") if hits[: max(0, room)] else ("no", "max_passages" if hits else "no_hits")
            hits = hits[: max(0, room)]
        self.read += len(hits)
        self.retrievals += bool(hits)
        told = replace(told, retrieve=kind == "yes", fallback=fallback)
        self.levels[-1]["decisions"].append(
            {"node": parent.number, "decision": kind, "query": query, **decision_trace(told)}
        )
        if kind == "yes":
            return [Branch(parent, "yes", tuple(prompt.passage(hit.passage)), hit) for hit in hits]
        return [self.continued(parent, in_use)] if kind == "continue" else [self.unaided(parent)]

    def unaided(self, parent: Hypothesis) -> Branch:
        """The child without a passage."""
        return Branch(parent, "no", tuple(self.prompt.no_retrieval()))

    def continued(self, parent: Hypothesis, hit: Hit | None) -> Branch:
        """The child that reads on in the passage in use."""
        return Branch(parent, "continue", tuple(self.prompt.continues()), hit)

    def _relevances(self, branches: Sequence[Branch], marks: np.ndarray) -> list[float]:
        """rel of each branch, from the marks (n,M) behind its passage; 0 without one."""
        read = released_rel if "missing" in self.settings.released else lambda row: rel(row, missing=self.missing)
        return [float(read(row)) if branch.decision == "yes" else 0.0 for branch, row in zip(branches, marks, strict=True)]

    def prune(self, branches: Sequence[Branch], marks: np.ndarray) -> list[int]:
        """Places of the branches worth writing, by the marks (n,M) behind each: a parent's most relevant, never none."""
        rule, relevances = self.settings.prune, self._relevances(branches, marks)
        kept: set[int] = set()
        for parent in dict.fromkeys(branch.parent for branch in branches):
            own = [place for place, branch in enumerate(branches) if branch.parent is parent]
            order = sorted(own, key=lambda place: -relevances[place])
            enough = order[: rule.m] if rule.kind == "top_m" else [p for p in order if relevances[p] >= (rule.tau or 0.0)]
            kept.update(enough or order[:1])
        for place, branch in enumerate(branches):
            if place not in kept:
                self._tell(self._number(), branch, why=rule.kind, rel=relevances[place])
        return sorted(kept)

    # --- what was written

    @property
    def calls_left(self) -> int:
        """Passes that it may still take part in."""
        most = self.settings.max_calls
        return sys.maxsize - 1 if most is None else most - self.spent.calls

    def room(self, branches: Sequence[Branch]) -> int:
        """Tokens that each of these may write; 0, and their parents are finished, where a budget is spent."""
        limit = min(self.settings.limit, self.calls_left + 1)  # the first takes no pass
        if self.settings.max_total_tokens is not None:
            limit = min(limit, (self.settings.max_total_tokens - self.spent.generated) // len(branches))
        if limit < 1:
            self.end("budget", list(dict.fromkeys(branch.parent for branch in branches)))
        return max(0, limit)

    def grow(self, branches: Sequence[Branch], written: Sequence[Marked], *, cut: str = "length") -> list[Branch]:
        """Take what the branches have written; gives the branches that are to be written in place of those that were refused.

        Args:
            cut: what a row that reached its limit is finished by.
        """
        if "stop" in self.settings.released:
            written = [cut_at_retrieval(one, self.schema.yes) for one in written]
        grown = [self.child(branch, one, cut) for branch, one in zip(branches, written, strict=True)]
        self._children += grown
        self._parents.update((child.number, branch.parent) for child, branch in zip(grown, branches, strict=True))
        again = self._constrain(grown, written)
        if again and self.calls_left < 1:
            self.end("budget", again)
            again = []
        return [self.unaided(parent) for parent in again]

    def take(self, branch: Branch) -> None:
        """A branch that fits: its passage is read."""
        if branch.decision == "yes" and branch.hit is not None:
            self.offered.setdefault(branch.hit.passage.id, branch.hit)

    def refuse(self, branch: Branch, why: str) -> None:
        """A branch that cannot be written, and why: its passage is not read."""
        self.read -= branch.decision == "yes"
        self._tell(self._number(), branch, why=why)

    def close(self) -> None:
        """Select among the children of this depth, and stop where nothing live can win any more."""
        self._select()
        self._children, self._parents, self._banned = [], {}, set()
        if self.live and self.settled():
            self.live, self.stopped = [], "bound"

    def child(self, branch: Branch, one: Marked, cut: str) -> Hypothesis:
        """What a branch comes to with what was written to it. `cut`: what a row that reached its limit is finished by."""
        made = self._step(branch, one)
        steps = (*branch.parent.steps, made)
        finish = {"eos": "eos", "length": cut, "stop": ""}[one.finish]
        likeliest = one.ids[-1] if one.finish == "stop" else -1
        marks = one.mark_logprobs[-1] if len(one.ids) else branch.parent.marks
        past = (*branch.parent.past, made)
        return Hypothesis(self._number(), marks, likeliest, steps, past, self._key(steps), finish)

    def _step(self, branch: Branch, one: Marked) -> Step:
        schema, released = self.schema, self.settings.released
        retrieved = branch.decision == "yes"
        body = one.ids[:-1] if one.finish in ("eos", "stop") else one.ids
        parts = components(
            one.ids, one.logprobs, one.mark_logprobs, schema, retrieved=retrieved, settings=self.scoring, eos=self._eos(one)
        )
        flags = [*branch.flags, *parts.flags]
        if one.finish == "stop" and one.ids[-1] == schema.opens:
            flags.append("off_grammar")
        if "missing" in released and retrieved and len(one.ids):
            parts = replace(parts, rel=float(released_rel(one.mark_logprobs[0])))
        before = branch.parent.steps[-1].parts if branch.parent.steps else Components(0.0, 0.0, 0.0, 0.0)
        if not retrieved and self.settings.absent_step == "inherit":
            parts = replace(parts, rel=before.rel, sup=before.sup)
        return Step(
            branch.decision, branch.forced, tuple(body), branch.hit, self.prompt.text(body), parts,
            self._score(parts, retrieved), float(np.asarray(one.logprobs, np.float64).sum()),
            role_token(body[:1], schema, "is_rel") if retrieved else None,
            role_token(body, schema, "is_sup"), role_token(body, schema, "is_use"), tuple(dict.fromkeys(flags)),
        )  # fmt: skip

    def _eos(self, one: Marked) -> int | None:
        return one.ids[-1] if one.finish == "eos" else None

    def _score(self, parts: Components, retrieved: bool) -> float:
        if "use" in self.settings.released:
            return float(released_step(parts))
        if not retrieved and not isinstance(self.settings.absent_step, str):
            return float(self.settings.absent_step)
        return float(step(parts, self.weights))

    def _key(self, steps: Sequence[Step]) -> tuple[float, float]:
        scores = [one.score for one in steps]
        if "path" in self.settings.released:
            return float(released_path(scores)), 0.0
        return path_key(
            scores, self.settings.combine, [one.parts for one in steps], plain=[one.decision != "yes" for one in steps],
            weights=self.weights,
        )  # fmt: skip

    # --- selection

    def unmet(self, child: Hypothesis, one: Marked) -> list[str]:
        """Which hard constraints a child's last segment breaks."""
        retrieved = child.steps[-1].decision == "yes"
        said = rules.said_of(one, self.schema, retrieved=retrieved, by=self.settings.require_by)
        return [name for name, on in rules.refusals(self.settings.require, said, retrieved=retrieved).items() if on]

    def _constrain(self, grown: Sequence[Hypothesis], written: Sequence[Marked]) -> list[Hypothesis]:
        """Drop children that break a hard constraint. Gives the parents that lost all of them and are to go on unaided.

        With `on_empty: relax` such a parent keeps its best child, flagged.
        """
        broken = {child.number: self.unmet(child, one) for child, one in zip(grown, written, strict=True)}
        again = []
        for parent in dict.fromkeys(self._parents[child.number] for child in grown):
            own = [child for child in grown if self._parents[child.number] is parent]
            refused = [child for child in own if broken[child.number]]
            if len(refused) == len(own) and self.settings.on_empty == "relax":
                best = max(own, key=lambda child: child.key)
                refused.remove(best)
                self._children[self._children.index(best)] = _flagged(best, *(f"relaxed:{one}" for one in broken[best.number]))
            elif len(refused) == len(own):
                unaided = any(child.steps[-1].decision == "no" for child in own)
                again += [parent] if self.settings.on_empty == "no_retrieval" and not unaided else []
                self._banned |= {parent.number} - {one.number for one in again}
            for child in refused:
                self._children.remove(child)
                self._told(child, why="require:" + ",".join(broken[child.number]))
        return again

    def _select(self) -> None:
        settings, useful = self.settings, []
        for child in self._children:
            if why := self.useless(child, self._parents[child.number]):
                self._told(child, why=why)
            else:
                useful.append(child)
        going = {self._parents[child.number].number for child in useful}
        stuck = [one for one in self.live if one.number not in going | self._banned]
        done = [replace(one, finish="stuck") for one in stuck]  # nothing new is said below it
        if "siblings" in settings.released:
            useful = self._with_siblings(useful)
        if "path" in settings.released:
            self.finished = []  # only the deepest level is returned
        ordered = sorted(useful, key=_order)
        told_once = {child.number for child in _distinct(ordered)}
        every = settings.slots == "all" or "path" in settings.released
        contenders = [child.number for child in ordered if child.number in told_once and (every or not child.finish)]
        out = set(contenders[settings.beam :])
        for child in useful:
            why = "same_text" if child.number not in told_once else "beam" if child.number in out else ""
            done += [child] if child.finish and not why else []
            self._told(child, why=why)
        self.finished += done
        self.live = [child for child in ordered if not child.finish and child.number in told_once - out]

    def useless(self, child: Hypothesis, parent: Hypothesis) -> str:
        """Why a child is not worth keeping: cut where cuts are dropped, without words, or its parent's last words again."""
        text = child.steps[-1].text
        if child.finish == "length" and self.settings.on_length == "drop":
            return "length"
        if not text and not child.finish:
            return "empty"
        return "repeats" if text and parent.steps and text == parent.steps[-1].text else ""

    def _with_siblings(self, useful: Sequence[Hypothesis]) -> list[Hypothesis]:
        """Released: the text before a child's own is that of the sibling before it, where its parent's should stand."""
        last: dict[int, Hypothesis] = {}
        past: dict[int, tuple[Step, ...]] = {}
        for child in self._children:
            parent = self._parents[child.number]
            before = last.get(parent.number)
            past[child.number] = child.past if before is None else (*parent.past[:-1], before.steps[-1], child.steps[-1])
            last[parent.number] = child
        return [replace(child, past=past[child.number]) for child in useful]

    def lost(self) -> Hypothesis:
        """What stands for an answer where hard constraints left none."""
        return replace(self.root, finish="dropped")

    def end(self, finish: str, only: Sequence[Hypothesis] | None = None) -> None:
        """What is live, or these of it, is finished: `depth`, or `budget`."""
        ended = self.live if only is None else only
        self.finished += [replace(one, finish=finish) for one in ended]
        self.live = [one for one in self.live if not any(one is other for other in ended)]

    @property
    def best(self) -> list[Hypothesis]:
        """The finished hypotheses, best first, each text once; ties in order of finishing."""
        return _distinct(sorted(self.finished, key=_order))

    def settled(self) -> bool:
        """Whether nothing live can overtake the n-th best of the finished, so that the search may stop."""
        settings = self.settings
        best = self.best
        if settings.stop == "never" or settings.released or len(best) < settings.n_best:
            return False
        worst = best[settings.n_best - 1].key[0]
        return all(self._bound(one) + SLACK < worst for one in self.live)

    def _bound(self, one: Hypothesis) -> float:
        constant = 0.0 if isinstance(self.settings.absent_step, str) else float(self.settings.absent_step)
        return float(path_bound(
            [made.score for made in one.steps], self.settings.combine, self.settings.max_segments - self.depth,
            weights=self.weights, components=[made.parts for made in one.steps],
            plain=[made.decision != "yes" for made in one.steps], constant=constant,
        ))  # fmt: skip

    # --- the trace

    def _number(self) -> int:
        self.made += 1
        return self.made

    def _told(self, child: Hypothesis, *, why: str) -> None:
        made, parent = child.steps[-1], self._parents[child.number]
        self._tell(
            child.number, Branch(parent, made.decision, made.forced, made.hit), why=why, seq=finite(made.parts.seq),
            rel=made.parts.rel, sup=made.parts.sup, use=made.parts.use, step=made.score, final=finite(child.key[0]),
            text=made.text, raw=raw_text(self.prompt, made.ids), ids=list(made.ids), flags=list(made.flags),
            finish=child.finish,
        )  # fmt: skip

    def _tell(self, number: int, branch: Branch, *, why: str, **figures: Any) -> None:
        hit, (gone, kept) = branch.hit, chunks(branch.parent.past, self.keep)
        self.levels[-1]["candidates"].append({
            "node": number, "parent": branch.parent.number, "decision": branch.decision,
            "passage": hit.passage.id if hit else None, "title": hit.passage.title if hit else "",
            "rank": hit.rank if hit else None, "pruned": why, "context": list(whole([*gone, *kept, branch.forced])), **figures,
        })  # fmt: skip


def cut_at_retrieval(one: Marked, retrieval: int) -> Marked:
    """A continuation up to and with its first [Retrieval], where it wrote one (the released long form decodes on behind it)."""
    at = first(one.ids, (retrieval,))
    if at is None:
        return one
    return Marked(one.ids[: at + 1], one.logprobs[: at + 1], one.mark_logprobs[: at + 1], "stop")


def _flagged(child: Hypothesis, *flags: str) -> Hypothesis:
    made = replace(child.steps[-1], flags=(*child.steps[-1].flags, *flags))
    return replace(child, steps=(*child.steps[:-1], made), past=(*child.past[:-1], made))


def _distinct(ordered: Sequence[Hypothesis]) -> list[Hypothesis]:
    """The first of those with the same visible text, finished and live ones apart: what is live will say more."""
    seen: dict[tuple[bool, str], Hypothesis] = {}
    for one in ordered:
        seen.setdefault((bool(one.finish), one.text), one)
    return list(seen.values())


def _order(one: Hypothesis) -> tuple[float, float]:
    """The best first."""
    return -one.key[0], -one.key[1]
