"""Han characters in a model of English word pieces: added once, alike everywhere, kept by saving, learned, and then copied."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from raglan.characters import HAN, add_characters
from raglan.errors import GeneratorError
from raglan.generator import HFGenerator, open_generator
from raglan.generator.causal import causal_from_encoder
from raglan.generator.reader import reader_from_encoder
from raglan.recipe import GeneratorSettings, PromptSettings
from raglan.records import Passage

PASSAGE = "威廉發現了梵語。"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.bert(tmp_path_factory.mktemp("characters") / "bert"))


def generator(bert: str, *, extended: bool = True) -> HFGenerator:
    model, words = reader_from_encoder(bert)
    if extended:
        add_characters(model, words)
    settings = GeneratorSettings(model="tiny", dtype="float32", vocabulary="han" if extended else "own")
    return HFGenerator(model.eval(), words, settings, PromptSettings())


@pytest.mark.parametrize("make", [reader_from_encoder, causal_from_encoder])
def test_every_character_gets_a_row_and_old_rows_stay(make: object, bert: str) -> None:
    model, words = make(bert)  # type: ignore[operator]
    before, old = model.get_input_embeddings().weight.detach().clone(), len(words)
    assert words.tokenize("梵語 the") == ["[UNK]", "[UNK]", "the"]
    assert add_characters(model, words) == len(HAN)
    assert words.tokenize("梵語 the") == ["梵", "語", "the"]
    rows = model.get_input_embeddings().weight.detach()
    assert len(rows) == len(words) == old + len(HAN) == model.config.vocab_size
    assert torch.equal(rows[:old], before)
    assert len(rows[old:].unique(dim=0)) == len(HAN)
    assert rows[old:].std() == pytest.approx(float(before.std()), rel=0.2)
    assert add_characters(model, words) == 0
    again, more = make(bert)  # type: ignore[operator]
    add_characters(again, more)
    assert torch.equal(again.get_input_embeddings().weight, rows)


def test_a_saved_one_opens_with_its_characters(bert: str, tmp_path: Path) -> None:
    one = generator(bert)
    one.save(tmp_path / "saved")
    settings = GeneratorSettings(model=str(tmp_path / "saved"), dtype="float32", vocabulary="han")
    other = open_generator(settings, PromptSettings())
    assert other.fingerprint == one.fingerprint
    plain = open_generator(settings.model_copy(update={"vocabulary": "own"}), PromptSettings())
    assert plain.tokenizer.tokenize("梵語") == ["梵", "語"]  # they are the folder's now


def test_an_adapter_finds_its_base_with_the_same_characters(bert: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model, words = reader_from_encoder(bert)
    model.save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    lora = {"r": 2, "target_modules": ["query"]}
    settings = GeneratorSettings(model=str(tmp_path / "base"), dtype="float32", vocabulary="han", lora=lora)
    one = open_generator(settings, PromptSettings())
    one.save(tmp_path / "adapter")
    other = open_generator(GeneratorSettings(model=str(tmp_path / "adapter"), dtype="float32"), PromptSettings())
    prompt = [one.prompt.render("誰發現了梵語？", [Passage("p", PASSAGE)])]
    assert other.tokenizer.tokenize("梵語") == ["梵", "語"]
    assert one.token_logprobs(prompt, ["威廉"])[0] == pytest.approx(other.token_logprobs(prompt, ["威廉"])[0])


def test_a_reader_learns_to_copy_what_it_could_not_spell(bert: str) -> None:
    said = {}
    for extended in (False, True):
        one = generator(bert, extended=extended)
        prompt = one.prompt.render("誰發現了梵語？", [Passage("p", PASSAGE)])
        batch = one.collate([one.row(prompt, "威廉")])
        steps = torch.optim.Adam(one.model.parameters(), lr=3e-3)
        for _ in range(25):
            loss = -one.forward(batch).sum()
            steps.zero_grad()
            loss.backward()
            steps.step()
        said[extended] = one.generate([prompt], max_new_tokens=6)[0].text
    assert said[True] == "威廉"
    assert "威" not in said[False]


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    settings = GeneratorSettings(model=str(tiny.llama(tmp_path)), vocabulary="han")
    with pytest.raises(GeneratorError, match="none of word pieces") as caught:
        open_generator(settings, PromptSettings())
    assert "embedded" in str(caught.value.hint)
