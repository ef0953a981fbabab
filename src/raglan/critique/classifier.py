"""`annotator: encoder`: a logistic regression a judgement, over words in common and the sentence encoder's vectors.

    p(label | judgement) = softmax(W φ(judgement) + b)      φ: shares of words, numbers and letters, cosines, their products

It learns from the critic data in seconds and reads nothing that a critic could not read: known answers are the teacher's
alone. For relevance and support a cross-encoder or an entailment model would be the better critic; this one needs no other
model than the knowledge base's own encoder. Ours; the paper's critic is a 7B generator.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raglan.artifact import directory_fingerprint, fingerprint, read_manifest, write_manifest
from raglan.critique.judgements import LABELS, Judgement, Template, Verdict
from raglan.critique.rules import Words
from raglan.critique.teacher import PIECE, Labelled, Teacher
from raglan.encoder import Encoder
from raglan.errors import CheckpointError, require
from raglan.metrics import answer_recall
from raglan.recipe import EncoderTeacher, JudgementKind
from raglan.text import answer_words

__all__ = ["Classifier", "fit_classifier"]

KIND = "critic classifier"
STEPS = 2000
MOST = 200_000  # vectors that are kept


@dataclass(frozen=True)
class _Line:
    """One judgement's softmax regression, on standardised features."""

    labels: tuple[str, ...]
    mean: np.ndarray  # (F,)
    scale: np.ndarray  # (F,)
    weights: np.ndarray  # (C, F)
    bias: np.ndarray  # (C,)

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """(n, F) → (n, C)."""
        logits = ((features - self.mean) / self.scale) @ self.weights.T + self.bias
        shares = np.exp(logits - logits.max(1, keepdims=True))
        out: np.ndarray = shares / shares.sum(1, keepdims=True)
        return out


class Classifier(Teacher):
    """Labels by the regressions that `fit_classifier` wrote to `folder`.

    Raises:
        CheckpointError: no such folder, or one that was fitted with another encoder or other wordings of the judgements.
    """

    name = "encoder"

    def __init__(self, folder: Path, encoder: Encoder, words: Words, templates: Mapping[JudgementKind, Template]):
        manifest = read_manifest(folder, KIND)
        self.vectors, self.words = Vectors(encoder), words
        wanted = _identity(encoder, templates)
        if manifest["reads"] != wanted:
            raise CheckpointError(
                f"{folder} reads with encoder and wordings {manifest['reads']}, and here they are {wanted}",
                hint="remove the folder, and `raglan critique` fits it again",
            )
        self.lines = {kind: _opened(folder, kind, manifest["labels"][kind]) for kind in manifest["labels"]}
        self._fingerprint = fingerprint([KIND, directory_fingerprint(folder, ("*.npz",)), wanted])

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def label(self, judgements: Sequence[Judgement], *, draw: int = 0) -> Iterator[Labelled]:
        for kind in LABELS:
            asked = [judgement for judgement in judgements if judgement.kind == kind]
            for start in range(0, len(asked), PIECE):
                part = asked[start : start + PIECE]
                shares = self.lines[kind].probabilities(features(part, self.vectors, self.words))
                for judgement, own in zip(part, shares, strict=True):
                    best = int(own.argmax())
                    yield judgement.id, Verdict(self.lines[kind].labels[best], "", round(float(own[best]), 4))


def fit_classifier(
    settings: EncoderTeacher, labelled: Sequence[tuple[Judgement, str]], encoder: Encoder, words: Words,
    templates: Mapping[JudgementKind, Template], folder: Path, *, made_of: str,
) -> None:  # fmt: skip
    """Fit a regression to each judgement's labels and write them to `folder`, the manifest last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)
    told: dict[str, list[str]] = {}
    encoded = Vectors(encoder)
    for kind in LABELS:
        own = [(judgement, label) for judgement, label in labelled if judgement.kind == kind]
        if not own:
            raise CheckpointError(f"critic data holds no {kind}", hint="add sources that give such judgements")
        line = _fitted(features([j for j, _ in own], encoded, words), [label for _, label in own], settings.c)
        told[kind] = list(line.labels)
        np.savez(folder / f"{kind}.npz", mean=line.mean, scale=line.scale, weights=line.weights, bias=line.bias)
    write_manifest(folder, KIND, {
        "made_of": made_of, "labels": told, "reads": _identity(encoder, templates), "c": settings.c, "rows": len(labelled),
    })  # fmt: skip


def features(judgements: Sequence[Judgement], encoded: Vectors, words: Words) -> np.ndarray:
    """(n, F) float64 of judgements of one kind."""
    texts = [_texts(judgement) for judgement in judgements]
    vectors = encoded.of({text for own in texts for text in own})
    rows = []
    for judgement, (instruction, said, passage) in zip(judgements, texts, strict=True):
        a, b, c = vectors[instruction], vectors[said], vectors[passage]
        plain = np.array([*_shares(judgement, instruction, said, passage, words), a @ b, a @ c, b @ c])
        products = np.outer(plain, plain)[np.triu_indices(len(plain))]
        rows.append(np.concatenate([plain, products, a] if judgement.kind in ("retrieve", "is_use") else [plain, products]))
    return np.asarray(rows, dtype=np.float64)


def _texts(judgement: Judgement) -> tuple[str, str, str]:
    passage = judgement.passage
    shown = "" if passage is None else f"{passage.title}\n{passage.text}"
    return judgement.instruction, judgement.sentence or judgement.output, shown


def _shares(judgement: Judgement, instruction: str, said: str, passage: str, words: Words) -> list[float]:
    before = " ".join(judgement.preceding)
    return [
        words.cover(instruction, passage), words.cover(said, passage), words.cover(said, instruction),
        words.cover(instruction, said), words.cover(said, before), float(bool(before)),
        answer_recall([passage], [said]) if said.strip() else 0.0,
        words.cover(instruction, judgement.passage.title if judgement.passage is not None else ""),
        np.log1p(len(answer_words(said))), np.log1p(len(answer_words(instruction))),
        float(any(letter.isdigit() for letter in instruction)), float(any(letter.isdigit() for letter in said)),
        len(words.rare(instruction, 0.05)) / max(1, len(words.content(instruction))),
        len(words.rare(said, 0.05)) / max(1, len(words.content(said))),
    ]  # fmt: skip


class Vectors:
    """Unit vectors by text, each made once; the empty text's is zero. Beyond `MOST` texts it begins anew."""

    def __init__(self, encoder: Encoder):
        self.encoder, self.known = encoder, dict[str, np.ndarray]()

    def of(self, texts: set[str]) -> dict[str, np.ndarray]:
        if len(self.known) > MOST:
            self.known = {}
        new = sorted(text for text in texts if text not in self.known and text.strip())
        vectors = self.encoder.embed_passages(new)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        self.known |= dict(zip(new, vectors, strict=True))
        empty = np.zeros(self.encoder.dimension, dtype=np.float32)
        return {text: self.known.get(text, empty) for text in texts}


def _fitted(found: np.ndarray, labels: Sequence[str], c: float) -> _Line:
    known = tuple(sorted(set(labels)))
    mean, scale = found.mean(0), found.std(0)
    scale[scale < 1e-9] = 1.0
    if len(known) == 1:
        return _Line(known, mean, scale, np.zeros((1, found.shape[1])), np.zeros(1))
    model: Any = require("sklearn.linear_model", "for annotator: encoder").LogisticRegression(C=c, max_iter=STEPS)
    model.fit((found - mean) / scale, list(labels))
    weights, bias = model.coef_, model.intercept_
    if len(known) == 2:  # the library keeps one line for two labels
        weights, bias = np.stack([np.zeros_like(weights[0]), weights[0]]), np.array([0.0, bias[0]])
    return _Line(tuple(map(str, model.classes_)), mean, scale, weights, bias)


def _opened(folder: Path, kind: str, labels: Sequence[str]) -> _Line:
    with np.load(folder / f"{kind}.npz", allow_pickle=False) as held:
        return _Line(tuple(labels), held["mean"], held["scale"], held["weights"], held["bias"])


def _identity(encoder: Encoder, templates: Mapping[JudgementKind, Template]) -> str:
    return fingerprint([json.dumps(encoder.identity, default=str), {kind: templates[kind].fingerprint for kind in LABELS}])
