"""From a plan to a dataset: jobs → teacher → verification → leaks → round trip → duplicates → exact N → splits.

    round 0        one job a cell
    round 1, 2     the cells that have no accepted attempt yet, each with its next ordinal; no quota moves to another cell
    a round        teacher.write(jobs, show), each result verified; then leaks, round trip, duplicates, over all accepted so far
    unreachable    of the examples whose passages no retriever finds again the first by (ordinal, cell) stay, so many as may
    kept           of each cell the lowest accepted ordinal; other accepted ones are surplus

What leaks is no example, and what was a duplicate or out of reach in an earlier round is none any more: none of these costs
another cell its own.

Results may come in any order: nothing below looks at it, so one call at a time, sixty-four, or a run that was killed and
begun again give the same bytes. What was made lies in a file while the run lasts; in memory is where each of it stands.

    <path>/plan/  examples.jsonl  <split>.jsonl  split.json  surplus.jsonl  rejects.jsonl  attempts.jsonl
           coverage.json  leakage.json  cost.json  manifest.json (last)

A run that paid calls had to stop (cap, key, interrupt) writes what is finished, says so in the manifest, and goes on when it is
begun again. A finished dataset is left alone.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raglan.artifact import MANIFEST, alone, fingerprint, read_manifest, write_json, write_manifest
from raglan.corpus import Corpus
from raglan.decontaminate import EvaluationQuestions, Leakage, decontaminate, open_sets, registered, write_leakage
from raglan.dedupe import Embed, dedupe
from raglan.documents import example_row
from raglan.errors import CallsStopped, CheckpointError, RecipeError
from raglan.progress import counting
from raglan.recipe import DecontaminateSettings, Recipe, SynthesisSettings
from raglan.records import Example
from raglan.splits import Split, split_examples, write_split_file
from raglan.synthesis.checked import reject_row
from raglan.synthesis.coverage import ROUNDS, Attempt, complete, coverage, kept, refills, shown_noise
from raglan.synthesis.desk import PIECE, Desk, Ended
from raglan.synthesis.files import write_plan
from raglan.synthesis.made import MadeFile, Place
from raglan.synthesis.plan import Plan, make_plan
from raglan.synthesis.quotas import exact
from raglan.synthesis.recall import ClosedBook
from raglan.synthesis.record import example_of
from raglan.synthesis.reserve import Reserved, others, ties
from raglan.synthesis.writing import Job, Made, Reject, Show, Teacher
from raglan.text import half_character
from raglan.verification import Verifier

__all__ = ["KIND", "Done", "synthesize"]

log = logging.getLogger(__name__)
KIND = "synthetic dataset"
RUNNING = ("money", "path", "calls")  # settings that change no example, and of a server these:
OF_A_SERVER = ("concurrency", "rpm", "tpm", "timeout", "attempts", "max_wait", "api_key_env", "start_seconds")


@dataclass(frozen=True)
class Done:
    """What a run came to. `told`: the manifest. `exit_code`: 0 complete, 3 consistent but short."""

    folder: Path
    told: Mapping[str, Any]

    @property
    def exit_code(self) -> int:
        return 0 if self.told["complete"] and self.told.get("reserved", {}).get("complete", True) else 3


def synthesize(
    recipe: Recipe, teacher: Teacher, show: Show, *, plan: Plan | None = None, verifier: Verifier | None = None,
    recall: ClosedBook | None = None, piece: int = PIECE, corpus: Corpus | None = None, embed: Embed | None = None,
    embed_questions: Embed | None = None,
    corpus_at: Callable[[Path], Corpus] | None = None, cost: Callable[[], Mapping[str, Any]] | None = None,
    ignores: Sequence[str] = (), ignores_in_corpus: Sequence[str] = (), inputs: Mapping[str, Any] | None = None,
    sources: Mapping[str, str] | None = None, reserved: Reserved | None = None,
) -> Done:  # fmt: skip
    """Write, check and keep the examples of `recipe.synthesis`.

    Args:
        plan: default the recipe's, without what the teacher cannot write.
        verifier: default the checks that need no model, as `synthesis.verify` sets them.
        recall: asks what was accepted without its passages.
        piece: examples that a paid judge is asked about together.
        corpus: finds out which gold passages are in the knowledge base.
        embed: n texts → (n,D) vectors of length 1, to compare the meaning of questions among each other;
            `embed_questions` with those of evaluation sets.
        corpus_at: opens the knowledge base of an evaluation set.
        cost: what the run has cost so far; default nothing.
        ignores: factors that the teacher does not heed, so that no coverage of them is claimed; `ignores_in_corpus`: nor in
            cells that have their passages from a corpus.
        inputs: names of what else the dataset follows from, as the knowledge base's version.
        sources: names of what its questions are from: in-domain is what is of one of these.
        reserved: what was made beforehand, and has no document, job or question in common with these examples.

    Raises:
        RecipeError: the recipe has no `synthesis`, or asks for what the teacher cannot write.
        CorpusError: an evaluation set is missing, or none is registered.
        CheckpointError: the folder holds a dataset of other settings.
    """
    if recipe.synthesis is None:
        raise RecipeError("the recipe has no `synthesis`", hint="see docs/concepts/synthesis.md for one")
    settings = recipe.synthesis
    plan = make_plan(recipe, cannot=teacher.cannot()) if plan is None else plan
    verifier = Verifier(may_be_missing=settings.verify.may_be_missing) if verifier is None else verifier
    sets, missing, near = _evaluation_sets(recipe, settings, corpus_at, reserved)
    kept_out = [] if near is None else [_kept_out(sets, missing, near)]
    asked, follows = _content(settings), [recipe.seed, teacher.name, {**(inputs or {})}, *kept_out]
    name = fingerprint([asked, *follows])
    folder = Path(settings.path)
    untried = fingerprint([_untried(asked), *follows])
    with alone(folder / "lock.part", lambda: _finished(folder, name, untried) is not None) as to_do:
        if not to_do:
            _tell_what_was_not_checked(folder, sets)
            return Done(folder, read_manifest(folder, KIND))
        write_plan(plan, folder / "plan")
        with MadeFile(folder / "made.jsonl.part") as rows:
            (folder / MANIFEST).unlink(missing_ok=True)
            apart = reserved.ties if reserved is not None else frozenset()
            desk = Desk(teacher, show, verifier, recall=recall, piece=piece)
            run = _Run(plan, desk, rows, corpus, embed, embed_questions, sets, missing, near, _may_stay(settings), apart)
            stopped = run.write()
            told = run.keep(folder, settings, recipe.seed, ignores=ignores, ignores_in_corpus=ignores_in_corpus)
        write_json(folder / "cost.json", {"teacher": teacher.name, **(cost() if cost is not None else {"calls": 0})})
        content = {
            "requested": told["requested"], "kept": told["kept"],
            "complete": told["kept"] == told["requested"] and not stopped, **told, "stopped": stopped,
            "teacher": teacher.name, "seed": recipe.seed, "fingerprint": name,
            "left_out": dict(plan.left_out), "inputs": dict(inputs or {}),
            **({"sources": dict(sources)} if sources else {}), **({"reserved": dict(reserved.told)} if reserved else {}),
        }  # fmt: skip
        write_manifest(folder, KIND, content, beside=Path(settings.calls or folder / "calls"))
        return Done(folder, content)


def _content(settings: SynthesisSettings) -> dict[str, Any]:
    """The settings that say what is written, without those that only say how fast and for how much."""
    excluded: Any = {**dict.fromkeys(RUNNING, True), "writing": settings.writing.off}
    told = settings.model_dump(mode="json", exclude=excluded)
    verify = told["verify"]
    for owner, name in ((told, "teacher"), (verify["support"], "endpoint"), (verify["closed_book"] or {}, "endpoint")):
        if name in owner:
            owner[name] = {key: value for key, value in (owner[name] or {}).items() if key not in OF_A_SERVER}
    for owner in (verify["support"], verify["closed_book"] or {}):
        owner.pop("price", None)
        owner.pop("give_up", None)
    if told["reserve"] is None:
        del told["reserve"]
    if told["passages"]["gold_absent_from"] == 1:
        del told["passages"]["gold_absent_from"]  # datasets that are older have the same name
    return told if verify["round_trip"] else _untried(told)


def _untried(content: Mapping[str, Any]) -> dict[str, Any]:
    """As settings were before there were round trips."""
    return {**content, "verify": {name: value for name, value in content["verify"].items() if name != "round_trip"}}


def _may_stay(settings: SynthesisSettings) -> int:
    """How many examples may stay whose passages no retriever finds."""
    trip = settings.verify.round_trip
    return settings.n if trip is None else int(exact(trip.kept) * settings.n)


def _kept_out(sets: Sequence[EvaluationQuestions], missing: Sequence[str], near: DecontaminateSettings) -> Mapping[str, Any]:
    """What says which examples leak: how near they may come, and the questions themselves, wherever their files are."""
    return {
        "near": near.model_dump(mode="json", exclude={"sets", "missing"}), "missing": sorted(missing),
        "sets": {one.name: fingerprint([{"answers": [], **example_row(example)} for example in one.examples]) for one in sets},
    }  # fmt: skip


def _finished(folder: Path, name: str, untried: str) -> dict[str, Any] | None:
    """The manifest of a dataset that was not stopped. Raises CheckpointError: of other settings, stopped or not.

    One that was finished before there were round trips has the name `untried`, and is what was asked for then.
    """
    if not (folder / MANIFEST).is_file():
        return None
    there = read_manifest(folder, KIND)
    if there["fingerprint"] != name and ("round_trip" in there or there["fingerprint"] != untried):
        raise CheckpointError(
            f"{folder} holds the dataset {there['fingerprint']} of other settings; the recipe now gives {name}",
            hint="give synthesis.path another folder, or remove this one",
        )
    return None if there["stopped"] else there


def _tell_what_was_not_checked(folder: Path, sets: Sequence[EvaluationQuestions]) -> None:
    """A finished dataset may be older than what resolves the passages of an evaluation set."""
    told = json.loads((folder / "leakage.json").read_text(encoding="utf-8")).get("sets", {})
    for one in sets:
        if one.corpus is not None and "not_run" in told.get(one.name, {}).get("checks", {}).get("D5", {}):
            log.warning(
                "%s was made without comparing passages with those of %s (D5), whose knowledge base is there now: "
                "for that, remove it and make it again", folder, one.name,
            )  # fmt: skip


def _evaluation_sets(
    recipe: Recipe, settings: SynthesisSettings, corpus_at: Callable[[Path], Corpus] | None, reserved: Reserved | None
) -> tuple[list[EvaluationQuestions], tuple[str, ...], DecontaminateSettings | None]:
    """(sets, names of missing ones, how near questions may come); opened first, so that a missing one stops before all else."""
    if settings.decontaminate == "none":
        return [], (), None
    near = registered(recipe) if reserved is None else others(recipe)
    own = [] if reserved is None else [reserved.questions]
    if not near.sets and own:
        return own, (), near
    if not near.sets:
        raise RecipeError(
            "no evaluation set is registered, so nothing can be kept out of the training data",
            hint="decontaminate.sets: {name: {path: questions.jsonl}}, or synthesis.decontaminate: none if that is meant",
        )
    sets, missing = open_sets(near, corpus_at=corpus_at)
    return [*sets, *own], missing, near


@dataclass
class _Run:
    """One run while it lasts."""

    plan: Plan
    desk: Desk
    rows: MadeFile
    corpus: Corpus | None
    embed: Embed | None
    embed_questions: Embed | None
    sets: Sequence[EvaluationQuestions]
    missing: tuple[str, ...]
    near: DecontaminateSettings | None
    may_stay: int  # of those that no retriever finds
    apart: frozenset[tuple[str, str]] = frozenset()  # what the reserved examples rest on

    def __post_init__(self) -> None:
        self.attempts: dict[Place, Attempt] = {}  # as the teacher and the checks left them
        self.settled: dict[Place, Attempt] = {}  # and after duplicates and leaks
        self.late: dict[Place, Reject] = {}  # of these
        self.told: dict[Place, dict[str, Any]] = {}  # of the accepted: by whom, and whether it is known without passages
        self.twins: dict[Place, Reject] = {}  # and of these the duplicates, of all rounds
        self.rights: dict[Place, tuple[str, ...]] = {}  # of the accepted: licences of the passages that they rest on
        self.unreachable: set[Place] = set()  # of the accepted: no retriever finds their passages
        self.lost: dict[Place, Reject] = {}  # of these the ones that are too many, of all rounds
        self.leakage = Leakage()

    def write(self) -> str:
        """All rounds; why the calls stopped, or nothing."""
        jobs = [Job(cell) for cell in self.plan.cells]
        for number in range(ROUNDS + 1):
            stopped = self._round(jobs, f"round {number}")
            self._settle()
            jobs = [Job(cell, ordinal) for cell, ordinal in refills(self.plan, self.settled.values())]
            if stopped or not jobs:
                return stopped
        return ""

    def _round(self, jobs: Sequence[Job], label: str) -> str:
        try:
            with counting(len(jobs), label) as more:
                for ended in self.desk.ends(jobs):
                    self._take(ended)
                    more(1)
        except CallsStopped as fault:
            log.warning("%s", fault)
            return f"{fault.reason}: {fault.message}"
        return ""

    def _take(self, ended: Ended) -> None:
        job, result = ended.job, ended.result
        if isinstance(result, Reject):
            self._refused(result)
            return
        query = result.sheet.draft.query
        if (half := _half_character(result)) is not None:
            self._refused(Reject(job, "verify", "half_character", repr(half), result.target), query)
            return
        if not ended.accepted:
            reason, detail = ended.why()
            self._refused(Reject(job, "verify", reason, detail, result.target), query)
            return
        example = example_of(result, teacher=self.desk.teacher.name, corpus=self.corpus, checked=ended.told())
        shared = sorted(ties(example, self.corpus) & self.apart) if self.apart else []
        if shared:
            self._refused(Reject(job, "split", "reserved", " ".join(shared[0]), result.target), query)
            return
        self._attempted(job, query=query)
        self.told[_place(job)] = ended.told()
        synth = example.metadata["synth"]
        rights = {one["licence"] for one in (*synth["passages"], *synth.get("withheld", ())) if "licence" in one}
        self.rights |= {_place(job): tuple(sorted(rights))} if rights else {}
        self.unreachable |= {_place(job)} if result.sheet.seen.get("unreachable") else set()
        self.rows.add(_place(job), example)

    def _refused(self, reject: Reject, query: str = "") -> None:
        row = {name: _written(value) for name, value in reject_row(reject, query).items()}
        self._attempted(reject.job, reason=f"{reject.step}: {reject.reason}", query=row["query"])
        self.rows.reject(_place(reject.job), row)

    def _attempted(self, job: Job, *, reason: str | None = None, query: str = "") -> None:
        if _place(job) in self.attempts:
            raise RuntimeError(f"teacher {self.desk.teacher.name} gave job {job.id} back twice")
        self.attempts[_place(job)] = Attempt(*_place(job), reason, query)

    def _settle(self) -> None:
        """Leaks, the round trip, then duplicates, of all that passed the checks; by (cell, ordinal) and round alone."""
        self.late = {**self.twins, **self.lost}
        passed = sorted(place for place, attempt in self.attempts.items() if attempt.reason is None)
        if self.near is not None:
            self._leaks(passed)
        self._out_of_reach([place for place in passed if place not in self.late])
        self._duplicates([place for place in passed if place not in self.late])
        out = {p: replace(self.attempts[p], reason=f"{r.step}: {r.reason}") for p, r in self.late.items()}
        self.settled = {**self.attempts, **out}

    def _leaks(self, places: Sequence[Place]) -> None:
        """What comes too near to an evaluation set; of duplicates, too, so that leakage.json tells of all that was found."""
        self.leakage = decontaminate(
            self.rows.read(places), self.sets, settings=self.near, corpus=self.corpus, embed=self.embed_questions,
            missing=self.missing,
        )  # fmt: skip
        told = {one.train: one for one in reversed(self.leakage.found)}
        for row in sorted(self.leakage.rows):
            place = places[row]
            one = told[f"synth-{place[0]}-{place[1]}"]
            self.late[place] = self._out(place, "decontaminate", one.check, f"{one.set}: {one.held_out}")

    def _out_of_reach(self, places: Sequence[Place]) -> None:
        """Of those that no retriever finds so many stay as may, first ordinals first: no round takes from an earlier one."""
        far = sorted((place for place in places if place in self.unreachable), key=lambda place: place[::-1])
        for place in far[self.may_stay :]:
            self.lost[place] = self._out(place, "show", "unreachable", f"{self.may_stay} others stay")
        self.late |= self.lost

    def _duplicates(self, places: Sequence[Place]) -> None:
        """Of those that ask the same the lowest place stays. What goes does not come back, nor stand in another's way."""
        asked = ((example.query, example.history) for example in self.rows.read(places))
        found = dedupe(asked, embed=self.embed)
        for row, how in found.how.items():
            first = places[int(found.keeps[row])]
            self.twins[places[row]] = self._out(places[row], "dedupe", f"{how}_duplicate", f"synth-{first[0]}-{first[1]}")
        self.late |= self.twins

    def _out(self, place: Place, step: str, reason: str, detail: str) -> Reject:
        return Reject(Job(self.plan.cells[place[0]], place[1]), step, reason, detail)

    def keep(
        self, folder: Path, settings: SynthesisSettings, seed: int, *, ignores: Sequence[str], ignores_in_corpus: Sequence[str]
    ) -> dict[str, Any]:
        """Write all but cost and manifest. Returns what the manifest says of it."""
        tried = [self.settled[place] for place in sorted(self.settled)]
        stayed, surplus = ([(attempt.cell, attempt.ordinal) for attempt in some] for some in kept(self.plan, tried))
        noise = shown_noise(self.rows.read(stayed))
        told = coverage(self.plan, tried, shown=noise, ignores=ignores, ignores_in_corpus=ignores_in_corpus)
        split = self._split(stayed, settings.split, seed)
        self._examples(folder, stayed, split)
        _write(folder / "surplus.jsonl", map(example_row, self.rows.read(surplus)))
        _write(folder / "rejects.jsonl", self._rejects())
        _write(folder / "attempts.jsonl", (_attempt_row(attempt) for attempt in tried))
        write_json(folder / "coverage.json", told)
        if self.near is not None:
            write_leakage(folder / "leakage.json", self.leakage)
        else:
            write_json(folder / "leakage.json", {"kind": "leakage", "not_run": "synthesis.decontaminate is none"})
        sizes = Counter(split.places[f"synth-{cell}-{ordinal}"] for cell, ordinal in stayed) if split is not None else {}
        assert complete(told) == (len(stayed) == len(self.plan.cells))
        return {
            "requested": told["requested"], "kept": told["kept"], "attempts": told["attempts"], "surplus": told["surplus"],
            "funnel": told["funnel"], **self._checked(stayed), **self._licences(stayed),
            "round_trip": self._round_trip(settings, stayed),
            "ignored": told["ignored"], "ignored_in_corpus": told["ignored_in_corpus"],
            "splits": {name: sizes[name] for name in settings.split} if split is not None else {},
            "largest_group": None if split is None else round(split.largest, 4),
        }  # fmt: skip

    def _checked(self, stayed: Sequence[Place]) -> dict[str, Any]:
        """Who said that the kept ones are supported, and how many of them need no passage."""
        told = [self.told[place] for place in stayed]
        recalled = [own["closed_book"] for own in told if "closed_book" in own]
        support = dict(sorted(Counter(own["support"] for own in told).items()))
        if self.desk.recall is None:
            return {"support": support}
        known = sum(own["right"] == own["draws"] > 0 == own.get("missing", 0) for own in recalled)
        return {"support": support, "closed_book": {"asked": len(recalled), "known": known}}

    def _licences(self, stayed: Sequence[Place]) -> dict[str, dict[str, int]]:
        """Licence → how many of the kept ones show or withhold a passage under it; nothing where no document names one."""
        found = Counter(name for place in stayed for name in self.rights.get(place, ()))
        return {"licences": dict(sorted(found.items()))} if self.rights else {}

    def _round_trip(self, settings: SynthesisSettings, stayed: Sequence[Place]) -> dict[str, int] | None:
        """Of the kept ones, how many no retriever finds, and how many that might be; None where it was not asked."""
        if settings.verify.round_trip is None:
            return None
        return {"unreachable": len(self.unreachable.intersection(stayed)), "most": self.may_stay}

    def _split(self, stayed: Sequence[Place], shares: Mapping[str, float], seed: int) -> Split | None:
        """By document. Only what ties examples is held, not what they say."""
        if not shares or not stayed:
            return None
        slim = [_slim(example) for example in self.rows.read(stayed)]
        return split_examples(slim, by="document", shares=shares, seed=seed, corpus=self.corpus)

    def _examples(self, folder: Path, stayed: Sequence[Place], split: Split | None) -> None:
        """All kept examples, and those of each split once more, in the order of cells."""
        if split is None:
            _write(folder / "examples.jsonl", map(example_row, self.rows.read(stayed)))
            return
        placed = (
            replace(example, metadata={"split": split.places[example.id], **example.metadata})
            for example in self.rows.read(stayed)
        )
        _write(folder / "examples.jsonl", map(example_row, placed))
        for name in split.shares:
            own = [place for place in stayed if split.places[f"synth-{place[0]}-{place[1]}"] == name]
            some = (replace(e, metadata={"split": name, **e.metadata}) for e in self.rows.read(own))
            _write(folder / f"{name}.jsonl", map(example_row, some))
        write_split_file(folder / "split.json", split)

    def _rejects(self) -> Iterator[dict[str, Any]]:
        """In the order of cells: what teacher and checks refused, and what is a duplicate or leaks."""
        early = {place for place, attempt in self.attempts.items() if attempt.reason is not None}
        for place in sorted(early | set(self.late)):
            if place in self.late:
                yield reject_row(self.late[place], self.attempts[place].query)
            else:
                yield self.rows.rejected(place)


def _place(job: Job) -> Place:
    return job.cell.number, job.ordinal


def _attempt_row(attempt: Attempt) -> dict[str, Any]:
    return {"cell": attempt.cell, "ordinal": attempt.ordinal, "reason": attempt.reason, "query": attempt.query}


def _half_character(made: Made) -> str | None:
    """Half a character that a writer left somewhere: no file in UTF-8 can hold it."""
    draft = made.sheet.draft
    passages = (text for slot in made.sheet.slots for text in (slot.passage.title, slot.passage.text))
    lists = (draft.answers, draft.history, draft.facts, draft.labels, draft.fields, passages)
    told = json.dumps([dict(draft.seen), dict(made.seen)], ensure_ascii=False, default=str)
    return half_character("\n".join((draft.query, draft.about, made.target, told, *(text for some in lists for text in some))))


def _written(value: Any) -> Any:
    """A text as a file in UTF-8 can hold it: half a character as its escape."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _slim(example: Example) -> Example:
    """What ties an example to others."""
    synth = example.metadata["synth"]
    passages = [{key: one[key] for key in ("id", "document", "role")} for one in synth["passages"]]
    held = {"passages": passages, "job": synth.get("job"), "withheld": synth.get("withheld", [])}
    return replace(example, metadata={"synth": held})


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
