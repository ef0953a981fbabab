"""Objectives, a table of kinds: `answer` (the generator learns), `lsr` (the query encoder learns), `marginal` (both)."""

from raglan.objective.answer import AnswerObjective
from raglan.objective.base import Objective
from raglan.objective.lsr import LsrObjective
from raglan.objective.marginal import MarginalObjective, MarginalRow, learns_to_retrieve
from raglan.objective.turns import TurnObjective

KINDS: dict[str, type[Objective]] = {"answer": AnswerObjective, "lsr": LsrObjective, "marginal": MarginalObjective}

__all__ = [
    "KINDS",
    "AnswerObjective",
    "LsrObjective",
    "MarginalObjective",
    "MarginalRow",
    "Objective",
    "TurnObjective",
    "learns_to_retrieve",
]
