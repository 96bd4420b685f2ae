"""Draw the table of this folder's README from the results of a run, and keep those results beside it.

    python benchmarks/peers/table.py runs/peers

Without a run it draws the table from the results that are kept here.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from arms import ARMS, HERE
from run import Result

from slimlmm.errors import UserError

RESULTS = HERE / "results"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def main() -> None:
    for path in map(Path, sys.argv[1:2]):
        keep(path)
    text, page = table(kept()), HERE / "README.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")


def keep(run: Path) -> None:
    """Copy the results of a run into this folder."""
    found = [run / f"{name}.json" for name in ARMS if (run / f"{name}.json").exists()]
    if not found:
        raise UserError(f"{run} holds no result of an arm.")
    RESULTS.mkdir(exist_ok=True)
    for path in found:
        shutil.copyfile(path, RESULTS / path.name)


def kept() -> list[Result]:
    """Return the results in this folder, in the order of the arms."""
    return [Result.load(RESULTS / f"{name}.json") for name in ARMS if (RESULTS / f"{name}.json").exists()]


def table(results: list[Result]) -> str:
    """Return the table, then what each peer could not do and what else it said, as Markdown."""
    lines = [
        "| arm | how | parameters | row visits | exact match, test rows | behind ours, points | thread-minutes |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    lines += [_row(one) for one in results]
    if results:
        one = results[0].machine
        lines += ["", f"{one.cpu}, {one.cores} cores, {results[0].threads} thread(s) an arm; {one.created[:10]}."]
    for title, what in (("Could not", "could_not"), ("Notes", "notes")):
        said = [f"- `{one.arm}`: {text}" for one in results for text in getattr(one, what)]
        lines += ["", f"{title}:", "", *said] if said else []
    versions = [f"`{one.arm}`: {', '.join(f'{k} {v}' for k, v in one.versions.items())}" for one in results]
    lines += ["", "Versions: " + "; ".join(versions) + "."] if versions else []
    return "\n".join(lines) + "\n"


def _row(one: Result) -> str:
    score, gap = one.accuracy.overall, one.behind
    error = score.clustered_se if score.clustered_se is not None else score.se
    behind = "" if gap is None else f"{100 * gap.mean:.1f} [{', '.join(f'{100 * end:.1f}' for end in gap.ends)}]"
    exact = f"{100 * score.accuracy:.1f} ± {100 * error:.1f} % of {score.n:,}"
    times = f"{one.cpu_seconds / 60:,.0f}"
    told = one.told.replace("|", "\\|")  # in a cell it would end it
    return f"| `{one.arm}` | {told} | {one.parameters:,} | {one.row_visits:,} | {exact} | {behind} | {times} |"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"table: {error}", file=sys.stderr)
        sys.exit(2)
