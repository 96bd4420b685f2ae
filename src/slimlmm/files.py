"""Small files written whole or not at all: under a temporary name, flushed to the disk, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from slimlmm.errors import UserError
from slimlmm.settings import on_one_line

T = TypeVar("T")


def write_text(path: Path, text: str) -> None:
    """Write a text file in place of what was there; a crash at any moment leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    flush_folder(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Write JSON as `write_text` does."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(adapter: TypeAdapter[T], path: Path) -> T:
    """Return what a JSON file of a run holds, validated.

    Raises:
        UserError: it cannot be read, or was changed since it was written; the message names what does not fit.
    """
    try:
        return adapter.validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from error
    except ValidationError as error:
        raise UserError(
            f"{path} is not what was written there ({on_one_line(error)}). Put the file back, or remove it: the same command "
            "makes anew what it held."
        ) from error


def is_file(path: Path) -> bool:
    """Tell whether there is such a file; a name that no file can have is that of none."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a null character
        return False


def flush_folder(folder: Path) -> None:
    """Force the list of a folder's files to the disk, so that a renamed file is found there after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush(path: Path) -> None:
    """Force one written file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder, by its path from there."""
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_unwritable(folder: Path) -> None:
    """Refuse a folder that cannot be made or written to, before anything long begins; nothing is made.

    Raises:
        UserError: with the operating system's reason.
    """
    place = folder.expanduser().absolute()
    while not place.exists():
        place = place.parent
    probe = place / f".probe-{os.getpid()}"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}). Choose another --out.") from error
