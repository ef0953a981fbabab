"""`marginal`: retriever and generator learn together from answers alone (RAG, Lewis et al. 2020, §2.1 and §2.4).

    loss = −log Σ_k p(z_k|x) p(y|x,z_k)           over: sequence
         = −Σ_t log Σ_k p(z_k|x) p(y_t|x,z_k,y_<t) over: token

No passage is labelled. The retriever is pulled towards the passages under which the answer was likely (its posterior), the
generator learns most from those. Passages are picked by the query encoder as it is at that step, without gradient; their
scores are then computed again with gradient, from the same query vectors. Passage encoder and index stay as they are, unless
`learn` names the passage encoder: then picked passages are encoded anew at every step, and the index is refreshed, or
searched deeper and reranked, or left to age.

One forward pass a step: B query vectors, one search, B·K prompts, and nothing of size (B,K,T,V).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raglan.errors import RecipeError
from raglan.generator import HFGenerator
from raglan.index import Queries
from raglan.likelihood import (
    chunked_token_logprobs,
    chunked_uniform_logprobs,
    marginal_logprob,
    normalised_entropy,
    passage_posterior,
    predictive_weights,
    reduced,
)
from raglan.metrics import perplexity
from raglan.objective.base import Objective
from raglan.objective.collapse import CollapseMonitor
from raglan.objective.staleness import Refresher, encoded_anew
from raglan.recipe import MarginalObjective as MarginalSettings
from raglan.retriever import Retriever

__all__ = ["MarginalObjective", "MarginalRow", "learns_to_retrieve"]

ENCODERS = {"query_encoder", "passage_encoder"}
PROBED = 64  # held-out rows on which the gaps are measured


@dataclass(frozen=True)
class MarginalRow:
    """A question and one answer; `candidates` (U,K) rows where the query encoder is frozen and retrieval was done before.

    `texts` are what is searched for, one a turn that retrieves; default the question. Plain RAG has one.
    """

    query: str
    answer: str
    candidates: np.ndarray | None = None
    history: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()

    @property
    def searched(self) -> tuple[str, ...]:
        return self.texts or (self.query,)


@dataclass(frozen=True)
class Scored:
    """What one forward pass gives: (B,K), (B,K,T), (B,T), rows (B,K), and the uniform term of label smoothing (B,T)."""

    doc_logprobs: Tensor
    token_logprobs: Tensor
    answer_mask: Tensor
    rows: np.ndarray
    uniform: Tensor | None = None


class MarginalObjective(Objective):
    """Rows are `MarginalRow`s. What `settings.learn` names has gradients, and nothing else."""

    def __init__(self, retriever: Retriever, generator: HFGenerator, settings: MarginalSettings):
        self.retriever, self.generator, self.settings = retriever, generator, settings
        self.k = min(settings.k, len(retriever.base.corpus))
        self.searches = learns_to_retrieve(settings, retriever)
        encoder, learn = retriever.encoder, settings.learn
        parts: dict[str, nn.Module] = {"query_encoder": encoder.split(), "generator": generator.model}
        if self.searches and "passage_encoder" in learn:
            parts["passage_encoder"] = encoder.passage_tower
        if "prior" in learn:
            parts["prior"] = retriever.weights
        self.module: _Joint = _Joint(parts, self._scored, self._learns)
        self.division = {"token": "items", "example": "mean", "sum": "none"}[settings.reduction]
        for part, module in parts.items():
            learns = part in learn and (self.searches or part not in ENCODERS)
            for name, parameter in module.named_parameters():
                if part in ENCODERS or not learns or part == "prior":  # what of a generator learns is its own matter
                    parameter.requires_grad_(learns and "pooler" not in name)
        self.monitor = CollapseMonitor()
        self.refresher: Refresher | None = None

    def loss(
        self, batch: dict[str, Any], *, module: nn.Module | None = None, items: int | Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        scored: Scored = (module or self.module)(batch)
        epsilon = self.settings.label_smoothing
        nll = -self._learned(scored)
        kept = ~torch.isneginf(scored.doc_logprobs).all(1)  # a question without hits, where such are left out
        figures = _figures(scored, nll.detach(), kept) | self._about_retrieval()
        if self.module.training:
            self.monitor.see(scored.rows)
        if not kept.any():
            return scored.token_logprobs.sum(), figures
        if scored.uniform is not None:
            nll = (1 - epsilon) * nll - epsilon * scored.uniform.sum(-1)
        own = items if self.settings.reduction == "token" else None
        return reduced(nll[kept], scored.answer_mask[kept], reduction=self.settings.reduction, items=own), figures

    def items(self, batch: dict[str, Any]) -> int:
        """Answer tokens, or questions. Those that are known to find nothing are not counted where such are left out."""
        labels = batch["labels"]
        if self.settings.on_empty == "skip" and "candidates" in batch:
            found = (batch["candidates"] >= 0).any(1).split(batch["sizes"])  # a row a turn
            labels = labels[torch.stack([turns.any() for turns in found])]
        return int((labels >= 0).sum()) if self.division == "items" else len(labels)

    def collate(self, rows: Sequence[MarginalRow]) -> dict[str, Any]:
        queries = [text for row in rows for text in row.searched]
        features = self.retriever.encoder.features(queries)
        batch: dict[str, Any] = {f"query_{name}": value for name, value in features.items()}
        candidates = [row.candidates for row in rows if row.candidates is not None]
        if len(candidates) == len(rows):
            batch["candidates"] = torch.from_numpy(np.concatenate([np.atleast_2d(found) for found in candidates]))
        kept = 1 if self.settings.tokens == "first" else None
        answers = [self.generator.answer_ids(row.answer)[:kept] for row in rows]
        longest = max(map(len, answers))
        labels = torch.tensor([ids + [-100] * (longest - len(ids)) for ids in answers])
        asked, sizes = [(row.query, row.history) for row in rows], [len(row.searched) for row in rows]
        return {**batch, "labels": labels, "queries": queries, "asked": asked, "sizes": sizes}

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        parts = self.module.named_children()
        learning = {name: [p for p in part.parameters() if p.requires_grad] for name, part in parts}
        return {name: found for name, found in learning.items() if name in self.settings.learn and found}

    @torch.no_grad()
    def validate(self, rows: Sequence[MarginalRow]) -> dict[str, float]:
        """Marginal negative log-likelihood per answer token and the perplexity it means, K passages searched anew; and on the
        first 64 rows how much worse it is without passages, and with those of another question.
        """
        was_training = self.module.training
        self.module.eval()
        total, count = 0.0, 0
        for start in range(0, len(rows), 16):
            scored = self._forward(self.collate(rows[start : start + 16]))
            value = self._marginal(scored)
            present = ~torch.isinf(value)
            total -= float(value[present].sum())
            count += int(scored.answer_mask[present].sum())
        gaps = self._gaps(rows[:PROBED]) if self.settings.turns is None else {}
        self.module.train(was_training)
        self.monitor.hear(gaps)
        return {"loss": total / max(count, 1), "perplexity": perplexity([-total], [count]), **gaps}

    def _gaps(self, rows: Sequence[MarginalRow]) -> dict[str, float]:
        """Nats per answer token that are lost without passages, and with passages exchanged between questions.

        Each is of the questions that can be asked both ways: where `on_empty` is `skip`, nothing is asked without passages.
        """
        sums, counts = {"closed_book_gap": 0.0, "shuffle_gap": 0.0}, {"closed_book_gap": 0, "shuffle_gap": 0}
        for start in range(0, len(rows) - 1, 16):
            part = rows[start : start + 16]
            batch = self.collate(part)
            own = self._forward(batch)
            value = self._marginal(own)
            others = {"shuffle_gap": np.roll(own.rows, 1, axis=0), "closed_book_gap": np.full_like(own.rows, -1)}
            for name, found in others.items():
                other = self._marginal(self._forward({**batch, "candidates": torch.from_numpy(found)}))
                both = value.isfinite() & other.isfinite()
                sums[name] += float((value - other)[both].sum())
                counts[name] += int(own.answer_mask[both].sum())
        return {name: sums[name] / count for name, count in counts.items() if count}

    def _about_retrieval(self) -> dict[str, Tensor]:
        """τ and λ where they learn; the index's age in steps and its last recall where it is refreshed."""
        about: dict[str, float] = self.retriever.weights.values() if "prior" in self.settings.learn else {}
        if self.refresher is not None:
            about |= {"index_age": self.step - self.refresher.born, "index_recall": self.refresher.recall}
        return {name: torch.tensor(float(value)) for name, value in about.items()}

    def _learns(self, part: str) -> bool:
        """Whether a part learns at this step. One that does not runs as at inference, without dropout."""
        if part == "generator":
            return part in self.settings.learn
        may = part in self.settings.learn and (self.searches or part not in ENCODERS)
        return may and self.step >= self.settings.freeze_retriever_steps

    def _forward(self, batch: dict[str, Any]) -> Scored:
        with self.generator.autocast():
            found: Scored = self.module(batch)
        return found

    def _scored(self, batch: dict[str, Any]) -> Scored:
        """The whole step inside the module's one forward, so that a wrapper (DDP, FSDP) sees it as one."""
        device = self.generator.device
        labels = batch["labels"].to(device)
        doc_logprobs, rows = self._weighed(batch, device)
        empty = ~(rows >= 0).any(1)
        if self.settings.on_empty == "closed_book" and empty.any():
            certain = torch.zeros_like(doc_logprobs).masked_fill(torch.arange(rows.shape[1], device=device) > 0, -torch.inf)
            doc_logprobs = torch.where(torch.from_numpy(empty).to(device)[:, None], certain, doc_logprobs)
        asked = ~torch.isneginf(doc_logprobs.detach())
        pairs = asked.nonzero().tolist()
        if not pairs:
            return Scored(doc_logprobs, self._nothing().expand(*asked.shape, labels.shape[1]), labels >= 0, rows)
        asks = batch["asked"]
        prompts = [self._prompt(*asks[b], row=int(rows[b, k])) for b, k in pairs]
        self.generator.check_positions(max(len(prompt.ids) for prompt in prompts), labels.shape[1])
        states = self.generator.collate([{"input_ids": list(p.ids), "labels": []} for p in prompts])
        states = {**states, "labels": labels[[b for b, _ in pairs]]}
        if self.settings.label_smoothing:
            return self._smoothed(doc_logprobs, states, asked, labels, rows)
        each = self.generator.forward(states, self.module.generator)
        return Scored(doc_logprobs, _spread(each, asked), labels >= 0, rows)

    def _nothing(self) -> Tensor:
        """0 that hangs on all that learns, so that a backward pass without any question gives gradients of 0.

        It has to be made inside the module's forward pass: ranks wait for each other's gradient of everything that DDP saw
        there, and those whose questions did find something have one.
        """
        learning = [p for part, found in self.parameters().items() if self._learns(part) for p in found]
        none = torch.zeros((), device=self.generator.device)
        return none + sum(p.flatten()[:1].sum() * 0 for p in learning)

    def _marginal(self, scored: Scored) -> Tensor:
        """log p(y|x), (B,)."""
        return marginal_logprob(scored.doc_logprobs, scored.token_logprobs, scored.answer_mask, over=self.settings.over)

    def _learned(self, scored: Scored) -> Tensor:
        """What is made large: log p(y|x), or a bound of it, (B,)."""
        return self._marginal(scored)

    def _weighed(self, batch: dict[str, Any], device: torch.device) -> tuple[Tensor, np.ndarray]:
        """log p(z|x) (B,K) and the rows (B,K) it is of."""
        doc_scores, rows = self._picked(batch, device)
        with self._weighing(doc_scores):
            return self.retriever.prior_logprobs(doc_scores, batch["queries"], rows), rows

    def _weighing(self, doc_scores: Tensor) -> torch.set_grad_enabled:
        """The prior's parameters have gradients from the step on at which they learn."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and (doc_scores.requires_grad or self._learns("prior")))

    def _picked(self, batch: dict[str, Any], device: torch.device) -> tuple[Tensor, np.ndarray]:
        """q·d (B,K), with gradient where an encoder learns, and the rows (B,K) the search found."""
        queries = batch["queries"]
        given = batch.get("candidates")
        if given is not None:
            rows = given.cpu().numpy()
        if given is not None and self.retriever.prior_settings.kind == "bm25":
            return torch.zeros(rows.shape, device=device), rows
        features = {name.removeprefix("query_"): v.to(device) for name, v in batch.items() if name.startswith("query_")}
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._learns("query_encoder")):
            vectors = self.retriever.encoder.forward(features)
        if given is None:
            rows = self._found(queries, vectors.detach().float())
        passages = self._passages(rows, device)
        with torch.autocast(device.type, enabled=False):  # bfloat16 merges ranks: scores stay float32
            return (vectors.float()[:, None, :] * passages).sum(-1), rows

    def _found(self, queries: list[str], vectors: Tensor) -> np.ndarray:
        """Rows (B,K) for query vectors (B,D): the search's, or the best K of a deeper one by vectors encoded anew."""
        staleness = self.settings.staleness
        asked = Queries(queries, vectors.cpu().numpy())
        if staleness is None or staleness.kind != "rerank":
            return self.retriever.index.search(asked, self.k)[1]
        _, pool = self.retriever.index.search(asked, min(staleness.pool, len(self.retriever.base.corpus)))
        tower = self.retriever.encoder.passage_tower
        learning = tower.training
        with torch.no_grad():
            tower.eval()
            scores = (vectors[:, None, :] * self._encoded(pool, vectors.device)).sum(-1).cpu()
            tower.train(learning)
        best = scores.masked_fill(torch.from_numpy(pool < 0), -torch.inf).topk(self.k).indices
        return np.take_along_axis(pool, best.numpy(), 1)

    def _passages(self, rows: np.ndarray, device: torch.device) -> Tensor:
        """Vectors (B,K,D) of rows: the stored ones, or, where the passage encoder learns, fresh ones with gradient."""
        if "passage_encoder" not in self.module.parts:
            return torch.from_numpy(self.retriever.base.vectors.vectors(rows)).to(device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._learns("passage_encoder")):
            return self._encoded(rows, device)

    def _encoded(self, rows: np.ndarray, device: torch.device) -> Tensor:
        return encoded_anew(self.retriever, rows, device)

    def _prompt(self, query: str, history: Sequence[str], *, row: int) -> Any:
        passages = [self.retriever.base.corpus[row]] if row >= 0 else []
        return self.generator.prompt.render(query, passages, history=history)

    def _smoothed(
        self, doc_logprobs: Tensor, states: dict[str, Tensor], asked: Tensor, labels: Tensor, rows: np.ndarray
    ) -> Scored:
        generator, chunk = self.generator, self.generator.settings.head_chunk
        hidden = generator.answer_states(states, self.module.generator)  # (R,T,D), R = present pairs
        real = states["labels"].to(hidden.device) >= 0
        values = chunked_token_logprobs(hidden[real], generator.head_logits, states["labels"][real], chunk=chunk)
        each = _spread(torch.zeros(real.shape, device=values.device).masked_scatter(real, values), asked)
        mask = labels >= 0
        weights = predictive_weights(doc_logprobs, each, mask, over=self.settings.over)  # (B,K,T)
        spread = hidden.new_zeros((*asked.shape, *hidden.shape[1:])).index_put(tuple(asked.nonzero().T), hidden)
        at = mask.nonzero(as_tuple=True)
        mixed = chunked_uniform_logprobs(
            spread.transpose(1, 2)[at], generator.head_logits, weights.transpose(1, 2)[at], chunk=chunk
        )
        uniform = torch.zeros(mask.shape, device=mixed.device).masked_scatter(mask, mixed)
        return Scored(doc_logprobs, each, mask, rows, uniform)


def learns_to_retrieve(settings: MarginalSettings, retriever: Retriever) -> bool:
    """Whether an encoder gets a gradient. BM25 scores carry none."""
    return bool(ENCODERS & set(settings.learn)) and retriever.prior_settings.kind != "bm25"


class _Joint(nn.Module):
    """All parts as one module with one forward pass."""

    query_encoder: nn.Module
    generator: nn.Module

    _keys_to_ignore_on_save = None  # the trainer asks for it where names are missing: tied weights are saved once

    def __init__(self, parts: dict[str, nn.Module], step: Callable[[dict[str, Any]], Scored], learns: Callable[[str], bool]):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.parts = tuple(parts)
        self._step, self._learns = step, learns

    def forward(self, batch: dict[str, Any]) -> Scored:
        return self._step(batch)

    def train(self, mode: bool = True) -> _Joint:
        super().train(mode)
        for name, part in self.named_children():
            part.train(mode and self._learns(name))
        return self

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        """The generator is what needs the memory, and a passage encoder that learns: B·K texts each."""
        if not getattr(self.generator, "supports_gradient_checkpointing", False):
            raise RecipeError(
                f"{type(self.generator).__name__} has no gradient checkpointing", hint="leave out train.gradient_checkpointing"
            )
        for part in ("generator", "passage_encoder"):
            if part in self.parts and any(p.requires_grad for p in getattr(self, part).parameters()):
                getattr(self, part).gradient_checkpointing_enable(**settings)


def _spread(each: Tensor, asked: Tensor) -> Tensor:
    """Rows of the present pairs (R,T) → (B,K,T), 0 where absent."""
    whole = each.new_zeros((*asked.shape, each.shape[-1]))
    return whole.index_put(tuple(asked.nonzero().T), each)


@torch.no_grad()
def _figures(scored: Scored, nll: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """Means over the questions that count; the loss without smoothing, whatever is learned from."""
    rows = scored.rows
    about = {
        "distinct_top1": torch.tensor(len(set(rows[:, 0].tolist())) / max(len(rows), 1)),
        "absent": torch.tensor(float((rows < 0).mean())),
        "without_hits": torch.tensor(float((rows < 0).all(1).mean())),
    }
    if not kept.any():
        return about
    prior, each, mask = scored.doc_logprobs.detach()[kept], scored.token_logprobs.detach()[kept], scored.answer_mask[kept]
    posterior = passage_posterior(prior, each, mask)
    log_posterior = posterior.clamp_min(1e-30).log().masked_fill(torch.isneginf(prior), -torch.inf)
    gain = torch.where(posterior > 0, posterior * (log_posterior - prior), 0.0)
    return about | {
        "nll_token": nll[kept].sum() / mask.sum(), "nll_example": nll[kept].mean(),
        "prior_entropy": normalised_entropy(prior).mean(), "posterior_entropy": normalised_entropy(log_posterior).mean(),
        "posterior_gain": gain.sum(-1).mean(),
        "best_agrees": (prior.argmax(-1) == posterior.argmax(-1)).float().mean(),
    }  # fmt: skip
