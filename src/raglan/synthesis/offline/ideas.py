"""What an example is to ask, from the rows of one document: forms that are grammatical by construction.

    cloze        a sentence with a gap                              "Which year completes this: …"
    bridge       two passages of one X, the gap in the second       where a cell needs two passages
    list         several gaps
    claim        a sentence as it is, or with a false value of the same type
    options      a cloze with its answer among values of the same type
    definition   "X is …"; else the sentence that brings up what a document is about
    account      whole sentences of a passage, or of two that share a name

Nothing is paraphrased, so nothing can be said that no passage says. What this cannot write is listed in `CANNOT`.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from raglan.perturb import swap
from raglan.records import Passage
from raglan.synthesis.offline.gaps import keywords, overlap, window
from raglan.synthesis.offline.sources import Fact, Link, Sentence, Source, subject
from raglan.synthesis.offline.spans import KINDS
from raglan.synthesis.plan import ABSENT, Cell
from raglan.synthesis.writing import Draft, Job
from raglan.text import content_terms
from raglan.text import words as counted
from raglan.verification.said import holds

__all__ = ["Idea", "find_idea", "needs_link", "phrases"]

LETTERS = "ABCD"
FEW, MOST_KEYWORDS = 8, 12
CLAIMED = ("yes_no", "fact_verification", "claim_correction")
TALES = ("long_form", "summary")
SENTENCE, PARAGRAPH, REASONED = 60, 15, 4  # most words of a sentence, fewest of a paragraph and of a quote
X = "X"
UNQUOTED = str.maketrans("", "", '“”"')  # of a claim that is written out: words are left out, so it quotes nobody


@dataclass(frozen=True, slots=True)
class Idea:
    """A draft, and what its answer is made of.

    Attributes:
        form: which of the forms. `kind`: of the span that is asked for.
        value: the short answer, as it is said. `items`: several.
        quotes: the sentences that hold it, with their passages.
        true: a claim as it should be; `wrong` whether the question has it otherwise.
        about: what the passages are about, for an answer that declines.
    """

    draft: Draft
    form: str
    value: str
    quotes: tuple[tuple[Passage, str], ...]
    kind: str = ""
    items: tuple[str, ...] = ()
    true: str = ""
    wrong: bool = False
    about: str = ""


@dataclass(frozen=True, slots=True)
class Asked:
    """A text with a gap, its parts without what joins them, the fact that fills it, and the sentences that it was made from."""

    text: str
    parts: tuple[str, ...]
    fact: Fact
    evidence: tuple[tuple[Passage, Sentence], ...]


def _first(ideas: Iterable[Idea | None]) -> Idea | None:
    return next((idea for idea in ideas if idea is not None), None)


@cache
def phrases(language: str) -> Mapping[str, Any]:
    """words.yaml of one language."""
    told: Mapping[str, Any] = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))
    return told[language]  # type: ignore[no-any-return]


def find_idea(job: Job, source: Source, rows: Sequence[int], *, most: float) -> Idea | None:
    """What to ask for this job from a document's passages; None where they hold nothing of the kind.

    Args:
        rows: of the document, in the corpus.
        most: overlap of a question with a sentence that it is made from.
    """
    return _Finder(job, source, rows, most).find()


def needs_link(cell: Cell) -> bool:
    """Whether a cell is written from two passages that share a name."""
    return cell.evidence > 1 or (cell.relation == ABSENT and cell.task == "bridge")


class _Finder:
    def __init__(self, job: Job, source: Source, rows: Sequence[int], most: float):
        self.job, self.cell, self.source, self.most = job, job.cell, source, most
        self.told = phrases(job.cell.language)
        self.chance = random.Random(f"{job.seed('offline')}:{rows[0]}")
        self.rows = self.chance.sample(list(rows), len(rows))
        self.absent = job.cell.relation == ABSENT
        self.linked = needs_link(job.cell)

    def find(self) -> Idea | None:
        cell = self.cell
        if cell.task == "definition":
            return self.account("definition") if self.linked else self.definition()
        if cell.task == "list":
            return self.listing()
        if cell.task in TALES or cell.answer_format in ("paragraph", "cited_long"):
            return self.account("summary" if cell.task == "summary" else "long")
        if cell.answer_format == "list":
            return self.listing()
        if cell.task in CLAIMED or cell.answer_format == "yes_no_reason":
            return self.claim()
        return self.short()

    # what can be asked

    def kinds(self) -> tuple[str, ...]:
        if self.cell.answer_format == "number_unit" or self.cell.task == "numeric":
            return ("number",)
        if self.cell.task == "temporal":
            return ("year", "date")
        if self.cell.task == "multiple_choice":
            return ("year", "date", "number", "name")
        plain = self.cell.answer_format in ("span", "short_sentence", "json") and self.cell.task not in CLAIMED
        return KINDS if plain else KINDS[:-1]

    def facts(self) -> Iterator[Fact]:
        kinds = self.kinds()
        return (fact for row in self.rows for fact in self._shuffled(list(self.source.facts(row, kinds))))

    def links(self) -> Iterator[Link]:
        return (link for row in self.rows for link in self._shuffled(list(self.source.links.get(row, ()))))

    def _shuffled(self, items: list[Any]) -> list[Any]:
        return self.chance.sample(items, len(items))

    def gapped(self, fact: Fact, *, beside: str = "") -> Asked | None:
        """The fact's sentence cut down, with a gap for its span, under its subject."""
        name = subject(fact.passage)
        terms, span = fact.sentence.terms, fact.span
        text = window(
            fact.sentence.text, terms, span.start, span.end, filler=self.told["gap"], most=self.most,
            beside=content_terms(f"{name} {beside}"), cut=self.told["cut"],
        )  # fmt: skip
        if text is None or _says(text, span.aliases):
            return None
        quoted = str(self.told["quoted"].format(text=text))
        said = str(self.told["about"].format(title=name, c=quoted)) if name else quoted
        return Asked(said, (name, text) if name else (text,), fact, ((fact.passage, fact.sentence),))

    def bridged(self, link: Link, *, stated: bool) -> Asked | None:
        """Two sentences with X for what they share, the second with a gap."""
        a, b, size = link.first[1], link.second[1], len(link.name)
        at, place = a.text.find(link.name), b.text.find(link.name)
        first = window(a.text, a.terms, at, at + size, filler=X, most=self.most, cut=self.told["cut"])
        wanted = self.kinds()
        for span in self._shuffled([span for span in b.spans if span.kind in wanted]):
            apart = span.end <= place or place + size <= span.start
            if first is None or not apart or _says(first, span.aliases):
                continue
            gap = self.told["gap"]
            left, right = min(place, span.start), max(place + size, span.end)
            middle = b.text[min(place + size, span.end) : max(place, span.start)]
            core = f"{X}{middle}{gap}" if place < span.start else f"{gap}{middle}{X}"
            beside = content_terms(span.text) if stated else ()
            second = window(
                b.text, b.terms, left, right, filler=core, most=self.most, beside=beside, cut=self.told["cut"]
            )
            if second is not None and not _says(second, span.aliases):
                quoted = [self.told["quoted"].format(text=text) for text in (first, second)]
                text = str(self.chance.choice(self.told["bridge"]).format(a=quoted[0], c=quoted[1]))
                return Asked(text, (first, second), Fact(link.second[0], b, span), (link.first, link.second))
        return None

    def asked(self, *, stated: bool = False) -> Iterator[Asked]:
        """Question texts that can be made, a few.

        Args:
            stated: the text will hold the value, so that its terms count as kept.
        """
        made = (
            (self.bridged(link, stated=stated) for link in self.links())
            if self.linked
            else (self.gapped(fact, beside=fact.span.text if stated else "") for fact in self.facts())
        )
        return islice((one for one in made if one is not None), FEW)

    # forms

    def short(self) -> Idea | None:
        """Cloze, bridge, options and JSON."""
        if self.cell.task == "multiple_choice":
            return _first(self.options(asked) for asked in self.asked(stated=True))
        return _first(self.cloze(asked) for asked in self.asked())

    def cloze(self, asked: Asked) -> Idea | None:
        span = asked.fact.span
        kind = self.told["kinds"][span.kind]
        fields = (kind,) if self.cell.answer_format == "json" else ()
        form = "bridge" if self.linked else "cloze"
        return self.idea(
            form, self.worded(asked), asked.evidence, value=span.text, answers=span.aliases, kind=span.kind, fields=fields
        )

    def worded(self, asked: Asked) -> str:
        form, kind = self.cell.query_format, self.told["kinds"][asked.fact.span.kind]
        if form == "keywords":
            return str(self.chance.choice(self.told["keywords"]).format(words=self.bare(asked.parts), kind=kind))
        shape = json.dumps({kind: "…"}, ensure_ascii=False)
        wording = str(self.chance.choice(self.told[form]))
        return wording.replace("{kind}", kind).replace("{json}", shape).replace("{c}", asked.text)

    def bare(self, parts: Sequence[str], value: str = "") -> str:
        """Keywords of a text, the gap left out or filled; so many of each part that the whole stays short."""
        found = [keywords(part.replace(self.told["gap"], value).replace(self.told["cut"], " ")) for part in parts]
        return " ".join(word for words in found for word in words[: MOST_KEYWORDS // len(parts)])

    def options(self, asked: Asked) -> Idea | None:
        span = asked.fact.span
        shown = " ".join([asked.text, *(passage.text for passage, _ in asked.evidence)])
        wrong = list(islice(self.falses(asked.fact, shown), 3))
        if len(wrong) < 3:
            return None
        listed = self._shuffled([span.text, *wrong])
        told = " ".join(f"{letter}. {option}" for letter, option in zip(LETTERS, listed, strict=True))
        query = self.told["options"].format(q=self.worded(asked), options=told)
        letter = LETTERS[listed.index(span.text)]
        return self.idea(
            "options",
            query,
            asked.evidence,
            value=letter,
            answers=(letter, *span.aliases),
            kind=span.kind,
            labels=tuple(LETTERS),
        )

    def falses(self, fact: Fact, shown: str) -> Iterator[str]:
        """Different values of the fact's type that the shown text does not hold: numbers changed, names from elsewhere."""
        span, seed = fact.span, self.job.seed("false")
        made: Iterator[str]
        if span.kind in ("year", "date", "number"):
            made = (swap([span.text], seed=f"{seed}:{turn}", avoid=shown).get(span.text, "") for turn in range(FEW))
        else:
            made = iter(self.source.values(span.kind, self.cell.language, seed=seed))
        told = {span.text}
        for value in made:
            if value and value not in told and X not in value and not _says(shown, [value]):
                told.add(value)
                yield value

    def claim(self) -> Idea | None:
        """A claim with its true or a false value, to be judged or corrected."""
        verdict = self.cell.verdict
        wrong = verdict == "refuted" if verdict in ("supported", "refuted") else self.chance.random() < 1 / 2
        return _first(self.judged(asked, wrong) for asked in self.asked(stated=True))

    def judged(self, asked: Asked, wrong: bool) -> Idea | None:
        cell, told, span = self.cell, self.told, asked.fact.span
        shown = " ".join([asked.text, *(passage.text for passage, _ in asked.evidence)])
        said = next(self.falses(asked.fact, shown), "") if wrong else span.text
        if not said or (cell.answer_format == "short_sentence" and len(counted(asked.text)) > SENTENCE - 12):
            return None
        query = self._claim_query(asked, said)
        value, labels, fields = told["no"] if wrong else told["yes"], tuple[str, ...](), tuple[str, ...]()
        if cell.task == "fact_verification" and cell.answer_format != "yes_no_reason":
            value, labels = told["labels"][int(wrong)], tuple(told["labels"])
            fields = (told["verdict"],) if cell.answer_format == "json" else ()
        if cell.task == "fact_verification" and cell.answer_format == "option_letter":
            options = " ".join(f"{letter}. {label}" for letter, label in zip(LETTERS, labels, strict=False))
            query = told["options"].format(q=query, options=options)
            value, labels = LETTERS[int(wrong)], tuple(LETTERS[: len(labels)])
        answers = span.aliases if cell.task == "claim_correction" else (value, *span.aliases)
        true = asked.text.replace(told["gap"], span.text).translate(UNQUOTED)
        if cell.task == "claim_correction" and not holds([true], span.aliases):
            return None
        return self.idea(
            "claim", query, asked.evidence, value=value, answers=answers, kind=span.kind, labels=labels, fields=fields,
            true=true, wrong=wrong,
        )  # fmt: skip

    def _claim_query(self, asked: Asked, value: str) -> str:
        told, form = self.told, self.cell.query_format
        claim = asked.text.replace(told["gap"], value)
        if form == "statement":
            return claim
        if form == "keywords":
            return str(self.chance.choice(told["claim_keywords"]).format(words=self.bare(asked.parts, value)))
        correct = self.cell.task == "claim_correction"
        name = "correct" if correct else "yes_no" if form == "wh_question" else "check"
        query = str(self.chance.choice(told[name])).replace("{c}", claim)
        return f"{query} {json.dumps({told['verdict']: '…'}, ensure_ascii=False)}" if form == "json_request" else query

    def listing(self) -> Idea | None:
        """Several gaps: of two linked passages one each, of one passage two or three in different sentences."""
        made: list[Asked] = []
        for fact in self._of_both() if self.linked else self.facts():
            one = self.gapped(fact) if self._joins(fact, made) else None
            if one is None:
                continue
            answers = [alias for other in (*made, one) for alias in other.fact.span.aliases]
            if not _says(" ".join(other.text for other in (*made, one)), answers):
                made.append(one)
        if len(made) < 2:
            return None
        made.sort(key=lambda one: one.fact.passage.text.find(one.fact.sentence.text))
        kinds = [self.told["kinds"][one.fact.span.kind] for one in made]
        items = tuple(one.fact.span.text for one in made)
        evidence = tuple((one.fact.passage, one.fact.sentence) for one in made)
        fields = (kinds[0],) if self.cell.answer_format == "json" else ()
        query = self._list_query(made, kinds)
        return self.idea("list", query, evidence, value="", answers=items, items=items, kind="term", fields=fields)

    def _joins(self, fact: Fact, made: Sequence[Asked]) -> bool:
        """Whether a fact may stand beside those: another sentence, of the same passage, or of the other of two linked ones."""
        if len(made) == (2 if self.linked else 3) or any(one.fact.sentence.text == fact.sentence.text for one in made):
            return False
        return all((one.fact.passage.id == fact.passage.id) != self.linked for one in made)

    def _list_query(self, made: Sequence[Asked], kinds: Sequence[str]) -> str:
        if self.cell.query_format == "keywords":
            parts = [self.bare(one.parts[-1:]).split(" ")[: MOST_KEYWORDS // len(made)] for one in made]
            lists = "; ".join(f"{' '.join(words)} {kind}" for words, kind in zip(parts, kinds, strict=True))
            return f"{subject(made[0].fact.passage)} {lists}".strip()
        gaps = " ".join(f"({number}) {one.text}" for number, one in enumerate(made, 1))
        query = str(self.chance.choice(self.told["list"])).replace("{c}", gaps)
        shape = json.dumps({kinds[0]: ["…"]}, ensure_ascii=False)
        return f"{query} {shape}" if self.cell.query_format == "json_request" else query

    def _of_both(self) -> list[Fact]:
        kinds = self.kinds()
        for link in self.links():
            found = [
                Fact(passage, sentence, span)
                for passage, sentence in (link.first, link.second)
                for span in sentence.spans
                if span.kind in kinds and link.name not in span.text
            ]
            if len({fact.passage.id for fact in found}) == 2:
                return found
        return []

    def definition(self) -> Idea | None:
        for row in self.rows:
            for name, sentences in self._defined(row):
                said = self._enough(sentences)
                if said is None:
                    continue
                passage = self.source.corpus[row]
                made = self.about("definition", name, [(passage, sentence) for sentence in said])
                if made is not None:
                    return made
        return None

    def _defined(self, row: int) -> list[tuple[str, list[Sentence]]]:
        """(X, the sentence "X is …" and those after it); of a document's subject the first sentence that names it."""
        passage, listed = self.source.corpus[row], self.source.sentences(row)
        pattern = _DEFINES[self.cell.language]
        found = [(mark["x"], listed[place:]) for place, sentence in enumerate(listed) if (mark := pattern.match(sentence.text))]
        name = subject(passage)
        first = next((place for place, sentence in enumerate(listed) if name and name in sentence.text), None)
        return found or ([(name, listed[first:])] if first is not None else [])

    def _enough(self, sentences: Sequence[Sentence]) -> list[Sentence] | None:
        """As many from the first on as the answer format takes."""
        if self.cell.answer_format == "short_sentence":
            return list(sentences[:1]) if len(counted(sentences[0].text)) <= SENTENCE else None
        said: list[Sentence] = []
        for sentence in sentences[:4]:
            said.append(sentence)
            if len(said) > 1 and len(counted(" ".join(s.text for s in said))) >= PARAGRAPH:
                return said
        return None

    def account(self, name: str) -> Idea | None:
        """Whole sentences: of a passage some that follow each other, of two linked ones what each says of the name."""
        if self.linked:
            for link in self.links():
                pairs = [link.first, link.second]
                length = len(counted(" ".join(sentence.text for _, sentence in pairs)))
                fits = length <= SENTENCE if self.cell.answer_format == "short_sentence" else length >= PARAGRAPH
                if name == "definition" and not any(_opens(sentence.text, link.name) for _, sentence in pairs):
                    continue
                if fits and (made := self.about(name, link.name, pairs)) is not None:
                    return made
            return None
        for row in self.rows:
            listed, passage = self.source.sentences(row), self.source.corpus[row]
            starts = self._shuffled(list(range(max(0, len(listed) - 1))))
            for start in starts:
                said = self._enough(listed[start:])
                if said is None:
                    continue
                made = self.about(name, self._topic(passage, said), [(passage, sentence) for sentence in said])
                if made is not None:
                    return made
        return None

    def _topic(self, passage: Passage, said: Sequence[Sentence]) -> str:
        """The subject, with one or two words a sentence that tell which part of it is meant."""
        title, chosen = subject(passage), []
        for sentence in said:
            words = [span.text for span in sentence.spans if span.kind in ("name", "title", "term")]
            words = words or sorted(keywords(sentence.text, least=2), key=len)[-2:]
            chosen.append(self.chance.choice(words) if words else "")
        comma = "、" if self.cell.language == "zh" else ", "
        told = comma.join(dict.fromkeys(word for word in chosen if word and word not in title))
        return str(self.told["topic"].format(title=title, words=told)) if title and told else title or told

    def about(self, name: str, x: str, pairs: Sequence[tuple[Passage, Sentence]]) -> Idea | None:
        if not x:
            return None
        told = self.told[name]
        form = self.cell.query_format if self.cell.query_format in told else "imperative"
        query = str(self.chance.choice(told[form])).replace("{x}", x)
        answers = tuple(sentence.text for _, sentence in pairs)
        form = "definition" if name == "definition" else "account"
        return self.idea(form, query, tuple(pairs), value=answers[0], answers=answers, items=answers, about=x)

    def idea(
        self, form: str, query: str, evidence: Sequence[tuple[Passage, Sentence]], *, value: str, answers: Sequence[str],
        kind: str = "", items: tuple[str, ...] = (), labels: tuple[str, ...] = (), fields: tuple[str, ...] = (), true: str = "",
        wrong: bool = False, about: str = "",
    ) -> Idea | None:  # fmt: skip
        """The idea, unless the question keeps too much of a sentence, or there is too little evidence."""
        kept = max(overlap(query, sentence.terms) for _, sentence in evidence)
        gold = tuple({passage.id: passage for passage, _ in evidence}.values())
        if kept > self.most or len(gold) < (2 if self.linked else 1):
            return None
        if not holds((sentence.text for _, sentence in evidence), answers):  # as where a name stands before an 's
            return None
        known = [
            answer for answer in answers if not (self.absent and answer in (value, *labels) and form in ("claim", "options"))
        ]
        draft = Draft(
            self.job, query, answers=tuple(known), gold=gold, facts=tuple(sentence.text for _, sentence in evidence),
            labels=labels, fields=fields, seen={"form": form, "kind": kind, "overlap": round(kept, 4)},
        )  # fmt: skip
        quotes = tuple((passage, sentence.text) for passage, sentence in evidence)
        topic = about or subject(gold[-1])
        topic = "" if _says(topic, known) else topic
        return Idea(draft, form, value, quotes, kind, items, true, wrong, topic)


def _says(text: str, values: Iterable[str]) -> bool:
    """Whether a text holds a value in any way, even as a part of a word."""
    lower = text.lower()
    return any(value.lower() in lower for value in values)


def _opens(sentence: str, name: str) -> bool:
    """Whether a sentence is about the name: it begins with it."""
    return sentence.removeprefix("The ").lstrip("《“「").startswith(name)


_DEFINES = {
    "en": re.compile(
        r"^(?:The |An? )?(?P<x>(?!The |An? |It |He |She |This |That |There )[A-Z][\w'’-]+(?: (?:of |the )*[A-Z][\w'’-]+)*)"
        r" (?:is|was|are|were) (?:an?|the|one of) "
    ),
    "zh": re.compile("^(?P<x>[^，。、；：的是]{2,20})(?:（[^）]*）)?[，]?是"),
}
