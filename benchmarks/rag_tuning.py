"""RAG-Tuning on real text: a reader tuned on clean gold passages, and one tuned on the same questions in noisy evidence.

    make bench-rag-tuning                                   (after bench-squad; needs RAGLAN_DATA; about an hour on one core)
    python benchmarks/rag_tuning.py --quick                 (every line once, with counts that show nothing)
    python benchmarks/rag_tuning.py --synthetic build/mix   (and the three mixtures, with a dataset of `raglan synthesize`)

Both arms start from one reader, which has seen single gold paragraphs only (bench-squad's stage `read`), learn the same SQuAD
questions and make the same number of steps. `gold` reads the gold paragraph alone. `noise` reads K = 1, 2, 3 or 5 passages
from dealt retrievers with the palette of noise, gold at every place as often, and in a fifth of the examples no gold, where it
learns to say so. What differs is the evidence. Neither has learned from the articles that are measured.

Measured by `evaluate` and its robustness: gold alone and with 2 and 4 hard distractors; K = 5 with half or all of the other
passages exchanged for one kind of noise; three retrievers; without gold. Besides: SQuAD's unanswerable questions on their own
paragraph (abstention), SQuAD and NQ with gold and retrieved passages, and the example corpus. NQ is searched in the paragraphs
of the questions that are measured and as many others as --others says.

Intervals: 95 %, bootstrap over SQuAD's paragraphs (questions of the other sets), paired by question. One training seed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from raglan.data import load_examples
from raglan.evaluate import compare, evaluate
from raglan.knowledge import KnowledgeBase, build_knowledge
from raglan.metrics import Interval, bootstraps
from raglan.paired import verdict
from raglan.recipe import Recipe, load_recipe
from raglan.records import Hit
from raglan.refusals import abstained
from raglan.robustness import abstention
from raglan.stress import ALONE, Robustness, evaluate_robustness
from raglan.synthesis.start import run
from raglan.train import Parts, finished_parts, train

HERE = Path(__file__).parent
BUILD = HERE.parent / "build" / "rag_tuning"
VESSEN = HERE.parent / "examples" / "vessen" / "vessen.yaml"
MIXES = ("kiqa", "synthetic", "kiqa+synthetic")
QUICK = [
    "synthesis.n=48", "synthesis.passages.k={1: 1, 3: 1}", "evaluate.limit=6", "evaluate.robustness.ratios=[0, 1]",
    "evaluate.robustness.noise=[hard, counterfactual]", "evaluate.robustness.retrievers=[hybrid, bm25]",
]  # fmt: skip
Rows = dict[str, dict[str, Any]]  # question id → row of answers.jsonl


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--reader", type=Path, help="the generator that all arms start from; default bench-squad's after `read`")
    words.add_argument("--untuned", action="store_true", help="start from the embedded reader as it comes")
    words.add_argument("--synthetic", type=Path, help="a dataset of `raglan synthesize`, with one policy where gold is absent")
    words.add_argument("--mixed", type=int, default=1200, help="examples of each mixture")
    words.add_argument("--unanswerable", type=int, default=150, help="SQuAD's unanswerable questions, and as many answerable")
    words.add_argument("--others", type=int, default=3000, help="NQ passages beside those of the questions that are measured")
    words.add_argument("--quick", action="store_true", help="tiny counts: to see that everything runs")
    words.add_argument("changes", nargs="*", help="key=value, of all recipes")
    asked = words.parse_intermixed_args()
    if asked.quick:
        asked.mixed, asked.unanswerable, asked.others = 32, 6, 60
        asked.changes = [*QUICK, *asked.changes]
    reader = "embedded" if asked.untuned else str((asked.reader or _trained_reader()).absolute())
    bench = Bench(reader, asked.changes, quick=asked.quick)
    began = time.monotonic()
    kiqa = bench.evidence()
    arms = {"gold": bench.tuned("gold", _clean(kiqa)), "noise": bench.tuned("noise", _shown(kiqa / "examples.jsonl"))}
    print(f"tuned in {time.monotonic() - began:.0f} s", flush=True)
    bench.robustness(arms)
    bench.unanswerable(arms, asked.unanswerable)
    bench.others(arms, asked.others)
    if asked.synthetic is None:
        print(
            "\nno --synthetic: the three mixtures are left out; raglan synthesize benchmarks/rag_tuning_offline.yaml makes one"
        )
    else:
        bench.mixtures(kiqa, asked.synthetic, asked.mixed, asked.unanswerable, asked.others)
    print(f"\n{time.monotonic() - began:.0f} s in all")


class Bench:
    """The arms of one start, and what they are measured by."""

    def __init__(self, reader: str, changes: Sequence[str], *, quick: bool):
        self.reader, self.changes, self.quick = reader, list(changes), quick
        self.folder = BUILD / ("quick" if quick else "full")
        self.folder.mkdir(parents=True, exist_ok=True)

    def recipe(self, name: str, *changes: str, file: Path = HERE / "rag_tuning.yaml", own: bool = True) -> Recipe:
        runs = HERE.parent / "runs" / ("rag_tuning_quick" if self.quick else "rag_tuning")
        return load_recipe(file, [f"name={name}", f"runs={runs}", *changes, *(self.changes if own else ())])

    def evidence(self) -> Path:
        """KIQA: the questions in planned evidence, and the same questions for the clean arm."""
        recipe = self.recipe("kiqa", f"synthesis.path={self.folder / 'kiqa'}")
        build_knowledge(recipe.knowledge)
        folder = run(recipe).folder
        told = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        print(f"evidence: {told['kept']} of {told['requested']} questions; {told['funnel']}")
        rows = [json.loads(line) for line in (folder / "examples.jsonl").read_text(encoding="utf-8").splitlines()]
        _tell_evidence(rows)
        assert recipe.synthesis is not None
        wanted = {row["synth"]["seen"]["question"] for row in rows}
        lines = [json.dumps(row) for row in _questions(Path(str(recipe.synthesis.questions))) if row["id"] in wanted]
        (folder.parent / "clean.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder

    def tuned(self, name: str, data: str) -> str:
        """The generator of an arm. All arms make as many steps as the questions have batches, whatever was left out of one."""
        recipe = self.recipe(f"tune-{name}", f"generator.model={self.reader}", f"stages.tune.data={data}")
        stage = recipe.trainings()["tune"]
        count = recipe.synthesis.n if recipe.synthesis is not None else 0
        size = getattr(stage.data, "size", None) or count
        steps = 3 if self.quick else size // int(stage.train["per_device_train_batch_size"])
        recipe = self.recipe(
            f"tune-{name}", f"generator.model={self.reader}", f"stages.tune.data={data}", f"stages.tune.train.max_steps={steps}"
        )
        parts = train(recipe)
        told = json.loads((Path(str(parts.generator)).parent / "manifest.json").read_text(encoding="utf-8"))
        print(f"{name}: {told['rows']} rows, {told['steps']} steps, {told['seconds']:.0f} s", json.dumps(told.get("data", {})))
        return str(parts.generator)

    def measured(self, name: str, generator: str, *changes: str, file: Path = HERE / "rag_tuning.yaml") -> Recipe:
        """The recipe that asks an arm."""
        own = [f"generator.model={generator}", "stages={}", *changes]
        limit = [change for change in self.changes if change.startswith("evaluate.limit")]
        return self.recipe(name, *own, *limit, file=file, own=file.name == "rag_tuning.yaml")

    def robustness(self, arms: dict[str, str]) -> None:
        """Every condition for both arms, and the two verdicts."""
        found = {name: evaluate_robustness(self.measured(name, generator))[0] for name, generator in arms.items()}
        rows = {name: _rows(one) for name, one in found.items()}
        before, after = rows.values()
        names = [name for name in found["gold"].figures if name in found["noise"].figures]
        print(f"\nright answers in %, SQuAD, {len(before)} questions; difference: noise − gold, paired\n")
        print("| condition | tuned on gold | tuned on noise | difference | missing |\n|---|---|---|---|---|")
        for name in names:
            cells = [_told(one.figures[name]["right"]) for one in found.values()]
            gain = _contrast(before, after, [name], None)
            missing = f"{found['gold'].missing[name]:.0%}"
            print(f"| {name} | {cells[0]} | {cells[1]} | {_told(gain, sign='+')} {verdict(gain)} | {missing} |")
        print("\nabstention: gold present is answerable, gold absent is not\n")
        print("| noise | arm | precision | recall | F1 | hallucination |\n|---|---|---|---|---|---|")
        for kind in found["gold"].abstention:
            for name, one in found.items():
                rates = one.abstention[kind]
                keys = ("abstention_precision", "abstention_recall", "abstention_f1", "hallucination")
                print(f"| {kind} | {name} |", " | ".join(f"{100 * rates.get(key, math.nan):.1f}" for key in keys), "|")
        for name, one in found.items():
            own = one.retrievers
            print(f"{name}: worst retriever {own['worst']}, spread {100 * own['spread']:.1f} points")
        noisy = [name for name in names if _is_noisy(name)]
        less, kept = _contrast(before, after, noisy, ALONE), _contrast(before, after, [ALONE], None)
        losses = [f"{name} {_told(_loss(own, noisy, ALONE))}" for name, own in rows.items()]
        print(f"\nright answers lost against gold alone, mean over {', '.join(noisy)}: {'; '.join(losses)}")
        _line("tuned on noise loses significantly less under noise", less, good=verdict(less) == "better")
        _line("tuned on noise does not lose significantly on clean passages", kept, good=verdict(kept) != "worse")

    def unanswerable(self, arms: dict[str, str], count: int) -> None:
        """Abstention on SQuAD 2.0's terms: a question and its own paragraph, which holds the answer or does not."""
        recipe = self.measured("unanswerable", self.reader)
        corpus = KnowledgeBase.open(recipe.knowledge.path).corpus
        folder = Path(os.environ["RAGLAN_DATA"]) / "squad"
        files = (folder / f"{name}.jsonl.gz" for name in ("dev_unanswerable", "dev"))
        parts = [load_examples(file, corpus, limit=count, seed=7) for file in files]
        examples = [example for part in parts for example in part]
        print(f"\nSQuAD 2.0: {len(parts[0])} unanswerable and {len(parts[1])} answerable questions on their own paragraph\n")
        print("| arm | precision | recall | F1 | over-abstention | hallucination |\n|---|---|---|---|---|---|")
        told: dict[str, list[bool]] = {}
        rows = [corpus.row(example.relevant[0]) or 0 for example in examples]
        hits = [[Hit(corpus[row], row, 0.0, 1)] for row in rows]
        for name, generator in arms.items():
            system = Parts().open(self.measured(name, generator))
            answers = system.read([example.query for example in examples], hits)
            told[name] = [abstained(answer.text, example.answers) for answer, example in zip(answers, examples, strict=True)]
            rates = abstention(told[name], [bool(example.answers) for example in examples])
            print(f"| {name} |", " | ".join(f"{100 * value:.1f}" for value in rates.values()), "|", flush=True)
        due = [not example.answers for example in examples]
        groups = [example.relevant[0] for example in examples]
        first, *rest = told
        for name in rest:
            pairs = zip(told[name], told[first], due, strict=True)
            right = [float(now == wanted) - float(before == wanted) for now, before, wanted in pairs]
            gain = bootstraps({"right": right}, groups=groups, seed=7)["right"]
            print(f"{name} − {first}, right to decline or to answer: {_told(gain, sign='+')} {verdict(gain)}")

    def others(self, arms: dict[str, str], others: int) -> None:
        """SQuAD, NQ and the example corpus, by `evaluate`: gold passages and retrieved ones."""
        for task, recipes in self.tasks(arms, others).items():
            asks = {name: (recipe, recipe.evaluate) for name, recipe in recipes.items() if recipe.evaluate is not None}
            found = {name: evaluate(recipe, settings, name, Parts()) for name, (recipe, settings) in asks.items()}
            first = next(iter(found.values()))
            names = [name for name in first.figures if name.endswith(("/em", "/f1"))]
            print(f"\n{task}: {len(first.rows)} questions\n\n| arm |", " | ".join(names), "|\n|---|" + "---|" * len(names))
            for name, one in found.items():
                print(f"| {name} |", " | ".join(_told(one.figures[figure]) for figure in names), "|")
            for name, one in list(found.items())[1:]:
                gains = compare(first, one)
                cells = [f"{_told(gains[figure], sign='+')} {verdict(gains[figure])}" for figure in names]
                print(f"| {name} − {first.system} |", " | ".join(cells), "|", flush=True)

    def tasks(self, arms: dict[str, str], others: int) -> dict[str, dict[str, Recipe]]:
        """Task → arm → the recipe that asks."""
        corpus, questions = self.nq(others)
        nq = [f"knowledge.path={self.folder / 'nq'}", f"knowledge.documents={corpus}", f"evaluate.questions={questions}"]
        vessen = ["evaluate.modes=[gold, retrieved]", f"knowledge.path={HERE.parent / 'build' / 'vessen'}"]
        told = {
            "SQuAD": {name: self.measured(name, generator) for name, generator in arms.items()},
            "NQ": {name: self.measured(name, generator, *nq) for name, generator in arms.items()},
            "example corpus": {name: self.measured(name, generator, *vessen, file=VESSEN) for name, generator in arms.items()},
        }
        for recipes in told.values():
            build_knowledge(next(iter(recipes.values())).knowledge)
        return told

    def nq(self, others: int) -> tuple[Path, Path]:
        """NQ's held-out questions, and a corpus of their passages and some others."""
        folder = Path(os.environ["RAGLAN_DATA"]) / "nq"
        rows = list(_questions(folder / "dev.jsonl.gz"))
        settings = self.measured("nq", self.reader).evaluate
        count = settings.limit if settings is not None and settings.limit is not None else len(rows)
        asked = random.Random(7).sample(rows, min(count, len(rows)))
        gold = {identity for row in asked for identity in row["relevant"]}
        passages = list(_questions(folder / "corpus.jsonl.gz"))
        beside = set(random.Random(7).sample(range(len(passages)), min(others, len(passages))))
        kept = [passage for place, passage in enumerate(passages) if place in beside or passage["id"] in gold]
        files = self.folder / "nq_corpus.jsonl", self.folder / "nq_dev.jsonl"
        for file, own in zip(files, (kept, asked), strict=True):
            file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in own), encoding="utf-8")
        return files

    def mixtures(self, kiqa: Path, synthetic: Path, size: int, unanswerable: int, others: int) -> None:
        """KIQA, synthetic, and both: as many examples, the same steps, the same start."""
        made = synthetic / "train.jsonl" if (synthetic / "train.jsonl").is_file() else synthetic / "examples.jsonl"
        files = f"kiqa: {kiqa / 'examples.jsonl'}, synthetic: {made.absolute()}"
        arms = {
            mix.replace("+", "-"): self.tuned(
                mix.replace("+", "-"), f"{{kind: shown, mix: {mix}, {files}, size: {size}, prompt: recipe}}"
            )
            for mix in MIXES
        }
        narrow = ["evaluate.robustness.noise=[hard]", "evaluate.robustness.ratios=[1]", "evaluate.robustness.retrievers=[]"]
        found = {mix: evaluate_robustness(self.measured(mix, generator, *narrow))[0] for mix, generator in arms.items()}
        rows = {mix: _rows(one) for mix, one in found.items()}
        names = list(found["kiqa"].figures)
        print("\nmixtures, right answers in %, SQuAD\n\n| mix |", " | ".join(names), "|\n|---|" + "---|" * len(names))
        for mix, one in found.items():
            print(f"| {mix} |", " | ".join(_told(one.figures[name]["right"]) for name in names), "|")
        for mix in list(found)[1:]:
            gains = [_contrast(rows["kiqa"], rows[mix], [name], None) for name in names]
            print(f"| {mix} − kiqa |", " | ".join(f"{_told(gain, sign='+')} {verdict(gain)}" for gain in gains), "|")
        self.unanswerable(arms, unanswerable)
        self.others(arms, others)


def _clean(kiqa: Path) -> str:
    return f"{{kind: questions, path: {kiqa.parent / 'clean.jsonl'}, source: gold, passages: 1}}"


def _shown(path: Path) -> str:
    return f"{{kind: shown, path: {path}, prompt: recipe}}"


def _trained_reader() -> Path:
    parts = dict(finished_parts(load_recipe(HERE / "squad.yaml")))
    if "read" not in parts:
        raise SystemExit("train the reader first: make bench-squad; or give one: --reader, or --untuned")
    return Path(str(parts["read"].generator))


def _questions(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _tell_evidence(rows: Sequence[dict[str, Any]]) -> None:
    """What the examples hold, as it was shown."""
    shown = [one for row in rows for one in row["synth"]["passages"]]
    for name in ("kind", "role", "retriever"):
        values = [one[name] for one in shown if one[name]]
        print(f"  {name}:", ", ".join(f"{value} {values.count(value)}" for value in dict.fromkeys(sorted(values))))


def _rows(found: Robustness) -> Rows:
    lines = (found.folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["id"]: row for row in map(json.loads, lines)}


def _is_noisy(name: str) -> bool:
    """Gold is there, and noise beside it in the place of hits."""
    return "/present/" in name or (name.startswith("distractors/") and name != ALONE)


def _right(row: dict[str, Any], names: Sequence[str]) -> float:
    values = [row["conditions"][name]["figures"]["right"] for name in names if name in row["conditions"]]
    return statistics.fmean(values) if values else math.nan


def _contrast(before: Rows, after: Rows, names: Sequence[str], base: str | None) -> Interval:
    """after − before of the mean over `names`, each less what it is under `base` where there is one."""

    def of(row: dict[str, Any]) -> float:
        return _right(row, names) - (_right(row, [base]) if base is not None else 0)

    return _interval(before, [of(after[name]) - of(row) for name, row in before.items()])


def _loss(rows: Rows, names: Sequence[str], base: str) -> Interval:
    """What the mean over `names` lacks of `base`."""
    return _interval(rows, [_right(row, [base]) - _right(row, names) for row in rows.values()])


def _interval(rows: Rows, column: Sequence[float]) -> Interval:
    return bootstraps({"right": column}, groups=[row["group"] for row in rows.values()], seed=7)["right"]


def _told(value: Interval, *, sign: str = "") -> str:
    return f"{100 * value.mean:{sign}.1f} [{100 * value.low:{sign}.1f}, {100 * value.high:{sign}.1f}]"


def _line(claim: str, value: Interval, *, good: bool) -> None:
    print(f"{claim}: {_told(value, sign='+')}: {'OK' if good else 'FAIL'}", flush=True)


if __name__ == "__main__":
    main()
