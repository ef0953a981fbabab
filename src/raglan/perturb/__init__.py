"""Noise: passages that do not answer, or answer wrongly, put among those that do; for training data and for sweeps alike.

    slot        a passage in a prompt with its record, and the palette of kinds
    guard       which passages are no noise, because they answer
    occurrences in how many passages an answer stands
    values      false values of the same type
    spellings   other spellings of dates and amounts
    operators   passages made from others
    deal        kinds over all slots of a data set
    fill        one prompt's slots; decidable or not; sweeps
    order       where gold stands

All functions are pure: what they return depends on their arguments and a seed, and they read and write nothing.
"""

from raglan.perturb.deal import Cell, deal_kinds
from raglan.perturb.fill import (
    Sources,
    decidable,
    fill,
    neighbours,
    second_voice,
    shown_answers,
    sides,
    sweep,
)
from raglan.perturb.guard import Frequencies, Guard, Judge, held
from raglan.perturb.occurrences import Occurrences
from raglan.perturb.operators import boilerplate, counterfactual, garbled, near_duplicate
from raglan.perturb.order import arrange, deal_positions, orders
from raglan.perturb.slot import KINDS, PALETTE, Kind, Slot, content_hash, gold_slots
from raglan.perturb.values import swap, value_type

__all__ = [
    "KINDS",
    "PALETTE",
    "Cell",
    "Frequencies",
    "Guard",
    "Judge",
    "Kind",
    "Occurrences",
    "Slot",
    "Sources",
    "arrange",
    "boilerplate",
    "content_hash",
    "counterfactual",
    "deal_kinds",
    "deal_positions",
    "decidable",
    "fill",
    "garbled",
    "gold_slots",
    "held",
    "near_duplicate",
    "neighbours",
    "orders",
    "second_voice",
    "shown_answers",
    "sides",
    "swap",
    "sweep",
    "value_type",
]
