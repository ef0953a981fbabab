"""The embedded reader: an honest distribution, blocks that do not see each other, the same numbers cached, padded, saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

import tiny
from raglan.generator import HFGenerator
from raglan.generator.reader import GROUP, LockedDropout, ReaderConfig, ReaderForConditionalGeneration
from raglan.recipe import GeneratorSettings, PromptSettings
from raglan.records import Passage


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> HFGenerator:
    model, words = tiny.reader(folder=tmp_path_factory.mktemp("reader"))
    return HFGenerator(model.eval(), words, GeneratorSettings(dtype="float32"), PromptSettings(max_tokens=64))


def prompt_ids(generator: HFGenerator, *texts: str) -> torch.Tensor:
    return torch.tensor([generator.prompt.render("who?", [Passage(t, t) for t in texts]).ids])


def test_next_token_probabilities_sum_to_one_and_targets_agree(generator: HFGenerator) -> None:
    ids = prompt_ids(generator, "the miller built it", "a tower in 1831")
    labels = torch.tensor([[40, 41, 45, 3], [44, 3, -100, -100]])
    ids = ids.expand(2, -1)
    decoder = generator.model.prepare_decoder_input_ids_from_labels(labels)
    with torch.no_grad():
        full = generator.model(input_ids=ids, decoder_input_ids=decoder).logits
        targets = generator.model(input_ids=ids, labels=labels).target_logprobs
    assert torch.allclose(full.exp().sum(-1), torch.ones(2, 4), atol=1e-5)
    real = labels >= 0
    wanted = full.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    assert torch.allclose(targets[real], wanted[real], atol=1e-5)
    assert (targets[~real] == 0).all()


def test_twin_of_the_mixture(generator: HFGenerator) -> None:
    """copy, generate, stop, summed in plain Python over positions."""
    model, ids = generator.model, prompt_ids(generator, "the miller built the tower")
    decoder = torch.tensor([[2, int(ids[0, 4])]])
    with torch.no_grad():
        encoding = model.encoder(ids)
        hidden, _ = model.decode(encoding, None, decoder)
        copy = model.copy_logprobs(hidden, decoder, encoding)[0].exp()
        acts = model.acts(hidden)[0].softmax(-1)
        words = model.word_scores(hidden)[0].softmax(-1)
        ours = model(input_ids=ids, decoder_input_ids=decoder).logits[0].exp()
    for t in range(2):
        for v in range(len(tiny.bert_words())):
            copied = sum(float(copy[t, i]) for i in range(ids.shape[1]) if int(ids[0, i]) == v and v not in (2, 3))
            wanted = float(acts[t, 0]) * copied + float(acts[t, 1] * words[t, v]) + (float(acts[t, 2]) if v == 3 else 0)
            assert float(ours[t, v]) == pytest.approx(wanted, abs=1e-6)


def test_blocks_are_encoded_apart_and_their_order_does_not_change_the_answer(generator: HFGenerator) -> None:
    first, second = "the miller built it", "a tower by the water in 1831"
    both, turned = prompt_ids(generator, first, second), prompt_ids(generator, second, first)
    alone = prompt_ids(generator, first)
    decoder = torch.tensor([[2]])
    with torch.no_grad():
        states = generator.model.encoder(both).last_hidden_state[0, : alone.shape[1]]
        assert torch.allclose(states, generator.model.encoder(alone).last_hidden_state[0], atol=1e-5)
        a, b = (generator.model(input_ids=x, decoder_input_ids=decoder).logits for x in (both, turned))
    assert torch.allclose(a.exp(), b.exp(), atol=1e-5)


@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_nothing(generator: HFGenerator, left: bool) -> None:
    ids = prompt_ids(generator, "the miller", "a tower")
    pad = (5, 0) if left else (0, 5)
    padded, mask = (torch.nn.functional.pad(x, pad) for x in (ids, torch.ones_like(ids)))
    decoder = torch.tensor([[2, 40, 41]])
    with torch.no_grad():
        plain = generator.model(input_ids=ids, decoder_input_ids=decoder).logits
        other = generator.model(input_ids=padded, attention_mask=mask, decoder_input_ids=decoder).logits
    assert torch.allclose(plain.exp(), other.exp(), atol=1e-5)


def test_cache_changes_nothing(generator: HFGenerator) -> None:
    ids = prompt_ids(generator, "the miller built it in 1831", "a tower")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    inputs["decoder_input_ids"] = torch.tensor([[2]])
    for beams in (1, 3):
        cached, plain = (generator.model.generate(**inputs, num_beams=beams, use_cache=flag) for flag in (True, False))
        assert cached.tolist() == plain.tolist()


def test_save_and_load_is_the_same_model_for_transformers_too(generator: HFGenerator, tmp_path: Path) -> None:
    generator.save(tmp_path / "reader")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "reader").eval()
    ids, decoder = prompt_ids(generator, "the miller"), torch.tensor([[2, 40]])
    with torch.no_grad():
        a, b = (m(input_ids=ids, decoder_input_ids=decoder).logits for m in (generator.model, again))
    assert torch.allclose(a, b, atol=1e-5)
    ours, theirs = generator.model.state_dict(), again.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    tables = [again.encoder.bert.embeddings.word_embeddings.weight, again.decoder.embeddings.word_embeddings.weight]
    assert tables[0].data_ptr() == tables[1].data_ptr()


def test_it_learns_to_copy_in_a_hundred_steps(tmp_path: Path) -> None:
    """Invented towers: after a few batches the reader answers who built the one it has never seen."""
    import random

    torch.manual_seed(0)
    chance = random.Random(0)
    model, words = tiny.reader(folder=tmp_path)
    generator = HFGenerator(model, words, GeneratorSettings(dtype="float32"), PromptSettings(max_tokens=64))

    def row() -> tuple[list[Passage], str]:
        names = ["".join(chance.choices("abcdefgh", k=3)) for _ in range(2)]
        year = str(chance.randint(1600, 1999))
        return [Passage("", f"the tower was built in {year} by {names[0]} of {names[1]}")], names[0]

    def batch(n: int) -> tuple[list, list[str]]:
        rows = [row() for _ in range(n)]
        return [generator.prompt.render("who built the tower", p) for p, _ in rows], [a for _, a in rows]

    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(120):
        prompts, answers = batch(16)
        loss = -generator.forward(generator.collate([generator.row(p, a) for p, a in zip(prompts, answers, strict=True)])).sum()
        optimiser.zero_grad()
        (loss / 16).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(float(loss) / 16)
    prompts, answers = batch(40)
    right = [c.text == a for c, a in zip(generator.generate(prompts, max_new_tokens=8), answers, strict=True)]
    assert losses[-1] < 0.5 * losses[0]
    assert sum(right) >= 30


def test_dropout_has_one_mask_a_row_and_none_in_evaluation() -> None:
    torch.manual_seed(0)
    dropout, states = LockedDropout(0.5), torch.ones(4, 6, 16)
    dropped = dropout(states)
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(dropped[0], dropped[1])
    assert torch.equal(dropout.eval()(states), states)


def test_a_training_pass_drops_by_row_only(generator: HFGenerator) -> None:
    """The layers' own dropout is off, the locked one is at its encoder's rate: 2.6 × the time of a step hangs on it."""
    assert generator.model.config.dropout == 0.0  # as in the tiny BERT
    config = ReaderConfig(**{**generator.model.config.to_dict(), "dropout": 0.2})
    kinds = [m for m in ReaderForConditionalGeneration(config).modules() if "Dropout" in type(m).__name__]
    assert {m.p for m in kinds if isinstance(m, LockedDropout)} == {0.2}
    assert {m.p for m in kinds if not isinstance(m, LockedDropout)} == {0.0}


def test_blocks_of_unlike_length_are_encoded_in_groups_and_come_back_in_place(generator: HFGenerator) -> None:
    texts = ["a tower " * n for n in (1, 9, 2, 14, 3, 1, 7, 5, 12, 2, 1, 6, 11, 4, 8)]
    assert len(texts) > GROUP
    ids = prompt_ids(generator, *texts)
    with torch.no_grad():
        whole = generator.model.encoder(ids).last_hidden_state[0]
        starts = (ids[0] == 2).nonzero().flatten().tolist()
        for begin, end in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
            alone = generator.model.encoder(ids[:, begin:end]).last_hidden_state[0]
            assert torch.allclose(whole[begin:end], alone, atol=1e-5)
