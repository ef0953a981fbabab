"""`raglan synthesize …`: training data, planned; and for others, written and checked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup

from raglan.cli_plan import coverage, run
from raglan.errors import CorpusError, RecipeError
from raglan.progress import console
from raglan.recipe import LsrObjective, Recipe, load_recipe

__all__ = ["synthesize"]


class _RecipeFirst(TyperGroup):
    """`raglan synthesize recipe.yaml` is short for `raglan synthesize run recipe.yaml`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, ["run", *args] if args and _is_recipe(Path(args[0])) else args)


synthesize = typer.Typer(
    cls=_RecipeFirst, no_args_is_help=True, help="Training data: planned, exported for other trainers, and checked."
)

As = Annotated[
    str,
    typer.Option(
        "--as", show_default=False,
        help="Of a synthesized dataset sft, chat, raft, dpo or retriever; of other sources openai-chat, openai-dpo, trl or "
        "sentence-transformers.",
    ),
]  # fmt: skip
Model = Annotated[
    str | None, typer.Option(help="For lengths: a hosted model's name, as gpt-4o, or a folder.", show_default=False)
]
Tokenizer = Annotated[Path | None, typer.Option(help="For lengths: a folder with a tokenizer.", show_default=False)]


synthesize.command()(run)
synthesize.command()(coverage)


@synthesize.command()
def check(
    file: Annotated[Path, typer.Argument(help="A .jsonl file.", show_default=False)],
    form: As,
    validation: Annotated[Path | None, typer.Option(help="Its validation file: no question may stand in both.")] = None,
    model: Model = None,
    tokenizer: Tokenizer = None,
    strict: Annotated[bool, typer.Option("--strict", help="Lengths that were not checked are a fault.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Tell all faults of a training file, with their lines. Exits with 2 if there are any; warnings are none."""
    from raglan.exports import Lengths, check_file, failed, shared_questions

    lengths = Lengths.of(model, tokenizer=tokenizer)
    found = {file: check_file(file, _form(form), lengths=lengths)}
    if validation is not None:
        shared = shared_questions(file, validation, _form(form))
        found[validation] = sorted([*check_file(validation, _form(form), lengths=lengths), *shared])
    if as_json:
        rows = [
            {"file": str(path), "line": fault.line, "level": fault.level, "text": fault.text}
            for path, faults in found.items()
            for fault in faults
        ]
        typer.echo(json.dumps(rows, ensure_ascii=False, indent=2))
    else:
        for path, faults in found.items():
            for fault in faults:
                typer.echo(f"{path}{f':{fault.line}' if fault.line else ''}: {fault.level}: {fault.text}")
    bad = any(failed(faults, strict=strict) for faults in found.values())
    if bad:
        console.print("faults were found", style="red")
        raise typer.Exit(2)
    console.print(f"no fault: {' and '.join(path.name for path in found)}", markup=False)


@synthesize.command()
def export(
    source: Annotated[
        Path,
        typer.Argument(
            help="A synthesized dataset, data points (a stage's folder, or .jsonl), pairs of answers, or questions.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The .jsonl file to write.", show_default=False)],
    form: As,
    by: Annotated[
        Path | None, typer.Option("--from", help="A recipe, or a knowledge base folder: finds passages.", show_default=False)
    ] = None,
    k: Annotated[int | None, typer.Option("-k", min=1, help="Passages a question; default the recipe's, else 3.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="context_only or context_first; default a data point's own, else context_first.")
    ] = None,
    separate_context: Annotated[
        bool | None, typer.Option("--separate-context/--joined-context", help="A row a passage, or all passages in one row.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Of trl rows: prompt_completion (default) or messages.", show_default=False)
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Labels: prob, sum_logprob, mean_logprob or mean_prob; default the lsr stage's, else prob."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="So many of the questions.")] = None,
    untuned: Annotated[bool, typer.Option("--untuned", help="With a recipe: its parts as they were before training.")] = False,
    split: Annotated[
        str | None, typer.Option(help="Of a synthesized dataset: train, dev, …; default all its examples.", show_default=False)
    ] = None,
    leave_out: Annotated[
        float | None,
        typer.Option(help="retriever: share of positives without the sentences offline questions are made of; default 0.9."),
    ] = None,
    model: Model = None,
    tokenizer: Tokenizer = None,
) -> None:
    """Write a training file for others, and <name>.meta.jsonl beside it, line for line. It is checked before it appears."""
    from raglan.exports import SYNTHETIC, Lengths

    wanted = _form(form)
    given = {
        "--prompt": prompt, "--separate-context": separate_context, "--shape": shape, "--target": target, "-k": k,
        "--model": model, "--tokenizer": tokenizer, "--untuned": untuned or None, "--from": by, "--split": split,
        "--leave-out": leave_out,
    }  # fmt: skip
    _suits(source, wanted, given)
    lengths = Lengths.of(model, tokenizer=tokenizer)
    if wanted in SYNTHETIC:
        more = {} if leave_out is None else {"leave_out": leave_out}
        _tell(_synthetic(source, output, wanted, by, split, limit, lengths=lengths, **more))
        return
    found = _Found(by, k, limit, untuned)
    if wanted == "sentence-transformers":
        _tell(_labels(source, output, found, target))
        return
    _tell(_rows(source, output, wanted, found, shape, prompt=prompt, separate_context=separate_context, lengths=lengths))


def _suits(source: Path, form: str, given: dict[str, Any]) -> None:
    """Refuse options that say nothing of this form and source. `given`: option → what was said, None where nothing was."""
    from raglan.exports import SYNTHETIC, holds_pairs, holds_points

    if form in SYNTHETIC:
        own = ("--prompt", "--separate-context", "--shape", "--target", "-k")
        _applies({name: (given[name], False, "examples were written with it") for name in own})
        _applies({"--leave-out": (given["--leave-out"], form == "retriever", f"{form} has no positives")})
        return
    only = f"{form} is not made of a synthesized dataset alone"
    _applies({name: (given[name], False, only) for name in ("--split", "--leave-out")})
    _one_of("--shape", given["--shape"] or "messages", ("prompt_completion", "messages"))
    pairs, points, by = holds_pairs(source), holds_points(source), given["--from"]
    _fits(source, form, pairs=pairs)
    labels, recipe = form == "sentence-transformers", by is not None and _is_recipe(by)
    suits = {
        "--prompt": (not labels, "labels have no prompt of their own"),
        "--separate-context": (not labels, "labels have a column for each passage"),
        "--model": (not labels, "lengths of labels are not checked"),
        "--tokenizer": (not labels, "lengths of labels are not checked"),
        "--target": (labels, "only sentence-transformers has labels"),
        "--shape": (form == "trl" and not pairs, "only trl rows of data points or questions have two shapes"),
        "--untuned": (recipe, "only the parts of a recipe are tuned"),
        "--from": (labels or not points, "data points have their passages"),
        "-k": (not points and (by is not None or not pairs), "nothing is retrieved"),
    }
    _applies({name: (given[name], *told) for name, told in suits.items()})


def _rows(source: Path, output: Path, form: Any, found: _Found, shape: str | None, **asked: Any) -> Any:
    """Pairs of answers, or data points and questions, as rows of a form. `asked`: prompt, separate_context, lengths."""
    from raglan.exports import export_pairs, export_points, holds_pairs

    if holds_pairs(source):
        return export_pairs(found.pairs(source), output, form=form, **asked)
    return export_points(found.points(source), output, form=form, shape=cast(Any, shape or "prompt_completion"), **asked)


def _tell(done: Any) -> None:
    for fault in done.warnings:
        console.print(f"warning: {fault.text}", markup=False, soft_wrap=True)
    typer.echo(f"{done.path}: {done.rows} rows, {done.left_out} left out")


def _synthetic(
    source: Path, output: Path, form: Any, by: Path | None, split: str | None, limit: int | None, **asked: Any
) -> Any:
    """A synthesized dataset; a recipe's prompt is that of examples without one of their own. `asked`: lengths, leave_out."""
    from raglan.exports import export_synthetic, holds_synthetic, read_synthetic

    if not holds_synthetic(source):
        raise CorpusError(
            f"{source} is no synthesized dataset, and --as {form} is made of one",
            hint="give the folder that raglan synthesize made; for other sources --as trl, openai-chat or openai-dpo",
        )
    if by is not None and not _is_recipe(by):
        raise RecipeError(f"--from is {by}, and nothing is searched for here", hint="a recipe, for its prompt; or leave it out")
    prompt = None if by is None else load_recipe(by).prompt
    examples = list(read_synthetic(source, split=split))[:limit]
    return export_synthetic(examples, output, form=form, prompt=prompt, **asked)


@dataclass(frozen=True)
class _Found:
    """Where passages come from, and how many."""

    by: Path | None
    k: int | None
    limit: int | None
    untuned: bool

    def pairs(self, source: Path) -> Any:
        """Pairs of answers; those without passages get some, where it is said who finds them."""
        from raglan.exports import read_pairs, with_passages

        pairs = read_pairs(source)[: self.limit]
        return pairs if self.by is None else with_passages(pairs, self._retriever(), k=self._k())

    def points(self, source: Path) -> Any:
        """The data points of the source; of questions, those that come of retrieving now."""
        from raglan.exports import holds_points

        if self.by is None and not holds_points(source):
            raise CorpusError(f"{source} holds questions without passages", hint="say where they are found: --from recipe.yaml")
        return _points(source, None if holds_points(source) else self._retriever(), self._k(), self.limit)

    def _k(self) -> int:
        return self.k or (load_recipe(self.by).retriever.k if self.by is not None and _is_recipe(self.by) else 3)

    def _retriever(self) -> Any:
        """Of a recipe the tuned system's; of a knowledge base its own, with the encoder it was built with."""
        from raglan.bridges.serve import retriever_of
        from raglan.knowledge import KnowledgeBase

        assert self.by is not None
        if _is_recipe(self.by):
            return _system(load_recipe(self.by), self.untuned).retriever
        return retriever_of(KnowledgeBase.open(self.by))


def _labels(source: Path, output: Path, found: _Found, target: str | None) -> Any:
    """The generator's verdicts on a question's passages, by the recipe's own lsr stage if it has one."""
    from raglan.exports import export_sentences
    from raglan.exports.sentences import NOTE
    from raglan.scores import open_scorer

    if found.by is None or not _is_recipe(found.by):
        raise RecipeError(
            "labels are a generator's verdicts, and no recipe says which generator's", hint="give one: --from recipe.yaml"
        )
    if target is not None:
        _one_of("--target", target, ("prob", "sum_logprob", "mean_logprob", "mean_prob"))
    recipe = load_recipe(found.by)
    stages = [stage.objective for stage in recipe.trainings().values()]
    learned = next((objective for objective in stages if isinstance(objective, LsrObjective)), None)
    learned = learned or LsrObjective(kind="lsr")
    if target is None and learned.target == "given":
        raise RecipeError(
            "the lsr stage learns grades from people (target: given), and labels are a generator's verdicts",
            hint="say which: --target prob, sum_logprob, mean_logprob or mean_prob",
        )
    system = _system(recipe, found.untuned)
    retriever = system.retriever
    if learned.candidates is not None:
        retriever = retriever.by(learned.candidates)
    points = _points(source, retriever, found.k or learned.k, found.limit, seed=recipe.seed)
    wanted: Any = target or learned.target
    scores = recipe.run / "scores"
    scorer = open_scorer(learned.scorer, system.generator)
    done = export_sentences(points, output, system, scores=scores, target=wanted, score_eos=learned.score_eos, scorer=scorer)
    console.print(NOTE)
    return done


def _points(source: Path, retriever: Any, k: int, limit: int | None, seed: int = 0) -> Any:
    from raglan.data import load_examples
    from raglan.datapoints import read_points
    from raglan.exports import found_points, holds_points, points_at

    if holds_points(source):
        return read_points(points_at(source))[:limit]
    examples = load_examples(source, retriever.base.corpus, limit=limit, seed=seed, split="train")
    return found_points(examples, retriever, k=min(k, len(retriever.base.corpus)), name=source.stem)


def _fits(source: Path, form: str, *, pairs: bool) -> None:
    if pairs and form not in ("openai-dpo", "trl"):
        raise RecipeError(f"{source} holds pairs of answers, which {form} has no place for", hint="--as openai-dpo or trl")
    if form == "openai-dpo" and not pairs:
        raise RecipeError(
            f"{source} holds no pairs of answers", hint='lines are {"query": "…", "chosen": "…", "rejected": "…"}'
        )


def _applies(options: dict[str, tuple[Any, bool, str]]) -> None:
    """Refuse options that would change nothing: option → (its value, whether it applies, why it does not)."""
    for name, (value, applies, reason) in options.items():
        if value is not None and not applies:
            raise RecipeError(f"{name} does not apply here: {reason}", hint=f"leave {name} out")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise RecipeError(f"{name} is {value!r}", hint=f"one of {', '.join(allowed)}")


def _form(form: str) -> Any:
    from raglan.exports import FORMS

    _one_of("--as", form, FORMS)
    return form


def _is_recipe(path: Path) -> bool:
    return path.suffix in (".yaml", ".yml")


def _system(recipe: Recipe, untuned: bool) -> Any:
    from raglan.stages import Parts, finished_parts

    stage, parts = ("untuned", Parts()) if untuned else finished_parts(recipe)[-1]
    console.print(f"[dim]system: {stage}[/dim]")
    return parts.open(recipe)
