"""What `raglan evaluate` measures further where the recipe asks for it: robustness, and what a judge says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from raglan.domains import domain
from raglan.errors import RaglanError
from raglan.evaluate import Evaluation
from raglan.judge import NO_JUDGE, Judged, judge, lacks_judge
from raglan.progress import console
from raglan.recipe import Recipe
from raglan.stress import Robustness, evaluate_robustness
from raglan.stress_tables import difference_summary, judge_summary, judge_tables, robustness_summary, robustness_tables

__all__ = ["Further", "evaluate_further"]


@dataclass
class Further:
    """What was measured beside the evaluation.

    Attributes:
        part: what is being measured, or was when it stopped. fault: what stopped it, raised once all else is told.
    """

    recipe: Recipe
    evaluations: Sequence[Evaluation]
    robust: list[Robustness] = field(default_factory=list)
    judged: Judged | None = None
    part: str = "robustness"
    fault: RaglanError | None = None

    def summary(self) -> dict[str, Any]:
        """As JSON, by the names of the settings; empty where nothing was asked for."""
        found: dict[str, Any] = {"robustness": robustness_summary(self.robust)} if self.robust else {}
        found |= {"robustness_differences": compared} if (compared := difference_summary(self.robust)) else {}
        if self.judged is not None:
            found["judge"] = judge_summary(self.judged) | {"warnings": list(self.judged.warnings)}
        elif lacks_judge(self.recipe, self.evaluations):
            found["judge"] = NO_JUDGE.partition(":")[0]
        return found | ({} if self.fault is None else {self.part: {"stopped": self.fault.message}})

    def tell(self) -> None:
        """Tables to stdout, where they are to stderr."""
        for shown in [*robustness_tables(self.robust), *(judge_tables(self.judged) if self.judged is not None else [])]:
            table = Table(*shown.head, box=None, title=shown.title, title_justify="left")
            for row in shown.rows:
                table.add_row(*row)
            Console(width=max(100, 40 + 24 * len(shown.head)), highlight=False).print(table)
        for system in self.robust:
            console.print(f"{system.system}: {system.folder / 'answers.jsonl'}", soft_wrap=True)
        if self.judged is not None:
            console.print(f"judge {self.judged.model}: {self.judged.folder / 'judgements.jsonl'}", soft_wrap=True)
            for warning in self.judged.warnings:
                console.print(f"warning: {warning}", markup=False, soft_wrap=True)
        if (where := domain(self.recipe)) is not None:
            console.print(f"{where.dataset}: {where}", soft_wrap=True)
        if lacks_judge(self.recipe, self.evaluations):
            console.print(NO_JUDGE)


def evaluate_further(recipe: Recipe, evaluations: Sequence[Evaluation], *, yes: bool = False) -> Further:
    """Robustness and judgements, where `evaluate` has such settings; a fault ends it, and is kept.

    Args:
        yes: judgements may cost money without a cap.
    """
    settings, found = recipe.evaluate, Further(recipe, evaluations)
    assert settings is not None
    try:
        if settings.robustness is not None:
            found.robust = evaluate_robustness(recipe)
        if settings.judge is not None:
            found.part = "judge"
            ends = [*evaluations[:1], *evaluations[1:][-1:]]  # between them nothing is judged
            found.judged = judge(recipe, ends, yes=yes)
    except RaglanError as fault:
        found.fault = fault
    return found
