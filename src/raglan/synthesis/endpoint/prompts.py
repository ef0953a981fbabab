"""What the teacher is asked: data files in English and Chinese, read once and never changed.

    prompts.en.yaml, prompts.zh.yaml    step → system, user; notes of single cells; words of lengths and languages
    families.yaml                       which tasks one brainstorm serves
    given, in the prompts' files        what a draft is told of a style to imitate, or of the answer that it has to ask for

A step's system message is the same in every call, and stands first: servers that keep prefixes bill it as cached. Names in
braces are filled in one pass, so that what is filled in is never read as a template. `Prompts.hashes` name the content of what
was asked; they are in every record (of what is given, where it is), and the whole of the files is printed in
docs/concepts/synthesis-prompts.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from raglan.artifact import fingerprint
from raglan.errors import RecipeError

__all__ = ["LANGUAGES", "STEPS", "Prompts", "load_prompts"]

HERE = Path(__file__).parent
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
LANGUAGES = ("en", "zh")
STEPS = ("brainstorm", "brainstorm_corpus", "draft", "draft_corpus", "passages", "beside", "answer")
NAME = re.compile(r"\{([a-z_]+)\}")
Messages = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Prompts:
    """All wordings of one language."""

    language: str
    steps: Mapping[str, tuple[str, str]]  # step → system, user
    notes: Mapping[str, str]
    words: Mapping[str, str]  # length of a passage
    languages: Mapping[str, str]
    none: str
    families: Mapping[str, tuple[str, ...]]  # family → its tasks
    family_words: Mapping[str, str]
    hashes: Mapping[str, str]  # step → content hash of its wording and of the notes
    given: Mapping[str, str]  # style, answer → what a draft is told of it

    def messages(self, step: str, **values: str) -> Messages:
        """A step's messages with these values, letter by letter. What is empty stands as "(none)"; no notes leave no line."""
        system, user = self.steps[step]
        if not values.get("notes"):
            user = user.replace("\n{notes}", "")
        system, user = (NAME.sub(lambda found: values[found[1]] or self.none, part) for part in (system, user))
        return ({"role": "system", "content": system}, {"role": "user", "content": user})

    def family(self, task: str) -> str:
        """The family that a task is brainstormed with."""
        return next((family for family, tasks in self.families.items() if task in tasks), task)


def load_prompts(folder: Path | None = None) -> Mapping[str, Prompts]:
    """The prompts by language; files of the same names in `folder` count instead of raglan's.

    Raises:
        RecipeError: a file cannot be read, or lacks a step.
    """
    families = _read(_at(folder, "families.yaml"))
    found = {language: _prompts(_at(folder, f"prompts.{language}.yaml"), language, families) for language in LANGUAGES}
    return MappingProxyType(found)


def _at(folder: Path | None, name: str) -> Path:
    return folder / name if folder is not None and (folder / name).is_file() else HERE / name


def _read(path: Path) -> dict[str, Any]:
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader=LOADER)  # noqa: S506 - both are safe loaders
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as fault:
        raise RecipeError(f"{path} cannot be read: {fault}", hint="it must be YAML in UTF-8") from None
    if not isinstance(found, dict):
        raise RecipeError(f"{path} is no mapping", hint="see the files in raglan/synthesis/endpoint")
    return found


def _prompts(path: Path, language: str, families: Mapping[str, Any]) -> Prompts:
    told = _read(path)
    try:
        steps = {step: (str(told[step]["system"]), str(told[step]["user"])) for step in STEPS}
        tasks = {name: tuple(map(str, one["tasks"])) for name, one in families.items()}
        family_words = {name: str(one[language]) for name, one in families.items()}
        tables = [{str(key): str(value) for key, value in told[name].items()} for name in ("notes", "words", "languages")]
        none, given = str(told["none"]), {str(key): str(value) for key, value in told.get("given", {}).items()}
    except (KeyError, TypeError, AttributeError) as fault:
        raise RecipeError(f"{path} lacks {fault}", hint=f"steps are {', '.join(STEPS)}, each with system and user") from None
    common = [*tables, none, family_words]  # what any step may show beside its own words
    hashes = {step: fingerprint([language, wording, common]) for step, wording in steps.items()}
    notes, words, languages = map(MappingProxyType, tables)
    return Prompts(
        language, MappingProxyType(steps), notes, words, languages, none, MappingProxyType(tasks),
        MappingProxyType(family_words), MappingProxyType(hashes), MappingProxyType(given),
    )  # fmt: skip
