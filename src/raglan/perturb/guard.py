"""The false-negative guard: a passage that answers the question is no noise, whoever picked it.

    G0  same id, same text, or a span that overlaps the evidence's                      → same, overlap
    G1  the words of some answer stand side by side in title or text, numerals folded   → G2, G3; otherwise clean
    G2  an answer is generic: yes/no, a number or date, an option letter, or in more than 0.1 % of the passages
    G3  cov(p,q) = Σ idf(t ∈ q∩p) / Σ idf(t ∈ q)  over content terms,  idf(t) = ln(N / df(t))

    G1 and (not generic or cov ≥ .5) → also_gold          G1, generic, cov < .5 → answer_string_only

Answers that are no strings to look for go to a `judge` if there is one, else they are `unchecked`. All figures are ours.

Two things go further than that. Words are compared both as SQuAD does it ("Eiffel-Tower" is one word) and with punctuation as
a gap ("1873–1880" holds 1873), and either finds an answer. And frequency makes an answer generic only if it stands in more than
three passages: of a corpus of 200 a single one is .5 %.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from raglan.perturb.occurrences import Occurrences
from raglan.perturb.slot import Verdict, content_hash
from raglan.perturb.words import WORDS
from raglan.records import Example, Passage
from raglan.text import answer_words, content_terms, fold_numbers, placed_words

__all__ = ["Frequencies", "Guard", "Judge", "closed_label", "held", "numeric", "searchable"]

Judge = Callable[[Example, Passage], bool | None]  # whether the passage answers the question; None: it cannot tell
_LABELS = frozenset(WORDS["labels"])
_MONTHS = [month.lower() for month in WORDS["months"]]
WEEKDAYS = WORDS["weekdays"].split()
_NUMERIC = frozenset([*_MONTHS, *(month[:size] for month in _MONTHS for size in (3, 4)), *WORDS["numbers"].split(), *WEEKDAYS])
_TIMES = rf"(?:(?:公元|西元)前?|前|{'|'.join(WORDS['eras'])})?\d+"  # 公元前221, 民国87
_PARTS = "(?:初|末|中|前|后|後|初期|中期|末期|前期|后期|後期|中叶|中葉)?"
_HAN_TIME = re.compile(rf"{_TIMES}(?:年(?:\d+月(?:\d+[日号號])?)?|年代{_PARTS}|世[纪紀]{_PARTS}|世[纪紀]\d+年代{_PARTS})")
_HAN_DAY = re.compile("(?:星期|礼拜|禮拜|周|週)[一二三四五六日天]")
_DIGITS = re.compile(r"\d+(?:st|nd|rd|th|s)?")


@dataclass(frozen=True)
class Frequencies:
    """In how many of N passages a content term stands, and each answer that was asked for (its words joined by blanks).

    With `occurrences` the passages in which an answer stands are counted there, when it is asked for.
    """

    passages: int
    terms: Mapping[str, int]
    answers: Mapping[str, int] = field(default_factory=dict)
    occurrences: Occurrences | None = None

    @classmethod
    def of(cls, passages: Iterable[Passage], answers: Iterable[str] = ()) -> Frequencies:
        """Counted in one pass; memory grows with the vocabulary and not with the passages."""
        wanted = {_key(answer) for answer in answers} - {""}
        lengths = sorted({key.count(" ") + 1 for key in wanted})
        terms: Counter[str] = Counter()
        found: Counter[str] = Counter()
        count = 0
        for passage in passages:
            count += 1
            text = f"{passage.title}\n{passage.text}"
            terms.update(content_terms(text))
            words = [placed.word for placed in placed_words(text)] if wanted else []
            found.update({run for size in lengths for run in _runs(words, size)} & wanted)
        return cls(count, terms, found)

    def common(self, answer: str, *, share: float, least: int) -> bool:
        """Whether an answer stands in more than a share of the passages, and in more than `least`. Never, if not counted."""
        key = _key(answer)
        if self.occurrences is not None:
            return self.occurrences.more_than(max(least, share * self.occurrences.passages), key.split())
        return self.answers.get(key, 0) > max(least, share * self.passages)

    def idf(self, term: str) -> float:
        """ln(N / df); a term that no passage holds counts as if one did."""
        return math.log(self.passages / max(1, self.terms.get(term, 0))) if self.passages else 0.0

    def coverage(self, query: str, passage: Passage) -> float:
        """cov(p,q) in [0, 1]; 0 where the question has no content term that tells passages apart."""
        asked = content_terms(query)
        whole = sum(self.idf(term) for term in asked)
        there = set(content_terms(f"{passage.title}\n{passage.text}"))
        return sum(self.idf(term) for term in asked if term in there) / whole if whole > 0 else 0.0


@dataclass(frozen=True)
class Guard:
    """Judges noise passages of a corpus whose frequencies it knows.

    Attributes:
        coverage: of the question's terms, from which on a generic answer is believed.
        share: of the passages, above which an answer is generic. `least`: and in more passages than these.
        judge: for answers that are no strings.
    """

    frequencies: Frequencies
    coverage: float = 0.5
    share: float = 0.001
    least: int = 3
    judge: Judge | None = None

    def verdict(self, example: Example, passage: Passage, gold: Sequence[Passage] = ()) -> Verdict:
        """What a passage is to a question whose evidence is `gold`."""
        near = _identity(example, passage, gold)
        if near in ("same", "also_gold"):
            return near
        answers = searchable(example.answers)
        found = [answer for answer in answers if held(passage, [answer])]
        if any(not self.generic(answer) for answer in found):
            return "also_gold"
        if found and self.frequencies.coverage(example.query, passage) >= self.coverage:
            return "also_gold"
        if near == "overlap":
            return near
        if found:
            return "answer_string_only"
        return "clean" if answers else self._judged(example, passage)

    def fit_without_gold(self, example: Example, passage: Passage, gold: Sequence[Passage]) -> bool:
        """Whether a passage may stand where no passage may answer: no answer's words are in it, generic or not.

        A closed label (yes, no, an option's letter) stands everywhere by chance, and only with the question's terms counts.
        """
        verdict = self.verdict(example, passage, gold)
        if verdict == "answer_string_only":
            return not held(passage, [answer for answer in searchable(example.answers) if not closed_label(answer)])
        return verdict in ("clean", "unchecked")

    def generic(self, answer: str) -> bool:
        """G2. An answer whose frequency was not counted is generic only by its form."""
        if closed_label(answer) or numeric(answer):
            return True
        return self.frequencies.common(answer, share=self.share, least=self.least)

    def _judged(self, example: Example, passage: Passage) -> Verdict:
        holds = self.judge(example, passage) if self.judge else None
        return "unchecked" if holds is None else "also_gold" if holds else "clean"


def held(passage: Passage, answers: Sequence[str]) -> bool:
    """G1: whether the words of some answer stand side by side in the passage's title or text."""
    return any(_stands(answer, text) for text in (passage.title, passage.text) for answer in answers)


def searchable(answers: Sequence[str]) -> list[str]:
    """The answers that have words to look for; "A", "The" and "?" have none."""
    return [answer for answer in answers if answer_words(answer)]


def closed_label(answer: str) -> bool:
    """Yes, no and their like, or an option's letter."""
    plain = " ".join(answer_words(answer)).replace(" ", "")
    return plain in _LABELS or re.fullmatch("[a-z]?", plain) is not None


def numeric(answer: str) -> bool:
    """A number, a date or a day of the week: 1873, 12 March 1873, 221 BC, 3,000, twenty-one, 一九九八年, 公元前221年, 周五."""
    said = unicodedata.normalize("NFKC", answer)
    words = [placed.word for placed in placed_words(said)]
    if not words or words == ["may"]:
        return False
    if all(word in _NUMERIC or _DIGITS.fullmatch(word) for word in words):
        return True
    return _HAN_TIME.fullmatch("".join(words)) is not None or _HAN_DAY.fullmatch("".join(words)) is not None


def _stands(answer: str, text: str) -> bool:
    if not text or not answer_words(answer):
        return False
    return any(len(of(answer)) > 2 and of(answer) in of(text) for of in (_squad_line, _gap_line))


@lru_cache(maxsize=512)
def _squad_line(text: str) -> str:
    return f" {' '.join(answer_words(fold_numbers(text)))} "


@lru_cache(maxsize=512)
def _gap_line(text: str) -> str:
    return f" {' '.join(placed.word for placed in placed_words(text))} "


def _key(answer: str) -> str:
    return _gap_line(answer).strip()


def _runs(words: Sequence[str], size: int) -> Iterable[str]:
    return (" ".join(words[at : at + size]) for at in range(len(words) - size + 1))


def _identity(example: Example, passage: Passage, gold: Sequence[Passage]) -> Verdict | None:
    """G0, and a passage that is known to be relevant although it is not among the evidence given."""
    mine = content_hash(passage)
    if any(passage.id == other.id or mine == content_hash(other) for other in gold):
        return "same"
    if passage.id in example.relevant:
        return "also_gold"
    return "overlap" if any(_overlap(passage, other) for other in gold) else None


def _overlap(a: Passage, b: Passage) -> bool:
    return bool(a.document) and a.document == b.document and a.start < b.end and b.start < a.end
