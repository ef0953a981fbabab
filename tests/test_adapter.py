"""A published adapter beside its base: found, compared, put on, merged; and what a Mistral-style model learns and reads."""

from __future__ import annotations

import json
import pickle
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

import raglan
import tiny
from raglan.decode import Asked, concat, rag_sequence
from raglan.errors import CheckpointError, GeneratorError, RecipeError
from raglan.generator import HFGenerator, open_generator, open_merged
from raglan.generator.adapter import merged
from raglan.likelihood import answer_nll
from raglan.objective import AnswerObjective
from raglan.prompt import Prompt, Rendered
from raglan.recipe import (
    QA_PROMPTS,
    AdapterSettings,
    ConcatDecode,
    GeneratorSettings,
    PromptSettings,
    RagSequenceDecode,
    ShownData,
    load_recipe,
)
from raglan.records import Hit, Passage
from raglan.rendering import Rendering, render
from raglan.shown import shown_rows
from raglan.trainer import stage_trainer

peft = pytest.importorskip("peft")

PASSAGES = [
    Passage("1", "The tower was built by Odo Marrack, a miller, in 1831.", "Tower"),
    Passage("2", "北京大學 was no lighthouse of the year 1790.", "Light"),
]
RENDERINGS = yaml.safe_load((Path(raglan.__file__).parent / "renderings.yaml").read_text(encoding="utf-8"))
ANSWERS = ["Odo Marrack, the miller", "1790", "a"]
QUERIES = ["who built the tower?", "when?", "北京大學 in the year 1790?"]
TEMPLATES = {
    **QA_PROMPTS, "default": PromptSettings().template, "bare": "{passages}\n{question}\n",
    "first": "{question}\n\n{passages}\n答：",
    "instruct": "[INST] {question}\n{passages} [/INST]", "zh": "根据材料回答。\n{passages}\n问题：{question}\n回答：",
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.mistral(tmp_path_factory.mktemp("base") / "mistral")


@pytest.fixture(scope="module")
def published(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder with two adapters below it, as they are published, one of them scaled by √r, one in the old format."""
    root = tmp_path_factory.mktemp("published")
    tiny.adapter(base, root / "RT-KS", use_rslora=True)
    tiny.adapter(base, root / "RT-S", seed=1)
    tensors = tiny_tensors(root / "RT-S")
    torch.save(tensors, root / "RT-S" / "adapter_model.bin")
    (root / "RT-S" / "adapter_model.safetensors").unlink()
    return root


def tiny_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def opened(base: Path, prompt: PromptSettings | None = None, **settings: Any) -> HFGenerator:
    told = GeneratorSettings(model=str(base), **{"dtype": "float32", **settings})
    return open_generator(told, prompt or PromptSettings(max_tokens=300))


@cache
def opened_once(base: Path) -> HFGenerator:
    return opened(base)


def rows_of(generator: HFGenerator, answers: list[str]) -> list[dict[str, list[int]]]:
    asked = zip(QUERIES, answers, strict=False)
    return [generator.row(generator.prompt.render(query, PASSAGES), answer) for query, answer in asked]


def logits(model: Any, ids: list[int], left: int = 0) -> Tensor:
    """The model's own, of one row that has `left` columns of padding before it."""
    row = torch.tensor([[2] * left + ids])
    mask = torch.tensor([[0] * left + [1] * len(ids)])
    places = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        return model(input_ids=row, attention_mask=mask, position_ids=places).logits[0, left:]


@pytest.mark.parametrize("subfolder", ["RT-KS", "RT-S"])
def test_a_published_adapter_loads_and_merges_to_the_same_logits(base: Path, published: Path, subfolder: str) -> None:
    told = {"path": str(published), "subfolder": subfolder}
    beside, within = opened(base, adapter=told), opened(base, adapter={**told, "merge": True})
    assert hasattr(beside.model, "peft_config")
    assert not hasattr(within.model, "peft_config")
    ids = list(beside.prompt.render(QUERIES[0], PASSAGES).ids)
    plain = logits(opened(base).model, ids)
    assert torch.allclose(logits(beside.model, ids), logits(within.model, ids), atol=1e-4)
    assert float((plain - logits(beside.model, ids)).abs().max()) > 0.1


def test_the_merged_weight_is_the_equation(base: Path, published: Path) -> None:
    """W + α/√r·BA with rslora, W + α/r·BA without, by hand."""
    name = "model.layers.1.mlp.up_proj"
    before = AutoModelForCausalLM.from_pretrained(str(base)).get_parameter(f"{name}.weight")
    for subfolder, scale in (("RT-KS", 8 / 4**0.5), ("RT-S", 8 / 4)):
        place = published / subfolder
        tensors = tiny_tensors(place) if subfolder == "RT-KS" else torch.load(place / "adapter_model.bin", weights_only=True)
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        model = opened(base, adapter={"path": str(place), "merge": True}).model
        assert torch.allclose(model.get_parameter(f"{name}.weight"), before + scale * b @ a, atol=1e-6)


def test_a_merge_adds_in_float32_and_rounds_once(base: Path, published: Path) -> None:
    """Against bfloat16 sums, which is what peft makes of bfloat16 weights."""
    told = AdapterSettings(path=str(published), subfolder="RT-KS", merge=True)
    ours = opened(base, dtype="bfloat16", adapter=told).model
    whole = opened(base, adapter={"path": str(published), "subfolder": "RT-KS"}).model
    small = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.bfloat16)
    for name, parameter in ours.named_parameters():
        assert parameter.dtype == torch.bfloat16
        layer = dict(whole.named_modules()).get("base_model.model." + name.removesuffix(".weight"))
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            exact = small.get_parameter(name).float() + layer.get_delta_weight("default")
            assert torch.equal(parameter, exact.to(torch.bfloat16)), name


def test_the_named_base_is_advisory_and_the_wrong_base_is_refused(base: Path, published: Path, tmp_path: Path) -> None:
    told = {"path": str(published), "subfolder": "RT-KS"}
    assert opened(base, adapter=told).model.peft_config["default"].base_model_name_or_path == str(base)
    deep, wide = tiny.mistral(tmp_path / "deep", layers=3), tiny.mistral(tmp_path / "wide", width=64)
    with pytest.raises(CheckpointError, match="it has 2 layers, the base 3") as fault:
        opened(deep, adapter=told)
    assert str(deep) in str(fault.value)
    assert str(published / "RT-KS") in str(fault.value)
    with pytest.raises(CheckpointError, match=r"hidden size 32, the base 64: its model.layers.0"):
        opened(wide, adapter=told)
    words = shutil.copytree(published / "RT-KS", tmp_path / "words")
    other = tiny.tokenizer(begins=True, ends=False, more=["another"])
    other.save_pretrained(str(words))
    with pytest.raises(CheckpointError, match=rf"tokenizer has {len(other)} words, the base's {len(other) - 1}"):
        opened(base, adapter={"path": str(words)})
    rows = tiny.adapter(base, tmp_path / "rows", modules_to_save=["embed_tokens"])
    opened(base, adapter={"path": str(rows)})
    longer = AutoModelForCausalLM.from_pretrained(str(base))
    longer.resize_token_embeddings(longer.config.vocab_size + 8)
    longer.save_pretrained(str(tmp_path / "longer"))
    AutoTokenizer.from_pretrained(str(base)).save_pretrained(str(tmp_path / "longer"))
    with pytest.raises(CheckpointError, match=r"words in its vocabulary, the base"):
        opened(tmp_path / "longer", adapter={"path": str(rows)})


def test_where_an_adapter_lies_is_told_if_it_is_not_found(base: Path, published: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"its subfolders RT-KS, RT-S do") as fault:
        opened(base, adapter={"path": str(published)})
    assert "subfolder: RT-KS" in str(fault.value.hint)
    with pytest.raises(CheckpointError, match="no subfolder does either"):
        opened(base, adapter={"path": str(tmp_path)})
    alone = opened(base, adapter={"path": str(published / "RT-KS")})
    assert alone.model.peft_config["default"].use_rslora
    with pytest.raises(CheckpointError, match="is an adapter, and a second one"):
        opened(published / "RT-KS", adapter={"path": str(published / "RT-KS")})


def test_an_old_file_is_read_without_running_what_it_says(base: Path, published: Path, tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    folder = shutil.copytree(published / "RT-S", tmp_path / "old")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"base_model.model.x": Runs()}))
    with pytest.raises(CheckpointError, match="cannot be"):
        opened(base, adapter={"path": str(folder)})
    torch.save({"base_model.model.x": Runs()}, folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        opened(base, adapter={"path": str(folder)})
    assert not (tmp_path / "ran").exists()


def test_an_old_file_that_lacks_weights_is_refused(base: Path, published: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(published / "RT-S", tmp_path / "old")
    tensors = torch.load(folder / "adapter_model.bin", weights_only=True)
    tensors.pop(next(iter(tensors)))
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="lacks 1 of its weights"):
        opened(base, adapter={"path": str(folder)})


def test_a_quantised_base_is_not_merged_into(base: Path, published: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "few")
    config = json.loads((folder / "config.json").read_text())
    told = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": told}))
    with pytest.raises(CheckpointError, match="quantised"):
        opened(folder, adapter={"path": str(published), "subfolder": "RT-KS", "merge": True})
    model = opened(base, adapter={"path": str(published), "subfolder": "RT-KS"}).model
    layer = model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    layer.weight = torch.nn.Parameter(layer.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(CheckpointError, match="quantised"):
        merged(model, base="few")


def test_a_new_adapter_is_not_trained_on_a_base_that_is_on_no_disk(base: Path, published: Path) -> None:
    with pytest.raises(ValueError, match="merge it there first"):
        GeneratorSettings(model=str(base), lora={"r": 2}, adapter=AdapterSettings(path=str(published), merge=True))


def test_left_padding_writes_what_no_padding_writes(base: Path, published: Path) -> None:
    generator = opened(base, adapter={"path": str(published), "subfolder": "RT-KS"})
    assert generator.pad == generator.eos == 2
    prompts = [generator.prompt.render(query, PASSAGES[:n]) for n, query in enumerate(QUERIES)]
    assert len({len(prompt.ids) for prompt in prompts}) == 3
    together = generator.generate(prompts, max_new_tokens=8)
    assert [one.ids for one in together] == [generator.generate([prompt], max_new_tokens=8)[0].ids for prompt in prompts]
    ids = list(prompts[0].ids)
    assert torch.allclose(logits(generator.model, ids), logits(generator.model, ids, left=7), atol=1e-5)


def test_left_padded_rows_have_the_loss_of_unpadded_ones(base: Path) -> None:
    generator = opened(base)
    rows = rows_of(generator, list("abc"))
    right = generator.collate(rows)
    width = right["input_ids"].shape[1]
    left = {name: value.clone() for name, value in right.items()}
    for place, row in enumerate(rows):
        gap = width - len(row["input_ids"])
        left["input_ids"][place] = torch.tensor([2] * gap + row["input_ids"])
        left["attention_mask"][place] = torch.tensor([0] * gap + [1] * len(row["input_ids"]))
    assert not torch.equal(left["attention_mask"], right["attention_mask"])
    ours, theirs = generator.forward(left), generator.forward(right)
    assert torch.allclose(ours, theirs, atol=1e-5)
    for place, row in enumerate(rows):
        alone = generator.forward(generator.collate([row]))[0]
        assert torch.allclose(alone, ours[place][: len(alone)], atol=1e-5)


def test_the_loss_is_divided_by_the_answer_tokens_of_the_whole_step(base: Path) -> None:
    """3 tokens of loss sum 6 and one of sum 4 are 2.5 a token; the mean of two steps' means would be 3. And 1×3 ≡ 3×1."""
    logprobs, mask = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, 0.0, 0.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    assert float(answer_nll(logprobs, mask, reduction="token")) == pytest.approx(2.5)
    generator = opened(base)
    objective = AnswerObjective(generator)
    rows = rows_of(generator, ANSWERS)
    items = sum(len(row["labels"]) for row in rows)
    whole = objective.loss(objective.collate(rows))[0]
    apart = [objective.collate([row]) for row in rows]
    assert float(sum(objective.loss(batch, items=items)[0] for batch in apart)) == pytest.approx(float(whole), abs=1e-5)
    assert float(sum(objective.loss(batch)[0] for batch in apart) / 3) != pytest.approx(float(whole), abs=1e-3)


def shown_example(n: int) -> dict[str, Any]:
    """Answers and passages of unequal number and length."""
    shown = [{"id": f"p{n}-{i}", "title": f"t{i}", "text": f"door {n} {i} is red"} for i in range(1 + n % 3)]
    synth = {"passages": shown, "target": "red" + " door" * n, "instruction": "Answer.", "rendering": Rendering().record()}
    return {"id": f"synth-{n}-0", "query": f"what is door {n}", "answers": ["red"], "relevant": [], "synth": synth}


def learned_in_a_step(base: Path, folder: Path, size: int, times: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """LoRA's weights before and after a plain step of `times` × `size` rows, and no Adam, which heeds no scale of gradients."""
    (folder / "r.yaml").write_text(f"""
name: step{size}
knowledge: {{path: kb, documents: docs}}
generator: {{model: "{base}", dtype: float32, lora: {{r: 4, target_modules: all-linear, use_rslora: true}}}}
data: {{kind: shown, path: made.jsonl}}
objective: {{kind: answer}}
train: {{max_steps: 1, optim: sgd, learning_rate: 1.0, lr_scheduler_type: constant, warmup_steps: 0, weight_decay: 0,
  max_grad_norm: 0, bf16: false, per_device_train_batch_size: {size}, gradient_accumulation_steps: {times}}}
""")
    recipe = load_recipe(folder / "r.yaml")
    stage = recipe.trainings()["answer"]
    torch.manual_seed(0)
    generator = open_generator(recipe.generator, recipe.prompt)
    for name, parameter in generator.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert isinstance(stage.data, ShownData)
    rows = shown_rows(stage.data, generator, seed=1).rows
    assert len({len(row["labels"]) for row in rows}) == len(rows) == 8
    lora = {name: value for name, value in generator.model.named_parameters() if value.requires_grad}
    before = {name: value.detach().clone() for name, value in lora.items()}
    stage_trainer(recipe, stage, folder / f"{size}x{times}", AnswerObjective(generator), rows, []).train()
    return before, {name: value.detach().cpu() for name, value in lora.items()}


def test_eight_unequal_rows_teach_an_adapter_the_same_together_and_one_by_one(base: Path, tmp_path: Path) -> None:
    (tmp_path / "made.jsonl").write_text("".join(json.dumps(shown_example(n)) + "\n" for n in range(8)), encoding="utf-8")
    before, together = learned_in_a_step(base, tmp_path, 8, 1)
    begun, apart = learned_in_a_step(base, tmp_path, 1, 8)
    assert before.keys() == together.keys() == apart.keys()
    for name, value in before.items():
        assert torch.equal(value, begun[name])
        moved = float((together[name] - value).abs().max())
        assert moved > 0
        assert float((together[name] - apart[name]).abs().max()) < 1e-3 * moved, name


def test_the_end_is_learned_and_padding_is_not(base: Path) -> None:
    generator = opened(base)
    rows = rows_of(generator, ["a", "bcd"])
    batch = generator.collate(rows)
    assert generator.pad == generator.eos
    assert [row["labels"][-1] for row in rows] == [2, 2]
    assert (batch["labels"] == 2).sum(1).tolist() == [1, 1]
    logprobs = generator.forward(batch)
    assert (logprobs != 0).sum(1).tolist() == [len(row["labels"]) for row in rows]
    with torch.no_grad():
        head = generator.model.lm_head.weight
        head[2] += 0.5 * head.abs().mean()
    assert float((generator.forward(batch) - logprobs).abs()[0, len(rows[0]["labels"]) - 1]) > 0


def read_and_learned(generator: HFGenerator, prompt: Rendered, answer: str) -> tuple[list[int], list[int]]:
    """The ids that the model is really given: when it writes, and when it learns."""
    seen: list[list[int]] = []

    def catch(_: Any, __: Any, told: dict[str, Any]) -> None:
        ids, mask = told["input_ids"], told.get("attention_mask")
        seen.extend(row[m.bool()].tolist() for row, m in zip(ids, torch.ones_like(ids) if mask is None else mask, strict=True))

    generator.forward(generator.collate([generator.row(prompt, answer)]))
    handle = generator.model.register_forward_pre_hook(catch, with_kwargs=True)
    generator.forward(generator.collate([generator.row(prompt, answer)]))
    generator.generate([prompt], max_new_tokens=1)
    handle.remove()
    return seen[1], seen[0]


def is_prefix(generator: HFGenerator, prompt: Rendered, answer: str) -> None:
    read, learned = read_and_learned(generator, prompt, answer)
    assert read == list(prompt.ids)
    assert learned[: len(read)] == read
    assert len(learned) > len(read)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_read_at_inference_is_exactly_the_beginning_of_what_is_learned(base: Path, name: str) -> None:
    generator = opened(base, PromptSettings(template=TEMPLATES[name], max_tokens=400))
    for query, answer in (("who built the tower?", "Odo Marrack"), ("北京大學 1790?", "北京")):
        prompt = generator.prompt.render(query, PASSAGES)
        is_prefix(generator, prompt, answer)
        if name == "instruct":
            assert prompt.ids[0] == 1


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("template", RENDERINGS["templates"])
def test_so_it_is_with_every_rendering(base: Path, template: str, language: str) -> None:
    generator = opened_once(base)
    asked = {"en": ("who built it?", "Odo Marrack", "In a word."), "zh": ("北京大學 1790?", "北京", "北京。")}
    query, answer, said = asked[language]
    forms, heads = list(RENDERINGS["forms"]), list(RENDERINGS["heads"])
    for n in range(max(len(forms), len(heads))):  # each form and each head
        way = Rendering(template, forms[n % len(forms)], heads[n % len(heads)], language)
        prompt = render(generator.prompt.within(800), way, query, PASSAGES, instruction=said)
        assert not prompt.truncated
        is_prefix(generator, prompt, answer)


def test_so_it_is_in_a_chat(tmp_path: Path) -> None:
    spoken = "{% for turn in messages %}<s>[{{ turn.role }}] {{ turn.content }}</s>{% endfor %}[a] "
    generator = opened(tiny.llama(tmp_path / "llama", template=spoken))
    assert generator.prompt.layout == "chat"
    for query, answer in (("who built the tower?", "Odo Marrack"), ("北京大學 1790?", "北京")):
        is_prefix(generator, generator.prompt.render(query, PASSAGES), answer)


def test_only_lora_learns(base: Path) -> None:
    lora = {"r": 4, "target_modules": "all-linear", "use_rslora": True}
    generator = opened(base, lora=lora)
    objective = AnswerObjective(generator)
    for name, parameter in generator.model.named_parameters():
        if "lora_B" in name:  # they begin as zeros, behind which no A has a gradient
            torch.nn.init.normal_(parameter, std=0.1)
    rows = rows_of(generator, list("abc"))
    objective.loss(objective.collate(rows))[0].backward()
    for name, parameter in generator.model.named_parameters():
        moves = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert moves == ("lora_" in name), name
    linear = [name for name, module in generator.model.named_modules() if isinstance(module, peft.tuners.lora.Linear)]
    assert len(linear) == 7 * 2


def test_r_16_on_all_linear_layers_of_a_7b_mistral_is_what_it_is_said_to_be() -> None:
    with torch.device("meta"):
        model = MistralForCausalLM(MistralConfig(num_hidden_layers=32))
        learning = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear", use_rslora=True))
    assert sum(p.numel() for p in learning.parameters() if p.requires_grad) == 41_943_040
    assert {p.device.type for p in learning.parameters()} == {"meta"}


def test_the_recipe_names_tokens_and_they_exist(base: Path) -> None:
    generator = opened(base, tokens={"bos": 1, "eos": 2, "pad": "</s>"})
    assert (generator.eos, generator.ends, generator.pad) == (2, [2], 2)
    other = opened(base, tokens={"bos": "<unk>", "eos": "th"})
    unknown, ends = (other.tokenizer.convert_tokens_to_ids(word) for word in ("<unk>", "th"))
    assert other.ends == [ends]
    assert other.row(other.prompt.render("who?", []), "a")["labels"][-1] == ends
    assert other.prompt.render("who?", []).ids[0] == unknown
    for wrong in (9999, -1, "<nowhere>"):
        with pytest.raises(CheckpointError, match=r"generator\.tokens\.pad is .* which is no token"):
            opened(base, tokens={"pad": wrong})


@pytest.mark.parametrize("query", [*QUERIES, "塔是谁建的？" * 6])
@pytest.mark.parametrize("tokens", [80, 200, 320, 450])
def test_passages_stand_whole_or_not_at_all_and_the_question_stays(base: Path, query: str, tokens: int) -> None:
    generator = opened_once(base)
    settings = PromptSettings(whole_passages=True, max_tokens=tokens)
    prompt = Prompt(settings, generator.tokenizer, layout="joined")
    texts = [f"{n} the year {said}. " * (3 * n + 1) for n, said in enumerate(["北京", "of Odo", "", "大學", "1790"])]
    passages = [Passage(str(n), text) for n, text in enumerate(texts)]
    made = prompt.render(query, passages, history=["who was Ada?", "a miller of the year 1655"])
    assert len(made.ids) <= tokens
    assert query in made.text
    assert (made.cut_tokens, made.dropped_passages > 0) == (0, True)
    assert [text for text in texts if text.strip() in made.text] == list(made.sources)
    assert list(made.sources) == texts[: len(texts) - made.dropped_passages]
    one_more = prompt.within(10**6).render(query, passages[: len(made.sources) + 1])
    assert len(one_more.ids) > tokens  # turns leave before passages do
    generator.row(made, "Odo Marrack")
    assert generator.left_cut == 0


def test_the_longest_prefix_by_rank_is_kept(base: Path) -> None:
    """Room for 1,568 of 410 390 520 300 280 tokens: the first three, 1,320, and not the shorter ones behind them."""
    generator = opened_once(base)
    settings = PromptSettings(template="{passages}{question}", separator=" ", max_tokens=1568 + 4, whole_passages=True)
    passages = [Passage(str(n), " ".join(["a"] * length)) for n, length in enumerate([410, 390, 520, 300, 280])]
    made = Prompt(settings, generator.tokenizer, layout="joined").render("b", passages)
    assert made.sources == tuple(passage.text for passage in passages[:3])
    assert made.dropped_passages == 2


@pytest.mark.parametrize("choices", [(), ("yes", "no")])
def test_a_passage_that_found_no_room_was_not_read(base: Path, choices: tuple[str, ...]) -> None:
    """An answer's hits are those in its prompt; the others are told apart, and count as a prompt that was cut."""
    generator = opened(base, PromptSettings(whole_passages=True, max_tokens=120))
    found = [Hit(Passage(str(n), "the year of the tower " * 4), n, 1.0, n + 1) for n in range(6)]
    few = [Hit(Passage("s", "the year"), 9, 1.0, 1)]
    asked = Asked(["when?", "when?", "tower " * 18], [found, few, found], choices=[choices] * 3)
    some, all_of_it, none = concat(generator, asked, ConcatDecode(max_new_tokens=2))
    kept = len(generator.prompt.render("when?", [hit.passage for hit in found]).sources)
    assert 0 < kept < 6
    assert (some.hits, some.dropped, some.truncated) == (tuple(found[:kept]), tuple(found[kept:]), True)
    assert (all_of_it.hits, all_of_it.dropped, all_of_it.truncated) == (tuple(few), (), False)
    assert (none.hits, none.dropped, none.truncated, none.closed_book) == ((), tuple(found), True, True)


def test_a_passage_without_room_in_a_prompt_of_its_own_keeps_its_weight_and_is_not_read(base: Path) -> None:
    generator = opened(base, PromptSettings(whole_passages=True, max_tokens=60))
    found = [Hit(Passage(str(n), "the year " * (40 * n + 1)), n, 1.0, n + 1) for n in range(2)]
    asked = Asked(["when?"], [found], [torch.tensor([0.5, 0.5]).log()])
    (answer,) = rag_sequence(generator, asked, RagSequenceDecode(kind="rag_sequence", max_new_tokens=2))
    assert (answer.hits, answer.dropped, answer.read) == (tuple(found), (found[1],), (found[0],))
    assert (len(answer.prior), answer.truncated) == (2, True)


def test_a_recipe_says_where_an_adapter_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative to the recipe, as models are; ${NAME} is an environment variable."""
    (tmp_path / "adapters" / "RT-S").mkdir(parents=True)
    (tmp_path / "base").mkdir()
    monkeypatch.setenv("BASE", str(tmp_path / "base"))
    text = "name: t\nknowledge: {path: kb, documents: docs}\n"
    text += "generator: {model: '${BASE}', adapter: {path: adapters, subfolder: RT-S}}\n"
    (tmp_path / "r.yaml").write_text(text)
    generator = load_recipe(tmp_path / "r.yaml").generator
    assert generator.model == str(tmp_path / "base")
    assert generator.adapter == AdapterSettings(path=str(tmp_path / "adapters"), subfolder="RT-S")
    (tmp_path / "r.yaml").write_text(text.replace("path: adapters", "path: owner/name").replace("${BASE}", "${NOWHERE_AT_ALL}"))
    with pytest.raises(RecipeError, match="needs the environment variable NOWHERE_AT_ALL"):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="tokens are a causal model's"):
        opened(tiny.t5(tmp_path / "t5"), tokens={"pad": 0})


def test_the_question_is_in_every_prompt(base: Path) -> None:
    long = [Passage(str(n), "the year of the tower " * 40 + "北京大學" * 30) for n in range(8)]
    for overflow in ("error", "cut_left"):
        generator = opened(base, PromptSettings(max_tokens=4096), overflow=overflow)
        for query in QUERIES:
            prompt = generator.prompt.render(query, long)
            question = generator.tokenizer(query, add_special_tokens=False)["input_ids"]
            generator.row(prompt, "Odo Marrack")
            generator.generate([prompt], max_new_tokens=2)
            text = generator.tokenizer.decode(prompt.ids)
            assert prompt.ids[0] == 1
            assert generator.tokenizer.decode(question) in text
        assert generator.left_cut == 0


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("answer", [100, 700, 800])
def test_where_the_answer_has_no_room_passages_leave_whole_and_the_question_stays(base: Path, name: str, answer: int) -> None:
    """Under `overflow: cut_left`, whatever stands first in the template; what opens the prompt and the instruction stay too."""
    settings = PromptSettings(template=TEMPLATES[name], max_tokens=4096)
    generator = opened(base, settings, overflow="cut_left")
    long = [Passage(str(n), f"{n} " + "the year of the tower " * 12 + "北京大學" * 10, "Tower") for n in range(8)]
    query = "北京大學 in the year 1790?"
    prompt = generator.prompt.render(query, long, history=["who was Ada?"])
    assert len(prompt.ids) > 900
    (read,) = generator.fitted([prompt], answer)
    assert generator.fitted([read], answer) == [read]
    assert TEMPLATES[name].partition("{")[0].strip() in read.text
    assert (query in generator.tokenizer.decode(read.ids), read.ids[0]) == (True, 1)
    assert len(read.ids) + answer <= 1024
    assert (read.sources, read.cut_tokens) == (tuple(p.text for p in long[: 8 - read.dropped_passages]), 0)
    assert read.dropped_passages > 0
    row = generator.row(prompt, "a" * (answer - 1))
    assert row["input_ids"] == list(read.ids)
    assert (generator.left_cut, generator.overflowed) == (0, 2)
    asked = Asked([query], [[Hit(passage, n, 1.0, n + 1) for n, passage in enumerate(long)]])
    if (answer, name) == (800, "first"):
        (said,) = concat(generator, asked, ConcatDecode(max_new_tokens=answer))
        assert [hit.passage for hit in (*said.hits, *said.dropped)] == long
        (without,) = generator.fitted([generator.prompt.render(query, long)], 800)
        assert tuple(hit.passage.text for hit in said.hits) == without.sources


def test_a_question_that_leaves_no_room_for_its_answer_is_refused(base: Path) -> None:
    generator = opened(base, PromptSettings(template=TEMPLATES["first"], max_tokens=4096), overflow="cut_left")
    prompt = generator.prompt.render("when? " * 150, [Passage("1", "the year")])
    with pytest.raises(GeneratorError, match=r"the question .* and an answer of 900 do not fit into the model's 1024"):
        generator.row(prompt, "a" * 899)
    assert generator.left_cut == 0


def test_evidence_that_leaves_no_room_for_the_answer_is_no_training_row(base: Path) -> None:
    """What the guard takes away counts as what the budget takes away."""
    generator = opened(base, PromptSettings(max_tokens=4096), overflow="cut_left")
    prompt = generator.prompt.render("who?", [Passage("1", "the year of the tower " * 60)])
    assert generator.fitted([prompt], 40)[0] == prompt
    assert generator.fitted([prompt], 900)[0].dropped_passages == 1
    assert opened(base, PromptSettings(max_tokens=4096)).fitted([prompt], 900) == [prompt]


def test_what_learned_on_an_adapter_is_opened_again_without_the_first(base: Path, published: Path, tmp_path: Path) -> None:
    """`adapter` and `lora`: the published adapter learns on, and is saved with the base that it was put on."""
    told = {"path": str(published), "subfolder": "RT-KS"}
    generator = opened(base, adapter=told, lora={"r": 4})
    learning = [p for p in generator.model.parameters() if p.requires_grad]
    assert learning
    with torch.no_grad():
        for parameter in learning:
            parameter.mul_(1.1)
    generator.save(tmp_path / "on")
    again = opened(tmp_path / "on")
    ids = list(generator.prompt.render(QUERIES[0], PASSAGES).ids)
    assert torch.allclose(logits(again.model, ids), logits(generator.model, ids), atol=1e-5)
    plain = open_merged(GeneratorSettings(model=str(tmp_path / "on"), dtype="float32"), PromptSettings())
    assert torch.allclose(logits(plain.model, ids), logits(generator.model, ids), atol=1e-4)
