"""RAG decodings on a model whose next-token probabilities are written down: the worked examples, decoded; and what is drawn
with a temperature, from a nucleus, or from the best few: of the mixture, not of each passage.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

import tiny
from raglan.decode import rag_sequence, rag_token
from raglan.generator import HFGenerator
from raglan.prompt import Rendered
from raglan.recipe import GeneratorSettings, PromptSettings, RagSequenceDecode, RagTokenDecode, SampleSettings
from raglan.records import Answer, Hit, Passage
from test_rag_decode import Given

WORDS = "ABCDEFGHIJ"  # their ids are 10, 11, …; a passage k is the token 30 + k, which is its whole prompt
NEVER = -1e4  # log of a probability that is 0 in float32
Table = Mapping[str, Mapping[str, float]]  # what is written so far → word → probability


class TableConfig(PreTrainedConfig):
    model_type = "table"


class TableModel(PreTrainedModel, GenerationMixin):
    """p(next | passage, what is written) read from a table: each beginning is a state, and the head's weights are log p.

    The cache's keys are the ids read so far, so that what is decoded behind a cached prompt knows its passage.
    """

    config_class = TableConfig

    def __init__(self, config: TableConfig, tables: Sequence[Table], words: int):
        super().__init__(config)
        states = [(k, before) for k, table in enumerate(tables) for before in table]
        self.states = {(30 + k, *map(number, before)): place for place, (k, before) in enumerate(states)}
        weights = torch.full((words, len(states)), NEVER)
        for place, (k, before) in enumerate(states):
            for word, p in tables[k][before].items():
                weights[number(word), place] = math.log(p)
        self.lm_head = nn.Linear(len(states), words, bias=False)
        self.lm_head.weight = nn.Parameter(weights)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """They are given."""

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, past_key_values: Any = None, **_: Any) -> CausalLMOutputWithPast:
        cache = DynamicCache() if past_key_values is None else past_key_values
        read = input_ids.float()[:, None, :, None]
        whole = cache.update(read, read, 0)[0][:, 0, :, 0].long()
        first = whole.shape[1] - input_ids.shape[1]
        hidden = torch.zeros(*input_ids.shape, self.lm_head.in_features)
        for row, ids in enumerate(whole.tolist()):
            for place in range(input_ids.shape[1]):
                state = self.states.get(tuple(token for token in ids[: first + place + 1] if token))
                if state is not None:  # behind its last word a table says nothing
                    hidden[row, place, state] = 1.0
        return CausalLMOutputWithPast(logits=self.lm_head(hidden), past_key_values=cache)


def number(word: str) -> int:
    return 10 + WORDS.index(word)


def written(ids: Sequence[int]) -> str:
    return "".join(WORDS[token - 10] for token in ids)


def asked(prior: Sequence[float], tables: Sequence[Table]) -> tuple[HFGenerator, Given]:
    words = tiny.tokenizer(begins=True, ends=False)
    config = TableConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2, vocab_size=len(words))
    model = TableModel(config, tables, len(words)).eval()
    generator = HFGenerator(model, words, GeneratorSettings(model="table", dtype="float32"), PromptSettings())
    hits = [Hit(Passage(str(k), f"passage {k}"), k, 0.0, k + 1) for k in range(len(tables))]
    rows = [[Rendered((30 + k,), f"passage {k}") for k in range(len(tables))]]
    return generator, Given(["?"], [hits], [torch.tensor(prior, dtype=torch.float64).log()], rows)


def marginals(answer: Answer) -> dict[str, float]:
    """What is possible of an answer's candidates, and its probability."""
    return {written(c.ids): math.exp(c.logprob) for c in answer.candidates if c.logprob > NEVER / 2}


# I: thorough and fast, and what several passages find


@pytest.mark.parametrize(
    ("mode", "best", "logprob", "posterior", "expected"),
    [
        ("thorough", "C", -1.049822, (0.428571, 0.571429), {"C": 0.35, "A": 0.27, "B": 0.26, "D": 0.12}),
        ("fast", "A", -1.309333, (1.0, 0.0), {"A": 0.27, "C": 0.20, "B": 0.18, "D": 0.12}),
    ],
)
def test_thorough_and_fast_decoded(mode: str, best: str, logprob: float, posterior: tuple, expected: dict) -> None:
    tables = [{"": {"A": 0.45, "B": 0.30, "C": 0.25}}, {"": {"C": 0.50, "D": 0.30, "B": 0.20}}]
    settings = RagSequenceDecode(kind="rag_sequence", mode=mode, beams=2, max_new_tokens=1)
    answer = rag_sequence(*asked([0.6, 0.4], tables), settings)[0]
    assert (written(answer.ids), answer.logprob) == (best, pytest.approx(logprob, abs=1e-6))
    assert marginals(answer) == pytest.approx(expected, abs=1e-6)
    assert answer.posterior == pytest.approx(posterior, abs=1e-6)


@pytest.mark.parametrize("mode", ["thorough", "fast"])
def test_what_three_passages_find_is_added(mode: str) -> None:
    rest = dict.fromkeys("FGHIJ", 0.06)
    tables = [{"": {"A": 0.6, "B": 0.1, **rest}}, {"": {"B": 0.5, "C": 0.5}}, {"": {"B": 0.5, "D": 0.5}}]
    settings = RagSequenceDecode(kind="rag_sequence", mode=mode, beams=2, max_new_tokens=1)
    answer = rag_sequence(*asked([0.4, 0.3, 0.3], tables), settings)[0]
    assert (written(answer.ids), answer.logprob) == ("B", pytest.approx(-1.078810, abs=1e-6))
    assert marginals(answer) == pytest.approx({"B": 0.34, "A": 0.24, "C": 0.15, "D": 0.15}, abs=1e-6)
    assert answer.posterior == pytest.approx((0.04 / 0.34, 0.15 / 0.34, 0.15 / 0.34), abs=1e-6)


# J: token and sequence, two words

PAIRS: list[Table] = [
    {"": {"A": 0.7, "B": 0.3}, "A": {"A": 0.1, "B": 0.9}, "B": {"A": 0.5, "B": 0.5}},
    {"": {"A": 0.6, "B": 0.4}, "A": {"A": 0.95, "B": 0.05}, "B": {"A": 0.05, "B": 0.95}},
]


@pytest.mark.parametrize("mode", ["thorough", "fast"])
def test_rag_sequence_decodes_the_pair_that_is_likeliest_as_a_whole(mode: str) -> None:
    settings = RagSequenceDecode(kind="rag_sequence", mode=mode, beams=4, max_new_tokens=2)
    answer = rag_sequence(*asked([0.5, 0.5], PAIRS), settings)[0]
    assert (written(answer.ids), answer.logprob) == ("AB", pytest.approx(-1.108663, abs=1e-6))
    found = marginals(answer)
    assert found == pytest.approx({"AA": 0.32, "AB": 0.33, "BA": 0.085, "BB": 0.265}, abs=1e-6)
    assert sum(found.values()) == pytest.approx(1, abs=1e-6)


def test_rag_token_decodes_another_pair() -> None:
    settings = RagTokenDecode(kind="rag_token", beams=4, returns=4, max_new_tokens=2)
    answer = rag_token(*asked([0.5, 0.5], PAIRS), settings)[0]
    assert (written(answer.ids), answer.logprob) == ("AA", pytest.approx(-1.075140, abs=1e-6))
    found = marginals(answer)
    assert found == pytest.approx({"AA": 0.34125, "AB": 0.30875, "BA": 0.09625, "BB": 0.25375}, abs=1e-6)
    assert sum(found.values()) == pytest.approx(1, abs=1e-6)
    greedy = rag_token(*asked([0.5, 0.5], PAIRS), RagTokenDecode(kind="rag_token", max_new_tokens=2))[0]
    assert (written(greedy.ids), greedy.logprob) == ("AA", pytest.approx(-1.075140, abs=1e-6))


# Draws: temperature, nucleus and the best few

PEAKED: list[Table] = [{"": {"A": 0.9, "B": 0.1}}, {"": {"A": 0.05, "B": 0.2, "C": 0.4, "D": 0.35}}]
PRIOR = [0.4, 0.6]


def transformed(p: Mapping[str, float], sample: SampleSettings) -> dict[str, float]:
    """A distribution with a temperature, then its best few, then the fewest words that hold top_p of it; by loops."""
    held = {word: value ** (1 / sample.temperature) for word, value in p.items()}
    order = sorted(held, key=held.__getitem__, reverse=True)[: sample.top_k or None]
    total, kept = sum(held[word] for word in order), []
    for word in order:
        if sum(held[w] for w in kept) / total < sample.top_p:
            kept.append(word)
    return {word: held[word] / sum(held[w] for w in kept) for word in kept}


def mixed(tables: Sequence[Mapping[str, float]]) -> dict[str, float]:
    words = sorted(set().union(*tables))
    return {word: sum(p * table.get(word, 0.0) for p, table in zip(PRIOR, tables, strict=True)) for word in words}


def chi_square(counts: Counter[str], p: Mapping[str, float], draws: int) -> float:
    """χ² over what may come, infinite where something came that may not."""
    if set(counts) - set(p):
        return math.inf
    return sum((counts[word] - draws * value) ** 2 / (draws * value) for word, value in p.items())


@pytest.mark.parametrize(
    "sample",
    [
        SampleSettings(temperature=0.4), SampleSettings(temperature=1.8), SampleSettings(top_p=0.6),
        SampleSettings(temperature=1.5, top_p=0.7), SampleSettings(top_k=2),
        SampleSettings(temperature=0.7, top_k=3, top_p=0.9),
    ],
    ids=str,
)  # fmt: skip
def test_draws_follow_the_transformed_mixture_and_not_transformed_passages(sample: SampleSettings) -> None:
    draws = 2000
    torch.manual_seed(0)
    settings = RagTokenDecode(kind="rag_token", max_new_tokens=1, sample=sample, returns=draws)
    answer = rag_token(*asked(PRIOR, PEAKED), settings)[0]
    counts = Counter(written(candidate.ids) for candidate in answer.candidates)
    assert counts.total() == draws
    q = transformed(mixed([table[""] for table in PEAKED]), sample)
    apart = mixed([transformed(table[""], sample) for table in PEAKED])
    freedom = len(q) - 1
    assert freedom >= 1
    assert chi_square(counts, q, draws) < freedom + 5 * math.sqrt(2 * freedom)
    assert chi_square(counts, apart, draws) > 2 * (freedom + 5 * math.sqrt(2 * freedom))
    whole = mixed([table[""] for table in PEAKED])
    assert marginals(answer) == pytest.approx({word: whole[word] for word in counts}, abs=1e-6)  # scored as unaltered
