"""Filling a prompt's slots with noise, past the guard, and refusing what has no right answer.

What is the same as a passage that stands there already, by id or by text, is never taken, so no prompt holds a text twice. What
the guard finds to answer the question is relabelled as support, or replaced; where gold is absent always replaced. A kind that
has nothing left gives its slot to another, so K never shrinks; where nothing at all is left, that is an error.

    decidable:  passages that say the truth, independently ≥ 2, and more than say any one false value

Passages of one document, and near duplicates of each other, are one voice. Anything else (one gold against one counterfactual)
has no right answer, and is filled only as a conflict, whose target has to name both readings.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal

from raglan.corpus import Corpus
from raglan.errors import CorpusError, RecipeError
from raglan.perturb.guard import Guard, held, searchable
from raglan.perturb.operators import boilerplate, counterfactual, garbled, near_duplicate
from raglan.perturb.slot import Slot, Verdict, content_hash, gold_slots, kind_named, retrieved_slot
from raglan.records import Example, Hit, Passage

__all__ = [
    "Sources",
    "decidable",
    "fill",
    "neighbours",
    "second_voice",
    "shown_answers",
    "sides",
    "sweep",
]

FALLBACK = ("hard", "neighbour", "random", "other_gold")
RANKS = range(2, 31)
TRIES = 16


@dataclass(frozen=True)
class Sources:
    """What the noise of one question is made from.

    Attributes:
        hits: of the retriever `retriever` for this question.
        corpus: to draw from: a `Corpus`, or any sequence.
        neighbours: passages of the documents that the evidence is from.
        other_gold: evidence of other questions.
        answers: of other questions, for false values of the same type.
    """

    hits: Sequence[Hit] = ()
    retriever: str = ""
    corpus: Sequence[Passage] = ()
    neighbours: Sequence[Passage] = ()
    other_gold: Sequence[Passage] = ()
    answers: Sequence[str] = ()


def neighbours(corpus: Corpus, gold: Sequence[Passage]) -> list[Passage]:
    """The other passages of the documents that the evidence is from."""
    known = {passage.id for passage in gold}
    documents = dict.fromkeys(passage.document for passage in gold if passage.document)
    found = (corpus[row] for document in documents for row in corpus.rows_of_document(document))
    return [passage for passage in found if passage.id not in known]


def fill(
    example: Example, placed: Sequence[Slot], *, kinds: Sequence[str], gold: Sequence[Passage], sources: Sources, guard: Guard,
    seed: int | str, gold_absent: bool = False, conflict: bool = False, found: Literal["relabel", "replace"] = "relabel",
    fallback: Sequence[str] = FALLBACK,
) -> tuple[Slot, ...]:  # fmt: skip
    """The placed slots, and behind them one slot for each kind, in the order of `kinds`.

    Args:
        placed: what stands in the prompt already: `gold_slots`, or nothing where gold is absent.
        gold: the evidence, shown or not.
        conflict: the prompt may be undecidable, and its target will name both readings.
        found: what is done with a passage that turns out to answer the question.
        fallback: kinds that take over from one that has nothing left; none makes that an error.

    Raises:
        RecipeError: a kind that may not stand where gold is absent.
        CorpusError: too few different passages for K, or, without fallback, for one kind.
    """
    _check_kinds(kinds, gold_absent=gold_absent)
    work = _Filling(example, list(placed), gold, sources, guard, f"{seed}:{example.id}", gold_absent, conflict, found)
    order = sorted(range(len(kinds)), key=lambda place: kinds[place] == "counterfactual")  # when all voices are known
    filled: dict[int, Slot] = {}
    for place in order:
        filled[place] = work.take(kinds[place], [kind for kind in fallback if kind != kinds[place]], len(placed) + len(kinds))
    return (*placed, *(filled[place] for place in range(len(kinds))))


def sweep(
    example: Example, hits: Sequence[Hit], *, gold: Sequence[Passage], kind: str, ratio: float | str | Fraction,
    gold_absent: bool, sources: Sources, guard: Guard, seed: int | str,
) -> tuple[Slot, ...]:  # fmt: skip
    """The hits of a question with a share of them exchanged for one kind of noise: K slots, gold first.

    Of the slots without gold, round(ratio · slots) are noise, halves up; the others are the best hits that are not gold.
    Nothing else takes over, so that a figure is one kind's. A counterfactual may stand against a single gold passage here.

    Raises:
        RecipeError: as `fill` does, or a ratio outside [0, 1].
        CorpusError: too little noise of this kind for this question: leave it out of the sweep, and count it.
    """
    share = Fraction(str(ratio)) if isinstance(ratio, float) else Fraction(ratio)
    if not 0 <= share <= 1:
        raise RecipeError(f"a noise ratio of {ratio} is not possible", hint="0 to 1")
    shown = [] if gold_absent else list(gold_slots(gold[: len(hits)]))
    free = len(hits) - len(shown)
    noise = int(share * free + Fraction(1, 2))
    work = _Filling(example, list(shown), gold, sources, guard, f"{seed}:{example.id}", gold_absent, True, "relabel")
    kept = [slot for hit in hits if (slot := work.kept(hit, sources.retriever)) is not None][: free - noise]
    missing = free - noise - len(kept)
    return fill(
        example, [*shown, *kept], kinds=[kind] * noise + ["hard"] * missing, gold=gold, sources=sources, guard=guard, seed=seed,
        gold_absent=gold_absent, conflict=True, fallback=(),
    )  # fmt: skip


def decidable(slots: Sequence[Slot]) -> bool:
    """Whether the passages settle the answer: no counterfactual, or at least two independent voices and more than any false
    value has."""
    false = Counter(slot.value for slot in slots if slot.kind == "counterfactual")
    voices = len(_voices(slots))
    return not false or (voices >= 2 and voices > max(false.values()))


def sides(slots: Sequence[Slot]) -> tuple[int, dict[str, int]]:
    """How many passages say the truth, the evidence said again among them, and how many each false value."""
    false = Counter(slot.value for slot in slots if slot.kind == "counterfactual")
    return sum(slot.role in ("gold", "support", "redundant") for slot in slots), dict(false)


def second_voice(
    example: Example, gold: Sequence[Passage], *, sources: Sources, guard: Guard, seed: int | str
) -> Slot | None:  # fmt: skip
    """A passage that answers as the first gold one does: of another document, gold or found by the search; where there is
    none, the first one in other words. None where it cannot be said otherwise.
    """
    own = gold[0].document or gold[0].id
    others = [slot for slot in gold_slots(gold[1:]) if held(slot.passage, searchable(example.answers))]
    others += [
        retrieved_slot(hit, role="support", guard="also_gold", retriever=sources.retriever)
        for hit in sources.hits
        if guard.verdict(example, hit.passage, gold) == "also_gold"
    ]
    apart = (slot for slot in others if (slot.passage.document or slot.passage.id) != own)
    return next(apart, None) or near_duplicate(example, gold_slots(gold)[0], seed=f"{seed}:{example.id}:second")


def shown_answers(example: Example, rendered: str) -> list[str]:
    """The answers that stand in passages as they were rendered: of a prompt without gold there must be none."""
    return [answer for answer in searchable(example.answers) if held(Passage("", rendered), [answer])]


@dataclass
class _Filling:
    """One prompt while it is being filled."""

    example: Example
    slots: list[Slot]
    gold: Sequence[Passage]
    sources: Sources
    guard: Guard
    seed: str
    gold_absent: bool
    conflict: bool
    found: str
    ids: set[str] = field(init=False)
    texts: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.ids = {slot.passage.id for slot in self.slots}
        self.texts = {content_hash(slot.passage) for slot in self.slots}

    def take(self, kind: str, fallback: Sequence[str], k: int) -> Slot:
        for name in (kind, *fallback):
            if self.gold_absent and not kind_named(name).without_gold:
                continue
            for candidate in self.candidates(name):
                slot = self.passed(candidate)
                if slot is not None:
                    self._place(slot)
                    return slot
        raise CorpusError(
            f"{self.example.id!r}: {len(self.slots)} different passages were found for {k} slots, and no more of kind {kind}",
            hint="lower K, add documents, or allow other kinds",
        )

    def kept(self, hit: Hit, retriever: str) -> Slot | None:
        """A hit that stays as it was retrieved."""
        slot = self.passed(retrieved_slot(hit, role="noise", guard="exempt", retriever=retriever), guarded=True)
        if slot is not None:
            self._place(slot)
        return slot

    def candidates(self, kind: str) -> Iterator[Slot]:
        place = f"{self.seed}:{kind}:{len(self.slots)}"
        generator = random.Random(place)
        if kind == "hard":
            hits = [hit for hit in self.sources.hits if hit.rank in RANKS]
            hits = generator.sample(hits, len(hits))
            name = self.sources.retriever
            return (retrieved_slot(hit, role="noise", guard="exempt", kind=kind, retriever=name) for hit in hits)
        pools: Mapping[str, Sequence[Passage]] = {
            "neighbour": self.sources.neighbours, "random": self.sources.corpus, "other_gold": self.sources.other_gold,
        }  # fmt: skip
        if kind in pools:
            return (Slot(passage, "noise", kind, "corpus") for passage in _drawn(pools[kind], generator))
        if kind == "boilerplate":
            return (boilerplate(self.example.query, seed=f"{place}:{turn}") for turn in range(TRIES))
        return self._made(kind, place)

    def _made(self, kind: str, place: str) -> Iterator[Slot]:
        """From what holds the answer, each in turn with several seeds."""
        if kind == "counterfactual" and not self.conflict and len(_voices(self.slots)) < 2:
            return  # whatever it says, it could not be decided
        makers: Mapping[str, Callable[[Slot, str], Slot | None]] = {
            "counterfactual": lambda slot, seed: counterfactual(self.example, slot, seed=seed, pool=self.sources.answers),
            "near_duplicate": lambda slot, seed: near_duplicate(self.example, slot, seed=seed),
            "garbled": lambda slot, seed: garbled(self.example, slot, seed=seed),
        }
        truths = [slot for slot in self.slots if slot.role == "gold"] or [slot for slot in self.slots if slot.role == "support"]
        for turn in range(TRIES):
            for source in truths:
                slot = makers[kind](source, f"{place}:{turn}:{source.passage.id}")
                if slot is not None:
                    yield slot

    def passed(self, slot: Slot, *, guarded: bool | None = None) -> Slot | None:
        """The slot with its verdict; None where it may not stand here."""
        if slot.passage.id in self.ids or content_hash(slot.passage) in self.texts:
            return None
        if slot.kind == "counterfactual":
            return slot if self.conflict or decidable([*self.slots, slot]) else None
        guarded = kind_named(slot.kind).guarded if guarded is None else guarded
        if not guarded:
            return slot
        if self.gold_absent and not self.guard.fit_without_gold(self.example, slot.passage, self.gold):
            return None
        return self._labelled(slot, self.guard.verdict(self.example, slot.passage, self.gold))

    def _labelled(self, slot: Slot, verdict: Verdict) -> Slot | None:
        if verdict == "same" or (verdict == "also_gold" and self.found == "replace"):
            return None
        role = {"also_gold": "support", "overlap": "redundant"}.get(verdict, "noise")
        return replace(slot, guard=verdict, role=role)  # type: ignore[arg-type]

    def _place(self, slot: Slot) -> None:
        self.slots.append(slot)
        self.ids.add(slot.passage.id)
        self.texts.add(content_hash(slot.passage))


def _check_kinds(kinds: Iterable[str], *, gold_absent: bool) -> None:
    for kind in kinds:
        if gold_absent and not kind_named(kind).without_gold:
            raise RecipeError(
                f"{kind} is made from gold and may not stand where gold is absent",
                hint="deal_kinds knows which prompts take it",
            )
        kind_named(kind)


def _drawn(pool: Sequence[Passage], generator: random.Random) -> Iterator[Passage]:
    """Every passage once, in a drawn order: a few first, since a corpus may be large, and all only if these did not do."""
    first = generator.sample(range(len(pool)), min(len(pool), 64))
    yield from (pool[row] for row in first)
    if len(first) < len(pool):
        known = set(first)
        yield from (pool[row] for row in generator.sample(range(len(pool)), len(pool)) if row not in known)


def _voices(slots: Sequence[Slot]) -> set[str]:
    """Who says the truth: documents, and passages of none."""
    return {slot.passage.document or slot.passage.id for slot in slots if slot.role in ("gold", "support")}
