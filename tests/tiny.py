"""Small, real things: two-layer models with a byte-like tokenizer, made in a second and saved as any model would be."""

from __future__ import annotations

import json
import math
import random
import string
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from raglan.generator.base import Contexts, Cost, MarkedGenerator
from raglan.marked_prompt import MarkedPrompt, read_schema
from raglan.recipe import SelfRagPromptSettings
from raglan.records import Hit, Marked, Passage
from raglan.reflection import NAMES, ORDER, Schema

LETTERS = string.ascii_letters + string.digits + string.punctuation + "éü中文北京大學"
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>"]


def tokenizer(*, begins: bool = False, ends: bool = True, more: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """One token a character, a space marks the word that follows it; like BART with `begins`, like T5 without.

    Of `more` pieces nothing is made but what is looked up by name.
    """
    pieces = [*SPECIALS, "▁", *LETTERS, *(f"▁{letter}" for letter in string.ascii_letters + string.digits), "th", "▁the", *more]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("▁", letter) for letter in string.ascii_letters + string.digits] + [("t", "h"), ("▁t", "h")]
    merges = [pair for pair in merges if "".join(pair) in vocabulary]
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never")
    inner.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="never")
    single = (["<s>"] if begins else []) + ["$A"] + (["</s>"] if ends else [])
    inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>" if begins else None, eos_token="</s>", unk_token="<unk>"
    )


def bart(folder: Path, *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    words = tokenizer(begins=True)
    config = BartConfig(
        vocab_size=len(words), d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=512,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None, dropout=0.0,
    )  # fmt: skip
    return _saved(BartForConditionalGeneration(config), words, folder)


def t5(folder: Path, *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    words = tokenizer()
    config = T5Config(
        vocab_size=len(words), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=2,
        decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    return _saved(T5ForConditionalGeneration(config), words, folder)


def llama(folder: Path, *, seed: int = 0, template: str | None = None, more: Sequence[str] = ()) -> Path:
    """`more`: characters beyond ASCII that its tokenizer is to know."""
    torch.manual_seed(seed)
    words = tokenizer(begins=True, ends=False, more=more)
    words.chat_template = template
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return _saved(LlamaForCausalLM(config), words, folder)


def mistral(folder: Path, *, seed: int = 0, layers: int = 2, width: int = 32) -> Path:
    """As the Mistral bases are published: bos 1, eos 2, no padding of its own, grouped heads."""
    torch.manual_seed(seed)
    words = tokenizer(begins=True, ends=False)
    words.pad_token = None
    config = MistralConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, sliding_window=None, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2,
    )  # fmt: skip
    return _saved(MistralForCausalLM(config), words, folder)


def adapter(base: Path, folder: Path, *, seed: int = 0, named: str = "mistralai/Mistral-7B-v0.1", **lora: Any) -> Path:
    """A LoRA adapter as peft publishes it, with factors that do something; `named`: the base that its config tells of."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    told = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(str(base)), LoraConfig(**told))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.peft_config["default"].base_model_name_or_path = named
    model.save_pretrained(str(folder))
    return folder


def marked_tokenizer(*, words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A Llama's with the 15 reflection tokens, in the published order; <pad> it has already. `words` are for scripts."""
    made = tokenizer(begins=True, ends=False, more=["\n", *(word.replace(" ", "▁") for word in words)])
    made.add_tokens([name for role in ORDER for name in NAMES[role]], special_tokens=True)
    return made


def llama_tokenizer(*, legacy: bool = True, special: bool | None = None, base: int = 0) -> LlamaTokenizer:
    """A SentencePiece-like tokenizer with bytes behind its letters. `legacy` puts a blank behind control tokens too.

    Args:
        special: reflection tokens, registered as special or as ordinary ones; none where it is None.
        base: pieces before them, 32,000 of a real one; no text is made of those that fill up.
    """
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    pieces = ["<unk>", "<s>", "</s>", *bytes_, "▁", *string.printable[:94], "th", "in", "▁th", "▁the", "▁a", "▁in"]
    merges = [("t", "h"), ("i", "n"), ("▁", "th"), ("▁th", "e"), ("▁", "a"), ("▁", "in")]
    pieces = list(dict.fromkeys(pieces))
    pieces += [f"▁filler{number}" for number in range(base - len(pieces))]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    words = LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=legacy, add_bos_token=True)
    if special is None:
        return words
    names = list(Schema.numbered(0).spellings)
    if special:
        words.add_special_tokens({"extra_special_tokens": names})
    else:
        words.add_tokens(names)
    words.add_special_tokens({"pad_token": "<pad>"})
    return words


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level one, as GPT-2, Llama 3 and Qwen have: any text, no unknown token, no token that begins a row."""
    pieces = ["<|endoftext|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "in", "Ġth", "Ġthe"]
    merges = [("t", "h"), ("i", "n"), ("Ġ", "th"), ("Ġth", "e")]
    inner = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, merges))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|endoftext|>", pad_token="<|endoftext|>", extra_special_tokens=["<|im_end|>"]
    )


def byte_gpt2(folder: Path, *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    words = byte_tokenizer()
    config = GPT2Config(
        vocab_size=len(words), n_embd=32, n_layer=2, n_head=2, n_positions=1024, pad_token_id=0, bos_token_id=None,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return _saved(GPT2LMHeadModel(config), words, folder)


def self_rag(
    folder: Path, *, seed: int = 0, special: bool = True, tied: bool = False, extended: bool = True, base: int = 0,
    width: int = 32,
) -> Path:  # fmt: skip
    """A tiny Llama as the published Self-RAG checkpoints are laid out: a base vocabulary, and 16 rows behind it.

    With a `base` of 32,000 their ids are those of the published 7B.
    """
    torch.manual_seed(seed)
    words = llama_tokenizer(special=special if extended else None, base=base)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=words.pad_token_id, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return _saved(LlamaForCausalLM(config), words, folder)


@torch.no_grad()
def sure_self_rag(
    folder: Path, *, seed: int = 0, sure: float = 12.0, likes: Collection[str] = ("is_sup", "is_use"), by: float = 1.6,
    base: int = 0, width: int = 32,
) -> Path:  # fmt: skip
    """Such a checkpoint that is `sure` of what it writes and likes these roles (`eos` is one), so that rows end."""
    self_rag(folder, seed=seed, base=base, width=width)
    model = LlamaForCausalLM.from_pretrained(str(folder))
    schema = read_schema(llama_tokenizer(special=True, base=base), model.config.vocab_size)
    head = model.get_output_embeddings().weight
    head *= sure
    head[[one for role in likes for one in ((2,) if role == "eos" else schema.ids[role])]] *= by
    model.save_pretrained(str(folder))
    return folder


def hits(*titles: str, text: str = "about {}") -> list[Hit]:
    """Passages of these titles, the first one the best."""
    passages = [Passage(title, text.format(title), title) for title in titles]
    return [Hit(passage, row, 1.0 / (row + 1), row + 1) for row, passage in enumerate(passages)]


def marked_llama(folder: Path, *, seed: int = 0, width: int = 64) -> Path:
    """A Llama with the reflection tokens that is sure of what it writes: no two tokens are nearly as likely."""
    torch.manual_seed(seed)
    words = marked_tokenizer()
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.3,
    )  # fmt: skip
    return _saved(LlamaForCausalLM(config), words, folder)


def gpt2(folder: Path, *, seed: int = 0) -> Path:
    """Learned positions, and a tokenizer that begins no row."""
    torch.manual_seed(seed)
    words = tokenizer(ends=False)
    config = GPT2Config(
        vocab_size=len(words), n_embd=32, n_layer=2, n_head=2, n_positions=512, pad_token_id=0, bos_token_id=None,
        eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return _saved(GPT2LMHeadModel(config), words, folder)


def bert_words() -> list[str]:
    letters = string.ascii_lowercase + string.digits + string.punctuation
    whole = [
        "the",
        "a",
        "of",
        "in",
        "was",
        "by",
        "who",
        "what",
        "when",
        "where",
        "how",
        "many",
        "lighthouse",
        "tower",
        "built",
        "founded",
        "miller",
        "year",
    ]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters), *whole]
    return list(dict.fromkeys(pieces))


def bert_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer

    words = bert_words()
    inner = Tokenizer(WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()
    inner.decoder = decoders.WordPiece(prefix="##")
    inner.post_processor = processors.TemplateProcessing(
        single=["[CLS]", "$A", "[SEP]"], pair=["[CLS]", "$A", "[SEP]", "$B", "[SEP]"],
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"
    )


def bert(folder: Path, *, seed: int = 0, layers: int = 2) -> Path:
    """A BERT folder, for the reader and for encoders."""
    torch.manual_seed(seed)
    words = bert_tokenizer()
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=512, pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return _saved(BertModel(config), words, folder)


def sentence_encoder(folder: Path, *, seed: int = 0, similarity: str = "cosine", prompts: dict[str, str] | None = None) -> Path:
    """A sentence-transformers folder: tiny BERT, mean pooling."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    bert(folder / "bert", seed=seed)
    transformer = Transformer(str(folder / "bert"), max_seq_length=128)
    model = SentenceTransformer(
        modules=[transformer, Pooling(32)], similarity_fn_name=similarity, prompts=prompts or {}, device="cpu"
    )
    model.save(str(folder / "encoder"), create_model_card=False)
    return folder / "encoder"


def bag_of_words(folder: Path, texts: list[str], *, seed: int = 0) -> Path:
    """A sentence-transformers folder without layers: the mean of random vectors of the texts' own words."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    words = _whole_words(texts)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(words), hidden_size=256, num_hidden_layers=0, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=256, hidden_dropout_prob=0.0, initializer_range=1.0, layer_norm_eps=1e4,
    )  # fmt: skip
    model = BertModel(config)
    with torch.no_grad():
        model.embeddings.position_embeddings.weight.zero_()
        model.embeddings.token_type_embeddings.weight.zero_()
        model.embeddings.LayerNorm.weight.fill_(100.0)  # with so large an epsilon words keep their own lengths
    _saved(model, words, folder / "bert")
    whole = SentenceTransformer(
        modules=[Transformer(str(folder / "bert"), max_seq_length=256), Pooling(256)], similarity_fn_name="cosine", device="cpu"
    )
    whole.save(str(folder / "encoder"), create_model_card=False)
    return folder / "encoder"


def _whole_words(texts: Sequence[str], *, digits: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of the texts' own words in lower case, Han characters each by itself; `digits`: those of numbers, too."""
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import BertNormalizer

    cut: Any = pre_tokenizers.BertPreTokenizer()
    cut = pre_tokenizers.Sequence([cut, pre_tokenizers.Digits(individual_digits=True)]) if digits else cut
    normal = BertNormalizer(lowercase=True)
    found = sorted({word for text in texts for word, _ in cut.pre_tokenize_str(normal.normalize_str(text))})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *found]
    inner = Tokenizer(WordLevel({word: number for number, word in enumerate(dict.fromkeys(words))}, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normal, cut
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **marks)


def concepts(folder: Path, groups: Sequence[Sequence[str]]) -> Path:
    """A sentence-transformers folder whose cosines can be counted: words of one group have one vector, those of other groups
    stand at right angles to it, and what is in no group says nothing. At most 128 groups."""
    from sentence_transformers import SentenceTransformer

    path = bag_of_words(folder, [" ".join(group) for group in groups])
    model = SentenceTransformer(str(path), device="cpu")
    table = model[0].auto_model.embeddings.word_embeddings.weight
    with torch.no_grad():
        table.zero_()
        for place, group in enumerate(groups):
            for row in model.tokenizer.convert_tokens_to_ids(list(group)):
                table[row, 2 * place], table[row, 2 * place + 1] = 1.0, -1.0  # no mean, which the norm would take away
    model.save(str(path), create_model_card=False)
    return path


def word_reader(folder: Path, texts: Sequence[str], *, seed: int = 0) -> Path:
    """A copying reader of two layers over the texts' own words and digits, whose vectors lie well apart from the start."""
    from raglan.generator.reader import reader_from_encoder

    torch.manual_seed(seed)
    words = _whole_words(texts, digits=True)
    words.backend_tokenizer.post_processor = bert_tokenizer().backend_tokenizer.post_processor
    config = BertConfig(
        vocab_size=len(words), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=256, hidden_dropout_prob=0.1, initializer_range=0.05,
    )  # fmt: skip
    model = BertModel(config)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.normal_(0, 0.2)
    made, words = reader_from_encoder(str(_saved(model, words, folder / "bert")))
    return _saved(made, words, folder / "reader")


def reader(*, seed: int = 0, folder: Path) -> Any:
    from raglan.generator.reader import reader_from_encoder

    return reader_from_encoder(str(bert(folder, seed=seed)))


def small_recipe(folder: Path, *, name: str = "small") -> Path:
    """A tiny BERT, 30 towers, 60 questions: a recipe with an `answer` and an `lsr` stage that trains in seconds."""
    chance = random.Random(3)
    letters = "bcdfgh"
    rows, questions = [], []
    for n in range(30):
        tower, miller = ("".join(chance.choices(letters, k=3)) for _ in range(2))
        tower = tower if tower not in {row["title"] for row in rows} else tower[::-1]  # one question would be on both sides
        rows.append({"id": f"p{n}", "title": tower, "text": f"the tower {tower} was built by miller {miller} in {1700 + n}"})
        for kind, (query, answer) in enumerate(
            ((f"who built {tower}", miller), (f"what year was {tower} built", str(1700 + n)))
        ):
            questions.append({"id": f"q{n}-{kind}", "query": query, "answers": [answer], "relevant": [f"p{n}"]})
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split, part in (("train", questions[:40]), ("dev", questions[40:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    encoder = folder / "encoder" / "encoder"
    if not encoder.is_dir():
        sentence_encoder(folder / "encoder")
        model, words = reader(folder=folder / "bert")
        model.save_pretrained(str(folder / "reader"))
        words.save_pretrained(str(folder / "reader"))
    path = folder / f"{name}.yaml"
    path.write_text(f"""
name: {name}
seed: 1
knowledge: {{path: kb, documents: corpus.jsonl, chunk: null, encoder: {{model: encoder/encoder, dtype: float32}}}}
retriever: {{k: 2}}
prompt: {{max_tokens: 96}}
generator: {{model: reader, dtype: float32}}
decode: {{kind: concat, max_new_tokens: 8}}
train: {{bf16: false, save_steps: 4, logging_steps: 2, per_device_train_batch_size: 8, learning_rate: 3e-3}}
stages:
  read:
    data: {{kind: questions, path: train.jsonl, passages: 2}}
    objective: {{kind: answer}}
    train: {{num_train_epochs: 6}}
  find:
    data: {{kind: questions, path: train.jsonl, dev: dev.jsonl}}
    objective: {{kind: lsr, k: 5, candidates: dense, target: mean_prob, tau: 0.1}}
    train: {{num_train_epochs: 3, learning_rate: 1e-3}}
evaluate: {{questions: dev.jsonl, k: [1, 5]}}
""")
    return path


def asks(
    folder: Path, *, generator: Path | str, decode: str, evaluate: str = "modes: [closed_book, retrieved], limit: 8"
) -> Path:
    """The corpus and the questions of `small_recipe`, and a recipe that asks a Self-RAG checkpoint about them."""
    small_recipe(folder)
    path = folder / "asks.yaml"
    path.write_text(f"""
name: asks
knowledge: {{path: kb, documents: corpus.jsonl, chunk: null, encoder: {{model: encoder/encoder, dtype: float32}}}}
retriever: {{k: 2}}
generator: {{model: "{generator}", dtype: float32}}
decode: {{kind: self_rag, {decode}}}
evaluate: {{questions: dev.jsonl, k: [1], {evaluate}}}
""")
    return path


def _saved(model: Any, words: PreTrainedTokenizerFast, folder: Path) -> Path:
    model.save_pretrained(str(folder))
    words.save_pretrained(str(folder))
    return folder


UNLIKELY = -30.0  # log p of what a script says nothing about


@dataclass(frozen=True)
class Step:
    """A token that a scripted model writes: its log p, and the probabilities of marks where it is chosen; NaN: not returned."""

    token: str
    logprob: float
    marks: Mapping[str, float] = field(default_factory=dict)


def group(role: str, probabilities: Sequence[float], *, chosen: str | None = None) -> Step:
    """A reflection token, by default the likeliest of its group, with its own log p. Probabilities are in `NAMES`' order."""
    marks = dict(zip(NAMES[role], probabilities, strict=True))
    token = chosen or max(marks, key=lambda name: -1.0 if math.isnan(marks[name]) else marks[name])
    return Step(token, UNLIKELY if math.isnan(marks[token]) else _log(marks[token]), marks)


def said(
    *words: str | tuple[str, float], rel: Sequence[float] | None = None, sup: Sequence[float] | None = None,
    use: Sequence[float] | None = None, then: str | Sequence[float] = "</s>",
) -> tuple[Step, ...]:  # fmt: skip
    """What a model writes behind a prompt: [rel] words [sup] [use] and its end.

    Args:
        words: tokens as they read (" Par", "is"), with log p if it is not −.1.
        rel: p(Relevant), p(Irrelevant). sup: p(Fully), p(Partially), p(No support). use: p(Utility:1 … 5).
        then: the last token, or p(No Retrieval), p(Retrieval), p(Continue) at a segment's boundary. The end has log p −.01.
    """
    spoken = [Step(word, -0.1) if isinstance(word, str) else Step(*word) for word in words]
    return (
        *([group("is_rel", rel[::-1])] if rel is not None else []),
        *spoken,
        *([group("is_sup", sup)] if sup is not None else []),
        *([group("is_use", use)] if use is not None else []),
        Step(then, -0.01) if isinstance(then, str) else group("retrieve", then),
    )


def decides(no: float, yes: float, cont: float = 0.0) -> tuple[Step, ...]:
    """What stands behind a question: the decision."""
    return (group("retrieve", (no, yes, cont)),)


Path_ = tuple[str, ...]
Script = Mapping[Path_, "Sequence[Step] | list[Sequence[Step]]"]


class Unforeseen(AssertionError):
    """A prompt that the script does not know."""


class ScriptedGenerator(MarkedGenerator):
    """A generator that says what a script has it say, with the log-probabilities that the script has it have.

        script = {
            (): decides(0.05, 0.9),                                             # behind the question
            ("Paris",): said("Par", "is", rel=(.9, .05), sup=(.7, .2, .05), use=(.01, .02, .05, .12, .8)),
            ("[No Retrieval]",): said("Lyon"),
            ("Paris", "Rome"): said(…),                                         # in a tree: Rome below Paris
        }

    A path names what was put in front of each segment: a passage's title (all of its text where it has none), or
    "[No Retrieval]" or "[Continue to Use Evidence]". Of several answers in a list, drawing takes one by seed and place. Where a
    passage has left the context, what was written below it tells which it was. Every context that is asked for is kept in
    `prompts`; one that no path fits raises `Unforeseen`.

    Args:
        script: of every question, or a script for each question.
        scored: path and option → log-probabilities of the option's tokens, for `score`.
        otherwise: for a prompt that no path fits: its tail behind the question, spelt → path.
        exact: what `exact_marks` says.
        tokenizer: that of another model, whose tokens the script's are; default one that has all of the script's.
    """

    def __init__(
        self, script: Script | Mapping[str, Script], *, scored: Mapping[Path_, Sequence[float]] | None = None,
        otherwise: Callable[[str], Path_] | None = None, exact: bool = True, settings: SelfRagPromptSettings | None = None,
        tokenizer: Any = None,
    ):  # fmt: skip
        plain = all(isinstance(key, tuple) for key in script)
        self.scripts: dict[str, dict[Path_, list[Sequence[Step]]]] = {
            question: {path: line if isinstance(line, list) else [line] for path, line in lines.items()}
            for question, lines in ({"": script} if plain else script).items()  # type: ignore[dict-item,union-attr]
        }
        every = [step for lines in self.scripts.values() for line in lines.values() for one in line for step in one]
        names = [name for role in ORDER for name in NAMES[role]]
        self.tokenizer = tokenizer or marked_tokenizer(words=sorted({step.token for step in every} - {*names, *SPECIALS}))
        self._words = self.tokenizer.get_vocab()
        self._schema = read_schema(self.tokenizer, len(self.tokenizer))
        self.eos, self.exact_marks, self.cost = 2, exact, Cost()
        self._prompt = MarkedPrompt(self.schema, self.tokenizer, settings or SelfRagPromptSettings(), eos=self.eos)
        self.scored, self.otherwise = scored or {}, otherwise
        self.prompts: list[tuple[int, ...]] = []

    @property
    def schema(self) -> Schema:
        return self._schema

    @property
    def marked_prompt(self) -> MarkedPrompt:
        return self._prompt

    def contexts(self, prompts: Sequence[Sequence[int]], *, marks: Sequence[int]) -> ScriptedContexts:
        self.cost.calls += 1
        self.cost.positions += sum(map(len, prompts))
        return ScriptedContexts(self, tuple(marks), [self._root(tuple(ids)) for ids in prompts])

    def spelt(self, ids: Sequence[int]) -> str:
        """Ids as text, control tokens and all."""
        return str(self.tokenizer.decode(list(ids)))

    def identity(self, token: str) -> int:
        return int(self._words[token if token in self._words else token.replace(" ", "▁")])

    def line(self, question: str, path: Path_, *, draw: int = 0) -> Sequence[Step]:
        lines = self.scripts[question][path]
        return lines[draw % len(lines)]

    def rest(self, place: _Place, *, draw: int = 0) -> Sequence[Step]:
        """What is still to be said behind a context. Raises Unforeseen where that is nothing."""
        rest = self.line(place.question, place.path, draw=draw)[place.said :]
        if not rest:
            raise Unforeseen(f"nothing is said behind {place.path}")
        return rest

    def behind(self, ids: Sequence[int]) -> Step:
        """The token behind these ids. Raises Unforeseen where no path fits them."""
        return self.rest(self._root(tuple(ids)))[0]

    def _root(self, ids: tuple[int, ...]) -> _Place:
        """Which question is asked, and where its own ids end."""
        controls = self.schema.controls
        end = next((at for at, token in enumerate(ids) if token in controls), len(ids))
        text = self.spelt(ids[:end])
        known = [question for question in self.scripts if question in text]
        if not known:
            raise Unforeseen(f"no script for {text!r}")
        return self.place(max(known, key=len), ids, end)

    def place(self, question: str, ids: tuple[int, ...], end: int) -> _Place:
        self.prompts.append(ids)
        path, at = self._path(question, ids[end:])
        return _Place(question, ids, end, path, at)

    def _path(self, question: str, tail: tuple[int, ...]) -> tuple[Path_, int]:
        """The path of a context and how many of its last line's steps stand in it already."""
        path: Path_ = ()
        said = 0
        while tail:
            if path and tail == (self.schema.yes,):  # a boundary that was kept, and whose passage is still to come
                return path, said + 1
            opened, tail = self._opened(tail)
            lines = self.scripts[question]
            known = [key for key in lines if key[:-1] == path and len(key) == len(path) + 1 and opened in (None, key[-1])]
            told = [(key, count) for key in known if (count := self._told(question, key, tail)) is not None]
            if len(told) != 1 and self.otherwise is not None:
                return self.otherwise(self.spelt(tail)), 0
            if len(told) != 1:
                raise Unforeseen(f"behind {path}: {self.spelt(tail)!r} under {opened!r} fits {[key for key, _ in told]}")
            path, said = told[0]
            tail = tail[said:]
        return path, said

    def _opened(self, tail: tuple[int, ...]) -> tuple[str | None, tuple[int, ...]]:
        """What stands in front of a segment: a title, a decision, or nothing where a passage has left; and the rest."""
        schema = self.schema
        if tail[0] in (schema.no, schema.cont):
            return schema.spelling(tail[0]), tail[1:]
        rest = tail[1:] if tail[0] == schema.yes else tail
        if rest and rest[0] == schema.opens:
            end = rest.index(schema.closes)
            return self.marked_prompt.text(rest[1:end]).split("\n")[0], rest[end + 1 :]
        if not rest or rest[0] == schema.yes:  # asked for evidence and given none
            raise Unforeseen(f"[Retrieval] without a passage: {self.spelt(tail)!r}")
        return None, rest

    def _told(self, question: str, path: Path_, tail: tuple[int, ...]) -> int | None:
        """How many ids of `tail` are this line's, all of them or all that there are; None where it goes another way."""
        for line in self.scripts[question][path]:
            words = [self.identity(step.token) for step in line]
            words = words[:-1] if line[-1].token in (*NAMES["retrieve"], NAMES["markup"][0], "</s>") else words
            count = min(len(words), len(tail))
            if tuple(words[:count]) == tail[:count]:
                return count
        return None


@dataclass(frozen=True)
class _Place:
    """A context of a scripted generator: where its question ends, and how far the line of its path has come."""

    question: str
    ids: tuple[int, ...]
    end: int
    path: Path_
    said: int


class ScriptedContexts(Contexts):
    def __init__(self, generator: ScriptedGenerator, marks: tuple[int, ...], places: Sequence[_Place]):
        self.generator, self.marks, self.places = generator, marks, list(places)
        self._read = False

    @property
    def ids(self) -> list[tuple[int, ...]]:
        return [place.ids for place in self.places]

    @property
    def paths(self) -> list[Path_]:
        return [place.path for place in self.places]

    @property
    def mark_logprobs(self) -> np.ndarray:
        self._count()
        rows = [self._marked(self._steps(place)[0]) for place in self.places]
        return np.array(rows, np.float32).reshape(len(rows), len(self.marks))

    @property
    def best(self) -> np.ndarray:
        self._count()
        return np.array([self.generator.identity(self._steps(place)[0].token) for place in self.places], np.int64)

    def branch(self, places: Sequence[int], suffixes: Sequence[Sequence[int]]) -> ScriptedContexts:
        generator, found = self.generator, []
        for number, suffix in zip(places, suffixes, strict=True):
            old = self.places[number]
            generator.cost.positions += len(suffix)
            generator.cost.reused += len(old.ids) if suffix else 0
            found.append(generator.place(old.question, (*old.ids, *suffix), old.end) if suffix else old)
        generator.cost.calls += any(map(len, suffixes))
        return ScriptedContexts(generator, self.marks, found)

    def only(self, places: Sequence[int]) -> ScriptedContexts:
        kept = ScriptedContexts(self.generator, self.marks, [self.places[number] for number in places])
        kept._read = self._read
        return kept

    def write(
        self, *, stop_ids: Collection[int], max_new_tokens: int | Sequence[int], first: Collection[int] | None = None,
        temperature: float = 0.0, seed: int | None = None,
    ) -> list[Marked]:  # fmt: skip
        self._count()
        limits = [max_new_tokens] * len(self) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        draws = [(seed or 0) + number if temperature else 0 for number in range(len(self))]
        rows = [
            self._written(place, {*stop_ids}, limit, first, draw)
            for place, limit, draw in zip(self.places, limits, draws, strict=True)
        ]
        further = [max(0, len(row.ids) - 1) for row in rows]
        cost = self.generator.cost
        cost.calls += max(further, default=0)
        cost.positions += sum(further)
        cost.logprobs += sum(further) * (len(self.marks) + 1)
        cost.generated += sum(len(row.ids) for row in rows)
        return rows

    def score(self, places: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[np.ndarray]:
        generator = self.generator
        generator.cost.calls += any(len(ids) > 1 for ids in continuations)
        rows = []
        for number, ids in zip(places, continuations, strict=True):
            option = generator.marked_prompt.text(ids)
            values = generator.scored[(*self.places[number].path, option)]
            assert len(values) == len(ids), f"{option!r} has {len(ids)} tokens: {ids}"
            rows.append(np.array(values, np.float32))
        return rows

    def _steps(self, place: _Place, draw: int = 0) -> Sequence[Step]:
        return self.generator.rest(place, draw=draw)

    def _written(
        self, place: _Place, stop_ids: Collection[int], limit: int, first: Collection[int] | None, draw: int
    ) -> Marked:  # fmt: skip
        ids: list[int] = []
        logprobs, marks = [], []
        finish = "length"
        for step in self._steps(place, draw)[:limit]:
            row = self._marked(step)
            token, logprob = self.generator.identity(step.token), step.logprob
            if first is not None and not ids and token not in first:
                known = {one: row[self.marks.index(one)] for one in first if one in self.marks}
                token = max(known, key=lambda one: known[one])
                logprob = known[token]
            ids.append(token)
            logprobs.append(logprob)
            marks.append(row)
            if token == self.generator.eos or token in stop_ids:
                finish = "eos" if token == self.generator.eos else "stop"
                break
        else:
            if len(ids) < limit:
                raise Unforeseen(f"the script of {place.path} goes on behind its last token, {self.generator.spelt(ids[-1:])}")
        shaped = np.array(marks, np.float32).reshape(len(ids), len(self.marks))
        return Marked(tuple(ids), np.array(logprobs, np.float32), shaped, finish)  # type: ignore[arg-type]

    def _marked(self, step: Step) -> list[float]:
        known = {self.generator.identity(name): _log(p) for name, p in step.marks.items()}
        known.setdefault(self.generator.identity(step.token), step.logprob)
        return [known.get(mark, UNLIKELY) for mark in self.marks]

    def _count(self) -> None:
        if not self._read:
            self._read = True
            self.generator.cost.logprobs += len(self.places) * (len(self.marks) + 1)


class ScriptedCausalLM(PreTrainedModel):
    """A causal model of transformers that foretells what a script says behind the ids which stand before.

    Those it reads from its cache, through the mask, as attention does: the cache holds the ids themselves. A prefix that was
    lost, shown to a sibling, or read through its pads is another prefix, and no path of the script fits it. Its head is a
    table, log p of each word behind each step of the script; what a step leaves of the whole is spread over all other words.
    """

    config_class = PreTrainedConfig

    def __init__(self, script: ScriptedGenerator):
        words = len(script.tokenizer)
        super().__init__(PreTrainedConfig(eos_token_id=script.eos, bos_token_id=1, pad_token_id=0, vocab_size=words))
        self.script, self.generation_config = script, None
        steps = [step for lines in script.scripts.values() for own in lines.values() for line in own for step in line]
        self.places = {id(step): number for number, step in enumerate(steps, 1)}  # 0: nothing is foretold
        self.embedding, self.head = torch.nn.Embedding(words, 1), torch.nn.Linear(len(steps) + 1, words, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[0.0] * words, *map(self._foretold, steps)]).T)
        self.eval()

    def get_input_embeddings(self) -> Any:
        return self.embedding

    def get_output_embeddings(self) -> Any:
        return self.head

    def _foretold(self, step: Step) -> list[float]:
        """log p of every word; p = 0 is −9,000, for a head adds up zeros times what it holds."""
        script = self.script
        known = {script.identity(name): p for name, p in step.marks.items()}
        known.setdefault(script.identity(step.token), math.exp(step.logprob))
        others = len(script.tokenizer) - len(known)
        left = (1 - sum(known.values())) / others
        told = [known.get(word, left if left > 1e-9 else 0.0) for word in range(len(script.tokenizer))]
        assert max(told) == told[script.identity(step.token)], f"{step.token} is not the likeliest where it is written"
        return [math.log(p) if p > 0 else -9000.0 for p in told]

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, position_ids: torch.Tensor | None = None,
        past_key_values: Any = None, logits_to_keep: int = 0, **_: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """Logits of the last `logits_to_keep` columns, 0 for all; but of the last one nothing is foretold."""
        ids = input_ids.float()[:, None, :, None]
        if past_key_values is not None:
            ids, _values = past_key_values.update(ids, ids, 0)
        seen = torch.ones(ids.shape[0], ids.shape[2], dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        rows = [row[real].long().tolist() for row, real in zip(ids[:, 0, :, 0], seen, strict=True)]
        if position_ids is not None and position_ids[:, -1].tolist() != [len(row) - 1 for row in rows]:
            raise Unforeseen(f"{position_ids[:, -1].tolist()} are no positions of {list(map(len, rows))} ids")
        hidden = torch.zeros(len(rows), logits_to_keep or input_ids.shape[1], self.head.in_features)
        hidden[:, :-1, 0] = 1
        if any(self.config.pad_token_id in row for row in rows):
            raise Unforeseen("a pad is no id that anybody wrote")
        for state, row in zip(hidden, rows, strict=True):
            state[-1, self.places[id(self.script.behind(row))]] = 1
        return CausalLMOutputWithPast(logits=self.head(hidden), past_key_values=past_key_values)


def _log(probability: float) -> float:
    return probability if math.isnan(probability) else math.log(probability) if probability > 0 else -math.inf
