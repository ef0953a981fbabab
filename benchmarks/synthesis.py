"""Examples a second of the offline teacher over 10,000 passages, with retrieval, evidence, checks, duplicates and writing.

    python benchmarks/synthesis.py [examples] [passages]      (two minutes of one core; the target is 50 a second on 2 cores)

Documents are made up: names, years and numbers in sentences of a few patterns. Evidence is BM25's; prompts are counted in
tokens of the embedded reader. Opening (the plan, the frequencies, the links, which cell visits which document) is told
apart and counted in. Time of the process, which another job on the machine does not lengthen.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

from raglan.corpus import Corpus, write_corpus
from raglan.index.bm25 import BM25Index, build_bm25
from raglan.recipe import BM25Index as BM25Settings
from raglan.recipe import Recipe
from raglan.records import Hit, Passage
from raglan.synthesis import make_plan
from raglan.synthesis.evidence import Assembler, open_tokenizer
from raglan.synthesis.offline import CANNOT, Offline
from raglan.synthesis.run import synthesize

GIVEN = ["Abel", "Ines", "Casimir", "Dorcas", "Hester", "Magnus", "Lucan", "Verity", "Silas", "Rosalind", "Keziah", "Jethro"]
FAMILY = ["Norstrand", "Morrowick", "Thole", "Plimmery", "Vanbrook", "Orrell", "Ashgrove", "Burnaby", "Quaid", "Lomax", "Plume"]
PLACES = ["Halloran", "Brough", "Marrowby", "Skerrow", "Tolm", "Vessen", "Ladle", "Sule", "Hempsey", "Oxbarrow", "Norrick"]
WORDS = ["harbour", "council", "engineer", "quarrel", "wheel", "tower", "bridge", "canal", "market", "school", "lamp", "garden"]


class Searching:
    """BM25 over the corpus, as a knowledge base's retriever asks it."""

    def __init__(self, index: BM25Index, corpus: Corpus):
        self.index, self.corpus = index, corpus

    def retrieve(self, queries: list[str], k: int) -> list[tuple[Hit, ...]]:
        found = []
        for query in queries:
            scores = self.index.scores(query)
            rows = (-scores).argsort(kind="stable")[:k]
            hits = ((int(row), float(scores[row]), rank) for rank, row in enumerate(rows, 1) if scores[row] > 0)
            found.append(tuple(Hit(self.corpus[row], row, score, rank) for row, score, rank in hits))
        return found


def document(number: int) -> list[Passage]:
    draw = random.Random(number)
    name = f"{draw.choice(PLACES)} {draw.choice(WORDS).capitalize()} {number}"
    shared = f"{draw.choice(GIVEN)} {draw.choice(FAMILY)} {draw.choice(PLACES)}"
    passages = []
    for part in range(4):
        a, b, c, d, e, f = (draw.choice(WORDS) for _ in range(6))
        text = (
            f"The {a} of {name} was opened by {shared if part == 0 else draw.choice(GIVEN) + ' ' + draw.choice(FAMILY)} in "
            f"{draw.randrange(1600, 2000)} after a long dispute over the {b} and the old {c}. "
            f"In {draw.randrange(1600, 2000)} the {d} was rebuilt within {draw.randrange(2, 90)} months for the people "
            f"of {draw.choice(PLACES)} Quay, who paid for every {e} themselves. "
            f"Each autumn some {draw.randrange(100, 9000)} visitors climb the narrow stairs "
            f"beside the {f} to watch the boats of {draw.choice(PLACES)} Island come home with the evening tide."
        )
        passages.append(Passage(f"{number}#{part}", text, name, str(number), 1000 * part, 1000 * part + len(text)))
    return passages


def main(examples: int, passages: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        write_corpus(base / "corpus", (passage for number in range(passages // 4) for passage in document(number)))
        corpus = Corpus(base / "corpus")
        (base / "bm25").mkdir()
        build_bm25((f"{p.title}\n{p.text}" for p in corpus), BM25Settings(kind="bm25"), base / "bm25", total=len(corpus))
        recipe = Recipe.model_validate({
            "name": "synthesis", "seed": 1,
            "knowledge": {"path": "kb", "documents": "d", "indexes": {"bm25": {"kind": "bm25"}}},
            "synthesis": {"path": base / "data", "n": examples, "decontaminate": "none", "teacher": {"kind": "offline"},
                          "budget": {"tokenizer": "embedded"}},
        })  # fmt: skip
        assert recipe.synthesis is not None
        began, clock = time.process_time(), time.perf_counter()
        plan = make_plan(recipe, cannot=CANNOT)
        teacher = Offline(corpus, plan)
        searching = {"bm25": Searching(BM25Index(base / "bm25"), corpus)}
        tokenizer = open_tokenizer("embedded")
        assembler = Assembler(
            corpus, searching, recipe.synthesis, tokenizer, evidence=teacher.evidence, answers=teacher.answers
        )
        opened = time.process_time() - began
        done = synthesize(recipe, teacher, assembler.show, plan=plan, corpus=corpus, ignores=teacher.ignores)
        took, kept = time.process_time() - began, done.told["kept"]
    print(f"{len(corpus):,} passages, {examples:,} requested, {kept:,} kept, {done.told['attempts']:,} attempts")
    print(f"opening {opened:.1f} s, writing {took - opened:.1f} s of one core (clock {time.perf_counter() - clock:.1f} s)")
    rate = kept / took
    print(f"{rate:.0f} examples a second of one core, opening included (at least 50 on 2 cores: {_told(rate)})")


def _told(rate: float) -> str:
    return "OK" if rate >= 50 else "FAIL"


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[1:3]]
    main(*given, *[2000, 10_000][len(given) :])
