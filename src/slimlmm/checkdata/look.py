"""What one picture file is: read once, hashed once, decoded once, and only where its header says that this is safe.

This module imports nothing heavy: processes of a pool start with it.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from slimlmm.pictures import USUAL, PictureError, PictureSettings, decoding, file_bytes, is_link, opened

ROTATION = 0x0112
#: values of it that turn or mirror a picture
TURNED = range(2, 9)
#: grey levels by which a cell has to be brighter than its neighbour: in even areas a plain comparison answers by noise alone.
#: Of 800 advertisements, scaled to 3/4 and saved anew as JPEG of quality 60, 98.9 % are found within 2 bits with 3 levels and
#: overlapping cells, 25.6 % with none and cells side by side; the nearest two different ones are 9 bits apart
MARGIN = 3
#: a picture of fewer grey levels has no hash
FLAT = 8
#: JPEG decodes at a fraction of its size; the hash needs no more than this
DRAFT = (72, 64)


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen of one picture; `fault` is the kind of finding that kept it from being decoded, "" where nothing did."""

    fault: str = ""
    detail: str = ""
    sha: bytes = b""
    size: int = 0
    """bytes of the file"""
    format: str = ""
    mode: str = ""
    width: int = 0
    height: int = 0
    transparent: bool = False
    """whether a pixel is not opaque"""
    animated: bool = False
    rotation: int = 1
    """EXIF orientation, 1 for upright"""
    hash: int | None = None
    """64-bit difference hash, None where the picture is flat or was not decoded"""
    linked: bool = False
    """whether its path goes through a link inside the data folder"""


def look(source: Path | bytes, root: Path, max_pixels: int, allowed: PictureSettings = USUAL) -> Look:
    """Look at one picture: a path below the data folder `root`, or encoded bytes.

    One of more than `max_pixels` is not decoded; `allowed` is what the data loader takes.
    """
    if isinstance(source, bytes):
        return _decoded(source, max_pixels, allowed)
    try:
        raw = file_bytes(source, allowed)
    except PictureError as error:
        return Look(error.kind, error.detail)
    return replace(_decoded(raw, max_pixels, allowed), linked=is_link(source, root))


def _decoded(raw: bytes, max_pixels: int, allowed: PictureSettings) -> Look:
    """Look at the bytes of a file."""
    sha = hashlib.sha256(raw).digest()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with opened(raw, allowed) as picture, decoding():
                pixels = picture.width * picture.height
                if pixels > max_pixels:
                    detail = f"{picture.width}x{picture.height}, {pixels:,} pixels"
                    return Look("large picture", detail, sha, len(raw))
                return _facts(picture, len(raw), sha)
    except PictureError as error:
        return Look(error.kind, error.detail, sha, len(raw))


def _facts(picture: Image.Image, size: int, sha: bytes) -> Look:
    """Decode an opened picture and tell what it is."""
    kind, mode, (width, height) = picture.format or "", picture.mode, picture.size
    animated = bool(getattr(picture, "is_animated", False))
    rotation = picture.getexif().get(ROTATION, 1)
    if kind in ("JPEG", "MPO") and mode in ("L", "RGB"):
        picture.draft("L", DRAFT)
    picture.load()
    return Look(
        "",
        "",
        sha,
        size,
        kind,
        mode,
        width,
        height,
        _transparent(picture),
        animated,
        rotation if rotation in TURNED else 1,
        difference_hash(picture),
    )


def _transparent(picture: Image.Image) -> bool:
    """Return whether a pixel of a decoded picture is not opaque."""
    if "transparency" in picture.info and picture.mode in ("1", "L", "P", "RGB"):
        picture = picture.convert("RGBA")
    if not picture.mode.endswith(("A", "a")):
        return False
    lowest = picture.getchannel(len(picture.getbands()) - 1).getextrema()[0]
    return bool(lowest < 255)  # type: ignore[operator]  # one band: two numbers


def difference_hash(picture: Image.Image) -> int | None:
    """Return which of 8 x 8 cells of a picture are brighter than their right neighbour, as 64 bits; None where it is flat.

    The picture is turned as the data loader turns it, made grey and averaged to 9 x 8 cells with soft edges (the dHash of
    N. Krawetz, 2013, but for `MARGIN`), so scaling, recompression and small changes of colour leave nearly all bits as they are.
    """
    upright = ImageOps.exif_transpose(picture)
    grey = upright if upright.mode == "L" else upright.convert("RGB").convert("L")
    cells = np.asarray(grey.convert("F").resize((9, 8), Image.Resampling.BILINEAR))
    if float(cells.max() - cells.min()) < FLAT:
        return None
    return int.from_bytes(np.packbits(cells[:, :-1] - cells[:, 1:] > MARGIN).tobytes(), "big")
