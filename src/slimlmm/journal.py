"""What of a round is finished: the model after its cuts and after each training, so that a killed round goes on where it was.

    stages/01-inner.1/parts/{0, 1, ...}/{model/, part.json}

Part 0 is the model after the cuts, part n that after the n-th training. A part counts when ``part.json`` is there; it is written
last, with the hashes of the model's files, and then the part before is removed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from slimlmm import checkpoint
from slimlmm.files import digests, write_json


def is_whole(record: Path, model: Path) -> bool:
    """Tell whether the files of a model folder are those that the record beside it was written with."""
    try:
        told = json.loads(record.read_text(encoding="utf-8"))
        return bool(told["files"]) and told["files"] == digests(model)
    except (OSError, ValueError, KeyError, TypeError):
        return False


class Journal:
    """The parts of one round, in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "parts"

    def last(self) -> int | None:
        """Return the number of the last finished part, None where there is none; what is not whole is removed."""
        found = []
        for path in self.folder.glob("*"):
            if is_whole(path / "part.json", path / "model"):
                found.append(int(path.name))
            else:
                shutil.rmtree(path)
        return max(found, default=None)

    def keep(self, number: int, model: PreTrainedModel, processor: Any, facts: dict[str, Any]) -> None:
        """Write a part down; the one before goes."""
        part = self.folder / str(number)
        part.mkdir(parents=True, exist_ok=True)
        checkpoint.save(model, processor, part / "model")
        write_json(part / "part.json", facts | {"files": digests(part / "model")})
        for path in self.folder.iterdir():
            if path != part:
                shutil.rmtree(path)

    def facts(self, number: int) -> dict[str, Any]:
        """Return what was written with a part."""
        found: dict[str, Any] = json.loads((self.folder / str(number) / "part.json").read_text(encoding="utf-8"))
        return found

    def model(self, number: int, device: Any) -> tuple[PreTrainedModel, Any]:
        """Return the model and the processor of a part."""
        loaded = checkpoint.load(self.folder / str(number) / "model", device=device)
        return loaded.model, loaded.processor

    def forget(self) -> None:
        """Remove all parts: the round is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)
