"""The HTML page: one file with tables and plots in it, drawn from the record alone; it loads nothing from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import jinja2

from slimlmm import __version__
from slimlmm.monitoring import tables
from slimlmm.monitoring.reading import share
from slimlmm.monitoring.records import Found, Row, Share

BLUE, ORANGE, RED, GREY = "tab:blue", "tab:orange", "tab:red", "0.5"
#: short dates; the same record gives the same bytes
STYLE: dict[Any, Any] = {"date.converter": "concise", "svg.hashsalt": "slimlmm"}
#: tasks with a plot of their own, features that are named in one
MOST_TASKS, MOST_FEATURES = 8, 5


def write(found: Found, path: Path) -> Path:
    """Write the page, whole or not at all; returns its path."""
    loader = jinja2.PackageLoader("slimlmm", "templates")
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True)
    grids = [tables.tasks(found), tables.days(found), *([tables.drifts(found)] if found.drift else [])]
    grids += [tables.watches(found.watches)] if found.watches else []
    grids += [tables.rings(found)] if found.rings else []
    grids += [tables.energy(found)] if found.energy else []
    text = environment.get_template("monitor.html.j2").render(
        found=found,
        verdict=tables.verdict(found),
        plots=plots(found),
        grids=grids,
        cells=tables.cells(found),
        version=__version__,
        newest=tables.moment(found.newest),
    )
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path


def plots(found: Found) -> list[tuple[str, str]]:
    """Return title and picture (a `data:` address of an SVG) of every plot that there is something to draw in."""
    import matplotlib

    matplotlib.use("Agg")
    drawn: list[tuple[str, bool, Callable[[Found, Any], None]]] = [
        ("agreement with the teacher, shadow pairs by day (%)", any(row.agreement for row in found.days), _agreement),
        ("seconds of an answer", any(row.seconds for row in found.days), _seconds),
        ("5xx and escalated (%)", True, _shares),
        ("requests", True, _requests),
        ("distance from the reference, by feature", bool(found.drift_days), _drift),
        ("mean confidence (nats)", any(row.confidence is not None for row in found.days), _confidence),
        ("joules a request", any(one.joules_per_request is not None for one in found.energy), _energy),
    ]
    several = [row.task for row in found.tasks if row.agreement][:MOST_TASKS]
    with matplotlib.rc_context(STYLE):
        made = [(title, _picture(found, draw)) for title, there, draw in drawn if there]
        return made[:1] + _by_task(found, several) + made[1:] if len(several) > 1 else made


def _picture(found: Found, draw: Callable[[Found, Any], None]) -> str:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 2.8), layout="constrained")
    draw(found, axes)
    _dates(axes, found)
    return _encoded(figure)


def _by_task(found: Found, names: Sequence[str]) -> list[tuple[str, str]]:
    """Return one picture with a small plot for each task, all on one scale."""
    from matplotlib import pyplot

    lines = -(-len(names) // 2)
    figure, grid = pyplot.subplots(
        lines, 2, figsize=(8, 1.7 * lines), layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    for axes, name in zip(grid.flat, names, strict=False):
        _band(axes, _weeks(found, name))
        axes.set_title(_plain(name), fontsize=9, loc="left")
        _dates(axes, found)
    for axes in list(grid.flat)[len(names) :]:
        axes.set_visible(False)
    return [("agreement by task and week (%)", _encoded(figure))]


def _encoded(figure: Any) -> str:
    from matplotlib import pyplot

    held = io.StringIO()
    figure.savefig(held, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(held.getvalue().encode()).decode()


def _dates(axes: Any, found: Found) -> None:
    axes.axvspan(found.reference_since, found.reference_until, color="0.93", zorder=0)
    axes.set_xlim(found.since - timedelta(days=1), found.until + timedelta(days=1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)


def _of_days(rows: Sequence[Row], of: Callable[[Row], Share | None]) -> list[tuple[date, Share]]:
    return [(row.day, one) for row in rows if row.day and (one := of(row)) is not None]


def _weeks(found: Found, task: str) -> list[tuple[date, Share]]:
    """Return the agreement of a task by seven days, at the middle of them; a day may have a few pairs only."""
    sums: dict[int, tuple[int, int]] = {}
    for day, one in _of_days([row for row in found.cells if row.task == task], lambda row: row.agreement):
        week = (day - found.since).days // 7
        count, n = sums.get(week, (0, 0))
        sums[week] = (count + one.count, n + one.n)
    told = {week: share(count, n, found.settings["confidence"]) for week, (count, n) in sorted(sums.items())}
    return [(min(found.since + timedelta(7 * week + 3), found.until), one) for week, one in told.items() if one]


def _band(axes: Any, told: Sequence[tuple[date, Share]], label: str = "", colour: str = BLUE) -> None:
    """Draw shares in per cent with their intervals."""
    days = [day for day, _ in told]
    lows, highs = [100 * one.low for _, one in told], [100 * one.high for _, one in told]
    axes.fill_between(days, lows, highs, color=colour, alpha=0.2)
    shares = [100 * one.share for _, one in told]
    axes.plot(days, shares, color=colour, linewidth=1.2, marker=".", markersize=4, label=label)


def _agreement(found: Found, axes: Any) -> None:
    _band(axes, _of_days(found.days, lambda row: row.agreement), "agreement, interval of each day")
    watch = next((one for one in found.watches if one.name == "agreement"), None)
    if watch:
        axes.axhline(100 * (1 - watch.allowed), color=GREY, linestyle=":", linewidth=1, label="allowed")
    audited = [row for row in found.days if row.accuracy]
    if audited:
        shares = [100 * row.accuracy.share for row in audited if row.accuracy]
        axes.plot([row.day for row in audited], shares, "x", color=ORANGE, markersize=5, label="audited: correct")
    _alarms(found, axes, "agreement")


def _seconds(found: Found, axes: Any) -> None:
    rows = [row for row in found.days if row.seconds]
    for name, colour in (("p50", BLUE), ("p95", ORANGE), ("p99", RED)):
        axes.plot([row.day for row in rows], [getattr(row.seconds, name) for row in rows], color=colour, label=name)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(which="minor", labelsize=7)
    _alarms(found, axes, "latency")


def _shares(found: Found, axes: Any) -> None:
    _band(axes, _of_days(found.days, lambda row: row.errors), "5xx", RED)
    _band(axes, _of_days(found.days, lambda row: row.escalated), "escalated", BLUE)
    _alarms(found, axes, "errors")


def _requests(found: Found, axes: Any) -> None:
    axes.bar([row.day for row in found.days], [row.requests for row in found.days], color=BLUE, width=0.8)


def _drift(found: Found, axes: Any) -> None:
    """Draw the features that went farthest in colours, the others grey."""
    names = sorted({name for day in found.drift_days for name in day.effects})
    most = {name: max(day.effects.get(name, 0.0) for day in found.drift_days) for name in names}
    named = sorted(names, key=lambda name: -most[name])[:MOST_FEATURES]
    for name in sorted(names, key=named[::-1].index if len(names) == len(named) else lambda name: name in named):
        days = [day for day in found.drift_days if name in day.effects]
        style = {"label": name, "linewidth": 1.3} if name in named else {"color": "0.8", "linewidth": 0.8}
        axes.plot([day.day for day in days], [day.effects[name] for day in days], **style)
    axes.axhline(found.settings["drift_effect"], color=GREY, linestyle=":", linewidth=1, label="counts as drift")
    axes.set_ylim(0)
    axes.legend(fontsize=7, loc="upper left", ncols=3)


def _confidence(found: Found, axes: Any) -> None:
    rows = [row for row in found.days if row.confidence is not None]
    axes.plot([row.day for row in rows], [row.confidence for row in rows], color=BLUE, label="mean")
    _alarms(found, axes, "confidence")


def _energy(found: Found, axes: Any) -> None:
    for source in sorted({one.source for one in found.energy}):
        own = [one for one in found.energy if one.source == source]
        axes.plot([one.day for one in own], [one.joules_per_request for one in own], label=_plain(source))
    axes.set_ylim(0)
    axes.legend(fontsize=7)


def _alarms(found: Found, axes: Any, watch: str) -> None:
    """Draw the alarms of a watch as lines, then the legend."""
    own = [ring for ring in found.rings if ring.watch == watch]
    for number, ring in enumerate(own):
        at = datetime.fromtimestamp(ring.at, UTC)
        axes.axvline(at, color=RED, linewidth=0.8, alpha=0.7, label="alarm" if number == 0 else None)
    axes.legend(fontsize=7, loc="best")


def _plain(text: str) -> str:
    """Return a text in which matplotlib sees no mathematics."""
    return text.replace("$", r"\$")
