"""What was answered, compared, judged and decided, in a database: SQLite in a file, or PostgreSQL by URL.

A record is committed before `Store.add` is done, so nothing that was acknowledged is lost when the process is killed (SQLite:
write-ahead log, `synchronous=NORMAL`; a power cut may take the last commits). One thread writes; what waits is one commit.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import sqlalchemy
from sqlalchemy import Boolean, Column, Float, Index, Integer, LargeBinary, MetaData, String, Table, Text, event
from sqlalchemy.exc import SQLAlchemyError

from slimlmm.errors import UserError

DAY_S = 86_400.0
#: seconds between two deletions of what is older than is kept
SWEEP_S = 600.0
#: most rows of one commit
COMMIT = 512
#: what a database raises for a row that it does not take; drivers let some of it through as it is
BROKEN = (SQLAlchemyError, ValueError, TypeError, OverflowError)

METADATA = MetaData()
#: one row for each request that an engine was asked for; times are seconds since 1970
ANSWERS = Table(
    "answers",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("at", Float, nullable=False),
    Column("task", String(200), nullable=False, comment="as the caller named it, or empty"),
    Column("arm", String(20), nullable=False, comment="student or candidate"),
    Column("model", Text, nullable=False, comment="the arm's folder or name"),
    Column("route", String(20), nullable=False, comment="who wrote the answer: student, candidate or teacher"),
    Column("status", Integer, nullable=False, comment="HTTP status"),
    Column("question", Text, nullable=False, comment="all texts of the user's turns"),
    Column("answer", Text, comment="null where there was none"),
    Column("confidence", Float, comment="of the arm's answer; null where it was not reckoned"),
    Column("seconds", Float, nullable=False, comment="from the request's body to its answer"),
    Column("arm_seconds", Float, comment="that the arm took, waiting for its turn included"),
    Column("prompt_tokens", Integer),
    Column("completion_tokens", Integer),
    Index("answers_at", "at"),
)
#: the same request answered by an arm and by the teacher
PAIRS = Table(
    "pairs",
    METADATA,
    Column("answer_id", String(32), primary_key=True),
    Column("at", Float, nullable=False),
    Column("purpose", String(20), nullable=False, comment="shadow or escalation"),
    Column("arm", String(20), nullable=False),
    Column("task", String(200), nullable=False),
    Column("student", Text, nullable=False, comment="the arm's answer"),
    Column("teacher", Text, nullable=False),
    Column("agree", Boolean, nullable=False, comment="equal but for white space"),
    Column("student_seconds", Float, nullable=False),
    Column("teacher_seconds", Float, nullable=False),
    Column("student_tokens", Integer),
    Column("teacher_tokens", Integer),
    Index("pairs_at", "at"),
)
#: features of pictures, for those requests that were looked at
PICTURES = Table(
    "pictures",
    METADATA,
    Column("answer_id", String(32), primary_key=True),
    Column("number", Integer, primary_key=True, comment="place among the request's pictures"),
    Column("at", Float, nullable=False),
    Column("sha256", String(64), nullable=False, comment="of the picture's file"),
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    Column("bytes", Integer, nullable=False),
    Column("brightness", Float, nullable=False, comment="mean of the grey picture, 0 to 255"),
    Column("contrast", Float, nullable=False, comment="its standard deviation"),
    Column("entropy", Float, nullable=False, comment="of its grey levels, bits"),
    Column("saturation", Float, nullable=False, comment="mean of the HSV picture's, 0 to 255"),
    Column("file", LargeBinary, comment="the picture itself, where pictures are kept"),
    Index("pictures_at", "at"),
)
#: labels that people gave
AUDITS = Table(
    "audits",
    METADATA,
    Column("answer_id", String(32), primary_key=True),
    Column("auditor", String(200), primary_key=True),
    Column("at", Float, nullable=False),
    Column("correct", Boolean, nullable=False),
    Column("label", Text, comment="the right answer, where it was given"),
    Index("audits_at", "at"),
)
#: what the gateway decided and what a monitor found
EVENTS = Table(
    "events",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("at", Float, nullable=False),
    Column("kind", String(40), nullable=False, comment="started, canary, returned, alarm ..."),
    Column("detail", sqlalchemy.JSON, nullable=False),
    Index("events_at", "at"),
)
#: readings of an energy counter
ENERGY = Table(
    "energy",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("at", Float, nullable=False, comment="end of the reading"),
    Column("seconds", Float, nullable=False),
    Column("joules", Float, nullable=False),
    Column("requests", Integer, nullable=False, comment="answered meanwhile"),
    Column("source", String(200), nullable=False, comment="the counter"),
    Index("energy_at", "at"),
)


def opened(where: str) -> sqlalchemy.Engine:
    """Return the database of a path (SQLite) or URL with all tables there.

    Raises:
        UserError: it cannot be opened, or its driver is not installed.
    """
    url = where if "://" in where else f"sqlite:///{where}"
    try:
        found = sqlalchemy.create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
        if found.dialect.name == "sqlite":
            event.listen(found, "connect", _sqlite)
        METADATA.create_all(found)
    except (SQLAlchemyError, ImportError) as error:
        raise UserError(
            f"--store {where}: {reason_of(error)}. Give the path of a file, or postgresql+psycopg://..."
        ) from error
    return found


def reason_of(error: Exception) -> str:
    """Return what the driver itself said, in one line."""
    return str(getattr(error, "orig", None) or error).splitlines()[0]


def _sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    for name, value in (("journal_mode", "WAL"), ("synchronous", "NORMAL"), ("busy_timeout", 10_000)):
        cursor.execute(f"PRAGMA {name}={value}")
    cursor.close()


class Store:
    """Writes records; `failed` counts those that the database did not take."""

    def __init__(self, where: str, *, retention_days: float | None = None) -> None:
        self.where, self.database = where, opened(where)
        self.retention_days = retention_days
        self.failed = 0
        self._waiting: queue.SimpleQueue[tuple[Table, Mapping[str, Any], Future[None]] | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="store", daemon=True)
        self._writer.start()

    def last_weight(self, candidate: str) -> float | None:
        """Return the share of requests that a candidate was last given or, taken back, 0; None where neither happened."""
        events = sqlalchemy.select(EVENTS.c.detail).where(EVENTS.c.kind.in_(("canary", "returned")))
        with self.database.connect() as connection:
            for detail in connection.execute(events.order_by(EVENTS.c.id.desc())).scalars():
                if detail.get("candidate") == candidate:
                    return float(detail["weight"])
        return None

    async def add(self, table: Table, row: Mapping[str, Any]) -> bool:
        """Write a row and tell whether it was committed; a database that does not take it stops nobody's answer."""
        done: Future[None] = Future()
        clean = {key: _clean(value) if isinstance(value, str) else value for key, value in row.items()}
        self._waiting.put((table, clean, done))
        try:
            await asyncio.wrap_future(done)
        except BROKEN:
            return False
        return True

    def close(self) -> None:
        """Write what waits, and end."""
        self._waiting.put(None)
        self._writer.join()
        self.database.dispose()

    def _write(self) -> None:
        swept = 0.0
        while (first := self._waiting.get()) is not None:
            held = [first]
            while len(held) < COMMIT and not self._waiting.empty():
                if (one := self._waiting.get()) is None:
                    self._waiting.put(None)
                    break
                held.append(one)
            for _, _, done in held:  # whoever waits may leave until here; the row is written all the same
                done.set_running_or_notify_cancel()
            self._commit(held)
            if self.retention_days is not None and time.monotonic() - swept > SWEEP_S:
                self._sweep(time.time() - self.retention_days * DAY_S)
                swept = time.monotonic()

    def _commit(self, held: Sequence[tuple[Table, Mapping[str, Any], Future[None]]]) -> None:
        """Write all rows in one transaction; where that fails, each in its own, so that one bad row costs no other."""
        try:
            self._insert([(table, row) for table, row, _ in held])
        except BROKEN as error:
            if len(held) > 1:
                for one in held:
                    self._commit([one])
                return
            self.failed += 1
            if not held[0][2].cancelled():
                held[0][2].set_exception(error)
            return
        for _, _, done in held:
            if not done.cancelled():
                done.set_result(None)

    def _insert(self, rows: Iterable[tuple[Table, Mapping[str, Any]]]) -> None:
        with self.database.begin() as connection:
            for table, row in rows:
                connection.execute(table.insert(), dict(row))

    def _sweep(self, before: float) -> None:
        try:
            sweep(self.database, before)
        except SQLAlchemyError:
            self.failed += 1


def _clean(text: str) -> str:
    """Return a text without what databases do not take: lone surrogates, NUL."""
    return text.encode(errors="replace").decode().replace("\x00", "")


def sweep(database: sqlalchemy.Engine, before: float) -> int:
    """Delete what is older than a time, events aside; returns how many rows went."""
    gone = 0
    with database.begin() as connection:
        for table in (ANSWERS, PAIRS, PICTURES, AUDITS, ENERGY):
            gone += connection.execute(table.delete().where(table.c.at < before)).rowcount
    return gone
