"""A teacher on this machine: its server is there while calls last, and gone with whoever started it, even by kill -9."""

from __future__ import annotations

import json
import os
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
from raglan.calls.served import ModelServer
from raglan.errors import GeneratorError
from raglan.recipe import ServedSettings, SynthesisSettings
from test_cli import run
from test_synthesis_endpoint import desk, paid  # noqa: F401 - fixtures

HERE = Path(__file__).parent
SERVES = """#!{python} -S
import os, signal, sys, time
words = sys.argv[1:]
print("asked to", *words, flush=True)
if "--fail" in words:
    sys.exit("no such weights")
if "--worker" in words and not os.fork():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("worker", os.getpid(), flush=True)
    time.sleep(600)
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
    if "--dies" in words:
        server.faults = lambda number, request: os._exit(9) if number == 20 else None
    over.wait()
print("ended", len(server.log), flush=True)
"""


@pytest.fixture(autouse=True)
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`vllm`, of another environment: the tests' own OpenAI-compatible server, at the port that it is told."""
    path = tmp_path / "bin" / "vllm"
    path.parent.mkdir()
    path.write_text(SERVES.format(python=sys.executable, tests=str(HERE)))
    path.chmod(0o755)
    monkeypatch.setenv("RAGLAN_VLLM", str(path))
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


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not Path(f"/proc/{pid}/stat").is_file() or Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def served(*arguments: str, **changes: Any) -> ServedSettings:
    told = {"kind": "vllm", "model": "org/m", "base_url": address(), "arguments": arguments, **changes}
    return ServedSettings.model_validate(told)


def fault(settings: ServedSettings, log: Path) -> str:
    """What is said of a server that does not come up."""
    with ModelServer(settings, log) as server, pytest.raises(GeneratorError) as found:
        server.start()
    return str(found.value)


def test_it_runs_from_the_first_start_to_the_end_of_the_block(tmp_path: Path) -> None:
    settings, log = served("--max-model-len", "64", "--worker"), tmp_path / "calls" / "server.log"
    with suppress(KeyError), ModelServer(settings, log) as server:
        assert not answers(settings.base_url)
        server.start()
        server.start()
        assert answers(settings.base_url)
        assert server.ended == ""
        raise KeyError
    assert not answers(settings.base_url)
    port = settings.base_url.split(":")[2].partition("/")[0]
    told = log.read_text().splitlines()
    assert told[0] == f"asked to serve org/m --host 127.0.0.1 --port {port} --max-model-len 64 --worker"
    assert told[-1] == "ended 0", "it was asked to end, and did"
    worker = next(int(line.split()[1]) for line in told if line.startswith("worker"))
    assert becomes(lambda: not alive(worker)), "what it had started does not listen, and is gone, too"


def test_it_ends_with_a_process_that_is_killed(tmp_path: Path) -> None:
    settings, log = served("--worker"), tmp_path / "server.log"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom raglan.calls.served import ModelServer\n"
        "from raglan.recipe import ServedSettings\nsettings = ServedSettings.model_validate_json(sys.argv[1])\n"
        "with ModelServer(settings, Path(sys.argv[2])) as server:\n    server.start()\n    print('up', flush=True)\n"
        "    time.sleep(600)\n"
    )
    words = [sys.executable, "-c", code, settings.model_dump_json(), str(log)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert answers(settings.base_url)
        process.kill()
    with ModelServer(settings.model_copy(update={"arguments": ()}), tmp_path / "next.log") as server:
        server.start()  # which waits until the port is free again
        assert log.read_text().endswith("ended 0\n")
        worker = next(int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("worker"))
        assert not alive(worker)


def test_what_does_not_come_up_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "server.log"
    told = fault(served("--fail"), log)
    assert "the server of org/m has ended (exit 1): asked to serve org/m" in told
    assert f"no such weights ({log})" in told
    told = fault(served("--deaf", start_seconds=3), log)
    assert "does not answer after 3 s:" in told
    assert "no such weights" in told, "the file of what it says is gone on with"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        assert f"something answers at {url} already" in fault(served(base_url=url), log)
    monkeypatch.setattr("raglan.calls.served.FREED", 0.5)
    settings = served()
    with ModelServer(settings, log) as server:
        server.start()
        assert "another run has port" in fault(settings, log)
        assert server.ended == ""
    monkeypatch.setenv("RAGLAN_VLLM", "/none/vllm")
    told = fault(served(), log)
    assert "there is no command '/none/vllm'" in told
    assert "pip install vllm" in told


def test_settings_name_no_secret_no_other_machine_and_nothing_twice() -> None:
    for wrong, told in (
        ({"arguments": ["--api-key=x"]}, "--api-key is a secret"), ({"arguments": ["--hf_tok", "x"]}, "--hf_tok is a secret"),
        ({"arguments": ["--host", "0.0.0.0"]}, "--host follows"), ({"arguments": ["--served_model_name=x"]}, "--served-model-"),
        ({"base_url": "http://0.0.0.0:8000/v1"}, "base_url"), ({"base_url": "https://127.0.0.1:8000/v1"}, "base_url"),
        ({"base_url": "http://127.0.0.1:99999/v1"}, "up to 65535"), ({"base_url": "http://127.0.0.1:0/v1"}, "base_url"),
        ({"program": "/bin/sh"}, "program"),
    ):  # fmt: skip
        with pytest.raises(ValidationError, match=told):
            ServedSettings.model_validate({"kind": "vllm", "model": "m", **wrong})
    asked = SynthesisSettings.model_validate({"path": "x", "n": 1, "teacher": {"kind": "hf", "model": "m"}})
    assert (asked.money.price, asked.priced.price) == (None, "free")


def test_a_dataset_by_a_model_on_this_machine(
    paid: Path, program: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    """No price, no cap, no server of the user's own. What dies in mid-run costs no example; a finished dataset starts none."""

    def written(program: Path) -> tuple[int, str]:
        monkeypatch.setenv("RAGLAN_VLLM", str(program))
        code, _, err = run("synthesize", str(paid), f"synthesis.teacher={teacher}", "synthesis.money={}",
                           capsys=capsys, monkeypatch=monkeypatch)  # fmt: skip
        return code, err

    settings, dying = served(api_key_env="CALLS_KEY", concurrency=4, attempts=2), program.with_name("dying")
    dying.write_text(program.read_text().replace('"--dies" in words', "True"))
    dying.chmod(0o755)
    teacher = settings.model_dump_json(exclude_defaults=True)
    assert run("build", str(paid), capsys=capsys, monkeypatch=monkeypatch)[0] == 0
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):  # which would not reach this machine
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr("raglan.calls.limits.OPEN_SECONDS", 0.1)
    folder, log = paid.parent / "data", paid.parent / "data/calls/server.log"
    code, err = written(dying)
    assert code != 0
    assert "the server of org/m has ended (exit 9)" in err, err
    assert not (folder / "manifest.json").exists()
    code, err = written(program)
    assert code == 0, err
    done = json.loads((folder / "manifest.json").read_text())
    rows = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    assert len(rows) == done["kept"] == done["requested"]
    assert {row["synth"]["teacher"] for row in rows} == {"endpoint:org/m"}
    assert int(log.read_text().split()[-1]) > len(rows), "it was asked, and has ended"
    assert not answers(settings.base_url)
    assert KEY not in "".join(file.read_text() for file in folder.rglob("*.json*"))
    assert not [name for name in done["files"] if name.startswith("calls/")], "other runs may share the journal"
    before = log.stat().st_mtime_ns
    code, err = written(program)
    assert code == 0, err
    assert log.stat().st_mtime_ns == before, "nothing was left to ask"
