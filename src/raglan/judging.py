"""The judge's arithmetic: what verdicts come to, whoever gave them.

    pairwise   each pair is judged in both orders; a win only where both agree, else a tie

    | a first | b first | outcome          |        inconsistent: the two orders do not name the same answer
    |---------|---------|------------------|        missing:      either order failed
    | first   | second  | a wins           |
    | second  | first   | b wins           |        win rate = (wins + ties/2) / judged
    | tie     | tie     | tie              |
    | others  |         | tie, inconsistent|

    rubric     1…5, the mean over what was judged

A failed judgement is missing: it is neither 0 nor a tie, it is in no mean, and its share stands beside every figure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from raglan.metrics import Interval, bootstrap

__all__ = ["Better", "Outcome", "Pairs", "Rubric", "family", "length_stratum", "pair_outcome", "pairs", "rubric"]

Better = Literal["first", "second", "tie"]
Outcome = Literal["a", "b", "tie", "missing"]
STRATA = ("shorter", "alike", "longer")
FAMILIES = {  # family → words in its models' names; a word of more than four letters may stand within another, as in CodeLlama
    "claude": ("claude",), "deepseek": ("deepseek",), "gemini": ("gemini", "gemma"), "glm": ("glm", "chatglm"),
    "gpt": ("gpt", "chatgpt", "davinci"), "llama": ("llama",),
    "mistral": ("mistral", "mixtral", "ministral", "codestral", "magistral", "pixtral", "devstral"),
    "phi": ("phi",), "qwen": ("qwen", "qwq", "qvq"), "yi": ("yi",),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairwise judgements of n questions: `wins` are a's, `losses` b's. `rate`: a's win rate with its interval."""

    wins: int
    losses: int
    ties: int
    inconsistent: int
    missing: int
    rate: Interval

    @property
    def n(self) -> int:
        return self.wins + self.losses + self.ties + self.missing

    @property
    def inconsistent_share(self) -> float:
        """Of those judged in both orders; NaN of none."""
        judged = self.n - self.missing
        return self.inconsistent / judged if judged else math.nan

    @property
    def missing_share(self) -> float:
        return self.missing / self.n if self.n else math.nan


@dataclass(frozen=True, slots=True)
class Rubric:
    """Scores of n questions: the mean, from 1 to 5, of those that were judged."""

    score: Interval
    missing: int
    n: int

    @property
    def missing_share(self) -> float:
        return self.missing / self.n if self.n else math.nan


def pair_outcome(a_first: Better | None, b_first: Better | None) -> tuple[Outcome, bool]:
    """Who wins, and whether the orders disagree. `a_first`: what was said where a's answer stood first; None: it failed."""
    if a_first is None or b_first is None:
        return "missing", False
    said: tuple[Outcome, Outcome] = (
        {"first": "a", "second": "b", "tie": "tie"}[a_first],  # type: ignore[assignment]
        {"first": "b", "second": "a", "tie": "tie"}[b_first],
    )
    return (said[0], False) if said[0] == said[1] else ("tie", True)


def pairs(verdicts: Sequence[tuple[Better | None, Better | None]], *, seed: int = 0) -> Pairs:
    """What the verdicts of both orders come to; see `pair_outcome`."""
    found = [pair_outcome(*verdict) for verdict in verdicts]
    count = {name: sum(outcome == name for outcome, _ in found) for name in ("a", "b", "tie", "missing")}
    worth = {"a": 1.0, "b": 0.0, "tie": 0.5, "missing": math.nan}
    rate = bootstrap([worth[outcome] for outcome, _ in found], seed=seed)
    return Pairs(count["a"], count["b"], count["tie"], sum(other for _, other in found), count["missing"], rate)


def rubric(scores: Sequence[int | None], *, seed: int = 0) -> Rubric:
    """Mean of the scores that are there, with its interval.

    Raises:
        ValueError: a score that is not from 1 to 5.
    """
    wrong = [score for score in scores if score is not None and not 1 <= score <= 5]
    if wrong:
        raise ValueError(f"a score must be from 1 to 5, not {wrong[0]}")
    values = [math.nan if score is None else float(score) for score in scores]
    return Rubric(bootstrap(values, seed=seed), sum(score is None for score in scores), len(scores))


def length_stratum(a: str, b: str) -> str:
    """Whether a is shorter than b, alike or longer: its characters below 0.8 of b's, above 1.25, or between."""
    ratio = (len(a.strip()) or 1) / (len(b.strip()) or 1)
    return STRATA[(ratio >= 0.8) + (ratio > 1.25)]


def family(model: str) -> str:
    """A model's family by its name, without owner: "org/Qwen2.5-7B" and "QwQ-32B" → "qwen", "Meta-Llama-3-8B" → "llama".

    Of several families that a name tells of (a distilled model's), the first. A name that is not known is cut at its first
    digit or mark; a name that its owner made up tells nothing.
    """
    name = model.rpartition("/")[2].casefold()
    if re.match(r"o\d", name):
        return "gpt"
    words = re.findall(r"[^\W\d_]+", name)
    known = next((own for word in words for own, signs in FAMILIES.items() if any(_is_in(sign, word) for sign in signs)), None)
    head = name[: next((place for place, letter in enumerate(name) if not letter.isalpha()), len(name))]
    return known or head or name


def _is_in(sign: str, word: str) -> bool:
    return sign in word if len(sign) > 4 else sign == word
