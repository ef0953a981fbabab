"""Contexts of a model run here: computed once, branched and written on in batches, equal to whole passes without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import tiny
from raglan.errors import GeneratorError
from raglan.generator import HFGenerator, open_generator
from raglan.generator.base import Cost
from raglan.recipe import GeneratorSettings, PromptSettings
from raglan.records import Marked, Passage

KINDS = ["llama", "grouped", "lora", "gpt2", "bert", "sliding", "bloom"]
WORDS = tiny.marked_tokenizer()
SCHEMA = tiny.ScriptedGenerator({(): tiny.decides(0.5, 0.5)}).schema
MARKS = SCHEMA.marks
EOS = 2


def model(kind: str) -> Any:
    torch.manual_seed(3)
    wide: dict[str, Any] = {"vocab_size": len(WORDS), "initializer_range": 0.4, "pad_token_id": 0, "eos_token_id": EOS}
    llama = {**wide, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**wide, n_embd=32, n_layer=2, n_head=2, n_positions=160))
    if kind == "bert":
        return BertLMHeadModel(BertConfig(**llama, max_position_embeddings=160, is_decoder=True))
    if kind == "bloom":
        return BloomForCausalLM(BloomConfig(**wide, hidden_size=32, n_layer=2, n_head=2))
    if kind == "sliding":
        return MistralForCausalLM(MistralConfig(**llama, num_key_value_heads=2, sliding_window=8))
    made = LlamaForCausalLM(LlamaConfig(**llama, num_key_value_heads=1 if kind == "grouped" else 4))
    return peft.get_peft_model(made, peft.LoraConfig(init_lora_weights=False)) if kind == "lora" else made


@cache
def generator(kind: str, *, batch_tokens: int = 16384, head_chunk: int = 128) -> HFGenerator:
    settings = GeneratorSettings(model=kind, dtype="float32", batch_tokens=batch_tokens, head_chunk=head_chunk)
    return HFGenerator(model(kind).eval(), WORDS, settings, PromptSettings())


def some(length: int, seed: int) -> list[int]:
    """Ids of words, none of which means anything."""
    return np.random.default_rng(seed).integers(5, 150, length).tolist()


@torch.no_grad()
def truth(made: HFGenerator, ids: Sequence[int]) -> np.ndarray:
    """log p of every next id behind each of `ids`, (L,V), by one pass without a cache."""
    logits = made.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    values: np.ndarray = logits.float().log_softmax(-1).numpy()
    return values


def twin(made: HFGenerator, ids: Sequence[int], limit: int, stops: Sequence[int] = ()) -> Marked:
    """Greedy, one whole pass an id."""
    whole, logprobs, marks = list(ids), [], []
    finish = "length"
    for _ in range(limit):
        row = truth(made, whole)[-1]
        token = int(row.argmax())
        whole.append(token)
        logprobs.append(row[token])
        marks.append(row[list(MARKS)])
        if token in (EOS, *stops):
            finish = "eos" if token == EOS else "stop"
            break
    return Marked(tuple(whole[len(ids) :]), np.array(logprobs), np.array(marks), finish)  # type: ignore[arg-type]


def assert_same(found: Marked, wanted: Marked, *, within: float = 1e-5) -> None:
    assert (found.ids, found.finish) == (wanted.ids, wanted.finish)
    assert np.allclose(found.logprobs, wanted.logprobs, atol=within)
    assert np.allclose(found.mark_logprobs, wanted.mark_logprobs, atol=within)


PROMPTS = [some(7, 1), some(12, 2), some(3, 3)]
SUFFIXES = [some(9, 4), some(2, 5), some(5, 6), some(9, 7), some(1, 8)]
PLACES = [0, 1, 0, 2, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_marks_are_those_of_a_whole_pass(kind: str) -> None:
    made = generator(kind)
    asked = made.contexts(PROMPTS, marks=MARKS)
    grown = asked.branch(PLACES, SUFFIXES)
    again = grown.branch([0, 4, 1, 1], [some(4, 9), some(6, 10), some(3, 11), []])
    for contexts in (asked, grown, again):
        wanted = np.array([truth(made, ids)[-1] for ids in contexts.ids])
        assert np.allclose(contexts.mark_logprobs, wanted[:, list(MARKS)], atol=1e-5)
        assert contexts.best.tolist() == wanted.argmax(1).tolist()
    assert grown.ids[1] == (*PROMPTS[1], *SUFFIXES[1])
    assert len(again) == 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch_tokens", "head_chunk"), [(16384, 128), (64, 2)])
def test_written_in_a_batch_as_alone_and_as_without_a_cache(kind: str, batch_tokens: int, head_chunk: int) -> None:
    made = generator(kind, batch_tokens=batch_tokens, head_chunk=head_chunk)
    grown = made.contexts(PROMPTS, marks=MARKS).branch(PLACES, SUFFIXES)
    free = grown.write(stop_ids=(), max_new_tokens=6)
    stops = [free[0].ids[2], free[3].ids[4]]  # so rows end at different steps, and leave the batch
    together = grown.write(stop_ids=stops, max_new_tokens=6)
    assert len({len(row.ids) for row in together}) > 1
    for number, row in enumerate(together):
        assert_same(row, twin(made, grown.ids[number], 6, stops))
        if number % 2:
            assert_same(row, grown.only([number]).write(stop_ids=stops, max_new_tokens=6)[0])
    assert [row.ids for row in grown.write(stop_ids=stops, max_new_tokens=[1, 2, 0, 3, 6])] == [
        row.ids[:limit] for row, limit in zip(together, [1, 2, 0, 3, 6], strict=True)
    ]


def test_dropping_a_row_changes_nothing() -> None:
    made = generator("llama")
    grown = made.contexts([some(6, 20)] * 3, marks=MARKS).branch([0, 1, 2], [some(5, seed) for seed in (21, 22, 23)])
    free = grown.write(stop_ids=(), max_new_tokens=70)  # further than a cache's first room
    ended = next(at for at in range(1, 70) if free[1].ids[at] not in free[0].ids + free[1].ids[:at] + free[2].ids)
    dropped = grown.write(stop_ids=[free[1].ids[ended]], max_new_tokens=70)
    assert dropped[1].finish == "stop"
    assert len(dropped[1].ids) == ended + 1
    for number in (0, 2):
        assert_same(dropped[number], free[number])


def test_contexts_stay_as_they_were() -> None:
    made = generator("llama")
    asked = made.contexts(PROMPTS, marks=MARKS)
    before = asked.mark_logprobs.copy()
    one = asked.branch([0, 1], SUFFIXES[:2])
    first = [one.write(stop_ids=(), max_new_tokens=6), one.branch([0], [some(4, 1)]).mark_logprobs]
    other = asked.branch([1, 0], SUFFIXES[1::-1])
    second = [other.write(stop_ids=(), max_new_tokens=6)[::-1], one.branch([0], [some(4, 1)]).mark_logprobs]
    for mine, theirs in zip(first[0], second[0], strict=True):
        assert_same(mine, theirs)
    assert np.allclose(first[1], second[1], atol=1e-6)
    assert np.array_equal(asked.mark_logprobs, before)
    assert np.allclose(asked.branch([0, 2], [[], []]).mark_logprobs, before[[0, 2]], atol=1e-6)
    assert np.array_equal(asked.only([2, 0, 2]).mark_logprobs, before[[2, 0, 2]])


def test_the_end_and_the_first_id() -> None:
    made = generator("llama")
    asked = made.contexts(PROMPTS, marks=MARKS)
    rel = SCHEMA.ids["is_rel"]
    forced = asked.write(stop_ids=(), max_new_tokens=4, first=rel)
    for row, ids, marks in zip(forced, asked.ids, asked.mark_logprobs, strict=True):
        raw = truth(made, ids)[-1]
        assert row.ids[0] == max(rel, key=lambda one: raw[one])
        assert row.logprobs[0] == pytest.approx(raw[row.ids[0]], abs=1e-5)  # raw: not renormalised
        assert np.array_equal(row.mark_logprobs[0], marks)
        assert_same(Marked(row.ids[1:], row.logprobs[1:], row.mark_logprobs[1:], row.finish), twin(made, [*ids, row.ids[0]], 3))
    ended = asked.write(stop_ids=(), max_new_tokens=4, first=[EOS])
    assert [(row.ids, row.finish) for row in ended] == [((EOS,), "eos")] * 3


def test_drawing() -> None:
    made = generator("llama")
    asked = made.contexts(PROMPTS, marks=MARKS)
    drawn = asked.write(stop_ids=(), max_new_tokens=12, temperature=0.8, seed=5)
    other = asked.write(stop_ids=(), max_new_tokens=12, temperature=0.8, seed=6)
    assert [row.ids for row in drawn] != [row.ids for row in other]
    alone = asked.only([0]).write(stop_ids=(), max_new_tokens=12, temperature=0.8, seed=5)
    assert_same(alone[0], drawn[0])  # draws do not depend on the other rows
    cold = asked.write(stop_ids=(), max_new_tokens=6, temperature=1e-4, seed=1)
    for row, ids in zip(cold, asked.ids, strict=True):
        assert_same(row, twin(made, ids, 6))
    many = 4000
    rows = asked.only([0] * many).write(stop_ids=(), max_new_tokens=1, temperature=2.0, seed=1)
    counts = np.bincount([row.ids[0] for row in rows], minlength=len(WORDS)) / many
    raw = truth(made, PROMPTS[0])[-1].astype(np.float64)
    p = np.exp(raw / 2) / np.exp(raw / 2).sum()
    assert np.all(np.abs(counts - p) < 5 * np.sqrt(p * (1 - p) / many) + 1 / many)
    assert rows[0].logprobs[0] == pytest.approx(raw[rows[0].ids[0]], abs=1e-5)  # raw: before the temperature


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_given_continuations(kind: str) -> None:
    made = generator(kind)
    asked = made.contexts(PROMPTS, marks=MARKS)
    given = [some(4, 30), some(1, 31), some(6, 32), []]
    places = [2, 0, 0, 1]
    for place, ids, found in zip(places, given, asked.score(places, given), strict=True):
        whole = truth(made, [*PROMPTS[place], *ids])[len(PROMPTS[place]) - 1 :]
        assert np.allclose(found, [whole[at, token] for at, token in enumerate(ids)], atol=1e-5)


def test_bfloat16_weights_give_float32_logprobs() -> None:
    settings = GeneratorSettings(model="llama", dtype="bfloat16")
    made = HFGenerator(model("llama").to(torch.bfloat16).eval(), WORDS, settings, PromptSettings())
    every = tuple(range(len(WORDS)))
    grown = made.contexts(PROMPTS, marks=every).branch(PLACES, SUFFIXES)
    rows = grown.write(stop_ids=(), max_new_tokens=5)
    for values in (grown.mark_logprobs, *(row.mark_logprobs for row in rows)):
        assert values.dtype == np.float32
        assert np.allclose(np.exp(values.astype(np.float64)).sum(1), 1, atol=1e-5)  # in bfloat16 sums are off by a hundredth
    assert rows[0].logprobs.dtype == np.float32


def cost_of_a(made: Any, prompt: list[int], passages: Sequence[list[int]]) -> None:
    """Short form: one decision, all passages in one batch, each answer to its 24th id."""
    asked = made.contexts([prompt], marks=MARKS)
    assert asked.mark_logprobs.shape == (1, 13)
    asked.branch([0] * len(passages), passages).write(stop_ids=(), max_new_tokens=24)


def cost_of_b(made: Any, prompt: list[int], passages: Sequence[list[int]]) -> None:
    """Long form: three levels of five passages, two hypotheses live, whose passages leave the context."""
    live = made.contexts([prompt], marks=MARKS)
    assert live.mark_logprobs.shape == (1, 13)
    for level in range(3):
        places = [place for place in range(len(live)) for _ in passages]
        rows = live.branch(places, [*passages] * len(live)).write(stop_ids=(), max_new_tokens=24)
        if level < 2:
            kept = [0, len(passages) * (len(live) - 1) + 1]
            live = live.branch([places[at] for at in kept], [rows[at].ids for at in kept])


class Watched:
    """Counts what goes through a model."""

    def __init__(self, made: HFGenerator):
        self.calls = self.positions = 0
        self.handle = made.model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, _: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.calls += 1
        self.positions += kwargs["input_ids"].numel()


def never_ending() -> HFGenerator:
    """A model that writes to its limit: its end token is impossible."""
    torch.manual_seed(0)
    bare = BertLMHeadModel(
        BertConfig(
            vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=512, is_decoder=True, eos_token_id=EOS, pad_token_id=0,
        )
    )  # fmt: skip
    with torch.no_grad():
        bare.cls.predictions.decoder.bias[EOS] = -1e4
    return HFGenerator(bare.eval(), WORDS, GeneratorSettings(model="bert", dtype="float32"), PromptSettings())


def test_what_it_costs() -> None:
    """Exact figures: forward passes, positions, log-probabilities kept."""
    made = never_ending()
    made.contexts([some(2, 0)], marks=MARKS)  # the head is checked once
    prompt, passages = some(96, 1), [some(128, 2 + number) for number in range(10)]
    for work, count, wanted in ((cost_of_a, 10, (25, 1606, 3374, 240)), (cost_of_b, 5, (75, 3967, 8414, 600))):
        before, watched = made.cost.copy(), Watched(made)
        work(made, prompt, passages[:count])
        watched.handle.remove()
        spent = made.cost - before
        assert (spent.calls, spent.positions, spent.logprobs, spent.generated) == wanted
        assert (watched.calls, watched.positions) == wanted[:2]
    # prefixes taken from the cache: the question's 5 times, then of two hypotheses for their history and 5 passages each
    assert spent.reused == 96 * 5 + 2 * 96 + 10 * 120 + 2 * 120 + 10 * 144


def test_marks_that_nobody_reads_cost_nothing() -> None:
    made = generator("llama")
    before = made.cost.copy()
    asked = made.contexts(PROMPTS, marks=MARKS)
    assert (made.cost - before).logprobs == 0
    for _ in range(2):
        assert asked.mark_logprobs.shape == asked.only([0, 1, 2]).mark_logprobs.shape
    assert (made.cost - before).logprobs == 3 * 14


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(GeneratorError, match="prompt 1 of 2 has no id"):
        generator("llama").contexts([[5], []], marks=MARKS)
    with pytest.raises(GeneratorError, match="need 161 positions, the model has 160"):
        generator("gpt2").contexts([some(161, 1)], marks=MARKS)
    asked = generator("gpt2").contexts([some(150, 1)], marks=MARKS)
    with pytest.raises(GeneratorError, match="need 161 positions"):
        asked.branch([0], [some(11, 1)])
    with pytest.raises(GeneratorError, match="need 170 positions"):
        asked.write(stop_ids=(), max_new_tokens=20)
    settings = GeneratorSettings(model=str(tiny.bart(tmp_path)))
    with pytest.raises(GeneratorError, match="cannot be branched"):
        open_generator(settings, PromptSettings()).contexts([[5]], marks=MARKS)


SCRIPT = {
    (): tiny.decides(0.05, 0.9),
    ("One",): tiny.said(("Par", -0.1), ("is", -0.2), rel=(0.9, 0.05), sup=(0.7, 0.2, 0.05), use=(0.01, 0.02, 0.05, 0.12, 0.8)),
    ("Two",): tiny.said("Ly", "on", rel=(0.6, 0.3), sup=(0.1, 0.3, 0.5), then=(0.1, 0.8, 0.05)),
    ("Two", "One"): tiny.said(" and", " on", rel=(0.6, 0.4)),
    ("[No Retrieval]",): [tiny.said(" No", " idea"), tiny.said(" None")],
}


def test_the_scripted_generator() -> None:
    made = tiny.ScriptedGenerator(SCRIPT)
    told, schema = made.marked_prompt, made.schema
    one, two = (told.passage(Passage(name, f"text {name}", name)) for name in ("One", "Two"))
    asked = made.contexts([told.question("Where?")], marks=schema.marks)
    assert np.allclose(np.exp(asked.mark_logprobs[0, :2]), [0.05, 0.9])
    assert asked.best.tolist() == [schema.yes]
    grown = asked.branch([0, 0, 0], [one, two, told.no_retrieval()])
    paris, lyon, none = grown.write(stop_ids=[schema.yes], max_new_tokens=100)
    assert [told.text(row.ids) for row in (paris, lyon, none)] == ["Paris", "Lyon", "No idea"]
    assert [row.finish for row in (paris, lyon, none)] == ["eos", "stop", "eos"]
    assert paris.logprobs.sum() == pytest.approx(-0.995179, abs=1e-6)
    assert lyon.ids[-1] == schema.yes
    assert np.exp(lyon.mark_logprobs[-1, :3]) == pytest.approx([0.1, 0.8, 0.05])
    other = grown.write(stop_ids=[schema.yes], max_new_tokens=2, temperature=1.0, seed=1)[2]
    assert (told.text(other.ids), other.finish) == ("None", "eos")
    # below Two: with its passage still there, with it gone, and with the boundary's token kept
    for history, suffix in ((grown.branch([1], [lyon.ids[:-1]]), one), (asked.branch([0], [lyon.ids]), one[1:])):
        assert history.branch([0], [suffix]).paths == [("Two", "One")]
    with pytest.raises(tiny.Unforeseen, match="fits"):
        grown.branch([0], [two])
    with pytest.raises(tiny.Unforeseen, match="without a passage"):
        asked.branch([0], [[schema.yes]])
    assert made.prompts[0] == tuple(told.question("Where?"))
    assert made.prompts[1][-len(one) :] == tuple(one)


def test_scripted_and_real_models_count_alike() -> None:
    line = tiny.said(*["x"] * 40)
    passages = [f"p{number}" for number in range(5)]
    script = {(name,): (tiny.group("is_rel", (0.1, 0.9)), tiny.Step(f" {name}", -0.1), *line) for name in passages}
    below = {(name, other): line for name in passages for other in passages}
    made = tiny.ScriptedGenerator({(): tiny.decides(0.1, 0.9), **script, **below})
    real = HFGenerator(model("llama").eval(), made.tokenizer, GeneratorSettings(model="llama"), PromptSettings())
    real.ends = [-1]
    told = made.marked_prompt
    prompt = told.question("Where?")
    suffixes = [told.passage(Passage(name, "a b", name)) for name in passages]
    spent: list[Cost] = []
    for one in (made, real):
        before = one.cost.copy()
        asked = one.contexts([prompt], marks=MARKS)
        assert asked.mark_logprobs.shape == (1, 13)
        grown = asked.branch([0] * 5, suffixes)
        rows = grown.write(stop_ids=(), max_new_tokens=10)
        assert [len(row.ids) for row in rows] == [10] * 5
        spent.append(one.cost - before)
    assert spent[0] == spent[1]
