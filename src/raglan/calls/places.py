"""Where in the journal each answered call stands, in sixteen bytes a call.

A dictionary of a million digests takes 200 MB, and a run of synthesis makes several million calls. Here a call is the first 64
bits of its key beside its offset, in two sorted arrays; what is new waits in a dictionary and is sorted in by the tens of
thousands. 64 bits do not tell all keys apart, so whoever looks up compares the whole key with the line that is found. One
thread puts, others may look up.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

__all__ = ["Places"]

LATELY, REST = 1 << 16, 256 - 64


class Places:
    """Offsets by key; a key may have several, of which the last counts."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, np.uint64), np.empty(0, np.int64)  # replaced together: others look up meanwhile
        self._late: dict[int, int] = {}  # by the whole key

    def put(self, key: str, offset: int) -> None:
        """Raises: ValueError: the key is not made of hex digits."""
        self._late[int(key, 16)] = offset
        if len(self._late) >= max(LATELY, len(self._sorted[0]) // 8):
            self._merge()

    def of(self, key: str) -> Iterator[int]:
        """Offsets that may be the key's, the last first."""
        whole = int(key, 16)
        late = self._late  # before the arrays: what has left it is in them by then
        names, offsets = self._sorted
        if (offset := late.get(whole)) is not None:
            yield offset
        name = np.uint64(whole >> REST)
        first, behind = np.searchsorted(names, name, "left"), np.searchsorted(names, name, "right")
        yield from offsets[first:behind][::-1].tolist()

    def _merge(self) -> None:
        late = self._late
        names = np.concatenate([self._sorted[0], np.fromiter((whole >> REST for whole in late), np.uint64, len(late))])
        offsets = np.concatenate([self._sorted[1], np.fromiter(late.values(), np.int64, len(late))])
        order = np.argsort(names, kind="stable")
        self._sorted = names[order], offsets[order]
        self._late = {}
