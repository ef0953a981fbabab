"""The command line. Data goes to stdout, talk to stderr; faults that the person can mend exit with 2 and no traceback."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import typer
from rich.logging import RichHandler
from rich.table import Table

from raglan import __version__
from raglan.cli_calls import calls
from raglan.cli_clean import check_leaks, dedupe, verify
from raglan.cli_critique import critique
from raglan.cli_feedback import feedback, split
from raglan.cli_rows import rows
from raglan.cli_synthesize import synthesize
from raglan.errors import CallsStopped, RaglanError, RecipeError
from raglan.metrics import answer_recall
from raglan.progress import console
from raglan.recipe import Recipe, load_recipe, recipe_schema

__all__ = ["app", "main"]

app = typer.Typer(
    name="raglan", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Train the retriever and the generator of a retrieval-augmented system as one piece.",
)  # fmt: skip

checkpoint = typer.Typer(
    no_args_is_help=True, help="Take Hugging Face RAG checkpoints apart, put them together again; merge adapters."
)
app.add_typer(checkpoint, name="checkpoint")
app.add_typer(synthesize, name="synthesize")
app.command()(calls)
app.add_typer(feedback, name="feedback")
app.add_typer(rows, name="rows")
app.command()(split)
app.command()(dedupe)
app.command("check-leaks")(check_leaks)
app.command()(verify)
app.command()(critique)

RecipePath = Annotated[Path, typer.Argument(help="The recipe, a .yaml file.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings to change, as in train.learning_rate=2e-4.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@app.callback(invoke_without_command=True)
def _begin(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Warnings and errors only.")] = False,
) -> None:
    if version:
        typer.echo(f"raglan {__version__}")
        raise typer.Exit
    handler = RichHandler(console=console, show_path=False, show_time=False, markup=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("raglan").setLevel(logging.WARNING if quiet else logging.INFO)


@app.command()
def build(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Read documents and build the knowledge base, or find it built already."""
    from raglan.knowledge import build_knowledge

    base = build_knowledge(load_recipe(recipe, overrides or []).knowledge)
    made = base.manifest
    for name, reason in made["skipped"]:
        console.print(f"skipped {name}: {reason}", markup=False)
    figures = {name: value for name, value in made["index_figures"].items() if value}
    typer.echo(
        f"{made['input_files']} files read, {len(made['skipped'])} skipped, {made['documents']} documents, "
        f"{made['passages']} passages\nknowledge base {base.folder.parent.parent}, version {base.version}\n"
        f"encoder {made['encoder']['model']} ({made['encoder']['dtype']}), indexes "
        f"{', '.join(f'{n} {figures[n]}' if n in figures else n for n in base.settings.indexes)}"
    )
    for name, own in made.get("encoders", {}).items():
        typer.echo(f"index {name} has its own encoder {own['model']} ({own['dtype']}), {own['encoded']} passages encoded")
    if made["passages_per_second"]:
        console.print(f"{made['seconds']} s, {made['passages_per_second']} passages/s, peak memory {made['peak_memory_mb']} MB")
    if made.get("encoded", made["passages"]) < made["passages"]:
        console.print(f"{made['encoded']} of {made['passages']} passages are new; the others' vectors were there already")


@app.command()
def retrieve(
    kb: Annotated[Path, typer.Argument(help="A knowledge base folder, or a recipe.")],
    question: Annotated[str, typer.Argument(help="What to look for.")],
    index: Annotated[str | None, typer.Option(help="Which index; default hybrid.")] = None,
    k: Annotated[int, typer.Option("-k", help="How many passages.")] = 5,
    query_encoder: Annotated[Path | None, typer.Option(help="A tuned query encoder's folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print the passages that a question finds, with their scores."""
    from raglan.encoder import Encoder
    from raglan.knowledge import KnowledgeBase
    from raglan.retriever import Retriever
    from raglan.text import check_query

    check_query(question)
    base = KnowledgeBase.of(load_recipe(kb).knowledge) if kb.suffix in (".yaml", ".yml") else KnowledgeBase.open(kb)
    names = list(base.settings.indexes)
    name = index or ("hybrid" if "hybrid" in names else names[0])
    encoder = Encoder.open(base.settings.encoder, query_encoder=query_encoder)
    hits = Retriever(base, encoder, index=name).retrieve([question], k)[0]
    if as_json:
        typer.echo(json.dumps([_hit(hit) for hit in hits], ensure_ascii=False, indent=2))
        return
    if not hits:
        console.print("no passage matches")
    for hit in hits:
        typer.echo(f"{hit.rank:3d}  {hit.score:8.4f}  {hit.passage.id}\n     {_brief(hit.passage.title, hit.passage.text)}")


@app.command()
def answer(
    recipe: RecipePath,
    questions: Annotated[list[str], typer.Argument(help="Questions; words with `=` and no space override settings.")],
    untuned: Annotated[bool, typer.Option("--untuned", help="Ask the system as it was before training.")] = False,
    k: Annotated[int | None, typer.Option("-k", help="Passages a question; default the recipe's.")] = None,
    history: Annotated[
        list[str] | None, typer.Option(help="A dialogue's earlier turn; give it once a turn, the oldest first.")
    ] = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="An answer that may be given; give it once a choice, and one is chosen.")
    ] = None,
    with_trace: Annotated[bool, typer.Option("--trace", help="Tell how a self_rag answer came about.")] = False,
    alce: Annotated[
        Path | None, typer.Option(help="Also write the answers, with citations and the passages cited, as ALCE reads them.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Answer questions from the knowledge base, citing the passages read. Uses the tuned parts if there are any."""
    from raglan.decode.self_rag import cited_text
    from raglan.decode.self_rag.trace import told as told_trace
    from raglan.stages import Parts, finished_parts
    from raglan.text import check_history, check_query

    overrides = [word for word in questions if _is_override(word)]
    asked = [word for word in questions if not _is_override(word)]
    if not asked:
        raise RecipeError("there is no question", hint="raglan answer recipe.yaml 'Who …?'")
    for question in asked:
        check_query(question)
    said = history or []
    check_history(said)
    loaded = load_recipe(recipe, overrides)
    stage, parts = ("untuned", Parts()) if untuned else finished_parts(loaded)[-1]
    answers = parts.open(loaded).answer(asked, k=k, history=[said] * len(asked), choices=[choice or []] * len(asked))
    if alce is not None:
        from raglan.exports import export_alce

        console.print(str(export_alce(answers, alce)), soft_wrap=True)
    if as_json:
        typer.echo(json.dumps([_answer(a) for a in answers], ensure_ascii=False, indent=2))
        return
    console.print(f"[dim]system: {stage}; * marks passages that hold the answer[/dim]")
    for found in answers:
        text = cited_text(found) if found.citations else found.text
        typer.echo(f"Q: {found.query}\nA: {text or '(no answer)'}   (log-probability {found.logprob:.3f})")
        for other in found.alternatives:
            typer.echo(f"or: {other.text or '(no answer)'}   (log-probability {other.logprob:.3f})")
        for number, hit in enumerate(found.citations, 1):
            typer.echo(f"  cites [{number}] {hit.passage.id}: {_brief(hit.passage.title, hit.passage.text)}")
        for hit in found.hits:
            mark = "*" if _cited(found, hit) else " "
            shares = _shares(found, hit.rank - 1)
            told = f" p(z|x) {shares['prior']:.2f} p(z|x,y) {shares['posterior']:.2f}" if shares else ""
            typer.echo(
                f" {mark}[{hit.rank}] {hit.score:.4f}{told} {hit.passage.id}: {_brief(hit.passage.title, hit.passage.text)}"
            )
        for line in told_trace(found.trace) if with_trace and found.trace is not None else ():
            typer.echo(f"    {line}")


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="Only this stage; those before it must be done.")] = None,
    dry: Annotated[bool, typer.Option("--dry-run", help="Only tell what the language model would have to score.")] = False,
) -> None:
    """Train the recipe's stages that are not done yet; an interrupted one goes on where it stopped."""
    from raglan.train import dry_run
    from raglan.train import train as train_stages

    if dry:
        for name, plan in dry_run(load_recipe(recipe, overrides or [])).items():
            typer.echo(f"{name}: {plan}")
        return
    parts = train_stages(load_recipe(recipe, overrides or []), only=stage)
    if parts.generator:
        typer.echo(f"generator      {parts.generator}")
    if parts.query_encoder:
        typer.echo(f"query encoder  {parts.query_encoder}")


@app.command()
def evaluate(
    recipe: RecipePath,
    overrides: Overrides = None,
    every_stage: Annotated[bool, typer.Option("--every-stage", help="Also the systems between.")] = False,
    with_report: Annotated[bool, typer.Option("--report", help="Also write runs/<name>/report.html.")] = False,
    fail_on: Annotated[
        str | None, typer.Option(help="`worse`: exit with 1 if a grid's cell is worse than the base on a task.")
    ] = None,
    cache: Annotated[bool, typer.Option("--cache", help="Self-RAG: write candidates for --rescore and --sweep.")] = False,
    rescore: Annotated[bool, typer.Option("--rescore", help="Self-RAG: measure from candidates, no model call.")] = False,
    fill: Annotated[bool, typer.Option("--fill", help="With --rescore or --sweep: write what they lack.")] = False,
    sweep: Annotated[bool, typer.Option("--sweep", help="Self-RAG: --rescore a grid of settings, and draw it.")] = False,
    confirm: Annotated[bool, typer.Option("--confirm", help="With --sweep: answer live with the best settings.")] = False,
    calibrate: Annotated[
        str | None, typer.Option(help="Self-RAG: fit decode.calibration to what was measured; temperature or isotonic.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Let a judge that costs money go on without a cap.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure the system before and after training, or a grid of systems, with 95 % intervals."""
    from raglan.cli_evaluate import evaluation_summary, tell_evaluations
    from raglan.cli_robustness import evaluate_further
    from raglan.evaluate import evaluate_recipe

    loaded = load_recipe(recipe, overrides or [])
    if cache or rescore or sweep or fill or confirm:
        _candidates(loaded, cache=cache, rescore=rescore, fill=fill, sweep=sweep, confirm=confirm, as_json=as_json)
        return
    _check_fail_on(fail_on, loaded)
    if loaded.grid is not None:
        _evaluate_grid(loaded, with_report=with_report, fail_on=fail_on, as_json=as_json)
        return
    evaluations = evaluate_recipe(loaded, every_stage=every_stage)
    if calibrate is not None:
        _calibrate(loaded, evaluations[-1], calibrate)
        return
    if not as_json:
        tell_evaluations(loaded, evaluations)  # at once: what follows may take long, cost money, or stop
    further = evaluate_further(loaded, evaluations, yes=yes)
    if with_report:
        _report([loaded], loaded.run / "report.html")
    if as_json:
        typer.echo(json.dumps(evaluation_summary(loaded, evaluations) | further.summary(), indent=2))
    else:
        further.tell()
    if further.fault is not None:
        raise further.fault


def _calibrate(recipe: Any, evaluation: Any, kind: Any) -> None:
    """Print the setting that maps r to P(retrieval is needed), as it is written in a recipe or on the command line."""
    from raglan.calibration import calibration_data, fitted

    if kind not in ("temperature", "isotonic"):
        raise RecipeError(f"--calibrate is {kind!r}", hint="temperature, or isotonic")
    r, needed = calibration_data(evaluation, recipe.evaluate.metrics[0])
    found = fitted(r, needed, kind).model_dump(mode="json", exclude_defaults=True)
    console.print(f"{len(r)} questions, of which {sum(needed)} are answered better with passages; for the recipe's decode:")
    typer.echo(f"calibration: {json.dumps(found)}")


@app.command()
def report(
    recipes: Annotated[list[Path], typer.Argument(help="Recipes that have been evaluated; several stand side by side.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The page to write.")] = Path("report.html"),
    change: Annotated[list[str] | None, typer.Option("--set", help="A setting changed in all of them: a.b.c=value.")] = None,
) -> None:
    """Write one self-contained HTML page: before and after, curves, examples."""
    _report([load_recipe(path, change or []) for path in recipes], output)
    typer.echo(str(output))


@app.command()
def swap(
    kb: Annotated[Path, typer.Argument(help="A knowledge base folder, or a recipe.")],
    version: Annotated[str | None, typer.Argument(help="The version that is to answer; none lists all.")] = None,
    back: Annotated[bool, typer.Option("--back", help="The version that was finished before the current one.")] = False,
) -> None:
    """List a knowledge base's versions, or make another one answer. Nothing is trained or built."""
    from raglan.knowledge import KnowledgeBase

    path = load_recipe(kb).knowledge.path if kb.suffix in (".yaml", ".yml") else kb
    current = KnowledgeBase.open(path).version
    known = KnowledgeBase.versions(path)
    if back:
        place = known.index(current)
        if place == 0:
            raise RecipeError(f"{path} has no version before {current}", hint="raglan swap lists the versions there are")
        version = known[place - 1]
    if version is not None:
        KnowledgeBase.publish(path, version)
    for name in known:
        made = KnowledgeBase.open(path, version=name).manifest
        mark = "*" if name == (version or current) else " "
        typer.echo(f"{mark} {name}  {made['documents']} documents, {made['passages']} passages")


@checkpoint.command("import")
def import_checkpoint(
    folder: Annotated[Path, typer.Argument(help="The checkpoint: config.json, weights and two tokenizer folders.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to make, with its parts and a recipe.")],
) -> None:
    """Take a RAG checkpoint apart into a query encoder, a generator and a recipe to start from."""
    from raglan.interop import import_rag

    typer.echo(str(import_rag(folder, output)))


@checkpoint.command("export")
def export_checkpoint(
    recipe: RecipePath,
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to make, which transformers opens.")],
    overrides: Overrides = None,
    untuned: Annotated[bool, typer.Option("--untuned", help="The parts as they were before training.")] = False,
) -> None:
    """Write a recipe's query encoder and generator as a RAG checkpoint. Takes the tuned parts if there are any."""
    from raglan.interop import export_rag
    from raglan.knowledge import KnowledgeBase
    from raglan.stages import Parts, finished_parts

    loaded = load_recipe(recipe, overrides or [])
    begun = bool(KnowledgeBase.versions(loaded.knowledge.path))  # without one nothing was ever trained
    found = finished_parts(loaded) if begun and not untuned else [("untuned", Parts())]
    stage, parts = found[-1]
    console.print(f"[dim]system: {stage}[/dim]")
    typer.echo(str(export_rag(loaded, parts, output, trained=[name for name, _ in found])))


@checkpoint.command("merge")
def merge_checkpoint(
    recipe: RecipePath,
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to make, which transformers and vLLM open.")],
    overrides: Overrides = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: base (as they are kept), float32, bfloat16 or float16.")] = "base",
    untuned: Annotated[bool, typer.Option("--untuned", help="The generator as it was before training.")] = False,
) -> None:
    """Add a recipe's LoRA adapter to its base and write one plain model. Takes the tuned generator if there is one."""
    from raglan.interop import merge_adapter
    from raglan.knowledge import KnowledgeBase
    from raglan.stages import Parts, finished_parts

    loaded = load_recipe(recipe, overrides or [])
    begun = bool(KnowledgeBase.versions(loaded.knowledge.path))
    stage, parts = finished_parts(loaded)[-1] if begun and not untuned else ("untuned", Parts())
    console.print(f"[dim]system: {stage}[/dim]")
    if dtype not in ("base", "float32", "bfloat16", "float16"):
        raise RecipeError(f"--dtype is {dtype!r}", hint="one of base, float32, bfloat16, float16")
    typer.echo(str(merge_adapter(loaded, parts, output, dtype=dtype)))  # type: ignore[arg-type]


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, with which editors complete and check them."""
    typer.echo(json.dumps(recipe_schema(), indent=2))


def main() -> None:
    """Entry point of the command `raglan`."""
    try:
        app(prog_name="raglan")
    except RaglanError as fault:
        text = f"error: {fault.message}" + (f"\nhint: {fault.hint}" if fault.hint else "")
        print(text, file=sys.stderr)
        sys.exit(3 if isinstance(fault, CallsStopped) else 2)
    except OSError as fault:
        if fault.filename is None:
            raise
        print(f"error: {fault.strerror}: {fault.filename}\nhint: check the path, its permissions and the disk", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if end.code == 130:  # typer's for Ctrl-C
            print("interrupted; run the same command again and it goes on where it stopped", file=sys.stderr)
        raise


def _report(recipes: list[Recipe], output: Path) -> None:
    from raglan.report import write_report

    write_report(recipes, output)
    console.print(f"report: {output}", soft_wrap=True)


def _check_fail_on(fail_on: str | None, recipe: Recipe) -> None:
    if fail_on not in (None, "worse") or (fail_on is not None and recipe.grid is None):
        raise RecipeError(f"--fail-on is {fail_on!r}", hint="`worse` is all there is, for recipes with a grid")


def _candidates(
    recipe: Recipe, *, cache: bool, rescore: bool, fill: bool, sweep: bool, confirm: bool, as_json: bool
) -> None:  # fmt: skip
    from raglan import cli_sweep

    if cache == (rescore or sweep) or (fill and cache) or (confirm and not sweep):
        raise RecipeError(
            "--cache writes candidates; --rescore measures one setting of them, and --sweep a grid",
            hint="--cache by itself; --fill goes with --rescore or --sweep, --confirm with --sweep",
        )
    if cache:
        cli_sweep.cached(recipe, as_json=as_json)
    elif sweep:
        cli_sweep.swept(recipe, fill=fill, confirm=confirm, as_json=as_json)
    else:
        cli_sweep.rescored(recipe, fill=fill, as_json=as_json)


def _evaluate_grid(recipe: Recipe, *, with_report: bool, fail_on: str | None, as_json: bool) -> None:
    """Measure, print and judge a grid. Raises typer.Exit(1) where a cell is worse and that is to fail."""
    from rich.console import Console

    from raglan.artifact import write_json
    from raglan.cli_evaluate import percent
    from raglan.grid import evaluate_grid
    from raglan.grid_tables import grid_summary, grid_tables

    grid = evaluate_grid(recipe)
    write_json(recipe.run / "grid" / "summary.json", grid_summary(grid))
    if with_report:
        _report([recipe], recipe.run / "report.html")
    if as_json:
        typer.echo(json.dumps(grid_summary(grid), indent=2))
    else:
        wide = Console(width=max(100, 24 + 22 * (len(grid.cells) + 1)), highlight=False)
        for shown in grid_tables(grid):
            table = Table(*shown.head, box=None, title=shown.title, title_justify="left")
            for row in shown.rows:
                table.add_row(*row)
            wide.print(table)
        console.print(
            f"{grid.passes} retrieval passes, {grid.read} prompts read for {grid.asked}; percent and points, 95 % intervals by "
            f"paired bootstrap over questions, seed {grid.seed}; one training seed\npredictions: {recipe.run / 'grid'}",
            soft_wrap=True,
        )  # fmt: skip
    regressions = grid.regressions()
    for task, cell, kind, change in regressions:
        console.print(f"{kind} than base: {cell} on {task}, {percent(change, sign=True)} points", soft_wrap=True)
    if fail_on is not None and any(kind == fail_on for _, _, kind, _ in regressions):
        raise typer.Exit(1)


def _is_override(word: str) -> bool:
    key, equals, _ = word.partition("=")
    return bool(equals) and not any(letter.isspace() for letter in word) and bool(re.fullmatch(r"[A-Za-z_][\w.-]*", key))


def _brief(title: str, text: str) -> str:
    line = " ".join(text.split())
    return f"{title}: {line[:160]}{'…' if len(line) > 160 else ''}" if title else line[:200]


def _hit(hit: Any) -> dict[str, Any]:
    passage = hit.passage
    return {
        "rank": hit.rank, "score": hit.score, "id": passage.id, "title": passage.title, "text": passage.text,
        "document": passage.document, "start": passage.start, "end": passage.end,
    }  # fmt: skip


def _answer(found: Any) -> dict[str, Any]:
    return {
        "query": found.query, "answer": found.text, "logprob": found.logprob, "finished": found.finished,
        "knowledge": found.knowledge, "closed_book": found.closed_book,
        "passages": [
            {**_hit(hit), "cited": _cited(found, hit), **_shares(found, place)} for place, hit in enumerate(found.hits)
        ],
        "candidates": [{"answer": c.text, "logprob": c.logprob, "finished": c.finished} for c in found.candidates],
        **(_reflected(found) if found.trace is not None else {}),
    }  # fmt: skip


def _reflected(found: Any) -> dict[str, Any]:
    """What a Self-RAG answer adds."""
    from raglan.decode.self_rag import cited_text

    return {
        "cited": cited_text(found), "citations": [hit.passage.id for hit in found.citations],
        "alternatives": [{"answer": other.text, "cited": cited_text(other)} for other in found.alternatives],
        "raw": found.raw, "trace": found.trace,
    }  # fmt: skip


def _cited(found: Any, hit: Any) -> bool:
    """Whether a passage holds the answer's words."""
    return bool(found.text) and answer_recall([hit.passage.text], [found.text]) > 0


def _shares(found: Any, place: int) -> dict[str, float]:
    """p(z|x) and p(z|x,y) of a passage, where the decoding knows them."""
    return {"prior": found.prior[place], "posterior": found.posterior[place]} if found.posterior else {}

