"""The verbs `verify` and `convert`: a folder held against its certificate; pickled weights into safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from slimlmm.errors import UserError

if TYPE_CHECKING:  # a command line that shows its help loads no torch
    from slimlmm.certificate import Verdict
    from slimlmm.converting import Converted

VERIFY = "Example: `slimlmm verify runs/mine/final --json`"
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
