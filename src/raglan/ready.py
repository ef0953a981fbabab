"""Vectors that somebody has made already, as DPR's of Wikipedia: read, matched with passages by id, and checked.

They must be those of the passage tower that the recipe names, since queries are compared with them by its query tower; a few
passages are encoded anew to see whether they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from raglan.errors import CorpusError, IndexMismatch
from raglan.index.dense import DenseIndex
from raglan.recipe import DenseIndex as DenseSettings
from raglan.recipe import VectorSettings
from raglan.records import Passage

__all__ = ["ReadyVectors"]

ALIKE = 0.98  # least cosine of a vector with the one made here: float16 and bfloat16 stay above 0.999


class ReadyVectors:
    """(N,D) vectors in .npy files, with the ids of their passages."""

    def __init__(self, settings: VectorSettings, dimension: int):
        self.settings = settings
        files = sorted(settings.path.glob("*.npy")) if settings.path.is_dir() else [settings.path]
        if not files or not all(file.is_file() for file in files):
            raise CorpusError(
                f"{settings.path} is no .npy file and no folder of them",
                hint="knowledge.vectors.path; pickled vectors are never read: save them with numpy.save",
            )
        try:
            self.index = DenseIndex(files, DenseSettings(kind="dense"), settings.path)
            shape = self.index.vectors(np.array([0])).shape
        except (ValueError, OSError) as fault:
            raise CorpusError(
                f"{settings.path} holds no array of numbers: {fault}",
                hint="knowledge.vectors takes (N,D) float arrays saved with numpy.save; pickled ones are never read",
            ) from None
        if shape[-1] != dimension:
            raise IndexMismatch(
                f"vectors in {settings.path} have {shape[-1]} dimensions, the encoder has {dimension}",
                hint="name the passage encoder that made them under knowledge.encoder",
            )

    def of(self, passages: Sequence[Passage]) -> np.ndarray:
        """(n,D) float32. Raises CorpusError: a passage has no vector."""
        rows = [self._row(passage.id) for passage in passages]
        lost = next((p.id for p, row in zip(passages, rows, strict=True) if not 0 <= row < len(self.index)), None)
        if lost is not None:
            raise CorpusError(
                f"passage {lost!r} has no vector among the {len(self.index)} in {self.settings.path}",
                hint="knowledge.vectors.ids names the file of ids; without it they are numbers from knowledge.vectors.first on",
            )
        return np.asarray(self.index.vectors(np.array(rows)), dtype=np.float32)

    def check(self, found: np.ndarray, made: np.ndarray) -> None:
        """Compare vectors with those encoded here, (n,D) both. Raises IndexMismatch."""
        lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(made, axis=1)
        cosine = float(np.min((found * made).sum(1) / np.maximum(lengths, 1e-9)))
        if cosine < ALIKE:
            raise IndexMismatch(
                f"vectors in {self.settings.path} are not the encoder's: their cosine with ours falls to {cosine:.2f}",
                hint="name the passage encoder that made them, or knowledge.vectors.ids or .first if ids are out of step",
            )

    def _row(self, identity: str) -> int:
        if self._ids is not None:
            return self._ids.get(identity, -1)
        return int(identity) - self.settings.first if identity.isdecimal() else -1

    @cached_property
    def _ids(self) -> dict[str, int] | None:
        if self.settings.ids is None:
            return None
        return {line: row for row, line in enumerate(_lines(self.settings.ids))}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as fault:
        raise CorpusError(f"{path} cannot be read: {fault.strerror}", hint="knowledge.vectors.ids: one id a line") from None
