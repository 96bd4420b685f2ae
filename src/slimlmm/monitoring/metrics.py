"""The record for Prometheus: gauges, served on a port or written as a text file for a collector."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, write_to_textfile
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from slimlmm.monitoring.records import Found, Row, Share

#: label of the sum of all tasks
ALL = "(all)"
PREFIX = "slimlmm_monitor_"


class Gauges(Collector):
    """The gauges of the latest record; none before there is one."""

    def __init__(self, found: Found | None = None) -> None:
        self.found = found
        self.refreshed = 0.0

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield all metrics."""
        if self.found is not None:
            yield from _shares(self.found)
            yield from _others(self.found)
            yield from _watches(self.found)
        yield _gauge("refreshed_timestamp_seconds", "When the store was last read.", self.refreshed)


def registry_of(gauges: Gauges) -> CollectorRegistry:
    """Return a registry with these gauges alone."""
    registry = CollectorRegistry()
    registry.register(gauges)
    return registry


def write(found: Found, at: float, path: Path) -> None:
    """Write the metrics as a text file, whole or not at all."""
    gauges = Gauges(found)
    gauges.refreshed = at
    write_to_textfile(str(path), registry_of(gauges))


def _gauge(name: str, told: str, value: float | None = None, labels: tuple[str, ...] = ()) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, told, value=value, labels=labels or None)


def _shares(found: Found) -> Iterator[GaugeMetricFamily]:
    """Yield each share of the days shown with its interval and n, by task."""
    rows = [(ALL, found.total), *((row.task, row) for row in found.tasks)]
    for name, told in (
        ("agreement", "Share of shadow pairs that agree with the teacher"),
        ("accuracy", "Share of audited answers that are correct"),
        ("errors", "Share of answers with HTTP 5xx"),
        ("escalated", "Share of answers that the teacher wrote"),
    ):
        parts = {part: _gauge(f"{name}{end}", f"{told}{of}.", None, ("task",)) for part, end, of in ENDS}
        for task, row in rows:
            share: Share | None = getattr(row, name)
            if share is not None:
                for part, metric in parts.items():
                    metric.add_metric([task], getattr(share, part))
        yield from parts.values()


#: field of a share, end of the metric's name, end of its description
ENDS = (
    ("share", "", ""),
    ("low", "_low", ", lower end of the interval"),
    ("high", "_high", ", upper end of the interval"),
    ("n", "_n", ", of how many"),
)


def _others(found: Found) -> Iterator[GaugeMetricFamily]:
    seconds = _gauge("seconds", "Percentiles of seconds of answers.", None, ("task", "percentile"))
    confidence = _gauge("confidence", "Mean confidence, nats.", None, ("task",))
    rows: list[tuple[str, Row]] = [(ALL, found.total), *((row.task, row) for row in found.tasks)]
    for task, row in rows:
        if row.seconds is not None:
            for percentile in ("50", "95", "99"):
                seconds.add_metric([task, percentile], getattr(row.seconds, f"p{percentile}"))
        if row.confidence is not None:
            confidence.add_metric([task], row.confidence)
    joules = _gauge("joules_per_request", "Joules that a counter read, a request.", None, ("source",))
    for one in found.energy_total:
        if one.joules_per_request is not None:
            joules.add_metric([one.source], one.joules_per_request)
    distance = _gauge("drift_distance", "Distance of the recent days from the reference.", None, ("feature",))
    drifted = _gauge("drifted", "1 where a feature has drifted.", None, ("feature",))
    for drift in found.drift:
        distance.add_metric([drift.feature], drift.effect)
        drifted.add_metric([drift.feature], drift.drifted)
    newest = _gauge("newest_answer_timestamp_seconds", "Time of the last answer.", found.newest)
    yield from (seconds, confidence, joules, distance, drifted, newest)


def _watches(found: Found) -> Iterator[GaugeMetricFamily]:
    level = _gauge("alarm_evidence", "Evidence of a watch, 1 rings.", None, ("watch",))
    rings = _gauge("alarms", "Alarms of a watch on the days shown.", None, ("watch",))
    last = _gauge("last_alarm_timestamp_seconds", "Time of a watch's last alarm, 0 for none.", None, ("watch",))
    for watch in found.watches:
        level.add_metric([watch.name], watch.level)
        rings.add_metric([watch.name], len(watch.rings))
        last.add_metric([watch.name], watch.rings[-1].at if watch.rings else 0.0)
    yield from (level, rings, last)
