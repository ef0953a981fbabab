"""A teacher on this machine: its server is there while calls last, and gone with whoever started it, even by kill -9."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fault_server import KEY
from raglan.calls.served import model_server
from raglan.errors import GeneratorError
from raglan.recipe import ServedSettings, SynthesisSettings
from test_cli import run
from test_synthesis_endpoint import desk, paid  # noqa: F401 - fixtures

HERE = Path(__file__).parent
SERVES = """#!{python} -S
import signal, sys, time
words = sys.argv[1:]
print("asked to", *words, flush=True)
if "--fail" in words:
    sys.exit("no such weights")
if "--deaf" in words:
    time.sleep(600)
import site, threading
site.main()
sys.path.insert(0, {tests!r})
from fault_server import FaultServer, author
over = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: over.set())
with FaultServer(port=int(words[words.index("--port") + 1])) as server:
    server.reply = author
    over.wait()
print("ended", len(server.log), flush=True)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """`vllm`, of another environment: the tests' own OpenAI-compatible server, at the port that it is told."""
    path = tmp_path / "bin" / "vllm"
    path.parent.mkdir()
    path.write_text(SERVES.format(python=sys.executable, tests=str(HERE)))
    path.chmod(0o755)
    return path


def address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"


def answers(url: str) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", int(url.rsplit(":", 1)[1].partition("/")[0]))) == 0


def becomes(true: Callable[[], bool]) -> bool:
    until = time.monotonic() + 20
    while not true() and time.monotonic() < until:
        time.sleep(0.05)
    return true()


def served(program: Path, *arguments: str, **changes: Any) -> ServedSettings:
    told = {"kind": "vllm", "model": "org/m", "base_url": address(), "program": program, "arguments": arguments, **changes}
    return ServedSettings.model_validate(told)


def fault(settings: ServedSettings, log: Path) -> str:
    """What is said of a server that does not come up."""
    with pytest.raises(GeneratorError) as found, model_server(settings, log):
        pass
    return str(found.value)


def test_it_is_there_within_the_block_alone(program: Path, tmp_path: Path) -> None:
    settings, log = served(program, "--max-model-len", "64"), tmp_path / "calls" / "server.log"
    with suppress(KeyError), model_server(settings, log):
        assert answers(settings.base_url)
        raise KeyError
    assert not answers(settings.base_url)
    port = settings.base_url.split(":")[2].partition("/")[0]
    told = log.read_text().splitlines()
    assert told[0] == f"asked to serve org/m --host 127.0.0.1 --port {port} --max-model-len 64"
    assert told[-1] == "ended 0", "it was asked to end, and did"


def test_it_ends_with_a_process_that_is_killed(program: Path, tmp_path: Path) -> None:
    settings, log = served(program), tmp_path / "server.log"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom raglan.calls.served import model_server\n"
        "from raglan.recipe import ServedSettings\nsettings = ServedSettings.model_validate_json(sys.argv[1])\n"
        "with model_server(settings, Path(sys.argv[2])):\n    print('up', flush=True)\n    time.sleep(600)\n"
    )
    words = [sys.executable, "-c", code, settings.model_dump_json(), str(log)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert answers(settings.base_url)
        process.kill()
    assert becomes(lambda: not answers(settings.base_url))
    assert becomes(lambda: log.read_text().endswith("ended 0\n"))


def test_what_does_not_come_up_says_why(program: Path, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    told = fault(served(program, "--fail"), log)
    assert "the server of org/m ended as it began (exit 1): asked to serve org/m" in told
    assert f"no such weights ({log})" in told
    told = fault(served(program, "--deaf", start_seconds=3), log)
    assert "does not answer after 3 s: asked to serve org/m" in told
    told = fault(served(tmp_path / "none" / "vllm"), log)
    assert f"there is no command '{tmp_path}/none/vllm'" in told
    assert "pip install vllm" in told
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        assert f"something answers at {url} already" in fault(served(program, base_url=url), log)


def test_settings_name_no_other_program_no_secret_and_no_other_machine() -> None:
    for wrong, told in (
        ({"program": "/bin/sh"}, "is no path of `vllm`"), ({"arguments": ["--api-key=x"]}, "--api-key is a secret"),
        ({"base_url": "http://0.0.0.0:8000/v1"}, "base_url"), ({"base_url": "https://127.0.0.1:8000/v1"}, "base_url"),
    ):  # fmt: skip
        with pytest.raises(ValidationError, match=told):
            ServedSettings.model_validate({"kind": "vllm", "model": "m", **wrong})
    asked = SynthesisSettings.model_validate({"path": "x", "n": 1, "teacher": {"kind": "hf", "model": "m"}})
    assert (asked.money.price, asked.priced.price) == (None, "free")


def test_a_dataset_by_a_model_on_this_machine(
    paid: Path, program: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    """No price, no cap, no server of the user's own; a finished one starts none."""
    settings = served(program, api_key_env="CALLS_KEY", concurrency=4)
    teacher = settings.model_dump_json(exclude_defaults=True)
    words = ("synthesize", str(paid), f"synthesis.teacher={teacher}", "synthesis.money={}")
    assert run("build", str(paid), capsys=capsys, monkeypatch=monkeypatch)[0] == 0
    code, _, err = run(*words, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0, err
    folder = next(paid.parent.rglob("examples.jsonl")).parent
    rows = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    done = json.loads((folder / "manifest.json").read_text())
    assert len(rows) == done["kept"] > 0
    assert {row["synth"]["teacher"] for row in rows} == {"endpoint:org/m"}
    log = next(paid.parent.rglob("server.log"))
    assert int(log.read_text().split()[-1]) > len(rows), "it was asked, and has ended"
    assert not answers(settings.base_url)
    assert KEY not in "".join(file.read_text() for file in folder.rglob("*.json*"))
    assert not [name for name in done["files"] if name.startswith("calls/")], "other runs may share the journal"
    before = log.stat().st_mtime_ns
    code, _, err = run(*words, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0, err
    assert log.stat().st_mtime_ns == before, "nothing was left to ask"
