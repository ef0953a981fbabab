"""`answer`: masked answer likelihood. The generator learns to use, and to ignore, passages (RA-DIT's LM-ft, equation 3).

Loss on answer + end token only. With one passage a row it is RA-DIT's, with several it is RAG-Tuning's; the objective does
not know. Full weights or LoRA is a setting of the generator; the objective does not know that either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raglan.generator import HFGenerator
from raglan.generator.batches import padded, scored
from raglan.likelihood import admitted_logprob, answer_nll, unlikelihood
from raglan.marked_prompt import GROUPS
from raglan.objective.base import Objective
from raglan.packing import packed_batch, reads_flat
from raglan.reflection import admitted, watched

__all__ = ["AnswerObjective"]


class AnswerObjective(Objective):
    """Rows are `HFGenerator.row`'s and batches its `collate`'s, or rows are packs of such rows.

    With `tokens` "first" an answer's first token alone is scored, without the end token. A row's `weight`, 1 if it has none,
    multiplies its loss; the division by tokens or rows stays as it is. `measure` adds figures of its own to the held-out loss.

    Rows of Self-RAG have `learned`, which is False where a label is evidence that is only read, and `groups`, each label's
    place in `marked_prompt.GROUPS`. `group_weights` multiply the losses of groups; loss and accuracy are told for each. With
    `off_grammar` λ > 0 each learned label costs λ · −log P(the grammar admits what stands there) as well; with `repeats` λ > 0
    each learned word costs λ · Σ −log(1 − p) over the other words that its segment has said before it.

    With `hold` λ > 0 each answer token costs λ · KL(π_start ‖ π) over the vocabulary as well, on `all` rows or on those marked
    `replayed` (learning without forgetting: Li & Hoiem 2016, arXiv 1606.09282). π_start is the generator as it is when the
    objective is made, without dropout: a run that goes on from a checkpoint makes its objective before it loads that, and is
    held by the same π_start as one that was never broken off. π_start is asked anew at each step: its log-probabilities of a
    whole vocabulary would be V numbers for each answer token of the data, and one pass without gradient is about a third of a
    step. Deviation from that paper: at temperature 1, and on rows that have answers of their own, whose likelihood counts too.
    """

    def __init__(
        self,
        generator: HFGenerator,
        *,
        reduction: Literal["token", "example"] = "token",
        tokens: Literal["all", "first"] = "all",
        measure: Callable[[], dict[str, float]] | None = None,
        group_weights: Mapping[Any, float] | None = None,
        off_grammar: float = 0.0,
        repeats: float = 0.0,
        hold: float = 0.0,
        hold_rows: Literal["all", "replayed"] = "all",
    ):
        self.measure = measure
        self.weights = torch.tensor([float((group_weights or {}).get(name, 1.0)) for name in GROUPS])
        self.generator, self.reduction, self.tokens = generator, reduction, tokens
        self.module = generator.model
        self.hold, self.hold_rows = hold, hold_rows
        self.against = _Against(generator, off_grammar, repeats, hold) if off_grammar or repeats or hold else None
        self.division = "items" if reduction == "token" else "mean"

    def loss(
        self, batch: dict[str, Any], *, module: nn.Module | None = None, items: int | Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        batch = dict(batch)
        weights, groups = batch.pop("weights", None), batch.pop("groups", None)
        stands, held = batch.pop("stands", None), batch.pop("held", None)
        mask = scored(batch)
        against: dict[str, tuple[float, Tensor]] = {}
        if self.against is None or (held is None and (groups is None or stands is None)):
            token_logprobs = self.generator.forward(batch, module)
        else:
            marked = None if groups is None or stands is None else (groups, stands)
            token_logprobs, against = self.against.logprobs(batch, marked, held, module, self.autocast)
        figures = {} if groups is None else _by_group(-token_logprobs.detach(), groups, mask, "loss")
        if groups is not None:
            token_logprobs = token_logprobs * self.weights[groups].to(token_logprobs.device)
        for name, (weight, values) in against.items():
            own = mask if name != "hold" or held is None else mask & held[:, None]
            if own.any():
                figures[f"loss/{name}"] = -values.detach().sum(), own.sum()
            token_logprobs = token_logprobs + weight * values
        if weights is not None:
            token_logprobs = token_logprobs * weights[:, None].to(token_logprobs.device)
        mask = mask.to(token_logprobs.device)
        if self.reduction == "token" and items is not None:
            loss = answer_nll(token_logprobs, mask, reduction="none").sum() / items
        else:
            loss = answer_nll(token_logprobs, mask, reduction=self.reduction)
        return loss, {name: total / count for name, (total, count) in figures.items()}

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if "rows" in rows[0]:
            packed: dict[str, Any] = dict(packed_batch(rows, self.generator.pad, flat=reads_flat(self.generator)))
            own = [row for pack in rows for row in pack["rows"]]
            return packed | _groups(own) | self._held(own)
        if self.tokens == "first":
            rows = [{**row, "labels": row["labels"][:1]} for row in rows]
        batch: dict[str, Any] = dict(self.generator.collate(rows)) | _groups(rows) | self._held(rows)
        if any("weight" in row for row in rows):
            batch["weights"] = torch.tensor([float(row.get("weight", 1.0)) for row in rows])
        return batch

    def _held(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Which rows are held to what the generator was, (B,); nothing where none ever is."""
        if not self.hold:
            return {}
        return {"held": torch.tensor([self.hold_rows == "all" or bool(row.get("replayed")) for row in rows])}

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        return {"generator": [p for p in self.module.parameters() if p.requires_grad]}

    @torch.no_grad()
    def validate(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, float]:
        """Loss per answer token over all rows, whatever their batches."""
        was_training = self.module.training
        self.module.eval()
        total, count = 0.0, 0
        sums: dict[str, tuple[float, int]] = {}
        ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
        for start in range(0, len(ordered), 32):
            batch = self.collate(ordered[start : start + 32])
            groups = batch.pop("groups", None)
            for name in ("weights", "stands", "held"):
                batch.pop(name, None)
            with self.generator.autocast():
                logprobs, right = (self.generator.forward(batch), None) if groups is None else self.generator.judged(batch)
            mask = scored(batch).to(logprobs.device)
            total += float(answer_nll(logprobs, mask, reduction="none").sum())
            count += int(mask.sum())
            if right is not None:
                found = _by_group(-logprobs, groups, mask, "loss") | _by_group(right.float(), groups, mask, "accuracy")
                for name, (value, number) in found.items():
                    before = sums.get(name, (0.0, 0))
                    sums[name] = before[0] + float(value), before[1] + int(number)
        self.module.train(was_training)
        own = {} if self.measure is None else self.measure()
        return {"loss": total / max(count, 1), **{name: s / n for name, (s, n) in sums.items()}, **own}


class _Against:
    """What is learned beside the likelihood of rows: of Self-RAG's, log-probabilities of what should not be written; of any,
    how far the generator is from what it was."""

    def __init__(self, generator: HFGenerator, off_grammar: float, repeats: float, hold: float):
        self.generator, self.off_grammar, self.repeats, self.hold = generator, off_grammar, repeats, hold
        self.start = generator.frozen() if hold else None
        if off_grammar or repeats:
            self.ids = torch.tensor(watched(generator.schema, generator.eos))
            marks, words = admitted(generator.schema, generator.eos)
            self.marks, self.words = torch.tensor(marks), torch.tensor(words)

    def logprobs(
        self, batch: dict[str, Tensor], marked: tuple[Tensor, Tensor] | None, held: Tensor | None, module: nn.Module | None,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> tuple[Tensor, dict[str, tuple[float, Tensor]]]:  # fmt: skip
        """token_logprobs (B,T) as `HFGenerator.forward` has them, and by name a weight and what it multiplies, (B,T), ≤ 0.

        Args:
            marked: groups and stands (B,T) of Self-RAG's rows. held: rows (B,) that are held to what the generator was.
        """
        if not (self.off_grammar or self.repeats):
            marked = None
        ids = None if marked is None else self._ids(batch["labels"], marked[0])
        asked = None if ids is None else ids.clamp_min(0)
        terms: dict[str, tuple[float, Tensor]] = {}
        if self.start is None or held is None:
            values = self.generator.forward_beside(batch, asked, module)
        else:
            values, divergence = self.generator.forward_held(batch, asked, self.start, held, module, autocast=autocast)
            terms["hold"] = self.hold, -divergence
        if marked is not None and ids is not None:
            terms |= self._off_path(values, ids, marked[1], scored(batch))
        return values[..., 0], terms

    def _ids(self, labels: Tensor, groups: Tensor) -> Tensor:
        """The ids of which the grammar decides, then what the segment has said before each label, (B,T,W); −1 fills up."""
        said = _said(labels, groups) if self.repeats else groups.new_zeros((*groups.shape, 0))
        return torch.cat([self.ids.expand(*said.shape[:2], -1), said], dim=-1)

    def _off_path(self, values: Tensor, ids: Tensor, stands: Tensor, mask: Tensor) -> dict[str, tuple[float, Tensor]]:
        device, mask = values.device, mask.to(values.device)
        beside = torch.where(mask[..., None], values[..., 1:], -math.log(values.shape[-1]))  # finite where nothing is learned
        marks, words = (table.to(device)[stands.to(device)] for table in (self.marks, self.words))
        first = len(self.ids)
        terms = {
            "off_grammar": (self.off_grammar, admitted_logprob(beside[..., :first], marks, words)),
            "repeats": (self.repeats, unlikelihood(beside[..., first:], (ids[..., first:] >= 0).to(device))),
        }
        return {name: (w, torch.where(mask, own, 0.0)) for name, (w, own) in terms.items() if w}


def _said(labels: Tensor, groups: Tensor) -> Tensor:
    """For each word of a text, the other words of its segment before it, (B,T,W), each once; −1 where there are no more."""
    text = GROUPS.index("text")
    found: list[list[list[int]]] = []
    for own, kinds in zip(labels.tolist(), groups.tolist(), strict=True):
        before: list[int] = []
        row = []
        for label, kind in zip(own, kinds, strict=True):
            before = before if kind == text and label >= 0 else []
            row.append([word for word in dict.fromkeys(before) if word != label])
            before = [*before, label] if kind == text and label >= 0 else []
        found.append(row)
    most = max(len(words) for row in found for words in row)
    filled = [[words + [-1] * (most - len(words)) for words in row] for row in found]
    return torch.tensor(filled, dtype=torch.long).view(*labels.shape, most)


def _groups(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Which group each label is of, and where it stands in the grammar, (B,T) each, of rows that say so."""
    told = (name for name in ("groups", "stands") if all(name in row for row in rows))
    return {name: padded([row[name] for row in rows], 0)[0] for name in told}


def _by_group(values: Tensor, groups: Tensor, mask: Tensor, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Sum and number of values (B,T) that count, for each group that has any."""
    groups, mask = groups.to(values.device), mask.to(values.device)
    own = {group: mask & (groups == place) for place, group in enumerate(GROUPS)}
    return {f"{name}/{group}": (values[at].sum(), at.sum()) for group, at in own.items() if at.any()}
