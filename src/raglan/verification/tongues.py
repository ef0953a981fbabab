"""In which language a text is, as far as it shows: by script, and of Latin letters by common words, letters and endings.

    zh       Han characters, three of ten letters; kana or Hangul make it another language, however short it is
    en       Latin letters; not if another language has three signs and more than twice as many as English has, but for names,
             whose words are capitals with that language's small words between
    neither  too short to show anything: a name, a number, a title

What is quoted, and what stands in braces or backticks, is no writer's own and is left out where something else is there.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from raglan.text import SPACELESS, cased_words, words

__all__ = ["asks_for_another", "in_language", "language_of"]

SIGNS = 3  # of another language, from which on it is believed
LONG = 20  # words; so long a text without one of the commonest is not English
COMMONEST = frozenset(["the", "of", "and", "to", "in", "is", "a", "was", "for", "that", "it", "on", "as", "with", "by", "are"])
HAN_IN_CHINESE, HAN_IN_ENGLISH, KANA_IN_CHINESE = 0.3, 0.1, 0.1  # of a text's letters
SHORT, FEW_KANA = 5, 3
HAN = re.compile(f"[{SPACELESS}]")
KANA = re.compile("[\u3041-\u3096\u30a1-\u30fa]")
NOT_OWN = re.compile(
    r"\{[^{}]*\}|`[^`]*`|##begin_quote##.*?##end_quote##|“[^”]*”|\"[^\"\n]*\"|「[^」]*」|『[^』]*』|《[^》]*》", re.DOTALL
)
QUESTIONS = frozenset(["who", "what", "when", "where", "why", "how", "which", "whose", "whom"])


def in_language(text: str, wanted: str) -> bool:
    """Whether nothing speaks against a text's being en or zh."""
    own = _own(text)
    letters = [letter for letter in own if letter.isalpha()]
    if not letters:
        return True
    kana = sum(bool(KANA.match(letter)) for letter in letters)
    han = (sum(bool(HAN.match(letter)) for letter in letters) - kana) / len(letters)
    latin = sum(_script(letter) in ("LATIN", "GREEK") for letter in letters) / len(letters)
    if wanted == "zh":
        if (kana >= FEW_KANA and kana / len(letters) >= KANA_IN_CHINESE) or han + latin <= 1 / 2:
            return False
        return han >= HAN_IN_CHINESE or len(words(own)) <= SHORT  # a name may be Latin
    return han + kana / len(letters) <= HAN_IN_ENGLISH and latin > 1 / 2 and _english(own)


def language_of(text: str) -> str:
    """zh or en, by script alone."""
    letters = [letter for letter in _own(text) if letter.isalpha()]
    return "zh" if sum(bool(HAN.match(letter)) for letter in letters) >= HAN_IN_CHINESE * max(1, len(letters)) else "en"


def asks_for_another(query: str) -> bool:
    """Whether a question asks how something is said or written elsewhere."""
    asked = f" {' '.join(words(query))} "
    return any(f" {' '.join(words(phrase))} " in asked for phrase in _told()["asks_for"])


def _own(text: str) -> str:
    """Without what is quoted or is a template, if any letter is left then."""
    left = text
    while (shorter := NOT_OWN.sub(" ", left)) != left:
        left = shorter
    return left if any(letter.isalpha() for letter in left) else text


def _script(letter: str) -> str:
    return unicodedata.name(letter, "").partition(" ")[0]


def _english(text: str) -> bool:
    said = words(text)
    if len(said) >= LONG and not COMMONEST & set(said):
        return False
    small = {word for word in cased_words(text) if word.islower() and len(word) > 2}
    return all(not (small - _words()[name] and _outweighs(name, set(said), text)) for name in _words() if name != "en")


def _outweighs(name: str, said: set[str], text: str) -> bool:
    """Whether another language shows, and English far less. What both have tells nothing; a question word is English twice."""
    theirs, ours = _words()[name], _words()["en"]
    told = _told()
    signs = len(said & (theirs - ours)) + any(letter in told["letters"][name] for letter in text.lower())
    signs += any(len(word) > SHORT and word.endswith(tuple(told["endings"][name])) for word in said)
    own = said & (ours - theirs)
    return signs >= SIGNS and signs > 2 * (len(own) + len(own & QUESTIONS))


@cache
def _words() -> dict[str, frozenset[str]]:
    return {name: frozenset(listed.split()) for name, listed in _told()["words"].items()}


@cache
def _told() -> dict[str, Any]:
    told: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("tongues.yaml").read_text(encoding="utf-8"))
    return told
