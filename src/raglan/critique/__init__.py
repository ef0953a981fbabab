"""Self-RAG's data, made: a teacher's labels, what a critic learns from them, and the generator's annotated rows.

Asai et al. 2023, *Self-RAG: Learning to Retrieve, Generate, and Critique through Self-Reflection* (arXiv 2310.11511). `raglan
critique recipe.yaml` runs all of it, goes on where it stopped, and asks no teacher twice. `judgements` what is asked,
`teacher` who answers (`rules`, `endpoint`, `classifier`, a trained critic), `sources` rows to annotate, `critic_data` what a
critic learns from, `annotate` the eight steps to the generator's rows, `agreement` how far labels can be trusted.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from raglan.artifact import MANIFEST, fingerprint, read_manifest, write_json
from raglan.calls.estimate import Estimate
from raglan.critique.agreement import agreement, kappa, read_audit
from raglan.critique.annotate import Annotation, Check, annotate, join, shard_of
from raglan.critique.check import row_check
from raglan.critique.classifier import KIND as CLASSIFIER
from raglan.critique.classifier import Classifier, fit_classifier
from raglan.critique.critic_data import KIND as CRITIC
from raglan.critique.critic_data import asked_again, asked_of, candidates, labelled_rows, make_critic_data
from raglan.critique.endpoint import EndpointLabels
from raglan.critique.judgements import Judgement, Template, Verdict, templates
from raglan.critique.rules import Rules, Words
from raglan.critique.sources import Row, read_rows, source_stamps
from raglan.critique.teacher import Book, CriticLabels, Teacher
from raglan.encoder import Encoder
from raglan.errors import CheckpointError, RecipeError
from raglan.generator import open_generator
from raglan.knowledge import KnowledgeBase
from raglan.recipe import (
    CriticTeacher,
    CritiqueSettings,
    EncoderTeacher,
    EndpointSettings,
    JudgementKind,
    QuestionData,
    Recipe,
    RulesTeacher,
    load_recipe,
)
from raglan.records import Hit
from raglan.retriever import Retriever
from raglan.stages import finished_parts
from raglan.weights import read_json

__all__ = ["Critique", "agreement", "kappa", "read_audit", "shard_of"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Critique:
    """A recipe's `critique`, with all that it needs opened when it is needed.

    Attributes:
        uncapped: whether a teacher that costs money may do without a cap.

    Raises:
        RecipeError: a recipe without `critique`.
    """

    recipe: Recipe
    uncapped: bool = False

    def __post_init__(self) -> None:
        if self.recipe.critique is None:
            raise RecipeError(f"recipe {self.recipe.name!r} has no `critique`", hint="see recipes/self_rag_tiny.yaml")

    @property
    def settings(self) -> CritiqueSettings:
        assert self.recipe.critique is not None
        return self.recipe.critique

    def critic_data(self) -> dict[str, Any]:
        """Make what a critic learns from, or find it made; the manifest. Raises RecipeError where `critic` is null."""
        if self.settings.critic is None:
            raise RecipeError("critique.critic is null, so there is no critic data to make")
        return make_critic_data(
            self.settings, self.rows, self.base.corpus, self.search, self.teacher, self.templates, self._book("teacher"),
            seed=self.recipe.seed, made_of=self.made_of,
        )  # fmt: skip

    def estimate(self) -> Estimate:
        """What the critic data's labels will cost, from some that are really asked for, and kept.

        Raises:
            RecipeError: a teacher that costs nothing. CallsStopped, GeneratorError: as `EndpointLabels.estimate`.
        """
        settings = self.settings.teacher
        if not isinstance(settings, EndpointSettings):
            raise RecipeError(f"critique.teacher is {settings.kind}, which costs nothing", hint="leave out --estimate")
        asked = asked_of(self.settings, self.rows, self.base.corpus, self.search, seed=self.recipe.seed)
        assert self.settings.critic is not None
        again = asked_again(asked, self.settings.critic, self.recipe.seed)
        calls = self.settings.path / "calls"
        teacher = EndpointLabels(settings, self.templates, calls, money=self.settings.money, uncapped=True)
        return teacher.estimate(asked, again, seed=self.recipe.seed)

    def annotate(self, *, shard: tuple[int, int] | None = None) -> dict[str, Any]:
        """Annotate the generator's rows, or those of one shard; the manifest."""
        return annotate(self._annotation(shard), self.rows)

    def join(self, count: int) -> dict[str, Any]:
        """Put the shards of an annotation together; the manifest. Raises CheckpointError."""
        return join(self._annotation(None), count)

    def compare_annotator(self) -> dict[str, Any]:
        """How far the annotator agrees with the teacher on critic/test.jsonl, by judgement; kept in annotator.json."""
        held_out = self._labelled("test")
        found = self._book("annotator").label(self.annotator, [one for one, _ in held_out], self.templates)
        pairs: dict[str, list[tuple[str, str]]] = {kind: [] for kind in self.settings.judgements}
        for one, label in held_out:
            verdict = found[one.id]
            if isinstance(verdict, Verdict):
                pairs[one.kind].append((label, verdict.label))
        told = {kind: agreement(own) for kind, own in pairs.items()}
        write_json(self.settings.path / "annotator.json", {"annotator": self.annotator.name, "judgements": told})
        return told

    def _annotation(self, shard: tuple[int, int] | None) -> Annotation:
        name = "annotator" if shard is None else f"annotator-{shard[0] + 1}-of-{shard[1]}"
        return Annotation(
            self.settings, self.base.corpus, self.search, self._annotator(name), self.templates, self._book(name),
            self.recipe.seed, self.made_of, self.check, shard,
        )  # fmt: skip

    @cached_property
    def base(self) -> KnowledgeBase:
        return KnowledgeBase.of(self.recipe.knowledge)

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder.open(self.recipe.knowledge.encoder, query_encoder=self.recipe.retriever.query_encoder)

    @cached_property
    def retriever(self) -> Retriever:
        return Retriever(self.base, self.encoder, index=self.recipe.index)

    def search(self, queries: Any, k: int) -> list[tuple[Hit, ...]]:
        return self.retriever.retrieve(list(queries), min(k, len(self.base.corpus)))

    @cached_property
    def rows(self) -> list[Row]:
        return read_rows(self.settings, self.base.corpus, seed=self.recipe.seed)

    @cached_property
    def templates(self) -> dict[JudgementKind, Template]:
        return templates(preceding=self.settings.relevance_sees == "preceding")

    @cached_property
    def words(self) -> Words:
        return Words(self.base.corpus)

    @cached_property
    def made_of(self) -> str:
        sources = {name: source.model_dump(mode="json", exclude={"path"}) for name, source in self.settings.sources.items()}
        return fingerprint([
            self.retriever.fingerprint, self.recipe.seed, sources, source_stamps(self.settings), self.settings.abstention,
            self.settings.relevance_sees,
        ])  # fmt: skip

    @cached_property
    def teacher(self) -> Teacher:
        return self._opened(self.settings.teacher, "teacher")

    @cached_property
    def annotator(self) -> Teacher:
        return self._annotator("annotator")

    @cached_property
    def check(self) -> Check | None:
        """How finished rows are parsed: by the tokens of the recipe's generator, where it has them."""
        if self.recipe.generator.vocabulary != "self_rag":
            log.warning("generator.vocabulary is not self_rag: the rows' grammar is not checked by its tokens")
            return None
        return row_check(open_generator(self.recipe.generator, self.recipe.prompt).marked_prompt)

    def _annotator(self, name: str) -> Teacher:
        settings = self.settings.annotator
        if settings is None:
            return self.teacher if name == "annotator" else self._opened(self.settings.teacher, name)
        return self._classifier() if isinstance(settings, EncoderTeacher) else self._opened(settings, name)

    def _opened(self, settings: RulesTeacher | EndpointSettings | CriticTeacher, name: str) -> Teacher:
        if isinstance(settings, RulesTeacher):
            return Rules(settings, self.base.corpus)
        if isinstance(settings, EndpointSettings):
            calls = self.settings.path / "calls" / (name if "-" in name else "")
            return EndpointLabels(settings, self.templates, calls, money=self.settings.money, uncapped=self.uncapped)
        return CriticLabels(_trained(settings.recipe, self.templates), self.templates)

    def _classifier(self) -> Classifier:
        folder, made = self.settings.path / "encoder", self.critic_data()
        settings = self.settings.annotator
        assert isinstance(settings, EncoderTeacher)
        wanted = fingerprint([made["made_of"], settings.model_dump(mode="json")])
        try:
            there = read_manifest(folder, CLASSIFIER)["made_of"] == wanted
        except CheckpointError:
            there = False
        if not there:
            log.info("fitting a classifier for each judgement")
            fit_classifier(settings, self._labelled("train"), self.encoder, self.words, self.templates, folder, made_of=wanted)
        return Classifier(folder, self.encoder, self.words, self.templates)

    def _labelled(self, split: str) -> list[tuple[Judgement, str]]:
        every = candidates(self.rows, self.base.corpus, self.search, seed=self.recipe.seed, abstention=self.settings.abstention)
        return labelled_rows(self.settings.path / "critic", every, split)

    def _book(self, name: str) -> Book:
        return Book(self.settings.path / "verdicts" / f"{name}.jsonl")


def _trained(path: Path, mine: Mapping[JudgementKind, Template]) -> Any:
    """The generator that a critic's recipe trained, on the wordings that are asked for here."""
    recipe = load_recipe(path)
    stages = finished_parts(recipe)
    missing = [name for name in recipe.trainings() if name not in dict(stages)]
    if missing or stages[-1][1].generator is None:
        why = f"its stage {missing[0]} is not finished" if missing else "it trains no generator"
        raise CheckpointError(f"{path} gives no critic: {why}", hint=f"raglan train {path}")
    for name, stage in recipe.trainings().items():
        manifest = stage.data.path.parent / MANIFEST if isinstance(stage.data, QuestionData) else None
        told = read_json(manifest) if manifest is not None and manifest.is_file() else {}
        if told.get("kind") == CRITIC:  # a stage may learn other questions first
            _check_wordings(told["templates"], mine, f"{path}, stage {name}")
            learned, asked = told.get("labels", "words"), "tokens" if recipe.prompt.self_rag.answers == "tokens" else "words"
            if learned != asked:
                raise CheckpointError(
                    f"{path}, stage {name}, has labels that are {learned}, and prompt.self_rag.answers asks for {asked}",
                    hint="prompt.self_rag.answers: tokens belongs to critique.critic.labels: tokens",
                )
    settings = recipe.generator.model_copy(update={"model": stages[-1][1].generator, "adapter": None})
    return open_generator(settings, recipe.prompt)


def _check_wordings(theirs: Mapping[str, str], mine: Mapping[JudgementKind, Template], where: str) -> None:
    for kind, template in mine.items():
        if theirs.get(kind) != template.fingerprint:
            raise CheckpointError(
                f"{where} learned {kind} in the wording {theirs.get(kind, 'none')}, and is asked in {template.fingerprint}",
                hint="make the critic data again and train the critic on them",
            )
