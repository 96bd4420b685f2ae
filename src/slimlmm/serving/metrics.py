"""What one gateway counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

#: seconds; an answer of a small student takes tens of milliseconds, one of a large teacher seconds
BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30, 60)


class Metrics:
    """Counters of a gateway in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        of: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("slimlmm_requests", "Requests by HTTP status.", ["status"], **of)
        self.seconds = Histogram(
            "slimlmm_answer_seconds", "Seconds from a request's body to its answer.", buckets=BUCKETS, **of
        )
        self.arm_seconds = Histogram(
            "slimlmm_arm_seconds", "Seconds that an arm took to answer.", ["arm"], buckets=BUCKETS, **of
        )
        self.routes = Counter("slimlmm_answers", "Answers by arm and by who wrote them.", ["arm", "route"], **of)
        self.escalations = Counter(
            "slimlmm_escalations", "Answers under the threshold: taken from the teacher, or why not.", ["outcome"], **of
        )
        self.shadows = Counter(
            "slimlmm_shadows", "Shadow requests: agreed, disagreed, dropped or failed.", ["arm", "outcome"], **of
        )
        self.returns = Counter("slimlmm_canary_returns", "Times that a rule took the candidate back.", ["rule"], **of)

        self.joules = Counter("slimlmm_energy_joules", "Joules of the whole device, where they are metered.", **of)
        self.answered = 0

    def watch(self, name: str, told: str, value: Callable[[], float]) -> None:
        """Add a gauge that is read when it is asked for."""
        Gauge(name, told, registry=self.registry).set_function(value)
