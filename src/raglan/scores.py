"""The table of language-model scores: computed once, batched, cached on disk, resumable.

The key names everything a score depends on (generator with weights, tokenizer and prompt; rendered prompt; answer; end
token), and nothing it does not (target, τ, γ, direction, K, rank), so changing those costs no call. Rows are appended to
one file a batch at a time, each with a checksum; a torn tail is ignored, so a kill costs at most one batch.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from raglan.artifact import fingerprint
from raglan.generator import Generator
from raglan.progress import track
from raglan.prompt import Rendered

__all__ = ["ScoreTable"]

log = logging.getLogger(__name__)
BATCH = 256


class ScoreTable:
    """Token log-probabilities by (generator, prompt, answer). `calls` counts rows the language model was asked for."""

    def __init__(self, path: Path, generator: Generator, *, score_eos: bool = True):
        self.path, self.generator, self.score_eos = path, generator, score_eos
        self.calls = 0
        self._known = dict(_read(path))
        self._name = generator.fingerprint

    def token_logprobs(self, prompts: Sequence[Rendered], answers: Sequence[str]) -> list[np.ndarray]:
        """(T,) float32 for each pair, from the table where it is known, else from the generator, which is then recorded."""
        keys = [self._key(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        missing = {key: place for place, key in enumerate(keys) if key not in self._known}
        order = sorted(missing.items(), key=lambda item: -len(prompts[item[1]].ids))
        batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
        log.info("language-model scores: %d wanted, %d to compute", len(set(keys)), len(order))
        for batch in track(batches, "scoring"):
            places = [place for _, place in batch]
            values = self.generator.token_logprobs(
                [prompts[place] for place in places], [answers[place] for place in places], score_eos=self.score_eos
            )
            self.calls += len(batch)
            self._append([(key, value) for (key, _), value in zip(batch, values, strict=True)])
        return [self._known[key] for key in keys]

    def _key(self, prompt: Rendered, answer: str) -> str:
        return fingerprint([self._name, prompt.ids, prompt.answer_space, answer, self.score_eos])

    def _append(self, rows: Sequence[tuple[str, np.ndarray]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            for key, values in rows:
                self._known[key] = values
                body = json.dumps([key, [float(value) for value in values]])
                file.write(f"{zlib.crc32(body.encode()):08x} {body}\n")
            file.flush()
            os.fsync(file.fileno())


def _read(path: Path) -> list[tuple[str, np.ndarray]]:
    """Every whole row of the file, damaged ones left out; a torn tail is cut off, so that appending starts on a fresh line."""
    if not path.is_file():
        return []
    rows = []
    with open(path, "rb") as file:
        lines = file.read().splitlines(keepends=True)
    for line in lines:
        checksum, _, body = line.rstrip(b"\n").partition(b" ")
        if line.endswith(b"\n") and checksum == f"{zlib.crc32(body):08x}".encode():
            key, values = json.loads(body)
            rows.append((key, np.asarray(values, dtype=np.float32)))
    if lines and not lines[-1].endswith(b"\n"):
        with open(path, "rb+") as file:
            file.truncate(path.stat().st_size - len(lines[-1]))
    return rows
