"""A checkpoint as those of 2023 were published: tokenizer.model, added_tokens.json and .bin shards, and nothing else.

It is compared with SentencePiece itself, text by text: a slow tokenizer cut a row at control tokens and gave it the rest.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import tiny
from raglan.decode import Asked, self_rag
from raglan.errors import CheckpointError, MissingExtra
from raglan.generator import HFGenerator, open_generator
from raglan.generator.server import local_tokenizer
from raglan.recipe import GeneratorSettings, PromptSettings, SelfRagDecode
from raglan.records import Passage
from raglan.reflection import Schema
from raglan.vocabulary import open_tokenizer, save_tokenizer
from test_cli import run

BASE = 32_000  # pieces of Llama-2; the first reflection token comes behind them
NAMES = [*Schema.numbered(0).spellings, "<pad>"]
CONFIG = {
    "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False, "pad_token": None,
    "model_max_length": 1000000000000000019884624838656, "sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
}  # fmt: skip
TEXTS = [
    "the tower", "a mill in the north", "in", "x", "Odo Marrack, a miller", "the the the", "  two blanks", "ends with one ",
    "a line\nand another", "1831", "(the inn)", "thin", "\n", "é and 中", "[Relevant] as letters?", "th", ".", "the\tmill",
    "</p>", "what is in the inn, then?",
]  # fmt: skip

sentencepiece = pytest.mark.skipif(
    importlib.util.find_spec("sentencepiece") is None, reason="sentencepiece is not installed: pip install 'raglan[llama]'"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, sure of what it writes, laid out as the published 7B is."""
    made, plain = tmp_path_factory.mktemp("published"), tmp_path_factory.mktemp("plain")
    tiny.sure_self_rag(plain, base=BASE, likes=("is_sup", "is_use", "eos"))
    model = LlamaForCausalLM.from_pretrained(str(plain))
    model.config.save_pretrained(str(made))
    write_shards(made, model)
    write_pieces(made)
    words = {name: BASE + number for number, name in enumerate(NAMES)}
    (made / "added_tokens.json").write_text(json.dumps(words))
    special = {"additional_special_tokens": NAMES[:-1], "pad_token": "<pad>"}
    (made / "special_tokens_map.json").write_text(json.dumps({**special, **{k: CONFIG[k] for k in CONFIG if k[:3] in SPECIAL}}))
    (made / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    return made


SPECIAL = {"bos", "eos", "unk"}


def write_shards(folder: Path, model: Any, *, count: int = 3) -> None:
    """Pickled tensors with their index; one of them is a buffer that models had then and have no more."""
    tensors = {**model.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    files = {name: f"pytorch_model-{1 + number % count:05d}-of-{count:05d}.bin" for number, name in enumerate(tensors)}
    for file in set(files.values()):
        torch.save({name: tensors[name].clone() for name in tensors if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def write_pieces(folder: Path) -> None:
    """`tiny.llama_tokenizer`'s pieces in SentencePiece's format: merged in the order of their scores, bytes behind letters."""
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    made = proto.ModelProto()
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    vocabulary = tiny.llama_tokenizer(base=BASE).get_vocab()
    for place, piece in enumerate(sorted(vocabulary, key=vocabulary.__getitem__)):
        made.pieces.add(piece=piece, score=-float(place), type=6 if piece.startswith("<0x") else kinds.get(piece, 1))
    told, form = made.trainer_spec, made.normalizer_spec
    told.model_type, told.byte_fallback, told.pad_id = 2, True, -1
    told.unk_id, told.bos_id, told.eos_id = 0, 1, 2
    form.name, form.add_dummy_prefix, form.remove_extra_whitespaces = "identity", True, False
    (folder / "tokenizer.model").write_bytes(made.SerializeToString())


@pytest.fixture(scope="module")
def generator(folder: Path) -> HFGenerator:
    return open_generator(GeneratorSettings(model=str(folder), dtype="float32"), PromptSettings())


def pieces(folder: Path, text: str) -> list[int]:
    import sentencepiece

    return list(sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode(text))


@sentencepiece
def test_its_ids_are_the_published_ones(folder: Path, generator: HFGenerator) -> None:
    assert generator.schema == Schema.numbered(BASE)
    assert generator.schema.marks[0] == 32_000
    assert generator.pad == 32_015
    assert (generator.eos, generator.tokenizer.bos_token_id) == (2, 1)
    assert not {one.suffix for one in folder.iterdir()} & {".safetensors"}
    assert not (folder / "tokenizer.json").exists()


@sentencepiece
@pytest.mark.parametrize("text", TEXTS)
def test_passages_and_questions_have_sentencepieces_ids(folder: Path, generator: HFGenerator, text: str) -> None:
    schema, prompt = generator.schema, generator.marked_prompt
    expected = [schema.yes, schema.opens, *pieces(folder, f"t\n{text}"), schema.closes]
    assert prompt.passage(Passage("p", text, "t")) == expected
    assert prompt.question(text) == [1, *pieces(folder, f"### Instruction:\n{text}\n\n### Response:\n")]


@sentencepiece
@pytest.mark.parametrize("legacy", [None, True, False])
def test_what_is_not_said_is_as_it_was_written(folder: Path, tmp_path: Path, legacy: bool | None) -> None:
    """`legacy: null` is nothing said. Where a folder says false, no blank comes behind a control token."""
    for name in ("tokenizer.model", "added_tokens.json", "special_tokens_map.json", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**CONFIG, "legacy": legacy}))
    words = local_tokenizer(str(tmp_path), field="generator")
    spelt = words.tokenize("[Relevant]the inn")
    assert spelt[1:] == (["th", "e", "▁in", "n"] if legacy is False else ["▁the", "▁in", "n"])
    save_tokenizer(words, tmp_path / "saved")  # as raglan writes what it has trained: tokenizer.json, no tokenizer.model
    assert open_tokenizer(str(tmp_path / "saved")).tokenize("[Relevant]the inn") == spelt


@sentencepiece
def test_it_answers_by_the_command_line(
    folder: Path, generator: HFGenerator, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.asks(tmp_path, generator=folder, decode="retrieve: always, max_new_tokens: 6")
    assert run("build", str(recipe), capsys=capsys, monkeypatch=monkeypatch)[0] == 0
    code, out, _ = run("answer", str(recipe), "who built the mill?", "--json", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0
    told = json.loads(out)[0]["trace"]
    hits = tiny.hits("a", "b")
    own = self_rag(generator, Asked(["who built the mill?"], [hits]), SelfRagDecode(kind="self_rag", max_new_tokens=6))[0]
    assert own.trace is not None
    assert told["decisions"][0]["r"] == pytest.approx(own.trace["decisions"][0]["r"], abs=1e-6)
    assert len(told["candidates"]) == 2


@sentencepiece
def test_a_shard_that_holds_more_than_tensors_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({"model.norm.weight": Runs(tmp_path / "ran")}, tmp_path / "pytorch_model-00002-of-00003.bin")
    with pytest.raises(CheckpointError, match="cannot be loaded: Weights only load failed"):
        open_generator(GeneratorSettings(model=str(tmp_path)), PromptSettings())
    assert not (tmp_path / "ran").exists()


class Runs:
    """Code in a pickle."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("library", ["sentencepiece", "google.protobuf"])
def test_without_the_library_the_extra_is_named(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any weight is read, and not as a fault of the reader that transformers tries next."""
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if library != "sentencepiece":
        pytest.importorskip("sentencepiece")
    monkeypatch.setitem(sys.modules, library, None)
    for opens in (
        lambda: open_generator(GeneratorSettings(model=str(tmp_path)), PromptSettings()),
        lambda: local_tokenizer(str(tmp_path), field="generator"),
    ):
        with pytest.raises(MissingExtra, match=f"`{library}` is needed to read the tokenizer.model of") as fault:
            opens()
        assert fault.value.hint == "pip install 'raglan[llama]'"
