"""Published Self-RAG rows: taken apart, put together byte for byte, learned through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import tiny
from raglan.artifact import read_manifest
from raglan.cli import app
from raglan.decode import Asked, self_rag
from raglan.errors import CorpusError
from raglan.generator import open_generator
from raglan.marked_prompt import GROUPS
from raglan.marked_rows import read_marked_rows
from raglan.published_rows import export_rows, import_rows, published, unpublished
from raglan.recipe import GeneratorSettings, PromptSettings, SelfRagDecode, load_recipe
from raglan.records import Hit, Passage
from raglan.reflection import GrammarError, Schema, parse, rel
from raglan.stages import finished_parts, learning_curves

OUTPUTS = [
    "[No Retrieval]Sure. [Utility:5]",
    "[Retrieval]<paragraph>Title\nText\nmore</paragraph>[Relevant]A sentence.[Fully supported] tail[Utility:4]",
    "Lead. [Retrieval]<paragraph>no line break</paragraph>[Irrelevant]Hm[Continue to Use Evidence]é 中[Utility:1]",
    "[Retrieval]<paragraph></paragraph>[Relevant][Partially supported][Retrieval]<paragraph>\n\n</paragraph>[Relevant]b"
    "[No support / Contradictory][Utility:3]",
]
OFF = [
    "[Relevant]no passage[Utility:5]", "nothing at all", "[No Retrieval]no end",
    "[Retrieval]<paragraph>x[Relevant]y[Utility:2]",
]  # fmt: skip


def line(output: str, **more: Any) -> str:
    return json.dumps({"instruction": "Do it.", "input": "", "output": output} | more) + "\n"


@pytest.mark.parametrize("output", OUTPUTS)
def test_outputs_are_taken_apart_and_put_together(output: str) -> None:
    row, fault = unpublished(line(output, id="q1", dataset_name="x", topic=None))
    assert fault == ""
    assert "verbatim" not in row
    assert "line" not in row["metadata"]["published"]
    assert row["metadata"]["published"]["fields"] == {"id": "q1", "dataset_name": "x", "topic": None}
    assert published(row) == line(output, id="q1", dataset_name="x", topic=None)


def test_parts() -> None:
    row, _ = unpublished(line(OUTPUTS[1]))
    (segment,) = row["segments"]
    assert (segment["decision"], segment["is_rel"], segment["is_sup"], row["is_use"]) == ("yes", "relevant", "fully", 4)
    assert (segment["passage"]["title"], segment["passage"]["text"]) == ("Title", "Text\nmore")
    assert (segment["text"], segment["tail"]) == ("A sentence.", " tail")
    row, _ = unpublished(line(OUTPUTS[2]))
    assert (row["lead"], row["segments"][0]["passage"]["title"]) == ("Lead. ", None)
    assert [segment["decision"] for segment in row["segments"]] == ["yes", "continue"]


@pytest.mark.parametrize("output", OFF)
def test_rows_off_the_grammar_are_kept_verbatim_with_the_place(output: str) -> None:
    row, fault = unpublished(line(output))
    assert fault.startswith("position ")
    assert row["verbatim"] == output
    assert published(row) == line(output)


PIECES = st.sampled_from([*Schema.numbered(0).spellings, "</s>", "a", " ", "\n", '"', "\\", "é", "\u2028", "[Relevant"])


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECES, max_size=8).map("".join), st.booleans(), st.booleans(), st.sampled_from(["\n", "\r\n", ""]))
def test_any_line_comes_back_byte_for_byte(output: str, ascii_: bool, compact: bool, end: str) -> None:
    given_ = {"output": output, "n": 1.5, "instruction": output, "input": None if compact else "x"}
    text = json.dumps(given_, ensure_ascii=ascii_, separators=(",", ":") if compact else None) + end
    row, _ = unpublished(text)
    assert published(json.loads(json.dumps(row))) == text


def test_files_come_back_byte_for_byte(tmp_path: Path) -> None:
    odd = [
        '{"instruction":  "two blanks", "output": "[No Retrieval]\\u0061[Utility:5]"}\n',
        '{"output": "x", "instruction": "y"}',
    ]
    whole = "".join([*(line(output, id="same") for output in [*OUTPUTS, *OFF]), *odd])
    (tmp_path / "theirs.jsonl").write_text(whole, encoding="utf-8")
    off = import_rows(tmp_path / "theirs.jsonl", tmp_path / "ours.jsonl")
    assert [number for number, _ in off] == [5, 6, 7, 8, 10]
    assert len({row["id"] for row in read_marked_rows(tmp_path / "ours.jsonl")}) == 10
    export_rows(tmp_path / "ours.jsonl", tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "theirs.jsonl").read_bytes()
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(CorpusError, match=r"bad\.jsonl, line 1 has no texts"):
        import_rows(tmp_path / "bad.jsonl", tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()
    assert not list(tmp_path.glob("*.part"))


def test_half_a_character_is_told_with_its_line(tmp_path: Path) -> None:
    good = json.dumps({"instruction": "a", "output": "[No Retrieval]b[Utility:5]"})
    (tmp_path / "theirs.jsonl").write_text(good + "\n" + good.replace('"a"', '"\\ud83d"') + "\n")
    with pytest.raises(CorpusError, match=r"line 2 holds .*half a character"):
        import_rows(tmp_path / "theirs.jsonl", tmp_path / "rows.jsonl")
    assert not (tmp_path / "rows.jsonl").exists()


# ------------------------------------------------------------------------------------- the published checkpoint's layout

PUBLISHED = {  # ids of the published 7B, 32,000 pieces before them
    "retrieve": (32000, 32001, 32002), "is_rel": (32003, 32004), "markup": (32005, 32006),
    "is_use": (32007, 32008, 32009, 32010, 32011), "is_sup": (32012, 32013, 32014),
}  # fmt: skip


@pytest.fixture(scope="module", params=[True, False], ids=["special", "ordinary"])
def layout(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny.self_rag(tmp_path_factory.mktemp("published"), special=request.param, base=32000)
    return open_generator(GeneratorSettings(model=str(folder), dtype="float32"), PromptSettings())


def test_published_rows_become_the_published_checkpoints_ids(layout: Any, tmp_path: Path) -> None:
    """Imported rows, joined from parts, are the ids that the checkpoint's own tokenizer gives to the whole string."""
    assert dict(layout.schema.ids) == PUBLISHED
    assert (layout.tokenizer.pad_token_id, len(layout.tokenizer)) == (32015, 32016)
    matrices = (layout.model.get_input_embeddings(), layout.model.get_output_embeddings())
    assert [len(matrix.weight) for matrix in matrices] == [32016, 32016]
    said = ["When was it built?", "## Input:\n\nName one.", "Was ist das? 中文 é", "  blanks "]
    whole = "".join(line(output, instruction=asked) for output, asked in zip(OUTPUTS, said, strict=True))
    (tmp_path / "theirs.jsonl").write_text(whole, encoding="utf-8")
    assert import_rows(tmp_path / "theirs.jsonl", tmp_path / "ours.jsonl") == []
    for row, output, asked in zip(read_marked_rows(tmp_path / "ours.jsonl"), OUTPUTS, said, strict=True):
        made = layout.marked_prompt.row_ids(row)
        string = layout.prompt.settings.self_rag.template.format(instruction=asked) + output
        assert [*made.input_ids, *made.labels] == [*layout.tokenizer(string)["input_ids"], layout.eos]
        between = [token for token, group in zip(made.labels, made.groups, strict=True) if GROUPS[group] == "passage"]
        learned = [token for token, ok in zip(made.labels, made.learned, strict=True) if ok]
        assert len(learned) == len(made.labels) - len(between)
        assert layout.schema.controls.isdisjoint(between)
        assert set(learned) & layout.schema.controls == set(made.labels) & layout.schema.controls
    export_rows(tmp_path / "ours.jsonl", tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "theirs.jsonl").read_bytes()


@pytest.mark.parametrize("form", ["short", "long"])
def test_a_checkpoint_of_that_layout_answers(layout: Any, form: Any) -> None:
    hits = [Hit(Passage(name, f"{name} in a tin", name), 1 / rank, rank, rank) for rank, name in enumerate("ab", 1)]
    more = {"passages": "static"} if form == "long" else {}
    asks = SelfRagDecode(kind="self_rag", form=form, retrieve="always", max_new_tokens=4, **more)
    [answer] = self_rag(layout, Asked(["what is [Relevant] a?"], [hits]), asks)
    levels = answer.trace["levels"][0]["candidates"] if form == "long" else answer.trace["candidates"]
    assert len(levels) == 2
    behind = [answer.trace["prompt"] + layout.marked_prompt.passage(hit.passage) for hit in hits]
    marks = layout.contexts(behind, marks=layout.schema.marks)
    assert [one["rel"] for one in levels] == pytest.approx(rel(marks.mark_logprobs, missing="error").tolist(), abs=1e-5)
    assert layout.schema.controls.isdisjoint(answer.trace["prompt"])


# ------------------------------------------------------------------------------------------------------- it learns


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


NAMES = "abcdef"


def shown(name: str, place: str, said: str) -> str:
    return f"[Retrieval]<paragraph>{name}\n{name} {place}</paragraph>{said}"


def test_it_learns_from_imported_rows_through_the_command_line(tmp_path: Path) -> None:
    """A vocabulary that was extended learns when to retrieve, for names and not for numbers, which passage to read, the one in
    a tin, and to write whole rows; asked by the command line.
    """
    asked = [(f"who is {n}?", shown(n, "in a tin", f"[Relevant]{n}[Fully supported][Utility:5]")) for n in NAMES]
    others = dict(zip(NAMES, NAMES[1:] + NAMES[0], strict=True))
    asked += [(f"who is {n}?", shown(others[n], "on ice", "[Irrelevant]no[Utility:1]")) for n in NAMES]
    asked += [(f"say {number}", f"[No Retrieval]{number}[Utility:5]") for number in range(12)]
    asked.append(("x", "y"))
    rows = [{"instruction": question, "id": str(n), "output": output} for n, (question, output) in enumerate(asked)]
    (tmp_path / "theirs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = json.loads(run("rows", "import", str(tmp_path / "theirs.jsonl"), "-o", str(tmp_path / "rows.jsonl")))
    assert (told["rows"], told["off_grammar"]) == (25, [25])
    passages = [("c", "c on ice"), ("b", "b in a tin"), ("d", "d on ice")]
    corpus = "".join(json.dumps({"id": text, "title": title, "text": text}) + "\n" for title, text in passages)
    (tmp_path / "corpus.jsonl").write_text(corpus)
    tiny.sentence_encoder(tmp_path / "encoder")
    tiny.self_rag(tmp_path / "llama", extended=False)
    recipe = {
        "name": "marked", "seed": 1,
        "knowledge": {"path": "kb", "documents": "corpus.jsonl", "chunk": None, "indexes": {"dense": {"kind": "dense"}},
                      "encoder": {"model": "encoder/encoder", "dtype": "float32"}},
        "retriever": {"k": 3},
        "generator": {"model": "llama", "dtype": "float32", "vocabulary": "self_rag", "vocabulary_init": "words"},
        "prompt": {"self_rag": {"template": "{instruction}"}},
        "decode": {"kind": "self_rag", "max_new_tokens": 8},
        "data": {"kind": "self_rag", "path": "rows.jsonl", "dev": "rows.jsonl", "passage_max": 16, "max_length": 128},
        "objective": {"kind": "answer", "group_weights": {"retrieve": 2.0}},
        "train": {"bf16": False, "save_strategy": "no", "logging_steps": 5, "weight_decay": 0.0, "max_steps": 50,
                  "per_device_train_batch_size": 12, "learning_rate": 1e-2, "train_sampling_strategy": "random",
                  "eval_strategy": "steps", "eval_steps": 25},
    }  # fmt: skip
    path = tmp_path / "marked.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    run("build", str(path))
    run("train", str(path))
    loaded = load_recipe(path)
    curve = learning_curves(loaded)["answer"]
    held = [entry for entry in curve if "eval_loss" in entry]
    assert held[-1]["eval_loss"] < 0.6 * held[0]["eval_loss"]
    assert held[-1]["eval_accuracy/retrieve"] >= 0.95
    assert held[-1]["eval_accuracy/is_use"] == 1.0
    assert any("loss/is_sup" in entry for entry in curve)
    stage, parts = finished_parts(loaded)[-1]
    told = read_manifest(Path(parts.generator).parent, "stage")["data"]
    assert (stage, told["rows"], told["learned"], told["verbatim"]) == ("answer", 25, 24, 1)
    questions = [*(f"who is {name}?" for name in NAMES), *(f"say {number}" for number in range(12))]
    answers = json.loads(run("answer", str(path), *questions, "--json"))
    assert [answer["trace"]["retrieved"] for answer in answers] == [True] * 6 + [False] * 12
    best = [max(answer["trace"]["candidates"], key=lambda one: one["final"]) for answer in answers[:6]]
    assert [(one["title"], one["chosen"]) for one in best] == [("b", True)] * 6
    tuned = parts.open(loaded).generator
    grammatical = [written(one, tuned.schema, tuned.eos) for answer in answers for one in answer["trace"]["candidates"]]
    assert len(grammatical) == 6 * 3 + 12
    assert sum(grammatical) >= 0.95 * len(grammatical)


def written(candidate: dict[str, Any], schema: Schema, eos: int) -> bool:
    """Whether what stands before a greedy continuation and what it wrote are a whole row of the grammar."""
    try:
        return parse([*candidate["context"], *candidate["ids"]], schema, eos=eos).ended
    except GrammarError:
        return False
