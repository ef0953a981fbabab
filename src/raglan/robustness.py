"""How an answer holds up: abstention, citations, quotes, flips, followed falsehoods; all computed, no judge.

    precision       abstentions that were due / abstentions     recall          due ones / unanswerable questions
    over-abstention abstentions on answerable / answerable      hallucination   answers on unanswerable / unanswerable
    validity        marks in 1…K / marks                        citation recall needed gold cited / needed gold
    flip            correctness differs among orders            disagreement    pairs of orders that differ / pairs

A figure that does not apply (no mark, no quote, nobody abstained) is NaN and left out of its mean. What an abstention is says
`raglan.refusals`.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import combinations

import numpy as np

from raglan.metrics import Whole, answer_recall, found_answers
from raglan.refusals import abstained
from raglan.text import answer_words, normalise_answer

__all__ = [
    "abstention",
    "char_3gram_recall",
    "citation_figures",
    "constant",
    "disagreement",
    "flipped",
    "follow_rates",
    "follows",
    "macro_f1",
    "marks",
    "outside_figures",
    "quote_figures",
    "quotes",
    "str_em",
]

_ONE = r"\^?\d{1,6}\^?(?:\s*[-–—]\s*\d{1,6})?"
_MARK = re.compile(rf"[\[【]({_ONE}(?:\s*[,、;]\s*{_ONE})*)[\]】]")
_RANGE = re.compile(r"(\d+)(?:\^?\s*[-–—]\s*(\d+))?")
_WIDEST = 50  # passages that one range can name; wider ones are years or pages
_QUOTE = re.compile(r'##begin_quote##(.+?)##end_quote##|“([^”]+)”|"([^"\n]+)"|「([^」]+)」|『([^』]+)』', re.DOTALL)


def abstention(declined: Sequence[bool], answerable: Sequence[bool]) -> dict[str, float]:
    """Precision, recall, F1 of abstentions, over-abstention and hallucination, of questions in one order, in [0, 1].

    Raises:
        ValueError: lists of unlike lengths.
    """
    pairs = list(zip(declined, answerable, strict=True))
    due = sum(no and not can for no, can in pairs)
    all_no, can_all = sum(no for no, _ in pairs), sum(can for _, can in pairs)
    over, cannot = all_no - due, len(pairs) - can_all
    precision, recall = _share(due, all_no), _share(due, cannot)
    return {
        "abstention_precision": precision, "abstention_recall": recall,
        "abstention_f1": _share(2 * due, all_no + cannot),
        "over_abstention": _share(over, can_all), "hallucination": _share(cannot - due, cannot),
    }  # fmt: skip


def marks(text: str) -> list[int]:
    """The numbers of an answer's citations in order, repeated ones too: "[1]", "[2, 3]", "[4-6]", "[^7]", "【8】", "［９］".

    A range that falls, or of more than 50 numbers, is its two ends.
    """
    found = _MARK.findall(unicodedata.normalize("NFKC", text))
    return [number for group in found for first, last in _RANGE.findall(group) for number in _numbers(first, last)]


def _numbers(first: str, last: str) -> list[int]:
    start, end = int(first), int(last or first)
    if start <= end < start + _WIDEST and len(first) < 4:
        return list(range(start, end + 1))
    return [start, end] if last else [start]


def citation_figures(
    cited: Sequence[int], shown: int, *, good: Collection[int] | None, needed: Collection[int]
) -> dict[str, float]:
    """Validity, precision and recall of citations, in [0, 1].

    Args:
        cited: numbers of passages, from 1, in order of citation. shown: how many passages there were (K).
        good: passages that may be cited: gold, support, also-gold; None where nobody knows. needed: gold passages that must be.
    """
    return {
        "citation_validity": _share(sum(1 <= mark <= shown for mark in cited), len(cited)),
        "citation_precision": math.nan if good is None else _share(sum(mark in good for mark in cited), len(cited)),
        "citation_recall": _share(len(set(needed) & set(cited)), len(set(needed))),
    }


def outside_figures(text: str, answers: Sequence[str], read: Sequence[str]) -> dict[str, float]:
    """Whether an answer stands in none of the passages read, and whether what makes it right stands in none; 1, 0 or NaN.

    The second is what Self-RAG's authors count (Asai et al. 2023, appendix C), of answers that hold a gold one. The first does
    not apply to an answer without words, or that declines.
    """
    says = answer_words(text) and not abstained(text, answers)
    right = found_answers([text], answers)
    return {
        "outside": 1 - answer_recall(read, [text]) if says else math.nan,
        "right_outside": 1 - answer_recall(read, right) if right else math.nan,
    }


def quotes(text: str) -> list[str]:
    """What an answer puts in quotation marks, “…” "…" 「…」 『…』, or between ##begin_quote## and ##end_quote##."""
    return ["".join(groups).strip() for groups in _QUOTE.findall(text) if "".join(groups).strip()]


def quote_figures(text: str, shown: Sequence[str], gold: Sequence[str] | None) -> dict[str, float]:
    """Share of an answer's quotes that stand verbatim in a shown passage, and in a gold one (None: not known which are);
    blanks and width are folded."""
    quoted, seen, wanted = [_folded(quote) for quote in quotes(text)], [*map(_folded, shown)], [*map(_folded, gold or ())]
    return {
        "quotes_shown": _share(sum(any(quote in text for text in seen) for quote in quoted), len(quoted)),
        "quotes_gold": math.nan if gold is None
        else _share(sum(any(quote in text for text in wanted) for quote in quoted), len(quoted)),
    }


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())


def flipped(correct: Sequence[bool]) -> float:
    """1.0 if an answer is right under some orders of its passages and wrong under others; NaN of fewer than two orders."""
    return float(len(set(correct)) > 1) if len(correct) > 1 else math.nan


def disagreement(correct: Sequence[bool]) -> float:
    """Share of pairs of orders under one of which the answer is right and under the other wrong."""
    pairs = list(combinations(correct, 2))
    return _share(sum(a != b for a, b in pairs), len(pairs))


def follows(prediction: str, false: Sequence[str], answers: Sequence[str]) -> bool:
    """Whether an answer holds a false value and not a true one."""
    return bool(found_answers([prediction], false)) and not found_answers([prediction], answers)


def follow_rates(followed: Sequence[bool], right_without: Sequence[bool]) -> dict[str, float]:
    """Counterfactual-follow rate over all questions, and over those that were right without the false passage."""
    known = [yes for yes, right in zip(followed, right_without, strict=True) if right]
    return {"follow": _share(sum(followed), len(followed)), "follow_of_right": _share(sum(known), len(known))}


def char_3gram_recall(prediction: str, answers: Sequence[str]) -> float:
    """Share of a gold answer's character 3-grams that the prediction holds, clipped, best over answers, in [0, 1].

    Both sides are normalised as for EM. An answer of fewer than three characters is one gram.
    """
    written = normalise_answer(prediction)
    return max((_gram_recall(written, gold) for answer in answers if (gold := normalise_answer(answer))), default=math.nan)


def _gram_recall(written: str, gold: str) -> float:
    size = min(3, len(gold))
    wanted, held = _grams(gold, size), _grams(written, size)
    return (wanted & held).total() / wanted.total()


def _grams(text: str, size: int) -> Counter[str]:
    return Counter(text[i : i + size] for i in range(len(text) - size + 1))


def str_em(prediction: str, groups: Sequence[Sequence[str]]) -> float:
    """STR-EM of ASQA (Stelmakh et al. 2022): share of the short answers, each with its aliases, that the text holds."""
    return _share(sum(bool(found_answers([prediction], aliases)) for aliases in groups), len(groups))


def macro_f1(predictions: Sequence[str], labels: Sequence[str]) -> Whole:
    """Unweighted mean over the classes that occur as labels of each one's F1; a prediction that is no class is only a miss.

    Classes are compared as `accuracy` compares them: as they are spelt, but for case and blanks around them.
    """
    said, true = [_class(text) for text in predictions], [_class(text) for text in labels]
    hits = Counter(a for a, b in zip(said, true, strict=True) if a == b)
    written, wanted = Counter(said), Counter(true)
    value = _macro(hits, written, wanted)
    without = []
    for mine, gold in zip(said, true, strict=True):
        less = (hits - Counter([gold] if mine == gold else []), written - Counter([mine]), wanted - Counter([gold]))
        without.append(_macro(*less))
    return Whole(value, np.asarray(without))


def _class(text: str) -> str:
    return text.strip().casefold()


def _macro(hits: Counter[str], written: Counter[str], wanted: Counter[str]) -> float:
    each = [2 * hits[name] / (written[name] + count) for name, count in wanted.items() if count]
    return sum(each) / len(each) if each else math.nan


def constant(values: Iterable[float]) -> bool:
    """Whether ten questions or more all have one value: more likely a fault of the measurement than a finding."""
    kept = [value for value in values if not math.isnan(value)]
    return len(kept) >= 10 and len(set(kept)) == 1


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
