"""Reading a recipe: overrides, all faults at once, paths made absolute; and the JSON schema."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from raglan.errors import RecipeError
from raglan.recipe.base import SECRET, Settings, number
from raglan.recipe.settings import Recipe

__all__ = ["load_recipe", "recipe_schema"]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: the YAML file.
        overrides: "dotted.key=value" strings; values are YAML.

    Raises:
        RecipeError: with every fault in one message.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"there is no recipe {_shown(str(path))}", hint="give the path of a .yaml file; examples/ holds some")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as fault:
        raise RecipeError(
            f"{path} is not YAML: {fault}", hint="see docs/recipes.md, or start from a file in examples/"
        ) from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path} must hold a mapping of settings, not {type(tree).__name__}")
    _override(tree, overrides)
    faults = _training_faults(tree)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        faults += [f"{_place(_kinded(fault))}: {_explain(fault)}" for fault in error.errors()]
    if faults:
        many = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        told = "\n  ".join([f"{path} has {many}:", *faults])
        raise RecipeError(told, hint="`raglan schema` prints all keys with their types")
    return _resolve(recipe, path.resolve().parent)


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of recipes, with the training arguments of the installed transformers."""
    schema = Recipe.model_json_schema()
    documents = schema["$defs"]["KnowledgeSettings"]["properties"]["documents"]
    for key in ("type", "items"):
        documents.pop(key, None)
    plain = {int: "integer", float: "number", bool: "boolean", str: "string"}
    arguments = {"type": "object", "properties": {
        name: {"type": [plain[kind], "string"]} if kind in plain else True for name, kind in sorted(_training_fields().items())
    }}  # fmt: skip
    for owner in (schema, schema["$defs"]["StageSettings"]):
        owner["properties"]["train"] |= arguments | {"additionalProperties": False}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _override(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise RecipeError(f"override {_shown(text)!r} is not of the form key=value", hint="as in train.learning_rate=2e-4")
        steps = key.split(".")
        parsed = _scalar(text, value)
        _assign(tree, steps, parsed, key)
        if steps[0] == "train" and isinstance(tree.get("stages"), dict):
            for stage in (stage for stage in tree["stages"].values() if isinstance(stage, dict)):
                _assign(stage, steps, parsed, key)


def _assign(tree: dict[str, Any], steps: Sequence[str], value: Any, key: str) -> None:
    for step in steps[:-1]:
        tree = tree.setdefault(step, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"override {key}: {step} is not a group of settings")
    tree[steps[-1]] = value


def _scalar(override: str, value: str) -> Any:
    try:
        return number(yaml.safe_load(value))
    except yaml.YAMLError:
        raise RecipeError(f"the value of the override {_shown(override)!r} is not YAML", hint="quote it") from None


def _shown(override: str) -> str:
    """An override as a message may repeat it: a secret's value is left out."""
    key = re.split(r"[=:\s]", override, maxsplit=1)[0]
    return f"{key}=…" if SECRET.fullmatch(key.rpartition(".")[2]) else override


def _place(steps: Sequence[int | str]) -> str:
    """The dotted place in the file; the discriminator values that pydantic puts in between are left out."""
    kinds = _kinds(Settings.__subclasses__())
    places = [str(step) for i, step in enumerate(steps) if i == 0 or step not in kinds or steps[i - 1] in ("indexes", "stages")]
    return ".".join(places) or "recipe"


def _kinded(fault: Mapping[str, Any]) -> tuple[int | str, ...]:
    """Where a fault stands; for a wrong or missing kind, at `kind` itself."""
    return (*fault["loc"], "kind") if fault["type"].startswith("union_tag") else fault["loc"]


def _explain(fault: Mapping[str, Any]) -> str:
    name = str(fault["loc"][-1]) if fault["loc"] else ""
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, _names_at(fault["loc"][:-1]), n=1)
        return "unknown key" + (f"; did you mean {near[0]!r}?" if near else "")
    if fault["type"] == "union_tag_invalid":
        return f"is {fault['ctx']['tag']!r}; allowed are {fault['ctx']['expected_tags']}"
    if fault["type"] in ("missing", "union_tag_not_found"):
        return "is missing"
    message = fault["msg"].removeprefix("Value error, ")
    value = fault.get("input")
    if name in ("endpoint", "base_url") and isinstance(value, str):
        return f"{message}; a key or a password belongs into the variable that api_key_env names"
    return message if isinstance(value, dict | BaseModel) else f"{message[:1].lower()}{message[1:]}, but is {value!r}"


def _names_at(place: Sequence[int | str]) -> list[str]:
    """The settings there are where pydantic says it is; what it puts in between are keys of groups and kinds."""
    here: list[type[Settings]] = [Recipe]
    for step in place:
        below = [model for owner in here for model in _models_of(owner, str(step))]
        here = below or [model for model in here if str(step) in _kinds([model])] or here
    return sorted({name for model in here for name in model.model_fields})


def _models_of(owner: type[Settings], field: str) -> list[type[Settings]]:
    def within(annotation: Any) -> Iterator[type[Settings]]:
        if isinstance(annotation, type) and issubclass(annotation, Settings):
            yield annotation
        for part in get_args(annotation):
            yield from within(part)

    return list(within(owner.model_fields[field].annotation)) if field in owner.model_fields else []


def _kinds(models: Iterable[type[Settings]]) -> set[str]:
    """The values of `kind` that choose these models."""
    fields = [model.model_fields["kind"] for model in models if "kind" in model.model_fields]
    return {str(value) for field in fields for value in get_args(field.annotation)}


@cache
def _training_fields() -> dict[str, Any]:
    """The fields of transformers.TrainingArguments with their types."""
    from transformers import TrainingArguments

    types = get_type_hints(TrainingArguments)
    return {field.name: types[field.name] for field in fields(TrainingArguments) if field.init and field.name != "output_dir"}


def _training_faults(tree: dict[str, Any]) -> list[str]:
    """What is wrong with the training arguments, of the recipe and of every stage, beside pydantic's own findings."""
    stages = tree.get("stages")
    places = {"train": tree.get("train")}
    if isinstance(stages, dict):
        places |= {f"stages.{name}.train": stage.get("train") for name, stage in stages.items() if isinstance(stage, dict)}
    return [
        f"{place}.{name}: {fault}"
        for place, arguments in places.items()
        if isinstance(arguments, dict)
        for name, value in arguments.items()
        if (fault := _training_fault(str(name), number(value)))
    ]


def _training_fault(name: str, value: Any) -> str | None:
    if name not in _training_fields():
        near = difflib.get_close_matches(name, _training_fields(), n=1)
        return "no field of transformers.TrainingArguments" + (f"; did you mean {near[0]!r}?" if near else "")
    kind = _training_fields()[name]
    if kind in (int, float, bool, str):
        try:
            TypeAdapter(kind).validate_python(value)
        except ValidationError as fault:
            return f"{fault.errors()[0]['msg'].lower()}, but is {value!r}"
    return None


def _expanded(text: str) -> str:
    """${NAME} in a path is the environment variable of that name."""
    for name in re.findall(r"\$\{(\w+)\}", text):
        if name not in os.environ:
            raise RecipeError(f"path {text!r} needs the environment variable {name}, which is not set", hint=f"export {name}=…")
    return os.path.expandvars(text)


def _resolve(value: Any, base: Path) -> Any:
    """Paths made absolute, relative to the recipe's folder; model names that are folders there too."""
    if isinstance(value, Path):
        value = Path(_expanded(str(value)))
        return value if value.is_absolute() else Path(os.path.normpath(base / value))
    if isinstance(value, tuple):
        return tuple(_resolve(item, base) for item in value)
    if isinstance(value, dict):
        return {key: _resolve(item, base) for key, item in value.items()}
    if isinstance(value, BaseModel):
        changes = {name: _resolve(getattr(value, name), base) for name in type(value).model_fields}
        for name in ("model", "query_model", "tokenizer", "path"):
            text = changes.get(name)
            if not isinstance(text, str) or text == "embedded":
                continue
            text = _expanded(text)
            changes[name] = str(base / text) if (base / text).is_dir() else text
        changed = {name: new for name, new in changes.items() if new != getattr(value, name)}
        return value.model_copy(update=changed)  # what was not said stays unsaid
    return value
