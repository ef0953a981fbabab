"""What `raglan evaluate` measures further where the recipe asks for it: robustness, and what a judge says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from raglan.evaluate import Evaluation, domain
from raglan.judge import Judged, judge
from raglan.progress import console
from raglan.recipe import Recipe
from raglan.stress import Robustness, evaluate_robustness
from raglan.stress_tables import difference_summary, judge_summary, judge_tables, robustness_summary, robustness_tables

__all__ = ["Further", "evaluate_further"]

OPEN = ("rouge_l", "str_em", "bleu1")  # metrics of answers that are more than a span


@dataclass(frozen=True)
class Further:
    """What was measured beside the evaluation."""

    robust: list[Robustness]
    judged: Judged | None

    def summary(self) -> dict[str, Any]:
        """As JSON, by the names of the settings; empty where nothing was asked for."""
        found: dict[str, Any] = {"robustness": robustness_summary(self.robust)} if self.robust else {}
        found |= {"robustness_differences": compared} if (compared := difference_summary(self.robust)) else {}
        return found | ({} if self.judged is None else {"judge": judge_summary(self.judged)})

    def tell(self, recipe: Recipe) -> None:
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
        if (where := domain(recipe)) is not None and recipe.evaluate is not None:
            console.print(f"{recipe.evaluate.dataset}: {where}")
        if self.judged is None and recipe.evaluate is not None and set(OPEN) & set(recipe.evaluate.metrics):
            console.print("no judge: computed figures only")


def evaluate_further(recipe: Recipe, evaluations: Sequence[Evaluation]) -> Further:
    """Robustness and judgements, where `evaluate` has such settings. Raises CallsStopped."""
    settings = recipe.evaluate
    robust = evaluate_robustness(recipe) if settings is not None and settings.robustness is not None else []
    ends = [*evaluations[:1], *evaluations[1:][-1:]]  # between them nothing is judged
    return Further(robust, judge(recipe, ends) if settings is not None and settings.judge is not None else None)
