"""A synthesized dataset as training files for others: `sft`, `chat`, `raft`, `dpo` and `retriever`.

| form | a line |
|---|---|
| `sft` | {prompt, completion}: texts; the completion begins with the blank that parts them |
| `chat` | {messages}: earlier turns, the prompt, the answer |
| `raft` | {id, type, question, context {title, sentences}, oracle_context, cot_answer, instruction}, RAFT's columns |
| `dpo` | {prompt, chosen, rejected, pair}: see `raglan.exports.contrast` |
| `retriever` | {query, positive, negatives}: noise of the kinds hard and neighbour that the guard found clean, and no other |

The offline teacher's questions are made from sentences of their evidence, and words alone would find these again. So a
retriever's positive mostly loses them (inverse cloze task: Lee et al. 2019, who take the sentence out of 90 % of the blocks);
the line beside it keeps them. A passage that has no other sentence stays whole.

Passages stand in the order in which they were shown, and only those. Deviation from RAFT: where the evidence was taken away the
row's answer is the example's own, which declines; RAFT keeps the answer of the passage that is not there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from raglan.errors import RecipeError
from raglan.exports.check import Form, Lengths
from raglan.exports.contrast import pairs_of
from raglan.exports.rules import ANSWER, NEGATIVES
from raglan.exports.synthetic import HAN, Synthetic, reason
from raglan.exports.write import Written, dialogue, turn, write_rows
from raglan.knowledge import passage_text
from raglan.prompt import Prompt
from raglan.recipe import PromptSettings
from raglan.records import Passage
from raglan.rendering import read_rendering
from raglan.text import content_terms, sentences
from raglan.verification.said import holds

__all__ = ["LEAVE_OUT", "SYNTHETIC", "export_synthetic"]

SYNTHETIC: tuple[Form, ...] = ("sft", "chat", "raft", "dpo", "retriever")
LEAVE_OUT = 0.9
FEWEST_SHARED = 2  # words: a sentence with fewer of the answer's is no evidence of it
WHY = {
    "sft": "", "chat": "", "raft": "no sentence shown bears the answer out", "dpo": "no worse answer of like length is known",
    "retriever": "no evidence shown, no clean negative, or a question that follows earlier turns",
}  # fmt: skip


def export_synthetic(
    examples: Sequence[Synthetic], path: Path, *, form: Form, prompt: PromptSettings | None = None,
    lengths: Lengths | None = None, leave_out: float = LEAVE_OUT,
) -> Written:  # fmt: skip
    """Write a dataset in one of the forms of `SYNTHETIC`. What a form has no place for is left out and counted.

    Args:
        prompt: renders examples that do not hold their prompt as it was shown.
        lengths: refuse rows that are longer.
        leave_out: the share of `retriever` positives without the sentences that an offline question was made from.

    Raises:
        CorpusError: nothing to export, or a file that would have faults. RecipeError: a share that is none.
    """
    if not 0 <= leave_out <= 1:
        raise RecipeError(f"a share of {leave_out} positives cannot lose their sentences", hint="from 0 to 1")
    forms: dict[str, Callable[[Synthetic, _Asked], list[dict[str, Any]]]] = {
        "sft": _sft, "chat": _chat, "raft": _raft, "dpo": _dpo, "retriever": partial(_retriever, share=leave_out),
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    meta: list[dict[str, Any]] = []
    left_out = 0
    for one in examples:
        asked = _Asked.of(one, prompt or PromptSettings())
        made = forms[form](one, asked)
        left_out += not made
        rows += made
        meta += [_about(one, row, form, leave_out) for row in made]
    return write_rows(rows, meta, path, form, lengths=lengths, left_out=left_out, why=WHY[form])


@dataclass(frozen=True, slots=True)
class _Asked:
    """A prompt as text, and the white space that parts it from its answer."""

    text: str
    space: str
    turns: tuple[dict[str, str], ...]

    @classmethod
    def of(cls, one: Synthetic, settings: PromptSettings) -> _Asked:
        """As it was shown, if the example holds that or says how it was rendered; else the instruction, then the template."""
        if one.prompt:
            text, closes = one.prompt.rstrip(), one.prompt[len(one.prompt.rstrip()) :]
            return cls(text, closes or _blank(text), (turn("user", text),))
        query, history = one.example.query, one.example.history
        written, passages, before = Prompt(settings, None, layout="joined"), one.passages, f"{one.instruction}\n\n"
        if record := one.example.metadata["synth"].get("rendering"):
            rendering = read_rendering(record, where=f"example {one.example.id}")
            written, passages, before = rendering.worded(written, one.instruction), rendering.set(passages), ""
        texts = [f"{before}{written.text(query, passages, history=own)}".strip() for own in (history, ())]
        return cls(texts[0], written.answer_space or _blank(texts[0]), (*dialogue(history), turn("user", texts[1])))

    def pair(self, pair: tuple[str, str, str]) -> dict[str, Any]:
        chosen, rejected, name = pair
        return {"prompt": self.text, "chosen": self.space + chosen, "rejected": self.space + rejected, "pair": name}


def _blank(text: str) -> str:
    """What parts an answer from a prompt that does not say it: nothing behind a script or a mark without blanks."""
    return "" if HAN.match(text[-1:]) or text[-1:] in "：。？！" else " "


def _sft(one: Synthetic, asked: _Asked) -> list[dict[str, Any]]:
    return [{"prompt": asked.text, "completion": asked.space + one.target}]


def _chat(one: Synthetic, asked: _Asked) -> list[dict[str, Any]]:
    return [{"messages": [*asked.turns, turn("assistant", one.target)]}]


def _dpo(one: Synthetic, asked: _Asked) -> list[dict[str, Any]]:
    return [asked.pair(pair) for pair in pairs_of(one)]


def _retriever(one: Synthetic, _: _Asked, *, share: float) -> list[dict[str, Any]]:
    """A row a gold passage. A question that follows earlier turns means nothing to a search by itself."""
    positives = _positives(one, share)
    texts = [(passage_text(passage), _is_clean(slot)) for passage, slot in zip(one.passages, one.slots, strict=True)]
    others = {text for text, clean in texts if not clean}
    negatives = [text for text in dict.fromkeys(text for text, clean in texts if clean) if text not in others]
    if one.example.history or not negatives:
        return []
    return [{"query": one.example.query, "positive": text, "negatives": negatives} for text in positives]


def _positives(one: Synthetic, share: float) -> dict[str, list[str]]:
    """Each gold passage as a positive, and the sentences that it lost: which do is drawn by question and passage."""
    made_from = one.example.metadata["synth"].get("facts") or [] if one.teacher == "offline" else []
    found: dict[str, list[str]] = {}
    for passage in one.of_role("gold"):
        said = [str(sentence) for sentence in made_from if str(sentence) in passage.text]
        rest = passage.text
        for sentence in said:
            rest = _without(rest, sentence)
        drawn = random.Random(f"{one.example.id}:{one.example.query}:{passage.id}").random() < share
        if said and rest and drawn:
            found.setdefault(passage_text(replace(passage, text=rest)), said)
        else:
            found.setdefault(passage_text(passage), [])
    return found


def _without(text: str, sentence: str) -> str:
    while sentence in text:
        before, _, after = text.partition(sentence)
        text = f"{before}{after.lstrip()}".strip()
    return text


def _is_clean(slot: Mapping[str, Any]) -> bool:
    return slot.get("role") == "noise" and slot.get("kind") in NEGATIVES and slot.get("guard") == "clean"


def _raft(one: Synthetic, _: _Asked) -> list[dict[str, Any]]:
    reasoned = _reasoned(one)
    if reasoned is None:
        return []
    texts = [passage.text for passage in one.passages]
    question = "\n".join([*one.example.history, one.example.query])
    shown = "".join(f"<DOCUMENT>{text}</DOCUMENT>\n" for text in texts)
    return [{
        "id": one.example.id, "type": "general", "question": question,
        "context": {"title": [[passage.title for passage in one.passages]], "sentences": [texts]},
        "oracle_context": "\n\n".join(passage.text for passage in one.of_role("gold")),
        "cot_answer": reasoned, "instruction": shown + question,
    }]  # fmt: skip


def _reasoned(one: Synthetic) -> str | None:
    """The target behind sentences of the evidence, quoted; by itself where none was shown, None where none bears it out."""
    if ANSWER in one.target:
        return one.target
    evidence = one.of_role("gold")
    if not evidence:
        return f"{ANSWER} {one.target}" if one.relation in ("", "R5") else None
    quoted = [sentence for passage in evidence if (sentence := _bearing(one, passage)) is not None]
    if not quoted:
        return None
    quote = " ".join(f"##begin_quote##{sentence}##end_quote##" for sentence in dict.fromkeys(quoted))
    return reason(one.language).format(quote=quote) + one.target


def _bearing(one: Synthetic, passage: Passage) -> str | None:
    """The sentence that holds an answer, else the one with most of the target's words, if they are enough."""
    said = sentences(passage.text)
    if found := next((sentence for sentence in said if holds([sentence], one.example.answers)), None):
        return found
    wanted = set(content_terms(one.target)) | set(content_terms(one.example.query))
    best = max(said, key=lambda sentence: len(wanted & set(content_terms(sentence))), default=None)
    shared = set(content_terms(one.target)) & set(content_terms(best or ""))
    return best if len(shared) >= FEWEST_SHARED else None


def _about(one: Synthetic, row: Mapping[str, Any], form: Form, share: float) -> dict[str, Any]:
    """What the form has no place for. Of a retriever's: kinds of the negatives, in their order, and what the positive lost."""
    synth = one.example.metadata["synth"]
    told: dict[str, Any] = {
        "id": one.example.id, "query": one.example.query, "history": list(one.example.history),
        "answers": list(one.example.answers), "target": one.target, "teacher": synth.get("teacher"),
        "cell": synth.get("cell"), "ordinal": synth.get("ordinal"),
        "contexts": [
            {"passage_id": slot["id"], "role": slot.get("role"), "kind": slot.get("kind"), "guard": slot.get("guard")}
            for slot in one.slots
        ],
    }  # fmt: skip
    if form == "retriever":
        known = {passage_text(p): (s.get("kind"), s.get("guard")) for p, s in zip(one.passages, one.slots, strict=True)}
        told["negatives"] = [{"kind": kind, "guard": guard} for kind, guard in map(known.__getitem__, row["negatives"])]
        told["left_out"] = _positives(one, share)[row["positive"]]
    return told
