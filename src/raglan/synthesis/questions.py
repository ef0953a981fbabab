"""Questions that people asked, as if a teacher had written them: nothing is made up, and the evidence is that of all examples.

A generator tuned on such questions (KIQA) and one tuned on synthetic examples can be compared only if both saw the same
retrievers, noise, positions and prompts. So a question takes a cell: its answer is the target, its relevant passages are gold;
in R5 they are not shown, and the target says what is missing, or, where that is the policy, what people know.

The question of a cell is settled by the seed: a shuffled list is dealt in its order, and an attempt that failed takes the next
question that no cell has had.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence

from raglan.corpus import Corpus
from raglan.data import load_examples
from raglan.errors import CorpusError, RecipeError
from raglan.recipe import Recipe
from raglan.records import Example, Passage
from raglan.synthesis.evidence import instructions, language_of
from raglan.synthesis.factors import load_factors
from raglan.synthesis.plan import ABSENT, factors_of
from raglan.synthesis.writing import Draft, Job, Made, Reject, Show

__all__ = ["Questions", "open_questions"]

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
