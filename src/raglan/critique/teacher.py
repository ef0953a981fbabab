"""Who judges: one seam, `Teacher.label`, and the book in which verdicts are kept as they come.

    label(judgements) → (judgement id, Verdict | Reject), in any order, as they are ready

Four kinds: `rules` (no model), `endpoint` (any chat server, through the call engine), `critic` (a generator trained here,
p(label) = softmax over the labels of log p(label | prompt)), `encoder` (small classifiers over features of text). A verdict
is written to the book before it is used, so a killed run asks for nothing twice; equal judgements are asked once.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raglan.artifact import fingerprint
from raglan.critique.judgements import LABELS, TOKENS, Judgement, Reject, Template, Verdict, checked
from raglan.errors import CheckpointError
from raglan.generator import Scorer
from raglan.progress import counting
from raglan.recipe import JudgementKind

__all__ = ["Book", "CriticLabels", "Labelled", "Teacher"]

Labelled = tuple[str, Verdict | Reject]
PIECE = 512  # judgements that a model is asked together, and lost at most when killed


class Teacher(ABC):
    """Labels judgements.

    Attributes:
        name: as tables and manifests tell it.
    """

    name: str

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Names everything that labels depend on."""

    @abstractmethod
    def label(self, judgements: Sequence[Judgement], *, draw: int = 0) -> Iterator[Labelled]:
        """A verdict or a reject of each, in any order. `draw` > 0 asks afresh, where asking again may give another answer."""


class CriticLabels(Teacher):
    """A trained generator: the likeliest label, and p = softmax over the labels' log-probabilities, end token included.

    Where its `prompt.self_rag.answers` is `tokens`, a label is its reflection token.
    """

    name = "critic"

    def __init__(self, generator: Scorer, templates: Mapping[JudgementKind, Template]):
        self.generator, self.templates = generator, templates
        self.tokens = generator.prompt.settings.self_rag.answers == "tokens"

    @property
    def fingerprint(self) -> str:
        told = {kind: template.fingerprint for kind, template in self.templates.items()}
        return fingerprint(["critic", self.generator.fingerprint, told])

    def label(self, judgements: Sequence[Judgement], *, draw: int = 0) -> Iterator[Labelled]:
        for start in range(0, len(judgements), PIECE):
            part = judgements[start : start + PIECE]
            prompts: list[Any] = []
            answers: list[str] = []
            for judgement in part:
                rendered = self.generator.prompt.render(self.templates[judgement.kind].prompt(judgement), [])
                labels = LABELS[judgement.kind]
                prompts += [rendered] * len(labels)
                answers += [TOKENS[judgement.kind][label] for label in labels] if self.tokens else labels
            sums = iter([float(np.sum(own, dtype=np.float64)) for own in self.generator.token_logprobs(prompts, answers)])
            for judgement in part:
                yield judgement.id, _likeliest(judgement.kind, [next(sums) for _ in LABELS[judgement.kind]])


def _likeliest(kind: JudgementKind, logprobs: Sequence[float]) -> Verdict:
    values = np.asarray(logprobs, dtype=np.float64)
    shares = np.exp(values - np.logaddexp.reduce(values))
    best = int(np.argmax(shares))
    return Verdict(LABELS[kind][best], "", round(float(shares[best]), 6))


class Book:
    """Verdicts on disk, a line each, written before they are used; read again, nothing is asked twice.

    A line is {"key", "label", "reason", "p"} or {"key", "reject", "raw"}; the key names teacher, wording, text and draw.
    What a kill tore off at the end is dropped.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._known: dict[str, Verdict | Reject] = {}
        self._read()

    def label(
        self, teacher: Teacher, judgements: Sequence[Judgement], templates: Mapping[JudgementKind, Template], *, draw: int = 0
    ) -> dict[str, Verdict | Reject]:
        """Verdicts and rejects by judgement id; only those that are not in the book are asked of the teacher."""
        identity = teacher.fingerprint
        keys = {judgement.id: self._key(identity, judgement, templates[judgement.kind], draw) for judgement in judgements}
        asked: dict[str, Judgement] = {}
        for judgement in judgements:
            if keys[judgement.id] not in self._known:
                asked.setdefault(keys[judgement.id], judgement)
        if asked:
            self._ask(teacher, list(asked.values()), keys, draw)
        missing = [judgement.id for judgement in judgements if keys[judgement.id] not in self._known]
        if missing:
            raise CheckpointError(f"{teacher.name} gave no answer for {len(missing)} judgements", hint="run the command again")
        return {judgement.id: self._known[keys[judgement.id]] for judgement in judgements}

    def _ask(self, teacher: Teacher, asked: Sequence[Judgement], keys: Mapping[str, str], draw: int) -> None:
        kinds = {judgement.id: judgement.kind for judgement in asked}
        with (
            open(self.path, "a", encoding="utf-8") as file,
            counting(len(asked), f"{teacher.name}: labelling") as tell,
        ):
            for identity, found in teacher.label(asked, draw=draw):
                verdict = checked(kinds[identity], found) if isinstance(found, Verdict) else found
                file.write(_line(keys[identity], verdict))
                file.flush()
                self._known[keys[identity]] = verdict
                tell(1)
            os.fsync(file.fileno())

    @staticmethod
    def _key(teacher: str, judgement: Judgement, template: Template, draw: int) -> str:
        place = "" if judgement.passage is None else judgement.passage.id
        return fingerprint([teacher, template.fingerprint, template.body(judgement), place, dict(judgement.known), draw])

    def _read(self) -> None:
        if not self.path.is_file():
            return
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with open(self.path, "rb+") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.decode("utf-8").split("\n")[:-1], 1):
            try:
                row = json.loads(line)
                key = row.pop("key")
                self._known[key] = Reject(row["reject"], row["raw"]) if "reject" in row else Verdict(**row)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise CheckpointError(
                    f"{self.path}, line {number}, is no verdict",
                    hint="the file is damaged: remove it, and labels are asked for anew",
                ) from None


def _line(key: str, verdict: Verdict | Reject) -> str:
    row: dict[str, Any] = {"key": key}
    if isinstance(verdict, Reject):
        row |= {"reject": verdict.reason, "raw": verdict.raw}
    else:
        row |= {"label": verdict.label, "reason": verdict.reason} | ({} if verdict.p is None else {"p": verdict.p})
    return json.dumps(row, ensure_ascii=False) + "\n"
