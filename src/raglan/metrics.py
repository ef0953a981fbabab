"""Figures: exact match, F1, ranking measures, and intervals that say how much to believe them.

Answers: EM and F1 are SQuAD's, best over the gold answers, but F1 is EM where the answer is a closed label (yes, no, 是, 否);
accuracy compares classes as they are spelt; ROUGE-L is `rouge-score`'s, also best over the answers. Dialogue: Knowledge-F1 is
that F1 against the knowledge an answer should tell, Rare-F1 counts a corpus' rare words only (Shuster et al. 2021, arXiv
2104.07567, §4). Rankings: recall@k, nDCG@k (gain = grade, discount log2, as in trec_eval), MRR@k. Intervals: percentile
bootstrap over questions or groups of them, paired for differences, 10,000 resamples with a seed; Wilson's for a share of
yes-or-no outcomes, which also holds where nearly all or nearly none are yes.
Generated questions: Q-BLEU-1 (Nema & Khapra 2018, EMNLP), see `q_bleu1`.

Figures of a whole corpus of answers, which are no mean over questions:

    BLEU-1      = min(1, exp(1 − r/c)) · m/c      m clipped matches, c words written, r those of the answers nearest in length
    distinct n  = different n-grams / n-grams

Their intervals are the jackknife's, ±1.96 · √((n−1)/n Σ_i (θ_−i − θ̄)²): drawing questions twice would repeat n-grams.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import numpy as np

from raglan.errors import require
from raglan.text import FUNCTION_WORDS, QUESTION_WORDS, answer_words, cased_words, pattern, words

__all__ = [
    "Interval",
    "RareWords",
    "Whole",
    "accuracy",
    "answer_recall",
    "answerability",
    "bleu1",
    "bleu1_counts",
    "bootstrap",
    "bootstraps",
    "distinct",
    "exact_match",
    "f1",
    "found_answers",
    "interval",
    "jackknife",
    "mrr",
    "ndcg",
    "paired_bootstrap",
    "paired_jackknife",
    "perplexity",
    "q_bleu1",
    "rare_f1",
    "recall",
    "regex_match",
    "regex_recall",
    "resampled",
    "rouge_l",
    "substring",
    "wilson",
]

RESAMPLES = 10_000
CLOSED = frozenset(("yes", "no", "是", "否"))  # labels: "not yes" is not half of it
NORMAL = NormalDist().inv_cdf(0.975)  # 1.96
Q_WEIGHTS = {"entities": 0.41, "content": 0.36, "asked": 0.20, "function": 0.03}  # learned on SQuAD
Q_DELTA = 0.66


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the normalised prediction equals a normalised gold answer. No gold answer: 1.0 for an empty prediction."""
    words = answer_words(prediction)
    return float(any(words == answer_words(answer) for answer in answers or ("",)))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Word-overlap F1 with the best gold answer, in [0, 1]; with a closed label (yes, no, 是, 否) it is EM."""
    return max(_f1(answer_words(prediction), answer_words(answer)) for answer in answers or ("",))


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction is one of the classes, but for case and white space around it. "A" and "the" are classes too."""
    return float(prediction.strip().casefold() in {answer.strip().casefold() for answer in answers})


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """Longest common subsequence of words, as F1 with the best gold answer. Raises MissingExtra without `rouge-score`."""
    scorer = require("rouge_score.rouge_scorer", "for evaluate.metrics: rouge_l").RougeScorer(["rougeL"], tokenizer=_Words())
    return max(float(scorer.score(answer, prediction)["rougeL"].fmeasure) for answer in answers or ("",))


class _Words:
    """What rouge-score wants of a tokenizer; its own knows nothing but a to z."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def bleu1_counts(prediction: str, answers: Sequence[str]) -> tuple[int, int, int]:
    """Clipped matches, words written, words of the answer nearest in length. Raises MissingExtra without `sacrebleu`."""
    bleu = require("sacrebleu.metrics.bleu", "for evaluate.metrics: bleu1, q_bleu1")
    scorer = bleu.BLEU(max_ngram_order=1, tokenize="none", smooth_method="none", force=True, effective_order=True)
    found = scorer.sentence_score(" ".join(words(prediction)), [" ".join(words(answer)) for answer in answers])
    return int(found.counts[0]), int(found.sys_len), int(found.ref_len)


def q_bleu1(prediction: str, answers: Sequence[str]) -> float:
    """Q-BLEU-1 of a generated question (Nema & Khapra 2018, EMNLP), with the weights learned on SQuAD, in [0, 1].

        0.66 · answerability + 0.34 · BLEU-1

    Answerability is that of the best reference; BLEU-1 is the sentence's, from `bleu1_counts` over all of them. The authors'
    public tool (PrekshaNema25/Answerability-Metric) takes one reference. Checked in its source: what makes a kind of word, that
    a kind absent on both sides earns nothing, that a mean over questions is reported. Not in it: the SQuAD weights. Two
    public uses of the tool agree on ours; a third has 0.20 for content, so 0.19 for function words. Not checked: the
    paper's own text, equation and weights, and that Lewis et al. 2020 ran that tool.

    Raises:
        MissingExtra: without `sacrebleu`.
    """
    bleu = float(_bleu1(np.asarray(bleu1_counts(prediction, answers or ("",)))))
    return Q_DELTA * max(answerability(prediction, answer) for answer in answers or ("",)) + (1 - Q_DELTA) * bleu


def answerability(question: str, reference: str) -> float:
    """F1 of the words that make a question answerable, weighted by kind, in [0, 1]; for English.

        P = Σ_i w_i m_i/|question_i|    R = Σ_i w_i m_i/|reference_i|    2PR/(P+R)      m_i clipped matches of kind i

    A kind that either side lacks adds nothing, so a copy scores the weights of the kinds it has: 0.80 without a question
    word. The authors' tool averages the kinds' own F1s instead, each from BLEU-1 both ways, brevity penalty included: that
    is never more, since F1 is concave and the penalty only takes away. Function words are a list of ours.
    """
    mine, theirs = _kinds(question), _kinds(reference)
    weighed = {kind: weight * (mine[kind] & theirs[kind]).total() for kind, weight in Q_WEIGHTS.items()}
    precision = sum(matches / max(1, mine[kind].total()) for kind, matches in weighed.items())
    recalled = sum(matches / max(1, theirs[kind].total()) for kind, matches in weighed.items())
    return 2 * precision * recalled / (precision + recalled) if precision else 0.0


def _kinds(question: str) -> dict[str, Counter[str]]:
    """The lower-case words of each kind; as in the authors' tool a word may be of two: "Is" has a capital and no content."""
    surface = cased_words(question)
    lower = [word.lower() for word in surface]
    asked = _asked(lower)
    capital = [small for word, small in zip(surface, lower, strict=True) if word[0].isupper() and small not in QUESTION_WORDS]
    small = [word for word in surface if not word[0].isupper()]
    return {
        "entities": Counter(capital),
        "content": Counter(word for word in small if word not in FUNCTION_WORDS and word not in asked),
        "asked": Counter(asked),
        "function": Counter(word for word in lower if word in FUNCTION_WORDS),
    }


def _asked(lower: Sequence[str]) -> list[str]:
    """The question words, and what follows "what" and "which": it tells the answer's type."""
    after = [word for before, word in pairwise(lower) if before in ("what", "which")]
    return [word for word in lower if word in QUESTION_WORDS] + after


def _f1(prediction: list[str], answer: list[str]) -> float:
    if not prediction or not answer or (len(answer) == 1 and answer[0] in CLOSED):
        return float(prediction == answer)
    common = (Counter(prediction) & Counter(answer)).total()
    if not common:
        return 0.0
    precision, recalled = common / len(prediction), common / len(answer)
    return 2 * precision * recalled / (precision + recalled)


@dataclass(frozen=True, slots=True)
class RareWords:
    """The words of a reference corpus that occur less than `cutoff` times, as `answer_words` cuts them.

    From the commonest word down the counts are added up; the count at which the sum first exceeds half of all words is the
    cutoff. So the common words make up half of what is said, and a word the corpus lacks is neither.
    """

    counts: Mapping[str, int]
    cutoff: int

    @classmethod
    def of(cls, texts: Iterable[str]) -> RareWords:
        """Counted in the texts that people wrote; no text means no rare word."""
        counts = Counter(word for text in texts for word in answer_words(text))
        said, half = 0, counts.total() / 2
        for _, count in counts.most_common():
            said += count
            if said > half:
                return cls(counts, count)
        return cls(counts, 0)

    def among(self, words: Sequence[str]) -> list[str]:
        return [word for word in words if 0 < self.counts.get(word, 0) < self.cutoff]


def rare_f1(prediction: str, answers: Sequence[str], *, rare: RareWords) -> float:
    """F1 over rare words with the best gold answer that has any; NaN (left out of the mean) where none has."""
    kept = [words for answer in answers if (words := rare.among(answer_words(answer)))]
    return max((_f1(rare.among(answer_words(prediction)), words) for words in kept), default=math.nan)


def perplexity(logprobs: Sequence[float], tokens: Sequence[int]) -> float:
    """exp(−Σ log p / Σ T) over answers, per token of all of them and not a mean of each one's; at most e^700."""
    return math.exp(min(700.0, -sum(logprobs) / max(1, sum(tokens))))


def answer_recall(texts: Sequence[str], answers: Sequence[str]) -> float:
    """1.0 if a gold answer occurs, as whole words, in any of the texts."""
    return float(bool(found_answers(texts, answers)))


def substring(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if a gold answer occurs in the prediction letter by letter, Self-RAG's "match": "no" is in "north"; case counts."""
    return float(any(answer and answer in prediction for answer in answers))


def found_answers(texts: Sequence[str], answers: Sequence[str]) -> list[str]:
    """The answers that occur, as whole words, in any of the texts."""
    padded = [f" {' '.join(answer_words(text))} " for text in texts]
    wanted = {answer: f" {' '.join(own)} " for answer in answers if (own := answer_words(answer))}
    return [answer for answer, form in wanted.items() if any(form in text for text in padded)]


def regex_match(prediction: str, patterns: Sequence[str]) -> float:
    """1.0 if a pattern fits the prediction from its start, as CuratedTrec is measured. Raises CorpusError: no pattern."""
    return float(any(pattern(text).match(prediction.strip()) for text in patterns))


def regex_recall(texts: Sequence[str], patterns: Sequence[str]) -> float:
    """1.0 if a pattern occurs in any of the texts."""
    return float(any(pattern(form).search(text) for form in patterns for text in texts))


def recall(ranking: Sequence[str], relevant: Sequence[str], k: int) -> float:
    """Share of the relevant ids among the first k. With one relevant passage this is "hit at k"."""
    wanted = set(relevant)
    return len(wanted & set(ranking[:k])) / len(wanted) if wanted else math.nan


def mrr(ranking: Sequence[str], relevant: Sequence[str], k: int) -> float:
    """1/rank of the first relevant id among the first k, else 0."""
    wanted = set(relevant)
    if not wanted:
        return math.nan
    return next((1 / rank for rank, found in enumerate(ranking[:k], 1) if found in wanted), 0.0)


def ndcg(ranking: Sequence[str], grades: Mapping[str, float], k: int) -> float:
    """Σ grade/log2(rank+1) over the first k, divided by its best possible value (Järvelin & Kekäläinen 2002)."""
    best = _dcg(sorted((grade for grade in grades.values() if grade > 0), reverse=True)[:k])
    if not best:
        return math.nan
    return _dcg([max(grades.get(found, 0), 0) for found in ranking[:k]]) / best


def _dcg(gains: Sequence[float]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, 1))


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95 % interval over n questions."""

    mean: float
    low: float
    high: float
    n: int

    def overlaps(self, other: Interval) -> bool:
        return self.low <= other.high and other.low <= self.high


def bootstrap(
    values: Sequence[float], *, groups: Sequence[Hashable] | None = None, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Mean and 95 % percentile interval over questions; NaN values (not applicable) are left out.

    Args:
        groups: of each question, what it belongs to (a document, a dialogue): whole groups are drawn then, since questions of
            one group are right or wrong together, and the mean of a resample is over the questions that it holds.

    Raises:
        ValueError: not one group for each value.
    """
    if groups is not None and len(groups) != len(values):
        raise ValueError(f"every value needs a group: {len(values)} values, {len(groups)} groups")
    if groups is not None:
        return bootstraps({"": values}, groups=groups, seed=seed, resamples=resamples)[""]
    kept = np.asarray([value for value in values if not math.isnan(value)], dtype=np.float64)
    if not len(kept):
        return Interval(math.nan, math.nan, math.nan, 0)
    means = _resampled_means(kept, seed, resamples)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(kept.mean()), float(low), float(high), len(kept))


def bootstraps(
    columns: Mapping[str, Sequence[float]], *, groups: Sequence[Hashable], seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Interval]:
    """`bootstrap` of many figures of the same questions at once: the same groups are drawn for all of them.

    The mean of a resample is Σ counts · sums / Σ counts · sizes over groups, where a group's size is how many of its questions
    have the figure; a resample in which none has it tells nothing.
    """
    if not columns:
        return {}
    means, there, drawn = resampled(columns, groups=groups, seed=seed, resamples=resamples)
    return {name: interval(means[name], drawn[name], there[name]) for name in columns}


def interval(mean: float, drawn: np.ndarray, n: int) -> Interval:
    """A figure of n questions with the middle 95 % of what resamples gave, those left out that told nothing."""
    kept = drawn[~np.isnan(drawn)]
    low, high = np.quantile(kept, [0.025, 0.975]) if n else (math.nan, math.nan)
    return Interval(float(mean), float(low), float(high), n)


def resampled(
    columns: Mapping[str, Sequence[float]], *, groups: Sequence[Hashable], seed: int = 0, resamples: int = RESAMPLES
) -> tuple[dict[str, float], dict[str, int], dict[str, np.ndarray]]:
    """What `bootstraps` makes its intervals of: means, numbers of questions, and the means of every resample."""
    number = {name: place for place, name in enumerate(dict.fromkeys(groups))}
    at = np.asarray([number[name] for name in groups], dtype=np.int64)
    table = np.array(list(columns.values()), dtype=np.float64).T  # (n,C)
    there = ~np.isnan(table)
    sums, sizes = np.zeros((len(number), len(columns))), np.zeros((len(number), len(columns)))  # (G,C)
    np.add.at(sums, at, np.where(there, table, 0.0))
    np.add.at(sizes, at, there)
    shapes, shape = np.unique(sizes, axis=1, return_inverse=True)  # most figures are there for the same questions
    with np.errstate(invalid="ignore"):  # 0/0: no such question
        means = sums.sum(0) / sizes.sum(0)
        every = _group_counts(len(number), seed, resamples)
        drawn = np.concatenate([counts @ sums / (counts @ shapes)[:, shape.ravel()] for counts in every])
    at_once = list(enumerate(columns))
    return (
        {name: float(means[place]) for place, name in at_once},
        {name: int(there[:, place].sum()) for place, name in at_once},
        {name: drawn[:, place] for place, name in at_once},
    )


def paired_bootstrap(
    before: Sequence[float], after: Sequence[float], *, groups: Sequence[Hashable] | None = None, seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:  # fmt: skip
    """after − before, question by question: its mean and 95 % interval. Both must list the same questions in order."""
    if len(before) != len(after):
        raise ValueError(f"paired values must be of one length, not {len(before)} and {len(after)}")
    changes = [b - a for a, b in zip(before, after, strict=True)]
    return bootstrap(changes, groups=groups, seed=seed, resamples=resamples)


def wilson(successes: int, n: int) -> Interval:
    """The share of successes among n trials and its 95 % score interval (Wilson 1927, J. Am. Stat. Assoc. 22).

        (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n),    p = successes/n, z = 1.96

    Raises:
        ValueError: more successes than trials, or fewer than none.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must be from 0 to {n}, not {successes}")
    if not n:
        return Interval(math.nan, math.nan, math.nan, 0)
    p, z2 = successes / n, NORMAL**2
    centre = p + z2 / (2 * n)
    spread = NORMAL * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return Interval(p, max(0.0, (centre - spread) / (1 + z2 / n)), min(1.0, (centre + spread) / (1 + z2 / n)), n)


@dataclass(frozen=True, slots=True)
class Whole:
    """A figure of all n questions together, and the n figures without one of them."""

    value: float
    without: np.ndarray


def bleu1(counts: Sequence[Sequence[int]]) -> Whole:
    """Corpus BLEU-1 in [0, 1] from `bleu1_counts` of every question; NaN of none."""
    each = np.asarray(counts, dtype=np.float64).reshape(-1, 3)
    total = each.sum(0)
    return Whole(float(_bleu1(total)) if len(each) else math.nan, _bleu1(total - each))


def _bleu1(counts: np.ndarray) -> np.ndarray:
    matches, written, wanted = np.moveaxis(counts, -1, 0)
    some = np.maximum(written, 1)  # nothing written, nothing matched
    return np.minimum(1, np.exp(1 - wanted / some)) * matches / some


def distinct(texts: Sequence[str], n: int) -> Whole:
    """Different n-grams of words over all n-grams, of all texts together; NaN where no text has n words."""
    grams = [Counter(zip(*(split[i:] for i in range(n)), strict=False)) for split in map(words, texts)]
    everywhere = sum(grams, Counter())
    kinds, count = len(everywhere), everywhere.total()
    own = [sum(everywhere[gram] == times for gram, times in part.items()) for part in grams]
    without = [_share(kinds - only, count - part.total()) for part, only in zip(grams, own, strict=True)]
    return Whole(_share(kinds, count), np.asarray(without))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def jackknife(figure: Whole) -> Interval:
    """A figure of the whole with its 95 % interval, from the figures without one question each."""
    n = len(figure.without)
    spread = figure.without - figure.without.mean() if n else np.zeros(0)
    half = 1.96 * math.sqrt((n - 1) / n * float((spread**2).sum())) if n else 0.0
    return Interval(figure.value, figure.value - half, figure.value + half, n)


def paired_jackknife(before: Whole, after: Whole) -> Interval:
    """after − before, of the same questions in the same order."""
    if len(before.without) != len(after.without):
        raise ValueError(f"paired figures must be of as many questions, not {len(before.without)} and {len(after.without)}")
    return jackknife(Whole(after.value - before.value, after.without - before.without))


def _resampled_means(values: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Means of `resamples` draws with replacement, as counts times values: one matrix product for each thousand."""
    generator = np.random.default_rng(seed)
    n = len(values)
    means = []
    for start in range(0, resamples, 1000):
        counts = generator.multinomial(n, np.full(n, 1 / n), size=min(1000, resamples - start))
        means.append(counts @ values / n)
    return np.concatenate(means)


def _group_counts(n: int, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each of n groups is drawn, (at most 500, n) at a time; n draws counted cost a fifth of a multinomial."""
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, 500):
        rows = min(500, resamples - start)
        drawn = generator.integers(n, size=(rows, n)) + np.arange(rows)[:, None] * n
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)
