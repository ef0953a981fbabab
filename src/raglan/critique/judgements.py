"""What a judge is asked and what it may answer: five judgements, one template each for training, annotation and teachers.

| judgement          | the judge sees                                                    | labels                   |
|--------------------|-------------------------------------------------------------------|--------------------------|
| `retrieve`         | instruction                                                       | yes, no                  |
| `retrieve_segment` | instruction, preceding sentences, first passage, the sentence     | yes, no, continue        |
| `is_rel`           | instruction (and preceding sentences, if it is so set), passage   | relevant, irrelevant     |
| `is_sup`           | instruction, preceding sentences, sentence, passage               | fully, partially, no     |
| `is_use`           | instruction, whole output                                         | 1 … 5                    |

The table is Asai et al.'s (2023, arXiv 2310.11511, §3.2.1 and appendix D); the wordings, in prompts.yaml, are ours. The
authors trained their critic on one prompt and annotated with another; here `Template.prompt` is the only one there is. A
label outside the table is a `Reject`, never a default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, create_model

from raglan.artifact import fingerprint
from raglan.recipe import JudgementKind
from raglan.records import Passage
from raglan.reflection import NAMES

__all__ = [
    "LABELS", "TOKENS", "Judgement", "Reject", "Template", "Verdict", "checked", "read_reply", "reply_model", "templates",
]  # fmt: skip

LABELS: dict[JudgementKind, tuple[str, ...]] = {
    "retrieve": ("yes", "no"),
    "retrieve_segment": ("yes", "no", "continue"),
    "is_rel": ("relevant", "irrelevant"),
    "is_sup": ("fully", "partially", "no"),
    "is_use": ("1", "2", "3", "4", "5"),
}
TOKENS: dict[JudgementKind, dict[str, str]] = {  # each label as the reflection token that says it
    "retrieve": {"yes": NAMES["retrieve"][1], "no": NAMES["retrieve"][0]},
    "retrieve_segment": dict(zip(("no", "yes", "continue"), NAMES["retrieve"], strict=True)),
    "is_rel": dict(zip(("irrelevant", "relevant"), NAMES["is_rel"], strict=True)),
    "is_sup": dict(zip(("fully", "partially", "no"), NAMES["is_sup"], strict=True)),
    "is_use": dict(zip("12345", NAMES["is_use"], strict=True)),
}
HEADS = {
    "instruction": "Instruction", "preceding": "Preceding sentences", "passage": "Passage", "sentence": "Sentence",
    "output": "Answer",
}  # fmt: skip
NONE = "(none)"


@dataclass(frozen=True, slots=True)
class Judgement:
    """One thing to be judged.

    Attributes:
        id: of the judgement; a verdict comes back under it.
        known: what the rules may use beside the text: `answers`, `relevant` (passage ids), `origin`. No judge reads it.
    """

    id: str
    kind: JudgementKind
    instruction: str
    preceding: tuple[str, ...] = ()
    passage: Passage | None = None
    sentence: str = ""
    output: str = ""
    known: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A label of the judgement's own, why, and its probability where the judge has one."""

    label: str
    reason: str = ""
    p: float | None = None


@dataclass(frozen=True, slots=True)
class Reject:
    """No label: what was wrong with the judge's answer."""

    reason: str
    raw: str = ""


class Template:
    """The wording of one judgement. `preceding` adds the sentences before to what a judge of relevance sees."""

    def __init__(self, kind: JudgementKind, *, preceding: bool = False):
        told = _prompts()[kind]
        self.kind, self.task, self.meanings = kind, str(told["task"]), {str(k): str(v) for k, v in told["labels"].items()}
        self.shows: list[str] = list(told["shows"])
        if preceding and "preceding" not in self.shows:
            self.shows.insert(1, "preceding")
        self.demos = [(_demo(kind, row), str(row["label"]), str(row["reason"])) for row in told["demos"]]

    def body(self, judgement: Judgement) -> str:
        """The fields that the judge sees, each under its heading."""
        parts = {
            "instruction": judgement.instruction,
            "preceding": " ".join(judgement.preceding),
            "passage": "" if judgement.passage is None else f"{judgement.passage.title}\n{judgement.passage.text}".strip(),
            "sentence": judgement.sentence,
            "output": judgement.output,
        }
        return "\n".join(f"{HEADS[name]}: {parts[name].strip() or NONE}" for name in self.shows)

    def prompt(self, judgement: Judgement) -> str:
        """What a critic reads, when it learns and when it annotates; the label follows."""
        return f"{self.task}\nLabels: {', '.join(self.meanings)}.\n\n{self.body(judgement)}"

    def messages(self, judgement: Judgement) -> tuple[dict[str, str], ...]:
        """A chat for a teacher: the task with the labels' meanings, the worked examples, and what is to be judged."""
        meanings = "\n".join(f'- "{label}": {meaning}' for label, meaning in self.meanings.items())
        asks = 'Answer with one JSON object and nothing else: {"label": "<one of the labels>", "reason": "<one sentence>"}'
        turns = [{"role": "system", "content": f"{self.task}\n\nLabels:\n{meanings}\n\n{asks}"}]
        for demo, label, reason in self.demos:
            answer = json.dumps({"label": label, "reason": reason}, ensure_ascii=False)
            turns += [{"role": "user", "content": self.body(demo)}, {"role": "assistant", "content": answer}]
        return (*turns, {"role": "user", "content": self.body(judgement)})

    @property
    def fingerprint(self) -> str:
        """Names the wording: task, labels, fields and worked examples."""
        return fingerprint([self.task, self.meanings, self.shows, _prompts()[self.kind]["demos"]])


@cache
def _prompts() -> dict[str, Any]:
    told: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("prompts.yaml").read_text(encoding="utf-8"))
    return told


def _demo(kind: JudgementKind, row: Mapping[str, Any]) -> Judgement:
    passage = row.get("passage")
    return Judgement(
        "demo", kind, row["instruction"], tuple(row.get("preceding", ())),
        None if passage is None else Passage("demo", passage["text"], passage["title"]),
        row.get("sentence", ""), row.get("output", ""),
    )  # fmt: skip


@cache
def reply_model(kind: JudgementKind) -> type[BaseModel]:
    """The strict schema of a teacher's answer: {label: one of the judgement's, reason: text}, and nothing else."""
    label: Any = Literal[LABELS[kind]]
    spelt: Any = BeforeValidator(lambda value: str(value) if type(value) is int else value)  # {"label": 5}
    fields: dict[str, Any] = {"label": (Annotated[label, spelt], ...), "reason": (str, ...)}
    return create_model(f"{kind}_verdict", __config__=ConfigDict(extra="forbid", frozen=True), **fields)


def read_reply(kind: JudgementKind, value: BaseModel | str) -> Verdict | Reject:
    """A teacher's answer as a verdict; anything that is not exactly such an object is a reject."""
    try:
        told: Any = value if isinstance(value, BaseModel) else reply_model(kind).model_validate_json(value)
    except ValidationError as fault:
        first = fault.errors()[0]
        where = ".".join(map(str, first["loc"])) or "answer"
        return Reject(f"{where}: {first['msg'].lower()}", value if isinstance(value, str) else "")
    return checked(kind, Verdict(str(told.label), str(told.reason)))


def checked(kind: JudgementKind, verdict: Verdict) -> Verdict | Reject:
    """The verdict, or a reject where its label is none of the judgement's."""
    if verdict.label in LABELS[kind]:
        return verdict
    return Reject(f"label: {verdict.label!r} is none of {', '.join(LABELS[kind])}", verdict.reason)


def templates(kinds: Sequence[JudgementKind] = tuple(LABELS), *, preceding: bool = False) -> dict[JudgementKind, Template]:
    """The templates of these judgements; `preceding` is the setting of relevance alone."""
    return {kind: Template(kind, preceding=preceding and kind == "is_rel") for kind in kinds}
