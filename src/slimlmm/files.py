"""Small files written whole or not at all: under a temporary name, flushed to the disk, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from slimlmm.errors import UserError


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
