"""Reading and cutting: every format, offsets, headings, two scripts, and files that cannot be read."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from conftest import json_lines
from raglan.chunk import Chunker
from raglan.corpus import Corpus, write_corpus
from raglan.documents import DocumentStream, read_documents, read_examples
from raglan.errors import CorpusError
from raglan.records import Document
from raglan.text import sentence_spans

WORDS = tiny.bert_tokenizer().backend_tokenizer


def chunker(max_tokens: int = 40, overlap: int = 0) -> Chunker:
    return Chunker(WORDS, max_tokens, overlap)


def test_example_corpus_is_read_whole_in_five_formats(vessen: Path) -> None:
    reading = read_documents([vessen / "documents"])
    assert reading.files == len(reading.documents) >= 60
    assert not reading.skipped
    endings = {document.id.rpartition(".")[2] for document in reading.documents}
    assert endings == {"md", "txt", "html", "pdf", "docx"}
    assert all(len(document.text) > 800 for document in reading.documents)


def test_offsets_headings_and_limits() -> None:
    text = "# Tower\n\nIntro a b.\n\n## Base\n\n" + "The base was built by who. " * 12 + "\n\n# Annex\n\nLast 中文。"
    passages = chunker().passages(Document("t.md", text, source="t.md"))
    assert all(text[p.start : p.end] == p.text for p in passages)
    assert passages[0].title == "Tower"
    assert {p.title for p in passages} == {"Tower", "Tower > Base", "Annex"}
    assert all(len(WORDS.encode(p.text).ids) - 2 <= 40 for p in passages)
    assert [p.id for p in passages] == [f"t.md#{n}" for n in range(len(passages))]
    assert all(p.text.rstrip().endswith((".", "。")) for p in passages)  # sentences stay whole where they fit


@settings(max_examples=30, deadline=None)
@given(st.text(alphabet="ab .\n#中文。😀é", max_size=300))
def test_passages_are_spans_in_order_and_lose_only_space_and_headings(text: str) -> None:
    passages = chunker(12).passages(Document("d", text))
    at = 0
    for passage in passages:
        assert text[passage.start : passage.end] == passage.text
        assert passage.start >= at
        at = passage.end
    kept = sum(len("".join(p.text.split())) for p in passages)
    plain = "\n".join(line for line in text.split("\n") if not line.lstrip().startswith("#"))
    assert kept >= len("".join(plain.split()))


def test_chinese_is_cut_at_sentences() -> None:
    text = "梵語的學術研究由德國學者開創。後來發現印歐語系也要歸功於它。" * 4
    passages = chunker(30).passages(Document("zh", text))
    assert len(passages) > 1
    assert all(p.text.endswith("。") for p in passages)
    assert "".join(p.text for p in passages) == text


CHINESE = [
    ("他很忙。「韓牛」貴。《史記》好。", 6, ["他很忙。", "「韓牛」貴。", "《史記》好。"]),  # an opening mark is no closing one
    ("他說：「走吧。」然後離開了。北京很冷！", 8, ["他說：「走吧。」", "然後離開了。", "北京很冷！"]),
    ("他走了……天黑了。真的嗎？！是的。", 7, ["他走了……", "天黑了。", "真的嗎？！", "是的。"]),
    ("東南西北，春夏秋冬，甲乙丙丁戊己庚。", 10, ["東南西北，春夏秋冬，", "甲乙丙丁戊己庚。"]),  # a sentence that does not fit
    ("甲，乙丙丁戊己庚辛壬癸子。", 8, ["甲，", "乙丙丁戊己庚辛壬", "癸子。"]),  # nor a clause
    ("一二三。\n\n四五。六七。八九十。", 6, ["一二三。", "四五。六七。", "八九十。"]),  # a paragraph that fits is whole
    ("一二。\n\n三四。\n\n五六。", 6, ["一二。\n\n三四。", "五六。"]),
]


@pytest.mark.parametrize(("text", "most", "wanted"), CHINESE)
def test_chinese_is_cut_where_it_ends(text: str, most: int, wanted: list[str]) -> None:
    cut = chunker(8)
    cut.max_tokens = most
    cut.__post_init__()
    assert [passage.text for passage in cut.passages(Document("zh", text))] == wanted


def test_chinese_markdown_keeps_its_headings_fences_and_tables() -> None:
    fence, table = "```\n甲。\n\n乙。\n```", "| 甲 | 乙 |\n| 丙 | 丁 |"
    text = f"# 題\n\n一二三四五。\n\n{fence}\n\n## 節\n\n{table}\n\n六七。"
    passages = chunker(12).passages(Document("zh.md", text))
    assert [p.text for p in passages] == ["一二三四五。", fence, table, "六七。"]
    assert [p.title for p in passages] == ["題", "題", "題 > 節", "題 > 節"]


def test_neighbours_share_chinese_sentences_as_overlap_says() -> None:
    text = "一二三。四五六。七八九。十甲乙。"
    shared = chunker(12, 4).passages(Document("zh", text))
    assert [p.text for p in shared] == ["一二三。四五六。七八九。", "七八九。十甲乙。"]
    assert [p.text for p in chunker(12, 3).passages(Document("zh", text))] == ["一二三。四五六。七八九。", "十甲乙。"]


@pytest.mark.parametrize("most", [48, 128])
def test_no_sentence_that_fits_is_cut_in_a_chinese_encyclopedia(most: int, data: Path) -> None:
    cut, inside, borders = chunker(most), 0, 0
    for row in json_lines(data / "drcd_zh" / "corpus.jsonl.gz")[:120]:
        text = row["text"]
        passages = cut.passages(Document(row["id"], text, row["title"]))
        assert "".join("".join(p.text for p in passages).split()) == "".join(text.split())
        assert all(text[p.start : p.end] == p.text for p in passages)
        assert all(tokens(p.text) <= most for p in passages)
        spans = sentence_spans(text)
        borders += len(passages) - 1
        for end in (p.end for p in passages[:-1]):
            torn = [(start, stop) for start, stop in spans if start < end < stop]
            assert all(tokens(text[start:stop]) > most for start, stop in torn)
            inside += len(torn)
    assert 0 < inside < borders / 2  # long sentences there are, and they are cut


def tokens(text: str) -> int:
    return len(WORDS.encode(text, add_special_tokens=False).ids)


def test_overlap_and_whole_documents() -> None:
    text = "A by the. " * 40
    assert len(chunker(20, 8).passages(Document("o", text))) > len(chunker(20).passages(Document("o", text)))
    whole = chunker(10).passages(Document("w", text, "T", whole=True))
    assert [(p.id, p.text, p.title) for p in whole] == [("w", text, "T")]


def test_tables_and_their_columns(tmp_path: Path) -> None:
    rows = [{"key": "1", "body": "one"}, {"key": "2", "body": "two"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.csv").write_text('key,body\n3,"three\nlines"\n')
    pyarrow.parquet.write_table(pa.Table.from_pylist([{"key": "4", "body": "four"}]), tmp_path / "c.parquet")
    reading = read_documents([tmp_path], columns={"id": "key", "text": "body"})
    assert [(d.id, d.text) for d in reading.documents] == [("1", "one"), ("2", "two"), ("3", "three\nlines"), ("4", "four")]
    with pytest.raises(CorpusError, match=r"a\.jsonl, row 1 has no column 'text'; it has key, body"):
        read_documents([tmp_path])


def test_a_date_goes_from_a_tables_row_into_every_passage(tmp_path: Path) -> None:
    rows = [{"id": "1", "text": "one. two.", "date": "2019-05-01"}, {"id": "2", "text": "three"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    days = [{"id": "3", "text": "four", "date": datetime(2020, 2, 3)}, {"id": "4", "text": "five", "date": None}]
    pyarrow.parquet.write_table(pa.Table.from_pylist(days), tmp_path / "c.parquet")
    read = read_documents([tmp_path]).documents
    assert [one.date for one in read] == ["2019-05-01", "", "2020-02-03", ""]
    write_corpus(tmp_path / "corpus", (passage for one in read for passage in chunker(20).passages(one)))
    assert [passage.date for passage in Corpus(tmp_path / "corpus")] == ["2019-05-01", "", "2020-02-03", ""]
    (tmp_path / "c.parquet").unlink()
    plain, other = (DocumentStream([tmp_path], columns={"date": name}) for name in ("none", "date"))
    assert len(list(plain)) == len(list(other)) == 2
    assert plain.digest != other.digest, "another date is another version"


def test_a_licence_goes_from_a_tables_row_into_every_passage(tmp_path: Path) -> None:
    rows: list[dict[str, str]] = [
        {"text": "one.", "licence": "CC BY-SA 4.0"}, {"text": "two", "license": "MIT"}, {"text": "three"},
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = DocumentStream([tmp_path])
    assert [one.licence for one in stream] == ["CC BY-SA 4.0", "MIT", ""]
    write_corpus(tmp_path / "corpus", (passage for one in stream for passage in chunker(20).passages(one)))
    assert [passage.licence for passage in Corpus(tmp_path / "corpus")] == ["CC BY-SA 4.0", "MIT", ""]
    other = DocumentStream([tmp_path], columns={"licence": "rights"})
    assert [one.licence for one in other] == ["", "MIT", ""]
    assert stream.digest != other.digest, "another licence is another version"


def test_beir_folder(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d1", "title": "T", "text": "x"}\n{"_id": "d2", "text": "y"}\n')
    (tmp_path / "queries.jsonl").write_text('{"_id": "q1", "text": "what?"}\n{"_id": "q2", "text": "unjudged?"}\n')
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\n")
    assert [d.id for d in read_documents([tmp_path], whole=True).documents] == ["d1", "d2"]
    examples = read_examples(tmp_path)
    assert [(e.id, e.query, e.relevant, e.grades) for e in examples] == [("q1", "what?", ("d1",), {"d1": 2, "d2": 0})]


@pytest.mark.parametrize(
    ("name", "content", "message", "cure"),
    [
        ("bad.pdf", b"%PDF-1.4 broken", r"bad\.pdf cannot be read as \.pdf", "on_error: skip"),
        ("latin.txt", b"caf\xe9", r"latin\.txt is not utf-8: byte 0xe9 at position 3", "knowledge.encoding"),
        ("empty.md", b"  \n", r"empty\.md holds no text", "on_error: skip"),
        ("torn.jsonl", b'{"text": "x"}\n{"te', r"torn\.jsonl, line 2 is not JSON", ""),
        ("list.jsonl", b"[1]\n", r"list\.jsonl, line 1 is list, not an object", ""),
        ("bad.parquet", b"PAR1", r"bad\.parquet cannot be read", ""),
        ("bad.docx", b"no zip", r"bad\.docx cannot be read as \.docx", "on_error: skip"),
        ("bad.jsonl.gz", b"no gzip", r"bad\.jsonl\.gz cannot be read", ""),
    ],
)
def test_a_broken_file_is_named_and_skipped_only_if_asked(
    tmp_path: Path, name: str, content: bytes, message: str, cure: str
) -> None:
    (tmp_path / "good.md").write_text("# Good\n\nText.")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message) as caught:
        read_documents([tmp_path])
    assert cure in str(caught.value)
    reading = read_documents([tmp_path], on_error="skip")
    assert [d.id for d in reading.documents] == ["good.md"]
    assert [Path(path).name for path, _ in reading.skipped] == [name]


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no document was found"):
        read_documents([tmp_path])
    with pytest.raises(CorpusError, match=r"there is no file or folder"):
        read_documents([tmp_path / "gone"])
    (tmp_path / "image.png").write_bytes(b"x")
    with pytest.raises(CorpusError, match=r"files ending in \.png are not read"):
        read_documents([tmp_path])


def test_latin_1_is_read_when_said(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert read_documents([tmp_path], encoding="latin-1").documents[0].text == "café"


def test_duplicate_ids_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": "x", "text": "1"}\n{"id": "x", "text": "2"}\n')
    with pytest.raises(CorpusError, match=r"document id 'x' occurs twice"):
        read_documents([tmp_path])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "  "}', "`query` is '  '"),
        ('{"query": "q", "answers": "x"}', "`answers` is 'x'"),
        ('{"query": "q", "relevant": "x"}', "`relevant` is 'x'"),
        ('{"query": "q", "relevant": [{"quote": "x"}]}', "without `document`"),
        ("", "holds no question"),
    ],
)
def test_faulty_questions(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "q.jsonl").write_text(line + "\n")
    with pytest.raises(CorpusError, match=message):
        read_examples(tmp_path / "q.jsonl")
