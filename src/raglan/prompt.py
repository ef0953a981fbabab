"""From a question and its passages to the generator's input ids, within a budget that is kept to the token.

The order of what gives way: the question is never cut; if it cannot fit, that is an error which names the limit. Passages
are cut at their ends, the longest first, so that all of them stay; the template's own words stay whole. Text of a passage
or a question never becomes a control token: special tokens are added by id, and their spellings in text stay text.

Layouts: `joined` is one text for any model; `chat` puts the same text into the model's chat template; `fused` gives every
passage a block of its own with the question, `[CLS] question [SEP] passage [SEP]`, as the embedded reader wants it.

Text is taken as it was written. `question_form: query_decoded` instead repeats what transformers feeds the RAG checkpoints
that were published: the question as the query encoder's tokenizer gives it back (`question_tokenizer`), titles without
their quotes, two spaces as one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raglan.errors import RecipeError
from raglan.recipe import PromptSettings
from raglan.records import Passage
from raglan.text import shortened

__all__ = ["Prompt", "Rendered"]

log = logging.getLogger(__name__)
MARK = "\ue000raglan\ue001"  # stands for the text while the chat template is written around it


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt: its ids, its text for people and endpoints, what it was made from, and what had to be cut.

    `answer_space` is the white space that ended the template: it belongs to the head of the answer, in training, scoring
    and decoding alike, because tokenizers treat "A: " + "Paris" and "A:" + " Paris" differently.
    """

    ids: tuple[int, ...]
    text: str
    sources: tuple[str, ...] = ()
    answer_space: str = ""
    cut_tokens: int = 0
    starved: bool = False

    @property
    def truncated(self) -> bool:
        return self.cut_tokens > 0


class Prompt:
    """Renders for one tokenizer. `limit` is the longest input its model takes, in tokens."""

    def __init__(self, settings: PromptSettings, tokenizer: Any, *, layout: str, limit: int | None = None):
        self.settings, self.tokenizer, self.layout = settings, tokenizer, layout
        self.question_tokenizer: Any = None  # the query encoder's, where there is one
        self.budget = settings.max_tokens if limit is None else min(settings.max_tokens, limit)

    def render(self, query: str, passages: Sequence[Passage]) -> Rendered:
        """The prompt for a question with K ≥ 0 passages.

        Raises:
            RecipeError: the question alone does not fit, or has no query encoder to be decoded by.
        """
        query = self._decoded(query) if self._as_fed else query
        return self._fused(query, passages) if self.layout == "fused" else self._joined(query, passages)

    @property
    def answer_space(self) -> str:
        """The white space behind the template, which belongs to the head of an answer."""
        template = self.settings.template
        return "" if self.layout != "joined" else template[len(template.rstrip()) :]

    def passage_text(self, passage: Passage, number: int) -> str:
        if not passage.title and self.settings.passage == "{title} / {text}" and not self._as_fed:
            return passage.text
        title = passage.title.removeprefix('"').removesuffix('"') if self._as_fed else passage.title
        return self.settings.passage.format(title=title, text=passage.text, number=number)

    def _fused(self, query: str, passages: Sequence[Passage]) -> Rendered:
        opens, closes = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        question = self._ids(query)
        room = self.budget - len(question) - 3
        self._check_room(room, query)
        texts = [self.passage_text(passage, number) for number, passage in enumerate(passages, 1)]
        ids: list[int] = [] if texts else [opens, *question, closes]
        cut, starved = 0, False
        for text in texts:
            wanted = self._ids(text)
            ids += [opens, *question, closes, *wanted[:room], closes]
            cut += max(0, len(wanted) - room)
            starved = starved or room < min(len(wanted), self.settings.min_passage_tokens)
        told = "\n".join([f"[question] {query}", *(f"[passage {i}] {text}" for i, text in enumerate(texts, 1))])
        return Rendered(tuple(ids), told, tuple(p.text for p in passages), "", cut, starved)

    def _joined(self, query: str, passages: Sequence[Passage]) -> Rendered:
        texts = [self.passage_text(passage, number) for number, passage in enumerate(passages, 1)]
        lengths = [len(self._ids(text)) for text in texts]
        fixed = len(self._whole(query, []))
        room = self.budget - fixed - len(texts) * len(self._ids(self.settings.separator))
        self._check_room(self.budget - fixed + 1, query)
        if texts:
            self._check_passages(room, len(texts))
        shares = _shares(lengths, room)
        while True:
            kept = [self._head(text, share) for text, share in zip(texts, shares, strict=True)]
            ids = self._whole(query, kept)
            over = len(ids) - self.budget
            if over <= 0 or not any(shares):
                break
            longest = max(range(len(shares)), key=shares.__getitem__)  # joins can cost a token more than their parts
            shares[longest] = max(0, shares[longest] - over)
        if over > 0:
            self._check_room(-over, query)
        cut = sum(lengths) - sum(min(a, b) for a, b in zip(lengths, shares, strict=True))
        least = self.settings.min_passage_tokens
        starved = any(share < min(length, least) for share, length in zip(shares, lengths, strict=True))
        text, space = self._text(query, kept)
        space = "" if self.layout == "chat" else space  # there the template says how an answer begins
        return Rendered(tuple(ids), text, tuple(p.text for p in passages), space, cut, starved)

    def _whole(self, query: str, texts: Sequence[str]) -> list[int]:
        text, _ = self._text(query, texts)
        if self.layout != "chat":
            return self._ids(text, special=True)
        turns = [{"role": "user", "content": MARK}]
        around = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        before, found, after = around.partition(MARK)
        if not found:
            raise RecipeError("the model's chat template changes the text it is given", hint="set prompt.layout: joined")
        return [*self._ids(before, control=True), *self._ids(text), *self._ids(after, control=True)]

    def _text(self, query: str, texts: Sequence[str]) -> tuple[str, str]:
        template = self.settings.template
        if not texts:
            template = self.settings.no_passage or template.replace("{passages}", "").lstrip("\n")
        parts = {"{question}": query, "{passages}": self.settings.separator.join(texts)}
        text = re.sub(r"\{question\}|\{passages\}", lambda found: parts[found.group()], template)
        text = text.replace("  ", " ") if self._as_fed else text
        bare = text.rstrip()
        return bare, text[len(bare) :]

    @property
    def _as_fed(self) -> bool:
        return self.settings.question_form == "query_decoded"

    def _decoded(self, query: str) -> str:
        if self.question_tokenizer is None:
            raise RecipeError(
                "prompt.question_form is query_decoded, and no query encoder is there to decode the question",
                hint="open the generator as part of a system (RAG.open), or set question_form: as_written",
            )
        ids = self.question_tokenizer(query, truncation=False, verbose=False)["input_ids"]
        return str(self.question_tokenizer.decode(ids, skip_special_tokens=True))

    def _ids(self, text: str, *, special: bool = False, control: bool = False) -> list[int]:
        """Ids of a text. Only in `control` text (a chat template's own) does "[SEP]" mean the token and not five letters."""
        return list(
            self.tokenizer(text, add_special_tokens=special, split_special_tokens=not control, truncation=False, verbose=False)[
                "input_ids"
            ]
        )

    def _head(self, text: str, tokens: int) -> str:
        """The longest head of a text that has at most so many tokens."""
        if tokens <= 0:
            return ""
        if not getattr(self.tokenizer, "is_fast", False):
            return str(self.tokenizer.decode(self._ids(text)[:tokens]))
        offsets = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )["offset_mapping"]
        return text if len(offsets) <= tokens else text[: offsets[tokens - 1][1]]

    def _check_passages(self, room: int, passages: int) -> None:
        if room < passages:
            raise RecipeError(
                f"{passages} passages do not fit into a prompt of {self.budget} tokens",
                hint="lower retriever.k, or raise prompt.max_tokens if the model allows it",
            )

    def _check_room(self, room: int, query: str) -> None:
        if room < 1:
            raise RecipeError(
                f"the question has {len(self._ids(query))} tokens and does not fit into a prompt of {self.budget}: "
                f"{shortened(query)!r}",
                hint="questions are never cut: raise prompt.max_tokens if the model allows it, or shorten the question",
            )


def _shares(lengths: Sequence[int], room: int) -> list[int]:
    """Tokens each passage may keep: short ones whole, the rest an equal share of what is left."""
    shares = list(lengths)
    left, open_ = room, sorted(range(len(lengths)), key=lengths.__getitem__)
    while open_:
        share = max(0, left // len(open_))
        first = open_.pop(0)
        shares[first] = min(lengths[first], share)
        left -= shares[first]
    return shares
