"""Reflection tokens in a vocabulary: added, checked, kept by saving and loading, learned by LoRA on both sides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from raglan.errors import CheckpointError, GeneratorError
from raglan.generator import HFGenerator, open_generator
from raglan.objective import AnswerObjective
from raglan.recipe import GeneratorSettings, PromptSettings
from raglan.records import Passage
from raglan.reflection import Schema
from raglan.vocabulary import extend_vocabulary, new_rows

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vocabulary")
    return {
        "plain": tiny.self_rag(folder / "plain", extended=False),
        "tied": tiny.self_rag(folder / "tied", extended=False, tied=True),
        "published": tiny.self_rag(folder / "published"),
        "ordinary": tiny.self_rag(folder / "ordinary", special=False),
    }


def opened(folder: Path | str, **settings: Any) -> HFGenerator:
    return open_generator(GeneratorSettings(model=str(folder), dtype="float32", **settings), PromptSettings())


def loaded(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["published", "ordinary"])
def test_a_published_folder_is_read_as_it_is(folders: dict[str, Path], kind: str) -> None:
    base = len(tiny.llama_tokenizer())
    found = opened(folders[kind], vocabulary="self_rag")
    assert found.schema == Schema.numbered(base)
    assert len(found.model.get_input_embeddings().weight) == base + 16 == len(found.tokenizer)
    assert torch.equal(found.model.lm_head.weight, loaded(folders[kind])[0].lm_head.weight)


@pytest.mark.parametrize("kind", ["plain", "tied"])
def test_extension_appends_rows_in_the_published_order(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    before, _ = loaded(folders[kind])
    found = opened(folders[kind], vocabulary="self_rag")
    base = len(before.lm_head.weight)
    assert found.schema == Schema.numbered(base)
    assert found.tokenizer.convert_tokens_to_ids("<pad>") == base + 15
    assert found.model.config.vocab_size == base + 16
    for name in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(before, name)().weight, getattr(found.model, name)().weight
        assert len(new) == base + 16
        assert torch.equal(new[:base], old)
        assert torch.allclose(new[base:], old.mean(0).expand(16, -1), atol=1e-6)
    tied = found.model.get_input_embeddings().weight is found.model.get_output_embeddings().weight
    assert tied == (kind == "tied")
    found.save(tmp_path / "saved")
    again = opened(tmp_path / "saved")
    assert again.schema == found.schema
    assert again.fingerprint == found.fingerprint


def test_words_and_random_rows(folders: dict[str, Path]) -> None:
    model, words = loaded(folders["plain"])
    schema = extend_vocabulary(model, words, init="words")
    ids = words("this passage is relevant", add_special_tokens=False)["input_ids"]
    for matrix in (model.get_input_embeddings().weight, model.lm_head.weight):
        assert torch.allclose(matrix[schema.relevant], matrix[ids].mean(0), atol=1e-6)
    drawn = [extend_vocabulary(*(pair := loaded(folders["plain"])), init="random") and pair[0] for _ in range(2)]
    rows = [model.lm_head.weight[schema.no :] for model in drawn]
    assert torch.equal(*rows)
    assert len(rows[0].unique(dim=0)) == 15 + 1
    assert 0.5 < float(rows[0][:15].std() / drawn[0].config.initializer_range) < 2


def test_spare_rows_are_cut_so_that_none_can_win(folders: dict[str, Path], tmp_path: Path) -> None:
    """Checkpoints that were rounded up have rows of no token; the likeliest of them would be written."""
    for name in ("plain", "published"):
        model, words = loaded(folders[name])
        needed = len(words) + (16 if name == "plain" else 0)
        model.resize_token_embeddings(needed + 48, mean_resizing=False)
        with torch.no_grad():
            model.lm_head.weight[needed + 3] = 100 * torch.ones(32)
            model.model.norm.weight.abs_()
        model.save_pretrained(tmp_path / name)
        words.save_pretrained(tmp_path / name)
        found = opened(tmp_path / name, vocabulary="self_rag")
        assert found.head_logits(torch.randn(4, 32)).shape == (4, needed)
        assert len(found.model.get_input_embeddings().weight) == len(found.tokenizer) == needed


def test_faults_say_what_is_missing(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no token of their own") as fault:
        assert opened(folders["plain"]).schema
    assert "vocabulary: self_rag" in str(fault.value)
    with pytest.raises(GeneratorError, match="no causal language model"):
        opened(tiny.t5(tmp_path / "t5"), vocabulary="self_rag")
    model, words = loaded(folders["plain"])
    words.add_special_tokens({"extra_special_tokens": ["[Relevant]"]})
    model.resize_token_embeddings(len(words))
    model.save_pretrained(tmp_path / "some")
    words.save_pretrained(tmp_path / "some")
    with pytest.raises(CheckpointError, match=r"no token of their own: \[No Retrieval\]"):
        opened(tmp_path / "some", vocabulary="self_rag")


# -------------------------------------------------------------------------------------------------------------- LoRA


def row(generator: HFGenerator) -> dict[str, list[int]]:
    schema = generator.schema
    controls = sorted(schema.controls)
    return {"input_ids": generator.marked_prompt.question("the tin"), "labels": [*controls, *controls[::-1], generator.eos]}


@pytest.mark.parametrize("kind", ["plain", "tied", "published"])
def test_lora_trains_new_rows_of_both_matrices_and_no_old_one(folders: dict[str, Path], kind: str) -> None:
    generator = opened(folders[kind], vocabulary="self_rag", lora=LORA)
    objective = AnswerObjective(generator)
    learning = {name for name, p in generator.model.named_parameters() if p.requires_grad}
    sides = {"embed_tokens", "lm_head"} if kind != "tied" else {"embed_tokens"}
    assert {name.split(".token_adapter")[0].rpartition(".")[2] for name in learning if "trainable_tokens" in name} == sides
    loss, _ = objective.loss(objective.collate([row(generator)]))
    loss.backward()
    for name, parameter in generator.model.named_parameters():
        if "trainable_tokens_delta" in name:
            assert parameter.shape == (15, 32), name
            assert (parameter.grad.abs().sum(1) > 0).all(), name
        elif "embed_tokens" in name or "lm_head" in name:
            assert parameter.grad is None, name


@pytest.mark.parametrize(
    ("kind", "lora"), [("plain", LORA), ("tied", LORA), ("plain", {**LORA, "modules_to_save": ["embed_tokens", "lm_head"]})]
)
def test_lora_reload_reproduces_reflection_logprobs(
    folders: dict[str, Path], tmp_path: Path, kind: str, lora: dict[str, Any]
) -> None:  # fmt: skip
    generator = opened(folders[kind], vocabulary="self_rag", lora=lora, vocabulary_init="random")
    objective = AnswerObjective(generator)
    optimizer = torch.optim.Adam([p for p in generator.model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(4):
        loss, _ = objective.loss(objective.collate([row(generator)]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1
    generator.save(tmp_path / "adapter")
    with torch.no_grad():
        batch = objective.collate([row(generator)])
        wanted = generator.forward(batch)
        again = opened(tmp_path / "adapter")  # the manifest knows how the base was extended
        assert again.schema == generator.schema
        assert torch.allclose(again.forward(batch), wanted, atol=1e-5)
        further = opened(tmp_path / "adapter", vocabulary="self_rag", lora=lora)
        assert torch.allclose(further.forward(batch), wanted, atol=1e-5)
        assert sum(p.requires_grad for p in further.model.parameters()) == sum(
            p.requires_grad for p in generator.model.parameters()
        )


def test_a_list_of_rows_reaches_the_input_side_alone(folders: dict[str, Path]) -> None:
    """Why `new_rows` names both matrices."""
    model, words = loaded(folders["plain"])
    schema = extend_vocabulary(model, words)
    assert new_rows(model, schema) == {"model.embed_tokens": sorted(schema.controls), "lm_head": sorted(schema.controls)}
    bare = opened(folders["plain"], vocabulary="self_rag", lora={**LORA, "trainable_token_indices": sorted(schema.controls)})
    assert not [name for name, p in bare.model.named_parameters() if p.requires_grad and "lm_head" in name]


@pytest.mark.parametrize("legacy", [True, False])
def test_a_saved_tokenizer_keeps_its_blanks(folders: dict[str, Path], tmp_path: Path, legacy: bool) -> None:
    """The blank behind a control token: what was trained with it must be asked with it."""
    generator = opened(folders["published"])
    generator.tokenizer = tiny.llama_tokenizer(special=True, legacy=legacy)
    told = generator.marked_prompt.passage(Passage("p", "the tin in the inn", "the"))
    generator.save(tmp_path / "saved")
    again = opened(tmp_path / "saved")
    assert again.marked_prompt.passage(Passage("p", "the tin in the inn", "the")) == told
    again.save(tmp_path / "twice")
    assert opened(tmp_path / "twice").marked_prompt.passage(Passage("p", "the tin in the inn", "the")) == told
