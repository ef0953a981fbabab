"""The trees that candidates hold, as arrays (`trees`): every path of segments that was written, whatever would choose it.

    from the question down: each branch that live decoding could take is looked up by the ids that it would be written behind

The nodes are made by `tree` itself, so that a figure, a text or a mark is the live one. Where a path's passages leave its
context, paths with equal texts come to one context, and their children are made once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from raglan.decode.base import Asked
from raglan.decode.self_rag import Retrieve
from raglan.decode.self_rag.cache import CandidateCache, Uncached, key_of, write_keys
from raglan.decode.self_rag.hypothesis import Branch, Hypothesis, Ids, chunks, whole
from raglan.decode.self_rag.rate import prompts_of
from raglan.decode.self_rag.rules import said_of
from raglan.decode.self_rag.tree import Passages, Tree
from raglan.decode.self_rag.trees import FAR, NO, NUMBERS, ON, YES, Trees, baked
from raglan.errors import GeneratorError
from raglan.generator.base import MarkedGenerator
from raglan.recipe import SelfRagDecode
from raglan.records import Hit, Marked, Passage
from raglan.reflection import continues

__all__ = ["plant"]

MOST = 50_000  # nodes of a question; what grows beyond is replayed
KINDS = {"no": NO, "continue": ON, "yes": YES}


class _Unfit(Exception):
    """Trees that only live decoding can search."""


def plant(
    cache: CandidateCache, like: MarkedGenerator, asked: Asked, settings: SelfRagDecode, *, retrieve: Retrieve | None = None,
    most: int = MOST,
) -> Trees | None:  # fmt: skip
    """The trees of these questions, with all that a cache holds of them.

    Args:
        like: the generator that wrote them, for its prompt; it is not asked. `retrieve`: what further searches found.
        most: nodes of a question.

    Returns:
        None where live decoding would raise, has not seen a question, or a tree is larger than `most`: replay those.
    """
    if settings.form != "long" or settings.released or any(asked.choices) or not asked.queries:
        return None
    planter = _Planter(cache, like, settings, most)
    k = asked.k or max(map(len, asked.hits), default=0)
    try:
        prompts = prompts_of(like, asked, settings)
        for ids, text, hits in zip(prompts, asked.queries, asked.hits, strict=True):
            planter.question(ids, Passages(text, hits, settings, retrieve, asked.k))
    except (_Unfit, GeneratorError):
        return None
    return planter.trees(k)


@dataclass
class _Node:
    """A column of `Trees`."""

    numbers: dict[str, int]
    figures: tuple[float, ...]
    children: tuple[list[int], list[int], list[int]]


class _Planter:
    """Nodes in the order in which they were found."""

    def __init__(self, cache: CandidateCache, like: MarkedGenerator, settings: SelfRagDecode, most: int):
        self.cache, self.like, self.settings, self.most = cache, like, settings, most
        self.schema = like.schema
        self.ends = frozenset((*self.schema.ids["retrieve"], self.schema.opens))
        self.positions: int | None = getattr(like, "positions", None)
        self.nodes: list[_Node] = []
        self.roots: list[int] = []
        self.texts: dict[str, int] = {"": 0}
        self.shown: dict[tuple[str, str], Ids] = {}
        self.known: dict[Any, int] = {}
        self.end = 0

    def question(self, ids: Ids, passages: Passages) -> None:
        """All that is written of one question."""
        if (state := self.cache.states.get(key_of(ids))) is None:
            raise _Unfit
        tree = Tree(
            ids, passages, self.settings, prompt=self.like.marked_prompt, exact=self.cache.exact, threshold=None,
            marks=state[0], likeliest=state[1],
        )  # fmt: skip
        self.known, self.end = {}, len(self.nodes) + self.most
        self.roots.append(self._node(tree, tree.root, {"plain": 1}))

    def trees(self, k: int) -> Trees:
        """Everything as arrays, with a last node that is none."""
        none = len(self.nodes)
        width = max((len(node.children[YES]) for node in self.nodes), default=0) or 1
        children = np.full((none + 1, 2 + width), none, np.int32)
        for at, node in enumerate(self.nodes):
            for kind, own in enumerate(node.children):
                children[at, kind : kind + len(own)] = own
        numbers = [[node.numbers.get(name, 0) for node in self.nodes] for name in NUMBERS]
        nothing = [[1 if name in ("plain", "useless") else FAR if name.startswith("lacks") else 0] for name in NUMBERS]
        figures = np.array([*(node.figures for node in self.nodes), (0.0,) * 7], np.float64)
        return Trees(
            baked(self.settings), k, list(self.texts), np.hstack([np.array(numbers, np.int32), np.array(nothing, np.int32)]),
            np.ascontiguousarray(figures.T), children, np.array(self.roots, np.int32),
        )  # fmt: skip

    def _node(self, tree: Tree, one: Hypothesis, numbers: dict[str, int]) -> int:
        """Take a node and all that was written below it; its number."""
        at = len(self.nodes)
        if at >= self.end:
            raise _Unfit
        parts = one.steps[-1].parts if one.steps else None
        figures = (parts.seq, parts.rel, parts.sup, parts.use) if parts is not None else (0.0,) * 4
        ends = bool(one.finish or numbers.get("useless"))
        marks = (0.0,) * 3 if ends else tuple(one.marks[:3].tolist())  # of what goes no further nothing is decided
        node = _Node(numbers | {"text": self.texts.setdefault(one.text, len(self.texts))}, (*figures, *marks), ([], [], []))
        self.nodes.append(node)
        if ends:
            node.numbers |= {"done": int(bool(one.finish))}
            return at
        in_use = one.in_use if self.settings.keep_passages != 0 else None
        node.numbers |= {
            "likeliest": int(one.likeliest == self.schema.yes),
            "reads_on": int(in_use is not None and bool(continues(one.marks))),
        }
        self._below(tree, one, in_use, node)
        return at

    def _below(self, tree: Tree, one: Hypothesis, in_use: Hit | None, node: _Node) -> None:
        """Grow the branches of a node."""
        lacks, first_hit = [FAR, FAR, FAR], FAR
        branches = [tree.unaided(one)] + ([tree.continued(one, in_use)] if in_use is not None else [])
        try:
            hits = tree.passages.of(one)[1]
            first_hit = min((hit.rank for hit in hits), default=FAR)
        except Uncached:  # no recorded run searched for it
            hits, first_hit, lacks[YES] = [], 0, 0
        branches += [Branch(one, "yes", self._ids(hit.passage), hit) for hit in hits]
        gone, kept = chunks(one.past, tree.keep)
        for branch in branches:
            kind, rank = KINDS[branch.decision], branch.hit.rank if branch.decision == "yes" and branch.hit else 0
            ids = whole([tree.question, *gone, *kept, branch.forced])
            left = self.settings.limit if self.positions is None else min(self.settings.limit, self.positions - len(ids))
            if left < 1:  # live decoding leaves it out, and raises where a question is left without any
                if not one.steps and rank == first_hit:
                    raise _Unfit
                continue
            first = self.schema.ids["is_rel"] if self.settings.force_isrel and kind == YES else None
            marked = self.cache.written.get(write_keys([ids], self.ends, left, first)[0])
            if marked is None:
                lacks[kind] = min(lacks[kind], rank)
                continue
            node.children[kind].append(self._child(tree, branch, marked, kind, rank, (tuple(gone), tuple(kept))))
        node.numbers |= {"first_hit": first_hit, "lacks_no": lacks[NO], "lacks_on": lacks[ON], "lacks_yes": lacks[YES]}

    def _ids(self, passage: Passage) -> Ids:
        """A passage in a prompt; it is spelt once."""
        key = (passage.title, passage.text)
        if key not in self.shown:
            self.shown[key] = tuple(self.like.marked_prompt.passage(passage))
        return self.shown[key]

    def _child(self, tree: Tree, branch: Branch, marked: Marked, kind: int, rank: int, before: tuple[Any, Any]) -> int:
        """A branch with what was written to it; one that stands behind the same and goes on like another is that other."""
        parent = branch.parent
        inherits = kind != YES and self.settings.absent_step == "inherit" and parent.steps
        searches = self.settings.passages != "static" and tree.passages.retrieve is not None
        key = (
            *before, branch.forced, kind, rank, parent.text, branch.hit and branch.hit.passage.id,
            parent.in_use and parent.in_use.passage.id if self.settings.keep_passages != 0 else None,
            frozenset(parent.read) if searches else None,
            (parent.steps[-1].parts.rel, parent.steps[-1].parts.sup) if inherits else None,
        )  # fmt: skip
        if key not in self.known:
            child = tree.child(branch, marked, "length")
            said = said_of(marked, self.schema, retrieved=kind == YES, by=self.settings.require_by)
            self.known[key] = self._node(tree, child, {
                "plain": int(kind != YES), "rank": rank, "length": len(marked.ids),
                "useless": int(bool(tree.useless(child, parent))), "is_rel": said.is_rel, "is_sup": said.is_sup,
                "is_use": said.is_use,
            })  # fmt: skip
        return self.known[key]
