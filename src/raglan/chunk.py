"""Documents cut into passages that a reader can take: by tokens, at sentence and heading borders, with offsets.

The cutting is `semantic-text-splitter`'s (Markdown-aware, Unicode sentence borders, so Chinese too). What is added here:
the heading path as the passage's title, exact character offsets, and ids that follow from document and position alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from semantic_text_splitter import MarkdownSplitter
from tokenizers import Tokenizer

from raglan.records import Document, Passage

__all__ = ["Chunker"]

_HEADING = re.compile(r"^(#{1,6})[ \t]+(.+?)(?:[ \t]+#+)?[ \t\r]*$", re.MULTILINE)
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
        self._splitter = MarkdownSplitter.from_huggingface_tokenizer(plain, self.max_tokens, overlap=self.overlap)

    def passages(self, document: Document) -> list[Passage]:
        """The document's passages in order; `text == document.text[start:end]` for each."""
        if document.whole:
            return [Passage(document.id, document.text, document.title, document.id, 0, len(document.text))]
        spans = [span for section in _sections(document) for span in self._spans(document.text, *section)]
        if not spans and document.text.strip():  # headings alone are a text too
            spans = list(self._spans(document.text, document.title, 0, len(document.text)))
        return [
            Passage(f"{document.id}#{number}", document.text[start:end], title, document.id, start, end)
            for number, (title, start, end) in enumerate(spans)
        ]

    def _spans(self, text: str, title: str, begin: int, end: int) -> Iterator[tuple[str, int, int]]:
        for offset, piece in self._splitter.chunk_indices(text[begin:end]) if text[begin:end].strip() else ():
            stripped = piece.strip()
            if stripped:
                start = begin + offset + piece.index(stripped)
                yield title, start, start + len(stripped)


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
