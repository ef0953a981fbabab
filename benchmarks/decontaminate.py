"""Time and memory of holding a million training questions against 200,000 evaluation questions, by the checks D1 to D3.

    make bench-decontaminate        (some minutes of one core; `-n`, `-m` for fewer questions)

Questions of 6 to 20 words over 50,000 words of unequal frequency (a word's chance falls as 1/rank); one answer in twenty is yes
or no, the others are two such words. Each hundredth training question is made from an evaluation question: by turns in capitals
(D1), with a word behind it (D2), or with its words in another order and the same answer (D3). Printed are the seconds of the
process, its peak memory with everything that Python holds, and how many of the planted ones were found, which must be all.
Wanted are 300 s of CPU on one core and 500 MB; each verdict is a line, and the exit status is 1 after any FAIL.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Iterator

import numpy as np

from raglan.decontaminate import CHECKS, EvaluationQuestions, Leakage, decontaminate
from raglan.records import Example

WORDS, EVERY = 50_000, 100
SECONDS, MB = 300, 500


def main() -> None:
    said = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    said.add_argument("-n", type=int, default=1_000_000, help="training questions")
    said.add_argument("-m", type=int, default=200_000, help="evaluation questions")
    asked = said.parse_args()
    before = peak()
    held = list(questions(asked.m, "held", seed=1))
    began = time.process_time()
    for _ in training(asked.n, held):
        pass
    made = time.process_time() - began
    began, clock = time.process_time(), time.perf_counter()
    found = decontaminate(training(asked.n, held), [EvaluationQuestions("held", held)])
    seconds, clock = time.process_time() - began - made, time.perf_counter() - clock
    told = peak()
    print(f"{asked.n:,} against {asked.m:,} questions; {before:.0f} MB before, CPU without the {made:.0f} s of making them")
    print("; ".join(f"{check}: {count:,}" for check, count in found.counts()["held"].items()))
    good = [
        verdict("time", f"{seconds:.1f} s of CPU, all in all {clock:.0f} s", f"at most {SECONDS}", good=seconds <= SECONDS),
        verdict("memory", f"{told:.0f} MB", f"at most {MB}", good=told <= MB),
        planted(asked.n, found),
    ]
    sys.exit(not all(good))


def verdict(what: str, told: str, wanted: str, *, good: bool) -> bool:
    print(f"{what}: {told} ({wanted}: {'OK' if good else 'FAIL'})")
    return good


def peak() -> float:
    """MB, the most that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def questions(count: int, name: str, *, seed: int) -> Iterator[Example]:
    """The same ones each time."""
    random = np.random.default_rng(seed)
    chance = 1 / np.arange(1, WORDS + 1)
    total = np.cumsum(chance / chance.sum())
    for place in range(count):
        if place % 1000 == 0:
            drawn = np.searchsorted(total, random.random((1000, 22)))
            lengths, kinds = random.integers(6, 21, 1000), random.random(1000)
        words = [f"w{number}" for number in drawn[place % 1000]]
        closed = kinds[place % 1000] < 0.05
        answer = ("yes", "no")[place % 2] if closed else " ".join(words[20:])
        yield Example(f"{name}{place}", " ".join(words[: lengths[place % 1000]]), (answer,))


def training(count: int, held: list[Example]) -> Iterator[Example]:
    for place, example in enumerate(questions(count, "t", seed=2)):
        yield taken(place, held) if place % EVERY == 0 else example


def taken(place: int, held: list[Example]) -> Example:
    """A training question made from an evaluation question, as one of the checks finds it."""
    turn = place // EVERY
    source = held[turn % len(held)]
    words = source.query.split()
    spelt = (source.query.upper(), f"{source.query} zusatz", " ".join(reversed(words)))[turn % 3]
    return Example(f"t{place}", spelt, source.answers if turn % 3 == 2 else ("another",))


def planted(count: int, found: Leakage) -> bool:
    """Whether each one that was made from an evaluation question is among the finds of its check."""
    names: dict[str, set[str]] = {check: {one.train for one in found.found if one.check == check} for check in CHECKS}
    missed = [place for place in range(0, count, EVERY) if f"t{place}" not in names[CHECKS[place // EVERY % 3]]]
    there = len(range(0, count, EVERY))
    return verdict("planted", f"{there - len(missed):,} of {there:,} found", "all", good=not missed)


if __name__ == "__main__":
    main()
