"""Where judgements are kept: an SQLite file, or a PostgreSQL database by its address.

    raglan_feedback          a row for every wording of every statement; `current` is the one that counts
    raglan_feedback_schema   the version of these tables

A statement is known by its origin. Reading an export again adds nothing; a statement that has changed since is added as a new
wording and the former one is kept, no longer current. A wording that is older, by its own time, than the current one is kept
as a former one.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raglan.artifact import fingerprint
from raglan.errors import CheckpointError, RecipeError, require
from raglan.feedback.judgement import Judgement

__all__ = ["FeedbackStore", "without_password"]

SCHEMA = 1
SECRET_QUERY = re.compile(r"(?i)([?&](?:[\w%-]*(?:password|passwd|pwd|secret|token)[\w%-]*|sslkey)=)(?!\$\{\w+\}(?:&|$))[^&]*")
VARIABLE = re.compile(r"\$\{\w+\}")
ADDRESS = "give an SQLite file, or an address as in postgresql://user:password@host/name"


class FeedbackStore:
    """Judgements in a database. `with FeedbackStore(url) as store`, or call `close`."""

    def __init__(self, url: str | Path, *, create: bool = False):
        """
        Args:
            url: a file's path, or an SQLAlchemy address; ${NAME} in it is the environment variable of that name.
            create: make the tables, and the file, where there are none.

        Raises:
            CheckpointError: no store there, or one that another version of raglan made. RecipeError: no such address, or a
                broken one.
            MissingExtra: SQLAlchemy or the PostgreSQL driver is not installed.
        """
        self._sql: Any = require("sqlalchemy", "to keep feedback")
        self.address = _address(url)
        self._told = without_password(self.address)
        if self.address.startswith("postgresql+psycopg:"):
            require("psycopg", "to keep feedback in PostgreSQL")
        try:
            self._sql.engine.make_url(self.address)
        except (ValueError, self._sql.exc.ArgumentError):
            raise RecipeError(f"{self._told} is no address of a database", hint=ADDRESS) from None
        file = self.address.removeprefix("sqlite:///")
        if file != self.address and not create and not Path(file).is_file():
            raise CheckpointError(f"there is no feedback store {file}", hint="`raglan feedback import` makes one")
        if file != self.address and create:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
        with self._faults():
            self._engine = self._sql.create_engine(self.address)
            self._rows, self._schema = self._tables()
            self._open(create=create)

    def __enter__(self) -> FeedbackStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._engine.dispose()

    def add(self, judgements: Sequence[Judgement]) -> Counter[str]:
        """Keep judgements, all or none. How many were `new`, `changed`, `unchanged`, or `older` than what is known."""
        counts: Counter[str] = Counter()
        with self._faults(), self._engine.begin() as connection:
            self._alone(connection)
            known = self._known(connection)
            for one in judgements:
                counts[self._keep(connection, known, one)] += 1
        return counts

    def judgements(self, *, former: bool = False) -> list[Judgement]:
        """What is current, in the order in which it came; with `former` every wording that there ever was.

        Of each statement the current wording then comes last, so that another store that reads them has it current as well.
        """
        rows = self._rows.c
        wanted = self._sql.select(rows.origin, rows.current, rows.content).order_by(rows.number)
        with self._faults(), self._engine.connect() as connection:
            kept = [tuple(row) for row in connection.execute(wanted if former else wanted.where(rows.current))]
        first = {origin: number for number, (origin, *_) in reversed([*enumerate(kept)])}
        found = [json.loads(content) for *_, content in sorted(kept, key=lambda row: (first[row[0]], row[1]))]
        return [Judgement(**{**row, "history": tuple(row["history"])}) for row in found]

    @property
    def fingerprint(self) -> str:
        """16 hex digits of what is current."""
        rows = self._rows.c
        wanted = self._sql.select(rows.origin, rows.stamp).where(rows.current).order_by(rows.origin)
        with self._faults(), self._engine.connect() as connection:
            return fingerprint([list(row) for row in connection.execute(wanted)])

    def _tables(self) -> tuple[Any, Any]:
        sql = self._sql
        metadata = sql.MetaData()
        rows = sql.Table(
            "raglan_feedback", metadata,
            sql.Column("number", sql.Integer, primary_key=True, autoincrement=True),
            sql.Column("origin", sql.Text, nullable=False),
            sql.Column("stamp", sql.String(16), nullable=False),
            sql.Column("current", sql.Boolean, nullable=False, index=True),
            sql.Column("kind", sql.String(16), nullable=False),
            sql.Column("aside", sql.Text, nullable=False),
            sql.Column("time", sql.String(40), nullable=False),
            sql.Column("imported", sql.String(40), nullable=False),
            sql.Column("content", sql.Text, nullable=False),
            sql.UniqueConstraint("origin", "stamp"),
        )  # fmt: skip
        schema = sql.Table("raglan_feedback_schema", metadata, sql.Column("version", sql.Integer, primary_key=True))
        return rows, schema

    def _open(self, *, create: bool) -> None:
        with self._engine.begin() as connection:
            there = self._sql.inspect(connection).has_table(self._schema.name)
            if not there and not create:
                raise CheckpointError(f"{self._told} holds no feedback", hint="`raglan feedback import` makes the tables")
            if not there:
                self._rows.metadata.create_all(connection)
                connection.execute(self._schema.insert().values(version=SCHEMA))
            version = connection.execute(self._sql.select(self._schema.c.version)).scalar_one_or_none()
            if version != SCHEMA:
                raise CheckpointError(
                    f"{self._told} has version {version} of the feedback tables; this raglan reads version {SCHEMA}",
                    hint="read it with the raglan that made it: raglan feedback export --as raglan, then import that here",
                )

    def _alone(self, connection: Any) -> None:
        """Two imports at once take turns; SQLite does that by itself, once something is written."""
        if self._engine.dialect.name == "postgresql":
            connection.execute(self._sql.text(f"LOCK TABLE {self._rows.name} IN SHARE ROW EXCLUSIVE MODE"))
        else:
            connection.execute(self._schema.update().values(version=SCHEMA))

    def _known(self, connection: Any) -> dict[str, dict[str, tuple[int, bool, str]]]:
        """origin → stamp → (number, current, time)."""
        rows = self._rows.c
        known: dict[str, dict[str, tuple[int, bool, str]]] = {}
        wanted = self._sql.select(rows.origin, rows.stamp, rows.number, rows.current, rows.time)
        for origin, stamp, number, current, time in connection.execute(wanted):
            known.setdefault(origin, {})[stamp] = (number, current, time)
        return known

    def _keep(self, connection: Any, known: dict[str, dict[str, tuple[int, bool, str]]], one: Judgement) -> str:
        row, origin = one.row(), _plain(one.origin)
        stamp = fingerprint(json.dumps({name: value for name, value in row.items() if name != "raw"}, sort_keys=True))
        wordings = known.setdefault(origin, {})
        held = next((stamp for stamp, (_, current, _) in wordings.items() if current), None)
        if held == stamp:
            return "unchanged"
        older = held is not None and bool(one.time) and one.time < wordings[held][2]
        if older and stamp in wordings:
            return "unchanged"
        update = self._rows.update()
        if held is not None and not older:
            connection.execute(update.where(self._rows.c.origin == origin).values(current=False))
            wordings[held] = (*wordings[held][:1], False, wordings[held][2])
        if stamp in wordings:
            number = wordings[stamp][0]
            connection.execute(update.where(self._rows.c.number == number).values(current=True))
        else:
            number = connection.execute(self._rows.insert().values(
                origin=origin, stamp=stamp, current=not older, kind=one.kind, aside=_plain(one.aside), time=one.time,
                imported=datetime.now(UTC).isoformat(timespec="seconds"), content=json.dumps(row, default=str),
            )).inserted_primary_key[0]  # fmt: skip
        wordings[stamp] = (number, not older, one.time)
        return "new" if held is None else "older" if older else "changed"

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """What the database says, without a traceback and without the password."""
        try:
            yield
        except self._sql.exc.SQLAlchemyError as fault:
            said = str(getattr(fault, "orig", None) or fault).strip().splitlines()
            reason = said[0] if said else type(fault).__name__
            raise CheckpointError(f"the feedback store {self._told} cannot be used: {reason}", hint=ADDRESS) from None


def without_password(url: str | Path) -> str:
    """An address that may be shown: … stands for a password, wherever the address holds it. ${NAME} stays as it is."""
    text = SECRET_QUERY.sub(r"\1…", str(url))
    scheme, mark, rest = text.partition("://")
    user, at, place = rest.rpartition("@")
    if not mark or not at or ":" not in user:
        return text
    name, _, password = user.partition(":")
    return text if VARIABLE.fullmatch(password) else f"{scheme}://{name}:…@{place}"


def _address(url: str | Path) -> str:
    text = str(url)
    for name in re.findall(r"\$\{(\w+)\}", text):
        if name not in os.environ:
            raise RecipeError(f"the store's address needs the variable {name}, which is not set", hint=f"export {name}=…")
    text = os.path.expandvars(text)
    if "://" not in text:
        return f"sqlite:///{Path(text).absolute()}"
    scheme, _, rest = text.partition("://")
    if scheme not in ("sqlite", "postgres", "postgresql", "postgresql+psycopg"):
        raise RecipeError(f"a feedback store at {scheme}://… is not known", hint=ADDRESS)
    return text if scheme == "sqlite" else f"postgresql+psycopg://{rest}"


def _plain(text: str) -> str:
    """PostgreSQL keeps no NUL, and no database half a character; `content` is ASCII and keeps both."""
    return text.replace("\0", "␀").encode("utf-8", "replace").decode("utf-8")
