"""Passages made from others: a false twin, the evidence again in other order or words, the evidence damaged; and what pages
hold beside their text.

Each operator is a pure function of a passage and a seed, and gives None where it cannot do what it says: a counterfactual
none of whose answers is left, a near duplicate that still answers and yet differs, a garbled passage that is damaged. The id
names parent, operator and content, so that equal ids are equal passages.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import replace

from raglan.perturb.guard import held, searchable
from raglan.perturb.slot import Slot, content_hash
from raglan.perturb.spellings import respelled
from raglan.perturb.values import replaced, swap, value_type
from raglan.perturb.words import WORDS
from raglan.records import Example, Passage
from raglan.text import placed_words, sentences

__all__ = ["boilerplate", "counterfactual", "garbled", "near_duplicate"]

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
_REWORDED: dict[str, str] = WORDS["reworded"]
_ALIKE: dict[str, str] = WORDS["alike"]
DAMAGE = 0.12  # of the characters


def counterfactual(
    example: Example, source: Slot, *, seed: str, pool: Sequence[str] = (), avoid: str = ""
) -> Slot | None:  # fmt: skip
    """A passage that answers, with a false value of the same type in all spellings of the answer, title included.

    None where the truth stands in a spelling that cannot be changed along with it.

    Args:
        source: gold or support.
        pool, avoid: see `raglan.perturb.values.swap`; the question and the source are avoided anyway.
    """
    passage = source.passage
    said, answers = f"{passage.title}\n{passage.text}", searchable(example.answers)
    others = respelled(said, answers)
    values = swap([*answers, *others], seed=seed, pool=pool, avoid=f"{example.query}\n{said}\n{avoid}")
    title, text = replaced(passage.title, values), replaced(passage.text, values)
    false = [value for old, value in values.items() if old not in others]
    made = _made(passage, "swap", title=title, text=text)
    if not false or not held(made, false) or held(made, answers) or respelled(f"{title}\n{text}", answers):
        return None
    operator = f"swap_{value_type(answers[0])}"
    return Slot(made, "noise", "counterfactual", "made", operator, (passage.id,), "clean", value=false[0])


def near_duplicate(example: Example, source: Slot, *, seed: str) -> Slot | None:
    """The evidence with its sentences in another order, or, where there is one sentence, in other words."""
    passage, generator = source.passage, random.Random(seed)
    parts = sentences(passage.text)
    joint = "" if _HAN.search(passage.text) else " "
    reordered = joint.join(generator.sample(parts, len(parts)))
    operator = "reorder"
    if " ".join(reordered.split()) == " ".join(passage.text.split()):
        reordered, operator = _reworded(passage.text, example.answers), "reword"
    made = _made(passage, operator, text=reordered)
    answers = searchable(example.answers)
    if content_hash(made) == content_hash(passage) or (answers and not held(made, answers)):
        return None
    return Slot(made, "redundant", "near_duplicate", "made", operator, (passage.id,))


def garbled(example: Example, source: Slot, *, seed: str) -> Slot | None:
    """The evidence cut off, or with a scanner's mistakes. What is left of it decides: redundant, or noise."""
    passage, generator = source.passage, random.Random(seed)
    operator = generator.choice(("truncate", "scan"))
    text = _truncated(passage.text, generator) if operator == "truncate" else _scanned(passage.text, generator)
    made = _made(passage, operator, text=text)
    if not text.strip() or content_hash(made) == content_hash(passage):
        return None
    slot = Slot(made, "noise", "garbled", "made", operator, (passage.id,), "clean")
    answers = searchable(example.answers)
    if not answers:
        return replace(slot, guard="unchecked")
    return replace(slot, role="redundant", guard="also_gold") if held(made, answers) else slot


def boilerplate(query: str, *, seed: str) -> Slot:
    """Navigation, licence or cookie text, in the question's language; always the page's own, never a passage's."""
    generator = random.Random(seed)
    language = "zh" if _HAN.search(query) else "en"
    site, part = (generator.choice(WORDS[name][language].split()) for name in ("sites", "parts"))
    text = generator.choice(WORDS["pages"][language]).format(site=site, part=part)
    return Slot(_made(Passage("page", ""), "boilerplate", text=text), "noise", "boilerplate", "made", "boilerplate")


def _made(parent: Passage, operator: str, *, text: str, title: str | None = None) -> Passage:
    title = parent.title if title is None else title
    name = hashlib.blake2b(f"{title}\0{text}".encode(), digest_size=4).hexdigest()
    return replace(parent, id=f"{parent.id}~{operator}-{name}", text=text, title=title)


def _reworded(text: str, answers: Sequence[str]) -> str:
    """Usual words replaced by others, but none that an answer holds."""
    kept = " ".join(answers).lower()
    for old in (old for old in _REWORDED if old not in kept):
        edge = "" if _HAN.search(old) else r"\b"
        text, count = re.subn(f"{edge}{old}{edge}", _REWORDED[old], text, count=1)
        if count:
            return text
    return text


def _truncated(text: str, generator: random.Random) -> str:
    """The first 30 to 70 % of the words, with no regard to sentences."""
    words = placed_words(text)
    if len(words) < 2:
        return ""
    kept = max(1, min(len(words) - 1, int(len(words) * generator.uniform(0.3, 0.7))))
    return text[: words[kept - 1].end]


def _scanned(text: str, generator: random.Random) -> str:
    """Characters mistaken for others that look alike, dropped, or torn apart."""
    letters = []
    for letter in text:
        damaged = generator.random() < DAMAGE and letter.isalnum()
        letters.append(generator.choice((_ALIKE.get(letter, ""), "", f"{letter} ")) if damaged else letter)
    return "".join(letters)
