"""What an epoch of R-ft costs, against a trainer that asks the language model and encodes the passages anew at every step.

    make bench-r-ft         (two threads, about five minutes on a quiet machine; --quick: under one, and no verdict)

A causal language model of some 20 M parameters, a sentence encoder of some 11 M, random weights, one vocabulary of 32,000
words (`--words`); an epoch is one step of 16 questions with 10 passages each, prompts of some 160 tokens, answers of 2 to 6.
Three trainers begin with the same weights and learn by the same loss with the same optimizer, in one process, in turns:

    plain       each epoch: the language model on every pair, one at a time, with logits at every position; the passages
                encoded without gradient; one step of the query encoder
    half-plain  scores made once, outside its time; each epoch the passages encoded; one step
    raglan      scores out of the table, passage vectors out of the index, `LsrObjective`; one step

The plain side is what one writes with transformers and sentence-transformers and no more thought: models in eval mode, no
gradient where none is wanted, `SentenceTransformer.encode` in its own batches sorted by length. Its prompts are tokenised
before the clock starts; raglan's are in its time. Nothing of raglan is in it but the tokens of the prompts.

A round is three epochs of each. An epoch's time is the median of all epochs of all rounds; a whole R-ft is a round, for raglan
with a table made from nothing (weights named, prompts rendered, scores written and synced). Neither side's time has the
search for candidates or the index in it, which both need once. Token scores must agree to 1e-4, and the losses of all nine
epochs of a round to 1e-3. Hooks on the models count rows, tokens and logits; they are on during the whole run, for all.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scores import WORDS, model
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertModel

from raglan.encoder import Encoder
from raglan.generator import HFGenerator, encode_prompts
from raglan.knowledge import build_knowledge
from raglan.objective import LsrObjective
from raglan.objective.lsr import LsrRow
from raglan.quiet import quietly
from raglan.recipe import EncoderSettings, KnowledgeSettings
from raglan.recipe import LsrObjective as LsrSettings
from raglan.retriever import Retriever
from raglan.scores import Pair, ScoreTable

K, EPOCHS, TAU, GAMMA, RATE = 10, 3, 0.1, 0.05, 1e-5
CHOICES, CHOICE_TOKENS = 4, 3


@dataclass
class Counts:
    """What the models were asked for: rows and tokens of the language model, rows of V logits, the most numbers of V at
    once, passages encoded."""

    rows: int = 0
    tokens: int = 0
    logits: int = 0
    peak: int = 0
    passages: int = 0


@dataclass
class Work:
    """The same work for all sides: questions, their candidates and answers, and the models."""

    generator: HFGenerator
    retriever: Retriever
    pairs: list[Pair]
    queries: list[str]
    candidates: np.ndarray  # (B,K)
    prompts: list[dict[str, list[int]]] = field(default_factory=list)  # for the plain side, one a pair


class Learner:
    """A query tower and its optimizer."""

    def __init__(self, tower: SentenceTransformer):
        self.tower = tower.train()
        self.optimiser = torch.optim.AdamW([p for p in tower.parameters() if p.requires_grad], lr=RATE)

    def step(self, loss: Tensor) -> float:
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return float(loss.detach())


# The plain side: transformers, sentence-transformers and torch


def plain_scores(work: Work) -> list[np.ndarray]:
    """log p of each answer's tokens, one pair at a time, logits at all positions."""
    found = []
    for row in work.prompts:
        ids, first = torch.tensor([row["input_ids"] + row["labels"]]), len(row["input_ids"])
        with torch.no_grad():
            logprobs = work.generator.model(input_ids=ids).logits.log_softmax(-1)[0, first - 1 : -1]
        found.append(logprobs.gather(1, ids[0, first:, None])[:, 0].numpy())
    return found


def plain_step(work: Work, learner: Learner, scores: Sequence[np.ndarray]) -> float:
    """Passages encoded, one step: KL(p‖q), p over cosines/γ, q over mean log-probabilities/τ."""
    texts = [pair.passages[0].text for pair in work.pairs]
    tower = work.retriever.encoder.passage_tower
    vectors = tower.encode(texts, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False)
    features = learner.tower.preprocess(work.queries)
    asked = torch.nn.functional.normalize(learner.tower(features)["sentence_embedding"], dim=-1)
    # encode() works in inference mode, whose tensors autograd refuses
    log_p = ((asked[:, None] * vectors.clone().view(len(asked), K, -1)).sum(-1) / GAMMA).log_softmax(-1)
    log_q = (torch.tensor([float(own.mean()) for own in scores]).view(len(asked), K) / TAU).log_softmax(-1)
    return learner.step((log_p.exp() * (log_p - log_q)).sum(-1).mean())


# raglan's side


def scored(work: Work, folder: Path) -> tuple[ScoreTable, np.ndarray]:
    table = ScoreTable(folder, work.generator)
    return table, table.complete(work.pairs)


def rows_of(work: Work, table: ScoreTable, keys: np.ndarray) -> list[LsrRow]:
    sums, lengths = (values.reshape(-1, K) for values in table.sums(keys))
    asked = zip(work.queries, work.candidates, sums, lengths, strict=True)
    return [LsrRow(query, rows, own, int(tokens[0])) for query, rows, own, tokens in asked]


def raglan_step(objective: LsrObjective, learner: Learner, rows: Sequence[LsrRow]) -> float:
    return learner.step(objective.loss(objective.collate(rows))[0])


# A round: three epochs of each side, from the same weights


@dataclass
class Round:
    """Seconds of each epoch by side, of the scoring, and what was counted."""

    epochs: dict[str, list[float]]
    scoring: float
    counted: dict[str, Counts]
    again: Counts


def one_round(work: Work, counts: Counts, folder: Path) -> Round:
    epochs: dict[str, list[float]] = {"plain": [], "half-plain": [], "raglan": []}
    losses: dict[str, list[float]] = {name: [] for name in epochs}
    told = {name: Counts() for name in (*epochs, "scoring")}

    def timed(name: str, act: Callable[[], Any]) -> tuple[float, Any]:
        gc.collect()
        before, began = copy.copy(counts), time.perf_counter()
        made = act()
        took = time.perf_counter() - began
        for each in ("rows", "tokens", "logits", "passages"):
            setattr(told[name], each, getattr(told[name], each) + getattr(counts, each) - getattr(before, each))
        return took, made

    counts.peak = 0
    scoring, (table, keys) = timed("scoring", lambda: scored(work, folder))
    told["scoring"].peak = counts.peak
    original = work.retriever.encoder.query_tower
    objective = LsrObjective(work.retriever, settings_of())
    plain, half = (Learner(copy.deepcopy(original)) for _ in range(2))
    ours = Learner(objective.towers["query_encoder"])
    fresh: list[np.ndarray] = []
    values = table.token_logprobs(keys)

    def plain_epoch() -> float:
        fresh[:] = plain_scores(work)
        return plain_step(work, plain, fresh)

    acts: dict[str, Callable[[], float]] = {
        "plain": plain_epoch,
        "half-plain": lambda: plain_step(work, half, values),
        "raglan": lambda: raglan_step(objective, ours, rows_of(work, table, keys)),
    }
    for _ in range(EPOCHS):
        for name, act in acts.items():
            seconds, loss = timed(name, act)
            epochs[name].append(seconds)
            losses[name].append(loss)
    apart = max(float(np.abs(a - b).max()) for a, b in zip(fresh, values, strict=True))
    assert apart < 1e-4, f"scores differ by {apart}"
    for name in ("half-plain", "raglan"):
        assert np.allclose(losses[name], losses["plain"], rtol=1e-3), f"{name}: {losses[name]} not {losses['plain']}"
    return Round(epochs, scoring, told, second_run(work, counts, folder))


def second_run(work: Work, counts: Counts, folder: Path) -> Counts:
    """What the models are asked for by a run with another target, τ, γ and direction, over the same table."""
    before = copy.copy(counts)
    table, keys = scored(work, folder)
    other = settings_of(target="sum_logprob", tau=2.0, gamma=0.02, direction="target_first")
    objective = LsrObjective(work.retriever, other)
    raglan_step(objective, Learner(objective.towers["query_encoder"]), rows_of(work, table, keys))
    return Counts(rows=counts.rows - before.rows, passages=counts.passages - before.passages)


def settings_of(**other: Any) -> LsrSettings:
    told = {"target": "mean_logprob", "tau": TAU, "gamma": GAMMA, "direction": "student_first", **other}
    return LsrSettings(kind="lsr", k=K, **told)


@contextmanager
def counted(work: Work) -> Iterator[Counts]:
    """Hooks on the language model's embeddings and head, and on the passage tower."""
    counts, lm = Counts(), work.generator.model

    def embedded(_: Any, given: tuple[Tensor, ...]) -> None:
        counts.rows, counts.tokens = counts.rows + len(given[0]), counts.tokens + given[0].numel()

    def headed(_: Any, __: Any, logits: Tensor) -> None:
        counts.logits += logits.numel() // logits.shape[-1]
        counts.peak = max(counts.peak, logits.numel())

    def encoded(_: Any, given: tuple[dict[str, Tensor], ...]) -> None:
        counts.passages += len(given[0]["input_ids"])

    handles = [
        lm.get_input_embeddings().register_forward_pre_hook(embedded),
        lm.get_output_embeddings().register_forward_hook(headed),
        work.retriever.encoder.passage_tower[0].register_forward_pre_hook(encoded),
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def choices_shared(work: Work, counts: Counts) -> tuple[int, int]:
    """Tokens through the language model for four choices with each of K passages: alone, and behind a shared prefix."""
    generator = work.generator
    pairs = work.pairs[:K]
    prompts = [generator.prompt.render(pair.query, pair.passages) for pair in pairs]
    answers = [" ".join(f"w{CHOICES * n + t}" for t in range(CHOICE_TOKENS)) for n in range(CHOICES)]
    ids = [generator.answer_ids(answer)[:-1] for answer in answers]
    alone = sum(len(prompt.ids) + len(own) for prompt in prompts for own in ids)
    before = counts.tokens
    asked = [(row, own) for row in range(K) for own in ids]
    together = encode_prompts(generator, prompts).score([row for row, _ in asked], [own for _, own in asked])
    shared = counts.tokens - before
    with torch.no_grad():
        for (row, own), values in zip(asked[:CHOICES], together, strict=False):
            whole = torch.tensor([[*prompts[row].ids, *own]])
            logprobs = generator.model(input_ids=whole).logits.log_softmax(-1)[0, len(prompts[row].ids) - 1 : -1]
            assert torch.allclose(logprobs.gather(1, whole[0, -len(own) :, None])[:, 0], values, atol=1e-4)
    return alone, shared


# The models and texts


def make(folder: Path, questions: int, longest: int, words: int) -> Work:
    """A language model, an encoder, and a knowledge base with K passages of its own for each question."""
    chance = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(f"w{chance.randrange(WORDS - 8)}" for _ in range(chance.randint(least, most)))

    generator = model(folder / "model", 16384, words)
    told = [{"id": f"p{n}", "title": "", "text": text(longest * 3 // 4, longest)} for n in range(questions * K)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    named = EncoderSettings(model=str(sentence_encoder(folder)), dtype="float32")
    settings = {"path": folder / "kb", "documents": folder / "corpus.jsonl", "chunk": None, "encoder": named}
    base = build_knowledge(KnowledgeSettings(**settings, indexes={"dense": {"kind": "dense"}}))
    retriever = Retriever(base, Encoder.open(named), index="dense")
    retriever.encoder.split()
    asked = [(text(8, 16), text(2, 6)) for _ in range(questions)]
    candidates = np.array(chance.sample(range(questions * K), questions * K), np.int64).reshape(questions, K)
    pairs = [
        Pair(query, (base.corpus[int(at)],), answer)
        for (query, answer), rows in zip(asked, candidates, strict=True)
        for at in rows
    ]
    prompts = [generator.row(generator.prompt.render(pair.query, pair.passages), pair.answer) for pair in pairs]
    return Work(generator, retriever, pairs, [query for query, _ in asked], candidates, prompts)


def sentence_encoder(folder: Path) -> Path:
    """BERT of four layers, 256 wide, with the language model's words; mean pooling, cosine, no dropout."""
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "model"))
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024,
        max_position_embeddings=256, pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(str(folder / "bert"))
    tokenizer.save_pretrained(str(folder / "bert"))
    parts = [Transformer(str(folder / "bert"), max_seq_length=256), Pooling(256)]
    SentenceTransformer(modules=parts, similarity_fn_name="cosine", device="cpu").save(
        str(folder / "encoder"), create_model_card=False
    )
    return folder / "encoder"


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--queries", type=int, default=16, help="questions a step, on all sides")
    words.add_argument("--rounds", type=int, default=5, help="rounds of three epochs a side")
    words.add_argument("--threads", type=int, default=2)
    words.add_argument("--words", type=int, default=WORDS, help="the language model's vocabulary; Llama 3 has 128256")
    words.add_argument("--quick", action="store_true", help="two questions a step, one round: only that it runs")
    asked = words.parse_args()
    torch.set_num_threads(asked.threads)
    queries, rounds, longest = (2, 1, 40) if asked.quick else (asked.queries, asked.rounds, 160)
    with tempfile.TemporaryDirectory() as folder:
        with quietly():
            work = make(Path(folder), queries, longest, asked.words)
        with counted(work) as counts:
            one_round(work, counts, Path(folder) / "warm")
            made = [one_round(work, counts, Path(folder) / f"scores{n}") for n in range(rounds)]
            report(work, made, choices_shared(work, counts), verdicts=not asked.quick)


def report(work: Work, rounds: Sequence[Round], choices: tuple[int, int], *, verdicts: bool) -> None:
    generator, encoder = work.generator, work.retriever.encoder
    sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (generator.model, encoder.passage_tower)]
    tokens = sum(len(row["input_ids"]) + len(row["labels"]) for row in work.prompts)
    targets = sum(len(row["labels"]) for row in work.prompts)
    pairs = len(work.pairs)
    print(
        f"language model {sizes[0]:.1f} M, encoder {sizes[1]:.1f} M parameters; {len(work.queries)} questions a step, K {K}, "
        f"{tokens / pairs:.0f} tokens a pair; {torch.get_num_threads()} thread(s); an epoch is one step; "
        f"medians of {len(rounds)} rounds of {EPOCHS} epochs a side\n"
    )
    epoch = {
        name: statistics.median(took for each in rounds for took in each.epochs[name]) for name in rounds[0].epochs
    }  # fmt: skip
    scoring = statistics.median(each.scoring for each in rounds)
    whole = {
        "plain": statistics.median(sum(each.epochs["plain"]) for each in rounds),
        "half-plain": statistics.median(sum(each.epochs["half-plain"]) + each.scoring for each in rounds),
        "raglan": statistics.median(sum(each.epochs["raglan"]) + each.scoring for each in rounds),
    }
    print("| trainer | epoch, s | scoring once, s | three epochs, s |\n|---|---|---|---|")
    for name, seconds in epoch.items():
        once = "none" if name == "plain" else f"{scoring:.2f}"
        print(f"| {name} | {seconds:.3f} | {once} | {whole[name]:.2f} |")
    told = rounds[-1].counted
    ours, again = told["raglan"], rounds[-1].again
    assert (ours.rows, ours.passages, again.rows, again.passages) == (0, 0, 0, 0), (ours, again)
    chunk = generator.settings.head_chunk * generator.model.config.vocab_size
    assert told["scoring"].peak <= chunk, told["scoring"].peak
    print("\n| figure | plain | raglan | ratio | target | verdict |\n|---|---|---|---|---|---|")
    _line("LM rows in epochs with a table", told["plain"].rows, ours.rows, None, "0", True)
    _line("LM rows of a second run: other target, τ, γ, direction", told["plain"].rows, again.rows, None, "0", True)
    _line("passages encoded in three epochs", told["plain"].passages, ours.passages, None, "0", True)
    fewer = told["plain"].rows / told["scoring"].rows
    _line("LM rows of a whole R-ft", told["plain"].rows, told["scoring"].rows, fewer, f"≥ {EPOCHS}", fewer >= EPOCHS)
    rows = told["scoring"].logits / told["scoring"].rows
    most = targets / pairs
    _line("vocabulary rows a scored row", f"{tokens / pairs:.0f}", f"{rows:.1f}", None, f"T = {most:.1f}", rows <= most)
    alone, shared = choices
    enough = alone >= 3 * shared
    _line(f"LM tokens, {CHOICES} choices × {K} passages", alone, shared, alone / shared, "≥ 3", enough, short=not verdicts)
    times = [
        ("epoch: plain ÷ raglan", epoch["plain"], epoch["raglan"], 50),
        ("epoch: half-plain ÷ raglan", epoch["half-plain"], epoch["raglan"], 8),
        ("three epochs, scoring included: plain ÷ raglan", whole["plain"], whole["raglan"], 8),
    ]
    for name, theirs, own, least in times:
        ratio = theirs / own
        _line(name, f"{theirs:.3f} s", f"{own:.3f} s", ratio, f"≥ {least}", ratio >= least, short=not verdicts)
    print(f"\npeak logits while scoring: {told['scoring'].peak * 4 / 2**20:.1f} MB, chunk·V·4 is {chunk * 4 / 2**20:.1f} MB")
    print("scores agree to 1e-4, losses of all epochs to 1e-3 (asserted)")


def _line(name: str, theirs: Any, ours: Any, ratio: float | None, target: str, met: bool, *, short: bool = False) -> None:
    verdict = "not said (--quick)" if short else "OK" if met else "FAIL"
    print(f"| {name} | {theirs} | {ours} | {'' if ratio is None else f'{ratio:.1f}'} | {target} | {verdict} |")


if __name__ == "__main__":
    main()
