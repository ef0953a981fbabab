"""Which tokens are scored, and that nothing else is: start and forced tokens, padding on either side, and who else is in the
batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raglan.generator import HFGenerator
from raglan.knowledge import build_knowledge
from raglan.likelihood import marginal_logprob
from raglan.objective import MarginalRow
from raglan.rag import RAG
from raglan.recipe import load_recipe
from test_generator import MODELS, PASSAGES, made, plain_logprobs
from test_marginal import objective
from tiny import small_recipe

EOS, BOS = 2, 1
ANSWERS = ["odo marrack", "1790", "a", "by the water, in 1655"]
QUERIES = ["who built the tower?", "when?", "what was founded by whom, and in which year was it?", "where?"]


@pytest.fixture(scope="module", params=MODELS)
def generator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HFGenerator:
    return made(request.param, tmp_path_factory.mktemp("models"))


def rows(generator: HFGenerator) -> list[dict[str, list[int]]]:
    prompts = [generator.prompt.render(query, PASSAGES[:count]) for query, count in zip(QUERIES, (2, 0, 1, 2), strict=True)]
    return [generator.row(prompt, answer) for prompt, answer in zip(prompts, ANSWERS, strict=True)]


def forward(generator: HFGenerator, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return generator.forward(batch)


def on_the_left(rows: list[list[int]], pad: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[pad] * (longest - len(row)) + row for row in rows])


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_start_and_forced_tokens_are_not_scored(kind: str, tmp_path: Path) -> None:
    """The model's own log p of prefix and answer together is ours plus that of the forced tokens, which are given."""
    generator = made(kind, tmp_path)
    prompt = generator.prompt.render(QUERIES[0], PASSAGES[:1])
    ids = generator.answer_ids(ANSWERS[0])
    whole = [*generator.prefix, *ids]
    with torch.no_grad():
        logits = generator.model(input_ids=torch.tensor([prompt.ids]), decoder_input_ids=torch.tensor([whole[:-1]])).logits
    each = logits[0].log_softmax(-1).gather(-1, torch.tensor(whole[1:])[:, None])[:, 0]
    ours = generator.token_logprobs([prompt], [ANSWERS[0]])[0]
    forced = len(generator.prefix) - 1
    assert forced == {"bart": 1, "t5": 0}[kind]
    assert ours == pytest.approx(each[forced:].numpy(), abs=1e-5)
    assert float(each.sum()) == pytest.approx(float(ours.sum()) + float(each[:forced].sum()), abs=1e-4)
    assert len(ours) == len(ids)
    assert ids[-1] == EOS  # the end is an answer's own token


@pytest.mark.parametrize("side", ["prompt", "answer", "both"])
def test_padding_on_the_left_is_padding_on_the_right(side: str, generator: HFGenerator) -> None:
    given = rows(generator)
    right = generator.collate(given)
    left = dict(right)
    if side != "answer":
        left["input_ids"] = on_the_left([row["input_ids"] for row in given], generator.pad)
        left["attention_mask"] = on_the_left([[1] * len(row["input_ids"]) for row in given], 0)
    if side != "prompt":
        left["labels"] = on_the_left([row["labels"] for row in given], -100)
    before = {name: value.clone() for name, value in left.items()}
    ours, theirs = forward(generator, right), forward(generator, left)
    for place, row in enumerate(given):
        own = theirs[place][left["labels"][place] >= 0]
        assert len(own) == len(row["labels"])
        assert torch.allclose(own, ours[place, : len(own)], atol=1e-5)
    assert (theirs[left["labels"] < 0] == 0).all()
    assert all(torch.equal(before[name], left[name]) for name in before)


def test_more_padding_than_needed_changes_nothing(generator: HFGenerator) -> None:
    batch = generator.collate(rows(generator))
    wide = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 5), value=generator.pad),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 5)),
        "labels": torch.nn.functional.pad(batch["labels"], (0, 3), value=-100),
    }
    assert torch.allclose(forward(generator, wide)[:, :-3], forward(generator, batch), atol=1e-5)
    assert (forward(generator, wide)[:, -3:] == 0).all()


def test_an_answers_score_does_not_depend_on_its_batch_mates(generator: HFGenerator) -> None:
    """Answers whose first token is the start token, and answers whose first is not, alone and in all mixtures."""
    given = rows(generator)
    if generator.reader is None:
        given += [{**row, "labels": [BOS, *row["labels"]]} for row in given]
    alone = [forward(generator, generator.collate([row]))[0] for row in given]
    for places in (range(len(given)), range(0, len(given), 2), [len(given) - 1, 0], [1, len(given) - 2, 2]):
        together = forward(generator, generator.collate([given[place] for place in places]))
        for place, found in zip(places, together, strict=True):
            assert torch.allclose(found[: len(alone[place])], alone[place], atol=1e-5)
    if generator.reader is None:
        assert all((row != 0).all() for row in alone)  # the start token, too, is scored where it is the answer's own


@pytest.mark.parametrize("over", ["sequence", "token"])
def test_a_candidates_marginal_does_not_depend_on_its_batch_mates(over: str, tmp_path: Path) -> None:
    generator = made("bart", tmp_path)
    prompts = [list(generator.prompt.render(QUERIES[0], [passage]).ids) for passage in PASSAGES[:2]]
    prior = torch.tensor([[0.3, -0.4]]).log_softmax(-1)
    answers = [[20, 31, EOS], [BOS, 20, 31, EOS], [BOS, EOS], [50, EOS]]

    def marginals(labels: list[list[int]]) -> list[float]:
        batch = generator.collate([{"input_ids": ids, "labels": own} for own in labels for ids in prompts])
        each = forward(generator, batch).unflatten(0, (len(labels), 2))
        mask = (batch["labels"] >= 0).unflatten(0, (len(labels), 2))[:, 0]
        return marginal_logprob(prior.expand(len(labels), -1), each, mask, over=over).tolist()

    alone = [marginals([own])[0] for own in answers]
    assert marginals(answers) == pytest.approx(alone, abs=1e-5)
    assert marginals([answers[3], answers[1]]) == pytest.approx([alone[3], alone[1]], abs=1e-5)


# The whole objective: one batch of eight, or eight of one.


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> RAG:
    path = tmp_path_factory.mktemp("scored")
    recipe = load_recipe(small_recipe(path), ["retriever.index=dense", "knowledge.encoder.dtype=float32"])
    build_knowledge(recipe.knowledge)
    return RAG.open(recipe)


@pytest.mark.parametrize("over", ["sequence", "token"])
@pytest.mark.parametrize("kind", MODELS)
def test_eight_together_are_eight_alone(kind: str, over: str, system: RAG, tmp_path: Path) -> None:
    """Both models compute in float64: random ones like all passages nearly alike, and what the query encoder learns from is
    posterior minus prior, a small difference of large numbers, of which float32 leaves two digits.
    """
    generator = made(kind, tmp_path)
    generator.model.double()
    system.retriever.encoder.split().double()
    questions = [MarginalRow(query, answer) for query, answer in zip(QUERIES * 2, ANSWERS + ANSWERS[::-1], strict=True)]
    found: list[tuple[float, dict[str, list[Any]]]] = []
    for size in (8, 1):
        aim = objective(system, generator=generator, over=over, reduction="sum")
        aim.module.eval()
        aim.module.zero_grad()
        losses = [aim.loss(aim.collate(questions[start : start + size]))[0] for start in range(0, 8, size)]
        sum(losses).backward()
        gradients = {name: [p.grad.clone() for p in part] for name, part in aim.parameters().items()}
        found.append((sum(loss.item() for loss in losses), gradients))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for part, ones in found[0][1].items():
        others = found[1][1][part]
        largest = max(float(other.norm()) for other in others)  # a bias that cancels has nothing but rounding
        for one, other in zip(ones, others, strict=True):
            assert float((one - other).norm()) <= 1e-4 * float(other.norm()) + 1e-5 * largest, part


@pytest.mark.parametrize("kind", ["bart", "t5", "llama"])
def test_scores_are_those_of_the_models_own_full_logits(kind: str, tmp_path: Path) -> None:
    """Left padding reaches the model as no padding: the twin has one row at a time, and none."""
    generator = made(kind, tmp_path)
    prompts = [generator.prompt.render(query, PASSAGES[:1]) for query in QUERIES]
    given = [generator.row(prompt, answer) for prompt, answer in zip(prompts, ANSWERS, strict=True)]
    batch = {
        "input_ids": on_the_left([row["input_ids"] for row in given], generator.pad),
        "attention_mask": on_the_left([[1] * len(row["input_ids"]) for row in given], 0),
        "labels": on_the_left([row["labels"] for row in given], -100),
    }
    found = forward(generator, batch)
    for place, (prompt, answer) in enumerate(zip(prompts, ANSWERS, strict=True)):
        own = found[place][batch["labels"][place] >= 0].tolist()
        assert own == pytest.approx(plain_logprobs(generator, prompt, answer), abs=2e-5)
