"""What `slimlmm monitor` does: read the store into one record, write what was found where that is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import sqlalchemy
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from slimlmm.errors import UserError
from slimlmm.monitoring import alarms, drift, reading, references
from slimlmm.monitoring.reading import Window, date_at, window
from slimlmm.monitoring.records import Found, Ring, Row
from slimlmm.monitoring.references import Reference
from slimlmm.monitoring.settings import Monitoring
from slimlmm.serving.store import EVENTS, opened, reason_of


@dataclass(frozen=True, slots=True)
class Shown:
    """Which days are shown, both included; `days` are the last ones. Alarms look at all days up to the last shown."""

    since: date | None = None
    until: date | None = None
    days: int | None = None

    def window(self, whole: Window) -> Window:
        """Return the days of a store whose answers lie in `whole`.

        Raises:
            UserError: it has no answer on those days, or two options say where they begin.
        """
        if self.since and self.days:
            raise UserError("--since and --days both say where the days begin; leave one out.")
        last = min(self.until or whole.last, whole.last)
        first = self.since or whole.first
        if self.days:
            first = last - timedelta(days=self.days - 1)
        first = max(first, whole.first)
        if first > last:
            told = f"{self.since or '...'} to {self.until or '...'}"
            raise UserError(
                f"the store has no answer from {told}; it has some from {whole.first} to {whole.last} (UTC)."
            )
        return window(first, last)


def database_of(where: str) -> sqlalchemy.Engine:
    """Return the database of a store that is there.

    Raises:
        UserError: there is no such file, or it cannot be opened.
    """
    path = where.removeprefix("sqlite:///")
    if "://" not in path and not Path(path).is_file():
        raise UserError(f"{where}: no such store. Give the file or URL that slimlmm serve writes with --store.")
    return opened(where)


@contextmanager
def asked(database: sqlalchemy.Engine) -> Iterator[Connection]:
    """Give a connection whose changes are kept if the block ends well; what the database refuses is a UserError."""
    try:
        with database.begin() as connection:
            yield connection
    except SQLAlchemyError as error:
        raise UserError(f"{name_of(database)}: {reason_of(error)}") from error


def name_of(database: sqlalchemy.Engine) -> str:
    """Return the URL without its password, or the file."""
    url = database.url
    return str(url.database) if url.get_backend_name() == "sqlite" else url.render_as_string(hide_password=True)


def monitor(database: sqlalchemy.Engine, settings: Monitoring, shown: Shown, *, write: bool = False) -> Found:
    """Read all of it; `write` keeps the reference and each new alarm as events.

    Raises:
        UserError: the store has no answers, none on the days asked for, or the database fails.
    """
    with asked(database) as connection:
        times = reading.bounds(connection)
        if times is None:
            raise UserError(f"{name_of(database)}: holds no answers yet; there is nothing to monitor.")
        whole = window(date_at(times[0]), date_at(times[1]))
        within = shown.window(whole)
        seen = reading.bounds(connection, within)
        if seen is None:
            raise UserError(f"{name_of(database)}: holds no answer from {within.first} to {within.last} (UTC).")
        newest = seen[1]
        reference, kept = _reference(connection, settings, whole)
        watches, rings = alarms.followed(connection, reference, settings, within.end)
        found = _found(connection, settings, within, reference)
    if write:  # apart from the reading, during which SQLite would let nobody else write
        with asked(database) as connection:
            _write(connection, reference, rings, kept=kept, over=times[1] >= reference.end)
    visible = [
        watch.model_copy(update={"rings": tuple(ring for ring in watch.rings if ring.at >= within.begin)})
        for watch in watches
    ]
    told = found.model_copy(update={"store": name_of(database), "newest": newest, "watches": tuple(visible)})
    return told.model_copy(update={"notes": tuple(_notes(told, reference, settings))})


def _reference(connection: Connection, settings: Monitoring, whole: Window) -> tuple[Reference, bool]:
    """Return the reference, and whether it was kept in the store."""
    found = references.kept(connection, settings)
    if found is not None:
        return found, True
    within = references.window_of(settings, whole)
    tasks = reading.frequent(connection, within, settings.most_tasks)
    return references.made(connection, within, tasks, settings.arm), False


def _write(connection: Connection, reference: Reference, rings: list[Ring], *, kept: bool, over: bool) -> None:
    if over and not kept:
        detail = reference.model_dump(mode="json")
        connection.execute(EVENTS.insert(), {"at": reference.end, "kind": "reference", "detail": detail})
    alarms.write(connection, rings, reference.arm)


def _found(connection: Connection, settings: Monitoring, within: Window, reference: Reference) -> Found:
    confidence = settings.confidence
    tasks = reading.frequent(connection, within, settings.most_tasks)
    sums = reading.tallies(connection, within, tasks, settings.arm)

    def rows(*, by_day: bool, by_task: bool) -> tuple[Row, ...]:
        return reading.summed(sums, by_day=by_day, by_task=by_task, confidence=confidence)

    usual = Window(reference.begin, reference.end)
    latest = window(within.last - timedelta(days=settings.recent_days - 1), within.last)
    apart = latest.begin >= reference.end
    drifts = drift.compared(reference, *drift.recent(connection, latest, reference.tasks), settings) if apart else []
    return Found(
        store="",
        since=within.first,
        until=within.last,
        newest=0.0,
        total=rows(by_day=False, by_task=False)[0],
        tasks=rows(by_day=False, by_task=True),
        days=rows(by_day=True, by_task=False),
        cells=rows(by_day=True, by_task=True),
        energy=reading.energy(connection, within, by_day=True),
        energy_total=reading.energy(connection, within, by_day=False),
        reference_since=usual.first,
        reference_until=usual.last,
        recent_since=latest.first,
        drift=tuple(drifts),
        drift_days=tuple(drift.by_day(connection, within, reference)),
        watches=(),
        settings=settings.model_dump(mode="json"),
        notes=(),
    )


def _notes(found: Found, reference: Reference, settings: Monitoring) -> Iterator[str]:
    """Yield what the numbers cannot say: what is missing, and why."""
    if found.total.agreement is None:
        yield (
            f"no shadow pair of the {settings.arm} on these days, so nothing is known of its agreement: let the gateway ask the "
            "teacher about a share of its answers."
        )
    if found.total.agreement and found.total.escalated and found.total.escalated.count:
        yield (
            "shadow pairs are drawn among the answers that were not escalated, so agreement is that of what users got from the "
            f"{settings.arm}; escalation pairs were chosen for their low confidence and stand apart."
        )
    if found.newest < reference.end:
        yield f"the reference lasts until {found.reference_until}; alarms and drift begin after it."
    elif found.recent_since <= found.reference_until:
        yield (
            f"the last {settings.recent_days} days lie partly in the reference (until {found.reference_until}), so drift is not "
            "told yet."
        )
    pairs = reference.disagreeing[""].n
    if found.newest >= reference.end and pairs < settings.least_reference:
        yield (
            f"the reference ({found.reference_since} to {found.reference_until}) holds {pairs} shadow pairs of the "
            f"{settings.least_reference} that an alarm for agreement needs."
        )
    if not any(name.startswith("picture") for name in reference.samples):
        yield "the reference holds no picture that was looked at, so drift of pictures is not told."
