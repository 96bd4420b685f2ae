"""Folders that are written whole or not at all, of whatever runtime; checkpoints have their own way, which loads them again."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slimlmm.checkpoint import refuse_foreign
from slimlmm.errors import UserError


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; it takes the place of `folder` when the block ends, and goes if that fails.

    Raises:
        UserError: `folder` holds what slimlmm did not write, or the disk refuses.
    """
    target = folder.expanduser().absolute()
    refuse_foreign(target)
    partial, old = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "old"))
    try:
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.rglob("*"), partial):
            _flush(path)
        if target.exists():
            target.rename(old)
        partial.rename(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written. {error.strerror or error}") from error
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _flush(path: Path) -> None:
    """Force a file, or the list of files of a folder, to disk; let all read it, as they may read its folder."""
    if path.is_file():
        path.chmod(0o666 & ~_umask())
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def digest(folder: Path) -> str:
    """Return the hash over configuration and weights of a checkpoint: SHA-256 over name and SHA-256 of each file."""
    found = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        with path.open("rb") as file:
            found.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()
