"""Verification: every fault is rejected with its own reason, a verifier that fails is no pass, and sound examples stay."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from raglan.errors import CallsStopped, CorpusError, GeneratorError, RecipeError
from raglan.refusals import abstained
from raglan.verification import CHECKS, Judge, Shown, Verifier, Written, funnel, read_written
from test_cli import run

GOLD = Shown("The Aldermere observatory admitted its first visitors in 1873, under the astronomer Ilse Brandt.")
NOISE = Shown("In the year of the flood a fire destroyed the Harwick mill, and nobody built it again.", role="noise")
FALSE = Shown("The Aldermere observatory admitted its first visitors in 1874.", role="noise", false=("1874",))
ONE = Written(
    "a", "In which year was the Aldermere observatory opened?", "1873", (NOISE, GOLD), ("1873",), format="span", language="en"
)
QUOTED = "Word for word ##begin_quote##its first visitors in 1873##end_quote## is what decides here, it seems."
LONG = replace(ONE, target="The observatory was opened in 1873 [2].", format="sentence")
ABSENT = replace(
    ONE, target="The passages do not tell in which year it was opened.", passages=(NOISE, NOISE), evidence="R5", format="span"
)
ZH = Written(
    "zh",
    "青浦大桥哪一年通车？",
    "1998年",
    (Shown("青浦大桥于一九九八年建成通车。"),),
    ("1998年",),
    format="span",
    language="zh",
)


def reason(one: Written, verifier: Verifier | None = None) -> str:
    return (verifier or Verifier()).verify(one).reason


@pytest.mark.parametrize("one", [ONE, LONG, ABSENT, ZH], ids=["span", "cited", "absent", "zh"])
def test_sound_examples_stay(one: Written) -> None:
    made = Verifier().verify(one)
    assert made.accepted
    assert [verdict.check for verdict in made.verdicts] == list(CHECKS)
    assert {verdict.outcome for verdict in made.verdicts} <= {"pass", "n/a"}


@pytest.mark.parametrize(
    ("one", "why"),
    [
        # what a generator gets wrong about its passages
        (replace(LONG, target='The observatory opened in 1873: “it was opened by the queen” [2].'), "fabricated_quote"),
        (replace(LONG, target="It was 1873. ##begin_quote##opened 1873##end_quote##"), "fabricated_quote"),
        (replace(LONG, target="The observatory was opened in 1873 [9].", passages=(NOISE,) * 4 + (GOLD,)),
         "citation_out_of_range"),
        (replace(LONG, target="The observatory was opened in 1873 [0]."), "citation_out_of_range"),
        (replace(LONG, target="The observatory was opened in 1873 [1, 2]."), "noise_cited"),
        (replace(LONG, passages=(GOLD, GOLD)), "gold_not_cited"),
        (replace(ONE, passages=(NOISE, NOISE)), "answer_from_memory"),
        (replace(ONE, target="1874", passages=(GOLD, FALSE)), "counterfactual_followed"),
        (replace(ONE, target="1875"), "not_the_answer"),
        # gold absent
        (replace(ONE, target="The passages do not tell."), "abstains"),
        (replace(ABSENT, target="1901"), "does_not_abstain"),
        (replace(ABSENT, passages=(NOISE, GOLD)), "answer_shown"),
        (replace(ABSENT, target="1901", policy="own_knowledge"), "not_the_known_answer"),
        (replace(ABSENT, policy="partial"), "abstains"),
        (replace(ABSENT, passages=(NOISE, Shown("It opened.", "Opened in 1873", role="noise"))), "answer_shown"),
        (replace(ABSENT, target="It was built of stone.", policy="partial", passages=(NOISE, replace(GOLD, role="support"))),
         "answer_shown"),
        # where passages contradict each other, and where a reasoning quotes both and follows the wrong one
        (replace(LONG, passages=(GOLD, FALSE), target="It was opened in 1873 [1].", evidence="R6"), "one_sided"),
        (replace(ONE, passages=(GOLD, FALSE), format="reasoning", target=f"{QUOTED} <ANSWER>: 1874"),
         "counterfactual_followed"),
        (replace(ONE, format="reasoning", target=f"{QUOTED} <ANSWER>: 1901"), "not_the_answer"),
        # what was written
        (replace(ONE, finish="length"), "truncated"), (replace(ONE, finish="content_filter"), "truncated"),
        (replace(ONE, target=" … "), "empty"), (replace(ONE, target="于一八七三年开放给公众参观"), "language"),
        (replace(ONE, query="青浦大桥哪一年通车？"), "language"),
        (replace(ZH, query="When was the long bridge opened to cars?"), "language"),
        (replace(ONE, target="Das Observatorium wurde nach langer Zeit und vielen Mühen im Jahr 1873 endlich für alle Leute "
                 "der Stadt und des Landes eröffnet", format="paragraph"), "language"),
        (replace(ONE, target="1873 " * 30), "length"), (replace(LONG, target="1873"), "length"),
        (replace(ONE, format="option", target="the year 1873"), "format"),
        (replace(ONE, format="json", target="{'year': 1873}"), "format"),
        (replace(ONE, format="json", target='{"when": 1873}', fields=("year",)), "format"),
        (replace(ONE, format="number", target="several"), "format"), (replace(ONE, format="yes_no", target="1873"), "format"),
        (replace(ONE, format="table", target="| year |\n| 1873 | x |"), "format"), (replace(ONE, format="list"), "format"),
        (replace(ONE, format="label", labels=("supported", "refuted"), target="perhaps"), "format"),
        (replace(ONE, format="reasoning", target="It opened in 1873, as one passage says, so that is the year."), "format"),
        (replace(LONG, format="cited", target="The observatory was opened to all its visitors in the year 1873."), "format"),
        # a question that knows its passages
        (replace(ONE, query="According to the passage, when was it opened?"), "passage_talk"),
        (replace(ONE, query="What does report_2020.pdf say of the observatory?"), "passage_talk"),
        (replace(ZH, query="根据上文，青浦大桥哪一年通车？"), "passage_talk"),
        (replace(ZH, query="该文档说明大桥何时通车？"), "passage_talk"),
    ],
)  # fmt: skip
def test_every_fault_has_its_own_reason(one: Written, why: str) -> None:
    made = Verifier().verify(one)
    assert (made.accepted, made.reason) == (False, why)
    assert made.verdicts[-1].check == "support"
    assert why in {"answer_from_memory", "not_the_answer"} or made.verdicts[-1].reason == "failed before"


@pytest.mark.parametrize(
    "one",
    [
        replace(LONG, target='It “admitted its first  visitors in １８７３” [2].'),  # blanks and width are folded
        replace(LONG, target='The word "observatory" stands for a place to look from, opened in 1873 [2].'),
        replace(ONE, target="1873, though one says 1874", passages=(GOLD, FALSE)),
        replace(ABSENT, target="1873", policy="own_knowledge"),
        replace(ABSENT, format="label", answers=("no",), passages=(Shown("There is no mill.", role="noise"),)),
        replace(ONE, format="json", target='{"year": 1873}', fields=("year",)),
        replace(ONE, format="option", target="B.", labels=("A", "B"), answers=("B",)),
        replace(ONE, format="label", target="Not enough information", labels=("supported", "not enough information"),
                answers=("not enough information",)),
        replace(ONE, format="yes_no", target="No, it was opened in 1873.", answers=("no",)),
        replace(ONE, format="table", target="| year | who |\n| 1873 | Brandt |"),
        replace(ONE, query="Which text is the oldest in the library of the observatory?"),
        replace(ONE, passages=(Shown("The Aldermere observatory opened in 1,873", role="support"),)),
        replace(ZH, target="该桥于1998年通车", format="sentence"),
        replace(ONE, format="json", target='{"when it was first opened": "in the year 1873"}'),  # its marks quote nobody
        replace(ABSENT, target="It was 1873, and who paid for it is not said.", policy="partial", passages=(NOISE, GOLD),
                answers=("1873", "Countess Orla")),
        replace(ONE, passages=(GOLD, FALSE), format="reasoning", target=f"{QUOTED} Another says 1874. <ANSWER>: 1873"),
        replace(ONE, format="reasoning", target=f"{QUOTED} <ANSWER>: yes", answers=("yes",)),  # a label stands in no passage
        replace(ONE, format="json", target='{"verdict": "refuted"}', answers=("refuted",), labels=("supported", "refuted")),
    ],
)  # fmt: skip
def test_what_looks_like_a_fault_and_is_none(one: Written) -> None:
    assert Verifier().verify(one).reason == ""


def test_cited_counterfactuals_are_right_where_passages_conflict() -> None:
    both = "One passage says 1873 [1], the other says 1874 [2]."
    one = replace(LONG, target=both, passages=(GOLD, FALSE))
    assert reason(replace(one, evidence="R6")) == ""
    assert reason(one) == "noise_cited"


def test_declining() -> None:
    assert abstained("The passages do not say who built it. It may be old.")
    assert abstained("段落中没有提到是谁设计的。")
    assert not abstained("The passages do not say it, but it was 1873.", ("1873",))
    assert not abstained("It was 1873. They do not say more.")


OPEN = replace(ONE, answers=(), target="It admitted visitors in 1873. Ilse Brandt led it.", format="sentence")


def words_entail(pairs: Sequence[tuple[str, str]]) -> list[float]:
    """An NLI model of one rule: a sentence follows if the passage has all of its words of four letters and more."""
    return [float(all(word.strip(".") in premise for word in said.split() if len(word) > 3)) for premise, said in pairs]


def test_support_beyond_strings() -> None:
    assert reason(OPEN) == "support_missing"
    assert reason(OPEN, Verifier(may_be_missing=("support",))) == ""
    entailed = replace(OPEN, target="The observatory admitted visitors. The astronomer was Ilse Brandt.")
    assert reason(entailed, Verifier(nli=words_entail)) == ""
    assert reason(replace(entailed, passages=(NOISE,)), Verifier(nli=words_entail)) == "not_entailed"
    assert reason(replace(entailed, passages=(replace(GOLD, role="noise"),)), Verifier(nli=words_entail)) == "not_entailed"
    assert reason(replace(ONE, passages=(NOISE,)), Verifier(nli=words_entail)) == "answer_from_memory"


def test_a_judge_is_shown_the_evidence_and_asked_last() -> None:
    asked: list[str] = []

    def reply(text: str) -> Judge:
        return Judge(lambda prompt: asked.append(prompt) or text)  # type: ignore[func-returns-value]

    assert reason(OPEN, Verifier(judge=reply("Yes."))) == ""
    assert all(part in asked[0] for part in (OPEN.query, OPEN.target, NOISE.text, GOLD.text))
    assert reason(OPEN, Verifier(judge=reply("no, it does not"))) == "judged_unsupported"
    assert reason(OPEN, Verifier(judge=reply("perhaps"))) == "support_missing"
    asked.clear()
    assert reason(ONE, Verifier(judge=reply("no"))) == ""  # the string tells
    assert reason(replace(OPEN, finish="length"), Verifier(judge=reply("yes"))) == "truncated"
    assert asked == []  # neither costs a call
    tricky = replace(OPEN, query="What is {answer} in a template?")
    reason(tricky, Verifier(judge=reply("yes")))
    assert "What is {answer} in a template?" in asked[0]
    with pytest.raises(RecipeError, match=r"template has no \{passages\}"):
        Judge(lambda prompt: "yes", template="Is {answer} right? {query}")


def test_a_verifier_that_is_down_is_missing_and_never_a_pass() -> None:
    def down(_: object) -> list[float]:
        raise GeneratorError("the server is away")

    def reset(_: str) -> str:
        raise ConnectionResetError("reset")

    for verifier in (Verifier(nli=down), Verifier(judge=Judge(reset)), Verifier(nli=lambda pairs: [])):
        made = verifier.verify(OPEN)
        assert made.verdicts[-1].outcome == "missing"
        assert made.reason == "support_missing"
        counts = funnel([made, verifier.verify(ONE)])
        assert (counts["accepted"], counts["rejected"]) == (1, {"support_missing": 1})
        assert counts["checks"]["support"] == {"missing": 1, "pass": 1}  # type: ignore[index]

    behind = Verifier(nli=down, judge=Judge(lambda _: "yes")).verify(OPEN)
    assert (behind.reason, behind.verdicts[-1].reason) == ("", "judge"), "who is asked last can still tell"

    def capped(_: str) -> str:
        raise CallsStopped("the cap is reached", reason="cap")

    with pytest.raises(CallsStopped):
        Verifier(judge=Judge(capped)).verify(OPEN)
    with pytest.raises(RecipeError, match="no check is called 'sense'"):
        Verifier(may_be_missing=("sense",))


def test_lines_are_read_and_their_faults_named(tmp_path: Path) -> None:
    row = {"query": "Who?", "target": "Brandt", "passages": [{"text": "Ilse Brandt", "false": ["x"], "role": "noise"}]}
    file = tmp_path / "written.jsonl"
    file.write_text(json.dumps(row) + "\n")
    assert [one for _, one in read_written(file)] == [
        Written("1", "Who?", "Brandt", (Shown("Ilse Brandt", role="noise", false=("x",)),))
    ]
    for change, message in (
        ({"format": "song"}, "`format` is 'song'; it must be one of span"), ({"passages": "x"}, "must be a list"),
        ({"target": None}, "both must be texts"), ({"answers": [""]}, "none empty"),
        ({"passages": [{"text": ""}]}, "with `text`"),
        ({"passages": [{"text": "x", "role": "king"}]}, "`role` is 'king'"),
    ):  # fmt: skip
        file.write_text(json.dumps({**row, **change}) + "\n")
        with pytest.raises(CorpusError, match=f"line 1: .*{message}"):
            list(read_written(file))


def test_through_the_command_line(tmp_path: Path, capsys, monkeypatch) -> None:
    passages = [{"text": GOLD.text}, {"text": NOISE.text, "role": "noise"}]
    good = {"id": "good", "query": ONE.query, "target": "1873", "answers": ["1873"], "passages": passages, "note": "kept"}
    rows = [good, {**good, "id": "cut", "finish": "length"}, {**good, "id": "open", "answers": []}]
    file, kept, out = tmp_path / "written.jsonl", tmp_path / "kept.jsonl", tmp_path / "rejects.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def call(*words: str) -> tuple[int, str, str]:
        return run("verify", str(file), *words, capsys=capsys, monkeypatch=monkeypatch)

    code, told, said = call()
    assert (code, told.splitlines()) == (1, ["cut  truncated: length", "open  support_missing"])
    assert "3 examples, 1 accepted; rejected: 1 truncated, 1 support_missing" in said
    code, told, _ = call("--may-be-missing", "support", "-o", str(kept), "--rejects", str(out), "--json")
    assert (code, json.loads(told)["rejected"]) == (0, {"truncated": 1})
    assert json.loads(told)["checks"]["support"] == {"pass": 1, "n/a": 1, "missing": 1}
    assert [json.loads(line) for line in kept.read_text().splitlines()] == [rows[0], rows[2]]
    assert json.loads(out.read_text()) == {**rows[1], "rejected": "truncated", "detail": "length"}
