"""Questions, passages and the language model's verdicts, for the distillation losses of sentence-transformers.

    {"query", "passage_1" … "passage_K", "label": [u_1 … u_K]}       u_k = p_LM(y | z_k ∘ x), raw, before any temperature

`DistillKLDivLoss` takes it as it is: the label's softmax at `teacher_temperature` τ is RA-DIT's q (Lin et al. 2023, Eq. 4), and
`student_temperature` is γ. Two things differ from R-ft here: its loss is KL(q‖p), the target first, and it is multiplied by
γ². At γ = 0.05 loss and gradient are 1/400 of what they are here, so raise the learning rate or divide by γ².
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from raglan.exports.source import cut
from raglan.exports.write import Written, write_rows
from raglan.generator import Scorer
from raglan.knowledge import passage_text
from raglan.rag import RAG
from raglan.records import DataPoint, Passage
from raglan.scores import Pair, ScoreTable

__all__ = ["NOTE", "Target", "export_sentences", "raw_label"]

log = logging.getLogger(__name__)
Target = Literal["prob", "sum_logprob", "mean_logprob", "mean_prob"]
NOTE = (
    "DistillKLDivLoss(model, student_temperature=γ, teacher_temperature=τ) multiplies its loss by γ²: at γ = 0.05 loss and "
    "gradient are 1/400. Raise the learning rate by 1/γ², or divide the loss by γ². Its KL has the target first."
)


def export_sentences(
    points: Sequence[DataPoint], path: Path, system: RAG, *, scores: Path, target: Target = "prob", score_eos: bool = True,
    scorer: Scorer | None = None,
) -> Written:  # fmt: skip
    """A row a question: what is searched for, its K passages as the encoder reads them, and u_k of each.

    K is the most that any question has; questions with fewer are left out, because columns are the same on all lines.

    Args:
        points: those of one question are joined.
        system: whose retriever says what is searched for, and whose generator's verdicts are wanted; the prompt is its own.
        scores: the table of its log-probabilities. What is in it is taken from it, the rest is computed and kept there.
        target: what u is, as in the `lsr` objective.
        score_eos: whether the end token counts.
        scorer: whose verdicts are wanted instead of the generator's.

    Raises:
        CorpusError: no question has two passages.
    """
    points = cut(points, separate=False)
    most = max((len(point.contexts) for point in points), default=0)
    kept = [point for point in points if len(point.contexts) == most and most > 1 and point.answer.strip()]
    corpus = system.retriever.base.corpus
    passages = [[_passage(corpus, context) for context in point.contexts] for point in kept]
    pairs = [Pair(p.query, (z,), p.answer, p.history) for p, own in zip(kept, passages, strict=True) for z in own]
    values = iter(_scored(scorer or system.generator, pairs, scores, score_eos))
    texts = system.retriever.search_texts([p.query for p in kept], [p.history for p in kept])
    rows, meta = [], []
    for point, own, text in zip(kept, passages, texts, strict=True):
        logprobs = [next(values) for _ in own]
        columns = {f"passage_{number}": passage_text(passage) for number, passage in enumerate(own, 1)}
        rows.append({"query": text, **columns, "label": [raw_label(tokens, target) for tokens in logprobs]})
        meta.append(_about(point, logprobs, target))
    return write_rows(rows, meta, path, "sentence-transformers", left_out=len(points) - len(kept))


def raw_label(token_logprobs: np.ndarray, target: Target) -> float:
    """u of one passage from log p(y_t | ·) (T,): exp Σ, Σ, Σ/T or exp(Σ/T)."""
    total = float(token_logprobs.astype(np.float64).sum())
    value = total / len(token_logprobs) if target.startswith("mean") else total
    return value if target.endswith("logprob") else float(np.exp(value))


def _scored(scorer: Scorer, pairs: Sequence[Pair], scores: Path, score_eos: bool) -> list[np.ndarray]:
    """log p(y_t | ·) of each pair, from the table where it is known."""
    table = ScoreTable(scores, scorer)
    return table.token_logprobs(table.complete(pairs), score_eos=score_eos)


def _passage(corpus: Any, context: Any) -> Passage:
    """The passage of the knowledge base, whose title belongs to what is read; a passage from elsewhere as it is given."""
    row = corpus.row(context.passage_id)
    return Passage(context.passage_id, context.text, context.title) if row is None else corpus[row]


def _about(point: DataPoint, logprobs: Sequence[np.ndarray], target: Target) -> dict[str, Any]:
    contexts = [
        {"passage_id": c.passage_id, "score": c.score, "rank": c.rank, "sum_logprob": float(own.sum()), "tokens": len(own)}
        for c, own in zip(point.contexts, logprobs, strict=True)
    ]
    return {
        "id": point.id, "query": point.query, "history": list(point.history), "answer": point.answer, "target": target,
        "contexts": contexts, "retriever": point.retriever,
    }  # fmt: skip
