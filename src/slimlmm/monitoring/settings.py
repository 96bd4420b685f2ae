"""How a monitor judges: windows, what is allowed before an alarm, and how rarely an alarm may be false."""

from __future__ import annotations

from datetime import date
from pathlib import Path

from pydantic import Field, TypeAdapter

from slimlmm.errors import UserError
from slimlmm.settings import Settings, read_yaml, valid


class Monitoring(Settings):
    """Settings of `slimlmm monitor --config`."""

    arm: str = Field(
        "student", description="Arm whose agreement, confidence and alarms are told: student or candidate."
    )
    reference_since: date | None = Field(
        None, description="First day (UTC) of the reference; null: of the store. Set it anew for a new student."
    )
    reference_days: int = Field(14, gt=0, description="Days that say what is usual; alarms begin behind them.")
    least_reference: int = Field(
        200,
        gt=1,
        description="Observations of the reference below which a watch is not kept and a feature not compared.",
    )
    recent_days: int = Field(7, gt=0, description="Last days, which drift is told of against the reference.")
    confidence: float = Field(0.95, gt=0, lt=1, description="Coverage of the intervals.")
    most_tasks: int = Field(20, gt=0, description="Tasks told apart, those with most requests; the others are one.")
    false_alarm_days: float = Field(
        365,
        gt=0,
        description="Days between two false alarms of all watches together, on average at least, at the reference's traffic; "
        "shared out among the watches.",
    )
    every: int | None = Field(
        None, gt=1, description="Observations between two false alarms of each watch; null: from false_alarm_days."
    )
    rest_hours: float = Field(
        24, ge=0, description="Hours that a watch rests after an alarm, so that a lasting change rings once a day."
    )
    margin: float = Field(0.01, ge=0, lt=1, description="Agreement that may be lost against the reference.")
    error_margin: float = Field(
        0.005, ge=0, lt=1, description="Share of errors (HTTP 5xx) above that of the reference."
    )
    latency_bound_s: float | None = Field(
        None, gt=0, description="Seconds; null: latency_slack times the 95th percentile of the reference."
    )
    latency_slack: float = Field(1.25, ge=1, description="Factor on that percentile.")
    latency_share: float = Field(0.05, gt=0, lt=1, description="Share of answers that may take longer than the bound.")
    low_confidence: float = Field(
        0.1, gt=0, lt=1, description="Share of the reference's answers that count as unsure: its lowest confidences."
    )
    confidence_margin: float = Field(0.05, ge=0, lt=1, description="Share of unsure answers above that.")
    rank_margin: float = Field(
        0.1,
        gt=0,
        lt=0.5,
        description="Shift of a feature's mean rank among the reference (0.5 without drift) that is no alarm yet.",
    )
    drift_level: float = Field(
        0.05, gt=0, lt=1, description="False discovery rate over the features (Benjamini-Hochberg)."
    )
    drift_effect: float = Field(
        0.1, gt=0, lt=1, description="Least Kolmogorov-Smirnov distance or Cramer's V that counts as drift."
    )


def read(path: Path | None) -> Monitoring:
    """Return the settings of a YAML file, the defaults without one.

    Raises:
        UserError: it cannot be read, or holds unknown keys or bad values; all of them are told.
    """
    if path is None:
        return Monitoring()
    raw = read_yaml(path, "settings")
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds a {type(raw).__name__}; settings are key: value lines.")
    return valid(TypeAdapter(Monitoring), raw, str(path), lambda _: Monitoring)
