"""R-ft on a toy: a tiny two-tower encoder, sixteen questions, eight passages each, one of them wanted.

    python benchmarks/fedrag_toy.py [--steps 300] [--rate 3e-3]

A correct loop goes from about two nats to below 0.05. raglan's own runs on it (`Retriever`, `LsrObjective`), and, where the
package `fed-rag` can be imported, so does FedRAG's public `HuggingFaceTrainerForLSR` on the same encoder, questions and
passages, with an untaught language model of two layers as its judge. For each are printed the first and the last loss, the
gradient's norm at the first step, and how many parameter tensors moved. Nothing is said of quality: the one question is
whether the query encoder gets a gradient at all.

fed-rag needs older libraries than raglan does, so it has an environment of its own, without raglan:

    python benchmarks/fedrag_toy.py --only raglan
    python -m venv scratch && scratch/bin/pip install "fed-rag[huggingface]==0.0.27" "transformers<4.56" \\
        "sentence-transformers<5" "datasets<5"
    scratch/bin/python benchmarks/fedrag_toy.py --only fed-rag
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import tiny

K, QUESTIONS, SEED = 8, 16, 0


def corpus() -> list[str]:
    """Passages that say who built what."""
    chance = np.random.default_rng(SEED)
    names = ["".join(chance.choice(list("bcdfgh"), 4)) for _ in range(2 * QUESTIONS)]
    return [f"the tower {name} was built by miller {name[::-1]}" for name in names]


def questions(passages: list[str]) -> list[tuple[str, str]]:
    return [(f"who built {text.split()[2]}", text.split()[-1]) for text in passages[:QUESTIONS]]


def ours(folder: Path, steps: int, rate: float) -> dict[str, float]:
    """raglan: a built knowledge base, a passage drawn for each question as the target, scores with a gradient."""
    from raglan.encoder import Encoder
    from raglan.knowledge import build_knowledge
    from raglan.objective import LsrObjective
    from raglan.objective.lsr import LsrRow
    from raglan.recipe import EncoderSettings, KnowledgeSettings
    from raglan.recipe import LsrObjective as LsrSettings
    from raglan.retriever import Retriever

    passages = corpus()
    rows = [{"id": f"p{n}", "title": "", "text": text} for n, text in enumerate(passages)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = EncoderSettings(model=str(tiny.sentence_encoder(folder / "encoder")), dtype="float32")
    settings = {"path": folder / "kb", "documents": folder / "corpus.jsonl", "chunk": None, "encoder": named}
    base = build_knowledge(KnowledgeSettings(**settings, indexes={"dense": {"kind": "dense"}}))
    retriever = Retriever(base, Encoder.open(named), index="dense")
    shared = {"target": "given", "tau": 0.1, "gamma": 0.02, "direction": "target_first"}
    objective = LsrObjective(retriever, LsrSettings(kind="lsr", k=K, **shared))
    chance = np.random.default_rng(SEED)
    made = []
    for query, _ in questions(passages):
        wanted = np.eye(K, dtype=np.float32)[chance.integers(K)]
        made.append(LsrRow(query, chance.choice(len(passages), K, replace=False), wanted, 1))
    batch = objective.collate(made)
    tower = objective.towers["query_encoder"]
    return followed(tower, lambda _: objective.loss(batch)[0], steps, rate)


def followed(tower: nn.Module, loss_of: Callable[[int], Tensor], steps: int, rate: float) -> dict[str, float]:
    """Adam on a tower: what was lost first and last, the first gradient's norm, and how much moved."""
    before = {name: p.detach().clone() for name, p in tower.named_parameters()}
    optimiser = torch.optim.Adam(tower.parameters(), lr=rate)
    losses, norms = [], []
    for step in range(steps):
        loss = loss_of(step)
        optimiser.zero_grad()
        if loss.requires_grad:
            loss.backward()
        norms.append(norm(tower.parameters()))
        optimiser.step()
        losses.append(float(loss.detach()))
    return {"first loss": losses[0], "last loss": losses[-1], "gradient norm": norms[0], "moved": moved(tower, before)}


def norm(parameters: Iterable[nn.Parameter]) -> float:
    return math.sqrt(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None))


def moved(tower: nn.Module, before: dict[str, Tensor]) -> float:
    return float(sum(not torch.equal(before[name], p) for name, p in tower.named_parameters()))


def old_sentence_encoder(folder: Path) -> str:
    """`tiny.sentence_encoder`, written by the sentence-transformers 4 that fed-rag needs."""
    from sentence_transformers import SentenceTransformer, models

    transformer = models.Transformer(str(tiny.bert(folder / "bert")), max_seq_length=128)
    SentenceTransformer(modules=[transformer, models.Pooling(32)], device="cpu").save(str(folder / "encoder"))
    return str(folder / "encoder")


def theirs(folder: Path, steps: int, rate: float) -> dict[str, float]:
    """FedRAG's public trainer on the same toy; its own collator retrieves, scores and hands floats to its loss."""
    from datasets import Dataset
    from fed_rag import RAGConfig, RAGSystem
    from fed_rag.data_structures import KnowledgeNode
    from fed_rag.generators.huggingface import HFPretrainedModelGenerator
    from fed_rag.knowledge_stores.in_memory import InMemoryKnowledgeStore
    from fed_rag.retrievers.huggingface.hf_sentence_transformer import HFSentenceTransformerRetriever
    from fed_rag.trainers.huggingface.lsr import HuggingFaceTrainerForLSR
    from sentence_transformers import SentenceTransformerTrainingArguments

    towers = [old_sentence_encoder(folder / name) for name in ("query", "context")]
    retriever = HFSentenceTransformerRetriever(query_model_name=towers[0], context_model_name=towers[1])
    passages = corpus()
    store = InMemoryKnowledgeStore()
    store.load_nodes([
        KnowledgeNode(
            embedding=retriever.encode_context(text).tolist(), node_type="text", text_content=text, metadata={"number": n}
        )
        for n, text in enumerate(passages)
    ])  # fmt: skip
    generator = HFPretrainedModelGenerator(model_name=str(tiny.llama(folder / "lm")), load_model_kwargs={"device_map": "cpu"})
    system = RAGSystem(knowledge_store=store, generator=generator, retriever=retriever, rag_config=RAGConfig(top_k=K))
    asked = questions(passages)
    rows = Dataset.from_dict({"query": [query for query, _ in asked], "response": [answer for _, answer in asked]})
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "out"), max_steps=steps, per_device_train_batch_size=QUESTIONS, learning_rate=rate,
        lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
    )  # fmt: skip
    trainer = HuggingFaceTrainerForLSR(rag_system=system, train_dataset=rows, training_arguments=arguments)
    inner: Any = trainer.hf_trainer_obj
    tower = inner.model
    batch = next(iter(inner.get_train_dataloader()))
    loss = inner.compute_loss(tower, batch)
    if loss.requires_grad:
        loss.backward()
    first = norm(tower.parameters())
    tower.zero_grad()
    before = {name: p.detach().clone() for name, p in tower.named_parameters()}
    trainer.train()
    losses = [row["loss"] for row in inner.state.log_history if "loss" in row]
    return {"first loss": float(loss), "last loss": losses[-1], "gradient norm": first, "moved": moved(tower, before)}


def main() -> None:
    parser = argparse.ArgumentParser(description="R-ft on a toy, by raglan and, where it is installed, by FedRAG")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--only", choices=["raglan", "fed-rag"], help="one loop, as in an environment that has not both")
    asked = parser.parse_args()
    loops = {"raglan": ours}
    if importlib.util.find_spec("fed_rag") is not None:
        loops["fed-rag"] = theirs
    loops = {name: loop for name, loop in loops.items() if asked.only in (None, name)}
    print(f"{'':10}{'first loss':>14}{'last loss':>14}{'gradient norm':>16}{'moved':>8}")
    for name, loop in loops.items():
        with tempfile.TemporaryDirectory() as folder:
            found = loop(Path(folder), asked.steps, asked.rate)
        print(
            f"{name:10}{found['first loss']:14.4f}{found['last loss']:14.4f}{found['gradient norm']:16.4f}{found['moved']:8.0f}"
        )
    if not loops or (asked.only is None and "fed-rag" not in loops):
        print("fed-rag is not installed: see the docstring")


if __name__ == "__main__":
    main()
