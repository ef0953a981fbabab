"""Any chat model as a Self-RAG backend: asked yes or no where a model with reflection tokens would write one.

    behind the question, or a segment   is something to be looked up?     [Retrieval] or [No Retrieval]
    behind a segment                    is the passage in use enough?     [Continue to Use Evidence], or the question above
    behind a passage                    does it help?                     [Relevant] or [Irrelevant]
    behind what was written from it     does it follow from it?           [Fully supported] or [No support / Contradictory]
    at the end                          is it what was asked for?         [Utility:5] or [Utility:1]

A yes is p = 1 and a no p = 0, so decisions, both forms, hard constraints and citations are those of every other backend, on
values of 0 and 1. A server that tells no log-probabilities is enough. An answer that is neither yes nor no is no grade: the
group's marks are NaN, and `decode.missing` says what that means. Equal questions to a grader are asked once.

Ids are this module's own, a byte each, and never reach the server: it is shown the text that they spell. Words have no
log-probability, so a recipe's `decode.weights.seq` must be 0. After prompted graders in a loop, as practitioners write them
(LangGraph's "Self-RAG"); where those reword a question without end, `decode.self_rag.rewording` stops after `rewrites`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from raglan.errors import GeneratorError
from raglan.generator.asked import AskedGenerator, Request
from raglan.generator.server import Server
from raglan.recipe import GeneratorSettings, PromptSettings
from raglan.records import Marked
from raglan.reflection import Role, Schema
from raglan.text import sentences

__all__ = ["Graded"]

GRADERS: dict[str, str] = {
    "retrieve": "Would documents, if they were looked up, help to carry out the instruction, or to go on with the answer?",
    "continue": "Does the passage hold what the answer's next sentence has to say?",
    "is_rel": "Does the passage hold information that helps to carry out the instruction?",
    "is_sup": "Does all that the sentence says follow from the passage? Judge by the passage alone.",
    "complete": "Does the answer say all that the instruction asks for, so that nothing has to be added?",
    "is_use": "Is the answer what the instruction asks for?",
}
JUDGES = "You judge texts. Answer with yes or no and nothing else."
WRITES = {
    True: "You answer. Reply with the answer alone, as short as it can be.",
    False: "You write an answer sentence by sentence. Reply with its next sentence alone; repeat nothing that it says already.",
}
FROM = " Use what the passage says."
REWORDS = (
    "You word questions for a search engine. Reply with one question or a few words that mean the same and would find other "
    "documents. Nothing else."
)
HEADS = {"instruction": "Instruction", "answer": "Answer so far", "sentence": "Sentence", "passage": "Passage"}
END = "</s>"
GRADE = 256  # tokens of a grader's reply: a yes needs one, models that think aloud need more
HINT = "generator.kind: endpoint, if the server tells log-probabilities; else another model"
At = Literal["question", "passage", "text", "segment"]


@dataclass(slots=True)
class _Seen:
    """What a context says, read from its ids.

    Attributes:
        at: what stands at its end: the question, a passage, the place where text begins, or a finished segment.
        answer: the visible text so far. `passage`: the last one in sight; empty where there is none.
        fits: whether that passage was judged relevant. `reads`: whether the last segment is written from it.
        judged: whether that segment is then judged by it, as what reads on in it is not.
    """

    question: str
    at: At = "question"
    answer: str = ""
    passage: str = ""
    fits: bool = False
    reads: bool = False
    judged: bool = False

    def judge(self, relevant: bool) -> None:
        """The passage was judged."""
        self.fits = self.reads = self.judged = relevant and bool(self.passage)


@dataclass(slots=True)
class _Row:
    """A continuation that grows: ids, and the marks at each of them."""

    schema: Schema
    marks: tuple[int, ...]
    ids: list[int] = field(default_factory=list)
    told: list[list[float]] = field(default_factory=list)

    def say(self, ids: Sequence[int]) -> None:
        """Words, of which no mark is known."""
        self.ids += ids
        self.told += [[math.nan] * len(self.marks)] * len(ids)

    def judge(self, role: Role, token: int | None) -> None:
        """A reflection token; None where the grader gave none, of which nothing is known and nothing is written."""
        if token is not None:
            self.ids.append(token)
            self.told.append([self._mark(role, token, mark) for mark in self.marks])

    def _mark(self, role: Role, token: int, mark: int) -> float:
        return 0.0 if mark == token else -math.inf if mark in self.schema.ids[role] else math.nan

    def marked(self, finish: Literal["eos", "stop", "length"]) -> Marked:
        told = np.array(self.told, np.float32).reshape(len(self.ids), len(self.marks))
        return Marked(tuple(self.ids), np.zeros(len(self.ids), np.float32), told, finish)


class Graded(AskedGenerator):
    """A chat model behind a server, its reflection by yes-or-no questions.

    Attributes:
        rewrites: how often a question that finds nothing relevant is reworded.

    Raises:
        GeneratorError: `api_key_env` names a variable that is not set.
    """

    exact_marks = False

    def __init__(self, settings: GeneratorSettings, prompt: PromptSettings):
        super().__init__(_bytes_tokenizer(), settings, prompt)
        self.server = Server(settings, field="generator", purpose="for generator.kind graded")
        self.rewrites = settings.rewrites
        self._chats: dict[str, asyncio.Task[tuple[str, bool]]] = {}

    @property
    def weights(self) -> Any:
        return ["graded", self.settings.endpoint, self.settings.model, GRADERS, JUDGES, list(WRITES.values()), FROM]

    def ask(self, requests: Sequence[Request]) -> list[Marked]:
        """As every asked generator's. Raises GeneratorError for a server that cannot be reached or refuses key or model."""
        return self.server.together(self._one, requests, first=self._forget) if requests else []

    def ask_scores(self, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[np.ndarray]:
        raise GeneratorError("a graded generator knows no log-probabilities", hint="decode.labels in place of options")

    def reword(self, question: str, tried: Sequence[str]) -> str:
        """The question in other words than those that were tried."""
        shown = "\n".join([f"Question: {question}", *(f"Found nothing: {text}" for text in tried)])
        [(text, _)] = self.server.together(
            lambda client, asked: self._chat(client, REWORDS, asked, GRADE), [shown], first=self._forget
        )
        return " ".join(text.split()) or question

    # --- one request

    async def _one(self, client: Any, request: Request) -> Marked:
        """What stands behind a context: one reflection token, or a segment up to the next decision, or a whole answer."""
        schema, seen = self.schema, self._read(request.ids)
        row = _Row(schema, request.marks)
        if seen.at in ("question", "segment"):
            return await self._decided(client, seen, row, request)
        if seen.at == "passage":
            irrelevant, relevant = schema.ids["is_rel"]
            seen.judge(await self._grade(client, seen, row, "is_rel", (relevant, irrelevant)) is not False)
        if request.max_new_tokens == 1:
            if not row.ids:
                row.say(self.marked_prompt.foreign(" ")[:1])  # of words nothing is known before they are written
            return row.marked("length")
        return await self._written(client, seen, row, request)

    async def _written(self, client: Any, seen: _Seen, row: _Row, request: Request) -> Marked:
        schema, whole = self.schema, self.schema.no not in request.stop_ids
        text, cut = await self._text(client, seen, request, whole=whole)
        row.say(self.marked_prompt.foreign(text))
        seen.answer = f"{seen.answer} {text}".strip()
        if cut:
            return row.marked("length")
        if text and seen.judged:
            fully, _, none = schema.ids["is_sup"]
            await self._grade(client, seen, row, "is_sup", (fully, none), sentence=text)
        if whole or not text or await self._yes(client, seen, "complete") is not False:
            useless, *_, useful = schema.ids["is_use"]
            await self._grade(client, seen, row, "is_use", (useful, useless))
            row.say([self.eos])
            return row.marked("eos")
        return await self._decided(client, seen, row, request)

    async def _decided(self, client: Any, seen: _Seen, row: _Row, request: Request) -> Marked:
        """The Retrieve token behind what was seen; where the grader gives none, [No Retrieval] with unknown marks."""
        schema, token = self.schema, None
        if seen.fits and await self._yes(client, seen, "continue"):
            token = schema.cont
        else:
            found = await self._yes(client, seen, "retrieve", passage=False)
            token = None if found is None else schema.yes if found else schema.no
        if token is None:
            row.say([schema.no])
        row.judge("retrieve", token)
        return row.marked("stop" if row.ids[-1] in request.stop_ids else "length")

    async def _grade(
        self, client: Any, seen: _Seen, row: _Row, role: Role, tokens: tuple[int, int], *, sentence: str = ""
    ) -> bool | None:
        """Ask one grader and write its token: the first of `tokens` for a yes, the second for a no."""
        found = await self._yes(client, seen, role, sentence=sentence)
        row.judge(role, None if found is None else tokens[0] if found else tokens[1])
        return found

    async def _yes(self, client: Any, seen: _Seen, grader: str, *, sentence: str = "", passage: bool = True) -> bool | None:
        """What a grader says; None where that is neither yes nor no, even when it is asked again."""
        shows = {"instruction": seen.question}
        if grader not in ("is_rel", "is_sup"):  # these two are judged apart from what was said before
            shows["answer"] = seen.answer
        shows |= {"sentence": sentence} if sentence else {}
        shows |= {"passage": seen.passage} if passage and grader in ("is_rel", "is_sup", "continue") else {}
        text = f"{_fields(shows)}\n\n{GRADERS[grader]}"
        for more in ("", " Answer yes or no."):
            said, _ = await self._chat(client, JUDGES, text + more, GRADE)
            word = said.strip().lstrip("\"'*([").casefold()
            if word.startswith(("yes", "no")) and not word[2 + word.startswith("yes") :][:1].isalpha():
                return word.startswith("yes")
        return None

    async def _text(self, client: Any, seen: _Seen, request: Request, *, whole: bool) -> tuple[str, bool]:
        """The next sentence, or the whole answer, and whether it was cut off by the limit."""
        shows = {"instruction": seen.question, "answer": seen.answer}
        shows |= {"passage": seen.passage} if seen.reads else {}
        task = WRITES[whole] + (FROM if seen.reads else "")
        said, cut = await self._chat(
            client, task, _fields(shows), request.max_new_tokens, temperature=request.temperature, seed=request.seed
        )
        parts = sentences(said)
        if whole or not parts:
            return said.strip(), cut
        return parts[0], cut and len(parts) == 1

    async def _chat(
        self, client: Any, task: str, text: str, limit: int, *, temperature: float = 0.0, seed: int | None = None
    ) -> tuple[str, bool]:
        """A reply and whether the limit cut it off; equal questions are asked once, even at the same time."""
        key = repr((task, text, limit, temperature, seed))
        if key not in self._chats:
            self._chats[key] = asyncio.ensure_future(self._sent(client, task, text, limit, temperature, seed))
        return await self._chats[key]

    async def _sent(
        self, client: Any, task: str, text: str, limit: int, temperature: float, seed: int | None
    ) -> tuple[str, bool]:
        messages = [{"role": "system", "content": task}, {"role": "user", "content": text}]
        drawn: Mapping[str, Any] = {} if seed is None else {"seed": seed}
        answer = await client.chat.completions.create(
            model=self.settings.model, messages=messages, max_tokens=limit, temperature=temperature, **drawn
        )
        self._count(answer)
        if not answer.choices:
            raise GeneratorError(f"{self.server.name} replied without a choice", hint=HINT)
        choice = answer.choices[0]
        return choice.message.content or "", choice.finish_reason == "length"

    async def _forget(self, client: Any) -> None:
        """Drop what an earlier run was called off in: a task belongs to the loop that began it."""
        self._chats = {
            key: task for key, task in self._chats.items()
            if task.done() and not task.cancelled() and task.exception() is None
        }  # fmt: skip

    def _count(self, answer: Any) -> None:
        usage = answer.usage
        self.server.count(answer)
        self.cost.calls += 1
        self.cost.positions += (usage.prompt_tokens + max(0, usage.completion_tokens - 1)) if usage is not None else 0

    # --- ids to text

    def _read(self, ids: Sequence[int]) -> _Seen:
        """Take a context apart at its control ids."""
        schema, runs = self.schema, _runs(ids, self.marked_prompt.forbidden)
        seen = _Seen(self._asked(self._spelt(runs[0][1])))
        for token, words in runs[1:]:
            text = self._spelt(words)
            if token == schema.opens:
                seen.passage = text
                continue
            if token in schema.ids["retrieve"]:
                seen.at, seen.judged, seen.reads = "text", False, token == schema.cont and seen.fits
                seen.passage, seen.fits = ("", False) if token == schema.yes else (seen.passage, seen.fits)
            elif token == schema.closes:
                seen.at = "passage"
            elif token in schema.ids["is_rel"]:
                seen.at = "text"
                seen.judge(token == schema.ids["is_rel"][1])
            elif token in schema.controls:
                seen.at = "segment"
            if text.strip():
                seen.answer, seen.at = f"{seen.answer} {text.strip()}".strip(), "segment"
        return seen

    def _asked(self, text: str) -> str:
        """The question without the template around it."""
        before, _, after = self.prompt.settings.self_rag.template.partition("{instruction}")
        return text.removeprefix(before).removesuffix(after).strip()

    def _spelt(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _runs(ids: Sequence[int], controls: frozenset[int]) -> list[tuple[int | None, list[int]]]:
    """Each control id with the words behind it; the first run is what stands before all of them."""
    runs: list[tuple[int | None, list[int]]] = [(None, [])]
    for token in ids:
        if token in controls:
            runs.append((token, []))
        else:
            runs[-1][1].append(token)
    return runs


def _fields(shows: Mapping[str, str]) -> str:
    return "\n".join(f"{HEADS[name]}: {text.strip()}" for name, text in shows.items() if text.strip())


def _bytes_tokenizer() -> PreTrainedTokenizerFast:
    """A byte an id, then the reflection tokens and an end; text comes back as it was."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END)
    tokenizer.add_special_tokens({"extra_special_tokens": list(Schema.numbered(0).spellings)})
    return tokenizer
