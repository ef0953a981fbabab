"""What fifty corrections are worth: people correct a tuned system, it learns from them, and is asked again.

    make bench-feedback     (after `make demo`, whose system it starts from; about 10 minutes on 2 cores)
    python benchmarks/feedback.py --steps 2                                   a look at whether it runs, in a minute or two
    python benchmarks/feedback.py stages.find.objective.k=5                   changes of the training

The demo's tuned system has answered questions on documents that no training question is about. Of those that it answers wrong
N are corrected: the answers by a Label Studio export, the passages that it found, judged relevant or not, by an Argilla export.
Both files are written here, from the gold answers and gold passages, in place of people. They are imported into one store and
one `raglan train` learns from it: the generator the answers, the query encoder the passages. Everything goes through the
command line.

Before and after are compared on the corrected questions, on paraphrases of them (made by rules; a question's paraphrases count
as one), and on the held-out questions that nobody corrected, which say what was gained or lost beside. Differences are paired
over questions, 95 % intervals by bootstrap.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from raglan.documents import read_examples, write_examples
from raglan.evaluate import Evaluation, evaluation_folder, open_evaluation
from raglan.metrics import Interval, bootstrap, paired_bootstrap
from raglan.recipe import Recipe, load_recipe
from raglan.records import Example
from raglan.train import Parts, finished_parts

ROOT = Path(__file__).parent.parent
VESSEN = ROOT / "examples" / "vessen" / "vessen.yaml"
FOLDER = ROOT / "build" / "feedback"
FIGURES = ("retrieved/em", "retrieved/f1", "recall@1", "recall@3")
SETS = ("corrected", "paraphrases", "others")
SAME = {  # what the demo's recipe says of the same things
    "knowledge": ("path", "documents", "chunk", "encoder", "indexes"),
    "prompt": ("max_tokens",),
    "decode": ("kind", "beams", "max_new_tokens"),
}
RULES = (
    (r"^Who was ", "Which person was "),
    (r"^Who ", "What is the name of the person who "),
    (r"^In (?:which|what) year (?:was|were) (.+?) (\w+)\?$", r"When did it happen that \1 was \2?"),
    (r"^In (?:which|what) year ", "When "),
    (r"^How many ", "What number of "),
    (r"^How long ", "Of what length "),
    (r"^What (?:was|is) the ", "Tell me the "),
    (r"^What ", "Which "),
    (r"^Which ", "What "),
    (r"\bbuilt\b", "constructed"),
    (r"\bdesigned\b", "drew the plans of"),
    (r"\bopened\b", "first opened"),
    (r"\bbegin\b", "start"),
    (r"\bmade of\b", "produced from"),
    (r"\bcalled\b", "named"),
    (r"^(\w)(.*)\?$", lambda m: f"I would like to know this: {m[1].lower()}{m[2]}."),
    (r"^(.*)\?$", r"\1, please?"),
)


def raglan(*words: str) -> str:
    """A command of raglan's; its stdout."""
    print("$ raglan", " ".join(words), file=sys.stderr)
    done = subprocess.run([sys.executable, "-m", "raglan", "-q", *words], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def paraphrases(example: Example, count: int = 3) -> list[Example]:
    """The first so many rules that change the question, each by itself, the last two being politeness."""
    found = dict.fromkeys(re.sub(pattern, new, example.query, count=1) for pattern, new in RULES)
    return [
        replace(example, id=f"{example.id}~{n}", query=text)
        for n, text in enumerate([text for text in found if text != example.query][:count])
    ]


def corrections(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Label Studio tasks: the answer that was given, and the right one in a text area."""
    return [
        {
            "id": number, "data": {"question": row["query"], "answer": row["predictions"]["retrieved"]["text"]},
            "annotations": [{
                "id": number, "completed_by": 1, "was_cancelled": False, "ground_truth": False,
                "updated_at": "2026-01-01T00:00:00Z", "result": [
                    {"from_name": "correction", "to_name": "answer", "type": "textarea", "value": {"text": row["answers"][:1]}}
                ],
            }],
            "predictions": [],
        }
        for number, row in enumerate(rows, 1)
    ]  # fmt: skip


def judgements(rows: Sequence[dict[str, Any]], passages: int) -> list[dict[str, Any]]:
    """Argilla records: each of the first passages that were found, relevant or not."""
    return [
        {
            "id": f"{row['id']}/{hit['id']}", "status": "completed", "suggestions": {}, "metadata": {"passage_id": hit["id"]},
            "fields": {"question": row["query"], "passage": hit["text"]},
            "responses": {"relevance": [
                {"value": "relevant" if hit["id"] in row["relevant"] else "irrelevant", "user_id": "person-1"}
            ]},
        }
        for row in rows
        for hit in row["hits"][:passages]
    ]  # fmt: skip


def recipe_of(parts: Parts, demo: Recipe, name: str, extra: dict[str, Any]) -> Path:
    """A recipe like the demo's, that starts from these parts."""
    said = demo.model_dump(mode="json")
    tree = {key: {field: said[key][field] for field in fields} for key, fields in SAME.items()}
    tree |= {
        "name": name, "seed": demo.seed, "runs": "runs",
        "generator": {"model": str(parts.generator), "freeze": ["word_embeddings"]},
        "retriever": {"index": demo.index, "k": demo.retriever.k, "query_encoder": str(parts.query_encoder)}, **extra,
    }  # fmt: skip
    path = FOLDER / f"{name}.yaml"
    path.write_text(json.dumps(tree, indent=1), encoding="utf-8")  # JSON is YAML
    return path


def measured(recipe: Path, questions: str) -> Evaluation:
    change = f"evaluate.questions={questions}.jsonl"
    raglan("evaluate", str(recipe), change, "--json")
    loaded = load_recipe(recipe, [change])
    assert loaded.evaluate is not None
    return open_evaluation(evaluation_folder(loaded, loaded.evaluate, "untuned", Parts()))


def by_question(evaluation: Evaluation, figure: str) -> list[float]:
    """A value a question; of its paraphrases the mean."""
    groups: dict[str, list[float]] = {}
    for row, value in zip(evaluation.rows, evaluation.values(figure), strict=True):
        groups.setdefault(row["id"].partition("~")[0], []).append(value)
    return [statistics.fmean(v for v in values if not math.isnan(v)) if not all(map(math.isnan, values)) else math.nan
            for values in groups.values()]  # fmt: skip


def told(value: Interval, *, sign: str = "") -> str:
    return f"{100 * value.mean:{sign}.1f} [{100 * value.low:{sign}.1f}, {100 * value.high:{sign}.1f}]"


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("overrides", nargs="*", help="settings of the training to change: a.b=c")
    words.add_argument("--corrections", type=int, default=50)
    words.add_argument("--passages", type=int, default=3, help="judged passages a corrected question")
    words.add_argument("--seed", type=int, default=0, help="which wrong answers are corrected")
    words.add_argument("--steps", type=int, help="so many training steps in every stage, the demo's too: to see that it runs")
    asked = words.parse_args()
    few = [f"train.max_steps={asked.steps}"] if asked.steps else []
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)

    for command in ("build", "train", "evaluate"):  # found done, after `make demo`
        raglan(command, str(VESSEN), *few)
    demo = load_recipe(VESSEN, few)
    stage, parts = finished_parts(demo)[-1]
    assert demo.evaluate is not None
    rows = open_evaluation(evaluation_folder(demo, demo.evaluate, stage, parts)).rows
    wrong = [row for row in rows if not row["figures"]["retrieved/em"]]
    random.Random(asked.seed).shuffle(wrong)
    chosen = sorted(wrong[: asked.corrections], key=lambda row: row["id"])
    names = {row["id"] for row in chosen}
    examples = {example.id: example for example in read_examples(demo.evaluate.questions)}
    write_examples(FOLDER / "corrected.jsonl", [examples[row["id"]] for row in chosen])
    write_examples(FOLDER / "paraphrases.jsonl", [p for row in chosen for p in paraphrases(examples[row["id"]])])
    write_examples(FOLDER / "others.jsonl", [example for name, example in examples.items() if name not in names])
    (FOLDER / "label-studio.json").write_text(json.dumps(corrections(chosen)), encoding="utf-8")
    (FOLDER / "argilla.json").write_text(json.dumps(judgements(chosen, asked.passages)), encoding="utf-8")

    store = str(FOLDER / "people.sqlite")
    for tool in ("label-studio", "argilla"):
        print(raglan("feedback", "import", str(FOLDER / f"{tool}.json"), "--from", tool, "--store", store), end="")
    print(raglan("feedback", "list", "--store", store), end="")
    replay = {"replay": str(VESSEN.parent / "questions" / "train.jsonl"), "replay_times": 3}
    tune = recipe_of(parts, demo, "tune", {
        "evaluate": {"questions": "others.jsonl"},
        "stages": {
            "read": {
                "data": {"kind": "feedback", "store": "people.sqlite", "passages": 3, **replay},
                "objective": {"kind": "answer"},
                "train": {"learning_rate": 1e-4, "num_train_epochs": 4, "per_device_train_batch_size": 16},
            },
            "find": {
                "data": {"kind": "feedback", "store": "people.sqlite", **replay},
                "objective": {"kind": "lsr", "k": 10, "candidates": "dense", "target": "given", "tau": 0.5},
                "train": {"learning_rate": 1e-5, "num_train_epochs": 3, "per_device_train_batch_size": 32},
            },
        },
    })  # fmt: skip
    changes = [*asked.overrides, *few]
    raglan("train", str(tune), *changes)
    learned = finished_parts(load_recipe(tune, changes))[-1][1]
    evaluate = {"evaluate": {"questions": "others.jsonl", "modes": ["retrieved"], "k": [1, 3, 5, 10]}}
    systems = [recipe_of(p, demo, name, evaluate) for name, p in (("before", parts), ("after", learned))]

    print(f"\n{len(wrong)} of {len(rows)} held-out questions answered wrong; {len(chosen)} corrected, "
          f"{len(chosen) * asked.passages} passages judged\n")  # fmt: skip
    print("| questions | figure | before | after | difference, paired |\n|---|---|---|---|---|")
    for questions in SETS:
        before, after = (measured(system, questions) for system in systems)
        for figure in FIGURES:
            values = [by_question(evaluation, figure) for evaluation in (before, after)]
            shown = [told(bootstrap(value)) for value in values]
            gain = told(paired_bootstrap(*values), sign="+")
            print(f"| {questions} ({len(values[0])}) | {figure} | {' | '.join(shown)} | {gain} |")


if __name__ == "__main__":
    main()
