"""The verbs `verify`, `reproduce`, `convert`: a folder against its certificate, a run against itself, pickles made plain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from slimlmm.errors import UserError
from slimlmm.leaving import heeding

if TYPE_CHECKING:  # a command line that shows its help loads no torch
    from slimlmm.certificate import Verdict
    from slimlmm.converting import Converted
    from slimlmm.reproducing import Reproduction

VERIFY = "Example: `slimlmm verify runs/mine/final --json`"
REPRODUCE = "Example: `slimlmm reproduce runs/mine --out runs/again`"
CONVERT = "Example: `slimlmm convert path/to/pickled path/to/plain`"
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a model, such as RUN/final.")],
    rows: Annotated[int | None, typer.Option(min=1, help="Certified questions to ask again; all by default.")] = None,
    without_certificate: Annotated[
        bool,
        typer.Option(
            "--without-certificate",
            help="Be content with a folder that has no certificate.json: kinds of files and loading are checked, hashes and "
            "answers cannot be. Else such a folder fails.",
        ),
    ] = False,
    json_out: Json = False,
) -> None:
    """Check a model's files, stock loading, parameters and answers against its certificate; exit code 2 names each failure."""
    from slimlmm import certificate

    found = certificate.verify(folder, count=rows, without=without_certificate)
    if json_out:
        print(found.model_dump_json(indent=1))
    else:
        Console().print(verdict(found), highlight=False)
    if failures := found.failures:
        failed = sum(bool(check.failures) for check in found.checks)
        raise UserError(f"{folder}: {failed} of {len(found.checks)} checks failed:\n  " + "\n  ".join(failures))


def verdict(found: Verdict) -> Table:
    """Return the terminal view of what `verify` found."""
    sha256 = f"certificate.json: sha256 {found.sha256}" if found.sha256 else "without a certificate"
    table = Table(title=escape(found.folder), caption=sha256, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in ("check", "", "found"):
        table.add_column(head)
    for check in found.checks:
        more = f" (and {len(check.failures) - 1} more)" if len(check.failures) > 1 else ""
        said = check.failures[0] + more if check.failures else check.said
        table.add_row(check.name, "FAILED" if check.failures else "ok", escape(said))
    return table


def reproduce(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run of compress.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write the new run into.")],
    model: Annotated[str | None, typer.Option("--model", help="Where the model lies now, if not where it did.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Where the rows lie now, if not where they did.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    json_out: Json = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run model code from the hub, as that run did. Off: refused.")
    ] = False,
) -> None:
    """Make a finished run again from its own folder and compare: files to the byte, answers, results, machine.

    Exit code 2 where the accuracy is another, or where bits differ though machine and versions do not (on a CPU).
    """
    from slimlmm import reproducing
    from slimlmm.progress import reporter

    with heeding(), reporter(quiet) as tell:
        found = reproducing.reproduce(
            run, out, model=model, source=data, trust_remote_code=trust_remote_code, tell=tell
        )
    if json_out:
        print(found.model_dump_json(indent=1))
    else:
        Console().print(reproduced(found), highlight=False)
    if found.failed:
        raise UserError(
            f"{run}: was not reproduced ({found.outcome}); {out}/{reproducing.RECORD} has every difference."
        )


def reproduced(found: Reproduction) -> Table:
    """Return the terminal view of a reproduction."""
    told = {
        "machine, versions, cache": [f"{one.what}: {one.first} then, {one.again} now" for one in found.machine],
        "files of final/": [one.what for one in found.files],
        "answers": [f"{count} rows in {name}" for name, count in found.answers.items() if count],
        "results": [f"{one.what}: {one.first} then, {one.again} now" for one in found.results],
    }
    table = Table(title=f"{escape(found.run)}: {found.outcome}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in ("", "", "what differs"):
        table.add_column(head)
    for name, lines in told.items():
        more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
        table.add_row(name, f"{len(lines)} differ" if lines else "equal", escape("; ".join(lines[:3]) + more))
    mean, ends = found.difference.points().split(" ", 1)
    table.add_row("accuracy", mean, f"points, then minus now, 95 % {ends}")
    return table


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Local folder with pytorch_model.bin, or its index.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    max_shard_size: Annotated[
        str, typer.Option(help="Largest file of weights to write; so much is held in memory.")
    ] = "5GB",
    json_out: Json = False,
) -> None:
    """Write pickled weights as safetensors, bit by bit the same; nothing in them is run, what is more than weights is refused."""
    from slimlmm import converting

    found = converting.convert(source, out, max_shard_size=max_shard_size)
    print(found.model_dump_json(indent=1) if json_out else converted(found))


def converted(found: Converted) -> str:
    """Return in words what `convert` wrote."""
    lines = [
        f"{found.folder}: {found.tensors} tensors in {found.files} file(s), {found.bytes:,} bytes, bit by bit as they were; "
        f"a model of {found.parameters:,} parameters"
    ]
    if found.tied:
        lines.append(f"tied, so written once: {', '.join(found.tied)}")
    if found.left_out:
        lines.append(f"left out, the model has no place for them: {', '.join(found.left_out)}")
    return "\n".join([*lines, *found.notes])
