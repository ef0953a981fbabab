"""Questions that people asked, as if a teacher had written them: nothing is made up, and the evidence is that of all examples.

A generator tuned on such questions (KIQA) and one tuned on synthetic examples can be compared only if both saw the same
retrievers, noise, positions and prompts. So a question takes a cell: its answer is the target, its relevant passages are gold;
in R5 they are not shown, and the target says what is missing, or, where that is the policy, what people know.

The question of a cell is settled by the seed: a shuffled list is dealt in its order, and an attempt that failed takes the next
question that no cell has had.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raglan.artifact import MANIFEST, file_fingerprint, fingerprint, read_manifest, write_json, write_manifest
from raglan.corpus import Corpus
from raglan.data import load_examples
from raglan.documents import write_examples
from raglan.errors import CheckpointError, CorpusError, RecipeError
from raglan.knowledge import KnowledgeBase
from raglan.progress import track
from raglan.recipe import Recipe
from raglan.records import Example, Passage
from raglan.synthesis.coverage import Attempt, complete, coverage, kept, refills
from raglan.synthesis.evidence import Assembler, instructions, language_of
from raglan.synthesis.factors import load_factors
from raglan.synthesis.files import write_plan
from raglan.synthesis.plan import ABSENT, Plan, factors_of, make_plan
from raglan.synthesis.record import example_of
from raglan.synthesis.writing import Draft, Job, Made, Reject, Show

__all__ = ["KIND", "Questions", "open_questions", "write_questions"]

KIND = "synthetic dataset"
ASKED = {  # what a question that people asked can be; it has no other task, format or relation
    "task": ("factoid",), "answer_format": ("span", "short_sentence", "number_unit"),
    "query_format": ("wh_question", "keywords"),
    "relation": ("R1", "R3", ABSENT), "absent_policy": ("abstain", "own_knowledge"), "source": ("knowledge",),
}  # fmt: skip


class Questions:
    """A teacher that writes nothing. `n`: how many cells the plan has; questions beyond them are for second attempts."""

    name = "people"
    ignores = ("topic", "genre", "length", "clarity", "difficulty", "tailness", "persona", "query_format", "answer_format")

    def __init__(self, examples: Sequence[Example], corpus: Corpus, *, n: int, seed: int):
        self.corpus, self.n = corpus, n
        self.examples = [example for example in examples if example.answers and example.relevant]
        if not self.examples:
            raise CorpusError("no question has both an answer and a relevant passage", hint="`answers` and `relevant`")
        random.Random(f"{seed}:questions").shuffle(self.examples)

    @property
    def evidence(self) -> list[Passage]:
        """Gold of all questions, each passage once."""
        return list({passage.id: passage for example in self.examples for passage in self._gold(example)}.values())

    @property
    def answers(self) -> list[str]:
        return list(dict.fromkeys(answer for example in self.examples for answer in example.answers))

    def cannot(self) -> Mapping[str, tuple[str, ...]]:
        """All values but those that a question of people can have."""
        factors = load_factors()
        return {
            name: tuple(value for value in factors[name].names if value not in own)
            for name, own in ASKED.items()
            if name != "source"
        }

    def write(self, jobs: Iterable[Job], show: Show) -> Iterator[Made | Reject]:
        """Each job's question with its answer."""
        for job in jobs:
            place = job.cell.number + job.ordinal * self.n
            if place >= len(self.examples):
                yield Reject(job, "draft", "no_question_left", f"{len(self.examples)} questions")
                continue
            draft = self._draft(job, self.examples[place])
            sheet = show(draft)
            yield sheet if isinstance(sheet, Reject) else Made(sheet, _target(draft))

    def _draft(self, job: Job, example: Example) -> Draft:
        gold, seen = tuple(self._gold(example)), {"question": example.id}
        return Draft(job, example.query, example.answers, gold, example.history, seen=seen)

    def _gold(self, example: Example) -> list[Passage]:
        return [self.corpus[row] for identity in example.relevant if (row := self.corpus.row(identity)) is not None]


def _target(draft: Draft) -> str:
    """The first answer; in R5, where that is the policy, that the passages do not tell, and what."""
    cell = draft.job.cell
    if cell.absent_policy != "abstain":
        return draft.answers[0]
    told, language = instructions(), language_of(draft)
    asked = f" {draft.query.casefold()} " if language == "en" else draft.query
    words = told["missing"][language]
    lacking = next(what for word, what in words.items() if (f" {word} " if language == "en" and word else word) in asked)
    wording = random.Random(draft.job.seed("abstention")).choice(told["abstentions"][language])
    return str(wording).format(missing=lacking)


def open_questions(recipe: Recipe, corpus: Corpus) -> Questions:
    """The questions of `synthesis.questions`.

    Raises:
        RecipeError: the recipe names none, or plans what no such question is. CorpusError: none has answers and gold.
    """
    asked = recipe.synthesis
    if asked is None or asked.questions is None:
        raise RecipeError("the recipe names no synthesis.questions", hint="questions with `answers` and `relevant`, .jsonl")
    factors, _ = factors_of(recipe)
    for name, own in ASKED.items():
        strange = [value.name for value in factors[name].values if value.weight and value.name not in own]
        if strange:
            raise RecipeError(
                f"synthesis.questions are to be {name} {strange[0]!r}, which no question of people is",
                hint=f"set synthesis.weights.{name} to some of {', '.join(own)}",
            )
    examples = load_examples(asked.questions, corpus, split="train")
    return Questions(examples, corpus, n=asked.n, seed=recipe.seed)


def write_questions(recipe: Recipe) -> Path:
    """The examples of `synthesis.questions` in the folder `synthesis.path`; a finished folder is left alone.

        plan/, examples.jsonl, rejects.jsonl, attempts.jsonl, coverage.json, and manifest.json, written last

    Raises:
        RecipeError, CorpusError: as `open_questions`. CheckpointError: the folder holds a dataset of other settings.
    """
    plan = make_plan(recipe)
    asked = recipe.synthesis
    assert asked is not None
    base = KnowledgeBase.open(recipe.knowledge.path)
    teacher = open_questions(recipe, base.corpus)
    settings = asked.model_dump(mode="json", exclude={"path"})
    name = fingerprint([settings, recipe.seed, base.version, file_fingerprint(Path(str(asked.questions)))])
    if (asked.path / MANIFEST).is_file():
        _check_same(asked.path, name)
        return asked.path
    assembler = Assembler.open(recipe, evidence=teacher.evidence, answers=teacher.answers)
    found, rejects, attempts = _written(plan, teacher, assembler)
    stayed, surplus = kept(plan, attempts)
    write_plan(plan, asked.path / "plan")
    examples = [example_of(found[one.cell, one.ordinal], teacher=teacher.name, corpus=base.corpus) for one in stayed]
    write_examples(asked.path / "examples.jsonl", examples)
    _write_lines(asked.path / "rejects.jsonl", (
        {"cell": one.job.cell.number, "ordinal": one.job.ordinal, "step": one.step, "reason": one.reason, "detail": one.detail}
        for one in rejects
    ))  # fmt: skip
    _write_lines(asked.path / "attempts.jsonl", map(asdict, attempts))
    told = coverage(plan, attempts)
    write_json(asked.path / "coverage.json", told)
    write_manifest(asked.path, KIND, {
        "requested": told["requested"], "kept": told["kept"], "complete": complete(told), "surplus": len(surplus),
        "teacher": teacher.name, "seed": recipe.seed, "fingerprint": name, "ignored": list(teacher.ignores),
        "funnel": told["funnel"], "sources": {Path(str(asked.questions)).name.partition(".")[0]: str(asked.questions)},
    })  # fmt: skip
    return asked.path


def _check_same(folder: Path, name: str) -> None:
    there = read_manifest(folder, KIND)["fingerprint"]
    if there != name:
        raise CheckpointError(
            f"{folder} holds the dataset {there} of other settings; the recipe now gives {name}",
            hint="give synthesis.path another folder, or remove this one",
        )


def _written(
    plan: Plan, teacher: Questions, assembler: Assembler
) -> tuple[dict[tuple[int, int], Made], list[Reject], list[Attempt]]:
    """What became of every job, refills included."""
    found: dict[tuple[int, int], Made] = {}
    rejects: list[Reject] = []
    attempts: list[Attempt] = []
    jobs = [Job(cell) for cell in plan.cells]
    while jobs:
        for job, result in zip(jobs, teacher.write(track(jobs, "showing"), assembler.show), strict=True):
            place = (job.cell.number, job.ordinal)
            if isinstance(result, Reject):
                rejects.append(result)
                attempts.append(Attempt(*place, f"{result.step}: {result.reason}"))
            else:
                found[place] = result
                attempts.append(Attempt(*place, query=result.sheet.draft.query))
        jobs = [Job(cell, ordinal) for cell, ordinal in refills(plan, attempts)]
    return found, rejects, attempts


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
