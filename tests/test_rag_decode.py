"""RAG decodings against brute force and against transformers' own RAG models, on the same random weights."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DPRConfig, DPRQuestionEncoder, RagConfig, RagSequenceForGeneration, RagTokenForGeneration

from raglan.decode import Asked, rag_sequence, rag_token
from raglan.decode.rag_sequence import _answer as ranked
from raglan.generator import HFGenerator, encode_prompts
from raglan.likelihood import chunked_token_logprobs, marginal_logprob, sequence_logprob
from raglan.prompt import Rendered
from raglan.recipe import RagSequenceDecode, RagTokenDecode, SampleSettings
from raglan.records import Hit, Passage
from test_generator import made, plain_logprobs

TEXTS = [
    "The tower was built by Odo Marrack, a miller, in 1831.",
    "A lighthouse of the year 1790.",
    "Who founded the old mill? The founder was Ada, in 1655, by the water.",
    "b",
]
QUERIES = ["who built the tower?", "when?", "what was founded by whom?"]
HITS = [[0, 1, 2], [2, 3], [1]]


def sharpened(generator: HFGenerator, factor: float = 12.0) -> HFGenerator:
    """Random weights predict nearly nothing; scaled up they have opinions that differ from prompt to prompt."""
    head = generator.model.get_output_embeddings() if generator.reader is None else None
    if head is not None:
        torch.manual_seed(5)
        head.weight = torch.nn.Parameter(torch.randn_like(head.weight) * factor / head.weight.shape[1] ** 0.5)
    return generator


def lively(generator: HFGenerator, factor: float = 6.0) -> HFGenerator:
    """Sharpened, and with wider layers' weights, so that what is read says much about what is written."""
    with torch.no_grad():
        for name, parameter in generator.model.named_parameters():
            if parameter.dim() > 1 and (".layers." in name or ".block." in name):
                parameter.mul_(10 if ".layers." in name else 2)  # T5's are drawn wider
    return sharpened(generator, factor)


@pytest.fixture(scope="module", params=["bart", "t5", "llama", "reader"])
def generator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HFGenerator:
    return sharpened(made(request.param, tmp_path_factory.mktemp("models")))


def asked(queries: list[str] = QUERIES, hits: list[list[int]] = HITS) -> Asked:
    found = [tuple(Hit(Passage(str(row), TEXTS[row]), row, 0.0, rank) for rank, row in enumerate(rows, 1)) for rows in hits]
    torch.manual_seed(1)
    return Asked(queries, found, [torch.randn(len(rows)).log_softmax(0) for rows in hits])


def scored(generator: HFGenerator, prompt: Rendered, ids: tuple[int, ...]) -> float:
    """Σ log p of an answer given as ids, by full logits of one row."""
    return sum(step_logprobs(generator, prompt, ids))


def step_logprobs(generator: HFGenerator, prompt: Rendered, ids: tuple[int, ...]) -> list[float]:
    rows = [next_logprobs(generator, prompt, ids[:t]) for t in range(len(ids))]
    return [float(row[token]) for row, token in zip(rows, ids, strict=True)]


@torch.no_grad()
def next_logprobs(generator: HFGenerator, prompt: Rendered, before: tuple[int, ...]) -> Tensor:
    ids = torch.tensor([list(prompt.ids)])
    if generator.is_seq2seq:
        decoder = torch.tensor([[*generator.prefix, *before]])
        logits = generator.model(input_ids=ids, decoder_input_ids=decoder).logits
    else:
        logits = generator.model(input_ids=torch.cat([ids, torch.tensor([list(before)], dtype=torch.long)], 1)).logits
    return logits[0, -1].double().log_softmax(-1)


def test_scores_behind_an_encoding_are_those_of_full_passes(generator: HFGenerator) -> None:
    prompts = [prompt for row in asked().prompts(generator.prompt) for prompt in row]
    encoded = encode_prompts(generator, prompts)
    answers = ["Odo", "1831", "a", "the old mill"]
    pairs = list(itertools.product(range(len(prompts)), answers))
    ids = [tuple(generator.row(prompts[row], answer)["labels"]) for row, answer in pairs]
    for _ in range(2):  # the second time, as the first: scoring leaves the encoding as it was
        scores = encoded.score([row for row, _ in pairs], ids)
        for (row, answer), values in zip(pairs, scores.tolist(), strict=True):
            expected = plain_logprobs(generator, prompts[row], answer)
            assert values[: len(expected)] == pytest.approx(expected, abs=2e-4)
            assert not any(values[len(expected) :])


@pytest.mark.parametrize("beams", [1, 3])
def test_writing_behind_an_encoding_is_generate_prompt_by_prompt(generator: HFGenerator, beams: int) -> None:
    prompts = [prompt for row in asked().prompts(generator.prompt) for prompt in row]
    written = encode_prompts(generator, prompts).write(max_new_tokens=5, beams=beams)
    for prompt, found in zip(prompts, written, strict=True):
        alone = generator.generate([prompt], max_new_tokens=5, beams=beams)[0]
        assert found[0].ids == alone.ids
        for answer in found:
            assert answer.logprob == pytest.approx(scored(generator, prompt, answer.ids), abs=1e-3)
            assert answer.finished == (answer.ids[-1] in generator.ends)


@pytest.mark.parametrize("mode", ["thorough", "fast"])
@pytest.mark.parametrize("beams", [1, 3])
def test_rag_sequence_equals_its_twin(generator: HFGenerator, mode: str, beams: int) -> None:
    question = asked()
    answers = rag_sequence(
        generator, question, RagSequenceDecode(kind="rag_sequence", mode=mode, beams=beams, max_new_tokens=4)
    )
    for place, prompts in enumerate(question.prompts(generator.prompt)):
        own = [
            {found.ids for found in encode_prompts(generator, [prompt]).write(max_new_tokens=4, beams=beams)[0]}
            for prompt in prompts
        ]
        prior = question.doc_logprobs[place].double().exp().tolist()
        marginals = {}
        for ids in set().union(*own):
            terms = [
                prior[k] * math.exp(scored(generator, prompt, ids))
                for k, prompt in enumerate(prompts)
                if mode == "thorough" or ids in own[k]
            ]
            marginals[ids] = math.log(sum(terms))
        answer = answers[place]
        assert {c.ids for c in answer.candidates} == set(marginals)
        for candidate in answer.candidates:
            assert candidate.logprob == pytest.approx(marginals[candidate.ids], abs=1e-3)
        assert answer.logprob == pytest.approx(max(marginals.values()), abs=1e-3)
        assert sum(answer.prior) == pytest.approx(1, abs=1e-6)
        assert sum(answer.posterior) == pytest.approx(1, abs=1e-6)


def test_rag_token_greedy_equals_its_twin(generator: HFGenerator) -> None:
    question = asked()
    answers = rag_token(generator, question, RagTokenDecode(kind="rag_token", max_new_tokens=5))
    for place, prompts in enumerate(question.prompts(generator.prompt)):
        prior = question.doc_logprobs[place].double()
        ids: tuple[int, ...] = ()
        total = 0.0
        while len(ids) < 5 and (not ids or ids[-1] not in generator.ends):
            each = torch.stack([next_logprobs(generator, prompt, ids) for prompt in prompts])
            mixed = (each + prior[:, None]).logsumexp(0)
            ids = (*ids, int(mixed.argmax()))
            total += float(mixed.max())
        assert answers[place].ids == ids
        assert answers[place].logprob == pytest.approx(total, abs=1e-3)
        table = torch.tensor(answers[place].token_posterior)
        assert table.shape == (len(ids), len(prompts))
        assert torch.allclose(table.sum(1), torch.ones(len(ids)), atol=1e-5)
        assert sum(answers[place].posterior) == pytest.approx(1, abs=1e-5)


def all_answers(generator: HFGenerator, prompts: list[Rendered]) -> dict[tuple[int, ...], Tensor]:
    """Every answer of at most two tokens → log p of its steps under each prompt, (K,T)."""
    first = torch.stack([next_logprobs(generator, prompt, ()) for prompt in prompts])
    found: dict[tuple[int, ...], Tensor] = {}
    second = torch.stack([after_each_word(generator, prompt, first.shape[1]) for prompt in prompts])  # (K,V,V)
    for v in range(first.shape[1]):
        if v in generator.ends:
            found[(v,)] = first[:, v : v + 1]
            continue
        for w in range(first.shape[1]):
            found[(v, w)] = torch.stack([first[:, v], second[:, v, w]], dim=1)
    return found


def summed(table: dict[tuple[int, ...], Tensor], prior: Tensor) -> tuple[dict[tuple[int, ...], float], ...]:
    """Every answer's log-probability by RAG-Sequence and by RAG-Token; a second token that is not there counts 0."""
    steps = torch.stack([torch.nn.functional.pad(own, (0, 2 - own.shape[1])) for own in table.values()])  # (answers,K,2)
    by_sequence = (prior + steps.sum(2)).logsumexp(1)
    by_token = (prior[:, None] + steps).logsumexp(1).sum(1)
    return tuple(dict(zip(table, values.tolist(), strict=True)) for values in (by_sequence, by_token))


@torch.no_grad()
def after_each_word(generator: HFGenerator, prompt: Rendered, words: int) -> Tensor:
    """log p of the second token after each first one, (V,V)."""
    ids, before = torch.tensor([list(prompt.ids)] * words), torch.arange(words)[:, None]
    if not generator.is_seq2seq:
        logits = generator.model(input_ids=torch.cat([ids, before], 1)).logits
    else:
        decoder = torch.cat([torch.tensor([generator.prefix] * words), before], 1)
        logits = generator.model(input_ids=ids, decoder_input_ids=decoder).logits
    return logits[:, -1].double().log_softmax(-1)


@pytest.mark.parametrize("kind", ["bart", "llama"])
def test_beams_that_cover_everything_find_the_true_best(kind: str, tmp_path: Path) -> None:
    generator = sharpened(made(kind, tmp_path), 6.0)
    question = asked(QUERIES[:1], [[0, 2]])
    prompts, prior = question.prompts(generator.prompt)[0], question.doc_logprobs[0].double()
    table = all_answers(generator, prompts)
    words = len(next_logprobs(generator, prompts[0], ()))
    by_sequence, by_token = summed(table, prior)
    assert sum(map(math.exp, by_sequence.values())) == pytest.approx(1, abs=1e-6)
    assert sum(map(math.exp, by_token.values())) == pytest.approx(1, abs=1e-6)
    settings = RagSequenceDecode(kind="rag_sequence", beams=words, max_new_tokens=2)
    found = rag_sequence(generator, question, settings)[0]
    assert found.ids == max(by_sequence, key=by_sequence.__getitem__)
    assert found.logprob == pytest.approx(max(by_sequence.values()), abs=1e-4)
    token = rag_token(generator, question, RagTokenDecode(kind="rag_token", beams=words, max_new_tokens=2, length_penalty=0.0))[
        0
    ]
    assert token.ids == max(by_token, key=by_token.__getitem__)
    assert token.logprob == pytest.approx(max(by_token.values()), abs=1e-4)


def test_batched_is_one_by_one_and_order_of_passages_is_irrelevant(generator: HFGenerator) -> None:
    question = asked()
    for decode, settings in (
        (rag_sequence, RagSequenceDecode(kind="rag_sequence", beams=2, max_new_tokens=4)),
        (rag_token, RagTokenDecode(kind="rag_token", beams=2, max_new_tokens=4)),
    ):
        together = decode(generator, question, settings)
        for place in range(3):
            order = list(reversed(range(len(HITS[place]))))
            alone = Asked([QUERIES[place]], [[question.hits[place][k] for k in order]], [question.doc_logprobs[place][order]])
            found = decode(generator, alone, settings)[0]
            assert found.ids == together[place].ids
            assert found.logprob == pytest.approx(together[place].logprob, abs=1e-4)
            assert found.posterior == pytest.approx(together[place].posterior[::-1], abs=1e-4)


def test_a_question_without_hits_is_asked_closed_book(generator: HFGenerator) -> None:
    question = asked(QUERIES[:2], [[], [0, 1]])
    for decode, settings in (
        (rag_sequence, RagSequenceDecode(kind="rag_sequence", max_new_tokens=4)),
        (rag_token, RagTokenDecode(kind="rag_token", max_new_tokens=4)),
    ):
        answer = decode(generator, question, settings)[0]
        alone = generator.generate([generator.prompt.render(QUERIES[0], [])], max_new_tokens=4)[0]
        assert answer.ids == alone.ids
        assert answer.logprob == pytest.approx(alone.logprob, abs=1e-3)
        assert answer.hits == answer.prior == answer.posterior == answer.token_posterior == ()


def test_merging_by_text_adds_what_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = sharpened(made("bart", tmp_path))
    question = asked()
    settings = RagSequenceDecode(kind="rag_sequence", beams=3, max_new_tokens=4)
    apart = rag_sequence(generator, question, settings)
    monkeypatch.setattr(generator, "text", lambda ids, sources: "same" if len(ids) > 1 else "short")
    for before, after in zip(
        apart, rag_sequence(generator, question, settings.model_copy(update={"merge": "text"})), strict=True
    ):
        groups: dict[str, list[float]] = {}
        for candidate in before.candidates:
            groups.setdefault("same" if len(candidate.ids) > 1 else "short", []).append(math.exp(candidate.logprob))
        assert {c.text: c.logprob for c in after.candidates} == pytest.approx(
            {text: math.log(sum(values)) for text, values in groups.items()}, abs=1e-6
        )
        assert after.text == max(groups, key=lambda text: sum(groups[text]))
        assert sum(after.posterior) == pytest.approx(1)


def test_what_is_found_twice_is_added() -> None:
    """Worked example I's repeats: the arithmetic of candidates, on totals given by hand."""
    prior = torch.tensor([[0.4, 0.3, 0.3]], dtype=torch.float64).log()
    found = torch.tensor([[[0.1], [0.5], [0.5]]], dtype=torch.float64).log()
    assert sequence_logprob(prior, found, torch.ones(1, 1)).exp().item() == pytest.approx(0.34)
    fast = torch.tensor([[[0.6], [0.0], [0.0]]], dtype=torch.float64).log()
    assert sequence_logprob(prior, fast, torch.ones(1, 1)).exp().item() == pytest.approx(0.24)


@pytest.mark.parametrize(
    ("mode", "best", "posterior", "marginals"),
    [
        ("thorough", "C", [0.428571, 0.571429], {"C": 0.35, "A": 0.27, "B": 0.26, "D": 0.12}),
        ("fast", "A", [1.0, 0.0], {"A": 0.27, "C": 0.20, "B": 0.18, "D": 0.12}),
    ],
)
def test_thorough_and_fast_worked(mode: str, best: str, posterior: list, marginals: dict, tmp_path: Path) -> None:
    """Worked example I: two passages, two beams each, {A, B} and {C, D}."""
    generator = made("bart", tmp_path)
    table = {"A": [0.45, 0.0], "B": [0.30, 0.20], "C": [0.25, 0.50], "D": [0.0, 0.30]}
    found = {"A": [0], "B": [0], "C": [1], "D": [1]}
    ids = {name: tuple(generator.answer_ids(name)) for name in table}
    totals = {
        ids[name]: torch.tensor([p if mode == "thorough" or k in found[name] else 0.0 for k, p in enumerate(row)])
        .double()
        .log()
        for name, row in table.items()
    }
    question = asked(["?"], [[0, 1]])
    settings = RagSequenceDecode(kind="rag_sequence", mode=mode, beams=2)
    prior = torch.tensor([0.6, 0.4], dtype=torch.float64).log()
    answer = ranked(generator, question, 0, question.prompts(generator.prompt)[0], prior, totals, settings)
    assert answer.ids == ids[best]
    assert answer.posterior == pytest.approx(posterior, abs=1e-6)
    assert {c.ids: math.exp(c.logprob) for c in answer.candidates} == pytest.approx({ids[n]: p for n, p in marginals.items()})
    assert answer.logprob == pytest.approx(-1.049822 if mode == "thorough" else -1.309333, abs=1e-6)


def test_token_and_sequence_prefer_different_answers_worked() -> None:
    """Worked example J: two tokens over {A, B}, two passages of equal prior."""
    prior = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    first = torch.tensor([[0.7, 0.3], [0.6, 0.4]])
    then = torch.tensor([[[0.1, 0.9], [0.5, 0.5]], [[0.95, 0.05], [0.05, 0.95]]])  # passage, first token, second token
    wanted = {
        "sequence": {(0, 0): 0.32, (0, 1): 0.33, (1, 0): 0.085, (1, 1): 0.265},
        "token": {(0, 0): 0.34125, (0, 1): 0.30875, (1, 0): 0.09625, (1, 1): 0.25375},
    }
    for over, values in wanted.items():
        for (a, b), value in values.items():
            table = torch.stack([first[:, a], then[:, a, b]], 1).double().log()[None]
            found = marginal_logprob(prior, table, torch.ones(1, 2, dtype=torch.bool), over=over).exp().item()
            assert found == pytest.approx(value, abs=1e-6)


def test_sampling_follows_the_mixture_and_stays_in_lockstep(tmp_path: Path) -> None:
    generator = sharpened(made("bart", tmp_path), 6.0)
    question = asked(QUERIES[:1], [[0, 2]])
    draws = 2000
    torch.manual_seed(0)
    settings = RagTokenDecode(kind="rag_token", max_new_tokens=1, sample=SampleSettings(), returns=draws)
    candidates = rag_token(generator, question, settings)[0].candidates
    assert len(candidates) == draws
    prompts, prior = question.prompts(generator.prompt)[0], question.doc_logprobs[0].double()
    q = (torch.stack([next_logprobs(generator, p, ()) for p in prompts]) + prior[:, None]).logsumexp(0).exp()
    counts = Counter(candidate.ids[0] for candidate in candidates)
    common = [v for v in range(len(q)) if q[v] * draws >= 5]
    rest = 1 - sum(float(q[v]) for v in common)
    chi = sum((counts[v] - draws * float(q[v])) ** 2 / (draws * float(q[v])) for v in common)
    chi += (draws - sum(counts[v] for v in common) - draws * rest) ** 2 / max(draws * rest, 1e-9)
    freedom = len(common)
    assert freedom >= 3
    assert chi < freedom + 5 * math.sqrt(2 * freedom)
    one = RagTokenDecode(kind="rag_token", max_new_tokens=3, sample=SampleSettings(top_k=1), returns=3)
    greedy = rag_token(generator, question, RagTokenDecode(kind="rag_token", max_new_tokens=3))[0]
    assert {c.ids for c in rag_token(generator, question, one)[0].candidates} == {greedy.ids}


def test_length_and_ngram_rules_act_on_the_mixture(tmp_path: Path) -> None:
    generator = sharpened(made("llama", tmp_path))
    question = asked()
    plain = rag_token(generator, question, RagTokenDecode(kind="rag_token", max_new_tokens=40))
    blocked = rag_token(generator, question, RagTokenDecode(kind="rag_token", max_new_tokens=40, no_repeat_ngram_size=1))
    assert any(len(set(answer.ids)) < len(answer.ids) for answer in plain)
    assert all(len(set(answer.ids)) == len(answer.ids) for answer in blocked)
    for place, prompts in enumerate(question.prompts(generator.prompt)):  # the twin: blocked words are left out, then argmax
        ids: tuple[int, ...] = ()
        while len(ids) < len(blocked[place].ids):
            each = torch.stack([next_logprobs(generator, prompt, ids) for prompt in prompts])
            mixed = (each + question.doc_logprobs[place].double()[:, None]).logsumexp(0)
            mixed[list(ids)] = -math.inf
            ids = (*ids, int(mixed.argmax()))
        assert blocked[place].ids == ids
    generator.ends = [plain[0].ids[3]]  # a token that greedy search writes soon, as end token
    soon = rag_token(generator, question, RagTokenDecode(kind="rag_token", max_new_tokens=40))[0]
    assert len(soon.ids) <= 4
    later = rag_token(generator, question, RagTokenDecode(kind="rag_token", max_new_tokens=40, min_new_tokens=8))[0]
    assert len(later.ids) >= 8
    assert later.ids[: len(soon.ids) - 1] == soon.ids[:-1]


def test_a_models_own_generation_settings_do_not_act_before_the_mixture(tmp_path: Path) -> None:
    generator = sharpened(made("bart", tmp_path))
    question = asked()
    before = [a.ids for a in rag_token(generator, question, RagTokenDecode(kind="rag_token", max_new_tokens=6))]
    config = generator.model.generation_config
    config.no_repeat_ngram_size, config.repetition_penalty, config.forced_eos_token_id, config.use_cache = 1, 3.0, 7, False
    after = [a.ids for a in rag_token(generator, question, RagTokenDecode(kind="rag_token", max_new_tokens=6))]
    assert before == after


class Counted:
    """Rows that go through an encoder, and through a decoder's cross-attention projections."""

    def __init__(self, module: torch.nn.Module):
        self.rows, self.calls = 0, 0
        module.register_forward_hook(self._count, with_kwargs=True)

    def _count(self, _: Any, args: Any, kwargs: Any, output: Any) -> None:
        self.calls += 1
        self.rows += len(kwargs.get("input_ids", args[0] if args else None))


@pytest.mark.parametrize("mode", ["thorough", "fast"])
def test_every_prompt_is_encoded_once(mode: str, tmp_path: Path) -> None:
    generator = sharpened(made("bart", tmp_path))
    generator.states_before_head(  # the one-time check of the head is not part of the count
        generator.model, {"input_ids": torch.tensor([[5]]), "decoder_input_ids": torch.tensor([[2]])}
    )
    counted = Counted(generator.model.get_encoder())
    question = asked([*QUERIES, "by whom?"], [[0, 1, 2, 3, 0], [1, 2, 3, 0, 1], [2, 3, 1, 0, 2], [3, 0, 1, 2, 3]])
    rag_sequence(generator, question, RagSequenceDecode(kind="rag_sequence", mode=mode, beams=4, max_new_tokens=6))
    assert (counted.rows, counted.calls) == (20, 1)


# transformers' own RAG models


def theirs(kind: type, generator: HFGenerator, documents: int) -> Any:
    config = DPRConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )  # fmt: skip
    questions = DPRQuestionEncoder(config)
    rag = RagConfig.from_question_encoder_generator_configs(
        config, generator.model.config, n_docs=documents, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, label_smoothing=0.0, vocab_size=generator.model.config.vocab_size, title_sep=" / ",
        doc_sep=" // ", max_combined_length=64, retrieval_vector_size=16,
    )  # fmt: skip
    head = generator.model.get_output_embeddings()
    own = head.weight
    model = kind(config=rag, question_encoder=questions, generator=generator.model).eval()
    head.weight = own  # theirs ties it to the embeddings again, and with it goes what `sharpened` gave
    return model


def contexts(generator: HFGenerator, question: Asked, *, same_length: bool) -> tuple[Tensor, Tensor, list[list[Rendered]]]:
    rows = question.prompts(generator.prompt)
    if same_length:
        shortest = min(len(prompt.ids) for row in rows for prompt in row)
        rows = [[Rendered(prompt.ids[-shortest:], prompt.text) for prompt in row] for row in rows]
    flat = [prompt for row in rows for prompt in row]
    longest = max(len(prompt.ids) for prompt in flat)
    ids = torch.tensor([[*prompt.ids, *[0] * (longest - len(prompt.ids))] for prompt in flat])
    mask = torch.tensor([[1] * len(prompt.ids) + [0] * (longest - len(prompt.ids)) for prompt in flat])
    return ids, mask, rows


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("documents", [1, 2, 3])
def test_rag_token_is_transformers_rag_token(seed: int, beams: int, documents: int, tmp_path: Path) -> None:
    generator = lively(made("bart", tmp_path, seed=seed), 3.0 + seed)
    generator.prefix = [2]  # theirs starts from </s> alone
    torch.manual_seed(seed)
    hits = [[0, 1, 2][:documents], [2, 3, 0][:documents]]
    question = asked(QUERIES[:2], hits)
    scores = torch.randn(2, documents)
    question = Asked(question.queries, question.hits, list(scores.log_softmax(-1)))
    ids, mask, _ = contexts(generator, question, same_length=False)
    model = theirs(RagTokenForGeneration, generator, documents)
    with torch.no_grad():
        found = model.generate(
            context_input_ids=ids, context_attention_mask=mask, doc_scores=scores, n_docs=documents, num_beams=beams,
            max_length=8, min_length=0, do_sample=False,
        )  # fmt: skip
    ours = rag_token(generator, question, RagTokenDecode(kind="rag_token", beams=beams, max_new_tokens=7))
    for row, answer in zip(found.tolist(), ours, strict=True):
        end = next((place for place, token in enumerate(row[1:], 1) if token == 2), len(row) - 1)
        assert tuple(row[1 : end + 1]) == answer.ids


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("documents", [1, 3])
def test_rag_sequence_finds_what_transformers_finds_on_unpadded_contexts(seed: int, documents: int, tmp_path: Path) -> None:
    """Theirs drops the attention mask when it makes candidates, so contexts have one length here. The best answer agrees."""
    generator = lively(made("bart", tmp_path, seed=seed), 3.0 + seed)
    generator.prefix = [2]
    torch.manual_seed(seed)
    question = asked(QUERIES[:2], [[0, 1, 2][:documents], [2, 3, 0][:documents]])
    ids, mask, rows = contexts(generator, question, same_length=True)
    scores = torch.randn(2, documents)
    prepared = Given(question.queries, question.hits, list(scores.log_softmax(-1)), rows)
    model = theirs(RagSequenceForGeneration, generator, documents)
    with torch.no_grad():
        found = model.generate(
            context_input_ids=ids, context_attention_mask=mask, doc_scores=scores, n_docs=documents, num_beams=3,
            num_return_sequences=1, max_length=8, min_length=0, do_sample=False, do_deduplication=True,
        )  # fmt: skip
    settings = RagSequenceDecode(kind="rag_sequence", beams=3, max_new_tokens=7)
    for row, answer in zip(found.tolist(), rag_sequence(generator, prepared, settings), strict=True):
        end = next((place for place, token in enumerate(row[1:], 1) if token == 2), len(row) - 1)
        assert tuple(row[1 : end + 1]) == answer.ids


class Given(Asked):
    """Questions whose prompts are given."""

    def __init__(self, queries: Any, hits: Any, doc_logprobs: Any, rows: list[list[Rendered]]):
        super().__init__(queries, hits, doc_logprobs)
        object.__setattr__(self, "rows", rows)

    def prompts(self, prompt: Any) -> list[list[Rendered]]:
        return self.rows  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("kind", [RagSequenceForGeneration, RagTokenForGeneration], ids=["sequence", "token"])
@pytest.mark.parametrize(("documents", "seed"), [(1, 0), (2, 1), (3, 2), (5, 3), (10, 4)])
@pytest.mark.parametrize("lengths", [(1, 1, 1), (2, 2, 2), (4, 4, 4), (2, 5, 3)], ids=str)
def test_losses_and_gradients_are_transformers_where_theirs_are_right(
    kind: type, documents: int, seed: int, lengths: tuple[int, ...], tmp_path: Path
) -> None:
    """Theirs is a sum over tokens and batch, and RAG-Sequence with one supervised token forgets the prior altogether."""
    generator = lively(made("bart", tmp_path, seed=seed))  # else passages hardly differ, and nothing pulls
    generator.prefix = [1]  # theirs trains from <s> alone
    torch.manual_seed(seed)
    question = asked(QUERIES, [[(k + place) % 4 for k in range(documents)] for place in range(3)])
    ids, mask, _ = contexts(generator, question, same_length=False)
    words = torch.randint(3, generator.model.config.vocab_size, (3, max(lengths)))
    labels = torch.full_like(words, -100)
    for row, length in enumerate(lengths):
        labels[row, :length] = torch.tensor([*words[row, : length - 1].tolist(), 2])
    drawn = torch.randn(3, documents)
    model = theirs(kind, generator, documents)
    over = "sequence" if kind is RagSequenceForGeneration else "token"
    results = []
    for ours in (False, True):
        model.zero_grad()
        scores = drawn.clone().requires_grad_()
        if ours:
            batch = {"input_ids": ids, "attention_mask": mask, "labels": labels.repeat_interleave(documents, 0)}
            each = generator.forward(batch).view(3, documents, -1)
            loss = -marginal_logprob(scores.log_softmax(-1), each, labels >= 0, over=over).sum()
        else:
            loss = model(
                context_input_ids=ids, context_attention_mask=mask, doc_scores=scores, n_docs=documents, reduce_loss=True,
                labels=torch.cat([torch.ones(3, 1, dtype=torch.long), labels.clamp_min(0)], dim=1),
            ).loss  # fmt: skip
        loss.backward()
        gradients = [p.grad.clone() for p in generator.model.parameters() if p.grad is not None]
        results.append((loss.item(), scores.grad, gradients))
    (theirs_loss, theirs_pull, theirs_all), (our_loss, our_pull, our_all) = results
    if over == "sequence" and max(lengths) == 1:
        assert theirs_loss < our_loss or documents == 1
        assert theirs_pull is None or float(theirs_pull.abs().max()) == 0
        assert documents == 1 or float(our_pull.abs().max()) > 1e-2
        return
    assert our_loss == pytest.approx(theirs_loss, rel=1e-6)
    assert torch.allclose(our_pull, theirs_pull, atol=2e-5)
    assert documents == 1 or float(our_pull.abs().max()) > 1e-2
    assert all(torch.allclose(a, b, atol=1e-4 * float(b.abs().max()) + 1e-5) for a, b in zip(our_all, theirs_all, strict=True))


@pytest.mark.parametrize("seed", [0, 1])
def test_seeds_are_other_weights_and_other_losses(seed: int, tmp_path: Path) -> None:
    one, other = (made("bart", tmp_path / str(number), seed=number) for number in (seed, seed + 1))
    prompt = one.prompt.render(QUERIES[0], [Passage("0", TEXTS[0])])
    assert plain_logprobs(one, prompt, "odo") != pytest.approx(plain_logprobs(other, prompt, "odo"), abs=1e-3)


# Where transformers is wrong: the true value beside theirs


def test_an_impossible_word_makes_their_loss_nan_and_leaves_ours(tmp_path: Path) -> None:
    generator = made("bart", tmp_path)
    torch.manual_seed(0)
    logits = torch.randn(4, 3, 40)
    logits[:, :, 39] = -torch.inf  # a word that no passage allows, and nobody answers with
    scores = torch.tensor([[0.3, -0.2], [0.1, 0.4]])
    answers = torch.tensor([[7, 8, 2], [9, 2, 2]])
    model = theirs(RagTokenForGeneration, generator, 2)
    found = model.get_nll(logits, scores, answers, reduce_loss=True, epsilon=0.0, n_docs=2)
    assert found.isnan()
    each = logits.log_softmax(-1).view(2, 2, 3, 40).gather(-1, answers[:, None, :, None].expand(2, 2, 3, 1))[..., 0]
    prior = scores.softmax(-1)
    true = -sum(math.log(sum(float(prior[b, k] * each[b, k, t].exp()) for k in range(2))) for b in range(2) for t in range(3))
    chunked = chunked_token_logprobs(
        logits.view(12, 40), lambda rows: rows, answers.repeat_interleave(2, 0).flatten(), chunk=5
    ).view(2, 2, 3)
    ours = -marginal_logprob(scores.log_softmax(-1), chunked, torch.ones(2, 3, dtype=torch.bool), over="token").sum()
    assert ours.item() == pytest.approx(true, rel=1e-5)


def test_half_precision_logits_are_scored_as_in_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    logits = 40 * torch.randn(6, 1000)
    targets = torch.randint(0, 1000, (6,))
    true = logits.half().double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    found = chunked_token_logprobs(logits.half(), lambda rows: rows, targets, chunk=4)
    assert found.double() == pytest.approx(true, rel=1e-4)


def test_theirs_has_no_rag_sequence_with_t5_and_ours_has(tmp_path: Path) -> None:
    generator = made("t5", tmp_path)
    model = theirs(RagSequenceForGeneration, generator, 2)
    model.config.bos_token_id = None  # T5 has no such token
    question = asked(QUERIES[:1], [[0, 1]])
    ids, mask, rows = contexts(generator, question, same_length=False)
    labels = torch.tensor([generator.answer_ids("odo")])
    with pytest.raises(AttributeError, match="bos_token_id"):
        model(
            context_input_ids=ids, context_attention_mask=mask, doc_scores=torch.zeros(1, 2), n_docs=2, reduce_loss=True,
            labels=labels,
        )  # fmt: skip
    each = torch.tensor([[plain_logprobs(generator, prompt, "odo") for prompt in rows[0]]])
    true = -math.log(sum(0.5 * math.exp(sum(passage)) for passage in each[0].tolist()))
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels.repeat_interleave(2, 0)}
    scored = generator.forward(batch).view(1, 2, -1)
    prior = torch.zeros(1, 2).log_softmax(-1)
    assert -marginal_logprob(prior, scored, labels >= 0, over="sequence").item() == pytest.approx(true, rel=1e-4)


def test_theirs_takes_passages_as_configured_and_ours_as_asked(tmp_path: Path) -> None:
    generator = sharpened(made("bart", tmp_path), 3.0)
    generator.prefix = [2]
    question = asked(QUERIES[:2], [[0, 1], [2, 3]])
    ids, mask, _ = contexts(generator, question, same_length=True)
    model = theirs(RagSequenceForGeneration, generator, 3)  # configured for 3, asked with 2
    with pytest.raises((RuntimeError, AssertionError, IndexError, ValueError)):
        model.generate(
            context_input_ids=ids, context_attention_mask=mask, doc_scores=torch.zeros(2, 2), n_docs=2, num_beams=2,
            num_return_sequences=1, max_length=6, min_length=0, do_sample=False,
        )  # fmt: skip
    answers = rag_sequence(generator, question, RagSequenceDecode(kind="rag_sequence", beams=2, max_new_tokens=5))
    assert [len(answer.prior) for answer in answers] == [2, 2]
