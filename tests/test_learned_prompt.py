"""A tuned generator knows the prompt that it learned with, and is not asked with another one unnoticed."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from raglan import cli
from raglan.errors import RecipeError
from raglan.evaluate import evaluate
from raglan.knowledge import build_knowledge
from raglan.learned_prompt import check_prompt, prompt_record
from raglan.mixture import prompts_of
from raglan.prompt import Prompt
from raglan.rag import RAG
from raglan.recipe import InstructionMix, PromptSettings, load_recipe
from raglan.rendering import Rendering
from raglan.stages import finished_parts
from raglan.train import train
from tiny import llama, small_recipe

OTHER = "{passages}|Q:{question}|A:"
TEMPLATE = f"prompt.template='{OTHER}'"


def causal_recipe(folder: Path, data: str = "{kind: questions, path: train.jsonl, passages: 1}") -> Path:
    """The small recipe with a causal model and one stage of a step, built."""
    path = small_recipe(folder)
    llama(folder / "llama")
    text = path.read_text().replace("model: reader", "model: llama").replace("max_tokens: 96", "max_tokens: 300")
    head, tail = text[: text.index("stages:")], text[text.index("evaluate:") :]
    path.write_text(f"{head}data: {data}\nobjective: {{kind: answer}}\n{tail}")
    build_knowledge(load_recipe(path).knowledge)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = causal_recipe(tmp_path_factory.mktemp("prompt"))
    return path, str(train(load_recipe(path, ["train.max_steps=1"])).generator)


def test_asked_with_another_prompt_it_is_refused_with_both_hashes(
    trained: tuple[Path, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, generator = trained
    learned = json.loads((Path(generator) / "manifest.json").read_text())["prompt"]
    other = load_recipe(path, [TEMPLATE, f"generator.model={generator}"])
    mine = prompt_record([Prompt(other.prompt, None, layout="joined")])["hash"]
    assert mine != learned["hash"]
    with pytest.raises(RecipeError) as caught:
        RAG.open(other)
    for told in (learned["hash"], mine, repr(learned["words"]["template"]), "generator.any_prompt: true"):
        assert told in str(caught.value)
    asked = ["answer", str(path), "who?", TEMPLATE, f"generator.model={generator}"]
    for more, code in (([], 2), (["generator.any_prompt=true"], 0)):
        monkeypatch.setattr("sys.argv", ["raglan", *asked, *more])
        with pytest.raises(SystemExit) as done:
            cli.main()
        assert (done.value.code or 0) == code, capsys.readouterr().err
        assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("same", ["prompt.max_tokens=200", "prompt.whole_passages=true", "prompt.layout=joined"])
def test_budgets_are_no_other_prompt(trained: tuple[Path, str], same: str) -> None:
    path, generator = trained
    RAG.open(load_recipe(path, [same, f"generator.model={generator}"]))


def test_a_stage_of_another_prompt_is_not_used_and_both_are_told(
    trained: tuple[Path, str], caplog: pytest.LogCaptureFixture
) -> None:
    path, generator = trained
    learned = json.loads((Path(generator) / "manifest.json").read_text())["prompt"]["hash"]
    other = load_recipe(path, [TEMPLATE, "train.max_steps=1"])
    assert finished_parts(other)[-1][0] == "untuned"
    mine = prompt_record([Prompt(other.prompt, None, layout="joined")])["hash"]
    assert f"the prompt was {learned} and is {mine}" in caplog.text
    caplog.clear()
    finished_parts(load_recipe(path, ["prompt.max_tokens=200", "train.max_steps=1"]))
    assert "not used" in caplog.text
    assert "the prompt was" not in caplog.text


def test_own_stages_are_found_with_and_without_the_permission(trained: tuple[Path, str]) -> None:
    path, generator = trained
    for more in ([], ["generator.any_prompt=true"]):
        recipe = load_recipe(path, ["train.max_steps=1", *more])
        assert finished_parts(recipe)[-1][1].generator == generator
        finished_parts(recipe)[-1][1].open(recipe)


def test_a_measurement_names_the_prompt_that_was_asked_with(trained: tuple[Path, str]) -> None:
    path, generator = trained
    learned = json.loads((Path(generator) / "manifest.json").read_text())["prompt"]["hash"]
    recipe = load_recipe(path, ["train.max_steps=1", "evaluate.limit=2", "evaluate.modes=[closed_book]"])
    assert recipe.evaluate is not None
    measured = evaluate(recipe, recipe.evaluate, *finished_parts(recipe)[-1])
    assert json.loads((measured.folder / "manifest.json").read_text())["prompt"] == learned


def test_what_learns_on_may_have_another_prompt_and_keeps_it(trained: tuple[Path, str]) -> None:
    path, generator = trained
    again = load_recipe(path, [TEMPLATE, f"generator.model={generator}", "train.max_steps=1", "name=again"])
    learned = train(again).generator
    told = json.loads((Path(str(learned)) / "manifest.json").read_text())["prompt"]
    assert told["words"]["template"] == OTHER


def test_rows_with_prompts_of_their_own_give_a_warning_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = causal_recipe(tmp_path, "{kind: shown, path: made.jsonl}")
    shown = [{"id": "p1", "title": "", "text": "a tower"}]
    synth = {"passages": shown, "target": "a", "instruction": "Answer.", "rendering": Rendering().record()}
    (tmp_path / "made.jsonl").write_text(json.dumps({"id": "s1", "query": "what is it?", "answers": ["a"], "synth": synth}))
    recipe = load_recipe(path, ["train.max_steps=1"])
    parts = train(recipe)
    assert json.loads((Path(str(parts.generator)) / "manifest.json").read_text())["prompt"] == {"rows": "own"}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            parts.open(recipe)
    told = [record for record in caplog.records if "a prompt of each row's own" in record.getMessage()]
    assert len(told) == 1
    assert prompt_record([Prompt(recipe.prompt, None, layout="joined")])["hash"] in told[0].getMessage()


def test_of_several_prompts_each_may_be_asked_with(caplog: pytest.LogCaptureFixture) -> None:
    own = Prompt(PromptSettings(), None, layout="joined")
    data = InstructionMix.model_validate({"kind": "instruction_mix", "sources": {"a": {"path": "a"}}})
    mixed = list(prompts_of(data, own).values())
    record = prompt_record(mixed)
    assert record["rows"] == "several"
    check_prompt(record, mixed[-1], model="m")
    assert not caplog.records
    check_prompt(record, own, model="m")
    assert "several prompts" in caplog.text


def test_every_word_counts() -> None:
    changes = {
        "template": "{passages} {question}", "passage": "{text}", "separator": "\n", "question_form": "query_decoded",
        "no_passage": "{question}", "shots": ({"question": "q", "answer": "a"},),
    }  # fmt: skip
    plain = PromptSettings()
    prompts = [plain, *(PromptSettings.model_validate({**plain.model_dump(), name: value}) for name, value in changes.items())]
    hashes = {prompt_record([Prompt(one, None, layout="joined")])["hash"] for one in prompts}
    assert len(hashes) == len(prompts)
    fused = [Prompt(PromptSettings(template=text), None, layout="fused") for text in ("{question}", "{question} ")]
    assert fused[0].words == fused[1].words, "a reader of blocks has no template"
