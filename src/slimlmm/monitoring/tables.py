"""The tables of a monitor's record, for terminal and page alike; what is not known shows as "-"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from rich import box
from rich.console import Group as Lines
from rich.table import Table
from rich.text import Text

from slimlmm.monitoring.alarms import FEATURES
from slimlmm.monitoring.records import Energy, Found, Quantiles, Row, Share, Watch

NOTHING = "-"
#: days and alarms that the terminal shows; the page shows all
DAYS, ALARMS = 14, 10
#: evidence from which the terminal shows a watch of a feature
NEAR = 0.6


@dataclass(frozen=True, slots=True)
class Grid:
    """Cells with a title; the first column is aligned to the left, the others to the right. `bad` are numbers of rows to mark."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    bad: frozenset[int] = frozenset()

    def rich(self, columns: Sequence[str]) -> Table:
        """Return these columns for the terminal (80 characters hold few); nothing in them is read as markup."""
        shown = Table(title=Text(self.title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        picked = [self.head.index(name) for name in columns]
        for index in picked:
            shown.add_column(self.head[index], justify="right" if index else "left")
        for number, row in enumerate(self.rows):
            shown.add_row(*(Text(row[index]) for index in picked), style="red" if number in self.bad else None)
        return shown


def terminal(found: Found) -> Lines:
    """Return the terminal view."""
    columns, audits = ("requests", "agreement, %", "pairs"), ("audited, %", "audits")
    shown: list[Table | Text] = [
        tasks(found).rich(("task", *columns, *(audits if found.total.accuracy else ("5xx, %", "p95, ms")))),
        days(found, last=DAYS).rich(("day", *columns, "escalated, %", "5xx, %", "p95, ms")),
    ]
    if found.drift:
        shown.append(drifts(found).rich(("feature", "median then", "now", "distance", "q", "verdict")))
    if near := [one for one in found.watches if one.kind != FEATURES or one.rings or one.level >= NEAR]:
        head = ("watch", "usual", "allowed", "evidence", "alarms", "last alarm")
        shown.append(watches(near, len(found.watches) - len(near)).rich(head))
    if found.rings:
        shown.append(rings(found, last=ALARMS).rich(("watch", "rang", "began, estimated")))
    for one in found.energy_total:
        shown.append(Text(f"energy by {one.source}: {number(one.joules_per_request)} J a request of {one.requests:,}"))
    what = f"{found.store}: {found.since} to {found.until} (UTC), {found.total.requests:,} requests"
    return Lines(Text(what), *shown, Text(verdict(found)), *(Text(f"note: {note}") for note in found.notes))


def verdict(found: Found) -> str:
    """Return what alarms and drift come to, as a sentence."""
    drifted = [one.feature for one in found.drift if one.drifted]
    parts = [
        f"{len(found.rings)} alarm(s) by {len({ring.watch for ring in found.rings})} of {len(found.watches)} watches"
        if found.watches
        else "no watch has a reference",
        (f"drift of {', '.join(drifted)}" if drifted else f"no drift of {len(found.drift)} features")
        if found.drift
        else "drift not told",
    ]
    return "; ".join(parts) + "."


HEAD = (
    *("requests", "agreement, %", "pairs", "audited, %", "audits", "escalated, %", "5xx, %"),
    *("p50, ms", "p95, ms", "p99, ms", "confidence"),
)


def tasks(found: Found) -> Grid:
    """Return a row for each task, then one for all."""
    rows = [(row.task, *_cells(row)) for row in found.tasks]
    return Grid("tasks", ("task", *HEAD), (*rows, ("all", *_cells(found.total))))


def days(found: Found, last: int | None = None) -> Grid:
    """Return a row for each day, or for the last ones."""
    shown = found.days[-last:] if last else found.days
    title = "days" if len(shown) == len(found.days) else f"last {len(shown)} days"
    return Grid(title, ("day", *HEAD), tuple((str(row.day), *_cells(row)) for row in shown))


def _cells(row: Row) -> tuple[str, ...]:
    return (
        f"{row.requests:,}",
        interval(row.agreement),
        f"{row.agreement.n:,}" if row.agreement else NOTHING,
        interval(row.accuracy),
        f"{row.accuracy.n:,}" if row.accuracy else NOTHING,
        percent(row.escalated),
        percent(row.errors),
        *milliseconds(row.seconds),
        NOTHING if row.confidence is None else f"{row.confidence:.3g}",
    )


def drifts(found: Found) -> Grid:
    """Return a row for each feature, the most changed first."""
    rows = [
        (
            one.feature,
            number(one.reference),
            number(one.recent),
            f"{one.reference_n:,} / {one.recent_n:,}",
            f"{one.effect:.3f}",
            "< 0.001" if one.q < 0.001 else f"{one.q:.3f}",
            "drift" if one.drifted else NOTHING,
        )
        for one in found.drift
    ]
    title = f"drift: {found.recent_since} to {found.until} against {found.reference_since} to {found.reference_until}"
    head = ("feature", "median then", "now", "n then / now", "distance", "q", "verdict")
    return Grid(title, head, tuple(rows), frozenset(n for n, one in enumerate(found.drift) if one.drifted))


def watches(shown: Sequence[Watch], others: int = 0) -> Grid:
    """Return a row for each watch; `others` are not shown."""

    def value(one: Watch, number: float) -> str:
        return f"{number:.2f}" if one.kind == FEATURES else f"{100 * number:.2f} %"

    rows = [
        (
            one.name,
            one.what,
            value(one, one.usual),
            value(one, one.allowed),
            f"{one.n:,}",
            f"{one.every:,.0f}",
            f"{one.level:.2f}",
            str(len(one.rings)),
            moment(one.rings[-1].at) if one.rings else NOTHING,
        )
        for one in shown
    ]
    head = ("watch", "of", "usual", "allowed", "n", "false once in", "evidence", "alarms", "last alarm")
    title = "watches; evidence 1 rings" + (f"; {others} of features are quiet" if others else "")
    return Grid(title, head, tuple(rows), frozenset(n for n, one in enumerate(shown) if one.rings))


def rings(found: Found, last: int | None = None) -> Grid:
    """Return a row for each alarm, or for the last ones, the latest first."""
    shown = found.rings[-last:] if last else found.rings
    title = "alarms" if len(shown) == len(found.rings) else f"last {len(shown)} of {len(found.rings)} alarms"
    rows = [(ring.watch, moment(ring.at), moment(ring.began), f"{ring.observations:,}") for ring in reversed(shown)]
    return Grid(title, ("watch", "rang", "began, estimated", "observations between"), tuple(rows))


def energy(found: Found) -> Grid:
    """Return a row for each day and counter, then one for each counter."""

    def cells(one: Energy, name: str) -> tuple[str, ...]:
        return (name, one.source, f"{one.joules:,.0f}", f"{one.requests:,}", number(one.joules_per_request))

    rows = [cells(one, str(one.day)) for one in found.energy] + [cells(one, "all") for one in found.energy_total]
    return Grid("energy", ("day", "counter", "J", "requests", "J a request"), tuple(rows))


def cells(found: Found) -> Grid:
    """Return a row for each day and task."""
    rows = [(f"{row.day} {row.task}", *_cells(row)) for row in found.cells]
    return Grid("days and tasks", ("day and task", *HEAD), tuple(rows))


def interval(share: Share | None) -> str:
    """Return a share in per cent with its interval: 95.1 [94.2, 95.9]."""
    return NOTHING if share is None else f"{100 * share.share:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def percent(share: Share | None) -> str:
    """Return a share in per cent."""
    return NOTHING if share is None else f"{100 * share.share:.2f}"


def milliseconds(seconds: Quantiles | None) -> tuple[str, str, str]:
    """Return the three percentiles in milliseconds."""
    if seconds is None:
        return (NOTHING, NOTHING, NOTHING)
    p50, p95, p99 = (f"{1000 * one:,.0f}" for one in (seconds.p50, seconds.p95, seconds.p99))
    return (p50, p95, p99)


def number(value: float | None) -> str:
    """Return a number in four digits."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def moment(at: float) -> str:
    """Return a time (UTC) to the minute."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")
