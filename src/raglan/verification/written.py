"""What is verified: a written example with its passages as they were shown, and what is known of each of them.

One JSON object a line:

    {"id": "…", "query": "…", "target": "what is to be learned", "answers": ["aliases of the truth"],
     "passages": [{"text": "…", "role": "gold"}, {"text": "…", "role": "noise", "false": ["1874"]}],
     "format": "span", "language": "en", "evidence": "R1", "policy": "abstain", "finish": "stop"}

All but `query`, `target` and `passages` may be left out; `history`, `facts`, `labels`, `fields` and `query_format` may
be there, too. Roles say what is known, and no model ever reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raglan.documents import read_objects
from raglan.errors import CorpusError
from raglan.text import check_history, check_query

__all__ = ["FORMATS", "ROLES", "Shown", "Written", "read_written"]

ROLES = ("gold", "support", "redundant", "noise")
RELATIONS = ("", "R1", "R2", "R3", "R4", "R5", "R6", "R7")
POLICIES = ("abstain", "own_knowledge", "partial")
LANGUAGES = ("", "en", "zh", "cross")
# Answer format → fewest and most words (a character in Chinese); what else each asks for is in `checks`.
FORMATS: Mapping[str, tuple[int, int]] = {
    "": (1, 2000), "span": (1, 20), "sentence": (3, 60), "yes_no": (1, 120), "option": (1, 3), "list": (1, 300),
    "number": (1, 10), "paragraph": (15, 400), "cited": (10, 1000), "reasoning": (10, 1000), "notes": (10, 1200),
    "json": (1, 1000), "table": (2, 1000), "corrected": (1, 1000), "code": (1, 1500), "label": (1, 6),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shown:
    """A passage as it stood in the prompt, after perturbation and budget. `false`: values put in for the true ones."""

    text: str
    title: str = ""
    role: str = "gold"
    kind: str = ""
    false: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Written:
    """An example before it is believed.

    Attributes:
        target: the answer that would be learned.
        answers: aliases of the truth; none where a task has no short one.
        facts: what the question was made from; a judge compares the answer with them.
        query_format: how the question is put, where that matters: `mixed_language`.
        format: of FORMATS. `labels`: allowed labels or option letters. `fields`: keys of a JSON answer.
        evidence: R1 … R7; R5 is "gold absent". `policy`: what a gold-absent target is to be.
        finish: why the writer stopped; empty where it cannot have been cut.
    """

    id: str
    query: str
    target: str
    passages: tuple[Shown, ...]
    answers: tuple[str, ...] = ()
    history: tuple[str, ...] = ()
    format: str = ""
    language: str = ""
    evidence: str = ""
    policy: str = "abstain"
    finish: str = ""
    labels: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()
    query_format: str = ""

    @property
    def gold_absent(self) -> bool:
        return self.evidence == "R5"

    @property
    def answers_part(self) -> bool:
        """Whether the target is meant to answer what is shown, and to say what is missing."""
        return self.gold_absent and self.policy == "partial"

    @property
    def declines(self) -> bool:
        """Whether the target is meant to say that the passages do not tell."""
        return self.gold_absent and self.policy == "abstain"


def read_written(path: Path) -> Iterator[tuple[dict[str, Any], Written]]:
    """(the object of each line, what is read from it). Raises CorpusError: a missing file, or a line that is no such object."""
    for line, row in read_objects(path):
        try:
            yield row, _written(row, line)
        except CorpusError as fault:
            raise CorpusError(f"{path}, line {line}: {fault.message}", hint=fault.hint) from None


def _written(row: Mapping[str, Any], line: int) -> Written:
    query, target, passages = row.get("query"), row.get("target"), row.get("passages")
    if not isinstance(query, str) or not isinstance(target, str):
        raise CorpusError(f"`query` is {query!r} and `target` {target!r}; both must be texts")
    check_query(query)
    if not isinstance(passages, list):
        raise CorpusError(f"`passages` is {passages!r}; it must be a list of {{text, role}}")
    made = Written(
        id=str(row.get("id", line)), query=query, target=target, passages=tuple(_shown(one) for one in passages),
        answers=_texts(row, "answers"), history=_texts(row, "history"), labels=_texts(row, "labels"),
        fields=_texts(row, "fields"), facts=_texts(row, "facts"), format=_one_of(row, "format", tuple(FORMATS)),
        language=_one_of(row, "language", LANGUAGES), evidence=_one_of(row, "evidence", RELATIONS),
        policy=_one_of(row, "policy", POLICIES, "abstain"), finish=str(row.get("finish") or ""),
        query_format=str(row.get("query_format") or ""),
    )  # fmt: skip
    check_history(made.history)
    return made


def _shown(one: Any) -> Shown:
    if not isinstance(one, Mapping) or not isinstance(one.get("text"), str) or not one["text"].strip():
        raise CorpusError(f"`passages` holds {one!r}; it must be an object with `text`")
    return Shown(
        one["text"], str(one.get("title") or ""), _one_of(one, "role", ROLES, "gold"), str(one.get("kind") or ""),
        _texts(one, "false"),
    )  # fmt: skip


def _texts(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = row.get(name) or []
    if not isinstance(value, list) or not all(isinstance(one, str) and one.strip() for one in value):
        raise CorpusError(f"`{name}` is {value!r}; it must be a list of texts, none empty")
    return tuple(value)


def _one_of(row: Mapping[str, Any], name: str, allowed: tuple[str, ...], default: str = "") -> str:
    value = row.get(name) or default
    if value not in allowed:
        raise CorpusError(f"`{name}` is {value!r}; it must be one of {', '.join(filter(None, allowed))}")
    return str(value)
