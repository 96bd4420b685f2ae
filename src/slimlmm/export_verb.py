"""The verb `export`: another runtime or 8 bits for a checkpoint, and what its check found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from slimlmm import picture_options

if TYPE_CHECKING:  # a command line that shows its help loads no torch
    from slimlmm.exporting.manifest import Manifest

EXAMPLE = "Example: `slimlmm export runs/mine/final --to onnx --int8 --data DATA --out fast`"


def export(
    model: Annotated[str, typer.Argument(help="Local folder or hub id of the model.")],
    to: Annotated[str, typer.Option("--to", help="onnx or openvino; torchao: int8 weights for plain from_pretrained.")],
    data: Annotated[Path, typer.Option("--data", help="Rows that it is checked on: image, question, answer[, task].")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    int8: Annotated[bool, typer.Option("--int8", help="8 bits in place of fp32; torchao is always that.")] = False,
    split: Annotated[str, typer.Option(help="Rows to check on: train, validation or test.")] = "test",
    rows: Annotated[int, typer.Option(min=1, help="Most rows, whole pictures, seeded.")] = 500,
    max_drop: Annotated[float, typer.Option(help="Points of accuracy that may be lost; more is refused.")] = 0.5,
    calls: Annotated[int, typer.Option(min=1, help="Rows timed one at a time, in turns with the source.")] = 50,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of one operation, for both.")] = None,
    pictures_from: picture_options.From = None,
    max_picture_pixels: picture_options.MaxPixels = picture_options.USUAL_PIXELS,
    seed: Annotated[int, typer.Option("--seed", help="Seed of every random choice.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    json_out: Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")] = False,
) -> None:
    """Write a model for ONNX Runtime, OpenVINO or torchao, checked and timed against the model itself, or refused."""
    from slimlmm.exporting.export import Order
    from slimlmm.exporting.export import export as run
    from slimlmm.progress import reporter

    order = Order(
        target=to,
        out=out,
        int8=int8,
        split=split,
        rows=rows,
        max_drop=max_drop,
        calls=calls,
        threads=threads,
        seed=seed,
        allowed=picture_options.allowed(pictures_from, max_picture_pixels),
    )
    with reporter(quiet) as tell:
        found = run(model, data, order, tell)
    if json_out:
        print(found.model_dump_json(indent=1))
    else:
        Console().print(view(found, out), highlight=False)


def view(found: Manifest, out: Path) -> Table:
    """Return the terminal view of an export."""
    check, time = found.check, found.check.latency
    table = Table(title=f"{out}: {found.target}, {found.how}", caption=_caption(found))
    for head in ("figure", "source", "export", "difference"):
        table.add_column(head, justify="left" if head == "figure" else "right")
    first, second = (100 * one.overall.accuracy for one in (check.source, check.export))
    gained = f"{(-check.drop).points(1)} points"
    table.add_row(f"exact match, {check.n} {check.split} rows, %", f"{first:.1f}", f"{second:.1f}", gained)
    alike = f"{100 * check.agreement:.1f} % alike"
    table.add_row("largest first-token logit", f"{check.logits_scale:.3g}", "", f"{check.logits_max:.2g}, {alike}")
    p50 = [f"{1e3 * one.p50:.1f}" for one in (time.first, time.second)]
    table.add_row("latency p50, ms (batch 1)", *p50, f"{time.ratio:.2f}x faster")
    table.add_row("latency p95, ms", *(f"{1e3 * one.p95:.1f}" for one in (time.first, time.second)), "")
    table.add_row("bytes on disk", f"{found.source_bytes:,}", f"{found.bytes:,}", "")
    return table


def _caption(found: Manifest) -> str:
    versions = ", ".join(f"{name} {one}" for name, one in found.libraries.items())
    return f"{found.threads} thread(s), {found.check.latency.first.n} calls each, in turns; {versions}"
