"""What people said of questions, answers and passages: read from four tools' exports, kept in one store, turned into data.

    tool's export → `read_feedback` → Judgement → `FeedbackStore` → `settle` → Example, preference pairs, labels, review

Nothing is lost: what is no person's word (a suggestion, a prediction, a cancelled or unsubmitted answer, an id without
content) is kept as well, with the reason why it is not used.
"""

from raglan.feedback.judgement import KINDS, Fields, Judgement
from raglan.feedback.read import SOURCES, read_feedback
from raglan.feedback.store import FeedbackStore
from raglan.feedback.use import (
    Settled,
    feedback_examples,
    label_rows,
    place,
    preference_rows,
    question_examples,
    review_rows,
    settle,
    sft_rows,
    without,
)

__all__ = [
    "KINDS",
    "SOURCES",
    "FeedbackStore",
    "Fields",
    "Judgement",
    "Settled",
    "feedback_examples",
    "label_rows",
    "place",
    "preference_rows",
    "question_examples",
    "read_feedback",
    "review_rows",
    "settle",
    "sft_rows",
    "without",
]
