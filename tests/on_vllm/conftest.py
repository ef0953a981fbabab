"""vLLM for real, on a CPU: `make test-vllm` makes an environment with it. Elsewhere these tests skip and say why."""

from __future__ import annotations

import importlib.util
import os

import pytest

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_PLUGINS": "",
    "VLLM_LOGGING_LEVEL": "WARNING", "TORCHDYNAMO_DISABLE": "1",  # its sampler would call a compiler
}  # fmt: skip
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if "on_vllm" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed: `make test-vllm`"))
