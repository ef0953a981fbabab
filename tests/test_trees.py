"""Rows that begin alike are scored as one line, with the numbers that they have apart."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MambaConfig, MambaForCausalLM

import tiny
from raglan.generator import HFGenerator, open_generator
from raglan.generator.trees import LEAST, Row, begins_alike, grown, read, room, tree_batch, tree_length
from raglan.recipe import GeneratorSettings, PromptSettings
from raglan.records import Passage
from raglan.scores import Pair, ScoreTable

PROMPT = PromptSettings(template="Background: {passages}\n\nQ: {question}\nA: ", max_tokens=300)


def opened(folder: Path, **settings: Any) -> HFGenerator:
    return open_generator(GeneratorSettings(model=str(folder), dtype="float32", **settings), PROMPT)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def generator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HFGenerator:
    """Relative positions and absolute ones."""
    return opened(getattr(tiny, request.param)(tmp_path_factory.mktemp(request.param)))


def some_rows(*, passages: int = 3, each: int = 5, seed: int = 0) -> list[Row]:
    """Rows of a few passages, a question each; the last two of a passage are choices of one question, one of them twice."""
    chance = random.Random(seed)

    def ids(least: int, most: int) -> list[int]:
        return [chance.randrange(4, 60) for _ in range(chance.randint(least, most))]

    rows = []
    for _ in range(passages):
        trunk = ids(LEAST, 40)
        rows += [{"input_ids": [*trunk, *ids(1, 9)], "labels": ids(1, 6)} for _ in range(each)]
        rows += [{"input_ids": rows[-1]["input_ids"], "labels": ids(1, 6)}, rows[-1]]
    chance.shuffle(rows)
    return rows


def apart(generator: HFGenerator, rows: Sequence[Row]) -> list[list[float]]:
    with torch.no_grad():
        return [generator.forward(generator.collate([row]))[0].tolist() for row in rows]


def as_trees(generator: HFGenerator, rows: Sequence[Row], most: int = 400) -> dict[int, list[float]]:
    trees, _ = grown(rows, most)
    places = [place for tree in trees for place in tree.places]
    with torch.no_grad():
        found = generator.forward(generator.tree_batch(trees, rows))
    return {at: values[: len(rows[at]["labels"])].tolist() for at, values in zip(places, found, strict=True)}


def test_a_tree_gives_what_rows_give_apart(generator: HFGenerator) -> None:
    rows = some_rows()
    wanted = apart(generator, rows)
    found = as_trees(generator, rows)
    assert len(found) == len(rows)
    for place, values in found.items():
        assert values == pytest.approx(wanted[place], abs=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_attentions_take_the_mask(attention: str, tmp_path: Path) -> None:
    generator = opened(tiny.llama(tmp_path))
    generator.model.config._attn_implementation = attention
    assert generator.shares_beginnings
    rows = some_rows(passages=1)
    for place, values in as_trees(generator, rows).items():
        assert values == pytest.approx(apart(generator, [rows[place]])[0], abs=1e-5)


def test_a_branch_sees_no_other(generator: HFGenerator) -> None:
    rows = some_rows(passages=1)
    trees, _ = grown(rows, 400)
    batch = generator.tree_batch(trees, rows)
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    last = trees[0].trunk + len(read(rows[trees[0].places[0]])) - trees[0].trunk
    other["input_ids"][0, trees[0].trunk : last] = 7  # all of the first branch
    with torch.no_grad():
        before, after = generator.forward(batch), generator.forward(other)
    assert not torch.allclose(before[0], after[0])
    assert torch.allclose(before[1:], after[1:], atol=1e-6)


rows_of_few_ids = st.lists(
    st.tuples(st.lists(st.integers(1, 2), min_size=1, max_size=60), st.lists(st.integers(1, 2), min_size=1, max_size=4)),
    max_size=12,
)


@given(rows_of_few_ids, st.integers(1, 120), st.integers(0, 40))
def test_trees_hold_every_row_once_share_what_they_say_and_fit(drawn: list, most: int, stem: int) -> None:
    rows = [{"input_ids": [1] * stem + ids, "labels": labels} for ids, labels in drawn]
    trees, alone = grown(rows, most)
    assert sorted([*alone, *(place for tree in trees for place in tree.places)]) == list(range(len(rows)))
    for tree in trees:
        members = [read(rows[place]) for place in tree.places]
        assert tree.trunk >= LEAST
        assert all(own[: tree.trunk] == members[0][: tree.trunk] for own in members)
        assert LEAST <= tree_length(tree, rows) <= most
        assert tree_length(tree, rows) < sum(map(len, members))


def test_two_rows_share_what_comes_before_they_differ() -> None:
    assert begins_alike([1, 2, 3], [1, 2, 4]) == 2
    assert begins_alike([1, 2], [1, 2, 4]) == 2
    assert begins_alike([1, 2, 3], [1, 2, 3], 1) == 1
    assert begins_alike([], [1]) == 0


def test_a_table_computes_a_passage_once_for_all_its_questions(generator: HFGenerator, tmp_path: Path) -> None:
    """The tokens that the model is given are counted; scores are those of the pairs one at a time."""
    text = " ".join(f"the tower was built by Odo in {1700 + n}" for n in range(4))
    passages = [Passage(str(n), f"{n} {text}") for n in range(3)]
    pairs = [Pair(f"who built tower {n}?", (passage,), f"Odo {n}") for n in range(6) for passage in passages]
    rows = [generator.row(generator.prompt.render(pair.query, pair.passages), pair.answer) for pair in pairs]
    given: list[int] = []
    handle = generator.model.get_input_embeddings().register_forward_hook(lambda _, ids, __: given.append(ids[0].numel()))
    try:
        assert generator.shares_beginnings
        given.clear()
        table = ScoreTable(tmp_path / "scores", generator)
        values = table.token_logprobs(table.complete(pairs))
    finally:
        handle.remove()
    trees, alone = grown(rows, room(generator.model))
    assert (len(trees), alone) == (3, [])
    assert sum(given) == len(trees) * max(tree_length(tree, rows) for tree in trees)
    assert 2 * sum(given) < sum(len(read(row)) for row in rows)
    for own, wanted in zip(values, apart(generator, rows), strict=True):
        assert own.tolist() == pytest.approx(wanted, abs=1e-5)


def test_models_that_cannot_are_left_to_plain_batches(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=256, hidden_size=16, num_hidden_layers=1, state_size=4, pad_token_id=0)
    MambaForCausalLM(config).save_pretrained(str(tmp_path / "mamba"))
    tiny.tokenizer().save_pretrained(str(tmp_path / "mamba"))
    assert not opened(tmp_path / "mamba").shares_beginnings
    assert not opened(tiny.t5(tmp_path / "t5")).shares_beginnings
    assert not opened(Path("embedded_causal")).shares_beginnings
    short = opened(tiny.llama(tmp_path / "llama"))
    short.model.config.sliding_window = 24
    assert room(short.model) == 24


def test_the_mask_says_who_sees_whom() -> None:
    rows = [{"input_ids": [*range(LEAST), 1], "labels": [2, 3]}, {"input_ids": [*range(LEAST), 4], "labels": [5]}]
    trees, _ = grown(rows, 100)
    batch = tree_batch(trees, rows, 0, attention="sdpa", dtype=torch.float32)
    assert batch["input_ids"][0, LEAST:].tolist() == [1, 2, 4]
    assert batch["position_ids"][0, LEAST:].tolist() == [LEAST, LEAST + 1, LEAST]
    assert batch["attention_mask"][0, 0, LEAST:, LEAST:].tolist() == [
        [True, False, False],
        [True, True, False],
        [False, False, True],
    ]
    assert batch["attention_mask"][0, 0, LEAST:, :LEAST].all()
    assert batch["at"].tolist() == [[LEAST, LEAST + 1], [LEAST + 2, 0]]
    eager = tree_batch(trees, rows, 0, attention="eager", dtype=torch.float32)["attention_mask"]
    assert torch.equal(eager == 0, batch["attention_mask"])
