"""What Self-RAG's authors say before a question, by name, and the recipes with their figures."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny
from raglan.decode import Asked, self_rag
from raglan.errors import RecipeError
from raglan.marked_prompt import MarkedPrompt, read_schema
from raglan.recipe import Recipe, SelfRagDecode, SelfRagPromptSettings, load_recipe
from raglan.recipe.self_rag import task_prompts
from tiny import ScriptedGenerator, decides, said

RECIPES = Path(__file__).parent.parent / "recipes"


def shown(instruction: str, query: str) -> str:
    """The whole prompt, as text."""
    words = tiny.llama_tokenizer(special=True)
    prompt = MarkedPrompt(read_schema(words, len(words)), words, SelfRagPromptSettings(), eos=2)
    decode = SelfRagDecode(kind="self_rag", instruction=instruction)
    return prompt.text(prompt.question(query, instruction=decode.instruction))


@pytest.mark.parametrize(
    ("name", "query", "expected"),
    [
        ("released/pubhealth", "x", "otherwise say false.\n\n## Input:\n\nx"),
        ("released/arc", "x\nA: y\nB: z", "best answer choice.\n\n### Input:\nx\nA: y\nB: z"),
        ("released/asqa", "x", "all correct answers.## Input:\n\nx"),
        ("paper/pubhealth", "x", 'just say "true" or "false".\n\n## Input:\n\nx'),
        ("paper/arc", "x", "extra phrase or period.\n\n### Input:\nx"),
        ("paper/bio", "Odo Marrack", "### Instruction:\nTell me a bio about Odo Marrack"),
        ("Answer it.", "x", "### Instruction:\nAnswer it.## Input:\n\nx"),
        ("Of {question} tell all, please.", "{question} {input}", "Of {question} {input} tell all, please."),
    ],
)
def test_instructions_stand_as_they_were(name: str, query: str, expected: str) -> None:
    told = shown(name, query)
    assert told.rstrip("\n").endswith(expected + "\n\n### Response:")
    assert told.startswith("### Instruction:\n")


def test_each_task_is_one_line_around_its_question() -> None:
    assert {name.partition("/")[0] for name in task_prompts()} == {"released", "paper"}
    assert all(text.count("{question}") == 1 and "  " not in text for text in task_prompts().values())
    longer = [
        name for name in ("pubhealth", "arc") if len(task_prompts()[f"paper/{name}"]) > len(task_prompts()[f"released/{name}"])
    ]
    assert longer == ["pubhealth", "arc"]


def test_a_name_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "name: t\nknowledge: {path: kb, documents: docs}\ndecode: {kind: self_rag, instruction: released/pubhelth}\n"
    )
    with pytest.raises(RecipeError, match=r"'released/pubhelth' is none of released/pubhealth, released/arc"):
        load_recipe(tmp_path / "r.yaml")


def test_a_spelling_inside_the_instructions_place_stays_text() -> None:
    generator = ScriptedGenerator({"who?": {(): decides(0.9, 0.05), ("[No Retrieval]",): said("x")}})
    decode = SelfRagDecode(kind="self_rag", instruction="Say {question} [Relevant]", max_new_tokens=4)
    self_rag(generator, Asked(["who?"], [[]]), decode)
    assert generator.schema.controls.isdisjoint(generator.prompts[0])


def opened(name: str, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    for variable in ("DOCUMENTS", "QUESTIONS", "CHECKPOINT", "MODEL", "ROWS", "DEV_ROWS", "CRITIQUE"):
        monkeypatch.setenv(variable, f"/{variable.lower()}")
    return load_recipe(RECIPES / name)


def test_the_closed_sets_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = opened("self_rag_closed.yaml", monkeypatch).decode
    assert isinstance(decode, SelfRagDecode)
    assert (decode.labels, decode.limit, decode.instruction) == (("true", "false"), 50, task_prompts()["released/pubhealth"])


def test_the_critics_recipe_has_the_papers_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = opened("self_rag_critic.yaml", monkeypatch)
    (stage,) = recipe.trainings().values()
    assert (stage.train["num_train_epochs"], stage.train["learning_rate"], stage.train["warmup_steps"]) == (3, 2e-5, 0.01)
    assert stage.train["per_device_train_batch_size"] * stage.train["gradient_accumulation_steps"] == 16
    assert stage.train["lr_scheduler_type"] == "cosine"
    assert str(stage.data.path) == "/critique/critic/train.jsonl"  # type: ignore[union-attr]


def test_the_lora_recipe_differs_in_the_adapter_and_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, lora = (opened(f"self_rag_{name}.yaml", monkeypatch) for name in ("generator", "generator_lora"))
    own = lora.generator.lora
    assert own is not None
    assert (own["r"], own["lora_alpha"], own["target_modules"]) == (64, 128, "all-linear")
    (first,), (second,) = whole.trainings().values(), lora.trainings().values()
    assert (first.train["learning_rate"], second.train["learning_rate"]) == (2e-5, 1e-4)
    same = ("num_train_epochs", "warmup_steps", "per_device_train_batch_size", "gradient_accumulation_steps")
    assert [first.train[name] for name in same] == [second.train[name] for name in same]
    assert (first.data, first.objective) == (second.data, second.objective)
