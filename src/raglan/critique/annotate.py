"""Rows of instruction and output become rows with reflection, in eight resumable steps (Asai et al. 2023, §3.2.2, appendix D).

    1 rows             sources → rows                       5 sentences       outputs split; short ones stay untagged
    2 retrieve         does the instruction need any?       6 retrieve-segment  does each sentence?
    3 is-use           how useful is the output?            7 judge-passages  K by instruction + sentence: IsRel, IsSup
    4 search-output    K by instruction + output            8 select          the passage, the row, whether it parses

    rows in = rows out + Σ dropped, by reason                          asserted

`select: paper`: a sentence that needs retrieval gets the best-ranked passage that is relevant and supports it; where there
is none, one that is drawn, *with its own labels* (the authors' program took the drawn one's labels from another list). A row
that wants an irrelevant passage gets, by draw, one that was labelled so; where none was, one drawn from the corpus that is. A
row whose answer is wrong gets the best-ranked one that was labelled relevant and not as its full support, or leaves; of it
the judgements are learned and not the answer (`only_judged`).
`select: released` also leaves rows out by the odds of that program. Draws are hash(seed, row id, step): equal under any order
and sharding.

Deviations: IsSup is asked of relevant passages alone, since no row writes the others'; where the judge of a sentence wants to
continue and no passage is in use yet, one is retrieved (`released` drops such rows); the output of a row without an answer is
not searched for.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raglan.artifact import fingerprint, read_manifest, write_manifest
from raglan.corpus import Corpus
from raglan.critique.critic_data import Search
from raglan.critique.judgements import Judgement, Reject, Template
from raglan.critique.sources import Row, drawn
from raglan.critique.steps import Dropped, Lines, Steps
from raglan.critique.teacher import Book, Teacher
from raglan.errors import CheckpointError, RecipeError
from raglan.recipe import CritiqueSettings, JudgementKind
from raglan.records import Example, Passage
from raglan.splits import split_examples
from raglan.text import sentences

__all__ = ["Annotation", "Check", "annotate", "join", "shard_of"]

log = logging.getLogger(__name__)
KIND = "annotation"
LONG = 2  # outputs of more sentences leave their short ones untagged
ODDS = {"partially": 0.7, "no": 0.25, "irrelevant": 0.25, "initial no": 0.4, "no retrieval": 0.5}  # the authors' program's
STRICT = ("nq", "fever", "wow")
Check = Callable[[Mapping[str, Any]], str | None]  # a finished row → what is wrong with it


@dataclass(frozen=True)
class Annotation:
    """All that the steps need.

    Attributes:
        check: says what is wrong with a finished row; None where no tokenizer with reflection tokens is there to ask.
        shard: (i, n): only rows whose hash falls to the i-th of n, i from 0.
    """

    settings: CritiqueSettings
    corpus: Corpus
    search: Search
    teacher: Teacher
    templates: Mapping[JudgementKind, Template]
    book: Book
    seed: int
    made_of: str
    check: Check | None = None
    shard: tuple[int, int] | None = None

    @property
    def folder(self) -> Path:
        return self.settings.path / ("annotation" if self.shard is None else _shard_name(*self.shard))

    def passages(self, identities: Iterable[str]) -> list[Passage]:
        return [self.corpus[row] for name in identities if (row := self.corpus.row(name)) is not None]

    def labels(self, asked: Sequence[Judgement]) -> dict[str, str | Reject]:
        """Label or reject of each judgement."""
        found = self.book.label(self.teacher, asked, self.templates)
        return {name: one if isinstance(one, Reject) else one.label for name, one in found.items()}


def annotate(work: Annotation, rows: Sequence[Row]) -> dict[str, Any]:
    """Run the steps that are not done, and write the rows to train.jsonl and the other files of `shares`; the manifest."""
    settings, seed = work.settings, work.seed
    mine = sorted((row for row in rows if work.shard is None or _falls(row, work.shard)), key=lambda row: row.id)
    # Which rows there are is step 1's; what passages are found, everything's.
    common = [work.made_of, seed, settings.k, settings.abstention, work.shard]
    steps = Steps(work.folder / "steps", common)
    judged = [work.teacher.fingerprint, {kind: one.fingerprint for kind, one in work.templates.items()}]
    base = {row.id: row for row in mine}
    steps.run("rows", fingerprint([row.to_dict() for row in mine]), lambda: (row.to_dict() for row in mine))
    initial = _by_id(steps.run("retrieve", judged, lambda: _initial(work, mine)))
    useful = _by_id(steps.run("is-use", judged, lambda: _useful(work, [base[name] for name in initial])))
    left = [base[name] for name in useful]
    first = _by_id(steps.run("search-output", None, lambda: _search_outputs(work, left)))
    cut = _by_id(steps.run("sentences", settings.short, lambda: _sentences(work, left, initial)))
    decided = _by_id(
        steps.run("retrieve-segment", [judged, settings.select], lambda: _segments(work, left, initial, first, cut))
    )
    left = [base[name] for name in decided]
    pairs = _by_id(steps.run("judge-passages", judged, lambda: _pairs(work, left, cut, decided)))
    chosen = [settings.select, settings.shares, work.check is not None]
    left = [base[name] for name in pairs]
    done = steps.run("select", chosen, lambda: _selected(work, left, initial, useful, cut, decided, pairs))
    assert len(mine) == len(done) + steps.dropped.total(), "rows in = rows out + dropped"
    return _write(work, len(mine), done, steps)


def _by_id(rows: Lines) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in rows}


def _initial(work: Annotation, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    asked = [Judgement(row.id, "retrieve", row.instruction, known=row.known) for row in rows]
    return _each(rows, work.labels(asked), "retrieve")


def _useful(work: Annotation, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    asked = [Judgement(row.id, "is_use", row.instruction, output=row.output, known=row.known) for row in rows]
    return _each(rows, work.labels(asked), "is_use")


def _each(rows: Sequence[Row], labels: Mapping[str, str | Reject], name: str) -> Iterator[dict[str, Any]]:
    for row in rows:
        label = labels[row.id]
        yield {"id": row.id, **({"dropped": _rejected(name, label)} if isinstance(label, Reject) else {name: label})}


def _rejected(name: str, reject: Reject) -> str:
    return f"{name} rejected: {reject.reason.partition(':')[0]}"


def _search_outputs(work: Annotation, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    queries = [row.question if row.output == work.settings.abstention else f"{row.question}\n{row.output}" for row in rows]
    for row, hits in zip(rows, work.search(queries, work.settings.k), strict=True):
        yield {"id": row.id, "passages": [hit.passage.id for hit in hits]}


def _sentences(work: Annotation, rows: Sequence[Row], initial: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """{"text", "tagged"} of each sentence; an output that needs no retrieval is one."""
    for row in rows:
        found = sentences(row.output) or [row.output]
        if initial[row.id]["retrieve"] == "no":
            found = [row.output]
        tagged = [len(found) <= LONG or len(text) >= work.settings.short for text in found]
        tagged = tagged if any(tagged) else [True] * len(found)
        yield {"id": row.id, "sentences": [{"text": text, "tagged": ok} for text, ok in zip(found, tagged, strict=True)]}


def _segments(
    work: Annotation, rows: Sequence[Row], initial: Mapping[str, Any], first: Mapping[str, Any], cut: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """A decision for every tagged sentence, in order."""
    asked = [judgement for row in rows for judgement in _asked_of_segments(work, row, initial, first, cut)]
    labels = work.labels(asked)
    for row in rows:
        if initial[row.id]["retrieve"] == "no":
            yield {"id": row.id, "decisions": ["no"]}
            continue
        found = [labels[f"{row.id}:{place}"] for place, one in enumerate(cut[row.id]["sentences"]) if one["tagged"]]
        reject = next((one for one in found if isinstance(one, Reject)), None)
        if reject is not None:
            yield {"id": row.id, "dropped": _rejected("retrieve_segment", reject)}
        elif found[0] == "continue" and work.settings.select == "released":
            yield {"id": row.id, "dropped": "released: opens with [Continue]"}
        else:
            yield {"id": row.id, "decisions": _with_evidence([str(one) for one in found])}


def _with_evidence(decisions: Sequence[str]) -> list[str]:
    """[Continue] goes on with a passage in use; where none is yet, the passage that the judge saw has to be retrieved."""
    told: list[str] = []
    for decision in decisions:
        told.append("yes" if decision == "continue" and "yes" not in told else decision)
    return told


def _asked_of_segments(
    work: Annotation, row: Row, initial: Mapping[str, Any], first: Mapping[str, Any], cut: Mapping[str, Any]
) -> Iterator[Judgement]:
    if initial[row.id]["retrieve"] == "no":
        return
    texts = [one["text"] for one in cut[row.id]["sentences"]]
    passage = next(iter(work.passages(first[row.id]["passages"])), None)
    for place, one in enumerate(cut[row.id]["sentences"]):
        if one["tagged"]:
            yield Judgement(
                f"{row.id}:{place}", "retrieve_segment", row.instruction, tuple(texts[:place]), passage, one["text"],
                known=row.known,
            )  # fmt: skip


def _pairs(
    work: Annotation, rows: Sequence[Row], cut: Mapping[str, Any], decided: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """For every sentence that retrieves, its passages by rank with what was said of each."""
    places = {row.id: _retrieving(cut[row.id], decided[row.id]) for row in rows}
    queries = [(row, place) for row in rows for place in places[row.id]]
    texts = [_query(work, row, cut[row.id]["sentences"][place]["text"]) for row, place in queries]
    found: dict[str, list[str]] = {}
    for (row, place), hits in zip(queries, work.search(texts, work.settings.k), strict=True):
        found[f"{row.id}:{place}"] = _shown(work, row, [hit.passage.id for hit in hits])
    asked = list(_asked_of_pairs(work, queries, cut, found))
    relevance = work.labels([one for one in asked if one.kind == "is_rel"])
    fit = {name.removesuffix(":is_rel") for name, label in relevance.items() if label == "relevant"}
    support = work.labels([one for one in asked if one.kind == "is_sup" and one.id.removesuffix(":is_sup") in fit])
    for row in rows:
        yield _judged(row, places[row.id], found, {**relevance, **support})


def _retrieving(cut: Mapping[str, Any], decided: Mapping[str, Any]) -> list[int]:
    """The places of the sentences that retrieve."""
    tagged = [place for place, one in enumerate(cut["sentences"]) if one["tagged"]]
    return [place for place, decision in zip(tagged, decided["decisions"], strict=True) if decision == "yes"]


def _query(work: Annotation, row: Row, sentence: str) -> str:
    alone = sentence == work.settings.abstention or row.want == "unsupported"  # a wrong answer finds another's passages
    return row.question if alone else f"{row.question}\n{sentence}"


def _shown(work: Annotation, row: Row, retrieved: Sequence[str]) -> list[str]:
    """The passages to be judged: those retrieved; for rows that want an irrelevant one, a question's own first and a drawn one
    last; for rows whose answer is wrong, those known to hold the right one first."""
    if row.want == "best":
        return list(retrieved)
    if row.want == "unsupported":
        return list(dict.fromkeys([*row.known.get("relevant", ()), *retrieved]))
    own = row.known.get("relevant", ()) if row.known.get("origin") == "unanswerable" else ()
    far = work.corpus[int(drawn(work.seed, row.id, "far passage") * len(work.corpus))].id
    return list(dict.fromkeys([*own, *retrieved, far]))


def _asked_of_pairs(
    work: Annotation, queries: Sequence[tuple[Row, int]], cut: Mapping[str, Any], found: Mapping[str, Sequence[str]]
) -> Iterator[Judgement]:
    for row, place in queries:
        texts = [one["text"] for one in cut[row.id]["sentences"]]
        for passage in work.passages(found[f"{row.id}:{place}"]):
            name = f"{row.id}:{place}:{passage.id}"
            about: Any = {"preceding": tuple(texts[:place]), "passage": passage, "known": row.known}
            yield Judgement(f"{name}:is_rel", "is_rel", row.instruction, **about)
            yield Judgement(f"{name}:is_sup", "is_sup", row.instruction, sentence=texts[place], **about)


def _judged(
    row: Row, places: Sequence[int], found: Mapping[str, Sequence[str]], labels: Mapping[str, str | Reject]
) -> dict[str, Any]:
    """Passages with a rejected label are left out; a sentence that has none left drops its row."""
    told: list[dict[str, Any]] = []
    rejects: list[Reject] = []
    for place in places:
        own: list[dict[str, Any]] = []
        for name in found[f"{row.id}:{place}"]:
            said = {kind: labels.get(f"{row.id}:{place}:{name}:{kind}") for kind in ("is_rel", "is_sup")}
            faults = [label for label in said.values() if isinstance(label, Reject)]
            rejects += faults
            own += [] if faults else [{"passage": name, **said}]
        if not own:
            reason = f"passages rejected: {rejects[-1].reason.partition(':')[0]}" if rejects else "no passage found"
            return {"id": row.id, "dropped": reason}
        told.append({"sentence": place, "passages": own})
    return {"id": row.id, "pairs": told, **({"rejected_passages": len(rejects)} if rejects else {})}


def _selected(
    work: Annotation, rows: Sequence[Row], initial: Mapping[str, Any], useful: Mapping[str, Any], cut: Mapping[str, Any],
    decided: Mapping[str, Any], pairs: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    for row in rows:
        try:
            made = _row(work, row, useful[row.id]["is_use"], cut[row.id], decided[row.id], pairs[row.id])
            if work.settings.select == "released":
                _odds(work, row, initial[row.id]["retrieve"], made)
            fault = work.check(made) if work.check is not None else None
            yield {"id": row.id, "dropped": f"off the grammar: {fault}"} if fault else made
        except Dropped as left:
            yield {"id": row.id, "dropped": str(left)}


def _row(
    work: Annotation, row: Row, is_use: str, cut: Mapping[str, Any], decided: Mapping[str, Any], pairs: Mapping[str, Any]
) -> dict[str, Any]:
    """A row of the generator's training data."""
    judged = {one["sentence"]: one["passages"] for one in pairs["pairs"]}
    decisions = iter(decided["decisions"])
    lead, segments = "", []
    for place, one in enumerate(cut["sentences"]):
        if one["tagged"]:
            segments.append(_segment(work, row, place, one["text"], next(decisions), judged.get(place, ())))
        elif segments:
            key = "tail" if segments[-1].get("is_sup") else "text"
            segments[-1][key] = f"{segments[-1].get(key) or ''} {one['text']}".strip()
        else:
            lead = f"{lead} {one['text']}".strip()
    judged_only = {"only_judged": True} if row.want == "unsupported" else {}
    if judged_only and not any(segment["passage"] for segment in segments):
        raise Dropped("a wrong answer for which nothing is retrieved")
    return {
        "id": row.id, "instruction": row.instruction, "input": "", **({"lead": lead} if lead else {}), "segments": segments,
        "is_use": int(is_use), **judged_only, "metadata": {**row.metadata, "source": row.source, "want": row.want},
    }  # fmt: skip


def _segment(
    work: Annotation, row: Row, place: int, text: str, decision: str, judged: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    if decision != "yes":
        return {"decision": decision, "passage": None, "is_rel": None, "text": text, "is_sup": None}
    chosen = _chosen(work, row, place, judged)
    passage, relevant = work.passages([chosen["passage"]])[0], chosen["is_rel"] == "relevant"
    if work.settings.select == "released" and relevant and chosen["is_sup"] == "no" and _like(work, row) in STRICT:
        relevant = False
    return {
        "decision": "yes", "passage": {"id": passage.id, "title": passage.title, "text": passage.text},
        "is_rel": "relevant" if relevant else "irrelevant", "text": text, "is_sup": chosen["is_sup"] if relevant else None,
    }  # fmt: skip


def _chosen(work: Annotation, row: Row, place: int, judged: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The passage that a sentence stands beside, with its own labels."""
    if row.want == "irrelevant":
        fit = [one for one in judged if one["is_rel"] == "irrelevant"]
        if not fit:
            raise Dropped("no irrelevant passage found")
        return fit[0] if row.known.get("origin") == "unanswerable" else fit[_place(work, row, place, fit)]
    if row.want == "unsupported":
        fit = [one for one in judged if one["is_rel"] == "relevant" and one["is_sup"] != "fully"]
        if not fit:
            raise Dropped("no relevant passage without full support found")
        return fit[0]
    best = next((one for one in judged if one["is_rel"] == "relevant" and one["is_sup"] != "no"), None)
    return best if best is not None else judged[_place(work, row, place, judged)]


def _place(work: Annotation, row: Row, place: int, among: Sequence[Any]) -> int:
    return int(drawn(work.seed, row.id, f"passage of sentence {place}") * len(among))


def _like(work: Annotation, row: Row) -> str:
    return work.settings.sources[row.source].released_as


def _odds(work: Annotation, row: Row, initial: str, made: dict[str, Any]) -> None:
    """Drop rows as the authors' program does, by draws; mend useful "true" and "false". Raises Dropped."""
    like, segments = _like(work, row), made["segments"]
    if row.output.strip().lower() in ("true", "false") and made["is_use"] == 1:
        made["is_use"] = 5
    found = {segment["is_sup"] for segment in segments if segment["decision"] == "yes"}
    irrelevant = any(segment["is_rel"] == "irrelevant" for segment in segments)
    for name, applies in (
        ("initial no", initial == "no"),
        ("no retrieval", like == "nq" and all(segment["decision"] == "no" for segment in segments)),
        ("irrelevant", like == "nq" and irrelevant),
        ("no", "no" in found),
        ("partially", "partially" in found),
    ):
        if applies and drawn(work.seed, row.id, f"odds of {name}") >= ODDS[name]:
            raise Dropped(f"released odds: {name}")


def _write(work: Annotation, count: int, done: Lines, steps: Steps) -> dict[str, Any]:
    """The files, by instruction, and the account."""
    places = split_examples(
        [Example(row["id"], row["instruction"]) for row in done], shares=work.settings.shares, seed=work.seed
    ).places  # fmt: skip
    work.folder.mkdir(parents=True, exist_ok=True)
    (work.folder / "manifest.json").unlink(missing_ok=True)
    written = {}
    for name in work.settings.shares:
        own = [row for row in done if places[row["id"]] == name]
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in own)
        (work.folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        written[name] = len(own)
    write_manifest(work.folder, KIND, {
        "made_of": fingerprint(steps.chain), "alike": _alike(work), "annotator": work.teacher.name, "seed": work.seed,
        "shard": work.shard,
        "select": work.settings.select, "parsed": work.check is not None,
        "rows": {"in": count, "out": len(done), "dropped": dict(sorted(steps.dropped.items())), "written": written},
        "labels": _distribution(done),
    })  # fmt: skip
    return read_manifest(work.folder, KIND)


def _distribution(rows: Lines) -> dict[str, dict[str, dict[str, int]]]:
    """source → what was said → label → how often."""
    told: dict[str, dict[str, Counter[str]]] = {}
    for row in rows:
        own = told.setdefault(
            row["metadata"]["source"], {n: Counter() for n in ("row", "retrieve", "is_rel", "is_sup", "is_use")}
        )
        own["row"][_sort(row)] += 1
        own["is_use"][str(row["is_use"])] += 1
        for segment in row["segments"]:
            own["retrieve"][segment["decision"]] += 1
            for name in ("is_rel", "is_sup"):
                own[name].update([segment[name]] if segment[name] else [])
    return {name: {kind: dict(sorted(count.items())) for kind, count in own.items()} for name, own in sorted(told.items())}


def _sort(row: Mapping[str, Any]) -> str:
    """What a row teaches first: no retrieval, an irrelevant passage, or evidence, and how many segments."""
    segments = row["segments"]
    if all(segment["decision"] == "no" for segment in segments):
        return "no retrieval"
    if row.get("only_judged"):
        return "unsupported"
    if any(segment["is_rel"] == "irrelevant" for segment in segments):
        return "irrelevant"
    return "evidence" if len(segments) == 1 else "evidence, several segments"


def shard_of(text: str) -> tuple[int, int]:
    """ "2/3" → (1, 3). Raises RecipeError."""
    first, _, second = text.partition("/")
    if not (first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
        raise RecipeError(f"--shard is {text!r}", hint="as in 2/3: the second of three")
    return int(first) - 1, int(second)


def _shard_name(place: int, count: int) -> str:
    return f"annotation-{place + 1}-of-{count}"


def _falls(row: Row, shard: tuple[int, int]) -> bool:
    return int(drawn(0, row.id, "shard") * shard[1]) == shard[0]


def _alike(work: Annotation) -> str:
    """Names all that the shards of one annotation must have in common."""
    settings = work.settings
    return fingerprint([
        work.made_of, work.seed, settings.k, settings.abstention, settings.short, settings.select, dict(settings.shares),
        work.teacher.fingerprint, {kind: one.fingerprint for kind, one in work.templates.items()}, work.check is not None,
    ])  # fmt: skip


def join(work: Annotation, count: int) -> dict[str, Any]:
    """Shards put together: the same files as of one run over all rows.

    Raises:
        CheckpointError: a shard that is not finished, or shards made of different things.
    """
    folders = [work.settings.path / _shard_name(place, count) for place in range(count)]
    manifests = [read_manifest(folder, KIND) for folder in folders]
    odd = [str(folder) for folder, one in zip(folders, manifests, strict=True) if one.get("alike") != _alike(work)]
    if odd:
        raise CheckpointError(
            f"shards were made of other rows, with other settings or by another annotator than the recipe's now: "
            f"{', '.join(odd)}",
            hint="annotate them again with --shard; what was labelled is kept",
        )
    done = [json.loads(line) for folder in folders for file in sorted(work.settings.shares)
            for line in (folder / f"{file}.jsonl").read_text(encoding="utf-8").split("\n") if line]  # fmt: skip
    steps = Steps(work.folder / "steps", [one["made_of"] for one in manifests])
    for one in manifests:
        steps.dropped.update(one["rows"]["dropped"])
    total = sum(one["rows"]["in"] for one in manifests)
    assert total == len(done) + steps.dropped.total(), "rows in = rows out + dropped"
    return _write(work, total, sorted(done, key=lambda row: row["id"]), steps)
