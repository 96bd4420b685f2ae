"""What people read of a study: a Markdown page with one table and one plot per group, drawn from `StudyResults` alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable

from slimlmm.errors import UserError
from slimlmm.files import write_text
from slimlmm.report import NOTHING, Table, count, duration, points, size
from slimlmm.study_results import Arm, Compared, Spread, StudyResults

#: row visits that differ by more than this share are said to differ
EQUAL = 0.02
TEACHER, ARM, REFERENCE, SEED = "0.4", "tab:blue", "tab:orange", "0.3"


def write(studies: Sequence[StudyResults], page: Path) -> Path:
    """Write the page of one study or more, and its plots into ``plots/`` beside it; return the page.

    Raises:
        UserError: two of them have one name, and so would share their plots.
    """
    names = [found.name for found in studies]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two studies are named {twice[0]!r}, so their plots would be one; name their folders apart.")
    page.parent.mkdir(parents=True, exist_ok=True)
    plots = page.parent / "plots"
    for found in studies:
        for number, group in enumerate(found.groups, 1):
            if any(_arms(found, group, finished=True)):
                plots.mkdir(exist_ok=True)
                plot(found, group, plots / _plot_name(found, number, group))
    write_text(page, _page([markdown(found) for found in studies]))
    return page


def _page(chapters: Sequence[str]) -> str:
    """Return one chapter as it is, several under one title."""
    if len(chapters) == 1:
        return chapters[0]
    lines = [
        f"#{line}" if line.startswith("#") else line for chapter in chapters for line in ("", *chapter.splitlines())
    ]
    return "\n".join(("# Results", *lines)) + "\n"


def markdown(found: StudyResults) -> str:
    """Return the page, or the chapter of a page, of one study."""
    lines = [f"# {found.title or found.name}", "", *([found.about, ""] if found.about else []), *_summary(found)]
    for number, group in enumerate(found.groups, 1):
        lines += ["", f"## {group.title}", ""]
        if any(_arms(found, group, finished=True)):
            lines += [f"![{group.title}](plots/{_plot_name(found, number, group)})", ""]
        lines += [group_table(found, group).markdown(), "", *_notes(found, group)]
    if any(arm.tasks for arm in found.arms):
        lines += ["", "## Tasks", "", "Exact match per task, per cent, mean ± standard deviation over the seeds.", ""]
        lines += [task_table(found).markdown()]
    lines += ["", "## How it was measured", "", provenance(found).markdown()]
    return "\n".join(lines) + "\n"


def _summary(found: StudyResults) -> list[str]:
    """Return the sentences above the tables."""
    runs = sum(len(arm.runs) for arm in found.arms if arm.same_as is None)
    seeds = ", ".join(map(str, found.seeds))
    lines = [f"{runs} finished runs of {found.model} on {found.data}, seeds {seeds}."]
    if found.teacher:
        lines.append(f"Teacher: {count(found.teacher_parameters)} parameters, {_spread(found.teacher)} % exact match.")
    lines += [
        "",
        "Exact match in per cent, mean ± standard deviation over the seeds. Drops (teacher minus arm) and differences (arm minus",
        "reference) in points with 95 % intervals: rows of all seeds pooled, paired bootstrap over pictures; p two-sided, for",
        "other pictures with these seeds; p (seeds): for other seeds, a paired t-test over the seeds.",
    ]
    return lines


def group_table(found: StudyResults, group: Compared) -> Table:
    """Return the table of one group, an arm a line."""
    rows = []
    for arm in _arms(found, group):
        runs = arm.runs
        one = group.differences.get(arm.name)
        reference = arm.name == group.reference
        rows.append(
            (
                arm.name,
                arm.description or NOTHING,
                count(_mean([run.parameters for run in runs]) or arm.planned_parameters),
                f"{_mean([run.row_visits for run in runs]):,.0f}" if runs else NOTHING,
                duration(_mean([run.seconds for run in runs])) if runs else NOTHING,
                str(len(runs)),
                _spread(arm.accuracy),
                points(arm.drop_interval),
                "reference" if reference else points(one.interval if one else None),
                _p(one.p if one else None),
                _p(one.seeds_p if one else None),
            )
        )
    told = ("exact match", "drop", "difference", "p", "p (seeds)")
    head = ("arm", "what", "params", "row visits", "time", "seeds", *told)
    return Table(head=head, rows=tuple(rows), left=2)


def task_table(found: StudyResults) -> Table:
    """Return exact match per task of every arm that was run."""
    shown = [arm for arm in found.arms if arm.tasks and arm.same_as is None]
    tasks = sorted({task for arm in shown for task in arm.tasks})
    rows = [(arm.name, *(_spread(arm.tasks.get(task)) for task in tasks)) for arm in shown]
    return Table(head=("arm", *tasks), rows=tuple(rows))


def provenance(found: StudyResults) -> Table:
    """Return command, data, machine and versions."""
    machine = found.environment
    parts = [machine.cpu, machine.cores and f"{machine.cores} cores", size(machine.memory) + " RAM", machine.gpu]
    rows = [
        ("command", f"`{found.command}`" if found.command else NOTHING),
        ("data", f"{found.data}: " + ", ".join(f"{n:,} {split}" for split, n in found.rows.items())),
        (
            "hashes",
            f"model {found.model_fingerprint}, data {found.data_fingerprint}" if found.data_fingerprint else NOTHING,
        ),
        ("machine", ", ".join(part for part in parts if part)),
        ("versions", ", ".join(f"{name} {version}" for name, version in machine.versions.items())),
        ("measured", machine.created),
    ]
    return Table(head=("", ""), rows=tuple(row for row in rows if row[1] != NOTHING), left=2)


def terminal(found: StudyResults) -> list[RichTable]:
    """Return the terminal view: a table per group."""
    shown = ("arm", "params", "seeds", "exact match", "drop", "difference", "p", "p (seeds)")
    return [group_table(found, group).rich(group.title, shown) for group in found.groups]


def _notes(found: StudyResults, group: Compared) -> list[str]:
    """Return what a table cannot say: row visits, skipped, failed and shared arms."""
    lines = []
    if group.row_visits:
        low, high = group.row_visits
        apart = high / low - 1 if low else float(high > 0)
        told = f"from {low:,} to {high:,}"
        same = f"are equal within {100 * apart:.1f} %" if apart <= EQUAL else f"**differ by {100 * apart:.1f} %**"
        lines.append(f"- Row visits {same} ({told}).")
    for arm in _arms(found, group):
        if arm.reason:
            lines.append(f"- `{arm.name}` was skipped: {_line(arm.reason)}")
        if arm.same_as:
            lines.append(f"- `{arm.name}` has the recipe of `{arm.same_as}`; it was run once.")
        lines += [f"- `{arm.name}`, seed {seed}, failed: {_line(why)}" for seed, why in sorted(arm.failures.items())]
    return lines + [f"- {note}" for note in group.notes]


def plot(found: StudyResults, group: Compared, path: Path) -> None:
    """Draw a group: a curve of exact match where its arms have numbers, else drops with intervals, an arm a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = _arms(found, group, finished=True)
    curve = bool(group.x) and len(arms) > 1
    height = 4.2 if curve else 1.5 + 0.36 * len(arms)
    figure, axes = pyplot.subplots(figsize=(8, height), layout="constrained")
    (_curve if curve else _dots)(axes, found, group, arms)
    axes.set_title(group.title, fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def _dots(axes: Any, found: StudyResults, group: Compared, arms: Sequence[Arm]) -> None:
    """Draw drops with intervals, the first arm on top; each seed is a small dot."""
    for place, arm in enumerate(reversed(arms)):
        told = arm.drop_interval
        assert told is not None
        colour = REFERENCE if arm.name == group.reference else ARM
        axes.scatter([100 * run.drop for run in arm.runs], [place - 0.22] * len(arm.runs), s=12, color=SEED)
        low, high = (told.mean if end is None else end for end in (told.low, told.high))
        errors = [[100 * (told.mean - low)], [100 * (high - told.mean)]]
        axes.errorbar(100 * told.mean, place, xerr=errors, fmt="o", color=colour, capsize=3, markersize=6, zorder=3)
        if arm.name == group.reference:
            axes.axvline(100 * told.mean, color=colour, linestyle=":", linewidth=1, zorder=1)
    axes.axvline(0, color=TEACHER, linewidth=1, zorder=1)
    axes.set_yticks(range(len(arms)), [arm.name for arm in reversed(arms)], fontsize=9)
    axes.set_ylim(-0.6, len(arms) - 0.4)
    axes.set_xlabel("drop against the teacher, points (95 % interval; small: seeds; orange: reference)", fontsize=9)
    axes.grid(axis="x", alpha=0.3)


def _curve(axes: Any, found: StudyResults, group: Compared, arms: Sequence[Arm]) -> None:
    """Draw exact match over the arms' numbers, on a logarithmic axis if all are above 0; each seed is a small dot."""
    from matplotlib import ticker

    order = sorted(arms, key=lambda arm: group.x[arm.name])
    xs = [group.x[arm.name] for arm in order]
    for arm, x in zip(order, xs, strict=True):
        axes.scatter([x] * len(arm.runs), [100 * run.accuracy for run in arm.runs], s=9, color=SEED, zorder=5)
    means = [100 * arm.accuracy.mean for arm in order if arm.accuracy]
    errors = [100 * (arm.accuracy.sd or 0.0) for arm in order if arm.accuracy]
    axes.errorbar(xs, means, yerr=errors, fmt="o-", color=ARM, capsize=3, zorder=3, label="mean ± SD over seeds")
    for arm, x in zip(order, xs, strict=True):
        if arm.name == group.reference and arm.accuracy:
            axes.plot([x], [100 * arm.accuracy.mean], "o", color=REFERENCE, zorder=4, label="reference")
    if found.teacher:
        axes.axhline(100 * found.teacher.mean, color=TEACHER, linestyle=":", label="teacher")
    axes.set_xscale("log" if min(xs) > 0 else "linear")
    axes.set_xticks(xs, [f"{x:,g}" if x < 1000 else f"{x:,.0f}" for x in xs], fontsize=9)
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xlabel(group.x_label, fontsize=9)
    axes.set_ylabel("exact match (%)", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _arms(found: StudyResults, group: Compared, finished: bool = False) -> list[Arm]:
    """Return the arms of a group in order, all or those with a finished run."""
    by_name = {arm.name: arm for arm in found.arms}
    return [by_name[name] for name in group.arms if not finished or by_name[name].runs]


def _plot_name(found: StudyResults, number: int, group: Compared) -> str:
    slug = "-".join("".join(sign if sign.isalnum() else " " for sign in group.title.lower()).split())
    return f"{found.name}-{number:02d}-{slug}.png"


def _spread(one: Spread | None) -> str:
    if one is None:
        return NOTHING
    return f"{100 * one.mean:.1f}" + ("" if one.sd is None else f" ± {100 * one.sd:.1f}")


def _p(p: float | None) -> str:
    if p is None:
        return NOTHING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _line(text: str) -> str:
    return " ".join(text.split())
