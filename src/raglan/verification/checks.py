"""The checks that need no model, cheapest first: each a pure function of a written example.

A check passes, fails with a reason of its own, or does not apply. Answers are looked for as whole words, normalised and with
their numbers folded; quotes letter by letter, after NFKC and with white space folded.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raglan.refusals import abstained
from raglan.text import words
from raglan.verification.abstentions import declines, lacks
from raglan.verification.parts import misses
from raglan.verification.readings import CONFLICT, Reading, citable, one_sided, readings, uncited, unnamed
from raglan.verification.said import (
    CLOSED,
    FINAL,
    MARK,
    REASONING,
    SYNTAX,
    cited,
    concluded,
    fold_counts,
    holds,
    polarity,
)  # fmt: skip
from raglan.verification.talk import passage_talk
from raglan.verification.tongues import asks_for_another, in_language, language_of
from raglan.verification.written import FORMATS, Written

__all__ = ["FREE", "Verdict"]

Outcome = Literal["pass", "fail", "missing", "n/a"]
QUOTE = re.compile(
    r"##begin_quote##(.+?)##end_quote##|“([^”]+)”|\"([^\"\n]+)\"|「([^」]+)」|『([^』]+)』|‘((?:[^‘’]|’(?=\w))+)’", re.DOTALL
)
OUTDATED = "R7"
FEWEST_QUOTED = 3  # words: what is shorter may be a title or a word that is spoken of


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
    """It says something, of what was thought nothing, and the writer stopped by itself: half an answer is never a label."""
    if not words(one.target):
        return _failed("empty")
    if one.format not in SYNTAX and (tag := REASONING.search(one.target)):
        return _failed("reasoning_markup", tag.group())
    return _failed("truncated", one.finish) if one.finish not in ("", "stop", "eos", "end_turn") else PASSES


def language(one: Written) -> Told:
    """Question and answer are in the example's language; a cross one's in one of both, and some gold in the other."""
    if not one.language:
        return NOT_ASKED
    wanted = language_of(one.query) if one.language == "cross" else one.language
    if one.query_format != "mixed_language" and not in_language(one.query, wanted):
        return _failed("language", f"query is not {wanted}")
    free = one.format in ("code", "json", "table") or asks_for_another(one.query)
    if not free and not in_language(one.target, wanted):
        return _failed("language", f"target is not {wanted}")
    gold = [passage.text for passage in one.passages if passage.role == "gold"]
    if one.language == "cross" and gold and all(language_of(text) == wanted for text in gold):
        return _failed("language", f"no passage is of another language than {wanted}")
    return PASSES


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
    "number": lambda one: any(letter.isdigit() for letter in fold_counts(one.target)),
    "yes_no": lambda one: bool(polarity(one.target)),
    "list": lambda one: len(re.findall(r"[\n;；,，、]", one.target.strip())) > 0,
    "cited": lambda one: bool(MARK.search(one.target)),
    "reasoning": lambda one: bool(QUOTE.search(one.target)) and FINAL in one.target,
}  # fmt: skip


def stands_alone(one: Written) -> Told:
    """The question stands by itself: it speaks of no passage and of no file that it is asked of."""
    found = passage_talk(one.query)
    return _failed("passage_talk", found) if found else PASSES


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
    """Every mark is in range, every gold passage is cited, and no noise is; of a conflict each reading, by its own."""
    numbers = cited(one)
    if not numbers:
        return NOT_ASKED
    for number in numbers:
        if not 1 <= number <= len(one.passages):
            return _failed("citation_out_of_range", f"[{number}] of {len(one.passages)}")
    said = readings(one) if one.evidence == CONFLICT else None
    against = citable(said) if said is not None else frozenset[int]()
    for number in numbers:
        if one.passages[number - 1].role == "noise" and number not in against and not _against(one, number):
            return _failed("noise_cited", f"[{number}]")
    if said is not None:
        return PASSES  # whether each reading is cited, `counterfactual` tells, behind whether it is there
    left = [n for n in _needed(one) if n not in numbers]
    return _failed("gold_not_cited", ", ".join(f"[{n}]" for n in left)) if left else PASSES


def _against(one: Written, number: int) -> bool:
    """Whether noise may be cited all the same: it contradicts the evidence, or is outdated and the target says what it says."""
    passage = one.passages[number - 1]
    outdated = one.evidence == OUTDATED and passage.kind in ("", "outdated") and bool(holds([one.target], passage.false))
    return outdated or (one.evidence == CONFLICT and bool(passage.false))


def _needed(one: Written) -> list[int]:
    """The gold that has to be cited: all of it; of old and new, what holds the answer, if strings tell."""
    gold = {n: passage for n, passage in enumerate(one.passages, 1) if passage.role == "gold"}
    holding = [n for n, own in gold.items() if one.evidence == OUTDATED and holds([own.title, own.text], one.answers)]
    return holding or [*gold]


def counterfactual(one: Written) -> Told:
    """It does not say a false value without the true one; of a conflict it names each reading, with who says it."""
    false = [value for passage in one.passages for value in passage.false]
    said = readings(one) if one.evidence == CONFLICT else None
    if not false and said is None:
        return NOT_ASKED
    followed = holds([concluded(one)], false)
    if followed and not holds([concluded(one)], one.answers) and (said is None or one_sided(one, said)):
        return _failed("counterfactual_followed", followed[0])
    return PASSES if said is None else _sides(one, said)


def _sides(one: Written, said: Sequence[Reading]) -> Told:
    if value := one_sided(one, said):
        return _failed("one_sided", value)
    if value := uncited(one, said):
        return _failed("reading_not_cited", value)
    return _failed("reading_unnamed") if unnamed(one) else PASSES


def gold_absent(one: Written) -> Told:
    """Without gold the target is what its policy says, and nothing shown holds the answer; with gold it does not decline."""
    if not one.gold_absent:
        return _failed("abstains") if declines(one) else PASSES
    others = [passage for passage in one.passages if not (one.policy == "partial" and passage.role == "gold")]
    shown = [] if one.format in CLOSED else holds((text for own in others for text in (own.title, own.text)), one.answers)
    if shown:
        return _failed("answer_shown", shown[0])
    declined = abstained(one.target, one.answers)
    if one.policy == "abstain":
        reason, detail = ("does_not_abstain", "") if not declined else ("", "") if one.format in CLOSED else lacks(one)
        return _failed(reason, detail) if reason else PASSES
    if declined and (one.answers or not one.answers_part):  # of a part without known answers nobody knows what is beside
        return _failed("abstains")
    if one.policy == "own_knowledge":
        return PASSES if holds([one.target], one.answers) else _failed("not_the_known_answer")
    reason, detail = misses(one)
    return _failed(reason, detail) if reason else PASSES


FREE: Mapping[str, Callable[[Written], Told]] = {
    "finish": finish, "language": language, "length": length, "format": form, "passage_talk": stands_alone, "quotes": quotes,
    "citations": citations, "counterfactual": counterfactual, "gold_absent": gold_absent,
}  # fmt: skip


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())
