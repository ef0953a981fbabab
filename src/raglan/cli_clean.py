"""`raglan dedupe`, `raglan check-leaks` and `raglan verify`: what may stay in training data."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from raglan.errors import RecipeError
from raglan.progress import console
from raglan.recipe import DecontaminateSettings, EncoderSettings, EvaluationSet, JudgeSupport, ServedSettings, load_recipe

__all__ = ["check_leaks", "dedupe", "verify"]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", help="A .jsonl file to write of what stays.", show_default=False)
]
EncoderName = Annotated[
    str | None,
    typer.Option("--encoder", help="`embedded`, a folder or a hub name; compares meanings, too.", show_default=False),
]
Questions = Annotated[Path, typer.Argument(help="Questions, .jsonl or .jsonl.gz.", show_default=False)]


def dedupe(questions: Questions, output: Output = None, encoder: EncoderName = None, as_json: AsJson = False) -> None:
    """Find questions that are equal or nearly equal; of each group the lowest cell and ordinal stays, or the first."""
    from collections import Counter

    import numpy as np

    from raglan.dedupe import dedupe as find
    from raglan.dedupe import place
    from raglan.documents import stream_examples

    places: list[tuple[int, str, int, int]] = []
    names: list[str] = []

    def asked() -> Iterator[tuple[str, tuple[str, ...]]]:
        for row, example in enumerate(stream_examples(questions)):
            names.append(example.id)
            if "synth" in example.metadata or places:
                places.extend((0, "", 0, before) for before in range(len(places), row))
                places.append(place(example, row))
            yield example.query, example.history

    found = find(asked(), ranks=lambda: np.argsort(_order(places)) if places else None, embed=_embed(encoder))
    if output is not None:
        _write(output, questions, set(found.how))
    told = {"questions": len(found.keeps), "stay": len(found.kept), "by": dict(Counter(found.how.values()))}
    if as_json:
        pairs = [[names[row], names[found.keeps[row]], how] for row, how in found.how.items()]
        typer.echo(json.dumps({**told, "pairs": pairs}, ensure_ascii=False, indent=2))
        return
    for row, how in found.how.items():
        typer.echo(f"{names[row]} = {names[found.keeps[row]]}  {how}")
    console.print(f"{told['questions']:,} questions, {told['stay']:,} stay; {_counted(told['by'], 'duplicates')}")


def _order(places: list[Any]) -> list[int]:
    return sorted(range(len(places)), key=places.__getitem__)


def check_leaks(
    questions: Questions,
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe with `decontaminate` or `evaluate`.", show_default=False)
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="name=file of an evaluation set; give it once a set.", show_default=False)
    ] = None,
    missing: Annotated[
        list[str] | None, typer.Option(help="A set that may be missing; else a missing one is a fault.", show_default=False)
    ] = None,
    kb: Annotated[
        Path | None, typer.Option(help="A knowledge base whose passages these questions name.", show_default=False)
    ] = None,
    leakage: Annotated[Path | None, typer.Option(help="A leakage.json to write.", show_default=False)] = None,
    output: Output = None,
    encoder: EncoderName = None,
    as_json: AsJson = False,
) -> None:
    """Find training questions that come too near to evaluation sets, by five checks. Exits with 1 if any stays."""
    from raglan.decontaminate import decontaminate, open_sets, write_leakage
    from raglan.documents import stream_examples
    from raglan.knowledge import KnowledgeBase

    settings = _registered(recipe, against or [], missing or [])
    sets, gone = open_sets(settings, corpus_at=lambda path: KnowledgeBase.open(path).corpus)
    corpus = KnowledgeBase.open(kb).corpus if kb is not None else None
    chosen = EncoderSettings(model=encoder) if encoder is not None else settings.encoder
    made = decontaminate(
        stream_examples(questions), sets, settings=settings, corpus=corpus, embed=_embed(chosen), missing=gone
    )  # fmt: skip
    if leakage is not None:
        write_leakage(leakage, made)
    if output is not None:
        _write(output, questions, made.rows)
    if as_json:
        told = {"examples": made.examples, "dropped": len(made.rows), "counts": made.counts(), "missing": list(gone)}
        typer.echo(json.dumps(told, ensure_ascii=False, indent=2))
    else:
        for one in made.found:
            typer.echo(f"{one.train} = {one.set}:{one.held_out}  {one.check} {one.share:.3f}")
        for (name, check), why in made.not_run.items():
            console.print(f"{name}: {check} not made, {why}")
        for name in gone:
            console.print(f"{name}: missing, as was said; nothing was compared with it")
        console.print(f"{made.examples:,} questions, of which {len(made.rows):,} come too near to {len(sets)} evaluation sets")
    if made.rows and output is None:
        raise typer.Exit(1)


def _registered(recipe: Path | None, against: list[str], missing: list[str]) -> DecontaminateSettings:
    """The recipe's sets, the questions that it evaluates on, and those of the command line."""
    from raglan.decontaminate import registered

    settings = registered(load_recipe(recipe)) if recipe is not None else DecontaminateSettings()
    sets = dict(settings.sets)
    for text in against:
        name, mark, path = text.partition("=")
        if not (name and mark and path):
            raise RecipeError(f"--against {text!r} is not name=file", hint="as in --against nq=nq_test.jsonl")
        sets[name] = EvaluationSet(path=Path(path))
    unknown = [name for name in missing if name not in sets]
    if unknown:
        raise RecipeError(f"--missing {unknown[0]!r} is no registered set; there are {', '.join(sets) or 'none'}")
    return settings.model_copy(update={"sets": sets, "missing": (*settings.missing, *missing)})


def verify(
    file: Annotated[Path, typer.Argument(help="Written examples, .jsonl: query, target, passages with roles, …")],
    output: Output = None,
    rejects: Annotated[
        Path | None, typer.Option(help="A .jsonl file to write of the others, with why.", show_default=False)
    ] = None,
    may_be_missing: Annotated[
        list[str] | None,
        typer.Option(
            help="A check without which an example may stay, as support where no answer is known.", show_default=False
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe whose synthesis.verify says who tells of support.", show_default=False)
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="A judge's calls may cost what they cost, without a cap.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check written examples against the passages that they show. Exits with 1 if any rejected one stays."""
    from raglan.verification import Verified, funnel, read_written
    from raglan.verification.judge import pieces

    made: list[Verified] = []
    kept: list[dict[str, Any]] = []
    out: list[dict[str, Any]] = []
    with ExitStack() as stack:
        verifier, together = _verifier(recipe, tuple(may_be_missing or ()), stack, yes=yes)
        for part in pieces(read_written(file), together):
            judged, stopped = verifier.verify_all(written for _, written in part)
            if stopped is not None:
                raise stopped
            for (row, written), found in zip(part, judged, strict=True):
                assert found is not None, "nothing waits where nothing stopped"
                made.append(found)
                failed = [verdict for verdict in found.verdicts if verdict.outcome in ("fail", "missing")]
                (kept if found.accepted else out).append(
                    row if found.accepted else {**row, "rejected": found.reason, "detail": failed[0].detail}
                )
                if not as_json and not found.accepted:
                    typer.echo(f"{written.id}  {found.reason}" + (f": {failed[0].detail}" if failed[0].detail else ""))
    for path, rows in ((output, kept), (rejects, out)):
        if path is not None:
            _write_rows(path, iter(rows))
    told = funnel(made)
    if as_json:
        typer.echo(json.dumps(told, ensure_ascii=False, indent=2))
    console.print(f"{told['examples']} examples, {told['accepted']} accepted; {_counted(told['rejected'], 'rejected')}")
    if out and output is None:
        raise typer.Exit(1)


def _verifier(recipe: Path | None, may_be_missing: tuple[Any, ...], stack: ExitStack, *, yes: bool) -> tuple[Any, int]:
    """The checks that need no model, or those of a recipe; and how many examples are checked together."""
    from raglan.synthesis.checks import open_checks, open_journal, prices
    from raglan.synthesis.desk import PIECE
    from raglan.synthesis.endpoint import check_consent
    from raglan.verification import Verifier

    settings = load_recipe(recipe) if recipe is not None else None
    if settings is None or settings.synthesis is None:
        if settings is not None:
            raise RecipeError(f"{recipe} has no `synthesis`", hint="synthesis.verify.support says who tells of support")
        return Verifier(may_be_missing=may_be_missing), PIECE
    asked = settings.synthesis
    support = asked.verify.support
    if isinstance(support, JudgeSupport) and support.endpoint is None and isinstance(asked.teacher, ServedSettings):
        raise RecipeError(
            "the judge is the teacher's server, which runs only while `raglan synthesize` does",
            hint="start it by itself, and name it: synthesis.verify.support.endpoint",
        )
    costs = prices(asked, support_only=True)
    check_consent(asked, costs, yes=yes)
    checks = open_checks(settings, open_journal(asked, stack) if costs else None, stack, recall=False)
    missing = (*checks.verifier.may_be_missing, *may_be_missing)
    return replace(checks.verifier, may_be_missing=missing), checks.piece


def _embed(encoder: str | EncoderSettings | None) -> Any:
    """texts → vectors of length 1; None without an encoder."""
    if encoder is None:
        return None
    import numpy as np

    from raglan.encoder import Encoder

    opened = Encoder.open(EncoderSettings(model=encoder) if isinstance(encoder, str) else encoder)

    def embed(texts: Any) -> Any:
        vectors = opened.embed_passages(texts)  # both sides are questions, so both go through one tower
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    return embed


def _write(output: Path, source: Path, out: Collection[int]) -> None:
    """The source's objects but those of some rows, as they are."""
    from raglan.documents import read_objects

    _write_rows(output, (row for place, (_, row) in enumerate(read_objects(source)) if place not in out))


def _write_rows(output: Path, rows: Iterator[Any]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    working = output.with_name(f".{output.name}.part")
    with open(working, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    working.replace(output)


def _counted(counts: Any, what: str) -> str:
    return f"{what}: {', '.join(f'{count:,} {name}' for name, count in counts.items()) or 'none'}"
