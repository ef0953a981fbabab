"""A cell's prompts, step by step: which words of its factors each step sees, and what a draft must have.

The one who writes passages sees facts, genre and length and never the query; who answers sees what the student will see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raglan.records import Passage
from raglan.synthesis.endpoint.places import written_in
from raglan.synthesis.endpoint.prompts import Messages, Prompts
from raglan.synthesis.endpoint.replies import DraftReply, JobReply
from raglan.synthesis.factors import Factors
from raglan.synthesis.plan import ABSENT, Cell

__all__ = ["AGAINST", "Asking", "lacking", "shares", "sources"]

SEVERAL = ("R3", "R4", "R6", "R7")  # relations of more than one fact
AGAINST = ("R6", "R7")  # a corpus rarely contradicts itself: the second passage is written
DRAFT = ("task", "query_format", "length", "clarity", "difficulty", "persona", "answer_format", "relation")


class Asking:
    """The prompts of a plan's cells."""

    def __init__(self, prompts: Mapping[str, Prompts], factors: Factors):
        self.prompts = prompts
        self._words = {
            (name, value.name): {"en": value.en, "zh": value.zh}
            for name, factor in factors.factors.items()
            for value in factor.values
        }

    def language(self, cell: Cell, passages: Sequence[Passage] = ()) -> tuple[str, str]:
        """(of the question, of the passages). A cross cell asks in the other language than its passages have, by its seed."""
        if cell.language != "cross":
            return cell.language, cell.language
        read = (written_in(passages[0].text) or "en") if passages else ("en", "zh")[cell.seed % 2]
        return ("zh" if read == "en" else "en"), read

    def of(self, cell: Cell, passages: Sequence[Passage] = ()) -> Prompts:
        return self.prompts[self.language(cell, passages)[0]]

    def brainstorm(self, cell: Cell, count: int) -> Messages:
        prompts = self.prompts["en" if cell.language == "cross" else cell.language]
        return prompts.messages(
            "brainstorm", topic=self._said(cell, "topic", prompts), genre=self._said(cell, "genre", prompts),
            family=self._family(cell, prompts), count=str(count),
        )  # fmt: skip

    def brainstorm_corpus(self, cell: Cell, titles: Sequence[str], count: int) -> Messages:
        prompts = self.prompts["en" if cell.language == "cross" else cell.language]
        listed = "\n".join(f"- {title}" for title in titles)
        return prompts.messages("brainstorm_corpus", titles=listed, family=self._family(cell, prompts), count=str(count))

    def draft(
        self, cell: Cell, job: JobReply, passages: Sequence[Passage] = (), *, given: Mapping[str, str] | None = None
    ) -> Messages:
        """`given`: style, answer → its text."""
        prompts = self.of(cell, passages)
        told = (prompts.given[name].replace(f"{{{name}}}", text) for name, text in (given or {}).items())
        values = {name: self._said(cell, name, prompts) for name in DRAFT} | {
            "job": job.job,
            "notes": "\n".join(filter(None, (self._notes(cell, passages), *told))),
        }
        if passages:
            return prompts.messages("draft_corpus", passages=_numbered([_whole(one) for one in passages]), **values)
        more = {name: self._said(cell, name, prompts) for name in ("topic", "tailness")}
        return prompts.messages("draft", material=job.material, **more, **values)

    def passages(self, cell: Cell, facts: Sequence[Sequence[str]], source: Sequence[Passage] = ()) -> Messages:
        """A passage for each of these lists of facts; of the language of `source`, if it has to stand beside that."""
        prompts = self.prompts[self.language(cell, source)[1]]
        notes = [prompts.notes["hints"]] if cell.relation in ("R2", "R4") else []
        notes += [prompts.notes["dated"]] if cell.relation == "R7" else []
        listed = "\n\n".join(f"{number}.\n" + "\n".join(f"- {fact}" for fact in some) for number, some in enumerate(facts, 1))
        told = self._written(cell, prompts)
        if source:  # what was dealt is not what the corpus is about
            told |= {"genre": "", "topic": source[0].title}
        return prompts.messages("passages", facts=listed, notes="\n".join(notes), **told)

    def beside(self, cell: Cell, draft: DraftReply, count: int) -> Messages:
        """Passages that look like evidence and hold none of the facts."""
        prompts = self.prompts[self.language(cell)[1]]
        listed = "\n".join(f"- {fact}" for fact in draft.facts)
        return prompts.messages("beside", facts=listed, subject=draft.subject, count=str(count), **self._written(cell, prompts))

    def answer(self, cell: Cell, prompt: str, passages: Sequence[Passage] = ()) -> Messages:
        """What the student will be shown, letter by letter, and nothing of how it came about."""
        return self.of(cell, passages).messages("answer", prompt=prompt)

    def _written(self, cell: Cell, prompts: Prompts) -> dict[str, str]:
        lengths = list(prompts.words.values())
        return {
            "genre": self._said(cell, "genre", prompts), "topic": self._said(cell, "topic", prompts),
            "words": lengths[cell.seed_for("passage length") % len(lengths)], "language": prompts.languages[prompts.language],
        }  # fmt: skip

    def _notes(self, cell: Cell, passages: Sequence[Passage]) -> str:
        prompts = self.of(cell, passages)
        names = [
            "partial" if cell.absent_policy == "partial" else cell.relation,
            cell.query_format,
            cell.task,
            cell.answer_format,
        ]
        if cell.task in prompts.notes and cell.answer_format == "option_letter":
            names.pop()  # the task's own note says it
        names += [cell.verdict] if cell.verdict else []
        names += ["cross"] if cell.language == "cross" else []
        if passages:  # some notes have words of their own where the passages are there before the question
            names = [f"{name}_corpus" if f"{name}_corpus" in prompts.notes else name for name in names]
        return "\n".join(dict.fromkeys(prompts.notes[name] for name in names if name in prompts.notes))

    def _family(self, cell: Cell, prompts: Prompts) -> str:
        family = prompts.family(cell.task)
        return prompts.family_words.get(family) or self._said(cell, "task", prompts)

    def _said(self, cell: Cell, name: str, prompts: Prompts) -> str:
        value = str(getattr(cell, name))
        return self._words.get((name, value), {}).get(prompts.language, value)


def sources(cell: Cell) -> int:
    """How many passages of the corpus a cell's draft sees."""
    if cell.absent_policy == "partial":
        return 2
    return 1 if cell.relation in AGAINST else max(1, cell.evidence)


def shares(cell: Cell, facts: Sequence[str]) -> list[list[str]]:
    """Which facts each evidence passage carries: dealt in turn; all of them where there is one. Of R6 and R7 one each."""
    if cell.absent_policy == "partial":
        return [list(facts[:1])]
    if cell.relation in AGAINST:
        return [[fact] for fact in facts[: cell.evidence]]
    return [list(facts[place :: cell.evidence]) for place in range(cell.evidence)]


def lacking(cell: Cell, draft: DraftReply) -> str:
    """What a draft needs for its cell and has not, as a reason; empty if it has all."""
    if cell.relation in SEVERAL and len(draft.facts) < cell.evidence:
        return "too_few_facts"
    if cell.absent_policy == "partial" and len(draft.facts) < 2:
        return "too_few_facts"
    if cell.query_format == "chat_turn" and not draft.history:
        return "no_history"
    chosen = cell.task in ("multiple_choice", "classification") or cell.answer_format == "option_letter"
    if chosen and len(draft.labels) < 2:
        return "no_options"
    if draft.labels and cell.relation != ABSENT and not _folded(draft.answers) & _folded(draft.labels):
        return "answer_is_no_option"
    return "no_fields" if cell.answer_format == "json" and not draft.fields else ""


def _whole(passage: Passage) -> str:
    return f"{passage.title}\n{passage.text}".strip()


def _numbered(texts: Sequence[str]) -> str:
    return "\n\n".join(f"[{number}] {text}" for number, text in enumerate(texts, 1))


def _folded(texts: Sequence[str]) -> set[str]:
    return {text.casefold() for text in texts}
