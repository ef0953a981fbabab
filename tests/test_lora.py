"""recipes/rag_tuning.yaml and its tiny twin through the command line: both halves of its data are made, it trains on them,
answers, merges, and others open it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from raglan import cli
from raglan.artifact import read_manifest
from raglan.data import answer_rows
from raglan.documents import read_examples
from raglan.generator import HFGenerator, open_generator
from raglan.recipe import EndpointSettings, GeneratorSettings, PromptSettings, Recipe, ShownData, load_recipe
from raglan.records import Passage
from raglan.stages import Parts, finished_parts
from raglan.weights import read_tensors
from test_synthesis import english
from tiny import small_recipe

pytest.importorskip("peft")
RECIPE = Path(__file__).parent.parent / "recipes" / "rag_tuning.yaml"
KIQA = RECIPE.with_name("rag_tuning_kiqa.yaml")
PASSAGES = [Passage("1", "the tower fbc was built by miller dgh in 1703", "fbc")]


def raglan(*said: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["raglan", *map(str, said)])
        with pytest.raises(SystemExit) as done:
            cli.main()
    return int(done.value.code or 0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents, questions, an encoder and a base; the recipe's variables name them. Of towers rules find nothing to write."""
    folder = tmp_path_factory.mktemp("lora")
    small_recipe(folder)
    mills = [{"id": p.id, "title": p.title, "text": p.text} for number in range(10) for p in english(number)]
    more = "".join(json.dumps(mill) + "\n" for mill in mills)
    (folder / "documents.jsonl").write_text((folder / "corpus.jsonl").read_text() + more)
    base = tiny.mistral(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(str(base)).to(torch.bfloat16)
    model.save_pretrained(str(base))  # as the published weights are kept
    return folder


@pytest.fixture(scope="module")
def variables(place: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for name, file in (("DOCUMENTS", "documents"), ("QUESTIONS", "train"), ("DEV_QUESTIONS", "dev")):
            patch.setenv(name, str(place / f"{file}.jsonl"))
        yield


@pytest.fixture(scope="module")
def changes(place: Path, variables: None) -> list[str]:
    return [
        f"knowledge.path={place / 'kb'}", "knowledge.chunk=null", f"knowledge.encoder.model={place / 'encoder' / 'encoder'}",
        "knowledge.encoder.dtype=float32", f"runs={place / 'runs'}", f"generator.model={place / 'base'}",
        "generator.dtype=float32", "prompt.max_tokens=900", "decode.max_new_tokens=4", "retriever.k=2",
        f"data.kiqa={place / 'kiqa' / 'train.jsonl'}", f"data.synthetic={place / 'made' / 'train.jsonl'}",
        f"data.dev={place / 'made' / 'dev.jsonl'}",
        "train.bf16=false", "train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=2", "train.max_steps=2",
        "train.save_steps=100", "train.learning_rate=2e-2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(place: Path, changes: list[str]) -> Recipe:
    """With people's questions and what rules write: no server is asked here."""
    assert raglan("build", RECIPE, *changes) == 0
    small = [
        *(change for change in changes if change.startswith("knowledge.")), "synthesis.n=24",
        "synthesis.passages.k={1: 1, 2: 1}", f"synthesis.budget={{tokenizer: {place / 'base'}, max_length: 960, answer: 60}}",
    ]  # fmt: skip
    rules = [
        "synthesis.teacher={kind: offline}", "synthesis.from_scratch=0", "synthesis.languages={en: 1}",
        "synthesis.weights={task: {factoid: 1, temporal: 1}, relation: {R1: 1}, answer_format: fit, query_format: fit}",
    ]  # fmt: skip
    assert raglan("synthesize", KIQA, *small, f"synthesis.path={place / 'kiqa'}") in (0, 3)
    assert raglan("synthesize", RECIPE, *small, *rules, f"synthesis.path={place / 'made'}") in (0, 3)
    assert raglan("train", RECIPE, *changes) == 0
    return load_recipe(RECIPE, changes)


def generator_of(recipe: Recipe) -> HFGenerator:
    folder = finished_parts(recipe)[-1][1].generator
    assert folder is not None
    return open_generator(recipe.generator.model_copy(update={"model": folder, "lora": None}), recipe.prompt)


def test_the_full_size_recipe_says_what_is_published(variables: None) -> None:
    recipe = load_recipe(RECIPE)
    lora, stage = recipe.generator.lora, recipe.trainings()["answer"]
    assert lora == {
        "r": 16, "lora_alpha": 16, "lora_dropout": 0.1, "use_rslora": True, "target_modules": "all-linear",
    }  # fmt: skip
    told = {"learning_rate": 1e-4, "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "num_train_epochs": 1}
    assert told.items() <= stage.train.items()
    assert stage.train["per_device_train_batch_size"] * stage.train["gradient_accumulation_steps"] == 128
    assert recipe.prompt.max_tokens + recipe.decode.max_new_tokens == 4096  # type: ignore[union-attr]
    assert recipe.generator.tokens == {"bos": 1, "eos": 2, "pad": 2}
    asked, data = recipe.synthesis, recipe.data
    assert isinstance(data, ShownData)
    assert asked is not None
    assert isinstance(asked.teacher, EndpointSettings)
    assert asked.money.cap_usd is not None
    people = load_recipe(KIQA)
    assert people.synthesis is not None
    assert (data.mix, data.kiqa, data.synthetic) == (
        "kiqa+synthetic", people.synthesis.path / "train.jsonl", asked.path / "train.jsonl",
    )  # fmt: skip
    assert people.knowledge == recipe.knowledge
    assert people.synthesis.retrievers == asked.retrievers


def test_the_twin_learns_from_both_halves(trained: Recipe) -> None:
    told = read_manifest(Path(finished_parts(trained)[-1][1].generator or "").parent, "stage")["data"]
    assert told["mix"] == "kiqa+synthetic"
    assert min(source["learned"] for source in told["sources"].values()) >= 8
    assert all(source["repeats"] == 0 for source in told["sources"].values())


def test_the_twin_learns_adapters_and_keeps_nothing_else(trained: Recipe, place: Path) -> None:
    folder = Path(finished_parts(trained)[-1][1].generator or "")
    told = json.loads((folder / "adapter_config.json").read_text())
    assert (told["r"], told["lora_alpha"], told["use_rslora"]) == (16, 16, True)
    assert told["base_model_name_or_path"] == str(place / "base")
    assert read_manifest(folder, "generator")["lora"]["target_modules"] == "all-linear"
    generator = generator_of(trained)
    moved = [p for name, p in generator.model.named_parameters() if "lora_B" in name]
    assert len(moved) == 14
    assert all(float(p.abs().max()) > 0 for p in moved)  # they begin as zeros
    prompt = generator.prompt.render("who built fbc?", PASSAGES)
    first = open_generator(trained.generator.model_copy(update={"lora": None}), trained.prompt)
    before, after = (one.token_logprobs([prompt], ["dgh"])[0].sum() for one in (first, generator))
    assert after > before


def test_the_twin_answers(trained: Recipe, changes: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert raglan("answer", RECIPE, "who built fbc?", *changes) == 0
    assert capsys.readouterr().out.startswith("Q: who built fbc?\nA: ")


def test_the_twin_is_merged_and_transformers_opens_it(trained: Recipe, changes: list[str], place: Path) -> None:
    """With nothing but transformers: logits within the rounding of the weights, and within 1e-4 where they are float32."""
    generator = generator_of(trained)
    prompt = generator.prompt.render("who built fbc?", PASSAGES)
    ids = torch.tensor([prompt.ids])
    with torch.no_grad():
        ours = generator.model(input_ids=ids).logits
    assert raglan("checkpoint", "merge", RECIPE, "-o", place / "merged32", "--dtype", "float32", *changes) == 0
    theirs = AutoModelForCausalLM.from_pretrained(str(place / "merged32"))
    assert theirs.dtype == torch.float32
    with torch.no_grad():
        assert torch.allclose(theirs(input_ids=ids).logits, ours, atol=1e-4)
    assert raglan("checkpoint", "merge", RECIPE, "-o", place / "merged", *changes) == 0
    small, exact = read_tensors(place / "merged"), read_tensors(place / "merged32")
    assert set(small) == set(exact)
    assert all(small[name].dtype == torch.bfloat16 for name in small)
    assert all(torch.equal(small[name], exact[name].to(torch.bfloat16)) for name in small)
    assert not (place / "merged" / "adapter_config.json").exists()
    words = AutoTokenizer.from_pretrained(str(place / "merged"))
    assert (words.padding_side, words.truncation_side, words.bos_token_id, words.eos_token_id) == ("left", "left", 1, 2)
    assert words(prompt.text)["input_ids"] == list(prompt.ids)
    config = json.loads((place / "merged" / "config.json").read_text())
    assert config["architectures"] == ["MistralForCausalLM"]
    batch = words([prompt.text, "who?"], padding=True, return_tensors="pt")
    written = theirs.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=2)[0, batch["input_ids"].shape[1] :]
    completion = generator.generate([prompt], max_new_tokens=4)[0]
    assert written.tolist()[: len(completion.ids)] == list(completion.ids)


def test_a_published_adapter_is_merged_by_name(trained: Recipe, changes: list[str], place: Path) -> None:
    tiny.adapter(place / "base", place / "published" / "RT-S")
    adapter = f"generator.adapter={{path: {place / 'published'}, subfolder: RT-S}}"
    told = [*changes, "generator.lora=null", adapter]
    assert raglan("checkpoint", "merge", RECIPE, "-o", place / "rt-s", "--untuned", *told) == 0
    merged = open_generator(GeneratorSettings(model=str(place / "rt-s"), dtype="float32"), PromptSettings())
    beside = open_generator(load_recipe(RECIPE, told).generator, PromptSettings())
    ids = torch.tensor([merged.prompt.render("who?", PASSAGES).ids])
    with torch.no_grad():
        spread = float(beside.model(input_ids=ids).logits.std())
        assert torch.allclose(merged.model(input_ids=ids).logits, beside.model(input_ids=ids).logits, atol=0.2 * spread)


def test_rows_whose_evidence_does_not_fit_are_left_out_and_counted(
    trained: Recipe, changes: list[str], place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two passages whole in 110 tokens: one fits, and where it is not the one that answers there is nothing to learn."""
    people = f"data={{kind: questions, path: {place / 'train.jsonl'}, source: mixed, passages: 2}}"
    recipe = load_recipe(RECIPE, [*(c for c in changes if not c.startswith("data.")), people, "prompt.max_tokens=110"])
    system = Parts().open(recipe)
    corpus = {passage.id: passage.text for passage in system.retriever.base.corpus}
    examples = read_examples(place / "train.jsonl")
    with caplog.at_level(logging.WARNING):
        rows = answer_rows(examples, recipe.trainings()["answer"].data, system.retriever, system.generator, 1)
    assert 0 < len(rows) < len(examples)
    assert f"{len(examples) - len(rows)} rows are left out" in caplog.text
    shown = [system.generator.tokenizer.decode(row["input_ids"]) for row in rows]
    gold = [{corpus[name] for one in examples for name in one.relevant if one.query in text} for text in shown]
    assert all(any(evidence in text for evidence in own) for own, text in zip(gold, shown, strict=True))


@pytest.mark.parametrize("more", [["--untuned"], ["--dtype", "int4"], ["-o", "{kb}"]])
def test_a_merge_that_cannot_be_is_refused(trained: Recipe, changes: list[str], place: Path, more: list[str]) -> None:
    told = [word.format(kb=place / "kb") for word in more]
    output = [] if "-o" in told else ["-o", place / "never"]
    assert raglan("checkpoint", "merge", RECIPE, *output, *told, *changes) == 2
    assert not (place / "never").exists()
