"""Passages/s of `raglan build`'s encoding against sentence-transformers in a plain loop, in one run, on the NQ pool.

    make bench-build        (needs RAGLAN_DATA; about 10 minutes on 2 cores)

The plain loop gets its best batch size of four and the same number type as raglan, so that what is compared is the pipeline
and not the arithmetic; the float32 loop stands beside it. Then the finished base is opened in a fresh process.
"""

from __future__ import annotations

import argparse
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
from raglan.encoder import Encoder
from raglan.knowledge import build_knowledge
from raglan.recipe import EncoderSettings, KnowledgeSettings

OPEN = """
import sys, time, resource
import raglan.knowledge as knowledge
began = time.perf_counter()
base = knowledge.KnowledgeBase.open(sys.argv[1])
base.indexes, base.corpus[len(base.corpus) - 1], base.vectors
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def plain(texts: list[str], batch: int, dtype: torch.dtype) -> float:
    """Passages/s of the library called in a plain loop."""
    model = SentenceTransformer(str(embedded_model()), device="cpu")
    around = torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext()
    with around:
        model.encode(texts[:64], batch_size=batch, show_progress_bar=False)
        began = time.perf_counter()
        for start in range(0, len(texts), 4096):
            model.encode(texts[start : start + 4096], batch_size=batch, show_progress_bar=False)
    return len(texts) / (time.perf_counter() - began)


def ours(texts: list[str]) -> float:
    encoder = Encoder.open(EncoderSettings())
    encoder.embed_passages(texts[:64])
    began = time.perf_counter()
    for start in range(0, len(texts), 4096):
        encoder.embed_passages(texts[start : start + 4096])
    return len(texts) / (time.perf_counter() - began)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--sample", type=int, default=2048, help="passages in the comparison of loops")
    sample = options.parse_args().sample
    path = Path(os.environ["RAGLAN_DATA"]) / "nq" / "corpus.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        texts = [f"{row['title']}\n{row['text']}" for row in map(json.loads, file)]
    part = texts[:: max(1, len(texts) // sample)][:sample]
    best = max((plain(part[:512], batch, torch.bfloat16), batch) for batch in (16, 32, 64, 128))[1]
    rates = {"raglan": [], "sentence-transformers, same type": [], "sentence-transformers, float32": []}
    for _ in range(3):  # alternating, so that a noisy machine is noisy for all
        rates["raglan"].append(ours(part))
        rates["sentence-transformers, same type"].append(plain(part, best, torch.bfloat16))
        rates["sentence-transformers, float32"].append(plain(part, best, torch.float32))
    print(f"{len(part)} passages of NQ, best of 3 alternating runs, plain loop with batch {best}")
    for name, values in rates.items():
        print(f"{name:36s} {max(values):7.1f} passages/s   raglan/this {max(rates['raglan']) / max(values):5.2f}")
    folder = Path("build/bench-nq")
    shutil.rmtree(folder, ignore_errors=True)
    base = build_knowledge(KnowledgeSettings(path=folder, documents=(path,), chunk=None))
    made = base.manifest
    print(f"whole build: {made['passages']} passages, {made['seconds']} s, {made['passages_per_second']} passages/s encoding, "
          f"peak memory {made['peak_memory_mb']} MB")  # fmt: skip
    opened = subprocess.run([sys.executable, "-c", OPEN, str(folder)], check=True, capture_output=True, text=True).stdout
    print(f"opening the finished base in a fresh process: {float(opened.split()[0]):.3f} s")


if __name__ == "__main__":
    main()
