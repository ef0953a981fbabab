"""One thing that one person said of one question: the record that all tools' exports become.

    kind       value                                    of what
    answer     the corrected answer's text              the question, `old` is the answer that was shown
    relevance  a grade, 0 = irrelevant                  the question and the passage
    rating     a number                                 the answer that was shown
    comment    text                                     any of them

`origin` names the statement in its tool, so that reading the same export twice adds nothing. `aside` is empty, or the
reason why the statement is kept and not used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from raglan.artifact import fingerprint
from raglan.errors import RecipeError

__all__ = ["KINDS", "Fields", "Judgement", "as_text", "judged", "own_name", "standard_time"]

KINDS = ("answer", "relevance", "rating", "comment")
GRADES = {
    "irrelevant": 0.0, "not relevant": 0.0, "not_relevant": 0.0, "unrelated": 0.0, "no": 0.0, "false": 0.0, "bad": 0.0,
    "incorrect": 0.0, "wrong": 0.0, "thumbs down": 0.0, "👎": 0.0, "partially relevant": 0.5, "somewhat relevant": 0.5,
    "partially": 0.5, "partial": 0.5, "relevant": 1.0, "yes": 1.0, "true": 1.0, "good": 1.0, "correct": 1.0, "right": 1.0,
    "thumbs up": 1.0, "👍": 1.0, "very relevant": 2.0, "highly relevant": 2.0, "perfectly relevant": 3.0,
}  # fmt: skip
NAMES = {
    "example": ("example", "example_id", "question_id"),
    "query": ("query", "question", "prompt", "instruction", "input", "text"),
    "history": ("history",),
    "old": ("old_answer", "answer", "prediction", "response", "output", "generation", "completion"),
    "passage": ("passage_id", "document_id"),
    "passage_text": ("passage", "context", "document", "passage_text", "reference"),
    "answer": ("corrected_answer", "correction", "corrected", "correct_answer", "corrected_text", "expected_output"),
    "relevance": ("relevance", "relevant", "passage_relevance", "document_relevance", "relevant_passages"),
    "rating": ("rating", "score", "quality", "stars", "helpfulness", "correctness"),
    "comment": ("comment", "comments", "note", "notes", "feedback", "explanation"),
}
COUNTER = re.compile(r"[ _-]?\d+$")  # relevance_2 is of passage_2


@dataclass(frozen=True, slots=True)
class Judgement:
    """A statement; see the module for its fields. `raw` is the piece of the export that it was read from."""

    origin: str
    kind: str
    value: str | float = ""
    query: str = ""
    example: str = ""
    history: tuple[str, ...] = ()
    passage: str = ""
    passage_text: str = ""
    old: str = ""
    annotator: str = ""
    time: str = ""
    aside: str = ""
    raw: Mapping[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """As JSON; `read_feedback(…, source="raglan")` reads it back."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Fields:
    """Which names in an export mean what, and which labels which grade; `given` are the names that a person gave."""

    names: Mapping[str, Sequence[str]] = field(default_factory=lambda: NAMES)
    grades: Mapping[str, float] = field(default_factory=lambda: GRADES)
    given: frozenset[str] = frozenset()

    @classmethod
    def of(cls, maps: Sequence[str] = (), grades: Sequence[str] = ()) -> Fields:
        """From "field=name" and "label=grade" texts; a name given here takes the place of the usual ones of its field.

        Raises:
            RecipeError: not of that form, a field that there is not, a grade that is no number.
        """
        given: dict[str, tuple[str, ...]] = {}
        for text in maps:
            key, equals, name = text.partition("=")
            if not equals or key not in NAMES or not name:
                raise RecipeError(f"--map {text!r} is not field=name", hint=f"fields are {', '.join(NAMES)}")
            given[key] = (*given.get(key, ()), name)
        labels = dict(GRADES)
        for text in grades:
            label, _, grade = text.rpartition("=")
            number = _number(grade)
            if not label or number is None:
                raise RecipeError(f"--grade {text!r} is not label=number", hint="as in --grade 'on topic=1'")
            labels[label.casefold()] = number
        taken = {name for names in given.values() for name in names}
        usual = {key: tuple(name for name in names if name not in taken) for key, names in NAMES.items()}
        return cls({**usual, **given}, labels, frozenset(name.casefold() for name in taken))

    def kind(self, name: str) -> str | None:
        """What a question of the annotation form asks for, by its name; a number at its end does not count."""
        for form in _forms(name):
            for kind in KINDS:
                if form in (known.casefold() for known in self.names[kind]):
                    return kind
        return None

    def mapped(self, name: str) -> bool:
        """Whether a person said what this name means."""
        return not self.given.isdisjoint(_forms(name))

    def get(self, data: Mapping[str, Any], key: str, *, of: str = "") -> Any:
        """The first non-empty value of a field; `of` is the form's question, whose number at the end may choose the field."""
        counter = match.group() if (match := COUNTER.search(of)) else ""
        names = [*(f"{name}{counter}" for name in self.names[key] if counter), *self.names[key]]
        return next((data[name] for name in names if data.get(name) not in (None, "", [])), None)

    def grade(self, value: Any) -> float | None:
        """A number as it is, a label's grade, or None."""
        number = _number(value)
        return self.grades.get(str(value).strip().casefold()) if number is None else number


def _forms(name: str) -> tuple[str, str]:
    plain = name.casefold()
    return plain, COUNTER.sub("", plain)


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if abs(number) < float("inf") else None


def judged(
    fields: Fields, name: str, value: Any, *, data: Mapping[str, Any], origin: str, kind: str | None = None, **about: Any
) -> list[Judgement]:
    """What one answer to one question of the annotation form says: none where it is empty, several where it lists several.

    Args:
        name: the form's question, which tells the kind unless that is given.
        data: what was shown with it.
        about: `annotator`, `time`, `aside`, `raw`.
    """
    if value in (None, "", []):
        return []
    known = kind or fields.kind(name)
    shown = _shown(fields, data, name)
    whole = Judgement(origin, known or "", as_text(value), **{**shown, **about})
    if known is None:
        return [replace(whole, aside=about.get("aside") or f"{name!r} is not mapped to any of {', '.join(KINDS)}")]
    parts = value if isinstance(value, list) else [value]
    several = [replace(whole, origin=f"{origin}:{n}" if n else origin) for n in range(len(parts))]
    if known == "relevance" and not shown["passage"] and not shown["passage_text"]:
        return _chosen(fields, whole, parts, data)
    return [_valued(fields, one, part) for one, part in zip(several, parts, strict=True)]


def _valued(fields: Fields, one: Judgement, value: Any) -> Judgement:
    if one.kind in ("answer", "comment"):
        return _asked(replace(one, value=as_text(value)))
    grade = fields.grade(value)
    if grade is None:
        return replace(one, value=as_text(value), aside=one.aside or f"{as_text(value)!r} is no number and no known label")
    return _asked(replace(one, value=grade))


def _asked(one: Judgement) -> Judgement:
    """Without its question a statement waits, until an import brings the question."""
    return one if one.query or one.aside else replace(one, aside="its question is not in the files read")


def _chosen(fields: Fields, whole: Judgement, parts: Sequence[Any], data: Mapping[str, Any]) -> list[Judgement]:
    """The form listed passages and asked which are relevant: those chosen are, the others shown are not."""
    listed = data.get("passages")
    shown = [_passage(item) for item in listed] if isinstance(listed, list) else []
    chosen = [as_text(part) for part in parts]
    if len(chosen) == 1 and fields.grade(chosen[0]) is not None and chosen[0] not in [name for name, _ in shown]:
        return [replace(whole, aside=whole.aside or "a grade, but of no passage")]
    known = dict(shown)
    every = [*chosen, *(name for name in known if name not in chosen)]
    return [
        _asked(replace(
            whole, origin=f"{whole.origin}:{name}", value=float(name in chosen), passage=name, passage_text=known.get(name, "")
        ))
        for name in every
    ]  # fmt: skip


def _shown(fields: Fields, data: Mapping[str, Any], name: str) -> dict[str, Any]:
    query, before = _conversation(fields.get(data, "query"))
    history = fields.get(data, "history")
    text = fields.get(data, "passage_text", of=name)
    inner, passage = _passage(text)
    named = fields.get(data, "passage", of=name)
    return {
        "query": query,
        "example": as_text(fields.get(data, "example")),
        "history": tuple(as_text(turn) for turn in history) if isinstance(history, list) else before,
        "passage": as_text(named) if named is not None else inner if isinstance(text, Mapping) else "",
        "passage_text": passage,
        "old": as_text(fields.get(data, "old")),
    }


def _passage(item: Any) -> tuple[str, str]:
    """(id, text) of a passage given as {id, text} or as text alone, which then is its own name."""
    if isinstance(item, Mapping):
        name = next((item[key] for key in ("id", "passage_id", "document_id", "document.id") if item.get(key)), "")
        text = next((item[key] for key in ("text", "content", "document.content", "body") if item.get(key)), "")
        return as_text(name), as_text(text)
    return as_text(item), as_text(item)


def _conversation(value: Any) -> tuple[str, tuple[str, ...]]:
    """(question, earlier turns): chat messages end with the question, anything else is the question itself."""
    messages = value.get("messages") if isinstance(value, Mapping) and "messages" in value else value
    if isinstance(messages, list) and messages and all(isinstance(m, Mapping) and "content" in m for m in messages):
        said = [as_text(m["content"]) for m in messages if m.get("role") != "system"]
        return (said[-1], tuple(said[:-1])) if said else ("", ())
    return as_text(value), ()


def as_text(value: Any) -> str:
    """Any value as text: what chat messages and small objects say, without their wrapping."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        for key in (*NAMES["query"], *NAMES["old"], "content", "value"):
            if isinstance(value.get(key), str):
                return str(value[key]).strip()
    if isinstance(value, list) and len(value) == 1:
        return as_text(value[0])
    return str(value).strip()


def own_name(row: Mapping[str, Any], key: str = "id") -> str:
    """What a row is called in its tool; one without a name is known by all that it holds, so that two never share an origin."""
    return fingerprint(row) if row.get(key) in (None, "") else str(row[key])


def standard_time(value: Any) -> str:
    """ISO 8601 in UTC, so that later is greater; empty where it is no time."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = value / 1000 if value > 1e11 else value
        try:
            return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds")
        except (ValueError, OverflowError, OSError):  # a year that there is not
            return ""
    try:
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(str(value).strip())
    except ValueError:
        return ""
    moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    try:
        return moment.astimezone(UTC).isoformat(timespec="microseconds")
    except OverflowError:
        return ""
