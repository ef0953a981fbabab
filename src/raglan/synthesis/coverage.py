"""What became of a plan: per factor value planned, attempted, kept and missing, and how varied the outcome is.

    kept      the lowest accepted ordinal of each cell, not the first to arrive; other accepted ones are surplus
    deficit   planned − kept of a value. A cell that failed stays a deficit: no other cell is made instead of it
    noise     of each kind the slots planned, shown in kept examples, and shown but found to answer (relabelled): a kind that
              had nothing left gave its slot to another, and the budget leaves passages out
    entropy   −Σ p ln p / ln(number of topics planned), p the kept share of a topic
    cosine    mean over pairs of queries of their word-count vectors' cosine: (|Σu|² − n) / (n(n−1)), u of length 1

A cell gets its first attempt and at most `ROUNDS` more, each a new ordinal of the same cell. Of a factor that nobody heeded
nothing is claimed; of one that is heeded from scratch and not over a corpus, only cells from scratch are counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raglan import text
from raglan.errors import RecipeError
from raglan.perturb.slot import KINDS
from raglan.records import Example
from raglan.synthesis.plan import CONFLICT, DEALT, SCRATCH, Cell, Plan

__all__ = ["ROUNDS", "Attempt", "complete", "coverage", "kept", "refills", "shown_noise"]

ROUNDS = 2
TOLD = tuple(name for name in (*DEALT, "verdict") if name != "topic")


@dataclass(frozen=True, slots=True, order=True)
class Attempt:
    """One try at a cell: accepted, or rejected for a reason."""

    cell: int
    ordinal: int
    reason: str | None = None
    query: str = ""


def kept(plan: Plan, attempts: Iterable[Attempt]) -> tuple[list[Attempt], list[Attempt]]:
    """The attempts that stay, at most one a cell, and the accepted ones that are too many; in the order of cells.

    Raises:
        RecipeError: an attempt at a cell that the plan does not have, or the same ordinal twice.
    """
    tried = _checked(plan, attempts)
    accepted = sorted((attempt for attempt in tried if attempt.reason is None), key=lambda a: (a.cell, a.ordinal))
    first: dict[int, Attempt] = {}
    for attempt in accepted:
        first.setdefault(attempt.cell, attempt)
    return list(first.values()), [attempt for attempt in accepted if first[attempt.cell] is not attempt]


def refills(plan: Plan, attempts: Iterable[Attempt]) -> Iterator[tuple[Cell, int]]:
    """Cells to be tried again, each with its next ordinal: those without an accepted attempt that have rounds left."""
    tried = _checked(plan, attempts)
    done = {attempt.cell for attempt in tried if attempt.reason is None}
    last = Counter(attempt.cell for attempt in tried)
    for cell in plan.cells:
        if cell.number not in done and last[cell.number] <= ROUNDS:
            yield cell, last[cell.number]


def complete(told: Mapping[str, Any]) -> bool:
    """Whether a coverage has all examples: then a run exits with 0, else with 3."""
    return told["kept"] == told["requested"]


def coverage(
    plan: Plan, attempts: Iterable[Attempt], *, shown: Mapping[str, tuple[int, int]] | None = None,
    ignores: Collection[str] = (), ignores_in_corpus: Collection[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """The content of coverage.json.

    Args:
        shown: what `shown_noise` counted in the kept examples; without it noise is told as planned.
        ignores: factors that the teacher does not heed; `ignores_in_corpus`: nor in cells that have passages from a corpus.
    """
    tried = list(attempts)
    stayed, surplus = kept(plan, tried)
    held = [plan.cells[attempt.cell] for attempt in stayed]
    worked = [plan.cells[number] for number in sorted({attempt.cell for attempt in tried})]
    reasons = Counter(attempt.reason for attempt in tried if attempt.reason is not None)
    heeding = _Heeding(plan, ignores, ignores_in_corpus)
    names = [name for name in (*TOLD, "topic") if name not in heeding.ignored]
    return {
        "requested": len(plan.cells), "kept": len(stayed), "deficit": len(plan.cells) - len(stayed),
        "attempts": len(tried), "surplus": len(surplus),
        "factors": {name: _by_value(plan, name, *(heeding.of(cells, name) for cells in (plan.cells, worked, held)))
                    for name in names},
        "noise": _noise(plan, shown),
        "pairs": {name: _pairs(name, allowed, heeding.of(held, *name.split(" × "))) for name, allowed in plan.allowed.items()
                  if not heeding.ignored & set(name.split(" × "))},
        "topic_entropy": None if "topic" in heeding.ignored else _entropy(
            [cell.topic for cell in heeding.of(held, "topic")], len({cell.topic for cell in heeding.of(plan.cells, "topic")})
        ),
        **_variety([attempt.query for attempt in stayed if attempt.query]),
        "funnel": {"attempts": len(tried), **dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))},
        "ignored": [name for name in dict.fromkeys((*ignores, *ignores_in_corpus)) if name in heeding.ignored],
        "ignored_in_corpus": [name for name in ignores_in_corpus if name in heeding.in_corpus],
    }  # fmt: skip


def shown_noise(examples: Iterable[Example]) -> dict[str, tuple[int, int]]:
    """Kind → (passages that stand as noise of this kind, passages of it that turned out to answer) in these examples.

    The false twin that a conflict was given stands for evidence and is none of them.
    """
    noise: Counter[str] = Counter()
    answers: Counter[str] = Counter()
    for example in examples:
        synth = example.metadata["synth"]
        factors, slots = synth["factors"], synth["passages"]
        for slot in slots:
            kind = KINDS.get(slot["kind"])
            if kind is not None:
                (answers if kind.guarded and slot["role"] != "noise" else noise)[kind.name] += 1
        if factors["relation"] == CONFLICT:
            noise["counterfactual"] -= max(0, factors["evidence"] - sum(slot["role"] == "gold" for slot in slots))
    return {kind: (noise[kind], answers[kind]) for kind in KINDS}


class _Heeding:
    """Which cells heed a factor."""

    def __init__(self, plan: Plan, ignores: Collection[str], in_corpus: Collection[str]):
        scratch = any(cell.source == SCRATCH for cell in plan.cells)
        corpus = any(cell.source != SCRATCH for cell in plan.cells)
        self.ignored = {*ignores, *(in_corpus if not scratch else ())}
        self.in_corpus = {name for name in in_corpus if name not in self.ignored} if corpus else set()

    def of(self, cells: Iterable[Cell], *names: str) -> list[Cell]:
        """Those that heed all of these factors."""
        some = self.in_corpus & set(names)
        return [cell for cell in cells if not some or cell.source == SCRATCH]


def _checked(plan: Plan, attempts: Iterable[Attempt]) -> list[Attempt]:
    tried, seen = list(attempts), set()
    for attempt in tried:
        if not 0 <= attempt.cell < len(plan.cells):
            raise RecipeError(f"there is no cell {attempt.cell}", hint=f"the plan has cells 0 to {len(plan.cells) - 1}")
        if (attempt.cell, attempt.ordinal) in seen:
            raise RecipeError(f"cell {attempt.cell} has two attempts {attempt.ordinal}", hint="each has its own")
        seen.add((attempt.cell, attempt.ordinal))
    return tried


def _by_value(plan: Plan, name: str, cells: list[Cell], worked: list[Cell], held: list[Cell]) -> dict[str, dict[str, int]]:
    planned, tried, stayed = (Counter(str(getattr(cell, name)) for cell in some) for some in (cells, worked, held))
    counts = {value: planned[value] for value in plan.margins[name] if planned[value]}
    return {
        value: {"planned": count, "attempted": tried[value], "kept": stayed[value], "deficit": count - stayed[value]}
        for value, count in counts.items()
    }


def _noise(plan: Plan, shown: Mapping[str, tuple[int, int]] | None) -> dict[str, dict[str, int]]:
    """Of each kind, in slots: a deficit below 0 is of a kind that took over from others."""
    planned = plan.margins["noise"]
    if shown is None:
        return {kind: {"planned": count} for kind, count in planned.items()}
    found = {kind: shown.get(kind, (0, 0)) for kind in planned}
    return {
        kind: {"planned": count, "kept": found[kind][0], "relabelled": found[kind][1], "deficit": count - found[kind][0]}
        for kind, count in planned.items()
    }


def _pairs(name: str, allowed: Iterable[tuple[str, str]], held: list[Cell]) -> dict[str, Any]:
    """How many of the pairs that may meet stand in some example."""
    first, second = name.split(" × ")
    there, wanted = {(str(getattr(cell, first)), str(getattr(cell, second))) for cell in held}, set(allowed)
    covered = len(there & wanted)
    return {"allowed": len(wanted), "covered": covered, "share": covered / len(wanted) if wanted else None}


def _entropy(topics: list[str], planned: int) -> float | None:
    if not topics or planned < 2:
        return None
    shares = [count / len(topics) for count in Counter(topics).values()]
    return -sum(share * math.log(share) for share in shares) / math.log(planned)


def _variety(queries: list[str]) -> dict[str, float | None]:
    """Different words among all words, and how alike two queries are on average."""
    counted = [words for query in queries if (words := Counter(text.words(query)))]
    total: Counter[str] = Counter()
    for words in counted:
        total.update(words)
    n, summed = len(counted), Counter[str]()
    for words in counted:
        length = math.sqrt(sum(count * count for count in words.values()))
        for word, count in words.items():
            summed[word] += count / length  # type: ignore[assignment]
    square = sum(weight * weight for weight in summed.values())
    return {
        "type_token_ratio": len(total) / total.total() if total else None,
        "mean_cosine": (square - n) / (n * (n - 1)) if n > 1 else None,
    }
