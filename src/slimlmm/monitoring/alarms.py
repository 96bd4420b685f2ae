"""What is watched, and against what: agreement, errors, latency, confidence, and the ranks of features among the reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from sqlalchemy import Connection, case, select

from slimlmm.monitoring.detector import Detector
from slimlmm.monitoring.reading import Values, Window, chunks, share, task_of
from slimlmm.monitoring.records import Ring, Watch
from slimlmm.monitoring.references import Count, Reference, Sample, features
from slimlmm.monitoring.settings import Monitoring
from slimlmm.serving.store import ANSWERS, EVENTS, PAIRS

Source = Literal["pairs", "answers", "features"]
Batch = Mapping[str, Any]
#: the kind of the watches of ranks
FEATURES = "features"
#: two-sided coverage, so 95 % one-sided: what the reference's own chance may hide
LIMIT = 0.9


@dataclass(frozen=True, slots=True)
class Watched:
    """A detector and what it sees of a batch of its source: times and observations."""

    source: Source
    detector: Detector
    observed: Callable[[Batch], tuple[Values, Values]]


def watches(reference: Reference, settings: Monitoring) -> list[Watched]:
    """Return the watches that the reference has enough observations for.

    False alarms are shared out equally among the kinds of watches (agreement of all, of tasks, errors, latency, confidence,
    features), and among the watches of a kind.
    """
    found = [*_agreement(reference, settings), *_answers(reference, settings), *_ranks(reference, settings)]
    kinds = Counter(one.detector.kind for one in found)
    for one in found:
        detector = one.detector
        detector.begin, detector.rest = reference.end, settings.rest_hours * 3600
        days = settings.false_alarm_days * len(kinds) * kinds[detector.kind]
        detector.every = settings.every or max(2.0, days * detector.rate)
    return found


def followed(
    connection: Connection, reference: Reference, settings: Monitoring, until: float
) -> tuple[tuple[Watch, ...], list[Ring]]:
    """Return every watch with its alarms before a time, and those alarms that no earlier run has written.

    A watch begins anew behind an alarm, so it goes on behind the last one that was written, whatever was deleted since.
    """
    earlier = written(connection, settings.arm, reference.end, until)
    found = watches(reference, settings)
    for one in found:
        detector = one.detector
        detector.begin = max([detector.begin, *(ring.at + detector.rest for ring in earlier.get(detector.name, ()))])
    within = Window(min((one.detector.begin for one in found), default=until), until)
    sources = {
        "pairs": _pair_batches(connection, within, reference, settings.arm),
        "answers": _answer_batches(connection, within, settings.arm),
        "features": ({"at": at, **values} for at, values in features(connection, within)),
    }
    for source, batches in sources.items():
        own = [one for one in found if one.source == source]
        for batch in batches if own else ():
            for one in own:
                one.detector.add(*one.observed(batch))
    records = tuple(one.detector.told(earlier.get(one.detector.name, ())) for one in found)
    return records, [ring for one in found for ring in one.detector.rings]


def written(connection: Connection, arm: str, begin: float = 0.0, end: float | None = None) -> dict[str, list[Ring]]:
    """Return the alarms of an arm that are in the store, between two times, by watch, in the order of time."""
    asked = select(EVENTS.c.detail).where((EVENTS.c.kind == "alarm") & (EVENTS.c.at > begin))
    asked = asked if end is None else asked.where(EVENTS.c.at < end)
    found: dict[str, list[Ring]] = {}
    for detail in connection.scalars(asked.order_by(EVENTS.c.at, EVENTS.c.id)):
        if detail.get("arm") == arm and set(Ring.model_fields) <= set(detail):
            ring = Ring.model_validate({name: detail[name] for name in Ring.model_fields})
            found.setdefault(ring.watch, []).append(ring)
    return found


def write(connection: Connection, rings: Sequence[Ring], arm: str) -> int:
    """Write alarms as events, but for those not later than the last written one of their watch; returns how many."""
    last = {watch: earlier[-1].at for watch, earlier in written(connection, arm).items()}
    new = 0
    for ring in sorted(rings, key=lambda one: one.at):
        if ring.at > last.get(ring.watch, 0.0):
            detail = {"arm": arm, **ring.model_dump()}
            connection.execute(EVENTS.insert(), {"at": ring.at, "kind": "alarm", "detail": detail})
            last[ring.watch] = ring.at
            new += 1
    return new


def allowed(usual: Count, margin: float) -> float:
    """Return the share that is no alarm yet: the usual one and a margin, at least the upper limit of the usual one."""
    limit = share(usual.count, usual.n, LIMIT)
    assert limit is not None
    return max(limit.share + margin, limit.high)


def _agreement(reference: Reference, settings: Monitoring) -> Iterator[Watched]:
    """Yield the watches of shadow pairs: x = [disagree] - allowed, of all and, where there are several tasks, of each."""
    several = len(reference.disagreeing) > 2
    for task, count in reference.disagreeing.items():
        if count.n < settings.least_reference or (task and not several):
            continue
        limit = allowed(count, settings.margin)

        def observed(batch: Batch, task: str = task, limit: float = limit) -> tuple[Values, Values]:
            own = batch["task"] == task if task else slice(None)
            return batch["at"][own], batch["disagree"][own] - limit

        if task:
            name, what, kind = f"agreement of {task}", f"disagreement in {task}", "agreement of tasks"
        else:
            name, what, kind = "agreement", "disagreement", "agreement"
        yield from _shares("pairs", kind, (name, what), count, limit, reference, observed)


def _answers(reference: Reference, settings: Monitoring) -> Iterator[Watched]:
    """Yield errors, x = [5xx] - allowed; latency, x = [seconds > bound] - share; confidence, x = [below bound] - share."""
    errors, least = reference.errors, settings.least_reference
    if errors.n >= least:
        limit = allowed(errors, settings.error_margin)
        told = ("errors", "HTTP 5xx")
        yield from _shares("answers", "errors", told, errors, limit, reference, _above("status", 499.5, limit))
    seconds = reference.seconds
    if seconds.n >= least:
        bound = settings.latency_bound_s or settings.latency_slack * float(np.quantile(seconds.values, 0.95))
        limit, usual = settings.latency_share, _beyond(seconds, bound)
        told = ("latency", f"more than {bound:.3g} s")
        yield from _shares("answers", "latency", told, usual, limit, reference, _above("seconds", bound, limit))
    sure = reference.confidences
    if sure.n >= least:
        bound = float(np.quantile(sure.values, settings.low_confidence))
        usual = Count(count=round(settings.low_confidence * sure.n), n=sure.n)
        limit = settings.low_confidence + settings.confidence_margin
        told = ("confidence", f"confidence below {bound:.3g}")
        yield from _shares("answers", "confidence", told, usual, limit, reference, _below("confidence", bound, limit))


def _ranks(reference: Reference, settings: Monitoring) -> Iterator[Watched]:
    """Yield two watches a feature, x = +-(rank among the reference - 1/2) - margin, where it varies at all."""
    margin = settings.rank_margin
    for name, sample in reference.samples.items():
        if sample.n < settings.least_reference or sample.values[0] == sample.values[-1]:
            continue
        for sign, word in ((1.0, "higher"), (-1.0, "lower")):

            def observed(batch: Batch, name: str = name, sign: float = sign) -> tuple[Values, Values]:
                if name not in batch:
                    return np.empty(0), np.empty(0)
                ranks = reference.samples[name].ranks(batch[name])
                return batch["at"], sign * (ranks - 0.5) - margin

            rate, limit = sample.n / reference.days, 0.5 + sign * margin
            named = (f"{name} {word}", FEATURES, f"mean rank of {name}")
            yield Watched("features", Detector(*named, 0.5, limit, -0.5 - margin, rate), observed)


def _shares(
    source: Source,
    kind: str,
    told: tuple[str, str],
    usual: Count,
    limit: float,
    reference: Reference,
    observed: Callable[[Batch], tuple[Values, Values]],
) -> Iterator[Watched]:
    """Yield the watch of a share, named and described by `told`; none where any share is allowed."""
    name, what = told
    if limit < 1:
        detector = Detector(name, kind, what, usual.count / usual.n, limit, -limit, usual.n / reference.days)
        yield Watched(source, detector, observed)


def _above(name: str, bound: float, limit: float) -> Callable[[Batch], tuple[Values, Values]]:
    def observed(batch: Batch) -> tuple[Values, Values]:
        known = ~np.isnan(batch[name]) & ((batch["status"] < 400) | (name == "status"))
        return batch["at"][known], (batch[name][known] > bound) - limit

    return observed


def _below(name: str, bound: float, limit: float) -> Callable[[Batch], tuple[Values, Values]]:
    def observed(batch: Batch) -> tuple[Values, Values]:
        known = ~np.isnan(batch[name])
        return batch["at"][known], (batch[name][known] < bound) - limit

    return observed


def _beyond(sample: Sample, bound: float) -> Count:
    beyond = float((np.array(sample.values) > bound).mean())
    return Count(count=round(beyond * sample.n), n=sample.n)


def _pair_batches(connection: Connection, within: Window, reference: Reference, arm: str) -> Iterator[Batch]:
    task = task_of(PAIRS.c.task, reference.tasks).label("task_group")
    own = within.holds(PAIRS.c.at) & (PAIRS.c.purpose == "shadow") & (PAIRS.c.arm == arm)
    asked = select(PAIRS.c.at, case((PAIRS.c.agree, 0), else_=1), task).where(own)
    for at, disagree, tasks in chunks(connection, asked.order_by(PAIRS.c.at, PAIRS.c.answer_id), 2):
        yield {"at": at, "disagree": disagree, "task": np.array(tasks)}


def _answer_batches(connection: Connection, within: Window, arm: str) -> Iterator[Batch]:
    columns = (ANSWERS.c.at, ANSWERS.c.status, ANSWERS.c.seconds, ANSWERS.c.confidence)
    asked = select(*columns).where(within.holds(ANSWERS.c.at) & (ANSWERS.c.arm == arm))
    for parts in chunks(connection, asked.order_by(ANSWERS.c.at, ANSWERS.c.id), 4):
        yield dict(zip(("at", "status", "seconds", "confidence"), parts, strict=True))
