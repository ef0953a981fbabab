"""Training data that is planned to exact numbers before it is written (a reconstruction in the spirit of RAG-Tuning).

`make_plan(recipe)` deals topics, tasks, formats, passages and noise to cells; `coverage` says what became of them. What is
published of RAG-Tuning is one model card: topics, formats, retrievers and noise are named there, and no figure. Factors,
weights and rules are therefore ours.
"""

from raglan.synthesis.coverage import Attempt, complete, coverage, kept, refills, shown_noise
from raglan.synthesis.factors import Factor, Factors, Rule, Value, load_factors
from raglan.synthesis.files import read_plan, write_plan
from raglan.synthesis.plan import Cell, Plan, factors_of, make_plan, seed_of
from raglan.synthesis.quotas import quotas

__all__ = [
    "Attempt",
    "Cell",
    "Factor",
    "Factors",
    "Plan",
    "Rule",
    "Value",
    "complete",
    "coverage",
    "factors_of",
    "kept",
    "load_factors",
    "make_plan",
    "quotas",
    "read_plan",
    "refills",
    "seed_of",
    "shown_noise",
    "write_plan",
]
