"""What a scenario is made of: the factors, their values and weights, and which values may meet.

All of it is data (`data/*.yaml`, English and Chinese). A folder of one's own may hold files of the same names, which are then
read instead. Compatibility is one list of rules: with `takes`, a value of the earlier factor meets only the values named;
with `reserved`, a value of the later factor meets only the earlier ones named. What no rule mentions may meet everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from raglan.errors import RecipeError
from raglan.synthesis.quotas import Weight, exact

__all__ = ["Factor", "Factors", "Rule", "Value", "load_factors"]

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
DATA = Path(__file__).parent / "data"
FILES = ("factors.yaml", "topics.yaml", "compatibility.yaml")


@dataclass(frozen=True, slots=True)
class Value:
    """One value of a factor, with its words for prompts."""

    name: str
    weight: Fraction
    en: str
    zh: str
    evidence: int = 0  # of a relation: the passages that it needs
    gold_absent: bool = True  # of a noise kind: allowed where no passage answers
    beside: tuple[str, ...] = ()  # of a noise kind: the relations that get it first


@dataclass(frozen=True, slots=True)
class Factor:
    """A factor's values, in the order that settles ties."""

    name: str
    values: tuple[Value, ...]

    @property
    def names(self) -> list[str]:
        return [value.name for value in self.values]

    def __getitem__(self, name: str) -> Value:
        return next(value for value in self.values if value.name == name)


@dataclass(frozen=True, slots=True)
class Rule:
    """Which values of `factor` each value of the earlier factor `given` takes."""

    factor: str
    given: str
    takes: Mapping[str, frozenset[str]]
    reserved: Mapping[str, frozenset[str]]

    def allows(self, given: str, value: str) -> bool:
        """Whether the two may meet."""
        return value in self.takes.get(given, (value,)) and given in self.reserved.get(value, (given,))


@dataclass(frozen=True, slots=True)
class Factors:
    """All factors by name, and all rules."""

    factors: Mapping[str, Factor]
    rules: tuple[Rule, ...]

    def __getitem__(self, name: str) -> Factor:
        return self.factors[name]

    def of(self, factor: str) -> tuple[Rule, ...]:
        """The rules that say what `factor` may meet."""
        return tuple(rule for rule in self.rules if rule.factor == factor)

    def having(self, *factors: Factor) -> Factors:
        """With these factors added, or put in the place of those of their names."""
        return replace(self, factors={**self.factors, **{factor.name: factor for factor in factors}})

    def weighted(self, name: str, weights: Mapping[str, Weight]) -> Factors:
        """With these weights; values that are not named leave.

        Raises:
            RecipeError: the factor has no such value; or the weight is none.
        """
        factor = self.factors[name]
        unknown = sorted(set(weights) - set(factor.names))
        if unknown:
            raise RecipeError(f"{name} has no value {unknown[0]!r}", hint=f"it has {', '.join(factor.names[:30])}")
        kept = (replace(value, weight=exact(weights[value.name])) for value in factor.values if value.name in weights)
        return self.having(Factor(name, tuple(kept)))

    def weighted_topics(self, weights: Mapping[str, Weight]) -> Factors:
        """With these weights for the first level of topics; those that are not named leave."""
        heads = list(dict.fromkeys(value.name.partition("/")[0] for value in self["topic"].values))
        unknown = sorted(set(weights) - set(heads))
        if unknown:
            raise RecipeError(f"there is no first-level topic {unknown[0]!r}", hint=f"there are {', '.join(heads)}")
        shares = {head: exact(weight) for head, weight in weights.items()}
        kept = [value for value in self["topic"].values if value.name.partition("/")[0] in shares]
        return self.having(
            Factor("topic", tuple(replace(value, weight=shares[value.name.partition("/")[0]]) for value in kept))
        )

    def possible(self, fixed: Iterable[str]) -> tuple[Factors, dict[str, tuple[str, ...]]]:
        """Without the values that nothing takes or that take nothing; and which those are. Factors in `fixed` stay whole."""
        here, held = self, set(fixed)
        left: dict[str, list[str]] = {}
        while True:
            dead = {name: gone for name in here._ruled() - held if (gone := here._dead(name))}
            if not dead:
                return here, {name: tuple(gone) for name, gone in sorted(left.items())}
            for name, gone in dead.items():
                left.setdefault(name, []).extend(gone)
                kept = tuple(value for value in here[name].values if value.name not in gone)
                here = here.having(Factor(name, kept))

    def _ruled(self) -> set[str]:
        return {name for rule in self.rules for name in (rule.factor, rule.given) if name in self.factors}

    def _dead(self, name: str) -> list[str]:
        """Values with a weight that meet no value with a weight of some other factor."""
        pairs = [(rule, rule.given, False) for rule in self.of(name)]
        pairs += [(rule, rule.factor, True) for rule in self.rules if rule.given == name]
        dead = []
        for value in (value for value in self[name].values if value.weight):
            for rule, other, first in pairs:
                met = (o.name for o in self[other].values if o.weight)
                if not any(rule.allows(value.name, o) if first else rule.allows(o, value.name) for o in met):
                    dead.append(value.name)
                    break
        return dead


def load_factors(folder: Path | None = None) -> Factors:
    """The package's factors and rules; files of the same names in `folder` count instead.

    Raises:
        RecipeError: a file cannot be read, or a rule names what is not there.
    """
    tables = {name: _read(folder / name if folder and (folder / name).is_file() else DATA / name) for name in FILES}
    factors = {name: _factor(name, values) for name, values in tables["factors.yaml"].items()}
    factors["topic"] = _topics(tables["topics.yaml"])
    rules = tuple(_rule(entry, factors) for entry in tables["compatibility.yaml"])
    return Factors(factors, rules)


def _read(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=LOADER)  # noqa: S506 - both are safe loaders
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as fault:
        raise RecipeError(f"{path} cannot be read: {fault}", hint="it must be YAML in UTF-8") from None


def _factor(name: str, values: Any) -> Factor:
    try:
        return Factor(name, tuple(_value(str(key), entry) for key, entry in values.items()))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise RecipeError(
            f"the values of factor {name} are not of the form id: [weight, English, Chinese]", hint="see data/factors.yaml"
        ) from None


def _value(name: str, entry: Any) -> Value:
    if isinstance(entry, dict):
        more = {key: entry[key] for key in ("evidence", "gold_absent") if key in entry}
        return Value(name, exact(entry["weight"]), entry["en"], entry["zh"], beside=tuple(entry.get("beside", ())), **more)
    weight, en, zh = entry
    return Value(name, exact(weight), str(en), str(zh))


def _topics(tree: Any) -> Factor:
    """Leaves in order, as "first/second/third", each with the words of its three levels."""
    leaves = []
    try:
        for first, groups in tree.items():
            for second, texts in groups.items():
                for leaf in texts:
                    path = [_words(first), _words(second), _words(leaf)]
                    name = "/".join(_slug(en) for en, _ in path)
                    leaves.append(Value(name, Fraction(1), " > ".join(en for en, _ in path), " > ".join(zh for _, zh in path)))
    except (AttributeError, TypeError, ValueError) as fault:
        raise RecipeError(f"topics are not three levels of 'English | Chinese': {fault}", hint="see data/topics.yaml") from None
    if len({leaf.name for leaf in leaves}) < len(leaves):
        raise RecipeError("two topics have one name", hint="names are the English words of the three levels")
    return Factor("topic", tuple(leaves))


def _words(text: str) -> tuple[str, str]:
    en, zh = (part.strip() for part in text.split("|"))
    return en, zh


def _slug(text: str) -> str:
    return "_".join("".join(letter if letter.isalnum() else " " for letter in text.casefold()).split())


def _rule(entry: Any, factors: Mapping[str, Factor]) -> Rule:
    try:
        factor, given = entry["factor"], entry["given"]
        takes = {key: frozenset(names) for key, names in entry.get("takes", {}).items()}
        reserved = {key: frozenset(names) for key, names in entry.get("reserved", {}).items()}
        there, before = set(factors[factor].names), set(factors[given].names)
    except (AttributeError, KeyError, TypeError) as fault:
        raise RecipeError(
            f"a rule of compatibility is {entry!r}: {fault!r}", hint="factor, given, and takes or reserved"
        ) from None
    unknown = (set(takes) - before) | (set(reserved) - there)
    unknown |= {name for names in takes.values() for name in names - there}
    unknown |= {name for names in reserved.values() for name in names - before}
    if unknown:
        raise RecipeError(f"the rule on {factor} given {given} names {', '.join(sorted(unknown))}", hint="no such values")
    return Rule(factor, given, takes, reserved)
