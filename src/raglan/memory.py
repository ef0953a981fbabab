"""Let glibc keep freed blocks: on a CPU every batch frees and takes the same gigabyte over and over.

Given back to the system after each batch, its pages are faulted in again by the next: half of the time of scoring and reading
was the kernel's (docs/log.md). Batches of many lengths leave holes, so unused pages go back whenever the process holds half of
the machine's memory. Elsewhere than on Linux with glibc, and where a GPU computes, nothing happens.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["give_back", "keep_freed"]

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h


@cache
def keep_freed() -> Any:
    """From now on freed blocks are kept for the next batch. Returns the C library, or None where nothing was done."""
    if sys.platform != "linux" or torch.cuda.is_available():
        return None
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or "MALLOC_MMAP_THRESHOLD_" in os.environ:  # somebody has said otherwise
        return None
    for parameter, value in ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 1 << 28)):
        library.mallopt(parameter, value)
    return library


def give_back() -> None:
    """Unused pages go back to the system if the process holds half of the machine's memory."""
    library = keep_freed()
    if hasattr(library, "malloc_trim") and 2 * _resident_pages() > os.sysconf("SC_PHYS_PAGES"):
        library.malloc_trim(0)


def _resident_pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])
