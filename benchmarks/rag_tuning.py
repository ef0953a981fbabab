"""RAG-Tuning on real text: a reader tuned on clean gold passages, and one tuned on the same questions in noisy evidence.

    make bench-rag-tuning                                   (after bench-squad; needs RAGLAN_DATA; hours of one core)
    make bench-rag-tuning SEEDS=3 DTYPE=bfloat16            (every arm trained three times; asked in bfloat16)
    python benchmarks/rag_tuning.py --quick                 (every line once, with counts that show nothing)
    python benchmarks/rag_tuning.py --synthetic build/mix   (mixtures with another synthetic dataset; --only mixtures)

Both arms start from one reader, which has seen single gold paragraphs only (bench-squad's stage `read`), learn the same SQuAD
questions and make the same number of steps. `gold` reads the gold paragraph alone. `noise` reads it alone in half of the
examples, and in the others K = 2, 3 or 5 passages from dealt retrievers with the palette of noise, gold at every place as
often; in a twentieth of the examples there is no gold among several, and the answer says so. What differs is the evidence.
Neither has learned from the articles that are measured.

Measured by `evaluate` and its robustness: gold alone and with 2 and 4 distractors of each kind of noise, whose mean is what
noise costs (neighbours, which SQuAD's paragraphs have not, on the example corpus); K = 5 with all of the other passages
exchanged for one kind of noise; three retrievers; without gold. The curves are drawn to --figure. Besides: SQuAD's
unanswerable questions on their own paragraph (abstention), SQuAD and NQ with gold and retrieved passages, and the example
corpus. NQ is searched in the paragraphs of the questions that are measured and as many others as --others says.

Then three mixtures of one size: the questions of people (KIQA), examples that rules write (`rag_tuning_offline.yaml`, made here
unless --synthetic names others), and both.

With several seeds a question's figure is its mean over them, and rates are means of the seeds' rates. Intervals: 95 %,
bootstrap over SQuAD's paragraphs (questions of the other sets), paired by question. They tell nothing of the seeds.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from charts import Panel, chart

from raglan.data import load_examples
from raglan.evaluate import Evaluation, evaluate
from raglan.knowledge import KnowledgeBase, build_knowledge
from raglan.metrics import Interval, bootstraps
from raglan.paired import verdict
from raglan.recipe import Recipe, load_recipe
from raglan.records import Hit
from raglan.refusals import abstained
from raglan.robustness import abstention, flipped
from raglan.stages import Parts, finished_parts
from raglan.stress import Robustness, evaluate_robustness
from raglan.stress_figures import ALONE, CLEAN
from raglan.synthesis.start import run
from raglan.train import train

HERE = Path(__file__).parent
BUILD = HERE.parent / "build" / "rag_tuning"
SYNTHETIC = HERE / "rag_tuning_offline.yaml"
VESSEN = HERE.parent / "examples" / "vessen" / "vessen.yaml"
MIXES = ("kiqa", "synthetic", "kiqa+synthetic")
FIRST = 7  # training seed
QUICK = [
    "synthesis.n=48", "synthesis.passages.k={1: 1, 3: 1}", "evaluate.limit=6", "evaluate.robustness.ratios=[0, 1]",
    "evaluate.robustness.noise=[hard, counterfactual]", "evaluate.robustness.retrievers=[hybrid, bm25]",
]  # fmt: skip
FIT = "synthesis.weights.answer_format=fit"  # of so few examples the recipe's own shares cannot be dealt
TOLD = ("right", "f1")
NARROW = ("noise=[hard]", "gold=[present, absent]", "ratios=[1]", "distractor_kinds=[hard]", "retrievers=[]")  # of mixtures
ABSENT = ("hard", "random")
FALSE = ("distractors/counterfactual/2", "distractors/counterfactual/4", "conflict/1")
Rows = dict[str, dict[str, Any]]  # question id → row of answers.jsonl
Arms = Mapping[str, Sequence[str]]  # name → generators, one a seed


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--reader", type=Path, help="the generator that all arms start from; default bench-squad's after `read`")
    words.add_argument("--untuned", action="store_true", help="start from the embedded reader as it comes")
    words.add_argument("--dtype", default="float32", help="in which arms are asked; bfloat16 can take half the time")
    words.add_argument("--seeds", type=int, default=1, help="trainings of every arm, each with a seed of its own")
    words.add_argument("--synthetic", type=Path, help="a dataset of `raglan synthesize`, with one policy where gold is absent")
    words.add_argument("--mixed", type=int, default=1200, help="examples of each mixture; 0 leaves the mixtures out")
    words.add_argument("--only", choices=("arms", "mixtures"), help="the two arms, or the mixtures, and not the other")
    words.add_argument("--figure", type=Path, default=HERE.parent / "docs" / "rag_tuning.svg", help="the curves to write")
    words.add_argument("--unanswerable", type=int, default=150, help="SQuAD's unanswerable questions, and as many answerable")
    words.add_argument("--others", type=int, default=3000, help="NQ passages beside those of the questions that are measured")
    words.add_argument("--quick", action="store_true", help="tiny counts: to see that everything runs")
    words.add_argument("changes", nargs="*", help="key=value, of all recipes")
    asked = words.parse_intermixed_args()
    if asked.seeds < 1:
        words.error("--seeds must be 1 or more")
    if asked.quick:
        asked.mixed, asked.unanswerable, asked.others = min(asked.mixed, 32), 6, 60
        asked.changes, asked.figure = [*QUICK, *asked.changes], BUILD / "quick" / "rag_tuning.svg"
    reader = "embedded" if asked.untuned else str((asked.reader or _trained_reader()).absolute())
    seeds = range(FIRST, FIRST + asked.seeds)
    bench = Bench(reader, asked.changes, seeds=seeds, quick=asked.quick, dtype=asked.dtype)
    bench.folder.mkdir(parents=True, exist_ok=True)
    print(bench.said(), flush=True)
    began = time.monotonic()
    kiqa = bench.evidence()
    if asked.only != "mixtures":
        arms = {"gold": bench.arm("gold", _clean(kiqa)), "noise": bench.arm("noise", _shown(kiqa / "examples.jsonl"))}
        print(f"tuned in {time.monotonic() - began:.0f} s", flush=True)
        bench.robustness(arms, asked.figure)
        bench.neighbours(arms)
        bench.unanswerable(arms, asked.unanswerable)
        bench.others(arms, asked.others)
    if asked.mixed and asked.only != "arms":
        bench.mixtures(kiqa, asked.synthetic or bench.synthetic(), asked.mixed, asked.unanswerable, asked.others)
    print(f"\n{time.monotonic() - began:.0f} s in all; {bench.said()}")


class Bench:
    """The arms of one start, and what they are measured by."""

    def __init__(self, reader: str, changes: Sequence[str], *, seeds: Sequence[int], quick: bool, dtype: str = "float32"):
        self.reader, self.changes, self.seeds, self.quick, self.dtype = reader, list(changes), seeds, quick, dtype
        self.folder = BUILD / ("quick" if quick else "full")

    def said(self) -> str:
        """How many seeds, in words."""
        if len(self.seeds) == 1:
            return "one training seed"
        return f"means over {len(self.seeds)} training seeds ({', '.join(map(str, self.seeds))}); intervals are over questions"

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

    def synthetic(self) -> Path:
        """Examples that rules write, as `raglan synthesize benchmarks/rag_tuning_offline.yaml` does."""
        quick = [f"synthesis.path={self.folder / 'synthetic'}", *QUICK[:2], FIT] if self.quick else []
        shared = [change for change in self.changes if change.startswith(("knowledge.", "evaluate.questions="))]
        folder = run(load_recipe(SYNTHETIC, [*quick, *shared])).folder
        told = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        print(f"\nsynthetic: {told['kept']} of {told['requested']} examples; {told['funnel']}", flush=True)
        return folder

    def arm(self, name: str, data: str) -> list[str]:
        """The generators of an arm, one a seed."""
        return [self.tuned(name if seed == FIRST else f"{name}-{seed}", data, seed) for seed in self.seeds]

    def tuned(self, name: str, data: str, seed: int) -> str:
        """One generator. All arms make as many steps as the questions have batches, whatever was left out of one."""
        changes = [f"seed={seed}", f"generator.model={self.reader}", f"stages.tune.data={data}"]
        recipe = self.recipe(f"tune-{name}", *changes)
        stage = recipe.trainings()["tune"]
        count = recipe.synthesis.n if recipe.synthesis is not None else 0
        size = getattr(stage.data, "size", None) or count
        batch = int(stage.train["per_device_train_batch_size"]) * int(stage.train["gradient_accumulation_steps"])
        steps = 3 if self.quick else size // batch
        parts = train(self.recipe(f"tune-{name}", *changes, f"stages.tune.train.max_steps={steps}"))
        told = json.loads((Path(str(parts.generator)).parent / "manifest.json").read_text(encoding="utf-8"))
        print(f"{name}: {told['rows']} rows, {told['steps']} steps, {told['seconds']:.0f} s", json.dumps(told.get("data", {})))
        return str(parts.generator)

    def measured(self, name: str, generator: str, *changes: str, file: Path = HERE / "rag_tuning.yaml") -> Recipe:
        """The recipe that asks an arm."""
        own = [f"generator.model={generator}", f"generator.dtype={self.dtype}", "stages={}", *changes]
        limit = [change for change in self.changes if change.startswith("evaluate.limit")]
        return self.recipe(name, *own, *limit, file=file, own=file.name == "rag_tuning.yaml")

    def stressed(self, arms: Arms, *changes: str) -> dict[str, list[Robustness]]:
        """Every condition for all arms and seeds."""
        return {
            name: [evaluate_robustness(self.measured(name, generator, *changes))[0] for generator in generators]
            for name, generators in arms.items()
        }

    def robustness(self, arms: Arms, figure: Path) -> None:
        """Every condition for both arms, the curves, and the two verdicts."""
        found = self.stressed(arms)
        rows = {name: _mean_rows([_rows(one) for one in own]) for name, own in found.items()}
        before, after = rows.values()
        first = {name: own[0] for name, own in found.items()}
        names = [name for name in first["gold"].figures if name in first["noise"].figures]
        print(f"\nright answers in %, SQuAD, {len(before)} questions; difference: noise − gold, paired; {self.said()}\n")
        print("| condition | tuned on gold | tuned on noise | difference | missing |\n|---|---|---|---|---|")
        for name in names:
            cells = [_told(_mean(own, name)) for own in rows.values()]
            gain = _contrast(before, after, [name], None)
            missing = f"{first['gold'].missing[name]:.0%}"
            print(f"| {name} | {cells[0]} | {cells[1]} | {_told(gain, sign='+')} {verdict(gain)} | {missing} |")
        figure.write_text(_curves({f"tuned on {name}": own for name, own in rows.items()}, names), encoding="utf-8")
        print(f"\ncurves: {figure}")
        for name, own in rows.items():
            means = {index: _mean(own, index).mean for index in names if index.startswith("retriever/")}
            worst = min(means, key=lambda index: means[index]).partition("/")[2]
            print(f"{name}: worst retriever {worst}, spread {100 * (max(means.values()) - min(means.values())):.1f} points")
        each = [[_rows(one) for one in own] for own in found.values()]
        self.declined(each)
        self.flips(each)
        self.verdicts(each, names)

    def neighbours(self, arms: Arms) -> None:
        """Passages of gold's own document beside it, on the example corpus: a paragraph of SQuAD is a document of its own."""
        asked = "{noise: [neighbour], ratios: [0], distractors: [0, 2, 4], retrievers: [], orders: 0}"
        changes = [f"evaluate.robustness={asked}", f"knowledge.path={HERE.parent / 'build' / 'vessen'}"]
        recipes = {name: [self.measured(name, one, *changes, file=VESSEN) for one in own] for name, own in arms.items()}
        build_knowledge(next(iter(recipes.values()))[0].knowledge)
        found = {name: [_rows(evaluate_robustness(recipe)[0]) for recipe in own] for name, own in recipes.items()}
        before, after = map(_mean_rows, found.values())
        print(f"\nneighbours, example corpus, {len(before)} questions\n")
        print("| condition | tuned on gold | tuned on noise | difference |\n|---|---|---|---|")
        for name in (ALONE, *(f"distractors/neighbour/{count}" for count in (2, 4))):
            if not any(name in row["conditions"] for row in before.values()):
                print(f"| {name} | no document has so many | | |")
                continue
            gain = _contrast(before, after, [name], None)
            cells = " | ".join(_told(_mean(rows, name)) for rows in (before, after))
            print(f"| {name} | {cells} | {_told(gain, sign='+')} {verdict(gain)} |", flush=True)

    def declined(self, seeds: Sequence[Sequence[Rows]]) -> None:
        """Abstention where gold stands among four passages of a kind (answerable), and where four or five stand without it."""
        print("\n| noise | arm | precision | recall | F1 | over-abstention | hallucination |\n|---|---|---|---|---|---|---|")
        for kind in ABSENT:
            pair = f"distractors/{kind}/4", f"noise/{kind}/absent/1"
            for name, own in zip(("gold", "noise"), seeds, strict=True):
                each = []
                for rows in own:
                    asked = [(row["conditions"].get(key), key == pair[0]) for row in rows.values() for key in pair]
                    there = [(bool(one["figures"]["declined"]), gold) for one, gold in asked if one is not None]
                    each.append(abstention([no for no, _ in there], [gold for _, gold in there]))
                print(f"| {kind} | {name} |", " | ".join(f"{100 * statistics.fmean(own):.1f}" for own in _columns(each)), "|")

    def flips(self, seeds: Sequence[Sequence[Rows]]) -> None:
        """How often the order of the same passages decides, and how often a false passage is believed. Less is better."""
        first = seeds[0][0]
        print("\n| % of questions | tuned on gold | tuned on noise | difference |\n|---|---|---|---|")
        there = [{name for row in own[0].values() for name in row["conditions"]} for own in seeds]
        figures: dict[str, Callable[[dict[str, Any]], float]] = {}
        if all(any(name.startswith("order/") for name in names) for names in there):
            figures["right or wrong by the order of passages"] = _flip
        figures |= {f"false value, {name}": _follow(name) for name in FALSE if all(name in names for names in there)}
        for words, of in figures.items():
            before, after = (_over_seeds([[of(rows[name]) for name in first] for rows in own]) for own in seeds)
            cells = [_told(_interval(first, column)) for column in (before, after)]
            gain = _interval(first, [now - was for was, now in zip(before, after, strict=True)])
            print(f"| {words} | {' | '.join(cells)} | {_told(gain, sign='+')} |", flush=True)

    def verdicts(self, seeds: Sequence[Sequence[Rows]], names: Sequence[str]) -> None:
        """Less is lost under noise, and nothing on clean passages; beside that what each seed says."""
        before, after = map(_mean_rows, seeds)
        noisy = [name for name in names if _is_noisy(name)]
        losses = [f"{name} {_told(_loss(own, noisy, ALONE))}" for name, own in (("gold", before), ("noise", after))]
        print(f"\nright answers lost against gold alone, mean over {len(noisy)} noisy conditions: {'; '.join(losses)}")
        claims = (
            ("tuned on noise loses significantly less under noise", noisy, ALONE, lambda said: said == "better"),
            ("tuned on noise does not lose significantly on clean passages", [ALONE], None, lambda said: said != "worse"),
        )
        for figure, (claim, conditions, base, holds) in itertools.product(TOLD, claims):
            value = _contrast(before, after, conditions, base, figure)
            each = [_contrast(*pair, conditions, base, figure).mean for pair in zip(*seeds, strict=True)]
            by = f"; by seed {', '.join(f'{100 * mean:+.1f}' for mean in each)}" if len(each) > 1 else ""
            print(f"{claim} ({figure}): {_told(value, sign='+')}{by}: {'OK' if holds(verdict(value)) else 'FAIL'}", flush=True)

    def unanswerable(self, arms: Arms, count: int) -> None:
        """Abstention on SQuAD 2.0's terms: a question and its own paragraph, which holds the answer or does not."""
        recipe = self.measured("unanswerable", self.reader)
        corpus = KnowledgeBase.open(recipe.knowledge.path).corpus
        folder = Path(os.environ["RAGLAN_DATA"]) / "squad"
        files = (folder / f"{name}.jsonl.gz" for name in ("dev_unanswerable", "dev"))
        parts = [load_examples(file, corpus, limit=count, seed=7) for file in files]
        examples = [example for part in parts for example in part]
        print(f"\nSQuAD 2.0: {len(parts[0])} unanswerable and {len(parts[1])} answerable questions on their own paragraph\n")
        print("| arm | precision | recall | F1 | over-abstention | hallucination |\n|---|---|---|---|---|---|")
        told: dict[str, list[list[bool]]] = {}
        rows = [corpus.row(example.relevant[0]) or 0 for example in examples]
        hits = [[Hit(corpus[row], row, 0.0, 1)] for row in rows]
        for name, generators in arms.items():
            told[name] = []
            for generator in generators:
                answers = Parts().open(self.measured(name, generator)).read([example.query for example in examples], hits)
                pairs = zip(answers, examples, strict=True)
                told[name].append([abstained(answer.text, example.answers) for answer, example in pairs])
            rates = [abstention(own, [bool(example.answers) for example in examples]) for own in told[name]]
            print(f"| {name} |", " | ".join(f"{100 * statistics.fmean(own):.1f}" for own in _columns(rates)), "|", flush=True)
        due = [not example.answers for example in examples]
        groups = [example.relevant[0] for example in examples]
        right = {name: _over_seeds([[float(no == wanted) for no, wanted in zip(one, due, strict=True)] for one in own])
                 for name, own in told.items()}  # fmt: skip
        first, *rest = right
        for name in rest:
            change = [now - was for now, was in zip(right[name], right[first], strict=True)]
            gain = bootstraps({"right": change}, groups=groups, seed=7)["right"]
            print(f"{name} − {first}, right to decline or to answer: {_told(gain, sign='+')} {verdict(gain)}")

    def others(self, arms: Arms, others: int) -> None:
        """SQuAD, NQ and the example corpus, by `evaluate`: gold passages and retrieved ones."""
        for task, recipes in self.tasks(arms, others).items():
            found = {name: [_evaluated(name, recipe) for recipe in own] for name, own in recipes.items()}
            first = next(iter(found.values()))[0]
            names = [name for name in first.figures if name.endswith(("/em", "/f1"))]
            values = {name: {key: _over_seeds([e.values(key) for e in own]) for key in names} for name, own in found.items()}
            groups = [row["id"] for row in first.rows]
            print(f"\n{task}: {len(first.rows)} questions\n\n| arm |", " | ".join(names), "|\n|---|" + "---|" * len(names))
            for name, own in values.items():
                cells = bootstraps(own, groups=groups, seed=7)
                print(f"| {name} |", " | ".join(_told(cells[key]) for key in names), "|")
            for name, own in list(values.items())[1:]:
                was = values[first.system]
                change = {key: [b - a for a, b in zip(was[key], own[key], strict=True)] for key in names}
                gains = bootstraps(change, groups=groups, seed=7)
                told = [f"{_told(gains[key], sign='+')} {verdict(gains[key])}" for key in names]
                print(f"| {name} − {first.system} |", " | ".join(told), "|", flush=True)

    def tasks(self, arms: Arms, others: int) -> dict[str, dict[str, list[Recipe]]]:
        """Task → arm → the recipes that ask, one a seed."""
        corpus, questions = self.nq(others)
        nq = [f"knowledge.path={self.folder / 'nq'}", f"knowledge.documents={corpus}", f"evaluate.questions={questions}"]
        vessen = ["evaluate.modes=[gold, retrieved]", f"knowledge.path={HERE.parent / 'build' / 'vessen'}"]
        own = HERE / "rag_tuning.yaml"
        told = {
            task: {name: [self.measured(name, one, *changes, file=file) for one in arm] for name, arm in arms.items()}
            for task, changes, file in (("SQuAD", [], own), ("NQ", nq, own), ("example corpus", vessen, VESSEN))
        }
        for recipes in told.values():
            build_knowledge(next(iter(recipes.values()))[0].knowledge)
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
            mix.replace("+", "-"): self.arm(
                mix.replace("+", "-"), f"{{kind: shown, mix: {mix}, {files}, size: {size}, prompt: recipe}}"
            )
            for mix in MIXES
        }
        narrow = [f"evaluate.robustness.{change}" for change in NARROW]
        found = self.stressed(arms, *narrow)
        rows = {mix: _mean_rows([_rows(one) for one in own]) for mix, own in found.items()}
        names = list(found["kiqa"][0].figures)
        print(f"\nmixtures, right answers in %, SQuAD; {self.said()}\n")
        print("| mix |", " | ".join(names), "|\n|---|" + "---|" * len(names))
        for mix, own in rows.items():
            print(f"| {mix} |", " | ".join(_told(_mean(own, name)) for name in names), "|")
        for mix in list(rows)[1:]:
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


def _mean_rows(seeds: Sequence[Rows]) -> Rows:
    """The rows of the first seed, with means over seeds of what is told of every condition."""
    if len(seeds) == 1:
        return seeds[0]

    def mean(name: str, key: str) -> dict[str, float]:
        return {figure: statistics.fmean(_right(own[name], [key], figure) for own in seeds) for figure in TOLD}

    return {
        name: {**row, "conditions": {key: {"figures": mean(name, key)} for key in row["conditions"]}}
        for name, row in seeds[0].items()
    }


def _over_seeds(columns: Sequence[Sequence[float]]) -> list[float]:
    """Question by question the mean over seeds."""
    return [statistics.fmean(own) for own in zip(*columns, strict=True)]


def _columns(rates: Sequence[Mapping[str, float]]) -> list[list[float]]:
    return [[own[name] for own in rates] for name in rates[0]]


def _evaluated(name: str, recipe: Recipe) -> Evaluation:
    assert recipe.evaluate is not None
    return evaluate(recipe, recipe.evaluate, name, Parts())


def _curves(arms: Mapping[str, Rows], names: Sequence[str]) -> str:
    """Right answers by the number of distractors, and by the share of noise beside gold: a panel a kind, a line an arm."""
    panels = []
    for form, start, x in (("distractors", ALONE, "passages beside gold"), ("noise", CLEAN, "share of noise among hits")):
        told = [(name.split("/"), name) for name in names if name.startswith(f"{form}/") and "/absent/" not in name]
        for kind in dict.fromkeys(part[1] for part, name in told if name != start):
            points = [(0.0, start), *((float(part[-1]), name) for part, name in told if part[1] == kind)]
            lines = {arm: [(amount, _mean(rows, name)) for amount, name in sorted(points)] for arm, rows in arms.items()}
            panels.append(Panel(kind.replace("_", " "), x, lines))
    columns = len({panel.title for panel in panels})
    title = "A reader tuned on noise, and one tuned on clean passages"
    return chart(panels, columns=columns, title=title, y="right answers, %")


def _is_noisy(name: str) -> bool:
    """Gold is there, and noise beside it: two passages or four of a kind, so that every kind counts the same."""
    return name.startswith("distractors/") and name != ALONE


def _right(row: dict[str, Any], names: Sequence[str], figure: str = "right") -> float:
    values = [row["conditions"][name]["figures"][figure] for name in names if name in row["conditions"]]
    return statistics.fmean(values) if values else math.nan


def _contrast(before: Rows, after: Rows, names: Sequence[str], base: str | None, figure: str = "right") -> Interval:
    """after − before of the mean over `names`, each less what it is under `base` where there is one."""

    def of(row: dict[str, Any]) -> float:
        return _right(row, names, figure) - (_right(row, [base], figure) if base is not None else 0)

    return _interval(before, [of(after[name]) - of(row) for name, row in before.items()])


def _flip(row: dict[str, Any]) -> float:
    """Whether correctness differs among the orders."""
    right = [_right(row, [name]) for name in row["conditions"] if name.startswith("order/")]
    return flipped([bool(value) for value in right])


def _follow(name: str) -> Callable[[dict[str, Any]], float]:
    """Whether the false value is told under a condition; nan where none could be made."""

    def of(row: dict[str, Any]) -> float:
        value = row["conditions"].get(name, {}).get("figures", {}).get("follow")
        return math.nan if value is None else value

    return of


def _mean(rows: Rows, name: str) -> Interval:
    """Share of right answers under a condition."""
    return _interval(rows, [_right(row, [name]) for row in rows.values()])


def _loss(rows: Rows, names: Sequence[str], base: str) -> Interval:
    """What the mean over `names` lacks of `base`."""
    return _interval(rows, [_right(row, [base]) - _right(row, names) for row in rows.values()])


def _interval(rows: Rows, column: Sequence[float]) -> Interval:
    return bootstraps({"right": column}, groups=[row["group"] for row in rows.values()], seed=7)["right"]


def _told(value: Interval, *, sign: str = "") -> str:
    return f"{100 * value.mean:{sign}.1f} [{100 * value.low:{sign}.1f}, {100 * value.high:{sign}.1f}]"


if __name__ == "__main__":
    main()
