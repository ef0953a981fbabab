"""Freed blocks are kept: the second batch of one size costs no page of the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from raglan.memory import give_back, keep_freed
if sys.argv[1] == "kept":
    keep_freed()
def faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(1024, 1024, size).fill_(1.0)
    give_back() if sys.argv[1] == "kept" else None
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(16)  # the longest batch comes first; what is as long may find small blocks in its way, what is shorter fits
print(min(faults(12) for _ in range(6)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator alone is told so")
def test_a_second_batch_faults_no_page() -> None:
    def run(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert run("kept") < 100 < run("usual")
