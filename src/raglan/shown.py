"""Rows of examples whose passages were written down: what a generator reads in training is what was shown when they were made.

    own       instruction, passages and question as the example has them, by the same function that rendered it
    recipe    question and passages by the recipe's prompt, as in evaluation, without the instruction

An example holds its passages in `metadata["synth"]`, K of them in their order, and no two need have the same K. Loss is on its
target and the end token. No passage is cut in the middle: an example that does not fit as a whole is left out and counted.

A mixture takes two files, of questions that people asked (KIQA) and synthetic ones. Its three forms differ in their source and
in nothing else: all have the same size, in examples or in answer tokens; equally many examples are equally many steps. What a
file lacks is shown again, and the repeats are counted.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raglan.documents import read_examples
from raglan.errors import CorpusError, RecipeError
from raglan.generator import HFGenerator
from raglan.progress import track
from raglan.recipe import ShownData
from raglan.records import Example, Passage
from raglan.rendering import read_rendering, render

__all__ = ["Shown", "shown_rows"]

log = logging.getLogger(__name__)
Row = dict[str, list[int]]


@dataclass(frozen=True)
class Shown:
    """Rows, held-out rows, and what the stage's manifest is to say of them."""

    rows: Sequence[Row]
    held_out: Sequence[Row]
    figures: dict[str, Any]


def shown_rows(data: ShownData, generator: HFGenerator, *, seed: int) -> Shown:
    """Rows for the `answer` objective, in an order drawn with the seed.

    Raises:
        CorpusError: an example without passages or target, or of the split `test`; or not one that fits.
        CheckpointError: an example whose rendering has changed since. RecipeError: instructions that may not be left out.
    """
    made, figures = {}, {}
    for name, path in data.files.items():
        rows, told = _made(path, data, generator)
        made[name], figures[name] = rows, told
    size = _size(data, made)
    chosen: list[Row] = []
    for name in data.sources:
        share = size // len(data.sources) + (name == data.sources[0]) * (size % len(data.sources))
        rows, repeats = _drawn(made[name], share, f"{seed}:{name}", tokens=data.match == "answer_tokens")
        figures[name] |= {"learned": len(rows), "answer_tokens": sum(map(_answer, rows)), "repeats": repeats}
        chosen += rows
    random.Random(f"{seed}:mix").shuffle(chosen)
    held_out = _made(data.dev, data, generator)[0] if data.dev is not None else []
    told = {"mix": data.mix, "match": data.match, "size": size, "sources": {name: figures[name] for name in data.sources}}
    return Shown(chosen, held_out, {**told, "rows": len(chosen)})


def _made(path: Path, data: ShownData, generator: HFGenerator) -> tuple[list[Row], dict[str, Any]]:
    """All rows of a file that fit, and how many there were."""
    examples = read_examples(path, split="train")
    tested = [example.id for example in examples if example.metadata.get("split") == "test"]
    if tested and not data.allow_test:
        raise CorpusError(
            f"{path} holds {len(tested)} examples of the split `test`: {', '.join(tested[:10])}",
            hint="train on the file of another split, or set data.allow_test: true",
        )
    if data.prompt == "recipe":
        _check_one_policy(examples, path)
    rows = [row for example in track(examples, "rendering") if (row := _row(example, data, generator, path)) is not None]
    if not rows:
        raise CorpusError(f"{path}: no example fits into {generator.prompt.budget} tokens", hint="raise prompt.max_tokens")
    if len(rows) < len(examples):
        log.warning("%s: %d of %d examples do not fit whole and are left out", path, len(examples) - len(rows), len(examples))
    return rows, {"path": str(path), "examples": len(examples), "left_out": len(examples) - len(rows)}


def _row(example: Example, data: ShownData, generator: HFGenerator, path: Path) -> Row | None:
    """One example's row; None where something of it would have to be cut."""
    synth = _synth(example, path)
    passages = [_passage(one) for one in synth["passages"]]
    prompt = generator.prompt
    labels = generator.answer_ids(str(synth["target"]), "")
    if not generator.is_seq2seq and generator.positions is not None:
        prompt = prompt.within(min(prompt.budget, generator.positions - len(labels) - 1))
    try:
        if data.prompt == "recipe":
            rendered = prompt.render(example.query, passages, history=example.history)
        else:
            where = f"{path}: example {example.id!r}"
            rendering = read_rendering(synth.get("rendering", {}), where=where)
            asked = str(synth.get("instruction", ""))
            rendered = render(prompt, rendering, example.query, passages, instruction=asked, history=example.history)
    except RecipeError:  # the question alone, or so many passages, do not fit
        return None
    whole = not (rendered.cut_tokens or rendered.dropped_turns or rendered.dropped_shots)
    return generator.row(rendered, str(synth["target"])) if whole else None


def _synth(example: Example, path: Path) -> Mapping[str, Any]:
    synth = example.metadata.get("synth")
    if not isinstance(synth, Mapping) or not synth.get("passages") or not synth.get("target"):
        raise CorpusError(
            f"{path}: example {example.id!r} does not say which passages were shown, or what is learned",
            hint="data.kind: shown takes what `raglan synthesize` writes; questions as such are data.kind: questions",
        )
    return synth


def _passage(one: Mapping[str, Any]) -> Passage:
    title, document, date = (str(one.get(name) or "") for name in ("title", "document", "date"))
    return Passage(str(one["id"]), str(one["text"]), title, document, date=date)


def _check_one_policy(examples: Sequence[Example], path: Path) -> None:
    """Without instructions equal inputs would get unequal targets where there is more than one policy."""
    policies = Counter(str(_synth(example, path)["policy"]) for example in examples if "policy" in _synth(example, path))
    if len(policies) > 1:
        raise RecipeError(
            f"{path} has {len(policies)} policies for what no passage answers: {', '.join(sorted(policies))}; "
            "data.prompt: recipe leaves out the instruction that says which",
            hint="data.prompt: own, or write them with one: synthesis.weights.absent_policy: {abstain: 1}",
        )


def _size(data: ShownData, made: Mapping[str, Sequence[Row]]) -> int:
    """What each form of the mixture has, in examples or answer tokens: as much as the smaller file, unless it is said."""
    if data.size is not None:
        return data.size
    if data.match == "answer_tokens":
        return min(sum(map(_answer, rows)) for rows in made.values())
    return min(map(len, made.values()))


def _drawn(rows: Sequence[Row], size: int, seed: str, *, tokens: bool) -> tuple[list[Row], int]:
    """Rows until there are so many, or so many answer tokens: each once before any comes twice; and how many came again."""
    chance, found, had = random.Random(seed), list[Row](), 0
    while had < size:
        for row in chance.sample(list(rows), len(rows)):
            if had >= size:
                break
            found.append(row)
            had += _answer(row) if tokens else 1
    return found, max(0, len(found) - len(rows))


def _answer(row: Row) -> int:
    return len(row["labels"])
