"""Objectives, a table of kinds: `answer` (the generator learns), `lsr` (the query encoder learns)."""

from raglan.objective.answer import AnswerObjective
from raglan.objective.base import Objective
from raglan.objective.lsr import LsrObjective

KINDS: dict[str, type[Objective]] = {"answer": AnswerObjective, "lsr": LsrObjective}

__all__ = ["KINDS", "AnswerObjective", "LsrObjective", "Objective"]
