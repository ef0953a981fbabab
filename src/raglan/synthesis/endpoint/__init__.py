"""The teacher behind an OpenAI-compatible endpoint: `EndpointTeacher`, its prompts (data files), and what it will cost."""

from raglan.synthesis.endpoint.prompts import Prompts, load_prompts
from raglan.synthesis.endpoint.teacher import EndpointTeacher

__all__ = ["EndpointTeacher", "Prompts", "load_prompts"]
