"""What the store holds, per day (UTC) and task: counts by SQL, percentiles of what SQL hands over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
import sqlalchemy
from numpy.typing import NDArray
from scipy.stats import binomtest
from sqlalchemy import ColumnElement, Connection, Integer, Select, case, cast, func, select

from slimlmm.monitoring.records import Energy, Quantiles, Row, Share
from slimlmm.serving.store import ANSWERS, AUDITS, DAY_S, ENERGY, PAIRS

Values = NDArray[np.float64]
#: the tasks beyond the most frequent, and requests whose caller named none
OTHERS, UNNAMED = "(others)", "(unnamed)"
#: rows that are fetched at once
FETCHED = 20_000


@dataclass(frozen=True, slots=True)
class Window:
    """Times t with begin <= t < end, seconds since 1970, on whole days."""

    begin: float
    end: float

    def holds(self, column: ColumnElement[float]) -> ColumnElement[bool]:
        """Return the condition that a time lies inside."""
        return (column >= self.begin) & (column < self.end)

    @property
    def first(self) -> date:
        """The first day."""
        return day_of(int(self.begin // DAY_S))

    @property
    def last(self) -> date:
        """The last day."""
        return day_of(int(self.end // DAY_S) - 1)


def window(first: date, last: date) -> Window:
    """Return the times of days, both included."""
    return Window(number_of(first) * DAY_S, (number_of(last) + 1) * DAY_S)


def day_of(number: int) -> date:
    """Return the day (UTC) that begins `number` days after 1970-01-01."""
    return date(1970, 1, 1) + timedelta(days=number)


def number_of(day: date) -> int:
    """Return how many days after 1970-01-01 a day is."""
    return (day - date(1970, 1, 1)).days


def date_at(at: float) -> date:
    """Return the day (UTC) of a time."""
    return datetime.fromtimestamp(at, UTC).date()


def bounds(connection: Connection, within: Window | None = None) -> tuple[float, float] | None:
    """Return the times of the first and the last answer, of all or of a window; None where there is none."""
    asked = select(func.min(ANSWERS.c.at), func.max(ANSWERS.c.at))
    first, last = connection.execute(asked if within is None else asked.where(within.holds(ANSWERS.c.at))).one()
    return None if first is None else (float(first), float(last))


def frequent(connection: Connection, within: Window, most: int) -> list[str]:
    """Return the tasks with most answers, the most frequent first."""
    counted = (
        select(ANSWERS.c.task)
        .where(within.holds(ANSWERS.c.at))
        .group_by(ANSWERS.c.task)
        .order_by(func.count().desc(), ANSWERS.c.task)
        .limit(most)
    )
    return list(connection.scalars(counted))


def task_of(column: ColumnElement[str], kept: Sequence[str]) -> ColumnElement[str]:
    """Return the task where it is among those kept, `UNNAMED` where it is empty, `OTHERS` elsewhere."""
    return case((column == "", UNNAMED), (column.in_(kept), column), else_=OTHERS)


def share(count: int, n: int, confidence: float) -> Share | None:
    """Return count / n with its Wilson score interval, None where n is 0."""
    if n == 0:
        return None
    told = binomtest(count, n).proportion_ci(confidence, "wilson")
    return Share(n=n, count=count, share=count / n, low=float(told.low), high=float(told.high))


def chunks(connection: Connection, asked: Select[Any], numbers: int) -> Iterator[list[Any]]:
    """Yield the columns of what was asked in parts: the first `numbers` as float arrays (null as nan), the others as lists."""
    found = connection.execute(asked, execution_options={"yield_per": FETCHED})
    for rows in found.partitions(FETCHED):
        columns: list[Any] = list(zip(*rows, strict=True))
        yield [np.array(one, np.float64) for one in columns[:numbers]] + [list(one) for one in columns[numbers:]]


@dataclass(slots=True)
class Tally:
    """Sums of a day and task; those of several add up."""

    routes: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    escalated: int = 0
    answered: int = 0
    confidence: float = 0.0
    sure: int = 0
    #: purpose -> (agreeing, pairs)
    pairs: dict[str, tuple[int, int]] = field(default_factory=dict)
    #: correct, audited
    audits: tuple[int, int] = (0, 0)
    seconds: list[Values] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Take another one in."""
        self.routes += other.routes
        self.statuses += other.statuses
        self.escalated += other.escalated
        self.answered += other.answered
        self.confidence += other.confidence
        self.sure += other.sure
        for purpose, (count, n) in other.pairs.items():
            before = self.pairs.get(purpose, (0, 0))
            self.pairs[purpose] = (before[0] + count, before[1] + n)
        self.audits = (self.audits[0] + other.audits[0], self.audits[1] + other.audits[1])
        self.seconds += other.seconds

    def row(self, day: date | None, task: str, confidence: float) -> Row:
        """Return it as a record."""
        requests = self.statuses.total()
        return Row(
            day=day,
            task=task,
            requests=requests,
            routes=dict(sorted(self.routes.items())),
            statuses=dict(sorted(self.statuses.items())),
            errors=share(self.statuses["5xx"], requests, confidence),
            escalated=share(self.escalated, self.answered, confidence),
            confidence=self.confidence / self.sure if self.sure else None,
            seconds=quantiles(np.concatenate(self.seconds)) if self.seconds else None,
            agreement=share(*self.pairs.get("shadow", (0, 0)), confidence),
            escalation_agreement=share(*self.pairs.get("escalation", (0, 0)), confidence),
            accuracy=share(*self.audits, confidence),
        )


Tallies = dict[tuple[date, str], Tally]


def quantiles(seconds: Values) -> Quantiles | None:
    """Return the percentiles of seconds, None where there are none."""
    if seconds.size == 0:
        return None
    p50, p95, p99 = (float(one) for one in np.percentile(seconds, (50, 95, 99)))
    return Quantiles(n=seconds.size, p50=p50, p95=p95, p99=p99)


def tallies(connection: Connection, within: Window, kept: Sequence[str], arm: str) -> Tallies:
    """Return the sums of every day and task inside a window; pairs and confidence are those of one arm.

    An audited answer counts on its own day, and as correct where more than half of its auditors say so; answers on which
    they are divided evenly are left out.
    """
    found: Tallies = {}

    def at(day: Any, task: str) -> Tally:
        return found.setdefault((day_of(int(day)), task), Tally())

    for day, task, route, kind, n in connection.execute(_answers(connection, within, kept)):
        one, status = at(day, task), f"{int(kind)}xx"
        one.statuses[status] += n
        if kind < 4:
            one.routes[route] += n
            one.answered += n
            one.escalated += n if route == "teacher" else 0
    for day, task, total, n in connection.execute(_confidence(connection, within, kept, arm)):
        at(day, task).confidence, at(day, task).sure = float(total), n
    for day, task, purpose, agreeing, n in connection.execute(_pairs(connection, within, kept, arm)):
        at(day, task).pairs[purpose] = (int(agreeing), n)
    for day, task, correct, n in connection.execute(_audits(connection, within, kept)):
        at(day, task).audits = (int(correct), n)
    for key, seconds in _seconds(connection, within, kept).items():
        found.setdefault(key, Tally()).seconds.append(seconds)
    return found


def summed(found: Tallies, *, by_day: bool, by_task: bool, confidence: float) -> tuple[Row, ...]:
    """Return the sums by day, by task, by both or over all, in this order."""
    groups: dict[tuple[date | None, str], Tally] = {}
    for (day, task), tally in found.items():
        groups.setdefault((day if by_day else None, task if by_task else ""), Tally()).add(tally)
    order = sorted(groups, key=lambda key: (key[0] or date.min, key[1] == OTHERS, key[1]))
    return tuple(groups[key].row(*key, confidence) for key in order)


def energy(connection: Connection, within: Window, *, by_day: bool) -> tuple[Energy, ...]:
    """Return the joules by counter, and by day where asked; nothing where no counter was read."""
    day = day_number(connection, ENERGY.c.at) if by_day else sqlalchemy.null()
    asked = (
        select(day, ENERGY.c.source, func.sum(ENERGY.c.joules), func.sum(ENERGY.c.requests))
        .where(within.holds(ENERGY.c.at))
        .group_by(*([day] if by_day else []), ENERGY.c.source)
    )
    rows = [
        Energy(
            day=None if number is None else day_of(int(number)),
            source=source,
            joules=joules,
            requests=requests,
            joules_per_request=joules / requests if requests else None,
        )
        for number, source, joules, requests in connection.execute(asked)
    ]
    return tuple(sorted(rows, key=lambda one: (one.day or date.min, one.source)))


def day_number(connection: Connection, column: ColumnElement[float]) -> ColumnElement[int]:
    """Return floor(seconds / 86400), which SQLite may have no function for."""
    days = column / DAY_S
    return cast(days if connection.dialect.name == "sqlite" else func.floor(days), Integer)


def _answers(connection: Connection, within: Window, kept: Sequence[str]) -> Select[Any]:
    kind = case(*((ANSWERS.c.status < 100 * (number + 1), number) for number in range(1, 5)), else_=5)
    groups = (day_number(connection, ANSWERS.c.at), task_of(ANSWERS.c.task, kept), ANSWERS.c.route, kind)
    return _grouped(groups, func.count(), where=within.holds(ANSWERS.c.at))


def _confidence(connection: Connection, within: Window, kept: Sequence[str], arm: str) -> Select[Any]:
    told = ANSWERS.c.confidence
    groups = (day_number(connection, ANSWERS.c.at), task_of(ANSWERS.c.task, kept))
    where = within.holds(ANSWERS.c.at) & (ANSWERS.c.arm == arm) & told.is_not(None)
    return _grouped(groups, func.sum(told), func.count(), where=where)


def _pairs(connection: Connection, within: Window, kept: Sequence[str], arm: str) -> Select[Any]:
    groups = (day_number(connection, PAIRS.c.at), task_of(PAIRS.c.task, kept), PAIRS.c.purpose)
    agreeing = func.sum(case((PAIRS.c.agree, 1), else_=0))
    return _grouped(groups, agreeing, func.count(), where=within.holds(PAIRS.c.at) & (PAIRS.c.arm == arm))


def _audits(connection: Connection, within: Window, kept: Sequence[str]) -> Select[Any]:
    vote = case((AUDITS.c.correct, 1), else_=-1)
    votes = select(AUDITS.c.answer_id, func.sum(vote).label("votes")).group_by(AUDITS.c.answer_id).subquery()
    groups = (day_number(connection, ANSWERS.c.at), task_of(ANSWERS.c.task, kept))
    correct = func.sum(case((votes.c.votes > 0, 1), else_=0))
    where = within.holds(ANSWERS.c.at) & (votes.c.votes != 0) & (votes.c.answer_id == ANSWERS.c.id)
    return _grouped(groups, correct, func.count(), where=where)


def _grouped(
    groups: Sequence[ColumnElement[Any]], *sums: ColumnElement[Any], where: ColumnElement[bool]
) -> Select[Any]:
    # grouped by the name of a column: PostgreSQL does not take two equal expressions with parameters for one
    named = [one.label(f"group_{number}") for number, one in enumerate(groups)]
    inner = select(*named, *(one.label(f"sum_{number}") for number, one in enumerate(sums))).where(where)
    return inner.group_by(*(one.name for one in named))


def _seconds(connection: Connection, within: Window, kept: Sequence[str]) -> dict[tuple[date, str], Values]:
    asked = select(
        day_number(connection, ANSWERS.c.at), ANSWERS.c.seconds, task_of(ANSWERS.c.task, kept).label("task")
    ).where(within.holds(ANSWERS.c.at) & (ANSWERS.c.status < 400))
    parts: dict[tuple[date, str], list[Values]] = {}
    for numbers, seconds, tasks in chunks(connection, asked, 2):
        names = np.array(tasks)
        for key in _keys(numbers, tasks):
            inside = (numbers == key[0]) & (names == key[1])
            parts.setdefault((day_of(int(key[0])), key[1]), []).append(seconds[inside])
    return {key: np.concatenate(found) for key, found in parts.items()}


def _keys(numbers: Values, tasks: Iterable[str]) -> list[tuple[float, str]]:
    return sorted(set(zip(numbers.tolist(), tasks, strict=True)))
