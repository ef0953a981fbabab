"""Rules of the lines that a synthesized dataset is written as: `sft`, `raft`, `dpo`, `retriever`. (`chat` is a conversation.)

What trainers read is TRL's prompt-completion and preference forms, RAFT's published columns, and the columns that
sentence-transformers' losses with hard negatives take once negatives are spread. `pair` and the rules about lengths, quotes and
kinds are ours.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from raglan.exports.messages import Found, line_keys
from raglan.text import shortened, words

__all__ = ["ANSWER", "LONGER", "NEGATIVES", "PAIRS", "alike", "meta_rules", "preference", "raft", "retriever", "sft"]

PAIRS = (
    "supported/unsupported", "gold/counterfactual", "abstain/hallucinate", "answer/over-abstain", "right/wrong_citation",
)  # fmt: skip
NEGATIVES = ("hard", "neighbour")  # kinds of noise that may become negatives
LONGER = 2  # times
RAFT = ("id", "type", "question", "context", "oracle_context", "cot_answer", "instruction")
OPENS, CLOSES, ANSWER = "##begin_quote##", "##end_quote##", "<ANSWER>:"
QUOTE = re.compile(f"{OPENS}(.*?){CLOSES}", re.DOTALL)


def alike(chosen: str, rejected: str) -> bool:
    """Whether neither of two texts has more than twice the words of the other (characters in Chinese)."""
    shorter, longer = sorted((len(words(chosen)), len(words(rejected))))
    return 0 < longer <= LONGER * shorter


def sft(row: Mapping[str, Any]) -> Iterator[Found]:
    yield from _texts(row, ("prompt", "completion"))


def preference(row: Mapping[str, Any]) -> Iterator[Found]:
    faults = list(_texts(row, ("prompt", "chosen", "rejected", "pair")))
    yield from faults
    if faults:
        return
    if row["pair"] not in PAIRS:
        yield "error", f"`pair` is {row['pair']!r}; it must be one of {', '.join(PAIRS)}"
    if row["chosen"].strip() == row["rejected"].strip():
        yield "error", "chosen and rejected are the same"
    elif not alike(row["chosen"], row["rejected"]):
        counts = [len(words(row[name])) for name in ("chosen", "rejected")]
        yield "error", f"chosen has {counts[0]} words and rejected {counts[1]}: one may have at most {LONGER} times the other's"


def retriever(row: Mapping[str, Any]) -> Iterator[Found]:
    yield from line_keys(dict(row), {"query", "positive", "negatives"})
    for name in ("query", "positive"):
        yield from _text(row, name)
    negatives = row.get("negatives")
    if not isinstance(negatives, list) or not negatives or not all(isinstance(one, str) and one.strip() for one in negatives):
        yield "error", "`negatives` must be a list of texts, at least one, none empty"
        return
    if len(set(negatives)) < len(negatives):
        yield "error", "a negative occurs twice"
    if row.get("positive") in negatives:
        yield "error", "the positive is among the negatives"


def meta_rules(row: Mapping[str, Any]) -> Iterator[Found]:
    """Of the line beside a `retriever` line: each negative is of a kind that may be one, and the guard found it clean."""
    for one in row.get("negatives") or ():
        kind, guard = one.get("kind"), one.get("guard")
        if kind not in NEGATIVES:
            yield "error", f"a negative is noise of kind {kind}; it must be one of {', '.join(NEGATIVES)}"
        elif guard != "clean":
            yield "error", f"the guard's verdict on a negative is {guard}; it must be clean"


def raft(row: Mapping[str, Any]) -> Iterator[Found]:
    yield from line_keys(dict(row), set(RAFT))
    for name in ("id", "type", "question", "cot_answer", "instruction"):
        yield from _text(row, name)
    shown = _shown(row.get("context"))
    if shown is None:
        yield "error", "`context` must be {title: [[K texts]], sentences: [[K texts]]}"
        return
    oracle, answer, asked = (row.get(name) for name in ("oracle_context", "cot_answer", "instruction"))
    if not isinstance(oracle, str) or not all(isinstance(text, str) for text in (answer, asked)):
        yield "error", "`oracle_context` must be a text; empty where the evidence was taken away"
        return
    yield from _reasoning(str(answer), shown, oracle)
    yield from _asks(str(asked), shown, str(row.get("question")))
    if oracle and not any(text in oracle for text in shown):
        yield "error", "`oracle_context` is not among the passages of `context`"


def _reasoning(answer: str, shown: list[str], oracle: str) -> Iterator[Found]:
    if answer.count(ANSWER) != 1 or not answer.partition(ANSWER)[2].strip():
        yield "error", f"`cot_answer` must hold {ANSWER} once, with the answer behind it"
    if answer.count(OPENS) != answer.count(CLOSES):
        yield "error", f"`cot_answer` has {answer.count(OPENS)} {OPENS} and {answer.count(CLOSES)} {CLOSES}"
    folded = [_folded(text) for text in shown]
    for quote in QUOTE.findall(answer):
        if not any(_folded(quote) in text for text in folded):
            yield "error", f"a quote stands in no passage: {shortened(quote.strip())!r}"
    if oracle and not QUOTE.search(answer):
        yield "error", "`cot_answer` quotes nothing, and the evidence is there"


def _asks(instruction: str, shown: list[str], question: str) -> Iterator[Found]:
    if not instruction.endswith(question):
        yield "error", "`instruction` must end with the question"
    left = [place for place, text in enumerate(shown, 1) if f"<DOCUMENT>{text}</DOCUMENT>" not in instruction]
    if left:
        yield "error", f"`instruction` lacks passage {left[0]} of `context`"


def _shown(context: Any) -> list[str] | None:
    """The passages of RAFT's `context`, which has one list in another."""
    if not isinstance(context, Mapping) or set(context) != {"title", "sentences"}:
        return None
    lists = [context[name] for name in ("title", "sentences")]
    if not all(isinstance(one, list) and len(one) == 1 and isinstance(one[0], list) for one in lists):
        return None
    titles, texts = (one[0] for one in lists)
    fits = len(titles) == len(texts) and texts and all(isinstance(text, str) for text in (*titles, *texts))
    return list(texts) if fits else None


def _texts(row: Mapping[str, Any], names: tuple[str, ...]) -> Iterator[Found]:
    if set(row) != set(names):
        yield "error", f"the keys are {', '.join(sorted(row)) or 'none'}; they must be {', '.join(names)}"
        return
    for name in names:
        yield from _text(row, name)


def _text(row: Mapping[str, Any], name: str) -> Iterator[Found]:
    if not isinstance(row.get(name), str) or not row[name].strip():
        yield "error", f"`{name}` must be a text that is not empty"


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())
