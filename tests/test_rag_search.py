"""Searches and draws of the RAG decodings: T5 beside transformers and beside exhaustive twins, counts, and what is drawn."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import RagTokenForGeneration

import tiny
from raglan.decode import Asked, rag_sequence, rag_token
from raglan.index import Index, Queries
from raglan.knowledge import build_knowledge
from raglan.rag import RAG
from raglan.recipe import RagSequenceDecode, RagTokenDecode, Recipe, SampleSettings
from test_generator import made
from test_rag_decode import QUERIES, all_answers, asked, contexts, lively, next_logprobs, sharpened, summed, theirs

# RAG-Token with T5


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize(("beams", "least", "gram"), [(1, 0, 0), (4, 0, 0), (1, 4, 0), (4, 4, 0), (1, 0, 1), (4, 0, 2)])
def test_rag_token_of_t5_is_transformers(seed: int, beams: int, least: int, gram: int, tmp_path: Path) -> None:
    """Theirs counts the start token, which is <pad>, among the written words: until that is written, both are one."""
    generator = lively(made("t5", tmp_path, seed=seed), 3.0 + seed)
    torch.manual_seed(seed)
    scores = torch.randn(2, 3)
    question = asked(QUERIES[:2], [[0, 1, 2], [2, 3, 0]])
    question = Asked(question.queries, question.hits, list(scores.log_softmax(-1)))
    ids, mask, _ = contexts(generator, question, same_length=False)
    model = theirs(RagTokenForGeneration, generator, 3)
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 0
    model.config.generator.decoder_start_token_id = 0
    with torch.no_grad():
        found = model.generate(
            context_input_ids=ids, context_attention_mask=mask, doc_scores=scores, n_docs=3, num_beams=beams,
            max_length=9, min_length=least + 1 if least else 0, no_repeat_ngram_size=gram or None, do_sample=False,
        )  # fmt: skip
    settings = RagTokenDecode(kind="rag_token", beams=beams, max_new_tokens=8, min_new_tokens=least, no_repeat_ngram_size=gram)
    for row, answer in zip(found.tolist(), rag_token(generator, question, settings), strict=True):
        end = next((place for place, token in enumerate(row[1:], 1) if token == 2), len(row) - 1)
        same = answer.ids.index(0) if gram and 0 in answer.ids else max(end, len(answer.ids))
        assert tuple(row[1 : end + 1])[:same] == answer.ids[:same]
        assert same > 1
        assert len(answer.ids) >= least


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize(("beams", "least", "gram"), [(1, 4, 0), (4, 4, 0), (1, 0, 2), (4, 0, 2), (4, 4, 3)])
def test_rag_token_of_bart_obeys_rules_as_transformers(seed: int, beams: int, least: int, gram: int, tmp_path: Path) -> None:
    """Its start token, which theirs counts among the written words, is its end token too."""
    generator = lively(made("bart", tmp_path, seed=seed), 3.0 + seed)
    generator.prefix = [2]  # theirs starts from </s> alone
    torch.manual_seed(seed)
    scores = torch.randn(2, 3)
    question = asked(QUERIES[:2], [[0, 1, 2], [2, 3, 0]])
    question = Asked(question.queries, question.hits, list(scores.log_softmax(-1)))
    ids, mask, _ = contexts(generator, question, same_length=False)
    with torch.no_grad():
        found = theirs(RagTokenForGeneration, generator, 3).generate(
            context_input_ids=ids, context_attention_mask=mask, doc_scores=scores, n_docs=3, num_beams=beams,
            max_length=9, min_length=least + 1 if least else 0, no_repeat_ngram_size=gram or None, do_sample=False,
        )  # fmt: skip
    settings = RagTokenDecode(kind="rag_token", beams=beams, max_new_tokens=8, min_new_tokens=least, no_repeat_ngram_size=gram)
    ours = rag_token(generator, question, settings)
    for row, answer in zip(found.tolist(), ours, strict=True):
        end = next((place for place, token in enumerate(row[1:], 1) if token == 2), len(row) - 1)
        assert tuple(row[1 : end + 1]) == answer.ids
        assert len(answer.ids) > least or answer.ids[-1] not in generator.ends
        grams = [answer.ids[place : place + gram] for place in range(len(answer.ids) - gram + 1)] if gram else []
        assert len(set(grams)) == len(grams)


def allowed(ids: tuple[int, ...], ends: list[int], least: int, gram: int) -> bool:
    """Whether the rules let an answer of at most two tokens pass."""
    if least == 2 and ids[0] in ends:
        return False
    return not (gram == 1 and len(set(ids)) < len(ids))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("kind", "least", "gram"), [("t5", 0, 0), ("t5", 2, 1), ("llama", 2, 1)])
def test_beams_that_cover_everything_obey_the_rules(kind: str, seed: int, least: int, gram: int, tmp_path: Path) -> None:
    generator = sharpened(made(kind, tmp_path), 5.0 + seed)
    torch.manual_seed(seed)
    question = asked(QUERIES[seed % 3 :][:1], [[seed % 4, (seed + 1) % 4]])
    question = Asked(question.queries, question.hits, [torch.randn(2).log_softmax(0)])
    prompts, prior = question.prompts(generator.prompt)[0], question.doc_logprobs[0].double()
    every = summed(all_answers(generator, prompts), prior)[1]
    by_token = {ids: value for ids, value in every.items() if allowed(ids, generator.ends, least, gram)}
    words = len(next_logprobs(generator, prompts[0], ()))
    settings = RagTokenDecode(
        kind="rag_token", beams=words, max_new_tokens=2, length_penalty=0.0, min_new_tokens=least, no_repeat_ngram_size=gram
    )
    found = rag_token(generator, question, settings)[0]
    assert found.ids == max(by_token, key=by_token.__getitem__)
    assert found.logprob == pytest.approx(max(by_token.values()), abs=1e-4)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("beams", [2, 3])
def test_few_beams_are_a_beam_search_by_hand(seed: int, beams: int, tmp_path: Path) -> None:
    """No length rule, no end: the best `beams` beginnings of the mixture at each step."""
    generator = sharpened(made("t5", tmp_path), 4.0 + seed)
    question = asked(QUERIES[:1], [[0, 2, 3]])
    prompts, prior = question.prompts(generator.prompt)[0], question.doc_logprobs[0].double()
    settings = RagTokenDecode(
        kind="rag_token", beams=beams, returns=beams, max_new_tokens=3, min_new_tokens=3, length_penalty=0.0
    )
    held: dict[tuple[int, ...], float] = {(): 0.0}
    for step in range(3):
        longer: dict[tuple[int, ...], float] = {}
        for ids, total in held.items():
            mixed = (torch.stack([next_logprobs(generator, p, ids) for p in prompts]) + prior[:, None]).logsumexp(0)
            if step < 2:  # three tokens at least: the end may only be the last
                mixed[generator.ends] = -math.inf
            longer |= {(*ids, v): total + float(value) for v, value in enumerate(mixed.tolist())}
        held = dict(sorted(longer.items(), key=lambda pair: -pair[1])[:beams])
    answer = rag_token(generator, question, settings)[0]
    assert {c.ids: c.logprob for c in answer.candidates} == pytest.approx(held, abs=1e-3)
    assert answer.ids == next(iter(held))


# Draws


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_two_tokens_drawn_follow_their_joint_distribution(kind: str, tmp_path: Path) -> None:
    generator = sharpened(made(kind, tmp_path), 8.0)
    question = asked(QUERIES[:1], [[0, 2]])
    prompts, prior = question.prompts(generator.prompt)[0], question.doc_logprobs[0].double()
    table = all_answers(generator, prompts)
    q = {ids: math.exp(value) for ids, value in summed(table, prior)[1].items()}
    draws = 1500
    torch.manual_seed(0)
    settings = RagTokenDecode(kind="rag_token", max_new_tokens=2, sample=SampleSettings(), returns=draws)
    candidates = rag_token(generator, question, settings)[0].candidates
    assert len(candidates) == draws
    counts = Counter(candidate.ids for candidate in candidates)
    assert set(counts) <= set(q)
    common = [ids for ids, p in q.items() if p * draws >= 5 and len(ids) == 2]
    rest = draws * (1 - sum(q[ids] for ids in common))
    chi = sum((counts[ids] - draws * q[ids]) ** 2 / (draws * q[ids]) for ids in common)
    chi += (draws - sum(counts[ids] for ids in common) - rest) ** 2 / max(rest, 1e-9)
    freedom = len(common)
    assert len({ids[0] for ids in common}) >= 3
    assert freedom >= 5
    assert chi < freedom + 5 * math.sqrt(2 * freedom)
    first: Counter[int] = Counter()
    second: Counter[tuple[int, ...]] = Counter()
    for (v, *w), p in q.items():
        first[v] += p
        second[tuple(w)] += p
    apart = [first[v] * second[tuple(w)] for v, *w in common]
    off = sum((counts[ids] - draws * p) ** 2 / (draws * p) for ids, p in zip(common, apart, strict=True))
    assert off > freedom + 5 * math.sqrt(2 * freedom)  # a second token that forgets the first would be told apart


# Candidates


@pytest.mark.parametrize("kind", ["bart", "t5", "llama"])
def test_fast_is_thorough_where_every_answer_is_in_every_beam(kind: str, tmp_path: Path) -> None:
    generator = sharpened(made(kind, tmp_path))
    question = asked()
    words = len(next_logprobs(generator, question.prompts(generator.prompt)[0][0], ()))
    both = [
        rag_sequence(generator, question, RagSequenceDecode(kind="rag_sequence", mode=mode, beams=words, max_new_tokens=1))
        for mode in ("thorough", "fast")
    ]
    for thorough, fast in zip(*both, strict=True):
        assert (thorough.ids, len(thorough.candidates)) == (fast.ids, words)
        found = {c.ids: c.logprob for c in fast.candidates}
        assert {c.ids: c.logprob for c in thorough.candidates} == pytest.approx(found, abs=1e-4)
        assert sum(map(math.exp, found.values())) == pytest.approx(1, abs=1e-4)
        assert fast.posterior == pytest.approx(thorough.posterior, abs=1e-4)


@pytest.mark.parametrize("kind", ["bart", "t5", "llama"])
def test_fast_adds_what_several_passages_found(kind: str, tmp_path: Path) -> None:
    """Twice the same passage: its answers count with both priors, and its thorough and fast scores are one."""
    generator = sharpened(made(kind, tmp_path))
    question = asked(QUERIES[:1], [[0, 0]])
    once = asked(QUERIES[:1], [[0]])
    settings = RagSequenceDecode(kind="rag_sequence", mode="fast", beams=3, max_new_tokens=4)
    twice, single = rag_sequence(generator, question, settings)[0], rag_sequence(generator, once, settings)[0]
    assert {c.ids: c.logprob for c in twice.candidates} == pytest.approx(
        {c.ids: c.logprob for c in single.candidates}, abs=1e-4
    )
    assert twice.posterior == pytest.approx(question.doc_logprobs[0].exp().tolist(), abs=1e-4)


@pytest.mark.parametrize("mode", ["thorough", "fast"])
@pytest.mark.parametrize("kind", ["bart", "t5", "llama"])
def test_asking_for_more_answers_than_there_are_returns_fewer(kind: str, mode: str, tmp_path: Path) -> None:
    """One token has only as many answers as there are words; what beams are filled up with is none."""
    generator = sharpened(made(kind, tmp_path))
    question = asked(QUERIES[:1], [[0, 2]])
    prompts, prior = question.prompts(generator.prompt)[0], question.doc_logprobs[0].double()
    true = (torch.stack([next_logprobs(generator, prompt, ()) for prompt in prompts]) + prior[:, None]).logsumexp(0)
    settings = RagSequenceDecode(kind="rag_sequence", mode=mode, beams=len(true) + 20, max_new_tokens=1)
    answer = rag_sequence(generator, question, settings)[0]
    assert {c.ids: c.logprob for c in answer.candidates} == pytest.approx(
        {(v,): value for v, value in enumerate(true.tolist())}, abs=1e-3
    )


def test_beams_of_the_mixture_are_no_more_than_there_are_answers(tmp_path: Path) -> None:
    generator = sharpened(made("t5", tmp_path))
    question = asked(QUERIES[:2], [[0, 2], [1]])
    words = len(next_logprobs(generator, question.prompts(generator.prompt)[0][0], ()))
    settings = RagTokenDecode(kind="rag_token", beams=words + 20, returns=words + 20, max_new_tokens=1, min_new_tokens=1)
    for answer in rag_token(generator, question, settings):
        assert sorted(c.ids for c in answer.candidates) == [(v,) for v in range(words) if v not in generator.ends]


# What is computed, once


class Counted(Index):
    """An index that counts how often it is asked."""

    def __init__(self, inner: Index):
        self.inner, self.calls = inner, 0
        self.needs_vectors = inner.needs_vectors

    def search(self, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        self.calls += 1
        return self.inner.search(queries, k)

    @property
    def fingerprint(self) -> str:
        return self.inner.fingerprint


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> RAG:
    folder = tmp_path_factory.mktemp("system")
    tiny.bart(folder / "bart")
    tiny.sentence_encoder(folder)
    rows = [{"id": str(n), "title": f"T{n}", "text": f"the tower of {n} was built by miller {n * 7}"} for n in range(9)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    recipe = Recipe.model_validate({
        "name": "counted", "retriever": {"k": 5}, "generator": {"model": str(folder / "bart"), "dtype": "float32"},
        "knowledge": {
            "path": folder / "kb", "documents": [folder / "rows.jsonl"], "chunk": None,
            "encoder": {"model": str(folder / "encoder"), "dtype": "float32"}, "indexes": {"dense": {"kind": "dense"}},
        },
        "decode": {"kind": "rag_sequence", "max_new_tokens": 2},
    })  # fmt: skip
    build_knowledge(recipe.knowledge)
    system = RAG.open(recipe)
    sharpened(system.generator)
    system.decode = RagSequenceDecode(kind="rag_sequence", beams=3, max_new_tokens=4)
    system.answer(["who?"])  # the one-time check of the head is not part of the count
    return system


DECODINGS: list[Any] = [
    RagSequenceDecode(kind="rag_sequence", mode=mode, beams=beams, max_new_tokens=5)
    for mode in ("thorough", "fast")
    for beams in (1, 2, 4)
] + [RagTokenDecode(kind="rag_token", beams=beams, max_new_tokens=5) for beams in (1, 4)]


@pytest.mark.parametrize("decode", DECODINGS, ids=lambda d: f"{d.kind}-{getattr(d, 'mode', '')}-{d.beams}")
def test_an_answer_costs_one_search_b_questions_and_b_k_prompts(decode: Any, system: RAG, monkeypatch: Any) -> None:
    queries = ["who built the tower?", "when was it?", "miller 14", "the tower of 3"]
    index = Counted(system.retriever.index)
    monkeypatch.setattr(system.retriever, "index", index)
    monkeypatch.setattr(system, "decode", decode)
    rows = {"prompts": 0, "questions": 0}

    def count(name: str) -> Any:
        def hook(_: Any, args: Any, kwargs: Any) -> None:
            rows[name] += len(kwargs["input_ids"] if "input_ids" in kwargs else args[0]["input_ids"])

        return hook

    towers = [
        system.generator.model.get_encoder().register_forward_pre_hook(count("prompts"), with_kwargs=True),
        system.retriever.encoder.query_tower.register_forward_pre_hook(count("questions"), with_kwargs=True),
    ]
    answers = system.answer(queries)
    for handle in towers:
        handle.remove()
    assert (rows["prompts"], rows["questions"], index.calls) == (20, 4, 1)
    assert all(len(answer.hits) == 5 for answer in answers)
