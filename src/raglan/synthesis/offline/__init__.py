"""A teacher without a model: rules that write questions and answers out of the knowledge base's own sentences, en and zh.

    plan     without what rules cannot write (`CANNOT`), which is listed
    visit    each cell gets a document, the least visited that has what it needs
    write    an idea (`ideas`) → its draft is shown → the answer (`answers`), by the same checks as any other teacher's

It costs nothing and needs no network, so that a whole experiment can be tried before a model is paid for; its questions are
plainer than a model's, and no table mixes the two unnamed. Topics, genres, personas and the manner of asking are not heeded.
Deviation: a run of Chinese characters is cut at marks and function words, as no segmenter is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

from raglan.records import Passage
from raglan.synthesis.offline.answers import answer
from raglan.synthesis.offline.ideas import Idea, find_idea, needs_link
from raglan.synthesis.offline.sources import TRIES, Source
from raglan.synthesis.plan import Plan
from raglan.synthesis.writing import Job, Made, Reject, Shelf, Show

__all__ = ["CANNOT", "IGNORES", "Offline"]

# Factor → values that rules do not write
CANNOT: Mapping[str, tuple[str, ...]] = {
    "task": (
        "comparison", "how_to", "ambiguous", "pros_and_cons", "recommendation", "follow_up", "dialogue_reply", "classification",
        "rewriting", "code_api", "conflict_resolution",
    ),
    "relation": ("R2", "R4", "R6", "R7"),
    "answer_format": ("table", "code"),
    "query_format": (
        "chat_turn", "message", "multi_constraint", "under_specified", "context_rich", "colloquial", "mixed_language",
    ),
    "absent_policy": ("own_knowledge", "partial"),
    "language": ("cross",),
    "source": ("from_scratch",),
}  # fmt: skip
# Factors of a cell that leave no trace in what is written
IGNORES = ("topic", "genre", "length", "clarity", "difficulty", "tailness", "persona")
STEP = 7919  # documents between two attempts at a cell
HELD = 20_000  # ideas
OTHERS = 1000  # drafts whose evidence and answers are noise for others
SHORT = 40  # characters of an answer that others may be given as a false value


class Offline:
    """The teacher, over a corpus or any sequence of passages, for one plan.

    Attributes:
        evidence: gold of some of its drafts. answers: short ones of these.
    """

    name = "offline"
    ignores = IGNORES

    def __init__(self, corpus: Sequence[Passage], plan: Plan, *, overlap: float = 0.6, shelf: Shelf | None = None):
        self.source, self.most = Source(corpus, seed=plan.seed, shelf=shelf or Shelf()), overlap
        self._ideas: dict[int, Idea] = {}  # found while documents were dealt, until they are written
        jobs = (Job(cell) for cell in plan.cells)
        self.visits = self.source.visits(
            (job.cell.number, job.cell.language, needs_link(job.cell), partial(self._serves, job)) for job in jobs
        )

        found = [idea.draft for idea in self._ideas.values()][:OTHERS]
        self.evidence = list({passage.id: passage for draft in found for passage in draft.gold}.values())
        self.answers = list(dict.fromkeys(answer for draft in found for answer in draft.answers if len(answer) <= SHORT))

    def cannot(self) -> Mapping[str, tuple[str, ...]]:
        return CANNOT

    def write(self, jobs: Iterable[Job], show: Show) -> Iterator[Made | Reject]:
        """Each job in turn."""
        for job in jobs:
            idea = self._first(job)
            if idea is None:
                yield Reject(job, "draft", "no_material", f"{job.cell.task} as {job.cell.answer_format}, {job.cell.relation}")
                continue
            sheet = show(idea.draft)
            yield sheet if isinstance(sheet, Reject) else Made(sheet, answer(idea, sheet))

    def _first(self, job: Job) -> Idea | None:
        """From the document that the cell was dealt; at a further attempt from another, some way on."""
        documents, dealt = self.source.documents[job.cell.language], self.visits.get(job.cell.number)
        if dealt is None:
            return None
        if not job.ordinal:
            return self._ideas.pop(job.cell.number, None) or self._idea(job, documents[dealt])
        places = self.source.places(job.cell.language, linked=needs_link(job.cell))
        start = dealt + STEP * job.ordinal
        tried = (documents[places[(start + more) % len(places)]] for more in range(min(len(places), TRIES)))
        return next((idea for rows in tried if (idea := self._idea(job, rows)) is not None), None)

    def _serves(self, job: Job, rows: Sequence[int]) -> bool:
        idea = self._idea(job, rows)
        if idea is not None and len(self._ideas) < HELD:
            self._ideas[job.cell.number] = idea
        return idea is not None

    def _idea(self, job: Job, rows: Sequence[int]) -> Idea | None:
        return find_idea(job, self.source, rows, most=self.most)
