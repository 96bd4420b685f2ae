"""The verb `check-data`: what is wrong with data before anything is trained on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from slimlmm import picture_options

EXAMPLE = "Example: `slimlmm check-data DATA --model MODEL`"
Source = Annotated[
    Path, typer.Argument(metavar="DATA", help="Folder or file of rows: image, question, answer[, task].")
]
Model = Annotated[
    str | None, typer.Option("--model", help="Folder or hub id: also count its tokens and run it on a few rows.")
]
MaxPixels = Annotated[int, typer.Option(min=1, help="Pictures of more pixels are findings, and are not decoded.")]
Near = Annotated[
    int, typer.Option(min=0, max=16, help="Bits of 64 in which hashes of similar pictures differ at most.")
]
MaxAnswer = Annotated[int, typer.Option(min=1, help="Longest answer: in tokens, without --model in words.")]
Rows = Annotated[int, typer.Option(min=1, help="Rows that are run through the model.")]


def check_data(
    source: Source,
    model: Model = None,
    max_pixels: MaxPixels = picture_options.USUAL_PIXELS,
    pictures_from: picture_options.From = None,
    max_picture_pixels: picture_options.MaxPixels = picture_options.USUAL_PIXELS,
    near: Near = 2,
    max_answer: MaxAnswer = 128,
    rows: Rows = 16,
    seed: Annotated[int, typer.Option("--seed", help="Seed of every random choice.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    json_out: Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run model code from the hub. Off: stock classes only.")
    ] = False,
) -> None:
    """Check data before training: pictures, leaks, answers, and with --model what is trained on; exit code 2 on errors."""
    from slimlmm.checkdata.check import Limits, check
    from slimlmm.checkdata.view import view
    from slimlmm.progress import reporter

    allowed = picture_options.allowed(pictures_from, max_picture_pixels)
    limits = Limits(max_pixels=max_pixels, near=near, max_answer=max_answer, rows=rows, seed=seed, allowed=allowed)
    with reporter(quiet) as tell:
        found = check(source, model, limits, trust_remote_code=trust_remote_code, tell=tell)
    if json_out:
        print(found.model_dump_json(indent=1))
    else:
        Console().print(view(found), highlight=False)
    if found.errors:
        raise typer.Exit(2)
