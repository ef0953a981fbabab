"""An entailment model on this machine: (premise, hypothesis) → probability that the hypothesis follows.

    p = softmax(logits)[entailment], the largest over the windows of a premise that is too long for the model

Any transformers model that classifies pairs will do, if one of its labels says entailment; which one is read from its config
(`id2label`), since models order their labels as they like. A premise is never cut: it is read in windows that overlap, so what
stands at its end counts as much as its beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from raglan.artifact import file_fingerprint, fingerprint
from raglan.encoder import compute_device
from raglan.errors import CheckpointError, GeneratorError
from raglan.quiet import quietly
from raglan.weights import weight_files

__all__ = ["Entailment", "entailment_label"]

LONGEST = 512  # tokens of a pair, where the model says nothing
LEAST = 32  # tokens of a premise, that have to fit beside a hypothesis
HELD = 50_000  # pairs whose probability is remembered


class Entailment:
    """A loaded model. `fingerprint` names its weights.

    Args:
        folder: as transformers saves it, with its tokenizer.
        batch_size: pairs at a time.

    Raises:
        CheckpointError: no such model, or none of its labels, or several, say entailment.
    """

    def __init__(self, folder: Path, *, batch_size: int = 16):
        self.model, self.tokenizer = _loaded(Path(folder))
        self.label, self.batch_size = entailment_label(self.model.config.id2label, where=folder), batch_size
        self.device = compute_device()
        self.model.to(self.device).eval()
        self.longest = _longest(self.model.config, self.tokenizer)
        self.fingerprint = fingerprint([file_fingerprint(file) for file in weight_files(Path(folder))])
        self._known: dict[tuple[str, str], float] = {}

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Probabilities in [0, 1], in order. Raises GeneratorError: a hypothesis too long to be read with a premise."""
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._known]
        if len(self._known) + len(new) > HELD:
            self._known.clear()
            new = list(dict.fromkeys(pairs))
        for start in range(0, len(new), self.batch_size):
            part = new[start : start + self.batch_size]
            self._known.update(zip(part, self._scores(part), strict=True))
        return [self._known[pair] for pair in pairs]

    def _scores(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        for _, hypothesis in pairs:
            self._check(hypothesis)
        premises, hypotheses = zip(*pairs, strict=True)
        batch = self.tokenizer(
            list(premises), list(hypotheses), truncation="only_first", max_length=self.longest, stride=LEAST // 2,
            return_overflowing_tokens=True, padding=True, return_tensors="pt",
        )  # fmt: skip
        of = batch.pop("overflow_to_sample_mapping").tolist()
        with torch.no_grad():
            logits = self.model(**{name: value.to(self.device) for name, value in batch.items()}).logits  # (windows, labels)
        chances = logits.float().softmax(-1)[:, self.label].tolist()
        return [max(chance for chance, row in zip(chances, of, strict=True) if row == place) for place in range(len(pairs))]

    def _check(self, hypothesis: str) -> None:
        tokens = len(self.tokenizer(hypothesis, verbose=False)["input_ids"])
        if tokens + LEAST > self.longest:
            raise GeneratorError(
                f"a sentence of {tokens} tokens leaves no room for a passage in the {self.longest} that the model reads"
            )


def entailment_label(labels: dict[int, str], *, where: object) -> int:
    """Which label says entailment. Raises CheckpointError: none, or several."""
    found = [number for number, name in labels.items() if name.casefold().startswith("entail")]
    if len(found) != 1:
        raise CheckpointError(
            f"{where} classifies as {', '.join(labels.values())}, and {'none' if not found else 'more than one'} of these "
            "says entailment",
            hint="id2label in its config.json names the labels; one has to begin with `entail`",
        )
    return int(found[0])


def _loaded(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no model", hint="a folder as save_pretrained writes it, with the tokenizer")
    try:
        with quietly():
            model: Any = AutoModelForSequenceClassification.from_pretrained(str(folder))
            tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as fault:
        raise CheckpointError(f"the model {folder} cannot be loaded: {str(fault).strip().splitlines()[0]}") from None
    if not tokenizer.is_fast:
        raise CheckpointError(f"{folder} has no fast tokenizer, which windows need", hint="save it as tokenizer.json")
    return model, tokenizer


def _longest(config: Any, tokenizer: Any) -> int:
    """Tokens of a pair at most."""
    told = (getattr(config, "max_position_embeddings", None), tokenizer.model_max_length)
    return min([LONGEST, *(int(one) for one in told if one and one < 10**6)])
