"""`hold`: λ · KL(π_start ‖ π) over the vocabulary at each answer token. The generator learns, and stays near what it was."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.utils import convert_outputs_to_fp32
from safetensors.torch import load_file
from torch import Tensor

import tiny
from raglan.data import answer_rows, stage_examples
from raglan.documents import read_examples
from raglan.errors import GeneratorError, RecipeError
from raglan.generator import HFGenerator, open_generator
from raglan.knowledge import build_knowledge
from raglan.likelihood import chunked_divergence
from raglan.objective import AnswerObjective
from raglan.packing import pack_rows
from raglan.rag import RAG
from raglan.recipe import AnswerObjective as AnswerSettings
from raglan.recipe import FeedbackData, GeneratorSettings, PromptSettings, Recipe, load_recipe
from raglan.stages import finished_parts
from raglan.train import train
from raglan.trainer import StageTrainer
from test_cli import run
from test_feedback import corrected
from test_generator import made
from test_kill import small_recipe

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}
KINDS = ["reader", "bart", "t5", "llama", "gpt2", "lora"]


def opened(kind: str, folder: Path, **settings: Any) -> HFGenerator:
    if kind == "gpt2":
        name = str(tiny.gpt2(folder / "gpt2"))
        return open_generator(GeneratorSettings(model=name, dtype="float32", **settings), PromptSettings())
    lora = {"lora": LORA} if kind == "lora" else {}
    return made("llama" if kind == "lora" else kind, folder, **lora, **settings)


@pytest.fixture(params=KINDS)
def generator(request: pytest.FixtureRequest, tmp_path: Path) -> HFGenerator:
    """`head_chunk` cuts the four rows' 13 positions into chunks."""
    return opened(request.param, tmp_path, head_chunk=4)


ROWS: list[dict[str, Any]] = [
    {"input_ids": [7, 8, 9, 10], "labels": [11, 3]},
    {"input_ids": [12, 5, 6], "labels": [20, 21, 22, 3], "replayed": True},
    {"input_ids": [30, 31, 32, 33, 34, 35], "labels": [34, 35, 3], "replayed": True},
    {"input_ids": [9], "labels": [7, 7, 7, 3]},
]


@torch.no_grad()
def learn(generator: HFGenerator, *, seed: int = 1, by: float = 0.1) -> None:
    """What may learn moves somewhere."""
    chance = torch.Generator().manual_seed(seed)
    for parameter in generator.model.parameters():
        if parameter.requires_grad:
            parameter += by * torch.randn(parameter.shape, generator=chance)


def every_word(generator: HFGenerator, row: dict[str, Any], place: int) -> Tensor:
    """log p of each word at one place of an answer, (V,): the word is put there, and `forward` is asked."""
    words = generator.model.get_input_embeddings().num_embeddings
    rows = [{"input_ids": row["input_ids"], "labels": [*row["labels"][:place], word]} for word in range(words)]
    return generator.forward(generator.collate(rows))[:, place]


def naive(generator: HFGenerator, start: HFGenerator, row: dict[str, Any]) -> list[Tensor]:
    """The slow twin: KL(start ‖ generator) at each place of a row's answer."""
    found = []
    for place in range(len(row["labels"])):
        with torch.no_grad():
            before = every_word(start, row, place)
        found.append((before.exp() * (before - every_word(generator, row, place))).sum())
    return found


def gradients(generator: HFGenerator) -> Tensor:
    return torch.cat([p.grad.flatten() for p in generator.model.parameters() if p.grad is not None])


def test_by_hand() -> None:
    """π_start = (½, ½), π = (¼, ¾): ½ ln 2 + ½ ln ⅔, and the gradient by π's logits is π − π_start."""
    logits = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log().requires_grad_()
    start = torch.zeros(2, 2)
    found = chunked_divergence(lambda s: s, [logits], lambda s: s, [start], chunk=1)
    assert found.tolist() == pytest.approx([0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.0])
    found.sum().backward()
    assert torch.allclose(logits.grad, torch.tensor([[-0.25, 0.25], [0.0, 0.0]]), atol=1e-7)


def test_what_the_start_rules_out_costs_nothing() -> None:
    start, logits = torch.tensor([[0.0, -math.inf]]), torch.tensor([[1.0, 2.0]], requires_grad=True)
    found = chunked_divergence(lambda s: s, [logits], lambda s: s, [start])
    found.sum().backward()
    assert found.tolist() == pytest.approx([math.log(1 + math.e)])
    assert torch.isfinite(logits.grad).all()


def test_chunks_change_nothing_and_finite_differences_agree() -> None:
    chance = torch.Generator().manual_seed(0)
    hidden, before, head = (torch.randn(*shape, generator=chance, dtype=torch.float64) for shape in ((7, 3), (7, 2), (3, 5)))
    old = torch.randn(2, 5, generator=chance, dtype=torch.float64)
    hidden.requires_grad_()

    def total(states: Tensor, chunk: int = 128) -> Tensor:
        return chunked_divergence(lambda s: s @ head, [states], lambda s: s @ old, [before], chunk=chunk).sum()

    for chunk in (1, 3, 7, 100):
        assert float(total(hidden, chunk)) == pytest.approx(float(total(hidden)))
    assert torch.autograd.gradcheck(lambda states: total(states, 3), hidden)


def test_nothing_at_the_first_step_and_the_slow_twin_afterwards(generator: HFGenerator) -> None:
    """Loss and gradient; the start is as it was, and learns nothing."""
    plain, aim = AnswerObjective(generator), AnswerObjective(generator, hold=3.0)

    def asked(objective: AnswerObjective) -> tuple[float, Tensor, dict[str, Tensor]]:
        generator.model.zero_grad()
        loss, figures = objective.loss(objective.collate(ROWS[:2]))
        loss.backward()
        return float(loss.detach()), gradients(generator).clone(), figures

    (without, flat, _), (with_it, pulled, figures) = asked(plain), asked(aim)
    assert float(figures["loss/hold"]) == pytest.approx(0.0, abs=1e-6)
    assert with_it == pytest.approx(without, abs=1e-5)
    assert torch.allclose(flat, pulled, atol=1e-5)

    learn(generator, by=0.1 if not hasattr(generator.model, "peft_config") else 1.0)
    (without, flat, _), (with_it, pulled, figures) = asked(plain), asked(aim)
    start = aim.against.start  # type: ignore[union-attr]
    twin = torch.stack([value for row in ROWS[:2] for value in naive(generator, start, row)]).mean()
    generator.model.zero_grad()
    (3.0 * twin).backward()
    assert float(twin) > 0.01
    assert float(figures["loss/hold"]) == pytest.approx(float(twin), rel=1e-3)
    assert with_it - without == pytest.approx(3.0 * float(twin), rel=1e-3)
    assert float((pulled - flat - gradients(generator)).norm()) < 2e-3 * float(gradients(generator).norm())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in start.model.parameters())


def test_only_replayed_rows_are_held_and_a_batch_may_have_none(generator: HFGenerator) -> None:
    plain, aim = AnswerObjective(generator), AnswerObjective(generator, hold=2.0, hold_rows="replayed")
    learn(generator, by=0.1 if not hasattr(generator.model, "peft_config") else 1.0)
    with torch.no_grad():
        start = aim.against.start  # type: ignore[union-attr]
        twin = sum(float(value) for row in ROWS if row.get("replayed") for value in naive(generator, start, row))
        with_it, without = (objective.loss(objective.collate(ROWS))[0] for objective in (aim, plain))
        tokens = sum(len(row["labels"]) for row in ROWS)
        assert float(with_it - without) == pytest.approx(2.0 * twin / tokens, rel=1e-3)
        fresh = [row for row in ROWS if not row.get("replayed")]
        assert float(aim.loss(aim.collate(fresh))[0]) == pytest.approx(float(plain.loss(plain.collate(fresh))[0]), rel=1e-5)
        assert aim.validate(ROWS) == pytest.approx(plain.validate(ROWS))


@pytest.mark.parametrize("reduction", ["token", "example"])
def test_an_accumulated_batch_is_the_whole_one(tmp_path: Path, reduction: Any) -> None:
    generator = opened("bart", tmp_path)
    aim = AnswerObjective(generator, reduction=reduction, hold=2.0)
    learn(generator)
    found = []
    for parts in ([ROWS], [[row] for row in ROWS]):
        generator.model.zero_grad()
        batches = [aim.collate(rows) for rows in parts]
        items = sum(map(aim.items, batches))
        for batch in batches:
            loss, _ = aim.loss(dict(batch), items=items if reduction == "token" else None)
            (loss if reduction == "token" else loss * aim.items(batch) / items).backward()
        found.append(gradients(generator).clone())
    assert torch.allclose(found[0], found[1], atol=1e-5)


def test_packed_rows_are_held_as_they_are_apart(tmp_path: Path) -> None:
    generator = opened("llama", tmp_path)
    for rows in ("all", "replayed"):
        aim = AnswerObjective(generator, hold=2.0, hold_rows=rows)  # type: ignore[arg-type]
        learn(generator)
        packs, _ = pack_rows(ROWS, 16)
        assert 1 < len(packs) < len(ROWS)
        with torch.no_grad():
            apart, packed = (float(aim.loss(aim.collate(given))[0]) for given in (ROWS, packs))
        assert packed == pytest.approx(apart, rel=1e-5)


def test_rows_padded_left_and_evidence_that_is_only_read(tmp_path: Path) -> None:
    """A label that is not learned is not held either."""
    generator = opened("llama", tmp_path)
    plain, aim = AnswerObjective(generator), AnswerObjective(generator, hold=1.0)
    learn(generator)
    row = {**ROWS[1], "learned": [1, 0, 0, 1]}
    start = aim.against.start  # type: ignore[union-attr]
    with torch.no_grad():
        twin = naive(generator, start, row)
        found = aim.loss(aim.collate([row]))[0] - plain.loss(plain.collate([row]))[0]
    assert float(found) == pytest.approx(float(twin[0] + twin[3]) / 2, rel=1e-3)


def test_the_embedded_reader_has_no_words_beside(tmp_path: Path) -> None:
    generator = opened("reader", tmp_path)
    batch = generator.collate(ROWS)
    with pytest.raises(GeneratorError, match="no LM head"):
        generator.forward_held(batch, batch["labels"][..., None], generator.frozen(), torch.ones(4).bool())


def test_with_lora_the_start_shares_the_base_and_keeps_the_adapter_that_it_began_with(tmp_path: Path) -> None:
    generator = opened("lora", tmp_path)
    learn(generator)  # as if it went on from an adapter of a stage before: the start is not the bare base
    before = generator.forward(generator.collate(ROWS)).detach()
    aim = AnswerObjective(generator, hold=1.0)
    start = aim.against.start  # type: ignore[union-attr]
    ours, theirs = (dict(one.model.named_parameters()) for one in (generator, start))
    assert {name for name in ours if ours[name] is not theirs[name]} == {name for name in ours if "lora_" in name}
    learn(generator, seed=2)
    assert torch.allclose(start.forward(start.collate(ROWS)), before, atol=1e-6)
    assert not torch.allclose(generator.forward(generator.collate(ROWS)), before, atol=1e-2)
    assert not any("start" in name for name in aim.module.state_dict())


def test_frozen_parts_are_shared(tmp_path: Path) -> None:
    generator = opened("reader", tmp_path, freeze=("word_embeddings",))
    start = generator.frozen()
    assert start.model.get_input_embeddings().weight is generator.model.get_input_embeddings().weight
    assert start.reader is start.model
    assert start.reader.copy_query.weight is not generator.model.copy_query.weight
    assert not start.model.training


# Through `train`.


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """One `answer` stage of 30 steps, which begins from a reader with random weights."""
    path = small_recipe(tmp_path)
    recipe = yaml.safe_load(path.read_text())
    recipe["stages"] = {"read": recipe["stages"]["read"]}
    recipe["stages"]["read"]["objective"]["hold"] = 2.0
    path.write_text(yaml.safe_dump(recipe))
    build_knowledge(load_recipe(path).knowledge)
    return path


def tuned(recipe: Recipe) -> dict[str, Tensor]:
    return load_file(Path(str(finished_parts(recipe)[-1][1].generator)) / "model.safetensors")


def test_a_broken_off_run_is_held_by_what_it_began_from(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ["train.max_steps=8"]
    straight, broken = (load_recipe(path, [f"name={name}", *few]) for name in ("straight", "broken"))
    train(straight)
    usual, steps = StageTrainer.training_step, iter(range(100))

    def breaks(self: StageTrainer, *given: Any, **more: Any) -> Tensor:
        if next(steps) == 6:
            raise OSError("the power went")
        return usual(self, *given, **more)

    with monkeypatch.context() as patched:
        patched.setattr(StageTrainer, "training_step", breaks)
        with pytest.raises(OSError, match="power"):
            train(broken)
    assert [found.name for found in broken.run.glob("stages/*/work/checkpoint-*")] == ["checkpoint-4"]
    train(broken)
    one, other = tuned(straight), tuned(broken)
    assert all(torch.allclose(value, other[name], atol=1e-5) for name, value in one.items())
    free = load_recipe(path, ["name=free", "stages.read.objective.hold=0", *few])
    train(free)
    assert not all(torch.allclose(value, tuned(free)[name], atol=1e-3) for name, value in one.items())


def test_corrections_are_learned_and_replayed_questions_stay_nearer_to_what_was_said_of_them(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command line, with and without; how far the tuned reader is from the first one on each kind of row."""
    folder = path.parent
    assert run("train", str(path), "stages.read.objective.hold=0", capsys=capsys, monkeypatch=monkeypatch)[0] == 0
    known = finished_parts(load_recipe(path, ["stages.read.objective.hold=0"]))[-1][1]
    corrected(folder, count=6)
    store = str(folder / "people.sqlite")
    words = ("feedback", "import", str(folder / "tasks.json"), "--from", "label-studio", "--store", store)
    assert run(*words, capsys=capsys, monkeypatch=monkeypatch)[0] == 0
    tree = yaml.safe_load(path.read_text())
    tree["generator"]["model"] = str(known.generator)
    tree["stages"]["read"] = {
        "data": {"kind": "feedback", "store": "people.sqlite", "passages": 2, "replay": "train.jsonl", "replay_times": 3},
        "objective": {"kind": "answer", "hold_rows": "replayed"},
        "train": {"num_train_epochs": 4, "learning_rate": 1e-3},
    }
    path.write_text(yaml.safe_dump(tree))
    far = {}
    for hold in (0, 10):
        changes = [f"name=hold-{hold}", f"stages.read.objective.hold={hold}"]
        assert run("train", str(path), *changes, capsys=capsys, monkeypatch=monkeypatch)[0] == 0
        recipe = load_recipe(path, changes)
        after = finished_parts(recipe)[-1][1].open(recipe).generator
        start, rows = RAG.open(recipe).generator, replayed_rows(recipe)
        with torch.no_grad():
            _, found = after.forward_held(start.collate(rows), None, start, torch.ones(len(rows)).bool())
        far[hold] = float(found.sum())
    assert 0 < far[10] < 0.5 * far[0]


def replayed_rows(recipe: Recipe) -> list[dict[str, Any]]:
    """The rows that its stage replayed, made again."""
    data, system = recipe.stages["read"].data, RAG.open(recipe)
    assert isinstance(data, FeedbackData)
    held_out = read_examples(recipe.evaluate.questions)  # type: ignore[union-attr]
    examples = stage_examples(data, system.retriever.base.corpus, recipe.seed, held_out=held_out)
    rows = answer_rows(examples, data, system.retriever, system.generator, recipe.seed)
    assert [bool(row.get("replayed")) for row in rows] == [False] * 6 + [True] * 18
    return rows[6:]


def test_a_reader_with_bfloat16_weights_under_a_trainer(tmp_path: Path) -> None:
    """accelerate gives a model's outputs as float32, and the weights that make words of them need not be."""
    model, words = tiny.reader(folder=tmp_path / "bert")
    model.save_pretrained(str(tmp_path / "reader"))
    words.save_pretrained(str(tmp_path / "reader"))
    lora = {"r": 4, "target_modules": ["query", "value"]}
    settings = GeneratorSettings(model=str(tmp_path / "reader"), dtype="bfloat16", lora=lora)
    generator = open_generator(settings, PromptSettings(max_tokens=300))
    start = generator.frozen()
    learn(generator)

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    def wrapped(**batch: Any) -> Any:
        with autocast():
            return generator.model(**batch)

    held = torch.tensor([True, True, False, True])
    asked = generator.collate(ROWS), None, start, held, convert_outputs_to_fp32(wrapped)
    values, found = generator.forward_held(*asked, autocast=autocast)
    (found.sum() - values.sum()).backward()
    assert found[2].eq(0).all()
    assert found[held].sum() > 0
    assert gradients(generator).isfinite().all()


def test_without_hold_a_stage_has_the_name_that_it_had(path: Path) -> None:
    """A stage's folder is named by its settings; those that were trained before there was `hold` are found done."""
    said = AnswerSettings(kind="answer").model_dump(mode="json")
    assert {"hold", "hold_rows"}.isdisjoint(said)
    assert AnswerSettings(kind="answer", hold=2).model_dump()["hold"] == 2
    recipe = load_recipe(path)
    assert recipe.model_dump(mode="json")["stages"]["read"]["objective"]["hold"] == 2.0


@pytest.mark.parametrize(
    ("objective", "message"),
    [("hold: -1", "greater than or equal to 0"), ("hold: 1, hold_rows: replayed", "hold_rows replayed needs data of kind")],
)
def test_settings_that_cannot_be_meant(tmp_path: Path, objective: str, message: str) -> None:
    text = "name: x\nknowledge: {path: k, documents: d}\ndata: {kind: questions, path: q}\nobjective: "
    (tmp_path / "r.yaml").write_text(f"{text}{{kind: answer, {objective}}}\n")
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "r.yaml")
