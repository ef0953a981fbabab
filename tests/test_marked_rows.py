"""What is learned of a Self-RAG row: everything behind the prompt but the evidence, and each segment of it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import tiny
from raglan.errors import CorpusError
from raglan.generator import HFGenerator, open_generator
from raglan.marked_prompt import GROUPS, MarkedPrompt, MarkedRow
from raglan.marked_rows import marked_rows
from raglan.objective import AnswerObjective
from raglan.packing import pack_rows
from raglan.recipe import GeneratorSettings, PromptSettings, SelfRagData, StageSettings
from raglan.reflection import GrammarError, Schema, parse, stands


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> HFGenerator:
    folder = tiny.self_rag(tmp_path_factory.mktemp("rows") / "model")
    return open_generator(GeneratorSettings(model=str(folder), dtype="float32", vocabulary="self_rag"), PromptSettings())


def passage(text: str) -> dict[str, str]:
    return {"id": "p", "title": "", "text": text}


def segment(text: str, evidence: str | None = None, *, sup: str = "fully", rel: str = "relevant") -> dict[str, Any]:
    if evidence is None:
        return {"decision": "no", "passage": None, "is_rel": None, "text": text, "is_sup": None}
    return {
        "decision": "yes", "passage": passage(evidence), "is_rel": rel, "text": text,
        "is_sup": sup if rel == "relevant" else None,
    }  # fmt: skip


def row(*segments: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": "r", "instruction": "the", "input": "", "segments": list(segments), "is_use": 5, "metadata": {}, **more}


class FiveTokens(MarkedPrompt):
    """Worked example 7 counts five tokens of prompt, the first of them BOS."""

    def question(self, query: str, **_: Any) -> list[int]:
        return [self.tokenizer.bos_token_id, *self.own("s")[-1:] * 4]

    def foreign(self, text: str) -> list[int]:
        return self.tokenizer.convert_tokens_to_ids(list(text))  # a letter is a token


@pytest.fixture(scope="module")
def example(generator: HFGenerator) -> MarkedPrompt:
    return FiveTokens(generator.schema, generator.tokenizer, generator.prompt.settings.self_rag, eos=generator.eos)


SEVENTH = row(segment("cd", "ab"), segment("gh", "ef", sup="partially"))


def masked(made: MarkedRow) -> set[int]:
    whole = [False] * len(made.input_ids) + made.learned
    return {place for place, learned in enumerate(whole) if not learned}


def test_worked_example_7(example: MarkedPrompt) -> None:
    made = example.row_ids(SEVENTH)
    assert len(made) == 25
    assert masked(made) == {0, 1, 2, 3, 4, 7, 8, 16, 17}
    assert sum(made.learned) == 16
    markups = example.row_ids(SEVENTH, markups="mask")
    assert masked(markups) == {0, 1, 2, 3, 4, 7, 8, 16, 17} | {6, 9, 15, 18}
    assert sum(markups.learned) == 12
    released = example.row_ids(SEVENTH, released=["mask"])
    assert masked(released) == {*range(4), *range(7, 18)}
    assert sum(released.learned) == 10
    assert released.input_ids + released.labels == made.input_ids + made.labels
    assert [GROUPS[group] for group in made.groups] == [
        "retrieve", "markup", "passage", "passage", "markup", "is_rel", "text", "text", "is_sup", "retrieve", "markup",
        "passage", "passage", "markup", "is_rel", "text", "text", "is_sup", "is_use", "eos",
    ]  # fmt: skip


@pytest.mark.parametrize("markups", ["train", "mask"])
@pytest.mark.parametrize(
    "texts", [[], ["ab"], ["ab", "ef"], ["ab", "ef", "ij"], [""], ["ab", "", "ef"]], ids=lambda texts: "+".join(texts) or "none"
)
def test_every_segment_learns_and_no_evidence_does(generator: HFGenerator, markups: str, texts: list[str]) -> None:
    segments = [segment("the", text) for text in texts] or [segment("the tin")]
    made = generator.marked_prompt.row_ids(row(*segments), markups=markups)
    learned = {GROUPS[group] for group, ok in zip(made.groups, made.learned, strict=True) if ok}
    assert "passage" not in learned
    assert ("markup" in learned) == (markups == "train" and bool(texts))
    starts = [place for place, group in enumerate(made.groups) if GROUPS[group] == "retrieve"] + [len(made.labels)]
    assert all(any(made.learned[a:b]) for a, b in pairwise(starts))
    assert made.groups.count(GROUPS.index("passage")) == sum(len(generator.marked_prompt.foreign(text)) for text in texts)


def test_long_rows_lose_their_last_segments_behind_cut_passages(generator: HFGenerator) -> None:
    made = generator.marked_prompt
    long = row(*(segment("in the tin", "a b c d e f g h") for _ in range(3)))
    whole = made.row_ids(long)
    assert (whole.lost, whole.cut, whole.ended) == (0, 0, True)
    cut = made.row_ids(long, passage_max=4)
    assert (cut.lost, cut.cut, cut.ended) == (0, 3, True)
    assert cut.groups.count(GROUPS.index("passage")) == 12
    unended = made.row_ids(long, passage_max=4, limit=len(cut) - 1)
    assert (unended.lost, unended.ended, len(unended)) == (0, False, len(cut) - 2)
    short = made.row_ids(long, passage_max=4, limit=len(cut) - 3)
    assert (short.lost, short.cut, short.ended) == (1, 3, False)
    assert short.labels == cut.labels[: len(short.labels)]
    assert {made.eos, *made.schema.ids["is_use"]}.isdisjoint(short.labels)
    assert short.labels.count(made.schema.opens) == short.labels.count(made.schema.closes) == 2
    assert len(made.row_ids(long, passage_max=4, limit=len(short))) == len(short)
    with pytest.raises(CorpusError, match="no segment fits into 45 tokens"):
        made.row_ids(long, passage_max=4, limit=45)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (row({**segment("a", "b"), "is_rel": "maybe"}), "is_rel is 'maybe'"),
        (row({**segment("a", "b"), "is_sup": None}), "where an IsSup token should"),
        (row({**segment("a", "b", rel="irrelevant"), "is_sup": "fully"}), r"\[Fully supported\] stands where"),
        (row({**segment("a"), "decision": "yes"}), "'yes' without a passage"),
        (row({**segment("a", "b"), "decision": "no"}), "'no' with a passage"), (row(segment("a"), is_use=6), "is_use is 6"),
        (row(), "a Retrieve token"),
    ],
)  # fmt: skip
def test_rows_off_the_grammar_are_faults(generator: HFGenerator, fault: dict[str, Any], told: str) -> None:
    with pytest.raises(CorpusError, match=f"row 'r': .*{told}"):
        generator.marked_prompt.row_ids(fault)


# ------------------------------------------------------------------------------------------------------- loss


def fields(made: MarkedRow, schema: Schema) -> dict[str, Any]:
    told = {"input_ids": made.input_ids, "labels": made.labels, "learned": made.learned, "groups": made.groups}
    return {**told, "stands": stands(made.labels, schema)}


def rows_of(generator: HFGenerator) -> list[dict[str, Any]]:
    made = generator.marked_prompt
    return [fields(made.row_ids(one), generator.schema) for one in (
        row(segment("the", "a tin"), segment("in a", "the inn", sup="no")), row(segment("tin")),
        row(segment("a", "th", rel="irrelevant"), is_use=1),
    )]  # fmt: skip


def by_hand(generator: HFGenerator, one: dict[str, Any]) -> torch.Tensor:
    """log p of each label, whatever is learned, by the model's own forward pass over the whole row."""
    ids = torch.tensor([one["input_ids"] + one["labels"]])
    logprobs = generator.model(ids).logits[0].log_softmax(-1)
    first = len(one["input_ids"])
    return logprobs[first - 1 : -1].gather(-1, ids[0, first:, None])[:, 0]


def test_loss_is_that_of_learned_labels_behind_evidence_that_was_read(generator: HFGenerator) -> None:
    rows = rows_of(generator)
    objective = AnswerObjective(generator)
    wanted = [by_hand(generator, one).detach()[torch.tensor(one["learned"])] for one in rows]
    count = sum(map(len, wanted))
    batch = objective.collate(rows)
    assert objective.items(batch) == count
    loss, figures = objective.loss(batch, items=count)
    assert float(loss) == pytest.approx(-float(torch.cat(wanted).sum()) / count, abs=1e-5)
    assert set(figures) == {f"loss/{group}" for group in GROUPS if group != "passage"}
    packs, _ = pack_rows(rows, 400)
    together = objective.collate(packs)
    assert len(packs) < len(rows)
    assert float(objective.loss(together, items=objective.items(together))[0]) == pytest.approx(float(loss), abs=1e-5)


def test_group_weights_multiply_and_figures_tell_each_group(generator: HFGenerator) -> None:
    rows = rows_of(generator)
    plain, heavy = AnswerObjective(generator), AnswerObjective(generator, group_weights={"is_sup": 3.0, "text": 0.0})
    batch = plain.collate(rows)
    count = plain.items(batch)
    (loss, figures), (weighed, same) = (one.loss(dict(batch), items=count) for one in (plain, heavy))
    assert figures == same
    groups, learned = (torch.tensor([value for one in rows for value in one[name]]) for name in ("groups", "learned"))
    logprobs = torch.cat([by_hand(generator, one) for one in rows]).detach()
    sums = {name: float(-logprobs[learned & (groups == place)].sum()) for place, name in enumerate(GROUPS)}
    assert float(loss) * count == pytest.approx(sum(sums.values()), abs=1e-3)
    assert float(weighed) * count == pytest.approx(sum(sums.values()) + 2 * sums["is_sup"] - sums["text"], abs=1e-3)
    held = plain.validate(rows)
    numbers = {name: int((learned & (groups == place)).sum()) for place, name in enumerate(GROUPS)}
    for name in set(GROUPS) - {"passage"}:
        assert held[f"loss/{name}"] == pytest.approx(sums[name] / numbers[name], abs=1e-4)
        assert float(figures[f"loss/{name}"]) == pytest.approx(held[f"loss/{name}"], abs=1e-4)
        assert 0 <= held[f"accuracy/{name}"] <= 1
    assert held["loss"] == pytest.approx(float(loss), abs=1e-4)
    assert not any("passage" in name for name in held)


def test_a_loss_against_what_the_grammar_does_not_admit(generator: HFGenerator) -> None:
    """λ · −log P(a word that may stand here), by a full softmax at every learned label; apart, packed and at weight 0."""
    rows = rows_of(generator)
    objective = AnswerObjective(generator, off_grammar=10.0)
    plain = AnswerObjective(generator)
    wanted = 0.0
    for one in rows:
        ids = torch.tensor([one["input_ids"] + one["labels"]])
        probabilities = generator.model(ids).logits[0].softmax(-1)[len(one["input_ids"]) - 1 : -1].detach()
        for place, own in enumerate(probabilities):
            if one["learned"][place]:
                wanted -= 10 * float(own[may_stand(one["labels"][:place], generator)].sum().log())
    batch = objective.collate(rows)
    count = objective.items(batch)
    loss, figures = objective.loss(dict(batch), items=count)
    before, _ = plain.loss(dict(batch), items=count)
    assert float(loss - before) * count == pytest.approx(wanted, rel=1e-4)
    assert float(figures["loss/off_grammar"]) * count * 10 == pytest.approx(wanted, rel=1e-4)
    packs, _ = pack_rows(rows, 400)
    assert float(objective.loss(objective.collate(packs), items=count)[0]) == pytest.approx(float(loss), rel=1e-5)
    assert AnswerObjective(generator).against is None


def test_a_loss_against_what_a_segment_has_said(generator: HFGenerator) -> None:
    """λ · Σ −log(1 − p) over the other words before in the same text, by a full softmax; another segment's words are free."""
    made = generator.marked_prompt
    row_ids = made.row_ids(row(segment("a tin a inn", "the tin"), segment("tin the", "in a")))
    one = fields(row_ids, generator.schema)
    objective, plain = AnswerObjective(generator, repeats=2.0), AnswerObjective(generator)
    ids = torch.tensor([one["input_ids"] + one["labels"]])
    probabilities = generator.model(ids).logits[0].softmax(-1)[len(one["input_ids"]) - 1 : -1].detach()
    wanted, before, most = 0.0, [], 0
    for place, own in enumerate(probabilities):
        if GROUPS[one["groups"][place]] != "text":
            before = []
            continue
        others = set(before) - {one["labels"][place]}
        wanted -= 2 * float((1 - own[sorted(others)]).log().sum())
        before.append(one["labels"][place])
        most = max(most, len(others))
    assert most > 1
    batch = objective.collate([one])
    count = objective.items(batch)
    loss, figures = objective.loss(dict(batch), items=count)
    assert float(loss - plain.loss(dict(batch), items=count)[0]) * count == pytest.approx(wanted, rel=1e-3)
    assert float(figures["loss/repeats"]) * count * 2 == pytest.approx(wanted, rel=1e-4)
    both, rows = AnswerObjective(generator, repeats=2.0, off_grammar=3.0), [one, *rows_of(generator)]
    single = [fields(made.row_ids(row(segment("a"))), generator.schema)]  # one word: nothing can be said again
    alone = [float(some.loss(some.collate(single), items=1)[0]) for some in (objective, plain)]
    assert alone[0] == alone[1]
    packs, _ = pack_rows(rows, 400)
    together, apart = (float(both.loss(both.collate(some), items=9)[0]) for some in (packs, rows))
    assert together == pytest.approx(apart, rel=1e-5)


def may_stand(before: list[int], generator: HFGenerator) -> list[int]:
    """Every id that the parser takes behind these, tried one by one."""
    schema, eos = generator.schema, generator.eos
    found = []
    for token in range(len(generator.tokenizer)):
        try:
            parse([*before, token], schema, eos=eos)
        except GrammarError as fault:
            if fault.position <= len(before):
                continue
        found.append(token)
    return found


def test_what_may_not_stand_is_unlearned(tmp_path: Path) -> None:
    """Twenty steps on the same rows: wrong marks lose their probability, with λ far more than without."""
    left = []
    for weight in (0.0, 10.0):
        folder = tiny.self_rag(tmp_path / f"model{weight}")
        settings = GeneratorSettings(model=str(folder), dtype="float32", vocabulary="self_rag")
        own = open_generator(settings, PromptSettings())
        objective, rows = AnswerObjective(own, off_grammar=weight), rows_of(own)
        measure = AnswerObjective(own, off_grammar=1.0)
        optimizer = torch.optim.AdamW(own.model.parameters(), lr=1e-2)
        for _ in range(20):
            batch = objective.collate(rows)
            objective.loss(batch, items=objective.items(batch))[0].backward()
            optimizer.step()
            optimizer.zero_grad()
        left.append(float(measure.loss(measure.collate(rows))[1]["loss/off_grammar"].detach()))
    assert left[1] < left[0] / 2


def test_accuracy_counts_the_likeliest_label(generator: HFGenerator) -> None:
    one = rows_of(generator)[0]
    ids = torch.tensor([one["input_ids"] + one["labels"]])
    best = generator.model(ids).logits[0].argmax(-1)[len(one["input_ids"]) - 1 : -1]
    place = one["learned"].index(True)
    changed = {**one, "labels": [*one["labels"][:place], int(best[place]), *one["labels"][place + 1 :]]}
    _, right = generator.judged(generator.collate([changed]))
    assert bool(right[0, place])
    assert not right[0][~torch.tensor(one["learned"])].any()


def test_no_gradient_comes_from_evidence(generator: HFGenerator) -> None:
    """Other words in the evidence's place change the loss, because they are read, and not by their own probability."""
    one = rows_of(generator)[0]
    objective = AnswerObjective(generator)
    with torch.no_grad():
        logprobs = generator.forward(generator.collate([one]))[0]
    assert (logprobs != 0).tolist() == [bool(ok) for ok in one["learned"]]
    told = zip(one["labels"], one["groups"], strict=True)
    other = {**one, "labels": [40 if GROUPS[group] == "passage" else token for token, group in told]}
    losses = [float(objective.loss(objective.collate([made]))[0]) for made in (one, other)]
    assert losses[0] != pytest.approx(losses[1], abs=1e-5)


# -------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("data", "objective", "fault"),
    [
        ({"kind": "self_rag", "path": "rows.jsonl"}, {"tokens": "first"}, "tokens first needs data of kind questions"),
        ({"kind": "questions", "path": "q.jsonl"}, {"group_weights": {"text": 2}}, "group_weights needs data of kind self_rag"),
        ({"kind": "questions", "path": "q.jsonl"}, {"off_grammar": 10}, "off_grammar needs data of kind self_rag.* no grammar"),
        ({"kind": "questions", "path": "q.jsonl"}, {"repeats": 1}, "repeats needs data of kind self_rag.* no segments"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(data: Any, objective: Any, fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        StageSettings.model_validate({"data": data, "objective": {"kind": "answer", **objective}})


def test_counts_of_a_file_add_up(generator: HFGenerator, tmp_path: Path) -> None:
    long = [segment("in the tin", "a b c d e f g h") for _ in range(3)]
    lines = [
        row(segment("the", "a"), id="a"), row(*long, id="b"), {"id": "c", "instruction": "x", "verbatim": "[Relevant]"},
        row(segment("x" * 400), id="d"),
    ]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    room = len(generator.marked_prompt.row_ids(lines[1], passage_max=5)) - 3  # IsUse, the end, and one more
    made = marked_rows(SelfRagData(kind="self_rag", path=path, dev=path, passage_max=5, max_length=room), generator, seed=0)
    told = made.figures
    assert (told["rows"], told["learned"], told["verbatim"], told["too_long"]) == (4, 2, 1, 1)
    assert (told["rows_cut"], told["passages_cut"]) == (1, 3)
    assert told["segments_lost"] == 1
    assert sum(told["tokens"].values()) == sum(sum(one["learned"]) for one in made.rows)
    assert len(made.held_out) == 2
    with pytest.raises(CorpusError, match="no row fits"):
        marked_rows(SelfRagData(kind="self_rag", path=path, max_length=8), generator, seed=0)
