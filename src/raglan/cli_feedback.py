"""`raglan feedback …`, what people said, and `raglan split`, which questions are learned and which are measured."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from raglan.errors import CorpusError, RecipeError
from raglan.progress import console
from raglan.recipe import load_recipe

__all__ = ["feedback", "split"]

feedback = typer.Typer(no_args_is_help=True, help="What people said of answers and passages: import, look at, export.")
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def split(
    questions: Annotated[Path, typer.Argument(help="Questions, .jsonl or .jsonl.gz.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to make; an earlier split in it is honoured.")],
    by: Annotated[str, typer.Option(help="What stays together: question or document.")] = "question",
    shares: Annotated[str, typer.Option(help="The splits and their shares.")] = "train=.8,dev=.1,test=.1",
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    earlier: Annotated[Path | None, typer.Option(help="Another split, whose questions stay where they are.")] = None,
    kb: Annotated[Path | None, typer.Option(help="A knowledge base or recipe, where `relevant` names passages.")] = None,
) -> None:
    """Split questions so that nothing leaks: equal questions, or all about shared documents, stay on one side."""
    from raglan.documents import read_examples
    from raglan.knowledge import KnowledgeBase
    from raglan.splits import read_split, split_examples, write_split

    if by not in ("question", "document"):
        raise RecipeError(f"--by is {by!r}; it must be question or document")
    known = earlier or (output if (output / "split.json").is_file() else None)
    path = load_recipe(kb).knowledge.path if kb is not None and kb.suffix in (".yaml", ".yml") else kb
    examples = read_examples(questions)
    made = split_examples(
        examples, by=by, shares=_shares_of(shares), seed=seed, earlier=read_split(known) if known is not None else None,
        corpus=KnowledgeBase.open(path).corpus if path is not None else None,
    )  # fmt: skip
    for name, count in write_split(output, made, examples).items():
        typer.echo(f"{output / name}.jsonl  {count} questions")
    told = f"{made.groups} groups by {by}, the largest {100 * made.largest:.1f} % of the questions"
    console.print(told + (", an earlier split honoured" if known else ""))
    for identity, reason in made.aside:
        console.print(f"set aside: {identity}, {reason}", markup=False, soft_wrap=True)


StoreOption = Annotated[str, typer.Option("--store", help="An SQLite file, or postgresql://user:password@host/name.")]
AGREE = "Where people disagree: majority, all or each."
CHECKED: Any = {"sft": "openai-chat", "dpo": "openai-dpo"}  # forms that services read, and so their rules
UNCHECKED = (
    "--as questions keeps all that was said, however little: `raglan train` learns from it (data.kind: feedback), and "
    "`raglan synthesize export … --as trl` writes it for trainers without such rules"
)


@feedback.command("import")
def import_feedback(
    file: Annotated[Path, typer.Argument(help="What the tool exported.")],
    source: Annotated[str, typer.Option("--from", help="argilla, label-studio, phoenix, langfuse or raglan.")],
    store: StoreOption = "feedback.sqlite",
    maps: Annotated[list[str] | None, typer.Option("--map", help="field=name: what a field is called in the export.")] = None,
    grades: Annotated[list[str] | None, typer.Option("--grade", help="label=number: the grade of a label.")] = None,
    beside: Annotated[
        list[Path] | None, typer.Option("--with", help="A file that holds what the export points to: traces, spans, documents.")
    ] = None,
    project: Annotated[str, typer.Option(help="Tells apart projects whose ids are the same.")] = "",
) -> None:
    """Read an export into the store. The same export read twice adds nothing."""
    from raglan.feedback import FeedbackStore, Fields, read_feedback

    fields = Fields.of(maps or [], grades or [])
    found = read_feedback(file, source, fields=fields, beside=beside or [], project=project)
    with FeedbackStore(store, create=True) as kept:
        counts = kept.add(found)
    told = [f"{counts[name]} {name}" for name in ("new", "changed", "unchanged", "older") if counts[name] or name == "new"]
    typer.echo(", ".join(told))
    used = Counter(one.kind for one in found if not one.aside)
    console.print(f"{sum(used.values())} used: {', '.join(f'{n} {kind}' for kind, n in used.items()) or 'none'}")
    reasons = Counter(one.aside for one in found if one.aside)
    for reason, count in reasons.most_common():
        console.print(f"{count} set aside: {reason}", markup=False, soft_wrap=True)
    if not found:
        console.print("hint: nobody has said anything in this file, or it is another tool's: check --from", soft_wrap=True)
    if any("mapped" in reason for reason in reasons):
        console.print("hint: say what a name means and import again, as in --map answer=better_answer", soft_wrap=True)


@feedback.command("list")
def list_feedback(store: StoreOption = "feedback.sqlite", as_json: AsJson = False) -> None:
    """What the store holds: statements by kind, questions, people, and why others are set aside."""
    from raglan.feedback import FeedbackStore, settle

    with FeedbackStore(store) as kept:
        found = kept.judgements()
    used = [one for one in found if not one.aside]
    settled = settle(found)
    figures: dict[str, Any] = {
        "statements": len(found), "kinds": dict(Counter(one.kind for one in used)), "questions": len(settled),
        "people": len({one.annotator for one in used if one.annotator}),
        "undecided": sum(bool(one.undecided) for one in settled),
        "aside": dict(Counter(one.aside for one in found if one.aside).most_common()),
    }  # fmt: skip
    if as_json:
        typer.echo(json.dumps(figures, ensure_ascii=False, indent=2))
        return
    kinds = ", ".join(f"{count} {kind}" for kind, count in figures["kinds"].items())
    people = f"{len(settled)} questions by {figures['people']} people with names"
    typer.echo(f"{len(used)} statements used ({kinds or 'none'}) on {people}")
    typer.echo(f"{figures['undecided']} questions undecided by majority")
    for reason, count in figures["aside"].items():
        typer.echo(f"{count} set aside: {reason}")


@feedback.command("show")
def show_feedback(
    question: Annotated[str, typer.Argument(help="A question's id, or its words.")],
    store: StoreOption = "feedback.sqlite",
    agree: Annotated[str, typer.Option(help=AGREE)] = "majority",
) -> None:
    """All that was said of one question, as JSON, and what is made of it."""
    from raglan.feedback import FeedbackStore, settle
    from raglan.text import question_key

    with FeedbackStore(store) as kept:
        found = kept.judgements()
    settled = settle(found, agree=_agree(agree))
    one = next((s for s in settled if s.id == question or question_key(s.query) == question_key(question)), None)
    key = question_key(one.query, one.history) if one is not None else question_key(question)
    said = [j for j in found if question_key(j.query, j.history) == key or (j.example and j.example == question)]
    if not said:
        raise CorpusError(f"the store holds nothing on {question!r}", hint="raglan feedback export --as raglan writes all")
    made = {
        "id": one.id, "answers": list(one.answers), "replaced": [list(pair) for pair in one.replaced],
        "grades": [{"passage": name, "text": text, "grade": grade} for (name, text), grade in one.grades.items()],
        "undecided": list(one.undecided),
    } if one is not None else None  # fmt: skip
    rows = [{name: value for name, value in j.row().items() if name != "raw" and value not in ("", ())} for j in said]
    typer.echo(json.dumps({"settled": made, "statements": rows}, ensure_ascii=False, indent=2))


@feedback.command("export")
def export_feedback(
    output: Annotated[Path, typer.Option("-o", "--output", help="The .jsonl file to write.")],
    form: Annotated[str, typer.Option("--as", help="questions, sft, dpo, labels, review or raglan.")] = "questions",
    store: StoreOption = "feedback.sqlite",
    agree: Annotated[str, typer.Option(help=AGREE)] = "majority",
    exclude: Annotated[
        list[Path] | None, typer.Option(help="Questions that are measured; feedback on them is left out.")
    ] = None,
    ratings: Annotated[str, typer.Option(help="For questions: ignore, filter or weight.")] = "ignore",
    min_rating: Annotated[float | None, typer.Option(help="For --ratings filter.")] = None,
) -> None:
    """Write feedback as questions to train on, chat lines, preference pairs, passage labels, a review file, or all of it.

    Chat lines and preference pairs are checked before they appear: a file that a service would refuse is not written.
    """
    from raglan import feedback as said
    from raglan.documents import example_row, read_examples
    from raglan.exports.write import write_rows
    from raglan.records import Example

    if ratings not in ("ignore", "filter", "weight") or (ratings == "filter") != (min_rating is not None):
        raise RecipeError("--ratings is ignore, weight, or filter with --min-rating")
    with said.FeedbackStore(store) as kept:
        found = kept.judgements()
        former = kept.judgements(former=True) if form == "raglan" else []
    settled = said.settle(found, agree=_agree(agree))
    held = [example for path in exclude or [] for example in read_examples(path)]
    _, out = said.without([Example(one.id, one.query, history=one.history) for one in settled], held)
    settled = [one for one in settled if one.id not in set(out)]
    makers: dict[str, Any] = {
        "questions": lambda: [
            example_row(e) for e in said.question_examples(settled, ratings=ratings, min_rating=min_rating)
        ],
        "sft": lambda: said.sft_rows(settled), "dpo": lambda: said.preference_rows(settled),
        "labels": lambda: said.label_rows(settled), "review": lambda: said.review_rows(settled),
        "raglan": lambda: [one.row() for one in former],
    }  # fmt: skip
    if form not in makers:
        raise RecipeError(f"--as {form!r} is unknown; known are {', '.join(makers)}")
    if form == "raglan" and held:
        raise RecipeError("--as raglan writes all that the store holds, so --exclude has no place there")
    rows = makers[form]()
    if form in CHECKED:
        for fault in write_rows(rows, (), output, CHECKED[form], hint=UNCHECKED).warnings:
            console.print(f"warning: {fault.text}", markup=False, soft_wrap=True)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    typer.echo(f"{output}  {len(rows)} rows" + (f"; {len(out)} held-out questions left out" if out else ""))


def _agree(text: str) -> str:
    if text not in ("majority", "all", "each"):
        raise RecipeError(f"--agree is {text!r}; it must be majority, all or each")
    return text


def _shares_of(text: str) -> dict[str, float]:
    """As in train=.8,dev=.2, as a mapping."""
    shares = {}
    for part in text.split(","):
        name, _, share = part.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name) or not re.fullmatch(r"\d*\.?\d+", share):
            raise RecipeError(f"--shares {text!r} is not name=share,…", hint="as in train=.8,dev=.1,test=.1")
        shares[name] = float(share)
    return shares
