"""Which passages of a prompt may be cited, and how well an answer cites them: one definition for all that measures it.

    may be cited    gold, and what answers the question too, by the guard of `raglan.perturb`, where answers are strings
    must be cited   gold among the passages that were read
    not known       for a question that names no relevant passage: precision and recall do not apply, and are no 0

An answer without a mark has recall 0 where gold was to be cited, and no precision.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import cached_property

from raglan.perturb import Frequencies, Guard
from raglan.records import Example, Hit, Passage
from raglan.robustness import citation_figures, marks

__all__ = ["COUNTED", "Cited", "counted"]

COUNTED = 200_000  # passages that the guard's frequencies are counted in, evenly spaced


def counted(corpus: Sequence[Passage], answers: Iterable[str] = ()) -> Frequencies:
    """The frequencies of a corpus, or of so much of it as tells."""
    step = max(1, len(corpus) // COUNTED)
    return Frequencies.of((corpus[row] for row in range(0, len(corpus), step)), answers)


class Cited:
    """Figures of citations of answers from one corpus, whose terms are counted only where something is cited.

    Args:
        answers: of all questions, so that frequent ones are known as generic. regex: answers are patterns, and no strings.
    """

    def __init__(self, corpus: Sequence[Passage], answers: Collection[str] = (), *, regex: bool = False):
        self.corpus, self.answers, self.regex = corpus, answers, regex

    @cached_property
    def guard(self) -> Guard:
        return Guard(counted(self.corpus, self.answers))

    def figures(self, text: str, example: Example, shown: Sequence[Hit], *, good: Collection[int] = ()) -> dict[str, float]:
        """Validity, precision and recall of an answer's marks. `good`: passages, from 1, known to answer."""
        own = marks(text)
        if not example.relevant:
            return citation_figures(own, len(shown), good=None, needed=())
        gold = [number for number, hit in enumerate(shown, 1) if hit.passage.id in example.relevant]
        wanted = sorted({mark for mark in own if 1 <= mark <= len(shown)} - {*gold, *good})
        also = [number for number in wanted if self._answers(example, shown[number - 1].passage)]
        return citation_figures(own, len(shown), good={*gold, *good, *also}, needed=gold)

    def _answers(self, example: Example, passage: Passage) -> bool:
        return not self.regex and self.guard.verdict(example, passage) == "also_gold"
