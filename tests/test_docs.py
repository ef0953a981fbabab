"""The documents keep their word: links resolve, the recipe reference is the schema's, the README names real commands."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from raglan.recipe import load_recipe, recipe_schema

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_recipe_reference_is_the_schemas() -> None:
    spec = importlib.util.spec_from_file_location("make_recipes", ROOT / "docs" / "make_recipes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8") == module.page(), "run `make docs`"


def test_example_corpus_is_what_it_promises(vessen: Path) -> None:
    import json

    documents = [path for path in (vessen / "documents").rglob("*") if path.is_file()]
    train, held_out = (
        [json.loads(line) for line in (vessen / "questions" / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "heldout")
    )
    assert len(documents) >= 60
    assert len(train) + len(held_out) >= 400
    asked = [{row["relevant"][0]["document"] for row in rows} for rows in (train, held_out)]
    assert not asked[0] & asked[1], "train and held-out questions share a document"
    assert all((vessen / "documents" / name).is_file() for name in asked[0] | asked[1])
    assert all(row["answers"][0] in row["relevant"][0]["quote"] for row in train + held_out)


def whole_recipes() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        blocks = re.findall(r"```ya?ml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        found += [(page.name, block) for block in blocks if re.search(r"^name:", block, re.M) and "\nknowledge:" in block]
    return found


@pytest.mark.parametrize(("page", "block"), whole_recipes(), ids=lambda value: value[:20].split("\n")[0])
def test_recipes_in_the_docs_are_recipes(page: str, block: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(block, encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml").name


def test_the_schema_takes_what_the_shipped_recipes_say() -> None:
    """Types of the keys in them, followed through the schema's references, without a validator's library."""
    schema = recipe_schema()

    def fits(value: Any, rule: Any) -> bool:
        if not isinstance(rule, dict):
            return bool(rule)
        if "$ref" in rule:
            return fits(value, schema["$defs"][rule["$ref"].rpartition("/")[2]])
        for way in ("anyOf", "oneOf"):
            if way in rule:
                return any(fits(value, option) for option in rule[way])
        kinds: dict[str, Any] = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool} | {
            "number": (int, float)
        }
        wanted = rule.get("type", list(kinds))
        if "const" in rule and value != rule["const"]:
            return False
        wanted = [wanted] if isinstance(wanted, str) else wanted
        if not any(isinstance(value, kinds[kind]) for kind in wanted if kind in kinds):
            return value is None and "null" in wanted
        if isinstance(value, dict) and "properties" in rule:
            known = rule["properties"]
            return all(fits(item, known.get(key, rule.get("additionalProperties", True))) for key, item in value.items())
        items = rule.get("items")
        return not isinstance(value, list) or items is None or all(fits(item, items) for item in value)

    shipped = [ROOT / "examples" / "vessen" / "vessen.yaml", ROOT / "benchmarks" / "squad.yaml", *ROOT.glob("recipes/*.yaml")]
    assert len(shipped) >= 7
    for path in shipped:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert fits(tree, schema), path
        assert not fits({**tree, "retriever": {"k": "many"}}, schema)
        assert not fits({**tree, "knowledge": {**tree["knowledge"], "documents": 7}}, schema)
