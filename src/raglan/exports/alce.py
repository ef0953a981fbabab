"""Answers with citations as ALCE (Gao et al. 2023) reads them: {"data": [{"question", "output", "docs"}, …]}.

[n] in `output` is the n-th of `docs`: those are the cited passages in the order of their first citation, and no others, so
every number is there. Rows of the benchmark's own file may be given, and keep their gold fields.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raglan.decode.self_rag import cited_text
from raglan.errors import CorpusError
from raglan.records import Answer

__all__ = ["alce_row", "export_alce"]


def alce_row(answer: Answer, row: Mapping[str, Any]) -> dict[str, Any]:
    """One answer; the fields of `row`, its line of the benchmark, stay, but for its docs and output."""
    docs = [
        {"id": hit.passage.id, "title": hit.passage.title, "text": hit.passage.text, "score": hit.score}
        for hit in answer.citations
    ]
    return {"question": answer.query, **row, "output": cited_text(answer), "docs": docs}


def export_alce(answers: Sequence[Answer], path: Path, *, rows: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Write answers as one ALCE file. `rows`: the benchmark's own, one an answer, in order, or none.

    Raises:
        CorpusError: rows that are not those answers' questions.
    """
    asked = [answer.query for answer in answers]
    if rows and [row.get("question") for row in rows] != asked:
        raise CorpusError(
            f"{len(rows)} rows do not ask the {len(asked)} questions that were answered", hint="give them in the same order"
        )
    data = [alce_row(answer, row) for answer, row in zip(answers, rows or [{}] * len(answers), strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"data": data}, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return path
