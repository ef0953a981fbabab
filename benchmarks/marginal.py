"""RAG trained end to end on SQuAD paragraphs: what a learning query encoder, the prior and the kind of marginal are worth.

    make bench-marginal     (after bench-squad; needs RAGLAN_DATA; about two hours on 2 cores)

Every arm starts from the same reader, the one that `make bench-squad` left after its stage `choose`, which has seen no
question about these paragraphs, and makes the same number of generator steps on the same questions in the same order. The
questions are those of the articles held out there, one half to learn from and the other half to measure: the same paragraphs,
other questions, as a person's own documents and questions are. Arms that are done are not trained again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
from pathlib import Path

from raglan.evaluate import Evaluation, compare, evaluate
from raglan.metrics import Interval
from raglan.recipe import Recipe, load_recipe
from raglan.stages import Parts, finished_parts
from raglan.text import question_key
from raglan.train import train

HERE = Path(__file__).parent
LEARNS = "stages.tune.objective.rates={query_encoder: 5.0e-5}"
FROZEN = "stages.tune.objective.learn=[generator]"
SEQUENCE, TOKEN = "decode.kind=rag_sequence", "decode.kind=rag_token"
OVER = "stages.tune.objective.over=token"
ARMS: dict[str, list[str]] = {
    "sequence": [LEARNS, SEQUENCE],
    "sequence-frozen": [FROZEN, SEQUENCE],
    "token": [LEARNS, TOKEN, OVER],
    "token-frozen": [FROZEN, TOKEN, OVER],
    "concat": [
        "stages.tune.objective={kind: answer}", "stages.tune.data.source=retrieved", "stages.tune.data.passages=4",
        "decode.kind=concat",
    ],
    "sequence-bm25": [FROZEN, SEQUENCE, "retriever.index=bm25", "retriever.prior.kind=bm25"],
    "sequence-hybrid": [LEARNS, SEQUENCE, "retriever.index=hybrid", "retriever.prior.kind=hybrid"],
}  # fmt: skip
PAIRS = [("sequence", "sequence-frozen"), ("token", "token-frozen"), ("sequence", "token"), ("sequence", "concat")]
FIGURES = ["recall@1", "recall@5", "retrieved/em", "retrieved/f1"]


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--reader", type=Path, help="the generator all arms start from; default bench-squad's after `choose`")
    words.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    asked = words.parse_args()
    reader = asked.reader or _trained_reader()
    split(HERE.parent / "build" / "marginal")
    found = {name: measured(name, reader) for name in asked.arms}
    print("| arm | system |", " | ".join(FIGURES), "|\n|---|---|" + "---|" * len(FIGURES))
    for name, systems in found.items():
        for system in systems:
            print(f"| {name} | {system.system} |", " | ".join(_told(system.figures[figure]) for figure in FIGURES), "|")
        gains = compare(*systems)
        print(f"| {name} | difference |", " | ".join(_told(gains[figure], sign="+") for figure in FIGURES), "|")
    for one, other in PAIRS:
        if one in found and other in found:
            gains = compare(found[other][-1], found[one][-1])
            print(f"| {one} − {other} | |", " | ".join(_told(gains[figure], sign="+") for figure in FIGURES), "|")


def measured(name: str, reader: Path) -> tuple[Evaluation, Evaluation]:
    """An arm before and after its training; a frozen arm starts as its learning twin does."""
    recipe, twin = arm(name, reader), arm(name.removesuffix("-frozen"), reader)
    assert recipe.evaluate is not None
    tuned = train(recipe)
    return evaluate(twin, recipe.evaluate, "untuned", Parts()), evaluate(recipe, recipe.evaluate, "tuned", tuned)


def arm(name: str, reader: Path) -> Recipe:
    """The recipe of one arm; `name` also names its run."""
    return load_recipe(HERE / "marginal.yaml", [f"name={name}", f"generator.model={reader.absolute()}", *ARMS[name]])


def split(folder: Path) -> None:
    """The held-out articles' questions, shuffled and halved; what is asked in both halves is measured only."""
    with gzip.open(Path(os.environ["RAGLAN_DATA"]) / "squad" / "dev.jsonl.gz", "rt", encoding="utf-8") as file:
        questions = [json.loads(line) for line in file]
    random.Random(7).shuffle(questions)
    folder.mkdir(parents=True, exist_ok=True)
    half = len(questions) // 2
    asked = {question_key(question["query"]) for question in questions[half:]}
    learned = [question for question in questions[:half] if question_key(question["query"]) not in asked]
    for name, part in (("train", learned), ("test", questions[half:])):
        lines = "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def _trained_reader() -> Path:
    parts = dict(finished_parts(load_recipe(HERE / "squad.yaml")))
    if "choose" not in parts:
        raise SystemExit("train the reader first: make bench-squad")
    return Path(str(parts["choose"].generator))


def _told(value: Interval, *, sign: str = "") -> str:
    return f"{100 * value.mean:{sign}.1f} [{100 * value.low:{sign}.1f}, {100 * value.high:{sign}.1f}]"


if __name__ == "__main__":
    main()
