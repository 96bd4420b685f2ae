"""Folders that are written whole or not at all, of whatever runtime; checkpoints have their own way, which loads them again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slimlmm.checkpoint import replaced


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `folder` when the block ends (`checkpoint.replaced`); all may read it."""
    with replaced(folder) as partial:
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                path.chmod(0o666 & ~_umask())


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
