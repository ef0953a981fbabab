"""A synthesized dataset as it is read to be exported: its examples with the passages as they were shown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from raglan.documents import stream_examples
from raglan.errors import CorpusError, RecipeError
from raglan.records import Example, Passage
from raglan.text import SPACELESS, words

__all__ = ["HAN", "Synthetic", "holds_synthetic", "read_synthetic", "reason", "wordings"]

HAN = re.compile(f"[{SPACELESS}]")


@dataclass(frozen=True, slots=True)
class Synthetic:
    """A synthetic example as it was shown: its passages in order, each with what is known of it."""

    example: Example
    slots: tuple[Mapping[str, Any], ...]
    target: str
    instruction: str = ""
    prompt: str = ""
    policy: str = ""
    relation: str = ""
    labels: tuple[str, ...] = ()

    @property
    def teacher(self) -> str:
        return str(self.example.metadata["synth"].get("teacher") or "")

    @property
    def language(self) -> str:
        """Of the target: zh where most of its words are in a script without blanks."""
        said = words(self.target)
        return "zh" if sum(bool(HAN.match(word)) for word in said) * 2 > len(said) else "en"

    @property
    def passages(self) -> list[Passage]:
        return [
            Passage(
                str(slot["id"]),
                str(slot["text"]),
                str(slot.get("title") or ""),
                str(slot.get("document") or ""),
                date=str(slot.get("date") or ""),
            )
            for slot in self.slots
        ]

    def of_role(self, *roles: str) -> list[Passage]:
        return [passage for passage, slot in zip(self.passages, self.slots, strict=True) if slot.get("role") in roles]


def holds_synthetic(path: Path) -> bool:
    """Whether a folder holds a synthesized dataset, or a file begins with a synthetic example."""
    file = _file(path, None)
    first = next(iter(stream_examples(file)), None) if file.is_file() and file.suffix == ".jsonl" else None
    return first is not None and "synth" in first.metadata


def read_synthetic(path: Path, *, split: str | None = None) -> Iterator[Synthetic]:
    """The examples of a dataset folder, or of a .jsonl file.

    Args:
        split: the folder's train, dev, …; default all that were kept.

    Raises:
        CorpusError: no such file, or an example that is not synthetic.
    """
    file = _file(path, split)
    for example in stream_examples(file):
        synth = example.metadata.get("synth")
        if not isinstance(synth, Mapping) or not isinstance(synth.get("passages"), list) or not synth.get("target"):
            raise CorpusError(
                f"{file}: example {example.id!r} is not synthetic: metadata.synth has no passages and target",
                hint="give the folder that raglan synthesize made",
            )
        factors = synth.get("factors") or {}
        yield Synthetic(
            example, tuple(synth["passages"]), str(synth["target"]), str(synth.get("instruction") or ""),
            str(synth.get("prompt") or ""), str(synth.get("policy") or ""), str(factors.get("relation") or ""),
            tuple(map(str, synth.get("labels") or ())),
        )  # fmt: skip


def _file(path: Path, split: str | None) -> Path:
    if path.is_file():
        if split is not None:
            raise RecipeError(f"{path} is a file and has no split {split!r}", hint="leave --split out, or give the folder")
        return path
    return path / f"{split or 'examples'}.jsonl"


def reason(language: str) -> str:
    """What stands before an answer in RAFT's form, with a place for quotes."""
    return str(_wordings()["reasons"][language])


def wordings(name: str, language: str) -> list[str]:
    """What pairs.yaml says under a name, in a language."""
    return list(_wordings()[name][language])


@cache
def _wordings() -> Mapping[str, Any]:
    told: Mapping[str, Any] = yaml.safe_load(Path(__file__).with_name("pairs.yaml").read_text(encoding="utf-8"))
    return told
