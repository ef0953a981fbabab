"""The teacher behind an OpenAI-compatible endpoint: `EndpointTeacher`, its prompts (data files), and what it will cost."""

from raglan.synthesis.endpoint.paid import check_consent, cost, estimate_lines, estimate_row, open_endpoint
from raglan.synthesis.endpoint.prompts import Prompts, load_prompts
from raglan.synthesis.endpoint.teacher import EndpointTeacher

__all__ = [
    "EndpointTeacher",
    "Prompts",
    "check_consent",
    "cost",
    "estimate_lines",
    "estimate_row",
    "load_prompts",
    "open_endpoint",
]
