"""Instruction mix: shares, rows, markers, the seam, truncation, unanswerable rows, splits, data points; and that it learns."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from typer.testing import CliRunner

import tiny
from raglan.cli import app
from raglan.datapoints import points_figures, read_points, write_points
from raglan.errors import CheckpointError, CorpusError, GeneratorError, RecipeError
from raglan.generator import open_generator
from raglan.knowledge import build_knowledge
from raglan.metrics import answer_recall, f1
from raglan.mixture import Mixture, mix, mixture_shares
from raglan.objective import AnswerObjective
from raglan.rag import RAG
from raglan.recipe import GeneratorSettings, InstructionMix, PromptSettings, Recipe, load_recipe
from raglan.records import Context, DataPoint, Passage
from raglan.train import train
from raglan.trainer import stage_trainer
from tiny import small_recipe

ROOT = Path(__file__).parent.parent
TEMPLATE = "Background: {passages}\n\nQ: {question}\nA: "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 towers, tiny causal models, and a file of each kind of source about the towers."""
    path = tmp_path_factory.mktemp("mix")
    build_knowledge(load_recipe(small_recipe(path)).knowledge)
    tiny.llama(path / "llama")
    tiny.gpt2(path / "gpt2")
    tiny.bart(path / "bart")
    towers = [json.loads(line)["text"].split() for line in (path / "corpus.jsonl").read_text().splitlines()]
    rows: dict[str, list[dict[str, Any]]] = {"who": [], "when": [], "squad": [], "talk": [], "texts": []}
    for n, (_, _, name, _, _, _, _, miller, _, year) in enumerate(towers):
        rows["who"].append({"query": f"who built {name}", "answers": [miller, f"miller {miller}"], "relevant": [f"p{n}"]})
        rows["when"].append({"query": f"what year was {name} built", "answers": [year], "relevant": [f"p{n}"]})
        context = f"{miller} lived in a house beside the mill"
        rows["squad"].append({"query": f"who lived beside mill {n}", "answers": [miller], "context": context})
        rows["squad"].append({"query": f"who died beside mill {n}", "answers": [], "context": context})
        rows["talk"].append({"query": "and when", "history": [f"who built {name}", miller], "answers": [f"in {year}"]})
        rows["texts"].append({"text": f"mill {n} stood near the tower {name}"})
    for kind, found in rows.items():
        for split, part in (("train", found[:-10]), ("dev", found[-10:])):
            lines = [json.dumps({"id": f"{kind}{n}", **row}) for n, row in enumerate(part)]
            (path / f"{kind}.{split}.jsonl").write_text("\n".join(lines) + "\n")
    (path / "book.txt").write_text("The first paragraph\nof two lines.\n\n\nThe second.\n")
    return path


def opened(folder: Path, model: str = "llama", **prompt: Any) -> RAG:
    changes = [f"generator.model={folder / model}", f"prompt={json.dumps({'template': TEMPLATE, 'max_tokens': 400, **prompt})}"]
    return RAG.open(load_recipe(folder / "small.yaml", changes))


@pytest.fixture(scope="module")
def system(folder: Path) -> RAG:
    return opened(folder)


def data(folder: Path, sources: dict[str, Any], **settings: Any) -> InstructionMix:
    named = {
        name: {**source, **({"path": folder / source["path"]} if "path" in source else {})} for name, source in sources.items()
    }
    return InstructionMix.model_validate({"kind": "instruction_mix", "sources": named, "max_length": 512, **settings})


WHO = {"who": {"path": "who.train.jsonl"}}
ALL = {
    **WHO, "when": {"path": "when.train.jsonl", "query": "tower: {question}"},
    "squad": {"path": "squad.train.jsonl", "context": "gold"}, "talk": {"path": "talk.train.jsonl", "dialogue": True},
    "corpus": {"context": "none"},
}  # fmt: skip
SHARES = {"unsupervised": 0.10, "dialogue": 0.05}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def points(folder: Path) -> list[DataPoint]:
    return read_points(folder / "data")


def test_shares_of_the_rest_are_in_proportion_to_capped_sizes() -> None:
    sizes = {"web_questions": 3778, "gsm8k": 7473, "squad_v2": 130319}
    capped, plain = mixture_shares(sizes, cap=7500, rest=0.85), mixture_shares(sizes, cap=10**6, rest=0.85)
    assert capped == pytest.approx({"web_questions": 0.171260, "gsm8k": 0.338758, "squad_v2": 0.339982}, abs=5e-7)
    assert plain == pytest.approx({"web_questions": 0.022683, "gsm8k": 0.044869, "squad_v2": 0.782448}, abs=5e-7)


def test_rows_are_drawn_in_their_shares(system: RAG, folder: Path, tmp_path: Path) -> None:
    """The same three sizes a hundred times smaller, cap too; raw text and dialogue have the shares that they were given."""
    sizes = {"web_questions": 38, "gsm8k": 75, "squad_v2": 1303}
    for name, size in sizes.items():
        rows = [json.dumps({"id": str(n), "query": f"who built {n}", "answers": [f"{n}"]}) for n in range(size)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    sources = {name: {"path": tmp_path / f"{name}.jsonl"} for name in sizes}
    mixed = data(folder, {**ALL, **sources}, **SHARES, cap=75, rows=1500)
    mixed = mixed.model_copy(update={"sources": {n: s for n, s in mixed.sources.items() if n not in ("who", "when", "squad")}})
    mix(mixed, system, seed=1, folder=tmp_path)
    found = Counter(point.source for point in points(tmp_path))
    wanted = {"web_questions": 0.171260, "gsm8k": 0.338758, "squad_v2": 0.339982, "corpus": 0.10, "talk": 0.05}
    assert {name: count / found.total() for name, count in found.items()} == pytest.approx(wanted, abs=0.005)
    told = points_figures(tmp_path / "data")
    assert told["rows"] == dict(found)
    assert told["shares"]["gsm8k"] == pytest.approx(wanted["gsm8k"], abs=0.005)
    drawn = Counter(point.example_id for point in points(tmp_path) if point.source == "squad_v2")
    assert max(drawn.values()) == 3  # k̃ rows; no question twice before all have been asked
    assert len(drawn) > 150  # the cap limits the share, not what may be drawn
    assert max(Counter(p.example_id for p in points(tmp_path) if p.source == "web_questions").values()) == 9


def test_a_retrieved_example_has_a_row_for_each_passage(system: RAG, folder: Path, tmp_path: Path) -> None:
    mixture = mix(data(folder, WHO), system, seed=1, folder=tmp_path)
    made = points(tmp_path)
    assert len(mixture.rows) == len(made) == 60  # 20 questions, each once
    for identity in {point.example_id for point in made}:
        rows = [point for point in made if point.example_id == identity]
        texts = system.retriever.search_texts([rows[0].query])
        hits = system.retriever.retrieve(texts, 3)[0]
        assert {(c.passage_id, c.rank) for row in rows for c in row.contexts} == {(h.passage.id, h.rank) for h in hits}
        assert all(len(row.contexts) == 1 and row.retriever == system.retriever.fingerprint for row in rows)
        assert all(row.contexts[0].text in row.prompt for row in rows)
    together = data(folder, WHO, passages=4, passages_a_row=2)
    mix(together, system, seed=1, folder=tmp_path)
    assert {len(point.contexts) for point in points(tmp_path)} == {2}
    assert len(points(tmp_path)) == 40


def test_contexts_are_those_that_the_source_declares(system: RAG, folder: Path, tmp_path: Path) -> None:
    mixture = mix(data(folder, ALL, **SHARES, rows=400), system, seed=1, folder=tmp_path)
    own = {row["query"]: row for row in read(folder / "squad.train.jsonl")}
    texts = {passage.id: f"{passage.title}\n{passage.text}" for passage in system.retriever.base.corpus}
    words = system.generator.tokenizer
    for row, point in zip(mixture.rows, points(tmp_path), strict=True):
        if point.source == "squad":
            assert [context.text for context in point.contexts] == [own[point.query]["context"]]
            assert (point.retriever, point.contexts[0].score) == ("", None)
        elif point.source == "corpus":
            assert point.answer == texts[point.example_id]
            assert (point.query, point.prompt, point.contexts) == ("", "", ())
            plain = words(point.answer, add_special_tokens=False)["input_ids"]
            assert (row["input_ids"], row["labels"]) == ([1], [*plain, 2])  # all is learned but the token that begins it
        elif point.source == "talk":
            assert len(point.history) == 2
            assert "\n".join(point.history) in point.prompt
        else:
            assert point.contexts[0].score is not None
    assert {point.source for point in points(tmp_path)} == set(ALL)
    assert {point.split for point in points(tmp_path)} == {"train"}


def test_raw_text_comes_from_files_too(system: RAG, folder: Path, tmp_path: Path) -> None:
    sources = {
        **WHO,
        "book": {"path": "book.txt", "context": "none"},
        "lines": {"path": "texts.train.jsonl", "context": "none"},
    }
    mixture = mix(data(folder, sources, unsupervised=0.5, max_length=30, misfits="skip"), system, seed=1, folder=tmp_path / "a")
    assert all(len(row["input_ids"]) + len(row["labels"]) <= 30 for row in mixture.rows)
    mix(data(folder, sources, unsupervised=0.5), system, seed=1, folder=tmp_path / "b")
    told = [point for point in points(tmp_path / "b") if point.source == "book"]
    assert {point.answer for point in told} == {"The first paragraph\nof two lines.", "The second."}
    with pytest.raises(GeneratorError, match="cannot learn raw text"):
        mix(data(folder, sources, unsupervised=0.5), opened(folder, "bart"), seed=1, folder=tmp_path / "c")
    named = {**WHO, "x": {"path": "small.yaml", "context": "none"}}
    with pytest.raises(CorpusError, match="is no file of raw text"):
        mix(data(folder, named, unsupervised=0.5), system, seed=1, folder=tmp_path / "c")


def test_the_seed_gives_rows_markers_and_order(system: RAG, folder: Path, tmp_path: Path) -> None:
    mixed = data(folder, ALL, **SHARES, rows=300)
    made: list[Mixture] = []
    for number, seed in enumerate((1, 1, 2)):
        made.append(mix(mixed, system, seed=seed, folder=tmp_path / str(number)))
    one, same, other = (points(tmp_path / str(number)) for number in range(3))
    assert one == same
    assert made[0].rows == made[1].rows
    assert made[0].rows != made[2].rows
    assert [point.markers for point in one] != [point.markers for point in other]
    used = Counter(point.markers for point in one if point.prompt)
    pairs = [(opens, closes) for opens in ("Q: ", "Question: ", "") for closes in ("A: ", "Answer: ")]
    assert set(used) == set(pairs)
    assert min(used.values()) > 20
    for point in one:
        opens, closes = point.markers
        assert not point.prompt or point.prompt.endswith(f"{opens}{point.query}\n{closes.rstrip()}")


def test_workers_carry_rows_and_do_not_choose_them(folder: Path, tmp_path: Path) -> None:
    batches = []
    for workers in (0, 4):
        recipe = written(folder, "workers", [f"train.dataloader_num_workers={workers}"])
        stage = recipe.trainings()["answer"]
        rag = RAG.open(recipe)
        assert isinstance(stage.data, InstructionMix)
        mixture = mix(stage.data, rag, seed=recipe.seed, folder=tmp_path / str(workers))
        trainer = stage_trainer(recipe, stage, tmp_path / f"answer-{workers}", AnswerObjective(rag.generator), mixture.rows, [])
        batches.append([{name: value.tolist() for name, value in batch.items()} for batch in trainer.get_train_dataloader()])
    assert batches[0] == batches[1]
    assert len(batches[0]) > 3


def test_fixed_markers_are_the_systems_own_prompt(system: RAG, folder: Path, tmp_path: Path) -> None:
    mix(data(folder, WHO, markers="fixed"), system, seed=1, folder=tmp_path)
    corpus = system.retriever.base.corpus
    for point in points(tmp_path):
        passages = [corpus[row] for c in point.contexts if (row := corpus.row(c.passage_id)) is not None]
        assert point.prompt == system.generator.prompt.render(point.query, passages).text
        assert point.markers == ("", "")


def test_markers_that_the_system_is_not_asked_with_are_warned_of(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rag = opened(folder, template="{passages}\n{question}\n>")
    mix(data(folder, WHO), rag, seed=1, folder=tmp_path)
    assert "is none of those it learns" in caplog.text
    caplog.clear()
    mix(data(folder, WHO), opened(folder), seed=1, folder=tmp_path)
    assert "is none of those it learns" not in caplog.text


# ---- the seam between prompt and answer ----


def seen(model: torch.nn.Module, work: Callable[[], Any]) -> list[list[int]]:
    """The ids that the model was given, row by row, while something was done."""
    found: list[list[int]] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, given: found.extend(given[0].tolist()))  # type: ignore[operator]
    try:
        work()
    finally:
        hook.remove()
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("template", [TEMPLATE, "{passages} // {question}", "{question} \n\t"])
def test_training_scoring_and_decoding_see_the_same_ids(kind: str, template: str, tmp_path: Path) -> None:
    """A prompt that ends in white space: it is the answer's in all three. The model is taught one row, and writes its ids."""
    prompt = PromptSettings(template=template, max_tokens=200)
    settings = GeneratorSettings(model=str(getattr(tiny, kind)(tmp_path)), dtype="float32")
    generator = open_generator(settings, prompt)
    rendered = generator.prompt.render("who built it ", [Passage("1", "by odo")])
    row = generator.row(rendered, "odo m")
    objective = AnswerObjective(generator)
    optimiser = torch.optim.Adam(objective.parameters()["generator"], lr=1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        objective.loss(objective.collate([row]))[0].backward()
        optimiser.step()
    written = generator.generate([rendered], max_new_tokens=20)[0]
    assert (list(written.ids), written.text) == (row["labels"], "odo m")  # the end token is learned and ends it
    whole = [*row["input_ids"], *row["labels"]]
    trained = seen(generator.model, lambda: objective.loss(objective.collate([row])))
    scored = seen(generator.model, lambda: generator.token_logprobs([rendered], ["odo m"]))
    asked = seen(generator.model, lambda: generator.generate([rendered], max_new_tokens=1))
    assert trained[0] == scored[0] == whole
    assert asked[0] == row["input_ids"]
    closed = generator.row(generator.prompt.render("who", []), "odo m")
    assert closed["labels"] == row["labels"] == generator.answer_ids("odo m")
    begins = generator.tokenizer.bos_token_id
    assert whole.count(begins) == (1 if kind == "llama" else 0)
    assert whole.count(generator.eos) == 1


def test_no_answer_is_an_error_whatever_the_prompt_leaves_to_it(system: RAG) -> None:
    rendered = system.generator.prompt.render("q", [])
    assert rendered.answer_space == " "
    for answer in ("", " ", "\n"):
        with pytest.raises(GeneratorError, match="has no token"):
            system.generator.row(rendered, answer)
        with pytest.raises(GeneratorError, match="has no token"):
            system.generator.text_row(answer)


def test_an_end_that_the_tokenizer_adds_is_not_in_a_causal_prompt(tmp_path: Path) -> None:
    folder = tiny.llama(tmp_path / "llama")
    tiny.tokenizer(begins=True, ends=True).save_pretrained(str(folder))
    generator = open_generator(GeneratorSettings(model=str(folder), dtype="float32"), PromptSettings())
    assert generator.tokenizer("who")["input_ids"][-1] == generator.eos
    row = generator.row(generator.prompt.render("who", []), "odo")
    assert (row["input_ids"].count(1), row["input_ids"].count(2), row["labels"].count(2)) == (1, 0, 1)
    text = generator.text_row("odo")
    assert (text["input_ids"], text["labels"][-1], text["labels"].count(2)) == ([1], 2, 1)
    bart = open_generator(GeneratorSettings(model=str(tiny.bart(tmp_path / "bart")), dtype="float32"), PromptSettings())
    assert bart.prompt.render("who", []).ids[-1] == bart.eos  # an encoder's input ends as it was trained to


def test_a_chat_models_answers_end_with_its_end_of_turn(folder: Path, tmp_path: Path) -> None:
    words = tiny.tokenizer(begins=True, ends=False)
    words.add_special_tokens({"additional_special_tokens": ["[turn]"]})
    words.chat_template = (
        "<s>{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}[turn]{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    model = open_generator(GeneratorSettings(model=str(folder / "llama"), dtype="float32"), PromptSettings()).model
    model.resize_token_embeddings(len(words))
    tiny._saved(model, words, tmp_path / "chat")
    generator = open_generator(GeneratorSettings(model=str(tmp_path / "chat"), dtype="float32"), PromptSettings())
    ends = words.convert_tokens_to_ids("[turn]")
    assert (generator.eos, generator.ends) == (ends, [2, ends])
    row = generator.row(generator.prompt.render("who", []), "odo")
    assert row["labels"][-1] == ends
    assert row["input_ids"].count(1) == 1


# ---- length ----


def test_truncation_takes_the_passages_end_and_counts_to_the_token(folder: Path, tmp_path: Path) -> None:
    """BOS 1, instruction 6, passage 9, answer 3, end 1: 16 leave the passage 5 tokens, 10 leave −1."""
    asked = {"id": "1", "query": "abcd", "answers": ["xyz"], "context": "efgijklmn"}
    (tmp_path / "q.jsonl").write_text(json.dumps(asked) + "\n")
    rag = opened(folder, template="{passages}|{question}:", min_passage_tokens=1)
    source = {"q": {"path": tmp_path / "q.jsonl", "context": "gold"}}
    ids = rag.generator.tokenizer.convert_tokens_to_ids
    for length, kept in ((20, 9), (19, 8), (16, 5), (12, 1)):
        (row,) = mix(data(folder, source, markers="fixed", max_length=length), rag, seed=0, folder=tmp_path / "fits").rows
        assert row["input_ids"] == ids(["<s>", *"efgijklmn"[:kept], "|", *"abcd", ":"])
        assert row["labels"] == ids([*"xyz", "</s>"])  # T + 1 labels, and nothing of the prompt among them
        batch = rag.generator.collate([row])
        assert int((batch["labels"] != -100).sum()) == 4
    for length, room in ((11, 0), (10, -1)):
        with pytest.raises(RecipeError, match=f"1 of 1 rows leave their passages too little .* leaves {room} tokens"):
            mix(data(folder, source, markers="fixed", max_length=length), rag, seed=0, folder=tmp_path / str(length))
        (listed,) = read(tmp_path / str(length) / "misfits.jsonl")
        assert (listed["room"], listed["example_id"], listed["source"], listed["max_length"]) == (room, "1", "q", length)


def test_misfits_are_listed_and_counted_and_only_then_left_out(folder: Path, tmp_path: Path) -> None:
    short = {"id": "short", "query": "a", "answers": ["b"], "context": "c" * 60}
    tight = {"id": "tight", "query": "a" * 36, "answers": ["b"], "context": "c" * 60}
    whole = {"id": "whole", "query": "a" * 36, "answers": ["b"], "context": "c" * 4}  # less than 16 tokens, but all of it
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (short, tight, whole)))
    rag = opened(folder, template="{passages}|{question}:", min_passage_tokens=16)
    source = {"q": {"path": tmp_path / "q.jsonl", "context": "gold"}}
    settings = {"markers": "fixed", "max_length": 50}
    with pytest.raises(RecipeError, match="1 of 3 rows"):
        mix(data(folder, source, **settings), rag, seed=0, folder=tmp_path)
    rows = mix(data(folder, source, **settings, misfits="skip"), rag, seed=0, folder=tmp_path).rows
    assert len(rows) == 2
    assert {point.example_id for point in points(tmp_path)} == {"short", "whole"}
    (listed,) = read(tmp_path / "misfits.jsonl")
    assert (listed["example_id"], listed["room"], listed["min_passage_tokens"]) == ("tight", 9, 16)
    assert points_figures(tmp_path / "data")["misfits"] == 1


# ---- unanswerable rows and splits ----


@pytest.mark.parametrize("origin", ["gold", "mined"])
def test_unanswerable_rows_hold_a_wrong_passage_and_say_so(system: RAG, folder: Path, tmp_path: Path, origin: str) -> None:
    mixed = data(folder, ALL, **SHARES, rows=400, unanswerable={"share": 0.2, "answer": "no idea", "from": origin})
    mix(mixed, system, seed=1, folder=tmp_path)
    made = points(tmp_path)
    said = [point for point in made if point.source == "unanswerable"]
    assert len(said) == 80
    assert {point.answer for point in said} == {"no idea"}
    assert all(point.answer != "no idea" for point in made if point.source != "unanswerable")
    known = {row["query"]: row for name in ("who", "when", "squad") for row in read(folder / f"{name}.train.jsonl")}
    for point in said:
        (context,) = point.contexts
        if origin == "gold":
            assert context.text == known[point.query]["context"]
            assert not known[point.query]["answers"]
        else:
            assert not answer_recall([context.text], known[point.query]["answers"])
            assert context.passage_id not in known[point.query]["relevant"]
            assert point.retriever
    told = points_figures(tmp_path / "data")["unanswerable"]
    assert told == {"share": pytest.approx(0.2, abs=0.01), "wanted": 0.2, "from": origin, "answer": "no idea"}


def test_unanswerable_rows_that_are_not_there_are_told(system: RAG, folder: Path, tmp_path: Path) -> None:
    answered = [row for row in read(folder / "squad.train.jsonl") if row["answers"]]
    (tmp_path / "squad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answered))
    source = {"squad": {"path": tmp_path / "squad.jsonl", "context": "gold"}}
    with pytest.raises(CorpusError, match="there are no unanswerable rows"):
        mix(data(folder, source, unanswerable={"share": 0.1, "from": "gold"}), system, seed=1, folder=tmp_path)


def test_a_test_split_is_not_learned_from_by_mistake(system: RAG, folder: Path, tmp_path: Path) -> None:
    text = (folder / "who.train.jsonl").read_text()
    (tmp_path / "who-test.jsonl").write_text(text)
    first, *rest = [json.loads(line) for line in text.splitlines()]
    marked = [{**first, "split": "test"}, *rest]
    (tmp_path / "contest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in marked))
    for name, fault in (("who-test", "is a test split by its name"), ("contest", "holds question 'who0' of the split test")):
        source = {"who": {"path": tmp_path / f"{name}.jsonl"}}
        with pytest.raises(RecipeError, match=fault):
            mix(data(folder, source), system, seed=1, folder=tmp_path)
        assert mix(data(folder, source, allow_test=True), system, seed=1, folder=tmp_path).rows
    assert "test" in {point.split for point in points(tmp_path)}


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"unsupervised": 0.1}, "unsupervised is 0.1: a share above 0 and sources with context: none belong together"),
        ({"sources": {**WHO, "c": {"context": "none"}}}, "unsupervised is 0.0: a share above 0"),
        ({"dialogue": 0.1}, "dialogue is 0.1"),
        ({"sources": {"who": {}}}, "path is missing"),
        ({"sources": {"talk": {"path": "x", "dialogue": True}}, "dialogue": 0.5}, "must hold questions that are no dialogue"),
        ({"unanswerable": {"share": 0.1, "from": "gold"}}, "need a source with context: gold"),
        ({"sources": {**WHO, "unanswerable": {"path": "x"}}}, "sources has unanswerable"),
        ({"template": "{question}"}, "template must hold {passages}"),
        ({"sources": {**WHO, "c": {"context": "none"}}, "unsupervised": 0.5, "unanswerable": {"share": 0.5}}, "leave none"),
    ],
)
def test_settings_that_cannot_be_mixed(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        InstructionMix.model_validate({"kind": "instruction_mix", "sources": WHO, **settings})


# ---- data points ----


def test_data_points_come_back_as_they_were_written(tmp_path: Path) -> None:
    made = [
        DataPoint(
            "nq-0", "7", "nq", "train", "who?", "Odo", (Context("p1", "Odo\nbuilt it", 0.5, 1),), "…", "abc", ("Q: ", "A: ")
        ),
        DataPoint("text-0", "8", "text", "train", "", "中文", history=("a", "b"), seed=3),
    ]
    write_points(tmp_path / "data", made, rows=2)
    assert read_points(tmp_path / "data") == read_points(tmp_path / "data" / "points.jsonl") == made
    assert points_figures(tmp_path / "data") == {"rows": 2, "points": 2}
    line = json.loads((tmp_path / "data" / "points.jsonl").read_text().splitlines()[0])
    assert line["contexts"] == [{"passage_id": "p1", "text": "Odo\nbuilt it", "score": 0.5, "rank": 1, "title": ""}]
    (tmp_path / "data" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no finished data points"):
        read_points(tmp_path / "data")
    (tmp_path / "x.jsonl").write_text('{"id": "1", "colour": "red"}\n')
    with pytest.raises(CorpusError, match=r"x\.jsonl:1 is no data point"):
        read_points(tmp_path / "x.jsonl")


# ---- through the command line ----


def written(folder: Path, name: str, changes: list[str] | None = None) -> Recipe:
    """A recipe of all kinds of sources for the tiny causal model."""
    (folder / f"{name}.yaml").write_text(f"""
name: {name}
seed: 1
knowledge: {{path: kb, documents: corpus.jsonl, chunk: null, encoder: {{model: encoder/encoder, dtype: float32}}}}
retriever: {{k: 2}}
prompt:
  template: "Background: {{passages}}\\n\\nQ: {{question}}\\nA: "
  no_passage: "Q: {{question}}\\nA: "
  max_tokens: 200
generator: {{model: llama, dtype: float32}}
decode: {{kind: concat, max_new_tokens: 6}}
data:
  kind: instruction_mix
  sources:
    who: {{path: who.train.jsonl}}
    when: {{path: when.train.jsonl}}
    squad: {{path: squad.train.jsonl, context: gold}}
    talk: {{path: talk.train.jsonl, dialogue: true}}
    corpus: {{context: none}}
  unsupervised: 0.1
  dialogue: 0.05
  unanswerable: {{share: 0.1, from: gold}}
  max_length: 256
  packing: fit
  rows: 150
  dev:
    who: {{path: who.dev.jsonl, metric: f1, limit: 4}}
    squad: {{path: squad.dev.jsonl, metric: em, limit: 4}}
objective: {{kind: answer}}
train: {{bf16: false, per_device_train_batch_size: 4, learning_rate: 1e-2, max_steps: 16, logging_steps: 4, eval_steps: 8}}
evaluate: {{questions: who.dev.jsonl, modes: [retrieved]}}
""")
    return load_recipe(folder / f"{name}.yaml", changes or [])


def test_it_learns_through_the_command_line(folder: Path) -> None:
    """Packed rows of all kinds: held-out loss falls, the best step by the mean of the tasks' metrics is kept, rows are told."""
    recipe = written(folder, "learns", ["train.eval_on_start=true"])
    done = CliRunner().invoke(app, ["train", str(folder / "learns.yaml"), "train.eval_on_start=true"])
    assert done.exit_code == 0, done.output
    (stage,) = (recipe.run / "stages").iterdir()
    log = json.loads((stage / "log.json").read_text())
    untuned, *held_out = [row for row in log if "eval_loss" in row]
    assert [row["step"] for row in (untuned, *held_out)] == [0, 8, 16]
    for row in held_out:
        assert row["eval_dev_mean"] == pytest.approx((row["eval_who/f1"] + row["eval_squad/em"]) / 2)
    losses = [row["loss"] for row in log if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]
    assert held_out[-1]["eval_loss"] < held_out[0]["eval_loss"] < untuned["eval_loss"]
    manifest = json.loads((stage / "result" / "manifest.json").read_text())
    best = max(held_out, key=lambda row: row["eval_dev_mean"])
    assert manifest["best_step"] in {row["step"] for row in held_out if row["eval_dev_mean"] == best["eval_dev_mean"]}
    told = manifest["data"]
    made = read_points(stage / "data")
    assert told["points"] == len(made) == sum(told["rows"].values())
    assert told["unanswerable"]["from"] == "gold"
    assert told["unanswerable"]["answer"] == "I don't know"
    assert 0.5 < told["fill"] <= 1
    assert told["misfits"] == 0
    again = CliRunner().invoke(app, ["train", str(folder / "learns.yaml"), "train.eval_on_start=true"])
    assert again.exit_code == 0, again.output
    assert len(list((recipe.run / "stages").iterdir())) == 1
    with open(folder / "who.dev.jsonl", "a") as file:  # a changed dev file is another stage
        file.write("\n")
    assert not (folder / "who.dev.jsonl").read_text().endswith("}\n")


def test_the_shipped_recipe_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is shipped, on tiny models: packs of rows of five sources, adapters learned, the best of two dev tasks kept."""
    pytest.importorskip("peft")
    monkeypatch.setenv("DOCUMENTS", str(folder / "corpus.jsonl"))
    monkeypatch.setenv("QUESTIONS", str(tmp_path))
    files = {"web_questions": "who.train", "gsm8k": "when.train", "squad_v2": "squad.train", "oasst": "talk.train"}
    for name, source in {**files, "nq.dev": "who.dev", "fever.dev": "when.dev"}.items():
        (tmp_path / f"{name}.jsonl").write_text((folder / f"{source}.jsonl").read_text())
    recipe = ROOT / "recipes" / "ra_dit_lm_ft.yaml"
    encoder = {"model": str(folder / "encoder" / "encoder"), "dtype": "float32"}
    changes = [
        f"runs={tmp_path / 'runs'}", f"knowledge.path={tmp_path / 'kb'}", f"knowledge.encoder={json.dumps(encoder)}",
        f"generator.model={folder / 'llama'}", "generator.dtype=float32", "train.bf16=false", "retriever.k=2", "data.rows=60",
        "data.max_length=256", "data.dev.nq.limit=2", "data.dev.fever.limit=2", "decode.max_new_tokens=3", "train.max_steps=2",
        "train.eval_steps=1", "train.gradient_accumulation_steps=2", "train.per_device_train_batch_size=2",
    ]  # fmt: skip
    for command in ("build", "train"):
        done = CliRunner().invoke(app, [command, str(recipe), *changes])
        assert done.exit_code == 0, done.output
    (stage,) = (tmp_path / "runs" / "ra-dit-lm-ft" / "stages").iterdir()
    assert (stage / "result" / "generator" / "adapter_model.safetensors").is_file()
    log = json.loads((stage / "log.json").read_text())
    assert [row["step"] for row in log if "eval_dev_mean" in row] == [1, 2]
    assert set(points_figures(stage / "data")["rows"]) == {
        "web_questions",
        "gsm8k",
        "squad_v2",
        "oasst",
        "text",
        "unanswerable",
    }


def test_dev_figures_are_those_of_the_answers(folder: Path, tmp_path: Path) -> None:
    recipe = written(folder, "figures")
    rag = RAG.open(recipe)
    settings = recipe.trainings()["answer"].data
    assert isinstance(settings, InstructionMix)
    mixture = mix(settings, rag, seed=1, folder=tmp_path)
    assert mixture.measure is not None
    rows = read(folder / "who.dev.jsonl")
    kept = sorted(random.Random(1).sample(range(len(rows)), 4))
    answers = rag.answer([rows[place]["query"] for place in kept])
    wanted = sum(f1(a.text, rows[place]["answers"]) for a, place in zip(answers, kept, strict=True)) / 4
    assert mixture.measure()["who/f1"] == pytest.approx(wanted)
    one = settings.model_copy(update={"dev": {"who": settings.dev["who"]}})
    alone = mix(one, rag, seed=1, folder=tmp_path)
    assert alone.measure is None
    assert len(alone.held_out) == 4


def test_a_seq2seq_model_and_the_reader_learn_unpacked_mixes(folder: Path, tmp_path: Path) -> None:
    sources = {name: source for name, source in ALL.items() if name != "corpus"}
    for model in ("bart", "reader"):
        rag = opened(folder, model)
        mixture = mix(data(folder, sources, dialogue=0.05, rows=60), rag, seed=1, folder=tmp_path)
        objective = AnswerObjective(rag.generator)
        loss, _ = objective.loss(objective.collate(mixture.rows[:4]))
        assert torch.isfinite(loss)
        with pytest.raises(GeneratorError, match="such rows cannot be packed"):
            mix(data(folder, sources, dialogue=0.05, packing="fit"), rag, seed=1, folder=tmp_path)


@pytest.mark.parametrize("reduction", ["token", "example"])
@pytest.mark.parametrize("packing", ["none", "fit"])
def test_accumulation_changes_nothing(folder: Path, tmp_path: Path, packing: str, reduction: str) -> None:
    """1×8 ≡ 8×1 over answers of unlike length: the loss is divided by the answer tokens of the whole accumulated batch."""
    rate = 1.0 if reduction == "token" else 0.1
    shared = ["train.max_steps=2", "train.optim=sgd", f"train.learning_rate={rate}", "train.lr_scheduler_type=constant"]
    shared += [
        "train.max_grad_norm=0",
        "train.warmup_steps=0",
        "train.weight_decay=0",
        "data.dev={}",
        f"data.packing={packing}",
    ]
    shared += ["train.train_sampling_strategy=sequential", "train.logging_steps=1", f"runs={tmp_path}"]
    found = []
    for size, times in ((8, 1), (1, 8)):
        changes = [f"train.per_device_train_batch_size={size}", f"train.gradient_accumulation_steps={times}"]
        recipe = written(folder, f"accumulate{size}", [*shared, *changes])
        model = train(recipe).open(recipe).generator.model
        (stage,) = (recipe.run / "stages").iterdir()
        losses = [row["loss"] for row in json.loads((stage / "log.json").read_text()) if "loss" in row]
        found.append((losses, [p.detach().clone() for p in model.parameters()]))
    (whole, ours), (parts, theirs) = found
    assert parts == pytest.approx(whole, rel=1e-4)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("packing", ["none", "fit"])
def test_losses_of_parts_make_the_loss_of_the_batch(system: RAG, folder: Path, tmp_path: Path, packing: str) -> None:
    """Mean of single rows' losses, and sums over the tokens of all; a pack counts as the rows that it holds."""
    mixed = data(folder, ALL, **SHARES, rows=60, packing=packing, max_length=256)
    rows = list(mix(mixed, system, seed=1, folder=tmp_path).rows)[:6]
    singles = [row for pack in rows for row in pack.get("rows", [pack])]
    example, token = (AnswerObjective(system.generator, reduction=kind) for kind in ("example", "token"))  # type: ignore[arg-type]
    with torch.no_grad():
        alone = [float(example.loss(example.collate([row]))[0]) for row in singles]
        whole = example.collate(rows)
        assert len(whole["labels"]) == len(singles)
        assert float(example.loss(whole)[0]) == pytest.approx(sum(alone) / len(alone), rel=1e-4)
        items = sum(len(row["labels"]) for row in singles)
        assert items == int((whole["labels"] >= 0).sum())
        parts = sum(float(token.loss(token.collate([row]), items=items)[0]) for row in rows)
        assert parts == pytest.approx(float(token.loss(whole, items=items)[0]), rel=1e-4)
        assert parts == pytest.approx(sum(alone) / items, rel=1e-4)


def test_gold_without_context_and_questions_without_answers_are_told(system: RAG, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps({"id": "7", "query": "who", "answers": ["odo"]}) + "\n")
    with pytest.raises(CorpusError, match="question '7' has neither `context` nor `relevant`"):
        mix(data(folder, {"q": {"path": tmp_path / "q.jsonl", "context": "gold"}}), system, seed=1, folder=tmp_path)
    (tmp_path / "q.jsonl").write_text(json.dumps({"id": "7", "query": "who", "answers": []}) + "\n")
    with pytest.raises(CorpusError, match="holds no question with an answer"):
        mix(data(folder, {"q": {"path": tmp_path / "q.jsonl"}}), system, seed=1, folder=tmp_path)
    relevant = data(folder, {"who": {"path": "who.train.jsonl", "context": "gold"}})
    mix(relevant, system, seed=1, folder=tmp_path)
    known = {row["query"]: row for row in read(folder / "who.train.jsonl")}
    assert all([c.passage_id for c in p.contexts] == known[p.query]["relevant"] for p in points(tmp_path))
