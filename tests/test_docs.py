"""The documents keep their word: links resolve, the recipe reference is the schema's, the README names real commands."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

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
