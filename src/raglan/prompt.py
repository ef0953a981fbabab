"""From a question and its passages to the generator's input ids, within a budget that is kept to the token.

The order of what gives way: the question is never cut; if it cannot fit, that is an error which names the limit. Few-shot
examples go first, whole, the last of them first. Then history loses whole turns, the oldest first, until every passage has its
least tokens. Passages are cut at their ends, the longest first, so that all of them stay; the template's own words stay
whole. With `whole_passages` none is cut: those that do not fit leave, the last ranked first, when turns have left. Text of a
passage, a turn or a question never becomes a control token: special tokens are added by id, and their
spellings in text stay text.

Layouts: `joined` is one text for any model; `chat` puts the same text into the model's chat template; `fused` gives every
passage a block of its own with the question, `[CLS] history question [SEP] passage [SEP]`, as the embedded reader wants it.

Text is taken as it was written. `question_form: query_decoded` instead repeats what transformers feeds the RAG checkpoints
that were published: the question as the query encoder's tokenizer gives it back (`question_tokenizer`), titles without
their quotes, two spaces as one.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from raglan.errors import RecipeError
from raglan.recipe import PromptSettings, Shot
from raglan.records import Passage
from raglan.text import shortened

__all__ = ["Prompt", "Rendered", "fit"]

log = logging.getLogger(__name__)
FUSED_WORDS = ("passage", "question_form")
WORDS = (*FUSED_WORDS, "template", "no_passage", "separator", "shots", "shot_separator")
MARK = "\ue000raglan\ue001"  # stands for the text while the chat template is written around it


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt: its ids, its text for people and endpoints, what it was made from, and what had to be cut.

    `answer_space` is the white space that ended the template: it belongs to the head of the answer, in training, scoring
    and decoding alike, because tokenizers treat "A: " + "Paris" and "A:" + " Paris" differently.

    `whole_within` renders the same again in so many tokens, its passages whole or not at all; a fused prompt has none.
    """

    ids: tuple[int, ...]
    text: str
    sources: tuple[str, ...] = ()
    answer_space: str = ""
    cut_tokens: int = 0
    starved: bool = False
    dropped_turns: int = 0
    dropped_shots: int = 0
    dropped_passages: int = 0
    whole_within: Callable[[int], Rendered] | None = field(default=None, compare=False, repr=False)

    @property
    def truncated(self) -> bool:
        return self.cut_tokens > 0


class Prompt:
    """Renders for one tokenizer. `limit` is the longest input its model takes, in tokens.

    `end` is the end token of a causal model: some tokenizers put it behind every text, and an answer cannot begin there.
    """

    def __init__(
        self, settings: PromptSettings, tokenizer: Any, *, layout: str, limit: int | None = None, end: int | None = None
    ):
        self.settings, self.tokenizer, self.layout, self.end = settings, tokenizer, layout, end
        self.lead = ""  # the shots that this prompt begins with
        self.instruction = ""  # what stands for {instruction} in the template of an example
        if settings.shots and layout == "fused":
            raise RecipeError("this generator reads passage by passage and no prompt.shots", hint="leave out prompt.shots")
        if settings.whole_passages and layout == "fused":
            raise RecipeError("this generator gives each passage a block of its own", hint="leave out prompt.whole_passages")
        self.question_tokenizer: Any = None  # the query encoder's, where there is one
        self.budget = settings.max_tokens if limit is None else min(settings.max_tokens, limit)

    def render(self, query: str, passages: Sequence[Passage], *, history: Sequence[str] = ()) -> Rendered:
        """The prompt for a question with K ≥ 0 passages, behind a dialogue's earlier turns, oldest first.

        Raises:
            RecipeError: the question alone does not fit, or has no query encoder to be decoded by.
        """
        told = query
        query = self._decoded(query) if self._as_fed else query
        if self.layout == "fused":
            return self._fused(query, passages, history)
        again = partial(self._whole_within, told, tuple(passages), tuple(history))
        return replace(self._without_shots(query, passages, history), whole_within=again)

    def _whole_within(self, query: str, passages: Sequence[Passage], history: Sequence[str], tokens: int) -> Rendered:
        return self.worded(whole_passages=True).within(tokens).render(query, passages, history=history)

    def _without_shots(self, query: str, passages: Sequence[Passage], history: Sequence[str]) -> Rendered:
        """The prompt without the shots that it has no room for."""
        shots = [self._shot(shot) for shot in self.settings.shots]
        for kept in range(len(shots), 0, -1):
            found = self._led("".join(shots[:kept]))._whole_or_none(query, passages, history)
            if found is not None:
                return replace(found, dropped_shots=len(shots) - kept)
        return replace(self._joined(query, passages, history), dropped_shots=len(shots))

    def text(self, query: str, passages: Sequence[Passage], *, history: Sequence[str] = ()) -> str:
        """The prompt as text, nothing cut: for readers with tokenizers of their own. It needs none."""
        return self._text(query, [self.passage_text(passage, number) for number, passage in enumerate(passages, 1)], history)

    @property
    def words(self) -> dict[str, Any]:
        """What shapes the text of a prompt, as JSON: everything but budgets."""
        named = FUSED_WORDS if self.layout == "fused" else WORDS
        told = self.settings.model_dump(mode="json", include=set(named))
        if not self.settings.shots:  # then nothing stands behind one
            told.pop("shot_separator", None)
        return {"layout": self.layout, **told}

    def within(self, tokens: int) -> Prompt:
        """This prompt with another budget."""
        other = copy.copy(self)
        other.budget = tokens
        return other

    def worded(self, *, instruction: str = "", **settings: Any) -> Prompt:
        """This prompt with other templates and other such settings; `instruction` is set as it is, names in braces too."""
        other = copy.copy(self)
        other.instruction = instruction
        other.settings = self.settings.model_copy(update=settings)
        return other

    def _led(self, lead: str) -> Prompt:
        other = copy.copy(self)
        other.lead = lead
        return other

    def _shot(self, shot: Shot) -> str:
        """A shot as its own prompt has it, with its answer behind."""
        texts = [self.passage_text(Passage("", text), number) for number, text in enumerate(shot.passages, 1)]
        return f"{self._text(shot.question, texts, ())}{self.answer_space or ' '}{shot.answer}{self.settings.shot_separator}"

    def _whole_or_none(self, query: str, passages: Sequence[Passage], history: Sequence[str]) -> Rendered | None:
        """The prompt where nothing of it has to give way."""
        texts = [self.passage_text(passage, number) for number, passage in enumerate(passages, 1)]
        if len(self._newest(history, self.budget)) < len(history) or len(self._whole(query, texts, history)) > self.budget:
            return None
        found = self._joined(query, passages, history)
        return None if found.cut_tokens or found.dropped_turns else found

    @property
    def answer_space(self) -> str:
        """The white space behind the template, which belongs to the head of every answer, with and without passages.

        A chat template says itself how an answer begins.
        """
        template = self.settings.template
        return "" if self.layout != "joined" else template[len(template.rstrip()) :]

    def passage_text(self, passage: Passage, number: int) -> str:
        if not passage.title and self.settings.passage == "{title} / {text}" and not self._as_fed:
            return passage.text
        title = passage.title.removeprefix('"').removesuffix('"') if self._as_fed else passage.title
        return self.settings.passage.format(title=title, text=passage.text, number=number)

    def _fused(self, query: str, passages: Sequence[Passage], history: Sequence[str]) -> Rendered:
        opens, closes = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        question = self._ids(query)
        room = self.budget - len(question) - 3
        self._check_room(room, query)
        texts = [self.passage_text(passage, number) for number, passage in enumerate(passages, 1)]
        wanted = [self._ids(text) for text in texts]
        turns = self._newest(history, room - self._least(wanted, together=False))
        before = [token for turn in turns for token in self._ids(turn)]
        question, room = before + question, room - len(before)
        ids: list[int] = [] if texts else [opens, *question, closes]
        for own in wanted:
            ids += [opens, *question, closes, *own[:room], closes]
        cut = sum(max(0, len(own) - room) for own in wanted)
        starved = any(room < min(len(own), self.settings.min_passage_tokens) for own in wanted)
        told = "\n".join([
            *(f"[turn] {turn}" for turn in turns), f"[question] {query}",
            *(f"[passage {i}] {text}" for i, text in enumerate(texts, 1)),
        ])  # fmt: skip
        sources = tuple(p.text for p in passages)
        return Rendered(tuple(ids), told, sources, "", cut, starved, len(history) - len(turns))

    def _joined(self, query: str, passages: Sequence[Passage], history: Sequence[str]) -> Rendered:
        if not self.settings.whole_passages:
            return self._cut(query, passages, history)
        lengths = [len(self._ids(self.passage_text(passage, number))) for number, passage in enumerate(passages, 1)]
        kept = fit(lengths, self.budget - len(self._whole(query, [""] * len(passages)))) or ()
        for count in range(len(kept), -1, -1):  # joins can cost a token more than their parts
            found = self._cut(query, passages[:count], history)
            if not found.cut_tokens:
                break
        return replace(found, dropped_passages=len(passages) - count, starved=bool(passages) and not count)

    def _cut(self, query: str, passages: Sequence[Passage], history: Sequence[str]) -> Rendered:
        texts = [self.passage_text(passage, number) for number, passage in enumerate(passages, 1)]
        wanted = [self._ids(text) for text in texts]
        lengths = [len(own) for own in wanted]
        empty = [""] * len(texts)
        fixed = len(self._whole(query, empty))
        if fixed + len(texts) > self.budget:
            self._check_room(self.budget - len(self._whole(query, [])) + 1, query)
            self._check_passages(self.budget - fixed, len(texts))
        turns = self._newest(history, self.budget - fixed - self._least(wanted, together=True))
        while True:  # joins can cost a token more than their parts
            room = self.budget - (len(self._whole(query, empty, turns)) if turns else fixed)
            shares, kept, ids = self._fitted(query, texts, turns, _shares(lengths, room))
            if len(ids) <= self.budget or not turns:
                break
            turns = turns[1:]
        self._check_room(self.budget - len(ids) + 1, query)
        cut = sum(lengths) - sum(min(a, b) for a, b in zip(lengths, shares, strict=True))
        least = self.settings.min_passage_tokens
        starved = any(share < min(length, least) for share, length in zip(shares, lengths, strict=True))
        sources = tuple(p.text for p in passages)
        text = self._text(query, kept, turns)
        return Rendered(tuple(ids), text, sources, self.answer_space, cut, starved, len(history) - len(turns))

    def _fitted(
        self, query: str, texts: Sequence[str], turns: Sequence[str], shares: list[int]
    ) -> tuple[list[int], list[str], list[int]]:
        """Shares of the passages, the passages so cut, and all ids, which exceed the budget only where no share is left."""
        while True:
            kept = [self._head(text, share) for text, share in zip(texts, shares, strict=True)]
            ids = self._whole(query, kept, turns)
            over = len(ids) - self.budget
            if over <= 0 or not any(shares):
                return shares, kept, ids
            longest = max(range(len(shares)), key=shares.__getitem__)
            shares[longest] = max(0, shares[longest] - over)

    def _newest(self, history: Sequence[str], room: int) -> list[str]:
        """The newest turns that fit into so many tokens, each whole, oldest first."""
        most = self.settings.max_history_tokens
        room = room if most is None else min(room, most)
        between = 0 if self.layout == "fused" else len(self._ids("\n"))
        kept: list[str] = []
        for turn in reversed(history):
            room -= len(self._ids(turn)) + between
            if room < 0:
                break
            kept.insert(0, turn)
        return kept

    def _least(self, wanted: Sequence[Sequence[int]], *, together: bool) -> int:
        """Tokens that history must leave: every passage's least, or the largest of them where each has a block."""
        most = None if self.settings.whole_passages else self.settings.min_passage_tokens
        least = [len(own[:most]) for own in wanted]
        return sum(least) if together else max(least, default=0)

    def _whole(self, query: str, texts: Sequence[str], turns: Sequence[str] = ()) -> list[int]:
        text = self._text(query, texts, turns)
        if self.layout != "chat":
            return self.opened(text)
        chat = [{"role": "user", "content": MARK}]
        around = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        before, found, after = around.partition(MARK)
        if not found:
            raise RecipeError("the model's chat template changes the text it is given", hint="set prompt.layout: joined")
        return [*self._ids(before, control=True), *self._ids(text), *self._ids(after, control=True)]

    def opened(self, text: str) -> list[int]:
        """Ids of a text behind the token that begins a row, if the tokenizer has one; a causal model's has no end."""
        ids = self._ids(text, special=True)
        return ids[:-1] if self.end is not None and ids[-1:] == [self.end] else ids

    def _text(self, query: str, texts: Sequence[str], turns: Sequence[str]) -> str:
        template = self.settings.template
        if not texts:
            template = self.settings.no_passage or template.replace("{passages}", "").lstrip("\n")
        template = _with_history(template) if turns else re.sub(r"\{history\}\n?", "", template)
        parts = {
            "{question}": query, "{history}": "\n".join(turns), "{passages}": self.settings.separator.join(texts),
        }  # fmt: skip
        parts |= {"{instruction}": self.instruction} if self.instruction else {}
        text = re.sub("|".join(map(re.escape, parts)), lambda found: parts[found.group()], template)
        text = text.replace("  ", " ") if self._as_fed else text
        text = text.rstrip()  # what a question or a passage ends with is no part of the answer, what the template does is
        return self.lead + text

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


def fit(lengths: Sequence[int], room: int, *, gold: Sequence[int] = ()) -> tuple[int, ...] | None:
    """Which passages fit whole into a budget, as places in rank order, for prompts in which no passage is cut.

    Without `gold`, which nobody knows at inference, the longest prefix by rank. With it, for making training data, gold is
    kept first, and then the longest prefix of the rest.

    Args:
        lengths: tokens of each passage, by rank. room: tokens that prompt and answer leave for passages.
        gold: places of passages that have to stay.

    Returns:
        None where gold alone does not fit.
    """
    kept = sorted(set(gold))
    room -= sum(lengths[place] for place in kept)
    if room < 0:
        return None
    for place in (place for place in range(len(lengths)) if place not in gold):
        room -= lengths[place]
        if room < 0:
            break
        kept.append(place)
    return tuple(sorted(kept))


def _with_history(template: str) -> str:
    """The template with a place for the turns: lines of their own before the question's, or, where a line holds passages
    and question, before the question."""
    if "{history}" in template:
        return template
    head = template[: template.index("{question}")]
    line = head.rfind("\n") + 1
    at = len(head) if "{passages}" in head[line:] else line
    return f"{template[:at]}{{history}}\n{template[at:]}"


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
