"""Write docs/recipes.md from the recipe schema: `python docs/make_recipes.py` (or `make docs`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raglan.recipe import Recipe

HEAD = """# Recipe reference

Generated from the schema by `make docs`; do not edit. A recipe is one YAML file. Relative paths are relative to its folder,
`${NAME}` in a path is an environment variable, and every key can be overridden on the command line as `a.b.c=value`.
`raglan schema > recipe.schema.json` gives editors the same knowledge.
"""


def kind(field: dict[str, Any]) -> str:
    """The type of a field in words."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return " · ".join(f"`{value}`" for value in field["enum"])
    for key in ("anyOf", "oneOf", "allOf"):
        if key in field:
            return " or ".join(dict.fromkeys(kind(option) for option in field[key]))
    if field.get("type") == "array":
        return f"list of {kind(field.get('items', {}))}" if "items" in field else "list"
    if field.get("type") == "object" and isinstance(field.get("additionalProperties"), dict):
        return f"name → {kind(field['additionalProperties'])}"
    return {"null": "null", "object": "mapping", "string": "text"}.get(field.get("type", ""), field.get("type", "any"))


def default(name: str, field: dict[str, Any], required: list[str]) -> str:
    if name in required:
        return "**required**"
    value = field.get("default")
    text = json.dumps(value, ensure_ascii=False)
    return "" if value is None or isinstance(value, dict) else f"`{text}`".replace("|", "\\|")


def table(title: str, schema: dict[str, Any]) -> str:
    rows = [
        f"| `{name}` | {kind(field)} | {default(name, field, schema.get('required', []))} | {field.get('description', '')} |"
        for name, field in schema.get("properties", {}).items()
    ]
    told = " ".join(schema.get("description", "").split())
    return f"## {title}\n\n{told}\n\n| key | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


def page() -> str:
    schema = Recipe.model_json_schema()
    parts = [table("Recipe", schema), *(table(name, part) for name, part in schema["$defs"].items())]
    return "\n".join([HEAD, *parts])


if __name__ == "__main__":
    (Path(__file__).parent / "recipes.md").write_text(page(), encoding="utf-8")
