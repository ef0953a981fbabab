"""Small, real things: two-layer models with a byte-like tokenizer, made in a second and saved as any model would be."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from raglan.reflection import Schema

LETTERS = string.ascii_letters + string.digits + string.punctuation + "éü中文北京大學"
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>"]


def tokenizer(*, begins: bool = False, ends: bool = True) -> PreTrainedTokenizerFast:
    """One token a character, a space marks the word that follows it; like BART with `begins`, like T5 without."""
    pieces = [*SPECIALS, "▁", *LETTERS, *(f"▁{letter}" for letter in string.ascii_letters + string.digits), "th", "▁the"]
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


def llama(folder: Path, *, seed: int = 0, template: str | None = None) -> Path:
    torch.manual_seed(seed)
    words = tokenizer(begins=True, ends=False)
    words.chat_template = template
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return _saved(LlamaForCausalLM(config), words, folder)


def llama_tokenizer(*, legacy: bool = True, special: bool | None = None) -> LlamaTokenizer:
    """A SentencePiece-like tokenizer with bytes behind its letters. `legacy` puts a blank behind control tokens too.

    Args:
        special: reflection tokens, registered as special or as ordinary ones; none where it is None.
    """
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    pieces = ["<unk>", "<s>", "</s>", *bytes_, "▁", *string.printable[:94], "th", "in", "▁th", "▁the", "▁a", "▁in"]
    merges = [("t", "h"), ("i", "n"), ("▁", "th"), ("▁th", "e"), ("▁", "a"), ("▁", "in")]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
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


def self_rag(folder: Path, *, seed: int = 0, special: bool = True, tied: bool = False, extended: bool = True) -> Path:
    """A tiny Llama as the published Self-RAG checkpoints are laid out: a base vocabulary, and 16 rows behind it."""
    torch.manual_seed(seed)
    words = llama_tokenizer(special=special if extended else None)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=words.pad_token_id, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=tied,
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
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer

    normal, cut = BertNormalizer(lowercase=True), BertPreTokenizer()
    found = sorted({word for text in texts for word, _ in cut.pre_tokenize_str(normal.normalize_str(text))})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *found]
    inner = Tokenizer(WordLevel({word: number for number, word in enumerate(dict.fromkeys(words))}, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normal, cut
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=inner.get_vocab_size(), hidden_size=256, num_hidden_layers=0, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=256, hidden_dropout_prob=0.0, initializer_range=1.0, layer_norm_eps=1e4,
    )  # fmt: skip
    model = BertModel(config)
    with torch.no_grad():
        model.embeddings.position_embeddings.weight.zero_()
        model.embeddings.token_type_embeddings.weight.zero_()
        model.embeddings.LayerNorm.weight.fill_(100.0)  # with so large an epsilon words keep their own lengths
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    _saved(model, PreTrainedTokenizerFast(tokenizer_object=inner, **marks), folder / "bert")
    whole = SentenceTransformer(
        modules=[Transformer(str(folder / "bert"), max_seq_length=256), Pooling(256)], similarity_fn_name="cosine", device="cpu"
    )
    whole.save(str(folder / "encoder"), create_model_card=False)
    return folder / "encoder"


def reader(*, seed: int = 0, folder: Path) -> Any:
    from raglan.generator.reader import reader_from_encoder

    return reader_from_encoder(str(bert(folder, seed=seed)))


def _saved(model: Any, words: PreTrainedTokenizerFast, folder: Path) -> Path:
    model.save_pretrained(str(folder))
    words.save_pretrained(str(folder))
    return folder
