"""Rows of an instruction mix: tasks, dialogue and raw text in fixed shares, with one passage a row (RA-DIT's LM-ft).

    share_s = (1 − Σ fixed shares) · min(n_s, cap) / Σ_tasks min(n, cap)           of the tasks; n_s examples of source s
    room    = max_length − BOS − instruction − answer − EOS                        what a row leaves its passages

An example's k̃ retrieved passages make k̃ rows z_k ∘ x → y (Lin et al. 2023, arXiv 2310.01352, §2.1 and equation 3), whether
they hold the answer or not. Everything is drawn, retrieved and rendered once, before training: the same seed gives the same
rows, markers and order, however many workers carry them to the model. Passages alone are cut, from their ends; a row that
leaves them too little is listed and is an error, or is left out and counted.

Shares are of rows, and an example keeps all its k̃ rows, so that a source's rows are a multiple of k̃. Deviations, where the
paper is silent: a task whose capped examples are fewer than its share asks for is gone through again, in another order; of
a file's questions all may be drawn, whatever the cap, which limits the share alone.
"""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raglan.artifact import file_fingerprint
from raglan.corpus import Corpus
from raglan.data import load_examples
from raglan.datapoints import is_first_rank, write_points
from raglan.documents import read_texts
from raglan.errors import CorpusError, RecipeError
from raglan.metrics import accuracy, answer_recall, exact_match, f1, rouge_l
from raglan.packing import Pack, Row, check_packing, pack_rows
from raglan.progress import track
from raglan.prompt import Prompt
from raglan.rag import RAG
from raglan.recipe import DevTask, InstructionMix, MixSource
from raglan.records import Context, DataPoint, Example, Hit, Passage
from raglan.retriever import Retriever

__all__ = ["DEV_MEAN", "Mixture", "mix", "mixture_shares", "prompts_of"]

log = logging.getLogger(__name__)
DEV_MEAN = "dev_mean"
UNANSWERABLE = "unanswerable"  # how data points and the manifest name this source
UNTESTED = "learn from the training split; or set data.allow_test: true, if it is not what you evaluate on"
METRICS = {"em": exact_match, "f1": f1, "accuracy": accuracy, "rouge_l": rouge_l}
MINED_DEPTH = 20  # so many passages are looked through for a wrong one


@dataclass(frozen=True)
class Mixture:
    """What a stage learns from.

    Attributes:
        rows: or packs of them, in the order in which they were drawn.
        held_out: rows of the dev tasks, unpacked, for the loss.
        measure: the dev tasks' own metrics and their mean, where there are several.
    """

    rows: Sequence[Row] | Sequence[Pack]
    held_out: Sequence[Row]
    measure: Callable[[], dict[str, float]] | None


@dataclass(frozen=True)
class _Draft:
    """A row before it is rendered. `example` has the answer that is learned as its only one."""

    source: str
    example: Example
    hits: tuple[Hit, ...] = ()
    searched: bool = False


class _Misfit(Exception):
    """A row whose passages have too little room, or none."""

    def __init__(self, room: int):
        self.room = room


def mixture_shares(sizes: Mapping[str, int], *, cap: int, rest: float = 1.0) -> dict[str, float]:
    """Each source's part of `rest`, in proportion to min(n, cap).

    Example: 3,778, 7,473 and 130,319 examples with a cap of 7,500 share .85 as .171260, .338758 and .339982.
    """
    capped = {name: min(size, cap) for name, size in sizes.items()}
    whole = sum(capped.values())
    return {name: rest * size / whole for name, size in capped.items()}


def mix(data: InstructionMix, system: RAG, *, seed: int, folder: Path) -> Mixture:
    """Make the rows, and keep them in `folder`: data/ (see `raglan.datapoints`), and misfits.jsonl where there are any.

    Raises:
        CorpusError: a source that cannot be read or has no fitting rows. GeneratorError: raw text or packs for a model that
            cannot learn them. RecipeError: a source of the split `test`, or rows that do not fit.
    """
    if data.packing == "fit":
        check_packing(system.generator)
    if data.unsupervised:
        system.generator.text_row("a")  # refused before anything is searched for
    drafts, told = _drafts(data, system, seed)
    random.Random(f"{seed}/order").shuffle(drafts)
    writer = _Writer(data, system, seed)
    made, misfits = _written(writer, drafts)
    _keep_misfits(data, misfits, len(drafts), folder)
    rows: Sequence[Any] = [row for row, _ in made]
    fill = None
    if data.packing == "fit":
        rows, fill = pack_rows(rows, data.max_length)
        log.info("%d rows in %d packs of %d tokens, %.1f %% filled", len(made), len(rows), data.max_length, 100 * fill)
    if is_first_rank():
        counts = _counts(point.source for _, point in made)
        write_points(
            folder / "data", (point for _, point in made), **told, rows=counts, misfits=len(misfits), fill=fill, seed=seed,
            unanswerable=data.unanswerable and {
                "share": counts.get(UNANSWERABLE, 0) / len(made), "wanted": data.unanswerable.share,
                "from": data.unanswerable.origin, "answer": data.unanswerable.answer,
            },
        )  # fmt: skip
    held_out, measure = _dev(data, system, writer, seed)
    return Mixture(rows, held_out, measure)


def _drafts(data: InstructionMix, system: RAG, seed: int) -> tuple[list[_Draft], dict[str, Any]]:
    """Unrendered rows of all sources, and what the manifest is to say of them."""
    corpus = system.retriever.base.corpus
    for name, source in data.sources.items():
        _refuse_test_file(name, source, data)
    read = {name: _read(name, source, data, corpus, seed) for name, source in data.sources.items() if source.context != "none"}
    answered = {name: [example for example in examples if example.answers] for name, examples in read.items()}
    for name, examples in answered.items():
        if not examples:
            raise CorpusError(f"{data.sources[name].path} holds no question with an answer", hint="training needs `answers`")
    texts = {name: _texts(source, corpus) for name, source in data.sources.items() if source.context == "none"}
    sizes = {name: len(found) for name, found in {**answered, **texts}.items()}
    shares = _shares(data, sizes)
    each = {name: _rows_of_one(source, data) for name, source in data.sources.items()}
    total = data.rows or _once(data, sizes, shares, each)
    drafts: list[_Draft] = []
    for name, source in data.sources.items():
        count, chance = max(1, round(total * shares[name] / each[name])), random.Random(f"{seed}/{name}")
        if source.context == "none":
            drafts += [_Draft(name, Example(*texts[name][place])) for place in _drawn(sizes[name], count, chance)]
        else:
            drawn = [_learned(answered[name][place], source, chance) for place in _drawn(sizes[name], count, chance)]
            drafts += _with_passages(name, drawn, source, data, system.retriever)
    if data.unanswerable is not None:
        drafts += _unanswerable(data, read, system.retriever, max(1, round(total * data.unanswerable.share)), seed)
    files = {str(path): file_fingerprint(path) for s in data.sources.values() if (path := s.path) and path.is_file()}
    return drafts, {"shares": shares, "examples": sizes, "sources": files}


def _shares(data: InstructionMix, sizes: Mapping[str, int]) -> dict[str, float]:
    """Each source's share of the rows; what is left to 1 is unanswerable."""
    raw = {name: sizes[name] for name, source in data.sources.items() if source.context == "none"}
    talk = {name: sizes[name] for name, source in data.sources.items() if source.dialogue}
    rest = 1 - data.unsupervised - data.dialogue - (data.unanswerable.share if data.unanswerable else 0)
    return {
        **mixture_shares({name: sizes[name] for name in data.tasks}, cap=data.cap, rest=rest),
        **mixture_shares(raw, cap=data.cap, rest=data.unsupervised),
        **mixture_shares(talk, cap=data.cap, rest=data.dialogue),
    }


def _rows_of_one(source: MixSource, data: InstructionMix) -> int:
    return -(-data.passages // data.passages_a_row) if source.context == "retrieved" else 1


def _once(data: InstructionMix, sizes: Mapping[str, int], shares: Mapping[str, float], each: Mapping[str, int]) -> int:
    """So many rows that no task shows fewer than min(n, cap) examples."""
    return max(round(min(sizes[name], data.cap) * each[name] / shares[name]) for name in data.tasks)


def _drawn(size: int, count: int, chance: random.Random) -> list[int]:
    """`count` of `size` places, each once before any comes twice."""
    places: list[int] = []
    while len(places) < count:
        places += chance.sample(range(size), min(size, count - len(places)))
    return places


def _learned(example: Example, source: MixSource, chance: random.Random) -> Example:
    answer = chance.choice(example.answers) if source.answers == "random" else example.answers[0]
    return replace(example, answers=(answer,))


def _read(name: str, source: MixSource, data: InstructionMix, corpus: Corpus, seed: int) -> list[Example]:
    """A source's questions, none of which is of the split test. Raises RecipeError, CorpusError."""
    assert source.path is not None
    examples = load_examples(source.path, corpus, seed=seed, split="train")
    tests = [example.id for example in examples if _split(example) == "test"]
    if tests and not data.allow_test:
        raise RecipeError(f"source {name!r}, {source.path}, holds question {tests[0]!r} of the split test", hint=UNTESTED)
    return examples


def _refuse_test_file(name: str, source: MixSource, data: InstructionMix) -> None:
    named = source.path is not None and re.search(r"(?<![a-z])test(?![a-z])", source.path.name.lower())
    if named and not data.allow_test:
        raise RecipeError(f"source {name!r} is a test split by its name: {source.path}", hint=UNTESTED)


def _split(example: Example) -> str:
    return str(example.metadata.get("split", "train"))


def _texts(source: MixSource, corpus: Corpus) -> Sequence[tuple[str, str]]:
    """(id, text) of each raw text."""
    return _CorpusTexts(corpus) if source.path is None else read_texts(source.path)


@dataclass(frozen=True)
class _CorpusTexts(Sequence[tuple[str, str]]):
    corpus: Corpus

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, place: Any) -> Any:
        passage = self.corpus[place]
        return passage.id, f"{passage.title}\n{passage.text}".lstrip("\n")


def _with_passages(
    name: str, examples: Sequence[Example], source: MixSource, data: InstructionMix, retriever: Retriever
) -> list[_Draft]:
    """The rows of a source's examples: k̃ passages apart, or the task's own context."""
    if source.context == "gold":
        return [_Draft(name, example, _gold(example, data, retriever.base.corpus, name)) for example in examples]
    drafts = []
    for example, hits in zip(examples, _searched(examples, source, data.passages, retriever), strict=True):
        for start in range(0, max(len(hits), 1), data.passages_a_row):
            drafts.append(_Draft(name, example, hits[start : start + data.passages_a_row], searched=True))
    return drafts


def _searched(examples: Sequence[Example], source: MixSource, k: int, retriever: Retriever) -> list[tuple[Hit, ...]]:
    """The best k passages of each example; what comes several times is searched for once."""
    asked = [source.query.replace("{question}", example.query) for example in examples]
    texts = retriever.search_texts(asked, [example.history for example in examples])
    once = list(dict.fromkeys(texts))
    found = dict(zip(once, retriever.retrieve(once, k), strict=True))
    return [found[text] for text in texts]


def _gold(example: Example, data: InstructionMix, corpus: Corpus, name: str) -> tuple[Hit, ...]:
    """The context that the row itself brings, or its relevant passages."""
    own = example.metadata.get("context")
    if isinstance(own, str) and own.strip():
        return (Hit(Passage(f"{name}/{example.id}", own, str(example.metadata.get("title", ""))), -1, 0.0, 1),)
    rows = [row for identity in example.relevant if (row := corpus.row(identity)) is not None][: data.passages_a_row]
    if not rows:
        raise CorpusError(
            f"source {name!r} has context: gold, but question {example.id!r} has neither `context` nor `relevant`",
            hint="give each row its context, or set context: retrieved",
        )
    return tuple(Hit(corpus[row], row, 0.0, rank) for rank, row in enumerate(rows, 1))


def _unanswerable(
    data: InstructionMix, read: Mapping[str, Sequence[Example]], retriever: Retriever, count: int, seed: int
) -> list[_Draft]:
    """So many rows with a wrong passage and the answer that says so. Raises CorpusError where there are none."""
    assert data.unanswerable is not None
    mined, chance = data.unanswerable.origin == "mined", random.Random(f"{seed}/{UNANSWERABLE}")
    context = "retrieved" if mined else "gold"
    pool = [
        (name, example)
        for name, source in data.tasks.items()
        for example in read[name]
        if source.context == context and bool(example.answers) == mined
    ]
    drafts = _mined(pool, data, retriever, count, chance) if mined else [
        _Draft(name, example, _gold(example, data, retriever.base.corpus, name))
        for name, example in (pool[place] for place in (_drawn(len(pool), count, chance) if pool else []))
    ]  # fmt: skip
    if not drafts:
        raise CorpusError(
            f"there are no unanswerable rows (from: {data.unanswerable.origin})",
            hint="gold ones are questions without answers in sources with context: gold; mined ones need questions whose "
            f"{MINED_DEPTH} best passages do not all hold an answer",
        )
    say = (data.unanswerable.answer,)
    return [replace(draft, source=UNANSWERABLE, example=replace(draft.example, answers=say)) for draft in drafts]


def _mined(
    pool: Sequence[tuple[str, Example]], data: InstructionMix, retriever: Retriever, count: int, chance: random.Random
) -> list[_Draft]:
    """Questions with the best passage of their search that holds no answer and is not named as relevant."""
    depth, wrong = min(MINED_DEPTH, len(retriever.base.corpus)), []
    order = _drawn(len(pool), len(pool), chance)
    for start in range(0, len(order), 512):  # until there are enough
        part = [pool[place] for place in order[start : start + 512]]
        for name in dict.fromkeys(name for name, _ in part):
            examples = [example for other, example in part if other == name]
            for example, hits in zip(examples, _searched(examples, data.sources[name], depth, retriever), strict=True):
                found = next((hit for hit in hits if _is_wrong(hit.passage, example)), None)
                wrong += [_Draft(name, example, (found,), searched=True)] if found else []
        if len(wrong) >= count:
            break
    return [wrong[place] for place in _drawn(len(wrong), count, chance)] if wrong else []


def _is_wrong(passage: Passage, example: Example) -> bool:
    told = f"{passage.title}\n{passage.text}"
    return passage.id not in example.relevant and not answer_recall([told], example.answers)


class _Writer:
    """Renders drafts: prompts of all markers, each within the room that its answer leaves."""

    def __init__(self, data: InstructionMix, system: RAG, seed: int):
        self.data, self.seed, self.generator = data, seed, system.generator
        self.retriever = system.retriever.fingerprint
        own = system.generator.prompt
        self.least = own.settings.min_passage_tokens
        self.size = min(data.max_length, system.generator.positions or data.max_length)
        drawn = data.markers == "random" and own.layout == "joined"
        if data.markers == "random" and not drawn:
            log.info("the model's own layout (%s) is always the same: no markers are drawn", own.layout)
        self.prompts = prompts_of(data, own)
        if drawn and own.settings.template not in {prompt.settings.template for prompt in self.prompts.values()}:
            log.warning(
                "prompt.template, with which the tuned system will be asked, is none of those it learns: %r. Set it to %r",
                own.settings.template, next(iter(self.prompts.values())).settings.template,
            )  # fmt: skip

    def write(self, draft: _Draft, number: int) -> tuple[Row, DataPoint]:
        """A draft's row and data point. Raises _Misfit."""
        identity = f"{draft.source}-{number}"
        markers = random.Random(f"{self.seed}/{identity}").choice(list(self.prompts))
        return self._write(draft, identity, self.prompts[markers], markers)

    def held_out(self, draft: _Draft, prompt: Prompt) -> Row:
        """A draft's row with the prompt that the tuned system will be asked with. Raises _Misfit."""
        return self._write(draft, "", prompt, ("", ""))[0]

    def _write(self, draft: _Draft, identity: str, prompt: Prompt, markers: tuple[str, str]) -> tuple[Row, DataPoint]:
        example, answer = draft.example, (draft.example.answers or ("",))[0]
        contexts = tuple(
            Context(hit.passage.id, hit.passage.text, hit.score if draft.searched else None, hit.rank, hit.passage.title)
            for hit in draft.hits
        )
        point = DataPoint(
            identity, example.id, draft.source, _split(example), example.query, answer, contexts, "",
            self.retriever if draft.searched else "", markers, example.history, self.seed,
        )  # fmt: skip
        if not example.answers:  # raw text
            return self.generator.text_row(example.query, limit=self.size), replace(point, query="", answer=example.query)
        labels = self.generator.answer_ids(answer, prompt.answer_space)
        used = 0 if self.generator.is_seq2seq else len(labels)
        try:
            passages = [hit.passage for hit in draft.hits]
            rendered = prompt.within(self.size - used).render(example.query, passages, history=example.history)
        except RecipeError:  # the question does not fit, or leaves its passages nothing
            raise _Misfit(self._room(prompt, example, used)) from None
        if rendered.starved:
            raise _Misfit(self._room(prompt, example, used))
        return {"input_ids": list(rendered.ids), "labels": labels}, replace(point, prompt=rendered.text)

    def _room(self, prompt: Prompt, example: Example, used: int) -> int:
        """Tokens left to the passages by everything else but history, which makes room for them."""
        bare = prompt.within(1 << 30).render(example.query, [Passage("", "")])
        return self.size - used - len(bare.ids)


def prompts_of(data: InstructionMix, own: Prompt) -> dict[tuple[str, str], Prompt]:
    """The prompt in the words of each pair of markers; itself where none are drawn."""
    if data.markers != "random" or own.layout != "joined":
        return {("", ""): own}

    def said(template: str, pair: tuple[str, str]) -> str:
        return template.replace("{instruction}", pair[0]).replace("{answer}", pair[1])

    pairs = [(opens, closes) for opens in data.instruction_markers for closes in data.answer_markers]
    return {pair: own.worded(template=said(data.template, pair), no_passage=said(data.no_passage, pair)) for pair in pairs}


def _written(writer: _Writer, drafts: Sequence[_Draft]) -> tuple[list[tuple[Row, DataPoint]], list[dict[str, Any]]]:
    """Rows with their data points, and what does not fit."""
    made, misfits, numbers = [], [], dict.fromkeys((draft.source for draft in drafts), 0)
    for draft in track(drafts, "rendering"):
        number = numbers[draft.source]
        numbers[draft.source] += 1
        try:
            made.append(writer.write(draft, number))
        except _Misfit as fault:
            example = draft.example
            misfits.append({
                "id": f"{draft.source}-{number}", "example_id": example.id, "source": draft.source, "query": example.query,
                "answer": example.answers[0], "room": fault.room, "min_passage_tokens": writer.least,
                "max_length": writer.size,
            })  # fmt: skip
    return made, misfits


def _keep_misfits(data: InstructionMix, misfits: Sequence[dict[str, Any]], rows: int, folder: Path) -> None:
    """List what does not fit. Raises RecipeError if it is an error, or if nothing is left."""
    path = folder / "misfits.jsonl"
    if is_first_rank():
        folder.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if misfits:
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in misfits), encoding="utf-8")
    if misfits and (data.misfits == "error" or len(misfits) == rows):
        first = misfits[0]
        raise RecipeError(
            f"{len(misfits)} of {rows} rows leave their passages too little of data.max_length {first['max_length']}; "
            f"the first, question {first['example_id']!r} of {first['source']!r}, leaves {first['room']} tokens",
            hint=f"{path} lists them; raise data.max_length, lower prompt.min_passage_tokens, or set data.misfits: skip",
        )
    if misfits:
        log.warning("%d of %d rows do not fit and are left out: %s", len(misfits), rows, path)


def _dev(
    data: InstructionMix, system: RAG, writer: _Writer, seed: int
) -> tuple[list[Row], Callable[[], dict[str, float]] | None]:
    """Held-out rows of all dev tasks, and what measures these by their own metrics, if there are several."""
    corpus, prompt = system.retriever.base.corpus, system.generator.prompt
    rows: list[Row] = []
    measures: dict[str, Callable[[], float]] = {}
    for name, task in data.dev.items():
        examples = [e for e in load_examples(task.path, corpus, limit=task.limit, seed=seed, split="dev") if e.answers]
        if not examples:
            raise CorpusError(f"{task.path} holds no question with an answer", hint="validation needs `answers`")
        k = min(max(system.k, data.passages_a_row), len(corpus))
        texts, hits = system.search([e.query for e in examples], k, history=[e.history for e in examples])
        drafts = [_Draft(name, e, found[: data.passages_a_row], True) for e, found in zip(examples, hits, strict=True)]
        rows += _fitting(drafts, writer, prompt)
        measures[name] = _measure(system, examples, [found[: system.k] for found in hits], texts, task)
    if len(measures) < 2:
        return rows, None

    def measure() -> dict[str, float]:
        found = {f"{name}/{data.dev[name].metric}": own() for name, own in measures.items()}
        return {**found, DEV_MEAN: sum(found.values()) / len(found)}

    return rows, measure


def _fitting(drafts: Sequence[_Draft], writer: _Writer, prompt: Prompt) -> list[Row]:
    rows = []
    for draft in drafts:
        try:
            rows.append(writer.held_out(draft, prompt))
        except _Misfit:
            log.warning("held-out question %r of %r does not fit and is left out of the loss", draft.example.id, draft.source)
    return rows


def _measure(
    system: RAG, examples: Sequence[Example], hits: Sequence[Sequence[Hit]], texts: Sequence[str], task: DevTask
) -> Callable[[], float]:
    """The mean of a task's metric, answered by the recipe's own decoding from passages that are searched once."""
    queries, history = [example.query for example in examples], [example.history for example in examples]

    def measure() -> float:
        answers = system.read(queries, hits, history=history, texts=texts)
        values = [METRICS[task.metric](answer.text, example.answers) for answer, example in zip(answers, examples, strict=True)]
        return sum(values) / len(values)

    return measure


def _counts(names: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts
