"""Training files for others: written from data points, questions or pairs of answers, and checked by their readers' rules."""

from raglan.exports.alce import export_alce
from raglan.exports.check import FORMS, Fault, Form, Lengths, check_file, failed, shared_questions
from raglan.exports.sentences import export_sentences
from raglan.exports.source import Preference, cut, found_points, holds_pairs, holds_points, points_at, read_pairs, with_passages
from raglan.exports.write import Written, export_pairs, export_points

__all__ = [
    "FORMS",
    "Fault",
    "Form",
    "Lengths",
    "Preference",
    "Written",
    "check_file",
    "cut",
    "export_alce",
    "export_pairs",
    "export_points",
    "export_sentences",
    "failed",
    "found_points",
    "holds_pairs",
    "holds_points",
    "points_at",
    "read_pairs",
    "shared_questions",
    "with_passages",
]
