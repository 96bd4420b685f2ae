"""What was usual: the first days of a store, kept in it as an event once alarms are written, for its rows may be deleted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta

import numpy as np
from pydantic import ValidationError
from sqlalchemy import Connection, case, func, select

from slimlmm.monitoring.reading import Values, Window, chunks, task_of, window
from slimlmm.monitoring.records import Told
from slimlmm.monitoring.settings import Monitoring
from slimlmm.serving.store import ANSWERS, DAY_S, EVENTS, PAIRS, PICTURES

#: order statistics that a sample is kept as: distances between samples change by at most 1 / (KEPT - 1)
KEPT = 501
PICTURE_FEATURES = ("brightness", "contrast", "entropy", "saturation", "pixels", "bytes")
QUESTION_FEATURES = ("question characters", "question words")
FEATURES = (*QUESTION_FEATURES, *(f"picture {name}" for name in PICTURE_FEATURES))


class Sample(Told):
    """A sorted sample of n values, as at most `KEPT` of its order statistics, evenly spaced."""

    n: int
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Values) -> Sample:
        """Return the sample of values."""
        ordered = np.sort(values)
        if len(ordered) > KEPT:
            ordered = ordered[np.linspace(0, len(ordered) - 1, KEPT).round().astype(int)]
        return cls(n=len(values), values=tuple(ordered.tolist()))

    def ranks(self, values: Values) -> Values:
        """Return the mid-rank of each value among the sample, 0 to 1: share below plus half the share of equals."""
        own = np.array(self.values)
        below, upto = (np.searchsorted(own, values, side) for side in ("left", "right"))
        return np.asarray((below + upto) / (2 * len(own)), np.float64)


class Count(Told):
    """A count out of n."""

    count: int
    n: int


class Reference(Told):
    """What is usual. Agreement is of shadow pairs, by task ("" for all)."""

    arm: str
    begin: float
    end: float
    tasks: tuple[str, ...]
    requests: dict[str, int]
    disagreeing: dict[str, Count]
    errors: Count
    seconds: Sample
    confidences: Sample
    samples: dict[str, Sample]

    @property
    def days(self) -> float:
        """Days from begin to end."""
        return (self.end - self.begin) / DAY_S


def window_of(settings: Monitoring, oldest: Window) -> Window:
    """Return the window of the reference of a store whose answers lie in `oldest`."""
    first = settings.reference_since or oldest.first
    return window(first, first + timedelta(days=settings.reference_days - 1))


def kept(connection: Connection, settings: Monitoring) -> Reference | None:
    """Return the reference that an earlier run kept in the store for these settings, None where none did."""
    asked = select(EVENTS.c.detail).where(EVENTS.c.kind == "reference").order_by(EVENTS.c.id.desc())
    for detail in connection.scalars(asked):
        try:
            found = Reference.model_validate(detail)
        except ValidationError:  # of another version: made anew from the rows
            continue
        same = settings.reference_since is None or found.begin == window(*[settings.reference_since] * 2).begin
        if found.arm == settings.arm and round(found.days) == settings.reference_days and same:
            return found
    return None


def made(connection: Connection, within: Window, tasks: Sequence[str], arm: str) -> Reference:
    """Return the reference of a window."""
    answers = select(ANSWERS.c.seconds, ANSWERS.c.status, ANSWERS.c.confidence)
    own = answers.where(within.holds(ANSWERS.c.at) & (ANSWERS.c.arm == arm))
    parts = list(chunks(connection, own, 3)) or [[np.empty(0)] * 3]
    seconds, status, confidence = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Reference(
        arm=arm,
        begin=within.begin,
        end=within.end,
        tasks=tuple(tasks),
        requests=requests(connection, within, tasks),
        disagreeing=_disagreeing(connection, within, tasks, arm),
        errors=Count(count=int((status >= 500).sum()), n=len(status)),
        seconds=Sample.of(seconds[status < 400]),
        confidences=Sample.of(confidence[~np.isnan(confidence)]),
        samples={name: Sample.of(values) for name, values in gathered(connection, within).items() if len(values)},
    )


def gathered(connection: Connection, within: Window) -> dict[str, Values]:
    """Return all values of each feature inside a window."""
    held: dict[str, list[Values]] = {name: [] for name in FEATURES}
    for _, values in features(connection, within):
        for name, found in values.items():
            held[name].append(found)
    return {name: np.concatenate(found) if found else np.empty(0) for name, found in held.items()}


def features(connection: Connection, within: Window) -> Iterator[tuple[Values, Mapping[str, Values]]]:
    """Yield times and values by feature inside a window in the order of time, questions first, then pictures."""
    asked = select(ANSWERS.c.at, ANSWERS.c.question).where(within.holds(ANSWERS.c.at))
    for at, texts in chunks(connection, asked.order_by(ANSWERS.c.at, ANSWERS.c.id), 1):
        lengths = np.array([len(text) for text in texts], np.float64)
        words = np.array([len(text.split()) for text in texts], np.float64)
        yield at, dict(zip(QUESTION_FEATURES, (lengths, words), strict=True))
    looks = PICTURES.c
    columns = (looks.brightness, looks.contrast, looks.entropy, looks.saturation, looks.width, looks.height)
    seen = select(looks.at, *columns, looks.bytes).where(within.holds(looks.at))
    for at, *found, width, height, size in chunks(connection, seen.order_by(looks.at, looks.answer_id), 8):
        names = (f"picture {name}" for name in PICTURE_FEATURES)
        yield at, dict(zip(names, (*found, width * height, size), strict=True))


def requests(connection: Connection, within: Window, tasks: Sequence[str]) -> dict[str, int]:
    """Return the requests inside a window by task; those beyond `tasks` are one."""
    task = task_of(ANSWERS.c.task, tasks).label("task_group")
    asked = select(task, func.count()).where(within.holds(ANSWERS.c.at)).group_by("task_group")
    return {name: int(n) for name, n in connection.execute(asked)}


def _disagreeing(connection: Connection, within: Window, tasks: Sequence[str], arm: str) -> dict[str, Count]:
    task = task_of(PAIRS.c.task, tasks).label("task_group")
    asked = (
        select(task, func.sum(case((PAIRS.c.agree, 0), else_=1)), func.count())
        .where(within.holds(PAIRS.c.at) & (PAIRS.c.purpose == "shadow") & (PAIRS.c.arm == arm))
        .group_by("task_group")
    )
    found = {name: Count(count=int(count), n=n) for name, count, n in connection.execute(asked)}
    whole = Count(count=sum(one.count for one in found.values()), n=sum(one.n for one in found.values()))
    return {"": whole, **found}
