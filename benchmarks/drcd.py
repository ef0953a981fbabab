"""Chinese: questions for benchmarks/drcd.yaml, what the embedded vocabulary knows of them, and two ways to cut terms for BM25.

    python benchmarks/drcd.py            writes build/drcd-questions; RAGLAN_DATA is read
    python benchmarks/drcd.py --terms    characters and pairs against pairs alone: recall, MRR, size, time

DRCD (Shao et al. 2018, arXiv 1806.00920) has no training questions here, so its 3,524 are parted by article: a quarter of the
articles is measured on, and no question about them is learned.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from raglan.chunk import Chunker
from raglan.embedded import embedded_model
from raglan.index import BM25Index, Queries
from raglan.index.bm25 import build_bm25
from raglan.metrics import paired_bootstrap
from raglan.recipe import BM25Index as BM25Settings
from raglan.records import Document, Passage

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "drcd-questions"
HELD_OUT, MEASURED, LEARNED = 0.25, 300, 1000
DEPTH = 100
CUTS = (None, 128)  # tokens a passage; None: DRCD's own paragraphs
Row = dict[str, Any]


def main() -> None:
    data = Path(os.environ["RAGLAN_DATA"]) / "drcd_zh"
    documents, questions = _lines(data / "corpus.jsonl.gz"), _lines(data / "dev.jsonl.gz")
    tokenizer = AutoTokenizer.from_pretrained(str(embedded_model()))
    if "--terms" in sys.argv:
        for most in CUTS:
            _terms(documents, questions, None if most is None else Chunker(tokenizer.backend_tokenizer, most))
        return
    known = {piece for piece in tokenizer.get_vocab() if len(piece) == 1 and _is_han(piece)}
    text = [letter for row in documents for letter in row["text"] if _is_han(letter)]
    answers = [[letter for letter in row["answers"][0] if _is_han(letter)] for row in questions]
    print(f"Han characters in the embedded vocabulary: {len(known)}; of the corpus' {len(set(text))}: {len(known & set(text))}")
    print(f"of its running text: {np.mean([letter in known for letter in text]):.1%}; "
          f"answers of known ones alone: {np.mean([known.issuperset(answer) for answer in answers]):.1%}")  # fmt: skip
    _split(questions)


def _split(questions: list[Row]) -> None:
    chance = random.Random(0)
    articles = sorted({row["title"] for row in questions})
    held = set(chance.sample(articles, round(HELD_OUT * len(articles))))
    chance.shuffle(questions)
    parts = {
        "train": [row for row in questions if row["title"] not in held][:LEARNED],
        "heldout": [row for row in questions if row["title"] in held][:MEASURED],
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (FOLDER / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{name}: {len(rows)} questions about {len({row['title'] for row in rows})} articles")


def _terms(documents: list[Row], questions: list[Row], chunker: Chunker | None) -> None:
    passages = [passage for row in documents for passage in _cut(row, chunker)]
    rows: dict[str, list[int]] = {}
    for place, passage in enumerate(passages):
        rows.setdefault(passage.document, []).append(place)
    gold = [_gold(question, rows, passages) for question in questions]
    texts = [f"{passage.title}\n{passage.text}" for passage in passages]
    figures, costs = {}, {}
    for han in ("pairs", "both"):
        with tempfile.TemporaryDirectory() as folder:
            build_bm25(texts, BM25Settings(kind="bm25", han=han), Path(folder))
            index = BM25Index(Path(folder))
            began = time.process_time()
            found = index.search(Queries([question["query"] for question in questions]), DEPTH)[1]
            seconds = time.process_time() - began
            size = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6
        figures[han] = _figures(found, gold)
        costs[han] = f"{size:.1f} MB, {1000 * seconds / len(questions):.2f} ms a question"
    print(f"\n{len(passages)} passages | " + " | ".join(f"{han}: {cost}" for han, cost in costs.items()))
    for name, pairs in figures["pairs"].items():
        both = figures["both"][name]
        change = paired_bootstrap(100 * pairs, 100 * both, groups=[question["title"] for question in questions])
        print(f"{name:<5} pairs {100 * pairs.mean():5.1f}  both {100 * both.mean():5.1f}  "
              f"difference {change.mean:+.2f} [{change.low:+.2f}, {change.high:+.2f}]")  # fmt: skip


def _cut(row: Row, chunker: Chunker | None) -> list[Passage]:
    if chunker is None:
        return [Passage(row["id"], row["text"], row["title"], row["id"], 0, len(row["text"]))]
    return chunker.passages(Document(row["id"], row["text"], row["title"]))


def _gold(question: Row, rows: dict[str, list[int]], passages: list[Passage]) -> set[int]:
    """The passages of the named document that hold the answer; all of it where none does."""
    own = rows[question["relevant"][0]]
    return {place for place in own if question["answers"][0] in passages[place].text} or set(own)


def _figures(found: np.ndarray, gold: list[set[int]]) -> dict[str, np.ndarray]:
    pairs = zip(found.tolist(), gold, strict=True)
    ranks = np.array([next((n for n, row in enumerate(own, 1) if row in good), np.inf) for own, good in pairs])
    return {**{f"R@{k}": (ranks <= k).astype(float) for k in (1, 5, 20)}, "MRR": 1 / ranks}


def _is_han(letter: str) -> bool:
    return "\u4e00" <= letter <= "\u9fff"


def _lines(path: Path) -> list[Row]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


if __name__ == "__main__":
    main()
