"""Questions for benchmarks/self_rag_squad.yaml: the unanswerable ones by article into learned and measured, and the answerable
ones about articles of which none was learned.

    python benchmarks/self_rag_squad.py                    writes build/self-rag-squad-questions; RAGLAN_DATA is read
    python benchmarks/self_rag_squad.py --started-from     the generator that recipes/self_rag_tiny.yaml made
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path
from typing import Any

from raglan.recipe import load_recipe
from raglan.stages import finished_parts

LEARNED = {"Packet switching", "Huguenot", "Imperialism", "Harvard University"}
ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "self-rag-squad-questions"


def main() -> None:
    if "--started-from" in sys.argv:
        print(finished_parts(load_recipe(ROOT / "recipes" / "self_rag_tiny.yaml"))[-1][1].generator)
        return
    data = Path(os.environ["RAGLAN_DATA"]) / "squad"
    titles = {row["id"]: row["title"] for row in _lines(data / "corpus.jsonl.gz")}
    parts: dict[str, list[dict[str, Any]]] = {"unanswerable_train": [], "unanswerable_test": [], "heldout": []}
    for row in _lines(data / "dev_unanswerable.jsonl.gz"):
        parts["unanswerable_train" if titles[row["relevant"][0]] in LEARNED else "unanswerable_test"].append(row)
    parts["heldout"] = [row for row in _lines(data / "dev.jsonl.gz") if titles[row["relevant"][0]] not in LEARNED]
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (FOLDER / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}: {len(rows)} questions")


def _lines(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


if __name__ == "__main__":
    main()
