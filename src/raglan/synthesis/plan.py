"""The plan: every example that is wanted, as a cell with one value per factor, before a word of it is written.

Each factor's margin is the largest remainder of its weights (`quotas`), exactly. Factors are dealt one after another, each
matched to those before it that the rules of compatibility name (`deal`): the cells with equal values there are one row of the
table. Which cell of a row gets which value is settled by a hash of seed, factor and cell number. Kinds of noise are dealt over
all slots of the dataset at once: four slots dealt alone would give 2 1 1 0 0 0 0 0 for ever, and no rare kind would come.

A cell's seeds are hash(run seed, cell number, purpose), so that a plan with more cells changes no seed of the others.
Deviation: rules name at most two earlier factors. Against all others a factor is balanced by the hash, not by a table.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from raglan.errors import RecipeError
from raglan.recipe import Recipe, SynthesisSettings
from raglan.synthesis.deal import deal_table
from raglan.synthesis.factors import Factor, Factors, Rule, Value, load_factors
from raglan.synthesis.quotas import Weight, exact, quotas
from raglan.synthesis.unseen import parted, reserved_values

__all__ = [
    "ABSENT", "CONFLICT", "DEALT", "SCRATCH", "Cell", "Plan", "cell_seed", "deal_plan", "factors_of", "make_plan",
    "reserved_of", "seed_of",
]  # fmt: skip

DEALT = (
    "task", "relation", "answer_format", "query_format", "topic", "absent_policy", "retriever", "k", "language", "source",
    "genre", "length", "clarity", "difficulty", "tailness", "persona", "template", "passage_form", "passage_head",
)  # fmt: skip
CLAIMS = ("fact_verification", "claim_correction")
FITTED = ("answer_format", "query_format", "genre")
ABSENT, CONFLICT, PARTIAL, UNKNOWN = "R5", "R6", "partial", "not_enough_information"
SCRATCH = "from_scratch"  # the source of a cell without a corpus
Codes = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Cell:
    """One example to be written: a value per factor. `number` counts from 0 and is its name; attempts at it are ordinals."""

    number: int
    seed: int
    task: str
    relation: str
    answer_format: str
    query_format: str
    topic: str
    retriever: str
    k: int
    evidence: int  # passages that the relation needs; 1 of a partial answer
    positions: tuple[int, ...] | None  # theirs, from 1; None: where their rank puts them
    noise: tuple[str, ...]  # the kinds of the other slots, in their order
    language: str
    source: str
    genre: str
    length: str
    clarity: str
    difficulty: str
    tailness: str
    persona: str
    template: str
    passage_form: str
    passage_head: str
    verdict: str | None = None  # of claims
    absent_policy: str | None = None  # of R5

    @property
    def slots(self) -> tuple[str, ...]:
        """All K slots in order, "evidence" or a kind of noise; with positions by rank, evidence first."""
        places = set(self.positions if self.positions is not None else range(1, self.evidence + 1))
        kinds = iter(self.noise)
        return tuple("evidence" if place in places else next(kinds) for place in range(1, self.k + 1))

    def seed_for(self, purpose: str, *, ordinal: int = 0) -> int:
        """The seed of one purpose in one attempt at this cell."""
        return _hashed(self.seed, purpose, ordinal)


@dataclass(frozen=True, slots=True)
class Plan:
    """All cells, and the margins that they have."""

    seed: int
    cells: tuple[Cell, ...]
    margins: Mapping[str, Mapping[str, int]]  # factor → value → count; "noise" counts slots; "position k=5" evidence
    allowed: Mapping[str, tuple[tuple[str, str], ...]]  # "task × relation" → the pairs that may meet
    left_out: Mapping[str, tuple[str, ...]]  # values of raglan's own lists that met nothing in this recipe


def seed_of(run: int, cell: int, purpose: str, *, ordinal: int = 0) -> int:
    """hash(run seed, cell, purpose): what `Cell.seed_for` gives, without the cell. 63 bits."""
    return _hashed(cell_seed(run, cell), purpose, ordinal)


def cell_seed(run: int, cell: int) -> int:
    """What `Cell.seed` is: a hash of the run's seed and its number."""
    return _hashed(run, "cell", cell)


def _hashed(*parts: int | str) -> int:
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def make_plan(recipe: Recipe, *, cannot: Mapping[str, Sequence[str]] | None = None) -> Plan:
    """Plan `recipe.synthesis`.

    Args:
        cannot: factor → values that the teacher never writes; they leave, and are listed. Formats that the recipe gives no
            weights for are then fitted to the tasks that stay.

    Raises:
        RecipeError: the recipe has no `synthesis`, its weights cannot be met together, or it names what the teacher cannot
            write; names the blocking values.
    """
    if recipe.synthesis is None:
        raise RecipeError("the recipe has no `synthesis`", hint="see docs/concepts/synthesis.md for one")
    asked = recipe.synthesis
    factors, left_out = factors_of(recipe, cannot=cannot)
    fit: frozenset[str] = frozenset(name for name, weights in asked.weights.items() if weights == "fit")
    fewer = asked.reserve is not None and bool(asked.reserve.task)
    fit |= {name for name in FITTED if (fewer or (cannot or {}).get(name)) and name not in asked.weights}
    return deal_plan(factors, asked.n, seed=recipe.seed, fit=fit, order=asked.passages.order, left_out=left_out)


def deal_plan(
    factors: Factors, n: int, *, seed: int, fit: frozenset[str] = frozenset(), order: str = "uniform",
    left_out: Mapping[str, tuple[str, ...]] | None = None,
) -> Plan:  # fmt: skip
    """A plan of `n` cells over these factors, with their weights and rules as they are.

    Args:
        fit: factors whose shares follow from what was dealt before them.
        order: where evidence stands, as `synthesis.passages.order`.
        left_out: what the plan says of values that are no longer among the factors.

    Raises:
        RecipeError: the weights cannot be met together; names the blocking values.
    """
    deal = _Deal(factors, n, seed, fit)
    for name in DEALT:
        deal.factor(name)
    deal.verdicts()
    deal.places(order)
    deal.noise()
    return Plan(seed, tuple(deal.cells()), deal.margins, _allowed(factors), left_out or {})


def factors_of(
    recipe: Recipe, *, cannot: Mapping[str, Sequence[str]] | None = None, part: str = ""
) -> tuple[Factors, dict[str, tuple[str, ...]]]:
    """All factors with the recipe's weights, and which values left: nobody writes them, or they meet none of what it allows.

    What is reserved has left, too; with `part`, a factor, its reserved values alone are there.

    Raises:
        RecipeError: a weight names what is not there, or what the teacher cannot write.
    """
    asked = recipe.synthesis
    assert asked is not None
    factors, unwritten, fixed = _weighted(recipe, cannot)
    factors = parted(factors, reserved_values(asked.reserve, factors, recipe.seed), part)
    needs = {value.name: value.evidence for value in factors["relation"].values}
    needs[ABSENT] = fewest = max(needs[ABSENT], asked.passages.gold_absent_from)
    if asked.passages.gold_absent and all(int(k.name) < fewest for k in factors["k"].values if k.weight):
        told = f"passages.gold_absent_from is {fewest}, and no K is so large"
        raise RecipeError(told, hint="give synthesis.passages.k a larger one, or set gold_absent=0")
    deepest = {name: frozenset(k for k in factors["k"].names if int(k) >= need) for name, need in needs.items()}
    kinds = frozenset(value.name for value in factors["noise"].values if value.gold_absent)
    rules = (*factors.rules, Rule("k", "relation", deepest, {}), Rule("noise", "relation", {ABSENT: kinds}, {}))
    factors, left_out = Factors(_with_one_knob(factors, asked).factors, rules).possible(fixed)
    if ABSENT in left_out.get("relation", ()):
        told = f"passages.gold_absent is {asked.passages.gold_absent:g}, and no task or kind of noise takes {ABSENT}"
        raise RecipeError(told, hint="set it to 0, or allow another task or kind")
    names = dict.fromkeys((*unwritten, *left_out))
    return _with_one_knob(factors, asked), {name: (*unwritten.get(name, ()), *left_out.get(name, ())) for name in names}


def reserved_of(recipe: Recipe, *, cannot: Mapping[str, Sequence[str]] | None = None) -> dict[str, tuple[str, ...]]:
    """Factor → values that the recipe reserves. Raises RecipeError: values that the plan would not have had."""
    assert recipe.synthesis is not None
    return reserved_values(recipe.synthesis.reserve, _weighted(recipe, cannot)[0], recipe.seed)


def _weighted(
    recipe: Recipe, cannot: Mapping[str, Sequence[str]] | None
) -> tuple[Factors, dict[str, tuple[str, ...]], set[str]]:
    """All factors with the recipe's weights, what the teacher cannot write, and the factors that stay whole."""
    asked = recipe.synthesis
    assert asked is not None
    factors = load_factors(asked.factors).having(*_of_recipe(recipe, asked))
    fixed = {"k", "retriever", "relation"} if "relation" in asked.weights else {"k", "retriever"}
    for name, weights in asked.weights.items():
        if weights == "fit":
            continue
        fixed.add(name)
        named: Mapping[str, Weight] = {**weights, ABSENT: 1} if name == "relation" else weights  # type: ignore[dict-item]
        factors = factors.weighted_topics(named) if name == "topic" else factors.weighted(name, named)
    return *_writable(factors, cannot or {}, {*_named(asked), "language", "source"}), fixed


def _named(asked: SynthesisSettings) -> set[str]:
    """Factors whose values the recipe names."""
    return {name for name, weights in asked.weights.items() if weights != "fit"}


def _writable(
    factors: Factors, cannot: Mapping[str, Sequence[str]], named: Collection[str]
) -> tuple[Factors, dict[str, tuple[str, ...]]]:
    """Without what a teacher cannot write, and what that was. What the recipe names with a weight does not leave."""
    left: dict[str, tuple[str, ...]] = {}
    for name, values in cannot.items():
        gone = [value for value in factors[name].values if value.name in set(values) and value.weight]
        if gone and name in named:
            raise RecipeError(
                f"the teacher cannot write {name} {', '.join(value.name for value in gone)}, which the recipe asks for",
                hint="give it no weight, or name another teacher",
            )
        kept = tuple(value for value in factors[name].values if value.name not in set(values))
        if not any(value.weight for value in kept):
            raise RecipeError(f"the teacher can write no {name}", hint="name another teacher")
        factors = factors.having(Factor(name, kept))
        left |= {name: tuple(value.name for value in gone)} if gone else {}
    return factors, left


def _of_recipe(recipe: Recipe, asked: SynthesisSettings) -> list[Factor]:
    """The factors that are no data file's: what the recipe itself counts."""
    retrievers: Mapping[str, Weight] = asked.retrievers or dict.fromkeys(recipe.knowledge.indexes, 1)
    scratch = exact(asked.from_scratch)
    listed: dict[str, Mapping[Any, Weight]] = {
        "retriever": retrievers,
        "k": dict(sorted(asked.passages.k.items())),
        "language": asked.languages,
        "source": {"knowledge": 1 - scratch, SCRATCH: scratch},
    }
    return [
        Factor(name, tuple(Value(str(key), exact(weight), str(key), str(key)) for key, weight in weights.items()))
        for name, weights in listed.items()
    ]


def _with_one_knob(factors: Factors, asked: SynthesisSettings) -> Factors:
    """R5 has the share `gold_absent`; the other relations share the rest in their proportions."""
    absent = exact(asked.passages.gold_absent)
    relation = factors["relation"]
    others = {value.name: value.weight for value in relation.values if value.name != ABSENT}
    total = sum(others.values(), Fraction(0))
    if not total and absent < 1:
        raise RecipeError("no relation but R5 has a weight", hint="give one a weight, or set passages.gold_absent=1")
    shares: dict[str, Weight] = {name: weight * (1 - absent) / total if total else 0 for name, weight in others.items()}
    return factors.weighted("relation", {**shares, ABSENT: absent})


def _allowed(factors: Factors) -> dict[str, tuple[tuple[str, str], ...]]:
    """The pairs with weight that each pair of ruled factors allows."""
    told = {}
    for factor, given in dict.fromkeys((rule.factor, rule.given) for rule in factors.rules if rule.factor in DEALT):
        rules = [rule for rule in factors.of(factor) if rule.given == given]
        first = [value.name for value in factors[given].values if value.weight]
        second = [value.name for value in factors[factor].values if value.weight]
        told[f"{given} × {factor}"] = tuple((a, b) for a in first for b in second if all(rule.allows(a, b) for rule in rules))
    return told


class _Deal:
    """The columns of the plan while they are dealt: per factor the number of the value that each cell has, −1 for none."""

    def __init__(self, factors: Factors, n: int, seed: int, fit: frozenset[str]):
        self.factors, self.n, self.seed, self.fit = factors, n, seed, fit
        self.codes: dict[str, Codes] = {}
        self.names: dict[str, list[str]] = {}
        self.margins: dict[str, dict[str, int]] = {}

    def factor(self, name: str) -> None:
        """Deal one factor over all cells; the policy of gold-absent cells over those alone."""
        cells = np.flatnonzero(self.chosen("relation", ABSENT)) if name == "absent_policy" else np.arange(self.n)
        self.over(name, cells, _nested(self.factors[name], len(cells)) if name == "topic" and name not in self.fit else None)

    def over(self, name: str, cells: Codes, counts: Sequence[int] | None = None) -> None:
        """Deal a factor over these cells, by its rules; without any, against tasks."""
        values = self.factors[name].values
        ruling = dict.fromkeys(rule.given for rule in self.factors.of(name))
        given = list(ruling) or [key for key in ("task",) if key in self.codes]
        rows, of_cell, allowed = self._rows(name, given, cells)
        held = np.bincount(of_cell, minlength=len(rows))
        told = ["·".join(row) or "the cells" for row in rows]
        if name in self.fit:
            table = _by_rows(held, [value.weight for value in values], allowed, names=told, factor=name)
        else:
            columns = list(counts) if counts is not None else quotas(len(cells), [value.weight for value in values])
            table = self._table(name, held, columns, allowed, told)
        codes = np.full(self.n, -1, np.int64)
        codes[cells] = self._assigned(name, of_cell, table, cells)
        self.codes[name], self.names[name] = codes, self.factors[name].names
        self.margins[name] = dict(zip(self.names[name], table.sum(0).tolist(), strict=True))

    def _rows(self, name: str, given: list[str], cells: Codes) -> tuple[list[list[str]], Codes, npt.NDArray[np.bool_]]:
        """The distinct values of `given` among the cells, which of them each cell has, and what each allows."""
        if not given:
            return [[]], np.zeros(len(cells), np.int64), np.ones((1, len(self.factors[name].values)), bool)
        stacked = np.stack([self.codes[key][cells] for key in given], axis=1)
        found, of_cell = np.unique(stacked, axis=0, return_inverse=True)
        rows = [[self.names[key][code] for key, code in zip(given, row, strict=True)] for row in found.tolist()]
        rules = [(given.index(rule.given), rule) for rule in self.factors.of(name)]
        columns = self.factors[name].names
        allowed = np.array([[all(rule.allows(row[at], v) for at, rule in rules) for v in columns] for row in rows], bool)
        return rows, of_cell.reshape(-1), allowed.reshape(len(rows), len(columns))

    def _table(self, name: str, rows: Codes, columns: list[int], allowed: npt.NDArray[np.bool_], told: list[str]) -> Codes:
        try:
            return deal_table(rows.tolist(), columns, allowed, row_names=told, column_names=self.factors[name].names)
        except RecipeError as fault:
            fit = f"set synthesis.weights.{name}=fit, " if name != "relation" else ""  # its share of R5 is another setting's
            hint = f"change synthesis.weights of one of these, {fit}or plan more examples"
            if name == "k":
                hint = "change synthesis.passages (k, gold_absent, gold_absent_from) or weights.relation, or plan more examples"
            raise RecipeError(f"{name} cannot be dealt to {self.n} cells: {fault.message}", hint=hint) from None

    def _assigned(self, name: str, of_cell: Codes, table: Codes, cells: Codes) -> Codes:
        """The value of each cell: within a row, cells in the order of their hash take the row's values one after another."""
        order = np.lexsort((_mixed(cells, _hashed(self.seed, "deal", name)), of_cell))
        dealt = np.empty(len(cells), np.int64)
        dealt[order] = np.repeat(np.tile(np.arange(table.shape[1]), table.shape[0]), table.reshape(-1))
        return dealt

    def chosen(self, name: str, value: str) -> npt.NDArray[np.bool_]:
        """Which cells have this value."""
        names = self.names[name]
        return self.codes[name] == (names.index(value) if value in names else -2)

    def verdicts(self) -> None:
        """Claims are supported or refuted; those without evidence are neither."""
        claims = np.logical_or.reduce([self.chosen("task", task) for task in CLAIMS])
        absent = claims & self.chosen("relation", ABSENT)
        self.over("verdict", np.flatnonzero(claims & ~absent))
        self.codes["verdict"][absent] = len(self.names["verdict"])
        self.names["verdict"] = [*self.names["verdict"], UNKNOWN]
        self.margins["verdict"][UNKNOWN] = int(absent.sum())

    def places(self, order: str) -> None:
        """Evidence over 1…K: for every K each position as often as the others, to within one."""
        needs = np.array([value.evidence for value in self.factors["relation"].values], np.int64)
        self.evidence = needs[self.codes["relation"]] + self.chosen("absent_policy", PARTIAL)
        self.positions: list[tuple[int, ...] | None] = [None] * self.n
        self.depth = np.array([int(name) for name in self.names["k"]], np.int64)[self.codes["k"]]
        if order == "rank":
            return
        for k in sorted(set(self.depth.tolist())):
            cells = np.flatnonzero(self.depth == k)
            cells = cells[np.argsort(_mixed(cells, _hashed(self.seed, "deal", "position")), kind="stable")]
            counts = self.evidence[cells].tolist()
            seed = _hashed(self.seed, "position", k)
            found = _spread_places(k, counts, seed) if order == "uniform" else _at(order, k, counts)
            for cell, places in zip(cells.tolist(), found, strict=True):
                self.positions[cell] = places
            told = Counter(place for places in found for place in places)
            self.margins[f"position k={k}"] = {str(place): told[place] for place in range(1, k + 1)}

    def noise(self) -> None:
        """Kinds of noise over all slots that are no evidence, of all cells together."""
        kinds, free = self.factors["noise"], self.depth - self.evidence
        slot_cells = np.repeat(np.arange(self.n), free)
        absent = self.chosen("relation", ABSENT)[slot_cells]
        columns = quotas(len(slot_cells), [kind.weight for kind in kinds.values])
        allowed = np.array([[True] * len(columns), [kind.gold_absent for kind in kinds.values]])
        held = np.array([(~absent).sum(), absent.sum()])
        table = self._table("noise", held, columns, allowed, ["slots beside evidence", "slots without evidence"])
        dealt = np.full(len(slot_cells), -1, np.int64)
        keys = _mixed(np.arange(len(slot_cells)), _hashed(self.seed, "deal", "noise"))
        for row in (0, 1):
            self._kinds(dealt, np.flatnonzero(absent == bool(row)), table[row], (keys, slot_cells))
        self.margins["noise"] = dict(zip(kinds.names, columns, strict=True))
        self.slot_kinds = np.split(dealt, np.cumsum(free)[:-1])

    def _kinds(self, dealt: Codes, slots: Codes, counts: Codes, where: tuple[Any, Codes]) -> None:
        """One row's slots: kinds that belong beside a relation take its slots first, the others what is left, by hash."""
        keys, slot_cells = where
        slots = slots[np.argsort(keys[slots], kind="stable")]
        values = self.factors["noise"].values
        for code in (code for code, kind in enumerate(values) if kind.beside):
            fits = np.logical_or.reduce([self.chosen("relation", name) for name in values[code].beside])[slot_cells[slots]]
            taken = slots[np.argsort(~fits, kind="stable")][: counts[code]]
            dealt[taken] = code
            slots = slots[dealt[slots] < 0]
        rest = [0 if kind.beside else count for kind, count in zip(values, counts.tolist(), strict=True)]
        dealt[slots] = np.repeat(np.arange(len(values)), rest)

    def cells(self) -> list[Cell]:
        """The finished columns as records."""
        plain = [name for name in DEALT if name not in ("k", "absent_policy")]
        columns = {name: [self.names[name][code] for code in self.codes[name].tolist()] for name in plain}
        columns |= {
            name: [self.names[name][code] if code >= 0 else None for code in self.codes[name].tolist()]
            for name in ("verdict", "absent_policy")
        }
        kinds = self.factors["noise"].names
        rows = zip(*columns.values(), strict=True)
        return [
            Cell(
                number=number, seed=cell_seed(self.seed, number), k=k, evidence=evidence, positions=places,
                noise=tuple(kinds[code] for code in noise.tolist()), **dict(zip(columns, row, strict=True)),
            )
            for number, (row, k, evidence, places, noise) in enumerate(
                zip(rows, self.depth.tolist(), self.evidence.tolist(), self.positions, self.slot_kinds, strict=True)
            )
        ]  # fmt: skip


def _nested(topic: Factor, n: int) -> list[int]:
    """Quotas level by level: few cells then still spread over the first level, where one list of leaves would fill its head."""

    def shared(n: int, leaves: list[Value], level: int) -> list[int]:
        groups: dict[str, list[Value]] = {}
        for leaf in leaves:
            groups.setdefault("/".join(leaf.name.split("/")[:level]), []).append(leaf)
        counts = quotas(n, [sum((leaf.weight for leaf in group), Fraction(0)) for group in groups.values()])
        if level == 3:
            return counts
        return [count for some, group in zip(counts, groups.values(), strict=True) for count in shared(some, group, level + 1)]

    return shared(n, list(topic.values), 1)


def _by_rows(rows: Codes, weights: list[Fraction], allowed: npt.NDArray[np.bool_], *, names: list[str], factor: str) -> Codes:
    """`fit`: each row shares its cells among what it takes; what rounding owes a column in one row, it gets in a later one."""
    table, owed = np.zeros(allowed.shape, np.int64), [Fraction(0)] * len(weights)
    for i, count in enumerate(rows.tolist()):
        shares = [weight if may else Fraction(0) for weight, may in zip(weights, allowed[i], strict=True)]
        total = sum(shares, Fraction(0))
        if not total:
            raise RecipeError(f"{names[i]} takes no {factor} that has a weight", hint=f"see synthesis.weights.{factor}")
        wanted = [count * share / total for share in shares]
        dealt = [int(quota) for quota in wanted]
        owed = [debt + quota - some for debt, quota, some in zip(owed, wanted, dealt, strict=True)]
        takers = sorted((j for j in range(len(weights)) if shares[j]), key=lambda j: (-owed[j], j))
        for j in takers[: count - sum(dealt)]:
            dealt[j], owed[j] = dealt[j] + 1, owed[j] - 1
        table[i] = dealt
    return table


def _spread_places(k: int, counts: list[int], seed: int) -> list[tuple[int, ...]]:
    """Per cell so many of 1…k, from those with most left of their equal quotas; so they end at exactly these."""
    left, draw, found = quotas(sum(counts), [1] * k), random.Random(seed), []
    for count in counts:
        order = sorted(range(k), key=lambda place: (-left[place], draw.random())) if count else []
        for place in order[:count]:
            left[place] -= 1
        found.append(tuple(sorted(place + 1 for place in order[:count])))
    return found


def _at(order: str, k: int, counts: list[int]) -> list[tuple[int, ...]]:
    """Evidence side by side at one end or in the middle."""
    before = [{"first": 0, "middle": (k - count) // 2, "last": k - count}[order] for count in counts]
    return [tuple(range(start + 1, start + count + 1)) for start, count in zip(before, counts, strict=True)]


def _mixed(numbers: Codes, seed: int) -> npt.NDArray[np.uint64]:
    """splitmix64 of seed + number: an order that depends on nothing else, whatever NumPy's version."""
    with np.errstate(over="ignore"):
        z = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
