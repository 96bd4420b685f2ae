"""A year of two deployments in kilowatt-hours, at three boundaries: the device, its server, the building with its PUE.

Symbols, the same in all formulas (units in brackets; what is not given is None and what would need it is None, never a guess):

| symbol | |
|---|---|
| N | requests a year [1/a] |
| e | energy of the device for one request [J] |
| t | seconds that one request holds the device [s] |
| i | idle share: part of the switched-on time in which the device answers nothing, 0 <= i < 1 |
| R | devices that are switched on all year |
| Y | seconds of a year of 365 days, 31,536,000 s |
| T | device-seconds switched on in a year [s]: R Y, or N t / (1 - i) |
| P | watts of a device that is on and idle [W] |
| f | server factor: power of the server over that of its devices, f >= 1 |
| W | watts of the rest of the server, per device, while it is on [W] |
| PUE | energy of the building over that of its servers, PUE >= 1 |
| g | grid intensity [g CO2 / kWh] |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from slimlmm.errors import UserError

#: seconds and hours of a year of 365 days
HOURS = 8760.0
YEAR = 3600 * HOURS
#: joules of a kilowatt-hour
KWH = 3.6e6


class Frozen(BaseModel):
    """Input or outcome: frozen, unknown fields and numbers that are not finite refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Setting(Frozen):
    """What both deployments share."""

    requests: float = Field(gt=0, description="N: requests a year.")
    idle_watts: float | None = Field(None, ge=0, description="P: watts of a device that is on and idle.")
    idle_share: float | None = Field(None, ge=0, lt=1, description="i: part of the switched-on time without an answer.")
    server_factor: float | None = Field(None, ge=1, description="f: power of the server over that of its devices.")
    server_watts: float | None = Field(
        None, ge=0, description="W: watts of the rest of the server, per device, while on."
    )
    pue: float | None = Field(None, ge=1, description="PUE: energy of the building over that of its servers.")
    grid: float | None = Field(None, ge=0, description="g: grams of CO2 a kilowatt-hour, as the user states.")


class Deployment(Frozen):
    """One model in service."""

    name: str = Field(description="Which model.")
    joules: float = Field(gt=0, description="e: joules of the device for one request.")
    se: float | None = Field(None, ge=0, description="Standard error of e in joules; null where e is a single number.")
    seconds: float | None = Field(None, gt=0, description="t: seconds that one request holds the device.")
    devices: float | None = Field(None, gt=0, description="R: devices that are switched on all year.")
    basis: Literal["measured", "declared", "stated"] = Field(
        "stated", description="measured by a sensor; declared watts times seconds; stated on the command line."
    )
    source: str = Field("command line", description="Counter, declared watts or who said so.")


class Compression(Frozen):
    """What the compression itself took."""

    joules: float = Field(gt=0, description="Joules of the device for the whole run.")
    seconds: float | None = Field(None, gt=0, description="Device-seconds of the run.")
    basis: Literal["declared", "stated"] = Field(
        "stated", description="declared watts times hours, or joules as stated."
    )


class Boundaries(Frozen):
    """One figure at three boundaries; null where an input of that boundary was not given."""

    device: float | None = Field(description="The device alone.")
    server: float | None = Field(description="With the rest of its server.")
    building: float | None = Field(description="With cooling and power supply of the building: server times PUE.")


class Yearly(Frozen):
    """A year of one deployment."""

    kwh: Boundaries = Field(description="Kilowatt-hours a year.")
    joules: Boundaries = Field(description="Joules a request, idle time included.")
    idle_kwh: float | None = Field(
        description="Kilowatt-hours of the device while idle; null where idle time was not given."
    )
    idle_share: float | None = Field(description="Idle share of the switched-on time.")
    devices: float | None = Field(description="Devices switched on all year, T / Y.")


class Annual(Frozen):
    """Two deployments compared over a year."""

    setting: Setting
    before: Deployment
    after: Deployment
    compression: Compression | None
    year_before: Yearly
    year_after: Yearly
    saved_kwh: Boundaries = Field(description="Kilowatt-hours a year less; negative where the second takes more.")
    saved_kwh_se: Boundaries = Field(description="Standard error of it, from those of e alone.")
    saved_co2_kg: Boundaries = Field(description="Kilograms of CO2 a year less; null without a stated grid intensity.")
    break_even_requests: Boundaries = Field(description="Requests that pay the compression back; null where none does.")


def annualise(
    setting: Setting, before: Deployment, after: Deployment, compression: Compression | None = None
) -> Annual:
    """Compare two deployments over a year.

    saved = E_before - E_after [kWh/a] at each boundary (`yearly`); CO2 = saved g / 1000 [kg/a]. The standard error is that of
    e, k N sqrt(se_before^2 + se_after^2) / 3.6e6, with k = 1, k = f (or 1 where W is given) and k = f PUE (or PUE).
    Break-even (`break_even`) counts requests of this volume, idle time included.

    Raises:
        UserError: inputs that contradict each other, or devices that cannot answer so many requests.
    """
    _refuse_contradictions(setting, before, after)
    first, second = yearly(setting, before), yearly(setting, after)
    saved = _both(first.kwh, second.kwh, lambda a, b: a - b)
    errors = (before.se, after.se)
    noise = None if None in errors else setting.requests * math.hypot(*(one or 0.0 for one in errors)) / KWH
    factor = setting.server_factor or (1.0 if setting.server_watts is not None else None)
    return Annual(
        setting=setting,
        before=before,
        after=after,
        compression=compression,
        year_before=first,
        year_after=second,
        saved_kwh=saved,
        saved_kwh_se=_widened(noise, _times(noise, factor), setting.pue),
        saved_co2_kg=_each(saved, lambda kwh: _times(kwh, setting.grid, 1e-3)),
        break_even_requests=break_even(setting, first, second, compression),
    )


def yearly(setting: Setting, one: Deployment) -> Yearly:
    """Return the year of one deployment.

    Device: E = (N e + P (T - N t)) / 3.6e6 [kWh/a], and T - N t = N t i / (1 - i) where i is given; without P or T the second
    term is left out and `idle_kwh` is null.
    Server: f E, or E + W T / 3.6e6. Building: PUE times the server.

    Raises:
        UserError: R devices are fewer than N t / Y, so they cannot answer so many requests.
    """
    busy = None if one.seconds is None else setting.requests * one.seconds
    on = switched_on(setting, one)
    idle = None if on is None or busy is None else on - busy
    if busy is not None and setting.idle_share is not None:  # on - busy would cancel where i is small
        idle = busy * setting.idle_share / (1 - setting.idle_share)
    idle_kwh = _times(setting.idle_watts, idle, 1 / KWH)
    device = setting.requests * one.joules / KWH + (idle_kwh or 0.0)
    server = _times(device, setting.server_factor)
    if setting.server_watts is not None and on is not None:
        server = device + setting.server_watts * on / KWH
    kwh = _widened(device, server, setting.pue)
    return Yearly(
        kwh=kwh,
        joules=_each(kwh, lambda value: value * KWH / setting.requests),
        idle_kwh=idle_kwh,
        idle_share=None if idle is None or not on else idle / on,
        devices=_times(on, 1 / YEAR),
    )


def switched_on(setting: Setting, one: Deployment) -> float | None:
    """Return the device-seconds T of a year that devices are switched on: R Y, or N t / (1 - i); None where neither is known.

    Raises:
        UserError: R Y < N t.
    """
    busy = None if one.seconds is None else setting.requests * one.seconds
    if one.devices is not None:
        if busy is not None and busy > one.devices * YEAR * (1 + 1e-9):
            raise UserError(
                f"{one.name}: {setting.requests:,.0f} requests of {one.seconds:g} s hold {busy / YEAR:.4g} devices all year, "
                f"and there are {one.devices:g}: give more devices or fewer requests."
            )
        return one.devices * YEAR if busy is None else max(busy, one.devices * YEAR)
    return None if busy is None or setting.idle_share is None else busy / (1 - setting.idle_share)


def break_even(setting: Setting, before: Yearly, after: Yearly, compression: Compression | None) -> Boundaries:
    """Return the requests after which the compression has saved what it took, at each boundary.

    n = E_run / (e_before - e_after), with E_run of the same boundary: E [J] of the device; f E, or E + W t_run; PUE times that.
    None where a request saves nothing, or where E_run of that boundary is not known (W needs t_run).
    """
    if compression is None:
        return Boundaries(device=None, server=None, building=None)
    server = _times(compression.joules, setting.server_factor)
    if setting.server_watts is not None and compression.seconds is not None:
        server = compression.joules + setting.server_watts * compression.seconds
    run = _widened(compression.joules, server, setting.pue)
    saved = _both(before.joules, after.joules, lambda a, b: a - b)
    return _both(run, saved, lambda spent, less: spent / less if less > 0 else None)


def _refuse_contradictions(setting: Setting, before: Deployment, after: Deployment) -> None:
    if {before.basis, after.basis} == {"measured", "declared"}:
        raise UserError(
            f"{before.name} is {before.basis} and {after.name} is {after.basis}: a figure by a sensor and one by declared watts "
            "are not compared; give both of one kind."
        )
    if setting.server_factor is not None and setting.server_watts is not None:
        raise UserError("--server-factor and --server-watts say the same thing twice: leave one of the two out.")
    for one in (before, after):
        if one.devices is not None and setting.idle_share is not None:
            raise UserError("--idle-share and a number of devices say the same thing twice: leave one of the two out.")
        for option, value in (("--idle-watts", setting.idle_watts), ("--server-watts", setting.server_watts)):
            if value is not None and (switched_on(setting, one) is None or one.seconds is None):
                raise UserError(
                    f"{option} needs to know how long devices are switched on, and of {one.name} it is not known: give "
                    "--idle-share or the numbers of devices, and the seconds of a request (bench --energy tells them)."
                )


def _times(*values: float | None) -> float | None:
    """Return the product, None where a factor is."""
    known = [value for value in values if value is not None]
    return math.prod(known) if len(known) == len(values) else None


def _widened(device: float | None, server: float | None, pue: float | None) -> Boundaries:
    return Boundaries(device=device, server=server, building=_times(server, pue))


def _each(one: Boundaries, change: Callable[[float], float | None]) -> Boundaries:
    return _both(one, one, lambda value, _: change(value))


def _both(one: Boundaries, other: Boundaries, join: Callable[[float, float], float | None]) -> Boundaries:
    pairs = {name: (getattr(one, name), getattr(other, name)) for name in Boundaries.model_fields}
    return Boundaries(**{name: None if a is None or b is None else join(a, b) for name, (a, b) in pairs.items()})
