"""Rows to annotate: questions with short answers, other people's instructions, and two kinds made of the corpus itself.

A `Row` is an instruction and an output. A question gives one row with its first answer, and by a seeded draw a second one
that is to stand beside an irrelevant passage; a question without any answer gives only the latter, and says so. Another draw
gives one with a wrong answer, or half of the right one, beside a relevant passage that does not hold it. `tell` asks
for what a title's passages say, in their own sentences, which makes rows of several segments; `closed` asks for what needs
no passage. Every draw is by hash(seed, row id, step), so neither order nor sharding matters.
`lessons` are questions that the corpus asks itself.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from raglan.artifact import file_fingerprint
from raglan.corpus import Corpus
from raglan.data import load_examples
from raglan.errors import CorpusError
from raglan.lessons import lessons
from raglan.metrics import f1
from raglan.recipe import ClosedSource, CritiqueSettings, LessonSource, QuestionSource, RowSource, TellSource
from raglan.records import Example
from raglan.text import half_character, sentences

__all__ = ["Row", "drawn", "read_rows", "source_stamps", "spoiled"]

TRIES = 100  # answers that are looked at for one that is wrong
Want = Literal["best", "irrelevant", "unsupported"]


@dataclass(frozen=True, slots=True)
class Row:
    """An instruction and its output, before it is annotated.

    Attributes:
        want: which passages it may stand beside: the best there are, only irrelevant ones, or relevant ones that do not support
            it.
        question: what is searched for; the instruction but for what stands before a question in all rows.
        known: see `Judgement.known`.
    """

    id: str
    source: str
    want: Want
    instruction: str
    question: str
    output: str
    known: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def drawn(seed: int, identity: str, step: str) -> float:
    """A number in [0, 1) that depends on nothing but seed, row and step."""
    digest = hashlib.sha256(f"{seed}\n{identity}\n{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def read_rows(settings: CritiqueSettings, corpus: Corpus, *, seed: int) -> list[Row]:
    """The rows of all sources, by id.

    Raises:
        CorpusError: a source that cannot be read, or an id that occurs twice.
    """
    rows: list[Row] = []
    for name, source in settings.sources.items():
        made = list(MAKERS[source.kind](name, source, settings, corpus, seed))
        if not made:
            raise CorpusError(f"source {name!r} gives no row", hint="look at its file, or leave it out")
        rows += made
    known: set[str] = set()
    for row in rows:
        if row.id in known:
            raise CorpusError(f"row {row.id!r} occurs twice", hint="give each question of a file its own id")
        known.add(row.id)
    return sorted(rows, key=lambda row: row.id)


def source_stamps(settings: CritiqueSettings) -> dict[str, str]:
    """The content of every source's file."""
    paths = {name: source.path for name, source in settings.sources.items() if isinstance(source, QuestionSource | RowSource)}
    return {name: file_fingerprint(path) if path.is_file() else str(path) for name, path in paths.items()}


def _questions(name: str, source: QuestionSource, settings: CritiqueSettings, corpus: Corpus, seed: int) -> Iterator[Row]:
    examples = load_examples(source.path, corpus, limit=source.limit, seed=seed, split="train")
    tests = [example.id for example in examples if example.metadata.get("split") == "test"]
    if tests and not source.allow_test:
        raise CorpusError(
            f"{source.path} holds {len(tests)} questions of the split `test`: {', '.join(tests[:10])}",
            hint="annotate another split's file, or set allow_test: true for this source",
        )
    yield from _asked(name, examples, source, settings, seed)


def _lessons(name: str, source: LessonSource, settings: CritiqueSettings, corpus: Corpus, seed: int) -> Iterator[Row]:
    yield from _asked(name, lessons(corpus, source.count, seed=seed), source, settings, seed)


def _asked(
    name: str, examples: Sequence[Example], source: QuestionSource | LessonSource, settings: CritiqueSettings, seed: int
) -> Iterator[Row]:
    others = [example.answers[0] for example in examples if example.answers]
    for example in examples:
        asked = "\n".join([*example.history, example.query])
        instruction = f"{source.instruction}{source.separator}{asked}" if source.instruction else asked
        answered = bool(example.answers)
        known = {
            "origin": "answered" if answered else "unanswerable", "answers": list(example.answers),
            "relevant": list(example.relevant), "abstention": settings.abstention,
        }  # fmt: skip
        output = example.answers[0] if answered else settings.abstention
        identity = f"{name}/{example.id}"
        if answered:
            yield Row(identity, name, "best", instruction, asked, output, known, _kept(example))
        if not answered or drawn(seed, identity, "irrelevant") < source.irrelevant:
            says = output if source.irrelevant_says == "answer" else settings.abstention
            yield Row(f"{identity}/irrelevant", name, "irrelevant", instruction, asked, says, known, _kept(example))
        if answered and drawn(seed, identity, "unsupported") < source.unsupported:
            wrong = _wrong(identity, example.answers, others, seed)
            if wrong:
                yield Row(f"{identity}/unsupported", name, "unsupported", instruction, asked, wrong, known, _kept(example))


def _wrong(identity: str, answers: Sequence[str], others: Sequence[str], seed: int) -> str:
    """Another question's answer without a word of this one's, or by draw half of each; empty where none is found."""
    start = int(drawn(seed, identity, "wrong") * len(others))
    tried = (others[(start + step) % len(others)] for step in range(min(len(others), TRIES)))
    other = next((found for found in tried if not f1(found, answers)), "")
    if other and len(answers[0].split()) > 1 and drawn(seed, identity, "half wrong") < 0.5:
        return spoiled(answers[0], other)
    return other


def spoiled(sentence: str, other: str) -> str:
    """The sentence's first half with another's second half: something that is supported in part at most."""
    mine, theirs = sentence.split(), other.split()
    return " ".join([*mine[: -(-len(mine) // 2)], *theirs[len(theirs) // 2 :]])


def _kept(example: Example) -> dict[str, Any]:
    return {key: value for key, value in example.metadata.items() if key in ("split", "choices")}


def _rows(name: str, source: RowSource, _settings: CritiqueSettings, _corpus: Corpus, seed: int) -> Iterator[Row]:
    if not source.path.is_file():
        raise CorpusError(f"there is no file {source.path}", hint="lines of {instruction, input, output}")
    lines = source.path.read_text(encoding="utf-8").split("\n")
    found = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if source.limit is not None and source.limit < len(found):
        kept = set(random.Random(seed).sample(range(len(found)), source.limit))
        found = [line for place, line in enumerate(found) if place in kept]
    for number, line in found:
        row = _told(line, source.path, number)
        given = str(row.get("input") or "")
        instruction = f"{row['instruction']}{source.separator}{given}" if given else row["instruction"]
        metadata = {key: value for key, value in row.items() if key not in ("id", "instruction", "input", "output")}
        identity = f"{name}/{row.get('id', number)}"
        yield Row(identity, name, "best", instruction, given or row["instruction"], row["output"], {}, metadata)


def _told(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as fault:
        raise CorpusError(f"{path}, line {number}, is not JSON: {fault}") from None
    texts = isinstance(row, dict) and all(
        isinstance(row.get(key), str) and row[key].strip() for key in ("instruction", "output")
    )
    if not texts or half_character(line) is not None:
        raise CorpusError(
            f"{path}, line {number}, is no row", hint='lines are {"instruction": "…", "input": "", "output": "…"}'
        )
    told: dict[str, Any] = row
    return told


def _told_of(name: str, source: TellSource, _settings: CritiqueSettings, corpus: Corpus, seed: int) -> Iterator[Row]:
    """ "Tell what is known of T.": the first sentences of one of T's passages, and by draw of the next passage too."""
    fit = [row for row in range(len(corpus)) if corpus[row].title.strip() and sentences(corpus[row].text)]
    fit.sort(key=lambda row: drawn(seed, corpus[row].id, "tell"))
    for row in fit[: source.count]:
        passage, told = corpus[row], [corpus[row]]
        following = corpus[row + 1] if row + 1 < len(corpus) else None
        if following is not None and passage.document and following.document == passage.document:
            told += [following] if drawn(seed, passage.id, "tell on") < 0.5 else []
        said = [sentence for one in told for sentence in sentences(one.text)[: source.sentences]]
        title = passage.title.split(" > ")[-1] if len(told) == 1 else passage.title.split(" > ")[0]
        instruction = TELL[int(drawn(seed, passage.id, "tell how") * len(TELL))].format(title=title)
        known = {"origin": "told", "relevant": [one.id for one in told], "sentences": said}
        yield Row(f"{name}/{passage.id}", name, "best", instruction, instruction, " ".join(said), known)


TELL = ("Tell what is known of {title}.", "Write a short text about {title}.", "What can you say about {title}?")


def _closed(name: str, source: ClosedSource, _settings: CritiqueSettings, corpus: Corpus, seed: int) -> Iterator[Row]:
    """Copying, counting, comparing and reckoning, with numbers and with words that the corpus has too."""
    vocabulary = sorted(
        {word for row in range(0, len(corpus), max(1, len(corpus) // 500)) for word in _plain(corpus[row].text)}
    )
    for number in range(source.count):
        chance = random.Random(f"{seed}/{name}/{number}")
        instruction, output = chance.choice(TASKS)(chance, vocabulary)
        yield Row(
            f"{name}/{number:06d}", name, "best", instruction, instruction, output, {"origin": "closed", "answers": [output]}
        )


def _plain(text: str) -> list[str]:
    return [word for word in text.split() if word.isalpha() and word.islower() and 3 <= len(word) <= 8]


def _sum(chance: random.Random, _vocabulary: Sequence[str]) -> tuple[str, str]:
    a, b = chance.randint(1, 50), chance.randint(1, 50)
    return f"What is {a} plus {b}?", str(a + b)


def _larger(chance: random.Random, _vocabulary: Sequence[str]) -> tuple[str, str]:
    a, b = chance.sample(range(1, 100), 2)
    return f"Which number is larger, {a} or {b}?", str(max(a, b))


def _repeat(chance: random.Random, vocabulary: Sequence[str]) -> tuple[str, str]:
    word = _word(chance, vocabulary)
    return f"Repeat this word: {word}", word


def _first(chance: random.Random, vocabulary: Sequence[str]) -> tuple[str, str]:
    a, b = _word(chance, vocabulary), _word(chance, vocabulary)
    return f"Write only the first of these two words: {a}, {b}", a


def _letters(chance: random.Random, vocabulary: Sequence[str]) -> tuple[str, str]:
    word = _word(chance, vocabulary)
    return f"How many letters has the word {word}?", str(len(word))


def _word(chance: random.Random, vocabulary: Sequence[str]) -> str:
    return chance.choice(vocabulary) if vocabulary else chance.choice(("stone", "river", "table", "green"))


Task = Callable[[random.Random, Sequence[str]], tuple[str, str]]
TASKS: tuple[Task, ...] = (_sum, _larger, _repeat, _first, _letters)
MAKERS: dict[str, Any] = {"questions": _questions, "lessons": _lessons, "rows": _rows, "tell": _told_of, "closed": _closed}
