"""Evidence: which passages an example shows, in which order and how they are put; from a draft to the sheet that is answered.

    gold of the draft (none in R5)  →  noise of the cell's kinds, from its dealt retriever, past the guard
    →  evidence at the cell's positions, the rest shuffled  →  what the budget leaves, whole passages, gold first
    →  the prompt, in the cell's template and form, with an instruction that says what to do where the passages do not tell

What a sheet holds depends on the draft and its cell and ordinal, and on nothing that was asked before. K never shrinks but by
the budget. A draft that cannot be shown comes back as a `Reject`, with its reason:

    too_little_evidence  fewer gold passages than the relation needs
    too_few_passages     not K different ones are there
    half_character       a lone surrogate, which no tokenizer and no file takes
    over_budget          gold does not fit, or no passage at all
    answer_shown         R5, and an answer stands there all the same
    no_false_value       R6 or R7 of one passage, and nothing to exchange
    unreachable          no retriever finds its gold again, and no such example may stay (see `synthesis.verify.round_trip`)
    answered_everywhere  a judge finds an answer in 16 passages that have no place: of so wide a question noise would be sought,
                         and paid, for ever; those that stay, as support, are not counted

R6 and R7 need two passages. A teacher may write both; of a single one the second is made here: R6 the same with a false value,
R7 the same with a former one, both dated. In R5 the policy is not inherited: it is dealt to the cell, and said. It is said in
all other examples, too, by the same shares, so that the sentence gives nothing away.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoTokenizer

from raglan.artifact import fingerprint
from raglan.corpus import Corpus
from raglan.embedded import embedded_model
from raglan.encoder import Encoder
from raglan.errors import CheckpointError, CorpusError, RecipeError
from raglan.knowledge import KnowledgeBase
from raglan.perturb import (
    Frequencies,
    Guard,
    Judge,
    Occurrences,
    Slot,
    Sources,
    arrange,
    content_hash,
    counterfactual,
    fill,
    gold_slots,
    neighbours,
    shown_answers,
)
from raglan.perturb.guard import closed_label, held
from raglan.pooled import Found, Retrieves, check_varied, pool, retrieve_each
from raglan.prompt import Prompt, Rendered, fit
from raglan.quiet import quietly
from raglan.recipe import PromptSettings, Recipe, SynthesisSettings
from raglan.records import Example, Hit, Passage
from raglan.rendering import Rendering, render
from raglan.retriever import Retriever
from raglan.synthesis.factors import load_factors
from raglan.synthesis.plan import ABSENT, CONFLICT, PARTIAL, Cell
from raglan.synthesis.quotas import exact
from raglan.synthesis.writing import Draft, Reject, Sheet
from raglan.text import SPACELESS, half_character

__all__ = ["Assembler", "instruction", "instructions", "language_of", "open_tokenizer"]

POOLED = "pooled"
DEPTH = 30  # ranks that hard noise is taken from
COUNTED = 200_000  # passages that the guard's frequencies are counted in, evenly spaced
SEARCHED = 50_000  # of these, whose words are kept to count answers in
POOL = 200  # answers of others that a false value is sought among
LOOKED_AT = 64  # different questions, until which a retriever may prove not to be constant
OUTDATED = "R7"
EVERYWHERE = 16  # passages that a judge finds an answer in and that cannot stand in the sheet, until it is given up
CONTRADICTED = ("conflict_resolution", "temporal")  # tasks that are always told what to do about it
_HAN = re.compile(f"[{SPACELESS}]")


class _Unfit(Exception):
    """Why a draft cannot be shown."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason, self.detail = reason, detail


class Assembler:
    """Shows drafts. One for a run; `show` may be called in any order.

    Args:
        retrievers: by the names that cells have; `pooled` is all of them in turn and is not among them.
        tokenizer: of the model that is to learn. `chat`: it is asked through its chat template.
        evidence: gold of other questions, as noise. Without any, other kinds take the place of `other_gold`.
        answers: of other questions: false values are taken from them.
        judge: tells whether a passage answers where the answer is no string; without one such passages are `unchecked`.

    Attributes:
        query_tower: names the one that the knowledge base's vectors are searched with, where a dealt index does that.

    Raises:
        CorpusError: the corpus has fewer passages than the largest K, those that are written from scratch beside it.
        RecipeError: a retriever that is to be dealt and is not there.
    """

    def __init__(
        self, corpus: Corpus, retrievers: Mapping[str, Retrieves], settings: SynthesisSettings, tokenizer: Any, *,
        chat: bool = False, evidence: Sequence[Passage] = (), answers: Sequence[str] = (), judge: Judge | None = None,
    ):  # fmt: skip
        largest = max(settings.passages.k)
        written = settings.writing.beside if settings.from_scratch == 1 else 0
        if largest > len(corpus) + written:
            more = f", beside {written} that are written" if written else ""
            raise CorpusError(
                f"an example is to show {largest} passages, and the corpus has {len(corpus)}{more}",
                hint="leave larger numbers out of synthesis.passages.k, or add documents",
            )
        strange = sorted({name for name, weight in (settings.retrievers or {}).items() if weight} - {*retrievers, POOLED})
        if strange:
            raise RecipeError(f"there is no retriever {strange[0]!r}; there are {', '.join(retrievers)}")
        self.corpus, self.retrievers, self.settings = corpus, dict(retrievers), settings
        self.query_tower = ""
        self.evidence, self.answers = tuple(evidence), tuple(dict.fromkeys(answers))
        known = replace(Frequencies.of(_spread(corpus, COUNTED)), occurrences=Occurrences(_spread(corpus, SEARCHED)))
        self._judge = judge
        self._most = EVERYWHERE  # passages of the sheet under way that may answer
        self._answering: set[str] = set()  # hashes of passages of the sheet under way that the judge finds an answer in
        self.guard = Guard(known, judge=None if judge is None else self._judged)
        self.prompt = Prompt(PromptSettings(), tokenizer, layout="chat" if chat else "joined").within(
            settings.budget.max_length - settings.budget.answer
        )
        self._policies = _policies(settings)
        self._trip = settings.verify.round_trip
        self._seen: dict[str, dict[str, Sequence[Hit]]] = defaultdict(dict)
        self._varied: set[str] = set()

    @classmethod
    def open(
        cls, recipe: Recipe, *, evidence: Sequence[Passage] = (), answers: Sequence[str] = (), judge: Judge | None = None
    ) -> Assembler:
        """Over the recipe's knowledge base, all indexes that it deals, and the tokenizer of synthesis.budget.

        Raises:
            RecipeError: the recipe has no `synthesis`. CheckpointError: no knowledge base, or no such tokenizer.
        """
        asked = recipe.synthesis
        if asked is None:
            raise RecipeError("the recipe has no `synthesis`", hint="see docs/concepts/synthesis.md for one")
        base = KnowledgeBase.of(recipe.knowledge)
        encoder = Encoder.open(recipe.knowledge.encoder, query_encoder=recipe.retriever.query_encoder)
        every = list(recipe.dealt)
        first = Retriever(base, encoder, index=every[0])
        tokenizer = open_tokenizer(asked.budget.tokenizer or recipe.generator.model)
        chat = recipe.prompt.layout in ("auto", "chat") and bool(getattr(tokenizer, "chat_template", None))
        retrievers = {name: first.by(name) for name in every}
        made = cls(base.corpus, retrievers, asked, tokenizer, chat=chat, evidence=evidence, answers=answers, judge=judge)
        if any(retriever.needs_vectors for retriever in retrievers.values()):
            made.query_tower = encoder.query_fingerprint
        return made

    def show(self, draft: Draft) -> Sheet | Reject:
        """The draft's passages as they are shown, and the prompt.

        Raises:
            IndexMismatch: a retriever finds the same passages for all questions so far.
        """
        try:
            return self._sheet(draft)
        except _Unfit as why:
            return Reject(draft.job, "show", why.reason, why.detail)

    def _judged(self, example: Example, passage: Passage) -> bool | None:
        """What the judge says. Raises _Unfit: it says yes to whatever it is shown."""
        assert self._judge is not None
        says = self._judge(example, passage)
        if says:
            self._answering.add(content_hash(passage))
        if len(self._answering) >= self._most:
            raise _Unfit("answered_everywhere", f"in {len(self._answering)} passages")
        return says

    def _sheet(self, draft: Draft) -> Sheet:
        _check_whole(draft)
        cell, seed = draft.job.cell, str(draft.job.seed("evidence"))
        stays = self.settings.found == "relabel" and cell.relation != ABSENT
        self._answering.clear()
        self._most = EVERYWHERE + (len(cell.noise) if stays else 0)  # each of them has its place
        found = self._found(draft)
        lost = self._unreachable(draft, found)
        evidence = self._evidence(draft, found, seed)
        slots = self._filled(draft, evidence, found, seed)
        slots = _arranged(slots, evidence, cell, seed)
        asked = instruction(draft, policies=self._policies(draft.job.cell.task))
        rendering = _rendering(draft)
        kept, rendered = self._within_budget(draft, slots, {slot.passage.id for slot in evidence}, rendering, asked)
        _check_absent(draft, kept, rendering)
        told = {"rendering": rendering.record(), "left_out": len(slots) - len(kept), "prompt_hash": fingerprint(rendered.text)}
        told |= {"unreachable": True} if lost else {}
        return Sheet(draft, kept, rendered.text, asked, told)

    def _found(self, draft: Draft) -> tuple[Found, ...]:
        """The best hits of the cell's retriever, or of all in turn."""
        name = draft.job.cell.retriever
        text = _searched(draft)
        names = list(self.retrievers) if name == POOLED else [name]
        depth = min(DEPTH, len(self.corpus))
        each = retrieve_each({one: self.retrievers[one] for one in names}, [text], depth)
        hits = {one: own[0] for one, own in each.items()}
        for one, own in hits.items():
            if own or draft.job.cell.language != "cross":  # it asks in another language, in which terms may find nothing
                self._look_at(one, text, own)
        return pool(hits, depth)

    def _unreachable(self, draft: Draft, found: Sequence[Found]) -> bool:
        """The round trip: whether no retriever has gold of the corpus among its first ranks. Raises _Unfit: none may stay.

        What was found for the noise is looked at first; only where gold is not there all retrievers are asked, and deeper.
        """
        gold = {passage.id for passage in draft.gold if self.corpus.row(passage.id) is not None}
        if self._trip is None or not gold or any(_at_hand(one.hit, gold, self._trip.depth) for one in found):
            return False
        depth = min(self._trip.depth, len(self.corpus))
        each = retrieve_each(self.retrievers, [_searched(draft)], depth)
        if any(_at_hand(hit, gold, depth) for own in each.values() for hit in own[0]):
            return False
        if not int(exact(self._trip.kept) * self.settings.n):
            raise _Unfit("unreachable", f"not among the first {depth} of {', '.join(self.retrievers)}")
        return True

    def _look_at(self, name: str, text: str, hits: Sequence[Hit]) -> None:
        """A retriever that finds the same for everything is broken; one that has once found something else is not."""
        seen = self._seen[name]
        if len(seen) < LOOKED_AT and name not in self._varied:
            seen[text] = [hit for hit in hits if hit.score != 0]
            check_varied(list(seen), list(seen.values()), name=name)
            if len({tuple(hit.passage.id for hit in own) for own in seen.values()}) > 1:
                self._varied.add(name)

    def _evidence(self, draft: Draft, found: Sequence[Found], seed: str) -> list[Slot]:
        """What stands at the cell's positions: gold, and of a conflict what contradicts it."""
        cell = draft.job.cell
        different = list({content_hash(passage): passage for passage in reversed(draft.gold)}.values())[::-1]  # first stays
        slots = [_ranked(slot, found) for slot in gold_slots(different[: cell.evidence])]
        if cell.relation in (CONFLICT, OUTDATED) and len(slots) == 1 < cell.evidence:
            return self._contradicted(draft, slots[0], seed)
        if len(slots) < cell.evidence:
            raise _Unfit("too_little_evidence", f"{len(slots)} of {cell.evidence}")
        return slots

    def _contradicted(self, draft: Draft, gold: Slot, seed: str) -> list[Slot]:
        """The one passage and a twin that says something else: at the same time, or before."""
        example = _example(draft)
        twin = counterfactual(example, gold, seed=f"{seed}:twin", pool=self._pool(seed))
        if twin is None:
            raise _Unfit("no_false_value", ", ".join(draft.answers[:3]))
        if draft.job.cell.relation == CONFLICT:
            return [gold, twin]
        chance = random.Random(f"{seed}:dated")
        then, now = chance.randint(2009, 2016), chance.randint(2018, 2025)
        if any(held(Passage("", f"{then} {now}"), [value]) for value in (*draft.answers, twin.value)):
            raise _Unfit("no_false_value", "the answer is the year of a date")
        old = replace(_dated(twin, then, draft), kind="outdated", operator=f"{twin.operator}_dated")
        return [_dated(gold, now, draft), old]

    def _filled(self, draft: Draft, evidence: Sequence[Slot], found: Sequence[Found], seed: str) -> tuple[Slot, ...]:
        cell, example = draft.job.cell, _example(draft)
        absent = cell.relation == ABSENT
        beside, kinds = self._beside(draft, evidence, list(cell.noise))
        sources = Sources(
            [one.hit for one in found], cell.retriever, self.corpus, neighbours(self.corpus, draft.gold),
            self.evidence, self._pool(seed),
        )  # fmt: skip
        try:
            slots = fill(
                example, [*evidence, *beside], kinds=kinds, gold=draft.gold, sources=sources, guard=self.guard, seed=seed,
                gold_absent=absent, conflict=cell.relation == CONFLICT, found=self.settings.found,
            )  # fmt: skip
        except CorpusError as why:
            raise _Unfit("too_few_passages", why.message) from None
        names = {one.hit.passage.id: one.retriever for one in found}
        return tuple(
            replace(slot, retriever=names[slot.passage.id]) if slot.origin == "search" else slot for slot in slots
        )  # fmt: skip

    def _pool(self, seed: str) -> list[str]:
        return random.Random(f"{seed}:answers").sample(self.answers, min(POOL, len(self.answers)))

    def _beside(self, draft: Draft, evidence: Sequence[Slot], kinds: list[str]) -> tuple[list[Slot], list[str]]:
        """What the teacher wrote to look like evidence, as far as the guard passes it, in the place of other noise."""
        example, gold = _example(draft), list(draft.gold)
        texts = {content_hash(slot.passage) for slot in evidence}
        placed: list[Slot] = []
        for passage in draft.beside:
            kind = next((kind for kind in ("hard", "neighbour", "random", "other_gold") if kind in kinds), None)
            if kind is None:
                break
            absent = draft.job.cell.relation == ABSENT
            verdict = self.guard.verdict(example, passage, gold)
            answers = verdict in ("same", "also_gold", "overlap")
            fits = self.guard.fit_without_gold(example, passage, gold) if absent else not answers
            if fits and content_hash(passage) not in texts:
                placed.append(Slot(passage, "noise", "hard", "made", "written", guard=verdict))
                texts.add(content_hash(passage))
                kinds.remove(kind)
        return placed, kinds

    def _within_budget(
        self, draft: Draft, slots: Sequence[Slot], evidence: set[str], rendering: Rendering, asked: str
    ) -> tuple[tuple[Slot, ...], Rendered]:
        """The slots that fit whole, and the prompt. Evidence stays, and so does what settles a contradiction."""
        contested = any(slot.kind == "counterfactual" for slot in slots)
        needed = [
            place for place, slot in enumerate(slots) if slot.passage.id in evidence or (contested and slot.role == "support")
        ]
        lengths = [self._tokens(passage.text) for passage in rendering.set([slot.passage for slot in slots])]
        try:
            fixed = len(self._rendered(draft, [Passage("", "")], rendering, asked).ids)
            kept = fit(lengths, self.prompt.budget - fixed, gold=needed)
            while kept is not None:
                chosen = tuple(slots[place] for place in kept)
                rendered = self._rendered(draft, [slot.passage for slot in chosen], rendering, asked)
                if not (rendered.cut_tokens or rendered.dropped_turns or not chosen):
                    return chosen, rendered
                loose = [place for place in kept if place not in needed]  # joins can cost a token more than their parts
                kept = tuple(place for place in kept if place != loose[-1]) if loose else None
        except RecipeError as why:  # the question alone, or many passages, have no room
            raise _Unfit("over_budget", why.message) from None
        raise _Unfit("over_budget", f"{sum(lengths[place] for place in needed)} tokens of evidence")

    def _rendered(self, draft: Draft, passages: Sequence[Passage], rendering: Rendering, asked: str) -> Rendered:
        return render(self.prompt, rendering, draft.query, passages, instruction=asked, history=draft.history)

    def _tokens(self, text: str) -> int:
        """With what separates it from the next."""
        return len(self.prompt.tokenizer(f"{text}\n\n", add_special_tokens=False, verbose=False)["input_ids"])


def instruction(draft: Draft, *, policies: Mapping[str, float]) -> str:
    """What is asked of the answer: its format, what it may be, and what to do where the passages do not tell or disagree.

    Args:
        policies: that the task takes → weight. A cell of R5 has its own; to all others one is dealt.
    """
    cell = draft.job.cell
    told, language = instructions(), language_of(draft)
    chance = random.Random(draft.job.seed("instruction"))
    parts = [told["lead"], told["answer_format"][cell.answer_format]]
    parts += [told["labels"]] if draft.labels else []
    parts += [told["fields"]] if draft.fields and cell.answer_format == "json" else []
    dealt = chance.choices(list(policies), list(policies.values()))[0]
    parts += [told["absent_policy"][cell.absent_policy or dealt]]
    said = {
        CONFLICT: cell.relation == CONFLICT or cell.task in CONTRADICTED or chance.random() < 1 / 4,
        OUTDATED: cell.relation == OUTDATED or cell.task in CONTRADICTED or chance.random() < 1 / 4,
    }
    parts += [told[name] for name, relation in (("conflict", CONFLICT), ("outdated", OUTDATED)) if said[relation]]
    between = "" if language == "zh" else " "
    comma = "、" if language == "zh" else ", "
    text = between.join(chance.choice(part[language]) for part in parts)
    named = {"{labels}": comma.join(draft.labels), "{fields}": comma.join(draft.fields)}
    return re.sub("|".join(map(re.escape, named)), lambda found: named[found.group()], text)  # at once: a label is no template


def _policies(settings: SynthesisSettings) -> Callable[[str], dict[str, float]]:
    """Task → the policies that it may be told, with their weights, as the plan deals them to R5."""
    factors, given = load_factors(settings.factors), settings.weights.get("absent_policy")
    if isinstance(given, dict):
        factors = factors.weighted("absent_policy", given)
    rules = [rule for rule in factors.of("absent_policy") if rule.given == "task"]

    def of(task: str) -> dict[str, float]:
        values = factors["absent_policy"].values
        return {one.name: float(one.weight) for one in values if all(rule.allows(task, one.name) for rule in rules)}

    return of


def language_of(draft: Draft) -> str:
    """en or zh: the language of question and instruction; a cross-lingual example's is its question's."""
    if draft.job.cell.language in ("en", "zh"):
        return draft.job.cell.language
    return "zh" if _HAN.search(draft.query) else "en"


def _spread(corpus: Corpus, most: int) -> Iterator[Passage]:
    """At least `most` passages, evenly spaced, or all."""
    return (corpus[row] for row in range(0, len(corpus), max(1, len(corpus) // most)))


@cache
def instructions() -> dict[str, Any]:
    """data/instructions.yaml."""
    path = Path(__file__).parent / "data" / "instructions.yaml"
    told: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return told


def _rendering(draft: Draft) -> Rendering:
    """The cell's, less of a head where evidence lacks what it would show, for that would tell evidence apart."""
    cell, head = draft.job.cell, draft.job.cell.passage_head
    own = [*draft.gold, *draft.beside]
    if head == "title_url" and not all(passage.document for passage in own):
        head = "title"
    if head == "title_date" and not all(passage.date for passage in own):
        head = "title"
    if head != "none" and not all(passage.title for passage in own):
        head = "none"
    return Rendering(cell.template, cell.passage_form, head, language_of(draft))


def _searched(draft: Draft) -> str:
    """What is searched for: the question, after the turn before it."""
    return "\n".join([*draft.history[-1:], draft.query])


def _at_hand(hit: Hit, gold: Collection[str], depth: int) -> bool:
    return hit.passage.id in gold and hit.rank <= depth and hit.score != 0


def _ranked(slot: Slot, found: Sequence[Found]) -> Slot:
    """Gold with rank and score, where the retriever found it."""
    own = next((one for one in found if one.hit.passage.id == slot.passage.id), None)
    return slot if own is None else replace(slot, retriever=own.retriever, rank=own.hit.rank, score=own.hit.score)


def _dated(slot: Slot, year: int, draft: Draft) -> Slot:
    """The slot with a year before its text, and for its date, as a passage of its own."""
    text = str(instructions()["dated"][language_of(draft)]).format(year=year, text=slot.passage.text)
    passage = replace(slot.passage, id=f"{slot.passage.id}~dated-{year}", text=text, date=str(year))
    parents = slot.parents or (slot.passage.id,)
    return replace(slot, passage=passage, origin="made", operator="dated", parents=parents)


def _arranged(slots: Sequence[Slot], evidence: Sequence[Slot], cell: Cell, seed: str) -> tuple[Slot, ...]:
    """Evidence at the cell's positions and the rest shuffled, or all by rank."""
    if cell.positions is None:
        return arrange(slots, seed=seed, order="rank")
    own = {slot.passage.id for slot in evidence}
    rest = [slot for slot in slots if slot.passage.id not in own]
    chance = random.Random(f"{seed}:order")
    chance.shuffle(rest)
    first = [slot for slot in slots if slot.passage.id in own]
    chance.shuffle(first)  # of two that contradict each other, none is always ahead
    others, mine = iter(rest), iter(first)
    return tuple(next(mine) if place in cell.positions else next(others) for place in range(1, len(slots) + 1))


def _check_whole(draft: Draft) -> None:
    own = (text for passage in (*draft.gold, *draft.beside) for text in (passage.title, passage.text))
    told = "\n".join([draft.query, *draft.answers, *draft.history, *draft.facts, *draft.labels, *draft.fields, *own])
    if (half := half_character(told)) is not None:
        raise _Unfit("half_character", repr(half))


def _check_absent(draft: Draft, slots: Sequence[Slot], rendering: Rendering) -> None:
    """No answer stands in what was rendered, where none may. A part that is there on purpose is no such place."""
    cell = draft.job.cell
    if cell.relation != ABSENT:
        return
    example = replace(_example(draft), answers=tuple(answer for answer in draft.answers if not closed_label(answer)))
    for slot, passage in zip(slots, rendering.set([slot.passage for slot in slots]), strict=True):
        if not (cell.absent_policy == PARTIAL and slot.role == "gold") and (there := shown_answers(example, passage.text)):
            raise _Unfit("answer_shown", there[0])


def _example(draft: Draft) -> Example:
    return Example(draft.job.id, draft.query, draft.answers, tuple(passage.id for passage in draft.gold))


def open_tokenizer(name: str) -> Any:
    folder = str(embedded_model()) if name in ("embedded", "embedded_causal") else name
    try:
        with quietly():
            return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as fault:
        told = str(fault).strip().splitlines()[0]
        raise CheckpointError(
            f"the tokenizer {name!r} cannot be loaded: {told}",
            hint="synthesis.budget.tokenizer: embedded, a folder, a hub name",
        ) from None
