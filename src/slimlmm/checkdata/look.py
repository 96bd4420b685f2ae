"""What one picture file is: read once, hashed once, decoded once, and only where its header says that this is safe.

This module imports nothing heavy: processes of a pool start with it.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from slimlmm.data import MAX_PIXELS

#: files beyond this are not read
MAX_BYTES = 1 << 30
#: formats that PIL hands to other programs or that are no rasters; they are not decoded
SCRIPTS = frozenset(["EPS", "WMF", "EMF", "PDF", "MPEG"])
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
#: starts of files that are no pictures, as bytes in lower case, and what to call them
KNOWN = (
    (b"<svg", "an SVG drawing"),
    (b"version https://git-lfs", "a Git LFS pointer: the picture itself was not downloaded"),
    (b"<!doctype html", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"%pdf-", "a PDF"),
    (b"%!ps", "PostScript"),
    (b"ftyphei", "HEIC"),
    (b"pk\x03\x04", "a ZIP archive"),
)
#: what makes a picture a file of another kind too
FOREIGN = ((b"%PDF-1", "PDF"), (b"<?php", "PHP"), (b"<script", "script"), (b"<html", "HTML"))


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen of one picture; `fault` is the kind of finding that kept it from being decoded, "" where nothing did."""

    fault: str = ""
    detail: str = ""
    place: str = ""
    """kind of finding about its path, "" for a plain path inside the data folder"""
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
    foreign: str = ""
    hash: int | None = None
    """64-bit difference hash, None where the picture is flat or was not decoded"""


def look(source: Path | bytes, root: Path, max_pixels: int) -> Look:
    """Look at one picture: a path, whose place is judged against the data folder `root`, or encoded bytes."""
    if isinstance(source, bytes):
        return _decoded(source, "", max_pixels)
    place = place_of(source, root)
    try:
        status = source.stat()
    except OSError as error:
        dangling = "a link to nothing" if source.is_symlink() else str(error.strerror)
        return Look("missing picture", dangling, place)
    except ValueError as error:  # a null character in a path
        return Look("missing picture", str(error))
    if not stat.S_ISREG(status.st_mode):
        return Look("not a file", "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or device", place)
    if status.st_size > MAX_BYTES:
        return Look("enormous picture", f"{status.st_size:,} bytes", place, size=status.st_size)
    try:
        return _decoded(source.read_bytes(), place, max_pixels)
    except OSError as error:
        return Look("missing picture", str(error.strerror), place)


def place_of(path: Path, root: Path) -> str:
    """Return the kind of finding that the path of a picture is, "" for a file of the data folder itself."""
    try:
        plain, base, real, real_base = map(os.fspath, _both(path, root))
    except ValueError:
        return ""
    if not _inside(plain, base):
        return "escaping path" if ".." in path.parts else "absolute path"
    if not _inside(real, real_base):
        return "escaping path"
    return "" if real[len(real_base) :] == plain[len(base) :] else "linked picture"


def _both(path: Path, root: Path) -> tuple[str, str, str, str]:
    return os.path.abspath(path), os.path.abspath(root), os.path.realpath(path), os.path.realpath(root)


def _inside(path: str, base: str) -> bool:
    return path.startswith(base.rstrip(os.sep) + os.sep)


def _decoded(raw: bytes, place: str, max_pixels: int) -> Look:
    """Look at the bytes of a file."""
    sha = hashlib.sha256(raw).digest()

    def refused(fault: str, detail: str) -> Look:
        return Look(fault, detail, place, sha, len(raw))

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(raw)) as picture:
                kind, pixels = picture.format or "", picture.width * picture.height
                if kind in SCRIPTS:
                    return refused("not a picture", f"{kind}, which is not decoded here")
                if pixels > max_pixels or pixels > MAX_PIXELS:
                    fault = "enormous picture" if pixels > MAX_PIXELS else "large picture"
                    return refused(fault, f"{picture.width}x{picture.height}, {pixels:,} pixels")
                return _facts(picture, raw, place, sha)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return refused("enormous picture", _first(error))
    except UnidentifiedImageError:
        return refused("not a picture", named(raw))
    except Exception as error:  # decoders raise anything on broken files
        return refused("broken picture", _first(error))


def _facts(picture: Image.Image, raw: bytes, place: str, sha: bytes) -> Look:
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
        place,
        sha,
        len(raw),
        kind,
        mode,
        width,
        height,
        _transparent(picture),
        animated,
        rotation if rotation in TURNED else 1,
        foreign_of(raw),
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


def named(raw: bytes) -> str:
    """Return what a file that no decoder knows looks like."""
    if not raw:
        return "an empty file"
    head = raw[:1024].lower()
    return next((name for start, name in KNOWN if start in head), "an unknown format")


def foreign_of(raw: bytes) -> str:
    """Return what else than a picture a file is, "" for nothing: a ZIP archive at its end, or script or PDF inside."""
    found = [name for mark, name in FOREIGN if mark in raw]
    at = raw.rfind(b"PK\x05\x06", -65_557)
    if at >= 0 and len(raw) >= at + 22 and at + 22 + int.from_bytes(raw[at + 20 : at + 22], "little") == len(raw):
        found.append("ZIP")
    return " and ".join(found)


def _first(error: BaseException) -> str:
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__)[:120]
