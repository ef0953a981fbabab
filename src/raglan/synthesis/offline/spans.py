"""What in a sentence is worth asking for: spans that are short, say something of their own, and have a type.

    en   dates and years · a number with its unit · quoted titles · capitalised runs that do not begin the sentence
    zh   dates and years · a numeral with its measure word · 《》 and “” titles · Latin runs
    term where there is none of these: the rarest word; in Chinese a run of 2 to 4 characters between function words

Rules only. English names at the beginning of a sentence are left out, since any word is capitalised there; Chinese names are
found only where marks or function words fence them in, as no segmenter is used.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from raglan.text import content_terms

__all__ = ["KINDS", "Span", "language_of", "names", "spans"]

KINDS = ("year", "date", "number", "name", "title", "term")
MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
NO_UNITS = (
    "and|or|per|when|where|but|then|after|before|until|are|were|has|have|had|not|to|in|of|on|at|by|is|was|the|for|from|with|as|"
    "who|which|that"
)
EN = (
    ("date", re.compile(rf"\b(?:\d{{1,2}} {MONTH}(?: \d{{4}})?|{MONTH} \d{{1,2}}(?:, \d{{4}})?|{MONTH} \d{{4}})\b")),
    ("year", re.compile(r"(?<![\d,.–-])\b(?:1[0-9]\d\d|20\d\d)\b(?![\d,.]\d|–|-|s\b)")),
    ("number", re.compile(rf"(?<![\w.,-])\d[\d,]*(?:\.\d+)?(?:%| (?:per cent|(?!(?:{NO_UNITS})\b)[a-z]{{2,}})\b)")),
    ("title", re.compile(r"(?<=[“\"])[^“”\"\n]{4,60}(?=[”\"])")),
    ("name", re.compile(r"\b[A-Z][\w'’.-]*[\w](?: (?:(?:of|the|de|van|von|la|le) (?:the )?)?[A-Z][\w'’-]+)*")),
)  # fmt: skip
DIGITS = "〇零一二两兩三四五六七八九十百千万萬亿億"
MEASURES = (
    "平方公里|平方米|立方米|公里|公斤|公顷|千米|厘米|毫米|万元|美元|英里|英尺|个|座|名|次|条|米|元|块|层|届|岁|吨|人|位|种|部|"
    "本|首|枚|艘|架|台|户|所|家|间|项|支|级|倍|度|只|头|棵|株|幅|集|场|站|辆|克|升|秒|分钟|小时|天|％|%|"
    "平方公尺|公尺|萬元|英哩|英尺|個|條|塊|層|歲|噸|種|臺|戶|間|項|級|隻|頭|場|輛|分鐘|小時"
)
ZH = (
    ("date", re.compile(rf"(?:\d{{4}}|[{DIGITS}]{{4}})年\d{{1,2}}月(?:\d{{1,2}}[日号])?")),
    ("year", re.compile(r"(?<!\d)(?:1\d{3}|20\d\d)年(?!代)|[一二][〇零一二三四五六七八九]{3}年(?!代)")),
    ("number", re.compile(
        rf"(?<![\d.第])\d[\d,，]*(?:\.\d+)?[万萬亿億余餘多]*(?:{MEASURES})|(?<![第{DIGITS}])[{DIGITS}]{{2,}}(?:{MEASURES})"
    )),
    ("title", re.compile(r"(?<=《)[^《》\n]{1,30}(?=》)|(?<=“)[^“”\n]{2,20}(?=”)|(?<=「)[^「」\n]{2,20}(?=」)")),
    ("name", re.compile(r"(?<![A-Za-z0-9])[A-Z][A-Za-z0-9]+(?:[ ·.-][A-Za-z0-9]+)*")),
)  # fmt: skip
LOOKED_AT = 400  # characters that tell a language
HAN, KANA = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]"), re.compile("[\u3040-\u30ff]")
FENCED = re.compile(
    "[的了是在于於和与與及或而并並把被将將给給对對从從向由以为為也都就又很更最有个個这這那其之等着著过過地得不所后後前中上下年月日"
    "，。、；：！？“”《》（）「」()\\s\\d]+"
)
COMMON = frozenset(["the", "of", "and", "to", "in", "is", "a", "was", "for", "that", "it", "on", "as", "with", "by", "are"])
TIMES = re.compile(f"{MONTH}|(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)days?|Christmas|Easter")
NO_NAMES = frozenset(
    ["I", "The", "A", "An", "He", "She", "It", "They", "We", "But", "And", "In", "No", "Mr", "Mrs", "Dr", "St"]
)


@dataclass(frozen=True, slots=True)
class Span:
    """[start, end) of a sentence, and what it is, one of KINDS."""

    text: str
    start: int
    end: int
    kind: str

    @property
    def aliases(self) -> tuple[str, ...]:
        """The span, and a number without its unit or a year without 年."""
        bare = re.match(r"[\d.,，]*\d", self.text) if self.kind in ("number", "year") else None
        return (self.text, bare[0]) if bare and bare[0] != self.text else (self.text,)


@lru_cache(maxsize=4096)
def language_of(text: str) -> str:
    """en, zh, or nothing where it is neither."""
    text = text[:LOOKED_AT]
    letters = [letter for letter in text if letter.isalpha()]
    if not letters or KANA.search(text):
        return ""
    if sum(bool(HAN.match(letter)) for letter in letters) > 0.5 * len(letters):
        return "zh"
    latin = sum(letter < "\u0250" for letter in letters)
    return "en" if latin > 0.9 * len(letters) and COMMON & set(text.lower().split()) else ""


def spans(sentence: str, language: str, *, rarity: Callable[[str], float] | None = None, within: str = "") -> list[Span]:
    """A sentence's spans in their order, none within another.

    Args:
        rarity: of a content term; picks a term where there is no other span.
        within: the whole passage. A Chinese run is taken for a term only if it stands there more than once.
    """
    found: list[Span] = []
    for kind, pattern in ZH if language == "zh" else EN:
        for mark in pattern.finditer(sentence):
            text = _trimmed(mark.group())
            start = mark.start()
            free = all(start >= other.end or start + len(text) <= other.start for other in found)
            if text and free and _says_something(sentence, text, start, kind, language):
                found.append(Span(text, start, start + len(text), kind))
    if not found and rarity is not None:
        found = _terms(sentence, language, rarity, within)
    return sorted(found, key=lambda span: span.start)


def names(sentence: str, language: str) -> Iterator[str]:
    """Names that passages may share: titles and capitalised runs; of those that begin a sentence, runs of two words or more."""
    for kind, pattern in ZH if language == "zh" else EN:
        if kind not in ("title", "name"):
            continue
        for mark in pattern.finditer(sentence):
            text = _trimmed(mark.group())
            if language == "en" and kind == "name":
                text = text.removeprefix("The ")
                first = mark.start() == 0 and " " not in text
                if first or text in NO_NAMES or len(text) < 4 or TIMES.fullmatch(text):
                    continue
            if len(text) > 1:
                yield text


def _trimmed(text: str) -> str:
    text = re.sub(r"['’]s$", "", text)
    return text.rstrip(" .,;:，。、；：")


def _says_something(sentence: str, text: str, start: int, kind: str, language: str) -> bool:
    if kind == "name" and language == "en":
        return text not in NO_NAMES and len(text) > 2 and sentence[:start].strip("“\"'‘(— ") != "" and bool(content_terms(text))
    return bool(content_terms(text)) or kind == "year"


def _terms(sentence: str, language: str, rarity: Callable[[str], float], within: str) -> list[Span]:
    if language == "zh":
        pieces = [(m.start(), m.group()) for m in re.finditer(f"(?:(?!{FENCED.pattern})[\u4e00-\u9fff]){{2,4}}", sentence)]
        pieces = [(at, w) for at, w in pieces if within.count(w) > 1 and _fenced(sentence, at, at + len(w))]
    else:
        pieces = [(m.start(), m.group()) for m in re.finditer(r"\b[a-z]{6,}\b", sentence)]
    best = sorted(((-max(map(rarity, content_terms(word)), default=0.0), at, word) for at, word in pieces))
    return [Span(word, at, at + len(word), "term") for weight, at, word in best[:1] if weight < 0]


def _fenced(sentence: str, start: int, end: int) -> bool:
    """Whether a run of characters ends at a function word or mark on both sides."""
    before, after = sentence[start - 1 : start], sentence[end : end + 1]
    return all(
        not side or FENCED.fullmatch(side) is not None or unicodedata.category(side)[0] == "P" for side in (before, after)
    )
