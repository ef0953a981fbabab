"""Shared fixtures. Data from outside is found through RAGLAN_DATA; tests that want it skip with a reason where it is unset."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine is no fault. The same examples in every run: it tells what a change broke, and not what luck found.
# `pytest --hypothesis-profile=explore` goes on searching.
settings.register_profile("raglan", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("raglan")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of public data sets."""
    folder = os.environ.get("RAGLAN_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("RAGLAN_DATA names no folder of data sets")
    return Path(folder)


def json_lines(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="session")
def vessen() -> Path:
    """The example corpus."""
    return ROOT / "examples" / "vessen"
