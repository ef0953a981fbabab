"""RA-DIT on real text: what R-ft is worth, from which data, against shuffled targets; and the 2×2 grid with LM-ft.

    make bench-ra-dit     (after bench-squad; needs RAGLAN_DATA; about two hours of one core)

R-ft: MiniLM's query tower learns which of ten retrieved passages the reader finds the answer likely with; passage vectors stay
as they are. The reader, whose scores are made once, is the one that `make bench-squad` left after its stage `choose`; it has
seen none of these questions. Arms: questions by EMDR² (`tasks`) and by RA-DIT's own loss (`divergence`), the corpus alone
(`halves`), both (`mixed`), and questions whose scores are dealt out anew over their passages (`shuffled`). Measured by a search
of all passages for questions that were not learned.

SQuAD: half of the held-out articles' questions are learned from, the other half is measured: the same paragraphs, other
questions. NQ: 2,000 questions in five folds; each fold's questions are measured by the tower that learned from the four others,
so that every question is measured once. No fold's questions are shared (`leak_check`). On 800 of NQ's questions settings had
been compared; the other 1,200 are told apart too.

`--nested` chooses the settings anew for every fold of NQ, without that fold: by MRR@10, each of the four others measured by a
tower that learned from the remaining three. What is chosen learns from all four, three times with other seeds, and the fold is
measured by the mean of the three. So no question has a part in choosing what it is measured with.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from marginal import HERE, _told, _trained_reader, split

from raglan.candidates import lsr_rows
from raglan.data import load_examples
from raglan.knowledge import build_knowledge
from raglan.metrics import answer_recall, bootstrap, mrr, paired_bootstrap, recall
from raglan.recipe import LsrObjective, Recipe, load_recipe
from raglan.records import Example, Hit
from raglan.stages import Parts, stages_of
from raglan.train import train

BUILD = HERE.parent / "build"
FOLDS = 5
FIGURES = {"R@1": (recall, 1), "R@5": (recall, 5), "MRR@10": (mrr, 10)}  # of the named passage
ANSWERS = {"answer@1": 1, "answer@5": 5}  # whether one of so many passages holds an answer, as DPR measures it
COLUMNS = [*FIGURES, *ANSWERS, "answer MRR@10"]
ARMS = ("tasks", "divergence", "halves", "mixed", "shuffled")
ASKED = ("tasks", "divergence", "mixed", "lm_ft")  # stages that learn from questions
SEEDS = (7, 8, 9)
SETTINGS = {  # what `--nested` chooses from: stage, rate, passes; the name that figures are kept under says EMDR² by nothing
    **{f"rate {rate:g}, {passes} passes": ("tasks", rate, passes) for rate in (1e-5, 3e-5) for passes in (1, 2, 4)},
    "divergence, rate 3e-05, 2 passes": ("divergence", 3e-5, 2),
}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--reader", type=Path, help="the generator that scores and is tuned; default bench-squad's `choose`")
    words.add_argument("--corpora", nargs="*", default=["squad", "nq"], choices=["squad", "nq"])
    words.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    words.add_argument("--no-grid", action="store_true", help="R-ft alone")
    words.add_argument("--nested", action="store_true", help="NQ alone, settings chosen inside each fold, and nothing else")
    words.add_argument("changes", nargs="*", help="key=value, of all stages' recipes")
    asked = words.parse_intermixed_args()
    reader = (asked.reader or _trained_reader()).absolute()
    prepare()
    if asked.nested:
        build_knowledge(recipe_of("nq", reader, asked.changes).knowledge)
        nested(reader, asked.changes)
    for corpus in () if asked.nested else asked.corpora:
        build_knowledge(recipe_of(corpus, reader, asked.changes).knowledge)
        table(corpus, reader, asked.arms, asked.changes)
        if not asked.no_grid:
            grid(corpus, reader, asked.changes)


def prepare() -> None:
    """The questions: SQuAD's two halves, NQ's folds."""
    split(BUILD / "ra_dit" / "squad")
    rows: list[dict[str, Any]] = []
    for part in ("train", "dev"):
        with gzip.open(Path(os.environ["RAGLAN_DATA"]) / "nq" / f"{part}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows += [{**json.loads(line), "part": part} for line in file]
    random.Random(7).shuffle(rows)
    folder = BUILD / "ra_dit" / "nq"
    folder.mkdir(parents=True, exist_ok=True)
    for fold in range(FOLDS):
        _write(folder / f"test{fold}.jsonl", rows[fold::FOLDS])
        _write(folder / f"train{fold}.jsonl", [row for place, row in enumerate(rows) if place % FOLDS != fold])
    for pair in combinations(range(FOLDS), 2):
        for part, kept in (("test", True), ("train", False)):
            own = [row for place, row in enumerate(rows) if (place % FOLDS in pair) == kept]
            _write(folder / f"{part}{pair[0]}{pair[1]}.jsonl", own)
    for name, part in (("train", "train"), ("test", "dev")):  # as published, for the grid
        _write(folder / f"{name}.jsonl", [row for row in rows if row["part"] == part])


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def recipe_of(corpus: str, reader: Path, changes: Sequence[str], *, fold: str = "") -> Recipe:
    """The recipe over one corpus, and one fold of its questions; all folds share one table of scores."""
    folder = BUILD / "ra_dit" / corpus
    train_file, test_file = folder / f"train{fold}.jsonl", folder / f"test{fold}.jsonl"
    return load_recipe(HERE / "ra_dit.yaml", [
        f"name={corpus}", f"knowledge.path={BUILD / corpus}",
        f"knowledge.documents={os.environ['RAGLAN_DATA']}/{corpus}/corpus.jsonl.gz", f"generator.model={reader}",
        *(f"stages.{stage}.data.path={train_file}" for stage in ASKED),
        f"grid.tasks.held_out.questions={test_file}", *changes,
    ])  # fmt: skip


def table(corpus: str, reader: Path, arms: Sequence[str], changes: Sequence[str]) -> None:
    """Print what each arm finds of the questions it did not learn, beside the encoder as it was."""
    folds = [""] if corpus == "squad" else [str(fold) for fold in range(FOLDS)]
    found: dict[str, list[list[Hit]]] = {name: [] for name in ("base", *arms)}
    asked: list[Example] = []
    for fold in folds:
        recipe = recipe_of(corpus, reader, changes, fold=fold)
        test = BUILD / "ra_dit" / corpus / f"test{fold}.jsonl"
        for name in found:
            rag = (Parts() if name == "base" else learned(recipe, name, fold)).open(recipe)
            examples = load_examples(test, rag.retriever.base.corpus)
            found[name] += rag.retriever.retrieve([example.query for example in examples], 10)
        asked += examples
    values = {name: _values(asked, hits) for name, hits in found.items()}
    print(f"\n{corpus}: {len(asked)} questions, R-ft by {', '.join(arms)}")
    _print(values, arms)
    if corpus == "nq":
        untried = _untried()
        kept = [place for place, example in enumerate(asked) if example.id in untried]
        print(f"\nnq, the {len(kept)} questions on which no setting had been tried")
        _print({name: {key: [own[at] for at in kept] for key, own in each.items()} for name, each in values.items()}, arms)


def nested(reader: Path, changes: Sequence[str]) -> None:
    """Print what R-ft with settings chosen inside each fold of NQ finds, beside the encoder as it was."""
    inner: dict[tuple[int, int], dict[str, dict[str, float]]] = {}  # the two folds left out → settings → question → 1/rank
    for pair in combinations(range(FOLDS), 2):
        inner[pair] = {}
        for name in SETTINGS:
            fold = f"{pair[0]}{pair[1]}"
            found = _measured(reader, changes, fold, name, SEEDS[0])["MRR@10"]
            inner[pair][name] = dict(zip(_ids(BUILD / "ra_dit" / "nq" / f"test{fold}.jsonl"), found, strict=True))
            print(f"without folds {pair}: {name}: {100 * np.mean(found):.2f}", flush=True)
    means: dict[str, dict[str, list[float]]] = {"base": {}, "chosen": {}}
    for fold in range(FOLDS):
        scores = {name: 100 * _inner_score(inner, fold, name) for name in SETTINGS}
        chosen = max(SETTINGS, key=lambda name: scores[name])
        print(f"fold {fold} takes {chosen} of", {name: round(score, 2) for name, score in scores.items()}, flush=True)
        before = _measured(reader, changes, str(fold), None, SEEDS[0])
        after = [_measured(reader, changes, str(fold), chosen, seed) for seed in SEEDS]
        for name, tables in (("base", [before]), ("chosen", after)):
            for figure in COLUMNS:
                own = np.mean([table[figure] for table in tables], axis=0).tolist()
                means[name].setdefault(figure, []).extend(own)
    print(f"\nnq: {len(means['base']['R@1'])} questions, settings chosen inside each fold, mean of {len(SEEDS)} seeds")
    _print(means, ["chosen"])


def _inner_score(inner: dict[tuple[int, int], dict[str, dict[str, float]]], fold: int, name: str) -> float:
    """Mean MRR@10 of all questions but the fold's, each by a tower that learned from neither its own fold nor this one."""
    folder = BUILD / "ra_dit" / "nq"
    values = []
    for pair, tables in inner.items():
        if fold in pair:
            other = pair[1 - pair.index(fold)]
            values += [tables[name][identity] for identity in _ids(folder / f"test{other}.jsonl")]
    return float(np.mean(values))


def _ids(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text(encoding="utf-8").splitlines()]


def _measured(reader: Path, changes: Sequence[str], fold: str, name: str | None, seed: int) -> dict[str, list[float]]:
    """All figures of the questions left out, by the tower that these settings make of the others; kept beside the run."""
    own, stage = [f"seed={seed}"], "tasks"
    if name is not None:
        stage, rate, passes = SETTINGS[name]
        own += [f"stages.{stage}.train.learning_rate={rate}", f"stages.{stage}.train.num_train_epochs={passes}"]
    recipe = recipe_of("nq", reader, [*changes, *own], fold=fold)
    kept = recipe.run / "nested" / f"{fold} {name} {seed}.json"
    if kept.exists():
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    rag = (Parts() if name is None else learned(recipe, stage, fold)).open(recipe)
    examples = load_examples(BUILD / "ra_dit" / "nq" / f"test{fold}.jsonl", rag.retriever.base.corpus)
    values = _values(examples, rag.retriever.retrieve([example.query for example in examples], 10))
    for each, _ in stages_of(recipe):
        if each.name == stage and len(fold) == 2:
            shutil.rmtree(each.folder, ignore_errors=True)  # seventy towers, of which the figures alone are wanted
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(values), encoding="utf-8")
    return values


def _print(values: dict[str, dict[str, list[float]]], arms: Sequence[str]) -> None:
    print("\n| query encoder |", " | ".join(COLUMNS), "|\n|---|" + "---|" * len(COLUMNS))
    for name, own in values.items():
        print(f"| {name} |", " | ".join(_told(bootstrap(own[figure])) for figure in COLUMNS), "|")
    for name in arms:
        gains = [paired_bootstrap(values["base"][figure], values[name][figure]) for figure in COLUMNS]
        print(f"| {name} − base |", " | ".join(_told(gain, sign="+") for gain in gains), "|", flush=True)


def _untried() -> set[str]:
    """NQ's questions without the two fifths on which losses and rates were compared before one was taken."""
    files = (BUILD / "ra_dit" / "nq" / f"{part}0.jsonl" for part in ("train", "test"))
    ids = [json.loads(line)["id"] for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    order = np.random.RandomState(0).permutation(len(ids))
    return {ids[at] for fold in range(2, FOLDS) for at in order[fold::FOLDS]}


def _values(examples: Sequence[Example], hits: Sequence[Sequence[Hit]]) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for example, own in zip(examples, hits, strict=True):
        ranking = [hit.passage.id for hit in own]
        for name, (measure, depth) in FIGURES.items():
            values[name].append(float(measure(ranking, example.relevant, depth)))
        holders = [bool(answer_recall([f"{hit.passage.title}\n{hit.passage.text}"], example.answers)) for hit in own]
        first = holders.index(True) + 1 if any(holders) else None
        for name, depth in ANSWERS.items():
            values[name].append(float(first is not None and first <= depth))
        values["answer MRR@10"].append(1 / first if first else 0.0)
    return values


def learned(recipe: Recipe, arm: str, fold: str) -> Parts:
    """The arm's query encoder, trained unless it is."""
    if arm == "shuffled":
        recipe = shuffled(recipe, fold)
    train(recipe, only=arm)
    return next(stage.parts(before) for stage, before in stages_of(recipe) if stage.name == arm)


def shuffled(recipe: Recipe, fold: str) -> Recipe:
    """`tasks` with each question's log p(y|x,z) dealt out anew over its candidates: as much to fit, and nothing to learn."""
    tasks = recipe.stages["tasks"]
    assert isinstance(tasks.objective, LsrObjective)
    path = BUILD / "ra_dit" / recipe.name / f"shuffled{fold}.jsonl"
    system = Parts().open(recipe)
    corpus = system.retriever.base.corpus
    examples = {example.id: example for example in load_examples(tasks.data.path, corpus)}  # type: ignore[union-attr,arg-type]
    chance, lines = np.random.default_rng(recipe.seed), []
    for row in lsr_rows(list(examples.values()), system, tasks.objective, recipe.run / "scores"):
        values = chance.permutation(row.answer_logprobs)
        grades = dict(zip((corpus[int(place)].id for place in row.candidates), values.tolist(), strict=True))
        example = examples[row.id]
        lines.append({"id": row.id, "query": row.query, "answers": list(example.answers), "grades": grades})
    _write(path, lines)
    changes = {"loss": "divergence", "direction": "target_first", "target": "given", "tau": 1.0}
    objective = tasks.objective.model_copy(update=changes)
    data = tasks.data.model_copy(update={"path": path})
    stage = tasks.model_copy(update={"objective": objective, "data": data})
    return recipe.model_copy(update={"stages": {**recipe.stages, "shuffled": stage}})


def grid(corpus: str, reader: Path, changes: Sequence[str]) -> None:
    """The 2×2 grid by the command line, on the questions as they are split."""
    recipe = recipe_of(corpus, reader, changes)
    for stage in ("tasks", "lm_ft"):
        train(recipe, only=stage)
    words = [
        f"name={corpus}", f"knowledge.path={recipe.knowledge.path}", f"generator.model={reader}",
        f"knowledge.documents={recipe.knowledge.documents[0]}",
        *(f"stages.{stage}.data.path={BUILD / 'ra_dit' / corpus / 'train.jsonl'}" for stage in ASKED),
        f"grid.tasks.held_out.questions={BUILD / 'ra_dit' / corpus / 'test.jsonl'}", *changes,
    ]  # fmt: skip
    subprocess.run([sys.executable, "-m", "raglan", "evaluate", str(HERE / "ra_dit.yaml"), *words], check=True)


if __name__ == "__main__":
    main()
