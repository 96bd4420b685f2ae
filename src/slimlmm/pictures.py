"""Picture files from anywhere: which are read and decoded, and why another is not; nothing that a file holds is trusted.

One set of limits (`PictureSettings`) and one way (`place_of`, `file_bytes`, `opened`, `decoding`) for whoever reads a picture:
the data loader, the checks of data, the gateway. This module imports nothing heavy: processes of a pool start with it.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field

from slimlmm.settings import Settings

#: pictures beyond this many pixels are refused before they are decoded, unless otherwise said
MAX_PIXELS = 50_000_000
#: what Pillow itself refuses, whatever is allowed
PILLOW_PIXELS = 178_956_970
#: rasters that can be allowed; what Pillow gives to other programs (EPS to Ghostscript, WMF) or what is no raster cannot
Format = Literal["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "TGA", "JPEG2000"]
FORMATS: tuple[Format, ...] = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
#: kind of refusal -> what it means, in messages of the loader and findings of `check-data`
REASONS = {
    "missing picture": "the picture file cannot be read",
    "not a file": "the path of the picture leads to no plain file",
    "escaping path": "its path leads out of the data folder, by .. or by a link. Copy the file in, or allow its folder "
    "(data.pictures.folders, --pictures-from)",
    "absolute path": "lies outside of the data folder. Copy the file in, or allow its folder (data.pictures.folders, "
    "--pictures-from)",
    "enormous picture": "more pixels or bytes than data.pictures allows. Scale it down",
    "not a picture": "no picture format that is decoded",
    "two-faced file": "a picture and another kind of file in one. Save the picture anew",
    "broken picture": "cannot be decoded whole",
}
#: starts of files that are no pictures, as bytes in lower case, and what to call them
KNOWN = (
    (b"<svg", "is SVG: not a raster picture; convert it"),
    (b"version https://git-lfs", "a Git LFS pointer: the picture itself was not downloaded"),
    (b"<!doctype html", "is HTML: a web page, not a picture"),
    (b"<html", "is HTML: a web page, not a picture"),
    (b"%pdf-", "is PDF: not a raster picture; convert its page"),
    (b"%!ps", "is PostScript: not a raster picture; convert it"),
    (b"\xc5\xd0\xd3\xc6", "is PostScript: not a raster picture; convert it"),
    (b"\xd7\xcd\xc6\x9a", "is WMF: not a raster picture; convert it"),
    (b"ftyphei", "is HEIC: convert it"),
    (b"ftypavif", "is AVIF: convert it"),
    (b"pk\x03\x04", "is a ZIP archive, not a picture"),
)
#: what makes a picture a file of another kind too
FOREIGN = ((b"%PDF-1", "PDF"), (b"<?php", "PHP"), (b"<script", "script"), (b"<html", "HTML"))


class PictureSettings(Settings):
    """Which picture files are read and decoded; a row whose picture is not is a broken row."""

    folders: tuple[Path, ...] = Field(
        (),
        description="Further folders that pictures may lie in. Without them a path that leads out of the data folder, by .., "
        "absolute or through a link, is refused.",
    )
    max_pixels: int = Field(
        MAX_PIXELS, gt=0, le=PILLOW_PIXELS, description="Width times height; more, by the header, is not decoded."
    )
    max_bytes: int = Field(100_000_000, gt=0, description="Bytes of a file; a larger one is not read.")
    formats: tuple[Format, ...] = Field(
        FORMATS, min_length=1, description="Formats that are decoded; PPM, TGA and JPEG2000 may be added."
    )
    polyglots: bool = Field(
        False, description="Take pictures that are another kind of file too (ZIP, PDF, HTML, script, PHP)."
    )


USUAL = PictureSettings()


class PictureError(ValueError):
    """A picture that is not taken: the kind of refusal, one of `REASONS`, and what is particular about this one."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind, detail)  # both, so that it comes whole from another process
        self.kind, self.detail = kind, detail

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail or REASONS[self.kind]}"


def place_of(path: Path, root: Path, folders: tuple[Path, ...] = ()) -> str:
    """Return the kind of refusal that the place of a picture is, "" within `root` or one of `folders`.

    Where the path really leads counts: whatever links are in it are followed.
    """
    real = os.path.realpath(path)
    if any(_inside(real, os.path.realpath(one)) for one in (root, *folders)):
        return ""
    climbs = ".." in path.parts or _inside(os.path.abspath(path), os.path.abspath(root))
    return "escaping path" if climbs else "absolute path"


def is_link(path: Path, root: Path) -> bool:
    """Tell whether a path within `root` goes through a link below it."""
    plain, base = os.path.abspath(path), os.path.abspath(root)
    return _inside(plain, base) and os.path.realpath(path) != os.path.realpath(root) + plain[len(base) :]


def _inside(path: str, base: str) -> bool:
    return path.startswith(base.rstrip(os.sep) + os.sep)


def file_bytes(path: Path, allowed: PictureSettings) -> bytes:
    """Return the bytes of a picture file; pipes, devices and folders are not opened.

    Raises:
        PictureError: there is no such plain file, or it is larger than allowed.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise PictureError("not a file", "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or device")
        with path.open("rb") as file:
            raw = file.read(allowed.max_bytes + 1) if status.st_size <= allowed.max_bytes else b""
    except OSError as error:
        dangling = os.path.islink(path) and not os.path.exists(path)
        raise PictureError("missing picture", "a link to nothing" if dangling else str(error.strerror)) from error
    except PictureError:
        raise
    except ValueError as error:  # a null character in a path
        raise PictureError("missing picture", str(error)) from error
    size = max(status.st_size, len(raw))
    if size > allowed.max_bytes:
        raise PictureError("enormous picture", f"{size:,} bytes, more than {allowed.max_bytes:,}")
    return raw


def opened(raw: bytes, allowed: PictureSettings) -> Image.Image:
    """Return a picture of which the header alone was read, and says that the rest may be decoded.

    Raises:
        PictureError: no format that is allowed, too large, another kind of file too, or a broken header.
    """
    if len(raw) > allowed.max_bytes:
        raise PictureError("enormous picture", f"{len(raw):,} bytes, more than {allowed.max_bytes:,}")
    with decoding():
        try:
            picture = Image.open(io.BytesIO(raw), formats=allowed.formats)
        except UnidentifiedImageError as error:
            raise PictureError("not a picture", named(raw, allowed)) from error
    pixels = picture.width * picture.height
    if pixels > allowed.max_pixels:
        size = f"{picture.width}x{picture.height} = {pixels:,} pixels"
        raise PictureError("enormous picture", f"{size}, more than {allowed.max_pixels:,}")
    if not allowed.polyglots and (foreign := foreign_of(raw)):
        raise PictureError("two-faced file", f"{picture.format} and {foreign}")
    return picture


@contextmanager
def decoding() -> Iterator[None]:
    """Turn whatever a decoder raises within the block into a `PictureError`."""
    try:
        yield
    except PictureError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError("enormous picture", _first(error)) from error
    # on hostile bytes decoders raise what they come across: struct.error, IndexError, KeyError, MemoryError, zlib.error ...
    except Exception as error:
        raise PictureError("broken picture", f"{type(error).__name__}: {_first(error)}") from error


def upright(raw: bytes, allowed: PictureSettings) -> Image.Image:
    """Decode a picture file as RGB, its EXIF rotation applied.

    Raises:
        PictureError: it is not allowed, or cannot be decoded.
    """
    with opened(raw, allowed) as picture, decoding():
        picture.load()
        return ImageOps.exif_transpose(picture).convert("RGB")


def named(raw: bytes, allowed: PictureSettings = USUAL) -> str:
    """Return what a file that no allowed decoder knows looks like."""
    if not raw:
        return "an empty file"
    head = raw[:1024].lower()
    return next((name for start, name in KNOWN if start in head), f"none of {', '.join(allowed.formats)}")


def foreign_of(raw: bytes) -> str:
    """Return what else than a picture a file is, "" for nothing: a ZIP archive at its end, or script or PDF inside."""
    found = [name for mark, name in FOREIGN if mark in raw]
    at = raw.rfind(b"PK\x05\x06", -65_557)
    if at >= 0 and len(raw) >= at + 22 and at + 22 + int.from_bytes(raw[at + 20 : at + 22], "little") == len(raw):
        found.append("ZIP")
    return " and ".join(found)


def _first(error: BaseException) -> str:
    lines = str(error).splitlines()
    return (lines[0] if lines else "no message")[:120]
