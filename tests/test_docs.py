"""The documents keep their word: links resolve, the recipe reference is the schema's, commands are real ones."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from raglan import cli
from raglan.exports import FORMS
from raglan.feedback.read import SOURCES
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


# commands as printed

GUIDES = [ROOT / "README.md", ROOT / "docs" / "quickstart.md"]
Misused: Any = typer.BadParameter.__base__  # UsageError, of click or of the click that typer brings


def printed(page: Path, command: str) -> list[tuple[str, bool]]:
    """Lines that call a command, and whether each is to be typed as it stands: a mention in a sentence may leave words out."""
    text = page.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```(?:sh)?\n(.*?)```", text, re.DOTALL))
    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = [(line, True) for line in blocks.splitlines() if line.startswith(f"{command} ")]
    lines += [(line, True) for line in re.findall(rf"(?m)^\| `({command} [^`]+)`", rest)]
    known = {line for line, _ in lines}
    return lines + [(line, False) for line in re.findall(rf"`({command} [^`\n]+)`", rest) if line not in known]


def typed(line: str) -> list[str]:
    """The words behind the command, without comment, redirection and dots."""
    words = shlex.split(line.partition(" > ")[0], comments=True)[1:]
    return [word for word in words if word != "…"]


def parsed(words: list[str], *, whole: bool = True) -> dict[str, Any]:
    """What the command line makes of these words; nothing is run. Raises Misused."""
    command: Any = typer.main.get_command(cli.app)
    context = command.make_context("raglan", list(words))
    while hasattr(command, "resolve_command") and (rest := [*context._protected_args, *context.args]):
        name, command, rest = command.resolve_command(context, rest)
        try:
            context = command.make_context(name, rest, parent=context)
        except Misused as fault:
            if whole or rest or type(fault).__name__ != "MissingParameter":
                raise
            return {}
    assert not hasattr(command, "resolve_command") or not whole, "a group of commands is none"
    return dict(context.params)


RAGLAN = [(page.name, *one) for page in GUIDES for one in printed(page, "raglan")]


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's recipe."""
    (block,) = [block for page, block in whole_recipes() if page == "quickstart.md" and "name: mine" in block]
    path = tmp_path_factory.mktemp("mine") / "mine.yaml"
    path.write_text(block, encoding="utf-8")
    return path


@pytest.mark.parametrize(("page", "line", "whole"), RAGLAN, ids=lambda value: str(value)[:40])
def test_commands_are_taken_as_printed(page: str, line: str, whole: bool, mine: Path) -> None:
    words = typed(line)
    told = parsed(words, whole=whole)
    for word in words:
        if "/" in word and "=" not in word:
            assert (ROOT / word).exists(), f"{page} names {word}"
    load_recipe(mine, [word for word in words if cli._is_override(word)])
    assert told.get("form", FORMS[0]) in FORMS
    assert words[:2] != ["feedback", "import"] or told["source"] in SOURCES


def test_the_table_of_commands_tells_options_that_they_have() -> None:
    rows = re.findall(r"(?m)^\| `(raglan [^`]+)` \| (.+) \|$", GUIDES[1].read_text(encoding="utf-8"))
    told = [(typed(line), option) for line, cell in rows for option in re.findall(r"`(-[^`]+)`", cell)]
    assert len(rows) >= 12
    assert len(told) >= 6
    for words, option in told:
        assert parsed([*words, *shlex.split(option)])


def test_what_is_no_command_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "`raglan shout`\n\n```sh\nraglan train\nraglan build a.yaml --fast   # no\n```\n| `raglan swap --back` | x |\n"
    )
    lines = printed(page, "raglan")
    assert [line for line, _ in lines] == [
        "raglan train", "raglan build a.yaml --fast   # no", "raglan swap --back", "raglan shout"
    ]  # fmt: skip
    for line, whole in lines:
        with pytest.raises(Misused):
            parsed(typed(line), whole=whole)
    assert parsed(["train"], whole=False) == {}


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize("line", sorted({line for page in GUIDES for line, _ in printed(page, "make")}))
def test_targets_of_make_are_there_and_call_real_commands(line: str) -> None:
    done = subprocess.run(["make", "-n", *typed(line)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for call in re.findall(r"(?m)^\.venv/bin/(raglan .+)$", done.stdout):
        words = typed(call)
        assert parsed(words)
        assert all((ROOT / word).exists() for word in words if "/" in word)


def test_extras_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = GUIDES[1].read_text(encoding="utf-8")
    named = [name.strip() for list_ in re.findall(r"pip install '\.\[([^]]+)\]'", text) for name in list_.split(",")]
    table = text.partition("| extra |")[2].partition("\n\n")[0]
    named += [name for cell in re.findall(r"(?m)^\| (`[^|]+) \|", table) for name in re.findall(r"`([^`]+)`", cell)]
    assert len(named) >= 10
    assert set(named) <= set(project["optional-dependencies"])
    assert project["scripts"]["raglan"] == "raglan.cli:main"
