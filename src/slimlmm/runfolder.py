"""The run folder: what belongs to which run, which rounds are done, and nothing half-written.

    RUN/recipe.yaml  run.json  cache/  stages/01-blocks.1/{plan.json, model/, metrics.json, done.json}  results.json  final/

``done.json`` is written last; a round without it is redone. ``run.json`` says what the run was started with, so that another
model, data set or recipe is refused instead of mixed in.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimlmm.errors import UserError


def write_json(path: Path, content: Any) -> None:
    """Write JSON under a temporary name, flush it to disk, then rename."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def claim(path: Path, identity: dict[str, Any]) -> None:
    """Create the folder and sign it with ``run.json``, or find that it has that signature.

    Raises:
        UserError: the folder holds something else, or a run of another model, data set or recipe (each named).
    """
    record = path / "run.json"
    if record.exists():
        before = json.loads(record.read_text(encoding="utf-8"))
        changed = [key for key, value in identity.items() if before.get(key) != value]
        if changed:
            told = "; ".join(f"{key}: was {_short(before.get(key))}, now {_short(identity[key])}" for key in changed)
            raise UserError(f"{path} belongs to another run ({told}). Choose another --out, or remove that folder.")
        return
    if path.exists() and any(path.iterdir()):
        raise UserError(f"{path} exists, is not empty and is no slimlmm run (no run.json). Choose another --out.")
    path.mkdir(parents=True, exist_ok=True)
    write_json(record, identity)


@dataclass(frozen=True, slots=True)
class RunFolder:
    """One run on disk; `shared` is a cache that it has in common with other runs."""

    path: Path
    shared: Path | None = None

    @classmethod
    def open(cls, path: Path, identity: dict[str, Any], shared: Path | None = None) -> RunFolder:
        """Create the folder, or take it up again if it belongs to the same run; refuses as `claim` does."""
        claim(path, identity)
        return cls(path, shared)

    def keep_recipe(self, text: str) -> None:
        """Write down what is carried out, all defaults and planned sizes included."""
        (self.path / "recipe.yaml").write_text(text, encoding="utf-8")

    @property
    def cache(self) -> Path:
        """Where the teacher's hidden states are kept."""
        return self.shared or self.path / "cache"

    @property
    def previous(self) -> Path:
        """Where the hidden states of the model that the round in work began with are kept, until that round is settled."""
        return self.path / "previous"

    def forget_previous(self) -> None:
        """Remove them: the next round begins with another model."""
        shutil.rmtree(self.previous, ignore_errors=True)

    @property
    def final(self) -> Path:
        """The finished checkpoint."""
        return self.path / "final"

    def stage(self, number: int, name: str) -> Path:
        """Return the folder of one round, emptied unless it is done."""
        folder = self.path / "stages" / f"{number:02d}-{name}"
        if not (folder / "done.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        return folder


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else text[:12] + "..."
