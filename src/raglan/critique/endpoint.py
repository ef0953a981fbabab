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
from raglan.critique.judgements import LABELS, Judgement, Reject, Template, Verdict, read_reply, reply_model
from raglan.critique.teacher import Labelled, Teacher
from raglan.errors import RecipeError
from raglan.recipe import EndpointSettings, JudgementKind, MoneySettings

__all__ = ["EndpointLabels"]

LIMIT = 200  # the paper's; a label and a sentence need less


class EndpointLabels(Teacher):
    """Labels by a chat model. `folder` is where the calls' journal is kept.

    Raises:
        RecipeError: calls that cost money, and no cap.
    """

    name = "endpoint"

    def __init__(
        self, settings: EndpointSettings, templates: Mapping[JudgementKind, Template], folder: Path, *, money: MoneySettings
    ):
        if money.price not in (None, "free") and money.cap_usd is None:
            raise RecipeError("critique.money has a price and no cap_usd", hint="say how much the labels may cost at most")
        self.settings, self.templates, self.folder, self.money = settings, templates, folder, money

    @property
    def fingerprint(self) -> str:
        told = {kind: self.templates[kind].fingerprint for kind in LABELS}
        return fingerprint(["endpoint", self.settings.base_url, self.settings.model, LIMIT, told])

    def label(self, judgements: Sequence[Judgement], *, draw: int = 0) -> Iterator[Labelled]:
        kinds = {judgement.id: judgement.kind for judgement in judgements}
        asks = (
            Ask(
                f"critique/{judgement.kind}", self.templates[judgement.kind].messages(judgement), reply_model(judgement.kind),
                {"temperature": 0.0, "max_tokens": LIMIT}, draw, judgement.id,
            )
            for judgement in judgements
        )  # fmt: skip
        with CallEngine(self.settings, self.folder, money=self.money) as engine:
            for outcome in engine.run(asks):
                found = _read(kinds[outcome.ask.ref], outcome)
                if found is not None:
                    yield outcome.ask.ref, found


def _read(kind: JudgementKind, outcome: Outcome) -> Verdict | Reject | None:
    if outcome.cls == "transient":
        return None
    if outcome.cls == "ok" and outcome.value is not None:
        return read_reply(kind, outcome.value)
    return Reject(f"{outcome.cls}: {outcome.error}" if outcome.error else outcome.cls, outcome.raw)
