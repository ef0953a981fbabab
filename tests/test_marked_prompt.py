"""Reflection tokens as ids: what a text spells never becomes one, and clean text has the checkpoint's own ids."""

from __future__ import annotations

import json
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny
from raglan.errors import CheckpointError, GeneratorError
from raglan.marked_prompt import MarkedPrompt, read_schema
from raglan.recipe import SelfRagPromptSettings
from raglan.records import Passage
from raglan.reflection import Schema

SPELLINGS = Schema.numbered(0).spellings
KINDS = [(legacy, special) for legacy in (True, False) for special in (True, False)]


@cache
def prompt(legacy: bool, special: bool) -> MarkedPrompt:
    words = tiny.llama_tokenizer(legacy=legacy, special=special)
    return MarkedPrompt(read_schema(words, len(words)), words, SelfRagPromptSettings(), eos=2)


def passage(text: str, title: str = "") -> Passage:
    return Passage("p", text, title=title, document="d", start=0, end=len(text))


# ------------------------------------------------------------------------------------------------------------ schema


@pytest.mark.parametrize(("legacy", "special"), KINDS)
def test_ids_are_read_from_the_tokenizer(legacy: bool, special: bool) -> None:
    words = tiny.llama_tokenizer(legacy=legacy, special=special)
    first = words.convert_tokens_to_ids("[No Retrieval]")
    assert read_schema(words, len(words)) == Schema.numbered(first)
    assert first == len(tiny.llama_tokenizer())
    assert words.convert_tokens_to_ids("<pad>") == first + 15


def test_a_model_without_reflection_tokens_says_how_to_get_them() -> None:
    with pytest.raises(CheckpointError, match=r"no token of their own: \[No Retrieval\], .*</paragraph>") as fault:
        read_schema(tiny.llama_tokenizer(), 1000)
    assert "generator.vocabulary: self_rag" in str(fault.value.hint)


def test_strings_of_several_tokens_are_named() -> None:
    """A row of the vocabulary that no text ever becomes: the tokenizer was saved without its added tokens."""
    words = tiny.llama_tokenizer()
    words.add_tokens([name for name in SPELLINGS if name != "[Relevant]"])
    parts = json.loads(words.backend_tokenizer.to_str())
    parts["model"]["vocab"]["[Relevant]"] = 5000
    words._tokenizer = Tokenizer.from_str(json.dumps(parts))
    with pytest.raises(CheckpointError, match=r"lacks reflection tokens: split into several tokens: \[Relevant\]\n"):
        read_schema(words, 6000)


def test_ids_behind_the_last_row_are_named() -> None:
    words = tiny.llama_tokenizer(special=True)
    short = words.convert_tokens_to_ids("[Partially supported]")
    with pytest.raises(CheckpointError, match=r"behind the model's \d+ rows: \[Partially supported\], \[No support / Contr"):
        read_schema(words, short)


# ------------------------------------------------------------------------------------------------------------ parity

PAIRS = [
    ("the tin", "a thin inn\nis in the town"), ("Who?", "x"), ("", "no title"), ("T", ""), ("  two blanks", "  and here"),
    ("trailing ", "blank "), ("Ünïcode", "中文。"), ("a\tb", "c\nd\n\ne"), ("[bracket]", "(Relevant)"), ("1.", "2, 3"),
    ("the", "the"), ("in the", "the in"), ("A: b", "C\n"), ("\n", "\n\n"), ("😀", "é"), ("'q'", '"q"'), ("<b>", "</b>"),
    ("thththe", "inin"), ("a" * 40, "b " * 40), ("[Utility:6]", "[Relevant"),
]  # fmt: skip


@pytest.mark.parametrize(("legacy", "special"), KINDS)
@pytest.mark.parametrize(("title", "text"), PAIRS)
def test_joined_ids_are_those_of_the_whole_string(legacy: bool, special: bool, title: str, text: str) -> None:
    made = prompt(legacy, special)
    whole = f"### Instruction:\n{title} {text}\n\n### Response:\n[Retrieval]<paragraph>{title}\n{text}</paragraph>"
    evidence = passage(text, title) if title else None
    if evidence is None:
        whole = whole.replace("<paragraph>\n", "<paragraph>")
        evidence = passage(text)
    theirs = made.tokenizer(whole)["input_ids"]
    assert made.question(f"{title} {text}") + made.passage(evidence) == theirs
    assert made.own("[Relevant]") == [made.schema.relevant]


def test_the_two_blanks_are_two_conventions() -> None:
    """The slow tokenizer, with which the checkpoints were trained, puts a blank behind a control token; others do not."""
    slow, fast = prompt(True, True), prompt(False, True)
    blank = slow.tokenizer.convert_tokens_to_ids("▁the")
    assert slow.foreign("the in")[0] == blank
    assert fast.foreign("the in")[0] == fast.tokenizer.convert_tokens_to_ids("th")
    assert fast.foreign(" the in")[0] == blank
    for made in (slow, fast):  # letters that are meant as letters follow the same convention
        assert made.foreign("the in [Relevant]")[: len(made.foreign("the in"))] == made.foreign("the in")


def test_template_and_separator() -> None:
    made = prompt(True, True)
    decoded = made.tokenizer.decode(made.question("Is it so?", instruction="Judge.", history=["Earlier."])[1:])
    assert decoded == "### Instruction:\nJudge.## Input:\n\nEarlier.\nIs it so?\n\n### Response:\n"
    decoded = made.tokenizer.decode(made.question("Judge {input}.", given="It is {instruction}.")[1:])
    assert decoded == "### Instruction:\nJudge {input}.\n\n### Input:\nIt is {instruction}.\n\n### Response:\n"
    assert made.question("x")[0] == made.tokenizer.bos_token_id
    assert made.no_retrieval() == [made.schema.no]
    assert made.continues() == [made.schema.cont]


# --------------------------------------------------------------------------------------------------------- injection

PIECES = st.sampled_from([*SPELLINGS, "</s>", "<s>", "<pad>", "<unk>", "the tin", "a", " ", "\n", "[", "]", "é", "中"])
TEXTS = st.lists(PIECES, min_size=1, max_size=6).map("".join)


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), question=TEXTS, title=TEXTS, text=TEXTS)
def test_what_others_write_is_never_a_control_token(kind: tuple[bool, bool], question: str, title: str, text: str) -> None:
    made = prompt(*kind)
    bos = made.tokenizer.bos_token_id
    asked = made.question(question, history=[title], instruction=text)
    assert asked[0] == bos
    assert not made.forbidden & set(asked[1:])
    shown = made.passage(passage(text, title))
    assert shown[:2] == [made.schema.yes, made.schema.opens]
    assert shown[-1] == made.schema.closes
    assert not made.forbidden & set(shown[2:-1])
    told = made.tokenizer.decode(asked[1:], clean_up_tokenization_spaces=False)
    wanted = f"### Instruction:\n{text}## Input:\n\n{title}\n{question}\n\n### Response:"
    assert spelt(told) == spelt(wanted)
    assert spelt(made.text(shown)) == spelt(f"{title}\n{text}")


def spelt(text: str) -> str:
    """Without the blank that some tokenizers write behind <unk>, which is no control token and stays one id."""
    return text.replace("<unk> ", "<unk>").strip()


OTHERS = [(kind, special) for kind in ("wordpiece", "bytes") for special in (True, False)]
OWN = ["[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]", "<|endoftext|>", "<|im_end|>"]  # these vocabularies' other special ones
CASED = [*SPELLINGS, *map(str.lower, SPELLINGS), *map(str.upper, SPELLINGS)]  # WordPiece reads them alike
SPELT = st.lists(st.sampled_from([*CASED, *OWN, "the tower", "a", " ", "\n", "[", "]", "é", "中"]), min_size=1, max_size=6)


@cache
def other(kind: str, special: bool) -> MarkedPrompt:
    """Of a vocabulary that is no Llama's: the embedded model's, and bytes; it has padding of its own."""
    words = tiny.bert_tokenizer() if kind == "wordpiece" else tiny.byte_tokenizer()
    if kind == "wordpiece":
        words.bos_token, words.eos_token = words.cls_token, words.sep_token
    if special:
        words.add_special_tokens({"extra_special_tokens": list(SPELLINGS)}, replace_extra_special_tokens=False)
    else:
        words.add_tokens(list(SPELLINGS))
    return MarkedPrompt(read_schema(words, len(words)), words, SelfRagPromptSettings(), eos=words.eos_token_id)


@settings(max_examples=100, deadline=None)
@given(kind=st.sampled_from(OTHERS), question=SPELT.map("".join), title=SPELT.map("".join), text=SPELT.map("".join))
def test_nor_in_any_other_vocabulary(kind: tuple[str, bool], question: str, title: str, text: str) -> None:
    made = other(*kind)
    asked, shown = made.question(question, history=[title], instruction=text), made.passage(passage(text, title))
    opened = int(kind[0] == "wordpiece")
    assert (asked[0] == made.tokenizer.bos_token_id) == bool(opened)
    assert not made.forbidden & set(asked[opened:])
    assert shown[:2] == [made.schema.yes, made.schema.opens]
    assert shown[-1] == made.schema.closes
    assert not made.forbidden & set(shown[2:-1])
    fold = folded if opened else str.strip
    told = made.tokenizer.decode(asked[opened:], clean_up_tokenization_spaces=False)
    assert fold(told) == fold(f"### Instruction:\n{text}## Input:\n\n{title}\n{question}\n\n### Response:\n")
    assert fold(made.text(shown)) == fold(f"{title}\n{text}")


def folded(text: str) -> str:
    """As WordPiece keeps it: small letters without accents and blanks, and what it has no piece for unknown."""
    return "".join(text.split()).lower().replace("é", "e").replace("中", "[unk]")


@pytest.mark.parametrize(("legacy", "special"), KINDS)
@pytest.mark.parametrize("spelling", [*SPELLINGS, "</s>"])
def test_each_spelling_alone(legacy: bool, special: bool, spelling: str) -> None:
    made = prompt(legacy, special)
    ids = made.foreign(spelling)
    assert len(ids) > 1
    assert not made.forbidden & set(ids)
    assert made.text(ids) == spelling


def test_a_quoted_spelling_stays_and_a_generated_token_does_not() -> None:
    made = prompt(True, True)
    schema = made.schema
    ids = [schema.yes, schema.relevant, *made.foreign("It says [Relevant]."), schema.ids["is_sup"][0], schema.cont]
    assert made.text([*ids, *made.foreign("So there."), schema.ids["is_use"][4], made.eos]) == "It says [Relevant]. So there."
    assert made.text([*made.foreign("是。"), schema.cont, *made.foreign("否。")]) == "是。否。"


def test_an_end_token_that_is_registered_as_an_ordinary_one_is_no_way_out() -> None:
    """Splitting special tokens does not reach it; a tokenizer without added tokens does."""
    words = tiny.llama_tokenizer(special=False)
    words.add_tokens(["<|end|>"])
    end = words.convert_tokens_to_ids("<|end|>")
    made = MarkedPrompt(read_schema(words, len(words)), words, SelfRagPromptSettings(), eos=end)
    ids = made.foreign("the <|end|> in [Relevant]")
    assert not made.forbidden & set(ids)
    assert made.text(ids) == "the <|end|> in [Relevant]"


def _word_level() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "</s>", "<pad>", "the", *SPELLINGS]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def test_a_vocabulary_that_spells_control_tokens_itself_is_refused() -> None:
    words = _word_level()
    made = MarkedPrompt(read_schema(words, len(words)), words, SelfRagPromptSettings(), eos=2)
    with pytest.raises(GeneratorError, match="cannot be told from control tokens"):
        made.question("[Relevant]", history=["the", "[Relevant]"])
