"""A chat model behind a server as the teacher: every call through the one engine, deepest first.

    brainstorm  topic, genre, family of tasks        → jobs of readers                 0   one call serves many attempts
                (or the titles of some documents)
    draft       one job, the cell's factors          → {query, facts, answers, …}      1   or over passages of the corpus
    passages    facts, genre, length; no query       → evidence, from scratch          2   R5 shows none, so none is written
    beside      facts that must not be told          → hard negatives, from scratch    2   at the same time
    show        draft → Sheet: noise, guard, order, budget                                 not ours, and no call
    answer      the prompt that the student will see → the target                      3

An attempt's prompts follow from plan, cell and ordinal and from replies, never from what else is under way. So one call at a
time, sixty-four, or a killed run that is begun again (its calls are in the journal) give the same results. In memory are the
attempts under way, O(concurrency). A reply that does not fit is repaired once, by the engine; what fails then is a `Reject`
with the raw text. `seen` in a record has the content hash of each prompt, and key, tokens and cost of each call, as the
journal has them: of a reply that was repaired, the repair's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pydantic import BaseModel

from raglan.artifact import fingerprint
from raglan.calls import Ask, CallEngine, Outcome
from raglan.corpus import Corpus
from raglan.errors import RecipeError
from raglan.recipe import StepSettings, WritingSettings
from raglan.records import Passage
from raglan.synthesis.endpoint.asking import AGAINST, Asking, lacking, shares, sources
from raglan.synthesis.endpoint.given import Given, Style, answered_with, repeats
from raglan.synthesis.endpoint.places import Library, Places
from raglan.synthesis.endpoint.prompts import Prompts, load_prompts
from raglan.synthesis.endpoint.replies import DraftReply, JobReply, JobsReply, PassagesReply
from raglan.synthesis.factors import Factors
from raglan.synthesis.offline.spans import Span, language_of, spans
from raglan.synthesis.plan import SCRATCH, Cell, Plan
from raglan.synthesis.writing import Draft, Job, Made, Reject, Sheet, Shelf, Show
from raglan.text import sentences
from raglan.verification.said import plain

__all__ = ["EndpointTeacher"]

OTHERS = 1000  # passages that cells are to read, which are noise for other cells
SHORT = 40  # characters of a false value
TORN = "\ufffd"
DEPTHS = {"brainstorm": 0, "draft": 1, "passages": 2, "beside": 2, "answer": 3}
End = Made | Reject


@dataclass
class _Attempt:
    """A job under way: what its replies were so far."""

    job: Job
    source: tuple[Passage, ...] = ()
    style: Style | None = None
    span: Span | None = None
    about: str = ""
    draft: DraftReply | None = None
    gold: tuple[Passage, ...] = ()
    beside: tuple[Passage, ...] = ()
    sheet: Sheet | None = None
    waits: int = 1  # replies that must come before the next step
    failed: dict[str, Reject] = field(default_factory=dict)
    calls: dict[str, dict[str, Any]] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)

    def seen(self) -> dict[str, Any]:
        """How it was made, in the order of the steps, whichever reply came first; and what it was given."""
        given = {"style": self.style.record} if self.style is not None else {}
        given |= {"answer_first": {"span": self.span.text, "kind": self.span.kind}} if self.span is not None else {}
        return {
            name: {step: told[step] for step in DEPTHS if step in told}
            for name, told in (("prompts", self.prompts), ("calls", self.calls))
        } | given


class EndpointTeacher:
    """Writes examples by asking a chat model.

    What other questions rest on is told before any reply is there, so that no sheet depends on what came first: `evidence` is
    the passages that cells of the plan read at their first attempt, `answers` the names, numbers and titles that stand in them.

    Args:
        engine: makes the calls; its journal is what a killed run goes on from.
        plan: all cells; says which attempts share a brainstorm, and which documents each reads.
        factors: the words of the cells' values.
        corpus: where cells with `source: knowledge` have their passages; needed if there are any.
        shelf: which of its documents are open; default all.

    Attributes:
        book: while somebody reckons with them, the calls of each job: its id → key → (step, cells that the call serves).

    Raises:
        RecipeError: such cells and no corpus, no document in their language, or too few for `writing.per_document`.
    """

    # of a cell that has its passages from a corpus: these have their own topics and genres
    ignores_in_corpus = ("topic", "genre", "tailness")

    def __init__(
        self, engine: CallEngine, plan: Plan, factors: Factors, *, corpus: Corpus | None = None,
        writing: WritingSettings | None = None, shelf: Shelf | None = None,
    ):  # fmt: skip
        self.engine, self.plan, self.corpus, self.shelf = engine, plan, corpus, shelf or Shelf()
        self.writing = writing or WritingSettings()
        self.prompts = load_prompts(self.writing.prompts)
        self.name = f"endpoint:{engine.settings.model}"
        self._asking = Asking(self.prompts, factors)
        over = sum(cell.source != SCRATCH for cell in plan.cells)
        if over and corpus is None:
            raise RecipeError(f"{over} cells have their passages from a corpus, and there is none")
        read = self._library.read if over else None
        family = self.prompts["en"].family
        self._places = Places(plan.cells, family, jobs=self.writing.jobs, read=read, first=self.shelf.first)
        if over:
            self._library.check(self._places.visits, most=self.writing.per_document)
        self._given = Given(self.writing, plan.cells)
        for prompts in self.prompts.values():
            if lacks := [name for name in self._given.names if name not in prompts.given]:
                raise RecipeError(f"the prompts in {prompts.language} lack given.{lacks[0]}", hint="see raglan's own files")
        self.book: dict[str, dict[str, tuple[str, int]]] | None = None
        self._begin()

    @cached_property
    def _library(self) -> Library:
        assert self.corpus is not None
        return Library(self.corpus, seed=self.plan.seed, shelf=self.shelf)

    @cached_property
    def evidence(self) -> list[Passage]:
        """Of cells over a corpus; none of a plan that is all from scratch."""
        read = [cell for cell in self.plan.cells if cell.source != SCRATCH][:OTHERS]
        places = (self._places.of(Job(cell)) for cell in read)
        found = (self._library.visited(place.visit, place.read) for place in places)
        return list({passage.id: passage for passage in found}.values())

    @cached_property
    def answers(self) -> list[str]:
        """False values for counterfactuals: what could be answers, found by rules."""
        return list(dict.fromkeys(answer for passage in self.evidence for answer in _values(passage)))

    @property
    def fingerprint(self) -> str:
        """Names what texts follow from, beside the plan and the corpus: server, model, wordings and sampling."""
        hashes = {language: dict(prompts.hashes) for language, prompts in self.prompts.items()}
        settings = self.writing.model_dump(mode="json", exclude={"prompts", "styles", *self.writing.off})
        words = [[dict(prompts.given) for prompts in self.prompts.values()], self._given.content] if self._given.names else []
        return fingerprint([self.name, self.engine.host, settings, hashes, *words])

    def cannot(self) -> Mapping[str, tuple[str, ...]]:
        """Nothing: a model is asked for every task."""
        return {}

    def write(self, jobs: Iterable[Job], show: Show) -> Iterator[End]:
        """Each job's example or reject, as they end.

        Raises:
            CallsStopped: cap, key, broken endpoint, interrupt; what was finished has been handed out.
        """
        self._begin()
        for outcome in self.engine.run(self._first(jobs), follow=self._further):
            self._next(outcome, show)
            yield from self._results()
        yield from self._results()

    def _begin(self) -> None:
        self._under: dict[str, _Attempt] = {}
        self._ended: deque[End] = deque()
        self._asks: list[Ask] = []

    def _further(self, _: Outcome) -> list[Ask]:
        """What the outcome that was just looked at leads to."""
        return self._asks

    def stratum(self, job: Job) -> str:
        """What kind of cell a job is of: a sample is spread over these."""
        return f"{job.cell.source} {self.prompts['en'].family(job.cell.task)}"

    def _results(self) -> Iterator[End]:
        while self._ended:
            yield self._ended.popleft()

    # brainstorm: the first ask of every attempt

    def _first(self, jobs: Iterable[Job]) -> Iterator[Ask]:
        """Asked for as far as there is room; equal ones are one call."""
        for job in jobs:
            attempt = _Attempt(job, style=self._given.style(job))
            if job.cell.source != SCRATCH and not self._read(attempt):
                continue
            self._under[job.id] = attempt
            yield self._brainstorm(attempt)

    def _read(self, attempt: _Attempt) -> bool:
        """Find the source passages; False where there are too few, which ends the attempt."""
        cell, place = attempt.job.cell, self._places.of(attempt.job)
        passage = self._library.visited(place.visit, place.read)
        attempt.source = (passage,)
        if cell.number in self._given.answers:
            attempt.span = self._given.answer(attempt.job, passage)
            if attempt.span is None:
                self._reject(attempt, "draft", "no_span", passage.id)
                return False
        if sources(cell) == 1:
            return True
        linked = self._library.linked(passage)
        if linked is None:
            self._reject(attempt, "draft", "no_linked_passage", passage.id)
            return False
        attempt.source = (passage, linked)
        return True

    def _brainstorm(self, attempt: _Attempt) -> Ask:
        cell, place = attempt.job.cell, self._places.of(attempt.job)
        if attempt.source:
            titles = self._library.titles(place.draw, self.writing.jobs, place.read)
            messages = self._asking.brainstorm_corpus(cell, titles, self.writing.jobs)
            return self._ask(attempt, "brainstorm", messages, JobsReply, wording="brainstorm_corpus")
        messages = self._asking.brainstorm(cell, self.writing.jobs)
        return self._ask(attempt, "brainstorm", messages, JobsReply, draw=place.draw)

    def _ask(
        self, attempt: _Attempt, step: str, messages: tuple[Mapping[str, Any], ...], schema: type[BaseModel] | None,
        *, draw: int = 0, wording: str = "",
    ) -> Ask:  # fmt: skip
        cell, settings = attempt.job.cell, self._settings(step)
        prompts = self._wordings(step, cell, attempt.source)
        attempt.prompts[step] = prompts.hashes[wording or step]
        sampling = {"temperature": settings.temperature, "max_tokens": settings.max_tokens}
        ask = Ask(step, messages, schema, sampling, draw, attempt.job.id, DEPTHS[step])
        if self.book is not None:
            serves = self._places.shared(attempt.job) if step == "brainstorm" else 1
            self.book.setdefault(attempt.job.id, {})[self.engine.key(ask)] = (step, serves)
        return ask

    def _wordings(self, step: str, cell: Cell, source: Sequence[Passage]) -> Prompts:
        """In which language a step is asked."""
        if step == "brainstorm":
            return self.prompts["en" if cell.language == "cross" else cell.language]
        asked, read = self._asking.language(cell, source)
        return self.prompts[read if step in ("passages", "beside") else asked]

    def _settings(self, step: str) -> StepSettings:
        found: StepSettings = getattr(self.writing, "passages" if step == "beside" else step)
        return found

    # what an outcome leads to

    def _next(self, outcome: Outcome, show: Show) -> None:
        """Settle the attempt's further asks; an attempt that ends is put among the results."""
        self._asks = self._after(self._under[outcome.ask.ref], outcome, show)

    def _after(self, attempt: _Attempt, outcome: Outcome, show: Show) -> list[Ask]:
        step, value = outcome.ask.step, outcome.value
        if outcome.cls != "ok":
            return self._failed(attempt, step, outcome.cls, outcome.error, outcome.raw, show=show)
        if step != "brainstorm" and _torn(outcome):
            return self._failed(attempt, step, "half_character", "U+FFFD stands for it", outcome.raw, show=show)
        attempt.calls[step] = self._paid(outcome)
        if isinstance(value, JobsReply):
            place = self._places.of(attempt.job)
            return self._draft(attempt, value.jobs[place.job % len(value.jobs)])
        if isinstance(value, DraftReply):
            return self._drafted(attempt, value, outcome.raw, show)
        if isinstance(value, PassagesReply):
            return self._written(attempt, step, value, outcome.raw, show)
        return self._answered(attempt, str(value))

    def _draft(self, attempt: _Attempt, job: JobReply) -> list[Ask]:
        attempt.about = job.job
        cell = attempt.job.cell
        given: dict[str, Style | Span | None] = {"style": attempt.style, "answer": attempt.span}
        told = {name: one.text for name, one in given.items() if one is not None}
        messages = self._asking.draft(cell, job, attempt.source, given=told)
        wording = "draft_corpus" if attempt.source else "draft"
        ask = self._ask(attempt, "draft", messages, DraftReply, draw=attempt.job.ordinal, wording=wording)
        if told:
            words = self._wordings("draft", cell, attempt.source).given
            attempt.prompts["draft"] = fingerprint([attempt.prompts["draft"], *(words[name] for name in told)])
        return [ask]

    def _drafted(self, attempt: _Attempt, draft: DraftReply, raw: str, show: Show) -> list[Ask]:
        cell = attempt.job.cell
        if reason := lacking(cell, draft):
            return self._reject(attempt, "draft", reason, draft.query, raw)
        if attempt.style is not None and repeats(draft.query, attempt.style):
            return self._reject(attempt, "draft", "repeats_style", attempt.style.text, raw)
        if attempt.span is not None and not answered_with(draft.answers, attempt.span):
            return self._reject(attempt, "draft", "another_answer", attempt.span.text, raw)
        attempt.draft = draft
        attempt.gold = attempt.source  # of a part, too: what is not shown is withheld, and no noise either
        asks = []
        if lists := self._lists(attempt):
            asks.append(self._ask(attempt, "passages", self._asking.passages(cell, lists, attempt.source), PassagesReply))
        if beside := self._besides(attempt):
            asks.append(self._ask(attempt, "beside", self._asking.beside(cell, draft, beside), PassagesReply))
        attempt.waits = len(asks)
        return asks or self._shown(attempt, show)

    def _lists(self, attempt: _Attempt) -> list[list[str]]:
        """The facts of each passage that is written: of all evidence from scratch; from a corpus of what speaks against it."""
        assert attempt.draft is not None
        cell = attempt.job.cell
        if not cell.evidence or (attempt.source and cell.relation not in AGAINST):
            return []
        return shares(cell, attempt.draft.facts)[len(attempt.source) :]

    def _besides(self, attempt: _Attempt) -> int:
        """Hard negatives that are written: from scratch, as many as the cell has places for, up to `beside`."""
        return 0 if attempt.source else min(self.writing.beside, attempt.job.cell.noise.count("hard"))

    def _written(self, attempt: _Attempt, step: str, reply: PassagesReply, raw: str, show: Show) -> list[Ask]:
        wanted = len(self._lists(attempt)) if step == "passages" else self._besides(attempt)
        found = tuple(
            Passage(f"synth-{attempt.job.id}-{step}-{number}", one.text, one.title.strip(), end=len(one.text))
            for number, one in enumerate(reply.passages[:wanted], 1)
        )
        if len(reply.passages) < wanted:
            return self._failed(attempt, step, "too_few_passages", f"{len(found)} of {wanted}", raw, show=show)
        if step == "passages":
            attempt.gold += found
        else:
            attempt.beside = found
        return self._came(attempt, show)

    def _failed(self, attempt: _Attempt, step: str, reason: str, detail: str, raw: str, *, show: Show) -> list[Ask]:
        attempt.failed[step] = Reject(attempt.job, "passages" if step == "beside" else step, reason, detail, raw)
        return self._came(attempt, show)

    def _came(self, attempt: _Attempt, show: Show) -> list[Ask]:
        """A reply less to wait for. Of two that failed the earlier step's is told, whichever came first."""
        attempt.waits -= 1
        if attempt.waits > 0:
            return []
        if attempt.failed:
            return self._end(attempt, attempt.failed[min(attempt.failed, key=list(DEPTHS).index)])
        return self._shown(attempt, show)

    def _shown(self, attempt: _Attempt, show: Show) -> list[Ask]:
        """Have noise, order and budget settled, and ask for the answer."""
        draft = attempt.draft
        assert draft is not None
        made = Draft(
            attempt.job, draft.query, tuple(draft.answers), attempt.gold, tuple(draft.history), tuple(draft.facts),
            attempt.beside, tuple(draft.labels), tuple(draft.fields), "" if attempt.source else attempt.about,
            attempt.seen(),
        )  # fmt: skip
        sheet = show(made)
        if isinstance(sheet, Reject):
            return self._end(attempt, sheet)
        attempt.sheet = sheet
        attempt.waits = 1
        messages = self._asking.answer(attempt.job.cell, sheet.prompt, attempt.source)
        return [self._ask(attempt, "answer", messages, None)]

    def _answered(self, attempt: _Attempt, text: str) -> list[Ask]:
        assert attempt.sheet is not None
        return self._end(attempt, Made(attempt.sheet, plain(text), "stop", attempt.seen()))

    def _paid(self, outcome: Outcome) -> dict[str, Any]:
        """Key, tokens and cost of a call, out of the journal, so that a run that goes on tells the same."""
        key = self.engine.key(outcome.ask)
        line = self.engine.journal.answer(key) or {"usage": [0, 0, 0], "cost": 0}
        prompt, cached, output = line["usage"]
        return {"key": key, "tokens": {"prompt": prompt, "cached": cached, "output": output}, "nano_usd": line["cost"]}

    def _reject(self, attempt: _Attempt, step: str, reason: str, detail: str = "", raw: str = "") -> list[Ask]:
        return self._end(attempt, Reject(attempt.job, step, reason, detail, raw))

    def _end(self, attempt: _Attempt, end: End) -> list[Ask]:
        self._under.pop(attempt.job.id, None)
        self._ended.append(end)
        return []


def _torn(outcome: Outcome) -> bool:
    """Whether half a character came, for which the engine writes U+FFFD; one that was asked with may be a quotation."""
    return TORN in outcome.raw and not any(TORN in str(message["content"]) for message in outcome.ask.messages)


def _values(passage: Passage) -> Iterator[str]:
    """The title, and dates, numbers, names and titles of works in the text; rare words are no values."""
    language = language_of(passage.text) or "en"
    found = (span.text for sentence in sentences(passage.text) for span in spans(sentence, language))
    yield from (text for text in (passage.title.strip(), *found) if 0 < len(text) <= SHORT)
