"""Retrieval collapse: the same passages come whatever is asked, and the generator learns to ignore them.

Lewis et al. 2020 (§ 4.4 and appendix) saw it on story generation. It shows in what the search returns, so watching costs no
forward pass: over windows of queries, the share of queries that hold one same passage, and how many best passages differ.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["CollapseMonitor"]

log = logging.getLogger(__name__)
HINT = "freeze the retriever first (freeze_retriever_steps), lower its rate, raise temperature or k, or shorten the answers"
IGNORED = 0.01  # nats an answer token


class CollapseMonitor:
    """Warns, once, after three windows in a row that have collapsed against the first.

    A window has collapsed where the largest share of its queries that hold one same passage exceeds max(0.2, 4 × the first
    window's), or where its distinct best passages fall below a quarter of the first's. Also after three validations in a row
    in which it cost less than 0.01 nats a token to be given another question's passages: the generator ignores them.
    """

    def __init__(self, window: int = 256):
        self.window = window
        self.warned = False
        self.figures: list[tuple[float, float]] = []  # (largest share, distinct best / queries) of each window
        self._seen: list[np.ndarray] = []
        self._bad, self._ignored = 0, 0

    def see(self, rows: np.ndarray) -> None:
        """Rows (B,K) that a batch of queries found; −1 is absent."""
        self._seen += list(rows)
        if len(self._seen) >= self.window:
            self._close()

    def hear(self, gaps: Mapping[str, float]) -> None:
        """The gaps of a validation."""
        gap = gaps.get("shuffle_gap")
        self._ignored = self._ignored + 1 if gap is not None and gap < IGNORED else 0
        if self._ignored >= 3 and not self.warned:
            self.warned = True
            log.warning(
                "the generator ignores its passages: with those of other questions it loses %.3f nats a token. %s", gap, HINT
            )

    def state(self) -> dict[str, Any]:
        """What a checkpoint must remember, so that a resumed run is measured by the first window of all."""
        seen = [rows.tolist() for rows in self._seen]
        return {"figures": self.figures, "seen": seen, "bad": self._bad, "ignored": self._ignored, "warned": self.warned}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where the run that was broken off stood."""
        self.figures = [(share, distinct) for share, distinct in state["figures"]]
        self._seen = [np.array(rows, dtype=np.int64) for rows in state["seen"]]
        self._bad, self._ignored, self.warned = state["bad"], state["ignored"], state["warned"]

    def _close(self) -> None:
        seen, self._seen = self._seen, []
        holders = Counter(row for rows in seen for row in {*rows.tolist()} - {-1})
        share = max(holders.values(), default=0) / len(seen)
        distinct = len({int(rows[0]) for rows in seen}) / len(seen)
        self.figures.append((share, distinct))
        first_share, first_distinct = self.figures[0]
        collapsed = len(self.figures) > 1 and (share > max(0.2, 4 * first_share) or distinct < first_distinct / 4)
        self._bad = self._bad + 1 if collapsed else 0
        if self._bad >= 3 and not self.warned:
            self.warned = True
            log.warning(
                "retrieval is collapsing: %.0f %% of the last %d questions share one passage (%.0f %% at first), and the best "
                "passages are %.0f %% distinct (%.0f %% at first). %s",
                100 * share, len(seen), 100 * first_share, 100 * distinct, 100 * first_distinct, HINT,
            )  # fmt: skip
