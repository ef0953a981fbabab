"""Recipes: every fault at once, with its place, its value and the nearest name; overrides; the schema."""

from __future__ import annotations

from pathlib import Path

import pytest

from raglan.errors import RecipeError
from raglan.recipe import StageSettings, load_recipe, recipe_schema

GOOD = """
name: t
knowledge: {path: kb, documents: docs}
data: {kind: questions, path: q.jsonl}
objective: {kind: answer}
train: {learning_rate: 2e-4}
evaluate: {questions: q.jsonl}
"""


def recipe(folder: Path, text: str = GOOD) -> Path:
    path = folder / "r.yaml"
    path.write_text(text)
    return path


def test_defaults_paths_and_numbers(tmp_path: Path) -> None:
    loaded = load_recipe(recipe(tmp_path))
    assert loaded.knowledge.path == tmp_path / "kb"
    assert loaded.knowledge.documents == (tmp_path / "docs",)
    assert loaded.index == "hybrid"
    assert loaded.trainings()["answer"].train == {"learning_rate": 2e-4}
    assert loaded.run == tmp_path / "runs" / "t"


def test_example_recipes_load(vessen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAGLAN_DATA", "/data")
    assert list(load_recipe(vessen / "vessen.yaml").trainings()) == ["teach", "read", "find"]
    benchmark = load_recipe(vessen.parent.parent / "benchmarks" / "squad.yaml")
    assert benchmark.knowledge.documents == (Path("/data/squad/corpus.jsonl.gz"),)
    monkeypatch.delenv("RAGLAN_DATA")
    with pytest.raises(RecipeError, match="needs the environment variable RAGLAN_DATA"):
        load_recipe(vessen.parent.parent / "benchmarks" / "squad.yaml")


def test_overrides_reach_stages_and_are_yaml(tmp_path: Path, vessen: Path) -> None:
    loaded = load_recipe(
        vessen / "vessen.yaml", ["train.learning_rate=2e-4", "retriever.k=7", "stages.find.objective.k=4", "name=x"]
    )
    assert {stage.train["learning_rate"] for stage in loaded.trainings().values()} == {2e-4}
    assert (loaded.retriever.k, loaded.name) == (7, "x")
    assert loaded.stages["find"].objective.k == 4  # type: ignore[union-attr]
    with pytest.raises(RecipeError, match="not of the form key=value"):
        load_recipe(vessen / "vessen.yaml", ["retriever.k"])
    with pytest.raises(RecipeError, match="name is not a group"):
        load_recipe(vessen / "vessen.yaml", ["name.x=1"])


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        ("decode: {kind: rag_token, beam: 2}", ["decode.beam: unknown key; did you mean 'beams'?"]),
        ("generator: {modes: x}", ["generator.modes: unknown key; did you mean 'model'?"]),
        ("retreiver: {k: 3}", ["retreiver: unknown key; did you mean 'retriever'?"]),
        ("retriever: {k: many}", ["retriever.k: ", "is 'many'"]),
        ("retriever: {k: 0}", ["retriever.k: ", "greater than or equal to 1", "is 0"]),
        ("retriever: {k: many}\nprompt: {max_tokenz: 9}", ["2 faults", "is 'many'", "did you mean 'max_tokens'?"]),
        ("retriever: {index: colbert}", ["'colbert'", "dense, bm25, hybrid"]),
        ("decode: {kind: beam}", ["decode.kind: is 'beam'", "'concat', 'rag_sequence', 'rag_token'"]),
        ("objective: {over: token}\ndata: {kind: lessons}", ["objective.kind: is missing"]),
        ("prompt: {template: x}", ["template must hold {question}"]),
        ("stages: {a: {data: {kind: lessons}, objective: {kind: answer}}}", ["either stages or one objective"]),
        ("generator: {model: 7}", ["generator.model", "is 7"]),
    ],
)
def test_faults_say_where_what_and_which_name_was_meant(tmp_path: Path, change: str, messages: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe(tmp_path, GOOD + change))
    for message in messages:
        assert message in str(caught.value)
    assert "hint:" in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("learning_rate", "learning_rat", "did you mean 'learning_rate'?"),
        ("name: t", "", "name: is missing"),
        ("{kind: answer}", "{kind: lsr, target: mean_logprob}", "needs tau"),
        ("data: {kind: questions, path: q.jsonl}", "data: {kind: lessons}", None),
        ("objective: {kind: answer}", "", "data and objective belong together"),
        ("documents: docs", "documents: docs, chunk: {max_tokens: 8, overlap: 8}", "overlap (8) must be smaller"),
        ("documents: docs", "documents: docs, indexes: {h: {kind: hybrid, of: [a, b]}}", "fuses 'a'"),
        ("documents: docs", "documents: docs, indexes: {d: {kind: densee}}", "'densee'"),
    ],
)
def test_faults_of_meaning(tmp_path: Path, old: str, new: str, message: str | None) -> None:
    text = GOOD.replace(old, new)
    if message is None:
        text = text.replace("{kind: answer}", "{kind: lsr}")
        message = "objective lsr needs data of kind questions"
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe(tmp_path, text))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("train: {accelerator_config: {auth_token: hf_SENTINEL}}", "train: auth_token is a secret"),
        ("generator: {kind: vllm, model: m, engine: {hf_token: hf_SENTINEL}}", "generator.engine: hf_token is a secret"),
        ("generator: {kind: graded, model: m, endpoint: 'http://me:hf_SENTINEL@host/v1'}", "variable that api_key_env names"),
        ("generator: {kind: graded, model: m, endpoint: 'http://host/v1?key=hf_SENTINEL'}", "variable that api_key_env names"),
    ],
)
def test_a_secret_is_refused_and_not_repeated(tmp_path: Path, change: str, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe(tmp_path, GOOD.replace("train: {learning_rate: 2e-4}\n", "") + change))
    assert told in str(caught.value)
    assert "hf_SENTINEL" not in str(caught.value)


@pytest.mark.parametrize("override", ["train.hub_token:hf_SENTINEL", "train.hub_token=[hf_SENTINEL"])
def test_a_faulty_override_shows_no_secret(tmp_path: Path, override: str) -> None:
    with pytest.raises(RecipeError, match=r"train\.hub_token=…") as caught:
        load_recipe(recipe(tmp_path), [override])
    assert "hf_SENTINEL" not in str(caught.value)


def test_what_only_sounds_like_a_secret_is_none(tmp_path: Path) -> None:
    engine = "generator: {kind: vllm, model: m, engine: {hf_token: true, max_num_batched_tokens: 64, eos_token: x}}\n"
    more = "decode: {kind: self_rag}\ntrain: {hub_token: null, include_num_input_tokens_seen: 'no'}"
    load_recipe(recipe(tmp_path, GOOD.replace("train: {learning_rate: 2e-4}\n", "") + engine + more))


def test_pydantic_shows_no_values() -> None:
    stage = {"data": {"kind": "lessons"}, "objective": {"kind": "answer"}, "train": {"hub_token": "hf_S"}}
    with pytest.raises(ValueError, match="hub_token is a secret") as caught:
        StageSettings.model_validate(stage)
    assert "hf_S" not in str(caught.value)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no recipe"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="is not YAML"):
        load_recipe(recipe(tmp_path, "a: [1"))
    with pytest.raises(RecipeError, match="must hold a mapping"):
        load_recipe(recipe(tmp_path, "- 1"))


def test_schema_knows_training_arguments() -> None:
    schema = recipe_schema()
    assert "learning_rate" in schema["properties"]["train"]["properties"]
    assert "output_dir" not in schema["properties"]["train"]["properties"]
    assert {"name", "knowledge"} <= set(schema["required"])
