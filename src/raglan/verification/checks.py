"""The checks that need no model, cheapest first: each a pure function of a written example.

A check passes, fails with a reason of its own, or does not apply. Answers are looked for as whole words, normalised and with
their numbers folded; quotes letter by letter, after NFKC and with white space folded.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from raglan.metrics import found_answers
from raglan.refusals import abstained
from raglan.text import SPACELESS, answer_words, fold_numbers, words
from raglan.verification.written import FORMATS, Written

__all__ = ["CLOSED", "FREE", "YES_NO", "Verdict", "concluded", "holds"]

Outcome = Literal["pass", "fail", "missing", "n/a"]
CLOSED = ("option", "label", "yes_no")  # answers that stand in no passage
YES_NO = ("yes", "no", "是", "否", "不")
SYNTAX = ("json", "code")  # where marks of quotation quote nobody
FINAL = "<ANSWER>:"
MARK = re.compile(r"\[\s*\d+(?:\s*[,;，、]\s*\d+)*\s*\]|【\s*\d+(?:\s*[,;，、]\s*\d+)*\s*】")
QUOTE = re.compile(r"##begin_quote##(.+?)##end_quote##|“([^”]+)”|\"([^\"\n]+)\"|「([^」]+)」", re.DOTALL)
FEWEST_QUOTED = 3  # words: what is shorter may be a title or a word that is spoken of
FILE = re.compile(r"\b[\w-]+\.(?:pdf|docx?|pptx?|xlsx?|html?|txt|md|csv|jsonl?|tex)\b", re.IGNORECASE)
HAN = re.compile(f"[{SPACELESS}]")
EVERYWHERE = frozenset(["the", "of", "and", "to", "in", "is", "a", "was", "for", "that", "it", "on", "as", "with", "by", "are"])
LONG = 20  # words; so long a text without one of the commonest is not English
LATIN_IN_CHINESE, HAN_IN_ENGLISH = 0.7, 0.1  # of a text's letters


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check says. `missing`: its verifier failed or is not there, which is never a pass."""

    check: str
    outcome: Outcome
    reason: str = ""
    detail: str = ""


Told = tuple[Outcome, str, str]
PASSES: Told = ("pass", "", "")
NOT_ASKED: Told = ("n/a", "", "")


def _failed(reason: str, detail: str = "") -> Told:
    return "fail", reason, detail


def finish(one: Written) -> Told:
    """It says something, and the writer stopped by itself: half an answer is never a label."""
    if not words(one.target):
        return _failed("empty")
    return _failed("truncated", one.finish) if one.finish not in ("", "stop", "eos", "end_turn") else PASSES


def language(one: Written) -> Told:
    """Question and answer are in the example's language, by script and by the commonest words."""
    if one.language in ("", "cross"):
        return NOT_ASKED
    for name in ("query", "target"):
        if (name == "query" or one.format not in ("code", "json", "table")) and not _in_language(
            getattr(one, name), one.language
        ):
            return _failed("language", f"{name} is not {one.language}")
    return PASSES


def _in_language(text: str, wanted: str) -> bool:
    letters = [letter for letter in text if letter.isalpha()]
    if not letters:
        return True
    han = sum(bool(HAN.match(letter)) for letter in letters) / len(letters)
    if wanted == "zh":
        return han >= 1 - LATIN_IN_CHINESE or len(words(text)) <= 5  # a name may be Latin
    latin = sum("LATIN" in unicodedata.name(letter, "") for letter in letters) / len(letters)
    said = words(text)
    return han <= HAN_IN_ENGLISH and latin > 1 / 2 and (len(said) < LONG or bool(EVERYWHERE & set(said)))


def length(one: Written) -> Told:
    """As many words as its format has."""
    low, high = FORMATS[one.format]
    count = len(words(one.target))
    return PASSES if one.declines or low <= count <= high else _failed("length", f"{count} words; {low} to {high} are allowed")


def form(one: Written) -> Told:
    """What the format asks for is there."""
    fits = FORMS.get(one.format)
    if fits is None or one.declines:
        return NOT_ASKED
    return PASSES if fits(one) else _failed("format", f"is no {one.format}")


def _is_label(one: Written) -> bool:
    said = one.target.strip().rstrip(".。)）").lstrip("(（").strip().casefold()
    return said in {label.casefold() for label in one.labels} if one.labels else bool(said)


def _is_option(one: Written) -> bool:
    return _is_label(one) if one.labels else bool(re.fullmatch(r"[(（]?[A-J][)）.。]?", one.target.strip()))


def _is_json(one: Written) -> bool:
    try:
        made: Any = json.loads(one.target)
    except ValueError:
        return False
    return not one.fields or (isinstance(made, dict) and set(made) == set(one.fields))


def _is_table(one: Written) -> bool:
    columns = [line.count("|") for line in one.target.strip().splitlines()]
    return len(columns) > 1 and columns[0] > 0 and len(set(columns)) == 1


FORMS: Mapping[str, Callable[[Written], bool]] = {
    "label": _is_label, "option": _is_option, "json": _is_json, "table": _is_table,
    "number": lambda one: any(letter.isdigit() for letter in fold_numbers(one.target)),
    "yes_no": lambda one: (words(one.target) or [""])[0] in YES_NO,
    "list": lambda one: len(re.findall(r"[\n;；,，、]", one.target.strip())) > 0,
    "cited": lambda one: bool(MARK.search(one.target)),
    "reasoning": lambda one: bool(QUOTE.search(one.target)) and FINAL in one.target,
}  # fmt: skip


def passage_talk(one: Written) -> Told:
    """The question stands by itself: it names no passage and no file."""
    said = f" {' '.join(answer_words(one.query))} "
    for phrase in _passage_talk():
        if phrase in said:
            return _failed("passage_talk", phrase.strip())
    found = FILE.search(one.query)
    return _failed("passage_talk", found.group()) if found else PASSES


def quotes(one: Written) -> Told:
    """What is quoted stands, word for word, in one shown passage."""
    quoted = [(bool(marked), marked or "".join(others)) for marked, *others in QUOTE.findall(one.target)]
    fewest = math.inf if one.format in SYNTAX else FEWEST_QUOTED
    asked = [text for marked, text in quoted if marked or len(words(text)) >= fewest]
    shown = [_folded(passage.text) for passage in one.passages]
    made_up = [text for text in asked if not any(_folded(text) in text_shown for text_shown in shown)]
    if made_up:
        return _failed("fabricated_quote", made_up[0].strip())
    return PASSES if asked else NOT_ASKED


def citations(one: Written) -> Told:
    """Every mark is in range, every gold passage is cited, and no noise is."""
    cited = [int(number) for mark in MARK.findall(one.target) for number in re.findall(r"\d+", mark)]
    if not cited:
        return NOT_ASKED
    for number in cited:
        if not 1 <= number <= len(one.passages):
            return _failed("citation_out_of_range", f"[{number}] of {len(one.passages)}")
    for number in cited:
        if one.passages[number - 1].role == "noise" and one.evidence != "R6":  # there both readings are named
            return _failed("noise_cited", f"[{number}]")
    left = [n for n, passage in enumerate(one.passages, 1) if passage.role == "gold" and n not in cited]
    return _failed("gold_not_cited", ", ".join(f"[{n}]" for n in left)) if left else PASSES


def counterfactual(one: Written) -> Told:
    """It does not say a false value without the true one; where passages contradict each other it says both."""
    false = [value for passage in one.passages for value in passage.false]
    if not false:
        return NOT_ASKED
    followed = holds([concluded(one)], false)
    if followed and not holds([concluded(one)], one.answers):
        return _failed("counterfactual_followed", followed[0])
    if one.evidence == "R6" and not holds([one.target], false):
        return _failed("one_sided", false[0])
    return PASSES


def concluded(one: Written) -> str:
    """What a target says in the end: of a reasoning what stands behind its mark, since before it every reading is quoted."""
    return one.target.rpartition(FINAL)[2] if one.format == "reasoning" else one.target


def gold_absent(one: Written) -> Told:
    """Without gold the target is what its policy says, and nothing shown holds the answer; with gold it does not decline."""
    declines = abstained(one.target, one.answers)
    if not one.gold_absent:
        return _failed("abstains") if declines else PASSES
    others = [passage for passage in one.passages if not (one.policy == "partial" and passage.role == "gold")]
    shown = [] if one.format in CLOSED else holds((text for own in others for text in (own.title, own.text)), one.answers)
    if shown:
        return _failed("answer_shown", shown[0])
    if one.policy == "abstain":
        return PASSES if declines else _failed("does_not_abstain")
    if one.policy == "own_knowledge" and not holds([one.target], one.answers):
        return _failed("not_the_known_answer")
    return _failed("abstains") if declines else PASSES


FREE: Mapping[str, Callable[[Written], Told]] = {
    "finish": finish, "language": language, "length": length, "format": form, "passage_talk": passage_talk, "quotes": quotes,
    "citations": citations, "counterfactual": counterfactual, "gold_absent": gold_absent,
}  # fmt: skip


def holds(texts: Iterable[str], answers: Sequence[str]) -> list[str]:
    """The answers that stand, as whole words and with numbers folded, in any of the texts."""
    folded = [fold_numbers(text) for text in texts]
    return [answer for answer in answers if found_answers(folded, [fold_numbers(answer)])]


@cache
def _passage_talk() -> tuple[str, ...]:
    told = yaml.safe_load(Path(__file__).with_name("phrases.yaml").read_text(encoding="utf-8"))
    return tuple(f" {' '.join(answer_words(phrase))} " for phrase in told["passage_talk"])


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())
