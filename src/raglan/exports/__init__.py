"""Training files for others, checked by their readers' rules: from data points, questions, pairs, or a synthesized dataset."""

from raglan.exports.alce import export_alce
from raglan.exports.check import FORMS, Fault, Form, Lengths, check_file, failed, shared_questions
from raglan.exports.sentences import export_sentences
from raglan.exports.source import Preference, cut, found_points, holds_pairs, holds_points, points_at, read_pairs, with_passages
from raglan.exports.synthetic import Synthetic, holds_synthetic, read_synthetic
from raglan.exports.synthetic_rows import SYNTHETIC, export_synthetic
from raglan.exports.write import Written, export_pairs, export_points

__all__ = [
    "FORMS",
    "SYNTHETIC",
    "Fault",
    "Form",
    "Lengths",
    "Preference",
    "Synthetic",
    "Written",
    "check_file",
    "cut",
    "export_alce",
    "export_pairs",
    "export_points",
    "export_sentences",
    "export_synthetic",
    "failed",
    "found_points",
    "holds_pairs",
    "holds_points",
    "holds_synthetic",
    "points_at",
    "read_pairs",
    "read_synthetic",
    "shared_questions",
    "with_passages",
]
