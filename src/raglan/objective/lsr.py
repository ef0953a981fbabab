"""`lsr`: the query encoder learns which passages the generator found useful (RA-DIT's R-ft, REPLUG's LSR, Atlas' losses).

    p = softmax_K(s/γ)    q = softmax_K(u/τ), detached    loss: divergence    KL(p‖q) or KL(q‖p)
    −log Σ_k p_k p(y|x,z_k)                               loss: marginal      whose target is the passages' posterior

Only the query tower learns, unless `learn: both`. Passage vectors are gathered from the index and detached, the language
model's scores come out of a table that was made once; so a step costs one query encoding, and the index is byte-identical
afterwards. Scores are computed from vectors that carry a gradient: a float that came out of `encode` would carry none, and
the best-known public trainer of this method therefore trains nothing.

With `learn: both`, against the paper's advice, candidates are encoded anew at every step, with gradient, and what is searched
may be old (`staleness.StaleRetriever`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from raglan.errors import CheckpointError
from raglan.index import Queries
from raglan.likelihood import (
    lsr_target,
    marginal_logprob,
    normalised_entropy,
    passage_divergence,
    passage_logprobs,
)
from raglan.metrics import answer_recall, mrr, recall
from raglan.objective.base import Objective
from raglan.objective.staleness import Refresher, StaleRetriever, encoded_anew, refresh_due
from raglan.recipe import LsrObjective as LsrSettings
from raglan.recipe import StalenessSettings, TargetSettings
from raglan.records import Example
from raglan.retriever import Retriever

__all__ = ["CORPUS_HALVES", "CandidateRefresh", "HeldOut", "LsrObjective", "LsrRow", "default_gamma"]

log = logging.getLogger(__name__)
CORPUS_HALVES = "corpus_halves"  # the source of rows that were made from the corpus itself
FLAT = 0.99  # normalised entropy from which on a target prefers nothing
LOOKED_AT = 256  # rows looked at before the first step


@dataclass(frozen=True)
class LsrRow:
    """What is searched for, its candidates (K,) rows (−1 = none), the LM's Σ_t log p of its answer under each (K,), and T.

    With target `given`, `answer_logprobs` holds the values themselves. `token_logprobs` (K,T) are there for loss `marginal`
    over tokens. `id` is its example's; `source` says which data made it, and so which target is its own.
    """

    query: str
    candidates: np.ndarray
    answer_logprobs: np.ndarray
    answer_length: int
    id: str = ""
    source: str = ""
    token_logprobs: np.ndarray | None = None


@dataclass(frozen=True)
class HeldOut:
    """A held-out question and what counts as found: passages by id, or any passage that holds one of the answers.

    `by` says which: `passages`, `answers`, or `favourite`, the candidate under which the answer was likeliest.
    """

    query: str
    history: tuple[str, ...] = ()
    relevant: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    by: str = "passages"


def default_gamma(similarity: str) -> float:
    """1 for inner products; 0.05 for cosines, which lie so close together that γ = 1 is nearly flat."""
    return 1.0 if similarity == "dot" else 0.05


class LsrObjective(Objective):
    """Rows are `LsrRow`s, held-out rows `HeldOut`s or examples with relevant passages.

    Attributes:
        settings: as given, with τ and γ as they are.
        gamma: γ, with √D in it where `divide_by` says so: what the tuned query encoder's manifest keeps.
        refresher: builds the index anew; research: searches for candidates anew; None where neither is wanted.
    """

    def __init__(self, retriever: Retriever, settings: LsrSettings):
        encoder = retriever.encoder
        root = encoder.dimension**0.5 if settings.divide_by == "sqrt_d" else 1.0
        stored = encoder.gamma and encoder.gamma / root  # an earlier stage's γ has √D in it
        gamma = settings.gamma or stored or default_gamma(encoder.similarity)
        tau = settings.tau or (0.01 if settings.target in ("prob", "mean_prob") else None)
        self.retriever, self.settings = retriever, settings.model_copy(update={"gamma": gamma, "tau": tau})
        self.gamma = gamma * root
        towers: dict[str, nn.Module] = {"query_encoder": encoder.split()}
        if settings.learn == "both":
            towers["passage_encoder"] = encoder.passage_tower
        for tower in towers.values():
            for name, parameter in tower.named_parameters():
                parameter.requires_grad_("pooler" not in name)  # BERT's pooler takes no part in the vector
        self.towers = towers
        self.module: _Towers = _Towers(towers, lambda batch: self._scored(batch, stored=settings.learn == "query_encoder"))
        self.refresher: Refresher | None = None
        self.research: CandidateRefresh | None = None

    def loss(
        self, batch: dict[str, Any], *, module: nn.Module | None = None, items: int | Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        moved = self._moved(batch)
        doc_scores: Tensor = (module or self.module)(moved)
        log_p = passage_logprobs(doc_scores, present=moved["passage_mask"], temperature=self.gamma)
        log_q = self._preferred(moved, log_p.detach())
        losses = self._losses(log_p, log_q, moved)
        flat = normalised_entropy(log_q) > FLAT
        kept = ~flat if self.settings.flat == "skip" else torch.ones_like(flat)
        with torch.no_grad():
            figures = {
                "target_entropy": normalised_entropy(log_q).mean(), "entropy": normalised_entropy(log_p).mean(),
                "flat": flat.float().mean(), "agreement": (log_q.argmax(-1) == log_p.argmax(-1)).float().mean(),
            }  # fmt: skip
        return torch.where(kept, losses, 0.0).sum() / kept.sum().clamp_min(1), figures

    def items(self, batch: dict[str, Any]) -> int:
        """Rows; where flat targets take no part, rows whose target is not flat. A target does not depend on what learns."""
        if self.settings.flat == "keep":
            return super().items(batch)
        moved = self._moved(batch)
        return int((normalised_entropy(self._target(moved)) <= FLAT).sum())

    def collate(self, rows: Sequence[LsrRow]) -> dict[str, Any]:
        candidates = np.stack([row.candidates for row in rows])
        features = self.retriever.encoder.features([row.query for row in rows])
        lengths = [row.answer_length for row in rows]
        batch = {
            **{f"query_{name}": value for name, value in features.items()},
            "candidates": torch.from_numpy(candidates),
            "passage_mask": torch.from_numpy(candidates >= 0),
            "answer_logprobs": torch.from_numpy(np.stack([row.answer_logprobs for row in rows])),
            "answer_lengths": torch.tensor(lengths),
            "from_corpus": torch.tensor([row.source == CORPUS_HALVES for row in rows]),
        }
        if self.settings.learn == "query_encoder":
            batch["passage_vectors"] = torch.from_numpy(self.retriever.base.vectors.vectors(candidates))
        if self.settings.loss == "marginal" and self.settings.over == "token":
            each = np.zeros((*candidates.shape, max(lengths)), dtype=np.float32)
            for own, row in zip(each, rows, strict=True):
                assert row.token_logprobs is not None
                own[:, : row.answer_length] = row.token_logprobs
            batch["token_logprobs"] = torch.from_numpy(each)
        return batch

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        return {name: [p for p in tower.parameters() if p.requires_grad] for name, tower in self.towers.items()}

    @torch.no_grad()
    def entropies(self, rows: Sequence[LsrRow]) -> tuple[Tensor, Tensor]:
        """H(q)/ln K and H(p)/ln K of rows, (n,) each, by the stored passage vectors."""
        was_training = self.module.training
        self.module.eval()
        found = []
        for start in range(0, len(rows), 64):
            batch = self._moved(self.collate(rows[start : start + 64]))
            doc_scores = self._scored(batch, stored=True)
            log_p = passage_logprobs(doc_scores, present=batch["passage_mask"], temperature=self.gamma)
            log_q = self._preferred(batch, log_p)
            found.append(torch.stack([normalised_entropy(log_q), normalised_entropy(log_p)]).cpu())
        self.module.train(was_training)
        targets, priors = torch.cat(found, dim=1)
        return targets, priors

    def prepare(self, rows: Sequence[LsrRow], make: Callable[[], Sequence[LsrRow]], folder: Path) -> None:
        """What `refresh` and `refresh_index` ask for: new candidates by `make`, new indexes in `folder`."""
        settings = self.settings
        if settings.refresh != "never":
            self.research = CandidateRefresh(cast(list[LsrRow], rows), make, settings.refresh)
        if settings.refresh_index:
            sync = StalenessSettings(kind="refresh", mode="sync")
            self.refresher = Refresher(self.retriever, sync, folder, due=refresh_due(settings.refresh_index))

    def look(self, rows: Sequence[LsrRow]) -> None:
        """Warn, before the first step, where most of the first 256 targets or priors are of no use."""
        if not rows:
            return
        targets, priors = self.entropies(rows[:LOOKED_AT])
        if self.settings.loss == "divergence":
            self._look_at_targets(rows[:LOOKED_AT], targets > FLAT)
        for share, what, hint in (
            (float((priors > 0.98).float().mean()), "flat", "lower"),
            (float((priors < 0.02).float().mean()), "certain", "raise"),
        ):
            if share > 0.5:
                log.warning(
                    "%.0f %% of the retriever's distributions over candidates are %s with gamma %g: %s objective.gamma.",
                    100 * share, what, self.gamma, hint,
                )  # fmt: skip

    def _look_at_targets(self, rows: Sequence[LsrRow], flat: Tensor) -> None:
        """Warn of each target that is flat for most of its own rows. flat: (n,)."""
        own = self.settings.corpus_halves
        halves = torch.tensor([own is not None and row.source == CORPUS_HALVES for row in rows])
        judged: list[tuple[Tensor, LsrSettings | TargetSettings, str]] = [(~halves, self.settings, "objective")]
        judged += [(halves, own, "objective.corpus_halves")] if own is not None else []
        for where, settings, key in judged:
            share = float(flat[where].float().mean()) if where.any() else 0.0
            if share > 0.5:
                log.warning(
                    "%.0f %% of %d lsr targets of %s are flat (target %s, tau %s): they teach nothing. Lower its tau%s.",
                    100 * share, int(where.sum()), key, settings.target, settings.tau or 0.01,
                    ", or use mean_prob" if settings.target == "prob" else "",
                )  # fmt: skip

    @torch.no_grad()
    def validate(self, rows: Sequence[HeldOut | Example]) -> dict[str, float]:
        """MRR@10 and R@1 by a real search of the vectors with the current query tower, and what they were judged by."""
        asked = [row if isinstance(row, HeldOut) else HeldOut(row.query, row.history, row.relevant) for row in rows]
        was_training = self.module.training
        self.module.eval()
        corpus = self.retriever.base.corpus
        texts = self.retriever.search_texts([row.query for row in asked], [row.history for row in asked])
        found = DenseOnly(self.retriever).search(texts, min(10, len(corpus)))
        pairs = [_judged(row, [corpus[at] for at in ranking]) for row, ranking in zip(asked, found.tolist(), strict=True)]
        self.module.train(was_training)
        by = [row.by for row in asked]
        return {
            "mrr@10": float(np.mean([mrr(ranking, relevant, 10) for ranking, relevant in pairs])),
            "recall@1": float(np.mean([recall(ranking, relevant, 1) for ranking, relevant in pairs])),
            **{f"judged_by_{name}": by.count(name) / len(by) for name in sorted(set(by))},
        }

    def _moved(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        device = next(self.module.parameters()).device
        return {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}

    def _scored(self, batch: dict[str, Tensor], *, stored: bool) -> Tensor:
        """doc_scores (B,K): query vectors with gradient, times stored passage vectors, or such as are encoded now."""
        features = {name.removeprefix("query_"): value for name, value in batch.items() if name.startswith("query_")}
        if stored:
            rows, vectors = batch["candidates"], batch.get("passage_vectors")
            if vectors is None:
                vectors = torch.from_numpy(self.retriever.base.vectors.vectors(rows.cpu().numpy())).to(rows.device)
            return self.retriever.score(features, vectors)
        passages = encoded_anew(self.retriever, batch["candidates"].cpu().numpy(), batch["candidates"].device)
        with torch.autocast(passages.device.type, enabled=False):
            return (self.retriever.encoder.forward(features)[:, None, :] * passages).sum(-1)

    def _preferred(self, batch: dict[str, Tensor], log_p: Tensor) -> Tensor:
        """log q (B,K), detached: the target, or with loss marginal the posterior."""
        if self.settings.loss == "marginal":
            return passage_logprobs(log_p + batch["answer_logprobs"], present=batch["passage_mask"])
        return self._target(batch)

    def _target(self, batch: dict[str, Tensor]) -> Tensor:
        sums, present = batch["answer_logprobs"], batch["passage_mask"]
        shared: dict[str, Any] = {"answer_lengths": batch["answer_lengths"], "passage_mask": present}
        log_q = lsr_target(sums, target=self.settings.target, tau=self.settings.tau, **shared)
        other = self.settings.corpus_halves
        if other is None:
            return log_q
        return torch.where(batch["from_corpus"][:, None], lsr_target(sums, target=other.target, tau=other.tau, **shared), log_q)

    def _losses(self, log_p: Tensor, log_q: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """(B,)."""
        if self.settings.loss == "divergence":
            return passage_divergence(log_p, log_q, direction=self.settings.direction)
        each = batch.get("token_logprobs", batch["answer_logprobs"][:, :, None])
        places = torch.arange(each.shape[-1], device=each.device)
        lengths = batch["answer_lengths"] if "token_logprobs" in batch else torch.ones_like(batch["answer_lengths"])
        return -marginal_logprob(log_p, each, places < lengths[:, None], over=self.settings.over)


class _Towers(nn.Module):
    """The towers that learn, and the whole of what learns from them in one forward pass: a wrapper (DDP, FSDP) averages only
    gradients of what its own forward pass saw.
    """

    def __init__(self, towers: dict[str, nn.Module], score: Callable[[dict[str, Tensor]], Tensor]):
        super().__init__()
        for name, tower in towers.items():
            self.add_module(name, tower)
        self._score = score

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """A batch → doc_scores (B,K)."""
        return self._score(batch)

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        for tower in self.children():
            cast(Any, tower).gradient_checkpointing_enable(**settings)


class CandidateRefresh:
    """Searches for candidates anew with the query encoder as it is, every so many steps.

    `rows` is changed in place, row by row, by what `make` gives for the same examples; what the table of scores knows
    already costs no call. The batch behind a refresh was collated before it and has the old candidates; a run that goes on
    from a checkpoint of that very step has the new ones there, and is no copy of a straight run in that one batch.
    """

    def __init__(self, rows: list[LsrRow], make: Callable[[], Sequence[LsrRow]], every: int):
        self.rows, self.make, self.every = rows, make, every

    def at(self, step: int) -> None:
        """Told once after every step."""
        if step % self.every:
            return
        fresh = {(row.id, row.source, row.query): row for row in self.make()}
        changed = 0
        for place, row in enumerate(self.rows):
            new = fresh.get((row.id, row.source, row.query), row)
            changed += not np.array_equal(np.sort(new.candidates), np.sort(row.candidates))
            self.rows[place] = new
        log.info("step %d: %d of %d rows have other candidates", step, changed, len(self.rows))

    def save(self, path: Path) -> None:
        """Keep the rows' candidates and scores beside a checkpoint."""
        longest = max(row.answer_length for row in self.rows)
        tokens = [
            np.pad(row.token_logprobs, ((0, 0), (0, longest - row.answer_length)))
            for row in self.rows
            if row.token_logprobs is not None
        ]
        np.savez(
            path, candidates=np.stack([row.candidates for row in self.rows]),
            answer_logprobs=np.stack([row.answer_logprobs for row in self.rows]),
            answer_lengths=np.array([row.answer_length for row in self.rows]), tokens=np.array(tokens, dtype=np.float32),
        )  # fmt: skip

    def restore(self, path: Path) -> None:
        """Go on with the candidates of a checkpoint. Raises CheckpointError where they are of other rows."""
        with np.load(path) as kept:
            parts = [kept["candidates"], kept["answer_logprobs"], kept["answer_lengths"]]
            tokens = kept["tokens"]
        if len(parts[0]) != len(self.rows):
            raise CheckpointError(
                f"{path} holds candidates of {len(parts[0])} rows, and the stage has {len(self.rows)}",
                hint=f"remove {path.parent.parent} and train the stage from its start",
            )
        for place, (candidates, values, length) in enumerate(zip(*parts, strict=True)):
            own = tokens[place][:, :length] if len(tokens) else None
            self.rows[place] = replace(
                self.rows[place], candidates=candidates, answer_logprobs=values, answer_length=int(length), token_logprobs=own
            )


class DenseOnly:
    """Exact search over the stored vectors with the retriever's query tower, whatever index answers users."""

    def __init__(self, retriever: Retriever):
        self.retriever = retriever

    def search(self, queries: Sequence[str], k: int) -> np.ndarray:
        vectors = self.retriever.encoder.embed_queries(list(queries))
        asked, stored = Queries(list(queries), vectors), self.retriever.base.vectors
        stale = self.retriever if isinstance(self.retriever, StaleRetriever) else None
        depth = k if stale is None else stale.depth(k)
        rows = stored.search(asked, depth)[1]
        return rows if stale is None or depth == k else stale.reranked(vectors, rows, k)[1]


def _judged(row: HeldOut, passages: Sequence[Any]) -> tuple[list[str], Sequence[str]]:
    """A ranking of ids, and the ids that were to be found."""
    ranking = [passage.id for passage in passages]
    if row.by != "answers":
        return ranking, row.relevant
    holders = [passage.id for passage in passages if answer_recall([f"{passage.title}\n{passage.text}"], row.answers)]
    return ranking, holders[:1] or [""]  # any one will do, so the best placed stands for all
