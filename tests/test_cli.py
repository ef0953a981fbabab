"""The command line as a stranger meets it: helps, a small whole job, bad input with exit code 2 and no traceback."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest

from raglan import cli
from tiny import small_recipe

SECRET = "hf_SENTINEL9f8e7d"
COMMANDS = ["build", "retrieve", "answer", "train", "evaluate", "report", "swap", "schema", "synthesize"]


def run(*words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["raglan", *words])
    with pytest.raises(SystemExit) as done:
        cli.main()
    streams = capsys.readouterr()
    assert SECRET not in streams.out + streams.err
    return int(done.value.code or 0), streams.out, streams.err


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    return lambda *words: run(*words, capsys=capsys, monkeypatch=monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def recipe(folder: Path) -> str:
    return str(small_recipe(folder))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help(call, command: str) -> None:
    code, out, _ = call(command, "--help")
    assert code == 0
    assert "Usage: raglan" in out
    assert all(f" {name} " in call("--help")[1] for name in COMMANDS)


def test_the_whole_job(call, recipe: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    short = ["stages.read.train.max_steps=6", "stages.find.train.max_steps=4"]
    code, out, _ = call("build", recipe)
    assert code == 0
    assert "1 files read, 0 skipped, 30 documents, 30 passages" in out
    for index in ("dense", "bm25", "hybrid"):
        code, out, _ = call("retrieve", str(folder / "kb"), "who built the tower", "--index", index, "-k", "2", "--json")
        assert code == 0
        assert [hit["rank"] for hit in json.loads(out)] == [1, 2]
    assert call("train", recipe, *short)[0] == 0
    code, out, _ = call("evaluate", recipe, *short, "--json")
    assert code == 0
    assert set(json.loads(out)) == {"untuned", "find"}
    code, out, _ = call("evaluate", recipe, *short)
    assert "gold/em" in out
    assert "difference" in out
    assert re.search(r"^retrieved/em is (better|worse|unchanged|not clearly changed): ", out, re.M)
    assert "one training seed (1): " in out
    code, out, _ = call("answer", recipe, "who built the tower?", *short)
    assert code == 0
    assert out.startswith("Q: who built the tower?\nA: ")
    assert "[1]" in out
    shortened = Path(recipe).with_name("short.yaml")
    text = Path(recipe).read_text().replace("num_train_epochs: 6", "num_train_epochs: 6, max_steps: 6")
    shortened.write_text(text.replace("learning_rate: 1e-3}", "learning_rate: 1e-3, max_steps: 4}"))
    pytest.importorskip("plotly")
    assert call("train", str(shortened))[0] == call("evaluate", str(shortened))[0] == 0
    code, out, _ = call("report", str(shortened), "-o", str(folder / "report.html"))
    assert code == 0
    looked_at(folder / "report.html")
    page = (folder / "report.html").read_text()
    assert "Before and after" in page
    assert "Plotly.newPlot" in page
    assert 'src="http' not in page
    assert page.count("<article") == 20
    assert not holding(folder, SECRET), "the environment's token was written"


def holding(folder: Path, text: str) -> list[Path]:
    """The files that hold a text."""
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@pytest.mark.parametrize("command", ["build", "train", "evaluate", "report"])
def test_a_recipe_holds_no_secrets(call, command: str, tmp_path: Path) -> None:
    written = small_recipe(tmp_path)
    given = ("--set",) if command == "report" else ()
    code, _, err = call(command, str(written), *given, f"train.hub_token={SECRET}")
    assert code == 2
    assert "train: hub_token is a secret" in " ".join(err.split())
    assert "HF_TOKEN" in err
    written.write_text(written.read_text().replace("learning_rate: 1e-3}", f"hub_token: {SECRET}}}"))
    planted = {written}
    code, _, err = call(command, str(written))
    assert code == 2
    assert "stages.find.train: hub_token is a secret" in " ".join(err.split())
    assert set(holding(tmp_path, SECRET)) == planted, "it is where we wrote it, and nowhere else"


def looked_at(page: Path) -> None:
    """In a real browser, at desktop and at phone width: nothing sticks out, every plot is drawn, no error is logged."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    playwright = pytest.importorskip("playwright.sync_api")
    if chromium is None:
        warnings.warn("no chromium: the report was not looked at in a browser", stacklevel=2)
        return
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for width in (1280, 390):
            tab = browser.new_page(viewport={"width": width, "height": 900})
            faults: list[str] = []
            tab.on("pageerror", lambda fault, seen=faults: seen.append(str(fault)))
            tab.goto(page.resolve().as_uri())
            tab.wait_for_selector(".js-plotly-plot svg.main-svg")
            plots, drawn = tab.locator(".js-plotly-plot").count(), tab.locator(".js-plotly-plot:has(svg.main-svg)").count()
            assert plots == drawn > 0
            assert tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), width
            assert not faults
        browser.close()


def test_schema_is_json(call) -> None:
    code, out, _ = call("schema")
    assert code == 0
    assert json.loads(out)["title"] == "Recipe"


def bad(tmp_path: Path, folder: Path, recipe: str) -> dict[str, tuple[list[str], list[str]]]:
    """name → (words, what the message must hold)."""
    text = Path(recipe).read_text()

    def changed(name: str, *pairs: tuple[str, str]) -> str:
        other = text
        for old, new in pairs:
            assert old in other
            other = other.replace(old, new)
        path = folder / f"bad-{name}.yaml"
        path.write_text(other)
        return str(path)

    (folder / "empty").mkdir(exist_ok=True)
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "twice.jsonl").write_text('{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}\n')
    (folder / "lost.jsonl").write_text('{"id": "1", "query": "q", "answers": ["a"], "relevant": ["nobody"]}\n')
    (folder / "half.jsonl").write_text('{"id": "1", "query": "who \\ud800?", "answers": ["a"]}\n')
    (folder / "qlatin.jsonl").write_bytes(b'{"id": "1", "query": "caf\xe9?", "answers": ["a"]}\n')
    good = '{"id": "1", "query": "who?", "answers": ["a"]}\n'
    (folder / "noanswer.jsonl").write_text(good + '{"id": "2", "query": "who?", "answers": [""]}\n')
    (folder / "longq.jsonl").write_text(json.dumps({"id": "1", "query": "w" * 1_000_000, "answers": ["a"]}) + "\n")
    (folder / "weightless").mkdir(exist_ok=True)
    (folder / "weightless" / "config.json").write_text((folder / "reader" / "config.json").read_text())
    docs = "documents: corpus.jsonl"
    return {
        "unknown key": (["build", changed("key", ("prompt:", "promt:"))], ["promt: unknown key; did you mean 'prompt'?"]),
        "wrong type": (["build", changed("type", ("seed: 1", "seed: one"))], ["seed", "'one'"]),
        "two faults": (
            ["build", changed("two", ("seed: 1", "seed: one"), ("k: 2", "k: -2"))], ["2 faults", "seed", "retriever.k"],
        ),
        "missing file": (["build", changed("missing", (docs, "documents: none.jsonl"))], ["no file or folder", "none.jsonl"]),
        "empty folder": (["build", changed("empty", (docs, "documents: empty"))], ["no document was found", "empty"]),
        "half a character": (["answer", recipe, "who \udce9?"], ["holds '\\udce9', half a character"]),
        "half a character in a file": (
            ["evaluate", changed("half", ("questions: dev.jsonl", "questions: half.jsonl"))],
            ["half.jsonl, line 1", "half a character"],
        ),
        "questions not utf-8": (
            ["evaluate", changed("qlatin", ("questions: dev.jsonl", "questions: qlatin.jsonl"))],
            ["qlatin.jsonl is not utf-8", "0xe9"],
        ),
        "empty answer": (
            ["evaluate", changed("noanswer", ("questions: dev.jsonl", "questions: noanswer.jsonl"))],
            ["noanswer.jsonl, line 2", "an answer is empty"],
        ),
        "question too long in a file": (
            ["evaluate", changed("longq", ("questions: dev.jsonl", "questions: longq.jsonl"))],
            ["longq.jsonl, line 1", "1,000,000 characters"],
        ),
        "a file for a folder": (["build", changed("file", ("path: kb", "path: corpus.jsonl"))], ["corpus.jsonl", "directory"]),
        "no such version": (["swap", recipe, "nothing"], ["no version 'nothing'", "finished are"]),
        "unreadable pdf": (["build", changed("pdf", (docs, "documents: broken.pdf"))], ["broken.pdf", "on_error: skip"]),
        "not utf-8": (["build", changed("latin", (docs, "documents: latin.txt"))], ["latin.txt", "0xe9", "knowledge.encoding"]),
        "duplicate ids": (["build", changed("twice", (docs, "documents: twice.jsonl"))], ["'a' occurs twice"]),
        "lost relevant": (
            ["evaluate", changed("lost", ("questions: dev.jsonl", "questions: lost.jsonl"))], ["lost.jsonl", "'nobody'"],
        ),
        "other encoder": (
            ["answer", changed("encoder", ("model: encoder/encoder", "model: other/encoder")), "who?"],
            ["was built by encoder", "raglan build"],
        ),
        "no weights": (
            ["answer", changed("weights", ("generator: {model: reader", "generator: {model: weightless")), "who?"],
            ["weightless", "cannot be loaded"],
        ),
        "k too large": (["answer", recipe, "who?", "-k", "31"], ["k is 31", "holds 30 passages"]),
        "empty question": (["answer", recipe, " "], ["the question is empty"]),
        "huge question": (["answer", recipe, "x" * 1_000_000], ["1,000,000 characters"]),
        "long question": (["answer", recipe, "who " * 200], ["200 tokens", "prompt of 96"]),
        "no recipe": (["train", str(folder / "none.yaml")], ["there is no recipe"]),
        "no base": (["retrieve", str(folder / "nothing"), "who?"], ["holds no knowledge base", "raglan build"]),
        "no index": (["retrieve", str(folder / "kb"), "who?", "--index", "colbert"], ["'colbert'", "dense, bm25, hybrid"]),
        "not evaluated": (["report", changed("report", ("name: small", "name: unmeasured"))], ["has not been evaluated"]),
    }  # fmt: skip


def test_bad_input_names_itself_and_its_cure(call, recipe: str, folder: Path, tmp_path: Path) -> None:
    import tiny

    assert call("build", recipe)[0] == 0
    if not (folder / "other").is_dir():
        tiny.sentence_encoder(folder / "other", seed=9)
    for name, (words, wanted) in bad(tmp_path, folder, recipe).items():
        code, out, err = call(*words)
        assert code == 2, f"{name}: exit code {code}\n{err}"
        assert "Traceback" not in err + out, name
        assert "\nhint: " in err, f"{name} says no cure: {err}"
        for part in wanted:
            assert part in " ".join(err.split()), f"{name}: {part!r} is not in {err}"


def test_progress_is_silent_where_nobody_looks(call, recipe: str) -> None:
    _, out, err = call("--quiet", "build", recipe)
    assert "━" not in err + out
    assert "%" not in err
