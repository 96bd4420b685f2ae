"""Options of verbs that read DATA without a recipe: which pictures they take (`pictures.PictureSettings`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # a command line that shows its help decodes no pictures
    from slimlmm.pictures import PictureSettings

From = Annotated[
    list[Path] | None,
    typer.Option("--pictures-from", help="Folder outside of DATA that its pictures may lie in; repeat."),
]
MaxPixels = Annotated[
    int,
    typer.Option(
        "--max-picture-pixels", min=1, max=178_956_970, help="Pictures of more pixels are broken rows, not decoded."
    ),
]
USUAL_PIXELS = 50_000_000


def allowed(folders: list[Path] | None, max_pixels: int = USUAL_PIXELS) -> PictureSettings:
    """Return the settings that the two options say."""
    from slimlmm.pictures import PictureSettings

    return PictureSettings(folders=tuple(folders or ()), max_pixels=max_pixels)
