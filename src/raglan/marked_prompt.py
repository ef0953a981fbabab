"""Prompts and training rows of a model with reflection tokens: ids, not strings (Self-RAG, Asai et al. 2023, arXiv 2310.11511).

    question      [BOS] ### Instruction:\\n{instruction}\\n\\n### Response:\\n
    passage       [Retrieval]<paragraph>{title}\\n{text}</paragraph>
    no retrieval  [No Retrieval]

Control tokens are put in by id, here and nowhere else. Text that others wrote (questions, titles, passages, turns) never
becomes one, whatever it spells: it is encoded, its ids are looked at, and where one of them means something it is encoded
again by a tokenizer in which no spelling means anything. Nothing is ever decided on decoded text.

Parity: where a text spells no control token, its ids are those that the checkpoint's own tokenizer gives it inside the whole
string. Tokenizers differ in the blank behind a control token, so text is encoded between two of them, and they are taken away.

Deviation: the authors' code joins strings and tokenizes the whole, so that "[Relevant]" in a passage is a judgement of it.
"""

from __future__ import annotations

import copy
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from raglan.errors import CheckpointError, CorpusError, GeneratorError
from raglan.recipe import SelfRagPromptSettings
from raglan.records import Passage
from raglan.reflection import NAMES, GrammarError, Schema, parse
from raglan.text import shortened

__all__ = ["GROUPS", "LABELS", "MarkedPrompt", "MarkedRow", "RowTooLong", "marked", "read_schema"]

LABELS: dict[str, tuple[str | int, ...]] = {  # what a row of training data says, in the order of a schema's ids
    "retrieve": ("no", "yes", "continue"), "is_rel": ("irrelevant", "relevant"), "is_sup": ("fully", "partially", "no"),
    "is_use": (1, 2, 3, 4, 5),
}  # fmt: skip
GROUPS = ("retrieve", "is_rel", "is_sup", "is_use", "text", "markup", "eos", "passage")
ANCHORS = ("\n", ".", "-", "0")  # what may stand before a text so that no blank is put there


class RowTooLong(CorpusError):
    """A row of which not one segment fits."""


@dataclass(slots=True)
class MarkedRow:
    """A training row: the prompt's ids, and behind them what is learned or only read.

    Attributes:
        labels: ids behind the prompt, all of them.
        learned: whether a label is learned; a passage is only read.
        groups: each label's group, a place in `GROUPS`.
        cut: passages that were cut. `lost`: segments that were left out. `ended`: whether it has its end token.
    """

    input_ids: list[int]
    labels: list[int] = field(default_factory=list)
    learned: list[bool] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    cut: int = 0
    lost: int = 0
    ended: bool = False

    def add(self, group: str, ids: Sequence[int], *, learned: bool = True) -> None:
        self.labels += ids
        self.learned += [learned] * len(ids)
        self.groups += [GROUPS.index(group)] * len(ids)

    def __len__(self) -> int:
        return len(self.input_ids) + len(self.labels)


class MarkedPrompt:
    """Prompts for one tokenizer that holds the reflection tokens of `schema`, each as one id."""

    def __init__(self, schema: Schema, tokenizer: Any, settings: SelfRagPromptSettings, *, eos: int):
        self.schema, self.tokenizer, self.settings, self.eos = schema, tokenizer, settings, eos
        named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, eos} - {None}
        special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
        # A text may well hold a character that the vocabulary lacks: the unknown token tells nobody anything.
        self.forbidden = frozenset(schema.controls | named | (special - {tokenizer.unk_token_id}))

    def question(
        self, query: str, *, instruction: str = "", history: Sequence[str] = (), given: str = ""
    ) -> list[int]:  # fmt: skip
        """The prompt up to where the answer begins. `given` is the template's input field, which most rows leave empty.

        The question stands behind the instruction and `settings.separator`, or where the instruction says {question}.
        """
        asked = "\n".join([*history, query])
        between = self.settings.separator if instruction else ""
        whole = instruction if "{question}" in instruction else instruction + between + "{question}"
        parts = {"{instruction}": whole.replace("{question}", asked), "{input}": given}
        template = self.settings.with_input if given else self.settings.template
        text = re.sub(r"\{instruction\}|\{input\}", lambda found: parts[found.group()], template)
        ids = self._ids(self.tokenizer, text, special=True)
        ids = ids[:-1] if ids[-1:] == [self.eos] else ids
        opened = ids[0] == self.tokenizer.bos_token_id
        if not self._says(ids[opened:]):
            return ids
        return [*ids[:opened], *self._spelt(text, behind=False)]

    def passage(self, passage: Passage, *, most: int | None = None) -> list[int]:
        """A passage as evidence, cut to `most` tokens between its markups; default `settings.passage_max`."""
        schema, most = self.schema, self.settings.passage_max if most is None else most
        return [schema.yes, schema.opens, *self.foreign(_evidence(passage.title or None, passage.text))[:most], schema.closes]

    def no_retrieval(self) -> list[int]:
        return [self.schema.no]

    def continues(self) -> list[int]:
        return [self.schema.cont]

    def foreign(self, text: str) -> list[int]:
        """Ids of a text behind a control token. None of them is a control token, or any other special one.

        Raises:
            GeneratorError: the tokenizer makes one of this text, whatever is tried.
        """
        if not text:
            return []
        opens, closes = self.schema.opens, self.schema.closes
        around = (self.schema.spelling(opens), self.schema.spelling(closes))
        ids = self._ids(self.tokenizer, text.join(around))
        inner = ids[ids.index(opens) + 1 : len(ids) - 1 - ids[::-1].index(closes)]
        return self._spelt(text, behind=True) if self._says(inner) else inner

    def own(self, text: str) -> list[int]:
        """Ids of a text of ours, in which the spelling of a control token is that token. Never for what others wrote."""
        return self._ids(self.tokenizer, text)

    def text(self, ids: Sequence[int]) -> str:
        """What a person is shown: the words without control tokens, [Continue to Use Evidence] and the end among them."""
        runs: list[list[int]] = [[]]
        for token in ids:
            if token in self.forbidden:
                runs.append([])
            else:
                runs[-1].append(token)
        return _joined([text for run in runs if (text := self._decoded(run).strip())])

    def row_ids(
        self, row: Mapping[str, Any], *, limit: int | None = None, passage_max: int | None = None, markups: str = "train",
        released: Sequence[str] = (),
    ) -> MarkedRow:  # fmt: skip
        """A row of training data (see `raglan.marked_rows` for its fields) as ids with what is learned of them.

        Learned is all behind the prompt but passages, strictly between their own markups, and but the text of a row that says
        `only_judged`. A passage is cut to `passage_max`
        tokens; then, while the row exceeds `limit` tokens, its last segment is left out, and with it IsUse and the end.

        Args:
            markups: `train` learns <paragraph> and </paragraph>, `mask` does not.
            released: with `mask`, what the authors' code learns: nothing from the first passage to the last, and the prompt's
                last token.

        Raises:
            CorpusError: a label that is none, a row off the grammar, or one of which no segment fits (`RowTooLong`).
        """
        made = MarkedRow(self.question(row["instruction"], given=row.get("input") or ""))
        made.add("text", self.foreign(row.get("lead") or ""), learned=not row.get("only_judged"))
        ends = [len(made)]
        for segment in row["segments"]:
            self._add_segment(made, segment, row, passage_max, learned=markups == "train")
            ends.append(len(made))
        if row.get("is_use") is not None:
            made.add("is_use", [self._label("is_use", row["is_use"], row)])
        made.add("eos", [self.eos])
        made.ended = True
        if limit is not None and len(made) > limit:
            self._shorten(made, ends, limit, row)
        try:
            parse(made.labels, self.schema, eos=self.eos)
        except GrammarError as fault:
            raise _fault(row, f"its {fault.message}", "see docs/concepts/self_rag.md for what may follow what") from None
        if "mask" in released:
            _as_released(made, self.schema)
        return made

    def _add_segment(
        self, made: MarkedRow, segment: Mapping[str, Any], row: Mapping[str, Any], most: int | None, *, learned: bool
    ) -> None:  # fmt: skip
        made.add("retrieve", [self._label("retrieve", segment["decision"], row)])
        passage = segment.get("passage")
        if (passage is None) == (segment["decision"] == "yes"):
            raise _fault(row, f"decision {segment['decision']!r} {'without' if passage is None else 'with'} a passage")
        if passage is not None:
            ids = self.foreign(_evidence(passage.get("title") or None, passage["text"]))
            made.cut += most is not None and len(ids) > most
            made.add("markup", [self.schema.opens], learned=learned)
            made.add("passage", ids[:most], learned=False)
            made.add("markup", [self.schema.closes], learned=learned)
        for role in ("is_rel", "text", "is_sup", "tail"):
            said = segment.get(role)
            if role in ("is_rel", "is_sup"):
                made.add(role, [] if said is None else [self._label(role, said, row)])
            else:
                made.add("text", self.foreign(said or ""), learned=not row.get("only_judged"))

    def _label(self, role: str, said: str | int, row: Mapping[str, Any]) -> int:
        for known in (LABELS[role], self.schema.strings[role]):
            if said in known:
                return self.schema.ids[role][list(known).index(said)]
        raise _fault(row, f"{role} is {said!r}", f"one of {', '.join(map(repr, LABELS[role]))}")

    def _shorten(self, made: MarkedRow, ends: Sequence[int], limit: int, row: Mapping[str, Any]) -> None:
        kept = max((place for place, end in enumerate(ends) if end <= limit), default=0)
        if kept == 0:
            raise RowTooLong(f"row {_named(row)}: no segment fits into {limit} tokens", hint="lower data.passage_max")
        behind = ends[kept] - len(made.input_ids)
        for values in (made.labels, made.learned, made.groups):
            del values[behind:]  # type: ignore[attr-defined]
        made.lost, made.ended = len(ends) - 1 - kept, False

    def _spelt(self, text: str, *, behind: bool) -> list[int]:
        """Ids of a text as nothing but letters. Raises GeneratorError."""
        for tokenizer in (self._registered, self._bare):
            if tokenizer is not None:
                ids = self._letters(tokenizer, text, self._anchor(tokenizer) if behind else "")
                if not self._says(ids):
                    return ids
        raise GeneratorError(
            f"text {shortened(text)!r} cannot be told from control tokens by this model's tokenizer",
            hint="its vocabulary spells a control token as one word: remove it from the text, or take another tokenizer",
        )

    def _letters(self, tokenizer: Any, text: str, anchor: str) -> list[int]:
        before, ids = self._ids(tokenizer, anchor, split=True), self._ids(tokenizer, anchor + text, split=True)
        if ids[: len(before)] == before:
            return ids[len(before) :]
        return self._ids(tokenizer, text, split=True)  # the anchor has become one token with the text's beginning

    def _anchor(self, tokenizer: Any) -> str:
        """What must stand before a text for it to be encoded as behind a control token; empty where nothing must."""
        probe = "ab"
        wanted = self.foreign(probe)
        for anchor in ("", *ANCHORS):
            before = self._ids(tokenizer, anchor, split=True)
            if self._ids(tokenizer, anchor + probe, split=True) == [*before, *wanted]:
                return anchor
        return ""

    @cached_property
    def _registered(self) -> Any:
        """The tokenizer with its control tokens registered as special, their ids kept: special tokens alone can be split."""
        tokenizer = copy.deepcopy(self.tokenizer)
        names = {self.schema.spelling(token) for token in self.schema.controls}
        tokenizer.add_special_tokens({"extra_special_tokens": sorted(names)}, replace_extra_special_tokens=False)
        kept = all(tokenizer.convert_tokens_to_ids(self.schema.spelling(token)) == token for token in self.schema.controls)
        return tokenizer if kept and len(tokenizer) == len(self.tokenizer) else None

    @cached_property
    def _bare(self) -> Tokenizer | None:
        """The tokenizer without any added token; None where its kind cannot be taken apart."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        parts = json.loads(backend.to_str())
        return Tokenizer.from_str(json.dumps({**parts, "added_tokens": [], "post_processor": None}))

    def _ids(self, tokenizer: Any, text: str, *, special: bool = False, split: bool = False) -> list[int]:
        if isinstance(tokenizer, Tokenizer):
            return list(tokenizer.encode(text, add_special_tokens=False).ids)
        told = {"add_special_tokens": special, "split_special_tokens": split, "truncation": False, "verbose": False}
        return list(tokenizer(text, **told)["input_ids"])

    def _says(self, ids: Sequence[int]) -> bool:
        return not self.forbidden.isdisjoint(ids)

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else ""


def read_schema(tokenizer: Any, rows: int, strings: Mapping[str, Sequence[str]] = NAMES) -> Schema:
    """The ids of the reflection tokens as this tokenizer has them.

    Args:
        rows: of the smaller of the model's two embedding matrices.
        strings: role → spellings; they may be renamed or translated, the roles stay.

    Raises:
        CheckpointError: strings that are not exactly one id, or unknown, or behind the last row.
    """
    faults: dict[str, list[str]] = {}
    for text in (text for group in strings.values() for text in group):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        own = tokenizer.convert_tokens_to_ids(text)
        if own is None or own == tokenizer.unk_token_id:
            faults.setdefault("no token of their own", []).append(text)
        elif ids.count(own) != 1 or any(str(tokenizer.decode([token])).strip() for token in ids if token != own):
            faults.setdefault("split into several tokens", []).append(text)
        elif own >= rows:
            faults.setdefault(f"an id behind the model's {rows} rows", []).append(text)
    if faults:
        told = "; ".join(f"{fault}: {', '.join(texts)}" for fault, texts in faults.items())
        raise CheckpointError(
            f"the tokenizer lacks reflection tokens: {told}",
            hint="generator.vocabulary: self_rag adds them to a model that has none; a published checkpoint needs its own "
            "tokenizer, with added_tokens.json or tokenizer.json as it was published",
        )
    ids = {role: tuple(int(tokenizer.convert_tokens_to_ids(text)) for text in group) for role, group in strings.items()}
    return Schema(ids, {role: tuple(group) for role, group in strings.items()})


def marked(tokenizer: Any, strings: Mapping[str, Sequence[str]] = NAMES) -> bool:
    """Whether a tokenizer has any reflection token."""
    words = tokenizer.get_vocab()
    return any(text in words for group in strings.values() for text in group)


def _evidence(title: str | None, text: str) -> str:
    return text if title is None else f"{title}\n{text}"


def _as_released(made: MarkedRow, schema: Schema) -> None:
    """The last prompt token is learned, and nothing strictly between the first <paragraph> and the last </paragraph>."""
    if schema.opens in made.labels:
        first = made.labels.index(schema.opens) + 1
        last = len(made.labels) - 1 - made.labels[::-1].index(schema.closes)
        made.learned = [ok and not first <= place < last for place, ok in enumerate(made.learned)]
    made.labels.insert(0, made.input_ids.pop())
    made.learned.insert(0, True)
    made.groups.insert(0, GROUPS.index("text"))


def _joined(texts: Sequence[str]) -> str:
    """Texts with a blank between two, but for scripts that are written without."""
    whole = ""
    for text in texts:
        wide = whole and {unicodedata.east_asian_width(letter) for letter in (whole[-1], text[0])} & {"W", "F"}
        whole += text if not whole or wide else f" {text}"
    return whole


def _fault(row: Mapping[str, Any], what: str, hint: str | None = None) -> CorpusError:
    return CorpusError(f"row {_named(row)}: {what}", hint=hint)


def _named(row: Mapping[str, Any]) -> str:
    return repr(row.get("id", shortened(str(row.get("instruction", "")))))
