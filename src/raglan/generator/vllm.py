"""vLLM's engine in this process as a Self-RAG backend: exact log-probabilities of the marks, and of nothing else.

Prompts go in as ids and ids come out; `logprob_token_ids` names the M marks, to which vLLM adds the token it chose, so a
generated position costs M + 1 numbers and never V. The stop token comes back with its marks. Prefix caching is on: a second
request on the same context computes the prefix's last, partial block again and no more (`cost.reused` counts the rest).

Log-probabilities are of the raw distribution, whatever the temperature. Given continuations are scored by `prompt_logprobs`,
for which vLLM does not read its cache. An adapter has to be merged first: vLLM would leave out its new rows of the vocabulary.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

from raglan.artifact import directory_fingerprint
from raglan.errors import CheckpointError, GeneratorError, RecipeError, require
from raglan.generator.asked import AskedGenerator, Request
from raglan.quiet import quietly
from raglan.recipe import GeneratorSettings, PromptSettings
from raglan.records import Marked
from raglan.vocabulary import open_tokenizer

__all__ = ["VLLMGenerator"]

MOST_MARKS = 128  # ids that vLLM takes in logprob_token_ids
WEIGHTS = ("*.safetensors", "*.bin", "config.json")
OURS = frozenset({"model", "tokenizer", "dtype", "enable_prefix_caching", "skip_tokenizer_init", "logprobs_mode"})


class VLLMGenerator(AskedGenerator):
    """A causal model in a vLLM engine.

    Raises:
        MissingExtra: vLLM is not installed. RecipeError: arguments of `generator.engine` that vLLM refuses.
        CheckpointError: a folder that cannot be loaded, or an adapter.
    """

    exact_marks = True

    def __init__(self, settings: GeneratorSettings, prompt: PromptSettings):
        self._vllm = _library()
        tokenizer, rows = _opened(settings.model)
        super().__init__(tokenizer, settings, prompt, rows=rows)
        self._engine = _engine(self._vllm, settings)
        self.positions = int(self._engine.llm_engine.model_config.max_model_len)

    @property
    def weights(self) -> Any:
        folder = Path(self.settings.model)
        return [directory_fingerprint(folder, WEIGHTS) if folder.is_dir() else self.settings.model, self.settings.dtype]

    def ask(self, requests: Sequence[Request]) -> list[Marked]:
        sampling = [self._sampling(request) for request in requests]
        outputs = self._answered([request.ids for request in requests], sampling)
        return [self._marked(request, output) for request, output in zip(requests, outputs, strict=True)]

    def ask_scores(self, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[np.ndarray]:
        one = self._vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = self._answered([(*before, *ids) for before, ids in rows], [one] * len(rows))
        return [self._scored(output, ids) for output, (_, ids) in zip(outputs, rows, strict=True)]

    def close(self) -> None:
        """Give the engine's memory back."""
        self._engine.llm_engine.engine_core.shutdown()

    def _sampling(self, request: Request) -> Any:
        if len(request.marks) > MOST_MARKS:
            raise GeneratorError(f"{len(request.marks)} marks are asked for, vLLM tells at most {MOST_MARKS}")
        self._check_positions(len(request.ids) + request.max_new_tokens)
        return self._vllm.SamplingParams(
            temperature=request.temperature, seed=request.seed, max_tokens=request.max_new_tokens, detokenize=False,
            stop_token_ids=sorted({*request.stop_ids, self.eos}), logprob_token_ids=list(request.marks),
        )  # fmt: skip

    def _answered(self, prompts: Sequence[tuple[int, ...]], sampling: Sequence[Any]) -> list[Any]:
        if not prompts:
            return []
        outputs: list[Any] = self._engine.generate(
            [{"prompt_token_ids": list(ids)} for ids in prompts], list(sampling), use_tqdm=False
        )
        self.cost.calls += len(outputs)
        for output in outputs:
            reused = int(output.num_cached_tokens or 0)
            self.cost.reused += reused
            self.cost.positions += len(output.prompt_token_ids) - reused + len(output.outputs[0].token_ids) - 1
        return outputs

    def _marked(self, request: Request, output: Any) -> Marked:
        written = output.outputs[0]
        ids = tuple(int(token) for token in written.token_ids)
        told: Sequence[Mapping[int, Any]] = list(written.logprobs)
        self.cost.logprobs += sum(len(position) for position in told)
        logprobs = np.array([position[token].logprob for position, token in zip(told, ids, strict=True)], np.float32)
        marks = np.array([[position[mark].logprob for mark in request.marks] for position in told], np.float32)
        ended = written.finish_reason == "stop" and written.stop_reason is None
        return Marked(ids, logprobs, marks.reshape(len(ids), len(request.marks)), "eos" if ended else "length")

    def _scored(self, output: Any, ids: tuple[int, ...]) -> np.ndarray:
        told = list(output.prompt_logprobs)[-len(ids) :] if ids else []
        self.cost.logprobs += len(told)
        return np.array([position[token].logprob for position, token in zip(told, ids, strict=True)], np.float32)

    def _check_positions(self, needed: int) -> None:
        if needed > self.positions:
            raise GeneratorError(
                f"context and answer need {needed} positions, the engine has {self.positions}",
                hint="raise generator.engine.max_model_len as far as the model goes, or lower decode.max_new_tokens",
            )


def _library() -> Any:
    # the engine in this process, not in a child of it: it ends with the process and needs no main module that can be imported
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is for data
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # vLLM would report each start to its makers
    return require("vllm", "for generator.kind vllm")


def _opened(name: str) -> tuple[Any, int]:
    """The tokenizer, and the rows of the embeddings."""
    if (Path(name) / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{name!r} is an adapter, and vLLM would leave out the rows that it added to the vocabulary",
            hint="merge it into its base first: raglan checkpoint merge RECIPE -o FOLDER",
        )
    try:
        with quietly():
            return open_tokenizer(name), int(AutoConfig.from_pretrained(name).vocab_size)
    except (OSError, ImportError, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise CheckpointError(
            f"generator {name!r} cannot be loaded: {_first_line(fault)}",
            hint="vLLM takes a folder with config.json, weights and tokenizer of a causal model, or a hub name and a network",
        ) from None


def _engine(vllm: Any, settings: GeneratorSettings) -> Any:
    if taken := sorted(OURS & set(settings.engine)):
        raise RecipeError(f"generator.engine holds {', '.join(taken)}, which raglan sets itself", hint="leave it out there")
    _make_llvmlite_readable()
    try:
        return vllm.LLM(
            model=settings.model, dtype=settings.dtype, enable_prefix_caching=True, skip_tokenizer_init=True,
            **{"disable_log_stats": True, **settings.engine},
        )  # fmt: skip
    except (ValueError, TypeError) as fault:  # pydantic's faults are ValueErrors
        raise RecipeError(
            f"vLLM refuses this engine: {_first_line(fault)}", hint="generator.engine takes the arguments of vllm.LLM"
        ) from None
    except (RuntimeError, OSError) as fault:
        raise GeneratorError(
            f"vLLM cannot start {settings.model!r}: {_first_line(fault)}",
            hint="its own log above says why; on a CPU set VLLM_CPU_KVCACHE_SPACE (GB)",
        ) from None


def _make_llvmlite_readable() -> None:
    """vLLM's CPU build (0.32) reads the attributes of all that is loaded, and llvmlite's library gives it no mapping for them.

    llvmlite is loaded wherever numba is, which BM25 uses where it finds it.
    """
    ffi = sys.modules.get("llvmlite.binding.ffi")
    known = getattr(getattr(ffi, "lib", None), "_fntab", None)
    if isinstance(known, dict):
        known.setdefault("__dict__", {})


def _first_line(fault: BaseException) -> str:
    return (str(fault).strip().splitlines() or [type(fault).__name__])[0]
