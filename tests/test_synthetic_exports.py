"""A synthesized dataset as training files for others: what each form holds, what never gets in, and every planted fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import tiny
from raglan import cli
from raglan.errors import CorpusError, RecipeError
from raglan.exports import SYNTHETIC, Lengths, check_file, export_synthetic, failed, holds_synthetic, read_synthetic
from raglan.exports.contrast import pairs_of
from raglan.exports.rules import PAIRS
from raglan.exports.synthetic import wordings
from raglan.prompt import Prompt
from raglan.recipe import PromptSettings
from raglan.refusals import abstained
from raglan.rendering import Rendering, render
from raglan.text import words
from raglan.verification.said import holds


def run(*said: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["raglan", *map(str, said)])
        with pytest.raises(SystemExit) as done:
            cli.main()
    return int(done.value.code or 0)


GOLD = "The Vessen lighthouse stands on a rock. It was first lit in 1831. Its keepers lived below."
LIT = "It was first lit in 1831."


def slot(number: int, text: str, role: str = "noise", kind: str = "hard", guard: str = "clean", **more: Any) -> dict[str, Any]:
    place = {"id": f"p{number}", "document": f"d{number}", "title": more.pop("title", ""), "text": text}
    return {**place, "role": role, "kind": kind, "guard": guard, "origin": "search", "operator": "", "parents": [], **more}


NOISE = [
    slot(2, "The mill of Vessen was built of oak."),
    slot(3, "The harbour was dredged in 1831 by hand.", guard="answer_string_only"),
    slot(4, "A chapel stands beside the rock.", kind="neighbour", title="Rock"),
    slot(5, "The Vessen lighthouse was first lit in 1847.", kind="counterfactual", guard="exempt", value="1847"),
    slot(6, "In 1831 the Vessen lighthouse was first lit.", role="redundant", kind="near_duplicate", guard="exempt"),
    slot(7, "It was f1rst l1t in 18", kind="garbled", guard="exempt"),
    slot(8, "Ferries leave at noon.", guard="unchecked"),
    slot(9, "Accept all cookies.", kind="boilerplate"),
    slot(10, "Bread is baked from rye.", kind="random"),
]


def example(name: str, target: str, *, relation: str = "R1", **more: Any) -> dict[str, Any]:
    synth = {
        "cell": len(name), "ordinal": 0, "teacher": "offline", "instruction": more.pop("instruction", "Answer in a few words."),
        "factors": {"relation": relation, "language": "en"}, "target": target,
        "passages": more.pop("passages", [NOISE[0], slot(1, GOLD, "gold", "gold", "exempt", title="Lighthouse"), *NOISE[1:]]),
        **more.pop("synth", {}),
    }  # fmt: skip
    asked = {"query": "When was the Vessen lighthouse first lit?", "answers": ["1831"], **more}
    return {"id": f"synth-{name}", **asked, "synth": synth}


ZH = [
    slot(11, "青浦大桥位于江上。大桥于一九九八年建成通车。", "gold", "gold", "exempt"),
    slot(12, "城北的老桥用石头砌成。"),
]
ROWS = [
    example("span", "1831"),
    example("sentence", "The Vessen lighthouse was first lit in 1831."),
    example(
        "absent", "The passages do not tell when the lighthouse was first lit.", relation="R5", passages=NOISE[:1] + NOISE[8:],
        synth={"policy": "abstain"},
    ),
    example("known", "1831", relation="R5", passages=NOISE[:1] + NOISE[8:], synth={"policy": "own_knowledge"}),
    example("cited", "The lighthouse stands on a rock and was first lit in 1831 [2].", instruction="Cite passages as [1]."),
    example("choice", "B", synth={"labels": ["A", "B", "C"]}, answers=[]),
    example("turns", "In 1831.", history=["Is there a lighthouse at Vessen?", "Yes, on a rock."], query="And when was it lit?"),
    example("raft", "##Reason: ##begin_quote##It was first lit in 1831.##end_quote##\n<ANSWER>: 1831"),
    example("zh", "1998年", query="青浦大桥哪一年通车？", answers=["1998年"], passages=ZH, instruction="用几个词回答。"),
]  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS]
    (folder / "examples.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "train.jsonl").write_text("".join(lines[:2]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def files(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each form, written through the command line."""
    folder = tmp_path_factory.mktemp("files")
    for form in SYNTHETIC:
        assert run("synthesize", "export", dataset, "--as", form, "-o", folder / f"{form}.jsonl") == 0
    return {form: folder / f"{form}.jsonl" for form in SYNTHETIC}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def by_id(path: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row, meta in zip(read(path), read(path.with_suffix(".meta.jsonl")), strict=True):
        found.setdefault(meta["id"].removeprefix("synth-"), []).append(row)
    return found


def test_what_is_written_has_no_fault(files: dict[str, Path]) -> None:
    for form, path in files.items():
        assert [fault for fault in check_file(path, form) if fault.level == "error"] == [], form  # type: ignore[arg-type]


def test_a_row_holds_what_was_shown_in_its_order_and_the_target(files: dict[str, Path]) -> None:
    for row, source in zip(read(files["sft"]), ROWS, strict=True):
        synth = source["synth"]
        places = [row["prompt"].index(one["text"]) for one in synth["passages"]]
        assert places == sorted(places)
        assert synth["instruction"] in row["prompt"]
        assert source["query"] in row["prompt"]
        assert row["completion"] == " " + synth["target"]
        for word in ("redundant", "counterfactual", "garbled", "1998年" if source["id"] == "synth-zh" else "near_duplicate"):
            assert word not in row["prompt"]
    talk = by_id(files["chat"])["turns"][0]["messages"]
    assert [message["role"] for message in talk] == ["user", "assistant", "user", "assistant"]
    assert talk[0]["content"] == ROWS[6]["history"][0]
    assert talk[-1]["content"] == "In 1831."
    assert "Is there a lighthouse" not in talk[2]["content"]


def test_a_prompt_that_an_example_holds_is_taken_as_it_is(tmp_path: Path) -> None:
    shown = "[INST] 材料……\n问题：何时？\n回答："
    row = example("kept", "1831", synth={"prompt": shown})
    (tmp_path / "one.jsonl").write_text(json.dumps(row), encoding="utf-8")
    made = export_synthetic(list(read_synthetic(tmp_path / "one.jsonl")), tmp_path / "sft.jsonl", form="sft")
    assert read(made.path) == [{"prompt": shown, "completion": "1831"}]


@pytest.mark.parametrize("form", ["numbered", "xml", "json"])
@pytest.mark.parametrize("template", ["question_first", "labelled_parts"])
def test_a_prompt_is_rendered_as_the_example_says(tmp_path: Path, template: str, form: str) -> None:
    """Exactly what is read while training: the same words, form and head."""
    rendering = Rendering(template=template, form=form, head="title", language="zh")
    row = example("put", "1831", synth={"rendering": rendering.record()})
    (tmp_path / "one.jsonl").write_text(json.dumps(row), encoding="utf-8")
    one = next(read_synthetic(tmp_path / "one.jsonl"))
    made = read(export_synthetic([one], tmp_path / "sft.jsonl", form="sft").path)[0]
    words_ = tiny.tokenizer(begins=True, ends=False)
    prompt = Prompt(PromptSettings(max_tokens=4096), words_, layout="joined")
    asked = render(prompt, rendering, one.example.query, one.passages, instruction=one.instruction)
    assert made["prompt"] == asked.text
    assert made["completion"] == (asked.answer_space or "") + "1831"


def test_trl_and_datasets_read_what_is_written(files: dict[str, Path]) -> None:
    """The standard prompt-completion and preference types, whose prompt and answer are joined as they stand."""
    from datasets import load_dataset

    columns = {"sft": {"prompt", "completion"}, "chat": {"messages"}, "dpo": {"prompt", "chosen", "rejected", "pair"}}
    for form, path in files.items():
        loaded = load_dataset("json", data_files=str(path), split="train", cache_dir=str(path.parent / "cache"))
        assert loaded.to_list() == read(path)
        assert set(loaded.column_names) == columns.get(form, set(loaded.column_names))
    for row in read(files["sft"]):
        assert f"{row['prompt']}{row['completion']}".count("Answer: ") == 1
        assert not row["prompt"][-1].isspace()


def test_raft_rows_quote_the_evidence(files: dict[str, Path]) -> None:
    rows = {name: found[0] for name, found in by_id(files["raft"]).items()}
    assert set(rows["span"]) == {"id", "type", "question", "context", "oracle_context", "cot_answer", "instruction"}
    assert rows["span"]["oracle_context"] == GOLD
    assert "##begin_quote##It was first lit in 1831.##end_quote##" in rows["span"]["cot_answer"]
    assert rows["span"]["cot_answer"].endswith("<ANSWER>: 1831")
    assert "##begin_quote##大桥于一九九八年建成通车。##end_quote##" in rows["zh"]["cot_answer"]
    assert rows["raft"]["cot_answer"] == ROWS[7]["synth"]["target"]
    assert rows["absent"]["oracle_context"] == ""
    assert rows["absent"]["cot_answer"] == "<ANSWER>: The passages do not tell when the lighthouse was first lit."
    assert "1831" not in rows["absent"]["instruction"] + rows["absent"]["cot_answer"]
    assert "choice" not in rows  # no sentence bears a letter out
    shown = [one["text"] for one in ROWS[0]["synth"]["passages"]]
    assert rows["span"]["context"]["sentences"] == [shown]
    assert rows["span"]["instruction"] == "".join(f"<DOCUMENT>{text}</DOCUMENT>\n" for text in shown) + ROWS[0]["query"]


def test_pairs_are_of_all_kinds_and_alike_in_length(files: dict[str, Path]) -> None:
    rows = by_id(files["dpo"])
    assert {row["pair"] for found in rows.values() for row in found} == set(PAIRS)
    for name, found in rows.items():
        source = next(row for row in ROWS if row["id"] == f"synth-{name}")
        assert len({row["pair"] for row in found}) == len(found)
        for row in found:
            better, worse = row["chosen"].strip(), row["rejected"].strip()
            assert better == source["synth"]["target"]
            counts = sorted([len(words(better)), len(words(worse))])
            assert counts[1] <= 2 * counts[0]
            shown = [one["text"] for one in source["synth"]["passages"]]
            if row["pair"] in ("supported/unsupported", "gold/counterfactual") and name != "choice":
                assert holds([better], source["answers"])
                assert not holds([worse], source["answers"])
            if row["pair"] == "supported/unsupported" and name != "choice":
                false = set(words(worse)) - set(words(better))
                assert false
                assert not any(value in words(text) for value in false for text in shown)
            if row["pair"] == "gold/counterfactual":
                assert "1847" in worse
            if row["pair"] == "abstain/hallucinate":
                assert abstained(better)
                assert not abstained(worse)
                assert not holds([worse], source["answers"])
            if row["pair"] == "answer/over-abstain":
                assert abstained(worse)
                assert not abstained(better)
    assert "known" not in rows
    wrong = next(row["rejected"] for row in rows["cited"] if row["pair"] == "right/wrong_citation")
    place = int(wrong.partition("[")[2].partition("]")[0])
    assert ROWS[4]["synth"]["passages"][place - 1]["role"] == "noise"
    assert wrong.replace(f"[{place}]", "[2]").strip() == ROWS[4]["synth"]["target"]
    assert any(row["pair"] == "supported/unsupported" for row in rows["zh"])


def test_wordings_of_worse_answers_are_what_they_are_said_to_be() -> None:
    for language in ("en", "zh"):
        assert all(abstained(text) for text in wordings("over_abstains", language))
        assert not any(abstained(text.format(value="1847")) for text in wordings("hallucinates", language))
        counts = [len(words(text)) for text in wordings("over_abstains", language)]
        assert counts == sorted(counts)
        assert all(4 * one >= other for one, other in pairwise(counts))  # so that between two a length is near to one of them


def test_negatives_are_clean_and_of_two_kinds_only(files: dict[str, Path]) -> None:
    rows = by_id(files["retriever"])
    assert rows["span"] == [{
        "query": "When was the Vessen lighthouse first lit?", "positive": f"Lighthouse\n{GOLD}",
        "negatives": ["The mill of Vessen was built of oak.", "Rock\nA chapel stands beside the rock."],
    }]  # fmt: skip
    assert set(rows) == {"span", "sentence", "cited", "choice", "raft", "zh"}  # none without gold, none that follows a turn


def inverse_cloze(number: int, *, teacher: str = "offline", text: str = GOLD, said: str = LIT) -> dict[str, Any]:
    gold = slot(1, text, "gold", "gold", "exempt", title="Lighthouse")
    return example(f"cloze{number}", "1831", passages=[NOISE[0], gold], synth={"teacher": teacher, "facts": [said]})


def exported(folder: Path, rows: list[dict[str, Any]], *more: object) -> tuple[list[str], list[dict[str, Any]]]:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / "examples.jsonl").write_text("".join(lines), encoding="utf-8")
    path = folder / "retriever.jsonl"
    assert run("synthesize", "export", folder, "--as", "retriever", "-o", path, *more) == 0
    return [row["positive"] for row in read(path)], read(path.with_suffix(".meta.jsonl"))


def test_a_sentence_that_was_asked_about_mostly_leaves_its_positive(tmp_path: Path) -> None:
    rows = [inverse_cloze(n) for n in range(400)]
    positives, meta = exported(tmp_path, rows)
    whole, without = "Lighthouse\n" + GOLD, "Lighthouse\nThe Vessen lighthouse stands on a rock. Its keepers lived below."
    assert set(positives) == {whole, without}
    assert 340 <= positives.count(without) <= 380
    assert [told["left_out"] for told in meta] == [[LIT] if text == without else [] for text in positives]
    assert exported(tmp_path, rows)[0] == positives, "the row decides, and not the run"
    assert exported(tmp_path, rows[::-1])[0] == positives[::-1]
    assert set(exported(tmp_path, rows, "--leave-out", 0)[0]) == {whole}
    assert set(exported(tmp_path, rows, "--leave-out", 1)[0]) == {without}


def test_other_positives_stay_whole(tmp_path: Path) -> None:
    rows = [
        inverse_cloze(0, teacher="endpoint"), inverse_cloze(1, text=LIT), inverse_cloze(2, said="It says nothing of the kind."),
        inverse_cloze(3, text="大桥于一九九八年建成通车。青浦大桥位于江上。", said="大桥于一九九八年建成通车。"),
    ]  # fmt: skip
    positives, _ = exported(tmp_path, rows, "--leave-out", 1)
    assert positives[:3] == [f"Lighthouse\n{GOLD}", f"Lighthouse\n{LIT}", f"Lighthouse\n{GOLD}"]
    assert positives[3] == "Lighthouse\n青浦大桥位于江上。"


def test_a_tampered_meta_line_tells_of_a_negative_that_is_none(files: dict[str, Path], tmp_path: Path) -> None:
    for change, message in (
        ({"kind": "counterfactual"}, "noise of kind counterfactual"), ({"guard": "unchecked"}, "is unchecked"),
        ({"kind": "near_duplicate"}, "noise of kind near_duplicate"), ({"kind": "garbled"}, "noise of kind garbled"),
    ):  # fmt: skip
        path = tmp_path / "r.jsonl"
        path.write_bytes(files["retriever"].read_bytes())
        meta = read(files["retriever"].with_suffix(".meta.jsonl"))
        meta[1]["negatives"][0] |= change
        (tmp_path / "r.meta.jsonl").write_text("".join(json.dumps(row) + "\n" for row in meta), encoding="utf-8")
        faults = [fault for fault in check_file(path, "retriever") if fault.level == "error"]
        assert [fault.line for fault in faults] == [2]
        assert message in faults[0].text


def test_every_planted_fault_is_caught_with_its_line(files: dict[str, Path], tmp_path: Path) -> None:
    def quoted(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "cot_answer": row["cot_answer"].replace("first lit in 1831", "never lit")}

    cases: list[tuple[str, Callable[[dict[str, Any]], dict[str, Any]], str]] = [
        ("sft", lambda row: {**row, "completion": " "}, "`completion` must be a text"),
        ("sft", lambda row: {**row, "text": "x"}, "the keys are"),
        ("chat", lambda row: {"messages": row["messages"][:-1]}, "no assistant message|last message"),
        ("chat", lambda row: {**row, "tools": []}, "tools"),
        ("dpo", lambda row: {**row, "pair": "good/bad"}, "it must be one of"),
        ("dpo", lambda row: {**row, "rejected": row["chosen"]}, "are the same"),
        ("dpo", lambda row: {**row, "rejected": "no " * 40}, "at most 2 times"),
        ("raft", quoted, "stands in no passage"),
        ("raft", lambda row: {**row, "cot_answer": row["cot_answer"].replace("<ANSWER>:", "")}, "must hold <ANSWER>:"),
        ("raft", lambda row: {**row, "cot_answer": row["cot_answer"].replace("##end_quote##", "")}, "1 ##begin_quote##"),
        ("raft", lambda row: {**row, "context": {"title": [[]], "sentences": [["a"]]}}, "`context` must be"),
        ("raft", lambda row: {**row, "instruction": "?" + row["question"]}, "lacks passage 1"),
        ("raft", lambda row: {**row, "oracle_context": "elsewhere"}, "is not among"),
        ("raft", lambda row: {**row, "cot_answer": "<ANSWER>: 1831"}, "quotes nothing"),
        ("retriever", lambda row: {**row, "negatives": []}, "at least one"),
        ("retriever", lambda row: {**row, "negatives": [row["positive"]]}, "among the negatives"),
        ("retriever", lambda row: {**row, "negatives": ["a", "a"]}, "occurs twice"),
    ]
    for form, spoil, message in cases:
        rows = read(files[form])
        rows[0] = spoil(rows[0])
        (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        faults = check_file(tmp_path / "bad.jsonl", form)  # type: ignore[arg-type]
        assert failed(faults)
        with pytest.raises(AssertionError, match=message):
            raise AssertionError("; ".join(fault.text for fault in faults if fault.line == 1))


def test_a_round_trip_gives_every_example_back(dataset: Path, files: dict[str, Path]) -> None:
    read_back = {one.example.id: one for one in read_synthetic(dataset)}
    assert list(read_back) == [row["id"] for row in ROWS]
    for form in SYNTHETIC:
        for row, meta in zip(read(files[form]), read(files[form].with_suffix(".meta.jsonl")), strict=True):
            one = read_back[meta["id"]]
            assert (meta["query"], meta["target"]) == (one.example.query, one.target)
            assert meta["answers"] == list(one.example.answers)
            assert [slot["passage_id"] for slot in meta["contexts"]] == [slot["id"] for slot in one.slots]
            said = {
                "sft": lambda r: r["completion"], "chat": lambda r: r["messages"][-1]["content"], "dpo": lambda r: r["chosen"],
                "raft": lambda r: r["cot_answer"].rpartition("<ANSWER>:")[2],
            }.get(form)  # fmt: skip
            if said is not None:
                assert one.target.rpartition("<ANSWER>:")[2].strip() in said(row)
        again = files[form].with_name(f"again-{form}.jsonl")
        export_synthetic(list(read_synthetic(dataset)), again, form=form)
        assert again.read_bytes() == files[form].read_bytes()


def test_lengths_and_shared_questions_are_checked_there_too(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.mistral(tmp_path / "words")
    lengths = Lengths.of(str(folder))
    assert lengths is not None
    for form in ("sft", "chat", "dpo"):
        assert not failed(check_file(files[form], form, lengths=lengths))  # type: ignore[arg-type]
        short = check_file(files[form], form, lengths=Lengths(lengths.tokenizer, 40))  # type: ignore[arg-type]
        assert any("tokens; the model takes 40" in fault.text for fault in short)
    capsys.readouterr()
    assert run("synthesize", "check", files["raft"], "--as", "raft", "--validation", files["raft"]) == 2
    assert "also stands in" in capsys.readouterr().out


def test_what_is_no_dataset_is_refused(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"id": "a", "query": "who?", "answers": ["x"]}\n')
    assert holds_synthetic(dataset)
    assert not holds_synthetic(tmp_path / "q.jsonl")
    with pytest.raises(CorpusError, match="is not synthetic"):
        list(read_synthetic(tmp_path / "q.jsonl"))
    with pytest.raises(RecipeError, match="has no split"):
        list(read_synthetic(tmp_path / "q.jsonl", split="train"))
    assert [one.example.id for one in read_synthetic(dataset, split="train")] == ["synth-span", "synth-sentence"]
    for wrong in (["--as", "sft", "-k", 3], ["--as", "openai-chat", "--split", "train"]):
        assert run("synthesize", "export", dataset, "-o", tmp_path / "x.jsonl", *wrong) == 2
    assert list(pairs_of(next(read_synthetic(dataset))))
