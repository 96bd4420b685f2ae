"""What of a round is finished: the model after its cuts and after each training, so that a killed round goes on where it was.

    stages/01-inner.1/parts/{0, 1, ...}/{model/, part.json}

Part 0 is the model after the cuts, part n that after the n-th training. A part counts when ``part.json`` is there; it is written
last, with the hashes of the model's files, and then the part before is removed.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter
from transformers import PreTrainedModel

from slimlmm import checkpoint
from slimlmm.beginnings import Start
from slimlmm.distill import TrainResult
from slimlmm.evaluate import Score
from slimlmm.files import digests, read_json, write_json
from slimlmm.runfolder import is_whole


class Parts(BaseModel):
    """What a round found so far: the score after its cuts, its trainings, and the seconds that it took."""

    cut_score: Score
    faded: list[TrainResult] = []
    trained: list[TrainResult] = []
    seconds: float = 0.0


class Journal:
    """The parts of one round, in its folder; with a `start`, those that runs have in common are shared."""

    def __init__(self, folder: Path, start: Start | None = None) -> None:
        self.round, self.folder, self.start = folder, folder / "parts", start
        self._began, self._earlier = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        """Seconds of the round, those of an interrupted run up to its last part included."""
        return self._earlier + time.perf_counter() - self._began

    def last(self) -> int | None:
        """Return the number of the last finished part, None where there is none; what is not whole is removed."""
        found = []
        for path in self.folder.glob("*"):
            if is_whole(path / "part.json", path / "model"):
                found.append(int(path.name))
            else:
                shutil.rmtree(path)
        return max(found, default=None)

    def take_over(self) -> int | None:
        """Return the number of the last part that a run with the same beginning has made, now also this one's; None for none."""
        return None if self.start is None else self.start.take(self.round)

    def keep(self, number: int, model: PreTrainedModel, processor: Any, parts: Parts) -> None:
        """Write down what a part left, and what was found so far; the part before goes."""
        facts = parts.model_copy(update={"seconds": self.seconds}).model_dump(mode="json")
        part = self.folder / str(number)
        part.mkdir(parents=True, exist_ok=True)
        checkpoint.save(model, processor, part / "model")
        write_json(part / "part.json", facts | {"files": digests(part / "model")})
        if self.start is not None:
            self.start.keep(number, self.round)
        for path in self.folder.iterdir():
            if path != part:
                shutil.rmtree(path)

    def taken_up(self, number: int) -> Parts:
        """Return what had been found when a part was written; the seconds go on from there."""
        found = read_json(TypeAdapter(Parts), self.folder / str(number) / "part.json")
        self._earlier, self._began = found.seconds, time.perf_counter()
        return found

    def model(self, number: int, device: Any) -> tuple[PreTrainedModel, Any]:
        """Return the model and the processor of a part."""
        loaded = checkpoint.load(self.folder / str(number) / "model", device=device)
        return loaded.model, loaded.processor

    def forget(self) -> None:
        """Remove all parts: the round is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)
