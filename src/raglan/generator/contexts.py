"""Contexts of a transformers model: prefixes computed once, branched in one pass, written on in lockstep (Self-RAG, §cost).

    prefix (cached)          | suffix                     | written
    x x x x x x x x x x x x  | pad pad z z z z z z        | y y y …        pad: mask 0, and no position number
    _ _ x x x x x x x x x x  | z   z   z z z z z z        | y y y …

Rows end in the same column, so the last column is what the head reads, and nothing else is ever shown to it: of (n,V) numbers
M marks and the chosen id stay, as float32 log-softmax whatever the weights are. Keys and values of a prefix are copied for each
branch, never computed again; of a finished row they are dropped. Each forward pass holds at most `generator.batch_tokens`
columns (one row is always taken); what is kept between passes is the caller's, as long as it keeps the contexts.

Rows are never padded together where columns mean distance: sliding windows, and models that take no position ids.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from raglan.errors import GeneratorError
from raglan.generator.base import Contexts
from raglan.likelihood import chunked_token_logprobs
from raglan.memory import give_back
from raglan.records import Marked

if TYPE_CHECKING:
    from raglan.generator.hf import HFGenerator

__all__ = ["HFContexts", "prompt_contexts"]

ROOM = 64  # columns that a cache grows by
Place = tuple["_Block", int]  # a row of a block


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """Rows that were computed together and end in the same column.

    Attributes:
        layers: keys and values (R,H,W,·) of each layer. `real`: which columns are a row's own, (R,W) bool.
        hidden: what the head reads behind each row, (R,D).
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    real: Tensor
    hidden: Tensor


@dataclass(frozen=True, slots=True)
class _Choice:
    """What the head said of n rows: chosen ids (n,), their log p (n,), the marks' log p (n,M)."""

    ids: np.ndarray
    logprobs: np.ndarray
    marks: np.ndarray


class HFContexts(Contexts):
    """n contexts of an `HFGenerator`; see `raglan.generator.base.Contexts`."""

    def __init__(
        self, generator: HFGenerator, marks: tuple[int, ...], ids: list[tuple[int, ...]], places: list[Place],
        known: _Choice | None = None,
    ):  # fmt: skip
        self.generator, self.marks, self._ids, self._places, self._known = generator, marks, ids, places, known

    @property
    def ids(self) -> list[tuple[int, ...]]:
        return list(self._ids)

    @property
    def mark_logprobs(self) -> np.ndarray:
        return self._read().marks

    @property
    def best(self) -> np.ndarray:
        return self._read().ids

    def branch(self, places: Sequence[int], suffixes: Sequence[Sequence[int]]) -> HFContexts:
        ids = [(*self._ids[place], *suffix) for place, suffix in zip(places, suffixes, strict=True)]
        found = [self._places[place] for place in places]
        longer = [number for number, suffix in enumerate(suffixes) if len(suffix)]
        made = _extended(self.generator, [found[number] for number in longer], [list(suffixes[number]) for number in longer])
        for number, place in zip(longer, made, strict=True):
            found[number] = place
        return HFContexts(self.generator, self.marks, ids, found)

    def only(self, places: Sequence[int]) -> HFContexts:
        chosen, known = list(places), self._known
        if known is not None:
            known = _Choice(known.ids[chosen], known.logprobs[chosen], known.marks[chosen])
        return HFContexts(
            self.generator, self.marks, [self._ids[at] for at in chosen], [self._places[at] for at in chosen], known
        )

    def write(
        self, *, stop_ids: Collection[int], max_new_tokens: int | Sequence[int], first: Collection[int] | None = None,
        temperature: float = 0.0, seed: int | None = None,
    ) -> list[Marked]:  # fmt: skip
        limits = [max_new_tokens] * len(self) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        for ids, limit in zip(self._ids, limits, strict=True):
            self.generator.check_positions(len(ids), limit)
        draws = _draws(len(self), max(limits, default=0), seed) if temperature > 0 else None
        opening = self._opening(first, temperature, draws)
        rows = [
            _Row(self, number, limit, {*stop_ids}, {*self.generator.ends})
            for number, limit in enumerate(limits)
        ]  # fmt: skip
        for row in rows:
            row.add(opening, row.number)
        open_rows = [row for row in rows if not row.finish]
        with _at_work(self.generator):
            for part in _parts(self.generator, [(len(self._ids[row.number]), row.limit) for row in open_rows]):
                self._lockstep([open_rows[at] for at in part], temperature, draws)
                give_back()
        self.generator.cost.generated += sum(len(row.ids) for row in rows)
        return [row.marked(len(self.marks)) for row in rows]

    def score(self, places: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[np.ndarray]:
        generator, found = self.generator, [np.zeros(0, np.float32)] * len(places)
        for place, ids in zip(places, continuations, strict=True):
            generator.check_positions(len(self._ids[place]), len(ids))
        asked = [number for number, ids in enumerate(continuations) if len(ids)]
        sizes = [(len(self._ids[places[at]]), len(continuations[at]) - 1) for at in asked]
        with _at_work(generator):
            for part in _parts(generator, sizes):
                rows = [asked[at] for at in part]
                values = self._scored([places[at] for at in rows], [list(continuations[at]) for at in rows])
                for number, row in zip(rows, values, strict=True):
                    found[number] = row
        generator.cost.logprobs += sum(map(len, found))
        return found

    def _read(self) -> _Choice:
        """The head on all contexts, once."""
        if self._known is None:
            with _at_work(self.generator):
                self._known = _chosen(self.generator, self._hidden(range(len(self))), self.marks)
            self.generator.cost.logprobs += len(self) * (len(self.marks) + 1)
        return self._known

    def _hidden(self, places: Sequence[int]) -> Tensor:
        return torch.stack([block.hidden[row] for block, row in (self._places[place] for place in places)])

    def _opening(self, first: Collection[int] | None, temperature: float, draws: np.ndarray | None) -> _Choice:
        """The first id of each context, from what is known behind it."""
        known = self._read()
        if first is None and draws is None:
            return known
        with _at_work(self.generator):
            return _chosen(
                self.generator, self._hidden(range(len(self))), self.marks, first=first, temperature=temperature,
                draws=None if draws is None else draws[:, 0],
            )  # fmt: skip

    def _lockstep(self, rows: list[_Row], temperature: float, draws: np.ndarray | None) -> None:
        """Write on until every row has ended; a row that has leaves the batch."""
        generator, longest = self.generator, max(row.limit for row in rows)
        past, real = _prefixes([self._places[row.number] for row in rows], min(ROOM, longest))
        for step in range(1, longest):
            tokens = torch.tensor([[row.ids[-1]] for row in rows], device=generator.device)
            real = torch.cat([real, real.new_ones(len(rows), 1)], dim=1)
            hidden = _passed(generator, tokens, real, past, own=len(rows))[:, -1]
            told = None if draws is None else draws[[row.number for row in rows], step]
            choice = _chosen(generator, hidden, self.marks, temperature=temperature, draws=told)
            generator.cost.logprobs += len(rows) * (len(self.marks) + 1)
            for at, row in enumerate(rows):
                row.add(choice, at)
            alive = [at for at, row in enumerate(rows) if not row.finish]
            if not alive:
                return
            if len(alive) < len(rows):
                rows = [rows[at] for at in alive]
                kept = torch.tensor(alive, device=generator.device)
                past.batch_select_indices(kept)
                real = real[kept]

    def _scored(self, places: list[int], continuations: list[list[int]]) -> list[np.ndarray]:
        generator = self.generator
        states = [self._hidden(places)[:, None]]
        longest = max(map(len, continuations))
        if longest > 1:
            told, mask = _right(generator, [ids[:-1] for ids in continuations])
            past, real = _prefixes([self._places[place] for place in places], longest - 1)
            own = sum(len(ids) - 1 for ids in continuations)
            states.append(_passed(generator, told, torch.cat([real, mask], dim=1), past, keep=longest - 1, own=own))
        hidden = torch.cat(states, dim=1)  # (n,T,D): the context's own state, then pads, then those of all but the last id
        rows = [torch.cat([row[:1], row[longest - len(ids) + 1 :]]) for row, ids in zip(hidden, continuations, strict=True)]
        targets = torch.tensor([token for ids in continuations for token in ids], device=generator.device)
        chunk = generator.settings.head_chunk
        values = chunked_token_logprobs(torch.cat(rows), generator.head_logits, targets, chunk=chunk).float().cpu().numpy()
        return list(np.split(values, np.cumsum([len(ids) for ids in continuations])[:-1]))


class _Row:
    """A continuation while it is written."""

    def __init__(self, contexts: HFContexts, number: int, limit: int, stops: set[int], ends: set[int]):
        self.number, self.limit, self.stops, self.ends = number, limit, stops, ends
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.marks: list[np.ndarray] = []
        self.finish: Literal["eos", "stop", "length", ""] = ""

    def add(self, choice: _Choice, at: int) -> None:
        if self.limit > 0:
            self.ids.append(int(choice.ids[at]))
            self.logprobs.append(float(choice.logprobs[at]))
            self.marks.append(choice.marks[at])
        last = self.ids[-1] if self.ids else None
        self.finish = (
            "eos" if last in self.ends else "stop" if last in self.stops else "length" if len(self.ids) >= self.limit else ""
        )

    def marked(self, marks: int) -> Marked:
        shaped = np.array(self.marks, np.float32).reshape(len(self.ids), marks)
        return Marked(tuple(self.ids), np.array(self.logprobs, np.float32), shaped, self.finish or "length")


def prompt_contexts(generator: HFGenerator, prompts: Sequence[Sequence[int]], marks: Sequence[int]) -> HFContexts:
    """Contexts of whole prompts. Raises GeneratorError: a prompt without an id, or too long a one."""
    ids = [tuple(int(token) for token in prompt) for prompt in prompts]
    if empty := [number for number, one in enumerate(ids) if not one]:
        raise GeneratorError(f"prompt {empty[0]} of {len(ids)} has no id: a context needs one at least")
    return HFContexts(generator, tuple(marks), ids, _extended(generator, [None] * len(ids), [list(one) for one in ids]))


def _extended(generator: HFGenerator, places: Sequence[Place | None], suffixes: Sequence[list[int]]) -> list[Place]:
    """Each place (None: nothing) with its suffix behind it, computed."""
    known = [0 if place is None else int(place[0].real[place[1]].sum()) for place in places]
    sizes = [(before, len(suffix)) for before, suffix in zip(known, suffixes, strict=True)]
    for before, more in sizes:
        generator.check_positions(before, more)
    found: dict[int, Place] = {}
    with _at_work(generator):
        for part in _parts(generator, sizes):
            block = _block(generator, [places[at] for at in part], [suffixes[at] for at in part])
            found.update({at: (block, row) for row, at in enumerate(part)})
            give_back()
    generator.cost.reused += sum(known)
    return [found[at] for at in range(len(places))]


def _block(generator: HFGenerator, places: Sequence[Place | None], suffixes: Sequence[list[int]]) -> _Block:
    told, mask = _right(generator, suffixes)
    behind = [place for place in places if place is not None]
    past, real = _prefixes(behind, told.shape[1]) if behind else (DynamicCache(), mask[:, :0])
    real = torch.cat([real, mask], dim=1)
    hidden = _passed(generator, told, real, past, own=sum(map(len, suffixes)))[:, -1].clone()
    return _Block(tuple((layer.keys, layer.values) for layer in past.layers), real, hidden)  # type: ignore[misc]


def _right(generator: HFGenerator, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids (n,longest) that end in the same column, and which are real (bool)."""
    longest = max(map(len, rows))
    ids = [[generator.pad] * (longest - len(row)) + row for row in rows]
    real = [[False] * (longest - len(row)) + [True] * len(row) for row in rows]
    return torch.tensor(ids, device=generator.device), torch.tensor(real, device=generator.device)


def _passed(generator: HFGenerator, ids: Tensor, real: Tensor, past: DynamicCache, *, keep: int = 1, own: int) -> Tensor:
    """One forward pass of (n,q) ids behind the cache: what the head would read at the last `keep` columns, (n,keep,D).

    `real` (n,W+q) covers the cache too; `own` of the n·q ids are no pads. A position is the number of real ids before it.
    """
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": real.long(), "past_key_values": past}
    taken = _takes(generator)
    if "position_ids" in taken:
        inputs["position_ids"] = (real.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    if "logits_to_keep" in taken:
        inputs["logits_to_keep"] = keep
    generator.cost.calls += 1
    generator.cost.positions += own
    return generator.states_before_head(generator.model, inputs, use_cache=True)[:, -keep:]


def _takes(generator: HFGenerator) -> Collection[str]:
    """Names of what the model's forward pass can be told."""
    model = generator.model.get_base_model() if hasattr(generator.model, "get_base_model") else generator.model
    return _parameters(type(model))


@cache
def _parameters(kind: type) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)  # type: ignore[attr-defined]


def _chosen(
    generator: HFGenerator, hidden: Tensor, marks: Sequence[int], *, first: Collection[int] | None = None,
    temperature: float = 0.0, draws: np.ndarray | None = None,
) -> _Choice:  # fmt: skip
    """The head on (n,D) states, `head_chunk` rows at a time: an id each, its raw log p and that of the marks."""
    read = torch.tensor(list(marks), device=hidden.device, dtype=torch.long)
    allowed = None if first is None else torch.tensor(sorted(first), device=hidden.device, dtype=torch.long)
    found = []
    for start in range(0, len(hidden), generator.settings.head_chunk):
        rows = slice(start, start + generator.settings.head_chunk)
        logits = generator.head_logits(hidden[rows]).float()
        among = logits if allowed is None else logits[:, allowed]
        at = among.argmax(-1) if draws is None else _drawn(among, temperature, draws[rows])
        ids = at if allowed is None else allowed[at]
        logprobs = logits.log_softmax(-1)
        found.append((ids, logprobs.gather(1, ids[:, None])[:, 0], logprobs[:, read]))
    return _Choice(*(torch.cat(part).cpu().numpy() for part in zip(*found, strict=True)))


def _drawn(logits: Tensor, temperature: float, draws: np.ndarray) -> Tensor:
    """The place in p^(1/temperature)'s distribution function where each draw from [0,1) falls."""
    heaped = (logits.double() / temperature).softmax(-1).cumsum(-1)
    told = torch.tensor(draws, device=logits.device)[:, None] * heaped[:, -1:]
    return torch.searchsorted(heaped, told, right=True)[:, 0].clamp_max(logits.shape[1] - 1)


def _draws(rows: int, steps: int, seed: int | None) -> np.ndarray:
    """One number from [0,1) for each row and step; a row's do not depend on the others'."""
    entropy = np.random.SeedSequence().entropy if seed is None else seed
    drawn = [np.random.default_rng([int(entropy), row]).random(max(1, steps)) for row in range(rows)]  # type: ignore[arg-type]
    return np.array(drawn).reshape(rows, max(1, steps))


def _prefixes(places: Sequence[Place], room: int) -> tuple[DynamicCache, Tensor]:
    """A cache with a copy of these rows that ends in one column, with room behind it, and which columns are real."""
    by_block: dict[int, tuple[_Block, list[int], list[int]]] = {}
    for number, (block, row) in enumerate(places):
        _, numbers, rows = by_block.setdefault(id(block), (block, [], []))
        numbers.append(number)
        rows.append(row)
    parts = [(numbers, _Picked(block, rows)) for block, numbers, rows in by_block.values()]
    width = max(picked.width for _, picked in parts)
    first = parts[0][1].block
    real = first.real.new_zeros(len(places), width)
    layers = []
    for number in range(len(first.layers)):
        layers.append(_Roomy.like(first.layers[number], len(places), width, room))
    for numbers, picked in parts:
        start = width - picked.width
        where = slice(None) if len(parts) == 1 else torch.tensor(numbers, device=real.device)
        real[where, start:] = picked.real
        for layer, (keys, values) in zip(layers, picked.block.layers, strict=True):
            layer.keys[where, :, start:] = picked.of(keys)
            layer.values[where, :, start:] = picked.of(values)
    past = DynamicCache()
    past.layers.extend(layers)
    return past, real


class _Picked:
    """Rows of a block, each with its real columns at the end and no more pads before them than the longest leaves."""

    def __init__(self, block: _Block, rows: list[int]):
        self.block = block
        self.rows = torch.tensor(rows, device=block.real.device)
        real = block.real[self.rows]
        self.width = int(real.sum(1).max())
        self.columns = None
        if self.width < real.shape[1] or not bool(real.all()):
            order = real.int().argsort(dim=1, stable=True)[:, real.shape[1] - self.width :]
            self.columns, real = order[:, None, :, None], real.gather(1, order)
        self.real = real

    def of(self, values: Tensor) -> Tensor:
        picked = values[self.rows]
        if self.columns is None:
            return picked
        return picked.gather(2, self.columns.expand(-1, picked.shape[1], -1, picked.shape[3]))


class _Roomy(DynamicLayer):
    """A cache layer that is written into, not made anew for every id."""

    _stores: list[Tensor]  # keys and values with room behind them

    @classmethod
    def like(cls, layer: tuple[Tensor, Tensor], rows: int, width: int, room: int) -> _Roomy:
        made = cls()
        made.lazy_initialization(*layer)
        made._stores = [values.new_zeros(rows, values.shape[1], width + room, values.shape[3]) for values in layer]
        made._show(width)
        return made

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        for number, states in enumerate((key_states, value_states)):
            store = self._stores[number]
            if end > store.shape[2]:
                more = store.new_zeros(*store.shape[:2], max(ROOM, end - store.shape[2]), store.shape[3])
                store = self._stores[number] = torch.cat([store, more], dim=2)
            store[:, :, start:end] = states
        self._show(end)
        return self.keys, self.values  # type: ignore[return-value]

    def batch_select_indices(self, indices: Tensor) -> None:
        width = self.get_seq_length()
        self._stores = [store[indices] for store in self._stores]
        self._show(width)

    def _show(self, width: int) -> None:
        self.keys, self.values = (store[:, :, :width] for store in self._stores)


def _parts(generator: HFGenerator, sizes: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """Which rows of (known, new) ids go together: all, as long as they fit; rows of unlike length only where pads may be."""
    limit, alike = generator.batch_tokens, _alike(generator, max((sum(size) for size in sizes), default=0))
    order = sorted(range(len(sizes)), key=lambda at: sizes[at], reverse=True)
    batch: list[int] = []
    known = new = 0
    for at in order:
        known, new = max(known, sizes[at][0]), max(new, sizes[at][1])
        if batch and ((len(batch) + 1) * (known + new) > limit or (alike and sizes[batch[0]] != sizes[at])):
            yield batch
            batch = []
            known, new = sizes[at]
        batch.append(at)
    if batch:
        yield batch


def _alike(generator: HFGenerator, longest: int) -> bool:
    """Whether columns mean distance to this model, so that a pad would push others apart."""
    window = getattr(generator.model.config.get_text_config(), "sliding_window", None)
    return "position_ids" not in _takes(generator) or (window is not None and window < longest)


@contextmanager
def _at_work(generator: HFGenerator) -> Iterator[None]:
    was_training = generator.model.training
    generator.model.eval()
    try:
        with torch.no_grad(), generator.autocast():
            yield
    finally:
        generator.model.train(was_training)
