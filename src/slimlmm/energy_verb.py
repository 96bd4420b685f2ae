"""The verb `energy`: a year of two deployments from the command line or from what `bench --energy` wrote; tables of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.console import Group as Lines
from rich.markup import escape
from rich.table import Table

from slimlmm import annual, antgmm
from slimlmm.annual import Annual, Compression, Deployment, Setting
from slimlmm.errors import UserError
from slimlmm.spdx import write as write_spdx

T = TypeVar("T", bound=annual.Frozen)
NOTHING = "-"
#: what may be said beside --paper
PAPER = frozenset(["paper", "device_watts", "requests", "server_factor", "pue", "json_out", "batch"])
EXAMPLE = "Example: `slimlmm energy --before bench.json#second --after bench.json --requests 1e9 --server-factor 1.8 --pue 1.2`"
FILE = "Joules of the device for one request, or a JSON file of bench --energy; FILE#second is its --against."
Number = float | None
Side = Annotated[str | None, typer.Option(help=FILE)]
Batch = Annotated[int, typer.Option(min=1, help="Batch size whose figure is read from those files: 1 or 32.")]
Requests = Annotated[Number, typer.Option(help="Requests a year.")]
Seconds = Annotated[Number, typer.Option(help="Seconds that one request holds the device; files tell it themselves.")]
Devices = Annotated[Number, typer.Option(help="Devices switched on all year; instead of --idle-share.")]
IdleShare = Annotated[Number, typer.Option(help="Part of the switched-on time without an answer, 0 to below 1.")]
IdleWatts = Annotated[Number, typer.Option(help="Watts of a device that is on and idle.")]
ServerFactor = Annotated[Number, typer.Option(help="Power of the server over that of its devices, 1 or more.")]
ServerWatts = Annotated[
    Number, typer.Option(help="Watts of the rest of the server, per device; instead of the factor.")
]
Pue = Annotated[Number, typer.Option(help="Energy of the building over that of its servers, 1 or more.")]
Grid = Annotated[Number, typer.Option(help="Grams of CO2 a kilowatt-hour of your grid; without it no CO2 is told.")]
SpentJoules = Annotated[Number, typer.Option(help="Joules that the compression itself took, for the break-even.")]
SpentHours = Annotated[Number, typer.Option(help="Device-hours that it took, with --spent-watts: a declared estimate.")]
SpentWatts = Annotated[Number, typer.Option(help="Watts of the device meanwhile, as you declare them.")]
PaperSays = Annotated[bool, typer.Option("--paper", help="Reproduce the 75 million kWh a year of arXiv 2312.05795.")]
Watts = Annotated[
    list[float] | None, typer.Option(help="With --paper: watts assumed of a device while it answers; repeat.")
]
Spdx = Annotated[
    Path | None, typer.Option("--spdx", help="File to write: SPDX 3.0.1 AI package of --after with its energy.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


def energy(
    context: typer.Context,
    before: Side = None,
    after: Side = None,
    batch: Batch = 1,
    requests: Requests = None,
    seconds_before: Seconds = None,
    seconds_after: Seconds = None,
    devices_before: Devices = None,
    devices_after: Devices = None,
    idle_share: IdleShare = None,
    idle_watts: IdleWatts = None,
    server_factor: ServerFactor = None,
    server_watts: ServerWatts = None,
    pue: Pue = None,
    grid: Grid = None,
    spent_joules: SpentJoules = None,
    spent_hours: SpentHours = None,
    spent_watts: SpentWatts = None,
    paper: PaperSays = False,
    device_watts: Watts = None,
    spdx: Spdx = None,
    json_out: Json = False,
) -> None:
    """Energy of two deployments over a year: device, server, building; CO2, and the requests that pay the compression back."""
    if paper:
        _only(context.params, PAPER)
        found = of_paper(device_watts or antgmm.WATTS, requests, server_factor, pue)
        _report({"papers": [one.model_dump() for one in found]}, paper_view(found), json_out)
        return
    if device_watts:
        raise UserError("--device-watts is an assumption of --paper: leave it out, or add --paper.")
    first = deployment("before", before, batch, seconds_before, devices_before)
    second = deployment("after", after, batch, seconds_after, devices_after)
    shared = {"requests": requests, "idle_watts": idle_watts, "idle_share": idle_share, "grid": grid, "pue": pue}
    shared |= {"server_factor": server_factor, "server_watts": server_watts}
    year = annual.annualise(setting(shared), first, second, compression(spent_joules, spent_hours, spent_watts))
    if spdx:
        write_spdx(year, spdx)
    _report(year.model_dump(), view(year), json_out)


def _report(value: Any, shown: Lines, as_json: bool) -> None:
    if as_json:
        print(json.dumps(value, indent=1))
    else:
        Console().print(shown, highlight=False)


def deployment(side: str, text: str | None, batch: int, seconds: float | None, devices: float | None) -> Deployment:
    """Return one deployment from joules, or from a file of `bench --energy`: measured there, or declared where nothing was.

    Raises:
        UserError: neither, or a file that holds no energy of that batch size.
    """
    if text is None:
        raise UserError(f"--{side}: say what the deployment takes: joules of one request, or a file of bench --energy.")
    given = {"seconds": seconds, "devices": devices}
    try:
        return _checked(Deployment, f"--{side}", {"name": side, "joules": float(text), **given})
    except ValueError:
        file, _, which = text.partition("#")
    if which not in ("", "first", "second"):
        raise UserError(f"--{side} {text}: after # say first or second.")
    found = _bench(side, file)
    name, record = _figure(f"--{side} {text}", found, which or "first", batch)
    read = {
        "name": name,
        "joules": record["joules"],
        "se": record["sd"] / record["n"] ** 0.5,
        "seconds": record["seconds"] if seconds is None else seconds,
        "devices": devices,
        "basis": record["basis"],
        "source": record["source"],
    }
    return _checked(Deployment, f"--{side} {text}", read)


def _bench(side: str, file: str) -> dict[str, Any]:
    """Return what `bench --json` wrote into a file."""
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--{side} {file!r}: neither a number of joules nor a file ({error.strerror}).") from error
    except ValueError as error:
        raise UserError(f"--{side} {file}: is not JSON ({str(error).splitlines()[0]}).") from error
    if not isinstance(found, dict) or not isinstance(found.get("models"), list):
        raise UserError(f"--{side} {file}: was not written by slimlmm bench --energy --json.")
    return found


def _figure(asked: str, found: dict[str, Any], which: str, batch: int) -> tuple[str, dict[str, Any]]:
    """Return the model's name and its `energy.PerRequest` of a batch size, as a dictionary."""
    energy = found.get("energy")
    if not energy:
        raise UserError(f"{asked}: holds no energy; run bench with --energy or, for an estimate, --watts.")
    sizes = energy["measured"] or energy["declared"]
    if not sizes:
        raise UserError(
            f"{asked}: nothing was measured ({energy['reason']}); bench --watts writes a declared estimate."
        )
    by_size = {one["batch_size"]: one for one in sizes}
    if batch not in by_size:
        raise UserError(f"{asked}: no figure of --batch {batch}; there are {', '.join(map(str, by_size))}.")
    record = by_size[batch][which]
    if record is None:
        raise UserError(f"{asked}: only one model was measured there; run bench with --against, or leave #second out.")
    return str(found["models"][0 if which == "first" else 1]["name"]), dict(record)


def compression(joules: float | None, hours: float | None, watts: float | None) -> Compression | None:
    """Return what the compression took: joules as stated, or declared watts times hours; None where nothing was given.

    Raises:
        UserError: both ways at once, or watts without hours.
    """
    seconds = None if hours is None else 3600 * hours
    if joules is not None and watts is not None:
        raise UserError("--spent-joules and --spent-watts say the same thing twice: leave one of the two out.")
    if joules is not None:
        return _checked(Compression, "--spent-joules", {"joules": joules, "seconds": seconds, "basis": "stated"})
    if (watts is None) != (seconds is None):
        raise UserError("--spent-hours and --spent-watts belong together (or give --spent-joules).")
    if watts is None or seconds is None:
        return None
    spent = {"joules": watts * seconds, "seconds": seconds, "basis": "declared"}
    return _checked(Compression, "--spent-hours and --spent-watts", spent)


def setting(given: dict[str, float | None]) -> Setting:
    """Return what both deployments share.

    Raises:
        UserError: no requests a year, or a number out of its range.
    """
    if given["requests"] is None:
        raise UserError("--requests: say how many requests a year there are.")
    return _checked(Setting, "", given)


def _checked(kind: type[T], option: str, given: dict[str, Any]) -> T:
    """Return a model of checked numbers; the message of a wrong one names the option or field."""
    try:
        return kind(**given)
    except ValidationError as error:
        wrong = error.errors()[0]
        name = "--" + str(wrong["loc"][0]).replace("_", "-")
        where = name if not option else option if wrong["loc"][0] == "joules" else f"{option}, {name}"
        said = f"{wrong['msg'][0].lower()}{wrong['msg'][1:]}"
        raise UserError(f"{where}: {wrong['input']!r} does not do; {said}.") from error


def _only(given: Mapping[str, Any], names: frozenset[str]) -> None:
    """Refuse options other than these where the paper has figures of its own."""
    if extra := [
        f"--{name.replace('_', '-')}" for name, value in given.items() if name not in names and value is not None
    ]:
        raise UserError(f"--paper has its own figures: leave {' and '.join(extra)} out.")


def of_paper(
    watts: Sequence[float], requests: float | None, server_factor: float | None, pue: float | None
) -> list[antgmm.Paper]:
    """Return the paper's arithmetic for each assumption of watts."""
    overhead = (server_factor or 1.0) * (pue or 1.0)
    return [antgmm.arithmetic(one, overhead=overhead, requests=requests) for one in watts]


def view(found: Annual) -> Lines:
    """Return the terminal view of a year: energy at three boundaries, idle time, CO2, break-even."""
    a, b = found.year_before, found.year_after
    table = Table(title=f"{found.setting.requests:,.4g} requests a year", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in ("figure", f"before: {escape(found.before.name)}", f"after: {escape(found.after.name)}", "saved"):
        table.add_column(head, justify="left" if head == "figure" else "right")
    names = {"device": "device", "server": "server", "building": "with PUE"}
    for key, label in names.items():
        pair = (getattr(a.joules, key), getattr(b.joules, key))
        table.add_row(f"J a request, {label}", *map(_shown, pair), _shown(_less(*pair)))
    for key, label in names.items():
        saved, noise = getattr(found.saved_kwh, key), getattr(found.saved_kwh_se, key)
        spread = "" if noise is None else f" ± {_shown(noise)}"
        table.add_row(
            f"kWh a year, {label}", _shown(getattr(a.kwh, key)), _shown(getattr(b.kwh, key)), _shown(saved) + spread
        )
    table.add_row(
        "- of the device while idle", _shown(a.idle_kwh), _shown(b.idle_kwh), _shown(_less(a.idle_kwh, b.idle_kwh))
    )
    table.add_row("idle share of the time on", _shown(a.idle_share), _shown(b.idle_share), NOTHING)
    table.add_row("devices on all year", _shown(a.devices), _shown(b.devices), _shown(_less(a.devices, b.devices)))
    for title, one in (
        ("CO2 saved, kg a year", found.saved_co2_kg),
        ("break-even, requests", found.break_even_requests),
    ):
        for key, label in names.items():
            table.add_row(f"{title}, {label}", NOTHING, NOTHING, _shown(getattr(one, key)))
    basis = (
        f"joules before {found.before.basis} ({found.before.source}), after {found.after.basis} ({found.after.source})"
    )
    run = "" if found.compression is None else f"; compression {found.compression.basis}"
    return Lines(table, escape(f"{basis}{run}; - is not known: an input of it was not given"))


def paper_view(found: Sequence[antgmm.Paper]) -> Lines:
    """Return the terminal view of the paper's arithmetic, a column for each assumption of watts."""
    table = Table(title="75 million kWh a year (arXiv 2312.05795)", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in ("", "step", *("value" for _ in found)):
        table.add_column(head, no_wrap=True, justify="right" if head == "value" else "left")
    table.add_column("from")
    for steps in zip(*(one.steps for one in found), strict=True):
        one = steps[0]
        source = f"= {one.how}" if one.mark == "derived" else f"{one.mark}: {one.how}"
        label = f"{one.what}, {one.unit}" if one.unit else one.what
        table.add_row(one.symbol, label, *(_shown(step.value) for step in steps), source)
    implied = " or ".join(f"{one.implied_requests:.3g}" for one in found)
    return Lines(
        table,
        f"The saving holds if there are {implied} requests a year; the volume is not published. Neither are power, device and "
        "boundary; what is marked assumed stands in for them. Y is a year of 31,536,000 s.",
    )


def _less(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else before - after


def _shown(value: float | None) -> str:
    """Return a number in four digits, with separators where it is large."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
