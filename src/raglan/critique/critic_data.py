"""What a critic learns from: judgements of rows, passages and spoiled outputs, labelled by the teacher.

A corpus of good answers holds few bad ones, so labels other than the best come from pairs that are made: another row's
output, half an output, a passage that was retrieved and one drawn. What is made is judged by the teacher like everything
else; no label follows from how a pair came about. Files in critic/:

    train.jsonl dev.jsonl test.jsonl    {"id", "query": the critic's prompt, "answers": [label], "kind", "instruction", …}
    labels.jsonl  rejects.jsonl         all that was asked, with reasons        audit.csv    for people
    manifest.json                       counts, labels, agreement and κ of a second pass

The rows are questions, so `data: {kind: questions, source: none}` learns them. Splits are by instruction: none stands in two.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raglan.artifact import fingerprint, read_manifest, write_manifest
from raglan.corpus import Corpus
from raglan.critique.agreement import agreement, write_audit
from raglan.critique.judgements import TOKENS, Judgement, Reject, Template, Verdict
from raglan.critique.sources import Row, drawn, spoiled
from raglan.critique.teacher import Book, Teacher
from raglan.documents import write_examples
from raglan.errors import CheckpointError, CorpusError, RecipeError
from raglan.recipe import CriticDataSettings, CritiqueSettings, JudgementKind
from raglan.records import Example, Hit, Passage
from raglan.splits import split_examples
from raglan.text import sentences

__all__ = ["Search", "asked_again", "asked_of", "balanced", "candidates", "labelled_rows", "make_critic_data"]

KIND = "critic data"
DEPTH = 5  # passages that a row's pairs are made of
Search = Callable[[Sequence[str], int], Sequence[Sequence[Hit]]]


@dataclass(frozen=True)
class _Material:
    """A row with the passages that its judgements are about, the likeliest first."""

    row: Row
    sentences: list[str]
    passages: list[Passage]
    wrong: str


def candidates(rows: Sequence[Row], corpus: Corpus, search: Search, *, seed: int, abstention: str) -> Iterator[Judgement]:
    """All judgements that these rows give. Which sentence, passage or other row, is drawn by hash(seed, row id, step)."""
    own = [row for row in rows if row.want == "best" or row.known.get("origin") == "unanswerable"]
    hits = search([row.question for row in own], DEPTH)
    by_source: dict[str, list[Row]] = defaultdict(list)
    for row in own:
        by_source[row.source].append(row)
    for row, found in zip(own, hits, strict=True):
        passages = _passages(row, found, corpus, seed)
        wrong = _other(row, by_source[row.source], seed)
        yield from _judgements(_Material(row, sentences(row.output) or [row.output], passages, wrong), seed, abstention)


def _passages(row: Row, hits: Sequence[Hit], corpus: Corpus, seed: int) -> list[Passage]:
    """The known one, those retrieved, and one drawn."""
    rows = [place for identity in row.known.get("relevant", ()) if (place := corpus.row(identity)) is not None][:1]
    rows += [hit.row for hit in hits]
    rows.append(int(drawn(seed, row.id, "passage") * len(corpus)))
    return [corpus[place] for place in dict.fromkeys(rows)]


def _other(row: Row, rows: Sequence[Row], seed: int) -> str:
    """Another output of the same source; empty where all are the same."""
    start = int(drawn(seed, row.id, "other") * len(rows))
    for step in range(len(rows)):
        found = rows[(start + step) % len(rows)].output
        if found != row.output:
            return found
    return ""


def _judgements(made: _Material, seed: int, abstention: str) -> Iterator[Judgement]:
    row, chance = made.row, lambda step: drawn(seed, made.row.id, step)
    about: Any = {"instruction": row.instruction, "known": row.known}
    yield Judgement(f"{row.id}:retrieve", "retrieve", **about)
    for number, output in enumerate(_outputs(made, chance("outputs"), abstention)):
        yield Judgement(f"{row.id}:is_use:{number}", "is_use", output=output, **about)
    place = int(chance("sentence") * len(made.sentences))
    before, sentence = tuple(made.sentences[:place]), made.sentences[place]
    yield Judgement(
        f"{row.id}:retrieve_segment", "retrieve_segment", preceding=before, passage=made.passages[0], sentence=sentence, **about
    )
    if before:  # the same sentence beside a passage that may not hold it
        yield Judgement(
            f"{row.id}:retrieve_segment:1", "retrieve_segment", preceding=before, passage=made.passages[-1], sentence=sentence,
            **about,
        )  # fmt: skip
    if row.known.get("origin") == "closed":
        return
    near = made.passages[1:] or made.passages  # a search may find nothing but the one
    shown = [made.passages[0], near[int(chance("near") * len(near))], made.passages[-1]]
    for number, passage in enumerate(dict.fromkeys(shown)):
        yield Judgement(f"{row.id}:is_rel:{number}", "is_rel", preceding=before, passage=passage, **about)
    if row.known.get("origin") == "unanswerable":
        return
    pairs = [(sentence, made.passages[0]), (sentence, shown[1])]
    pairs += [(spoiled(sentence, made.wrong), made.passages[0]), (made.wrong, made.passages[0])] if made.wrong else []
    for number, (said, passage) in enumerate(pairs):
        if said.strip():
            yield Judgement(f"{row.id}:is_sup:{number}", "is_sup", preceding=before, sentence=said, passage=passage, **about)


def _outputs(made: _Material, chance: float, abstention: str) -> list[str]:
    """The output, another row's, and by draw the beginning of it, it among other words, or none."""
    output, words = made.row.output, made.row.output.split()
    more = [" ".join(words[: len(words) // 2])] if len(words) > 1 else []
    more += [f"{made.wrong} {output}".strip()] if chance < 0.25 else [abstention] if chance < 0.5 else []
    return list(dict.fromkeys([output, *([made.wrong] if made.wrong else []), *more]))


def asked_of(settings: CritiqueSettings, rows: Sequence[Row], corpus: Corpus, search: Search, *, seed: int) -> list[Judgement]:
    """The judgements that the teacher is asked for, without those of the second pass. Raises RecipeError: `critic` is null."""
    if settings.critic is None:
        raise RecipeError("critique.critic is null, so there is no critic data to make")
    every = candidates(rows, corpus, search, seed=seed, abstention=settings.abstention)
    return _fewer([one for one in every if one.kind in settings.judgements], settings.critic.most, seed)


def asked_again(asked: Sequence[Judgement], settings: CriticDataSettings, seed: int) -> list[Judgement]:
    """Those of them that the second pass asks for once more, if they were labelled."""
    return [one for one in asked if drawn(seed, one.id, "second pass") < settings.second_pass]


def make_critic_data(
    settings: CritiqueSettings, rows: Sequence[Row], corpus: Corpus, search: Search, teacher: Teacher,
    templates: Mapping[JudgementKind, Template], book: Book, *, seed: int, made_of: str,
) -> dict[str, Any]:  # fmt: skip
    """Label, balance, split and write; returns the manifest. What is there already, made of the same, is kept.

    Raises:
        CorpusError: no judgement was labelled.
    """
    wanted, folder = settings.critic, settings.path / "critic"
    assert wanted is not None
    wordings = {kind: templates[kind].fingerprint for kind in settings.judgements}
    identity = fingerprint([made_of, teacher.fingerprint, wanted.model_dump(mode="json"), wordings])
    if (there := _there(folder, identity)) is not None:
        return there
    asked = asked_of(settings, rows, corpus, search, seed=seed)
    labels = book.label(teacher, asked, templates)
    good = [(one, found) for one in asked if isinstance(found := labels[one.id], Verdict)]
    if not good:
        first = next(found.reason for found in labels.values() if isinstance(found, Reject))
        raise CorpusError(
            f"none of {len(asked)} judgements was labelled; the first: {first}", hint="look at critic/rejects.jsonl"
        )
    kept = [pair for kind in settings.judgements for pair in balanced([p for p in good if p[0].kind == kind], wanted, seed)]
    again = _second(good, wanted, teacher, templates, book, seed)
    places = split_examples(
        [Example(one.id, one.instruction) for one, _ in kept], shares=wanted.shares, seed=seed
    ).places  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)
    for name in wanted.shares:
        own = [(one, found) for one, found in kept if places[one.id] == name]
        examples = [_example(one, found, templates[one.kind], name, wanted.labels) for one, found in own]
        write_examples(folder / f"{name}.jsonl", examples)
    _write_lines(folder / "labels.jsonl", (_told(one, found) for one, found in good))
    rejects = [(one, found) for one in asked if isinstance(found := labels[one.id], Reject)]
    _write_lines(
        folder / "rejects.jsonl", ({"id": j.id, "judgement": j.kind, "reject": f.reason, "raw": f.raw} for j, f in rejects)
    )
    write_audit(folder / "audit.csv", _audit(kept, wanted, templates, seed))
    told = {kind: _figures(kind, asked, good, rejects, kept, places, wanted, again[kind]) for kind in settings.judgements}
    write_manifest(folder, KIND, {
        "made_of": identity, "teacher": teacher.name, "seed": seed, "judgements": told,
        "templates": wordings, "labels": wanted.labels,
    })  # fmt: skip
    return read_manifest(folder, KIND)


def labelled_rows(folder: Path, rows: Iterable[Judgement], split: str) -> list[tuple[Judgement, str]]:
    """The judgements of a split's file with their labels, from all those that could be in it."""
    known = {judgement.id: judgement for judgement in rows}
    lines = (json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").split("\n") if line)
    return [(known[line["id"]], _label(known[line["id"]].kind, line["answers"][0])) for line in lines]


def _label(kind: JudgementKind, answer: str) -> str:
    """The label that a critic's answer is: itself, or what its reflection token says."""
    return next((label for label, token in TOKENS[kind].items() if token == answer), answer)


def _there(folder: Path, identity: str) -> dict[str, Any] | None:
    try:
        found = read_manifest(folder, KIND)
    except CheckpointError:
        return None
    return found if found["made_of"] == identity else None


def _fewer(judgements: Sequence[Judgement], most: int | None, seed: int) -> list[Judgement]:
    """At most so many of each kind, drawn."""
    kept: list[Judgement] = []
    for kind in dict.fromkeys(judgement.kind for judgement in judgements):
        own = sorted((one for one in judgements if one.kind == kind), key=lambda one: (drawn(seed, one.id, "most"), one.id))
        kept += own[:most]
    return sorted(kept, key=lambda one: one.id)


def balanced(
    pairs: Sequence[tuple[Judgement, Verdict]], settings: CriticDataSettings, seed: int
) -> list[tuple[Judgement, Verdict]]:
    """The pairs of one judgement without so many of the commonest labels that none has more than `balance` of those left.

    A judgement with a single label stays as it is: nothing could balance it.
    """
    by_label: dict[str, list[tuple[Judgement, Verdict]]] = defaultdict(list)
    for pair in sorted(pairs, key=lambda pair: (drawn(seed, pair[0].id, "balance"), pair[0].id)):
        by_label[pair[1].label].append(pair)
    if settings.balance is not None and len(by_label) > 1:
        sizes = _capped({label: len(own) for label, own in by_label.items()}, settings.balance)
        by_label = defaultdict(list, {label: own[: sizes[label]] for label, own in by_label.items()})
    return sorted((pair for own in by_label.values() for pair in own), key=lambda pair: pair[0].id)


def _capped(sizes: Mapping[str, int], share: float) -> dict[str, int]:
    """min(n, c) of every size, with the largest c ≤ share · Σ min(n, c): c / Σ min(n, c) rises with c."""
    share = max(share, 1 / len(sizes))
    low, high = 1, max(sizes.values())
    while low < high:
        middle = (low + high + 1) // 2
        fits = middle <= share * sum(min(size, middle) for size in sizes.values()) + 1e-9
        low, high = (middle, high) if fits else (low, middle - 1)
    return {label: min(size, low) for label, size in sizes.items()}


def _second(
    good: Sequence[tuple[Judgement, Verdict]], settings: CriticDataSettings, teacher: Teacher,
    templates: Mapping[JudgementKind, Template], book: Book, seed: int,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Agreement of a second pass with the first, by judgement."""
    drawn_again = asked_again([one for one, _ in good], settings, seed)
    labels = book.label(teacher, drawn_again, templates, draw=1) if drawn_again else {}
    first = {one.id: found.label for one, found in good}
    pairs: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for one in drawn_again:
        if isinstance(found := labels[one.id], Verdict):
            pairs[one.kind].append((first[one.id], found.label))
    return defaultdict(lambda: agreement([]), {kind: agreement(found) for kind, found in pairs.items()})


def _example(judgement: Judgement, verdict: Verdict, template: Template, split: str, labels: str) -> Example:
    answer = TOKENS[judgement.kind][verdict.label] if labels == "tokens" else verdict.label
    told = {"kind": judgement.kind, "instruction": judgement.instruction, "split": split}
    return Example(judgement.id, template.prompt(judgement), (answer,), metadata=told)


def _told(judgement: Judgement, verdict: Verdict) -> dict[str, Any]:
    shown = {
        "instruction": judgement.instruction, "preceding": list(judgement.preceding), "sentence": judgement.sentence,
        "output": judgement.output, "passage": judgement.passage.id if judgement.passage is not None else None,
    }  # fmt: skip
    said = {"label": verdict.label, "reason": verdict.reason} | ({} if verdict.p is None else {"p": verdict.p})
    return {"id": judgement.id, "judgement": judgement.kind, **{k: v for k, v in shown.items() if v}, **said}


def _audit(
    kept: Sequence[tuple[Judgement, Verdict]],
    settings: CriticDataSettings,
    templates: Mapping[JudgementKind, Template],
    seed: int,
) -> Iterator[tuple[str, str, str, str, str]]:
    counts: Counter[str] = Counter()
    for one, found in sorted(kept, key=lambda pair: (pair[0].kind, drawn(seed, pair[0].id, "audit"))):
        counts[one.kind] += 1
        if counts[one.kind] <= settings.audit:
            yield one.id, one.kind, templates[one.kind].body(one), found.label, found.reason


def _figures(
    kind: JudgementKind, asked: Sequence[Judgement], good: Sequence[tuple[Judgement, Verdict]],
    rejects: Sequence[tuple[Judgement, Reject]], kept: Sequence[tuple[Judgement, Verdict]], places: Mapping[str, str],
    settings: CriticDataSettings, again: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    own = [(one, found) for one, found in kept if one.kind == kind]
    labelled = [found.label for one, found in good if one.kind == kind]
    return {
        "asked": sum(one.kind == kind for one in asked),
        "labels": dict(sorted(Counter(labelled).items())),
        "rejected": dict(Counter(found.reason for one, found in rejects if one.kind == kind)),
        "balanced_out": len(labelled) - len(own),
        "kept": dict(sorted(Counter(found.label for _, found in own).items())),
        "rows": {name: sum(places[one.id] == name for one, _ in own) for name in settings.shares},
        "second_pass": dict(again),
    }


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
