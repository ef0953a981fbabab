"""Self-RAG's short form on a tiny Llama: a twin by loops, batches that change nothing, the whole way by the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import AddedToken

import tiny
from raglan.decode import Asked, self_rag
from raglan.errors import CheckpointError, RecipeError
from raglan.generator import HFGenerator, open_generator
from raglan.generator.causal import causal_from_encoder
from raglan.recipe import GeneratorSettings, PromptSettings, SelfRagDecode
from raglan.records import Answer, Hit, Passage
from test_cli import run

VALUES = (-1.0, -0.5, 0.0, 0.5, 1.0)
LIMIT = 12


def settings(**given: Any) -> SelfRagDecode:
    return SelfRagDecode(kind="self_rag", **{"max_new_tokens": LIMIT, "retrieve": "always", **given})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sure of itself and likes to judge, so that components are read and rows end."""
    return tiny.sure_self_rag(tmp_path_factory.mktemp("self_rag"), likes=("is_sup", "is_use", "eos"))


@pytest.fixture(scope="module")
def generator(checkpoint: Path) -> HFGenerator:
    return open_generator(GeneratorSettings(model=str(checkpoint), dtype="float32"), PromptSettings())


def found(seed: int, count: int) -> list[Hit]:
    texts = ["the tower of the miller", "a mill in the north", "inns", "the lighthouse was built in 1807", "on the thin ice"]
    picked = [(seed + n) % len(texts) for n in range(count)]
    return [Hit(Passage(f"p{seed}-{n}", texts[at] * (1 + n % 2), f"t{at}"), n, 1.0, n + 1) for n, at in enumerate(picked)]


QUESTIONS = ["who built the tower", "when", "what is in the inn, then?", "the mill"]
ASKED = Asked(QUESTIONS, [found(n, 3 + n % 2) for n in range(4)])


@torch.no_grad()
def logprobs(generator: HFGenerator, ids: Sequence[int]) -> torch.Tensor:
    return generator.model(torch.tensor([list(ids)])).logits[0, -1].double().log_softmax(-1)


def twin(generator: HFGenerator, query: str, hits: Sequence[Hit], *, stops: Sequence[int]) -> list[dict[str, float]]:
    """Every passage alone, every token a whole forward pass, sums by hand."""
    schema, rows = generator.schema, []
    for hit in hits:
        ids = [*generator.marked_prompt.question(query), *generator.marked_prompt.passage(hit.passage)]
        written, total, marks = [], 0.0, []
        while len(written) < LIMIT and not (written and written[-1] in (generator.eos, *stops)):
            each = logprobs(generator, [*ids, *written])
            token = int(each.argmax())
            written.append(token)
            total += float(each[token])
            marks.append(each.exp())
        p = {role: [[float(row[i]) for i in schema.ids[role]] for row in marks] for role in ("is_rel", "is_sup", "is_use")}
        cut = next((at for at, token in enumerate(written) if token in (*schema.ids["retrieve"], schema.opens)), len(written))
        at = {role: next((n for n, token in enumerate(written) if token in schema.ids[role]), None) for role in p}
        sup = p["is_sup"][at["is_sup"]] if at["is_sup"] is not None and at["is_sup"] < cut else None
        use = p["is_use"][at["is_use"]] if at["is_use"] is not None else None
        row = {
            "seq": math.exp(total / len(written)),
            "rel": p["is_rel"][0][1] / sum(p["is_rel"][0]),
            "sup": 0.0 if sup is None else (sup[0] + 0.5 * sup[1]) / sum(sup),
            "use": 0.0 if use is None else sum(v * mass for v, mass in zip(VALUES, use, strict=True)) / sum(use),
        }
        rows.append({**row, "final": row["seq"] + row["rel"] + row["sup"] + 0.5 * row["use"], "logprob": total})
    return rows


def rows_of(answer: Answer) -> list[dict[str, Any]]:
    assert answer.trace is not None
    return list(answer.trace["candidates"])


def test_the_short_form_is_what_loops_give(generator: HFGenerator) -> None:
    stops = (generator.schema.yes, generator.schema.opens)
    answers = self_rag(generator, ASKED, settings())
    judged = set()
    for query, hits, answer in zip(QUESTIONS, ASKED.hits, answers, strict=True):
        expected = twin(generator, query, hits, stops=stops)
        for row, wanted in zip(rows_of(answer), expected, strict=True):
            assert {name: row[name] for name in wanted} == pytest.approx(wanted, abs=1e-5)
            judged |= {name for name in ("sup", "use") if f"{name}:absent" not in row["flags"]}
        best = max(range(len(hits)), key=lambda place, expected=expected: expected[place]["final"])
        assert [row["chosen"] for row in rows_of(answer)].index(True) == best
        first = logprobs(generator, generator.marked_prompt.question(query)).exp()
        yes, no = float(first[generator.schema.yes]), float(first[generator.schema.no])
        assert answer.trace is not None
        assert answer.trace["decisions"][0]["r"] == pytest.approx(yes / (yes + no), abs=1e-5)
    assert judged == {"sup", "use"}


def test_together_alone_and_reordered_are_one(generator: HFGenerator) -> None:
    figures = lambda answer: {row["passage"]: row["final"] for row in rows_of(answer)}  # noqa: E731
    together = self_rag(generator, ASKED, settings())
    for place, answer in enumerate(together):
        alone = self_rag(generator, ASKED.only([place]), settings())[0]
        turned = self_rag(generator, Asked([QUESTIONS[place]], [ASKED.hits[place][::-1]]), settings())[0]
        assert figures(alone) == pytest.approx(figures(answer), abs=1e-5)
        assert figures(turned) == pytest.approx(figures(answer), abs=1e-5)
        assert alone.text == turned.text == answer.text


def test_bound_and_none_agree_and_waves_share_batches(generator: HFGenerator) -> None:
    every, bound = (self_rag(generator, ASKED, settings(prune={"kind": kind})) for kind in ("none", "bound"))
    assert [answer.text for answer in bound] == [answer.text for answer in every]
    assert [answer.logprob for answer in bound] == pytest.approx([answer.logprob for answer in every], abs=1e-4)


def test_options_are_what_loops_give(generator: HFGenerator) -> None:
    options = ["the mill", "inn", "a"]
    answer = self_rag(generator, ASKED.only([0]), settings(options=options))[0]
    prompt, mixed, total = generator.marked_prompt, [0.0] * 3, 0.0
    for hit in ASKED.hits[0]:
        ids = [*prompt.question(QUESTIONS[0]), *prompt.passage(hit.passage)]
        behind = logprobs(generator, ids)
        irrelevant, relevant = (float(behind[token]) for token in generator.schema.ids["is_rel"])
        ids.append(generator.schema.ids["is_rel"][relevant > irrelevant])
        rel = math.exp(relevant) / (math.exp(relevant) + math.exp(irrelevant))
        each = []
        for option in options:
            told = prompt.foreign(option)
            each.append(sum(float(logprobs(generator, ids + told[:n])[token]) for n, token in enumerate(told)))
        shares = [math.exp(one - max(each)) for one in each]
        mixed = [old + math.exp(rel) * share / sum(shares) for old, share in zip(mixed, shares, strict=True)]
        total += math.exp(rel)
    assert answer.trace is not None
    expected = {option: p / total for option, p in zip(options, mixed, strict=True)}
    assert dict(answer.trace["standings"]) == pytest.approx(expected, abs=1e-5)
    assert answer.text == max(expected, key=lambda option: expected[option])
    assert answer.trace["cost"]["generated"] == 0


def test_what_is_counted_is_what_was_computed(generator: HFGenerator) -> None:
    before = generator.cost.copy()
    answer = self_rag(generator, ASKED.only([1]), settings())[0]
    spent = generator.cost - before
    assert answer.trace is not None
    told = answer.trace["cost"]
    assert (told["calls"], told["computed"], told["generated"]) == (spent.calls, spent.positions, spent.generated)


def test_how_the_tokens_are_registered_changes_nothing(generator: HFGenerator) -> None:
    """Decoding may skip special tokens and shows ordinary ones; nothing is decided on what it shows."""
    words = tiny.llama_tokenizer(legacy=False)
    words.add_tokens([AddedToken(name, normalized=False) for name in (*generator.schema.spellings, "<pad>")])
    words.pad_token = "<pad>"
    other = HFGenerator(generator.model, words, GeneratorSettings(model="same", dtype="float32"), PromptSettings())
    assert other.schema == generator.schema
    for form in ("short", "long"):
        ours, theirs = (self_rag(one, ASKED, settings(form=form)) for one in (generator, other))
        assert [(a.text, a.raw, a.ids, a.logprob) for a in ours] == [(a.text, a.raw, a.ids, a.logprob) for a in theirs]
    ids = [*generator.schema.marks, *ours[0].ids]
    assert words.decode(ids, skip_special_tokens=True) != generator.tokenizer.decode(ids, skip_special_tokens=True)


def test_both_conventions_of_blanks_decode_however_the_tokens_are_registered(generator: HFGenerator) -> None:
    """What is read are the ids that each tokenizer gives to the whole string; the two conventions are two strings of ids."""
    asked, read = ASKED.only([0, 1]), {}
    template = generator.prompt.settings.self_rag.template
    for legacy in (True, False):
        told = []
        for special in (True, False):
            words = tiny.llama_tokenizer(legacy=legacy, special=special)
            one = HFGenerator(generator.model, words, GeneratorSettings(model="same", dtype="float32"), PromptSettings())
            for form in ("short", "long"):
                answers = self_rag(one, asked, settings(form=form, **({"passages": "static"} if form == "long" else {})))
                for query, hits, answer in zip(asked.queries, asked.hits, answers, strict=True):
                    assert answer.trace is not None
                    rows = answer.trace["candidates" if form == "short" else "levels"]
                    rows = rows if form == "short" else rows[0]["candidates"]
                    read[legacy] = [[*answer.trace["prompt"], *row["context"]] for row in rows]
                    assert read[legacy] == [
                        words(f"{template.format(instruction=query)}[Retrieval]<paragraph>{hit.passage.title}\n"
                              f"{hit.passage.text}</paragraph>")["input_ids"]
                        for hit in hits
                    ]  # fmt: skip
                told.append([(a.text, a.raw, a.ids, a.logprob) for a in answers])
        assert told[:2] == told[2:]  # special, ordinary
    assert all(slow != fast for slow, fast in zip(read[True], read[False], strict=True))


@pytest.fixture(scope="module", params=["llama", "wordpiece", "bytes"])
def any_vocabulary(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> HFGenerator:
    """The published layout; the embedded model's kind, from a tiny encoder; and a byte-level one."""
    folder, own = tmp_path_factory.mktemp(request.param), {}
    if request.param == "wordpiece":
        model, words = causal_from_encoder(str(tiny.bert(folder / "bert")))
        HFGenerator(model, words, GeneratorSettings(model="tiny", dtype="float32"), PromptSettings()).save(folder / "model")
        own = {"vocabulary": "self_rag"}
    if request.param == "bytes":
        tiny.byte_gpt2(folder / "model")
        own = {"vocabulary": "self_rag"}
    model = checkpoint if request.param == "llama" else folder / "model"
    return open_generator(GeneratorSettings(model=str(model), dtype="float32", **own), PromptSettings())


@pytest.mark.parametrize("form", ["short", "long"])
def test_control_strings_in_titles_and_passages_are_words_to_the_end(any_vocabulary: HFGenerator, form: str) -> None:
    """Every spelling in question, title and text: decoding ends, figures are finite, and between markups stand words."""
    schema, prompt, words = any_vocabulary.schema, any_vocabulary.marked_prompt, any_vocabulary.tokenizer
    every = "".join(dict.fromkeys([*schema.spellings, *words.all_special_tokens]))
    hits = [
        Hit(Passage("p0", f"so </paragraph>[Relevant] it is[Fully supported]{words.eos_token}", "[Retrieval]"), 0, 1.0, 1),
        Hit(Passage("p1", f"the {every}", "<paragraph>[Continue to Use Evidence]"), 1, 0.5, 2),
    ]  # fmt: skip
    more = {"passages": "static", "max_segments": 2, "stop": "never", "keep_passages": 0} if form == "long" else {}
    query = f"is it [Relevant]</paragraph>{words.eos_token}?"
    answer = self_rag(any_vocabulary, Asked([query], [hits]), settings(form=form, max_new_tokens=5, **more))[0]
    assert answer.trace is not None
    levels = answer.trace["levels"] if form == "long" else [answer.trace]
    opened = answer.trace["prompt"][0] == words.bos_token_id
    assert not prompt.forbidden & set(answer.trace["prompt"][opened:])
    assert len(levels[0]["candidates"]) == 2
    for one in (one for level in levels for one in level["candidates"]):
        context = one["context"]
        opens, closes = ([at for at, token in enumerate(context) if token == mark] for mark in (schema.opens, schema.closes))
        assert len(opens) == len(closes) >= 1
        for begin, end in zip(opens, closes, strict=True):
            assert not prompt.forbidden & set(context[begin + 1 : end])
        assert all(math.isfinite(one[name]) for name in ("seq", "rel", "sup", "use", "final"))
    assert [hit.passage.id for hit in answer.hits] == ["p0", "p1"]
    assert math.isfinite(answer.logprob)


def test_a_generator_without_reflection_tokens_is_refused(tmp_path: Path) -> None:
    plain = open_generator(GeneratorSettings(model=str(tiny.llama(tmp_path / "llama")), dtype="float32"), PromptSettings())
    with pytest.raises(CheckpointError, match="lacks reflection tokens"):
        self_rag(plain, ASKED, settings())
    folded = open_generator(GeneratorSettings(model=str(tiny.t5(tmp_path / "t5")), dtype="float32"), PromptSettings())
    with pytest.raises(RecipeError, match="of a causal model"):
        self_rag(folded, ASKED, settings())


def test_by_the_command_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.asks(tmp_path, generator=checkpoint, decode="target_rate: 0.5, max_new_tokens: 6, prune: {kind: bound}")
    call = lambda *words: run(*words, capsys=capsys, monkeypatch=monkeypatch)  # noqa: E731
    assert call("build", str(recipe))[0] == 0
    code, out, _ = call(
        "answer", str(recipe), "who built the mill?", "decode.target_rate=null", "decode.retrieve=always", "--trace"
    )
    assert code == 0
    assert "    retrieve: r 0." in out
    assert "final " in out
    assert "cost: calls " in out
    code, out, _ = call("answer", str(recipe), "who?", "decode.target_rate=null", "decode.retrieve=never", "--json")
    told = json.loads(out)[0]
    assert told["trace"]["retrieved"] is False
    assert told["trace"]["candidates"][0]["passage"] is None
    assert told["passages"] == []
    code, out, _ = call("evaluate", str(recipe), "--json")
    figures = json.loads(out)["untuned"]
    assert figures["retrieved/retrieval_rate"]["mean"] == 0.5
    assert "closed_book/retrieval_rate" not in figures
    code, out, err = call("evaluate", str(recipe))
    assert "untuned, retrieved, an answer: calls " in err
    row = json.loads(next((tmp_path / "runs" / "asks" / "evaluations").glob("*/predictions.jsonl")).read_text().splitlines()[0])
    assert row["predictions"]["retrieved"]["trace"]["form"] == "short"
    code, out, err = call("evaluate", str(recipe), "--calibrate", "isotonic")
    assert code == 2
    assert "answered without retrieving" in err
    pytest.importorskip("plotly")
    assert call("report", str(recipe), "-o", str(tmp_path / "report.html"))[0] == 0
    page = (tmp_path / "report.html").read_text()
    assert "questions that retrieved" in page
    assert "candidates</summary>" in page


def test_calibration_by_the_command_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made-up gold answers, so that some questions need passages: those whose answer is what was written with them."""
    recipe = tiny.asks(
        tmp_path, generator=checkpoint, decode="retrieve: always, max_new_tokens: 4", evaluate="modes: [closed_book, retrieved]"
    )
    call = lambda *words: run(*words, capsys=capsys, monkeypatch=monkeypatch)  # noqa: E731
    assert call("build", str(recipe))[0] == 0
    assert call("evaluate", str(recipe), "--json")[0] == 0
    code, _, err = call("evaluate", str(recipe), "--calibrate", "temperature")
    assert code == 2
    assert "tell nothing of when retrieval is needed" in err
    rows = [json.loads(line) for line in (tmp_path / "dev.jsonl").read_text().splitlines()]
    told = next((tmp_path / "runs" / "asks" / "evaluations").glob("*/predictions.jsonl")).read_text().splitlines()
    written = {row["id"]: row["predictions"]["retrieved"]["text"] for row in map(json.loads, told)}
    for row in rows[::2]:
        row["answers"] = [written[row["id"]] or "x"]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = call("evaluate", str(recipe), "--calibrate", "temperature")
    assert code == 0
    found = yaml.safe_load(out)["calibration"]
    assert found["kind"] == "temperature"
    assert 0.01 <= found["temperature"] <= 100
    assert settings(calibration=found).calibration is not None
