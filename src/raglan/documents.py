"""Documents and questions read from files: .md .txt .html .pdf .docx .jsonl(.gz) .csv .parquet, BEIR folders, and LlamaIndex'
question-passage pairs (one .json of queries, corpus and relevant_docs).

Nothing vanishes silently: a file that cannot be read stops the reading and is named, or with `on_error: skip` is put on
the list of what was skipped and why. Files of other kinds in a folder are listed too.

`DocumentStream` reads rows of tables as they are asked for and forgets them; of twenty million it keeps eight bytes each.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from raglan.corpus import id_hash
from raglan.errors import CorpusError
from raglan.files import CONVERTED, TABLES, TEXTS, converted_text, ending_of, file_text, json_lines, table_rows
from raglan.progress import track
from raglan.records import Document, Example
from raglan.text import check_history, check_query, half_character

__all__ = [
    "DocumentStream",
    "Reading",
    "example_of_row",
    "example_row",
    "read_documents",
    "read_examples",
    "read_objects",
    "read_texts",
    "stream_examples",
    "write_examples",
]

SYNTHETIC = "synth"  # where an example tells how it was written
PAIRS = ".json"  # LlamaIndex' EmbeddingQAFinetuneDataset
NO_PAIRS = "is no JSON of queries, corpus and relevant_docs"
PAIRS_FORM = 'the form is {"queries": {id: text}, "corpus": {id: text}, "relevant_docs": {query id: [corpus ids]}}'
QUESTIONS = (
    'each line is one JSON object in UTF-8, as in {"id": "1", "query": "Who …?", "answers": ["…"], "relevant": ["passage id"]}'
)


@dataclass
class Reading:
    """What came of reading: the documents, and every file that gave none, with the reason."""

    documents: list[Document] = field(default_factory=list)
    files: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)


def read_documents(
    paths: Iterable[Path],
    *,
    columns: Mapping[str, str] | None = None,
    encoding: str = "utf-8",
    on_error: str = "stop",
    whole: bool = False,
) -> Reading:
    """Read files and folders into documents, in path order, with ids relative to the folder given.

    Args:
        paths: files and folders; a folder with `corpus.jsonl` is BEIR's and only that file is read.
        columns: names of the id, title, text, date and licence columns of tables.
        encoding: of text files.
        on_error: `stop` raises at the first file that cannot be read, `skip` notes it and goes on.
        whole: table rows are passages already (`Document.whole`).

    Raises:
        CorpusError: nothing to read, an unreadable file, or an id that occurs twice.
    """
    stream = DocumentStream(paths, columns=columns, encoding=encoding, on_error=on_error, whole=whole)
    return Reading(list(stream), stream.files, stream.skipped)


class DocumentStream:
    """The documents of files and folders, one after the other, as often as it is gone through. See `read_documents`.

    Attributes:
        count, files, skipped: documents and files of the last pass, and what gave none, with the reason.
        digest: hex digits that tell whether two passes gave the same.
    """

    def __init__(
        self, paths: Iterable[Path], *, columns: Mapping[str, str] | None = None, encoding: str = "utf-8",
        on_error: str = "stop", whole: bool = False,
    ):  # fmt: skip
        self.paths = list(paths)
        self.columns = {"id": "id", "title": "title", "text": "text", "date": "date", "licence": "licence", **(columns or {})}
        self.encoding, self.on_error, self.whole = encoding, on_error, whole
        self.count, self.files = 0, 0
        self.skipped: list[tuple[str, str]] = []
        self.digest = ""
        self._places = list(_files(self.paths))
        self._converted: dict[Path, Document] = {}  # texts are converted once, tables are read anew
        self._faults: dict[Path, str | None] = {}

    def __iter__(self) -> Iterator[Document]:
        self.count, self.files, self.skipped = 0, 0, []
        hashes, digest = array("Q"), hashlib.sha256()
        for document in self._documents():
            self.count += 1
            hashes.append(id_hash(document.id))
            rights = [f"licence: {document.licence}"] if document.licence else []
            told = (document.id, document.title, document.text, *([document.date] if document.date else []), *rights, "")
            digest.update("\0".join(told).encode())
            yield document
        self.digest = digest.hexdigest()
        self._check(hashes)

    def _documents(self) -> Iterator[Document]:
        for path, base in track(self._places, "reading"):
            ending = ending_of(path)
            if ending not in (*TABLES, PAIRS, *TEXTS, *CONVERTED):
                self.skipped.append((str(path), f"files ending in {ending or 'nothing'} are not read"))
            elif (fault := self._fault(path, base, ending)) is not None:
                self.skipped.append((str(path), fault))
            else:
                yield from self._of(path, base, ending)

    def _of(self, path: Path, base: Path, ending: str) -> Iterator[Document]:
        """A readable file's documents that hold text."""
        empty = True
        for document in self._read(path, base, ending):
            empty = False
            if document.text.strip():
                yield document
            else:
                self.skipped.append((str(path), f"row {document.id!r} holds no text"))
        if empty:
            self.skipped.append((str(path), NO_PAIRS if ending == PAIRS else "holds no row"))
        self.files += 1

    def _fault(self, path: Path, base: Path, ending: str) -> str | None:
        """Why a file is to be skipped: a table with one bad row is skipped whole, so it is first read to its end."""
        if self.on_error == "stop":
            return None
        if path not in self._faults:
            try:
                for _ in self._read(path, base, ending):
                    pass
                self._faults[path] = None
            except CorpusError as fault:
                self._faults[path] = fault.message
        return self._faults[path]

    def _read(self, path: Path, base: Path, ending: str) -> Iterator[Document]:
        if half_character(str(path)) is not None:
            raise CorpusError(f"the file name {str(path)!r} is not UTF-8", hint="rename it, or set on_error: skip")
        if ending in TABLES:
            for number, row in table_rows(path, ending, self.encoding):
                yield _row_document(row, path, number, self.columns, self.whole)
            return
        if ending == PAIRS:
            _, corpus, _ = _qa_pairs(path, self.encoding) or ({}, {}, {})
            yield from (Document(identity, text, "", str(path), self.whole) for identity, text in corpus.items())
            return
        if path not in self._converted:
            self._converted[path] = _text_document(path, ending, path.relative_to(base).as_posix(), self.encoding)
        yield self._converted[path]

    def _check(self, hashes: array[int]) -> None:
        """Something was read, and no id occurs twice."""
        if not self.count:
            places = ", ".join(str(path) for path in self.paths)
            tried = "; ".join(f"{name}: {reason}" for name, reason in self.skipped[:5])
            raise CorpusError(
                f"no document was found in {places}" + (f" ({tried})" if tried else ""),
                hint=f"files ending in {' '.join((*TEXTS, *CONVERTED, *TABLES, PAIRS))} are read",
            )
        kinds, counts = np.unique(np.frombuffer(hashes, dtype=np.uint64), return_counts=True)
        if len(kinds) == len(hashes):
            return
        doubtful = set(kinds[counts > 1].tolist())
        seen: dict[str, str] = {}
        told = self.files, list(self.skipped)
        for document in self._documents():  # once more, to name them
            if id_hash(document.id) not in doubtful:
                continue
            if document.id in seen:
                raise CorpusError(
                    f"document id {document.id!r} occurs twice: in {seen[document.id]} and {document.source}",
                    hint="give each document or passage its own id",
                )
            seen[document.id] = document.source
        self.files, self.skipped = told  # hashes that collide, and nothing more


def read_examples(path: Path, *, split: str = "test") -> list[Example]:
    """Questions from a .jsonl(.gz) file of {id, query, answers, relevant, …}, from a BEIR folder (its qrels/<split>.tsv), or
    from a .json of LlamaIndex' question-passage pairs, with all the passages that it names for a question.

    `relevant` holds passage ids, or objects {document, quote} that name the words which hold the answer; the latter are
    kept in `metadata["evidence"]` and become passage ids once there is a corpus. `answers: []` says that the question is
    unanswerable; without `answers` it is open, and so it is with `grades`, as retrieval collections have them. (Of a synthetic
    example its own record says what it is.)

    Raises:
        CorpusError: a missing file, a line that is not such an object, an empty query or an id that occurs twice.
    """
    if path.is_dir():
        examples = list(_beir_examples(path, split))
    elif path.suffix.lower() == PAIRS:
        examples = _qa_examples(path)
    elif path.is_file():
        examples = [_example(row, path, line) for line, row in json_lines(path, "utf-8", cure=QUESTIONS)]
    else:
        raise CorpusError(f"there is no question file {path}", hint="give a .jsonl or .jsonl.gz file or a BEIR folder")
    if not examples:
        raise CorpusError(f"{path} holds no question", hint=QUESTIONS)
    seen: set[str] = set()
    for example in examples:
        if example.id in seen:
            raise CorpusError(f"{path}: question id {example.id!r} occurs twice", hint="give each question its own id")
        seen.add(example.id)
    return examples


def stream_examples(path: Path) -> Iterator[Example]:
    """The questions of a .jsonl(.gz) file one by one, never all held; ids may occur twice. Raises CorpusError."""
    if not path.is_file():
        raise CorpusError(f"there is no question file {path}", hint="give a .jsonl or .jsonl.gz file")
    return (_example(row, path, line) for line, row in json_lines(path, "utf-8", cure=QUESTIONS))


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of a .jsonl(.gz) file. Raises CorpusError: a missing file, or a line that is no JSON object."""
    if not path.is_file():
        raise CorpusError(f"there is no file {path}", hint="give a .jsonl or .jsonl.gz file")
    return json_lines(path, "utf-8")


def read_texts(path: Path) -> list[tuple[str, str]]:
    """(id, text) of raw texts: the paragraphs of a .txt file, or {"text": …, "id": …} lines of a .jsonl(.gz) file.

    Raises:
        CorpusError: a missing file, one of another kind, or one without text.
    """
    if not path.is_file():
        raise CorpusError(f"there is no file {path}", hint="give a .txt or .jsonl(.gz) file of raw text")
    if ending_of(path) in (".jsonl", ".jsonl.gz"):
        rows = [(str(row.get("id", line)), row.get("text")) for line, row in json_lines(path, "utf-8")]
    elif ending_of(path) == ".txt":
        rows = list(enumerate(re.split(r"\n\s*\n", file_text(path, "utf-8")), 1))  # type: ignore[arg-type]
    else:
        raise CorpusError(f"{path} is no file of raw text", hint="paragraphs in a .txt file, or `text` in a .jsonl(.gz) file")
    texts = [(str(name), text.strip()) for name, text in rows if isinstance(text, str) and text.strip()]
    if not texts:
        raise CorpusError(f"{path} holds no text", hint='paragraphs, or lines as in {"text": "…"}')
    return texts


def example_row(example: Example) -> dict[str, Any]:
    """An example as the object that `read_examples` reads; what is empty is left out, but for `answers` where that says so."""
    metadata = {key: value for key, value in example.metadata.items() if key != "evidence"}
    relevant = [*example.relevant, *example.metadata.get("evidence", ())]
    says = bool(example.answers) or example.unanswerable or SYNTHETIC in example.metadata
    row = {
        "id": example.id, "query": example.query, **({"answers": list(example.answers)} if says else {}), "relevant": relevant
    }  # fmt: skip
    extra = {"grades": dict(example.grades), "history": list(example.history)}
    return {**row, **{key: value for key, value in extra.items() if value}, **metadata}


def example_of_row(row: Mapping[str, Any]) -> Example:
    """An example from such an object. Raises CorpusError."""
    return _checked(row, 1)


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Questions as a .jsonl file that `read_examples` reads."""
    lines = (json.dumps(example_row(example), ensure_ascii=False) + "\n" for example in examples)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")


def _files(paths: Iterable[Path]) -> Iterator[tuple[Path, Path]]:
    for path in paths:
        if path.is_dir():
            beir = [name for name in ("corpus.jsonl", "corpus.jsonl.gz") if (path / name).is_file()]
            found = [path / beir[0]] if beir else sorted(p for p in path.rglob("*") if p.is_file())
            yield from ((file, path) for file in found if not any(p.startswith(".") for p in file.relative_to(path).parts))
        elif path.is_file():
            yield path, path.parent
        else:
            raise CorpusError(f"there is no file or folder {path}", hint="check knowledge.documents in the recipe")


def _text_document(path: Path, ending: str, name: str, encoding: str) -> Document:
    text = file_text(path, encoding) if ending in TEXTS else converted_text(path)
    if not text.strip():
        raise CorpusError(f"{path} holds no text", hint="a scanned PDF needs OCR first; or set on_error: skip")
    title = "" if ending not in (".txt", ".pdf") else path.stem.replace("-", " ").replace("_", " ")
    return Document(name, text, title, str(path))


def _row_document(row: Mapping[str, Any], path: Path, number: int, columns: Mapping[str, str], whole: bool) -> Document:
    if columns["text"] not in row:
        raise CorpusError(
            f"{path}, row {number} has no column {columns['text']!r}; it has {', '.join(map(str, row))}",
            hint="name the columns under knowledge.columns: {id: …, title: …, text: …, date: …, licence: …}",
        )
    given = row.get(columns["id"], row.get("_id"))
    identity = f"{path.stem}:{number}" if given is None else str(given)
    title, text = str(row.get(columns["title"]) or ""), str(row[columns["text"]] or "")
    date = " ".join(str(row.get(columns["date"]) or "").removesuffix(" 00:00:00").split())  # a day, from tables with times
    licence = " ".join(str(row.get(columns["licence"], row.get("license")) or "").split())
    if (half := half_character(identity + title + text + date + licence)) is not None:
        raise CorpusError(f"{path}, row {number} holds {half!r}, half a character", hint="write the file as valid UTF-8")
    return Document(identity, text, title, str(path), whole, date, licence)


def _example(row: Mapping[str, Any], path: Path, line: int) -> Example:
    try:
        return _checked(row, line)
    except CorpusError as fault:
        raise CorpusError(f"{path}, line {line}: {fault.message}", hint=fault.hint or QUESTIONS) from None


def _checked(row: Mapping[str, Any], line: int) -> Example:
    query = row.get("query", row.get("question"))
    if not isinstance(query, str) or not query.strip():
        raise CorpusError(f"`query` is {query!r}; it must be a question in words")
    check_query(query)
    answers, relevant = row.get("answers", []), row.get("relevant", [])
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise CorpusError(f"`answers` is {answers!r}; it must be a list of texts")
    if any(not answer.strip() for answer in answers):
        raise CorpusError(
            f"`answers` is {answers!r}; an answer is empty",
            hint="leave it out; `answers: []` is a question that no passage answers, and an open one has no `answers`",
        )
    if not isinstance(relevant, list):
        raise CorpusError(f"`relevant` is {relevant!r}; it must be a list of passage ids")
    evidence = [item for item in relevant if isinstance(item, dict)]
    if any("document" not in item for item in evidence):
        raise CorpusError("`relevant` holds an object without `document`")
    grades, history = row.get("grades") or {}, row.get("history") or []
    if not isinstance(grades, dict) or not all(isinstance(grade, int | float) for grade in grades.values()):
        raise CorpusError(f"`grades` is {grades!r}; it must map passage ids to numbers")
    if not isinstance(history, list) or not all(isinstance(turn, str) for turn in history):
        raise CorpusError(f"`history` is {history!r}; it must be a list of texts")
    check_history(history)
    known = {"id", "query", "question", "answers", "relevant", "grades", "history"}
    metadata = {key: value for key, value in row.items() if key not in known}
    return Example(
        id=str(row.get("id", line)),
        query=query,
        answers=tuple(answers),
        relevant=tuple(str(item) for item in relevant if not isinstance(item, dict)),
        grades=grades,
        history=tuple(history),
        metadata={**metadata, **({"evidence": evidence} if evidence else {})},
        unanswerable="answers" in row and not answers and not grades and SYNTHETIC not in row,
    )


def _qa_pairs(path: Path, encoding: str) -> tuple[dict[str, str], dict[str, str], dict[str, list[str]]] | None:
    """queries, corpus and relevant_docs of such a file; None for any other. Raises CorpusError for ids that do not agree."""
    try:
        value = json.loads(file_text(path, encoding))
    except (ValueError, RecursionError):
        return None
    parts: list[Any] = [value.get(name) for name in ("queries", "corpus", "relevant_docs")] if isinstance(value, dict) else []
    if not parts or not all(isinstance(part, dict) for part in parts):
        return None
    queries, corpus, relevant = parts
    for name, part in (("queries", queries), ("corpus", corpus)):
        for identity, text in part.items():
            if not isinstance(text, str) or half_character(identity + text) is not None:
                raise CorpusError(f"{path}: {name} {identity!r} is no text in valid UTF-8", hint=PAIRS_FORM)
    for identity, named in relevant.items():
        names = named if isinstance(named, list) else [None]
        lost = [name for name in names if not isinstance(name, str) or name not in corpus]
        if identity not in queries or lost:
            what = f"names {lost[0]!r}, which is not in corpus" if lost else "is of no question in queries"
            raise CorpusError(f"{path}: relevant_docs {identity!r} {what}", hint=PAIRS_FORM)
    return queries, corpus, relevant


def _qa_examples(path: Path) -> list[Example]:
    """Every question with all of its passages; one that no passage is named for has none."""
    read = _qa_pairs(path, "utf-8")
    if read is None:
        raise CorpusError(f"{path} {NO_PAIRS}", hint=PAIRS_FORM)
    queries, _, relevant = read
    rows = [{"id": name, "query": text, "relevant": relevant.get(name, [])} for name, text in queries.items()]
    return [_example(row, path, number) for number, row in enumerate(rows, 1)]


def _beir_examples(folder: Path, split: str) -> Iterator[Example]:
    queries = next((folder / name for name in ("queries.jsonl", "queries.jsonl.gz") if (folder / name).is_file()), None)
    judged = folder / "qrels" / f"{split}.tsv"
    if queries is None or not judged.is_file():
        raise CorpusError(
            f"{folder} is no BEIR folder with a {split} split: it needs queries.jsonl and qrels/{split}.tsv",
            hint="training reads qrels/train.tsv, evaluation qrels/test.tsv; or give a .jsonl file of questions",
        )
    grades: dict[str, dict[str, int]] = {}
    for number, judgement in enumerate(file_text(judged, "utf-8").splitlines(), 1):
        cells = judgement.split("\t")
        if number == 1 and not cells[-1].lstrip("-").isdigit():
            continue
        if len(cells) != 3 or not cells[2].lstrip("-").isdigit():
            raise CorpusError(
                f"{judged}, line {number} is not `query-id<TAB>corpus-id<TAB>score`: {judgement!r}",
                hint="part the three cells by tabs; the score is a whole number",
            )
        grades.setdefault(cells[0], {})[cells[1]] = int(cells[2])
    for line, row in json_lines(queries, "utf-8"):
        identity = str(row.get("_id", row.get("id")))
        if identity in grades:
            graded = grades.pop(identity)
            relevant = [passage for passage, grade in graded.items() if grade > 0]
            asked = {**row, "id": identity, "query": row.get("text"), "relevant": relevant, "grades": graded}
            yield _example(asked, queries, line)
    if grades:
        raise CorpusError(
            f"{judged} judges queries that are not in {queries.name}: {', '.join(list(grades)[:5])}",
            hint="take both files from the same collection",
        )
