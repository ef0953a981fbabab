"""What the query encoder learns from: halves of the corpus, shares of sources, candidates, scorers, and the dry run."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import tiny
from raglan.candidates import corpus_halves, lsr_candidates, lsr_examples, lsr_rows
from raglan.cli import app
from raglan.encoder import Encoder
from raglan.errors import CorpusError, RecipeError
from raglan.generator import HFGenerator
from raglan.knowledge import build_knowledge
from raglan.objective import LsrObjective as Lsr
from raglan.rag import RAG
from raglan.recipe import LsrMixData, LsrObjective, Recipe, load_recipe
from raglan.scores import Plan
from raglan.train import dry_run, train
from served import KEY, Served, serving

N = 8  # tokens of a half
LSR = LsrObjective(kind="lsr", k=4, tau=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of known words, cut with overlap, questions about some of them, and a recipe."""
    path = tmp_path_factory.mktemp("mix")
    chance = random.Random(5)
    (path / "docs").mkdir()
    words = ["the", "tower", "was", "built", "by", "miller", "in", "year", "who", "what", "of", "lighthouse", "founded"]
    for n in range(12):
        text = ". ".join(" ".join(chance.choices(words, k=9)) for _ in range(8)) + "."
        (path / "docs" / f"d{n}.txt").write_text(text)
    (path / "docs" / "short.txt").write_text("the tower was built.")
    rows = [
        {"id": f"q{n}", "query": f"who built tower {n}?", "answers": ["miller", "a miller"], "relevant": [f"d{n}.txt"]}
        for n in range(6)
    ]
    (path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    (path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[4:]))
    tiny.sentence_encoder(path / "encoder")
    tiny.llama(path / "llama")
    tiny.llama(path / "other", seed=3)
    (path / "mix.yaml").write_text(f"""
name: mix
seed: 1
knowledge:
  path: kb
  documents: docs
  chunk: {{max_tokens: 24, overlap: 12}}
  encoder: {{model: encoder/encoder, dtype: float32}}
retriever: {{k: 2, index: dense}}
prompt: {{max_tokens: 200}}
generator: {{model: llama, dtype: float32}}
data:
  kind: lsr_mix
  path: tasks.jsonl
  sources: {{corpus_halves: 0.8, tasks: 0.2}}
  half_tokens: {N}
  exclude_documents_of: [dev.jsonl]
objective: {{kind: lsr, k: 4, tau: 0.1}}
train: {{bf16: false, num_train_epochs: 3, per_device_train_batch_size: 4, learning_rate: 1e-3}}
""")
    build_knowledge(load_recipe(path / "mix.yaml").knowledge)
    return path


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Recipe:
    return load_recipe(folder / "mix.yaml")


@pytest.fixture(scope="module")
def system(recipe: Recipe) -> RAG:
    return RAG.open(recipe)


def mix(recipe: Recipe, **change: Any) -> LsrMixData:
    assert isinstance(recipe.data, LsrMixData)
    return LsrMixData.model_validate({**recipe.data.model_dump(), **change})


def test_halves_are_the_two_ends_of_long_passages(system: RAG) -> None:
    corpus, encoder = system.retriever.base.corpus, system.retriever.encoder
    lengths = [len(spans) for spans in encoder.spans([passage.text for passage in corpus])]
    made = corpus_halves(corpus, encoder, count=None, tokens=N)
    assert 10 < len(made) == sum(length >= 2 * N for length in lengths) < len(corpus)
    for example in made:
        passage, (y,) = corpus[corpus.row(example.id) or 0], example.answers
        assert passage.text.startswith(example.query)
        assert passage.text.endswith(y)
        assert len(example.query) + len(y) < len(passage.text)
        assert [len(spans) for spans in encoder.spans([example.query, y])] == [N, N]
        assert passage.start + passage.text.rindex(y) == example.metadata["half"]["begin"]
    assert corpus_halves(corpus, encoder, count=5, tokens=N, seed=2) == corpus_halves(
        corpus, encoder, count=5, tokens=N, seed=2
    )
    assert corpus_halves(corpus, encoder, count=5, tokens=N, seed=2) != corpus_halves(
        corpus, encoder, count=5, tokens=N, seed=3
    )
    without = corpus_halves(corpus, encoder, count=None, tokens=N, without=["d3.txt"])
    assert {corpus[corpus.row(e.id) or 0].document for e in made} - {
        corpus[corpus.row(e.id) or 0].document for e in without
    } == {"d3.txt"}


def test_what_holds_the_answer_is_no_candidate_and_k_are_left(recipe: Recipe, system: RAG) -> None:
    corpus = system.retriever.base.corpus
    examples = lsr_examples(mix(recipe), system, 1)
    _, candidates = lsr_candidates(examples, system, LSR)
    _, plain = system.retriever.search([example.query for example in examples], len(corpus))
    halves = dropped = neighbours = 0
    for example, rows, ranked in zip(examples, candidates.tolist(), plain.tolist(), strict=True):
        assert len({*rows}) == LSR.k
        assert -1 not in rows
        barred = set()
        if "half" in example.metadata:
            halves += 1
            own = corpus[corpus.row(example.id) or 0]
            begin = own.start + own.text.rindex(example.answers[0])
            same = [corpus.row(p.id) for p in corpus if p.document == own.document and p.start < own.end and begin < p.end]
            barred = {row for row in same if row is not None}
            neighbours += len(barred) > 1
        dropped += bool(barred & set(ranked[: LSR.k]))
        assert rows == [row for row in ranked if row not in barred][: LSR.k]
    assert halves > 10
    assert neighbours > 5  # the documents were cut with overlap
    assert dropped > 5


def test_shares_of_sources_and_documents_kept_out(recipe: Recipe, system: RAG, caplog: pytest.LogCaptureFixture) -> None:
    corpus = system.retriever.base.corpus

    def count(data: LsrMixData, seed: int = 1) -> tuple[int, int]:
        found = lsr_examples(data, system, seed)
        assert len({example.id for example in found}) == len(found)
        sources = [example.metadata["source"] for example in found]
        return sources.count("corpus_halves"), sources.count("tasks")

    assert count(mix(recipe)) == (16, 4)
    assert count(mix(recipe, count=10)) == (8, 2)
    assert count(mix(recipe, sources={"corpus_halves": 3, "tasks": 1})) == (12, 4)
    assert count(mix(recipe, sources={"tasks": 1}, exclude_documents_of=())) == (0, 4)
    halves, tasks = count(mix(recipe, sources={"corpus_halves": 1}, path=None))
    assert halves > 20
    assert tasks == 0
    assert count(mix(recipe, count=1000)) == (16, 4)
    assert "data.count is 1000, but the sources have 20 rows in these shares" in caplog.text
    assert lsr_examples(mix(recipe), system, 1) == lsr_examples(mix(recipe), system, 1)
    assert lsr_examples(mix(recipe), system, 1) != lsr_examples(mix(recipe), system, 2)
    used = {
        corpus[corpus.row(example.id) or 0].document
        for example in lsr_examples(mix(recipe, sources={"corpus_halves": 1}, path=None), system, 1)
    }
    assert used == {f"d{n}.txt" for n in range(12)} - {"d4.txt", "d5.txt"}
    with pytest.raises(CorpusError, match="no passage that may be used has 100 tokens"):
        lsr_examples(mix(recipe, half_tokens=50), system, 1)


def test_halves_have_a_target_of_their_own_and_no_end(recipe: Recipe, system: RAG, tmp_path: Path) -> None:
    examples = lsr_examples(mix(recipe), system, 1)
    rows = lsr_rows(examples, system, LSR, tmp_path / "scores")
    generator, corpus = system.generator, system.retriever.base.corpus
    for example, row in zip(examples, rows, strict=True):
        half = "half" in example.metadata
        prompt = generator.prompt.render(example.query, [corpus[int(row.candidates[0])]])
        values = generator.token_logprobs([prompt], [example.answers[0]], score_eos=not half)[0]
        assert row.source == ("corpus_halves" if half else "tasks")
        assert row.answer_logprobs[0] == pytest.approx(float(values.sum()), abs=1e-3)
        assert row.answer_length == len(values)
    apart = LsrObjective(kind="lsr", target="prob", corpus_halves={"target": "mean_logprob", "tau": 0.001})
    plain = LsrObjective(kind="lsr", target="prob")
    ours, theirs = (Lsr(system.retriever, settings).entropies(rows)[0] for settings in (apart, plain))
    for row, own, other in zip(rows, ours, theirs, strict=True):
        assert float(other) > 0.99
        assert (float(own) < 0.99) == (row.source == "corpus_halves")


def test_any_answer_is_the_sum_over_answers(recipe: Recipe, system: RAG, tmp_path: Path) -> None:
    data = mix(recipe, sources={"tasks": 1}, exclude_documents_of=())
    examples = lsr_examples(data, system, 1, every=True)
    assert {len(example.answers) for example in examples} == {2}
    rows = lsr_rows(examples, system, LSR.model_copy(update={"answers": "any"}), tmp_path / "scores")
    for example, row in zip(examples, rows, strict=True):
        prompt = system.generator.prompt.render(example.query, [system.retriever.base.corpus[int(row.candidates[1])]])
        each = [float(own.sum()) for own in system.generator.token_logprobs([prompt] * 2, example.answers)]
        assert row.answer_logprobs[1] == pytest.approx(np.logaddexp(*each), abs=1e-4)


def test_three_epochs_score_once_and_another_target_scores_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters: language-model rows over all epochs, and in a second run with other settings; passages encoded."""
    scored: list[int] = []
    encoded: list[int] = []
    inner, embed = HFGenerator.forward, Encoder.embed_passages

    def forward(self: HFGenerator, batch: dict[str, torch.Tensor], model: Any = None) -> torch.Tensor:
        scored.append(len(batch["labels"]))
        return inner(self, batch, model)

    def embed_passages(self: Encoder, texts: Any, **settings: Any) -> np.ndarray:
        encoded.append(len(texts))
        return embed(self, texts, **settings)

    monkeypatch.setattr(HFGenerator, "forward", forward)
    monkeypatch.setattr(Encoder, "embed_passages", embed_passages)
    recipe = load_recipe(folder / "mix.yaml", ["name=once"])
    told = dry_run(recipe)
    assert not scored
    plan = told["lsr"]
    assert isinstance(plan, Plan)
    assert (plan.on_disk, plan.to_score) == (0, plan.wanted)
    assert plan.wanted == 20 * 4
    result = CliRunner().invoke(app, ["train", str(folder / "mix.yaml"), "name=once", "--dry-run"])
    assert result.output.splitlines()[-1] == f"lsr: 80 rows wanted, 0 on disk, 80 to score ({plan.tokens:,} tokens)"
    assert not (recipe.run / "scores").exists()
    parts = train(recipe)
    trial = 2 * 3  # rows of `reads_trees`
    assert sum(scored) == 80 + trial  # a plain trainer asks 80 · 3
    assert dry_run(recipe) == {"lsr": "done"}
    changes = ["objective.tau=0.5", "objective.gamma=0.3", "objective.direction=target_first", "objective.score_eos=false"]
    other = train(load_recipe(folder / "mix.yaml", ["name=once", *changes]))
    assert other.query_encoder != parts.query_encoder
    assert sum(scored) == 80 + trial
    assert not encoded


@pytest.mark.parametrize("where", ["here", "served"])
def test_another_model_may_score(
    where: str, folder: Path, recipe: Recipe, system: RAG, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe's scorer, run here or served: its scores, and not the generator's."""
    examples = lsr_examples(mix(recipe), system, 1)[:5]
    local = load_recipe(folder / "mix.yaml", ["objective.scorer={model: other, dtype: float32}"])
    assert isinstance(local.objective, LsrObjective)
    rows = lsr_rows(examples, system, local.objective, tmp_path / "local")
    if where == "here":
        own = lsr_rows(examples, system, LSR, tmp_path / "own")
        assert all(np.abs(a.answer_logprobs - b.answer_logprobs).min() > 1e-3 for a, b in zip(rows, own, strict=True))
        return
    other = RAG.open(load_recipe(folder / "mix.yaml", ["generator.model=other"])).generator
    monkeypatch.setenv("TINY_KEY", KEY)
    with serving(Served(other.model, other.tokenizer)) as address:
        told = f"objective.scorer={{model: tiny, endpoint: '{address}', tokenizer: other, api_key_env: TINY_KEY}}"
        served = load_recipe(folder / "mix.yaml", [told])
        assert isinstance(served.objective, LsrObjective)
        assert str(served.objective.scorer.tokenizer) == str(folder / "other")  # type: ignore[union-attr]
        there = lsr_rows(examples, system, served.objective, tmp_path / "served")
    for a, b in zip(rows, there, strict=True):
        assert a.answer_logprobs.tolist() == pytest.approx(b.answer_logprobs.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.path=null", "sources.tasks and path belong together"),
        ("data.sources={corpus_halves: 1}", "sources.tasks and path belong together"),
        ("data.sources={tasks: 1}", "keeps documents out of corpus_halves"),
        ("data.sources={corpus_halves: 0}", "greater than 0"),
        ("objective={kind: answer}", "data of kind lsr_mix are for objective lsr"),
        ("objective.scorer={model: x, retry: 3}", "objective.scorer.retry: unknown key; did you mean 'retries'?"),
    ],
)
def test_faults_of_settings(folder: Path, change: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(folder / "mix.yaml", [change])
    assert message in str(caught.value)


def test_the_shipped_recipe_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is shipped, on tiny models and short halves: scored once, the best step by a real search kept."""
    documents = folder / "passages.jsonl"
    rows = [{"id": path.stem, "text": path.read_text()} for path in sorted((folder / "docs").glob("d*.txt"))]
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("DOCUMENTS", str(documents))
    monkeypatch.setenv("QUESTIONS", str(tmp_path))
    for name, source in (("train", "tasks"), ("dev", "dev")):
        text = (folder / f"{source}.jsonl").read_text().replace(".txt", "")
        (tmp_path / f"{name}.jsonl").write_text(text)
    encoder = {"model": str(folder / "encoder" / "encoder"), "dtype": "float32"}
    changes = [
        f"runs={tmp_path / 'runs'}", f"knowledge.path={tmp_path / 'kb'}", f"knowledge.encoder={json.dumps(encoder)}",
        f"generator.model={folder / 'llama'}", "generator.dtype=float32", "objective.k=4", f"data.half_tokens={N}",
        "data.sources={corpus_halves: 0.8, tasks: 0.2}", "train.max_steps=2", "train.eval_steps=1", "train.save_steps=1",
        "train.per_device_train_batch_size=4", "retriever.k=2", "evaluate.k=[1]",
    ]  # fmt: skip
    path = Path(__file__).parent.parent / "recipes" / "ra_dit_r_ft.yaml"
    for command in (["build"], ["train", "--dry-run"], ["train"]):
        done = CliRunner().invoke(app, [*command, str(path), *changes])
        assert done.exit_code == 0, done.output
    (stage,) = (tmp_path / "runs" / "ra-dit-r-ft" / "stages").iterdir()
    kept = json.loads((stage / "result" / "query_encoder" / "manifest.json").read_text())
    assert kept["gamma"] == 1.0
    log = json.loads((stage / "log.json").read_text())
    assert [row["step"] for row in log if "eval_mrr@10" in row] == [1, 2]
