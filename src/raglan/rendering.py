"""One way of putting a question and its passages to a model, for writing training data, learning from it and asking later.

    (question, turns, instruction, passages, Rendering) → the text of a causal model's prompt, through `Prompt`
                                                        → one block a passage for the embedded reader

A `Rendering` names a template (where instruction, passages and question stand), a form (how one passage is set) and a head
(what stands before its text); all three are data, renderings.yaml, English and Chinese. Its fingerprint is that of the words
themselves: an example keeps it, and is refused where the words have changed since.

The embedded reader has no template. Its blocks hold instruction and question, then the passage; forms do not apply.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from raglan.artifact import fingerprint
from raglan.errors import CheckpointError, RecipeError
from raglan.prompt import Prompt, Rendered
from raglan.records import Passage

__all__ = ["Rendering", "read_rendering", "render"]


@dataclass(frozen=True, slots=True)
class Rendering:
    """How an example is put. `language` is that of the template's own words, en or zh.

    Raises:
        RecipeError: a name that renderings.yaml does not have.
    """

    template: str = "question_last"
    form: str = "numbered"
    head: str = "title"
    language: str = "en"

    def __post_init__(self) -> None:
        for kind, name in (("templates", self.template), ("forms", self.form), ("heads", self.head)):
            if name not in _words()[kind]:
                raise RecipeError(f"no rendering has {kind[:-1]} {name!r}", hint=f"there are {', '.join(_words()[kind])}")
        if self.language not in _words()["templates"][self.template]:
            raise RecipeError(f"no template is in {self.language!r}", hint="en or zh")

    @property
    def fingerprint(self) -> str:
        """Names the words of template, form and head."""
        return fingerprint([self._template, self._form, _words()["heads"][self.head]])

    @property
    def _template(self) -> str:
        return str(_words()["templates"][self.template][self.language])

    @property
    def _form(self) -> Mapping[str, str]:
        return _words()["forms"][self.form]  # type: ignore[no-any-return]

    def record(self) -> dict[str, str]:
        """For an example's metadata."""
        return {**asdict(self), "fingerprint": self.fingerprint}

    def worded(self, prompt: Prompt, instruction: str) -> Prompt:
        """The prompt with this template; passages are set before they come to it."""
        template = self._template if instruction else self._template.replace("{instruction}", "")
        between = self._form["between"]
        return prompt.worded(
            instruction=instruction, template=template, passage="{text}", separator=between, no_passage=None, shots=()
        )

    def set(self, passages: Sequence[Passage]) -> list[Passage]:
        """The passages as they stand in the prompt: text with number and head, no title apart."""
        texts = [self._one(passage, number) for number, passage in enumerate(passages, 1)]
        if texts:
            texts[0] = self._form.get("opens", "") + texts[0]
            texts[-1] += self._form.get("closes", "")
        return [replace(passage, text=text, title="") for passage, text in zip(passages, texts, strict=True)]

    def _one(self, passage: Passage, number: int) -> str:
        worded = str(_words()["heads"][self.head])
        for name in ("document", "date"):
            worded = worded if getattr(passage, name) else worded.replace(f"({{{name}}})", "")
        head = worded.format(title=passage.title, document=passage.document, date=passage.date).strip()
        return self._form["with" if head else "without"].format(
            number=number, head=head, text=passage.text,
            head_json=json.dumps(head, ensure_ascii=False), text_json=json.dumps(passage.text, ensure_ascii=False),
        )  # fmt: skip


def render(
    prompt: Prompt, rendering: Rendering, query: str, passages: Sequence[Passage], *, instruction: str = "",
    history: Sequence[str] = (),
) -> Rendered:  # fmt: skip
    """The prompt of an example for `prompt`'s tokenizer and layout.

    Raises:
        RecipeError: the question alone does not fit.
    """
    if prompt.layout == "fused":
        return prompt.render(f"{instruction}\n{query}".strip(), passages, history=history)
    return rendering.worded(prompt, instruction).render(query, rendering.set(passages), history=history)


def read_rendering(record: Mapping[str, Any], *, where: str) -> Rendering:
    """The rendering that an example's metadata names.

    Raises:
        CheckpointError: it names none, or words that are others now.
    """
    named = {name: str(record[name]) for name in ("template", "form", "head", "language") if name in record}
    if len(named) < 4:
        raise CheckpointError(f"{where} does not say how it was rendered", hint="data.prompt: recipe renders it by the recipe")
    found = Rendering(**named)
    if found.fingerprint != record.get("fingerprint"):
        raise CheckpointError(
            f"{where} was rendered with words of fingerprint {record.get('fingerprint')}, which are {found.fingerprint} now",
            hint="write the examples again, or install the version of raglan that wrote them",
        )
    return found


@cache
def _words() -> dict[str, Any]:
    told: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("renderings.yaml").read_text(encoding="utf-8"))
    return told
