"""Whether a small Self-RAG generator learned its tokens: grammar, decisions, and what they are worth.

    make bench-self-rag-learns      (SQuAD needs RAGLAN_DATA; about 40 minutes on 2 cores, most of it training)
    python benchmarks/self_rag_learns.py recipes/self_rag_tiny.yaml            what one trained recipe knows

Asked are questions that nothing was learned from, about documents that no learned question is about. Each is read beside a
passage that answers it and beside the best one found that does not; tasks that need no passage are made anew. Printed are

    grammar     rows that the parser takes, written greedily to their end token behind a forced decision and passage
    IsRel       balanced accuracy of rel > 0.5, one half being what a constant gets
    Retrieve    balanced accuracy of r > 0.5: questions about the corpus against tasks without it
    selection   exact match among the passages found: the critique-weighted score against the likelihood alone
    abstention  where unanswerable questions are given: F1 of saying so, where every passage is judged irrelevant, against the
                likelihood alone, whose threshold is the best there is for these very questions

Intervals are 95 % bootstraps over questions, the last two paired.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raglan.critique.sources import TASKS, _plain
from raglan.data import load_examples
from raglan.documents import read_examples
from raglan.metrics import Interval, answer_recall, bootstrap, exact_match, paired_bootstrap
from raglan.rag import RAG
from raglan.recipe import PruneSettings, Recipe, SelfRagDecode, load_recipe
from raglan.records import Example, Hit, Passage
from raglan.reflection import GrammarError, parse, rel, retrieve_probability
from raglan.stages import finished_parts

LIMIT, DEPTH = 40, 20
ALONE = {"seq": 1.0, "rel": 0.0, "sup": 0.0, "use": 0.0}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("recipe", type=Path)
    words.add_argument("--unanswerable", type=Path, help="questions without an answer, about the same corpus")
    words.add_argument("--limit", type=int, default=500, help="at most so many questions")
    words.add_argument("changes", nargs="*", help="key=value")
    asked = words.parse_intermixed_args()
    recipe = load_recipe(asked.recipe, asked.changes)
    assert recipe.evaluate is not None
    stage, parts = finished_parts(recipe)[-1]
    rag = parts.open(recipe)
    corpus = rag.retriever.base.corpus
    known = [example for example in load_examples(recipe.evaluate.questions, corpus) if example.relevant]
    examples = random.Random(0).sample(known, min(asked.limit, len(known)))
    print(f"{recipe.name}, stage {stage}: {len(examples)} held-out questions\n\n| figure | value | against | |")
    print("|---|---|---|---|")
    beside = [(corpus[corpus.row(example.relevant[0])], wrong(rag, example)) for example in examples]
    tasks = closed(recipe, rag, len(examples))
    grammar(rag, [e.query for e in examples], beside, tasks)
    decisions(rag, [e.query for e in examples], beside, tasks)
    selection(rag, examples)
    if asked.unanswerable:
        without = list(read_examples(asked.unanswerable))[: asked.limit]
        abstention(rag, examples, without)


def wrong(rag: RAG, example: Example) -> Passage:
    """The best passage found that neither is named relevant nor holds an answer."""
    for hit in rag.retriever.retrieve([example.query], DEPTH)[0]:
        passage = hit.passage
        if passage.id not in example.relevant and not answer_recall([f"{passage.title}\n{passage.text}"], example.answers):
            return passage
    return rag.retriever.base.corpus[0]


def closed(recipe: Recipe, rag: RAG, count: int) -> list[str]:
    """Tasks that need no passage, drawn anew, none of which was learned."""
    assert recipe.critique is not None
    learned = (recipe.critique.path / "annotation" / "train.jsonl").read_text(encoding="utf-8")
    corpus, made, number = rag.retriever.base.corpus, [], 0
    vocabulary = sorted({word for row in range(len(corpus)) for word in _plain(corpus[row].text)})
    while len(made) < count:
        chance = random.Random(f"held out/{number}")
        instruction, _ = chance.choice(TASKS)(chance, vocabulary)
        number += 1
        if instruction not in learned and instruction not in made:
            made.append(instruction)
    return made


def grammar(rag: RAG, queries: Sequence[str], beside: Sequence[tuple[Passage, Passage]], tasks: Sequence[str]) -> None:
    """Rows with a passage that answers, with one that does not, and without any."""
    generator: Any = rag.generator
    schema, prompt = generator.schema, generator.marked_prompt
    asked = [(query, prompt.passage(passage)) for query, pair in zip(queries, beside, strict=True) for passage in pair]
    asked += [(task, prompt.no_retrieval()) for task in tasks]
    roots = generator.contexts([prompt.question(query) for query, _ in asked], marks=schema.marks)
    branches = roots.branch(range(len(asked)), [forced for _, forced in asked])
    taken, faults = [], Counter[str]()
    for (_, forced), written in zip(asked, branches.write(stop_ids=(), max_new_tokens=LIMIT), strict=True):
        try:
            row = parse([*forced, *written.ids], schema, eos=generator.eos)
            taken.append(float(row.ended))
            faults["no end token within the limit"] += not row.ended
        except GrammarError as fault:
            taken.append(0.0)
            faults[str(fault).split(": ", 1)[-1][:70]] += 1
    common = "; ".join(f"{count} × {what}" for what, count in faults.most_common(3) if count)
    print(f"| rows on the grammar ({len(taken)}) | {_told(bootstrap(taken))} | ≥ 99 | {common} |")


def decisions(rag: RAG, queries: Sequence[str], beside: Sequence[tuple[Passage, Passage]], tasks: Sequence[str]) -> None:
    generator: Any = rag.generator
    schema, prompt = generator.schema, generator.marked_prompt
    roots = generator.contexts([prompt.question(query) for query in [*queries, *tasks]], marks=schema.marks)
    r = retrieve_probability(roots.mark_logprobs)
    right = []
    for place, name in enumerate(("answers it", "does not")):
        branches = roots.branch(range(len(queries)), [prompt.passage(pair[place]) for pair in beside])
        relevant = rel(branches.mark_logprobs) > 0.5
        right.append((relevant if not place else ~relevant).astype(float))
        print(f"| IsRel right where the passage {name} | {_told(bootstrap(right[-1].tolist()))} | | |")
    balanced = bootstrap(((right[0] + right[1]) / 2).tolist())
    print(f"| **IsRel, balanced accuracy** | {_told(balanced)} | 50 | {_verdict(balanced, 0.5)} |")
    wanted, spared = (r[: len(queries)] > 0.5).astype(float), (r[len(queries) :] <= 0.5).astype(float)
    balanced = bootstrap(((wanted + spared[: len(wanted)]) / 2).tolist())
    print(f"| **Retrieve, balanced accuracy** | {_told(balanced)} | 50 | {_verdict(balanced, 0.5)} |")


def selection(rag: RAG, examples: Sequence[Example]) -> None:
    """The same candidates, chosen in two ways."""
    found, right = {}, {}
    hits = rag.retriever.retrieve([example.query for example in examples], rag.k)
    for name, weights in (("weighted", {}), ("likelihood", ALONE)):
        answers = decided(rag, [e.query for e in examples], hits, weights=weights)
        found[name] = [answer.text for answer in answers]
        right[name] = [float(exact_match(text, e.answers)) for text, e in zip(found[name], examples, strict=True)]
    gold = [float(bool(answer_recall([h.passage.text for h in own], e.answers))) for own, e in zip(hits, examples, strict=True)]
    print(f"| answer among the {rag.k} passages | {_told(bootstrap(gold))} | | |")
    for name in found:
        print(f"| EM, {name} | {_told(bootstrap(right[name]))} | | |")
    gain = paired_bootstrap(right["likelihood"], right["weighted"])
    print(f"| **EM, weighted − likelihood** | {_told(gain, '+')} | 0 | {_verdict(gain, 0.0)} |", flush=True)


def abstention(rag: RAG, examples: Sequence[Example], without: Sequence[Example]) -> None:
    """Saying that nothing answers: by IsRel of all passages found, and by the likelihood of the answer."""
    queries = [e.query for e in [*examples, *without]]
    due = np.array([0.0] * len(examples) + [1.0] * len(without))
    hits = rag.retriever.retrieve(queries, rag.k)
    weighted = decided(rag, queries, hits, weights={})
    best = np.array([max((c["rel"] for c in (answer.trace or {})["candidates"] if c["rel"] is not None), default=0.0)
                     for answer in weighted])  # fmt: skip
    plain = np.array([answer.logprob for answer in decided(rag, queries, hits, weights=ALONE)])
    thresholds = np.unique(np.quantile(plain, np.linspace(0, 1, 201)))
    alone = max(((plain <= threshold) for threshold in thresholds), key=lambda said: f1(said, due))
    chance, by_rel, by_all = np.random.default_rng(0), [], []
    for _ in range(2000):
        drawn = chance.integers(len(due), size=len(due))
        by_rel.append(f1((best < 0.5)[drawn], due[drawn]))
        by_all.append(f1(alone[drawn], due[drawn]))
    gain = np.subtract(by_rel, by_all)
    for name, said, draws in (("IsRel", best < 0.5, by_rel), ("likelihood, best threshold", alone, by_all)):
        interval = Interval(f1(said, due), *np.quantile(draws, [0.025, 0.975]), len(due))
        print(f"| abstention F1, {name} | {_told(interval)} | {100 * f1(np.ones_like(due), due):.1f} if always | |")
    difference = Interval(f1(best < 0.5, due) - f1(alone, due), *np.quantile(gain, [0.025, 0.975]), len(due))
    print(f"| **abstention F1, IsRel − likelihood** | {_told(difference, '+')} | 0 | {_verdict(difference, 0.0)} |", flush=True)


def f1(said: np.ndarray, due: np.ndarray) -> float:
    right = float((said * due).sum())
    return 2 * right / (float(said.sum()) + float(due.sum())) if right else 0.0


def decided(rag: RAG, queries: Sequence[str], hits: Sequence[Sequence[Hit]], *, weights: dict[str, float]) -> list[Any]:
    """Answers with these weights, every passage read."""
    assert isinstance(rag.decode, SelfRagDecode)
    before = rag.decode
    changes = {"retrieve": "always", "prune": PruneSettings(kind="none"), "weights": before.weights.model_copy(update=weights)}
    rag.decode = before.model_copy(update=changes)
    try:
        return rag.read(queries, hits)
    finally:
        rag.decode = before


def _told(interval: Interval, sign: str = "") -> str:
    mean, low, high = (100 * value for value in (interval.mean, interval.low, interval.high))
    return f"{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def _verdict(interval: Interval, least: float) -> str:
    return "OK" if interval.low > least else "FAIL"


if __name__ == "__main__":
    main()
