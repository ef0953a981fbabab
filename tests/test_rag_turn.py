"""RAG-Turn against loops over everything: priors, losses, gradients and both decodings, on tiny models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from raglan.decode import Asked, rag_token, rag_turn
from raglan.dialogue import TurnHits, retrieve_turns, turn_texts
from raglan.generator import HFGenerator
from raglan.knowledge import build_knowledge
from raglan.likelihood import turn_bound, turn_logprobs, turn_marginal, turn_split
from raglan.objective import MarginalObjective, MarginalRow, TurnObjective
from raglan.rag import RAG
from raglan.recipe import MarginalObjective as MarginalSettings
from raglan.recipe import RagSequenceDecode, RagTokenDecode, TurnSettings, load_recipe
from raglan.records import Answer
from test_generator import made, plain_logprobs
from test_rag_decode import asked, next_logprobs, sharpened
from tiny import small_recipe

QUERIES = ["when was it built?", "who was the miller?", "what year?"]
HISTORY: list[list[str]] = [["who built the tower?", "a miller", "where?"], [], ["the lighthouse"]]
ANSWERS = ["1790", "odo", "a year"]
K = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("turns")
    build_knowledge(load_recipe(small_recipe(path)).knowledge)
    return path


@pytest.fixture(scope="module", params=["bart", "llama", "reader"])
def generator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HFGenerator:
    return sharpened(made(request.param, tmp_path_factory.mktemp("models")))


def opened(folder: Path, *changes: str) -> RAG:
    return RAG.open(load_recipe(folder / "small.yaml", ["retriever.prior.temperature=0.5", *changes]))


def turned(**given: Any) -> TurnSettings:
    return TurnSettings(**{"count": 3, **given})


def by_hand(system: RAG, query: str, said: list[str], turns: TurnSettings) -> tuple[list[float], list[tuple[float, Any]]]:
    """ρ of each turn, oldest first, and of each its hits with p(z | turn)."""
    retriever = system.retriever
    texts = turn_texts(retriever, [query], [said], turns.count)[0]
    found, evidence = [], []
    for text in texts:
        hits = retriever.retrieve([text], K)[0]
        vector = retriever.encoder.embed_queries([text])[0].astype(np.float64)
        stored = retriever.base.vectors.vectors(np.array([hit.row for hit in hits])).astype(np.float64)
        weights = np.exp(stored @ vector / retriever.temperature)
        found.append(list(zip((weights / weights.sum()).tolist(), hits, strict=True)))
        evidence.append(float(weights.sum()))
    raw = {
        "uniform": [1.0] * len(texts), "retrieval": evidence,
        "recency": [turns.gamma ** (len(texts) - 1 - u) for u in range(len(texts))],
    }[turns.prior]  # fmt: skip
    return [value / sum(raw) for value in raw], found


@pytest.mark.parametrize("prior", ["uniform", "recency", "retrieval"])
def test_priors_of_turns_and_passages(prior: str, folder: Path) -> None:
    system, turns = opened(folder), turned(prior=prior)
    found = retrieve_turns(system.retriever, QUERIES, HISTORY, K, turns)
    assert [own.sizes for own in found] == [(2, 2, 2), (2,), (2, 2)]
    for query, said, own in zip(QUERIES, HISTORY, found, strict=True):
        rho, hits = by_hand(system, query, said, turns)
        assert [hit.row for hit in own.hits] == [hit.row for turn in hits for _, hit in turn]
        assert [hit.rank for hit in own.hits] == list(range(1, len(own.hits) + 1))
        joint = [weight * share for weight, turn in zip(rho, hits, strict=True) for share, _ in turn]
        assert own.doc_logprobs.exp().tolist() == pytest.approx(joint, abs=1e-5)
        assert sum(joint) == pytest.approx(1)


def test_a_smaller_gamma_lowers_old_turns(folder: Path) -> None:
    system = opened(folder)

    def oldest(gamma: float) -> float:
        own: TurnHits = retrieve_turns(system.retriever, QUERIES, HISTORY, K, turned(prior="recency", gamma=gamma))[0]
        return float(own.doc_logprobs[:K].exp().sum())

    assert oldest(1.0) == pytest.approx(1 / 3, abs=1e-6)
    assert oldest(0.5) == pytest.approx(0.25 / 1.75, abs=1e-6)
    assert oldest(0.1) < oldest(0.5) < oldest(1.0)


def test_turns_that_find_nothing_are_absent(folder: Path) -> None:
    system = opened(folder, "retriever.index=bm25", "decode.kind=rag_token", "decode.turns.count=2")
    turns = turned(count=2, prior="recency")
    found = retrieve_turns(system.retriever, ["tower", "zzz", "zzz"], [["zzz"], ["tower"], ["qqq"]], K, turns)
    assert [own.sizes for own in found] == [(2,), (2,), ()]
    for own in found[:2]:
        assert float(own.doc_logprobs.exp().sum()) == pytest.approx(1, abs=1e-6)
    for kind in ("doc_then_turn", "doc_only"):
        system.decode = RagTokenDecode(kind="rag_token", max_new_tokens=3, turns=turned(count=2, kind=kind))
        answer = system.answer(["zzz"], history=[["qqq"]])[0]
        alone = system.generator.generate([system.generator.prompt.render("zzz", [], history=["qqq"])], max_new_tokens=3)[0]
        assert (answer.ids, answer.hits, answer.posterior) == (alone.ids, (), ())
        assert answer.logprob == pytest.approx(alone.logprob, abs=1e-4)


def mixed(generator: HFGenerator, weights: list[float], prompts: list[Any], ids: tuple[int, ...]) -> Tensor:
    """log q(v | y_<t) of a mixture of prompts."""
    each = torch.stack([next_logprobs(generator, prompt, ids) for prompt in prompts])
    return (torch.tensor(weights, dtype=torch.float64).log()[:, None] + each).logsumexp(0)


def greedy(generator: HFGenerator, weights: list[float], prompts: list[Any], most: int) -> tuple[int, ...]:
    ids: tuple[int, ...] = ()
    while len(ids) < most and (not ids or ids[-1] not in generator.ends):
        ids = (*ids, int(mixed(generator, weights, prompts, ids).argmax()))
    return ids


def likelihood(generator: HFGenerator, weights: list[float], prompts: list[Any], ids: tuple[int, ...]) -> float:
    return sum(float(mixed(generator, weights, prompts, ids[:t])[token]) for t, token in enumerate(ids))


def ask(folder: Path, generator: HFGenerator, decode: Any, places: list[int] | None = None) -> list[Answer]:
    system = opened(folder)
    places = list(range(len(QUERIES))) if places is None else places
    asks = RAG(system.retriever, generator, decode, K)
    return asks.answer([QUERIES[place] for place in places], history=[HISTORY[place] for place in places])


@pytest.mark.parametrize("prior", ["uniform", "recency", "retrieval"])
def test_doc_then_turn_equals_its_twin(prior: str, folder: Path, generator: HFGenerator) -> None:
    turns = turned(prior=prior)
    answers = ask(folder, generator, RagTokenDecode(kind="rag_token", max_new_tokens=4, turns=turns))
    for query, said, answer in zip(QUERIES, HISTORY, answers, strict=True):
        rho, hits = by_hand(opened(folder), query, said, turns)
        weights = [weight * share for weight, turn in zip(rho, hits, strict=True) for share, _ in turn]
        prompts = [generator.prompt.render(query, [hit.passage], history=said) for turn in hits for _, hit in turn]
        assert answer.ids == greedy(generator, weights, prompts, 4)
        assert answer.logprob == pytest.approx(likelihood(generator, weights, prompts, answer.ids), abs=1e-3)
        assert answer.prior == pytest.approx(weights, abs=1e-4)
        assert sum(answer.posterior) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("prior", ["recency", "retrieval"])
def test_doc_only_equals_its_twin(prior: str, folder: Path, generator: HFGenerator) -> None:
    turns = turned(prior=prior, kind="doc_only")
    answers = ask(folder, generator, RagTokenDecode(kind="rag_token", max_new_tokens=4, turns=turns))
    for query, said, answer in zip(QUERIES, HISTORY, answers, strict=True):
        rho, hits = by_hand(opened(folder), query, said, turns)
        by_turns = [
            ([share for share, _ in turn], [generator.prompt.render(query, [h.passage], history=said) for _, h in turn])
            for turn in hits
        ]
        candidates = {greedy(generator, *turn, 4) for turn in by_turns}
        marginals = {}
        for ids in candidates:
            terms = [weight * math.exp(likelihood(generator, *turn, ids)) for weight, turn in zip(rho, by_turns, strict=True)]
            marginals[ids] = math.log(sum(terms))
            if ids == answer.ids:
                turn_shares = [term / sum(terms) for term in terms]
        assert {candidate.ids: pytest.approx(candidate.logprob, abs=1e-3) for candidate in answer.candidates} == marginals
        assert answer.ids == max(marginals, key=marginals.__getitem__)
        given = [share for weight, (shares, _) in zip(rho, by_turns, strict=True) for share in (weight * s for s in shares)]
        assert answer.prior == pytest.approx(given, abs=1e-4)
        by_turn = np.array(answer.posterior).reshape(len(hits), K).sum(1)
        assert by_turn.tolist() == pytest.approx(turn_shares, abs=1e-3)


@pytest.mark.parametrize("beams", [1, 3])
def test_doc_only_scores_every_turns_candidates_under_every_turn(beams: int, generator: HFGenerator) -> None:
    """Turns of unlike numbers of passages, candidates from `rag_token` turn by turn, marginals by loops."""
    question = asked()
    sizes = [(2, 1), (1, 1), (1,)]
    decode = RagTokenDecode(kind="rag_token", max_new_tokens=4, beams=beams, turns=turned(kind="doc_only"))
    answers = rag_turn(generator, Asked(question.queries, question.hits, question.doc_logprobs, (), sizes), decode)
    assert question.doc_logprobs is not None
    for place, (answer, own) in enumerate(zip(answers, sizes, strict=True)):
        prompts, joint = question.prompts(generator.prompt)[place], question.doc_logprobs[place].double().exp().tolist()
        starts = [sum(own[:u]) for u in range(len(own))]
        spans = [slice(start, start + size) for start, size in zip(starts, own, strict=True)]
        candidates = set()
        for span in spans:
            own_prior = torch.tensor(joint[span], dtype=torch.float64).log().log_softmax(0)
            one = Asked([question.queries[place]], [question.hits[place][span]], [own_prior])
            found = rag_token(generator, one, decode.model_copy(update={"returns": beams}))[0]
            candidates |= {candidate.ids for candidate in found.candidates}
        assert {candidate.ids for candidate in answer.candidates} == candidates
        for candidate in answer.candidates:
            terms = [
                sum(joint[span])
                * math.exp(likelihood(generator, [w / sum(joint[span]) for w in joint[span]], prompts[span], candidate.ids))
                for span in spans
            ]
            assert candidate.logprob == pytest.approx(math.log(sum(terms)), abs=1e-3)
            if candidate.ids == answer.ids:
                shares = [sum(answer.posterior[span]) for span in spans]
                assert shares == pytest.approx([term / sum(terms) for term in terms], abs=1e-3)
        assert answer.logprob == max(candidate.logprob for candidate in answer.candidates)
        assert sum(map(sum, answer.token_posterior)) == pytest.approx(len(answer.ids), abs=1e-3)
    assert max(len(answer.candidates) for answer in answers) > beams or generator.is_seq2seq  # turns disagree


@pytest.mark.parametrize("kind", ["doc_then_turn", "doc_only"])
@pytest.mark.parametrize("extra", [{}, {"beams": 3}, {"beams": 3, "returns": 2}])
def test_questions_together_are_questions_alone(kind: str, extra: dict[str, int], folder: Path, generator: HFGenerator) -> None:
    decode = RagTokenDecode(kind="rag_token", max_new_tokens=4, turns=turned(kind=kind), **extra)
    together = ask(folder, generator, decode)
    for place, answer in enumerate(together):
        alone = ask(folder, generator, decode, [place])[0]
        assert answer.ids == alone.ids
        assert answer.logprob == pytest.approx(alone.logprob, abs=1e-4)
        assert len(answer.candidates) >= extra.get("returns", 1)


@pytest.mark.parametrize("kind", ["doc_then_turn", "doc_only"])
def test_one_turn_is_plain_rag(kind: str, folder: Path, generator: HFGenerator) -> None:
    one = turned(count=1, kind=kind)
    for decode in (
        RagTokenDecode(kind="rag_token", max_new_tokens=4),
        RagTokenDecode(kind="rag_token", max_new_tokens=4, beams=2, returns=2),
        RagSequenceDecode(kind="rag_sequence", max_new_tokens=4, beams=2),
    ):
        plain = ask(folder, generator, decode)
        for answer, other in zip(plain, ask(folder, generator, decode.model_copy(update={"turns": one})), strict=True):
            assert (answer.ids, answer.hits) == (other.ids, other.hits)
            assert answer.logprob == pytest.approx(other.logprob, abs=1e-5)
            assert answer.posterior == pytest.approx(other.posterior, abs=1e-4)


def test_over_whole_answers_the_two_kinds_are_one(folder: Path, generator: HFGenerator) -> None:
    decode = RagSequenceDecode(kind="rag_sequence", max_new_tokens=4, beams=2, turns=turned())
    apart = decode.model_copy(update={"turns": turned(kind="doc_only")})
    for answer, other in zip(ask(folder, generator, decode), ask(folder, generator, apart), strict=True):
        assert (answer.ids, answer.logprob) == (other.ids, other.logprob)


def objective(system: RAG, *, turns: dict[str, Any] | None, **given: Any) -> MarginalObjective:
    chosen = {"kind": "marginal", "over": "token", "k": K, "reduction": "sum", "turns": turns, **given}
    kind = MarginalObjective if turns is None else TurnObjective
    return kind(system.retriever, system.generator, MarginalSettings(**chosen))


def batch(aim: MarginalObjective, places: list[int] | None = None) -> dict[str, Any]:
    count = 1 if aim.settings.turns is None else aim.settings.turns.count
    texts = turn_texts(aim.retriever, QUERIES, HISTORY, count)
    places = [0, 1, 2] if places is None else places
    return aim.collate([MarginalRow(QUERIES[p], ANSWERS[p], None, tuple(HISTORY[p]), texts[p]) for p in places])


@pytest.mark.parametrize("prior", ["uniform", "recency", "retrieval"])
@pytest.mark.parametrize("over", ["token", "sequence"])
@pytest.mark.parametrize("how", ["doc_then_turn", "joint", "separate"])
def test_losses_equal_their_twins(how: str, over: str, prior: str, folder: Path) -> None:
    system = opened(folder)
    parts = {"kind": "doc_then_turn"} if how == "doc_then_turn" else {"kind": "doc_only", "loss": how}
    aim = objective(system, turns={"count": 3, "prior": prior, **parts}, over=over)
    loss = aim.loss(batch(aim))[0]
    total = 0.0
    for query, said, answer in zip(QUERIES, HISTORY, ANSWERS, strict=True):
        rho, hits = by_hand(system, query, said, turned(prior=prior))
        each = [
            [np.exp(plain_logprobs(system.generator, system.generator.prompt.render(query, [h.passage], history=said), answer))
             for _, h in turn] for turn in hits
        ]  # fmt: skip
        shares = [np.array([share for share, _ in turn]) for turn in hits]
        own = [
            float(s @ np.array(e).prod(1)) if over == "sequence" else float((s @ np.array(e)).prod())
            for s, e in zip(shares, each, strict=True)
        ]
        if how == "separate":
            total -= sum(weight * math.log(value) for weight, value in zip(rho, own, strict=True))
        elif how == "joint" or over == "sequence":
            total -= math.log(sum(weight * value for weight, value in zip(rho, own, strict=True)))
        else:
            flat = np.concatenate([weight * s for weight, s in zip(rho, shares, strict=True)])
            total -= float(np.log(flat @ np.concatenate(each)).sum())
    assert loss.item() == pytest.approx(total, rel=2e-3)
    parted = sum(float(aim.loss(batch(aim, [place]))[0].detach()) for place in range(3))
    assert loss.item() == pytest.approx(parted, rel=1e-4)
    held_out = aim.validate([MarginalRow(q, a, None, tuple(h)) for q, a, h in zip(QUERIES, ANSWERS, HISTORY, strict=True)])
    assert held_out["perplexity"] == pytest.approx(math.exp(held_out["loss"]))


@pytest.mark.parametrize("parts", [{}, {"kind": "doc_only"}, {"kind": "doc_only", "loss": "separate"}, {"prior": "retrieval"}])
@pytest.mark.parametrize("over", ["token", "sequence"])
def test_one_turn_has_the_loss_and_gradient_of_plain_rag(parts: dict[str, str], over: str, folder: Path) -> None:
    found = []
    for turns in (None, {"count": 1, **parts}):
        aim = objective(opened(folder), turns=turns, over=over)
        loss = aim.loss(batch(aim))[0]
        loss.backward()
        found.append((loss.item(), [p.grad.clone() for own in aim.parameters().values() for p in own if p.grad is not None]))
    (plain, gradients), (turned_loss, other) = found
    assert turned_loss == pytest.approx(plain, rel=1e-6)
    assert len(gradients) == len(other) > 10
    assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(gradients, other, strict=True))


def test_turns_reach_the_retriever_and_frozen_ones_search_once(folder: Path) -> None:
    from raglan.train import marginal_rows

    aim = objective(opened(folder), turns={"count": 3, "prior": "retrieval"}, k=1)
    aim.loss(batch(aim))[0].backward()  # one passage a turn: only the prior over turns can teach
    assert any(float(p.grad.abs().max()) > 1e-6 for p in aim.parameters()["query_encoder"] if p.grad is not None)
    system = opened(folder)
    frozen = objective(system, turns={"count": 3}, learn=("generator",))
    from raglan.records import Example

    examples = [
        Example(str(n), q, (a,), history=tuple(h)) for n, (q, a, h) in enumerate(zip(QUERIES, ANSWERS, HISTORY, strict=True))
    ]
    rows = marginal_rows(examples, system, frozen.settings)
    assert [len(row.searched) for row in rows] == [3, 1, 2]
    texts = [text for row in rows for text in row.searched]
    _, found = system.retriever.search(texts, K)
    ends = np.cumsum([len(row.searched) for row in rows])[:-1]
    known = [
        MarginalRow(row.query, row.answer, own, row.history, row.texts)
        for row, own in zip(rows, np.split(found, ends), strict=True)
    ]
    assert frozen.loss(frozen.collate(known))[0].item() == pytest.approx(frozen.loss(frozen.collate(rows))[0].item(), rel=1e-5)


def test_questions_that_find_nothing(folder: Path) -> None:
    system = opened(folder, "retriever.index=bm25")
    rows = [
        MarginalRow("zzz", "odo", None, ("qqq",), ("qqq", "zzz")),
        MarginalRow("tower", "odo", None, ("q",), ("qqq", "tower")),
    ]
    for parts in ({}, {"kind": "doc_only"}, {"kind": "doc_only", "loss": "separate"}, {"prior": "retrieval"}):
        aim = objective(system, turns={"count": 2, **parts})
        loss, figures = aim.loss(aim.collate(rows[:1]))
        prompt = system.generator.prompt.render("zzz", [], history=["qqq"])
        assert loss.item() == pytest.approx(-sum(plain_logprobs(system.generator, prompt, "odo")), rel=2e-3)
        assert figures["without_hits"] == 1
        aim.loss(aim.collate(rows))[0].backward()
        assert all(torch.isfinite(p.grad).all() for own in aim.parameters().values() for p in own if p.grad is not None)
        skips = objective(system, turns={"count": 2, **parts}, on_empty="skip")
        assert skips.loss(skips.collate(rows))[0].item() == pytest.approx(
            skips.loss(skips.collate(rows[1:]))[0].item(), rel=1e-4
        )


def test_smoothing_is_of_one_mixture(folder: Path) -> None:
    from raglan.errors import RecipeError

    for settings, told in (
        ("{kind: doc_only}", "label_smoothing smooths one mixture"), ("{loss: separate}", "loss separate needs kind doc_only"),
    ):  # fmt: skip
        stage = f"stages.find.objective={{kind: marginal, over: token, label_smoothing: 0.1, turns: {settings}}}"
        with pytest.raises(RecipeError, match=told):
            load_recipe(folder / "small.yaml", [stage])


def test_splitting_undoes_flattening_and_the_bound_is_one() -> None:
    torch.manual_seed(0)
    prior = torch.randn(4, 3, dtype=torch.float64).log_softmax(-1)
    docs = torch.randn(4, 3, 2, dtype=torch.float64).log_softmax(-1)
    back = turn_split(turn_logprobs(prior, docs).unflatten(1, (3, 2)))
    assert torch.allclose(back[0], prior)
    assert torch.allclose(back[1], docs)
    each = torch.randn(4, 3, dtype=torch.float64) * 4 - 9
    assert (turn_bound(prior, each) <= turn_marginal(prior, each)).all()
