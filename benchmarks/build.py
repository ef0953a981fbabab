"""Passages/s of `raglan build` against sentence-transformers in a plain loop, on the whole NQ pool, in one run.

    make bench-build        (needs RAGLAN_DATA; about 8 minutes on 2 cores)

The plain loop gets its best batch size of three and the same number type as raglan, so that what is compared is the pipeline
and not the arithmetic; on a sample, the float32 loop with its own best batch stands beside it. `raglan build` and the opening
of the finished base run in processes of their own, so that their memory is theirs.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer

from raglan.embedded import embedded_model
from raglan.encoder import bfloat16_is_faster
from raglan.knowledge import KnowledgeBase

RECIPE = "name: bench-nq\nknowledge: {{path: {folder}, documents: {corpus}, chunk: null}}\n"
OPEN = """
import sys, time
import raglan.knowledge as knowledge
began = time.perf_counter()
base = knowledge.KnowledgeBase.open(sys.argv[1])
base.indexes, base.corpus[len(base.corpus) - 1], base.vectors
print(time.perf_counter() - began)
"""


def plain(texts: list[str], batch: int, dtype: torch.dtype) -> float:
    """Passages/s of the library called in a plain loop, 4,096 texts a call."""
    model = SentenceTransformer(str(embedded_model()), device="cpu")
    around = torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext()
    with around:
        model.encode(texts[:64], batch_size=batch, show_progress_bar=False)
        began = time.perf_counter()
        for start in range(0, len(texts), 4096):
            model.encode(texts[start : start + 4096], batch_size=batch, show_progress_bar=False)
    return len(texts) / (time.perf_counter() - began)


def best_of(texts: list[str], dtype: torch.dtype) -> tuple[float, int]:
    return max((plain(texts, batch, dtype), batch) for batch in (16, 32, 64))


def main() -> None:
    corpus = Path(os.environ["RAGLAN_DATA"]).resolve() / "nq" / "corpus.jsonl.gz"
    with gzip.open(corpus, "rt", encoding="utf-8") as file:
        texts = [f"{row['title']}\n{row['text']}" for row in map(json.loads, file)]
    sample = texts[:: len(texts) // 256][:256]
    same = torch.bfloat16 if bfloat16_is_faster() else torch.float32
    rate, batch = best_of(sample, same)
    print(f"plain loop on {len(sample)} passages, {same}: {rate:.1f} passages/s with its best batch, {batch}", flush=True)
    if same != torch.float32:
        wide, wide_batch = best_of(sample, torch.float32)
        print(f"plain loop on {len(sample)} passages, float32: {wide:.1f} with its best batch, {wide_batch}", flush=True)
    folder = Path("build/bench-nq").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    recipe = folder.with_suffix(".yaml")
    recipe.parent.mkdir(exist_ok=True)
    recipe.write_text(RECIPE.format(folder=folder, corpus=corpus), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "raglan", "build", str(recipe)], check=True)
    made = KnowledgeBase.open(folder).manifest
    whole = plain(texts, batch, same)
    ratio = made["passages_per_second"] / whole
    print(f"raglan build: {made['passages']} passages in {made['seconds']} s with all indexes, "
          f"{made['passages_per_second']} passages/s encoding, peak memory {made['peak_memory_mb']} MB")  # fmt: skip
    print(f"plain loop on all of them, {same}, batch {batch}: {whole:.1f} passages/s")
    print(f"raglan / plain {ratio:.2f} (at least 0.90: {'OK' if ratio >= 0.9 else 'FAIL'})")
    opened = subprocess.run([sys.executable, "-c", OPEN, str(folder)], check=True, capture_output=True, text=True).stdout
    verdict = "OK" if float(opened) < 1 else "FAIL"
    print(f"opening the finished base in a fresh process: {float(opened):.3f} s (below 1: {verdict})")


if __name__ == "__main__":
    main()
