"""Scores from a server: those of the model run here, in both protocols; faults are tried again, refusals are told."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import tiny
from raglan.errors import CheckpointError, GeneratorError
from raglan.generator import EndpointScorer, HFGenerator, open_generator
from raglan.recipe import GeneratorSettings, PromptSettings, ScorerSettings
from raglan.records import Passage
from raglan.scores import Pair, ScoreTable
from served import KEY, Served, serving

PROMPT = PromptSettings(max_tokens=300)
PASSAGES = [
    Passage("1", "The tower was built by Odo Marrack, a miller, in 1831.", "Tower"),
    Passage("2", "A lighthouse of the year 1790.", "Light"),
]
PAIRS = [
    Pair(query, (passage,), answer)
    for query, answer in (("who built the tower?", "Odo Marrack"), ("when?", "1790"), ("where is 北京大學?", "大學"))
    for passage in PASSAGES
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def local(folder: Path) -> HFGenerator:
    return open_generator(GeneratorSettings(model=str(folder), dtype="float32"), PROMPT)


@pytest.fixture
def served(local: HFGenerator) -> Served:
    return Served(local.model, local.tokenizer)


@pytest.fixture
def address(served: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("TINY_KEY", KEY)
    with serving(served) as address:
        yield address


def scorer(address: str, folder: Path, **settings: Any) -> EndpointScorer:
    shared: dict[str, Any] = {"model": "tiny", "tokenizer": str(folder), "api_key_env": "TINY_KEY", "retries": 3}
    return EndpointScorer(ScorerSettings(endpoint=address, **{**shared, **settings}), PROMPT)


@pytest.mark.parametrize("way", ["prompt_logprobs", "echo"])
def test_scores_are_the_local_models(
    way: str, served: Served, address: str, folder: Path, local: HFGenerator, tmp_path: Path
) -> None:
    served.ways = {way}
    tables = [ScoreTable(tmp_path / name, who) for name, who in (("here", local), ("there", scorer(address, folder)))]
    here, there = (table.token_logprobs(table.complete(PAIRS)) for table in tables)
    for ours, theirs in zip(here, there, strict=True):
        assert theirs.tolist() == pytest.approx(ours.tolist(), abs=1e-4)
    assert all(("prompt_logprobs" in request) == (way == "prompt_logprobs") for request in served.asked[2:])
    assert all(request["prompt"].count(1) == 1 for request in served.asked)  # one BOS
    assert all(request["prompt"][-1] == local.eos for request in served.asked[2:])
    asked = len(served.asked)
    table = ScoreTable(tmp_path / "there", scorer(address, folder, concurrency=2))  # asked once, whatever the speed
    table.complete(PAIRS)
    assert (len(served.asked), table.calls) == (asked, 0)


def test_a_served_folder_is_named_by_its_weights(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_KEY", KEY)
    same, other = (tiny.llama(tmp_path / name, seed=seed) for name, seed in (("same", 0), ("other", 1)))
    own, twin, changed = (
        scorer("http://127.0.0.1:9/v1", folder, model=str(model)).fingerprint for model in (folder, same, other)
    )
    assert own == twin != changed


CHAT = (
    "<s>{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}[turn]{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize("kind", ["appends an end", "chat"])
def test_answers_end_and_begin_as_the_local_models(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer that puts its end behind every text, and a chat model whose turns end in a token of their own."""
    words = tiny.tokenizer(begins=True, ends=kind != "chat")
    if kind == "chat":
        words.add_special_tokens({"additional_special_tokens": ["[turn]"]})
        words.chat_template = CHAT
    plain = open_generator(GeneratorSettings(model=str(tiny.llama(tmp_path / "plain")), dtype="float32"), PROMPT)
    plain.model.resize_token_embeddings(len(words))
    folder = tiny._saved(plain.model, words, tmp_path / "model")
    local = open_generator(GeneratorSettings(model=str(folder), dtype="float32"), PROMPT)
    monkeypatch.setenv("TINY_KEY", KEY)
    served = Served(local.model, local.tokenizer)
    with serving(served) as address:
        there = scorer(address, folder)
        assert there.eos == local.eos == (words.convert_tokens_to_ids("[turn]") if kind == "chat" else 2)
        for pair in PAIRS[:3]:
            prompts = [who.prompt.render(pair.query, pair.passages) for who in (local, there)]
            assert prompts[0].ids == prompts[1].ids
            assert prompts[1].ids[-1] != 2
            ours, theirs = (who.token_logprobs([p], [pair.answer]) for who, p in zip((local, there), prompts, strict=True))
            assert theirs[0].tolist() == pytest.approx(ours[0].tolist(), abs=1e-4)
    assert all(request["prompt"].count(1) == 1 for request in served.asked)


def test_busy_and_failing_servers_are_asked_again(served: Served, address: str, folder: Path, local: HFGenerator) -> None:
    asked = scorer(address, folder)
    prompts = [local.prompt.render(PAIRS[0].query, PAIRS[0].passages)]
    soon = {"retry-after-ms": "10"}
    served.faults = [(429, soon), (500, soon), (503, soon)]
    (values,) = asked.token_logprobs(prompts, [PAIRS[0].answer])
    assert values.tolist() == pytest.approx(local.token_logprobs(prompts, [PAIRS[0].answer])[0].tolist(), abs=1e-4)
    assert served.refused == 3
    served.faults = [(429, soon)] * 9
    with pytest.raises(GeneratorError, match="still fails after 3 more tries"):
        asked.token_logprobs(prompts, [PAIRS[0].answer])
    assert len(served.faults) == 5  # one request, tried four times


def test_a_wrong_key_is_refused_and_never_told(
    served: Served, address: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("TINY_KEY", "sk-not-this-one")
    with pytest.raises(GeneratorError, match="refuses the key") as caught:
        scorer(address, folder).token_logprobs([scorer(address, folder).prompt.render("q", [])], ["a"])
    assert "check the key in TINY_KEY" in str(caught.value)
    assert "sk-not" not in str(caught.value) + caplog.text
    assert not served.asked
    monkeypatch.delenv("TINY_KEY")
    with pytest.raises(GeneratorError, match="TINY_KEY holds no key"):
        scorer(address, folder)


def test_servers_that_cannot_score_are_refused(served: Served, address: str, folder: Path) -> None:
    def ask(**settings: Any) -> None:
        asked = scorer(address, folder, **settings)
        asked.token_logprobs([asked.prompt.render("q", [])], ["a"])

    served.ways = set()
    with pytest.raises(GeneratorError, match="gives no log-probabilities of a prompt's tokens") as caught:
        ask()
    assert "vllm serve" in str(caught.value)
    served.ways, served.shift = {"echo"}, 7
    with pytest.raises(GeneratorError, match="reads the tokens of '1831, by a miller' as") as caught:
        ask()
    assert "scorer.tokenizer" in str(caught.value)
    with pytest.raises(GeneratorError, match="no such model or path"):
        ask(model="huge")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        ask(tokenizer=str(folder / "none"))


def test_a_server_that_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_KEY", KEY)
    asked = scorer("http://127.0.0.1:9/v1", folder, retries=0)
    with pytest.raises(GeneratorError, match="still fails after 0 more tries"):
        asked.token_logprobs([asked.prompt.render("q", [])], ["a"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "m", "retries": 2}, "retries belong to an endpoint"),
        ({"model": "m", "endpoint": "http://x/v1", "dtype": "float32"}, "dtype belong to a model run here"),
        ({"model": "m", "endpoint": "http://me:secret@x/v1"}, "pattern"),
        ({"endpoint": "http://x/v1"}, "model"),
    ],
)
def test_settings_that_do_not_belong_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ScorerSettings(**settings)
