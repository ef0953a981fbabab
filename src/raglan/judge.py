"""A chat model as the judge of answers, over the call engine: a rubric from 1 to 5, and pairs in both orders.

    runs/<name>/judgements/<fingerprint>/
        judgements.jsonl    one line a question: scores, verdicts of both orders, outcome, why
        manifest.json       means, win rate, inconsistency, missing, strata of length, κ; the judge's name
    runs/<name>/calls/      the journal of calls: nothing is paid twice

The judge sees the passages that were read, the question, its reference answers where there are any, and answers without
names. What it does not answer, or not as the schema wants it, is missing. Where calls have a price, a cap or a yes is needed;
how many they are and what is reserved for them is told before the first. Prompts are data, in judge.yaml, in the language of
the question; their content is part of the fingerprint. The arithmetic is `judging`'s.
"""

from __future__ import annotations

import csv
import json
import logging
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from pydantic import BaseModel, ConfigDict

from raglan.answerable import kinds
from raglan.artifact import fingerprint, read_manifest, write_manifest
from raglan.calls import Ask, CallEngine
from raglan.calls.money import dollars, lacks_cap
from raglan.corpus import Corpus
from raglan.critique.agreement import agreement
from raglan.errors import CorpusError, RecipeError
from raglan.evaluate import Evaluation
from raglan.judging import STRATA, Better, Pairs, Rubric, family, length_stratum, pair_outcome, pairs, rubric
from raglan.knowledge import KnowledgeBase
from raglan.metrics import Interval
from raglan.recipe import EndpointSettings, JudgeSettings, Recipe
from raglan.text import answer_words

__all__ = ["NO_JUDGE", "Choice", "Judged", "Score", "judge", "judgements_folder", "lacks_judge", "messages", "open_judged"]

log = logging.getLogger(__name__)
KIND = "judgements"
LIMIT = 300  # tokens of a reason and a verdict
NO_JUDGE = "no judge: computed figures only"
_HEADING = re.compile(r"((?:^|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029])\s*)[#＃]")
OF_OPEN = {"rouge_l", "str_em", "bleu1"}  # metrics of answers that are more than a span


class Score(BaseModel):
    """The reply to a rubric; the reason comes first, so that it is not an excuse."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reason: str
    score: Literal[1, 2, 3, 4, 5]


class Choice(BaseModel):
    """The reply to a pair."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reason: str
    better: Literal["first", "second", "tie"]


@dataclass(frozen=True)
class Judged:
    """What a judge made of an evaluation.

    Attributes:
        model: the judge. scores: system → rubric.
        pair: the last system (a) against the first (b). strata: the same by length of a against b.
        kappa: system → rows, agreement and κ with hand labels, where there are any.
        warnings: what speaks against this judge.
    """

    model: str
    folder: Path
    scores: dict[str, Rubric]
    pair: Pairs | None
    strata: dict[str, Pairs]
    kappa: dict[str, Any]
    warnings: tuple[str, ...] = ()


@dataclass
class _Row:
    """What is known of one question."""

    id: str
    texts: dict[str, str]
    scores: dict[str, int | None] = field(default_factory=dict)
    verdicts: dict[str, Better | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def lacks_judge(recipe: Recipe, evaluations: Sequence[Evaluation]) -> bool:
    """Whether open answers were given, or measured as such, and the recipe names nobody to judge them."""
    if recipe.evaluate is None or recipe.evaluate.judge is not None:
        return False
    read = [row for row in evaluations[0].rows if row["predictions"]]
    return bool(read and (kinds(read)["open"] or OF_OPEN & set(recipe.evaluate.metrics)))


def judge(recipe: Recipe, evaluations: Sequence[Evaluation], *, yes: bool = False) -> Judged:
    """Judge the answers of an evaluation; what the journal of calls knows is not asked again.

    Args:
        yes: calls may cost money without a cap.

    Raises:
        RecipeError: no judge is named, the mode was not measured, or calls that cost money have neither a cap nor a yes.
        CallsStopped: cap, fatal answer, Ctrl-C; run it again. CorpusError: hand labels that cannot be read.
    """
    settings = _settings(recipe)
    labels = _hand_labels(settings.labels) if settings.labels is not None else {}
    warnings = _kinship(recipe, settings)
    for warning in warnings:
        log.warning(warning)
    corpus = KnowledgeBase.open(recipe.knowledge.path).corpus
    rows = [
        _Row(row["id"], {e.system: e.rows[place]["predictions"][settings.mode]["text"] for e in evaluations})
        for place, row in _read_rows(evaluations, settings.mode)
    ]
    known = {row.id: row for row in rows}
    with CallEngine(settings.endpoint, recipe.run / "calls", money=settings.money) as engine:
        _check_consent(engine, settings, _asks(evaluations, settings, corpus), yes=yes)
        for outcome in engine.run(_asks(evaluations, settings, corpus)):
            kind, identity, which = json.loads(outcome.ask.ref)
            row, value = known[identity], outcome.value if outcome.cls == "ok" else None
            if kind == "rubric":
                row.scores[which] = value.score if isinstance(value, Score) else None
            else:
                row.verdicts[which] = value.better if isinstance(value, Choice) else None
            row.reasons[f"{kind} {which}"] = (
                value.reason if isinstance(value, Score | Choice) else f"{outcome.cls}: {outcome.error}"
            )
    folder = judgements_folder(recipe, evaluations)
    _write(folder, recipe, settings, evaluations, rows, labels, warnings)
    return open_judged(folder)


def judgements_folder(recipe: Recipe, evaluations: Sequence[Evaluation]) -> Path:
    """Where the judgements of these evaluations are, or will be."""
    settings = _settings(recipe)
    judged = settings.model_dump(mode="json", exclude={"money": True, "endpoint": {"concurrency", "rpm", "tpm", "api_key_env"}})
    name = fingerprint([judged, _prompts(), [evaluation.folder.name for evaluation in evaluations]])[:8]
    return recipe.run / "judgements" / name


def open_judged(folder: Path) -> Judged:
    """Judgements from their folder. Raises CheckpointError."""
    told = read_manifest(folder, KIND)
    scores = {name: Rubric(Interval(**own["score"]), own["missing"], own["n"]) for name, own in told["scores"].items()}
    pair = None if told["pair"] is None else _pairs_of(told["pair"])
    strata = {name: _pairs_of(own) for name, own in told["strata"].items()}
    return Judged(told["model"], folder, scores, pair, strata, told["kappa"], tuple(told.get("warnings", ())))


def messages(
    row: Mapping[str, Any], passages: Sequence[tuple[str, str]], answers: Sequence[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """What the judge reads: one answer to score, or two to compare. No text in it can open a section: its headings are escaped.

    Args:
        row: of an evaluation: query, history, answers. passages: title and text of each.
    """
    told = _prompts()["zh" if _is_chinese(str(row["query"])) else "en"]
    heads = told["heads"]
    shown = [f"[{number}] {title}\n{text}".replace("] \n", "]\n") for number, (title, text) in enumerate(passages, 1)]
    parts = [
        *([(heads["history"], "\n".join(row["history"]))] if row.get("history") else []),
        (heads["question"], str(row["query"])),
        (heads["passages"], "\n\n".join(shown)),
        *([(heads["reference"], " | ".join(row["answers"]))] if row.get("answers") else []),
        *zip([heads["answer"]] if len(answers) == 1 else [heads["first"], heads["second"]], answers, strict=True),
    ]
    cut = [(head, _HEADING.sub(r"\1\\#", text)) for head, text in parts]
    body = "\n\n".join(f"## {head}\n{text.strip() or heads['none']}" for head, text in cut)
    task = told["rubric" if len(answers) == 1 else "pair"] + (f"\n{told['escaped']}" if cut != parts else "")
    return {"role": "system", "content": task}, {"role": "user", "content": body}


def _settings(recipe: Recipe) -> JudgeSettings:
    if recipe.evaluate is None or recipe.evaluate.judge is None:
        raise RecipeError(f"recipe {recipe.name!r} names no judge", hint="give it `evaluate: {judge: {endpoint: …, money: …}}`")
    return recipe.evaluate.judge


def _check_consent(engine: CallEngine, settings: JudgeSettings, asks: Iterable[Ask], *, yes: bool) -> None:
    """Tell what the calls will be, or raise RecipeError where they cost money and nobody said how much they may."""
    reserves = {engine.key(ask): engine.reserve(ask)[1] for ask in asks if engine.known(ask) is None}
    if not reserves:
        return
    told = f"{len(reserves)} calls, for which {dollars(sum(reserves.values()))} are reserved"
    if lacks_cap(settings.money) and not yes:
        raise RecipeError(
            f"judge {settings.endpoint.model} takes {told}, and evaluate.judge.money has a price and no cap_usd",
            hint="say how much they may cost at most: evaluate.judge.money.cap_usd=…; --yes goes without a cap",
        )
    log.info("judge %s: %s", settings.endpoint.model, told)
    if engine.cap is not None and engine.journal.ledger.spent + sum(reserves.values()) > engine.cap:
        log.warning(
            "money.cap_usd is %s, of which %s are spent: judging may stop there, and a larger cap goes on",
            dollars(engine.cap), dollars(engine.journal.ledger.spent),
        )  # fmt: skip


def _kinship(recipe: Recipe, settings: JudgeSettings) -> list[str]:
    """Warnings of teachers, named or the recipe's own, that are of the judge's family."""
    own = recipe.synthesis.teacher if recipe.synthesis is not None else None
    teachers = [settings.teacher, own.model if isinstance(own, EndpointSettings) else None]
    model = settings.endpoint.model
    return [
        f"the judge {model} is of the teacher's family ({teacher}): judges prefer what sounds like themselves"
        for teacher in dict.fromkeys(teachers) if teacher is not None and family(teacher) == family(model)
    ]  # fmt: skip


def _read_rows(evaluations: Sequence[Evaluation], mode: str) -> list[tuple[int, dict[str, Any]]]:
    """The questions that every system answered, with their places."""
    rows = [
        (place, row) for place, row in enumerate(evaluations[0].rows)
        if all(mode in evaluation.rows[place]["predictions"] for evaluation in evaluations)
    ]  # fmt: skip
    if not rows:
        raise RecipeError(
            f"no question was answered in mode {mode!r}", hint="name a mode of evaluate.modes in evaluate.judge.mode"
        )
    return rows


def _asks(evaluations: Sequence[Evaluation], settings: JudgeSettings, corpus: Corpus) -> Iterator[Ask]:
    systems = [evaluation.system for evaluation in evaluations]
    for place, row in _read_rows(evaluations, settings.mode):
        said = {e.system: e.rows[place]["predictions"][settings.mode] for e in evaluations}
        if settings.rubric:
            for name, own in said.items():
                yield _ask("rubric", row, name, _passages(own["passages"], corpus), [own["text"]])
        if settings.pairwise and len(systems) > 1:
            a, b = said[systems[-1]], said[systems[0]]
            shown = _passages([*a["passages"], *b["passages"]], corpus)
            yield _ask("pair", row, "a first", shown, [a["text"], b["text"]])
            yield _ask("pair", row, "b first", shown, [b["text"], a["text"]])


def _ask(
    kind: Literal["rubric", "pair"], row: Mapping[str, Any], which: str, passages: Sequence[tuple[str, str]],
    answers: Sequence[str],
) -> Ask:  # fmt: skip
    schema: type[BaseModel] = Score if kind == "rubric" else Choice
    sampling = {"temperature": 0.0, "max_tokens": LIMIT}
    return Ask(f"judge/{kind}", messages(row, passages, answers), schema, sampling, ref=json.dumps([kind, row["id"], which]))


def _passages(ids: Sequence[str], corpus: Corpus) -> list[tuple[str, str]]:
    rows = [row for identity in dict.fromkeys(ids) if (row := corpus.row(identity)) is not None]
    return [(corpus[row].title, corpus[row].text) for row in rows]


def _write(
    folder: Path, recipe: Recipe, settings: JudgeSettings, evaluations: Sequence[Evaluation], rows: Sequence[_Row],
    labels: Mapping[str, Mapping[str, str]], warnings: Sequence[str],
) -> None:  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    systems = [evaluation.system for evaluation in evaluations]
    verdicts = [(row.verdicts.get("a first"), row.verdicts.get("b first")) for row in rows]
    compared = settings.pairwise and len(systems) > 1
    with open(folder / "judgements.jsonl", "w", encoding="utf-8") as file:
        for row, verdict in zip(rows, verdicts, strict=True):
            told = asdict(row) | ({"outcome": pair_outcome(*verdict)[0]} if compared else {})
            file.write(json.dumps(told, ensure_ascii=False) + "\n")
    strata: dict[str, list[tuple[Better | None, Better | None]]] = {name: [] for name in STRATA}
    for row, verdict in zip(rows, verdicts, strict=True):
        strata[length_stratum(row.texts[systems[-1]], row.texts[systems[0]])].append(verdict)
    scored = {name: [row.scores.get(name) for row in rows] for name in systems} if settings.rubric else {}
    write_manifest(folder, KIND, {
        "model": settings.endpoint.model, "mode": settings.mode, "systems": systems, "questions": len(rows),
        "scores": {name: _rubric_dict(rubric(own, seed=recipe.seed)) for name, own in scored.items()},
        "pair": asdict(pairs(verdicts, seed=recipe.seed)) if compared else None,
        "strata": {name: asdict(pairs(own, seed=recipe.seed)) for name, own in strata.items() if own and compared},
        "kappa": {name: _agreed(name, rows, labels) for name in scored if name in labels}, "warnings": list(warnings),
    })  # fmt: skip


def _agreed(system: str, rows: Sequence[_Row], labels: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    own = labels[system]
    return agreement(
        (str(score), own[row.id]) for row in rows if (score := row.scores.get(system)) is not None and row.id in own
    )


def _rubric_dict(found: Rubric) -> dict[str, Any]:
    return asdict(found)


def _pairs_of(told: Mapping[str, Any]) -> Pairs:
    return Pairs(**{**told, "rate": Interval(**told["rate"])})


def _hand_labels(path: Path) -> dict[str, dict[str, str]]:
    """System → question id → score."""
    if not path.is_file():
        raise CorpusError(f"there is no file {path}", hint="evaluate.judge.labels is a .csv with id, system and score")
    found: dict[str, dict[str, str]] = {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if not {"id", "system", "score"} <= set(reader.fieldnames or ()):
            raise CorpusError(f"{path} has the columns {reader.fieldnames}", hint="they must be id, system, score")
        for row in reader:
            if (score := (row["score"] or "").strip()) not in ("1", "2", "3", "4", "5"):
                raise CorpusError(f"{path}: {row['id']!r} has the score {row['score']!r}", hint="1, 2, 3, 4 or 5")
            found.setdefault(row["system"], {})[row["id"]] = score
    return found


@cache
def _prompts() -> dict[str, Any]:
    return cast(dict[str, Any], yaml.safe_load(Path(__file__).with_name("judge.yaml").read_text(encoding="utf-8")))


def _is_chinese(text: str) -> bool:
    """Whether half of the words are Han characters."""
    words = answer_words(text)
    return 2 * sum("\u4e00" <= word[0] <= "\u9fff" for word in words) >= len(words) > 0
