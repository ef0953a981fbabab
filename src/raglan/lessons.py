"""Reading lessons cut from the corpus itself: a salient span of a sentence is hidden and asked for.

As in REALM's salient-span masking (Guu et al. 2020, arXiv 2002.08909) and cloze translation (Lewis et al. 2019, arXiv
1906.04980), without any tagger: salient are numbers, dates, names in capitals and quoted words, which a regular expression
finds. A question is the sentence around the span, shortened, with words dropped and a question word in front that fits the
span, so that answering it takes matching and not copying. The answer always stands in the passage.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Iterator

from raglan.corpus import Corpus
from raglan.errors import CorpusError
from raglan.progress import track
from raglan.records import Example, Passage

__all__ = ["lessons"]

log = logging.getLogger(__name__)
_SENTENCE = re.compile(r"[^.!?。！？\n]*(?:[.!?](?=\S)[^.!?。！？\n]*)*[.!?。！？]?")
_MONTH = r"(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_NAME = r"[A-Z][\w'’-]*(?:\s+(?:(?:of|the|and|de|von|van|la)\s+)?[A-Z][\w'’-]*)*"
_SPANS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("date", re.compile(rf"\b(?:\d{{1,2}}\s+)?{_MONTH}(?:\s+\d{{1,2}})?(?:,?\s+\d{{4}})?\b")),
    ("year", re.compile(r"\b1[0-9]\d\d\b|\b20[0-4]\d\b")),
    ("number", re.compile(r"[$£€]?\b\d[\d,.]*\d\b%?|\b\d+\b%?")),
    ("count", re.compile(r"\b(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty|fifty|"
                         r"sixty|seventy|eighty|ninety|hundred)(?:[- ](?:one|two|three|four|five|six|seven|eight|nine))?\b")),
    ("quoted", re.compile(r"(?<=[\"“「『《])[^\"”」』》]{2,40}(?=[\"”」』》])")),
    ("name", re.compile(_NAME)),
    ("zh", re.compile(r"\d+[年月日個个名座米公里%％]+|[\u4e00-\u9fff]{2,6}(?=[，、。；）])")),
)  # fmt: skip
_ASKED = {
    "date": ("when", "on what date", "what date"),
    "year": ("when", "in what year", "what year", "in which year"),
    "number": ("how many", "what number", "how much", "what"),
    "count": ("how many", "what number of"),
    "quoted": ("what", "what name", "which"),
    "name": ("who", "what", "where", "which", "what is the name of"),
    "phrase": ("what", "what kind of", "which", "what did", "how"),
    "zh": ("什麼", "什么", "哪", "何"),
}
_UNIT = re.compile(r"\s+([a-z]{3,12})\b")
_STOP = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "been",
        "but",
        "by",
        "for",
        "from",
        "had",
        "has",
        "have",
        "he",
        "her",
        "his",
        "in",
        "into",
        "is",
        "it",
        "its",
        "of",
        "on",
        "or",
        "she",
        "that",
        "the",
        "their",
        "them",
        "they",
        "this",
        "to",
        "was",
        "were",
        "which",
        "who",
        "with",
    ]
)


def lessons(corpus: Corpus, count: int, *, seed: int = 0) -> list[Example]:
    """`count` questions about the corpus' own sentences, each relevant to one passage, spread evenly over passages.

    Raises:
        CorpusError: a corpus without a sentence that holds a salient span.
    """
    generator = random.Random(seed)
    order = list(range(len(corpus)))
    made: list[Example] = []
    for turn in track(range(64), "cutting lessons"):
        generator.shuffle(order)
        before = len(made)
        for row in order[: count - len(made)] if turn else order:
            if len(made) >= count:
                break
            passage = corpus[row]
            example = _lesson(passage, generator, f"lesson-{len(made)}")
            if example is not None:
                made.append(example)
        if len(made) >= count or len(made) == before:
            break
    if not made:
        raise CorpusError(
            "no lesson can be cut from this corpus: no sentence holds a name, a number or a quoted word",
            hint="lessons need prose; give the stage questions instead (data.kind: questions)",
        )
    if len(made) < count:
        log.warning("only %d of %d lessons can be cut from this corpus", len(made), count)
    return made


def _lesson(passage: Passage, generator: random.Random, identity: str) -> Example | None:
    candidates = list(_candidates(passage.text))
    if not candidates:
        return None
    kinds = sorted({kind for kind, *_ in candidates})
    kind = generator.choice(kinds)
    _, sentence, start, end = generator.choice([c for c in candidates if c[0] == kind])
    question = _question(kind, sentence, start, end, passage.title, generator)
    return Example(identity, question, (sentence[start:end],), (passage.id,))


def _candidates(text: str) -> Iterator[tuple[str, str, int, int]]:
    """(kind, sentence, start, end) of every salient span, the first kind that fits a place winning."""
    for found in _SENTENCE.finditer(text):
        sentence = found.group().strip()
        if not 20 <= len(sentence) <= 600 and not re.search(r"[\u4e00-\u9fff]", sentence):
            continue
        taken: list[tuple[int, int]] = []
        for kind, pattern in _SPANS:
            for span in pattern.finditer(sentence):
                start, end = span.span()
                if kind == "name" and start == 0:
                    continue  # any word has a capital there
                if any(start < b and a < end for a, b in taken) or not sentence[start:end].strip():
                    continue
                taken.append((start, end))
                yield kind, sentence, start, end
        yield from _phrases(sentence, taken)


def _phrases(sentence: str, taken: list[tuple[int, int]]) -> Iterator[tuple[str, str, int, int]]:
    """Runs of one to four lower-case content words, for the answers that are neither names nor numbers."""
    words = [(m.start(), m.end(), m.group()) for m in re.finditer(r"[A-Za-z][\w'’-]*", sentence)]
    run: list[tuple[int, int, str]] = []
    for word in [*words, (len(sentence), len(sentence), "the")]:
        inside = any(word[0] < b and a < word[1] for a, b in taken)
        broken = run and re.search(r"[^\s]", sentence[run[-1][1] : word[0]])
        if word[2].lower() in _STOP or word[2][0].isupper() or inside or broken:
            if 1 <= len(run) <= 4 and run[0][0] > 0 and len(run[-1][2]) > 3:
                yield "phrase", sentence, run[0][0], run[-1][1]
            run = []
            if broken and word[2].lower() not in _STOP and not inside and not word[2][0].isupper():
                run = [word]
        else:
            run.append(word)


def _question(kind: str, sentence: str, start: int, end: int, title: str, generator: random.Random) -> str:
    asked = generator.choice(_ASKED[kind])
    left, right = sentence[:start], sentence[end:]
    if kind == "zh":
        return f"{left[-24:]}{asked}{right[:24].rstrip('。！？')}？"
    unit = _UNIT.match(right)
    if kind in ("number", "count") and unit and generator.random() < 0.8:
        asked, right = f"how many {unit[1]}", right[unit.end() :]
    before, after = left.split(), right.rstrip(".!?").split()
    before = before[-generator.randint(3, 12) :]
    after = after[: generator.randint(0, 8)]
    drop = generator.choice((0.0, 0.1, 0.25))
    before, after = ([word for word in words if generator.random() >= drop] for words in (before, after))
    if generator.random() < 0.3 and before and before[-1].lower() in _STOP:
        before = before[:-1]
    words = [asked, *before, *after] if generator.random() < 0.75 else [*before, asked, *after]
    name = title.split(" > ")[0]
    if name and generator.random() < 0.5 and name.lower() not in " ".join(words).lower():
        words = [*words, *generator.choice((["in", name], ["of", name], ["at", name]))]
    return " ".join(words).strip(" ,;:") + "?"
