"""The 75 million kilowatt-hours a year of arXiv 2312.05795, step by step: what was published, what is assumed, what follows.

The abstract publishes the saving and both latencies, but neither the requests a year, nor power or type of a device, nor the
boundary. So the arithmetic runs backwards: it states the volume that the saving implies under stated assumptions, and then
forwards again, through `annual.annualise`, to the saving.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from slimlmm.annual import HOURS, KWH, YEAR, Deployment, Frozen, Setting, annualise
from slimlmm.errors import UserError

#: published, all in the abstract: kilowatt-hours a year saved, seconds of a request before and after
SAVED_KWH, BEFORE_S, AFTER_S = 75e6, 0.700, 0.090
#: assumed where the user says nothing: watts of a data-centre accelerator while it answers
WATTS = (300.0, 400.0)
WHERE = "abstract"


class Step(Frozen):
    """One number of the arithmetic."""

    symbol: str
    what: str
    value: float
    unit: str
    mark: Literal["published", "assumed", "derived"]
    how: str = Field(description="Where it is published, who assumes it, or the formula.")


class Paper(Frozen):
    """The arithmetic under one assumption of watts."""

    steps: tuple[Step, ...]
    implied_requests: float = Field(description="Requests a year at which the published saving holds.")
    reproduced_kwh: float = Field(description="Kilowatt-hours a year saved at that volume, reckoned forwards.")


def arithmetic(watts: float, *, overhead: float = 1.0, requests: float | None = None) -> Paper:
    """Return the steps from the published figures to the implied volume, and back.

    S saved [kWh/a], t latencies [s], P watts of a device while it answers [W], k energy of the whole over that of the device:
    de = k P (t_before - t_after) [J]; N = 3.6e6 S / de [1/a]. With `requests` a year the last step says what those would save.

    Raises:
        UserError: watts or requests that are not above 0, an overhead below 1.
    """
    for name, value, least in (("--device-watts", watts, 0.0), ("--requests", requests or 1.0, 0.0)):
        if not least < value < float("inf"):
            raise UserError(f"{name} {value:g}: give a number above 0.")
    if not 1 <= overhead < float("inf"):
        raise UserError(f"server factor times PUE is {overhead:g}: it cannot be below 1.")
    joules = overhead * watts * (BEFORE_S - AFTER_S)
    implied = SAVED_KWH * KWH / joules
    back = _forwards(watts, overhead, implied)
    steps = [*_inputs(watts, overhead), *_derived(joules, implied, overhead * watts)]
    steps.append(Step(symbol="S'", what="saved at N", value=back, unit="kWh/a", mark="derived", how="N de / 3.6e6"))
    if requests is not None:
        found = _forwards(watts, overhead, requests)
        how = f"at {requests:.4g} a year"
        steps.append(Step(symbol="S*", what="saved at --requests", value=found, unit="kWh/a", mark="derived", how=how))
    return Paper(steps=tuple(steps), implied_requests=implied, reproduced_kwh=back)


def _forwards(watts: float, overhead: float, requests: float) -> float:
    """Return the kilowatt-hours that so many requests a year save, by the arithmetic of any two deployments."""
    before, after = (Deployment(name=f"{seconds:g} s", joules=watts * seconds) for seconds in (BEFORE_S, AFTER_S))
    saved = annualise(Setting(requests=requests, server_factor=overhead), before, after).saved_kwh.server
    assert saved is not None  # a factor was given
    return saved


def _inputs(watts: float, overhead: float) -> list[Step]:
    alone = "device alone, no PUE" if overhead == 1 else "server factor x PUE"
    return [
        Step(symbol="S", what="saved electricity", value=SAVED_KWH, unit="kWh/a", mark="published", how=WHERE),
        Step(symbol="t0", what="latency of 5.4 B", value=BEFORE_S, unit="s", mark="published", how=WHERE),
        Step(symbol="t1", what="latency of 0.3 B", value=AFTER_S, unit="s", mark="published", how=WHERE),
        Step(symbol="P", what="device, answering", value=watts, unit="W", mark="assumed", how="not published"),
        Step(symbol="k", what="whole over device", value=overhead, unit="", mark="assumed", how=alone),
        Step(symbol="b", what="requests at once", value=1, unit="", mark="assumed", how="t is device time"),
    ]


def _derived(joules: float, implied: float, whole_watts: float) -> list[Step]:
    def step(symbol: str, what: str, value: float, unit: str, how: str) -> Step:
        return Step(symbol=symbol, what=what, value=value, unit=unit, mark="derived", how=how)

    return [
        step("dt", "time saved a request", BEFORE_S - AFTER_S, "s", "t0 - t1"),
        step("de", "energy saved a request", joules, "J", "k P dt / b"),
        step("M", "mean power saved", SAVED_KWH / HOURS / 1e3, "MW", "S / 8760 h"),
        step("N", "requests a year", implied, "1/a", "3.6e6 S / de"),
        step("N/365", "requests a day", implied / 365, "1/d", "N / 365"),
        step("N/Y", "requests a second", implied / YEAR, "1/s", "N / Y"),
        step("D0", "busy devices, 5.4 B", implied * BEFORE_S / YEAR, "", "N t0 / Y"),
        step("D1", "busy devices, 0.3 B", implied * AFTER_S / YEAR, "", "N t1 / Y"),
        step("E0", "5.4 B would take", implied * whole_watts * BEFORE_S / KWH, "kWh/a", "N k P t0 / 3.6e6"),
    ]
