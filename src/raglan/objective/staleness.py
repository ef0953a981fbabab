"""New indexes while the passage encoder learns: snapshot → encoded in the background → a new version → taken up at a step.

Training never waits (unless `mode: sync`), there are never two jobs at once, a job that fails is a warning, and a version
that was not finished does not count. What is searched may be old; what is learned from never is, since passages' scores come
from vectors encoded at that step.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raglan.encoder import Encoder
from raglan.errors import CheckpointError
from raglan.knowledge import KnowledgeBase, encoder_text, reencoded
from raglan.recipe import StalenessSettings
from raglan.retriever import BATCH, Retriever

__all__ = ["Refresher", "StaleRetriever", "encoded_anew", "refresh_due"]

log = logging.getLogger(__name__)
PROBE, DEPTH = 256, 10


class Refresher:
    """Makes versions of the retriever's knowledge base in `folder` by the passage tower as it is at that step.

    Attributes:
        born: the step whose passage tower made the index now in use.
        due: at which steps a job is to start; default every so many.
        recall: recall@10 of the last index within a fixed probe of passages, when it was replaced, against fresh vectors.
    """

    def __init__(
        self, retriever: Retriever, settings: StalenessSettings, folder: Path, *, due: Callable[[int], bool] | None = None
    ):
        self.retriever, self.settings, self.folder = retriever, settings, folder
        self.due = due or (lambda step: step % settings.every == 0)
        self.born, self.recall = 0, 1.0
        self._pool = ThreadPoolExecutor(1)
        self._job: Future[KnowledgeBase] | None = None
        self._job_step = 0

    def at(self, step: int) -> str | None:
        """Told once after every step: starts a job if one is due, and names a finished version that is to be taken up."""
        if self._job is None and self.due(step):
            self._job_step = step
            self._job = self._pool.submit(self._build, self.retriever.encoder.snapshot())
        if self._job is None or not (self._job.done() or self.settings.mode == "sync"):
            return None
        job, self._job = self._job, None
        try:
            return job.result().version
        except Exception as fault:  # noqa: BLE001 - whatever it was, training can go on with the old index
            log.warning("the index of step %d could not be made, the old one stays: %s", self._job_step, fault)
            return None

    def take(self, version: str) -> None:
        """Search this version from now on.

        Raises:
            CheckpointError: it is not there, or not whole.
        """
        fresh = KnowledgeBase.open(self.folder, version=version)
        self.recall = _probe_recall(self.retriever.base, fresh)
        self.retriever.adopt(fresh)
        self.born = self._job_step
        log.info("index of step %d in use: recall@%d of the old one was %.3f", self.born, DEPTH, self.recall)

    def prune(self) -> None:
        """Remove versions that neither training nor, once a checkpoint is written, its resumption needs."""
        if self._job is None:
            for name in set(KnowledgeBase.versions(self.folder)) - {self.retriever.base.version}:
                shutil.rmtree(self.folder / "versions" / name)

    def close(self) -> None:
        """Wait for a job that still runs; what it makes is not used."""
        self._pool.shutdown(cancel_futures=True)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must remember."""
        return {"version": self.retriever.base.version, "born": self.born}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with the index a checkpoint was made with. Raises CheckpointError if that is gone."""
        if state["version"] != self.retriever.base.version:
            try:
                self.retriever.adopt(KnowledgeBase.open(self.folder, version=state["version"]))
            except CheckpointError as fault:
                raise CheckpointError(
                    f"the checkpoint was made with index {state['version']}, which is gone: {fault}",
                    hint=f"remove {self.folder.parent} and train the stage from its start",
                ) from None
        self.born = self._job_step = state["born"]

    def _build(self, encoder: Encoder) -> KnowledgeBase:
        return reencoded(self.retriever.base, encoder, self.folder)


class StaleRetriever(Retriever):
    """A retriever whose passage tower learns while its index stays: it knows when the index is behind.

    Then `over_retrieve` passages are taken from the index, encoded by the passage tower as it is now, and ranked again; without
    it the old vectors are searched, and one warning says so. While the weights have not moved it searches as any other.
    """

    over_retrieve: int | None = None
    _warned = False

    @classmethod
    def of(cls, retriever: Retriever, *, over_retrieve: int | None) -> StaleRetriever:
        """The same retriever, watched."""
        stale = cls.__new__(cls)
        stale.__dict__.update(retriever.__dict__)
        stale.over_retrieve = over_retrieve
        return stale

    @property
    def moved(self) -> bool:
        """Whether the passage tower is another by now than the one that made the index."""
        return self.encoder.passage_tower_moved(self.base.manifest["encoder"]["passage_fingerprint"])

    def depth(self, k: int) -> int:
        """How many passages to take from the index for the best k."""
        if not self.moved:
            return k
        if self.over_retrieve is None:
            if not self._warned:
                self._warned = True
                log.warning("the passage encoder has learned and the index is behind it: over_retrieve ranks its hits anew")
            return k
        return min(max(k, self.over_retrieve), len(self.base.corpus))

    def search(
        self, queries: Sequence[str], k: int, *, batch: int = BATCH, vectors: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        depth = self.depth(k)
        scores, rows = super().search(queries, depth, batch=batch, vectors=vectors)
        if depth == k or not queries:
            return scores, rows
        return self.reranked(self._vectors_of(queries), rows, k)

    def reranked(self, vectors: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The best k of rows (B,M) for query vectors (B,D), by passages encoded now; scores (B,K) and rows (B,K)."""
        unique, places = np.unique(rows, return_inverse=True)
        texts = [encoder_text(self.base.corpus[int(row)], self.encoder) if row >= 0 else "" for row in unique]
        fresh = self.encoder.embed_passages(texts)
        scores = np.einsum("bd,bmd->bm", vectors, fresh[places.reshape(rows.shape)])
        scores = np.where(rows < 0, -np.inf, scores).astype(np.float32)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def encoded_anew(retriever: Retriever, rows: np.ndarray, device: torch.device) -> Tensor:
    """Rows (B,K) → (B,K,D) by the passage tower as it is now, with gradient, each passage once; 0 where a row is −1."""
    encoder, corpus = retriever.encoder, retriever.base.corpus
    unique, places = np.unique(rows, return_inverse=True)
    texts = [encoder_text(corpus[int(row)], encoder) if row >= 0 else "" for row in unique]
    features = {name: value.to(device) for name, value in encoder.features(texts, side="passage").items()}
    vectors = encoder.forward(features, side="passage") * torch.from_numpy(unique >= 0).to(device)[:, None]
    return vectors[torch.from_numpy(places.reshape(rows.shape)).to(device)]


def refresh_due(plan: Sequence[tuple[int, int | None, int]]) -> Callable[[int], bool]:
    """Whether an index is due at a step, by (from, to, every): in from < step ≤ to, every so many counted from `from`."""

    def due(step: int) -> bool:
        return any(
            first < step and (last is None or step <= last) and (step - first) % every == 0 for first, last, every in plan
        )

    return due


def _probe_recall(old: KnowledgeBase, fresh: KnowledgeBase) -> float:
    """How many of a passage's nearest among a fixed probe the old vectors find, too."""
    rows = np.random.default_rng(0).permutation(len(old.corpus))[:PROBE]
    before, after = _nearest(old.vectors.vectors(rows)), _nearest(fresh.vectors.vectors(rows))
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(before, after, strict=True)])) if len(rows) > 1 else 1.0


def _nearest(vectors: np.ndarray) -> np.ndarray:
    """(n,D) → the places (n,k) of each one's nearest others."""
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    return np.argsort(-scores, axis=1)[:, : min(DEPTH, len(vectors) - 1)]
