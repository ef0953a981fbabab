"""Bridges to LlamaIndex and LangChain, tested against the packages themselves."""

from __future__ import annotations

import asyncio
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from raglan.bridges import ForeignRetriever, from_langchain, from_llama_index
from raglan.bridges import langchain as to_langchain
from raglan.bridges import llama_index as to_llama_index
from raglan.data import answer_rows
from raglan.documents import read_examples
from raglan.encoder import Encoder
from raglan.errors import CorpusError, MissingExtra, RecipeError
from raglan.exports import found_points
from raglan.knowledge import KnowledgeBase, build_knowledge, passage_text
from raglan.objective import AnswerObjective, LsrObjective, MarginalObjective
from raglan.pooled import retrieve_pooled
from raglan.rag import RAG
from raglan.recipe import (
    ConcatDecode,
    EncoderSettings,
    QuestionData,
    RagSequenceDecode,
    RagTokenDecode,
    load_recipe,
)
from raglan.recipe import (
    LsrObjective as LsrSettings,
)
from raglan.recipe import (
    MarginalObjective as MarginalSettings,
)
from raglan.records import Passage
from raglan.retriever import Retriever
from raglan.stages import Parts
from tiny import small_recipe

pytest.importorskip("llama_index.core")
pytest.importorskip("langchain_core")

ASKED = "who built the tower"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("bridges")
    build_knowledge(load_recipe(small_recipe(where)).knowledge)
    return where


@pytest.fixture(scope="module")
def system(folder: Path) -> RAG:
    return Parts().open(load_recipe(folder / "small.yaml"))


@pytest.fixture(scope="module")
def retriever(system: RAG) -> Retriever:
    return Retriever(system.retriever.base, system.retriever.encoder, index="dense")


@pytest.fixture(scope="module")
def two_towers(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    where = tmp_path_factory.mktemp("towers")
    query, passage = tiny.sentence_encoder(where / "query", seed=1), tiny.sentence_encoder(where / "passage", seed=2)
    return Encoder.open(EncoderSettings(model=str(passage), query_model=str(query), dtype="float32"))


@contextmanager
def counted(encoder: Encoder) -> Iterator[Counter[str]]:
    """How many texts went through each tower."""
    seen: Counter[str] = Counter()

    def count(name: str) -> Any:
        return lambda module, given: seen.update({name: len(given[0]["input_ids"])})

    towers = {"query": encoder.query_tower, "passage": encoder.passage_tower}
    hooks = [tower.register_forward_pre_hook(count(name)) for name, tower in towers.items()]
    yield seen
    for hook in hooks:
        hook.remove()


def langchain_store(retriever: Retriever) -> Any:
    """All passages in a vector store of LangChain's, embedded through our bridge."""
    from langchain_core.documents import Document
    from langchain_core.vectorstores import InMemoryVectorStore

    store = InMemoryVectorStore(to_langchain.as_embeddings(retriever))
    corpus = retriever.base.corpus
    store.add_documents([Document(id=p.id, page_content=passage_text(p), metadata={"title": p.title}) for p in corpus])
    return store


def llama_store(retriever: Retriever) -> Any:
    """All passages in an index of LlamaIndex', embedded through our bridge."""
    from llama_index.core import VectorStoreIndex
    from llama_index.core.schema import TextNode

    nodes = [TextNode(id_=p.id, text=passage_text(p)) for p in retriever.base.corpus]
    return VectorStoreIndex(nodes, embed_model=to_llama_index.as_embedding(retriever))


# ---- out


def test_llama_index_gets_our_passages(retriever: Retriever) -> None:
    ours = retriever.retrieve([ASKED], 4)[0]
    theirs = to_llama_index.as_retriever(retriever, similarity_top_k=4)
    found = theirs.retrieve(ASKED)
    assert [(n.node.node_id, n.node.text) for n in found] == [(hit.passage.id, hit.passage.text) for hit in ours]
    assert [n.score for n in found] == [hit.score for hit in ours]
    assert found[1].node.metadata["rank"] == 2
    assert found[1].node.metadata["title"] == ours[1].passage.title
    assert found[0].node.ref_doc_id == ours[0].passage.document
    assert [n.node.node_id for n in asyncio.run(theirs.aretrieve(ASKED))] == [n.node.node_id for n in found]
    theirs.similarity_top_k = 2
    assert len(theirs.retrieve(ASKED)) == 2
    theirs.similarity_top_k = 10_000
    assert len(theirs.retrieve(ASKED)) == len(retriever.base.corpus)
    with pytest.raises(CorpusError):
        theirs.retrieve(" ")


def test_a_node_is_embedded_again_as_it_was(retriever: Retriever) -> None:
    from llama_index.core.schema import MetadataMode

    hit = retriever.retrieve([ASKED], 1)[0][0]
    node = to_llama_index.as_retriever(retriever).retrieve(ASKED)[0].node
    assert node.get_content(MetadataMode.EMBED) == passage_text(hit.passage)
    again = to_llama_index.as_embedding(retriever).get_text_embedding(node.get_content(MetadataMode.EMBED))
    assert np.allclose(again, retriever.base.vectors.vectors(np.array([hit.row]))[0], atol=1e-5)


def test_langchain_gets_our_passages(retriever: Retriever) -> None:
    ours = retriever.retrieve([ASKED], 4)[0]
    theirs = to_langchain.as_retriever(retriever, k=4)
    found = theirs.invoke(ASKED)
    assert [(d.id, d.page_content) for d in found] == [(hit.passage.id, hit.passage.text) for hit in ours]
    assert [(d.metadata["score"], d.metadata["rank"]) for d in found] == [(hit.score, hit.rank) for hit in ours]
    assert found[0].metadata["knowledge"] == retriever.base.version
    assert len(theirs.invoke(ASKED, k=2)) == 2
    assert asyncio.run(theirs.ainvoke(ASKED)) == found
    assert asyncio.run(theirs.ainvoke(ASKED, k=1)) == found[:1]
    assert [len(documents) for documents in theirs.batch([ASKED, "who was the miller", "what year"])] == [4, 4, 4]
    chain = theirs | (lambda documents: " ".join(d.id for d in documents))
    assert chain.invoke(ASKED) == " ".join(hit.passage.id for hit in ours)


def test_a_knowledge_base_answers_by_its_hybrid_index(folder: Path) -> None:
    base = KnowledgeBase.open(folder / "kb")
    ours = Retriever(base, Encoder.open(base.settings.encoder), index="hybrid").retrieve([ASKED], 3)[0]
    assert [d.id for d in to_langchain.as_retriever(base, k=3).invoke(ASKED)] == [hit.passage.id for hit in ours]
    assert [n.node_id for n in to_llama_index.as_retriever(base, similarity_top_k=3).retrieve(ASKED)] == [
        hit.passage.id for hit in ours
    ]


def test_no_query_goes_through_the_passage_tower_and_no_passage_through_the_query_tower(two_towers: Encoder) -> None:
    texts = ["a tower was built", "a miller", "by the lighthouse"]
    llama, chain = to_llama_index.as_embedding(two_towers), to_langchain.as_embeddings(two_towers)
    queries = [
        lambda: llama.get_query_embedding(ASKED), lambda: asyncio.run(llama.aget_query_embedding(ASKED)),
        lambda: chain.embed_query(ASKED), lambda: asyncio.run(chain.aembed_query(ASKED)),
    ]  # fmt: skip
    for ask in queries:
        with counted(two_towers) as seen:
            vector = ask()
        assert seen == {"query": 1}
        assert np.allclose(vector, two_towers.embed_queries([ASKED])[0], atol=1e-6)
    passages = [
        lambda: llama.get_text_embedding_batch(texts), lambda: asyncio.run(llama.aget_text_embedding_batch(texts)),
        lambda: chain.embed_documents(texts), lambda: asyncio.run(chain.aembed_documents(texts)),
    ]  # fmt: skip
    for embed in passages:
        with counted(two_towers) as seen:
            vectors = embed()
        assert seen == {"passage": 3}
        assert np.allclose(vectors, two_towers.embed_passages(texts), atol=1e-5)
    with counted(two_towers) as seen:
        assert len(llama.get_text_embedding(texts[0])) == two_towers.dimension
    assert seen == {"passage": 1}
    assert not np.allclose(two_towers.embed_queries(texts), two_towers.embed_passages(texts), atol=1e-2)


def test_their_stores_find_with_our_towers(retriever: Retriever) -> None:
    ours = [hit.passage.id for hit in retriever.retrieve([ASKED], 3)[0]]
    assert [d.id for d in langchain_store(retriever).as_retriever(search_kwargs={"k": 3}).invoke(ASKED)] == ours
    assert [n.node_id for n in llama_store(retriever).as_retriever(similarity_top_k=3).retrieve(ASKED)] == ours


def test_inner_products_do_not_belong_in_a_cosine_store(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dot = Encoder.open(EncoderSettings(model=str(tiny.sentence_encoder(tmp_path, similarity="dot"))))
    with caplog.at_level(logging.WARNING, logger="raglan"):
        to_langchain.as_embeddings(dot)
    assert "inner product" in caplog.text


def test_a_missing_package_names_its_extra(retriever: Retriever, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, make, extra in (
        ("langchain_core", to_langchain.as_retriever, "langchain"), ("llama_index", to_llama_index.as_retriever, "llama-index"),
    ):  # fmt: skip
        package = to_langchain if extra == "langchain" else to_llama_index
        package._retriever_class.cache_clear()
        with monkeypatch.context() as without:
            for name in [name for name in sys.modules if name.split(".")[0] == module]:
                without.delitem(sys.modules, name)
            without.setitem(sys.modules, module, None)
            with pytest.raises(MissingExtra, match=rf"raglan\[{extra}\]"):
                make(retriever)


@pytest.mark.parametrize("page", ["quickstart.md", "concepts/bridges.md"])
def test_the_code_in_the_documents_runs(folder: Path, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    home = folder / "home"
    if not home.is_dir():
        (home / "build").mkdir(parents=True)
        (home / "build" / "mine").symlink_to(folder / "kb")
        (home / "mine.yaml").write_text((folder / "small.yaml").read_text())
        for name in ("kb", "encoder", "reader", "corpus.jsonl", "train.jsonl", "dev.jsonl"):
            (home / name).symlink_to(folder / name)
    monkeypatch.chdir(home)
    text = (Path(__file__).parent.parent / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    said: dict[str, Any] = {}
    for block in blocks:
        exec(block, said)
    assert len(said["nodes"]) == len(said["documents"]) == 4
    assert page == "quickstart.md" or said["answers"][0].hits


# ---- in


def both(retriever: Retriever, k: int) -> dict[str, ForeignRetriever]:
    """Their retrievers, set to find k, as ours."""
    return {
        "llama": from_llama_index(llama_store(retriever).as_retriever(similarity_top_k=k)),
        "chain": from_langchain(langchain_store(retriever).as_retriever(search_kwargs={"k": k})),
    }


def test_their_retrievers_find_what_they_are_asked_for(retriever: Retriever) -> None:
    queries = [ASKED, "who was the miller"]
    ours = retriever.retrieve(queries, 5)
    for foreign in both(retriever, 2).values():
        for k in (1, 5, 3):
            found = foreign.retrieve(queries, k)
            assert [[hit.passage.id for hit in row] for row in found] == [[hit.passage.id for hit in row[:k]] for row in ours]
            assert [hit.rank for hit in found[0]] == list(range(1, k + 1))
        first = foreign.retrieve([ASKED], 1)[0][0]
        assert foreign.base.corpus[first.row] == first.passage
        assert foreign.base.corpus.row(first.passage.id) == first.row
        with pytest.raises(CorpusError):
            foreign.retrieve([" "], 1)
        with pytest.raises(RecipeError, match="k is 0"):
            foreign.retrieve([ASKED], 0)


def test_their_own_settings_stay(retriever: Retriever) -> None:
    theirs = llama_store(retriever).as_retriever(similarity_top_k=2)
    from_llama_index(theirs).retrieve([ASKED], 4)
    assert theirs.similarity_top_k == 2
    chained = langchain_store(retriever).as_retriever(search_kwargs={"k": 2})
    from_langchain(chained).retrieve([ASKED], 4)
    assert chained.search_kwargs == {"k": 2}


def test_scores_become_a_prior_and_their_lack_a_uniform_one(retriever: Retriever, caplog: pytest.LogCaptureFixture) -> None:
    ours = retriever.retrieve([ASKED], 3)
    llama = from_llama_index(llama_store(retriever).as_retriever(), temperature=0.05)
    (prior,) = llama.prior([ASKED], llama.retrieve([ASKED], 3))
    assert torch.allclose(prior, retriever.prior([ASKED], ours)[0], atol=1e-3)  # ours is cosine over 0.05
    bridged = from_langchain(to_langchain.as_retriever(retriever), temperature=0.05)
    (same,) = bridged.prior([ASKED], bridged.retrieve([ASKED], 3))
    assert torch.allclose(same, retriever.prior([ASKED], ours)[0], atol=1e-5)
    silent = from_langchain(langchain_store(retriever).as_retriever())
    found = silent.retrieve([ASKED, "what year"], 3)
    with caplog.at_level(logging.WARNING, logger="raglan"):
        priors = silent.prior([ASKED, "what year"], found)
    assert all(torch.allclose(row, torch.full((3,), 1 / 3).log()) for row in priors)
    assert caplog.text.count("gives no scores") == 1


def test_without_ids_a_text_is_its_own_name(caplog: pytest.LogCaptureFixture) -> None:
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever

    class Fixed(BaseRetriever):
        def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
            return [Document(page_content="a miller"), Document(page_content="a baker"), Document(page_content="a miller")]

    foreign = from_langchain(Fixed())
    with caplog.at_level(logging.WARNING, logger="raglan"):
        first, second = foreign.retrieve([ASKED, "when"], 3)
    assert [hit.passage.text for hit in first] == ["a miller", "a baker"]
    assert [hit.row for hit in second] == [0, 1]
    assert len({hit.passage.id for hit in first}) == 2
    assert from_langchain(Fixed()).retrieve([ASKED], 1)[0][0].passage.id == first[0].passage.id
    assert "found 2 passages where 3 were asked for" in caplog.text


def test_two_texts_under_one_id_stay_two_passages() -> None:
    texts = {"a": "one", "b": "two"}
    foreign = ForeignRetriever(lambda query, k: [(Passage("same", texts[query]), 1.0)], "test")
    found = foreign.retrieve(["a", "b", "a"], 1)
    assert [row[0].passage.text for row in found] == ["one", "two", "one"]
    assert found[0][0].passage.id == "same" == found[2][0].passage.id != found[1][0].passage.id


def test_a_pool_takes_them_beside_our_own(retriever: Retriever) -> None:
    """They are asked with words, and never with vectors that another retriever's encoder made."""
    foreign = ForeignRetriever(lambda query, k: [(Passage(query, f"of {query}"), 1.0)], "test")
    (found,) = retrieve_pooled({"own": retriever, "theirs": foreign}, [ASKED], 3)
    assert [one.retriever for one in found] == ["own", "theirs", "own"]
    assert found[1].hit.passage.id == ASKED


def test_they_cannot_be_trained(retriever: Retriever, system: RAG) -> None:
    for name, foreign in both(retriever, 3).items():
        kind = "LlamaIndex VectorIndexRetriever" if name == "llama" else "LangChain VectorStoreRetriever"
        refused = [
            lambda: LsrObjective(foreign, LsrSettings(kind="lsr")),  # noqa: B023
            lambda: MarginalObjective(foreign, system.generator, MarginalSettings(kind="marginal", over="sequence", k=2)),  # noqa: B023
            lambda: foreign.score({}, torch.zeros(1, 1, 4)),  # noqa: B023
            lambda: RAG(foreign, system.generator, ConcatDecode(), 2).swap(),  # noqa: B023
            lambda: foreign.over(retriever.base),  # noqa: B023
        ]
        for train in refused:
            with pytest.raises(RecipeError, match=f"{kind} can retrieve, but it cannot") as told:
                train()
            assert "raglan build" in (told.value.hint or "")


@pytest.mark.parametrize(
    "decode",
    [
        ConcatDecode(max_new_tokens=4),
        RagSequenceDecode(kind="rag_sequence", max_new_tokens=4),
        RagTokenDecode(kind="rag_token", max_new_tokens=4),
    ],
)
def test_every_decoding_reads_what_they_found(retriever: Retriever, system: RAG, decode: Any) -> None:
    foreign = from_langchain(to_langchain.as_retriever(retriever), temperature=0.05)
    theirs = RAG(foreign, system.generator, decode, 2).answer([ASKED, "what year"], history=[["a miller"], []])
    ours = RAG(retriever, system.generator, decode, 2).answer([ASKED, "what year"], history=[["a miller"], []])
    assert [[hit.passage.id for hit in a.hits] for a in theirs] == [[hit.passage.id for hit in a.hits] for a in ours]
    assert [a.text for a in theirs] == [a.text for a in ours]
    assert np.allclose([a.logprob for a in theirs], [a.logprob for a in ours], atol=1e-4)
    assert theirs[0].knowledge == "LangChain RaglanRetriever"


def test_a_generator_learns_from_what_they_found(retriever: Retriever, folder: Path) -> None:
    generator = Parts().open(load_recipe(folder / "small.yaml")).generator
    examples = read_examples(folder / "train.jsonl")[:8]
    data = QuestionData(kind="questions", path=folder / "train.jsonl", source="retrieved", passages=2, passages_a_row=1)
    foreign = from_langchain(to_langchain.as_retriever(retriever))
    rows = answer_rows(examples, data, foreign, generator, 1)
    assert rows == answer_rows(examples, data, retriever, generator, 1)
    objective = AnswerObjective(generator)
    generator.model.train()
    optimizer = torch.optim.AdamW(objective.parameters()["generator"], lr=3e-3)
    losses = []
    for _ in range(6):
        loss, _ = objective.loss(generator.collate(rows))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    points = found_points(examples, foreign, k=2)
    assert [len(point.contexts) for point in points] == [2] * 8
    assert {point.retriever for point in points} == {foreign.fingerprint}


def test_a_fingerprint_names_what_is_found(retriever: Retriever, two_towers: Encoder) -> None:
    base, encoder = retriever.base, retriever.encoder
    names = {retriever.fingerprint, Retriever(base, encoder, index="bm25").fingerprint}
    names.add(Retriever(base, encoder, index="dense", history="last_turn").fingerprint)
    assert len(names) == 3
    assert Retriever(base, encoder, index="dense").fingerprint == retriever.fingerprint
    before, weight = two_towers.query_fingerprint, next(two_towers.query_tower.parameters()).data
    assert two_towers.query_fingerprint == before
    weight += 1.0
    assert two_towers.query_fingerprint != before
    weight -= 1.0
