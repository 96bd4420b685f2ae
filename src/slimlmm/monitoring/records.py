"""What a monitor found, as one record: terminal, page, JSON and metrics are drawn from it alone."""

from __future__ import annotations

from datetime import date
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Told(BaseModel):
    """Base of all records: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Share(Told):
    """A share of n with its Wilson interval."""

    n: int
    count: int
    share: float
    low: float
    high: float


class Quantiles(Told):
    """Percentiles of seconds, linear between order statistics."""

    n: int
    p50: float
    p95: float
    p99: float


class Row(Told):
    """Requests of one day (UTC) and task; "" and None stand for all tasks and all days."""

    day: date | None
    task: str
    requests: int
    routes: dict[str, int] = Field(description="Answers by who wrote them.")
    statuses: dict[str, int] = Field(description="Answers by class of the HTTP status: 2xx, 4xx, 5xx.")
    errors: Share | None = Field(description="Status of 500 or more.")
    escalated: Share | None = Field(description="Answers below 400 that the teacher wrote.")
    confidence: float | None = Field(description="Mean over the arm's answers where it was reckoned; nats.")
    seconds: Quantiles | None = Field(description="Of answers with a status below 400.")
    agreement: Share | None = Field(description="Shadow pairs of the arm that agree with the teacher; drawn by lot.")
    escalation_agreement: Share | None = Field(
        description="Escalation pairs that agree; chosen for low confidence, so no estimate of agreement."
    )
    accuracy: Share | None = Field(description="Audited answers that people called correct.")


class Energy(Told):
    """Joules that a counter read over a day (UTC), whatever they were used for, and requests meanwhile."""

    day: date | None
    source: str
    joules: float
    requests: int
    joules_per_request: float | None = Field(description="None where no request was answered.")


class Drift(Told):
    """One feature, reference against recent days."""

    feature: str
    test: str = Field(description="Kolmogorov-Smirnov or chi-square.")
    reference_n: int
    recent_n: int
    reference: float | None = Field(description="Median of the reference; None for categories.")
    recent: float | None = Field(description="Median of the recent days.")
    effect: float = Field(description="Kolmogorov-Smirnov distance, or Cramer's V.")
    p: float
    q: float = Field(description="p adjusted after Benjamini and Hochberg over the features.")
    drifted: bool


class DriftDay(Told):
    """Effect of each feature of one day (UTC) against the reference."""

    day: date
    effects: dict[str, float]


class Ring(Told):
    """One alarm."""

    watch: str
    at: float = Field(description="Time of the observation at which it rang; seconds since 1970.")
    began: float = Field(description="Estimated time of the change: where the evidence was last at its lowest (CUSUM).")
    observations: int = Field(description="Observations from there to the alarm.")


class Watch(Told):
    """One sequential test and where it stands."""

    name: str
    kind: str = Field(description="Watches of a kind share false alarms out among them.")
    what: str = Field(description="What it is the share or the mean of.")
    usual: float = Field(description="That in the reference.")
    allowed: float = Field(description="That beyond which an alarm is no false one.")
    every: float = Field(description="Observations between two false alarms, at least.")
    n: int = Field(description="Observations since the reference, or since the last alarm that was written.")
    level: float = Field(description="log(1 + R) / log(1 + every): evidence now, 1 rings.")
    rings: tuple[Ring, ...]


class Found(Told):
    """All of it."""

    store: str
    since: date = Field(description="First day that is shown.")
    until: date = Field(description="Last day that is shown.")
    newest: float = Field(description="Time of the last answer shown; seconds since 1970.")
    total: Row
    tasks: tuple[Row, ...]
    days: tuple[Row, ...]
    cells: tuple[Row, ...] = Field(description="By day and task.")
    energy: tuple[Energy, ...]
    energy_total: tuple[Energy, ...]
    reference_since: date
    reference_until: date = Field(description="Last day of the reference.")
    recent_since: date
    drift: tuple[Drift, ...]
    drift_days: tuple[DriftDay, ...]
    watches: tuple[Watch, ...]
    settings: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def rings(self) -> list[Ring]:
        """Return all alarms in the order of time."""
        return sorted((ring for watch in self.watches for ring in watch.rings), key=lambda ring: ring.at)
