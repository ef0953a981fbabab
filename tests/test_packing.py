"""Packing: rows side by side are learned as they are apart, and see nothing of each other."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

import tiny
from raglan.errors import GeneratorError
from raglan.generator import HFGenerator, open_generator
from raglan.objective import AnswerObjective
from raglan.packing import Row, check_packing, first_fit_decreasing, pack_rows, packed_batch, row_length
from raglan.recipe import GeneratorSettings, PromptSettings


def opened(folder: Path) -> HFGenerator:
    return open_generator(GeneratorSettings(model=str(folder), dtype="float32", head_chunk=16), PromptSettings())


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def generator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HFGenerator:
    """Relative positions and absolute ones."""
    return opened(getattr(tiny, request.param)(tmp_path_factory.mktemp(request.param)))


def some_rows(count: int, *, longest: int = 40, seed: int = 1, words: int = 60) -> list[Row]:
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        length = chance.randint(4, longest)
        ids = [chance.randrange(4, words) for _ in range(length)]
        split = chance.randint(1, length - 1)
        rows.append({"input_ids": ids[:split], "labels": ids[split:]})
    return rows


def naive(lengths: list[int], size: int) -> list[list[int]]:
    """First-fit decreasing as it is told: look at every bin from the first on."""
    bins: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        for own in bins:
            if sum(lengths[at] for at in own) + lengths[place] <= size:
                own.append(place)
                break
        else:
            bins.append([place])
    return bins


@pytest.mark.parametrize("count", [0, 1, 2, 7, 64, 200])
def test_the_tree_finds_the_bin_that_a_search_from_the_front_finds(count: int) -> None:
    chance = random.Random(count)
    for size in (1, 10, 100):
        lengths = [chance.randint(1, size) for _ in range(count)]
        assert first_fit_decreasing(lengths, size) == naive(lengths, size)


def test_a_row_longer_than_a_pack_is_no_row_of_it() -> None:
    with pytest.raises(ValueError, match="a row of 11 tokens does not fit into a pack of 10"):
        first_fit_decreasing([3, 11], 10)


def test_packs_of_mixed_lengths_are_nearly_full() -> None:
    """Rows of at most 512 of 2,048 tokens; every row in one pack, whole."""
    rows = some_rows(3000, longest=512)
    packs, fill = pack_rows(rows, 2048)
    sizes = [len(pack["input_ids"]) for pack in packs]
    assert max(sizes) <= 2048
    assert fill == pytest.approx(sum(map(row_length, rows)) / (2048 * len(packs)))
    assert fill >= 0.95
    assert sorted(id(row) for pack in packs for row in pack["rows"]) == sorted(map(id, rows))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("reduction", ["token", "example"])
def test_packed_rows_have_loss_and_gradient_of_rows_apart(generator: HFGenerator, flat: bool, reduction: str) -> None:
    rows = some_rows(11)
    objective = AnswerObjective(generator, reduction=reduction)  # type: ignore[arg-type]
    packs, _ = pack_rows(rows, 64)
    assert 1 < len(packs) < len(rows)
    found = []
    for batch in (objective.collate(rows), packed_batch(packs, generator.pad, flat=flat)):
        generator.model.zero_grad()
        loss, _ = objective.loss(dict(batch))
        loss.backward()
        found.append((float(loss), [p.grad.clone() for p in generator.model.parameters() if p.grad is not None]))
    (apart, theirs), (packed, ours) = found
    assert packed == pytest.approx(apart, abs=1e-5)
    assert len(ours) == len(theirs) > 10
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_positions_begin_anew_and_first_tokens_are_learned_by_nobody(generator: HFGenerator) -> None:
    rows = some_rows(9)
    packs, _ = pack_rows(rows, 64)
    batch = AnswerObjective(generator).collate(packs)
    assert int((batch["labels"] >= 0).sum()) == sum(len(row["labels"]) for row in rows)
    line, width = 0, batch["input_ids"].shape[1]
    for number, pack in enumerate(packs):
        begin = 0
        for row in pack["rows"]:
            own = slice(begin, begin + row_length(row))
            assert batch["input_ids"][number, own].tolist() == [*row["input_ids"], *row["labels"]]
            assert batch["position_ids"][number, own].tolist() == list(range(row_length(row)))
            at = batch["at"][line, : len(row["labels"])]
            assert (at + 1).tolist() == [number * width + begin + len(row["input_ids"]) + t for t in range(len(row["labels"]))]
            begin, line = begin + row_length(row), line + 1


@pytest.mark.parametrize("flat", [False, True])
def test_a_token_of_the_first_row_cannot_alter_the_second(generator: HFGenerator, flat: bool) -> None:
    first, second = some_rows(2)
    changed = {"input_ids": [5 + first["input_ids"][0] % 40, *first["input_ids"][1:]], "labels": first["labels"]}
    scored = []
    for row in (first, changed):
        pack, _ = pack_rows([row, second], 100)
        with torch.no_grad():
            scored.append(generator.forward(packed_batch(pack, generator.pad, flat=flat)))
    assert torch.equal(scored[0][1], scored[1][1])
    assert not torch.equal(scored[0][0], scored[1][0])


def test_the_trial_lets_models_pass_that_can_be_packed(generator: HFGenerator) -> None:
    check_packing(generator)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_attention_masks_packs(attention: str, tmp_path: Path) -> None:
    settings = GeneratorSettings(model=str(tiny.llama(tmp_path)), dtype="float32", attention=attention)  # type: ignore[arg-type]
    generator = open_generator(settings, PromptSettings())
    assert generator.model.config._attn_implementation == attention
    check_packing(generator)
    rows = some_rows(6)
    packs, _ = pack_rows(rows, 64)
    ordered = [row for pack in packs for row in pack["rows"]]
    with torch.no_grad():
        packed = generator.forward(packed_batch(packs, generator.pad, flat=False))
        apart = generator.forward(generator.collate(ordered))
    assert torch.allclose(packed, apart, atol=1e-5)


def test_models_whose_packed_rows_would_read_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GeneratorError, match="reads a prompt apart from its answer, and such rows cannot be packed"):
        check_packing(opened(tiny.bart(tmp_path / "bart")))
    model, words = tiny.reader(folder=tmp_path / "bert")
    model.save_pretrained(str(tmp_path / "reader"))
    words.save_pretrained(str(tmp_path / "reader"))
    with pytest.raises(GeneratorError, match="such rows cannot be packed"):
        check_packing(opened(tmp_path / "reader"))
    torch.manual_seed(0)
    words = tiny.tokenizer(begins=True, ends=False)
    config = MambaConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, state_size=8, pad_token_id=0, eos_token_id=2
    )
    recurrent = tiny._saved(MambaForCausalLM(config), words, tmp_path / "mamba")
    with pytest.raises(GeneratorError, match=r"rows cannot be packed for .*mamba"):
        check_packing(opened(recurrent))
