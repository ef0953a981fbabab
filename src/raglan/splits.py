"""Splits that do not leak, and the check that finds what leaks.

Questions are split before anything is made of them, so a question's rows stay together however many passages it gets. What
belongs together is a group:

    by question   questions of the same normalised words, after the same turns
    by document   these, and connected components over the documents that questions are about: of Q1 {A}, Q2 {A, B}, Q3 {B}
                  and Q4 {C}, the first three are one group. Of a synthetic example these are the documents of its gold and
                  support passages and of evidence that was withheld, noise joins nothing; from scratch its job ties it, too

A group's place is hash(seed, its smallest id) in [0, 1), cut by the shares. An earlier split is honoured: nobody moves, a new
question joins the group that it touches, and one that would tie groups of two splits together is set aside and listed.

The leak check compares training questions with those that are measured: their words; with `passages` also an answer from the
same passage; with `near` also nearly the same words (Jaccard index of runs of three words, 0.8 or more).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from raglan.artifact import write_json
from raglan.corpus import Corpus
from raglan.documents import read_examples, write_examples
from raglan.errors import CorpusError, RecipeError
from raglan.records import Example
from raglan.text import answer_words, normalise_answer, question_key

__all__ = [
    "Leak",
    "Split",
    "check_leaks",
    "find_leaks",
    "gold_passages",
    "jaccard",
    "read_split",
    "split_examples",
    "withheld_passages",
    "write_split",
    "write_split_file",
]

log = logging.getLogger(__name__)
KIND = "split"
SHARES = {"train": 0.8, "dev": 0.1, "test": 0.1}
NEAR = 0.8
RUN = 3  # words
LARGE = 0.2  # of all questions: so large a group upsets the shares


@dataclass(frozen=True)
class Split:
    """Which question goes where.

    Attributes:
        places: question id → split.
        keys: question id → what ties it to others: its words, and its documents if it was split by them.
        aside: (question id, why it is in no split).
        largest: share of all placed questions that are in the largest group.
    """

    by: str
    seed: int
    shares: Mapping[str, float]
    places: Mapping[str, str]
    keys: Mapping[str, Sequence[str]]
    aside: Sequence[tuple[str, str]] = ()
    groups: int = 0
    largest: float = 0.0

    def of(self, examples: Iterable[Example]) -> dict[str, list[Example]]:
        """The examples of each split, each with `metadata["split"]`."""
        found: dict[str, list[Example]] = {name: [] for name in self.shares}
        for example in examples:
            if (name := self.places.get(example.id)) is not None:
                told = replace(example, metadata={**example.metadata, "split": name})
                found.setdefault(name, []).append(told)
        return found


def split_examples(
    examples: Sequence[Example],
    *,
    by: str = "question",
    shares: Mapping[str, float] | None = None,
    seed: int = 0,
    earlier: Split | None = None,
    corpus: Corpus | None = None,
) -> Split:
    """Examples → splits.

    Args:
        by: `question` or `document`.
        shares: split → share of the groups; they sum to 1.
        earlier: a split whose questions stay where they are.
        corpus: turns passage ids into their documents; without it an id is taken for a document, up to its last "#".

    Raises:
        RecipeError: shares that do not sum to 1. CorpusError: a question without a document, or an earlier split that already
            has a group on two sides.
    """
    shares = dict(shares or SHARES)
    if not shares or min(shares.values()) <= 0 or not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
        told = ",".join(f"{name}={share:g}" for name, share in shares.items())
        raise RecipeError(f"shares are {told or 'none'}; they must sum to 1, each above 0", hint="train=.8,dev=.1,test=.1")
    keys = {example.id: _keys(example, by, corpus) for example in examples}
    labels, places = _earlier(earlier, keys)
    new = sorted(identity for identity in keys if identity not in places)
    joined, aside = _join(new, keys, labels)
    places = {**places, **joined}
    left = [identity for identity in new if identity not in places and identity not in dict(aside)]
    groups = _components(left, keys)
    for group in groups:
        name = _drawn(min(group), seed, shares)
        places |= dict.fromkeys(group, name)
    known = {**(earlier.keys if earlier is not None else {}), **{name: own for name, own in keys.items() if name in places}}
    sizes = [len(group) for group in _components(sorted(places), known)]
    largest = max(sizes, default=0) / max(1, len(places))
    if by == "document" and largest > LARGE:
        log.warning(
            "%.0f %% of the questions are one group, tied by documents that they share: the shares cannot be kept",
            100 * largest,
        )
    return Split(by, seed, shares, places, known, aside, len(sizes), largest)


def _keys(example: Example, by: str, corpus: Corpus | None) -> list[str]:
    words = [f"question {question_key(example.query, example.history)}"]
    if by == "question":
        return words
    documents = sorted(set(_documents(example, corpus)))
    if job := _synth(example).get("job"):  # written from scratch, for a job: what was written for it belongs together
        words.append(f"job {job}")
        if not documents:
            return words
    if not documents:
        raise CorpusError(
            f"question {example.id!r} names no document, so it cannot be split by document",
            hint="`relevant` names passages or documents; or --by question",
        )
    return words + [f"document {name}" for name in documents]


def _documents(example: Example, corpus: Corpus | None) -> Iterator[str]:
    yield from (str(item["document"]) for item in example.metadata.get("evidence", ()))
    for identity in example.relevant:
        row = corpus.row(identity) if corpus is not None else None
        if row is not None and corpus is not None:
            yield corpus[row].document or identity
        else:
            head, mark, number = identity.rpartition("#")
            yield head if mark and number.isdigit() and corpus is None else identity

    for passage in gold_passages(example):
        if document := passage.get("document") or passage.get("id"):
            yield str(document)
    for passage in _synth(example).get("withheld") or ():  # it would have answered, and is what the question is about
        yield str(passage.get("document") or passage.get("id"))


def gold_passages(example: Example) -> list[Mapping[str, Any]]:
    """The passages that a synthetic example's answer rests on, gold or support in `metadata["synth"]["passages"]`; no noise."""
    listed = _synth(example).get("passages") or ()
    return [one for one in listed if isinstance(one, Mapping) and one.get("role") in ("gold", "support")]


def withheld_passages(example: Example) -> list[Mapping[str, Any]]:
    """The passages that would have answered, not shown, in `metadata["synth"]["withheld"]`; with text if no corpus has it."""
    return [one for one in _synth(example).get("withheld") or () if isinstance(one, Mapping)]


def _synth(example: Example) -> Mapping[str, Any]:
    found = example.metadata.get("synth")
    return found if isinstance(found, Mapping) else {}


def _earlier(earlier: Split | None, keys: Mapping[str, Sequence[str]]) -> tuple[dict[str, str], dict[str, str]]:
    """(key → split, id → split) of what is fixed already."""
    if earlier is None:
        return {}, {}
    owners: dict[str, dict[str, str]] = {}
    for identity, name in earlier.places.items():
        for key in {*earlier.keys.get(identity, ()), *keys.get(identity, ())}:
            owners.setdefault(key, {}).setdefault(name, identity)
    torn = {key: names for key, names in owners.items() if len(names) > 1}
    if torn:
        told = "; ".join(
            f"{key!r} in {', '.join(f'{name} ({identity})' for name, identity in names.items())}"
            for key, names in list(torn.items())[:10]
        )
        raise CorpusError(
            f"the earlier split has {len(torn)} groups on two sides: {told}",
            hint="it was made by question and is asked for by document, or was edited; make a new one in another folder",
        )
    return {key: next(iter(names)) for key, names in owners.items()}, dict(earlier.places)


def _join(
    new: Sequence[str], keys: Mapping[str, Sequence[str]], labels: Mapping[str, str]
) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """New questions that touch a fixed group, directly or through each other: where they go, and those that tie two."""
    labels, joined, aside = dict(labels), {}, {}
    changed = True
    while changed:
        changed = False
        for identity in new:
            touched = sorted({labels[key] for key in keys[identity] if key in labels})
            if identity in joined or identity in aside or not touched:
                continue
            changed = True
            if len(touched) > 1:
                aside[identity] = f"it would tie {' and '.join(touched)} together"
                continue
            joined[identity] = touched[0]
            labels |= dict.fromkeys(keys[identity], touched[0])
    return joined, list(aside.items())


def _components(identities: Sequence[str], keys: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Connected components over shared keys."""
    parent = {identity: identity for identity in identities}

    def root(identity: str) -> str:
        while parent[identity] != identity:
            parent[identity] = identity = parent[parent[identity]]
        return identity

    first: dict[str, str] = {}
    for identity in identities:
        for key in keys[identity]:
            parent[root(identity)] = root(first.setdefault(key, identity))
    found: dict[str, list[str]] = {}
    for identity in identities:
        found.setdefault(root(identity), []).append(identity)
    return list(found.values())


def _drawn(identity: str, seed: int, shares: Mapping[str, float]) -> str:
    digest = hashlib.sha256(f"{seed}:{identity}".encode()).digest()
    place, upto = int.from_bytes(digest[:8], "big") / 2**64, 0.0
    for name, share in shares.items():
        upto += share
        if place < upto:
            return name
    return list(shares)[-1]


def write_split(folder: Path, split: Split, examples: Sequence[Example]) -> dict[str, int]:
    """A file of questions for each split, `aside.jsonl`, and `split.json`, written last. Returns how many went where.

    Questions that an earlier split in this folder holds, and that are not given again, stay in their files.

    Raises:
        CorpusError: that earlier split holds questions which this one does not know, so they would be lost.
    """
    former, reasons = _former(folder, split, {example.id for example in examples})
    examples = [*former, *examples]
    reasons |= dict(split.aside)
    parts = split.of(examples)
    for name, part in parts.items():
        write_examples(folder / f"{name}.jsonl", part)
    aside = [replace(e, metadata={**e.metadata, "aside": reasons[e.id]}) for e in examples if e.id in reasons]
    write_examples(folder / "aside.jsonl", aside)
    write_split_file(folder / "split.json", split, reasons)
    return {name: len(part) for name, part in parts.items()}


def write_split_file(path: Path, split: Split, aside: Mapping[str, str] | None = None) -> None:
    """Which question goes where and why; `read_split` reads it."""
    write_json(path, {
        "kind": KIND, "by": split.by, "seed": split.seed, "shares": dict(split.shares),
        "questions": {name: {"split": place, "keys": list(split.keys[name])} for name, place in sorted(split.places.items())},
        "aside": dict(split.aside) if aside is None else dict(aside),
    })  # fmt: skip


def _former(folder: Path, split: Split, given: set[str]) -> tuple[list[Example], dict[str, str]]:
    """(questions of an earlier split in this folder that are not given again, why those of them in no split are in none)."""
    if not (folder / "split.json").is_file():
        return [], {}
    earlier = read_split(folder)
    moved = sorted(name for name, place in earlier.places.items() if split.places.get(name) != place)
    if moved:
        raise CorpusError(
            f"{folder} holds a split in which {len(moved)} questions are placed otherwise: {', '.join(moved[:10])}",
            hint="without --earlier it is honoured; or write into another folder",
        )
    reasons = {name: why for name, why in earlier.aside if name not in given and name not in split.places}
    files = [folder / f"{name}.jsonl" for name in (*dict.fromkeys(earlier.places.values()), "aside")]
    kept = [e for file in files if file.is_file() and file.stat().st_size for e in read_examples(file)]
    kept = [e for e in kept if e.id not in given and (e.id in earlier.places or e.id in reasons)]
    lost = sorted({*earlier.places, *reasons} - given - {example.id for example in kept})
    if lost:
        log.warning("%s names %d questions that stand in none of its files: %s", folder, len(lost), ", ".join(lost[:10]))
    return kept, reasons


def read_split(path: Path) -> Split:
    """A split from its `split.json`, or from the folder that holds it. Raises CorpusError."""
    file = path / "split.json" if path.is_dir() else path
    try:
        made: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if made.get("kind") != KIND:
            raise ValueError(f"kind is {made.get('kind')!r}")
        places = {name: str(row["split"]) for name, row in made["questions"].items()}
        keys = {name: [str(key) for key in row["keys"]] for name, row in made["questions"].items()}
        return Split(made["by"], made["seed"], made["shares"], places, keys, list(made["aside"].items()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise CorpusError(f"{file} is no split: {fault}", hint="`raglan split` writes split.json") from None


@dataclass(frozen=True)
class Leak:
    """Training question and measured question that share something."""

    train: str
    held_out: str
    what: str
    examples: tuple[Example, Example] = field(compare=False, repr=False)


def check_leaks(train: Sequence[Example], held_out: Sequence[Example], *, level: str, names: tuple[str, str]) -> None:
    """Refuse to train on what is measured.

    Args:
        level: `questions`, `passages` or `near`, each with the ones before it; `none` checks nothing.
        names: of the two sides, for the message.

    Raises:
        CorpusError: with the ids of all that leaks.
    """
    leaks = find_leaks(train, held_out, level=level)
    if not leaks:
        return
    kinds = Counter(leak.what for leak in leaks)
    pairs = "; ".join(f"{leak.train} = {leak.held_out}" for leak in leaks)
    raise CorpusError(
        f"{names[0]} and {names[1]} share {' and '.join(f'{count} {what}' for what, count in kinds.items())}, "
        f"so what is measured was learned: {pairs}",
        hint="split them with `raglan split`, or set leak_check (none, questions, passages, near) if this is meant",
    )


def find_leaks(train: Sequence[Example], held_out: Sequence[Example], *, level: str = "questions") -> list[Leak]:
    """Every measured question with the first training question that it shares something with."""
    if level == "none":
        return []
    ways = [("questions", _question)]
    ways += [("answers from one passage", _answered)] if level in ("passages", "near") else []
    leaks: dict[str, Leak] = {}
    for what, keys in ways:
        first: dict[str, Example] = {}
        for example in train:
            for key in keys(example):
                first.setdefault(key, example)
        for example in held_out:
            found = next((first[key] for key in keys(example) if key in first), None)
            if found is not None:
                leaks.setdefault(example.id, Leak(found.id, example.id, what, (found, example)))
    if level == "near":
        rest = [example for example in held_out if example.id not in leaks]
        leaks |= {leak.held_out: leak for leak in _near(train, rest)}
    return list(leaks.values())


def _question(example: Example) -> list[str]:
    return [question_key(example.query, example.history)]


def _answered(example: Example) -> list[str]:
    evidence = [f"{item['document']}\n{item.get('quote', '')}" for item in example.metadata.get("evidence", ())]
    answers = [form for answer in example.answers if (form := normalise_answer(answer))]
    return [f"{answer}\n{place}" for answer in answers for place in (*example.relevant, *evidence)]


def _near(train: Sequence[Example], held_out: Sequence[Example]) -> Iterator[Leak]:
    """Pairs whose runs of words overlap, by prefix filtering: such a pair shares one of the few rarest runs of each."""
    shingles = {id(example): _shingles(example) for example in (*train, *held_out)}
    counts = Counter(run for runs in shingles.values() for run in runs)
    index: dict[tuple[str, ...], list[Example]] = {}
    for example in train:
        for run in _rarest(shingles[id(example)], counts):
            index.setdefault(run, []).append(example)
    for example in held_out:
        own = shingles[id(example)]
        near = (other for run in _rarest(own, counts) for other in index.get(run, ()))
        found = next((other for other in near if jaccard(own, shingles[id(other)]) >= NEAR), None)
        if found is not None:
            yield Leak(found.id, example.id, "nearly equal questions", (found, example))


def _shingles(example: Example) -> frozenset[tuple[str, ...]]:
    words = [word for turn in (*example.history, example.query) for word in answer_words(turn)]
    if not words:  # "???" is like no other
        return frozenset()
    return frozenset(tuple(words[n : n + RUN]) for n in range(max(1, len(words) - RUN + 1)))


def _rarest(runs: frozenset[tuple[str, ...]], counts: Mapping[tuple[str, ...], int]) -> list[tuple[str, ...]]:
    ordered = sorted(runs, key=lambda run: (counts[run], run))
    return ordered[: len(ordered) - math.ceil(NEAR * len(ordered)) + 1]


def jaccard(a: frozenset[Any], b: frozenset[Any]) -> float:
    """|a ∩ b| / |a ∪ b|; 0 of two empty sets."""
    return len(a & b) / len(a | b) if a or b else 0.0
