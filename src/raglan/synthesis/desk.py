"""The desk between a teacher and the dataset: what is written is shown, checked and judged.

    write    teacher.write(jobs, show); a draft whose noise a judge has to look at first waits
    settle   these judgements are asked for together; then what waited is written again, the same, out of the journal
    verify   what was made is checked; support that only a judge can tell is asked for together
    recall   what was accepted is asked once more without its passages

With a paid judge this goes piece by piece, so that a run that has to stop leaves finished examples and at most a piece that is
written and not judged; judge and teacher write one journal, in turns. Without one, results pass as they come. What comes out
depends neither on the size of a piece nor on the order within it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raglan.calls import CallEngine
from raglan.calls.estimate import SAMPLE, Estimate, Told, reckon
from raglan.errors import CallsStopped
from raglan.synthesis.checked import written_of
from raglan.synthesis.endpoint.teacher import EndpointTeacher
from raglan.synthesis.recall import ClosedBook, Recalled
from raglan.synthesis.writing import Draft, Job, Made, Reject, Sheet, Show, Teacher
from raglan.verification import PaidJudge, Verified, Verifier
from raglan.verification.judge import pieces, settled

__all__ = ["PIECE", "Desk", "Ended"]

PIECE = 128  # jobs
WAITS = "waits for the judge"


@dataclass(frozen=True, slots=True)
class Ended:
    """A job's end: rejected, or made with what the checks say of it, and whether it is known without its passages."""

    result: Made | Reject
    verified: Verified | None = None
    recalled: Recalled | None = None

    @property
    def job(self) -> Job:
        return self.result.job if isinstance(self.result, Reject) else self.result.sheet.draft.job

    @property
    def accepted(self) -> bool:
        return isinstance(self.result, Made) and (self.verified is None or self.verified.accepted) and not self.dropped

    def told(self) -> dict[str, Any]:
        """Who told that it is supported, as string, nli or judge, else the outcome; and of the draws without passages."""
        support = [verdict for verdict in self.verified.verdicts if verdict.check == "support"] if self.verified else []
        who = next((one.reason if one.outcome == "pass" else one.outcome for one in support), "n/a")
        return {"support": who} | ({"closed_book": self.recalled.record()} if self.recalled is not None else {})

    def why(self) -> tuple[str, str]:
        """Reason and detail of an example that is not accepted."""
        if self.dropped or self.verified is None:
            return "closed_book", ""
        failed = next(verdict for verdict in self.verified.verdicts if verdict.outcome in ("fail", "missing"))
        return self.verified.reason, failed.detail

    @property
    def dropped(self) -> bool:
        """Whether it leaves because no passage is needed for it."""
        return self.recalled is not None and self.recalled.drops


class Desk:
    """A teacher, whoever shows its drafts passages, and the checks.

    Args:
        verifier: its judge, if it is a paid one, is also asked for what the guard wants to know in `show`. Without a verifier
            all that is made is accepted.
        recall: asks without passages.
        piece: jobs that are judged together.
    """

    def __init__(
        self, teacher: Teacher, show: Show, verifier: Verifier | None = None, *, recall: ClosedBook | None = None,
        piece: int = PIECE,
    ):  # fmt: skip
        self.teacher, self.show, self.verifier, self.recall, self.piece = teacher, show, verifier, recall, piece
        judge = verifier.judge if verifier is not None else None
        self.judge = judge if isinstance(judge, PaidJudge) else None

    def ends(self, jobs: Iterable[Job]) -> Iterator[Ended]:
        """Each job's end, in any order.

        Raises:
            CallsStopped: after what is finished has been handed out.
        """
        if self.judge is None and self.recall is None:
            yield from map(self._ended, self.teacher.write(jobs, self.show))
            return
        for some in pieces(jobs, self.piece):
            yield from self._piece(some)

    def _ended(self, result: Made | Reject) -> Ended:
        if self.verifier is None or isinstance(result, Reject):
            return Ended(result)
        return Ended(result, self.verifier.verify(written_of(result)))

    def estimate(
        self, jobs: Iterable[Job], engine: CallEngine, *, stratum: Callable[[Job], str], sample: int = SAMPLE, seed: int = 0
    ) -> Estimate:
        """Run a sample of the jobs, and say what all accepted ones will cost. Its replies are kept.

        Raises:
            CallsStopped: as `ends`. GeneratorError: nothing of the sample was accepted.
        """

        return reckon(engine, jobs, self.told, stratum=stratum, sample=sample, seed=seed)

    def told(self, drawn: list[Job]) -> list[Told]:
        """Run some jobs; of each whether it was accepted, and its calls, for `reckon`. Raises CallsStopped: as `ends`."""
        book = self._note()
        good = {ended.job.id: ended.accepted for ended in self.ends(drawn)}
        self._note(stop=True)
        return [(good[job.id], book(job)) for job in drawn]

    def _note(self, *, stop: bool = False) -> Callable[[Job], dict[str, tuple[str, int]]]:
        """Have the calls of each job noted; the function tells them."""
        written: dict[str, dict[str, tuple[str, int]]] = {}
        others: list[dict[str, dict[str, str]]] = []
        if isinstance(self.teacher, EndpointTeacher):
            self.teacher.book = None if stop else written
        for asking in (self.judge, self.recall):
            if asking is not None:
                own: dict[str, dict[str, str]] = {}
                asking.book = None if stop else own
                others.append(own)
        return lambda job: {
            **written.get(job.id, {}),
            **{key: (step, 1) for own in others for key, step in own.get(job.id, {}).items()},
        }

    def _piece(self, jobs: Sequence[Job]) -> Iterator[Ended]:
        made: list[Made] = []
        stopped: CallsStopped | None = None
        while jobs and stopped is None:
            waiting: list[Job] = []
            try:
                for result in self.teacher.write(jobs, self._shown):
                    if isinstance(result, Made):
                        made.append(result)
                    elif result.reason == WAITS:
                        waiting.append(result.job)
                    else:
                        yield Ended(result)
                stopped = settled(self.judge)
            except CallsStopped as why:
                stopped = why
            jobs = waiting
        yield from self._checked(made, stopped)

    def _shown(self, draft: Draft) -> Sheet | Reject:
        judge = self.judge
        if judge is None:
            return self.show(draft)
        before, judge.history, judge.facts = judge.noted, draft.history, draft.facts
        sheet = self.show(draft)
        return sheet if judge.noted == before else Reject(draft.job, "show", WAITS)

    def _checked(self, made: Sequence[Made], stopped: CallsStopped | None) -> Iterator[Ended]:
        """The ends of what was made; what cannot be judged any more has none yet. Models here read it in one order."""
        made = sorted(made, key=lambda one: (one.sheet.draft.job.cell.number, one.sheet.draft.job.ordinal))
        if self.judge is not None:
            self.judge.forget()
        ended, stopped = self._verified(made, stopped)
        ended, stopped = self._recalled(ended, stopped)
        yield from ended
        if stopped is not None:
            raise stopped

    def _verified(self, made: Sequence[Made], stopped: CallsStopped | None) -> tuple[list[Ended], CallsStopped | None]:
        if self.verifier is None:
            return [Ended(one) for one in made], stopped
        found, why = self.verifier.verify_all([written_of(one) for one in made], settle=_may_ask(stopped))
        ended = [Ended(one, verified) for one, verified in zip(made, found, strict=True) if verified is not None]
        return ended, stopped or why

    def _recalled(self, ended: list[Ended], stopped: CallsStopped | None) -> tuple[list[Ended], CallsStopped | None]:
        if self.recall is None:
            return ended, stopped
        good = [one.result for one in ended if one.accepted and isinstance(one.result, Made)]
        told, why = self.recall.ask(good, settle=_may_ask(stopped))
        stay = (one for one in ended if not one.accepted or one.job.id in told)
        return [replace(one, recalled=told.get(one.job.id)) for one in stay], stopped or why


def _may_ask(stopped: CallsStopped | None) -> bool:
    """Behind a cap that was too low for a dearer call there may be money left for judgements."""
    return stopped is None or stopped.reason == "cap"
