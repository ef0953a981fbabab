"""A false value of the same type: another year for a year, another bridge for a bridge, in the spelling that it stands in.

What an answer is, is read off its form. Of a number or date one numeral is changed, a year if there is one, to one with as many
digits, and every other spelling of the answer changes with it: 1998年 → 2003年, 一九九八年 → 二〇〇三年, 3,000 → 4,700. Of a
name the head that says what it is stays (… University, … 大桥) and the rest becomes one of a few names that are nobody's.
Anything else is taken from `pool`, the answers of other questions, by the same form; names are, too, where one fits.

This knows no world: "Paris" may become a surname. A pool of answers that a person has looked through is better.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import lru_cache

from raglan.perturb.guard import WEEKDAYS, closed_label, held, numeric, searchable
from raglan.perturb.words import WORDS
from raglan.records import Passage
from raglan.text import Placed, han_numeral, placed_words

__all__ = ["replaced", "swap", "value_type"]

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
_MONTHS: list[str] = WORDS["months"]
_HEADS = {language: words.split() for language, words in WORDS["heads"].items()}
_STEMS = {language: words.split() for language, words in WORDS["stems"].items()}
_GIVEN = {language: words.split() for language, words in WORDS["given"].items()}
_SURNAMES: list[str] = WORDS["surnames"].split()
_HAN_DAYS = "一二三四五六日"
TRIES = 64


@lru_cache(maxsize=1 << 16)
def value_type(answer: str) -> str:
    """year, date, number, name, phrase, or label where there is nothing to swap."""
    if not searchable([answer]) or closed_label(answer):
        return "label"
    places = placed_words(answer)
    words = [placed.word for placed in places]
    if numeric(answer):
        dated = any(word in "年月日号號" or word.capitalize() in _MONTHS for word in words) or _weekday(words)
        if (len(words) == 1 and _year(places[0])) or words[1:] == ["年"]:
            return "year"
        return "date" if dated else "number"
    if any(word.isdigit() for word in words) and len(words) <= 3 and not answer[:1].isupper():
        return "number"  # with a unit
    return "name" if _HAN.search(answer) or answer[:1].isupper() else "phrase"


def swap(answers: Sequence[str], *, seed: str, pool: Sequence[str] = (), avoid: str = "") -> dict[str, str]:
    """Each answer → its false counterpart, the first answer's standing first; empty where none of its type is known.

    Args:
        seed: equal seeds give equal values.
        pool: answers of other questions.
        avoid: text that the false value may not occur in, such as the question and the evidence.
    """
    wanted = searchable(answers)
    if not wanted:
        return {}
    generator = random.Random(seed)
    kind = value_type(wanted[0])
    for _ in range(TRIES):
        made = _numbers(wanted, generator) if kind in ("year", "date", "number") else _names(wanted, kind, generator, pool)
        if made and not _betrays(made, wanted, avoid):
            return made
    return {}


def replaced(text: str, values: dict[str, str]) -> str:
    """The text with every answer, however it is cased and its numerals are written, in its counterpart; the longest first."""
    for old in sorted(values, key=len, reverse=True):
        wanted = [placed.word for placed in placed_words(old)]
        for start, end in reversed(_places(text, wanted)):
            head, new, tail = _fitted(text[:start], old, values[old], text[end:])
            text = head + _styled(new, text[len(head) : len(text) - len(tail)]) + tail
    return text


def _fitted(head: str, old: str, new: str, tail: str) -> tuple[str, str, str]:
    """What is around a place and the value to put there, so that no sign about the value stands twice: "$", "%", "。"."""
    (left, right), (before, behind) = _edges(old), _edges(new)
    core = new[len(before) : len(new) - len(behind)]
    if head.endswith(before) or left == before:  # there already, or written otherwise or not at all in this place
        before = ""
    else:
        head = head.removesuffix(left)
    if tail.startswith(behind) or right == behind:
        behind = ""
    else:
        tail = tail.removeprefix(right)
    return head, f"{before}{core}{behind}", tail


def _edges(value: str) -> tuple[str, str]:
    """What stands before the first word of a value, and behind the last."""
    places = placed_words(value)
    return (value[: places[0].start], value[places[-1].end :]) if places else ("", "")


def _places(text: str, wanted: Sequence[str]) -> list[tuple[int, int]]:
    words, size, found, at = placed_words(text), len(wanted), [], 0
    while wanted and at + size <= len(words):
        if [placed.word for placed in words[at : at + size]] == list(wanted):
            found.append((words[at].start, words[at + size - 1].end))
            at += size - 1
        at += 1
    return found


def _betrays(made: dict[str, str], answers: Sequence[str], avoid: str) -> bool:
    """Whether a false value is or holds an answer, is held by one, or stands in what is to be avoided."""
    false = list(made.values())
    return held(Passage("", "\n".join([*answers, avoid])), false) or held(Passage("", "\n".join(false)), answers)


def _numbers(answers: Sequence[str], generator: random.Random) -> dict[str, str]:
    """One numeral of the first answer changed, and the same one in all answers; none where an answer lacks it."""
    places = placed_words(answers[0])
    words = [placed.word for placed in places]
    numerals = [at for at, word in enumerate(words) if word.isdigit()]
    if not numerals:
        return _worded(answers, words, generator)
    at = max(numerals, key=lambda at: (_year(places[at]), words[at + 1 : at + 2] in (["日"], ["号"], ["號"])))
    old, month = words[at], words[at + 1 : at + 2] == ["月"]
    new = str(generator.randint(1, 12)) if month else _another(old, generator, year=_year(places[at]))
    made = {answer: _renumbered(answer, old, new) for answer in answers}
    return {} if any(answer == false for answer, false in made.items()) else made


def _worded(answers: Sequence[str], words: Sequence[str], generator: random.Random) -> dict[str, str]:
    """Of an answer without digits, a month, a day or a number in words exchanged for another; "may" is a word too."""
    days = list(_HAN_DAYS) if _weekday(words) else []
    for series in ([month.lower() for month in _MONTHS], WEEKDAYS, WORDS["counts"].split(), days):
        old = next((word for word in words if word in series), "")
        if old and len(answers) == 1:
            new = generator.choice([word for word in series if word not in (old, "may")])
            place = next(placed for placed in placed_words(answers[0]) if placed.word == old)
            head, model, tail = answers[0][: place.start], answers[0][place.start : place.end], answers[0][place.end :]
            return {answers[0]: f"{head}{_cased(new, model)}{tail}"}
    return {}


def _weekday(words: Sequence[str]) -> bool:
    """Friday, 星期五, 周五."""
    return (len(words) > 1 and words[-1] in _HAN_DAYS + "天") or any(word in WEEKDAYS for word in words)


def _cased(word: str, model: str) -> str:
    return word.capitalize() if model[:1].isupper() else word


def _year(placed: Placed) -> bool:
    """Whether a numeral is written as years are: 1998, 一九九八; 3,000 and 三千 are none."""
    return re.fullmatch(r"1\d{3}|20\d\d", placed.word) is not None and placed.end - placed.start == 4


def _another(word: str, generator: random.Random, *, year: bool) -> str:
    """A number of as many digits: a year within 40 years, else anything that ends in as many zeros."""
    number = int(word)
    if year:
        return str(number + generator.choice([step for step in range(-40, 30) if step and 1000 <= number + step < 2100]))
    zeros = len(word) - len(word.rstrip("0")) if number else 0
    step = 10**zeros
    low, high = 10 ** (len(word) - 1), 10 ** len(word) - 1
    if len(word) == 2 and number <= 31:
        high = 28  # a day, for all that is known
    choices = [value for value in (generator.randrange(low, high + 1) // step * step for _ in range(8)) if value != number]
    return str(choices[0] or 1) if choices else word


def _renumbered(text: str, old: str, new: str) -> str:
    for placed in reversed(placed_words(text)):
        if placed.word == old:
            text = text[: placed.start] + _as_written(new, text[placed.start : placed.end]) + text[placed.end :]
    return text


def _as_written(number: str, model: str) -> str:
    """A number in the manner of another: 一九九八, 三千, 3,000 or 3000."""
    if _HAN.search(model) or "〇" in model:
        plain = not re.search("[十百千万萬亿億]", model)
        digits = "".join("〇一二三四五六七八九"[int(sign)] for sign in number)
        return digits if plain or int(number) >= 10**8 else han_numeral(int(number))
    return f"{int(number):,}" if "," in model else number


def _styled(value: str, model: str) -> str:
    """A false value written as the place had it: its numerals' manner, and capitals where the place was in capitals."""
    if model.isupper() and len(model) > 1 and value.isascii():
        return value.upper()
    theirs = [placed for placed in placed_words(model) if placed.word.isdigit()]
    own = [placed for placed in placed_words(value) if placed.word.isdigit()]
    if len(theirs) != len(own):
        return value
    for mine, model_place in reversed(list(zip(own, theirs, strict=True))):
        value = value[: mine.start] + _written_like(mine, model, model_place) + value[mine.end :]
    return value


def _written_like(own: Placed, model: str, place: Placed) -> str:
    return _as_written(own.word, model[place.start : place.end])


def _names(answers: Sequence[str], kind: str, generator: random.Random, pool: Sequence[str]) -> dict[str, str]:
    """All answers become the same false one, and the last word of a name in several words the last of the false one."""
    first = answers[0]
    same = sorted({value for value in pool if value_type(value) == kind and _form(value) == _form(first)})
    false = generator.choice(same) if same else _invented(first, generator) if kind == "name" else ""
    if not false:
        return {}
    made = dict.fromkeys(answers, false)
    ours, theirs = first.split(), false.split()
    if len(ours) > 1 and len(theirs) > 1 and ours[-1].lower() not in _HEADS["en"] and ours[-1][:1].isupper():
        made[ours[-1]] = theirs[-1]
    return made


@lru_cache(maxsize=1 << 16)
def _form(value: str) -> tuple[bool, int, str]:
    """Chinese or not, how long, and what its head says it is."""
    if _HAN.search(value):
        return True, min(len(value), 5), next((head for head in _HEADS["zh"] if value.endswith(head)), "")
    words = value.split()
    return False, min(len(words), 3), words[-1].lower() if words[-1].lower() in _HEADS["en"] else ""


def _invented(name: str, generator: random.Random) -> str:
    if _HAN.search(name):
        return _invented_zh(name, generator)
    words = name.split()
    if words[-1].lower() in _HEADS["en"] and len(words) > 1:
        return f"{generator.choice(_STEMS['en'])} {words[-1]}"
    if words[0].lower() in _HEADS["en"] and len(words) > 1:
        return f"{words[0]} {generator.choice(_STEMS['en'])}"
    given = [generator.choice(_GIVEN["en"]) for _ in words[1:3]]
    return " ".join([*given, generator.choice(_STEMS["en"])])


def _invented_zh(name: str, generator: random.Random) -> str:
    head = next((head for head in _HEADS["zh"] if name.endswith(head) and name != head), "")
    if head:
        return generator.choice(_STEMS["zh"]) + head
    if name[0] in _SURNAMES and 2 <= len(name) <= 3:
        return generator.choice([name_ for name_ in _SURNAMES if name_ != name[0]]) + generator.choice(_GIVEN["zh"])
    return generator.choice(_STEMS["zh"])
