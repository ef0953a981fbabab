"""Time and memory of finding duplicates among a million questions.

    make bench-dedupe        (two minutes of one core; `-n` for fewer questions)

Questions of 6 to 20 words over 50,000 words of unequal frequency (a word's chance falls as 1/rank), of which a tenth is another
one with a word changed, and a hundredth another one in other letters. Printed are the seconds of the process, its peak memory
with everything that Python holds, how many stay, and how many planted ones were found: of the equal ones all must be, and of
those with a changed word the ones whose true Jaccard index is 0.8 or more, but for what the bands miss. Wanted are 120 s of CPU
on one core and 1 GB; each verdict is a line, and the exit status is 1 after any FAIL.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Iterator

import numpy as np

from raglan.dedupe import dedupe, needed_memory
from raglan.splits import jaccard

WORDS = 50_000
SECONDS, MB = 120, 1000


def main() -> None:
    said = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    said.add_argument("-n", type=int, default=1_000_000, help="questions")
    count = said.parse_args().n
    began, before = time.process_time(), peak()
    for _ in asked(count):
        pass
    made = time.process_time() - began
    found = dedupe((query, ()) for query in asked(count))
    seconds = time.process_time() - began - 2 * made
    told = peak()
    runs = sum(max(1, len(query.split()) - 2) for query in asked(count))
    print(f"{count:,} questions; {before:.0f} MB before, foreseen {needed_memory(count, runs) / 1e6:.0f} MB more")
    print(f"{len(found.kept):,} stay; {planted(count, found.keeps)}")
    good = [
        verdict("time", f"{seconds:.1f} s of CPU", f"at most {SECONDS}", good=seconds <= SECONDS),
        verdict("memory", f"peak {told:.0f} MB", f"at most {MB}", good=told <= MB),
    ]
    sys.exit(not all(good))


def verdict(what: str, told: str, wanted: str, *, good: bool) -> bool:
    print(f"{what}: {told} ({wanted}: {'OK' if good else 'FAIL'})")
    return good


def peak() -> float:
    """MB, the most that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def asked(count: int) -> Iterator[str]:
    """The same questions each time. Each tenth is the one nine before it with a word changed, each hundredth in capitals."""
    random = np.random.default_rng(7)
    chance = 1 / np.arange(1, WORDS + 1)
    total = np.cumsum(chance / chance.sum())
    lately: list[list[str]] = []
    for place in range(count):
        if place % 1000 == 0:
            drawn = np.searchsorted(total, random.random((1000, 20)))
            lengths = random.integers(6, 21, 1000)
        words = [f"w{number}" for number in drawn[place % 1000, : lengths[place % 1000]]]
        if place % 10 == 9:
            words = list(lately[-9])
            if place % 100 == 99:
                words = [word.upper() for word in words]
            else:
                words[-1] = "changed"
        lately = [*lately[-8:], words]
        yield " ".join(words)


def planted(count: int, keeps: np.ndarray) -> str:
    """Found among planted: equal ones, and those of true Jaccard index 0.8 or more."""
    lately: list[str] = []
    there, found = [0, 0], [0, 0]
    for place, query in enumerate(asked(count)):
        if place % 10 == 9:
            kind = int(place % 100 != 99)
            if jaccard(_runs(lately[-9]), _runs(query.lower())) >= 0.8:
                there[kind] += 1
                found[kind] += int(keeps[place] == keeps[place - 9])
        lately = [*lately[-8:], query]
    return f"planted: equal {found[0]:,} of {there[0]:,}, near {found[1]:,} of {there[1]:,}"


def _runs(text: str) -> frozenset[str]:
    words = text.split()
    return frozenset(" ".join(words[at : at + 3]) for at in range(max(1, len(words) - 2)))


if __name__ == "__main__":
    main()
