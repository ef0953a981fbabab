"""The teacher without a model: what is known of a row decides, and where nothing is known, words in common.

    cover(a, z) = Σ_{t ∈ a ∩ z} w_t / Σ_{t ∈ a} w_t        w_t = log(1 + N / (1 + n_t)),  n_t passages of N that hold term t

A question's answers and relevant passages say what is relevant, supported and useful; so do the origins of rows that were
made here (`told` from a passage, `closed` tasks, `unanswerable` questions). Rows of other people's data have neither, and
are judged by `cover` alone. That is good enough to train a small critic on, and is no verdict on facts: a negation is
covered by the sentence it negates. Ours; the paper has no offline teacher.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property

from raglan.artifact import fingerprint
from raglan.corpus import Corpus
from raglan.critique.judgements import Judgement, Verdict
from raglan.critique.teacher import Labelled, Teacher
from raglan.metrics import answer_recall, f1
from raglan.recipe import RulesTeacher
from raglan.records import Passage
from raglan.text import FUNCTION_WORDS, QUESTION_WORDS, answer_words, normalise_answer, terms

__all__ = ["Rules", "Words"]

MOST_PASSAGES = 50_000  # so many are counted, evenly spread: weights of words need no more
STOP = FUNCTION_WORDS | QUESTION_WORDS
FEW = 5  # sentences of so few content words are answers rather than statements


class Words:
    """How much the terms of a corpus weigh, and how much of a text another one covers."""

    def __init__(self, corpus: Corpus):
        step = max(1, len(corpus) // MOST_PASSAGES)
        counts: Counter[str] = Counter()
        rows = range(0, len(corpus), step)
        for row in rows:
            passage = corpus[row]
            counts.update(set(terms(f"{passage.title} {passage.text}")))
        self.counts, self.passages = counts, len(rows)

    def content(self, text: str) -> list[str]:
        """The terms that carry meaning, each once; all of them where no other is left."""
        found = list(dict.fromkeys(terms(text)))
        return [term for term in found if term not in STOP] or found

    def weight(self, term: str) -> float:
        return math.log(1 + self.passages / (1 + self.counts[term]))

    def cover(self, text: str, by: str, *, known: bool = False) -> float:
        """The weighted share of `text`'s terms that stand in `by`, in [0, 1]; 0 of an empty text.

        With `known`, terms that no passage holds do not count: "tell me of" asks no passage for anything.
        """
        own, there = [term for term in self.content(text) if not known or self.counts[term]], set(terms(by))
        whole = sum(self.weight(term) for term in own)
        return sum(self.weight(term) for term in own if term in there) / whole if whole else 0.0

    def rare(self, text: str, common: float) -> list[str]:
        """Terms of the text that the corpus holds, and not everywhere."""
        return [term for term in self.content(text) if 0 < self.counts[term] <= max(3.0, common * self.passages)]


class Rules(Teacher):
    """Labels by known answers and passages, or by words in common. See the module."""

    name = "rules"

    def __init__(self, settings: RulesTeacher, corpus: Corpus):
        self.settings, self.corpus = settings, corpus

    @property
    def fingerprint(self) -> str:
        return fingerprint(["rules", 1, self.settings.model_dump(mode="json"), self.corpus.fingerprint])

    @cached_property
    def words(self) -> Words:
        return Words(self.corpus)

    def label(self, judgements: Sequence[Judgement], *, draw: int = 0) -> Iterator[Labelled]:
        for judgement in judgements:
            yield judgement.id, getattr(self, f"_{judgement.kind}")(judgement)

    def _retrieve(self, asked: Judgement) -> Verdict:
        origin = asked.known.get("origin")
        if origin == "closed":
            return Verdict("no", "all that is needed stands in the instruction")
        if origin in ("answered", "unanswerable", "told"):
            return Verdict("yes", "it asks for facts of the corpus")
        found = self.words.rare(asked.instruction, self.settings.common)
        if found:
            return Verdict("yes", f"the corpus knows {', '.join(found[:3])}")
        return Verdict("no", "no word of it is particular to the corpus")

    def _retrieve_segment(self, asked: Judgement) -> Verdict:
        if asked.known.get("origin") == "closed":
            return Verdict("no", "all that is needed stands in the instruction")
        passage = _text(asked.passage)
        if asked.preceding and self._covers(asked, passage) >= self.settings.fully:
            return Verdict("continue", "the passage at hand holds it")
        if asked.known.get("origin") or self.words.rare(asked.sentence, self.settings.common):
            return Verdict("yes", "it states what the passage at hand does not hold" if asked.preceding else "it states a fact")
        return Verdict("no", "it states nothing particular")

    def _is_rel(self, asked: Judgement) -> Verdict:
        known, passage = asked.known, asked.passage
        assert passage is not None
        if known.get("origin") == "unanswerable":
            return Verdict("irrelevant", "no passage holds an answer")
        if known.get("origin") == "closed":
            return Verdict("irrelevant", "no passage is needed")
        if passage.id in known.get("relevant", ()):
            return Verdict("relevant", "it is known to hold the answer")
        covered = self.words.cover(asked.instruction, _text(passage), known=True)
        if known.get("answers") and not answer_recall([_text(passage)], known["answers"]):
            return Verdict("irrelevant", "it does not hold the answer")
        if covered >= self.settings.relevant:
            return Verdict("relevant", f"it holds {covered:.0%} of the instruction's words, by weight")
        return Verdict("irrelevant", f"it holds only {covered:.0%} of the instruction's words, by weight")

    def _is_sup(self, asked: Judgement) -> Verdict:
        known, passage = asked.known, asked.passage
        assert passage is not None
        if known.get("answers") and len(self.words.content(asked.sentence)) <= FEW:
            return self._answer_supported(asked, passage)
        covered = self._covers(asked, _text(passage))
        label = "fully" if covered >= self.settings.fully else "partially" if covered >= self.settings.partially else "no"
        return Verdict(label, f"the passage holds {covered:.0%} of the sentence's words, by weight")

    def _answer_supported(self, asked: Judgement, passage: Passage) -> Verdict:
        """A bare answer says nothing without its question: the passage must be about both."""
        text, known = _text(passage), asked.known
        about = (
            passage.id in known.get("relevant", ())
            or self.words.cover(asked.instruction, text, known=True) >= self.settings.relevant
        )
        if not about or not any(f1(asked.sentence, [answer]) for answer in known["answers"]):
            return Verdict("no", "the passage does not say so of what was asked")
        if answer_recall([text], [asked.sentence]):
            return Verdict("fully", "the passage gives this answer")
        if self._covers(asked, text) >= self.settings.partially:
            return Verdict("partially", "the passage holds a part of this answer")
        return Verdict("no", "the passage does not hold this answer")

    def _is_use(self, asked: Judgement) -> Verdict:
        known, said = asked.known, asked.output.strip()
        if not said or known.get("origin") == "unanswerable" or said == known.get("abstention"):
            return Verdict("1", "it gives no answer")
        if known.get("answers"):
            return _useful(said, known["answers"])
        if known.get("origin") == "told":
            covered = self.words.cover(said, " ".join(known.get("sentences", ())))
            return Verdict("5" if covered >= self.settings.fully else "3" if covered >= self.settings.partially else "1",
                           f"{covered:.0%} of it is about what was asked")  # fmt: skip
        if normalise_answer(said) == normalise_answer(asked.instruction):
            return Verdict("1", "it repeats the instruction")
        shared = self.words.cover(asked.instruction, said)
        long = len(answer_words(said)) >= 2 * FEW
        return Verdict(
            "5" if long and shared >= 0.5 else "4" if long or shared >= 0.5 else "3", f"length and {shared:.0%} overlap"
        )

    def _covers(self, asked: Judgement, text: str) -> float:
        return self.words.cover(asked.sentence, text)


def _useful(said: str, answers: Sequence[str]) -> Verdict:
    """By the best word-overlap F1 with an answer: all of it, most, some, none."""
    best = f1(said, answers)
    if best == 1:
        return Verdict("5", "it is a known answer")
    if answer_recall([said], answers):
        return Verdict("4", "it holds a known answer among other words")
    return Verdict("3", "it holds a part of a known answer") if best else Verdict("1", "it is not a known answer")


def _text(passage: Passage | None) -> str:
    return "" if passage is None else f"{passage.title} {passage.text}"
