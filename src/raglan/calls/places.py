"""Where in the journal each answered call stands, in sixteen bytes a call.

A dictionary of a million digests takes 200 MB, and a run of synthesis makes several million calls. Here a call is the first 64
bits of its key beside its offset, in two sorted arrays; what is new waits in a dictionary and is sorted in by the tens of
thousands. 64 bits do not tell all keys apart, so whoever looks up compares the whole key with the line that is found.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

__all__ = ["Places"]

LATELY, REST = 1 << 16, 256 - 64


class Places:
    """Offsets by key; a key may have several, of which the last counts."""

    def __init__(self) -> None:
        self._names, self._offsets = np.empty(0, np.uint64), np.empty(0, np.int64)
        self._late: dict[int, int] = {}  # by the whole key

    def put(self, key: str, offset: int) -> None:
        """Raises: ValueError: the key is not made of hex digits."""
        self._late[int(key, 16)] = offset
        if len(self._late) >= max(LATELY, len(self._names) // 8):
            self._merge()

    def of(self, key: str) -> Iterator[int]:
        """Offsets that may be the key's, the last first."""
        whole = int(key, 16)
        if whole in self._late:
            yield self._late[whole]
        name = np.uint64(whole >> REST)
        first, behind = np.searchsorted(self._names, name, "left"), np.searchsorted(self._names, name, "right")
        yield from self._offsets[first:behind][::-1].tolist()

    def _merge(self) -> None:
        names = np.concatenate([self._names, np.fromiter((whole >> REST for whole in self._late), np.uint64, len(self._late))])
        offsets = np.concatenate([self._offsets, np.fromiter(self._late.values(), np.int64, len(self._late))])
        order = np.argsort(names, kind="stable")
        self._names, self._offsets, self._late = names[order], offsets[order], {}
