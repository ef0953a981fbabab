"""Documents cut into passages that a reader can take: by tokens, at sentence and heading borders, with offsets.

The cutting is `semantic-text-splitter`'s (Markdown-aware, Unicode sentence borders). What is added here: the heading path as
the passage's title, exact character offsets, and ids that follow from document and position alone.

Chinese and Japanese are cut by ourselves, since Unicode's borders put the quotation mark that opens a sentence behind the
sentence before it (。「 is one border too late) and know no clauses:

    a paragraph that fits is not cut; else it is cut behind sentences, 。！？…… with what closes them;
    a sentence that does not fit is cut behind ，、；：, and a clause that does not, by the library.

Neighbours share a passage as long as they fit. Code fences and tables too long for a passage are the library's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from semantic_text_splitter import MarkdownSplitter
from tokenizers import Tokenizer

from raglan.records import Document, Passage
from raglan.text import mostly_spaceless, sentence_spans

__all__ = ["Chunker"]

_HEADING = re.compile(r"^(#{1,6})[ \t]+(.+?)(?:[ \t]+#+)?[ \t\r]*$", re.MULTILINE)
_BLANK = re.compile(r"\n[ \t\r]*\n\s*")
_CLAUSE = re.compile(r"(?:[，、；：]|[,;:](?!\d))[”’」』）》]*")
_TABLE = re.compile(r"(?:[ \t]*\|.*(?:\n|\Z))+")
Span = tuple[int, int]
_FENCE = re.compile(r"^(```|~~~).*?(?:^\1[ \t\r]*$|\Z)", re.MULTILINE | re.DOTALL)


@dataclass
class Chunker:
    """Cuts documents into passages of at most `max_tokens` tokens of `tokenizer`.

    `overlap` repeats that many tokens between neighbours. Sections are not mixed: a passage belongs to one heading path,
    and heading lines themselves go into the title, not the text. Whole documents (`Document.whole`) pass uncut.
    """

    tokenizer: Tokenizer
    max_tokens: int = 128
    overlap: int = 0

    def __post_init__(self) -> None:
        plain = Tokenizer.from_str(self.tokenizer.to_str())
        plain.no_truncation()
        plain.no_padding()
        self._plain = plain
        self._splitter = MarkdownSplitter.from_huggingface_tokenizer(plain, self.max_tokens, overlap=self.overlap)

    def passages(self, document: Document) -> list[Passage]:
        """The document's passages in order; `text == document.text[start:end]` for each."""
        told = document.date, document.licence
        if document.whole:
            return [Passage(document.id, document.text, document.title, document.id, 0, len(document.text), *told)]
        spans = [span for section in _sections(document) for span in self._spans(document.text, *section)]
        if not spans and document.text.strip():  # headings alone are a text too
            spans = list(self._spans(document.text, document.title, 0, len(document.text)))
        return [
            Passage(f"{document.id}#{number}", document.text[start:end], title, document.id, start, end, *told)
            for number, (title, start, end) in enumerate(spans)
        ]

    def _spans(self, text: str, title: str, begin: int, end: int) -> Iterator[tuple[str, int, int]]:
        cut = self._by_sentences if mostly_spaceless(text[begin:end]) else self._by_library
        for start, stop in cut(text, (begin, end)):
            yield title, start, stop

    def _by_library(self, text: str, span: Span) -> Iterator[Span]:
        part = text[slice(*span)]
        for offset, piece in self._splitter.chunk_indices(part) if part.strip() else ():
            yield from _bare(text, span[0] + offset, span[0] + offset + len(piece))

    def _by_sentences(self, text: str, span: Span) -> Iterator[Span]:
        """Paragraphs that fit share passages; the parts of one that does not share theirs with no other."""
        run: list[Span] = []
        for block in _blocks(text, span):
            if self._fits(text, block):
                run.append(block)
                continue
            yield from self._packed(text, run)
            yield from self._packed(text, list(self._parts(text, block, (_sentences, _clauses))))
            run = []
        yield from self._packed(text, run)

    def _parts(self, text: str, span: Span, cuts: Sequence[Callable[[str, Span], Iterable[Span]]]) -> Iterator[Span]:
        """Spans that fit each: by the first of the cuts where that will do, else by those behind it, last by the library."""
        if self._fits(text, span):
            yield span
        elif not cuts or text.startswith(("```", "~~~"), span[0]) or _TABLE.fullmatch(text, *span):
            yield from self._by_library(text, span)
        else:
            for part in cuts[0](text, span):
                yield from self._parts(text, part, cuts[1:])

    def _packed(self, text: str, parts: Sequence[Span]) -> Iterator[Span]:
        """As many neighbours in a passage as fit; the next begins again with those of the last `overlap` tokens."""
        first = 0
        for last in range(1, len(parts) + 1):
            if last < len(parts) and self._fits(text, (parts[first][0], parts[last][1])):
                continue
            yield parts[first][0], parts[last - 1][1]
            if last == len(parts):
                return
            back = last
            while back > first + 1 and self._repeats(text, parts, back - 1, last):
                back -= 1
            first = back

    def _repeats(self, text: str, parts: Sequence[Span], back: int, last: int) -> bool:
        """Whether the parts from `back` on are few enough to be said again, and leave room for the next."""
        shared = self._size(text, (parts[back][0], parts[last - 1][1]))
        return shared <= self.overlap and self._fits(text, (parts[back][0], parts[last][1]))

    def _fits(self, text: str, span: Span) -> bool:
        return self._size(text, span) <= self.max_tokens

    def _size(self, text: str, span: Span) -> int:
        return len(self._plain.encode(text[slice(*span)], add_special_tokens=False).ids)


def _bare(text: str, start: int, end: int) -> Iterator[Span]:
    """The span without the blanks around it; nothing of blanks alone."""
    stripped = text[start:end].strip()
    if stripped:
        at = text.index(stripped, start)
        yield at, at + len(stripped)


def _blocks(text: str, span: Span) -> Iterator[Span]:
    """Paragraphs, as blank lines part them; a code fence is one."""
    start, end = span
    fences = [found.span() for found in _FENCE.finditer(text, start, end)]
    borders = [found.start() for found in _BLANK.finditer(text, start, end)]
    borders = [at for at in borders if not any(begin <= at < stop for begin, stop in fences)]
    for stop in sorted({*borders, *(at for fence in fences for at in fence), end}):
        yield from _bare(text, start, stop)
        start = stop


def _sentences(text: str, span: Span) -> Iterator[Span]:
    for start, end in sentence_spans(text[slice(*span)]):
        yield span[0] + start, span[0] + end


def _clauses(text: str, span: Span) -> Iterator[Span]:
    start = span[0]
    for mark in _CLAUSE.finditer(text, *span):
        yield from _bare(text, start, mark.end())
        start = mark.end()
    yield from _bare(text, start, span[1])


def _sections(document: Document) -> Iterator[tuple[str, int, int]]:
    """(heading path, start, end) of each stretch of text between headings; headings inside code fences are text."""
    fences = [found.span() for found in _FENCE.finditer(document.text)]
    path: list[tuple[int, str]] = []
    begin = 0
    for found in _HEADING.finditer(document.text):
        if any(start <= found.start() < end for start, end in fences):
            continue
        yield _title(document, path), begin, found.start()
        level = len(found[1])
        path = [*(entry for entry in path if entry[0] < level), (level, found[2])]
        begin = found.end()
    yield _title(document, path), begin, len(document.text)


def _title(document: Document, path: list[tuple[int, str]]) -> str:
    names = [name for _, name in path]
    if document.title and (not names or names[0] != document.title):
        names.insert(0, document.title)
    return " > ".join(names)
