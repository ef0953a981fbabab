"""The checks of a recipe, opened: `synthesis.verify`, with the calls that they make in synthesis's own journal.

    support        rules: strings alone · nli: a model in this process · judge: a chat model, after nli if there is one
    closed_book    the recipe's generator here, or a chat model

Judge, closed book and teacher are engines of their own, each with its server and its price; journal, ledger and cap are one.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from raglan.calls import CallEngine
from raglan.calls.journal import Journal
from raglan.errors import RecipeError
from raglan.generator import open_generator
from raglan.perturb import Judge
from raglan.recipe import (
    ClosedBookSettings,
    EndpointSettings,
    JudgeSupport,
    NliSupport,
    PriceSettings,
    Recipe,
    SynthesisSettings,
)
from raglan.synthesis.desk import PIECE
from raglan.synthesis.recall import ClosedBook
from raglan.verification import PaidJudge, Verifier
from raglan.verification.entailment import Entailment

__all__ = ["Checks", "open_checks", "open_journal", "prices"]

WAVES = 8  # a piece has so many examples for each request that may be under way


@dataclass(frozen=True)
class Checks:
    """Attributes:
    verifier: with its entailment model or judge. recall: asks without passages.
    guard: what the guard asks where an answer is no string.
    engine: of some of the calls that are made here, if any are.
    inputs: names of what verdicts follow from.
    piece: examples that are judged together.
    """

    verifier: Verifier
    recall: ClosedBook | None = None
    guard: Judge | None = None
    engine: CallEngine | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)
    piece: int = PIECE


def prices(settings: SynthesisSettings, *, support_only: bool = False) -> list[PriceSettings | Literal["free"] | None]:
    """What each of the servers that a recipe calls costs; empty where no call is made. Or of support alone.

    Raises:
        RecipeError: another server or model than the teacher's has no price of its own.
    """
    support, closed = settings.verify.support, settings.verify.closed_book
    judge = [_price(settings, support, "support")] if isinstance(support, JudgeSupport) else []
    if support_only:
        return judge
    teacher = [settings.priced.price] if isinstance(settings.teacher, EndpointSettings) else []
    return [*teacher, *judge, *([_price(settings, closed, "closed_book")] if closed is not None and closed.endpoint else [])]


def _price(
    settings: SynthesisSettings, asking: JudgeSupport | ClosedBookSettings, name: str
) -> PriceSettings | Literal["free"] | None:
    """Its own, or the teacher's where server and model are the teacher's."""
    own, teacher = asking.endpoint, settings.teacher
    if asking.price is not None:
        return asking.price
    shared = isinstance(teacher, EndpointSettings) and (
        own is None or (own.base_url, own.model) == (teacher.base_url, teacher.model)
    )
    if not shared:
        raise RecipeError(
            f"synthesis.verify.{name}.price is not said, and its server or model is not the teacher's",
            hint="what it costs per million tokens, or `price: free`",
        )
    return settings.priced.price


def open_journal(settings: SynthesisSettings, stack: ExitStack) -> Journal:
    """The journal of all calls of a recipe. Raises CheckpointError: another process writes it."""
    return stack.enter_context(closing(Journal(Path(settings.calls or settings.path / "calls"))))


def open_checks(recipe: Recipe, journal: Journal | None, stack: ExitStack, *, recall: bool = True) -> Checks:
    """What `synthesis.verify` names.

    Args:
        recall: whether the closed book is wanted, too.

    Raises:
        RecipeError: no `synthesis`, or no price. GeneratorError: a server's key that is not set.
        CheckpointError: a model that cannot be loaded, or tells no entailment.
    """
    asked = recipe.synthesis
    if asked is None:
        raise RecipeError("the recipe has no `synthesis`", hint="see docs/concepts/synthesis.md for one")
    inputs: dict[str, str] = {}
    support = asked.verify.support
    nli = _entailment(support.nli if isinstance(support, JudgeSupport) else support, inputs)
    judge = None
    if isinstance(support, JudgeSupport):
        engine = _engine(asked, support.endpoint, _price(asked, support, "support"), journal, stack)
        judge = PaidJudge(engine, max_tokens=support.max_tokens, give_up=support.give_up)
        inputs["judge"] = judge.fingerprint
    closed = _closed_book(recipe, asked, journal, stack) if recall else None
    if closed is not None:
        inputs["closed_book"] = closed.fingerprint
    entailed = {} if nli is None else {"entailed": nli[1]}
    return Checks(
        Verifier(nli=nli[0] if nli else None, judge=judge, may_be_missing=asked.verify.may_be_missing, **entailed),
        closed, judge.answers if judge is not None and isinstance(support, JudgeSupport) and support.guard else None,
        judge.engine if judge is not None else closed.engine if closed is not None else None, inputs, _piece(asked),
    )  # fmt: skip


def _entailment(settings: object, inputs: dict[str, str]) -> tuple[Entailment, float] | None:
    if not isinstance(settings, NliSupport):
        return None
    made = Entailment(settings.model, batch_size=settings.batch_size)
    inputs["nli"] = made.fingerprint
    return made, settings.entailed


def _engine(
    asked: SynthesisSettings, endpoint: EndpointSettings | None, price: PriceSettings | Literal["free"] | None,
    journal: Journal | None, stack: ExitStack,
) -> CallEngine:  # fmt: skip
    server = endpoint or asked.teacher
    assert isinstance(server, EndpointSettings), "the recipe's own check"
    assert journal is not None, "open_journal opens one where calls are made"
    money = asked.money.model_copy(update={"price": price})
    return stack.enter_context(CallEngine(server, journal, money=money))


def _closed_book(recipe: Recipe, asked: SynthesisSettings, journal: Journal | None, stack: ExitStack) -> ClosedBook | None:
    settings = asked.verify.closed_book
    if settings is None:
        return None
    if settings.endpoint is not None:
        price = _price(asked, settings, "closed_book")
        return ClosedBook.paid(settings, _engine(asked, settings.endpoint, price, journal, stack))
    generator = open_generator(recipe.generator, recipe.prompt)
    return ClosedBook.local(settings, generator, generator.prompt)


def _piece(asked: SynthesisSettings) -> int:
    """Large enough that all who are called have work, small enough that a stop leaves little unjudged.

    A generator here rounds by what stands in a batch together, so with one the piece does not follow how many are called.
    """
    support, closed = asked.verify.support, asked.verify.closed_book
    if closed is not None and closed.endpoint is None:
        return PIECE
    servers = [asked.teacher, support.endpoint if isinstance(support, JudgeSupport) else None]
    return max([PIECE, *(WAVES * server.concurrency for server in servers if isinstance(server, EndpointSettings))])
