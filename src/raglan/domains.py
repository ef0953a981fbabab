"""Whether a system learned from the data set that it is asked about, as far as manifests tell.

    in-domain       a part of the system was trained on a set of this name
    out of domain   none was, and of all that its generator was made of the manifests tell what it learned from
    unknown         none was, as far as is known; but a published model or adapter does not tell what it learned from

Names are those of a stage's sources and files, and of the sources in the manifest beside a file. They are compared without
case, by their parts and by what several parts come to: nq-train, nq/train.jsonl and natural_questions are of nq, and hotpot_qa
is hotpotqa. A generator that is the result of another recipe's stage, or merged from such, is followed to what it started from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from raglan.artifact import MANIFEST
from raglan.files import ending_of
from raglan.recipe import Recipe
from raglan.stages import KIND as STAGE
from raglan.stages import learned_from

__all__ = ["Domain", "data_sets", "domain", "is_of", "source_name"]

SYNONYMS = {
    "naturalquestions": "nq", "naturalquestion": "nq", "nqopen": "nq", "nqo": "nq", "trivia": "triviaqa", "tqa": "triviaqa",
    "hotpot": "hotpotqa", "cmrc": "cmrc2018", "2wikimultihopqa": "2wiki", "2wikimultihop": "2wiki", "2wikimqa": "2wiki",
    "webquestions": "webq", "webqs": "webq", "musiqueans": "musique", "squadv1": "squad", "squadv11": "squad",
    "squad1": "squad", "squad11": "squad", "squadv2": "squad", "squadv20": "squad", "squad2": "squad", "squad20": "squad",
    "wizardofwikipedia": "wow", "marco": "msmarco",
}  # fmt: skip
KNOWN = {*SYNONYMS.values(), "popqa", "bamboogle", "drcd", "dureader", "fever", "eli5", "asqa", "hagrid", "pubmedqa"}
SPLITS = {
    "train", "training", "dev", "development", "val", "valid", "validation", "test", "heldout", "held", "out", "all", "full",
}  # fmt: skip
GENERAL = SPLITS | {  # what a file is called whatever set it is of
    "data", "dataset", "queries", "questions", "question", "qa", "examples", "rows", "points", "synthetic", "kiqa",
    "annotation",
}  # fmt: skip


@dataclass(frozen=True)
class Domain:
    """`silent`: models and adapters that do not tell what they learned from."""

    dataset: str
    verdict: Literal["in-domain", "out of domain", "unknown"]
    silent: tuple[str, ...] = ()

    def __str__(self) -> str:
        why = f" (what {' and '.join(self.silent)} learned from is not told)" if self.verdict == "unknown" else ""
        return f"{self.verdict}{why}"


def domain(recipe: Recipe, system: str | None = None) -> Domain | None:
    """Whether a system learned from the data set of the questions; None where `evaluate.dataset` does not name it.

    Args:
        system: "untuned", or the last stage that counts; default and for other names all finished ones.
    """
    if recipe.evaluate is None or recipe.evaluate.dataset is None:
        return None
    stages = learned_from(recipe)
    upto = [] if system == "untuned" else [*stages][: [*stages, system].index(system) + 1]
    found = _Origin({name for stage in upto for name in data_sets(stages[stage])})
    own = recipe.generator
    found.follow(own.model)
    if own.adapter is not None:
        found.follow(str(Path(own.adapter.path) / own.adapter.subfolder) if own.adapter.subfolder else own.adapter.path)
    encoder = recipe.knowledge.encoder
    for tower in (recipe.retriever.query_encoder, encoder.query_model, encoder.model):
        found.follow(None if tower is None else str(tower), speaks=True)
    asked = recipe.evaluate.dataset
    if any(is_of(name, asked) for name in found.names):
        return Domain(asked, "in-domain")
    silent = tuple(dict.fromkeys(found.silent))
    return Domain(asked, "unknown" if silent else "out of domain", silent)


@dataclass
class _Origin:
    """What models learned from."""

    names: set[str]
    silent: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)

    def follow(self, model: str | None, *, speaks: bool = False) -> None:
        """Note what a model learned from, and what it started from. `speaks`: one that does not tell is not noted."""
        if model is None or model == "embedded" or model in self.seen:
            return
        self.seen.add(model)
        own, stage = _read(Path(model)), _read(Path(model).parent)
        learned = stage.get("settings", {}).get("data") if stage.get("kind") == STAGE else None
        if learned is not None:
            self.names |= data_sets(learned)
        started = own.get("model")
        if not started or (learned is None and "steps" in own):  # it was trained, and nothing beside it says on what
            self.silent += [] if speaks else [model]
        self.follow(started, speaks=speaks)
        adapter = own.get("adapter") or {}
        self.follow("/".join(filter(None, (adapter.get("path"), adapter.get("subfolder")))) or None, speaks=speaks)


def _read(folder: Path) -> Mapping[str, Any]:
    path = folder / MANIFEST
    try:
        told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:  # of others, perhaps, and no manifest of ours
        return {}
    return told if isinstance(told, dict) else {}


def data_sets(data: Mapping[str, Any]) -> set[str]:
    """The names of the sets behind data settings: of sources, of files, and of the sources that made a file."""
    sources = data.get("sources") or {}
    found = {str(name) for name in sources}
    mixed = [data.get(name) for name in (data.get("mix") or "").split("+") if name]
    of_sources = [source.get("path") for source in sources.values() if isinstance(source, Mapping)]
    for path in (Path(name) for name in (data.get("path"), data.get("replay"), *mixed, *of_sources) if name):
        found.add(source_name(path))
        found |= set(_sources_beside(path))
    return found


def _sources_beside(path: Path) -> Iterator[str]:
    told = _read(path if path.is_dir() else path.parent).get("sources")
    for name, value in (told if isinstance(told, dict) else {}).items():
        yield name
        if isinstance(value, str):
            yield source_name(Path(value))


def source_name(path: Path) -> str:
    """A file's name without its endings; with the names of the folders up to the first that says more than train or dev.

    Example: questions/train.jsonl in nq is nq-questions-train, and nq-train.jsonl in any folder is nq-train.
    """
    name = path.name.removesuffix(ending_of(path)) or path.name
    for folder in path.parents:
        if not folder.name or not set(_parts(name)) <= GENERAL:
            break
        name = f"{folder.name}-{name}"
    return name


def is_of(name: str, dataset: str) -> bool:
    """Whether a source of this name is of the data set, or of one that its name tells of."""
    own = [part for part in _parts(dataset) if part not in SPLITS] or _parts(dataset)
    wanted = {_spelt("".join(own)), *(KNOWN & set(_runs(own)))}
    return bool(wanted & set(_runs(_parts(name))))


def _parts(name: str) -> list[str]:
    return [part for part in re.split(r"[\W_]+", name.casefold()) if part]


def _runs(parts: list[str]) -> Iterable[str]:
    """What neighbouring parts come to, each in one spelling."""
    ends = range(len(parts))
    return (_spelt("".join(parts[start : end + 1])) for start in ends for end in ends[start:])


def _spelt(name: str) -> str:
    return SYNONYMS.get(name, name)
