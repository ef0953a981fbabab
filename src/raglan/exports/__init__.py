"""Training files for others: written from data points, pairs or questions, and checked by their readers' own rules."""

from raglan.exports.check import FORMS, Fault, Form, Lengths, check_file, failed, shared_questions

__all__ = ["FORMS", "Fault", "Form", "Lengths", "check_file", "failed", "shared_questions"]
