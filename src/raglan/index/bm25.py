"""BM25 by `bm25s`, memory-mapped, over raglan's own terms (words; characters and pairs in Chinese and Japanese).

How texts were cut lies beside the index, in `terms.json`, and so in its fingerprint: a question is cut in the same way, and an
index of terms that are cut no longer is refused.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args

import bm25s
import numpy as np

from raglan.artifact import directory_fingerprint
from raglan.errors import IndexMismatch
from raglan.index.base import Index, Queries
from raglan.progress import counting
from raglan.recipe import BM25Index as BM25Settings
from raglan.text import Han, terms, terms_identity

__all__ = ["BM25Index", "build_bm25"]

logging.getLogger("bm25s").setLevel(logging.WARNING)
CUT = "terms.json"


class BM25Index(Index):
    """Scores are Okapi BM25 (Robertson & Zaragoza 2009, Lucene's idf) as the library computes them.

    Raises:
        IndexMismatch: its terms were cut otherwise than terms are cut now.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._han = _cut(folder)
        self._model = bm25s.BM25.load(str(folder), mmap=True, show_progress=False)
        self._size = int(self._model.scores["num_docs"])

    def __len__(self) -> int:
        return self._size

    def search(self, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        for number, text in enumerate(queries.texts):
            found = self.scores(text)
            best = np.argsort(-found, kind="stable")[:k]
            best = best[found[best] > 0]
            scores[number, : len(best)], rows[number, : len(best)] = found[best], best
        return scores, rows

    def scores(self, query: str) -> np.ndarray:
        """The query's score with every passage, (N,)."""
        known = [term for term in terms(query, han=self._han) if term in self._model.vocab_dict]
        if not known:
            return np.zeros(self._size, dtype=np.float32)
        return np.asarray(self._model.get_scores(known))

    def score(self, queries: Sequence[str], rows: np.ndarray) -> np.ndarray:
        """BM25 of these queries with passages (B,K) of theirs, (B,K) float32; 0 for row −1."""
        found = np.zeros(rows.shape, dtype=np.float32)
        for number, text in enumerate(queries):
            real = rows[number] >= 0
            found[number, real] = self.scores(text)[rows[number, real]]
        return found

    @property
    def fingerprint(self) -> str:
        return directory_fingerprint(self.folder)


def build_bm25(texts: Iterable[str], settings: BM25Settings, folder: Path, *, total: int = 0) -> dict[str, float]:
    """Index texts (row = position), of which each term is held once and as a number elsewhere; `total`: how many there are."""
    model = bm25s.BM25(k1=settings.k1, b=settings.b, method="lucene")
    vocabulary: dict[str, int] = {}
    rows = []
    with counting(total, "terms") as seen:
        for text in texts:
            rows.append([vocabulary.setdefault(term, len(vocabulary)) for term in terms(text, han=settings.han) or [""]])
            seen(1)
    model.index((rows, vocabulary), show_progress=False)
    model.save(str(folder), show_progress=False)
    (folder / CUT).write_text(json.dumps({"terms": terms_identity(settings.han)}))
    return {"terms": len(model.vocab_dict)}


def _cut(folder: Path) -> Han:
    """How an index' terms were cut; before that was written down, it was in one way only."""
    file = folder / CUT
    told = json.loads(file.read_text())["terms"] if file.is_file() else "raglan-1-both"
    known: dict[str, Han] = {terms_identity(han): han for han in get_args(Han)}
    if told not in known:
        raise IndexMismatch(
            f"the terms of {folder} were cut as {told!r}; here they are cut as {' or '.join(map(repr, known))}",
            hint="build the knowledge base again: raglan build recipe.yaml",
        )
    return known[told]
