"""A chat model behind a server as the teacher: temperature 0, a strict schema, and every call through the engine.

What the engine promises holds here: a call is journalled before it is sent, none is paid twice, none goes beyond the cap, a
malformed answer gets one repair. What is still no label after that is a reject, with the reason; what failed for a passing
reason is no answer, and is asked for again by the next run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from raglan.artifact import fingerprint
from raglan.calls import Ask, CallEngine, Outcome
from raglan.calls.estimate import Estimate, estimate
from raglan.calls.money import lacks_cap
from raglan.critique.judgements import LABELS, Judgement, Reject, Template, Verdict, read_reply, reply_model
from raglan.critique.teacher import Labelled, Teacher
from raglan.errors import RecipeError
from raglan.recipe import EndpointSettings, JudgementKind, MoneySettings

__all__ = ["EndpointLabels"]

LIMIT = 200  # the paper's; a label and a sentence need less


class EndpointLabels(Teacher):
    """Labels by a chat model. `folder` is where the calls' journal is kept; `uncapped` lets calls cost what they may.

    Raises:
        RecipeError: calls that cost money, and neither a cap nor `uncapped`.
    """

    name = "endpoint"

    def __init__(
        self, settings: EndpointSettings, templates: Mapping[JudgementKind, Template], folder: Path, *, money: MoneySettings,
        uncapped: bool = False,
    ):  # fmt: skip
        if lacks_cap(money) and not uncapped:
            raise RecipeError(
                "critique.money has a price and no cap_usd",
                hint="say how much the labels may cost at most; --estimate tells what to expect, --yes goes without a cap",
            )
        self.settings, self.templates, self.folder, self.money = settings, templates, folder, money

    @property
    def fingerprint(self) -> str:
        told = {kind: self.templates[kind].fingerprint for kind in LABELS}
        return fingerprint(["endpoint", self.settings.base_url, self.settings.model, LIMIT, told])

    def label(self, judgements: Sequence[Judgement], *, draw: int = 0) -> Iterator[Labelled]:
        kinds = {judgement.id: judgement.kind for judgement in judgements}
        with CallEngine(self.settings, self.folder, money=self.money) as engine:
            for outcome in engine.run(self._ask(judgement, draw) for judgement in judgements):
                found = _read(kinds[outcome.ask.ref], outcome)
                if found is not None:
                    yield outcome.ask.ref, found


    def estimate(self, judgements: Sequence[Judgement], again: Sequence[Judgement], *, seed: int) -> Estimate:
        """What these cost, and those that are asked a second time: from a few of each kind, which are asked and kept.

        Raises:
            CallsStopped: as in a run. GeneratorError: none of the few was answered.
        """
        asks = [*(self._ask(one, 0) for one in judgements), *(self._ask(one, 1) for one in again)]
        with CallEngine(self.settings, self.folder, money=self.money) as engine:
            return estimate(engine, asks, accepted=lambda _: True, seed=seed)  # a reject is not made again

    def _ask(self, judgement: Judgement, draw: int) -> Ask:
        return Ask(
            f"critique/{judgement.kind}", self.templates[judgement.kind].messages(judgement), reply_model(judgement.kind),
            {"temperature": 0.0, "max_tokens": LIMIT}, draw, judgement.id,
        )  # fmt: skip


def _read(kind: JudgementKind, outcome: Outcome) -> Verdict | Reject | None:
    if outcome.cls == "transient":
        return None
    if outcome.cls == "ok" and outcome.value is not None:
        return read_reply(kind, outcome.value)
    return Reject(f"{outcome.cls}: {outcome.error}" if outcome.error else outcome.cls, outcome.raw)
