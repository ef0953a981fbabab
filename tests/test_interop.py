"""RAG checkpoints in and out: parity with transformers' own models on the same weights, and every bit back again."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    DPRConfig,
    DPRContextEncoder,
    DPRQuestionEncoder,
    DPRReader,
    RagConfig,
    RagSequenceForGeneration,
    RagTokenForGeneration,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.rag.retrieval_rag import RagRetriever
from typer.testing import CliRunner

import tiny
from raglan.cli import app
from raglan.encoder import Encoder
from raglan.errors import CheckpointError, RecipeError
from raglan.generator import open_generator
from raglan.interop import export_rag, import_rag
from raglan.knowledge import build_knowledge
from raglan.objective import MarginalObjective, MarginalRow
from raglan.rag import RAG
from raglan.recipe import EncoderSettings, GeneratorSettings, PromptSettings, load_recipe
from raglan.recipe import MarginalObjective as MarginalSettings
from raglan.records import Passage
from raglan.stages import Parts
from raglan.vocabulary import save_tokenizer
from raglan.weights import read_tensors

MODELS: dict[str, Any] = {"sequence": RagSequenceForGeneration, "token": RagTokenForGeneration}
QUERIES = ["Who built the Tower?", "when was the lighthouse built?", "what was founded  by the miller?"]
ANSWERS = ["odo", "1790", "a tower by the sea"]
PASSAGES = [
    {"id": "1", "title": "Tower", "text": "The tower was built by Odo Marrack, a miller, in 1831."},
    {"id": "2", "title": '"Lighthouse"', "text": "A lighthouse of the year  1790."},
    {"id": "3", "title": "Mill", "text": "Founded in 1655 by Ada."},
    {"id": "4", "title": "", "text": "No title here."},
]


def dpr_config(**settings: Any) -> DPRConfig:
    shape = {
        "vocab_size": len(tiny.bert_words()), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    return DPRConfig(**{**shape, **settings})


def words_of_pairs() -> Any:
    """As BERT's own tokenizer: lower case, and the second of a pair is of token type 1."""
    words = tiny.bert_tokenizer()
    words.backend_tokenizer.post_processor = tiny.processors.TemplateProcessing(
        single=["[CLS]:0", "$A:0", "[SEP]:0"], pair=["[CLS]:0", "$A:0", "[SEP]:0", "$B:1", "[SEP]:1"],
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )  # fmt: skip
    words.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return words


def checkpoint(
    folder: Path, *, over: str = "sequence", kind: str = "bart", tied: bool = True, projection: int = 0, contexts: bool = False,
    prefix: str | None = None, **settings: Any,
) -> Path:  # fmt: skip
    """A tiny RAG checkpoint with random weights, saved as transformers saves it."""
    torch.manual_seed(7)
    base = {"bart": tiny.bart, "t5": tiny.t5}[kind](folder.parent / f"{folder.name}-{kind}")
    generator = json.loads((base / "config.json").read_text()) | {
        "tie_word_embeddings": tied,
        "kept_below": {"a": [1]},
        "prefix": prefix,
    }
    told = {
        "n_docs": 3, "max_combined_length": 200, "retrieval_vector_size": projection or 32, "kept_above": {"b": "é"},
        "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": generator.get("bos_token_id"),
        "decoder_start_token_id": generator["decoder_start_token_id"],
    }  # fmt: skip
    questions = dpr_config(projection_dim=projection).to_dict()
    model = MODELS[over](RagConfig(question_encoder=questions, generator=generator, **{**told, **settings}))
    sharpen(model.generator)
    if contexts:
        model.set_context_encoder_for_training(DPRContextEncoder(dpr_config(projection_dim=projection)))
    model.save_pretrained(str(folder))
    tiny.bert_tokenizer().save_pretrained(str(folder / "question_encoder_tokenizer"))
    AutoTokenizer.from_pretrained(str(base)).save_pretrained(str(folder / "generator_tokenizer"))
    return folder


def sharpen(generator: Any) -> None:
    """Random weights predict nearly nothing; scaled up they have opinions."""
    with torch.no_grad():
        generator.get_output_embeddings().weight.mul_(20.0)


def as_old_file(folder: Path) -> Path:
    """The same checkpoint as an old pytorch_model.bin, where tied weights stand under all their names, and buffers too."""
    model = RagTokenForGeneration.from_pretrained(str(folder))
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    tensors["rag.question_encoder.question_encoder.bert_model.embeddings.position_ids"] = torch.arange(512)[None]
    tensors["rag.question_encoder.question_encoder.bert_model.pooler.dense.bias"] = torch.randn(32)
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def as_shards(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in files.items():
        save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
    table = {name: file for file, own in files.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    (folder / "model.safetensors").unlink()
    return folder


def system(parts: Path, **changes: Any) -> Path:
    """The recipe of an import with what it says is to be filled in: documents, passage encoder, questions."""
    (parts / "passages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PASSAGES))
    rows = [{"query": query, "answers": [answer]} for query, answer in zip(QUERIES, ANSWERS, strict=True)]
    (parts / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = yaml.safe_load((parts / "recipe.yaml").read_text())
    recipe["knowledge"] |= {"documents": "passages.jsonl", "chunk": None}
    if recipe["knowledge"]["encoder"]["model"] != "passage_encoder":
        recipe["knowledge"]["encoder"]["model"] = "query_encoder"
    for key, value in changes.items():
        recipe[key] = {**recipe[key], **value} if isinstance(recipe.get(key), dict) else value
    path = parts / "system.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def opened(path: Path, *overrides: str) -> RAG:
    recipe = load_recipe(path, overrides)
    build_knowledge(recipe.knowledge)
    return RAG.open(recipe)


def fed(rag: RAG, queries: list[str], k: int) -> dict[str, Tensor]:
    """What transformers' models are given: contexts (B·K,L) with their mask, and doc_scores (B,K)."""
    hits = rag.retriever.retrieve(queries, k)
    prompts = [
        rag.generator.prompt.render(query, [hit.passage]) for query, own in zip(queries, hits, strict=True) for hit in own
    ]
    rows = rag.generator.collate([{"input_ids": list(prompt.ids), "labels": []} for prompt in prompts])
    scores = torch.tensor([[hit.score for hit in own] for own in hits])
    return {"context_input_ids": rows["input_ids"], "context_attention_mask": rows["attention_mask"], "doc_scores": scores}


def their_loss(model: Any, rag: RAG, queries: list[str], answers: list[str], begins: int) -> float:
    """Sum over the batch. They start from one token, so it stands in front of the answers."""
    rows = [[begins, *rag.generator.answer_ids(answer)] for answer in answers]
    labels = torch.tensor([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])
    with torch.no_grad():
        return float(model(**fed(rag, queries, 3), labels=labels, n_docs=3, reduce_loss=True).loss)


def our_loss(rag: RAG, over: str, queries: list[str], answers: list[str]) -> float:
    aim = MarginalObjective(
        rag.retriever,
        rag.generator,
        MarginalSettings(kind="marginal", over=over, k=3, reduction="sum"),  # type: ignore[arg-type]
    )
    rows = [MarginalRow(query, answer) for query, answer in zip(queries, answers, strict=True)]
    with torch.no_grad():
        return float(aim.loss(aim.collate(rows))[0])


def same_tensors(one: Path, other: Path) -> bool:
    first, second = read_tensors(one), read_tensors(other)
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


LAYOUTS = {
    "tied": {}, "untied": {"tied": False}, "projected": {"projection": 16}, "t5": {"kind": "t5"},
    "t5 with a prefix": {"kind": "t5", "prefix": "answer: ", "title_sep": " {x} ", "doc_sep": " ## "},
}  # fmt: skip


@pytest.mark.parametrize("over", ["sequence", "token"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_imported_losses_are_transformers_own(layout: str, over: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "rag", over=over, **LAYOUTS[layout])
    import_rag(source, tmp_path / "parts")
    rag = opened(system(tmp_path / "parts"))
    begins = {"bart": 1, "t5": 0}[rag.generator.model.config.model_type]
    rag.generator.prefix = [begins]  # theirs trains from one token
    model = MODELS[over].from_pretrained(str(source)).eval()
    if over == "sequence" and begins == 0:
        model.config.bos_token_id = 1  # theirs asks for one that T5 has not
    theirs = their_loss(model, rag, QUERIES, ANSWERS, begins)
    assert our_loss(rag, over, QUERIES, ANSWERS) == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("projection", [0, 16])
def test_imported_query_vectors_are_transformers_own(projection: int, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "rag", projection=projection)
    import_rag(source, tmp_path / "parts")
    name = str(tmp_path / "parts" / "query_encoder")
    encoder = Encoder.open(EncoderSettings(model=name, dtype="float32"))
    model = RagSequenceForGeneration.from_pretrained(str(source)).eval()
    words = AutoTokenizer.from_pretrained(str(source), subfolder="question_encoder_tokenizer")
    assert (encoder.similarity, encoder.dimension) == ("dot", projection or 32)
    with torch.no_grad():
        theirs = [model.question_encoder(**words(query, return_tensors="pt"))[0][0].numpy() for query in QUERIES]
    assert np.allclose(encoder.embed_queries(QUERIES), np.stack(theirs), atol=1e-5)


def test_half_precision_is_opened_and_written_back_in_full(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "rag")
    RagSequenceForGeneration.from_pretrained(str(source)).half().save_pretrained(str(source))
    assert json.loads((source / "config.json").read_text())["dtype"] == "float16"
    import_rag(source, tmp_path / "parts")
    rag = opened(system(tmp_path / "parts"))
    assert {p.dtype for p in rag.retriever.encoder.query_tower.parameters()} == {torch.float32}
    export_rag(load_recipe(tmp_path / "parts" / "system.yaml"), Parts(), tmp_path / "out")
    old, new = read_tensors(source), read_tensors(tmp_path / "out")
    assert all(torch.equal(value.float(), new[name]) for name, value in old.items())
    assert next(RagSequenceForGeneration.from_pretrained(str(tmp_path / "out")).parameters()).dtype == torch.float32


@pytest.mark.parametrize("over", ["sequence", "token"])
@pytest.mark.parametrize("layout", ["tied", "untied", "projected", "t5"])
def test_out_again_transformers_says_the_same(layout: str, over: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "rag", over=over, **LAYOUTS[layout])
    import_rag(source, tmp_path / "parts")
    recipe = load_recipe(system(tmp_path / "parts"))
    export_rag(recipe, Parts(), tmp_path / "out")
    rag = opened(tmp_path / "parts" / "system.yaml")
    before, after = (MODELS[over].from_pretrained(str(folder)).eval() for folder in (source, tmp_path / "out"))
    begins = {"bart": 1, "t5": 0}[rag.generator.model.config.model_type]
    for model in (before, after):
        if over == "sequence" and begins == 0:
            model.config.bos_token_id = 1
    losses = [their_loss(model, rag, QUERIES, ANSWERS, begins) for model in (before, after)]
    assert losses[0] == losses[1]
    how = {"n_docs": 3, "num_beams": 1, "min_length": 6, "max_length": 8}
    with torch.no_grad():
        written = [model.generate(**fed(rag, QUERIES, 3), **how) for model in (before, after)]
    assert written[0].shape[1] >= 6
    assert torch.equal(*written)
    assert same_tensors(source, tmp_path / "out")
    assert json.loads((source / "config.json").read_text()) == json.loads((tmp_path / "out" / "config.json").read_text())
    import_rag(tmp_path / "out", tmp_path / "again")
    for part in ("query_encoder", "generator"):
        assert same_tensors(tmp_path / "parts" / part, tmp_path / "again" / part)
    for subfolder in ("question_encoder_tokenizer", "generator_tokenizer"):
        one, other = (AutoTokenizer.from_pretrained(str(f), subfolder=subfolder) for f in (source, tmp_path / "out"))
        assert all(one(text)["input_ids"] == other(text)["input_ids"] for text in [*QUERIES, PASSAGES[0]["text"]])


@pytest.mark.parametrize("tied", [True, False])
def test_an_old_file_gives_the_same_parts(tied: bool, tmp_path: Path) -> None:
    checkpoint(tmp_path / "rag", tied=tied, over="token")
    import_rag(tmp_path / "rag", tmp_path / "new")
    import_rag(as_old_file(tmp_path / "rag"), tmp_path / "old")
    for part in ("query_encoder", "generator"):
        assert same_tensors(tmp_path / "new" / part, tmp_path / "old" / part)


def test_shards_give_the_same_parts(tmp_path: Path) -> None:
    checkpoint(tmp_path / "rag")
    import_rag(tmp_path / "rag", tmp_path / "new")
    import_rag(as_shards(tmp_path / "rag"), tmp_path / "shards")
    for part in ("query_encoder", "generator"):
        assert same_tensors(tmp_path / "new" / part, tmp_path / "shards" / part)


def aged(folder: Path) -> Path:
    """config.json as transformers 3 wrote it: generation settings and retired fields inside the parts, tuples returned."""
    common = {
        "_num_labels": 3, "bad_words_ids": None, "early_stopping": False, "length_penalty": 1.0, "max_length": 20,
        "num_beams": 2, "num_return_sequences": 1, "pruned_heads": {}, "return_dict": False,
        "task_specific_params": {"x": {"num_beams": 4}},
        "temperature": 1.0, "top_k": 50, "top_p": 1.0, "torchscript": False, "use_bfloat16": False, "xla_device": None,
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    own = {
        "architectures": ["BartModel", "BartForMaskedLM"],
        "extra_pos_embeddings": 2,
        "prefix": " ",
        "add_bias_logits": False,
    }
    config["generator"] |= {**common, **own}
    config["question_encoder"] |= {**common, "gradient_checkpointing": False, "architectures": ["DPRQuestionEncoder"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink(missing_ok=True)
    return as_old_file(folder)


def test_a_checkpoint_of_2020_is_opened_and_its_config_comes_back_whole(tmp_path: Path) -> None:
    source = aged(checkpoint(tmp_path / "rag", over="token"))
    import_rag(source, tmp_path / "parts")
    rag = opened(system(tmp_path / "parts"))
    rag.generator.prefix = [1]
    config = RagConfig.from_pretrained(str(source))
    config.generator.return_dict = config.question_encoder.return_dict = True  # or transformers 5 cannot use it either
    theirs = their_loss(RagTokenForGeneration.from_pretrained(str(source), config=config).eval(), rag, QUERIES, ANSWERS, 1)
    assert our_loss(rag, "token", QUERIES, ANSWERS) == pytest.approx(theirs, rel=1e-5)
    assert len(rag.answer(QUERIES)) == 3
    export_rag(load_recipe(tmp_path / "parts" / "system.yaml"), Parts(), tmp_path / "out")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    for part in ("generator", "question_encoder"):
        assert (before[part].pop("return_dict"), after[part].pop("return_dict")) == (False, True)
    assert before == after
    again = RagTokenForGeneration.from_pretrained(str(tmp_path / "out")).eval()
    assert their_loss(again, rag, QUERIES, ANSWERS, 1) == theirs


class Burglar:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_is_unpickled(zipped: bool, tmp_path: Path) -> None:
    folder, mark = as_old_file(checkpoint(tmp_path / "rag")), tmp_path / "broken-in"
    state = {**torch.load(folder / "pytorch_model.bin", weights_only=True), "x": Burglar(mark)}
    if zipped:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Burglar(mark)))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        import_rag(folder, tmp_path / "parts")
    assert not mark.exists()
    assert not (tmp_path / "parts").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False) if zipped else pickle.loads(pickle.dumps(Burglar(mark)))
    assert mark.is_dir(), "the trap was none"


def test_an_end_to_end_run_keeps_its_passage_encoder(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "rag", contexts=True, projection=16)
    import_rag(source, tmp_path / "parts")
    rag = opened(system(tmp_path / "parts"))
    assert rag.retriever.encoder.pairs
    model = RagSequenceForGeneration(RagConfig.from_pretrained(str(source)))
    model.set_context_encoder_for_training(DPRContextEncoder(dpr_config(projection_dim=16)))
    model.load_state_dict(load_file(source / "model.safetensors"), strict=False)
    words = tiny.bert_tokenizer()
    with torch.no_grad():
        theirs = model.rag.ctx_encoder.eval()(**words(PASSAGES[0]["title"], PASSAGES[0]["text"], return_tensors="pt"))
    assert np.allclose(rag.retriever.base.vectors.vectors(np.array([0])), theirs.pooler_output.numpy(), atol=1e-5)
    export_rag(load_recipe(tmp_path / "parts" / "system.yaml"), Parts(), tmp_path / "out")
    assert same_tensors(source, tmp_path / "out")


def test_tuned_through_the_command_line_and_out_again(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "rag", over="token")
    runner = CliRunner()
    done = runner.invoke(app, ["checkpoint", "import", str(source), "-o", str(tmp_path / "parts")])
    assert done.exit_code == 0, done.output
    path = system(tmp_path / "parts", train={"learning_rate": 1e-3, "max_steps": 3, "save_strategy": "no", "bf16": False})
    assert runner.invoke(app, ["build", str(path)]).exit_code == 0
    done = runner.invoke(app, ["train", str(path)])
    assert done.exit_code == 0, done.output
    done = runner.invoke(app, ["checkpoint", "export", str(path), "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    model = RagTokenForGeneration.from_pretrained(str(tmp_path / "out")).eval()
    old, new = read_tensors(source), read_tensors(tmp_path / "out")
    assert old.keys() == new.keys()
    moved = {name.split(".")[1] for name in old if not torch.equal(old[name], new[name])}
    assert moved == {"question_encoder", "generator"}
    rag = opened(path)
    tuned = next((load_recipe(path).run / "stages").iterdir()) / "result"
    rag = Parts(str(tuned / "generator"), tuned / "query_encoder").open(load_recipe(path))
    with torch.no_grad():
        theirs = model.generate(**fed(rag, QUERIES, 3), n_docs=3, num_beams=1, min_length=6, max_length=8)
    rag.decode = rag.decode.model_copy(update={"max_new_tokens": 6, "min_new_tokens": 4})
    for row, answer in zip(theirs.tolist(), rag.answer(QUERIES, k=3), strict=True):
        assert row[:2] == rag.generator.prefix, "they begin where it was tuned to begin"
        end = next((place for place, token in enumerate(row[2:], 3) if token == 2), len(row))
        assert tuple(row[2:end]) == answer.ids
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["kept_above"], config["generator"]["kept_below"]) == ({"b": "é"}, {"a": [1]})
    again = runner.invoke(app, ["checkpoint", "export", str(path), "-o", str(tmp_path / "untuned"), "--untuned"])
    assert again.exit_code == 0, again.output
    assert same_tensors(source, tmp_path / "untuned")


def test_a_tuned_passage_encoder_stays_a_dpr_and_goes_out_too(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "rag", contexts=True)
    import_rag(source, tmp_path / "parts")
    objective = {"learn": ["query_encoder", "passage_encoder", "generator"], "staleness": {"kind": "rerank", "pool": 4}}
    training = {"learning_rate": 1e-3, "max_steps": 2, "save_strategy": "no", "bf16": False}
    path = system(tmp_path / "parts", train=training, objective=objective)
    runner = CliRunner()
    for command in ("build", "train"):
        done = runner.invoke(app, [command, str(path)])
        assert done.exit_code == 0, done.output
    tuned = next((load_recipe(path).run / "stages").iterdir()) / "result"
    parts = Parts(str(tuned / "generator"), tuned / "query_encoder", tuned / "passage_encoder", tuned / "knowledge")
    rag = parts.open(load_recipe(path))
    assert rag.retriever.encoder.pairs
    done = runner.invoke(app, ["checkpoint", "export", str(path), "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    old, new = read_tensors(source), read_tensors(tmp_path / "out")
    assert old.keys() == new.keys()
    moved = {name.split(".")[1] for name in old if not torch.equal(old[name], new[name])}
    assert moved == {"question_encoder", "ctx_encoder", "generator"}
    model = DPRContextEncoder.from_pretrained(str(tuned / "passage_encoder")).eval()
    row = tiny.bert_tokenizer()(PASSAGES[0]["title"], PASSAGES[0]["text"], return_tensors="pt")
    with torch.no_grad():
        theirs = model(**row).pooler_output.numpy()
    assert np.allclose(rag.retriever.base.vectors.vectors(np.array([0])), theirs, atol=1e-5)


def other_system(tmp_path: Path, **changes: Any) -> Path:
    """A system that no checkpoint was imported for: a DPR pair and a BART."""
    if not (tmp_path / "ctx").is_dir():
        torch.manual_seed(1)
        for kind, name in ((DPRContextEncoder, "ctx"), (DPRQuestionEncoder, "questions")):
            kind(dpr_config()).save_pretrained(str(tmp_path / name))
            words_of_pairs().save_pretrained(str(tmp_path / name))
    if not (tmp_path / "bart").is_dir():
        tiny.bart(tmp_path / "bart")
        (tmp_path / "passages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PASSAGES))
    tree: dict[str, Any] = {
        "name": "own",
        "knowledge": {
            "path": "kb", "documents": "passages.jsonl", "chunk": None, "indexes": {"dense": {"kind": "dense"}},
            "encoder": {"model": "ctx", "query_model": "questions", "dtype": "float32"},
        },
        "retriever": {"k": 3}, "generator": {"model": "bart", "dtype": "float32"}, "decode": {"kind": "rag_token"},
        "prompt": {"template": "{passages} // {question}", "max_tokens": 200},
    }  # fmt: skip
    for key, value in changes.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))  # stages have an order
    return path


def test_a_system_of_fitting_parts_becomes_a_checkpoint(tmp_path: Path) -> None:
    path = other_system(tmp_path)
    rag = opened(path)
    export_rag(load_recipe(path), Parts(), tmp_path / "out")
    model = RagTokenForGeneration.from_pretrained(str(tmp_path / "out")).eval()
    sharpen(model.generator)
    sharpen(rag.generator.model)
    assert (model.config.n_docs, model.config.max_combined_length, model.config.retrieval_vector_size) == (3, 200, 32)
    with torch.no_grad():
        theirs = model.generate(**fed(rag, QUERIES, 3), n_docs=3, num_beams=1, min_length=6, max_length=8)
    rag.decode = rag.decode.model_copy(update={"max_new_tokens": 6, "min_new_tokens": 4})
    for row, answer in zip(theirs.tolist(), rag.answer(QUERIES), strict=True):
        end = next((place for place, token in enumerate(row[2:], 3) if token == 2), len(row))
        assert tuple(row[2:end]) == answer.ids
    import_rag(tmp_path / "out", tmp_path / "parts")
    assert same_tensors(tmp_path / "bart", tmp_path / "parts" / "generator")


def test_the_method_is_that_of_the_last_stage_that_was_trained(tmp_path: Path) -> None:
    data = {"kind": "questions", "path": "q.jsonl"}
    stages = {
        over: {"data": data, "objective": {"kind": "marginal", "over": over, "label_smoothing": smoothing}}
        for over, smoothing in (("token", 0.05), ("sequence", 0.2))
    }
    path = other_system(tmp_path, stages=stages)
    for trained, over, smoothing in (
        (["untuned"], "Token", 0.0),
        (["untuned", "token"], "Token", 0.05),
        (None, "Sequence", 0.2),
    ):
        out = tmp_path / f"out-{over}-{smoothing}"
        export_rag(load_recipe(path), Parts(), out, trained=trained)
        config = json.loads((out / "config.json").read_text())
        assert (config["architectures"], config["label_smoothing"]) == ([f"Rag{over}ForGeneration"], smoothing)
    done = CliRunner().invoke(app, ["checkpoint", "export", str(path), "-o", str(tmp_path / "cli")])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "cli" / "config.json").read_text())["architectures"] == ["RagTokenForGeneration"]


@pytest.mark.parametrize("legacy", [True, False])
def test_a_llama_tokenizer_goes_out_with_its_blanks(legacy: bool, tmp_path: Path) -> None:
    """T5 models with a Llama tokenizer are published; transformers 5 forgets `legacy` when it saves one."""
    path = other_system(tmp_path, generator={"model": "t5", "dtype": "float32"})
    words = tiny.llama_tokenizer(legacy=legacy)
    words.pad_token = "<unk>"
    tiny.t5(tmp_path / "t5")
    config = json.loads((tmp_path / "t5" / "config.json").read_text())
    T5ForConditionalGeneration(T5Config(**{**config, "vocab_size": len(words)})).save_pretrained(str(tmp_path / "t5"))
    (tmp_path / "t5" / "tokenizer.json").unlink()
    save_tokenizer(words, tmp_path / "t5")
    text = "the tin</s>the inn"
    before = AutoTokenizer.from_pretrained(str(tmp_path / "t5"))(text)["input_ids"]
    assert before == words(text)["input_ids"]
    opened(path)
    export_rag(load_recipe(path), Parts(), tmp_path / "out")
    after = AutoTokenizer.from_pretrained(str(tmp_path / "out" / "generator_tokenizer"))
    assert after(text)["input_ids"] == before
    assert after.legacy == legacy


def test_an_adapter_is_merged(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    path = other_system(tmp_path)
    settings = GeneratorSettings(model=str(tmp_path / "bart"), dtype="float32")
    plain = open_generator(settings, load_recipe(path).prompt)
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    tuned = open_generator(settings.model_copy(update={"lora": lora}), load_recipe(path).prompt)
    for name, parameter in tuned.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    tuned.save(tmp_path / "adapter")
    export_rag(load_recipe(path), Parts(str(tmp_path / "adapter")), tmp_path / "out")
    model = RagTokenForGeneration.from_pretrained(str(tmp_path / "out")).eval()
    ids = {"input_ids": torch.arange(5, 25)[None], "decoder_input_ids": torch.tensor([[2, 1, 9]])}
    with torch.no_grad():
        with_it, without_it, theirs = (m(**ids).logits for m in (tuned.model, plain.model, model.generator))
    assert torch.allclose(with_it, theirs, atol=1e-5)
    assert not torch.allclose(without_it, theirs, atol=1e-3)


MISFITS = {
    "mean pooling": ({"knowledge": {"encoder": {"model": "mean/encoder"}}}, "pools by mean"),
    "cosine": ({"knowledge": {"encoder": {"model": "mean/encoder"}}}, "compares by cosine"),
    "query prompt": ({"knowledge": {"encoder": {"model": "ctx", "query_prompt": "query: "}}}, "prompt before queries"),
    "causal": ({"generator": {"model": "llama"}}, "its model is 'llama'"),
    "template": ({"prompt": {"template": "{question} {passages}"}}, "prompt: transformers writes"),
    "number": ({"prompt": {"template": "{passages} // {question}", "passage": "{number} {title} / {text}"}}, "prompt: transf"),
    "answer": ({"prompt": {"template": "{passages} // {question}\nAnswer: "}}, "prompt: transformers writes"),
    "concat": ({"decode": {"kind": "concat"}}, "decode.kind is 'concat'"),
    "temperature": ({"retriever": {"prior": {"temperature": 0.05}}}, "retriever.prior"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_the_layout_cannot_express_is_named(case: str, tmp_path: Path) -> None:
    changes, message = MISFITS[case]
    tiny.sentence_encoder(tmp_path / "mean")
    tiny.llama(tmp_path / "llama")
    path = other_system(tmp_path, **changes)
    tree = yaml.safe_load(path.read_text())
    tree["knowledge"] |= {"path": "kb", "documents": "passages.jsonl"}
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(CheckpointError) as fault:
        export_rag(load_recipe(path), Parts(), tmp_path / "out")
    assert message in fault.value.message
    assert fault.value.hint
    assert not (tmp_path / "out").exists()


def spoiled(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def lose(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


BREAKS = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "another type": (lambda f: spoiled(f, model_type="bart"), "'bart', not 'rag'"),
    "no method": (lambda f: spoiled(f, architectures=["RagModel"]), "RagModel"),
    "another question encoder": (lambda f: spoiled(f, question_encoder={"model_type": "bert"}), "encoder of type 'bert'"),
    "another generator": (lambda f: spoiled(f, generator={"model_type": "led"}), "generator of type 'led'"),
    "another size": (lambda f: spoiled(f, retrieval_vector_size=768), "gives 32 numbers, but retrieval_vector_size is 768"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "damaged weights": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "cannot be read"),
    "a question weight": (
        lambda f: lose(f, "rag.question_encoder.question_encoder.bert_model.embeddings.LayerNorm.weight"),
        "lacks 1 weights of its DPR encoder",
    ),
    "the embeddings": (lambda f: lose(f, "rag.generator.model.shared.weight"), "rag.generator."),
    "no question tokenizer": (lambda f: shutil.rmtree(f / "question_encoder_tokenizer"), "question_encoder_tokenizer holds no"),
    "no generator tokenizer": (lambda f: shutil.rmtree(f / "generator_tokenizer"), "generator_tokenizer holds no tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("case", BREAKS)
def test_a_folder_that_is_not_whole_is_named(case: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "rag")
    harm, message = BREAKS[case]
    harm(source)
    with pytest.raises(CheckpointError) as fault:
        import_rag(source, tmp_path / "parts")
    assert message in fault.value.message
    assert fault.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rag", "rag-bart"]


def test_what_is_there_is_not_written_over(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "rag")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "work.txt").write_text("a year")
    with pytest.raises(CheckpointError, match="is there already"):
        import_rag(source, tmp_path / "mine")
    assert (tmp_path / "mine" / "work.txt").read_text() == "a year"


@pytest.mark.parametrize("projection", [0, 16])
def test_dpr_folders_are_encoders(projection: int, tmp_path: Path) -> None:
    torch.manual_seed(2)
    models: dict[str, Any] = {"ctx": DPRContextEncoder, "questions": DPRQuestionEncoder}
    for name, kind in models.items():
        models[name] = kind(dpr_config(projection_dim=projection)).eval()
        models[name].save_pretrained(str(tmp_path / name))
        words_of_pairs().save_pretrained(str(tmp_path / name))
    settings = EncoderSettings(model=str(tmp_path / "ctx"), query_model=str(tmp_path / "questions"), dtype="float32")
    encoder = Encoder.open(settings)
    assert (encoder.pairs, encoder.similarity, encoder.dimension) == (True, "dot", projection or 32)
    assert Encoder.open(settings).passage_fingerprint == encoder.passage_fingerprint
    words = words_of_pairs()
    pairs = [(row["title"], row["text"]) for row in PASSAGES[:3]]
    with torch.no_grad():
        rows = [words(*pair, return_tensors="pt") for pair in pairs]
        assert all(1 in row["token_type_ids"] for row in rows)
        passages = [models["ctx"](row["input_ids"]).pooler_output[0].numpy() for row in rows]  # as DPR was trained
        alone = models["ctx"](words("No title here.", return_tensors="pt")["input_ids"]).pooler_output[0].numpy()
        asked = [models["questions"](**words(query, return_tensors="pt")).pooler_output[0].numpy() for query in QUERIES]
    assert np.allclose(encoder.embed_passages(pairs), np.stack(passages), atol=1e-5)
    assert np.allclose(encoder.embed_queries(QUERIES), np.stack(asked), atol=1e-5)
    assert np.allclose(encoder.forward(encoder.features(QUERIES)).detach(), np.stack(asked), atol=1e-5)
    rag = opened(other_system(tmp_path))
    assert np.allclose(rag.retriever.base.vectors.vectors(np.arange(4)), np.stack([*passages, alone]), atol=1e-5)
    plain = tmp_path / "joined"
    shutil.copytree(tmp_path / "ctx", plain)
    encoder.passage_tower.save(str(plain), create_model_card=False)
    assert Encoder.open(EncoderSettings(model=str(plain))).passage_fingerprint != encoder.passage_fingerprint


def test_a_tuned_dpr_query_encoder_is_opened_again(tmp_path: Path) -> None:
    rag = opened(other_system(tmp_path))
    encoder = rag.retriever.encoder
    encoder.save_query_tower(tmp_path / "tuned")
    again = Encoder.open(encoder.settings, query_encoder=tmp_path / "tuned")
    assert np.array_equal(again.embed_queries(QUERIES), encoder.embed_queries(QUERIES))


def test_a_dpr_reader_is_no_encoder(tmp_path: Path) -> None:
    DPRReader(dpr_config()).save_pretrained(str(tmp_path / "reader"))
    tiny.bert_tokenizer().save_pretrained(str(tmp_path / "reader"))
    with pytest.raises(CheckpointError, match="no DPR encoder"):
        Encoder.open(EncoderSettings(model=str(tmp_path / "reader")))


@pytest.mark.parametrize("prefix", ["", "answer:  "])
def test_query_decoded_is_what_transformers_feeds(prefix: str, tmp_path: Path) -> None:
    template = f"{prefix}{{passages}} // {{question}}"
    settings = PromptSettings(template=template, question_form="query_decoded", max_tokens=300)
    generator = open_generator(GeneratorSettings(model=str(tiny.bart(tmp_path / "bart"))), settings)
    words = generator.prompt.question_tokenizer = tiny.bert_tokenizer()
    ours = [generator.prompt.render(query, [Passage(**row)]).ids for query in QUERIES for row in PASSAGES]
    config = SimpleNamespace(title_sep=" / ", doc_sep=" // ", max_combined_length=300)
    theirs = SimpleNamespace(config=config, generator_tokenizer=generator.tokenizer)
    found = {key: [[row[key] for row in PASSAGES]] * len(QUERIES) for key in ("title", "text")}
    docs = [{key: values[n] for key, values in found.items()} for n in range(len(QUERIES))]
    asked = words.decode(words(QUERIES)["input_ids"], skip_special_tokens=True)
    ids, mask = RagRetriever.postprocess_docs(theirs, docs, asked, prefix, len(PASSAGES))
    kept = [tuple(t for t, m in zip(row, on, strict=True) if m) for row, on in zip(ids, mask, strict=True)]
    assert ours == kept
    written = settings.model_copy(update={"question_form": "as_written"})
    generator.prompt.settings = written
    assert generator.prompt.render(QUERIES[0], [Passage(**PASSAGES[0])]).ids != kept[0]


def test_query_decoded_without_a_query_encoder_is_refused(tmp_path: Path) -> None:
    settings = PromptSettings(question_form="query_decoded")
    generator = open_generator(GeneratorSettings(model=str(tiny.bart(tmp_path / "bart"))), settings)
    with pytest.raises(RecipeError, match="no query encoder"):
        generator.prompt.render("who?", [])
