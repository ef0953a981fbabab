"""Words: how answers are compared, how text is cut into terms, and how a model's spelling is traced back to its source.

Answer normalisation is SQuAD's (Rajpurkar et al. 2016): lower case, no punctuation, no English articles, single spaces.
For scripts without spaces every character is a word (as in DRCD and CMRC evaluation), so the same F1 serves Chinese.

`fold_numbers` makes numerals alike, 一九七八 and 1978, 三千 and 3,000 and 3000: for looking whether an answer stands somewhere.
Exact match and F1 do not fold them, as no published figure does.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from functools import lru_cache, partial
from typing import Literal, NamedTuple

from raglan.errors import CorpusError

__all__ = [
    "FUNCTION_WORDS",
    "MAX_QUERY_CHARACTERS",
    "QUESTION_WORDS",
    "Han",
    "Placed",
    "answer_words",
    "cased_words",
    "check_history",
    "check_query",
    "content_terms",
    "fold_numbers",
    "half_character",
    "han_numeral",
    "mostly_spaceless",
    "normalise_answer",
    "pattern",
    "placed_words",
    "question_key",
    "restore_surface",
    "sentence_spans",
    "sentences",
    "shortened",
    "terms",
    "terms_identity",
    "words",
]

MAX_QUERY_CHARACTERS = 100_000

QUESTION_WORDS = frozenset(("what", "which", "who", "whom", "whose", "when", "where", "why", "how"))
# Articles, pointers and amounts; pronouns; auxiliaries; prepositions; joints; adverbs; what an apostrophe cuts off
_FUNCTION_WORDS = """a an the this that these those all any both each few more most no other own same some such
i me my mine myself we us our ours ourselves you your yours yourself he him his himself she her hers herself
it its itself they them their theirs themselves
am is are was were be been being have has had having do does did doing will would can could shall should may might must
of in on at to by for from with into onto about against between among through during before after above below over under
up down out off upon within without
and or but nor so if than then because as while until though although
not only very too just again further once here there now also s t d ll re ve m don
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
_EMPTY_WORDS = FUNCTION_WORDS | QUESTION_WORDS

Han = Literal["pairs", "both"]
TERMS = 1  # to be raised when `terms` cuts otherwise: an index of the old ones is refused then
SPACELESS = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_SPACELESS = re.compile(f"([{SPACELESS}])")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CLOSE = "\"'”’»)\\]」』）》"
_SENTENCE_END = re.compile(
    rf"(?:[。！？]|……(?=[{_CLOSE}]*[{SPACELESS}“「『《]))+[{_CLOSE}]*|(?:[!?…]+|(?P<stop>\.))[{_CLOSE}]*(?=\s+[^\sa-z]|\s*$)|\n\s*\n|\n(?=\s*(?:[-*•#]|\d+[.)])\s)"
)
_ABBREVIATED = re.compile(
    r"(?:\b[A-Z]|\b(?:Dr|Mr|Mrs|Ms|St|Prof|Sr|Jr|Capt|Col|Gen|Lt|No|vol|pp?|cf|ca|c|ed|eds|vs|etc|e\.g|i\.e|al|Mt|Ft))\.$"
)
_WORD = re.compile(rf"(?:(?![{SPACELESS}])[^\W_])+")
_TERM = re.compile(rf"[{SPACELESS}]+|{_WORD.pattern}")

_HAN_DIGITS = {sign: value for value, signs in enumerate(["零〇", "一", "二两兩", *"三四五六七八九"]) for sign in signs}
_HAN_UNITS = {"十": 10, "百": 100, "千": 1000}
_HAN_GROUPS = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
_COUNTERS = "年月日号號时時秒岁歲个個位名座次条條人米公里元块塊层層届屆%％"  # a lone 三 is a number before one of these
_PRONOUNS = "哪这這那某每另同统統单單唯"  # 哪一年, 每一个: no numbers
_NUMERAL = re.compile(
    r"(?<![0-9A-Za-z.,])\d{1,3}(?:,\d{3})+(?!\d)|[０-９]{1,3}(?:，[０-９]{3})+(?![０-９])"
    r"|\d+(?:\.\d+)?[百千万萬亿億]+"
    f"|[{''.join((*_HAN_DIGITS, *_HAN_UNITS, *_HAN_GROUPS))}]+"
)
# What a Chinese question asks with, then pronouns, particles, prepositions, joints
_HAN_FUNCTION = re.compile(
    "哪一年|哪年|哪一|哪里|哪裡|哪个|哪個|什么|什麼|甚么|多少|几个|幾個|何时|何時|何处|何地|为何|為何|为什么|為什麼|怎么|怎麼|怎样|如何|"
    "是否|请问|請問|我们|你们|他们|她们|它们|自己|这个|这些|那个|那些|以及|因为|所以|但是|"
    "[哪谁誰何几幾吗嗎呢吧啊我你您他她它这這那此其的地得了着著过過是在于於和与與及或而并並且被把将將给給对對从從向由以为為之所也都就还還又很更最]"
)


class Placed(NamedTuple):
    """A word in the form in which it is compared, and the characters [start, end) of the text that it was read from."""

    word: str
    start: int
    end: int


def check_query(query: str) -> None:
    """Refuse what cannot be a question. Raises CorpusError."""
    if not query.strip():
        raise CorpusError("the question is empty", hint="ask something, as in: raglan answer recipe.yaml 'Who …?'")
    _check_said(query, "the question")


def check_history(history: Sequence[str]) -> None:
    """Refuse turns that nobody can have said. Raises CorpusError."""
    for number, turn in enumerate(history, 1):
        if not turn.strip():
            raise CorpusError(f"turn {number} of the history is empty", hint="leave it out")
        _check_said(turn, f"turn {number} of the history")


def _check_said(text: str, what: str) -> None:
    if len(text) > MAX_QUERY_CHARACTERS:
        raise CorpusError(
            f"{what} has {len(text):,} characters; at most {MAX_QUERY_CHARACTERS:,} are allowed",
            hint="put long texts among the documents, and ask about them",
        )
    if (half := half_character(text)) is not None:
        raise CorpusError(f"{what} holds {half!r}, half a character", hint="give it as valid UTF-8")


def shortened(text: str, longest: int = 60) -> str:
    """The head of a text, for messages."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def half_character(text: str) -> str | None:
    """The first surrogate that stands alone: what bytes that are no UTF-8, or a torn JSON escape, leave behind."""
    try:
        text.encode()
    except UnicodeEncodeError as fault:
        return text[fault.start]
    return None


def normalise_answer(text: str) -> str:
    """The form in which two answers are equal: "The  Eiffel-Tower!" → "eiffeltower"."""
    return " ".join(answer_words(text))


def question_key(query: str, history: Sequence[str] = ()) -> str:
    """The form in which two questions are equal: their words and those of the turns before, without case and punctuation."""
    return "\n".join(normalise_answer(turn) or turn.strip() for turn in (*history, query))


def answer_words(text: str) -> list[str]:
    """The words that answer F1 counts: normalised, without regard to case (STRASSE is Straße), and one a character in Chinese
    and Japanese."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = "".join(letter for letter in text if not _is_punctuation(letter))
    return _SPACELESS.sub(r" \1 ", _ARTICLES.sub(" ", text)).split()


@lru_cache(maxsize=4096)
def pattern(text: str) -> re.Pattern[str]:
    """An answer that is a regular expression, without regard to case. Raises CorpusError."""
    try:
        return re.compile(text, re.IGNORECASE | re.MULTILINE)
    except re.error as fault:
        raise CorpusError(
            f"the answer {text!r} is no regular expression: {fault}", hint="correct it, or set answers_are: text"
        ) from None


def words(text: str) -> list[str]:
    """The words that ROUGE, BLEU and n-grams count: lower case, no punctuation, one a character in Chinese and Japanese."""
    return _parts(unicodedata.normalize("NFKC", text).lower())


def cased_words(text: str) -> list[str]:
    """The same words with the capitals they are written with."""
    return _parts(unicodedata.normalize("NFKC", text))


def _parts(text: str) -> list[str]:
    return [part for word in _TERM.findall(text) for part in (word if _SPACELESS.match(word) else [word])]


def terms(text: str, *, han: Han = "both") -> list[str]:
    """The terms that BM25 counts: lower-case words, and of Chinese and Japanese characters.

    pairs   adjacent characters, and a character that stands alone: 长江的源头 → 长江 江的 的源 源头
    both    single characters, and adjacent ones
    """
    found: list[str] = []
    for word in _TERM.findall(unicodedata.normalize("NFKC", text).lower()):
        if not _SPACELESS.match(word):
            found.append(word)
            continue
        found += [*word] if han == "both" or len(word) == 1 else []
        found += [word[i : i + 2] for i in range(len(word) - 1)]
    return found


def terms_identity(han: Han) -> str:
    """Names how `terms` cuts: what an index was made with, and has to be asked with."""
    return f"raglan-{TERMS}-{han}"


def content_terms(text: str) -> list[str]:
    """The terms that tell what a text is about, each once, numerals folded: words that are no function or question words.

    Of Chinese and Japanese, pairs of adjacent characters between two function words, and a character that stands alone there.
    """
    found: list[str] = []
    for word in _TERM.findall(unicodedata.normalize("NFKC", fold_numbers(text)).lower()):
        if not _SPACELESS.match(word):
            found += [word] if word not in _EMPTY_WORDS else []
            continue
        for part in _HAN_FUNCTION.split(word):
            found += [part[i : i + 2] for i in range(len(part) - 1)] if len(part) != 1 else [part]
    return list(dict.fromkeys(found))


def fold_numbers(text: str) -> str:
    """Numerals in one spelling: 一九七八年 → 1978年, 三千 → 3000, 3.5万 → 35000, 3,000 → 3000. English words stay words.

    A lone numeral (三) is one before a counter (三年) or behind 第, but not in 哪一年; two digits in a row are a year's only
    (九八年), since 三四个 are three or four.
    """
    return _NUMERAL.sub(lambda found: _numeral(found) or found.group(), text)


def placed_words(text: str) -> list[Placed]:
    """The words of `words`, numerals folded, with their places in the text as it is."""
    found: list[Placed] = []
    start = 0
    for mark in _NUMERAL.finditer(text):
        if value := _numeral(mark):
            found += [*_placed(text, start, mark.start()), Placed(value, *mark.span())]
            start = mark.end()
    return [*found, *_placed(text, start, len(text))]


def _placed(text: str, start: int, end: int) -> list[Placed]:
    found = []
    for mark in _TERM.finditer(text, start, end):
        whole = not _SPACELESS.match(mark.group())
        for first, last in [mark.span()] if whole else [(i, i + 1) for i in range(*mark.span())]:
            found.append(Placed(unicodedata.normalize("NFKC", text[first:last]).lower(), first, last))
    return found


def han_numeral(number: int) -> str:
    """A number from 0 to 99,999,999 in Chinese numerals: 3000 → 三千, 105 → 一百零五, 15 → 十五."""
    if number >= 10**4:
        head, rest = divmod(number, 10**4)
        tail = han_numeral(rest) if rest else ""
        if 10 <= rest < 20:
            tail = f"一{tail}"
        return f"{han_numeral(head)}万{'零' if 0 < rest < 1000 else ''}{tail}"
    if number < 10:
        return "零一二三四五六七八九"[number]
    sign, unit = next((sign, unit) for sign, unit in reversed(_HAN_UNITS.items()) if number >= unit)
    head, rest = divmod(number, unit)
    first = "" if 10 <= number < 20 else han_numeral(head)
    if not rest:
        return f"{first}{sign}"
    between = "零" if rest * 10 < unit else ""
    return f"{first}{sign}{between}{'一' if 10 <= rest < 20 else ''}{han_numeral(rest)}"


def _numeral(found: re.Match[str]) -> str | None:
    """The digits that a numeral stands for; None where it is none."""
    run = found.group()
    if not run[0].isdecimal():
        return _han_value(run, before=found.string[: found.start()][-1:], after=found.string[found.end() :][:1])
    digits = unicodedata.normalize("NFKC", run).rstrip("百千万萬亿億")
    value = Decimal(digits.replace(",", ""))
    for sign in run[len(digits) :]:
        value *= (_HAN_UNITS | _HAN_GROUPS)[sign]
    return str(int(value)) if value == int(value) else None


def _han_value(run: str, *, before: str, after: str) -> str | None:
    if len(run) == 1:
        counted = after and after in _COUNTERS and not (before and before in _PRONOUNS)
        if not (counted or before == "第") or run in (_HAN_GROUPS | _HAN_UNITS).keys() - {"十"}:
            return None
        return "10" if run == "十" else str(_HAN_DIGITS[run])
    if all(sign in _HAN_DIGITS for sign in run):
        return "".join(str(_HAN_DIGITS[sign]) for sign in run) if len(run) > 2 or after == "年" else None
    broken = before and before in "点點" and run[-1] in _HAN_GROUPS  # the tail of 三点五万
    value = None if broken else _composed(run)
    return None if value is None else str(value)


def _composed(run: str) -> int | None:
    """一百零五 → 105, 一亿二千万 → 120000000, 三千六 → 3600; None of what is no number, as 千万 in front of a verb."""
    total, section, digit, last, zero = 0, 0, None, 10**12, False
    for sign in run:
        if sign in "零〇":
            zero = digit is None
            if not zero:
                return None
        elif sign in _HAN_DIGITS:
            if digit is not None:
                return None
            digit = _HAN_DIGITS[sign]
        elif sign in _HAN_UNITS:
            unit = _HAN_UNITS[sign]
            if (digit is None and sign != "十") or (last < 10**4 and unit >= last):
                return None
            section += (1 if digit is None else digit) * unit
            digit, last, zero = None, unit, False
        else:
            group = _HAN_GROUPS[sign]
            section += digit or 0
            if not section and last != 10**4:
                return None
            total = total + section * group if section else total * group
            section, digit, last, zero = 0, None, group, False
    if digit is None:
        return total + section
    return total + section + (digit if zero or last <= 10 else digit * last // 10)


def sentences(text: str) -> list[str]:
    """A text's sentences, without the blanks around them; a line break ends one too, but not in the middle of a sentence.

    English and other scripts with capitals, Chinese and Japanese. A full stop behind an initial or a usual abbreviation ends
    nothing, and neither does one before a small letter.
    """
    return [text[start:end] for start, end in sentence_spans(text)]


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Where the `sentences` of a text stand, as characters [start, end)."""
    ends, start = [], 0
    for mark in _SENTENCE_END.finditer(text):
        if not (mark.group("stop") and _ABBREVIATED.search(text, start, mark.end("stop"))):
            start = mark.end()
            ends.append(start)
    return [span for span in itertools.starmap(partial(_stripped, text), itertools.pairwise([0, *ends, len(text)])) if span]


def _stripped(text: str, start: int, end: int) -> tuple[int, int] | None:
    inner = text[start:end].strip()
    at = start + len(text[start:end]) - len(text[start:end].lstrip())
    return (at, at + len(inner)) if inner else None


def mostly_spaceless(text: str) -> bool:
    """Whether half of the words or more are Chinese or Japanese, of which each character is one."""
    spaceless = len(_SPACELESS.findall(text))
    return spaceless > 0 and 2 * spaceless >= spaceless + len(_WORD.findall(text))


def restore_surface(answer: str, sources: list[str]) -> str:
    """`answer` as the first source spells it: an uncased tokenizer's "beyonce ' s $ 1, 200" → "Beyoncé's $1,200".

    Looks for the answer's letters in order, ignoring case, accents and white space. Without a match the answer is returned
    as it is.
    """
    letters = "".join(_fold(letter) for letter in answer if not letter.isspace())
    if not letters:
        return answer
    for source in sources:
        folded, positions = _folded(source)
        for found in re.finditer(re.escape(letters), folded):
            start, end = positions[found.start()], positions[found.end() - 1] + 1
            if _at_boundary(source, start, end):
                return source[start:end]
    return answer


@lru_cache(maxsize=256)
def _folded(source: str) -> tuple[str, list[int]]:
    """The source without white space, case and accents, and where each remaining letter stood."""
    folded, positions = [], []
    for position, letter in enumerate(source):
        if not letter.isspace():
            for piece in _fold(letter):
                folded.append(piece)
                positions.append(position)
    return "".join(folded), positions


@lru_cache(maxsize=4096)
def _fold(letter: str) -> str:
    decomposed = unicodedata.normalize("NFD", letter.lower())
    return "".join(piece for piece in decomposed if not unicodedata.combining(piece))


def _at_boundary(source: str, start: int, end: int) -> bool:
    """Whether [start, end) neither begins nor ends inside a word (a Chinese character is a word by itself)."""
    return not (_joined(source, start - 1, start) or _joined(source, end - 1, end))


def _joined(source: str, left: int, right: int) -> bool:
    if left < 0 or right >= len(source):
        return False
    pair = source[left] + source[right]
    return all(letter.isalnum() for letter in pair) and not _SPACELESS.search(pair)


@lru_cache(maxsize=4096)
def _is_punctuation(letter: str) -> bool:
    return unicodedata.category(letter)[0] == "P" or letter in "$+<=>^`|~"
