"""Training on passages as they were written down: rows equal prompts, what does not fit, mixtures of one size; it learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import tiny
from raglan.domains import data_sets
from raglan.errors import CheckpointError, CorpusError, RecipeError
from raglan.generator import HFGenerator, open_generator
from raglan.knowledge import build_knowledge
from raglan.recipe import GeneratorSettings, PromptSettings, ShownData, load_recipe
from raglan.records import Passage
from raglan.rendering import Rendering, render
from raglan.shown import shown_rows
from raglan.train import train
from tiny import small_recipe

SAID = "Answer in a word."


def example(n: int, *, k: int = 2, target: str = "red", template: str = "question_last", **synth: Any) -> dict[str, Any]:
    passages = [{"id": f"p{n}-{i}", "title": f"t{i}", "text": f"door {n} {i} is {target}", "role": "noise"} for i in range(k)]
    told = {"passages": passages, "target": target, "instruction": SAID, "rendering": Rendering(template).record(), **synth}
    return {"id": f"synth-{n}-0", "query": f"what is door {n}", "answers": [target], "relevant": [], "synth": told}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shown")
    tiny.llama(path / "llama")
    small_recipe(path)  # leaves a reader
    return path


@pytest.fixture(scope="module")
def causal(folder: Path) -> HFGenerator:
    return open_generator(GeneratorSettings(model=str(folder / "llama"), dtype="float32"), PromptSettings(max_tokens=300))


@pytest.fixture(scope="module")
def reader(folder: Path) -> HFGenerator:
    return open_generator(GeneratorSettings(model=str(folder / "reader"), dtype="float32"), PromptSettings(max_tokens=64))


def data(**settings: Any) -> ShownData:
    return ShownData.model_validate({"kind": "shown", **settings})


def passages(row: dict[str, Any]) -> list[Passage]:
    return [Passage(one["id"], one["text"], one["title"]) for one in row["synth"]["passages"]]


def test_a_causal_row_is_the_prompt_that_was_written_and_the_answer_with_its_end(tmp_path: Path, causal: HFGenerator) -> None:
    rows = [example(n, k=1 + n % 3, template=name) for n, name in enumerate(("brief", "question_first", "labelled_parts"))]
    made = shown_rows(data(path=write(tmp_path / "a.jsonl", rows)), causal, seed=1)
    for row in rows:
        rendering = Rendering(row["synth"]["rendering"]["template"])
        asked = render(causal.prompt, rendering, row["query"], passages(row), instruction=SAID)
        assert SAID in asked.text
        assert {"input_ids": list(asked.ids), "labels": [*causal.answer_ids("red", asked.answer_space)]} in made.rows
    assert all(row["labels"][-1] == causal.eos for row in made.rows)
    assert made.figures["sources"]["path"]["learned"] == 3


def test_the_reader_gets_one_block_a_passage_with_instruction_and_question(tmp_path: Path, reader: HFGenerator) -> None:
    row = example(1, k=3)
    path = write(tmp_path / "a.jsonl", [row])
    own, plain = (shown_rows(data(path=path, prompt=prompt), reader, seed=1).rows[0] for prompt in ("own", "recipe"))
    opens = reader.tokenizer.cls_token_id
    assert own["input_ids"].count(opens) == plain["input_ids"].count(opens) == 3
    asked = reader.tokenizer(f"{SAID} {row['query']}", add_special_tokens=False)["input_ids"]
    assert own["input_ids"][1 : 1 + len(asked)] == asked
    assert plain["input_ids"] == list(reader.prompt.render(row["query"], passages(row)).ids), "as evaluation asks it"


def test_what_would_be_cut_is_left_out_and_counted(
    tmp_path: Path, causal: HFGenerator, caplog: pytest.LogCaptureFixture
) -> None:
    long = example(7)
    long["synth"]["passages"][1]["text"] = "word " * 400
    rows = [example(1), long, {**example(3), "query": "why " * 400}]
    made = shown_rows(data(path=write(tmp_path / "a.jsonl", rows)), causal, seed=1)
    assert made.figures["sources"]["path"] | {"path": ""} == {
        "path": "", "examples": 3, "left_out": 2, "learned": 1, "answer_tokens": 4, "repeats": 0,
    }  # fmt: skip
    assert "2 of 3 examples do not fit whole" in caplog.text
    with pytest.raises(CorpusError, match="no example fits"):
        shown_rows(data(path=write(tmp_path / "b.jsonl", [long])), causal, seed=1)


def test_the_three_forms_of_a_mixture_have_one_size(tmp_path: Path, causal: HFGenerator) -> None:
    files = {
        "kiqa": write(tmp_path / "kiqa.jsonl", [example(n) for n in range(6)]),
        "synthetic": write(tmp_path / "made.jsonl", [example(n, target="pale green") for n in range(10, 14)]),
    }
    forms = {mix: shown_rows(data(mix=mix, **files), causal, seed=1) for mix in ("kiqa", "synthetic", "kiqa+synthetic")}
    assert [len(form.rows) for form in forms.values()] == [4, 4, 4]
    both = forms["kiqa+synthetic"].figures["sources"]
    assert {name: told["learned"] for name, told in both.items()} == {"kiqa": 2, "synthetic": 2}
    larger = shown_rows(data(mix="synthetic", size=10, **files), causal, seed=1).figures["sources"]["synthetic"]
    assert (larger["learned"], larger["repeats"]) == (10, 6)
    again = shown_rows(data(mix="kiqa+synthetic", **files), causal, seed=1)
    assert again.rows == forms["kiqa+synthetic"].rows
    by_tokens = {
        mix: shown_rows(data(mix=mix, match="answer_tokens", size=24, **files), causal, seed=1).figures["sources"]
        for mix in ("kiqa", "synthetic")
    }
    one, other = by_tokens["kiqa"]["kiqa"], by_tokens["synthetic"]["synthetic"]
    assert one["learned"] > other["learned"]
    assert all(24 <= told["answer_tokens"] < 24 + 12 for told in (one, other))


@pytest.mark.parametrize(
    ("settings", "told"),
    [({}, "give either path, or mix"), ({"path": "a", "mix": "kiqa"}, "give either path, or mix"),
     ({"mix": "kiqa+synthetic", "kiqa": "a"}, "synthetic names no file"),
     ({"path": "a", "kiqa": "b"}, "say mix instead of path")],
)  # fmt: skip
def test_settings_that_do_not_hang_together(settings: dict[str, str], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        data(**settings)


def test_instructions_are_left_out_only_where_they_all_say_the_same(tmp_path: Path, reader: HFGenerator) -> None:
    rows = [example(1, policy="abstain"), example(2, policy="own_knowledge")]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(RecipeError, match="2 policies for what no passage answers: abstain, own_knowledge"):
        shown_rows(data(path=path, prompt="recipe"), reader, seed=1)
    assert len(shown_rows(data(path=path), reader, seed=1).rows) == 2


def test_rows_that_cannot_be_trusted_are_refused(tmp_path: Path, causal: HFGenerator) -> None:
    changed = example(1)
    changed["synth"]["rendering"]["fingerprint"] = "0123"
    with pytest.raises(CheckpointError, match="'synth-1-0' was rendered with words of fingerprint 0123"):
        shown_rows(data(path=write(tmp_path / "a.jsonl", [changed])), causal, seed=1)
    plain = {"id": "q", "query": "what", "answers": ["a"]}
    with pytest.raises(CorpusError, match="does not say which passages were shown"):
        shown_rows(data(path=write(tmp_path / "b.jsonl", [plain])), causal, seed=1)
    held = {**example(1), "split": "test"}
    with pytest.raises(CorpusError, match="1 examples of the split `test`"):
        shown_rows(data(path=write(tmp_path / "c.jsonl", [held])), causal, seed=1)


def test_a_stage_learns_from_them_and_says_of_what(folder: Path) -> None:
    towers = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    rows = []
    for n, tower in enumerate(towers):
        shown = [{"id": one["id"], "title": one["title"], "text": one["text"]} for one in (tower, towers[n - 1])]
        miller = tower["text"].split()[7]
        rows.append({
            "id": f"synth-{n}-0", "query": f"who built {tower['title']}", "answers": [miller],
            "synth": {"passages": shown, "target": miller, "instruction": SAID, "rendering": Rendering().record()},
        })  # fmt: skip
    write(folder / "kiqa.jsonl", rows[:16])
    write(folder / "made.jsonl", rows[12:28])
    path = small_recipe(folder, name="shown")
    build_knowledge(load_recipe(path).knowledge)
    text = path.read_text()
    head, tail = text[: text.index("stages:")], text[text.index("evaluate:") :]
    path.write_text(f"""{head}
data: {{kind: shown, mix: kiqa+synthetic, kiqa: kiqa.jsonl, synthetic: made.jsonl, prompt: recipe}}
objective: {{kind: answer}}
{tail.replace("dev.jsonl", "asked.jsonl")}""")
    write(folder / "asked.jsonl", [{"id": "x", "query": "another question", "answers": ["a"], "relevant": ["p1"]}])
    recipe = load_recipe(path, ["train.num_train_epochs=8"])
    parts = train(recipe)
    told = json.loads((Path(str(parts.generator)).parent / "manifest.json").read_text())
    assert told["data"]["sources"]["kiqa"]["learned"] == told["data"]["sources"]["synthetic"]["learned"] == 8
    assert told["rows"] == 16
    log = json.loads((Path(str(parts.generator)).parents[1] / "log.json").read_text())
    losses = [step["loss"] for step in log if "loss" in step]
    assert losses[-1] < 0.8 * losses[0]
    write(folder / "asked.jsonl", [{"id": "x", "query": rows[13]["query"], "answers": ["a"], "relevant": ["p1"]}])
    with pytest.raises(CorpusError, match="share 1 question"):
        train(load_recipe(path, ["train.num_train_epochs=1"]))


def test_what_a_mixture_learned_from_is_in_domain(tmp_path: Path) -> None:
    for name, source in (("kiqa", "nq"), ("made", "offline")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"sources": {source: "somewhere"}}))
    files = {"kiqa": tmp_path / "kiqa" / "examples.jsonl", "synthetic": tmp_path / "made" / "examples.jsonl"}
    both, one = (data(mix=mix, **files).model_dump(mode="json") for mix in ("kiqa+synthetic", "synthetic"))
    assert {"nq", "offline"} <= data_sets(both)
    assert "nq" not in data_sets(one), "the other file only set the size"
