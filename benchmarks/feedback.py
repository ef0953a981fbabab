"""What corrections are worth, and what they cost: people correct a tuned system, it learns from them, and is asked again.

    make bench-feedback     (after `make demo`, whose system it starts from; about 15 minutes on 2 cores)
    python benchmarks/feedback.py --steps 2                                   a look at whether it runs, in some minutes
    python benchmarks/feedback.py stages.read.objective.hold=0                changes of the training

The demo's tuned system has answered held-out questions, on documents that no training question is about. Who is measured is
chosen before anybody looks at an answer: the documents are dealt into two folds. People look at the questions on one fold's
documents, and at no others: of those that are answered wrong the answers are corrected, by a Label Studio export, and the
passages that were found are judged, by an Argilla export. Both files are written here, from the gold answers and gold passages,
in place of people. They are imported into a store and one `raglan train` learns from it: the generator the answers, the query
encoder the passages. Then the same the other way round, from the demo's system again. Everything goes through the command line.

Compared, of both folds together, before and after:

- corrected: the corrected questions, each with the system that learned from its fold;
- paraphrases of them, made by rules; a question's paraphrases count as one;
- others: all held-out questions, right or wrong before, each with the system that learned from the *other* fold, where nobody
  looked at it nor at any question on its document; and of these those that were right before. Those can only fall, whatever is
  done, and those that were wrong can only rise: whoever is chosen by being right must be expected to do worse the second time;
- beside: the questions on the documents that people looked at which had been answered right, so that nothing was said of them.

Beside it stands a control, the same training on known questions alone, as many rows and steps and no correction among them,
all of them held: what training goes on to do by itself. What was chosen for being right is to be compared with it. Differences
are paired over questions, 95 % intervals by bootstrap over documents; one training a fold, so they tell nothing of its luck.
"""

from __future__ import annotations

import argparse
import json
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
from raglan.stages import Parts, finished_parts

ROOT = Path(__file__).parent.parent
VESSEN = ROOT / "examples" / "vessen" / "vessen.yaml"
FOLDER = ROOT / "build" / "feedback"
FIGURES = ("retrieved/em", "retrieved/f1", "recall@1", "recall@3")
SETS = ("corrected", "paraphrases", "others", "others right before", "others wrong before", "beside, right before")
ARMS = ("before", "control", "after")
DIFFERENCES = (("before", "after"), ("control", "after"), ("before", "control"))
TRAINING: dict[str, dict[str, Any]] = {
    "read": {
        "objective": {"kind": "answer", "hold": 1.0, "hold_rows": "replayed"},
        "train": {"learning_rate": 1e-4, "num_train_epochs": 4, "per_device_train_batch_size": 16},
    },
    "find": {
        "objective": {"kind": "lsr", "k": 10, "candidates": "dense", "target": "given", "tau": 0.5},
        "train": {"learning_rate": 1e-5, "num_train_epochs": 3, "per_device_train_batch_size": 32},
    },
}
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


def recipe_of(parts: Parts, demo: Recipe, path: Path, extra: dict[str, Any]) -> Path:
    """A recipe like the demo's, that starts from these parts."""
    said = demo.model_dump(mode="json")
    tree = {key: {field: said[key][field] for field in fields} for key, fields in SAME.items()}
    tree |= {
        "name": path.stem, "seed": demo.seed, "runs": "runs",
        "generator": {"model": str(parts.generator), "freeze": ["word_embeddings"]},
        "retriever": {"index": demo.index, "k": demo.retriever.k, "query_encoder": str(parts.query_encoder)}, **extra,
    }  # fmt: skip
    path.write_text(json.dumps(tree, indent=1), encoding="utf-8")  # JSON is YAML
    return path


def document_of(example: Example) -> str:
    (document,) = {item["document"] for item in example.metadata["evidence"]}
    return str(document)


def folds_of(examples: Sequence[Example], seed: int) -> list[list[Example]]:
    """The questions on one half of the documents, and on the other."""
    documents = sorted({document_of(example) for example in examples})
    random.Random(seed).shuffle(documents)
    first = set(documents[: len(documents) // 2])
    return [[example for example in examples if (document_of(example) in first) == own] for own in (True, False)]


class Fold:
    """People look at some questions, a system learns what they say of them, and is asked those and all others."""

    def __init__(self, folder: Path, looked_at: Sequence[Example], others: Sequence[Example], rows: dict[str, dict[str, Any]]):
        folder.mkdir(parents=True)
        self.folder, self.others = folder, others
        self.beside = [example for example in looked_at if rows[example.id]["figures"]["retrieved/em"]]
        self.documents = {example.id: document_of(example) for example in (*looked_at, *others)}
        self.corrected = [example for example in looked_at if not rows[example.id]["figures"]["retrieved/em"]]
        self.wrong = [rows[example.id] for example in self.corrected]
        again = [other for example in self.corrected for other in paraphrases(example)]
        write_examples(folder / "others.jsonl", others)
        write_examples(folder / "measured.jsonl", [*self.corrected, *again, *self.beside, *others])

    def collect(self, passages: int) -> None:
        """Two exports, imported into one store."""
        store = str(self.folder / "people.sqlite")
        for tool, told in (("label-studio", corrections(self.wrong)), ("argilla", judgements(self.wrong, passages))):
            path = self.folder / f"{tool}.json"
            path.write_text(json.dumps(told), encoding="utf-8")
            print(raglan("feedback", "import", str(path), "--from", tool, "--store", store), end="")
        print(raglan("feedback", "list", "--store", store), end="")

    def recipes(self, parts: Parts, demo: Recipe, changes: Sequence[str]) -> dict[str, Path]:
        """`after` learns what people said, with known questions beside; `control` as many known questions, and nothing else."""
        known = str(VESSEN.parent / "questions" / "train.jsonl")
        data: dict[str, Any] = {"kind": "feedback", "store": "people.sqlite", "replay": known, "replay_times": 3}
        own = {"read": {"passages": 3}, "find": {}}
        stages: dict[str, Any] = {name: {"data": {**data, **own[name]}, **said} for name, said in TRAINING.items()}
        after = recipe_of(
            parts, demo, self.folder / "after.yaml", {"evaluate": {"questions": "others.jsonl"}, "stages": stages}
        )
        bound = load_recipe(after, changes).stages
        for name, stage in bound.items():
            said = stage.model_dump(mode="json")
            count = len(self.corrected) + round(len(self.corrected) * said["data"]["replay_times"])
            stages[name] = {**said, "data": {"kind": "questions", "path": known, "limit": count, **own[name]}}
        if "hold_rows" in stages["read"]["objective"]:
            stages["read"]["objective"]["hold_rows"] = "all"  # all rows are replayed
        evaluate = {"evaluate": {"questions": "others.jsonl"}}
        control = recipe_of(parts, demo, self.folder / "control.yaml", {**evaluate, "stages": stages})
        return {"control": control, "after": after}

    def values(self, found: dict[str, Evaluation], figure: str) -> dict[str, dict[str, dict[str, float]]]:
        """By set of questions and by arm, a value a question; of its paraphrases the mean."""
        asked = {arm: by_question(evaluation, figure) for arm, evaluation in found.items()}
        right = by_question(found["before"], "retrieved/em")
        corrected, others = [example.id for example in self.corrected], [example.id for example in self.others]
        names = {
            "corrected": corrected, "paraphrases": [f"{name}~" for name in corrected], "others": others,
            "others right before": [name for name in others if right[name] == 1],
            "others wrong before": [name for name in others if right[name] == 0],
            "beside, right before": [example.id for example in self.beside],
        }  # fmt: skip
        return {
            key: {arm: {n: own[n] for n in chosen if n in own} for arm, own in asked.items()} for key, chosen in names.items()
        }


def measured(recipe: Path) -> Evaluation:
    raglan("evaluate", str(recipe), "--json")
    loaded = load_recipe(recipe)
    assert loaded.evaluate is not None
    return open_evaluation(evaluation_folder(loaded, loaded.evaluate, "untuned", Parts()))


def by_question(evaluation: Evaluation, figure: str) -> dict[str, float]:
    """A value a question; `name~` is the mean over the paraphrases of the question `name`."""
    groups: dict[str, list[float]] = {}
    for row, value in zip(evaluation.rows, evaluation.values(figure), strict=True):
        name, tilde, _ = row["id"].partition("~")
        groups.setdefault(name + tilde, []).append(value)
    return {name: statistics.fmean(values) for name, values in groups.items()}


def told(value: Interval, *, sign: str = "") -> str:
    return f"{100 * value.mean:{sign}.1f} [{100 * value.low:{sign}.1f}, {100 * value.high:{sign}.1f}]"


def lines(folds: Sequence[Fold], found: Sequence[dict[str, Evaluation]]) -> list[str]:
    """The table, of both folds together."""
    shown = ["| questions | figure | before | control | after | after − before | after − control | control − before |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for figure in FIGURES:
        parts = [fold.values(own, figure) for fold, own in zip(folds, found, strict=True)]
        for name in SETS:
            arms = {arm: [value for part in parts for value in part[name][arm].values()] for arm in ARMS}
            named = [(fold, key) for fold, part in zip(folds, parts, strict=True) for key in part[name]["before"]]
            groups = [fold.documents[key.removesuffix("~")] for fold, key in named]
            told_of = [told(bootstrap(arms[arm], groups=groups)) for arm in ARMS]
            pairs = [(arms[first], arms[second]) for first, second in DIFFERENCES]
            told_of += [told(paired_bootstrap(*pair, groups=groups), sign="+") for pair in pairs]
            shown.append(f"| {name} ({len(arms['before'])}) | {figure} | {' | '.join(told_of)} |")
    return shown


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("overrides", nargs="*", help="settings of the training to change: a.b=c")
    words.add_argument("--passages", type=int, default=3, help="judged passages a corrected question")
    words.add_argument("--seed", type=int, default=0, help="which documents are in which fold")
    words.add_argument("--steps", type=int, help="so many training steps in every stage, the demo's too: to see that it runs")
    asked = words.parse_args()
    few = [f"train.max_steps={asked.steps}"] if asked.steps else []
    shutil.rmtree(FOLDER, ignore_errors=True)

    for command in ("build", "train", "evaluate"):  # found done, after `make demo`
        raglan(command, str(VESSEN), *few)
    demo = load_recipe(VESSEN, few)
    stage, parts = finished_parts(demo)[-1]
    assert demo.evaluate is not None
    rows = {row["id"]: row for row in open_evaluation(evaluation_folder(demo, demo.evaluate, stage, parts)).rows}
    dealt = folds_of(read_examples(demo.evaluate.questions), asked.seed)
    folds = [
        Fold(FOLDER / f"fold-{number}", looked_at, others, rows)
        for number, (looked_at, others) in enumerate(zip(dealt, reversed(dealt), strict=True), 1)
    ]
    evaluate = {"evaluate": {"questions": "measured.jsonl", "modes": ["retrieved"], "k": [1, 3, 5, 10]}}
    found = []
    for fold in folds:
        fold.collect(asked.passages)
        systems = {"before": parts}
        for arm, recipe in fold.recipes(parts, demo, asked.overrides).items():
            raglan("train", str(recipe), *(asked.overrides if arm == "after" else ()), *few)
            changes = [*(asked.overrides if arm == "after" else ()), *few]
            systems[arm] = finished_parts(load_recipe(recipe, changes))[-1][1]
        recipes = {arm: recipe_of(own, demo, fold.folder / f"asked-{arm}.yaml", evaluate) for arm, own in systems.items()}
        found.append({arm: measured(recipe) for arm, recipe in recipes.items()})

    corrected = sum(len(fold.corrected) for fold in folds)
    each = " and ".join(f"{len(fold.corrected)} of {len(looked_at)}" for fold, looked_at in zip(folds, dealt, strict=True))
    print(f"\n{corrected} of {len(rows)} held-out questions answered wrong and corrected ({each}), "
          f"{corrected * asked.passages} passages judged\n")  # fmt: skip
    print("\n".join(lines(folds, found)))


if __name__ == "__main__":
    main()
