"""What people read of a run: the Markdown page (model card), the plot of the rounds, terminal tables.

Everything here is drawn from `Results` alone; what is null shows as "-".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from rich import box
from rich.markup import escape
from rich.table import Table as RichTable

from slimlmm.evaluate import Interval, Score
from slimlmm.files import write_text
from slimlmm.measure import Comparison
from slimlmm.results import Model, Promise, Results

NOTHING = "-"
#: what the terminal shows of the rounds; the page shows all
ROUNDS = ("round", "cut", "params", "after cut", "recovered", "time")
#: field of a round, label, marker and colour in the plot
MARKS = (
    ("after_cut", "after cut and repair", "v", "tab:red"),
    ("after_recovery", "after recovery", "o", "tab:blue"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Cells to be shown: the first `left` columns aligned to the left, the others to the right."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1

    def rich(self, title: str, columns: Sequence[str] = ()) -> RichTable:
        """Return the table for the terminal, with all columns or only these (80 characters hold few)."""
        shown = RichTable(title=escape(title), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        picked = [index for index, name in enumerate(self.head) if name in (columns or self.head)]
        for index in picked:
            shown.add_column(self.head[index], justify="left" if index < self.left else "right")
        for row in self.rows:
            shown.add_row(*(escape(row[index]) for index in picked))
        return shown

    def markdown(self) -> str:
        """Return the table as Markdown."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

        rule = "|" + "|".join("---" if index < self.left else "---:" for index in range(len(self.head))) + "|"
        return "\n".join([line(self.head), rule, *map(line, self.rows)])


def write(results: Results, folder: str | Path) -> Path:
    """Write ``README.md`` (model card, tables) and, if there are rounds, ``rounds.png``; return the page."""
    folder = Path(folder)
    if results.rounds:
        plot_rounds(results, folder / "rounds.png")
    page = folder / "README.md"
    write_text(page, markdown(results))
    return page


def markdown(results: Results) -> str:
    """Return the Markdown page of a run."""
    loader = jinja2.PackageLoader("slimlmm", "templates")
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.globals.update(
        count=count, times=times, points=points, percent=percent, scored=scored, promised=promised
    )
    accuracy = results.student.accuracy if results.student else None
    text: str = environment.get_template("model_card.md.j2").render(
        r=results,
        limit=accuracy.max_new_tokens if accuracy else 32,
        cost=cost_table(results),
        tasks=task_table(results) if results.teacher.accuracy else None,
        rounds=rounds_table(results),
        controls=controls_table(results),
        provenance=provenance_table(results),
    )
    return text


def final_table(results: Results) -> RichTable:
    """Return the table that ends a run in the terminal: teacher, student and ratio, then accuracy."""
    title = f"{results.teacher.name} -> {results.student.name}" if results.student else results.teacher.name
    shown = cost_table(results).rich(title)
    shown.add_section()
    for row in task_table(results).rows[-1:] if results.teacher.accuracy else ():
        name, _, teacher, student, change = row
        shown.add_row(f"exact match, {name}, %", teacher, student, change)
    if results.effect:
        shown.add_row("same answer (%)", NOTHING, NOTHING, percent(results.effect.agreement))
    shown.caption = promised(results.promise)
    return shown


def promised(promise: Promise | None) -> str | None:
    """Return the verdict on the promised accuracy as a sentence, None where nothing was promised."""
    if promise is None:
        return None
    by_verdict = {
        verdict: [name for name, found in promise.tasks.items() if found == verdict]
        for verdict in ("broken", "undecided")
    }
    tasks = "; ".join(f"{verdict} in {', '.join(names)}" for verdict, names in by_verdict.items() if names)
    spared = ", ".join(promise.spared)
    told = f"; {spared} spared, which may lose any" if spared else ""
    return (
        f"Promise of at most {100 * promise.margin:g} points, on test rows: {promise.overall}. "
        f"At most {100 * promise.task_margin:g} points in {'any other' if spared else 'any'} task: "
        f"{tasks or ('kept in all' if promise.tasks else 'there is none')}{told}."
    )


def cost_table(results: Results) -> Table:
    """Return parameters, bytes, FLOPs, times and memory of teacher and student, with their ratios."""
    a, b, r = results.teacher, results.student, results.ratios
    rows = [_parameters_row(name, a, b) for name in ("total", *(part for part in a.parameters if part != "total"))]
    rows += [
        ("bytes on disk", *_pair(a, b, "disk_bytes"), times(r.disk if r else None)),
        (_flops_label(a), *_pair(a, b, "flops"), times(r.flops if r else None)),
        *_time_rows(results.latency, results.throughput),
        ("peak memory", size(_peak(a)), size(_peak(b)), times(r.memory if r else None)),
    ]
    shown = [row for row in rows if row[1] != NOTHING or row[2] != NOTHING]
    return Table(head=("", "teacher", "student", "ratio"), rows=tuple(shown))


def task_table(results: Results) -> Table:
    """Return exact match per task with standard errors, drops with intervals; the last row is all rows."""
    teacher = results.teacher.accuracy
    student = results.student.accuracy if results.student else None
    effect = results.effect
    rows = []
    for task, one in teacher.tasks.items() if teacher else ():
        other = student.tasks.get(task) if student else None
        change = effect.drop_tasks.get(task) if effect else None
        rows.append((task, str(one.n), scored(one), scored(other), points(change)))
    if teacher:
        whole = student.overall if student else None
        last = points(effect.drop if effect else None)
        rows.append(("all rows", str(teacher.overall.n), scored(teacher.overall), scored(whole), last))
    return Table(head=("task", "n", "teacher", "student", "drop"), rows=tuple(rows))


def rounds_table(results: Results) -> Table:
    """Return one line per round: what was cut, parameters, validation accuracy, cost of its training."""
    rows = [
        (
            f"{one.number} {one.stage}.{one.round}" + (" half" if one.half else ""),
            ",\n".join(f"{axis} {one.before[axis]}→{size}" for axis, size in one.after.items()),
            one.criterion or NOTHING,
            count(one.parameters),
            scored(one.after_cut),
            scored(one.after_recovery) + ("" if one.kept_promise else "\nrolled back"),
            f"{one.losses['total']:.3f}" if "total" in one.losses else NOTHING,
            f"{one.row_visits:,}",
            duration(one.seconds),
        )
        for one in results.rounds
    ]
    head = ("round", "cut", "criterion", "params", "after cut", "recovered", "loss", "row visits", "time")
    return Table(head=head, rows=tuple(rows), left=3)


def controls_table(results: Results) -> Table:
    """Return the control arms with their accuracy and how far they are behind the student."""
    rows = [
        (one.name, one.description, count(one.parameters), scored(one.accuracy.overall), points(one.behind))
        for one in results.controls
    ]
    return Table(head=("arm", "how", "params", "exact match", "behind"), rows=tuple(rows), left=2)


def provenance_table(results: Results) -> Table:
    """Return machine, versions, data, seed and the cost of the run."""
    environment, data, totals = results.environment, results.data, results.totals
    machine = [
        environment.cpu,
        environment.cores and f"{environment.cores} cores",
        size(environment.memory) + " RAM",
    ]
    rows = [
        ("data", f"{data.name}: " + ", ".join(f"{n:,} {split}" for split, n in data.rows.items())),
        ("remote code", results.remote_code or NOTHING),
        ("data hash", data.fingerprint or NOTHING),
        ("seed", str(results.seed)),
        ("choice of sizes, rounds and tests took", duration(totals.seconds) if totals else NOTHING),
        ("row visits", f"{totals.row_visits:,}" if totals else NOTHING),
        ("training FLOPs", quantity(totals.flops if totals else None)),
        ("machine", ", ".join(part for part in (*machine, environment.gpu) if part)),
        ("versions", ", ".join(f"{name} {found}" for name, found in environment.versions.items())),
        ("commit", environment.git or NOTHING),
        ("measured", environment.created),
    ]
    return Table(head=("", ""), rows=tuple(row for row in rows if row[1] != NOTHING), left=2)


def plot_rounds(results: Results, path: str | Path) -> None:
    """Draw validation accuracy after cut and recovery against parameters (log, falling to the right)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(*_path(results), color="0.75", linewidth=1, zorder=1)
    for part, label, marker, colour in MARKS:
        found = [(one.parameters, score) for one in results.rounds if (score := getattr(one, part))]
        if found:
            values, errors = zip(*((100 * score.accuracy, 100 * error(score)) for _, score in found), strict=True)
            xs = [x for x, _ in found]
            axes.errorbar(xs, values, yerr=errors, fmt=marker, color=colour, label=label, capsize=2)
    if results.teacher.validation:
        axes.axhline(100 * results.teacher.validation.accuracy, color="0.4", linestyle=":", label="teacher")
    axes.set_xscale("log")
    axes.invert_xaxis()
    labels = [f"{count(one.parameters)}\n{one.stage}.{one.round}" for one in results.rounds]
    axes.set_xticks([one.parameters for one in results.rounds], labels, fontsize=7, rotation=30)
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set(xlabel="parameters", ylabel="validation exact match (%)", ylim=(0, 105))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def count(n: float | None) -> str:
    """Return a number of parameters in three digits: 1.31 M."""
    if n is None:
        return NOTHING
    for limit, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if n >= limit:
            return f"{n / limit:.3g}{unit}"
    return f"{n:.0f}"


def quantity(n: float | None) -> str:
    """Return a large number in three digits with an SI prefix: 1.31 G."""
    if n is None:
        return NOTHING
    for limit, unit in ((1e18, " E"), (1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M")):
        if n >= limit:
            return f"{n / limit:.3g}{unit}"
    return f"{n:.0f}"


def size(n: float | None) -> str:
    """Return bytes in MB or GB (powers of ten)."""
    if n is None:
        return NOTHING
    return f"{n / 1e9:.3g} GB" if n >= 1e9 else f"{n / 1e6:.3g} MB"


def seconds(s: float | None) -> str:
    """Return a short time in ms or s."""
    if s is None:
        return NOTHING
    return f"{s:.2f} s" if s >= 1 else f"{1000 * s:.1f} ms"


def duration(s: float) -> str:
    """Return a long time in s, min or h."""
    if s < 120:
        return f"{s:.0f} s"
    return f"{s / 60:.1f} min" if s < 7200 else f"{s / 3600:.1f} h"


def times(ratio: float | None) -> str:
    """Return a ratio: 18.2x."""
    return NOTHING if ratio is None else f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.1f}x"


def percent(share: float) -> str:
    """Return a share in per cent with one decimal."""
    return f"{100 * share:.1f}"


def points(interval: Interval | None) -> str:
    """Return a difference of shares in points with its interval: +0.42 [-0.10, +0.95]."""
    return NOTHING if interval is None else interval.points()


def scored(score: Score | None) -> str:
    """Return accuracy in per cent with one standard error (over pictures, where there are several)."""
    return NOTHING if score is None else f"{100 * score.accuracy:.1f} ± {100 * error(score):.1f}"


def error(score: Score) -> float:
    """Return the standard error over pictures, or over rows if there is only one picture."""
    return score.se if score.clustered_se is None else score.clustered_se


def _parameters_row(part: str, a: Model, b: Model | None) -> tuple[str, str, str, str]:
    """Return one line of parameters."""
    mine, other = a.parameters.get(part, 0), (b.parameters.get(part, 0) if b else None)
    label = "parameters" if part == "total" else f"- {part}"
    return (label, count(mine), count(other), times(mine / other if other else None))


def _pair(a: Model, b: Model | None, name: str) -> tuple[str, str]:
    """Return one measured attribute of both models as text."""
    show = size if name == "disk_bytes" else quantity
    return show(getattr(a, name)), show(getattr(b, name) if b else None)


def _flops_label(model: Model) -> str:
    """Return what the FLOPs are of."""
    tokens, prompt = model.flops_answer_tokens, model.flops_prompt_tokens
    if tokens and prompt:
        return f"FLOPs, {prompt} tokens in, {tokens} out"
    return f"FLOPs, {tokens}-token answer" if tokens else "FLOPs per answer"


def _peak(model: Model | None) -> int | None:
    """Return the peak memory, if it was measured."""
    return model.memory.peak if model and model.memory else None


def _time_rows(latency: Comparison | None, throughput: Comparison | None) -> list[tuple[str, str, str, str]]:
    """Return the lines of latency and throughput."""
    rows = []
    if latency:
        a, b = latency.first, latency.second
        rows.append(("latency p50, batch 1", seconds(a.p50), seconds(b.p50), times(latency.ratio)))
        rows.append(("latency p95, batch 1", seconds(a.p95), seconds(b.p95), times(a.p95 / b.p95)))
    if throughput:
        a, b = throughput.first, throughput.second
        label = f"rows/s, batch {a.batch_size}"
        rows.append((label, f"{a.rows_per_second:.1f}", f"{b.rows_per_second:.1f}", times(throughput.ratio)))
    return rows


def _path(results: Results) -> tuple[list[float], list[float]]:
    """Return the line from the teacher through cuts and recoveries in order: parameters, per cent."""
    rounds = [one for one in results.rounds if one.kept_promise] or results.rounds[:1]
    points = [(rounds[0].parameters_before, results.teacher.validation)]
    points += [(one.parameters, score) for one in rounds for score in (one.after_cut, one.after_recovery)]
    known = [(float(x), 100 * score.accuracy) for x, score in points if score is not None]
    return [x for x, _ in known], [y for _, y in known]
