"""It learns to read past noise, on the command line alone, in English and Chinese (T45): recipes/rag_tuning_tiny.yaml, a tiny
reader, a small world.

Of every mill and bridge four things are told, each in a passage of its own. The offline teacher writes examples whose passages
are dealt with noise. The stage `teach` learns their questions with gold alone: a passage holds one number, and to copy that is
enough. It is of little use where another passage stands beside it. The stage `tune` learns the same questions in the passages
dealt. Asked are the examples of the split `test`, which is of documents of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import tiny
from conftest import ROOT
from raglan.cli import app
from raglan.documents import read_examples
from raglan.recipe import load_recipe
from raglan.stages import learning_curves

RECIPE = ROOT / "recipes" / "rag_tuning_tiny.yaml"
SYLLABLES = ("kel", "mor", "tas", "vin", "dar", "hol", "bren", "sul", "rad", "fen", "gor", "lim")
MILLS = [  # two words of a place's own, by which it is found
    f"{first}{last} {last}{first}".title() + " Mill"
    for first, last in product(SYLLABLES, ("varn", "wick", "mere", "dale", "stow"))
]
HAN = (
    "青红白黑金银东西南北中上浦岭溪湾滩岛城堡泉源松柏竹梅兰菊荷莲石玉珠宝云雨风雪霜露春夏明清高平安宁和顺永长福禄寿喜康泰荣华"
    "富贵文武英雄山林田园花草鱼鸟马牛羊鹿龙凤虎豹江河湖海沙洲桃李杏枣麦稻粟豆"
)
BRIDGES = [f"{first}{last}大桥" for first, last in zip(HAN[:60:2] + HAN[60:], HAN[1:60:2] + HAN[60:][::-1], strict=True)][:60]
TOLD = {
    "en": (
        "In the year {number} the guild of bakers opened {name}.", "A violent fire destroyed the roof of {name} in {number}.",
        "The great wheel of {name} measured {number} metres across.",
        "Every autumn {number} visitors climb the stairs of {name}.",
    ),
    "zh": (
        "{name}在{number}年建成通车。", "{name}在{number}年更换钢索。", "{name}共有{number}座桥墩。",
        "每年秋天有{number}人到{name}观看龙舟。",
    ),
}  # fmt: skip


def number(place: int, fact: int) -> int:
    """A year or a count."""
    return (1700 + place, 1801 + 37 * place % 90, 110 + 53 * place % 700, 300 + 71 * place % 690)[fact]


def world() -> list[dict[str, str]]:
    """A document a place; each fact is a paragraph."""
    return [
        {
            "id": f"{language}{place}", "title": name,
            "text": "\n\n".join(text.format(name=name, number=number(place, fact)) for fact, text in enumerate(TOLD[language])),
        }
        for language, names in (("en", MILLS), ("zh", BRIDGES))
        for place, name in enumerate(names)
    ]  # fmt: skip


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def small(place: Path, *, seed: int = 1) -> list[str]:
    """Changes that make the recipe a small one about this world. Another seed is another reader, dataset and order of rows."""
    documents = world()
    texts = [*(f"{one['title']} {one['text']}" for one in documents), "0 1 2 3 4 5 6 7 8 9 / _"]
    encoder, reader = tiny.bag_of_words(place / "encoder", texts), tiny.word_reader(place / "model", texts, seed=seed)
    data = {split: place / "data" / f"{split}.jsonl" for split in ("train", "dev", "test")}
    return [
        f"runs={place / 'runs'}", f"seed={seed}", f"knowledge.path={place / 'kb'}",
        f"knowledge.documents={write(place / 'documents.jsonl', documents)}", "knowledge.chunk.max_tokens=18",
        f"knowledge.encoder={{model: {encoder}, dtype: float32}}", f"generator.model={reader}", "generator.dtype=float32",
        f"synthesis.path={place / 'data'}", "synthesis.n=500", "synthesis.languages={en: 1, zh: 1}",
        "synthesis.passages={k: {2: 1}, gold_absent: 0}", "synthesis.decontaminate=none",
        "synthesis.split={train: 0.75, dev: 0.07, test: 0.18}",
        "synthesis.weights={task: {numeric: 1, temporal: 1}, relation: {R1: 1}, query_format: {wh_question: 1},"
        " answer_format: {number_unit: 1, span: 1}, noise: {hard: 2, neighbour: 2, random: 1}}",
        f"synthesis.budget={{tokenizer: {reader}, max_length: 240, answer: 40}}", "retriever={index: bm25, k: 2}",
        "prompt.layout=joined", "prompt.passage='{text}'",
        "prompt.template='{question} {passages}'", "prompt.separator=' '", "prompt.max_tokens=200", "decode.max_new_tokens=7",
        "train.bf16=false", "train.save_strategy='no'", "train.weight_decay=0", "train.warmup_steps=10",
        f"stages.teach.data={{kind: questions, path: {data['train']}, source: gold, passages: 1}}",
        "stages.teach.train={learning_rate: 3e-3, num_train_epochs: 5, per_device_train_batch_size: 16}",
        f"stages.tune.data={{kind: shown, path: {data['train']}, dev: {data['dev']}, prompt: recipe}}",
        "stages.tune.train.learning_rate=3e-3", "stages.tune.train.num_train_epochs=12", f"evaluate.questions={data['test']}",
        "evaluate.modes=[retrieved]", "evaluate.k=[1, 2]", "evaluate.robustness.noise=[neighbour]",
        "evaluate.robustness.gold=[present]", "evaluate.robustness.distractors=[0, 1]", "evaluate.robustness.orders=2",
        "evaluate.robustness.retrievers=[]",
    ]  # fmt: skip


def raglan(*words: str, codes: tuple[int, ...] = (0,)) -> str:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code in codes, (done.output, done.exception)
    return done.stdout


def measured(changes: Sequence[str], stage: str) -> dict[str, Any]:
    """Train a stage and measure what comes out of it under every condition."""
    raglan("train", str(RECIPE), *changes, "--stage", stage)
    return dict(json.loads(raglan("evaluate", str(RECIPE), *changes, "--json"))["robustness"][stage])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.timeout(900)
def test_noise_and_order_matter_less_after_tuning(one_thread: None, tmp_path: Path) -> None:
    changes, recipe = small(tmp_path), str(RECIPE)
    raglan("build", recipe, *changes)
    raglan("synthesize", recipe, *changes, codes=(0, 3))  # 3: a question was written twice
    rows = {split: read_examples(tmp_path / "data" / f"{split}.jsonl") for split in ("train", "test")}
    asked = {split: {one.metadata["synth"]["factors"]["language"] for one in examples} for split, examples in rows.items()}
    assert asked == {"train": {"en", "zh"}, "test": {"en", "zh"}}
    gold = {split: {name.partition("#")[0] for one in examples for name in one.relevant} for split, examples in rows.items()}
    assert not gold["train"] & gold["test"]

    before, after = measured(changes, "teach"), measured(changes, "tune")
    losses = [row["eval_loss"] for row in learning_curves(load_recipe(RECIPE, changes))["tune"] if "eval_loss" in row]
    alone, beside = "distractors/0", "distractors/neighbour/1"
    right = [{name: told["conditions"][name]["right"]["mean"] for name in (alone, beside)} for told in (before, after)]
    deltas = [told["conditions"][beside]["delta"]["mean"] for told in (before, after)]
    flips = [told["orders"]["flip"]["mean"] for told in (before, after)]
    assert losses[-1] < 0.6 * losses[0]
    assert right[0][alone] > 0.8  # it could read
    assert right[1][alone] > 0.8  # and still can
    assert deltas[0] < -0.3
    assert deltas[1] > 0.7 * deltas[0]
    assert flips[1] < flips[0] - 0.03
