"""Generators: seq2seq (BART, T5), causal (Llama) and the reader, each against a loop over its own full logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from raglan.errors import CheckpointError, GeneratorError, RecipeError
from raglan.generator import HFGenerator, open_generator
from raglan.objective import AnswerObjective
from raglan.recipe import GeneratorSettings, PromptSettings
from raglan.records import Passage

PASSAGES = [
    Passage("1", "The tower was built by Odo Marrack, a miller, in 1831.", "Tower"),
    Passage("2", "A lighthouse of the year 1790.", "Light"),
    Passage("3", "Who founded the old mill? The founder was Ada, in 1655, by the water.", ""),
]
QUERIES = ["who built the tower?", "when was it?", "a much longer question about what was founded by whom?"]
ANSWERS = ["Odo Marrack", "1790", "a"]
MODELS = ["bart", "t5", "llama", "reader"]


def made(kind: str, folder: Path, *, seed: int = 0, **settings: Any) -> HFGenerator:
    if kind == "reader":
        model, words = tiny.reader(folder=folder / "bert", seed=seed)
        model.save_pretrained(str(folder / "reader"))
        words.save_pretrained(str(folder / "reader"))
        name = folder / "reader"
    else:
        makers: dict[str, Callable[..., Path]] = {"bart": tiny.bart, "t5": tiny.t5, "llama": tiny.llama}
        name = makers[kind](folder / kind, seed=seed)
    return open_generator(GeneratorSettings(model=str(name), dtype="float32", **settings), PromptSettings(max_tokens=300))


@pytest.fixture(scope="module", params=MODELS)
def generator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HFGenerator:
    return made(request.param, tmp_path_factory.mktemp("models"))


def rendered(generator: HFGenerator, passages: int = 2) -> list[Any]:
    return [generator.prompt.render(query, PASSAGES[:passages]) for query in QUERIES]


def plain_logprobs(generator: HFGenerator, prompt: Any, answer: str) -> list[float]:
    """The slow twin: the model's own full logits, one pair at a time, no padding, log_softmax at t−1."""
    row = generator.row(prompt, answer)
    prompt_ids, labels = torch.tensor([row["input_ids"]]), row["labels"]
    with torch.no_grad():
        if generator.is_seq2seq:
            decoder = torch.tensor([[*generator.prefix, *labels[:-1]]])
            logits = generator.model(input_ids=prompt_ids, decoder_input_ids=decoder).logits[0, len(generator.prefix) - 1 :]
        else:
            whole = torch.cat([prompt_ids, torch.tensor([labels])], dim=1)
            logits = generator.model(input_ids=whole).logits[0, prompt_ids.shape[1] - 1 :]
    return [float(logits[t].log_softmax(-1)[token]) for t, token in enumerate(labels)]


def test_token_logprobs_are_the_loop_over_full_logits_padded_or_not(generator: HFGenerator) -> None:
    prompts = rendered(generator)
    together = generator.token_logprobs(prompts, ANSWERS)
    for prompt, answer, values in zip(prompts, ANSWERS, together, strict=True):
        assert values.tolist() == pytest.approx(plain_logprobs(generator, prompt, answer), abs=2e-5)
        alone = generator.token_logprobs([prompt], [answer])[0]
        assert alone.tolist() == pytest.approx(values.tolist(), abs=2e-5)


def test_generation_is_greedy_argmax_batched_or_not(generator: HFGenerator) -> None:
    prompts = rendered(generator)
    together = generator.generate(prompts, max_new_tokens=6)
    for prompt, completion in zip(prompts, together, strict=True):
        alone = generator.generate([prompt], max_new_tokens=6)[0]
        assert completion.ids == alone.ids
        assert completion.logprob == pytest.approx(alone.logprob, abs=1e-4)
        ids = torch.tensor([prompt.ids])
        written: list[int] = []
        for _ in range(6):
            with torch.no_grad():
                if generator.is_seq2seq:
                    decoder = torch.tensor([[*generator.prefix, *written]])
                    logits = generator.model(input_ids=ids, decoder_input_ids=decoder).logits[0, -1]
                else:
                    logits = generator.model(input_ids=torch.cat([ids, torch.tensor([written]).long()], 1)).logits[0, -1]
            written.append(int(logits.argmax()))
            if written[-1] == generator.eos:
                break
        assert list(completion.ids) == written
        assert completion.finished == (written[-1] == generator.eos)


def test_beams_never_score_below_greedy(generator: HFGenerator) -> None:
    prompts = rendered(generator)
    greedy = generator.generate(prompts, max_new_tokens=4)
    beams = generator.generate(prompts, max_new_tokens=4, beams=4, length_penalty=0.0)
    better = [b.logprob - g.logprob for b, g in zip(beams, greedy, strict=True)]
    assert max(better) > -1e-4
    for prompt, completion in zip(prompts, beams, strict=True):
        with torch.no_grad():
            batch = generator.collate([{"input_ids": list(prompt.ids), "labels": list(completion.ids)}])
            assert float(generator.forward(batch).sum()) == pytest.approx(completion.logprob, abs=1e-3)


def test_only_answer_and_end_are_labels(generator: HFGenerator) -> None:
    row = generator.row(rendered(generator)[0], "Odo Marrack")
    text = (rendered(generator)[0].answer_space if not generator.is_seq2seq else "") + "Odo Marrack"
    assert row["labels"][-1] == generator.eos
    assert len(row["labels"]) == len(generator.tokenizer(text, add_special_tokens=False)["input_ids"]) + 1
    batch = generator.collate([row, generator.row(rendered(generator)[1], "a")])
    assert int((batch["labels"] >= 0).sum()) == sum(len(r) for r in [row["labels"]]) + len(
        generator.row(rendered(generator)[1], "a")["labels"]
    )
    empty = generator.prompt.render("q", [])
    if generator.is_seq2seq or not empty.answer_space:
        with pytest.raises(GeneratorError, match="no token"):
            generator.row(empty, "")


def test_end_token_can_be_left_out_of_a_score(generator: HFGenerator) -> None:
    prompts = rendered(generator)
    whole, without = (generator.token_logprobs(prompts, ANSWERS, score_eos=flag) for flag in (True, False))
    assert all(np.allclose(a[:-1], b) for a, b in zip(whole, without, strict=True))


def test_gradient_reaches_exactly_what_learns_and_chunks_do_not_matter(generator: HFGenerator) -> None:
    objective = AnswerObjective(generator)
    rows = [generator.row(prompt, answer) for prompt, answer in zip(rendered(generator), ANSWERS, strict=True)]
    batch = objective.collate(rows)
    frozen = next(iter(generator.model.parameters()))
    frozen.requires_grad_(False)
    generator.model.zero_grad()
    loss, _ = objective.loss(batch)
    loss.backward()
    learning = objective.parameters()["generator"]
    assert all(p.grad is None for p in generator.model.parameters() if not p.requires_grad)
    silent = [p for p in learning if p.grad is None or not p.grad.abs().sum() > 0]
    assert len(silent) <= 0.25 * len(learning)  # key biases and unused positions have none; most have
    one = objective.loss(objective.collate(rows[:1]), items=10)[0]
    two = objective.loss(objective.collate(rows[1:]), items=10)[0]
    assert float(one + two) == pytest.approx(float(objective.loss(batch, items=10)[0]), rel=1e-4)  # 1×B ≡ B×1
    frozen.requires_grad_(True)


def test_bart_and_t5_begin_as_their_models_do(tmp_path: Path) -> None:
    assert made("bart", tmp_path).prefix == [2, 1]
    assert made("t5", tmp_path).prefix == [0]
    assert made("llama", tmp_path).prefix == []


def test_controls_spelt_in_a_text_stay_text(generator: HFGenerator) -> None:
    words = generator.tokenizer
    controls = [str(t) for t in (words.eos_token, words.pad_token, words.cls_token, words.sep_token) if t]
    clean = generator.prompt.render("who?", [Passage("1", "plain text")])
    dirty = generator.prompt.render(f"who {' '.join(controls)}?", [Passage("1", f"{' '.join(controls)} text")])
    special = set(words.all_special_ids) - {words.unk_token_id}
    assert sum(i in special for i in dirty.ids) == sum(i in special for i in clean.ids)


def test_chat_template_and_answer_space(tmp_path: Path) -> None:
    template = "{% for m in messages %}<s>[{{ m['role'] }}] {{ m['content'] }}{% endfor %}[bot]"
    folder = tiny.llama(tmp_path / "chat", template=template)
    generator = open_generator(GeneratorSettings(model=str(folder), dtype="float32"), PromptSettings())
    assert generator.prompt.layout == "chat"
    prompt = generator.prompt.render("who?", PASSAGES[:1])
    assert list(prompt.ids).count(1) == 1
    joined = open_generator(GeneratorSettings(model=str(folder), dtype="float32"), PromptSettings(layout="joined"))
    prompt = joined.prompt.render("who?", PASSAGES[:1])
    assert prompt.answer_space == " "
    assert prompt.text.endswith("Answer:")
    first = joined.row(prompt, "Ada")["labels"][0]
    assert joined.tokenizer.convert_ids_to_tokens(first).startswith("▁")


def test_lora_trains_adapters_saves_them_and_merges_to_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    base = tiny.llama(tmp_path / "base")
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}
    generator = open_generator(GeneratorSettings(model=str(base), dtype="float32", lora=lora), PromptSettings())
    learning = [name for name, p in generator.model.named_parameters() if p.requires_grad]
    assert learning
    assert all("lora_" in name for name in learning)
    with torch.no_grad():
        for name, parameter in generator.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    generator.save(tmp_path / "adapter")
    again = open_generator(GeneratorSettings(model=str(tmp_path / "adapter"), dtype="float32"), PromptSettings())
    prompts = [generator.prompt.render(q, PASSAGES) for q in QUERIES]
    ours, theirs = generator.token_logprobs(prompts, ANSWERS), again.token_logprobs(prompts, ANSWERS)
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))
    again.model = again.model.merge_and_unload()
    merged = again.token_logprobs(prompts, ANSWERS)
    assert all(np.allclose(a, b, atol=1e-4) for a, b in zip(ours, merged, strict=True))
    with pytest.raises(RecipeError, match=r"generator\.lora"):
        open_generator(GeneratorSettings(model=str(base), lora={"rank": 4}), PromptSettings())


@pytest.mark.parametrize("kind", ["bart", "t5", "llama"])
def test_where_pad_is_the_end_token_the_end_still_counts(kind: str, tmp_path: Path) -> None:
    folder = getattr(tiny, kind)(tmp_path / kind)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "</s>"}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": 2}))
    usual, same = (
        made(kind, tmp_path / "usual"),
        open_generator(GeneratorSettings(model=str(folder), dtype="float32"), PromptSettings()),
    )
    assert same.pad == same.eos == 2
    prompts = [same.prompt.render(query, []) for query in ("who built the tower of the mill?", "when?")]
    answers = ["odo marrack", "1831"]
    for one, other, answer in zip(
        usual.token_logprobs(prompts, answers), same.token_logprobs(prompts, answers), answers, strict=True
    ):
        assert len(other) == len(same.answer_ids(answer))
        assert other == pytest.approx(one, abs=1e-5)
    batch = same.collate([same.row(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)])
    assert (batch["labels"] == 2).sum(1).tolist() == [1, 1]


def test_answer_ids_do_not_depend_on_the_passage_before_them(tmp_path: Path) -> None:
    """The tokenizer joins "t" and "h" across the border; the answer is tokenised once, apart."""
    prompt = PromptSettings(max_tokens=300, template="{passages} {question}t")
    generator = open_generator(GeneratorSettings(model=str(tiny.llama(tmp_path / "llama")), dtype="float32"), prompt)
    rows = [generator.row(generator.prompt.render("th", [Passage(text, text)]), "h") for text in ("t", "a mill", "th")]
    assert len({tuple(row["labels"]) for row in rows}) == 1
    joined = generator.tokenizer("t" + "h", add_special_tokens=False)["input_ids"]
    apart = [i for text in ("t", "h") for i in generator.tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert joined != apart


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = tiny.bart(tmp_path / "bart")
    words = tiny.tokenizer(begins=True)
    words.add_tokens(["<one>", "<more>"])
    words.save_pretrained(str(folder))
    with pytest.raises(CheckpointError, match="word embeddings, but its tokenizer has ids up to"):
        open_generator(GeneratorSettings(model=str(folder)), PromptSettings())


def test_models_that_cannot_be_loaded_are_named(tmp_path: Path) -> None:
    folder = tiny.t5(tmp_path / "t5")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"t5' cannot be loaded"):
        open_generator(GeneratorSettings(model=str(folder)), PromptSettings())
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="hint: give `embedded`"):
        open_generator(GeneratorSettings(model=str(tmp_path / "empty")), PromptSettings())


def test_a_damaged_adapter_is_named_with_what_to_do(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    tiny.bart(tmp_path / "bart")
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    settings = GeneratorSettings(model=str(tmp_path / "bart"), dtype="float32", lora=lora)
    open_generator(settings, PromptSettings()).save(tmp_path / "whole")
    weights = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())
    first = next(iter(weights))

    def torn(folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"torn")

    def one_lost(folder: Path) -> None:
        save_file({name: value for name, value in weights.items() if name != first}, folder / "adapter_model.safetensors")

    def reshaped(folder: Path) -> None:
        save_file({**weights, first: torch.zeros(3, 3)}, folder / "adapter_model.safetensors")

    def told(**changes: object) -> Callable[[Path], object]:
        return lambda folder: (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))

    cases: list[tuple[Callable[[Path], object], str]] = [
        (torn, "cannot be put on"),
        (one_lost, "lacks 1 of its weights"),
        (reshaped, "cannot be put on"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no weights"),
        (lambda folder: (folder / "adapter_config.json").write_text("{torn"), "cannot be loaded"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "cannot be loaded"),
        (told(peft_type="NOTHING"), "cannot be loaded"),
        (told(base_model_name_or_path=None), "names no base model"),
        (told(base_model_name_or_path=str(tmp_path / "gone")), "generator .*gone' cannot be loaded"),
        (told(r=4), "cannot be put on"),
        (told(target_modules=["nowhere"]), "cannot be put on"),
    ]
    for number, (spoil, message) in enumerate(cases):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        open_generator(GeneratorSettings(model=str(folder), dtype="float32"), PromptSettings())
        spoil(folder)
        with pytest.raises(CheckpointError, match=message) as fault:
            open_generator(GeneratorSettings(model=str(folder), dtype="float32"), PromptSettings())
        assert fault.value.hint
