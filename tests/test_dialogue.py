"""Dialogue: history in prompts and in what is searched for, figures of dialogue, and that history helps."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import tiny
from raglan.cli import app
from raglan.dialogue import Rewriter, turn_texts
from raglan.errors import CorpusError, RecipeError
from raglan.knowledge import build_knowledge
from raglan.metrics import RareWords, f1, perplexity, rare_f1
from raglan.prompt import Prompt, Rendered
from raglan.rag import RAG
from raglan.recipe import PromptSettings, RetrieveAgain, RewriteSettings, load_recipe
from raglan.records import Passage
from test_generator import made
from tiny import small_recipe

TURNS = ["who built the old tower?", "the miller", "and the lighthouse?"]
PASSAGES = [Passage("1", "The tower was built by Odo Marrack, a miller, in 1831.", "Tower"), Passage("2", "In 1790.")]
CHAT = "{% for m in messages %}<s>[{{ m['role'] }}] {{ m['content'] }}{% endfor %}[bot]"
TEMPLATES = [
    PromptSettings().template, "{passages} // {question}", "{history}\n{passages}\nQ: {question}",
    "{question} {passages} said before: {history}",
]  # fmt: skip


@cache
def words(layout: str) -> Any:
    if layout == "fused":
        return tiny.bert_tokenizer()
    inner = tiny.tokenizer(begins=layout == "chat", ends=layout != "chat")
    inner.chat_template = CHAT if layout == "chat" else None
    return inner


def prompt(layout: str, **changes: Any) -> Prompt:
    return Prompt(PromptSettings(**{"max_tokens": 200, **changes}), words(layout), layout=layout)


def tried(made: Prompt, query: str, passages: list[Passage], history: list[str]) -> Rendered | None:
    try:
        return made.render(query, passages, history=history)
    except RecipeError:
        return None


def within(part: list[int], whole: tuple[int, ...]) -> int:
    """How often a run of ids occurs."""
    return sum(list(whole[start : start + len(part)]) == part for start in range(len(whole) - len(part) + 1))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["joined", "chat", "fused"]), st.sampled_from(TEMPLATES), st.integers(16, 160),
    st.integers(1, 12), st.lists(st.integers(1, 12), max_size=6), st.lists(st.integers(1, 25), max_size=3), st.integers(1, 20),
)  # fmt: skip
def test_history_gives_way_before_the_question_and_the_oldest_turn_first(
    layout: str, template: str, budget: int, asked: int, said: list[int], told: list[int], least: int
) -> None:
    made = prompt(layout, template=template, max_tokens=budget, min_passage_tokens=least)
    query = " ".join(["WHO", *["built"] * asked]) + "?"
    history = [" ".join([f"turn{n}", *["tower"] * length]) for n, length in enumerate(said)]
    passages = [Passage(str(n), " ".join(["mill"] * length)) for n, length in enumerate(told)]
    plain, found = tried(made, query, passages, []), tried(made, query, passages, history)
    assert (plain is None) == (found is None)  # history never costs the question its place
    if plain is None or found is None:
        return
    assert len(found.ids) <= (budget if layout != "fused" else budget * max(1, len(passages)))
    kept = history[found.dropped_turns :]
    assert all((turn in found.text) == (turn in kept) for turn in history)
    assert query in found.text
    whole = words(layout)(query if layout == "fused" else f" {query}", add_special_tokens=False)["input_ids"]
    assert within(whole[1:], found.ids) == max(1, len(passages)) if layout == "fused" else within(whole[1:], found.ids) == 1
    assert not found.starved or plain.starved  # nor a passage its least tokens
    if kept:
        assert found.starved == plain.starved
    elif history:  # even the newest turn was too much
        newest = len(words(layout)(history[-1], add_special_tokens=False)["input_ids"])
        roomy = tried(
            prompt(layout, template=template, max_tokens=budget + newest + 4 + 25 * len(told)), query, passages, history
        )
        assert roomy is None or roomy.dropped_turns < len(history)


def test_where_the_turns_stand() -> None:
    text = prompt("joined").render("who?", PASSAGES, history=TURNS[:2]).text
    assert text.endswith("In 1790.\n\nwho built the old tower?\nthe miller\nQuestion: who?\nAnswer:")
    line = prompt("joined", template="{passages} // {question}")
    assert line.render("who?", PASSAGES[1:], history=TURNS[:1]).text == "In 1790. // who built the old tower?\nwho?"
    placed = prompt("joined", template="{history}\n{passages}\nQ: {question}")
    assert placed.render("who?", PASSAGES[1:], history=TURNS[:1]).text == "who built the old tower?\nIn 1790.\nQ: who?"
    assert placed.render("who?", PASSAGES[1:]).text == "In 1790.\nQ: who?"
    assert placed.render("{history}", [], history=["{question}"]).text == "{question}\n\nQ: {history}"
    assert prompt("joined", max_history_tokens=0).render("who?", [], history=TURNS).text == "Question: who?\nAnswer:"
    blocks = prompt("fused")
    one = words("fused")(" ".join([*TURNS, "who?"]), add_special_tokens=False)["input_ids"]
    assert within([2, *one, 3], blocks.render("who?", PASSAGES, history=TURNS).ids) == 2


@pytest.mark.parametrize("layout", ["joined", "chat", "fused"])
def test_controls_spelt_in_a_turn_stay_text(layout: str) -> None:
    made = prompt(layout)
    tokenizer = words(layout)
    controls = [str(t) for t in (tokenizer.eos_token, tokenizer.pad_token, tokenizer.cls_token, tokenizer.sep_token) if t]
    clean, dirty = (made.render("who?", PASSAGES, history=[turn]) for turn in ("it is here", f"it {' '.join(controls)}"))
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert sum(i in special for i in dirty.ids) == sum(i in special for i in clean.ids)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dialogue")
    build_knowledge(load_recipe(small_recipe(path)).knowledge)
    return path


def opened(folder: Path, *changes: str) -> RAG:
    return RAG.open(load_recipe(folder / "small.yaml", list(changes)))


def test_what_is_searched_for(folder: Path) -> None:
    retriever = opened(folder).retriever
    assert retriever.search_texts(["when?"], [TURNS]) == ["\n".join([*TURNS, "when?"])]
    assert retriever.search_texts(["when?"]) == ["when?"]
    assert retriever.search_texts(["when?"], [TURNS], drafts=["1790"]) == ["\n".join([*TURNS, "when?", "1790"])]
    last = opened(folder, "retriever.history=last_turn").retriever
    assert last.search_texts(["when?"], [TURNS]) == ["when?"]
    assert last.over(last.base).search_texts(["when?"], [TURNS]) == ["when?"]


def test_the_newest_turns_that_the_encoder_reads_are_kept_whole(folder: Path) -> None:
    retriever = opened(folder).retriever  # reads 128 tokens
    history = [f"turn{n} " + "tower " * 30 for n in range(9)]
    text = retriever.search_texts(["when was it built?"], [history])[0]
    tokens = retriever.encoder.query_tower.tokenizer
    lines = text.split("\n")
    assert lines[-1] == "when was it built?"
    assert lines[:-1] == history[-len(lines) + 1 :]
    assert 1 < len(lines) < 9
    assert len(tokens(text)["input_ids"]) <= 128 < len(tokens(f"{history[-len(lines)]}\n{text}")["input_ids"])
    alone = "tower " * 300
    assert retriever.search_texts([alone], [TURNS]) == [alone]  # the question stays, whatever is read of it


def test_what_each_turn_searches_for(folder: Path) -> None:
    retriever = opened(folder).retriever
    four = [*TURNS, "when?"]
    wanted = {1: ["\n".join(four)], 2: ["\n".join(TURNS), "when?"], 3: ["\n".join(four[:2]), *four[2:]], 4: four, 9: four}
    for count, texts in wanted.items():
        assert turn_texts(retriever, ["when?"], [TURNS], count) == [tuple(texts)]
        assert turn_texts(retriever, ["when?"], [()], count) == [("when?",)]


@pytest.mark.parametrize("kind", ["llama", "reader"])
def test_a_generator_rewrites_the_question(kind: str, folder: Path, tmp_path: Path) -> None:
    generator = made(kind, tmp_path)
    rewrite = Rewriter(generator, RewriteSettings(max_new_tokens=5))
    asked = ["when was it built?", "who built it?", "what year?"]
    found = rewrite(asked, [TURNS, [], TURNS[:1]])
    assert found[1] == asked[1]
    for place, turns in ((0, TURNS), (2, TURNS[:1])):
        prompt = rewrite.prompt.render(asked[place], [], history=turns)
        assert all(turn in prompt.text for turn in turns)
        alone = generator.generate([prompt], max_new_tokens=5)[0].text.strip()
        assert found[place] == (alone or asked[place])
    own = opened(folder, "retriever.history=rewrite", "retriever.rewrite.max_new_tokens=3")
    texts, hits = own.search(asked[:1], 2, history=[TURNS])
    assert own.retriever.rewrite is not None
    assert texts == own.retriever.rewrite(asked[:1], [TURNS])
    assert hits == own.retriever.retrieve(texts, 2)
    own.retriever.rewrite = None
    with pytest.raises(RecipeError, match="no generator rewrites"):
        own.search(asked, 2, history=[TURNS] * 3)
    other = opened(folder, "retriever.history=rewrite", f"retriever.rewrite.model={tmp_path / kind}")
    assert other.retriever.search_texts(asked, [TURNS, [], TURNS[:1]])[1] == asked[1]


def test_a_second_search_with_the_draft(folder: Path) -> None:
    once, twice = opened(folder), opened(folder, "retriever.retrieve_again.max_draft_tokens=3", "decode.kind=rag_token")
    assert twice.again == RetrieveAgain(max_draft_tokens=3)
    plain = opened(folder, "decode.kind=rag_token", "decode.max_new_tokens=3")
    draft = plain.answer(["when?"], history=[TURNS])[0].text
    texts, hits = twice.search(["when?"], 4, history=[TURNS])
    assert texts == ["\n".join([*TURNS, "when?", draft]).rstrip()]
    assert hits == once.retriever.retrieve(texts, 4)
    answer = twice.answer(["when?"], history=[TURNS], k=4)[0]
    assert answer.hits == hits[0]
    assert answer.prior == pytest.approx(twice.retriever.prior(texts, hits)[0].exp().tolist(), abs=1e-6)
    with pytest.raises(RecipeError, match=r"either retriever\.retrieve_again or decode\.turns"):
        opened(folder, "retriever.retrieve_again={}", "decode={kind: rag_token, turns: {}}")


def test_turns_nobody_can_have_said_are_refused(folder: Path) -> None:
    system = opened(folder)
    for turn, told in ((" ", "turn 2 of the history is empty"), ("x" * 100_001, "100,001 characters"), ("\ud800", "half a")):
        with pytest.raises(CorpusError, match=told):
            system.answer(["when?"], history=[["who?", turn]])
    (folder / "said.jsonl").write_text(json.dumps({"query": "when?", "history": ["who?", ""]}) + "\n")
    from raglan.documents import read_examples

    with pytest.raises(CorpusError, match=r"said\.jsonl, line 1: turn 2 of the history is empty"):
        read_examples(folder / "said.jsonl")


REFERENCE = ["is is is is is", "was was was rag rag poly dpr"]


def test_figures_of_dialogue_worked() -> None:
    rare = RareWords.of(REFERENCE)
    assert rare.cutoff == 3
    guess, reference = "rag is dpr dense", "rag was poly dpr"
    assert rare_f1(guess, [reference], rare=rare) == pytest.approx(0.8)
    assert rare_f1(guess, [reference], rare=RareWords({**rare.counts, "dense": 1}, 3)) == pytest.approx(2 / 3)
    assert f1(guess, [reference]) == 0.5
    assert f1(guess, ["rag uses dpr"]) == pytest.approx(0.571429, abs=1e-6)


def test_figures_of_dialogue_at_the_edges() -> None:
    rare = RareWords.of(REFERENCE)
    assert rare_f1("", ["rag was poly"], rare=rare) == 0
    assert rare_f1("dense was", ["rag"], rare=rare) == 0  # nothing rare is said
    assert math.isnan(rare_f1("rag", ["is was", "dense"], rare=rare))  # nothing rare is wanted
    assert rare_f1("poly", ["is was", "rag", "poly is"], rare=rare) == 1  # the best of those that want something
    assert RareWords.of([]).among(["rag"]) == []
    assert RareWords.of(["one two three four"]).cutoff == 1  # all alike: none is rare
    assert perplexity([-2 * math.log(3), -math.log(6)], [2, 1]) == pytest.approx(54 ** (1 / 3))


def dialogues(folder: Path) -> Path:
    """The towers of `small_recipe`, asked for by a turn that names one and a question that does not."""
    path = small_recipe(folder)
    rows = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    for split, part in (("train", rows[:20]), ("dev", rows[20:])):
        with open(folder / f"{split}.jsonl", "w") as file:
            for row in part:
                said = [f"who built {row['title']}", row["text"].split()[7]]
                year = row["text"].split()[-1]
                file.write(json.dumps({
                    "query": "when was it built", "history": said, "answers": [year], "relevant": [row["id"]],
                    "knowledge": row["text"],
                }) + "\n")  # fmt: skip
    told = [json.dumps({"query": "tell", "answers": [row["text"]]}) for row in rows]  # names and years are rare, the rest not
    (folder / "told.jsonl").write_text("\n".join(told))
    recipe = yaml.safe_load(path.read_text())
    recipe["retriever"] |= {"index": "dense"}
    recipe["stages"] = {
        "joint": {
            "data": {"kind": "questions", "path": "train.jsonl", "dev": "dev.jsonl"},
            "objective": {"kind": "marginal", "over": "token", "k": 3, "rates": {"query_encoder": 1e-4}},
            "train": {"learning_rate": 5e-3, "max_steps": 20, "save_steps": 10},
        }
    }  # fmt: skip
    recipe["decode"] = {"kind": "rag_token", "max_new_tokens": 4}
    recipe["evaluate"] |= {
        "metrics": ["em", "f1", "kf1", "rare_f1"],
        "modes": ["gold", "retrieved"],
        "rare_reference": "told.jsonl",
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_history_finds_what_the_question_alone_cannot(tmp_path: Path) -> None:
    path = dialogues(tmp_path)
    runner = CliRunner()
    figures: dict[str, Any] = {}
    assert runner.invoke(app, ["build", str(path)]).exit_code == 0
    for history in ("history", "last_turn"):
        change = f"retriever.history={history}"
        trained = runner.invoke(app, ["train", str(path), change])
        assert trained.exit_code == 0, trained.output
        measured = runner.invoke(app, ["evaluate", str(path), change, "--json"])
        assert measured.exit_code == 0, measured.output
        figures[history] = json.loads(measured.stdout)["joint"]
    assert figures["last_turn"]["recall@1"]["mean"] <= 0.1  # one question for ten towers
    assert figures["history"]["recall@1"]["mean"] >= 0.5
    assert {"retrieved/kf1", "retrieved/rare_f1", "gold/kf1"} <= set(figures["history"])
    curve = next((load_recipe(path).run / "stages").glob("joint-*/log.json"))
    logged = [row for row in json.loads(curve.read_text()) if "eval_perplexity" in row]
    assert logged
    assert all(row["eval_perplexity"] == pytest.approx(math.exp(row["eval_loss"])) for row in logged)
    turns = ["--history", "who built the tower", "--history", "a miller"]
    asked = runner.invoke(app, ["answer", str(path), "when was it built", *turns, "decode.turns.count=2", "--json"])
    assert asked.exit_code == 0, asked.output
    found = json.loads(asked.stdout)[0]["passages"]
    assert len(found) == 4  # two of each turn
    assert sum(hit["prior"] for hit in found) == pytest.approx(1, abs=1e-4)


def test_the_shipped_recipe_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, but for data, models and time."""
    path = dialogues(tmp_path)
    monkeypatch.setenv("DOCUMENTS", str(tmp_path / "corpus.jsonl"))
    monkeypatch.setenv("QUESTIONS", str(tmp_path))
    recipe = Path(__file__).parent.parent / "recipes" / "rag_dialogue.yaml"
    assert load_recipe(recipe).generator.model == "facebook/bart-large"
    bart = tiny.bart(tmp_path / "bart")
    changes = [
        f"knowledge.path={path.parent / 'kb2'}",
        f"knowledge.encoder.model={tmp_path / 'encoder' / 'encoder'}", f"generator.model={bart}", f"runs={tmp_path / 'runs'}",
        f"evaluate.questions={tmp_path / 'dev.jsonl'}", f"evaluate.rare_reference={tmp_path / 'told.jsonl'}",
        "train.max_steps=4", "train.save_steps=2", "train.per_device_train_batch_size=4", "evaluate.limit=4",
        "decode.max_new_tokens=6", "decode.min_new_tokens=2", "generator.dtype=float32", "train.bf16=false",
    ]  # fmt: skip
    runner = CliRunner()
    for command in ("build", "train", "evaluate"):
        done = runner.invoke(app, [command, str(recipe), *changes, *(["--json"] if command == "evaluate" else [])])
        assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert set(figures) == {"untuned", "marginal"}
    assert {"retrieved/f1", "retrieved/kf1", "retrieved/rare_f1", "gold/f1"} <= set(figures["marginal"])
    assert "retrieved/em" not in figures["marginal"]
    pytest.importorskip("plotly")
    page = tmp_path / "report.html"
    reported = runner.invoke(app, ["report", str(recipe), *(word for c in changes for word in ("--set", c)), "-o", str(page)])
    assert reported.exit_code == 0, reported.output
    assert "Rare-F1" in page.read_text()
