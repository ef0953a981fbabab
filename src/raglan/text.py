"""Words: how answers are compared, how text is cut into terms, and how a model's spelling is traced back to its source.

Answer normalisation is SQuAD's (Rajpurkar et al. 2016): lower case, no punctuation, no English articles, single spaces.
For scripts without spaces every character is a word (as in DRCD and CMRC evaluation), so the same F1 serves Chinese.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from raglan.errors import CorpusError

__all__ = [
    "MAX_QUERY_CHARACTERS",
    "answer_words",
    "cased_words",
    "check_history",
    "check_query",
    "half_character",
    "normalise_answer",
    "pattern",
    "question_key",
    "restore_surface",
    "sentences",
    "shortened",
    "terms",
    "words",
]

MAX_QUERY_CHARACTERS = 100_000

SPACELESS = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_SPACELESS = re.compile(f"([{SPACELESS}])")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CLOSE = "\"'”’»)\\]」』）》"
_SENTENCE_END = re.compile(
    rf"[。！？]+[{_CLOSE}]*|(?:[!?…]+|(?P<stop>\.))[{_CLOSE}]*(?=\s+[^\sa-z]|\s*$)|\n\s*\n|\n(?=\s*(?:[-*•#]|\d+[.)])\s)"
)
_ABBREVIATED = re.compile(
    r"(?:\b[A-Z]|\b(?:Dr|Mr|Mrs|Ms|St|Prof|Sr|Jr|Capt|Col|Gen|Lt|No|vol|pp?|cf|ca|c|ed|eds|vs|etc|e\.g|i\.e|al|Mt|Ft))\.$"
)
_TERM = re.compile(rf"[{SPACELESS}]+|(?:(?![{SPACELESS}])[^\W_])+")


def check_query(query: str) -> None:
    """Refuse what cannot be a question. Raises CorpusError."""
    if not query.strip():
        raise CorpusError("the question is empty", hint="ask something, as in: raglan answer recipe.yaml 'Who …?'")
    if len(query) > MAX_QUERY_CHARACTERS:
        raise CorpusError(
            f"the question has {len(query):,} characters; at most {MAX_QUERY_CHARACTERS:,} are allowed",
            hint="put long texts among the documents, and ask about them",
        )
    if (half := half_character(query)) is not None:
        raise CorpusError(f"the question holds {half!r}, half a character", hint="give it as valid UTF-8")


def check_history(history: Sequence[str]) -> None:
    """Refuse turns that nobody can have said. Raises CorpusError."""
    for number, turn in enumerate(history, 1):
        if not turn.strip():
            raise CorpusError(f"turn {number} of the history is empty", hint="leave it out")
        if len(turn) > MAX_QUERY_CHARACTERS:
            raise CorpusError(
                f"turn {number} of the history has {len(turn):,} characters; at most {MAX_QUERY_CHARACTERS:,} are allowed",
                hint="put long texts among the documents, and ask about them",
            )
        if (half := half_character(turn)) is not None:
            raise CorpusError(f"turn {number} of the history holds {half!r}, half a character", hint="give it as valid UTF-8")


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
    """The words that answer F1 counts: normalised, and one a character in Chinese and Japanese."""
    text = unicodedata.normalize("NFKC", text).lower()
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


def terms(text: str) -> list[str]:
    """The terms that BM25 counts: lower-case words; in Chinese and Japanese single characters and adjacent pairs."""
    found: list[str] = []
    for word in _TERM.findall(unicodedata.normalize("NFKC", text).lower()):
        if _SPACELESS.match(word):
            found += [*word, *(word[i : i + 2] for i in range(len(word) - 1))]
        else:
            found.append(word)
    return found


def sentences(text: str) -> list[str]:
    """A text's sentences, without the blanks around them; a line break ends one too, but not in the middle of a sentence.

    English and other scripts with capitals, Chinese and Japanese. A full stop behind an initial or a usual abbreviation ends
    nothing, and neither does one before a small letter.
    """
    found, start = [], 0
    for mark in _SENTENCE_END.finditer(text):
        if mark.group("stop") and _ABBREVIATED.search(text, start, mark.end("stop")):
            continue
        found.append(text[start : mark.end()].strip())
        start = mark.end()
    return [sentence for sentence in (*found, text[start:].strip()) if sentence]


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
