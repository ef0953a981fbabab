"""`raglan rows`: Self-RAG training rows from their published form, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from raglan.progress import console

__all__ = ["rows"]

rows = typer.Typer(no_args_is_help=True, help="Self-RAG training rows from their published form, and back.")
Source = Annotated[Path, typer.Argument(help="A .jsonl file.", show_default=False)]


@rows.command("import")
def import_published(
    source: Source, output: Annotated[Path, typer.Option("-o", "--output", help="The .jsonl of rows to write.")]
) -> None:  # fmt: skip
    """Convert published rows (instruction, input, output). Rows off the grammar are listed and kept verbatim."""
    from raglan.published_rows import import_rows

    off = import_rows(source, output)
    for line, why in off:
        console.print(f"line {line} is off the grammar and kept verbatim: {why}", markup=False, soft_wrap=True)
    with open(output, encoding="utf-8") as file:
        count = sum(1 for _ in file)
    typer.echo(json.dumps({"rows": count, "off_grammar": [line for line, _ in off], "output": str(output)}))


@rows.command("export")
def export_published(
    source: Source, output: Annotated[Path, typer.Option("-o", "--output", help="The .jsonl to write.")]
) -> None:  # fmt: skip
    """Write rows in the published form; imported ones come out byte for byte as they were."""
    from raglan.published_rows import export_rows

    export_rows(source, output)
    typer.echo(str(output))
