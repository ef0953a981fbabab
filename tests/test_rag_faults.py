"""Where transformers' RAG is wrong: the true value, found by loops, beside theirs and ours. And passages that are not there:
an index smaller than K whose scores are all negative, through the loss and the decodings.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BartForConditionalGeneration, RagRetriever, RagSequenceForGeneration, RagTokenForGeneration
from transformers.models.rag.retrieval_rag import CustomHFIndex

import tiny
from raglan.decode import Asked, rag_sequence, rag_token
from raglan.errors import RecipeError
from raglan.generator import open_generator
from raglan.index import Queries
from raglan.index.dense import exact_search
from raglan.knowledge import build_knowledge
from raglan.likelihood import marginal_logprob, passage_logprobs
from raglan.objective import MarginalObjective, MarginalRow
from raglan.rag import RAG
from raglan.recipe import GeneratorSettings, PromptSettings, RagSequenceDecode, RagTokenDecode, Recipe
from raglan.recipe import MarginalObjective as MarginalSettings
from raglan.records import Hit
from test_generator import made, plain_logprobs
from test_rag_decode import QUERIES, asked, contexts, lively, next_logprobs, step_logprobs, theirs

# Half precision


@pytest.mark.parametrize("kind", [RagSequenceForGeneration, RagTokenForGeneration], ids=["sequence", "token"])
def test_a_model_in_half_precision_makes_their_loss_nan_and_leaves_ours(kind: type, tmp_path: Path) -> None:
    """They add log p over all words, which a float16 cannot hold for many words, and multiply it by no smoothing."""
    large = BartForConditionalGeneration.from_pretrained(tiny.bart(tmp_path / "bart"))
    large.resize_token_embeddings(20_000)
    large.save_pretrained(tmp_path / "bart")
    settings = GeneratorSettings(model=str(tmp_path / "bart"), dtype="float16")
    generator = open_generator(settings, PromptSettings(max_tokens=300))
    generator.prefix = [1]  # theirs trains from <s> alone
    assert generator.model.dtype == torch.float16
    question = asked(QUERIES[:2], [[0, 1], [2, 3]])
    ids, mask, rows = contexts(generator, question, same_length=False)
    labels, scores = torch.tensor([[20, 31, 2], [50, 61, 2]]), torch.tensor([[0.3, -0.2], [0.1, 0.4]])
    with torch.no_grad():
        found = theirs(kind, generator, 2)(
            context_input_ids=ids, context_attention_mask=mask, doc_scores=scores.half(), n_docs=2, reduce_loss=True,
            labels=torch.cat([torch.ones(2, 1, dtype=torch.long), labels], dim=1),
        )  # fmt: skip
        each = generator.forward({"input_ids": ids, "attention_mask": mask, "labels": labels.repeat_interleave(2, 0)})
    over = "sequence" if kind is RagSequenceForGeneration else "token"
    ours = -marginal_logprob(scores.log_softmax(-1), each.view(2, 2, 3), labels >= 0, over=over).sum().item()
    exact = copy.copy(generator)
    exact.model = copy.deepcopy(generator.model).double()
    prior, true = scores.double().softmax(-1).tolist(), 0.0
    for b in range(2):
        steps = [
            [math.exp(next_logprobs(exact, prompt, tuple(labels[b, :t].tolist()))[labels[b, t]]) for t in range(3)]
            for prompt in rows[b]
        ]
        if over == "sequence":
            true -= math.log(sum(p * math.prod(own) for p, own in zip(prior[b], steps, strict=True)))
        else:
            true -= sum(math.log(sum(p * own[t] for p, own in zip(prior[b], steps, strict=True))) for t in range(3))
    assert found.loss.isnan()
    assert ours == pytest.approx(true, rel=2e-3)


# One supervised token


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_with_one_supervised_token_they_forget_the_prior(seed: int, tmp_path: Path) -> None:
    """Theirs puts the prior on the second token: where there is none, −log Σ_k p(y|z_k), and no gradient for a retriever."""
    generator = lively(made("bart", tmp_path, seed=seed))
    generator.prefix = [1]
    torch.manual_seed(seed)
    question = asked(QUERIES[:2], [[0, 1, 2], [2, 3, 0]])
    ids, mask, rows = contexts(generator, question, same_length=False)
    labels, scores = torch.randint(3, 150, (2, 1)), torch.randn(2, 3, requires_grad=True)
    p = [[math.exp(next_logprobs(generator, prompt, ())[labels[b, 0]]) for prompt in rows[b]] for b in range(2)]
    prior = scores.detach().double().softmax(-1).tolist()
    mixed = [sum(w * own for w, own in zip(prior[b], p[b], strict=True)) for b in range(2)]
    true = -sum(map(math.log, mixed))
    pull = [[w - w * own / mixed[b] for w, own in zip(prior[b], p[b], strict=True)] for b in range(2)]
    found = theirs(RagSequenceForGeneration, generator, 3)(
        context_input_ids=ids, context_attention_mask=mask, doc_scores=scores, n_docs=3, reduce_loss=True,
        labels=torch.cat([torch.ones(2, 1, dtype=torch.long), labels], dim=1),
    ).loss  # fmt: skip
    (their_pull,) = torch.autograd.grad(found, scores, allow_unused=True)
    each = generator.forward({"input_ids": ids, "attention_mask": mask, "labels": labels.repeat_interleave(3, 0)})
    loss = -marginal_logprob(passage_logprobs(scores), each.view(2, 3, 1), labels >= 0, over="sequence").sum()
    loss.backward()
    assert loss.item() == pytest.approx(true, rel=1e-5)
    assert scores.grad.numpy() == pytest.approx(np.array(pull), abs=1e-4)
    assert float(scores.grad.abs().max()) > 1e-2
    assert found.item() == pytest.approx(-sum(math.log(sum(own)) for own in p), rel=1e-5)
    assert found.item() < true - 0.5
    assert their_pull is None or not their_pull.any()


# Missing hits


def test_their_retriever_takes_the_last_passage_for_a_missing_one_and_gives_it_the_prior(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="transformers' own index is a dataset")
    faiss = pytest.importorskip("faiss")
    vectors = np.array([[-8.0, 0.0], [-16.0, 0.0], [-24.0, 0.0]], dtype=np.float32)
    query = np.array([[1.0, 0.0]], dtype=np.float32)
    held = datasets.Dataset.from_dict({
        "title": ["one", "two", "three"], "text": ["first", "second", "third"], "embeddings": vectors.tolist(),
    })  # fmt: skip
    held.add_faiss_index("embeddings", metric_type=faiss.METRIC_INNER_PRODUCT)
    generator = made("bart", tmp_path)
    config = theirs(RagTokenForGeneration, generator, 5).config
    config.retrieval_vector_size, config.index_name = 2, "custom"
    index = CustomHFIndex(2, held)
    words = tiny.bert_tokenizer()
    retriever = RagRetriever(config, words, generator.tokenizer, index=index)
    given = retriever([words("when?")["input_ids"]], query, n_docs=5, return_tensors="pt")
    texts = generator.tokenizer.batch_decode(given["context_input_ids"], skip_special_tokens=True)
    assert given["doc_ids"][0].tolist() == [0, 1, 2, -1, -1]
    assert [text.partition(" /")[0].strip() for text in texts] == ["one", "two", "three", "three", "three"]
    scores = torch.bmm(torch.from_numpy(query)[:, None], given["retrieved_doc_embeds"].float().transpose(1, 2))[:, 0]
    assert scores.softmax(-1)[0].tolist() == pytest.approx([0.000168, 0, 0, 0.499916, 0.499916], abs=1e-6)
    values, rows = exact_search(query, [vectors], 5)
    assert rows[0].tolist() == [0, 1, 2, -1, -1]
    ours = passage_logprobs(torch.from_numpy(values), present=torch.from_numpy(rows >= 0)).exp()
    assert ours[0].tolist() == pytest.approx([0.999665, 0.000335, 0, 0, 0], abs=1e-6)


@pytest.fixture(scope="module")
def negative(tmp_path_factory: pytest.TempPathFactory) -> RAG:
    """Three passages; queries and passages lie on opposite sides, so that all inner products are below 0."""
    folder = tmp_path_factory.mktemp("negative")
    for name, bias in (("passages", 1.0), ("queries", -1.0)):
        file = tiny.sentence_encoder(folder / name, similarity="dot") / "model.safetensors"
        held = load_file(file)
        last = max(key for key in held if key.endswith("output.LayerNorm.bias"))
        save_file({**held, last: held[last] + bias}, file, metadata={"format": "pt"})
    tiny.bart(folder / "bart")
    rows = [{"id": name, "text": f"the tower of {name} was built in {1790 + n}"} for n, name in enumerate("abc")]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = Recipe.model_validate({
        "name": "negative", "retriever": {"k": 3}, "generator": {"model": str(folder / "bart"), "dtype": "float32"},
        "knowledge": {
            "path": folder / "kb", "documents": [folder / "rows.jsonl"], "chunk": None, "indexes": {"dense": {"kind": "dense"}},
            "encoder": {
                "model": str(folder / "passages" / "encoder"), "query_model": str(folder / "queries" / "encoder"),
                "dtype": "float32",
            },
        },
        "decode": {"kind": "rag_sequence", "max_new_tokens": 4},
    })  # fmt: skip
    build_knowledge(recipe.knowledge)
    system = RAG.open(recipe)
    lively(system.generator)
    return system


def weighed(system: RAG, query: str) -> tuple[np.ndarray, list[float]]:
    """Rows of all three passages, best first, and their prior by loops over plain numbers."""
    vector = system.retriever.encoder.embed_queries([query])[0].astype(np.float64)
    products = system.retriever.base.vectors.vectors(np.arange(3)).astype(np.float64) @ vector
    assert (products < -1).all()
    rows = np.argsort(-products)
    weights = np.exp(products[rows] - products.max())
    return rows, (weights / weights.sum()).tolist()


@pytest.mark.parametrize("given", [False, True], ids=["searched", "given"])
@pytest.mark.parametrize("over", ["sequence", "token"])
def test_an_index_smaller_than_k_with_negative_scores_in_the_loss(over: str, given: bool, negative: RAG) -> None:
    retriever, generator = negative.retriever, negative.generator
    aim = MarginalObjective(retriever, generator, MarginalSettings(kind="marginal", over=over, k=5, reduction="sum"))
    queries = [("who built the tower?", "odo"), ("when?", "1791")]
    found = retriever.index.search(Queries([], retriever.encoder.embed_queries([query for query, _ in queries])), 5)[1]
    assert (found[:, 3:] == -1).all()
    rows = [MarginalRow(*pair, own if given else None) for pair, own in zip(queries, found, strict=True)]
    true = 0.0
    for query, answer in queries:
        places, prior = weighed(negative, query)
        prompts = [generator.prompt.render(query, [retriever.base.corpus[int(row)]]) for row in places]
        steps = [[math.exp(value) for value in plain_logprobs(generator, prompt, answer)] for prompt in prompts]
        if over == "sequence":
            true -= math.log(sum(p * math.prod(own) for p, own in zip(prior, steps, strict=True)))
        else:
            true -= sum(math.log(sum(p * v for p, v in zip(prior, column, strict=True))) for column in zip(*steps, strict=True))
    aim.module.zero_grad()
    loss, figures = aim.loss(aim.collate(rows))
    loss.backward()
    assert loss.item() == pytest.approx(true, rel=1e-4)
    assert figures["absent"].item() == pytest.approx(0.4 if given else 0)
    assert all(torch.isfinite(p.grad).all() for part in aim.parameters().values() for p in part if p.grad is not None)


@pytest.mark.parametrize("kind", ["rag_sequence", "rag_token"])
def test_an_index_smaller_than_k_with_negative_scores_in_the_decodings(kind: str, negative: RAG) -> None:
    retriever, generator, query = negative.retriever, negative.generator, "who built the tower?"
    found = retriever.index.search(Queries([query], retriever.encoder.embed_queries([query])), 5)
    hits = tuple(
        Hit(retriever.base.corpus[row], row, score, rank)
        for rank, (score, row) in enumerate(zip(found[0][0].tolist(), found[1][0].tolist(), strict=True), 1)
        if row >= 0
    )
    rows, prior = weighed(negative, query)
    assert [hit.row for hit in hits] == rows.tolist()
    question = Asked([query], [hits], retriever.prior([query], [hits]))
    if kind == "rag_sequence":
        answer = rag_sequence(generator, question, RagSequenceDecode(kind=kind, max_new_tokens=4))[0]
    else:
        answer = rag_token(generator, question, RagTokenDecode(kind=kind, max_new_tokens=4))[0]
    assert list(answer.prior) == pytest.approx(prior, abs=1e-5)
    assert sum(answer.posterior) == pytest.approx(1, abs=1e-5)
    prompts = [generator.prompt.render(query, [hit.passage]) for hit in hits]
    each = torch.tensor([step_logprobs(generator, prompt, answer.ids) for prompt in prompts])
    over = kind.removeprefix("rag_")
    steps, weights = each.exp().double(), torch.tensor(prior, dtype=torch.float64)
    true = float((weights @ steps.prod(1)).log() if over == "sequence" else (weights @ steps).log().sum())
    assert answer.logprob == pytest.approx(true, abs=1e-3)
    again = negative.answer([query])[0]
    assert [hit.row for hit in again.hits] == rows.tolist()
    with pytest.raises(RecipeError, match="holds 3 passages"):
        retriever.retrieve([query], 5)
